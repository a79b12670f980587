"""Conversion of raw videos and images to shards for training.

    python data_prep.py k400    kinetics/k400  data/k400/train  # or k600 k700 mit ssv2 places365
    python data_prep.py in1k    imagenet       data/in1k/val --split val  # or sunrgbd, with depth
    python data_prep.py videos  x.csv          s3://bucket/mine --part 3/16  # third of 16 machines
    python data_prep.py merge   s3://bucket/mine                # once all 16 are done
    python data_prep.py verify  data/k400/train                 # decodes every frame
    python data_prep.py show    data/k400/train --to sheet.png
    python data_prep.py demo    data/demo                       # the demonstration, 30 s

Every sample of every data set becomes a clip: JPEG frames with their timestamps. An image is a
clip of one frame, so that videos and images mix in a batch. 16 frames of a video of
10 s take about 250 kB. A pair of frames is read without decoding others. shards/format.py describes
the format, docs/data.md the sources that can be read.

The inputs are divided into parts. A part is written to a temporary folder, which is renamed once
the part is complete. So an interrupted conversion is resumed by the same command.
"""

import argparse
import csv
import functools
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import simplejpeg
from PIL import Image
from tqdm import tqdm

from shards.decode import Recipe, has_second_film, read_clips, read_image
from shards.demo import CLASSES, draw_demo, draw_depth_demo
from shards.format import COLUMNS, DEPTH_COLUMNS, encode_clip, read_classes, read_json
from shards.inputs import (
    Manifest,
    describe_error,
    find_label,
    is_system_error,
    part_name,
    read_inputs,
    write_manifest,
)
from shards.inspect import print_faults, show
from shards.layouts import EXTENSIONS, LAYOUTS, Listing, list_any, list_sunrgbd
from shards.report import Ignored, check_labels, join_reports, print_summary, printable
from shards.storage import Storage
from shards.workers import Progress, exit_on_signals, run_parts

PART_SIZE = 256  # inputs: the most that an interruption costs each worker
SHARD_BYTES = 1 << 26


@dataclass
class Conversion:
    """The settings that all parts of a conversion share."""

    listing: Listing
    classes: list[str]
    recipe: Recipe
    manifest: Manifest
    target: Storage  # of the data set
    folder: Path  # of the data set if it is local, else of its local copy
    keep_local: bool  # whether the local copy stays


def write_part(
    job: Conversion, entries: list, out: Path, bad_inputs: dict[int, str], progress: Progress
) -> dict:
    """Convert entries of the manifest into MDS shards in the folder `out`; see shards/workers.py.

    Returns the content of part.json, which shards/report.py adds up.
    """
    from streaming import MDSWriter

    kind, read_depth = job.recipe.kind, job.listing.read_depth
    columns = DEPTH_COLUMNS if read_depth else COLUMNS
    Image.MAX_IMAGE_PIXELS = None  # read_image has a limit of its own.
    labels = {name: label for label, name in enumerate(job.classes)} | {None: -1}
    inputs, short, unlabelled = 0, 0, None
    skipped, sides, joined = [], [], []
    converted, ignored = Counter(), Ignored()
    with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_BYTES, hashes=["xxh64"]) as mds:
        for number, item in enumerate(read_inputs(job.listing, kind, entries, ignored)):
            path, class_name, open_input = item
            name = printable(path)
            progress(number)
            inputs += 1
            try:
                if number in bad_inputs:
                    raise ValueError(bad_inputs[number])
                label = find_label(class_name, job.classes, labels)
                with open_input() as file:
                    if kind == "videos":
                        clips = read_clips(file, job.recipe)
                        if has_second_film(file):
                            joined.append(name)
                    else:
                        clips = [read_image(file, job.recipe)]
                depth = read_depth(path) if read_depth else None
            except Exception as error:  # Corrupt files make the libraries raise nearly anything.
                if is_system_error(error):
                    raise
                skipped.append([name, describe_error(error)])
                continue
            converted[label] += len(clips)
            unlabelled = unlabelled or (name if label < 0 else None)
            for frames, timestamps in clips:
                sides.append(min(simplejpeg.decode_jpeg_header(frames[0])[:2]))
                short += len(set(timestamps)) < len(timestamps)
                mds.write(encode_clip(frames, timestamps, label, name, depth))
    return {
        "inputs": inputs,
        "samples": sum(converted.values()),
        "skipped": skipped,
        "ignored": ignored,
        "short": short,
        "joined": joined,
        "short_sides": [min(sides), max(sides)] if sides else [],
        "labels": sorted(converted.items()),
        "highest": max(converted, default=-1),
        "unlabelled": unlabelled,
        "shards": take_shards(out),
    }


