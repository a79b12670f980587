"""The sizes of a model, read from its weights, its run or its YAML file."""

import json

import pytest
import torch
from conftest import write_run
from tiny_models import CLIPS, ENCODER, TINY

from model import Classifier, ViCMAE
from training import sizes
from training.sizes import known_model, vit_sizes


def test_sizes_of_our_models_are_read_from_their_weights():
    net = ViCMAE(**TINY)
    not_in_shapes = {"num_heads", "decoder_num_heads"}
    expected = {key: value for key, value in TINY.items() if key not in not_in_shapes}
    assert vit_sizes(net.state_dict()) == expected
    clips = Classifier(4, **ENCODER, **CLIPS)
    encoder = {key: value for key, value in ENCODER.items() if key != "num_heads"}
    assert vit_sizes(clips.state_dict()) == encoder | CLIPS
    with pytest.raises(ValueError, match=r"have no encoder.patch_embed.proj.weight"):
        vit_sizes({"encoder.blocks.0.norm1.weight": torch.ones(48)})


@pytest.mark.parametrize(("more", "stage"), [("", "pretrain"), ("eval_data: {}\n", "finetune")])
def test_known_sizes_of_a_run_are_its_model_block_with_the_default_sizes_of_an_encoder(
    tmp_path, more, stage
):
    model = {"depth": 3, "num_heads": 4, "mask": "none", "contrast": "simsiam"}
    config = f"{more}method: simsiam\nmodel: {json.dumps(model)}\n"
    newest = write_run(tmp_path / "runs" / "one", config)
    defaults = {"img_size": 224, "patch_size": 16, "embed_dim": 768}
    expected = {"method": "simsiam", "stage": stage, "model": defaults | model}
    assert known_model(newest) == known_model(str(tmp_path / "runs" / "one")) == expected


def test_known_sizes_of_a_bare_file_are_those_of_its_weights(tmp_path):
    pretrained, classifier = ViCMAE(**TINY), Classifier(4, **ENCODER)
    torch.save({"model": pretrained.state_dict()}, tmp_path / "pretrained.pth")
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    found = known_model(str(tmp_path / "pretrained.pth"))
    assert found == {
        "method": None,
        "stage": "pretrain",
        "model": vit_sizes(pretrained.state_dict()),
    }
    assert known_model(str(tmp_path / "classifier.pth"))["stage"] == "finetune"


def test_known_sizes_of_a_corrupt_configuration_are_an_error_that_names_it(tmp_path):
    newest = write_run(tmp_path / "runs" / "one", "model: [1, ")
    with pytest.raises(ValueError, match=r"runs/one/config\.yaml: corrupt"):
        known_model(newest)


def test_sizes_of_a_planned_run_come_from_its_yaml_and_the_runs_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "YAMLS", tmp_path)
    (tmp_path / "big.yaml").write_text("model: {depth: 3, decoder_depth: 1, img_size: 32}")
    second = "pretrained: runs/big/checkpoints/latest-rank0.pt\nmodel: {img_size: 64, pool: cls}\n"
    (tmp_path / "tuned.yaml").write_text(f"eval_data: {{}}\n{second}")
    monkeypatch.chdir(tmp_path)
    expected = {"img_size": 64, "patch_size": 16, "embed_dim": 768, "depth": 3, "num_heads": 12}
    expected["pool"] = "cls"
    found = known_model("runs/tuned/checkpoints/latest-rank0.pt", planned=True)
    assert found == {"method": None, "stage": "finetune", "model": expected}
    with pytest.raises(ValueError, match=r"runs/other does not exist, nor does .*other.yaml"):
        known_model("runs/other", planned=True)
    with pytest.raises(ValueError, match=r"runs/tuned/.* does not exist"):
        known_model("runs/tuned/checkpoints/latest-rank0.pt")


def test_sizes_that_foreign_weights_would_give_to_a_planned_run_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "YAMLS", tmp_path)
    (tmp_path / "tuned.yaml").write_text("eval_data: {}\npretrained: mae.pth\nmodel: {pool: cls}\n")
    (tmp_path / "more.yaml").write_text("pretrained: runs/one/checkpoints/latest-rank0.pt\n")
    monkeypatch.chdir(tmp_path)
    assert known_model("runs/tuned", planned=True)["model"] == {"pool": "cls"}
    bare = write_run(tmp_path / "runs" / "one", "", Classifier(4, **ENCODER).state_dict())
    (tmp_path / "runs" / "one" / "config.yaml").unlink()  # the number of heads is unknown
    shown = {name: ENCODER[name] for name in ENCODER if name != "num_heads"}
    assert known_model(bare)["model"] == known_model("runs/more", planned=True)["model"] == shown
