"""methods/contrastive.py."""

import copy

import torch
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn

from model import Encoder, Head, Projected, rows, at_least_fp32


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
    same = (same if z.labels is None else torch.where(z.labels < 0, same, z.labels)).repeat(
        len(p) // B
    )
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
    one, two = at_least_fp32(z.predictions).unbind(1)  # (B, out)
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
        queue = torch.randn(
            queue_size, projector[-1].out_features, generator=torch.Generator().manual_seed(0)
        )
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
