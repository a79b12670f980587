"""Show a training while it runs: one bar in a terminal, a plain line now and then in a log file."""

import sys
import time
from typing import Any, TextIO

from composer import Logger, State
from composer.core import TimeUnit
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from training.announce import announce_later

LINE_STEPS = 20  # steps from line to line in a log file
LOSSES = {  # {metric: short name}
    "loss/train/total": "loss",
    "loss/train/reconstruction": "recon",
    "loss/train/contrastive": "contr",
}
ACCURACIES = {"knn/trained": "k-NN", "metrics/eval/top1": "top-1"}
BAR = "{percentage:3.0f}%|{bar:8}| {n}/{total}, {remaining} left{postfix}"


def total_steps(state: State) -> int:
    """Return the steps of the whole training."""
    duration = state.max_duration
    if duration.unit == TimeUnit.EPOCH:
        return duration.value * int(state.dataloader_len)
    return duration.value


class Progress(LoggerDestination):
    """Shows losses, learning rate, speed, k-NN and the time that is left, on rank 0.

    Args:
        stream: where to write. A bar if it is a terminal, else a line every LINE_STEPS steps.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.metrics: dict[str, float] = {}
        self.bar = None
        self.begin, self.begin_step = 0.0, 0  # when this launch began to train

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.metrics |= metrics

    def after_load(self, state: State, logger: Logger) -> None:
        """Announce the first step, or the repeated evaluation, if it takes long."""
        task = "preparing the first step: k-NN before training, compilation"
        if state.timestamp >= state.max_duration:
            task = "repeating the evaluation after the last step, which was interrupted"
        self.waiting = announce_later(task)

    def fit_start(self, state: State, logger: Logger) -> None:
        self.begin, self.begin_step = time.monotonic(), state.timestamp.batch.value
        if dist.get_global_rank() == 0 and self.stream.isatty():
            total = total_steps(state)
            settings = {"bar_format": BAR, "file": self.stream, "dynamic_ncols": True}
            self.bar = tqdm(total=total, initial=self.begin_step, **settings)

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        self.waiting.cancel()
        if dist.get_global_rank() != 0:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(self.describe(state), refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % LINE_STEPS == 0 or step == total_steps(state):
            seconds = (time.monotonic() - self.begin) / (step - self.begin_step)
            left = tqdm.format_interval(seconds * (total_steps(state) - step))
            place = f"step {step}/{total_steps(state)}, epoch {state.timestamp.epoch.value + 1}"
            print(f"{place}: {self.describe(state)}, {left} left", file=self.stream, flush=True)

    def describe(self, state: State) -> str:
        """Return the newest numbers: total loss, its parts, learning rate, speed, k-NN or top-1."""
        rate = f"lr {state.optimizers[0].param_groups[0]['lr']:.1e}"
        done = state.timestamp.batch.value - self.begin_step
        samples = done * state.timestamp.sample.value / max(1, state.timestamp.batch.value)
        speed = f"{samples / (time.monotonic() - self.begin):.0f}/s"
        return ", ".join([*self.newest(LOSSES), rate, speed, *self.newest(ACCURACIES)])

    def newest(self, names: dict[str, str]) -> list[str]:
        """Return the newest value of each metric that was logged, after its short name."""
        logged = [key for key in names if key in self.metrics]
        return [f"{names[key]} {float(self.metrics[key]):.3f}" for key in logged]

    def fit_end(self, state: State, logger: Logger) -> None:
        self.waiting.cancel()
        if self.bar is not None:
            self.bar.close()
