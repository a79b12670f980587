"""Log a JSON line for each step, and the norm of the gradient."""

import json
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist
from torch.distributed.tensor import DTensor

from shards.storage import write_file
from training.fsdp import gradients_of


class JsonLines(LoggerDestination):
    """Writes a JSON line at the end of each step, epoch and evaluation: all that it has logged."""

    def __init__(self, path: Path):
        self.path = path
        self.line: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Remove the lines after the checkpoint, which will be logged again."""
        if not self.path.exists() or dist.get_global_rank() != 0:
            return
        step = state.timestamp.batch.value
        lines = self.path.read_text().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]
        kept = [line for line in complete if json.loads(line)["step"] <= step]
        write_file(str(self.path), "".join(kept).encode())

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.line |= {key: float(value) for key, value in metrics.items()}

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.line and dist.get_global_rank() == 0:
            now = state.timestamp
            line = {"step": now.batch.value, "epoch": now.epoch.value} | self.line
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.line = {}

    epoch_end = eval_end = fit_end = batch_end


class GradientNorm(Algorithm):
    """Logs the norm of the gradient before it is clipped."""

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_TRAIN_BATCH:
            norm = torch.nn.utils.get_total_norm(gradients_of(state))
            self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            return
        # Read here, after Composer has waited for the device to log the losses of this step.
        step = state.timestamp.batch.value - 1
        logger.log_metrics({"gradient_norm": float(self.norm)}, step)
