"""Inputs of a conversion: classes of folders, samples of tars, and files that cannot be read."""

import errno
import io
import json
import tarfile

import pytest
from test_data_prep import write_images
from test_shards_layouts import (
    assert_own_bytes,
    assert_rejected,
    lay,
    picture,
    pictures,
    tar,
    video,
)
from test_shards_report import run

from data_prep import convert
from shards.decode import Recipe
from shards.storage import Storage


def test_empty_class_folder_is_a_class(tmp_path):
    source = lay(tmp_path / "in", pictures("a/1.jpg", "c/2.jpg"))
    (source / "b").mkdir()
    run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a", "b", "c"]


@pytest.mark.parametrize("folders", [("Train", "Val"), ("test", "train", "x"), ("images",)])
def test_folders_of_splits_are_no_classes(tmp_path, folders):
    source = lay(tmp_path / "in", pictures(*(f"{folder}/a/1.jpg" for folder in folders)))
    complaint = f"holds the folders {', '.join(folders)}, which are no classes; give each"
    assert_rejected("images", source, complaint)


def test_class_may_have_the_name_of_a_split(tmp_path):
    found = run(lay(tmp_path / "ok", pictures("test/1.jpg", "a/2.jpg")), tmp_path / "out")
    assert found == {"test/1.jpg": "test", "a/2.jpg": "a"}


def test_names_in_a_tar_may_have_dots_and_labels_may_be_json_or_stand_earlier(tmp_path):
    members = {"v1.3.cls": "2", "v1.1.jpg": picture("v1.1"), "v1.1.cls": "0"}
    members |= {
        "v1.2.jpg": picture("v1.2"),
        "v1.2.json": '{"label": 1}',
        "v1.3.jpg": picture("v1.3"),
    }
    source = lay(tmp_path, {"x.tar": tar(members | {"notes.txt": "", "4.mp4": ""})}) / "x.tar"
    found = run(source, tmp_path / "out")
    assert found == {"x.tar/v1.1.jpg": "0", "x.tar/v1.2.jpg": "1", "x.tar/v1.3.jpg": "2"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {reason: found["count"] for reason, found in report["ignored"].items()} == {
        "extension .mp4": 1,
        "extension .txt": 1,
    }


def test_class_names_in_a_tar_need_a_list_of_classes(tmp_path):
    content = {"1.jpg": picture("1"), "1.cls": "dog"}
    source = lay(tmp_path, {"x.tar": tar(content), "classes.txt": "cat\ndog\n"}) / "x.tar"
    assert_rejected("images", source, "class 'dog': unknown; list the classes with --classes")
    found = run(source, tmp_path / "out", "--classes", str(tmp_path / "classes.txt"))
    assert found == {"x.tar/1.jpg": "dog"}


@pytest.mark.parametrize("wrong", ["1000", "-5"])
def test_sample_of_a_tar_with_an_unknown_label_is_skipped_and_named(tmp_path, make, wrong):
    samples = {"a.jpg": picture("a"), "a.cls": "999", "b.jpg": picture("b"), "b.cls": wrong}
    made = make("in1k", lay(tmp_path, {"x.tar": tar(samples)}) / "x.tar", max_skipped=0.5)
    assert list(made.found) == ["x.tar/a.jpg"]
    ((name, reason),) = made.report["skipped"]
    assert name == "x.tar/b.jpg" and f"label {wrong}: must be below 1000" in reason


def test_file_of_a_tar_is_a_video_only_if_its_whole_extension_matches(tmp_path, make):
    samples = {"a.artifacts": "x", "a.mp4": video(), "a.cls": "1"}  # .ts is a video format
    made = make("videos", lay(tmp_path, {"x.tar": tar(samples)}) / "x.tar")
    assert made.found == {"x.tar/a.mp4": "1"}


def corrupted(data: bytes, damage: str, number: int) -> bytes:
    """Truncate a tar in or before the file of a number, or overwrite the header of that file."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.getmembers()[number]
    cuts = {
        "in data": member.offset_data + member.size // 2,
        "at header": member.offset,
        "in header": member.offset + 100,
    }
    if damage in cuts:
        return data[: cuts[damage]]
    return data[: member.offset] + b"?" * 512 + data[member.offset_data :]


@pytest.mark.parametrize("damage", ["in data", "at header", "in header", "header overwritten"])
def test_samples_before_the_corrupt_place_in_a_tar_are_kept(tmp_path, make, damage):
    samples = {}
    for number in range(12):
        samples |= {
            f"{number:02d}.jpg": picture(f"{number:02d}", 64),
            f"{number:02d}.cls": str(number % 3),
        }
    intact = {"x-1.tar": tar({"n.jpg": picture("n"), "n.cls": "2"})}
    source = lay(tmp_path / damage, {"x-0.tar": corrupted(tar(samples), damage, 2 * 9)}, intact)
    made = make("images", source / "x-{0..1}.tar", max_skipped=0.2)
    kept = {f"x-0.tar/{number:02d}.jpg": str(number % 3) for number in range(8)}
    # Sample 08 ends where the corrupt file begins, so it may be lost too.
    last = {"x-0.tar/08.jpg": "2"}
    other = {"x-1.tar/n.jpg": "2"}
    assert made.found in (kept | other, kept | last | other)
    assert_own_bytes(made)
    ((name, reason),) = made.report["skipped"]
    assert name == "x-0.tar" and "the samples after it are lost" in reason
    assert " at 0x" not in reason


def test_forbidden_file_stops_the_run_and_a_vanished_file_is_skipped(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 6)
    opened = Storage.open

    def refuse(storage, name):
        if name.endswith("0004.png"):
            raise PermissionError(errno.EACCES, "Permission denied", storage.at(name))
        return opened(storage, "gone.png" if name.endswith("0003.png") else name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "open", refuse)
        with pytest.raises(
            OSError, match=r"Permission denied: '.*/class 1/0004.png'; finished parts are kept"
        ):
            convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    monkeypatch.setattr(
        Storage, "open", lambda storage, name: opened(storage, name.replace("0003", "gone"))
    )
    report = convert(
        str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1, max_skipped=0.5
    )
    ((name, reason),) = report["skipped"]
    assert name == "class 0/0003.png" and reason.startswith("FileNotFoundError")
