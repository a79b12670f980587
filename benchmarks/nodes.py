"""Two nodes on one machine, for benchmarks/stress_resume.py --nodes 2.

Each node is a launcher of Composer with one rank, in a mount namespace with its own /dev/shm. It
has its own working directory and its own temporary folder, which outlast a kill unless the node is
replaced by an empty one. Data and checkpoints are in a bucket on a local server (moto).
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from torch.distributed import PrefixStore, TCPStore

ROOT = Path(__file__).parent.parent
UNSHARE = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]


def can_unshare() -> bool:
    """Return whether this user may make mount namespaces."""
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def have_met(port: int, count: int) -> bool:
    """Return whether all nodes of a launch have announced themselves, see training/peers.py."""
    limit = timedelta(seconds=1)
    with contextlib.suppress(RuntimeError):  # Rank 0 has not made the store yet.
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit, wait_for_workers=False)
        numbers = [PrefixStore("peers/0", store).add(f"beat/{rank}", 0) for rank in range(count)]
        return all(numbers)
    return False


def start_bucket(demo: Path) -> None:
    """Start a server of S3 in this process, and copy the data sets of a folder into it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.create_bucket(Bucket="bkt")
    for path in demo.rglob("*"):
        if path.is_file() and "raw" not in path.parts:
            client.upload_file(str(path), "bkt", f"demo/{path.relative_to(demo)}")


class Node:
    """A node that is launched, killed and perhaps replaced."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.output = folder.with_suffix(".txt")  # of the last launch
        self.process = None
        self.replace()

    def replace(self) -> None:
        """Take an empty node instead of this one."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("work", "tmp", "shm"):
            (self.folder / name).mkdir(parents=True)

    def start(self, arguments: list[str], nodes: int, number: int, port: int) -> None:
        """Launch the run on this node, which is the given number of several."""
        mount = 'mount --bind "$NODE_SHM" /dev/shm && exec "$@"'
        launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", "1"]
        launcher += ["--world_size", str(nodes), "--node_rank", str(number)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [*launcher, str(ROOT / "pretrain.py"), *arguments]
        places = {"TMPDIR": str(self.folder / "tmp"), "NODE_SHM": str(self.folder / "shm")}
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [*UNSHARE, "sh", "-c", mount, "sh", *command],
                cwd=self.folder / "work",
                env=os.environ | places,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill all processes of the node."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
