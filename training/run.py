"""training/run.py."""

import inspect
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from composer import Event, Logger, State, Trainer
from composer.algorithms import EMA
from composer.core import DataSpec, ensure_time
from composer.loggers import LoggerDestination
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.trainer.trainer import get_device
from composer.utils import dist, reproducibility
from composer.utils.parallelism import FSDP2Config
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import NonNegativeFloat, PositiveFloat
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from yaml import YAMLError

from evaluation.pictures import draw_losses
from shards.storage import Storage
from shards.views import UnitInterval
from training.checkpoints import Checkpoints, check_shapes
from training.speedups import ALGORITHMS, CALLBACKS, LOGGERS, GradientNorm, MomentumStep


def decisive(config: dict[str, Any]) -> dict[str, Any]:
    """{block.key: value} of what decides a run's result."""
    parts = {
        name: part
        for name, part in config.items()
        if name not in ("trainer", "callbacks", "loggers", "checkpoints")
    }
    keys = {
        f"{name}.{key}": value
        for name, part in parts.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    plain = {name: part for name, part in parts.items() if not isinstance(part, dict)}
    return {
        key: value
        for key, value in (keys | plain).items()
        if key not in ("data.num_workers", "allow_changes")
    }


def changed_settings(run: Path, config: dict[str, Any]) -> list[str]:
    """The block.key of what decides a run's result that are another in `config` than when the run was begun.

    Raises:
        ValueError: the run's config.yaml is damaged.
    """
    if not (run / "config.yaml").exists():
        return []
    try:
        before = decisive(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    except (YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise ValueError(
            f"{run / 'config.yaml'} is damaged; delete it, if you know that the run is this one's"
        ) from error
    now = decisive(json.loads(json.dumps(config)))  # lists for tuples, as in the file
    return sorted(key for key in before | now if before.get(key) != now.get(key))


def build_optimizer(
    model: nn.Module,
    global_train_batch_size: int,
    *,
    base_lr: PositiveFloat,
    betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.95),
    weight_decay: NonNegativeFloat = 0.05,
    layer_decay: PositiveFloat | None = None,
) -> torch.optim.AdamW:
    """AdamW with no decay on biases, norms and other 1-D parameters.

    Args:
        base_lr: for 256 samples; lr = base_lr * batch / 256.
        layer_decay: lr of a layer relative to the next (source: BEiT, as timm has it); None for one lr.
    """
    lr = base_lr * global_train_batch_size / 256
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay)
    else:
        no_decay = ("*pos_embed", "*cls_token", "*temporal_embed")
        groups = param_groups_layer_decay(model, weight_decay, no_decay, layer_decay=layer_decay)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale", 1.0)
    grouped = sorted(id(parameter) for group in groups for parameter in group["params"])
    trainable = sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert grouped == trainable, "the groups must hold every trainable parameter exactly once"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


class JsonLines(LoggerDestination):
    """One JSON object a step in a file: whatever was logged during it, with `step` and `epoch`."""

    def __init__(self, path: Path):
        self.path = path
        self.line: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """After a resume, drop what was logged beyond the checkpoint: it will be logged again."""
        if self.path.exists() and dist.get_global_rank() == 0:
            lines = self.path.read_text().splitlines(keepends=True)
            aside = self.path.with_suffix(".tmp")
            whole = (line for line in lines if line.endswith("\n"))
            aside.write_text(
                "".join(
                    line
                    for line in whole
                    if json.loads(line)["step"] <= state.timestamp.batch.value
                )
            )
            aside.replace(self.path)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.line |= {key: float(value) for key, value in metrics.items()}

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.line and dist.get_global_rank() == 0:
            line = {
                "step": state.timestamp.batch.value,
                "epoch": state.timestamp.epoch.value,
            } | self.line
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.line = {}

    epoch_end = eval_end = fit_end = batch_end


def start_run(config: dict[str, Any]) -> Path:
    """Join the process group, seed, and give the run's folder; exits with 0 if the run is finished already.

    Comes before any StreamingDataset is made: Streaming would else make a process group of its own.

    Raises:
        ValueError: the folder holds a run of another configuration (the trainer, loggers, callbacks, checkpoints and workers
            may change).
    """
    before = signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # Composer's handler would wait as long as this does
    dist.initialize_dist(
        get_device(config["trainer"].get("device")), config["trainer"].get("dist_timeout", 300.0)
    )
    signal.signal(signal.SIGTERM, before)
    reproducibility.seed_all(config["seed"])  # the same initial weights on every rank
    run, found = Path("runs", config["run_name"]), [[], False]
    if dist.get_global_rank() == 0:
        found = [changed_settings(run, config), (run / "result.json").exists()]
    dist.broadcast_object_list(found)  # other machines may have other folders
    changed, finished = found
    if changed and not config["allow_changes"]:
        raise ValueError(
            f"{run} was begun with another {', '.join(changed)}; give another run_name, delete it, or allow_changes=true"
        )
    if finished:
        if dist.get_global_rank() == 0:
            print(
                f"{run} is finished, see {run}/result.json; delete it or give another run_name to run again"
            )
        sys.exit(0)
    return run


TrainerBlock = Annotated[  # Composer's Trainer without what build_trainer gives
    dict,
    Trainer,
    *(
        "model",
        "optimizers",
        "schedulers",
        "train_dataloader",
        "eval_dataloader",
        "device_train_microbatch_size",
    ),
    *("seed", "run_name", "algorithms", "callbacks", "loggers"),
    *(
        name
        for name in inspect.signature(Trainer).parameters
        if name.startswith(("save_", "load_", "autoresume"))
    ),
]


def build_named(classes: tuple[type, ...], block: dict[str, dict] | None) -> list:
    """Objects of the classes named in a block, with their arguments."""
    return [
        made(**block[made.__name__] or {}) for made in classes if made.__name__ in (block or {})
    ]


def trainer_settings(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The block `trainer` as Composer's Trainer takes it.

    Raises:
        ValueError: no max_duration, an unknown key, or something that FSDP cannot do.
    """
    settings = config["trainer"]
    if not settings.get("max_duration") or ensure_time(settings["max_duration"], "ep").value == 0:
        raise ValueError("trainer.max_duration is missing; give a duration such as 800ep")
    if unknown := (settings.get("parallelism_config") or {}).keys() - {"fsdp"}:
        raise ValueError(
            f"trainer.parallelism_config.{min(unknown)} is not a key here; the key is fsdp"
        )
    if fsdp := (settings.get("parallelism_config") or {}).get("fsdp"):
        if "EMA" in (
            config["algorithms"] or {}
        ):  # Composer keeps each rank's share of the averages, but writes the first's
            raise ValueError(
                "algorithms.EMA cannot be resumed with trainer.parallelism_config.fsdp; take one of the two out"
            )
        if getattr(model, "contrast", None) == "moco":
            raise ValueError(
                "model.contrast moco does not work with trainer.parallelism_config.fsdp; take one of the two out"
            )
        try:
            settings = settings | {"parallelism_config": {"fsdp": FSDP2Config(**fsdp)}}
        except TypeError as error:
            raise ValueError(f"trainer.parallelism_config.fsdp: {error}") from error
    if settings.get("precision") == "amp_bf16" and get_device(settings.get("device")).name == "cpu":
        settings = settings | {"precision": "fp32"}  # Composer's is for GPUs alone
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return settings


def build_trainer(
    run: Path,
    config: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataSpec,
    micro_size: int,
    eval_dataloader: DataSpec | None = None,
) -> Trainer:
    """Composer's Trainer with the blocks of a stage's config. It goes on from the newest checkpoint of the run.

    Raises:
        ValueError: see trainer_settings; no checkpoint of those there is whole, or fits the model; what Composer refuses, or
            a class that a block names.
    """
    settings = trainer_settings(config, model)
    checkpoints = Checkpoints(run, **config["checkpoints"] or {})
    newest = checkpoints.newest()
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    if newest and config["allow_changes"]:
        check_shapes(newest, model)
    try:
        built = Trainer(
            **settings,
            run_name=run.name,
            load_path=str(newest) if newest else None,
            # Of shards, Composer wants whatever the callbacks of now would save; none of theirs has a say in the training.
            load_ignore_keys=["state/callbacks"] if newest and newest.is_dir() else None,
            seed=config["seed"],
            model=model,
            optimizers=optimizer,
            schedulers=CosineAnnealingWithWarmupScheduler(**config["schedule"]),
            train_dataloader=loader,
            eval_dataloader=eval_dataloader,
            device_train_microbatch_size=micro_size,
            # Composer turns the order about on after-events: the gradient is mended, its norm taken, and then it is clipped.
            algorithms=[
                *build_named(ALGORITHMS, config["algorithms"]),
                MomentumStep(),
                GradientNorm(),
            ],
            callbacks=[*build_named(CALLBACKS, config["callbacks"]), checkpoints],
            loggers=[JsonLines(run / "metrics.jsonl"), *build_named(LOGGERS, config["loggers"])],
        )
    except ValueError:
        raise
    except Exception as error:  # the classes that are named here raise anything
        raise ValueError(
            f"trainer, algorithms, callbacks or loggers: {type(error).__name__}: {error}"
        ) from error
    rename_averages(built.state)
    if newest and config["allow_changes"]:
        take_settings(built.state, groups)
    if dist.get_global_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        Storage(str(run)).write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
    return built


def rename_averages(state: State) -> None:
    """Give EMA's averages the names of the weights, which DDP changes: it passes over those that it does not know."""
    prefix = "module." if hasattr(state.model, "module") else ""
    for one in state.algorithms:
        for kind in ("named_parameters_dict", "named_buffers_dict") if isinstance(one, EMA) else ():
            named = getattr(one.ema_model, kind).items()
            setattr(
                one.ema_model,
                kind,
                {prefix + name.removeprefix("module."): value for name, value in named},
            )


def take_settings(state: State, groups: list[dict[str, Any]]) -> None:
    """Put the settings of an optimiser's groups in the place of those that a checkpoint has brought back."""
    for number, (group, wanted) in enumerate(
        zip(state.optimizers[0].param_groups, groups, strict=True)
    ):
        scheduled = group["lr"] / group["initial_lr"]
        group.update(wanted | {"lr": wanted["lr"] * scheduled, "initial_lr": wanted["lr"]})
        state.schedulers[0].base_lrs[number] = wanted["lr"]


def fit(trainer: Trainer) -> None:
    """Train; where a run was ended between its last step and its end, do what stands there: evaluation and k-NN."""
    if trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()
        return
    trainer.engine.run_event(Event.FIT_START)
    if trainer.state.evaluators:
        trainer.eval()
    trainer.engine.run_event(Event.FIT_END)


def finish_run(run: Path, extra: dict[str, float]) -> dict[str, float]:
    """Draw loss.png; write result.json, the last value of everything logged and `extra`, which marks the run as finished."""
    log = (
        run / "metrics.jsonl"
    )  # which may be lost, where a finished training's checkpoint came back from a bucket
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    draw_losses(lines, run / "loss.png")
    result = {key: value for line in lines for key, value in line.items()} | extra
    Storage(str(run)).write_json("result.json", result)
    return result
