"""shards/decode.py."""

import io
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

MAX_PIXELS = 1 << 27  # of an image while it is decoded: 400 MB


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
        for name, lowest, highest in (
            ("frames", 1, 1e6),
            ("fps", 1e-6, 1e3),
            ("short_side", 8, 1e5),
            ("quality", 1, 100),
        ):
            if (value := getattr(self, name)) is not None and not lowest <= value <= highest:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} must be from {lowest:g} to {highest:g}"
                )
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"--per-class {self.per_class} must be positive")


def kept_times(start: float, duration: float, recipe: Recipe) -> np.ndarray:
    """Times in seconds at which a video is sampled: the middles of `frames` equal sections, or every 1 / `fps`."""
    if recipe.fps:
        return start + np.arange(max(1, int(duration * recipe.fps))) / recipe.fps
    return start + (np.arange(recipe.frames) + 0.5) * duration / recipe.frames


def open_video(file: BinaryIO) -> av.container.InputContainer:
    """The container of a video file, from its beginning.

    Raises:
        ValueError: it has no video, or none that can be decoded.
        av.FFmpegError: the file is damaged or no video.
    """
    file.seek(0)
    container = av.open(file, metadata_errors="ignore")  # titles are in whatever encoding
    if not container.streams.video:
        raise ValueError("no video stream")
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise ValueError("a still picture, not a video")
    stream = container.streams.best("video")  # not a cover picture
    if stream is None or stream.codec_context is None:
        raise ValueError("no decoder for its codec")
    stream.codec_context.thread_count = 1
    return container


def time_of(packet: av.Packet | av.VideoFrame, ordered: bool) -> int | None:
    return packet.dts if ordered or packet.pts is None else packet.pts


def scan_video(container: av.container.InputContainer, ordered: bool) -> tuple[np.ndarray, float]:
    """Read the packets alone -> times of the frames shown, ascending, in the stream's unit; seconds from one to the next.

    Raises:
        ValueError: there are none, or fewer than the container claims.
    """
    stream, found, count, end = container.streams.best("video"), [], 0, 0.0
    for packet in container.demux():
        time = time_of(packet, ordered)
        if time is None:
            continue
        if packet.stream is stream:
            count += 1
            if not packet.is_discard:  # an edit list hides frames that other frames need
                found.append(time)
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
    if not found:
        raise ValueError("no frames")
    pts = np.unique(found)
    gap = float(
        np.median(np.diff(pts)) * stream.time_base
        if len(pts) > 1
        else 1 / (stream.average_rate or 1)
    )
    claimed = (container.duration or 0) / av.time_base
    if count < stream.frames or (
        not stream.frames and end + gap < 0.98 * claimed
    ):  # some packets have no duration
        raise ValueError(
            f"cut: {count} frames, {end:.2f} s of {stream.frames or '?'}, {claimed:.2f} s"
        )
    return pts, gap


def read_video(file: BinaryIO, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Decode the wanted frames of a video file -> upright JPEG files, timestamps in seconds.

    A first pass reads the packets alone and finds which frame is on screen at each wanted time. The second decodes: for a
    packet that is neither wanted nor a key frame the decoder may drop what no other frame refers to.

    Raises:
        ValueError: see open_video and scan_video; or the file lacks a frame that its packets promise.
        av.FFmpegError: the file is damaged or no video.
    """
    with open_video(file) as container:
        ordered = (
            container.format.name == "avi"
        )  # has no presentation times: the n-th frame shown has the n-th packet's
        pts, gap = scan_video(container, ordered)
        seconds = pts * float(container.streams.best("video").time_base)
    times = (
        kept_times(seconds[0], seconds[-1] - seconds[0] + gap, recipe) + 0.02 * gap
    )  # containers round to 1 ms
    on_screen = np.searchsorted(seconds, times, "right") - 1
    wanted = pts[on_screen].tolist()
    missing, frames, shown = set(wanted), {}, iter(pts.tolist())
    with open_video(file) as container:  # anew, since not every format can be rewound
        stream = container.streams.best("video")
        for packet in container.demux(stream):
            time = time_of(packet, ordered)
            keep_all = ordered or time is None or time in missing or packet.is_keyframe
            stream.codec_context.skip_frame = "DEFAULT" if keep_all else "NONREF"
            for frame in packet.decode():
                time = next(shown, None) if ordered else time_of(frame, ordered)
                if time in missing:
                    missing.remove(time)
                    frames[time] = encode_jpeg(frame, recipe)
            if not missing:
                break
    if missing:
        raise ValueError(
            f"no such frame: {len(missing)} of {len(set(wanted))} could not be decoded"
        )
    return [frames[time] for time in wanted], seconds[on_screen].tolist()


def encode_jpeg(frame: av.VideoFrame, recipe: Recipe) -> bytes:
    """A decoded video frame, scaled to the recipe's short side and turned as a player shows it, as a JPEG file."""
    scale = min(1.0, recipe.short_side / min(frame.width, frame.height))
    width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    # (H, W, 3). More threads would be made anew for every frame.
    pixels = frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation="BICUBIC", threads=1
    )
    if matrix := frame.side_data.get(
        "DISPLAYMATRIX"
    ):  # as of phones, which store what is upright lying on its side
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # x' = ax + cy, y' = bx + dy
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), recipe.quality, colorsubsampling="420"
    )


def read_image(file: BinaryIO, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Read an image file -> one upright RGB JPEG file, timestamp 0. A JPEG that is small enough is stored untouched.

    Raises:
        OSError: the file is damaged, cut, or no image.
        ValueError: more than MAX_PIXELS would have to be decoded.
    """
    data = file.read()
    with Image.open(io.BytesIO(data)) as image:
        small = min(image.size) <= recipe.short_side
        progressive = (
            "progressive" in image.info
        )  # its coefficients are in memory as a whole, however small it is decoded
        if not progressive and image.width * image.height > MAX_PIXELS // 8:
            image.draft(
                None, (2 * recipe.short_side,) * 2
            )  # a JPEG can be decoded at a half, a quarter, an eighth
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"huge: {image.width}x{image.height} pixels")
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel, of unknown range")
        image.load()
        upright = image.getexif().get(0x0112, 1) == 1
        if image.format == "JPEG" and image.mode in ("RGB", "L") and upright and small:
            try:
                simplejpeg.decode_jpeg(
                    data, "RGB"
                )  # stricter than Pillow: what it refuses is encoded anew
                return [data], [0.0]
            except ValueError:
                pass
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        scale = recipe.short_side / min(image.size)
        if scale < 1:
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        return [
            simplejpeg.encode_jpeg(np.asarray(image), recipe.quality, colorsubsampling="420")
        ], [0.0]
