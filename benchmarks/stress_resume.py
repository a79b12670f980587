"""Interrupt small pre-training runs at random moments; compare them with runs never stopped.

    uv run python benchmarks/stress_resume.py --kills 50 --seed 0      # 2 idle CPU cores, 15 min

Runs take turns: with one rank, with two ranks, and with one to four, drawn for each launch. Whether
checkpoints are written every second step or at the ends of epochs is drawn for each launch too. A
run is launched as users do, and interrupted at a random moment between its start and its end. All
of its processes are killed, as when a machine is lost, or the launcher gets SIGTERM, as when a
machine is about to be taken away. Prints a line of JSON for each launch and each run.

With a fixed number of ranks, the final weights and all losses must equal those of a run that was
never stopped, to the bit. With any number of ranks, each step must have the same samples.
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
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from composer import Callback, Logger, State
from composer.utils import dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
from training.weights import LATEST, read_checkpoint

ROOT = Path(__file__).parent.parent
LIMIT = 15  # seconds from SIGTERM to the end of the launcher, a checkpoint included
End = tuple[float, signal.Signals] | None  # seconds after the launch, and the signal


class SampleLog(Callback):
    """Adds a line to samples.jsonl at the start of each step: a checksum of each sample's noise.

    No two samples have the same noise, so the checksum identifies a sample.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        keys = [zlib.crc32(noise.numpy().tobytes()) for noise in state.batch["noise"]]
        line = [state.timestamp.batch.value, os.environ["LAUNCH"], dist.get_world_size(), keys]
        with Path("runs", state.run_name, "samples.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def small_run(demo: Path, epochs: int) -> list[str]:
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
        "callbacks={stress_resume.SampleLog: {}}",
    ]


def launch(folder: Path, arguments: list[str], ranks: int, end: End) -> dict:
    """Launch a run, interrupt it, and return what happened.

    Args:
        folder: working directory.
        end: when and by which signal it is interrupted; None to let it finish.
    """
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)]
    command = [*launcher, str(ROOT / "pretrain.py"), *arguments]
    modules = str(Path(__file__).parent)  # where pretrain.py finds stress_resume.SampleLog
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stress = Stress(Path(folder), options.kills, options.seed, options.epochs)
        right = stress.all_end_as_they_must()
        clear_shared_memory(folder)
    print(json.dumps({"kills": options.kills, "seed": options.seed, "right": right}), flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
