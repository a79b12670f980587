"""shards/format.py."""

import json
from pathlib import Path

import numpy as np
import simplejpeg

from shards.storage import Storage

COLUMNS = {
    "frames": "bytes",  # JPEG files, back to back
    "ends": "ndarray:uint32",  # (T,) end offset of every frame in `frames`
    "timestamps": "ndarray:float64",  # (T,) seconds, the frames' own; 0 for an image
    "label": "int",  # index into classes.json, -1 unknown
    "name": "str",  # path inside the source
}


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
    return simplejpeg.decode_jpeg(
        memoryview(sample["frames"])[begin : int(sample["ends"][index])], "RGB"
    )


def read_json(path: str, name: str) -> list | dict:
    """index.json, classes.json, report.json of a data set.

    Raises:
        ValueError: `path` is no data set of this format, or is not complete.
    """
    try:
        return json.loads(Storage(path).read(name))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is not a complete data set ({name} is missing); make it with data_prep.py"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}/{name} is damaged ({error}); give the data_prep.py command that made it again"
        ) from None


def read_classes(path: str) -> list[str]:
    """Label names of a data set, in order; empty where it has no labels. Raises as read_json does."""
    read_json(path, "index.json")
    return read_json(path, "classes.json")


def common_classes(paths: list[str]) -> list[str]:
    """The class names of all of these data sets.

    Raises:
        ValueError: no data set, or one that is missing, has no labels, or has other classes than the first.
    """
    if not paths:
        raise ValueError("a list of data sets is empty; name at least one")
    first = read_classes(paths[0])
    for path in paths:
        classes = read_classes(path)
        if not classes:
            raise ValueError(
                f"{path} has no labels, which are needed here; convert it from a folder per class"
            )
        if classes != first:
            raise ValueError(f"{path} has other classes than {paths[0]}")
    return first


class Clips:
    """The samples of a data set by number, from a folder or straight out of a bucket. Raises as read_json does."""

    def __init__(self, path: str):
        from streaming.base.format import (
            reader_from_json,
        )  # 4 s to import: only where shards are read

        self.place, shards = Storage(path), read_json(path, "index.json")["shards"]
        self.names = [shard["raw_data"]["basename"] for shard in shards]
        self.ends = np.cumsum([shard["samples"] for shard in shards])
        self.decode = reader_from_json("", None, shards[0]).decode_sample

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> dict:
        shard = int(np.searchsorted(self.ends, number, "right"))
        row = number - (int(self.ends[shard - 1]) if shard else 0)
        begin, end = np.frombuffer(
            self.place.read(self.names[shard], 4 + 4 * row, 8), np.uint32
        ).tolist()
        return self.decode(self.place.read(self.names[shard], begin, end - begin))


UNREADABLE = "unreadable_eval.jsonl"  # in a run's folder


def record_unreadable(report: Path, name: str, error: Exception) -> set[str]:
    """Add a sample that cannot be decoded to a list, and return the names in it."""
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("a") as file:
        file.write(json.dumps([name, " ".join(str(error).split())]) + "\n")
    return {json.loads(line)[0] for line in report.read_text().splitlines() if line.endswith("]")}
