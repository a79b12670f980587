"""Tables: finished runs beside the paper's numbers; methods trained for the same time and probed alike.

    python eval.py yamls/table.yaml                                         # collects results
    python eval.py yamls/compare.yaml                                       # trains and measures what is missing, 55 min

Both are blocks of eval.py, `table` and `comparison`.
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import torch
from composer.utils import dist, reproducibility
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from evaluation.probes import cache_key, measure_probe
from finetune import finetune
from model import Classifier, Encoder, ViCMAE
from pretrain import pretrain
from shards.storage import Storage, write_file, write_picture
from training.checkpoints import LATEST
from training.config import RunName, load_config
from training.run import changed_settings
from training.weights import load_pretrained


def table_row(
    *, name: str, runs: dict[str, str], paper: dict[str, float] | None = None
) -> dict[str, str]:
    """A row of a table of results -> column: paper's / ours (difference), in %.

    Args:
        name: what was pre-trained.
        runs: for each column, the run of eval.py or finetune.py whose result it is, as run_name or run_name:key; the key is
            top1, if none is given.
        paper: for each column, in %.
    """
    cells = {}
    for column, source in runs.items():
        run, _, key = source.partition(":")
        found = [
            Path("runs", run, file)
            for file in ("eval.json", "result.json")
            if Path("runs", run, file).exists()
        ]
        values = dict(chain(*(json.loads(path.read_text()).items() for path in found)))
        ours = values.get(key or "top1", values.get(f"metrics/eval/{key or 'top1'}"))
        theirs = (paper or {}).get(column)
        cells[column] = ("-" if theirs is None else f"{theirs:.1f}") + " / "
        cells[column] += "not run" if ours is None else f"{100 * ours:.1f}"
        if ours is not None and theirs is not None:
            cells[column] += f" ({100 * ours - theirs:+.1f})"
    return {"": name} | cells


def write_table(*, to: str, rows: list[Annotated[dict, table_row]]) -> None:
    """Collect finished runs into a table in Markdown, with what was not run; written to the file `to`.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("table.rows is []: give a row, of a name and runs")
    made = [table_row(**row) for row in rows]
    columns = list(dict.fromkeys(column for row in made for column in row))
    head = [
        "| "
        + " | ".join([columns[0], *(f"{column}: paper / ours" for column in columns[1:])])
        + " |"
    ]
    lines = ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in made]
    text = "\n".join([*head, "| --- " * len(columns) + "|", *lines]) + "\n"
    write_file(to, text.encode())


def config_of(command: list[str]) -> dict[str, Any]:
    """The configuration of a command such as [pretrain.py, yamls/demo.yaml, model.pool=max]; see load_config.

    Raises:
        ValueError: the command is of no stage that trains, or its configuration is wrong.
    """
    stage = (
        {"pretrain.py": pretrain, "finetune.py": finetune}.get(Path(command[0]).name)
        if command
        else None
    )
    if stage is None:
        raise ValueError(
            f"comparison.methods: {command} begins with neither pretrain.py nor finetune.py"
        )
    return load_config(command[1:], stage)


def encoder_of(command: list[str]) -> Encoder:
    """The encoder that a command trains, with random weights."""
    sizes = config_of(command)["model"]
    return (
        ViCMAE(**sizes) if Path(command[0]).name == "pretrain.py" else Classifier(1, **sizes)
    ).encoder


def trained(run_name: str, command: list[str], lock: IO) -> dict[str, float]:
    """The result of a run, which is begun, or gone on with, if it is not finished.

    Args:
        lock: an open file that is locked as long as the run, or this program, is at work.

    Raises:
        ValueError: it was made with other settings; or it fails, with the last line that it printed.
    """
    run, words = (
        Path("runs", run_name),
        [*command, f"run_name={run_name}", "trainer.progress_bar=false"],
    )
    config = config_of(words)
    changed = changed_settings(run, config)
    if (run / "config.yaml").exists() and OmegaConf.load(run / "config.yaml").trainer != config[
        "trainer"
    ]:
        changed.append(
            "trainer"
        )  # which a run that goes on may change, but not one that is compared
    if changed:
        raise ValueError(
            f"{run} was made with another {', '.join(changed)}; delete it, and it is made anew"
        )
    if not (run / "result.json").exists():
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, pass_fds=[lock.fileno()]
        )
        if done.returncode:
            raise ValueError(
                f"{' '.join(words)} failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}"
            )
    return json.loads((run / "result.json").read_text())


def measured(
    run: Path, command: list[str], seed: int, probes: dict[str, dict], checkpoint: str | None
) -> dict[str, float]:
    """What probes make of the encoder of a command, by probe and measure; kept in the folder of its run.

    Args:
        checkpoint: None for random weights.
    """
    result = {}
    for name, block in probes.items():
        digest = cache_key(checkpoint, seed, config_of(command)["model"], block)
        found = run / f"compare-{digest}.json"
        if not found.exists():
            reproducibility.seed_all(seed)
            encoder = encoder_of(command)
            if checkpoint:
                load_pretrained(nn.ModuleDict({"encoder": encoder}), checkpoint)
            run.mkdir(parents=True, exist_ok=True)
            parts = run / f"parts-{digest}"
            values = measure_probe(encoder.eval(), seed, run, parts, **block)
            Storage(str(run)).write_json(found.name, values)
            shutil.rmtree(parts)
        result |= {f"{name}, {key}": value for key, value in json.loads(found.read_text()).items()}
    return result


