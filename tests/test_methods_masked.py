"""methods/masked.py: masks in space and time, clips, and methods without a contrastive term."""

import numpy as np
import pytest
import torch
from tiny_models import CLIPS, TINY, random_batch
from torch import nn

import eval as evaluation
from methods.masked import MAE, STMAE, OmniMAE, VideoMAE, tube_masking
from model import ViCMAE, random_masking


def test_mae_has_no_projector_and_no_contrastive_term():
    net, batch = MAE(**TINY), random_batch(3, views=1)
    assert net.projector is None and net.predictor is None
    found = net.loss(net(batch), batch)
    assert found.keys() == {"total", "reconstruction", "feature_std"}
    torch.testing.assert_close(found["total"], 0.97 * found["reconstruction"])


def test_reconstruction_of_mae_equals_that_of_vicmae():
    torch.manual_seed(0)
    vicmae, batch = ViCMAE(**TINY), random_batch()
    torch.manual_seed(0)
    mae = MAE(**TINY)
    expected, found = vicmae.loss(vicmae(batch), batch), mae.loss(mae(batch), batch)
    assert torch.equal(found["reconstruction"], expected["reconstruction"])


def test_mae_without_a_reconstruction_weight_has_nothing_to_learn():
    with pytest.raises(ValueError, match="weight_recon=0: must be positive"):
        MAE(**TINY, weight_recon=0.0)


def test_tubes_remove_the_same_places_at_all_time_steps_and_random_masks_do_not():
    noise = torch.rand(6, 4 * 16)
    masks = {"tube": tube_masking(noise, 0.75, steps=4), "random": random_masking(noise, 0.75)}
    for kind, (ids_keep, ids_restore, mask) in masks.items():
        assert ids_keep.shape == (6, 16) and (mask.sum(dim=1) == 48).all()
        steps = mask.view(6, 4, 16)
        alike = all(torch.equal(steps[:, 0], steps[:, step]) for step in (1, 2, 3))
        assert alike is (kind == "tube")
        assert not mask.gather(1, ids_keep).any()
        assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(64).expand(6, -1))


def test_tubes_keep_the_places_of_smallest_noise_at_the_first_time_step():
    noise = torch.rand(5, 2 * 16)
    ids_keep, ids_restore, mask = tube_masking(noise, 0.75, steps=2)
    for row in range(5):
        places = sorted(range(16), key=lambda place: noise[row, place].item())[:4]
        expected = {place + 16 * step for place in places for step in (0, 1)}
        assert set(ids_keep[row].tolist()) == expected
        assert {patch for patch in range(32) if mask[row, patch] == 0} == expected
        assert ids_restore[row, ids_keep[row]].tolist() == list(range(8))


@pytest.mark.parametrize(("method", "tubes"), [(STMAE, False), (OmniMAE, False), (VideoMAE, True)])
def test_only_videomae_masks_tubes(method, tubes):
    net, batch = method(**TINY, **CLIPS, mask_ratio=0.75), random_batch(8, views=1, frames=4)
    mask = net(batch)["mask"].view(8, 2, 16)
    assert torch.equal(mask[:, 0], mask[:, 1]) is tubes


def test_tubes_that_would_all_be_removed_are_an_error():
    assert STMAE(**TINY, **CLIPS, mask_ratio=0.95)  # keeps 1 of 32 patches
    with pytest.raises(ValueError, match=r"mask_ratio=0\.95: must keep and remove"):
        VideoMAE(**TINY, **CLIPS, mask_ratio=0.95)  # would keep none of 16 places


def test_frames_that_are_no_number_of_tubelets_are_an_error():
    with pytest.raises(ValueError, match=r"num_frames=3: must be k \* tubelet_size=2"):
        STMAE(**TINY, num_frames=3)


def test_frames_of_one_model_do_not_change_the_class():
    STMAE(**TINY, **CLIPS)
    assert ViCMAE.num_frames == STMAE.num_frames == 1
    assert ViCMAE(**TINY).encoder.num_frames == 1


@pytest.mark.parametrize("method", [STMAE, OmniMAE, VideoMAE])
def test_reconstruction_of_clips_equals_a_loop_over_the_removed_tubelets(method):
    """ST-MAE predicts the first frame; the others normalise each channel by itself."""
    frames = 1 if method is STMAE else 2
    channels = [slice(None)] if method is STMAE else [slice(c, None, 3) for c in range(3)]
    net, batch = method(**TINY, **CLIPS, mask_ratio=0.75), random_batch(2, views=1, frames=4)
    outputs = net.train()(batch)
    assert outputs["pred"].shape == (2, 1, 32, frames * 64 * 3)
    errors = []
    for sample, view, number in outputs["mask"].nonzero().tolist():
        time, (row, column) = number // 16, divmod(number % 16, 4)
        clip = batch["views"][sample, view, 2 * time : 2 * time + frames]
        square = clip[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        target = square.permute(0, 2, 3, 1).flatten().double()
        for channel in channels:
            part = target[channel].clone()
            target[channel] = (part - part.mean()) / (part.var() + 1e-6).sqrt()
        pred = outputs["pred"][sample, view, number].detach().double()
        errors.append(float((pred - target).square().mean()))
    found = net.loss(outputs, batch)["reconstruction"]
    assert len(errors) == 2 * 24 and float(found) == pytest.approx(np.mean(errors), rel=1e-5)


def test_stmae_of_earlier_versions_which_predicts_all_frames_is_evaluated(tmp_path):
    net = STMAE(**TINY, **CLIPS)
    net.decoder.pred = nn.Linear(24, 2 * 64 * 3)
    torch.save(net.state_dict(), tmp_path / "old.pt")
    sizes = {"model": TINY | CLIPS, "method": "st_mae", "checkpoint": str(tmp_path / "old.pt")}
    encoder = evaluation.load_model(evaluation.EvalConfig(**sizes)).encoder
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, net.encoder.blocks[1].mlp.fc1.weight)
    with pytest.raises(ValueError, match=r"lacks decoder\.pred"):
        evaluation.load_model(evaluation.EvalConfig(**sizes, reconstructions=["x"]))


def test_encoder_of_clips_does_not_see_removed_tubelets():
    net, batch = STMAE(**TINY, **CLIPS), random_batch(2, views=1, frames=4)
    outputs = net(batch)
    views = batch["views"].clone()
    for sample, view, number in outputs["mask"].nonzero().tolist():
        time, (row, column) = number // 16, divmod(number % 16, 4)
        square = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        views[(sample, view, slice(2 * time, 2 * time + 2), slice(None), *square)] += 1.0
    assert views.ne(batch["views"]).any()
    assert torch.equal(net(batch | {"views": views})["features"], outputs["features"])
