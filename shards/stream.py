"""The samples of a training, in an order and with chance that neither ranks, workers nor interruptions change."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Any

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from filelock import FileLock, Timeout
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.shuffle import get_shuffle
from torch.utils.data import DataLoader

from shards.format import Clips, decode_frame, record_unreadable, read_classes
from shards.storage import Storage
from shards.views import UnitInterval


class DeterministicStream(StreamingDataset):
    """Streams of samples, each given to `transform` with a generator of its own, seeded by (seed, epoch, sample).

    The number of its stream is among what is stored of it, as `stream`.

    With `repeats`, each sample is read once and given to `transform` so many times. One that cannot be decoded is named in
    the file `unreadable` and gives way to the next of the data set; more than a fraction `max_unreadable` ends the run.

    The n-th occurrence of a sample that its stream repeats within an epoch counts as sample + n * num_samples, in the order
    of the epoch's list before it is shuffled. That list depends on seed and epoch alone, so the keys are the same for any
    number of workers and ranks and after a resume.
    """

    transform: Callable[[dict, np.random.Generator], dict]
    constant_mix: bool = False
    repeats: int = 1
    unreadable: Path
    max_unreadable: float

    def resample_streams(
        self, epoch: int, stream_id: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        units, samples = super().resample_streams(epoch, stream_id)
        order = samples.argsort(kind="stable")
        _, first, counts = np.unique(samples[order], return_index=True, return_counts=True)
        samples[order] += (np.arange(len(samples)) - np.repeat(first, counts)) * self.num_samples
        if self.constant_mix:
            how = (self.num_canonical_nodes, self.shuffle_seed, epoch, self.shuffle_block_size)
            shuffled = get_shuffle(self.shuffle_algo, units, *how)  # as our caller is about to do
            samples[shuffled] = samples[self.spread(shuffled, samples)]
        return units, samples

    def stream_of(self, samples: np.ndarray) -> np.ndarray:
        shard = (
            np.searchsorted(self.sample_offset_per_shard, samples % self.num_samples, "right") - 1
        )
        return self.stream_per_shard[shard]

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            sample = super().__getitem__(number)
        except (IndexError, ValueError) as error:  # its shard is cut
            sample = {"name": f"sample {number} of all", "damage": str(error)}
        return sample | {"stream": int(self.stream_of(np.array(number)))}

    def spread(self, shuffled: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Reorder positions in `samples` so that each stream's are evenly spaced, in their order: batches take runs of them.

        Every run then has of each stream what its share of the epoch makes, to within one sample.
        """
        stream = self.stream_of(samples)
        parts = []
        for part in np.array_split(shuffled, self.num_canonical_nodes):
            place = np.empty(len(part))
            for one in np.unique(stream):
                mine = np.flatnonzero(stream[part] == one)
                place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
            parts.append(part[place.argsort(kind="stable")])
        return np.concatenate(parts)

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        work = super()._get_work(epoch, sample_in_epoch)
        self._keys = [(self.shuffle_seed, epoch, int(key)) for key in work if key != -1]
        return np.where(work == -1, -1, work % self.num_samples)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As Streaming's, whose look-ahead takes a lock on disk for every sample: a shard that is there needs none."""
        if blocking or self._shard_states[shard_id] != _ShardState.LOCAL:
            super().prepare_shard(shard_id, blocking)

    def __len__(self) -> int:
        return super().__len__() * self.repeats

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """As Streaming's, but that at the end of an epoch, where Composer counts from 0 again, the next one is due."""
        state = super().state_dict(num_samples // self.repeats, from_beginning)
        return state if num_samples else state | {"epoch": max(state["epoch"], self.next_epoch)}

    def __iter__(self) -> Iterator[dict]:
        for number, sample in enumerate(super().__iter__()):
            key, tried = self._keys[number], 0
            for repeat in range(self.repeats):
                while True:
                    try:
                        if "damage" in sample:
                            raise ValueError(sample["damage"])
                        views = self.transform(sample, np.random.default_rng((*key, repeat)))
                        break
                    except ValueError as error:
                        self.note(sample["name"], error)
                        tried += 1
                        sample = self[(key[-1] + tried) % self.num_samples]
                yield views

    def note(self, name: str, error: ValueError) -> None:
        """Add a sample to the list of the unreadable.

        Raises:
            RuntimeError: there are too many.
        """
        count = len(record_unreadable(self.unreadable, name, error))
        if count > max(1, self.max_unreadable * self.num_samples):
            raise RuntimeError(
                f"{count} samples cannot be decoded, see {self.unreadable}; run data_prep.py verify"
            )


def open_stream(
    *, path: str, proportion: PositiveFloat | None = None, cache: str | None = None
) -> Stream:
    """One data set of a mix.

    Args:
        path: folder, or s3:// address, of a data set of data_prep.py.
        proportion: share of the epoch; without it in every stream, each sample is seen once an epoch.
        cache: local folder for what is fetched from s3://; if not given, see cache_of.

    Raises:
        ValueError: no such data set.
    """
    read_classes(path)
    if Storage(path).remote:
        return Stream(remote=path, local=cache, proportion=proportion)
    return Stream(local=path, proportion=proportion)


def cache_of(run: Path, path: str) -> str:
    """A folder for what a run fetches of a data set: the same for its next life, another for every other run."""
    return str(Path(gettempdir(), f"{run.name}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"))


@contextmanager
def one_job_at_a_time() -> Iterator[None]:
    """Other jobs on this machine wait: each StreamingDataset takes the first names of shared memory that are free."""
    lock, first = (
        FileLock(Path(gettempdir(), f"streams-{os.getuid()}.lock")),
        dist.get_local_rank() == 0,
    )
    if first:
        with suppress(Timeout):  # no wait is worth more than a job
            lock.acquire(timeout=60)
    dist.barrier()
    try:
        yield
    finally:
        if first:
            lock.release()


def frame_size(path: str) -> tuple[int, int]:
    """Height and width of a frame of a data set: the first that can be decoded."""
    for sample in Clips(path):
        with suppress(ValueError):
            return decode_frame(sample, 0).shape[:2]
    raise ValueError(f"{path}: no sample can be decoded; run data_prep.py verify")


def check_streams(streams: list[dict], batch: int, micro: int, repeats: int, ranks: int) -> None:
    """Raises ValueError where the block `data` asks for what cannot be: see load_stream."""
    if batch % micro or micro % ranks:
        raise ValueError(
            f"data.global_train_batch_size {batch} must be a multiple of global_micro_batch_size {micro}, "
            f"and that of the number of ranks, {ranks}"
        )
    if micro // ranks % repeats:
        raise ValueError(
            f"data.repeats {repeats} must divide each rank's share of a micro-batch, {micro // ranks}"
        )
    if not streams:
        raise ValueError("data.streams is empty; name at least one data set")
    path, times = Counter(stream["path"] for stream in streams).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"data.streams names {path} {times} times; name it once, with a proportion"
        )
    if len({stream.get("proportion") is None for stream in streams}) > 1:
        raise ValueError(
            "data.streams: some have a proportion and some have not; give it to all or to none"
        )


