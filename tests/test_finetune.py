"""Fine-tuning and linear probes: LARS, held-out samples, and runs as a whole."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    corrupted_copy,
    error_of,
    read_metrics,
    read_result,
    run_stage,
)

import finetune
from evaluation.pictures import draw_curves
from finetune import LinearProbe, build_lars
from training.checkpoints import STOPPED, Checkpoints
from training.weights import LATEST, class_names_in, read_checkpoint

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
PLAIN = {"erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
FINETUNE_DEMO = str(ROOT / "yamls" / "finetune_demo.yaml")
LINPROBE_DEMO = str(ROOT / "yamls" / "linprobe_demo.yaml")


# Linear probes


def test_lars_equals_its_formula_with_a_learning_rate_for_each_head():
    net = LinearProbe(5, 2, **SIZES, head_init_std=0.01)
    lars = build_lars(net, 512, base_lrs=[2.0, 60.0], momentum=0.9, weight_decay=0.01)
    expected, speeds = [], []
    for head in net.head:
        values = {name: p.detach().double().numpy() for name, p in head.named_parameters()}
        expected.append(values)
        speeds.append(dict.fromkeys(values, 0.0))
    rng = np.random.default_rng(0)
    for _ in range(3):
        for head, values, speed, lr in zip(net.head, expected, speeds, (4.0, 120.0), strict=True):
            for name, parameter in head.named_parameters():
                gradient = rng.standard_normal(parameter.shape)
                parameter.grad = torch.from_numpy(gradient).float()
                if name == "weight":
                    length, slope = np.linalg.norm(values[name]), np.linalg.norm(gradient)
                    trust = 0.001 * length / (slope + 0.01 * length)
                    gradient = (gradient + 0.01 * values[name]) * trust
                speed[name] = 0.9 * speed[name] + gradient
                values[name] = values[name] - lr * speed[name]
        lars.step()
    for head, values in zip(net.head, expected, strict=True):
        for name, parameter in head.named_parameters():
            found = parameter.detach().numpy()
            np.testing.assert_allclose(found, values[name], rtol=1e-4, atol=1e-6)


def test_best_head_has_most_held_out_samples_right_and_recent_steps_count_more():
    net = LinearProbe(3, 2, **SIZES)
    labels = torch.tensor([0, 1, 2, -1])  # the last sample is not held out
    scores = torch.eye(3)[[0, 1, 2, 0]]
    first_is_right = torch.stack([scores, scores.roll(1, dims=1)], dim=1)  # (4, heads, 3)
    for _ in range(2):
        net.head.count(first_is_right, labels)
    assert net.head.best() == 0
    assert net.head.right.tolist() == pytest.approx([3 * 0.98 + 3, 0])
    for _ in range(2):
        net.head.count(first_is_right.flip(1), labels)
    assert net.head.best() == 1  # as many right as the first head, but later
    net.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=generator)
    assert torch.equal(net.head(x), net.head[1](x))


# Runs


def arguments_of(demo: Path, pretrained: Path, kind: str) -> list[str]:
    """Return overrides for a short run on the stills or clips of the small demonstration."""
    return [
        f"pretrained={pretrained}",
        f"data.streams=[{{path: {demo}/train_{kind}}}]",
        "data.global_train_batch_size=20",
        "data.num_workers=0",
        f"eval_data.paths=[{demo}/test_{kind}]",
    ]


@pytest.mark.parametrize("method", ["classifier", "linear_probe"])
@pytest.mark.parametrize(("num_frames", "kind"), [(1, "images"), (16, "videos")])
def test_images_and_clips_train_a_classifier_or_only_a_linear_head(
    demo, tmp_path, pretrained, num_frames, kind, method
):
    settings = [f"model.num_frames={num_frames}", f"method={method}", "trainer.max_duration=1ep"]
    arguments = [FINETUNE_DEMO, *arguments_of(demo, pretrained, kind), *settings]
    samples = 60
    if kind == "images":
        validation = corrupted_copy(demo / "test_images", tmp_path, 3)
        arguments.append(f"eval_data.paths=[{validation}]")
        samples = 59  # the corrupt sample does not count
    run_stage(finetune, arguments, tmp_path)
    result = read_result(tmp_path, "finetune_demo")
    assert 0 <= result["metrics/eval/top1"] <= result["metrics/eval/top5"] <= 1
    assert result["step"] == 3
    right = result["metrics/eval/top1"] * samples
    assert right == pytest.approx(round(right), abs=1e-4)
    before = read_checkpoint(str(pretrained))
    after = read_checkpoint(str(tmp_path / "runs" / "finetune_demo"))
    is_same = torch.equal(before["encoder.norm.weight"], after["encoder.norm.weight"])
    assert is_same is (method == "linear_probe")


def test_fine_tuning_prints_which_weights_were_loaded_and_the_accuracy(
    demo, tmp_path, pretrained, capfd
):
    short = ["trainer.max_duration=2ba", "trainer.eval_interval=2ba"]
    arguments = [FINETUNE_DEMO, *arguments_of(demo, pretrained, "videos"), *short]
    run_stage(finetune, arguments, tmp_path)
    printed = capfd.readouterr().out
    assert "encoder.blocks                     36" in printed
    top1 = read_result(tmp_path, "finetune_demo")["metrics/eval/top1"]
    assert f"top-1 {top1:.3f}" in printed.splitlines()[-1]
    page = (tmp_path / "runs" / "finetune_demo" / "report.html").read_text()
    assert f"<dd>{100 * top1:.1f} %</dd>" in page and "predict=[" in page


def test_random_weights_take_the_sizes_of_the_checkpoint_and_nothing_else(
    demo, tmp_path, pretrained, capfd
):
    arguments = [FINETUNE_DEMO, *arguments_of(demo, pretrained, "images"), "model.num_frames=1"]
    settings = ["optimizer.base_lr=1e-12", "optimizer.weight_decay=0", "trainer.max_duration=1ba"]
    run_stage(finetune, [*arguments, *settings, "random_weights=true", "seed=1"], tmp_path)
    assert "weights of" not in capfd.readouterr().out
    before = read_checkpoint(str(pretrained))
    after = read_checkpoint(str(tmp_path / "runs" / "finetune_demo"))
    for name, value in after.items():
        if name.startswith("encoder."):
            assert value.shape == before[name].shape
    name = "encoder.blocks.0.attn.qkv.weight"
    assert not torch.allclose(after[name], before[name], atol=1e-3)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("pretrained=nowhere.pt", "nowhere.pt does not exist"),
        ("model.pool=max", "model.pool=max: "),
        ("data.global_train_batch_size=21", "must be even for mixup and cutmix"),
        ("model.depth=4", "lacks 12 weights of the encoder"),
        ("augment.mixup=many", "augment.mixup=many: "),
        ("lars={base_lrs: [1.0]}", "give either the block optimizer (AdamW) or lars"),
        ("optimizer=null", "give either the block optimizer (AdamW) or lars"),
        ("augment.held_out=0.1", "augment.held_out=0.1: must be 0 without lars"),
        ("method=classifer", "method=classifer: must be one of classifier, omnivore, linear_probe"),
    ],
)
def test_mistake_in_fine_tuning_is_named_before_training(
    demo, tmp_path, pretrained, override, complaint
):
    arguments = [FINETUNE_DEMO, *arguments_of(demo, pretrained, "images"), "model.num_frames=1"]
    assert complaint in error_of(finetune, [*arguments, override], tmp_path)
    assert not (tmp_path / "runs" / "finetune_demo" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["method=classifier"], "lars: works for a linear probe only"),
        (["augment.held_out=0"], "augment.held_out=0: "),
        (["augment.mixup=0.8"], "augment.held_out=0.1: augment.mixup and augment.cutmix must be 0"),
        (["lars.base_lrs=[]"], "lars.base_lrs=[]: "),
        (["pretrained=null"], "model.img_size: missing, and pretrained=None has none"),
        (["pretrained=null", "random_weights=true"], "random_weights: needs the checkpoint"),
    ],
)
def test_mistake_in_a_linear_probe_is_named_before_training(
    demo, tmp_path, pretrained, overrides, complaint
):
    arguments = [LINPROBE_DEMO, *arguments_of(demo, pretrained, "images"), *overrides]
    assert complaint in error_of(finetune, arguments, tmp_path)


RECIPES = {  # overrides of each YAML
    "finetune_demo": [
        "model.drop_path=0.2",
        "model.dropout=0.1",
        "augment.erasing=0.5",
        "augment.cutmix=1.0",
    ],
    "linprobe_demo": [],
}


@pytest.fixture(scope="module", params=RECIPES)
def uninterrupted(request, demo, pretrained, tmp_path_factory) -> tuple[str, list[str], Path]:
    """The name of a YAML, arguments for six steps with a checkpoint each, the folder of the run."""
    kind = "videos" if request.param == "finetune_demo" else "images"
    arguments = [
        str(ROOT / "yamls" / f"{request.param}.yaml"),
        *arguments_of(demo, pretrained, kind),
        "schedule={t_warmup: 1ba, t_max: 2ep}",
        "trainer.max_duration=2ep",
        "trainer.eval_interval=1ep",
        "checkpoints={interval: 1ba, keep: 9}",
    ]
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_stage(finetune, [*arguments, *RECIPES[request.param], "run_name=one"], folder)
    return request.param, arguments, folder


def test_curves_of_a_fine_tuning_are_drawn(uninterrupted, capsys):
    _, _, folder = uninterrupted
    draw_curves(read_metrics(folder, "one"), folder / "loss.png")
    assert (folder / "loss.png").stat().st_size > 0
    assert not capsys.readouterr().out


def model_state(folder: Path, run_name: str, step: str = "ep1-ba6") -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint as they are stored, with all heads of a linear probe."""
    path = folder / "runs" / run_name / "checkpoints" / f"{step}.pt"
    return torch.load(path, weights_only=False)["state"]["model"]


