"""Compare methods that are trained for the same time; collect finished runs in a table.

    python benchmarks/compare.py yamls/compare.yaml     # trains and probes all methods
    python benchmarks/compare.py yamls/table.yaml       # collects the results of finished runs

An interrupted comparison continues when the same command is given again.
"""

import atexit
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context, parent_process, set_start_method
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from composer.utils import dist, reproducibility
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stages are not a package

from evaluation.probes import measure_probe
from finetune import FinetuneConfig, complete_sizes
from finetune import main as run_finetune
from model import Encoder
from pretrain import PretrainConfig
from pretrain import main as run_pretrain
from shards.format import read_json
from shards.storage import Storage, write_file, write_picture
from shards.workers import STOPPED
from training.config import RunName, load_config
from training.resume import changed_settings, read_config
from training.run import RunConfig
from training.sizes import ENCODER_SIZES
from training.sources import one_line_errors
from training.weights import LATEST, load_pretrained

STAGES = {
    "pretrain.py": (run_pretrain, PretrainConfig),
    "finetune.py": (run_finetune, FinetuneConfig),
}
LOCK = "runs/comparison.lock"
WARM_UP, TIMED = 10, 70  # steps from whose speed the number of steps is computed
# Every run has no callbacks, one checkpoint at its end, and a warm-up of 7 % of its steps.
OVERRIDES = ["callbacks=null", "checkpoints.interval=1000000ba", "schedule.t_warmup=0.07dur"]


def find_result(run: str, key: str) -> float | None:
    """Return a number of a run's eval.json or result.json; None if the run has not finished."""
    values = {}
    for file in ("eval.json", "result.json"):
        path = Path("runs", run, file)
        if path.exists():
            values |= json.loads(path.read_text())
    return values.get(key, values.get(f"metrics/eval/{key}"))


def table_row(
    *, name: str, runs: dict[str, str], paper: dict[str, float] | None = None
) -> dict[str, str]:
    """Return a row of a table of results, {column: "paper / ours (difference)"}, in %.

    Args:
        name: the pre-training.
        runs: for each column the run of eval.py or finetune.py that has the result, as run_name or
            run_name:key; the key is top1 if none is given.
        paper: the paper's number for each column, in %.
    """
    cells = {"": name}
    for column, source in runs.items():
        run, _, key = source.partition(":")
        ours, theirs = find_result(run, key or "top1"), (paper or {}).get(column)
        published = "-" if theirs is None else f"{theirs:.1f}"
        measured = "not run" if ours is None else f"{100 * ours:.1f}"
        if ours is not None and theirs is not None:
            measured += f" ({100 * ours - theirs:+.1f})"
        cells[column] = f"{published} / {measured}"
    return cells


def write_table(
    *, to: str, rows: Annotated[list[Annotated[dict, table_row]], Field(min_length=1)]
) -> None:
    """Collect finished runs in a Markdown table, and write it to the file `to`."""
    made = [table_row(**row) for row in rows]
    columns = list(dict.fromkeys(column for row in made for column in row))
    titles = [columns[0], *(f"{column}: paper / ours" for column in columns[1:])]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in made]
    write_file(to, ("\n".join(lines) + "\n").encode())


def stage_of(command: list[str]) -> tuple[Callable[[], None], type[RunConfig]]:
    """Return the main function of a command's stage, and the class of its configuration.

    Raises:
        ValueError: the command does not begin with a stage that trains.
    """
    stage = STAGES.get(Path(command[0]).name) if command else None
    if stage is None:
        names = " or ".join(STAGES)
        raise ValueError(f"comparison.methods: {command} must begin with {names}")
    return stage


def config_of(command: list[str]) -> RunConfig:
    """Return the configuration of a command such as [pretrain.py, yamls/demo.yaml, seed=1].

    Raises:
        ValueError: the command does not begin with a stage that trains, or has a mistake.
    """
    _, kind = stage_of(command)
    return kind(**load_config(command[1:], kind))


