"""Accuracy of a classifier: views, corrupt samples, and ranks, against one view at a time."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import corrupted_copy
from test_eval import evaluate_file, fraction_in_top, probabilities_of, save_classifier


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_accuracy_averages_the_softmax_or_the_logits_of_all_views_of_a_sample(
    demo, tmp_path, average
):
    net = save_classifier(tmp_path / "classifier.pt")
    path = str(demo / "test_videos")
    views = {"temporal_views": 2, "spatial_views": 3, "crop_pct": 1.0}
    accuracy = {"paths": [path], "batch_size": 7, **views}
    result = evaluate_file(tmp_path, accuracy=accuracy, average=average)
    probabilities, labels = probabilities_of(net, path, 2, 3, average)
    assert result["average"] == average
    assert result["top1"] == pytest.approx(fraction_in_top(probabilities, labels, 1))
    assert result["top5"] == pytest.approx(fraction_in_top(probabilities, labels, 5))
    assert result["top1"] < result["top5"] < 1
    assert result["samples_per_second"] > 0
    run = tmp_path / "runs" / "run"
    assert sorted(os.listdir(run)) == [
        "confusion.png",
        "data_sets.json",
        "eval.json",
        "eval.yaml",
        "per_class.json",
        "report.html",
    ]
    names = json.loads((demo / "test_videos" / "classes.json").read_text())
    right = np.zeros(10)
    for row, label in zip(probabilities.argmax(dim=1).tolist(), labels, strict=True):
        right[label] += row == label
    expected = {name: hits / 6 for name, hits in zip(names, right.tolist(), strict=True)}
    assert json.loads((run / "per_class.json").read_text()) == pytest.approx(expected)


def test_corrupt_samples_do_not_count_and_too_many_are_an_error(demo, tmp_path):
    net = save_classifier(tmp_path / "classifier.pt")
    path = str(corrupted_copy(demo / "test_images", tmp_path, 7))
    accuracy = {"paths": [path], "crop_pct": 1.0}
    result = evaluate_file(tmp_path, accuracy=accuracy)
    probabilities, labels = probabilities_of(net, str(demo / "test_images"))
    others = [number for number in range(60) if number != 7]
    labels = [labels[number] for number in others]
    assert result["top1"] == pytest.approx(fraction_in_top(probabilities[others], labels, 1))
    lines = (tmp_path / "runs" / "run" / "unreadable_eval.jsonl").read_text().splitlines()
    assert {json.loads(line)[0] for line in lines} == {f"{path}, sample 7"}
    corrupted_copy(demo / "test_images", tmp_path, 1, 7)
    with pytest.raises(ValueError, match=r"2 samples cannot be used, see .*eval\.jsonl"):
        evaluate_file(tmp_path, run_name="again", accuracy=accuracy)


def evaluate_rank(rank: int, folder: str, accuracy: dict) -> None:
    evaluate_file(Path(folder), run_name="two", accuracy=accuracy)


@pytest.mark.parametrize("batch_size", [64, 5])
def test_two_ranks_count_every_sample_of_an_odd_number_once(
    odd_images, tmp_path, on_ranks, batch_size
):
    """The second rank gets one sample twice; in batches of 5, that sample is its last batch."""
    net = save_classifier(tmp_path / "classifier.pt")
    accuracy = {"paths": [str(odd_images)], "crop_pct": 1.0, "batch_size": batch_size}
    evaluate_file(tmp_path, run_name="one", accuracy=accuracy)
    on_ranks(2, evaluate_rank, str(tmp_path), accuracy)
    probabilities, labels = probabilities_of(net, str(odd_images))
    assert len(labels) == 31
    for run_name in ("one", "two"):
        result = json.loads((tmp_path / "runs" / run_name / "eval.json").read_text())
        for k in (1, 5):
            assert result[f"top{k}"] == pytest.approx(fraction_in_top(probabilities, labels, k))
    per_class = [tmp_path / "runs" / name / "per_class.json" for name in ("one", "two")]
    assert per_class[0].read_text() == per_class[1].read_text()
