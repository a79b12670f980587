"""How samples are seen: the drawn views of pre-training and their augmentation on the device; the fixed ones of evaluation.

Everything random about a sample is drawn in the data workers, from a generator seeded by (seed, epoch, sample), see
streams.py. The device then applies what was drawn to the whole batch at once.
"""

import bisect
import math
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision.transforms.v2.functional import normalize

from shards.format import Clips, decode_frame, record_unreadable

UnitInterval = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
DataSets = Annotated[list[str], Field(min_length=1)]  # paths of data sets

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, of pixels in 0..1 [code]


PARAMETERS = (
    "flip",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grey",
    "blur_sigma",
    "solarise",
)


BLUR_KERNEL = (9, 5)  # pixels, height and width [code]


SOLARISE_FROM = 127.5 / 255  # bytes from 128 on [code], whatever the colour map rounds


LUMA = (0.2989, 0.587, 0.114)  # torchvision's


def normalise(pixels: Tensor) -> Tensor:
    """Bytes (..., 3, H, W) -> float, relative to MEAN and in units of STD."""
    return normalize(pixels.float() / 255, MEAN, STD)


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
        """The numbers of PARAMETERS for view 0 or 1 -> (A,) float32; whatever is off is at its neutral value."""
        # Always as many draws, so that no choice moves another.
        flip, jitter, grey, blur, solarise, *amounts, spread = rng.random(10).tolist()
        ranges = (self.brightness, self.contrast, self.saturation, self.hue)
        amounts = [
            (jitter < self.jitter) * half * (2 * one - 1)
            for half, one in zip(ranges, amounts, strict=True)
        ]
        brightness, contrast, saturation, hue = amounts
        least, most = self.blur_sigma
        sigma = (blur < self.blur[view]) * (least + (most - least) * spread)
        flip, grey, solarise = flip < self.flip, grey < self.grey, solarise < self.solarise[view]
        return np.array(
            [flip, 1 + brightness, 1 + contrast, 1 + saturation, hue, grey, sigma, solarise],
            np.float32,
        )


def draw_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple, ratio: tuple
) -> tuple[int, ...]:
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
    pixels = torch.from_numpy(np.ascontiguousarray(frame[top : top + height, left : left + width]))[
        None
    ]
    return F.interpolate(pixels.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)[
        0
    ]  # channels last


FrameGap = NonNegativeInt | Literal["any", "distant"]


def draw_frame_pair(
    rng: np.random.Generator, count: int, frame_gap: FrameGap, sections: int
) -> tuple[int, int]:
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


def pick_frames(
    timestamps: np.ndarray, num_frames: int, frame_interval: float | None, place: float
) -> list[int]:
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
    times = (
        first + place * free + np.arange(num_frames) * frame_interval + 0.02 * frame_interval
    )  # packs' times are rounded
    return (np.searchsorted(timestamps, times, "right") - 1).tolist()


