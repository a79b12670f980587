"""Read weights of any origin safely, and load them into our models.

    weights = read_checkpoint("runs/vitl")                          # a run directory, or any file
    report = load_pretrained(model, "vicmae_vitl.pth")              # official files, by our names
    print(describe(report))                                         # how many weights were loaded

Nothing in a file is executed, see safe_load.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from training.announce import print_once, say_if_slow
from training.huggingface import FILES, find_in_cache, find_in_folder, timm_names
from training.safe_load import check_zip, load_plain, read_shards

LATEST = "latest-rank0.pt"  # Composer's name for a link to the newest checkpoint of a run

# Of several ViTs in a file, averages and teachers are taken first, and the parts of LAST last.
AVERAGES = re.compile(r"(^|[._])(ema|teacher|target|averaged?)([._]|$)")
LAST = re.compile(r"(^|[._])(momentum|optimizer|predictor|decoder|text|fp32)([._]|$)")
WRAPPED_BLOCK = re.compile(
    r"(blocks\.\d+\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
BLOCK = r"encoder\.blocks\.\d+\."
OTHER_KINDS = {  # {keys of our layout: the kind of ViT that has them}
    BLOCK + r"(ls\d\.gamma|gamma_\d)": "layer scale",
    r"(encoder\.)?(reg_token|register_token)": "register tokens",
    r"encoder\.norm_pre\.": "a norm before its blocks, as CLIP has",
    BLOCK + r"attn\.q_norm\.": "norms of queries and keys",
    BLOCK + r"attn\.(relative_position|rel_pos)|(encoder\.)?rel_pos": "relative positions",
    BLOCK + r"attn\.rope|(encoder\.)?rope": "rotary positions",
    BLOCK + r"mlp\.(w12|w1|fc1_g)\.": "SwiGLU",
    r"(encoder\.)?attn_pool\.": "attention pooling",
}
TUBES = "encoder.patch_embed.tubes."  # TubeViT's kernels beside the patch embedding
# OMNIVORE's embedding of depth, beside the patch embedding of colours
DEPTH = ("encoder.patch_embed.proj.depth.", "encoder.patch_embed.proj.norm.")
OWN_PLACES = ("", "model", "encoder", "state.model.encoder")  # ours and the official files'
CLASS_NAMES = "_extra_state"  # PyTorch's key of Classifier.get_extra_state


def find_file(path: str) -> str:
    """Return the file, or the folder of shards, of a path or name that read_checkpoint takes."""
    newest = os.path.join(path, "checkpoints", LATEST)
    if os.path.exists(newest):
        return newest
    in_runs = os.path.join("runs", newest)
    if not os.path.exists(path) and os.path.exists(in_runs):
        return in_runs
    if not os.path.exists(path):
        return find_in_cache(path)
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, ".metadata")):
        return path
    if file := find_in_folder(path):
        return file
    expected = f"checkpoints/{LATEST} of a run, .metadata of a sharded checkpoint"
    raise ValueError(f"{path}: holds neither {expected}, nor {' or '.join(FILES)}")


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, by the names and in the layout of our models.

    Where Composer's EMA was used, its averages are returned in place of the weights.

    Args:
        path: a run directory, or its name; a checkpoint of Composer (a file, or a folder of FSDP's
            shards); an official file of ViC-MAE, MAE, ST-MAE or VideoMAE; a file or folder of a ViT
            of transformers; a bare state dict; as .pt, .pth or .safetensors. Or the name of timm's
            weights, or of a repository of Hugging Face, which must be in its cache.

    Raises:
        ValueError: the file is missing, corrupt, unsafe, or holds no ViT.
    """
    return read_vit(path)[0]


def read_vit(path: str) -> tuple[dict[str, Tensor], str]:
    """Return the weights in a checkpoint, see read_checkpoint, and where they stand in the file."""
    path = find_file(path)
    weights, place = read_file(path, os.stat(path).st_mtime_ns)
    return dict(weights), place


