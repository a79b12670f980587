"""Sizes of tiny models and random batches for them, for tests of model.py and methods/."""

from types import SimpleNamespace

import torch
from torch import Tensor

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TINY = ENCODER | {
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "projector_hidden_dim": 64,
    "projector_out_dim": 16,
}
CLIPS = {"num_frames": 4, "tubelet_size": 2}  # 2 time steps of 16 patches


def random_batch(
    size: int = 4, seed: int = 0, views: int = 2, frames: int = 1
) -> dict[str, Tensor]:
    """Return `size` samples of 32 x 32 pixels for TINY, or for TINY | CLIPS with 4 frames."""
    generator = torch.Generator().manual_seed(seed)
    clip = (frames,) if frames > 1 else ()
    patches = 16 * frames // 2 if frames > 1 else 16
    return {
        "views": torch.randn(size, views, *clip, 3, 32, 32, generator=generator),
        "noise": torch.rand(size, views, patches, generator=generator),
    }


def state_at(step: int) -> SimpleNamespace:
    """Return the part of Composer's State that shows the step."""
    return SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=step)))
