"""Interrupt small pre-training runs at random moments; compare them with runs never stopped.

    uv run python benchmarks/stress_resume.py --kills 50 --seed 0      # 2 idle CPU cores, 15 min
    uv run python benchmarks/stress_resume.py --kills 30 --nodes 2     # needs `unshare --mount`

Runs take turns: with one rank, with two ranks, and with one to four, drawn for each launch. Whether
checkpoints are written every second step or at the ends of epochs is drawn for each launch too. A
run is launched as users do, and interrupted at a random moment between its start and its end. All
of its processes are killed, as when a machine is lost, or the launcher gets SIGTERM, as when a
machine is about to be taken away. Prints a line of JSON for each launch and each run.

With a fixed number of ranks, the final weights and all losses must equal those of a run that was
never stopped, to the bit. With any number of ranks, each step must have the same samples.

With --nodes 2, the runs are on one node or two, drawn for each launch; see benchmarks/nodes.py. One
node is killed; if both had announced themselves, the other must end by itself within a minute. Some
nodes are replaced by empty ones. Each step must have the samples of one rank, and its loss up to
rounding.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
from benchmarks.nodes import Node, free_port, have_met, start_bucket
from shards.workers import STOPPED
from training.weights import LATEST, read_checkpoint

ROOT = Path(__file__).parent.parent
LIMIT = 15  # seconds from SIGTERM to the end of the launcher, a checkpoint included
LOSS_LIMIT = 60  # seconds in which a node must end by itself once the other is lost
End = tuple[float, signal.Signals] | None  # seconds after the launch, and the signal


def small_run(demo: Path | str, epochs: int) -> list[str]:
    """Return the arguments of a pre-training run with three steps in each epoch."""
    knn = f"{{bank: [{demo}/train_images], queries: [{demo}/test_images], every: 2}}"
    return [
        str(ROOT / "yamls" / "demo.yaml"),
        "make_demo=null",
        f"data.streams=[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]",
        "data.global_train_batch_size=40",
        "data.num_workers=1",
        f"trainer.max_duration={epochs}ep",
        f"callbacks.KNN={knn}",
        "callbacks={sample_log.SampleLog: {}}",
    ]


def launch(folder: Path, arguments: list[str], ranks: int, end: End) -> dict:
    """Launch a run, interrupt it, and return what happened.

    Args:
        folder: working directory.
        end: when and by which signal it is interrupted; None to let it finish.
    """
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)]
    command = [*launcher, str(ROOT / "pretrain.py"), *arguments]
    modules = str(Path(__file__).parent)  # where pretrain.py finds sample_log.SampleLog
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
    environment["LAUNCH"] = str(time.time_ns())
    place = {"cwd": folder, "env": environment, "start_new_session": True}
    begin, signal_time = time.monotonic(), None
    with (folder / "out.txt").open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **place)
        try:
            process.wait(end[0] if end else 300)
        except subprocess.TimeoutExpired:
            signal_time = time.monotonic()
            if end and end[1] == signal.SIGTERM:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    now = time.monotonic()
    interrupted = end is not None and signal_time is not None
    result = {
        "ranks": ranks,
        "signal": end[1].name if interrupted else None,
        "seconds": round(now - begin, 1),
        "exit": code,
    }
    if result["signal"] == "SIGTERM":
        result["seconds_to_end"] = round(now - signal_time, 1)
    return result


def samples_of(run: Path) -> dict[int, set[tuple]]:
    """Return the samples of each step, over all ranks: one set if all attempts had the same."""
    attempts = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        step, launched, ranks, keys = json.loads(line)
        attempts.setdefault((step, launched, ranks), []).append(keys)
    samples = {}
    for (step, _, ranks), parts in attempts.items():
        if len(parts) == ranks:  # otherwise interrupted before every rank had begun the step
            samples.setdefault(step, set()).add(tuple(sorted(chain(*parts))))
    return samples


def same_weights(run: Path, reference: Path) -> bool:
    """Return whether the newest checkpoints of two runs are equal to the bit."""
    paths = [str(folder / "checkpoints" / LATEST) for folder in (run, reference)]
    ours, theirs = map(read_checkpoint, paths)
    same_names = ours.keys() == theirs.keys()
    return same_names and all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses_of(run: Path) -> dict[int, dict[str, float]]:
    """Return everything that was logged under loss/, by step."""
    losses = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        values = {key: value for key, value in line.items() if key.startswith("loss/")}
        if values:
            losses[line["step"]] = values
    return losses


class Stress:
    """Runs in `folder` that are interrupted `kills` times in all, and the runs never stopped."""

    def __init__(self, folder: Path, kills: int, seed: int, epochs: int):
        self.folder = folder
        self.kills = kills
        self.done = 0  # interruptions so far
        self.rng = np.random.default_rng(seed)
        data_prep.make_demo(str(folder / "demo"), workers=2, garments=12)
        self.arguments = small_run(folder / "demo", epochs)
        self.duration = {}  # {ranks: seconds of a run never stopped}

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def is_finished(self, name: str) -> bool:
        return (self.path(name) / "result.json").exists()

    def output(self) -> str:
        """Return the end of what all runs have printed."""
        return (self.folder / "out.txt").read_text()[-3000:]

    def run_references(self) -> None:
        """Run once with one rank and once with two, without an interruption."""
        for ranks in (1, 2):
            name = f"whole{ranks}"
            result = launch(self.folder, [*self.arguments, f"run_name={name}"], ranks, None)
            self.duration[ranks] = result["seconds"]
            print(json.dumps({"run": name} | result), flush=True)
            if not self.is_finished(name):
                sys.exit(self.output())

    def launch_once(self, name: str, ranks: int | None) -> dict:
        """Launch a run and interrupt it, unless there were enough interruptions."""
        now = ranks or int(self.rng.choice([1, 2, 4]))
        seconds = self.rng.uniform(0, 1.05 * self.duration[min(now, 2)])
        number = signal.SIGKILL if self.rng.random() < 0.5 else signal.SIGTERM
        interval = self.rng.choice(["2ba", "1ep"])
        end = (seconds, number) if self.done < self.kills else None
        arguments = [*self.arguments, f"run_name={name}", f"checkpoints.interval={interval}"]
        result = launch(self.folder, arguments, now, end)
        self.done += result["signal"] is not None
        print(json.dumps({"run": name, "kills": self.done} | result), flush=True)
        return result

    def run_interrupted(self, name: str, ranks: int | None) -> bool:
        """Launch a run until it is finished, and return whether it ended as it must.

        Args:
            ranks: None to draw their number for each launch.
        """
        slowest = 0.0
        while not self.is_finished(name):
            result = self.launch_once(name, ranks)
            slowest = max(slowest, result.get("seconds_to_end", 0.0))
            failed = result["exit"] != 0 or not self.is_finished(name)
            if result["signal"] is None and failed:
                print(self.output(), file=sys.stderr)
                return False
        run, reference = self.path(name), self.path(f"whole{ranks or 1}")
        equal = {"samples": samples_of(run) == samples_of(reference)}
        if ranks:
            equal["weights"] = same_weights(run, reference)
            equal["losses"] = losses_of(run) == losses_of(reference)
        verdict = {"run": name, "ranks": ranks or "1, 2, 4", "seconds_to_end": slowest}
        print(json.dumps(verdict | equal), flush=True)
        return all(equal.values()) and slowest < LIMIT

    def all_end_as_they_must(self) -> bool:
        """Interrupt runs until there were enough interruptions; stop at a run that failed."""
        self.run_references()
        right, number = True, 0
        while self.done < self.kills:
            ranks = (1, 2, None)[number % 3]
            right &= self.run_interrupted(f"run{number}", ranks)
            if not self.is_finished(f"run{number}"):
                return False
            number += 1
        return right


class NodesStress:
    """Runs on one node or two, which are killed `kills` times in all, and one never stopped."""

    def __init__(self, folder: Path, kills: int, seed: int, epochs: int):
        self.folder = folder
        self.kills = kills
        self.done = 0  # kills so far
        self.rng = np.random.default_rng(seed)
        self.reference = Stress(folder, 0, seed, epochs)
        start_bucket(folder / "demo")
        self.arguments = small_run("s3://bkt/demo", epochs)
        self.nodes = [Node(folder / "node0"), Node(folder / "node1")]
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}

    def is_finished(self, name: str) -> bool:
        result = f"work/runs/{name}/result.json"
        return any((node.folder / result).exists() for node in self.nodes)

    def launch(self, arguments: list[str], count: int, seconds: float | None) -> dict:
        """Launch a run on one node or two, perhaps kill one of them, and return what happened.

        Args:
            seconds: after which a node is killed; None to let the run finish.
        """
        os.environ["LAUNCH"] = str(time.time_ns())
        order = [int(number) for number in self.rng.permutation(2)[:count]]
        port, begin = free_port(), time.monotonic()
        nodes = [self.nodes[number] for number in order]
        for number, node in enumerate(nodes):
            node.start(arguments, count, number, port)
        result = {"nodes": order, "killed": None}
        survivors = list(nodes)
        deadline = begin + (seconds if seconds is not None else 300)
        while any(node.process.poll() is None for node in nodes) and time.monotonic() < deadline:
            time.sleep(0.05)
        if seconds is not None and any(node.process.poll() is None for node in nodes):
            victim = nodes[int(self.rng.integers(count))]
            result["met"] = have_met(port, count)
            victim.kill()
            killed = time.monotonic()
            survivors.remove(victim)
            result |= {"killed": self.nodes.index(victim), "after": round(seconds, 1)}
            for node in survivors:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.process.wait(2 * LOSS_LIMIT)
            result["seconds_to_end"] = round(time.monotonic() - killed, 1)
        result["exits"] = [node.process.poll() for node in survivors]
        for node in nodes:
            node.kill()
        return result | {"seconds": round(time.monotonic() - begin, 1)}

    def run(self, name: str) -> bool:
        """Launch a run, and kill nodes, until it is finished; return whether all was as it must."""
        samples = self.folder / "samples" / name
        samples.mkdir(parents=True)
        os.environ["SAMPLES"] = str(samples)
        arguments = [*self.arguments, f"run_name={name}", "checkpoints.bucket=s3://bkt/runs"]
        # A node that is lost before the other has met it is waited for like one that starts late.
        arguments.append("trainer.dist_timeout=80")
        right, losses, count = True, {}, 2
        while not self.is_finished(name):
            seconds = None
            if self.done < self.kills:
                seconds = float(self.rng.uniform(0, 1.05 * self.duration))
            interval = f"checkpoints.interval={self.rng.choice(['2ba', '1ep'])}"
            result = self.launch([*arguments, interval], count, seconds)
            for node in self.nodes:
                with contextlib.suppress(FileNotFoundError):
                    losses |= losses_of(node.folder / "work/runs" / name)
            if result["killed"] is None:
                right &= result["exits"] == [0] * count
                self.duration = min(self.duration, result["seconds"])
            else:
                self.done += 1
                right &= all(code in (0, STOPPED) for code in result["exits"])
                right &= not result["met"] or result["seconds_to_end"] < LOSS_LIMIT
                result["replaced"] = bool(self.rng.random() < 0.5)
                if result["replaced"]:
                    self.nodes[result["killed"]].replace()
            print(json.dumps({"run": name, "kills": self.done} | result), flush=True)
            if not right:
                print(self.output(), file=sys.stderr)
                return False
            count = int(self.rng.choice([1, 2]))
        return self.is_as_never_stopped(name, samples, losses)

    def is_as_never_stopped(self, name: str, samples: Path, losses: dict) -> bool:
        """Print and return whether samples and losses are those of one rank, never stopped."""
        whole = self.folder / "runs" / "whole1"
        expected = losses_of(whole)
        key = "loss/train/total"
        differences = [
            abs(losses[step][key] / expected[step][key] - 1) for step in expected if step in losses
        ]
        verdict = {
            "run": name,
            "samples": samples_of(samples) == samples_of(whole),
            "steps": f"{len(differences)} of {len(expected)}",
            "largest_difference_of_losses": max(differences),
        }
        print(json.dumps(verdict), flush=True)
        return verdict["samples"] and max(differences) < 1e-4

    def output(self) -> str:
        """Return the end of what the last launch has printed."""
        return "".join(node.output.read_text()[-3000:] for node in self.nodes)

    def all_end_as_they_must(self) -> bool:
        """Kill nodes until there were enough kills; stop at a run that failed."""
        arguments = [*self.reference.arguments, "run_name=whole1"]
        print(json.dumps({"run": "whole1"} | launch(self.folder, arguments, 1, None)), flush=True)
        os.environ["SAMPLES"] = str(self.folder)  # not read
        whole = self.launch([*self.arguments, "run_name=whole2"], 2, None)
        print(json.dumps({"run": "whole2"} | whole), flush=True)
        self.duration = whole["seconds"]
        right, number = whole["exits"] == [0, 0], 0
        if not right:
            print(self.output(), file=sys.stderr)
        while right and self.done < self.kills:
            right = self.run(f"run{number}")
            number += 1
        return right


def clear_shared_memory(folder: str) -> None:
    """Remove the files of Streaming in shared memory that killed processes have left."""
    for path in Path("/dev/shm").glob("*_locals"):
        with contextlib.suppress(FileNotFoundError):  # another program's, which it removed
            if folder.encode() not in path.read_bytes():
                continue
        for left in path.parent.glob(path.name.removesuffix("locals") + "*"):
            left.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    text = "of each run, of three steps; with fewer, more kills come before training"
    parser.add_argument("--epochs", type=int, default=16, help=text)
    parser.add_argument("--nodes", type=int, choices=[1, 2], default=1)
    options = parser.parse_args()
    kind = Stress if options.nodes == 1 else NodesStress
    with tempfile.TemporaryDirectory() as folder:
        stress = kind(Path(folder), options.kills, options.seed, options.epochs)
        right = stress.all_end_as_they_must()
        clear_shared_memory(folder)
    print(json.dumps({"kills": options.kills, "seed": options.seed, "right": right}), flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
