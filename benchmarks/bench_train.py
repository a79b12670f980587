"""Speed and memory of training, as ratios: step, Trainer, data loading, restart, ranks, a pair.

    uv run python benchmarks/bench_train.py                            # 2 idle CPU cores, 15 min

Prints a line of JSON for the machine and one for each ratio. Lower is better, except for the step
of a plain implementation and for 2 ranks. Every process has one thread. Contenders take turns. A
ratio is the median over the turns, or over the steps; the first turn warms up and is not counted.
The data are the demonstration's, made here.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from composer import Callback, Logger, State, Trainer
from composer.core import DataSpec
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
import pretrain
import shards.stream
from benchmarks.plain_vicmae import PlainViCMAE
from benchmarks.turns import ratio, report, take_turns
from model import Batch, ViCMAE
from pretrain import PretrainConfig
from shards.augment import augment_batch
from shards.loader import StepLoader
from shards.views import ViewRecipe
from training.config import load_config
from training.optimizer import build_optimizer
from training.run import build_trainer

ROOT = Path(__file__).parent.parent
BATCH = 16  # pairs
TURNS = 7
BACKEND = "inductor"  # of torch.compile
# With 64 pairs, a rank's part of a step takes 0.7 s, far more than the costs that do not shrink
# with the number of ranks.
RANKS_BATCH = 64
MODEL = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "decoder_embed_dim": 96,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "projector_hidden_dim": 512,
}
STEPS = 32  # of the run that is killed
INTERVAL = 8  # steps between its checkpoints
KILLED_AFTER = STEPS // 2 + INTERVAL // 2  # steps: half an interval after a checkpoint


def demo_arguments(model: dict | None, batch: int) -> list[str]:
    """Return the arguments of the demonstration with another model and batch."""
    sizes = [f"model.{key}={value}" for key, value in (model or {}).items()]
    always = ["make_demo=null", f"data.global_train_batch_size={batch}", "schedule.t_warmup=2ba"]
    return [str(ROOT / "yamls" / "demo.yaml"), *sizes, *always]


def configure(*changes: str, model: dict | None = MODEL, batch: int = BATCH) -> PretrainConfig:
    """Return the demonstration's configuration with another model and batch, without k-NN."""
    arguments = [*demo_arguments(model, batch), *changes]
    config = PretrainConfig(**load_config(arguments, PretrainConfig))
    del config.callbacks["KNN"]
    return config


# The step, compared with a plain implementation


def our_loss(net: ViCMAE, batch: Batch) -> Tensor:
    return net.loss(net(batch), batch)["total"]


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, times: int = 1) -> int:
    """Train for some steps and return their number."""
    for _ in range(times):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return times


def random_batch(net: ViCMAE, pairs: int) -> Batch:
    side, patches = net.encoder.img_size, net.encoder.num_patches
    return {"views": torch.randn(pairs, 2, 3, side, side), "noise": torch.rand(pairs, 2, patches)}


def compare_steps(what: str, config: PretrainConfig) -> None:
    """Compare our step, without a Trainer, with the step of the plain implementation.

    Both begin with the same weights and must have the same loss. Ours runs in the two precisions
    that a CPU has, fp32 and amp_bf16, as it is and compiled (trainer.compile_config). The plain
    implementation runs in fp32, as one would write it, and under autocast.
    """
    torch.manual_seed(0)
    size = config.data["global_train_batch_size"]
    net = config.new_model()
    batch = random_batch(net, size)
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    ours = ("fp32", "amp_bf16", "fp32, compiled", "amp_bf16, compiled")
    contenders = {}
    for precision in ours:
        mine = copy.deepcopy(net)
        if "compiled" in precision:
            mine.forward = torch.compile(mine.forward, backend=BACKEND)
        if "bf16" in precision:
            mine.forward = bfloat16(mine.forward)  # as build_trainer does
        optimizer = build_optimizer(mine, size, **config.optimizer)
        contenders[precision] = partial(step, partial(our_loss, mine, batch), optimizer, 2)
    plain = {
        "fp32": PlainViCMAE(net, fused=True),
        "fp32, attention written out": PlainViCMAE(net, fused=False),
        "autocast to bfloat16": PlainViCMAE(net, fused=True),
    }
    for name, other in plain.items():
        other.copy_weights(net)
        torch.testing.assert_close(other(**batch), our_loss(net, batch))
        if "bfloat16" in name:
            other.forward = bfloat16(other.forward)
        lr = optimizer.param_groups[0]["lr"]
        adamw = torch.optim.AdamW(other.parameters(), lr=lr, weight_decay=0.05)
        contenders[f"plain, {name}"] = partial(step, partial(other, **batch), adamw, 2)
    seconds = take_turns(contenders, TURNS)
    for name, precision in product(plain, ours):
        more = {"batch": size, "seconds": round(statistics.median(seconds[precision]), 3)}
        value = ratio(seconds[f"plain, {name}"], seconds[precision])
        title = f"step time of a plain implementation, {name}, {what}"
        report(title, value, f"ours in {precision}", "wall time of a step", **more)


