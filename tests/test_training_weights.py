"""Weights: official files by their real names and shapes, and our own checkpoints."""

import argparse
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import write_run
from safetensors.torch import save_file
from tiny_models import CLIPS, ENCODER, TINY
from torch import Tensor

from model import Classifier, Encoder, ViCMAE
from training import huggingface
from training.sizes import vit_sizes
from training.weights import (
    describe,
    find_vit,
    load_pretrained,
    our_layout,
    read_checkpoint,
)

DATA = Path(__file__).parent / "data" / "published_weights"
GOLDEN = Path(__file__).parent / "golden" / "vicmae_tiny.npz"
VIT_B = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
VIT_L = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
PROJECTOR = {"projector_hidden_dim": 4096, "projector_out_dim": 128}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """The weights of a tiny model of the official code, by its names."""
    with np.load(GOLDEN) as data:
        keys = [key for key in data.files if key.startswith("state/")]
        return {key.removeprefix("state/"): torch.from_numpy(data[key]) for key in keys}


# Official files, by the names and shapes of what is published


def published(name: str) -> dict[str, Tensor]:
    """Tensors without storage of the names and shapes in a published file."""
    shapes = json.loads((DATA / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def names_of(*modules: str) -> set[str]:
    return {f"{module}.{part}" for module in modules for part in ("weight", "bias")}


def names_of_blocks(owner: str, depth: int) -> set[str]:
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    blocks = [f"{owner}.{number}" for number in range(depth)]
    return {name for block in blocks for layer in layers for name in names_of(f"{block}.{layer}")}


MAE_ST_DECODER = {
    *("decoder_cls_token", "decoder.mask_token", "decoder.pos_embed", "decoder.temporal_embed"),
    *names_of("decoder.embed", "decoder.norm", "decoder.pred"),
    *names_of_blocks("decoder.blocks", 4),
}
PYSLOWFAST_DECODER = {
    *("decoder.mask_token", "decoder.pos_embed"),
    *names_of("decoder.embed", "pred_head.transforms.0.4", "pred_head.projections.0"),
    *names_of_blocks("pred_head.transforms.0", 4),
}
VIDEOMAE_POSITIONS = {"encoder.cls_token", "encoder.pos_embed", "encoder.temporal_embed"}


def videomae_decoder(depth: int) -> set[str]:
    return {
        *("decoder.mask_token", "encoder_to_decoder.weight"),
        *names_of("decoder.norm", "decoder.head"),
        *names_of_blocks("decoder.blocks", depth),
    }


@pytest.mark.parametrize(
    ("name", "sizes", "with_projector"),
    [
        ("vicmae_vitb", VIT_B, True),
        ("vicmae_vitl", VIT_L, True),
        ("mae_vitb", VIT_B, False),
        ("mae_vitl", VIT_L, False),
    ],
)
def test_published_files_of_vicmae_and_mae_fill_all_of_the_model_but_mae_s_projector(
    name, sizes, with_projector
):
    with torch.device("meta"):
        net = ViCMAE(**sizes, **DECODER, **PROJECTOR).to("meta")  # fixed positions are from numpy
    report = load_pretrained(net, published(name))
    projector = {key for key in net.state_dict() if key.startswith("projector.")}
    assert set(report["missing"]) == (set() if with_projector else projector)
    assert report["unused"] == report["resized"] == []
    assert len(report["loaded"]) == len(published(name))


@pytest.mark.parametrize(
    ("name", "sizes", "missing", "unused"),
    [
        ("mae_st_vitl", VIT_L, set(), MAE_ST_DECODER),
        ("mae_st_vitl_published", VIT_L, set(), PYSLOWFAST_DECODER),
        ("videomae_vitb", VIT_B, VIDEOMAE_POSITIONS, videomae_decoder(4)),
        ("videomae_vitl", VIT_L, VIDEOMAE_POSITIONS, videomae_decoder(12)),
    ],
)
def test_published_files_of_st_mae_and_videomae_fill_the_encoder_of_a_classifier_of_clips(
    name, sizes, missing, unused
):
    with torch.device("meta"):
        net = Classifier(400, **sizes, num_frames=16, tubelet_size=2).to("meta")
    report = load_pretrained(net, published(name))
    assert set(report["missing"]) == missing | names_of("head")
    assert set(report["unused"]) == unused
    assert report["resized"] == []


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vicmae_vitb", VIT_B | DECODER | PROJECTOR),
        ("vicmae_vitl", VIT_L | DECODER | PROJECTOR),
        ("mae_vitb", VIT_B | DECODER),
        ("mae_vitl", VIT_L | DECODER),
        (
            "mae_st_vitl",
            VIT_L | DECODER | {"decoder_depth": 4, "tubelet_size": 2, "num_frames": 16},
        ),
        ("mae_st_vitl_published", VIT_L | {"tubelet_size": 2, "num_frames": 16}),
        (
            "videomae_vitb",
            {k: v for k, v in VIT_B.items() if k != "img_size"} | {"tubelet_size": 2},
        ),
        (
            "videomae_vitl",
            {k: v for k, v in VIT_L.items() if k != "img_size"} | {"tubelet_size": 2},
        ),
    ],
)
def test_sizes_of_published_files_are_read_from_their_shapes(name, sizes):
    assert vit_sizes(our_layout(published(name))) == sizes


