"""Signal small runs in each phase of each stage, and compare how they end with what docs say.

    uv run python benchmarks/stress_signals.py            # 60 cases, on 2 CPU cores
    uv run python benchmarks/stress_signals.py --all      # every combination

A case is a stage, the phase that is interrupted, a signal, the processes that get it, the number
of data workers and the number of ranks. By default, cases are drawn until each triple of values
has occurred. Every run is launched as users do, by Composer's launcher. Its ranks write a file and
pause once they are in the phase, until the signal is sent. Prints a line of JSON for each case.

A run must end with exit code 75 and one line that says where it was saved and how to resume, or
with 130 after a second SIGINT. Before training, and in eval.py, nothing is saved. Every checkpoint
must be intact, no process may be left, and no traceback be a rank's. Composer's launcher dies of
SIGUSR1, so its runs begin with `trap '' USR1`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from composer.utils import reproducibility

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
import eval as evaluation
import finetune
import pretrain
from evaluation.probes import KNN
from shards.stream import DeterministicStream
from shards.views import EvalViews
from training.checkpoints import check_checkpoint
from training.writing import Writer

ROOT = Path(__file__).parent.parent
STAGES = {"pretrain": pretrain, "finetune": finetune, "eval": evaluation}
GAP = 0.5  # seconds after a signal in which processes receive it
LIMIT = 40.0  # seconds from the signal to the end of all processes
LAUNCHED = 120.0  # seconds from the launch to the phase
SAVED = re.compile(r"stopped at epoch \d+, step (\d+); saved in (\S+); run the same command to res")
UNSAVED = re.compile(r"stopped by (SIG\w+); run the same command again to continue")
TWICE = re.compile(r"interrupted again: exiting at once")
VALUES = {
    "stage": tuple(STAGES),
    "phase": ("start", "loader", "measure", "write"),
    "signal": ("SIGTERM", "SIGINT", "SIGUSR1", "SIGINT twice"),
    "target": ("group", "launcher", "rank", "ranks"),
    "workers": (0, 4),
    "ranks": (1, 2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run that is interrupted.

    Args:
        phase: start, before training; loader, while a batch is awaited; measure, in k-NN or an
            evaluation; write, while a checkpoint is written.
        target: group, all processes; launcher; rank, the last one alone; ranks, all of them.
        workers, ranks: data workers of each rank, and ranks.
    """

    stage: str
    phase: str
    signal: str
    target: str
    workers: int
    ranks: int

    @property
    def is_possible(self) -> bool:
        """Whether the combination exists and has an outcome of its own."""
        if self.stage == "eval" and (self.phase == "write" or self.signal.startswith("SIGUSR")):
            return False
        if self.signal == "SIGINT twice" and (self.phase == "start" or self.stage == "eval"):
            return False  # The first one ends the run.
        if self.signal == "SIGINT twice" and self.target in ("launcher", "rank"):
            return False  # It comes from a terminal, to all.
        if self.signal == "SIGUSR1" and (self.target == "launcher" or self.phase == "start"):
            return False  # The launcher ignores it, as do runs that have not read their settings.
        return not (self.target == "rank" and self.ranks == 1)

    @property
    def is_saved(self) -> bool:
        return self.stage != "eval" and self.phase != "start" and self.signal != "SIGINT twice"


def all_cases() -> list[Case]:
    cases = (Case(*values) for values in itertools.product(*VALUES.values()))
    return [case for case in cases if case.is_possible]


def covering_cases(seed: int) -> list[Case]:
    """Return cases in which all three values occur together that occur together in any case."""

    def triples(case: Case) -> set:
        return set(itertools.combinations(dataclasses.asdict(case).items(), 3))

    pool = all_cases()
    np.random.default_rng(seed).shuffle(pool)
    missing = set().union(*map(triples, pool))
    chosen = []
    while missing:
        chosen.append(max(pool, key=lambda case: len(triples(case) & missing)))
        missing -= triples(chosen[-1])
    return chosen


