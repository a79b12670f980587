"""The world of benchmarks/draw_world.py, which is harder than the demonstration."""

import numpy as np
import pytest
from streaming import LocalDataset

from benchmarks import draw_world
from shards.demo import CLASSES
from shards.format import decode_frame, read_classes


def test_world_has_moving_clips_and_stills_of_all_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_world, "CLIPS", 1)
    draw_world.main(str(tmp_path), garments=4)
    for name, count in {"train_videos": 10, "train_images": 20, "test_videos": 20}.items():
        samples = LocalDataset(str(tmp_path / name))
        assert len(samples) == count
        assert read_classes(str(tmp_path / name)) == sorted(CLASSES)
        assert {sample["label"] for sample in samples} == set(range(10))
        assert decode_frame(samples[0], 0).shape == (64, 64, 3)
    first, second, last = (decode_frame(samples[0], i).astype(float) for i in (0, 1, 15))
    assert 0 < np.abs(first - second).mean() < np.abs(first - last).mean()


def test_a_moment_of_the_world_does_not_depend_on_the_other_moments():
    garment = np.full((28, 28), 200, np.uint8)
    times = np.linspace(0, 1, 5)
    clip = draw_world.draw_moments(garment, np.random.default_rng(0), times)
    for time, frame in zip(times, clip, strict=True):
        alone = draw_world.draw_moments(garment, np.random.default_rng(0), np.array([time]))
        assert np.array_equal(alone[0], frame)


class Fixed:
    """Random numbers that are in the middle of each range, but for the ranges that are given."""

    def __init__(self, values: dict[tuple[float, float], float]):
        self.values = values

    def uniform(self, low, high, size=None):
        value = self.values.get((low, high), (low + high) / 2)
        return value if size is None else np.full(size, value)


YAW, ROLL, LIGHT, DISC = (-55, 55), (-20, 20), (-0.4, 0.4), (-28, 28)


def draw_fixed(garment: np.ndarray, values: dict) -> np.ndarray:
    """Return a moment, (64, 64, 3), in which the disc is in a corner unless `values` has it."""
    return draw_world.draw_moments(garment, Fixed({DISC: 28} | values), np.zeros(1))[0].astype(int)


WHITE = np.full((28, 28), 255, np.uint8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_light_of_the_world_comes_from_one_side(side):
    frame = draw_fixed(WHITE, {LIGHT: {"left": -0.4, "right": 0.4}[side]})
    left, right = frame[20:40, 14:30].mean(), frame[20:40, 34:50].mean()
    assert (left > right) == (side == "left")


def test_yaw_makes_a_garment_of_the_world_narrower_by_its_cosine():
    widths = [(draw_fixed(WHITE, {YAW: yaw})[16] > 150).all(-1).sum() for yaw in (0, 55)]
    assert widths[0] == pytest.approx(28 * 1.6, abs=1)
    assert widths[1] == pytest.approx(28 * 1.6 * np.cos(np.radians(55)), abs=1)


def test_roll_turns_a_garment_of_the_world_clockwise_about_its_centre():
    dot = np.zeros((28, 28), np.uint8)
    dot[13:15, 24:26] = 255  # 11 pixels to the right of the centre
    bright = draw_fixed(dot, {ROLL: 20}).sum(-1)
    row, column = np.argwhere(bright > bright.max() - 60).mean(0) + 0.5
    angle = np.radians(20)
    assert column == pytest.approx(32 + 1.6 * 11 * np.cos(angle), abs=1)
    assert row == pytest.approx(32 + 1.6 * 11 * np.sin(angle), abs=1)


def test_disc_of_the_world_is_in_front_of_the_garment():
    assert (draw_fixed(WHITE, {DISC: 0})[32, 32] == 127).all()
    assert (draw_fixed(WHITE, {})[32, 32] > 150).all()
