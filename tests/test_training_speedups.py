"""training/speedups.py: partial decoding, the ramp of the contrastive term and growing views."""

import math
from types import SimpleNamespace

import pytest
import torch
from composer import Callback, Event, Trainer
from composer.core import DataSpec
from conftest import error_of, losses, read_metrics, run_stage, signal_at, small
from tiny_models import ENCODER, TINY
from torchvision.transforms.v2.functional import InterpolationMode, resize

import pretrain
from methods.contrastive import SimCLR
from methods.masked import MAE
from model import Classifier, ViCMAE
from shards.augment import augment_batch
from training.checkpoints import Checkpoints
from training.speedups import ContrastRamp, PartialDecoding, ProgressiveResizing


def new_trainer(model, algorithm) -> Trainer:
    return Trainer(model=model, algorithms=[algorithm], device="cpu", progress_bar=False)


def test_partial_decoding_is_set_once_before_training():
    algorithm, net = PartialDecoding(0.25), ViCMAE(**TINY)
    assert [event for event in Event if algorithm.match(event, None)] == [Event.INIT]
    assert net.decode_ratio == 1.0
    new_trainer(net, algorithm)
    assert net.decode_ratio == 0.25


@pytest.mark.parametrize(
    "algorithm", [PartialDecoding(0.25), ContrastRamp("1ep"), ProgressiveResizing()]
)
def test_algorithm_of_pretraining_refuses_a_classifier_before_training(algorithm):
    name = type(algorithm).__name__
    with pytest.raises(ValueError, match=rf"algorithms\.{name}: works in pre-training only"):
        new_trainer(Classifier(3, **ENCODER), algorithm)


@pytest.mark.parametrize(
    ("method", "algorithm", "message"),
    [
        (SimCLR, PartialDecoding(0.25), "PartialDecoding: this method has no decoder"),
        (MAE, ContrastRamp("1ep"), "ContrastRamp: this method has no contrastive term"),
    ],
)
def test_algorithm_refuses_a_method_without_its_term_before_training(method, algorithm, message):
    with pytest.raises(ValueError, match=message):
        new_trainer(method(**TINY), algorithm)


# The ramp


