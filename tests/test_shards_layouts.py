"""Published layouts: miniatures are converted, and other layouts are rejected.

Every picture holds its own name as a JPEG comment. It is small enough to be stored untouched, so
the comment shows which file was read.
"""

import functools
import io
import json
import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import Made
from PIL import Image
from scipy.io import savemat

import data_prep
from data_prep import convert
from shards.decode import Recipe
from shards.format import Clips
from shards.layouts import EXTENSIONS, LAYOUTS

ROOT = Path(__file__).parent.parent


@functools.cache
def video(brightness: int = 60, ending: str = "mp4", frames: int = 6) -> bytes:
    file, codec = io.BytesIO(), {"mp4": "libx264", "webm": "libvpx"}[ending]
    with av.open(file, "w", format=ending) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            pixels = np.full((32, 32, 3), brightness, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def picture(name: str, side: int = 16) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(len(name)).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", comment=name.encode())
    return file.getvalue()


def videos(*names: str) -> dict[str, bytes]:
    return {name: video(ending=name.rsplit(".")[-1]) for name in names}


def pictures(*names: str) -> dict[str, bytes]:
    return {name: picture(name) for name in names}


def lay(root: Path, *files: dict[str, bytes | str]) -> Path:
    """Write files, given as {path inside root: content}."""
    for name, data in (item for group in files for item in group.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def tar(files: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def assert_own_bytes(made: Made) -> None:
    """Assert that every sample holds the picture that its name says."""
    for name, data in made.frames.items():
        stem = Path(name).stem.encode()
        assert stem in data, name


def assert_rejected(
    preset: str, source: Path | str, match: str, split: str = "train", **recipe
) -> None:
    kind, list_inputs = LAYOUTS.get(preset, (preset, None))
    with pytest.raises(ValueError, match=match) as caught:
        convert(str(source), f"{source}.out", Recipe(kind, **recipe), 1, 0.0, list_inputs, split)
    assert "\n" not in str(caught.value)
    assert not Path(f"{source}.out", "index.json").exists()


K400 = {  # {file: class; None for the test split, which has no labels}
    "train/-3B32lodo2M_000059_000069.mp4": "riding a bike",
    "train/0wR5jVB-WPk_000417_000427.mp4": "abseiling",
    "train/a_b_cdefghi_000000_000010.mp4": "riding a bike",
    "train/__NrybzYzUg_000115_000125.mp4": "zumba",
    "val/-_-_-_-_-_-_000003_000013.mp4": "zumba",
    "val/kUDuaEpODNI_001234_001244.mp4": "riding a bike",
    "test/tttttttttt0_000001_000011.mp4": None,
}
K400_LISTS = {
    "annotations/train.csv": "label,youtube_id,time_start,time_end,split,is_cc\n"
    '"riding a bike",-3B32lodo2M,59,69,train,0\n'
    "abseiling,0wR5jVB-WPk,417,427,train,0\n"
    "abseiling,goneforever,5,15,train,0\n"
    "riding a bike,a_b_cdefghi,0,10,train,1\n"
    '"zumba",__NrybzYzUg,115,125,train,0\n'
    "sailing,notonmydisk,20,30,train,0\n",
    "annotations/val.csv": "label,youtube_id,time_start,time_end,split\n"
    "zumba,-_-_-_-_-_-,3,13,val\n"
    '"riding a bike",kUDuaEpODNI,1234,1244,val\n',
    "annotations/test.csv": "youtube_id,time_start,time_end,split\n"
    "tttttttttt0,1,11,test\nmissing0000,1,11,test\n",
}
K400_CLASSES = ["abseiling", "riding a bike", "sailing", "zumba"]


@pytest.mark.parametrize("preset", ["k400", "k600", "k700"])
@pytest.mark.parametrize("lists", ["annotations/", ""])
def test_flat_kinetics_files_get_their_classes_from_the_csv_list_of_their_split(
    tmp_path, make, preset, lists
):
    tables = {name.replace("annotations/", lists): text for name, text in K400_LISTS.items()}
    junk = {f"{split}/._junk.mp4": b"\0\5\x16\7" for split in ("train", "val", "test")}
    source = lay(tmp_path / preset, videos(*K400), tables, junk)
    for split, absent in (("train", 2), ("val", 0), ("test", 1)):
        made = make(preset, source, split)
        assert made.classes == K400_CLASSES
        assert made.found == {name: label for name, label in K400.items() if name.startswith(split)}
        assert made.report["absent"] == absent and made.report["skipped"] == []


def test_kinetics_without_csv_lists_gets_its_classes_from_class_folders(tmp_path, make):
    names = {
        f"{split}/{label}/{split[0]}{number}_0_0.mp4": label
        for split in ("train", "val")
        for number, label in enumerate(
            ["zumba", "clay pottery making", "air drumming", "massaging person's head"]
        )
    }
    source = lay(tmp_path / "k700-2020", videos(*names), {"train/zumba/._junk.mp4": b"\0\5\x16\7"})
    train, val = make("k700", source), make("k700", source, "val")
    assert train.classes == val.classes == sorted(set(names.values()))
    assert train.found | val.found == names and not train.found.keys() & val.found.keys()


@pytest.mark.parametrize(
    "folder", ["train/{label}", "train/part_7/{label}", "videos/train/{label}", "train/tars/a/b"]
)
def test_kinetics_files_are_found_in_class_folders_and_deeper(tmp_path, make, folder):
    names = {}
    for name, label in K400.items():
        if name.startswith("train"):
            names[f"{folder.format(label=label)}/{Path(name).name}"] = label
    made = make("k400", lay(tmp_path / "k400", videos(*names), K400_LISTS))
    assert made.found == names and made.classes == K400_CLASSES and made.report["absent"] == 2


def test_kinetics_400_replacements_replace_the_corrupt_files_of_the_same_id(tmp_path, make):
    folder = "replacement/replacement_for_corrupted_k400"
    bad, good = "-3B32lodo2M", "train/0wR5jVB-WPk_000417_000427.mp4"
    replacements = {
        f"{folder}/{bad}.mp4": video(200),
        f"{folder}/a_b_cdefghi_000000_000010.mp4": video(200),
    }
    corrupted = {
        f"train/{bad}_000059_000069.mp4": b"corrupted",
        "train/a_b_cdefghi_000000_000010.mp4": b"",
    }
    source = lay(
        tmp_path / "k400",
        videos(*K400),
        corrupted,
        replacements,
        {f"{folder}/._junk.mp4": b"\0"},
        K400_LISTS,
    )
    made = make("k400", source)
    assert made.found == {
        f"{folder}/{bad}.mp4": "riding a bike",
        f"{folder}/a_b_cdefghi_000000_000010.mp4": "riding a bike",
        good: "abseiling",
        "train/__NrybzYzUg_000115_000125.mp4": "zumba",
    }
    bright = {
        name
        for name, data in made.frames.items()
        if np.asarray(Image.open(io.BytesIO(data))).mean() > 130
    }
    assert bright == set(replacements)


def test_kinetics_files_missing_from_the_csv_list_are_taken_from_class_folders(tmp_path, make):
    listed, unlisted = (
        "train/abseiling/0wR5jVB-WPk_000417_000427.mp4",
        "train/abseiling/zzzzzzzzzzz_000001_000011.mp4",
    )
    elsewhere = "train/no class of the csv/yyyyyyyyyyy_000001_000011.mp4"
    made = make("k600", lay(tmp_path / "k600", videos(listed, unlisted, elsewhere), K400_LISTS))
    assert made.found == {listed: "abseiling", unlisted: "abseiling"}


def test_kinetics_rejects_other_layouts(tmp_path):
    assert_rejected("k400", tmp_path / "nowhere", "nowhere lacks train or videos/train")
    flat = lay(tmp_path / "flat", videos("val/kUDuaEpODNI_001234_001244.mp4"))
    assert_rejected("k400", flat, "lacks train or videos/train")
    assert_rejected("k400", flat, "add annotations/val.csv for the classes", "val")
    other = lay(
        tmp_path / "other", videos(*K400), {"annotations/train.csv": "video,class\na.mp4,zumba\n"}
    )
    assert_rejected("k600", other, "annotations/train.csv has no column")
    unlabelled = {"annotations/train.csv": K400_LISTS["annotations/test.csv"]}
    assert_rejected(
        "k700",
        lay(tmp_path / "unlabelled", videos(*K400), unlabelled),
        "annotations/train.csv has no column label",
    )
    none = lay(tmp_path / "none", K400_LISTS, {"train/readme.txt": ""})
    assert_rejected("k400", none, "none of the 6 videos")
    extra = K400_LISTS["annotations/val.csv"].replace("zumba", "knitting")
    strange = lay(tmp_path / "strange", videos(*K400), K400_LISTS, {"annotations/val.csv": extra})
    assert_rejected(
        "k400",
        strange,
        "is of class 'knitting', which is not in the data set's list of classes",
        "val",
    )


def test_kinetics_error_names_the_csv_list_that_lacks_a_column(tmp_path):
    source = lay(tmp_path / "in", videos(*K400), {"train.csv": "video,class\na.mp4,zumba\n"})
    assert_rejected("k400", source, "in/train.csv has no column")


MIT = {
    "training/clapping/a.mp4": "clapping",
    "training/clapping/b.mp4": "clapping",
    "training/adult+male+singing/c.mp4": "adult+male+singing",
    "training/bulldozing/d.mp4": "bulldozing",
    "validation/bulldozing/a.mp4": "bulldozing",
    "validation/adult+male+singing/e.mp4": "adult+male+singing",
}
MIT_LISTS = {
    "moments_categories.txt": "bulldozing,2\nclapping,0\nadult+male+singing,1\n\n",
    "trainingSet.csv": "clapping/a.mp4,clapping,3,0\n"
    "clapping/b.mp4,clapping,4,1\n"
    "clapping/gone.mp4,clapping,3,0\n"
    "adult+male+singing/c.mp4,adult+male+singing,3,1\n"
    "bulldozing/d.mp4,bulldozing,3,1\n",
    "validationSet.csv": "bulldozing/a.mp4,bulldozing,3,0\n"
    "adult+male+singing/e.mp4,adult+male+singing,5,0\n",
}


def test_moments_in_time_numbers_its_labels_by_the_categories_file(tmp_path, make):
    source = lay(tmp_path / "mit", videos(*MIT), {"training/clapping/._a.mp4": b"\0"}, MIT_LISTS)
    train, val = make("mit", source), make("mit", source, "val")
    assert train.classes == val.classes == ["clapping", "adult+male+singing", "bulldozing"]
    assert train.found == {
        name: label for name, label in MIT.items() if name.startswith("training")
    }
    assert val.found == {
        name: label for name, label in MIT.items() if name.startswith("validation")
    }
    assert (train.report["absent"], val.report["absent"]) == (1, 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"moments_categories.txt": None}, "lacks moments_categories.txt"),
        ({"trainingSet.csv": None}, "lacks trainingSet.csv"),
        ({"training": None}, "lacks training"),
        (
            {"moments_categories.txt": "clapping,0\nbulldozing,1\n"},
            "c.mp4 is of class 'adult.male.singing', which is not in .*",
        ),
        (
            {"trainingSet.csv": b"\xff\xd8\xff"},
            "trainingSet.csv is not UTF-8; save the list as UTF-8",
        ),
        ({"moments_categories.txt": "clapping\nbulldozing\n"}, "moments_categories.txt"),
        ({"moments_categories.txt": "name,index\nclapping,0\n"}, "moments_categories.txt"),
        ({"trainingSet.csv": "training/clapping/a.mp4\n"}, "trainingSet.csv"),
    ],
)
def test_moments_in_time_rejects_other_layouts(tmp_path, change, match):
    files = {
        name: data
        for name, data in (videos(*MIT) | MIT_LISTS).items()
        if name.split("/")[0] not in change
    }
    assert_rejected(
        "mit",
        lay(tmp_path / "mit", files, {name: data for name, data in change.items() if data}),
        match,
    )


