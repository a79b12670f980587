"""Raw videos and images -> sharded streaming data sets (MDS), and the reader of their format.

    python data_prep.py videos  kinetics/train  data/k400/train          # folder per class of mp4, webm, avi, mkv
    python data_prep.py images  imagenet/train  data/in1k/train          # folder per class of jpeg, png
    python data_prep.py demo    data/demo                                # makes and converts the demonstration, 30 s
    python data_prep.py show    data/k400/train --to sheet.png

Every sample of every data set is a clip: a pack of JPEG frames with their timestamps. An image is a clip of one frame, so
one schema serves both and they mix in a batch. A pack costs little more room than the video and gives a pair of frames
an order of magnitude faster than decoding it.

The work is cut into parts. Each is written aside and renamed when complete, so that what stands in OUT is whole at any
moment, and the same command, given again after an interruption, goes on with the parts that are missing.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path

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
EXTENSIONS = {"videos": {".mp4", ".webm", ".avi", ".mkv"}, "images": {".jpg", ".jpeg", ".png"}}
PART_SIZE = 256  # inputs: what an interruption costs at most, per worker
SHARD_BYTES = 1 << 26
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


def read_classes(path: str) -> list[str]:
    """Label names of a data set, in order; empty where it has no labels.

    Raises:
        ValueError: `path` is no data set of this format, or is not complete.
    """
    for name in ("index.json", "classes.json"):
        if not os.path.exists(os.path.join(path, name)):
            raise ValueError(f"{path} is not a complete data set ({name} is missing); make it with data_prep.py")
    return json.loads(Path(path, "classes.json").read_text())


def kept_times(start: float, duration: float, recipe: Recipe) -> np.ndarray:
    """Times in seconds at which a video is sampled: the middles of `frames` equal sections, or every 1 / `fps`."""
    if recipe.fps:
        return start + np.arange(max(1, int(duration * recipe.fps))) / recipe.fps
    return start + (np.arange(recipe.frames) + 0.5) * duration / recipe.frames


def read_video(path: Path, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Decode the wanted frames of a video file -> JPEG files, timestamps in seconds.

    A first pass reads the packets alone and finds which frame is on screen at each wanted time. The second decodes: for a
    packet that is neither wanted nor a key frame the decoder may drop what no other frame refers to.

    Raises:
        ValueError: the file has no video stream, ends early, or lacks a frame that its packets promise.
        av.FFmpegError: the file is damaged or no video.
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        if container.format.name.endswith("_pipe") or container.format.name == "image2":
            raise ValueError("a still picture, not a video")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        unit = float(stream.time_base)
        found, count, end = [], 0, 0.0  # times of the frames; how many packets, and the last's end, show a file that was cut
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is None:
                continue
            if packet.stream is stream:
                count += 1
                if not packet.is_discard:  # an edit list hides frames that other frames need
                    found.append(time)
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if not found:
            raise ValueError("no frames")
        claimed = (container.duration or 0) / av.time_base
        if count < stream.frames or (not stream.frames and end < 0.98 * claimed):
            raise ValueError(f"cut: {count} frames, {end:.2f} s of {stream.frames or '?'}, {claimed:.2f} s")

        pts = np.unique(found)
        seconds = pts * unit
        gap = float(np.median(np.diff(seconds))) if len(pts) > 1 else 1.0
        times = kept_times(seconds[0], seconds[-1] - seconds[0] + gap, recipe) + 0.02 * gap  # containers round to 1 ms
        on_screen = np.searchsorted(seconds, times, "right") - 1
        wanted = pts[on_screen]
        missing, frames = set(wanted.tolist()), {}

        container.seek(int(pts[0]), stream=stream)
        for packet in container.demux(stream):
            time = packet.dts if packet.pts is None else packet.pts
            keep_all = time is None or time in missing or packet.is_keyframe
            stream.codec_context.skip_frame = "DEFAULT" if keep_all else "NONREF"
            for frame in packet.decode():
                time = frame.dts if frame.pts is None else frame.pts
                if time in missing:
                    missing.remove(time)
                    frames[time] = encode_jpeg(frame, recipe)
            if not missing:
                break
    if missing:
        raise ValueError(f"no such frame: {len(missing)} of {len(set(wanted.tolist()))} could not be decoded")
    return [frames[time] for time in wanted.tolist()], seconds[on_screen].tolist()


def encode_jpeg(frame: av.VideoFrame, recipe: Recipe) -> bytes:
    """A decoded video frame, scaled to the recipe's short side, as a JPEG file."""
    scale = min(1.0, recipe.short_side / min(frame.width, frame.height))
    width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")  # (H, W, 3)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), recipe.quality, colorsubsampling="420")


