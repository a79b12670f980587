"""The shared memory of StreamingDatasets: one job at a time takes names, and leftovers are removed.

Streaming takes the first free number N for the files /dev/shm/N_* of a dataset, and for its lock
files N_* in the temporary folder. A process that is killed leaves these files behind. If the data
are in a bucket, Streaming then refuses the next launch, since its cache seems to be in use.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import IO

from composer.utils import dist
from filelock import FileLock, Timeout
from streaming import StreamingDataset

from shards.workers import without_stop_signals

SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def one_job_at_a_time() -> Iterator[None]:
    """Make other jobs on this machine wait while a StreamingDataset is constructed.

    Otherwise two jobs could take the same names in shared memory, which are the first free ones.

    Raises:
        OSError: another node of the same run has the same /dev/shm, and so takes the same names.
    """
    lock = FileLock(Path(gettempdir(), f"streams-{os.getuid()}.lock"))
    if dist.get_local_rank() == 0:
        with suppress(Timeout):  # Start anyway after 60 s.
            lock.acquire(timeout=60)
        remove_leftovers()
    dist.barrier()
    try:
        # Signals must not end the tracker of shared memory, a process that starts here.
        with without_stop_signals():
            yield
    except FileExistsError as error:
        problem = f"{SHARED_MEMORY}{error.filename}: used by another node of this run"
        raise OSError(f"{problem}; give each node (container, pod) its own /dev/shm") from error
    finally:
        lock.release()  # does nothing on other ranks


def remove_leftovers() -> None:
    """Remove the files of datasets whose processes have ended."""
    for path in SHARED_MEMORY.glob("*_owner"):
        with suppress(OSError), path.open() as file:  # BlockingIOError: the process lives
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            number = path.name.removesuffix("owner")
            for folder in (Path(gettempdir()), SHARED_MEMORY):
                for left in folder.glob(f"{number}*"):
                    left.unlink(missing_ok=True)


def claim(dataset: StreamingDataset) -> IO[str] | None:
    """Mark the shared memory of a dataset as used, and return a file to be kept open meanwhile.

    The file is locked until this process ends, even if it is killed.
    Returns None on other ranks than the first of a machine, and where there is no /dev/shm.
    """
    if dist.get_local_rank() != 0 or not SHARED_MEMORY.exists():
        return None
    # Streaming does not name its number in public.
    path = SHARED_MEMORY / f"{dataset._shm_prefix_int:06}_owner"
    # A process whose dataset is gone may still lock the file of this number.
    path.unlink(missing_ok=True)
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    # A data worker, which can outlive a killed rank by 5 s, must not hold the lock.
    os.register_at_fork(after_in_child=file.close)
    return file
