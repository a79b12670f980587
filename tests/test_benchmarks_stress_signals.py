"""Signals to small runs in several phases: how the runs end, and what is saved."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_stage, start_ranks
from torch.multiprocessing import ProcessExitedException

import finetune

sys.path.insert(0, str(ROOT / "benchmarks"))
from stress_signals import (
    Case,
    all_cases,
    covering_cases,
    faults_of,
    rank_tracebacks,
    run_paused,
    send,
    small_run,
)


@pytest.fixture(scope="module")
def folder(demo, pretrained, tmp_path_factory) -> Path:
    """A folder with data, and with a pre-trained and a fine-tuned run."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "demo").symlink_to(demo)
    shutil.copytree(pretrained.parent.parent, folder / "runs" / "pretrain", symlinks=True)
    arguments = [*small_run(folder, "finetune", 0), "run_name=finetune"]
    run_stage(finetune, [*arguments, "trainer.max_duration=1ba"], folder)
    return folder


def run_rank(rank: int, case: Case, arguments: list[str], folder: Path) -> None:
    """Run a stage in a process group of its own, whose data workers are forked as usual."""
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()
    os.chdir(folder)
    file = os.open("out.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    Path(f"pid.{rank}").write_text(str(os.getpid()))
    sys.argv = [f"{case.stage}.py", *arguments]
    try:
        run_paused(case.stage, case.phase, folder)
    except SystemExit as end:
        # A process of multiprocessing would wait for its data workers without killing them.
        os._exit(end.code)


def signal_ranks(case: Case, folder: Path) -> None:
    """Wait until all ranks pause, and send the case's signal."""
    while len(list(folder.glob("paused.*"))) < case.ranks:
        time.sleep(0.02)
    pids = [int((folder / f"pid.{rank}").read_text()) for rank in range(case.ranks)]
    targets = {"group": [-pid for pid in pids], "rank": pids[-1:]}
    send(case, targets.get(case.target, pids), folder)


@pytest.mark.parametrize(
    "case",
    [
        Case("pretrain", "loader", "SIGTERM", "group", 4, 1),
        Case("pretrain", "write", "SIGINT", "ranks", 0, 2),
        Case("pretrain", "measure", "SIGUSR1", "group", 4, 1),
        Case("pretrain", "loader", "SIGINT twice", "group", 0, 1),
        Case("finetune", "measure", "SIGTERM", "rank", 0, 2),
        Case("eval", "loader", "SIGINT", "group", 4, 1),
    ],
)
def test_signalled_run_ends_with_its_code_one_line_and_an_intact_checkpoint(case, folder, tmp_path):
    arguments = [*small_run(folder, case.stage, case.workers), "run_name=run"]
    sender = threading.Thread(target=signal_ranks, args=(case, tmp_path), daemon=True)
    sender.start()
    with pytest.raises(ProcessExitedException) as end:
        start_ranks(tmp_path, case.ranks, run_rank, case, arguments, tmp_path)
    for file in tmp_path.glob("pid.*"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)
    text = (tmp_path / "out.txt").read_text()
    assert list(faults_of(case, end.value.exit_code, text, tmp_path)) == []


def test_faults_of_a_run_are_found(tmp_path):
    case = Case("pretrain", "loader", "SIGTERM", "group", 4, 1)
    saved = "stopped at epoch 0, step 2; saved in run/ep0-ba2.pt; run the same command to resume"
    assert list(faults_of(case, 1, "killed", tmp_path)) == [
        "exit code 1, not 75",
        "0 lines about the checkpoint",
    ]
    corrupt = tmp_path / "run" / "ep0-ba2.pt"
    corrupt.parent.mkdir()
    torch.save({"x": torch.zeros(9)}, corrupt)
    assert list(faults_of(case, 75, saved, tmp_path)) == []
    corrupt.write_bytes(corrupt.read_bytes()[:-9])
    (fault,) = faults_of(case, 75, saved, tmp_path)
    assert "ep0-ba2.pt is corrupt" in fault
    trace = 'Traceback (most recent call last):\n  File "{}", line 1\n'
    assert rank_tracebacks(trace.format("composer/cli/launcher.py")) == 0
    assert rank_tracebacks(trace.format("pretrain.py")) == 1


def test_drawn_cases_have_every_triple_of_values():
    def triples(cases: list[Case]) -> set:
        return {(case.stage, case.phase, case.target) for case in cases}

    assert triples(covering_cases(0)) == triples(all_cases())
    assert len(covering_cases(0)) < len(all_cases()) / 5
