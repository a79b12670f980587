"""OMNIVORE: one encoder with a head for each of several labelled data sets of images and clips.

    composer finetune.py yamls/methods/omnivore.yaml

Training with labels on one label set needs no class of its own: yamls/methods/supervised.yaml
trains model.Classifier from random weights.
"""

import math
from itertools import accumulate

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from model import Batch, Classifier


class DataSetHeads(nn.ModuleList):
    """A linear head for each data set; classes are numbered over all data sets in turn."""

    def __init__(self, heads: list[nn.Linear]):
        super().__init__(heads)
        counts = [head.out_features for head in heads]
        owner = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
        self.register_buffer("owner", owner, persistent=False)  # (C,), the data set of a class

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities (B, C), normalised over the classes of each data set."""
        return torch.cat([head(x).log_softmax(dim=-1) for head in self], dim=-1)


class Omnivore(Classifier):
    """OMNIVORE (Girdhar et al. 2022) with a ViT in place of the Swin transformer.

    A sample trains and is classified by the head of its own data set.

    Args:
        classes: number of classes of each data set, in the order of data.streams.
        data_set: number of the data set whose head evaluates and is exported, from 0; None for the
            head of each sample's own data set.
        classifier: arguments of Classifier.
    """

    def __init__(self, classes: list[int], *, data_set: NonNegativeInt | None = None, **classifier):
        super().__init__(sum(classes), **classifier)
        if data_set is not None and data_set >= len(classes):
            raise ValueError(
                f"data_set={data_set}: must be below {len(classes)}, the number of heads"
            )
        self.head = DataSetHeads([self.new_head(count) for count in classes])
        self.data_set = data_set

    @staticmethod
    def classes_in(weights: dict[str, Tensor]) -> list[int]:
        """Return the number of classes of each head in a checkpoint's weights."""
        heads = []
        while f"head.{len(heads)}.bias" in weights:
            heads.append(len(weights[f"head.{len(heads)}.bias"]))
        return heads

    def first_classes(self) -> list[int]:
        """Return the number of the first class of each head."""
        return [0, *accumulate(head.out_features for head in self.head[:-1])]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy within the head of each sample's data set."""
        # cross_entropy normalises once more; the probabilities of all heads sum to their number.
        return super().loss(outputs, batch) - math.log(len(self.head))

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        """Return probabilities (B, C); classes of data sets other than the sample's own have 0."""
        probabilities = super().eval_forward(batch, outputs) * len(self.head)
        owner = self.head.owner
        return probabilities * (owner == owner[batch["target"]][:, None])
