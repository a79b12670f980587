"""Headers, sources, blocks, sizes and costs of the files in yamls/; rows of its comparisons."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from torch import Tensor

import eval as evaluation
import finetune
import pretrain
from benchmarks import compare
from pretrain import PretrainConfig
from shards.views import PretrainingViews
from training.config import load_config
from training.cost import flops_per_sample, peak_bytes
from training.keys import check_keys

FILES = sorted((ROOT / "yamls").rglob("*.yaml"))
COMPARISONS = [ROOT / "yamls" / "compare.yaml", *sorted((ROOT / "yamls" / "ablations").iterdir())]
STAGES = {"pretrain.py": pretrain, "finetune.py": finetune, "eval.py": evaluation}
CONFIGS = {
    "pretrain.py": pretrain.PretrainConfig,
    "finetune.py": finetune.FinetuneConfig,
    "eval.py": evaluation.EvalConfig,
    "benchmarks/compare.py": compare.CompareConfig,
}
ENCODER_SIZES = {"img_size", "patch_size", "embed_dim", "depth", "num_heads"}
ORDER = (
    *(
        "run_name",
        "seed",
        "method",
        "make_demo",
        "raw",
        "recipe",
        "pretrained",
        "checkpoint",
        "data",
        "eval_data",
    ),
    *("augment", "model", "optimizer", "lars", "schedule", "trainer", "checkpoints"),
    *("algorithms", "callbacks", "loggers"),
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "yamls"))


def header_of(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return list(itertools.takewhile(lambda line: line.startswith("#"), lines))


def commands_of(path: Path) -> list[list[str]]:
    """Return the commands of a header, each as [script, file.yaml, ..., key=value, ...]."""
    header = "\n".join(header_of(path)).replace("\\\n#", "")
    found = re.findall(r"^#   (?:composer(?: -n 8)?|python) ([^#\n]+)", header, re.MULTILINE)
    makes_data = ("data_prep.py", "benchmarks/draw_world.py")
    return [command.split() for command in found if not command.startswith(makes_data)]


def names_a_run(path: Path) -> bool:
    """Return whether a file, or the files that it overlays, start from the encoder of a run."""
    files = [ROOT / word for word in commands_of(path)[0] if word.endswith(".yaml")]
    config = OmegaConf.merge(*map(OmegaConf.load, files))
    return bool(config.get("pretrained") or config.get("checkpoint"))


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)
every_comparison = pytest.mark.parametrize("path", COMPARISONS, ids=name_of)


@every_file
def test_header_gives_command_hardware_cost_and_expected_result(path):
    header = header_of(path)
    text = "\n".join(header)
    assert all(len(line) <= 100 for line in path.read_text().splitlines())
    assert re.match(r"# [A-Z]", header[0])
    assert all(str(path.relative_to(ROOT)) in command for command in commands_of(path))
    assert commands_of(path)
    order = [text.index(part) for part in ("\n#   ", "\n# Hardware: ", " Cost: ", "\n# Expected: ")]
    assert order == sorted(order)


@every_file
def test_every_command_in_a_header_is_taken_by_its_stage(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, *arguments in commands_of(path):
        config = CONFIGS[script]
        if script in STAGES:
            check_keys(script, config.__name__, arguments)
        config(**load_config(arguments, config))


@every_file
def test_marks_of_sources_are_explained_in_the_header(path):
    header, text = "\n".join(header_of(path)), path.read_text()
    used = set(re.findall(r"#.*?(\[(?:[a-z]+|\?)\])", text.removeprefix(header)))
    assert all(f"{mark}: " in header for mark in used)


@every_file
def test_blocks_stand_in_one_order_in_all_files(path):
    blocks = [key for key in OmegaConf.load(path) if key in ORDER]
    assert blocks == sorted(blocks, key=ORDER.index)


@pytest.mark.parametrize("path", [path for path in FILES if names_a_run(path)], ids=name_of)
def test_sizes_of_the_encoder_are_left_to_the_run_that_a_file_names(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = commands_of(path)[0]
    config = load_config(arguments, CONFIGS[script])
    assert ENCODER_SIZES.isdisjoint(config.get("model") or {})


def plain_attributes(module: torch.nn.Module) -> str:
    plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float)}
    return f"{type(module).__name__} {plain}"


def counted_once(count: Callable, counts: dict[str, float], only_class: bool) -> Callable:
    """Return a function that counts operations or memory, or looks up what it has counted before.

    Args:
        counts: the earlier results; counting takes seconds.
        only_class: whether models and batches of any size count as equal if their class is.
    """

    def look_up(net: torch.nn.Module, sample: dict[str, Tensor], *arguments: object) -> float:
        parts = [type(net), *arguments[1:]]
        if not only_class:
            parts += [plain_attributes(module) for module in net.modules()]
            parts += [(weight.shape, weight.requires_grad) for weight in net.parameters()]
            parts += [tensor.shape for tensor in sample.values()]
            parts += arguments
        key = f"{count.__name__} {parts}"
        if key not in counts:
            counts[key] = count(net, sample, *arguments)
        return counts[key]

    return look_up


@pytest.fixture(scope="module")
def counts() -> dict[str, float]:
    return {}


@pytest.mark.parametrize(
    "path",
    # The samples of one's own data are not known before they are converted.
    [path for path in FILES if commands_of(path)[0][0] in STAGES and "own" not in path.stem],
    ids=name_of,
)
def test_plan_needs_neither_data_nor_gpus_and_gives_the_cost_in_the_header(
    path, counts, tmp_path, monkeypatch, capsys
):
    header = "\n".join(header_of(path))
    memory = re.search(r"8 GPUs with (\d+) GB each", header)
    for count in (flops_per_sample, peak_bytes):
        only_class = count is peak_bytes and not memory
        once = counted_once(count, counts, only_class)
        monkeypatch.setattr(f"training.plan.{count.__name__}", once)
    monkeypatch.chdir(tmp_path)  # a folder without data and runs
    script, *arguments = commands_of(path)[0]
    arguments = [str(ROOT / word) if word.endswith(".yaml") else word for word in arguments]
    monkeypatch.setattr("sys.argv", [script, *arguments, "--plan=8"])
    STAGES[script].main()
    printed = capsys.readouterr().out
    for word in ("weights", "a sample", "samples", "memory", "cost"):
        assert re.search(rf"^{word} +[\d.]+", printed, re.MULTILINE), word
    if memory:
        planned = re.search(r"memory +([\d.]+) GB on each", printed)[1]
        assert round(float(planned)) == int(memory[1])
    stated = re.search(r"([\d,.]+) GPU-hours", header)
    if stated:
        assert stated[1] == re.search(r"cost +([\d,.]+) GPU-hours", printed)[1]
    else:
        assert "2 CPU cores" in header or "Cost: 2.25 times the cost of the base file" in header


@every_comparison
def test_every_row_of_a_comparison_is_a_command_of_a_stage_and_differs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = load_config([str(path)], compare.CompareConfig)["comparison"]["methods"]
    assert "vicmae" in rows
    configs = [compare.config_of(command) for command in rows.values()]
    with torch.device("meta"):
        encoders = [compare.new_encoder(command) for command in rows.values()]
    for config, encoder in zip(configs, encoders, strict=True):
        if isinstance(config, PretrainConfig):
            sizes = (encoder.img_size, encoder.num_patches, encoder.num_frames)
            PretrainingViews(*sizes, **config.augment)
    settings = [config.given() | {"run_name": ""} for config in configs]
    assert all(one != other for one, other in itertools.combinations(settings, 2))
