"""Pre-training and what it stands on: configuration, views, streams, optimiser, the run as a whole."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from algorithms import CALLBACKS
from checkpoints import Checkpoints, read_checkpoint
from config import load_config
from conftest import ROOT, launch, run_stage, small, spoilt
from probes import infer, knn_accuracy
from sources import Recipe
from views import (
    MEAN,
    STD,
    EvalViews,
    PretrainingViews,
)

import data_prep
import pretrain
from model import ViCMAE


def test_run_whose_first_sample_and_whose_queries_are_spoilt_is_finished(demo, tmp_path, capfd):
    images, queries = (
        spoilt(demo / "train_images", tmp_path, 0),
        spoilt(demo / "test_images", tmp_path, 59),
    )
    base, *settings = small(demo)
    arguments = [
        base,
        *settings,
        f"data.streams=[{{path: {images}}}]",
        "trainer.max_duration=1ep",
        "data.num_workers=0",
    ]
    run_stage(pretrain, [*arguments, f"callbacks.KNN.queries=[{queries}]"], tmp_path)
    run = tmp_path / "runs" / "demo"
    right = 59 * json.loads((run / "result.json").read_text())["knn/trained"]
    assert right == pytest.approx(round(right))
    names = {
        json.loads(line)[0] for line in (run / "unreadable_eval.jsonl").read_text().splitlines()
    }
    assert (
        names == {f"{images}, sample 0", f"{queries}, sample 59"}
        and (run / "reconstructions.png").exists()
    )
    assert (
        "1 of 60 samples cannot be decoded, or have no label, and do not count"
        in capfd.readouterr().out
    )


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["model.contrast=none", "algorithms={ContrastRamp: {duration: 2ep}}"],
            "ContrastRamp: model.contrast is none",
        ),
        (
            ["model.mask=none", "algorithms={PartialDecoding: {}}"],
            "PartialDecoding: model.mask is none",
        ),
        (
            ["trainer.parallelism_config={fspd: {}}"],
            "trainer.parallelism_config.fspd is not a key here; the key is fsdp",
        ),
        (
            ["data.global_micro_batch_size=1"],
            "a micro-batch of 1 sample has no others to contrast with",
        ),
        (
            ["trainer.compile_config={bogus: 1}"],
            "trainer, algorithms, callbacks or loggers: TypeError",
        ),
        (["trainer.max_duration=0ep"], "trainer.max_duration is missing"),
        (["algorithms={MixUp: {}}"], "algorithms.MixUp is not a key of this block"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(demo, tmp_path, overrides, complaint):
    with pytest.raises(SystemExit) as end:
        run_stage(
            pretrain, [*small(demo), "callbacks=null", "data.num_workers=0", *overrides], tmp_path
        )
    assert complaint in str(end.value) and "\n" not in str(end.value)


def test_optimizer_decays_matrices_alone_and_holds_every_trainable_parameter_once():
    net = ViCMAE(32, 8, 48, 2, 3, 24, 1, 3, 32, 16)
    adamw = pretrain.build_optimizer(net, 512, base_lr=1e-3, weight_decay=0.05)
    assert {group["lr"] for group in adamw.param_groups} == {2e-3}
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(decay) == len(named) == sum(len(group["params"]) for group in adamw.param_groups)
    for name, parameter in named.items():
        bare = (
            name.endswith(".bias")
            or "norm" in name
            or name.split(".")[:2] in (["projector", "1"], ["projector", "4"])
        )
        assert decay[id(parameter)] == (0.0 if bare else 0.05), name
    assert not {"encoder.pos_embed", "decoder.pos_embed"} & named.keys()


def test_knn_accuracy_equals_a_loop_over_queries():
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(40, 6, generator=generator), torch.randint(4, (40,), generator=generator)
    asked = torch.randn(25, 6, generator=generator), torch.randint(4, (25,), generator=generator)
    right = 0
    for query, truth in zip(*asked, strict=True):
        cosine = [float(query @ x / query.norm() / x.norm()) for x in bank[0]]
        votes = [0.0] * 4
        for index in sorted(range(40), key=lambda i: -cosine[i])[:5]:
            votes[int(bank[1][index])] += math.exp(cosine[index] / 0.07)
        right += votes.index(max(votes)) == truth
    assert knn_accuracy(bank, asked, k=5) == right / 25


def labels_on_a_rank(rank: int, path: str, out: str) -> None:
    views = EvalViews([path], 8)
    found = infer(torch.nn.Linear(1, 1), lambda x: x.mean(dim=(1, 2, 4, 5)), views, batch_size=7)
    torch.save(found, f"{out}/{rank}")


def test_every_sample_is_inferred_once_and_in_order_on_one_rank_and_on_two(
    demo, tmp_path, on_ranks
):
    path = str(demo / "test_videos")
    on_ranks(2, labels_on_a_rank, path, str(tmp_path))
    views = EvalViews([path], 8)
    expected = [int(views[i]["target"]) for i in range(60)]
    colours = torch.stack(
        [
            TF.normalize(views[i]["inputs"] / 255, MEAN, STD).mean(dim=(0, 1, 3, 4))
            for i in range(60)
        ]
    )
    for rank in (0, 1):
        outputs, labels = torch.load(tmp_path / str(rank), weights_only=True)
        assert labels.tolist() == expected
        torch.testing.assert_close(outputs, colours, atol=1e-5, rtol=1e-5)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_run_of_another_configuration_is_refused_with_the_keys_that_differ(demo, tmp_path):
    arguments = [*small(demo), "trainer.max_duration=1ba", "callbacks=null"]
    run_stage(pretrain, arguments, tmp_path)
    with pytest.raises(SystemExit) as exit:
        run_stage(pretrain, [*arguments, "model.mask_ratio=0.7", "seed=5"], tmp_path)
    assert "runs/demo was begun with another model.mask_ratio, seed; give another run_name" in str(
        exit.value
    )
    with pytest.raises(SystemExit) as exit:
        run_stage(pretrain, [*arguments, "trainer.max_duration=9ba"], tmp_path)
    assert exit.value.code == 0


def test_data_set_without_labels_is_refused_where_labels_are_needed(demo, tmp_path):
    (tmp_path / "in").mkdir()
    still = next((demo / "raw" / "train" / "images" / "Bag").iterdir())
    (tmp_path / "in" / "x.jpg").write_bytes(still.read_bytes())
    data_prep.convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    with pytest.raises(ValueError, match="out has no labels"):
        data_prep.common_classes([str(tmp_path / "out")])


def test_command_line_pretrains_draws_and_says_when_it_is_finished(demo, tmp_path):
    result = launch(tmp_path, "pretrain.py", *small(demo))
    assert result.returncode == 0, result.stderr
    assert "k-NN accuracy" in result.stdout
    run = tmp_path / "runs" / "demo"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss/train/total" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    for line in lines:
        if "loss/train/total" in line:
            parts = 0.7 * line["loss/train/reconstruction"] + 0.3 * line["loss/train/contrastive"]
            assert line["loss/train/total"] == pytest.approx(parts, rel=1e-5)
    assert {"knn/random", "knn/trained"} <= json.loads((run / "result.json").read_text()).keys()
    for name in ("config.yaml", "loss.png", "reconstructions.png", "checkpoints/latest-rank0.pt"):
        assert (run / name).stat().st_size > 0
    written = (run / "metrics.jsonl").stat().st_mtime_ns
    again = launch(tmp_path, "pretrain.py", *small(demo))
    assert again.returncode == 0 and "is finished" in again.stdout
    assert (run / "metrics.jsonl").stat().st_mtime_ns == written


def test_two_ranks_log_what_one_rank_logs(demo, tmp_path):
    arguments = [*small(demo), "trainer.max_duration=4ba"]
    run_stage(pretrain, [*arguments, "run_name=one"], tmp_path)
    result = launch(tmp_path, "pretrain.py", *arguments, "run_name=two", ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = (
        json.loads((tmp_path / "runs" / name / "result.json").read_text())
        for name in ("one", "two")
    )
    for key in ("loss/train/total", "loss/train/reconstruction", "loss/train/contrastive"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert two["knn/random"] == one["knn/random"]


def test_command_line_ends_a_mistake_in_one_line_before_any_work(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "pretrain.py"),
        str(ROOT / "yamls" / "demo.yaml"),
        "model.detph=3",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert (
        result.stderr.strip()
        == "pretrain.py: model.detph=3: is not a key of this block; did you mean depth?"
    )


@pytest.mark.parametrize("overlay", [[], ["paper.yaml"], ["five.yaml"], ["vitl_fast.yaml"]])
@pytest.mark.parametrize("name", ["demo", "vits", "vitb", "vitl", "vith"])
def test_pretraining_yaml_constructs(name, overlay):
    files = [str(ROOT / "yamls" / file) for file in (f"{name}.yaml", *overlay)]
    config = load_config(files, pretrain.pretrain)
    with torch.device("meta"):
        net = ViCMAE(**config["model"])
    pairs = PretrainingViews(net.encoder.img_size, net.encoder.num_patches, **config["augment"])
    pretrain.build_optimizer(net, config["data"]["global_train_batch_size"], **config["optimizer"])
    pretrain.CosineAnnealingWithWarmupScheduler(**config["schedule"])
    pretrain.build_named(
        CALLBACKS, {k: v for k, v in config["callbacks"].items() if k != "KNN"}
    )  # needs data
    if overlay == ["paper.yaml"]:
        assert net.mask_ratio == 0.75 and pairs.frame_gap == "distant" and pairs.video.jitter == 0


def ends_at(step: int):
    def batch_start(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == step:
            raise SystemExit

    return batch_start


@pytest.mark.parametrize(("step", "num_workers"), [(3, 0), (4, 1)])
def test_run_goes_on_from_the_checkpoint_at_an_epochs_end_with_the_next_epoch(
    demo, tmp_path, monkeypatch, num_workers, step
):
    arguments = [
        *small(demo),
        "trainer.max_duration=3ep",
        "callbacks=null",
        f"data.num_workers={num_workers}",
    ]
    run_stage(pretrain, [*arguments, "run_name=whole"], tmp_path)
    for last in (step, step + 3):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Checkpoints, "batch_start", ends_at(last))
            run_stage(
                pretrain, [*arguments, "run_name=stopped", "checkpoints.interval=1ep"], tmp_path
            )
    run_stage(pretrain, [*arguments, "run_name=stopped"], tmp_path)
    lines = [
        (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        for name in ("whole", "stopped")
    ]
    whole, resumed = (
        [line["loss/train/total"] for line in map(json.loads, one) if "loss/train/total" in line]
        for one in lines
    )
    assert whole == resumed and len(whole) == 9


@pytest.mark.parametrize(("stop", "repeats"), [("1ep", 1), ("4ba", 1), ("4ba", 2)])
def test_resumed_run_ends_with_the_weights_of_one_never_stopped(demo, tmp_path, stop, repeats):
    arguments = [*small(demo), "schedule.t_max=2ep", "checkpoints.interval=1ba", "callbacks=null"]
    arguments += [f"data.repeats={repeats}"]
    run_stage(pretrain, [*arguments, "run_name=whole"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=stopped", f"trainer.max_duration={stop}"], tmp_path)
    (tmp_path / "runs" / "stopped" / "result.json").unlink()
    run_stage(pretrain, [*arguments, "run_name=stopped"], tmp_path)
    whole, resumed = (
        read_checkpoint(str(tmp_path / "runs" / name / "checkpoints" / "latest-rank0.pt"))
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "stopped" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss/train/total" in line] == [
        *range(1, 6 * repeats + 1)
    ]
