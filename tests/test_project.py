"""The root's contents, and the commands in README.md, docs/ and docstrings."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import data_prep
from benchmarks.compare import CompareConfig
from eval import EvalConfig
from finetune import FinetuneConfig
from pretrain import PretrainConfig
from training.config import load_config
from training.plan import split_plan_flags

STAGES = {"data_prep.py", "model.py", "pretrain.py", "finetune.py", "eval.py"}
WINGS = {"shards", "training", "evaluation", "methods"}
CONFIGS = {
    "pretrain.py": PretrainConfig,
    "finetune.py": FinetuneConfig,
    "eval.py": EvalConfig,
    "benchmarks/compare.py": CompareConfig,
}
TOOLS = ("pytest", "apt-get", "ruff", "pip", "git", "cd", "export", "huggingface-cli")
TOOLS += ("sbatch", "sky", "kubectl")  # tests/test_cluster.py looks at their arguments
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
for folder in (".", *sorted(WINGS), "benchmarks"):
    PAGES += sorted((ROOT / folder).glob("*.py"))  # for the commands in their docstrings


def test_only_the_five_stages_are_python_files_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == STAGES


def test_python_code_is_in_the_wings_the_tests_and_the_benchmarks():
    folders = set()
    for path in ROOT.glob("*/**/*.py"):
        folder = path.relative_to(ROOT).parts[0]
        if not folder.startswith("."):
            folders.add(folder)
    assert folders == {*WINGS, "tests", "benchmarks"}


def commands(page: Path) -> Iterator[str]:
    """Yield the commands in code blocks of a page or a docstring, without comments."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"^    ((?:uv run|composer|python|torchrun) .*)$", text, re.M)
    for block in blocks:
        for line in block.splitlines():
            for command in split_at_operators(shlex.split(line, comments=True)):
                yield shlex.join(command)


def split_at_operators(words: list[str]) -> Iterator[list[str]]:
    """Yield the commands that && or ; join."""
    command = []
    for word in [*words, "&&"]:
        if word not in ("&&", ";"):
            command.append(word)
        elif command:
            yield command
            command = []


def stage_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the script or tool of a command, and its arguments, without uv and launchers."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]  # an environment variable
    if words[:2] == ["uv", "run"]:
        words = words[2:]
        while words[0].startswith("--"):  # --with PACKAGE
            words = words[2:]
    if words[0] not in ("composer", "python", "torchrun"):
        return words[0], words[1:]
    for number, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[number + 1 :]
    raise AssertionError(f"{shlex.join(words)} names no script")


EXAMPLES = [(page, command) for page in PAGES for command in commands(page)]


def name_of(value: Path | str) -> str:
    return value.name if isinstance(value, Path) else value


def test_readme_shows_commands():
    assert any(page.name == "README.md" for page, _ in EXAMPLES)


@pytest.mark.parametrize(("page", "command"), EXAMPLES, ids=name_of)
def test_every_command_that_is_shown_is_one_that_its_script_takes(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, arguments = stage_of(shlex.split(command))
    if script in CONFIGS:
        arguments, _ = split_plan_flags(arguments)
        if arguments != ["--help"]:
            load_config(arguments, CONFIGS[script])
    elif script == "data_prep.py":
        data_prep.parse(arguments)
    elif script.endswith(".py"):
        assert (ROOT / script).exists()
    else:
        assert script in TOOLS


def test_requirements_are_the_versions_of_the_lock():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    versions = {package["name"]: package["version"] for package in lock["package"]}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.+!]+)", line) for line in lines]
    pinned = {match[1]: match[2] for match in pinned if match}
    assert {"mosaicml", "torch", "timm", "mosaicml-streaming", "webdataset", "numpy"} <= set(pinned)
    assert all(versions[name] == version for name, version in pinned.items())
    direct = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.match(r"[\w-]+", line)[0] for line in direct} <= set(pinned)
