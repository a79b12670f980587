"""The commands for own data, as README.md shows them."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import ROOT, read_result, run_stage
from test_project import commands, stage_of

import data_prep
import eval as evaluation
import finetune
import pretrain

STAGES = {"pretrain.py": pretrain, "finetune.py": finetune, "eval.py": evaluation}
FASTER = {  # arguments that make a command take seconds, and change nothing else
    "pretrain.py": [
        *("yamls/own_cpu.yaml", "model.img_size=32", "model.embed_dim=48", "model.depth=1"),
        *("data.num_workers=0", "trainer.max_duration=2ba", "schedule.t_warmup=1ba"),
    ],
    "finetune.py": [
        *("trainer.device=cpu", "trainer.max_duration=1ep", "trainer.eval_interval=1ep"),
        *("data.num_workers=0", "data.global_train_batch_size=8", "schedule.t_warmup=0ep"),
    ],
    "eval.py": ["device=cpu"],
}
CLASSES = ("Bag", "Boot", "Dress")


@pytest.fixture
def folder(demo, tmp_path) -> Path:
    """A folder with the user's own files: clips, photos, labelled clips, new files."""
    raw = demo / "raw"
    shutil.copytree(raw / "train" / "videos" / "Bag", tmp_path / "my" / "clips")
    shutil.copytree(raw / "train" / "images" / "Bag", tmp_path / "my" / "photos")
    for split in ("train", "test"):
        for name in CLASSES:
            to = tmp_path / "my" / "labelled" / split / name
            shutil.copytree(raw / split / "videos" / name, to)
    shutil.copytree(raw / "test" / "images" / "Coat", tmp_path / "new" / "photos")
    for number, photo in enumerate(sorted((tmp_path / "new" / "photos").iterdir())[:2]):
        shutil.copy(photo, tmp_path / "new" / f"{number}.jpg")
    shutil.copy(next((raw / "test" / "videos" / "Coat").iterdir()), tmp_path / "new" / "a.mp4")
    (tmp_path / "yamls").symlink_to(ROOT / "yamls")
    return tmp_path


def test_the_commands_of_the_readme_lead_from_folders_to_predictions(folder, monkeypatch):
    monkeypatch.chdir(folder)
    section = (ROOT / "README.md").read_text().split("## Your own data\n")[1].split("\n## ")[0]
    (folder / "section.md").write_text(section)
    shown = list(commands(folder / "section.md"))
    assert 5 <= len(shown) <= 8
    for command in shown:
        script, arguments = stage_of(shlex.split(command))
        if script == "data_prep.py":
            data_prep.main([*arguments, "--workers", "1"])
        else:
            run_stage(STAGES[script], [*arguments, *FASTER[script]], folder)

    probed = json.loads((folder / "runs" / "probe" / "eval.json").read_text())
    assert all(0 <= probed[name] <= 1 for name in ("knn", "linear_all"))
    assert 0 <= read_result(folder, "mine")["metrics/eval/top1"] <= 1
    with open(folder / "runs" / "mine_eval" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    new = ["new/a.mp4", *sorted(map(str, Path("new", "photos").iterdir()))]
    assert [row["file"] for row in rows] == new
    assert {row["class_1"] for row in rows} <= set(CLASSES)
    features = np.load(folder / "runs" / "own_eval" / "features.npz", allow_pickle=False)
    assert features["files"].tolist() == ["new/0.jpg", "new/1.jpg"]
    assert np.isfinite(features["features"]).all()
    assert timm.create_model("local-dir:mine", pretrained=True).num_features == 48
