"""Pre-train ViC-MAE on streams of video clips and images (paper sections 3 and 4.1).

    composer pretrain.py yamls/demo.yaml                                    # a laptop: makes its data, 4 min
    composer -n 8 pretrain.py yamls/vitl.yaml                               # 8 GPUs
    composer pretrain.py yamls/vitl.yaml yamls/paper.yaml seed=1            # files merge left to right, then key=value
    python pretrain.py yamls/vitl.yaml --plan                               # what it would take, without data or GPUs

The signature of `pretrain` is the schema of its YAML files: each block is the keyword arguments of one callable. All of a
run is in runs/{run_name}/: config.yaml, checkpoints/, metrics.jsonl, result.json, loss.png, reconstructions.png.

Everything random about a sample is a function of (seed, epoch, sample), drawn in the data workers. The device then applies
what was drawn to the whole batch at once.
"""

import bisect
import difflib
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import composer.algorithms
import composer.callbacks
import composer.loggers
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from composer import Algorithm, Callback, Event, Logger, State, Trainer
from composer.core import DataSpec, TimeUnit, ensure_time
from composer.loggers import LoggerDestination
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.trainer.trainer import get_device
from composer.utils import collect_env, create_interval_scheduler, dist, reproducibility
from composer.utils.checkpoint import save_checkpoint
from composer.utils.parallelism import FSDP2Config
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
)
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.shuffle import get_shuffle
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import make_grid, save_image
from tqdm import tqdm
from yaml import YAMLError

import data_prep
from model import PlainReader, ViCMAE, patchify, pool, random_masking, unpatchify

# Composer has py-cpuinfo name the processor in each checkpoint. Its two processes wait by sched_yield alone, which on Linux
# 6.18 starves everything else when two ranks start on two cores: a launch hung for minutes, timers and all.
collect_env.get_cpu_model = platform.processor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, of pixels in 0..1 [code]


def load_config(arguments: list[str], stage: Callable) -> dict[str, Any]:
    """Merge YAML files left to right, then key=value, into keyword arguments of `stage`, checked against its signature.

    Raises:
        ValueError: a file is missing or no YAML; a key is unknown, missing or of the wrong type. Names file and key.
    """
    if not arguments:
        raise ValueError("give at least one file of yamls/; key=value after it changes it")
    sources = {}
    for argument in arguments:
        is_file = argument.endswith((".yaml", ".yml"))
        if not is_file and "=" not in argument:
            raise ValueError(f"{argument!r} is neither a .yaml file nor key=value")
        try:
            sources[argument] = OmegaConf.load(argument) if is_file else OmegaConf.from_dotlist([argument])
        except (OSError, UnicodeError, YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{argument}: {error}") from error
    model = schema(stage)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*sources.values()), resolve=True)
        return model.model_validate(merged).model_dump(exclude_unset=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{' '.join(arguments)}: {error}") from error
    except ValidationError as error:
        # A mistyped key comes first: it explains a missing one.
        wrong = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = [part for part in wrong["loc"] if isinstance(part, int) or part not in ("list", "int", "float", "str")]
    key = ".".join(map(str, path))
    block = ".".join(takewhile(lambda part: isinstance(part, str), path))  # down to the first list
    named = [name for name, part in sources.items() if OmegaConf.select(part, block) is not None]
    if wrong["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), keys_at(model, path[:-1]), n=1, cutoff=0.0)
        complaint = f"is not a key here; the nearest is {near[0] if near else 'none'}"
    else:
        complaint = "is missing" if wrong["type"] == "missing" else f"is {wrong['input']!r}: {wrong['msg'].lower()}"
    raise ValueError(f"{named[-1] if named else ' '.join(arguments)}: {key} {complaint}")


def schema(target: Callable | tuple[type, ...], *given: str) -> type[BaseModel]:
    """The keyword arguments of a callable, with their types, as a pydantic model.

    A parameter annotated Annotated[dict, callable] is a block of that callable's arguments; Annotated[dict, (classes)] has
    such a block under the name of each class. Where a callable has keyword-only parameters, those are the YAML's, and the
    program gives the others and those named in `given`.
    """
    strict = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    if isinstance(target, tuple):
        blocks = {made.__name__: (schema(made) | None, None) for made in target}
        return create_model("classes", __config__=strict, **blocks)
    parameters = inspect.signature(target).parameters.values()
    parameters = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given] or list(parameters)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    fields = {
        p.name: (resolve(hints.get(p.name, Any)), ... if p.default is p.empty else Field(p.default, validate_default=False))
        for p in parameters
    }
    return create_model(target.__name__, __config__=strict, **fields)


def resolve(hint: Any) -> Any:
    """A type annotation with the blocks in it made models of their own."""
    if typing.get_origin(hint) is Annotated:
        target = hint.__metadata__[0]
        return schema(*hint.__metadata__) if callable(target) or isinstance(target, tuple) else hint
    inside = tuple(map(resolve, typing.get_args(hint)))
    if not any(inspect.isclass(part) and issubclass(part, BaseModel) for part in inside):
        return hint
    return list[inside] if typing.get_origin(hint) is list else typing.Union[inside]  # noqa: UP007  # of a tuple


def keys_at(model: Any, path: list) -> list[str]:
    """The keys that a model has at the end of a path of keys and list indices."""
    for part in path:
        hint = model if isinstance(part, int) else model.model_fields[part].annotation
        parts = (hint, *typing.get_args(hint))
        model = next(part for part in parts if inspect.isclass(part) and issubclass(part, BaseModel))
    return list(model.model_fields)


Share = Annotated[float, Field(ge=0, le=1)]  # a fraction or a probability
PARAMETERS = ("flip", "brightness", "contrast", "saturation", "hue", "grey", "blur_sigma", "solarise")
BLUR_KERNEL = (9, 5)  # pixels, height and width [code]
SOLARISE_FROM = 127.5 / 255  # bytes from 128 on [code], whatever the colour map rounds
LUMA = (0.2989, 0.587, 0.114)  # torchvision's


@dataclass(frozen=True)
class ViewRecipe:
    """How the views of one kind of sample are drawn; the defaults are the official code's.

    Args:
        crop_scale, crop_ratio: of RandomResizedCrop: area as a fraction of the frame, width / height.
        flip, jitter, grey: probabilities.
        brightness, contrast, saturation, hue: half-ranges of the jitter, as of torchvision's ColorJitter.
        blur, solarise: probabilities for view 1 and view 2.
        blur_sigma: range in pixels.
    """

    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Share = 0.1
    grey: Share = 0.2
    blur: tuple[Share, Share] = (1.0, 0.0)
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    solarise: tuple[Share, Share] = (0.0, 0.2)

    def draw(self, rng: np.random.Generator, view: int) -> np.ndarray:
        """The numbers of PARAMETERS for view 0 or 1 -> (A,) float32; whatever is off is at its neutral value."""
        # Always as many draws, so that no choice moves another.
        flip, jitter, grey, blur, solarise, *amounts, spread = rng.random(10).tolist()
        ranges = (self.brightness, self.contrast, self.saturation, self.hue)
        amounts = [(jitter < self.jitter) * half * (2 * one - 1) for half, one in zip(ranges, amounts, strict=True)]
        brightness, contrast, saturation, hue = amounts
        least, most = self.blur_sigma
        sigma = (blur < self.blur[view]) * (least + (most - least) * spread)
        flip, grey, solarise = flip < self.flip, grey < self.grey, solarise < self.solarise[view]
        return np.array([flip, 1 + brightness, 1 + contrast, 1 + saturation, hue, grey, sigma, solarise], np.float32)


def draw_crop(rng: np.random.Generator, height: int, width: int, scale: tuple, ratio: tuple) -> tuple[int, ...]:
    """(top, left, height, width), drawn as torchvision's RandomResizedCrop does, with its central crop to fall back on."""
    draws, low, high = rng.random(20).tolist(), math.log(ratio[0]), math.log(ratio[1])
    for area, shape in zip(draws[:10], draws[10:], strict=True):
        side = math.sqrt(height * width * (scale[0] + (scale[1] - scale[0]) * area))
        root = math.exp((low + (high - low) * shape) / 2)  # of width / height
        w, h = round(side * root), round(side / root)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_scale(frame: np.ndarray, box: tuple[int, ...], size: int) -> Tensor:
    """The box (top, left, height, width) of (H, W, 3) uint8, scaled -> (3, size, size) uint8, in memory still (H, W, 3).

    Equals torchvision's resized_crop. A contiguous crop spares torch a repacking, and saves a third of the time.
    """
    top, left, height, width = box
    pixels = torch.from_numpy(np.ascontiguousarray(frame[top : top + height, left : left + width]))[None]
    return F.interpolate(pixels.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)[0]  # channels last


FrameGap = NonNegativeInt | Literal["any", "distant"]


def draw_frame_pair(rng: np.random.Generator, count: int, frame_gap: FrameGap, sections: int) -> tuple[int, int]:
    """Indices of two frames of a clip of `count`.

    "any": two different ones at random [code]. "distant": one at random from each of `sections` equal parts, two of those
    [paper]. A number: that many stored frames apart, or as many as the clip allows.
    """
    if count == 1:
        return 0, 0
    if frame_gap == "distant":
        edges = np.linspace(0, count, min(sections, count) + 1).astype(int)
        pair = rng.integers(edges[:-1], edges[1:])[rng.permutation(len(edges) - 1)[:2]]
    elif frame_gap == "any":
        pair = rng.choice(count, 2, replace=False)
    else:
        gap = min(frame_gap, count - 1)
        pair = rng.integers(count - gap) + rng.permutation([0, gap])
    return int(pair[0]), int(pair[1])


@dataclass
class SampleViews:
    """A stored sample and a generator -> `views` uint8 (V, [T,] H, W, 3), `augment` (V, A), `noise` (V, N), `target`.

    Args:
        num_frames: T; 1 for views that are images, and have no T.
        video, image: how the views of clips and of images are drawn; all frames of a view alike.
        views: V.
        frame_gap, sections: of views that are images, see draw_frame_pair.
        frame_interval: of views that are clips, each from a random place, see pick_frames.
    """

    img_size: int
    num_patches: int
    num_frames: int = 1
    _: KW_ONLY
    video: Annotated[dict, ViewRecipe] = field(default_factory=dict)
    image: Annotated[dict, ViewRecipe] = field(default_factory=dict)
    views: Literal[1, 2] = 2
    frame_gap: FrameGap = "any"
    sections: Annotated[int, Field(ge=2)] = 2
    frame_interval: PositiveFloat | None = None

    def __post_init__(self):
        self.video, self.image = ViewRecipe(**self.video), ViewRecipe(**self.image)

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, Any]:
        count = len(sample["ends"])
        recipe = self.video if count > 1 else self.image
        if self.num_frames == 1:
            picked = [[index] for index in draw_frame_pair(rng, count, self.frame_gap, self.sections)][: self.views]
        else:
            places = rng.random(self.views)
            picked = [pick_frames(sample["timestamps"], self.num_frames, self.frame_interval, place) for place in places]
        frames = sample.setdefault("decoded", {})  # an image is decoded once, and a frame that several views share
        for index in set(chain(*picked)) - frames.keys():
            frames[index] = data_prep.decode_frame(sample, index)
        views, augment = [], []
        for view, indices in enumerate(picked):
            box = draw_crop(rng, *frames[indices[0]].shape[:2], recipe.crop_scale, recipe.crop_ratio)
            crops = {index: crop_and_scale(frames[index], box, self.img_size).permute(1, 2, 0) for index in set(indices)}
            # As it lies in memory, (H, W, 3): copied faster.
            views.append(torch.stack([crops[index] for index in indices]) if self.num_frames > 1 else crops[indices[0]])
            augment.append(recipe.draw(rng, view))
        noise = rng.random((self.views, self.num_patches), np.float32)
        return {"views": torch.stack(views), "augment": np.stack(augment), "noise": noise, "target": int(sample["label"])}


