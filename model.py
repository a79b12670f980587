"""The vision transformers: positions, patches, masking, encoder, decoder, pooling (paper section 3.1).

    encoder = Encoder(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    ids_keep, ids_restore, mask = random_masking(noise, mask_ratio=0.5)     # (B, K), (B, N), (B, N) of (B, N)
    tokens = encoder(images, ids_keep)                                      # (B, 1 + K, D) of (B, 3, H, W)

Parameters have the names of timm's and MAE's. The alphabet of shapes is at the top of model.py.
"""

import math
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from composer import ComposerModel
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

from methods.contrastive import Momentum, simsiam, triplet, vicreg

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def sincos(dim: int, coordinate: np.ndarray) -> np.ndarray:
    """Sines, then cosines, of (n,) coordinates at dim / 2 frequencies from 1 down to 1/10000 -> (n, dim)."""
    angles = np.outer(coordinate, 10000.0 ** (-np.arange(dim // 2) / (dim / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a square grid, a zero row for CLS first -> (1, 1 + grid * grid, dim).

    The first half of the width encodes the column, the second the row. Source: MAE, as kept in ViC-MAE's checkpoints.
    """
    row, column = np.divmod(np.arange(grid * grid), grid)
    table = np.concatenate([sincos(dim // 2, column), sincos(dim // 2, row)], axis=1)  # (N, D)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), table])).float()[None]


def sincos_times(dim: int, steps: int) -> Tensor:
    """Fixed sine-cosine positions in time, to be added to those in space -> (1, steps, dim)."""
    return torch.from_numpy(sincos(dim, np.arange(steps))).float()[None]


def patchify(views: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Cut (B, 3, H, W), or clips (B, T, 3, H, W), into patches, each as (frame, row, column, channel) -> (B, N, P).

    Patches stand row by row; those of a clip, tubelets of `tubelet_size` frames, one time after another.
    """
    x = views if views.ndim == 5 else views[:, None]
    B, T, _, H, W = x.shape
    t, u, h, w, p = T // tubelet_size, tubelet_size, H // patch_size, W // patch_size, patch_size
    x = x.reshape(B, t, u, 3, h, p, w, p).permute(
        0, 1, 4, 6, 2, 5, 7, 3
    )  # (B, t, h, w, u, p, p, 3)
    return x.reshape(B, t * h * w, u * p * p * 3)


def unpatchify(
    patches: Tensor, patch_size: int, num_frames: int = 1, tubelet_size: int = 1
) -> Tensor:
    """Inverse of patchify for squares: (B, N, P) -> (B, 3, H, W), or (B, T, 3, H, W) if num_frames > 1."""
    B, N, _ = patches.shape
    t, u, p = num_frames // tubelet_size, tubelet_size, patch_size
    h = math.isqrt(N // t)
    x = patches.reshape(B, t, h, h, u, p, p, 3).permute(
        0, 1, 4, 7, 2, 5, 3, 6
    )  # (B, t, u, 3, h, p, w, p)
    x = x.reshape(B, num_frames, 3, h * p, h * p)
    return x if num_frames > 1 else x.squeeze(1)


MaskKind = Literal["random", "tube", "none"]


def random_masking(
    noise: Tensor, mask_ratio: float, kind: MaskKind = "random", steps: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the visible patches: those with the smallest noise.

    Args:
        noise: (B, N) uniform random numbers, the only source of randomness.
        mask_ratio: fraction of patches removed, in (0, 1).
        kind: "random" in space and time; "tube" at the same places in all `steps` of a clip; "none" are removed.

    Returns:
        ids_keep (B, K), in the order of their noise; ids_restore (B, N), which puts [kept, removed] back in place;
        mask (B, N), 1 = removed.
    """
    N = noise.shape[1]
    K = N if kind == "none" else int(N * (1 - mask_ratio))
    places = N // steps if kind == "tube" else N
    ids_shuffle = noise[:, :places].argsort(dim=1, stable=True)  # (B, N); of tubes, (B, N / steps)
    if kind == "tube":
        ids_shuffle = (
            ids_shuffle[:, :, None] + places * torch.arange(steps, device=noise.device)
        ).flatten(1)  # (B, N)
        K = steps * int(places * (1 - mask_ratio))
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :K], ids_restore, (ids_restore >= K).float()


def positions_for(pos_embed: Tensor, grid: int, temporal_embed: Tensor | None = None) -> Tensor:
    """Positions (1, 1 + N, D) of CLS and a square grid, interpolated (bicubic) if it is not the one they were made for.

    With temporal_embed (1, steps, D), those of the grids of all steps, time outermost.
    """
    if pos_embed.shape[1] != 1 + grid**2:
        pos_embed = resample_abs_pos_embed(pos_embed, [grid, grid])
    if temporal_embed is None:
        return pos_embed
    patches = (temporal_embed[:, :, None] + pos_embed[:, None, 1:]).flatten(1, 2)  # (1, N, D)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows of (B, N, D) by (B, K) indices -> (B, K, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def is_block(_: nn.Module, module: nn.Module) -> bool:
    """What Composer asks a child of a model, as its method: whether a module is a unit of FSDP, or of checkpointing."""
    return isinstance(module, Block)


def flops_of(blocks: nn.ModuleList, tokens: int, width: int) -> int:
    """Floating-point operations of one sample's forward pass through ViT blocks, 2 for a multiply-add of matrices."""
    return len(blocks) * (24 * tokens * width**2 + 4 * tokens**2 * width)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear; LayerNorms begin as the identity. Source: MAE."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """A ViT that is given only the visible patches of an image, or of a clip as joint space-time tubelets.

    Args:
        img_size, patch_size: pixels; the first a multiple of the second.
        embed_dim, depth, num_heads: D, blocks, heads.
        num_frames, tubelet_size: frames of a clip and of one of its patches; 1 for images.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
        learn_positions: whether positions are trained (fine-tuning; those in time begin at zero) or fixed (pre-training).
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
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(
                f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads} and of 4"
            )
        if num_frames % tubelet_size:
            raise ValueError(
                f"num_frames {num_frames} is not a multiple of tubelet_size {tubelet_size}"
            )
        self.img_size, self.patch_size = img_size, patch_size
        self.grid = img_size // patch_size
        self.num_frames = num_frames
        self.steps = num_frames // tubelet_size
        self.num_patches = self.steps * self.grid**2
        if num_frames == 1:
            proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
            self.temporal_embed = None
        else:
            kernel = (tubelet_size, patch_size, patch_size)
            proj = nn.Conv3d(3, embed_dim, kernel, kernel)
            times = (
                torch.zeros(1, self.steps, embed_dim)
                if learn_positions
                else sincos_times(embed_dim, self.steps)
            )
            self.temporal_embed = nn.Parameter(times, requires_grad=learn_positions)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(
            sincos_positions(embed_dim, self.grid), requires_grad=learn_positions
        )
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LayerNorm, drop_path=rate)
            for rate in rates
        )
        self.norm = LayerNorm(embed_dim)
        self.apply(init_weights)
        nn.init.xavier_uniform_(proj.weight.view(embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    fsdp_wrap_fn = activation_checkpointing_fn = is_block

    def forward(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode (B, 3, H, W), or (B, T, 3, H, W) if num_frames > 1, with all patches or those of ids_keep (B, K).

        H and W may be other multiples of patch_size than img_size: N follows them.
        Returns the tokens after the final norm, CLS first: (B, 1 + N, D) or (B, 1 + K, D).
        """
        pos_embed = positions_for(
            self.pos_embed, x.shape[-1] // self.patch_size, self.temporal_embed
        )
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
    """A narrow ViT that predicts every patch from the visible tokens and a learned token in place of the rest."""

    def __init__(self, encoder: Encoder, embed_dim: int, depth: int, num_heads: int):
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(
                f"decoder_embed_dim {embed_dim} must be a multiple of its heads {num_heads} and of 4"
            )
        self.embed = nn.Linear(encoder.norm.normalized_shape[0], embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(
            sincos_positions(embed_dim, encoder.grid), requires_grad=False
        )
        self.steps = encoder.steps
        times = nn.Parameter(sincos_times(embed_dim, encoder.steps), requires_grad=False)
        self.temporal_embed = times if encoder.num_frames > 1 else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)
        self.pred = nn.Linear(
            embed_dim, encoder.patch_size**2 * 3 * encoder.num_frames // encoder.steps
        )
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    fsdp_wrap_fn = activation_checkpointing_fn = is_block

    def forward(self, tokens: Tensor, ids_restore: Tensor, decoded: int | None = None) -> Tensor:
        """Visible tokens with CLS (B, 1 + K, D) and ids_restore (B, N) -> pred (B, N, P).

        With `decoded`, only the K visible and the first decoded - K removed patches, in the order of their noise, take part:
        pred of the others is 0.
        """
        x = self.embed(tokens)
        B, L, D = x.shape
        N = ids_restore.shape[1]
        decoded = decoded or N
        masked = self.mask_token.expand(B, decoded + 1 - L, D).to(x.dtype)
        ids = ids_restore.argsort(dim=1)[:, :decoded]  # (B, decoded), visible first
        pos_embed = positions_for(self.pos_embed, math.isqrt(N // self.steps), self.temporal_embed)
        pos_embed = pos_embed.expand(B, -1, -1)
        positions = torch.cat([pos_embed[:, :1], take(pos_embed[:, 1:], ids)], dim=1)
        x = torch.cat([x, masked], dim=1) + positions  # (B, 1 + decoded, D)
        for block in self.blocks:
            x = block(x)
        pred = self.pred(self.norm(x)[:, 1:])  # (B, decoded, P)
        return take(F.pad(pred, (0, 0, 0, N - decoded)), ids_restore)  # (B, N, P)


PoolKind = Literal["mean", "max", "gem", "cls"]


def pool(tokens: Tensor, kind: PoolKind) -> Tensor:
    """(B, 1 + N, D) -> (B, D): "cls", or of the patches without it "mean", "max" or "gem".

    "gem" is the generalised mean with exponent 3, of what is positive (Radenovic et al. 2018).
    """
    patches = tokens[:, 1:]
    if kind == "gem":
        return patches.clamp(min=1e-6).pow(3).mean(dim=1).pow(1 / 3)
    return {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: patches.mean(dim=1),
        "max": lambda: patches.amax(dim=1),
    }[kind]()


class Head(nn.Sequential):
    """Linear layers from each of `widths` to the next, BatchNorm and ReLU between them.

    The projector is D - hidden - hidden - out; a predictor (SimSiam, MoCo v3) is out - hidden - out.
    """

    def __init__(self, *widths: int):
        layers = []
        for width, following in pairwise(widths):
            layers += [
                nn.Linear(width, following),
                nn.BatchNorm1d(following),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers[:-2])
        self.apply(init_weights)


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x over the ranks along dimension 0, with gradient; x itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


def at_least_fp32(x: Tensor) -> Tensor:
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
    return F.normalize(at_least_fp32(x), dim=-1).transpose(0, 1).flatten(0, 1)


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
        logits = torch.cat(
            [(p * t[partner]).sum(dim=1, keepdim=True), p @ at_least_fp32(z.queue).T], dim=1
        )  # (2B, 1 + Q)
        partner = torch.zeros_like(partner)
    ahead = logits.argmax(dim=1) == partner
    if (
        z.queue is not None
    ):  # the first of equals; where all features are the same, no view finds its partner
        ahead = logits[:, 0] > logits[:, 1:].amax(dim=1)
    return F.cross_entropy(logits / temperature, partner), ahead.float().mean()


ProperFraction = Annotated[float, Field(ge=0, lt=1)]


def reconstruction_loss(
    pred: Tensor,
    views: Tensor,
    mask: Tensor,
    patch_size: int,
    norm_pix_loss: bool,
    tubelet_size: int = 1,
) -> Tensor:
    """Mean squared error over the removed patches, at least in fp32.

    Args:
        pred: (B, N, P).
        views: (B, 3, H, W), or (B, T, 3, H, W): the input itself.
        mask: (B, N), 1 = removed.
        norm_pix_loss: normalise each target patch by its own mean and unbiased variance.
    """
    target = patchify(at_least_fp32(views), patch_size, tubelet_size)
    if norm_pix_loss:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    error = (at_least_fp32(pred) - target).square().mean(dim=-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


class ViCMAE(ComposerModel):
    """The encoder, the decoder and the projector, with the loss that trains them (paper section 3; `code` preset).

    Other methods of the comparison are other arguments; README, "The family", says which.

    Args:
        img_size, patch_size: pixels.
        num_frames, tubelet_size: frames of a view and of one of its patches; 1 frame: views are images.
        embed_dim, depth, num_heads: of the encoder. S 384/12/6, B 768/12/12, L 1024/24/16, H 1280/32/16 (patch 14).
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder. 512/8/16; S 256/8/8.
        projector_hidden_dim, projector_out_dim: of the contrastive head.
        predictor_hidden_dim: of a second head, which predicts the other view's projection; that is then a target without
            gradient. None for one head, shared by both views.
        mask, mask_ratio: see random_masking. With "none" there is no decoder.
        pool: what of the visible tokens is projected, see pool.
        contrast: the contrastive term; "moco" is InfoNCE with a momentum encoder and a queue. With "none" no head is there.
        positives: of "triplet": the other view of a sample, or views of its label's samples too.
        temperature: of InfoNCE, > 0.
        margin: of "triplet", in squared distance of unit vectors.
        momentum, queue_size: see Momentum, which algorithms.MomentumStep lets follow.
        weight_contrast, weight_recon: of the two terms in the total.
        norm_pix_loss: whether the target of a patch is normalised by its own mean and variance.
        chunk_size: pairs that pass encoder and decoder at a time, and again in the backward pass, so that memory holds the
            activations of one chunk, while InfoNCE still sees the whole batch. None for all at once.

    Attributes:
        decode_ratio: fraction of the removed patches, in (0, 1], that is decoded in training.
        ramp: factor of weight_contrast, in [0, 1]. PartialDecoding and ContrastRamp of algorithms.py set the two.

    Raises:
        ValueError: sizes that do not divide, a mask_ratio that keeps no patch or removes none, or nothing to learn.
    """

    def __init__(
        self,
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
        mask_ratio: ProperFraction = 0.5,
        temperature: PositiveFloat = 0.1,
        weight_contrast: NonNegativeFloat = 0.03,
        weight_recon: NonNegativeFloat = 0.97,
        norm_pix_loss: bool = True,
        chunk_size: PositiveInt | None = None,
        num_frames: PositiveInt = 1,
        tubelet_size: PositiveInt = 2,
        mask: MaskKind = "random",
        pool: PoolKind = "mean",
        contrast: Literal["info_nce", "triplet", "moco", "simsiam", "vicreg", "none"] = "info_nce",
        predictor_hidden_dim: PositiveInt | None = None,
        positives: Literal["view", "label"] = "view",
        margin: PositiveFloat = 0.2,
        momentum: ProperFraction = 0.999,
        queue_size: PositiveInt = 65536,
    ):
        super().__init__()
        self.tubelet_size = tubelet_size if num_frames > 1 else 1
        self.encoder = Encoder(
            img_size, patch_size, embed_dim, depth, num_heads, num_frames, self.tubelet_size
        )
        self.mask, self.mask_ratio, self.decode_ratio, self.ramp = mask, mask_ratio, 1.0, 1.0
        N = self.encoder.num_patches
        if mask != "none" and not 0 < self.kept(N)[0] < N:
            raise ValueError(
                f"mask_ratio {mask_ratio} must keep and remove at least one of {N} patches"
            )
        if not (weight_recon and mask != "none") and not (weight_contrast and contrast != "none"):
            raise ValueError(
                "mask and contrast are none, or their weights 0: there is nothing to learn"
            )
        if positives == "label" and contrast != "triplet":
            raise ValueError(f"positives label is for contrast triplet, not {contrast}")
        if contrast == "simsiam" and not predictor_hidden_dim:
            raise ValueError(
                "contrast simsiam needs predictor_hidden_dim: without a predictor all features become the same"
            )
        if predictor_hidden_dim and contrast not in ("info_nce", "moco", "simsiam"):
            raise ValueError(
                f"predictor_hidden_dim is not for contrast {contrast}, which has no targets; set it to null"
            )
        self.decoder = self.projector = self.predictor = self.momentum = None
        if mask != "none":
            self.decoder = Decoder(
                self.encoder, decoder_embed_dim, decoder_depth, decoder_num_heads
            )
        if contrast != "none":
            self.projector = Head(
                embed_dim, projector_hidden_dim, projector_hidden_dim, projector_out_dim
            )
        if predictor_hidden_dim:
            self.predictor = Head(projector_out_dim, predictor_hidden_dim, projector_out_dim)
        if contrast == "moco":
            self.momentum = Momentum(self.encoder, self.projector, momentum, queue_size)
        self.contrast = contrast
        self.pool = pool
        self.positives = positives
        self.temperature = temperature
        self.margin = margin
        self.weight_contrast = weight_contrast
        self.weight_recon = weight_recon
        self.norm_pix_loss = norm_pix_loss
        self.chunk_size = chunk_size

    def kept(self, N: int) -> tuple[int, int]:
        """How many of N patches the encoder sees, and how many the decoder decodes in training."""
        K = random_masking(
            torch.zeros(1, N, device="cpu"), self.mask_ratio, self.mask, self.encoder.steps
        )[0].shape[1]
        return K, K + math.ceil((N - K) * self.decode_ratio)

    def reconstruct(self, views: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Views (B, [T,] 3, H, W) with noise (B, N) -> features (B, D); and, where patches are removed, see forward, pred
        (B, N, P), mask (B, N), scored (B, N).
        """
        ids_keep, ids_restore, mask = random_masking(
            noise, self.mask_ratio, self.mask, self.encoder.steps
        )
        if self.decoder is None:
            return (pool(self.encoder(views), self.pool),)
        decoded = self.kept(noise.shape[1])[1] if self.training else noise.shape[1]
        tokens = self.encoder(views, ids_keep)  # (B, 1 + K, D)
        features, pred = pool(tokens, self.pool), self.decoder(tokens, ids_restore, decoded)
        return features, pred, mask, mask * (ids_restore < decoded)

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Features (B, V, D) of this rank -> (B of all ranks, V, out).

        Deviation: the official projector sees one GPU's samples. Gathered first, its BatchNorm spans the global batch, one
        view at a time as there, and the result does not depend on the number of ranks.
        """
        return torch.stack([projector(view) for view in all_gather(features).unbind(1)], dim=1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Reconstruct all views and project what is pooled of their visible tokens.

        Args:
            batch: `views` (B, V, 3, H, W), or (B, V, T, 3, H, W), normalised; `noise` (B, V, N), uniform, of which only the
                first is used where the views are smaller than img_size; `target` (B,), if positives are by label.

        Returns:
            features (B, V, D), pooled; where patches are removed, pred (B, V, N, P), mask (B, V, N) and scored (B, V, N), 1
            where a patch is removed and decoded; with a contrastive term, projected (of all ranks).
        """
        shape = batch["views"].shape[:2]  # (B, V)
        views, noise = batch["views"].flatten(0, 1), batch["noise"].flatten(0, 1)  # (B * V, ...)
        noise = noise[:, : self.encoder.steps * (views.shape[-1] // self.encoder.patch_size) ** 2]
        if self.chunk_size and self.training:
            size = self.chunk_size * shape[1]
            chunks = zip(views.split(size), noise.split(size), strict=True)
            parts = [checkpoint(self.reconstruct, *chunk, use_reentrant=False) for chunk in chunks]
            parts = [torch.cat(part) for part in zip(*parts, strict=True)]
        else:
            parts = self.reconstruct(views, noise)
        names = ("features", "pred", "mask", "scored")
        outputs = {name: part.unflatten(0, shape) for name, part in zip(names, parts, strict=False)}
        if self.projector is not None:
            outputs["projected"] = self.contrasted(outputs["features"], views, noise, batch)
        return outputs

    def contrasted(
        self, features: Tensor, views: Tensor, noise: Tensor, batch: dict[str, Tensor]
    ) -> Projected:
        """What the contrastive term is given: the projections, and with a predictor or MoCo what they are to be like."""
        predictions = targets = self.project(self.projector, features)
        if self.predictor is not None:
            predictions = torch.stack([self.predictor(view) for view in targets.unbind(1)], dim=1)
            targets = targets.detach()
        labels = all_gather(batch["target"]) if self.positives == "label" else None
        if self.momentum is None:
            return Projected(predictions, targets, labels)
        with torch.no_grad():
            ids_keep = random_masking(noise, self.mask_ratio, self.mask, self.encoder.steps)[0]
            keys = pool(self.momentum.encoder(views, ids_keep), self.pool).unflatten(
                0, features.shape[:2]
            )
            keys, queue = self.project(self.momentum.projector, keys), self.momentum.queue.clone()
            if self.training:
                self.momentum.push(keys)
        return Projected(predictions, keys, labels, queue)

    def loss(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """total = weight_recon * reconstruction + weight_contrast * contrastive, and these; all scalars.

        Beside them, what tells whether the contrastive task is learnt, or solved by collapse: `accuracy`, see the terms, and
        `feature_std`, of the normalised features over this rank's samples, times sqrt(D): 1 if spread out, 0 if collapsed.
        """
        losses = {}
        z = F.normalize(at_least_fp32(outputs["features"].detach()), dim=-1)  # (B, V, D)
        total = 0.0
        if self.decoder is not None:
            pred, views, scored = (
                x.flatten(0, 1) for x in (outputs["pred"], batch["views"], outputs["scored"])
            )
            sizes = (self.encoder.patch_size, self.norm_pix_loss, self.tubelet_size)
            reconstruction = reconstruction_loss(pred, views, scored, *sizes)
            total = self.weight_recon * reconstruction
            losses["reconstruction"] = reconstruction.detach()
        if self.projector is not None:
            contrastive, losses["accuracy"] = self.term(outputs["projected"])
            total = total + self.ramp * self.weight_contrast * contrastive
            losses["contrastive"] = contrastive.detach()
        losses["feature_std"] = z.var(dim=0, unbiased=False).sum(dim=-1).mean().sqrt()
        return {"total": total} | losses

    def term(self, projected: Projected) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and the fraction of views that find their partner; at least in fp32."""
        with torch.autocast(projected.predictions.device.type, enabled=False):
            if self.contrast in ("info_nce", "moco"):
                return info_nce(projected, self.temperature)
            if self.contrast == "triplet":
                return triplet(projected, self.margin)
            return simsiam(projected) if self.contrast == "simsiam" else vicreg(projected)

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this rank's batch, for MFU: 2 for a multiply-add of matrices.

        The backward pass takes twice the forward's, but for the patches, which need no gradient. What is computed anew in it
        does not count, nor do the few products of a contrastive term but InfoNCE's.
        """
        B, V = batch["views"].shape[:2]
        side, p = batch["views"].shape[-2], self.encoder.patch_size  # square, in either layout
        N, P, D = (
            self.encoder.steps * (side // p) ** 2,
            3 * p**2 * self.tubelet_size,
            self.encoder.norm.normalized_shape[0],
        )
        K, decoded = self.kept(N)
        embed, encode, decode = 2 * N * P * D, flops_of(self.encoder.blocks, 1 + K, D), 0
        if self.decoder is not None:
            d = self.decoder.norm.normalized_shape[0]
            decode = (
                flops_of(self.decoder.blocks, 1 + decoded, d)
                + 2 * (1 + K) * D * d
                + 2 * decoded * d * P
            )
        total = B * V * (2 * embed + 3 * (encode + decode))
        if self.projector is None:
            return total
        gathered = V * B * (dist.get_world_size() if dist.is_initialized() else 1)
        one, two = (
            sum(
                2 * gathered * layer.weight.numel()
                for layer in head or ()
                if isinstance(layer, nn.Linear)
            )
            for head in (self.projector, self.predictor)
        )
        out = self.projector[-1].out_features
        if self.momentum is not None:
            return (
                total
                + B * V * (embed + encode)
                + 4 * one
                + 2 * 2 * gathered * self.momentum.queue.numel()
            )
        return total + 3 * (one + two) + 3 * 2 * gathered**2 * out


class GlobalBatchNorm(nn.BatchNorm1d):
    """A BatchNorm over the samples of all ranks; for features that need no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        gathered = super().forward(all_gather(x))  # (B of all ranks, D)
        return gathered.view(-1, *x.shape)[dist.get_rank() if len(gathered) > len(x) else 0]


class ProbeHeads(nn.ModuleList):
    """Linear heads on the same features, each to be trained at a learning rate of its own; in evaluation, the best of them.

    The best has most of the held-out training samples right, a step counting 0.98 of the next.
    """

    def __init__(self, dim: int, num_classes: int, count: int):
        super().__init__(nn.Linear(dim, num_classes) for _ in range(count))
        self.register_buffer("right", torch.zeros(count))

    def best(self) -> int:
        return int(self.right.argmax())

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, heads, C) in training, (B, C) in evaluation."""
        return (
            torch.stack([head(x) for head in self], dim=1)
            if self.training
            else self[self.best()](x)
        )

    @torch.no_grad()
    def count(self, logits: Tensor, held_out: Tensor) -> None:
        """Count what is right of logits (B, heads, C), where held_out (B,) is a label; -1 is a sample trained on."""
        right = (logits.argmax(dim=-1) == held_out[:, None]).sum(dim=0).float()  # (heads,)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(right)
        self.right.mul_(0.98).add_(right)


class DataSetHeads(nn.ModuleList):
    """A linear head for each of several data sets, whose classes stand one data set after another."""

    def __init__(self, dim: int, classes: list[int]):
        super().__init__(nn.Linear(dim, count) for count in classes)
        owner = [number for number, count in enumerate(classes) for _ in range(count)]
        self.register_buffer(
            "owner", torch.tensor(owner), persistent=False
        )  # (C,), the data set of a class

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, C) log-probabilities, of each data set among its own classes."""
        return torch.cat([head(x).log_softmax(dim=-1) for head in self], dim=-1)


class Classifier(ComposerModel):
    """The encoder on whole images or clips, pooled, with a linear head (transfer, paper section 4).

    Args:
        num_classes: C; or those of several data sets, for a head each.
        img_size, patch_size, embed_dim, depth, num_heads: of the encoder, as pre-trained.
        num_frames: 1 for images; T for clips, then tubelets of `tubelet_size` frames and learned temporal positions that
            begin at zero (source: mae_st's way of adapting a 2-D encoder).
        pool: "cls", or "mean" over the patches; both after the final norm.
        drop_path: stochastic depth rate of the last block, in [0, 1).
        dropout: before the head, in [0, 1).
        head_init_std: of the head's weights.
        freeze: linear probe: the encoder is fixed, and an affine-free BatchNorm stands before the head (source: MAE).
        heads: how many linear heads are trained at once, see ProbeHeads.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        num_classes: int | list[int],
        heads: int = 1,
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
        freeze: bool = False,
    ):
        super().__init__()
        tubelet = tubelet_size if num_frames > 1 else 1
        self.encoder = Encoder(
            img_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            num_frames,
            tubelet,
            drop_path,
            learn_positions=True,
        )
        self.neck = (
            GlobalBatchNorm(embed_dim, affine=False, eps=1e-6) if freeze else nn.Dropout(dropout)
        )
        if isinstance(num_classes, list):
            self.head = DataSetHeads(embed_dim, num_classes)
        else:
            self.head = (
                nn.Linear(embed_dim, num_classes)
                if heads == 1
                else ProbeHeads(embed_dim, num_classes, heads)
            )
        for layer in self.head if isinstance(self.head, nn.ModuleList) else [self.head]:
            nn.init.trunc_normal_(layer.weight, std=head_init_std)
            nn.init.zeros_(layer.bias)
        self.pool = pool
        self.freeze = freeze
        if freeze:
            self.encoder.requires_grad_(False)
        self.num_classes = sum(num_classes) if isinstance(num_classes, list) else num_classes

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """For timm's layer decay: embedding and positions are layer 0, block b is b + 1, norm and head come last."""
        return {
            "stem": r"encoder\.(?:cls_token|pos_embed|temporal_embed|patch_embed)",
            "blocks": r"encoder\.blocks\.(\d+)",
        }

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`inputs` (B, V, T, 3, H, W), normalised; T = 1 for images -> logits of every view (B, V, C).

        With several heads, (B, V, heads, C) in training.
        """
        x = batch["inputs"]
        shape = x.shape[:2]
        x = x.flatten(0, 1)  # (B * V, T, 3, H, W)
        tokens = self.encoder(x if x.shape[1] > 1 else x.squeeze(1))
        return self.head(self.neck(pool(tokens, self.pool))).unflatten(0, shape)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of every view with `target`, (B,) labels or (B, C) mixed ones, in fp32; several heads' sum."""
        V = outputs.shape[1]
        logits = outputs.flatten(0, 1).float()  # (B * V, C) or (B * V, heads, C)
        target = batch["target"].repeat_interleave(V, dim=0)
        if isinstance(self.head, DataSetHeads):  # whose probabilities sum up to the number of heads
            return F.cross_entropy(logits, target) - math.log(len(self.head))
        if logits.ndim == 2:
            return F.cross_entropy(logits, target)
        self.head.count(logits, batch["held_out"].repeat_interleave(V))
        return sum(F.cross_entropy(one, target) for one in logits.unbind(1))

    def eval_forward(self, batch: dict[str, Tensor], outputs: Tensor | None = None) -> Tensor:
        """Class probabilities (B, C), the softmax averaged over the views; 0 for classes of a data set not its own."""
        probabilities = (
            (self(batch) if outputs is None else outputs).float().softmax(dim=-1).mean(dim=1)
        )
        if isinstance(self.head, DataSetHeads):
            owner = self.head.owner
            return probabilities * len(self.head) * (owner == owner[batch["target"]][:, None])
        return probabilities

    def get_metrics(self, is_train: bool = False) -> dict[str, MulticlassAccuracy]:
        """top1 and top5 (topC where there are fewer classes) for evaluation, none in training."""
        sizes = {} if is_train else {"top1": 1, "top5": min(5, self.num_classes)}
        how = {"average": "micro", "ignore_index": -1}  # of what cannot be decoded
        return {
            name: MulticlassAccuracy(self.num_classes, top_k=k, **how) for name, k in sizes.items()
        }

    def update_metric(
        self, batch: dict[str, Tensor], outputs: Tensor, metric: MulticlassAccuracy
    ) -> None:
        metric.update(outputs, batch["target"])

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this rank's batch, counted as those of ViCMAE."""
        B, V, _, _, H, _ = batch["inputs"].shape
        proj, D = self.encoder.patch_embed["proj"], self.encoder.norm.normalized_shape[0]
        N = self.encoder.steps * (H // self.encoder.patch_size) ** 2
        embed = 2 * N * proj.weight.numel()
        blocks = flops_of(self.encoder.blocks, 1 + N, D)
        heads = sum(
            2 * parameter.numel() for parameter in self.head.parameters() if parameter.ndim == 2
        )
        return (
            B
            * V
            * (embed + blocks + 2 * heads if self.freeze else 2 * embed + 3 * (blocks + heads))
        )
