"""Composer algorithms that are ours: blocks under `algorithms` in the YAML files; and all that those may name.

MomentumStep and GradientNorm are no blocks: every run has them.
"""

import torch
import torch.nn.functional as F
from composer import Algorithm, Event, Logger, State
from composer.algorithms import EMA, SAM, SWA, ChannelsLast, GradientClipping, LowPrecisionLayerNorm
from composer.callbacks import (
    EarlyStopper,
    LRMonitor,
    MemoryMonitor,
    MemorySnapshot,
    OOMObserver,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
    SystemMetricsMonitor,
    ThresholdStopper,
)
from composer.core import TimeUnit, ensure_time
from composer.loggers import (
    CometMLLogger,
    ConsoleLogger,
    FileLogger,
    MLFlowLogger,
    NeptuneLogger,
    SlackLogger,
    TensorboardLogger,
    WandBLogger,
)
from composer.utils import dist
from pydantic import PositiveInt
from torch import nn
from torch.distributed.tensor import DTensor

from evaluation.probes import KNN
from model import ViCMAE
from shards.views import PositiveFraction, UnitInterval
from training.config import Duration


def unwrapped(state: State) -> nn.Module:
    return getattr(state.model, "module", state.model)


def vicmae_of(algorithm: Algorithm, state: State) -> ViCMAE:
    """The model, of which an algorithm needs more than a classifier has."""
    net = unwrapped(state)
    if not isinstance(net, ViCMAE):
        raise ValueError(f"algorithms.{type(algorithm).__name__} is for pre-training; take it out")
    return net


class PartialDecoding(Algorithm):
    """Decode only a fraction `ratio` of the removed patches, drawn anew for each view: those with the smallest noise.

    Time and memory of the decoder shrink with it. The reconstruction loss is the mean over what is decoded: an unbiased
    estimate of that over all removed patches, but that the decoder predicts them from a smaller context. Source: the
    dual masking of VideoMAE v2, with a random choice for its fixed one.
    """

    def __init__(self, ratio: PositiveFraction = 0.5):
        self.ratio = ratio

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        net = vicmae_of(self, state)
        if net.decoder is None:
            raise ValueError("algorithms.PartialDecoding: model.mask is none; take it out")
        net.decode_ratio = self.ratio


class ContrastRamp(Algorithm):
    """Let the weight of the contrastive term rise from 0 to model.weight_contrast over a duration, such as 40ep (paper)."""

    def __init__(self, duration: Duration):
        self.duration = ensure_time(duration, "ep")
        if self.duration.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
            raise ValueError(
                f"algorithms.ContrastRamp.duration {duration} is not in epochs (ep) or steps (ba)"
            )

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        net = vicmae_of(self, state)
        if event == Event.INIT:
            if net.projector is None:
                raise ValueError("algorithms.ContrastRamp: model.contrast is none; take it out")
            return
        done = state.timestamp.get(self.duration.unit).value
        if self.duration.unit == TimeUnit.EPOCH:
            done += state.timestamp.batch_in_epoch.value / int(state.dataloader_len)
        net.ramp = min(1.0, done / self.duration.value)
        logger.log_metrics({"contrast_ramp": net.ramp})


