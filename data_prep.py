"""Raw videos and images -> sharded streaming data sets (MDS), and the reader of their format.

    python data_prep.py k400    kinetics/k400    data/k400/train  # also k600 k700 mit ssv2 in1k places365
    python data_prep.py in1k    imagenet         data/in1k/val   --split val   # folders, or the official tars as they are
    python data_prep.py videos  folder_or.csv    s3://bucket/mine --part 3/16  # the third of sixteen machines; then: merge
    python data_prep.py verify  data/k400/train                                # reads every frame
    python data_prep.py show    data/k400/train  --to sheet.png
    python data_prep.py demo    data/demo                                      # makes and converts the demonstration, 30 s

Every sample of every data set is a clip: a pack of JPEG frames with their timestamps. An image is a clip of one frame, so
one schema serves both and they mix in a batch. A pack costs little more room than the video and gives a pair of frames
an order of magnitude faster than decoding it.

The work is cut into parts. Each is written aside and renamed when complete, so that what stands in OUT is whole at any
moment, and the same command, given again after an interruption, goes on with the parts that are missing.
"""

import argparse
import base64
import csv
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice, pairwise
from multiprocessing import connection, get_context
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import av
import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

COLUMNS = {
    "frames": "bytes",  # JPEG files, back to back
    "ends": "ndarray:uint32",  # (T,) end offset of every frame in `frames`
    "timestamps": "ndarray:float64",  # (T,) seconds, the frames' own; 0 for an image
    "label": "int",  # index into classes.json, -1 unknown
    "name": "str",  # path inside the source
}
EXTENSIONS = {
    "videos": (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".ts", ".wmv", ".3gp"),
    "images": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
}
PART_SIZE = 256  # inputs: what an interruption costs at most, per worker
SHARD_BYTES = 1 << 26
MAX_PIXELS = 1 << 27  # of an image while it is decoded: 400 MB
NOT_THE_FILE = {  # what a disk, a bucket or the system may answer for no fault of the input
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
}
TIME_LIMIT = 600  # seconds for one input; a decoder that hangs is stopped
FASHION_MNIST = Path(__file__).parent / "assets" / "fashion_mnist.npz"


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


def encode_clip(frames: list[bytes], timestamps: list[float], label: int, name: str) -> dict:
    """Pack JPEG files into one sample of the schema COLUMNS."""
    ends = np.cumsum([len(frame) for frame in frames], dtype=np.uint32)
    return {
        "frames": b"".join(frames),
        "ends": ends,
        "timestamps": np.asarray(timestamps, np.float64),
        "label": label,
        "name": name,
    }


def decode_frame(sample: dict, index: int) -> np.ndarray:
    """Decode one frame of a sample and nothing else of it -> (H, W, 3) uint8, RGB."""
    begin = int(sample["ends"][index - 1]) if index else 0
    return simplejpeg.decode_jpeg(memoryview(sample["frames"])[begin : int(sample["ends"][index])], "RGB")


@functools.cache
def s3_client(process: int):
    """boto3's client; one for each process, since a forked one must not share its parent's connections."""
    import boto3

    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))


