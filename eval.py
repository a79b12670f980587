"""Measure a model: accuracy with many views, k-NN and linear probe; draw pictures; export.

    python eval.py yamls/eval_demo.yaml                         # probes and pictures of runs/demo
    python eval.py yamls/eval_demo.yaml random_weights=true run_name=random
    python eval.py yamls/eval_demo.yaml export=encoder.safetensors
    python eval.py checkpoint=runs/mine predict=[a.mp4,photos/,clips/*.webm]
    python eval.py checkpoint=runs/mine embed=[photos/] patches=true
    composer -n 8 eval.py yamls/eval_k400_vitl.yaml             # accuracy of a classifier

The fields of EvalConfig are the keys of its YAML files: each block that is given is a measurement.
The last line printed is the result as JSON, which is also in runs/{run_name}/eval.json.
From Python, load_encoder("runs/mine") returns the encoder alone.
"""

import sys

from training.announce import announce, print_once, say_if_slow
from training.keys import check_keys

if __name__ == "__main__":  # before the imports of torch and Composer, which take 6 s
    check_keys(__file__, "EvalConfig", sys.argv[1:])
    announce("importing torch and Composer")

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from composer import Trainer
from composer.trainer.trainer import get_device
from composer.utils import dist, reproducibility
from pydantic import NonNegativeInt
from torch import Tensor, nn

from evaluation.accuracy import class_labels, label_numbers, load_eval
from evaluation.files import FileViews, embed_files, find_media, predict_files
from evaluation.pictures import draw_attention, draw_confusion, draw_reconstructions
from evaluation.probes import encode_views, measure_probe
from evaluation.ranks import on_rank_0
from methods import CLASSIFIERS, PRETRAINING, method_of
from model import Classifier, Encoder, ViCMAE
from shards.format import labelled_classes, read_classes
from shards.storage import Storage
from shards.workers import exit_on_signals
from training.config import RunName, convert_block, keywords_of, load_config
from training.export import check_export, check_exportable, export
from training.help import stage_help
from training.plan import Machine, forward_plan, size_of, split_plan_flags
from training.precision import forbid_tf32
from training.report_page import write_report
from training.resume import check_data_sets
from training.sizes import find_run, known_model
from training.sources import ConfigError, errors_of, one_line_errors, read_settings
from training.weights import class_names_in, load_pretrained, read_checkpoint

