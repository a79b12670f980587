"""OMNIVORE: one encoder with a head for each labelled data set, of clips, images, or RGB-D.

    composer finetune.py yamls/methods/omnivore.yaml

Training with labels on one label set needs no class of its own: yamls/methods/supervised.yaml
trains model.Classifier from random weights.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch import Tensor, nn

from model import Batch, Classifier, LayerNorm, pool_tokens


class DataSetHeads(nn.Sequential):  # FSDP refuses nn.ModuleList
    """A linear head for each data set; classes are numbered over all data sets in turn."""

    def __init__(self, heads: list[nn.Linear]):
        super().__init__(*heads)
        counts = [head.out_features for head in heads]
        owner = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
        self.register_buffer("owner", owner, persistent=False)  # (C,), the data set of a class

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities (B, C), normalised over the classes of each data set."""
        return torch.cat([head(x).log_softmax(dim=-1) for head in self], dim=-1)


class DepthEmbedding(nn.Conv3d):
    """The patch embedding of clips, and of images with or without depth.

    An image becomes a tubelet, whose other frames are 0. The normalised embedding of its depth is
    added to the embedding of its colours.

    Args:
        colours: patch embedding of clips, whose weights become part of this one.
        steps: tubelets along time.
    """

    def __init__(self, colours: nn.Conv3d, steps: int):
        width, kernel = colours.out_channels, colours.kernel_size
        super().__init__(3, width, kernel, kernel)
        self.weight, self.bias = colours.weight, colours.bias
        self.steps = steps
        self.depth = nn.Conv3d(1, width, kernel, kernel)
        nn.init.xavier_uniform_(self.depth.weight.view(width, -1))
        self.norm = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings (B, D, steps, H / p, W / p), of an image 0 after the first step.

        Args:
            x: clips (B, 3, T, H, W), images (B, 3, 1, H, W), or with depth (B, 4, 1, H, W).
        """
        if x.shape[2] == 1:
            x = F.pad(x, (0, 0, 0, 0, 0, self.kernel_size[0] - 1))
        embedded = super().forward(x[:, :3])
        if x.shape[1] == 4:
            depth = self.depth(x[:, 3:]).movedim(1, -1)
            embedded = embedded + self.norm(depth).movedim(-1, 1)
        else:  # DDP and FSDP expect a gradient of every parameter in each step.
            unused = [*self.depth.parameters(), *self.norm.parameters()]
            embedded = embedded + 0 * sum(parameter.sum() for parameter in unused)
        return F.pad(embedded, (0, 0, 0, 0, 0, self.steps - embedded.shape[2]))


class MultiHead(Classifier):
    """A classifier with a head for each data set, which trains and classifies its samples.

    Args:
        classes: number of classes of each data set, in the order of data.streams.
        data_set: number of the data set whose head evaluates and is exported, from 0; None for the
            head of each sample's own data set.
        classifier: arguments of Classifier.

    Raises:
        ValueError: data_set is too large.
    """

    head_per_data_set = True

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

    def classes_of(self, data_set: int) -> tuple[int, range]:
        """Return the head of a data set, and its classes: an empty range if it has none."""
        head = data_set if self.data_set is None else self.data_set
        numbers = (self.head.owner == head).nonzero()[:, 0].tolist()
        return head, range(numbers[0], numbers[-1] + 1) if numbers else range(0)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy within the head of each sample's data set."""
        if batch["target"].ndim == 2:
            batch = batch | {"target": self.within_data_set(batch["target"])}
        # cross_entropy normalises once more; the probabilities of all heads sum to their number.
        return super().loss(outputs, batch) - math.log(len(self.head))

    def within_data_set(self, target: Tensor) -> Tensor:
        """Return targets (B, C) whose label smoothing stays within the data sets of a sample.

        Smoothing gives each class the same share; a class that has more is a label.
        """
        data_sets = torch.arange(len(self.head), device=target.device)
        member = (self.head.owner[:, None] == data_sets).to(target.dtype)  # (C, data sets)
        smoothing = target.amin(dim=1, keepdim=True)
        labels = target - smoothing
        total = labels.sum(dim=1, keepdim=True).clamp(min=1e-6)
        share = labels @ member / total  # of each data set
        return labels + smoothing * target.shape[1] * (share / member.sum(dim=0)) @ member.T

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        """Return probabilities (B, C); classes of data sets other than the sample's own have 0."""
        probabilities = super().eval_forward(batch, outputs) * len(self.head)
        owner = self.head.owner
        return probabilities * (owner == owner[batch["target"]][:, None])


