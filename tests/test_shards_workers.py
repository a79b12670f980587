"""Processes that convert the parts of a data set."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT


def test_worker_stops_soon_after_its_parent_is_killed(tmp_path):
    """The worker kills its parent at the first input, and must not reach the last input."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tqdm import tqdm\n"
        "from shards.workers import run_parts\n"
        "def work(part, bad_inputs, report):\n"
        "    for number in range(10_000):\n"
        "        report(number)\n"
        "        if number == 0: os.kill(os.getppid(), signal.SIGKILL)\n"
        "    Path(sys.argv[1]).write_text('finished')\n"
        "run_parts(work, ['part-000000'], 1, tqdm(disable=True))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "mark")]
    # The worker holds the pipes too, so that this call returns after both are gone.
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "mark").exists()


def test_program_ends_with_its_code_although_a_killed_worker_raises_an_error():
    """PyTorch raises one in its handler of SIGCHLD; here, each killed worker does."""
    script = (
        "import multiprocessing, signal, time\n"
        "from shards.workers import exit_at_once\n"
        "def complain(number, frame):\n"
        "    raise RuntimeError('a worker was killed')\n"
        "context = multiprocessing.get_context('fork')\n"
        "for _ in range(20):\n"
        "    context.Process(target=time.sleep, args=(60,), daemon=True).start()\n"
        "signal.signal(signal.SIGCHLD, complain)\n"
        "exit_at_once(signal.SIGTERM, None)\n"
    )
    command = [sys.executable, "-c", script]
    # A worker that is left holds the pipes, and the call would not return in time.
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 75
    assert result.stderr == "\nstopped by SIGTERM; run the same command again to continue\n"


@pytest.mark.parametrize("waits", ["in Python", "in C"])
def test_signal_ends_a_program_whose_main_thread_waits(waits):
    """A lock of C that its own thread holds waits for ever, and is not interrupted by signals."""
    script = (
        "import ctypes, os, signal, sys, threading, time\n"
        "from shards.workers import exit_on_signals\n"
        "exit_on_signals()\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "if sys.argv[1] == 'in Python':\n"
        "    time.sleep(60)\n"
        "lock = ctypes.create_string_buffer(64)\n"
        "for _ in range(2):\n"
        "    ctypes.CDLL(None).pthread_mutex_lock(lock)\n"
    )
    command = [sys.executable, "-c", script, waits]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 75
    assert result.stderr == "\nstopped by SIGTERM; run the same command again to continue\n"


def test_signal_of_a_forked_worker_does_not_end_its_parent():
    script = (
        "import multiprocessing, os, signal, time\n"
        "from shards.workers import exit_on_signals\n"
        "def work():\n"
        "    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(3))\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "exit_on_signals()\n"
        "worker = multiprocessing.get_context('fork').Process(target=work)\n"
        "worker.start()\n"
        "worker.join()\n"
        "time.sleep(2)\n"
        "raise SystemExit(worker.exitcode)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stderr) == (3, "")
