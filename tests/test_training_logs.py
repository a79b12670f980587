"""The lines of metrics.jsonl, and the norm of the gradient in them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics, run_stage, small
from tiny_models import state_at

import pretrain
from training.checkpoints import Checkpoints
from training.logs import JsonLines


def test_lines_after_the_checkpoint_and_a_cut_line_are_removed_when_a_run_resumes(tmp_path):
    file = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 2, "top1": 0.5}\n'
    file.write_text(kept + '{"step": 3, "loss": 2.0}\n{"step": 4, "lo')
    JsonLines(file).fit_start(state_at(2), None)
    assert file.read_text() == kept


def test_line_has_all_that_was_logged_since_the_line_before(tmp_path):
    logger = JsonLines(tmp_path / "metrics.jsonl")
    state = state_at(5)
    state.timestamp.epoch = SimpleNamespace(value=2)
    logger.log_metrics({"loss": torch.tensor(1.5), "lr": 0.1})
    logger.log_metrics({"loss": 0.5})
    logger.batch_end(state, None)
    logger.epoch_end(state, None)  # has nothing to write
    logger.log_metrics({"top1": 1})
    logger.eval_end(state, None)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    step = {"step": 5, "epoch": 2}
    assert list(lines) == [step | {"loss": 0.5, "lr": 0.1}, step | {"top1": 1.0}]


def test_logged_gradient_norm_is_the_norm_before_clipping(demo, tmp_path, monkeypatch):
    norms = []

    def after_backward(self, state, logger) -> None:
        squares = [
            weight.grad.square().sum()
            for weight in state.model.parameters()
            if weight.grad is not None
        ]
        norms.append(float(sum(squares).sqrt()))

    monkeypatch.setattr(Checkpoints, "after_backward", after_backward, raising=False)
    clip = "algorithms={GradientClipping: {clipping_type: norm, clipping_threshold: 0.01}}"
    short = ["trainer.max_duration=2ba", "callbacks=null", "data.num_workers=0"]
    run_stage(pretrain, [*small(demo), *short, clip], tmp_path)
    logged = [
        line["gradient_norm"] for line in read_metrics(tmp_path, "demo") if "gradient_norm" in line
    ]
    assert logged == pytest.approx(norms, rel=1e-5) and min(logged) > 0.02
