"""Depth maps: as SUN RGB-D publishes them, as shards store them, and as a model sees them."""

import io
import math
from itertools import chain
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from shards.storage import Storage

BASELINES = {"kv1": 0.075, "kv2": 0.075, "realsense": 0.095, "xtion": 0.095}  # metres, by sensor
DEPTHS = (0.01, 50.0)  # least and greatest depth, in metres (source: OMNIVORE)
DISPARITIES = (0.01, 75.0)  # least and greatest disparity, in pixels (source: OMNIVORE)


class DepthMap(NamedTuple):
    """The depth of every pixel of an image."""

    millimetres: np.ndarray  # (H, W) uint16; 0 where the sensor has no value
    scale: float  # focal length in pixels of the published image, times baseline in metres


def read_rotated(file: BinaryIO) -> np.ndarray:
    """Return the millimetres (H, W) uint16 of a PNG file of SUN RGB-D.

    The file has them rotated by 3 bits to the left (source: read3dPoints.m of SUNRGBDtoolbox). A
    file that does not have 16 bits per pixel raises ValueError.
    """
    with Image.open(file) as image:
        if image.mode != "I;16":
            raise ValueError(f"depth map of mode {image.mode}: must have 16 bits per pixel")
        stored = np.asarray(image)
    return (stored >> 3) | (stored << 13)


def read_sunrgbd(storage: Storage, image: str) -> DepthMap:
    """Return the depth map of an image of SUN RGB-D, with its holes filled if there is such a map.

    Missing or corrupt maps or intrinsics raise ValueError or OSError.
    """
    folder = image.rsplit("/", 2)[0]
    maps = chain(storage.names(f"{folder}/depth_bfx"), storage.names(f"{folder}/depth"))
    name = next(maps, None)
    if name is None:
        raise ValueError("has no depth map in depth_bfx/ or depth/")
    with storage.open(name) as file:
        millimetres = read_rotated(file)
    focal = float(storage.read(f"{folder}/intrinsics.txt").split()[0])  # pixels
    return DepthMap(millimetres, focal * BASELINES[folder.split("/")[1]])


def encode_depth(depth: DepthMap, size: tuple[int, int]) -> bytes:
    """Return a PNG file of 16 bits, without loss, with the scale in its text.

    Args:
        size: height and width of the image. If they differ from the map's, each pixel gets the
            value of the nearest pixel of the map, as a mean across an edge would be no depth.
    """
    image = Image.fromarray(depth.millimetres)
    if depth.millimetres.shape != size:
        image = image.resize(size[::-1], Image.Resampling.NEAREST)
    text = PngImagePlugin.PngInfo()
    text.add_text("scale", repr(depth.scale))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text)
    return file.getvalue()


def decode_depth(column: bytes) -> DepthMap:
    """Decode what encode_depth returned; a corrupt map raises ValueError."""
    try:
        with Image.open(io.BytesIO(column)) as image:
            depth = DepthMap(np.asarray(image), float(image.info["scale"]))
    except Exception as error:  # Corrupt data makes Pillow raise nearly anything.
        raise ValueError(f"its depth map is corrupt ({type(error).__name__}: {error})") from error
    if not 0 < depth.scale < math.inf:
        raise ValueError(f"its depth map has the scale {depth.scale}: must be positive and finite")
    return depth


def decode_disparity(column: bytes) -> np.ndarray:
    """Return the disparity of a stored depth map, as a fraction of 75 pixels: (H, W, 1) float32.

    Disparity is scale / depth. A missing depth counts as the least. Source: OMNIVORE.
    """
    millimetres, scale = decode_depth(column)
    metres = np.clip(millimetres.astype(np.float32) / 1000, *DEPTHS)
    return np.clip(np.float32(scale) / metres, *DISPARITIES)[..., None] / np.float32(DISPARITIES[1])