@pytest.mark.parametrize(("name", "sizes"), [("mae_vitb", VIT_B), ("mae_vitl", VIT_L)])
def test_names_and_shapes_of_mae_are_those_of_timms_vit(name, sizes):
    with torch.device("meta"):
        theirs = timm.models.VisionTransformer(**sizes, num_classes=0).state_dict()
    decoder = ("decoder", "mask_token")
    ours = {key: value for key, value in published(name).items() if not key.startswith(decoder)}
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


# Small files with the names of the published ones, filled with random numbers

SHRUNK = {1024: 48, 3072: 144, 4096: 192, 512: 24, 1536: 72, 2048: 96, 196: 16, 8: 2, 16: 8}


def shrunk(name: str) -> dict[str, Tensor]:
    """Random weights with the names of a published ViT-L, but two blocks and small dimensions.

    They fit ENCODER with CLIPS: 48 wide, patches of 8 pixels, 4 x 4 of them, 2 time steps.
    """
    weights = {}
    for key, value in published(name).items():
        is_deep = any(part.isdigit() and int(part) > 1 for part in key.split("."))
        if not is_deep:
            shape = [SHRUNK.get(size, size) for size in value.shape]
            weights[key] = torch.randn(shape) * 0.2
    return weights


def attention(x: Tensor, qkv: list[tuple[Tensor, Tensor]], proj: tuple[Tensor, Tensor]) -> Tensor:
    """Multi-head attention, one head after another, of x (B, N, D)."""
    q, k, v = [F.linear(x, *layer) for layer in qkv]
    heads = []
    for part in torch.arange(48).chunk(ENCODER["num_heads"]):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / len(part) ** 0.5
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    return F.linear(torch.cat(heads, dim=-1), *proj)


