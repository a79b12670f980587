"""Folders of Hugging Face's transformers, compared with transformers' own forward passes."""

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from model import Classifier, ViCMAE
from training.sizes import known_model
from training.weights import load_pretrained, read_checkpoint

ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}
OURS = {"decoder_num_heads": 2, "projector_hidden_dim": 8, "projector_out_dim": 8}
IMAGES = {"views": (1, 2, 3, 32, 32), "noise": (1, 2, 16)}


def saved(model, folder) -> str:
    """Save a model whose weights are all random, and return the folder."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def test_vit_mae_of_transformers_is_loaded_with_its_decoder(tmp_path):
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**ENCODER, **DECODER, mask_ratio=0.5)).eval()
    folder = saved(theirs, tmp_path)
    sizes = known_model(folder)["model"]
    assert (sizes["num_heads"], sizes["decoder_embed_dim"]) == (2, 16)
    ours = ViCMAE(**sizes | OURS).eval()
    report = load_pretrained(ours, folder)
    assert {name.split(".")[0] for name in report["missing"]} == {"projector"}
    batch = {name: torch.rand(shape) for name, shape in IMAGES.items()}
    with torch.no_grad():
        outputs = ours(batch)
        for view in (0, 1):
            pixels, noise = batch["views"][:, view], batch["noise"][:, view]
            expected = theirs(pixel_values=pixels, noise=noise).logits  # (1, N, P)
            torch.testing.assert_close(outputs["pred"][:, view], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
def test_vit_of_transformers_gives_the_same_tokens(tmp_path, kind):
    theirs = kind(ViTConfig(**ENCODER, num_labels=3)).eval()
    folder = saved(theirs, tmp_path)
    ours = Classifier(3, **known_model(folder)["model"]).eval()
    load_pretrained(ours, folder)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = getattr(theirs, "vit", theirs)(images).last_hidden_state
        torch.testing.assert_close(ours.encoder(images), expected, rtol=1e-4, atol=1e-5)
        if kind is ViTForImageClassification:
            logits = ours.head(ours.encoder(images)[:, 0])
            torch.testing.assert_close(logits, theirs(images).logits, rtol=1e-4, atol=1e-5)


def test_dinov2_is_named_as_another_kind_of_vit(tmp_path):
    sizes = {name: value for name, value in ENCODER.items() if name != "intermediate_size"}
    folder = saved(Dinov2Model(Dinov2Config(**sizes)), tmp_path)
    ours = ViCMAE(**known_model(folder)["model"] | OURS)
    with pytest.raises(ValueError, match="is a ViT with layer scale"):
        load_pretrained(ours, folder)


def test_name_that_is_neither_on_disk_nor_in_the_cache_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="checkpoint runs/none does not exist, nor in"):
        read_checkpoint("runs/none")
