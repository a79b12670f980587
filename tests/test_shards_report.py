"""Every file of a source is counted; labels of lists; names of classes and files."""

import json
import os
from pathlib import Path

import pytest
from streaming import LocalDataset
from test_shards_layouts import assert_rejected, lay, picture, pictures, tar, videos

import data_prep
from data_prep import convert
from shards.decode import Recipe


def run(source: Path | str, out: Path, *options: str) -> dict[str, str | None]:
    """Convert images and return {name: class name or None}."""
    data_prep.main(["images", str(source), str(out), "--workers", "1", *options])
    classes = json.loads((out / "classes.json").read_text())
    return {
        sample["name"]: classes[sample["label"]] if sample["label"] >= 0 else None
        for sample in LocalDataset(str(out))
    }


def test_every_file_of_a_folder_is_converted_skipped_or_ignored_for_a_reason(tmp_path, capsys):
    source = lay(
        tmp_path / "in",
        pictures("a/1.jpg", "a/2.jpg", "b/3.jpg"),
        {"b/broken.png": "no picture", "a/notes.txt": "", "a/x.mp4": "", "b/noext": ""},
        {"a/._1.jpg": "", ".git/config": "", "a/Thumbs.db": "", "b/@eaDir/4.jpg": ""},
    )
    out = tmp_path / "out"
    assert run(source, out, "--max-skipped", "1") == {
        "a/1.jpg": "a",
        "a/2.jpg": "a",
        "b/3.jpg": "b",
    }
    report = json.loads((out / "report.json").read_text())
    ignored = {reason: found["count"] for reason, found in report["ignored"].items()}
    hidden = {"hidden or system file": 4}  # .git counts as one
    assert ignored == hidden | {"extension .txt": 1, "extension .mp4": 1, "no extension": 1}
    assert report["ignored"]["extension .txt"]["first"] == ["a/notes.txt"]
    assert report["samples_per_class"] == {"a": 2, "b": 1} and report["short_sides"] == [16, 16]
    *_, classes, last = capsys.readouterr().out.splitlines()
    assert classes == "classes: a 2, b 1"
    assert last.startswith(f"{out}: 3 samples, 0 absent, 0 short, 1 skipped, 7 ignored (")


def test_files_that_a_list_does_not_name_are_counted(tmp_path):
    source = lay(tmp_path / "in", pictures("1.jpg", "2.jpg"), {"list.csv": "path\n1.jpg\n3.jpg\n"})
    report = convert(str(source / "list.csv"), str(tmp_path / "out"), Recipe("images"), 1)
    assert report["absent"] == 1
    assert report["ignored"] == {
        "extension .csv": {"count": 1, "first": ["list.csv"]},
        "not in the list": {"count": 1, "first": ["2.jpg"]},
    }
    clips = videos("train/AAAAAAAAAA1_000000_000010.mp4", "train/AAAAAAAAAA2_000000_000010.mp4")
    table = "label,youtube_id,time_start,time_end,split\nx,AAAAAAAAAA1,0,10,train\n"
    source = lay(tmp_path / "k400", clips, {"annotations/train.csv": table})
    layout = data_prep.LAYOUTS["k400"][1]
    report = convert(str(source), str(tmp_path / "k"), Recipe("videos", frames=2), 1, 0.0, layout)
    assert report["ignored"]["not in the list"]["count"] == 1


@pytest.mark.parametrize(
    "header",
    ["path,label", "\ufeffpath,label", "path, label", "Path,LABEL", "path;class", "path\tlabel"],
)
def test_labels_are_found_however_the_header_of_a_list_is_written(tmp_path, header):
    delimiter = next(character for character in ",;\t" if character in header)
    rows = [f"{name}{delimiter}{label}" for name, label in (("1.jpg", "x"), ("2.jpg", "y"))]
    text = "\r\n".join([header, *rows, ""])
    source = lay(tmp_path / "in", pictures("1.jpg", "2.jpg"), {"list.csv": text})
    assert run(source / "list.csv", tmp_path / "out") == {"1.jpg": "x", "2.jpg": "y"}