SSV2 = {
    "78687": "Holding something next to something",
    "42326": "Approaching something with your camera",
    "100904": "Turning something upside down",
    "74225": "Approaching something with your camera",
}
SSV2_NUMBERS = {
    "Holding something next to something": "1",
    "Turning something upside down": "0",
    "Approaching something with your camera": "2",
}


def clips(*ids: str) -> str:
    templates = {
        "Holding something next to something": "Holding [something] next to [something]",
        "Approaching something with your camera": "Approaching [something] with your camera",
        "Turning something upside down": "Turning [something] upside down",
    }
    return json.dumps(
        [
            {
                "id": one,
                "label": f"clip {one} of potato",
                "template": templates[SSV2[one]],
                "placeholders": ["potato"],
            }
            for one in ids
        ]
    )


def ssv2(prefix: str = "something-something-v2-") -> dict[str, bytes | str]:
    return videos(*(f"20bn-something-something-v2/{one}.webm" for one in [*SSV2, "1420"])) | {
        f"{prefix}labels.json": json.dumps(SSV2_NUMBERS),
        f"{prefix}train.json": clips("78687", "42326", "100904").replace(
            "]}]", ']}, {"id": "5", "template": ""}]'
        ),
        f"{prefix}validation.json": clips("74225"),
        f"{prefix}test.json": json.dumps([{"id": "1420"}, {"id": "1421"}]),
    }


