"""The demonstration over three seeds: random weights, MAE alone and ViC-MAE.

    uv run python benchmarks/bench_demo.py                               # 2 CPU cores, 45 min

All rows have the same encoder, data, steps and probes. Pre-trains what is missing under runs/ and
measures each encoder: k-NN, and linear heads on 200 labels and on all, with stills and the middle
frames of clips; fine-tuning on 200 labelled clips and on 200 labelled stills. Prints a line of JSON
for each encoder, then the table of the README: mean and standard deviation over the seeds.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep
from training.weights import LATEST

SEEDS = 3
METHODS = {  # {method: its changes of yamls/demo.yaml}
    "MAE alone": ["model.weight_contrast=0.0", "model.weight_recon=1.0"],
    "ViC-MAE": [],
}
RANDOM = "random weights"
COLUMNS = {
    "knn": "k-NN",
    "linear_20": "linear, 200 labels",
    "linear_all": "linear, all labels",
    "clips": "fine-tuned, 200 clips",
    "stills": "fine-tuned, 200 stills",
}


def run(script: str, *arguments: str) -> None:
    """Run a stage; end the program if it fails."""
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")


def name_of(method: str, seed: int) -> str:
    return f"bench_{method.replace(' ', '_')}_{seed}"


def pretrain(method: str, seed: int) -> None:
    """Pre-train, unless the run is finished."""
    settings = [f"run_name={name_of(method, seed)}", f"seed={seed}", "trainer.progress_bar=false"]
    run("pretrain.py", "yamls/demo.yaml", *settings, *METHODS[method])


def measure(encoder: str, seed: int) -> dict[str, float]:
    """Return the accuracies of an encoder by the keys of COLUMNS, in [0, 1].

    Args:
        encoder: RANDOM, or a method that has been pre-trained.
    """
    name = name_of(encoder, seed)
    # Random weights have the sizes of ViC-MAE's checkpoint.
    run_name = name_of("ViC-MAE", seed) if encoder == RANDOM else name
    checkpoint = f"runs/{run_name}/checkpoints/{LATEST}"
    always = [f"seed={seed}", f"random_weights={str(encoder == RANDOM).lower()}"]
    probe = [*always, f"run_name={name}_eval", f"checkpoint={checkpoint}"]
    run("eval.py", "yamls/eval_demo.yaml", *probe)
    result = json.loads(Path("runs", f"{name}_eval", "eval.json").read_text())
    for kind, overlay in (("clips", []), ("stills", ["yamls/finetune_stills.yaml"])):
        settings = [*always, f"run_name={name}_{kind}", f"pretrained={checkpoint}"]
        settings.append("trainer.progress_bar=false")
        run("finetune.py", "yamls/finetune_demo.yaml", *overlay, *settings)
        tuned = json.loads(Path("runs", f"{name}_{kind}", "result.json").read_text())
        result[kind] = tuned["metrics/eval/top1"]
    return {key: result[key] for key in COLUMNS}


def mean_and_deviation(accuracies: list[float]) -> str:
    """Return them in %."""
    values = [100 * accuracy for accuracy in accuracies]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def main() -> None:
    data_prep.make_demo("data/demo")
    for method in METHODS:
        for seed in range(SEEDS):
            pretrain(method, seed)
    print("| encoder | " + " | ".join(COLUMNS.values()) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for encoder in (RANDOM, *METHODS):
        results = []
        for seed in range(SEEDS):
            results.append(measure(encoder, seed))
            line = {"method": encoder, "seed": seed} | results[-1]
            print(json.dumps(line), file=sys.stderr, flush=True)
        cells = [mean_and_deviation([result[key] for result in results]) for key in COLUMNS]
        print(f"| {encoder} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
