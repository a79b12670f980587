"""Pre-training as a stage: what a run writes, what it refuses, and that it learns."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    corrupted_copy,
    error_of,
    launch,
    losses,
    read_metrics,
    read_result,
    run_stage,
    run_stage_on_ranks,
    small,
)

import pretrain
from training.weights import LATEST, read_checkpoint


def test_command_line_pretrains_measures_and_draws_on_two_ranks(demo, tmp_path):
    result = launch(tmp_path, "pretrain.py", *small(demo), ranks=2)
    assert result.returncode == 0, result.stderr
    assert "k-NN accuracy" in result.stdout
    run = tmp_path / "runs" / "demo"
    assert len(losses(tmp_path, "demo")) == 6
    for line in read_metrics(tmp_path, "demo"):
        if "loss/train/total" in line:
            parts = 0.7 * line["loss/train/reconstruction"] + 0.3 * line["loss/train/contrastive"]
            assert line["loss/train/total"] == pytest.approx(parts, rel=1e-5)
    assert {"knn/random", "knn/trained"} <= read_result(tmp_path, "demo").keys()
    pictures = ("loss.png", "reconstructions.png", "report.html")
    for name in ("config.yaml", *pictures, f"checkpoints/{LATEST}"):
        assert (run / name).stat().st_size > 0


def test_two_ranks_log_what_one_rank_logs(demo, tmp_path):
    arguments = [*small(demo), "trainer.max_duration=4ba"]
    run_stage(pretrain, [*arguments, "run_name=one"], tmp_path)
    run_stage_on_ranks(pretrain, [*arguments, "run_name=two"], tmp_path, 2)
    one, two = read_result(tmp_path, "one"), read_result(tmp_path, "two")
    for key in ("loss/train/total", "loss/train/reconstruction", "loss/train/contrastive"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert two["knn/random"] == one["knn/random"]


def test_run_with_corrupt_training_and_evaluation_samples_finishes_and_lists_them(
    demo, tmp_path, capfd
):
    images = corrupted_copy(demo / "train_images", tmp_path, 0)
    queries = corrupted_copy(demo / "test_images", tmp_path, 59)
    arguments = [
        *small(demo),
        f"data.streams=[{{path: {images}}}]",
        "trainer.max_duration=1ep",
        "data.num_workers=0",
        f"callbacks.KNN.queries=[{queries}]",
    ]
    run_stage(pretrain, arguments, tmp_path)
    right = 59 * read_result(tmp_path, "demo")["knn/trained"]
    assert right == pytest.approx(round(right))
    run = tmp_path / "runs" / "demo"
    lines = (run / "unreadable_eval.jsonl").read_text().splitlines()
    names = {json.loads(line)[0] for line in lines}
    assert names == {f"{images}, sample 0", f"{queries}, sample 59"}
    assert (run / "reconstructions.png").exists()
    printed = capfd.readouterr().out
    assert "1 of 60 samples cannot be decoded or have no label, and do not count" in printed


def test_too_many_unreadable_samples_end_a_run_in_one_line(demo, tmp_path):
    images = corrupted_copy(demo / "train_images", tmp_path, *range(30))
    stream = f"data.streams=[{{path: {images}}}]"
    arguments = [*small(demo), stream, "data.num_workers=1", "callbacks=null"]
    with pytest.raises(SystemExit, match=r"^\S+: \d+ samples cannot be used, see \S+; [^\n]*$"):
        run_stage(pretrain, arguments, tmp_path)


def test_mistake_on_the_command_line_ends_in_one_line_before_anything_is_written(tmp_path):
    command = [sys.executable, str(ROOT / "pretrain.py"), str(ROOT / "yamls" / "demo.yaml")]
    result = subprocess.run(
        [*command, "model.detph=3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("pretrain.py: model.detph=3: ") and line.endswith("did you mean depth?")


@pytest.mark.parametrize(
    ("method", "overrides", "complaint"),
    [
        ("mae", ["algorithms={ContrastRamp: {duration: 2ep}}"], "algorithms.ContrastRamp: "),
        ("simclr", ["algorithms={PartialDecoding: {}}"], "algorithms.PartialDecoding: "),
        (None, ["augment.views=1"], "augment.views=1: must be 2"),
        (None, ["data.global_micro_batch_size=1"], "a micro-batch of 1 sample"),
        (None, ["data.global_train_batch_size=200"], "global_train_batch_size=200: must be at"),
    ],
)
def test_data_and_algorithms_that_do_not_suit_the_method_are_refused_before_training(
    demo, tmp_path, method, overrides, complaint
):
    base, *settings = small(demo)
    overlay = [str(ROOT / "yamls" / "methods" / f"{method}.yaml")] if method else []
    arguments = [base, *overlay, *settings, "callbacks=null", "data.num_workers=0", *overrides]
    assert complaint in error_of(pretrain, arguments, tmp_path)


def test_method_that_learns_from_labels_needs_data_sets_of_the_same_classes(demo, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(demo / "train_images", other)
    base, *settings = small(demo)
    overlay = str(ROOT / "yamls" / "methods" / "triplet_supervised.yaml")
    streams = f"data.streams=[{{path: {demo}/train_videos}}, {{path: {other}}}]"
    arguments = [base, overlay, *settings, streams]
    (other / "classes.json").write_text(json.dumps([f"class {number}" for number in range(10)]))
    assert "other: has classes that" in error_of(pretrain, arguments, tmp_path)
    (other / "classes.json").write_text("[]")
    assert "other has no labels" in error_of(pretrain, arguments, tmp_path)


SHRUNK = [  # yamls/vitl.yaml's keys, with values for 2 CPU ranks
    "model.img_size=32",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.decoder_embed_dim=24",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "model.projector_hidden_dim=32",
    "model.projector_out_dim=16",
    "data.global_train_batch_size=32",
    "data.global_micro_batch_size=8",
    "data.num_workers=0",
    "trainer.max_duration=2ba",
    "trainer.device=cpu",
    "trainer.compile_config=null",  # compiling takes a minute
]


def test_recipe_of_vitl_shrunk_by_overrides_trains_two_steps_with_fsdp_on_two_ranks(demo, tmp_path):
    streams = f"data.streams=[{{path: {demo}/train_images}}, {{path: {demo}/train_videos}}]"
    arguments = [str(ROOT / "yamls" / "vitl.yaml"), *SHRUNK, streams]
    run_stage_on_ranks(pretrain, arguments, tmp_path, 2)
    assert len(losses(tmp_path, "vitl")) == 2
    assert read_metrics(tmp_path, "vitl")[0]["flops_per_sample"] > 0
    newest = (tmp_path / "runs" / "vitl" / "checkpoints" / LATEST).resolve()
    assert newest.is_dir()  # a shard of each rank
    assert len([name for name in os.listdir(newest) if name.endswith(".distcp")]) == 2
    weights = read_checkpoint(str(tmp_path / "runs" / "vitl"))
    assert weights["encoder.blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.fixture
def without_determinism():
    yield
    torch.use_deterministic_algorithms(False)  # Composer turns it on for the process
    torch.backends.cudnn.benchmark = False


def test_deterministic_mode_takes_all_operations_of_a_step_and_changes_none_on_a_cpu(
    demo, tmp_path, without_determinism
):
    arguments = [*small(demo), "trainer.max_duration=2ba", "callbacks=null", "data.num_workers=0"]
    run_stage(pretrain, [*arguments, "run_name=plain"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=mode", "trainer.deterministic_mode=true"], tmp_path)
    assert torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path, "mode") == losses(tmp_path, "plain")
