"""Published layouts of data sets: which files they hold, of which class, and which are missing.

To add a layout, write a function like list_mit and name it in LAYOUTS. The first line of its
docstring, "List ...", becomes the help of its command.
"""

import csv
import io
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from shards.depth import DepthMap, read_sunrgbd
from shards.report import Ignored
from shards.storage import Storage, is_hidden

# FFmpeg names no extensions for many of its demuxers, such as mpegts and asf.
VIDEO_EXTENSIONS = (
    ".264 .265 .266 .3g2 .3gp .3gpp .amv .asf .avc .avi .avs2 .avs3 .cavs .dav .dif .divx .dnxhd "
    ".drc .dv .dvr-ms .evo .f4v .flv .gxf .h261 .h263 .h264 .h265 .h266 .hevc .ismv .ivf .kux "
    ".m1v .m2p .m2t .m2ts .m2v .m4v .mj2 .mjpeg .mjpg .mk3d .mkv .mlv .mod .mov .mp2v .mp4 .mp4v "
    ".mpe .mpeg .mpg .mpv .mpv2 .mts .mxf .mxg .nsv .nut .nuv .obu .ogg .ogm .ogv .ogx .pva .qt "
    ".rm .rmvb .roq .swf .tod .tp .trp .ts .ty .vc1 .vc2 .viv .vob .vro .vvc .webm .wmv .wtv "
    ".xmv .y4m"
)
# Formats that Pillow only identifies, or reads with a program that it does not bring along.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
Image.init()  # registers all formats
EXTENSIONS = {  # of files that FFmpeg and Pillow decode
    "videos": tuple(VIDEO_EXTENSIONS.split()),
    "images": tuple(
        extension
        for extension, name in sorted(Image.registered_extensions().items())
        if name in Image.OPEN and name not in NO_PICTURES
    ),
}
SYSTEM_NAMES = {"@eaDir", "#recycle", "lost+found", "__MACOSX", "Thumbs.db", "desktop.ini"}
TRAIN_SPLITS = {"train", "training"}
OTHER_SPLITS = {"val", "valid", "validation", "test", "testing", "eval"}
NO_CLASSES = TRAIN_SPLITS | OTHER_SPLITS | {"images", "videos", "labels", "annotations"}

# A list of another format raises nearly anything while it is parsed.
LIST_ERRORS = (ValueError, TypeError, LookupError, AttributeError, FileNotFoundError, csv.Error)

DEVKIT = "ILSVRC2012_devkit_t12/data"
SCENES = (  # of SUN RGB-D, with more than 80 images each
    *("bathroom", "bedroom", "classroom", "computer_room", "conference_room", "corridor"),
    *("dining_area", "dining_room", "discussion_area", "furniture_store", "home_office", "kitchen"),
    *("lab", "lecture_theatre", "library", "living_room", "office", "rest_space", "study_space"),
)


@dataclass
class Listing:
    """The inputs of a source.

    An input is (name, class name); the class name is None if it is unknown. A file that is listed
    but absent is None. A tar inside a tar has two values more: its first byte and size.
    """

    storage: Storage  # The names of inputs are relative to it.
    inputs: Iterable[tuple | None]
    classes: list[str] | None = None  # in the order of the labels; None to sort the inputs' classes
    tars: bool = False  # whether the inputs are tars of samples, as webdataset reads them
    truth: dict[str, str] = field(default_factory=dict)  # {name of a tar member: class}
    ignored: Ignored = field(default_factory=Ignored)  # complete once `inputs` are exhausted
    candidates: Iterable[str] = ()  # files of which the inputs were chosen by a list
    empty_classes: Iterable[str] = ()  # class folders without any file
    read_depth: Callable[[str], DepthMap] | None = None  # of an image, by its name


