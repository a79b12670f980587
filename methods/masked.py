"""Masked autoencoders without a contrastive term: MAE, ST-MAE, VideoMAE and OmniMAE.

    composer pretrain.py yamls/demo.yaml yamls/methods/videomae.yaml

Differences from the published methods are listed in docs/methods.md.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from model import (
    Batch,
    ProperFraction,
    Tensors,
    ViCMAE,
    at_least_fp32,
    feature_std,
    init_weights,
    patchify,
    pool_tokens,
    random_masking,
)


class MAE(ViCMAE):
    """MAE (He et al. 2022): each view is reconstructed by itself, usually one view of a sample.

    Args:
        vicmae: arguments of ViCMAE. The arguments of the contrastive term have no effect.
    """

    def __init__(self, **vicmae):
        super().__init__(**vicmae)
        self.projector = self.predictor = None
        if not self.weight_recon:
            raise ValueError("weight_recon=0: must be positive, since nothing else is learnt")

    def project(self, features: Tensor, batch: Batch) -> Tensors:
        return {}

    def loss(self, outputs: Tensors, batch: Batch) -> Tensors:
        """Return total = weight_recon * reconstruction."""
        reconstruction = self.reconstruction_term(outputs, batch)
        return {
            "total": self.weight_recon * reconstruction,
            "reconstruction": reconstruction.detach(),
            "feature_std": feature_std(outputs["features"]),
        }


class ClipMAE(MAE):
    """The base of the methods that learn from clips, cut into tubelets.

    Args:
        num_frames, tubelet_size: frames of a clip and of a tubelet.
    """

    def __init__(self, *, num_frames: PositiveInt = 16, tubelet_size: PositiveInt = 2, **mae):
        self.num_frames, self.tubelet_size = num_frames, tubelet_size  # ViCMAE.__init__ reads them
        super().__init__(**mae)


class STMAE(ClipMAE):
    """ST-MAE (Feichtenhofer et al. 2022): clips, masked at random in space and time.

    The first frame of each tubelet is predicted (source: SlowFast). The positions in space and in
    time are learnt (source: SlowFast and mae_st).
    """

    def __init__(self, **clip_mae):
        super().__init__(**clip_mae)
        for part in (self.encoder, self.decoder):
            for name, positions in part.named_parameters(recurse=False):
                if name.endswith("_embed"):
                    nn.init.trunc_normal_(positions, std=0.02)
                    positions.requires_grad_(True)
        width, patch_size = self.decoder.pred.in_features, self.encoder.patch_size
        self.decoder.pred = nn.Linear(width, patch_size**2 * 3)
        init_weights(self.decoder.pred)

    def target_patches(self, views: Tensor) -> Tensor:
        return patchify(views[:, :: self.tubelet_size], self.encoder.patch_size)


class ChannelTargets(ClipMAE):
    """The base of OmniMAE and VideoMAE, which normalise each channel of a patch by itself."""

    def patch_statistics(self, target: Tensor) -> tuple[Tensor, Tensor]:
        channels = at_least_fp32(target).unflatten(-1, (-1, 3))  # (B, N, P / 3, 3)
        var, mean = torch.var_mean(channels, dim=-2, keepdim=True)  # (B, N, 1, 3)
        std = (var + 1e-6).sqrt()
        return mean.expand_as(channels).flatten(-2), std.expand_as(channels).flatten(-2)


class OmniMAE(ChannelTargets):
    """OmniMAE (Girdhar et al. 2023): random masks of clips, and of images as still clips.

    A batch of images may have fewer frames than T, see augment.image_frames. They are the first
    frames of a clip: no patch of a later frame is encoded, decoded or predicted.

    Args:
        image_mask_ratio: fraction of the patches of such an image that is removed, in (0, 1).
        clip_mae: arguments of ClipMAE. Its mask_ratio is for clips.

    Raises:
        ValueError: image_mask_ratio keeps or removes no patch of an image; or see ViCMAE.
    """

    takes_image_frames = True

    def __init__(self, *, image_mask_ratio: ProperFraction = 0.9, **clip_mae):
        super().__init__(**clip_mae)
        self.image_mask_ratio = image_mask_ratio
        places = self.encoder.grid**2
        if not 0 < int(places * (1 - image_mask_ratio)) < places:
            of_image = f"must keep and remove some of the {places} patches of an image"
            raise ValueError(f"image_mask_ratio={image_mask_ratio}: {of_image}")

    def check_augment(self, augment: dict[str, Any]) -> None:
        """Raise ValueError unless augment.image_frames are whole tubelets, at most a clip."""
        frames = augment.get("image_frames") or 0
        if frames % self.tubelet_size or frames > self.num_frames:
            count = f"a multiple of model.tubelet_size={self.tubelet_size}"
            limit = f"at most model.num_frames={self.num_frames}"
            raise ValueError(f"augment.image_frames={frames}: must be {count}, and {limit}")

    def reconstruct(self, views: Tensor, noise: Tensor) -> Tensors:
        """Return what ViCMAE returns; of images with fewer frames than T, for their patches."""
        missing = self.num_frames - views.shape[1]
        if not missing:
            return super().reconstruct(views, noise)
        B, N = noise.shape
        n = N * views.shape[1] // self.num_frames  # patches of an image
        ids_keep, ids_restore, mask = random_masking(noise[:, :n], self.image_mask_ratio)
        K = ids_keep.shape[1]
        num_decoded = K + math.ceil((n - K) * self.decode_ratio) if self.training else n
        clips = F.pad(views, (0, 0, 0, 0, 0, 0, 0, missing))
        tokens = self.encoder(clips, ids_keep)  # (B, 1 + K, D)
        later = torch.arange(n, N, device=noise.device).expand(B, -1)
        pred = self.decoder(tokens, torch.cat([ids_restore, later], dim=1), num_decoded)
        return {
            "features": pool_tokens(tokens, self.pool),
            "pred": pred[:, :n],
            "mask": mask,
            "scored": mask * (ids_restore < num_decoded),
        }


def tube_masking(noise: Tensor, mask_ratio: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the same places at all time steps of a clip; see random_masking.

    Args:
        noise: (B, N), of which the N / steps numbers of the first time step are used.
        mask_ratio: fraction of the places that is removed, in (0, 1).
        steps: number of time steps.
    """
    places = noise.shape[1] // steps
    kept_places, restore_places, _ = random_masking(noise[:, :places], mask_ratio)
    shuffled = restore_places.argsort(dim=1)  # (B, places), visible places first
    offsets = places * torch.arange(steps, device=noise.device)
    ids_shuffle = (shuffled[:, :, None] + offsets).flatten(1)  # (B, N)
    K = steps * kept_places.shape[1]
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :K], ids_restore, (ids_restore >= K).float()


class VideoMAE(ChannelTargets):
    """VideoMAE (Tong et al. 2022): clips, masked at the same places at all times."""

    def masking(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tube_masking(noise, self.mask_ratio, self.encoder.steps)
