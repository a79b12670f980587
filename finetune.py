"""Fine-tune a pre-trained encoder to classify images or clips, or train a linear head (section 4).

    composer finetune.py yamls/finetune_demo.yaml        # clips, on the encoder of yamls/demo.yaml
    composer finetune.py yamls/linprobe_demo.yaml        # a linear head, on stills
    composer finetune.py yamls/finetune_demo.yaml random_weights=true run_name=finetune_random

The fields of FinetuneConfig are the keys of its YAML files. Everything of a run is in
runs/{run_name}/, as in pre-training.
"""

import sys

from training.announce import announce, print_once, say_if_slow
from training.keys import check_keys

if __name__ == "__main__":  # before the imports of torch and Composer, which take 6 s
    check_keys(__file__, "FinetuneConfig", sys.argv[1:])
    announce("importing torch and Composer")
    from training.peers import peer_watch

    peer_watch().start()

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from composer import Trainer
from composer.utils import dist
from PIL import Image
from pydantic import Field, NonNegativeFloat, PositiveFloat
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.optim import Lars

from evaluation.accuracy import load_eval
from methods import CLASSIFIERS
from methods.linear_probe import LinearProbe, ProbeHeads
from model import Batch, Classifier, ProperFraction
from shards.augment import MEAN, normalise
from shards.depth import decode_disparity
from shards.format import (
    common_classes,
    decode_frame,
    labelled_classes,
    match_classes,
    shared_shards,
)
from shards.stream import TrainingData
from shards.views import (
    Box,
    UnitInterval,
    check_frames,
    crop_and_scale,
    crop_depth,
    draw_crop,
    pick_frames,
    stored_frames,
)
from shards.workers import exit_on_signals
from training.config import Choice, load_config
from training.cost import flops_per_sample
from training.help import stage_help
from training.optimizer import build_optimizer
from training.plan import Machine, size_of, split_plan_flags, training_plans
from training.report_page import write_report
from training.run import RunConfig, build_trainer, finish_run, fit, start_run
from training.sizes import ENCODER_SIZES, known_model
from training.sources import errors_of, one_line_errors
from training.speedups import unwrapped
from training.weights import describe, load_pretrained


