"""Frames, crops and numbers that are drawn for the views of a sample."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from streaming import MDSWriter
from torchvision.transforms import RandomResizedCrop

from shards import views as views_module
from shards.augment import PARAMETERS
from shards.format import COLUMNS, Clips, encode_clip
from shards.views import (
    EvalViews,
    PretrainingViews,
    ViewRecipe,
    check_frames,
    crop_and_scale,
    draw_crop,
    draw_frame_pair,
    draw_window,
    pick_frames,
)

WHOLE_FRAME = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}


def make_clip(frames: np.ndarray, label: int = 0) -> dict:
    """Return a stored sample of frames (T, H, W, 3) uint8, one a second."""
    encoded = [simplejpeg.encode_jpeg(frame, 100, colorsubsampling="444") for frame in frames]
    return encode_clip(encoded, list(range(len(frames))), label, "clip")


def random_frames(count: int, size: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


class Samples(list):
    """Samples in the place of the data sets of EvalViews."""

    cumulative_sizes = (60,)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The indices of all frames that are decoded, in order."""
    indices = []
    decode_frame = views_module.decode_frame

    def record(sample: dict, index: int) -> np.ndarray:
        indices.append(index)
        return decode_frame(sample, index)

    monkeypatch.setattr(views_module, "decode_frame", record)
    return indices


def test_recipe_draws_with_its_probabilities_and_ranges():
    rng = np.random.default_rng(0)
    first = np.stack([ViewRecipe().draw(rng, 0) for _ in range(4000)])
    second = np.stack([ViewRecipe().draw(rng, 1) for _ in range(4000)])
    column = {name: i for i, name in enumerate(PARAMETERS)}
    jitter = {"brightness": (1, 0.4), "contrast": (1, 0.4), "saturation": (1, 0.2), "hue": (0, 0.1)}
    for drawn in (first, second):
        jittered = drawn[:, column["brightness"]] != 1
        assert jittered.mean() == pytest.approx(0.8, abs=0.03)
        assert drawn[:, column["flip"]].mean() == pytest.approx(0.5, abs=0.03)
        assert drawn[:, column["grey"]].mean() == pytest.approx(0.2, abs=0.03)
        for name, (middle, half_range) in jitter.items():
            values = drawn[jittered, column[name]] - middle
            assert -half_range <= values.min() < -0.95 * half_range
            assert 0.95 * half_range < values.max() <= half_range
    sigma = first[:, column["blur_sigma"]]
    assert sigma.min() >= 0.1 and sigma.max() <= 2.0
    assert sigma.mean() == pytest.approx(1.05, abs=0.05)
    assert not second[:, column["blur_sigma"]].any()
    assert not first[:, column["solarise"]].any()
    assert second[:, column["solarise"]].mean() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("size", [(240, 320), (320, 120), (40, 40)])
def test_crops_are_distributed_as_torchvisions(size):
    height, width = size
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    frame, scale, ratio = torch.empty(3, *size), (0.08, 1.0), (3 / 4, 4 / 3)
    ours = np.array([draw_crop(rng, height, width, scale, ratio) for _ in range(3000)])
    get_params = RandomResizedCrop.get_params
    theirs = np.array([get_params(frame, list(scale), list(ratio)) for _ in range(3000)])
    top, left, crop_height, crop_width = ours.T
    assert (top >= 0).all() and (top + crop_height <= height).all()
    assert (left >= 0).all() and (left + crop_width <= width).all()
    for column in range(4):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.1 * spread
        assert ours[:, column].std() == pytest.approx(spread, rel=0.06)


@pytest.mark.parametrize("size", [(300, 20), (20, 300)])
def test_crop_that_never_fits_is_torchvisions_central_crop(size):
    scale, ratio = (1.0, 1.0), (1.0, 4 / 3)
    ours = draw_crop(np.random.default_rng(0), *size, scale, ratio)
    torch.manual_seed(0)
    assert ours == RandomResizedCrop.get_params(torch.empty(3, *size), list(scale), list(ratio))


def test_crop_and_scale_equals_torchvisions_resized_crop():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (61, 47, 3), np.uint8)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)
    for _ in range(20):
        box = draw_crop(rng, 61, 47, (0.08, 1.0), (3 / 4, 4 / 3))
        theirs = TF.resized_crop(pixels, *box, [32, 32], T.InterpolationMode.BICUBIC)
        ours = crop_and_scale(frame, box, 32)
        assert torch.equal(ours, theirs)
        assert ours.permute(1, 2, 0).is_contiguous()