def read_image(path: Path, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Read an image file -> one JPEG file, timestamp 0. An upright RGB JPEG that is small enough is stored untouched.

    Raises:
        OSError: the file is damaged, cut, or no image.
    """
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = image.getexif().get(0x0112, 1) == 1
        if image.format == "JPEG" and image.mode == "RGB" and upright and min(image.size) <= recipe.short_side:
            try:
                simplejpeg.decode_jpeg(data, "RGB")  # stricter than Pillow: what it refuses is encoded anew
                return [data], [0.0]
            except ValueError:
                pass
        image = ImageOps.exif_transpose(image).convert("RGB")
        scale = recipe.short_side / min(image.size)
        if scale < 1:
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        return [simplejpeg.encode_jpeg(np.asarray(image), recipe.quality, colorsubsampling="420")], [0.0]


def list_inputs(source: Path, kind: str, per_class: int | None = None) -> tuple[list[str], list[str]]:
    """Paths inside `source` in order, and the class names: its sub-folders; none if the files lie flat in it.

    Raises:
        ValueError: `source` is missing, is no folder, or holds no file of this kind.
    """
    if not source.is_dir():
        raise ValueError(f"SOURCE {source} does not exist or is no folder; give the folder that holds the class folders")
    names = sorted(
        os.path.relpath(os.path.join(folder, file), source)
        for folder, _, files in os.walk(source, followlinks=True)
        for file in files
        if os.path.splitext(file)[1].lower() in EXTENSIONS[kind]
    )
    if not names:
        endings = " ".join(sorted(EXTENSIONS[kind]))
        raise ValueError(f"SOURCE {source} holds no {kind} (looked for {endings} in it and its folders)")
    classes = sorted({name.split(os.sep)[0] for name in names if os.sep in name})
    stray = next((name for name in names if os.sep not in name), None)
    if classes and stray:
        raise ValueError(f"SOURCE {source} has class folders, but {stray} lies beside them; move it into one, or out")
    if per_class:
        groups = groupby(names, lambda name: name.split(os.sep)[0])
        names = [name for _, group in groups for name in islice(group, per_class)]
    return names, classes


def write_whole(path: Path, value: object) -> None:
    """Write JSON so that `path` is either as it was or complete."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    aside.replace(path)


def write_part(source: Path, out: Path, names: list[str], classes: list[str], recipe: Recipe) -> int:
    """Convert some inputs into the part folder `out`: MDS shards and what was skipped. Returns the inputs done."""
    from streaming import MDSWriter  # 4 s to import: only where shards are written

    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    read = read_video if recipe.kind == "videos" else read_image
    label_of = {name: label for label, name in enumerate(classes)}
    skipped, short = [], 0
    with MDSWriter(out=str(aside), columns=COLUMNS, size_limit=SHARD_BYTES, hashes=["xxh64"]) as writer:
        for name in names:
            try:
                frames, times = read(source / name, recipe)
            except Exception as error:  # damaged files make the libraries raise nearly anything
                skipped.append([name, " ".join(f"{type(error).__name__}: {error}".split())])
                continue
            short += len(set(times)) < len(times)
            writer.write(encode_clip(frames, times, label_of.get(name.split(os.sep)[0], -1), name))
    write_whole(aside / "part.json", {"inputs": len(names), "skipped": skipped, "short": short})
    aside.rename(out)
    return len(names)


def convert(source: str, out: str, recipe: Recipe, workers: int = 0, max_skipped: float = 0.01) -> dict:
    """Convert a folder of videos or images into a data set at `out`, and return its report.

    Args:
        source: folder with a folder per class; or files alone, which then have no label.
        out: new folder, or one that an earlier run of the same command left unfinished.
        workers: processes; 0 for one per core.
        max_skipped: fraction in [0, 1] of inputs that may be unreadable.

    Raises:
        ValueError: `source` holds nothing of the kind; `out` holds something else; too many inputs were unreadable, or all.
    """
    root, target = Path(source), Path(out)
    if workers < 0:
        raise ValueError(f"--workers {workers} must not be negative")
    names, classes = list_inputs(root, recipe.kind, recipe.per_class)
    listing = hashlib.sha256("\n".join(names).encode()).hexdigest()
    request = {"source": str(source), "recipe": asdict(recipe), "inputs": len(names), "listing": listing}
    marker = target / "request.json"
    if marker.exists():
        before = json.loads(marker.read_text())
        changed = [key for key in request if before.get(key) != request[key]]
        if changed:
            raise ValueError(f"OUT {out} was begun with another {' and '.join(changed)}; delete it or choose another OUT")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"OUT {out} exists and is not a data set of data_prep.py; choose another OUT")
    else:
        target.mkdir(parents=True, exist_ok=True)
        write_whole(marker, request)

    parts = {target / f"part-{i // PART_SIZE:06d}": names[i : i + PART_SIZE] for i in range(0, len(names), PART_SIZE)}
    waiting = {part: inputs for part, inputs in parts.items() if not part.exists()}
    if waiting:
        import streaming  # noqa: F401  # once here, so that the forked workers need not

        with (
            ProcessPoolExecutor(workers or os.cpu_count(), get_context("fork")) as pool,
            tqdm(total=len(names), desc=str(out), unit=recipe.kind[:-1], disable=None) as bar,
        ):
            bar.update(len(names) - sum(map(len, waiting.values())))
            jobs = [pool.submit(write_part, root, part, inputs, classes, recipe) for part, inputs in waiting.items()]
            for job in as_completed(jobs):
                bar.update(job.result())

    done = [json.loads((part / "part.json").read_text()) for part in parts]
    skipped = [entry for part in done for entry in part["skipped"]]
    report = request | {
        "samples": len(names) - len(skipped),
        "short": sum(part["short"] for part in done),  # videos of fewer frames than asked: frames repeat
        "skipped": skipped,
    }
    write_whole(target / "report.json", report)
    if len(skipped) > max_skipped * len(names) or not report["samples"]:
        first = "; ".join(f"{name} ({reason})" for name, reason in skipped[:3])
        raise ValueError(
            f"{len(skipped)} of {len(names)} inputs were unreadable, more than --max-skipped {max_skipped:g} allows: {first}"
            f"; all are in {target / 'report.json'}"
        )
    write_whole(target / "classes.json", classes)
    write_whole(target / "index.json", merge_index(list(parts)))
    return report


