"""A run from its start to result.json: refusals, resumption, and what it logs."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    error_of,
    losses,
    read_metrics,
    read_result,
    run_stage,
    small,
)

import finetune
import pretrain
import training.run
from model import Classifier
from shards.augment import normalise
from shards.views import EvalViews
from shards.workers import exit_at_once
from training.checkpoints import Checkpoints
from training.weights import LATEST, read_checkpoint


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    """Two epochs of three steps, without measurements."""
    return [*small(demo), "schedule.t_max=2ep", "callbacks=null", "data.num_workers=0"]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_stage(pretrain, [*arguments, "run_name=run"], folder)
    return folder


def weights_of(folder: Path, run_name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(str(folder / "runs" / run_name / "checkpoints" / LATEST))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Starting a run


def test_finished_run_ends_the_program_without_an_error(uninterrupted, arguments, tmp_path):
    shutil.copytree(uninterrupted / "runs", tmp_path / "runs", symlinks=True)
    before = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    for change in ("trainer.max_duration=1ep", "callbacks={LRMonitor: {}}"):
        with pytest.raises(SystemExit) as end:
            run_stage(pretrain, [*arguments, "run_name=run", change], tmp_path)
        assert end.value.code == 0
    assert (tmp_path / "runs" / "run" / "metrics.jsonl").read_text() == before


def test_finished_run_trains_on_if_its_duration_is_raised(
    uninterrupted, arguments, tmp_path, capfd
):
    shutil.copytree(uninterrupted / "runs", tmp_path / "runs", symlinks=True)
    longer = [*arguments, "run_name=run", "trainer.max_duration=3ep", "schedule.t_max=3ep"]
    config = tmp_path / "runs/run/config.yaml"
    config.write_text(config.read_text().replace("t_max: 2ep", "t_max: 3ep"))
    index = tmp_path / "runs/run/data_sets.json"  # a launch that is refused keeps the result
    record = index.read_text()
    index.write_text(record.replace('"samples": "', '"samples": "x'))
    assert "other samples than" in error_of(pretrain, longer, tmp_path)
    assert (tmp_path / "runs/run/result.json").exists()
    index.write_text(record)
    run_stage(pretrain, longer, tmp_path)
    assert "runs/run was finished, and continues to 3ep" in capfd.readouterr().out
    assert len(losses(tmp_path, "run")) == 9
    assert losses(tmp_path, "run")[:6] == losses(uninterrupted, "run")
    with pytest.raises(SystemExit) as end:
        run_stage(pretrain, longer, tmp_path)
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["trainer.max_duration=0ep"], "trainer.max_duration: give a positive duration"),
        (["trainer.max_duration=null"], "trainer.max_duration"),
        (["trainer.parallelism_config={fspd: {}}"], "trainer.parallelism_config.fspd: unknown key"),
        (["trainer.parallelism_config={fsdp: {stage: 3}}"], "parallelism_config.fsdp: "),
        (["trainer.compile_config={bogus: 1}"], "trainer, algorithms, callbacks or loggers: Type"),
    ],
)
def test_settings_that_composer_or_fsdp_would_refuse_are_named_before_training(
    arguments, tmp_path, overrides, complaint
):
    assert complaint in error_of(pretrain, [*arguments, *overrides], tmp_path)


def test_early_warning_of_slurm_is_handled_while_the_ranks_still_join(
    arguments, tmp_path, monkeypatch
):
    handlers = []

    def look(device: str | None, timeout: float) -> None:
        handlers.extend(map(signal.getsignal, (signal.SIGUSR1, signal.SIGUSR2)))
        raise ValueError("enough")

    monkeypatch.setattr(training.run, "join_ranks", look)
    warning = "checkpoints.stop_signals=[SIGUSR1]"
    assert "enough" in error_of(pretrain, [*arguments, warning], tmp_path)
    assert handlers == [exit_at_once, signal.SIG_DFL]


def test_disk_that_is_full_at_the_end_of_a_run_is_one_line(tmp_path, monkeypatch):
    def write_json(self, name: str, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{self.root}/{name}")

    monkeypatch.setattr(training.run.Storage, "write_json", write_json)
    with pytest.raises(SystemExit, match=r"result\.json: No space left on device; free some space"):
        training.run.finish_run(tmp_path, {})


# Resuming


def exit_before(step: int) -> Callable:
    """Return a batch_start for Checkpoints that ends the program before a step."""

    def batch_start(self, state, logger) -> None:
        if state.timestamp.batch.value == step - 1:
            raise SystemExit

    return batch_start


@pytest.mark.parametrize(("step", "num_workers"), [(4, 0), (5, 1)])
def test_run_resumes_from_the_checkpoint_of_an_epoch_with_the_next_epoch(
    arguments, tmp_path, monkeypatch, num_workers, step
):
    longer = ["trainer.max_duration=3ep", "schedule.t_max=3ep"]
    arguments = [*arguments, *longer, f"data.num_workers={num_workers}"]
    run_stage(pretrain, [*arguments, "run_name=one"], tmp_path)
    arguments += ["run_name=other", "checkpoints.interval=1ep"]
    for last in (step, step + 3):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Checkpoints, "batch_start", exit_before(last))
            run_stage(pretrain, arguments, tmp_path)
    run_stage(pretrain, arguments, tmp_path)
    assert losses(tmp_path, "other") == losses(tmp_path, "one")
    assert len(losses(tmp_path, "one")) == 9


@pytest.mark.parametrize(("stop", "repeats"), [("1ep", 1), ("4ba", 1), ("4ba", 2)])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(
    arguments, tmp_path, stop, repeats
):
    arguments = [*arguments, "checkpoints.interval=1ba", f"data.repeats={repeats}"]
    run_stage(pretrain, [*arguments, "run_name=one"], tmp_path)
    arguments.append("run_name=other")
    run_stage(pretrain, [*arguments, f"trainer.max_duration={stop}"], tmp_path)
    (tmp_path / "runs" / "other" / "result.json").unlink()
    run_stage(pretrain, arguments, tmp_path)
    assert_equal(weights_of(tmp_path, "other"), weights_of(tmp_path, "one"))
    assert losses(tmp_path, "other") == losses(tmp_path, "one")
    assert len(losses(tmp_path, "one")) == 6 * repeats


# What a run logs


def test_run_logs_losses_gradients_learning_rates_and_speed(arguments, demo, tmp_path):
    speed = "SpeedMonitor: {window_size: 2, gpu_flops_available: 1e12}"
    runtime = "RuntimeEstimator: {skip_batches: 1}"
    knn = f"KNN: {{bank: [{demo}/train_images], queries: [{demo}/test_images], every: 1}}"
    callbacks = f"callbacks={{{speed}, {runtime}, LRMonitor: {{}}, {knn}}}"
    run_stage(pretrain, [*arguments, "run_name=run", callbacks], tmp_path)
    result = read_result(tmp_path, "run")
    expected = {f"loss/train/{name}" for name in ("total", "reconstruction", "contrastive")}
    expected |= {"loss/train/accuracy", "loss/train/feature_std", "gradient_norm"}
    expected |= {"lr-AdamW/group0", "throughput/device/mfu", "throughput/samples_per_sec"}
    assert expected <= result.keys()
    assert any("remaining" in name for name in result)
    used = result["throughput/device/flops_per_sec"]
    assert result["throughput/device/mfu"] == pytest.approx(used / 1e12)
    per_sample = used / result["throughput/device/samples_per_sec"]
    assert result["flops_per_sample"] == pytest.approx(per_sample, rel=1e-4)
    lines = read_metrics(tmp_path, "run")
    assert [line["step"] for line in lines if "knn/trained" in line] == [3, 6]
    assert [line["step"] for line in lines if "flops_per_sample" in line] == [1]


def test_tensorboard_and_wandb_are_chosen_by_a_line_of_yaml_each(arguments, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tensorboard = "TensorboardLogger: {flush_interval: 1}"
    wandb = "WandBLogger: {project: vic-mae, init_kwargs: {notes: none}}"
    loggers = f"loggers={{{tensorboard}, {wandb}, FileLogger: {{}}}}"
    arguments = [*arguments, "run_name=run", "trainer.max_duration=2ba", loggers]
    run_stage(pretrain, arguments, tmp_path)
    run = tmp_path / "runs" / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    events = EventAccumulator(str(next((run / "tensorboard").rglob("events.out.*")).parent))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss/train/total")]
    assert logged == pytest.approx(losses(tmp_path, "run"), rel=1e-6)
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    (log,) = run.glob("logs-*-rank0.txt")
    assert "loss/train/total" in log.read_text()


OWN_CALLBACK = """
from composer import Callback

