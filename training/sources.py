"""Read YAML files and key=value arguments, and say in one line what is wrong with them.

This file imports neither torch nor Composer: training/keys.py needs it before their import.
"""

import difflib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn, TextIO

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from shards.workers import ignore_stop_signals

OWN_KEYS = {  # top-level keys that only one stage has
    **dict.fromkeys(("make_demo", "raw", "recipe"), "pretrain.py"),
    **dict.fromkeys(("eval_data", "lars"), "finetune.py"),
    **dict.fromkeys(("accuracy", "probe", "reconstructions", "attention"), "eval.py"),
    **dict.fromkeys(("predict", "embed", "export"), "eval.py"),
    "comparison": "benchmarks/compare.py",
}
QUOTED = """put the value in double quotes, and in a shell these in single quotes: key='"value"'"""
BASES = re.compile(r"[-+]?(0[0-7_]+|[1-9]\d*(:[0-5]?\d)+(\.\d*)?)")


class ConfigError(ValueError):
    """A wrong value, or a wrong key, at the end of a path of keys and list indices."""

    def __init__(self, path: list, complaint: str, value: Any = None):
        super().__init__(complaint)
        self.path = path
        self.value = value


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """Return "; did you mean X?" with the nearest of `names`, or nothing if there are no names."""
    nearest = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def without_matching(keywords: dict[str, Any], omitted: Iterable[str]) -> dict[str, Any]:
    """Return keyword arguments without names that `omitted` has, or patterns such as save_*."""
    return {
        name: value
        for name, value in keywords.items()
        if not any(fnmatch(name, pattern) for pattern in omitted)
    }


OTHER_CLASSES = "; other classes need their module, such as composer.callbacks.EarlyStopper"


def check_names(block: dict, names: Iterable[str], path: list, remedy: str = "") -> None:
    """Raise ConfigError if a block at a path of keys has a key that is not in `names`."""
    for name in block:
        if name not in names:
            complaint = f"is not a key of this block{did_you_mean(name, names)}{remedy}"
            if not path and name in OWN_KEYS:
                complaint = f"is a key of {OWN_KEYS[name]}; run that with this file"
            raise ConfigError([*path, name], complaint)


def is_source(argument: str) -> bool:
    """Return whether an argument of the command line is a YAML file or key=value, and no flag."""
    named = "=" in argument or argument.endswith((".yaml", ".yml"))
    return named and not argument.startswith("-")


def merge_sources(arguments: list[str]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return YAML files and key=value merged left to right, and each of them, see read_sources.

    Raises:
        ValueError: a file is missing or not YAML.
    """
    sources = read_sources(arguments)
    try:
        merged = OmegaConf.merge(*[source for _, source in sources])
        merged = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{' '.join(arguments)}: {one_line(error)}") from error
    if not isinstance(merged, dict):
        raise ValueError(f"{' '.join(arguments)}: must hold keys and values, not a list")
    return merged, sources


def read_sources(arguments: list[str]) -> list[tuple[str, Any]]:
    """Return every argument, a YAML file or key=value, with its OmegaConf configuration."""
    if not arguments:
        raise ValueError("give at least one file of yamls/; key=value after it changes a value")
    sources = []
    for argument in arguments:
        is_file = argument.endswith((".yaml", ".yml")) and "=" not in argument
        if not is_file and "=" not in argument:
            raise ValueError(f"{argument}: must be a .yaml file or key=value")
        if argument.endswith("="):  # such as checkpoint=$UNSET
            raise ValueError(f"{argument}: has no value; for none, give {argument}null")
        if not is_file and re.search(r"""=(\s*&|[^'"]*\s#)""", argument):
            raise ValueError(f"{argument}: # begins a comment, & an anchor; {QUOTED}")
        try:
            source = OmegaConf.load(argument) if is_file else OmegaConf.from_dotlist([argument])
        except (OSError, UnicodeError, YAMLError, OmegaConfBaseException) as error:
            remedy = "" if is_file else f"; {QUOTED}"
            raise ValueError(f"{argument}: {one_line(error)}{remedy}") from error
        value = io.StringIO(argument.partition("=")[2])
        with open(argument, encoding="utf-8") if is_file else value as text:
            check_bases(argument, text)
        sources.append((argument, source))
    return sources


def read_settings(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file that a run has written, or one of yamls/.

    Raises:
        ValueError: the file is corrupt.
    """
    try:
        return dict(OmegaConf.to_container(OmegaConf.load(file), resolve=True))
    except (OSError, YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        remedy = "restore it, or delete it if the run directory is the right one"
        raise ValueError(f"{file}: corrupt ({one_line(error)}); {remedy}") from error


def check_bases(origin: str, text: TextIO) -> None:
    """Raise ValueError if YAML holds a number that it reads in base 8 or 60: 010 is 8, 1:30 is 90.

    Args:
        origin: the file or argument that is named in the error.
    """
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and BASES.fullmatch(token.value):
            value = yaml.safe_load(token.value)
            number = f"YAML reads {token.value} as {value}; give {value}, or for text, {QUOTED}"
            raise ValueError(f"{origin}: {number}")


def located(error: ConfigError, sources: list[tuple[str, Any]]) -> str:
    """Return the text of an error, preceded by the file or argument, the key and the value."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path)[1:]
    holders = [name for name, source in sources if has_key(source, error.path)]
    if not holders:  # the key is missing
        files = [name for name, _ in sources if "=" not in name]
        return f"{' '.join(files)}: {key} {error}"
    source = holders[-1]
    if source.partition("=")[0] == key:  # the argument shows key and value
        return f"{source}: {error}"
    if str(error).startswith("is "):  # the key is wrong, whatever its value
        return f"{source}: {key} {error}"
    value = error.value if isinstance(error.value, str) else json.dumps(error.value, default=str)
    return f"{source}: {key}={value}: {error}"


def has_key(source: Any, path: list) -> bool:
    """Return whether a source has the key at a path. Lists count as a whole: they do not merge."""
    place = OmegaConf.to_container(source)
    for part in path:
        if isinstance(part, int):
            return True
        if not isinstance(place, dict) or part not in place:
            return False
        place = place[part]
    return True


def one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line instead of a traceback on errors that the user can mend."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        exit_with(error)


@contextmanager
def errors_of(block: str) -> Iterator[None]:
    """Put the name of a block of YAML before a ValueError that begins with a key of it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{block}.{error}") from error


def exit_with(error: BaseException) -> NoReturn:
    """End the program with the text of an error as its last line, and the exit code 1."""
    # The launcher sends SIGTERM to the ranks that end last, which must not change their code.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        ignore_stop_signals()
    sys.exit(f"{os.path.basename(sys.argv[0])}: {one_line(error)}")
