"""The configuration: schemas, plug-in classes, and errors that name key and value."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from composer import Callback, Trainer
from composer.callbacks import LRMonitor, SpeedMonitor
from composer.optim import CosineAnnealingWithWarmupScheduler
from pydantic import Field, PositiveInt

from training.config import (
    Choice,
    Duration,
    Named,
    RunName,
    build_named,
    load_config,
)

ProperFraction = Annotated[float, Field(ge=0, lt=1)]


class Net:
    def __init__(self, depth: PositiveInt = 12, mask_ratio: ProperFraction = 0.5):
        self.depth, self.mask_ratio = depth, mask_ratio


class QueueNet(Net):
    def __init__(self, *, queue_size: PositiveInt = 65536, **net):
        super().__init__(**net)
        self.queue_size = queue_size


class InheritingNet(QueueNet):
    """A class without an __init__ of its own."""


NETS = {"net": Net, "queue": QueueNet, "inheriting": InheritingNet}


class Counter(Callback):
    def __init__(self, folder: str, *, every: PositiveInt = 1):
        self.folder, self.every = folder, every


CALLBACKS = Named((LRMonitor, SpeedMonitor, Counter), Callback)


def stream(
    size: int, *, path: str, proportion: float | None = None, kind: Literal["rgb", "grey"] = "rgb"
) -> None: ...


Streams = list[Annotated[dict, stream]]


def load_streams(*, streams: Streams, extra: Streams | None = None, workers: int = 0) -> None: ...


def save(folder: str, *, interval: Duration = "1ep") -> None: ...


@dataclass(kw_only=True)
class Run:
    run_name: RunName
    seed: int
    checkpoint: str | None = None
    trainer: Annotated[dict, Trainer, "model", "seed"] = field(default_factory=dict)
    schedule: Annotated[dict, CosineAnnealingWithWarmupScheduler] | None = None
    checkpoints: Annotated[dict, save] | None = None
    callbacks: Annotated[dict, CALLBACKS] | None = None


@dataclass(kw_only=True)
class Training(Run):
    data: Annotated[dict, load_streams]
    method: str = "net"
    model: Annotated[dict, Choice("method", NETS, "net")] = field(default_factory=dict)


def as_function(
    *, seed: int, model: Annotated[dict, Net] | None = None, files: list[str] | None = None
) -> None: ...


def error_of(*arguments: str, stage: Callable = Training) -> str:
    with pytest.raises(ValueError) as error:
        load_config(list(arguments), stage)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_config_holds_the_given_keys_and_no_defaults(write):
    assert load_config(["a.yaml"], Training) == {
        "run_name": "x",
        "seed": 0,
        "data": {"streams": [{"path": "a"}]},
        "model": {"depth": 2, "mask_ratio": 0.75},
    }


def test_keyword_only_parameters_of_a_function_are_keys(write):
    write("b.yaml", "seed: '3'\nmodel: {depth: 4}\n")
    assert load_config(["b.yaml"], as_function) == {"seed": 3, "model": {"depth": 4}}
    assert error_of("b.yaml", "run=1", stage=as_function).startswith("run=1: is not a key of")


@pytest.mark.parametrize("value", ["my/photos", "[my/photos]"])
def test_single_text_is_a_list_of_one(write, value):
    write("b.yaml", "seed: 3\n")
    assert load_config(["b.yaml", f"files={value}"], as_function)["files"] == ["my/photos"]
    assert "must be a valid list" in error_of("b.yaml", "files=3", stage=as_function)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask_ratio=1.2", "must be less than 1"),
        ("model.depth=deep", "must be a valid integer"),
        ("model.depth=0", "must be greater than 0"),
        ("model.depth=null", "must be a valid integer"),
        ("model=deep", "must be a block of keys"),
        ("model.detph=3", "is not a key of this block; did you mean depth?"),
        ("modle.depth=3", "modle is not a key of this block; did you mean model?"),
        ("trainer.seed=1", "is not a key of this block"),
        ("trainer.max_duration=3.5ep", "give a whole number of epochs or steps, such as 800ep"),
        ("trainer.max_duration=-1ep", "must be 0 or more"),
        ("trainer.max_duration=100sp", "give a whole number of epochs or steps, such as 800ep"),
        ("checkpoints.interval=1tok", "give a whole number of epochs or steps, such as 800ep"),
        ("trainer.max_duration=[1]", "must be"),
        ("trainer.parallelism_config=3", "must be"),
        ("schedule.t_warmup=soon", "give a whole number of epochs or steps"),
        ("checkpoints.interval=0ep", "must be positive"),
        ("checkpoints.interval=-1ba", "must be positive"),
        ("run_name=a/b", "must match pattern"),
        ("run_name=null", "must be a valid string"),
        ("callbacks.LRMonitr={}", "is not a key of this block; did you mean LRMonitor?"),
        ("callbacks.Counter.evry=2", "is not a key of this block; did you mean every?"),
        ("callbacks.Counter.folder=x", "is not a key of this block; did you mean"),
        ("callbacks=3", "must be a block of keys"),
        ("data.streams=3", "must be a valid list"),
        ("data.streams=[3]", "data.streams[0]=3: must be a block of keys"),
        ("data.streams=[{pth: x}]", "data.streams[0].pth is not a key of this block; did you mean"),
        (
            "data.extra=[{pth: x}]",
            "data.extra[0].pth is not a key of this block; did you mean path",
        ),
        ("data.streams=[{proportion: 1}]", "data.streams[0].path is missing"),
        (
            "data.streams=[{path: x}, {path: y, proportion: z}]",
            "data.streams[1].proportion=z: must be a valid number",
        ),
        ("data.streams=[{path: x, kind: b}]", "data.streams[0].kind=b: must be 'rgb' or 'grey'"),
        ("method=quue", "must be one of net, queue, inheriting; did you mean queue?"),
        ("method=[queue]", "must be one of"),
        ("nonsense", "must be a .yaml file or key=value"),
        ("missing.yaml", "[Errno 2] No such file"),
        ("=3", "is not a key of this block"),
    ],
)
def test_mistake_in_an_argument_is_explained_once(write, override, message):
    error = error_of("a.yaml", override)
    assert error.startswith(f"{override}: {message}")
    key = override.partition("=")[0]
    assert f"{key}=" not in error.removeprefix(override)


def test_unknown_key_is_reported_before_a_missing_key(write):
    write("b.yaml", "run_name: x\nseed: 0\ndat: {}\n")
    assert error_of("b.yaml") == "b.yaml: dat is not a key of this block; did you mean data?"
    write("b.yaml", "run_name: x\nseed: 0\n")
    assert error_of("b.yaml") == "b.yaml: data is missing"


def test_method_chooses_the_keys_of_the_model(write):
    config = load_config(["a.yaml", "method=queue", "model.queue_size=8"], Training)
    assert QueueNet(**config["model"]).queue_size == 8
    assert load_config(["a.yaml", "method=inheriting", "model.queue_size=8"], Training)
    assert "is not a key of this block" in error_of("a.yaml", "model.queue_size=8")
    assert "did you mean queue_size?" in error_of("a.yaml", "method=queue", "model.queue=8")
    assert "must be less than 1" in error_of("a.yaml", "method=queue", "model.mask_ratio=2")
    assert "must be greater than 0" in error_of("a.yaml", "method=queue", "model.queue_size=0")


PLUGIN = """
from composer import Callback
class Mine(Callback):
    def __init__(self, every: int = 1):
        self.every = every
