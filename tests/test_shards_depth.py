"""shards/depth.py: SUN RGB-D's depth maps, their storage without loss, and what a model sees."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import data_prep
from shards.demo import CLASSES, draw_depth_demo
from shards.depth import (
    DepthMap,
    decode_depth,
    decode_disparity,
    encode_depth,
    read_rotated,
)
from shards.finetuning_views import FinetuningViews
from shards.format import Clips, decode_frame, encode_clip
from shards.inspect import verify
from shards.layouts import SCENES
from shards.views import EvalViews

ALL_VALUES = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
PLAIN = {"crop_scale": (0.2, 1.0), "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rotated(millimetres: np.ndarray) -> np.ndarray:
    """Return each number with its 16 binary digits rotated by 3 to the left."""
    digits = [format(value, "016b") for value in millimetres.flatten().tolist()]
    values = [int(text[3:] + text[:3], 2) for text in digits]
    return np.array(values, np.uint16).reshape(millimetres.shape)


def test_depth_is_read_from_the_rotated_bits_that_sun_rgbd_publishes():
    assert (read_rotated(io.BytesIO(png(rotated(ALL_VALUES)))) == ALL_VALUES).all()
    assert rotated(np.array([[1234]])).item() == 8 * 1234
    with pytest.raises(ValueError, match="depth map of mode L: must have 16 bits per pixel"):
        read_rotated(io.BytesIO(png(ALL_VALUES.astype(np.uint8))))


def test_every_depth_of_16_bits_is_stored_without_loss():
    stored = decode_depth(encode_depth(DepthMap(ALL_VALUES, 525.3 * 0.075), (256, 256)))
    assert stored.millimetres.dtype == np.uint16
    assert (stored.millimetres == ALL_VALUES).all() and stored.scale == 525.3 * 0.075


def test_reduced_map_has_values_of_the_map_and_no_means():
    edge = np.repeat(np.array([[500, 4000]], np.uint16), 30, axis=1).repeat(40, axis=0)
    reduced = decode_depth(encode_depth(DepthMap(edge, 39.0), (20, 30))).millimetres
    assert reduced.shape == (20, 30)
    assert (reduced == np.repeat([[500, 4000]], 15, axis=1)).all()


def test_disparity_is_baseline_times_focal_length_by_depth():
    millimetres = np.array([[1300, 0, 520, 60_000]], np.uint16)
    disparity = decode_disparity(encode_depth(DepthMap(millimetres, 520 * 0.075), (1, 4)))
    # 520 pixels * 0.075 m / 1.3 m = 30 pixels of 75; missing: at most 75; 60 m counts as 50 m.
    assert disparity.shape == (1, 4, 1) and disparity.dtype == np.float32
    assert disparity.flatten().tolist() == pytest.approx([0.4, 1.0, 1.0, 0.78 / 75], rel=1e-6)


@pytest.mark.parametrize("damage", [b"", b"no picture", png(ALL_VALUES)[:400], png(ALL_VALUES)])
def test_corrupt_map_is_an_unreadable_sample(damage):
    with pytest.raises(ValueError, match="its depth map is corrupt"):
        decode_disparity(damage)


@pytest.mark.parametrize("scale", ["nan", "inf", "0.0", "-1.0"])
def test_scale_that_gives_no_disparity_is_an_error(scale):
    column = encode_depth(DepthMap(ALL_VALUES, float(scale)), ALL_VALUES.shape)
    with pytest.raises(ValueError, match=f"has the scale {scale}: must be positive and finite"):
        decode_disparity(column)


def lay_scene(folder: Path, scene: str, depth: np.ndarray, maps: str, focal: float) -> None:
    """Write an image of SUN RGB-D in the folder of its own."""
    for name in ("image", maps):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", depth.shape[::-1], (90, 90, 90)).save(folder / "image" / "0001.jpg")
    (folder / maps / "0001_abs.png").write_bytes(png(rotated(depth)))
    (folder / "intrinsics.txt").write_text(f"{focal} 0 20\n0 {focal} 15\n0 0 1 \n")
    (folder / "scene.txt").write_text(scene)


@pytest.fixture
def miniature(tmp_path) -> Path:
    """SUN RGB-D with four images to train on and one to test, as it is published."""
    root = tmp_path / "sun"
    random = np.random.default_rng(0)
    listed = {"alltrain": [], "alltest": []}
    for split, place, scene, maps, focal in (
        ("alltrain", "kv1/NYUdata/NYU0001", "lab", "depth_bfx", 520.0),
        ("alltrain", "xtion/sun3ddata/a/b/0001", "bedroom", "depth", 570.0),
        ("alltrain", "kv2/kinect2data/0002", "gym", "depth_bfx", 529.5),
        ("alltrain", "realsense/lg/0003", "lab", "depth_bfx", 691.5),
        ("alltest", "kv1/NYUdata/NYU0002", "bathroom", "depth_bfx", 520.0),
    ):
        depth = random.integers(0, 2**16, (30, 40), np.uint16)
        lay_scene(root / "SUNRGBD" / place, scene, depth, maps, focal)
        listed[split].append(f"/n/fs/sun3d/data/SUNRGBD/{place}")
    listed["alltrain"].append("/n/fs/sun3d/data/SUNRGBD/kv2/kinect2data/absent/")
    # Where the holes are not filled, the map beside the filled one is not read.
    (root / "SUNRGBD/kv1/NYUdata/NYU0001/depth").mkdir()
    (root / "SUNRGBD/kv1/NYUdata/NYU0001/depth/0001.png").write_bytes(b"not read")
    table = root / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    table.parent.mkdir(parents=True)
    savemat(table, {name: np.array(paths, object) for name, paths in listed.items()})
    return root


def convert(root: Path, out: Path, *options: str) -> Path:
    data_prep.main(["sunrgbd", str(root), str(out), "--workers", "1", *options])
    return out


def test_sun_rgbd_is_read_as_it_is_published(miniature, tmp_path):
    out = convert(miniature, tmp_path / "out")
    clips = Clips(str(out))
    samples = [clips[number] for number in range(len(clips))]
    names = [sample["name"].split("/")[1] for sample in samples]
    assert names == ["kv1", "xtion", "realsense"]
    classes = json.loads((out / "classes.json").read_text())
    assert classes == sorted(SCENES) and len(classes) == 19
    assert [classes[sample["label"]] for sample in samples] == ["lab", "bedroom", "lab"]
    scales = [decode_depth(sample["depth"]).scale for sample in samples]
    assert scales == pytest.approx([520 * 0.075, 570 * 0.095, 691.5 * 0.095])
    random = np.random.default_rng(0)
    depths = [random.integers(0, 2**16, (30, 40), np.uint16) for _ in range(5)]
    for sample, number in zip(samples, (0, 1, 3), strict=True):
        assert (decode_depth(sample["depth"]).millimetres == depths[number]).all()
    report = json.loads((out / "report.json").read_text())
    assert (report["absent"], report["skipped"]) == (1, [])
    assert report["ignored"]["scene that is not in the benchmark"]["count"] == 1
    assert verify(str(out), 1) == []
    test = Clips(str(convert(miniature, tmp_path / "test", "--split", "test")))
    assert len(test) == 1 and (decode_depth(test[0]["depth"]).millimetres == depths[4]).all()


def test_reduced_image_and_its_map_have_one_size(miniature, tmp_path):
    out = convert(miniature, tmp_path / "out", "--short-side", "10")
    sample = Clips(str(out))[1]
    assert decode_frame(sample, 0).shape == (10, 13, 3)
    assert decode_depth(sample["depth"]).millimetres.shape == (10, 13)
    assert verify(str(out), 1) == []


def remove(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda scene: remove(scene / "depth_bfx"), "has no depth map in depth_bfx/ or depth/"),
        (lambda scene: remove(scene / "intrinsics.txt"), "No such file"),
        (lambda scene: (scene / "intrinsics.txt").write_text("\n"), "IndexError"),
        (lambda scene: (scene / "depth_bfx" / "0001_abs.png").write_bytes(b"x"), "cannot identify"),
    ],
)
def test_image_without_an_intact_depth_map_is_skipped_and_named(
    miniature, tmp_path, damage, reason
):
    damage(miniature / "SUNRGBD" / "realsense" / "lg" / "0003")
    out = convert(miniature, tmp_path / "out", "--max-skipped", "1")
    ((name, found),) = json.loads((out / "report.json").read_text())["skipped"]
    assert "realsense" in name and reason in found and len(Clips(str(out))) == 2


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda root: None, ("--split", "val"), "--split val: SUN RGB-D has train and test"),
        (lambda root: remove(root / "SUNRGBDtoolbox"), (), "lacks SUNRGBDtoolbox/traintestSUNRGBD"),
        (lambda root: next(root.rglob("*.mat")).write_text("x"), (), "allsplit.mat is not as it"),
        (
            lambda root: remove(root / "SUNRGBD/realsense/lg/0003/scene.txt"),
            (),
            "scene.txt is not as",
        ),
    ],
)
def test_other_layout_is_rejected(miniature, tmp_path, damage, options, message):
    damage(miniature)
    with pytest.raises(ValueError, match=message):
        convert(miniature, tmp_path / "out", *options)


def test_demonstration_shows_garments_nearer_than_the_wall(demo, tmp_path):
    draw_depth_demo(tmp_path / "raw", garments=12)
    files = list((demo / "raw_depth" / "SUNRGBD").rglob("*.*"))
    assert len(files) == 4 * 240
    for file in files:
        other = tmp_path / "raw" / file.relative_to(demo / "raw_depth")
        assert file.read_bytes() == other.read_bytes()
    clips = Clips(str(demo / "test_depth"))
    assert {clips[number]["label"] for number in range(len(clips))} == set(range(10))
    assert json.loads((demo / "test_depth" / "classes.json").read_text()) == sorted(CLASSES)
    for number in range(0, 120, 10):
        colours = decode_frame(clips[number], 0).max(axis=2)
        depth = decode_depth(clips[number]["depth"]).millimetres.astype(float)
        assert depth[colours > 150].mean() < depth[colours < 70].mean() - 500


def test_demonstration_of_an_earlier_version_gets_its_depth(demo, tmp_path):
    without = shutil.ignore_patterns("raw", "*_depth")
    old = shutil.copytree(demo, tmp_path / "demo", ignore=without)
    kept = {path: path.stat().st_mtime_ns for path in old.rglob("*.*")}
    data_prep.make_demo(str(old), workers=1, garments=12)
    assert kept and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for name in ("train_depth", "test_depth"):
        ours, theirs = old / name / "index.json", demo / name / "index.json"
        assert ours.read_text() == theirs.read_text()


def rgbd_sample() -> dict:
    """Return a picture that is 200 times as bright as its disparity."""
    levels = np.linspace(0.2, 0.9, 48)[None] * np.linspace(0.5, 1, 40)[:, None]
    pixels = np.repeat((levels * 200)[..., None], 3, axis=2).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=100, subsampling=0)
    millimetres = (39 / (75 * levels) * 1000).round().astype(np.uint16)
    sample = encode_clip([file.getvalue()], [0.0], 3, "x", DepthMap(millimetres, 39.0))
    return sample | {"of_images": True}


def test_depth_is_cropped_and_flipped_as_its_image():
    views = FinetuningViews(24, 4, 10, images_as_stored=True, **PLAIN)
    sample = rgbd_sample()
    for seed in range(8):
        drawn = views.draw(sample, np.random.default_rng(seed))
        assert drawn["inputs"].shape == (1, 1, 3, 24, 24) and drawn["depth"].shape[1:] == (
            1,
            1,
            24,
            24,
        )
        red = drawn["inputs"][0, 0, 0].float() / 200
        torch.testing.assert_close(drawn["depth"][0, 0, 0], red, rtol=0, atol=0.02)


def test_image_loses_its_colours_with_the_given_probability_and_never_its_depth():
    views = FinetuningViews(8, 4, 10, images_as_stored=True, **PLAIN, drop_colours=0.3)
    sample = rgbd_sample()
    drawn = [views.draw(sample, np.random.default_rng(seed)) for seed in range(400)]
    kept = torch.stack([one["colours"] for one in drawn])
    assert set(kept.tolist()) == {0.0, 1.0} and 0.2 < 1 - kept.mean() < 0.4
    batch = {
        key: torch.stack([one[key] for one in drawn]) for key in ("inputs", "depth", "colours")
    }
    held_out = torch.full((400,), -1)
    batch |= {"target": torch.full((400,), 3), "held_out": held_out, "key": [drawn[0]["key"]]}
    inputs = views.apply(batch)["inputs"]
    assert inputs.shape == (400, 1, 1, 4, 8, 8)
    assert torch.equal(inputs[:, :, :, 3:], batch["depth"])
    lost = inputs[:, :, :, :3].flatten(1).abs().amax(dim=1) == 0
    assert torch.equal(lost, kept == 0)


def test_depth_of_an_image_does_not_change_what_else_is_drawn():
    with_depth = FinetuningViews(24, 4, 10, images_as_stored=True, **PLAIN)
    plain = rgbd_sample()
    del plain["depth"]
    ours = with_depth.draw(rgbd_sample(), np.random.default_rng(1))
    theirs = with_depth.draw(plain, np.random.default_rng(1))
    assert ours.keys() - theirs.keys() == {"depth", "colours"} and ours["key"] == theirs["key"]
    assert torch.equal(ours["inputs"], theirs["inputs"])
    repeated = FinetuningViews(24, 4, 10, **PLAIN).draw(plain, np.random.default_rng(1))
    assert torch.equal(repeated["inputs"], ours["inputs"].expand(1, 4, 3, 24, 24))


def test_evaluation_gives_each_sample_its_kind_and_depth(demo):
    paths = [str(demo / f"test_{name}") for name in ("videos", "images", "depth")]
    settings = {"temporal_views": 2, "spatial_views": 3, "crop_pct": 0.5}
    views = EvalViews(paths, 16, 4, **settings, images_as_stored=True)
    plain = EvalViews(paths, 16, 4, **settings)
    for number, kind in ((0, 0), (60, 1), (120, 2)):
        sample, expected = views[number], plain[number]
        assert sample["kind"] == kind and expected.keys() == {"inputs", "target"}
        assert torch.equal(sample["inputs"], expected["inputs"])
        assert sample["depth"].shape == (6, 1, 16, 16)
        assert (sample["depth"] > 0).any() == (kind == 2)
    of_one_frame = views.draw_inputs(rgbd_sample(), is_image=False)  # in a data set of clips
    assert of_one_frame["kind"] == 0 and not of_one_frame["depth"].any()
    assert views.draw_inputs(rgbd_sample(), is_image=True)["kind"] == 2
    depth = views[120]["depth"]
    assert torch.equal(depth[:3], depth[3:])
    disparity = decode_disparity(Clips(paths[2])[0]["depth"])[10:30, 10:30, 0]
    assert depth[1].mean().item() == pytest.approx(disparity.mean(), abs=0.01)
