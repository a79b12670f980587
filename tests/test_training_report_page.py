"""report.html holds all that a run directory shows, and needs nothing else."""

import base64
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

from eval import EvalConfig
from evaluation.pictures import draw_tiles
from finetune import FinetuneConfig
from training.config import load_config
from training.report_page import write_report

CONFIGS = {"eval.py": EvalConfig, "finetune.py": FinetuneConfig}
VOID = {"img", "meta"}


class Page(HTMLParser):
    """The tags, the attributes and the texts of a page whose tags must be balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.images, self.commands, self.open = "", [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["pre"] and data.startswith(("python ", "composer ")):
            self.commands.append(data)


def read_page(run: Path) -> Page:
    """Return a page that was checked: it needs no other file, and its pictures are intact."""
    page = Page(run / "report.html")
    assert "://" not in page.source and "url(" not in page.source and "@import" not in page.source
    for attributes in page.images:
        match = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", attributes["src"])
        image = Image.open(io.BytesIO(base64.b64decode(match[2], validate=True)))
        image.load()
        assert image.size == (int(attributes["width"]), int(attributes["height"]))
        assert image.format.lower() == match[1] and min(image.size) >= 128
        assert len(attributes["alt"]) > 20
    return page


def options_of(page: Page, script: str) -> list[dict]:
    """Return the options of every command of a stage that a page shows, as the stage reads them."""
    commands = [shlex.split(command) for command in page.commands]
    chosen = [words[2:] for words in commands if words[1] == script]
    return [load_config(arguments, CONFIGS[script]) for arguments in chosen]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The directory of a run without results; the working directory is the repository."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    return path


def write_run(run: Path, config: dict, result: dict) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    (run / "result.json").write_text(json.dumps(result))


def write_page(run: Path) -> Page:
    write_report(run, run / "report.html")
    return read_page(run)


KNN = {"bank": ["data/a's <b>", "data/猫"], "queries": ["data/$1 & co"], "crop_pct": 1.0}
PRETRAINED = {"seed": 3, "trainer": {"device": "cpu"}, "model": {"depth": 3, "num_frames": 1}}
RESULT = {"step": 690.0, "epoch": 30.0, "knn/trained": 0.5954, "lr": 1.7847e-08, "time/batch": 690}


def test_page_of_a_pretraining_has_results_settings_pictures_and_commands_that_are_accepted(run):
    write_run(run, PRETRAINED | {"callbacks": {"KNN": KNN}}, RESULT)
    for name in ("loss", "reconstructions"):
        draw_tiles(torch.rand(8, 3, 32, 32), run / f"{name}.png", name, 8)
    page = write_page(run)
    for text in ("pre-training, 30 epochs, 690 steps, seed 3", "59.5 %", "1.785e-08", "depth: 3"):
        assert text in page.text
    assert "time/batch" not in page.text
    alts = [image["alt"].split(".")[0] for image in page.images]
    assert alts == ["Training", "Reconstructions"]
    probe, predict, embed, export = options_of(page, "eval.py")
    assert probe["probe"] == KNN | {"neighbours": True} and probe["attention"] == KNN["queries"]
    assert probe["checkpoint"] == str(run) and probe["device"] == "cpu"
    assert predict["checkpoint"] == "runs/mine_finetuned" and predict["predict"]
    assert embed["embed"] and export["export"] == "timm:mine_timm"
    (finetune,) = options_of(page, "finetune.py")
    assert [stream["path"] for stream in finetune["data"]["streams"]] == KNN["bank"]
    assert finetune["eval_data"]["paths"] == KNN["queries"]
    assert finetune["pretrained"] == str(run) and finetune["run_name"] == "mine_finetuned"
    assert finetune["trainer"]["device"] == "cpu" and finetune["model"]["num_frames"] == 1


def test_commands_after_a_pretraining_on_clips_keep_their_frames_and_offer_no_timm(run):
    sizes = {"num_frames": 8, "tubelet_size": 2}
    write_run(run, PRETRAINED | {"model": sizes, "trainer": {}, "callbacks": None}, RESULT)
    page = write_page(run)
    (finetune,) = options_of(page, "finetune.py")
    assert sizes.items() <= finetune["model"].items() and finetune["trainer"]["device"] is None
    assert finetune["data"]["streams"] == [{"path": "data/mine/train"}]
    assert all("export" not in options for options in options_of(page, "eval.py"))


@pytest.mark.parametrize("method", ["linear_probe", "omnivore", "tubevit"])
def test_commands_after_a_finetuning_measure_predict_and_export(run, method):
    eval_data = {"paths": ["data/test"], "crop_pct": 0.9, "temporal_views": 2}
    config = PRETRAINED | {"method": method, "eval_data": eval_data}
    write_run(run, config, RESULT | {"metrics/eval/top1": 0.5})
    page = write_page(run)
    assert "top-1 accuracy" in page.text and "50.0 %" in page.text
    accuracy, *others = options_of(page, "eval.py")
    assert accuracy["accuracy"] == eval_data
    names = {name for options in others for name in options}
    assert names >= {"predict", "export"} if method == "linear_probe" else not others


def test_page_of_an_evaluation_has_every_name_as_it_is_and_the_commands_of_its_run(run):
    write_run(run, PRETRAINED | {"eval_data": {"paths": ["data/test"]}}, RESULT)
    measured = run.parent / "measured"
    measured.mkdir()
    names = ["<script>alert(1)</script>", "$name &amp; 猫", "\udcff"]
    settings = {"checkpoint": str(run), "random_weights": False}
    (measured / "eval.yaml").write_text(yaml.safe_dump(settings))
    (measured / "eval.json").write_text(json.dumps({"top1": 0.5, "knn_10%": 0.25}))
    accuracies = dict(zip(names, (0.5, None, 1.0), strict=True))
    (measured / "per_class.json").write_text(json.dumps(accuracies))
    rows = ["file,fault,class_1,probability_1", *(f"{number}.mp4,,<b>,0.5" for number in range(99))]
    (measured / "predictions.csv").write_text("\n".join(rows) + "\n")
    draw_tiles(torch.rand(4, 3, 224, 224), measured / "confusion.png", "large", 2)
    page = write_page(measured)
    assert page.images[0]["src"].startswith("data:image/jpeg")
    assert len(page.source) < (measured / "confusion.png").stat().st_size
    assert names[0] in page.text and names[1] in page.text and r"\udcff" in page.text
    for text in (f"evaluation of {run}", "k-NN accuracy, 10% labels", "25.0 %", "<b>", "19.mp4"):
        assert text in page.text
    assert "20.mp4" not in page.text
    assert options_of(page, "eval.py")[0]["checkpoint"] == str(run)


def test_evaluation_in_the_directory_of_a_training_adds_a_table_to_its_page(run):
    write_run(run, PRETRAINED | {"callbacks": {"KNN": KNN}}, RESULT)
    before = write_page(run)
    (run / "eval.yaml").write_text("checkpoint: runs/other\n")
    (run / "eval.json").write_text(json.dumps({"knn": 0.25, "linear_all": 0.5}))
    page = write_page(run)
    assert page.source.count("<dt>") == before.source.count("<dt>") == 1
    assert "pre-training, 30 epochs" in page.text and page.commands == before.commands
    table = page.text[page.text.index("evaluation of runs/other") :]
    assert "25.0 %" in table and "linear_all" in table and "checkpoint: runs/other" in table


def test_page_of_a_run_without_a_log_and_of_foreign_weights_is_written(run):
    (run / "config.yaml").write_text(yaml.safe_dump(PRETRAINED))
    assert "pre-training, no log, seed 3" in write_page(run).text
    (run / "config.yaml").unlink()
    (run / "eval.yaml").write_text("checkpoint: vit_base_patch16_224.mae\nrandom_weights: true\n")
    page = write_page(run)
    assert "random weights, sizes of vit_base_patch16_224.mae" in page.text and not page.commands


def test_page_that_cannot_be_made_costs_a_line(run, capsys):
    write_run(run, PRETRAINED, RESULT)
    (run / "loss.png").write_bytes(b"corrupt")
    write_report(run, run / "report.html")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{run}/report.html could not be drawn: ")
