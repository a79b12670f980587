"""Draw a world that is harder than the demonstration, and convert it into data sets.

    uv run python benchmarks/draw_world.py data/world    # at most 18 minutes, 2 CPU cores
    uv run python benchmarks/compare.py yamls/ablations/world.yaml

The same garments turn in depth and in the plane, and change their size and light. A disc passes in
front of most of them, and the camera pans over a background in colour. A clip shows all of this
moving, a still one moment of it. As in most collections, stills are many and clips few.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data_prep import convert
from shards.decode import Recipe
from shards.demo import FRAMES, garment_files, write_clip

SIDE = 64  # pixels
GARMENTS = 600  # per class and split, at most; every other one is a clip
CLIPS = 60  # of each class in the training set; all its stills, 300, are kept


def draw_moments(garment: np.ndarray, rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """Draw a garment (28, 28) at times in [0, 1] -> (times, SIDE, SIDE, 3)."""

    def glide(low: float, high: float) -> np.ndarray:
        """Return a value at each time, on the way from one random value to another."""
        start, end = rng.uniform(low, high, 2)
        return start + (end - start) * times

    colours = rng.uniform(0, 160, (12, 12, 3)).astype(np.uint8)
    size = (2 * SIDE, 2 * SIDE)
    background = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC))
    tint, disc = rng.uniform(0.55, 1.0, 3), rng.uniform(0, 255, 3)
    radius = rng.uniform(8, 12)  # pixels
    yaw, roll = np.radians(glide(-55, 55)), np.radians(glide(-20, 20))
    scale, light = glide(1.3, 1.9), glide(-0.4, 0.4)
    centre = SIDE / 2 + np.stack([glide(-8, 8), glide(-8, 8)], 1)  # x, y in pixels
    hidden = SIDE / 2 + np.stack([glide(-28, 28), glide(-28, 28)], 1)  # centre of the disc
    camera = np.stack([glide(0, SIDE), glide(0, SIDE)], 1).astype(int)
    picture = Image.fromarray(garment)
    row, column = np.mgrid[:SIDE, :SIDE] + 0.5
    clip = np.empty((len(times), SIDE, SIDE, 3), np.uint8)
    for t in range(len(times)):
        # From a pixel of the frame to a pixel of the garment: undo the roll, then scale and yaw.
        across = np.array([np.cos(roll[t]), np.sin(roll[t])]) / (scale[t] * np.cos(yaw[t]))
        down = np.array([-np.sin(roll[t]), np.cos(roll[t])]) / scale[t]
        places = [*across, 14 - across @ centre[t], *down, 14 - down @ centre[t]]
        warped = picture.transform(
            (SIDE, SIDE), Image.Transform.AFFINE, places, Image.Resampling.BILINEAR
        )
        value = np.asarray(warped, np.float32)[..., None]  # (SIDE, SIDE, 1)
        opacity = np.minimum(value / 64, 1)
        shade = 1 + light[t] * (column - centre[t, 0]) / (SIDE / 2)
        left, top = camera[t]
        frame = background[top : top + SIDE, left : left + SIDE] * (1 - opacity)
        frame += opacity * tint * (64 + 191 * value / 255) * shade[..., None]
        covered = (column - hidden[t, 0]) ** 2 + (row - hidden[t, 1]) ** 2 < radius**2
        frame[covered] = disc
        clip[t] = frame.clip(0, 255)
    return clip


def draw(path: Path, garment: np.ndarray, seed: tuple[int, ...]) -> None:
    """Write a garment as an mp4 of FRAMES frames, or as a JPEG still of a random moment."""
    rng = np.random.default_rng((3, *seed))
    times = rng.uniform(size=1) if path.suffix == ".jpg" else np.linspace(0, 1, FRAMES)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, draw_moments(garment, rng, times))


def main(out: str, garments: int = GARMENTS) -> None:
    """Draw raw files and convert them; those of an interrupted call are drawn anew."""
    raw = Path(out, "raw")
    jobs = [
        (raw / path, garment, (number, *key))
        for number, split in enumerate(("train", "test"))
        for path, garment, key in garment_files(split, garments)
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, *zip(*jobs, strict=True), chunksize=16))
    kept = {"train_videos": CLIPS, "train_videos_200": 20, "train_images_200": 20}  # of a class
    for name in ("test_videos", "test_images", "train_images", *kept):
        split, kind = name.split("_")[:2]
        recipe = Recipe(kind, per_class=kept.get(name))
        convert(str(raw / split / kind), str(Path(out, name)), recipe)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", help="folder of the data sets, such as data/world")
    main(parser.parse_args().out)
