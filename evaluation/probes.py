"""Quality of fixed features: k-NN and linear accuracy of an encoder on labelled data sets.

    features, labels = embed(encoder, EvalViews(["data/k400/val"], 224))
    accuracy = knn_accuracy(bank, queries)                      # each (features, labels)

A feature is the mean of the patch tokens of one central view (of its frames, if the encoder takes
images and the view is a clip).
"""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from composer import Callback, Event, Logger, State
from composer.algorithms import EMA
from composer.utils import dist
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from evaluation.pictures import draw_neighbours
from evaluation.ranks import interleave_on_rank_0, on_rank_0
from model import Encoder, pool_tokens
from shards.augment import normalise
from shards.format import common_classes, shared_shards
from shards.loader import Loader
from shards.storage import write_file
from shards.views import DataSets, EvalViews, PositiveFraction

Labelled = tuple[Tensor, Tensor]  # features (n, D), labels (n,)
# Sizes of chunks, so that the memory beside the features is bounded on a GPU.
SIMILARITIES = 2**28  # of queries and bank: 1 GB
ROWS = 2**16  # features that pass through a linear head


def encode_views(encoder: Encoder, inputs: Tensor, patches: bool = False) -> Tensor:
    """Return the features (B, D) of normalised views (B, V, T, 3, H, W), averaged over the views.

    Args:
        encoder: if it takes images, the features are averaged over the frames too.
        patches: return the features of all patches, (B, N, D), not their mean.
    """
    tokens = encoder(inputs.flatten(0, 2 if encoder.num_frames == 1 else 1))  # (.., 1 + N, D)
    features = tokens[:, 1:] if patches else pool_tokens(tokens, "mean")
    return features.unflatten(0, (len(inputs), -1)).mean(dim=1)


@torch.no_grad()
def embed(
    encoder: Encoder,
    data: EvalViews,
    num_workers: int = 0,
    before_batch: Callable[[], None] | None = None,
    batch_size: int = 256,
) -> Labelled:
    """Return the feature and the label of every sample, in order, on the encoder's device.

    All ranks call this together. Only rank 0 returns the samples, the others return none. Samples
    without a label, and samples that cannot be decoded, have the label -1, see labelled.

    Args:
        before_batch: called on all ranks before each batch; may end the program.
    """
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    # All ranks take the same number of samples, since FSDP's forward pass is collective. The last
    # sample may be taken more than once; the surplus is dropped after gathering.
    share = math.ceil(len(data) / ranks)
    numbers = torch.arange(rank, share * ranks, ranks).clamp(max=len(data) - 1)
    subset = Subset(data, numbers.tolist())
    loader = Loader(subset, batch_size, data.sample_bytes, num_workers=num_workers)
    device, training = next(encoder.parameters()).device, encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in tqdm(loader, desc="embed", unit="batch", disable=rank > 0 or None, leave=False):
        if before_batch:
            before_batch()
        inputs = normalise(batch["inputs"].to(device, non_blocking=True))  # (B, V, T, 3, H, W)
        features.append(encode_views(encoder, inputs).float())
        labels.append(batch["target"].to(device, non_blocking=True))
    encoder.train(training)
    features = interleave_on_rank_0(torch.cat(features))
    return features[: len(data)], interleave_on_rank_0(torch.cat(labels))[: len(data)]


def labelled(features: Tensor, labels: Tensor) -> Labelled:
    """Return the samples with a label, which could be decoded; print how many others there are."""
    kept = labels >= 0
    missing = len(kept) - int(kept.sum())
    if not missing:
        return features, labels  # ImageNet's features take 4 GB: not copied
    reason = "cannot be decoded or have no label, and do not count"
    print(f"{missing} of {len(kept)} samples {reason}")
    return features[kept], labels[kept]


