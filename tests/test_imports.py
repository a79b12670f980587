"""Imports run one way: model.py and shards/ below, then wings, stages, benchmarks/ on top."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

WINGS = ("shards", "methods", "evaluation", "training", "benchmarks")
STAGES = ("data_prep", "model", "pretrain", "finetune", "eval")

# The folders, or files at the root, that the files of a folder may import.
ALLOWED = {
    "model": set(),
    "shards": {"shards"},
    "methods": {"methods", "model"},
    "evaluation": {"evaluation", "model", "shards"},
    "training": {"training", "model", "shards", "evaluation"},
    "data_prep": {"shards"},
}
SEE_METHODS = {"training/export.py", "training/report_page.py"}
UNDER_STAGES = {"model", "shards", "methods", "evaluation", "training"}
ALLOWED["pretrain"] = UNDER_STAGES | {"data_prep"}
ALLOWED["finetune"] = ALLOWED["pretrain"] | {"pretrain"}
ALLOWED["eval"] = ALLOWED["finetune"] | {"finetune"}
ALLOWED["benchmarks"] = {*WINGS, *STAGES}

FILES = sorted(ROOT.glob("*.py"))
for wing in WINGS:
    FILES += sorted((ROOT / wing).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Return the first part of the name of every module that a piece of code imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their folder"
            names.add(node.module.partition(".")[0])
    return names


def of_ours(names: set[str]) -> set[str]:
    return names & {*WINGS, *STAGES}


def owner(path: Path) -> str:
    """Return the folder of a file, or the name of a file at the root."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_folder_and_file_at_the_root_has_its_rule():
    assert {owner(path) for path in FILES} == ALLOWED.keys()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_imports_only_what_lies_below_it(path):
    used = of_ours(imported(ast.parse(path.read_text())))
    allowed = ALLOWED[owner(path)] | ({"methods"} if name_of(path) in SEE_METHODS else set())
    assert used <= allowed


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_imports_a_file_of_ours(path):
    """Such an import could hide a circle until the function is called."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, functions):
            assert not of_ours(imported(node)), f"{path}, line {node.lineno}"


def test_files_of_a_folder_import_each_other_without_a_circle():
    modules = {}
    for path in FILES:
        modules[name_of(path).removesuffix(".py").replace("/", ".")] = path
    edges = {}
    for name, path in modules.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
        edges[name] = used & modules.keys()
    while leaves := {name for name, used in edges.items() if not used}:
        edges = {name: used - leaves for name, used in edges.items() if name not in leaves}
    assert not edges, f"these import each other: {sorted(edges)}"
