"""Pre-train ViC-MAE on streams of video clips and images (paper sections 3 and 4.1).

    composer pretrain.py yamls/demo.yaml                                    # a laptop: makes its data, 4 min
    composer -n 8 pretrain.py yamls/vitl.yaml                               # 8 GPUs
    composer pretrain.py yamls/vitl.yaml yamls/paper.yaml seed=1            # files merge left to right, then key=value
    python pretrain.py yamls/vitl.yaml --plan                               # what it would take, without data or GPUs

The signature of `pretrain` is the schema of its YAML files: each block is the keyword arguments of one callable. All of a
run is in runs/{run_name}/: config.yaml, checkpoints/, metrics.jsonl, result.json, loss.png, reconstructions.png.
"""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from composer import Trainer
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist

from evaluation.pictures import draw_reconstructions
from model import ViCMAE
from shards.augment import augment_batch
from shards.format import common_classes
from shards.stream import load_stream
from shards.views import PretrainingViews
from training.checkpoints import Checkpoints
from training.config import RunName, load_config, one_line_errors
from training.plan import ALL_KEPT, activation_bytes, split_plan_flag, stack_of, training_plan
from training.run import TrainerBlock, build_optimizer, build_trainer, finish_run, fit, start_run
from training.speedups import ALGORITHMS, CALLBACKS, LOGGERS, unwrapped


def pretrain(
    *,
    run_name: RunName,
    seed: int,
    data: Annotated[dict, load_stream],
    augment: Annotated[dict, PretrainingViews],
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
    views = PretrainingViews(
        net.encoder.img_size, net.encoder.num_patches, net.encoder.num_frames, **augment
    )
    if net.projector is not None and views.views < 2:
        raise ValueError(
            f"augment.views is 1, but model.contrast {net.contrast} compares two views of a sample; give 2"
        )
    loader, micro_size = load_stream(
        views, augment_batch, seed, net.encoder.patch_size, run, **data
    )
    if net.projector is not None and micro_size * dist.get_world_size() < 2:
        raise ValueError(
            f"data: a micro-batch of 1 sample has no others to contrast with (model.contrast {net.contrast})"
        )
    if net.positives == "label":
        common_classes([stream["path"] for stream in data["streams"]])
    adamw = build_optimizer(net, data["global_train_batch_size"], **optimizer)
    return build_trainer(run, config, net, adamw, loader, micro_size)


def plan(config: dict[str, Any], gpus: int) -> str:
    """What a pre-training would take, from its configuration alone; without speed-up algorithms."""
    with torch.device("meta"):
        net = ViCMAE(**config["model"])
        size, N = net.encoder.img_size, net.encoder.num_patches
        micro = (
            config["data"].get("global_micro_batch_size")
            or config["data"]["global_train_batch_size"]
        )
        V, T = config["augment"].get("views", 2), net.encoder.num_frames
        flops = net.flops_per_batch(
            {
                "views": torch.empty(
                    (micro, V, T, 3, size, size) if T > 1 else (micro, V, 3, size, size)
                )
            }
        )
    stacks = [stack_of(net.encoder, V * (1 + net.kept(N)[0]))]
    if net.decoder is not None:
        stacks.append(stack_of(net.decoder, V * (1 + N)))
    fsdp = (config["trainer"].get("parallelism_config") or {}).get("fsdp") or {}
    kept = 1 if fsdp.get("activation_checkpointing") else ALL_KEPT
    pictures = (
        12 * 4 * V * T * 3 * size**2
    )  # views, targets, predictions, errors and their gradients, in fp32
    activations = activation_bytes(stacks, config["trainer"].get("precision"), kept) + pictures
    return training_plan(net, config, gpus, flops / micro, activations)


def main() -> None:
    with one_line_errors():
        arguments, gpus = split_plan_flag(sys.argv[1:])
        config = load_config(arguments, pretrain)
        if gpus:
            print(plan(config, gpus))
            return
        trainer = pretrain(**config)
    fit(trainer)
    run, net = Path("runs", config["run_name"]), unwrapped(trainer.state)
    paths = [stream["path"] for stream in config["data"]["streams"]]
    if net.decoder is not None:
        draw_reconstructions(net, paths, run / "reconstructions.png")  # on all ranks, for FSDP
    if dist.get_global_rank() == 0:
        result = finish_run(run, {})
        if "knn/trained" in result:
            before, after = result.get("knn/random", math.nan), result["knn/trained"]
            print(
                f"k-NN accuracy: {after:.3f} after pre-training, {before:.3f} with random weights"
            )
        print(f"all of the run is in {run}: pictures, metrics.jsonl, checkpoints/")


if __name__ == "__main__":
    main()