@contextmanager
def list_errors(address: str) -> Iterator[None]:
    """Raise whatever goes wrong in reading a list as a ValueError that names the list."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{address} is not UTF-8; save the list as UTF-8") from error
    except LIST_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{address} is not as it is published ({reason})") from error


def first_existing(storage: Storage, names: tuple[str, ...]) -> str:
    """Return the first of these files or folders that exists; raise ValueError if none does."""
    name = next(filter(storage.has, names), None)
    if name is None:
        # The name "" is SOURCE itself.
        fault = f"lacks {' or '.join(names)}" if names[0] else "does not exist"
        raise ValueError(f"SOURCE {storage.root} {fault}")
    return name


def read_list(
    storage: Storage, parse: Callable, *names: str, columns: tuple = (), delimiter: str = ","
) -> Iterator:
    """Yield parse(row) for every row of the first of these CSV files that exists.

    A row is a dict if there are `columns`, which the first line must name, else a list of strings.
    """
    name = first_existing(storage, names)
    address = storage.at(name)
    with list_errors(address):
        text = storage.read(name).decode("utf-8-sig").lstrip("\r\n")
        header = text.split("\n", 1)[0]
        if columns:  # Spreadsheets write semicolons or tabs in some languages.
            delimiter = max(",;\t", key=header.count)
        # csv finds the ends of lines, since a quoted field may hold line breaks.
        file = io.StringIO(text, newline="")
        lines = filter(any, csv.reader(file, delimiter=delimiter, skipinitialspace=bool(columns)))
        spelling = {column.lower(): column for column in columns} | {"class": "label"}
        titles = [title.strip().lower() for title in next(lines, [])] if columns else []
        titles = [spelling.get(title, title) for title in titles]
        missing = [column for column in columns if column not in titles]
    if missing:
        needed = ", ".join(columns)
        raise ValueError(f"{address} has no column {missing[0]}; its first line must name {needed}")
    if twice := [title for title, count in Counter(titles).items() if title and count > 1]:
        raise ValueError(f"{address} has several columns {twice[0]}; leave one")
    for row in lines:
        with list_errors(f"{address}, {row},"):
            if columns and len(row) != len(titles):
                raise ValueError(f"{len(row)} fields for {len(titles)} columns")
            value = parse(dict(zip(titles, row, strict=True)) if columns else row)
        yield value


def are_splits(folders: Iterable[str]) -> bool:
    """Return whether folders are splits of a data set, such as train and val, and no classes."""
    names = {folder.lower() for folder in folders}
    has_splits = bool(names & TRAIN_SPLITS and names & OTHER_SPLITS)
    return has_splits or bool(names and names <= NO_CLASSES)


def find_files(storage: Storage, kind: str, ignored: Ignored, *folders: str) -> Iterator[str]:
    """Return the files of a kind in the first of these folders that exists; count all others."""
    folder = first_existing(storage, folders)

    def select() -> Iterator[str]:
        for name in storage.names(folder, hidden=True):
            parts = name.split("/")
            extension = os.path.splitext(name)[1].lower()
            if is_hidden(name) or not SYSTEM_NAMES.isdisjoint(parts):
                ignored.add("hidden or system file", [name])
            elif extension not in EXTENSIONS[kind]:
                ignored.add(f"extension {extension}" if extension else "no extension", [name])
            else:
                yield name

    return select()


def peek(names: Iterator[str]) -> tuple[str, Iterator[str]]:
    """Return the first of some names, or "" if there is none, and an iterator over all of them."""
    first = next(names, "")
    return first, chain([first], names) if first else names


def folder_of(name: str) -> str:
    """Return the name of the folder that holds a file."""
    return os.path.basename(os.path.dirname(name))


def list_any(source: str, kind: str) -> Listing:
    """List a folder with a folder per class, files without labels, a .csv list, or WebDataset tars.

    A .csv list has the columns path and, if there are labels, label. Tars are given by a pattern
    such as x.tar or x-{0000..1023}.tar.
    """
    if source.endswith(".tar"):
        return list_tars(source)
    if source.endswith(".csv"):
        return list_csv(source, kind)
    if source.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")):
        raise ValueError(f"SOURCE {source} is compressed; unpack it, or give tars as x.tar")
    storage, ignored = Storage(source), Ignored()
    names = find_files(storage, kind, ignored, "")
    inputs = ((name, name.split("/")[0] if "/" in name else None) for name in names)
    empty = [] if storage.remote else empty_folders(source)
    return Listing(storage, inputs, ignored=ignored, empty_classes=empty)


def empty_folders(source: str) -> list[str]:
    """Return the names of the folders in SOURCE that hold no file at all."""
    folders = [entry.name for entry in os.scandir(source) if entry.is_dir()]
    visible = [name for name in folders if not is_hidden(name) and name not in SYSTEM_NAMES]
    return [name for name in visible if not any(Storage(source).names(name, hidden=True))]


def list_csv(source: str, kind: str) -> Listing:
    """List the files of a .csv list, whose paths are relative to it."""
    root, name = os.path.split(source)
    storage, ignored = Storage(root or "."), Ignored()
    labels: dict[str, str | None] = {}

    def parse(row: dict[str, str]) -> tuple[str, str | None]:
        path, label = row["path"].strip(), row.get("label", "").strip()
        if "\\" in path and not storage.has(path):
            path = path.replace("\\", "/")  # from Windows
        return os.path.normpath(path), label or None

    def inputs() -> Iterator[tuple | None]:
        for path, label in read_list(storage, parse, name, columns=("path",)):
            if path not in labels:
                labels[path] = label
                yield (path, label) if storage.has(path) else None
            elif labels[path] == label:
                ignored.add("listed twice", [path])
            else:
                raise ValueError(f"{source}: {path} has the labels {labels[path]} and {label}")

    candidates = find_files(storage, kind, ignored, "")
    return Listing(storage, inputs(), ignored=ignored, candidates=candidates)


def list_tars(source: str) -> Listing:
    """List the tars of a pattern such as x-{0000..1023}.tar."""
    from braceexpand import braceexpand

    root, pattern = os.path.split(source)
    storage = Storage(root or ".")
    tars = list(braceexpand(pattern))
    missing = [tar for tar in tars if not storage.has(tar)]
    if missing:
        count = f"{len(missing)} of {len(tars)}"
        raise ValueError(f"SOURCE {source}: {count} tars are missing, first {missing[0]}")
    return Listing(storage, ((tar, None) for tar in tars), tars=True)


def list_kinetics(source: str, split: str) -> Listing:
    """List Kinetics-400, 600 or 700 as CVDF publishes it: SPLIT/ and annotations/SPLIT.csv.

    The files of SPLIT/ lie side by side or in class folders. Without a .csv list, the class
    folders give the classes.
    """
    storage, ignored = Storage(source), Ignored()
    names = find_files(storage, "videos", ignored, split, f"videos/{split}")
    tables = (f"annotations/{split}.csv", f"{split}.csv")
    if not any(map(storage.has, tables)):
        first, names = peek(names)
        if folder_of(first) == split:
            remedy = f"add {tables[0]} for the classes"
            raise ValueError(f"SOURCE {source}: {first} is in no class folder; {remedy}")
        return Listing(storage, ((name, folder_of(name)) for name in names), ignored=ignored)
    files = {Path(name).stem: name for name in names}
    if storage.has("replacement"):  # of corrupt files of K400, by the 11 characters of YouTube's id
        replacements = find_files(storage, "videos", Ignored(), "replacement")
        files |= {Path(name).stem[:11]: name for name in replacements}
    used = set()

    def find(row: dict[str, str]) -> tuple | None:
        start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        name = files.get(row["youtube_id"]) or files.get(stem)
        used.update((name, files.get(stem)))
        return (name, row.get("label") or None) if name else None

    classes = kinetics_classes(storage)
    columns = ("youtube_id", "time_start", "time_end")
    listed = read_list(storage, find, *tables, columns=columns)
    # K600's list lacks many files that its class folders hold.
    unlisted = (name for name in files.values() if name not in used)
    labelled = ((name, folder_of(name)) for name in unlisted if folder_of(name) in classes)
    candidates = (name for name in files.values() if name.startswith(f"{split}/"))
    inputs = chain(listed, labelled)
    return Listing(storage, inputs, classes or None, ignored=ignored, candidates=candidates)


def kinetics_classes(storage: Storage) -> list[str]:
    """Return the sorted classes of Kinetics' list of the train split; none if there is no list."""
    tables = ("annotations/train.csv", "train.csv")
    if not any(map(storage.has, tables)):
        return []
    labels = read_list(storage, lambda row: row["label"], *tables, columns=("label",))
    return sorted(set(labels))


