"""ViC-MAE in plain torch, to which bench_train.py and bench_gpu.py compare model.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ViCMAE


class Block(nn.Module):
    """A transformer block; `fused` as in PlainViCMAE."""

    def __init__(self, dim: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.wide = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        if self.fused:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(B, L, D))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class PlainViCMAE(nn.Module):
    """ViC-MAE as one would write it with torch alone: a pass for each view.

    Args:
        ours: the model whose sizes it takes.
        fused: whether attention is one call of torch; otherwise it is written out, as in the timm
            of the official code (0.3.2).
    """

    def __init__(self, ours: ViCMAE, fused: bool):
        super().__init__()
        encoder, decoder = ours.encoder, ours.decoder
        D, d, p = encoder.pos_embed.shape[2], decoder.pos_embed.shape[2], encoder.patch_size
        hidden, out = ours.projector[0].out_features, ours.projector[-1].out_features
        self.patch_size, self.mask_ratio, self.temperature = p, ours.mask_ratio, ours.temperature
        self.weights = (ours.weight_recon, ours.weight_contrast)
        # The positions are fixed, and copied since computing them is not part of a step.
        self.register_buffer("positions", encoder.pos_embed.detach().clone())
        self.register_buffer("decoder_positions", decoder.pos_embed.detach().clone())
        # Layers stand in the order of ours, on which copy_weights relies.
        self.cls = nn.Parameter(torch.zeros(1, 1, D))
        self.patches = nn.Conv2d(3, D, p, p)
        heads = [block.attn.num_heads for block in encoder.blocks]
        self.encoder = nn.Sequential(*(Block(D, count, fused) for count in heads))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.to_decoder = nn.Linear(D, d)
        heads = [block.attn.num_heads for block in decoder.blocks]
        self.decoder = nn.Sequential(*(Block(d, count, fused) for count in heads))
        self.decoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.to_pixels = nn.Linear(d, 3 * p * p)
        first = (nn.Linear(D, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        second = (nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.projector = nn.Sequential(*first, *second, nn.Linear(hidden, out))

    def copy_weights(self, ours: ViCMAE) -> None:
        """Copy the trained parameters of our model."""
        # PyTorch lists the parameters of a module itself, here the tokens, before its layers'.
        tokens = [ours.encoder.cls_token, ours.decoder.mask_token]
        trained = {name: value for name, value in ours.named_parameters() if value.requires_grad}
        others = [value for name, value in trained.items() if not name.endswith("_token")]
        with torch.no_grad():
            for own, value in zip(self.parameters(), [*tokens, *others], strict=True):
                own.copy_(value)

    def one_view(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction loss and the projections (B, out) of a view.

        Args:
            images: (B, 3, H, W).
            noise: (B, N).
        """
        B, N = noise.shape
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        keep = order[:, : int(N * (1 - self.mask_ratio))]  # (B, K)
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]  # (B, N, D)
        x = torch.gather(x, 1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (B, K, D)
        x = torch.cat([(self.cls + self.positions[:, :1]).expand(B, -1, -1), x], dim=1)
        tokens = self.norm(self.encoder(x))  # (B, 1 + K, D)

        x = self.to_decoder(tokens)
        hidden = self.mask_token.expand(B, N - keep.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = torch.gather(patches, 1, back.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_positions  # (B, 1 + N, d)
        pred = self.to_pixels(self.decoder_norm(self.decoder(x)))[:, 1:]  # (B, N, P)

        side, p = images.shape[-1] // self.patch_size, self.patch_size
        target = images.view(B, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(B, N, -1)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
        removed = (back >= keep.shape[1]).float()
        error = ((pred - target) ** 2).mean(dim=-1)
        return (error * removed).sum() / removed.sum(), self.projector(tokens[:, 1:].mean(dim=1))

    def forward(self, views: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of views (B, 2, 3, H, W) and noise (B, 2, N)."""
        loss0, projections0 = self.one_view(views[:, 0].contiguous(), noise[:, 0])
        loss1, projections1 = self.one_view(views[:, 1].contiguous(), noise[:, 1])
        z = F.normalize(torch.cat([projections0, projections1]), dim=-1)  # (2B, out)
        similar = z @ z.T / self.temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similar = similar.masked_fill(itself, float("-inf"))
        partner = torch.arange(len(z), device=z.device).roll(len(views))
        weight_recon, weight_contrast = self.weights
        contrastive = F.cross_entropy(similar, partner)
        return weight_recon * (loss0 + loss1) / 2 + weight_contrast * contrastive
