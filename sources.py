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

import av
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from places import Place, bucket_errors

EXTENSIONS = {
    "videos": (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".ts", ".wmv", ".3gp"),
    "images": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
}
MAX_PIXELS = 1 << 27  # of an image while it is decoded: 400 MB


@dataclass(frozen=True)
class Recipe:
    """What is kept of an input: `frames` evenly spaced over the clip, or one every 1 / `fps` seconds."""

    kind: str  # "videos" or "images"
    frames: int = 16
    fps: float | None = None  # Hz; if given, instead of `frames`
    short_side: int = 256  # pixels; smaller inputs are never enlarged
    quality: int = 90  # JPEG, 1-100
    per_class: int | None = None  # the first so many inputs of every class; None for all

    def __post_init__(self):
        for name, lowest, highest in (("frames", 1, 1e6), ("fps", 1e-6, 1e3), ("short_side", 8, 1e5), ("quality", 1, 100)):
            if (value := getattr(self, name)) is not None and not lowest <= value <= highest:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be from {lowest:g} to {highest:g}")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"--per-class {self.per_class} must be positive")


def kept_times(start: float, duration: float, recipe: Recipe) -> np.ndarray:
    """Times in seconds at which a video is sampled: the middles of `frames` equal sections, or every 1 / `fps`."""
    if recipe.fps:
        return start + np.arange(max(1, int(duration * recipe.fps))) / recipe.fps
    return start + (np.arange(recipe.frames) + 0.5) * duration / recipe.frames


def open_video(file: BinaryIO) -> av.container.InputContainer:
    """The container of a video file, from its beginning.

    Raises:
        ValueError: it has no video, or none that can be decoded.
        av.FFmpegError: the file is damaged or no video.
    """
    file.seek(0)
    container = av.open(file, metadata_errors="ignore")  # titles are in whatever encoding
    if not container.streams.video:
        raise ValueError("no video stream")
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise ValueError("a still picture, not a video")
    stream = container.streams.best("video")  # not a cover picture
    if stream is None or stream.codec_context is None:
        raise ValueError("no decoder for its codec")
    stream.codec_context.thread_count = 1
    return container


def time_of(packet: av.Packet | av.VideoFrame, ordered: bool) -> int | None:
    return packet.dts if ordered or packet.pts is None else packet.pts


def scan_video(container: av.container.InputContainer, ordered: bool) -> tuple[np.ndarray, float]:
    """Read the packets alone -> times of the frames shown, ascending, in the stream's unit; seconds from one to the next.

    Raises:
        ValueError: there are none, or fewer than the container claims.
    """
    stream, found, count, end = container.streams.best("video"), [], 0, 0.0
    for packet in container.demux():
        time = time_of(packet, ordered)
        if time is None:
            continue
        if packet.stream is stream:
            count += 1
            if not packet.is_discard:  # an edit list hides frames that other frames need
                found.append(time)
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
    if not found:
        raise ValueError("no frames")
    pts = np.unique(found)
    gap = float(np.median(np.diff(pts)) * stream.time_base if len(pts) > 1 else 1 / (stream.average_rate or 1))
    claimed = (container.duration or 0) / av.time_base
    if count < stream.frames or (not stream.frames and end + gap < 0.98 * claimed):  # some packets have no duration
        raise ValueError(f"cut: {count} frames, {end:.2f} s of {stream.frames or '?'}, {claimed:.2f} s")
    return pts, gap


