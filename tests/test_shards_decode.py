"""Decoding of unusual, corrupt and crashing inputs: each is decoded, or skipped for a reason.

The videos and images are drawn here, so that their colours, frames and times are known.
"""

import faulthandler
import io
import itertools
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import simplejpeg
from conftest import ROOT
from PIL import Image
from streaming import LocalDataset
from test_data_prep import BIKES

import data_prep
from data_prep import convert
from shards import workers
from shards.decode import Recipe, read_clips, read_image
from shards.format import decode_frame
from shards.inspect import verify

ODD = Path(__file__).parent / "data" / "odd_inputs"
CORNERS = np.array(  # red and green above blue and yellow
    [[(220, 30, 30), (30, 200, 40)], [(40, 60, 220), (230, 220, 40)]], np.uint8
)
LUMA = np.array([0.299, 0.587, 0.114])
CODED = {  # {standard: weights of red and blue in luma}
    "ITU601": (0.299, 0.114),
    "ITU709": (0.2126, 0.0722),
    "BT2020": (0.2627, 0.0593),
}
TAGS = {"ITU601": 6, "ITU709": 1, "BT2020": 9}
TITLE = "Café"
VARIABLE = [0, 40, 100, 500, 520, 900, 1000, 1500, 1530, 1700, 1900, 2000]  # ms


