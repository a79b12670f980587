"""training/writing.py: checkpoints that are written while training goes on, its errors and ends."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.utils.checkpoint import save_checkpoint
from conftest import losses, run_stage, signal_at, small
from test_training_safe_load import train_sharded, whole_weights
from torch.distributed.checkpoint.api import CheckpointException

import pretrain
import training.writing
from training.checkpoints import LATEST, STOPPED, Checkpoints, check_checkpoint
from training.weights import read_checkpoint
from training.writing import Writer

LIMIT = 60  # seconds after which a blocked write gives up, so that a failing test ends


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    """Six steps, a checkpoint after each second."""
    settings = ["callbacks=null", "data.num_workers=0", "run_name=run"]
    return [*small(demo), *settings, "checkpoints={interval: 2ba, keep: 9}"]


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run" / "checkpoints"


def blocked(save: Callable, released: threading.Event, step: int) -> Callable:
    """Return a Writer.save that writes the checkpoint of a step only once it is released."""

    def blocked_save(self: Writer, content, path: Path) -> list[Path]:
        if path.name.removesuffix(".pt").endswith(f"-ba{step}"):
            assert released.wait(LIMIT), "the next step has waited for the write"
        return save(self, content, path)

    return blocked_save


def same(ours: object, theirs: object) -> bool:
    """Return whether nested values of a checkpoint are equal, to the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and bool((ours == theirs) if ours is not None else True)


# Training goes on


def test_next_step_is_done_before_the_write_and_the_file_is_as_composer_wrote_it_at_the_save(
    arguments, tmp_path, monkeypatch
):
    released, start, done = threading.Event(), Writer.start, []

    def start_after_composer(self: Writer, state) -> None:
        if state.timestamp.batch == 2:
            save_checkpoint(state, str(tmp_path / "composer.pt"))
        start(self, state)

    def batch_end(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch == 3:
            done.extend(folder_of(tmp_path).glob("ep*"))
            released.set()

    monkeypatch.setattr(Writer, "save", blocked(Writer.save, released, step=2))
    monkeypatch.setattr(Writer, "start", start_after_composer)
    monkeypatch.setattr(Checkpoints, "batch_end", batch_end)
    run_stage(pretrain, arguments, tmp_path)
    assert released.is_set() and done == []
    path = folder_of(tmp_path) / "ep0-ba2.pt"
    ours, expected = (
        torch.load(file, weights_only=False) for file in (path, tmp_path / "composer.pt")
    )
    for content in (ours, expected):
        for state in content["rng"]:
            state["numpy"] = [
                getattr(part, "tolist", lambda part=part: part)() for part in state["numpy"]
            ]
    assert same(ours, expected)
    later = torch.load(folder_of(tmp_path) / "ep1-ba4.pt", weights_only=False)
    assert not same(later["state"]["model"], ours["state"]["model"])


class Releasing(Callback):
    """Keeps the whole weights after step 2, and lets the write of them begin after step 3."""

    def __init__(self, released: threading.Event):
        self.released = released

    def batch_checkpoint(self, state, logger) -> None:
        if state.timestamp.batch == 2:
            self.weights = {}
            for name, value in state.model.state_dict().items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                self.weights[name] = whole.clone()

    def batch_end(self, state, logger) -> None:
        if state.timestamp.batch == 3:
            self.is_written = Path("runs/run/checkpoints/ep0-ba2").exists()
            self.released.set()


def train_while_shards_wait(rank: int, folder: str) -> None:
    os.chdir(folder)
    released = threading.Event()
    Writer.save = blocked(Writer.save, released, step=2)
    releasing = Releasing(released)
    callbacks = [releasing, Checkpoints(Path("runs/run"), interval="2ba")]
    trainer = train_sharded(Path("runs/run"), callbacks, steps=3)
    assert released.is_set() and not releasing.is_written
    paths = [Path("runs/run/checkpoints", name) for name in ("ep0-ba2", "ep0-ba3")]
    expected = [releasing.weights, whole_weights(trainer)]
    assert not same(*expected)
    for path, weights in zip(paths, expected, strict=True):
        check_checkpoint(path)
        assert same(read_checkpoint(str(path)), weights)


def test_next_step_of_two_ranks_is_done_before_their_shards_which_are_of_the_save(
    tmp_path, on_ranks
):
    on_ranks(2, train_while_shards_wait, str(tmp_path))


# Errors


def run_until_the_disk_is_full(folder: Path, arguments: list[str], error: BaseException) -> str:
    """Run with a second save that fails before step 5 begins; return the last line."""
    save, usage = Writer.save, shutil.disk_usage(folder)._replace(free=1000)

    def failing(self: Writer, content, path: Path) -> list[Path]:
        if path.name == "ep1-ba4.pt" and content is not None:
            raise error
        return save(self, content, path)

    def batch_start(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch == 4:
            wait([self.writer.writing])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Writer, "save", failing)
        patch.setattr(Checkpoints, "batch_start", batch_start)
        patch.setattr(training.writing.shutil, "disk_usage", lambda path: usage)
        run_stage(pretrain, arguments, folder)
    return str(end.value)


def check_end_by_a_full_disk(folder: Path, line: str) -> None:
    expected = "runs/run/checkpoints: disk full: 0.00 GB are free, a checkpoint takes 0.00"
    assert line.startswith(expected) and "\n" not in line
    assert "run the same command again to resume" in line
    assert len(losses(folder, "run")) == 5  # the step after the error, and no other
    assert os.readlink(folder_of(folder) / LATEST) == "ep0-ba2.pt"
    check_checkpoint(folder_of(folder) / LATEST)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0"),
        CheckpointException("write", {}),  # of sharded checkpoints; no subclass of Exception
    ],
)
def test_disk_that_is_full_ends_the_run_at_the_next_step_and_keeps_the_checkpoint_before(
    arguments, tmp_path, error
):
    line = run_until_the_disk_is_full(tmp_path, arguments, error)
    check_end_by_a_full_disk(tmp_path, line)


