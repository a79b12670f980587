"""The views of a sample: random pairs for pre-training, fixed views for evaluation.

A view is one frame, or a clip of T frames, cropped to a square. The data workers draw all random
numbers of a sample from a generator of its own, see stream.py. They crop, but do not augment:
augment.py applies the numbers drawn by ViewRecipe to a whole batch on the device.
"""

import bisect
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from composer.utils import dist
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from shards.augment import PARAMETERS
from shards.depth import decode_disparity
from shards.format import Clips, check_size, decode_frame, record_unreadable, spread

UnitInterval = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
DataSets = Annotated[list[str], Field(min_length=1)]  # paths of data sets of data_prep.py
FrameGap = NonNegativeInt | Literal["any", "distant"]
Box = tuple[int, int, int, int]  # top, left, height, width in pixels
Range = tuple[float, float]  # least and greatest value
UNREADABLE = "unreadable_eval.jsonl"  # lists the samples that evaluations cannot decode


@dataclass(frozen=True)
class ViewRecipe:
    """The distribution of the crops and colours of a view; the defaults are the official code's.

    Args:
        crop_scale: least and greatest area of a crop, as a fraction of the frame.
        crop_ratio: least and greatest width / height of a crop.
        flip, jitter, grey: probabilities.
        brightness, contrast, saturation, hue: half-ranges of the jitter, as in ColorJitter.
        blur, solarise: probabilities for the first and the second view.
        blur_sigma: least and greatest sigma in pixels.
    """

    crop_scale: tuple[UnitInterval, UnitInterval] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: UnitInterval = 0.5
    jitter: UnitInterval = 0.8
    brightness: UnitInterval = 0.4
    contrast: UnitInterval = 0.4
    saturation: UnitInterval = 0.2
    hue: UnitInterval = 0.1
    grey: UnitInterval = 0.2
    blur: tuple[UnitInterval, UnitInterval] = (1.0, 0.0)
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    solarise: tuple[UnitInterval, UnitInterval] = (0.0, 0.2)

    def draw(self, rng: np.random.Generator, view: int) -> np.ndarray:
        """Draw the numbers (A,) that augment the first (0) or second (1) view, see PARAMETERS."""
        # Always ten numbers, so that no setting changes what is drawn after it.
        draws = rng.random(10).tolist()
        flip, jitter, grey, blur, solarise = draws[:5]
        brightness, contrast, saturation, hue = (2 * draw - 1 for draw in draws[5:9])
        strength = 1.0 if jitter < self.jitter else 0.0
        least, greatest = self.blur_sigma
        sigma = least + (greatest - least) * draws[9]
        values = {
            "flip": flip < self.flip,
            "brightness": 1 + strength * self.brightness * brightness,
            "contrast": 1 + strength * self.contrast * contrast,
            "saturation": 1 + strength * self.saturation * saturation,
            "hue": strength * self.hue * hue,
            "grey": grey < self.grey,
            "blur_sigma": sigma if blur < self.blur[view] else 0.0,
            "solarise": solarise < self.solarise[view],
        }
        return np.array([values[name] for name in PARAMETERS], np.float32)


