"""benchmarks/compare.py: trains what is missing, caches probes, and writes means and deviations."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, error_of, run_stage, small

import pretrain
from benchmarks import compare


def run_in_this_process(command: list[str], **options) -> SimpleNamespace:
    """Do what subprocess.run does with pretrain.py, without the start of an interpreter."""
    run_stage(pretrain, command[2:], Path.cwd())
    return SimpleNamespace(returncode=0)


def quoted(words: list[str]) -> str:
    """Return a list in the notation of YAML."""
    return "[" + ", ".join(f"'{word}'" for word in words) + "]"


@pytest.fixture(scope="module")
def commands(demo) -> dict[str, list[str]]:
    base, *settings = small(demo)
    short = [setting for setting in settings if setting.startswith(("make_demo", "data."))]
    vicmae = [str(ROOT / "pretrain.py"), base, *short, "data.num_workers=0"]
    return {"vicmae": vicmae, "mae": [*vicmae, str(ROOT / "yamls" / "methods" / "mae.yaml")]}


@pytest.fixture(scope="module")
def arguments(commands, demo) -> list[str]:
    """A comparison of two methods with two seeds, two steps or so each."""
    methods = ", ".join(f"{name}: {quoted(command)}" for name, command in commands.items())
    probe = f"{{bank: [{demo}/train_images], queries: [{demo}/test_images], labels_per_class: [3]}}"
    return [
        "comparison.to=compare.md",
        "comparison.seconds=0.3",
        "comparison.seeds=2",
        f"comparison.methods={{{methods}}}",
        f"comparison.stills={probe}",
        f"comparison.clips={probe}",
    ]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """A folder with a finished comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        stand_in = SimpleNamespace(run=run_in_this_process, PIPE=subprocess.PIPE)
        patch.setattr(compare, "subprocess", stand_in)
        run_stage(compare, arguments, folder)
    return folder


def cached_probes(folder: Path, method: str) -> list[Path]:
    """Return a file of probe results for each seed."""
    runs = sorted((folder / "runs").glob(f"compare_{method}_[0-9]*_[01]"))
    return [next(run.glob("compare-*.json")) for run in runs]


def test_table_has_means_and_deviations_over_the_seeds(finished):
    budget, _, *lines = (finished / "compare.md").read_text().splitlines()
    assert f"0.3 s of training steps each, 2 seeds, {os.cpu_count()} cores" in budget
    assert lines[0] == "| | steps | stills, knn | stills, linear_3 | clips, knn | clips, linear_3 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| random weights", "| vicmae", "| mae"]
    paths = cached_probes(finished, "mae")
    knn = [100 * json.loads(path.read_text())["knn"] for path in paths]
    steps = json.loads((paths[1].parent / "result.json").read_text())["step"]
    cells = lines[4].split(" | ")
    assert cells[1] == str(steps)
    assert cells[2] == f"{np.mean(knn):.1f} ± {np.std(knn, ddof=1):.1f}"
    assert (finished / "compare.png").stat().st_size > 0


def test_finished_comparison_neither_trains_nor_probes_again(finished, arguments, monkeypatch):
    path = cached_probes(finished, "mae")[1]
    stored = path.read_text()
    path.write_text(json.dumps(json.loads(stored) | {"knn": 1.0}))
    first = 100 * json.loads(cached_probes(finished, "mae")[0].read_text())["knn"]
    monkeypatch.setattr(compare, "subprocess", None)
    run_stage(compare, arguments, finished)
    assert f"| {(first + 100) / 2:.1f} ± " in (finished / "compare.md").read_text()
    path.write_text(stored)


def test_other_probes_are_measured_anew(finished, arguments, monkeypatch):
    def fake_probe(encoder, seed, run, *, k, **block) -> dict[str, float]:
        return {"knn": k / 100}

    monkeypatch.setattr(compare, "measure_probe", fake_probe)
    monkeypatch.setattr(compare, "subprocess", None)
    changed = [*arguments, "comparison.clips.k=5", "comparison.stills.k=7"]
    run_stage(compare, changed, finished)
    assert "| 7.0 ± 0.0 | 5.0 ± 0.0 |" in (finished / "compare.md").read_text()


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "vicmae",
            "model.pool=max",
            "compare_vicmae_speed was made with other values of model.pool",
        ),
        ("vicmae", "trainer.precision=fp32", "made with other values of trainer; delete it"),
        ("last", "model.mask_ratio=1.2", "mask_ratio=1.2"),
        ("last", "model.pol=max", "did you mean"),
    ],
)
def test_mistake_in_a_command_is_named_before_any_training(
    finished, arguments, commands, monkeypatch, method, change, message
):
    monkeypatch.setattr(compare, "subprocess", None)
    command = quoted([*commands["vicmae"], change])
    changed = [*arguments, f"comparison.methods.{method}={command}"]
    assert message in error_of(compare, changed, finished)


def test_command_that_is_no_training_and_a_missing_folder_are_named(finished, arguments):
    other = [*arguments, "comparison.methods.last=[train.py, yamls/demo.yaml]"]
    assert "must begin with pretrain.py or finetune.py" in error_of(compare, other, finished)
    message = error_of(compare, [*arguments, "comparison.to=no/x.md"], finished)
    assert "comparison.to=no/x.md: its folder does not exist" in message


def test_run_left_behind_by_a_comparison_keeps_the_lock(finished, arguments, monkeypatch):
    monkeypatch.setattr(compare, "subprocess", None)
    monkeypatch.chdir(finished)
    waits = [sys.executable, "-c", "print('started', flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with compare.exclusive_lock() as lock:
        orphan = subprocess.Popen(waits, **pipes, pass_fds=[lock.fileno()])
    assert orphan.stdout.readline() == b"started\n"
    assert "held by another comparison, or a run" in error_of(compare, arguments, finished)
    orphan.communicate(b"\n")
    run_stage(compare, arguments, finished)
