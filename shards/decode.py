"""Decoding of one video or image into the frames of a clip, as JPEG files.

A video is read in two passes. The first reads its packets without decoding them, and finds which
frame is on screen at each wanted time. The second pass decodes only what these frames need.
"""

import io
import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from typing import BinaryIO

import av
import numpy as np
import simplejpeg
from av.codec.context import Flags
from PIL import ExifTags, Image, ImageCms, ImageColor, PngImagePlugin

MAX_PIXELS = 1 << 27  # of an image while it is decoded: 400 MB
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 25  # Pillow refuses a picture with a longer comment.
# {option: least and greatest value}
LIMITS = {
    "frames": (1, 1e6),
    "fps": (1e-6, 1e3),
    "short_side": (8, 1e5),
    "quality": (1, 100),
    "per_class": (1, 1e9),
    "clip_seconds": (0.01, 1e6),
    "stride": (0.01, 1e6),
    "max_clips": (1, 1e9),
    "scene_cuts": (0.01, 1),
}
TURNS = {  # {EXIF orientation: what a viewer does}; 1 is upright, and there are no others
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CLOCKED = ("mpegts", "mpeg")  # containers whose times jump where files are joined
MP4_HEADER = re.compile(rb"moov....mvhd", re.DOTALL)
FLV_HEADER = re.compile(rb"FLV\x01.\0\0\0\t\0\0\0", re.DOTALL)
ASF_HEADER = re.compile(rb"0&\xb2u\x8ef\xcf\x11\xa6\xd9")
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop alpha.


@dataclass(frozen=True)
class Recipe:
    """The settings of a conversion: which frames are kept of an input, and how they are encoded.

    Args:
        kind: "videos" or "images".
        frames: kept of each video, evenly spaced.
        fps: in Hz; if given, a frame is kept every 1 / `fps` seconds, and `frames` is ignored.
        short_side: in pixels; larger frames are scaled down to it, smaller ones never up.
        quality: of the JPEG files, in [1, 100].
        per_class: number of inputs of each class that are kept, from the first; None for all.
        background: colour behind transparent pixels: a name or #rrggbb.
        clip_seconds: cuts a video into clips of this length, each a sample; None for none. A clip
            during which no frame is on screen is left out.
        stride: seconds from the beginning of a clip to the next; None for clip_seconds.
        max_clips: of a video, from its beginning; None for all.
        scene_cuts: cuts a video where FFmpeg's scene score, in [0, 1], is above this number. Each
            scene is then cut into clips like a video of its own. None for no such cuts.
    """

    kind: str
    frames: int = 16
    fps: float | None = None
    short_side: int = 256
    quality: int = 90
    per_class: int | None = None
    background: str = "white"
    clip_seconds: float | None = None
    stride: float | None = None
    max_clips: int | None = None
    scene_cuts: float | None = None

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value}: must be in [{low:g}, {high:g}]")
        if self.stride and not self.clip_seconds:
            raise ValueError("--stride: give --clip-seconds too")
        if self.max_clips and not (self.clip_seconds or self.scene_cuts):
            raise ValueError("--max-clips: give --clip-seconds or --scene-cuts too")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            wanted = "must be a colour such as white, black or #rrggbb"
            raise ValueError(f"--background {self.background}: {wanted}") from None


def has_second_film(file: BinaryIO) -> bool:
    """Return whether an mp4, flv or asf file has several joined films; FFmpeg reads one.

    In other containers, FFmpeg reads all of them.
    """
    in_memory = isinstance(file, io.BytesIO)
    data = file.getbuffer() if in_memory else mmap(file.fileno(), 0, access=ACCESS_READ)
    with data:
        headers = (FLV_HEADER, ASF_HEADER)
        header = next((header for header in headers if header.match(data)), MP4_HEADER)
        return len(header.findall(data)) > 1


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
    stream.codec_context.flags |= Flags.unaligned  # else a left crop is rounded to 32 bytes
    return container


def open_decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """Return the decoder of a stream, and for VP8 and VP9 with alpha a decoder that keeps it."""
    name = ALPHA_DECODERS.get(stream.codec_context.name)
    if stream.metadata.get("alpha_mode") != "1" or name is None:
        return stream.codec_context
    decoder = av.CodecContext.create(name, "r")
    decoder.thread_count = 1
    return decoder


