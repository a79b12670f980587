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
from model import Encoder, pool
from shards.augment import normalise
from shards.format import UNREADABLE, common_classes, shared_shards
from shards.loader import Loader
from shards.storage import write_file
from shards.views import DataSets, EvalViews, PositiveFraction

Labelled = tuple[Tensor, Tensor]  # features (n, D), labels (n,)


@torch.no_grad()
def embed(
    encoder: Encoder,
    data: EvalViews,
    num_workers: int = 0,
    before_batch: Callable[[], None] | None = None,
    batch_size: int = 256,
) -> Labelled:
    """Return the feature and the label of every sample, in order; the same on all ranks.

    Args:
        before_batch: called on all ranks before each batch; may end the program.

    Samples without a label, and samples that cannot be decoded, have the label -1, see labelled.
    """
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    # All ranks take the same number of samples, since FSDP's forward pass is collective. The last
    # sample may be taken more than once; the surplus is dropped after gathering.
    share = math.ceil(len(data) / ranks)
    numbers = torch.arange(rank, share * ranks, ranks).clamp(max=len(data) - 1)
    subset = Subset(data, numbers.tolist())
    settings = {"num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    loader = Loader(subset, batch_size, data.sample_bytes, **settings)
    device, training = next(encoder.parameters()).device, encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in tqdm(loader, desc="embed", unit="batch", disable=rank > 0 or None, leave=False):
        if before_batch:
            before_batch()
        inputs = normalise(batch["inputs"].to(device))  # (B, V, T, 3, H, W)
        images = inputs.flatten(0, 2) if encoder.num_frames == 1 else inputs.flatten(0, 1)
        pooled = pool(encoder(images), "mean")  # (B * V [* T], D)
        features.append(pooled.unflatten(0, (len(inputs), -1)).mean(dim=1).float().cpu())
        labels.append(batch["target"])
    encoder.train(training)
    shares = dist.all_gather_object((torch.cat(features), torch.cat(labels)))
    features = torch.stack([share[0] for share in shares], dim=1).flatten(0, 1)  # (n, D)
    labels = torch.stack([share[1] for share in shares], dim=1).flatten(0, 1)  # (n,)
    return features[: len(data)], labels[: len(data)]


def labelled(features: Tensor, labels: Tensor) -> Labelled:
    """Return the samples with a label, which could be decoded; print how many others there are."""
    kept = labels >= 0
    missing = len(kept) - int(kept.sum())
    if missing and dist.get_global_rank() == 0:
        reason = "cannot be decoded or have no label, and do not count"
        print(f"{missing} of {len(kept)} samples {reason}")
    return features[kept], labels[kept]


@torch.autocast("cpu", enabled=False)  # in whatever precision the features were computed
def knn_accuracy(
    bank: Labelled, queries: Labelled, k: int = 20, temperature: float = 0.07
) -> float:
    """Return the fraction of queries that their k nearest samples of the bank classify correctly.

    The neighbours by cosine similarity vote with weight exp(cosine / temperature). Source: Wu et
    al. 2018, with DINO's k and temperature.
    """
    bank_features, bank_labels = F.normalize(bank[0], dim=1), bank[1]
    query_features, query_labels = F.normalize(queries[0], dim=1), queries[1]
    num_classes = int(bank_labels.max()) + 1
    correct = 0
    for chunk, truth in zip(query_features.split(1024), query_labels.split(1024), strict=True):
        cosine, nearest = (chunk @ bank_features.T).topk(min(k, len(bank_features)), dim=1)
        votes = torch.zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
        correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(query_labels)


def match_labels(
    owner: str, bank: list[str], queries: list[str]
) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Return the class names of a bank, and the labels of bank and queries, see match_classes.

    Raises:
        ValueError: data sets that are missing or have no labels; queries with classes that the bank
            lacks, or with the samples of the bank.
    """
    classes, labels = common_classes(bank + queries)
    for path, count in shared_shards(queries, bank).items():
        found = f"queries={path}: {count} of its shards are in the bank too"
        raise ValueError(f"{owner}: {found}, whose samples would find themselves; give other data")
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
        ValueError: data sets that are missing, have no labels or differ in their classes.
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
        report = Path("runs", state.run_name, UNREADABLE)
        data = EvalViews(
            paths,
            encoder.img_size,
            encoder.num_frames,
            crop_pct=self.crop_pct,
            labels=labels,
            patch_size=encoder.patch_size,
            unreadable=report,
        )
        return labelled(*embed(encoder, data, self.num_workers, lambda: self.before_batch(state)))

    def measure(self, name: str, state: State, logger: Logger) -> None:
        averages = [one for one in state.algorithms if isinstance(one, EMA) and one.ema_started]
        for ema in averages:
            ema.apply(Event.EVAL_START, state, logger)  # swaps the averages in
        bank, queries = self.embed(*self.bank, state), self.embed(*self.queries, state)
        for ema in averages:
            ema.apply(Event.EVAL_END, state, logger)
        logger.log_metrics({f"knn/{name}": knn_accuracy(bank, queries)})

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
    """Fit multinomial logistic regression by L-BFGS on standardised features.

    Args:
        l2: weight of half the squared norm of the weights, relative to the mean cross-entropy.

    Returns:
        A function from features (n, D) to logits (n, C).
    """
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    x = (features - mean) / std
    head = nn.Linear(x.shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + l2 / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.no_grad()(lambda features: head((features - mean) / std))


@torch.autocast("cpu", enabled=False)
def linear_accuracy(bank: Labelled, queries: Labelled) -> float:
    """Return the accuracy on queries of a linear head that is fitted on a bank in random order.

    The regularisation is chosen on the first fifth of the bank. The head is then fitted on all of
    it.
    """
    x, y = bank
    num_classes = int(y.max()) + 1
    fifth = max(1, len(y) // 5)

    def held_out_accuracy(l2: float) -> float:
        predict = fit_linear(x[fifth:], y[fifth:], num_classes, l2)
        return float((predict(x[:fifth]).argmax(dim=1) == y[:fifth]).float().mean())

    best = max((1e-4, 1e-3, 1e-2, 1e-1, 1.0), key=held_out_accuracy)
    predict = fit_linear(x, y, num_classes, best)
    return float((predict(queries[0]).argmax(dim=1) == queries[1]).float().mean())


def choose(labels: Tensor, limits: Tensor, seed: int) -> Tensor:
    """Return indices of at most limits[c] random samples of each class c, in random order.

    Args:
        labels: (n,).
        limits: (C,).
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped, by_class = labels[order].sort(stable=True)
    counts = labels.bincount()
    first_of_class = counts.cumsum(dim=0) - counts
    number_in_class = torch.arange(len(labels)) - first_of_class[grouped]
    return order[by_class[number_in_class < limits[grouped]].sort().values]


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


def write_features(path: str, bank: Labelled, queries: Labelled, classes: list[str]) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        classes=np.array(classes),
        bank_features=bank[0],
        bank_labels=bank[1],
        queries_features=queries[0],
        queries_labels=queries[1],
    )
    write_file(path, buffer.getvalue())


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
        ValueError: data sets that are missing, have no labels or differ in their classes.
    """
    classes, *labels = match_labels("probe", bank, queries)
    sizes = (encoder.img_size, encoder.num_frames)
    settings = {"crop_pct": crop_pct, "patch_size": encoder.patch_size}
    settings["unreadable"] = run / UNREADABLE
    views, found = [], []
    for paths, numbers in zip((bank, queries), labels, strict=True):
        data = EvalViews(paths, *sizes, labels=numbers, **settings)
        views.append(data)
        found.append(embed(encoder, data, num_workers))
    learn, test = labelled(*found[0]), labelled(*found[1])
    if features and dist.get_global_rank() == 0:
        write_features(features, learn, test, classes)
    if neighbours and dist.get_global_rank() == 0:
        kept = [(labels >= 0).nonzero()[:, 0].tolist() for _, labels in found]
        subsets = [Subset(data, numbers) for data, numbers in zip(views, kept, strict=True)]
        draw_neighbours(learn, test, subsets, run / "neighbours.png")
    result = {"knn": knn_accuracy(learn, test, k, temperature)}
    for name, limit in label_limits(learn[1], labels_per_class, fractions).items():
        chosen = choose(learn[1], limit, seed)
        few = learn[0][chosen], learn[1][chosen]
        result[f"linear_{name}"] = linear_accuracy(few, test)
        if name.endswith("%"):
            result[f"knn_{name}"] = knn_accuracy(few, test, k, temperature)
    return result
