"""Compute the operations, memory and GPU-hours of a run from its configuration alone.

    python pretrain.py yamls/vitl.yaml --plan=64        # on 64 GPUs; on 8 without a number

pretrain.py, finetune.py and eval.py take --plan, which needs neither data nor GPUs.

    with torch.device("meta"):
        net = ViCMAE(**config["model"])
        sample = {"views": torch.empty(1, 2, 3, 224, 224), "noise": torch.empty(1, 2, 196)}
    print(training_plan(net, sample, config, gpus=8))
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from composer.core import ensure_time
from torch import Tensor, nn

from shards.format import Clips, read_classes
from shards.storage import Storage
from training.cost import flops_per_sample, peak_bytes

PUBLISHED = {  # samples and classes of published data sets, by the last two parts of their paths
    "in1k/train": (1_281_167, 1000),
    "in1k/val": (50_000, 1000),
    "k400/train": (240_000, 400),
    "k400/val": (20_000, 400),
    "k600/train": (366_000, 600),
    "k700/train": (532_000, 700),
    "mit/train": (1_000_000, 305),
    "ssv2/train": (169_000, 174),
    "ssv2/val": (24_777, 174),
    "places365/train": (1_803_460, 365),
    "places365/val": (36_500, 365),
    "demo/train_videos": (3000, 10),
    "demo/train_images": (3000, 10),
    "demo/train_videos_200": (200, 10),
    "demo/train_images_200": (200, 10),
    "demo/test_videos": (500, 10),
    "demo/test_images": (500, 10),
}
HALF_PEAK = 312e12  # operations per second of an A100 in half precision
FULL_PEAK = 19.5e12  # and in fp32
UTILISATION = 0.4  # assumed fraction of the peak


@dataclass
class Plan:
    """The numbers of a run, printed in five lines."""

    weights: int  # parameters
    trained: int  # parameters that are trained
    flops: float  # operations of a sample's step
    samples: int  # of the whole run
    at_once: int  # samples of a step on each GPU
    state: int  # bytes of weights and optimizer state on each GPU
    activations: int  # bytes of a step on each GPU
    half: bool  # whether it computes in half precision, or in fp32
    gpus: int

    def __str__(self) -> str:
        peak, unit = (HALF_PEAK, "half precision") if self.half else (FULL_PEAK, "fp32")
        hours = self.samples * self.flops / (UTILISATION * peak) / 3600
        decimals = max(0, 1 - math.floor(math.log10(hours)))  # two digits at least
        state = f"{self.state / 1e9:.3g} GB of weights and optimizer state"
        activations = f"{self.activations / 1e9:.3g} GB for {self.at_once} samples at a time"
        speed = f"{UTILISATION:.0%} of {peak / 1e12:g} TFLOPS (A100, {unit})"
        return (
            f"weights     {self.weights / 1e6:.4g} M, of them trained {self.trained / 1e6:.4g} M\n"
            f"a sample    {self.flops / 1e9:.4g} GFLOP\n"
            f"samples     {self.samples:,}\n"
            f"memory      {state} on each of {self.gpus} GPUs, and {activations}\n"
            f"cost        {hours:,.{decimals}f} GPU-hours at {speed}"
        )


def make_plan(
    net: nn.Module,
    sample: dict[str, Tensor],
    samples: int,
    at_once: int,
    precision: str | None,
    gpus: int,
    fsdp: dict[str, Any] | None = None,
) -> Plan:
    """Return the plan of a run; of an evaluation if the model has no trained parameters.

    Args:
        net, sample: the model and a batch of one sample, on the meta device.
        samples, at_once, gpus: see Plan.
        precision: Composer's; None is half precision on GPUs.
        fsdp: the settings of FSDP, if it is used.
    """
    half = precision != "fp32"
    weights = sum(parameter.numel() for parameter in net.parameters())
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    state = 4 * weights + 12 * trained  # in fp32: weights; gradients and AdamW's two moments
    flops = flops_per_sample(net, sample)
    if fsdp:
        state //= gpus
    checkpointing = bool(fsdp and fsdp.get("activation_checkpointing"))
    activations = peak_bytes(net, sample, at_once, half, checkpointing)
    return Plan(weights, trained, flops, samples, at_once, state, activations, half, gpus)


def training_plan(
    net: nn.Module, sample: dict[str, Tensor], config: dict[str, Any], gpus: int
) -> Plan:
    """Return the plan of a training, without its evaluations and augmentation; see make_plan."""
    data, trainer = config["data"], config["trainer"]
    batch = data.get("global_micro_batch_size") or data["global_train_batch_size"]
    samples = training_samples(data, trainer["max_duration"])
    fsdp = (trainer.get("parallelism_config") or {}).get("fsdp")
    return make_plan(net, sample, samples, batch // gpus, trainer.get("precision"), gpus, fsdp)


def size_of(path: str) -> tuple[int, int]:
    """Return the numbers of samples and classes of a data set, published if it is not on disk.

    Raises:
        ValueError: the data set does not exist, and no published one has this name.
    """
    data_set, split = path.split("/")[-2:] if "/" in path else ("", path)
    published = PUBLISHED.get(f"{data_set.split('_')[0]}/{split}")  # k400 for k400_7.5fps
    if published and not Storage(path).has("index.json"):
        return published
    return len(Clips(path)), len(read_classes(path))


def split_plan_flag(arguments: list[str]) -> tuple[list[str], int | None]:
    """Return the other arguments, and the number of --plan=GPUS: 8 for --plan, None without it.

    Raises:
        ValueError: the number is not a positive integer.
    """
    flags = [argument for argument in arguments if argument.startswith("--plan")]
    if not flags:
        return arguments, None
    match = re.fullmatch(r"--plan(?:=([1-9]\d*))?", flags[0])
    if not match:
        raise ValueError(f"{flags[0]}: give a number of GPUs, as in --plan=8")
    others = [argument for argument in arguments if argument not in flags]
    return others, int(match[1] or 8)


def training_samples(data: dict[str, Any], max_duration: str) -> int:
    """Return how many samples a training takes, in whole batches of each epoch."""
    batch = data["global_train_batch_size"]
    epoch = data.get("epoch_size")
    if not epoch:
        epoch = sum(size_of(stream["path"])[0] for stream in data["streams"])
    epoch *= data.get("repeats", 1)
    steps = epoch // batch
    if not steps:
        limit = f"at most {epoch}, the samples of an epoch"
        raise ValueError(f"data.global_train_batch_size={batch}: must be {limit}")
    duration = ensure_time(max_duration, "ep")
    if duration.value <= 0:
        raise ValueError(f"trainer.max_duration={max_duration}: must be positive")
    if duration.unit.value == "ep":
        return batch * steps * duration.value
    if duration.unit.value == "ba":
        return batch * duration.value
    raise ValueError(f"trainer.max_duration={max_duration}: must be in epochs (ep) or steps (ba)")