@contextmanager
def bucket_errors(address: str) -> Iterator[None]:
    """What boto3 raises, as an OSError that names the address."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error) as error:
        missing = isinstance(error, ClientError) and error.response["Error"]["Code"] in ("404", "NoSuchKey")
        raise OSError(errno.ENOENT if missing else errno.EIO, str(error), address) from error


@dataclass(frozen=True)
class Place:
    """A folder, or what lies under an s3:// address (at S3_ENDPOINT_URL, if that is set). Names in it have slashes.

    Its methods raise FileNotFoundError where there is no such file, and OSError for whatever else is in the way.
    """

    root: str

    def __post_init__(self):
        if "://" in self.root and not self.root.startswith("s3://"):
            raise ValueError(f"{self.root} is neither a folder nor an s3:// address")

    @property
    def remote(self) -> bool:
        return self.root.startswith("s3://")

    def at(self, name: str) -> str:
        return os.path.join(self.root, name)

    def key(self, name: str) -> dict[str, str]:
        bucket, _, key = self.at(name).removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": key}

    def names(self, under: str = "") -> Iterator[str]:
        """Every file in the folder `under` and its folders, in order; hidden ones are left out."""
        if not self.remote:
            try:
                entries = [entry for entry in os.scandir(self.at(under)) if not entry.name.startswith(".")]
            except FileNotFoundError:  # renamed since its own folder was read: by a worker that a killed run left behind
                if not under:
                    raise
                return
            for entry in sorted(entries, key=lambda entry: entry.name + "/" * entry.is_dir()):  # the order of a bucket
                name = os.path.join(under, entry.name)
                yield from self.names(name) if entry.is_dir() else [name]
            return
        base, prefix = self.key("")["Key"], self.key(os.path.join(under, ""))
        with bucket_errors(self.at(under)):
            pages = s3_client(os.getpid()).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=prefix["Bucket"], Prefix=prefix["Key"]):
                for found in page.get("Contents", ()):
                    name = found["Key"][len(base) :].lstrip("/")
                    if not any(part.startswith(".") for part in name.split("/")) and not name.endswith("/"):
                        yield name

    def has(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        if not self.remote:
            return os.path.exists(self.at(name))
        with bucket_errors(self.at(name)):
            where, client = self.key(name), s3_client(os.getpid())
            prefixes = (where["Key"], where["Key"].rstrip("/") + "/")
            found = [client.list_objects_v2(Bucket=where["Bucket"], Prefix=one, MaxKeys=1) for one in prefixes]
        return bool(found[1]["KeyCount"]) or any(one["Key"] == where["Key"] for one in found[0].get("Contents", ()))

    def stream(self, name: str, begin: int = 0, size: int | None = None) -> BinaryIO:
        """The file from byte `begin` on, to be read in order."""
        if not self.remote:
            file = self.open(name)
            file.seek(begin)
            return file
        last = "" if size is None else begin + size - 1
        ranged = {} if size is None and not begin else {"Range": f"bytes={begin}-{last}"}
        with bucket_errors(self.at(name)):
            return s3_client(os.getpid()).get_object(**self.key(name), **ranged)["Body"]

    def read(self, name: str, begin: int = 0, size: int | None = None) -> bytes:
        with self.stream(name, begin, size) as file, bucket_errors(self.at(name)):
            return file.read(size)

    def open(self, name: str) -> BinaryIO:
        """The file, to be read in any order."""
        return io.BytesIO(self.read(name)) if self.remote else open(self.at(name), "rb")

    def write(self, name: str, data: bytes) -> None:
        """Put a file there so that it is either as it was or complete; what a bucket received is checked."""
        if not self.remote:
            aside = Path(f"{self.at(name)}.{os.getpid()}.tmp")
            aside.write_bytes(data)
            aside.replace(self.at(name))
            return
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        with bucket_errors(self.at(name)):
            client = s3_client(os.getpid())
            client.put_object(**self.key(name), Body=data, ChecksumAlgorithm="SHA256")
            there = client.head_object(**self.key(name), ChecksumMode="ENABLED")
        if there["ContentLength"] != len(data) or there.get("ChecksumSHA256", digest) != digest:
            raise OSError(errno.EIO, f"what arrived is not the {len(data)} bytes that were sent", self.at(name))

    def upload(self, path: Path, name: str) -> None:
        """Copy a file into the bucket, in pieces and checked: it is there as a whole or not at all."""
        where = self.key(name)
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).upload_file(str(path), *where.values(), ExtraArgs={"ChecksumAlgorithm": "SHA256"})

    def download(self, name: str, path: Path) -> None:
        """Copy a file out of the bucket."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).download_file(*self.key(name).values(), str(path))

    def delete(self, name: str) -> None:
        """Delete a file of the bucket."""
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).delete_object(**self.key(name))

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False).encode())


def read_json(path: str, name: str) -> list | dict:
    """index.json, classes.json, report.json of a data set.

    Raises:
        ValueError: `path` is no data set of this format, or is not complete.
    """
    try:
        return json.loads(Place(path).read(name))
    except FileNotFoundError:
        raise ValueError(f"{path} is not a complete data set ({name} is missing); make it with data_prep.py") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}/{name} is damaged ({error}); give the data_prep.py command that made it again") from None


