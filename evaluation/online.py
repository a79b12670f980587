"""Watch the features while they are learnt, at no extra forward pass.

callbacks:
  EffectiveRank: {}
  OnlineProbe: {}          # for data with labels
"""

from typing import Any

import torch
import torch.nn.functional as F
from composer import Callback, Logger, State
from composer.utils import dist
from pydantic import PositiveFloat
from torch import Tensor, nn

from shards.format import same_classes

COLLAPSED = 2.0  # an effective rank below it counts as a collapse


def effective_rank(features: Tensor) -> float:
    """Return the effective rank of features (n, D), from 1 to min(n, D).

    It is exp of the entropy of the singular values, divided by their sum. Source: RankMe (Garrido
    et al. 2023).
    """
    values = torch.linalg.svdvals(features.detach().float())
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


class EffectiveRank(Callback):
    """Logs effective_rank of the last micro-batch of each epoch, of rank 0; warns of a collapse."""

    def epoch_end(self, state: State, logger: Logger) -> None:
        features = state.outputs["features"][:, 0]  # (B, D), of the first view
        rank = effective_rank(features)
        logger.log_metrics({"effective_rank": rank})
        if rank < COLLAPSED and dist.get_global_rank() == 0:
            most = min(features.shape)
            print(
                f"the features collapse: their effective rank is {rank:.2f} of {most}", flush=True
            )


class OnlineProbe(Callback):
    """Trains a linear head on the features of the first view, and logs its accuracy of each epoch.

    The features are detached: the head changes nothing else. A sample is scored before the head
    learns from it. Samples without a label do not count.

    Args:
        paths: the data sets of the training.
        learning_rate: of SGD with momentum 0.9, on standardised features.

    Raises:
        ValueError: data sets without labels, or with different classes.
    """

    def __init__(self, paths: list[str], *, learning_rate: PositiveFloat = 0.1):
        self.num_classes = len(same_classes(paths, "callbacks.OnlineProbe"))
        self.learning_rate = learning_rate
        self.head: nn.Module | None = None  # made when the width of the features is known
        self.counts = torch.zeros(2)  # samples that were right, and all
        self.loaded: dict[str, Any] = {}

    def new_head(self, width: int, device: torch.device) -> None:
        norm = nn.BatchNorm1d(width, affine=False)
        linear = nn.Linear(width, self.num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(norm, linear).to(device)
        settings = {"lr": self.learning_rate, "momentum": 0.9}
        self.optimizer = torch.optim.SGD(self.head.parameters(), **settings)
        self.counts = self.counts.to(device)
        if self.loaded:
            self.head.load_state_dict(self.loaded["head"])
            self.optimizer.load_state_dict(self.loaded["optimizer"])

    def after_forward(self, state: State, logger: Logger) -> None:
        features = state.outputs["features"][:, 0].detach().float()  # (B, D)
        labels = state.batch["target"]  # (B,), -1 = unknown
        if self.head is None:
            self.new_head(features.shape[1], features.device)
        device = features.device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            logits = self.head(features)  # (B, C)
            known = (labels >= 0).float()
            losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
            loss = (losses * known).sum() / known.sum().clamp(min=1)
            gradients = torch.autograd.grad(loss, list(self.head.parameters()))
        right = (logits.argmax(dim=1) == labels).float()  # never for an unknown label
        self.counts += torch.stack([right.sum(), known.sum()]).detach()
        for weight, gradient in zip(self.head.parameters(), gradients, strict=True):
            dist.all_reduce(gradient, "SUM")
            weight.grad = gradient / dist.get_world_size()
        self.optimizer.step()

    def epoch_end(self, state: State, logger: Logger) -> None:
        dist.all_reduce(self.counts, "SUM")
        right, count = self.counts.tolist()
        logger.log_metrics({"online_probe": right / max(count, 1)})
        self.counts.zero_()

    def state_dict(self) -> dict[str, Any]:
        if self.head is None:
            return self.loaded
        states = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}
        return states | {"counts": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state
        self.counts = state.get("counts", self.counts)