@lru_cache(maxsize=1)  # A start needs sizes, classes and weights of one file.
def read_file(path: str, modified: int) -> tuple[dict[str, Tensor], str]:
    """Return the weights in a file, or folder of shards, of this time of change; see read_vit."""
    check_file(path)
    try:
        if os.path.isdir(path):
            content = read_shards(path)
        elif path.endswith(".safetensors"):
            content = load_file(path)
        else:
            content = load_plain(path)
    except Exception as error:  # a corrupt file makes the unpickler raise nearly anything
        reason = str(error).strip().split("\n")[0]
        if "weights_only" in reason:  # torch's advice to load unsafely
            reason = "it is no file of torch.save with tensors, such as TorchScript"
        raise ValueError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    try:
        weights, place = find_vit(content)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return our_layout(weights), place


def check_file(path: str) -> None:
    """Raise a ValueError if a file is no checkpoint by its first bytes, or is corrupt."""
    if os.path.isdir(path):
        return
    with open(path, "rb") as file:
        start = file.read(64)
    kinds = {
        b"version https://git-lfs": "a pointer of Git LFS; run git lfs pull",
        b"<": "a web page",
    }
    for beginning, kind in kinds.items():
        if start.startswith(beginning):
            raise ValueError(f"{path} is {kind}")
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"PK"):
        try:
            check_zip(path)
        except (ValueError, BadZipFile) as error:
            raise ValueError(f"{path} is truncated or corrupt ({error})") from error


def find_vit(content: Any) -> tuple[dict[str, Tensor], str]:
    """Return the tensors beside and in a ViT, without the prefix that they share, and their place.

    The file may wrap the ViT in any dictionaries and prefixes, such as state_dict or `module.`.

    Raises:
        ValueError: there is no ViT.
    """
    candidates = []
    for keys, tensors in nested_tensors(content, ()):
        tensors = timm_names(tensors)
        for key in tensors:
            prefix, is_vit, _ = key.rpartition("patch_embed.proj.weight")
            if is_vit and f"{prefix}blocks.0.norm1.weight" in tensors:
                place = ".".join([*keys, prefix]).rstrip(".")
                rank = (bool(LAST.search(place)), not AVERAGES.search(place), len(prefix))
                candidates.append((rank, place, prefix, tensors))
    if not candidates:
        names = [key for _, tensors in nested_tensors(content, ()) for key in tensors]
        listed = f"its tensors are {', '.join(names[:3])} ..." if names else "it has no tensors"
        raise ValueError(f"holds no ViT (no patch_embed.proj.weight beside blocks.0.*); {listed}")
    _, place, prefix, tensors = min(candidates, key=lambda item: item[0])
    last_word = prefix.rstrip(".").rpartition(".")[2]
    outer = prefix.removesuffix(last_word + ".") if prefix else ""
    if last_word == "encoder":  # our own name of the encoder, and VideoMAE's
        prefix = outer
    weights = {}
    for key, value in tensors.items():
        inner = prefix if key.startswith(prefix) else outer
        weights[key.removeprefix(inner)] = value
    return weights, place


def nested_tensors(content: Any, keys: tuple[str, ...]) -> Iterator[tuple]:
    """Yield every dictionary in nested dictionaries that holds tensors: (its keys, its tensors).

    Where Composer's EMA was used, its averages take the place of the weights.
    """
    if not isinstance(content, dict) or len(keys) > 5:
        return
    if isinstance(content.get("model"), dict) and "algorithms" in content:
        yield (*keys, "model"), content["model"] | ema_averages(content)
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {
        WRAPPED_BLOCK.sub(r"\1", key): value
        for key, value in named.items()
        if isinstance(value, Tensor)
    }
    if tensors:
        yield keys, tensors
    for key, value in named.items():
        yield from nested_tensors(value, (*keys, key))


