"""training/weights.py."""

import argparse
import datetime
import math
import os
import pickle
import re
from collections import Counter
from typing import IO, Any

import numpy as np
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata

HARMLESS = [  # plain values that may stand beside the weights
    argparse.Namespace,  # the official files' arguments
    *(datetime.timedelta, torch.torch_version.TorchVersion),  # Composer's time stamp and versions
    *(
        np._core.multiarray._reconstruct,
        np.ndarray,
        np.dtype,
        np.dtypes.UInt32DType,
    ),  # Composer's generator states
]


IN_SHARDS = {  # all that their table of contents is made of, by exact name: a dotted one would lead out of its module
    *(
        (distributed_checkpoint.metadata.__name__, name)
        for name in ("Metadata", "MetadataIndex", "StorageMeta")
    ),
    *(
        (distributed_checkpoint.metadata.__name__, f"{name}StorageMetadata")
        for name in ("Bytes", "Chunk", "Tensor")
    ),
    *(
        (distributed_checkpoint.metadata.__name__, name)
        for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
    *(
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
    ),
    *(("pathlib", "PosixPath"), ("torch", "Size")),
    *(
        ("torch", name)
        for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
    ),
}


class PlainUnpickler(pickle.Unpickler):
    """Unpickles the table of contents of FSDP's shards, and refuses whatever does not belong there."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in IN_SHARDS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """FSDP's shards, read without running what a pickle says."""

    def read_metadata(self) -> Metadata:
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            return PlainUnpickler(file).load()


def read_plainly(file: str | IO[bytes], mmap: bool = False) -> Any:
    """What torch.save wrote of tensors and plain values; with mmap, weights are read from disk only when they are used.

    Raises:
        UnpicklingError: something else is in it, or it is damaged.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # which advises to load it without a care
        raise pickle.UnpicklingError(
            "it is damaged, or holds more than tensors and plain values"
        ) from error


def read_shards(path: str) -> dict[str, Tensor]:
    """The model's weights in a folder of FSDP's shards, each whole."""
    reader = PlainReader(path)
    shapes = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in shapes.items()
        if key.startswith("state.model.") and isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(state, storage_reader=reader)
    return {key.removeprefix("state.model."): value for key, value in state.items()}


def timm_file(name: str) -> str:
    """The file on disk with timm's weights of this name, such as vit_base_patch16_224.mae; nothing is downloaded.

    Raises:
        ValueError: timm has no such weights, or they are not in Hugging Face's cache.
    """
    entry = get_pretrained_cfg(name)
    if entry is None or not entry.hf_hub_id:
        raise ValueError(f"checkpoint {name} does not exist, as a file or among timm's weights")
    for file in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(path := try_to_load_from_cache(entry.hf_hub_id, file), str):
            return path
    raise ValueError(
        f"timm's {name} is not on disk; fetch it with: huggingface-cli download {entry.hf_hub_id}"
    )


def read_checkpoint(path: str, head: int | None = None) -> dict[str, Tensor]:
    """The weights in a file, by our names; or timm's weights by theirs, see timm_file.

    Reads Composer's checkpoints (a file, or a folder of FSDP's shards), the official files of ViC-MAE and MAE ({"model":
    ...}, whole or encoder alone) and bare state dicts, as .pt, .pth or .safetensors. Where Composer's EMA was at work, its
    averages are taken. Nothing but tensors and plain values is unpickled. With `head`, of a classifier's heads for several
    data sets, that one is taken.

    Raises:
        ValueError: the file is missing, is no such checkpoint, or has no such head.
    """
    if not os.path.exists(path):
        path = timm_file(path)
    try:
        if os.path.isdir(path):
            state = read_shards(path)
        elif path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = read_plainly(path)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    averages = {}
    for key in ("state", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            ema = dict(state.get("algorithms") or ()).get("EMA", {})
            if not ema.get(
                "ema_weights_active"
            ):  # else, written within an evaluation, the two had changed places
                for kind in ("named_parameters_dict", "named_buffers_dict"):
                    averages |= ema.get("ema_model", {}).get(kind, {})
    items = (state | averages).items() if isinstance(state, dict) else ()
    weights = {
        key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not any("blocks.0." in key for key in weights):
        raise ValueError(f"{path} holds no ViT (no key named blocks.0.*)")
    weights = our_layout(weights)
    if head is None:
        return weights
    if f"head.{head}.bias" not in weights:
        raise ValueError(
            f"checkpoint {path} has no head.{head}; a run with own_heads has one for each of its streams"
        )
    return {key.replace(f"head.{head}.", "head."): value for key, value in weights.items()}


def our_name(key: str) -> str:
    """A parameter's name in our models for its name in the official files; our own names stay as they are."""
    key = key.removeprefix("module.")
    key = re.sub(r"^decoder_(embed|pos_embed|blocks|norm|pred)", r"decoder.\1", key)
    key = re.sub(r"^mask_token", "decoder.mask_token", key)
    key = re.sub(
        r"^(encoder\.)?fc_norm", r"\1norm", key
    )  # where MAE's fine-tuning pools before the norm
    return re.sub(r"^(?=(cls_token|pos_embed|patch_embed|blocks|norm)(\b|_))", "encoder.", key)


