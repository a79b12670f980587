"""What holds for the project as a whole: its imports, its README, its configurations' headers."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import data_prep
import eval as evaluation
import finetune
import pretrain

ORDER = ["data_prep", "model", "pretrain", "finetune", "eval"]
STAGES = {"pretrain.py": pretrain.pretrain, "finetune.py": finetune.finetune, "eval.py": evaluation.evaluate}
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    allowed = {"model": [], "data_prep": []}.get(name, ORDER[: ORDER.index(name)])
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            used = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used = {node.module}
        else:
            continue
        assert used.isdisjoint(set(ORDER) - set(allowed)), f"{name}.py imports {used}"


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
        words = [word for word in words if word not in ("composer", "python", "-n", "8")]
        if words[0] in STAGES:
            pretrain.load_config(words[1:], STAGES[words[0]])
        elif words[0] == "data_prep.py":
            data_prep.parse(words[1:])
        elif words[0].startswith("tests/"):
            assert Path(words[0]).exists()
        else:
            assert words in (["pytest"], ["pip", "install", "uv"], ["ruff", "check"], ["ruff", "format", "--check"])


@pytest.mark.parametrize("path", sorted((ROOT / "yamls").glob("*.yaml")), ids=lambda path: path.name)
def test_yaml_opens_with_its_command_hardware_cost_and_expectation(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert path.read_text().startswith("# ") and f"yamls/{path.name}" in header
    assert all(word in header.lower() for word in ("hardware", "cost", "expected"))


@pytest.mark.parametrize("name", ORDER)
def test_readme_gives_the_length_of_every_file(name):
    stated = int(re.search(rf"\| `{name}.py` \| (\d+) \|", README)[1])
    assert stated == len((ROOT / f"{name}.py").read_text().splitlines())