def take_shards(part: Path) -> list[dict]:
    """Return the shards that MDSWriter has listed in a folder, and delete its list."""
    index = part / "index.json"
    shards = json.loads(index.read_text())["shards"]
    index.unlink()  # merge writes the index of all parts
    return shards


def convert_part(
    job: Conversion, part: str, bad_inputs: dict[int, str], progress: Progress
) -> None:
    """Write one part to a temporary folder, upload it if the target is a bucket, and rename it."""
    temporary = job.folder / f"{part}.{os.getpid()}.tmp"
    entries = job.manifest.read_entries(part)
    result = write_part(job, entries, temporary, bad_inputs, progress)
    progress(None)  # The time limit is for inputs, not for what follows.
    Storage(str(temporary)).write_json("part.json", result)
    if job.target.remote:
        # A part counts as finished once it has its part.json, which is therefore uploaded last.
        for name in sorted(os.listdir(temporary), key=lambda name: name == "part.json"):
            job.target.write(f"{part}/{name}", (temporary / name).read_bytes())
    finished = job.folder / part
    keep = job.keep_local or not job.target.remote
    if keep and not (finished / "part.json").exists():
        shutil.rmtree(finished, ignore_errors=True)
        # A worker that outlived a killed run may have been faster, with the same bytes.
        with suppress(OSError):
            temporary.rename(finished)
        (finished / "part.json").stat()  # raises OSError if neither succeeded
    shutil.rmtree(temporary, ignore_errors=True)


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
    classes: list[str] | None = None,
) -> dict | None:
    """Convert a source into a data set; return its report, or None for a share of the parts.

    Args:
        source: folder, .csv list or tars, or the root of a published layout; local or s3://.
        out: new folder, or the folder of an interrupted conversion, which is resumed. With an
            s3:// address, parts are written to a local folder named by its key, then uploaded.
        workers: processes; 0 for one per core.
        max_skipped: fraction of inputs in [0, 1] that may be undecodable.
        list_inputs: lists `split` of a published layout, see LAYOUTS; list_any if None.
        share: (k, n) converts the k-th of n shares of the parts; `merge` then joins them.
        keep_local: whether the local folder keeps what was uploaded.
        classes: names in the order of the labels; None for the source's.

    Raises:
        ValueError: `source` has no inputs; `out` is something else; or see merge.
        OSError: a disk or bucket is full, unreachable or forbidden. Finished parts are kept.
    """
    target = Storage(out)
    folder = local_folder(target)
    listing = list_inputs(source, split) if list_inputs else list_any(source, recipe.kind)
    listing.classes = classes or listing.classes
    if listing.tars and recipe.per_class:
        raise ValueError("--per-class needs files, but SOURCE holds tars; leave it out")
    part_size = 1 if listing.tars else PART_SIZE
    with tempfile.NamedTemporaryFile() as file:
        manifest, counts = write_manifest(listing, file, recipe.per_class, part_size)
        if not counts["listed"]:
            number = f"none of the {counts['absent']}" if counts["absent"] else "no"
            remedy = "docs/data.md has the layouts and extensions"
            raise ValueError(f"SOURCE {source} holds {number} {recipe.kind}; {remedy}")
        source = printable(source)
        request = {"source": source, "recipe": asdict(recipe), "parts": len(manifest.starts)}
        claim_output(target, folder, request | counts)
        job = Conversion(listing, counts["classes"], recipe, manifest, target, folder, keep_local)
        waiting = unfinished_parts(job, share)
        if waiting:
            import streaming  # noqa: F401  # takes 4 s; imported once, before workers are forked

            total = None if listing.tars else min(len(waiting) * part_size, counts["listed"])
            work = functools.partial(convert_part, job)
            with tqdm(total=total, desc=out, unit=recipe.kind[:-1], disable=None) as bar:
                run_parts(work, waiting, workers or os.cpu_count(), bar)
    if not any(folder.iterdir()):
        folder.rmdir()  # Everything is in the bucket.
    return merge(out, max_skipped) if share == (1, 1) else None