@pytest.mark.parametrize(
    ("duration", "expected"),
    [("4ba", [0, 1 / 4, 2 / 4, 3 / 4, 1, 1]), ("2ep", [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])],
)
def test_weight_of_the_contrastive_term_rises_over_the_duration(demo, tmp_path, duration, expected):
    """Two epochs of three steps."""
    ramp = f"algorithms={{ContrastRamp: {{duration: {duration}}}}}"
    run_stage(pretrain, [*small(demo), ramp, "callbacks=null", "data.num_workers=0"], tmp_path)
    lines = [line for line in read_metrics(tmp_path, "demo") if "loss/train/total" in line]
    assert [line["contrast_ramp"] for line in lines] == pytest.approx(expected)
    for line in lines:
        weighted = line["contrast_ramp"] * line["loss/train/contrastive"]
        total = 0.7 * line["loss/train/reconstruction"] + 0.3 * weighted
        assert line["loss/train/total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["ContrastRamp", "FreezeEncoder"])
def test_fraction_of_the_training_is_refused_as_the_duration_of_an_algorithm(demo, tmp_path, name):
    algorithm = f"algorithms={{{name}: {{duration: 0.1dur}}}}"
    complaint = error_of(pretrain, [*small(demo), algorithm], tmp_path)
    assert f"algorithms.{name}.duration=0.1dur: give a whole number of epochs or steps" in complaint


# Growing views


class ViewRecorder(Callback):
    """Keeps the views of each batch as training gets them."""

    def __init__(self):
        self.views = []

    def batch_start(self, state, logger) -> None:
        self.views.append(state.batch["views"])


def test_views_grow_over_the_training():
    unchanged = torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0])  # parameters of the augmentation
    samples = [
        {
            "views": torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8),
            "augment": torch.stack([unchanged, unchanged]),
            "noise": torch.rand(2, 16),
        }
        for _ in range(20)
    ]
    net, recorder = ViCMAE(**TINY), ViewRecorder()
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    fractions = {"delay_fraction": 0.2, "finetune_fraction": 0.3}
    trainer = Trainer(
        model=net,
        train_dataloader=DataSpec(loader, microbatch_transforms=augment_batch),
        optimizers=torch.optim.AdamW(net.parameters(), lr=1e-4),
        max_duration="10ba",
        algorithms=[ProgressiveResizing(0.5, **fractions, size_increment=8)],
        callbacks=[recorder],
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    # In between, the side is 16 + 16 * (step / 10 - 0.2) / 0.5, rounded to a multiple of 8.
    sides = [16, 16, 16, 16, 24, 24, 32, 32, 32, 32]
    for step, (views, side) in enumerate(zip(recorder.views, sides, strict=True)):
        original = torch.stack([samples[2 * step]["views"], samples[2 * step + 1]["views"]])
        images = original.flatten(0, 1).permute(0, 3, 1, 2)
        scaled = resize(images, [side, side], InterpolationMode.BILINEAR, antialias=True)
        expected = scaled.permute(0, 2, 3, 1).unflatten(0, (2, 2))
        assert views.dtype == torch.uint8 and views.shape == (2, 2, side, side, 3)
        assert (views.int() - expected.int()).abs().max() <= 1, step  # they round differently
    assert math.isfinite(trainer.state.total_loss_dict["loss/train/total"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size_increment": 12}, "size_increment=12"),
        ({"size_increment": 8, "initial_scale": 0.1}, r"initial_scale=0\.1"),
        ({"size_increment": 24, "initial_scale": 0.25}, r"initial_scale=0\.25"),
        ({"delay_fraction": 0.8, "finetune_fraction": 0.2}, r"delay_fraction=0\.8"),
    ],
)
def test_impossible_sizes_are_named_before_training(settings, message):
    state = SimpleNamespace(model=ViCMAE(**TINY))
    with pytest.raises(ValueError, match=rf"algorithms\.ProgressiveResizing: .*{message}"):
        ProgressiveResizing(**settings).apply(Event.INIT, state, None)


def test_last_size_is_the_full_size_for_any_increment():
    algorithm = ProgressiveResizing(0.5, 0.2, 0.3, 24)
    sizes = [algorithm.side(336, step / 10) for step in range(11)]
    assert sizes == [168, 168, 168, 192, 240, 264, 312, 336, 336, 336, 336]


# Runs by YAML


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    return [*small(demo), "schedule.t_max=2ep", "callbacks=null", "data.num_workers=0"]


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory) -> list[float]:
    """The losses of a run without algorithms."""
    folder = tmp_path_factory.mktemp("plain")
    run_stage(pretrain, arguments, folder)
    return losses(folder, "demo")


@pytest.mark.parametrize(
    "block", ["{PartialDecoding: {ratio: 0.5}}", "{ProgressiveResizing: {size_increment: 8}}"]
)
def test_algorithm_trains_by_a_line_of_yaml_and_a_resumed_run_is_bit_identical(
    arguments, plain, tmp_path, monkeypatch, block
):
    arguments = [*arguments, f"algorithms={block}", "trainer.max_duration=6ba"]
    run_stage(pretrain, [*arguments, "run_name=uninterrupted"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "batch_start", signal_at(5))
        with pytest.raises(SystemExit):
            run_stage(pretrain, [*arguments, "run_name=resumed"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=resumed"], tmp_path)
    found = losses(tmp_path, "uninterrupted")
    assert losses(tmp_path, "resumed") == found and found != plain
    name = "progressive_resizing/width"
    widths = [line[name] for line in read_metrics(tmp_path, "uninterrupted") if name in line]
    assert widths == ([16, 16, 16, 16, 24, 32] if "Resizing" in block else [])
