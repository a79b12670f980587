"""Draws the raw files of the demonstration: tinted garments of Fashion-MNIST that drift over clutter, as mp4, and stills."""

import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

FASHION_MNIST = Path(__file__).parent / "assets" / "fashion_mnist.npz"


CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
)


SIDE, FRAMES, RATE = 40, 32, 16  # pixels, frames, frames a second


def draw_garment(garment: np.ndarray, rng: np.random.Generator, frames: int) -> np.ndarray:
    """A tinted garment (28, 28) that drifts and turns over faint static clutter -> (frames, SIDE, SIDE, 3) uint8."""
    clutter = rng.uniform(0, 60, (5, 5, 3)).astype(np.uint8)
    clutter = np.asarray(
        Image.fromarray(clutter).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32
    )
    tint = rng.uniform(0.55, 1.0, 3)
    centre, drift = (
        rng.uniform(-4, 4, 2),
        rng.uniform(-9, 9, 2),
    )  # pixels; pixels over the whole clip
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
    with (
        np.load(FASHION_MNIST, allow_pickle=False) as data,
        ProcessPoolExecutor(workers, get_context("fork")) as pool,
    ):
        for number, split in enumerate(("train", "test")):
            images, labels = data[f"{split}_images"], data[f"{split}_labels"]
            for label, name in enumerate(CLASSES):
                for index, garment in enumerate(images[labels == label][:garments]):
                    kind, ending = (("videos", "mp4"), ("images", "jpg"))[index % 2]
                    path = aside / split / kind / name / f"{index:04d}.{ending}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    jobs.append(pool.submit(draw_file, path, garment, (number, label, index)))
        for job in tqdm(
            as_completed(jobs), total=len(jobs), desc=str(raw), unit="file", disable=None
        ):
            job.result()
    aside.rename(raw)
