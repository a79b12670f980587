"""Fine-tune a pre-trained encoder, or a linear head on it, to classify images or clips (paper section 4).

    composer finetune.py yamls/finetune_demo.yaml                                             # clips, from yamls/demo.yaml
    composer finetune.py yamls/linprobe_demo.yaml                                             # a linear head on stills

The signature of `finetune` is the schema of its YAML files. All of a run is in runs/{run_name}/, as in pre-training.
"""

import math
import random
import sys
import zlib
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from composer import Trainer
from composer.core import DataSpec
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.optim import Lars
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from model import Classifier, ProperFraction, ProbeHeads
from shards.augment import MEAN, normalise
from shards.format import UNREADABLE, common_classes, decode_frame
from shards.stream import load_stream
from shards.views import (
    DataSets,
    EvalViews,
    PositiveFraction,
    UnitInterval,
    crop_and_scale,
    draw_crop,
    pick_frames,
)
from training.checkpoints import Checkpoints
from training.config import RunName, load_config, one_line_errors
from training.plan import (
    ALL_KEPT,
    activation_bytes,
    split_plan_flag,
    size_of,
    stack_of,
    training_plan,
)
from training.run import TrainerBlock, build_optimizer, build_trainer, finish_run, fit, start_run
from training.speedups import ALGORITHMS, CALLBACKS, LOGGERS, unwrapped
from training.weights import describe, load_pretrained


