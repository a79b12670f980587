"""training/peers.py: what a rank does when another is killed, hangs, fails or leaves in order."""

import atexit
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import fork_server
from torch.distributed import HashStore

import training.peers
from shards.workers import STOPPED
from training.peers import PeerWatch, is_connection_lost, peer_watch
from training.run import join_ranks


def wait_for_each_other() -> None:
    while True:
        torch.distributed.barrier()


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("a mistake of one rank alone")


def leave_in_order() -> None:
    torch.distributed.barrier()
    peer_watch().leave()


def import_for_long() -> None:
    threading.Event().wait()


def start() -> None:
    peer_watch().start()


def join() -> None:
    join_ranks("cpu", 60.0)
    peer_watch().report_errors()


def joined(behaviour) -> list:
    """Return what a rank does that joins the others, and then behaves in some way."""
    return [start, join, behaviour]


def await_announcements(count: int) -> None:
    """Wait until ranks below `count` have announced themselves, and have seen that of this one."""
    watch = peer_watch()
    watch.has_tried_to_connect.wait()
    ranks = range(count)
    while not all(watch.store.add(f"beat/{other}", 0) > 1 for other in ranks):
        threading.Event().wait(0.05)


def run_rank(rank: int, ranks: int, port: int, output: str, actions: list) -> None:
    """Start a rank as a launcher would, and let it do something."""
    variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables |= {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    training.peers.INTERVAL, training.peers.LIMIT = 0.1, 1.5
    try:
        for action in actions:
            action()
    except Exception:  # as the interpreter ends, not as multiprocessing does
        sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        os._exit(1)


def exits_of(folder: Path, *behaviours: list) -> tuple[list[int], list[str]]:
    """Return the exit code of each rank, and its last line on stderr, for the actions of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = fork_server()
    outputs = [folder / f"stderr{rank}.txt" for rank in range(len(behaviours))]
    processes = [
        context.Process(
            target=run_rank, args=(rank, len(behaviours), port, str(outputs[rank]), actions)
        )
        for rank, actions in enumerate(behaviours)
    ]
    for process in processes:
        process.start()
    for process, actions in zip(processes, behaviours, strict=True):
        if hang not in actions:
            process.join(120)
    for process in processes:
        process.kill()
        process.join()
    lines = [output.read_text().splitlines()[-1:] for output in outputs]
    return [process.exitcode for process in processes], ["".join(line) for line in lines]


@pytest.mark.parametrize("lost", [be_killed, hang])
def test_rank_that_is_killed_or_hangs_ends_the_other_with_the_code_for_a_new_launch(tmp_path, lost):
    codes, (line, _) = exits_of(tmp_path, joined(wait_for_each_other), joined(lost))
    assert codes == [STOPPED, -signal.SIGKILL]
    reasons = {be_killed: "the connection to another rank is lost", hang: "no sign of life from"}
    assert line.startswith(f"rank 0: {reasons[lost]}")
    assert line.endswith("run the same command to resume")


def test_rank_that_fails_ends_the_other_with_the_code_of_an_error(tmp_path):
    codes, (line, _) = exits_of(tmp_path, joined(wait_for_each_other), joined(fail))
    assert codes == [1, 1]
    assert line == "rank 1 has ended with an error, see its output"


def test_ranks_that_leave_in_order_are_not_lost(tmp_path):
    assert exits_of(tmp_path, *[joined(leave_in_order)] * 2) == ([0, 0], ["", ""])


def test_rank_that_is_lost_before_it_joins_ends_all_others_wherever_they_are(tmp_path):
    killed = [start, partial(await_announcements, 3), be_killed]
    codes, lines = exits_of(tmp_path, [start, join], killed, [start, import_for_long])
    assert codes == [STOPPED, -signal.SIGKILL, STOPPED]
    assert lines[0].startswith("rank 0: no sign of life from rank 1 for ")
    assert lines[2] == lines[0]


def test_rank_0_that_is_lost_before_it_joins_ends_all_others_wherever_they_are(tmp_path):
    killed = [start, partial(await_announcements, 3), be_killed]
    codes, lines = exits_of(tmp_path, killed, [start, join], [start, import_for_long])
    assert codes == [-signal.SIGKILL, STOPPED, STOPPED]
    assert "run the same command" in lines[1]  # by the store's end, or as rank 2
    assert lines[2].startswith("rank 2: no answer from the machine of rank 0 for ")


def test_rank_0_that_never_starts_is_waited_for_as_long_as_was_asked(tmp_path):
    codes, lines = exits_of(tmp_path, [], [start, partial(join_ranks, "cpu", 1.0)])
    assert codes[1] == STOPPED
    assert lines[1] == "rank 0 has not started within 1 s; run the same command again"


def test_rank_that_has_not_started_is_waited_for_and_one_that_is_silent_is_lost(monkeypatch):
    watch, ends = PeerWatch(), []
    watch.store = HashStore()
    monkeypatch.setattr(watch, "end", lambda code, line: ends.append((code, line)))
    for now, number in [(0, 0), (100, 0), (1000, 1), (1035, 1), (1036, 2), (1070, 2), (1072, 2)]:
        monkeypatch.setattr(training.peers, "monotonic", lambda now=now: now)
        watch.check_rank(5, number)
        assert bool(ends) == (now == 1072)
    assert ends[0][0] == STOPPED and "rank 5 for 35 s" in ends[0][1]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("ncclRemoteError: A call failed possibly due"), True),
        (RuntimeError("Timed out waiting 300000ms for recv operation to complete"), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (torch.distributed.DistStoreError("wait timeout after 300000ms, keys: /0"), True),
        (torch.distributed.DistNetworkError("The server socket has failed to listen"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("Connection refused"), False),  # of a bucket
    ],
)
def test_exceptions_that_mean_a_lost_rank_are_recognised(error, is_lost):
    assert is_connection_lost(error) == is_lost
