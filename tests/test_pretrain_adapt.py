"""Pre-training that begins with the weights of another run."""

import pytest
import torch
from conftest import error_of, losses, run_stage, small, write_run
from tiny_models import TINY

import pretrain
from model import ViCMAE
from pretrain import PretrainConfig
from training.config import load_config
from training.optimizer import build_optimizer
from training.weights import LATEST, load_pretrained, read_checkpoint


@pytest.fixture
def arguments(demo) -> list[str]:
    return [*small(demo), "callbacks=null", "data.num_workers=0", "checkpoints.interval=1ba"]


def weights_of(folder, name: str) -> dict[str, torch.Tensor]:
    """Return the parameters in a run's newest checkpoint, without BatchNorm's statistics."""
    weights = read_checkpoint(str(folder / "runs" / name / "checkpoints" / LATEST))
    return {key: value for key, value in weights.items() if value.is_floating_point()}


def test_run_begins_with_the_weights_and_sizes_of_another(arguments, tmp_path, capfd):
    first = ["run_name=first", "trainer.max_duration=2ba", "model.depth=2"]
    run_stage(pretrain, [*arguments, *first], tmp_path)
    more = ["run_name=more", "pretrained=runs/first", "trainer.max_duration=1ba"]
    run_stage(pretrain, [*arguments, *more, "optimizer.base_lr=1e-12"], tmp_path)
    printed = capfd.readouterr().out
    assert "sizes of runs/first: model.depth=2" in printed
    assert "projector" in printed
    before, after = weights_of(tmp_path, "first"), weights_of(tmp_path, "more")
    kept = [key for key in before if "running" not in key]
    assert len(kept) > 40
    for key in kept:
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=1e-6)


def test_missing_weights_are_one_line(arguments, tmp_path):
    complaint = error_of(pretrain, [*arguments, "pretrained=runs/none"], tmp_path)
    assert "checkpoint runs/none does not exist" in complaint


def test_encoder_is_frozen_at_first_and_the_run_resumes_to_the_bit(arguments, tmp_path):
    frozen = [*arguments, "algorithms={FreezeEncoder: {duration: 4ba}}", "schedule.t_max=2ep"]
    for step in (1, 3):
        run_stage(pretrain, [*frozen, "run_name=half", f"trainer.max_duration={step}ba"], tmp_path)
        if step == 1:
            begin = weights_of(tmp_path, "half")
    now = weights_of(tmp_path, "half")
    encoder = [key for key in now if key.startswith("encoder.")]
    assert all(torch.equal(now[key], begin[key]) for key in encoder)
    assert not torch.equal(now["projector.0.weight"], begin["projector.0.weight"])
    assert not torch.equal(now["decoder.pred.weight"], begin["decoder.pred.weight"])

    run_stage(pretrain, [*frozen, "run_name=half"], tmp_path)
    run_stage(pretrain, [*frozen, "run_name=whole"], tmp_path)
    assert losses(tmp_path, "half") == losses(tmp_path, "whole")
    resumed, whole = weights_of(tmp_path, "half"), weights_of(tmp_path, "whole")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert not torch.equal(whole["encoder.norm.weight"], begin["encoder.norm.weight"])


def test_head_of_another_size_begins_at_random_which_is_said(capsys):
    source, target = ViCMAE(**TINY), ViCMAE(**TINY | {"decoder_depth": 3})
    before = target.decoder.pred.weight.clone()
    with pytest.raises(ValueError, match="decoder"):
        other = ViCMAE(**TINY | {"decoder_embed_dim": 36})
        load_pretrained(other, source.state_dict())
    report = load_pretrained(target, source.state_dict(), ["decoder", "projector"])
    assert "its decoder is of another size or kind, and is left out" in capsys.readouterr().out
    assert torch.equal(target.decoder.pred.weight, before)
    assert torch.equal(target.projector[0].weight, source.projector[0].weight)
    assert "decoder.pred.weight" in report["missing"]


def test_layer_decay_slows_the_first_layers_of_the_encoder_and_no_head():
    net = ViCMAE(**TINY)
    optimizer = build_optimizer(net, 256, base_lr=1.0, layer_decay=0.5)
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    depth = len(net.encoder.blocks)
    assert rates[id(net.projector[0].weight)] == 1
    assert rates[id(net.decoder.pred.weight)] == 1
    for number, block in enumerate(net.encoder.blocks):
        assert rates[id(block.mlp.fc1.weight)] == 0.5 ** (depth - number)
    assert rates[id(net.encoder.cls_token)] == 0.5 ** (depth + 1)


def test_sizes_that_the_settings_of_a_run_leave_out_are_the_defaults(demo, tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "first", "model: {depth: 3}")
    monkeypatch.chdir(tmp_path)
    arguments = [*small(demo), "pretrained=runs/first"]
    config = PretrainConfig(**load_config(arguments, PretrainConfig))
    model = pretrain.take_sizes(config).model
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 3, "num_heads": 12}
    assert {name: model[name] for name in sizes} == sizes