def assert_ends_alike(folder: Path, run_name: str, expected: Path) -> None:
    """Assert that a run ended with the weights and the accuracy of the uninterrupted run."""
    ours, theirs = model_state(folder, run_name), model_state(expected, "one")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    found, result = read_result(folder, run_name), read_result(expected, "one")
    for name in ("metrics/eval/top1", "metrics/eval/top5"):
        assert found[name] == result[name]


def test_resumed_run_ends_with_the_weights_and_the_accuracy_of_an_uninterrupted_run(
    uninterrupted, tmp_path
):
    name, arguments, expected = uninterrupted
    arguments = [*arguments, *RECIPES[name], "run_name=other"]
    run_stage(finetune, [*arguments, "trainer.max_duration=4ba"], tmp_path)
    (tmp_path / "runs" / "other" / "result.json").unlink()
    run_stage(finetune, arguments, tmp_path)
    assert_ends_alike(tmp_path, "other", expected)
    before, after = model_state(expected, "one", "ep0-ba1"), model_state(expected, "one")
    heads = [name for name in after if name.startswith("head")]
    assert any(not torch.equal(before[name], after[name]) for name in heads)
    if name == "linprobe_demo":
        assert after["head.right"].sum() > 0
        base_lrs = [3.0, 10.0, 30.0, 100.0]
        best = base_lrs[int(after["head.right"].argmax())]
        assert read_result(tmp_path, "other")["base_lr"] == best


