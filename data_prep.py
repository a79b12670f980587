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
import csv
import errno
import functools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import islice, pairwise
from multiprocessing import connection, get_context
from pathlib import Path
from time import monotonic

import av
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from shards.decode import Recipe, read_image, read_video
from shards.demo import draw_demo
from shards.format import COLUMNS, Clips, decode_frame, encode_clip, read_classes, read_json
from shards.layouts import EXTENSIONS, LAYOUTS, Listing, list_any, read_inputs, write_manifest
from shards.storage import Storage

PART_SIZE = 256  # inputs: what an interruption costs at most, per worker


SHARD_BYTES = 1 << 26


NOT_THE_FILE = {  # what a disk, a bucket or the system may answer for no fault of the input
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
}


TIME_LIMIT = 600  # seconds for one input; a decoder that hangs is stopped


def write_part(
    listing: Listing,
    classes: list[str],
    recipe: Recipe,
    entries: list,
    out: str,
    spoilt: dict,
    step: Callable,
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
                if label < -1 or (classes and label >= len(classes)):
                    raise ValueError(f"label {label} of {len(classes)} classes")
                with load() as file:
                    frames, times = read(file, recipe)
            except Exception as error:  # damaged files make the libraries raise nearly anything
                if (
                    isinstance(error, OSError)
                    and error.errno in NOT_THE_FILE
                    and not isinstance(error, av.FFmpegError)
                ):
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
    return {
        "inputs": number + 1,
        "skipped": skipped,
        "short": short,
        "highest": highest,
        "shards": shards,
    }


def run_parts(
    work: Callable[[str, dict, Callable], None], parts: list[str], workers: int, bar: tqdm
) -> None:
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
                        died = (
                            signal.Signals(-process.exitcode).name
                            if process.exitcode < 0
                            else f"exit {process.exitcode}"
                        )
                        if number is None or number in spoilt[part] or died == "SIGTERM":
                            raise OSError(f"a worker was ended ({died}) at {part}") from None
                        slow = died == "SIGKILL" and process in late
                        why = (
                            f"took longer than {TIME_LIMIT} s to decode"
                            if slow
                            else f"crashed the decoder ({died})"
                        )
                        spoilt[part][number] = why
                        waiting.append(part)
                        bar.update(-number - 1)
                else:
                    if isinstance(message, OSError):
                        raise OSError(
                            f"{message}; what is finished is kept, and the same command goes on"
                        )
                    if isinstance(message, Exception):
                        raise message
                    running[receiver] = process, part, message, monotonic()
                    bar.update(message is not None)
            late = [
                one[0]
                for one in running.values()
                if one[2] is not None and monotonic() - one[3] > TIME_LIMIT
            ]
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
        work(
            part, spoilt, sender.send
        )  # to send fails, and ends this process, if the parent is gone
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
    target = Storage(out)
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
        claim(
            target,
            folder,
            {"source": source, "recipe": asdict(recipe), "parts": len(starts), **found},
        )

        def work(part: str, spoilt: dict, step: Callable) -> None:
            with open(manifest.name, "rb") as file:
                file.seek(starts[int(part.removeprefix("part-"))])
                entries = [json.loads(line) for line in islice(file, size)]
            aside = folder / f"{part}.{os.getpid()}.tmp"
            result = write_part(
                listing, found["classes"], recipe, entries, str(aside), spoilt, step
            )
            step(None)  # what follows may take as long as it does
            Storage(str(aside)).write_json("part.json", result)
            if target.remote:
                for name in sorted(
                    os.listdir(aside), key=lambda name: name == "part.json"
                ):  # that last: the part is whole
                    target.write(f"{part}/{name}", (aside / name).read_bytes())
            if (keep_local or not target.remote) and not (folder / part / "part.json").exists():
                shutil.rmtree(folder / part, ignore_errors=True)
                with suppress(
                    OSError
                ):  # a worker that a killed run left behind may have been faster, with the same bytes
                    aside.rename(folder / part)
                (folder / part / "part.json").stat()
            shutil.rmtree(aside, ignore_errors=True)

        done = finished_parts(target)
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


def claim(target: Storage, folder: Path, request: dict) -> None:
    """Mark `target` as this data set's.

    Raises:
        ValueError: it is another's, or no data set.
    """
    if target.has("request.json"):
        before = read_json(target.root, "request.json")
        changed = [key for key in ("recipe", "listing") if before.get(key) != request[key]]
        if changed:
            what = " and ".join(changed)
            raise ValueError(
                f"OUT {target.root} was begun with another {what}; delete it or choose another OUT"
            )
    elif os.path.isfile(target.root) or (target.has("") and any(target.names())):
        raise ValueError(
            f"OUT {target.root} exists and is not a data set of data_prep.py; choose another OUT"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not target.has("request.json"):
        target.write_json("request.json", request)


def finished_parts(target: Storage) -> set[str]:
    return {name.split("/")[0] for name in target.names() if name.endswith("/part.json")}


def merge(out: str, max_skipped: float = 0.01) -> dict:
    """Make one data set of the parts in `out`, once all are there, and return its report. See convert.

    Raises:
        ValueError: parts are missing; too many inputs were unreadable, or all.
    """
    target = Storage(out)
    request = read_json(out, "request.json")
    names = [f"part-{number:06d}" for number in range(request["parts"])]
    there = finished_parts(target)
    missing = [name for name in names if name not in there]
    if missing:
        count = f"{len(missing)} of its {len(names)} parts"
        raise ValueError(
            f"OUT {out} lacks {count}, first {missing[0]}; give the command that makes them again"
        )
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
        "short": sum(
            part["short"] for part in parts
        ),  # videos of fewer frames than asked: frames repeat
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
    classes = request["classes"] or [
        str(label) for label in range(1 + max(part["highest"] for part in parts))
    ]
    for place in {target, Storage(folder)} if os.path.isdir(folder) else {target}:
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
            raise ValueError(
                f"frame {index} is {size[1]}x{size[0]}, its short side above {short_side}"
            )


def check_shard(storage: Storage, shard: dict, labels: int, short_side: int) -> list[str]:
    """All that is wrong with a shard: its bytes, its samples."""
    from streaming.base.format import reader_from_json
    from streaming.base.hashing import get_hash

    info, faults = shard["raw_data"], []
    name = info["basename"]
    try:
        data = place.read(name)
    except OSError as error:
        return [
            f"{name} is missing"
            if isinstance(error, FileNotFoundError)
            else f"{name} cannot be read: {error}"
        ]
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
    check = functools.partial(check_shard, Storage(path), labels=labels, short_side=side)
    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("fork")) as pool:
        for found in tqdm(
            pool.map(check, shards), total=len(shards), desc=path, unit="shard", disable=None
        ):
            faults += found
    return faults


def demo(out: str, workers: int = 0, garments: int = 600) -> None:
    """Make the demonstration at `out`: raw files, then the data sets {train,test}_{videos,images}.

    train_{videos,images}_200 are 20 of every class, for learning from few labels.

    Args:
        garments: how many of every class, at most, in each split.

    Raises:
        ValueError: `out` holds something else, or fewer than two garments are asked for.
    """
    if garments < 2:
        raise ValueError(
            f"--garments {garments} must be at least 2, of which one moves and one is still"
        )
    raw = Path(out, "raw")
    targets = [
        (f"{split}_{kind}", raw / split / kind, Recipe(kind))
        for split in ("train", "test")
        for kind in EXTENSIONS
    ]
    targets += [
        (f"train_{kind}_200", raw / "train" / kind, Recipe(kind, per_class=20))
        for kind in EXTENSIONS
    ]
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
            frame = ImageOps.contain(
                Image.fromarray(decode_frame(sample, int(index))), (cell - 2, cell - 2)
            )
            row.paste(frame, (column * cell, 14))
        label = classes[sample["label"]] if sample["label"] >= 0 else "no label"
        seconds = (
            f", {sample['timestamps'][0]:.2f}-{sample['timestamps'][-1]:.2f} s" if count > 1 else ""
        )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, what: str, *options: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what)
        if "source" in options:
            command.add_argument(
                "source", metavar="SOURCE", help="folder or s3:// address; x.csv; {0..9}.tar"
            )
        command.add_argument("out", metavar="OUT", help="folder or s3:// address of the data set")
        if "workers" in options:
            command.add_argument("--workers", type=int, default=0, help="processes (one per core)")
        if "skipped" in options:
            command.add_argument(
                "--max-skipped",
                type=float,
                default=0.01,
                help="fraction that may be unreadable (0.01)",
            )
        return command

    for name in (*LAYOUTS, *EXTENSIONS):
        kind, list_inputs = LAYOUTS.get(name, (name, list_any))
        command = add(name, list_inputs.__doc__.split("\n")[0], "source", "workers", "skipped")
        if name in LAYOUTS:
            command.add_argument("--split", default="train", help="train, val or test (train)")
        if kind == "videos":
            frames = 8 if name == "mit" else 16  # its videos are of 3 s
            command.add_argument(
                "--frames",
                type=int,
                default=frames,
                help=f"kept per video, evenly spaced ({frames})",
            )
            command.add_argument(
                "--fps", type=float, help="keep frames at this rate instead, in Hz"
            )
        command.add_argument(
            "--short-side", type=int, default=256, help="pixels, never enlarged (256)"
        )
        command.add_argument("--quality", type=int, default=90, help="JPEG quality, 1-100 (90)")
        command.add_argument(
            "--per-class", type=int, help="inputs of every class, the first in order (all)"
        )
        command.add_argument(
            "--part",
            type=share,
            default=(1, 1),
            help="K/N: do the K-th of N shares, then `merge` (1/1)",
        )
        command.add_argument(
            "--keep-local",
            choices=("yes", "no"),
            default="yes",
            help="keep what was uploaded (yes)",
        )
    add("merge", "join the shares of several machines", "skipped")
    add("verify", "read every sample and name what is damaged", "workers")
    command = add("demo", "make the demonstration", "workers")
    command.add_argument(
        "--garments", type=int, default=600, help="per class and split, at most (600)"
    )
    command = add("show", "draw a contact sheet of a data set")
    command.add_argument("--to", default="sheet.png", help="picture to write (sheet.png)")
    command.add_argument("--samples", type=int, default=12, help="rows (12)")
    args = parser.parse_args(arguments)
    if getattr(args, "workers", 0) < 0:
        raise ValueError(f"--workers {args.workers} must not be negative")
    if not 0 <= getattr(args, "max_skipped", 0) <= 1:
        raise ValueError(f"--max-skipped {args.max_skipped} must be from 0 to 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.command == "demo":
        return demo(args.out, args.workers, args.garments)
    if args.command == "show":
        return show(args.out, args.to, args.samples)
    if args.command == "verify":
        faults = verify(args.out, args.workers)
        for fault in faults:
            print(fault)
        if faults:
            raise ValueError(
                f"{args.out} has {len(faults)} faults; delete the parts named and give its command again"
            )
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
        print(
            f"{args.out}: share {args.part[0]} of {args.part[1]} is done; when all are: data_prep.py merge {args.out}"
        )
        return
    counts = ", ".join(f"{report[name]} {name}" for name in ("samples", "absent", "short"))
    print(f"{args.out}: {counts}, {len(report['skipped'])} skipped")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"data_prep.py: {' '.join(str(error).split())}")
