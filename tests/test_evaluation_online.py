"""The effective rank and the online probe of features in training."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import losses, read_metrics, run_stage, small

import pretrain
from evaluation.online import EffectiveRank, OnlineProbe, effective_rank

BOTH = "callbacks={EffectiveRank: {}, OnlineProbe: {}}"


def test_effective_rank_counts_equal_directions_and_weighs_unequal_ones():
    axes = torch.linalg.qr(torch.randn(8, 8))[0]
    for rank in (1, 3, 8):
        features = torch.randn(50, rank).qr()[0] @ axes[:rank]  # `rank` equal singular values
        assert effective_rank(features) == pytest.approx(rank, rel=1e-4)
    two = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(two) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_collapsed_features_are_warned_of(capsys):
    logged = {}
    logger = SimpleNamespace(log_metrics=logged.update)
    direction = torch.randn(1, 1, 16)
    state = SimpleNamespace(outputs={"features": torch.rand(12, 2, 1) * direction})
    EffectiveRank().epoch_end(state, logger)
    assert logged["effective_rank"] == pytest.approx(1, abs=0.01)
    assert "the features collapse: their effective rank is 1.0" in capsys.readouterr().out
    state.outputs["features"] = torch.randn(12, 2, 16)
    EffectiveRank().epoch_end(state, logger)
    assert capsys.readouterr().out == ""


def test_online_probe_learns_what_a_linear_head_can_and_skips_unlabelled_samples(demo):
    probe = OnlineProbe([str(demo / "train_images")], learning_rate=0.1)
    centres = torch.randn(10, 16)
    logged = {}
    logger = SimpleNamespace(log_metrics=logged.update)
    for _ in range(2):
        for _ in range(40):
            labels = torch.randint(10, (32,))
            features = centres[labels] + 0.1 * torch.randn(32, 16)
            labels[:8] = -1
            outputs = {"features": features[:, None].requires_grad_()}
            state = SimpleNamespace(outputs=outputs, batch={"target": labels})
            probe.after_forward(state, logger)
        assert probe.counts[1] == 40 * 24
        probe.epoch_end(state, logger)
        assert probe.counts.tolist() == [0, 0]
    assert logged["online_probe"] > 0.95
    assert outputs["features"].grad is None


def test_watching_changes_no_loss_and_resumes_to_the_bit(demo, tmp_path):
    arguments = [*small(demo), "data.num_workers=0", "schedule.t_max=2ep", "callbacks=null"]
    arguments += ["checkpoints.interval=1ba"]
    run_stage(pretrain, [*arguments, "run_name=plain"], tmp_path)
    run_stage(pretrain, [*arguments, BOTH, "run_name=watched"], tmp_path)
    assert losses(tmp_path, "watched") == losses(tmp_path, "plain")
    run_stage(pretrain, [*arguments, BOTH, "run_name=half", "trainer.max_duration=4ba"], tmp_path)
    run_stage(pretrain, [*arguments, BOTH, "run_name=half"], tmp_path)

    def watched(name: str) -> list[tuple]:
        keys = ("effective_rank", "online_probe")
        lines = [line for line in read_metrics(tmp_path, name) if keys[0] in line]
        return [tuple(line[key] for key in keys) for line in lines]

    assert len(watched("watched")) == 2
    assert watched("half") == watched("watched")
    assert all(1 < rank <= 20 and 0 <= accuracy <= 1 for rank, accuracy in watched("half"))