def our_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by our names, and as our models have them, from those of ViC-MAE, MAE, ST-MAE, VideoMAE, or our own.

    ST-MAE (mae_st) splits qkv and positions. VideoMAE has no bias for k, whose effect on attention is nothing, no CLS and no
    stored positions. Of a linear probe's heads, the best is taken.
    """
    weights = {our_name(key): value for key, value in weights.items()}
    if "head.right" in weights:
        best = int(weights["head.right"].argmax())
        best = {f"head.{name}": weights[f"head.{best}.{name}"] for name in ("weight", "bias")}
        weights = {
            key: value for key, value in weights.items() if not key.startswith("head.")
        } | best
    for key in list(weights):
        if split := re.fullmatch(r"(.*attn\.)q\.(weight|bias)", key):
            parts = [weights.pop(f"{split[1]}{part}.{split[2]}") for part in "qkv"]
            weights[f"{split[1]}qkv.{split[2]}"] = torch.cat(parts)
        elif split := re.fullmatch(r"(.*attn\.)q_bias", key):
            q, v = weights.pop(key), weights.pop(f"{split[1]}v_bias")
            weights[f"{split[1]}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        elif key.endswith("pos_embed_spatial"):
            prefix = key.removesuffix("_spatial")
            cls = weights.pop(f"{prefix}_class")
            weights[prefix] = torch.cat([cls, weights.pop(key)], dim=1)
            weights["encoder.temporal_embed"] = weights.pop(f"{prefix}_temporal")
    return weights


def resized(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A weight brought to the shape that a model has for it, if that is of another kind of input; else the weight itself.

    A 2-D patch embedding is inflated to tubelets (repeated over the frames and divided by their number), tubelets are summed
    up for images, positions are interpolated to another grid or number of steps.
    """
    if name.endswith("patch_embed.proj.weight") and value.ndim == 4 and len(shape) == 5:
        return value[:, :, None].expand(-1, -1, shape[2], -1, -1) / shape[2]
    if name.endswith("patch_embed.proj.weight") and value.ndim == 5 and len(shape) == 4:
        return value.sum(dim=2)  # what a still clip gives
    if value.shape == shape:
        return value
    if name.endswith("temporal_embed") and value.shape[2] == shape[2]:
        return F.interpolate(value.transpose(1, 2), shape[1], mode="linear").transpose(1, 2)
    side = math.isqrt(value.shape[1] - 1) if value.ndim == 3 else 0
    if name.endswith("pos_embed") and value.shape[1:2] == (
        1 + side**2,
    ):  # of CLS and a square grid
        return resample_abs_pos_embed(value, [math.isqrt(shape[1] - 1)] * 2)
    return value


def describe(report: dict[str, list[str]]) -> str:
    """A report of load_pretrained as a table: how many weights of each part met which fate."""
    parts = {}
    for fate, names in report.items():
        for name in names:
            words = name.split(".")
            part = ".".join(words[: 2 if words[0] in ("encoder", "decoder") else 1])
            parts.setdefault(part, Counter())[fate] += 1
    lines = [f"{'':28}" + "".join(f"{fate:>9}" for fate in report)]
    lines += [
        f"{part:28}" + "".join(f"{fates[fate] or '':>9}" for fate in report)
        for part, fates in parts.items()
    ]
    return "\n".join(lines)


def load_pretrained(
    module: nn.Module, source: str | dict[str, Tensor], head: int | None = None
) -> dict[str, list[str]]:
    """Fill a ViCMAE or a Classifier from a checkpoint file or from a state dict in our or the official names.

    The encoder must be there whole, but for CLS and positions where the source, as VideoMAE, has none; a decoder, projector
    or head is filled if it is. Weights for another kind of input are brought to this one's, see resized. `head`: see
    read_checkpoint.

    Returns:
        Names by what became of them: `loaded`, `resized` (loaded after inflation or interpolation), `missing` (stay as they
        were), `unused` (in the source alone).

    Raises:
        ValueError: no checkpoint, an encoder that is not whole, or of another size.
    """
    name = source if isinstance(source, str) else "the state dict"
    found = read_checkpoint(source, head) if isinstance(source, str) else our_layout(source)
    own = module.state_dict()
    report = {
        "loaded": [],
        "resized": [],
        "missing": [key for key in own if key not in found],
        "unused": [],
    }
    filled = {}
    for key, value in found.items():
        if key not in own:
            report["unused"].append(key)
            continue
        shape = own[key].shape
        filled[key] = fit = resized(key, value, shape)
        if fit.shape != shape:
            raise ValueError(
                f"{name}: {key} is {tuple(fit.shape)} but the model's is {tuple(shape)}; set the model's sizes as trained"
            )
        report["loaded"].append(key)
        if fit is not value:
            report["resized"].append(key)
    for key in report["unused"]:
        if key.startswith(("encoder.blocks.", "encoder.norm", "encoder.patch_embed")):
            raise ValueError(
                f"{name} has {key}, which the model has not; it is of another depth or kind of ViT"
            )
    absent = [
        key
        for key in report["missing"]
        if key.startswith("encoder.") and "temporal_embed" not in key
    ]
    if "encoder.cls_token" in absent and "encoder.pos_embed" in absent:
        absent = [key for key in absent if not key.endswith(("cls_token", "pos_embed"))]
    if absent:
        raise ValueError(
            f"{name} lacks {len(absent)} weights of the encoder, {absent[0]} first; set the model's depth as trained"
        )
    module.load_state_dict(filled, strict=False)
    return report
