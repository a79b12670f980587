"""Fine-tune a pre-trained encoder, or a linear head on it, to classify images or clips (paper section 4).

    composer finetune.py yamls/finetune_demo.yaml                                             # clips, from yamls/demo.yaml
    composer finetune.py yamls/finetune_demo.yaml run_name=linear_demo model.freeze=true      # a linear head on them

The signature of `finetune` is the schema of its YAML files. All of a run is in runs/{run_name}/, as in pre-training.
"""

import math
import random
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from composer import Trainer
from composer.core import DataSpec
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, to_pil_image

import data_prep
from model import Classifier, load_pretrained
from pretrain import (
    ALGORITHMS,
    CALLBACKS,
    LOGGERS,
    MEAN,
    STD,
    Checkpoints,
    EvalViews,
    Share,
    TrainerBlock,
    build_optimizer,
    build_trainer,
    common_classes,
    crop_and_scale,
    draw_crop,
    finish_run,
    fit,
    load_config,
    load_stream,
    one_line_errors,
    pick_frames,
    start_run,
)


@dataclass
class TrainingClips:
    """How a labelled sample is seen in training: crop and flip, one for all frames, then erasing, mixup and cutmix.

    Args:
        crop_scale, crop_ratio: of RandomResizedCrop.
        flip: probability; 0 where a label has a direction.
        frame_interval: seconds between two frames, for a piece of the clip; None for the whole clip. See pick_frames.
        rand_augment: policy in timm's notation, such as rand-m9-mstd0.5-inc1; alike for all frames of a clip.
        erasing: probability that a box of a sample becomes noise (timm's RandomErasing, mode "pixel").
        mixup, cutmix: alpha of the beta distribution of their share; 0 is off. One of the two is drawn for each batch.
        label_smoothing: in [0, 1).
    """

    img_size: int
    num_frames: int
    num_classes: int
    _: KW_ONLY
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    frame_interval: PositiveFloat | None = None
    rand_augment: str | None = None
    erasing: Share = 0.25
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    label_smoothing: Share = 0.1

    def __post_init__(self):
        mixing = {"label_smoothing": self.label_smoothing, "num_classes": self.num_classes}
        self.mix = Mixup(self.mixup, self.cutmix, **mixing) if self.mixup or self.cutmix else None
        self.policy = None
        if self.rand_augment:
            colour = tuple(round(255 * one) for one in MEAN)
            hints = {"translate_const": int(0.45 * self.img_size), "img_mean": colour}
            try:
                self.policy = rand_augment_transform(self.rand_augment, hints)
            except (AssertionError, ValueError) as error:
                raise ValueError(f"augment.rand_augment {self.rand_augment} is no policy of timm's: {error}") from error

    def draw(self, sample: dict, rng: np.random.Generator) -> dict[str, Tensor]:
        """Run in a worker on a stored sample -> `inputs` uint8 (1, T, 3, H, W), `target`, `key` (seeds what follows).

        Frames are picked from a random place, and cropped and flipped alike.
        """
        picked = pick_frames(sample["timestamps"], self.num_frames, self.frame_interval, rng.random())
        frames = {index: data_prep.decode_frame(sample, index) for index in set(picked)}
        box = draw_crop(rng, *frames[picked[0]].shape[:2], self.crop_scale, self.crop_ratio)
        clip = torch.stack([crop_and_scale(frames[index], box, self.img_size) for index in picked])
        if rng.random() < self.flip:
            clip = clip.flip(3)
        if self.policy:
            seed = int(rng.integers(2**31))
            clip = torch.stack([self.augmented(frame, seed) for frame in clip])
        return {"inputs": clip[None], "target": sample["label"], "key": int(rng.integers(2**31))}

    def augmented(self, frame: Tensor, seed: int) -> Tensor:
        """What the policy makes of a frame (3, H, W) uint8; timm draws from global generators."""
        random.seed(seed)
        np.random.seed(seed)
        return pil_to_tensor(self.policy(to_pil_image(frame)))

    def apply(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on the device: `inputs` normalised, erased and mixed (B, 1, T, 3, H, W); `target` mixed (B, C).

        timm draws from the global generators, and so does drop path in the forward pass that follows: all are seeded by the
        first sample's key, so that a step depends on its batch alone and a resumed run repeats it.
        """
        key = int(batch["key"][0])
        random.seed(key)
        np.random.seed(key)
        torch.manual_seed(key)
        inputs, target = batch["inputs"], batch["target"]
        shape = inputs.shape
        x = normalize(inputs.float() / 255, MEAN, STD).flatten(1, 3)  # (B, T * 3, H, W): one box for all frames
        if self.erasing:
            x = RandomErasing(self.erasing, mode="pixel", device=x.device)(x)
        if self.mix:
            x, target = self.mix(x, target)
        else:
            target = mixup_target(target, self.num_classes, smoothing=self.label_smoothing)
        return {"inputs": x.view(shape), "target": target}


def normalise_views(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` of EvalViews, uint8 -> normalised."""
    return {"inputs": normalize(batch["inputs"].float() / 255, MEAN, STD), "target": batch["target"]}


def load_eval(
    img_size: int,
    num_frames: int,
    *,
    paths: list[str],
    batch_size: PositiveInt = 64,
    num_workers: NonNegativeInt = 0,
    crop_pct: Share = 0.875,
    frame_interval: PositiveFloat | None = None,
) -> DataSpec:
    """The loader of the validation data: one central view of each sample.

    Args:
        paths: data sets of data_prep.py.
        batch_size: samples of each rank.
        num_workers: processes of each rank.
        crop_pct, frame_interval: see EvalViews.
    """
    data = EvalViews(paths, img_size, num_frames, crop_pct=crop_pct, frame_interval=frame_interval)
    sampler = dist.get_sampler(data, drop_last=False, shuffle=False)
    loader = DataLoader(data, batch_size, sampler=sampler, num_workers=num_workers)
    return DataSpec(loader, batch_transforms=normalise_views)


def finetune(
    *,
    run_name: str,
    seed: int,
    pretrained: str | None,
    data: Annotated[dict, load_stream],
    eval_data: Annotated[dict, load_eval],
    augment: Annotated[dict, TrainingClips],
    model: Annotated[dict, Classifier],
    optimizer: Annotated[dict, build_optimizer],
    schedule: Annotated[dict, CosineAnnealingWithWarmupScheduler],
    trainer: TrainerBlock,
    checkpoints: Annotated[dict, Checkpoints] | None = None,
    algorithms: Annotated[dict, ALGORITHMS] | None = None,
    callbacks: Annotated[dict, CALLBACKS] | None = None,
    loggers: Annotated[dict, LOGGERS] | None = None,
    allow_changes: bool = False,
) -> Trainer:
    """The Trainer of a fine-tuning run; the parameters are the blocks of its YAML files.

    `pretrained` is a checkpoint of pretrain.py or an official file; null begins with random weights.
    """
    config = locals().copy()
    run = start_run(config)
    classes = common_classes([stream["path"] for stream in data["streams"]] + eval_data["paths"])
    net = Classifier(len(classes), **model)
    if pretrained:
        report = load_pretrained(net, pretrained)
        print(f"{pretrained}: " + ", ".join(f"{len(names)} weights {fate}" for fate, names in report.items()))
    num_frames = model.get("num_frames", 1)
    clips = TrainingClips(net.encoder.img_size, num_frames, len(classes), **augment)
    loader, micro_size = load_stream(clips.draw, clips.apply, seed, net.encoder.patch_size, run, **data)
    if clips.mix and micro_size % 2:
        raise ValueError(f"a micro-batch of {micro_size} on each rank must be even for mixup and cutmix, or set both to 0")
    adamw = build_optimizer(net, data["global_train_batch_size"], **optimizer)
    validation = load_eval(net.encoder.img_size, num_frames, **eval_data)
    return build_trainer(run, config, net, adamw, loader, micro_size, validation)


def main() -> None:
    with one_line_errors():
        config = load_config(sys.argv[1:], finetune)
        trainer = finetune(**config)
    fit(trainer)
    if dist.get_global_rank() == 0:
        run = Path("runs", config["run_name"])
        result = finish_run(run)
        top1, top5 = (result.get(f"metrics/eval/{name}", math.nan) for name in ("top1", "top5"))
        print(f"top-1 {top1:.3f}, top-5 {top5:.3f}; all of the run is in {run}")


if __name__ == "__main__":
    main()
