"""PyTorch's DataLoader, with workers that leave stop signals to the main process.

In a step of several micro-batches, each worker prepares single micro-batches, which need less
shared memory than whole batches. StepLoader hands them to a step as a list, uncopied.

Ctrl-C, `timeout` and Slurm signal all processes of a group. Data workers must survive that, so that
the main process can finish its step and save a checkpoint.
"""

import atexit
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer.core.data_spec import default_split_batch
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shards.workers import kill_workers, without_stop_signals


class Loader(DataLoader):
    """A DataLoader whose workers do not receive stop signals.

    Args:
        sample_bytes: size of a sample.
        settings: further arguments of DataLoader.

    Raises:
        OSError: the batches that workers prepare do not fit into /dev/shm.
    """

    def __init__(self, dataset: Dataset, batch_size: int, sample_bytes: int, **settings: Any):
        pinned = torch.cuda.is_available()  # memory from which a GPU copies faster
        super().__init__(dataset, batch_size, pin_memory=pinned, **settings)
        if self.num_workers:
            prepared = self.num_workers * self.prefetch_factor * dist.get_local_world_size()
            check_shared_memory(prepared, batch_size * sample_bytes)

    def __iter__(self) -> Iterator:
        with without_stop_signals():  # Workers are forked here.
            return super().__iter__()


class StepLoader(Loader):
    """A Loader for training: a batch for each step, or a list of the step's micro-batches.

    Args:
        dataset: whole steps of samples of this rank.
        batch_size: samples of this rank that a worker loads at a time.
        sample_bytes: see Loader.
        micro_batches: number of such batches in a step; if it is 1, they are not put into lists.
        num_workers, prefetch_factor: see TrainingData.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        batch_size: int,
        sample_bytes: int,
        micro_batches: int,
        num_workers: int,
        prefetch_factor: int | None = None,
    ):
        ahead = prefetch(micro_batches, num_workers, prefetch_factor) if num_workers else None
        super().__init__(
            dataset,
            batch_size,
            sample_bytes,
            num_workers=num_workers,
            prefetch_factor=ahead,
            drop_last=True,
            persistent_workers=num_workers > 0,
        )
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        """Return the number of steps."""
        return super().__len__() // self.micro_batches

    def __iter__(self) -> Iterator[dict | list[dict]]:
        batches = super().__iter__()
        if self.micro_batches == 1:
            return batches
        return map(list, zip(*[batches] * self.micro_batches, strict=True))


def prefetch(micro_batches: int, num_workers: int, prefetch_factor: int | None = None) -> int:
    """Return how many micro-batches each worker prepares ahead, see TrainingData.

    By default, the workers together hold the next step and a micro-batch more each.
    """
    return prefetch_factor or 1 + math.ceil(micro_batches / num_workers)


def samples_in(batch: dict[str, Any] | list[dict[str, Any]]) -> int:
    """Return the samples of a batch, or of a list of micro-batches."""
    if isinstance(batch, list):
        return sum(map(samples_in, batch))
    return len(next(iter(batch.values())))


def split_step(batch: dict | list[dict], micro_size: int) -> list[dict]:
    """Return the micro-batches of a step, of `micro_size` samples each."""
    return batch if isinstance(batch, list) else default_split_batch(batch, micro_size)


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


atexit.register(kill_workers)  # multiprocessing would send SIGTERM, and wait.
