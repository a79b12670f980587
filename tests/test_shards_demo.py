"""The demonstration's data."""

import numpy as np
from streaming import LocalDataset

from shards.demo import CLASSES, FASHION_MNIST, draw_demo
from shards.format import decode_frame, read_classes


def test_demonstration_has_the_same_bytes_however_many_workers_draw_it(demo, tmp_path):
    draw_demo(tmp_path / "raw", garments=12, workers=4)
    files = sorted(path.relative_to(demo / "raw") for path in (demo / "raw").rglob("*.*"))
    assert len(files) == 240
    assert all(
        (demo / "raw" / path).read_bytes() == (tmp_path / "raw" / path).read_bytes()
        for path in files
    )


def test_demonstration_has_labels_moving_clips_and_disjoint_splits(demo):
    for split in ("train", "test"):
        clips, stills = (
            LocalDataset(str(demo / f"{split}_{kind}")) for kind in ("videos", "images")
        )
        assert len(clips) == len(stills) == 60
        assert read_classes(str(demo / f"{split}_videos")) == sorted(CLASSES)
        sample = clips[0]
        assert len(sample["ends"]) == 16 and np.ptp(sample["timestamps"]) > 1.5
        first, last = (decode_frame(sample, i).astype(int) for i in (0, 15))
        assert first.shape == (40, 40, 3) and np.abs(first - last).mean() > 2
        assert decode_frame(stills[0], 0).shape == (40, 40, 3)
    with np.load(FASHION_MNIST) as data:
        train, test = (
            {image.tobytes() for image in data[f"{split}_images"]} for split in ("train", "test")
        )
    assert not train & test
