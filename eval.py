"""Measure what was learnt: accuracy with many views, k-NN and linear probe of an encoder, pictures, an export for timm.

    python eval.py yamls/eval_demo.yaml                                     # k-NN, linear probe, pictures of runs/demo
    python eval.py yamls/eval_demo.yaml checkpoint=null run_name=random     # the same of random weights
    python eval.py yamls/eval_demo.yaml export=encoder.safetensors          # for timm.create_model
    python eval.py yamls/compare.yaml                                       # trains and compares methods

The signature of `evaluate` is the schema of its YAML files: each block that is given is a measurement. The last line printed
is the result as JSON, which is also in runs/{run_name}/eval.json, but for tables and comparisons. An evaluation that was
interrupted goes on when the same command is given again.
"""

import inspect
import json
import shutil
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from composer.devices import Device
from composer.trainer.trainer import get_device
from composer.utils import dist, reproducibility
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from benchmarks.compare import compare, write_table
from evaluation.pictures import draw_attention, draw_confusion, draw_reconstructions
from evaluation.probes import cache_key, infer, measure_probe, readable
from model import Classifier, Encoder, ViCMAE
from shards.format import UNREADABLE, common_classes, read_classes
from shards.storage import Storage, write_file
from shards.views import DataSets, EvalViews, PositiveFraction
from training.config import RunName, load_config, one_line_errors
from training.plan import activation_bytes, split_plan_flag, is_half, show_plan, size_of, stack_of
from training.weights import load_pretrained, read_checkpoint


