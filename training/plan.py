"""What a run would take, computed from its configuration alone: weights, operations, memory, GPU-hours.

    python pretrain.py yamls/vitl.yaml --plan=64                            # for 64 GPUs; for 8 if no number is given

Every stage takes --plan. Nothing here is measured; README, "Transfer" and "Machines that come and go", compares.
"""

import math
import re
from typing import Any

from composer.core import ensure_time
from torch import nn

from shards.format import Clips, read_classes
from shards.storage import Storage

PUBLISHED = {  # samples and classes of data sets by the last two parts of their paths, for a plan where they are not there
    **{"in1k/train": (1_281_167, 1000), "in1k/val": (50_000, 1000)},
    **{
        "k400/train": (240_000, 400),
        "k400/val": (20_000, 400),
        "k600/train": (366_000, 600),
        "k700/train": (532_000, 700),
    },
    **{"mit/train": (1_000_000, 305), "ssv2/train": (169_000, 174), "ssv2/val": (24_777, 174)},
    **{"places365/train": (1_803_460, 365), "places365/val": (36_500, 365)},
    **{f"demo/train_{kind}": (3000, 10) for kind in ("videos", "images")},
    **{f"demo/train_{kind}_200": (200, 10) for kind in ("videos", "images")},
    **{f"demo/test_{kind}": (500, 10) for kind in ("videos", "images")},
}


PEAK = {
    True: 312e12,
    False: 19.5e12,
}  # operations a second of an A100, in half precision or in fp32


UTILISATION = 0.4  # how much of it is taken to be reached


ALL_KEPT = 17  # numbers of each block, token and unit of width that a forward pass leaves for the backward pass


def size_of(path: str) -> tuple[int, int]:
    """Samples and classes of a data set, or of the published one that its path names.

    Raises:
        ValueError: it is not there, and no published one is so named.
    """
    if not Storage(path).has("index.json") and (
        known := PUBLISHED.get("/".join(path.split("/")[-2:]))
    ):
        return known
    return len(Clips(path)), len(read_classes(path))


def split_plan_flag(arguments: list[str]) -> tuple[list[str], int | None]:
    """The other arguments of a command line, and the number of --plan=GPUS: 8 of a plain --plan, None without one."""
    rest = [argument for argument in arguments if not argument.startswith("--plan")]
    if rest == arguments:
        return arguments, None
    number = (
        next(argument for argument in arguments if argument.startswith("--plan")).removeprefix(
            "--plan"
        )
        or "=8"
    )
    if not re.fullmatch(r"=[1-9]\d*", number):
        raise ValueError(f"--plan{number}: give a number of GPUs, as in --plan=8")
    return rest, int(number[1:])


def is_half(precision: str | None) -> bool:
    """Whether a precision of Composer's, None for its choice on GPUs, computes in 16 bits."""
    return precision != "fp32"


def stack_of(part: nn.Module, tokens: int) -> tuple[int, int, int]:
    """Blocks, tokens and width of a sample's pass through an encoder or a decoder, for activation_bytes."""
    return len(part.blocks), tokens, part.norm.normalized_shape[0]


def activation_bytes(stacks: list[tuple[int, int, int]], precision: str | None, kept: int) -> int:
    """What a sample's forward pass through ViT blocks leaves in memory.

    Args:
        stacks: blocks, tokens of the sample, width.
        precision: Composer's.
        kept: numbers of each block, token and unit of width that stay for the backward pass: 17 of all layers, 1 with
            activation checkpointing, 0 without a backward pass. With fewer than 17, one block at a time has them all.
    """
    numbers = sum(kept * blocks * tokens * width for blocks, tokens, width in stacks)
    numbers += (
        0 if kept == ALL_KEPT else ALL_KEPT * max(tokens * width for _, tokens, width in stacks)
    )
    return numbers * (2 if is_half(precision) else 4)


def training_samples(data: dict[str, Any], max_duration: str) -> int:
    """How many samples a training takes, whole batches of each epoch."""
    batch = data["global_train_batch_size"]
    epoch = data.get("epoch_size") or sum(size_of(stream["path"])[0] for stream in data["streams"])
    steps, duration = epoch * data.get("repeats", 1) // batch, ensure_time(max_duration, "ep")
    if not steps:
        raise ValueError(f"data.global_train_batch_size {batch} is more than an epoch's samples")
    if duration.unit.value not in ("ep", "ba"):
        raise ValueError(
            f"trainer.max_duration {max_duration}: a plan needs epochs (ep) or steps (ba)"
        )
    return batch * duration.value * (steps if duration.unit.value == "ep" else 1)


def training_plan(
    net: nn.Module, config: dict[str, Any], gpus: int, flops: float, activations: int
) -> str:
    """A plan of a training: see show_plan. flops of a step and bytes of activations are a sample's."""
    data, trainer = config["data"], config["trainer"]
    at_once = (data.get("global_micro_batch_size") or data["global_train_batch_size"]) // gpus
    state = sum(
        (16 if parameter.requires_grad else 4) * parameter.numel() for parameter in net.parameters()
    )
    if (trainer.get("parallelism_config") or {}).get("fsdp"):
        state //= gpus
    samples = training_samples(data, trainer["max_duration"])
    at_once = min(at_once, getattr(net, "chunk_size", None) or at_once)
    return show_plan(
        net,
        gpus,
        samples,
        flops,
        is_half(trainer.get("precision")),
        state,
        at_once * activations,
        at_once,
    )


def show_plan(
    net: nn.Module,
    gpus: int,
    samples: int,
    flops: float,
    half: bool,
    state: int,
    activations: int,
    at_once: int,
) -> str:
    """What a run takes, computed: nothing is measured.

    Args:
        samples, flops: of the whole run, and floating-point operations of one, in half precision or in fp32.
        state: bytes of weights, gradients and averages on a GPU.
        activations, at_once: bytes on a GPU, of so many samples at a time.
    """
    count, trained = (
        sum(p.numel() for p in net.parameters() if p.requires_grad or every)
        for every in (True, False)
    )
    hours, unit = (
        samples * flops / (UTILISATION * PEAK[half]) / 3600,
        "half precision" if half else "fp32",
    )
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