def layer(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def encode_as_mae_st(weights: dict[str, Tensor], clips: Tensor) -> Tensor:
    """Tokens of clips (B, T, 3, H, W) by the formulas of ST-MAE, from weights by its names."""
    proj = layer(weights, "patch_embed.proj")
    x = F.conv3d(clips.transpose(1, 2), *proj, stride=proj[0].shape[2:])  # (B, D, t, h, w)
    B, D, t, h, w = x.shape
    tokens = []
    for step in range(t):
        at_step = x[:, :, step].reshape(B, D, h * w).transpose(1, 2)
        times = weights["pos_embed_temporal"][:, step : step + 1]
        tokens.append(at_step + weights["pos_embed_spatial"] + times)
    cls = (weights["cls_token"] + weights["pos_embed_class"]).expand(B, 1, D)
    x = torch.cat([cls, *tokens], dim=1)  # (B, 1 + t * h * w, D)
    for block in ("blocks.0", "blocks.1"):
        y = F.layer_norm(x, (D,), *layer(weights, f"{block}.norm1"), 1e-6)
        qkv = [layer(weights, f"{block}.attn.{name}") for name in "qkv"]
        x = x + attention(y, qkv, layer(weights, f"{block}.attn.proj"))
        y = F.layer_norm(x, (D,), *layer(weights, f"{block}.norm2"), 1e-6)
        y = F.gelu(F.linear(y, *layer(weights, f"{block}.mlp.fc1")))
        x = x + F.linear(y, *layer(weights, f"{block}.mlp.fc2"))
    return F.layer_norm(x, (D,), *layer(weights, "norm"), 1e-6)


@pytest.mark.parametrize(
    ("name", "wrapper"), [("mae_st_vitl", "model"), ("mae_st_vitl_published", "model_state")]
)
def test_file_of_st_mae_gives_the_features_of_its_formulas(tmp_path, name, wrapper):
    weights = shrunk(name)
    torch.save({wrapper: weights, "epoch": 99}, tmp_path / "st.pth")
    ours = Classifier(3, **ENCODER, **CLIPS).eval()
    report = load_pretrained(ours, str(tmp_path / "st.pth"))
    assert report["missing"] == ["head.weight", "head.bias"]
    clips = torch.randn(2, 4, 3, 32, 32)
    expected = encode_as_mae_st(weights, clips)
    torch.testing.assert_close(ours.encoder(clips), expected, rtol=1e-4, atol=1e-4)


def test_q_k_and_v_of_st_mae_are_rows_of_qkv_in_this_order():
    weights = shrunk("mae_st_vitl")
    ours = our_layout(weights)
    for kind in ("weight", "bias"):
        for row, name in enumerate("qkv"):
            found = ours[f"encoder.blocks.1.attn.qkv.{kind}"][48 * row : 48 * row + 48]
            assert torch.equal(found, weights[f"blocks.1.attn.{name}.{kind}"])


def test_positions_in_time_of_st_maes_decoder_do_not_replace_the_encoders():
    weights = shrunk("mae_st_vitl")
    ours = our_layout(weights)
    assert torch.equal(ours["encoder.temporal_embed"], weights["pos_embed_temporal"])
    assert torch.equal(ours["decoder.temporal_embed"], weights["decoder_pos_embed_temporal"])


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_file_of_videomae_gives_its_attention(tmp_path, wrapper):
    weights = shrunk("videomae_vitl")
    torch.save({wrapper: weights}, tmp_path / "video.pth")
    ours = Classifier(3, **ENCODER, **CLIPS).eval()
    load_pretrained(ours, str(tmp_path / "video.pth"))
    tokens = torch.randn(2, 5, 48)
    for number, block in enumerate(ours.encoder.blocks):
        name = f"encoder.blocks.{number}.attn"
        q, k, v = weights[f"{name}.qkv.weight"].chunk(3)
        biases = [weights[f"{name}.q_bias"], torch.zeros(48), weights[f"{name}.v_bias"]]
        qkv = list(zip([q, k, v], biases, strict=True))
        expected = attention(tokens, qkv, layer(weights, f"{name}.proj"))
        torch.testing.assert_close(block.attn(tokens), expected, rtol=1e-4, atol=1e-4)


def test_file_of_videomae_leaves_cls_and_positions_as_they_were():
    ours = Classifier(3, **ENCODER, **CLIPS)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    load_pretrained(ours, shrunk("videomae_vitl"))
    for name in VIDEOMAE_POSITIONS:
        assert torch.equal(ours.state_dict()[name], before[name])


@pytest.mark.parametrize("whole", [True, False])
def test_official_file_fills_the_whole_model_or_the_encoder_alone(tmp_path, golden, whole):
    others = ("decoder", "mask_token", "projector")
    state = {key: value for key, value in golden.items() if whole or not key.startswith(others)}
    path = str(tmp_path / "official.pth")
    arguments = argparse.Namespace(lr=1e-3)
    torch.save({"model": state, "epoch": 799, "scaler": None, "args": arguments}, path)
    net = ViCMAE(**TINY)
    before = net.decoder.mask_token.clone()
    report = load_pretrained(net, path)
    assert torch.equal(net.encoder.blocks[1].mlp.fc1.weight, golden["blocks.1.mlp.fc1.weight"])
    assert torch.equal(net.decoder.mask_token, golden["mask_token"] if whole else before)
    assert bool(report["missing"]) is not whole


def test_norm_of_an_mae_fine_tuning_becomes_the_encoders(golden):
    state = {}
    for key, value in golden.items():
        state[f"fc_{key}" if key.startswith("norm.") else key] = value
    net = ViCMAE(**TINY)
    torch.nn.init.zeros_(net.encoder.norm.weight)
    load_pretrained(net, state)
    assert torch.equal(net.encoder.norm.weight, golden["norm.weight"])


def test_timms_weights_are_found_in_the_cache_by_name_and_never_downloaded(tmp_path, monkeypatch):
    name = "vit_small_patch16_224.augreg_in1k"
    cached = partial(huggingface.try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface, "try_to_load_from_cache", cached)
    missing = r"timm's vit_small.* is not on disk; fetch it with: huggingface-cli download timm/"
    with pytest.raises(ValueError, match=missing):
        read_checkpoint(name)
    with pytest.raises(ValueError, match=r"vit_smaller does not exist, as a file or among timm's"):
        read_checkpoint("vit_smaller")
    folder = tmp_path / f"models--timm--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abc")
    (folder / "snapshots" / "0123abc").mkdir(parents=True)
    theirs = timm.models.VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=4)
    save_file(theirs.state_dict(), folder / "snapshots" / "0123abc" / "model.safetensors")
    ours = Classifier(4, **ENCODER, pool="cls")
    assert not load_pretrained(ours, name)["missing"]
    assert torch.equal(ours.encoder.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)


