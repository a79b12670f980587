"""Pre-train ViC-MAE, or another method, on video clips and images (sections 3 and 4.1).

    composer pretrain.py yamls/demo.yaml                            # a laptop: 4 minutes
    composer -n 8 pretrain.py yamls/vitl.yaml                       # 8 GPUs
    composer pretrain.py yamls/vitl.yaml yamls/paper.yaml seed=1    # files merge left to right
    composer pretrain.py yamls/demo.yaml yamls/methods/simclr.yaml  # another method
    composer pretrain.py yamls/own.yaml raw=[my/clips,my/photos]    # your own files
    python pretrain.py yamls/vitl.yaml --plan                       # cost, without data or GPUs

The fields of PretrainConfig are the keys of its YAML files. A block holds the keyword arguments of
one callable, or of each class that it names. Everything of a run is in runs/{run_name}/:
config.yaml, checkpoints/, metrics.jsonl, result.json, loss.png, reconstructions.png, and
report.html with all of them.
"""

import sys

from training.announce import announce, print_once, say_if_slow
from training.keys import check_keys

if __name__ == "__main__":  # before the imports of torch and Composer, which take 6 s
    check_keys(__file__, "PretrainConfig", sys.argv[1:])
    announce("importing torch and Composer")
    from training.peers import peer_watch

    peer_watch().start()

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from composer import Trainer
from composer.utils import dist
from filelock import FileLock

import data_prep
from evaluation.pictures import draw_reconstructions
from methods import PRETRAINING, check_blocks
from model import Batch, ViCMAE
from shards.augment import augment_batch
from shards.decode import Recipe
from shards.format import Clips, same_classes
from shards.layouts import EXTENSIONS
from shards.loader import prefetch
from shards.report import print_summary
from shards.storage import Storage
from shards.stream import TrainingData
from shards.views import PretrainingViews, check_frames
from shards.workers import exit_on_signals
from training.checkpoints import appears
from training.config import Choice, keywords_of, load_config
from training.cost import flops_per_sample
from training.help import stage_help
from training.optimizer import build_optimizer
from training.plan import Machine, split_plan_flags, training_plans, training_report
from training.report_page import write_report
from training.run import RunConfig, build_trainer, finish_run, fit, start_run
from training.sizes import ENCODER_SIZES, PART_SIZES, known_model
from training.sources import errors_of, one_line_errors
from training.speedups import unwrapped
from training.weights import describe, load_pretrained

NEW_PARTS = ("decoder", "projector", "predictor")  # parts that may start from random weights
RANK_ZERO_FIRST = 60.0  # seconds before the other ranks of a machine try to convert `raw`
RAW = "raw.json"  # in runs/NAME/data/: the folders that were converted, and the data sets


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """The keys of a pre-training's YAML files.

    Args:
        method: a method of methods.PRETRAINING.
        make_demo: folder in which the demonstration's data are made if they are missing.
        pretrained: weights to begin with, see read_checkpoint. The sizes of the model come from
            them, except img_size. Parts that they lack, such as a projector, start from random
            weights.
        raw: folders of videos and images, which are converted to runs/{run_name}/data/ first, and
            join data.streams. If the batch is more than a quarter of the samples, it is lowered to
            the largest power of two within a quarter.
        recipe: how `raw` is converted, such as clip_seconds.
    """

    augment: Annotated[dict, PretrainingViews]
    model: Annotated[dict, Choice("method", PRETRAINING, "vicmae")]
    optimizer: Annotated[dict, build_optimizer]
    method: str | None = None
    make_demo: str | None = None
    pretrained: str | None = None
    raw: list[str] | None = None
    recipe: Annotated[dict, Recipe, "kind"] | None = None

    @property
    def model_class(self) -> type[ViCMAE]:
        return PRETRAINING[self.method or "vicmae"]

    def new_model(self) -> ViCMAE:
        with errors_of("model"):
            net = self.model_class(**self.model)
        check_blocks(net, self.data, self.augment)
        return net


def take_sizes(config: PretrainConfig, planned: bool = False) -> PretrainConfig:
    """Return a config whose block `model` has the sizes of `pretrained`, except img_size.

    Args:
        planned: see known_model.
    """
    if not config.pretrained:
        return config
    known = known_model(config.pretrained, planned)["model"]
    names = {*ENCODER_SIZES, *PART_SIZES} & keywords_of(config.model_class).keys() - {"img_size"}
    sizes = {name: known[name] for name in names if name in known}
    width = sizes.get("embed_dim")  # a planned run does not know the weights that it begins with
    if width and "num_heads" not in sizes and config.model.get("embed_dim") != width:
        raise ValueError("model.num_heads: give it with model.embed_dim; weights do not show it")
    changed = [name for name in sorted(sizes) if config.model.get(name, sizes[name]) != sizes[name]]
    if changed:
        listed = ", ".join(f"model.{name}={sizes[name]}" for name in changed)
        print_once(f"sizes of {config.pretrained}: {listed}")
    img_size = {"img_size": known["img_size"]} if "img_size" in known else {}
    return replace(config, model=img_size | config.model | sizes)


