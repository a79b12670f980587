"""training/peers.py: what a rank does when another is killed, hangs, fails or leaves in order."""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from composer.utils import dist

import training.peers
from shards.workers import STOPPED
from training.peers import is_connection_lost, peer_watch


def wait_for_each_other() -> None:
    while True:
        torch.distributed.barrier()


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("a mistake of rank 1 alone")


def leave_in_order() -> None:
    torch.distributed.barrier()
    peer_watch().leave()


def join(rank: int, port: int, output: str, behaviour) -> None:
    """Join two ranks as a launcher would have them, and let rank 1 behave in some way."""
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables |= {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    training.peers.INTERVAL, training.peers.LIMIT = 0.1, 2.0
    dist.initialize_dist("cpu", 60.0)
    peer_watch().start()
    try:
        if behaviour is leave_in_order or rank == 1:
            behaviour()
        else:
            wait_for_each_other()
    except Exception:  # as the interpreter ends, not as multiprocessing does
        sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        os._exit(1)


def exits_of(folder: Path, behaviour) -> tuple[list[int], str]:
    """Return the exit codes of both ranks, and what rank 0 wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["composer", "streaming", "timm"])
    context = multiprocessing.get_context("forkserver")
    outputs = [folder / f"stderr{rank}.txt" for rank in range(2)]
    processes = [
        context.Process(target=join, args=(rank, port, str(outputs[rank]), behaviour))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[0].join(120)
    if behaviour is hang:
        processes[1].kill()
    processes[1].join(120)
    return [process.exitcode for process in processes], outputs[0].read_text()


@pytest.mark.parametrize("lost", [be_killed, hang])
def test_rank_that_is_killed_or_hangs_ends_the_other_with_the_code_for_a_new_launch(tmp_path, lost):
    (code, other), line = exits_of(tmp_path, lost)
    assert (code, other) == (STOPPED, -signal.SIGKILL)
    reasons = {be_killed: "the connection to another rank is lost", hang: "no sign of life from"}
    assert line.startswith(f"rank 0: {reasons[lost]}") and line.count("\n") == 1
    assert line.endswith("run the same command to resume\n")


def test_rank_that_fails_ends_the_other_with_the_code_of_an_error(tmp_path):
    codes, line = exits_of(tmp_path, fail)
    assert codes == [1, 1]
    assert line == "rank 1 has ended with an error, see its output\n"


def test_ranks_that_leave_in_order_are_not_lost(tmp_path):
    assert exits_of(tmp_path, leave_in_order) == ([0, 0], "")


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("ncclRemoteError: A call failed possibly due"), True),
        (RuntimeError("Timed out waiting 300000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("Connection refused"), False),  # of a bucket
    ],
)
def test_exceptions_that_mean_a_lost_rank_are_recognised(error, is_lost):
    assert is_connection_lost(error) == is_lost
