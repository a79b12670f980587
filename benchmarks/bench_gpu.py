"""Speed, memory and stalls of pre-training on GPUs, beside the targets.

    uv run python benchmarks/bench_gpu.py | tee gpu.jsonl             # one idle GPU, about an hour
    uv run python benchmarks/bench_gpu.py --sizes L --only step       # ViT-L's steps, 10 minutes
    uv run composer -n 8 benchmarks/bench_gpu.py --sizes L            # eight GPUs
    python benchmarks/bench_gpu.py                  # with torch, torchvision and timm alone
    uv run python benchmarks/bench_gpu.py --tiny                      # a CPU, a minute

It needs no network and no data: batches and JPEG files are random, and are made here. Prints a line
of JSON for the machine, then for each size of the model:

    step          pairs/s, MFU and memory, eager and compiled, with and without activation
                  checkpointing, DDP and FSDP2; host synchronisations and the GPU's idle share;
                  seconds to write the checkpoint
    plain         the step of model.py against plain_vicmae.py, both in a loop of torch alone
    augmentation  its time, and its share of the fastest step
    resume        seconds to build the Trainer of a new run, and of a run that resumes
    loader        pairs/s that a core prepares, and the cores that the fastest step needs
    wait          share of a run's time that waits for data, with 4 workers

With Composer, the steps are those of pretrain.py's Trainer. Without it, they run in a loop of torch
alone, and resume, loader and wait are left out. On one rank, DDP is no wrapper. `plan_gb` is
computed: weights, gradients and optimizer state, and training/cost.py's peak of a step. A case that
fails has a line with its error, and the exit code is 1, unless only memory was short.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gpu_step import (
    HAS_COMPOSER,
    Case,
    Meter,
    augmentation_seconds,
    free_memory,
    local_device,
    measure_ours,
    measure_plain,
)
from model import ViCMAE
from training.cost import flops_per_sample, peak_bytes
from training.gpus import GPUS

if HAS_COMPOSER:
    from benchmarks import gpu_trainer

PARTS = ("step", "plain", "augmentation", "loader", "wait")
TARGETS = {  # pairs/s on an H100. L: 36 % and 50 % of its peak; B: in proportion
    "L": {"pairs_per_second": 826, "wished_pairs_per_second": 1150},
    "B": {"pairs_per_second": 2360},
}
WAIT_TARGET = 0.03  # share of the time, for L with 4 workers
PLAN_TARGET = 0.1  # relative difference of the peak memory from the plan


def rounded(line: dict) -> dict:
    """Return a line with four digits of each number."""
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in line.items()
    }


def computed(case: Case) -> tuple[float, float, int]:
    """Return the operations of a pair's step, and bytes: of the state on one rank, of the step.

    Must come before several ranks join, since fake tensors cannot be gathered.
    """
    side = case.model["img_size"]
    patches = (side // case.model["patch_size"]) ** 2
    with torch.device("meta"):
        net = ViCMAE(**case.model)
        sample = {"views": torch.empty(1, 2, 3, side, side), "noise": torch.empty(1, 2, patches)}
    weights = sum(parameter.numel() for parameter in net.parameters())
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    state = 4 * weights + 12 * trained  # weights; gradients and AdamW's two moments
    peak = peak_bytes(net, sample, case.pairs, half=True, checkpointing=case.checkpointing)
    return flops_per_sample(net, sample), state, peak


def cases_of(size: str, pairs: int) -> list[Case]:
    """Return all ways to run a step of a size; the simplest is the first."""
    ways = product((False, True), repeat=3)
    return [Case(size, pairs, compiled, saving, fsdp) for saving, fsdp, compiled in ways]


def join_ranks() -> None:
    """Join the process group of this launch: a run's with Composer, otherwise torch's."""
    if HAS_COMPOSER:
        gpu_trainer.join_ranks()
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class Bench:
    """Measures the sizes of the model, and prints the lines.

    Args:
        options: of the command line.
        plans: see computed, for each case without compiling.
        output: file for the lines.
        data: a data set of JPEG files, which is there with Composer.
    """

    def __init__(self, options: argparse.Namespace, plans: dict, output: IO, data: Path):
        self.options, self.plans, self.output, self.data = options, plans, output, data
        self.ranks = dist.get_world_size()
        self.failed = False
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.gpu_peak = next((gpu.half for gpu in GPUS.values() if gpu.name in name), None)

    def report(self, line: dict) -> None:
        if dist.get_rank() == 0:
            print(json.dumps(rounded(line)), file=self.output, flush=True)

    @contextmanager
    def reported(self, what: str, case: Case) -> Iterator[dict]:
        """Yield a line to fill in, then print it, with the error if the measurement fails."""
        line = {"what": what, "model": case.size, "pairs": case.pairs, "ranks": self.ranks}
        try:
            yield line
        except Exception as error:  # a case that fails must not cost the time of the others
            message = (str(error).splitlines() or [""])[0]
            line["error"] = f"{type(error).__name__}: {message}"
            self.failed |= not isinstance(error, torch.OutOfMemoryError)
        self.report(line)
        free_memory()

    def new_meter(self) -> Meter:
        return Meter(self.options.warm_up, self.options.steps, traced=2)

    def report_machine(self) -> None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        line = {"machine": platform.machine(), "gpu": gpu, "ranks": self.ranks}
        line |= {"cores": os.cpu_count(), "torch": torch.__version__, "cuda": torch.version.cuda}
        self.report(line | {"loop": "Trainer" if HAS_COMPOSER else "torch alone"})

    def measure_size(self, size: str) -> None:
        """Measure the chosen parts of a size."""
        cases, only = cases_of(size, self.options.pairs), self.options.only
        speeds = {}  # pairs/s by case
        for number, case in enumerate(cases if "step" in only else []):
            self.measure_step(case, f"{size}-{number}", speeds)
        fastest = max(speeds.values(), default=None)
        if "plain" in only:
            for case in cases[:2]:
                self.compare_with_plain(case)
        if "augmentation" in only:
            self.measure_augmentation(cases[0], fastest)
        if not HAS_COMPOSER:
            return
        if "step" in only:
            with self.reported("resume", cases[0]) as line:
                steps = self.new_meter().steps
                line |= gpu_trainer.measure_resume(cases[0], self.data, f"{size}-0", steps)
        if "loader" in only:
            self.measure_loader(cases[0], fastest)
        if "wait" in only:
            self.measure_waiting(max(speeds, key=speeds.get, default=cases[0]))

    def measure_step(self, case: Case, run_name: str, speeds: dict[Case, float]) -> None:
        flops, state, peak = self.plans[replace(case, compiled=False, fsdp=False)]
        meter = self.new_meter()
        with self.reported("step", case) as line:
            line |= {"compiled": case.compiled, "checkpointing": case.checkpointing}
            line |= {"parallel": "FSDP2" if case.fsdp else "DDP"}
            if HAS_COMPOSER:
                more = gpu_trainer.measure_trainer(case, self.data, run_name, meter)
            else:
                more = measure_ours(case, meter) or {}
            speeds[case] = case.pairs * self.ranks / meter.seconds
            line["pairs_per_second"] = speeds[case]
            line["mfu"] = None
            if self.gpu_peak:
                line["mfu"] = speeds[case] * flops / (self.ranks * self.gpu_peak)
            plan = peak + state / (self.ranks if case.fsdp else 1)
            line |= {"peak_gb": meter.peak and meter.peak / 1e9, "plan_gb": plan / 1e9}
            line["peak_over_plan"] = meter.peak and meter.peak / plan
            line |= {"first_step_seconds": meter.first, **more, **meter.trace}
            line["target"] = TARGETS.get(case.size, {}) | {"peak_over_plan": PLAN_TARGET}

    def compare_with_plain(self, case: Case) -> None:
        with self.reported("plain", case) as line:
            line["compiled"] = case.compiled
            for name, measure in (("ours", measure_ours), ("plain", measure_plain)):
                meter = self.new_meter()
                measure(case, meter)
                line[f"{name}_pairs_per_second"] = case.pairs * self.ranks / meter.seconds
                line[f"{name}_peak_gb"] = meter.peak and meter.peak / 1e9
                free_memory()
            speeds = line["ours_pairs_per_second"], line["plain_pairs_per_second"]
            line["ours_over_plain"] = speeds[0] / speeds[1]

    def measure_augmentation(self, case: Case, fastest: float | None) -> None:
        with self.reported("augmentation", case) as line:
            seconds = augmentation_seconds(case, self.options.steps)
            line["milliseconds"] = 1000 * seconds
            if fastest:
                step = case.pairs * self.ranks / fastest
                line["share_of_fastest_step"] = seconds / step

    def measure_loader(self, case: Case, fastest: float | None) -> None:
        with self.reported("loader", case) as line:
            speed = gpu_trainer.pairs_per_core(case, self.data, self.options.batches)
            line["pairs_per_second_and_core"] = speed
            line["cores_for_fastest_step"] = fastest and fastest / self.ranks / speed

    def measure_waiting(self, case: Case) -> None:
        with self.reported("wait", case) as line:
            workers, steps = self.options.workers, (self.options.warm_up, self.options.steps)
            line["workers"] = workers
            line["share"] = gpu_trainer.wait_share(case, self.data, workers, *steps)
            line["target"] = WAIT_TARGET if case.size == "L" else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list("SBLH"), choices=list("SBLH"))
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--pairs", type=int, default=128, help="of a step on each GPU")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a case")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    parser.add_argument("--workers", type=int, default=4, help="of the loader")
    parser.add_argument("--batches", type=int, default=10, help="that the loader reads, alone")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    options = parser.parse_args()
    if options.tiny:
        tiny = {"sizes": ["tiny"], "pairs": 8, "steps": 1, "warm_up": 1, "workers": 1}
        vars(options).update(tiny | {"batches": 2})
    return options


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Make a temporary folder the working directory of all ranks, and yield it."""
    with contextlib.ExitStack() as stack:
        name = [None]
        if dist.get_rank() == 0:
            name = [stack.enter_context(tempfile.TemporaryDirectory())]
        dist.broadcast_object_list(name)
        with contextlib.chdir(name[0]):
            yield Path(name[0])
        dist.barrier()  # rank 0 removes it


def measure(options: argparse.Namespace, output: IO) -> bool:
    """Measure all sizes, and return whether nothing has failed."""
    plans = {}
    for size, saving in product(options.sizes, (False, True)):
        case = Case(size, options.pairs, checkpointing=saving)
        plans[case] = computed(case)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    join_ranks()
    with shared_folder() as folder:
        data = folder / "images"
        if HAS_COMPOSER and dist.get_rank() == 0:
            gpu_trainer.make_images(data, options.pairs * dist.get_world_size())
        dist.barrier()
        bench = Bench(options, plans, output, data)
        bench.report_machine()
        for size in options.sizes:
            bench.measure_size(size)
    return not bench.failed


def main() -> None:
    options, output = parse(), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what a run prints must not be among the lines
        right = measure(options, output)
    sys.exit(not right)


if __name__ == "__main__":
    main()
