"""The demonstration over three seeds: random weights, MAE alone and ViC-MAE, with equal encoder, data, steps and probes.

    uv run python benchmarks/bench_demo.py                                       # 2 CPU cores; see README for the time

Pre-trains what is missing under runs/, probes each encoder (k-NN; linear on 200 labels and on all) on stills and middle
frames of clips, fine-tunes it on 200 labelled clips and on 200 labelled stills, and prints a line of JSON a run, then the
table of the README: mean and standard deviation over the seeds.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_prep

METHODS = {
    "random weights": None,
    "MAE alone": ["model.weight_contrast=0.0", "model.weight_recon=1.0"],
    "ViC-MAE": [],
}
COLUMNS = {
    "knn": "k-NN",
    "linear_20": "linear, 200 labels",
    "linear_all": "linear, all labels",
    "clips": "fine-tuned, 200 clips",
    "stills": "fine-tuned, 200 stills",
}


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, script, f"yamls/{arguments[0]}.yaml", *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")


def measure(method: str, seed: int) -> dict[str, float]:
    name = f"bench_{method.replace(' ', '_')}_{seed}"
    checkpoint = "null"
    if METHODS[method] is not None:
        run(
            "pretrain.py",
            "demo",
            f"run_name={name}",
            f"seed={seed}",
            "trainer.progress_bar=false",
            *METHODS[method],
        )
        checkpoint = f"runs/{name}/checkpoints/latest-rank0.pt"
    run("eval.py", "eval_demo", f"run_name={name}_eval", f"seed={seed}", f"checkpoint={checkpoint}")
    found = json.loads(Path("runs", f"{name}_eval", "eval.json").read_text())
    for kind, changes in (("clips", []), ("stills", ["yamls/finetune_stills.yaml"])):
        tuned = f"{name}_{kind}"
        always = [
            f"run_name={tuned}",
            f"seed={seed}",
            f"pretrained={checkpoint}",
            "trainer.progress_bar=false",
        ]
        run("finetune.py", "finetune_demo", *changes, *always)
        found[kind] = json.loads(Path("runs", tuned, "result.json").read_text())[
            "metrics/eval/top1"
        ]
    return {key: found[key] for key in COLUMNS}


def main() -> None:
    data_prep.demo("data/demo")
    print("| encoder | " + " | ".join(COLUMNS.values()) + " |")
    rows = []
    for method in METHODS:
        results = []
        for seed in range(3):
            results.append(measure(method, seed))
            print(
                json.dumps({"method": method, "seed": seed} | results[-1]),
                file=sys.stderr,
                flush=True,
            )
        cells = ([100 * result[key] for result in results] for key in COLUMNS)
        rows.append(
            " | ".join(
                f"{statistics.mean(cell):.1f} ± {statistics.stdev(cell):.1f}" for cell in cells
            )
        )
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for method, row in zip(METHODS, rows, strict=True):
        print(f"| {method} | {row} |")


if __name__ == "__main__":
    main()
