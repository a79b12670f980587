"""Compute the operations, memory and GPU-hours of a run from its configuration alone.

    python pretrain.py yamls/vitl.yaml --plan=64 --gpu=h100    # default: 8 GPUs, a100

pretrain.py, finetune.py and eval.py take --plan, which needs neither data nor GPUs.
"""

import math
import re
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, NamedTuple

from composer.core import ensure_time
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from shards.format import Clips, read_classes
from shards.storage import Storage
from training.cost import flops_per_sample, peak_bytes
from training.fsdp import fsdp_settings
from training.gpus import GPUS, Gpu
from training.sources import is_source


class Machine(NamedTuple):
    """The GPUs of a plan."""

    gpus: int
    gpu: Gpu


UTILISATION = 0.4  # assumed fraction of the peak
OVERHEAD = 2e9  # bytes of CUDA's context and of NCCL's and cuBLAS's buffers, assumed
USABLE = 0.95  # fraction of the memory that the allocator can fill, assumed
PAIRS_PER_CORE = 690  # pairs of images a second, 224 pixels; measured on a virtual machine
WRITE_SPEED, UPLOAD_SPEED = 1e9, 0.5e9  # bytes per second of a machine, assumed

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
    "sunrgbd/train": (4845, 19),
    "sunrgbd/test": (4659, 19),
    "demo/train_videos": (3000, 10),
    "demo/train_images": (3000, 10),
    "demo/train_depth": (600, 10),
    "demo/train_videos_200": (200, 10),
    "demo/train_images_200": (200, 10),
    "demo/test_videos": (500, 10),
    "demo/test_images": (500, 10),
    "demo/test_depth": (600, 10),
}


@dataclass(frozen=True)
class Layout:
    """The distribution of a model's weights over GPUs."""

    fsdp: bool = False  # or DDP
    reshard: bool = True  # FSDP frees the weights of a block after its forward pass
    checkpointing: bool = False  # blocks keep only their inputs

    def __str__(self) -> str:
        parts = ["FSDP" if self.fsdp else "DDP"]
        if not self.reshard:
            parts.append("without resharding")
        if self.checkpointing:
            parts.append("with activation checkpointing")
        return " ".join(parts)

    def bytes_of(self, net: nn.Module, gpus: int, micro_batches: int) -> float:
        """Return the bytes on each GPU that last for a whole step.

        They are weights, gradients, AdamW's two moments, all in fp32, and what DDP or FSDP add:
        DDP's buckets of gradients; FSDP's gathered weights, and the gradients of all weights until
        the last micro-batch.
        """
        weights, trained = count_weights(net)
        state = 4 * weights + 12 * trained
        if not self.fsdp:
            return state + 4 * trained * (gpus > 1)
        block_sizes = [count_weights(part)[0] for part in net.modules() if isinstance(part, Block)]
        two_blocks = 2 * 4 * max(block_sizes, default=0)  # the second is fetched ahead
        gathered = two_blocks if self.reshard else 4 * weights
        gradients = 4 * trained if micro_batches > 1 else two_blocks
        return state / gpus + gathered + gradients


FASTEST_FIRST = (Layout(), Layout(True, False), Layout(True), Layout(True, checkpointing=True))


def layout_of(trainer: dict[str, Any]) -> Layout:
    """Return the layout that a block `trainer` selects."""
    fsdp = fsdp_settings(trainer)
    if fsdp is None:
        return Layout()
    reshard = bool(fsdp.get("reshard_after_forward", True))
    return Layout(True, reshard, bool(fsdp.get("activation_checkpointing")))


def count_weights(net: nn.Module) -> tuple[int, int]:
    """Return the numbers of all parameters and of the trained parameters."""
    weights = sum(parameter.numel() for parameter in net.parameters())
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    return weights, trained


class StepCost(NamedTuple):
    """The cost of a micro-batch's step on a GPU."""

    flops: float  # operations of a sample
    recomputed: float  # operations that are done a second time, to save memory
    peak: float  # bytes at the peak, beside weights and gradients


