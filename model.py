"""ViC-MAE (arXiv:2303.12001): contrastive masked autoencoding, and the classifier for transfer.

    model = ViCMAE(embed_dim=1024, depth=24, num_heads=16)  # ViT-L, the official code's numbers
    batch = {"views": views, "noise": noise}                # (B, 2, 3, 224, 224), (B, 2, 196)
    losses = model.loss(model(batch), batch)                # total, reconstruction, contrastive

A sample has two views: two frames of a video, or two crops of an image. Both pass through one
encoder, each with its own random mask. A decoder reconstructs both views (section 3.1). The means
of their visible tokens are projected: the two projections of a sample attract each other, and all
other samples of the batch repel them (section 3.2). For transfer, a linear head is trained on the
encoder (section 4). This file imports no other file of this repository. A "Deviation" is a
difference from the official code, https://github.com/jeffhernandez1995/ViC-MAE.

Shapes, here and in every other file:
    B samples   V views of a sample   T frames of a clip   N patches of a view   K patches kept
    D width     P numbers of a patch (patch_size * patch_size * 3)   C classes   H, W pixels
A tensor named `mask` is 1 where a patch is removed; `scored`, where it is decoded too. B is the
number of samples of this rank's micro-batch, or of all ranks, where a line says so. Functions on
patches take each view as a sample.
"""

import json
import math
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from composer import ComposerModel
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, validate_call
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

ProperFraction = Annotated[float, Field(ge=0, lt=1)]  # in [0, 1)
Batch = Tensors = dict[str, Tensor]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


# Section 3: positions, patches, masking


