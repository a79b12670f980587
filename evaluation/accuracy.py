"""Accuracy of a classifier: its classes in the data sets, and the loader of labelled views."""

from collections.abc import Sequence
from pathlib import Path

import torch
from composer import Evaluator
from composer.core import DataSpec
from composer.utils import dist
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from model import Classifier
from shards.augment import normalise
from shards.format import labelled_classes, match_classes, read_classes
from shards.loader import Loader
from shards.views import DataSets, EvalViews, PositiveFraction, check_frames


def label_numbers(net: Classifier, paths: list[str], owner: str) -> list[list[int]]:
    """Return for each data set the numbers of its labels among the classifier's classes, by name.

    Without class names, label i of a data set is class i of the classifier, or of its head.

    Args:
        owner: the classifier, for error messages.

    Raises:
        ValueError: a data set has classes that the classifier lacks, or another number of classes.
    """
    labels = []
    for data_set, path in enumerate(paths):
        classes, names = range(net.num_classes), net.class_names
        if net.head_per_data_set:
            head, classes = net.classes_of(data_set)
            if not classes:
                raise ValueError(f"{owner}: has heads for {data_set} data sets, not for {path}")
            names = names and names[head]
        if names:
            labels.append(match_classes(path, names, owner, classes.start))
            continue
        count = len(labelled_classes(path))
        if count != len(classes):
            fault = f"its head has {len(classes)} classes, but {path} has {count}"
            raise ValueError(f"{owner}: {fault}")
        labels.append(list(classes))
    return labels


def class_labels(net: Classifier, path: str) -> list[str]:
    """Return a name for each class of a classifier; without names, of the data set at `path`.

    If the numbers of classes differ, the names are numbers.
    """
    names = net.class_names or read_classes(path)
    if names and isinstance(names[0], list):
        names = [f"{name} ({number})" for number, head in enumerate(names) for name in head]
    return names if len(names) == net.num_classes else list(map(str, range(net.num_classes)))


def normalise_views(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Normalise `inputs` (B, V, T, 3, H, W) from bytes."""
    return batch | {"inputs": normalise(batch["inputs"])}


def load_eval(
    run: Path,
    net: Classifier,
    labels: Sequence[list[int]],
    *,
    paths: DataSets,
    temporal_views: PositiveInt = 1,
    spatial_views: PositiveInt = 1,
    crop_pct: PositiveFraction = 0.875,
    frame_interval: PositiveFloat | None = None,
    batch_size: PositiveInt = 64,
    num_workers: NonNegativeInt = 0,
) -> Evaluator:
    """Return Composer's evaluator of a classifier on labelled data sets.

    On several ranks, the sampler pads the data to equal shares, and Composer's evaluation loop
    removes the padding before it counts.

    Args:
        run, labels: see EvalViews.
        net: its sizes are those of the views, and its images_as_stored is given to EvalViews.
        paths: labelled data sets.
        temporal_views, spatial_views, crop_pct, frame_interval: see EvalViews.
        batch_size: samples on each rank, with all their views.
        num_workers: data worker processes of each rank.
    """
    encoder = net.encoder
    check_frames(paths, encoder.num_frames, frame_interval, temporal_views)
    data = EvalViews(
        paths,
        encoder.img_size,
        encoder.num_frames,
        temporal_views=temporal_views,
        spatial_views=spatial_views,
        crop_pct=crop_pct,
        frame_interval=frame_interval,
        labels=labels,
        images_as_stored=getattr(net, "images_as_stored", False),
        patch_size=encoder.patch_size,
        run=run,
    )
    sampler = dist.get_sampler(data, drop_last=False, shuffle=False)
    loader = Loader(data, batch_size, data.sample_bytes, sampler=sampler, num_workers=num_workers)
    # Composer calls microbatch_transforms on the device, and batch_transforms before the transfer.
    spec = DataSpec(loader, microbatch_transforms=normalise_views)
    return Evaluator(label="eval", dataloader=spec, metric_names=["top1", "top5"])