def load_stream(
    transform: Callable[[dict, np.random.Generator], dict],
    on_device: Callable[[dict], dict],
    seed: int,
    patch_size: int,
    run: Path,
    *,
    streams: list[Annotated[dict, open_stream]],
    global_train_batch_size: PositiveInt,
    global_micro_batch_size: PositiveInt | None = None,
    num_workers: NonNegativeInt = 8,
    num_canonical_nodes: PositiveInt = 1,
    epoch_size: PositiveInt | None = None,
    constant_mix: bool = False,
    repeats: PositiveInt = 1,
    max_unreadable: UnitInterval = 0.001,
) -> tuple[DataSpec, int]:
    """This rank's loader and its share of a micro-batch. The last, incomplete batch of an epoch is left out.

    Args:
        transform: run in the workers on each sample, with a generator of its own.
        on_device: run on each micro-batch.
        streams: data sets to mix at random.
        global_train_batch_size: samples of an optimiser step, over all ranks.
        global_micro_batch_size: samples of a forward pass, over all ranks; the whole batch if not given.
        num_workers: processes of each rank; 0 to read in the training process.
        num_canonical_nodes: fixes the order of samples; divides, or is divided by, the number of machines.
        epoch_size: samples of an epoch; all streams once if not given.
        constant_mix: whether each batch has the same number of samples of each stream, to within one; else it is by chance.
        repeats: how many pairs (or clips) are drawn from each sample that is read. They count as samples of the batch, and
            are among each other's negatives; an epoch has so many times as many.
        max_unreadable: fraction of the samples that may turn out to be undecodable; they are in unreadable.jsonl.

    Raises:
        ValueError: data that is missing, frames smaller than a patch, a batch that does not divide or that no epoch fills.
    """
    ranks = dist.get_world_size()
    micro = global_micro_batch_size or global_train_batch_size
    check_streams(streams, global_train_batch_size, micro, repeats, ranks)
    batch_size = global_train_batch_size // ranks
    opened = [
        open_stream(**{"cache": cache_of(run, stream["path"])} | stream) for stream in streams
    ]
    for path in (stream["path"] for stream in streams):
        height, width = frame_size(path)
        if min(height, width) < patch_size:
            raise ValueError(
                f"{path}: frames of {width}x{height} are smaller than model.patch_size {patch_size}"
            )
    with one_job_at_a_time():
        dataset = DeterministicStream(
            streams=opened,
            batch_size=batch_size // repeats,
            shuffle=True,
            shuffle_seed=seed,
            num_canonical_nodes=num_canonical_nodes,
            epoch_size=epoch_size,
        )
    if dataset.epoch_size * repeats < global_train_batch_size:
        raise ValueError(
            f"data.global_train_batch_size {global_train_batch_size} is more than an epoch's {dataset.epoch_size * repeats}"
        )
    # Whole batches alone: Streaming would fill up each rank's share with samples that come twice, and so add a step for some
    # numbers of ranks.
    dataset.epoch_size -= dataset.epoch_size % (global_train_batch_size // repeats)
    dataset.length = dataset.epoch_size // ranks
    dataset.transform, dataset.constant_mix, dataset.repeats = transform, constant_mix, repeats
    dataset.unreadable, dataset.max_unreadable = run / "unreadable.jsonl", max_unreadable
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
    return DataSpec(loader, microbatch_transforms=on_device), micro // ranks