@pytest.mark.parametrize("prefix", ["something-something-v2-", "labels/"])
def test_something_something_numbers_its_templates_by_labels_json(tmp_path, make, prefix):
    source = lay(tmp_path / "ssv2", ssv2(prefix))
    for split, ids, absent in (
        ("train", ["78687", "42326", "100904"], 1),
        ("val", ["74225"], 0),
        ("test", ["1420"], 1),
    ):
        made = make("ssv2", source, split)
        assert made.classes == sorted(SSV2_NUMBERS, key=SSV2_NUMBERS.get)
        assert made.found == {
            f"20bn-something-something-v2/{one}.webm": SSV2.get(one) for one in ids
        }
        assert made.report["absent"] == absent


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        (
            "something-something-v2-labels.json",
            None,
            "lacks something-something-v2-labels.json or labels/labels.json",
        ),
        (
            "something-something-v2-train.json",
            None,
            "lacks something-something-v2-train.json or labels/train.json",
        ),
        ("20bn-something-something-v2", None, "lacks 20bn-something-something-v2"),
        (
            "something-something-v2-labels.json",
            '{"Holding something": "0"}',
            "of class 'Holding something next to something'",
        ),
        (
            "something-something-v2-train.json",
            '[{"id": "78687", "template"',
            "something-something-v2-train.json",
        ),
        (
            "something-something-v2-train.json",
            '{"78687": "Holding"}',
            "something-something-v2-train.json",
        ),
        (
            "something-something-v2-labels.json",
            '[{"id": "78687"}]',
            "something-something-v2-labels.json",
        ),
    ],
)
def test_something_something_rejects_other_layouts(tmp_path, name, data, match):
    files = {path: content for path, content in ssv2().items() if path.split("/")[0] != name}
    assert_rejected("ssv2", lay(tmp_path / "ssv2", files, {name: data} if data else {}), match)