# The Trainer, data loading, a kill, two ranks


class Batches:
    """Yields the same batches over and over, and measures the time that the loop spends on each.

    Args:
        batches: to repeat.
        length: number of batches to yield.
        before_each: called with each batch before it is yielded; its time is measured too.

    Attributes:
        seconds: of the loop's work on each batch but the last.
        seconds_before: of the call before each.
    """

    def __init__(self, batches: list[Batch], length: int, before_each: Callable | None = None):
        self.batches, self.length, self.before_each = batches, length, before_each
        self.seconds, self.seconds_before = [], []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.length):
            batch = self.batches[number % len(self.batches)]
            begin = time.perf_counter()
            if self.before_each:
                self.before_each(batch)
            yielded = time.perf_counter()
            yield batch
            self.seconds_before.append(yielded - begin)
            self.seconds.append(time.perf_counter() - yielded)


def draw_batches(config: PretrainConfig, size: int, count: int = 4) -> list[Batch]:
    """Return batches as the loader yields them, with random pixels."""
    rng = np.random.default_rng(0)
    side, patch_size = config.model["img_size"], config.model["patch_size"]
    recipe = ViewRecipe(**config.augment["video"])
    batches = []
    for _ in range(count):
        views = rng.integers(0, 256, (size, 2, side, side, 3), np.uint8)
        augment = [[recipe.draw(rng, 0), recipe.draw(rng, 1)] for _ in range(size)]
        noise = rng.random((size, 2, (side // patch_size) ** 2), np.float32)
        batch = {"views": views, "augment": np.array(augment), "noise": noise}
        batches.append({name: torch.from_numpy(value) for name, value in batch.items()})
    return batches


def new_model(config: PretrainConfig) -> tuple[ViCMAE, torch.optim.AdamW]:
    """Return the model of a config, with weights from seed 0, and its optimizer."""
    torch.manual_seed(0)
    net = config.new_model()
    size = config.data["global_train_batch_size"]
    return net, build_optimizer(net, size, **config.optimizer)


def build_on(batches: Batches, config: PretrainConfig, run: Path, size: int) -> Trainer:
    """Return the Trainer of a pre-training run on batches of `size` pairs for each rank."""
    net, optimizer = new_model(config)
    loader = DataSpec(batches, microbatch_transforms=augment_batch)
    return build_trainer(run, config, net, optimizer, loader, size)


def measure_trainer(work: Path, steps: int = 40) -> None:
    """Measure what the Trainer adds to a step.

    Its steps and bare ones take turns: a bare step runs whenever the Trainer asks for a batch.
    """
    config = configure(f"trainer.max_duration={steps}ba", "checkpoints.interval=1000ba")
    net, optimizer = new_model(config)

    def bare_step(batch: Batch) -> None:
        step(lambda: our_loss(net, augment_batch(batch)), optimizer)

    batches = Batches(draw_batches(config, BATCH), steps, bare_step)
    # The progress bar is part of the Trainer's step, so it is drawn, but not shown.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        trainer = build_on(batches, config, work / "overhead", BATCH)
        trainer.fit()
        trainer.close()
    within, bare = batches.seconds[2:], batches.seconds_before[2:]
    overhead = round(ratio(within, bare) - 1, 4)
    more = {"steps": len(bare), "seconds": round(statistics.median(bare), 3)}
    counted = "wall time, (Trainer - bare) / bare"
    report("overhead of the Trainer", overhead, "bare step", counted, **more)


class TimedLoader(StepLoader):
    """A StepLoader that keeps begin and end of every wait for a batch."""

    waits: list[tuple[float, float]] = []  # noqa: RUF012  # of the run that is being measured

    def __iter__(self) -> Iterator[Batch]:
        begin = time.perf_counter()
        for batch in super().__iter__():
            self.waits.append((begin, time.perf_counter()))
            yield batch
            begin = time.perf_counter()


def data_arguments(demo: Path, steps: int, workers: int) -> list[str]:
    """Return arguments for two epochs of real data; with 12 garments a class, samples repeat."""
    return [
        f"data.streams=[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]",
        f"data.epoch_size={BATCH * steps // 2}",
        f"data.num_workers={workers}",
        "trainer.max_duration=2ep",
        "trainer.progress_bar=false",
    ]


def measure_waiting(demo: Path, model: dict | None, what: str, steps: int) -> None:
    """Measure the fraction of the training loop that is spent waiting for data."""
    arguments = [*data_arguments(demo, steps, 2), f"run_name=waiting{steps}"]
    TimedLoader.waits.clear()
    with mock.patch.object(shards.stream, "StepLoader", TimedLoader):
        trainer = pretrain.pretrain(configure(*arguments, model=model))
        trainer.fit()
    trainer.close()
    waits = TimedLoader.waits
    loop = waits[-1][1] - waits[0][1]  # from the arrival of the first batch to that of the last
    waited = sum(end - begin for begin, end in waits[1:])
    more = {"steps": len(waits) - 1, "seconds": round(loop, 2)}
    more |= {"cores": os.cpu_count(), "processes": 3}
    title = f"waiting for data, 2 workers, {what}"
    counted = "wall time after the first batch"
    report(title, round(waited / loop, 4), "the loop", counted, **more)


class StepTimes(Callback):
    """Adds a line to times.jsonl at the start of each step: steps done, and the time."""

    def batch_start(self, state: State, logger: Logger) -> None:
        with Path("runs", state.run_name, "times.jsonl").open("a") as file:
            file.write(json.dumps([state.timestamp.batch.value, time.time()]) + "\n")


def read_times(run: Path) -> list[list[float]]:
    """Return the complete lines of times.jsonl, which a process may be writing."""
    path = run / "times.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def launch(arguments: list[str], run: Path, kill_after: int | None = None) -> tuple[float, float]:
    """Launch a run as users do, and return the times of its begin and end.

    Args:
        kill_after: steps after which it is killed; None to wait for its end.
    """
    folder = run.parent.parent
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", "1"]
    command = [*launcher, str(ROOT / "pretrain.py"), *arguments, f"run_name={run.name}"]
    modules = str(Path(__file__).parent)  # where pretrain.py finds bench_train.StepTimes
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
    place = {"cwd": folder, "env": environment, "start_new_session": True}
    begin = time.time()
    with (folder / "out.txt").open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **place)
    try:
        while process.poll() is None:
            if kill_after and any(done >= kill_after for done, _ in read_times(run)):
                break
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    end = time.time()
    if process.wait() != (-signal.SIGKILL if kill_after else 0):
        sys.exit((folder / "out.txt").read_text()[-3000:])
    return begin, end


def measure_kill(demo: Path, work: Path, turns: int = 2) -> None:
    """Measure the cost of a SIGKILL and a relaunch, in steps.

    The kill comes at the start of a step, half an interval after a checkpoint.
    """
    arguments = [*demo_arguments(MODEL, BATCH), *data_arguments(demo, STEPS, 1)]
    # First null, which removes the demonstration's own callbacks.
    arguments += ["callbacks=null", "callbacks={bench_train.StepTimes: {}}"]
    arguments += [f"checkpoints.interval={INTERVAL}ba"]
    results = []
    for turn in range(turns):
        whole, killed = work / "runs" / f"whole{turn}", work / "runs" / f"killed{turn}"
        begin, end = launch(arguments, whole)
        first_begin, kill_time = launch(arguments, killed, KILLED_AFTER)
        before = read_times(killed)
        _, last_end = launch(arguments, killed)
        after = read_times(killed)[len(before) :]
        seconds = statistics.median(np.diff([moment for _, moment in read_times(whole)]))
        results.append(
            {
                "lost": ((last_end - first_begin) - (end - begin)) / seconds,
                "start_up": (after[0][1] - kill_time) / seconds,
                "repeated": before[-1][0] - after[0][0],
                "seconds": seconds,
            }
        )
    median = {key: statistics.median(result[key] for result in results) for key in results[0]}
    more = {
        "start_up": round(median["start_up"], 1),
        "repeated_steps": median["repeated"],
        "interval": INTERVAL,
        "seconds": round(median["seconds"], 3),
        "seconds_of_start_up": round(median["start_up"] * median["seconds"], 1),
    }
    counted = "wall time beyond that of a run never stopped"
    report("lost by a kill and a launch", round(median["lost"], 1), "a step", counted, **more)


def in_processes(function: Callable, *arguments: list, at_once: int) -> list:
    """Return the values of a function for each row of arguments, each in a process of its own.

    The processes are forked from a server that has the libraries loaded.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["composer", "streaming", "timm"])
    with ProcessPoolExecutor(at_once, context, max_tasks_per_child=1) as pool:
        return list(pool.map(function, *arguments))


def run_rank(rank: int, ranks: int, folder: str, steps: int, batch: int) -> float:
    """Return the median time of a rank's steps on one global batch, in seconds."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    always = ["checkpoints.interval=1000ba", "trainer.progress_bar=false"]
    config = configure(f"trainer.max_duration={steps}ba", *always, batch=batch)
    batches = Batches(draw_batches(config, batch // ranks), steps)
    build_on(batches, config, Path(folder, "run"), batch // ranks).fit()
    torch.distributed.destroy_process_group()
    return statistics.median(batches.seconds[2:])


def compare_ranks(work: Path, turns: int = 3, steps: int = 8, batch: int = RANKS_BATCH) -> None:
    """Compare two ranks with one rank on the same global batch."""
    seconds = {1: [], 2: []}
    for _, ranks in product(range(turns), seconds):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            columns = [[value] * ranks for value in (ranks, folder, steps, batch)]
            times = in_processes(run_rank, range(ranks), *columns, at_once=ranks)
            seconds[ranks].append(max(times))
    median = round(statistics.median(seconds[1]), 3)
    more = {"batch": batch, "seconds": median, "cores": os.cpu_count()}
    value = ratio(seconds[1], seconds[2])
    report("2 ranks, the same global batch", value, "1 rank", "samples a second", **more)


# Memory


def peak_kilobytes(model: dict, chunk_size: int | None, decode_ratio: float, pairs: int) -> int:
    """Return the peak resident memory of this process after one forward and backward pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = ViCMAE(**model, chunk_size=chunk_size)
    net.decode_ratio = decode_ratio
    our_loss(net, random_batch(net, pairs)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def models_of_memory() -> dict[str, dict]:
    """Return the arguments of the models whose memory is measured."""
    vit_s = load_config([str(ROOT / "yamls" / "vits.yaml")], PretrainConfig)["model"]
    small = {"embed_dim": 192, "depth": 6, "num_heads": 3}
    small |= {"decoder_embed_dim": 128, "decoder_depth": 4, "decoder_num_heads": 4}
    return {"D 192, depth 6, decoder 128 x 4": small, "ViT-S (yamls/vits.yaml)": vit_s}


def measure_memory(models: dict[str, dict], few: int = 4, many: int = 8) -> None:
    """Measure the memory of a pair: the difference between two batches, divided.

    Weights, gradients and libraries are in both batches. With chunks, what remains is what a pair
    has outside of them: its views and predictions, and the targets and errors of the loss.
    """
    options = {  # {name: (chunk_size, decode_ratio)}
        "plain": (None, 1.0),
        "chunk_size=2": (2, 1.0),
        "PartialDecoding 0.5": (None, 0.5),
        "both": (2, 0.5),
    }
    for size, model in models.items():
        rows = [(model, *option, pairs) for option in options.values() for pairs in (few, many)]
        peaks = in_processes(peak_kilobytes, *zip(*rows, strict=True), at_once=2)
        megabytes = [peak * 1024 / 1e6 for peak in peaks]
        each = {}
        for name, least, most in zip(options, megabytes[::2], megabytes[1::2], strict=True):
            each[name] = (most - least) / (many - few)
            more = {"megabytes": round(each[name], 1)}
            more |= {f"megabytes_of_process_at_{many}": round(most)}
            title = f"memory of a pair of 224 pixels, {size}, {name}"
            value = round(each[name] / each["plain"], 3)
            report(title, value, "plain", "peak RSS", **more)


def main() -> None:
    torch.set_num_threads(1)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps(machine | {"threads": torch.get_num_threads()}), flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        work = Path(folder)
        demo = work / "data" / "demo"  # where yamls/demo.yaml expects it
        (work / "runs").mkdir()
        data_prep.make_demo(str(demo), workers=2, garments=12)
        for batch in (4, BATCH, 32):
            compare_steps(f"D 192, {batch} pairs", configure(batch=batch))
        for batch in (32, 256):
            compare_steps(f"the demonstration's, {batch} pairs", configure(model=None, batch=batch))
        measure_trainer(work)
        measure_waiting(demo, MODEL, "D 192", 40)
        measure_waiting(demo, None, "the demonstration's model", 160)
        measure_kill(demo, work)
        compare_ranks(work)
        measure_memory(models_of_memory())


if __name__ == "__main__":
    main()