def pausing(function: Callable, folder: Path, is_phase: Callable[..., bool]) -> Callable:
    """Return a function that first pauses, if its arguments are of the phase.

    Each rank writes a file `paused.RANK`, and waits for the file `sent`.
    """

    def paused(*arguments, **keywords):
        if is_phase(*arguments):
            (folder / f"paused.{os.environ.get('RANK', 0)}").touch()
            begin = time.monotonic()
            while not (folder / "sent").exists() and time.monotonic() - begin < LIMIT:
                time.sleep(0.02)
        return function(*arguments, **keywords)

    return paused


def run_paused(stage: str, phase: str, folder: Path) -> None:
    """Call a stage's main in this process, which pauses in a phase.

    Args:
        folder: for the files of pausing.
    """
    owner, name = DeterministicStream, "__iter__"
    if phase == "start":  # Every stage seeds once its ranks are connected.
        owner, name = reproducibility, "seed_all"
    elif phase == "write":
        owner, name = Writer, "save"
    elif phase == "measure" and stage == "pretrain":
        owner, name = KNN, "measure"
    elif phase == "measure" or stage == "eval":
        owner, name = EvalViews, "__getitem__"

    def is_phase(*arguments) -> bool:  # The first k-NN comes before training.
        return owner is not KNN or arguments[1] == "trained"

    setattr(owner, name, pausing(getattr(owner, name), folder, is_phase))
    STAGES[stage].main()


def processes_of(case: Case, launcher: psutil.Process) -> list[int]:
    """Return the processes that get the signal; a negative number is a process group."""
    ranks = [process.pid for process in launcher.children()]
    targets = {"group": [-launcher.pid], "launcher": [launcher.pid], "rank": ranks[-1:]}
    return targets.get(case.target, ranks)


def send(case: Case, processes: list[int], folder: Path) -> None:
    """Send the signal, or both of them; then let the ranks leave the phase."""
    name, _, twice = case.signal.partition(" ")
    for _ in range(2 if twice else 1):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                kill = os.killpg if process < 0 else os.kill
                kill(abs(process), signal.Signals[name])
        time.sleep(GAP)
    (folder / "sent").touch()


def rank_tracebacks(text: str) -> int:
    """Return the number of tracebacks in an output that are not the launcher's own."""
    traces = text.split("Traceback (most recent call last)")[1:]
    return sum("composer/cli/launcher.py" not in trace[:400] for trace in traces)


def faults_of(case: Case, code: int, text: str, folder: Path) -> Iterator[str]:
    """Yield what is not as it must be at the end of a run."""
    expected = 130 if case.signal == "SIGINT twice" else 75
    if code != expected:
        yield f"exit code {code}, not {expected}"
    if rank_tracebacks(text):
        yield "a traceback"
    saved, unsaved, twice = (list(line.finditer(text)) for line in (SAVED, UNSAVED, TWICE))
    if case.signal == "SIGINT twice":
        if not twice or saved:
            yield "no line about the second SIGINT, or a checkpoint"
    elif not case.is_saved:
        if not unsaved or saved:
            yield "no line about the signal, or a checkpoint"
    elif len(saved) != 1:
        yield f"{len(saved)} lines about the checkpoint"
    else:
        step, path = int(saved[0][1]), folder / saved[0][2]
        if f"-ba{step}" not in path.name:
            yield f"{path.name} is not of step {step}"
        try:
            check_checkpoint(path)
        except ValueError as error:
            yield str(error)