def fill_the_disk_of_rank_0(rank: int, folder: str, arguments: list[str]) -> None:
    line = run_until_the_disk_is_full(Path(folder), arguments, RuntimeError("unexpected pos"))
    Path(folder, f"end{rank}").write_text(line)


def test_disk_that_is_full_on_rank_0_ends_all_ranks_with_the_same_line(
    arguments, tmp_path, on_ranks
):
    on_ranks(2, fill_the_disk_of_rank_0, str(tmp_path), arguments)
    lines = [(tmp_path / f"end{rank}").read_text() for rank in (0, 1)]
    assert lines[0] == lines[1]
    check_end_by_a_full_disk(tmp_path, lines[0])


def test_run_that_ends_with_an_error_completes_the_checkpoint_that_is_being_written(
    arguments, tmp_path, monkeypatch
):
    released, wait_for_it = threading.Event(), Writer.wait

    def release_and_wait(self: Writer) -> None:
        assert not self.writing.done()
        released.set()
        wait_for_it(self)

    def batch_end(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch == 3:
            raise SystemExit("the loss is nan")

    monkeypatch.setattr(Writer, "save", blocked(Writer.save, released, step=2))
    monkeypatch.setattr(Writer, "wait", release_and_wait)
    monkeypatch.setattr(Checkpoints, "batch_end", batch_end)
    with pytest.raises(SystemExit, match="the loss is nan"):
        run_stage(pretrain, arguments, tmp_path)
    check_checkpoint(folder_of(tmp_path) / "ep0-ba2.pt")


# Stop signals


@pytest.mark.parametrize(
    ("write", "stopped"),
    [
        (2, "ep0-ba3.pt"),  # the stop has a checkpoint of its own, after that of step 2
        (6, "ep2-ba6.pt"),  # the write of the last step, for which the end of training waits
    ],
)
def test_stop_signal_during_a_write_ends_the_run_once_the_newest_checkpoint_is_intact(
    arguments, tmp_path, monkeypatch, capfd, write, stopped
):
    released, finish = threading.Event(), Writer.finish

    def finish_after_the_signal(self: Writer) -> None:
        if self.writing is not None and not self.writing.done():
            if write == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            released.set()
        finish(self)

    monkeypatch.setattr(Writer, "save", blocked(Writer.save, released, step=write))
    monkeypatch.setattr(Writer, "finish", finish_after_the_signal)
    if write == 2:
        monkeypatch.setattr(Checkpoints, "batch_start", signal_at(3))
    else:
        arguments = [*arguments, "checkpoints.interval=9ep"]
    with pytest.raises(SystemExit) as end:
        run_stage(pretrain, arguments, tmp_path)
    assert end.value.code == STOPPED
    assert f"saved in runs/run/checkpoints/{stopped}; " in capfd.readouterr().out
    assert os.readlink(folder_of(tmp_path) / LATEST) == stopped
    for name in {f"ep{write // 3}-ba{write}.pt", stopped}:
        check_checkpoint(folder_of(tmp_path) / name)
    assert not (folder_of(tmp_path) / "aside").exists()
    if write == 6:
        monkeypatch.undo()
        run_stage(pretrain, arguments, tmp_path)
        assert (tmp_path / "runs/run/result.json").exists()
        assert len(losses(tmp_path, "run")) == 6
