"""Drawing of the demonstration's raw files: garments of Fashion-MNIST in colour, moving or still.

Videos show a tinted garment that drifts and turns over clutter. Images show a garment at rest.
Images with depth show it in front of a wall, which the camera does not face squarely.
"""

import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from shards.workers import ignore_stop_signals

FASHION_MNIST = Path(__file__).parents[1] / "assets" / "fashion_mnist.npz"
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
SIDE = 40  # pixels
FRAMES = 32
RATE = 16  # frames per second
FOCAL = 525.0  # pixels; of the imagined camera that sees the depth


def draw_garment(
    garment: np.ndarray, rng: np.random.Generator, frames: int
) -> tuple[np.ndarray, Image.Image]:
    """Draw a garment (28, 28) drifting and turning over clutter -> (frames, SIDE, SIDE, 3).

    The opacity of the garment in the last frame, of 255, is returned too.
    """
    clutter = Image.fromarray(rng.uniform(0, 60, (5, 5, 3)).astype(np.uint8))
    clutter = np.asarray(clutter.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    tint = rng.uniform(0.55, 1.0, 3)
    centre = rng.uniform(-4, 4, 2)  # pixels
    drift = rng.uniform(-9, 9, 2)  # pixels over the whole clip
    angle = rng.uniform(-12, 12)  # degrees
    turn = rng.uniform(-20, 20)  # degrees over the whole clip
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(Image.fromarray(garment), ((SIDE - 28) // 2, (SIDE - 28) // 2))
    clip = np.empty((frames, SIDE, SIDE, 3), np.uint8)
    times = np.linspace(-0.5, 0.5, frames) if frames > 1 else [0.0]
    for frame, time in enumerate(times):
        shift = tuple(np.clip(centre + drift * time, -6, 6))
        moved = picture.rotate(angle + turn * time, Image.Resampling.BILINEAR, translate=shift)
        opacity = np.asarray(moved, np.float32)[..., None] / 255  # (SIDE, SIDE, 1)
        clip[frame] = clutter * (1 - opacity) + 255 * tint * opacity
    return clip, moved


def draw_depth(opacity: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Draw the depth of a garment in front of a wall -> millimetres (SIDE, SIDE) uint16."""
    relief = opacity.filter(ImageFilter.GaussianBlur(1.0))  # The brighter a fold, the nearer it is.
    height = np.asarray(relief, np.float32) / 255 * rng.uniform(3300, 3500)
    row, column = np.mgrid[-0.5 : 0.5 : SIDE * 1j, -0.5 : 0.5 : SIDE * 1j]
    wall = 4000 + rng.uniform(-400, 400) * row + rng.uniform(-400, 400) * column
    return (wall - height + rng.normal(0, 3, height.shape)).round().astype(np.uint16)


def write_clip(path: Path, clip: np.ndarray) -> None:
    """Write frames (T, H, W, 3) as an mp4, or the first as a JPEG still."""
    if path.suffix == ".jpg":
        Image.fromarray(clip[0]).save(path, quality=95)
        return
    with av.open(str(path), "w") as container:
        # With mbtree and lookahead, x264 does not always write the same bytes.
        reproducible = "mbtree=0:rc-lookahead=0"
        options = {"crf": "18", "preset": "veryfast", "x264-params": reproducible}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def draw_file(path: Path, garment: np.ndarray, seed: tuple[int, ...]) -> None:
    """Write a garment as an mp4 of FRAMES frames, or as a JPEG still."""
    frames = 1 if path.suffix == ".jpg" else FRAMES
    write_clip(path, draw_garment(garment, np.random.default_rng(seed), frames)[0])


def garment_files(split: str, garments: int) -> list[tuple[Path, np.ndarray, tuple[int, int]]]:
    """Return the files of a split: (path in raw/, garment, (label, number in its class))."""
    with np.load(FASHION_MNIST, allow_pickle=False) as data:
        images, labels = data[f"{split}_images"], data[f"{split}_labels"]
    files = []
    for label, name in enumerate(CLASSES):
        for number, garment in enumerate(images[labels == label][:garments]):
            kind, ending = ("images", "jpg") if number % 2 else ("videos", "mp4")
            path = Path(split, kind, name, f"{number:04d}.{ending}")
            files.append((path, garment, (label, number)))
    return files


def draw_demo(raw: Path, garments: int, workers: int) -> None:
    """Write raw/{train,test}/{videos,images}/CLASS/*, complete or not at all.

    Each class of a split has the first so many garments; every other garment is a video.
    """
    temporary = raw.with_name(raw.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    jobs = []  # arguments of draw_file
    for split_number, split in enumerate(("train", "test")):
        for name, garment, key in garment_files(split, garments):
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            jobs.append((path, garment, (split_number, *key)))
    with ProcessPoolExecutor(workers, get_context("fork"), ignore_stop_signals) as pool:
        finished = pool.map(draw_file, *zip(*jobs, strict=True), chunksize=16)
        for _ in tqdm(finished, total=len(jobs), desc=str(raw), unit="file", disable=None):
            pass
    temporary.rename(raw)


def draw_depth_demo(raw: Path, garments: int) -> None:
    """Write images with depth maps in the layout of SUN RGB-D, complete or not at all.

    Each class of a split has the first so many garments.
    """
    from scipy.io import savemat

    temporary = raw.with_name(raw.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folders = {}
    for split_number, split in enumerate(("train", "test")):
        folders[f"all{split}"] = []
        for name, garment, key in garment_files(split, garments):
            folder = Path("SUNRGBD", "kv1", split, f"{key[0]}_{name.stem}")
            folders[f"all{split}"].append(f"/{folder}")
            for kind in ("image", "depth_bfx"):
                (temporary / folder / kind).mkdir(parents=True)
            rng = np.random.default_rng((2, split_number, *key))
            picture, opacity = draw_garment(garment, rng, 1)
            depth = draw_depth(opacity, rng)
            Image.fromarray(picture[0]).save(temporary / folder / "image" / "0.jpg", quality=95)
            rotated = (depth << 3) | (depth >> 13)  # see read_rotated
            Image.fromarray(rotated).save(temporary / folder / "depth_bfx" / "0.png")
            centre = SIDE / 2
            intrinsics = f"{FOCAL} 0 {centre} 0 {FOCAL} {centre} 0 0 1"
            (temporary / folder / "intrinsics.txt").write_text(intrinsics)
            (temporary / folder / "scene.txt").write_text(CLASSES[key[0]])
    table = temporary / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    table.parent.mkdir(parents=True)
    savemat(table, {name: np.array(paths, object) for name, paths in folders.items()})
    temporary.rename(raw)
