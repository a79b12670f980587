"""Compare methods that are trained for the same time; collect finished runs in a table.

    python benchmarks/compare.py yamls/compare.yaml     # trains and probes all methods, 55 minutes
    python benchmarks/compare.py yamls/table.yaml       # collects the results of finished runs

An interrupted comparison continues when the same command is given again.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

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
from model import Encoder
from pretrain import PretrainConfig
from shards.format import read_json
from shards.storage import Storage, write_file, write_picture
from training.config import RunName, load_config
from training.run import RunConfig, changed_settings, read_config
from training.sources import one_line_errors
from training.weights import LATEST, load_pretrained

STAGES = {"pretrain.py": PretrainConfig, "finetune.py": FinetuneConfig}


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


def config_of(command: list[str]) -> RunConfig:
    """Return the configuration of a command such as [pretrain.py, yamls/demo.yaml, seed=1].

    Raises:
        ValueError: the command does not begin with a stage that trains, or has a mistake.
    """
    stage = STAGES.get(Path(command[0]).name) if command else None
    if stage is None:
        names = " or ".join(STAGES)
        raise ValueError(f"comparison.methods: {command} must begin with {names}")
    return stage(**load_config(command[1:], stage))


def new_encoder(command: list[str]) -> Encoder:
    """Return the encoder that a command trains, with random weights."""
    config = config_of(command)
    if isinstance(config, PretrainConfig):
        return config.new_model().encoder
    return config.new_model([1] if config.kind.head_per_data_set else 1).encoder


def train(run_name: str, command: list[str], lock: IO) -> dict[str, float]:
    """Return the result of a run, which is started or resumed if it has not finished.

    Args:
        lock: an open, locked file. The run inherits it, so that the lock lasts as long as the run.

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
        argv, pipe = [sys.executable, *words], subprocess.PIPE
        done = subprocess.run(argv, stdout=pipe, stderr=pipe, text=True, pass_fds=[lock.fileno()])
        if done.returncode:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise ValueError(f"{' '.join(words)} failed: {last}")
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


def finetune_encoder(
    run: Path, seed: int, commands: dict[str, list[str]], source: list[str], lock: IO
) -> dict[str, float]:
    """Return the accuracy of an encoder after each fine-tuning, which is a run of its own.

    Args:
        run: the run of the encoder.
        commands: of finetune.py, by the columns of the table.
        source: arguments that choose the weights to start from.
    """
    result = {}
    for column, command in commands.items():
        name = f"{run.name}_{re.sub('[^a-z0-9]+', '_', column.lower())}"
        done = train(name, [*command, *source, f"seed={seed}"], lock)
        result[column] = done["metrics/eval/top1"]
    return result