WNIDS = ["n01440764", "n02119789", "n03445777"]
IDS = {
    "n02119789": 1,
    "n03445777": 2,
    "n01440764": 3,
}  # as in the development kit, not in the order of the wnids
VAL = {
    f"ILSVRC2012_val_{number:08d}": wnid
    for number, wnid in enumerate([WNIDS[i] for i in (2, 0, 1, 1, 2)], 1)
}


def meta_mat() -> bytes:
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    synsets = np.zeros((len(IDS) + 1, 1), [(name, object) for name in names])
    for row, (wnid, number) in enumerate(
        [*IDS.items(), ("n00001740", 1001)]
    ):  # the last is an inner node of WordNet
        children = [2.0, 3.0] if number > 1000 else []
        synsets[row, 0] = (
            number,
            wnid,
            "kit fox, Vulpes macrotis",
            "small fox",
            len(children),
            children,
            0,
            1300,
        )
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    return file.getvalue()


DEVKIT = {
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
        f"{IDS[wnid]}\n" for wnid in VAL.values()
    ),
    "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(),
}
SYNSET_LABELS = {
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{wnid}\n" for wnid in VAL.values())
}
KAGGLE = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(
        f"{name},{wnid} 1 2 30 40 {wnid} 5 6 70 80 \n" for name, wnid in reversed(VAL.items())
    )
}
TRAIN = {f"{wnid}_{number}": wnid for wnid in WNIDS for number in (18, 10026)}


@pytest.mark.parametrize("folder", ["", "ILSVRC/Data/CLS-LOC/"])
@pytest.mark.parametrize("truth", ["devkit", "synset labels", "kaggle", "class folders"])
def test_imagenet_labels_are_the_sorted_wnids_for_every_list_of_the_val_split(
    tmp_path, make, folder, truth
):
    lists = {
        "devkit": DEVKIT,
        "synset labels": SYNSET_LABELS,
        "kaggle": KAGGLE,
        "class folders": {},
    }[truth]
    train = {f"{folder}train/{wnid}/{stem}.JPEG": wnid for stem, wnid in TRAIN.items()}
    inside = "{wnid}/" if truth == "class folders" else ""
    val = {f"{folder}val/{inside.format(wnid=wnid)}{stem}.JPEG": wnid for stem, wnid in VAL.items()}
    junk = {f"{folder}val/._junk.JPEG": b"\0", f"{folder}train/{WNIDS[0]}/._junk.JPEG": b"\0"}
    source = lay(tmp_path / "imagenet", pictures(*train, *val), lists, junk)
    for split, expected in (("train", train), ("val", val)):
        made = make("in1k", source, split)
        assert made.classes == WNIDS and made.found == expected and made.report["absent"] == 0
        assert_own_bytes(made)


@pytest.mark.parametrize("lists", [DEVKIT, SYNSET_LABELS, KAGGLE])
def test_official_imagenet_tars_are_read_without_unpacking(tmp_path, make, lists):
    inner = {
        f"{wnid}.tar": tar(
            {f"{stem}.JPEG": picture(stem, 120) for stem in TRAIN if stem.startswith(wnid)}
        )
        for wnid in WNIDS
    }
    outer = {"ILSVRC2012_img_train.tar": tar(inner)}
    outer["ILSVRC2012_img_val.tar"] = tar({f"{stem}.JPEG": picture(stem) for stem in VAL})
    source = lay(tmp_path / "imagenet", outer, lists)
    before = sorted(source.rglob("*"))
    for split, expected in (("train", TRAIN), ("val", VAL)):
        made = make("in1k", source, split)
        assert made.classes == WNIDS
        assert {Path(name).stem: wnid for name, wnid in made.found.items()} == expected
        assert_own_bytes(made)
    assert sorted(source.rglob("*")) == before


def test_truncated_official_imagenet_tar_is_rejected(tmp_path):
    inner = {f"{wnid}.tar": tar({f"{wnid}_1.JPEG": picture(wnid)}) for wnid in WNIDS}
    data = tar(inner)
    block = len(data[:-10240]) // 3 // 512 * 512  # inside the second class
    for cut in (
        block + 1024,
        512 + len(inner["n01440764.tar"]),
        100 + 512 + len(inner["n01440764.tar"]),
    ):
        source = lay(tmp_path / f"imagenet{cut}", {"ILSVRC2012_img_train.tar": data[:cut]})
        assert_rejected("in1k", source, "ILSVRC2012_img_train.tar")