def draw_crop(rng: np.random.Generator, height: int, width: int, scale: Range, ratio: Range) -> Box:
    """Draw a crop of a frame of height x width pixels as torchvision's RandomResizedCrop does.

    Ten shapes are tried; if none fits into the frame, the crop is central. For `scale` and `ratio`,
    see crop_scale and crop_ratio of ViewRecipe.
    """
    draws = rng.random(20).tolist()
    least_log, greatest_log = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw in zip(draws[:10], draws[10:], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        root_of_ratio = math.exp((least_log + (greatest_log - least_log) * ratio_draw) / 2)
        crop_width = round(math.sqrt(area) * root_of_ratio)
        crop_height = round(math.sqrt(area) / root_of_ratio)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, round(height * ratio[1]))
    crop_height = min(height, round(width / ratio[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def crop_and_scale(frame: np.ndarray, box: Box, size: int) -> Tensor:
    """Crop and scale a frame (H, W, 3) uint8 -> (3, size, size) uint8, channels last in memory.

    Equals torchvision's resized_crop with bicubic interpolation.
    """
    top, left, height, width = box
    crop = frame[top : top + height, left : left + width]
    # Torch would repack a crop that is not contiguous, which takes half as long again.
    pixels = torch.from_numpy(np.ascontiguousarray(crop))[None]  # (1, H, W, 3)
    pixels = pixels.permute(0, 3, 1, 2)  # after [None], else torch sees no channels-last tensor
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


def crop_depth(disparity: np.ndarray, box: Box, size: int) -> Tensor:
    """Crop and scale disparity (H, W, 1) in [0, 1], as an image -> (1, size, size) float32."""
    return crop_and_scale(disparity, box, size).clamp_(0, 1)  # Bicubic interpolation overshoots.


def draw_frame_pair(
    rng: np.random.Generator, count: int, frame_gap: FrameGap, sections: int
) -> tuple[int, int]:
    """Draw the indices of two frames of a clip.

    Args:
        count: frames in the clip; with one frame, both indices are 0.
        frame_gap: "any" for two different frames (ours; the official choice is not published).
            "distant" for a frame from each of two sections (paper). A number for frames that far
            apart, or as far as possible.
        sections: equal parts that "distant" cuts the clip into.
    """
    if count == 1:
        return 0, 0
    if frame_gap == "distant":
        edges = np.linspace(0, count, min(sections, count) + 1).astype(int)
        candidates = rng.integers(edges[:-1], edges[1:])  # a frame of each section
        pair = candidates[rng.permutation(len(candidates))[:2]]
    elif frame_gap == "any":
        pair = rng.choice(count, 2, replace=False)
    else:
        gap = min(frame_gap, count - 1)
        pair = rng.integers(count - gap) + rng.permutation([0, gap])
    return int(pair[0]), int(pair[1])


def draw_window(
    rng: np.random.Generator, timestamps: np.ndarray, clip_seconds: float | None
) -> tuple[int, int]:
    """Draw a window of `clip_seconds` -> index of its first frame, number of its frames.

    The number follows from the clip's mean frame rate, and is at least 2 if the clip has 2 frames.
    The window is the entire clip if this is shorter, or if clip_seconds is None.
    """
    count = len(timestamps)
    if clip_seconds is None or count < 3:
        return 0, count
    frame_interval = (timestamps[-1] - timestamps[0]) / (count - 1)
    if frame_interval * count <= clip_seconds:
        return 0, count
    frames = max(2, round(clip_seconds / frame_interval))
    return int(rng.integers(count - frames + 1)), frames


def pick_frames(
    timestamps: np.ndarray,
    num_frames: int,
    frame_interval: float | None,
    position: float | np.ndarray,
) -> list[int]:
    """Return the indices of the frames that make up a view of a clip.

    Args:
        timestamps: (n,) seconds, ascending, of the stored frames.
        frame_interval: seconds between two frames of the view; a clip that is too short repeats
            its last frame. None for a frame from each of `num_frames` equal sections of the clip.
        position: of the view in the clip, from 0 (earliest) to 1 (latest). Without an interval, of
            each frame in its section, in [0, 1), or an array with a position for each frame.
    """
    steps = np.arange(num_frames)
    if frame_interval is None:
        return ((steps + position) * len(timestamps) / num_frames).astype(int).tolist()
    first, last = timestamps[0], timestamps[-1]
    slack = max(0.0, last - first - (num_frames - 1) * frame_interval)
    times = first + position * slack + steps * frame_interval
    # Stored timestamps are rounded: without a margin, a frame could seem to come too late.
    times = times + 0.02 * frame_interval
    return (np.searchsorted(timestamps, times, "right") - 1).tolist()


def count_distinct(
    timestamps: list[np.ndarray], num_frames: int, frame_interval: float | None
) -> tuple[list[int], list[int]]:
    """Return how many distinct frames some views of clips have, and how many they could have.

    A video that is short, or that has fewer frames than are stored, explains repeated frames
    itself: its timestamps end early, or repeat. For the arguments, see pick_frames.
    """
    distinct, possible = [], []
    for times in timestamps:
        if len(times) == 1 or len(np.unique(times)) < len(times):
            continue
        longest = num_frames
        if frame_interval:
            duration = (times[-1] - times[0]) * len(times) / (len(times) - 1)
            longest = min(num_frames, int(duration / frame_interval))
        for position in (0.0, 0.25, 0.5, 0.75):
            distinct.append(len(set(pick_frames(times, num_frames, frame_interval, position))))
            possible.append(longest)
    return distinct, possible


def read_timestamps(path: str) -> list[np.ndarray]:
    """Return the timestamps of 16 samples, evenly spaced, without those that cannot be read."""
    clips, timestamps = Clips(path), []
    for number in spread(len(clips), 16):
        with suppress(ValueError, IndexError):
            timestamps.append(clips[number]["timestamps"])
    return timestamps


def stored_frames(path: str) -> int:
    """Return the most frames that 16 samples of a data set have, 0 if none can be read."""
    return max(map(len, read_timestamps(path)), default=0)


def check_frames(
    paths: list[str], num_frames: int, frame_interval: float | None, temporal_views: int = 1
) -> None:
    """Print a line for each data set whose views repeat more than a quarter of their frames.

    Raises:
        ValueError: views repeat more than a quarter of their frames although frame_interval is set;
            or all temporal views have the same frames.
    """
    if num_frames == 1:
        return
    for path in paths:
        timestamps = read_timestamps(path)
        stored = max(map(len, timestamps), default=0)
        if frame_interval is None and temporal_views > 1 and 1 < stored <= num_frames:
            fault = f"clips of {stored} frames give each of {temporal_views} temporal views"
            remedy = f"convert with --frames {3 * num_frames}, or give 1 temporal view"
            raise ValueError(f"{path}: {fault} the same {num_frames} frames; {remedy}")
        distinct, possible = count_distinct(timestamps, num_frames, frame_interval)
        if sum(distinct) >= 0.75 * sum(possible):
            continue
        rate, remedy = "", f"--frames {num_frames}"
        if frame_interval:
            rate, remedy = f" at {1 / frame_interval:.3g} Hz", f"--fps {1 / frame_interval:.3g}"
        mean = f"{np.mean(distinct):.1f} distinct frames on average"
        fault = f"{path}: clips of {num_frames} frames{rate} hold {mean}; convert with {remedy}"
        if frame_interval:
            raise ValueError(fault)
        if dist.get_global_rank() == 0:
            print(fault)


@dataclass
class PretrainingViews:
    """A function of a stored sample and a generator that returns the views of pre-training.

    Args:
        img_size, num_patches: H and W of a view, in pixels; N, its patches.
        num_frames: T, frames of a view; 1 for views that are images, which have no axis T.
        video, image: how to draw the views of clips and of images.
        views: V, views of a sample.
        frame_gap, sections: for views that are images, see draw_frame_pair.
        clip_seconds: both frames of such a pair are in a window this long, which is drawn anew in
            each epoch; None for the entire clip.
        frame_interval: for views that are clips, see pick_frames.
        image_frames: equal frames of a view in a stream of images, for OmniMAE; None for T.
    """

    img_size: int
    num_patches: int
    num_frames: int = 1
    _: KW_ONLY
    # For the YAML, the arguments of a ViewRecipe; __post_init__ makes ViewRecipes of them.
    video: Annotated[dict, ViewRecipe] = field(default_factory=dict)
    image: Annotated[dict, ViewRecipe] = field(default_factory=dict)
    views: Literal[1, 2] = 2
    frame_gap: FrameGap = "any"
    sections: Annotated[int, Field(ge=2)] = 2
    clip_seconds: PositiveFloat | None = None
    frame_interval: PositiveFloat | None = None
    image_frames: PositiveInt | None = None

    def __post_init__(self):
        if self.views not in (1, 2):
            raise ValueError(f"views={self.views}: must be 1 or 2")
        self.video = ViewRecipe(**self.video)
        self.image = ViewRecipe(**self.image)

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, Any]:
        """Draw the views of a sample, and decode only their frames; corrupt ones raise ValueError.

        Returns:
            `views` uint8 (V, [T,] H, W, 3); `augment` float32 (V, A), see PARAMETERS; `noise`
            float32 (V, N), uniform in [0, 1), which decides what is masked; `target`, the label.
        """
        # By the sample: a clip of one frame in a data set of clips has the crops of an image.
        recipe = self.video if len(sample["ends"]) > 1 else self.image
        picked = self.draw_frames(sample, rng)
        # The frames are kept in the sample, since `repeats` draws views of a sample again.
        frames = sample.setdefault("decoded", {})
        views, augment = [], []
        for view, indices in enumerate(picked):
            for index in set(indices) - frames.keys():
                frames[index] = decode_frame(sample, index)
            height, width = frames[indices[0]].shape[:2]
            box = draw_crop(rng, height, width, recipe.crop_scale, recipe.crop_ratio)
            views.append(self.crop_view(frames, indices, box))
            augment.append(recipe.draw(rng, view))
        return {
            "views": torch.stack(views),
            "augment": np.stack(augment),
            "noise": rng.random((self.views, self.num_patches), np.float32),
            "target": int(sample["label"]),
        }

    def draw_frames(self, sample: dict, rng: np.random.Generator) -> list[list[int]]:
        """Draw the indices of the frames of each view -> V lists of T, or image_frames, indices."""
        if self.num_frames == 1:
            first, frames = draw_window(rng, sample["timestamps"], self.clip_seconds)
            pair = draw_frame_pair(rng, frames, self.frame_gap, self.sections)
            return [[first + index] for index in pair[: self.views]]
        is_image = self.image_frames and sample["of_images"]
        count = self.image_frames if is_image else self.num_frames
        pick = partial(pick_frames, sample["timestamps"], count, self.frame_interval)
        return [pick(position) for position in rng.random(self.views)]

    def crop_view(self, frames: dict[int, np.ndarray], indices: list[int], box: Box) -> Tensor:
        """Crop the frames of a view alike -> uint8 ([T,] H, W, 3)."""
        crops = {}
        for index in set(indices):
            crop = crop_and_scale(frames[index], box, self.img_size)
            crops[index] = crop.permute(1, 2, 0)  # contiguous, so copied faster
        if self.num_frames == 1:
            return crops[indices[0]]
        return torch.stack([crops[index] for index in indices])


def square_crops(height: int, width: int, fraction: float, count: int) -> list[Box]:
    """Return `count` squares evenly spaced along the longer side of a frame.

    Their side is a fraction of the shorter side of the frame.
    """
    side = max(1, round(min(height, width) * fraction))
    positions = np.linspace(0, 1, count) if count > 1 else [0.5]
    boxes = []
    for position in positions:
        down, right = (position, 0.5) if height > width else (0.5, position)
        boxes.append((round((height - side) * down), round((width - side) * right), side, side))
    return boxes


@dataclass
class EvalViews(Dataset):
    """Deterministic views for evaluation: `inputs` uint8 (V, T, 3, H, W), and `target`.

    V = temporal_views * spatial_views; all views of one temporal position are side by side. With
    `images_as_stored`, there are also `depth` float32 (V, 1, H, W), see decode_disparity, and
    `kind`: 0 for a clip, 1 for an image, 2 for an image with depth.

    Args:
        img_size: H and W, in pixels.
        num_frames, frame_interval: T and seconds, see pick_frames.
        temporal_views: positions in the clip, evenly spaced from first to last; 1 is the middle.
            Without frame_interval, offsets in the section of each frame: 0 and 1/2 for 2.
        spatial_views: square crops along the longer side; 1 is the centre.
        crop_pct: side of a crop as a fraction of the shorter side, in (0, 1].
        labels: for each data set, the number that replaces each of its labels, see match_classes;
            () for the labels as they are stored.
        patch_size: pixels; a sample of smaller frames counts as unreadable.
        images_as_stored: give depth and kind, for a model that sees an image as one frame. As in
            training, a clip of one frame in a data set of clips counts as a clip.
        run: run directory, where UNREADABLE lists unreadable samples. They become black, with the
            target -1. If more than 0.1 % are unreadable, or run is None, ValueError is raised.
    """

    paths: list[str]
    img_size: int
    num_frames: int = 1
    temporal_views: int = 1
    spatial_views: int = 1
    crop_pct: float = 0.875
    frame_interval: float | None = None
    labels: Sequence[list[int]] = ()
    patch_size: int = 1
    images_as_stored: bool = False
    run: Path | None = None

    def __post_init__(self):
        self.data = ConcatDataset([Clips(path) for path in self.paths])
        self.of_images = [False] * len(self.paths)  # for each data set
        if self.images_as_stored:
            self.of_images = [stored_frames(path) == 1 for path in self.paths]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def sample_bytes(self) -> int:
        """Return the bytes of the views of a sample."""
        bytes_per_pixel = self.num_frames * 3 + 4 * self.images_as_stored
        return self.temporal_views * self.spatial_views * bytes_per_pixel * self.img_size**2

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return the views of a sample."""
        data_set = bisect.bisect_right(self.data.cumulative_sizes, number)
        try:
            sample = self.data[number]
            check_size(sample, self.patch_size)
            inputs = self.draw_inputs(sample, self.of_images[data_set])
            label = sample["label"]
        except (ValueError, IndexError, KeyError, TypeError) as error:  # corrupt frame or shard
            first_number = [0, *self.data.cumulative_sizes][data_set]
            name = f"{self.paths[data_set]}, sample {number - first_number}"
            if self.run is None:
                remedy = "run data_prep.py verify"
                raise ValueError(f"{name} cannot be decoded ({error}); {remedy}") from error
            # The list can have samples of other data sets, from other EvalViews of the run.
            prefixes = tuple(f"{path}, sample " for path in self.paths)
            limit = 0.001 * len(self)
            record_unreadable(self.run / UNREADABLE, name, error, limit, prefixes)
            inputs, label = self.black(), -1
        if self.labels and label >= 0:
            label = self.labels[data_set][label]
        return inputs | {"target": torch.tensor(label)}

    def black(self) -> dict[str, Tensor]:
        """Return the views of an unreadable sample."""
        num_views = self.temporal_views * self.spatial_views
        shape = (num_views, self.num_frames, 3, self.img_size, self.img_size)
        inputs = {"inputs": torch.zeros(shape, dtype=torch.uint8)}
        if self.images_as_stored:
            inputs |= {"depth": torch.zeros(num_views, 1, *shape[3:]), "kind": torch.tensor(0)}
        return inputs

    def draw_inputs(self, sample: dict[str, Any], is_image: bool) -> dict[str, Tensor]:
        """Return the views of a sample, with depth and kind if images are as stored."""
        inputs = self.black() | {"inputs": self.crop_views(sample)}
        if not is_image:
            return inputs
        if "depth" not in sample:
            return inputs | {"kind": torch.tensor(1)}
        disparity = decode_disparity(sample["depth"])
        boxes = square_crops(*disparity.shape[:2], self.crop_pct, self.spatial_views)
        depth = [crop_depth(disparity, box, self.img_size) for box in boxes]
        depth = torch.stack(depth * self.temporal_views)
        return inputs | {"kind": torch.tensor(2), "depth": depth}

    def crop_views(self, sample: dict[str, Any]) -> Tensor:
        """Return the views of a sample -> (V, T, 3, H, W)."""
        if self.temporal_views == 1:
            positions = [0.5]
        else:  # Without an interval, position 1 would be in the next section (source: VideoMAE).
            includes_last = self.frame_interval is not None
            positions = np.linspace(0, 1, self.temporal_views, endpoint=includes_last)
        times = sample["timestamps"]
        views = []
        for position in positions:
            picked = pick_frames(times, self.num_frames, self.frame_interval, position)
            frames = {index: decode_frame(sample, index) for index in set(picked)}
            size = frames[picked[0]].shape[:2]
            for box in square_crops(*size, self.crop_pct, self.spatial_views):
                crops = [crop_and_scale(frames[index], box, self.img_size) for index in picked]
                views.append(torch.stack(crops))
        return torch.stack(views)
