"""Conversion of raw videos and images to shards for training.

    python data_prep.py k400    kinetics/k400  data/k400/train  # or k600 k700 mit ssv2 places365
    python data_prep.py in1k    imagenet       data/in1k/val --split val
    python data_prep.py videos  x.csv          s3://bucket/mine --part 3/16  # third of 16 machines
    python data_prep.py merge   s3://bucket/mine                # once all 16 are done
    python data_prep.py verify  data/k400/train                 # decodes every frame
    python data_prep.py show    data/k400/train --to sheet.png
    python data_prep.py demo    data/demo                       # the demonstration, 30 s

Every sample of every data set becomes a clip: JPEG frames with their timestamps. An image is a
clip of one frame, so that videos and images mix in a batch. A clip needs little more room than its
video, and yields a pair of frames about ten times as fast. shards/format.py describes the format,
docs/data.md the sources that can be read.

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from shards.decode import Recipe, read_image, read_video
from shards.demo import draw_demo
from shards.format import COLUMNS, Clips, encode_clip, read_json
from shards.inputs import (
    Manifest,
    describe_error,
    is_system_error,
    part_name,
    read_inputs,
    write_manifest,
)
from shards.inspect import show, verify
from shards.layouts import EXTENSIONS, LAYOUTS, Listing, list_any
from shards.storage import Storage
from shards.workers import Report, run_parts

PART_SIZE = 256  # inputs: the most that an interruption costs each worker
SHARD_BYTES = 1 << 26


@dataclass
class Conversion:
    """The settings that all parts of a conversion share.

    Args:
        target: storage of the data set.
        folder: of the data set if it is local, else of its local copy.
        keep_local: whether the local copy stays.
    """

    listing: Listing
    classes: list[str]
    recipe: Recipe
    manifest: Manifest
    target: Storage
    folder: Path
    keep_local: bool


def write_part(
    job: Conversion, entries: list, out: Path, bad_inputs: dict[int, str], report: Report
) -> dict:
    """Convert some inputs into MDS shards in the folder `out`.

    Args:
        entries: lines of the manifest.
        bad_inputs: {number of an input: reason to skip it}.
        report: called with the number of each input before it is read.

    Returns:
        The content of part.json: counts, skipped inputs, highest label, entries for index.json.
    """
    from streaming import MDSWriter

    kind = job.recipe.kind
    read = read_video if kind == "videos" else read_image
    Image.MAX_IMAGE_PIXELS = None  # read_image has a limit of its own.
    labels = {name: label for label, name in enumerate(job.classes)} | {None: -1}
    inputs, short, highest = 0, 0, -1
    skipped = []
    with MDSWriter(out=str(out), columns=COLUMNS, size_limit=SHARD_BYTES, hashes=["xxh64"]) as mds:
        for number, item in enumerate(read_inputs(job.listing, kind, entries)):
            name, class_name, open_input = item
            report(number)
            inputs += 1
            try:
                if number in bad_inputs:
                    raise ValueError(bad_inputs[number])
                label = labels.get(class_name, class_name)  # Samples of tars have a label instead.
                if label < -1 or (job.classes and label >= len(job.classes)):
                    raise ValueError(f"label {label}: must be below {len(job.classes)}, or -1")
                with open_input() as file:
                    frames, timestamps = read(file, job.recipe)
            except Exception as error:  # Corrupt files make the libraries raise nearly anything.
                if is_system_error(error):
                    raise
                skipped.append([name, describe_error(error)])
                continue
            highest = max(highest, label)
            short += len(set(timestamps)) < len(timestamps)
            mds.write(encode_clip(frames, timestamps, label, name))
    index = out / "index.json"
    shards = json.loads(index.read_text())["shards"]
    index.unlink()
    return {
        "inputs": inputs,
        "skipped": skipped,
        "short": short,
        "highest": highest,
        "shards": shards,
    }


def convert_part(job: Conversion, part: str, bad_inputs: dict[int, str], report: Report) -> None:
    """Write one part to a temporary folder, upload it if the target is a bucket, and rename it."""
    temporary = job.folder / f"{part}.{os.getpid()}.tmp"
    entries = job.manifest.read_entries(part)
    result = write_part(job, entries, temporary, bad_inputs, report)
    report(None)  # The time limit is for inputs, not for what follows.
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
        (finished / "part.json").stat()  # raises if neither succeeded
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
) -> dict | None:
    """Convert a source of videos or images into a data set.

    Args:
        source: folder, .csv list or tars, or the root of a published layout; local or s3://.
        out: new folder, or the folder of an interrupted conversion, which is resumed. With an
            s3:// address, parts are written to a local folder named by its key, then uploaded.
        workers: processes; 0 for one per core.
        max_skipped: fraction of inputs in [0, 1] that may be undecodable.
        list_inputs: lists `split` of a published layout, see LAYOUTS; list_any if None.
        share: (k, n) converts the k-th of n shares of the parts; `merge` then joins them.
        keep_local: whether the local folder keeps what was uploaded.

    Returns:
        The report, or None if `share` is not (1, 1).

    Raises:
        ValueError: `source` has no inputs; `out` is something else; or more inputs than allowed,
            or all, are undecodable.
        OSError: a disk or bucket is full, unreachable or forbidden. Finished parts are kept.
    """
    target = Storage(out)
    folder = local_folder(target)
    listing = list_inputs(source, split) if list_inputs else list_any(source, recipe.kind)
    if listing.tars and recipe.per_class:
        raise ValueError("--per-class needs files, but SOURCE holds tars; leave it out")
    part_size = 1 if listing.tars else PART_SIZE
    with tempfile.NamedTemporaryFile() as file:
        manifest, counts = write_manifest(listing, file, recipe.per_class, part_size)
        check_listed(source, recipe.kind, counts)
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


def check_listed(source: str, kind: str, counts: dict) -> None:
    """Raise ValueError if no input was found."""
    if not counts["listed"]:
        number = f"none of the {counts['absent']}" if counts["absent"] else "no"
        endings = " ".join(EXTENSIONS[kind])
        raise ValueError(
            f"SOURCE {source} holds {number} {kind} ({endings}); tars must be named as x.tar"
        )


def claim_output(target: Storage, folder: Path, request: dict) -> None:
    """Write request.json, which marks `target` as the output of one conversion.

    Raises:
        ValueError: `target` is the output of another conversion, or no data set.
    """
    if target.has("request.json"):
        earlier = read_json(target.root, "request.json")
        changed = [key for key in ("recipe", "listing") if earlier.get(key) != request[key]]
        if changed:
            raise ValueError(
                f"OUT {target.root} was begun with another {' and '.join(changed)}; "
                "delete it or choose another OUT"
            )
    elif os.path.isfile(target.root) or (target.has("") and any(target.names())):
        raise ValueError(
            f"OUT {target.root} exists and is not a data set of data_prep.py; choose another OUT"
        )
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

    Args:
        max_skipped: fraction of inputs in [0, 1] that may be undecodable.

    Raises:
        ValueError: parts are missing; or more inputs than allowed, or all, are undecodable.
    """
    target = Storage(out)
    folder = local_folder(target)
    request = read_json(out, "request.json")
    names = [part_name(number) for number in range(request["parts"])]
    parts = read_parts(target, names)
    for stale in folder.glob("part-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)  # left by killed runs
    skipped = [entry for part in parts for entry in part["skipped"]]
    inputs = sum(part["inputs"] for part in parts)
    report = request | {
        "inputs": inputs,
        "samples": inputs - len(skipped),
        "short": sum(part["short"] for part in parts),  # videos that repeat frames
        "skipped": skipped,
    }
    target.write_json("report.json", report)
    check_skipped(report, max_skipped, target.at("report.json"))
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
    """Return the part.json of each part.

    Raises:
        ValueError: parts are missing.
    """
    finished = finished_parts(target)
    missing = [name for name in names if name not in finished]
    if missing:
        raise ValueError(
            f"OUT {target.root} lacks {len(missing)} of its {len(names)} parts, "
            f"first {missing[0]}; run the commands that make them again"
        )
    with ThreadPoolExecutor(16) as pool:  # A bucket answers slowly, but many requests at a time.
        contents = pool.map(lambda name: target.read(f"{name}/part.json"), names)
        return [json.loads(content) for content in contents]


def check_skipped(report: dict, max_skipped: float, address: str) -> None:
    """Raise ValueError if more inputs than allowed, or all, were skipped."""
    skipped, inputs = report["skipped"], report["inputs"]
    if report["samples"] and len(skipped) <= max_skipped * inputs:
        return
    examples = "; ".join(f"{name} ({reason})" for name, reason in skipped[:3])
    raise ValueError(
        f"{len(skipped)} of {inputs} inputs are undecodable, but --max-skipped allows a "
        f"fraction of {max_skipped:g}: {examples}; all are in {address}"
    )


def make_demo(out: str, workers: int = 0, garments: int = 600) -> None:
    """Make the demonstration at `out` unless it is complete.

    It consists of raw files and of the data sets {train,test}_{videos,images}. Two smaller ones,
    train_{videos,images}_200, have 20 samples of every class, for learning from few labels.

    Args:
        workers: processes; 0 for one per core.
        garments: of every class in each split, at most.

    Raises:
        ValueError: `out` holds something else, or `garments` is below 2.
    """
    if garments < 2:
        raise ValueError(f"--garments {garments}: must be at least 2, one video and one image")
    raw = Path(out, "raw")
    jobs = []  # (name, source, recipe)
    for split in ("train", "test"):
        for kind in EXTENSIONS:
            jobs.append((f"{split}_{kind}", raw / split / kind, Recipe(kind)))
    for kind in EXTENSIONS:
        jobs.append((f"train_{kind}_200", raw / "train" / kind, Recipe(kind, per_class=20)))
    if all(Path(out, name, "index.json").exists() for name, _, _ in jobs):
        return
    if not raw.exists():
        if os.path.exists(out) and any(path.name != "raw.tmp" for path in Path(out).iterdir()):
            raise ValueError(f"OUT {out} exists and is not the demonstration; choose another OUT")
        draw_demo(raw, garments, workers or os.cpu_count())
    for name, source, recipe in jobs:
        convert(str(source), os.path.join(out, name), recipe, workers)


def parse_share(text: str) -> tuple[int, int]:
    """Return (3, 16) for "3/16"."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}: must be K/N with K from 1 to N")
    return int(number), int(count)


def shared_arguments() -> dict[str, argparse.ArgumentParser]:
    """Return parsers of the arguments that several sub-commands have."""
    names = ("source", "out", "workers", "max_skipped")
    parsers = {name: argparse.ArgumentParser(add_help=False) for name in names}
    text = "folder or s3:// address; x.csv; x-{0..9}.tar"
    parsers["source"].add_argument("source", metavar="SOURCE", help=text)
    text = "folder or s3:// address of the data set"
    parsers["out"].add_argument("out", metavar="OUT", help=text)
    text = "processes (one per core)"
    parsers["workers"].add_argument("--workers", type=int, default=0, help=text)
    text = "fraction of inputs that may be undecodable (0.01)"
    parsers["max_skipped"].add_argument("--max-skipped", type=float, default=0.01, help=text)
    return parsers


def add_conversion(commands, name: str, parents: list[argparse.ArgumentParser]) -> None:
    """Add the sub-command of a published layout, or of videos or images in general."""
    kind, list_inputs = LAYOUTS.get(name, (name, list_any))
    text = list_inputs.__doc__.split("\n")[0].replace("List", "Convert", 1)
    add = commands.add_parser(name, help=text, parents=parents).add_argument
    if name in LAYOUTS:
        add("--split", default="train", help="train, val or test (train)")
    if kind == "videos":
        frames = 8 if name == "mit" else 16  # Videos of mit last 3 s.
        add("--frames", type=int, default=frames, help=f"per video, evenly spaced ({frames})")
        add("--fps", type=float, help="frames per second of video, instead of --frames")
    add("--short-side", type=int, default=256, help="in pixels; frames are never enlarged (256)")
    add("--quality", type=int, default=90, help="of the JPEG frames, 1-100 (90)")
    add("--per-class", type=int, help="convert only the first so many inputs of every class (all)")
    text = "K/N: convert the K-th of N shares; `merge` joins them (1/1)"
    add("--part", type=parse_share, default=(1, 1), help=text)
    text = "keep a local copy of what is uploaded (yes)"
    add("--keep-local", choices=("yes", "no"), default="yes", help=text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line.

    Raises:
        ValueError: an option is out of range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = shared_arguments()
    out, workers, max_skipped = shared["out"], shared["workers"], shared["max_skipped"]
    for name in (*LAYOUTS, *EXTENSIONS):
        add_conversion(commands, name, list(shared.values()))
    text = "Join the shares of several machines."
    commands.add_parser("merge", help=text, parents=[out, max_skipped])
    text = "Decode every frame and name what is corrupt."
    commands.add_parser("verify", help=text, parents=[out, workers])
    demo = commands.add_parser("demo", help="Make the demonstration.", parents=[out, workers])
    text = "of every class in each split, at most (600)"
    demo.add_argument("--garments", type=int, default=600, help=text)
    sheet = commands.add_parser("show", help="Draw a contact sheet of a data set.", parents=[out])
    sheet.add_argument("--to", default="sheet.png", help="picture to write (sheet.png)")
    sheet.add_argument("--samples", type=int, default=12, help="rows (12)")
    args = parser.parse_args(arguments)
    if getattr(args, "workers", 0) < 0:
        raise ValueError(f"--workers {args.workers}: must be at least 0")
    if not 0 <= getattr(args, "max_skipped", 0) <= 1:
        raise ValueError(f"--max-skipped {args.max_skipped}: must be in [0, 1]")
    return args


def run_conversion(args: argparse.Namespace) -> dict | None:
    """Convert as the command line says; return the report, or None for a share."""
    kind, list_inputs = LAYOUTS.get(args.command, (args.command, None))
    names = [field.name for field in fields(Recipe) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names}
    return convert(
        args.source,
        args.out,
        Recipe(kind, **given),
        workers=args.workers,
        max_skipped=args.max_skipped,
        list_inputs=list_inputs,
        split=getattr(args, "split", ""),
        share=args.part,
        keep_local=args.keep_local == "yes",
    )


def run_verify(args: argparse.Namespace) -> None:
    """Print the faults of a data set, and raise ValueError if there are any."""
    faults = verify(args.out, args.workers)
    for fault in faults:
        print(fault)
    if faults:
        raise ValueError(
            f"{args.out} has {len(faults)} faults; delete the parts that are named, "
            "and run the command that made the data set again"
        )
    print(f"{args.out}: {len(Clips(args.out))} samples, no faults")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.command == "demo":
        return make_demo(args.out, args.workers, args.garments)
    if args.command == "show":
        return show(args.out, args.to, args.samples)
    if args.command == "verify":
        return run_verify(args)
    merging = args.command == "merge"
    report = merge(args.out, args.max_skipped) if merging else run_conversion(args)
    if report is None:
        number, count = args.part
        print(
            f"{args.out}: share {number} of {count} is done; "
            f"after all {count}, run: data_prep.py merge {args.out}"
        )
        return
    counts = ", ".join(f"{report[name]} {name}" for name in ("samples", "absent", "short"))
    print(f"{args.out}: {counts}, {len(report['skipped'])} skipped")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"data_prep.py: {' '.join(str(error).split())}")
