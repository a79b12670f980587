"""Ranks, chunks and compilation make training larger or faster, and leave a step as it is."""

import json
import math
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_stage, small
from tiny_models import TINY, random_batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import model
import pretrain
from model import ViCMAE
from model import info_nce as info_nce_of_all

STEPS, BATCH = 20, 8
LOSSES = ("total", "reconstruction", "contrastive")
BEFORE_NORM = ("projector.0.bias", "projector.3.bias")  # a BatchNorm follows: gradients are 0


def new_model(**changes) -> ViCMAE:
    torch.manual_seed(0)
    return ViCMAE(**TINY | changes).train()


def batch_of_step(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a batch of nearly equal views: partners are near each other from the first step on."""
    batch = random_batch(BATCH, seed=step)
    first, other = batch["views"].unbind(1)
    return {
        "views": torch.stack([first, first + 0.1 * other], dim=1).to(dtype),
        "noise": batch["noise"][:, :1].expand(-1, 2, -1).to(dtype),
    }


def take_step(net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return losses and gradients of a step, by name."""
    inner = getattr(net, "module", net)
    losses = inner.loss(net(batch), batch)
    losses["total"].backward()
    trained = [(name, p) for name, p in inner.named_parameters() if p.requires_grad]
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in trained}
    return {name: losses[name].detach() for name in LOSSES} | gradients


def this_rank() -> tuple[int, int]:
    """Return rank and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def train(
    steps: int, dtype: torch.dtype, info_nce=info_nce_of_all, **changes
) -> list[dict[str, Tensor]]:
    """Return losses, gradients and state at each step of AdamW on this rank's part of a batch."""
    rank, ranks = this_rank()
    net = new_model(**changes).to(dtype)
    trained = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "info_nce", info_nce)
        for step in range(steps):
            batch = batch_of_step(step, dtype)
            part = {key: value.chunk(ranks)[rank] for key, value in batch.items()}
            optimizer.zero_grad()
            found.append(take_step(trained, part))
            optimizer.step()
            found[-1] |= {name: value.clone() for name, value in net.state_dict().items()}
    return found


def train_rank(rank: int, out: str, *arguments, **changes) -> None:
    torch.save(train(*arguments, **changes), f"{out}/{rank}")