def time_of(packet: av.Packet | av.VideoFrame, is_avi: bool) -> int | None:
    """Return the time of a packet or frame; AVI stores decoding times but no display times."""
    return packet.dts if is_avi or packet.pts is None else packet.pts


def scan_video(
    container: av.container.InputContainer,
) -> tuple[np.ndarray | None, float]:
    """Read the packets of a video -> times of its frames, median seconds between two frames.

    The times are of the frames that a player shows, ascending, in the stream's unit. They are None
    if the packets have no times, or times that jump, as in files that were joined.
    """
    stream = container.streams.best("video")
    is_avi = container.format.name == "avi"
    shown, decoded = [], []
    first_key = None  # Frames before it refer to frames that the file lacks.
    end = 0.0
    for packet in container.demux():
        time = time_of(packet, is_avi)
        if time is None:
            continue
        if packet.stream is stream:
            if packet.is_keyframe and first_key is None:
                first_key = time
            if packet.dts is not None:
                decoded.append(packet.dts)
            if not packet.is_discard:  # An edit list hides frames that other frames need.
                shown.append(time)
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
    gap = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    steps = np.diff(decoded) * float(stream.time_base)
    longest = 10.0 if container.format.name in CLOCKED else np.inf  # seconds, as in ffmpeg
    if not shown or (steps < 0).any() or (steps > longest).any():
        return None, gap
    times = np.unique(shown)
    if first_key is not None and times[-1] >= first_key:
        times = times[times >= first_key]
    if len(times) > 1:
        gap = float(np.median(np.diff(times)) * stream.time_base)
    check_length(container, times, end, gap)
    return times, gap


def check_length(
    container: av.container.InputContainer, times: np.ndarray, end: float, gap: float
) -> None:
    """Raise ValueError if a video ends before the time that its container claims.

    The number of frames that an AVI or an edited mp4 claims includes frames that are not stored.
    """
    stream = container.streams.best("video")
    claimed = (container.duration or 0) / av.time_base
    if stream.duration:
        claimed = float(stream.duration * stream.time_base)
        begin = 0 if container.format.name == "avi" else min(stream.start_time or 0, times[0])
        end = float((times[-1] - begin) * stream.time_base) + gap
    if end + gap < 0.98 * claimed:  # The last packets may be empty or lack a duration.
        raise ValueError(f"truncated: {len(times)} frames, {end:.2f} of {claimed:.2f} s")


def read_clips(file: BinaryIO, recipe: Recipe) -> list[tuple[list[bytes], list[float]]]:
    """Cut a video file into clips -> for each, upright JPEG files and their timestamps in seconds.

    Wanted are the middles of `recipe.frames` equal sections of a clip, or multiples of
    1 / `recipe.fps`. A clip with fewer frames repeats some; no clip has frames of two scenes. The
    timestamps are in the video's time. Without recipe.clip_seconds and recipe.scene_cuts, there is
    one clip. A corrupt file raises ValueError or av.FFmpegError.
    """
    with open_video(file) as container:
        times, gap = scan_video(container)
        unit = float(container.streams.best("video").time_base)
        in_order = times is None or container.format.name == "avi"
    if times is None:
        times, unit = np.arange(count_frames(file)), gap
    seconds = times * unit
    cuts = find_cuts(file, times, in_order, recipe.scene_cuts) if recipe.scene_cuts else []
    chosen = []
    for begin, end in pairwise([0, *cuts, len(times)]):
        chosen += [begin + clip for clip in place_clips(seconds[begin:end], gap, recipe)]
    chosen = chosen[: recipe.max_clips]
    wanted = set(times[np.concatenate(chosen)].tolist())
    frames = decode_frames(file, times, wanted, in_order, recipe)
    clips = []
    for indices in chosen:
        files = [frames[time] for time in times[indices].tolist()]
        clips.append((files, seconds[indices].tolist()))
    return clips


