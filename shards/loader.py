"""PyTorch's DataLoader, with workers that leave stop signals to the main process.

Ctrl-C, `timeout` and Slurm signal all processes of a group. Data workers must survive that, so that
the main process can finish its step and save a checkpoint.
"""

import atexit
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from shards.workers import without_stop_signals


class Loader(DataLoader):
    """A DataLoader whose workers do not receive stop signals.

    Args:
        sample_bytes: size of a sample.
        settings: further arguments of DataLoader.

    Raises:
        OSError: the batches that workers prepare do not fit into /dev/shm.
    """

    def __init__(self, dataset: Dataset, batch_size: int, sample_bytes: int, **settings: Any):
        super().__init__(dataset, batch_size, **settings)
        if self.num_workers:
            prepared = self.num_workers * self.prefetch_factor * dist.get_local_world_size()
            check_shared_memory(prepared, batch_size * sample_bytes)

    def __iter__(self) -> Iterator:
        with without_stop_signals():  # Workers are forked here.
            return super().__iter__()


def check_shared_memory(batches: int, batch_bytes: int) -> None:
    """Raise OSError if batches of a size do not fit into /dev/shm.

    Without this check, a worker would die of a bus error. A container has 64 MB by default.
    """
    folder = Path("/dev/shm")
    if not folder.exists():
        return
    free = shutil.disk_usage(folder).free
    if batches * batch_bytes > free:
        needed = f"{batches} batches need {batches * batch_bytes / 1e6:.0f} MB"
        remedy = "enlarge it (docker run --shm-size), or lower num_workers"
        raise OSError(f"{folder}: {needed}, but it has {free / 1e6:.0f} MB free; {remedy}")


@atexit.register
def kill_workers() -> None:
    """Kill the workers that are left at exit, where multiprocessing would send SIGTERM and wait."""
    for process in multiprocessing.active_children():
        process.kill()
