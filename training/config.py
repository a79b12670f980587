"""Turn YAML files and key=value arguments into the checked keyword arguments of a stage.

    config = load_config(["yamls/demo.yaml", "model.depth=6"], PretrainConfig)
    config["model"]                                         # {"depth": 6, ...}, for ViCMAE(**...)

The keyword-only parameters of a stage, or the fields of a dataclass, are the keys of its YAML
files. A key with the type Annotated[dict, X] is a block of YAML with the keyword arguments of X:

    model: Annotated[dict, ViCMAE]                          # the arguments of ViCMAE
    trainer: Annotated[dict, Trainer, "model", "save_*"]    # all arguments of Trainer but these
    callbacks: Annotated[dict, CALLBACKS]                   # a Named: {KNN: {every: 10}}
    model: Annotated[dict, Choice("method", METHODS, "vicmae")]  # arguments of METHODS[method]
"""

import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

from composer.core import Time, TimeUnit, ensure_time
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from training.sources import (
    OTHER_CLASSES,
    QUOTED,
    ConfigError,
    check_names,
    did_you_mean,
    located,
    merge_sources,
    one_line,
    without_matching,
)


def check_time(value: Any, positive: bool = True, fraction: bool = True) -> Any:
    """Return a duration such as 800ep or 500ba unchanged; a plain number counts epochs.

    Args:
        positive: refuse 0.
        fraction: take a fraction of the training too, such as 0.1dur.
    """
    if not isinstance(value, int | str):
        return value
    expected = "give a whole number of epochs or steps, such as 800ep or 500ba"
    try:
        time = ensure_time(value, "ep")
    except (ValueError, TypeError) as error:
        raise ValueError(expected) from error
    is_fraction = fraction and time.unit == TimeUnit.DURATION
    if not is_fraction and time.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
        raise ValueError(expected)
    if time.value < 0 or (positive and time.value == 0):
        raise ValueError("must be positive" if positive else "must be 0 or more")
    return value


Interval = Annotated[str, AfterValidator(check_time)]
Duration = Annotated[str, AfterValidator(functools.partial(check_time, fraction=False))]
RunName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # the name of a folder in runs/


@dataclass(frozen=True, eq=False)
class Choice:
    """A block of keyword arguments of the callable that another key of the file chooses.

    Args:
        key: a top-level key of the stage, whose value is a name in `table`.
        default: the name if the key is absent.
    """

    key: str
    table: Mapping[str, Callable]
    default: str

    def chosen(self, config: dict[str, Any]) -> Callable:
        """Return the callable that a configuration chooses."""
        name = config.get(self.key) or self.default
        if not isinstance(name, str) or name not in self.table:
            nearest = did_you_mean(name, self.table)
            raise ConfigError([self.key], f"must be one of {', '.join(self.table)}{nearest}", name)
        return self.table[name]


@dataclass(frozen=True, eq=False)
class Named:
    """Blocks of keyword arguments under class names: `{LRMonitor: {}, my_module.Mine: {every: 3}}`.

    null in place of the arguments switches a class off.

    Args:
        classes: may be named without their module.
        base: any subclass of it may be named as module.Class; Python must find the module.
    """

    classes: tuple[type, ...]
    base: type

    def find(self, name: str) -> type:
        """Return the class of a name.

        Raises:
            ValueError: the class is neither of `classes` nor an importable subclass of `base`.
        """
        listed = {known.__name__: known for known in self.classes}
        module_name, _, class_name = name.rpartition(".")
        if not module_name:
            if name not in listed:
                nearest = did_you_mean(name, listed)
                raise ValueError(f"is not a key of this block{nearest}{OTHER_CLASSES}")
            return listed[name]
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the user's module may raise anything
            raise ValueError(f"cannot import {module_name}: {one_line(error)}") from error
        member = getattr(module, class_name, None)
        if not inspect.isclass(member):
            names = [name for name, value in vars(module).items() if inspect.isclass(value)]
            raise ValueError(f"{module_name} has no such class{did_you_mean(class_name, names)}")
        if not issubclass(member, self.base):
            raise ValueError(f"must be a subclass of {self.base.__module__}.{self.base.__name__}")
        return member


def build_named(
    named: Named, block: dict[str, dict] | None, given: Mapping[type, tuple] | None = None
) -> list:
    """Return the objects of the classes that a block names, in its order.

    Args:
        block: keyword arguments by class name.
        given: positional arguments that the program supplies, by class.
    """
    objects = []
    for name, arguments in (block or {}).items():
        kind = named.find(name)
        supplied = (given or {}).get(kind, ())
        objects.append(kind(*supplied, **arguments))
    return objects


