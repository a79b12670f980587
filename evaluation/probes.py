"""What fixed features are worth: k-NN and linear accuracy; features of whole data sets, in parts that outlive an end."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from composer import Callback, Event, Logger, State
from composer.algorithms import EMA
from composer.utils import dist
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from evaluation.pictures import draw_neighbours
from model import Encoder, pool
from shards.augment import normalise
from shards.format import UNREADABLE, common_classes, read_json
from shards.storage import Storage
from shards.views import DataSets, EvalViews, PositiveFraction
from training.checkpoints import Checkpoints


def cache_key(
    checkpoint: str | None, seed: int, sizes: dict[str, Any], block: dict[str, Any]
) -> str:
    """Sixteen digits for all that decides the numbers of a measurement, by which what is done of it is found again."""
    files = (
        [Path(checkpoint), *sorted(Path(checkpoint).rglob("*"))]
        if checkpoint and Path(checkpoint).exists()
        else []
    )
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    data = [
        read_json(path, "index.json")
        for key in ("data", "bank", "queries")
        for path in block.get(key, ())
    ]
    settled = {
        key: value
        for key, value in block.items()
        if key not in ("num_workers", "batch_size", "part_size")
    }
    told = json.dumps([checkpoint, stamps, seed, sizes, settled, data], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_part(folder: Path, begin: int, end: int) -> dict[str, Tensor] | None:
    """`outputs` and `labels` of samples begin..end that infer left in a folder; None if they are not there undamaged."""
    for path in folder.glob(f"{begin}-{end}-*.safetensors"):
        data = path.read_bytes()
        if path.stem.endswith(hashlib.sha256(data).hexdigest()[:16]):
            return safetensors.torch.load(data)
    return None


@torch.no_grad()
def infer(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    data: EvalViews,
    batch_size: int = 256,
    num_workers: int = 0,
    parts: Path | None = None,
    part_size: int = 4096,
) -> tuple[Tensor, Tensor]:
    """forward(normalised `inputs`, (B, V, T, 3, H, W)) and label of every sample once, in order; the same on all ranks.

    The label of what cannot be decoded is -1, see EvalViews and readable.

    Args:
        parts: folder of rank 0 where the outputs of every `part_size` samples are kept as soon as they are there. What is
            found there is not computed again. None to keep nothing.
    """
    device, training = next(module.parameters()).device, module.training
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    done, batches = {}, {}
    for begin in range(0, len(data), part_size):
        end = min(begin + part_size, len(data))
        found = [read_part(parts, begin, end) if parts and rank == 0 else None]
        if parts:
            dist.broadcast_object_list(found)
        done[begin, end] = found[0]
        if found[0] is None:
            mine = torch.arange(
                begin + rank, begin + math.ceil((end - begin) / ranks) * ranks, ranks
            ).clamp(max=end - 1)
            batches[begin, end] = [batch.tolist() for batch in mine.split(batch_size)]
    loader = iter(
        DataLoader(data, batch_sampler=list(chain(*batches.values())), num_workers=num_workers)
    )
    ready = len(data) - sum(end - begin for begin, end in batches)
    disable = None if rank == 0 else True
    module.eval()
    with tqdm(
        total=len(data), initial=ready, desc="eval", unit=" samples", disable=disable, leave=False
    ) as bar:
        for (begin, end), planned in batches.items():
            outputs, labels = [], []
            for batch in islice(loader, len(planned)):
                outputs.append(forward(normalise(batch["inputs"].to(device))).float().cpu())
                labels.append(batch["target"])
                bar.update(min(len(labels[-1]) * ranks, len(data) - bar.n))
            shares = dist.all_gather_object(
                {"outputs": torch.cat(outputs), "labels": torch.cat(labels)}
            )
            part = {
                key: torch.stack([one[key] for one in shares], dim=1).flatten(0, 1)[: end - begin]
                for key in shares[0]
            }
            done[begin, end] = part
            if parts and rank == 0:
                parts.mkdir(parents=True, exist_ok=True)
                file = safetensors.torch.save(part)
                name = f"{begin}-{end}-{hashlib.sha256(file).hexdigest()[:16]}.safetensors"
                Storage(str(parts)).write(name, file)
    module.train(training)
    return tuple(torch.cat([part[key] for part in done.values()]) for key in ("outputs", "labels"))


def embed(
    encoder: nn.Module,
    data: EvalViews,
    num_workers: int = 0,
    parts: Path | None = None,
    before_batch: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled features of every sample, the mean over its views and frames, and its label -> (n, D), (n,).

    Args:
        parts: see infer.
        before_batch: called on all ranks before each batch; may end the program.
    """

    def features(inputs: Tensor) -> Tensor:
        if before_batch:
            before_batch()
        frames = inputs.flatten(0, 2) if encoder.num_frames == 1 else inputs.flatten(0, 1)
        return pool(encoder(frames), "mean").unflatten(0, (len(inputs), -1)).mean(dim=1)

    return infer(encoder, features, data, num_workers=num_workers, parts=parts)


