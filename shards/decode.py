"""Decoding of one video or image into the frames of a clip, as JPEG files.

    with open("x.mp4", "rb") as file:
        frames, timestamps = read_video(file, Recipe("videos", frames=16))

A video is read in two passes. The first reads its packets without decoding them, and finds which
frame is on screen at each wanted time. The second pass decodes only what these frames need.
"""

import io
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 1 << 27  # of an image while it is decoded: 400 MB
# {option: least and greatest value}
LIMITS = {"frames": (1, 1e6), "fps": (1e-6, 1e3), "short_side": (8, 1e5), "quality": (1, 100)}
LIMITS["per_class"] = (1, 1e9)


@dataclass(frozen=True)
class Recipe:
    """The settings of a conversion: which frames are kept of an input, and how they are encoded.

    Args:
        kind: "videos" or "images".
        frames: kept of each video, evenly spaced.
        fps: in Hz; if given, a frame is kept every 1 / `fps` seconds, and `frames` is ignored.
        short_side: in pixels; larger frames are scaled down to it, smaller ones never up.
        quality: of the JPEG files, in [1, 100].
        per_class: keeps the first so many inputs of each class; None for all.
    """

    kind: str
    frames: int = 16
    fps: float | None = None
    short_side: int = 256
    quality: int = 90
    per_class: int | None = None

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value}: must be in [{low:g}, {high:g}]")


def open_video(file: BinaryIO) -> av.container.InputContainer:
    """Open a video file at its beginning; raise ValueError if it has no video with a decoder."""
    file.seek(0)
    container = av.open(file, metadata_errors="ignore")  # Titles come in any encoding.
    if not container.streams.video:
        raise ValueError("no video stream")
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise ValueError("a still picture, not a video")
    stream = container.streams.best("video")  # not a cover picture
    if stream is None or stream.codec_context is None:
        raise ValueError("no decoder for its codec")
    stream.codec_context.thread_count = 1
    return container


def time_of(packet: av.Packet | av.VideoFrame, is_avi: bool) -> int | None:
    """Return the time of a packet or frame; AVI stores decoding times but no display times."""
    return packet.dts if is_avi or packet.pts is None else packet.pts


def scan_video(container: av.container.InputContainer) -> tuple[np.ndarray, float]:
    """Read the packets of a video -> times of its frames, median seconds between two frames.

    The times are of the frames that a player shows, ascending, in the stream's unit.
    """
    stream = container.streams.best("video")
    is_avi = container.format.name == "avi"
    shown = []
    packets, end = 0, 0.0
    for packet in container.demux():
        time = time_of(packet, is_avi)
        if time is None:
            continue
        if packet.stream is stream:
            packets += 1
            if not packet.is_discard:  # An edit list hides frames that other frames need.
                shown.append(time)
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
    if not shown:
        raise ValueError("no frames")
    times = np.unique(shown)
    if len(times) > 1:
        gap = float(np.median(np.diff(times)) * stream.time_base)
    else:
        gap = float(1 / (stream.average_rate or 1))
    claimed_packets = stream.frames  # 0 if unknown
    claimed_end = (container.duration or 0) / av.time_base
    truncated = packets < claimed_packets
    if not claimed_packets:
        truncated = end + gap < 0.98 * claimed_end  # The last packets may lack a duration.
    if truncated:
        of_all = f" of {claimed_packets}" if claimed_packets else ""
        raise ValueError(f"truncated: {packets}{of_all} frames, {end:.2f} of {claimed_end:.2f} s")
    return times, gap


