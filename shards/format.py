"""The format of the shards: its columns, packing and decoding of a sample, and a reader.

    clips = Clips("data/k400/train")
    pixels = decode_frame(clips[0], 3)                          # (H, W, 3) uint8, the fourth frame
    label = read_classes("data/k400/train")[clips[0]["label"]]

Every sample is a clip: JPEG frames of one size with their timestamps. An image is a clip of one
frame, and may have a depth map. The samples lie in MDS shards of mosaicml-streaming, described by
`index.json`. Beside it, `classes.json` has the label names in order, and `report.json` what
data_prep.py did.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import simplejpeg

from shards.depth import DepthMap, encode_depth
from shards.storage import Storage

COLUMNS = {
    "frames": "bytes",  # T JPEG files, back to back
    "ends": "ndarray:uint32",  # (T,) offset in `frames` at which each frame ends
    "timestamps": "ndarray:float64",  # (T,) seconds, as in the video file; 0 for an image
    "label": "int",  # index into classes.json; -1 if unknown
    "name": "str",  # path inside the source
}
DEPTH_COLUMNS = COLUMNS | {"depth": "bytes"}  # of images with depth maps, see depth.py


def encode_clip(
    frames: list[bytes],
    timestamps: list[float],
    label: int,
    name: str,
    depth: DepthMap | None = None,
) -> dict:
    """Pack JPEG files into one sample with the columns COLUMNS, or DEPTH_COLUMNS with a depth."""
    ends = np.cumsum([len(frame) for frame in frames], dtype=np.uint32)
    times = np.asarray(timestamps, np.float64)
    packed = {"frames": b"".join(frames), "ends": ends, "timestamps": times}
    if depth:
        size = simplejpeg.decode_jpeg_header(frames[0])[:2]
        packed["depth"] = encode_depth(depth, size)
    return packed | {"label": label, "name": name}


def decode_frame(sample: dict, index: int) -> np.ndarray:
    """Decode one frame of a sample -> (H, W, 3) uint8, RGB; a corrupt frame raises ValueError."""
    begin = int(sample["ends"][index - 1]) if index else 0
    end = int(sample["ends"][index])
    return simplejpeg.decode_jpeg(memoryview(sample["frames"])[begin:end], "RGB")


def check_size(sample: dict, smallest: int) -> None:
    """Raise ValueError if the frames of a sample have a side below `smallest` pixels."""
    first_frame = memoryview(sample["frames"])[: int(sample["ends"][0])]
    check_sides(*simplejpeg.decode_jpeg_header(first_frame)[:2], smallest)


def check_sides(height: int, width: int, smallest: int) -> None:
    """Raise ValueError if a side in pixels is below `smallest`."""
    if min(height, width) < smallest:
        patch = f"model.patch_size={smallest}"
        raise ValueError(f"frames of {width}x{height} are smaller than {patch}")


def spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` different indices, evenly spaced from 0 to count - 1."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int)).tolist()


def read_json(path: str, name: str) -> list | dict:
    """Return the content of a JSON file of a data set; raise ValueError if missing or corrupt."""
    storage = Storage(path)
    try:
        return json.loads(storage.read(name))
    except FileNotFoundError as error:
        if storage.has("request.json"):
            ended = "failed" if storage.has("report.json") else "was interrupted"
            remedy = "run the same command again to finish it"
            raise ValueError(f"{path}: the conversion {ended}; {remedy}") from error
        fault = f"{path} is not a complete data set: {name} is missing"
    except json.JSONDecodeError as error:
        fault = f"{path}/{name} is corrupt ({error})"
    raise ValueError(f"{fault}; make it with data_prep.py")


def read_classes(path: str) -> list[str]:
    """Return the label names of a complete data set, in order; none if it has no labels."""
    read_json(path, "index.json")
    return read_json(path, "classes.json")


def labelled_classes(path: str) -> list[str]:
    """Return the label names of a data set; raise ValueError if it has no labels."""
    classes = read_classes(path)
    if not classes:
        raise ValueError(f"{path} has no labels; convert it from one folder per class")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path}/classes.json names a class twice; make it with data_prep.py")
    return classes


def match_classes(path: str, classes: list[str], owner: str, offset: int = 0) -> list[int]:
    """Return for each label of a data set its number by name, offset + index into `classes`.

    A data set without labels, or with classes that `owner` lacks, raises ValueError.
    """
    numbers = {name: offset + number for number, name in enumerate(classes)}
    names = labelled_classes(path)
    if unknown := [name for name in names if name not in numbers]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        listed = ", ".join(map(repr, unknown[:3])) + more
        raise ValueError(f"{path}: has classes that {owner} lacks: {listed}")
    return [numbers[name] for name in names]


def common_classes(paths: list[str]) -> tuple[list[str], list[list[int]]]:
    """Return the label names of the first data set, and the labels of each by name.

    See match_classes. The other data sets may lack classes, or have them in another order.
    """
    if not paths:
        raise ValueError("the list of data sets is empty; name at least one")
    classes = labelled_classes(paths[0])
    return classes, [match_classes(path, classes, paths[0]) for path in paths]


def same_classes(paths: list[str], owner: str) -> list[str]:
    """Return the classes of data.streams; raise ValueError if they differ, or their order does."""
    classes, labels = common_classes(paths)
    if any(numbers != list(range(len(classes))) for numbers in labels):
        problem = "data.streams: the data sets differ in their classes"
        raise ValueError(f"{problem}; {owner} needs the same classes in the same order")
    return classes


def shard_hashes(path: str) -> list[str]:
    """Return a hash of the samples in each shard of a data set."""
    shards = [shard["raw_data"] for shard in read_json(path, "index.json")["shards"]]
    return [json.dumps([shard["bytes"], shard.get("hashes", {})]) for shard in shards]


def fingerprint(path: str) -> dict[str, str | list[str]]:
    """Return the classes of a data set, and a hash of its samples."""
    text = "".join(shard_hashes(path))
    return {"classes": read_classes(path), "samples": hashlib.sha256(text.encode()).hexdigest()}


def shared_shards(paths: list[str], others: list[str]) -> dict[str, int]:
    """Return {path: number of its shards that other data sets have too}, without zeros."""
    known = {shard for path in others for shard in shard_hashes(path)}
    counts = {path: sum(shard in known for shard in shard_hashes(path)) for path in paths}
    return {path: count for path, count in counts.items() if count}


class Clips:
    """The samples of a data set by number, read from a folder or directly from a bucket."""

    def __init__(self, path: str):
        from streaming.base.format import reader_from_json  # takes 4 s

        self.storage = Storage(path)
        shards = read_json(path, "index.json")["shards"]
        if not shards:
            raise ValueError(f"{path} has no samples")
        self.names = [shard["raw_data"]["basename"] for shard in shards]
        # For each shard, the number of the sample after its last.
        self.ends = np.cumsum([shard["samples"] for shard in shards])
        self.decode = reader_from_json("", None, shards[0]).decode_sample

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> dict:
        shard = int(np.searchsorted(self.ends, number, "right"))
        row = number - (int(self.ends[shard - 1]) if shard else 0)
        # An MDS file begins with the number of samples and their offsets, uint32 each.
        offsets = self.storage.read(self.names[shard], 4 + 4 * row, 8)
        begin, end = np.frombuffer(offsets, np.uint32).tolist()
        return self.decode(self.storage.read(self.names[shard], begin, end - begin))


class TooManyUnreadable(ValueError):
    """More samples cannot be used than a run allows; the message is one line."""

    def __init__(self, text: str):
        # A DataLoader puts the traceback of its worker before the message.
        super().__init__(text.strip().rpartition(f"{type(self).__name__}: ")[2])


def record_unreadable(
    file: Path, name: str, error: Exception, limit: float, prefixes: tuple[str, ...] = ("",)
) -> None:
    """Add a sample that cannot be decoded to a list of (name, reason).

    Raises:
        TooManyUnreadable: more than `limit` samples, and more than one, of these prefixes are in
            the list.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(json.dumps([name, " ".join(str(error).split())]) + "\n")
    # Another process may be writing its line, which then has no end yet.
    lines = [line for line in file.read_text().splitlines() if line.endswith("]")]
    names = {json.loads(line)[0] for line in lines}
    count = sum(listed.startswith(prefixes) for listed in names)
    if count > max(1, limit):
        remedy = f"see {file}; convert the source without them, or run data_prep.py verify"
        raise TooManyUnreadable(f"{count} samples cannot be used, {remedy}")
