"""FSDP2: its settings in a YAML file, and its reduction of gradients.

trainer:
  parallelism_config:
    fsdp: {}          # all defaults
"""

from collections.abc import Collection
from typing import Any

import torch
from composer import Algorithm, Callback, Event, Logger, State
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from shards.loader import samples_in

KEY = "trainer.parallelism_config"


def fsdp_settings(trainer: dict[str, Any]) -> dict[str, Any] | None:
    """Return the block fsdp of a block `trainer` with our defaults, None without FSDP.

    Composer's default of `mixed_precision`, DEFAULT, casts whole modules to half precision: the
    residual stream, positions and norms too. FULL leaves the choice to autocast, as DDP does.

    Raises:
        ValueError: another kind of parallelism.
    """
    parallelism = trainer.get("parallelism_config") or {}
    if unknown := parallelism.keys() - {"fsdp"}:
        raise ValueError(f"{KEY}.{min(unknown)}: unknown key; use fsdp")
    fsdp = parallelism.get("fsdp")
    return None if fsdp is None else {"mixed_precision": "FULL"} | fsdp


def fsdp_config(
    trainer: dict[str, Any], algorithms: Collection[str], model: nn.Module
) -> FSDP2Config | None:
    """Return Composer's settings of FSDP2 for a block `trainer`, None without FSDP.

    Args:
        algorithms: names of the run's algorithms.

    Raises:
        ValueError: unknown keys, or a combination that FSDP does not support.
    """
    settings = fsdp_settings(trainer)
    if settings is None:
        return None
    if "EMA" in algorithms:
        # Composer keeps each rank's share of the averages, but writes only rank 0's.
        raise ValueError(f"algorithms.EMA: cannot resume with {KEY}.fsdp; remove one of them")
    if not getattr(model, "supports_fsdp", True):
        name = type(model).__name__
        raise ValueError(f"method {name}: does not work with {KEY}.fsdp; remove it")
    try:
        return FSDP2Config(**settings)
    except TypeError as error:
        raise ValueError(f"{KEY}.fsdp: {error}") from error


def gradients_of(state: State) -> list[Tensor]:
    return [weight.grad for weight in state.model.parameters() if weight.grad is not None]


class OneReduction(Callback):
    """Reduces FSDP's gradients over the ranks in the last micro-batch of a step only.

    Composer does so with DDP, but lets FSDP2 reduce after each micro-batch. In return, each rank
    holds the gradients of all weights until the last micro-batch.
    """

    def __init__(self):
        self.remaining = 0  # micro-batches of the step

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self.remaining = -(-samples_in(state.batch) // state.device_train_microbatch_size)

    def before_backward(self, state: State, logger: Logger) -> None:
        self.remaining -= 1
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(self.remaining == 0, recurse=False)


class GlooGradientMean(Algorithm):
    """Divides the gradients by the number of ranks: on gloo, FSDP2's mean over ranks is a sum."""

    def match(self, event: Event, state: State) -> bool:
        if event != Event.AFTER_TRAIN_BATCH or not state.fsdp_enabled:
            return False
        return torch.distributed.get_backend() == "gloo"

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        torch._foreach_div_(gradients_of(state), dist.get_world_size())