class ProgressiveResizing(Algorithm):
    """Train on small views at first, then on growing, then on whole ones. Composer's idea, exact for grids of patches.

    Args:
        initial_scale: of the first views' sides.
        delay_fraction, finetune_fraction: of the training, at the first and at the full size.
        size_increment: pixels; a multiple of model.patch_size.

    The training is measured in the unit of trainer.max_duration: by an epoch at a time, if it is given in epochs.

    Raises:
        ValueError: fractions that leave no time to grow, sizes that are no number of patches, or too few to mask.
    """

    def __init__(
        self,
        initial_scale: UnitInterval = 0.5,
        delay_fraction: UnitInterval = 0.5,
        finetune_fraction: UnitInterval = 0.2,
        size_increment: PositiveInt = 16,
    ):
        if delay_fraction + finetune_fraction >= 1:
            raise ValueError(
                "algorithms.ProgressiveResizing: delay_fraction + finetune_fraction must be less than 1"
            )
        self.initial_scale, self.size_increment = initial_scale, size_increment
        self.delay_fraction, self.finetune_fraction = delay_fraction, finetune_fraction

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.AFTER_DATALOADER)

    def side(self, full: int, elapsed: float) -> int:
        """Pixels of the views' sides after a fraction `elapsed` of the training."""
        grown = (elapsed - self.delay_fraction) / (1 - self.delay_fraction - self.finetune_fraction)
        if grown >= 1:
            return full
        scale = self.initial_scale + (1 - self.initial_scale) * max(0.0, grown)
        return min(full, round(full * scale / self.size_increment) * self.size_increment)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        net = vicmae_of(self, state)
        full, patch_size = net.encoder.img_size, net.encoder.patch_size
        if event == Event.INIT:
            kept = int((self.side(full, 0.0) // patch_size) ** 2 * (1 - net.mask_ratio))
            if self.size_increment % patch_size or kept < 1:
                raise ValueError(
                    f"algorithms.ProgressiveResizing: size_increment {self.size_increment} must be a multiple of "
                    f"model.patch_size {patch_size}, and initial_scale {self.initial_scale} leave patches to keep"
                )
            return
        side = self.side(full, float(state.get_elapsed_duration()))
        if side < full:
            views = state.device.tensor_to_device(state.batch["views"])  # (B, V, [T,] H, W, 3)
            small = views.flatten(0, -4).permute(0, 3, 1, 2).float()  # (B * V * T, 3, H, W)
            small = (
                F.interpolate(small, (side, side), mode="bilinear", antialias=True)
                .round()
                .to(views.dtype)
            )
            state.batch = state.batch | {
                "views": small.permute(0, 2, 3, 1).unflatten(0, views.shape[:-3])
            }
        logger.log_metrics({"progressive_resizing/width": side})


class LayerFreezing(Algorithm):
    """Freeze one layer after another, from the first, as training goes on; the last layer, a classifier's head, never.

    Args:
        freeze_start: fraction of the training before the first is frozen.
        freeze_level: fraction of the layers that are frozen at the end.

    Composer's takes frozen weights out of the optimizer, and then no checkpoint can be written. Here they have no gradient
    and AdamW passes over them. What is frozen depends on how far the training is alone, so that a resumed run goes on alike.
    """

    find_unused_parameters = True  # by DDP, which still knows the frozen ones

    def __init__(self, freeze_start: UnitInterval = 0.5, freeze_level: UnitInterval = 1.0):
        self.freeze_start, self.freeze_level = freeze_start, freeze_level

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        elapsed = float(state.get_elapsed_duration())
        level = (
            self.freeze_level
            * max(0.0, elapsed - self.freeze_start)
            / max(1 - self.freeze_start, 1e-9)
        )
        leaves = (module for module in state.model.modules() if not any(module.children()))
        layers = [module for module in leaves if next(module.parameters(), None) is not None]
        count = int(level * len(layers[:-1]))
        for layer in layers[:count]:
            layer.requires_grad_(False)
            layer.zero_grad()
        logger.log_metrics({"layer_freezing/layers_frozen": count})


class MomentumStep(Algorithm):
    """Lets MoCo's second encoder follow the first one: once a step, however many passes it is made of."""

    def match(self, event: Event, state: State) -> bool:
        return (
            event == Event.BATCH_START and getattr(unwrapped(state), "momentum", None) is not None
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        net = unwrapped(state)
        net.momentum.follow(net.encoder, net.projector)


class GradientNorm(Algorithm):
    """Logs the norm of the gradient before it is clipped; on gloo, makes FSDP's sum over the ranks a mean first."""

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        gradients = [
            parameter.grad for parameter in state.model.parameters() if parameter.grad is not None
        ]
        if state.fsdp_enabled and torch.distributed.get_backend() == "gloo":
            torch._foreach_div_(
                gradients, dist.get_world_size()
            )  # there FSDP's mean over the ranks is their sum
        norm = torch.nn.utils.get_total_norm(gradients)
        logger.log_metrics(
            {"gradient_norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm)}
        )


# What a YAML file may name. Of Composer's, that is what can do something with these models and batches.
ALGORITHMS = (ChannelsLast, EMA, GradientClipping, LowPrecisionLayerNorm, SAM, SWA)


ALGORITHMS += (ContrastRamp, LayerFreezing, PartialDecoding, ProgressiveResizing)


CALLBACKS = (
    EarlyStopper,
    LRMonitor,
    MemoryMonitor,
    MemorySnapshot,
    OOMObserver,
    OptimizerMonitor,
    RuntimeEstimator,
)


CALLBACKS += (SpeedMonitor, SystemMetricsMonitor, ThresholdStopper, KNN)


LOGGERS = (
    CometMLLogger,
    ConsoleLogger,
    FileLogger,
    MLFlowLogger,
    NeptuneLogger,
    SlackLogger,
    TensorboardLogger,
    WandBLogger,
)