def test_rows_of_a_list_end_where_csv_ends_them(tmp_path):
    names = ["a\nb.jpg", "c\u2028d.jpg", "e\x85f.jpg", "g,h.jpg"]
    text = "\n\npath,label\n" + "\n\n".join(f'"{name}",x' for name in names)
    source = lay(tmp_path / "in", pictures(*names), {"list.csv": text})
    assert run(source / "list.csv", tmp_path / "out") == dict.fromkeys(names, "x")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1.jpg,x\n2.jpg,y\n", "has no column path; its first line must name path"),
        ("path,label,class\n1.jpg,x,y\n", "has several columns label; leave one"),
        ("path,label\n1.jpg,x,y\n", "3 fields for 2 columns"),
        ("path,label\n1.jpg,x\n./1.jpg,y\n", "1.jpg has the labels x and y"),
        ("path,label\n1.jpg,x\n2.jpg,\n", "2.jpg has no class, but inputs before it have one"),
    ],
)
def test_list_that_could_be_misread_is_refused(tmp_path, text, complaint):
    source = lay(tmp_path / "in", pictures("1.jpg", "2.jpg"), {"list.csv": text})
    assert_rejected("images", source / "list.csv", complaint)


def test_row_that_comes_twice_and_paths_of_windows_are_one_file(tmp_path):
    text = "path,label\na\\1.jpg,x\na/1.jpg,x\n"
    source = lay(tmp_path / "in", pictures("a/1.jpg"), {"list.csv": text})
    report = convert(str(source / "list.csv"), str(tmp_path / "out"), Recipe("images"), 1)
    assert report["samples"] == 1 and report["ignored"]["listed twice"]["count"] == 1


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        (["1.jpg", "1.cls", "2.jpg"], "x.tar/2.jpg has no label, but other samples have one"),
        (["1.jpg", "2.jpg", "1.cls", "2.cls"], "x.tar/1 has its label after other samples"),
    ],
)
def test_tar_whose_labels_are_missing_or_late_is_refused(tmp_path, members, complaint):
    content = {name: "0" if name.endswith("cls") else picture(name) for name in members}
    assert_rejected("images", lay(tmp_path, {"x.tar": tar(content)}) / "x.tar", complaint)


def test_classes_can_be_those_of_a_list_or_of_another_data_set(tmp_path, capsys):
    train = lay(tmp_path / "t", pictures("a/1.jpg", "b/2.jpg", "c/3.jpg"))
    val = lay(tmp_path / "v", pictures("c/4.jpg"), {"names.txt": "c\nb\n\na\n"})
    run(train, tmp_path / "train")
    assert run(val, tmp_path / "val", "--like", str(tmp_path / "train")) == {"c/4.jpg": "c"}
    assert json.loads((tmp_path / "val" / "classes.json").read_text()) == ["a", "b", "c"]
    run(val, tmp_path / "listed", "--classes", str(val / "names.txt"))
    assert json.loads((tmp_path / "listed" / "classes.json").read_text()) == ["c", "b", "a"]
    (val / "names.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"c/4\.jpg is of class 'c', which is not in the"):
        run(val, tmp_path / "refused", "--classes", str(val / "names.txt"))


def test_names_that_are_not_utf8_are_stored_escaped(tmp_path):
    source = lay(tmp_path / "in", pictures("a/1.jpg"))
    os.rename(source / "a/1.jpg", os.fsencode(source / "a") + b"/caf\xe9.jpg")
    os.rename(source / "a", os.fsencode(source) + b"/\xe4")
    assert run(source, tmp_path / "out") == {"\\xe4/caf\\xe9.jpg": "\\xe4"}


def test_link_that_leads_upwards_is_not_followed(tmp_path):
    source = lay(tmp_path / "in", pictures("a/1.jpg"))
    (source / "a" / "loop").symlink_to(source)
    assert run(source, tmp_path / "out") == {"a/1.jpg": "a"}


def test_output_with_the_classes_in_another_order_is_refused(tmp_path):
    source = lay(tmp_path / "in", pictures("a/1.jpg", "b/2.jpg"), {"names.txt": "b\na\n"})
    run(source, tmp_path / "out")
    with pytest.raises(ValueError, match="was started with other values of classes"):
        run(source, tmp_path / "out", "--classes", str(source / "names.txt"))