@dataclass
class FinetuningViews:
    """How a labelled sample is seen in training: crop and flip, one for all frames, then erasing, mixup and cutmix.

    Args:
        label_offsets: what is added to the labels of each stream; nothing if not given.
        crop_scale, crop_ratio: of RandomResizedCrop.
        flip: probability; 0 where a label has a direction.
        frame_interval: seconds between two frames, for a piece of the clip; None for the whole clip. See pick_frames.
        rand_augment: policy in timm's notation, such as rand-m9-mstd0.5-inc1; alike for all frames of a clip.
        erasing: probability that a box of a sample becomes noise (timm's RandomErasing, mode "pixel").
        mixup, cutmix: alpha of the beta distribution of their share; 0 is off. One of the two is drawn for each batch.
        label_smoothing: in [0, 1).
        held_out: fraction of the samples, by a checksum of their names, that are not trained on but choose a linear head.

    Raises:
        ValueError: a policy that timm does not have, samples held out where all are mixed, or labels that are smoothed where
            the classes are of several data sets.
    """

    img_size: int
    num_frames: int
    num_classes: int
    label_offsets: tuple[int, ...] = ()
    _: KW_ONLY
    crop_scale: tuple[UnitInterval, UnitInterval] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: UnitInterval = 0.5
    frame_interval: PositiveFloat | None = None
    rand_augment: str | None = None
    erasing: UnitInterval = 0.25
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    label_smoothing: ProperFraction = 0.1
    held_out: UnitInterval = 0.0

    def __post_init__(self):
        mixing = {"label_smoothing": self.label_smoothing, "num_classes": self.num_classes}
        self.mix = Mixup(self.mixup, self.cutmix, **mixing) if self.mixup or self.cutmix else None
        if self.mix and self.held_out:
            raise ValueError(
                "augment.held_out needs augment.mixup and augment.cutmix to be 0: they would mix its labels in"
            )
        if self.label_offsets and self.label_smoothing:
            raise ValueError(
                "augment.label_smoothing must be 0 with own_heads: it would reach other data sets' classes"
            )
        self.policy = None
        if self.rand_augment:
            colour = tuple(round(255 * one) for one in MEAN)
            hints = {"translate_const": int(0.45 * self.img_size), "img_mean": colour}
            try:
                self.policy = rand_augment_transform(self.rand_augment, hints)
            except (AssertionError, ValueError) as error:
                example = "one is rand-m9-mstd0.5-inc1"
                raise ValueError(
                    f"augment.rand_augment {self.rand_augment} is no policy of timm's; {example}"
                ) from error

    def draw(self, sample: dict, rng: np.random.Generator) -> dict[str, Tensor]:
        """Run in a worker on a stored sample -> `inputs` uint8 (1, T, 3, H, W), `target`, `key` (seeds what follows).

        Frames are picked from a random place, and cropped and flipped alike. `held_out` is the label of a sample that is not
        to be trained on, else -1.

        Raises:
            ValueError: the sample has no label; the stream names it and goes on with the next.
        """
        if sample["label"] < 0:
            raise ValueError("has no label")
        picked = pick_frames(
            sample["timestamps"], self.num_frames, self.frame_interval, rng.random()
        )
        frames = {index: decode_frame(sample, index) for index in set(picked)}
        box = draw_crop(rng, *frames[picked[0]].shape[:2], self.crop_scale, self.crop_ratio)
        clip = torch.stack([crop_and_scale(frames[index], box, self.img_size) for index in picked])
        if rng.random() < self.flip:
            clip = clip.flip(3)
        if self.policy:
            seed = int(rng.integers(2**31))
            clip = torch.stack([self.augmented(frame, seed) for frame in clip])
        kept_out = zlib.crc32(sample["name"].encode()) < self.held_out * 2**32
        label = sample["label"] + (
            self.label_offsets[sample["stream"]] if self.label_offsets else 0
        )
        drawn = {"inputs": clip[None], "target": label, "held_out": label if kept_out else -1}
        return drawn | {"key": int(rng.integers(2**31))}

    def augmented(self, frame: Tensor, seed: int) -> Tensor:
        """What the policy makes of a frame (3, H, W) uint8; timm draws from global generators."""
        random.seed(seed)
        np.random.seed(seed)
        return pil_to_tensor(self.policy(to_pil_image(frame)))

    def apply(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on the device: `inputs` normalised, erased and mixed (B, 1, T, 3, H, W); `target` mixed (B, C); `held_out`.

        The target of a sample that is held out is zero: its cross-entropy is, too.

        timm draws from the global generators, and so does drop path in the forward pass that follows: all are seeded by the
        first sample's key, so that a step depends on its batch alone and a resumed run repeats it.
        """
        key = int(batch["key"][0])
        random.seed(key)
        np.random.seed(key)
        torch.manual_seed(key)
        inputs, target = batch["inputs"], batch["target"]
        shape = inputs.shape
        x = normalise(inputs).flatten(1, 3)  # (B, T * 3, H, W): one box for all frames
        if self.erasing:
            x = RandomErasing(self.erasing, mode="pixel", device=x.device)(x)
        if self.mix:
            x, target = self.mix(x, target)
        else:
            target = mixup_target(target, self.num_classes, smoothing=self.label_smoothing)
            target = target * (batch["held_out"] < 0)[:, None]
        return {"inputs": x.view(shape), "target": target, "held_out": batch["held_out"]}


def normalise_views(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` of EvalViews, uint8 -> normalised."""
    return {"inputs": normalise(batch["inputs"]), "target": batch["target"]}


def load_eval(
    run: Path,
    img_size: int,
    num_frames: int,
    label_offsets: tuple[int, ...] = (),
    *,
    paths: DataSets,
    batch_size: PositiveInt = 64,
    num_workers: NonNegativeInt = 0,
    crop_pct: PositiveFraction = 0.875,
    frame_interval: PositiveFloat | None = None,
) -> DataSpec:
    """The loader of the validation data: one central view of each sample.

    Args:
        label_offsets, crop_pct, frame_interval: see EvalViews.
        paths: data sets of data_prep.py.
        batch_size: samples of each rank.
        num_workers: processes of each rank.
    """
    how = {"crop_pct": crop_pct, "frame_interval": frame_interval, "unreadable": run / UNREADABLE}
    data = EvalViews(paths, img_size, num_frames, label_offsets=label_offsets, **how)
    sampler = dist.get_sampler(data, drop_last=False, shuffle=False)
    loader = DataLoader(data, batch_size, sampler=sampler, num_workers=num_workers)
    return DataSpec(loader, batch_transforms=normalise_views)


def build_lars(
    net: Classifier,
    global_train_batch_size: int,
    *,
    base_lrs: Annotated[list[PositiveFloat], Field(min_length=1)],
    momentum: UnitInterval = 0.9,
    weight_decay: NonNegativeFloat = 0.0,
    trust_coeff: PositiveFloat = 0.001,
) -> Lars:
    """LARS for the heads of a linear probe, one for each learning rate. Biases have SGD's step (source: MAE).

    Args:
        base_lrs: for 256 samples; lr = base_lr * batch / 256.
        trust_coeff: length of a step relative to the weights', at a learning rate of 1.
    """
    groups = []
    heads = net.head if isinstance(net.head, ProbeHeads) else [net.head]
    for head, base_lr in zip(heads, base_lrs, strict=True):
        lr = base_lr * global_train_batch_size / 256
        groups.append(
            {"params": [head.weight], "lr": lr, "always_adapt": True, "weight_decay": weight_decay}
        )
        groups.append({"params": [head.bias], "lr": lr, "always_adapt": False, "weight_decay": 0.0})
    return Lars(groups, momentum=momentum, trust_coeff=trust_coeff)


def finetune(
    *,
    run_name: RunName,
    seed: int,
    pretrained: str | None,
    data: Annotated[dict, load_stream],
    eval_data: Annotated[dict, load_eval],
    augment: Annotated[dict, FinetuningViews],
    model: Annotated[dict, Classifier],
    optimizer: Annotated[dict, build_optimizer] | None = None,
    lars: Annotated[dict, build_lars] | None = None,
    schedule: Annotated[dict, CosineAnnealingWithWarmupScheduler],
    trainer: TrainerBlock,
    checkpoints: Annotated[dict, Checkpoints] | None = None,
    algorithms: Annotated[dict, ALGORITHMS] | None = None,
    callbacks: Annotated[dict, CALLBACKS] | None = None,
    loggers: Annotated[dict, LOGGERS] | None = None,
    own_heads: bool = False,
    allow_changes: bool = False,
) -> Trainer:
    """The Trainer of a fine-tuning run; the parameters are the blocks of its YAML files.

    Args:
        pretrained: a checkpoint of pretrain.py, an official file or the name of timm's weights; null for random weights.
        optimizer, lars: the one or the other; LARS is for linear probes, with a head for each of its learning rates.
        own_heads: whether each of data.streams has classes and a head of its own (OMNIVORE); eval_data.paths then are of the
            same data sets, one each.

    Raises:
        ValueError: blocks that do not go together.
    """
    config = locals().copy()
    if (optimizer is None) == (lars is None):
        raise ValueError("give one of the blocks optimizer (AdamW) and lars (for a linear probe)")
    if lars and not model.get("freeze"):
        raise ValueError(
            "lars is for a linear probe; set model.freeze to true, or give optimizer in its place"
        )
    heads = len(lars["base_lrs"]) if lars else 1
    if heads > 1 and not augment.get("held_out"):
        raise ValueError(
            "augment.held_out is 0, but one of lars.base_lrs is to be chosen by what is held out; give 0.01"
        )
    training, testing = [stream["path"] for stream in data["streams"]], eval_data["paths"]
    if own_heads and (lars or len(training) != len(testing)):
        raise ValueError(
            "own_heads: give optimizer, not lars, and for each of data.streams one of eval_data.paths"
        )
    run = start_run(config)
    label_offsets = ()
    if own_heads:
        classes = [len(common_classes(list(pair))) for pair in zip(training, testing, strict=True)]
        label_offsets = (0, *accumulate(classes[:-1]))
    else:
        classes = len(common_classes(training + testing))
    net = Classifier(classes, heads, **model)
    if pretrained:
        report = load_pretrained(net, pretrained)
        if dist.get_global_rank() == 0:
            print(f"weights of {pretrained}:\n{describe(report)}")
    num_frames = model.get("num_frames", 1)
    clips = FinetuningViews(
        net.encoder.img_size, num_frames, net.num_classes, label_offsets, **augment
    )
    loader, micro_size = load_stream(
        clips.draw, clips.apply, seed, net.encoder.patch_size, run, **data
    )
    if clips.mix and micro_size % 2:
        raise ValueError(
            f"a micro-batch of {micro_size} on each rank must be even for mixup and cutmix, or set both to 0"
        )
    batch_size = data["global_train_batch_size"]
    built = (
        build_lars(net, batch_size, **lars)
        if lars
        else build_optimizer(net, batch_size, **optimizer)
    )
    validation = load_eval(run, net.encoder.img_size, num_frames, label_offsets, **eval_data)
    return build_trainer(run, config, net, built, loader, micro_size, validation)


def plan(config: dict[str, Any], gpus: int) -> str:
    """What a fine-tuning or a linear probe would take, from its configuration alone; without its evaluations."""
    classes = [size_of(stream["path"])[1] for stream in config["data"]["streams"]]
    classes = classes if config.get("own_heads") else classes[0]
    with torch.device("meta"):
        net = Classifier(
            classes, len(config["lars"]["base_lrs"]) if config.get("lars") else 1, **config["model"]
        )
        frames, size = net.encoder.num_frames, net.encoder.img_size
        flops = net.flops_per_batch({"inputs": torch.empty(1, 1, frames, 3, size, size)})
    pictures = 4 * 4 * frames * 3 * size**2  # bytes and floats, erased and mixed
    kept = 0 if net.freeze else ALL_KEPT
    stacks = [stack_of(net.encoder, 1 + net.encoder.num_patches)]
    activations = activation_bytes(stacks, config["trainer"].get("precision"), kept) + pictures
    return training_plan(net, config, gpus, flops, activations)


def main() -> None:
    with one_line_errors():
        arguments, gpus = split_plan_flag(sys.argv[1:])
        config = load_config(arguments, finetune)
        if gpus:
            print(plan(config, gpus))
            return
        trainer = finetune(**config)
    fit(trainer)
    if dist.get_global_rank() == 0:
        run, head, extra = Path("runs", config["run_name"]), unwrapped(trainer.state).head, {}
        if isinstance(head, ProbeHeads):
            extra = {"base_lr": config["lars"]["base_lrs"][head.best()]}
            print(f"best of the learning rates on the samples held out: {extra['base_lr']}")
        result = finish_run(run, extra)
        top1, top5 = (result.get(f"metrics/eval/{name}", math.nan) for name in ("top1", "top5"))
        print(f"top-1 {top1:.3f}, top-5 {top5:.3f}; all of the run is in {run}")


if __name__ == "__main__":
    main()
