"""What makes training larger or cheaper must not change it: ranks, chunks, partial decoding, smaller views, compiling."""

import itertools
import json
import math
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from algorithms import ContrastRamp, PartialDecoding, ProgressiveResizing
from composer import Callback, Event, Trainer
from composer.core import DataSpec
from conftest import run_stage, small
from contrast import Projected
from contrast import info_nce as info_nce_of_all
from test_model import TINY, random_batch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2.functional import InterpolationMode, resize
from views import augment_batch
from vit import Encoder, random_masking

import model
import pretrain
from model import Classifier, ViCMAE

STEPS, BATCH = 20, 8
LOSSES = ("total", "reconstruction", "contrastive")
BEFORE_NORM = (
    "projector.0.bias",
    "projector.3.bias",
)  # a BatchNorm follows: their gradient is zero but for rounding


def build(**changes) -> ViCMAE:
    torch.manual_seed(0)
    return ViCMAE(**TINY | changes).train()


def batch_of_step(step: int, dtype: torch.dtype, size: int = BATCH) -> dict[str, Tensor]:
    """Views that are nearly alike, so that partners are near each other and others are not, from the first step on."""
    batch = random_batch(size, seed=step)
    first, other = batch["views"].unbind(1)
    return {
        "views": torch.stack([first, first + 0.1 * other], dim=1).to(dtype),
        "noise": batch["noise"][:, :1].expand(-1, 2, -1).to(dtype),
    }


def step_of(net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses and gradients of a step, by name."""
    losses = getattr(net, "module", net).loss(net(batch), batch)
    losses["total"].backward()
    named = getattr(net, "module", net).named_parameters()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in named if p.requires_grad}
    return {name: losses[name].detach() for name in LOSSES} | gradients


def train(
    steps: int, dtype: torch.dtype, info_nce=info_nce_of_all, **changes
) -> list[dict[str, Tensor]]:
    """This rank's losses, gradients, weights and running statistics at each step of AdamW on its share of the batches."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    net = build(**changes).to(dtype)
    trained = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "info_nce", info_nce)
        for step in range(steps):
            share = {
                key: value.chunk(ranks)[rank] for key, value in batch_of_step(step, dtype).items()
            }
            optimizer.zero_grad()
            found.append(step_of(trained, share))
            optimizer.step()
            found[-1] |= {name: value.clone() for name, value in net.state_dict().items()}
    return found


def train_rank(rank: int, out: str, *arguments, **changes) -> None:
    torch.save(train(*arguments, **changes), f"{out}/{rank}")


@pytest.fixture
def train_on(on_ranks, tmp_path):
    """train_on(ranks, ...): what train gives, on each of the ranks."""

    def start(ranks: int, *arguments, **changes) -> list[list[dict[str, Tensor]]]:
        on_ranks(ranks, partial(train_rank, **changes), str(tmp_path), *arguments)
        return [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(ranks)]

    return start


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_equal_steps(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(BEFORE_NORM):
            # AdamW divides by |gradient| + 1e-8: in float64 far more than their rounding, so that they hardly leave zero.
            # In fp32 it is not, and they would wander, as do the biases of attention's keys; there no weights are compared.
            limit = 1e-6 if value.dtype == torch.float32 else 1e-11
            assert found[name].abs().max() < limit and value.abs().max() < limit, name
        else:
            assert distance(found[name].double(), value.double()) <= tolerance, name


def assert_equal_to_one_rank(
    of_ranks: list[list[dict]], alone: list[dict], tolerance: float
) -> None:
    """The losses in the mean over the ranks; all else on each rank."""
    for steps in zip(*of_ranks, alone, strict=True):
        *found, expected = steps
        means = {name: torch.stack([one[name] for one in found]).mean(dim=0) for name in LOSSES}
        for one in found:
            assert_equal_steps(one | means, expected, tolerance)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_losses_gradients_statistics_and_weights_of_one(train_on, ranks):
    found = train_on(ranks, STEPS, torch.float64)
    assert_equal_to_one_rank(found, train(STEPS, torch.float64), 1e-9)
    assert all(
        step["contrastive"] == other["contrastive"]
        for step, other in zip(found[0], found[-1], strict=True)
    )


def test_two_ranks_have_the_losses_of_one_in_single_precision(train_on):
    of_ranks, alone = train_on(2, STEPS, torch.float32), train(STEPS, torch.float32)
    for step, expected in enumerate(alone):
        for name in LOSSES:
            mean = sum(found[step][name] for found in of_ranks) / 2
            assert distance(mean, expected[name]) <= 1e-4, (step, name)


def info_nce_of_own_rows(
    projected: Projected, temperature: float, offset: bool
) -> tuple[Tensor, Tensor]:
    """As the official code splits it: this rank's views are the rows, those of all ranks the columns."""
    z = F.normalize(projected.predictions, dim=-1).transpose(0, 1)  # (2, B of all ranks, out)
    size = z.shape[1] // dist.get_world_size()
    own = torch.arange(size) + dist.get_rank() * size
    column = own if offset else torch.arange(size)
    logits = z[:, own].flatten(0, 1) @ z.flatten(0, 1).T / temperature
    itself = torch.cat([column, column + z.shape[1]])
    logits = logits.scatter(1, itself[:, None], -math.inf)
    return F.cross_entropy(logits, itself.roll(size)), logits.new_zeros(())


@pytest.mark.parametrize("offset", [True, False])
def test_labels_without_the_ranks_offset_are_noticed(train_on, offset):
    of_ranks = train_on(2, 1, torch.float64, info_nce=partial(info_nce_of_own_rows, offset=offset))
    alone = train(1, torch.float64)
    if offset:  # the split itself is no fault
        assert_equal_to_one_rank(of_ranks, alone, 1e-9)
    else:
        with pytest.raises(AssertionError, match="total"):
            assert_equal_to_one_rank(of_ranks, alone, 1e-9)
        first, second = (found[0]["contrastive"] for found in of_ranks)
        assert second > first + 3 and first + second > 20 * alone[0]["contrastive"]


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 11])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_step_in_chunks_is_the_step_at_once(chunk_size, dtype, tolerance):
    sizes = []
    batch = batch_of_step(0, dtype)
    net, whole = build(chunk_size=chunk_size).to(dtype), build().to(dtype)
    net.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]) // 2))
    found, expected = step_of(net, batch), step_of(whole, batch)
    assert_equal_steps(found, expected, tolerance)
    chunks = [min(chunk_size, BATCH - start) for start in range(0, BATCH, chunk_size)]
    assert Counter(sizes) == Counter(2 * chunks)  # each once more in the backward pass
    sizes.clear()
    net.eval()(batch)
    assert sizes == [BATCH]