class KeyedStream(StreamingDataset):
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

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[np.ndarray, np.ndarray]:
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
        shard = np.searchsorted(self.sample_offset_per_shard, samples % self.num_samples, "right") - 1
        return self.stream_per_shard[shard]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return super().__getitem__(number) | {"stream": int(self.stream_of(np.array(number)))}

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
        return super().state_dict(num_samples // self.repeats, from_beginning)

    def __iter__(self) -> Iterator[dict]:
        for number, sample in enumerate(super().__iter__()):
            key, tried = self._keys[number], 0
            for repeat in range(self.repeats):
                while True:
                    try:
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
        with self.unreadable.open("a") as file:
            file.write(json.dumps([name, str(error)]) + "\n")
        count = len(set(self.unreadable.read_text().splitlines()))
        if count > max(1, self.max_unreadable * self.num_samples):
            raise RuntimeError(f"{count} samples cannot be decoded, see {self.unreadable}; run data_prep.py verify")


def open_stream(*, path: str, proportion: float | None = None, cache: str | None = None) -> Stream:
    """One data set of a mix.

    Args:
        path: folder, or s3:// address, of a data set of data_prep.py.
        proportion: share of the epoch; without it in every stream, each sample is seen once an epoch.
        cache: local folder for what is fetched from s3://.

    Raises:
        ValueError: no such data set.
    """
    data_prep.read_classes(path)
    if data_prep.Place(path).remote:
        return Stream(remote=path, local=cache, proportion=proportion)
    return Stream(local=path, proportion=proportion)


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
    max_unreadable: Share = 0.001,
    make_demo: str | None = None,
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
        make_demo: folder in which the demonstration's data is made if it is not there.

    Raises:
        ValueError: data that is missing, frames smaller than a patch, a batch that does not divide or that no epoch fills.
    """
    ranks = dist.get_world_size()
    micro = global_micro_batch_size or global_train_batch_size
    if global_train_batch_size % micro or micro % ranks:
        raise ValueError(
            f"data.global_train_batch_size {global_train_batch_size} must be a multiple of global_micro_batch_size {micro}, "
            f"and that of the number of ranks, {ranks}"
        )
    batch_size = global_train_batch_size // ranks
    if micro // ranks % repeats:
        raise ValueError(f"data.repeats {repeats} must divide each rank's share of a micro-batch, {micro // ranks}")
    if not streams:
        raise ValueError("data.streams is empty; name at least one data set")
    if len({stream.get("proportion") is None for stream in streams}) > 1:
        raise ValueError("data.streams: some have a proportion and some have not; give it to all or to none")
    if make_demo and dist.get_local_rank() == 0:
        data_prep.demo(make_demo)
    dist.barrier()
    opened = [open_stream(**stream) for stream in streams]
    for path in (stream["path"] for stream in streams):
        height, width = data_prep.decode_frame(data_prep.Clips(path)[0], 0).shape[:2]
        if min(height, width) < patch_size:
            raise ValueError(f"{path}: frames of {width}x{height} are smaller than model.patch_size {patch_size}")
    dataset = KeyedStream(
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


def augment_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`views` uint8 (B, V, [T,] H, W, 3), `augment` (B, V, A) -> `views` (B, V, [T,] 3, H, W), augmented and normalised.

    The rest of the batch stays as it is, but for `augment`, which is used up.
    """
    shape = batch["views"].shape[:-3]  # (B, V) or (B, V, T)
    parameters = batch["augment"].flatten(0, 1).repeat_interleave(math.prod(shape[2:]), dim=0)
    views = augment_views(batch["views"].flatten(0, -4).permute(0, 3, 1, 2), parameters)
    rest = {key: value for key, value in batch.items() if key != "augment"}
    return rest | {"views": normalize(views, MEAN, STD).unflatten(0, shape)}


def augment_views(views: Tensor, parameters: Tensor) -> Tensor:
    """Flip, jitter, grey, blur and solarise uint8 (B, 3, H, W), each by its row of (B, A) -> float (B, 3, H, W) in 0..1.

    Deviation: brightness, contrast, saturation, hue and grey are one affine map of the colours, clamped once at the end,
    where torchvision rounds and clamps after each and draws their order (which without clamping makes no difference). Hue
    turns in YIQ, not in HSV.
    """
    flip, brightness, contrast, saturation, hue, grey, sigma, solarise = parameters.float().unbind(1)
    x = views.float() / 255
    x = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)

    luma, zero, one = x.new_tensor(LUMA), torch.zeros_like(hue), torch.ones_like(hue)
    to_yiq = torch.stack([luma, x.new_tensor([0.5959, -0.2746, -0.3213]), x.new_tensor([0.2115, -0.5227, 0.3112])])
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    turn = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], dim=1).view(-1, 3, 3)
    keep = (saturation * (1 - grey))[:, None, None]  # of the colour; the rest becomes luma
    colour = keep * torch.eye(3, device=x.device) + (1 - keep) * luma.expand(3, 3)
    colour = colour @ torch.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)[:, None, None]  # (B, 3, 3)
    offset = (1 - contrast) * brightness * (x.mean(dim=(2, 3)) @ luma)  # (B,)
    x = torch.baddbmm(offset[:, None, None].expand(-1, 3, 1), colour, x.flatten(2)).view_as(x).clamp(0, 1)

    blurred = sigma > 0
    if blurred.any():
        x[blurred] = gaussian_blur(x[blurred], sigma[blurred])
    return torch.where(solarise.bool()[:, None, None, None] & (x >= SOLARISE_FROM), 1 - x, x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur (B, 3, H, W), each with its own sigma (B,) in pixels, over BLUR_KERNEL, reflecting at the edges."""
    for axis, size in ((2, BLUR_KERNEL[0]), (3, BLUR_KERNEL[1])):
        half = size // 2
        weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=x.device) / sigma[:, None]) ** 2)  # (B, size)
        weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, None, None, None]
        padded = F.pad(x, (0, 0, half, half) if axis == 2 else (half, half, 0, 0), mode="reflect")
        x = sum(padded.narrow(axis, shift, x.shape[axis]) * weights[:, shift] for shift in range(size))
    return x


def build_optimizer(
    model: nn.Module,
    global_train_batch_size: int,
    *,
    base_lr: PositiveFloat,
    betas: tuple[Share, Share] = (0.9, 0.95),
    weight_decay: NonNegativeFloat = 0.05,
    layer_decay: PositiveFloat | None = None,
) -> torch.optim.AdamW:
    """AdamW with no decay on biases, norms and other 1-D parameters.

    Args:
        base_lr: for 256 samples; lr = base_lr * batch / 256.
        layer_decay: lr of a layer relative to the next (source: BEiT, as timm has it); None for one lr.
    """
    lr = base_lr * global_train_batch_size / 256
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay)
    else:
        no_decay = ("*pos_embed", "*cls_token", "*temporal_embed")
        groups = param_groups_layer_decay(model, weight_decay, no_decay, layer_decay=layer_decay)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale", 1.0)
    grouped = sorted(id(parameter) for group in groups for parameter in group["params"])
    trainable = sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert grouped == trainable, "the groups must hold every trainable parameter exactly once"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


class JsonLines(LoggerDestination):
    """One JSON object a step in a file: whatever was logged during it, with `step` and `epoch`."""

    def __init__(self, path: Path):
        self.path = path
        self.line: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """After a resume, drop what was logged beyond the checkpoint: it will be logged again."""
        if self.path.exists() and dist.get_global_rank() == 0:
            lines = self.path.read_text().splitlines(keepends=True)
            aside = self.path.with_suffix(".tmp")
            whole = (line for line in lines if line.endswith("\n"))
            aside.write_text("".join(line for line in whole if json.loads(line)["step"] <= state.timestamp.batch.value))
            aside.replace(self.path)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.line |= {key: float(value) for key, value in metrics.items()}

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.line and dist.get_global_rank() == 0:
            line = {"step": state.timestamp.batch.value, "epoch": state.timestamp.epoch.value} | self.line
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.line = {}

    epoch_end = eval_end = fit_end = batch_end


def pick_frames(timestamps: np.ndarray, num_frames: int, frame_interval: float | None, place: float) -> list[int]:
    """Indices of `num_frames` stored frames of a clip.

    Args:
        timestamps: (n,) seconds, ascending.
        frame_interval: seconds between two; the frame on screen at each time is taken, the last again where the clip is
            short. None for the whole clip, cut into equal sections with a frame of each.
        place: in [0, 1], from the first to the last possible place of the piece; in [0, 1) within each section.
    """
    if frame_interval is None:
        return ((np.arange(num_frames) + place) * len(timestamps) / num_frames).astype(int).tolist()
    first, last = timestamps[0], timestamps[-1]
    free = max(0.0, last - first - (num_frames - 1) * frame_interval)
    times = first + place * free + np.arange(num_frames) * frame_interval + 0.02 * frame_interval  # packs' times are rounded
    return (np.searchsorted(timestamps, times, "right") - 1).tolist()


@dataclass
class EvalViews(Dataset):
    """Views of every sample of some data sets, without chance: `inputs` uint8 (V, T, 3, H, W), `target`.

    Args:
        paths: data sets of data_prep.py.
        img_size: pixels.
        num_frames, frame_interval: T and seconds, see pick_frames.
        temporal_views: pieces of the clip, evenly placed from its beginning to its end; 1 is the middle.
        spatial_views: square crops along the longer side; 1 is the centre.
        crop_pct: side of the crop as a fraction of the shorter side, in (0, 1].
        first_class: what is added to the labels of each data set; nothing if not given.

    V = temporal_views * spatial_views.
    """

    paths: list[str]
    img_size: int
    num_frames: int = 1
    temporal_views: int = 1
    spatial_views: int = 1
    crop_pct: float = 0.875
    frame_interval: float | None = None
    first_class: tuple[int, ...] = ()

    def __post_init__(self):
        self.data = ConcatDataset([data_prep.Clips(path) for path in self.paths])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample = self.data[number]
        views, places = [], (np.arange(self.temporal_views) + 0.5) / self.temporal_views
        if self.frame_interval and self.temporal_views > 1:
            places = np.linspace(0, 1, self.temporal_views)
        for place in places:
            picked = pick_frames(sample["timestamps"], self.num_frames, self.frame_interval, place)
            frames = {index: data_prep.decode_frame(sample, index) for index in set(picked)}
            height, width = frames[picked[0]].shape[:2]
            side = max(1, round(min(height, width) * self.crop_pct))
            for place in np.linspace(0, 1, self.spatial_views) if self.spatial_views > 1 else [0.5]:
                down, right = (place, 0.5) if height > width else (0.5, place)
                box = (round((height - side) * down), round((width - side) * right), side, side)
                views.append(torch.stack([crop_and_scale(frames[index], box, self.img_size) for index in picked]))
        label = sample["label"]
        if self.first_class:
            label += self.first_class[bisect.bisect_right(self.data.cumulative_sizes, number)]
        return {"inputs": torch.stack(views), "target": torch.tensor(label)}


def common_classes(paths: list[str]) -> list[str]:
    """The class names of all of these data sets.

    Raises:
        ValueError: no data set, or one that is missing, has no labels, or has other classes than the first.
    """
    if not paths:
        raise ValueError("a list of data sets is empty; name at least one")
    first = data_prep.read_classes(paths[0])
    for path in paths:
        if not data_prep.read_classes(path):
            raise ValueError(f"{path} has no labels, which are needed here; convert it from a folder per class")
        if data_prep.read_classes(path) != first:
            raise ValueError(f"{path} has other classes than {paths[0]}")
    return first


def read_part(folder: Path, begin: int, end: int) -> dict[str, Tensor] | None:
    """`outputs` and `labels` of samples begin..end that infer left in a folder; None if they are not there undamaged."""
    for path in folder.glob(f"{begin}-{end}-*.safetensors"):
        data = path.read_bytes()
        if path.stem.endswith(hashlib.sha256(data).hexdigest()[:16]):
            return safetensors.torch.load(data)
    return None


@torch.no_grad()
def infer(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    data: EvalViews,
    batch_size: int = 256,
    num_workers: int = 0,
    parts: Path | None = None,
    part_size: int = 4096,
) -> tuple[Tensor, Tensor]:
    """forward(normalised `inputs`, (B, V, T, 3, H, W)) and label of every sample once, in order; the same on all ranks.

    Args:
        parts: folder of rank 0 where the outputs of every `part_size` samples are kept as soon as they are there. What is
            found there is not computed again. None to keep nothing.
    """
    device, training = next(module.parameters()).device, module.training
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    done, batches = {}, {}
    for begin in range(0, len(data), part_size):
        end = min(begin + part_size, len(data))
        found = [read_part(parts, begin, end) if parts and rank == 0 else None]
        if parts:
            dist.broadcast_object_list(found)
        done[begin, end] = found[0]
        if found[0] is None:
            mine = torch.arange(begin + rank, begin + math.ceil((end - begin) / ranks) * ranks, ranks).clamp(max=end - 1)
            batches[begin, end] = [batch.tolist() for batch in mine.split(batch_size)]
    loader = iter(DataLoader(data, batch_sampler=list(chain(*batches.values())), num_workers=num_workers))
    ready = len(data) - sum(end - begin for begin, end in batches)
    disable = None if rank == 0 else True
    module.eval()
    with tqdm(total=len(data), initial=ready, desc="eval", unit=" samples", disable=disable, leave=False) as bar:
        for (begin, end), planned in batches.items():
            outputs, labels = [], []
            for batch in islice(loader, len(planned)):
                outputs.append(forward(normalize(batch["inputs"].to(device).float() / 255, MEAN, STD)).float().cpu())
                labels.append(batch["target"])
                bar.update(min(len(labels[-1]) * ranks, len(data) - bar.n))
            shares = dist.all_gather_object({"outputs": torch.cat(outputs), "labels": torch.cat(labels)})
            part = {key: torch.stack([one[key] for one in shares], dim=1).flatten(0, 1)[: end - begin] for key in shares[0]}
            done[begin, end] = part
            if parts and rank == 0:
                parts.mkdir(parents=True, exist_ok=True)
                file = safetensors.torch.save(part)
                name = f"{begin}-{end}-{hashlib.sha256(file).hexdigest()[:16]}.safetensors"
                data_prep.Place(str(parts)).write(name, file)
    module.train(training)
    return tuple(torch.cat([part[key] for part in done.values()]) for key in ("outputs", "labels"))


def embed(encoder: nn.Module, data: EvalViews, num_workers: int = 0, parts: Path | None = None) -> tuple[Tensor, Tensor]:
    """Pooled features of every sample, the mean over its views and frames, and its label -> (n, D), (n,).

    Args:
        parts: see infer.
    """

    def features(inputs: Tensor) -> Tensor:
        frames = inputs.flatten(0, 2) if encoder.num_frames == 1 else inputs.flatten(0, 1)
        return pool(encoder(frames), "mean").unflatten(0, (len(inputs), -1)).mean(dim=1)

    return infer(encoder, features, data, num_workers=num_workers, parts=parts)


@torch.autocast("cpu", enabled=False)  # whatever precision the features were computed in
def knn_accuracy(bank: tuple, queries: tuple, k: int = 20, temperature: float = 0.07) -> float:
    """Fraction of queries whose k nearest of the bank by cosine, weighted by exp(cosine / temperature), vote right.

    Args:
        bank, queries: features (n, D) and labels (n,).

    Source: Wu et al. 2018, with DINO's numbers.
    """
    (features, labels), (asked, truth) = bank, queries
    features, right = F.normalize(features, dim=1), 0
    for chunk, answers in zip(F.normalize(asked, dim=1).split(1024), truth.split(1024), strict=True):
        cosine, nearest = (chunk @ features.T).topk(min(k, len(features)), dim=1)  # (n, k)
        votes = torch.zeros(len(chunk), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        right += int((votes.argmax(dim=1) == answers).sum())
    return right / len(truth)


class KNN(Callback):
    """Logs the k-NN accuracy of the encoder with random weights, before the first step, and after the last.

    Args:
        every: epochs after which it is measured during training too; None for the last alone.
        bank, queries: labelled data sets; a clip is represented by its middle frame, to an encoder of images.
        crop_pct: see EvalViews.
        num_workers: processes that read.

    Raises:
        ValueError: data sets that are missing, have no labels or have different ones.
    """

    def __init__(
        self,
        *,
        bank: list[str],
        queries: list[str],
        every: PositiveInt | None = None,
        crop_pct: Share = 0.875,
        num_workers: NonNegativeInt = 0,
    ):
        if common_classes(bank) != common_classes(queries):
            raise ValueError(f"callbacks.KNN: {queries[0]} has other classes than {bank[0]}")
        self.bank, self.queries = bank, queries
        self.every = every
        self.crop_pct = crop_pct
        self.num_workers = num_workers

    def measure(self, name: str, state: State, logger: Logger) -> None:
        encoder = getattr(state.model, "module", state.model).encoder  # without DDP around it
        sizes = (encoder.img_size, encoder.num_frames)
        views = [EvalViews(paths, *sizes, crop_pct=self.crop_pct) for paths in (self.bank, self.queries)]
        accuracy = knn_accuracy(*(embed(encoder, data, num_workers=self.num_workers) for data in views))
        logger.log_metrics({f"knn/{name}": accuracy})

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 0:
            self.measure("random", state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.every and state.timestamp.epoch.value % self.every == 0 and state.timestamp < state.max_duration:
            self.measure("trained", state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.measure("trained", state, logger)


def vicmae_of(algorithm: Algorithm, state: State) -> ViCMAE:
    """The model, of which an algorithm needs more than a classifier has."""
    net = getattr(state.model, "module", state.model)
    if not isinstance(net, ViCMAE):
        raise ValueError(f"algorithms.{type(algorithm).__name__} is for pre-training; take it out")
    return net


class PartialDecoding(Algorithm):
    """Decode only a fraction `ratio` of the removed patches, drawn anew for each view: those with the smallest noise.

    Time and memory of the decoder shrink with it. The reconstruction loss is the mean over what is decoded: an unbiased
    estimate of that over all removed patches, but that the decoder predicts them from a smaller context. Source: the
    dual masking of VideoMAE v2, with a random choice for its fixed one.
    """

    def __init__(self, ratio: Annotated[float, Field(gt=0, le=1)] = 0.5):
        self.ratio = ratio

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        vicmae_of(self, state).decode_ratio = self.ratio


class ContrastRamp(Algorithm):
    """Let the weight of the contrastive term rise from 0 to model.weight_contrast over a duration, such as 40ep (paper)."""

    def __init__(self, duration: str):
        try:
            self.duration = ensure_time(duration, "ep")
        except ValueError as error:
            raise ValueError(f"algorithms.ContrastRamp.duration: {error}") from error

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        net = vicmae_of(self, state)
        if event == Event.INIT:
            return
        done = state.timestamp.get(self.duration.unit).value
        if self.duration.unit == TimeUnit.EPOCH:
            done += state.timestamp.batch_in_epoch.value / int(state.dataloader_len)
        net.ramp = min(1.0, done / self.duration.value)
        logger.log_metrics({"contrast_ramp": net.ramp})


class ProgressiveResizing(Algorithm):
    """Train on small views at first, then on growing, then on whole ones. Composer's idea, exact for grids of patches.

    Args:
        initial_scale: of the first views' sides.
        delay_fraction, finetune_fraction: of the training, at the first and at the full size.
        size_increment: pixels; a multiple of model.patch_size.

    The training is measured in the unit of trainer.max_duration: by an epoch at a time, if it is given in epochs.

    Raises:
        ValueError: fractions that leave no time to grow, sizes that are no number of patches, or too few to mask.
    """

    def __init__(
        self,
        initial_scale: Share = 0.5,
        delay_fraction: Share = 0.5,
        finetune_fraction: Share = 0.2,
        size_increment: PositiveInt = 16,
    ):
        if delay_fraction + finetune_fraction >= 1:
            raise ValueError("algorithms.ProgressiveResizing: delay_fraction + finetune_fraction must be less than 1")
        self.initial_scale, self.size_increment = initial_scale, size_increment
        self.delay_fraction, self.finetune_fraction = delay_fraction, finetune_fraction

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.AFTER_DATALOADER)

    def side(self, full: int, elapsed: float) -> int:
        """Pixels of the views' sides after a fraction `elapsed` of the training."""
        grown = (elapsed - self.delay_fraction) / (1 - self.delay_fraction - self.finetune_fraction)
        if grown >= 1:
            return full
        scale = self.initial_scale + (1 - self.initial_scale) * max(0.0, grown)
        return min(full, round(full * scale / self.size_increment) * self.size_increment)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        net = vicmae_of(self, state)
        full, patch_size = net.encoder.img_size, net.encoder.patch_size
        if event == Event.INIT:
            kept = int((self.side(full, 0.0) // patch_size) ** 2 * (1 - net.mask_ratio))
            if self.size_increment % patch_size or kept < 1:
                raise ValueError(
                    f"algorithms.ProgressiveResizing: size_increment {self.size_increment} must be a multiple of "
                    f"model.patch_size {patch_size}, and initial_scale {self.initial_scale} leave patches to keep"
                )
            return
        side = self.side(full, float(state.get_elapsed_duration()))
        if side < full:
            views = state.batch["views"]  # (B, V, [T,] H, W, 3)
            small = views.flatten(0, -4).permute(0, 3, 1, 2).float()  # (B * V * T, 3, H, W)
            small = F.interpolate(small, (side, side), mode="bilinear", antialias=True).round().to(views.dtype)
            state.batch = state.batch | {"views": small.permute(0, 2, 3, 1).unflatten(0, views.shape[:-3])}
        logger.log_metrics({"progressive_resizing/width": side})


class LayerFreezing(Algorithm):
    """Freeze one layer after another, from the first, as training goes on; the last layer, a classifier's head, never.

    Args:
        freeze_start: fraction of the training before the first is frozen.
        freeze_level: fraction of the layers that are frozen at the end.

    Composer's takes frozen weights out of the optimizer, and then no checkpoint can be written. Here they have no gradient
    and AdamW passes over them. What is frozen depends on how far the training is alone, so that a resumed run goes on alike.
    """

    find_unused_parameters = True  # by DDP, which still knows the frozen ones

    def __init__(self, freeze_start: Share = 0.5, freeze_level: Share = 1.0):
        self.freeze_start, self.freeze_level = freeze_start, freeze_level

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.EPOCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        elapsed = float(state.get_elapsed_duration())
        level = self.freeze_level * max(0.0, elapsed - self.freeze_start) / max(1 - self.freeze_start, 1e-9)
        leaves = (module for module in state.model.modules() if not any(module.children()))
        layers = [module for module in leaves if next(module.parameters(), None) is not None]
        count = int(level * len(layers[:-1]))
        for layer in layers[:count]:
            layer.requires_grad_(False)
            layer.zero_grad()
        logger.log_metrics({"layer_freezing/layers_frozen": count})


class GradientNorm(Algorithm):
    """Logs the norm of the gradient before it is clipped."""

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        if state.fsdp_enabled and torch.distributed.get_backend() == "gloo":
            torch._foreach_div_(gradients, dist.get_world_size())  # there FSDP's mean over the ranks is their sum
        norm = torch.nn.utils.get_total_norm(gradients)
        logger.log_metrics({"gradient_norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm)})


def check_checkpoint(path: Path) -> None:
    """Compare a checkpoint with its checksums, or FSDP's shards with their sizes.

    Raises:
        ValueError: it is damaged.
    """
    try:
        if path.is_dir():
            for part in PlainReader(path).read_metadata().storage_data.values():
                if (path / part.relative_path).stat().st_size < part.offset + part.length:
                    raise ValueError(f"{part.relative_path} is cut")
        else:
            with zipfile.ZipFile(path) as file:
                if (bad := file.testzip()) is not None:
                    raise ValueError(f"{bad} in it has another checksum")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path} is damaged ({error})") from error


LATEST = "latest-rank0.pt"  # a link to the newest checkpoint
STOPPED = 75  # exit code of a run that was told to stop and wants to be started again: EX_TEMPFAIL of sysexits.h
CHECKPOINT = re.compile(r"ep(\d+)-ba(\d+)(\.pt)?")  # a file; without .pt a folder, of FSDP's shards


def step_of(name: str) -> int:
    return int(CHECKPOINT.fullmatch(name)[2])


class Checkpoints(Callback):
    """Composer's checkpoints, so that the newest one is always whole; and what ends a run early, at one.

    Each is written aside, renamed, and then copied to the bucket in the background. SIGTERM has one written at the end of
    the step, and ends the run with exit code STOPPED. A loss or a weight that is not finite ends it with none written.

    Args:
        interval: time between two, such as 1ep or 500ba; the last step has one too.
        keep: how many of the newest are kept.
        milestone: the first after every so many epochs is kept for good.
        bucket: s3:// address for copies, which are kept alike; a run goes on from them where the disk is gone.

    Raises:
        ValueError: an interval that is none.
    """

    def __init__(
        self,
        run: Path,
        *,
        interval: str = "1ep",
        keep: PositiveInt = 2,
        milestone: PositiveInt | None = None,
        bucket: str | None = None,
    ):
        try:
            self.due = create_interval_scheduler(interval)
        except ValueError as error:
            raise ValueError(f"checkpoints.interval: {error}") from error
        self.folder = run / "checkpoints"
        self.keep = keep
        self.milestone = milestone
        if bucket and not bucket.startswith("s3://"):
            raise ValueError(f"checkpoints.bucket {bucket} is no s3:// address")
        self.bucket = data_prep.Place(bucket) if bucket else None
        self.copying = ThreadPoolExecutor(1)
        self.told = False
        self.saved = -1

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, fetched from the bucket if it is only there; the same on every rank.

        Damaged ones are said, and set aside as *.damaged.

        Raises:
            ValueError: there are checkpoints, but none is whole; or this machine cannot reach it.
        """
        chosen = [self.choose() if dist.get_global_rank() == 0 else None]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], ValueError):
            raise chosen[0]
        if chosen[0] is None:
            return None
        path = self.folder / chosen[0]
        if dist.get_local_rank() == 0 and not path.exists():
            if not self.bucket:
                raise ValueError(f"{path} is on another machine; give the machines a shared folder, or checkpoints.bucket")
            self.fetch(path.name)
        dist.barrier()
        return path

    def choose(self) -> str | ValueError | None:
        here = {path.name for path in self.folder.glob("ep*") if CHECKPOINT.fullmatch(path.name)}
        there = {name.split("/")[0] for name in self.bucket.names()} if self.bucket else set()
        there = set(filter(CHECKPOINT.fullmatch, there))
        damaged = []
        for name in sorted(here | there, key=step_of, reverse=True):
            for fetch in [False] * (name in here) + [True] * (name in there):
                try:
                    if fetch:
                        self.fetch(name)
                    check_checkpoint(self.folder / name)
                except ValueError as error:
                    damaged.append(str(error))
                    (self.folder / name).rename(self.folder / f"{name}.damaged.{time.time_ns()}")
                else:
                    self.point_to(name)
                    print("; ".join([*damaged, f"going on from {self.folder / name}"]), flush=True)
                    return name
        latest = self.folder / LATEST
        if damaged or latest.is_symlink():
            lost = "; ".join(damaged) or f"{latest} points to {os.readlink(latest)}, which is not there"
            return ValueError(f"{lost}; no checkpoint is left. Delete {self.folder} to begin anew")
        return None

    def fetch(self, name: str) -> None:
        """Copy a checkpoint from the bucket."""
        aside = self.folder / f"{name}.fetched"
        shutil.rmtree(aside, ignore_errors=True)
        for part in [name] if name.endswith(".pt") else list(self.bucket.names(name)):
            self.bucket.download(part, aside / part)
        (aside / name).rename(self.folder / name)
        aside.rmdir()

    def point_to(self, name: str) -> None:
        aside = self.folder / f"{LATEST}.tmp"
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        aside.replace(self.folder / LATEST)

    def save(self, state: State) -> None:
        name = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
        aside = self.folder / "aside"
        if dist.get_global_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        written = save_checkpoint(state, str(aside / f"{name}.pt"))  # for FSDP's shards it makes a folder of that name
        name += "" if state.fsdp_sharded_state_dict_enabled else ".pt"
        if written:
            with open(written, "rb") as file:
                os.fsync(file.fileno())
        dist.barrier()
        if dist.get_global_rank() == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # shards of a life that ended before it pointed to them
            (aside / name).replace(self.folder / name)
            self.point_to(name)
            aside.rmdir()
        dist.barrier()
        parts = [os.path.relpath(written, aside)] if written else []
        if written and dist.get_global_rank() == 0 and not name.endswith(".pt"):
            parts.append(f"{name}/.metadata")
        self.copying.submit(self.finish, parts)
        self.saved = state.timestamp.batch.value

    def finish(self, parts: list[str]) -> None:
        """Copy the files of a checkpoint to the bucket, then delete old ones. The run goes on without the bucket."""
        try:
            for part in parts if self.bucket else ():
                self.bucket.upload(self.folder / part, part)
            if dist.get_global_rank() == 0:
                self.prune()
        except OSError as error:
            print(f"checkpoints.bucket: {error}; what is in {self.folder} is whole, and the run goes on", flush=True)

    def prune(self) -> None:
        for name in self.superseded(path.name for path in self.folder.glob("ep*")):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        there = list(self.bucket.names()) if self.bucket else []
        old = self.superseded({part.split("/")[0] for part in there})
        for part in there:
            if part.split("/")[0] in old:
                self.bucket.delete(part)

    def superseded(self, names: Iterable[str]) -> list[str]:
        """The names of checkpoints that are neither among the newest nor a milestone."""
        names = sorted(filter(CHECKPOINT.fullmatch, names), key=step_of)
        first = {int(CHECKPOINT.fullmatch(name)[1]): name for name in reversed(names)}  # of each epoch
        kept = [name for epoch, name in first.items() if self.milestone and epoch and epoch % self.milestone == 0]
        return [name for name in names[: -self.keep] if name not in kept]

    def fit_start(self, state: State, logger: Logger) -> None:
        self.saved = state.timestamp.batch.value
        self.before = signal.signal(signal.SIGTERM, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.told = True

    def batch_end(self, state: State, logger: Logger) -> None:
        total = state.total_loss_dict.get("loss/train/total", 0.0)  # none if half precision has skipped the first steps
        if not math.isfinite(total):
            sys.exit(f"the loss is {total} at step {state.timestamp.batch.value}; the newest checkpoint is from before it")

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.save_if(state, Event.BATCH_CHECKPOINT)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.save_if(state, Event.EPOCH_CHECKPOINT)

    def save_if(self, state: State, event: Event) -> None:
        step, due = state.timestamp.batch.value, self.due(state, event)
        broken = (due or self.told) and not all(parameter.isfinite().all() for parameter in state.model.parameters())
        flags = state.device.tensor_to_device(torch.tensor([self.told, broken], dtype=torch.int32))
        dist.all_reduce(flags, "MAX")  # the signal may not have reached every rank yet
        told, broken = flags.tolist()
        if broken:
            sys.exit(f"a weight is not finite after step {step}; the newest checkpoint is from before it")
        if (due or told) and self.saved != step:
            self.save(state)
        if told:
            self.copying.shutdown()
            sys.exit(STOPPED)

    def fit_end(self, state: State, logger: Logger) -> None:
        signal.signal(signal.SIGTERM, self.before)
        self.copying.shutdown()  # once the last is copied


def draw_losses(lines: list[dict], to: Path) -> None:
    """Draw every training loss of the lines of a metrics.jsonl against the step."""
    names = sorted({key for line in lines for key in line if key.startswith("loss/train/")})
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(*zip(*[(line["step"], line[name]) for line in lines if name in line], strict=True), linewidth=0.8)
        axis.set(title=name.removeprefix("loss/train/"), xlabel="step")
    figure.savefig(to, dpi=120)


@torch.no_grad()
def draw_reconstructions(model: ViCMAE, paths: list[str], to: Path, count: int = 8) -> None:
    """Draw four rows for `count` samples of some data sets: original, masked, reconstructed, reconstructed where masked.

    Of clips, the first frame.
    """
    device, size, frames = next(model.parameters()).device, model.encoder.img_size, model.encoder.num_frames
    sets = [EvalViews([path], size, frames, crop_pct=1.0) for path in paths]
    turns = [(sets[number % len(sets)], number / count) for number in range(count)]
    picked = [data[int(place * len(data))]["inputs"][0] for data, place in turns]
    views = normalize(torch.stack(picked).to(device).float() / 255, MEAN, STD)  # (B, T, 3, H, W)
    noise = torch.rand(count, model.encoder.num_patches, generator=torch.Generator().manual_seed(0)).to(device)
    ids_keep, ids_restore, mask = random_masking(noise, model.mask_ratio, model.mask, model.encoder.steps)
    tokens = model.encoder(views if frames > 1 else views[:, 0], ids_keep)
    pred = model.decoder(tokens, ids_restore).float()  # (B, N, P)
    patch = (model.encoder.patch_size, model.tubelet_size)
    target, removed = patchify(views, *patch), mask[:, :, None].bool()
    if model.norm_pix_loss:  # the prediction is relative to its patch: give it the patch's mean and deviation back
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    rows = torch.cat([target, target.masked_fill(removed, 0.0), pred, torch.where(removed, pred, target)])
    rows = rows[:, : model.encoder.grid**2, : target.shape[2] // model.tubelet_size]  # the first frame of a clip
    grey = [-m / s for m, s in zip(MEAN, STD, strict=True)]
    pictures = normalize(unpatchify(rows, model.encoder.patch_size), grey, [1 / s for s in STD]).clamp(0, 1)
    if dist.get_global_rank() == 0:
        save_image(make_grid(F.interpolate(pictures, scale_factor=max(1, 96 // size)), nrow=count, pad_value=1.0), to)


def start_run(config: dict[str, Any]) -> Path:
    """Join the process group, seed, and give the run's folder; exits with 0 if the run is finished already.

    Comes before any StreamingDataset is made: Streaming would else make a process group of its own.

    Raises:
        ValueError: the folder holds a run of another configuration (the trainer, loggers, callbacks and workers may change).
    """
    dist.initialize_dist(get_device(config["trainer"].get("device")), config["trainer"].get("dist_timeout", 300.0))
    reproducibility.seed_all(config["seed"])  # the same initial weights on every rank
    run = Path("runs", config["run_name"])
    if (run / "config.yaml").exists():
        before = settings(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
        now = settings(json.loads(json.dumps(config)))  # lists for tuples, as in the file
        changed = sorted(key for key in before | now if before.get(key) != now.get(key))
        if changed and not config["allow_changes"]:
            raise ValueError(
                f"{run} was begun with another {', '.join(changed)}; give another run_name, delete it, or allow_changes=true"
            )
    if (run / "result.json").exists():
        if dist.get_global_rank() == 0:
            print(f"{run} is finished, see {run}/result.json; delete it or give another run_name to run again")
        sys.exit(0)
    return run


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """{block.key: value} of what decides a run's result."""
    parts = {name: part for name, part in config.items() if name not in ("trainer", "callbacks", "loggers", "checkpoints")}
    keys = {f"{name}.{key}": value for name, part in parts.items() if isinstance(part, dict) for key, value in part.items()}
    plain = {name: part for name, part in parts.items() if not isinstance(part, dict)}
    return {key: value for key, value in (keys | plain).items() if key not in ("data.num_workers", "allow_changes")}


def classes_of(module: Any) -> tuple[type, ...]:
    return tuple(made for name, made in vars(module).items() if inspect.isclass(made) and made.__name__ == name)


ALGORITHMS = classes_of(composer.algorithms)
OWN = (ContrastRamp, LayerFreezing, PartialDecoding, ProgressiveResizing)  # two of them in the place of Composer's
ALGORITHMS = tuple({made.__name__: made for made in (*ALGORITHMS, *OWN)}.values())
CALLBACKS = (*classes_of(composer.callbacks), KNN)
LOGGERS = tuple(made for made in classes_of(composer.loggers) if issubclass(made, LoggerDestination))


TrainerBlock = Annotated[  # Composer's Trainer without what build_trainer gives
    dict,
    Trainer,
    *("model", "optimizers", "schedulers", "train_dataloader", "eval_dataloader", "device_train_microbatch_size"),
    *("seed", "run_name", "algorithms", "callbacks", "loggers"),
    *(name for name in inspect.signature(Trainer).parameters if name.startswith(("save_", "load_", "autoresume"))),
]


def build_named(classes: tuple[type, ...], block: dict[str, dict] | None) -> list:
    """Objects of the classes named in a block, with their arguments."""
    return [made(**block[made.__name__] or {}) for made in classes if made.__name__ in (block or {})]


def build_trainer(
    run: Path,
    config: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataSpec,
    micro_size: int,
    eval_dataloader: DataSpec | None = None,
) -> Trainer:
    """Composer's Trainer with the blocks of a stage's config. It goes on from the newest checkpoint of the run.

    Raises:
        ValueError: no trainer.max_duration, a value that Composer refuses, or checkpoints of which none is whole.
    """
    settings = config["trainer"]
    if not settings.get("max_duration"):
        raise ValueError("trainer.max_duration is missing; give a duration such as 800ep")
    try:
        ensure_time(settings["max_duration"], "ep")  # Composer would raise with its progress bar up
    except ValueError as error:
        raise ValueError(f"trainer.max_duration: {error}") from error
    if fsdp := (settings.get("parallelism_config") or {}).get("fsdp"):
        try:
            settings = settings | {"parallelism_config": {"fsdp": FSDP2Config(**fsdp)}}
        except TypeError as error:
            raise ValueError(f"trainer.parallelism_config.fsdp: {error}") from error
    if settings.get("precision") == "amp_bf16" and get_device(settings.get("device")).name == "cpu":
        settings = settings | {"precision": "fp32"}  # Composer's is for GPUs alone
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    checkpoints = Checkpoints(run, **config["checkpoints"] or {})
    newest = checkpoints.newest()
    built = Trainer(
        **settings,
        run_name=run.name,
        load_path=str(newest) if newest else None,
        seed=config["seed"],
        model=model,
        optimizers=optimizer,
        schedulers=CosineAnnealingWithWarmupScheduler(**config["schedule"]),
        train_dataloader=loader,
        eval_dataloader=eval_dataloader,
        device_train_microbatch_size=micro_size,
        # Composer turns the order about on after-events: the norm is taken, and mended, before it is clipped.
        algorithms=[*build_named(ALGORITHMS, config["algorithms"]), GradientNorm()],
        callbacks=[*build_named(CALLBACKS, config["callbacks"]), checkpoints],
        loggers=[JsonLines(run / "metrics.jsonl"), *build_named(LOGGERS, config["loggers"])],
    )
    if dist.get_global_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        data_prep.Place(str(run)).write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
    return built


def fit(trainer: Trainer) -> None:
    """Train, unless a run that was stopped after its last step is there again to be finished."""
    if trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()


def finish_run(run: Path, extra: dict[str, float]) -> dict[str, float]:
    """Draw loss.png; write result.json, the last value of everything logged and `extra`, which marks the run as finished."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    draw_losses(lines, run / "loss.png")
    result = {key: value for line in lines for key, value in line.items()} | extra
    data_prep.Place(str(run)).write_json("result.json", result)
    return result


def pretrain(
    *,
    run_name: str,
    seed: int,
    data: Annotated[dict, load_stream],
    augment: Annotated[dict, SampleViews],
    model: Annotated[dict, ViCMAE],
    optimizer: Annotated[dict, build_optimizer],
    schedule: Annotated[dict, CosineAnnealingWithWarmupScheduler],
    trainer: TrainerBlock,
    checkpoints: Annotated[dict, Checkpoints] | None = None,
    algorithms: Annotated[dict, ALGORITHMS] | None = None,
    callbacks: Annotated[dict, CALLBACKS] | None = None,
    loggers: Annotated[dict, LOGGERS] | None = None,
    allow_changes: bool = False,
) -> Trainer:
    """The Trainer of a pre-training run; the parameters are the blocks of its YAML files."""
    config = locals().copy()
    run = start_run(config)
    net = ViCMAE(**model)
    views = SampleViews(net.encoder.img_size, net.encoder.num_patches, net.encoder.num_frames, **augment)
    if net.projector is not None and views.views < 2:
        raise ValueError(f"augment.views is 1, but model.contrast {net.contrast} compares two views of a sample; give 2")
    loader, micro_size = load_stream(views, augment_batch, seed, net.encoder.patch_size, run, **data)
    if net.positives == "label":
        common_classes([stream["path"] for stream in data["streams"]])
    adamw = build_optimizer(net, data["global_train_batch_size"], **optimizer)
    return build_trainer(run, config, net, adamw, loader, micro_size)


PUBLISHED = {  # samples and classes of data sets by the last two parts of their paths, for a plan where they are not there
    **{"in1k/train": (1_281_167, 1000), "in1k/val": (50_000, 1000)},
    **{"k400/train": (240_000, 400), "k400/val": (20_000, 400), "k600/train": (366_000, 600), "k700/train": (532_000, 700)},
    **{"mit/train": (1_000_000, 305), "ssv2/train": (169_000, 174), "ssv2/val": (24_777, 174)},
    **{"places365/train": (1_803_460, 365), "places365/val": (36_500, 365)},
    **{f"demo/train_{kind}": (3000, 10) for kind in ("videos", "images")},
    **{f"demo/train_{kind}_200": (200, 10) for kind in ("videos", "images")},
    **{f"demo/test_{kind}": (500, 10) for kind in ("videos", "images")},
}
PEAK = {True: 312e12, False: 19.5e12}  # operations a second of an A100, in half precision or in fp32
UTILISATION = 0.4  # how much of it is taken to be reached


def size_of(path: str) -> tuple[int, int]:
    """Samples and classes of a data set, or of the published one that its path names.

    Raises:
        ValueError: it is not there, and no published one is so named.
    """
    if not data_prep.Place(path).has("index.json") and (known := PUBLISHED.get("/".join(path.split("/")[-2:]))):
        return known
    return len(data_prep.Clips(path)), len(data_prep.read_classes(path))


def asked_plan(arguments: list[str]) -> tuple[list[str], int | None]:
    """The other arguments of a command line, and the number of --plan=GPUS: 8 of a plain --plan, None without one."""
    rest = [argument for argument in arguments if not argument.startswith("--plan")]
    if rest == arguments:
        return arguments, None
    number = next(argument for argument in arguments if argument.startswith("--plan")).removeprefix("--plan") or "=8"
    if not re.fullmatch(r"=[1-9]\d*", number):
        raise ValueError(f"--plan{number}: give a number of GPUs, as in --plan=8")
    return rest, int(number[1:])


def is_half(precision: str | None) -> bool:
    """Whether a precision of Composer's, None for its choice on GPUs, computes in 16 bits."""
    return precision != "fp32"


def activation_bytes(stacks: list[tuple[int, int, int]], precision: str | None, kept: int) -> int:
    """What a sample's forward pass through ViT blocks leaves in memory.

    Args:
        stacks: blocks, tokens of the sample, width.
        precision: Composer's.
        kept: numbers of each block, token and unit of width that stay for the backward pass: 17 of all layers, 1 with
            activation checkpointing, 0 without a backward pass. With fewer than 17, one block at a time has them all.
    """
    numbers = sum(kept * blocks * tokens * width for blocks, tokens, width in stacks)
    numbers += 0 if kept == 17 else 17 * max(tokens * width for _, tokens, width in stacks)
    return numbers * (2 if is_half(precision) else 4)


def training_samples(data: dict[str, Any], max_duration: str) -> int:
    """How many samples a training takes, whole batches of each epoch."""
    batch = data["global_train_batch_size"]
    epoch = data.get("epoch_size") or sum(size_of(stream["path"])[0] for stream in data["streams"])
    steps, duration = epoch * data.get("repeats", 1) // batch, ensure_time(max_duration, "ep")
    if duration.unit.value not in ("ep", "ba"):
        raise ValueError(f"trainer.max_duration {max_duration}: a plan needs epochs (ep) or steps (ba)")
    return batch * duration.value * (steps if duration.unit.value == "ep" else 1)


def training_plan(net: nn.Module, config: dict[str, Any], gpus: int, flops: float, activations: int) -> str:
    """A plan of a training: see show_plan. flops of a step and bytes of activations are a sample's."""
    data, trainer = config["data"], config["trainer"]
    at_once = (data.get("global_micro_batch_size") or data["global_train_batch_size"]) // gpus
    state = sum((16 if parameter.requires_grad else 4) * parameter.numel() for parameter in net.parameters())
    if (trainer.get("parallelism_config") or {}).get("fsdp"):
        state //= gpus
    samples = training_samples(data, trainer["max_duration"])
    at_once = min(at_once, getattr(net, "chunk_size", None) or at_once)
    return show_plan(net, gpus, samples, flops, is_half(trainer.get("precision")), state, at_once * activations, at_once)


def show_plan(
    net: nn.Module, gpus: int, samples: int, flops: float, half: bool, state: int, activations: int, at_once: int
) -> str:
    """What a run takes, computed: nothing is measured.

    Args:
        samples, flops: of the whole run, and floating-point operations of one, in half precision or in fp32.
        state: bytes of weights, gradients and averages on a GPU.
        activations, at_once: bytes on a GPU, of so many samples at a time.
    """
    count, trained = (sum(p.numel() for p in net.parameters() if p.requires_grad or every) for every in (True, False))
    hours, unit = samples * flops / (UTILISATION * PEAK[half]) / 3600, "half precision" if half else "fp32"
    return "\n".join(
        [
            f"weights     {count / 1e6:.4g} M, of them trained {trained / 1e6:.4g} M",
            f"a sample    {flops / 1e9:.4g} GFLOP",
            f"samples     {samples:,}",
            f"memory      {state / 1e9:.3g} GB of weights and their like on each of {gpus} GPUs, and "
            f"{activations / 1e9:.3g} GB for {at_once} samples at a time",
            f"cost        {hours:,.{max(0, 1 - math.floor(math.log10(hours)))}f} GPU-hours at {UTILISATION:.0%} of "
            f"{PEAK[half] / 1e12:g} TFLOPS (A100, {unit})",
        ]
    )


def plan(config: dict[str, Any], gpus: int) -> str:
    """What a pre-training would take, from its configuration alone; without speed-up algorithms."""
    with torch.device("meta"):
        net = ViCMAE(**config["model"])
        size, N = net.encoder.img_size, net.encoder.num_patches
        micro = config["data"].get("global_micro_batch_size") or config["data"]["global_train_batch_size"]
        V, T = config["augment"].get("views", 2), net.encoder.num_frames
        flops = net.flops_per_batch(
            {"views": torch.empty((micro, V, T, 3, size, size) if T > 1 else (micro, V, 3, size, size))}
        )
    stacks = [
        (len(part.blocks), V * (1 + tokens), part.norm.normalized_shape[0])
        for part, tokens in ((net.encoder, net.kept(N)[0]), (net.decoder, N))
        if part is not None
    ]
    fsdp = (config["trainer"].get("parallelism_config") or {}).get("fsdp") or {}
    kept = 1 if fsdp.get("activation_checkpointing") else 17
    pictures = 12 * 4 * V * T * 3 * size**2  # views, targets, predictions, errors and their gradients, in fp32
    activations = activation_bytes(stacks, config["trainer"].get("precision"), kept) + pictures
    return training_plan(net, config, gpus, flops / micro, activations)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend before any long work ends the program in one line."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}")


def main() -> None:
    with one_line_errors():
        arguments, gpus = asked_plan(sys.argv[1:])
        config = load_config(arguments, pretrain)
        if gpus:
            print(plan(config, gpus))
            return
        trainer = pretrain(**config)
    fit(trainer)
    run, net = Path("runs", config["run_name"]), trainer.state.model
    paths = [stream["path"] for stream in config["data"]["streams"]]
    net = getattr(net, "module", net)
    if net.decoder is not None:
        draw_reconstructions(net, paths, run / "reconstructions.png")  # on all ranks, for FSDP
    if dist.get_global_rank() == 0:
        result = finish_run(run, {})
        if "knn/trained" in result:
            before, after = result.get("knn/random", math.nan), result["knn/trained"]
            print(f"k-NN accuracy: {after:.3f} after pre-training, {before:.3f} with random weights")
        print(f"all of the run is in {run}: reconstructions.png, loss.png, metrics.jsonl, checkpoints/")


if __name__ == "__main__":
    main()
