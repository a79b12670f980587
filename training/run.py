"""The blocks that all trainings share, and a run from its first line to result.json.

    run = start_run(config)                       # join the ranks, seed, compare the settings
    trainer = build_trainer(run, config, model, optimizer, loader, micro_size)
    fit(trainer)
    result = finish_run(run, {})                  # loss.png, result.json

Everything of a run is in its run directory, runs/{run_name}/.
"""

import errno
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from composer import Algorithm, Callback, Evaluator, Event, State, Trainer
from composer.algorithms import EMA
from composer.core import DataSpec, TimeUnit, ensure_time
from composer.loggers import LoggerDestination
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.trainer.trainer import get_device
from composer.utils import collect_env, dist, reproducibility
from omegaconf import OmegaConf
from torch import nn

from evaluation.online import OnlineProbe
from evaluation.pictures import draw_curves
from evaluation.probes import KNN
from evaluation.ranks import on_rank_0
from shards.format import TooManyUnreadable
from shards.loader import samples_in
from shards.storage import Storage
from shards.stream import TrainingData
from shards.workers import STOPPED, exit_on_signals
from training.announce import print_once, say_if_slow
from training.checkpoints import Checkpoints
from training.config import RunName, build_named
from training.copies import CopyingUnfinished
from training.fsdp import GlooGradientMean, OneReduction, fsdp_config
from training.logs import GradientNorm, JsonLines
from training.peers import is_connection_lost, peer_watch
from training.plugins import ALGORITHMS, CALLBACKS, LOGGERS, place_files
from training.precision import BFloat16OnCPU, forbid_tf32
from training.progress import Progress
from training.resume import check_data_sets, compare_with_run
from training.sources import exit_with, one_line
from training.spot import SpotNotice

TrainerBlock = Annotated[  # Composer's Trainer, without the arguments that build_trainer gives
    dict,
    Trainer,
    "model",
    "optimizers",
    "schedulers",
    "train_dataloader",
    "eval_dataloader",
    "device_train_microbatch_size",
    "seed",
    "run_name",
    "algorithms",
    "callbacks",
    "loggers",
    "save_*",
    "load_*",
    "autoresume*",
]


@dataclass(kw_only=True)
class RunConfig:
    """The blocks that the YAML files of every training share."""

    run_name: RunName
    seed: int
    data: Annotated[dict, TrainingData]
    schedule: Annotated[dict, CosineAnnealingWithWarmupScheduler]
    trainer: TrainerBlock
    checkpoints: Annotated[dict, Checkpoints] | None = None
    algorithms: Annotated[dict, ALGORITHMS] | None = None
    callbacks: Annotated[dict, CALLBACKS] | None = None
    loggers: Annotated[dict, LOGGERS] | None = None

    def __post_init__(self):
        max_duration = self.trainer.get("max_duration")
        if not max_duration or ensure_time(max_duration, "ep").value <= 0:
            raise ValueError("trainer.max_duration: give a positive duration such as 800ep")
        if ensure_time(max_duration, "ep").unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
            expected = "must be in epochs (ep) or steps (ba)"
            raise ValueError(f"trainer.max_duration={max_duration}: {expected}")

    @property
    def logs_speed(self) -> bool:
        """Return whether SpeedMonitor logs utilisation, which needs a count of operations."""
        return "SpeedMonitor" in (self.callbacks or {})

    @property
    def training_paths(self) -> list[str]:
        return [stream["path"] for stream in self.data["streams"]]

    @property
    def data_sets(self) -> list[str]:
        """Return the paths of all data sets that the run trains or is measured on."""
        knn = (self.callbacks or {}).get("KNN", {})
        measured = [*knn.get("bank", ()), *knn.get("queries", ())]
        return [*self.training_paths, *getattr(self, "eval_data", {}).get("paths", ()), *measured]

    def given(self) -> dict[str, Any]:
        """Return the blocks that are not null, as they are stored in config.yaml."""
        return {name: block for name, block in asdict(self).items() if block is not None}


# Composer names the processor in each Trainer and checkpoint. py-cpuinfo, which finds the name,
# starts processes and takes a second or more each time, and there is no option against it.
collect_env.get_cpu_model = platform.processor

IGNORED_IN_SHARDS = ["state/callbacks", "state/model/_extra_state"]


