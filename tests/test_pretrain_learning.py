"""Pre-training learns: a small run on synthetic clips through shards, augmentation and Trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import ROOT, run_stage
from PIL import Image
from streaming import MDSWriter

import pretrain
from shards.format import COLUMNS, encode_clip

CLASSES, SIDE, TILE = 10, 32, 8  # pixels
TILES = np.random.default_rng(0).choice([-1.0, 1.0], (CLASSES, TILE, TILE, 1))
STRENGTH = 0.02  # of a tile, in [0, 1]: five grey levels under a strong random background


def draw_frame(label: int, rng: np.random.Generator) -> bytes:
    """Return a JPEG of the faint tile of a class, repeated over a random smooth background."""
    corners = Image.fromarray(rng.integers(30, 226, (2, 2, 3)).astype(np.uint8))
    background = corners.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    repeats = (SIDE // TILE, SIDE // TILE, 1)
    pixels = np.asarray(background, np.float64) + 255 * STRENGTH * np.tile(TILES[label], repeats)
    return simplejpeg.encode_jpeg(pixels.clip(0, 255).round().astype(np.uint8), quality=95)


def write_clips(folder: Path, per_class: int, frames: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with MDSWriter(out=str(folder), columns=COLUMNS) as writer:
        for number in range(per_class * CLASSES):
            label = number % CLASSES
            jpegs = [draw_frame(label, rng) for _ in range(frames)]
            times = [0.1 * frame for frame in range(frames)]
            writer.write(encode_clip(jpegs, times, label, str(number)))
    names = [f"tile {label}" for label in range(CLASSES)]
    (folder / "classes.json").write_text(json.dumps(names))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The run directory of 72 steps on 400 clips."""
    folder = tmp_path_factory.mktemp("learning")
    write_clips(folder / "train", 40, 4, seed=0)
    write_clips(folder / "test", 20, 1, seed=1)
    data = ["make_demo=null", "data.streams=[{path: train}]", "data.num_workers=0"]
    data += ["data.global_train_batch_size=64", "trainer.max_duration=12ep"]
    # The tiles stay on the grid of the patches: no crop, no flip, no blur; colours change.
    spatial = ["crop_scale=[1.0,1.0]", "crop_ratio=[1.0,1.0]", "flip=0.0", "blur=[0.0,0.0]"]
    augment = [f"augment.video.{setting}" for setting in (*spatial, "solarise=[0.0,0.0]")]
    model = ["model.depth=2", "optimizer.base_lr=1e-2"]
    probe = ["callbacks={KNN: {bank: [train], queries: [test]}}"]
    yaml = str(ROOT / "yamls" / "demo.yaml")
    run_stage(pretrain, [yaml, *data, *augment, *model, *probe], folder)
    return folder / "runs" / "demo"


def test_reconstruction_loss_falls_by_a_third(finished):
    """Measured with six seeds: from 1.34-1.38 to 0.69-0.82, by factors of 0.51 to 0.60."""
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    name = "loss/train/reconstruction"
    losses = [line[name] for line in lines if name in line]
    assert losses[0] > 1.0  # the target has variance 1, so that predicting its mean costs 1
    assert np.mean(losses[-5:]) < 2 / 3 * losses[0]


def test_features_of_one_class_become_neighbours(finished):
    """Measured with six seeds: k-NN accuracy from 0.29-0.39 to at least 0.995."""
    result = json.loads((finished / "result.json").read_text())
    assert result["knn/random"] < 0.5
    assert result["knn/trained"] > result["knn/random"] + 0.4
