"""Cuts of a film at changes of its scene."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
from test_data_prep import BIKES

import data_prep
from shards.decode import Recipe, read_clips
from shards.format import Clips

SCENES = (12, 9, 19)  # frames


def write_film(path: Path, codec: str, scenes: tuple[int, ...] = SCENES, rate: int = 10) -> None:
    """Write a film of scenes: grey pictures of different textures, moved and brightened."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, frames in enumerate(scenes):
            texture = rng.integers(0, 60, (6, 8)).repeat(8, 0).repeat(8, 1)
            for frame in range(frames):
                picture = 90 * (number % 2) + np.roll(texture, 2 * frame, 1) + frame
                pixels = np.repeat(picture[..., None], 3, 2).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def scene_of(second: float, rate: int = 10) -> int:
    """Return the number of the scene that is shown at a time."""
    frame = round(second * rate)
    return int(np.searchsorted(np.cumsum(SCENES), frame, "right"))


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4")])
def test_no_clip_has_frames_of_two_scenes(tmp_path, name, codec):
    write_film(tmp_path / name, codec)
    recipe = Recipe("videos", frames=4, clip_seconds=0.8, scene_cuts=0.2)
    clips = read_clips((tmp_path / name).open("rb"), recipe)
    scenes = [sorted({scene_of(time) for time in times}) for _, times in clips]
    assert scenes == [[0], [1], [2], [2]]  # of 12, 9 and 19 frames, in clips of 8
    begins = [times[0] for _, times in clips]
    assert begins == pytest.approx([0.1, 1.3, 2.2, 3.0], abs=0.01)
    brightness = [simplejpeg.decode_jpeg(files[0]).mean() for files, _ in clips]
    assert brightness[1] > max(brightness[0], *brightness[2:]) + 50


def test_scenes_are_whole_clips_without_a_length_and_shorter_ones_are_kept(tmp_path):
    write_film(tmp_path / "a.mp4", "libx264")
    recipes = [
        Recipe("videos", frames=50, scene_cuts=0.2),
        Recipe("videos", frames=50, scene_cuts=0.2, clip_seconds=1.0, max_clips=2),
    ]
    found = [read_clips((tmp_path / "a.mp4").open("rb"), recipe) for recipe in recipes]
    assert [len(set(times)) for _, times in found[0]] == list(SCENES)
    assert [len(set(times)) for _, times in found[1]] == [10, 9]


def test_film_of_one_scene_is_cut_as_without_the_option(tmp_path):
    write_film(tmp_path / "a.mp4", "libx264", scenes=(40,))
    plain = Recipe("videos", frames=3, clip_seconds=0.7, stride=0.5)
    cut = Recipe("videos", frames=3, clip_seconds=0.7, stride=0.5, scene_cuts=0.2)
    clips = read_clips((tmp_path / "a.mp4").open("rb"), plain)
    assert len(clips) == 7
    assert read_clips((tmp_path / "a.mp4").open("rb"), cut) == clips


def test_clip_without_a_frame_of_its_own_is_left_out(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in [*range(10), *range(50, 60)]:  # nothing from 1 to 5 s
            pixels = np.full((48, 64, 3), 4 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    recipe = Recipe("videos", frames=5, clip_seconds=0.8)
    clips = read_clips((tmp_path / "a.mkv").open("rb"), recipe)
    first = [times[0] for _, times in clips]  # the third clip begins at 4.8 s
    assert first == pytest.approx([0.0, 0.8, 0.9], abs=0.01)
    assert [len(set(times)) for _, times in clips] == [5, 2, 5]
    whole = read_clips((tmp_path / "a.mkv").open("rb"), Recipe("videos", frames=60))
    assert len(whole) == 1 and len(set(whole[0][1])) == 20


def test_cuts_of_a_real_film_are_where_its_frames_differ_most(tmp_path):
    with av.open(str(BIKES)) as container:
        frames = [frame.to_ndarray(format="gray").astype(float) for frame in container.decode(0)]
    steps = [np.abs(after - before).mean() for before, after in pairwise(frames)]
    cuts = 1 + np.flatnonzero(np.array(steps) > 40)
    assert 2 < len(cuts) < 10
    out = str(tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bikes.mp4").symlink_to(BIKES)
    data_prep.main(["videos", str(tmp_path / "in"), out, "--workers", "1", "--scene-cuts"])
    begins = [sample["timestamps"][0] for sample in Clips(out)]
    assert begins == pytest.approx([0, *(cuts / 25)], abs=0.05)


def test_thresholds_beyond_the_score_are_refused():
    with pytest.raises(ValueError, match=r"--scene-cuts 30.0: must be in \[0.01, 1\]"):
        Recipe("videos", scene_cuts=30.0)