def read_video(file: BinaryIO, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Decode the wanted frames of a video file -> upright JPEG files, timestamps in seconds.

    A first pass reads the packets alone and finds which frame is on screen at each wanted time. The second decodes: for a
    packet that is neither wanted nor a key frame the decoder may drop what no other frame refers to.

    Raises:
        ValueError: see open_video and scan_video; or the file lacks a frame that its packets promise.
        av.FFmpegError: the file is damaged or no video.
    """
    with open_video(file) as container:
        ordered = container.format.name == "avi"  # has no presentation times: the n-th frame shown has the n-th packet's
        pts, gap = scan_video(container, ordered)
        seconds = pts * float(container.streams.best("video").time_base)
    times = kept_times(seconds[0], seconds[-1] - seconds[0] + gap, recipe) + 0.02 * gap  # containers round to 1 ms
    on_screen = np.searchsorted(seconds, times, "right") - 1
    wanted = pts[on_screen].tolist()
    missing, frames, shown = set(wanted), {}, iter(pts.tolist())
    with open_video(file) as container:  # anew, since not every format can be rewound
        stream = container.streams.best("video")
        for packet in container.demux(stream):
            time = time_of(packet, ordered)
            keep_all = ordered or time is None or time in missing or packet.is_keyframe
            stream.codec_context.skip_frame = "DEFAULT" if keep_all else "NONREF"
            for frame in packet.decode():
                time = next(shown, None) if ordered else time_of(frame, ordered)
                if time in missing:
                    missing.remove(time)
                    frames[time] = encode_jpeg(frame, recipe)
            if not missing:
                break
    if missing:
        raise ValueError(f"no such frame: {len(missing)} of {len(set(wanted))} could not be decoded")
    return [frames[time] for time in wanted], seconds[on_screen].tolist()


def encode_jpeg(frame: av.VideoFrame, recipe: Recipe) -> bytes:
    """A decoded video frame, scaled to the recipe's short side and turned as a player shows it, as a JPEG file."""
    scale = min(1.0, recipe.short_side / min(frame.width, frame.height))
    width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    # (H, W, 3). More threads would be made anew for every frame.
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC", threads=1)
    if matrix := frame.side_data.get("DISPLAYMATRIX"):  # as of phones, which store what is upright lying on its side
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # x' = ax + cy, y' = bx + dy
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), recipe.quality, colorsubsampling="420")