CROPS = ("temporal_views", "spatial_views", "crop_pct", "frame_interval")  # of EvalViews
MODELS = PRETRAINING | CLASSIFIERS
DTYPES = {"amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}


@dataclass(kw_only=True)
class EvalConfig:
    """The keys of an evaluation's YAML files.

    Args:
        run_name: of the run directory; by default, the name of the checkpoint's run and _eval.
        checkpoint: run, run directory or file of pretrain.py or finetune.py, an official file or
            the name of timm's weights; null for none. Method and sizes come from it, unless
            `method` and `model` give them.
        random_weights: take only the sizes of `checkpoint`, for the baseline of random weights.
        seed: of random weights and of the choice of labelled samples.
        device: Composer's, such as cpu or gpu; the best that there is if null.
        precision: of the forward passes.
        method, model: the method, and arguments in place of the checkpoint's.
        accuracy: top-1 and top-5 accuracy of a classifier, see load_eval.
        average: what is averaged over the views of a sample: their softmax (SlowFast, mae_st) or
            their logits (the author of ViC-MAE).
        probe: k-NN and linear accuracy of the encoder, see measure_probe.
        reconstructions, attention: data sets of which samples are drawn.
        predict, embed: videos, images, folders or patterns: predictions.csv of a classifier, and
            features.npz of an encoder. They are cropped as in the evaluation of the checkpoint's
            run, if it has one.
        patches: embed all patches, not their mean.
        num_workers: processes that decode the files of predict and embed.
        export: where to write the encoder, or the classifier with its head: FILE.safetensors (in
            timm's names), FILE.onnx, timm:FOLDER, transformers:FOLDER or vit_mae:FOLDER.
    """

    checkpoint: str | None
    run_name: RunName | None = None
    random_weights: bool = False
    seed: int = 0
    device: str | None = None
    precision: Literal["fp32", "amp_fp16", "amp_bf16"] = "fp32"
    method: str | None = None
    model: dict[str, Any] | None = None
    accuracy: Annotated[dict, load_eval] | None = None
    average: Literal["softmax", "logits"] = "softmax"
    probe: Annotated[dict, measure_probe] | None = None
    reconstructions: list[str] | None = None
    attention: list[str] | None = None
    predict: list[str] | None = None
    embed: list[str] | None = None
    patches: bool = False
    num_workers: NonNegativeInt = 0
    export: str | None = None

    def __post_init__(self):
        if self.run_name is None:
            run = self.checkpoint and find_run(self.checkpoint)
            self.run_name = f"{run.name if run else 'files'}_eval"

    @property
    def data_sets(self) -> list[str]:
        """Return the paths of all data sets that are measured on."""
        probe, accuracy = self.probe or {}, self.accuracy or {}
        paths = [*accuracy.get("paths", ()), *probe.get("bank", ()), *probe.get("queries", ())]
        return [*paths, *(self.reconstructions or ()), *(self.attention or ())]


def check_request(config: EvalConfig) -> None:
    """Check that something is requested, and that data sets and folders exist.

    Raises:
        ValueError: they do not.
    """
    pictures = (config.reconstructions or []) + (config.attention or [])
    files = (config.predict or []) + (config.embed or [])
    if not (config.accuracy or config.probe or pictures or files or config.export):
        blocks = "accuracy, probe, reconstructions, attention, predict, embed or export"
        raise ValueError(f"no measurement: give a block {blocks}")
    find_media(files)
    if config.random_weights and not config.checkpoint:
        raise ValueError("random_weights: needs a checkpoint, whose sizes it takes")
    features = (config.probe or {}).get("features")
    if features and not Path(features).absolute().parent.is_dir():
        raise ValueError(f"probe.features={features}: its folder does not exist")
    if config.export:
        check_export(config.export)
    for path in pictures + (config.accuracy or {}).get("paths", []):
        read_classes(path)


def count_classes(kind: type[Classifier], config: EvalConfig, weights: dict) -> int | list[int]:
    """Return the number of classes that the head of a checkpoint has, or else the data sets have.

    Raises:
        ValueError: the checkpoint has no head.
    """
    if kind.head_per_data_set:
        return kind.classes_in(weights)
    if "head.bias" in weights:
        return len(weights["head.bias"])
    if config.checkpoint or not config.accuracy:
        raise ValueError(f"checkpoint={config.checkpoint}: has no classifier's head")
    return len(labelled_classes(config.accuracy["paths"][0]))


def build_model(config: EvalConfig, planned_classes: int | None = None) -> ViCMAE | Classifier:
    """Return the model of a checkpoint, with random weights.

    Args:
        planned_classes: number of classes for a plan, which reads no checkpoint; None otherwise.

    Raises:
        ValueError: an unknown method or size, or a checkpoint that does not suit the measurement.
    """
    for_plan = planned_classes is not None
    known = {"stage": "pretrain", "method": None, "model": {}}
    weights = {}
    if config.checkpoint:
        known = known_model(config.checkpoint, for_plan)
        weights = {} if for_plan else read_checkpoint(config.checkpoint)
    method = config.method or known["method"]
    method = method or method_of(known["stage"], known["model"], weights)
    if method not in MODELS:
        raise ValueError(f"method={method}: must be one of {', '.join(MODELS)}")
    kind = MODELS[method]
    try:
        given = convert_block(config.model or {}, kind, ["model"], {})
    except ConfigError as error:
        raise ValueError(f"{'.'.join(error.path)}: {error}") from error
    if not known["model"] and not given:
        raise ValueError("model: missing; without a checkpoint, give the sizes of the model")
    keys = keywords_of(kind)  # the config.yaml of earlier versions may have others
    sizes = {key: value for key, value in known["model"].items() if key in keys} | given
    if "num_heads" not in sizes:
        width = f"of width {sizes['embed_dim']}" if "embed_dim" in sizes else "without a width"
        raise ValueError(f"model.num_heads: missing; a checkpoint {width} does not show it")
    if not issubclass(kind, Classifier):
        if config.accuracy:
            raise ValueError(f"accuracy: needs a classifier, and method={method} is none")
        with errors_of("model"):
            return kind(**sizes)
    if for_plan:
        classes = [planned_classes] if kind.head_per_data_set else planned_classes
    else:
        classes = count_classes(kind, config, weights)
    with errors_of("model"):
        net = kind(classes, **sizes)
    net.class_names = class_names_in(weights)
    return net


@say_if_slow("loading the checkpoint")
def load_model(config: EvalConfig) -> ViCMAE | Classifier:
    """Return the model that is measured, with its weights, in evaluation mode.

    Raises:
        ValueError: see build_model; or the checkpoint lacks weights that are needed.
    """
    net = build_model(config)
    if config.predict and (not isinstance(net, Classifier) or net.head_per_data_set):
        raise ValueError(f"predict: {type(net).__name__} is no classifier with one head")
    if config.export:
        check_exportable(net, config.export)
    if config.reconstructions and getattr(net, "decoder", None) is None:
        raise ValueError(f"reconstructions: {type(net).__name__} has no decoder")
    if config.checkpoint and not config.random_weights:
        # Only reconstructions need the decoder; earlier versions of ST-MAE have it in another size.
        unneeded = () if config.reconstructions else ("decoder",)
        report = load_pretrained(net, config.checkpoint, unneeded)
        needed = ("head.", "neck.") if isinstance(net, Classifier) else ()
        if config.reconstructions:
            needed = ("decoder.",)
        missing = [name for name in report["missing"] if name.startswith(needed)]
        if missing:
            raise ValueError(f"checkpoint={config.checkpoint}: lacks {missing[0]}")
    return net.eval()


def measure_accuracy(net: Classifier, run: Path, config: EvalConfig) -> dict[str, Any]:
    """Measure a classifier's accuracy, write per_class.json and draw confusion.png.

    The probabilities are averaged over all views of a sample. The result has top1, top5, average
    and samples_per_second.
    """
    owner = f"checkpoint={config.checkpoint}"
    labels = label_numbers(net, config.accuracy["paths"], owner)
    if config.checkpoint and not net.class_names:
        print_once(f"{owner}: has no class names; classes are compared by number")
    evaluator = load_eval(run, net, labels, **config.accuracy)
    evaluator.metric_names.append("confusion")
    net.average = config.average
    device = get_device(config.device)
    precision = config.precision if device.name == "gpu" else "fp32"
    trainer = Trainer(
        model=net,
        eval_dataloader=evaluator,
        device=device,
        precision=precision,
        seed=config.seed,
    )
    forbid_tf32()
    begin = time.monotonic()
    with autocast_of(config):  # on a CPU, where Composer has no precision but fp32
        trainer.eval()
    seconds = time.monotonic() - begin
    metrics = trainer.state.eval_metrics["eval"]
    confusion = metrics["confusion"].compute().cpu()  # (C, C), true classes as rows
    samples = len(evaluator.dataloader.dataloader.dataset)
    result = {name: float(metrics[name].compute()) for name in ("top1", "top5")}
    if dist.get_global_rank() == 0:
        classes = class_labels(net, config.accuracy["paths"][0])
        right, counts = confusion.diag().tolist(), confusion.sum(dim=1).tolist()
        by_class = zip(classes, right, counts, strict=True)
        accuracy = {name: hits / count if count else None for name, hits, count in by_class}
        Storage(str(run)).write_json("per_class.json", accuracy)
        draw_confusion(confusion, classes, run / "confusion.png")
    return result | {"average": config.average, "samples_per_second": samples / seconds}


def read_files(
    net: ViCMAE | Classifier, run: Path, config: EvalConfig
) -> Iterator[dict[str, dict]]:
    """Predict and embed media files, and yield both results, see predict_files and embed_files."""
    settings = crops_of(config) | {"patch_size": net.encoder.patch_size}
    sizes = (net.encoder.img_size, net.encoder.num_frames)
    with autocast_of(config):
        if config.predict:
            classes = net.class_names or list(map(str, range(net.num_classes)))
            views = FileViews(find_media(config.predict), *sizes, **settings)
            yield {"predict": predict_files(net, views, classes, run, config.num_workers)}
        if config.embed:
            views = FileViews(find_media(config.embed), *sizes, **settings)
            workers = config.num_workers
            yield {"embed": embed_files(net.encoder, views, run, config.patches, workers)}


def crops_of(config: EvalConfig) -> dict[str, Any]:
    """Return the crops of the evaluation in the checkpoint's run; empty if it has none."""
    run = find_run(config.checkpoint) if config.checkpoint else None
    if run is None or not (run / "config.yaml").exists():
        return {}
    settings = read_settings(run / "config.yaml").get("eval_data") or {}
    return {name: settings[name] for name in CROPS if name in settings}


def autocast_of(config: EvalConfig) -> contextlib.AbstractContextManager:
    """Return a context in which forward passes have the precision of a config."""
    if config.precision not in DTYPES:
        return contextlib.nullcontext()
    kind = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, DTYPES[config.precision])