def test_two_ranks_in_chunks_are_one_at_once(train_on):
    found = train_on(2, 3, torch.float64, chunk_size=3)
    assert_equal_to_one_rank(found, train(3, torch.float64), 1e-9)


@pytest.mark.parametrize(
    ("mask_ratio", "ratio"), [(0.5, 0.5), (0.5, 0.3), (0.75, 0.01), (0.75, 1.0)]
)
def test_decoder_gets_the_visible_and_a_fraction_of_the_removed_patches(mask_ratio, ratio):
    net, batch, lengths = build(mask_ratio=mask_ratio), random_batch(), []
    net.decode_ratio = ratio
    net.decoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    visible = round(16 * (1 - mask_ratio))
    decoded = math.ceil((16 - visible) * ratio)
    outputs = net(batch)
    assert lengths.pop() == 1 + visible + decoded
    assert outputs["pred"].shape == (4, 2, 16, 192)
    assert (outputs["scored"].sum(dim=-1) == decoded).all() and (
        outputs["scored"] <= outputs["mask"]
    ).all()
    outputs = net.eval()(batch)
    assert lengths.pop() == 1 + 16
    assert torch.equal(outputs["scored"], outputs["mask"])


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_loss_of_partial_decoding_is_unbiased(ratio):
    """Over all orders of the removed patches, where the prediction of a patch depends on no other decoded one."""
    net = build(img_size=24).double()  # 9 patches, 4 of them visible
    net.decoder.blocks = nn.ModuleList()
    batch = {"views": torch.randn(2, 2, 3, 24, 24).double(), "noise": torch.rand(2, 2, 9).double()}
    whole = net.loss(net(batch), batch)["reconstruction"]
    net.decode_ratio = ratio
    noise, patches = batch["noise"].sort(dim=-1)
    removed, losses, subsets = patches[..., 4:], [], Counter()
    for order in itertools.permutations(range(4, 9)):
        changed = batch | {"noise": batch["noise"].scatter(-1, removed, noise[..., order])}
        with torch.no_grad():
            outputs = net(changed)
        losses.append(net.loss(outputs, changed)["reconstruction"])
        subsets[tuple(outputs["scored"][0, 0].tolist())] += 1
    decoded = math.ceil(5 * ratio)
    assert len(subsets) == math.comb(5, decoded) and len(set(subsets.values())) == 1
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-9)
    assert torch.stack(losses).std() > 1e-3 * whole  # each draw by itself is an estimate


