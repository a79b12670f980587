"""model.py: ViC-MAE, its parts and its classifier, against golden data, timm, numpy and loops."""

import inspect
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from timm.models import group_parameters
from tiny_models import CLIPS, ENCODER, TINY, random_batch
from torch import Tensor, nn

from methods.masked import VideoMAE
from model import (
    Classifier,
    Encoder,
    ViCMAE,
    all_gather,
    info_nce,
    patchify,
    pool_tokens,
    positions_for,
    random_masking,
    reconstruction_loss,
    sincos_positions,
    take,
)
from training.weights import load_pretrained, our_name

GOLDEN = Path(__file__).parent / "golden" / "vicmae_tiny.npz"
BEFORE_NORM = ("projector.0.bias", "projector.3.bias")  # a BatchNorm follows: gradients are 0


# The golden step: a step of the official code


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data.files if key != "config"}
        return arrays | {"config": json.loads(str(data["config"]))}


def part_of(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    keys = [key for key in golden if key.startswith(prefix)]
    return {key.removeprefix(prefix): golden[key] for key in keys}


def assert_golden(step: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    """Compare a step's losses, mask, predictions and gradients with the official code's."""
    torch.testing.assert_close(step["mask"], golden["mask"], rtol=0, atol=0)
    official = {"total": "loss", "reconstruction": "loss_recon", "contrastive": "loss_contrast"}
    for ours, theirs in official.items():
        torch.testing.assert_close(step[ours], golden[theirs], rtol=1e-5, atol=0)
    removed = golden["mask"].bool()
    predicted, expected = step["pred"][removed], golden["pred"][removed]
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)

    expected = {our_name(key): value for key, value in part_of(golden, "grad/").items()}
    gradients = part_of(step, "gradient of ")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if name in BEFORE_NORM:
            assert gradient.abs().max() < 1e-6 and expected[name].abs().max() < 1e-6
        else:
            assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_losses_predictions_and_gradients_equal_the_official_code(golden):
    net = ViCMAE(**golden["config"]).train()
    report = load_pretrained(net, part_of(golden, "state/"))
    assert not report["missing"] and not report["unused"]
    batch = {"views": golden["views"], "noise": golden["noise"]}
    outputs = net(batch)
    losses = net.loss(outputs, batch)
    losses["total"].backward()
    trained = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    step = {name: tensor.detach() for name, tensor in (outputs | losses).items()}
    step |= {f"gradient of {name}": gradient for name, gradient in trained.items()}
    assert_golden(step, golden)


GOLDEN_STEP_ALONE = """
import json
import sys
from pathlib import Path

import numpy as np
import torch

from model import ViCMAE

def our_name(key):
    if key.startswith("decoder_"):
        return "decoder." + key.removeprefix("decoder_")
    if key == "mask_token":
        return "decoder.mask_token"
    return key if key.startswith("projector.") else "encoder." + key

data = np.load(sys.argv[1])
net = ViCMAE(**json.loads(str(data["config"]))).train()
state = {key.removeprefix("state/"): data[key] for key in data.files if key.startswith("state/")}
net.load_state_dict({our_name(key): torch.from_numpy(state[key]) for key in state})
batch = {"views": torch.from_numpy(data["views"]), "noise": torch.from_numpy(data["noise"])}
outputs = net(batch)
losses = net.loss(outputs, batch)
losses["total"].backward()
step = {name: tensor.detach() for name, tensor in (outputs | losses).items()}
trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
step |= {"gradient of " + name: p.grad for name, p in trained}
torch.save(step, "step.pt")

assert Path(sys.modules["model"].__file__).parent == Path.cwd()
assert not {"shards", "training", "evaluation", "methods"} & sys.modules.keys()
"""


def test_model_py_copied_alone_takes_the_golden_step(golden, tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    (tmp_path / "step.py").write_text(GOLDEN_STEP_ALONE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "step.py", str(GOLDEN)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_golden(torch.load(tmp_path / "step.pt", weights_only=True), golden)


# Positions, patches, masking


def wave(coordinate: int, dim: int) -> list[float]:
    """Return sines, then cosines, of a coordinate at dim / 2 frequencies."""
    frequencies = [10000 ** (-i / (dim / 2)) for i in range(dim // 2)]
    sines = [math.sin(coordinate * frequency) for frequency in frequencies]
    return sines + [math.cos(coordinate * frequency) for frequency in frequencies]


def test_positions_are_waves_of_the_column_then_of_the_row():
    dim, grid = 16, 3
    table = sincos_positions(dim, grid)[0]
    assert table.shape == (1 + grid * grid, dim) and not table[0].any()
    for row in range(grid):
        for column in range(grid):
            expected = wave(column, dim // 2) + wave(row, dim // 2)
            assert table[1 + row * grid + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_of_a_clip_are_positions_in_space_plus_positions_in_time():
    net = VideoMAE(**TINY, **CLIPS)
    for part, dim in ((net.encoder, 48), (net.decoder, 24)):
        table = positions_for(part.pos_embed, 4, part.temporal_embed)[0]
        assert table.shape == (1 + 2 * 16, dim) and not table[0].any()
        for number in range(2 * 16):
            time, place = divmod(number, 16)
            row, column = divmod(place, 4)
            in_space = np.array(wave(column, dim // 2) + wave(row, dim // 2))
            expected = in_space + np.array(wave(time, dim))
            assert table[1 + number].tolist() == pytest.approx(expected, abs=1e-5)
        assert not part.temporal_embed.requires_grad


@pytest.mark.parametrize("grid", [7, 20])
def test_positions_of_another_resolution_equal_timms_interpolation(grid):
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    theirs = timm.models.VisionTransformer(64, **sizes).eval()
    resized = timm.models.VisionTransformer(8 * grid, **sizes).eval()
    weights = timm.models.vision_transformer.checkpoint_filter_fn(theirs.state_dict(), resized)
    resized.load_state_dict(weights)
    ours = Encoder(64, 8, 48, 1, 3).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 8 * grid, 8 * grid)
    torch.testing.assert_close(ours(images), resized.forward_features(images), rtol=1e-5, atol=1e-5)


def test_patches_go_row_by_row_and_their_numbers_by_row_column_channel():
    images = torch.randn(2, 3, 24, 24)
    patches = patchify(images, 8)
    assert patches.shape == (2, 9, 8 * 8 * 3)
    for number in range(9):
        row, column = divmod(number, 3)
        square = images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(patches[:, number], square.permute(0, 2, 3, 1).flatten(1))


def test_tubelets_go_by_time_first_and_their_numbers_by_frame_row_column_channel():
    clips = torch.randn(2, 4, 3, 16, 16)
    patches = patchify(clips, 8, 2)
    assert patches.shape == (2, 8, 2 * 8 * 8 * 3)
    for number in range(8):
        time, (row, column) = number // 4, divmod(number % 4, 2)
        square = clips[:, :, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        tubelet = square[:, 2 * time : 2 * time + 2]
        assert torch.equal(patches[:, number], tubelet.permute(0, 1, 3, 4, 2).flatten(1))


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75, 0.9])
def test_masking_keeps_the_patches_of_smallest_noise_and_restores_their_order(mask_ratio):
    noise = torch.rand(5, 16)
    ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
    kept = math.floor(16 * (1 - mask_ratio))
    assert ids_keep.shape == (5, kept) and mask.sum(dim=1).tolist() == [16 - kept] * 5
    for row in range(5):
        by_noise = sorted(range(16), key=lambda patch: noise[row, patch].item())
        assert ids_keep[row].tolist() == by_noise[:kept]
        visible = {patch for patch in range(16) if mask[row, patch] == 0}
        assert visible == set(by_noise[:kept])
        assert [by_noise[place] for place in ids_restore[row].tolist()] == list(range(16))


def test_take_selects_rows_of_each_sample():
    tokens, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0, 0], [1, 2, 3]])
    expected = np.stack([tokens[0].numpy()[[4, 0, 0]], tokens[1].numpy()[[1, 2, 3]]])
    np.testing.assert_array_equal(take(tokens, ids).numpy(), expected)


# Encoder and decoder


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch", "name"),
    [
        (384, 12, 6, 16, "vit_small_patch16_224"),
        (768, 12, 12, 16, "vit_base_patch16_224"),
        (1024, 24, 16, 16, "vit_large_patch16_224"),
        (1280, 32, 16, 14, "vit_huge_patch14_224"),
    ],
)
def test_encoder_has_the_names_and_shapes_of_timms_vit(width, depth, heads, patch, name):
    with torch.device("meta"):
        ours = Encoder(224, patch, width, depth, heads)
        theirs = timm.create_model(name, num_classes=0)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def test_drop_path_rises_linearly_to_the_last_block():
    blocks = Encoder(**ENCODER | {"depth": 5}, drop_path=0.2).blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_still_clip_of_one_tubelet_has_the_features_of_the_image():
    image = Encoder(**ENCODER).eval()
    clip = Encoder(**ENCODER, num_frames=2, tubelet_size=2, learn_positions=True).eval()
    holder = nn.ModuleDict({"encoder": clip})
    report = load_pretrained(holder, image.state_dict())
    assert report["missing"] == ["encoder.temporal_embed"]
    frames = torch.randn(3, 3, 32, 32)
    still = frames[:, None].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(clip(still), image(frames), rtol=1e-5, atol=1e-5)


def test_encoder_does_not_see_removed_patches():
    net, batch = ViCMAE(**TINY).eval(), random_batch(2)
    features, mask = net(batch)["features"], net(batch)["mask"]
    assert net(batch | {"views": batch["views"] + 1.0})["features"].ne(features).any()
    noisy = batch["views"] + 10.0 * torch.randn(2, 2, 3, 32, 32)
    for sample, view, patch in mask.nonzero().tolist():
        row, column = divmod(patch, 4)
        square = (sample, view, slice(None))
        square += (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        batch["views"][square] = noisy[square]
    assert torch.equal(net(batch)["features"], features)


def test_decoder_equals_maes_which_first_restores_the_order_of_the_patches():
    decoder = ViCMAE(**TINY).double().decoder
    _, ids_restore, _ = random_masking(torch.rand(5, 16), 0.5)
    tokens = torch.randn(5, 1 + 8, TINY["embed_dim"], dtype=torch.float64)
    x = decoder.embed(tokens)
    patches = torch.cat([x[:, 1:], decoder.mask_token.repeat(5, 8, 1)], dim=1)
    rows = zip(patches, ids_restore, strict=True)
    patches = torch.stack([row[ids] for row, ids in rows])
    x = torch.cat([x[:, :1], patches], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    expected = decoder.pred(decoder.norm(x))[:, 1:]
    torch.testing.assert_close(decoder(tokens, ids_restore, 16), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mask_ratio", "ratio"), [(0.5, 0.5), (0.5, 0.3), (0.75, 0.01), (0.75, 1.0)]
)
def test_decoder_gets_the_visible_patches_and_a_fraction_of_the_removed(mask_ratio, ratio):
    net, batch, lengths = ViCMAE(**TINY, mask_ratio=mask_ratio), random_batch(), []
    net.decode_ratio = ratio
    block = net.decoder.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    visible = round(16 * (1 - mask_ratio))
    decoded = math.ceil((16 - visible) * ratio)
    outputs = net.train()(batch)
    assert lengths.pop() == 1 + visible + decoded
    assert outputs["pred"].shape == (4, 2, 16, 192)
    scored, mask = outputs["scored"], outputs["mask"]
    assert (scored.sum(dim=-1) == decoded).all() and (scored <= mask).all()
    outputs = net.eval()(batch)
    assert lengths.pop() == 1 + 16
    assert torch.equal(outputs["scored"], outputs["mask"])


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_loss_of_partial_decoding_is_unbiased(ratio):
    """Take the mean over all orders of the removed patches; a decoder without blocks, so that the
    prediction of a patch depends on no other decoded patch.
    """
    net = ViCMAE(**TINY | {"img_size": 24}).double().train()  # 9 patches, of which 4 are visible
    net.decoder.blocks = nn.ModuleList()
    views = torch.randn(2, 2, 3, 24, 24, dtype=torch.float64)
    batch = {"views": views, "noise": torch.rand(2, 2, 9, dtype=torch.float64)}
    full = net.loss(net(batch), batch)["reconstruction"]
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
    assert torch.stack(losses).mean().item() == pytest.approx(full.item(), rel=1e-9)
    assert torch.stack(losses).std() > 1e-3 * full  # each draw by itself is an estimate


def test_reconstruction_loss_of_a_known_error():
    target = torch.zeros(1, 4, 12)
    target[:, [1, 3]] = 1.0
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    loss = reconstruction_loss(torch.zeros(1, 4, 12), target, mask)
    assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_term_equals_numpy(norm_pix_loss):
    net, batch = ViCMAE(**TINY, norm_pix_loss=norm_pix_loss), random_batch(3)
    outputs = net(batch)
    target = patchify(batch["views"].flatten(0, 1), 8).double().numpy()  # (6, 16, 192)
    if norm_pix_loss:
        deviation = np.sqrt(target.var(axis=2, ddof=1, keepdims=True) + 1e-6)
        target = (target - target.mean(axis=2, keepdims=True)) / deviation
    pred = outputs["pred"].detach().flatten(0, 1).double().numpy()
    error = ((pred - target) ** 2).mean(axis=2)
    expected = error[outputs["mask"].flatten(0, 1).numpy() == 1].mean()
    assert net.reconstruction_term(outputs, batch).item() == pytest.approx(expected, rel=1e-5)


# Pooling, projector, InfoNCE


def test_poolings_equal_numpy():
    tokens = torch.randn(3, 5, 4)
    patches = tokens[:, 1:].double().numpy()
    expected = {
        "cls": tokens[:, 0].double().numpy(),
        "mean": patches.mean(axis=1),
        "max": patches.max(axis=1),
        "gem": (np.maximum(patches, 1e-6) ** 3).mean(axis=1) ** (1 / 3),
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(pool_tokens(tokens, kind).numpy(), values, rtol=1e-5, atol=1e-6)


def test_unknown_pooling_is_not_taken_for_the_mean():
    with pytest.raises(AssertionError, match="mena"):
        pool_tokens(torch.randn(3, 5, 4), "mena")


def test_one_rank_gathers_the_tensor_itself():
    x = torch.randn(3, 2)
    assert all_gather(x) is x


def test_projector_normalises_each_view_over_the_batch_by_itself():
    net = ViCMAE(**TINY).double().train()
    features = torch.randn(6, 2, 48, dtype=torch.float64)
    features[:, 1] += 100.0
    outputs = net.project(features, {})
    assert outputs["predictions"] is outputs["targets"]
    weights = {name: value.numpy() for name, value in net.projector.state_dict().items()}
    for view in (0, 1):
        x = features[:, view].numpy()
        for linear in (0, 3):
            x = x @ weights[f"{linear}.weight"].T + weights[f"{linear}.bias"]
            x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
            x = np.maximum(x, 0.0)
        x = x @ weights["6.weight"].T + weights["6.bias"]
        projected = outputs["predictions"][:, view].detach().numpy()
        np.testing.assert_allclose(projected, x, rtol=1e-6, atol=1e-8)


def test_predictor_and_projector_stand_side_by_side_and_both_get_gradients():
    net = ViCMAE(**TINY, predictor=True).train()
    outputs = net(random_batch(6))
    for head, name in ((net.predictor, "predictions"), (net.projector, "targets")):
        views = [nn.Sequential.forward(head, view) for view in outputs["features"].unbind(1)]
        expected = torch.stack(views, dim=1)
        assert torch.equal(outputs[name], expected) and outputs[name].requires_grad


def unit(x: Tensor) -> np.ndarray:
    array = x.double().numpy()
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def loop_info_nce(p: Tensor, t: Tensor, temperature: float) -> tuple[float, float]:
    """Return InfoNCE and the fraction of matched views by loops over predictions and targets."""
    predictions, targets = unit(p), unit(t)
    losses, matched = [], []
    for i, v in itertools.product(range(len(p)), (0, 1)):
        logits = {}
        for j, w in itertools.product(range(len(p)), (0, 1)):
            if (j, w) != (i, v):
                logits[j, w] = predictions[i, v] @ targets[j, w] / temperature
        total = sum(math.exp(logit) for logit in logits.values())
        losses.append(-math.log(math.exp(logits[i, 1 - v]) / total))
        matched.append(max(logits, key=logits.get) == (i, 1 - v))
    return float(np.mean(losses)), float(np.mean(matched))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_a_loop_over_views(temperature):
    z = torch.randn(5, 2, 7)
    z[:, 1] = z[:, 0] + 1.5 * z[:, 1]  # some views find their partner, some do not
    loss, accuracy = info_nce(z, z, temperature)
    expected_loss, expected_accuracy = loop_info_nce(z, z, temperature)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert accuracy.item() == pytest.approx(expected_accuracy) and 0 < expected_accuracy < 1


def test_info_nce_of_predictions_equals_a_loop_over_targets():
    targets = torch.randn(5, 2, 7)
    predictions = targets.flip(1) + 0.8 * torch.randn(5, 2, 7)
    loss, accuracy = info_nce(predictions, targets, 0.2)
    expected_loss, expected_accuracy = loop_info_nce(predictions, targets, 0.2)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert accuracy.item() == pytest.approx(expected_accuracy) and 0 < expected_accuracy < 1


def test_info_nce_of_two_orthogonal_pairs_is_known():
    z = torch.eye(2)[:, None].expand(2, 2, 2)  # equal views, orthogonal samples
    expected = math.log(math.exp(2) + 2) - 2
    assert info_nce(z, z, 0.5)[0].item() == pytest.approx(expected, rel=1e-6)


def test_info_nce_of_collapsed_features_is_that_of_a_random_guess():
    z = torch.ones(5, 2, 6)
    loss, accuracy = info_nce(z, z, 0.2)
    assert loss.item() == pytest.approx(math.log(9), rel=1e-5) and accuracy.item() < 0.25


@pytest.mark.parametrize("right", [0, 2, 6, 8])
def test_accuracy_is_the_fraction_of_views_whose_partner_is_nearest(right):
    first = torch.eye(16)[:8]
    rotated = [*range(right), *range(right + 1, 8), right]  # others have another sample's view
    projections = torch.stack([first, first[rotated[:8]]], dim=1)
    assert info_nce(projections, projections, 0.1)[1].item() == pytest.approx(right / 8)


@pytest.mark.parametrize("views", [1, 3])
def test_info_nce_rejects_any_number_of_views_but_two(views):
    z = torch.randn(4, views, 6)
    with pytest.raises(AssertionError, match="two views"):
        info_nce(z, z, 0.1)
    net, batch = ViCMAE(**TINY), random_batch(views=views)
    with pytest.raises(AssertionError, match="two views"):
        net.loss(net(batch), batch)


def test_contrastive_term_under_autocast_is_computed_in_fp32():
    net, batch = ViCMAE(**TINY).eval(), random_batch(16)
    z = torch.randn(16, 2, 16).bfloat16()
    outputs = net(batch) | {"predictions": z, "targets": z}
    expected, _ = loop_info_nce(z, z, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        contrastive = net.loss(outputs, batch)["contrastive"]
    assert contrastive.dtype == torch.float32
    assert contrastive.item() == pytest.approx(expected, rel=1e-5)


# ViCMAE


def spread_of(features: Tensor) -> float:
    """Return the logged feature_std of features (B, 2, D)."""
    B = len(features)
    z = torch.randn(B, 2, 16)
    outputs = {"pred": torch.zeros(B, 2, 16, 192), "scored": torch.ones(B, 2, 16)}
    outputs |= {"features": features, "predictions": z, "targets": z}
    return ViCMAE(**TINY).loss(outputs, random_batch(B))["feature_std"].item()


def test_spread_of_features_is_known_if_they_are_alike_or_orthogonal():
    B = 8
    lengths = torch.arange(1, B + 1)[:, None, None]  # without effect
    alike = torch.randn(1, 2, 48).double() * lengths
    orthogonal = torch.eye(48)[:B, None].expand(-1, 2, -1)
    half = torch.stack([alike[:, 0], orthogonal[:, 0]], dim=1)  # the first view has collapsed
    assert spread_of(alike) == pytest.approx(0, abs=1e-7)
    assert spread_of(orthogonal) == pytest.approx(math.sqrt(1 - 1 / B), rel=1e-6)
    assert spread_of(half) == pytest.approx(math.sqrt((1 - 1 / B) / 2), rel=1e-6)


def test_total_is_the_weighted_sum_of_the_two_terms():
    net, batch = ViCMAE(**TINY, weight_recon=0.6, weight_contrast=0.2), random_batch()
    net.ramp = 0.25
    losses = net.loss(net(batch), batch)
    expected = 0.6 * losses["reconstruction"] + 0.25 * 0.2 * losses["contrastive"]
    torch.testing.assert_close(losses["total"], expected)


def test_nothing_in_a_step_is_random_but_the_noise():
    net, batch = ViCMAE(**TINY), random_batch()
    torch.manual_seed(1)
    first = net(batch)
    torch.manual_seed(2)
    second = net(batch)
    other = net(batch | {"noise": random_batch(seed=1)["noise"]})
    assert torch.equal(first["pred"], second["pred"]) and torch.equal(first["mask"], second["mask"])
    assert not torch.equal(first["mask"], other["mask"])


def test_every_trained_parameter_is_used_in_the_forward_pass():
    net, batch = ViCMAE(**TINY, predictor=True).train(), random_batch()
    net.loss(net(batch), batch)["total"].backward()
    unused = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size": 7}, "img_size=32: must be a multiple of patch_size=7"),
        ({"num_heads": 5}, "embed_dim=48: must be a multiple of 4 and of num_heads=5"),
        ({"decoder_embed_dim": 22}, "decoder_embed_dim=22"),
        ({"mask_ratio": 1.2}, r"mask_ratio\n +Input should be less than 1"),
        ({"temperature": 0.0}, r"temperature\n +Input should be greater than 0"),
        ({"chunk_size": -1}, r"chunk_size\n +Input should be greater than 0"),
        ({"pool": "median"}, r"pool\n +Input should be 'mean', 'max', 'gem' or 'cls'"),
        ({"mask_ratio": 1.0}, r"mask_ratio\n +Input should be less than 1"),
        ({"mask_ratio": -0.1}, r"mask_ratio\n +Input should be greater than or equal to 0"),
        ({"mask_ratio": 0.0}, r"mask_ratio=0\.0: must keep and remove some of 16 patches"),
        ({"mask_ratio": 0.95}, r"mask_ratio=0\.95"),  # keeps int(0.8) = 0 patches
        ({"weight_recon": 0.0, "weight_contrast": 0.0}, "one of them must be positive"),
    ],
)
def test_impossible_arguments_are_named_in_a_direct_call(sizes, message):
    with pytest.raises(ValueError, match=message):
        ViCMAE(**TINY | sizes)


def test_vicmae_has_the_arguments_of_the_paper_and_no_others():
    """The arguments of other methods belong to their subclasses in methods/."""
    arguments = inspect.signature(ViCMAE).parameters
    encoder = ["img_size", "patch_size", "embed_dim", "depth", "num_heads"]
    decoder = ["decoder_embed_dim", "decoder_depth", "decoder_num_heads"]
    heads = ["projector_hidden_dim", "projector_out_dim", "predictor"]
    objective = ["mask_ratio", "pool", "temperature", "weight_recon", "weight_contrast"]
    expected = [*encoder, *decoder, *heads, *objective, "norm_pix_loss", "chunk_size"]
    assert list(arguments) == expected
    assert {argument.kind for argument in arguments.values()} == {inspect.Parameter.KEYWORD_ONLY}


def interpolate_positions(table: Tensor, grid: int) -> Tensor:
    """Return a table (1, 1 + 4 * 4, D), CLS first, as bicubic interpolation fits it to a grid."""
    patches = table[:, 1:].float().unflatten(1, (4, 4)).permute(0, 3, 1, 2)  # (1, D, 4, 4)
    smaller = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    smaller = smaller.flatten(2).transpose(1, 2).to(table.dtype)  # (1, grid * grid, D)
    return torch.cat([table[:, :1], smaller], dim=1)


@pytest.mark.parametrize("size", [16, 24])
def test_smaller_views_give_the_step_of_a_smaller_model_with_interpolated_positions(size):
    net = ViCMAE(**TINY).double().train()
    grid = size // 8
    views = torch.randn(4, 2, 3, size, size, dtype=torch.float64)
    noise = torch.rand(4, 2, 16, dtype=torch.float64)
    state = net.state_dict()
    for key in ("encoder.pos_embed", "decoder.pos_embed"):
        state[key] = interpolate_positions(state[key], grid)
    smaller = ViCMAE(**TINY | {"img_size": size}).double().train()
    smaller.load_state_dict(state)
    batches = ({"views": views, "noise": noise}, {"views": views, "noise": noise[..., : grid**2]})
    outputs = []
    for model, batch in zip((net, smaller), batches, strict=True):
        outputs.append(model(batch))
        model.loss(outputs[-1], batch)["total"].backward()
    assert outputs[0]["pred"].shape == (4, 2, grid**2, 192)
    torch.testing.assert_close(outputs[0]["pred"], outputs[1]["pred"], rtol=1e-12, atol=1e-12)
    gradients = {name: p.grad for name, p in smaller.named_parameters() if p.requires_grad}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all()
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [16, 24])
def test_encoder_of_smaller_images_equals_a_smaller_encoder(size):
    sizes = {name: TINY[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    net, smaller = Encoder(32, **sizes).double(), Encoder(size, **sizes).double()
    positions = interpolate_positions(net.pos_embed.data, size // 8)
    smaller.load_state_dict(net.state_dict() | {"pos_embed": positions})
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(net(images), smaller(images), rtol=1e-12, atol=1e-12)


# The classifier


def test_classifier_of_images_equals_timms_vit():
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    theirs = timm.models.VisionTransformer(32, 8, **sizes).eval()
    nn.init.normal_(theirs.head.weight)
    ours = Classifier(7, **ENCODER, pool="cls").eval()
    load_pretrained(ours, theirs.state_dict())
    images = torch.randn(3, 3, 32, 32)
    logits = ours({"inputs": images[:, None, None]})[:, 0]
    torch.testing.assert_close(logits, theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_classifier_with_timms_weights_has_timms_logits_at_every_width(size):
    settings = {"depth": 4, "num_classes": 10, "global_pool": "avg", "fc_norm": False}
    theirs = timm.create_model(f"vit_{size}_patch16_224", **settings).eval()
    nn.init.normal_(theirs.head.weight, std=0.1)
    heads = theirs.blocks[0].attn.num_heads
    ours = Classifier(10, embed_dim=theirs.embed_dim, depth=4, num_heads=heads).eval()
    load_pretrained(ours, theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    for kind, official in (("mean", "avg"), ("cls", "token")):
        ours.pool, theirs.global_pool = kind, official
        with torch.no_grad():
            logits, expected = ours({"inputs": images[:, None, None]})[:, 0], theirs(images)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_probabilities_are_averaged_over_views():
    net = Classifier(4, **ENCODER, head_init_std=1.0).eval()
    inputs = torch.randn(2, 3, 1, 3, 32, 32)
    by_view = [net({"inputs": inputs[:, [view]]})[:, 0].softmax(dim=-1) for view in range(3)]
    expected = (by_view[0] + by_view[1] + by_view[2]) / 3
    torch.testing.assert_close(net.eval_forward({"inputs": inputs}), expected)


def test_loss_is_the_cross_entropy_over_all_views_with_labels_or_with_mixed_labels():
    net, logits = Classifier(4, **ENCODER), torch.randn(3, 2, 4)
    log_probabilities = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    labels, mixed = torch.tensor([0, 3, 1]), torch.rand(3, 4)
    of_labels = [-log_probabilities[i, v, labels[i]] for i in range(3) for v in (0, 1)]
    assert net.loss(logits, {"target": labels}).item() == pytest.approx(sum(of_labels).item() / 6)
    of_mixed = -(log_probabilities * mixed[:, None]).sum(dim=-1).mean()
    assert net.loss(logits, {"target": mixed}).item() == pytest.approx(of_mixed.item(), rel=1e-6)


def test_metrics_count_correct_classes_and_ignore_samples_without_a_label():
    net = Classifier(7, **ENCODER)
    assert net.get_metrics(is_train=True) == {}
    probabilities = torch.rand(40, 7)
    labels = (torch.arange(40) % 12 - 1).clamp(max=6)  # 6 is frequent; a label in 12 is -1
    ranks = [sorted(range(7), key=lambda c: -probabilities[i, c].item()) for i in range(40)]
    known = [i for i in range(40) if labels[i] >= 0]
    expected = {k: np.mean([labels[i].item() in ranks[i][:k] for i in known]) for k in (1, 5)}
    metrics = net.get_metrics()
    for metric in metrics.values():
        net.update_metric({"target": labels}, probabilities, metric)
    assert metrics["top1"].compute().item() == pytest.approx(expected[1])
    assert metrics["top5"].compute().item() == pytest.approx(expected[5])
    confusion = torch.zeros(7, 7, dtype=torch.long)
    for i in known:
        confusion[labels[i], ranks[i][0]] += 1
    assert torch.equal(metrics["confusion"].compute(), confusion)


def test_groups_for_layer_decay_begin_with_the_embedding_and_hold_each_block():
    net = Classifier(4, **ENCODER, num_frames=4)
    groups = group_parameters(net, net.group_matcher(), reverse=True)
    assert groups["encoder.pos_embed"] == groups["encoder.temporal_embed"] == 0
    assert groups["encoder.patch_embed.proj.weight"] == groups["encoder.cls_token"] == 0
    assert groups["encoder.blocks.0.attn.qkv.weight"] == 1
    assert groups["encoder.blocks.1.mlp.fc1.bias"] == 2
    assert groups["head.weight"] > 2


def test_classifier_loads_checkpoints_without_class_names_and_keeps_its_own():
    net = Classifier(2, **ENCODER)
    state = {key: value for key, value in net.state_dict().items() if key != "_extra_state"}
    net.class_names = ["no", "yes"]
    net.load_state_dict(state)
    net.set_extra_state(object())  # FSDP's placeholder for a value that a checkpoint lacks
    assert net.class_names == ["no", "yes"]
    other = Classifier(2, **ENCODER)
    other.load_state_dict(net.state_dict())
    assert other.class_names == ["no", "yes"]