def small_run(folder: Path, stage: str, workers: int) -> list[str]:
    """Return the arguments of a small run, whose data and weights are in a folder."""
    demo, yamls = folder / "demo", ROOT / "yamls"
    knn = f"bank: [{demo}/train_images], queries: [{demo}/test_images], num_workers: {workers}"
    training = ["trainer.max_duration=2ep", f"data.num_workers={workers}"]
    training += ["checkpoints={interval: 1ba, stop_signals: [SIGUSR1]}"]
    if stage == "pretrain":
        streams = f"[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]"
        training += ["make_demo=null", "data.global_train_batch_size=40"]
        return [
            f"{yamls}/demo.yaml",
            *training,
            f"data.streams={streams}",
            f"callbacks.KNN={{{knn}}}",
        ]
    if stage == "finetune":
        return [
            f"{yamls}/finetune_demo.yaml",
            *training,
            f"pretrained={folder}/runs/pretrain",
            "model.num_frames=1",
            "data.global_train_batch_size=20",
            f"data.streams=[{{path: {demo}/train_images}}]",
            f"eval_data={{paths: [{demo}/test_images], num_workers: {workers}}}",
            "trainer.eval_interval=1ep",
        ]
    return [
        f"checkpoint={folder}/runs/finetune",
        "device=cpu",
        f"accuracy={{paths: [{demo}/test_images], num_workers: {workers}}}",
    ]


class Signals:
    """Runs in `folder`, each of which is interrupted as a case says."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.output = ""
        data_prep.make_demo(str(folder / "demo"), workers=2, garments=12)
        for stage in ("pretrain", "finetune"):
            code = self.launch(stage, 1, [*small_run(folder, stage, 0), f"run_name={stage}"]).wait()
            if code:
                sys.exit((folder / "out.txt").read_text())

    def launch(
        self, stage: str, ranks: int, arguments: list[str], phase: str = ""
    ) -> subprocess.Popen:
        """Start a run in a process group of its own, whose output goes to out.txt."""
        script = [str(ROOT / f"{stage}.py")]
        if phase:
            script = [__file__, "--pause", stage, phase]
        launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)]
        with (self.folder / "out.txt").open("w") as out:
            return subprocess.Popen(
                ["sh", "-c", """trap '' USR1; exec "$@" """, "sh", *launcher, *script, *arguments],
                cwd=self.folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, case: Case, name: str) -> dict:
        """Launch a case, signal it, and return how it ended."""
        for marker in (*self.folder.glob("paused.*"), self.folder / "sent"):
            marker.unlink(missing_ok=True)
        arguments = [*small_run(self.folder, case.stage, case.workers), f"run_name={name}"]
        process = self.launch(case.stage, case.ranks, arguments, case.phase)
        begin, faults = time.monotonic(), []
        try:
            while len(list(self.folder.glob("paused.*"))) < case.ranks:
                if process.poll() is not None or time.monotonic() - begin > LAUNCHED:
                    faults.append("the phase was not reached")
                    break
                time.sleep(0.05)
            begin = time.monotonic()
            if not faults:
                send(case, processes_of(case, psutil.Process(process.pid)), self.folder)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT)
            seconds = round(time.monotonic() - begin, 1)
            faults += ["processes were left"] if group_is_left(process.pid) else []
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.output = (self.folder / "out.txt").read_text()
        faults += faults_of(case, process.wait(), self.output, self.folder)
        saved = SAVED.search(self.output)
        return dataclasses.asdict(case) | {
            "exit": process.returncode,
            "step": int(saved[1]) if saved else None,
            "seconds": seconds,
            "traceback": rank_tracebacks(self.output) > 0,
            "launcher_traceback": "Traceback" in self.output,
            "faults": faults,
        }


def group_is_left(group: int) -> bool:
    """Return whether processes of a group outlive it by more than 20 seconds."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def main() -> None:
    if sys.argv[1:2] == ["--pause"]:
        _, _, stage, phase, *arguments = sys.argv
        sys.argv = [f"{stage}.py", *arguments]
        run_paused(stage, phase, Path.cwd())
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases")
    options = parser.parse_args()
    cases = all_cases() if options.all else covering_cases(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        signals = Signals(Path(folder))
        for number, case in enumerate(cases):
            result = signals.run(case, f"case{number}")
            print(json.dumps(result), flush=True)
            if result["faults"]:
                failed += 1
                print(signals.output[-6000:], file=sys.stderr, flush=True)
    print(json.dumps({"cases": len(cases), "failed": failed}), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
