"""The check of keys before anything heavy is imported, against load_config."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import eval as evaluation
import finetune
import pretrain
from training.config import load_config
from training.keys import check_keys

PRETRAIN = (pretrain.PretrainConfig, "yamls/demo.yaml")
FINETUNE = (finetune.FinetuneConfig, "yamls/finetune_demo.yaml")
TUBEVIT = (finetune.FinetuneConfig, "yamls/methods/tubevit.yaml")
EVAL = (evaluation.EvalConfig, "yamls/eval_demo.yaml")


def early_error(stage: type, arguments: list[str]) -> str | None:
    """Return the line with which check_keys ends the program; None if it does not."""
    try:
        check_keys(f"{stage.__module__}.py", stage.__name__, arguments)
    except SystemExit as end:
        return str(end.code).partition(": ")[2]


@pytest.mark.parametrize(
    ("stage", "mistake"),
    [
        (PRETRAIN, "modle.depth=3"),
        (PRETRAIN, "=3"),
        (PRETRAIN, "predict=x"),
        (PRETRAIN, "seed="),
        (PRETRAIN, "none.yaml"),
        (PRETRAIN, "model.dpth=3"),
        (PRETRAIN, "model.queue_size=3"),
        (PRETRAIN, "data.bach=3"),
        (PRETRAIN, "data.streams=[{path: x}, {pth: x}]"),
        (PRETRAIN, "augment.video.hu=1"),
        (PRETRAIN, "augment.img_size=1"),
        (PRETRAIN, "optimizer.lr=1"),
        (PRETRAIN, "schedule.t_wrmup=1"),
        (PRETRAIN, "trainer.max_durtion=1ep"),
        (PRETRAIN, "trainer.save_folder=x"),
        (PRETRAIN, "checkpoints.run=x"),
        (PRETRAIN, "algorithms.EMA.half=1"),
        (PRETRAIN, "algorithms.FreezeEncoder.tme=1"),
        (PRETRAIN, "callbacks.LRMonitr={}"),
        (PRETRAIN, "callbacks.KNN.bnk=1"),
        (PRETRAIN, "loggers.WandBLogger.projct=x"),
        (FINETUNE, "make_demo=x"),
        (FINETUNE, "augment.hue=1"),
        (FINETUNE, "eval_data.pths=1"),
        (FINETUNE, "lars.base_lr=1"),
        (TUBEVIT, "model.tubes=[{kernel: [1, 8, 8], strid: [1, 8, 8]}]"),
        (EVAL, "trainer.device=cpu"),
        (EVAL, "probe.bnk=1"),
        (EVAL, "accuracy.pths=1"),
    ],
)
def test_mistyped_key_is_answered_as_load_config_would(stage, mistake, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, file = stage
    with pytest.raises(ValueError) as error:
        load_config([file, mistake], config)
    assert early_error(config, [file, mistake, "--plan=3"]) == str(error.value)


@pytest.mark.parametrize("stage", [PRETRAIN, FINETUNE, EVAL])
@pytest.mark.parametrize(
    "argument",
    ["--plan", "nonsense", "seed=x", "method=none", "callbacks={my.Own: {any: 1}}", "data=3"],
)
def test_all_that_are_no_keys_are_left_to_load_config(stage, argument, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, file = stage
    if config is evaluation.EvalConfig and argument.startswith(("callbacks", "data")):
        argument = "model={any: 1}"
    assert early_error(config, [file, argument]) is None


def test_files_are_read_as_utf8_whatever_the_locale_is(tmp_path):
    (tmp_path / "cjk.yaml").write_text("checkpoint: runs/猫\n", encoding="utf-8")
    (tmp_path / "cjk_stage.py").write_text("Config = '猫'\n", encoding="utf-8")
    arguments = ("cjk_stage.py", "Config", [str(tmp_path / "cjk.yaml")])
    check = f"from training.keys import check_keys; check_keys(*{arguments})"
    command = [sys.executable, "-c", check]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(command, env=os.environ | locale | paths, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_keys_are_those_of_the_method_that_is_chosen(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, file = PRETRAIN
    arguments = [file, "model.queue_size=64"]
    assert "model.queue_size=64: is not a key of this block" in early_error(config, arguments)
    assert early_error(config, [*arguments, "method=moco_v2"]) is None


def test_help_wins_over_a_mistake_and_unusual_code_is_left_alone(tmp_path, monkeypatch):
    assert early_error(pretrain.PretrainConfig, ["--help", "modle=1"]) is None
    monkeypatch.syspath_prepend(tmp_path)
    text = "Config = make()\nclass Other(base.Config): pass\n"
    (tmp_path / "odd_stage.py").write_text(text)
    for name in ("Config", "Other", "Missing"):
        check_keys(str(tmp_path / "odd_stage.py"), name, ["modle=1"])
    check_keys("link_with_another_name.py", "Config", ["modle=1"])


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py", "eval.py"])
def test_stage_refuses_a_key_before_it_imports_torch(script):
    command = [sys.executable, "-X", "importtime", script, "runn_name=x"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    expected = f"{script}: runn_name=x: is not a key of this block; did you mean run_name?"
    assert result.stderr.splitlines()[-1] == expected and result.returncode == 1
    assert "omegaconf" in result.stderr and "torch" not in result.stderr
