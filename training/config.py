"""Turn YAML files and key=value arguments into the checked keyword arguments of a stage.

    config = load_config(["yamls/demo.yaml", "model.depth=6"], PretrainConfig)
    config["model"]                                         # {"depth": 6, ...}, for ViCMAE(**...)

The stage is the schema: its keyword-only parameters, or the fields of a dataclass, are the keys
of the YAML files. A key annotated Annotated[dict, X] is a block of YAML that becomes the keyword
arguments of X:

    model: Annotated[dict, ViCMAE]                          # the arguments of ViCMAE
    trainer: Annotated[dict, Trainer, "model", "seed"]      # those of Trainer, but for two
    callbacks: Annotated[dict, Named(CALLBACKS, Callback)]  # {KNN: {every: 10}}: of each class
    model: Annotated[dict, Choice("method", METHODS, "vicmae")]  # of METHODS[the key `method`]
"""

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from itertools import takewhile
from typing import Annotated, Any

from composer.core import Time, ensure_time
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from yaml import YAMLError


def check_time(value: Any, positive: bool = True) -> Any:
    """Return a duration such as 800ep, 500ba or 0.1dur unchanged; a plain number counts epochs.

    Raises:
        ValueError: the value is no duration, or negative, or 0 where it must be positive.
    """
    if not isinstance(value, int | str):
        return value
    try:
        length = ensure_time(value, "ep").value
    except (ValueError, TypeError) as error:
        raise ValueError(
            "give a whole number of epochs or steps, such as 800ep or 500ba"
        ) from error
    if positive and length <= 0:
        raise ValueError("must be positive")
    if length < 0:
        raise ValueError("must be 0 or more")
    return value


Duration = Annotated[str, AfterValidator(check_time)]
RunName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # the name of a folder in runs/


class ConfigError(ValueError):
    """A mistake in the configuration, at the end of a path of keys and list indices."""

    def __init__(self, path: list, complaint: str):
        super().__init__(complaint)
        self.path = path


def did_you_mean(name: str, names: list[str]) -> str:
    """Return "; did you mean X?" with the nearest of `names`, or nothing if there are no names."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; did you mean {nearest[0]}?" if nearest else ""


@dataclass(frozen=True, eq=False)
class Choice:
    """A block of keyword arguments of the callable that another key of the file chooses.

    Args:
        key: a top-level key of the stage, whose value is a name in `table`.
        table: callables by name.
        default: the name if the key is absent.
    """

    key: str
    table: Mapping[str, Callable]
    default: str

    def chosen(self, config: dict[str, Any]) -> Callable:
        """Return the callable that a configuration chooses.

        Raises:
            ConfigError: the table does not have the name.
        """
        name = config.get(self.key, self.default)
        if not isinstance(name, str) or name not in self.table:
            nearest = did_you_mean(str(name), list(self.table))
            raise ConfigError([self.key], f"must be one of {', '.join(self.table)}{nearest}")
        return self.table[name]


@dataclass(frozen=True, eq=False)
class Named:
    """Blocks of keyword arguments under class names: `{LRMonitor: {}, my_module.Mine: {every: 3}}`.

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
                raise ValueError("is not a key of this block" + did_you_mean(name, list(listed)))
            return listed[name]
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the user's module may raise anything
            raise ValueError(f"cannot import {module_name}: {one_line(error)}") from error
        found = getattr(module, class_name, None)
        if not inspect.isclass(found):
            names = [name for name, value in vars(module).items() if inspect.isclass(value)]
            raise ValueError(f"{module_name} has no such class{did_you_mean(class_name, names)}")
        if not issubclass(found, self.base):
            raise ValueError(f"must be a subclass of {self.base.__module__}.{self.base.__name__}")
        return found


