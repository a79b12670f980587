"""The ranks of a run as seen from one of them: groups that may wait, and ranks that are lost.

    watch = peer_watch()    # one for each process
    watch.start()           # first of all, before Composer is imported
    watch.report_errors()   # after the ranks have joined
    ...                     # if a rank is lost, the program ends with the exit code STOPPED
    watch.leave()           # before the ranks part

A killed process closes its connections, so that gloo raises an exception on the other ranks at
once. NCCL may wait until its timeout, a cut network closes nothing, and ranks that have not joined
yet wait for as long as machines may need to start. Therefore each rank counts up a number in the
store through which the ranks find each other. Rank 0 looks at all numbers, and the other ranks look
at the number of rank 0. A rank without a number has not started yet, and is not lost.
"""

import atexit
import functools
import math
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
from torch.distributed import PrefixStore, ProcessGroup, TCPStore
from torch.distributed.checkpoint.api import CheckpointException

from shards.workers import STOPPED
from training.sources import one_line

INTERVAL = 5.0  # seconds between two signs of life
LIMIT = 35.0  # seconds without a sign of life after which a rank is lost
PATIENCE = timedelta(hours=12)
CONNECTION_LOST = re.compile(
    r"gloo/transport|connection (was likely )?(closed|reset|refused)|ncclRemoteError|timed out|"
    r"(wait|socket) timeout|broken pipe|failed to (recv|send), |remote process exited",
    re.IGNORECASE,
)


def this_rank() -> int:
    """Return the number of this rank; Composer is not imported for it."""
    return int(os.environ.get("RANK", "0"))


def rank_count() -> int:
    """Return the number of ranks of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def new_group() -> ProcessGroup | None:
    """Return a group of all ranks in which they may wait for hours; None for one rank.

    Its collectives run on the CPU, beside the default group's. All ranks call this together.
    """
    if rank_count() == 1:
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
        self.started = False
        self.has_tried_to_connect = threading.Event()
        self.has_left = threading.Event()
        self.beats = {}  # {rank: (its last number, when that was first seen)}
        self.last_answer = math.inf  # of the store, in seconds of monotonic()

    def start(self) -> None:
        """Announce this rank, and watch the others from now on, which may start much later.

        Does nothing a second time, for a single rank, or without MASTER_ADDR.
        """
        if self.started or rank_count() == 1 or "MASTER_ADDR" not in os.environ:
            return
        self.started = True
        for target in (self.watch_ranks, self.end_without_answer):
            threading.Thread(target=target, daemon=True).start()

    def connect(self) -> None:
        """Connect to the store, as soon as there is one; rank 0 makes it."""
        # torchrun makes the store, and keeps it when it starts the ranks again.
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=this_rank() == 0 and not of_torchrun,
            timeout=PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,  # The process group will use the same store.
        )
        store.set_timeout(timedelta(seconds=LIMIT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"peers/{attempt}", store)
        self.last_answer = monotonic()

    def rank_0_is_there(self, timeout: float) -> bool:
        """Wait until rank 0 has started, or connecting has failed; return False after a timeout."""
        return not self.started or self.has_tried_to_connect.wait(timeout)

    def report_errors(self) -> None:
        """Announce errors of this rank to the other ranks from now on.

        Call this after the ranks have joined.
        """
        if self.started:
            sys.excepthook = self.end_by_exception
            atexit.register(self.announce_error)

    def leave(self) -> None:
        """Stop watching, before this rank ends in order."""
        if self.store is not None and not self.has_left.is_set():
            with suppress(RuntimeError):
                self.store.set(f"left/{this_rank()}", "1")
        self.has_left.set()

    def watch_ranks(self) -> None:
        """Give a sign of life in a loop, and look for signs of the other ranks."""
        rank = this_rank()
        watched = range(1, rank_count()) if rank == 0 else [0]
        with suppress(RuntimeError):  # init_process_group raises the same
            self.connect()
        self.has_tried_to_connect.set()
        while self.store is not None:
            with suppress(RuntimeError):  # end_without_answer notices it
                self.store.add(f"beat/{rank}", 1)
                self.end_if_announced()
                for other in watched:
                    self.check_rank(other, self.store.add(f"beat/{other}", 0))
                self.last_answer = monotonic()
            if self.has_left.wait(INTERVAL):
                return

    def check_rank(self, rank: int, number: int) -> None:
        """End the program if the number of a rank has not changed for long; 0 is not started."""
        now = monotonic()
        last, since = self.beats.get(rank, (0, now))
        if number != last:
            self.beats[rank] = (number, now)
        elif number and now - since > LIMIT and not self.store.check([f"left/{rank}"]):
            line = lost_line(f"no sign of life from rank {rank} for {LIMIT:.0f} s")
            alive = [since for _, since in self.beats.values() if now - since <= LIMIT]
            self.announce_end(STOPPED, line, 1 + len(alive))
            self.end(STOPPED, line)

    def end_without_answer(self) -> None:
        """End the program if the store, which is on the machine of rank 0, no longer answers."""
        while not self.has_left.wait(INTERVAL):
            if monotonic() - self.last_answer > LIMIT + INTERVAL:
                reason = f"no answer from the machine of rank 0 for {LIMIT:.0f} s"
                self.end(STOPPED, lost_line(reason))

    def announce_end(self, code: int, line: str, readers: int) -> None:
        """Make the other ranks end with a code and a line.

        Args:
            readers: ranks that will read it, this one included. Rank 0, with which the store ends,
                waits for them.
        """
        self.store.compare_set("end", "", f"{code} {line}")
        done = self.store.add("read", 1)
        deadline = monotonic() + 2 * INTERVAL
        while this_rank() == 0 and done < readers and monotonic() < deadline:
            threading.Event().wait(0.1)
            done = self.store.add("read", 0)

    def end_if_announced(self) -> None:
        """End the program if another rank has announced the end of the run."""
        if self.has_left.is_set() or not self.store.check(["end"]):
            return
        code, _, line = self.store.get("end").decode().partition(" ")
        self.store.add("read", 1)
        self.end(int(code), line)

    def end(self, code: int, line: str) -> None:
        """End the program with a code and a line, without waiting for any thread."""
        if not self.has_left.is_set():
            print(line, file=sys.stderr, flush=True)
            os._exit(code)

    def end_by_exception(
        self, kind: type[BaseException], error: BaseException, place: TracebackType | None
    ) -> None:
        """End the program by an uncaught exception; takes the place of sys.excepthook."""
        if is_connection_lost(error):
            with suppress(RuntimeError):
                self.end_if_announced()
            reason = f"the connection to another rank is lost ({one_line(error)[:200]})"
            self.end(STOPPED, lost_line(reason))
        traceback.print_exception(kind, error, place)

    def announce_error(self) -> None:
        """Make the other ranks end, too, as this rank ends with an error."""
        if self.has_left.is_set() or self.store is None:
            return
        self.has_left.set()
        with suppress(RuntimeError):
            line = f"rank {this_rank()} has ended with an error, see its output"
            self.announce_end(1, line, rank_count())


def lost_line(reason: str) -> str:
    """Return the line with which a rank ends because another is lost."""
    remedy = "the checkpoints are intact; run the same command to resume"
    return f"rank {this_rank()}: {reason}; {remedy}"