def new_encoder(command: list[str]) -> Encoder:
    """Return the encoder that a command trains, with random weights."""
    config = config_of(command)
    if isinstance(config, PretrainConfig):
        return config.new_model().encoder
    return config.new_model([1] if config.model_class.head_per_data_set else 1).encoder


def train(run_name: str, command: list[str]) -> dict[str, float]:
    """Return the result of a run, which is started or resumed if it has not finished.

    Raises:
        ValueError: the run was made with other settings; or it fails, with its last line.
    """
    run = Path("runs", run_name)
    words = [*command, f"run_name={run_name}", "trainer.progress_bar=false"]
    config = config_of(words)
    if isinstance(config, FinetuneConfig):
        config = complete_sizes(config)  # as they are in config.yaml
    changed = changed_settings(read_config(run), config.given())
    stored = run / "config.yaml"
    # A resumed run may change its trainer, but a compared run may not.
    if stored.exists() and OmegaConf.load(stored).trainer != config.trainer:
        changed.append("trainer")
    if changed:
        raise ValueError(
            f"{run} was made with other values of {', '.join(changed)}; delete it to make it anew"
        )
    if not (run / "result.json").exists():
        main_of_stage, _ = stage_of(command)
        sys.argv = words
        try:
            main_of_stage()
        except SystemExit as error:
            if error.code == STOPPED:  # by a signal; tasks that are queued here must not start
                os._exit(STOPPED)
            raise ValueError(f"{' '.join(words)} failed: {error}") from error
    return json.loads((run / "result.json").read_text())