def place_clips(seconds: np.ndarray, interval: float, recipe: Recipe) -> list[np.ndarray]:
    """Return the indices of the frames of each clip in a video or scene.

    What remains after the last clip is left out, and so is a clip during which no frame is on
    screen, as where a recording has a gap. A scene shorter than a clip becomes one clip.

    Args:
        seconds: times of all frames, ascending.
        interval: median seconds between two frames.
    """
    duration = seconds[-1] - seconds[0] + interval
    length = min(recipe.clip_seconds or duration, duration)
    last = duration - length + 0.5 * interval
    begins = np.arange(0, last, recipe.stride or length)
    # A frame is on screen for an interval, so it may have begun so long before the clip.
    edges = np.searchsorted(seconds - seconds[0], [begins - 1.02 * interval, begins + length])
    begins = begins[edges[0] < edges[1]]
    if recipe.fps:
        wanted = np.arange(max(1, int(length * recipe.fps))) / recipe.fps
    else:
        wanted = (np.arange(recipe.frames) + 0.5) * length / recipe.frames
    wanted = begins[:, None] + wanted  # (clips, frames)
    # Containers round times to 1 ms, so a frame may seem to begin just after its wanted time.
    return list(np.searchsorted(seconds, seconds[0] + wanted + 0.02 * interval, "right") - 1)


def find_cuts(file: BinaryIO, times: np.ndarray, in_order: bool, threshold: float) -> list[int]:
    """Return the indices of the frames that begin a new scene.

    It begins where the score of FFmpeg's filter `select` is above `threshold`, in [0, 1]. For
    `times` and `in_order`, see decode_frames.
    """
    graph = av.filter.Graph()
    size = {"width": 160, "height": 90}  # pixels; enough for a score, and soon scaled
    graph.link_nodes(
        graph.add_buffer(**size, format="rgb24", time_base=Fraction(1)),
        graph.add("select", f"gt(scene,{threshold})"),
        graph.add("buffersink"),
    ).configure()
    cuts = set()
    with open_video(file) as container:
        for number, frame in enumerate(container.decode(container.streams.best("video"))):
            time = times[min(number, len(times) - 1)] if in_order else time_of(frame, False)
            if time is None:
                continue
            small = frame.reformat(**size, format="rgb24", threads=1)
            small.pts, small.time_base = time, Fraction(1)
            graph.push(small)
            with suppress(BlockingIOError):  # the filter keeps the frame
                cuts.add(int(np.searchsorted(times, graph.pull().pts)))
    return sorted(cuts - {0, len(times)})


def count_frames(file: BinaryIO) -> int:
    """Return the number of frames of a video, by decoding all; raise ValueError if it has none."""
    with open_video(file) as container:
        count = sum(1 for _ in container.decode(container.streams.best("video")))
    if not count:
        raise ValueError("no frames")
    return count


def decode_frames(
    file: BinaryIO, times: np.ndarray, wanted: set[int], in_order: bool, recipe: Recipe
) -> dict[int, bytes]:
    """Decode the frames at the wanted times -> {time in the stream's unit: JPEG file}.

    The decoder may skip a frame that is not wanted and to which no other frame refers.

    Args:
        times: of all frames that a player shows, ascending.
        in_order: the n-th frame has the n-th time, since the container stores no display times.
    """
    missing = set(wanted)
    frames = {}
    matrix, size = None, None
    with open_video(file) as container:  # opened again, since not every format can be rewound
        remaining_times = iter(times.tolist())
        stream = container.streams.best("video")
        decoder = open_decoder(stream)
        for packet in container.demux(stream):
            time = time_of(packet, in_order)
            needed = in_order or time is None or time in missing or packet.is_keyframe
            decoder.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in decoder.decode(packet):
                own_matrix = frame.side_data.get("DISPLAYMATRIX")
                # An orientation in the stream holds until the next key frame.
                if own_matrix or frame.key_frame:
                    matrix = bytes(own_matrix) if own_matrix else None
                time = time_of(frame, in_order)
                if in_order:
                    time = next(remaining_times, None)
                if time in missing:
                    missing.remove(time)
                    pixels = to_pixels(frame, matrix, size, recipe)
                    size = pixels.shape[:2]
                    frames[time] = encode_jpeg(pixels, recipe)
            if not missing:
                return frames
    raise ValueError(f"{len(missing)} of {len(wanted)} wanted frames could not be decoded")


