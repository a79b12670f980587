"""Measure what was learnt: accuracy with many views, k-NN and linear probe of an encoder, pictures, an export for timm.

    python eval.py yamls/eval_demo.yaml                                     # k-NN, linear probe, pictures of runs/demo
    python eval.py yamls/eval_demo.yaml checkpoint=null run_name=random     # the same of random weights
    python eval.py yamls/eval_demo.yaml export=encoder.safetensors          # for timm.create_model

The signature of `evaluate` is the schema of its YAML files: each block that is given is a measurement. The last line printed
is the result as JSON, which is also in runs/{run_name}/eval.json.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from composer.devices import Device
from composer.trainer.trainer import get_device
from composer.utils import dist, reproducibility
from matplotlib.figure import Figure
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

import data_prep
from model import Classifier, Encoder, ViCMAE, load_pretrained
from pretrain import (
    EvalViews,
    Share,
    common_classes,
    draw_reconstructions,
    embed,
    infer,
    knn_accuracy,
    load_config,
    one_line_errors,
)


def measure_accuracy(
    net: Classifier,
    *,
    data: list[str],
    temporal_views: PositiveInt = 1,
    spatial_views: PositiveInt = 1,
    crop_pct: Share = 0.875,
    frame_interval: PositiveFloat | None = None,
    batch_size: PositiveInt = 64,
    num_workers: NonNegativeInt = 0,
) -> tuple[dict[str, float], Tensor]:
    """Accuracy, the softmax averaged over all views of a sample. See EvalViews for the views.

    Returns top-1, top-5 and samples a second, and the confusion matrix: (C, C) counts, a row for each true class.
    """
    sizes = (net.encoder.img_size, net.encoder.num_frames, temporal_views, spatial_views, crop_pct)
    views = EvalViews(data, *sizes, frame_interval=frame_interval)
    begin = time.monotonic()
    probabilities, labels = infer(net, lambda inputs: net.eval_forward({"inputs": inputs}), views, batch_size, num_workers)
    result = {"samples_per_second": len(views) / (time.monotonic() - begin)}
    for name, metric in net.get_metrics().items():
        metric.update(probabilities, labels)
        result[name] = float(metric.compute())
    return result, multiclass_confusion_matrix(probabilities, labels, net.num_classes)


def draw_confusion(counts: Tensor, classes: list[str], to: Path) -> None:
    """Draw a confusion matrix, each row as fractions of its class; with names, where they can be read."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(counts / counts.sum(dim=1, keepdim=True).clamp(min=1), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, label="fraction of the true class")
    axis.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 40:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
    figure.savefig(to, dpi=120)


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression by L-BFGS on standardised features (n, D), labels (n,) -> features to logits (n, C).

    Args:
        l2: weight of half the squared norm of the weights, relative to the mean cross-entropy.
    """
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    x = (features - mean) / std
    head = nn.Linear(x.shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + l2 / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.no_grad()(lambda features: head((features - mean) / std))


def linear_accuracy(
    bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], labels_per_class: int | None, seed: int
) -> float:
    """Accuracy of a linear head on fixed features.

    Args:
        bank, queries: features (n, D) and labels (n,).
        labels_per_class: how many of the bank are used, chosen at random by `seed`; None for all.

    The strength of regularisation is chosen on a fifth of the labels, and the head then fitted on all of them.
    """
    features, labels = bank
    num_classes = int(labels.max()) + 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ranked = F.one_hot(labels[order]).cumsum(dim=0).gather(1, labels[order, None])[:, 0]  # n-th of its class, from 1
    chosen = order if labels_per_class is None else order[ranked <= labels_per_class]
    x, y = features[chosen], labels[chosen]
    fifth = max(1, len(y) // 5)

    def right(l2: float) -> float:
        predict = fit_linear(x[fifth:], y[fifth:], num_classes, l2)
        return float((predict(x[:fifth]).argmax(dim=1) == y[:fifth]).float().mean())

    best = max((1e-4, 1e-3, 1e-2, 1e-1, 1.0), key=right)
    predict = fit_linear(x, y, num_classes, best)
    return float((predict(queries[0]).argmax(dim=1) == queries[1]).float().mean())


def measure_probe(
    encoder: Encoder,
    seed: int,
    *,
    bank: list[str],
    queries: list[str],
    labels_per_class: list[PositiveInt | None] = (None,),
    k: PositiveInt = 20,
    crop_pct: Share = 0.875,
    num_workers: NonNegativeInt = 0,
) -> dict[str, float]:
    """k-NN and linear accuracy of fixed features: the mean of the patch tokens of one central view.

    Args:
        bank, queries: labelled data sets to learn from and to test on.
        labels_per_class: a linear head for each number; null for all labels.
        k: of k-NN.

    Raises:
        ValueError: data sets that are missing, have no labels or have different ones.
    """
    if common_classes(bank) != common_classes(queries):
        raise ValueError(f"probe: {queries[0]} has other classes than {bank[0]}")
    learn, test = (
        embed(encoder, EvalViews(paths, encoder.img_size, crop_pct=crop_pct), num_workers) for paths in (bank, queries)
    )
    result = {"knn": knn_accuracy(learn, test, k)}
    for number in labels_per_class:
        result[f"linear_{number or 'all'}"] = linear_accuracy(learn, test, number, seed)
    return result


def export_timm(encoder: Encoder, to: str) -> None:
    """Write the encoder in timm's names: timm.create_model(name, num_classes=0, checkpoint_path=to) loads it.

    Raises:
        ValueError: an encoder of clips, which timm does not have.
    """
    if encoder.num_frames > 1:
        raise ValueError("export: timm has no ViT for clips; export an encoder of images")
    save_file({name: value.contiguous().cpu() for name, value in encoder.state_dict().items()}, to)


def table_row(*, name: str, runs: dict[str, str], paper: dict[str, float] | None = None) -> dict[str, str]:
    """A row of a table of results -> column: paper's / ours (difference), in %.

    Args:
        name: what was pre-trained.
        runs: for each column, the run of eval.py or finetune.py whose result it is, as run_name or run_name:key; the key is
            top1, if none is given.
        paper: for each column, in %.
    """
    cells = {}
    for column, source in runs.items():
        run, _, key = source.partition(":")
        found = [Path("runs", run, file) for file in ("eval.json", "result.json") if Path("runs", run, file).exists()]
        values = dict(chain(*(json.loads(path.read_text()).items() for path in found)))
        ours = values.get(key or "top1", values.get(f"metrics/eval/{key or 'top1'}"))
        theirs = (paper or {}).get(column)
        cells[column] = ("-" if theirs is None else f"{theirs:.1f}") + " / "
        cells[column] += "not run" if ours is None else f"{100 * ours:.1f}"
        if ours is not None and theirs is not None:
            cells[column] += f" ({100 * ours - theirs:+.1f})"
    return {"": name} | cells


def write_table(*, to: str, rows: list[Annotated[dict, table_row]]) -> None:
    """Collect finished runs into a table in Markdown, with what was not run; written to the file `to`."""
    made = [table_row(**row) for row in rows]
    columns = list(dict.fromkeys(column for row in made for column in row))
    head = ["| " + " | ".join([columns[0], *(f"{column}: paper / ours" for column in columns[1:])]) + " |"]
    lines = ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in made]
    text = "\n".join([*head, "| --- " * len(columns) + "|", *lines]) + "\n"
    data_prep.Place(os.path.dirname(to) or ".").write(os.path.basename(to), text.encode())


def evaluate(
    *,
    run_name: str,
    checkpoint: str | None,
    seed: int = 0,
    device: str | None = None,
    model: Annotated[dict, ViCMAE] | None = None,
    classifier: Annotated[dict, Classifier] | None = None,
    accuracy: Annotated[dict, measure_accuracy] | None = None,
    probe: Annotated[dict, measure_probe] | None = None,
    reconstructions: list[str] | None = None,
    export: str | None = None,
    table: Annotated[dict, write_table] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint and carry out the measurements that are asked for.

    Args:
        checkpoint: of pretrain.py or finetune.py, or an official file; null for random weights.
        model: sizes of a pre-trained model, for `probe`, `reconstructions` and `export`.
        classifier: sizes of a classifier, for `accuracy`.
        reconstructions: data sets to draw samples from.
        export: file to write the encoder to, in timm's names.
        table: of the results of other runs; nothing else is measured then.

    Raises:
        ValueError: a checkpoint or data that do not fit, or a measurement without its model.
    """
    if table:
        write_table(**table)
        return {"table": table["to"]}
    asked = {"model": probe or reconstructions or export, "classifier": accuracy}
    if not any(asked.values()):
        raise ValueError("nothing is asked for; give a block accuracy, probe, reconstructions, export or table")
    for name, sizes in (("model", model), ("classifier", classifier)):
        if asked[name] and sizes is None:
            raise ValueError(f"the block {name} is missing: it gives the sizes of what is measured")
    if export and not Path(export).absolute().parent.is_dir():
        raise ValueError(f"export {export}: its folder does not exist")
    for paths in (reconstructions or [], accuracy["data"] if accuracy else []):
        for path in paths:
            data_prep.read_classes(path)

    where = get_device(device)
    dist.initialize_dist(where)
    reproducibility.seed_all(seed)
    run, first = Path("runs", run_name), dist.get_global_rank() == 0
    result: dict[str, Any] = {"run_name": run_name, "checkpoint": checkpoint, "seed": seed}
    run.mkdir(parents=True, exist_ok=True)
    if asked["model"]:
        net = load(ViCMAE(**model), checkpoint, where, ("decoder.",) if reconstructions else ())
        if probe:
            result |= measure_probe(net.encoder, seed, **probe)
        if reconstructions and first:
            draw_reconstructions(net, reconstructions, run / "reconstructions.png")
        if export and first:
            export_timm(net.encoder, export)
    if accuracy:
        classes = common_classes(accuracy["data"])
        net = load(Classifier(len(classes), **classifier), checkpoint, where, ("head.", "neck."))
        measured, confusion = measure_accuracy(net, **accuracy)
        result |= measured
        if first:
            draw_confusion(confusion, classes, run / "confusion.png")
            counts = zip(classes, confusion.diag().tolist(), confusion.sum(dim=1).tolist(), strict=True)
            right = {name: hits / count for name, hits, count in counts if count}
            data_prep.Place(str(run)).write_json("per_class.json", right)
    if first:
        data_prep.Place(str(run)).write_json("eval.json", result)
    return result


def load(net: nn.Module, checkpoint: str | None, device: Device, needed: tuple[str, ...]) -> nn.Module:
    """Fill a model from a checkpoint and put it on the device.

    Raises:
        ValueError: the checkpoint lacks weights whose names begin with one of `needed`, or has some that the model has not.
    """
    if checkpoint:
        report = load_pretrained(net, checkpoint)
        missing = [name for name in report["missing"] if name.startswith(needed)] if needed else []
        if missing:
            raise ValueError(f"checkpoint {checkpoint} lacks {missing[0]}, which is needed here")
        if "neck." in needed and any(name.startswith("neck.") for name in report["unused"]):
            raise ValueError(f"checkpoint {checkpoint} is of a linear probe; set classifier.freeze to true")
    return device.module_to_device(net).eval()


def main() -> None:
    with one_line_errors():
        result = evaluate(**load_config(sys.argv[1:], evaluate))
    if dist.get_global_rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