def start_run(config: RunConfig) -> Path:
    """Start a run and return its directory; exit with 0 if the run is finished.

    Joins the process group and seeds. Must come before any StreamingDataset, which would make a
    process group of its own.

    Raises:
        ValueError: the run directory holds a run with other settings.
    """
    stop_signals = (config.checkpoints or {}).get("stop_signals", ())
    exit_on_signals(signal.Signals[name] for name in stop_signals)
    peer_watch().start()
    join_ranks(config.trainer.get("device"), config.trainer.get("dist_timeout", 300.0))
    exit_on_signals()  # again, since join_ranks has restored the defaults
    peer_watch().report_errors()
    reproducibility.seed_all(config.seed)  # the same initial weights on every rank
    run = Path("runs", config.run_name)
    # Other machines may have other run directories.
    if on_rank_0(partial(compare_with_run, run, config.given())):
        remedy = "raise trainer.max_duration to continue, or choose another run_name"
        print_once(f"{run} is finished, see {run}/result.json; {remedy}")
        peer_watch().leave()
        sys.exit(0)
    return run


@say_if_slow("waiting for all ranks to start")
def join_ranks(device: str | None, timeout: float) -> None:
    """Join the process group; exit with STOPPED if other ranks do not come, as a machine is lost.

    Args:
        device: of Composer's Trainer.
        timeout: seconds to wait for the others, here and in each collective.
    """
    # The launcher sends SIGTERM if another rank fails for good; STOPPED would start it again.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    problem = f"rank 0 has not started within {timeout:g} s"
    # init_process_group would wait for rank 0 for twice the timeout.
    if peer_watch().rank_0_is_there(timeout):
        try:
            dist.initialize_dist(get_device(device), timeout)
            return
        except RuntimeError as error:
            if not is_connection_lost(error):
                raise
            problem = f"the other ranks have not joined ({one_line(error)[:200]})"
    print(f"{problem}; run the same command again", file=sys.stderr, flush=True)
    os._exit(STOPPED)


def trainer_settings(config: RunConfig, model: nn.Module) -> tuple[dict[str, Any], list[Callback]]:
    """Return the block `trainer` for Composer, and the callbacks that it needs.

    Raises:
        ValueError: FSDP settings that are refused.
    """
    settings, callbacks = dict(config.trainer), []
    if fsdp := fsdp_config(config.trainer, config.algorithms or {}, model):
        settings["parallelism_config"] = {"fsdp": fsdp}
        callbacks.append(OneReduction())
    on_cpu = get_device(settings.get("device")).name == "cpu"
    if on_cpu and settings.get("precision") == "amp_bf16":
        settings["precision"] = "fp32"  # Composer refuses amp_bf16 on the CPU
        callbacks.append(BFloat16OnCPU())
    return settings, callbacks


def chosen_algorithms(config: RunConfig, model: nn.Module) -> list[Algorithm]:
    """Return the algorithms of a config, of the method, and of every run."""
    own = model.algorithms() if hasattr(model, "algorithms") else []
    # Composer runs them in reverse order after a step: mean, norm, then clipping.
    return [*build_named(ALGORITHMS, config.algorithms), *own, GradientNorm(), GlooGradientMean()]


def chosen_callbacks(config: RunConfig, run: Path, checkpoints: Checkpoints) -> list[Callback]:
    """Return the callbacks of a config, and the checkpoints."""
    # KNN calls this between batches, so that a stop signal does not wait for the measurement.
    given = {
        KNN: (checkpoints.save_and_exit_if_stopped,),
        SpotNotice: (checkpoints.request_stop,),
        OnlineProbe: (config.training_paths,),
    }
    return [*build_named(CALLBACKS, place_files(config.callbacks, run), given), checkpoints]


def chosen_loggers(config: RunConfig, run: Path) -> list[LoggerDestination]:
    """Return the loggers of a config, and of every run."""
    # Composer's bar is one for each epoch, with a block of settings before it.
    shown = [] if config.trainer.get("progress_bar") else [Progress()]
    named = build_named(LOGGERS, place_files(config.loggers, run))
    return [JsonLines(run / "metrics.jsonl"), *shown, *named]


