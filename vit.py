"""The vision transformers: positions, patches, masking, encoder, decoder, pooling (paper section 3.1).

    encoder = Encoder(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    ids_keep, ids_restore, mask = random_masking(noise, mask_ratio=0.5)     # (B, K), (B, N), (B, N) of (B, N)
    tokens = encoder(images, ids_keep)                                      # (B, 1 + K, D) of (B, 3, H, W)

Parameters have the names of timm's and MAE's. The alphabet of shapes is at the top of model.py.
"""

import math
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

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
    x = x.reshape(B, t, u, 3, h, p, w, p).permute(0, 1, 4, 6, 2, 5, 7, 3)  # (B, t, h, w, u, p, p, 3)
    return x.reshape(B, t * h * w, u * p * p * 3)


def unpatchify(patches: Tensor, patch_size: int, num_frames: int = 1, tubelet_size: int = 1) -> Tensor:
    """Inverse of patchify for squares: (B, N, P) -> (B, 3, H, W), or (B, T, 3, H, W) if num_frames > 1."""
    B, N, _ = patches.shape
    t, u, p = num_frames // tubelet_size, tubelet_size, patch_size
    h = math.isqrt(N // t)
    x = patches.reshape(B, t, h, h, u, p, p, 3).permute(0, 1, 4, 7, 2, 5, 3, 6)  # (B, t, u, 3, h, p, w, p)
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
        ids_shuffle = (ids_shuffle[:, :, None] + places * torch.arange(steps, device=noise.device)).flatten(1)  # (B, N)
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
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads} and of 4")
        if num_frames % tubelet_size:
            raise ValueError(f"num_frames {num_frames} is not a multiple of tubelet_size {tubelet_size}")
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
            times = torch.zeros(1, self.steps, embed_dim) if learn_positions else sincos_times(embed_dim, self.steps)
            self.temporal_embed = nn.Parameter(times, requires_grad=learn_positions)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=learn_positions)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LayerNorm, drop_path=rate) for rate in rates
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
        pos_embed = positions_for(self.pos_embed, x.shape[-1] // self.patch_size, self.temporal_embed)
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
            raise ValueError(f"decoder_embed_dim {embed_dim} must be a multiple of its heads {num_heads} and of 4")
        self.embed = nn.Linear(encoder.norm.normalized_shape[0], embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, encoder.grid), requires_grad=False)
        self.steps = encoder.steps
        times = nn.Parameter(sincos_times(embed_dim, encoder.steps), requires_grad=False)
        self.temporal_embed = times if encoder.num_frames > 1 else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
        self.norm = LayerNorm(embed_dim)
        self.pred = nn.Linear(embed_dim, encoder.patch_size**2 * 3 * encoder.num_frames // encoder.steps)
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
    return {"cls": lambda: tokens[:, 0], "mean": lambda: patches.mean(dim=1), "max": lambda: patches.amax(dim=1)}[kind]()
