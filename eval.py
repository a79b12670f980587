"""Measure what was learnt: accuracy with many views, k-NN and linear probe of an encoder, pictures, an export for timm.

    python eval.py yamls/eval_demo.yaml                                     # k-NN, linear probe, pictures of runs/demo
    python eval.py yamls/eval_demo.yaml checkpoint=null run_name=random     # the same of random weights
    python eval.py yamls/eval_demo.yaml export=encoder.safetensors          # for timm.create_model
    python eval.py yamls/compare.yaml                                       # trains and compares methods

The signature of `evaluate` is the schema of its YAML files: each block that is given is a measurement. The last line printed
is the result as JSON, which is also in runs/{run_name}/eval.json. An evaluation that was interrupted goes on when the same
command is given again.
"""

import hashlib
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from composer.devices import Device
from composer.trainer.trainer import get_device
from composer.utils import dist, reproducibility
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import make_grid, save_image

import data_prep
from finetune import classifier_stacks
from model import Classifier, Encoder, ViCMAE, load_pretrained, read_checkpoint
from pretrain import (
    LATEST,
    MEAN,
    STD,
    EvalViews,
    Share,
    activation_bytes,
    asked_plan,
    common_classes,
    draw_reconstructions,
    embed,
    infer,
    is_half,
    knn_accuracy,
    load_config,
    one_line_errors,
    show_plan,
    size_of,
)


def measure_accuracy(
    net: Classifier,
    parts: Path,
    *,
    data: list[str],
    temporal_views: PositiveInt = 1,
    spatial_views: PositiveInt = 1,
    crop_pct: Share = 0.875,
    frame_interval: PositiveFloat | None = None,
    batch_size: PositiveInt = 64,
    num_workers: NonNegativeInt = 0,
    part_size: PositiveInt = 1024,
) -> tuple[dict[str, float], Tensor]:
    """Accuracy, the softmax averaged over all views of a sample. See EvalViews for the views.

    Args:
        parts: folder for what is done already, see infer.
        part_size: samples that an interruption costs at most.

    Returns top-1, top-5 and samples a second, of those not done already, and the confusion matrix: (C, C) counts, a row for
    each true class.
    """
    sizes = (net.encoder.img_size, net.encoder.num_frames, temporal_views, spatial_views, crop_pct)
    views = EvalViews(data, *sizes, frame_interval=frame_interval)
    begin, computed = time.monotonic(), 0

    def forward(inputs: Tensor) -> Tensor:
        nonlocal computed
        computed += len(inputs) * dist.get_world_size()
        return net.eval_forward({"inputs": inputs})

    probabilities, labels = infer(net, forward, views, batch_size, num_workers, parts, part_size)
    result = {"samples_per_second": computed / (time.monotonic() - begin)}
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