class Omnivore(MultiHead):
    """OMNIVORE (Girdhar et al. 2022) with a ViT in place of the Swin transformer.

    Args:
        depth_maps: see an image as one frame, padded with 0 to a tubelet, with its depth map if it
            has one, as in OMNIVORE; `dropout` is for clips alone. Otherwise, an image is a clip of
            equal frames, as in earlier versions.
        modality: of images with depth; colours or depth alone for evaluation.
        multi_head: arguments of MultiHead.

    Attributes:
        images_as_stored: whether `depth_maps` is set, see forward.

    Raises:
        ValueError: depth_maps without clips; or see MultiHead.
    """

    def __init__(
        self,
        classes: list[int],
        *,
        depth_maps: bool = False,
        modality: Literal["rgbd", "rgb", "depth"] = "rgbd",
        **multi_head,
    ):
        super().__init__(classes, **multi_head)
        self.images_as_stored = depth_maps
        self.modality = modality
        if depth_maps:
            if self.encoder.num_frames == 1:
                raise ValueError("depth_maps=true: needs clips; give model.num_frames=16, say")
            embedding = DepthEmbedding(self.encoder.patch_embed["proj"], self.encoder.steps)
            self.encoder.patch_embed["proj"] = embedding

    def forward(self, batch: Batch) -> Tensor:
        """Return log-probabilities (B, V, C), see DataSetHeads.

        Args:
            batch: `inputs`, see Classifier. With `depth_maps`, inputs are of one kind: clips (B, V,
                T, 3, H, W), images (B, V, 1, 3, H, W), or with depth (B, V, 1, 4, H, W). Or they
                are mixed, as clips with `depth` (B, V, 1, H, W) and `kind` (B,), see EvalViews.
        """
        x = batch["inputs"]
        if not self.images_as_stored:
            return super().forward(batch)
        if "kind" not in batch:
            return self.head(self.encode(x))
        images = x[:, :, :1]
        with_depth = torch.cat([images, batch["depth"][:, :, None]], dim=3)
        outputs = x.new_empty(*x.shape[:2], self.num_classes)
        for kind, inputs in enumerate((x, images, with_depth)):
            rows = (batch["kind"] == kind).nonzero()[:, 0]
            # At least one sample, as with FSDP all ranks must encode all kinds.
            encoded = self.encode(inputs[rows if len(rows) else [0]])
            outputs[rows] = self.head(encoded[: len(rows)]).to(outputs.dtype)
        return outputs

    def encode(self, x: Tensor) -> Tensor:
        """Return features (B, V, D) of inputs of one kind, see forward."""
        B, V, frames, channels = x.shape[:4]
        if channels == 4 and self.modality == "rgb":
            x = x[:, :, :, :3]
        elif channels == 4 and self.modality == "depth":
            x = F.pad(x[:, :, :, 3:], (0, 0, 0, 0, 3, 0))
        x = x.flatten(0, 1)  # (B * V, T, 3, H, W)
        visible = None
        if frames == 1:  # The encoder adds the positions of all steps; an image has the first.
            patches = (x.shape[-1] // self.encoder.patch_size) ** 2
            visible = torch.arange(patches, device=x.device).expand(len(x), -1)
        features = pool_tokens(self.encoder(x, visible), self.pool)
        if frames > 1:
            features = self.neck(features)
        return features.unflatten(0, (B, V))
