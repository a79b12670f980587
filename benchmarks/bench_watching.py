"""Cost of watching the features: OnlineProbe in each step, EffectiveRank in each epoch.

    uv run python benchmarks/bench_watching.py         # 2 CPU cores, 2 minutes

The demonstration's model trains on batches of 256 pairs. The probe learns in every other step, so
that steps with and without it take turns. The CPU time of the process is counted, since it depends
little on what else the machine does. Prints a line of JSON.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from composer import Logger, State

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
import pretrain
from benchmarks.bench_train import configure
from evaluation.online import OnlineProbe, effective_rank

STEPS = 100
WARM_UP = 10  # steps that are not counted
BATCH = 256  # pairs


class Alternating(OnlineProbe):
    """An OnlineProbe that learns in every other step; keeps the CPU seconds of each step."""

    def __init__(self, paths: list[str]):
        super().__init__(paths)
        self.seconds: list[float] = []
        self.seconds_of_rank: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.begin = time.process_time()

    def after_forward(self, state: State, logger: Logger) -> None:
        if len(self.seconds) % 2:
            super().after_forward(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.seconds.append(time.process_time() - self.begin)
        begin = time.process_time()
        effective_rank(state.outputs["features"][:, 0])
        self.seconds_of_rank.append(time.process_time() - begin)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        data_prep.make_demo("demo", garments=12)
        paths = ["demo/train_videos", "demo/train_images"]
        arguments = [
            "data.streams=[{path: demo/train_videos}, {path: demo/train_images}]",
            f"data.epoch_size={BATCH * STEPS}",
            "trainer.max_duration=1ep",
        ]
        trainer = pretrain.pretrain(configure(*arguments, model=None, batch=BATCH))
        watch = Alternating(paths)
        trainer.state.callbacks.append(watch)
        trainer.fit()
        trainer.close()
    plain, watched = watch.seconds[WARM_UP::2], watch.seconds[WARM_UP + 1 :: 2]
    ratios = [on / off for off, on in zip(plain, watched, strict=True)]
    step = statistics.median(plain)
    rank = statistics.median(watch.seconds_of_rank[WARM_UP:])
    line = {"steps": len(plain), "seconds_of_step": round(step, 4), "threads": 1}
    line |= {"probe_of_step": round(statistics.median(ratios) - 1, 4)}
    line |= {"rank_of_step": round(rank / step, 4), "rank_of_epoch": round(rank / step / 23, 5)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