def test_imagenet_in_webdataset_tars_always_has_a_thousand_classes(tmp_path, make):
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    indices = {
        f"{wnid}_{number}": wnids.index(wnid) for wnid in reversed(WNIDS) for number in range(4)
    }
    source = tmp_path / "wds"
    for shard in range(4):
        samples = {}
        for stem, index in list(indices.items())[shard::4]:
            about = json.dumps({"label": index, "class_name": stem.split("_")[0], "width": 16})
            samples |= {
                f"{stem}.jpg": picture(stem),
                f"{stem}.cls": str(index),
                f"{stem}.json": about,
            }
        lay(source, {f"imagenet1k-train-{shard:04d}.tar": tar(samples)})
    made = make("in1k", source / "imagenet1k-train-{0000..0003}.tar")
    assert made.classes == sorted(wnids) and len(made.classes) == 1000
    expected = {stem: stem.split("_")[0] for stem in indices}
    assert {Path(name).stem: wnid for name, wnid in made.found.items()} == expected
    assert {name.split("/")[0] for name in made.found} == {
        f"imagenet1k-train-{shard:04d}.tar" for shard in range(4)
    }
    assert_own_bytes(made)
    assert_rejected(
        "in1k",
        source / "imagenet1k-train-{0002..0005}.tar",
        "2 of 4 tars are missing.*imagenet1k-train-0004.tar",
    )
    assert_rejected("in1k", source / "imagenet1k-train-0000.tar", "--per-class", per_class=1)


def test_imagenet_rejects_other_layouts(tmp_path):
    assert_rejected("in1k", tmp_path / "nowhere", "lacks train or ILSVRC/Data/CLS-LOC/train")
    images = pictures(*(f"val/{stem}.JPEG" for stem in VAL))
    flat = lay(tmp_path / "flat", images)
    three = "ground_truth.txt or LOC_val_solution.csv or imagenet_2012_validation_synset_labels.txt"
    assert_rejected("in1k", flat, f"flat lacks .*{three}", "val")
    assert_rejected(
        "in1k", lay(tmp_path / "tar", {"ILSVRC2012_img_val.tar": tar({})}), three, "val"
    )
    stray = lay(tmp_path / "stray", images, pictures("val/other.JPEG"), KAGGLE)
    assert_rejected("in1k", stray, "other.JPEG has no class", "val")
    assert_rejected(
        "in1k",
        lay(tmp_path / "page", {"ILSVRC2012_img_train.tar": "<html>" * 200}),
        "img_train.tar is no tar",
    )
    assert_rejected(
        "in1k", lay(tmp_path / "empty", {"train/n01440764/readme.txt": ""}), "holds no images"
    )


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        (
            {"LOC_val_solution.csv": "name,class\nILSVRC2012_val_00000001,n01440764\n"},
            "LOC_val_solution.csv has no column",
        ),
        ({name: data for name, data in DEVKIT.items() if name.endswith("txt")}, "meta.mat"),
        (DEVKIT | {name: "7\n" for name in DEVKIT if name.endswith("txt")}, "ground_truth.txt"),
        (
            DEVKIT | {name: "n01440764\n" for name in DEVKIT if name.endswith("txt")},
            "ground_truth.txt",
        ),
    ],
)
def test_imagenet_error_names_the_malformed_list_of_the_val_split(tmp_path, lists, match):
    assert_rejected(
        "in1k",
        lay(tmp_path / "in", pictures("val/ILSVRC2012_val_00000001.JPEG"), lists),
        match,
        "val",
    )


PLACES_CATEGORIES = "/a/airfield 0\n/a/alcove 1\n/a/apartment_building/outdoor 2\n/z/zen_garden 3\n"
PLACES = {  # file inside its folder: class
    "a/airfield/00000001.jpg": "airfield",
    "a/airfield/00000002.jpg": "airfield",
    "a/apartment_building/outdoor/00000001.jpg": "apartment_building/outdoor",
    "z/zen_garden/00000001.jpg": "zen_garden",
}
PLACES_VAL = {
    "Places365_val_00000001.jpg": "zen_garden",
    "Places365_val_00000002.jpg": "apartment_building/outdoor",
}
PLACES_LISTS = {
    "categories_places365.txt": PLACES_CATEGORIES,
    "places365_train_standard.txt": "/a/airfield/00000001.jpg 0\n"
    "/a/airfield/00000002.jpg 0\n"
    "/a/alcove/00000001.jpg 1\n"
    "/a/apartment_building/outdoor/00000001.jpg 2\n"
    "/z/zen_garden/00000001.jpg 3\n",
    "places365_val.txt": "Places365_val_00000001.jpg 3\n"
    "Places365_val_00000002.jpg 2\n"
    "Places365_val_00000003.jpg 1\n",
    "places365_test.txt": "Places365_test_00000001.jpg\n",
}