def cache_key(checkpoint: str | None, seed: int, model: dict, probe: dict[str, Any]) -> str:
    """Return 16 digits that stand for everything that decides the numbers of a probe."""
    stamps = []
    if checkpoint:
        status = Path(checkpoint).stat()
        stamps = [status.st_size, status.st_mtime_ns]
    data = [read_json(path, "index.json") for path in probe["bank"] + probe["queries"]]
    text = json.dumps([checkpoint, stamps, seed, model, probe, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def probe_encoder(
    run: Path, command: list[str], seed: int, probes: dict[str, dict], checkpoint: str | None
) -> dict[str, float]:
    """Return the results of all probes of an encoder; they are cached in its run directory.

    Args:
        checkpoint: None for random weights.
    """
    result = {}
    for name, probe in probes.items():
        key = cache_key(checkpoint, seed, config_of(command).model, probe)
        cached = run / f"compare-{key}.json"
        if not cached.exists():
            reproducibility.seed_all(seed)
            encoder = new_encoder(command)
            if checkpoint:
                load_pretrained(nn.ModuleDict({"encoder": encoder}), checkpoint)
            run.mkdir(parents=True, exist_ok=True)
            values = measure_probe(encoder.eval(), seed, run, **probe)
            Storage(str(run)).write_json(cached.name, values)
        values = json.loads(cached.read_text())
        result |= {f"{name}, {measure}": value for measure, value in values.items()}
    return result


def measure(
    command: list[str],
    seed: int,
    run: str,
    steps: int | None,
    probes: dict[str, dict],
    finetunings: dict[str, list[str]],
) -> dict[str, float]:
    """Train an encoder for some steps, and return its accuracies by column.

    Args:
        command: see config_of.
        run: run_name of the training.
        steps: None for random weights.
        probes: see probe_encoder.
        finetunings: commands of finetune.py by columns, which start from the encoder.
    """
    checkpoint = None
    if steps:
        train(run, [*command, *OVERRIDES, f"seed={seed}", f"trainer.max_duration={steps}ba"])
        checkpoint = str(Path("runs", run, "checkpoints", LATEST))
    result = probe_encoder(Path("runs", run), command, seed, probes, checkpoint)
    for column, finetuning in finetunings.items():
        arguments = [f"seed={seed}", *encoder_arguments(command, checkpoint)]
        name = f"{run}_{re.sub('[^a-z0-9]+', '_', column.lower())}"
        result[column] = train(name, [*finetuning, *arguments])["metrics/eval/top1"]
    return result


def encoder_arguments(command: list[str], checkpoint: str | None) -> list[str]:
    """Return arguments of finetune.py that choose an encoder; checkpoint None: random weights.

    An encoder that Classifier does not have, such as TubeViT's, is tuned in its method's class.
    """
    with torch.device("meta"):
        encoder = new_encoder(command)
    frames = encoder.num_frames
    arguments = [f"model.num_frames={frames}"] if frames > 1 else []
    if not isinstance(encoder, Encoder):
        config = config_of(command)
        arguments = [f"method={config.method}", f"model={json.dumps(config.model)}"]
    if checkpoint:
        return [f"pretrained={checkpoint}", *arguments]
    for key, value in config_of(command).model.items():
        if key in ENCODER_SIZES:
            arguments.append(f"model.{key}={value}")
    return ["pretrained=null", *arguments]


def end_with_parent() -> None:
    """End this process at once when the process that gave it its task has ended."""
    parent_process().join()
    os._exit(STOPPED)


def enter_process(threads: int) -> None:
    """Prepare a process that trains: few threads, no output, a share of the lock."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    set_start_method("fork", force=True)  # of the workers that read data
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    # The lock is held until the last process has ended, even if the first is killed.
    fcntl.flock(os.open(LOCK, os.O_RDWR), fcntl.LOCK_SH)
    # Only atexit removes the shared memory of the data, and multiprocessing does not call atexit.
    Finalize(None, atexit._run_exitfuncs, exitpriority=0)


@contextmanager
def only_comparison() -> Iterator[None]:
    """Hold the lock of this folder's comparison.

    Raises:
        ValueError: another comparison, or a run that it has left behind, trains in this folder.
    """
    os.makedirs("runs", exist_ok=True)
    with open(LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = "another comparison, or a run that it left behind"
            raise ValueError(f"{LOCK}: held by {holder}; wait, or end it") from error
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def training_processes(jobs: int) -> Iterator[Executor]:
    """Yield an executor of `jobs` processes. Each task has a process of its own.

    Raises:
        ValueError: a signal stops this process.
    """
    # If a process is killed, Python frees its shared memory, with a warning.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    # A server that has imported Composer forks each process, which saves its start.
    server = get_context("forkserver")
    server.set_forkserver_preload(["pretrain", "finetune"])
    threads = max(1, os.cpu_count() // jobs)
    executor = ProcessPoolExecutor(jobs, server, enter_process, (threads,), max_tasks_per_child=1)
    with executor:
        try:
            yield executor
        except SystemExit as stop:  # raised by Composer's handler of SIGINT and SIGTERM
            if stop.code == 128 + signal.SIGTERM:  # SIGINT has reached all processes
                for process in active_children():
                    process.terminate()
            raise ValueError("stopped; run the same command again to continue") from stop
        finally:
            executor.shutdown(cancel_futures=True)


def result_of(task: Future) -> dict[str, float]:
    """Return the result of a task.

    Raises:
        ValueError: its process was killed; or as the task.
    """
    try:
        return task.result()
    except BrokenExecutor as error:
        raise ValueError("a run was killed; run the same command again to continue") from error


def steps_of(methods: dict[str, list[str]], seconds: float, prefix: str) -> dict[str, int]:
    """Return how many steps each method makes in a time, alone on this machine."""
    timed = [f"callbacks={{SpeedMonitor: {{window_size: {TIMED}}}}}"]
    timed += [f"trainer.max_duration={WARM_UP + TIMED}ba"]
    steps = {}
    with training_processes(1) as executor:
        for method, command in methods.items():
            arguments = (f"{prefix}_{method}_speed", [*command, *OVERRIDES, *timed])
            speed = result_of(executor.submit(train, *arguments))["throughput/batches_per_sec"]
            steps[method] = max(1, round(seconds * speed))
    return steps


def check_comparison(
    to: str, methods: dict[str, list[str]], finetune: dict[str, list[str]], planes: list[list[str]]
) -> None:
    """Check the arguments of compare before anything trains.

    Raises:
        ValueError: a command, a pair of columns or the name of the table has a mistake.
    """
    if not Path(to).absolute().parent.is_dir():
        raise ValueError(f"comparison.to={to}: its folder does not exist")
    axes = ["stills, knn", "clips, knn", *finetune]
    for plane in planes:
        if len(plane) != 2 or not set(plane) <= set(axes):
            names = "; ".join(axes)
            raise ValueError(f"comparison.planes: {plane} must be two of the columns {names}")
    with torch.device("meta"):
        for command in methods.values():
            new_encoder(command)
    for column, command in finetune.items():
        if not isinstance(config_of(command), FinetuneConfig):
            raise ValueError(f"comparison.finetune: {column}: {command[0]} must be finetune.py")


def compare(
    *,
    to: str,
    methods: Annotated[dict[RunName, list[str]], Field(min_length=1)],
    seconds: PositiveFloat,
    stills: Annotated[dict, measure_probe],
    clips: Annotated[dict, measure_probe],
    finetune: dict[str, list[str]] | None = None,
    planes: list[list[str]] = (),
    seeds: PositiveInt = 3,
    jobs: PositiveInt = 1,
    prefix: RunName = "compare",
) -> None:
    """Train methods for the same time on this machine; write a table and a picture of the results.

    Args:
        to: file of the table; the picture has its name, with .png.
        methods: the command of each method, without run_name. The encoder of the first is also
            measured with random weights.
        seconds: of training steps, alone on the machine. The number of steps is computed from the
            speed of 70 steps.
        stills, clips: see measure_probe.
        finetune: commands of finetune.py by columns, without run_name; an encoder of clips sees
            stills as clips without motion.
        planes: pairs of columns, of k-NN or fine-tuning, that are drawn against each other in a
            picture named _plane.png.
        seeds: number of runs of each method, for mean and standard deviation.
        jobs: runs at a time, after the speeds are measured; they share the cores.
        prefix: first part of the names of runs. Comparisons with the same prefix share runs of the
            same name.

    Raises:
        ValueError: a command has a mistake; a run fails, or was made with other settings; another
            comparison is running.
    """
    check_comparison(to, methods, finetune or {}, planes)
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    budget = f"{seconds:g} s of training steps each, {seeds} seeds, {cores}"
    probes = {"stills": stills, "clips": clips}
    finished = {}
    with only_comparison():
        steps = steps_of(methods, seconds, prefix)
        first = next(iter(methods.values()))
        rows = {"random weights": (first, f"{prefix}_random", None)}
        for method, command in methods.items():
            rows[method] = (command, f"{prefix}_{method}_{steps[method]}", steps[method])
        with training_processes(jobs) as executor:
            tasks = {}
            for name, (command, run, count) in rows.items():
                arguments = (count, probes, finetune or {})
                tasks[name] = [
                    executor.submit(measure, command, seed, f"{run}_{seed}", *arguments)
                    for seed in range(seeds)
                ]
            for name, of_seeds in tasks.items():
                results = [result_of(task) for task in of_seeds]
                finished[name] = table_values(rows[name][2] or 0, results)
                write_comparison(finished, to, budget, planes)


def table_values(steps: int, results: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the values of a row by column, in %, one for each seed; columns of clips come last."""
    columns = sorted(results[0], key=lambda column: column.startswith("clips"))
    values = {column: [100 * result[column] for result in results] for column in columns}
    return {"steps": [steps]} | values


def write_comparison(
    rows: dict[str, dict[str, list[float]]], to: str, budget: str, planes: list[list[str]]
) -> None:
    """Write means and standard deviations as a table, as bars, and as planes.

    Args:
        rows: values by method and column, one for each seed; the first column is `steps`.
        to: file of the table.
        budget: what every method was given, in words.
        planes: see compare.
    """
    _, *columns = next(iter(rows.values()))
    lines = [f"Accuracy in %, mean ± standard deviation: {budget}.", ""]
    lines += ["| | steps | " + " | ".join(columns) + " |", "| --- " * (2 + len(columns)) + "|"]
    means, deviations = {}, {}
    for method, row in rows.items():
        means[method] = {column: np.mean(row[column]) for column in columns}
        deviations[method] = {column: deviation(row[column]) for column in columns}
        cells = [f"{means[method][key]:.1f} ± {deviations[method][key]:.1f}" for key in columns]
        lines.append("| " + " | ".join([method, f"{row['steps'][0]}", *cells]) + " |")
    write_file(to, ("\n".join(lines) + "\n").encode())
    path = Path(to)
    draw_bars(columns, means, deviations, budget, path.with_suffix(".png"))
    if planes:
        draw_planes(planes, means, deviations, budget, path.with_name(f"{path.stem}_plane.png"))


def deviation(values: list[float]) -> float:
    """Return the standard deviation of a sample, 0 for a single value."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def draw_bars(columns: list[str], means: dict, deviations: dict, title: str, to: Path) -> None:
    """Draw a panel of horizontal bars for each column, at most five side by side."""
    rows = math.ceil(len(columns) / 5)
    across = math.ceil(len(columns) / rows)
    size = (3 * across, rows * (0.4 * len(means) + 1))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False, sharey=True).flatten()
    for axis in axes[len(columns) :]:
        axis.remove()
    for column, axis in zip(columns, axes, strict=False):
        widths = [row[column] for row in means.values()]
        axis.barh(list(means), widths, xerr=[row[column] for row in deviations.values()])
        axis.set(title=column, xlabel="%")
    figure.suptitle(title)
    axes[0].invert_yaxis()  # shared by all panels: the first method on top
    write_picture(to, partial(figure.savefig, dpi=100))


def draw_planes(
    planes: list[list[str]], means: dict, deviations: dict, title: str, to: Path
) -> None:
    """Draw a panel for each pair of columns, in which every method is a numbered point."""
    figure = Figure(figsize=(6 * len(planes) + 2, 5), layout="constrained")
    axes = figure.subplots(1, len(planes), squeeze=False)[0]
    for (across, up), axis in zip(planes, axes, strict=True):
        for number, (method, row) in enumerate(means.items()):
            label, spread = f"{number} {method}", deviations[method]
            place = (row[across], row[up])
            axis.errorbar(*place, spread[up], spread[across], "o", ms=4, lw=0.7, label=label)
            axis.annotate(number, place, (4, 4), textcoords="offset points")
        axis.set(xlabel=f"{across}, %", ylabel=f"{up}, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
    write_picture(to, partial(figure.savefig, dpi=100))


@dataclass(kw_only=True)
class CompareConfig:
    """The keys of yamls/compare.yaml, yamls/table.yaml and yamls/ablations/*.yaml."""

    comparison: Annotated[dict, compare] | None = None
    table: Annotated[dict, write_table] | None = None


def main() -> None:
    with one_line_errors():
        if dist.get_world_size() > 1:
            raise ValueError("starts its runs itself; start it as one process, with python")
        config = CompareConfig(**load_config(sys.argv[1:], CompareConfig))
        if not config.comparison and not config.table:
            raise ValueError("give a block comparison or table")
        if config.table:
            write_table(**config.table)
            print(config.table["to"])
        if config.comparison:
            compare(**config.comparison)
            print(config.comparison["to"])


if __name__ == "__main__":
    main()