def build_named(
    named: Named, block: dict[str, dict | None] | None, given: Mapping[type, tuple] | None = None
) -> list:
    """Return the objects of the classes that a block names, in its order.

    Args:
        named: the classes that the block may name.
        block: keyword arguments by class name; None for a class without arguments.
        given: positional arguments that the program supplies, by class.
    """
    given = given or {}
    objects = []
    for name, arguments in (block or {}).items():
        found = named.find(name)
        supplied = given.get(found, ())
        objects.append(found(*supplied, **(arguments or {})))
    return objects


def load_config(arguments: list[str], stage: Callable) -> dict[str, Any]:
    """Merge YAML files left to right, then key=value, and check them against a stage's signature.

    Returns:
        The keys that were given, without defaults: the keyword arguments of `stage`.

    Raises:
        ValueError: a file is missing or not YAML; a key is unknown, missing or has a wrong value.
            One line names the file or argument and the key.
    """
    sources = read_sources(arguments)
    try:
        merged = OmegaConf.merge(*[source for _, source in sources])
        merged = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{' '.join(arguments)}: {one_line(error)}") from error
    if not isinstance(merged, dict):
        raise ValueError(f"{' '.join(arguments)}: must hold keys and values, not a list")
    try:
        return checked(merged, stage)
    except ConfigError as error:
        raise ValueError(located(error, sources, merged)) from error


