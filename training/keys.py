"""Check the keys of a stage's YAML files before torch and Composer are imported, which takes long.

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
    OTHER_CLASSES,
    ConfigError,
    check_names,
    is_source,
    located,
    merge_sources,
    one_line_errors,
    without_matching,
)

UNUSUAL_CODE = (AttributeError, LookupError, OSError, SyntaxError)  # raised by it


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


class Code(NamedTuple):
    """A piece of a module's source: a definition or an expression; None for the whole module."""

    module: str
    node: ast.AST | None

    def find(self, name: str) -> "Code":
        """Return what a name of this module stands for, in the module that defines it.

        Raises:
            LookupError: the module does not define the name.
        """
        node = names_of(self.module)[name]
        if not isinstance(node, ast.ImportFrom):
            return Code(self.module, node)
        original = {alias.asname or alias.name: alias.name for alias in node.names}
        return Code(node.module, node).find(original[name])


def lineage(kind: Code) -> Iterator[Code]:
    """Yield a class and its bases, as in the method resolution order of single inheritance."""
    yield kind
    for base in kind.node.bases:
        yield from lineage(kind.find(ast.unparse(base)))


def keywords_in(target: Code) -> dict[str, Code]:
    """Return the type hint of each keyword argument, as config.keywords_of does."""
    if isinstance(target.node, ast.FunctionDef):
        return parameters(target)
    if any("dataclass" in ast.unparse(decorator) for decorator in target.node.decorator_list):
        return fields(target)
    keywords: dict[str, Code] = {}
    for kind in lineage(target):
        for node in kind.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                keywords = parameters(Code(kind.module, node)) | keywords
                if not node.args.kwarg:  # no **keywords for the next class
                    return keywords
    raise LookupError(ast.unparse(target.node))


def parameters(function: Code) -> dict[str, Code]:
    """Return the type hints of a function's keyword arguments."""
    arguments = function.node.args
    keys = arguments.kwonlyargs
    if not keys and not arguments.kwarg:
        keys = [key for key in arguments.posonlyargs + arguments.args if key.arg != "self"]
    return {key.arg: Code(function.module, key.annotation) for key in keys}


def fields(kind: Code) -> dict[str, Code]:
    """Return the type hints of a dataclass: of its keyword-only fields, if it has any."""
    hints: dict[str, Code] = {}
    for owner in reversed(list(lineage(kind))):
        for node in owner.node.body:
            if isinstance(node, ast.AnnAssign):
                hints[node.target.id] = Code(owner.module, node.annotation)
                if ast.unparse(node.annotation) == "KW_ONLY":
                    hints = {}
    return hints


def check(value: Any, hint: Code, path: list, config: dict[str, Any], omitted: tuple = ()) -> None:
    """Raise ConfigError if a value is or contains a block with an unknown key.

    Args:
        hint: the value's type hint; or, for a block, its callable, Choice or Named.
        path: keys and list indices that lead to the value.
        config: the merged configuration, in which Choice looks up its key.
        omitted: see config.convert_block.
    """
    match hint.node:
        case ast.BinOp(left=left):  # X | None
            check(value, Code(hint.module, left), path, config)
        case ast.Name(id=name):
            check(value, hint.find(name), path, config, omitted)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner) if isinstance(value, list):
            for index, item in enumerate(value):
                check(item, Code(hint.module, inner), [*path, index], config)
        case ast.Subscript(slice=ast.Tuple(elts=[ast.Name(id="dict"), target, *rest])):
            constants = [node for item in rest for node in ast.walk(item)]
            names = [node.value for node in constants if isinstance(node, ast.Constant)]
            check(value, Code(hint.module, target), path, config, tuple(names))
        case ast.Call(func=ast.Name(id="Choice"), args=[key, table, default]):
            table = hint.find(table.id)
            chosen = config.get(key.value) or default.value
            for name, kind in zip(table.node.keys, table.node.values, strict=True):
                if name.value == chosen:
                    check(value, Code(table.module, kind), path, config, omitted)
        case ast.Call(func=ast.Name(id="Named"), args=[classes, _]) if isinstance(value, dict):
            known = [node.id for node in ast.walk(classes) if isinstance(node, ast.Name)]
            short = {name: block for name, block in value.items() if "." not in str(name)}
            check_names(short, known, path, OTHER_CLASSES)
            for name, block in short.items():
                check(block, hint.find(name), [*path, name], config)
        case ast.FunctionDef() | ast.ClassDef() if isinstance(value, dict):
            keywords = without_matching(keywords_in(hint), omitted)
            check_names(value, keywords, path)
            for name in value:
                with suppress(*UNUSUAL_CODE):  # an unusual hint of one key hides no other key
                    check(value[name], keywords[name], [*path, name], config)


def check_keys(file: str, config: str, arguments: list[str]) -> None:
    """End the program with one line if a YAML file cannot be read, or has an unknown key.

    Args:
        file: of a stage.
        config: name of the class in it whose fields are the keys.
        arguments: of the command line.
    """
    given = list(filter(is_source, arguments))
    if not given or {"--help", "-h"} & set(arguments):
        return
    with one_line_errors():
        merged, sources = merge_sources(given)
        try:
            with suppress(*UNUSUAL_CODE):
                stage = Code(Path(file).stem, None)
                check(merged, stage.find(config), [], merged)
        except ConfigError as error:
            raise ValueError(located(error, sources)) from error