def load_config(arguments: list[str], stage: Callable) -> dict[str, Any]:
    """Merge YAML files left to right, then key=value, and check them against a stage's signature.

    Returns:
        The keys that were given, without defaults: the keyword arguments of `stage`.

    Raises:
        ValueError: a file is missing or not YAML; a key is unknown, missing or has a wrong value.
            One line names the file or argument and the key.
    """
    merged, sources = merge_sources(arguments)
    try:
        return convert_block(merged, stage, [], merged)
    except ConfigError as error:
        raise ValueError(located(error, sources)) from error


def convert_block(
    block: dict, target: Callable, path: list, config: dict[str, Any], omitted: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return a block with its values converted to the types that a callable takes.

    Args:
        path: keys and list indices that lead to the block.
        config: the merged configuration, in which Choice looks up its key.
        omitted: parameters that the program supplies, or patterns of their names.
    """
    keywords = without_matching(keywords_of(target), omitted)
    check_names(block, keywords, path)  # first of all: a mistyped key explains a missing one
    converted = {}
    for name, value in block.items():
        converted[name] = convert(value, keywords[name][0], [*path, name], config)
    for name, (_, default) in keywords.items():
        if name not in block and default is inspect.Parameter.empty:
            raise ConfigError([*path, name], "is missing")
    return converted


def convert(value: Any, hint: Any, path: list, config: dict[str, Any]) -> Any:
    """Return a value converted to a type hint, which may be or contain a block."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and value is not None:
        others = [member for member in members if member is not type(None)]
        if len(others) == 1:  # the hint is X | None
            return convert(value, others[0], path, config)
    if hint == list[str] and isinstance(value, str):
        value = [value]
    if origin is list and isinstance(value, list):
        items = enumerate(value)
        return [convert(item, members[0], [*path, index], config) for index, item in items]
    if origin is not Annotated or members[0] is not dict:
        return convert_plain(value, hint, path)
    if not isinstance(value, dict):
        raise ConfigError(path, "must be a block of keys", value)
    _, target, *omitted = members
    if isinstance(target, Choice):
        target = target.chosen(config)
    if not isinstance(target, Named):
        return convert_block(value, target, path, config, tuple(omitted))
    converted = {}
    for name, arguments in value.items():
        try:
            kind = target.find(str(name))
        except ValueError as error:
            raise ConfigError([*path, name], str(error), arguments) from error
        if arguments is not None:
            converted[name] = convert(arguments, Annotated[dict, kind], [*path, name], config)
    return converted


def convert_plain(value: Any, hint: Any, path: list) -> Any:
    """Return a value that is not a block, converted by pydantic; errors are put in our words."""
    if value == "":
        raise ConfigError(path, "is empty; give null for none", value)
    if Time in typing.get_args(hint):
        hint = Annotated[hint, AfterValidator(functools.partial(check_time, positive=False))]
    try:
        # In a list, since pydantic accepts no config for a hint that is a dataclass.
        adapter = TypeAdapter(list[hint], config=ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_python([value])[0]
    except ValidationError as error:
        wrong = error.errors()[0]
        keys = value if isinstance(value, dict) else ()
        location = wrong["loc"][1:]  # keys, indices and members of unions
        path = path + [part for part in location if isinstance(part, int) or part in keys]
        if wrong["type"] == "missing":
            raise ConfigError(path, "is missing") from error
        reason = wrong["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
        reason = re.sub(r"^\w+ should ", "must ", reason)
        if value is None:
            reason += ", not null"
        if wrong["type"] == "string_type" and value is not None:
            reason = f"is not read as text; {QUOTED}"
        raise ConfigError(path, reason, wrong["input"]) from error


def keywords_of(target: Callable) -> dict[str, tuple[Any, Any]]:
    """Return type hint and default of a callable's keyword-only arguments; without any, of all.

    An __init__ that takes **keywords is assumed to pass them on to the next class in the method
    resolution order, whose keyword arguments are included.
    """
    functions = [target]
    if inspect.isclass(target) and not is_dataclass(target):
        functions = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    keywords: dict[str, tuple[Any, Any]] = {}
    for function in functions:
        parameters = list(inspect.signature(function).parameters.values())
        if function is not target:
            parameters = parameters[1:]  # without self
        hints = typing.get_type_hints(function, include_extras=True)
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
        keys = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        if not keys and not passes_on:
            keys = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
        for p in keys:
            keywords.setdefault(p.name, (hints.get(p.name, Any), p.default))
        if not passes_on:
            break
    return keywords