class Other:
    pass
"""


def test_callback_of_ones_own_is_built_from_its_module_and_name(write):
    write("my_module.py", PLUGIN)
    write("b.yaml", "callbacks: {my_module.Mine: {every: 3}, LRMonitor: {}}\n")
    block = load_config(["a.yaml", "b.yaml"], Training)["callbacks"]
    mine, monitor = build_named(CALLBACKS, block)
    assert type(mine).__name__ == "Mine" and mine.every == 3
    assert isinstance(monitor, LRMonitor)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("my_module.Mine: {evry: 3}", "callbacks.my_module.Mine.evry is not a key of this block"),
        ("my_module.Mine: {every: x}", "callbacks.my_module.Mine.every=x: must be a valid integer"),
        ("my_module.Min: {}", "my_module has no such class; did you mean Mine?"),
        ("my_module.Other: {}", "must be a subclass of composer.core.callback.Callback"),
        ("my_lost_module.Mine: {}", "cannot import my_lost_module: No module named"),
        ("my_broken_module.Mine: {}", "cannot import my_broken_module: division by zero"),
        (".Mine: {}", "is not a key of this block"),
        ("3: {}", "is not a key of this block"),
    ],
)
def test_mistake_in_a_class_of_ones_own_is_explained(write, block, message):
    write("my_module.py", PLUGIN)
    write("my_broken_module.py", "1 / 0")
    write("b.yaml", f"callbacks: {{{block}}}\n")
    error = error_of("a.yaml", "b.yaml")
    assert error.startswith("b.yaml: callbacks") and message in error


def test_named_classes_get_the_arguments_that_the_program_supplies():
    block = {"LRMonitor": {}, "Counter": {"every": 5}}
    monitor, counter = build_named(CALLBACKS, block, {Counter: ("runs/x",)})
    assert isinstance(monitor, LRMonitor)
    assert (counter.folder, counter.every) == ("runs/x", 5)
    assert build_named(CALLBACKS, None) == []


@pytest.mark.parametrize("value", ["20240115", "1e3", "on", "[x]", "a: b"])
def test_value_that_is_not_read_as_text_is_answered_with_how_to_quote_it(write, value):
    expected = """put the value in double quotes, and in a shell these in single quotes"""
    error = error_of("a.yaml", f"run_name={value}")
    assert error.startswith(f"run_name={value}: is not read as text; {expected}")
    write("b.yaml", f"run_name: {value}\n" if value != "a: b" else "run_name: {a: b}\n")
    assert expected in error_of("a.yaml", "b.yaml")
    if value.isalnum():
        assert load_config(["a.yaml", f'run_name="{value}"'], Training)["run_name"] == value


def test_null_for_a_value_that_is_needed_is_named(write):
    assert error_of("a.yaml", "run_name=null") == "run_name=null: must be a valid string, not null"
