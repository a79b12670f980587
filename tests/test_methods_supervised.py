"""methods/supervised.py: one encoder with a head for each of several labelled data sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, read_result, run_stage
from tiny_models import ENCODER
from torch import Tensor

import eval as evaluation
import finetune
from methods.supervised import Omnivore
from model import Classifier
from training.weights import LATEST


def test_each_head_trains_and_classifies_the_samples_of_its_own_data_set_alone():
    net = Omnivore([4, 3], **ENCODER, head_init_std=1.0)
    target = torch.tensor([3, 4, 0, 6, 5])  # 4, 6 and 5 are classes of the second data set
    batch = {"inputs": torch.randn(5, 2, 1, 3, 32, 32), "target": target}
    loss = net.loss(net(batch), batch)
    loss.backward()
    gradients = [head.weight.grad.clone() for head in net.head]
    probabilities = net.eval_forward(batch)

    net.zero_grad()
    features = net.encoder(batch["inputs"].flatten(0, 2))[:, 1:].mean(dim=1)  # (10, D)
    terms, expected = [], torch.zeros(5, 7)
    for sample, (head, label) in enumerate([(0, 3), (1, 0), (0, 0), (1, 2), (1, 1)]):
        logits = net.head[head](features[2 * sample : 2 * sample + 2])  # (V, C of the data set)
        terms += [-view.log_softmax(dim=0)[label] for view in logits]
        classes = slice(0, 4) if head == 0 else slice(4, 7)
        expected[sample, classes] = logits.softmax(dim=1).mean(dim=0)
    expected_loss = sum(terms) / len(terms)
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for head, gradient in zip(net.head, gradients, strict=True):
        torch.testing.assert_close(gradient, head.weight.grad)
    torch.testing.assert_close(probabilities, expected)


def test_classes_are_numbered_over_all_data_sets():
    assert Omnivore([4, 3, 5], **ENCODER).first_classes() == [0, 4, 7]


def test_data_set_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="data_set=2: must be below 2, the number of heads"):
        Omnivore([4, 3], **ENCODER, data_set=2)


def test_numbers_of_classes_are_read_from_the_weights():
    assert Omnivore.classes_in(Omnivore([4, 3, 5], **ENCODER).state_dict()) == [4, 3, 5]
    assert Omnivore.classes_in(Classifier(4, **ENCODER).state_dict()) == []


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    """The arguments of two epochs of the recipe, on clips and on images."""
    return [
        str(ROOT / "yamls" / "methods" / "omnivore.yaml"),
        f"data.streams=[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]",
        "data.global_train_batch_size=40",
        "data.num_workers=0",
        f"eval_data.paths=[{demo}/test_videos, {demo}/test_images]",
        "model.num_frames=2",
        "model.depth=1",
        "trainer.max_duration=2ep",
        "trainer.eval_interval=2ep",
    ]


def read_eval(folder: Path, run_name: str) -> dict[str, float]:
    return json.loads((folder / "runs" / run_name / "eval.json").read_text())


def test_one_encoder_learns_two_data_sets_and_each_head_is_evaluated(arguments, demo, tmp_path):
    targets = {True: set(), False: set()}  # of samples that move, and of still ones
    loss = Omnivore.loss

    def record(net: Omnivore, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        moves = batch["inputs"][:, 0].diff(dim=1).abs().amax(dim=(1, 2, 3, 4)) > 0
        labels = batch["target"].argmax(dim=1).tolist()
        for is_moving, label in zip(moves.tolist(), labels, strict=True):
            targets[is_moving].add(label)
        return loss(net, outputs, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Omnivore, "loss", record)
        run_stage(finetune, arguments, tmp_path)
    assert targets[True] == set(range(10))
    # A clip whose two frames are one frame of the file counts as still.
    assert targets[False] - targets[True] == set(range(10, 20))

    checkpoint = f"checkpoint={tmp_path}/runs/omnivore/checkpoints/{LATEST}"
    top1 = []
    for head, kind in enumerate(("videos", "images")):
        data = f"accuracy={{paths: [{demo}/test_{kind}], crop_pct: 1.0}}"
        command = [f"run_name={kind}", checkpoint, f"model.data_set={head}", data]
        run_stage(evaluation, command, tmp_path)
        top1.append(read_eval(tmp_path, kind)["top1"])
    result = read_result(tmp_path, "omnivore")
    assert result["metrics/eval/top1"] == pytest.approx(np.mean(top1)) and max(top1) > 0.1

    both = f"accuracy={{paths: [{demo}/test_videos, {demo}/test_images], crop_pct: 1.0}}"
    run_stage(evaluation, ["run_name=both", checkpoint, both], tmp_path)
    assert read_eval(tmp_path, "both")["top1"] == pytest.approx(np.mean(top1))
    absent = ["run_name=absent", checkpoint, "model.data_set=2", both]
    assert "data_set=2: must be below 2" in error_of(evaluation, absent, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("augment.label_smoothing=0.1", "must be 0 with a head for each data set"),
        ("eval_data.paths=[{demo}/test_videos]", "give one of eval_data.paths for each"),
    ],
)
def test_settings_that_do_not_suit_several_heads_are_named(
    arguments, demo, tmp_path, change, message
):
    command = [*arguments, change.format(demo=demo)]
    assert message in error_of(finetune, command, tmp_path)
