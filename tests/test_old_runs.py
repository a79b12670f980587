"""Runs of an earlier version are resumed, loaded and evaluated.

tests/data/old_runs/README.md describes how they were made.
"""

import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, read_result, run_stage
from omegaconf import OmegaConf

import eval as evaluation
import finetune
import pretrain
from evaluation import probes
from model import ViCMAE
from shards.augment import normalise
from shards.views import EvalViews
from training.sizes import known_model
from training.weights import load_pretrained, read_checkpoint

OLD_RUNS = ROOT / "tests" / "data" / "old_runs"
ENCODER = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The working directory, with copies of the old runs and their data."""
    shutil.copytree(OLD_RUNS, tmp_path / "runs", symlinks=True)
    (tmp_path / "runs" / "train_images").rename(tmp_path / "train_images")
    (tmp_path / "runs" / "expected.npz").rename(tmp_path / "expected.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def latest(run_name: str) -> str:
    return f"runs/{run_name}/checkpoints/latest-rank0.pt"


# Where the gradient is 0, Adam follows the sign of rounding errors: at the bias of the keys, which
# softmax cancels, and at the biases before a BatchNorm, which show in its running mean alone.
WITHOUT_GRADIENT = [f"projector.{number}.bias" for number in (0, 3, 6)]
WITHOUT_GRADIENT += [f"projector.{number}.running_mean" for number in (1, 4, 7)]


def without_keys(bias: np.ndarray) -> np.ndarray:
    queries, _, values = np.split(bias, 3)
    return np.concatenate([queries, values])


ARGUMENTS = [
    str(ROOT / "yamls" / "demo.yaml"),
    "make_demo=null",
    "data.streams=[{path: train_images}]",
    "data.global_train_batch_size=10",
    "data.num_workers=0",
    *(f"model.{name}={size}" for name, size in ENCODER.items()),
    "model.decoder_embed_dim=8",
    "model.decoder_num_heads=2",
    "model.projector_hidden_dim=16",
    "model.projector_out_dim=16",
    "callbacks=null",
    "schedule.t_warmup=1ep",
    "schedule.t_max=4ep",
    "trainer.max_duration=4ep",
    "checkpoints.interval=1ep",
]
SHARDED = [
    "run_name=sharded",
    "trainer.parallelism_config={fsdp: {state_dict_type: sharded, activation_checkpointing: true}}",
]


def check_resumed(run_name: str, expected: list[dict[str, float]], folder: Path) -> None:
    """Check losses and final weights of a resumed run against the run of the old code."""
    found = read_metrics(folder, run_name)
    for name in ("loss/train/total", "loss/train/contrastive", "gradient_norm"):
        before = [line[name] for line in expected if name in line]
        after = [line[name] for line in found if name in line]
        assert len(before) == len(after) == 8
        assert after == pytest.approx(before, rel=1e-4)
    with np.load("expected.npz") as arrays:
        weights = {name: arrays[name] for name in arrays if name.startswith("final/")}
    ours = read_checkpoint(latest(run_name))
    assert len(weights) == sum(value.is_floating_point() for value in ours.values())
    for name, value in weights.items():
        name = name.removeprefix("final/")
        new = ours[name].numpy()
        if name in WITHOUT_GRADIENT:
            continue
        if name.endswith("qkv.bias"):
            value, new = without_keys(value), without_keys(new)
        np.testing.assert_allclose(new, value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_old_pretraining_resumes_and_ends_with_the_weights_of_the_old_code(old, capfd):
    expected = read_metrics(old, "demo")
    run_stage(pretrain, ARGUMENTS, old)
    assert "ep2-ba4.pt" in capfd.readouterr().out
    check_resumed("demo", expected, old)


def resume_sharded(rank: int, folder: str) -> None:
    with open(Path(folder, f"output-{rank}"), "w") as output, redirect_stdout(output):
        run_stage(pretrain, [*ARGUMENTS, *SHARDED], Path(folder))


def test_old_sharded_pretraining_resumes_and_ends_with_the_weights_of_one_rank(old, on_ranks):
    expected = read_metrics(old, "sharded")
    on_ranks(2, resume_sharded, str(old))
    assert "checkpoints/ep2-ba4" in (old / "output-0").read_text()
    check_resumed("sharded", expected, old)


@pytest.mark.parametrize("run_name", ["demo", "sharded"])
def test_every_weight_of_an_old_checkpoint_is_loaded_with_the_sizes_of_its_run(old, run_name):
    sizes = known_model(latest(run_name))["model"]
    net = ViCMAE(**sizes)
    report = load_pretrained(net, latest(run_name))
    assert sorted(report["loaded"]) == sorted(net.state_dict())
    assert (report["resized"], report["missing"], report["unused"]) == ([], [], [])


def test_fine_tuning_takes_the_sizes_of_an_old_run(old):
    arguments = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        f"pretrained={latest('demo')}",
        "run_name=new",
        "data.streams=[{path: train_images}]",
        "data.global_train_batch_size=10",
        "data.num_workers=0",
        "eval_data.paths=[train_images]",
        "model.num_frames=1",
        "trainer.max_duration=1ep",
    ]
    run_stage(finetune, arguments, old)
    assert read_result(old, "new")["step"] == 2
    before, after = read_checkpoint(latest("demo")), read_checkpoint(latest("new"))
    shapes = {name: value.shape for name, value in after.items() if name.startswith("encoder.")}
    assert shapes == {name: before[name].shape for name in shapes}


@pytest.mark.parametrize("run_name", ["finetune_demo", "linprobe_demo"])
def test_old_classifier_is_evaluated_without_any_size_in_the_command(old, run_name):
    accuracy = {"paths": ["train_images"], "crop_pct": 1.0}
    config = evaluation.EvalConfig(
        run_name="new", checkpoint=latest(run_name), device="cpu", accuracy=accuracy
    )
    result = evaluation.evaluate(config)
    with np.load("expected.npz") as arrays:
        expected, labels = arrays[run_name], arrays["labels"]
    ranks = (expected > expected[range(20), labels][:, None]).sum(axis=1)
    assert result["top1"] == pytest.approx((ranks < 1).mean())
    assert result["top5"] == pytest.approx((ranks < 5).mean())
    views = EvalViews(["train_images"], 32, crop_pct=1.0)
    inputs = normalise(torch.stack([views[number]["inputs"] for number in range(20)]))
    with torch.no_grad():
        found = evaluation.load_model(config).eval_forward({"inputs": inputs})
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_encoder_of_an_old_run_is_probed_and_its_reconstructions_are_drawn(old, monkeypatch):
    monkeypatch.setattr(probes, "shared_shards", lambda queries, bank: {})
    sets = {"bank": ["train_images"], "queries": ["train_images"], "crop_pct": 1.0}
    config = evaluation.EvalConfig(
        run_name="new",
        checkpoint=latest("demo"),
        device="cpu",
        probe=sets | {"k": 1, "features": "features.npz"},
        reconstructions=["train_images"],
    )
    evaluation.evaluate(config)
    net = ViCMAE(**OmegaConf.load("runs/demo/config.yaml").model)
    net.load_state_dict(torch.load(latest("demo"), weights_only=False)["state"]["model"])
    views = EvalViews(["train_images"], 32, crop_pct=1.0)
    inputs = normalise(torch.stack([views[number]["inputs"][0, 0] for number in range(20)]))
    with torch.no_grad():
        expected = net.eval().encoder(inputs)[:, 1:].mean(dim=1)
    found = np.load("features.npz")["queries_features"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert (old / "runs" / "new" / "reconstructions.png").stat().st_size > 0
