"""A training prints lines into a log file, and one bar into a terminal."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from composer.core import Time, Timestamp
from conftest import run_stage, small

import pretrain
from training.progress import LINE_STEPS, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def arguments(demo) -> list[str]:
    return [*small(demo), "data.num_workers=0", "callbacks.KNN.every=1"]


def run(arguments, tmp_path, monkeypatch, stream) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    run_stage(pretrain, arguments, tmp_path)
    return stream.getvalue()


def test_log_file_has_plain_lines_with_losses_rate_speed_and_time_left(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.progress.LINE_STEPS", 2)
    printed = run(arguments, tmp_path, monkeypatch, io.StringIO())
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == [
        "step 2/6, epoch 1",
        "step 4/6, epoch 2",
        "step 6/6, epoch 2",
    ]
    numbers = r"loss \d\.\d{3}, recon \d\.\d{3}, contr \d\.\d{3}, lr \d\.\de-\d\d, \d+/s"
    assert re.fullmatch(rf"step 2/6, epoch 1: {numbers}, 00:\d\d left", lines[0])
    assert re.fullmatch(rf"step 4/6, epoch 2: {numbers}, k-NN 0\.\d{{3}}, 00:\d\d left", lines[1])
    assert "\r" not in printed
    assert "Config:" not in printed
    # 10,000 steps take less than a megabyte, with a line every LINE_STEPS steps.
    assert max(map(len, lines)) * 10_000 / LINE_STEPS < 1e6


def test_log_file_says_that_the_first_step_is_prepared_if_that_is_slow(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.announce.SLOW", 0.0)
    arguments = [*arguments, "trainer.max_duration=1ba"]
    printed = run(arguments, tmp_path, monkeypatch, io.StringIO()).splitlines()
    waiting = printed.index("preparing the first step: k-NN before training, compilation ...")
    assert printed.index("opening the data sets ...") < waiting < len(printed) - 1
    assert printed[-1].startswith("step 1/1")


@pytest.mark.parametrize(("step", "task"), [(5, "preparing the first"), (6, "repeating the eval")])
def test_start_that_only_repeats_an_evaluation_does_not_announce_a_step(step, task, monkeypatch):
    announced = []
    monkeypatch.setattr("training.progress.announce_later", announced.append)
    state = SimpleNamespace(timestamp=Timestamp(batch=step), max_duration=Time.from_batch(6))
    Progress().after_load(state, None)
    assert announced[0].startswith(task)


def test_terminal_has_one_bar_for_the_whole_training(arguments, tmp_path, monkeypatch):
    printed = run(arguments, tmp_path, monkeypatch, Terminal())
    bars = [part for part in re.split(r"[\r\n]", printed) if re.search(r"\d/6, ", part)]
    assert "100%" in bars[-1]
    assert "6/6, 00:00 left, loss" in bars[-1]
    assert "Config:" not in printed


def test_composer_s_own_bar_takes_the_place_of_ours(arguments, tmp_path, capfd):
    own = [*arguments, "trainer.progress_bar=true", "trainer.max_duration=1ba"]
    run_stage(pretrain, own, tmp_path)
    printed = "".join(capfd.readouterr())
    assert "step 1/1" not in printed
    assert "Config:" in printed