class CountSteps(Callback):
    def __init__(self, *, start: int = 0):
        self.steps = start

    def batch_end(self, state, logger):
        self.steps += 1
        logger.log_metrics({"own/steps": self.steps})
"""


def test_callback_of_ones_own_is_named_with_its_module(arguments, tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(OWN_CALLBACK)
    monkeypatch.syspath_prepend(str(tmp_path))
    callback = "callbacks={own_module.CountSteps: {start: 10}}"
    run_stage(pretrain, [*arguments, callback, "trainer.max_duration=2ba"], tmp_path)
    assert read_result(tmp_path, "demo")["own/steps"] == 12


def test_fine_tuning_evaluates_and_stores_the_averages_of_ema(demo, pretrained, tmp_path):
    """The averages have a half-life of half the run, so they are nearer to the initial weights."""
    arguments = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        f"pretrained={pretrained}",
        "data.global_train_batch_size=20",
        "data.num_workers=0",
        "model.num_frames=1",
        f"data.streams=[{{path: {demo}/train_images}}]",
        f"eval_data.paths=[{demo}/test_images]",
        "trainer.max_duration=2ep",
        "algorithms={EMA: {half_life: 3ba, update_interval: 1ba}}",
    ]
    run_stage(finetune, arguments, tmp_path)
    path = tmp_path / "runs" / "finetune_demo" / "checkpoints" / LATEST
    averages, start = read_checkpoint(str(path)), read_checkpoint(str(pretrained))
    trained = torch.load(path, weights_only=False)["state"]["model"]
    name = "encoder.blocks.0.mlp.fc1.weight"
    assert (averages[name] - start[name]).norm() < (trained[name] - start[name]).norm()
    net = Classifier(10, img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4).eval()
    net.load_state_dict(averages)
    views, right = EvalViews([f"{demo}/test_images"], 32, crop_pct=1.0), 0
    for number in range(len(views)):
        sample = views[number]
        with torch.no_grad():
            logits = net({"inputs": normalise(sample["inputs"][None])})
        right += int(logits[0, 0].argmax()) == int(sample["target"])
    found = read_result(tmp_path, "finetune_demo")["metrics/eval/top1"]
    assert found == pytest.approx(right / 60, abs=1e-6)


def test_finished_run_stays_finished_if_its_duration_is_given_in_steps(
    uninterrupted, arguments, tmp_path, capfd
):
    shutil.copytree(uninterrupted / "runs", tmp_path / "runs", symlinks=True)
    with pytest.raises(SystemExit) as end:
        run_stage(pretrain, [*arguments, "run_name=run", "trainer.max_duration=6ba"], tmp_path)
    assert end.value.code == 0
    assert "runs/run is finished" in capfd.readouterr().out


def test_data_sets_of_knn_and_of_validations_are_compared_when_a_run_resumes(demo, tmp_path):
    data = shutil.copytree(demo / "test_images", tmp_path / "queries")
    knn = f"callbacks={{KNN: {{bank: [{demo}/train_images], queries: [{data}]}}}}"
    arguments = [*small(demo)[:-1], knn, "data.num_workers=0", "run_name=run"]
    run_stage(pretrain, [*arguments, "trainer.max_duration=1ba"], tmp_path)
    record = json.loads((tmp_path / "runs/run/data_sets.json").read_text())
    assert {str(data), f"{demo}/train_images", f"{demo}/train_videos"} == record.keys()
    classes = json.loads((data / "classes.json").read_text())
    (data / "classes.json").write_text(json.dumps(classes[::-1]))
    error = error_of(pretrain, [*arguments, "trainer.max_duration=2ba"], tmp_path)
    assert f"{data} has other classes (" in error