def test_frame_pairs_keep_the_gap_that_is_asked_for():
    rng = np.random.default_rng(0)
    any_pair = [draw_frame_pair(rng, 16, "any", 2) for _ in range(500)]
    assert all(a != b for a, b in any_pair) and len(set(any_pair)) > 200
    distant = [draw_frame_pair(rng, 16, "distant", 2) for _ in range(500)]
    assert all((a < 8) != (b < 8) for a, b in distant)
    assert {a < 8 for a, _ in distant} == {True, False}
    assert all(a == b for a, b in (draw_frame_pair(rng, 16, 0, 2) for _ in range(500)))
    assert {b - a for a, b in (draw_frame_pair(rng, 16, 4, 2) for _ in range(500))} == {-4, 4}


@pytest.mark.parametrize(
    ("count", "rate", "seconds", "frames"),
    [
        (75, 7.5, 2.1, 16),
        (16, 1.6, 2.1, 3),
        (16, 0.1, 2.1, 2),
        (15, 7.5, 2.1, 15),
        (1, 1.0, 2.1, 1),
    ],
)
def test_window_has_the_frames_of_its_duration_and_reaches_all_of_the_clip(
    count, rate, seconds, frames
):
    rng = np.random.default_rng(0)
    timestamps = 3.0 + np.arange(count) / rate
    drawn = {draw_window(rng, timestamps, seconds) for _ in range(1000)}
    assert {number for _, number in drawn} == {frames}
    assert {first for first, _ in drawn} == set(range(count - frames + 1))


def test_frame_pair_of_a_short_clip_is_as_far_apart_as_possible():
    rng = np.random.default_rng(0)
    assert draw_frame_pair(rng, 1, "any", 2) == (0, 0)
    assert {abs(a - b) for a, b in (draw_frame_pair(rng, 3, 4, 2) for _ in range(20))} == {2}


@pytest.mark.parametrize("rate", [30, 15, 7.5, 10])
@pytest.mark.parametrize("position", [0.0, 0.37, 1.0])
def test_frames_are_picked_by_their_times_at_any_frame_rate(rate, position):
    """A view of 16 frames, every fourth of 30 a second, from clips of several rates."""
    interval = 4 / 30
    times = np.arange(int(10 * rate)) / rate + 3.0
    picked = times[pick_frames(times, 16, interval, position)]
    begin = 3.0 + position * (times[-1] - 3.0 - 15 * interval)
    wanted = begin + np.arange(16) * interval
    assert (picked <= wanted + 0.02 * interval + 1e-9).all()
    assert (wanted - picked < 1 / rate + 1e-9).all()
    if position == 0.0 and rate != 10:
        assert np.allclose(np.diff(picked), interval)


def test_frame_on_screen_is_picked_from_a_clip_of_uneven_rate():
    times = np.array([0.0, 0.1, 0.9, 1.0, 5.0])
    assert pick_frames(times, 3, 0.45, 0.0) == [0, 1, 2]
    assert pick_frames(times, 3, 0.45, 1.0) == [3, 3, 4]


def test_short_clip_repeats_its_last_frame_and_an_image_its_only_one():
    assert pick_frames(np.array([0.0, 1.0, 2.0]), 6, 0.5, 0.7) == [0, 0, 1, 1, 2, 2]
    assert pick_frames(np.array([0.0, 1.0]), 5, 1.0, 0.2) == [0, 1, 1, 1, 1]
    assert pick_frames(np.array([0.0]), 4, 0.1, 0.9) == [0, 0, 0, 0]
    assert pick_frames(np.array([0.0]), 4, None, 0.9) == [0, 0, 0, 0]


def test_whole_clip_gives_a_frame_of_each_equal_section():
    assert pick_frames(np.arange(8) / 8, 4, None, 0.0) == [0, 2, 4, 6]
    assert pick_frames(np.arange(8) / 8, 4, None, 0.9) == [1, 3, 5, 7]


def test_image_gives_two_crops_of_one_frame_that_is_decoded_once(decoded):
    pairs = PretrainingViews(40, 16, video=WHOLE_FRAME, image=WHOLE_FRAME)
    drawn = pairs(make_clip(random_frames(1), label=3), np.random.default_rng(0))
    assert decoded == [0]
    assert torch.equal(drawn["views"][0], drawn["views"][1])
    assert drawn["views"].shape == (2, 40, 40, 3) and drawn["views"].dtype == torch.uint8
    assert drawn["augment"].shape == (2, len(PARAMETERS)) and drawn["noise"].shape == (2, 16)
    assert drawn["target"] == 3


