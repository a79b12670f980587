"""The format of the shards: samples, classes, fingerprints, and the list of unreadable samples."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from streaming import LocalDataset, MDSWriter
from test_data_prep import OLD_SHARDS, check_old_samples

import data_prep
from shards.format import (
    COLUMNS,
    Clips,
    TooManyUnreadable,
    common_classes,
    decode_frame,
    encode_clip,
    fingerprint,
    match_classes,
    record_unreadable,
    same_classes,
    shared_shards,
    spread,
)
from shards.inspect import show, verify

# Samples


def test_each_frame_of_a_clip_is_decoded_by_its_number():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 24, 40, 3), np.uint8)
    qualities = (100, 40, 90, 70)  # files of several lengths
    frames = [
        simplejpeg.encode_jpeg(picture, quality, "RGB", "444")
        for picture, quality in zip(pictures, qualities, strict=True)
    ]
    sample = encode_clip(frames, [0.0, 0.1, 0.2, 0.3], 3, "a.mp4")
    for number, frame in enumerate(frames):
        expected = np.asarray(Image.open(io.BytesIO(frame))).astype(int)
        assert np.abs(decode_frame(sample, number) - expected).max() <= 2


def test_clips_of_several_shards_are_the_samples_that_streaming_reads(tmp_path):
    with MDSWriter(out=str(tmp_path), columns=COLUMNS, size_limit=300) as writer:
        for number in range(10):
            frames = [bytes([number]) * (10 + 7 * number)] * (1 + number % 3)
            writer.write(encode_clip(frames, [0.5] * len(frames), number, f"{number}.mp4"))
    assert len(list(tmp_path.glob("*.mds"))) > 3
    clips, expected = Clips(str(tmp_path)), LocalDataset(str(tmp_path))
    assert len(clips) == len(expected) == 10
    for number in range(10):
        ours, theirs = clips[number], expected[number]
        assert ours.keys() == theirs.keys() == COLUMNS.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in COLUMNS)


def test_indices_are_spread_from_the_first_to_the_last():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 16) == [0, 1, 2]
    assert spread(5, 1) == [0]


def test_shards_of_an_earlier_version_load_verify_and_decode_to_what_was_drawn():
    expected = json.loads((OLD_SHARDS / "expected.json").read_text())
    assert verify(str(OLD_SHARDS / "shards"), 1) == []
    check_old_samples(OLD_SHARDS / "shards", expected)


def test_sample_without_depth_has_the_columns_of_earlier_versions(demo):
    still = Clips(str(demo / "train_images"))[0]
    assert still.keys() == COLUMNS.keys()
    frames = [still["frames"]]
    assert encode_clip(frames, [0.0], still["label"], still["name"]).keys() == COLUMNS.keys()


def test_data_set_without_samples_is_named(tmp_path):
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}')
    (tmp_path / "classes.json").write_text("[]")
    with pytest.raises(ValueError, match="has no samples"):
        show(str(tmp_path), str(tmp_path / "sheet.png"))


@pytest.mark.parametrize(("report", "ended"), [("", "was interrupted"), ("{}", "failed")])
def test_unfinished_conversion_is_named_by_show_and_verify(tmp_path, report, ended):
    (tmp_path / "request.json").write_text("{}")
    if report:
        (tmp_path / "report.json").write_text(report)
    expected = f"{tmp_path}: the conversion {ended}; run the same command again to finish it"
    for command in ("show", "verify"):
        with pytest.raises(ValueError) as error:
            data_prep.main([command, str(tmp_path)])
        assert str(error.value) == expected


# Classes


@pytest.fixture
def labelled(tmp_path):
    """labelled(name, *classes) makes a data set without samples, and returns its path."""

    def make(name: str, *classes: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text('{"version": 2, "shards": []}')
        (tmp_path / name / "classes.json").write_text(json.dumps(classes))
        return str(tmp_path / name)

    return make


def test_labels_of_data_sets_are_those_of_the_same_names_in_the_first(labelled):
    first, turned, few = labelled("1", *"abc"), labelled("2", *"cba"), labelled("3", "b")
    assert common_classes([first, turned, few]) == (list("abc"), [[0, 1, 2], [2, 1, 0], [1]])
    assert match_classes(few, ["a", "b"], "the checkpoint", offset=10) == [11]
    assert same_classes([first, first], "method=triplet") == list("abc")
    for other in (turned, few):
        with pytest.raises(ValueError, match="method=triplet needs the same classes in the same"):
            same_classes([first, other], "method=triplet")


def test_data_set_whose_classes_do_not_suit_is_named(labelled):
    many, none, twice = labelled("m", *"vwxyz"), labelled("n"), labelled("t", "a", "a")
    with pytest.raises(ValueError, match=r"m: has classes that it lacks: 'w', 'x', 'y' and 1 more"):
        match_classes(many, ["v"], "it")
    with pytest.raises(ValueError, match="n has no labels; convert it from one folder per class"):
        common_classes([none])
    with pytest.raises(ValueError, match=r"t/classes\.json names a class twice"):
        common_classes([twice])
    with pytest.raises(ValueError, match="the list of data sets is empty"):
        common_classes([])


@pytest.mark.parametrize(
    ("content", "fault"), [(None, "classes.json is missing"), ('["a', "classes.json is corrupt")]
)
def test_incomplete_data_set_is_named(labelled, content, fault):
    path = labelled("x", "a")
    Path(path, "classes.json").unlink()
    if content:
        Path(path, "classes.json").write_text(content)
    with pytest.raises(ValueError, match=f"{fault}.*; make it with data_prep.py"):
        common_classes([path])


# Comparison of data sets


def test_copy_has_the_fingerprint_of_its_source_and_other_samples_have_another(demo, tmp_path):
    source, other = str(demo / "train_images"), str(demo / "test_images")
    copy = str(shutil.copytree(source, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(source)
    assert fingerprint(other)["classes"] == fingerprint(source)["classes"]
    assert fingerprint(other)["samples"] != fingerprint(source)["samples"]
    assert shared_shards([copy, other], [source]) == {copy: 1}


# Unreadable samples


def test_unreadable_samples_are_counted_once_each_up_to_the_limit(tmp_path):
    file = tmp_path / "run" / "unreadable.jsonl"
    for name in ("a", "b", "a", "c"):
        record_unreadable(file, name, ValueError("cut\n off"), limit=3)
    assert json.loads(file.read_text().splitlines()[1]) == ["b", "cut off"]
    with pytest.raises(TooManyUnreadable, match=r"^4 samples cannot be used, see .*unreadable\."):
        record_unreadable(file, "d", ValueError(), limit=3)


def test_one_unreadable_sample_is_always_allowed_and_those_of_other_data_do_not_count(tmp_path):
    file = tmp_path / "unreadable.jsonl"
    for number in range(3):
        record_unreadable(file, f"bank, sample {number}", ValueError(), 3, ("bank, ",))
    record_unreadable(file, "queries, sample 0", ValueError(), 0, ("queries, ",))
    with pytest.raises(TooManyUnreadable, match=r"^2 samples"):
        record_unreadable(file, "queries, sample 1", ValueError(), 0, ("queries, ",))
