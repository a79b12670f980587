"""report.html: all that a run directory shows, on one page that needs no other file.

    write_report(Path("runs/demo"), Path("runs/demo/report.html"))

The page is made from the files of the run directory, so it can be made again at any time: from
config.yaml or eval.yaml, result.json or eval.json, per_class.json, predictions.csv, pictures.
"""

import base64
import csv
import io
import json
import shlex
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml
from PIL import Image

from evaluation.pictures import draws_safely
from methods import CLASSIFIERS
from shards.storage import write_file
from training.sizes import find_run

PNG_BYTES = 400_000  # of a picture; larger pictures become JPEG files
PREDICTIONS = 20  # rows of predictions.csv that are shown
RESULTS = {  # in this order; an accuracy is a fraction
    "metrics/eval/top1": "top-1 accuracy",
    "metrics/eval/top5": "top-5 accuracy",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "knn/trained": "k-NN accuracy",
    "knn/random": "k-NN accuracy, random weights",
    "knn": "k-NN accuracy",
    "online_probe": "accuracy of the online linear probe",
}
FEWER_LABELS = ("linear_", "knn_")  # names of the accuracies of heads with fewer labels
BOOKKEEPING = ("time/", "trainer/")  # names of values that are no results
EXAMPLE_DATA = {
    "bank": ["data/mine/train"],
    "queries": ["data/mine/test"],
}  # if a run names no labelled data
NEXT = (
    "Commands for this run. Paths in new/ stand for your files, and data/mine/ for labelled data. "
    "If uv installed the packages, begin with uv run."
)
PICTURES = {  # file: (title, text)
    "loss": ("Training", "Thin: each step. Thick: the mean of the steps around it."),
    "reconstructions": (
        "Reconstructions",
        "The masked patches are grey. The reconstruction is what the decoder predicts for all "
        "patches; below, it is pasted into the masked patches only.",
    ),
    "attention": (
        "Attention",
        "How much the other patches attend to a patch in the last block, mean over the heads.",
    ),
    "neighbours": (
        "Nearest neighbours",
        "The samples whose features are nearest to the query's. Green: its class; red: another.",
    ),
    "confusion": (
        "Confusion",
        "Numbers of samples. The colour is the fraction of the true class.",
    ),
    "predictions": ("Predictions", "The first files with their likeliest classes."),
}
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name: $kind</title>
<style>
body { margin: 0 auto; padding: 1.5rem; box-sizing: border-box; max-width: 76rem;
  color: #1f2328; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; padding-bottom: .3rem; font-size: 1.2rem;
  border-bottom: 1px solid #d1d9e0; }
p { margin: .4rem 0; max-width: 44rem; }
.note { color: #59636e; }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
dl div { padding: .6rem 1rem; border: 1px solid #d1d9e0; border-radius: 6px; }
dt { color: #59636e; font-size: .85rem; }
dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td { padding: .25rem .9rem .25rem 0; vertical-align: top; border-bottom: 1px solid #eaeef2;
  overflow-wrap: anywhere; }
pre { margin: .3rem 0 1rem; padding: .7rem .9rem; border-radius: 6px; background: #f6f8fa;
  font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .6rem 0; }
</style>
</head>
<body>
<h1>$name</h1>
<p class="note">$kind</p>
$body
</body>
</html>
""")


def shown(value: Any, key: str = "") -> str:
    """Return a value as text: an accuracy in percent, another number with four digits."""
    if key in RESULTS or key.startswith(FEWER_LABELS):
        return f"{100 * value:.1f} %"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: Iterable[Iterable[str]]) -> str:
    """Return a table of texts as HTML."""
    lines = ["<table>"]
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def details(title: str, content: str) -> str:
    """Return HTML that a reader can unfold."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def embedded(path: Path, alt: str) -> str:
    """Return an <img> that holds a picture, at most as wide as the page."""
    data, kind = path.read_bytes(), "png"
    image = Image.open(io.BytesIO(data))
    if len(data) > PNG_BYTES:
        buffer, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(buffer, "JPEG", quality=80)
        data = buffer.getvalue()
    # On a narrow screen, a picture is not scaled down further, but scrolls.
    style = f"min-width:min({image.width}px,60rem)"
    size = f'width="{image.width}" height="{image.height}" style="{style}"'
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img {size} alt="{escape(alt)}" src="{source}">'


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file, empty if there is none."""
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def cards(result: dict[str, Any]) -> str:
    """Return the accuracies of a result, large."""
    names = [key for key in RESULTS if key in result]
    names += [key for key in result if key.startswith(FEWER_LABELS) and key not in names]
    terms = []
    for key in names:
        kind, _, labels = key.replace("knn", "k-NN").partition("_")
        name = RESULTS.get(key, f"{kind} accuracy, {labels} labels")
        terms.append(f"<div><dt>{escape(name)}</dt><dd>{shown(result[key], key)}</dd></div>")
    return f"<dl>{''.join(terms)}</dl>"


def pictures(run: Path) -> Iterator[str]:
    """Yield a section for each picture of a run."""
    for name, (title, text) in PICTURES.items():
        file = run / f"{name}.png"
        if file.exists():
            yield f"<h2>{title}</h2>\n<p class=note>{text}</p>"
            yield f"<figure>{embedded(file, f'{title}. {text}')}</figure>"


def results(title: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield a table of all results."""
    if result:
        kept = {key: value for key, value in result.items() if not key.startswith(BOOKKEEPING)}
        yield f"<h2>{escape(title)}</h2>"
        yield table([(key, shown(value, key)) for key, value in kept.items()])


def tables(run: Path) -> Iterator[str]:
    """Yield tables of the accuracy of each class, and of the first predictions."""
    if classes := read_json(run / "per_class.json"):
        rows = [(name, "" if share is None else f"{share:.1%}") for name, share in classes.items()]
        yield details(f"Accuracy of each of {len(rows)} classes", table(rows))
    file = run / "predictions.csv"
    if file.exists():
        rows = list(csv.reader(io.StringIO(file.read_text(), newline="")))
        yield details(f"The first of {len(rows) - 1} predictions", table(rows[: PREDICTIONS + 1]))


def flow(value: Any) -> str:
    """Return a list or a dictionary as YAML in one line."""
    style = {"default_flow_style": True, "width": float("inf"), "allow_unicode": True}
    return yaml.safe_dump(value, sort_keys=False, **style).strip()


def next_commands(run: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the commands that use the checkpoint of a run with this config, by their purpose."""
    device = config["trainer"].get("device") or "null"
    measure = ["python", "eval.py", f"checkpoint={run}", f"device={device}"]
    frames, kind = config["model"].get("num_frames", 1), CLASSIFIERS.get(config.get("method"))
    has_one_head = not (kind and kind.head_per_data_set)
    if "eval_data" in config:
        listed = {"Accuracy": [*measure, f"accuracy={flow(config['eval_data'])}"]}
        if has_one_head:
            listed["Predictions for new files"] = [*measure, "predict=[new/a.mp4,new/photos/]"]
    else:
        listed = after_pretraining(run, config, measure, frames, device)
    if frames == 1 and has_one_head:
        listed["Export to timm"] = [*measure, f"export=timm:{run.name}_timm"]
    return {purpose: shlex.join(words) for purpose, words in listed.items()}


def after_pretraining(
    run: Path, config: dict[str, Any], measure: list[str], frames: int, device: str
) -> dict[str, list[str]]:
    """Return the commands that measure and use the encoder of a pre-training, by their purpose."""
    knn = (config.get("callbacks") or {}).get("KNN") or EXAMPLE_DATA
    probe = {key: knn[key] for key in ("bank", "queries", "crop_pct") if key in knn}
    probed = [*measure, f"probe={flow(probe | {'neighbours': True})}"]
    recipe = ["composer", "finetune.py", "yamls/finetune_demo.yaml"]
    if frames == 1:
        probed.append(f"attention={flow(knn['queries'])}")
        recipe.append("yamls/finetune_stills.yaml")
    else:
        tubelet = config["model"].get("tubelet_size", 1)
        recipe.append(f"model={{num_frames: {frames}, tubelet_size: {tubelet}}}")
    return {
        "k-NN and linear accuracy, with pictures": probed,
        "A classifier": [
            *recipe,
            f"run_name={run.name}_finetuned",
            f"pretrained={run}",
            f"trainer.device={device}",
            f"data.streams={flow([{'path': path} for path in knn['bank']])}",
            f"eval_data.paths={flow(knn['queries'])}",
        ],
        "Its predictions for new files": [
            "python",
            "eval.py",
            f"checkpoint=runs/{run.name}_finetuned",
            f"device={device}",
            "predict=[new/a.mp4,new/photos/]",
        ],
        "Features of new files": [*measure, "embed=[new/photos/]"],
    }


def describe(config: dict, settings: dict, result: dict) -> str:
    """Return in words which kind of run it is, and how far it got."""
    if not config:
        weights = "random weights, sizes of " if settings.get("random_weights") else ""
        return f"evaluation of {weights}{settings.get('checkpoint') or 'random weights'}"
    stage = "fine-tuning" if "eval_data" in config else "pre-training"
    is_logged = {"epoch", "step"} <= result.keys()
    length = f"{result['epoch']:g} epochs, {result['step']:g} steps" if is_logged else "no log"
    return f"{stage}, {length}, seed {config.get('seed')}"


@draws_safely
def write_report(run: Path, to: Path) -> None:
    """Write the page of a training or an evaluation from the files of its run directory.

    The page of a training has a table of what an evaluation measured in the same directory.
    """
    config, settings = read_yaml(run / "config.yaml"), read_yaml(run / "eval.yaml")
    measured = read_json(run / "eval.json")
    result = read_json(run / "result.json") if config else measured
    sections = [cards(result), *pictures(run), *results("Results", result)]
    if config:
        sections += results(describe({}, settings, {}), measured)
    sections += tables(run)
    trained = run if config else find_run(settings.get("checkpoint") or "")
    if trained and (trained / "config.yaml").exists():
        sections.append(f"<h2>What next</h2>\n<p class=note>{NEXT}</p>")
        for purpose, command in next_commands(trained, read_yaml(trained / "config.yaml")).items():
            sections.append(f"<p>{purpose}</p>\n<pre>{escape(command)}</pre>")
    sections.append("<h2>Settings</h2>")
    for name in ("config.yaml", "eval.yaml", "data_sets.json"):
        if (run / name).exists():
            sections.append(details(name, f"<pre>{escape((run / name).read_text())}</pre>"))
    kind = describe(config, settings, result)
    page = PAGE.substitute(name=escape(run.name), kind=escape(kind), body="\n".join(sections))
    write_file(str(to), page.encode("utf-8", "backslashreplace"))
