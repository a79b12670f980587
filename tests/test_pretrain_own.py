"""Pre-training on folders of raw files."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from composer.utils import dist
from conftest import ROOT, error_of, losses, run_stage, small
from filelock import FileLock

import data_prep
import pretrain
from pretrain import PretrainConfig, convert_raw, train_on_raw
from shards.decode import Recipe
from shards.format import Clips
from shards.storage import Storage
from training.config import load_config

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


def test_batch_of_other_data_is_never_changed(demo):
    config = PretrainConfig(**load_config(small(demo), PretrainConfig))
    assert config.data["global_train_batch_size"] > 120 // 4
    assert train_on_raw(config) is config


def test_recipe_cuts_films_and_holds_for_all_folders_of_a_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    videos, images = convert_raw([str(folder)], {"clip_seconds": 0.5, "frames": 4}, data)
    films = sorted(folder.rglob("*.mp4"))  # of 2 s
    assert len(Clips(videos)) == 4 * len(films)
    assert len(Clips(videos)[0]["timestamps"]) == 4
    assert len(Clips(images)) == len(list(folder.rglob("*.jpg")))
    with pytest.raises(ValueError, match=r"data holds .*mine, with recipe=\{'clip_seconds': 0.5"):
        convert_raw([str(folder)], {}, data)


def test_interrupted_conversion_is_resumed_and_what_is_done_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, convert = tmp_path / "data", data_prep.convert

    def interrupt(source: str, out: str, recipe: Recipe, **settings) -> dict:
        if recipe.kind == "images":
            raise KeyboardInterrupt
        return convert(source, out, recipe, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_prep, "convert", interrupt)
        convert_raw([str(folder)], {}, data)
    (shard,) = data.rglob("*.mds")
    written = shard.stat().st_mtime_ns
    paths = convert_raw([str(folder)], {}, data)
    assert shard.stat().st_mtime_ns == written
    assert sum(len(Clips(path)) for path in paths) == 2 * len(list(folder.rglob("*.mp4")))


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ("none", "raw: none does not exist; give folders"),
        ("[stills/*]", "raw: stills/* does not exist; give folders, without patterns"),
        ("empty", "raw: empty has neither videos nor images"),
        ("tars", "tars has neither videos nor images; convert its tars by data_prep.py"),
        ("stills/a.jpg", "raw: stills/a.jpg is not a folder; give the folder that contains it"),
        ("[stills,./stills/]", "raw: stills, ./stills/ has the same folder twice; give each once"),
        ("set", "raw: set is already converted; give data.streams=[{path: set}]"),
        ("stills", "1 of 1 inputs are undecodable"),
        ("stills recipe.clip_seconds=0", "recipe: --clip-seconds 0.0: must be in "),
        ("[empty] --plan", "raw: is not converted yet"),
    ],
)
def test_other_than_folders_of_media_is_refused_on_every_rank(tmp_path, raw, complaint, rank):
    for file in ("empty/a.txt", "tars/a.tar", "set/index.json", "stills/a.jpg"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("x")
    folders, *others = raw.split()
    arguments = [str(ROOT / "yamls" / "own.yaml"), f"raw={folders}", *others, *SMALL]
    assert complaint in error_of(pretrain, arguments, tmp_path)


@pytest.fixture(params=[0, 1])
def rank(request, monkeypatch) -> int:
    """The rank of this process on its machine; if it is 1, rank 0 has failed before."""
    monkeypatch.setattr(dist, "get_local_rank", lambda: request.param)
    monkeypatch.setattr(pretrain, "RANK_ZERO_FIRST", 0.0)
    return request.param


def test_rank_that_waits_for_the_conversion_takes_its_result(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_local_rank", lambda: 1)
    data = tmp_path / "data"
    data.mkdir()
    with ThreadPoolExecutor(1) as pool, FileLock(data / "raw.lock"):
        waiting = pool.submit(pretrain.convert_raw, [str(folder)], {}, data)
        record = {"sources": [str(folder)], "paths": ["x"]}
        Storage(str(data)).write_json("raw.json", record)  # at once, as convert_raw does
    assert waiting.result() == ["x"]


def test_several_machines_are_told_how_to_convert(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_local_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"raw: 2 machines .* convert to a shared folder"):
        pretrain.convert_raw(["mine"], {}, tmp_path)