@dataclass
class FinetuningViews:
    """Crop, flip and policy of a labelled sample, then erasing, mixup and cutmix of a batch.

    All frames of a clip are treated alike.

    Args:
        labels: labels[s][i] is the class of the stored label i of stream s, see match_classes; ()
            for the labels as they are stored.
        images: for each stream, whether it holds images, of which one frame is taken, with its
            depth map if there is one; () if images become T equal frames.
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
    images: Sequence[bool] = ()
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
        is_image = bool(self.images) and self.images[sample["stream"]]
        num_frames = 1 if is_image else self.num_frames
        has_depth = is_image and "depth" in sample
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

    def draw_depth(self, sample: dict, box: Box, flipped: bool, rng: np.random.Generator) -> Batch:
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

    def apply(self, batch: Batch) -> Batch:
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


def build_lars(
    net: LinearProbe,
    global_train_batch_size: int,
    *,
    base_lrs: Annotated[list[PositiveFloat], Field(min_length=1)],
    momentum: UnitInterval = 0.9,
    weight_decay: NonNegativeFloat = 0.0,
) -> Lars:
    """Return LARS for the heads of a linear probe. Biases take SGD's step (source: MAE).

    Args:
        base_lrs: a learning rate for each head, per 256 samples; lr = base_lr * batch / 256.
    """
    groups = []
    heads = net.head if isinstance(net.head, ProbeHeads) else [net.head]
    for head, base_lr in zip(heads, base_lrs, strict=True):
        lr = base_lr * global_train_batch_size / 256
        weight = {"params": [head.weight], "always_adapt": True, "weight_decay": weight_decay}
        bias = {"params": [head.bias], "always_adapt": False, "weight_decay": 0.0}
        groups += [weight | {"lr": lr}, bias | {"lr": lr}]
    return Lars(groups, momentum=momentum)


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """The keys of a fine-tuning's YAML files.

    Args:
        pretrained: a checkpoint of pretrain.py, an official file or the name of timm's weights;
            null for none. The sizes of the encoder come from it, unless `model` gives them.
        random_weights: take only the sizes of `pretrained`, for the baseline of random weights.
        method: classifier, linear_probe, omnivore or tubevit.
        optimizer, lars: one of the two. LARS is for linear probes, with a head for each of its
            learning rates.
    """

    pretrained: str | None
    eval_data: Annotated[dict, load_eval]
    augment: Annotated[dict, FinetuningViews]
    model: Annotated[dict, Choice("method", CLASSIFIERS, "classifier")]
    optimizer: Annotated[dict, build_optimizer] | None = None
    lars: Annotated[dict, build_lars] | None = None
    method: str | None = None
    random_weights: bool = False

    @property
    def model_class(self) -> type[Classifier]:
        return CLASSIFIERS[self.method or "classifier"]

    def new_model(self, classes: int | list[int]) -> Classifier:
        heads = len(self.lars["base_lrs"]) if self.lars else 1
        several = (heads,) if heads > 1 else ()
        with errors_of("model"):
            return self.model_class(classes, *several, **self.model)


def check_blocks(config: FinetuneConfig) -> None:
    """Check that the blocks of a config go together.

    Raises:
        ValueError: they do not.
    """
    if (config.optimizer is None) == (config.lars is None):
        raise ValueError("give either the block optimizer (AdamW) or lars (for a linear probe)")
    if config.lars and config.model_class is not LinearProbe:
        raise ValueError("lars: works for a linear probe only; give method=linear_probe")
    several = config.lars and len(config.lars["base_lrs"]) > 1
    if several and not config.augment.get("held_out"):
        raise ValueError(
            "augment.held_out=0: held-out samples choose one of lars.base_lrs; give 0.01, say"
        )
    if config.random_weights and not config.pretrained:
        raise ValueError("random_weights: needs the checkpoint pretrained, whose sizes it takes")
    erasing = config.augment.get("erasing", FinetuningViews.erasing)
    if erasing and getattr(config.model_class, "images_are_equal_frames", False):
        reason = f"must be 0 with method={config.method}, which takes equal frames for an image"
        raise ValueError(f"augment.erasing={erasing}: {reason}")
    testing = config.eval_data["paths"]
    if config.model_class.head_per_data_set and len(config.training_paths) != len(testing):
        raise ValueError(
            f"method={config.method}: give one of eval_data.paths for each of data.streams"
        )
    if config.model.get("depth_maps") and not config.data.get("one_stream_per_batch"):
        raise ValueError(
            "data.one_stream_per_batch=false: must be true with model.depth_maps, since images and "
            "clips have different shapes"
        )


def complete_sizes(config: FinetuneConfig, planned: bool = False) -> FinetuneConfig:
    """Return a config whose block `model` has the sizes of the pre-trained encoder.

    Raises:
        ValueError: neither the block nor `pretrained` gives a size.
    """
    known = known_model(config.pretrained, planned)["model"] if config.pretrained else {}
    sizes = {name: known[name] for name in ENCODER_SIZES if name in known}
    model = sizes | config.model
    if missing := [name for name in ENCODER_SIZES if name not in model]:
        raise ValueError(
            f"model.{missing[0]}: missing, and pretrained={config.pretrained} has none"
        )
    return replace(config, model=model)


@dataclass
class Classes:
    """The classes of a fine-tuning, and the numbers of the labels of its data sets."""

    names: list  # of all classes; a list for each data set, if each has a head of its own
    training: list[list[int]]  # for each of data.streams, see match_classes
    testing: list[list[int]]  # for each of eval_data.paths

    @property
    def count(self) -> int | list[int]:
        per_head = isinstance(self.names[0], list)
        return list(map(len, self.names)) if per_head else len(self.names)


def find_classes(config: FinetuneConfig) -> Classes:
    """Return the classes of the first data set, or of each that has a head of its own.

    Raises:
        ValueError: data sets that are missing, have no labels, or classes that the first lacks.
    """
    training, testing = config.training_paths, config.eval_data["paths"]
    if not config.model_class.head_per_data_set:
        names, labels = common_classes(training + testing)
        return Classes(names, labels[: len(training)], labels[len(training) :])
    classes, first = Classes([], [], []), 0
    for path, test_path in zip(training, testing, strict=True):
        names = labelled_classes(path)
        classes.names.append(names)
        classes.training.append(match_classes(path, names, path, first))
        classes.testing.append(match_classes(test_path, names, path, first))
        first += len(names)
    return classes


def say_shared_data(config: FinetuneConfig) -> None:
    """Print a line if the validation has samples that are trained on."""
    for path, count in shared_shards(config.eval_data["paths"], config.training_paths).items():
        fault = "so the accuracy is not that on unseen data"
        print_once(f"{path}: {count} of its shards are trained on too, {fault}")


def finetune(config: FinetuneConfig) -> Trainer:
    """Return the Trainer of a fine-tuning run."""
    check_blocks(config)
    config = complete_sizes(config)
    classes = find_classes(config)
    on_meta = on_meta_device(config, classes.count)
    flops = flops_per_sample(*on_meta) if config.logs_speed else 0.0
    run = start_run(config)
    with say_if_slow("building the model"):
        net = config.new_model(classes.count)
    net.class_names = classes.names
    say_shared_data(config)
    if config.pretrained and not config.random_weights:
        table = describe(load_pretrained(net, config.pretrained))
        print_once(f"weights of {config.pretrained}:\n{table}")
    size, frames = net.encoder.img_size, net.encoder.num_frames
    as_stored = getattr(net, "images_as_stored", False)
    images = [stored_frames(path) == 1 for path in config.training_paths] if as_stored else ()
    of_streams = (classes.training, images)
    views = FinetuningViews(size, frames, net.num_classes, *of_streams, **config.augment)
    patch_size = net.encoder.patch_size
    with say_if_slow("opening the data sets"):
        data = TrainingData(**config.data)
        loader, micro_size = data.load(views.draw, views.apply, config.seed, patch_size, run)
    check_frames(config.training_paths, frames, views.frame_interval)
    if views.mix and micro_size % 2:
        raise ValueError(
            f"data: a micro-batch of {micro_size} on each rank must be even for mixup and cutmix; "
            "change the batch size, or set both to 0"
        )
    if config.lars:
        optimizer = build_lars(net, data.global_train_batch_size, **config.lars)
    else:
        optimizer = build_optimizer(net, data.global_train_batch_size, **config.optimizer)
    validation = load_eval(
        run, size, frames, patch_size, classes.testing, as_stored, **config.eval_data
    )
    return build_trainer(run, config, net, optimizer, loader, micro_size, validation, flops)


def on_meta_device(config: FinetuneConfig, classes: int | list[int]) -> tuple[Classifier, Batch]:
    """Return a model and a batch of one sample without data, from which costs are computed."""
    with torch.device("meta"):
        net = config.new_model(classes)
        size, frames = net.encoder.img_size, net.encoder.num_frames
        label = torch.empty(1, dtype=torch.long)
        inputs = torch.empty(1, 1, frames, 3, size, size)
    return net, {"inputs": inputs, "target": label, "held_out": label}


def plan(config: FinetuneConfig, machine: Machine) -> str:
    """Return the cost of a training without its evaluations, computed without data or weights."""
    check_blocks(config)
    config = complete_sizes(config, planned=True)
    counts = [size_of(path)[1] for path in config.training_paths]
    classes = counts if config.model_class.head_per_data_set else counts[0]
    net, batch = on_meta_device(config, classes)
    return str(training_plans(net, batch, config.given(), machine)[0])


def main() -> None:
    exit_on_signals()
    with one_line_errors():
        if {"--help", "-h"} & set(sys.argv):
            print(stage_help(__doc__, FinetuneConfig))
            return
        arguments, machine = split_plan_flags(sys.argv[1:])
        config = FinetuneConfig(**load_config(arguments, FinetuneConfig))
        if machine:
            print(plan(config, machine))
            return
        trainer = finetune(config)
    fit(trainer)
    if dist.get_global_rank() == 0:
        run, head = Path("runs", config.run_name), unwrapped(trainer.state).head
        extra = {}
        if isinstance(head, ProbeHeads):
            extra = {"base_lr": config.lars["base_lrs"][head.best()]}
            print(f"the learning rate that is best on held-out samples: {extra['base_lr']}")
        result = finish_run(run, extra)
        top1 = result.get("metrics/eval/top1", math.nan)
        top5 = result.get("metrics/eval/top5", math.nan)
        print(f"top-1 {top1:.3f}, top-5 {top5:.3f}; the run directory is {run}")
        write_report(run, run / "report.html")


if __name__ == "__main__":
    main()
