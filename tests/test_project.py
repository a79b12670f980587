"""What holds for the project as a whole: its imports, its README, its configurations' headers."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from config import load_config
from conftest import ROOT

import data_prep
import eval as evaluation
import finetune
import pretrain

STAGES = {
    "pretrain.py": pretrain.pretrain,
    "finetune.py": finetune.finetune,
    "eval.py": evaluation.evaluate,
}
README = (ROOT / "README.md").read_text()
ORDER = re.findall(r"^\| `(\w+)\.py` \|", README, flags=re.MULTILINE)  # as its table has them


def test_readme_lists_every_file():
    assert sorted(ORDER) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("name", ORDER)
def test_file_imports_only_those_above_it_in_the_readme(name):
    used = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used.add(node.module)
    assert used.isdisjoint(ORDER[ORDER.index(name) :])


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = (line.split("#")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_one_that_the_project_takes(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    for part in command.split("&&"):
        words = shlex.split(part)
        if words[:2] == ["uv", "run"]:
            words = words[2:]
        words = [word for word in words if word not in ("composer", "python", "-n", "8", "--plan")]
        if words[0] in STAGES:
            load_config(words[1:], STAGES[words[0]])
        elif words[0] == "data_prep.py":
            data_prep.parse(words[1:])
        elif words[0].startswith("tests/"):
            assert Path(words[0]).exists()
        else:
            assert words in (
                ["pytest"],
                ["pip", "install", "uv"],
                ["ruff", "check"],
                ["ruff", "format", "--check"],
            )


def test_lines_that_the_readme_gives_for_parts_of_the_methods_are_theirs():
    named = re.findall(r"`(\w+)`, (\w+)\.py (\d+)-(\d+)", README)
    assert len(named) >= 10
    for name, file, first, last in named:
        tree = ast.parse((ROOT / f"{file}.py").read_text())
        part = next(node for node in tree.body if getattr(node, "name", None) == name)
        assert (int(first), int(last)) == (part.lineno, part.end_lineno), name


@pytest.mark.parametrize("name", ORDER)
def test_readme_gives_the_length_of_every_file(name):
    stated = int(re.search(rf"\| `{name}.py` \| (\d+) \|", README)[1])
    assert stated == len((ROOT / f"{name}.py").read_text().splitlines())


SIZES = {
    "data_prep": 600,
    "model": 500,
    "pretrain": 400,
    "finetune": 350,
    "eval": 350,
}  # lines; 550 of any other


@pytest.mark.parametrize("name", ORDER)
def test_file_is_no_longer_than_it_may_be(name):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) < SIZES.get(name, 550)