def list_mit(source: str, split: str) -> Listing:
    """List Moments in Time: training/CLASS/*.mp4, trainingSet.csv, moments_categories.txt."""
    storage = Storage(source)
    folder = {"train": "training", "val": "validation"}.get(split, split)
    # A row of the categories reads clapping,0.
    numbered = read_list(storage, lambda row: (int(row[1]), row[0]), "moments_categories.txt")
    classes = [name for _, name in sorted(numbered)]
    ignored = Ignored()
    files = set(find_files(storage, "videos", ignored, folder))
    # After file and class, a row has the votes for and against the class.
    rows = read_list(storage, lambda row: (f"{folder}/{row[0]}", row[1]), f"{folder}Set.csv")
    inputs = (row if row[0] in files else None for row in rows)
    return Listing(storage, inputs, classes, ignored=ignored, candidates=files)


def list_ssv2(source: str, split: str) -> Listing:
    """List Something-Something v2: 20bn-something-something-v2/ID.webm and its JSON lists.

    The lists may have their old names or their new ones.
    """
    storage = Storage(source)
    folder = "20bn-something-something-v2"
    ignored = Ignored()
    files = set(find_files(storage, "videos", ignored, folder))
    # A template is a class name whose placeholders are in brackets.
    without_brackets = str.maketrans("", "", "[]")

    def read(list_name: str, parse: Callable) -> list[tuple] | list[str]:
        names = (f"{stem}{list_name}.json" for stem in ("something-something-v2-", "labels/", ""))
        name = first_existing(storage, tuple(names))
        with list_errors(storage.at(name)):
            return parse(json.loads(storage.read(name)))

    def find(clip: dict) -> tuple | None:
        name = f"{folder}/{clip['id']}.webm"
        class_name = clip.get("template", "").translate(without_brackets)
        return (name, class_name or None) if name in files else None

    classes = read("labels", lambda numbers: sorted(numbers, key=lambda name: int(numbers[name])))
    name = {"val": "validation"}.get(split, split)
    inputs = read(name, lambda clips: [find(clip) for clip in clips])
    # The folder holds all splits, so that the clips of the others count as not listed.
    return Listing(storage, inputs, classes, ignored=ignored, candidates=files)


