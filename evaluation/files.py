"""Predictions and features for media files as they are, without a conversion.

    files = find_media(["a.mp4", "photos/", "clips/*.webm"])
    views = FileViews(files, img_size=224)
    embed_files(encoder, views, run)                    # writes features.npz into the folder run

Each file is decoded as data_prep.py would. A video is cropped as in every evaluation. An image is
scaled from its own size, without a JPEG file in between, as timm's transform does.
"""

import csv
import glob
import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from evaluation.pictures import draw_tiles, draws_safely, shortened
from evaluation.probes import encode_views
from model import Classifier, Encoder
from shards.augment import normalise
from shards.decode import MAX_PIXELS, Recipe, open_image, read_clips, upright_rgb
from shards.format import check_sides, check_size, encode_clip
from shards.inputs import describe_error, is_system_error
from shards.layouts import EXTENSIONS
from shards.loader import Loader
from shards.storage import Storage, write_file
from shards.views import EvalViews, square_crops

BATCH = 64  # files
TOP = 5  # classes of a prediction that are written
SHOWN = 12  # files in predictions.png


def kind_of(file: str) -> str | None:
    """Return "videos" or "images" by a file's extension, None for any other."""
    extension = os.path.splitext(file)[1].lower()
    return next((kind for kind, known in EXTENSIONS.items() if extension in known), None)


def find_media(patterns: Iterable[str]) -> list[str]:
    """Return the files of patterns and folders, in order, each once.

    A folder stands for all videos and images in it. A file that is named is taken in any case.

    Raises:
        ValueError: a pattern matches nothing.
    """
    named = []
    for pattern in patterns:
        matches = [pattern]
        if not os.path.exists(pattern):  # a name may hold brackets
            matches = sorted(glob.glob(pattern, recursive=True))
        files = []
        for match in matches:
            if os.path.isdir(match):
                inside = Storage(match).names()
                files += [os.path.join(match, name) for name in inside if kind_of(name)]
            elif os.path.exists(match):
                files.append(match)
        if not files:
            raise ValueError(f"{pattern}: no such file, and no video or image in it")
        named += files
    return list(dict.fromkeys(named))


class FileViews(EvalViews):
    """Views of media files: `inputs` as in EvalViews, `number` of the file.

    A file that cannot be decoded becomes a black view; `fault` has the reason.

    Args:
        files: videos and images.
        settings: of EvalViews, without paths, labels and unreadable.
    """

    def __init__(self, files: list[str], img_size: int, num_frames: int = 1, **settings):
        super().__init__([], img_size, num_frames, **settings)
        self.files = files

    def __post_init__(self):
        """Open nothing, since there are no data sets."""

    def __len__(self) -> int:
        return len(self.files)

    def recipe(self, kind: str) -> Recipe:
        """Return how a file is decoded."""
        stored = max(16, self.num_frames * self.temporal_views)
        rate = self.frame_interval and 1 / self.frame_interval
        short_side = round(self.img_size / self.crop_pct)
        return Recipe(kind, stored, rate, max(8, short_side))

    def views_of_video(self, file: BinaryIO, name: str) -> Tensor:
        """Return the views of a video -> (V, T, 3, H, W); a corrupt one raises nearly anything."""
        sample = encode_clip(*read_clips(file, self.recipe("videos"))[0], -1, name)
        check_size(sample, self.patch_size)
        return self.crop_views(sample)

    def views_of_image(self, file: BinaryIO) -> Tensor:
        """Return the views of an image -> (V, T, 3, H, W); a corrupt one raises nearly anything.

        Its pixels equal torchvision's Resize and CenterCrop, with which timm evaluates.
        """
        Image.MAX_IMAGE_PIXELS = None  # open_image has a limit of its own.
        recipe = self.recipe("images")
        image = upright_rgb(open_image(file.read(), recipe), recipe)
        check_sides(image.height, image.width, self.patch_size)
        least, short_side = min(image.size), math.floor(self.img_size / self.crop_pct)
        width, height = (int(short_side * side / least) for side in image.size)
        if width * height > MAX_PIXELS:
            raise ValueError(f"too large: {width}x{height} pixels before the crop")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        crops, fraction = [], self.img_size / min(height, width)
        for top, left, *_ in square_crops(height, width, fraction, self.spatial_views):
            crop = image.crop((left, top, left + self.img_size, top + self.img_size))
            crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
        views = torch.stack(crops * self.temporal_views)[:, None]  # (V, 1, 3, H, W)
        return views.expand(-1, self.num_frames, -1, -1, -1)

    def __getitem__(self, number: int) -> dict[str, Tensor | str]:
        name = self.files[number]
        try:
            with open(name, "rb") as file:
                is_image = kind_of(name) == "images"
                views = self.views_of_image(file) if is_image else self.views_of_video(file, name)
            fault = ""
        except Exception as error:  # a corrupt file makes the libraries raise nearly anything
            if is_system_error(error):
                raise
            views, fault = self.black()["inputs"], describe_error(error)
        return {"inputs": views, "number": number, "fault": fault}