@pytest.mark.parametrize("lists", ["", "filelist_places365-standard/"])
@pytest.mark.parametrize("size", ["256", "large", "256_standard"])
def test_places_files_get_the_category_that_their_list_numbers(tmp_path, make, lists, size):
    folder = {
        "train": f"data_{size}",
        "val": f"val_{size.split('_')[0]}",
        "test": f"test_{size.split('_')[0]}",
    }
    expected = {
        "train": {f"{folder['train']}/{name}": label for name, label in PLACES.items()},
        "val": {f"{folder['val']}/{name}": label for name, label in PLACES_VAL.items()},
        "test": {f"{folder['test']}/Places365_test_00000001.jpg": None},
    }
    images = pictures(*(name for names in expected.values() for name in names))
    source = lay(
        tmp_path / "places", images, {lists + name: text for name, text in PLACES_LISTS.items()}
    )
    for split, absent in (("train", 1), ("val", 1), ("test", 0)):
        made = make("places365", source, split)
        assert made.classes == ["airfield", "alcove", "apartment_building/outdoor", "zen_garden"]
        assert made.found == expected[split] and made.report["absent"] == absent
        assert_own_bytes(made)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"categories_places365.txt": None},
            "lacks categories_places365.txt or filelist_places365-standard/categories",
        ),
        (
            {"places365_train_standard.txt": None},
            "lacks places365_train_standard.txt or filelist_places365-standard/places",
        ),
        ({"data_256": None}, "lacks data_256"),
        ({"categories_places365.txt": "/a/airfield 0\n"}, "places365_train_standard.txt.*alcove"),
        (
            {"places365_train_standard.txt": "/a/airfield/00000001.jpg airfield\n"},
            "places365_train_standard.txt",
        ),
        (
            {"places365_train_standard.txt": "Places365_val_00000001.jpg 3\n"},
            "none of the 1 images",
        ),
    ],
)
def test_places_rejects_other_layouts(tmp_path, change, match):
    files = pictures(*(f"data_256/{name}" for name in PLACES)) | PLACES_LISTS
    kept = {name: data for name, data in files.items() if name.split("/")[0] not in change}
    assert_rejected(
        "places365",
        lay(tmp_path / "places", kept, {name: data for name, data in change.items() if data}),
        match,
    )


def test_places_numbers_its_categories_whatever_the_order_of_the_lines(tmp_path, make):
    shuffled = {"categories_places365.txt": "".join(reversed(PLACES_CATEGORIES.splitlines(True)))}
    source = lay(
        tmp_path / "places",
        pictures(*(f"data_256/{name}" for name in PLACES)),
        PLACES_LISTS,
        shuffled,
    )
    assert make("places365", source).found == {
        f"data_256/{name}": label for name, label in PLACES.items()
    }


@pytest.mark.parametrize(("kind", "ending"), [("videos", "mp4"), ("images", "jpg")])
def test_folders_of_any_other_source_are_classes_and_flat_files_have_none(
    tmp_path, make, kind, ending
):
    group = videos if kind == "videos" else pictures
    names = {
        f"{label}/deep/{number}.{ending}": label
        for number, label in enumerate(["z", "a b", "z", "+"])
    }
    made = make(
        kind,
        lay(
            tmp_path / "folders",
            group(*names),
            {"a b/._junk." + ending: b"\0", "a b/notes.txt": "mine"},
        ),
    )
    assert made.found == names and made.classes == ["+", "a b", "z"]
    made = make(kind, lay(tmp_path / "flat", group(f"x.{ending}", f"y.{ending}")))
    assert made.found == {f"x.{ending}": None, f"y.{ending}": None} and made.classes == []


def test_csv_list_gives_classes_and_absent_short_and_skipped_files_are_counted(tmp_path, make):
    files = videos("a/1.mp4", "a/2.webm") | {"still.mp4": video(frames=1), "bad.mp4": "no video"}
    text = 'label,path\n"x, y",a/1.mp4\nw,a/2.webm\nw,gone.mp4\nw,still.mp4\nx,bad.mp4\n'
    made = make(
        "videos", lay(tmp_path / "in", files, {"list.csv": text}) / "list.csv", max_skipped=0.3
    )
    assert made.found == {
        "a/1.mp4": "x, y",
        "a/2.webm": "w",
        "still.mp4": "w",
    } and made.classes == ["w", "x", "x, y"]
    counts = {
        name: made.report[name] for name in ("inputs", "listed", "samples", "absent", "short")
    }
    assert counts == {"inputs": 4, "listed": 4, "samples": 3, "absent": 1, "short": 1}
    assert [name for name, _ in made.report["skipped"]] == ["bad.mp4"]


def test_csv_list_without_labels_gives_no_classes(tmp_path, make):
    elsewhere = lay(tmp_path / "elsewhere", pictures("c.jpg")) / "c.jpg"
    source = lay(
        tmp_path / "in",
        pictures("a/b.jpg"),
        {"list.csv": f"\ufeffpath\na/b.jpg\n{elsewhere}\nno.jpg\n"},
    )
    made = make("images", source / "list.csv")
    assert (
        made.found == {"a/b.jpg": None, str(elsewhere): None}
        and made.classes == []
        and made.report["absent"] == 1
    )
    assert_own_bytes(made)