def local_folder(target: Storage) -> Path:
    """Return the local folder of a data set: for a bucket, the key under the current folder."""
    return Path(target.key("")["Key"] if target.remote else target.root)


def claim_output(target: Storage, folder: Path, request: dict) -> None:
    """Write request.json, or raise ValueError unless `target` is the output of this conversion."""
    out = target.root
    if target.has("request.json"):
        earlier = read_json(out, "request.json")
        # Earlier versions lacked some settings; they did what today's defaults do.
        earlier["recipe"] = asdict(Recipe("videos")) | earlier.get("recipe", {})
        settings = ("recipe", "listing", "classes")
        changed = [key for key in settings if earlier.get(key) != request[key]]
        if changed:
            fault = f"was started with other values of {', '.join(changed)}"
            raise ValueError(f"OUT {out} {fault}; delete it or choose another OUT")
    elif os.path.isfile(out) or (target.has("") and any(target.names())):
        raise ValueError(f"OUT {out} exists and is not a data set; choose another OUT")
    folder.mkdir(parents=True, exist_ok=True)
    if not target.has("request.json"):
        target.write_json("request.json", request)


def finished_parts(target: Storage) -> set[str]:
    """Return the names of the parts that are complete."""
    return {name.split("/")[0] for name in target.names() if name.endswith("/part.json")}


