"""Checkpoints: read those of ours and of others safely, write ours so that the newest is always whole.

    weights = read_checkpoint("runs/vitl/checkpoints/latest-rank0.pt")      # by our names; official files alike

`Checkpoints` is the callback of every training; its arguments are the block `checkpoints` of the YAML files.
"""

import io
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Event, Logger, State
from composer.utils import collect_env, create_interval_scheduler, dist
from composer.utils.checkpoint import save_checkpoint
from pydantic import PositiveInt
from torch import nn
from torch.distributed.checkpoint import BytesStorageMetadata

from shards.storage import Storage
from training.config import Duration
from training.weights import PlainReader, read_plainly


def check_checkpoint(path: Path) -> None:
    """Compare a checkpoint with its checksums, or FSDP's shards with their sizes; and make sure that it is plain.

    Composer unpickles without a care: what would run code must not come so far.

    Raises:
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    try:
        if path.is_dir():
            contents = PlainReader(path).read_metadata()
            for index, part in contents.storage_data.items():
                with open(path / part.relative_path, "rb") as file:
                    if os.fstat(file.fileno()).st_size < part.offset + part.length:
                        raise ValueError(f"{part.relative_path} is cut")
                    if isinstance(contents.state_dict_metadata[index.fqn], BytesStorageMetadata):
                        file.seek(part.offset)
                        read_plainly(io.BytesIO(file.read(part.length)))
        else:
            with zipfile.ZipFile(path) as file:
                if (bad := file.testzip()) is not None:
                    raise ValueError(f"{bad} in it has another checksum")
            read_plainly(str(path), mmap=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path} is damaged ({error})") from error


def check_shapes(path: Path, model: nn.Module) -> None:
    """Compare the weights of a checkpoint with those of a model.

    Raises:
        ValueError: they are others.
    """
    if path.is_dir():
        entries = PlainReader(path).read_metadata().state_dict_metadata.items()
        found = {
            key.removeprefix("state.model."): one.size
            for key, one in entries
            if key.startswith("state.model.")
        }
    else:
        found = {
            key: value.shape
            for key, value in read_plainly(str(path), mmap=True)["state"]["model"].items()
        }
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    if wrong := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
        raise ValueError(
            f"{path} is of a model with another {wrong[0]}; give another run_name, or the sizes that it has"
        )


LATEST = "latest-rank0.pt"  # a link to the newest checkpoint


STOPPED = 75  # exit code of a run that was told to stop and wants to be started again: EX_TEMPFAIL of sysexits.h


CHECKPOINT = re.compile(r"ep(\d+)-ba(\d+)(\.pt)?")  # a file; without .pt a folder, of FSDP's shards


def step_of(name: str) -> int:
    return int(CHECKPOINT.fullmatch(name)[2])


# Composer has py-cpuinfo name the processor in each checkpoint. Its two processes wait by sched_yield alone, which on Linux
# 6.18 starves everything else when two ranks start on two cores: a launch hung for minutes, timers and all.
collect_env.get_cpu_model = platform.processor


class Checkpoints(Callback):
    """Composer's checkpoints, so that the newest one is always whole; and what ends a run early, at one.

    Each is written aside, renamed, and then copied to the bucket in the background. SIGTERM has one written at the end of
    the step, or of an evaluation's batch, and ends the run with exit code STOPPED. A loss or a weight that is not finite
    ends it with none written.

    Args:
        interval: time between two, such as 1ep or 500ba; the last step has one too.
        keep: how many of the newest are kept.
        milestone: the first after every so many epochs is kept for good.
        bucket: s3:// address for copies, in a folder of the run's name, which are kept alike. A run goes on from them where
            the disk is gone, or where FSDP's shards are on the disks of several machines.

    Raises:
        ValueError: a bucket that is no s3:// address.
    """

    def __init__(
        self,
        run: Path,
        *,
        interval: Duration = "1ep",
        keep: PositiveInt = 2,
        milestone: PositiveInt | None = None,
        bucket: str | None = None,
    ):
        self.due = create_interval_scheduler(interval)
        self.folder = run / "checkpoints"
        self.keep = keep
        self.milestone = milestone
        if bucket and not bucket.startswith("s3://"):
            raise ValueError(f"checkpoints.bucket {bucket} is no s3:// address")
        self.bucket = Storage(f"{bucket.rstrip('/')}/{run.name}") if bucket else None
        self.copying = ThreadPoolExecutor(1)
        self.told = False
        self.saved = -1

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, fetched from the bucket if it is only there; the same on every rank.

        Damaged ones are said, and set aside as *.damaged.

        Raises:
            ValueError: there are checkpoints, but none is whole; or this machine cannot reach it.
        """
        chosen = [self.choose() if dist.get_global_rank() == 0 else None]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], ValueError):
            raise chosen[0]
        if chosen[0] is None:
            return None
        path = self.folder / chosen[0]
        if dist.get_local_rank() == 0 and dist.get_global_rank() != 0:
            try:
                check_checkpoint(path)
            except ValueError as error:
                if not self.bucket:
                    raise ValueError(
                        f"{error}; give the machines a shared folder, or checkpoints.bucket"
                    ) from error
                self.fetch(path.name)
            self.point_to(path.name)
        dist.barrier()
        return path

    def choose(self) -> str | ValueError | None:
        here = {path.name for path in self.folder.glob("ep*") if CHECKPOINT.fullmatch(path.name)}
        there = {name.split("/")[0] for name in self.bucket.names()} if self.bucket else set()
        there = set(filter(CHECKPOINT.fullmatch, there))
        damaged = []
        for name in sorted(here | there, key=step_of, reverse=True):
            for fetch in [False] * (name in here) + [True] * (name in there):
                try:
                    if fetch:
                        self.fetch(name)
                    check_checkpoint(self.folder / name)
                except ValueError as error:
                    if not fetch and name in there and not name.endswith(".pt"):
                        continue  # the shards of other machines are in the bucket alone
                    damaged.append(str(error))
                    if (self.folder / name).exists():
                        (self.folder / name).rename(
                            self.folder / f"{name}.damaged.{time.time_ns()}"
                        )
                else:
                    self.point_to(name)
                    print("; ".join([*damaged, f"going on from {self.folder / name}"]), flush=True)
                    return name
        latest = self.folder / LATEST
        if damaged or latest.is_symlink():
            lost = (
                "; ".join(damaged)
                or f"{latest} points to {os.readlink(latest)}, which is not there"
            )
            return ValueError(f"{lost}; no checkpoint is left. Delete {self.folder} to begin anew")
        return None

    def fetch(self, name: str) -> None:
        """Copy a checkpoint from the bucket.

        Raises:
            ValueError: it is not there whole.
        """
        aside = self.folder / f"{name}.fetched"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            for part in (
                [name] if name.endswith(".pt") else [*self.bucket.names(name), f"{name}/.metadata"]
            ):
                self.bucket.download(part, aside / part)
        except FileNotFoundError as error:
            raise ValueError(f"{self.bucket.at(name)} is not whole ({error})") from error
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (aside / name).rename(self.folder / name)
        aside.rmdir()

    def point_to(self, name: str) -> None:
        aside = self.folder / f"{LATEST}.{dist.get_global_rank()}.tmp"
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        aside.replace(self.folder / LATEST)

    def save(self, state: State) -> None:
        """Write a checkpoint. Each machine renames what is in its folder, which it may share with the others, or not."""
        stem = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
        name = stem if state.fsdp_sharded_state_dict_enabled else f"{stem}.pt"
        aside, first = self.folder / "aside", dist.get_local_rank() == 0
        if first:
            for stale in (aside, self.folder / name):  # of a life that ended within this
                shutil.rmtree(stale, ignore_errors=True)
            aside.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        written = save_checkpoint(
            state, str(aside / f"{stem}.pt")
        )  # for FSDP's shards it makes a folder of that name
        if written:
            with open(written, "rb") as file:
                os.fsync(file.fileno())
        dist.barrier()
        if first:
            with suppress(
                FileNotFoundError
            ):  # another machine's first rank was faster, or nothing was written here
                (aside / name).replace(self.folder / name)
            if (self.folder / name).exists():
                self.point_to(name)
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        parts = [os.path.relpath(written, aside)] if written else []
        if written and dist.get_global_rank() == 0 and not name.endswith(".pt"):
            parts.append(f"{name}/.metadata")
        self.copying.submit(self.finish, parts)
        self.saved = state.timestamp.batch.value

    def finish(self, parts: list[str]) -> None:
        """Copy the files of a checkpoint to the bucket, then delete old ones. The run goes on without the bucket."""
        try:
            for part in parts if self.bucket else ():
                self.bucket.upload(self.folder / part, part)
            self.prune()
        except OSError as error:
            print(
                f"checkpoints.bucket: {error}; what is in {self.folder} is whole, and the run goes on",
                flush=True,
            )

    def prune(self) -> None:
        for name in (
            self.superseded(path.name for path in self.folder.glob("ep*"))
            if dist.get_local_rank() == 0
            else ()
        ):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            with suppress(OSError):
                (self.folder / name).unlink()
        if not self.bucket or dist.get_global_rank() != 0:
            return
        there = list(self.bucket.names())
        for name in self.superseded({part.split("/")[0] for part in there}):
            for part in (
                part for part in [*there, f"{name}/.metadata"] if part.split("/")[0] == name
            ):
                self.bucket.delete(part)

    def superseded(self, names: Iterable[str]) -> list[str]:
        """The names of checkpoints that are neither among the newest nor a milestone."""
        names = sorted(filter(CHECKPOINT.fullmatch, names), key=step_of)
        first = {
            int(CHECKPOINT.fullmatch(name)[1]): name for name in reversed(names)
        }  # of each epoch
        kept = [
            name
            for epoch, name in first.items()
            if self.milestone and epoch and epoch % self.milestone == 0
        ]
        return [name for name in names[: -self.keep] if name not in kept]

    def fit_start(self, state: State, logger: Logger) -> None:
        self.saved = state.timestamp.batch.value
        self.before = signal.signal(signal.SIGTERM, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.told = True

    def batch_end(self, state: State, logger: Logger) -> None:
        total = state.total_loss_dict.get(
            "loss/train/total", 0.0
        )  # none if half precision has skipped the first steps
        if not math.isfinite(total):
            sys.exit(
                f"the loss is {total} at step {state.timestamp.batch.value}; the newest checkpoint is from before it"
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.save_if(state, Event.BATCH_CHECKPOINT)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.save_if(state, Event.EPOCH_CHECKPOINT)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self.save_if(state)

    def save_if(self, state: State, event: Event | None = None) -> None:
        """Save a checkpoint that is due at this event, or, if the run was told to stop, one in any case, and end it.

        All ranks call it together: after each step and epoch, and within evaluations, which may take longer than a machine
        that is about to go.
        """
        step, due = state.timestamp.batch.value, event is not None and self.due(state, event)
        broken = (due or self.told) and not all(
            parameter.isfinite().all() for parameter in state.model.parameters()
        )
        flags = state.device.tensor_to_device(torch.tensor([self.told, broken], dtype=torch.int32))
        dist.all_reduce(flags, "MAX")  # the signal may not have reached every rank yet
        told, broken = flags.tolist()
        if broken:
            sys.exit(
                f"a weight is not finite after step {step}; the newest checkpoint is from before it"
            )
        if (due or told) and self.saved != step:
            self.save(state)
        if told:
            self.copying.shutdown()
            sys.exit(STOPPED)

    def fit_end(self, state: State, logger: Logger) -> None:
        signal.signal(signal.SIGTERM, self.before)
        self.copying.shutdown()  # once the last is copied