def test_csv_list_is_rejected_if_it_or_its_column_or_all_files_are_missing(tmp_path):
    source = lay(
        tmp_path / "in",
        {"list.csv": "file,label\na.jpg,x\n", "far.csv": "path,label\na.jpg,x\nb.jpg,x\n"},
    )
    assert_rejected("images", source / "none.csv", "lacks none.csv")
    assert_rejected("images", source / "list.csv", "list.csv has no column path")
    assert_rejected("videos", source / "far.csv", "far.csv holds none of the 2 videos")
    half = lay(
        tmp_path / "half", pictures("a.jpg", "b.jpg"), {"list.csv": "path,label\na.jpg,x\nb.jpg,\n"}
    )
    assert_rejected(
        "images", half / "list.csv", "b.jpg has no class, but inputs before it have one"
    )


@pytest.mark.parametrize(("kind", "ending"), [("videos", "mp4"), ("images", "jpg")])
def test_webdataset_tars_give_numbered_classes_or_none(tmp_path, make, kind, ending):
    data = {
        f"k{number}": video() if kind == "videos" else picture(f"k{number}") for number in range(6)
    }
    for shard in range(3):
        labelled, plain = {}, {}
        for number in (shard, shard + 3):
            labelled |= {
                f"k{number}.{ending}": data[f"k{number}"],
                f"k{number}.cls": f"{number % 4}\n",
                f"k{number}.txt": "t",
            }
            plain |= {f"sub/k{number}.json": "{}", f"sub/k{number}.{ending}": data[f"k{number}"]}
        lay(tmp_path, {f"a-{shard}.tar": tar(labelled), f"b-{shard}.tar": tar(plain)})
    made = make(kind, tmp_path / "a-{0..2}.tar")
    assert made.classes == ["0", "1", "2", "3"]
    assert made.found == {
        f"a-{number % 3}.tar/k{number}.{ending}": str(number % 4) for number in range(6)
    }
    made = make(kind, tmp_path / "b-{0..2}.tar")
    assert (
        made.found == {f"b-{number % 3}.tar/sub/k{number}.{ending}": None for number in range(6)}
        and made.classes == []
    )
    if kind == "images":
        assert_own_bytes(made)
    assert_rejected(kind, tmp_path / "a-{0..3}.tar", "1 of 4 tars are missing, first a-3.tar")
    assert_rejected(kind, tmp_path / "c.tar", "1 of 1 tars are missing, first c.tar")
    assert_rejected(
        kind,
        tmp_path / "a-{0..2}.tar",
        "--per-class needs files, but SOURCE holds tars",
        per_class=1,
    )


def command(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "data_prep.py"), *arguments], capture_output=True, text=True
    )
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1, (
        result.stderr
    )
    return result.stderr