def load_encoder(checkpoint: str) -> Encoder:
    """Return the encoder of a checkpoint, in evaluation mode, on the CPU.

    It takes normalised images (B, 3, H, W), see shards.augment.normalise, and returns tokens.
    """
    return load_model(EvalConfig(checkpoint=checkpoint)).encoder


def measurements(
    net: ViCMAE | Classifier, run: Path, config: EvalConfig
) -> Iterator[dict[str, Any]]:
    """Carry out the measurements that a config asks for, and yield the result of each."""
    if config.probe:
        with autocast_of(config):
            probe = measure_probe(net.encoder, config.seed, run, **config.probe)
        yield probe
    if config.accuracy:
        yield measure_accuracy(net, run, config)
    if dist.get_global_rank() == 0:
        yield from read_files(net, run, config)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Load a checkpoint and carry out the measurements that a config asks for."""
    check_request(config)
    device = get_device(config.device)
    dist.initialize_dist(device, timeout=3600.0)  # seconds; linear heads are fitted on rank 0
    forbid_tf32()
    reproducibility.seed_all(config.seed)
    run = Path("runs", config.run_name)
    data_sets = on_rank_0(partial(check_data_sets, run, config.data_sets))
    if dist.get_global_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        Storage(str(run)).write_json("data_sets.json", data_sets)
        given = {name: value for name, value in asdict(config).items() if value is not None}
        text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
        Storage(str(run)).write("eval.yaml", text.encode())
    net = device.module_to_device(load_model(config))
    result: dict[str, Any] = {
        "run_name": config.run_name,
        "checkpoint": config.checkpoint,
        "seed": config.seed,
    }
    if config.random_weights or not config.checkpoint:
        result["random_weights"] = True
        print_once("the weights are random")
    is_rank_zero = dist.get_global_rank() == 0
    if config.export and is_rank_zero:
        export(net, config.export, crops_of(config).get("crop_pct", 0.875))
    for measured in measurements(net, run, config):
        result |= measured
        if is_rank_zero:  # what is measured must not be lost if a later measurement fails
            Storage(str(run)).write_json("eval.json", result)
    if is_rank_zero:
        Storage(str(run)).write_json("eval.json", result)  # also if there are pictures alone
        if config.reconstructions:
            draw_reconstructions(net, config.reconstructions, run / "reconstructions.png")
        if config.attention:
            draw_attention(net.encoder, config.attention, run / "attention.png")
        write_report(run, run / "report.html")
    return result


def plan(config: EvalConfig, machine: Machine) -> str:
    """Return the cost of an evaluation, computed without data; linear heads are not counted.

    Raises:
        ValueError: there is neither accuracy nor probe.
    """
    if not (config.accuracy or config.probe):
        raise ValueError("--plan: give a block accuracy or probe")
    block = config.accuracy or config.probe
    paths = block["paths"] if config.accuracy else block["bank"] + block["queries"]
    views = block.get("temporal_views", 1) * block.get("spatial_views", 1)
    with torch.device("meta"):
        net = build_model(config, planned_classes=size_of(paths[0])[1])
        encoder = Embedder(net.encoder).requires_grad_(False)
        size, frames = net.encoder.img_size, net.encoder.num_frames
        batch = {"inputs": torch.empty(1, views, frames, 3, size, size)}
    samples = sum(size_of(path)[0] for path in paths)
    at_once = block.get("batch_size", 256)
    return str(forward_plan(encoder, batch, samples, at_once, config.precision, machine))


class Embedder(nn.Module):
    """The encoder's forward pass on a batch of an evaluation, for its plan."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return encode_views(self.encoder, batch["inputs"])


def main() -> None:
    exit_on_signals()
    with one_line_errors():
        if {"--help", "-h"} & set(sys.argv):
            print(stage_help(__doc__, EvalConfig))
            return
        arguments, machine = split_plan_flags(sys.argv[1:])
        config = EvalConfig(**load_config(arguments, EvalConfig))
        if machine:
            print(plan(config, machine))
            return
        result = evaluate(config)
    if dist.get_global_rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