@dataclass
class PretrainingViews:
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
            picked = [
                [index] for index in draw_frame_pair(rng, count, self.frame_gap, self.sections)
            ][: self.views]
        else:
            places = rng.random(self.views)
            picked = [
                pick_frames(sample["timestamps"], self.num_frames, self.frame_interval, place)
                for place in places
            ]
        frames = sample.setdefault(
            "decoded", {}
        )  # an image is decoded once, and a frame that several views share
        for index in set(chain(*picked)) - frames.keys():
            frames[index] = decode_frame(sample, index)
        views, augment = [], []
        for view, indices in enumerate(picked):
            box = draw_crop(
                rng, *frames[indices[0]].shape[:2], recipe.crop_scale, recipe.crop_ratio
            )
            crops = {
                index: crop_and_scale(frames[index], box, self.img_size).permute(1, 2, 0)
                for index in set(indices)
            }
            # As it lies in memory, (H, W, 3): copied faster.
            views.append(
                torch.stack([crops[index] for index in indices])
                if self.num_frames > 1
                else crops[indices[0]]
            )
            augment.append(recipe.draw(rng, view))
        noise = rng.random((self.views, self.num_patches), np.float32)
        return {
            "views": torch.stack(views),
            "augment": np.stack(augment),
            "noise": noise,
            "target": int(sample["label"]),
        }


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
    flip, brightness, contrast, saturation, hue, grey, sigma, solarise = parameters.float().unbind(
        1
    )
    x = views.float() / 255
    x = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)

    luma, zero, one = x.new_tensor(LUMA), torch.zeros_like(hue), torch.ones_like(hue)
    to_yiq = torch.stack(
        [luma, x.new_tensor([0.5959, -0.2746, -0.3213]), x.new_tensor([0.2115, -0.5227, 0.3112])]
    )
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    turn = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], dim=1).view(-1, 3, 3)
    keep = (saturation * (1 - grey))[:, None, None]  # of the colour; the rest becomes luma
    colour = keep * torch.eye(3, device=x.device) + (1 - keep) * luma.expand(3, 3)
    colour = (
        colour @ torch.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)[:, None, None]
    )  # (B, 3, 3)
    offset = (1 - contrast) * brightness * (x.mean(dim=(2, 3)) @ luma)  # (B,)
    x = (
        torch.baddbmm(offset[:, None, None].expand(-1, 3, 1), colour, x.flatten(2))
        .view_as(x)
        .clamp(0, 1)
    )

    blurred = sigma > 0
    if blurred.any():
        x[blurred] = gaussian_blur(x[blurred], sigma[blurred])
    return torch.where(solarise.bool()[:, None, None, None] & (x >= SOLARISE_FROM), 1 - x, x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur (B, 3, H, W), each with its own sigma (B,) in pixels, over BLUR_KERNEL, reflecting at the edges."""
    for axis, size in ((2, BLUR_KERNEL[0]), (3, BLUR_KERNEL[1])):
        half = size // 2
        weights = torch.exp(
            -0.5 * (torch.arange(-half, half + 1, device=x.device) / sigma[:, None]) ** 2
        )  # (B, size)
        weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, None, None, None]
        padded = F.pad(x, (0, 0, half, half) if axis == 2 else (half, half, 0, 0), mode="reflect")
        x = sum(
            padded.narrow(axis, shift, x.shape[axis]) * weights[:, shift] for shift in range(size)
        )
    return x


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
        label_offsets: what is added to the labels of each data set; nothing if not given.
        unreadable: file for the names of samples that cannot be decoded, which are black and have the target -1: they do not
            count. Without it, one is an error.
        max_unreadable: fraction of the samples that may be.

    V = temporal_views * spatial_views.
    """

    paths: list[str]
    img_size: int
    num_frames: int = 1
    temporal_views: int = 1
    spatial_views: int = 1
    crop_pct: float = 0.875
    frame_interval: float | None = None
    label_offsets: tuple[int, ...] = ()
    unreadable: Path | None = None
    max_unreadable: float = 0.001

    def __post_init__(self):
        self.data = ConcatDataset([Clips(path) for path in self.paths])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        try:
            views, label = self.views_of(self.data[number])
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
        ) as error:  # of a spoilt frame, or a shard that is cut
            owner = self.owner(number)
            self.note(
                f"{self.paths[owner]}, sample {number - [0, *self.data.cumulative_sizes][owner]}",
                error,
            )
            shape = (
                self.temporal_views * self.spatial_views,
                self.num_frames,
                3,
                self.img_size,
                self.img_size,
            )
            views, label = torch.zeros(shape, dtype=torch.uint8), -1
        if self.label_offsets and label >= 0:
            label += self.label_offsets[self.owner(number)]
        return {"inputs": views, "target": torch.tensor(label)}

    def owner(self, number: int) -> int:
        return bisect.bisect_right(self.data.cumulative_sizes, number)

    def note(self, name: str, error: Exception) -> None:
        """Add a sample to the list of the unreadable.

        Raises:
            ValueError: there is no such list, or too many are in it.
        """
        remedy = "run data_prep.py verify"
        if self.unreadable is None:
            raise ValueError(f"{name} cannot be decoded ({error}); {remedy}") from error
        mine = [
            one
            for one in record_unreadable(self.unreadable, name, error)
            if one.rpartition(", sample")[0] in self.paths
        ]
        if len(mine) > max(1, self.max_unreadable * len(self)):
            raise ValueError(
                f"{len(mine)} samples cannot be decoded, see {self.unreadable}; {remedy}"
            ) from error

    def views_of(self, sample: dict[str, Any]) -> tuple[Tensor, int]:
        views, places = [], (np.arange(self.temporal_views) + 0.5) / self.temporal_views
        if self.frame_interval and self.temporal_views > 1:
            places = np.linspace(0, 1, self.temporal_views)
        for place in places:
            picked = pick_frames(sample["timestamps"], self.num_frames, self.frame_interval, place)
            frames = {index: decode_frame(sample, index) for index in set(picked)}
            height, width = frames[picked[0]].shape[:2]
            side = max(1, round(min(height, width) * self.crop_pct))
            for place in np.linspace(0, 1, self.spatial_views) if self.spatial_views > 1 else [0.5]:
                down, right = (place, 0.5) if height > width else (0.5, place)
                box = (round((height - side) * down), round((width - side) * right), side, side)
                views.append(
                    torch.stack(
                        [crop_and_scale(frames[index], box, self.img_size) for index in picked]
                    )
                )
        return torch.stack(views), sample["label"]