def read_classes(path: str) -> list[str]:
    """Label names of a data set, in order; empty where it has no labels. Raises as read_json does."""
    read_json(path, "index.json")
    return read_json(path, "classes.json")


class Clips:
    """The samples of a data set by number, from a folder or straight out of a bucket. Raises as read_json does."""

    def __init__(self, path: str):
        from streaming.base.format import reader_from_json  # 4 s to import: only where shards are read

        self.place, shards = Place(path), read_json(path, "index.json")["shards"]
        self.names = [shard["raw_data"]["basename"] for shard in shards]
        self.ends = np.cumsum([shard["samples"] for shard in shards])
        self.decode = reader_from_json("", None, shards[0]).decode_sample

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> dict:
        shard = int(np.searchsorted(self.ends, number, "right"))
        row = number - (int(self.ends[shard - 1]) if shard else 0)
        begin, end = np.frombuffer(self.place.read(self.names[shard], 4 + 4 * row, 8), np.uint32).tolist()
        return self.decode(self.place.read(self.names[shard], begin, end - begin))


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


def write_part(
    listing: Listing, classes: list[str], recipe: Recipe, entries: list, out: str, spoilt: dict, step: Callable
) -> dict:
    """Convert some inputs into the folder `out`, MDS shards, and return what became of them.

    Args:
        spoilt: {number of an input: why it is left out}.
        step: called with the number of each input before it is read.
    """
    from streaming import MDSWriter

    read = read_video if recipe.kind == "videos" else read_image
    label_of = {name: label for label, name in enumerate(classes)} | {None: -1}
    number, skipped, short, highest = -1, [], 0, -1
    with MDSWriter(out=out, columns=COLUMNS, size_limit=SHARD_BYTES, hashes=["xxh64"]) as writer:
        for number, (name, named, load) in enumerate(read_inputs(listing, recipe.kind, entries)):
            step(number)
            try:
                if number in spoilt:
                    raise ValueError(spoilt[number])
                label = label_of.get(named, named)
                if classes and label >= len(classes):
                    raise ValueError(f"label {label} of {len(classes)} classes")
                with load() as file:
                    frames, times = read(file, recipe)
            except Exception as error:  # damaged files make the libraries raise nearly anything
                if isinstance(error, OSError) and error.errno in NOT_THE_FILE and not isinstance(error, av.FFmpegError):
                    raise
                # Not the whole text: a path or an address in memory in it would differ between machines.
                why = re.sub(r" ?<.* at 0x\w+>", "", str(getattr(error, "strerror", None) or error))
                skipped.append([name, " ".join(f"{type(error).__name__}: {why}".split())])
                continue
            highest = max(highest, label)
            short += len(set(times)) < len(times)
            writer.write(encode_clip(frames, times, label, name))
    index = Path(out, "index.json")
    shards = json.loads(index.read_text())["shards"]
    index.unlink()
    return {"inputs": number + 1, "skipped": skipped, "short": short, "highest": highest, "shards": shards}


def run_parts(work: Callable[[str, dict, Callable], None], parts: list[str], workers: int, bar: tqdm) -> None:
    """Call work(part, spoilt, step) for each part in a process of its own, `workers` at a time.

    A process that dies, because an input crashes the decoder or takes longer than TIME_LIMIT, is started anew with that
    input's number in `spoilt`. What it raises is raised here, and ends the others.
    """
    context, waiting, spoilt, running = get_context("fork"), parts[::-1], defaultdict(dict), {}
    late = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                receiver, sender = context.Pipe(duplex=False)
                part = waiting.pop()
                process = context.Process(target=run_part, args=(work, part, spoilt[part], sender))
                process.start()
                sender.close()
                running[receiver] = process, part, None, monotonic()
            for receiver in connection.wait(list(running), timeout=1):
                process, part, number, _ = running[receiver]
                try:
                    message = receiver.recv()
                except EOFError:
                    process.join()
                    del running[receiver]
                    if process.exitcode:
                        died = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit {process.exitcode}"
                        if number is None or number in spoilt[part] or died == "SIGTERM":
                            raise OSError(f"a worker was ended ({died}) at {part}") from None
                        slow = died == "SIGKILL" and process in late
                        why = f"took longer than {TIME_LIMIT} s to decode" if slow else f"crashed the decoder ({died})"
                        spoilt[part][number] = why
                        waiting.append(part)
                        bar.update(-number - 1)
                else:
                    if isinstance(message, OSError):
                        raise OSError(f"{message}; what is finished is kept, and the same command goes on")
                    if isinstance(message, Exception):
                        raise message
                    running[receiver] = process, part, message, monotonic()
                    bar.update(message is not None)
            late = [one[0] for one in running.values() if one[2] is not None and monotonic() - one[3] > TIME_LIMIT]
            for process in late:
                process.kill()
    finally:
        for process, *_ in running.values():
            process.kill()
            process.join()


