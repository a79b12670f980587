"""The views of fine-tuning: a labelled sample is cropped and augmented, a batch erased and mixed.

FinetuningViews.draw is called in the data workers on each sample, and apply on the device on each
micro-batch.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, NonNegativeFloat, PositiveFloat
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from shards.augment import MEAN, normalise
from shards.depth import decode_disparity
from shards.format import decode_frame
from shards.views import Box, UnitInterval, crop_and_scale, crop_depth, draw_crop, pick_frames


@dataclass
class FinetuningViews:
    """Crop, flip and policy of a labelled sample, then erasing, mixup and cutmix of a batch.

    All frames of a clip are treated alike.

    Args:
        labels: labels[s][i] is the class of the stored label i of stream s, see match_classes; ()
            for the labels as they are stored.
        images_as_stored: whether a sample of a data set of images is one frame, with its depth map
            if there is one, or T equal frames.
        crop_scale, crop_ratio: of RandomResizedCrop.
        flip: probability; 0 if labels have a direction.
        frame_interval: seconds between two frames, for a part of the clip; None for a random frame
            of each of `num_frames` equal sections of the clip (source: VideoMAE).
        rand_augment: policy in timm's notation, such as rand-m9-mstd0.5-inc1.
        erasing: probability that a box of a sample becomes noise (timm's RandomErasing, mode
            "pixel").
        mixup, cutmix: alpha of the beta distribution of the mixed share; 0 is off. One of the two
            is drawn for each batch.
        label_smoothing: in [0, 1).
        drop_colours: probability that an image with depth loses its colours.
        held_out: fraction of the samples, by a checksum of their names, that are not trained on.
            They choose the learning rate of a linear probe.

    Raises:
        ValueError: a policy that timm does not know, or settings that exclude each other.
    """

    img_size: int
    num_frames: int
    num_classes: int
    labels: Sequence[list[int]] = ()
    images_as_stored: bool = False
    _: KW_ONLY
    crop_scale: tuple[UnitInterval, UnitInterval] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: UnitInterval = 0.5
    frame_interval: PositiveFloat | None = None
    rand_augment: str | None = None
    erasing: UnitInterval = 0.25
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_colours: UnitInterval = 0.5
    held_out: UnitInterval = 0.0

    def __post_init__(self):
        self.mix = None
        if self.mixup or self.cutmix:
            smoothing, classes = self.label_smoothing, self.num_classes
            self.mix = Mixup(
                self.mixup, self.cutmix, label_smoothing=smoothing, num_classes=classes
            )
        if self.mix and self.held_out:
            raise ValueError(
                f"augment.held_out={self.held_out}: augment.mixup and augment.cutmix must be 0, "
                "since they would mix in the labels of the held-out samples"
            )
        self.policy = self.new_policy() if self.rand_augment else None

    def new_policy(self):
        colour = tuple(round(255 * mean) for mean in MEAN)
        hints = {
            "translate_const": int(0.45 * self.img_size),
            "img_mean": colour,  # beyond the edges of a frame
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            return rand_augment_transform(self.rand_augment, hints)
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"augment.rand_augment={self.rand_augment}: timm has no such policy; an example is "
                "rand-m9-mstd0.5-inc1"
            ) from error

    def draw(self, sample: dict, rng: np.random.Generator) -> dict[str, Any]:
        """Crop, flip and augment a stored sample, in a data worker.

        The policy comes after crop and flip for images (source: timm), before them for clips
        (source: SlowFast). It leaves images with depth as they are (source: OMNIVORE).

        Returns:
            `inputs` uint8 (1, T, 3, H, W); `target`; `held_out`, the label if the sample is held
            out, else -1; `key`, which seeds the random numbers of apply; and see draw_depth.

        Raises:
            ValueError: the sample has no label. The stream records it and takes the next sample.
        """
        if sample["label"] < 0:
            raise ValueError("has no label")
        as_stored = self.images_as_stored and sample["of_images"]
        num_frames = 1 if as_stored else self.num_frames
        has_depth = as_stored and "depth" in sample
        policy = None if has_depth else self.policy
        position = rng.random()
        if self.frame_interval is None:
            # A generator of its own, so that T does not change what is drawn after it.
            position = rng.spawn(1)[0].random(num_frames)
        picked = pick_frames(sample["timestamps"], num_frames, self.frame_interval, position)
        frames = {index: decode_frame(sample, index) for index in set(picked)}
        if policy and num_frames > 1:
            seed = int(rng.integers(2**31))
            frames = {index: self.apply_policy(frame, seed) for index, frame in frames.items()}
        height, width = frames[picked[0]].shape[:2]
        box = draw_crop(rng, height, width, self.crop_scale, self.crop_ratio)
        crops = [crop_and_scale(frames[index], box, self.img_size) for index in picked]
        clip = torch.stack(crops)  # (T, 3, H, W)
        flipped = rng.random() < self.flip
        if flipped:
            clip = clip.flip(3)
        if policy and num_frames == 1:
            image = clip[0].permute(1, 2, 0).numpy()  # (H, W, 3)
            image = self.apply_policy(image, int(rng.integers(2**31)))
            clip = torch.from_numpy(image).permute(2, 0, 1)[None]
        is_held_out = zlib.crc32(sample["name"].encode()) < self.held_out * 2**32
        label = sample["label"]
        if self.labels:
            label = self.labels[sample["stream"]][label]
        drawn = {
            "inputs": clip[None],
            "target": label,
            "held_out": label if is_held_out else -1,
            # A string stays on the host, where it is read, when the batch moves to a GPU.
            "key": str(rng.integers(2**31)),
        }
        return drawn | (self.draw_depth(sample, box, flipped, rng) if has_depth else {})

    def draw_depth(
        self, sample: dict, box: Box, flipped: bool, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return `depth` float32 (1, 1, 1, H, W), and `colours`, 0 if the image loses them."""
        depth = crop_depth(decode_disparity(sample["depth"]), box, self.img_size)
        if flipped:
            depth = depth.flip(2)
        colours = torch.tensor(float(rng.random() >= self.drop_colours))
        return {"depth": depth[None, None], "colours": colours}

    def apply_policy(self, frame: np.ndarray, seed: int) -> np.ndarray:
        """Apply the policy to a frame (H, W, 3) uint8; timm draws from the global generators."""
        random.seed(seed)
        np.random.seed(seed)
        return np.array(self.policy(Image.fromarray(frame)))

    def apply(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Normalise, erase and mix a batch, on the device.

        timm draws from the global generators, as does drop path in the forward pass that follows.
        All are seeded by the key of the first sample, so that a step depends on its batch alone and
        a resumed run repeats it.

        Returns:
            `inputs` (B, 1, T, 3, H, W), or (B, 1, 1, 4, H, W) with depth as fourth channel;
            `target` (B, C), 0 for a held-out sample; `held_out` (B,).
        """
        key = int(batch["key"][0])
        random.seed(key)
        np.random.seed(key)
        torch.manual_seed(key)
        inputs, target = normalise(batch["inputs"]), batch["target"]
        if "depth" in batch:
            colours = inputs * batch["colours"][:, None, None, None, None, None]
            inputs = torch.cat([colours, batch["depth"]], dim=3)
        x = inputs.flatten(1, 3)  # (B, T * 3, H, W): one box for all frames
        if self.erasing:
            x = RandomErasing(self.erasing, mode="pixel", device=x.device)(x)
        if self.mix:
            x, target = self.mix(x, target)
        else:
            target = mixup_target(target, self.num_classes, smoothing=self.label_smoothing)
            target = target * (batch["held_out"] < 0)[:, None]
        return {"inputs": x.view(inputs.shape), "target": target, "held_out": batch["held_out"]}