def ema_averages(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the averages of Composer's EMA in the state of a checkpoint; empty if it has none.

    During an evaluation, EMA swaps averages and weights: then the model has the averages already.
    """
    ema = dict(state.get("algorithms") or ()).get("EMA", {})
    if ema.get("ema_weights_active"):
        return {}
    averages = ema.get("ema_model", {})
    named = averages.get("named_parameters_dict", {}) | averages.get("named_buffers_dict", {})
    return {key.removeprefix("module."): value for key, value in named.items()}


def our_name(key: str) -> str:
    """Return our name of a parameter of the official files; our own names stay as they are."""
    key = re.sub(r"^decoder_(embed|pos_embed|blocks|norm|pred)", r"decoder.\1", key)
    key = re.sub(r"^mask_token", "decoder.mask_token", key)
    key = re.sub(r"^(encoder\.)?fc_norm", r"\1norm", key)  # MAE's, if pooled before the norm
    return re.sub(r"^(?=(cls_token|pos_embed|patch_embed|blocks|norm)(\b|_))", "encoder.", key)


def our_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of other code, and join weights that it keeps in parts.

    Takes state dicts of ViC-MAE, MAE, ST-MAE (github.com/facebookresearch/mae_st), VideoMAE
    (github.com/MCG-NJU/VideoMAE), timm and our own. Of a linear probe's heads, the best is taken.
    """
    weights = {our_name(key): value for key, value in weights.items()}
    keep_best_head(weights)
    for key in list(weights):
        if match := re.fullmatch(r"(.*attn\.)q\.(weight|bias)", key):  # ST-MAE
            owner, kind = match.groups()
            join(weights, [f"{owner}{part}.{kind}" for part in "qkv"], f"{owner}qkv.{kind}")
        elif key.endswith("attn.q_bias"):  # VideoMAE
            owner = key.removesuffix("q_bias")
            # It has no bias of k, which would add the same to all scores of a query.
            weights[f"{owner}k_bias"] = torch.zeros_like(weights[key])
            join(weights, [f"{owner}{part}_bias" for part in "qkv"], f"{owner}qkv.bias")
        elif key.endswith("pos_embed_spatial"):  # ST-MAE, (1, N, D)
            name = key.removesuffix("_spatial")
            join(weights, [f"{name}_class", key], name, dim=1)  # (1, 1 + N, D)
        elif key.endswith("pos_embed_temporal"):  # ST-MAE, (1, steps, D)
            owner = key.removesuffix("pos_embed_temporal")
            weights[f"{owner}temporal_embed"] = weights.pop(key)
    return weights


def join(weights: dict[str, Tensor], parts: list[str], name: str, dim: int = 0) -> None:
    """Replace weights by their concatenation, if all of them are there."""
    if all(part in weights for part in parts):
        weights[name] = torch.cat([weights.pop(part) for part in parts], dim=dim)


def keep_best_head(weights: dict[str, Tensor]) -> None:
    """Replace the heads of a linear probe by the head that was right most often."""
    if "head.right" not in weights:
        return
    best = int(weights["head.right"].argmax())
    weight, bias = weights[f"head.{best}.weight"], weights[f"head.{best}.bias"]
    for key in list(weights):
        if key.startswith("head."):
            del weights[key]
    weights["head.weight"], weights["head.bias"] = weight, bias


def class_names_in(weights: dict[str, Tensor]) -> list:
    """Return the class names in a classifier's weights, see Classifier; empty if unknown."""
    return json.loads(bytes(weights[CLASS_NAMES].tolist())) if CLASS_NAMES in weights else []


def square_side(positions: Tensor) -> int:
    """Return the side of the square grid of positions (1, 1 + N, D); 0 if N is no square."""
    count = positions.shape[1] - 1 if positions.ndim == 3 else 0
    side = math.isqrt(max(count, 0))
    return side if side**2 == count else 0


def resize_weight(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Resize a patch embedding or a position table to `shape`; return other weights unchanged.

    A 2-D patch embedding is inflated to tubelets: repeated over the frames, and divided by their
    number. Tubelets are summed over the frames for images, as for a still clip. Positions are
    interpolated to another grid (bicubic) or another number of time steps (linear). Kernels of
    TubeViT are interpolated (trilinear), and scaled to the same sum over their pixels. With fewer
    kernels than before, the first ones are kept.
    """
    if name.startswith(TUBES) and value.shape != shape:
        value = value[: shape[0]]
        if len(shape) == 1:  # bias
            return value
        kernel = value if value.ndim == 5 else value[:, :, None]  # (D, 3, t, h, w)
        scale = math.prod(kernel.shape[2:]) / math.prod(shape[2:])
        return scale * F.interpolate(kernel, shape[2:], mode="trilinear")
    if name.endswith("patch_embed.proj.weight") and value.ndim == 4 and len(shape) == 5:
        frames = shape[2]
        return value[:, :, None].expand(-1, -1, frames, -1, -1) / frames
    if name.endswith("patch_embed.proj.weight") and value.ndim == 5 and len(shape) == 4:
        return value.sum(dim=2)
    if value.shape == shape:
        return value
    if name.endswith("temporal_embed") and value.shape[2] == shape[2]:
        return F.interpolate(value.transpose(1, 2), shape[1], mode="linear").transpose(1, 2)
    if name.endswith("pos_embed") and square_side(value):
        return resample_abs_pos_embed(value, [math.isqrt(shape[1] - 1)] * 2)
    return value


@say_if_slow("loading the pre-trained weights")
def load_pretrained(
    module: nn.Module, source: str | dict[str, Tensor], other_sizes: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Fill a model with an `encoder` from a checkpoint, or from a state dict; resize what differs.

    The source must have all of the encoder. Only CLS and positions may be absent, as in VideoMAE's
    files, and positions in time. A decoder, projector or head is filled if the source has it.

    Args:
        source: see read_checkpoint; or weights by our names or the official ones.
        other_sizes: parts of the model, such as decoder, that the source may have in other sizes.
            They are left out, which is printed.

    Returns:
        Names of weights: `loaded`; `resized` (loaded, see resize_weight); `missing` from the source
        (unchanged in the model); `unused` (in the source alone).

    Raises:
        ValueError: no checkpoint, or its encoder is incomplete or of another size.
    """
    if isinstance(source, str):
        origin = source
        weights, place = read_vit(source)
        read_file.cache_clear()  # frees memory
        if place not in OWN_PLACES:
            print_once(f"{source}: its ViT is at {place}")
    else:
        origin, weights = "the state dict", our_layout(source)
    leave_out_other_head(origin, weights, module)
    for part in other_sizes:
        leave_out_other_size(origin, weights, module.state_dict(), f"{part}.")
    own = module.state_dict()
    own.pop(CLASS_NAMES, None)  # The names of the model's own data stay.
    for key in own:
        patches = "encoder.patch_embed.proj." + key.rpartition(".")[2]
        if key.startswith(TUBES) and patches in weights:
            weights.setdefault(key, weights[patches])
    missing = [key for key in own if key not in weights]
    unused = [key for key in weights if key not in own]
    check_encoder(origin, missing, unused)
    if any(key.startswith(DEPTH) for key in unused):
        print_once(f"{origin}: its embedding of depth is left out")
    fitting = {key: value for key, value in weights.items() if key in own}
    check_values(origin, {key: value for key, value in fitting.items() if "encoder." in key})
    resized = []
    for key, value in fitting.items():
        fitting[key] = resize_weight(key, value, own[key].shape)
        shape, wanted = tuple(fitting[key].shape), tuple(own[key].shape)
        if shape != wanted:
            of_sizes = ("cls_token", "pos_embed", "patch_embed.proj.weight")
            remedy = "give the weights of a plain ViT"
            if key.endswith(of_sizes):
                remedy = "set the model's sizes as trained"
            raise ValueError(f"{origin}: {key} is {shape} but the model's is {wanted}; {remedy}")
        if fitting[key] is not value:
            resized.append(key)
    module.load_state_dict(fitting, strict=False)
    return {"loaded": list(fitting), "resized": resized, "missing": missing, "unused": unused}


def leave_out_other_head(origin: str, weights: dict[str, Tensor], module: nn.Module) -> None:
    """Remove a head of other classes than a model's from the weights, and say so."""
    names = class_names_in(weights)
    weights.pop(CLASS_NAMES, None)
    own = module.state_dict()
    heads = [key for key in weights if key.startswith("head.") and key in own]
    other = [key for key in heads if weights[key].shape != own[key].shape]
    expected = getattr(module, "class_names", [])
    if other or (heads and names and expected and names != expected):
        for key in heads:
            del weights[key]
        print_once(f"{origin}: its head of other classes is left out")


def leave_out_other_size(
    origin: str, weights: dict[str, Tensor], own: dict[str, Tensor], part: str
) -> None:
    """Remove a part from the weights if the model has it in another size, and say so."""
    wanted = {key: value.shape for key, value in own.items() if key.startswith(part)}
    given = [key for key in weights if key.startswith(part)]
    fits = wanted.keys() == set(given) and all(
        resize_weight(key, weights[key], wanted[key]).shape == wanted[key] for key in given
    )
    if fits or not given or not wanted:
        return
    for key in given:
        del weights[key]
    print_once(f"{origin}: its {part.rstrip('.')} is of another size or kind, and is left out")


def check_values(origin: str, weights: dict[str, Tensor]) -> None:
    """Raise a ValueError unless weights are finite numbers, for three colours."""
    for key, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(
                f"{origin}: {key} has the type {value.dtype}; give unquantised weights"
            )
        if not (value.is_meta or value.isfinite().all()):
            raise ValueError(f"{origin}: {key} is not finite")
    patches = weights.get("encoder.patch_embed.proj.weight")
    if patches is not None and patches.shape[1] != 3:
        raise ValueError(f"{origin}: its ViT sees {patches.shape[1]} channels, this encoder 3")


def check_encoder(origin: str, missing: list[str], unused: list[str]) -> None:
    """Raise a ValueError if the encoders of a source and a model are not the same kind of ViT."""
    for pattern, kind in OTHER_KINDS.items():
        if any(re.match(pattern, key) for key in unused):
            raise ValueError(f"{origin}: is a ViT with {kind}, which this encoder does not have")
    for key in unused:
        if key.startswith(DEPTH):
            continue
        if key.startswith(("encoder.blocks.", "encoder.norm", "encoder.patch_embed")):
            reason = "it is of another depth or kind of ViT"
            raise ValueError(f"{origin} has {key}, which the model lacks; {reason}")
    optional = {"encoder.temporal_embed"}
    if {"encoder.cls_token", "encoder.pos_embed"} <= set(missing):  # VideoMAE has neither
        optional |= {"encoder.cls_token", "encoder.pos_embed"}
    if "encoder.cls_token" in missing and "encoder.pos_embed" not in missing:
        raise ValueError(f"{origin}: is a ViT without CLS token, which this encoder has")
    absent = [key for key in missing if key.startswith("encoder.") and key not in optional]
    if absent:
        remedy = "give the weights of a plain ViT"
        if all(key.startswith("encoder.blocks.") for key in absent):
            remedy = "set the model's depth as trained"
        lacking = f"lacks {len(absent)} weights of the encoder, {absent[0]} first"
        raise ValueError(f"{origin} {lacking}; {remedy}")


def describe(report: dict[str, list[str]]) -> str:
    """Return a report of load_pretrained as a table: how many weights of each part, by status."""
    parts = {}
    for status, names in report.items():
        for name in names:
            words = name.split(".")
            depth = 2 if words[0] in ("encoder", "decoder") else 1
            parts.setdefault(".".join(words[:depth]), Counter())[status] += 1
    lines = [" " * 28 + "".join(f"{status:>9}" for status in report)]
    for part, counts in parts.items():
        cells = [f"{counts[status] or '':>9}" for status in report]
        lines.append(f"{part:28}" + "".join(cells))
    return "\n".join(lines)
