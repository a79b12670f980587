"""FSDP2: its defaults, and its reductions of gradients, on two gloo ranks."""

from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from composer.core import Precision
from composer.distributed.fsdp2 import create_mixed_precision_policy
from conftest import losses, run_stage, small
from torch import nn

import pretrain
from training.fsdp import OneReduction, fsdp_config

FSDP = "trainer.parallelism_config={fsdp: {}}"


@pytest.fixture
def arguments(demo) -> list[str]:
    """Two steps of two micro-batches."""
    return [
        *small(demo),
        "data.global_micro_batch_size=20",
        "trainer.max_duration=2ba",
        "callbacks=null",
        "data.num_workers=0",
    ]


def run_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(pretrain, arguments, Path(folder))


def test_fsdp_without_settings_is_fsdp_with_weights_in_fp32():
    config = fsdp_config({"parallelism_config": {"fsdp": {}}}, [], nn.Linear(1, 1))
    policy = create_mixed_precision_policy(Precision.AMP_BF16, config.mixed_precision)
    assert policy.param_dtype is None  # no cast
    assert fsdp_config({"parallelism_config": {"fsdp": None}}, [], nn.Linear(1, 1)) is None
    assert fsdp_config({}, [], nn.Linear(1, 1)) is None


def test_fsdp_has_the_losses_of_ddp_under_autocast(arguments, on_ranks, tmp_path):
    half = "trainer.precision=amp_bf16"
    kinds = {"fp32": [], "ddp": [half], "fsdp": [half, FSDP]}
    for name, kind in kinds.items():
        on_ranks(2, run_rank, str(tmp_path), [*arguments, *kind, f"run_name={name}"])
    ddp = losses(tmp_path, "ddp")
    assert losses(tmp_path, "fsdp") == pytest.approx(ddp, rel=1e-6)
    assert losses(tmp_path, "fp32") != pytest.approx(ddp, rel=1e-6)
    checkpoints = tmp_path / "runs" / "fsdp" / "checkpoints"
    assert list(checkpoints.glob("ep*/__1_0.distcp"))  # a shard of rank 1


def count_reductions(rank: int, folder: str, arguments: list[str]) -> None:
    """Check that a step of two micro-batches reduces gradients as often as a step of one."""
    whole = "data.global_micro_batch_size=40"
    counts = {}
    with mock.patch.object(
        dist, "reduce_scatter_tensor", wraps=dist.reduce_scatter_tensor
    ) as calls:
        for name, changes in {"one": [whole], "two": [], "each": []}.items():
            if name == "each":
                OneReduction.before_backward = lambda self, state, logger: None
            run_rank(rank, folder, [*arguments, *changes, FSDP, f"run_name={name}"])
            counts[name] = calls.call_count
            calls.reset_mock()
    assert counts["each"] == 2 * counts["one"] > 0
    assert counts["two"] == counts["one"]


def test_fsdp_reduces_gradients_once_a_step(arguments, on_ranks, tmp_path):
    on_ranks(2, count_reductions, str(tmp_path), arguments)
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "each"), rel=1e-6)
