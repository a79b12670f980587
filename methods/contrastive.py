"""Contrastive methods: SimCLR, MoCo v2, FaceNet's triplets, SimSiam and VICReg.

    composer pretrain.py yamls/demo.yaml yamls/methods/simclr.yaml

Each class replaces the contrastive term of ViC-MAE. By default views are not masked and there is no
decoder. With `masked: true` the views are masked and reconstructed as in ViC-MAE: the ablation of
the contrastive term (yamls/ablations/contrast.yaml).
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from composer import Algorithm, Event, Logger, State
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from model import (
    Batch,
    Head,
    ProperFraction,
    Tensors,
    ViCMAE,
    all_gather,
    at_least_fp32,
    feature_std,
    info_nce,
    pool_tokens,
    unit_rows,
)


class SimCLR(ViCMAE):
    """InfoNCE between two views, unmasked by default (Chen et al. 2020); the base of the others.

    Args:
        masked: mask and reconstruct the views as ViC-MAE does.
        projector_layers: linear layers of the projector; 3 as in ViC-MAE, or 2 as published.
        vicmae: arguments of ViCMAE. The sizes of the decoder have no effect if masked is false.
    """

    def __init__(self, *, masked: bool = False, projector_layers: Literal[2, 3] = 3, **vicmae):
        super().__init__(**vicmae)
        if projector_layers == 2:
            first, *_, last = self.projector
            self.projector = Head(first.in_features, first.out_features, last.out_features)
        if not masked:
            self.decoder = None
            if not self.weight_contrast:
                raise ValueError(
                    "weight_contrast=0: must be positive, since nothing else is learnt"
                )

    def reconstruct(self, views: Tensor, noise: Tensor) -> Tensors:
        """Return the features of unmasked views; if masked, all that ViC-MAE returns."""
        if self.decoder is not None:
            return super().reconstruct(views, noise)
        return {"features": pool_tokens(self.encoder(views), self.pool)}

    def loss(self, outputs: Tensors, batch: Batch) -> Tensors:
        """Return total = ramp * weight_contrast * contrastive; if masked, the loss of ViC-MAE."""
        if self.decoder is not None:
            return super().loss(outputs, batch)
        with torch.autocast(outputs["features"].device.type, enabled=False):
            contrastive, accuracy = self.contrastive_term(outputs)
        return {
            "total": self.ramp * self.weight_contrast * contrastive,
            "accuracy": accuracy,
            "contrastive": contrastive.detach(),
            "feature_std": feature_std(outputs["features"]),
        }


def moco_info_nce(
    predictions: Tensor, targets: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE with negatives from a queue, and the fraction of matched views.

    Args:
        predictions, targets: (B, 2, out).
        queue: (Q, out), normalised.
        temperature: divides the cosine similarities, > 0.
    """
    assert predictions.shape[1] == 2, "MoCo pairs the two views of a sample"
    p, t = unit_rows(predictions), unit_rows(targets)  # (2B, out)
    positive = (p * t.roll(len(p) // 2, dims=0)).sum(dim=1, keepdim=True)  # (2B, 1)
    logits = torch.cat([positive, p @ at_least_fp32(queue).T], dim=1)  # (2B, 1 + Q)
    # A strict comparison: if all features are equal, no view finds its partner.
    matched = logits[:, 0] > logits[:, 1:].amax(dim=1)
    partner = torch.zeros(len(p), dtype=torch.long, device=p.device)  # the first column
    return F.cross_entropy(logits / temperature, partner), matched.float().mean()


class MomentumEncoder(nn.Module):
    """Moving averages of the encoder and the projector, and the queue of their latest projections.

    Args:
        queue_size: number of projections kept.
    """

    def __init__(self, encoder: nn.Module, projector: Head, queue_size: int):
        super().__init__()
        self.encoder, self.projector = copy.deepcopy(encoder), copy.deepcopy(projector)
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        queue = torch.randn(queue_size, projector[-1].out_features, generator=generator)
        self.register_buffer("queue", F.normalize(queue, dim=-1))

    @torch.no_grad()
    def update(self, encoder: nn.Module, projector: Head, momentum: float) -> None:
        """Move the averages towards the current weights by a share of 1 - momentum."""
        for average, current in ((self.encoder, encoder), (self.projector, projector)):
            pairs = zip(average.parameters(), current.parameters(), strict=True)
            for average_weight, weight in pairs:
                average_weight.lerp_(weight, 1 - momentum)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest projections in the queue by keys (B, V, out)."""
        newest = unit_rows(keys).to(self.queue.dtype)
        self.queue.copy_(torch.cat([newest, self.queue])[: len(self.queue)])


class MomentumStep(Algorithm):
    """Updates MoCo's moving averages once a step, however many micro-batches the step has."""

    def __init__(self, model: "MoCoV2"):
        self.model = model

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model = self.model
        # The first average is the weights themselves, which may have been loaded after __init__.
        kept = model.momentum_share if state.timestamp.batch.value else 0.0
        model.momentum.update(model.encoder, model.projector, kept)


class MoCoV2(SimCLR):
    """MoCo v2 (Chen et al. 2020): the other view is encoded by a moving average of the encoder.

    Both views are queries. Not possible with FSDP, which shards the weights that are averaged.

    Args:
        momentum: share of the average that is kept in a step, in [0, 1).
        queue_size: number of earlier projections that serve as negatives.
    """

    supports_fsdp = False

    def __init__(
        self, *, momentum: ProperFraction = 0.999, queue_size: PositiveInt = 65536, **simclr
    ):
        super().__init__(**simclr)
        self.momentum_share = momentum
        # The name `momentum` is in the checkpoints of earlier versions.
        self.momentum = MomentumEncoder(self.encoder, self.projector, queue_size)

    def algorithms(self) -> list[Algorithm]:
        """Return the Composer algorithms that training this model needs."""
        return [MomentumStep(self)]

    def project(self, features: Tensor, batch: Batch) -> Tensors:
        """Return predictions, and targets and queue of the momentum encoder, without gradient."""
        projected = super().project(features, batch)
        with torch.no_grad():
            views, noise = self.flatten_views(batch)
            ids_keep = self.masking(noise)[0] if self.decoder is not None else None
            tokens = self.momentum.encoder(views, ids_keep)
            keys = all_gather(pool_tokens(tokens, self.pool).unflatten(0, features.shape[:2]))
            keys = self.momentum.projector(keys)
            queue = self.momentum.queue.clone()
            if self.training:
                self.momentum.push(keys)
        return {"predictions": projected["predictions"], "targets": keys, "queue": queue}

    def contrastive_term(self, outputs: Tensors) -> tuple[Tensor, Tensor]:
        predictions, targets = outputs["predictions"], outputs["targets"]
        return moco_info_nce(predictions, targets, outputs["queue"], self.temperature)


def triplet_loss(
    predictions: Tensor, labels: Tensor | None, margin: float
) -> tuple[Tensor, Tensor]:
    """Return FaceNet's loss with semi-hard negatives, and the fraction of pairs in the right order.

    The loss is the mean of [|a - p|^2 - |a - n|^2 + margin]+ over all pairs of an anchor a and a
    positive p. The negative n is the nearest beyond the positive; if there is none, the furthest.
    The loss is 0 if no pair has a negative. A pair is in the right order if p is nearer than n.

    Args:
        predictions: (B, V, out).
        labels: (B,), -1 = unknown. Samples of one label are positives of each other. None:
            positives are the views of one sample.
        margin: in squared distance of unit vectors.
    """
    p = unit_rows(predictions)
    B = len(predictions)
    own = -1 - torch.arange(B, device=p.device)  # a label of its own for a sample without one
    identity = own if labels is None else torch.where(labels < 0, own, labels)
    identity = identity.repeat(len(p) // B)  # (V * B,)
    distance = 2 - 2 * p @ p.T  # (V * B, V * B), of unit vectors; rows are anchors
    alike = identity[:, None] == identity
    itself = torch.eye(len(p), dtype=torch.bool, device=p.device)
    positive = alike & ~itself & ~alike.all(dim=1)
    # For all pairs of an anchor and another row, whether positive or not: a choice of the pairs
    # would make the host wait for a GPU.
    nearest = distance.detach().masked_fill(alike, float("inf")).sort(dim=1)
    beyond = torch.searchsorted(nearest.values, distance.detach(), right=True)  # (V * B, V * B)
    last = (~alike).sum(dim=1, keepdim=True) - 1  # the furthest negative
    to_negative = distance.gather(1, nearest.indices.gather(1, beyond.minimum(last).clamp(min=0)))
    count = positive.sum().clamp(min=1)
    loss = (F.relu(distance - to_negative + margin) * positive).sum() / count
    return loss, ((distance < to_negative) & positive).sum() / count


class Triplet(SimCLR):
    """FaceNet's triplets (Schroff et al. 2015).

    Args:
        positives: "view": the other view of a sample; "label": the samples of its label as well.
        margin: in squared distance of unit vectors.
    """

    def __init__(
        self,
        *,
        positives: Literal["view", "label"] = "view",
        margin: PositiveFloat = 0.2,
        **simclr,
    ):
        super().__init__(**simclr)
        self.needs_labels = positives == "label"
        self.margin = margin

    def project(self, features: Tensor, batch: Batch) -> Tensors:
        projected = super().project(features, batch)
        labels = {"labels": all_gather(batch["target"])} if self.needs_labels else {}
        return projected | labels

    def contrastive_term(self, outputs: Tensors) -> tuple[Tensor, Tensor]:
        return triplet_loss(outputs["predictions"], outputs.get("labels"), self.margin)


def simsiam_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean cosine of each prediction (B, 2, out) and the other view's target."""
    assert predictions.shape[1] == 2, "SimSiam pairs the two views of a sample"
    p, t = unit_rows(predictions), unit_rows(targets)  # (2B, out)
    return -(p * t.roll(len(p) // 2, dims=0)).sum(dim=1).mean()


class SimSiam(SimCLR):
    """SimSiam (Chen and He 2021): a prediction of the other view; no sample repels another.

    Args:
        predictor_hidden_dim: width of the predictor. Without a predictor all features collapse.
    """

    def __init__(self, *, predictor_hidden_dim: PositiveInt = 512, **simclr):
        super().__init__(**simclr)
        out = self.projector[-1].out_features
        self.predictor = Head(out, predictor_hidden_dim, out)

    def project(self, features: Tensor, batch: Batch) -> Tensors:
        """Return predictions made from the projections, and the projections without gradient."""
        projections = self.projector(all_gather(features))
        predictions = self.predictor(projections)
        return {"predictions": predictions, "targets": projections.detach()}

    def contrastive_term(self, outputs: Tensors) -> tuple[Tensor, Tensor]:
        predictions, targets = outputs["predictions"], outputs["targets"]
        _, accuracy = info_nce(predictions, targets, self.temperature)  # only logged
        return simsiam_loss(predictions, targets), accuracy


def vicreg_loss(
    predictions: Tensor, invariance: float, variance: float, covariance: float
) -> Tensor:
    """Return VICReg's loss of two views (B, 2, out), which are not normalised.

    Args:
        invariance, variance, covariance: weights of the three terms.
    """
    first, second = at_least_fp32(predictions).unbind(1)  # (B, out)
    loss = invariance * F.mse_loss(first, second)
    for view in (first, second):
        centred = view - view.mean(dim=0)
        matrix = centred.T @ centred / (len(view) - 1)  # (out, out); Tensor.cov waits for a GPU
        deviation = (matrix.diag() + 1e-4).sqrt()
        off_diagonal = matrix - matrix.diag().diag()
        loss = loss + variance * F.relu(1 - deviation).mean() / 2
        loss = loss + covariance * off_diagonal.square().sum() / len(matrix)
    return loss


class VICReg(SimCLR):
    """VICReg (Bardes et al. 2022).

    Args:
        invariance, variance, covariance: weights of the three terms, as published.
    """

    def __init__(
        self,
        *,
        invariance: NonNegativeFloat = 25.0,
        variance: NonNegativeFloat = 25.0,
        covariance: NonNegativeFloat = 1.0,
        **simclr,
    ):
        super().__init__(**simclr)
        self.weights = (invariance, variance, covariance)

    def contrastive_term(self, outputs: Tensors) -> tuple[Tensor, Tensor]:
        predictions = outputs["predictions"]
        _, accuracy = info_nce(predictions, outputs["targets"], self.temperature)  # only logged
        return vicreg_loss(predictions, *self.weights), accuracy