def measure_accuracy(
    net: Classifier,
    parts: Path,
    *,
    data: DataSets,
    temporal_views: PositiveInt = 1,
    spatial_views: PositiveInt = 1,
    crop_pct: PositiveFraction = 0.875,
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
    views = EvalViews(
        data, *sizes, frame_interval=frame_interval, unreadable=parts.parent / UNREADABLE
    )
    begin, computed = time.monotonic(), 0

    def forward(inputs: Tensor) -> Tensor:
        nonlocal computed
        computed += len(inputs) * dist.get_world_size()
        return net.eval_forward({"inputs": inputs})

    probabilities, labels = readable(
        *infer(net, forward, views, batch_size, num_workers, parts, part_size)
    )
    result = {"samples_per_second": computed / (time.monotonic() - begin)}
    for name, k in {
        "top1": 1,
        "top5": min(5, net.num_classes),
    }.items():  # every rank has it all: nothing is to be gathered
        result[name] = float(
            multiclass_accuracy(probabilities, labels, net.num_classes, average="micro", top_k=k)
        )
    return result, multiclass_confusion_matrix(probabilities, labels, net.num_classes)


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
        write_file(to, file)


def evaluate(
    *,
    run_name: RunName,
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
        run_name, seed: folder in runs/; what draws random weights and chooses labelled samples.
        device: Composer's, such as cpu or gpu; the best there is if not given.
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
    asked = {
        "model": probe or reconstructions or attention or (export and not whole),
        "classifier": accuracy or whole,
    }
    if not any(asked.values()):
        raise ValueError(
            "nothing is asked for; give accuracy, probe, reconstructions, attention, export, table, comparison"
        )
    for name, sizes in (("model", model), ("classifier", classifier)):
        if asked[name] and sizes is None:
            raise ValueError(f"the block {name} is missing: it gives the sizes of what is measured")
    if reconstructions and model.get("mask") == "none":
        raise ValueError(
            "reconstructions: model.mask is none, and nothing is removed that could be reconstructed"
        )
    for name, to in (("export", export), ("probe.features", (probe or {}).get("features"))):
        if to and not Path(to).absolute().parent.is_dir():
            raise ValueError(f"{name} {to}: its folder does not exist")
    for path in chain(reconstructions or (), attention or (), (accuracy or {}).get("data", ())):
        read_classes(path)

    where = get_device(device)
    kind, half = (
        {"gpu": "cuda"}.get(where.name, where.name),
        {"amp_fp16": torch.float16, "amp_bf16": torch.bfloat16},
    )
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
                parts = (
                    run
                    / f"parts-{cache_key(checkpoint, seed, model, probe | {'precision': precision})}"
                )
                result |= measure_probe(net.encoder, seed, run, parts, **probe)
        if reconstructions and first:
            draw_reconstructions(net, reconstructions, run / "reconstructions.png")
        if attention and first:
            draw_attention(net.encoder, attention, run / "attention.png")
        if export:
            export_timm(net.encoder, export)
    if asked["classifier"]:
        classes = (
            common_classes(accuracy["data"]) if accuracy else range(count_classes(checkpoint, head))
        )
        net = load(
            Classifier(len(classes), **classifier), checkpoint, where, ("head.", "neck."), head
        )
        if whole:
            export_timm(net, export)
    if accuracy:
        with autocast:
            told = accuracy | {"precision": precision, "head": head}
            parts = run / f"parts-{cache_key(checkpoint, seed, classifier, told)}"
            measured, confusion = measure_accuracy(net, parts, **accuracy)
        result |= measured
        if first:
            draw_confusion(confusion, classes, run / "confusion.png")
            counts = zip(
                classes, confusion.diag().tolist(), confusion.sum(dim=1).tolist(), strict=True
            )
            right = {name: hits / count for name, hits, count in counts if count}
            Storage(str(run)).write_json("per_class.json", right)
    if first:
        Storage(str(run)).write_json("eval.json", result)
        for folder in run.glob("parts-*"):
            shutil.rmtree(folder)
    return result


def count_classes(checkpoint: str | None, head: int | None) -> int:
    """C of a classifier's checkpoint; see read_checkpoint.

    Raises:
        ValueError: it has no head, or none is given.
    """
    bias = read_checkpoint(checkpoint, head).get("head.bias") if checkpoint else None
    if bias is None:
        raise ValueError(
            f"export: checkpoint {checkpoint} has no head; give the block model to export the encoder alone"
        )
    return len(bias)


def load(
    net: nn.Module,
    checkpoint: str | None,
    device: Device,
    needed: tuple[str, ...],
    head: int | None = None,
) -> nn.Module:
    """Fill a model from a checkpoint, see load_pretrained, and put it on the device.

    Raises:
        ValueError: the checkpoint lacks weights whose names begin with one of `needed`, or has some that the model has not.
    """
    if checkpoint:
        report = load_pretrained(net, checkpoint, head)
        missing = [name for name in report["missing"] if name.startswith(needed)] if needed else []
        if "head.0.bias" in report["unused"] and "head.bias" in missing:
            raise ValueError(
                f"checkpoint {checkpoint} has a head for each of several data sets; say which, such as head=0"
            )
        if missing:
            raise ValueError(f"checkpoint {checkpoint} lacks {missing[0]}, which is needed here")
        if "neck." in needed and any(name.startswith("neck.") for name in report["unused"]):
            raise ValueError(
                f"checkpoint {checkpoint} is of a linear probe; set classifier.freeze to true"
            )
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
        key: value
        for key, value in config["model"].items()
        if key in inspect.signature(Encoder).parameters
    }
    data = asked.get("data") or asked["bank"] + asked["queries"]
    views = asked.get("temporal_views", 1) * asked.get("spatial_views", 1)
    with torch.device("meta"):
        net = Classifier(
            size_of(data[0])[1], **sizes | {"freeze": True}
        )  # counted without a backward pass
        frames, size = net.encoder.num_frames, net.encoder.img_size
        flops = net.flops_per_batch({"inputs": torch.empty(1, views, frames, 3, size, size)})
    net.requires_grad_(False)
    precision, at_once = config.get("precision", "fp32"), asked.get("batch_size", 256)
    stacks = [stack_of(net.encoder, 1 + net.encoder.num_patches)]
    activations = (
        at_once * views * (activation_bytes(stacks, precision, 0) + 2 * 4 * frames * 3 * size**2)
    )
    state = 4 * sum(parameter.numel() for parameter in net.parameters())
    samples = sum(size_of(path)[0] for path in data)
    return show_plan(net, gpus, samples, flops, is_half(precision), state, activations, at_once)


def main() -> None:
    with one_line_errors():
        arguments, gpus = split_plan_flag(sys.argv[1:])
        config = load_config(arguments, evaluate)
        if gpus:
            print(plan(config, gpus))
            return
        result = evaluate(**config)
    if dist.get_global_rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