def step_cost(
    net: nn.Module,
    sample: dict[str, Tensor],
    flops: float,
    at_once: int,
    half: bool,
    checkpointing: bool,
) -> StepCost:
    """Return the cost of a step of `at_once` samples, see flops_per_sample and peak_bytes."""
    executed = flops
    chunked = (getattr(net, "chunk_size", None) or math.inf) < at_once
    if chunked or checkpointing:
        executed = flops_per_sample(net, sample, checkpointing, chunked)
    # BatchNorm needs two samples.
    peak = peak_bytes(net, sample, max(2, at_once), half, checkpointing)
    return StepCost(flops, executed - flops, peak)


@dataclass
class Plan:
    """The numbers of a run, printed in lines."""

    machine: Machine
    weights: int  # parameters
    trained: int  # parameters that are trained
    samples: int  # of the whole run
    at_once: int  # samples of a micro-batch on each GPU
    half: bool  # whether it computes in half precision, or in fp32
    cost: StepCost
    layout: Layout
    lasting: float  # bytes on each GPU for a whole step, see Layout.bytes_of

    @property
    def memory(self) -> float:
        """Return the bytes on each GPU."""
        return self.lasting + self.cost.peak + OVERHEAD

    @property
    def fits(self) -> bool:
        return self.memory <= USABLE * self.machine.gpu.memory

    @property
    def speed(self) -> float:
        """Return the samples per second of a GPU, at the assumed utilisation."""
        gpu = self.machine.gpu
        peak = gpu.half if self.half else gpu.full
        return UTILISATION * peak / (self.cost.flops + self.cost.recomputed)

    def __str__(self) -> str:
        gpus, gpu = self.machine
        peak, unit = (gpu.half, "half precision") if self.half else (gpu.full, "fp32")
        gpu_hours = self.samples / self.speed / 3600
        again = f", {self.cost.recomputed / 1e9:.4g} of them again, to save memory"
        parts = f"{self.lasting / 1e9:.3g} of weights, gradients and optimizer"
        parts += f", {self.cost.peak / 1e9:.3g} of a step of {self.at_once} samples"
        fits = "fits" if self.fits else "does not fit"
        return (
            f"weights     {self.weights / 1e6:.4g} M, of them trained {self.trained / 1e6:.4g} M\n"
            f"a sample    {(self.cost.flops + self.cost.recomputed) / 1e9:.4g} GFLOP"
            f"{again if self.cost.recomputed else ''}\n"
            f"samples     {self.samples:,}\n"
            f"memory      {self.memory / 1e9:.3g} GB on each of {gpus} GPUs with {self.layout}: "
            f"{parts}, {OVERHEAD / 1e9:g} of CUDA (assumed); {fits} in {gpu.memory / 1e9:g} GB\n"
            f"cost        {digits(gpu_hours)} GPU-hours, {digits(gpu_hours / gpus / 24)} days, at "
            f"{UTILISATION:.0%} of {peak / 1e12:g} TFLOPS ({gpu.name}, {unit})"
        )


def digits(value: float) -> str:
    """Return a positive number with two digits at least."""
    return f"{value:,.{max(0, 1 - math.floor(math.log10(value)))}f}"


def forward_plan(
    net: nn.Module,
    sample: dict[str, Tensor],
    samples: int,
    at_once: int,
    precision: str | None,
    machine: Machine,
) -> Plan:
    """Return the plan of an evaluation, whose model has no trained parameters.

    Args:
        net, sample: the model and a batch of one sample, on the meta device.
        samples, at_once, machine: see Plan.
        precision: Composer's; None is half precision on GPUs.
    """
    half = precision != "fp32"
    flops = flops_per_sample(net, sample)
    cost = step_cost(net, sample, flops, at_once, half, checkpointing=False)
    weights, trained = count_weights(net)
    lasting = Layout().bytes_of(net, machine.gpus, 1)
    return Plan(machine, weights, trained, samples, at_once, half, cost, Layout(), lasting)