def read_video(file: BinaryIO, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Decode the wanted frames of a video file -> upright JPEG files, their timestamps in seconds.

    Wanted are the middles of `recipe.frames` equal sections, or multiples of 1 / `recipe.fps`. A
    video with fewer frames repeats some. A corrupt file raises ValueError or av.FFmpegError.
    """
    with open_video(file) as container:
        times, gap = scan_video(container)
        unit = float(container.streams.best("video").time_base)
    seconds = times * unit
    duration = seconds[-1] - seconds[0] + gap
    if recipe.fps:
        wanted = np.arange(max(1, int(duration * recipe.fps))) / recipe.fps
    else:
        wanted = (np.arange(recipe.frames) + 0.5) * duration / recipe.frames
    # Containers round times to 1 ms, so a frame may seem to begin just after its wanted time.
    on_screen = np.searchsorted(seconds, seconds[0] + wanted + 0.02 * gap, "right") - 1
    frames = decode_frames(file, times, set(times[on_screen].tolist()), recipe)
    return [frames[time] for time in times[on_screen].tolist()], seconds[on_screen].tolist()


def decode_frames(
    file: BinaryIO, times: np.ndarray, wanted: set[int], recipe: Recipe
) -> dict[int, bytes]:
    """Decode the frames at the wanted times -> {time in the stream's unit: JPEG file}.

    The decoder may skip a frame that is not wanted and to which no other frame refers. `times`
    has all frames that a player shows, ascending.
    """
    missing = set(wanted)
    frames = {}
    with open_video(file) as container:  # opened again, since not every format can be rewound
        is_avi = container.format.name == "avi"
        remaining_times = iter(times.tolist())
        stream = container.streams.best("video")
        for packet in container.demux(stream):
            time = time_of(packet, is_avi)
            needed = is_avi or time is None or time in missing or packet.is_keyframe
            stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in packet.decode():
                time = time_of(frame, is_avi)
                if is_avi:  # The n-th frame shown has the n-th time.
                    time = next(remaining_times, None)
                if time in missing:
                    missing.remove(time)
                    frames[time] = encode_video_frame(frame, recipe)
            if not missing:
                return frames
    raise ValueError(f"{len(missing)} of {len(wanted)} wanted frames could not be decoded")


def encode_jpeg(pixels: np.ndarray, recipe: Recipe) -> bytes:
    """Encode (H, W, 3) uint8 as a JPEG file."""
    pixels = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(pixels, recipe.quality, colorsubsampling="420")


def encode_video_frame(frame: av.VideoFrame, recipe: Recipe) -> bytes:
    """Encode a decoded video frame, scaled to the short side and upright, as a JPEG file."""
    scale = min(1.0, recipe.short_side / min(frame.width, frame.height))
    width = max(1, round(frame.width * scale))
    height = max(1, round(frame.height * scale))
    # One thread, because PyAV would start more for each frame.
    pixels = frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation="BICUBIC", threads=1
    )  # (H, W, 3)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix:
        # Phones store an upright picture on its side, to be shown at x' = ax + cy, y' = bx + dy.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
        if abs(b) > abs(a):
            pixels = pixels.swapaxes(0, 1)
            a, d = c, b
        if d < 0:
            pixels = pixels[::-1]
        if a < 0:
            pixels = pixels[:, ::-1]
    return encode_jpeg(pixels, recipe)


def read_image(file: BinaryIO, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Read an image file -> one upright RGB JPEG file, timestamp 0.

    A JPEG file that needs no change is stored byte for byte. A large one is decoded at a half, a
    quarter or an eighth of its size. A corrupt file raises OSError or ValueError.
    """
    data = file.read()
    with Image.open(io.BytesIO(data)) as image:
        fits = min(image.size) <= recipe.short_side
        # A progressive JPEG holds all coefficients in memory, at whatever size it is decoded.
        if "progressive" not in image.info and image.width * image.height > MAX_PIXELS // 8:
            image.draft(None, (2 * recipe.short_side, 2 * recipe.short_side))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"too large: {image.width}x{image.height} pixels")
        if image.mode in ("I", "F"):
            raise ValueError("32 bits per pixel, of unknown range")
        image.load()
        if fits and is_plain_jpeg(image, data):
            return [data], [0.0]
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip it instead of scaling.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        scale = recipe.short_side / min(image.size)
        if scale < 1:
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        return [encode_jpeg(np.asarray(image), recipe)], [0.0]


def is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Return whether an image is an upright RGB or grey JPEG that can be decoded in training."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return False
    try:
        simplejpeg.decode_jpeg(data, "RGB")  # is stricter than Pillow
    except ValueError:
        return False
    return True