# Other sizes and kinds


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"init_values": 1e-5}, "with layer scale"),
        ({"reg_tokens": 2}, "with register tokens"),
        ({"qk_norm": True}, "with norms of queries and keys"),
        ({"pre_norm": True}, "with a norm before its blocks"),
        ({"class_token": False, "global_pool": "avg"}, "without CLS token"),
        ({"in_chans": 4}, "sees 4 channels, this encoder 3"),
    ],
)
def test_vit_of_another_kind_is_named_as_what_it_is(arguments, kind):
    theirs = timm.models.VisionTransformer(
        32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=0, **arguments
    )
    with pytest.raises(ValueError, match=f"the state dict: .*{kind}"):
        load_pretrained(Classifier(4, **ENCODER), theirs.state_dict())


@pytest.mark.parametrize(
    ("keys", "prefix", "place"),
    [
        ((), "module._orig_mod.", "module._orig_mod"),
        (("model",), "_orig_mod.", "model._orig_mod"),
        (("module",), "", "module"),  # DeepSpeed
        (("state_dict",), "model.backbone.", "state_dict.model.backbone"),  # Lightning
        (("teacher",), "backbone.", "teacher.backbone"),  # DINO
        (("model_ema",), "module.vit.", "model_ema.module.vit"),
        (("a", "model_state"), "student.encoder.", "a.model_state.student.encoder"),
        (("state_dict",), "module.base_encoder.", "state_dict.module.base_encoder"),  # MoCo v3
    ],
)
def test_vit_is_found_in_any_nesting_of_keys_and_prefixes(tmp_path, capsys, keys, prefix, place):
    net = Encoder(**ENCODER)
    content = {prefix + key: value for key, value in net.state_dict().items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "file.pth")
    module = Classifier(4, **ENCODER)
    report = load_pretrained(module, str(tmp_path / "file.pth"))
    assert all(torch.equal(module.encoder.state_dict()[k], v) for k, v in net.state_dict().items())
    assert report["unused"] == []
    assert f"file.pth: its ViT is at {place}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("taken", "other"),
    [
        ("teacher", "student"),
        ("model_ema", "model"),
        ("state_dict_ema", "state_dict"),
        ("model", "momentum"),
        ("model", "schema"),
        ("encoder", "predictor"),
        ("target_encoder", "encoder"),  # JEPA
        ("visual", "text"),
        ("module", "fp32"),
    ],
)
def test_averages_and_teachers_are_taken_before_other_vits_of_a_file(tmp_path, taken, other):
    content = {}
    for number, key in enumerate((taken, other)):
        state = Encoder(**ENCODER).state_dict()
        content[key] = {name: torch.full_like(value, number) for name, value in state.items()}
    torch.save(content, tmp_path / "file.pth")
    assert not any(value.any() for value in read_checkpoint(str(tmp_path / "file.pth")).values())


