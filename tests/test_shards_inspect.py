"""The contact sheet and the check of a finished data set."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from streaming import MDSWriter

from shards.format import COLUMNS, encode_clip
from shards.inspect import CAPTION, CELL, check_sample, show


def jpeg(height: int, width: int) -> bytes:
    return simplejpeg.encode_jpeg(np.full((height, width, 3), 90, np.uint8))


def write_set(path: Path, samples: list[dict]) -> str:
    with MDSWriter(out=str(path), columns=COLUMNS) as writer:
        for sample in samples:
            writer.write(sample)
    (path / "classes.json").write_text('["$a"]')
    return str(path)


def test_contact_sheet_shows_thin_small_and_corrupt_samples_under_any_name(tmp_path, capsys):
    samples = [
        encode_clip([jpeg(1, 500)], [0.0], 0, "thin"),
        encode_clip([jpeg(500, 1)], [0.0], 0, "two\nlines"),
        encode_clip([jpeg(1, 1)], [0.0], -1, "猫 🐈"),
        encode_clip([jpeg(20, 30)] * 3, [0.0, 1.0, 2.0], 0, "x" * 300),
        encode_clip([b"corrupt"], [0.0], 0, "corrupt"),
    ]
    path, sheet = write_set(tmp_path / "set", samples), tmp_path / "new" / "folder" / "sheet.png"
    show(path, str(sheet))
    assert capsys.readouterr().out == f"{sheet}: 5 of the 5 samples of {path}\n"
    sheet = np.asarray(Image.open(sheet)).astype(int)
    assert sheet.shape == (5 * (CELL + CAPTION), 8 * CELL, 3)
    rows = sheet.reshape(5, CELL + CAPTION, 8 * CELL, 3)[:, CAPTION:]
    grey = (abs(rows[..., :3] - 90) < 3).all(axis=3).sum(axis=(1, 2))
    side = CELL - 2
    assert grey.tolist() == [side, side, side**2, 3 * side * round(side * 20 / 30), 0]
    assert (rows[4, :side, :side] == [255, 0, 0]).all()


def test_contact_sheet_of_photos_has_a_photo_in_each_place(tmp_path):
    photos = [encode_clip([jpeg(30, 30)], [0.0], 0, str(number)) for number in range(11)]
    show(write_set(tmp_path / "set", photos), str(tmp_path / "sheet.png"), samples=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    cells = sheet.reshape(2, CELL + CAPTION, 8, CELL, 3)[:, CAPTION:].swapaxes(1, 2)
    grey = (abs(cells - 90) < 3).all(axis=4).sum(axis=(2, 3)).flatten()
    assert grey.tolist() == [(CELL - 2) ** 2] * 11 + [0] * 5


def test_contact_sheet_without_a_row_is_refused(tmp_path):
    path = write_set(tmp_path / "set", [encode_clip([jpeg(9, 9)], [0.0], 0, "x")])
    with pytest.raises(ValueError, match="--samples 0: must be at least 1"):
        show(path, str(tmp_path / "sheet.png"), samples=0)


@pytest.mark.parametrize("name", ["", "sheets", "sheet.mp4", "sheet.fits"])
def test_contact_sheet_that_is_no_picture_is_refused(tmp_path, name):
    path = write_set(tmp_path / "set", [encode_clip([jpeg(9, 9)], [0.0], 0, "x")])
    with pytest.raises(ValueError, match=r"--to .*: must be a picture such as sheet\.png"):
        show(path, f"{tmp_path}/{name}")


def test_clip_whose_frames_differ_in_size_is_a_fault():
    sample = encode_clip([jpeg(20, 30), jpeg(30, 20)], [0.0, 1.0], 0, "x")
    with pytest.raises(ValueError, match="frame 1 is 20x30, but frame 0 is 30x20"):
        check_sample(sample, 1, 64)
