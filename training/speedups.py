"""Our Composer algorithms for pre-training: cheaper decoding, growing views, ramps.

    composer pretrain.py yamls/vitl.yaml yamls/vitl_fast.yaml

Each class is a block under `algorithms` of a YAML file.
"""

import torch
import torch.nn.functional as F
from composer import Algorithm, Event, Logger, State
from composer.core import TimeUnit, ensure_time
from pydantic import PositiveInt
from torch import nn

from model import Batch, ViCMAE
from shards.views import PositiveFraction, UnitInterval
from training.config import Duration


def unwrapped(state: State) -> nn.Module:
    """Return the model without DDP's wrapper."""
    return getattr(state.model, "module", state.model)


def pretraining_model(algorithm: Algorithm, state: State) -> ViCMAE:
    """Return the model that is pre-trained.

    Raises:
        ValueError: the model is a classifier.
    """
    model = unwrapped(state)
    if not isinstance(model, ViCMAE):
        name = type(algorithm).__name__
        raise ValueError(f"algorithms.{name}: works in pre-training only; remove it")
    return model


class PartialDecoding(Algorithm):
    """Decodes only a fraction of the removed patches: the patches with the smallest noise.

    Time and memory of the decoder shrink. The loss is the mean over the decoded patches: an
    unbiased estimate of the mean over all removed patches, except that the decoder sees less
    context. Source: the dual masking of VideoMAE v2, with a random choice in place of its fixed
    pattern.

    Args:
        ratio: fraction of the removed patches that is decoded.
    """

    def __init__(self, ratio: PositiveFraction = 0.5):
        self.ratio = ratio

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model = pretraining_model(self, state)
        if model.decoder is None:
            raise ValueError("algorithms.PartialDecoding: this method has no decoder; remove it")
        model.decode_ratio = self.ratio


class ContrastRamp(Algorithm):
    """Raises the weight of the contrastive term from 0 to model.weight_contrast.

    Args:
        duration: length of the ramp, in epochs or steps, such as 40ep (paper).
    """

    def __init__(self, duration: Duration):
        self.duration = ensure_time(duration, "ep")

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model = pretraining_model(self, state)
        if event == Event.INIT:
            if model.projector is None:
                message = "this method has no contrastive term; remove it"
                raise ValueError(f"algorithms.ContrastRamp: {message}")
            return
        done = state.timestamp.get(self.duration.unit).value
        if self.duration.unit == TimeUnit.EPOCH:
            done += state.timestamp.batch_in_epoch.value / int(state.dataloader_len)
        model.ramp = min(1.0, done / self.duration.value)
        logger.log_metrics({"contrast_ramp": model.ramp})


class FreezeEncoder(Algorithm):
    """Trains only the other parts at first, while heads that began at random learn.

    The optimiser skips weights without a gradient. The step costs no less.

    Args:
        duration: epochs or steps, such as 2ep.
    """

    def __init__(self, duration: Duration):
        self.duration = ensure_time(duration, "ep")

    def match(self, event: Event, state: State) -> bool:
        passed = state.timestamp.get(self.duration.unit)
        return event == Event.AFTER_TRAIN_BATCH and passed < self.duration

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        optimizer_state = state.optimizers[0].state
        for weight in pretraining_model(self, state).encoder.parameters():
            if weight.grad is not None and weight not in optimizer_state:
                # A checkpoint without the state of a weight could not be loaded.
                step = torch.zeros((), device=weight.device)
                moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                optimizer_state[weight] = {"step": step, **moments}
            weight.grad = None


def shrink(batch: Batch, side: int) -> Batch:
    """Return a batch with its views (B, V, [T,] H, W, 3) reduced to side x side pixels."""
    views = batch["views"]
    small = views.flatten(0, -4).permute(0, 3, 1, 2).float()  # (B * V * T, 3, H, W)
    small = F.interpolate(small, (side, side), mode="bilinear", antialias=True)
    small = small.round().to(views.dtype).permute(0, 2, 3, 1)
    return batch | {"views": small.unflatten(0, views.shape[:-3])}


class ProgressiveResizing(Algorithm):
    """Trains on small views first, then on growing views, then on full views.

    Composer's algorithm of this name takes one image a sample and resizes by nearest neighbour. The
    progress of the training is measured in the unit of trainer.max_duration.

    Args:
        initial_scale: side of the first views, as a fraction of img_size.
        delay_fraction, finetune_fraction: fractions of the training at the first and at full size.
        size_increment: pixels; a multiple of model.patch_size.

    Raises:
        ValueError: fractions that leave no time to grow, or sizes that are no number of patches.
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
                f"algorithms.ProgressiveResizing: delay_fraction={delay_fraction} + "
                f"finetune_fraction={finetune_fraction} must be less than 1"
            )
        self.initial_scale, self.size_increment = initial_scale, size_increment
        self.delay_fraction, self.finetune_fraction = delay_fraction, finetune_fraction

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.AFTER_DATALOADER)

    def side(self, full: int, elapsed: float) -> int:
        """Return the side of the views in pixels after a fraction `elapsed` of the training."""
        growing = 1 - self.delay_fraction - self.finetune_fraction
        grown = (elapsed - self.delay_fraction) / growing
        if grown >= 1:
            return full
        scale = self.initial_scale + (1 - self.initial_scale) * max(0.0, grown)
        return min(full, round(full * scale / self.size_increment) * self.size_increment)

    def check(self, model: ViCMAE) -> None:
        patch_size = model.encoder.patch_size
        patches = (self.side(model.encoder.img_size, 0.0) // patch_size) ** 2
        visible = model.masking(torch.zeros(1, patches))[0].shape[1]
        if self.size_increment % patch_size or visible < 1:
            raise ValueError(
                f"algorithms.ProgressiveResizing: size_increment={self.size_increment} must be a "
                f"multiple of model.patch_size={patch_size}, and "
                f"initial_scale={self.initial_scale} must leave visible patches"
            )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model = pretraining_model(self, state)
        if event == Event.INIT:
            self.check(model)
            return
        full = model.encoder.img_size
        side = self.side(full, float(state.get_elapsed_duration()))
        if side < full:
            batch = state.device.batch_to_device(state.batch)
            if isinstance(batch, list):  # of micro-batches
                state.batch = [shrink(part, side) for part in batch]
            else:
                state.batch = shrink(batch, side)
        logger.log_metrics({"progressive_resizing/width": side})