def read_image(file: BinaryIO, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Read an image file -> one upright RGB JPEG file, timestamp 0. A JPEG that is small enough is stored untouched.

    Raises:
        OSError: the file is damaged, cut, or no image.
        ValueError: more than MAX_PIXELS would have to be decoded.
    """
    data = file.read()
    with Image.open(io.BytesIO(data)) as image:
        small = min(image.size) <= recipe.short_side
        progressive = "progressive" in image.info  # its coefficients are in memory as a whole, however small it is decoded
        if not progressive and image.width * image.height > MAX_PIXELS // 8:
            image.draft(None, (2 * recipe.short_side,) * 2)  # a JPEG can be decoded at a half, a quarter, an eighth
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"huge: {image.width}x{image.height} pixels")
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel, of unknown range")
        image.load()
        upright = image.getexif().get(0x0112, 1) == 1
        if image.format == "JPEG" and image.mode in ("RGB", "L") and upright and small:
            try:
                simplejpeg.decode_jpeg(data, "RGB")  # stricter than Pillow: what it refuses is encoded anew
                return [data], [0.0]
            except ValueError:
                pass
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        scale = recipe.short_side / min(image.size)
        if scale < 1:
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        return [simplejpeg.encode_jpeg(np.asarray(image), recipe.quality, colorsubsampling="420")], [0.0]


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

    place: Place
    inputs: Iterable[tuple | None]
    classes: list[str] | None = None
    tars: bool = False
    truth: dict[str, str] = field(default_factory=dict)


@contextmanager
def as_published(address: str) -> Iterator[None]:
    """What goes wrong in reading a list that is not as it should be, as a ValueError that names it."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, FileNotFoundError, csv.Error) as error:
        raise ValueError(f"{address} is not as it is published ({type(error).__name__}: {error})") from error


def read_list(place: Place, parse: Callable, *names: str, columns: tuple[str, ...] = (), delimiter: str = ",") -> Iterator:
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
        raise ValueError(f"{place.at(name)} has no column {missing[0]}; its first line must name {', '.join(columns)}")
    for row in rows:
        with as_published(f"{place.at(name)}, {row},"):
            value = parse(row)
        yield value


def read_document(place: Place, parse: Callable, *names: str) -> list | dict:
    """parse(value) of the first of these JSON files that is there. Raises as read_list does."""
    name = next(filter(place.has, names), None)
    if name is None:
        raise ValueError(f"SOURCE {place.root} lacks {' or '.join(names)}")
    with as_published(place.at(name)):
        return parse(json.loads(place.read(name)))


def find_files(place: Place, kind: str, *folders: str) -> Iterator[str]:
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
        place = Place(source)
        names = find_files(place, kind, "")
        return Listing(place, ((name, name.split("/")[0] if "/" in name else None) for name in names))
    root, name = os.path.split(source)
    place = Place(root or ".")
    if name.endswith(".csv"):
        rows = read_list(place, lambda row: (row["path"], row.get("label") or None), name, columns=("path",))
        return Listing(place, (one if place.has(one[0]) else None for one in rows))
    from braceexpand import braceexpand

    tars = list(braceexpand(name))
    lost = [tar for tar in tars if not place.has(tar)]
    if lost:
        raise ValueError(f"SOURCE {source}: {len(lost)} of the {len(tars)} tars are not there, first {lost[0]}")
    return Listing(place, ((tar, None) for tar in tars), tars=True)


def folder_of(name: str) -> str:
    return os.path.basename(os.path.dirname(name))


def list_kinetics(source: str, split: str) -> Listing:
    """K400, K600 or K700 as CVDF gives it: SPLIT/ with the files flat or in class folders, annotations/SPLIT.csv."""
    place = Place(source)
    names = find_files(place, "videos", split, f"videos/{split}")
    tables = {part: (f"annotations/{part}.csv", f"{part}.csv") for part in (split, "train")}
    if not any(place.has(table) for table in tables[split]):
        if (first := next(names, None)) and folder_of(first) == split:
            raise ValueError(
                f"SOURCE {source}: {first} is in no class folder; that needs {tables[split][0]} for the classes"
            )
        return Listing(place, ((name, folder_of(name)) for name in chain([first] if first else [], names)))
    files = {Path(name).stem: name for name in names}
    mended = find_files(place, "videos", "replacement") if place.has("replacement") else ()  # K400's, for corrupted ones
    files |= {Path(name).stem[:11]: name for name in mended}
    used = set()

    def find(row: dict[str, str]) -> tuple | None:
        stem = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        name = files.get(row["youtube_id"]) or files.get(stem)
        used.update((name, files.get(stem)))
        return (name, row.get("label") or None) if name else None

    known = any(map(place.has, tables["train"]))
    labels = read_list(place, lambda row: row["label"], *tables["train"], columns=("label",)) if known else ()
    classes = sorted(set(labels))
    rows = read_list(place, find, *tables[split], columns=("youtube_id", "time_start", "time_end"))
    unlisted = ((name, folder_of(name)) for name in files.values() if name not in used and folder_of(name) in classes)
    return Listing(place, chain(rows, unlisted), classes or None)  # K600's csv lacks many that its class folders hold


def list_mit(source: str, split: str) -> Listing:
    """Moments in Time: training/CLASS/*.mp4, validation/CLASS/*.mp4, moments_categories.txt, trainingSet.csv ..."""
    place, part = Place(source), {"train": "training", "val": "validation"}.get(split, split)
    classes = sorted(read_list(place, lambda row: (int(row[1]), row[0]), "moments_categories.txt"))
    files = set(find_files(place, "videos", part))
    rows = read_list(place, lambda row: (f"{part}/{row[0]}", row[1]), f"{part}Set.csv")  # then the votes for and against
    return Listing(place, (one if one[0] in files else None for one in rows), [name for _, name in classes])


def list_ssv2(source: str, split: str) -> Listing:
    """Something-Something v2: 20bn-something-something-v2/ID.webm, and its json lists under their old or new names."""
    place, part = Place(source), {"val": "validation"}.get(split, split)

    def read(name: str, parse: Callable) -> list | dict:
        return read_document(place, parse, f"something-something-v2-{name}.json", f"labels/{name}.json", f"{name}.json")

    folder = "20bn-something-something-v2"
    files = {name.removeprefix(folder + "/"): name for name in find_files(place, "videos", folder)}
    plain = str.maketrans("", "", "[]")  # a template is a class name with its placeholders in brackets

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
    place, tar = Place(source), f"ILSVRC2012_img_{split}.tar"
    if place.has(tar) and split == "train":
        inner = ((tar, name.removesuffix(".tar"), begin, size) for name, begin, size in tar_members(place, tar))
        return Listing(place, inner, tars=True)
    if place.has(tar):
        return Listing(place, [(tar, None)], tars=True, truth=read_truth(place))
    names = find_files(place, "images", split, f"ILSVRC/Data/CLS-LOC/{split}")  # Kaggle's
    first = next(names, "")
    names = chain([first] if first else [], names)
    if folder_of(first) != split:
        return Listing(place, ((name, folder_of(name)) for name in names))
    truth = read_truth(place)
    return Listing(place, ((name, truth.get(Path(name).stem)) for name in names), sorted(set(truth.values())))


def tar_members(place: Place, tar: str) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of every file in a tar, without reading what is in them."""
    begin = 0
    while True:
        header = place.read(tar, begin, tarfile.BLOCKSIZE)
        if len(header) == tarfile.BLOCKSIZE and not header.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"{place.at(tar)} is no tar, is cut or damaged at byte {begin}: {error}") from error
        begin += tarfile.BLOCKSIZE
        if member.isfile():
            yield member.name, begin, member.size
        begin += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def read_truth(place: Place) -> dict[str, str]:
    """{ILSVRC2012_val_00000001: wnid} from whichever list of ImageNet's validation set is there.

    Raises:
        ValueError: none is.
    """
    kaggle, plain = "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt"
    devkit = "ILSVRC2012_devkit_t12/data/"
    if place.has(kaggle):
        columns = ("ImageId", "PredictionString")
        return dict(read_list(place, lambda row: (row[columns[0]], row[columns[1]].split()[0]), kaggle, columns=columns))
    if place.has(plain):
        wnids = read_list(place, lambda row: row[0], plain)
    else:
        numbers = f"{devkit}ILSVRC2012_validation_ground_truth.txt"
        wnid_of = read_synsets(place, f"{devkit}meta.mat") if place.has(numbers) else {}
        wnids = read_list(place, lambda row: wnid_of[int(row[0])], numbers, kaggle, plain)
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}


def read_synsets(place: Place, name: str) -> dict[int, str]:
    """{ILSVRC2012_ID: wnid}."""
    from scipy.io import loadmat

    with as_published(place.at(name)), place.open(name) as file:
        synsets = loadmat(file, squeeze_me=True)["synsets"]
        return dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))


def list_places365(source: str, split: str) -> Listing:
    """Places365-Standard: data_256/ or data_large/, val_256/ or val_large/, places365_*.txt, categories_places365.txt."""
    place, stem = Place(source), {"train": "data"}.get(split, split)
    folders = [f"{stem}_{size}{kind}" for size in ("256", "large") for kind in ("", "_standard")]
    folder = next(filter(place.has, folders), folders[0])
    files = set(find_files(place, "images", folder))

    def read(name: str, parse: Callable) -> Iterator:
        return read_list(place, parse, name, f"filelist_places365-standard/{name}", delimiter=" ")

    numbered = dict(read("categories_places365.txt", lambda row: (int(row[1]), row[0][3:])))  # /a/airfield 0

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


def write_manifest(listing: Listing, file: BinaryIO, per_class: int | None, size: int) -> tuple[dict, list[int]]:
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
            raise ValueError(f"{name} is of class {named!r}, which the data set's list of classes lacks")
        if taken and (named is None) != (None in taken):
            one = "no" if named is None else "a"
            raise ValueError(f"{listing.place.at(name)} has {one} class, unlike what was listed before it; move it out")
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
    return {"listed": listed, "absent": absent, "classes": classes, "listing": digest.hexdigest()}, starts


def read_inputs(listing: Listing, kind: str, entries: list) -> Iterator[tuple]:
    """(name, class or label or None, a function that opens it) of every input; where they are tars, of every sample."""
    if not listing.tars:
        yield from ((name, named, functools.partial(listing.place.open, name)) for name, named in entries)
        return
    from webdataset.tariterators import group_by_keys, tar_file_expander

    wanted = re.compile(rf"(.*\.)?({'|'.join(ending[1:] for ending in EXTENSIONS[kind])})", re.IGNORECASE)
    for name, named, *span in entries:
        try:
            with listing.place.stream(name, *span) as stream, bucket_errors(listing.place.at(name)):
                tar = WholeTar(stream, *span[1:])
                for sample in group_by_keys(tar_file_expander([{"url": name, "stream": tar}]), lcase=False):
                    key, last = sample["__key__"], next(filter(wanted.fullmatch, sample), None)
                    if last:
                        label = named or listing.truth.get(os.path.basename(key)) or int(sample.get("cls", -1))
                        yield f"{name}/{key}.{last}", label, functools.partial(io.BytesIO, sample[last])
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
