"""Write an encoder, or a classifier with its head, for other libraries.

    export(net, "demo.safetensors")        # weights in timm's names
    export(net, "timm:exports/demo")       # a folder that timm.create_model builds in one call
    export(net, "transformers:exports/hf") # a folder that transformers' AutoModel loads
    export(net, "vit_mae:exports/mae")     # the same with the decoder, as ViTMAEForPreTraining
    export(net, "demo.onnx")               # any batch size; needs the extra onnx

Each prints the line of Python that loads the export, and the line that prepares its pictures.
"""

import json
import math
import os
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from methods.linear_probe import LinearProbe
from model import Classifier, ViCMAE
from shards.augment import MEAN, STD
from shards.storage import write_file
from training.huggingface import transformers_names

ARCHITECTURE = "vit_base_patch16_224"  # timm's name of a ViT, whose sizes are arguments
FOLDERS = ("timm", "transformers", "vit_mae")


def check_export(to: str) -> None:
    """Raise ValueError if `to` is no export, or cannot be written."""
    kind, separator, path = to.rpartition(":")
    is_file = not separator and to.endswith((".safetensors", ".onnx"))
    if not is_file and kind not in FOLDERS:
        expected = "FILE.safetensors, FILE.onnx, timm:FOLDER, transformers:FOLDER or vit_mae:FOLDER"
        raise ValueError(f"export={to}: must be {expected}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"export={to}: its folder does not exist")
    if os.path.exists(path) and os.path.isdir(path) == is_file:
        kind = "folder" if is_file else "file"
        raise ValueError(f"export={to}: there is a {kind} of this name; give another name")
    if to.endswith(".onnx"):
        try:
            import onnx  # noqa: F401
        except ImportError:
            raise ValueError(
                f"export={to}: needs onnx; install it with uv sync --extra onnx"
            ) from None


def check_exportable(net: ViCMAE | Classifier, to: str) -> None:
    """Raise ValueError if the library of an export does not have such a model."""
    kind = to.rpartition(":")[0]
    if net.encoder.num_frames > 1:
        raise ValueError("export: timm has no ViT for clips; export an encoder of images")
    if isinstance(net, Classifier) and net.head_per_data_set and net.data_set is None:
        raise ValueError("export: give model.data_set, the number of the head to be exported")
    if kind == "vit_mae" and (isinstance(net, Classifier) or net.decoder is None):
        raise ValueError("export: vit_mae needs a decoder; give transformers:FOLDER")
    if kind == "transformers" and isinstance(net, Classifier) and net.pool == "mean":
        remedy = "give timm:FOLDER or FILE.onnx"
        raise ValueError(f"export: transformers' classifier reads CLS, this one the mean; {remedy}")


def export(net: ViCMAE | Classifier, to: str, crop_pct: float = 0.875) -> None:
    """Write an export, see check_export, and print how it is loaded and its pictures prepared.

    Args:
        crop_pct: side of the crop as a fraction of the shorter side, see FileViews.

    Raises:
        ValueError: see check_exportable.
    """
    check_exportable(net, to)
    kind, _, path = to.rpartition(":")
    names, size = class_names(net), net.encoder.img_size
    settings = f'interpolation="bicubic", crop_pct={crop_pct}'  # mean and std are timm's default
    transform = f"timm.data.create_transform({size}, {settings})"
    if kind in ("transformers", "vit_mae"):
        transform = f'transformers.AutoImageProcessor.from_pretrained("{path}")'
        line = export_transformers(net, path, names, crop_pct, with_decoder=kind == "vit_mae")
    elif kind == "timm":
        labels = {"label_names": names or None}
        save_for_hf(timm_model(net, crop_pct), path, model_config=labels, safe_serialization=True)
        line = f'timm.create_model("local-dir:{path}", pretrained=True)'
    elif to.endswith(".onnx"):
        line = export_onnx(net, to)
    else:
        heads = str(net.encoder.blocks[0].attn.num_heads)
        metadata = {"class_names": json.dumps(names), "num_heads": heads}
        write_file(to, safetensors.torch.save(timm_state(net), metadata))
        given = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(net).items())
        line = f'timm.create_model("{ARCHITECTURE}", checkpoint_path="{to}", {given})'
    print(f"exported; load it with {line}")
    print(f"prepare its pictures, upright and in RGB, with {transform}")


def class_names(net: ViCMAE | Classifier) -> list[str]:
    """Return the class names of the head that is exported; empty if unknown."""
    names = getattr(net, "class_names", [])
    return names[net.data_set] if names and isinstance(names[0], list) else names


