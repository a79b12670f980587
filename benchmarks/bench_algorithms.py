"""Training time and k-NN accuracy of the speed-up algorithms, and of half precision.

    uv run python benchmarks/bench_algorithms.py --epochs 10 --seeds 3    # 2 idle CPU cores, 30 min

Each algorithm pre-trains the demonstration once for each seed, in turn, in a process of its own
with one thread. Prints a line of JSON for each run and one for each algorithm: the median ratio of
its training time to the time without an algorithm, and the k-NN accuracy of its checkpoint, mean
and standard deviation over the seeds. With EMA, the accuracy is that of its averages.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
from evaluation.probes import embed, knn_accuracy
from pretrain import PretrainConfig
from shards.views import EvalViews
from training.config import load_config
from training.weights import LATEST, load_pretrained

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "yamls" / "demo.yaml")
EMA = "EMA: {half_life: 46ba, update_interval: 1ba}"
CLIPPING = "GradientClipping: {clipping_type: norm, clipping_threshold: 1.0}"
RESIZING = "ProgressiveResizing: {initial_scale: 0.5, delay_fraction: 0.3, size_increment: 8}"
ALGORITHMS = {
    "none": "algorithms=null",
    "EMA": f"algorithms={{{EMA}}}",
    "GradientClipping, norm 1": f"algorithms={{{CLIPPING}}}",
    "ChannelsLast": "algorithms={ChannelsLast: {}}",
    "PartialDecoding, half": "algorithms={PartialDecoding: {ratio: 0.5}}",
    "ProgressiveResizing from half": f"algorithms={{{RESIZING}}}",
    "PartialDecoding and EMA": f"algorithms={{PartialDecoding: {{ratio: 0.5}}, {EMA}}}",
    "trainer.precision=amp_bf16": "trainer.precision=amp_bf16",
}


def train(folder: Path, run_name: str, seed: int, epochs: int, override: str) -> float:
    """Pre-train in a process of its own, and return the hours that its training took."""
    settings = [f"seed={seed}", f"run_name={run_name}", f"trainer.max_duration={epochs}ep"]
    settings += ["callbacks={SpeedMonitor: {}}", override]
    command = [sys.executable, str(ROOT / "pretrain.py"), DEMO, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return json.loads((folder / "runs" / run_name / "result.json").read_text())["time/train"]


def accuracy_of(run: Path, demo: Path) -> float:
    """Return the k-NN accuracy of a run's checkpoint, from training to test data."""
    net = PretrainConfig(**load_config([DEMO], PretrainConfig)).new_model()
    load_pretrained(net, str(run / "checkpoints" / LATEST))
    labelled = []
    for split in ("train", "test"):
        paths = [str(demo / f"{split}_{kind}") for kind in ("videos", "images")]
        labelled.append(embed(net.encoder, EvalViews(paths, 32, crop_pct=1.0)))
    return knn_accuracy(*labelled)


def print_summary(times: dict[str, list[float]], accuracies: dict[str, list[float]]) -> None:
    """Print the line of each algorithm; the times and accuracies have a value for each seed."""
    for name, values in accuracies.items():
        pairs = zip(times[name], times["none"], strict=True)
        line = {
            "algorithm": name,
            "time": round(statistics.median(time / none for time, none in pairs), 3),
            "knn": round(statistics.mean(values), 4),
            "std": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
        }
        print(json.dumps(line), flush=True)


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
    names = list(dict.fromkeys(["none", *options.only]))
    times, accuracies = {name: [] for name in names}, {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        demo = folder / "data" / "demo"
        data_prep.make_demo(str(demo))
        for seed in range(options.seeds):
            for number, name in enumerate(names):
                run_name = f"seed{seed}-{number}"
                hours = train(folder, run_name, seed, options.epochs, ALGORITHMS[name])
                accuracy = accuracy_of(folder / "runs" / run_name, demo)
                times[name].append(hours)
                accuracies[name].append(accuracy)
                line = {"algorithm": name, "seed": seed, "hours": hours, "knn": round(accuracy, 4)}
                print(json.dumps(line), flush=True)
    print_summary(times, accuracies)


if __name__ == "__main__":
    main()
