"""The contrastive heads, the terms on what they project, ViC-MAE's InfoNCE first, and MoCo's second encoder (section 3.2).

Each term takes what is projected of the whole global batch, see Projected, and returns the loss, and the fraction of views
(for triplets, of pairs) that are right. None has parameters, and none knows of ranks: all_gather comes before the heads.
"""

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn

from vit import Encoder, init_weights


class Head(nn.Sequential):
    """Linear layers from each of `widths` to the next, BatchNorm and ReLU between them.

    The projector is D - hidden - hidden - out; a predictor (SimSiam, MoCo v3) is out - hidden - out.
    """

    def __init__(self, *widths: int):
        layers = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.BatchNorm1d(following), nn.ReLU(inplace=True)]
        super().__init__(*layers[:-2])
        self.apply(init_weights)


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x over the ranks along dimension 0, with gradient; x itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


def widen(x: Tensor) -> Tensor:
    """In fp32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Projected(NamedTuple):
    """What a contrastive term is given, of the whole global batch.

    predictions: (B, V, out), with gradient.
    targets: (B, V, out): the predictions themselves; or what they are to be like, without gradient.
    labels: (B,), -1 where there is none; for a triplet's positives.
    queue: (Q, out), normalised; MoCo's negatives, else None.
    """

    predictions: Tensor
    targets: Tensor
    labels: Tensor | None = None
    queue: Tensor | None = None


def rows(x: Tensor) -> Tensor:
    """(B, V, out) -> (V * B, out), normalised, at least in fp32; view 1 of all samples first."""
    return F.normalize(widen(x), dim=-1).transpose(0, 1).flatten(0, 1)


def info_nce(z: Projected, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent over both views of all samples: each must find its partner among the targets of the other 2B - 1.

    Returns the loss, and the fraction of views that do find it. With a queue, its rows are the others (MoCo).

    Args:
        temperature: divides the cosine similarities, > 0.

    Deviation: the official labels lack the rank's offset, and its loss is exp, sum and log; here the samples of all
    ranks are one batch before the labels are made, and the loss is a cross-entropy.
    """
    p, t = rows(z.predictions), rows(z.targets)  # (2B, out)
    partner = torch.arange(len(p), device=p.device).roll(len(p) // 2)
    if z.queue is None:
        logits = (p @ t.T).fill_diagonal_(float("-inf"))  # (2B, 2B)
    else:
        logits = torch.cat([(p * t[partner]).sum(dim=1, keepdim=True), p @ widen(z.queue).T], dim=1)  # (2B, 1 + Q)
        partner = torch.zeros_like(partner)
    ahead = logits.argmax(dim=1) == partner
    if z.queue is not None:  # the first of equals; where all features are the same, no view finds its partner
        ahead = logits[:, 0] > logits[:, 1:].amax(dim=1)
    return F.cross_entropy(logits / temperature, partner), ahead.float().mean()


def triplet(z: Projected, margin: float) -> tuple[Tensor, Tensor]:
    """FaceNet's: for all pairs of an anchor and a positive, [|a - p|^2 - |a - n|^2 + margin]+ with a semi-hard negative.

    That is the nearest of those further away than the positive, or, if there is none, the furthest of all. Positives are the
    other view of a sample, and every view of its label's, where there are labels. The mean over the pairs; 0 where no pair
    has a negative, as all have one label.

    Returns the loss, and the fraction of pairs whose positive is nearer than that negative.
    """
    p = rows(z.predictions)
    B = len(z.predictions)
    same = -1 - torch.arange(B, device=p.device)  # none but itself, where there is no label
    same = (same if z.labels is None else torch.where(z.labels < 0, same, z.labels)).repeat(len(p) // B)
    distance = 2 - 2 * p @ p.T  # (n, n), of unit vectors
    alike = same[:, None] == same  # (n, n)
    positive = alike & ~torch.eye(len(p), dtype=torch.bool, device=p.device) & ~alike.all(dim=1)
    anchor, other = positive.nonzero(as_tuple=True)  # (pairs,)
    reached = distance[anchor, other]
    with torch.no_grad():  # the choice has no gradient, and would cost most of the time
        far = distance.masked_fill(alike, float("-inf"))[anchor]  # (pairs, n), the negatives'
        beyond = far.masked_fill(far <= reached[:, None], float("inf"))
        chosen = torch.where(beyond.amin(dim=1).isinf(), far.argmax(dim=1), beyond.argmin(dim=1))
    negative = distance[anchor, chosen]
    count = max(1, len(anchor))
    return F.relu(reached - negative + margin).sum() / count, (reached < negative).sum() / count


def matched(z: Projected) -> Tensor:
    """The fraction of views whose partner's target is nearer than any other sample's."""
    B = len(z.predictions)
    similar = rows(z.predictions) @ rows(z.targets).T  # (2B, 2B)
    partner = torch.arange(len(similar), device=similar.device).roll(B)
    return (similar.fill_diagonal_(float("-inf")).argmax(dim=1) == partner).float().mean()


def simsiam(z: Projected) -> tuple[Tensor, Tensor]:
    """Minus the cosine of each view's prediction and the other view's target, no sample repels (Chen and He 2021).

    Returns the loss, and see matched.
    """
    p, t = rows(z.predictions), rows(z.targets)
    return -(p * t.roll(len(p) // 2, dims=0)).sum(dim=1).mean(), matched(z)


def vicreg(z: Projected) -> tuple[Tensor, Tensor]:
    """Invariance 25, variance 25 and covariance 1 of the projections of both views (Bardes et al. 2022).

    Returns the loss, and see matched.
    """
    one, two = widen(z.predictions).unbind(1)  # (B, out)
    loss = 25 * F.mse_loss(one, two)
    for view in (one, two):
        covariance = view.T.cov()  # (out, out)
        deviation = (covariance.diag() + 1e-4).sqrt()
        off = covariance - covariance.diag().diag()
        loss = loss + 25 * F.relu(1 - deviation).mean() / 2 + off.square().sum() / len(covariance)
    return loss, matched(z)


class Momentum(nn.Module):
    """MoCo's second encoder and projector, moving averages of the first ones, and the queue of what they projected.

    Args:
        momentum: share of the average that stays in a step, in [0, 1).
        queue_size: projections kept.
    """

    def __init__(self, encoder: Encoder, projector: Head, momentum: float, queue_size: int):
        super().__init__()
        self.encoder, self.projector = copy.deepcopy(encoder), copy.deepcopy(projector)
        self.requires_grad_(False)
        self.momentum = momentum
        queue = torch.randn(queue_size, projector[-1].out_features, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", F.normalize(queue, dim=-1))

    @torch.no_grad()
    def follow(self, encoder: Encoder, projector: Head) -> None:
        """Take a step towards the weights of now; due before each of the optimiser's."""
        for mine, theirs in ((self.encoder, encoder), (self.projector, projector)):
            for average, new in zip(mine.parameters(), theirs.parameters(), strict=True):
                average.lerp_(new, 1 - self.momentum)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Put keys (B, V, out) in the place of the oldest."""
        new = rows(keys).to(self.queue.dtype)
        self.queue.copy_(torch.cat([new, self.queue])[: len(self.queue)])
