"""Files of Hugging Face: the names of weights in transformers, and files in its cache."""

import json
import os
import re
from collections.abc import Iterable

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from timm.models import get_pretrained_cfg
from torch import Tensor

FILES = ("model.safetensors", "pytorch_model.bin")
PATCHES = "embeddings.patch_embeddings.projection.weight"
PARTS = {  # {a part of timm's name of a ViT's weight: its place in transformers' name}
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.": "encoder.layer.",
    "norm.": "layernorm.",
    "head.": "classifier.",
    ".attn.proj": ".attention.output.dense",
    ".attn.": ".attention.attention.",
    ".mlp.fc1": ".intermediate.dense",
    ".mlp.fc2": ".output.dense",
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
}


def exchange(name: str, places: Iterable[tuple[str, str]]) -> str:
    """Return a name with parts replaced in turn: with a dot anywhere, others at its beginning."""
    for part, place in places:
        begin = "" if part.startswith(".") else "^"
        name = re.sub(begin + re.escape(part), place, name)
    return name


def transformers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a ViT by transformers' names, given timm's, and ours for a decoder."""
    renamed = {}
    for key, value in weights.items():
        name = exchange(key, PARTS.items())
        name = re.sub(r"^decoder\.(?!mask_token)", "decoder.decoder_", name)
        name = name.replace("decoder_blocks.", "decoder_layers.")
        if "attention.qkv" in name:
            for part, share in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace("qkv", part)] = share.clone()
        else:
            renamed[name] = value
    return renamed


def timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by timm's names, if they have transformers' names of a ViT; else unchanged."""
    prefixes = [key.removesuffix(PATCHES) for key in weights if key.endswith(PATCHES)]
    if not prefixes:
        return weights
    renamed = {}
    for key, value in weights.items():
        name = key.removeprefix(prefixes[0]).replace("decoder_layers.", "decoder_blocks.")
        name = re.sub(r"^decoder\.(?=decoder_|mask_token)", "", name)
        name = re.sub(r"^embeddings\.(?=mask_token|register_tokens)", "", name)
        name = exchange(name, [(theirs, part) for part, theirs in PARTS.items()])
        name = re.sub(r"\.attn\.(q|k|v)(uery|ey|alue)\b", r".attn.\1", name)
        renamed[re.sub(r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma", name)] = value
    return renamed


def find_in_folder(folder: str) -> str | None:
    """Return the file of weights in a folder of transformers; None if there is none."""
    files = [os.path.join(folder, name) for name in FILES]
    return next(filter(os.path.exists, files), None)


def find_in_cache(name: str) -> str:
    """Return the cached file of timm's weights, or of a repository of Hugging Face.

    Args:
        name: such as vit_base_patch16_224.mae, or facebook/vit-mae-base.

    Raises:
        ValueError: timm has no such weights, or the file is not in the cache.
    """
    repository = name
    if "/" not in name:
        entry = get_pretrained_cfg(name)
        if entry is None or not entry.hf_hub_id:
            raise ValueError(f"checkpoint {name} does not exist, as a file or among timm's weights")
        repository = entry.hf_hub_id
    files = []
    if repository.count("/") == 1:  # other names are paths
        paths = [try_to_load_from_cache(repository, file) for file in FILES]
        files = [path for path in paths if isinstance(path, str)]
    if not files:
        if repository == name:
            raise ValueError(f"checkpoint {name} does not exist, nor in Hugging Face's cache")
        command = f"huggingface-cli download {repository}"
        raise ValueError(f"timm's {name} is not on disk; fetch it with: {command}")
    return files[0]


def read_num_heads(path: str) -> int | None:
    """Return the attention heads that a .safetensors file, or config.json beside it, stores.

    Args:
        path: a file or folder of transformers, of timm, or of our exports.
    """
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get("num_heads")
        if stored:
            return int(stored)
    file = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if not os.path.exists(file):
        return None
    with open(file, "rb") as opened:
        config = json.load(opened)
    return config.get("num_attention_heads", config.get("model_args", {}).get("num_heads"))