def read_sources(arguments: list[str]) -> list[tuple[str, Any]]:
    """Return every argument, a YAML file or key=value, with its OmegaConf configuration.

    Raises:
        ValueError: there is no argument, or one is neither of the two, or cannot be read.
    """
    if not arguments:
        raise ValueError("give at least one file of yamls/; key=value after it changes a value")
    sources = []
    for argument in arguments:
        is_file = argument.endswith((".yaml", ".yml"))
        if not is_file and "=" not in argument:
            raise ValueError(f"{argument}: must be a .yaml file or key=value")
        try:
            source = OmegaConf.load(argument) if is_file else OmegaConf.from_dotlist([argument])
        except (OSError, UnicodeError, YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{argument}: {one_line(error)}") from error
        sources.append((argument, source))
    return sources


def checked(config: dict[str, Any], stage: Callable) -> dict[str, Any]:
    """Return a merged configuration with its values converted to the types that `stage` takes.

    Raises:
        ConfigError: a key is unknown, missing or has a wrong value.
    """
    model = schema(stage, config=config)
    try:
        return model.model_validate(config).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise explained(error, model, config) from error


def schema(
    target: Callable, omitted: tuple[str, ...] = (), config: dict[str, Any] | None = None
) -> type[BaseModel]:
    """Return a pydantic model of the keyword arguments of a callable.

    Args:
        target: its keyword-only parameters are the keys, or all parameters if it has none.
        omitted: parameters that the program supplies.
        config: the merged configuration of a stage, on which Choice and Named blocks depend.
    """
    config = config or {}
    fields = {}
    for name, (hint, default) in keywords_of(target).items():
        if name not in omitted:
            kind = field_type(hint, name, config)
            required = default is inspect.Parameter.empty
            fields[name] = (kind, ... if required else Field(default, validate_default=False))
    return strict_model(target.__name__, fields)


def strict_model(name: str, fields: dict[str, tuple]) -> type[BaseModel]:
    """Return a pydantic model that refuses all other keys."""
    strict = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(name, __config__=strict, **fields)


def keywords_of(target: Callable) -> dict[str, tuple[Any, Any]]:
    """Return type hint and default of the keyword arguments of a callable.

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


def field_type(hint: Any, name: str, config: dict[str, Any]) -> Any:
    """Return a type hint for pydantic: blocks become nested models, durations are checked."""
    if typing.get_origin(hint) is Annotated:
        target, *omitted = hint.__metadata__
        if isinstance(target, Named):
            return named_schema(target, name, config)
        if isinstance(target, Choice):
            target = target.chosen(config)
        return schema(target, tuple(omitted)) if callable(target) else hint
    parts = typing.get_args(hint)
    if Time in parts:
        return Annotated[hint, AfterValidator(functools.partial(check_time, positive=False))]
    kinds = tuple(field_type(part, name, config) for part in parts)
    if not any(block_in(kind) for kind in kinds):
        return hint
    if typing.get_origin(hint) is list:
        return list[kinds]
    return typing.Union[kinds]  # noqa: UP007  # the operator | takes no tuple


def named_schema(named: Named, key: str, config: dict[str, Any]) -> type[BaseModel]:
    """Return a pydantic model with a block for every class that a top-level key may name.

    Raises:
        ConfigError: the configuration names a class that Named.find refuses.
    """
    classes = {}  # first those of the block, in whose order they will be built
    block = config.get(key)
    for name in block if isinstance(block, dict) else ():
        try:
            classes[name] = named.find(str(name))
        except ValueError as error:
            raise ConfigError([key, name], str(error)) from error
    for known in named.classes:
        classes.setdefault(known.__name__, known)
    fields = {name: (schema(found) | None, None) for name, found in classes.items()}
    return strict_model("classes", fields)


def explained(error: ValidationError, model: type[BaseModel], config: dict) -> ConfigError:
    """Return the most telling of pydantic's errors, in our words."""
    # A mistyped key comes first: it explains a missing key.
    wrong = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path = path_in(config, wrong["loc"])
    if wrong["type"] == "extra_forbidden":
        nearest = did_you_mean(str(path[-1]), keys_at(model, path[:-1]))
        return ConfigError(path, "is not a key of this block" + nearest)
    if wrong["type"] == "missing":
        return ConfigError([*path, wrong["loc"][-1]], "is missing")
    if wrong["type"] == "model_type":
        return ConfigError(path, "must be a block of keys")
    reason = wrong["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    return ConfigError(path, re.sub(r"^\w+ should ", "must ", reason))


def path_in(config: Any, location: Iterable) -> list:
    """Return the keys and list indices of a location; pydantic's also names members of unions."""
    path = []
    place = config
    for part in location:
        is_key = isinstance(place, dict) and part in place
        is_index = isinstance(place, list) and isinstance(part, int) and part < len(place)
        if is_key or is_index:
            path.append(part)
            place = place[part]
    return path


def keys_at(model: type[BaseModel], path: list) -> list[str]:
    """Return the keys that a model takes at the end of a path of keys and list indices."""
    for part in path:
        if not isinstance(part, int):
            model = block_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def block_in(kind: Any) -> type[BaseModel] | None:
    """Return the model that schema has made within a type such as `Model | None`, or None."""
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return kind
    found = (block_in(part) for part in typing.get_args(kind))
    return next((model for model in found if model), None)


def located(error: ConfigError, sources: list[tuple[str, Any]], config: dict[str, Any]) -> str:
    """Return an error's text after its file or argument, its key and its value."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path)[1:]
    to_list = list(takewhile(lambda part: not isinstance(part, int), error.path))
    holders = []
    for name, source in sources:
        if path_in(OmegaConf.to_container(source), to_list) == to_list:
            holders.append(name)
    if not holders:  # the key is missing
        files = [name for name, _ in sources if "=" not in name]
        return f"{' '.join(files)}: {key} {error}"
    source = holders[-1]  # OmegaConf merges dictionaries but replaces lists
    if source.partition("=")[0] == key:  # the argument shows key and value
        return f"{source}: {error}"
    if str(error).startswith("is "):  # the key is wrong, whatever its value
        return f"{source}: {key} {error}"
    return f"{source}: {key}={shown(value_at(config, error.path))}: {error}"


def value_at(config: Any, path: list) -> Any:
    """Return the value at the end of a path of keys and list indices."""
    for part in path:
        config = config[part]
    return config


def shown(value: Any) -> str:
    """Return a value as YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line instead of a traceback on errors that the user can mend."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {one_line(error)}")
