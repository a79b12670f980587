"""The speed-up algorithms, and half precision, on the demonstration: time of training and k-NN accuracy, over seeds.

    uv run python benchmarks/bench_algorithms.py --epochs 10 --seeds 3          # 2 idle CPU cores, 30 min

Every algorithm pre-trains the demonstration once for each seed, in turn, in a process of its own with one thread. Prints
a line of JSON for each run, and one for each algorithm: the ratio of its training time to that of none, and the k-NN
accuracy of the checkpoint (of EMA's averages, if it is at work), mean and standard deviation over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import LATEST
from config import load_config
from probes import embed, knn_accuracy
from views import EvalViews

import data_prep
from model import ViCMAE, load_pretrained
from pretrain import pretrain

ROOT = Path(__file__).parents[1]
ALGORITHMS = {
    "none": "",
    "EMA": "algorithms={EMA: {half_life: 46ba, update_interval: 1ba}}",
    "GradientClipping, norm 1": "algorithms={GradientClipping: {clipping_type: norm, clipping_threshold: 1.0}}",
    "ChannelsLast": "algorithms={ChannelsLast: {}}",
    "PartialDecoding, half": "algorithms={PartialDecoding: {ratio: 0.5}}",
    "ProgressiveResizing from half": "algorithms={ProgressiveResizing: "
    "{initial_scale: 0.5, delay_fraction: 0.3, size_increment: 8}}",
    "PartialDecoding and EMA": "algorithms={PartialDecoding: {ratio: 0.5}, EMA: {half_life: 46ba, update_interval: 1ba}}",
    "trainer.precision=amp_bf16": "trainer.precision=amp_bf16",
}


def accuracy_of(run: Path, demo: Path) -> float:
    net = ViCMAE(**load_config([str(ROOT / "yamls" / "demo.yaml")], pretrain)["model"]).eval()
    load_pretrained(net, str(run / "checkpoints" / LATEST))
    views = [
        EvalViews(
            [str(demo / f"{split}_{kind}") for kind in ("videos", "images")], 32, crop_pct=1.0
        )
        for split in ("train", "test")
    ]
    return knn_accuracy(*(embed(net.encoder, data) for data in views))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", default=ALGORITHMS, choices=ALGORITHMS, metavar="ALGORITHM"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = {"none": ALGORITHMS["none"]} | {name: ALGORITHMS[name] for name in options.only}
    times, accuracies = {name: [] for name in asked}, {name: [] for name in asked}
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder, "data", "demo")
        data_prep.demo(str(demo))
        for seed in range(options.seeds):
            for number, (name, override) in enumerate(asked.items()):
                arguments = [
                    str(ROOT / "yamls" / "demo.yaml"),
                    f"seed={seed}",
                    f"run_name=seed{seed}-{number}",
                ]
                arguments += [
                    f"trainer.max_duration={options.epochs}ep",
                    "callbacks={SpeedMonitor: {}}",
                ]
                arguments += [override] if override else []
                command = [sys.executable, str(ROOT / "pretrain.py"), *arguments]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(
                    command, cwd=folder, env=environment, check=True, capture_output=True
                )
                run = Path(folder, "runs", f"seed{seed}-{number}")
                times[name].append(json.loads((run / "result.json").read_text())["time/train"])
                accuracies[name].append(accuracy_of(run, demo))
                line = {
                    "algorithm": name,
                    "seed": seed,
                    "hours": times[name][-1],
                    "knn": round(accuracies[name][-1], 4),
                }
                print(json.dumps(line), flush=True)
    for name in asked:
        ratio = statistics.median(
            time / none for time, none in zip(times[name], times["none"], strict=True)
        )
        mean, spread = (
            statistics.mean(accuracies[name]),
            statistics.stdev(accuracies[name]) if options.seeds > 1 else 0.0,
        )
        print(
            json.dumps(
                {
                    "algorithm": name,
                    "time": round(ratio, 3),
                    "knn": round(mean, 4),
                    "std": round(spread, 4),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
