"""Copies of a run's checkpoints in a bucket, made beside the training.

A sharded checkpoint counts as complete once it has its .metadata, which is therefore copied last.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from composer.utils import dist

from shards.storage import Storage
from training.peers import new_group

METADATA = ".metadata"
Superseded = Callable[[Iterable[str]], list[str]]  # of names of checkpoints, those to be deleted


class CopyingUnfinished(SystemExit):
    """Ends a program whose copying threads are not to be waited for."""


class Copies:
    """A thread on each rank that copies checkpoints to a bucket, and deletes superseded ones.

    All ranks call `submit` and `finish` together.

    Args:
        folder: where checkpoints are written.
        address: s3:// address of the copies; None to delete superseded checkpoints only.
        superseded: returns the names of the checkpoints that are no longer needed.
    """

    def __init__(self, folder: Path, address: str | None, superseded: Superseded):
        self.folder = folder
        self.bucket = Storage(address) if address else None
        self.superseded = superseded
        self.group = new_group() if address else None  # the training communicates meanwhile
        self.thread = ThreadPoolExecutor(1)
        self.submitted: dict[str, Future[bool]] = {}  # {checkpoint: whether it was copied}

    def submit(self, name: str, parts: list[str]) -> None:
        """Copy a checkpoint in the background.

        Args:
            parts: the files of it that this rank is to copy, under `folder`.
        """
        self.submitted[name] = self.thread.submit(self.copy_and_prune, parts)

    def finish(self, limit: float | None = None) -> list[str]:
        """Wait for all copies, and return the checkpoints that the bucket still lacks.

        A checkpoint that is older than one in the bucket does not count.

        Args:
            limit: seconds to wait; None for no limit.
        """
        self.thread.shutdown(wait=False)
        wait(self.submitted.values(), timeout=limit)
        missing = []
        for name, copied in self.submitted.items():
            missing.append(name)
            if copied.done() and copied.exception() is None and copied.result():
                missing = []
        return missing

    @property
    def is_copying(self) -> bool:
        return any(not copied.done() for copied in self.submitted.values())

    def copy_and_prune(self, parts: list[str]) -> bool:
        """Copy the parts of all ranks, .metadata last, and delete superseded checkpoints.

        Returns False if the bucket cannot be reached, which is reported; the run continues.
        """
        copied = self.bucket is None or self.copy(parts)
        if dist.get_local_rank() == 0:
            for name in self.superseded(path.name for path in self.folder.glob("ep*")):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                with suppress(OSError):
                    (self.folder / name).unlink()
        return copied

    def copy(self, parts: list[str]) -> bool:
        """Copy files to the bucket; return whether all ranks could."""
        metadata = [part for part in parts if Path(part).name == METADATA]
        others = [part for part in parts if part not in metadata]
        copied = self.on_all_ranks(self.succeeds(partial(self.upload, others)))
        if copied:
            copied = self.succeeds(partial(self.upload, metadata))
            if dist.get_global_rank() == 0:
                copied = copied and self.succeeds(self.prune_bucket)
            copied = self.on_all_ranks(copied)
        return copied

    def on_all_ranks(self, flag: bool) -> bool:
        """Return whether a flag is true on all ranks, once all have called this."""
        if self.group is None:
            return flag
        lowest = torch.tensor(int(flag))
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, self.group)
        return bool(lowest)

    def succeeds(self, action: Callable[[], None]) -> bool:
        """Return whether an action on the bucket succeeds; report its error."""
        try:
            action()
        except OSError as error:
            kept = f"what is in {self.folder} is intact, and the run continues"
            print(f"checkpoints.bucket: {error}; {kept}", flush=True)
            return False
        return True

    def upload(self, parts: list[str]) -> None:
        for part in parts:
            self.bucket.upload(self.folder / part, part)

    def prune_bucket(self) -> None:
        files = list(self.bucket.names(hidden=True))
        old = self.superseded({file.split("/")[0] for file in files})
        for file in files:
            if file.split("/")[0] in old:
                self.bucket.delete(file)

    def complete(self) -> set[str]:
        """Return the names of the files, and of the complete folders, in the bucket."""
        files = set(self.bucket.names(hidden=True))
        folders = {file.removesuffix(f"/{METADATA}") for file in files if file.endswith(METADATA)}
        return folders | {file for file in files if "/" not in file}

    def send(self, name: str) -> None:
        """Copy a whole checkpoint from this disk to the bucket."""
        path = self.folder / name
        files = [path] if path.is_file() else list(path.iterdir())
        files.sort(key=lambda file: file.name == METADATA)
        self.upload([os.path.relpath(file, self.folder) for file in files])

    def fetch(self, name: str) -> None:
        """Download a checkpoint from the bucket into the folder.

        Raises:
            ValueError: the bucket lacks a part of it.
        """
        aside = self.folder / f"{name}.fetched"
        shutil.rmtree(aside, ignore_errors=True)
        is_file = name.endswith(".pt")
        parts = [name] if is_file else list(self.bucket.names(name, hidden=True))
        if not is_file and f"{name}/{METADATA}" not in parts:
            raise ValueError(f"{self.bucket.at(name)} is incomplete: it has no {METADATA}")
        try:
            for part in parts:
                self.bucket.download(part, aside / part)
        except FileNotFoundError as error:
            raise ValueError(f"{self.bucket.at(name)} is incomplete ({error})") from error
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (aside / name).rename(self.folder / name)
        aside.rmdir()