def kinds_in(source: str) -> list[str]:
    """Return which of videos and images a folder has.

    Raises:
        ValueError: it is no folder, or it has neither.
    """
    storage = Storage(source)
    if not (storage.remote or os.path.isdir(source)):
        fault = "is not a folder; give the folder that contains it"
        if not os.path.exists(source):
            fault = "does not exist; give folders, without patterns"
        raise ValueError(f"raw: {source} {fault}")
    if storage.has("index.json"):
        raise ValueError(
            f"raw: {source} is already converted; give data.streams=[{{path: {source}}}]"
        )
    endings = {os.path.splitext(name)[1].lower() for name in storage.names()}
    kinds = [kind for kind, known in EXTENSIONS.items() if endings.intersection(known)]
    if not kinds:
        remedy = "; convert its tars by data_prep.py" if ".tar" in endings else ""
        raise ValueError(f"raw: {source} has neither videos nor images{remedy}")
    return kinds


def convert_raw(sources: list[str], recipe: dict[str, Any], folder: Path) -> list[str]:
    """Convert folders of videos and images into data sets in `folder`, and return their paths.

    The first rank of a machine converts, and the others wait. If it fails, each of the others tries
    as well, and raises the same error. An interrupted conversion is resumed; a finished conversion
    is kept.

    Raises:
        ValueError: see kinds_in; or the conversion fails, or other folders were converted.
    """
    record = folder / RAW
    if record.exists():
        print_once(f"raw: using the data sets in {folder}; files added since then are not in them")
    else:
        machines = dist.get_world_size() // dist.get_local_world_size()
        if machines > 1:
            remedy = "convert to a shared folder by data_prep.py; give raw=null and data.streams"
            raise ValueError(f"raw: {machines} machines cannot convert together; {remedy}")
        kinds = [kinds_in(source) for source in sources]
        if len({os.path.realpath(source) for source in sources}) < len(sources):
            raise ValueError(f"raw: {', '.join(sources)} has the same folder twice; give each once")
        folder.mkdir(parents=True, exist_ok=True)
        if dist.get_local_rank() != 0:  # wait for the first rank, which converts
            appears(record, RANK_ZERO_FIRST)
        with FileLock(folder / "raw.lock"):
            if not record.exists():
                paths = convert_folders(sources, kinds, recipe, folder)
                content = {"sources": sources, "recipe": recipe, "paths": paths}
                Storage(str(folder)).write_json(record.name, content)
    converted = json.loads(record.read_text())
    made_of = converted["sources"], converted.get("recipe", {})
    if made_of != (sources, recipe):
        raise ValueError(
            f"raw: {folder} holds {', '.join(made_of[0])}, with recipe={made_of[1]}; "
            "choose another run_name, or delete it"
        )
    return converted["paths"]


def convert_folders(
    sources: list[str], kinds: list[list[str]], recipe: dict[str, Any], folder: Path
) -> list[str]:
    """Convert the kinds of files of each source, see kinds_in, and return the paths.

    Raises:
        ValueError: a value of `recipe` is out of range; or as data_prep.convert.
    """
    try:
        Recipe("videos", **recipe)
    except ValueError as error:
        raise ValueError(f"recipe: {error}; the key of an option --a-b is a_b") from error
    paths = []
    for number, source in enumerate(sources):
        for kind in kinds[number]:
            path = str(folder / f"{number}-{Path(os.path.abspath(source)).name}-{kind}")
            print(f"converting the {kind} of {source} to {path}", flush=True)
            report = data_prep.convert(source, path, Recipe(kind, **recipe), max_skipped=0.5)
            print_summary(path, report)
            paths.append(path)
    return paths