@pytest.mark.parametrize("step", [3, 6])
def test_sigterm_in_a_validation_is_obeyed_at_once_and_the_last_validation_is_made_up_for(
    uninterrupted, tmp_path, monkeypatch, step
):
    name, arguments, expected = uninterrupted
    arguments = [*arguments, *RECIPES[name], "run_name=other"]

    def eval_batch_start(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "eval_batch_start", eval_batch_start)
        with pytest.raises(SystemExit) as end:
            run_stage(finetune, arguments, tmp_path)
    assert end.value.code == STOPPED
    run_stage(finetune, arguments, tmp_path)
    assert_ends_alike(tmp_path, "other", expected)
    lines = read_metrics(tmp_path, "other")
    assert any(line["step"] == 6 and "metrics/eval/top1" in line for line in lines)


def finetune_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(finetune, arguments, Path(folder))


def test_two_ranks_train_and_validate_an_odd_number_of_samples_as_one_rank(
    demo, pretrained, odd_images, tmp_path, on_ranks
):
    """Without mixing, erasing and dropout, whose draws depend on the rank.

    Of 31 samples, the second rank gets one twice. In batches of 5, its last batch is that one.
    """
    arguments = [
        LINPROBE_DEMO,
        *arguments_of(demo, pretrained, "images"),
        f"eval_data={{paths: [{odd_images}], batch_size: 5}}",
        "trainer.max_duration=2ep",
        "trainer.eval_interval=1ep",
        "checkpoints={interval: 1ba, keep: 9}",
    ]
    run_stage(finetune, [*arguments, "run_name=one"], tmp_path)
    on_ranks(2, finetune_rank, str(tmp_path), [*arguments, "run_name=two"])
    one, two = read_metrics(tmp_path, "one"), read_metrics(tmp_path, "two")
    for key, count in (("loss/train/total", 6), ("metrics/eval/top1", 2), ("metrics/eval/top5", 2)):
        expected = [line[key] for line in one if key in line]
        assert len(expected) == count
        assert [line[key] for line in two if key in line] == pytest.approx(expected, rel=1e-5)
    top1 = read_result(tmp_path, "two")["metrics/eval/top1"]
    assert 31 * top1 == pytest.approx(round(31 * top1), abs=1e-4)