def timm_state(net: ViCMAE | Classifier) -> dict[str, Tensor]:
    """Return the weights by timm's names. The BatchNorm of a linear probe is part of the head."""
    state = net.encoder.state_dict()
    if isinstance(net, Classifier):
        head = net.head[net.data_set] if net.head_per_data_set else net.head
        weight, bias = head.weight.detach(), head.bias.detach()
        if isinstance(net, LinearProbe):
            weight = weight / (net.neck.running_var + net.neck.eps).sqrt()
            bias = bias - weight @ net.neck.running_mean
        state |= {"head.weight": weight, "head.bias": bias}
    return {name: value.contiguous().cpu() for name, value in state.items()}


def timm_arguments(net: ViCMAE | Classifier) -> dict[str, Any]:
    """Return the arguments of timm.create_model that give a model of the same sizes."""
    encoder = net.encoder
    sizes = {
        "img_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.cls_token.shape[2],
        "depth": len(encoder.blocks),
        "num_heads": encoder.blocks[0].attn.num_heads,
        "num_classes": 0,
    }
    if isinstance(net, Classifier):
        head = net.head[net.data_set] if net.head_per_data_set else net.head
        sizes["num_classes"] = head.out_features
        if net.pool == "mean":
            sizes |= {"global_pool": "avg", "fc_norm": False}
    return sizes


def timm_model(net: ViCMAE | Classifier, crop_pct: float = 0.875) -> nn.Module:
    """Return timm's ViT with the same weights, and with our normalisation in its configuration."""
    size = net.encoder.img_size
    overlay = {"input_size": (3, size, size), "mean": MEAN, "std": STD, "crop_pct": crop_pct}
    overlay |= {"interpolation": "bicubic", "crop_mode": "center"}
    arguments = timm_arguments(net)
    model = timm.create_model(ARCHITECTURE, pretrained_cfg_overlay=overlay, **arguments)
    model.load_state_dict(timm_state(net))
    return model.eval()


def export_transformers(
    net: ViCMAE | Classifier, folder: str, names: list[str], crop_pct: float, with_decoder: bool
) -> str:
    """Write a folder of transformers with its image processor, and return how to load it."""
    from transformers import CLIPImageProcessor

    encoder, size = net.encoder, net.encoder.img_size
    is_classifier = isinstance(net, Classifier)
    sizes = {
        "hidden_size": encoder.cls_token.shape[2],
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.blocks[0].attn.num_heads,
        "intermediate_size": encoder.blocks[0].mlp.fc1.out_features,
        "image_size": size,
        "patch_size": encoder.patch_size,
        "layer_norm_eps": encoder.norm.eps,
    }
    state = timm_state(net)
    if with_decoder:
        model = new_vit_mae(net, sizes)
        state |= {f"decoder.{key}": value for key, value in net.decoder.state_dict().items()}
    else:
        model = new_vit(sizes, names or list(range(len(state.get("head.bias", ())))), is_classifier)
    renamed = transformers_names(state)
    prefix = "vit." if with_decoder or is_classifier else ""
    own = ("decoder.", "classifier.")
    model.load_state_dict(
        {key if key.startswith(own) else prefix + key: value for key, value in renamed.items()}
    )
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": math.floor(size / crop_pct)},
        crop_size={"height": size, "width": size},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)
    return f'transformers.{type(model).__name__}.from_pretrained("{folder}")'


def new_vit(sizes: dict[str, Any], names: list, is_classifier: bool) -> nn.Module:
    """Return transformers' ViT, with a head for the names of classes if it is a classifier."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    if not is_classifier:
        return ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    labels = {number: str(name) for number, name in enumerate(names)}
    numbers = {name: number for number, name in labels.items()}
    return ViTForImageClassification(ViTConfig(**sizes, id2label=labels, label2id=numbers))


def new_vit_mae(net: ViCMAE, sizes: dict[str, Any]) -> nn.Module:
    """Return transformers' ViTMAE with the decoder's sizes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    blocks = net.decoder.blocks
    decoder = {
        "decoder_hidden_size": net.decoder.embed.out_features,
        "decoder_num_hidden_layers": len(blocks),
        "decoder_num_attention_heads": blocks[0].attn.num_heads,
        "decoder_intermediate_size": blocks[0].mlp.fc1.out_features,
    }
    masks = {"mask_ratio": net.mask_ratio, "norm_pix_loss": net.norm_pix_loss}
    return ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, **masks))


def export_onnx(net: ViCMAE | Classifier, to: str) -> str:
    """Write an ONNX file of timm's model for a batch of any size, and return how to load it."""
    size = net.encoder.img_size
    torch.onnx.export(
        timm_model(net),
        torch.zeros(2, 3, size, size),
        f"{to}.tmp",
        input_names=["images"],
        output_names=["outputs"],
        dynamic_axes={"images": {0: "batch"}, "outputs": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    os.replace(f"{to}.tmp", to)
    return f'onnxruntime.InferenceSession("{to}").run(None, {{"images": images}})'