def test_command_line_names_the_missing_folder_list_or_column_in_one_line(tmp_path):
    k400 = lay(tmp_path / "k400", videos("train/0wR5jVB-WPk_000417_000427.mp4"))
    mit = lay(tmp_path / "mit", videos(*MIT), {"moments_categories.txt": "clapping,0\n"})
    places = lay(tmp_path / "places", PLACES_LISTS)
    listing = lay(tmp_path / "mine", {"list.csv": "file\na.jpg\n"}) / "list.csv"
    for arguments, missing in (
        (("k400", str(k400)), "add annotations/train.csv for the classes"),
        (("k400", str(k400), "--split", "val"), "lacks val or videos/val"),
        (("mit", str(mit)), "lacks trainingSet.csv"),
        (("places365", str(places)), "lacks data_256"),
        (("images", str(listing)), "list.csv has no column path"),
    ):
        preset, source, *options = arguments
        assert missing in command(preset, source, str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_command_line_names_a_list_with_the_wrong_content_in_one_line(tmp_path):
    source = lay(tmp_path / "ssv2", ssv2(), {"something-something-v2-labels.json": clips("78687")})
    assert "something-something-v2-labels.json" in command(
        "ssv2", str(source), str(tmp_path / "out")
    )


def test_label_of_a_file_in_nested_folders_is_its_first_folder(tmp_path, make):
    source = lay(tmp_path / "in", pictures("a/b/x.jpg", "a/y.jpg", "c/b/z.jpg"))
    made = make("images", source)
    assert made.found == {"a/b/x.jpg": "a", "a/y.jpg": "a", "c/b/z.jpg": "c"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_list_that_is_not_utf_8_is_answered_with_how_to_save_it(tmp_path, encoding):
    source = lay(tmp_path / "in", pictures("a.jpg"))
    (source / "list.csv").write_bytes("path,label\na.jpg,café\n".encode(encoding))
    with pytest.raises(ValueError, match=r"list.csv is not UTF-8; save the list as UTF-8$"):
        convert(str(source / "list.csv"), str(tmp_path / "out"), Recipe("images"))


WRITERS = {  # {extensions: format and codec of PyAV}
    "264 h264 avc": ("h264", "libx264"),
    "265 h265 hevc": ("hevc", "libx265"),
    "3gp 3g2 3gpp mov qt mj2": ("mov", "mpeg4"),
    "amv": ("avi", "mjpeg"),
    "asf wmv": ("asf", "wmv2"),
    "avi divx": ("avi", "mpeg4"),
    "f4v mp4 m4v mp4v ismv": ("mp4", "libx264"),
    "flv": ("flv", "flv1"),
    "h261": ("h261", "h261"),
    "h263": ("h263", "h263"),
    "ivf": ("ivf", "libvpx"),
    "m1v mpv": ("mpeg1video", "mpeg1video"),
    "m2v mpv2 mp2v": ("mpeg2video", "mpeg2video"),
    "mpg mpeg mpe m2p": ("mpeg", "mpeg1video"),
    "vob evo mod vro": ("vob", "mpeg2video"),
    "ts m2t m2ts mts tod tp trp": ("mpegts", "mpeg2video"),
    "mjpeg mjpg": ("mjpeg", "mjpeg"),
    "mkv mk3d": ("matroska", "libx264"),
    "webm": ("webm", "libvpx"),
    "mxf": ("mxf", "mpeg2video"),
    "nut": ("nut", "mpeg4"),
    "obu": ("obu", "libsvtav1"),
    "ogg ogv ogm ogx": ("ogg", "libvpx"),
    "rm rmvb": ("rm", "rv20"),
    "swf": ("swf", "flv1"),
    "wtv": ("wtv", "mpeg2video"),
    "y4m": ("yuv4mpegpipe", "rawvideo"),
    "dv dif": ("dv", "dvvideo"),
}


def write_film(path: Path, form: str, codec: str) -> None:
    """Write six frames in a format of FFmpeg."""
    width, height = (720, 480) if form == "dv" else (352, 288)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(30000, 1001) if form == "dv" else 25)
        stream.width, stream.height = width, height
        stream.pix_fmt = {"dv": "yuv411p", "mjpeg": "yuvj420p"}.get(form, "yuv420p")
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        for number in range(6):
            pixels = np.full((height, width, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_videos_of_every_extension_that_ffmpeg_can_write_here_are_converted(tmp_path):
    (tmp_path / "in").mkdir()
    names = []
    for endings, (form, codec) in WRITERS.items():
        write_film(tmp_path / "film", form, codec)
        for ending in endings.split():
            names.append(f"x.{ending}")
            shutil.copy(tmp_path / "film", tmp_path / "in" / names[-1])
    report = convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("videos"), 1)
    assert report["skipped"] == [] and report["ignored"] == {}
    assert report["samples"] == len(names) > 60
    assert EXTENSIONS["videos"] == tuple(sorted(set(EXTENSIONS["videos"])))
    no_videos = {".mp3", ".m4a", ".wav", ".mka", ".srt", ".sub", ".txt", ".jpg", ".gif", ".m3u8"}
    assert no_videos.isdisjoint(EXTENSIONS["videos"])


def test_pictures_of_every_extension_that_pillow_can_write_are_converted(tmp_path):
    (tmp_path / "in").mkdir()
    names = []
    for ending in EXTENSIONS["images"]:
        form = Image.registered_extensions()[ending]
        if form not in Image.SAVE:
            continue
        for mode in ("RGB", "P", "1"):  # Some formats have no colours.
            with suppress(OSError, ValueError, KeyError):
                image = Image.new("RGB", (64, 64), (200, 90, 30)).convert(mode)
                image.save(tmp_path / "in" / f"x{ending}", form)
                names.append(f"x{ending}")
                break
    assert {"x.ico", "x.pcx", "x.j2c", "x.dib", "x.icns", "x.sgi", "x.xbm", "x.avif"} <= set(names)
    report = convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    assert report["skipped"] == [] and report["ignored"] == {}
    assert report["samples"] == len(names) > 40
    assert {".pdf", ".eps", ".ps", ".mpg", ".h5", ".emf"}.isdisjoint(EXTENSIONS["images"])


@pytest.mark.parametrize("ending", ["mp4", "mov", "flv", "asf", "ts", "mkv"])
def test_joined_films_of_which_only_the_first_is_read_are_counted(tmp_path, capsys, ending):
    forms = {"ts": "mpegts", "mkv": "matroska"}
    (tmp_path / "in").mkdir()
    film = tmp_path / "in" / f"one.{ending}"
    write_film(film, forms.get(ending, ending), "flv1" if ending == "flv" else "mpeg4")
    (tmp_path / "in" / f"two.{ending}").write_bytes(2 * film.read_bytes())
    command = ["videos", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    data_prep.main([*command, "--fps", "25"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    clips = Clips(str(tmp_path / "out"))
    read_twice = len(clips[1]["ends"]) == 2 * len(clips[0]["ends"])
    assert report["joined"] == ([] if read_twice else [f"two.{ending}"])
    said = "1 joined (only the first film of each is read)"
    assert (said in capsys.readouterr().out) == (not read_twice)
    assert read_twice == (ending in forms)
