"""A pre-training run of pretrain.py's Trainer, for bench_gpu.py: steps, loading, checkpoints."""

import time
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from composer import Callback, Logger, State, Trainer
from composer.core import DataSpec
from composer.trainer.trainer import get_device
from composer.utils import dist
from PIL import Image

import data_prep
import pretrain
from benchmarks.gpu_step import Case, Meter, checkpoint_blocks, random_batch, recipe_of
from pretrain import PretrainConfig
from shards.augment import augment_batch
from shards.decode import Recipe
from shards.stream import TrainingData
from shards.views import PretrainingViews
from training.config import load_config
from training.optimizer import build_optimizer
from training.run import build_trainer


def join_ranks() -> None:
    """Join the process group of this launch, as a run does."""
    dist.initialize_dist(get_device(None))


def make_images(data: Path, count: int, width: int = 341, height: int = 256) -> None:
    """Make a data set of JPEG files of smooth noise.

    They are as large as the images of ImageNet are stored; random pixels have no structure that a
    decoder could profit from.
    """
    rng = np.random.default_rng(0)
    raw = data.parent / "raw"
    raw.mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        jpeg = simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="420")
        Path(raw, f"{number:05d}.jpg").write_bytes(jpeg)
    data_prep.convert(str(raw), str(data), Recipe("images"), 1)


def configure(case: Case, data: Path, run_name: str, steps: int, *changes: str) -> PretrainConfig:
    """Return the recipe of a case for some steps on this machine, without callbacks."""
    pairs = case.pairs * dist.get_world_size()
    fsdp = "null"
    if case.fsdp:
        settings = f"activation_checkpointing: {str(case.checkpointing).lower()}"
        fsdp = f"{{fsdp: {{{settings}, mixed_precision: FULL, state_dict_type: sharded}}}}"
    compiled = f"{{backend: {case.backend}}}" if case.compiled else "null"
    arguments = [
        str(recipe_of(case.size)),
        *(f"model.{key}={value}" for key, value in case.model.items()),
        f"run_name={run_name}",
        f"data.streams=[{{path: {data}}}]",
        f"data.global_train_batch_size={pairs}",
        f"data.global_micro_batch_size={pairs}",
        f"data.epoch_size={pairs * (steps + 1)}",
        "schedule.t_warmup=1ba",
        f"trainer.max_duration={steps}ba",
        "trainer.precision=amp_bf16",
        "trainer.progress_bar=false",
        f"trainer.device={'gpu' if torch.cuda.is_available() else 'cpu'}",
        # First null, since a block is merged with the recipe's.
        *("trainer.parallelism_config=null", f"trainer.parallelism_config={fsdp}"),
        *("trainer.compile_config=null", f"trainer.compile_config={compiled}"),
        "callbacks=null",
        "checkpoints.interval=1000000ba",  # one at the end
        *changes,
    ]
    return PretrainConfig(**load_config(arguments, PretrainConfig))


def build(case: Case, config: PretrainConfig, steps: int) -> Trainer:
    """Return the Trainer of a run on the same batch over and over."""
    torch.manual_seed(0)
    net = config.new_model()
    if case.checkpointing and not case.fsdp:  # the Trainer does so with FSDP alone
        checkpoint_blocks(net)
    batch_size = config.data["global_train_batch_size"]
    optimizer = build_optimizer(net, batch_size, **config.optimizer)
    batches = [random_batch(config.model, case.pairs)] * steps
    loader = DataSpec(batches, microbatch_transforms=augment_batch)
    return build_trainer(Path("runs", config.run_name), config, net, optimizer, loader, case.pairs)


class StepMeter(Callback):
    """Measures the Trainer's steps with a Meter.

    Attributes:
        last: time at which the last step ended.
    """

    def __init__(self, meter: Meter):
        self.meter = meter
        self.last = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self.meter.done < self.meter.steps:
            self.meter.begin()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.meter.end()
        self.last = time.perf_counter()


def measure_trainer(case: Case, data: Path, run_name: str, meter: Meter) -> dict[str, float]:
    """Train with the Trainer, and return the seconds until its checkpoint is written."""
    trainer = build(case, configure(case, data, run_name, meter.steps), meter.steps)
    steps = StepMeter(meter)
    trainer.state.callbacks.append(steps)
    trainer.fit()
    seconds = time.perf_counter() - steps.last
    trainer.close()
    return {"save_seconds": seconds}


def measure_resume(case: Case, data: Path, run_name: str, steps: int) -> dict[str, float]:
    """Return the seconds to build the Trainer of a new run and of a run with a checkpoint.

    Args:
        run_name: a run of measure_trainer.
    """
    result = {}
    names = {"new_run_seconds": f"{run_name}_new", "resume_seconds": run_name}
    for key, name in names.items():
        config = configure(case, data, name, steps)
        begin = time.perf_counter()
        build(case, config, steps).close()
        result[key] = time.perf_counter() - begin
    folder = Path("runs", run_name, "checkpoints")
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return result | {"checkpoint_gb": sum(path.stat().st_size for path in files) / 1e9}


def pairs_per_core(case: Case, data: Path, batches: int) -> float:
    """Return the pairs that a core reads, crops and scales in a second."""
    config = configure(case, data, "loader", batches, "data.num_workers=0")
    side, patch_size = config.model["img_size"], config.model["patch_size"]
    views = PretrainingViews(side, (side // patch_size) ** 2, **config.augment)
    run = Path("runs", config.run_name)
    training_data = TrainingData(**config.data)
    spec, _ = training_data.load(views, augment_batch, config.seed, patch_size, run)
    iterator = iter(spec.dataloader)
    next(iterator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data worker
    begin, count = time.process_time(), 0
    for batch in iterator:
        count += len(batch["noise"])
    seconds = time.process_time() - begin
    torch.set_num_threads(threads)
    return count / seconds


class Waits(Callback):
    """Measures the share of the training loop that waits for data, after some steps."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up
        self.done = 0
        self.waited = self.total = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.requested = time.perf_counter()
        if self.done == self.warm_up:
            self.began = self.requested

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self.done >= self.warm_up:
            self.waited += time.perf_counter() - self.requested

    def batch_end(self, state: State, logger: Logger) -> None:
        self.done += 1
        if self.done > self.warm_up:
            self.total = time.perf_counter() - self.began


def wait_share(case: Case, data: Path, workers: int, warm_up: int, steps: int) -> float:
    """Return the share of a run's steps that waits for data; the whole of pretrain.py runs."""
    config = configure(case, data, "waits", warm_up + steps, f"data.num_workers={workers}")
    trainer = pretrain.pretrain(config)
    waits = Waits(warm_up)
    trainer.state.callbacks.append(waits)
    trainer.fit()
    trainer.close()
    return waits.waited / waits.total