def train_on_raw(config: PretrainConfig) -> PretrainConfig:
    """Return a config that trains on the folders of `raw`, with a batch that suits their size."""
    if not config.raw:
        return config
    paths = convert_raw(config.raw, config.recipe or {}, Path("runs", config.run_name, "data"))
    data = config.data | {"streams": [{"path": path} for path in paths] + config.data["streams"]}
    samples = sum(len(Clips(stream["path"])) for stream in data["streams"])
    limit = 2 ** int(math.log2(max(samples // 4, 2)))
    for name in ("global_train_batch_size", "global_micro_batch_size"):
        if (data.get(name) or 0) > limit:
            print_once(f"data.{name}={limit}, lowered from {data[name]} for {samples} samples")
            data[name] = limit
    return replace(config, data=data)


def check_data(net: ViCMAE, config: PretrainConfig, views: int, micro_batch: int) -> None:
    """Check that the data suit the method.

    Args:
        micro_batch: samples over all ranks.

    Raises:
        ValueError: too few views or samples for a contrastive term, or labels that are missing.
    """
    if getattr(net, "needs_labels", False):
        same_classes(config.training_paths, f"method={config.method}")
    if net.projector is None:  # no contrastive term
        return
    name = type(net).__name__
    if views < 2:
        raise ValueError(f"augment.views={views}: must be 2, as {name} compares two views")
    if micro_batch < 2:
        raise ValueError(
            f"data: a micro-batch of {micro_batch} sample; {name} needs 2, to contrast them"
        )


def pretrain(config: PretrainConfig) -> Trainer:
    """Return the Trainer of a run; train_on_raw and take_sizes have completed its config."""
    flops = flops_per_sample(*on_meta_device(config)) if config.logs_speed else 0.0
    run = start_run(config)
    if config.make_demo and dist.get_local_rank() == 0:
        data_prep.make_demo(config.make_demo)
    dist.barrier()
    with say_if_slow("building the model"):
        net = config.new_model()
    if config.pretrained:
        table = describe(load_pretrained(net, config.pretrained, NEW_PARTS))
        print_once(f"weights of {config.pretrained}:\n{table}")
    sizes = (net.encoder.img_size, net.encoder.num_patches, net.encoder.num_frames)
    transform = PretrainingViews(*sizes, **config.augment)
    patch_size = net.encoder.patch_size
    with say_if_slow("opening the data sets"):
        data = TrainingData(**config.data)
        loader, micro_size = data.load(transform, augment_batch, config.seed, patch_size, run)
    check_frames(config.training_paths, net.encoder.num_frames, transform.frame_interval)
    check_data(net, config, transform.views, micro_size * dist.get_world_size())
    optimizer = build_optimizer(net, data.global_train_batch_size, **config.optimizer)
    return build_trainer(run, config, net, optimizer, loader, micro_size, flops_per_sample=flops)


def on_meta_device(config: PretrainConfig) -> tuple[ViCMAE, Batch]:
    """Return a model and a batch of one sample without data, from which costs are computed."""
    with torch.device("meta"):
        net = config.new_model()
        size, frames = net.encoder.img_size, net.encoder.num_frames
        views = config.augment.get("views", PretrainingViews.views)
        clip = (frames,) if frames > 1 else ()
        batch = {
            "views": torch.empty(1, views, *clip, 3, size, size),
            "noise": torch.empty(1, views, net.encoder.num_patches),
            "target": torch.empty(1, dtype=torch.long),
        }
    return net, batch


def plan(config: PretrainConfig, machine: Machine) -> str:
    """Return the cost of a pre-training, computed without data; speed-up algorithms are ignored."""
    config = take_sizes(config, planned=True)
    if config.raw:
        if not Path("runs", config.run_name, "data", RAW).exists():
            raise ValueError("raw: is not converted yet; its plan needs the number of samples")
        config = train_on_raw(config)
    net, sample = on_meta_device(config)
    plans = training_plans(net, sample, config.given(), machine)
    data = TrainingData(**config.data)
    batch, workers = data.global_train_batch_size, data.num_workers
    loaded = data.loaded_at_a_time
    ahead = prefetch(batch // loaded, workers, data.prefetch_factor) if workers else 0
    sample_bytes = sample["views"].numel()  # before they become floats
    return training_report(plans, workers * ahead * loaded / machine.gpus * sample_bytes)


def main() -> None:
    exit_on_signals()
    with one_line_errors():
        if {"--help", "-h"} & set(sys.argv):
            print(stage_help(__doc__, PretrainConfig))
            return
        arguments, machine = split_plan_flags(sys.argv[1:])
        config = PretrainConfig(**load_config(arguments, PretrainConfig))
        if machine:
            print(plan(config, machine))
            return
        config = train_on_raw(take_sizes(config))
        trainer = pretrain(config)
    fit(trainer)
    run, net = Path("runs", config.run_name), unwrapped(trainer.state)
    if dist.get_global_rank() == 0:
        result = finish_run(run, {})
        if "knn/trained" in result:
            before, after = result.get("knn/random", math.nan), result["knn/trained"]
            start = f"the weights of {config.pretrained}" if config.pretrained else "random weights"
            print(f"k-NN accuracy: {after:.3f} after pre-training, {before:.3f} with {start}")
        print(f"the run directory is {run}: report.html, metrics.jsonl, checkpoints/")
    if net.decoder is not None:
        # All ranks take part, since FSDP gathers the weights.
        draw_reconstructions(net, config.training_paths, run / "reconstructions.png")
    if dist.get_global_rank() == 0:
        write_report(run, run / "report.html")


if __name__ == "__main__":
    main()