@torch.autocast("cpu", enabled=False)
def linear_accuracy(bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> float:
    """Accuracy of a linear head on fixed features.

    Args:
        bank, queries: features (n, D) and labels (n,); those of the bank in random order.

    The strength of regularisation is chosen on a fifth of the labels, and the head then fitted on all of them.
    """
    x, y = bank
    num_classes = int(y.max()) + 1
    fifth = max(1, len(y) // 5)

    def right(l2: float) -> float:
        predict = fit_linear(x[fifth:], y[fifth:], num_classes, l2)
        return float((predict(x[:fifth]).argmax(dim=1) == y[:fifth]).float().mean())

    best = max((1e-4, 1e-3, 1e-2, 1e-1, 1.0), key=right)
    predict = fit_linear(x, y, num_classes, best)
    return float((predict(queries[0]).argmax(dim=1) == queries[1]).float().mean())


def choose(labels: Tensor, limits: Tensor, seed: int) -> Tensor:
    """Indices of at most limits[c] samples (C,) of each class c of labels (n,), by `seed` at random and in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped, by_class = labels[order].sort(stable=True)
    counts = labels.bincount()
    nth = torch.arange(len(labels)) - (counts.cumsum(dim=0) - counts)[grouped]  # of its class, from 0
    return order[by_class[nth < limits[grouped]].sort().values]


def middle_frames(views: EvalViews, numbers: Tensor) -> Tensor:
    """The first view of some samples, by their numbers (n,) -> (n, 3, H, W) in 0..1."""
    return torch.stack([views[number]["inputs"][0, 0] for number in numbers.tolist()]).float() / 255


@torch.autocast("cpu", enabled=False)
def draw_neighbours(
    bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], views: list[EvalViews], to: Path, count: int = 8, k: int = 5
) -> None:
    """Draw a row for each of `count` queries, evenly picked: itself, then its k nearest of the bank by cosine.

    A neighbour of the query's class has a green frame, any other a red one.

    Args:
        bank, queries: features (n, D) and labels (n,).
        views: of the bank, of the queries.
    """
    picked = torch.linspace(0, len(queries[1]) - 1, count).long()
    cosine = F.normalize(queries[0][picked], dim=1) @ F.normalize(bank[0], dim=1).T
    nearest = cosine.topk(min(k, len(bank[1])), dim=1).indices  # (count, k)
    right = bank[1][nearest] == queries[1][picked, None]
    colours = torch.stack([~right, right, torch.zeros_like(right)], dim=2).float()  # (count, k, 3)
    colours = F.pad(colours, (0, 0, 1, 0), value=1.0).flatten(0, 1)  # (count * (1 + k), 3), white around the query
    found = middle_frames(views[0], nearest.flatten()).unflatten(0, nearest.shape)  # (count, k, 3, H, W)
    images = torch.cat([middle_frames(views[1], picked)[:, None], found], dim=1).flatten(0, 1)
    images = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]))
    framed = F.pad(images, (4, 4, 4, 4), value=-1.0)
    framed = torch.where(framed < 0, colours[:, :, None, None], framed)
    save_image(make_grid(framed, nrow=1 + nearest.shape[1], pad_value=1.0), to)


def measure_probe(
    encoder: Encoder,
    seed: int,
    run: Path,
    parts: Path,
    *,
    bank: list[str],
    queries: list[str],
    labels_per_class: list[PositiveInt | None] = (None,),
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = (),
    k: PositiveInt = 20,
    temperature: PositiveFloat = 0.07,
    crop_pct: Share = 0.875,
    features: str | None = None,
    neighbours: bool = False,
    num_workers: NonNegativeInt = 0,
) -> dict[str, float]:
    """k-NN and linear accuracy of fixed features: the mean of the patch tokens of one central view.

    Args:
        parts: folder for what is done already, see infer.
        bank, queries: labelled data sets to learn from and to test on.
        labels_per_class: a linear head for each number, on so many labels of each class; null for all labels.
        fractions: k-NN and a linear head for each, on that fraction of the labels of each class, rounded up.
        k, temperature: of k-NN.
        features: .npz file to write bank_features, bank_labels, queries_features, queries_labels and classes to.
        neighbours: whether to draw the nearest neighbours of some queries, neighbours.png.

    Raises:
        ValueError: data sets that are missing, have no labels or have different ones.
    """
    classes = common_classes(bank)
    if classes != common_classes(queries):
        raise ValueError(f"probe: {queries[0]} has other classes than {bank[0]}")
    views = [EvalViews(paths, encoder.img_size, encoder.num_frames, crop_pct=crop_pct) for paths in (bank, queries)]
    learn, test = (embed(encoder, one, num_workers, parts / str(number)) for number, one in enumerate(views))
    first = dist.get_global_rank() == 0
    if features and first:
        names, values = ("bank_features", "bank_labels", "queries_features", "queries_labels"), (*learn, *test)
        aside = Path(f"{features}.{os.getpid()}.tmp")
        with aside.open("wb") as file:
            np.savez(file, classes=np.array(classes), **dict(zip(names, values, strict=True)))
        aside.replace(features)
    if neighbours and first:
        draw_neighbours(learn, test, views, run / "neighbours.png")
    result, counts = {"knn": knn_accuracy(learn, test, k, temperature)}, learn[1].bincount()
    limits = {str(number or "all"): torch.full_like(counts, number or len(learn[1])) for number in labels_per_class}
    # The product may come out above the whole number that it is: 0.07 * 100.
    shares = {f"{100 * share:g}%": (counts.double() * share - 1e-9).ceil() for share in fractions}
    for name, limit in (limits | shares).items():
        chosen = choose(learn[1], limit, seed)
        few = learn[0][chosen], learn[1][chosen]
        result[f"linear_{name}"] = linear_accuracy(few, test)
        if name in shares:
            result[f"knn_{name}"] = knn_accuracy(few, test, k, temperature)
    return result


@torch.no_grad()
def last_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of the last block on images (B, 3, H, W), normalised -> (B, heads, 1 + N, 1 + N), CLS first.

    Row i says how token i, which looks, shares itself out among all: it sums to 1.
    """
    attn, seen = encoder.blocks[-1].attn, []
    with attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        encoder(images)
    q, k, _ = attn.qkv(seen[0]).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 1 + N, d)
    return (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(dim=-1)


def draw_attention(encoder: Encoder, paths: list[str], to: Path, count: int = 8) -> None:
    """Draw `count` samples, evenly picked, and below each how much its patches are looked at in the last block.

    That is the mean over heads and over the patches that look, from the least of the image, black, to the most, white. What
    CLS looks at, as is usually drawn, would say less: ViC-MAE's losses have no target for it.
    """
    views = EvalViews(paths, encoder.img_size, crop_pct=1.0)
    images = middle_frames(views, torch.linspace(0, len(views) - 1, count).long())
    attention = last_attention(encoder, normalize(images.to(encoder.cls_token.device), MEAN, STD)).cpu()
    looked = attention[:, :, 1:, 1:].mean(dim=(1, 2)) * encoder.num_patches  # (B, N), 1 if all are looked at alike
    looked = looked.unflatten(1, (1, encoder.grid, encoder.grid))  # (B, 1, h, w)
    scale = max(1, 96 // encoder.img_size)
    looked = F.interpolate(looked, scale_factor=scale * encoder.patch_size, mode="bilinear")  # (B, 1, H, W)
    above = make_grid(F.interpolate(images, scale_factor=scale), nrow=count, pad_value=1.0)
    below = make_grid(looked, nrow=count, pad_value=1.0, normalize=True, scale_each=True)
    save_image(torch.cat([above, below], dim=1), to)


def export_timm(net: Encoder | Classifier, to: str) -> None:
    """Write an encoder, or a classifier, in timm's names: timm.create_model(name, checkpoint_path=to, ...) loads it.

    The other arguments are num_classes=0 for an encoder; for a classifier num_classes=C and, where its pool is "cls",
    global_pool="token", else global_pool="avg", fc_norm=False. The BatchNorm of a linear probe becomes part of the head.

    Raises:
        ValueError: an encoder of clips, which timm does not have.
    """
    encoder = net.encoder if isinstance(net, Classifier) else net
    if encoder.num_frames > 1:
        raise ValueError("export: timm has no ViT for clips; export an encoder of images")
    state = encoder.state_dict()
    if isinstance(net, Classifier):
        weight, bias = net.head.weight.detach(), net.head.bias.detach()
        if net.freeze:
            weight = weight / (net.neck.running_var + net.neck.eps).sqrt()
            bias = bias - weight @ net.neck.running_mean
        state |= {"head.weight": weight, "head.bias": bias}
    file = safetensors.torch.save({name: value.contiguous().cpu() for name, value in state.items()})
    if dist.get_global_rank() == 0:
        data_prep.Place(os.path.dirname(to) or ".").write(os.path.basename(to), file)


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


def trained(run_name: str, command: list[str]) -> dict[str, float]:
    """The result of a run, which is begun, or gone on with, if it is not finished.

    Raises:
        ValueError: it fails; with the last line that it printed.
    """
    result = Path("runs", run_name, "result.json")
    if not result.exists():
        words = [sys.executable, *command, f"run_name={run_name}", "trainer.progress_bar=false"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(result.read_text())


def measured(
    run: Path, sizes: dict[str, Any], seed: int, probes: dict[str, dict], checkpoint: str | None
) -> dict[str, float]:
    """What probes make of an encoder, by probe and measure; kept in the folder of its run.

    Args:
        sizes: of the encoder, among others.
        checkpoint: None for random weights.
    """
    found = run / "compare.json"
    if not found.exists():
        reproducibility.seed_all(seed)
        encoder = Encoder(**{key: sizes[key] for key in sizes.keys() & inspect.signature(Encoder).parameters})
        if checkpoint:
            load_pretrained(nn.ModuleDict({"encoder": encoder}), checkpoint)
        run.mkdir(parents=True, exist_ok=True)
        result = {}
        for name, block in probes.items():
            values = measure_probe(encoder.eval(), seed, run, run / f"parts-{name}", **block)
            result |= {f"{name}, {key}": value for key, value in values.items()}
        data_prep.Place(str(run)).write_json(found.name, result)
    return json.loads(found.read_text())


def compare(
    *,
    to: str,
    methods: dict[str, list[str]],
    seconds: PositiveFloat,
    stills: Annotated[dict, measure_probe],
    clips: Annotated[dict, measure_probe],
    seeds: PositiveInt = 3,
) -> None:
    """Train methods for the same time on this machine, probe their encoders, and write a table and a picture.

    What is finished is not done again: an interrupted comparison goes on where it was.

    Args:
        to: file of the table; the picture has its name, with .png.
        methods: the command of each, without run_name. The encoder of the first is measured untrained, too.
        seconds: of training steps. How many steps that are is measured once, on 40 of each method's.
        stills, clips: see measure_probe.
        seeds: runs of each, of which mean and standard deviation are given.

    Raises:
        ValueError: a run fails, or this is one of several ranks.
    """
    if dist.get_world_size() > 1:
        raise ValueError("comparison: it launches its runs itself; start it as python eval.py, as one process")
    fast = ["callbacks=null", "checkpoints.interval=1000000ba", "schedule.t_warmup=0.07dur"]
    timed = ["callbacks={SpeedMonitor: {window_size: 20}}", "trainer.max_duration=40ba"]
    steps = {}
    for method, command in methods.items():  # all before any training, on a machine that is idle alike
        speed = trained(f"compare_{method}_speed", [*command, *fast, *timed])
        steps[method] = max(1, round(seconds * speed["throughput/batches_per_sec"]))
    budget = f"{seconds:g} s of training steps each, {seeds} seeds, {os.cpu_count()} cores ({platform.machine()})"
    rows, first = {}, OmegaConf.load(f"runs/compare_{next(iter(methods))}_speed/config.yaml").model
    for method, command in ({"random weights": []} | methods).items():
        results = []
        for seed in range(seeds):
            run, sizes, checkpoint = Path(f"runs/compare_random_{seed}"), first, None
            if command:
                run = Path(f"runs/compare_{method}_{steps[method]}_{seed}")
                trained(run.name, [*command, *fast, f"seed={seed}", f"trainer.max_duration={steps[method]}ba"])
                sizes, checkpoint = OmegaConf.load(run / "config.yaml").model, str(run / "checkpoints" / LATEST)
            results.append(measured(run, sizes, seed, {"stills": stills, "clips": clips}, checkpoint))
        values = {key: [100 * one[key] for one in results] for key in results[0]}
        rows[method] = {"steps": [steps.get(method, 0)]} | values
        write_comparison(rows, to, budget)


def write_comparison(rows: dict[str, dict[str, list[float]]], to: str, budget: str) -> None:
    """Write values by method and column, one for each seed, as a table of means and standard deviations, and as bars.

    The column `steps` comes first, and has one value. `budget` is what every row was given, in words.
    """
    columns = list(next(iter(rows.values())))
    lines = [f"Accuracy in %, mean ± standard deviation: {budget}.", ""]
    lines += ["| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    means, spreads = {}, {}
    for method, row in rows.items():
        means[method] = [np.mean(row[key]) for key in columns]
        spreads[method] = [np.std(row[key], ddof=1) if len(row[key]) > 1 else 0.0 for key in columns]
        cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means[method], spreads[method], strict=True)]
        lines.append("| " + " | ".join([method, f"{row['steps'][0]}", *cells[1:]]) + " |")
    folder = data_prep.Place(os.path.dirname(to) or ".")
    folder.write(os.path.basename(to), ("\n".join(lines) + "\n").encode())
    figure = Figure(figsize=(3 * len(columns[1:]), 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(1, len(columns[1:]), squeeze=False, sharey=True)[0]
    for number, axis in enumerate(axes, start=1):
        axis.barh(list(rows), [mean[number] for mean in means.values()], xerr=[one[number] for one in spreads.values()])
        axis.set(title=columns[number], xlabel="%")
    figure.suptitle(budget)
    axes[0].invert_yaxis()  # of all, which share it: the first method above
    figure.savefig(Path(to).with_suffix(".png"), dpi=100)


def evaluate(
    *,
    run_name: str,
    checkpoint: str | None,
    seed: int = 0,
    device: str | None = None,
    precision: Literal["fp32", "amp_fp16", "amp_bf16"] = "fp32",
    model: Annotated[dict, ViCMAE] | None = None,
    classifier: Annotated[dict, Classifier] | None = None,
    head: NonNegativeInt | None = None,
    accuracy: Annotated[dict, measure_accuracy] | None = None,
    probe: Annotated[dict, measure_probe] | None = None,
    reconstructions: list[str] | None = None,
    attention: list[str] | None = None,
    export: str | None = None,
    table: Annotated[dict, write_table] | None = None,
    comparison: Annotated[dict, compare] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint and carry out the measurements that are asked for.

    Args:
        checkpoint: of pretrain.py or finetune.py, an official file or the name of timm's weights; null for random weights.
        precision: of the forward passes.
        model: sizes of a pre-trained model, for `probe`, `reconstructions`, `attention` and `export`.
        classifier: sizes of a classifier, for `accuracy`, and for `export` where no `model` is given.
        head: where the classifier has one for each data set, which of them, from 0.
        reconstructions, attention: data sets to draw samples from.
        export: file to write the encoder, or the classifier, to, in timm's names.
        table, comparison: of other runs; nothing else is measured then.

    Raises:
        ValueError: a checkpoint or data that do not fit, or a measurement without its model.
    """
    if table:
        write_table(**table)
        return {"table": table["to"]}
    if comparison:
        compare(**comparison)
        return {"comparison": comparison["to"]}
    whole = export and classifier and not model  # to be exported with its head
    asked = {"model": probe or reconstructions or attention or (export and not whole), "classifier": accuracy or whole}
    if not any(asked.values()):
        raise ValueError("nothing is asked for; give accuracy, probe, reconstructions, attention, export or table")
    for name, sizes in (("model", model), ("classifier", classifier)):
        if asked[name] and sizes is None:
            raise ValueError(f"the block {name} is missing: it gives the sizes of what is measured")
    for name, to in (("export", export), ("probe.features", (probe or {}).get("features"))):
        if to and not Path(to).absolute().parent.is_dir():
            raise ValueError(f"{name} {to}: its folder does not exist")
    for path in chain(reconstructions or (), attention or (), (accuracy or {}).get("data", ())):
        data_prep.read_classes(path)

    where = get_device(device)
    kind, half = {"gpu": "cuda"}.get(where.name, where.name), {"amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}
    autocast = torch.autocast(kind, half.get(precision), enabled=precision in half)
    dist.initialize_dist(where)
    reproducibility.seed_all(seed)
    run, first = Path("runs", run_name), dist.get_global_rank() == 0
    result: dict[str, Any] = {"run_name": run_name, "checkpoint": checkpoint, "seed": seed}
    run.mkdir(parents=True, exist_ok=True)
    if asked["model"]:
        net = load(ViCMAE(**model), checkpoint, where, ("decoder.",) if reconstructions else ())
        if probe:
            with autocast:
                parts = parts_folder(run, checkpoint, seed, model, probe | {"precision": precision})
                result |= measure_probe(net.encoder, seed, run, parts, **probe)
        if reconstructions and first:
            draw_reconstructions(net, reconstructions, run / "reconstructions.png")
        if attention and first:
            draw_attention(net.encoder, attention, run / "attention.png")
        if export:
            export_timm(net.encoder, export)
    if asked["classifier"]:
        classes = common_classes(accuracy["data"]) if accuracy else range(count_classes(checkpoint, head))
        net = load(Classifier(len(classes), **classifier), checkpoint, where, ("head.", "neck."), head)
        if whole:
            export_timm(net, export)
    if accuracy:
        with autocast:
            parts = parts_folder(run, checkpoint, seed, classifier, accuracy | {"precision": precision, "head": head})
            measured, confusion = measure_accuracy(net, parts, **accuracy)
        result |= measured
        if first:
            draw_confusion(confusion, classes, run / "confusion.png")
            counts = zip(classes, confusion.diag().tolist(), confusion.sum(dim=1).tolist(), strict=True)
            right = {name: hits / count for name, hits, count in counts if count}
            data_prep.Place(str(run)).write_json("per_class.json", right)
    if first:
        data_prep.Place(str(run)).write_json("eval.json", result)
        for folder in run.glob("parts-*"):
            shutil.rmtree(folder)
    return result


def parts_folder(run: Path, checkpoint: str | None, seed: int, sizes: dict[str, Any], block: dict[str, Any]) -> Path:
    """The folder for what is done of a measurement, named by all that decides its numbers: no other finds it."""
    files = [Path(checkpoint), *sorted(Path(checkpoint).rglob("*"))] if checkpoint and Path(checkpoint).exists() else []
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    data = [data_prep.read_json(path, "index.json") for key in ("data", "bank", "queries") for path in block.get(key, ())]
    settled = {key: value for key, value in block.items() if key not in ("num_workers", "batch_size", "part_size")}
    told = json.dumps([checkpoint, stamps, seed, sizes, settled, data], sort_keys=True)
    return run / f"parts-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def count_classes(checkpoint: str | None, head: int | None) -> int:
    """C of a classifier's checkpoint; see read_checkpoint.

    Raises:
        ValueError: it has no head, or none is given.
    """
    bias = read_checkpoint(checkpoint, head).get("head.bias") if checkpoint else None
    if bias is None:
        raise ValueError(f"export: checkpoint {checkpoint} has no head; give the block model to export the encoder alone")
    return len(bias)


def load(
    net: nn.Module, checkpoint: str | None, device: Device, needed: tuple[str, ...], head: int | None = None
) -> nn.Module:
    """Fill a model from a checkpoint, see load_pretrained, and put it on the device.

    Raises:
        ValueError: the checkpoint lacks weights whose names begin with one of `needed`, or has some that the model has not.
    """
    if checkpoint:
        report = load_pretrained(net, checkpoint, head)
        missing = [name for name in report["missing"] if name.startswith(needed)] if needed else []
        if "head.0.bias" in report["unused"] and "head.bias" in missing:
            raise ValueError(f"checkpoint {checkpoint} has a head for each of several data sets; say which, such as head=0")
        if missing:
            raise ValueError(f"checkpoint {checkpoint} lacks {missing[0]}, which is needed here")
        if "neck." in needed and any(name.startswith("neck.") for name in report["unused"]):
            raise ValueError(f"checkpoint {checkpoint} is of a linear probe; set classifier.freeze to true")
    return device.module_to_device(net).eval()


def plan(config: dict[str, Any], gpus: int) -> str:
    """What an evaluation would take, from its configuration alone; the linear heads of a probe are not counted.

    Raises:
        ValueError: neither accuracy nor probe is asked for.
    """
    asked = config.get("accuracy") or config.get("probe")
    if not asked:
        raise ValueError("--plan: give a block accuracy or probe, which this configuration has not")
    sizes = config.get("classifier") or {
        key: value for key, value in config["model"].items() if key in inspect.signature(Encoder).parameters
    }
    data = asked.get("data") or asked["bank"] + asked["queries"]
    views = asked.get("temporal_views", 1) * asked.get("spatial_views", 1)
    with torch.device("meta"):
        net = Classifier(size_of(data[0])[1], **sizes | {"freeze": True})  # counted without a backward pass
        frames, size = net.encoder.num_frames, net.encoder.img_size
        flops = net.flops_per_batch({"inputs": torch.empty(1, views, frames, 3, size, size)})
    net.requires_grad_(False)
    precision, at_once = config.get("precision", "fp32"), asked.get("batch_size", 256)
    activations = at_once * views * (activation_bytes(classifier_stacks(net), precision, 0) + 2 * 4 * frames * 3 * size**2)
    state = 4 * sum(parameter.numel() for parameter in net.parameters())
    samples = sum(size_of(path)[0] for path in data)
    return show_plan(net, gpus, samples, flops, is_half(precision), state, activations, at_once)


def main() -> None:
    with one_line_errors():
        arguments, gpus = asked_plan(sys.argv[1:])
        config = load_config(arguments, evaluate)
        if gpus:
            print(plan(config, gpus))
            return
        result = evaluate(**config)
    if dist.get_global_rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
