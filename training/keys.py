"""Check the keys of a stage's YAML files before torch and Composer are imported, which takes long.

    check_keys("pretrain.py", "PretrainConfig", sys.argv[1:])

Signatures are read from source files, which are not executed, by the rules of training/config.py.
A block whose signature cannot be read in this way is left to load_config, as are all values.
"""

import ast
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from training.sources import (
    ConfigError,
    check_names,
    located,
    merge_sources,
    one_line_errors,
    without,
)

UNREADABLE = (AttributeError, LookupError, OSError, SyntaxError)  # of code that is too unusual


class Code(NamedTuple):
    """A piece of a module's source: a definition, an import or an expression."""

    module: str
    node: ast.AST

    def find(self, name: str) -> "Code":
        """Return what a name of this module stands for; raise LookupError if that is unknown."""
        return find(self.module, name)


@cache
def names_of(module: str) -> dict[str, ast.AST]:
    """Return the definitions, imports and assigned expressions of a module, by name."""
    top, *inner = module.split(".")
    spec = find_spec(top)  # of a top level alone, since it would import packages on the way
    folders = spec.submodule_search_locations
    path = Path(folders[0], *inner) if folders else Path(spec.origin)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_bytes()).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names[node.name] = node
            case ast.ImportFrom():
                names |= {alias.asname or alias.name: node for alias in node.names}
            case ast.Assign(targets=[ast.Name(id=name)]):
                names[name] = node.value
    return names


def find(module: str, name: str) -> Code:
    """Return what a name of a module stands for, in the module that defines it."""
    node = names_of(module)[name]
    if not isinstance(node, ast.ImportFrom):
        return Code(module, node)
    original = {alias.asname or alias.name: alias.name for alias in node.names}
    return find(node.module, original[name])


def lineage(kind: Code) -> Iterator[Code]:
    """Yield a class and its bases, as in the method resolution order of single inheritance."""
    yield kind
    for base in kind.node.bases:
        yield from lineage(kind.find(ast.unparse(base)))


def keywords_in(target: Code) -> dict[str, Code]:
    """Return the type hint of each keyword argument, as config.keywords_of does."""
    if isinstance(target.node, ast.FunctionDef):
        return parameters(target)[0]
    if any("dataclass" in ast.unparse(decorator) for decorator in target.node.decorator_list):
        return fields(target)
    keywords: dict[str, Code] = {}
    for kind in lineage(target):
        for node in kind.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                own, passes_on = parameters(Code(kind.module, node))
                keywords = own | keywords
                if not passes_on:
                    return keywords
    raise LookupError(ast.unparse(target.node))


def parameters(function: Code) -> tuple[dict[str, Code], bool]:
    """Return the type hints of a function's keyword arguments, and whether it takes others."""
    arguments = function.node.args
    keys, passes_on = arguments.kwonlyargs, arguments.kwarg is not None
    if not keys and not passes_on:
        keys = [key for key in arguments.posonlyargs + arguments.args if key.arg != "self"]
    return {key.arg: Code(function.module, key.annotation) for key in keys}, passes_on


def fields(kind: Code) -> dict[str, Code]:
    """Return the type hints of a dataclass: of its keyword-only fields, if it has any."""
    positional: dict[str, Code] = {}
    keyword: dict[str, Code] = {}
    for owner in reversed(list(lineage(kind))):
        options = " ".join(ast.unparse(decorator) for decorator in owner.node.decorator_list)
        hints = keyword if "kw_only=True" in options else positional
        for node in owner.node.body:
            if isinstance(node, ast.AnnAssign):
                if ast.unparse(node.annotation) == "KW_ONLY":
                    hints = keyword
                else:
                    hints[node.target.id] = Code(owner.module, node.annotation)
    return keyword or positional


def check(value: Any, hint: Code, path: list, config: dict[str, Any]) -> None:
    """Raise ConfigError if a value, by its type hint, is or contains a block with an unknown key.

    Args:
        path: keys and list indices that lead to the value.
        config: the merged configuration, in which Choice looks up its key.
    """
    match hint.node:
        case ast.BinOp(left=left):  # X | None
            check(value, Code(hint.module, left), path, config)
        case ast.Name(id=name) if name in names_of(hint.module):
            check(value, hint.find(name), path, config)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner) if isinstance(value, list):
            for index, item in enumerate(value):
                check(item, Code(hint.module, inner), [*path, index], config)
        case ast.Subscript(slice=ast.Tuple(elts=[ast.Name(id="dict"), target, *rest])):
            constants = [node for item in rest for node in ast.walk(item)]
            omitted = [node.value for node in constants if isinstance(node, ast.Constant)]
            if isinstance(value, dict):
                check_block(value, Code(hint.module, target), path, config, omitted)


def check_block(
    block: dict, target: Code, path: list, config: dict[str, Any], omitted: list[str]
) -> None:
    """Raise ConfigError for an unknown key in the arguments of a callable, Choice or Named."""
    match target.node:
        case ast.Name(id=name):
            check_block(block, target.find(name), path, config, omitted)
        case ast.Call(func=ast.Name(id="Choice"), args=[key, table, default]):
            table = target.find(table.id)
            chosen = config.get(key.value) or default.value
            for name, kind in zip(table.node.keys, table.node.values, strict=True):
                if name.value == chosen:
                    check_block(block, Code(table.module, kind), path, config, omitted)
        case ast.Call(func=ast.Name(id="Named"), args=[classes, _]):
            known = {kind.id: Code(target.module, kind) for kind in classes.elts}
            short = {name: value for name, value in block.items() if "." not in str(name)}
            check_names(short, known, path)
            for name, arguments in short.items():
                if isinstance(arguments, dict):
                    check_block(arguments, known[name], [*path, name], config, [])
        case ast.FunctionDef() | ast.ClassDef():
            keywords: dict[str, Code] = {}
            with suppress(*UNREADABLE):
                keywords = without(keywords_in(target), omitted)
                check_names(block, keywords, path)
            for name in filter(keywords.__contains__, block):
                with suppress(*UNREADABLE):  # an unusual hint of one key hides no other key
                    check(block[name], keywords[name], [*path, name], config)


def check_keys(file: str, config: str, arguments: list[str]) -> None:
    """End the program with one line if a YAML file cannot be read, or has an unknown key.

    Args:
        file: of a stage.
        config: name of the class in it whose fields are the keys.
        arguments: of the command line.
    """
    given = [text for text in arguments if "=" in text or text.endswith((".yaml", ".yml"))]
    given = [text for text in given if not text.startswith("-")]
    if not given or {"--help", "-h"} & set(arguments):
        return
    with one_line_errors():
        merged, sources = merge_sources(given)
        try:
            with suppress(*UNREADABLE):
                check_block(merged, find(Path(file).stem, config), [], merged, [])
        except ConfigError as error:
            raise ValueError(located(error, sources)) from error