def list_in1k(source: str, split: str) -> Listing:
    """List ImageNet-1k: class folders, a flat folder with a list, official tars or WebDataset tars.

    Class folders are named by the wnids of the classes, in SPLIT/ or in Kaggle's
    ILSVRC/Data/CLS-LOC/SPLIT/.
    """
    if source.endswith(".tar"):
        from timm.data import ImageNetInfo

        return replace(list_tars(source), classes=ImageNetInfo().label_names())
    storage = Storage(source)
    tar = f"ILSVRC2012_img_{split}.tar"
    if storage.has(tar) and split == "train":
        members = tar_members(storage, tar)
        tars = ((tar, name.removesuffix(".tar"), begin, size) for name, begin, size in members)
        return Listing(storage, tars, tars=True)
    if storage.has(tar):
        return Listing(storage, [(tar, None)], tars=True, truth=read_truth(storage))
    ignored = Ignored()
    names = find_files(storage, "images", ignored, split, f"ILSVRC/Data/CLS-LOC/{split}")
    first, names = peek(names)
    if folder_of(first) != split:
        return Listing(storage, ((name, folder_of(name)) for name in names), ignored=ignored)
    truth = read_truth(storage)
    inputs = ((name, truth.get(Path(name).stem)) for name in names)
    return Listing(storage, inputs, sorted(set(truth.values())), ignored=ignored)


def tar_members(storage: Storage, tar: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and size of every file in a tar, without reading the files."""
    begin = 0
    while True:
        header = storage.read(tar, begin, tarfile.BLOCKSIZE)
        if len(header) == tarfile.BLOCKSIZE and not header.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            fault = f"is no tar, or truncated or corrupt at byte {begin}"
            raise ValueError(f"{storage.at(tar)} {fault}: {error}") from error
        begin += tarfile.BLOCKSIZE
        if member.isfile():
            yield member.name, begin, member.size
        begin += math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def read_truth(storage: Storage) -> dict[str, str]:
    """Return {ILSVRC2012_val_00000001: wnid} from whichever list of ImageNet's val split exists."""
    kaggle = "LOC_val_solution.csv"
    plain = "imagenet_2012_validation_synset_labels.txt"
    devkit = f"{DEVKIT}/ILSVRC2012_validation_ground_truth.txt"
    if storage.has(kaggle):

        def parse(row: dict[str, str]) -> tuple[str, str]:
            return row["ImageId"], row["PredictionString"].split()[0]

        return dict(read_list(storage, parse, kaggle, columns=("ImageId", "PredictionString")))
    if storage.has(plain):
        wnids = read_list(storage, lambda row: row[0], plain)
    else:
        synsets = read_synsets(storage) if storage.has(devkit) else {}
        wnids = read_list(storage, lambda row: synsets[int(row[0])], devkit, kaggle, plain)
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}


