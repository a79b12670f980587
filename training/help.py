"""Describe every key of a stage's YAML files for --help, from signatures and docstrings alone."""

import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from training.config import Choice, Named, keywords_of
from training.sources import without_matching

COLUMN = 45  # at which the texts begin
# `name, other (type, optional): text`, and the indented lines that follow
ENTRY = re.compile(r"^(\w+(?:, \w+)*)(?: \(.*?\))?:(.*\n(?:(?: .*)?\n)*)", re.MULTILINE)


def stage_help(usage: str, config: Callable) -> str:
    """Return the usage of a stage, and a paragraph for each key of its YAML files."""
    return "\n".join([usage.strip(), "", "Keys, with types and defaults:", *key_lines(config)])


def key_lines(target: Callable, indent: str = "  ", omitted: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a paragraph for each keyword argument of a callable, and of the blocks in it."""
    texts = argument_texts(target)
    for name, (hint, default) in without_matching(keywords_of(target), omitted).items():
        block = block_of(hint)
        if block is None:
            value = "" if default is inspect.Parameter.empty else f" = {shown(default)}"
            yield key_line(f"{indent}{name}: {type_name(hint)}{value}", texts.get(name))
            continue
        kind, *left_out = block
        yield key_line(f"{indent}{name}:", texts.get(name, block_text(kind)))
        if isinstance(kind, Choice):
            kind = kind.table[kind.default]
        if isinstance(kind, Named):
            for known in kind.classes:
                text = first_sentence(inspect.getdoc(known) or "")
                yield key_line(f"{indent}  {known.__name__}:", text)
        else:
            yield from key_lines(kind, f"{indent}  ", tuple(left_out))


def block_of(hint: Any) -> tuple | None:
    """Return (the callable, Choice or Named; omitted names) of a block or list of blocks."""
    members = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated and members[0] is dict:
        return members[1:]
    if typing.get_origin(hint) in (list, typing.Union, types.UnionType):
        blocks = [block_of(member) for member in members]
        return next(filter(None, blocks), None)
    return None


def block_text(kind: Callable | Choice | Named) -> str:
    """Return a sentence on what a block holds."""
    if isinstance(kind, Named):
        return "arguments by the name of a class"
    if isinstance(kind, Choice):
        names = ", ".join(kind.table)
        return f"arguments of the {kind.key}, one of {names}; here of {kind.default}"
    return first_sentence(inspect.getdoc(kind) or "")


def key_line(key: str, text: str | None) -> str:
    """Return a key and its text, wrapped at the width of the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    new_line = "\n" + " " * COLUMN
    lines = textwrap.wrap(text or "", max(width - COLUMN, 20))
    begin = key.ljust(COLUMN) if len(key) < COLUMN else key + new_line
    return (begin + new_line.join(lines)).rstrip()


def shown(default: Any) -> str:
    """Return a default as YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(default, bool | None):
        return words[default]
    is_shown = isinstance(default, int | float | str | tuple | list | dict)
    return str(default) if is_shown else "..."


def type_name(hint: Any) -> str:
    """Return a type hint as a reader would write it, such as int or list[str] or null."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Callable:
        return "Callable"
    if origin is Annotated:
        return type_name(members[0])
    if origin is typing.Literal:
        return " or ".join(map(str, members))
    if origin in (typing.Union, types.UnionType):
        in_yaml = [one for one in members if is_in_yaml(one)] or members
        return " or ".join(dict.fromkeys(map(type_name, in_yaml)))
    if origin is not None and members:
        inner = ", ".join(type_name(one) for one in members if one is not Ellipsis)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def is_in_yaml(hint: Any) -> bool:
    """Return whether YAML can have a value of a type: Composer's Trainer also takes objects."""
    origin = typing.get_origin(hint)
    plain = (int, float, str, bool, list, tuple, dict, type(None))
    return hint in plain or origin in (*plain, Annotated, typing.Literal)


def argument_texts(target: Callable) -> dict[str, str]:
    """Return the first sentence on each argument, from a callable's docstring and its bases'."""
    owners = target.__mro__ if inspect.isclass(target) else [target]
    texts: dict[str, str] = {}
    for owner in owners:
        for doc in (owner.__doc__, getattr(vars(owner).get("__init__"), "__doc__", None)):
            for name, text in arguments_in(inspect.cleandoc(doc or "")):
                texts.setdefault(name, text)
    return texts


def arguments_in(doc: str) -> Iterator[tuple[str, str]]:
    """Yield (name, first sentence) for every argument in the section Args of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n|\s*\n)+)", f"{doc}\n", re.MULTILINE)
    for names, text in ENTRY.findall(textwrap.dedent(section[1])) if section else ():
        for name in names.split(", "):
            yield name, first_sentence(text.replace("\n", " "))  # with all paragraphs


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, on one line."""
    line = " ".join(text.split("\n\n")[0].replace("`", "").split())
    return re.split(r"(?<=\w[.;]) ", line, maxsplit=1)[0].rstrip(".;")