def run_part(work: Callable, part: str, spoilt: dict, sender: connection.Connection) -> None:
    """What the process of a part does."""
    Image.MAX_IMAGE_PIXELS = None  # read_image has a bound of its own
    try:
        work(part, spoilt, sender.send)  # to send fails, and ends this process, if the parent is gone
    except OSError as error:
        sender.send(error if error.filename else OSError(f"{error} (while writing {part})"))
    except Exception:
        sender.send(RuntimeError(traceback.format_exc()))


def convert(
    source: str,
    out: str,
    recipe: Recipe,
    workers: int = 0,
    max_skipped: float = 0.01,
    list_inputs: Callable[[str, str], Listing] | None = None,
    split: str = "train",
    share: tuple[int, int] = (1, 1),
    keep_local: bool = True,
) -> dict | None:
    """Convert a source of videos or images into a data set at `out`, and return its report.

    Args:
        source: folder, csv list or tars, or the root of a data set in its published layout; a path or an s3:// address.
        out: new folder, or one that an earlier run of the same command left unfinished; or an s3:// address, to which each
            part is uploaded from a folder of that name, without the bucket, under the current one.
        workers: processes; 0 for one per core.
        max_skipped: fraction in [0, 1] of inputs that may be unreadable.
        list_inputs: finds `split` in a published layout, see LAYOUTS; list_any if not given.
        share: (k, n) does the k-th of n shares of the parts, for as many machines; `merge` then joins them.
        keep_local: whether what was uploaded stays in the local folder too.

    Returns:
        The report; nothing for a share.

    Raises:
        ValueError: `source` holds nothing of the kind; `out` holds something else; too many inputs were unreadable, or all.
        OSError: a disk or bucket is full, away or forbidden. What is finished is kept, and the same call goes on.
    """
    if workers < 0:
        raise ValueError(f"--workers {workers} must not be negative")
    target = Place(out)
    folder = Path(target.key("")["Key"] if target.remote else out)
    listing = list_inputs(source, split) if list_inputs else list_any(source, recipe.kind)
    if listing.tars and recipe.per_class:
        raise ValueError("--per-class counts files, and SOURCE holds tars")
    size = 1 if listing.tars else PART_SIZE
    with tempfile.NamedTemporaryFile() as manifest:
        found, starts = write_manifest(listing, manifest, recipe.per_class, size)
        if not found["listed"]:
            none = f"none of the {found['absent']}" if found["absent"] else "no"
            raise ValueError(
                f"SOURCE {source} holds {none} {recipe.kind} ({' '.join(EXTENSIONS[recipe.kind])}); for tars, name them"
            )
        begin(target, folder, {"source": source, "recipe": asdict(recipe), "parts": len(starts), **found})

        def work(part: str, spoilt: dict, step: Callable) -> None:
            with open(manifest.name, "rb") as file:
                file.seek(starts[int(part.removeprefix("part-"))])
                entries = [json.loads(line) for line in islice(file, size)]
            aside = folder / f"{part}.{os.getpid()}.tmp"
            result = write_part(listing, found["classes"], recipe, entries, str(aside), spoilt, step)
            step(None)  # what follows may take as long as it does
            Place(str(aside)).write_json("part.json", result)
            if target.remote:
                for name in sorted(os.listdir(aside), key=lambda name: name == "part.json"):  # that last: the part is whole
                    target.write(f"{part}/{name}", (aside / name).read_bytes())
            if (keep_local or not target.remote) and not (folder / part / "part.json").exists():
                shutil.rmtree(folder / part, ignore_errors=True)
                with suppress(OSError):  # a worker that a killed run left behind may have been faster, with the same bytes
                    aside.rename(folder / part)
                (folder / part / "part.json").stat()
            shutil.rmtree(aside, ignore_errors=True)

        done = {name.split("/")[0] for name in target.names() if name.endswith("/part.json")}
        if target.remote and keep_local:
            done = {part for part in done if (folder / part / "part.json").exists()}
        mine = [f"part-{number:06d}" for number in range(share[0] - 1, len(starts), share[1])]
        waiting = [part for part in mine if part not in done]
        for stale in (path for part in waiting for path in folder.glob(f"{part}.*.tmp")):
            shutil.rmtree(stale, ignore_errors=True)
        if waiting:
            import streaming  # noqa: F401  # 4 s; once here, so that the forked workers need not

            total = None if listing.tars else min(len(waiting) * size, found["listed"])
            with tqdm(total=total, desc=out, unit=recipe.kind[:-1], disable=None) as bar:
                run_parts(work, waiting, workers or os.cpu_count(), bar)
    if not any(folder.iterdir()):
        folder.rmdir()  # all is in the bucket
    return merge(out, max_skipped) if share == (1, 1) else None