def read_synsets(storage: Storage) -> dict[int, str]:
    """Return {ILSVRC2012_ID: wnid} from ImageNet's development kit."""
    name = f"{DEVKIT}/meta.mat"
    with list_errors(storage.at(name)):
        synsets = read_matlab(storage, name)["synsets"]
        numbers, wnids = synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()
        return dict(zip(numbers, wnids, strict=True))


def read_matlab(storage: Storage, name: str) -> dict:
    """Return the variables of a MATLAB file; raise ValueError if it is corrupt."""
    from scipy.io import loadmat

    with storage.open(name) as file:
        try:
            return loadmat(file, squeeze_me=True)
        except Exception as error:  # Corrupt files make scipy raise nearly anything.
            raise ValueError(error) from error


def list_places365(source: str, split: str) -> Listing:
    """List Places365-Standard: data_256/ or data_large/, val_256/ or val_large/, and its lists.

    The lists are places365_*.txt and categories_places365.txt.
    """
    storage = Storage(source)
    stem = {"train": "data"}.get(split, split)
    endings = ("256", "256_standard", "large", "large_standard")
    folders = [f"{stem}_{ending}" for ending in endings]
    folder = next(filter(storage.has, folders), folders[0])
    ignored = Ignored()
    files = set(find_files(storage, "images", ignored, folder))

    def read(name: str, parse: Callable) -> Iterator:
        names = (name, f"filelist_places365-standard/{name}")
        return read_list(storage, parse, *names, delimiter=" ")

    # "/a/airfield 0" -> (0, "airfield")
    categories = read("categories_places365.txt", lambda row: (int(row[1]), row[0][3:]))
    class_names = dict(categories)

    def find(row: list[str]) -> tuple | None:
        name = f"{folder}/{row[0].lstrip('/')}"
        label = class_names[int(row[1])] if split != "test" else None
        return (name, label) if name in files else None

    table = "places365_train_standard.txt" if split == "train" else f"places365_{split}.txt"
    classes = [class_names[number] for number in sorted(class_names)]
    return Listing(storage, read(table, find), classes, ignored=ignored, candidates=files)


def list_sunrgbd(source: str, split: str, scenes: tuple[str, ...] = SCENES) -> Listing:
    """List SUN RGB-D: SUNRGBD/SENSOR/ and SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat.

    The images of the 19 scenes of its benchmark are listed, with their depth maps.
    """
    if split not in ("train", "test"):
        raise ValueError(f"--split {split}: SUN RGB-D has train and test")
    storage, ignored = Storage(source), Ignored()
    table = first_existing(storage, ("SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat",))
    with list_errors(storage.at(table)):
        # The list has the paths of its authors' disk, as /n/fs/sun3d/data/SUNRGBD/kv1/...
        paths = np.atleast_1d(read_matlab(storage, table)[f"all{split}"]).tolist()
        folders = ["SUNRGBD/" + path.split("/SUNRGBD/")[1].strip("/") for path in paths]

    def find(folder: str) -> tuple | None:
        image = next(storage.names(f"{folder}/image"), None)
        if image is None:
            return None
        with list_errors(storage.at(f"{folder}/scene.txt")):
            return image, storage.read(f"{folder}/scene.txt").decode().strip()

    def select() -> Iterator[tuple | None]:
        for entry in map(find, folders):
            if entry and entry[1] not in scenes:
                ignored.add("scene that is not in the benchmark", entry[:1])
            else:
                yield entry

    read_depth = partial(read_sunrgbd, storage)
    return Listing(storage, select(), sorted(scenes), ignored=ignored, read_depth=read_depth)


LAYOUTS = {  # {sub-command: (kind, function that lists a split)}
    "k400": ("videos", list_kinetics),
    "k600": ("videos", list_kinetics),
    "k700": ("videos", list_kinetics),
    "mit": ("videos", list_mit),
    "ssv2": ("videos", list_ssv2),
    "in1k": ("images", list_in1k),
    "places365": ("images", list_places365),
    "sunrgbd": ("images", list_sunrgbd),
}
