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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from composer import Trainer
from composer.utils import dist
from pydantic import Field, NonNegativeFloat, PositiveFloat
from timm.optim import Lars

from evaluation.accuracy import load_eval
from methods import CLASSIFIERS, check_blocks
from methods.linear_probe import LinearProbe, ProbeHeads
from model import Batch, Classifier
from shards.finetuning_views import FinetuningViews
from shards.format import common_classes, labelled_classes, match_classes, shared_shards
from shards.stream import TrainingData
from shards.views import UnitInterval, check_frames
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
        method: a method of methods.CLASSIFIERS.
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
        counts = (classes, heads) if heads > 1 else (classes,)  # only LinearProbe takes `heads`
        with errors_of("model"):
            net = self.model_class(*counts, **self.model)
        check_blocks(net, self.data, self.augment)
        return net


def check_config(config: FinetuneConfig) -> None:
    """Check that the blocks of a config go together; check_blocks checks them with the model.

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
    if config.augment.get("held_out") and not config.lars:
        held_out = config.augment["held_out"]
        raise ValueError(f"augment.held_out={held_out}: must be 0 without lars, which it serves")
    if config.random_weights and not config.pretrained:
        raise ValueError("random_weights: needs the checkpoint pretrained, whose sizes it takes")
    testing = config.eval_data["paths"]
    if config.model_class.head_per_data_set and len(config.training_paths) != len(testing):
        raise ValueError(
            f"method={config.method}: give one of eval_data.paths for each of data.streams"
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
    classes, first_class = Classes([], [], []), 0
    for path, test_path in zip(training, testing, strict=True):
        names = labelled_classes(path)
        classes.names.append(names)
        classes.training.append(match_classes(path, names, path, first_class))
        classes.testing.append(match_classes(test_path, names, path, first_class))
        first_class += len(names)
    return classes


def say_shared_data(config: FinetuneConfig) -> None:
    """Print a line if the validation has samples that are trained on."""
    for path, count in shared_shards(config.eval_data["paths"], config.training_paths).items():
        fault = "so the accuracy does not hold for unseen data"
        print_once(f"{path}: {count} of its shards are trained on too, {fault}")


def finetune(config: FinetuneConfig) -> Trainer:
    """Return the Trainer of a fine-tuning run."""
    check_config(config)
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
    encoder = net.encoder
    views = FinetuningViews(
        encoder.img_size,
        encoder.num_frames,
        net.num_classes,
        labels=classes.training,
        images_as_stored=getattr(net, "images_as_stored", False),
        **config.augment,
    )
    with say_if_slow("opening the data sets"):
        data = TrainingData(**config.data)
        loader, micro_size = data.load(
            views.draw, views.apply, config.seed, encoder.patch_size, run
        )
    check_frames(config.training_paths, encoder.num_frames, views.frame_interval)
    if views.mix and micro_size % 2:
        raise ValueError(
            f"data: a micro-batch of {micro_size} on each rank must be even for mixup and cutmix; "
            "change the batch size, or set both to 0"
        )
    if config.lars:
        optimizer = build_lars(net, data.global_train_batch_size, **config.lars)
    else:
        optimizer = build_optimizer(net, data.global_train_batch_size, **config.optimizer)
    validation = load_eval(run, net, classes.testing, **config.eval_data)
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
    check_config(config)
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
