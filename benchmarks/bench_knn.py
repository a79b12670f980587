"""Memory and time of k-NN with a bank of ImageNet-1K's size.

    uv run python benchmarks/bench_knn.py         # one CPU core, 10 GB, 4 minutes

The bank has 1,281,167 random features of a ViT-B in fp32, as evaluation/probes.py keeps them. A
query is a feature of the bank with noise, so that k-NN must classify all of them correctly. Prints
a line of JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluation.probes import knn_accuracy, labelled

BANK = 1_281_167
QUERIES = 2000
WIDTH = 768
CLASSES = 1000


def peak() -> int:
    """Return the highest number of bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, labels = torch.randn(BANK, WIDTH), torch.randint(CLASSES, (BANK,))
    chosen = torch.randperm(BANK)[:QUERIES]
    queries = features[chosen] + 0.3 * torch.randn(len(chosen), WIDTH), labels[chosen]
    before, begin = peak(), time.process_time()
    accuracy = knn_accuracy(labelled(features, labels), queries)
    seconds = time.process_time() - begin
    line = {"bank": BANK, "queries": QUERIES, "accuracy": accuracy, "threads": 1}
    line |= {"bank_gb": round(features.nbytes / 1e9, 2), "before_gb": round(before / 1e9, 2)}
    line |= {"peak_gb": round(peak() / 1e9, 2), "ms_per_query": round(1e3 * seconds / QUERIES, 3)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
