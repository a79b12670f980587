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


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_light_of_the_world_comes_from_one_side(side):
    """A white garment without yaw, roll and cover is brighter on the side of the light."""

    class Fixed:
        """Random numbers in the middle of each range, but for the light."""

        def uniform(self, low, high, size=None):
            value = (low + high) / 2
            if (low, high) == (-0.4, 0.4):
                value = {"left": low, "right": high}[side]
            if (low, high) == (-28, 28):
                value = high  # the disc is in a corner
            return value if size is None else np.full(size, value)

    garment = np.full((28, 28), 255, np.uint8)
    frame = draw_world.draw_moments(garment, Fixed(), np.zeros(1))[0].astype(float)
    left, right = frame[20:40, 14:30].mean(), frame[20:40, 34:50].mean()
    assert (left > right) == (side == "left")
