"""Count the operations and the memory of a step without data or GPUs.

    with torch.device("meta"):
        net = ViCMAE(embed_dim=1024, depth=24, num_heads=16)
        sample = {"views": torch.empty(1, 2, 3, 224, 224), "noise": torch.empty(1, 2, 196)}
    flops_per_sample(net, sample)                           # 430.9e9
    peak_bytes(net, sample, samples=128, half=True)         # 32.4e9

PyTorch runs the step on fake tensors, which have a shape but no memory. Nothing is derived by hand.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def fake_copy(net: nn.Module, checkpointing: bool) -> Iterator[nn.Module]:
    """Give a fake copy of a model; in this context, new tensors are fake, as if on the CPU.

    Args:
        checkpointing: let transformer blocks keep only their inputs, as FSDP's
            activation_checkpointing does.
    """
    net = copy.deepcopy(net).to("meta")
    with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        if checkpointing:
            wrap = partial(checkpoint_wrapper, preserve_rng_state=False)  # nothing random here
            apply_activation_checkpointing(net, wrap, lambda part: isinstance(part, Block))
        yield net


def fake_batch(sample: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return a fake batch of `count` samples, shaped as a batch of one sample."""
    batch = {}
    for name, tensor in sample.items():
        batch[name] = torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype)
    return batch


def run_step(net: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run a ComposerModel forward, and backward from its loss if it has trained parameters."""
    outputs = net(batch)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        return
    try:
        loss = net.loss(outputs, batch)
        total = loss["total"] if isinstance(loss, dict) else loss
    except DynamicOutputShapeException:  # a loss that selects pairs by their values
        tensors = [part for part in tree_leaves(outputs) if isinstance(part, Tensor)]
        total = sum(part.sum() for part in tensors if part.requires_grad)
    total.backward()


def flops_per_sample(
    net: nn.Module, sample: dict[str, Tensor], checkpointing: bool = False, chunked: bool = False
) -> float:
    """Return the floating-point operations of a sample's step, 2 for a multiply-add of matrices.

    Call it before a process group exists: fake tensors cannot be gathered over ranks.

    Args:
        net: the model, on any device; it is not changed.
        sample: a batch of one sample, on any device. Only its shapes are used.
        checkpointing, chunked: count what blocks, or ViCMAE's chunks, compute a second time.
    """
    count = 2  # BatchNorm needs two samples
    # The counter does not know the fused attention of a CPU; the plain one is two products.
    with fake_copy(net, checkpointing) as fake, sdpa_kernel(SDPBackend.MATH):
        fake.chunk_size = 1 if chunked else None
        with FlopCounterMode(display=False) as counter:
            run_step(fake, fake_batch(sample, count))
    return counter.get_total_flops() / count


class PeakMemory(TorchDispatchMode):
    """A context that adds up the bytes of the tensors that are made in it, until they are freed.

    Args:
        ignored: tensors made before, whose views are not counted.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self, ignored: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        # A tensor and its views share a storage.
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return outputs

    def count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def peak_bytes(
    net: nn.Module, sample: dict[str, Tensor], samples: int, half: bool, checkpointing: bool = False
) -> int:
    """Return the most bytes that a step holds at once, besides parameters and their gradients.

    They are the batch, activations with fused attention, and copies of weights in half precision,
    which FSDP would free earlier. An allocator holds more.

    Args:
        net, sample: see flops_per_sample.
        half: whether autocast runs matrix products in 16 bits.
        checkpointing: see fake_copy.
    """
    with fake_copy(net, checkpointing) as fake:
        for parameter in fake.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(drop_gradient)
        memory = PeakMemory([*fake.parameters(), *fake.buffers()])
        # Autocast's cache would hold every copy to the end, also of checkpointed blocks.
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)
        with memory, autocast:
            run_step(fake, fake_batch(sample, samples))
    return memory.peak