def encode_jpeg(pixels: np.ndarray, recipe: Recipe) -> bytes:
    """Encode (H, W, 3) uint8 as a JPEG file."""
    pixels = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(pixels, recipe.quality, colorsubsampling="420")


def to_pixels(
    frame: av.VideoFrame, matrix: bytes | None, size: tuple[int, int] | None, recipe: Recipe
) -> np.ndarray:
    """Return a decoded video frame, upright and scaled -> (H, W, 3) uint8.

    Args:
        matrix: its display matrix, as in FFmpeg.
        size: height and width of the result; None scales to the short side.
    """
    a, b, c, d = 1, 0, 0, 1
    if matrix:
        # Phones store an upright picture on its side, to be shown at x' = ax + cy, y' = bx + dy.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    on_its_side = abs(b) > abs(a)
    if size is None:
        scale = min(1.0, recipe.short_side / min(frame.width, frame.height))
        width = max(1, round(frame.width * scale))
        height = max(1, round(frame.height * scale))
    else:
        width, height = size if on_its_side else size[::-1]
    # An image with a palette may have transparent colours.
    alpha = frame.format.has_palette or any(plane.is_alpha for plane in frame.format.components)
    # One thread, because PyAV would start more for each frame.
    pixels = frame.to_ndarray(
        format="rgba" if alpha else "rgb24",
        width=width,
        height=height,
        interpolation="BICUBIC",
        threads=1,
    )  # (H, W, 3 or 4)
    if alpha:
        pixels = np.asarray(on_background(Image.fromarray(pixels), recipe))
    if on_its_side:
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    if d < 0:
        pixels = pixels[::-1]
    if a < 0:
        pixels = pixels[:, ::-1]
    return pixels


def on_background(image: Image.Image, recipe: Recipe) -> Image.Image:
    """Return an RGB image, in which the background shows through transparent pixels."""
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, ImageColor.getrgb(recipe.background)[:3])
    return Image.alpha_composite(background, image).convert("RGB")


def open_image(data: bytes, recipe: Recipe) -> Image.Image:
    """Open and decode an image file; a large JPEG at a half, a quarter or an eighth of its size.

    Raises:
        OSError, ValueError: the file is corrupt, or has too many pixels or bits.
    """
    image = Image.open(io.BytesIO(data))
    # A progressive JPEG holds all coefficients in memory, at whatever size it is decoded.
    if "progressive" not in image.info and image.width * image.height > MAX_PIXELS // 8:
        image.draft(None, (2 * recipe.short_side, 2 * recipe.short_side))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"too large: {image.width}x{image.height} pixels")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel, of unknown range")
    image.load()
    return image


def upright_rgb(image: Image.Image, recipe: Recipe) -> Image.Image:
    """Return an image of any mode as RGB, as a viewer turns it, on the background."""
    orientation = read_orientation(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if image.mode.startswith("I;16"):  # Pillow would clip it instead of scaling.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return on_background(image, recipe) if image.has_transparency_data else to_rgb(image)


def read_image(file: BinaryIO, recipe: Recipe) -> tuple[list[bytes], list[float]]:
    """Read an image file -> one upright RGB JPEG file, timestamp 0.

    A JPEG file that needs no change is stored byte for byte. Raises the errors of open_image.
    """
    data = file.read()
    image = open_image(data, recipe)
    fits = min(image.size) <= recipe.short_side
    if fits and read_orientation(image) not in TURNS and is_plain_jpeg(image, data):
        return [data], [0.0]
    image = upright_rgb(image, recipe)
    scale = recipe.short_side / min(image.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    return [encode_jpeg(np.asarray(image), recipe)], [0.0]


def read_orientation(image: Image.Image) -> object:
    """Return the EXIF orientation of an image; 1, which is upright, if the tags are broken."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Broken tags make Pillow raise nearly anything.
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opaque image of any mode to RGB."""
    if image.mode != "LAB":
        return image.convert("RGB")
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")


def is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Return whether an image is an RGB or grey JPEG that can be decoded in training."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    try:
        simplejpeg.decode_jpeg(data, "RGB")  # is stricter than Pillow
    except ValueError:
        return False
    return True
