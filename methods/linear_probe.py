"""The linear probe of MAE: linear heads on a frozen encoder.

    composer finetune.py yamls/linprobe_demo.yaml

finetune.py trains the heads with LARS, each at its own learning rate.
"""

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor, nn

from model import Batch, Classifier, all_gather


class GlobalBatchNorm(nn.BatchNorm1d):
    """A BatchNorm over the samples of all ranks, for features that need no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        gathered = super().forward(all_gather(x))  # (B of all ranks, D)
        own = dist.get_global_rank() if len(gathered) > len(x) else 0
        return gathered.view(-1, *x.shape)[own]


class ProbeHeads(nn.Sequential):  # FSDP refuses nn.ModuleList
    """Linear heads on the same features, each trained at its own learning rate.

    The best head has most held-out training samples right; a step counts 0.98 times the next step.
    """

    def __init__(self, heads: list[nn.Linear]):
        super().__init__(*heads)
        self.register_buffer("right", torch.zeros(len(heads)))  # discounted counts

    def best(self) -> int:
        return int(self.right.argmax())

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, heads, C) in training, and (B, C) of the best head in evaluation."""
        if self.training:
            return torch.stack([head(x) for head in self], dim=1)
        return self[self.best()](x)

    @torch.no_grad()
    def count(self, logits: Tensor, held_out: Tensor) -> None:
        """Count correct predictions of logits (B, heads, C) on held-out labels (B,); -1 = none."""
        right = (logits.argmax(dim=-1) == held_out[:, None]).sum(dim=0).float()  # (heads,)
        if dist.get_world_size() > 1:
            dist.all_reduce(right)
        self.right.mul_(0.98).add_(right)


class LinearProbe(Classifier):
    """A linear head on a frozen encoder, after a BatchNorm without affine parameters (source: MAE).

    Args:
        heads: number of heads that are trained at once, see ProbeHeads.
        classifier: arguments of Classifier.
    """

    def __init__(self, num_classes: int, heads: int = 1, **classifier):
        super().__init__(num_classes, **classifier)
        width = self.encoder.norm.normalized_shape[0]
        self.neck = GlobalBatchNorm(width, affine=False, eps=1e-6)
        if heads > 1:
            self.head = ProbeHeads([self.new_head(num_classes) for _ in range(heads)])
        self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy, summed over the heads."""
        if not isinstance(self.head, ProbeHeads):
            return super().loss(outputs, batch)
        logits = outputs.flatten(0, 1).float()  # (B * V, heads, C)
        views = outputs.shape[1]
        target = batch["target"].repeat_interleave(views, dim=0)
        self.head.count(logits, batch["held_out"].repeat_interleave(views))
        return sum(F.cross_entropy(head_logits, target) for head_logits in logits.unbind(1))
