"""Inspection of a finished data set: a check of every sample, and a contact sheet."""

import functools
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from shards.depth import decode_depth
from shards.format import Clips, decode_frame, read_classes, read_json, spread
from shards.inputs import part_name
from shards.storage import Storage
from shards.workers import ignore_stop_signals

PER_ROW = 8  # frames of a row of the contact sheet
CELL = 160  # pixels of the contact sheet for one frame
CAPTION = 34  # pixels above each frame, for two lines


def check_sample(sample: dict, classes: int, short_side: int) -> None:
    """Raise ValueError unless a sample is intact, for `classes` classes and this short side."""
    frames, ends, times = sample["frames"], sample["ends"], sample["timestamps"]
    if not 0 < len(ends) == len(times) or ends[-1] != len(frames):
        counts = f"{len(ends)} frames, {len(times)} timestamps and {len(frames)} bytes"
        raise ValueError(f"{counts} do not agree")
    if not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise ValueError("timestamps are not ascending")
    if not -1 <= sample["label"] < classes:
        raise ValueError(f"label {sample['label']}: must be in [-1, {classes - 1}]")
    expected = decode_frame(sample, 0).shape
    for index in range(len(ends)):
        height, width = decode_frame(sample, index).shape[:2]
        if (height, width) != expected[:2]:
            of_first = f"{expected[1]}x{expected[0]}"
            raise ValueError(f"frame {index} is {width}x{height}, but frame 0 is {of_first}")
        if min(height, width) > short_side:
            size = f"{width}x{height}"
            raise ValueError(f"frame {index} is {size}: its short side must be <= {short_side}")
    if "depth" in sample:
        height, width = decode_depth(sample["depth"]).millimetres.shape
        if (height, width) != expected[:2]:
            of_image = f"{expected[1]}x{expected[0]}"
            raise ValueError(f"depth map is {width}x{height}, but its image {of_image}")


def check_shard(storage: Storage, shard: dict, classes: int, short_side: int) -> list[str]:
    """Return all faults of a shard, by its entry in index.json, and of its samples."""
    from streaming.base.format import reader_from_json
    from streaming.base.hashing import get_hash

    info = shard["raw_data"]
    name = info["basename"]
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return [f"{name} is missing"]
    except OSError as error:
        return [f"{name} cannot be read: {error}"]
    if len(data) != info["bytes"]:
        return [f"{name} has {len(data)} bytes instead of {info['bytes']}"]
    faults = []
    if any(get_hash(algorithm, data) != digest for algorithm, digest in info["hashes"].items()):
        faults.append(f"{name} is corrupt: its hash differs from index.json's")
    reader = reader_from_json("", None, shard)
    offsets = np.frombuffer(data, np.uint32, shard["samples"] + 1, offset=4).tolist()
    for row, (begin, end) in enumerate(pairwise(offsets)):
        try:
            check_sample(reader.decode_sample(data[begin:end]), classes, short_side)
        except Exception as error:  # Corrupt data makes the libraries raise nearly anything.
            faults.append(f"{name}, sample {row}: {' '.join(str(error).split())}")
    return faults


def check_counts(shards: list[dict], report: dict) -> list[str]:
    """Return the faults of index.json against report.json."""
    counts = Counter({part_name(number): 0 for number in range(report["parts"])})
    for shard in shards:
        part = shard["raw_data"]["basename"].split("/")[0]
        counts[part] += shard["samples"]
    total = sum(counts.values())
    if total == report["samples"]:
        return []
    faults = [f"{part} is not in index.json" for part, count in counts.items() if not count]
    return [*faults, f"index.json has {total} samples, but report.json {report['samples']}"]


def verify(path: str, workers: int = 0) -> list[str]:
    """Read every sample of a data set, and return all faults of hashes, frames, counts and labels.

    An incomplete data set raises ValueError.
    """
    shards = read_json(path, "index.json")["shards"]
    report = read_json(path, "report.json")
    limits = {"classes": len(read_classes(path)), "short_side": report["recipe"]["short_side"]}
    check = functools.partial(check_shard, Storage(path), **limits)
    faults = check_counts(shards, report)
    count = workers or os.cpu_count()
    with ProcessPoolExecutor(count, get_context("fork"), ignore_stop_signals) as pool:
        results = pool.map(check, shards)
        for of_shard in tqdm(results, total=len(shards), desc=path, unit="shard", disable=None):
            faults += of_shard
    return faults


def show(out: str, to: str = "sheet.png", samples: int = 12) -> None:
    """Draw a contact sheet of a data set: `samples` rows of a sample with up to PER_ROW frames.

    A row of a data set of images has PER_ROW samples. Samples are spread evenly over the data set,
    and frames evenly over their sample. The folder of the picture `to` is made.

    Raises:
        ValueError: `out` is no data set, or Pillow cannot write a file with the ending of `to`.
    """
    classes = read_classes(out)
    if samples < 1:
        raise ValueError(f"--samples {samples}: must be at least 1")
    kind = Image.registered_extensions().get(os.path.splitext(to)[1].lower())
    if kind not in Image.SAVE:
        raise ValueError(f"--to {to}: must be a picture such as sheet.png")
    clips = Clips(out)
    numbers = spread(len(clips), samples)
    per_row = 1
    if all(len(clips[number]["ends"]) == 1 for number in numbers):
        numbers, per_row = spread(len(clips), samples * PER_ROW), PER_ROW
    cells = [draw_sample(clips[number], classes, PER_ROW // per_row) for number in numbers]
    lines = -(-len(cells) // per_row)
    sheet = Image.new("RGB", (CELL * PER_ROW, (CELL + CAPTION) * lines), "white")
    for place, cell in enumerate(cells):
        row, column = divmod(place, per_row)
        sheet.paste(cell, (column * CELL, row * (CELL + CAPTION)))
    os.makedirs(os.path.dirname(to) or ".", exist_ok=True)
    sheet.save(to)
    print(f"{to}: {len(cells)} of the {len(clips)} samples of {out}")


def draw_sample(sample: dict, classes: list[str], frames: int) -> Image.Image:
    """Draw a sample: two lines of text, and below them up to `frames` of its frames."""
    count = len(sample["ends"])
    cell = Image.new("RGB", (CELL * frames, CELL + CAPTION), "white")
    for column, index in enumerate(spread(count, frames)):
        try:
            frame = Image.fromarray(decode_frame(sample, index))
        except ValueError:
            frame = Image.new("RGB", (CELL, CELL), "red")  # corrupt, see verify
        scale = (CELL - 2) / max(frame.size)
        size = [max(1, round(side * scale)) for side in frame.size]
        cell.paste(frame.resize(size), (column * CELL, CAPTION))
    label = classes[sample["label"]] if sample["label"] >= 0 else "no label"
    times = sample["timestamps"]
    length = f", {count} frames, {times[0]:.2f}-{times[-1]:.2f} s" if count > 1 else ""
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    for line, text in enumerate((label, sample["name"] + length)):
        draw.text((2, 2 + 15 * line), " ".join(text.split()), fill="black", font=font)
    return cell


def print_faults(out: str, workers: int = 0) -> None:
    """Print the faults of a data set, see verify; raise ValueError if there are any."""
    faults = verify(out, workers)
    for fault in faults:
        print(fault)
    if faults:
        remedy = "delete the parts that are named, and repeat the command that made the data set"
        raise ValueError(f"{out} has {len(faults)} faults; {remedy}")
    print(f"{out}: {len(Clips(out))} samples, no faults")