def test_head_of_other_classes_is_left_out_and_said(capsys):
    source, target = Classifier(7, **ENCODER), Classifier(2, **ENCODER)
    head = target.head.weight.clone()
    load_pretrained(target, source.state_dict())
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.encoder.pos_embed, source.encoder.pos_embed)
    assert "its head of other classes is left out" in capsys.readouterr().out
    source, target = Classifier(2, **ENCODER), Classifier(2, **ENCODER)
    source.class_names, target.class_names = ["no", "yes"], ["yes", "zebra"]
    load_pretrained(target, source.state_dict())
    assert not torch.equal(target.head.weight, source.head.weight)
    target.class_names = ["no", "yes"]
    load_pretrained(target, source.state_dict())
    assert torch.equal(target.head.weight, source.head.weight)


def test_deeper_vit_is_refused():
    deeper = Encoder(**ENCODER | {"depth": 3})
    with pytest.raises(ValueError, match=r"has encoder.blocks.2"):
        load_pretrained(Classifier(4, **ENCODER), deeper.state_dict())


@pytest.mark.parametrize(
    ("sizes", "culprit"),
    [
        ({"embed_dim": 96}, "encoder.cls_token is"),
        ({"depth": 3}, "lacks 12 weights"),
        ({"depth": 1}, "has encoder.blocks.1"),
        ({"patch_size": 16}, "patch_embed"),
    ],
)
def test_checkpoint_of_another_size_is_refused_by_the_weight_that_differs(golden, sizes, culprit):
    with pytest.raises(ValueError, match=culprit):
        load_pretrained(ViCMAE(**TINY | sizes), golden)


