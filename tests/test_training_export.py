"""Exports, loaded by other libraries in a process of their own."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import ENCODER, TINY

from eval import load_encoder
from model import Classifier, ViCMAE
from training.export import check_export, export

LOAD = """
import json, sys
import numpy as np
import onnxruntime, timm, torch, transformers

images = torch.from_numpy(np.load("images.npy"))
noise = torch.from_numpy(np.load("noise.npy"))
with torch.no_grad():
    model = timm.create_model("local-dir:timm", pretrained=True).eval()
    found = {"timm": model(images)}
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"], model.pretrained_cfg
    assert timm.data.resolve_model_data_config(model)["mean"][0] == 0.485
    session = onnxruntime.InferenceSession("model.onnx")
    for count in (1, 3):
        (outputs,) = session.run(None, {"images": images[:count].numpy()})
        assert len(outputs) == count
    found["onnx"] = torch.from_numpy(outputs)
    model = transformers.AutoModelForImageClassification.from_pretrained("hf")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    found["hf"] = model(images).logits
    processor = transformers.AutoImageProcessor.from_pretrained("hf")
    assert processor(np.zeros((60, 90, 3), np.uint8)).pixel_values[0].shape == images.shape[1:]
    encoder = transformers.AutoModel.from_pretrained("encoder")
    found["encoder"] = encoder(images).last_hidden_state
    mae = transformers.AutoModelForPreTraining.from_pretrained("mae")
    found["mae"] = mae(images, noise=noise).logits
np.savez("found.npz", **{name: value.numpy() for name, value in found.items()})
"""


def random_weights(net):
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return net.eval()


def test_every_export_gives_our_outputs_in_another_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = random_weights(ViCMAE(**TINY))
    mean, cls = (random_weights(Classifier(3, **ENCODER, pool=pool)) for pool in ("mean", "cls"))
    mean.class_names = cls.class_names = ["a", "b", "c"]
    exports = {"timm:timm": mean, "model.onnx": mean, "transformers:hf": cls}
    exports |= {"transformers:encoder": net, "vit_mae:mae": net}
    for to, model in exports.items():
        export(model, to)
    printed = capsys.readouterr().out
    assert 'timm.create_model("local-dir:timm", pretrained=True)' in printed
    assert 'transformers.ViTForImageClassification.from_pretrained("hf")' in printed

    size, patches = net.encoder.img_size, net.encoder.num_patches
    images, noise = torch.rand(3, 3, size, size), torch.rand(3, patches)
    np.save("images.npy", images)
    np.save("noise.npy", noise)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", LOAD], check=True, env=offline)
    found = np.load("found.npz")
    inputs = {"inputs": images[:, None, None]}
    views = {
        "views": images[:, None].repeat(1, 2, 1, 1, 1),
        "noise": noise[:, None].repeat(1, 2, 1),
    }
    with torch.no_grad():
        expected = {
            "timm": mean(inputs)[:, 0],
            "onnx": mean(inputs)[:, 0],
            "hf": cls(inputs)[:, 0],
            "encoder": net.encoder(images),
            "mae": net(views)["pred"][:, 0],
        }
    assert expected.keys() == set(found.files)
    for name, value in expected.items():
        assert value.abs().max() > 0.01
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("to", ["net.safetensors", "timm:net", "transformers:net"])
def test_export_is_read_back_with_its_heads_by_this_repository(tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    net = random_weights(ViCMAE(**TINY))
    export(net, to, crop_pct=0.9)
    back = load_encoder(to.rpartition(":")[2])
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(back(images), net.encoder(images), rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_tell_their_heads_are_refused(tmp_path):
    torch.save(ViCMAE(**TINY).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"model\.num_heads: missing"):
        load_encoder(str(tmp_path / "net.pt"))


@pytest.mark.parametrize(
    ("to", "complaint"),
    [
        ("x.pt", "must be FILE.safetensors, FILE.onnx, timm:FOLDER"),
        ("keras:folder", "must be FILE.safetensors"),
        ("none/x.onnx", "its folder does not exist"),
        ("timm:none/folder", "its folder does not exist"),
        ("is_folder.safetensors", "there is a folder of this name; give another name"),
        ("timm:is_file", "there is a file of this name; give another name"),
    ],
)
def test_export_that_cannot_be_written_is_refused(to, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "is_folder.safetensors").mkdir()
    (tmp_path / "is_file").touch()
    with pytest.raises(ValueError, match=complaint):
        check_export(to)


@pytest.mark.parametrize(
    ("net", "to", "complaint"),
    [
        (Classifier(3, **ENCODER), "transformers:x", "reads CLS, this one the mean"),
        (Classifier(3, **ENCODER), "vit_mae:x", "needs a decoder"),
        (Classifier(3, **ENCODER, num_frames=4), "timm:x", "timm has no ViT for clips"),
    ],
)
def test_model_that_a_library_lacks_is_refused(net, to, complaint):
    with pytest.raises(ValueError, match=complaint):
        export(net, to)
