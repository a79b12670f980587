"""methods/masked.py: masks in space and time, clips, and methods without a contrastive term."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, losses, read_result, run_stage, small
from tiny_models import CLIPS, TINY, random_batch
from torch import nn

import eval as evaluation
import pretrain
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
    with pytest.raises(ValueError, match=r"num_frames=3: must be a multiple of tubelet_size=2"):
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
    with pytest.raises(ValueError, match=r"decoder\.pred\.weight is \(384, 24\)"):
        evaluation.load_model(evaluation.EvalConfig(**sizes, reconstructions=["x"]))


def test_image_of_omnimae_is_the_first_tubelet_of_a_clip_and_has_a_mask_ratio_of_its_own():
    net = OmniMAE(**TINY, **CLIPS, mask_ratio=0.75, image_mask_ratio=0.5)
    clips, images = random_batch(2, views=1, frames=4), random_batch(2, views=1, frames=4)
    images["views"] = images["views"][:, :, :1].expand(-1, -1, 2, -1, -1, -1)
    assert net(clips)["mask"].sum(dim=2).tolist() == [[24], [24]]  # of 2 x 16 patches
    outputs = net(images)
    assert outputs["mask"].shape == (2, 1, 16) and (outputs["mask"].sum(dim=2) == 8).all()

    errors = []
    for sample in (0, 1):
        noise, view = images["noise"][sample, 0, :16], images["views"][sample, 0]
        kept = noise.argsort()[:8]
        assert not outputs["mask"][sample, 0, kept].any()
        pixels = view.unfold(2, 8, 8).unfold(3, 8, 8)  # (2, 3, 4, 4, 8, 8)
        pixels = pixels.permute(2, 3, 1, 0, 4, 5).flatten(0, 1)  # (16, 3, 2, 8, 8)
        proj = net.encoder.patch_embed["proj"]
        tokens = pixels.flatten(1) @ proj.weight.flatten(1).T + proj.bias
        tokens = tokens + net.encoder.pos_embed[0, 1:] + net.encoder.temporal_embed[0, 0]
        x = torch.cat([net.encoder.cls_token[0], tokens[kept]])[None]
        for block in net.encoder.blocks:
            x = block(x)
        x = net.encoder.norm(x)
        torch.testing.assert_close(outputs["features"][sample, 0], x[0, 1:].mean(dim=0))

        decoder, order = net.decoder, noise.argsort()
        x = decoder.embed(x)
        x = torch.cat([x, decoder.mask_token.expand(1, 8, -1)], dim=1)
        x[:, 1:] += decoder.pos_embed[:, 1:][:, order] + decoder.temporal_embed[:, :1]
        for block in decoder.blocks:
            x = block(x)
        pred = decoder.pred(decoder.norm(x))[0, 1:]
        for number, place in enumerate(order[8:].tolist()):
            target = pixels[place].flatten(1)  # (3, 2 * 64)
            mean, std = target.mean(dim=1, keepdim=True), target.var(dim=1, keepdim=True)
            target = ((target - mean) / (std + 1e-6).sqrt()).T.flatten()
            errors.append(float((pred[8 + number] - target).detach().square().mean()))
    found = net.loss(outputs, images)["reconstruction"]
    assert float(found) == pytest.approx(np.mean(errors), rel=1e-5)


def test_partial_decoding_of_an_image_scores_the_removed_patches_of_smallest_noise():
    net, batch = OmniMAE(**TINY, **CLIPS, image_mask_ratio=0.75), random_batch(3, 0, 1, frames=4)
    net.decode_ratio = 0.5
    outputs = net.train()(batch | {"views": batch["views"][:, :, :2]})
    for sample in range(3):
        order = batch["noise"][sample, 0, :16].argsort()
        assert outputs["scored"][sample, 0].nonzero()[:, 0].tolist() == sorted(order[4:10].tolist())


def test_image_mask_ratio_that_leaves_no_patch_is_an_error():
    with pytest.raises(ValueError, match=r"image_mask_ratio=0\.95: must keep and remove some of "):
        OmniMAE(**TINY, **CLIPS, image_mask_ratio=0.95)  # would keep none of 16 patches


def test_positions_of_stmae_are_learnt():
    net, batch = STMAE(**TINY, **CLIPS), random_batch(2, views=1, frames=4)
    net.loss(net(batch), batch)["total"].backward()
    for part in (net.encoder, net.decoder):
        for positions in (part.pos_embed, part.temporal_embed):
            assert 0.01 < float(positions.detach().std()) < 0.03
            assert positions.grad.abs().sum(dim=2).min() > 0  # of CLS, all places and all times


@pytest.fixture
def images_and_clips(demo) -> list[str]:
    """The arguments of four steps of OmniMAE, two of clips and two of images of two frames."""
    base, *settings = small(demo)
    return [
        base,
        str(ROOT / "yamls" / "methods" / "omnimae.yaml"),
        *settings,
        "data.global_train_batch_size=30",
        "data.one_stream_per_batch=true",
        "data.num_workers=0",
        "augment.image_frames=2",
        "model.image_mask_ratio=0.75",
        "trainer.max_duration=1ep",
        "callbacks=null",
    ]


def test_plan_counts_the_whole_batches_that_workers_load(images_and_clips, tmp_path, capfd):
    sizes = ["data.global_micro_batch_size=10", "data.num_workers=4"]
    run_stage(pretrain, [*images_and_clips, *sizes, "--plan"], tmp_path)
    # 4 workers with 2 batches each, of 30 views of 16 frames, on 8 GPUs
    assert 4 * 2 * 30 * 16 * 32 * 32 * 3 / 8 == 1_474_560
    assert "; 0.00147 GB of /dev/shm for each GPU" in capfd.readouterr().out


def pretrain_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(pretrain, arguments, Path(folder))


def test_steps_of_images_and_steps_of_clips_train_on_two_ranks_as_on_one(
    images_and_clips, tmp_path, on_ranks, monkeypatch
):
    frames, reconstruct = [], OmniMAE.reconstruct

    def spy(net, views, noise):
        frames.append(views.shape[1])
        return reconstruct(net, views, noise)

    with monkeypatch.context() as patch:
        patch.setattr(OmniMAE, "reconstruct", spy)
        run_stage(pretrain, [*images_and_clips, "run_name=one"], tmp_path)
    assert sorted(frames) == [2] * 2 + [16] * 2
    on_ranks(2, pretrain_rank, str(tmp_path), [*images_and_clips, "run_name=two"])
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)
    assert read_result(tmp_path, "two")["step"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.one_stream_per_batch=false", "must be true with augment.image_frames, since images"),
        ("augment.image_frames=3", "augment.image_frames=3: must be a multiple of model.tubelet_s"),
        ("augment.image_frames=18", "and at most model.num_frames=16"),
        ("augment.image_frames=0", "augment.image_frames=0: "),
        ("model.image_mask_ratio=1", "model.image_mask_ratio=1: "),
    ],
)
def test_mistake_in_the_images_of_omnimae_is_named(images_and_clips, tmp_path, change, message):
    assert message in error_of(pretrain, [*images_and_clips, change], tmp_path)


def test_other_methods_refuse_images_of_fewer_frames(images_and_clips, tmp_path):
    other = [word.replace("omnimae.yaml", "videomae.yaml") for word in images_and_clips]
    other = [word for word in other if "image_mask_ratio" not in word]
    for flags in ([], ["--plan"]):
        message = error_of(pretrain, [*other, *flags], tmp_path)
        assert "augment.image_frames=2: works with method=omnimae only" in message


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