def training_plans(
    net: nn.Module, sample: dict[str, Tensor], config: dict[str, Any], machine: Machine
) -> list[Plan]:
    """Return the plans of a training: for its own layout, then for others up to one that fits.

    The others are ordered from the fastest. The plans count neither evaluations nor the
    augmentation on the device.

    Args:
        net, sample: the model and a batch of one sample, on the meta device.
        config: the blocks of the run.
    """
    data, trainer = config["data"], config["trainer"]
    batch = data["global_train_batch_size"]
    micro_batch = data.get("global_micro_batch_size") or batch
    at_once = max(1, micro_batch // machine.gpus)
    samples = training_samples(data, trainer["max_duration"])
    half = trainer.get("precision") != "fp32"
    weights, trained = count_weights(net)
    flops = flops_per_sample(net, sample)
    costs, plans = {}, []
    for layout in (layout_of(trainer), *FASTEST_FIRST):
        again = layout.checkpointing
        if again not in costs:
            costs[again] = step_cost(net, sample, flops, at_once, half, again)
        lasting = layout.bytes_of(net, machine.gpus, batch // micro_batch)
        counts = (weights, trained, samples, at_once, half)
        plans.append(Plan(machine, *counts, costs[again], layout, lasting))
        if len(plans) > 1 and plans[-1].fits:
            break
    return plans


def training_report(plans: list[Plan], batch_bytes: float) -> str:
    """Return the plan of a training, and the memory, cores and disks that it needs.

    Args:
        plans: see training_plans.
        batch_bytes: bytes that the workers of each GPU prepare ahead, in shared memory.
    """
    plan, best = plans[0], plans[-1]
    fastest = "no layout fits; lower the micro-batch, or set model.chunk_size"
    if best.fits:
        fastest = f"{best.layout}, {best.memory / 1e9:.3g} GB: {best.speed:,.0f} samples a second "
        fastest += f"and GPU; as set {plan.speed:,.0f}"
    cores = digits(plan.speed / PAIRS_PER_CORE)
    size = 4 * plan.weights + 8 * plan.trained
    written, uploaded = math.ceil(size / WRITE_SPEED), math.ceil(size / UPLOAD_SPEED)
    return (
        f"{plan}\n"
        f"fastest     {fastest}\n"
        f"loader      {cores} cores for each GPU, at {PAIRS_PER_CORE} pairs of images a second "
        f"and core; {batch_bytes / 1e9:.3g} GB of /dev/shm for each GPU\n"
        f"checkpoint  {size / 1e9:.3g} GB: {written} s to write and {uploaded} s to upload by one "
        "machine, at 1 and 0.5 GB/s (assumed); a spot instance has 30 s (GCP, Azure) or 120 s (AWS)"
    )


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


def split_plan_flags(arguments: list[str]) -> tuple[list[str], Machine | None]:
    """Return the other arguments, and the machine of --plan=GPUS and --gpu=NAME.

    A space may replace the =. Without values, they are 8 and a100. The machine is None without
    --plan.

    Raises:
        ValueError: not a positive number, or an unknown GPU.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", nargs="?", const="8")
    parser.add_argument("--gpu", nargs="?", const="a100")
    # argparse would take a file or key=value that follows a flag as the value of the flag.
    flags, others = parser.parse_known_args([text for text in arguments if not is_source(text)])
    others = [text for text in arguments if is_source(text)] + others
    gpu = flags.gpu or "a100"
    if gpu not in GPUS:
        raise ValueError(f"--gpu={gpu}: must be one of {', '.join(GPUS)}")
    if flags.plan is None:
        if flags.gpu:
            raise ValueError("--gpu: give --plan too")
        return others, None
    if not re.fullmatch(r"[1-9]\d*", flags.plan):
        raise ValueError(f"--plan={flags.plan}: must be a number of GPUs, as in --plan=8")
    return others, Machine(int(flags.plan), GPUS[gpu])


def training_samples(data: dict[str, Any], max_duration: str) -> int:
    """Return how many samples a training takes, in whole batches of each epoch."""
    batch = data["global_train_batch_size"]
    epoch = data.get("epoch_size")
    if not epoch:
        streams = data["streams"]
        epoch = sum(int(size_of(one["path"])[0] * (one.get("repeat") or 1)) for one in streams)
    epoch *= data.get("repeats", 1)
    steps = epoch // batch
    if not steps:
        limit = f"at most {epoch}, the samples of an epoch"
        raise ValueError(f"data.global_train_batch_size={batch}: must be {limit}")
    duration = ensure_time(max_duration, "ep")
    if duration.unit.value == "ep":
        return batch * steps * duration.value
    return batch * duration.value