@contextmanager
def alone() -> Iterator[IO]:
    """A locked file, of which there is one in runs/: two trainings at a time would take each other's share of the machine.

    Raises:
        ValueError: another comparison, or a run that it has left behind, holds it.
    """
    os.makedirs("runs", exist_ok=True)
    with open("runs/comparison.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                "another comparison, or a run that it left behind, is at work here; wait, or end it"
            ) from error
        yield file


def compare(
    *,
    to: str,
    methods: Annotated[dict[RunName, list[str]], Field(min_length=1)],
    seconds: PositiveFloat,
    stills: Annotated[dict, measure_probe],
    clips: Annotated[dict, measure_probe],
    seeds: PositiveInt = 3,
) -> None:
    """Train methods for the same time on this machine, probe their encoders, and write a table and a picture.

    What is finished is not done again: an interrupted comparison goes on where it was. Every run is without callbacks, with
    a checkpoint at its end alone, and warms up for 7 % of its steps.

    Args:
        to: file of the table; the picture has its name, with .png.
        methods: the command of each, without run_name. The encoder of the first is measured untrained, too.
        seconds: of training steps. How many steps that are is measured once, on 40 of each method's.
        stills, clips: see measure_probe.
        seeds: runs of each, of which mean and standard deviation are given.

    Raises:
        ValueError: a command or its configuration is wrong; a run fails, or was made with other settings; another comparison
            is at work in runs/, or this is one of several ranks.
    """
    if dist.get_world_size() > 1:
        raise ValueError(
            "comparison: it launches its runs itself; start it as python eval.py, as one process"
        )
    if not Path(to).absolute().parent.is_dir():
        raise ValueError(f"comparison.to {to}: its folder does not exist")
    with torch.device("meta"):
        for command in methods.values():
            encoder_of(command)
    fast = ["callbacks=null", "checkpoints.interval=1000000ba", "schedule.t_warmup=0.07dur"]
    timed = ["callbacks={SpeedMonitor: {window_size: 20}}", "trainer.max_duration=40ba"]
    budget = f"{seconds:g} s of training steps each, {seeds} seeds, {os.cpu_count()} cores ({platform.machine()})"
    steps, rows, first = {}, {}, next(iter(methods.values()))
    with alone() as lock:
        for (
            method,
            command,
        ) in methods.items():  # all before any training, on a machine that is idle alike
            speed = trained(f"compare_{method}_speed", [*command, *fast, *timed], lock)
            steps[method] = max(1, round(seconds * speed["throughput/batches_per_sec"]))
        for method, command in ({"random weights": []} | methods).items():
            results = []
            for seed in range(seeds):
                run, checkpoint = Path(f"runs/compare_random_{seed}"), None
                if command:
                    run = Path(f"runs/compare_{method}_{steps[method]}_{seed}")
                    checkpoint = str(run / "checkpoints" / LATEST)
                    duration = f"trainer.max_duration={steps[method]}ba"
                    trained(run.name, [*command, *fast, f"seed={seed}", duration], lock)
                results.append(
                    measured(
                        run, command or first, seed, {"stills": stills, "clips": clips}, checkpoint
                    )
                )
            values = {key: [100 * one[key] for one in results] for key in results[0]}
            rows[method] = {"steps": [steps.get(method, 0)]} | values
            write_comparison(rows, to, budget)


def write_comparison(rows: dict[str, dict[str, list[float]]], to: str, budget: str) -> None:
    """Write values by method and column, one for each seed, as a table of means and standard deviations, and as bars.

    The column `steps` comes first, and has one value. `budget` is what every row was given, in words.
    """
    columns = list(next(iter(rows.values())))
    lines = [f"Accuracy in %, mean ± standard deviation: {budget}.", ""]
    lines += ["| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    means, spreads = {}, {}
    for method, row in rows.items():
        means[method] = [np.mean(row[key]) for key in columns]
        spreads[method] = [
            np.std(row[key], ddof=1) if len(row[key]) > 1 else 0.0 for key in columns
        ]
        cells = [
            f"{mean:.1f} ± {spread:.1f}"
            for mean, spread in zip(means[method], spreads[method], strict=True)
        ]
        lines.append("| " + " | ".join([method, f"{row['steps'][0]}", *cells[1:]]) + " |")
    write_file(to, ("\n".join(lines) + "\n").encode())
    figure = Figure(figsize=(3 * len(columns[1:]), 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(1, len(columns[1:]), squeeze=False, sharey=True)[0]
    for number, axis in enumerate(axes, start=1):
        axis.barh(
            list(rows),
            [mean[number] for mean in means.values()],
            xerr=[one[number] for one in spreads.values()],
        )
        axis.set(title=columns[number], xlabel="%")
    figure.suptitle(budget)
    axes[0].invert_yaxis()  # of all, which share it: the first method above
    write_picture(Path(to).with_suffix(".png"), partial(figure.savefig, dpi=100))
