"""A pre-training step with torch alone, for bench_gpu.py: of model.py or of plain_vicmae.py.

It needs torch, torchvision and timm. The libraries of a Trainer may be absent.
"""

import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import yaml
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).parent.parent
HAS_COMPOSER = importlib.util.find_spec("composer") is not None
# What model.py imports of the libraries of a Trainer. Of these names, a step uses only the base
# class; pydantic's check arguments.
STAND_INS = {
    "composer": {"ComposerModel": nn.Module},
    "pydantic": {
        "Field": lambda **limits: None,
        "NonNegativeFloat": float,
        "PositiveFloat": float,
        "PositiveInt": int,
        "validate_call": lambda function: function,
    },
    "torchmetrics": {"Metric": object},
    "torchmetrics.classification": dict.fromkeys(
        ["MulticlassAccuracy", "MulticlassConfusionMatrix"], object
    ),
}


def stand_in_for_missing_libraries() -> None:
    """Put modules with the names of STAND_INS in the place of libraries that are not installed."""
    missing = [name for name in STAND_INS if not importlib.util.find_spec(name.split(".")[0])]
    for name in missing:
        module = ModuleType(name)
        vars(module).update(STAND_INS[name])
        sys.modules[name] = module


if not HAS_COMPOSER:
    stand_in_for_missing_libraries()

from benchmarks.plain_vicmae import PlainViCMAE  # noqa: E402
from model import Batch, ViCMAE  # noqa: E402
from shards.augment import PARAMETERS, augment_batch  # noqa: E402

# Least and greatest value of each number that augments a view, as in yamls/vitl.yaml.
AUGMENTATION = {
    "flip": (0, 0),
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.8, 1.2),
    "hue": (-0.1, 0.1),
    "grey": (0, 0),
    "blur_sigma": (0.1, 2.0),
    "solarise": (0, 0),
}
TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 1,
    "num_heads": 4,
    "decoder_embed_dim": 48,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
    "projector_hidden_dim": 64,
    "projector_out_dim": 32,
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
ITEM = "aten::_local_scalar_dense"  # .item(), float() and bool() of a tensor
WINDOW = "measured steps"


@dataclass(frozen=True)
class Case:
    """A way to run a step of a model.

    Args:
        size: S, B, L or H, or tiny.
        pairs: of a step on each rank.
        fsdp: whether FSDP2 shards the model, or DDP copies it. On one rank, DDP is no wrapper.
    """

    size: str
    pairs: int
    compiled: bool = False
    checkpointing: bool = False
    fsdp: bool = False

    @property
    def model(self) -> dict:
        """Return the arguments of ViCMAE."""
        if self.size == "tiny":
            return TINY
        return yaml.safe_load(recipe_of(self.size).read_text())["model"]

    @property
    def backend(self) -> str:
        """Return the backend of torch.compile: the tiny size is traced, but not compiled."""
        return "eager" if self.size == "tiny" else "inductor"


def recipe_of(size: str) -> Path:
    """Return the YAML file of a size; the tiny size changes the sizes of S."""
    return ROOT / "yamls" / f"vit{'s' if size == 'tiny' else size.lower()}.yaml"