def knn_accuracy(
    bank: Labelled, queries: Labelled, k: int = 20, temperature: float = 0.07
) -> float:
    """Return the fraction of queries that their k nearest samples of the bank classify correctly.

    The neighbours by cosine similarity vote with weight exp(cosine / temperature). Source: Wu et
    al. 2018, with DINO's k and temperature. Runs on the features' device.
    """
    bank_features, bank_labels = F.normalize(bank[0], dim=1), bank[1]
    num_classes = int(bank_labels.max()) + 1
    rows = max(1, min(1024, SIMILARITIES // len(bank_labels)))  # queries at a time
    correct = 0
    # Without autocast, in whatever precision the features were computed.
    with torch.autocast(bank_features.device.type, enabled=False):
        for chunk, truth in zip(queries[0].split(rows), queries[1].split(rows), strict=True):
            similarities = F.normalize(chunk, dim=1) @ bank_features.T
            cosine, nearest = similarities.topk(min(k, len(bank_labels)), dim=1)
            votes = cosine.new_zeros(len(chunk), num_classes)
            votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
            correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(queries[1])


def match_labels(
    owner: str, bank: list[str], queries: list[str]
) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Return the class names of a bank, and the labels of bank and queries, see match_classes.

    Raises:
        ValueError: missing or unlabelled data sets; queries with samples of the bank, or with
            classes that it lacks.
    """
    classes, labels = common_classes(bank + queries)
    for path, count in shared_shards(queries, bank).items():
        fault = f"queries={path}: {count} of its shards are in the bank too"
        raise ValueError(f"{owner}: {fault}, whose samples would find themselves; give other data")
    return classes, labels[: len(bank)], labels[len(bank) :]


class KNN(Callback):
    """Logs k-NN accuracy: knn/random before the first step, knn/trained after the last step.

    If Composer's EMA is active, its averages are measured.

    Args:
        before_batch: called with the state before each batch; may end the run, so that a stop
            signal does not wait for the measurement.
        bank, queries: labelled data sets. For an encoder of images, a clip is its middle frame.
        every: epochs after which accuracy is measured during training too; None for the end only.
        crop_pct: see EvalViews.
        num_workers: data worker processes.

    Raises:
        ValueError: see match_labels.
    """

    def __init__(
        self,
        before_batch: Callable[[State], None],
        *,
        bank: DataSets,
        queries: DataSets,
        every: PositiveInt | None = None,
        crop_pct: PositiveFraction = 0.875,
        num_workers: NonNegativeInt = 0,
    ):
        _, bank_labels, query_labels = match_labels("callbacks.KNN", bank, queries)
        self.before_batch = before_batch
        self.bank, self.queries = (bank, bank_labels), (queries, query_labels)
        self.every = every
        self.crop_pct = crop_pct
        self.num_workers = num_workers

    def embed(self, paths: list[str], labels: list[list[int]], state: State) -> Labelled:
        encoder = getattr(state.model, "module", state.model).encoder  # without DDP's wrapper
        sizes = (encoder.img_size, encoder.num_frames)
        settings = {"crop_pct": self.crop_pct, "patch_size": encoder.patch_size}
        run = Path("runs", state.run_name)
        data = EvalViews(paths, *sizes, labels=labels, run=run, **settings)
        return embed(encoder, data, self.num_workers, lambda: self.before_batch(state))

    def measure(self, name: str, state: State, logger: Logger) -> None:
        averages = [one for one in state.algorithms if isinstance(one, EMA) and one.ema_started]
        for ema in averages:
            ema.apply(Event.EVAL_START, state, logger)  # swaps the averages in
        bank, queries = self.embed(*self.bank, state), self.embed(*self.queries, state)
        for ema in averages:
            ema.apply(Event.EVAL_END, state, logger)
        accuracy = on_rank_0(lambda: knn_accuracy(labelled(*bank), labelled(*queries)))
        logger.log_metrics({f"knn/{name}": accuracy})

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 0:
            self.measure("random", state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        due = self.every and state.timestamp.epoch.value % self.every == 0
        if due and state.timestamp < state.max_duration:
            self.measure("trained", state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.measure("trained", state, logger)


def fit_linear(
    features: Tensor, labels: Tensor, num_classes: int, l2: float
) -> Callable[[Tensor], Tensor]:
    """Fit multinomial logistic regression by L-BFGS on standardised features, on their device.

    The result is a function from features (n, D) to logits (n, C). `l2` weighs half the squared
    norm of the weights, relative to the mean cross-entropy.
    """
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    x = (features - mean) / std
    head = nn.Linear(x.shape[1], num_classes, device=x.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = l2 / 2 * head.weight.square().sum()
        total.backward()
        for rows, truth in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            loss = F.cross_entropy(head(rows), truth) * (len(rows) / len(x))
            loss.backward()
            total = total + loss.detach()
        return total.detach()

    optimizer.step(closure)
    return torch.no_grad()(lambda features: head((features - mean) / std))


def linear_accuracy(bank: Labelled, queries: Labelled) -> float:
    """Fit a linear head on a bank in random order, and return its accuracy on the queries.

    The regularisation is chosen on the first fifth of the bank. The head is then fitted on the
    entire bank.
    """
    x, y = bank
    num_classes = int(y.max()) + 1
    fifth = max(1, len(y) // 5)

    def accuracy(l2: float, learn: Labelled, test: Labelled) -> float:
        predict = fit_linear(*learn, num_classes, l2)
        return float((predict(test[0]).argmax(dim=1) == test[1]).float().mean())

    learn, held_out = (x[fifth:], y[fifth:]), (x[:fifth], y[:fifth])
    with torch.autocast(x.device.type, enabled=False):
        best = max((1e-4, 1e-3, 1e-2, 1e-1, 1.0), key=lambda l2: accuracy(l2, learn, held_out))
        return accuracy(best, bank, queries)


def choose(labels: Tensor, limits: Tensor, seed: int) -> Tensor:
    """Return indices into labels (n,) of at most limits[c] random samples of each class c.

    The indices are in random order.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes, left = labels.tolist(), limits.tolist()
    chosen = []
    for index in order.tolist():
        left[classes[index]] -= 1
        if left[classes[index]] >= 0:
            chosen.append(index)
    return torch.tensor(chosen)


def label_limits(labels: Tensor, per_class: list[int | None], fractions: list[float]) -> dict:
    """Return {name: labels of each class (C,)} for the linear heads of measure_probe."""
    counts = labels.bincount()
    limits = {}
    for number in per_class:
        limits[str(number or "all")] = torch.full_like(counts, number or len(labels))
    for fraction in fractions:
        # The product may exceed the whole number that it should be, such as 0.07 * 100.
        limits[f"{100 * fraction:g}%"] = (counts.double() * fraction - 1e-9).ceil()
    return limits


def measure_probe(
    encoder: Encoder,
    seed: int,
    run: Path,
    *,
    bank: DataSets,
    queries: DataSets,
    labels_per_class: list[PositiveInt | None] = (None,),
    fractions: list[PositiveFraction] = (),
    k: PositiveInt = 20,
    temperature: PositiveFloat = 0.07,
    crop_pct: PositiveFraction = 0.875,
    features: str | None = None,
    neighbours: bool = False,
    num_workers: NonNegativeInt = 0,
) -> dict[str, float]:
    """Return k-NN and linear accuracy of an encoder's features.

    Args:
        seed: of the choice of labels.
        bank, queries: labelled data sets to learn from and to test on.
        labels_per_class: numbers of labels of each class, for a linear head each; null for all.
        fractions: fractions of the labels of each class, rounded up, for k-NN and a linear head
            each.
        k, temperature: see knn_accuracy.
        crop_pct: see EvalViews.
        features: .npz file for bank_features, bank_labels, queries_features, queries_labels,
            classes.
        neighbours: draw the nearest neighbours of some queries, neighbours.png.
        num_workers: data worker processes.

    Raises:
        ValueError: see match_labels.
    """
    classes, *labels = match_labels("probe", bank, queries)
    sizes = (encoder.img_size, encoder.num_frames)
    settings = {"crop_pct": crop_pct, "patch_size": encoder.patch_size, "run": run}
    pairs = zip((bank, queries), labels, strict=True)
    views = [EvalViews(paths, *sizes, labels=numbers, **settings) for paths, numbers in pairs]
    embedded = [embed(encoder, data, num_workers) for data in views]

    def measure() -> dict[str, float]:
        learn, test = labelled(*embedded[0]), labelled(*embedded[1])
        if features:
            buffer, arrays = io.BytesIO(), {"classes": np.array(classes)}
            for name, (x, y) in {"bank": learn, "queries": test}.items():
                arrays |= {f"{name}_features": x.cpu(), f"{name}_labels": y.cpu()}
            np.savez(buffer, **arrays)
            write_file(features, buffer.getvalue())
        if neighbours:
            kept = [(numbers >= 0).nonzero()[:, 0].tolist() for _, numbers in embedded]
            subsets = [Subset(data, numbers) for data, numbers in zip(views, kept, strict=True)]
            draw_neighbours(learn, test, subsets, classes, run / "neighbours.png")
        limits = label_limits(learn[1], labels_per_class, fractions)
        return compare_labels(learn, test, limits, seed, k, temperature)

    return on_rank_0(measure)


def compare_labels(
    bank: Labelled,
    queries: Labelled,
    limits: dict[str, Tensor],
    seed: int,
    k: int,
    temperature: float,
) -> dict[str, float]:
    """Return k-NN accuracy, and the accuracies with fewer labels, see label_limits."""
    result = {"knn": knn_accuracy(bank, queries, k, temperature)}
    for name, limit in limits.items():
        chosen = choose(bank[1], limit, seed)
        few = bank[0][chosen], bank[1][chosen]
        result[f"linear_{name}"] = linear_accuracy(few, queries)
        if name.endswith("%"):
            result[f"knn_{name}"] = knn_accuracy(few, queries, k, temperature)
    return result
