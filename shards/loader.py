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
        sample_bytes: size of a sample, see check_shared_memory.
        settings: further arguments of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        sample_bytes: int,
        *,
        num_workers: int = 0,
        **settings: Any,
    ):
        check_shared_memory(sample_bytes, batch_size, num_workers)
        super().__init__(dataset, batch_size, num_workers=num_workers, **settings)

    def __iter__(self) -> Iterator:
        with without_stop_signals():  # Workers are forked here.
            return super().__iter__()


def check_shared_memory(sample_bytes: int, batch_size: int, num_workers: int) -> None:
    """Raise OSError if the batches that workers prepare do not fit into /dev/shm.

    Without this check, a worker would die of a bus error. A container has 64 MB by default.

    Args:
        sample_bytes: size of a sample.
        batch_size, num_workers: samples and workers of each rank.
    """
    folder = Path("/dev/shm")
    if not (num_workers and folder.exists()):
        return
    prepared = 2 * num_workers * dist.get_local_world_size()  # batches; 2 is PyTorch's default
    needed = prepared * batch_size * sample_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        problem = f"{prepared} batches need {needed / 1e6:.0f} MB, but it has {free / 1e6:.0f}"
        remedy = "enlarge it (docker run --shm-size), or lower num_workers"
        raise OSError(f"{folder}: {problem} MB free; {remedy}")


@atexit.register
def kill_workers() -> None:
    """Kill the workers that are left at exit, where multiprocessing would send SIGTERM and wait."""
    for process in multiprocessing.active_children():
        process.kill()
