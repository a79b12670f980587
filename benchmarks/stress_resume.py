"""Kill a small pre-training run over and over; it must end as if nothing had happened.

    uv run python benchmarks/stress_resume.py --kills 50 --seed 0                # 2 idle CPU cores, 15 min

Runs take turns: one rank, two ranks, and from one to four, drawn for each life, as is whether checkpoints are written every
second step or at the ends of epochs. Each life is launched as users do, and ended at a random moment between its first
instruction and its last: by SIGKILL to all of its processes, as when a machine is gone, or by SIGTERM to the launcher, as
when one is about to be. Prints a line of JSON for each life and each run.

With the same ranks throughout, the final weights and all losses must be those of a run never stopped, to the bit. In every
run each step must have seen the samples that it sees in that run, whichever ranks they went to.
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
from composer import Logger, State
from composer.utils import dist

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import small  # noqa: E402

import data_prep  # noqa: E402
import pretrain  # noqa: E402
from training.checkpoints import LATEST, Checkpoints  # noqa: E402
from training.weights import read_checkpoint  # noqa: E402

LIMIT = 15  # seconds from SIGTERM to the end of the launcher, a checkpoint included


def note_samples(self: Checkpoints, state: State, logger: Logger) -> None:
    """At the start of a step, add a line to samples.jsonl: a checksum of each sample's noise, which is its own."""
    keys = [zlib.crc32(noise.numpy().tobytes()) for noise in state.batch["noise"]]
    with (self.folder.parent / "samples.jsonl").open("a") as file:
        line = [state.timestamp.batch.value, os.environ["LIFE"], dist.get_world_size(), keys]
        file.write(json.dumps(line) + "\n")


def live(
    folder: Path, arguments: list[str], ranks: int, end: tuple[float, signal.Signals] | None
) -> dict:
    """Launch a run, and end it after so many seconds -> what happened. end: None for a life that may finish."""
    command = [
        sys.executable,
        "-m",
        "composer.cli.launcher",
        "-n",
        str(ranks),
        __file__,
        "--child",
        *arguments,
    ]
    begun = time.monotonic()
    with (folder / "out.txt").open("a") as out:
        environment = os.environ | {"LIFE": str(time.time_ns())}
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        told = None
        try:
            process.wait(end[0] if end else 300)
        except subprocess.TimeoutExpired:
            told = time.monotonic()
            if end and end[1] == signal.SIGTERM:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    now = time.monotonic()
    life = {
        "ranks": ranks,
        "signal": end[1].name if told and end else None,
        "seconds": round(now - begun, 1),
        "exit": code,
    }
    if life["signal"] == "SIGTERM":
        life["seconds_to_end"] = round(now - told, 1)
    return life


def samples_of(run: Path) -> dict[int, set[tuple]]:
    """For each step, what its attempts saw: the samples of all ranks of a life."""
    attempts = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        step, life, ranks, keys = json.loads(line)
        attempts.setdefault((step, life, ranks), []).append(keys)
    seen = {}
    for (step, _, ranks), parts in attempts.items():
        if len(parts) == ranks:  # else ended before every rank had begun the step
            seen.setdefault(step, set()).add(tuple(sorted(chain(*parts))))
    return seen


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(str(run / "checkpoints" / LATEST))


def losses_of(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {
        line["step"]: {key: value for key, value in line.items() if key.startswith("loss/")}
        for line in lines
    }
    return {step: values for step, values in losses.items() if values}


def stress(folder: Path, kills: int, seed: int, epochs: int) -> bool:
    """Whether all runs ended as they must."""
    demo, rng, right = folder / "demo", np.random.default_rng(seed), True
    data_prep.make_demo(str(demo), workers=2, garments=12)
    arguments = [*small(demo), f"trainer.max_duration={epochs}ep", "data.num_workers=1"]
    arguments += [
        f"callbacks.KNN={{bank: [{demo}/train_images], queries: [{demo}/test_images], every: 2}}"
    ]
    whole, duration = {}, {}
    for ranks in (1, 2):
        life = live(folder, [*arguments, f"run_name=whole{ranks}"], ranks, None)
        whole[ranks], duration[ranks] = folder / "runs" / f"whole{ranks}", life["seconds"]
        print(json.dumps({"run": f"whole{ranks}"} | life), flush=True)
    done, number = 0, 0
    while done < kills:
        ranks = (1, 2, None)[number % 3]
        name = f"run{number}"
        finished, worst = False, 0.0
        while not finished:
            now = ranks or int(rng.choice([1, 2, 4]))
            moment = rng.uniform(0, 1.05 * duration[min(now, 2)])
            how = signal.SIGKILL if rng.random() < 0.5 else signal.SIGTERM
            named = [f"run_name={name}", f"checkpoints.interval={rng.choice(['2ba', '1ep'])}"]
            life = live(folder, [*arguments, *named], now, (moment, how) if done < kills else None)
            done += life["signal"] is not None
            worst = max(worst, life.get("seconds_to_end", 0.0))
            finished = (folder / "runs" / name / "result.json").exists()
            expected = life["exit"] == 0 if life["signal"] is None else True
            right &= expected and (finished or life["signal"] is not None)
            print(json.dumps({"run": name, "kills": done} | life), flush=True)
            if not expected:
                print((folder / "out.txt").read_text()[-3000:], file=sys.stderr)
                return False
        run, truth = folder / "runs" / name, whole[ranks or 1]
        seen, wanted = samples_of(run), samples_of(truth)
        verdict = {
            "run": name,
            "ranks": ranks or "1, 2, 4",
            "samples": seen == wanted,
            "seconds_to_end": worst,
        }
        if ranks:
            ours, theirs = weights_of(run), weights_of(truth)
            verdict["weights"] = ours.keys() == theirs.keys() and all(
                torch.equal(ours[key], theirs[key]) for key in ours
            )
            verdict["losses"] = losses_of(run) == losses_of(truth)
        right &= (
            all(value for key, value in verdict.items() if key in ("samples", "weights", "losses"))
            and worst < LIMIT
        )
        print(json.dumps(verdict), flush=True)
        number += 1
    return right


def clear_shared_memory(folder: str) -> None:
    """Remove what killed lives have left of Streaming's in shared memory."""
    for path in Path("/dev/shm").glob("*_locals"):
        if folder.encode() in path.read_bytes():
            for left in path.parent.glob(path.name.removesuffix("locals") + "*"):
                left.unlink(missing_ok=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        del sys.argv[1]
        torch.set_num_threads(1)
        Checkpoints.batch_start = note_samples
        pretrain.main()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--epochs",
        type=int,
        default=16,
        help="of each run, of three steps; fewer put more kills before training",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        right = stress(Path(folder), options.kills, options.seed, options.epochs)
        clear_shared_memory(folder)
    print(json.dumps({"kills": options.kills, "seed": options.seed, "right": right}), flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
