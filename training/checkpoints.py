"""Save a run's checkpoints so that the newest is always intact, and find it on the next launch.

docs/fault_tolerance.md lists what can happen to a run, and what follows.
"""

import io
import math
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from composer import Callback, Event, Logger, State
from composer.utils import create_interval_scheduler, dist
from pydantic import NonNegativeFloat, PositiveInt
from torch.distributed.checkpoint import BytesStorageMetadata

from evaluation.ranks import on_rank_0
from shards.workers import STOPPED, exit_on_signals, ignore_stop_signals, kill_workers
from training.announce import print_once, say_if_slow
from training.config import Interval
from training.copies import METADATA, Copies, CopyingUnfinished
from training.peers import new_group
from training.safe_load import PlainReader, check_zip, load_plain
from training.weights import LATEST
from training.writing import Writer, checksum, point_latest_to

CHECKPOINT = re.compile(r"ep(\d+)-ba(\d+)(\.pt)?")  # a file; without .pt, a folder of FSDP's shards


def checkpoint_step(name: str) -> int:
    """Return the step in a checkpoint's name: 500 for ep1-ba500.pt."""
    return int(CHECKPOINT.fullmatch(name)[2])


def check_checkpoint(path: Path) -> None:
    """Compare a file, or FSDP's shards, with their checksums, and unpickle them safely.

    Composer loads with weights_only=False, so unsafe pickles are rejected first.

    Raises:
        ValueError: it is missing or corrupt, or holds more than tensors and plain values.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing")
    try:
        if path.is_dir():
            check_shards(path)
            return
        check_zip(path)
        load_plain(str(path), mmap=True)
    except Exception as error:  # a corrupt pickle raises nearly anything
        raise ValueError(f"{path} is corrupt ({error})") from error


def verify_checksum(path: Path) -> None:
    """Raise ValueError if a file differs from the checksum beside it, if there is one."""
    expected = path.with_name(f"{path.name}.sha256")
    if expected.exists() and checksum(path) != expected.read_text():
        raise ValueError(f"{path.name} in it has another checksum")


def check_shards(path: Path) -> None:
    """Check sizes and checksums of FSDP's shards, and unpickle their plain values safely.

    Checkpoints of earlier versions have no checksums, or none of .metadata.
    """
    verify_checksum(path / METADATA)
    metadata = PlainReader(path).read_metadata()
    for name in {part.relative_path for part in metadata.storage_data.values()}:
        verify_checksum(path / name)
    for index, part in metadata.storage_data.items():
        with open(path / part.relative_path, "rb") as file:
            if os.fstat(file.fileno()).st_size < part.offset + part.length:
                raise ValueError(f"{part.relative_path} is cut off")
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                file.seek(part.offset)
                load_plain(io.BytesIO(file.read(part.length)))


def on_several_machines() -> bool:
    return dist.get_world_size() > dist.get_local_world_size()


def appears(path: Path, seconds: float = 5.0) -> bool:
    """Return whether a file is there, or appears in time: NFS may show new files late."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


