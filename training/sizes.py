"""Find method and sizes of a model from its checkpoint, so that no YAML file repeats them."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from model import Classifier, ViCMAE
from training.config import keywords_of
from training.huggingface import read_num_heads
from training.sources import read_settings
from training.weights import find_file, read_checkpoint, square_side

YAMLS = Path(__file__).parent.parent / "yamls"
NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}  # by embed_dim; shapes do not show them
DECODER_NUM_HEADS = {256: 8, 512: 16}
ENCODER_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
DECODER_SIZES = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
PART_SIZES = (*DECODER_SIZES, "projector_hidden_dim", "projector_out_dim")
WIDTHS = {  # ViCMAE's arguments that are the first dimension of a weight
    "embed_dim": "encoder.patch_embed.proj.weight",
    "decoder_embed_dim": "decoder.embed.weight",
    "projector_hidden_dim": "projector.0.weight",
    "projector_out_dim": "projector.6.weight",
}


def vit_sizes(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return the sizes of a model, by ViCMAE's arguments, as far as its weights show them.

    Args:
        weights: by our names, as read_checkpoint returns them.

    Raises:
        ValueError: there is no patch embedding.
    """
    patches = weights.get("encoder.patch_embed.proj.weight")  # (D, 3, [t,] p, p)
    if patches is None:
        raise ValueError("the weights have no encoder.patch_embed.proj.weight; give a ViT's")
    sizes = {name: weights[key].shape[0] for name, key in WIDTHS.items() if key in weights}
    sizes["patch_size"] = patches.shape[-1]
    blocks = [re.match(r"(encoder|decoder)\.blocks\.\d+\.norm1\.weight", key) for key in weights]
    depths = Counter(match[1] for match in blocks if match)
    sizes["depth"] = depths["encoder"]
    if sizes["embed_dim"] in NUM_HEADS:
        sizes["num_heads"] = NUM_HEADS[sizes["embed_dim"]]
    if depths["decoder"] and "decoder_embed_dim" in sizes:
        sizes["decoder_depth"] = depths["decoder"]
        if sizes["decoder_embed_dim"] in DECODER_NUM_HEADS:
            sizes["decoder_num_heads"] = DECODER_NUM_HEADS[sizes["decoder_embed_dim"]]
    else:  # none, or of another kind, as VideoMAE's
        sizes.pop("decoder_embed_dim", None)
    if "encoder.pos_embed" in weights and square_side(weights["encoder.pos_embed"]):
        sizes["img_size"] = square_side(weights["encoder.pos_embed"]) * sizes["patch_size"]
    if patches.ndim == 5:
        sizes["tubelet_size"] = patches.shape[2]
        if "encoder.temporal_embed" in weights:
            steps = weights["encoder.temporal_embed"].shape[1]
            sizes["num_frames"] = steps * sizes["tubelet_size"]
    return sizes


def known_model(checkpoint: str, planned: bool = False) -> dict[str, Any]:
    """Return the method and the sizes of a checkpoint's run, or else the sizes of its weights.

    Args:
        checkpoint: see read_checkpoint.
        planned: if the run directory does not exist yet, read yamls/NAME.yaml instead.

    Returns:
        `method`: of the run's configuration, None if not given there. `stage`: "pretrain", or
        "finetune" for a classifier. `model`: the `model` block, with the default sizes of an
        encoder if it did not begin with other weights; or vit_sizes of the weights.

    Raises:
        ValueError: the checkpoint, or the configuration of its run, cannot be read.
    """
    run = find_run(checkpoint)
    file = run / "config.yaml" if run else None
    is_future = planned and run is not None and not run.exists()
    if is_future:
        file = YAMLS / f"{run.name}.yaml"
        if not file.exists():
            raise ValueError(f"{run} does not exist, nor does {file}, which would give its sizes")
    if not (file and file.exists()):
        weights = read_checkpoint(checkpoint)
        heads = read_num_heads(find_file(checkpoint))
        is_classifier = any(name.startswith("head.") for name in weights)
        stage = "finetune" if is_classifier else "pretrain"
        sizes = vit_sizes(weights) | ({"num_heads": heads} if heads else {})
        return {"method": None, "stage": stage, "model": sizes}
    config = read_settings(file)
    model = config.get("model") or {}
    stage = "finetune" if "eval_data" in config else "pretrain"
    known, pretrained = {}, config.get("pretrained")
    if not pretrained:
        keywords = keywords_of(Classifier if stage == "finetune" else ViCMAE)
        known = {name: keywords[name][1] for name in ENCODER_SIZES}  # the defaults
    elif is_future and find_run(pretrained):
        known = known_model(pretrained, planned)["model"]
    encoder = {name: known[name] for name in ENCODER_SIZES if name in known}
    return {"method": config.get("method"), "stage": stage, "model": encoder | model}


def find_run(checkpoint: str) -> Path | None:
    """Return the run directory runs/NAME of a checkpoint or run; None if the path shows none."""
    path = Path(checkpoint)
    if not path.exists() and Path("runs", checkpoint, "config.yaml").exists():
        return Path("runs", checkpoint)
    if path.parent.name == "checkpoints":
        return path.parent.parent
    if path.parent.name == "runs" or (path / "config.yaml").exists():
        return path
    return None
