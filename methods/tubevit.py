"""TubeViT: one ViT for clips and images, which sees sparse tubes of them, with a head for each.

    composer finetune.py yamls/methods/tubevit.yaml
    composer finetune.py yamls/methods/tubevit.yaml pretrained=demo run_name=tubevit_vicmae

The second command begins with the image encoder of a run of pretrain.py. The kernels of all tubes
are then interpolated from its patch embedding, see training/weights.py.
"""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from methods.supervised import MultiHead
from model import Batch, Encoder, LayerNorm, is_block, sincos

Size = tuple[PositiveInt, PositiveInt, PositiveInt]  # frames, rows, columns
TUBES = [  # of the publication, for clips of 32 frames of 224 x 224 pixels
    {"kernel": (8, 8, 8), "stride": (16, 32, 32), "space_to_depth": (2, 1, 1)},
    {
        "kernel": (16, 4, 4),
        "stride": (6, 32, 32),
        "offset": (4, 8, 8),
        "space_to_depth": (1, 2, 2),
    },
    {"kernel": (4, 12, 12), "stride": (16, 32, 32), "offset": (0, 16, 16)},
    {"kernel": (1, 16, 16), "stride": (32, 16, 16)},
]


class Tube(nn.Conv3d):
    """The tokens of all tubes of one shape in a clip, without padding.

    A tube consists of kernels side by side, whose outputs are concatenated.

    Args:
        width: D.
        clip: size of the clip.
        kernel: size of a kernel.
        stride: distance between two tubes in frames, rows and columns.
        offset: of the first tube from the corner of the clip.
        space_to_depth: kernels that a tube has along frames, rows and columns. With n kernels, each
            gives D / n numbers of a token.

    Attributes:
        extent: size of a tube.
        corners: first frame, row and column of each tube, in the order of the tokens: (n, 3).

    Raises:
        ValueError: the clip has no such tube, or n does not divide D.
    """

    def __init__(
        self,
        width: int,
        clip: Size,
        *,
        kernel: Size,
        stride: Size,
        offset: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = (0, 0, 0),
        space_to_depth: Size = (1, 1, 1),
    ):
        kernels = prod(space_to_depth)
        if width % kernels:
            raise ValueError(
                f"tubes: space_to_depth={list(space_to_depth)}: must divide embed_dim={width}"
            )
        super().__init__(3, width // kernels, kernel, stride)
        nn.init.xavier_uniform_(self.weight.view(width // kernels, -1))
        self.offset, self.space_to_depth = tuple(offset), tuple(space_to_depth)
        self.extent = tuple(k * n for k, n in zip(kernel, space_to_depth, strict=True))
        edges = zip(clip, offset, self.extent, stride, strict=True)
        starts = [range(first, size - length + 1, step) for size, first, length, step in edges]
        self.counts = [len(along) for along in starts]
        self.corners = np.array(list(product(*starts)))
        if not self.corners.size:
            raise ValueError(
                f"tubes: kernel={list(kernel)}: a tube of {list(self.extent)} at "
                f"{list(offset)} must fit into a clip of {list(clip)} frames, rows and columns"
            )

    def windows(self) -> Iterator[list[slice]]:
        """Yield the part of a clip that each kernel of the tubes sees."""
        for place in product(*map(range, self.space_to_depth)):
            window = []
            sizes = zip(self.offset, place, self.kernel_size, self.stride, self.counts, strict=True)
            for offset, number, kernel, stride, count in sizes:
                start = offset + number * kernel
                window.append(slice(start, start + (count - 1) * stride + kernel))
            yield window

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, number of tubes, D) of clips (B, 3, T, H, W)."""
        parts = []
        for window in self.windows():
            parts.append(super().forward(x[:, :, *window]))
        return torch.cat(parts, dim=1).flatten(2).transpose(1, 2)


def tube_positions(centres: np.ndarray, width: int) -> Tensor:
    """Return fixed positions (1, N, D) of the centres (N, 3) of tubes in frames, rows and columns.

    Each of D // 6 frequencies, as in sincos, has six numbers: sine and cosine of the frame, of the
    column and of the row. What is left of the width is 0.
    """
    count = width // 6
    frame, row, column = centres.T
    tables = [sincos(2 * count, axis).view(-1, 2, count) for axis in (frame, column, row)]
    table = torch.stack(tables, dim=1).permute(0, 3, 1, 2).flatten(1)  # (N, count * 3 * 2)
    return F.pad(table, (0, width - 6 * count))[None]


def moves(x: Tensor) -> Tensor | None:
    """Return whether clips (B, T, 3, H, W) have a frame unlike the first: (B,). None for images."""
    return None if x.ndim == 4 else (x != x[:, :1]).flatten(1).any(dim=1)


class TubeEncoder(nn.Module):
    """A ViT on the tubes of a clip, or on the tubes that touch an image.

    An image is the first frame of a clip whose other frames are 0. It has the tokens of the tubes
    that begin at this frame. A clip of equal frames counts as an image.

    Args:
        encoder: of images; its blocks, norm and CLS token become part of this encoder.
        num_frames: T.
        tubes: arguments of Tube for each shape. The tube that is a patch of one frame gives the
            first tokens, and is called as an Encoder's patch embedding; others follow in order.

    Raises:
        ValueError: no tube is a patch at the first frame; or see Tube.
    """

    fsdp_wrap_fn = activation_checkpointing_fn = is_block

    def __init__(self, encoder: Encoder, num_frames: int, tubes: list[dict[str, Any]]):
        super().__init__()
        self.img_size, self.patch_size = encoder.img_size, encoder.patch_size
        self.num_frames = num_frames
        self.cls_token, self.blocks, self.norm = encoder.cls_token, encoder.blocks, encoder.norm
        width, patch = encoder.norm.normalized_shape[0], (1, self.patch_size, self.patch_size)
        clip = (num_frames, self.img_size, self.img_size)
        shapes = [Tube(width, clip, **tube) for tube in tubes]
        patches = [shape for shape in shapes if shape.extent == shape.kernel_size == patch]
        if len(patches) != 1 or patches[0].offset[0]:
            kernel = f"kernel={list(patch)}, and begin at the first frame"
            raise ValueError(f"tubes: exactly one must be a patch of an image, with {kernel}")
        shapes.sort(key=lambda shape: shape is not patches[0])
        others = nn.ModuleList(shapes[1:])
        self.patch_embed = nn.ModuleDict({"proj": shapes[0], "tubes": others})

        at_start = np.concatenate([shape.corners[:, 0] == 0 for shape in shapes])
        centres = [shape.corners + np.array(shape.extent) / 2 for shape in shapes]
        self.num_patches = len(at_start)  # N
        buffers = {
            "positions": tube_positions(np.concatenate(centres), width),  # (1, N, D)
            "at_start": torch.from_numpy(at_start),  # (N,), whether an image has the token
            "of_image": torch.from_numpy(np.flatnonzero(at_start)),  # numbers of these tokens
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def present(self, moving: Tensor | None) -> Tensor | None:
        """Return whether a clip has a token of forward, CLS first: (B, 1, 1, 1 + N); None if all.

        Args:
            moving: (B,), see moves.
        """
        if moving is None:
            return None
        return F.pad(moving[:, None] | self.at_start, (1, 0), value=True)[:, None, None]

    def forward(self, x: Tensor, moving: Tensor | None = None) -> Tensor:
        """Return tokens after the final norm, CLS first: (B, 1 + N, D), fewer for images.

        Args:
            x: images (B, 3, H, W) or clips (B, T, 3, H, W). A clip of equal frames has 0 for the
                tokens that an image does not have.
            moving: of moves(x), if it is known.
        """
        if x.ndim == 4:
            x = F.pad(x[:, None], (0, 0, 0, 0, 0, 0, 0, self.num_frames - 1))
        else:
            moving = moves(x) if moving is None else moving
            seen = moving[:, None] | (torch.arange(self.num_frames, device=x.device) == 0)
            x = x * seen[:, :, None, None, None].to(x.dtype)
        present = self.present(moving)
        x = x.transpose(1, 2)  # (B, 3, T, H, W)
        shapes = (self.patch_embed["proj"], *self.patch_embed["tubes"])
        x = torch.cat([shape(x) for shape in shapes], dim=1) + self.positions  # (B, N, D)
        if present is None:
            x = x.index_select(1, self.of_image)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x, attn_mask=present)
        x = self.norm(x)
        return x if present is None else x * present[:, 0, 0, :, None]


class TubeViT(MultiHead):
    """TubeViT: "Rethinking Video ViTs: Sparse Video Tubes" (Piergiovanni et al., CVPR 2023).

    Attention pooling joins the tokens of a clip or an image. A linear head for each data set
    follows, and the loss of a sample is of its own head.

    Args:
        classes: see MultiHead.
        num_frames: T.
        tubelet_size: 1, since the tubes have sizes of their own.
        pool: attention, with a learned query and an MLP, in which the dropout is.
        tubes: kernel, stride, offset and space_to_depth of each shape of tubes, see Tube. The
            default, as published, has 539 tokens.
        multi_head: other arguments of MultiHead.
    """

    def __init__(
        self,
        classes: list[int],
        *,
        num_frames: PositiveInt = 32,
        tubelet_size: Literal[1] = 1,
        pool: Literal["attention"] = "attention",
        tubes: list[Annotated[dict, Tube]] = TUBES,
        **multi_head,
    ):
        super().__init__(classes, **multi_head)
        self.encoder = TubeEncoder(self.encoder, num_frames, tubes)
        self.pool = pool
        width, heads = self.head[0].in_features, self.encoder.blocks[0].attn.num_heads
        dropout = self.neck.p
        self.neck = AttentionPoolLatent(width, num_heads=heads, norm_layer=LayerNorm, drop=dropout)

    def check_augment(self, augment: dict[str, Any]) -> None:
        """Raise ValueError for random erasing, which makes the frames of a still clip differ.

        Clips of equal frames count as images.
        """
        if augment.get("erasing") != 0:  # The default is not 0.
            given = f"={augment['erasing']}" if "erasing" in augment else ""
            reason = "must be 0 with method=tubevit, which takes equal frames for an image"
            raise ValueError(f"augment.erasing{given}: {reason}")

    def forward(self, batch: Batch) -> Tensor:
        """Return log-probabilities (B, V, C), see DataSetHeads; for inputs, see Classifier."""
        x = batch["inputs"]
        B, V = x.shape[:2]
        x = x.flatten(0, 1)  # (B * V, T, 3, H, W)
        if x.shape[1] == 1:
            x = x.squeeze(1)  # (B * V, 3, H, W)
        moving = moves(x)
        features = self.neck(self.encoder(x, moving), self.encoder.present(moving))  # (B * V, D)
        return self.head(features).unflatten(0, (B, V))