@torch.no_grad()
def run_on_files(
    net: Classifier | Encoder, views: FileViews, num_workers: int, patches: bool = False
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield the probabilities (B, C) of a classifier, or the features of an encoder, in order.

    Args:
        patches: yield the features of all patches, (B, N, D), not pooled over patches and views,
            (B, D).

    Yields:
        The numbers, NaN for a file that cannot be decoded; and the reason for each file, "" if it
        was decoded.
    """
    device = next(net.parameters()).device
    loader = Loader(views, BATCH, views.sample_bytes, num_workers=num_workers)
    for batch in tqdm(loader, desc="files", unit="batch", disable=None, leave=False):
        inputs = normalise(batch["inputs"].to(device, non_blocking=True))  # (B, V, T, 3, H, W)
        if isinstance(net, Classifier):
            output = net.eval_forward({"inputs": inputs})  # (B, C)
        else:
            output = encode_views(net, inputs, patches)
        undecodable = torch.tensor([bool(fault) for fault in batch["fault"]])
        output = output.float().cpu()
        output[undecodable] = float("nan")
        yield output, batch["fault"]


def say_faults(files: list[str], faults: list[str], report: str) -> None:
    """Print how many files could not be decoded.

    Raises:
        ValueError: none could.
    """
    count = sum(map(bool, faults))
    if count == len(files):
        raise ValueError(f"none of {count} files can be decoded: {files[0]}: {faults[0]}")
    if count:
        print(f"{count} of {len(files)} files cannot be decoded; {report} names them")


def write_table(to: Path, rows: Iterable[list]) -> None:
    """Write rows as a CSV file, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(str(to), text.getvalue().encode("utf-8", "backslashreplace"))


def predict_files(
    net: Classifier, views: FileViews, classes: list[str], run: Path, num_workers: int = 0
) -> dict[str, int]:
    """Write predictions.csv, the likeliest classes of every file, and draw predictions.png.

    Args:
        classes: names, in the order of the logits.

    Returns:
        predicted and undecodable, the numbers of files.
    """
    outputs, faults = [], []
    for probabilities, reasons in run_on_files(net, views, num_workers):
        outputs.append(probabilities)
        faults += reasons
    say_faults(views.files, faults, f"{run}/predictions.csv")
    values, ranked = torch.cat(outputs).topk(min(TOP, len(classes)), dim=1)
    head = ["file", "fault"]
    for place in range(1, ranked.shape[1] + 1):
        head += [f"class_{place}", f"probability_{place}"]
    rows = [head]
    for file, fault, numbers, shares in zip(views.files, faults, ranked, values, strict=True):
        cells = []
        if not fault:
            for number, share in zip(numbers.tolist(), shares.tolist(), strict=True):
                cells += [classes[number], f"{share:.4f}"]
        rows.append([file, fault, *cells])
    write_table(run / "predictions.csv", rows)
    draw_predictions(views, rows[1:], run / "predictions.png")
    undecodable = sum(map(bool, faults))
    return {"predicted": len(faults) - undecodable, "undecodable": undecodable}


@draws_safely
def draw_predictions(views: FileViews, rows: list[list], to: Path) -> None:
    """Draw the first files with their likeliest classes."""
    decoded = [(number, row) for number, row in enumerate(rows) if not row[1]][:SHOWN]
    images, captions = [], []
    for number, row in decoded:
        view = views[number]["inputs"]
        images.append(view[len(view) // 2, view.shape[1] // 2] / 255)
        pairs = zip(row[2:8:2], row[3:9:2], strict=True)
        named = [f"{float(share):.0%} {shortened(name)}" for name, share in pairs]
        captions.append("\n".join([shortened(os.path.basename(row[0])), *named]))
    draw_tiles(torch.stack(images), to, "predictions", min(6, len(images)), captions=captions)


def embed_files(
    encoder: Encoder, views: FileViews, run: Path, patches: bool = False, num_workers: int = 0
) -> dict[str, int]:
    """Write features.npz: files, faults and features; and features.csv, if they are pooled.

    The features of patches are written batch by batch, so that memory does not grow with the files.

    Args:
        patches: write the features of all patches (n, N, D), or their mean (n, D).

    Returns:
        embedded and undecodable, the numbers of files.
    """
    rows, faults = [["file", "fault"]], []
    temporary = run / "features.npz.tmp"
    with zipfile.ZipFile(temporary, "w") as archive:  # as np.savez writes it, but batch by batch
        with archive.open("features.npy", "w", force_zip64=True) as file:
            for features, reasons in run_on_files(encoder, views, num_workers, patches):
                if not faults:
                    shape = (len(views), *features.shape[1:])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(features.numpy().tobytes())
                names = views.files[len(faults) : len(faults) + len(reasons)]
                faults += reasons
                if not patches:
                    rows += map(list, zip(names, reasons, *features.T.tolist(), strict=True))
        for name, values in {"files": views.files, "faults": faults}.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(values), allow_pickle=False)
    if all(faults):
        temporary.unlink()
    say_faults(views.files, faults, f"{run}/features.npz")
    temporary.replace(run / "features.npz")
    table = run / "features.csv"
    table.unlink(missing_ok=True)  # of earlier files
    if not patches:
        rows[0] += [f"feature_{number}" for number in range(features.shape[1])]
        write_table(table, rows)
    undecodable = sum(map(bool, faults))
    return {"embedded": len(faults) - undecodable, "undecodable": undecodable}