def merge_index(parts: list[Path]) -> dict:
    """The index of one data set made of the shards of all parts."""
    shards = []
    for part in parts:
        for shard in json.loads((part / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{part.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    return {"version": 2, "shards": shards}


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
    from streaming import LocalDataset

    data = LocalDataset(path)
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser
    for kind in ("videos", "images"):
        command = add(kind, help=f"convert folders of {kind}")
        command.add_argument("source", metavar="SOURCE", help="folder with a folder per class")
        command.add_argument("out", metavar="OUT", help="folder of the data set to make")
        if kind == "videos":
            command.add_argument("--frames", type=int, default=16, help="kept per video, evenly spaced (16)")
            command.add_argument("--fps", type=float, help="keep frames at this rate instead, in Hz")
        command.add_argument("--short-side", type=int, default=256, help="pixels, never enlarged (256)")
        command.add_argument("--quality", type=int, default=90, help="JPEG quality, 1-100 (90)")
        command.add_argument("--per-class", type=int, help="inputs of every class, the first in order (all)")
        command.add_argument("--max-skipped", type=float, default=0.01, help="fraction that may be unreadable (0.01)")
        command.add_argument("--workers", type=int, default=0, help="processes (one per core)")
    command = add("demo", help="make the demonstration")
    command.add_argument("out", metavar="OUT", help="folder to make it in")
    command.add_argument("--workers", type=int, default=0, help="processes (one per core)")
    command.add_argument("--garments", type=int, default=600, help="per class and split, at most (600)")
    command = add("show", help="draw a contact sheet of a data set")
    command.add_argument("out", metavar="OUT", help="folder of the data set")
    command.add_argument("--to", default="sheet.png", help="picture to write (sheet.png)")
    command.add_argument("--samples", type=int, default=12, help="rows (12)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.command == "demo":
        demo(args.out, args.workers, args.garments)
    elif args.command == "show":
        show(args.out, args.to, args.samples)
    else:
        names = [name for name in Recipe.__dataclass_fields__ if hasattr(args, name)]
        recipe = Recipe(args.command, **{name: getattr(args, name) for name in names})
        report = convert(args.source, args.out, recipe, args.workers, args.max_skipped)
        print(f"{args.out}: {report['samples']} samples, {len(report['skipped'])} skipped, {report['short']} short")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data_prep.py: {error}")