@pytest.fixture
def train_on(on_ranks, tmp_path):
    """Call train_on(ranks, ...) for the results of train(...) on each of the ranks."""

    def start(ranks: int, *arguments, **changes) -> list[list[dict[str, Tensor]]]:
        on_ranks(ranks, partial(train_rank, **changes), str(tmp_path), *arguments)
        return [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(ranks)]

    return start


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a fraction of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_equal_steps(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(BEFORE_NORM):
            # AdamW divides by |gradient| + 1e-8. In float64 the rounding of a zero gradient is far
            # below 1e-8, and the bias stays near 0. In fp32 it is not; there no weights are given.
            limit = 1e-6 if value.dtype == torch.float32 else 1e-11
            assert found[name].abs().max() < limit and value.abs().max() < limit, name
        else:
            assert distance(found[name].double(), value.double()) <= tolerance, name


def assert_equal_to_one_rank(
    of_ranks: list[list[dict]], of_one: list[dict], tolerance: float
) -> None:
    """Compare the mean of the losses over the ranks, and everything else on each rank."""
    for *found, expected in zip(*of_ranks, of_one, strict=True):
        means = {name: torch.stack([step[name] for step in found]).mean(dim=0) for name in LOSSES}
        for step in found:
            assert_equal_steps(step | means, expected, tolerance)


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_have_the_losses_gradients_statistics_and_weights_of_one(train_on, ranks):
    found = train_on(ranks, STEPS, torch.float64)
    assert_equal_to_one_rank(found, train(STEPS, torch.float64), 1e-9)
    for first, last in zip(found[0], found[-1], strict=True):
        assert first["contrastive"] == last["contrastive"]


def test_two_ranks_have_the_losses_of_one_in_single_precision(train_on):
    of_ranks, of_one = train_on(2, STEPS, torch.float32), train(STEPS, torch.float32)
    for step, expected in enumerate(of_one):
        for name in LOSSES:
            mean = sum(found[step][name] for found in of_ranks) / 2
            assert distance(mean, expected[name]) <= 1e-4, (step, name)


def info_nce_of_own_rows(
    predictions: Tensor, targets: Tensor, temperature: float, offset: bool
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE as the official code splits it: rows are this rank's views, columns all views.

    Args:
        offset: add the rank's offset to the labels, which the official code does not.
    """
    z = F.normalize(predictions, dim=-1).transpose(0, 1)  # (2, B of all ranks, out)
    rank, ranks = this_rank()
    size = z.shape[1] // ranks
    own = torch.arange(size) + rank * size
    column = own if offset else torch.arange(size)
    logits = z[:, own].flatten(0, 1) @ z.flatten(0, 1).T / temperature
    itself = torch.cat([column, column + z.shape[1]])
    logits = logits.scatter(1, itself[:, None], -math.inf)
    return F.cross_entropy(logits, itself.roll(size)), logits.new_zeros(())


@pytest.mark.parametrize("offset", [True, False])
def test_labels_without_the_ranks_offset_would_be_noticed(train_on, offset):
    of_ranks = train_on(2, 1, torch.float64, info_nce=partial(info_nce_of_own_rows, offset=offset))
    of_one = train(1, torch.float64)
    if offset:  # the split by rows alone does not change the loss
        assert_equal_to_one_rank(of_ranks, of_one, 1e-9)
    else:
        with pytest.raises(AssertionError, match="total"):
            assert_equal_to_one_rank(of_ranks, of_one, 1e-9)
        first, second = (found[0]["contrastive"] for found in of_ranks)
        assert second > first + 3 and first + second > 20 * of_one[0]["contrastive"]


# Chunks


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 11])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_step_in_chunks_equals_the_step_at_once(chunk_size, dtype, tolerance):
    sizes = []
    batch = batch_of_step(0, dtype)
    net = new_model(chunk_size=chunk_size).to(dtype)
    net.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]) // 2))
    expected = take_step(new_model().to(dtype), batch)
    assert_equal_steps(take_step(net, batch), expected, tolerance)
    chunks = [min(chunk_size, BATCH - start) for start in range(0, BATCH, chunk_size)]
    passes = 2 if chunk_size < BATCH else 1  # each chunk once more in the backward pass
    assert Counter(sizes) == Counter(passes * chunks)
    sizes.clear()
    net.eval()(batch)
    assert sizes == [BATCH]


def test_two_ranks_in_chunks_equal_one_rank_at_once(train_on):
    found = train_on(2, 3, torch.float64, chunk_size=3)
    assert_equal_to_one_rank(found, train(3, torch.float64), 1e-9)


# Compilation


def test_compiled_step_has_the_losses_and_gradients_of_the_plain_step():
    batch = batch_of_step(0, torch.float32)
    expected = take_step(new_model(depth=1, decoder_depth=1), batch)
    net = new_model(depth=1, decoder_depth=1)
    net.forward = torch.compile(net.forward, backend="aot_eager")  # the method, as Composer does
    assert_equal_steps(take_step(net, batch), expected, 1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_generated_kernels_have_the_features_of_the_plain_operations():
    """The encoder alone: each kernel takes a second or two to compile."""
    encoder = new_model(depth=1).encoder
    views, ids_keep = torch.randn(2, 3, 32, 32), torch.tensor([[3, 0], [1, 2]])
    with torch.no_grad():
        expected = encoder(views, ids_keep)
        found = torch.compile(encoder.forward, backend="inductor")(views, ids_keep)
    assert distance(found, expected) <= 1e-5


def test_compiled_pretraining_logs_the_losses_of_the_plain_one(demo, tmp_path):
    logged = {}
    for name, config in (("plain", "null"), ("compiled", "{backend: aot_eager}")):
        folder = tmp_path / name
        folder.mkdir()
        short = ["callbacks=null", "trainer.max_duration=3ba", "model.depth=1"]
        arguments = [*small(demo), *short, f"trainer.compile_config={config}"]
        run_stage(pretrain, arguments, folder)
        text = Path(folder, "runs/demo/metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        steps = [line for line in lines if "loss/train/total" in line]
        logged[name] = [[line[f"loss/train/{loss}"] for loss in LOSSES] for line in steps]
    assert len(logged["plain"]) == 3
    compiled, plain = torch.tensor(logged["compiled"]), torch.tensor(logged["plain"])
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)
