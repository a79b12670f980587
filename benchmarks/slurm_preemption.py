"""Interrupt the jobs of cluster/*.sbatch under a Slurm of two nodes on this machine.

    sudo apt-get install slurm-wlm munge
    sudo .venv/bin/python benchmarks/slurm_preemption.py        # 2 CPU cores, 15 minutes

Starts munged, slurmctld and two slurmd with a configuration in a temporary folder, and submits the
files as users do, with a small run of one rank on each node. Each job meets one interruption:

    whole      none
    warned     the early signal, SIGUSR1, of `scancel --signal`
    time       the early signal of `--signal`, since the job's time is nearly over
    preempted  `scontrol requeue`: SIGTERM, and SIGKILL 10 s later
    node       a node is lost: its slurmd and all its processes are killed
    cancelled  `scancel`: it must not come back
    parts      `scontrol requeue` of one of two tasks of data_prep.sbatch, which are then merged

Prints a line of JSON for each job. A run that is not cancelled must finish with the losses and
weights of the first, to the bit; the parts must have the bytes of a conversion by one process.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
from benchmarks.stress_resume import ROOT, losses_of, same_weights, small_run

NODES = ("n0", "n1")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LIMIT = 400  # seconds for a job, with all its restarts
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "unshare")
CONFIGURATION = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# A job queues again once its credential has expired: by default after 120 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
FirstJobId={first}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TaskProlog={folder}/prolog.sh
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=10
SlurmdTimeout=20
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={n0} CPUs=1 RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=1 RealMemory=1000
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that no program listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


class Slurm:
    """Two nodes of Slurm on this machine; `stop` ends all processes that were started."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes = {}  # {name: process}
        names = ("port", *NODES)
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        host, first = socket.gethostname(), os.getpid()  # a job's number decides about its port
        text = CONFIGURATION.format(folder=folder, host=host, first=first, **ports)
        (folder / "slurm.conf").write_text(text)
        # Streaming's locks are in TMPDIR, and its names in /dev/shm: each node has its own.
        prolog = folder / "prolog.sh"
        prolog.write_text(f"#!/bin/sh\necho export TMPDIR={folder}/tmp-$SLURMD_NODENAME\n")
        prolog.chmod(0o755)
        for name in ("state", *(f"tmp-{node}" for node in NODES)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        """Start all daemons, and wait until both nodes are idle."""
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{file}" for name, file in files.items()]
        log = f"--log-file={self.folder}/munge.log"
        self.run("munged", "munged", "--foreground", "--force", log, *options)
        wait_for(lambda: (self.folder / "munge.socket").exists(), "munged", 10)
        self.run("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: ask("sinfo", "-ho", "%T %D") == "idle 2", "idle nodes", 60)

    def start_node(self, node: str) -> None:
        """Start a node with a /dev/shm of its own."""
        script = 'mount -t tmpfs none /dev/shm && exec slurmd -D -N "$0"'
        self.run(node, "unshare", "--mount", "sh", "-c", script, node)

    def run(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("a") as out:
            output = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.processes[name] = subprocess.Popen(command, **output)

    def lose_node(self, node: str) -> None:
        """Kill all processes of a node, which share its mount namespace, as if it were lost."""
        namespace = os.readlink(f"/proc/{self.processes[node].pid}/ns/mnt")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.readlink(process / "ns" / "mnt") == namespace:
                    os.kill(int(process.name), signal.SIGKILL)
        self.processes[node].wait()

    def stop(self) -> None:
        """End the daemons; slurmd ends what is left of the jobs."""
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], check=False)
        subprocess.run(["scancel", "--user=root"], check=False)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def wait_for(condition, name: str, limit: float = LIMIT) -> None:
    """Return as soon as a condition holds; raise TimeoutError after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit} s for {name}")
        time.sleep(0.2)


def ask(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def shown(number: str) -> dict[str, str]:
    """Return what Slurm says of a job: JobState, Restarts, ExitCode, ..."""
    words = ask("scontrol", "show", "job", "--oneliner", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


class Job:
    """A job of cluster/slurm.sbatch with the run of its name."""

    def __init__(self, folder: Path, name: str, arguments: list[str], *options: str):
        self.run = folder / "runs" / name
        self.output = folder / f"{name}.out"
        one_rank = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
        files = (f"--chdir={folder}", f"--output={self.output}", "--parsable")
        script = str(ROOT / "cluster" / "slurm.sbatch")
        stage = (script, str(ROOT / "pretrain.py"), *arguments, f"run_name={name}")
        self.number = ask("sbatch", *files, *one_rank, *options, *stage)
        if not self.number:
            sys.exit("sbatch refused the job")

    def step(self) -> int:
        """Return the newest step in the log of the run."""
        log = self.run / "metrics.jsonl"
        return len(losses_of(self.run)) if log.exists() else 0

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step, f"step {step} of {self.run.name}")

    def wait_for_end(self) -> dict:
        """Wait until the job is out of the queue, and return how it ended."""
        wait_for(lambda: self.state() in ENDS, f"the end of {self.run.name}")
        return {"state": self.state(), "restarts": int(shown(self.number)["Restarts"])}

    def state(self) -> str | None:
        return shown(self.number).get("JobState")

    def resumed_from(self) -> list[str]:
        """Return the checkpoints from which the run has resumed."""
        lines = self.output.read_text().splitlines()
        return [line.split("/")[-1] for line in lines if line.startswith("resuming from")]


class Preemption:
    """Jobs that are interrupted one after the other, and compared with one that was not."""

    def __init__(self, folder: Path, epochs: int):
        self.folder = folder
        self.slurm = Slurm(folder)
        (folder / ".venv").symlink_to(sys.prefix)
        data_prep.make_demo(str(folder / "demo"), workers=2, garments=12)
        arguments = small_run(folder / "demo", epochs)
        self.arguments = [word for word in arguments if "SampleLog" not in word]

    def submit(self, name: str, *options: str) -> Job:
        # A lost node leaves no time for a checkpoint.
        more = ["checkpoints.interval=2ba"] if name == "node" else []
        return Job(self.folder, name, [*self.arguments, *more], *options)

    def interrupted(self, name: str) -> Job:
        """Submit a job, and interrupt it once at step 5."""
        # Slurm looks at the times every 30 s, so the signal comes 35 to 65 s after the start.
        options = ("--time=2", "--signal=USR1@55") if name == "time" else ()
        job = self.submit(name, *options)
        if name in ("whole", "time"):
            return job
        job.wait_for_step(5)
        if name == "warned":
            ask("scancel", "--signal=USR1", job.number)
        elif name == "preempted":
            ask("scontrol", "requeue", job.number)
        elif name == "cancelled":
            ask("scancel", job.number)
        elif name == "node":
            self.slurm.lose_node("n1")
            wait_for(lambda: job.state() != "RUNNING", "the loss of the node")
            self.slurm.start_node("n1")
        return job

    def ends_as_it_must(self, name: str) -> bool:
        """Submit and interrupt a job, print what it did, and return whether it was right."""
        begin = time.monotonic()
        job = self.interrupted(name)
        result = {"job": name} | job.wait_for_end()
        result |= {"resumed_from": job.resumed_from(), "seconds": round(time.monotonic() - begin)}
        whole = self.folder / "runs" / "whole"
        finished = (job.run / "result.json").exists()
        if name == "cancelled":
            saved = "stopped at" in job.output.read_text()
            right = saved and result["state"] == "CANCELLED" and not finished
            result["saved"] = saved
        else:
            right = finished and result["state"] == "COMPLETED"
            right &= (result["restarts"] > 0) == (name != "whole")
            if finished:
                result["losses"] = losses_of(job.run) == losses_of(whole)
                result["weights"] = same_weights(job.run, whole)
                right &= result["losses"] and result["weights"]
        print(json.dumps(result | {"right": right}), flush=True)
        if not right:
            print(job.output.read_text()[-6000:], file=sys.stderr)
        return right

    def parts_end_as_they_must(self) -> bool:
        """Convert with an array of two tasks, one of them preempted, and merge; print the outcome.

        Returns:
            Whether the shards have the bytes of a conversion by one process.
        """
        raw, one, two = (self.folder / name for name in ("raw", "one", "two"))
        for number in range(10):  # 600 inputs, since a part has 256
            (raw / str(number)).mkdir(parents=True)
            for image in (self.folder / "demo" / "raw" / "train" / "images").rglob("*.jpg"):
                os.link(image, raw / str(number) / f"{image.parent.name}-{image.name}")
        data_prep.main(["images", str(raw), str(one), "--workers=1"])
        (self.folder / "data_prep.py").symlink_to(ROOT / "data_prep.py")
        options = (f"--chdir={self.folder}", "--parsable", "--cpus-per-task=1", "--mem-per-cpu=500")
        script = str(ROOT / "cluster" / "data_prep.sbatch")
        array = ask("sbatch", *options, "--array=1-2", script, "images", str(raw), str(two))
        tasks = [f"{array}_{number}" for number in (1, 2)]
        wait_for(lambda: shown(tasks[0]).get("JobState") == "RUNNING", "the first part")
        ask("scontrol", "requeue", tasks[0])
        after = f"--dependency=afterok:{array}"
        merging = ask("sbatch", *options, after, script, "merge", str(two))
        wait_for(lambda: shown(merging).get("JobState") in ENDS, "the merging")
        restarts = [int(shown(task)["Restarts"]) for task in tasks]
        files = [path.relative_to(one) for path in sorted(one.rglob("*.mds"))]
        same = all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
        same &= (one / "index.json").read_bytes() == (two / "index.json").read_bytes()
        result = {"job": "parts", "state": shown(merging)["JobState"], "restarts": restarts}
        right = result["state"] == "COMPLETED" and same and restarts == [1, 0] and len(files) > 2
        print(json.dumps(result | {"same_bytes": same, "right": right}), flush=True)
        return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["whole", "warned", "time", "preempted", "node", "cancelled", "parts"]
    parser.add_argument("--jobs", nargs="+", choices=names, default=names)
    parser.add_argument("--epochs", type=int, default=48, help="of each run, of three steps")
    parser.add_argument("--folder", help="where to leave everything; default a temporary folder")
    options = parser.parse_args()
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing or os.geteuid():
        remedy = "run as root, after apt-get install slurm-wlm munge"
        sys.exit(f"slurm_preemption.py needs root, {', '.join(PROGRAMS)}; {remedy}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # runs `finally`
    folder = Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    preemption = Preemption(folder.resolve(), options.epochs)
    try:
        preemption.slurm.start()
        right = [preemption.ends_as_it_must(name) for name in options.jobs if name != "parts"]
        if "parts" in options.jobs:
            right.append(preemption.parts_end_as_they_must())
    finally:
        preemption.slurm.stop()
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
