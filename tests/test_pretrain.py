"""Pre-training and what it stands on: configuration, views, streams, optimiser, the run as a whole."""

import colorsys
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import streams
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from algorithms import CALLBACKS
from checkpoints import Checkpoints, read_checkpoint
from composer.utils import dist
from config import load_config
from conftest import ROOT, launch, run_stage, small, spoilt
from probes import infer, knn_accuracy
from sources import Recipe
from streams import DeterministicStream, load_stream
from torchvision.transforms import RandomResizedCrop
from views import (
    BLUR_KERNEL,
    LUMA,
    MEAN,
    PARAMETERS,
    STD,
    EvalViews,
    PretrainingViews,
    ViewRecipe,
    augment_batch,
    augment_views,
    crop_and_scale,
    draw_crop,
    draw_frame_pair,
)

import data_prep
import pretrain
from model import ViCMAE

NEUTRAL = {name: float(name in ("brightness", "contrast", "saturation")) for name in PARAMETERS}


def augmented(images: torch.Tensor, **changes: float) -> torch.Tensor:
    row = torch.tensor([list((NEUTRAL | changes).values())])
    return augment_views(images, row.expand(len(images), -1))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth coloured pictures, (4, 3, 48, 48) uint8."""
    coarse = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (
        torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 1) * 255
    ).byte()


def test_neutral_numbers_change_nothing(images):
    torch.testing.assert_close(augmented(images), images / 255, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "reference", "tolerance"),
    [
        ({"flip": 1.0}, TF.horizontal_flip, 2e-3),
        ({"brightness": 1.4}, lambda x: TF.adjust_brightness(x, 1.4), 2e-3),
        ({"brightness": 0.6}, lambda x: TF.adjust_brightness(x, 0.6), 2e-3),
        ({"contrast": 1.4}, lambda x: TF.adjust_contrast(x, 1.4), 2e-3),
        ({"contrast": 0.6}, lambda x: TF.adjust_contrast(x, 0.6), 2e-3),
        ({"saturation": 1.2}, lambda x: TF.adjust_saturation(x, 1.2), 2e-3),
        ({"saturation": 0.5}, lambda x: TF.adjust_saturation(x, 0.5), 2e-3),
        ({"grey": 1.0}, lambda x: TF.rgb_to_grayscale(x, 3), 2e-3),
        ({"solarise": 1.0}, lambda x: TF.solarize(x, 128 / 255), 2e-3),
        ({"blur_sigma": 0.3}, lambda x: TF.gaussian_blur(x, list(BLUR_KERNEL[::-1]), [0.3]), 2e-3),
        ({"blur_sigma": 1.7}, lambda x: TF.gaussian_blur(x, list(BLUR_KERNEL[::-1]), [1.7]), 2e-3),
    ],
)
def test_each_operation_equals_torchvisions(images, changes, reference, tolerance):
    torch.testing.assert_close(
        augmented(images, **changes), reference(images / 255), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("hue", [-0.1, 0.05, 0.1])
def test_hue_turns_as_far_as_torchvisions_and_keeps_the_luma(images, hue):
    muted = (images / 255 - 0.5) * 0.4 + 0.5  # nothing is clamped
    ours = augmented((muted * 255).byte(), hue=hue)
    turned = [
        (colorsys.rgb_to_hsv(*after)[0] - colorsys.rgb_to_hsv(*before)[0] + 0.5) % 1 - 0.5
        for before, after in zip(
            *(x.movedim(1, -1).reshape(-1, 3).tolist() for x in (muted, ours)), strict=True
        )
    ]
    assert np.median(turned) == pytest.approx(hue, rel=0.25)
    luma = torch.tensor(LUMA)[:, None, None]
    torch.testing.assert_close(
        (ours * luma).sum(dim=1), (muted * luma).sum(dim=1), atol=5e-3, rtol=0
    )


def test_whole_jitter_is_near_torchvisions_in_any_order(images):
    pale = images // 4 + 96  # nothing is clamped
    ours = augmented(pale, brightness=1.1, contrast=0.8, saturation=1.2)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        steps = (
            lambda x: TF.adjust_brightness(x, 1.1),
            lambda x: TF.adjust_contrast(x, 0.8),
            lambda x: TF.adjust_saturation(x, 1.2),
        )
        x = pale / 255
        for step in order:
            x = steps[step](x)
        torch.testing.assert_close(ours, x, atol=5e-3, rtol=0)


def test_views_of_a_batch_are_augmented_each_by_its_own_numbers(images):
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(np.stack([ViewRecipe().draw(rng, view) for view in (0, 1, 0, 1)]))
    together = augment_views(images, rows)
    for number in range(4):
        alone = augment_views(images[number : number + 1], rows[number : number + 1])
        torch.testing.assert_close(together[number], alone[0], atol=1e-6, rtol=0)


def test_batch_is_normalised_by_imagenets_mean_and_deviation(images):
    row = torch.tensor(list(NEUTRAL.values())).expand(2, 2, -1)
    batch = {
        "views": images.permute(0, 2, 3, 1).view(2, 2, 48, 48, 3),
        "augment": row,
        "noise": torch.rand(2, 2, 16),
    }
    expected = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(images / 255).view(
        2, 2, 3, 48, 48
    )
    result = augment_batch(batch)
    torch.testing.assert_close(result["views"], expected, atol=1e-2, rtol=0)
    assert result["noise"] is batch["noise"]


def test_recipe_draws_with_the_probabilities_and_ranges_it_names():
    rng = np.random.default_rng(0)
    first, second = (
        np.stack([ViewRecipe().draw(rng, view) for _ in range(4000)]) for view in (0, 1)
    )
    column = {name: i for i, name in enumerate(PARAMETERS)}
    for drawn in (first, second):
        jittered = drawn[:, column["brightness"]] != 1
        assert jittered.mean() == pytest.approx(0.8, abs=0.03)
        assert drawn[:, column["flip"]].mean() == pytest.approx(0.5, abs=0.03)
        assert drawn[:, column["grey"]].mean() == pytest.approx(0.2, abs=0.03)
        for name, middle, half in (
            ("brightness", 1, 0.4),
            ("contrast", 1, 0.4),
            ("saturation", 1, 0.2),
            ("hue", 0, 0.1),
        ):
            values = drawn[jittered, column[name]] - middle
            assert -half <= values.min() < -0.95 * half and 0.95 * half < values.max() <= half
    sigma = first[:, column["blur_sigma"]]
    assert (
        sigma.min() >= 0.1 and sigma.max() <= 2.0 and sigma.mean() == pytest.approx(1.05, abs=0.05)
    )
    assert not second[:, column["blur_sigma"]].any() and not first[:, column["solarise"]].any()
    assert second[:, column["solarise"]].mean() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("size", [(240, 320), (320, 120), (40, 40)])
def test_crops_are_distributed_as_torchvisions(size):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    frame, scale, ratio = torch.empty(3, *size), (0.08, 1.0), (3 / 4, 4 / 3)
    ours = np.array([draw_crop(rng, *size, scale, ratio) for _ in range(3000)])
    theirs = np.array(
        [RandomResizedCrop.get_params(frame, list(scale), list(ratio)) for _ in range(3000)]
    )
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= size[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= size[1]).all()
    for column in range(4):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.1 * spread
        assert ours[:, column].std() == pytest.approx(spread, rel=0.06)


def test_crop_and_scale_equals_torchvisions_resized_crop():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (61, 47, 3), np.uint8)
    for _ in range(20):
        box = draw_crop(rng, 61, 47, (0.08, 1.0), (3 / 4, 4 / 3))
        theirs = TF.resized_crop(
            torch.from_numpy(frame).permute(2, 0, 1), *box, [32, 32], T.InterpolationMode.BICUBIC
        )
        assert torch.equal(crop_and_scale(frame, box, 32), theirs)


def test_frame_pairs_are_as_their_names_say():
    rng = np.random.default_rng(0)
    pairs = {
        gap: [draw_frame_pair(rng, 16, gap, 2) for _ in range(500)]
        for gap in ("any", "distant", 0, 4)
    }
    assert all(a != b for a, b in pairs["any"]) and len(set(pairs["any"])) > 200
    assert all((a < 8) != (b < 8) for a, b in pairs["distant"])
    assert {a < 8 for a, _ in pairs["distant"]} == {True, False}
    assert all(a == b for a, b in pairs[0]) and {abs(a - b) for a, b in pairs[4]} == {4}
    assert draw_frame_pair(rng, 1, "any", 2) == (0, 0)
    assert {abs(a - b) for a, b in (draw_frame_pair(rng, 3, 4, 2) for _ in range(20))} == {2}


def make_loader(
    demo: Path,
    num_workers: int,
    seed: int = 0,
    streams: tuple = ("train_videos", "train_images"),
    **options,
):
    dist.initialize_dist("cpu")
    pairs = PretrainingViews(32, 16, video={}, image={})
    spec, _ = load_stream(
        pairs,
        augment_batch,
        seed,
        8,
        options.pop("run", demo),
        streams=[{"path": str(demo / name)} if isinstance(name, str) else name for name in streams],
        global_train_batch_size=20,
        num_workers=num_workers,
        **options,
    )
    return spec.dataloader


def open_often(together, demo: Path) -> None:
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_PORT": "0",
    }
    together.wait()
    opened = [make_loader(demo, 0) for _ in range(20)]
    assert len(opened) == 20


def count_steps(rank: int, demo: str, folder: str) -> None:
    steps = [
        [len(batch["target"]) for batch in make_loader(Path(demo), 0, epoch_size=79)]
        for _ in range(2)
    ]
    if rank == 0:
        Path(folder, "steps.json").write_text(json.dumps(steps))


def test_an_epoch_has_the_same_steps_on_any_number_of_ranks_whatever_is_left_over(
    demo, tmp_path, on_ranks
):
    """Streaming would fill 79 samples up to 80, which are four batches."""
    alone = [
        [len(batch["target"]) for batch in make_loader(demo, 0, epoch_size=79)] for _ in range(2)
    ]
    on_ranks(2, count_steps, str(demo), str(tmp_path))
    assert (
        alone == [[20] * 3] * 2
        and json.loads((tmp_path / "steps.json").read_text()) == [[10] * 3] * 2
    )


def test_jobs_that_start_together_on_a_machine_do_not_take_each_others_shared_memory(demo):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["composer", "streaming", "timm"])
    together = context.Barrier(2)
    jobs = [context.Process(target=open_often, args=(together, demo)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]


def epochs_of(loader, count: int) -> list[list[dict[str, torch.Tensor]]]:
    return [list(loader) for _ in range(count)]


def test_views_depend_on_seed_epoch_and_sample_alone_not_on_the_workers(demo):
    alone, two = (epochs_of(make_loader(demo, workers), 2) for workers in (0, 2))
    for epoch in (0, 1):
        assert len(alone[epoch]) == len(two[epoch]) == 6
        for ours, theirs in zip(alone[epoch], two[epoch], strict=True):
            assert ours["views"].shape == (20, 2, 32, 32, 3) and ours["views"].dtype == torch.uint8
            assert all(torch.equal(ours[key], theirs[key]) for key in ("views", "augment", "noise"))
    noise = {
        (seed, epoch): {
            tuple(row.flatten().tolist()) for batch in batches for row in batch["noise"]
        }
        for seed, run in ((0, alone), (1, epochs_of(make_loader(demo, 0, seed=1), 1)))
        for epoch, batches in enumerate(run)
    }
    assert len(set().union(*noise.values())) == 3 * 120  # no draw is ever repeated


def test_sample_that_its_stream_repeats_gets_fresh_views_each_time(demo):
    streams = (
        {"path": str(demo / "train_images"), "proportion": 0.75},
        {"path": str(demo / "train_videos"), "proportion": 0.25},
    )
    (batches,) = epochs_of(make_loader(demo, 0, streams=streams, epoch_size=240), 1)
    noise = torch.cat([batch["noise"] for batch in batches]).flatten(1)
    assert (
        len(noise) == 240 and len(noise.unique(dim=0)) == 240
    )  # 180 of 60 stills, so each is seen three times


@pytest.mark.parametrize("shares", [(0.75, 0.25), (0.6, 0.4), None])
def test_constant_mix_gives_every_batch_the_streams_share_and_drops_nothing(demo, shares):
    streams = [{"path": str(demo / name)} for name in ("train_videos", "train_images")]
    for stream, share in zip(streams, shares or (), strict=False):
        stream["proportion"] = share
    names, fewest = set(), 20
    for constant in (True, False):
        loader = make_loader(demo, 2, streams=streams, constant_mix=constant)
        loader.dataset.transform = lambda sample, rng: {"name": sample["name"]}
        for _ in range(2):
            for batch in loader:
                clips = sum(name.endswith("mp4") for name in batch["name"])
                assert not constant or clips == 20 * (shares or (0.5,))[0]
                names |= set(batch["name"]) if constant and not shares else set()
                fewest = min(fewest, clips if not constant else 20)
    assert fewest < 20 * (shares or (0.5,))[0]  # left to chance, the mix varies
    assert len(names) == (0 if shares else 120)


def test_repeats_draw_several_different_pairs_from_a_sample_read_once(demo):
    loader = make_loader(demo, 0, repeats=4)
    batches, once = list(loader), list(make_loader(demo, 0))
    assert len(loader) == len(batches) == 24
    noise = torch.cat([batch["noise"] for batch in batches]).flatten(1)
    assert len(noise) == 480 and len(noise.unique(dim=0)) == 480
    assert torch.equal(
        torch.cat([batch["noise"] for batch in once]).flatten(1), noise[::4]
    )  # the first of each is as ever
    assert loader.dataset.state_dict(40, True)["sample_in_epoch"] == 10


def test_undecodable_sample_gives_way_to_the_next_and_is_named_and_too_many_end_the_run(
    demo, tmp_path
):
    shutil.copytree(demo / "train_videos", tmp_path / "train_videos")
    spoilt(demo / "train_images", tmp_path, 7)
    loader = make_loader(tmp_path, 2, run=tmp_path)
    assert sum(len(batch["views"]) for batch in loader) == 120
    lines = (tmp_path / "unreadable.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == [
        data_prep.Clips(str(tmp_path / "train_images"))[7]["name"]
    ]
    spoilt(demo / "train_images", tmp_path, 0, 1, 2, 3, 7)
    with pytest.raises(
        RuntimeError,
        match=r"samples cannot be decoded, see .*unreadable.jsonl; run data_prep.py verify",
    ):
        list(make_loader(tmp_path, 0, run=tmp_path))


def test_shard_that_is_cut_costs_its_last_samples_alone(demo, tmp_path):
    shutil.copytree(demo / "train_videos", tmp_path / "train_videos")
    (shard,) = spoilt(demo / "train_images", tmp_path).rglob("*.mds")
    shard.write_bytes(shard.read_bytes()[:-3000])
    loader = make_loader(tmp_path, 0, run=tmp_path, max_unreadable=0.2)
    assert sum(len(batch["views"]) for batch in loader) == 120
    assert 0 < len((tmp_path / "unreadable.jsonl").read_text().splitlines()) < 12


def test_run_whose_first_sample_and_whose_queries_are_spoilt_is_finished(demo, tmp_path, capfd):
    images, queries = (
        spoilt(demo / "train_images", tmp_path, 0),
        spoilt(demo / "test_images", tmp_path, 59),
    )
    base, *settings = small(demo)
    arguments = [
        base,
        *settings,
        f"data.streams=[{{path: {images}}}]",
        "trainer.max_duration=1ep",
        "data.num_workers=0",
    ]
    run_stage(pretrain, [*arguments, f"callbacks.KNN.queries=[{queries}]"], tmp_path)
    run = tmp_path / "runs" / "demo"
    right = 59 * json.loads((run / "result.json").read_text())["knn/trained"]
    assert right == pytest.approx(round(right))
    names = {
        json.loads(line)[0] for line in (run / "unreadable_eval.jsonl").read_text().splitlines()
    }
    assert (
        names == {f"{images}, sample 0", f"{queries}, sample 59"}
        and (run / "reconstructions.png").exists()
    )
    assert (
        "1 of 60 samples cannot be decoded, or have no label, and do not count"
        in capfd.readouterr().out
    )


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["model.contrast=none", "algorithms={ContrastRamp: {duration: 2ep}}"],
            "ContrastRamp: model.contrast is none",
        ),
        (
            ["model.mask=none", "algorithms={PartialDecoding: {}}"],
            "PartialDecoding: model.mask is none",
        ),
        (
            ["trainer.parallelism_config={fspd: {}}"],
            "trainer.parallelism_config.fspd is not a key here; the key is fsdp",
        ),
        (
            ["data.global_micro_batch_size=1"],
            "a micro-batch of 1 sample has no others to contrast with",
        ),
        (
            ["trainer.compile_config={bogus: 1}"],
            "trainer, algorithms, callbacks or loggers: TypeError",
        ),
        (["trainer.max_duration=0ep"], "trainer.max_duration is missing"),
        (["algorithms={MixUp: {}}"], "algorithms.MixUp is not a key here"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(demo, tmp_path, overrides, complaint):
    with pytest.raises(SystemExit) as end:
        run_stage(
            pretrain, [*small(demo), "callbacks=null", "data.num_workers=0", *overrides], tmp_path
        )
    assert complaint in str(end.value) and "\n" not in str(end.value)


def test_data_set_that_is_named_twice_is_refused(demo):
    with pytest.raises(
        ValueError, match=r"names .*train_images 2 times; name it once, with a proportion"
    ):
        make_loader(demo, 0, streams=("train_images", "train_images"))


def test_occurrences_of_a_sample_are_numbered_in_order():
    class Repeating(DeterministicStream):
        def __init__(self):
            self.num_samples = 10

        def __del__(self):
            pass

    stream = Repeating()
    listed = np.array([3, 1, 3, 2, 1, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            streams.StreamingDataset, "resample_streams", lambda *_: (None, listed.copy())
        )
        assert stream.resample_streams(0)[1].tolist() == [3, 1, 13, 2, 11, 23]


def test_image_gives_two_crops_of_one_frame_and_a_clip_two_frames(demo):
    from streaming import LocalDataset

    seen = []
    whole = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}
    pairs = PretrainingViews(40, 16, video=whole, image=whole)
    with pytest.MonkeyPatch.context() as patch:
        decode = data_prep.decode_frame
        patch.setattr(
            data_prep,
            "decode_frame",
            lambda sample, index: seen.append(index) or decode(sample, index),
        )
        still = pairs(LocalDataset(str(demo / "train_images"))[0], np.random.default_rng(0))
        assert seen == [0] and torch.equal(still["views"][0], still["views"][1])
        clip = pairs(LocalDataset(str(demo / "train_videos"))[0], np.random.default_rng(0))
        assert len(seen) == 3 and not torch.equal(clip["views"][0], clip["views"][1])


def test_optimizer_decays_matrices_alone_and_holds_every_trainable_parameter_once():
    net = ViCMAE(32, 8, 48, 2, 3, 24, 1, 3, 32, 16)
    adamw = pretrain.build_optimizer(net, 512, base_lr=1e-3, weight_decay=0.05)
    assert {group["lr"] for group in adamw.param_groups} == {2e-3}
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(decay) == len(named) == sum(len(group["params"]) for group in adamw.param_groups)
    for name, parameter in named.items():
        bare = (
            name.endswith(".bias")
            or "norm" in name
            or name.split(".")[:2] in (["projector", "1"], ["projector", "4"])
        )
        assert decay[id(parameter)] == (0.0 if bare else 0.05), name
    assert not {"encoder.pos_embed", "decoder.pos_embed"} & named.keys()


def test_knn_accuracy_equals_a_loop_over_queries():
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(40, 6, generator=generator), torch.randint(4, (40,), generator=generator)
    asked = torch.randn(25, 6, generator=generator), torch.randint(4, (25,), generator=generator)
    right = 0
    for query, truth in zip(*asked, strict=True):
        cosine = [float(query @ x / query.norm() / x.norm()) for x in bank[0]]
        votes = [0.0] * 4
        for index in sorted(range(40), key=lambda i: -cosine[i])[:5]:
            votes[int(bank[1][index])] += math.exp(cosine[index] / 0.07)
        right += votes.index(max(votes)) == truth
    assert knn_accuracy(bank, asked, k=5) == right / 25


def labels_on_a_rank(rank: int, path: str, out: str) -> None:
    views = EvalViews([path], 8)
    found = infer(torch.nn.Linear(1, 1), lambda x: x.mean(dim=(1, 2, 4, 5)), views, batch_size=7)
    torch.save(found, f"{out}/{rank}")


def test_every_sample_is_inferred_once_and_in_order_on_one_rank_and_on_two(
    demo, tmp_path, on_ranks
):
    path = str(demo / "test_videos")
    on_ranks(2, labels_on_a_rank, path, str(tmp_path))
    views = EvalViews([path], 8)
    expected = [int(views[i]["target"]) for i in range(60)]
    colours = torch.stack(
        [
            TF.normalize(views[i]["inputs"] / 255, MEAN, STD).mean(dim=(0, 1, 3, 4))
            for i in range(60)
        ]
    )
    for rank in (0, 1):
        outputs, labels = torch.load(tmp_path / str(rank), weights_only=True)
        assert labels.tolist() == expected
        torch.testing.assert_close(outputs, colours, atol=1e-5, rtol=1e-5)


def test_eval_views_are_spread_over_time_and_along_the_longer_side(demo):
    frames = np.zeros((8, 20, 60, 3), np.uint8)
    frames[..., 0] = (np.arange(8) * 30)[:, None, None]  # time
    frames[..., 1] = np.arange(60) * 4  # place
    sample = data_prep.encode_clip([encode(frame) for frame in frames], list(range(8)), 0, "x")
    views = EvalViews(
        [str(demo / "test_videos")],
        20,
        num_frames=4,
        temporal_views=2,
        spatial_views=3,
        crop_pct=1.0,
    )
    views.data = [sample]
    inputs = views[0]["inputs"].float()
    assert inputs.shape == (6, 4, 3, 20, 20)
    times = inputs[:, :, 0].mean(dim=(2, 3)) / 30
    assert [row.round().tolist() for row in times] == [[0, 2, 4, 6]] * 3 + [[1, 3, 5, 7]] * 3
    places = inputs[:, :, 1].mean(dim=(1, 2, 3)) / 4
    assert places.tolist() == pytest.approx([9.5, 29.5, 49.5] * 2, abs=1)


def encode(frame: np.ndarray) -> bytes:
    return __import__("simplejpeg").encode_jpeg(frame, 100, colorsubsampling="444")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "model.embed_dims=64",
            "model.embed_dims=64: model.embed_dims is not a key here; the nearest is embed_dim",
        ),
        ("modle.depth=2", "modle is not a key here; the nearest is model"),
        ("model.depth=deep", "model.depth is 'deep': input should be a valid integer"),
        ("model=deep", "model is 'deep': input should be a valid dictionary"),
        ("augment.video.crop_scale=[1.0]", "augment.video.crop_scale"),
        (
            "augment.video.flip=7",
            "augment.video.flip is 7: input should be less than or equal to 1",
        ),
        ("augment.sections=1", "augment.sections is 1"),
        ("model.patch_size=0", "model.patch_size is 0: input should be greater than 0"),
        ("data.num_workers=-1", "data.num_workers is -1"),
        ("augment.frame_gap=far", "augment.frame_gap is 'far'"),
        (
            "trainer.max_duration=3.5ep",
            "trainer.max_duration is '3.5ep': give a whole number of epochs or steps",
        ),
        ("trainer.max_duration=-1ep", "trainer.max_duration is '-1ep': must be 0 or more"),
        ("schedule.t_warmup=soon", "schedule.t_warmup is 'soon': give a whole number"),
        ("checkpoints.interval=0ep", "checkpoints.interval is '0ep': must be positive"),
        (
            "algorithms={ContrastRamp: {duration: -1ba}}",
            "algorithms.ContrastRamp.duration is '-1ba': must be positive",
        ),
        ("trainer.parallelism_config=3", "trainer.parallelism_config is 3"),
        ("run_name=a/b", "run_name is 'a/b'"),
        ("data.streams=[{pth: x}]", r"data.streams.0.pth is not a key here; the nearest is path"),
        ("optimizer.weight_decay=null", "optimizer.weight_decay is None"),
        ("trainer.max_duration=[1]", "trainer.max_duration is [1]"),
        ("trainer.model=x", "trainer.model is not a key here"),
        ("callbacks.LRMonitr={}", "callbacks.LRMonitr is not a key here; the nearest is LRMonitor"),
        ("callbacks.KNN.banks=[x]", "callbacks.KNN.banks is not a key here; the nearest is bank"),
        ("run_name=null", "run_name is None"),
        ("nonsense", "'nonsense' is neither a .yaml file nor key=value"),
        ("missing.yaml", "missing.yaml: "),
    ],
)
def test_mistake_in_the_configuration_is_named_with_its_file_and_key(override, complaint):
    arguments = [str(ROOT / "yamls" / "demo.yaml"), override]
    with pytest.raises(ValueError) as error:
        load_config(arguments, pretrain.pretrain)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_missing_key_and_file_at_fault_are_named(tmp_path):
    first = write(tmp_path / "a.yaml", "run_name: x\nseed: 0\nmodel: {depth: 2}\n")
    second = write(tmp_path / "b.yaml", "model: {dpeth: 3}\n")
    with pytest.raises(
        ValueError, match=r"b.yaml: model.dpeth is not a key here; the nearest is depth"
    ):
        load_config([first, second], pretrain.pretrain)
    with pytest.raises(ValueError, match="data is missing"):
        load_config([first], pretrain.pretrain)
    with pytest.raises(ValueError, match=r"c.yaml"):
        load_config([write(tmp_path / "c.yaml", "model: [unclosed")], pretrain.pretrain)


def test_files_merge_left_to_right_then_overrides(tmp_path):
    overlay = write(tmp_path / "o.yaml", "seed: 7\nmodel: {depth: 5}\n")
    config = load_config(
        [str(ROOT / "yamls" / "demo.yaml"), overlay, "model.depth=6"], pretrain.pretrain
    )
    assert (config["seed"], config["model"]["depth"], config["model"]["img_size"]) == (7, 6, 32)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"streams": ({"path": "nowhere"},)}, "nowhere is not a complete data set"),
        ({"patch_size": 64}, "40x40 are smaller than model.patch_size 64"),
        ({"streams": ()}, "data.streams is empty"),
        ({"micro": 15}, "20 must be a multiple of global_micro_batch_size 15"),
        ({"batch": 4000}, "data.global_train_batch_size 4000 is more than an epoch's 60"),
        ({"repeats": 3}, "data.repeats 3 must divide each rank's share of a micro-batch, 20"),
        (
            {"streams": ({"path": "a"}, {"path": "b", "proportion": 1.0})},
            "give it to all or to none",
        ),
    ],
)
def test_data_that_cannot_be_used_is_named(demo, change, culprit):
    dist.initialize_dist("cpu")
    with pytest.raises(ValueError, match=culprit):
        load_stream(
            lambda sample, rng: sample,
            lambda batch: batch,
            0,
            change.get("patch_size", 8),
            demo,
            streams=change.get("streams", [{"path": str(demo / "train_videos")}]),
            repeats=change.get("repeats", 1),
            global_train_batch_size=change.get("batch", 20),
            global_micro_batch_size=change.get("micro"),
        )


def test_run_of_another_configuration_is_refused_with_the_keys_that_differ(demo, tmp_path):
    arguments = [*small(demo), "trainer.max_duration=1ba", "callbacks=null"]
    run_stage(pretrain, arguments, tmp_path)
    with pytest.raises(SystemExit) as exit:
        run_stage(pretrain, [*arguments, "model.mask_ratio=0.7", "seed=5"], tmp_path)
    assert "runs/demo was begun with another model.mask_ratio, seed; give another run_name" in str(
        exit.value
    )
    with pytest.raises(SystemExit) as exit:
        run_stage(pretrain, [*arguments, "trainer.max_duration=9ba"], tmp_path)
    assert exit.value.code == 0


def test_data_set_without_labels_is_refused_where_labels_are_needed(demo, tmp_path):
    (tmp_path / "in").mkdir()
    still = next((demo / "raw" / "train" / "images" / "Bag").iterdir())
    (tmp_path / "in" / "x.jpg").write_bytes(still.read_bytes())
    data_prep.convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    with pytest.raises(ValueError, match="out has no labels"):
        data_prep.common_classes([str(tmp_path / "out")])


def test_command_line_pretrains_draws_and_says_when_it_is_finished(demo, tmp_path):
    result = launch(tmp_path, "pretrain.py", *small(demo))
    assert result.returncode == 0, result.stderr
    assert "k-NN accuracy" in result.stdout
    run = tmp_path / "runs" / "demo"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss/train/total" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    for line in lines:
        if "loss/train/total" in line:
            parts = 0.7 * line["loss/train/reconstruction"] + 0.3 * line["loss/train/contrastive"]
            assert line["loss/train/total"] == pytest.approx(parts, rel=1e-5)
    assert {"knn/random", "knn/trained"} <= json.loads((run / "result.json").read_text()).keys()
    for name in ("config.yaml", "loss.png", "reconstructions.png", "checkpoints/latest-rank0.pt"):
        assert (run / name).stat().st_size > 0
    written = (run / "metrics.jsonl").stat().st_mtime_ns
    again = launch(tmp_path, "pretrain.py", *small(demo))
    assert again.returncode == 0 and "is finished" in again.stdout
    assert (run / "metrics.jsonl").stat().st_mtime_ns == written


def test_two_ranks_log_what_one_rank_logs(demo, tmp_path):
    arguments = [*small(demo), "trainer.max_duration=4ba"]
    run_stage(pretrain, [*arguments, "run_name=one"], tmp_path)
    result = launch(tmp_path, "pretrain.py", *arguments, "run_name=two", ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = (
        json.loads((tmp_path / "runs" / name / "result.json").read_text())
        for name in ("one", "two")
    )
    for key in ("loss/train/total", "loss/train/reconstruction", "loss/train/contrastive"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert two["knn/random"] == one["knn/random"]


def test_command_line_ends_a_mistake_in_one_line_before_any_work(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "pretrain.py"),
        str(ROOT / "yamls" / "demo.yaml"),
        "model.detph=3",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert (
        result.stderr.strip()
        == "pretrain.py: model.detph=3: model.detph is not a key here; the nearest is depth"
    )


@pytest.mark.parametrize("overlay", [[], ["paper.yaml"], ["five.yaml"], ["vitl_fast.yaml"]])
@pytest.mark.parametrize("name", ["demo", "vits", "vitb", "vitl", "vith"])
def test_pretraining_yaml_constructs(name, overlay):
    files = [str(ROOT / "yamls" / file) for file in (f"{name}.yaml", *overlay)]
    config = load_config(files, pretrain.pretrain)
    with torch.device("meta"):
        net = ViCMAE(**config["model"])
    pairs = PretrainingViews(net.encoder.img_size, net.encoder.num_patches, **config["augment"])
    pretrain.build_optimizer(net, config["data"]["global_train_batch_size"], **config["optimizer"])
    pretrain.CosineAnnealingWithWarmupScheduler(**config["schedule"])
    pretrain.build_named(
        CALLBACKS, {k: v for k, v in config["callbacks"].items() if k != "KNN"}
    )  # needs data
    if overlay == ["paper.yaml"]:
        assert net.mask_ratio == 0.75 and pairs.frame_gap == "distant" and pairs.video.jitter == 0


def ends_at(step: int):
    def batch_start(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == step:
            raise SystemExit

    return batch_start


@pytest.mark.parametrize(("step", "num_workers"), [(3, 0), (4, 1)])
def test_run_goes_on_from_the_checkpoint_at_an_epochs_end_with_the_next_epoch(
    demo, tmp_path, monkeypatch, num_workers, step
):
    arguments = [
        *small(demo),
        "trainer.max_duration=3ep",
        "callbacks=null",
        f"data.num_workers={num_workers}",
    ]
    run_stage(pretrain, [*arguments, "run_name=whole"], tmp_path)
    for last in (step, step + 3):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Checkpoints, "batch_start", ends_at(last))
            run_stage(
                pretrain, [*arguments, "run_name=stopped", "checkpoints.interval=1ep"], tmp_path
            )
    run_stage(pretrain, [*arguments, "run_name=stopped"], tmp_path)
    lines = [
        (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        for name in ("whole", "stopped")
    ]
    whole, resumed = (
        [line["loss/train/total"] for line in map(json.loads, one) if "loss/train/total" in line]
        for one in lines
    )
    assert whole == resumed and len(whole) == 9


@pytest.mark.parametrize(("stop", "repeats"), [("1ep", 1), ("4ba", 1), ("4ba", 2)])
def test_resumed_run_ends_with_the_weights_of_one_never_stopped(demo, tmp_path, stop, repeats):
    arguments = [*small(demo), "schedule.t_max=2ep", "checkpoints.interval=1ba", "callbacks=null"]
    arguments += [f"data.repeats={repeats}"]
    run_stage(pretrain, [*arguments, "run_name=whole"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=stopped", f"trainer.max_duration={stop}"], tmp_path)
    (tmp_path / "runs" / "stopped" / "result.json").unlink()
    run_stage(pretrain, [*arguments, "run_name=stopped"], tmp_path)
    whole, resumed = (
        read_checkpoint(str(tmp_path / "runs" / name / "checkpoints" / "latest-rank0.pt"))
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "stopped" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss/train/total" in line] == [
        *range(1, 6 * repeats + 1)
    ]