def begin(target: Place, folder: Path, request: dict) -> None:
    """Mark `target` as this data set's.

    Raises:
        ValueError: it is another's, or no data set.
    """
    if target.has("request.json"):
        before = read_json(target.root, "request.json")
        changed = [key for key in ("recipe", "listing") if before.get(key) != request[key]]
        if changed:
            what = " and ".join(changed)
            raise ValueError(f"OUT {target.root} was begun with another {what}; delete it or choose another OUT")
    elif os.path.isfile(target.root) or (target.has("") and any(target.names())):
        raise ValueError(f"OUT {target.root} exists and is not a data set of data_prep.py; choose another OUT")
    folder.mkdir(parents=True, exist_ok=True)
    if not target.has("request.json"):
        target.write_json("request.json", request)


def merge(out: str, max_skipped: float = 0.01) -> dict:
    """Make one data set of the parts in `out`, once all are there, and return its report. See convert.

    Raises:
        ValueError: parts are missing; too many inputs were unreadable, or all.
    """
    target = Place(out)
    request = read_json(out, "request.json")
    names = [f"part-{number:06d}" for number in range(request["parts"])]
    there = {name.split("/")[0] for name in target.names() if name.endswith("/part.json")}
    missing = [name for name in names if name not in there]
    if missing:
        count = f"{len(missing)} of its {len(names)} parts"
        raise ValueError(f"OUT {out} lacks {count}, first {missing[0]}; give the command that makes them again")
    folder = target.key("")["Key"] if target.remote else out
    for stale in Path(folder).glob("part-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)  # of runs that were killed
    with ThreadPoolExecutor(16) as pool:  # a bucket answers slowly, but many at a time
        parts = list(pool.map(lambda name: json.loads(target.read(f"{name}/part.json")), names))
    skipped = [entry for part in parts for entry in part["skipped"]]
    inputs = sum(part["inputs"] for part in parts)
    report = request | {
        "inputs": inputs,
        "samples": inputs - len(skipped),
        "short": sum(part["short"] for part in parts),  # videos of fewer frames than asked: frames repeat
        "skipped": skipped,
    }
    target.write_json("report.json", report)
    if len(skipped) > max_skipped * inputs or not report["samples"]:
        first = "; ".join(f"{name} ({reason})" for name, reason in skipped[:3])
        raise ValueError(
            f"{len(skipped)} of {inputs} inputs were unreadable, more than --max-skipped {max_skipped:g} allows: {first}"
            f"; all are in {target.at('report.json')}"
        )
    shards = []
    for name, part in zip(names, parts, strict=True):
        for shard in part["shards"]:
            shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    classes = request["classes"] or [str(label) for label in range(1 + max(part["highest"] for part in parts))]
    for place in {target, Place(folder)} if os.path.isdir(folder) else {target}:
        place.write_json("report.json", report)
        place.write_json("classes.json", classes)
        place.write_json("index.json", {"version": 2, "shards": shards})
    return report


def check_sample(sample: dict, labels: int, short_side: int) -> None:
    """Raises ValueError if a sample is not as write_part writes it."""
    frames, ends, times = sample["frames"], sample["ends"], sample["timestamps"]
    if not 0 < len(ends) == len(times) or ends[-1] != len(frames):
        raise ValueError(f"{len(ends)} frames, {len(times)} timestamps, {len(frames)} bytes")
    if not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise ValueError("timestamps do not ascend")
    if not -1 <= sample["label"] < labels:
        raise ValueError(f"label {sample['label']} of {labels} classes")
    for index in range(len(ends)):
        if min(size := decode_frame(sample, index).shape[:2]) > short_side:
            raise ValueError(f"frame {index} is {size[1]}x{size[0]}, its short side above {short_side}")


def check_shard(place: Place, shard: dict, labels: int, short_side: int) -> list[str]:
    """All that is wrong with a shard: its bytes, its samples."""
    from streaming.base.format import reader_from_json
    from streaming.base.hashing import get_hash

    info, faults = shard["raw_data"], []
    name = info["basename"]
    try:
        data = place.read(name)
    except OSError as error:
        return [f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read: {error}"]
    if len(data) != info["bytes"]:
        return [f"{name} is cut or too long: {len(data)} bytes, not {info['bytes']}"]
    if any(get_hash(algorithm, data) != expected for algorithm, expected in info["hashes"].items()):
        faults.append(f"{name} is damaged: its hash is not that of index.json")
    bounds = np.frombuffer(data, np.uint32, shard["samples"] + 1, offset=4).tolist()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        try:
            sample = reader_from_json("", None, shard).decode_sample(data[begin:end])
            check_sample(sample, labels, short_side)
        except Exception as error:  # damage makes the libraries raise nearly anything
            faults.append(f"{name}, sample {row}: {' '.join(str(error).split())}")
    return faults


def verify(path: str, workers: int = 0) -> list[str]:
    """Read every sample of a data set and return all that is wrong with it: hashes, frames, sizes, counts, labels.

    Raises:
        ValueError: `path` is no complete data set.
    """
    shards, report = read_json(path, "index.json")["shards"], read_json(path, "report.json")
    labels, side = len(read_classes(path)), report["recipe"]["short_side"]
    faults = []
    counts = Counter({f"part-{number:06d}": 0 for number in range(report["parts"])})
    for shard in shards:
        counts[shard["raw_data"]["basename"].split("/")[0]] += shard["samples"]
    if (count := sum(counts.values())) != report["samples"]:
        faults += [f"{part} is not in index.json" for part, found in counts.items() if not found]
        faults.append(f"index.json has {count} samples, report.json {report['samples']}")
    check = functools.partial(check_shard, Place(path), labels=labels, short_side=side)
    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("fork")) as pool:
        for found in tqdm(pool.map(check, shards), total=len(shards), desc=path, unit="shard", disable=None):
            faults += found
    return faults


CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
SIDE, FRAMES, RATE = 40, 32, 16  # pixels, frames, frames a second


def draw_garment(garment: np.ndarray, rng: np.random.Generator, frames: int) -> np.ndarray:
    """A tinted garment (28, 28) that drifts and turns over faint static clutter -> (frames, SIDE, SIDE, 3) uint8."""
    clutter = rng.uniform(0, 60, (5, 5, 3)).astype(np.uint8)
    clutter = np.asarray(Image.fromarray(clutter).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    tint = rng.uniform(0.55, 1.0, 3)
    centre, drift = rng.uniform(-4, 4, 2), rng.uniform(-9, 9, 2)  # pixels; pixels over the whole clip
    angle, turn = rng.uniform(-12, 12), rng.uniform(-20, 20)  # degrees; degrees over the whole clip
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(Image.fromarray(garment), ((SIDE - 28) // 2, (SIDE - 28) // 2))
    clip = np.empty((frames, SIDE, SIDE, 3), np.uint8)
    for frame, time in enumerate(np.linspace(-0.5, 0.5, frames) if frames > 1 else (0.0,)):
        shift = tuple(np.clip(centre + drift * time, -6, 6))
        moved = picture.rotate(angle + turn * time, Image.Resampling.BILINEAR, translate=shift)
        opaque = np.asarray(moved, np.float32)[..., None] / 255  # (SIDE, SIDE, 1)
        clip[frame] = clutter * (1 - opaque) + 255 * tint * opaque
    return clip


def draw_file(path: Path, garment: np.ndarray, seed: tuple[int, ...]) -> None:
    """Write one garment as an mp4 of FRAMES frames, or as a JPEG still."""
    rng = np.random.default_rng(seed)
    if path.suffix == ".jpg":
        Image.fromarray(draw_garment(garment, rng, 1)[0]).save(path, quality=95)
        return
    with av.open(str(path), "w") as container:
        steady = "mbtree=0:rc-lookahead=0"  # with them, x264 writes other bytes now and then
        options = {"crf": "18", "preset": "veryfast", "x264-params": steady}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in draw_garment(garment, rng, FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def draw_demo(raw: Path, garments: int, workers: int) -> None:
    """Write raw/{train,test}/{videos,images}/CLASS/*: one half of the garments of every class moves, the other is still."""
    aside = raw.with_name(raw.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    jobs = []
    with np.load(FASHION_MNIST, allow_pickle=False) as data, ProcessPoolExecutor(workers, get_context("fork")) as pool:
        for number, split in enumerate(("train", "test")):
            images, labels = data[f"{split}_images"], data[f"{split}_labels"]
            for label, name in enumerate(CLASSES):
                for index, garment in enumerate(images[labels == label][:garments]):
                    kind, ending = (("videos", "mp4"), ("images", "jpg"))[index % 2]
                    path = aside / split / kind / name / f"{index:04d}.{ending}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    jobs.append(pool.submit(draw_file, path, garment, (number, label, index)))
        for job in tqdm(as_completed(jobs), total=len(jobs), desc=str(raw), unit="file", disable=None):
            job.result()
    aside.rename(raw)


def demo(out: str, workers: int = 0, garments: int = 600) -> None:
    """Make the demonstration at `out`: raw files, then the data sets {train,test}_{videos,images}.

    train_{videos,images}_200 are 20 of every class, for learning from few labels.

    Args:
        garments: how many of every class, at most, in each split.

    Raises:
        ValueError: `out` holds something else.
    """
    raw = Path(out, "raw")
    targets = [(f"{split}_{kind}", raw / split / kind, Recipe(kind)) for split in ("train", "test") for kind in EXTENSIONS]
    targets += [(f"train_{kind}_200", raw / "train" / kind, Recipe(kind, per_class=20)) for kind in EXTENSIONS]
    if all(os.path.exists(os.path.join(out, name, "index.json")) for name, _, _ in targets):
        return
    if not raw.exists():
        if os.path.exists(out) and any(path.name != "raw.tmp" for path in Path(out).iterdir()):
            raise ValueError(f"OUT {out} exists and is not the demonstration; choose another OUT")
        draw_demo(raw, garments, workers or os.cpu_count())
    for name, source, recipe in targets:
        convert(str(source), os.path.join(out, name), recipe, workers)


def show(path: str, to: str, samples: int = 12, frames: int = 8) -> None:
    """Draw a contact sheet: a row per sample, spread over the data set, with its label and name, frames left to right.

    Raises:
        ValueError: `path` is no data set, or there is nothing to draw.
    """
    classes = read_classes(path)
    if samples < 1:
        raise ValueError(f"--samples {samples} must be positive")
    data = Clips(path)
    cell, rows = 128, []
    for number in np.unique(np.linspace(0, len(data) - 1, samples).astype(int)):
        sample = data[int(number)]
        count = len(sample["ends"])
        picked = np.unique(np.linspace(0, count - 1, min(frames, count)).astype(int))
        row = Image.new("RGB", (cell * frames, cell + 14), "white")
        for column, index in enumerate(picked):
            frame = ImageOps.contain(Image.fromarray(decode_frame(sample, int(index))), (cell - 2, cell - 2))
            row.paste(frame, (column * cell, 14))
        label = classes[sample["label"]] if sample["label"] >= 0 else "no label"
        seconds = f", {sample['timestamps'][0]:.2f}-{sample['timestamps'][-1]:.2f} s" if count > 1 else ""
        text = f"{label}: {sample['name']}, {count} frame{'s' if count > 1 else ''}{seconds}"
        ImageDraw.Draw(row).text((2, 1), text, fill="black")
        rows.append(row)
    sheet = Image.new("RGB", (cell * frames, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * row.height))
    sheet.save(to)


def share(text: str) -> tuple[int, int]:
    """3/16 -> (3, 16)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not K/N with K from 1 to N")
    return int(number), int(count)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, what: str, *options: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what)
        if "source" in options:
            command.add_argument("source", metavar="SOURCE", help="folder or s3:// address; x.csv; {0..9}.tar")
        command.add_argument("out", metavar="OUT", help="folder or s3:// address of the data set")
        if "workers" in options:
            command.add_argument("--workers", type=int, default=0, help="processes (one per core)")
        if "skipped" in options:
            command.add_argument("--max-skipped", type=float, default=0.01, help="fraction that may be unreadable (0.01)")
        return command

    for name in (*LAYOUTS, *EXTENSIONS):
        kind, list_inputs = LAYOUTS.get(name, (name, list_any))
        command = add(name, list_inputs.__doc__.split("\n")[0], "source", "workers", "skipped")
        if name in LAYOUTS:
            command.add_argument("--split", default="train", help="train, val or test (train)")
        if kind == "videos":
            frames = 8 if name == "mit" else 16  # its videos are of 3 s
            command.add_argument("--frames", type=int, default=frames, help=f"kept per video, evenly spaced ({frames})")
            command.add_argument("--fps", type=float, help="keep frames at this rate instead, in Hz")
        command.add_argument("--short-side", type=int, default=256, help="pixels, never enlarged (256)")
        command.add_argument("--quality", type=int, default=90, help="JPEG quality, 1-100 (90)")
        command.add_argument("--per-class", type=int, help="inputs of every class, the first in order (all)")
        command.add_argument("--part", type=share, default=(1, 1), help="K/N: do the K-th of N shares, then `merge` (1/1)")
        command.add_argument("--keep-local", choices=("yes", "no"), default="yes", help="keep what was uploaded (yes)")
    add("merge", "join the shares of several machines", "skipped")
    add("verify", "read every sample and name what is damaged", "workers")
    command = add("demo", "make the demonstration", "workers")
    command.add_argument("--garments", type=int, default=600, help="per class and split, at most (600)")
    command = add("show", "draw a contact sheet of a data set")
    command.add_argument("--to", default="sheet.png", help="picture to write (sheet.png)")
    command.add_argument("--samples", type=int, default=12, help="rows (12)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.command == "demo":
        demo(args.out, args.workers, args.garments)
        return
    if args.command == "show":
        show(args.out, args.to, args.samples)
        return
    if args.command == "verify":
        faults = verify(args.out, args.workers)
        for fault in faults:
            print(fault)
        if faults:
            raise ValueError(f"{args.out} has {len(faults)} faults; delete the parts named and give its command again")
        print(f"{args.out}: {len(Clips(args.out))} samples, no faults")
        return
    if args.command == "merge":
        report = merge(args.out, args.max_skipped)
    else:
        names = [name for name in Recipe.__dataclass_fields__ if hasattr(args, name)]
        kind, list_inputs = LAYOUTS.get(args.command, (args.command, list_any))
        recipe = Recipe(kind, **{name: getattr(args, name) for name in names})
        inputs = (list_inputs, args.split) if args.command in LAYOUTS else (None, "")
        how = (args.workers, args.max_skipped, *inputs, args.part, args.keep_local == "yes")
        report = convert(args.source, args.out, recipe, *how)
    if report is None:
        print(f"{args.out}: share {args.part[0]} of {args.part[1]} is done; when all are: data_prep.py merge {args.out}")
        return
    counts = ", ".join(f"{report[name]} {name}" for name in ("samples", "absent", "short"))
    print(f"{args.out}: {counts}, {len(report['skipped'])} skipped")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"data_prep.py: {error}")
