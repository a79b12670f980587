"""Say on rank 0 what a start has found, and what it is doing when that takes long.

This file imports neither torch nor Composer, so that a stage can say that it imports them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TextIO

SLOW = 3.0  # seconds


def print_once(text: str, file: TextIO | None = None) -> None:
    """Print a text on rank 0, to stdout by default."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file, flush=True)


def announce(task: str) -> None:
    """Print what follows to stderr, on rank 0."""
    print_once(f"{task} ...", sys.stderr)


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