def draw(number: int = 0, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Draw four colours, and a central square whose grey shows the frame -> (H, W, 3) uint8."""
    width, height = size
    rows, columns = (np.arange(side) >= side // 2 for side in (height, width))
    picture = CORNERS[rows.astype(int)[:, None], columns.astype(int)]
    side = min(size) // 4
    picture[height // 2 - side : height // 2 + side, width // 2 - side : width // 2 + side] = (
        20 + 18 * number
    )
    return picture


def corners(picture: np.ndarray) -> np.ndarray:
    """Return the four colours of a picture by `draw` -> (2, 2, 3)."""
    height, width = picture.shape[:2]
    return picture[
        np.ix_((height // 8, height - 1 - height // 8), (width // 8, width - 1 - width // 8))
    ].astype(int)


def number_of(picture: np.ndarray) -> float:
    """Return the number of the frame that a picture by `draw` shows."""
    height, width = picture.shape[:2]
    return (
        picture[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4].mean() - 20
    ) / 18


def to_yuv(picture: np.ndarray, standard: str, full: bool) -> np.ndarray:
    """Convert RGB (H, W, 3) to YCbCr 4:4:4 (3, H, W), both uint8, by the formula of a standard."""
    red, blue = CODED[standard]
    r, g, b = np.moveaxis(picture / 255, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = np.stack([(b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)])
    base, span, wide = (0, 255, 255) if full else (16, 219, 224)
    values = np.concatenate([base + span * luma[None], 128 + wide * chroma])
    return np.round(values).astype(np.uint8)


def write_video(
    path: Path,
    codec: str = "libx264",
    layout: str = "yuv420p",
    frames: int = 12,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    times: list[int] | None = None,
    options: dict | None = None,
    container: dict | None = None,
    tagged: tuple[str, bool] | None = None,
    alpha: bool = False,
    interlaced: bool = False,
    title: str = "",
) -> None:
    """Write a video of pictures by `draw`.

    Args:
        times: of the frames, in ms.
        tagged: standard of the colours, and whether they have the full range.
        alpha: makes half of the picture transparent.
        interlaced: replaces the picture by even rows of one grey and odd rows of another.
    """
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        file.metadata["title"] = title
        stream.width, stream.height = size
        stream.pix_fmt = layout
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if tagged:
            stream.codec_context.colorspace, stream.codec_context.color_range = (
                TAGS[tagged[0]],
                1 + tagged[1],
            )
        for number in range(frames):
            picture = draw(number, size)
            if interlaced:
                picture[0::2], picture[1::2] = 60, 180
            if tagged:
                planes = to_yuv(picture, *tagged)
                frame = av.VideoFrame.from_ndarray(planes, format=layout)
                frame.colorspace, frame.color_range = TAGS[tagged[0]], 1 + tagged[1]
            elif alpha:
                opaque = np.full((*picture.shape[:2], 1), 255, np.uint8)
                opaque[: size[1] // 2] = 0
                frame = av.VideoFrame.from_ndarray(
                    np.concatenate([picture, opaque], -1), format="rgba"
                )
            else:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def patch_matrix(path: Path, *matrix: int) -> None:
    """Overwrite the display matrix of an mp4: x' = ax + cy, y' = bx + dy."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    offset = data.index(b"tkhd") + 4 + 4 + 4 + 4 + 4 + 4 + 4 + 8 + 2 + 2 + 2 + 2
    assert struct.unpack_from(">9i", data, offset) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, offset, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def patch_edit(path: Path, first: int, frames: int) -> None:
    """Change the edit list of an mp4 at 10 Hz to show `frames` frames from frame `first` on."""
    data = bytearray(path.read_bytes())
    offset = data.index(b"elst") + 4 + 4 + 4
    begin = struct.unpack_from(">i", data, offset + 4)[0]
    unit = struct.unpack_from(">I", data, data.index(b"mdhd") + 4 + 4 + 4 + 4)[0]
    struct.pack_into(">Ii", data, offset, frames * 100, begin + first * unit // 10)
    path.write_bytes(data)


def patch_title(path: Path) -> None:
    """Overwrite the title by one in Latin-1, which is not valid UTF-8."""
    data = path.read_bytes()
    assert data.count(TITLE.encode()) == 1
    path.write_bytes(data.replace(TITLE.encode(), TITLE.encode("latin-1") + b" "))


B_FRAMES = {"options": {"bf": "2"}}
QUIET = {"options": {"x265-params": "log-level=none"}}
SHARP = {"options": {"crf": "4"}}
PLAIN = {  # {file of 12 frames at 10 Hz: arguments of write_video}
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.mov": {},
    "h264.flv": {},
    "h264.ts": {},
    "h264_fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "h264_b_frames.avi": {"options": {"bf": "3"}},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", **B_FRAMES},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4.m4v": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, **B_FRAMES},
    "mpeg2.ts": {"codec": "mpeg2video", "rate": 25, **B_FRAMES},
    "mpeg1.mpeg": {"codec": "mpeg1video", "rate": 25},
    "sorenson.flv": {"codec": "flv1"},
    "wmv2.wmv": {"codec": "wmv2"},
    "h263.3gp": {"codec": "h263", "size": (128, 96), "rate": 25},
    "hevc.mp4": {"codec": "libx265", **QUIET},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1", "size": (64, 64)},
    "mjpeg.mov": {"codec": "mjpeg", "layout": "yuvj420p"},
    "lossless.avi": {"codec": "huffyuv", "layout": "rgb24"},
    "uncompressed.avi": {"codec": "rawvideo", "layout": "bgr24"},
    "odd_size.mp4": {"size": (51, 37), "layout": "yuv444p"},
    "odd_size.webm": {"codec": "libvpx-vp9", "size": (51, 37)},
    "odd_size.mkv": {"codec": "ffv1", "size": (51, 37)},
    "10_bit_hevc.mp4": {"codec": "libx265", "layout": "yuv420p10le", **QUIET},
    "10_bit_h264.mp4": {"layout": "yuv420p10le"},
    "10_bit_prores.mov": {"codec": "prores_ks", "layout": "yuv422p10le"},
    "10_bit.mkv": {"codec": "ffv1", "layout": "yuv420p10le"},
    "bt601.mp4": {"layout": "yuv444p", "tagged": ("ITU601", False), **SHARP},
    "bt709.mp4": {"layout": "yuv444p", "tagged": ("ITU709", False), **SHARP},
    "bt2020.mp4": {"layout": "yuv444p", "tagged": ("BT2020", False), **SHARP},
    "full_range_bt601.mp4": {"layout": "yuvj444p", "tagged": ("ITU601", True), **SHARP},
    "full_range_bt709.mp4": {"layout": "yuvj444p", "tagged": ("ITU709", True), **SHARP},
    "begins_at_5_s.mp4": {"times": [5000 + 100 * number for number in range(12)]},
    "begins_at_5_s.mkv": {"times": [5000 + 100 * number for number in range(12)]},
    "begins_at_5_s.ts": {"times": [5000 + 100 * number for number in range(12)]},
    "mp4_named.avi": {},
    "latin_title.avi": {"codec": "mpeg4", "title": TITLE},
    "latin_title.mp4": {"title": TITLE},
}
ALPHA = {  # {file: codec, layout}
    "alpha_vp8.webm": ("libvpx", "yuva420p"),
    "alpha_vp9.webm": ("libvpx-vp9", "yuva420p"),
    "alpha_animation.mov": ("qtrle", "argb"),
    "alpha_png.mov": ("png", "rgba"),
    "alpha_prores.mov": ("prores_ks", "yuva444p10le"),
    "alpha_ffv1.mkv": ("ffv1", "bgra"),
    "alpha_huffyuv.avi": ("huffyuv", "bgra"),
}
TURNED = {  # {file: (display matrix, what a player does to the stored picture)}
    "turned_90.mp4": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "turned_180.mp4": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "turned_270.mp4": ((0, -1, 1, 0), lambda picture: np.rot90(picture)),
    "mirrored.mp4": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "upside_down.mp4": ((1, 0, 0, -1), lambda picture: picture[::-1]),
    "mirrored_turned_90.mp4": ((0, 1, 1, 0), lambda picture: np.swapaxes(picture, 0, 1)),
}
INTERLACED = {
    "interlaced_mpeg2.mpg": {
        "codec": "mpeg2video",
        "rate": 25,
        "options": {"flags": "+ildct+ilme", "top": "1"},
    },
    "interlaced_h264.mp4": {"options": {"x264-params": "tff=1"}},
}
UNEVEN = {
    "variable_rate.mp4": {},
    "variable_rate.mkv": {},
    "variable_rate.webm": {"codec": "libvpx-vp9"},
    "variable_rate.mov": {"codec": "libx265", **QUIET},
}
FEW = {
    "one_frame.mp4": 1,
    "one_frame.webm": 1,
    "one_frame.avi": 1,
    "one_frame.flv": 1,
    "three_frames.mp4": 3,
}
CODECS = {".webm": "libvpx", ".avi": "mpeg4", ".flv": "flv1"}
BAD_VIDEOS = {
    "sound_only.mp4": "no video stream",
    "jpeg_named.mp4": "a still picture",
    "png_named.mkv": "a still picture",
    "empty.mp4": "Invalid",
    "text.avi": "Invalid data",
    "cut_index_last.mp4": "Invalid data",
    "cut_index_first.mp4": "truncated: ",
    "cut.mkv": "truncated: ",
    "unknown_codec.mp4": "no decoder",
}


def write_videos(folder: Path) -> None:
    for name, arguments in (PLAIN | INTERLACED).items():
        made = folder / ("aside.mp4" if name == "mp4_named.avi" else name)
        write_video(made, **arguments, interlaced=name in INTERLACED)
        made.rename(folder / name)
        if "title" in arguments:
            patch_title(folder / name)
    for name, (codec, layout) in ALPHA.items():
        options = {"auto-alt-ref": "0"} if codec == "libvpx" else None
        write_video(folder / name, codec, layout, alpha=True, options=options)
    for name, (matrix, _) in TURNED.items():
        write_video(folder / name)
        patch_matrix(folder / name, *matrix)
    for name, arguments in UNEVEN.items():
        write_video(folder / name, times=VARIABLE, **arguments)
    for name, frames in FEW.items():
        write_video(folder / name, CODECS.get(Path(name).suffix, "libx264"), frames=frames)
    write_video(folder / "grey.mkv", "ffv1", "gray")
    write_video(folder / "edit_begins_late.mp4")
    patch_edit(folder / "edit_begins_late.mp4", 6, 6)
    write_video(folder / "edit_ends_early.mp4")
    patch_edit(folder / "edit_ends_early.mp4", 0, 8)
    write_sound(folder / "sound_only.mp4")
    Image.fromarray(draw()).save(folder / "jpeg_named.mp4", "JPEG")
    Image.fromarray(draw()).save(folder / "png_named.mkv", "PNG")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.avi").write_text("this is no video")
    write_video(folder / "unknown_codec.mp4")
    data = (folder / "unknown_codec.mp4").read_bytes()
    (folder / "unknown_codec.mp4").write_bytes(
        data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC")
    )
    for name in ("cut_index_last.mp4", "cut_index_first.mp4", "cut.mkv"):
        write_video(
            folder / name,
            "mjpeg",
            "yuvj420p",
            container={"movflags": "faststart"} if "first" in name else {},
        )
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 6 // 10])


def zoo(folder: Path, recipe: Recipe, write) -> SimpleNamespace:
    (folder / "in").mkdir()
    write(folder / "in")
    report = convert(str(folder / "in"), str(folder / "out"), recipe, 2, max_skipped=1.0)
    data = LocalDataset(str(folder / "out"))
    samples = {data[i]["name"]: data[i] for i in range(len(data))}
    return SimpleNamespace(source=folder / "in", out=folder / "out", report=report, samples=samples)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> SimpleNamespace:
    """Convert the videos of the zoo, with four frames of each."""
    return zoo(tmp_path_factory.mktemp("videos"), Recipe("videos", frames=4), write_videos)


def frames_of(sample: dict) -> list[np.ndarray]:
    return [decode_frame(sample, index) for index in range(len(sample["ends"]))]


def times_of(path: Path) -> list[float]:
    """Return the time of every frame in seconds, by decoding all of them."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return [frame.time for frame in container.decode(video=0)]


def assert_outcome(found: SimpleNamespace, kept: set[str], skipped: dict[str, str]) -> None:
    reasons = dict(found.report["skipped"])
    assert found.samples.keys() == kept and reasons.keys() == skipped.keys()
    assert {
        name: reasons[name] for name, word in skipped.items() if word not in reasons[name]
    } == {}
    assert found.report["samples"] == len(kept) and found.report["inputs"] == len(kept) + len(
        skipped
    )
    assert verify(str(found.out), 2) == []


def test_every_video_of_the_zoo_is_kept_or_skipped_for_its_reason(videos):
    edited = {"grey.mkv", "edit_begins_late.mp4", "edit_ends_early.mp4"}
    assert_outcome(
        videos, {*PLAIN, *ALPHA, *TURNED, *INTERLACED, *UNEVEN, *FEW, *edited}, BAD_VIDEOS
    )
    assert videos.report["short"] == len(FEW)


@pytest.mark.parametrize("name", PLAIN)
def test_video_keeps_its_colours_size_frames_and_times(videos, name):
    arguments, sample = PLAIN[name], videos.samples[name]
    pictures, rate = frames_of(sample), arguments.get("rate", 10)
    width, height = arguments.get("size", (64, 48))
    assert [picture.shape for picture in pictures] == [(height, width, 3)] * 4
    assert [number_of(picture) for picture in pictures] == pytest.approx([1, 4, 7, 10], abs=0.45)
    tolerance = 4 if "tagged" in arguments else 8  # levels
    assert max(np.abs(corners(picture) - CORNERS).max() for picture in pictures) <= tolerance
    # AVI stores no display times, and PyAV guesses them.
    times = np.arange(12) / rate if name.endswith("avi") else times_of(videos.source / name)
    assert sample["timestamps"] == pytest.approx([times[i] for i in (1, 4, 7, 10)], abs=1e-6)


@pytest.mark.parametrize("name", ALPHA)
def test_video_with_alpha_is_stored_on_white(videos, name):
    for picture, number in zip(frames_of(videos.samples[name]), (1, 4, 7, 10), strict=True):
        assert picture[:16].min() >= 250
        assert np.abs(corners(picture)[1] - CORNERS[1]).max() <= 8
        assert (picture[28:32, 28:36].mean() - 20) / 18 == pytest.approx(number, abs=0.45)


def test_colour_standards_differ_by_more_than_the_tolerance():
    given = [
        to_yuv(CORNERS, *arguments["tagged"]).astype(int)
        for arguments in PLAIN.values()
        if "tagged" in arguments
    ]
    assert len(given) == 5
    for one, other in itertools.combinations(given, 2):
        # A colour within 4 levels in RGB is within 5 levels in YCbCr.
        assert np.abs(one - other).max() > 5


@pytest.mark.parametrize("name", TURNED)
def test_turned_video_is_stored_as_a_player_shows_it(videos, name):
    pictures, shown = frames_of(videos.samples[name]), TURNED[name][1]
    assert [picture.shape for picture in pictures] == [shown(draw()).shape] * 4
    assert max(np.abs(corners(picture) - shown(CORNERS)).max() for picture in pictures) <= 8
    assert [number_of(picture) for picture in pictures] == pytest.approx([1, 4, 7, 10], abs=0.45)


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_video_keeps_both_fields_in_each_frame(videos, name):
    with av.open(str(videos.source / name)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    for picture in frames_of(videos.samples[name]):
        assert (
            np.abs(picture[0::2].astype(int) - 60).max() <= 4
            and np.abs(picture[1::2].astype(int) - 180).max() <= 4
        )


def test_grey_video_keeps_its_luma_in_three_channels(videos):
    luma = (CORNERS @ LUMA)[..., None].repeat(3, -1)
    pictures = frames_of(videos.samples["grey.mkv"])
    assert all(np.abs(corners(picture) - luma).max() <= 4 for picture in pictures)
    assert [number_of(picture) for picture in pictures] == pytest.approx([1, 4, 7, 10], abs=0.45)


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize(
    "recipe", [Recipe("videos", frames=12), Recipe("videos", fps=10)], ids=["frames", "fps"]
)
def test_video_of_variable_rate_gives_the_frame_on_screen_at_each_wanted_time(videos, name, recipe):
    with (videos.source / name).open("rb") as file:
        ((frames, times),) = read_clips(file, recipe)
    last = float(np.median(np.diff(VARIABLE)))  # assumed duration of the last frame
    length = (VARIABLE[-1] + last) / 1000
    wanted = np.arange(int(10 * length)) / 10 if recipe.fps else (np.arange(12) + 0.5) * length / 12
    shown = [max(n for n in range(12) if VARIABLE[n] / 1000 <= time + 1e-9) for time in wanted]
    assert [number_of(simplejpeg.decode_jpeg(frame)) for frame in frames] == pytest.approx(
        shown, abs=0.45
    )
    assert times == pytest.approx([VARIABLE[n] / 1000 for n in shown], abs=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_video_with_fewer_frames_than_wanted_repeats_them_in_order(videos, name):
    numbers = [0, 0, 0, 0] if FEW[name] == 1 else [0, 1, 1, 2]
    assert [number_of(picture) for picture in frames_of(videos.samples[name])] == pytest.approx(
        numbers, abs=0.45
    )
    assert videos.samples[name]["timestamps"] == pytest.approx(np.array(numbers) / 10, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "numbers", "first"),
    [("edit_begins_late.mp4", [6, 8, 9, 11], 6), ("edit_ends_early.mp4", [1, 3, 5, 7], 0)],
)
def test_frames_hidden_by_an_edit_list_are_not_taken(videos, name, numbers, first):
    sample = videos.samples[name]
    assert [number_of(picture) for picture in frames_of(sample)] == pytest.approx(numbers, abs=0.45)
    assert sample["timestamps"] == pytest.approx((np.array(numbers) - first) / 10, abs=1e-6)
    assert set(sample["timestamps"].round(6)) <= set(np.round(times_of(videos.source / name), 6))


@pytest.mark.parametrize("path", sorted(BIKES.parent.glob("*.mp4")), ids=lambda path: path.stem)
def test_real_clip_gives_the_frames_and_times_of_a_full_decode(tmp_path, path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / path.name).symlink_to(path)
    convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("videos", short_side=1000), 1)
    sample, times = LocalDataset(str(tmp_path / "out"))[0], times_of(path)
    length = times[-1] + times[1] - 2 * times[0]
    wanted = [times[0] + (i + 0.5) / 16 * length for i in range(16)]
    shown = [max(n for n, time in enumerate(times) if time <= one + 1e-3) for one in wanted]
    assert sample["timestamps"].tolist() == pytest.approx([times[n] for n in shown], abs=1e-9)
    kept = dict(zip(shown, frames_of(sample), strict=True))
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in kept:
                error = np.abs(kept.pop(number).astype(int) - frame.to_ndarray(format="rgb24"))
                assert error.mean() < 2.5
    assert not kept


def read(path: Path, **settings) -> tuple[list[np.ndarray], list[float]]:
    """Return the stored frames of a video as pixels, and their times."""
    with path.open("rb") as file:
        ((frames, times),) = read_clips(file, Recipe("videos", **settings))
    return [simplejpeg.decode_jpeg(frame) for frame in frames], times


@pytest.mark.parametrize("path", sorted(ODD.glob("*.avi")), ids=lambda path: path.stem)
def test_avi_with_empty_chunks_is_kept(path):
    pictures, times = read(path, frames=4)
    assert [picture.shape for picture in pictures] == [(64, 96, 3)] * 4
    assert times == sorted(times)


@pytest.mark.parametrize("name", ["mpeg4.avi", "h264.mkv", "h264.flv"])
def test_video_cut_in_the_middle_is_refused(tmp_path, videos, name):
    data = (videos.source / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises((ValueError, av.FFmpegError), match=r"truncated: |Invalid data"):
        read(tmp_path / name)


def test_frames_of_a_clip_have_the_size_of_its_first_frame():
    pictures, _ = read(ODD / "h264_rotate.ts", short_side=90)
    assert {picture.shape for picture in pictures} == {(90, 160, 3)}


def test_orientation_in_the_stream_turns_the_frames_until_the_next_key_frame():
    pictures, _ = read(ODD / "sei90.mp4", frames=12)
    assert {picture.shape for picture in pictures} == {(160, 96, 3)}


@pytest.mark.parametrize("left", [2, 6, 30])
def test_left_crop_of_h264_is_applied_exactly(tmp_path, left):
    crop = {"x264-params": f"crop-rect={left},0,2,0", "crf": "4"}
    write_video(tmp_path / "a.mp4", options=crop, size=(128, 64))
    pictures, _ = read(tmp_path / "a.mp4", frames=1)
    shown = draw(6, (128, 64))[:, left:-2]
    assert pictures[0].shape == shown.shape
    assert np.abs(pictures[0].astype(int) - shown).mean() <= 4


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_stream_without_container_has_times_by_its_frame_rate(tmp_path, codec):
    suffix = {"libx264": "h264", "libx265": "hevc"}[codec]
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    write_video(tmp_path / f"a.{suffix}", codec, options={"bf": "2", **quiet}, rate=25)
    (tmp_path / f"a.{suffix}").rename(tmp_path / "a.mp4")
    pictures, times = read(tmp_path / "a.mp4", frames=4)
    assert [number_of(picture) for picture in pictures] == pytest.approx([1, 4, 7, 10], abs=0.45)
    assert times == pytest.approx([0.04, 0.16, 0.28, 0.4])


def test_joined_videos_give_the_frames_of_both(tmp_path, videos):
    data = (videos.source / "h264.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(data + data)
    pictures, times = read(tmp_path / "a.ts", frames=8)
    numbers = [1, 4, 7, 10, 1, 4, 7, 10]
    assert [number_of(picture) for picture in pictures] == pytest.approx(numbers, abs=0.45)
    assert times == sorted(times)


def test_video_that_lacks_its_first_key_frame_begins_with_the_next(tmp_path):
    write_video(tmp_path / "a.ts", options={"g": "6", "bf": "0"})
    data = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(data[: 188 * 3] + data[188 * 9 :])
    pictures, _ = read(tmp_path / "a.ts", frames=4)
    assert [round(number_of(picture)) for picture in pictures] == [5, 7, 9, 11]


def test_edit_list_that_ends_long_before_the_video_is_no_truncation(tmp_path):
    write_video(tmp_path / "a.mp4", frames=13, options={"g": "3", "bf": "0"})
    patch_edit(tmp_path / "a.mp4", 0, 4)
    pictures, _ = read(tmp_path / "a.mp4", frames=4)
    assert [number_of(picture) for picture in pictures] == pytest.approx([0, 1, 2, 3], abs=0.45)


def oriented(number: int) -> np.ndarray:
    """Return CORNERS as an EXIF orientation shows them."""
    turned = np.rot90(CORNERS, {3: 2, 4: 2, 5: -1, 6: -1, 7: 1, 8: 1}.get(number, 0))
    return turned[:, ::-1] if number in (2, 4, 5, 7) else turned


def jpeg(**options) -> bytes:
    """Return a JPEG file of a picture by `draw`, 60x40."""
    mode, buffer = options.pop("mode", "RGB"), io.BytesIO()
    Image.fromarray(draw(size=(60, 40))).convert(mode).save(
        buffer, "JPEG", **{"quality": 95} | options
    )
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """Return a black PNG of one bit per pixel."""
    pixels = zlib.compress(bytes((1 + width // 8) * height), 1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def huge_progressive(width: int, height: int) -> bytes:
    """Return a small progressive JPEG whose header claims another size."""
    data = jpeg(progressive=True)
    offset = data.index(b"\xff\xc2") + 5
    return data[:offset] + struct.pack(">HH", height, width) + data[offset + 4 :]


COLOURED = {
    "cmyk.jpg": lambda: jpeg(mode="CMYK"),
    "progressive.jpg": lambda: jpeg(progressive=True),
    "rgb_inside.jpg": lambda: jpeg(keep_rgb=True),
    "full_chroma.jpg": lambda: jpeg(subsampling=0),
    "without_extension_of_its_own.PNG": jpeg,
    "broken_exif.jpg": lambda: jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
}
SAVED = {  # {file: (mode, arguments of Pillow's save)}
    "png_named.JPEG": ("RGB", {"format": "PNG"}),
    "palette.png": ("P", {}),
    "plain.bmp": ("RGB", {}),
    "plain.gif": ("P", {}),
    "plain.tif": ("RGB", {}),
    "two_pictures.jpg": (
        "RGB",
        {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (60, 40))]},
    ),
}
GREY = {"grey.jpg", "grey.png", "grey_alpha.png"}
TRANSPARENT = {  # {file: (mode, arguments of Pillow's save)}; the left half of each is transparent
    "alpha.png": ("RGBA", {}),
    "alpha.webp": ("RGBA", {"lossless": True}),
    "alpha.tif": ("RGBA", {}),
    "premultiplied.tif": ("RGBA", {"tiffinfo": {338: 1}}),
    "grey_and_alpha.png": ("LA", {}),
    "colour_key.png": ("RGB", {"transparency": (1, 2, 3)}),
    "palette.gif": ("P", {"transparency": 0}),
    "palette_key.png": ("P", {"transparency": 0}),
}
DEEP = {"16_bit.png": (60, 40), "16_bit.tif": (60, 40), "16_bit_large.png": (480, 320)}
UNTOUCHED = {
    "grey.jpg",
    "progressive.jpg",
    "rgb_inside.jpg",
    "full_chroma.jpg",
    "exif_1.jpg",
    "broken_exif.jpg",
}
BAD_IMAGES = {
    "truncated.jpg": "truncated",
    "truncated.png": "truncated",
    "huge.png": "too large: 20000x15000 pixels",
    "huge_progressive.jpg": "too large: 20000x15000 pixels",
    "32_bit.tif": "32 bits",
    "float.tif": "32 bits",
    "video_named.png": "cannot identify",
    "text.jpg": "cannot identify",
    "empty.gif": "cannot identify",
}


def half_transparent(mode: str) -> Image.Image:
    """Draw a picture of grey 90, 60x40, whose left half is transparent: index 0 or a colour key."""
    if mode == "P":
        image = Image.new("P", (60, 40), 0)
        image.putpalette([1, 2, 3, 90, 90, 90])
        image.paste(1, (30, 0, 60, 40))
        return image
    hidden = (1, 2, 3) if mode == "RGB" else (1, 2, 3, 0)
    image = Image.new("RGB" if mode == "RGB" else "RGBA", (60, 40), hidden)
    image.paste((90, 90, 90), (30, 0, 60, 40))
    return image.convert(mode)


def write_images(folder: Path) -> None:
    for name, make in COLOURED.items():
        (folder / name).write_bytes(make())
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        (folder / f"exif_{number}.jpg").write_bytes(jpeg(exif=exif))
    for name, (mode, options) in SAVED.items():
        picture = Image.fromarray(draw(size=(60, 40)))
        picture = picture.quantize(16) if mode == "P" else picture.convert(mode)
        if mode == "RGBA":
            picture.putalpha(128)
        picture.save(folder / name, **options)
    for name, (mode, options) in TRANSPARENT.items():
        half_transparent(mode).save(folder / name, **options)
    for name in GREY:
        Image.fromarray(draw(size=(60, 40))).convert("LA" if "alpha" in name else "L").save(
            folder / name
        )
    for name, (width, height) in DEEP.items():
        ramp = np.linspace(0, 65535, width).astype(np.uint16)
        Image.fromarray(np.tile(ramp, (height, 1))).save(folder / name)
    Image.fromarray(draw(size=(480, 320))).save(folder / "large.png")
    ramp = np.linspace(0, 65535, 2400).reshape(40, 60)
    Image.fromarray(ramp.astype(np.int32)).save(folder / "32_bit.tif")
    Image.fromarray(ramp.astype(np.float32)).save(folder / "float.tif")
    (folder / "truncated.jpg").write_bytes(jpeg()[:-300])
    (folder / "truncated.png").write_bytes((folder / "large.png").read_bytes()[:-300])
    (folder / "huge.png").write_bytes(huge_png(20000, 15000))
    (folder / "huge_progressive.jpg").write_bytes(huge_progressive(20000, 15000))
    write_video(folder / "aside.mp4")
    (folder / "aside.mp4").rename(folder / "video_named.png")
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.gif").write_bytes(b"")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> SimpleNamespace:
    return zoo(tmp_path_factory.mktemp("images"), Recipe("images", short_side=64), write_images)


def test_every_image_of_the_zoo_is_kept_or_skipped_for_its_reason(images):
    turned = {f"exif_{number}.jpg" for number in range(1, 9)}
    assert_outcome(
        images, {*COLOURED, *SAVED, *GREY, *TRANSPARENT, *DEEP, *turned, "large.png"}, BAD_IMAGES
    )
    assert images.report["short"] == 0


@pytest.mark.parametrize("name", [*COLOURED, *SAVED])
def test_image_keeps_its_colours(images, name):
    (picture,) = frames_of(images.samples[name])
    assert picture.shape == (40, 60, 3) and np.abs(corners(picture) - CORNERS).max() <= 8
    assert images.samples[name]["timestamps"].tolist() == [0.0]


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize(
    ("background", "colour"), [("white", 255), ("black", 0), ("#204060", (32, 64, 96))]
)
def test_image_with_alpha_is_stored_on_the_background(images, name, background, colour):
    with (images.source / name).open("rb") as file:
        (data,), _ = read_image(file, Recipe("images", background=background))
    picture = simplejpeg.decode_jpeg(data).astype(int)
    assert np.abs(picture[:, :20] - colour).max() <= 4
    assert np.abs(picture[:, 40:] - 90).max() <= 4


def test_background_that_is_no_colour_is_refused():
    with pytest.raises(ValueError, match="--background blanc: must be a colour"):
        Recipe("images", background="blanc")


def test_lab_image_keeps_its_colours(tmp_path):
    Image.frombytes("LAB", (60, 40), bytes([128, 0, 0] * 2400)).save(tmp_path / "a.tif")
    with (tmp_path / "a.tif").open("rb") as file:
        (data,), _ = read_image(file, Recipe("images"))
    assert np.abs(simplejpeg.decode_jpeg(data).astype(int) - 119).max() <= 4  # L* = 50


@pytest.mark.parametrize("path", sorted(ODD.glob("*.jpg")), ids=lambda path: path.stem)
def test_image_with_a_broken_exif_tag_is_kept(path):
    with path.open("rb") as file:
        (data,), _ = read_image(file, Recipe("images"))
    assert simplejpeg.decode_jpeg_header(data)[:2] == (60, 40)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_image_with_an_orientation_that_does_not_exist_is_kept_byte_for_byte(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    given = jpeg(exif=exif)
    assert read_image(io.BytesIO(given), Recipe("images"))[0] == [given]


def test_png_with_a_long_comment_or_a_broken_profile_is_kept():
    buffer = io.BytesIO()
    Image.fromarray(draw()).save(buffer, "PNG")
    header, rest = buffer.getvalue()[:33], buffer.getvalue()[33:]
    comment = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(3 << 20)))
    profile = png_chunk(b"iCCP", b"icc\0\0this is not compressed")
    (data,), _ = read_image(io.BytesIO(header + comment + profile + rest), Recipe("images"))
    assert np.abs(corners(simplejpeg.decode_jpeg(data)) - CORNERS).max() <= 8


@pytest.mark.parametrize("number", range(1, 9))
def test_image_is_stored_upright_by_its_exif_orientation(images, number):
    (picture,) = frames_of(images.samples[f"exif_{number}.jpg"])
    assert picture.shape == ((40, 60, 3) if number < 5 else (60, 40, 3))
    assert np.abs(corners(picture) - oriented(number)).max() <= 8


@pytest.mark.parametrize("name", sorted(GREY))
def test_grey_image_keeps_its_luma_in_three_channels(images, name):
    (picture,) = frames_of(images.samples[name])
    luma = (CORNERS @ LUMA)[..., None].repeat(3, -1)
    assert picture.shape == (40, 60, 3) and np.abs(corners(picture) - luma).max() <= 4


@pytest.mark.parametrize("name", DEEP)
def test_image_of_16_bits_is_scaled_to_8_bits_and_not_clipped(images, name):
    (picture,) = frames_of(images.samples[name])
    assert min(picture.shape[:2]) == min(DEEP[name][1], 64)
    ramp = np.linspace(0, 255, picture.shape[1])[None, :, None]
    assert np.abs(picture - ramp).max() <= 6


def test_large_image_is_scaled_and_keeps_its_colours(images):
    (picture,) = frames_of(images.samples["large.png"])
    assert picture.shape == (64, 96, 3) and np.abs(corners(picture) - CORNERS).max() <= 8


def test_only_small_upright_jpegs_are_stored_byte_for_byte(images):
    same = {
        name
        for name, sample in images.samples.items()
        if sample["frames"] == (images.source / name).read_bytes()
    }
    assert same == UNTOUCHED | {"without_extension_of_its_own.PNG"}


PEAKS = """
import json, resource, sys
from data_prep import convert
from shards.decode import Recipe
peaks = []
for folder in ("small", "huge"):
    source = f"{sys.argv[1]}/{folder}"
    report = convert(source, f"{source}_out", Recipe("images"), 1, max_skipped=1.0)
    peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
print(json.dumps([*peaks, report["samples"], report["skipped"]]))
"""


def test_huge_images_take_little_memory(tmp_path):
    for folder in ("small", "huge"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "small.jpg").write_bytes(jpeg())
    Image.new("L", (20000, 15000), 90).save(
        tmp_path / "huge" / "huge.jpg", quality=50
    )  # 300 MB when decoded
    (tmp_path / "huge" / "huge.png").write_bytes(huge_png(20000, 15000))
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    before, after, samples, skipped = json.loads(result.stdout.splitlines()[-1])  # MB
    assert samples == 2 and skipped == [["huge.png", "ValueError: too large: 20000x15000 pixels"]]
    assert after - before < 100
    (picture,) = frames_of(LocalDataset(str(tmp_path / "huge_out"))[0])
    assert picture.shape == (256, 341, 3) and np.abs(picture.astype(int) - 90).max() <= 3


def corrupt(data: bytes, rng: np.random.Generator) -> bytes:
    """Corrupt a file in one of six ways: flip, truncate, zero, copy, swap or insert bytes."""
    corrupted = bytearray(data)
    begin, end = sorted(rng.integers(0, len(data), 2).tolist())
    size = int(rng.integers(1, 400))
    match int(rng.integers(6)):
        case 0:
            for at in rng.integers(0, len(data), int(rng.integers(1, 30))):
                corrupted[at] ^= 1 << int(rng.integers(8))
        case 1:
            del corrupted[end:]
        case 2:
            corrupted[begin : begin + size] = bytes(len(corrupted[begin : begin + size]))
        case 3:
            corrupted[end:end] = corrupted[begin : begin + size]
        case 4:
            one, other = corrupted[begin : begin + size], corrupted[end : end + size]
            corrupted[end : end + size], corrupted[begin : begin + size] = one, other
        case 5:
            corrupted[begin:begin] = rng.bytes(size)
    return bytes(corrupted)


def cut_bikes(path: Path, frames: int = 25) -> None:
    """Write the first frames of bikes.mp4 without encoding them again."""
    with av.open(str(BIKES)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in itertools.islice(source.demux(video=0), frames):
            packet.stream = stream
            target.mux(packet)


def write_corrupt(folder: Path, originals: Path, kind: str, count: int) -> None:
    if kind == "videos":
        cut_bikes(originals / "bikes.mp4")
        for name in ("h264.mp4", "vp8.webm", "mpeg4_b_frames.avi", "h264.mkv", "h264.ts"):
            write_video(originals / name, **PLAIN[name])
    else:
        for name, data in (
            ("a.jpg", jpeg()),
            ("b.jpg", jpeg(progressive=True)),
            ("c.jpg", jpeg(mode="CMYK")),
        ):
            (originals / name).write_bytes(data)
        Image.fromarray(draw()).save(originals / "d.png")
    rng, sources = np.random.default_rng(0), sorted(originals.iterdir())
    for number in range(count):
        source = sources[number % len(sources)]
        (folder / f"{number:04d}{source.suffix}").write_bytes(corrupt(source.read_bytes(), rng))


def children() -> set[str]:
    """Return the ids of the child processes of this process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if parent == str(os.getpid()):
            found.add(stat.parent.name)
    return found


@pytest.mark.parametrize(("kind", "count"), [("videos", 360), ("images", 240)])
def test_corrupt_files_are_decoded_or_skipped_and_no_process_is_left(
    tmp_path, monkeypatch, kind, count
):
    monkeypatch.setattr(data_prep, "PART_SIZE", 20)
    (tmp_path / "in").mkdir()
    (tmp_path / "originals").mkdir()
    write_corrupt(tmp_path / "in", tmp_path / "originals", kind, count)
    before, running = children(), set(multiprocessing.active_children())
    report = convert(
        str(tmp_path / "in"), str(tmp_path / "out"), Recipe(kind, frames=4), 2, max_skipped=1.0
    )
    assert report["inputs"] == count == report["samples"] + len(report["skipped"])
    assert 0.2 * count < report["samples"] < count
    assert all(reason for _, reason in report["skipped"])
    assert verify(str(tmp_path / "out"), 2) == []
    assert children() <= before and set(multiprocessing.active_children()) <= running


def test_input_that_crashes_or_hangs_the_decoder_is_the_only_one_skipped(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(8):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(jpeg(quality=80 + number))
    read = read_image

    def crashing(file, recipe):
        name = os.path.basename(file.name)
        if name in ("0.jpg", "5.jpg"):
            faulthandler.disable()  # pytest enables it, and it would print the stack
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "3.jpg":
            any(itertools.repeat(False))  # runs in C for ever
        return read(file, recipe)

    monkeypatch.setattr(data_prep, "read_image", crashing)
    monkeypatch.setattr(workers, "TIME_LIMIT", 1)
    monkeypatch.setattr(data_prep, "PART_SIZE", 6)
    report = convert(
        str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 2, max_skipped=0.5
    )
    assert dict(report["skipped"]) == {
        "0.jpg": "ValueError: crashed the decoder (SIGSEGV)",
        "3.jpg": "ValueError: took longer than 1 s to decode",
        "5.jpg": "ValueError: crashed the decoder (SIGSEGV)",
    }
    data = LocalDataset(str(tmp_path / "out"))
    assert [data[i]["name"] for i in range(len(data))] == [
        "1.jpg",
        "2.jpg",
        "4.jpg",
        "6.jpg",
        "7.jpg",
    ]
    for sample in (data[i] for i in range(len(data))):
        assert sample["frames"] == (tmp_path / "in" / sample["name"]).read_bytes()
    assert not list((tmp_path / "out").glob("*.tmp")) and verify(str(tmp_path / "out"), 1) == []