def test_positions_of_another_grid_are_interpolated(golden):
    net = Classifier(3, **ENCODER | {"img_size": 48})
    report = load_pretrained(net, golden)
    assert report["resized"] == ["encoder.pos_embed"]
    grid = golden["pos_embed"][:, 1:].view(1, 4, 4, 48).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    found = net.encoder.pos_embed.data
    torch.testing.assert_close(found[:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(found[:, :1], golden["pos_embed"][:, :1])


def test_encoder_of_clips_gives_an_encoder_of_images_the_features_of_a_still_clip():
    clips = Encoder(**ENCODER, num_frames=2, tubelet_size=2, learn_positions=True).eval()
    images = Classifier(3, **ENCODER).eval()
    load_pretrained(images, clips.state_dict())
    frames = torch.randn(2, 3, 32, 32)
    still = frames[:, None].expand(-1, 2, -1, -1, -1)
    expected = clips(still)
    torch.testing.assert_close(images.encoder(frames), expected, rtol=1e-4, atol=1e-5)


def test_report_counts_the_weights_of_every_part_by_status(golden):
    report = load_pretrained(Classifier(3, **ENCODER | {"img_size": 48}), golden)
    table = describe(report).splitlines()
    assert table[0].split() == ["loaded", "resized", "missing", "unused"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert rows["encoder.blocks"] == ["24"]
    assert rows["encoder.pos_embed"] == ["1", "1"]
    assert rows["head"] == ["2"]
    total = sum(int(count) for row in rows.values() for count in row)
    assert total == sum(map(len, report.values()))


# Our own checkpoints


def test_checkpoint_of_a_linear_probe_gives_its_best_head(tmp_path):
    state = {f"encoder.{key}": value for key, value in Encoder(**ENCODER).state_dict().items()}
    for head in range(3):
        state[f"head.{head}.weight"] = torch.randn(4, 48)
        state[f"head.{head}.bias"] = torch.randn(4)
    state["head.right"] = torch.tensor([1.0, 5.0, 2.0])
    torch.save({"state": {"model": state}}, tmp_path / "probe.pt")
    net = Classifier(4, **ENCODER)
    report = load_pretrained(net, str(tmp_path / "probe.pt"))
    assert torch.equal(net.head.weight, state["head.1.weight"])
    assert torch.equal(net.head.bias, state["head.1.bias"])
    assert not report["missing"] and not report["unused"]


@pytest.mark.parametrize("active", [False, True])
def test_averages_of_ema_replace_the_weights_unless_they_stand_there_already(tmp_path, active):
    trained = Encoder(**ENCODER).state_dict()
    trained = {f"encoder.{key}": torch.zeros_like(value) for key, value in trained.items()}
    averages = {f"module.{key}": torch.ones_like(value) for key, value in trained.items()}
    ema = {
        "ema_weights_active": active,
        "ema_model": {"named_parameters_dict": averages, "named_buffers_dict": {}},
    }
    state = {"model": trained, "algorithms": [("EMA", ema)]}
    torch.save({"state": state}, tmp_path / "ema.pt")
    found = read_checkpoint(str(tmp_path / "ema.pt"))
    assert found.keys() == trained.keys()
    assert all((value == (0.0 if active else 1.0)).all() for value in found.values())


def test_a_run_directory_stands_for_its_newest_checkpoint(tmp_path):
    state = ViCMAE(**TINY).state_dict()
    newest = write_run(tmp_path / "runs" / "one", "model: {}", state)
    by_run, by_file = read_checkpoint(str(tmp_path / "runs" / "one")), read_checkpoint(newest)
    assert by_run.keys() == by_file.keys() == state.keys()
    assert all(torch.equal(by_run[key], state[key]) for key in state)


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    write_run(tmp_path / "runs" / "one", "model: {}")
    with pytest.raises(ValueError, match=r"runs/one: holds neither checkpoints/latest-rank0.pt"):
        read_checkpoint(str(tmp_path / "runs" / "one"))


def test_wrappers_inside_blocks_are_removed():
    state = Encoder(**ENCODER).state_dict()
    wrapped = {re.sub(r"(blocks.1.)", r"\1_orig_mod.", key): v for key, v in state.items()}
    found, _ = find_vit({"model": wrapped})
    assert found.keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "file.pth is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS; run git lfs pull",
        ),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"PK" + bytes(80), "is truncated or corrupt"),
    ],
)
def test_file_that_is_no_checkpoint_is_named_as_what_it_is(tmp_path, content, complaint):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_checkpoint(str(tmp_path / "file.pth"))


def test_flipped_bit_in_a_file_is_found(tmp_path):
    torch.save(Encoder(**ENCODER).state_dict(), tmp_path / "file.pth")
    data = bytearray((tmp_path / "file.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "file.pth").write_bytes(data)
    with pytest.raises(ValueError, match="in it has another checksum"):
        read_checkpoint(str(tmp_path / "file.pth"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda value: value.to(torch.int8), "has the type torch.int8; give unquantised weights"),
        (lambda value: value * math.nan, "is not finite"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(change, complaint):
    state = Encoder(**ENCODER).state_dict()
    state["blocks.1.attn.qkv.weight"] = change(state["blocks.1.attn.qkv.weight"])
    with pytest.raises(ValueError, match=f"encoder.blocks.1.attn.qkv.weight {complaint}"):
        load_pretrained(Classifier(4, **ENCODER), state)


def test_names_that_resemble_another_kind_of_vit_do_no_harm():
    state = Encoder(**ENCODER).state_dict() | {
        "europe.weight": torch.ones(2),
        "aux.gamma": torch.ones(1),
    }
    assert load_pretrained(Classifier(4, **ENCODER), state)["unused"] == [
        "europe.weight",
        "aux.gamma",
    ]