def test_decoder_equals_maes_which_restores_the_order_first():
    net, batch = build().double(), batch_of_step(0, torch.float64)
    ids_keep, ids_restore, _ = random_masking(batch["noise"][:, 0], 0.5)
    tokens = torch.randn(BATCH, 1 + ids_keep.shape[1], TINY["embed_dim"], dtype=torch.float64)
    decoder = net.decoder
    x = decoder.embed(tokens)
    patches = torch.cat(
        [x[:, 1:], decoder.mask_token.repeat(BATCH, 16 - ids_keep.shape[1], 1)], dim=1
    )
    patches = torch.stack([row[ids] for row, ids in zip(patches, ids_restore, strict=True)])
    x = torch.cat([x[:, :1], patches], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    expected = decoder.pred(decoder.norm(x))[:, 1:]
    assert distance(decoder(tokens, ids_restore), expected) <= 1e-10
    assert distance(decoder(tokens, ids_restore, 16), expected) <= 1e-10


def test_partial_decoding_is_set_once():
    algorithm, net = PartialDecoding(0.25), build()
    assert [event for event in Event if algorithm.match(event, None)] == [Event.INIT]
    assert net.decode_ratio == 1.0
    Trainer(model=net, algorithms=[algorithm], device="cpu", progress_bar=False)
    assert net.decode_ratio == 0.25


@pytest.mark.parametrize(
    "algorithm", [PartialDecoding(0.25), ContrastRamp("1ep"), ProgressiveResizing()]
)
def test_algorithm_of_pretraining_refuses_another_model_before_training(algorithm):
    classifier = Classifier(3, img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    with pytest.raises(
        ValueError, match=rf"algorithms\.{type(algorithm).__name__} is for pre-training"
    ):
        Trainer(model=classifier, algorithms=[algorithm], device="cpu", progress_bar=False)


@pytest.mark.parametrize("size", [16, 24])
def test_smaller_views_are_those_of_a_smaller_model_with_timms_positions(size):
    net, batch = build().double(), {key: value.double() for key, value in random_batch().items()}
    grid, views = size // 8, torch.randn(4, 2, 3, size, size, dtype=torch.float64)
    state = net.state_dict()
    for key in ("encoder.pos_embed", "decoder.pos_embed"):
        state[key] = resample_abs_pos_embed(state[key], [grid, grid])
    smaller = build(img_size=size).double()
    smaller.load_state_dict(state)
    found = step_of(net, batch | {"views": views})
    expected = step_of(smaller, {"views": views, "noise": batch["noise"][..., : grid**2]})
    assert_equal_steps(found, expected, 1e-12)
    assert all(value.isfinite().all() for value in found.values())
    assert net(batch | {"views": views})["pred"].shape == (4, 2, grid**2, 192)


@pytest.mark.parametrize("size", [16, 24])
def test_encoder_takes_smaller_images_whole(size):
    sizes = {name: TINY[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    net, smaller = Encoder(32, **sizes).double(), Encoder(size, **sizes).double()
    positions = resample_abs_pos_embed(net.pos_embed.data, [size // 8] * 2)
    smaller.load_state_dict(net.state_dict() | {"pos_embed": positions})
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    assert distance(net(images), smaller(images)) <= 1e-12


class Record(Callback):
    """Keeps the views of each batch as training gets them."""

    def __init__(self):
        self.views = []

    def batch_start(self, state, logger) -> None:
        self.views.append(state.batch["views"])


def test_views_grow_over_the_training():
    rows = [torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0])] * 2  # nothing is changed by the augmentation
    samples = [
        {
            "views": torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8),
            "augment": torch.stack(rows),
            "noise": torch.rand(2, 16),
        }
        for _ in range(20)
    ]
    net, record = build(), Record()
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    trainer = Trainer(
        model=net,
        train_dataloader=DataSpec(loader, microbatch_transforms=augment_batch),
        optimizers=torch.optim.AdamW(net.parameters(), lr=1e-4),
        max_duration="10ba",
        algorithms=[
            ProgressiveResizing(0.5, delay_fraction=0.2, finetune_fraction=0.3, size_increment=8)
        ],
        callbacks=[record],
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    # Sides of 16 + 16 * (i / 10 - 0.2) / 0.5 in between, to the nearest 8.
    sides = [16, 16, 16, 16, 24, 24, 32, 32, 32, 32]
    for i, (views, side) in enumerate(zip(record.views, sides, strict=True)):
        original = torch.stack([sample["views"] for sample in samples[2 * i : 2 * i + 2]])
        pictures = original.flatten(0, 1).permute(0, 3, 1, 2)
        scaled = resize(pictures, [side, side], InterpolationMode.BILINEAR, antialias=True).permute(
            0, 2, 3, 1
        )
        assert views.dtype == torch.uint8 and views.shape == (2, 2, side, side, 3)
        assert (views.flatten(0, 1).int() - scaled.int()).abs().max() <= 1, (
            i
        )  # they round in another order
    assert math.isfinite(trainer.state.total_loss_dict["loss/train/total"])


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"size_increment": 12}, "size_increment 12"),
        ({"size_increment": 8, "initial_scale": 0.1}, "initial_scale 0.1"),
        ({"size_increment": 24, "initial_scale": 0.25}, "initial_scale 0.25"),
        ({"delay_fraction": 0.8, "finetune_fraction": 0.2}, "delay_fraction"),
    ],
)
def test_sizes_that_cannot_be_are_named_before_training(settings, culprit):
    with pytest.raises(ValueError, match=rf"algorithms\.ProgressiveResizing: .*{culprit}"):
        ProgressiveResizing(**settings).apply(Event.INIT, SimpleNamespace(model=build()), None)