def test_clip_gives_two_frames_and_no_other_is_decoded(decoded):
    pairs = PretrainingViews(40, 16, video=WHOLE_FRAME, image=WHOLE_FRAME)
    frames = random_frames(16)
    drawn = pairs(make_clip(frames), np.random.default_rng(0))
    assert len(set(decoded)) == len(decoded) == 2
    nearest = []
    for view in drawn["views"].numpy():
        distance = np.abs(frames.astype(int) - view).mean(axis=(1, 2, 3))  # (T,)
        nearest.append(int(distance.argmin()))
    assert set(nearest) == set(decoded)


def test_first_view_is_drawn_with_the_first_probabilities_and_second_with_the_second():
    recipe = {"blur": [1.0, 0.0], "solarise": [0.0, 1.0]}
    pairs = PretrainingViews(16, 4, video=recipe)
    for seed in range(5):
        augment = pairs(make_clip(random_frames(2)), np.random.default_rng(seed))["augment"]
        assert (augment[:, PARAMETERS.index("blur_sigma")] > 0).tolist() == [True, False]
        assert augment[:, PARAMETERS.index("solarise")].tolist() == [0.0, 1.0]


def test_frames_of_a_clip_view_are_cropped_alike_and_the_views_differ():
    still = np.repeat(random_frames(1), 16, axis=0)
    drawn = PretrainingViews(32, 32, 4)(make_clip(still), np.random.default_rng(0))
    views = drawn["views"]
    assert views.shape == (2, 4, 32, 32, 3) and drawn["noise"].shape == (2, 32)
    assert torch.equal(views, views[:, :1].expand_as(views))
    assert not torch.equal(views[0], views[1])


