"""The samples of a training run, in an order that ranks, workers and interruptions do not change.

MosaicML Streaming guarantees the order. With the same data, seed and `num_canonical_nodes`, each
global batch of an epoch has the same samples, for any number of ranks and workers. A checkpoint
stores how much of the epoch has been read, and a resumed run reads the rest in the same order.

This module adds the random numbers. Each sample has a generator of its own, whose seed names the
sample but not the process that reads it. In a run with seed 7 on 1000 samples, for example, the
views of sample 12 in epoch 3 are drawn with

    np.random.default_rng((7, 3, 12, 0))

If sample 12 occurs a second time in that epoch, it counts as sample 1012 there.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from composer.core import DataSpec
from composer.utils import dist
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState

from shards.download import CachedStream, Download
from shards.format import (
    Clips,
    TooManyUnreadable,
    check_size,
    decode_frame,
    read_classes,
    record_unreadable,
    spread,
)
from shards.loader import StepLoader, samples_in, split_step
from shards.shared_memory import claim, one_job_at_a_time
from shards.storage import Storage
from shards.views import UnitInterval, stored_frames

# (stored sample, generator) -> training sample
Transform = Callable[[dict, np.random.Generator], dict]


class DeterministicStream(StreamingDataset):
    """Streams of samples, each transformed with a generator of its own.

    The generator's seed is (seed, epoch, identity, repeat). `identity` is
    sample + occurrence * num_samples. A stream with a large proportion lists a sample several
    times in an epoch; `occurrence` counts its earlier places in the list, before it is shuffled.
    The list depends on seed and epoch alone, and so do the generators.
    `repeat` counts from 0 to `repeats` - 1.

    Args:
        transform: called with a stored sample and its generator. The sample has further entries
            `stream`, the index of its stream, and `of_images`. A ValueError declares the sample
            unreadable; the next sample of the data then takes its place.
        of_images: for each stream, whether its batches are of images alone.
        patch_size, unreadable, max_unreadable: see TrainingData, load and record_unreadable.
        repeats: times that each sample is transformed after it has been read once.
        settings: of StreamingDataset. Its batch_size counts samples before they are repeated.
    """

    def __init__(
        self,
        transform: Transform,
        of_images: list[bool],
        patch_size: int,
        unreadable: Path,
        max_unreadable: float,
        repeats: int,
        **settings: Any,
    ):
        super().__init__(shuffle=True, **settings)
        self.transform = transform
        self.of_images = of_images
        self.one_stream_per_batch = self.batching_method == "per_stream"
        self.patch_size = patch_size
        self.unreadable = unreadable
        self.max_unreadable = max_unreadable
        self.repeats = repeats

    def drop_incomplete_batch(self, global_batch_size: int) -> None:
        """Shorten each epoch to a multiple of the samples that a step has over all ranks.

        Streaming would fill the last batch of each rank with samples that come twice. It has no
        argument against that: its `epoch_size` decides how often each stream is sampled, too.

        Raises:
            ValueError: an epoch is shorter than a batch, or a stream if batches are not mixed.
        """
        per_step = global_batch_size // self.repeats
        epoch_sizes = [self.epoch_size]  # stored samples an epoch: of the mix, or of each stream
        if self.one_stream_per_batch:
            epoch_sizes = [stream.choose for stream in self.streams]
        if min(epoch_sizes) < per_step:
            batch = f"data.global_train_batch_size={global_batch_size}"
            of = "a stream in an epoch" if self.one_stream_per_batch else "an epoch"
            fewest = min(epoch_sizes) * self.repeats
            raise ValueError(f"{batch}: must be at most the {fewest} samples of {of}")
        epoch_sizes = [size - size % per_step for size in epoch_sizes]
        if self.one_stream_per_batch:
            for stream, size in zip(self.streams, epoch_sizes, strict=True):
                stream.choose = size
        self.epoch_size = sum(epoch_sizes)
        self.length = self.epoch_size // dist.get_world_size()

    def __len__(self) -> int:
        return super().__len__() * self.repeats

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a stored sample, or its error as `read_error` if its shard is cut off."""
        try:
            sample = super().__getitem__(number)
        except (IndexError, ValueError) as error:
            sample = {"name": f"sample {number} of all streams", "read_error": str(error)}
        shard, _ = self.spanner[number]
        stream = int(self.stream_per_shard[shard])
        return sample | {"stream": stream, "of_images": self.of_images[stream]}

    def __iter__(self) -> Iterator[dict]:
        """Yield the transformed samples of this rank and worker."""
        for position, sample in enumerate(super().__iter__()):
            yield from self.transform_sample(sample, self._keys[position])

    def transform_sample(self, sample: dict, key: tuple[int, int, int]) -> Iterator[dict]:
        """Yield the `repeats` transforms of a sample, or of the next readable one under its key."""
        identity = key[-1]
        replacements = 0
        for repeat in range(self.repeats):
            transformed = None
            while transformed is None:
                try:
                    if "read_error" in sample:
                        raise ValueError(sample["read_error"])
                    check_size(sample, self.patch_size)
                    transformed = self.transform(sample, np.random.default_rng((*key, repeat)))
                except ValueError as error:
                    limit = self.max_unreadable * self.num_samples
                    record_unreadable(self.unreadable, sample["name"], error, limit)
                    replacements += 1
                    if replacements >= self.num_samples:
                        text = f"no sample can be used, see {self.unreadable}"
                        raise TooManyUnreadable(text) from error
                    sample = self[(identity + replacements) % self.num_samples]
            yield transformed

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple:
        """Return Streaming's list of an epoch's samples, with identities instead of numbers.

        Streaming shuffles the list and deals it out without a look at its values.
        """
        shuffle_units, samples = super().resample_streams(epoch, stream_id)
        return shuffle_units, samples + count_earlier(samples) * self.num_samples

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        """Return the samples that this worker is to read, and keep their keys in the same order.

        Streaming has no public method between the order of an epoch and the reading.
        """
        identities = super()._get_work(epoch, sample_in_epoch)
        is_padding = identities == -1  # __iter__ leaves it out
        wanted = identities[~is_padding].tolist()
        self._keys = [(self.shuffle_seed, epoch, identity) for identity in wanted]
        return np.where(is_padding, -1, identities % self.num_samples)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard unless it is on disk.

        Streaming's read-ahead calls this method for every sample. Its own method then takes a file
        lock that all workers of a machine share. The states of the shards have no public name.
        """
        if blocking or self._shard_states[shard_id] != _ShardState.LOCAL:
            super().prepare_shard(shard_id, blocking)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position in the data, for a checkpoint.

        num_samples counts the samples of all ranks in this epoch, with their repeats.

        At the end of an epoch, Composer counts samples from 0 again, but Streaming still names the
        finished epoch. Streaming's own method would make a resumed run repeat that epoch.
        """
        state = super().state_dict(num_samples // self.repeats, from_beginning)
        if num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state


def count_earlier(values: np.ndarray) -> np.ndarray:
    """Return for each value how often it stands earlier in the array: [3, 1, 3] -> [0, 0, 1]."""
    order = values.argsort(kind="stable")  # equal values side by side, in their order
    _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    earlier = np.empty_like(values)
    earlier[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return earlier


def open_stream(
    *,
    path: str,
    proportion: PositiveFloat | None = None,
    repeat: PositiveFloat | None = None,
    cache: str | None = None,
) -> Stream:
    """Open one data set of a mix.

    Args:
        path: folder, or s3:// address, of a data set of data_prep.py.
        proportion: share of the epoch; without proportions, each sample comes `repeat` times.
        repeat: times that each sample comes in an epoch, default 1; excludes proportions.
        cache: local folder for the shards of an s3:// address; default a folder of the run in
            `cache` of `data.download`. Runs at the same time need folders of their own.
    """
    read_classes(path)  # raises if the data set is incomplete
    if Storage(path).remote:
        return CachedStream(remote=path, local=cache, proportion=proportion, repeat=repeat)
    return Stream(local=path, proportion=proportion, repeat=repeat)


def check_batch(batch_size: int, micro_size: int | None, repeats: int, ranks: int) -> None:
    """Raise ValueError, with the nearest sizes that work, for sizes that do not divide.

    The sizes are in samples over all ranks; `micro_size` is None for the whole batch.
    """
    batch_key, micro_key = "data.global_train_batch_size", "data.global_micro_batch_size"
    key, size = (micro_key, micro_size) if micro_size else (batch_key, batch_size)
    if batch_size % size:
        nearest = max(1, round(batch_size / size)) * size
        problem = f"must be a multiple of {key}={size}"
        raise ValueError(f"{batch_key}={batch_size}: {problem}, such as {nearest}")
    if size % repeats:
        raise ValueError(f"data.repeats={repeats}: must divide {key}={size}")
    unit = ranks * repeats
    if size % unit:
        problem = f"must be a multiple of the {ranks} ranks"
        if repeats > 1:
            problem += f" times data.repeats={repeats}"
        counts = [count for count in range(1, size + 1) if size % (count * repeats) == 0]
        fewer = [str(count) for count in counts if count < ranks][-1:]
        more = [str(count) for count in counts if count > ranks][:1]
        nearest = max(1, round(size / unit)) * unit
        new = f"{key}={nearest}"
        if micro_size:
            new += f" {batch_key}={nearest * (batch_size // size)}"
        remedy = f"launch {' or '.join(fewer + more)} ranks, or start a new run with {new}"
        raise ValueError(f"{key}={size}: {problem}; {remedy}")


def open_streams(
    streams: list[dict], run: Path, patch_size: int, download: Download, epoch_size: int | None
) -> list[Stream]:
    """Open all data sets of a mix; raise ValueError if they cannot be trained on."""
    if not streams:
        raise ValueError("data.streams is empty: name at least one data set")
    path, times = Counter(stream["path"] for stream in streams).most_common(1)[0]
    if times > 1:
        raise ValueError(f"data.streams names {path} {times} times: name it once, with proportion")
    have_proportion = {stream.get("proportion") is not None for stream in streams}
    if len(have_proportion) > 1:
        raise ValueError("data.streams: give a proportion to all streams or to none")
    repeated = any(stream.get("repeat") is not None for stream in streams)
    if repeated and (True in have_proportion or epoch_size):
        raise ValueError("data.streams: repeat excludes proportion and data.epoch_size")
    local = [stream["path"] for stream in streams if not Storage(stream["path"]).remote]
    if local and download.cache_limit:  # Streaming would delete the data set's own shards.
        problem = f"data.download.cache_limit={download.cache_limit}: {local[0]} is not in a bucket"
        raise ValueError(f"{problem}; leave cache_limit out, or put all data.streams into buckets")
    opened = []
    for stream in streams:
        path = stream["path"]
        if Storage(path).remote and not stream.get("cache"):
            stream = stream | {"cache": download.folder(run, path)}
        opened.append(open_stream(**stream))
        check_samples(path, patch_size)
    return opened


def check_samples(path: str, patch_size: int) -> None:
    """Raise ValueError if none of 16 samples, evenly spaced, can be trained on."""
    clips = Clips(path)
    numbers = spread(len(clips), 16)
    for number in numbers:
        try:
            sample = clips[number]
            decode_frame(sample, 0)
            check_size(sample, patch_size)
            return
        except (ValueError, IndexError) as error:
            fault = error
    raise ValueError(f"{path}: none of {len(numbers)} samples can be trained on: {fault}")


def sample_bytes(dataset: DeterministicStream) -> int:
    """Return the bytes of a transformed sample, or 0 if the first one cannot be read."""
    with suppress(ValueError):  # Training reports unreadable samples.
        sample = next(dataset.transform_sample(dataset[0], (0, 0, 0)))
        return sum(getattr(value, "nbytes", 8) for value in sample.values())
    return 0


@dataclass(kw_only=True)
class TrainingData:
    """Data sets to train on, and how they are cut into batches: the block `data` of YAML files.

    Args:
        streams: data sets to mix at random.
        global_train_batch_size: samples of an optimiser step, over all ranks.
        global_micro_batch_size: samples of a forward pass, over all ranks; default the whole batch.
        num_workers: processes of each rank; 0 to read in the training process.
        prefetch_factor: micro-batches that each worker prepares ahead; default 2, and more if the
            workers would otherwise not hold a step and a micro-batch each.
        num_canonical_nodes: fixes the order of samples; a multiple or divisor of the machines.
        shuffle_block_size: samples over which the samples of a shard are spread; default
            4,000,000 / num_canonical_nodes, at least 262,144. It fixes the order, too.
        epoch_size: samples read in an epoch; default all streams once.
        repeats: times to draw views from each sample that is read. Each draw counts as a sample of
            the batch and of the epoch, and the draws are among each other's negatives.
        one_stream_per_batch: take all samples of a batch from the same stream; batches of the
            streams come in random order.
        max_unreadable: fraction of the samples that may be unreadable; one sample always may.
        download: see Download.
    """

    streams: list[Annotated[dict, open_stream]]
    global_train_batch_size: PositiveInt
    global_micro_batch_size: PositiveInt | None = None
    num_workers: NonNegativeInt = 4
    prefetch_factor: PositiveInt | None = None
    num_canonical_nodes: PositiveInt = 1
    shuffle_block_size: PositiveInt | None = None
    epoch_size: PositiveInt | None = None
    repeats: PositiveInt = 1
    one_stream_per_batch: bool = False
    max_unreadable: UnitInterval = 0.001
    download: Annotated[dict, Download] | None = None

    @property
    def loaded_at_a_time(self) -> int:
        """Return the size of the batches that workers load, summed over the ranks."""
        if self.one_stream_per_batch:  # Streaming orders whole batches of the streams.
            return self.global_train_batch_size
        return self.global_micro_batch_size or self.global_train_batch_size

    def load(
        self,
        transform: Transform,
        on_device: Callable[[dict], dict],
        seed: int,
        patch_size: int,
        run: Path,
    ) -> tuple[DataSpec, int]:
        """Return this rank's loader, and the number of its samples in a micro-batch.

        Args:
            transform: called in the workers on each sample.
            on_device: called in the training process on each micro-batch, on its device.
            seed: of the order of samples and of their generators.
            patch_size: pixels; samples with smaller frames are not trained on.
            run: run directory, for the list unreadable.jsonl.

        Raises:
            ValueError: the data sets cannot be trained on, or the sizes of batches do not divide.
        """
        batch, micro = self.global_train_batch_size, self.global_micro_batch_size
        ranks = dist.get_world_size()
        check_batch(batch, micro, self.repeats, ranks)
        micro_size = (micro or batch) // ranks
        loaded_size = self.loaded_at_a_time // ranks
        downloads = Download(**self.download or {})
        opened = open_streams(self.streams, run, patch_size, downloads, self.epoch_size)
        of_images = [False] * len(opened)
        if self.one_stream_per_batch:  # else all samples of a batch have the frames of a clip
            of_images = [stored_frames(stream["path"]) == 1 for stream in self.streams]
        with one_job_at_a_time():
            dataset = DeterministicStream(
                transform,
                of_images,
                patch_size,
                run / "unreadable.jsonl",
                self.max_unreadable,
                self.repeats,
                batch_size=loaded_size // self.repeats,
                streams=opened,
                shuffle_seed=seed,
                shuffle_block_size=self.shuffle_block_size,
                num_canonical_nodes=self.num_canonical_nodes,
                epoch_size=self.epoch_size,
                batching_method="per_stream" if self.one_stream_per_batch else "random",
                **downloads.settings(),
            )
            dataset.owner = claim(dataset)
        dataset.drop_incomplete_batch(batch)
        bytes_each = sample_bytes(dataset) if self.num_workers else 0
        micro_batches = batch // (ranks * loaded_size)
        sizes = (loaded_size, bytes_each, micro_batches)
        spec = DataSpec(
            StepLoader(dataset, *sizes, self.num_workers, self.prefetch_factor),
            microbatch_transforms=on_device,
            split_batch=split_step,
            get_num_samples_in_batch=samples_in,
        )
        return spec, micro_size
