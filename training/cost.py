"""Count the operations and the memory of a step without data, GPUs or memory.

    with shapes_only():
        net = ViCMAE(embed_dim=1024, depth=24, num_heads=16)
        sample = {"views": torch.empty(1, 2, 3, 224, 224), "noise": torch.empty(1, 2, 196)}
        flops_per_sample(net, sample)                               # 430.9e9
        peak_bytes(net, batch_of(sample, 128), half=True)           # 32.4e9

PyTorch runs the step on fake tensors, which have a shape but no memory. Nothing is derived by hand.
"""

import weakref
from collections.abc import Iterable
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


def shapes_only() -> FakeTensorMode:
    """Return a context in which new tensors and modules have shapes, but no memory or values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def batch_of(sample: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return an uninitialised batch of `count` samples with the shapes of a batch of one."""
    return {name: tensor.new_empty(count, *tensor.shape[1:]) for name, tensor in sample.items()}


def run_step(net: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run a ComposerModel forward, and backward from its loss if it has trained parameters."""
    outputs = net(batch)
    if any(parameter.requires_grad for parameter in net.parameters()):
        loss = net.loss(outputs, batch)
        total = loss["total"] if isinstance(loss, dict) else loss
        total.backward()


def flops_per_sample(net: nn.Module, sample: dict[str, Tensor]) -> float:
    """Return the floating-point operations of a sample's step, 2 for a multiply-add of matrices.

    Call it before the process group is there: a model that gathers over ranks cannot here.

    Args:
        net, sample: the model and a batch of one sample, made in shapes_only.
    """
    count = 2  # BatchNorm needs two samples
    # The counter does not know the fused attention of a CPU; the plain one is two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_step(net, batch_of(sample, count))
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
        self.storages = WeakIdKeyDictionary()  # a tensor and its views share a storage
        for tensor in ignored:
            self.storages[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return outputs

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, if it is a new one, until it is freed."""
        if storage not in self.storages:
            size = storage.nbytes()
            self.storages[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, size)

    def remove(self, size: int) -> None:
        self.live -= size


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def peak_bytes(net: nn.Module, batch: dict[str, Tensor], half: bool) -> int:
    """Return the most bytes that a step holds at once, besides parameters and their gradients.

    That is the batch, activations with fused attention, and copies of weights in half precision.
    FSDP frees these copies earlier, and an allocator holds more: both are not counted.

    Args:
        net, batch: made in shapes_only. The model keeps hooks; it is not for training.
        half: whether autocast runs matrix products in 16 bits.
    """
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    memory = PeakMemory([*net.parameters(), *net.buffers()])
    # Autocast's cache would hold every copy to the end, even of a block that is checkpointed.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)
    with memory, autocast:
        run_step(net, {name: torch.empty_like(tensor) for name, tensor in batch.items()})
    return memory.peak


def checkpoint_blocks(net: nn.Module) -> None:
    """Let each transformer block keep only its input and compute the rest again, as Composer does."""
    wrapper = partial(checkpoint_wrapper, preserve_rng_state=False)  # fake tensors draw nothing
    apply_activation_checkpointing(net, wrapper, check_fn=lambda part: isinstance(part, Block))