def readable(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What infer returns, without the samples that have no label, or could not be decoded; says how many they are."""
    kept = labels >= 0
    if dist.get_global_rank() == 0 and not kept.all():
        print(
            f"{len(kept) - int(kept.sum())} of {len(kept)} samples cannot be decoded, or have no label, and do not count"
        )
    return outputs[kept], labels[kept]


@torch.autocast("cpu", enabled=False)  # whatever precision the features were computed in
def knn_accuracy(bank: tuple, queries: tuple, k: int = 20, temperature: float = 0.07) -> float:
    """ProperFraction of queries whose k nearest of the bank by cosine, weighted by exp(cosine / temperature), vote right.

    Args:
        bank, queries: features (n, D) and labels (n,).

    Source: Wu et al. 2018, with DINO's numbers.
    """
    (features, labels), (asked, truth) = bank, queries
    features, right = F.normalize(features, dim=1), 0
    for chunk, answers in zip(
        F.normalize(asked, dim=1).split(1024), truth.split(1024), strict=True
    ):
        cosine, nearest = (chunk @ features.T).topk(min(k, len(features)), dim=1)  # (n, k)
        votes = torch.zeros(len(chunk), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        right += int((votes.argmax(dim=1) == answers).sum())
    return right / len(truth)


class KNN(Callback):
    """Logs the k-NN accuracy of the encoder before the first step, as `random`, and after the last.

    Where Composer's EMA is at work, it is that of the averages. A run that is told to stop does not wait for it.

    Args:
        every: epochs after which it is measured during training too; None for the last alone.
        bank, queries: labelled data sets; a clip is represented by its middle frame, to an encoder of images.
        crop_pct: see EvalViews.
        num_workers: processes that read.

    Raises:
        ValueError: data sets that are missing, have no labels or have different ones.
    """

    def __init__(
        self,
        *,
        bank: DataSets,
        queries: DataSets,
        every: PositiveInt | None = None,
        crop_pct: PositiveFraction = 0.875,
        num_workers: NonNegativeInt = 0,
    ):
        if common_classes(bank) != common_classes(queries):
            raise ValueError(f"callbacks.KNN: {queries[0]} has other classes than {bank[0]}")
        self.bank, self.queries = bank, queries
        self.every = every
        self.crop_pct = crop_pct
        self.num_workers = num_workers

    def measure(self, name: str, state: State, logger: Logger) -> None:
        encoder = getattr(state.model, "module", state.model).encoder  # without DDP around it
        sizes = (encoder.img_size, encoder.num_frames)
        averages = [one for one in state.algorithms if isinstance(one, EMA) and one.ema_started]
        checkpoints = next(one for one in state.callbacks if isinstance(one, Checkpoints))
        how = {"crop_pct": self.crop_pct, "unreadable": checkpoints.folder.parent / UNREADABLE}
        views = [EvalViews(paths, *sizes, **how) for paths in (self.bank, self.queries)]
        for one in averages:
            one.apply(Event.EVAL_START, state, logger)
        heed = partial(checkpoints.save_if, state)
        accuracy = knn_accuracy(
            *(
                readable(*embed(encoder, data, self.num_workers, before_batch=heed))
                for data in views
            )
        )
        for one in averages:
            one.apply(Event.EVAL_END, state, logger)
        logger.log_metrics({f"knn/{name}": accuracy})

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 0:
            self.measure("random", state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if (
            self.every
            and state.timestamp.epoch.value % self.every == 0
            and state.timestamp < state.max_duration
        ):
            self.measure("trained", state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.measure("trained", state, logger)


def fit_linear(
    features: Tensor, labels: Tensor, num_classes: int, l2: float
) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression by L-BFGS on standardised features (n, D), labels (n,) -> features to logits (n, C).

    Args:
        l2: weight of half the squared norm of the weights, relative to the mean cross-entropy.
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
def linear_accuracy(bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> float:
    """Accuracy of a linear head on fixed features.

    Args:
        bank, queries: features (n, D) and labels (n,); those of the bank in random order.

    The strength of regularisation is chosen on a fifth of the labels, and the head then fitted on all of them.
    """
    x, y = bank
    num_classes = int(y.max()) + 1
    fifth = max(1, len(y) // 5)

    def right(l2: float) -> float:
        predict = fit_linear(x[fifth:], y[fifth:], num_classes, l2)
        return float((predict(x[:fifth]).argmax(dim=1) == y[:fifth]).float().mean())

    best = max((1e-4, 1e-3, 1e-2, 1e-1, 1.0), key=right)
    predict = fit_linear(x, y, num_classes, best)
    return float((predict(queries[0]).argmax(dim=1) == queries[1]).float().mean())


def choose(labels: Tensor, limits: Tensor, seed: int) -> Tensor:
    """Indices of at most limits[c] samples (C,) of each class c of labels (n,), by `seed` at random and in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped, by_class = labels[order].sort(stable=True)
    counts = labels.bincount()
    nth = (
        torch.arange(len(labels)) - (counts.cumsum(dim=0) - counts)[grouped]
    )  # of its class, from 0
    return order[by_class[nth < limits[grouped]].sort().values]


def measure_probe(
    encoder: Encoder,
    seed: int,
    run: Path,
    parts: Path,
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
    """k-NN and linear accuracy of fixed features: the mean of the patch tokens of one central view.

    Args:
        parts: folder for what is done already, see infer.
        bank, queries: labelled data sets to learn from and to test on.
        labels_per_class: a linear head for each number, on so many labels of each class; null for all labels.
        fractions: k-NN and a linear head for each, on that fraction of the labels of each class, rounded up.
        k, temperature: of k-NN.
        features: .npz file to write bank_features, bank_labels, queries_features, queries_labels and classes to.
        neighbours: whether to draw the nearest neighbours of some queries, neighbours.png.

    Raises:
        ValueError: data sets that are missing, have no labels or have different ones.
    """
    classes = common_classes(bank)
    if classes != common_classes(queries):
        raise ValueError(f"probe: {queries[0]} has other classes than {bank[0]}")
    how = {"crop_pct": crop_pct, "unreadable": run / UNREADABLE}
    views = [
        EvalViews(paths, encoder.img_size, encoder.num_frames, **how) for paths in (bank, queries)
    ]
    found = [
        embed(encoder, one, num_workers, parts / str(number)) for number, one in enumerate(views)
    ]
    learn, test = (readable(*one) for one in found)
    first = dist.get_global_rank() == 0
    if features and first:
        names, values = (
            ("bank_features", "bank_labels", "queries_features", "queries_labels"),
            (*learn, *test),
        )
        aside = Path(f"{features}.{os.getpid()}.tmp")
        with aside.open("wb") as file:
            np.savez(file, classes=np.array(classes), **dict(zip(names, values, strict=True)))
        aside.replace(features)
    if neighbours and first:
        views = [
            Subset(one, (labels >= 0).nonzero()[:, 0].tolist())
            for one, (_, labels) in zip(views, found, strict=True)
        ]
        draw_neighbours(learn, test, views, run / "neighbours.png")
    result, counts = {"knn": knn_accuracy(learn, test, k, temperature)}, learn[1].bincount()
    limits = {
        str(number or "all"): torch.full_like(counts, number or len(learn[1]))
        for number in labels_per_class
    }
    # The product may come out above the whole number that it is: 0.07 * 100.
    shares = {f"{100 * share:g}%": (counts.double() * share - 1e-9).ceil() for share in fractions}
    for name, limit in (limits | shares).items():
        chosen = choose(learn[1], limit, seed)
        few = learn[0][chosen], learn[1][chosen]
        result[f"linear_{name}"] = linear_accuracy(few, test)
        if name in shares:
            result[f"knn_{name}"] = knn_accuracy(few, test, k, temperature)
    return result
