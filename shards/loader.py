"""PyTorch's DataLoader, with workers that leave stop signals to the main process.

Ctrl-C, `timeout` and Slurm signal all processes of a group. Data workers must survive that, so that
the main process can finish its step and save a checkpoint.
"""

import atexit
import multiprocessing
from collections.abc import Iterator

from torch.utils.data import DataLoader

from shards.workers import without_stop_signals


class Loader(DataLoader):
    """A DataLoader whose workers do not receive stop signals."""

    def __iter__(self) -> Iterator:
        with without_stop_signals():  # Workers are forked here.
            return super().__iter__()


@atexit.register
def kill_workers() -> None:
    """Kill the workers that are left at exit, where multiprocessing would send SIGTERM and wait."""
    for process in multiprocessing.active_children():
        process.kill()