def test_clip_view_has_a_frame_of_each_section(decoded):
    clip = make_clip(random_frames(16))
    drawn = PretrainingViews(32, 32, 4, views=1)(clip, np.random.default_rng(0))
    assert drawn["views"].shape == (1, 4, 32, 32, 3)
    assert sorted(index // 4 for index in decoded) == [0, 1, 2, 3]


def test_stream_decides_the_frames_of_a_view_even_if_a_clip_has_a_single_frame():
    views = PretrainingViews(32, 32, 4, views=1, image_frames=2)
    for count, of_images, expected in ((1, False, 4), (6, False, 4), (1, True, 2)):
        sample = make_clip(random_frames(count)) | {"of_images": of_images}
        drawn = views(sample, np.random.default_rng(0))
        assert drawn["views"].shape == (1, expected, 32, 32, 3)
        assert drawn["noise"].shape == (1, 32)


def test_three_views_are_refused():
    with pytest.raises(ValueError, match="views=3: must be 1 or 2"):
        PretrainingViews(32, 16, views=3)


def test_eval_views_are_spread_over_time_and_along_the_longer_side(demo):
    frames = np.zeros((8, 20, 60, 3), np.uint8)
    frames[..., 0] = (np.arange(8) * 30)[:, None, None]  # red shows the time
    frames[..., 1] = np.arange(60) * 4  # green shows the column
    path = str(demo / "test_videos")
    views = EvalViews([path], 20, 4, temporal_views=2, spatial_views=3, crop_pct=1.0)
    views.data = Samples([make_clip(frames)])
    inputs = views[0]["inputs"].float()
    assert inputs.shape == (6, 4, 3, 20, 20)
    times = inputs[:, :, 0].mean(dim=(2, 3)) / 30
    assert times.round().tolist() == [[0, 2, 4, 6]] * 3 + [[1, 3, 5, 7]] * 3
    columns = inputs[:, :, 1].mean(dim=(1, 2, 3)) / 4
    assert columns.tolist() == pytest.approx([9.5, 29.5, 49.5] * 2, abs=1)


def test_eval_crop_covers_the_given_fraction_of_the_shorter_side(demo):
    ramp = np.zeros((40, 40, 3), np.uint8)
    ramp[...] = np.arange(40)[:, None] * 4  # shows the column
    views = EvalViews([str(demo / "test_images")], 20, crop_pct=0.5)
    views.data = Samples([make_clip(ramp[None])])
    columns = views[0]["inputs"][0, 0, 0].float() / 4  # (20, 20); the crop is not resized
    torch.testing.assert_close(columns[10], torch.arange(10.0, 30.0), atol=1.0, rtol=0)


def test_labels_of_each_data_set_are_offset_by_its_number(demo):
    paths = [str(demo / "test_videos"), str(demo / "test_images")]
    views = EvalViews(paths, 8, labels=[range(10), range(100, 110)])
    for number in (0, 59, 60, 119):
        data_set, row = divmod(number, 60)
        stored = Clips(paths[data_set])[row]["label"]
        assert int(views[number]["target"]) == stored + 100 * data_set


def test_unreadable_sample_is_black_without_a_label_and_too_many_are_an_error(demo, tmp_path):
    path, report = str(demo / "test_images"), tmp_path / "unreadable_eval.jsonl"
    views = EvalViews([path], 8, run=report.parent, labels=[range(100, 110)])
    corrupt = make_clip(random_frames(1)) | {"frames": b"no JPEG"}
    stored = [views.data[number] for number in range(60)]
    views.data = Samples([corrupt, *stored[1:]])
    assert int(views[0]["target"]) == -1 and not views[0]["inputs"].any()
    assert int(views[1]["target"]) == stored[1]["label"] + 100 and views[1]["inputs"].any()
    assert f"{path}, sample 0" in report.read_text()
    views.data[1] = corrupt
    complaint = r"2 samples cannot be used, see .*unreadable_eval\.jsonl"
    with pytest.raises(ValueError, match=complaint):
        views[1]
    views.run = None
    with pytest.raises(ValueError, match="test_images, sample 0 cannot be decoded"):
        views[0]


def test_generator_of_a_sample_draws_what_it_drew_for_earlier_checkpoints():
    """Golden numbers of the first release; a run that resumes an old checkpoint depends on them."""
    rng = np.random.default_rng((7, 3, 12, 0))
    assert draw_crop(rng, 240, 320, (0.08, 1.0), (3 / 4, 4 / 3)) == (6, 1, 216, 277)
    assert draw_frame_pair(rng, 16, "any", 2) == (13, 3)
    assert draw_frame_pair(rng, 16, "distant", 5) == (10, 1)
    assert draw_frame_pair(rng, 16, 4, 2) == (9, 5)
    flip, jitter = 0.0, [0.72049034, 1.3271302, 1.0304641, 0.037241787]
    grey, blur_sigma, solarise = 0.0, 1.8210588, 0.0
    expected = [flip, *jitter, grey, blur_sigma, solarise]
    assert ViewRecipe().draw(rng, 0).tolist() == pytest.approx(expected, rel=1e-6)


def write_clips(path: Path, clips: list[np.ndarray]) -> str:
    """Write clips with these timestamps as a data set, without data_prep.py."""
    jpeg = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    with MDSWriter(out=str(path), columns=COLUMNS) as writer:
        for times in clips:
            writer.write(encode_clip([jpeg] * len(times), list(times), 0, "clip"))
    return str(path)


@pytest.mark.parametrize(
    ("times", "frame_interval", "repeats"),
    [
        (np.arange(75) / 7.5, 1 / 7.5, False),
        (np.floor(np.arange(75) / 7.5 * 25) / 25, 1 / 7.5, False),  # --fps 7.5 of 25 Hz
        (np.floor(np.arange(75) / 7.5 * 10) / 10, 1 / 7.5, False),  # and of 10 Hz
        (np.arange(8) / 7.5, 1 / 7.5, False),  # a short video
        (np.floor(np.arange(75) / 7.5 * 5) / 5, 1 / 7.5, False),  # a slow video
        (np.zeros(1), 1 / 7.5, False),  # a still
        (np.arange(8.0), None, True),
        (np.arange(16.0), None, False),
        (np.arange(16) // 2 * 1.0, None, False),  # --frames 16 of a video of 8 frames
    ],
)
def test_frames_that_are_repeated_are_said(tmp_path, capsys, times, frame_interval, repeats):
    path = write_clips(tmp_path / "set", [times] * 3)
    check_frames([path], 16, frame_interval)
    mean = "hold 8.0 distinct frames on average; convert with --frames 16"
    assert capsys.readouterr().out == (f"{path}: clips of 16 frames {mean}\n" if repeats else "")


def test_frames_that_are_repeated_at_a_fixed_interval_are_refused(tmp_path):
    times = np.arange(16) * 10 / 16  # 16 frames of 10 s
    path = write_clips(tmp_path / "set", [times] * 3)
    expected = rf"{path}: clips of 16 frames at 7.5 Hz hold 4\.\d distinct frames on average; "
    with pytest.raises(ValueError, match=expected + "convert with --fps 7.5$"):
        check_frames([path], 16, 1 / 7.5)


def test_evaluated_sample_smaller_than_a_patch_is_counted(tmp_path):
    path = write_clips(tmp_path / "set", [np.zeros(1)] * 3)
    assert EvalViews([path], 32, patch_size=16)[1]["target"] == 0
    views = EvalViews([path], 32, patch_size=17, run=tmp_path)
    assert views[1]["target"] == -1
    listed = (tmp_path / "unreadable_eval.jsonl").read_text()
    assert "frames of 16x16 are smaller than model.patch_size=17" in listed