def test_last_size_is_the_full_one_whatever_the_increment():
    sizes = [ProgressiveResizing(0.5, 0.2, 0.3, 24).side(336, i / 10) for i in range(11)]
    assert sizes == [168, 168, 168, 192, 240, 264, 312, 336, 336, 336, 336]


def test_compiled_step_has_the_losses_and_gradients_of_the_plain_one():
    net, batch = build(depth=1, decoder_depth=1), batch_of_step(0, torch.float32)
    expected = step_of(build(depth=1, decoder_depth=1), batch)
    net.forward = torch.compile(net.forward, backend="aot_eager")  # the method, as Composer does
    assert_equal_steps(step_of(net, batch), expected, 1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_generated_kernels_have_the_losses_of_the_plain_ones():
    net, batch = build(depth=1), batch_of_step(0, torch.float32)
    net.decoder.blocks = (
        nn.ModuleList()
    )  # they are the encoder's; the compiler takes a second or two for each kernel
    with torch.no_grad():
        expected = net.loss(net(batch), batch)
        net.forward = torch.compile(net.forward, backend="inductor")
        found = net.loss(net(batch), batch)
    for name in LOSSES:
        assert distance(found[name], expected[name]) <= 1e-5, name


def test_stage_that_is_compiled_logs_the_losses_of_the_plain_one(demo, tmp_path):
    logged = {}
    for name, config in (("plain", "null"), ("compiled", "{backend: aot_eager}")):
        folder = tmp_path / name
        folder.mkdir()
        run_stage(
            pretrain,
            [
                *small(demo),
                "callbacks=null",
                "trainer.max_duration=3ba",
                f"trainer.compile_config={config}",
            ],
            folder,
        )
        lines = Path(folder, "runs/demo/metrics.jsonl").read_text().splitlines()
        logged[name] = [
            [line[f"loss/train/{loss}"] for loss in LOSSES]
            for line in map(json.loads, lines)
            if "loss/train/total" in line
        ]
    assert len(logged["plain"]) == 3
    torch.testing.assert_close(
        torch.tensor(logged["compiled"]), torch.tensor(logged["plain"]), rtol=1e-5, atol=0
    )


def losses_of(features: Tensor, projections: Tensor) -> dict[str, float]:
    """What loss gives for (B, 2, D) features and (B, 2, out) projections."""
    B = len(features)
    outputs = {"pred": torch.zeros(B, 2, 16, 192), "scored": torch.ones(B, 2, 16)}
    outputs |= {"features": features, "projected": Projected(projections, projections)}
    losses = build().loss(outputs, random_batch(B))
    return {name: float(value) for name, value in losses.items()}


def test_spread_of_features_is_known_where_they_are_alike_or_at_right_angles():
    B = 8
    alike = (
        torch.randn(1, 2, 48).double() * torch.arange(1, B + 1)[:, None, None]
    )  # their lengths do not count
    apart = torch.eye(48)[:B, None].expand(-1, 2, -1)
    half = torch.stack([alike[:, 0], apart[:, 0]], dim=1)  # one view collapsed
    z = torch.randn(B, 2, 16)
    assert losses_of(alike, z)["feature_std"] == pytest.approx(0, abs=1e-7)
    assert losses_of(apart, z)["feature_std"] == pytest.approx(math.sqrt(1 - 1 / B), rel=1e-6)
    assert losses_of(half, z)["feature_std"] == pytest.approx(math.sqrt((1 - 1 / B) / 2), rel=1e-6)


@pytest.mark.parametrize("right", [0, 2, 6, 8])
def test_accuracy_is_the_fraction_of_views_whose_partner_is_nearest(right):
    first = torch.eye(16)[:8]
    order = [*range(right), *range(right + 1, 8), right][
        :8
    ]  # the second view of the rest is another sample's first
    projections = torch.stack([first, first[order]], dim=1)
    assert losses_of(torch.randn(8, 2, 48), projections)["accuracy"] == pytest.approx(right / 8)