def sincos(dim: int, coordinate: np.ndarray) -> Tensor:
    """Return sines, then cosines, at dim / 2 frequencies, from 1 towards 1/10000: (1, n, dim)."""
    angles = np.outer(coordinate, 10000.0 ** (-np.arange(dim // 2) / (dim / 2)))
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (n, dim)
    return torch.from_numpy(table).float()[None]


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Return fixed 2-D positions of a grid x grid square, after a zero for CLS: (1, 1 + N, dim).

    The first half of the width encodes the column. Source: MAE.
    """
    row, column = np.divmod(np.arange(grid * grid), grid)
    patches = torch.cat([sincos(dim // 2, column), sincos(dim // 2, row)], dim=2)  # (1, N, D)
    return F.pad(patches, (0, 0, 1, 0))


def positions_for(pos_embed: Tensor, grid: int, temporal_embed: Tensor | None = None) -> Tensor:
    """Return positions (1, 1 + N, D) of CLS and of a grid x grid square at every time step.

    Interpolates pos_embed (1, 1 + n, D) if n is not grid ** 2; adds temporal_embed (1, steps, D).
    """
    if pos_embed.shape[1] != 1 + grid**2:
        pos_embed = resample_abs_pos_embed(pos_embed, [grid, grid])
    if temporal_embed is None:
        return pos_embed
    patches = (temporal_embed[:, :, None] + pos_embed[:, None, 1:]).flatten(1, 2)  # (1, N, D)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def patchify(views: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Cut images (B, 3, H, W), or clips (B, T, 3, H, W), into patches (B, N, P).

    The numbers of a patch are ordered by (frame, row, column, channel), the patches by (time, row,
    column). A patch of a clip is a tubelet of `tubelet_size` frames.
    """
    clips = views if views.ndim == 5 else views[:, None]
    B, T, _, H, W = clips.shape
    t, h, w, p = T // tubelet_size, H // patch_size, W // patch_size, patch_size
    x = clips.reshape(B, t, tubelet_size, 3, h, p, w, p)
    x = x.permute(0, 1, 4, 6, 2, 5, 7, 3)  # (B, t, h, w, tubelet, p, p, 3)
    return x.reshape(B, t * h * w, tubelet_size * p * p * 3)


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the K patches of every view with the smallest noise (B, N), which is uniform.

    Returns ids_keep (B, K), indices of the visible patches in the order of their noise; ids_restore
    (B, N), which puts tokens ordered as [visible, removed] back in place; mask (B, N), 1 = removed.
    """
    N = noise.shape[1]
    K = int(N * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1, stable=True)  # (B, N)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :K], ids_restore, (ids_restore >= K).float()


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of (B, N, D) at the indices (B, K): (B, K, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


# Section 3.1: encoder and decoder


def is_block(parent: nn.Module, module: nn.Module) -> bool:
    """Return whether a module is one unit of FSDP and of activation checkpointing."""
    return isinstance(module, Block)


def init_weights(module: nn.Module) -> None:
    """Initialise a Linear layer with Xavier-uniform weights and zero biases. Source: MAE."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """A ViT that sees only the visible patches of an image, or of a clip cut into tubelets.

    Parameters have timm's names; num_frames and tubelet_size are 1 for images. The rates of
    stochastic depth rise linearly from 0 to drop_path. Positions are fixed sines and cosines. With
    learn_positions they are trained, and those in time begin as zeros (source: mae_st).
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_frames: int = 1,
        tubelet_size: int = 1,
        drop_path: float = 0.0,
        learn_positions: bool = False,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"{img_size=}: must be a multiple of {patch_size=}")
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"{embed_dim=}: must be a multiple of 4 and of {num_heads=}")
        if num_frames % tubelet_size:
            raise ValueError(f"{num_frames=}: must be a multiple of {tubelet_size=}")
        self.img_size, self.patch_size = img_size, patch_size
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.grid = img_size // patch_size  # patches along a side
        self.steps = num_frames // tubelet_size  # tubelets along time
        self.num_patches = self.steps * self.grid**2  # N

        if num_frames == 1:
            proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
            self.temporal_embed = None
        else:
            kernel = (tubelet_size, patch_size, patch_size)
            proj = nn.Conv3d(3, embed_dim, kernel, kernel)
            times = sincos(embed_dim, np.arange(self.steps))
            if learn_positions:
                times = torch.zeros_like(times)
            self.temporal_embed = nn.Parameter(times, requires_grad=learn_positions)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), learn_positions)

        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LayerNorm, drop_path=rate)
            for rate in rates
        )
        self.norm = LayerNorm(embed_dim)
        self.apply(init_weights)
        nn.init.xavier_uniform_(proj.weight.view(embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    fsdp_wrap_fn = activation_checkpointing_fn = is_block  # Composer looks these names up

    def forward(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Return tokens after the final norm, CLS first: (B, 1 + K, D); all N without ids_keep.

        Images x are (B, 3, H, W), clips (B, T, 3, H, W), with H = W. If H is not img_size, but
        another multiple of patch_size, positions are interpolated.
        """
        grid = x.shape[-1] // self.patch_size
        pos_embed = positions_for(self.pos_embed, grid, self.temporal_embed)
        if x.ndim == 5:
            x = x.transpose(1, 2)  # (B, 3, T, H, W)
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + pos_embed[:, 1:]  # (B, N, D)
        if ids_keep is not None:
            x = take(x, ids_keep)  # (B, K, D)
        cls = self.cls_token + pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """A narrow ViT that predicts every patch from the visible tokens and a learned mask token."""

    def __init__(self, encoder: Encoder, embed_dim: int, depth: int, num_heads: int):
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            expected = f"must be a multiple of 4 and of decoder_num_heads={num_heads}"
            raise ValueError(f"decoder_embed_dim={embed_dim}: {expected}")
        self.steps = encoder.steps
        self.embed = nn.Linear(encoder.norm.normalized_shape[0], embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, encoder.grid), False)
        times = sincos(embed_dim, np.arange(encoder.steps))
        self.temporal_embed = nn.Parameter(times, False) if encoder.num_frames > 1 else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)
        self.pred = nn.Linear(embed_dim, encoder.patch_size**2 * 3 * encoder.tubelet_size)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    fsdp_wrap_fn = activation_checkpointing_fn = is_block

    def forward(self, tokens: Tensor, ids_restore: Tensor, num_decoded: int) -> Tensor:
        """Predict the patches (B, N, P) from the tokens (B, 1 + K, D) of the encoder.

        The blocks see the patches in the order of their noise, each with its own position. Only
        the first `num_decoded` of N are decoded; the predictions of the others are 0.
        """
        x = self.embed(tokens)
        B, K, D = len(x), x.shape[1] - 1, x.shape[2]
        N = ids_restore.shape[1]
        mask_tokens = self.mask_token.expand(B, num_decoded - K, D).to(x.dtype)
        ids = ids_restore.argsort(dim=1)[:, :num_decoded]  # (B, num_decoded), sorted by noise
        grid = math.isqrt(N // self.steps)
        pos_embed = positions_for(self.pos_embed, grid, self.temporal_embed).expand(B, -1, -1)
        positions = torch.cat([pos_embed[:, :1], take(pos_embed[:, 1:], ids)], dim=1)
        x = torch.cat([x, mask_tokens], dim=1) + positions  # (B, 1 + num_decoded, D)
        for block in self.blocks:
            x = block(x)
        pred = self.pred(self.norm(x)[:, 1:])  # (B, num_decoded, P)
        return take(F.pad(pred, (0, 0, 0, N - num_decoded)), ids_restore)  # (B, N, P)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or in float64 if x is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reconstruction_loss(pred: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Return the mean squared error of pred and target (B, N, P) where scored (B, N) is 1."""
    error = (at_least_fp32(pred) - at_least_fp32(target)).square().mean(dim=-1)  # (B, N)
    return (error * scored).sum() / scored.sum()


# Section 3.2: pooling, projector, InfoNCE

PoolKind = Literal["mean", "max", "gem", "cls"]


def pool_tokens(tokens: Tensor, kind: PoolKind) -> Tensor:
    """Pool the tokens (B, 1 + N, D) of a view into one vector (B, D): CLS, or the patches.

    "gem" is the generalised mean with exponent 3 of the positive part (Radenovic et al. 2018).
    """
    patches = tokens[:, 1:]
    if kind == "cls":
        return tokens[:, 0]
    if kind == "max":
        return patches.amax(dim=1)
    if kind == "gem":
        return patches.clamp(min=1e-6).pow(3).mean(dim=1).pow(1 / 3)
    assert kind == "mean", kind
    return patches.mean(dim=1)


class Head(nn.Sequential):
    """Linear layers from each of `widths` to the next, with BatchNorm and ReLU between them.

    The projector is D - hidden - hidden - out. BatchNorm sees one view of all samples at a time.
    """

    def __init__(self, *widths: int):
        layers = []
        for width, out in pairwise(widths):
            layers += [nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        super().__init__(*layers[:-2])
        self.apply(init_weights)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, V, out) of features (B, V, D)."""
        forward = super().forward
        return torch.stack([forward(view) for view in features.unbind(1)], dim=1)


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x of all ranks along dimension 0, with gradient. Return x itself on one rank.

    All ranks then compute the same InfoNCE. The backward pass sums the gradients of all ranks, and
    DDP and FSDP divide by their number: the gradient equals that of one rank with all samples. Each
    rank has a reconstruction loss of equally many patches, whose gradients are averaged too.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


def unit_rows(x: Tensor) -> Tensor:
    """Return unit vectors (V * B, out) of (B, V, out), in fp32 or better, first views first."""
    return F.normalize(at_least_fp32(x), dim=-1).transpose(0, 1).flatten(0, 1)


def info_nce(predictions: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return InfoNCE (NT-Xent), and the fraction of views that find their partner.

    Each prediction must find the target of its sample's other view among all 2B - 1 other targets.
    Both are (B of all ranks, 2, out); without a predictor they are the same tensor.

    Deviation: the official code numbers samples within a rank, so that samples of different ranks
    count as positives, and computes exp, sum and log. Here the loss is a cross-entropy in fp32.
    """
    assert predictions.shape[1] == 2, "InfoNCE pairs the two views of a sample"
    p, t = unit_rows(predictions), unit_rows(targets)  # (2B, out)
    partner = torch.arange(len(p), device=p.device).roll(len(p) // 2)
    cosines = (p @ t.T).fill_diagonal_(float("-inf"))  # (2B, 2B)
    matched = cosines.argmax(dim=1) == partner
    return F.cross_entropy(cosines / temperature, partner), matched.float().mean()


def feature_std(features: Tensor) -> Tensor:
    """Return the spread of normalised features (B, V, D): 1 if spread out, 0 if collapsed."""
    z = F.normalize(at_least_fp32(features.detach()), dim=-1)  # (B, V, D)
    return z.var(dim=0, unbiased=False).sum(dim=-1).mean().sqrt()


def layer_groups(model: nn.Module, coarse: bool = False) -> dict[str, str]:
    """Return timm's patterns for layer decay; parameters that match none are the last group."""
    return {
        "stem": r"encoder\.(?:cls_token|pos_embed|temporal_embed|patch_embed)",
        "blocks": r"encoder\.blocks\.(\d+)",
    }


class ViCMAE(ComposerModel):
    """Encoder, decoder and projector, with the loss that trains them (section 3).

    The default values are the official code's, for ViT-B.

    Args:
        img_size, patch_size: pixels.
        embed_dim, depth, num_heads: of the encoder.
            S 384/12/6, B 768/12/12, L 1024/24/16, H 1280/32/16 with patch 14.
        decoder_embed_dim, decoder_depth, decoder_num_heads: 512/8/16; for S 256/8/8.
        projector_hidden_dim, projector_out_dim: widths of the contrastive head.
        predictor: add a second head like the projector, which predicts the projection of the other
            view (yamls/paper.yaml). Without it, the projection itself is the prediction.
        mask_ratio: fraction of the patches of each view that is removed, in (0, 1).
        pool: pooling of the visible tokens before the projector, see pool_tokens.
        temperature: of InfoNCE, > 0.
        weight_recon, weight_contrast: weights of the two terms of the total loss.
        norm_pix_loss: normalise the target of a patch by its own mean and variance.
        chunk_size: pairs that pass through encoder and decoder at a time if a rank has more; the
            backward pass recomputes their activations. InfoNCE still sees all pairs.

    Raises:
        ValueError: an argument out of its range, sizes that do not divide, or two weights of 0.
    """

    num_frames = tubelet_size = 1  # images; subclasses that learn from clips set both
    group_matcher = layer_groups

    @validate_call
    def __init__(
        self,
        *,
        img_size: PositiveInt = 224,
        patch_size: PositiveInt = 16,
        embed_dim: PositiveInt = 768,
        depth: PositiveInt = 12,
        num_heads: PositiveInt = 12,
        decoder_embed_dim: PositiveInt = 512,
        decoder_depth: PositiveInt = 8,
        decoder_num_heads: PositiveInt = 16,
        projector_hidden_dim: PositiveInt = 4096,
        projector_out_dim: PositiveInt = 128,
        predictor: bool = False,
        mask_ratio: ProperFraction = 0.5,
        pool: PoolKind = "mean",
        temperature: PositiveFloat = 0.1,
        weight_recon: NonNegativeFloat = 0.97,
        weight_contrast: NonNegativeFloat = 0.03,
        norm_pix_loss: bool = True,
        chunk_size: PositiveInt | None = None,
    ):
        super().__init__()
        clip = (self.num_frames, self.tubelet_size)
        self.encoder = Encoder(img_size, patch_size, embed_dim, depth, num_heads, *clip)
        self.decoder = Decoder(self.encoder, decoder_embed_dim, decoder_depth, decoder_num_heads)
        widths = (embed_dim, projector_hidden_dim, projector_hidden_dim, projector_out_dim)
        self.projector = Head(*widths)
        self.predictor = Head(*widths) if predictor else None
        self.mask_ratio, self.pool, self.temperature = mask_ratio, pool, temperature
        self.weight_recon, self.weight_contrast = weight_recon, weight_contrast
        self.norm_pix_loss, self.chunk_size = norm_pix_loss, chunk_size
        self.decode_ratio = 1.0  # fraction of removed patches to decode, set by PartialDecoding
        self.ramp = 1.0  # factor of weight_contrast in [0, 1], set by ContrastRamp
        N = self.encoder.num_patches
        kept = self.masking(torch.zeros(1, N))[0].shape[1]
        if not 0 < kept < N:
            raise ValueError(f"mask_ratio={mask_ratio}: must keep and remove some of {N} patches")
        if not weight_recon and not weight_contrast:
            raise ValueError("weight_recon=0, weight_contrast=0: one of them must be positive")

    def flatten_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return views (B * V, [T,] 3, H, W) and their noise (B * V, N)."""
        views = batch["views"].flatten(0, 1)
        N = self.encoder.steps * (views.shape[-1] // self.encoder.patch_size) ** 2
        return views, batch["noise"].flatten(0, 1)[:, :N]

    def masking(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids_keep, ids_restore and mask of every view, see random_masking."""
        return random_masking(noise, self.mask_ratio)

    def reconstruct(self, views: Tensor, noise: Tensor) -> Tensors:
        """Encode and decode views (B, [T,] 3, H, W) under the masks that noise (B, N) gives.

        Returns features (B, D), pred (B, N, P), mask and scored (B, N).
        """
        ids_keep, ids_restore, mask = self.masking(noise)
        K, N = ids_keep.shape[1], noise.shape[1]
        num_decoded = K + math.ceil((N - K) * self.decode_ratio) if self.training else N
        tokens = self.encoder(views, ids_keep)  # (B, 1 + K, D)
        return {
            "features": pool_tokens(tokens, self.pool),
            "pred": self.decoder(tokens, ids_restore, num_decoded),
            "mask": mask,
            "scored": mask * (ids_restore < num_decoded),
        }

    def reconstruct_in_chunks(self, views: Tensor, noise: Tensor, size: int) -> Tensors:
        """Return the outputs of reconstruct, with activations of only `size` views in memory."""
        chunks = zip(views.split(size), noise.split(size), strict=True)
        parts = [checkpoint(self.reconstruct, *chunk, use_reentrant=False) for chunk in chunks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def project(self, features: Tensor, batch: Batch) -> Tensors:
        """Return predictions and targets (B of all ranks, V, out) of features (B, V, D).

        Deviation: the official projector sees the samples of one GPU. Here features are gathered
        first: BatchNorm spans all ranks, whose number changes no result. Subclasses use `batch`.
        """
        features = all_gather(features)
        targets = self.projector(features)
        predictions = self.predictor(features) if self.predictor else targets
        return {"predictions": predictions, "targets": targets}

    def forward(self, batch: Batch) -> Tensors:
        """Return the outputs of reconstruct, with dimensions (B, V) in place of B, and of project.

        The batch has `views` (B, V, 3, H, W), normalised, and `noise` (B, V, N), uniform. Views
        smaller than img_size use only the first numbers of their noise.
        """
        B, V = batch["views"].shape[:2]
        views, noise = self.flatten_views(batch)
        if self.training and self.chunk_size and self.chunk_size < B:
            outputs = self.reconstruct_in_chunks(views, noise, self.chunk_size * V)
        else:
            outputs = self.reconstruct(views, noise)
        outputs = {name: output.unflatten(0, (B, V)) for name, output in outputs.items()}
        return outputs | self.project(outputs["features"], batch)

    def target_patches(self, views: Tensor) -> Tensor:
        """Return what is predicted: the patches (B, N, P) of views (B, [T,] 3, H, W)."""
        return patchify(views, self.encoder.patch_size, self.tubelet_size)

    def patch_statistics(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each patch (B, N, P), by which it is normalised.

        Deviation: the official code computes them in half precision.
        """
        var, mean = torch.var_mean(at_least_fp32(target), dim=-1, keepdim=True)  # unbiased
        return mean, (var + 1e-6).sqrt()

    def reconstruction_term(self, outputs: Tensors, batch: Batch) -> Tensor:
        target = self.target_patches(batch["views"].flatten(0, 1))  # (B * V, N, P)
        if self.norm_pix_loss:
            mean, std = self.patch_statistics(target)
            target = (target - mean) / std
        pred, scored = outputs["pred"].flatten(0, 1), outputs["scored"].flatten(0, 1)
        return reconstruction_loss(pred, target, scored)

    def contrastive_term(self, outputs: Tensors) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss, and the fraction of views that find their partner."""
        return info_nce(outputs["predictions"], outputs["targets"], self.temperature)

    def loss(self, outputs: Tensors, batch: Batch) -> Tensors:
        """Return scalars that are logged as loss/train/NAME; Composer minimises total.

        total = weight_recon * reconstruction + ramp * weight_contrast * contrastive
        """
        reconstruction = self.reconstruction_term(outputs, batch)
        with torch.autocast(reconstruction.device.type, enabled=False):
            contrastive, accuracy = self.contrastive_term(outputs)
        weighted = self.weight_recon * reconstruction
        return {
            "total": weighted + self.ramp * self.weight_contrast * contrastive,
            "reconstruction": reconstruction.detach(),
            "accuracy": accuracy,
            "contrastive": contrastive.detach(),
            "feature_std": feature_std(outputs["features"]),
        }


# Section 4: transfer


class Classifier(ComposerModel):
    """The encoder on whole images or clips, pooled, with a linear head.

    Args:
        num_classes: C.
        img_size, patch_size, embed_dim, depth, num_heads: as pre-trained.
        num_frames: 1 for images, T for clips, which are cut into tubelets (source: mae_st).
        tubelet_size: frames of a tubelet; without effect on images.
        pool: "cls", or "mean" over the patches; both after the final norm.
        drop_path: stochastic depth rate of the last block, in [0, 1).
        dropout: before the head, in [0, 1).
        head_init_std: standard deviation of the head's initial weights.
    """

    head_per_data_set = False
    group_matcher = layer_groups

    @validate_call
    def __init__(
        self,
        num_classes: int,
        *,
        img_size: PositiveInt = 224,
        patch_size: PositiveInt = 16,
        embed_dim: PositiveInt = 768,
        depth: PositiveInt = 12,
        num_heads: PositiveInt = 12,
        num_frames: PositiveInt = 1,
        tubelet_size: PositiveInt = 2,
        pool: Literal["mean", "cls"] = "mean",
        drop_path: ProperFraction = 0.0,
        dropout: ProperFraction = 0.0,
        head_init_std: NonNegativeFloat = 2e-5,
    ):
        super().__init__()
        sizes = (img_size, patch_size, embed_dim, depth, num_heads)
        clip = (num_frames, tubelet_size if num_frames > 1 else 1)
        self.encoder = Encoder(*sizes, *clip, drop_path, learn_positions=True)
        self.neck = nn.Dropout(dropout)
        self.head_init_std = head_init_std
        self.head = self.new_head(num_classes)
        self.num_classes, self.pool = num_classes, pool
        self.class_names: list = []  # in the order of the logits; empty if unknown
        self.average = "softmax"  # of the views in evaluation: of their "softmax" or "logits"

    def _load_from_state_dict(self, state: Tensors, prefix: str, *arguments: object) -> None:
        # Checkpoints of earlier versions lack class names.
        state.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state, prefix, *arguments)

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint holds beside the weights: the class names, as bytes of JSON."""
        return torch.tensor(list(json.dumps(self.class_names).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if isinstance(state, Tensor):  # FSDP passes a placeholder if a checkpoint has no names
            self.class_names = json.loads(bytes(state.tolist()))

    def new_head(self, num_classes: int) -> nn.Linear:
        head = nn.Linear(self.encoder.norm.normalized_shape[0], num_classes)
        nn.init.trunc_normal_(head.weight, std=self.head_init_std)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, V, C) of `inputs` (B, V, T, 3, H, W), normalised; T = 1 for images."""
        x = batch["inputs"]
        B, V, T = x.shape[:3]
        x = x.flatten(0, 1 if T > 1 else 2)  # (B * V, T, 3, H, W), or (B * V, 3, H, W)
        features = pool_tokens(self.encoder(x), self.pool)  # (B * V, D)
        return self.head(self.neck(features)).unflatten(0, (B, V))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of logits (B, V, C) with `target`, (B,) or mixed (B, C)."""
        target = batch["target"].repeat_interleave(outputs.shape[1], dim=0)
        return F.cross_entropy(outputs.flatten(0, 1).float(), target)

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        """Return class probabilities (B, C), averaged over the views, see `average`."""
        logits = (self(batch) if outputs is None else outputs).float()
        if self.average == "logits":
            return logits.mean(dim=1).softmax(dim=-1)
        return logits.softmax(dim=-1).mean(dim=1)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Return top1, top5 (top C if C < 5) and confusion for evaluation, nothing for training."""
        if is_train:
            return {}
        # Samples that cannot be decoded have the target -1 and do not count.
        accuracy = partial(MulticlassAccuracy, self.num_classes, average="micro", ignore_index=-1)
        return {
            "top1": accuracy(top_k=1),
            "top5": accuracy(top_k=min(5, self.num_classes)),
            "confusion": MulticlassConfusionMatrix(self.num_classes, ignore_index=-1),
        }

    def update_metric(self, batch: Batch, outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs, batch["target"])