def local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_batch(model: dict, pairs: int) -> Batch:
    """Return a batch as the loader yields it, in pinned memory where there is a GPU."""
    generator = torch.Generator().manual_seed(0)
    side, patches = model["img_size"], (model["img_size"] // model["patch_size"]) ** 2
    shape = (pairs, 2, side, side, 3)
    least, greatest = torch.tensor([AUGMENTATION[name] for name in PARAMETERS]).T
    uniform = torch.rand(pairs, 2, len(PARAMETERS), generator=generator)
    augment = least + (greatest - least) * uniform
    augment[:, 1, PARAMETERS.index("blur_sigma")] = 0  # only first views are blurred
    augment[::2, :, PARAMETERS.index("flip")] = 1
    batch = {
        "views": torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        "augment": augment,
        "noise": torch.rand(pairs, 2, patches, generator=generator),
    }
    if torch.cuda.is_available():
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def checkpoint_blocks(net: nn.Module) -> None:
    """Make each transformer block keep only its input for the backward pass."""
    wrap = partial(checkpoint_wrapper, preserve_rng_state=False)  # nothing in it is random
    apply_activation_checkpointing(net, wrap, is_block)


def shard(net: nn.Module) -> None:
    """Shard each block, each child and the model with FSDP2, as Composer does."""
    for block in [module for module in net.modules() if is_block(module)]:
        fully_shard(block)
    for child in net.children():
        fully_shard(child)
    fully_shard(net)


class Meter:
    """Times the steps of a training, then traces some. Call begin and end around each step.

    Args:
        warm_up: first steps, in which memory is reserved and code is compiled.
        timed: steps that are timed together.
        traced: last steps, of which the profiler records the host's waits and the GPU's work.

    Attributes:
        first: seconds of the first step.
        seconds: of a timed step, on average.
        peak: most bytes of GPU memory that tensors took up to the last timed step; None on a CPU.
        trace: see read_trace.
    """

    def __init__(self, warm_up: int, timed: int, traced: int):
        self.warm_up, self.timed, self.traced = warm_up, timed, traced
        self.done = 0
        self.first = self.seconds = 0.0
        self.peak, self.trace = None, {}
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.reset_peak_memory_stats()
        self.profiler = profile(activities=activities)
        self.window = record_function(WINDOW)

    @property
    def steps(self) -> int:
        return self.warm_up + self.timed + self.traced

    def begin(self) -> None:
        if self.done in (0, self.warm_up):
            synchronise()
            self.began = time.perf_counter()
        if self.done == self.warm_up + self.timed:
            self.profiler.start()
            self.window.__enter__()

    def end(self) -> None:
        self.done += 1
        if self.done in (1, self.warm_up + self.timed):
            synchronise()
            seconds = time.perf_counter() - self.began
            if self.done == 1:
                self.first = seconds
            else:
                self.seconds = seconds / self.timed
                self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        if self.done == self.steps:
            self.window.__exit__(None, None, None)
            self.profiler.stop()
            self.trace = read_trace(self.profiler.events(), self.traced)


def read_trace(events: Iterable, steps: int) -> dict[str, float | None]:
    """Return a step's host synchronisations, its .item() calls, and the idle share of the GPU.

    The share is an upper bound, since the profiler slows the host. It is None on a CPU.
    """
    events = list(events)
    spans = {event.device_type: event.time_range for event in events if event.name == WINDOW}
    window = spans[DeviceType.CPU]
    names, kernels = [], []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.device_type != DeviceType.CPU:
            # FSDP and compiled code annotate spans of time, in which a GPU may be idle.
            if not event.is_user_annotation and not event.name.startswith(("Memcpy", "Memset")):
                kernels.append(span)
        elif window.start <= span[0] <= window.end:
            names.append(event.name)
    return {
        "synchronisations": sum(name in WAITS for name in names) / steps,
        "items": names.count(ITEM) / steps,
        "idle": idle_share(kernels),
    }


def idle_share(spans: list[tuple[float, float]]) -> float | None:
    """Return the share of the time from the first begin to the last end that no span covers."""
    if not spans:
        return None
    spans = sorted(spans)
    begin = covered_to = spans[0][0]
    idle = 0.0
    for start, end in spans:
        idle += max(0.0, start - covered_to)
        covered_to = max(covered_to, end)
    return idle / (covered_to - begin)


def train(
    net: nn.Module,
    loss: Callable[[Batch], Tensor],
    batch: Batch,
    meter: Meter,
    device: torch.device,
) -> None:
    """Train for the steps of a meter on one batch, under autocast to bfloat16."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)
    for _ in range(meter.steps):
        meter.begin()
        with torch.no_grad():
            augmented = augment_batch(to_device(batch, device))
        with torch.autocast(device.type, torch.bfloat16):
            total = loss(augmented)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.end()


def our_loss(net: nn.Module, model: ViCMAE, batch: Batch) -> Tensor:
    """Return the loss of model.py; `net` is the model, or its wrapper."""
    return model.loss(net(batch), batch)["total"]


def plain_loss(net: nn.Module, batch: Batch) -> Tensor:
    return net(batch["views"], batch["noise"])


def measure_ours(case: Case, meter: Meter) -> None:
    """Train model.py in a loop of torch alone."""
    torch.manual_seed(0)
    device = local_device()
    model = net = ViCMAE(**case.model).to(device)
    if case.checkpointing:
        checkpoint_blocks(model)
    if case.fsdp:
        shard(model)
    elif dist.is_initialized() and dist.get_world_size() > 1:
        net = DistributedDataParallel(model)
    if case.compiled:
        net.forward = torch.compile(net.forward, backend=case.backend)
    batch = random_batch(case.model, case.pairs)
    train(net, partial(our_loss, net, model), batch, meter, device)


def measure_plain(case: Case, meter: Meter) -> None:
    """Train plain_vicmae.py in the same loop."""
    torch.manual_seed(0)
    device = local_device()
    net = PlainViCMAE(ViCMAE(**case.model), fused=True).to(device)
    if case.compiled:
        net.forward = torch.compile(net.forward, backend=case.backend)
    batch = random_batch(case.model, case.pairs)
    train(net, partial(plain_loss, net), batch, meter, device)


def augmentation_seconds(case: Case, times: int) -> float:
    """Return the seconds that the augmentation of a batch takes, on the device."""
    batch = to_device(random_batch(case.model, case.pairs), local_device())
    for _ in range(2):  # the first may compile
        augment_batch(batch)
    synchronise()
    begin = time.perf_counter()
    for _ in range(times):
        augment_batch(batch)
    synchronise()
    return (time.perf_counter() - begin) / times


def free_memory() -> None:
    """Give back what the last model has left: its tensors and compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
