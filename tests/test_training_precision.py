"""Products of fp32 numbers without TF32, and bfloat16 on a CPU."""

import functools
from collections.abc import Iterator

import pytest
import torch
from composer import Event, Trainer
from conftest import losses, run_stage, signal_at, small
from test_eval import evaluate_file, save_classifier
from torch import nn

import eval as evaluation
import pretrain
from training.checkpoints import STOPPED, Checkpoints
from training.precision import BFloat16OnCPU
from training.weights import read_checkpoint

BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn)


def allowed() -> list[bool]:
    return [backend.allow_tf32 for backend in BACKENDS]


def allow(values: list[bool]) -> None:
    for backend, value in zip(BACKENDS, values, strict=True):
        backend.allow_tf32 = value


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> Iterator[None]:
    """TF32 is allowed, and Composer's Trainer allows it once more as it is built."""
    before, build = allowed(), Trainer.__init__

    @functools.wraps(build)
    def build_as_on_a_gpu(*args, **keywords):
        build(*args, **keywords)
        allow([True, True])

    monkeypatch.setattr(Trainer, "__init__", build_as_on_a_gpu)
    allow([True, True])
    yield
    allow(before)


def test_tf32_which_composer_allows_on_gpus_is_off_when_a_run_trains(demo, tmp_path, as_on_a_gpu):
    short = ["callbacks=null", "trainer.max_duration=1ba", "data.num_workers=0"]
    run_stage(pretrain, [*small(demo), *short], tmp_path)
    assert allowed() == [False, False]


def test_tf32_which_composer_allows_on_gpus_is_off_in_accuracy_and_probes(
    demo, tmp_path, as_on_a_gpu, monkeypatch
):
    found = []

    def recorded(function):
        def call(*args, **keywords):
            found.append(allowed())
            return function(*args, **keywords)

        return call

    monkeypatch.setattr(Trainer, "eval", recorded(Trainer.eval))
    monkeypatch.setattr(evaluation, "measure_probe", recorded(evaluation.measure_probe))
    save_classifier(tmp_path / "classifier.pt")
    paths, bank = [str(demo / "test_images")], [str(demo / "train_images")]
    probes = {"bank": bank, "queries": paths, "labels_per_class": [1]}
    evaluate_file(tmp_path, accuracy={"paths": paths}, probe=probes)
    assert found == [[False, False]] * 2


def test_half_precision_on_a_cpu_multiplies_in_bfloat16_and_resumes_to_the_bit(
    demo, tmp_path, monkeypatch
):
    arguments = [*small(demo), "schedule.t_max=2ep", "callbacks=null", "data.num_workers=0"]
    run_stage(pretrain, [*arguments, "run_name=full"], tmp_path)
    arguments.append("trainer.precision=amp_bf16")
    kinds, forward = set(), nn.Linear.forward

    def watched(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        kinds.add(y.dtype)
        return y

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", watched)
        # Reconstructions are drawn in fp32 after the training.
        patch.setattr(pretrain, "draw_reconstructions", lambda *_: None)
        run_stage(pretrain, [*arguments, "run_name=one"], tmp_path)
    assert kinds == {torch.bfloat16}
    weights = read_checkpoint(str(tmp_path / "runs" / "one")).values()
    floating = [value for value in weights if value.is_floating_point()]
    assert len(floating) > 10 and {value.dtype for value in floating} == {torch.float32}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "batch_start", signal_at(5))
        with pytest.raises(SystemExit) as end:
            run_stage(pretrain, [*arguments, "run_name=other"], tmp_path)
    assert end.value.code == STOPPED
    run_stage(pretrain, [*arguments, "run_name=other"], tmp_path)
    half, full = losses(tmp_path, "one"), losses(tmp_path, "full")
    assert losses(tmp_path, "other") == half != full
    assert half == pytest.approx(full, rel=2e-2)  # bfloat16 has 8 significant bits


@pytest.mark.parametrize("event", [Event.BEFORE_FORWARD, Event.EVAL_BEFORE_FORWARD])
def test_only_the_forward_pass_is_in_bfloat16_in_training_and_in_validation(event):
    callback, layer = BFloat16OnCPU(), nn.Linear(2, 2)
    after = Event(event.value.replace("before", "after"))
    kinds = []
    for moment in (event, after):
        callback.run_event(moment, None, None)
        kinds.append(layer(torch.ones(1, 2)).dtype)
    assert kinds == [torch.bfloat16, torch.float32]