class Checkpoints(Callback):
    """Composer's checkpoints, saved so that the newest is always intact.

    Training waits only for a copy of its state in host memory. In the background, the copy is
    written aside, synced and renamed, then copied to the bucket. SIGINT or SIGTERM on any rank
    stops the run: it saves after the step, or between batches of an evaluation, and exits with
    STOPPED. SIGINT after another signal ends it at once. A loss or a weight that is not finite ends
    the run without a checkpoint.

    Args:
        interval: between checkpoints, such as 1ep or 500ba; the last step always has one.
        keep: number of newest checkpoints that are kept.
        milestone: one checkpoint of every so many epochs is kept for good.
        bucket: s3:// address of copies, in a folder of the run's name, which are pruned alike. A
            run resumes from them if the disk is lost, or if its shards are on several machines.
        stop_signals: further signals that stop the run like SIGTERM, such as SIGUSR1, with which
            Slurm can warn of the end of a job (`--signal`).
        upload_limit: seconds for which a stopped run waits for its copies to the bucket.

    Raises:
        ValueError: the bucket is not an s3:// address.
    """

    def __init__(
        self,
        run: Path,
        *,
        interval: Interval = "1ep",
        keep: PositiveInt = 2,
        milestone: PositiveInt | None = None,
        bucket: str | None = None,
        stop_signals: list[Literal["SIGUSR1", "SIGUSR2"]] = (),
        upload_limit: NonNegativeFloat = 60.0,
    ):
        if bucket and not bucket.startswith("s3://"):
            raise ValueError(f"checkpoints.bucket={bucket}: must be an s3:// address")
        self.is_due = create_interval_scheduler(interval)
        self.folder = run / "checkpoints"
        self.keep = keep
        self.milestone = milestone
        address = f"{bucket.rstrip('/')}/{run.name}" if bucket else None
        self.copies = Copies(self.folder, address, self.superseded)
        self.bucket = self.copies.bucket
        self.upload_limit = upload_limit
        self.group = new_group()  # in which ranks may wait for a large file of another
        self.writer = Writer(self.folder, self.group, self.copies.submit)
        self.signals = [signal.SIGINT, signal.SIGTERM]
        self.signals += [signal.Signals[name] for name in stop_signals]
        exit_on_signals(self.signals)
        self.stop_reason = None  # of the first request to stop, such as the name of a signal
        self.saved_step = -1

    # Finding a checkpoint to resume from

    def check_shared_folder(self, sharded: bool) -> None:
        """Find out whether all machines can resume from what will be saved; all ranks call this.

        Rank 0 writes a file, for which a rank of each other machine looks. With a bucket, machines
        need no shared folder.

        Args:
            sharded: whether each rank will write a part of a checkpoint.

        Raises:
            ValueError: checkpoints are sharded, and their parts would lie on several disks.
        """
        if self.bucket or not on_several_machines():
            return
        mark = self.folder / on_rank_0(lambda: f".shared-{uuid.uuid4().hex}", self.group)
        if dist.get_global_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        dist.barrier(self.group)
        lacks_it = dist.get_local_rank() == 0 and not appears(mark)
        lacking = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(lacking, lacks_it, self.group)
        mark.unlink(missing_ok=True)
        if any(lacking):
            problem = f"{self.folder}: the machine of rank {lacking.index(True)} has another folder"
            remedy = "give the machines a shared folder, or checkpoints.bucket"
            if sharded:
                raise ValueError(f"{problem} than rank 0, for sharded checkpoints; {remedy}")
            follows = "checkpoints are on the machine of rank 0 alone"
            print_once(f"{problem}; {follows}. To resume, {remedy}")

    @say_if_slow("looking for an intact checkpoint")
    def newest(self) -> Path | None:
        """Return the newest intact checkpoint, fetched from the bucket if needed; None if none yet.

        Returns the same on every rank. Corrupt ones are reported, and renamed to *.corrupt.*.

        Raises:
            ValueError: there are checkpoints, but none is intact, or this machine lacks rank 0's.
            OSError: the bucket cannot be reached.
        """
        name = on_rank_0(self.find_newest, self.group)
        if name is None:
            return None
        if dist.get_local_rank() == 0 and dist.get_global_rank() != 0:
            try:
                check_checkpoint(self.folder / name)
            except ValueError as error:
                if not self.bucket:
                    remedy = "copy it from the machine of rank 0, or give checkpoints.bucket"
                    raise ValueError(f"on another machine, {error}; {remedy}") from error
                self.copies.fetch(name)
            point_latest_to(self.folder, name)
        dist.barrier(self.group)
        return self.folder / name

    def find_newest(self) -> str | None:
        """Return the name of the newest intact checkpoint on this disk or in the bucket."""
        local = {path.name for path in self.folder.glob("ep*") if CHECKPOINT.fullmatch(path.name)}
        remote = set()
        if self.bucket:
            remote = {name for name in self.copies.complete() if CHECKPOINT.fullmatch(name)}
        problems = []
        for name in sorted(local | remote, key=checkpoint_step, reverse=True):
            if self.obtain(name, name in local, name in remote, problems):
                if self.bucket and name not in remote and on_several_machines():
                    self.copies.send(name)  # for the other machines; a kill has cut off the copying
                point_latest_to(self.folder, name)
                print("; ".join([*problems, f"resuming from {self.folder / name}"]), flush=True)
                return name
        latest = self.folder / LATEST
        if latest.is_symlink() and not problems:
            problems.append(f"{latest} points to {os.readlink(latest)}, which is not there")
        if problems:
            remedy = f"no checkpoint is left. Delete {self.folder} to start anew"
            raise ValueError("; ".join([*problems, remedy]))
        return None

    def obtain(self, name: str, local: bool, remote: bool, problems: list[str]) -> bool:
        """Return whether a checkpoint is intact on this disk, or once fetched from the bucket.

        Args:
            local, remote: whether the disk and the bucket have a checkpoint of this name.
            problems: a list to which errors are added. Corrupt files are renamed.
        """
        path = self.folder / name
        for is_there, in_bucket in ((local, False), (remote, True)):
            if not is_there:
                continue
            try:
                if in_bucket:
                    self.copies.fetch(name)
                check_checkpoint(path)
                return True
            except ValueError as error:
                # A folder that lacks the shards of other machines is fetched next.
                if name.endswith(".pt") or in_bucket or not remote:
                    problems.append(str(error))
                    if path.exists():  # so that no launch tries it again
                        path.rename(f"{path}.corrupt.{time.time_ns()}")
        return False

    # Saving

    def superseded(self, names: Iterable[str]) -> list[str]:
        """Return the names of checkpoints that are neither among the newest nor a milestone."""
        ordered = sorted(filter(CHECKPOINT.fullmatch, names), key=checkpoint_step)
        milestones, last_epoch = set(), 0
        for name in ordered:
            epoch = int(CHECKPOINT.fullmatch(name)[1])
            if self.milestone and epoch > last_epoch and epoch % self.milestone == 0:
                milestones.add(name)  # the first of its epoch
            last_epoch = epoch
        return [name for name in ordered[: -self.keep] if name not in milestones]

    # Events of a run

    def fit_start(self, state: State, logger: Logger) -> None:
        self.saved_step = state.timestamp.batch.value
        for number in self.signals:
            signal.signal(number, self.handle_signal)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Request a stop, or exit at once at a Ctrl-C after an earlier request."""
        if number == signal.SIGINT and self.stop_reason:
            kill_workers()  # They would outlive this process.
            print("interrupted again: exiting at once", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGINT)
        self.request_stop(signal.Signals(number).name)

    def request_stop(self, reason: str) -> None:
        """Request a stop at the end of the step, at which all ranks stop together."""
        self.stop_reason = self.stop_reason or reason

    def batch_end(self, state: State, logger: Logger) -> None:
        # There is no loss yet if half precision has skipped the first steps.
        total = state.total_loss_dict.get("loss/train/total", 0.0)
        if not math.isfinite(total):
            step = state.timestamp.batch.value
            sys.exit(f"the loss is {total} at step {step}; the newest checkpoint is from before it")

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.save_if_due_or_stopped(state, self.is_due(state, Event.BATCH_CHECKPOINT))

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.save_if_due_or_stopped(state, self.is_due(state, Event.EPOCH_CHECKPOINT))

    def save_and_exit_if_stopped(self, state: State, logger: Logger | None = None) -> None:
        """Save and exit if a stop was requested. All ranks of an evaluation call it together."""
        self.save_if_due_or_stopped(state, is_due=False)

    eval_batch_end = save_and_exit_if_stopped

    def save_if_due_or_stopped(self, state: State, is_due: bool) -> None:
        """Save if a checkpoint is due; if a stop was requested, save in any case, and exit.

        Raises:
            OSError: the disk was full when the last checkpoint was written.
        """
        step = state.timestamp.batch.value
        # Signals arrive, and writes end, at different times on the ranks.
        flags = (self.stop_reason is not None, self.writer.has_failed)
        stop, has_failed = self.on_any_rank(state, *flags)
        if has_failed:
            self.writer.finish()
        if not (is_due or stop):
            return
        is_finite = all(weight.isfinite().all() for weight in state.model.parameters())
        if self.on_any_rank(state, not is_finite)[0]:
            problem = f"a weight is not finite after step {step}"
            sys.exit(f"{problem}; the newest checkpoint is from before it")
        if self.saved_step != step:
            self.writer.start(state)
            self.saved_step = step
        if stop:
            self.writer.finish()
            if dist.get_global_rank() == 0:  # other machines may have no link
                place = f"epoch {state.timestamp.epoch.value}, step {step}"
                saved = f"saved in {self.folder / os.readlink(self.folder / LATEST)}"
                print(f"stopped at {place}; {saved}; run the same command to resume", flush=True)
            self.exit_after_copies()

    def exit_after_copies(self) -> None:
        """Exit with STOPPED once the bucket has all copies, or the time for them is over."""
        missing = self.copies.finish(self.upload_limit)
        if missing:
            limit = f"checkpoints.upload_limit={self.upload_limit:g}"
            lacks = f"{self.bucket.root} lacks {', '.join(missing)} after {limit} seconds"
            print_once(f"{lacks}; {self.folder} has them")
        # The launcher sends SIGTERM to the ranks that end last, which must not change their code.
        ignore_stop_signals()
        if self.copies.is_copying:
            raise CopyingUnfinished(STOPPED)
        sys.exit(STOPPED)

    def on_any_rank(self, state: State, *flags: bool) -> list[bool]:
        """Return whether each flag is true on any rank; all ranks call this together."""
        if dist.get_world_size() == 1:
            return list(flags)  # without a transfer to a GPU and back in each step
        highest = state.device.tensor_to_device(torch.tensor(flags, dtype=torch.int))
        dist.all_reduce(highest, "MAX")
        return [bool(flag) for flag in highest.tolist()]

    def fit_end(self, state: State, logger: Logger) -> None:
        self.writer.finish()
        self.save_and_exit_if_stopped(state)
        exit_on_signals(self.signals)
        self.copies.finish()