def unfinished_parts(job: Conversion, share: tuple[int, int]) -> list[str]:
    """Return the parts of a share that are still to be made, and delete what killed runs left."""
    finished = finished_parts(job.target)
    if job.target.remote and job.keep_local:
        finished = {part for part in finished if (job.folder / part / "part.json").exists()}
    waiting = [part for part in job.manifest.parts(share) if part not in finished]
    for part in waiting:
        for stale in job.folder.glob(f"{part}.*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
    return waiting


def merge(out: str, max_skipped: float = 0.01) -> dict:
    """Join the parts in `out` into one data set, and return its report.

    Raises:
        ValueError: parts are missing; or all inputs, or a fraction above `max_skipped`, are
            undecodable.
    """
    target = Storage(out)
    folder = local_folder(target)
    request = read_json(out, "request.json")
    names = [part_name(number) for number in range(request["parts"])]
    parts = read_parts(target, names)
    for stale in folder.glob("part-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)  # left by killed runs
    report = join_reports(request, parts)
    target.write_json("report.json", report)
    skipped, inputs = report["skipped"], report["inputs"]
    if not report["samples"] or len(skipped) > max_skipped * inputs:
        allowed = f"--max-skipped allows a fraction of {max_skipped:g}"
        some = "; ".join(f"{name} ({reason})" for name, reason in skipped[:3])
        fault = f"{len(skipped)} of {inputs} inputs are undecodable, but {allowed}"
        raise ValueError(f"{fault}: {some}; all are in {target.at('report.json')}")
    check_labels(report, parts)
    shards = []
    for name, part in zip(names, parts, strict=True):
        for shard in part["shards"]:
            shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    highest = max(part["highest"] for part in parts)
    classes = request["classes"] or [str(label) for label in range(highest + 1)]
    copies = [target]
    if target.remote and folder.is_dir():
        copies.append(Storage(str(folder)))
    for copy in copies:
        copy.write_json("report.json", report)
        copy.write_json("classes.json", classes)
        copy.write_json("index.json", {"version": 2, "shards": shards})
    return report


def read_parts(target: Storage, names: list[str]) -> list[dict]:
    """Return the part.json of each part; raise ValueError if parts are missing."""
    finished = finished_parts(target)
    missing = [name for name in names if name not in finished]
    if missing:
        fault = f"lacks {len(missing)} of its {len(names)} parts, first {missing[0]}"
        raise ValueError(f"OUT {target.root} {fault}; run the commands that make them again")
    with ThreadPoolExecutor(16) as pool:  # A bucket answers slowly, but many requests at a time.
        contents = pool.map(lambda name: target.read(f"{name}/part.json"), names)
        return [json.loads(content) for content in contents]


def make_demo(out: str, workers: int = 0, garments: int = 600) -> None:
    """Make the demonstration at `out`, with up to `garments` per class and split, unless complete.

    It consists of raw files and of the data sets {train,test}_{videos,images,depth}. The smaller
    sets train_{videos,images}_200 have 20 samples of every class, for learning from few labels.
    Of the demonstration of an earlier version, only the sets with depth maps are made.
    """
    if garments < 2:
        raise ValueError(f"--garments {garments}: must be at least 2, one video and one image")
    raw, raw_depth = Path(out, "raw"), Path(out, "raw_depth")
    list_depth = functools.partial(list_sunrgbd, scenes=CLASSES)
    jobs = {}  # {name: arguments of convert}
    for split in ("train", "test"):
        for kind in EXTENSIONS:
            jobs[f"{split}_{kind}"] = {"source": str(raw / split / kind), "recipe": Recipe(kind)}
        depth = {"source": str(raw_depth), "list_inputs": list_depth, "split": split}
        jobs[f"{split}_depth"] = depth | {"recipe": Recipe("images")}
    for kind in EXTENSIONS:
        few = {"recipe": Recipe(kind, per_class=20)}
        jobs[f"train_{kind}_200"] = jobs[f"train_{kind}"] | few
    missing = [name for name in jobs if not Path(out, name, "index.json").exists()]
    if not raw.exists() and any("depth" not in name for name in missing):
        if os.path.exists(out) and any(path.name != "raw.tmp" for path in Path(out).iterdir()):
            raise ValueError(f"OUT {out} exists and is not the demonstration; choose another OUT")
        draw_demo(raw, garments, workers or os.cpu_count())
    if not raw_depth.exists() and any("depth" in name for name in missing):
        draw_depth_demo(raw_depth, min(garments, 60))
    for name in missing:
        convert(out=os.path.join(out, name), workers=workers, **jobs[name])


def parse_share(text: str) -> tuple[int, int]:
    """Return (3, 16) for "3/16"."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}: must be K/N with K from 1 to N")
    return int(number), int(count)


OPTIONS = {  # {argument: settings of add_argument}; the functions have the defaults
    "source": dict(metavar="SOURCE", help="folder or s3:// address; x.csv; x-{0..9}.tar"),
    "out": dict(metavar="OUT", help="folder or s3:// address of the data set"),
    "--split": dict(help="train, val or test (train)"),
    "--frames": dict(type=int, help="per video, evenly spaced (16; mit: 8)"),
    "--fps": dict(type=float, help="frames per second of video, instead of --frames"),
    "--clip-seconds": dict(type=float, help="cut videos into clips of this length (whole videos)"),
    "--stride": dict(type=float, help="seconds from clip to clip (--clip-seconds)"),
    "--max-clips": dict(type=int, help="of a video, from its beginning (all)"),
    "--scene-cuts": dict(
        type=float, nargs="?", const=0.3, metavar="SCORE", help="also cut between scenes (off; 0.3)"
    ),
    "--short-side": dict(type=int, help="pixels; frames are never enlarged (256)"),
    "--classes": dict(metavar="FILE", help="class names, one a line (default: SOURCE's, sorted)"),
    "--like": dict(metavar="DATASET", help="take the classes of another data set of data_prep.py"),
    "--quality": dict(type=int, help="of the JPEG frames, 1-100 (90)"),
    "--background": dict(help="behind transparent pixels: black, #rrggbb (white)"),
    "--per-class": dict(type=int, help="convert only the first N inputs of each class (all)"),
    "--max-skipped": dict(type=float, help="fraction that may be undecodable (0.01)"),
    "--workers": dict(type=int, help="processes (one per core)"),
    "--part": dict(type=parse_share, dest="share", metavar="K/N", help="share K of N (1/1)"),
    "--keep-local": dict(choices=("yes", "no"), help="keep what is uploaded (yes)"),
    "--garments": dict(type=int, help="per class and split, at most (600)"),
    "--to": dict(help="picture to write (sheet.png)"),
    "--samples": dict(type=int, help="rows (12)"),
}
CONVERSION = (
    "source",
    "out",
    "--workers",
    "--max-skipped",
    "--short-side",
    "--quality",
    "--background",
    "--per-class",
    "--classes",
    "--like",
    "--part",
    "--keep-local",
)
VIDEOS = ("--frames", "--fps", "--clip-seconds", "--stride", "--max-clips", "--scene-cuts")
COMMANDS = {  # {command other than a conversion: (function, description, its arguments)}
    "merge": (merge, "Join the shares of several machines.", ("out", "--max-skipped")),
    "verify": (print_faults, "Decode every frame and name corrupt ones.", ("out", "--workers")),
    "show": (show, "Draw a contact sheet of a data set.", ("out", "--to", "--samples")),
    "demo": (make_demo, "Make the demonstration.", ("out", "--workers", "--garments")),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command and the options that are given; raise ValueError for a wrong value."""
    commands = {}  # {command: (description, its arguments)}
    for name in (*LAYOUTS, *EXTENSIONS):
        kind, list_inputs = LAYOUTS.get(name, (name, list_any))
        text = list_inputs.__doc__.split("\n")[0].replace("List", "Convert", 1)
        of_layout = ["--split"] if name in LAYOUTS else []
        of_videos = VIDEOS if kind == "videos" else ()
        commands[name] = (text, [*CONVERSION, *of_layout, *of_videos])
    commands |= {name: (text, options) for name, (_, text, options) in COMMANDS.items()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (text, options) in commands.items():
        command = subparsers.add_parser(name, help=text, argument_default=argparse.SUPPRESS)
        for option in options:
            command.add_argument(option, **OPTIONS[option])
        if name == "mit":
            command.set_defaults(frames=8)  # Its videos last 3 s.
    args = parser.parse_args(arguments)
    if getattr(args, "workers", 0) < 0:
        raise ValueError(f"--workers {args.workers}: must be at least 0")
    if not 0 <= getattr(args, "max_skipped", 0) <= 1:
        raise ValueError(f"--max-skipped {args.max_skipped}: must be in [0, 1]")
    return args


def run_conversion(command: str, args: dict) -> dict | None:
    """Convert as the command line says; return the report, or None for a share."""
    kind, list_inputs = LAYOUTS.get(command, (command, None))
    recipe = {field.name: args.pop(field.name) for field in fields(Recipe) if field.name in args}
    classes = given_classes(args.pop("classes", None), args.pop("like", None))
    keep_local = args.pop("keep_local", "yes") == "yes"
    settings = {"list_inputs": list_inputs, "classes": classes, "keep_local": keep_local}
    return convert(recipe=Recipe(kind, **recipe), **settings, **args)


def given_classes(file: str | None, like: str | None) -> list[str] | None:
    """Return the class names of --classes or --like; None without them."""
    if like and file:
        raise ValueError("give --classes or --like, not both")
    if like:
        return read_classes(like)
    if not file:
        return None
    text = Path(file).read_text("utf-8-sig")
    names = json.loads(text) if file.endswith(".json") else text.split("\n")
    names = [name.strip() for name in map(str, names) if name.strip()]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"--classes {file}: must name each class once, one a line")
    return names


def main(arguments: list[str] | None = None) -> None:
    args = vars(parse(arguments))
    command = args.pop("command")
    if command in COMMANDS:
        function, _, _ = COMMANDS[command]
        report = function(**args)
    else:
        report = run_conversion(command, args)
    if report:
        print_summary(args["out"], report)
    elif "share" in args:
        number, count = args["share"]
        remedy = f"after all {count}, run: data_prep.py merge {args['out']}"
        print(f"{args['out']}: share {number} of {count} is done; {remedy}")


if __name__ == "__main__":
    # A name may not suit the terminal's encoding.
    sys.stdout.reconfigure(errors="backslashreplace")
    exit_on_signals()
    try:
        main()
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"data_prep.py: {' '.join(str(error).split())}")