def test_two_ranks_fine_tune_as_one(demo, pretrained, tmp_path, on_ranks):
    plain = [f"augment.{key}={value}" for key, value in PLAIN.items()]
    short = ["trainer.max_duration=1ep", "checkpoints={interval: 1ba, keep: 9}"]
    arguments = [FINETUNE_DEMO, *arguments_of(demo, pretrained, "videos"), *plain, *short]
    run_stage(finetune, [*arguments, "run_name=one"], tmp_path)
    on_ranks(2, finetune_rank, str(tmp_path), [*arguments, "run_name=two"])
    one, two = read_metrics(tmp_path, "one"), read_metrics(tmp_path, "two")
    for key, count in (("loss/train/total", 3), ("metrics/eval/top1", 1)):
        expected = [line[key] for line in one if key in line]
        assert len(expected) == count
        assert [line[key] for line in two if key in line] == pytest.approx(expected, rel=1e-5)
    ours = read_checkpoint(str(tmp_path / "runs" / "two" / "checkpoints" / LATEST))
    theirs = read_checkpoint(str(tmp_path / "runs" / "one" / "checkpoints" / LATEST))
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_class_names_are_in_the_checkpoint_and_other_data_are_refused(
    demo, pretrained, tmp_path, capfd
):
    data = shutil.copytree(demo / "train_images", tmp_path / "data")
    names = json.loads((data / "classes.json").read_text())
    arguments = [
        LINPROBE_DEMO,
        *arguments_of(demo, pretrained, "images"),
        f"data.streams=[{{path: {data}}}]",
        f"eval_data.paths=[{demo}/train_images]",
        "run_name=run",
    ]
    run_stage(finetune, [*arguments, "trainer.max_duration=1ba"], tmp_path)
    assert "train_images: 1 of its shards are trained on too" in capfd.readouterr().out
    newest = tmp_path / "runs/run/checkpoints" / LATEST
    assert class_names_in(read_checkpoint(str(newest))) == names
    (data / "classes.json").write_text(json.dumps(names[::-1]))
    with pytest.raises(SystemExit) as end:
        run_stage(finetune, [*arguments, "trainer.max_duration=2ba"], tmp_path)
    found, before = ", ".join(names[:-6:-1]), ", ".join(names[:5])
    expected = f"data has other classes ({found} instead of {before}) than when runs/run was"
    assert expected in str(end.value)
    (data / "classes.json").write_text(json.dumps(names))
    index = json.loads((data / "index.json").read_text())
    (index["shards"][0]["raw_data"]["hashes"])["xxh64"] = "0" * 16
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="data has other samples than when runs/run was started"):
        run_stage(finetune, [*arguments, "trainer.max_duration=2ba"], tmp_path)
