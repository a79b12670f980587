"""Say what a start is doing when that takes long.

    with say_if_slow("opening the data sets"):
        loader = load_stream(...)

This file imports neither torch nor Composer, so that a stage can say that it imports them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

SLOW = 3.0  # seconds


def announce(task: str) -> None:
    """Print what follows to stderr, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{task} ...", file=sys.stderr, flush=True)


def announce_later(task: str) -> Timer:
    """Return a running timer that announces a task after SLOW seconds, unless it is cancelled."""
    timer = Timer(SLOW, announce, [task])
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def say_if_slow(task: str) -> Iterator[None]:
    """Announce the task of a block if it takes more than SLOW seconds."""
    timer = announce_later(task)
    try:
        yield
    finally:
        timer.cancel()
