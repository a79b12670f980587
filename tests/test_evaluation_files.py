"""Predictions and features of media files that were not converted."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_stage
from PIL import Image
from tiny_models import ENCODER

import data_prep
import eval as evaluation
from eval import load_encoder
from evaluation.files import FileViews, find_media
from evaluation.probes import embed
from model import Classifier, pool_tokens
from shards.augment import normalise
from shards.decode import Recipe
from shards.format import encode_clip
from shards.views import EvalViews
from training.weights import LATEST

CLASSES = ["a cat", "$dog", "emu", "fox", "gnu", "hen"]


@pytest.fixture
def media(demo, tmp_path) -> Path:
    """A folder of two pictures, a clip, a corrupt picture and a text."""
    folder = tmp_path / "media"
    (folder / "inside").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (50, 70), "inside/b.JPG": (90, 40)}.items():
        picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        picture.resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=95)
    clip = next((demo / "raw" / "train" / "videos").rglob("*.mp4"))
    (folder / "c.mp4").write_bytes(clip.read_bytes())
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no media")
    return folder


@pytest.fixture
def classifier(tmp_path) -> Classifier:
    net = Classifier(len(CLASSES), **ENCODER, head_init_std=1.0).eval()
    net.class_names = CLASSES
    torch.save(net.state_dict(), tmp_path / "classifier.pt")
    return net


def test_media_are_found_by_file_folder_and_pattern_once(media):
    names = ["a.png", "bad.png", "c.mp4", "inside/b.JPG"]
    assert find_media([str(media)]) == [str(media / name) for name in names]
    both = find_media([f"{media}/*.png", f"{media}/a.png"])
    assert both == [str(media / "a.png"), str(media / "bad.png")]
    assert find_media([f"{media}/notes.txt"]) == [f"{media}/notes.txt"]
    with pytest.raises(ValueError, match=r"none\*: no such file, and no video or image in it"):
        find_media([f"{media}/none*"])


def test_name_with_brackets_is_no_pattern_and_hidden_files_are_left_out(tmp_path):
    for name in ("a[1].jpg", "a1.jpg", ".b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    assert find_media([f"{tmp_path}/a[1].jpg"]) == [f"{tmp_path}/a[1].jpg"]
    assert find_media([str(tmp_path)]) == [f"{tmp_path}/a1.jpg", f"{tmp_path}/a[1].jpg"]


def test_predictions_are_the_classifiers_and_corrupt_files_are_named(
    media, classifier, tmp_path, capfd
):
    arguments = ["checkpoint=classifier.pt", f"predict=[{media}]", "device=cpu", "num_workers=1"]
    run_stage(evaluation, [*arguments, "model={num_heads: 3}"], tmp_path)
    assert "1 of 4 files cannot be decoded" in capfd.readouterr().out
    run = tmp_path / "runs" / "files_eval"
    with open(run / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [os.path.basename(row["file"]) for row in rows] == ["a.png", "bad.png", "c.mp4", "b.JPG"]
    assert "cannot identify" in rows[1]["fault"]
    assert rows[1]["class_1"] in ("", None)
    views = FileViews([rows[0]["file"]], ENCODER["img_size"], patch_size=ENCODER["patch_size"])
    with torch.no_grad():
        logits = classifier({"inputs": normalise(views[0]["inputs"][None])})[0, 0]
    values, numbers = logits.softmax(dim=0).topk(5)
    for place, (value, number) in enumerate(zip(values, numbers, strict=True), start=1):
        assert rows[0][f"class_{place}"] == CLASSES[number]
        assert float(rows[0][f"probability_{place}"]) == pytest.approx(float(value), abs=1e-4)
    assert Image.open(run / "predictions.png").size == (4 + 3 * 140, 3 * 16 + 4 * 16 + 140)


def test_features_of_files_are_near_those_of_a_converted_data_set(
    media, classifier, tmp_path, capfd
):
    (media / "bad.png").unlink()
    (media / "inside" / "b.JPG").rename(media / "b.JPG")
    data = str(tmp_path / "data")
    data_prep.convert(str(media), data, Recipe("images"), 1)
    expected, _ = embed(classifier.encoder, EvalViews([data], ENCODER["img_size"]))
    arguments = ["checkpoint=classifier.pt", f"embed=[{media}/*.png, {media}/b.JPG]", "device=cpu"]
    run_stage(evaluation, [*arguments, "run_name=files", "model={num_heads: 3}"], tmp_path)
    found = np.load(tmp_path / "runs" / "files" / "features.npz")
    assert [os.path.basename(name) for name in found["files"]] == ["a.png", "b.JPG"]
    features = torch.from_numpy(found["features"])
    cosines = torch.cosine_similarity(features[:, None], expected[None], dim=2)
    assert cosines.diag().min() > 0.99 > 0.95 > cosines[0, 1]  # JPEG files and sizes differ
    table = (tmp_path / "runs" / "files" / "features.csv").read_text().splitlines()
    assert len(table) == 3
    assert float(table[1].split(",")[2]) == pytest.approx(float(features[0, 0]), rel=1e-5)


def test_image_that_needs_no_scaling_has_the_views_of_a_converted_data_set(tmp_path):
    file = tmp_path / "a.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (36, 61, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    views = FileViews([str(file)], 32, 4, temporal_views=2, spatial_views=3)  # 36 = 32 / 0.875
    expected = views.crop_views(encode_clip([file.read_bytes()], [0.0], -1, ""))
    assert expected.shape == (6, 4, 3, 32, 32) and not torch.equal(expected[0], expected[1])
    assert torch.equal(views[0]["inputs"], expected)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"crop_pct": 0.001}, "too large: 40000x32000 pixels before the crop"),
        ({"patch_size": 16}, "frames of 15x12 are smaller than model.patch_size=16"),
    ],
)
def test_image_that_suits_no_crop_is_a_fault_of_its_file(tmp_path, settings, fault):
    Image.new("RGB", (15, 12)).save(tmp_path / "a.png")
    assert fault in FileViews([str(tmp_path / "a.png")], 32, **settings)[0]["fault"]


def test_patch_features_average_to_the_pooled_ones_in_batches(
    media, classifier, tmp_path, monkeypatch
):
    monkeypatch.setattr("evaluation.files.BATCH", 2)
    (media / "bad.png").unlink()
    arguments = ["checkpoint=classifier.pt", "device=cpu", "model={num_heads: 3}"]
    for name, patches in {"pooled": "false", "patches": "true"}.items():
        embedding = [f"embed=[{media}]", f"patches={patches}", f"run_name={name}"]
        run_stage(evaluation, [*arguments, *embedding], tmp_path)
    features = [
        np.load(tmp_path / f"runs/{name}/features.npz")["features"]
        for name in ("pooled", "patches")
    ]
    assert features[1].shape == (3, 16, ENCODER["embed_dim"])
    np.testing.assert_allclose(features[1].mean(axis=1), features[0], rtol=1e-4, atol=1e-6)


@pytest.fixture
def mine(classifier, tmp_path) -> Path:
    """The directory of a run of the classifier, whose validation crops half of a picture."""
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "classifier.pt").rename(run / "checkpoints" / LATEST)
    (run / "config.yaml").write_text(json.dumps({"model": ENCODER, "eval_data": {"crop_pct": 0.5}}))
    return run


def test_encoder_of_a_run_is_loaded_in_one_line(classifier, mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder("mine")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours = pool_tokens(classifier.encoder(images), "mean")
        assert torch.equal(pool_tokens(encoder(images), "mean"), ours)


def test_run_its_name_and_its_file_predict_alike_with_the_crop_of_its_validation(
    media, classifier, mine, tmp_path
):
    rows = []
    for number, name in enumerate(("mine", "runs/mine", f"runs/mine/checkpoints/{LATEST}")):
        request = [f"checkpoint={name}", f"predict=[{media}/a.png]", f"run_name=run{number}"]
        run_stage(evaluation, [*request, "device=cpu"], tmp_path)
        rows.append((tmp_path / f"runs/run{number}/predictions.csv").read_text().splitlines()[1])
    assert rows[0] == rows[1] == rows[2]
    likeliest = {}
    for crop_pct in (0.5, 0.875):
        settings = {"patch_size": ENCODER["patch_size"], "crop_pct": crop_pct}
        views = FileViews([str(media / "a.png")], ENCODER["img_size"], **settings)
        with torch.no_grad():
            logits = classifier({"inputs": normalise(views[0]["inputs"][None])})[0, 0]
        likeliest[crop_pct] = f"{float(logits.softmax(dim=0).max()):.4f}"
    assert rows[0].split(",")[3] == likeliest[0.5] != likeliest[0.875]


def test_files_that_cannot_be_decoded_at_all_are_an_error_and_earlier_results_are_kept(
    media, classifier, tmp_path
):
    arguments = ["checkpoint=classifier.pt", "device=cpu", "model={num_heads: 3}"]
    request = [f"predict=[{media}/a.png]", f"embed=[{media}/bad.png]"]
    with pytest.raises(SystemExit, match="none of 1 files can be decoded"):
        run_stage(evaluation, [*arguments, *request], tmp_path)
    run = tmp_path / "runs" / "files_eval"
    found = json.loads((run / "eval.json").read_text())
    assert found["predict"] == {"predicted": 1, "undecodable": 0}
    assert "embed" not in found
    assert not list(run.glob("features*"))