@contextmanager
def exclusive_lock() -> Iterator[IO]:
    """Hold a lock on this folder's runs: two trainings at once would slow each other.

    Raises:
        ValueError: another comparison, or a run that it has left behind, holds the lock.
    """
    os.makedirs("runs", exist_ok=True)
    with open("runs/comparison.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = "another comparison, or a run that it left behind"
            raise ValueError(f"runs/comparison.lock: held by {holder}; wait, or end it") from error
        yield file


def compare(
    *,
    to: str,
    methods: Annotated[dict[RunName, list[str]], Field(min_length=1)],
    seconds: PositiveFloat,
    stills: Annotated[dict, measure_probe],
    clips: Annotated[dict, measure_probe],
    finetune: dict[str, list[str]] | None = None,
    seeds: PositiveInt = 3,
) -> None:
    """Train methods for the same time on this machine, and compare their encoders.

    Writes a table and a picture.

    Every run has no callbacks, one checkpoint at its end, and a warm-up of 7 % of its steps.

    Args:
        to: file of the table; the picture has its name, with .png.
        methods: the command of each method, without run_name. The encoder of the first is also
            measured with random weights.
        seconds: of training steps. The number of steps is computed from the speed of 40 steps.
        stills, clips: see measure_probe.
        finetune: commands of finetune.py by columns, without run_name; an encoder of clips sees
            stills as clips without motion.
        seeds: number of runs of each method, for mean and standard deviation.

    Raises:
        ValueError: a command has a mistake; a run fails, or was made with other settings; another
            comparison is running.
    """
    if not Path(to).absolute().parent.is_dir():
        raise ValueError(f"comparison.to={to}: its folder does not exist")
    with torch.device("meta"):
        frames = {method: new_encoder(command).num_frames for method, command in methods.items()}
    overrides = ["callbacks=null", "checkpoints.interval=1000000ba", "schedule.t_warmup=0.07dur"]
    timed = ["callbacks={SpeedMonitor: {window_size: 20}}", "trainer.max_duration=40ba"]
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    budget = f"{seconds:g} s of training steps each, {seeds} seeds, {cores}"
    probes = {"stills": stills, "clips": clips}
    steps, rows = {}, {}
    with exclusive_lock() as lock:
        # The speeds of all methods first: the machine is idle alike.
        for method, command in methods.items():
            speed = train(f"compare_{method}_speed", [*command, *overrides, *timed], lock)
            steps[method] = max(1, round(seconds * speed["throughput/batches_per_sec"]))
        for method, command in methods.items():
            random, trained = [], []
            for seed in range(seeds):
                run = Path(f"runs/compare_{method}_{steps[method]}_{seed}")
                duration = f"trainer.max_duration={steps[method]}ba"
                train(run.name, [*command, *overrides, f"seed={seed}", duration], lock)
                checkpoint = str(run / "checkpoints" / LATEST)
                source = [f"pretrained={checkpoint}"]
                if frames[method] > 1:
                    source.append(f"model.num_frames={frames[method]}")
                tuned = finetune_encoder(run, seed, finetune or {}, source, lock)
                trained.append(probe_encoder(run, command, seed, probes, checkpoint) | tuned)
                if not rows:
                    run = Path(f"runs/compare_random_{seed}")
                    source.append("random_weights=true")
                    tuned = finetune_encoder(run, seed, finetune or {}, source, lock)
                    random.append(probe_encoder(run, command, seed, probes, None) | tuned)
            if not rows:
                rows["random weights"] = table_values(0, random)
            rows[method] = table_values(steps[method], trained)
            write_comparison(rows, to, budget)


def table_values(steps: int, results: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the values of a row by column, in %, one for each seed."""
    values = {key: [100 * result[key] for result in results] for key in results[0]}
    return {"steps": [steps]} | values


def write_comparison(rows: dict[str, dict[str, list[float]]], to: str, budget: str) -> None:
    """Write means and standard deviations as a table and as bars.

    Args:
        rows: values by method and column, one for each seed; the first column is `steps`.
        to: file of the table.
        budget: what every method was given, in words.
    """
    columns = list(next(iter(rows.values())))
    lines = [f"Accuracy in %, mean ± standard deviation: {budget}.", ""]
    lines += ["| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    means, deviations = {}, {}
    for method, row in rows.items():
        means[method] = [np.mean(row[column]) for column in columns]
        several = len(row[columns[-1]]) > 1
        deviations[method] = [np.std(row[key], ddof=1) if several else 0.0 for key in columns[1:]]
        pairs = zip(means[method][1:], deviations[method], strict=True)
        cells = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in pairs]
        lines.append("| " + " | ".join([method, f"{row['steps'][0]}", *cells]) + " |")
    write_file(to, ("\n".join(lines) + "\n").encode())
    draw_bars(columns[1:], means, deviations, budget, Path(to).with_suffix(".png"))


def draw_bars(columns: list[str], means: dict, deviations: dict, title: str, to: Path) -> None:
    """Draw a panel of horizontal bars for each column."""
    figure = Figure(figsize=(3 * len(columns), 0.4 * len(means) + 1), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for number, axis in enumerate(axes):
        widths = [values[number + 1] for values in means.values()]  # after the column `steps`
        errors = [values[number] for values in deviations.values()]
        axis.barh(list(means), widths, xerr=errors)
        axis.set(title=columns[number], xlabel="%")
    figure.suptitle(title)
    axes[0].invert_yaxis()  # shared by all panels: the first method on top
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
