"""A callback that logs which samples each step has, for benchmarks/stress_resume.py."""

import json
import os
import zlib
from pathlib import Path

from composer import Callback, Logger, State
from composer.utils import dist


class SampleLog(Callback):
    """Adds a line to samples.jsonl at the start of each step: a checksum of each sample's noise.

    No two samples have the same noise, so the checksum identifies a sample.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        parts = state.batch if isinstance(state.batch, list) else [state.batch]  # micro-batches
        noises = [noise for part in parts for noise in part["noise"]]
        keys = [zlib.crc32(noise.numpy().tobytes()) for noise in noises]
        line = [state.timestamp.batch.value, os.environ["LAUNCH"], dist.get_world_size(), keys]
        folder = os.environ.get("SAMPLES", f"runs/{state.run_name}")
        with Path(folder, "samples.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
