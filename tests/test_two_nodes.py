"""Two nodes with their own disks and shared memory, and a bucket: one is lost, both come back."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import fork_server, losses, read_metrics, run_stage, small

import pretrain
from benchmarks.nodes import can_unshare
from shards.storage import s3_client
from shards.workers import STOPPED
from training.checkpoints import Checkpoints

CLONE_NEWNS = 0x00020000  # of sched.h: a mount namespace
KILLED = -signal.SIGKILL


def enter_node(folder: Path) -> None:
    """Give this process a /dev/shm and a temporary folder of its own, on the disk of a node."""
    for name in ("shm", "tmp", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", str(folder / "shm"), "/dev/shm"], check=True)
    tempfile.tempdir = str(folder / "tmp")
    # The tracker of shared memory is outside, where the names may be another program's.
    multiprocessing.resource_tracker._resource_tracker._fd = os.open(os.devnull, os.O_WRONLY)


def run_node(
    rank: int, folder: Path, environment: dict, arguments: list[str], last_step: int | None
) -> None:
    """Run a rank on a node; it is killed before the step after `last_step`."""

    def batch_start(self, state, logger) -> None:
        if state.timestamp.batch.value == last_step:
            self.writer.finish()
            self.copies.thread.shutdown()  # The bucket has what this node has saved.
            os.kill(os.getpid(), signal.SIGKILL)

    enter_node(folder)
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "NODE_RANK": str(rank)}
    torch.set_num_threads(1)
    Checkpoints.batch_start = batch_start
    code = 0
    try:
        run_stage(pretrain, arguments, folder / "work")
    except BaseException:  # as the interpreter ends, not as multiprocessing does
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    os._exit(code)


def launch(nodes: list[Path], arguments: list[str], last_step: int | None = None) -> list[int]:
    """Launch a run on nodes, and return their exit codes.

    Args:
        last_step: after which the last node is killed; None to let it live.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ) | {
        "WORLD_SIZE": str(len(nodes)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    context = fork_server()
    processes = []
    for rank, node in enumerate(nodes):
        step = last_step if node is nodes[-1] else None
        given = (rank, node, environment, arguments, step)
        processes.append(context.Process(target=run_node, args=given))
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.mark.skipif(not can_unshare(), reason="this user may not make mount namespaces")
def test_run_on_two_nodes_of_which_one_is_lost_and_one_empty_has_the_losses_of_one_rank(
    demo, bucket, tmp_path
):
    for path in demo.glob("train_*/**/*"):
        if path.is_file():
            bucket.upload_file(str(path), "bkt", f"demo/{path.relative_to(demo)}")
    s3_client.cache_clear()
    settings = ["callbacks=null", "schedule.t_max=2ep", "data.num_workers=0", "run_name=run"]
    run_stage(pretrain, [*small(demo), *settings], tmp_path)
    expected = losses(tmp_path, "run")

    paths = ", ".join(f"{{path: s3://bkt/demo/train_{kind}}}" for kind in ("videos", "images"))
    settings += [f"data.streams=[{paths}]", "checkpoints={bucket: 's3://bkt/runs', interval: 1ba}"]
    arguments = [*small(demo), *settings]
    one, two, empty = (tmp_path / name for name in ("one", "two", "empty"))
    assert launch([one, two], arguments, last_step=2) == [STOPPED, KILLED]
    assert launch([two], arguments, last_step=4) == [KILLED]
    assert launch([empty, two], arguments) == [0, 0]
    found = {}
    for node in (one, two, empty):
        for line in read_metrics(node / "work", "run"):
            if "loss/train/total" in line:
                found[line["step"]] = line["loss/train/total"]
    assert found == pytest.approx(dict(enumerate(expected, 1)), rel=1e-5)
