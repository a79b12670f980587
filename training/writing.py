"""Checkpoints written in the background, from a copy of the run's state in host memory."""

import copy
import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dist_cp
from composer import State
from composer.utils import dist, reproducibility
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from training.copies import METADATA
from training.weights import LATEST

Result = TypeVar("Result")


def checksum(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def point_latest_to(folder: Path, name: str) -> None:
    """Make the link to the newest checkpoint, in one step."""
    aside = folder / f"{LATEST}.{dist.get_global_rank()}.tmp"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    aside.replace(folder / LATEST)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, or of this rank's part of a DTensor, in host memory."""
    if isinstance(tensor, DTensor):
        # DTensor.from_local would move the copy back to the device of the mesh.
        return DTensor(host_copy(tensor.to_local()), tensor._spec, requires_grad=False)
    # A GPU copies faster to pinned memory, which PyTorch keeps for the next copy.
    empty = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return empty.copy_(tensor.detach())


def content_of(state: State) -> dict[str, Any] | None:
    """Return a copy in host memory of what this rank writes, None if it writes nothing.

    The content is as in Composer's save_checkpoint. All ranks call this together.
    """
    content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
    if dist.get_global_rank() > 0:
        if not state.fsdp_sharded_state_dict_enabled:
            return None
        del content["rng"]  # rank 0 has the generators of all ranks
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
    return copy.deepcopy(content, {id(tensor): host_copy(tensor) for tensor in tensors})


class Writer:
    """A thread on each rank that writes one checkpoint at a time.

    All ranks call `start` and `finish` together. An error on one rank is raised on all.

    Args:
        folder: where checkpoints are written.
        group: a group of all ranks that only the thread uses meanwhile; None for one rank.
        submit: called in the thread with a checkpoint's name and the files that this rank wrote,
            under `folder`, once the checkpoint has its name.
    """

    def __init__(
        self, folder: Path, group: ProcessGroup | None, submit: Callable[[str, list[str]], None]
    ):
        self.folder = folder
        self.aside = folder / "aside"
        self.group = group
        self.submit = submit
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None  # the last write
        # A single rank writes its shards without collectives, of which torch would warn.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def start(self, state: State) -> None:
        """Copy the state, and write the copy in the background, after the write before."""
        self.finish()
        name = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
        if not state.fsdp_sharded_state_dict_enabled:
            name += ".pt"
        self.writing = self.thread.submit(self.write, content_of(state), name)

    @property
    def has_failed(self) -> bool:
        """Return whether the last write has ended with an error, which `finish` raises."""
        last = self.writing
        return last is not None and last.done() and last.exception() is not None

    def finish(self) -> None:
        """Wait for the last write.

        Raises:
            OSError: the disk is full.
        """
        if self.writing is not None:
            self.writing.result()

    def wait(self) -> None:
        """Wait for the last write; its error is not raised."""
        if self.writing is not None:
            wait([self.writing])

    # In the thread

    def write(self, content: dict[str, Any] | None, name: str) -> None:
        """Write a checkpoint aside, then rename it.

        Machines may share the folder or have their own: each renames what is in its folder.
        """
        self.on_all_ranks(partial(self.prepare, name))
        written = self.on_all_ranks(partial(self.write_parts, content, self.aside / name))
        self.on_all_ranks(partial(self.rename, name))
        self.submit(name, [os.path.relpath(path, self.aside) for path in written])

    def on_all_ranks(self, step: Callable[[], Result]) -> Result:
        """Call a step, and return its value once all ranks have done it.

        Raises:
            BaseException: the error of this rank or of another; a full disk comes first.
        """
        result, error = None, None
        try:
            result = step()
        except BaseException as caught:  # torch's CheckpointException is no Exception
            error = caught
        errors = [error]
        if self.group is not None:
            errors *= dist.get_world_size()
            torch.distributed.all_gather_object(errors, error, self.group)
            errors[dist.get_global_rank()] = error  # with its traceback
        errors = [error for error in errors if error is not None]
        if errors:
            raise min(errors, key=lambda error: not isinstance(error, OSError))
        return result

    def prepare(self, name: str) -> None:
        """Empty the folder in which the checkpoint is written aside."""
        if dist.get_local_rank() == 0:
            shutil.rmtree(self.aside, ignore_errors=True)  # left by a run killed while saving
            shutil.rmtree(self.folder / name, ignore_errors=True)
            self.aside.mkdir(parents=True, exist_ok=True)

    def write_parts(self, content: dict[str, Any] | None, path: Path) -> list[Path]:
        """Write and sync a checkpoint, and return the files that this rank wrote.

        FSDP's shards are in a folder; each file has its checksum beside it.

        Raises:
            OSError: the disk is full, which torch reports as another exception.
        """
        try:
            written = self.save(content, path)
        except (RuntimeError, CheckpointException) as error:
            free = shutil.disk_usage(self.folder).free
            tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
            wanted = sum(tensor.nbytes for tensor in tensors)
            if free > wanted:
                raise
            message = (
                f"disk full: {free / 1e9:.2f} GB are free, a checkpoint takes {wanted / 1e9:.2f}"
            )
            raise OSError(errno.ENOSPC, message, str(self.folder)) from error
        for part in written:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        return written

    def save(self, content: dict[str, Any] | None, path: Path) -> list[Path]:
        """Write a file on rank 0, or a folder of FSDP's shards, and return this rank's files."""
        if path.suffix == ".pt":
            if content is None:
                return []
            torch.save(content, path)
            return [path]
        dist_cp.save(
            content,
            storage_writer=dist_cp.FileSystemWriter(path),
            planner=dist_cp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=self.group,
            no_dist=self.group is None,
        )
        rank = dist.get_global_rank()
        files = sorted(path.glob(f"__{rank}_*.distcp"))
        if rank == 0:
            files.append(path / METADATA)
        sums = [Path(f"{file}.sha256") for file in files]
        for file, sum_file in zip(files, sums, strict=True):
            sum_file.write_text(checksum(file))
        return files + sums

    def rename(self, name: str) -> None:
        """Give the checkpoint its name, and point the link to it."""
        if dist.get_local_rank() != 0:
            return
        # Where the folder is shared, another machine may have renamed it already. Where it is not,
        # a machine without the file of rank 0 has nothing to rename.
        with suppress(FileNotFoundError):
            (self.aside / name).replace(self.folder / name)
        if (self.folder / name).exists():
            point_latest_to(self.folder, name)
        shutil.rmtree(self.aside, ignore_errors=True)
