"""Pre-training on folders of raw files."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, error_of, losses, run_stage

import pretrain

SMALL = [
    "trainer.max_duration=2ba",
    "trainer.device=cpu",
    "callbacks=null",
    "data.num_workers=0",
    "model.img_size=32",
    "model.patch_size=8",
    "model.embed_dim=48",
    "model.depth=1",
    "model.num_heads=4",
    "model.decoder_depth=1",
    "schedule.t_warmup=1ba",
]


@pytest.fixture
def folder(demo, tmp_path) -> Path:
    """A folder with videos and images of the demonstration beside each other."""
    for kind in ("videos", "images"):
        shutil.copytree(demo / "raw" / "train" / kind, tmp_path / "mine", dirs_exist_ok=True)
    return tmp_path / "mine"


def test_folders_are_converted_once_and_the_batch_suits_them(folder, tmp_path, capfd):
    arguments = [str(ROOT / "yamls" / "own.yaml"), f"raw=[{folder}]", *SMALL]
    run_stage(pretrain, arguments, tmp_path)
    printed = capfd.readouterr().out
    data = tmp_path / "runs" / "own" / "data"
    record = json.loads((data / "raw.json").read_text())
    assert [Path(path).name for path in record["paths"]] == ["0-mine-videos", "0-mine-images"]
    reports = [tmp_path / path / "report.json" for path in record["paths"]]
    samples = [json.loads(report.read_text())["samples"] for report in reports]
    assert min(samples) > 20
    limit = max(2**power for power in range(20) if 2**power <= sum(samples) / 4)
    lowered = f"data.global_train_batch_size={limit}, lowered from 256 for {sum(samples)} samples"
    assert lowered in printed
    assert len(losses(tmp_path, "own")) == 2

    (tmp_path / "runs" / "own" / "result.json").unlink()
    run_stage(pretrain, [*arguments, "trainer.max_duration=3ba"], tmp_path)
    printed = capfd.readouterr().out
    assert "converting" not in printed
    assert len(losses(tmp_path, "own")) == 3


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ("[none]", "No such file or directory: 'none/'"),
        ("[empty]", "empty has neither videos nor images"),
        ("[empty] --plan", "raw: is not converted yet"),
    ],
)
def test_folders_without_media_are_refused(tmp_path, raw, complaint):
    (tmp_path / "empty").mkdir()
    folders, *plan = raw.split()
    arguments = [str(ROOT / "yamls" / "own.yaml"), f"raw={folders}", *plan, *SMALL]
    assert complaint in error_of(pretrain, arguments, tmp_path)
