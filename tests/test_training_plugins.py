"""training/plugins.py: Composer's algorithms do with these models what they promise."""

import inspect
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer.algorithms.low_precision_layernorm import LowPrecisionLayerNorm
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import LPLayerNorm
from composer.callbacks import EarlyStopper
from composer.core import Event, Precision
from conftest import ROOT, losses, run_stage, small
from tiny_models import TINY, random_batch
from torch import nn

import pretrain
from model import ViCMAE
from pretrain import PretrainConfig
from training.checkpoints import Checkpoints
from training.config import build_named, load_config
from training.plugins import ALGORITHMS, CALLBACKS, LOGGERS, place_files


def state_of(model: nn.Module, precision: Precision) -> SimpleNamespace:
    """Return the fields of Composer's State that these algorithms use."""
    fields = {"model": model, "precision": precision, "_precision": precision}
    return SimpleNamespace(**fields, optimizers=[], fsdp_config_version=0)


LOGGER = SimpleNamespace(log_metrics=lambda metrics: None)


def test_files_of_callbacks_and_loggers_are_in_the_run_directory_unless_placed():
    classes = {known.__name__: known for known in CALLBACKS.classes + LOGGERS.classes}
    placed = place_files({name: {} for name in classes}, Path("runs/x"))
    arguments = {name: found for name, found in placed.items() if found}
    assert len(arguments) == 3 and placed.keys() == classes.keys()
    for name, found in arguments.items():
        assert found.keys() <= inspect.signature(classes[name]).parameters.keys()
        assert "runs/x" in str(found)
    given = {"WandBLogger": {"project": "p", "init_kwargs": {"notes": "n"}}, "mine.Own": {"a": 1}}
    expected = {"project": "p", "init_kwargs": {"dir": "runs/x", "notes": "n"}}
    assert place_files(given, Path("runs/x")) == given | {"WandBLogger": expected}
    given = {"TensorboardLogger": {"log_dir": "mine"}}
    assert place_files(given, Path("runs/x")) == given


def test_class_of_composer_that_is_not_listed_is_named_with_its_module():
    assert CALLBACKS.find("composer.callbacks.EarlyStopper") is EarlyStopper
    with pytest.raises(ValueError, match=r"other classes need their module, such as composer\."):
        CALLBACKS.find("EarlyStopper")


def test_null_switches_off_one_class_of_a_block():
    yaml = str(ROOT / "yamls" / "demo.yaml")
    off = ["callbacks.KNN=null", "algorithms.EMA=null", "loggers.FileLogger=null"]
    config = PretrainConfig(**load_config([yaml, "algorithms.SAM={}", *off], PretrainConfig))
    assert config.callbacks.keys() == {"LRMonitor"}
    assert config.algorithms == {"SAM": {}} and config.loggers == {}
    assert config.data_sets == [stream["path"] for stream in config.data["streams"]]
    with pytest.raises(ValueError, match=r"callbacks\.KNM=null: is not a key of this block"):
        load_config([yaml, "callbacks.KNM=null"], PretrainConfig)


def test_log_file_of_a_resumed_run_is_another_file(monkeypatch):
    names = set()
    for second in (1, 2):
        monkeypatch.setattr(time, "strftime", lambda _, second=second: f"second{second}")
        names.add(place_files({"FileLogger": {}}, Path("runs/x"))["FileLogger"]["filename"])
    assert names == {f"runs/x/logs-second{second}-rank{{rank}}.txt" for second in (1, 2)}


def test_low_precision_layernorm_replaces_every_norm():
    net, batch = ViCMAE(**TINY).eval(), random_batch(2)
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.LayerNorm)]
    with torch.autocast("cpu", torch.bfloat16):
        before = net(batch)
    state = state_of(net, Precision.AMP_BF16)
    LowPrecisionLayerNorm(apply_at=Event.INIT).apply(Event.INIT, state, LOGGER)
    replaced = [name for name, module in net.named_modules() if isinstance(module, LPLayerNorm)]
    assert replaced == norms and len(norms) == 2 * (2 + 2) + 2
    # Composer lowers the precision under CUDA's autocast only: here the numbers stay.
    with torch.autocast("cpu", torch.bfloat16):
        after = net(batch)
    torch.testing.assert_close(after["pred"], before["pred"])


def test_channels_last_changes_the_layout_of_the_patch_embedding_and_no_loss(
    demo, tmp_path, monkeypatch
):
    layouts = set()

    def batch_start(self, state, logger) -> None:
        weight = state.model.encoder.patch_embed["proj"].weight
        layouts.add(weight.is_contiguous(memory_format=torch.channels_last))

    arguments = [*small(demo), "callbacks=null", "data.num_workers=0", "trainer.max_duration=3ba"]
    run_stage(pretrain, [*arguments, "run_name=plain"], tmp_path)
    monkeypatch.setattr(Checkpoints, "batch_start", batch_start)
    run_stage(pretrain, [*arguments, "run_name=last", "algorithms={ChannelsLast: {}}"], tmp_path)
    assert layouts == {True}
    assert losses(tmp_path, "last") == pytest.approx(losses(tmp_path, "plain"), rel=1e-5)


def test_gradient_clipping_bounds_the_norm():
    net = ViCMAE(**TINY)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    settings = {"GradientClipping": {"clipping_type": "norm", "clipping_threshold": 0.1}}
    (algorithm,) = build_named(ALGORITHMS, settings)
    algorithm.apply(Event.AFTER_TRAIN_BATCH, state_of(net, Precision.FP32), LOGGER)
    gradients = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert gradients.norm().item() == pytest.approx(0.1, rel=1e-3)
