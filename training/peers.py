"""The ranks of a run as seen from one of them: groups that may wait, and ranks that are lost.

    watch = peer_watch()    # one for each process
    watch.start()           # after the ranks have joined
    ...                     # if a rank is lost, the program ends with the exit code STOPPED
    watch.leave()           # before the ranks part

A killed process closes its connections, so that gloo raises an exception on the other ranks at
once. NCCL may wait until its timeout, and a cut network closes nothing. Therefore each rank counts
up a number in the store through which the ranks have found each other. Rank 0 looks at all
numbers, and the other ranks look at the number of rank 0.
"""

import atexit
import functools
import os
import re
import sys
import threading
import traceback
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from types import TracebackType

import torch
from composer.utils import dist
from torch.distributed import PrefixStore, ProcessGroup, TCPStore
from torch.distributed.checkpoint.api import CheckpointException

from shards.workers import STOPPED
from training.sources import one_line

INTERVAL = 5.0  # seconds between two signs of life
LIMIT = 40.0  # seconds without a sign of life after which a rank is lost
PATIENCE = timedelta(hours=12)
CONNECTION_LOST = re.compile(
    r"gloo/transport|[Cc]onnection (was likely )?(closed|reset|refused)|ncclRemoteError|"
    r"[Tt]imed out|Broken pipe|remote process exited"
)


def new_group() -> ProcessGroup | None:
    """Return a group of all ranks in which they may wait for hours; None for one rank.

    Its collectives run on the CPU, beside the default group's. All ranks call this together.
    """
    if dist.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def is_connection_lost(error: BaseException) -> bool:
    """Return whether an error means that another rank, or the network, is gone."""
    is_of_torch = isinstance(error, (RuntimeError, CheckpointException))
    return is_of_torch and CONNECTION_LOST.search(str(error)) is not None


@functools.cache
def peer_watch() -> "PeerWatch":
    """Return this process's watch over the other ranks."""
    return PeerWatch()


class PeerWatch:
    """Ends this program when another rank is lost, or has failed.

    If a rank was killed or cannot be reached, launching again helps: the exit code is STOPPED. If
    it ended with an error, launching again does not help: the exit code is 1.
    """

    def __init__(self):
        self.store = None
        self.left = threading.Event()
        self.beats = {}  # {rank: (its last number, when that was first seen)}
        self.heard = 0.0  # when the store answered last

    def start(self) -> None:
        """Watch from now on. Does nothing for a single rank, or without MASTER_ADDR."""
        ranks = dist.get_world_size()
        if ranks == 1 or "MASTER_ADDR" not in os.environ:
            return
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=LIMIT))
        # torchrun keeps its store when it starts the ranks again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"peers/{attempt}", store)
        self.store.set(self.beat_of(dist.get_global_rank()), "0")
        dist.barrier()  # Now every rank has a number.
        sys.excepthook = self.end_by_exception
        atexit.register(self.say_farewell)
        self.heard = monotonic()
        for target in (self.look, self.end_without_answer):
            threading.Thread(target=target, daemon=True).start()

    def leave(self) -> None:
        """Stop watching, before this rank ends in order."""
        if self.store is not None and not self.left.is_set():
            with suppress(RuntimeError):
                self.store.set(f"left/{dist.get_global_rank()}", "1")
        self.left.set()

    def beat_of(self, rank: int) -> str:
        return f"beat/{rank}"

    def look(self) -> None:
        """Give a sign of life in a loop, and look for signs of the other ranks."""
        rank = dist.get_global_rank()
        watched = range(1, dist.get_world_size()) if rank == 0 else [0]
        number = 0
        while not self.left.wait(INTERVAL):
            number += 1
            with suppress(RuntimeError):  # end_without_answer notices it
                self.store.set(self.beat_of(rank), str(number))
                self.end_if_failed()
                values = self.store.multi_get([self.beat_of(other) for other in watched])
                self.heard = monotonic()
                for other, value in zip(watched, values, strict=True):
                    self.compare(other, value)

    def compare(self, rank: int, value: bytes) -> None:
        """End the program if the number of a rank has not changed for long."""
        now = monotonic()
        last, since = self.beats.setdefault(rank, (value, now))
        if value != last:
            self.beats[rank] = (value, now)
        elif now - since > LIMIT and not self.store.check([f"left/{rank}"]):
            self.end_lost(f"no sign of life from rank {rank} for {LIMIT:.0f} s")

    def end_without_answer(self) -> None:
        """End the program if the store, which is on the machine of rank 0, no longer answers."""
        while not self.left.wait(INTERVAL):
            if monotonic() - self.heard > LIMIT + 2 * INTERVAL:
                self.end_lost(f"no answer from the machine of rank 0 for {LIMIT:.0f} s")

    def end_lost(self, reason: str) -> None:
        """End the program with STOPPED and one line, without waiting for any thread."""
        if self.left.is_set():
            return
        remedy = "the checkpoints are intact; run the same command to resume"
        print(f"rank {dist.get_global_rank()}: {reason}; {remedy}", file=sys.stderr, flush=True)
        os._exit(STOPPED)

    def end_if_failed(self) -> None:
        """End the program with 1 if another rank has ended with an error."""
        if self.left.is_set() or not self.store.check(["failed"]):
            return
        failed = self.store.get("failed").decode()
        self.store.add("read", 1)
        print(f"rank {failed} has ended with an error, see its output", file=sys.stderr, flush=True)
        os._exit(1)

    def end_by_exception(
        self, kind: type[BaseException], error: BaseException, place: TracebackType | None
    ) -> None:
        """End the program by an exception that nothing has caught; stands for sys.excepthook."""
        if is_connection_lost(error):
            with suppress(RuntimeError):
                self.end_if_failed()
            self.end_lost(f"the connection to another rank is lost ({one_line(error)[:200]})")
        traceback.print_exception(kind, error, place)

    def say_farewell(self) -> None:
        """Tell the other ranks that this one ends early, with an error."""
        if self.left.is_set():
            return
        self.left.set()
        with suppress(RuntimeError):
            self.store.compare_set("failed", "", str(dist.get_global_rank()))
            readers = self.store.add("read", 1)
            # The store ends with rank 0.
            deadline = monotonic() + 3 * INTERVAL
            while dist.get_global_rank() == 0 and readers < dist.get_world_size():
                if monotonic() > deadline:
                    break
                threading.Event().wait(0.1)
                readers = self.store.add("read", 0)
