"""How a file becomes a clip, and what a source holds: video and images to JPEG; published layouts, lists and tars.

    listing = list_kinetics("raw/k400", "train")
    frames, timestamps = read_video(listing.place.open("train/x_000001_000011.mp4"), Recipe("videos", frames=16))

data_prep.py does this for whole data sets, with many processes.
"""

import csv
import functools
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from shards.storage import Storage, bucket_errors

EXTENSIONS = {
    "videos": (
        ".mp4",
        ".webm",
        ".avi",
        ".mkv",
        ".mov",
        ".m4v",
        ".flv",
        ".mpg",
        ".mpeg",
        ".ts",
        ".wmv",
        ".3gp",
    ),
    "images": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
}


@dataclass
class Listing:
    """What a source holds.

    Args:
        place: what the names of the inputs are relative to.
        inputs: (name, class or None), in a tar with first byte and size; None for what is listed but absent.
        classes: in the order of the labels; None for those of the inputs, sorted.
        tars: the inputs are tars of samples, as webdataset reads them.
        truth: class of a member of a tar, by its name up to the first dot.
    """

    storage: Storage
    inputs: Iterable[tuple | None]
    classes: list[str] | None = None
    tars: bool = False
    truth: dict[str, str] = field(default_factory=dict)


@contextmanager
def as_published(address: str) -> Iterator[None]:
    """What goes wrong in reading a list that is not as it should be, as a ValueError that names it."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        FileNotFoundError,
        csv.Error,
    ) as error:
        raise ValueError(
            f"{address} is not as it is published ({type(error).__name__}: {error})"
        ) from error


def read_list(
    storage: Storage,
    parse: Callable,
    *names: str,
    columns: tuple[str, ...] = (),
    delimiter: str = ",",
) -> Iterator:
    """parse(row) of every row of the first of these lists that is there: a dict if it has columns, else a list of strings.

    Raises:
        ValueError: none is there, or it lacks a column, or a row cannot be parsed.
    """
    name = next(filter(place.has, names), None)
    if name is None:
        raise ValueError(f"SOURCE {place.root} lacks {' or '.join(names)}")
    with as_published(place.at(name)):
        lines = filter(None, place.read(name).decode("utf-8-sig").splitlines())
        rows = csv.DictReader(lines) if columns else csv.reader(lines, delimiter=delimiter)
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{place.at(name)} has no column {missing[0]}; its first line must name {', '.join(columns)}"
        )
    for row in rows:
        with as_published(f"{place.at(name)}, {row},"):
            value = parse(row)
        yield value


def read_document(storage: Storage, parse: Callable, *names: str) -> list | dict:
    """parse(value) of the first of these JSON files that is there. Raises as read_list does."""
    name = next(filter(place.has, names), None)
    if name is None:
        raise ValueError(f"SOURCE {place.root} lacks {' or '.join(names)}")
    with as_published(place.at(name)):
        return parse(json.loads(place.read(name)))


def find_files(storage: Storage, kind: str, *folders: str) -> Iterator[str]:
    """The files of this kind in the first of these folders that is there.

    Raises:
        ValueError: none is.
    """
    folder = next((folder for folder in folders if place.has(folder)), None)
    if folder is None:
        wanted = " or ".join(folder or place.root for folder in folders)
        raise ValueError(f"SOURCE {place.root}: there is no folder {wanted}")
    return (name for name in place.names(folder) if name.lower().endswith(EXTENSIONS[kind]))


def list_any(source: str, kind: str) -> Listing:
    """What is in no published layout: a folder with a folder per class, or files alone, which then have no label.

    Or a .csv list of columns path and, if there are labels, label. Or WebDataset tars: x.tar, x-{0000..1023}.tar.
    """
    if not source.endswith((".csv", ".tar")):
        place = Storage(source)
        names = find_files(place, kind, "")
        return Listing(
            place, ((name, name.split("/")[0] if "/" in name else None) for name in names)
        )
    root, name = os.path.split(source)
    place = Storage(root or ".")
    if name.endswith(".csv"):
        rows = read_list(
            place, lambda row: (row["path"], row.get("label") or None), name, columns=("path",)
        )
        return Listing(place, (one if place.has(one[0]) else None for one in rows))
    from braceexpand import braceexpand

    tars = list(braceexpand(name))
    lost = [tar for tar in tars if not place.has(tar)]
    if lost:
        raise ValueError(
            f"SOURCE {source}: {len(lost)} of the {len(tars)} tars are not there, first {lost[0]}"
        )
    return Listing(place, ((tar, None) for tar in tars), tars=True)


def folder_of(name: str) -> str:
    return os.path.basename(os.path.dirname(name))


def list_kinetics(source: str, split: str) -> Listing:
    """K400, K600 or K700 as CVDF gives it: SPLIT/ with the files flat or in class folders, annotations/SPLIT.csv."""
    place = Storage(source)
    names = find_files(place, "videos", split, f"videos/{split}")
    tables = {part: (f"annotations/{part}.csv", f"{part}.csv") for part in (split, "train")}
    if not any(place.has(table) for table in tables[split]):
        if (first := next(names, None)) and folder_of(first) == split:
            raise ValueError(
                f"SOURCE {source}: {first} is in no class folder; that needs {tables[split][0]} for the classes"
            )
        return Listing(
            place, ((name, folder_of(name)) for name in chain([first] if first else [], names))
        )
    files = {Path(name).stem: name for name in names}
    mended = (
        find_files(place, "videos", "replacement") if place.has("replacement") else ()
    )  # K400's, for corrupted ones
    files |= {Path(name).stem[:11]: name for name in mended}
    used = set()

    def find(row: dict[str, str]) -> tuple | None:
        stem = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        name = files.get(row["youtube_id"]) or files.get(stem)
        used.update((name, files.get(stem)))
        return (name, row.get("label") or None) if name else None

    known = any(map(place.has, tables["train"]))
    labels = (
        read_list(place, lambda row: row["label"], *tables["train"], columns=("label",))
        if known
        else ()
    )
    classes = sorted(set(labels))
    rows = read_list(place, find, *tables[split], columns=("youtube_id", "time_start", "time_end"))
    unlisted = (
        (name, folder_of(name))
        for name in files.values()
        if name not in used and folder_of(name) in classes
    )
    return Listing(
        place, chain(rows, unlisted), classes or None
    )  # K600's csv lacks many that its class folders hold


def list_mit(source: str, split: str) -> Listing:
    """Moments in Time: training/CLASS/*.mp4, validation/CLASS/*.mp4, moments_categories.txt, trainingSet.csv ..."""
    place, part = Storage(source), {"train": "training", "val": "validation"}.get(split, split)
    classes = sorted(read_list(place, lambda row: (int(row[1]), row[0]), "moments_categories.txt"))
    files = set(find_files(place, "videos", part))
    rows = read_list(
        place, lambda row: (f"{part}/{row[0]}", row[1]), f"{part}Set.csv"
    )  # then the votes for and against
    return Listing(
        place, (one if one[0] in files else None for one in rows), [name for _, name in classes]
    )


def list_ssv2(source: str, split: str) -> Listing:
    """Something-Something v2: 20bn-something-something-v2/ID.webm, and its json lists under their old or new names."""
    place, part = Storage(source), {"val": "validation"}.get(split, split)

    def read(name: str, parse: Callable) -> list | dict:
        return read_document(
            place,
            parse,
            f"something-something-v2-{name}.json",
            f"labels/{name}.json",
            f"{name}.json",
        )

    folder = "20bn-something-something-v2"
    files = {name.removeprefix(folder + "/"): name for name in find_files(place, "videos", folder)}
    plain = str.maketrans(
        "", "", "[]"
    )  # a template is a class name with its placeholders in brackets

    def find(clip: dict) -> tuple | None:
        name = files.get(f"{clip['id']}.webm")
        return (name, clip.get("template", "").translate(plain) or None) if name else None

    classes = read("labels", lambda labels: sorted(labels, key=lambda name: int(labels[name])))
    return Listing(place, read(part, lambda clips: [find(clip) for clip in clips]), classes)


def list_in1k(source: str, split: str) -> Listing:
    """ImageNet-1k: SPLIT/ with a folder per wnid, or flat with a list of classes; the official tars; WebDataset tars."""
    if source.endswith(".tar"):
        from timm.data import ImageNetInfo

        return replace(list_any(source, "images"), classes=ImageNetInfo().label_names())
    place, tar = Storage(source), f"ILSVRC2012_img_{split}.tar"
    if place.has(tar) and split == "train":
        inner = (
            (tar, name.removesuffix(".tar"), begin, size)
            for name, begin, size in tar_members(place, tar)
        )
        return Listing(place, inner, tars=True)
    if place.has(tar):
        return Listing(place, [(tar, None)], tars=True, truth=read_truth(place))
    names = find_files(place, "images", split, f"ILSVRC/Data/CLS-LOC/{split}")  # Kaggle's
    first = next(names, "")
    names = chain([first] if first else [], names)
    if folder_of(first) != split:
        return Listing(place, ((name, folder_of(name)) for name in names))
    truth = read_truth(place)
    return Listing(
        place, ((name, truth.get(Path(name).stem)) for name in names), sorted(set(truth.values()))
    )


def tar_members(storage: Storage, tar: str) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of every file in a tar, without reading what is in them."""
    begin = 0
    while True:
        header = place.read(tar, begin, tarfile.BLOCKSIZE)
        if len(header) == tarfile.BLOCKSIZE and not header.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(
                f"{place.at(tar)} is no tar, is cut or damaged at byte {begin}: {error}"
            ) from error
        begin += tarfile.BLOCKSIZE
        if member.isfile():
            yield member.name, begin, member.size
        begin += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def read_truth(storage: Storage) -> dict[str, str]:
    """{ILSVRC2012_val_00000001: wnid} from whichever list of ImageNet's validation set is there.

    Raises:
        ValueError: none is.
    """
    kaggle, plain = "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt"
    devkit = "ILSVRC2012_devkit_t12/data/"
    if place.has(kaggle):
        columns = ("ImageId", "PredictionString")
        return dict(
            read_list(
                place,
                lambda row: (row[columns[0]], row[columns[1]].split()[0]),
                kaggle,
                columns=columns,
            )
        )
    if place.has(plain):
        wnids = read_list(place, lambda row: row[0], plain)
    else:
        numbers = f"{devkit}ILSVRC2012_validation_ground_truth.txt"
        wnid_of = read_synsets(place, f"{devkit}meta.mat") if place.has(numbers) else {}
        wnids = read_list(place, lambda row: wnid_of[int(row[0])], numbers, kaggle, plain)
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}


def read_synsets(storage: Storage, name: str) -> dict[int, str]:
    """{ILSVRC2012_ID: wnid}."""
    from scipy.io import loadmat

    with as_published(place.at(name)), place.open(name) as file:
        synsets = loadmat(file, squeeze_me=True)["synsets"]
        return dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))


def list_places365(source: str, split: str) -> Listing:
    """Places365-Standard: data_256/ or data_large/, val_256/ or val_large/, places365_*.txt, categories_places365.txt."""
    place, stem = Storage(source), {"train": "data"}.get(split, split)
    folders = [f"{stem}_{size}{kind}" for size in ("256", "large") for kind in ("", "_standard")]
    folder = next(filter(place.has, folders), folders[0])
    files = set(find_files(place, "images", folder))

    def read(name: str, parse: Callable) -> Iterator:
        return read_list(place, parse, name, f"filelist_places365-standard/{name}", delimiter=" ")

    numbered = dict(
        read("categories_places365.txt", lambda row: (int(row[1]), row[0][3:]))
    )  # /a/airfield 0

    def find(row: list[str]) -> tuple | None:
        name = f"{folder}/{row[0].lstrip('/')}"
        label = numbered[int(row[1])] if split != "test" else None
        return (name, label) if name in files else None

    rows = read(f"places365_{split}{'_standard' if split == 'train' else ''}.txt", find)
    return Listing(place, rows, [numbered[number] for number in sorted(numbered)])


LAYOUTS = {
    "k400": ("videos", list_kinetics),
    "k600": ("videos", list_kinetics),
    "k700": ("videos", list_kinetics),
    "mit": ("videos", list_mit),
    "ssv2": ("videos", list_ssv2),
    "in1k": ("images", list_in1k),
    "places365": ("images", list_places365),
}


def write_manifest(
    listing: Listing, file: BinaryIO, per_class: int | None, size: int
) -> tuple[dict, list[int]]:
    """Write the inputs to a file, a JSON line each -> counts, classes and hash; where in the file each `size` lines begin.

    Raises:
        ValueError: inputs with a class and others without; a class that is not in the list.
    """
    taken, digest, absent, listed, starts = Counter(), hashlib.sha256(), 0, 0, []
    known = set(listing.classes or ())
    for entry in listing.inputs:
        if entry is None:
            absent += 1
            continue
        name, named = entry[:2]
        if known and named is not None and named not in known:
            raise ValueError(
                f"{name} is of class {named!r}, which the data set's list of classes lacks"
            )
        if taken and (named is None) != (None in taken):
            one = "no" if named is None else "a"
            raise ValueError(
                f"{listing.place.at(name)} has {one} class, unlike what was listed before it; move it out"
            )
        taken[named] += 1
        if per_class and taken[named] > per_class:
            continue
        if listed % size == 0:
            starts.append(file.tell())
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        file.write(line)
        digest.update(line)
        listed += 1
    file.flush()
    classes = listing.classes or sorted(set(listing.truth.values()) or taken.keys() - {None})
    return {
        "listed": listed,
        "absent": absent,
        "classes": classes,
        "listing": digest.hexdigest(),
    }, starts


def read_inputs(listing: Listing, kind: str, entries: list) -> Iterator[tuple]:
    """(name, class or label or None, a function that opens it) of every input; where they are tars, of every sample."""
    if not listing.tars:
        yield from (
            (name, named, functools.partial(listing.place.open, name)) for name, named in entries
        )
        return
    from webdataset.tariterators import group_by_keys, tar_file_expander

    wanted = re.compile(
        rf"(.*\.)?({'|'.join(ending[1:] for ending in EXTENSIONS[kind])})", re.IGNORECASE
    )
    for name, named, *span in entries:
        try:
            with listing.place.stream(name, *span) as stream, bucket_errors(listing.place.at(name)):
                tar = WholeTar(stream, *span[1:])
                for sample in group_by_keys(
                    tar_file_expander([{"url": name, "stream": tar}]), lcase=False
                ):
                    key, last = sample["__key__"], next(filter(wanted.fullmatch, sample), None)
                    if last:
                        label = (
                            named
                            or listing.truth.get(os.path.basename(key))
                            or int(sample.get("cls", -1))
                        )
                        yield (
                            f"{name}/{key}.{last}",
                            label,
                            functools.partial(io.BytesIO, sample[last]),
                        )
                tar.check_end()
        except (tarfile.TarError, EOFError, ValueError, FileNotFoundError) as error:
            why = f"{error}; what follows in it is lost"
            yield name, None, functools.partial(refuse, why)


class WholeTar:
    """A tar of `size` bytes, read in order; tarfile itself takes one that is cut, or has a damaged header, for complete."""

    def __init__(self, stream: BinaryIO, size: int | None = None):
        self.stream, self.left, self.last = stream, size, b""

    def read(self, count: int) -> bytes:
        data = self.stream.read(count if self.left is None else min(count, self.left))
        self.left = None if self.left is None else self.left - len(data)
        self.last = (self.last + data)[-2 * tarfile.BLOCKSIZE :]
        return data

    def check_end(self) -> None:
        while data := self.read(1 << 20):
            if data.strip(b"\0"):
                raise tarfile.ReadError("a header in it is damaged")
        if len(self.last) < tarfile.BLOCKSIZE or self.last.strip(b"\0"):
            raise tarfile.ReadError("it is cut")


def refuse(why: str) -> BinaryIO:
    raise ValueError(why)