@contextmanager
def errors_of_blocks() -> Iterator[None]:
    """Raise what Composer and the named classes raise, which is nearly anything, as ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if is_connection_lost(error):
            raise
        blocks = "trainer, algorithms, callbacks or loggers"
        raise ValueError(f"{blocks}: {type(error).__name__}: {error}") from error


@say_if_slow("building the trainer, and loading its newest checkpoint")
def build_trainer(
    run: Path,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataSpec,
    micro_size: int,
    evaluator: Evaluator | None = None,
    flops_per_sample: float = 0.0,
) -> Trainer:
    """Return Composer's Trainer for the blocks of a config. It resumes from the newest checkpoint.

    Args:
        micro_size: samples of a micro-batch on this rank.
        flops_per_sample: operations of a step per sample, for SpeedMonitor; 0 if not counted.

    Raises:
        ValueError: no intact checkpoint although there are some; settings that are refused.
    """
    data_sets = on_rank_0(partial(check_data_sets, run, config.data_sets))
    settings, callbacks = trainer_settings(config, model)
    checkpoints = Checkpoints(run, **config.checkpoints or {})
    fsdp = (settings.get("parallelism_config") or {}).get("fsdp")
    checkpoints.check_shared_folder(bool(fsdp) and fsdp.state_dict_type == "sharded")
    newest = checkpoints.newest()
    if flops_per_sample:  # SpeedMonitor calls this method, which Composer leaves to the user.
        model.flops_per_batch = lambda batch: flops_per_sample * samples_in(batch)
    run.mkdir(parents=True, exist_ok=True)  # Weights & Biases does not make it.
    with errors_of_blocks():
        trainer = Trainer(
            **{"progress_bar": False} | settings,
            run_name=run.name,
            load_path=str(newest) if newest else None,
            # In sharded checkpoints, Composer looks for the state of every callback of this start,
            # and for the class names, which earlier versions did not save.
            load_ignore_keys=IGNORED_IN_SHARDS if newest and newest.is_dir() else None,
            seed=config.seed,
            model=model,
            optimizers=optimizer,
            schedulers=CosineAnnealingWithWarmupScheduler(**config.schedule),
            train_dataloader=loader,
            eval_dataloader=evaluator,
            device_train_microbatch_size=micro_size,
            algorithms=chosen_algorithms(config, model),
            callbacks=[*chosen_callbacks(config, run, checkpoints), *callbacks],
            loggers=chosen_loggers(config, run),
        )
    forbid_tf32()
    rename_averages(trainer.state)
    if flops_per_sample and trainer.state.timestamp.batch == 0:
        trainer.logger.log_metrics({"flops_per_sample": flops_per_sample})
    if dist.get_global_rank() == 0:
        write_settings(run, config, data_sets)
    return trainer


def write_settings(run: Path, config: RunConfig, data_sets: dict[str, dict]) -> None:
    """Write config.yaml and data_sets.json, with which the next launch is compared.

    If the duration of a finished run was raised, its result is deleted: it is no longer finished.
    """
    result = run / "result.json"
    if result.exists():
        result.unlink()
        print(f"{run} was finished, and continues to {config.trainer['max_duration']}")
    text = OmegaConf.to_yaml(OmegaConf.create(config.given()))
    Storage(str(run)).write("config.yaml", text.encode())
    Storage(str(run)).write_json("data_sets.json", data_sets)


def rename_averages(state: State) -> None:
    """Give EMA's averages the names of the weights.

    DDP adds a prefix to the names of weights, and EMA ignores averages whose names it does not
    know. Without this, the averages of a run were lost when the number of ranks changed to or from
    1.
    """
    prefix = "module." if hasattr(state.model, "module") else ""
    averaged = [algorithm for algorithm in state.algorithms if isinstance(algorithm, EMA)]
    for algorithm in averaged:
        for kind in ("named_parameters_dict", "named_buffers_dict"):
            named = getattr(algorithm.ema_model, kind).items()
            renamed = {prefix + name.removeprefix("module."): value for name, value in named}
            setattr(algorithm.ema_model, kind, renamed)


@contextmanager
def exit_if_disk_full() -> Iterator[None]:
    """End the program with one line if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free some space, and run the same command again to resume"
        sys.exit(f"{error.filename or 'a disk'}: {error.strerror}; {remedy}")


@exit_if_disk_full()
def fit(trainer: Trainer) -> None:
    """Train, then leave the other ranks; exit with one line if too many samples are unreadable."""
    try:
        train(trainer)
        dist.barrier()
    except SystemExit as end:
        if end.code == STOPPED:
            peer_watch().leave()
        if isinstance(end, CopyingUnfinished):
            trainer.engine.close()  # the loggers
            os._exit(STOPPED)  # Python's own exit would wait for the copies.
        raise
    except TooManyUnreadable as error:
        exit_with(error)
    peer_watch().leave()


def train(trainer: Trainer) -> None:
    """Train, or run just the final evaluation if only that was interrupted.

    A checkpoint that is being written is completed, also if the training ends with an error.
    """
    try:
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
            return
        trainer.engine.run_event(Event.FIT_START)
        if trainer.state.evaluators:
            trainer.eval()
        trainer.engine.run_event(Event.FIT_END)
    finally:
        for callback in trainer.state.callbacks:
            if isinstance(callback, Checkpoints):
                callback.writer.wait()


@exit_if_disk_full()
def finish_run(run: Path, extra: dict[str, float]) -> dict[str, float]:
    """Write result.json, which marks the run as finished, and draw loss.png.

    Args:
        extra: results that were not logged.

    Returns:
        The content of result.json: the last value of everything logged, and `extra`.
    """
    log = run / "metrics.jsonl"
    # The log is missing if only the checkpoints of a finished training came back from a bucket.
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    result = {key: value for line in lines for key, value in line.items()} | extra
    Storage(str(run)).write_json("result.json", result)
    draw_curves(lines, run / "loss.png")
    return result
