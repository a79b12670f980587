"""YAML files and key=value of a command line -> keyword arguments of a callable, which is the schema; errors in one line."""

import difflib
import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Annotated, Any

from composer.core import Time, ensure_time
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from yaml import YAMLError


def check_time(value: Any, positive: bool = True) -> Any:
    """A duration as Composer has it, unchanged: 800ep, 500ba, 0.1dur; a plain number is one of epochs.

    Raises:
        ValueError: it is none, or negative, or 0 where it must be positive.
    """
    if not isinstance(value, int | str):
        return value
    try:
        length = ensure_time(value, "ep").value
    except (ValueError, TypeError) as error:
        raise ValueError(
            "give a whole number of epochs or steps, such as 800ep or 500ba"
        ) from error
    if length < 0 or (positive and length == 0):
        raise ValueError(f"must be {'positive' if positive else '0 or more'}")
    return value


Duration = Annotated[str, AfterValidator(check_time)]


RunName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of a folder in runs/


def load_config(arguments: list[str], stage: Callable) -> dict[str, Any]:
    """Merge YAML files left to right, then key=value, into keyword arguments of `stage`, checked against its signature.

    Raises:
        ValueError: a file is missing or no YAML; a key is unknown, missing or of the wrong type. Names file and key.
    """
    if not arguments:
        raise ValueError("give at least one file of yamls/; key=value after it changes it")
    sources = {}
    for argument in arguments:
        is_file = argument.endswith((".yaml", ".yml"))
        if not is_file and "=" not in argument:
            raise ValueError(f"{argument!r} is neither a .yaml file nor key=value")
        try:
            sources[argument] = (
                OmegaConf.load(argument) if is_file else OmegaConf.from_dotlist([argument])
            )
        except (OSError, UnicodeError, YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{argument}: {error}") from error
    model = schema(stage)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*sources.values()), resolve=True)
        return model.model_validate(merged).model_dump(exclude_unset=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{' '.join(arguments)}: {error}") from error
    except ValidationError as error:
        # A mistyped key comes first: it explains a missing one.
        wrong = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path, place = [], merged
    for part in wrong["loc"]:  # pydantic's has the members of unions in it, too
        if part in (
            place
            if isinstance(place, dict)
            else range(len(place))
            if isinstance(place, list)
            else ()
        ):
            path.append(part)
            place = place[part]
    if wrong["type"] == "missing" and isinstance(wrong["loc"][-1], str):
        path.append(wrong["loc"][-1])
    key = ".".join(map(str, path))
    block = ".".join(takewhile(lambda part: isinstance(part, str), path))  # down to the first list
    named = [name for name, part in sources.items() if OmegaConf.select(part, block) is not None]
    if wrong["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), keys_at(model, path[:-1]), n=1, cutoff=0.0)
        complaint = f"is not a key here; the nearest is {near[0] if near else 'none'}"
    else:
        reason = wrong["msg"].removeprefix("Value error, ").lower()
        complaint = (
            "is missing" if wrong["type"] == "missing" else f"is {wrong['input']!r}: {reason}"
        )
    raise ValueError(f"{named[-1] if named else ' '.join(arguments)}: {key} {complaint}")


def schema(target: Callable | tuple[type, ...], *given: str) -> type[BaseModel]:
    """The keyword arguments of a callable, with their types, as a pydantic model.

    A parameter annotated Annotated[dict, callable] is a block of that callable's arguments; Annotated[dict, (classes)] has
    such a block under the name of each class. Where a callable has keyword-only parameters, those are the YAML's, and the
    program gives the others and those named in `given`.
    """
    strict = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    if isinstance(target, tuple):
        blocks = {made.__name__: (schema(made) | None, None) for made in target}
        return create_model("classes", __config__=strict, **blocks)
    parameters = inspect.signature(target).parameters.values()
    parameters = [
        p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given
    ] or list(parameters)
    hints = typing.get_type_hints(
        target.__init__ if inspect.isclass(target) else target, include_extras=True
    )
    fields = {
        p.name: (
            resolve(hints.get(p.name, Any)),
            ... if p.default is p.empty else Field(p.default, validate_default=False),
        )
        for p in parameters
    }
    return create_model(target.__name__, __config__=strict, **fields)


def resolve(hint: Any) -> Any:
    """A type annotation with the blocks in it made models of their own, and Composer's times checked."""
    if typing.get_origin(hint) is Annotated:
        target = hint.__metadata__[0]
        return schema(*hint.__metadata__) if callable(target) or isinstance(target, tuple) else hint
    if Time in typing.get_args(hint):
        return Annotated[hint, AfterValidator(functools.partial(check_time, positive=False))]
    inside = tuple(map(resolve, typing.get_args(hint)))
    if not any(inspect.isclass(part) and issubclass(part, BaseModel) for part in inside):
        return hint
    return list[inside] if typing.get_origin(hint) is list else typing.Union[inside]  # noqa: UP007  # of a tuple


def keys_at(model: Any, path: list) -> list[str]:
    """The keys that a model has at the end of a path of keys and list indices."""
    for part in path:
        hint = model if isinstance(part, int) else model.model_fields[part].annotation
        parts = (hint, *typing.get_args(hint))
        model = next(
            part for part in parts if inspect.isclass(part) and issubclass(part, BaseModel)
        )
    return list(model.model_fields)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend before any long work ends the program in one line."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}")
