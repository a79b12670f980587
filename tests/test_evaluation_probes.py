"""Features, k-NN, linear accuracy and the choice of labels."""

import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import corrupted_copy, read_result, run_stage, small
from torch import Tensor

import pretrain
from evaluation import probes
from evaluation.probes import (
    choose,
    embed,
    fit_linear,
    knn_accuracy,
    label_limits,
    linear_accuracy,
    match_labels,
    measure_probe,
)
from model import Encoder
from shards.augment import MEAN, STD
from shards.format import Clips, decode_frame
from shards.views import EvalViews
from training.config import load_config

SIZES = (32, 8, 48, 2, 3)  # img_size, patch_size, embed_dim, depth, num_heads


def new_encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(*SIZES).eval()


def knn_by_ranking(
    bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], k: int, temperature: float
) -> float:
    """Return k-NN accuracy by NumPy in float64: every query ranks the whole bank."""
    features, labels = bank[0].double().numpy(), bank[1].tolist()
    right = 0
    for query, truth in zip(queries[0].double().numpy(), queries[1].tolist(), strict=True):
        lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
        cosine = (features * query).sum(axis=1) / lengths
        votes = dict.fromkeys(sorted(set(labels)), 0.0)
        for number in sorted(range(len(labels)), key=lambda number: -cosine[number])[:k]:
            votes[labels[number]] += math.exp(cosine[number] / temperature)
        right += max(votes, key=votes.get) == truth
    return right / len(queries[1])


def draw_labelled(count: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator)
    return features, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (100, 0.07)])
def test_knn_accuracy_equals_a_ranking_of_the_bank_by_every_query(k, temperature):
    bank, queries = draw_labelled(40, 6, 4, seed=0), draw_labelled(1100, 6, 4, seed=1)
    expected = knn_by_ranking(bank, queries, k, temperature)
    assert 0.1 < expected < 0.5
    assert knn_accuracy(bank, queries, k, temperature) == expected


def test_knn_accuracy_does_not_depend_on_the_length_of_features_or_on_the_order_of_the_bank():
    bank, queries = draw_labelled(40, 6, 4, seed=0), draw_labelled(50, 6, 4, seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    other = (bank[0] * lengths)[order], bank[1][order]
    assert knn_accuracy(other, queries, 7) == knn_accuracy(bank, queries, 7)


def features_on_a_rank(rank: int, path: str, out: str) -> None:
    features, labels = embed(new_encoder(), EvalViews([path], 32), batch_size=7)
    torch.save((features, labels), f"{out}/{rank}")


def test_two_ranks_embed_every_sample_once_and_in_order(demo, tmp_path, on_ranks):
    path = str(demo / "test_videos")
    on_ranks(2, features_on_a_rank, path, str(tmp_path))
    expected, labels = embed(new_encoder(), EvalViews([path], 32))
    clips = Clips(path)
    assert labels.tolist() == [clips[number]["label"] for number in range(60)]
    features, found = torch.load(tmp_path / "0", weights_only=True)
    assert torch.equal(found, labels)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert [len(part) for part in torch.load(tmp_path / "1", weights_only=True)] == [0, 0]


class OddViews(EvalViews):
    """All samples but the last."""

    def __len__(self) -> int:
        return super().__len__() - 1


def odd_features_on_a_rank(rank: int, path: str, out: str) -> None:
    torch.save(embed(new_encoder(), OddViews([path], 32), batch_size=7), f"{out}/{rank}")


def test_two_ranks_embed_an_odd_number_of_samples_without_a_double(demo, tmp_path, on_ranks):
    path = str(demo / "test_images")
    on_ranks(2, odd_features_on_a_rank, path, str(tmp_path))
    expected, labels = embed(new_encoder(), EvalViews([path], 32))
    features, found = torch.load(tmp_path / "0", weights_only=True)
    assert torch.equal(found, labels[:59])
    torch.testing.assert_close(features, expected[:59], atol=1e-5, rtol=1e-5)


def test_feature_is_the_mean_of_the_patch_tokens_and_the_file_has_labels_and_classes(
    demo, tmp_path
):
    torch.manual_seed(0)
    encoder = Encoder(40, *SIZES[1:]).eval()  # the stills have 40 x 40 pixels: nothing is resized
    file = tmp_path / "features.npz"
    probe = {
        "bank": [str(demo / "train_images")],
        "queries": [str(demo / "test_videos"), str(demo / "test_images")],
    }
    measure_probe(encoder, 0, tmp_path, **probe, crop_pct=1.0, features=str(file))
    assert os.listdir(tmp_path) == ["features.npz"]
    with np.load(file, allow_pickle=False) as saved:
        arrays = dict(saved)
    classes = json.loads((demo / "train_images" / "classes.json").read_text())
    assert arrays.pop("classes").tolist() == classes
    shapes = {name: value.shape for name, value in arrays.items()}
    assert shapes == {
        "bank_features": (60, 48),
        "bank_labels": (60,),
        "queries_features": (120, 48),
        "queries_labels": (120,),
    }
    stills = Clips(probe["bank"][0])
    for number in (0, 17, 59):
        pixels = torch.from_numpy(decode_frame(stills[number], 0).copy()).permute(2, 0, 1) / 255
        assert pixels.shape == (3, 40, 40)
        image = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            expected = encoder(image[None])[0, 1:].mean(dim=0).numpy()
        np.testing.assert_allclose(arrays["bank_features"][number], expected, atol=1e-5)
        assert arrays["bank_labels"][number] == stills[number]["label"]


def test_corrupt_samples_do_not_count_in_a_probe_and_neighbours_are_drawn_without_them(
    demo, tmp_path
):
    clean, bank = str(demo / "test_images"), str(demo / "train_images")
    corrupt = str(corrupted_copy(demo / "test_images", tmp_path, 7))
    settings = {"crop_pct": 1.0, "labels_per_class": [], "neighbours": True, "k": 3}
    encoder = new_encoder()
    found = measure_probe(encoder, 0, tmp_path / "run", bank=[bank], queries=[corrupt], **settings)
    learn = embed(encoder, EvalViews([bank], 32, crop_pct=1.0))
    features, labels = embed(encoder, EvalViews([clean], 32, crop_pct=1.0))
    others = torch.arange(60) != 7
    expected = knn_by_ranking(learn, (features[others], labels[others]), 3, 0.07)
    assert found == {"knn": expected}
    lines = (tmp_path / "run" / "unreadable_eval.jsonl").read_text().splitlines()
    assert {json.loads(line)[0] for line in lines} == {f"{corrupt}, sample 7"}
    assert (tmp_path / "run" / "neighbours.png").stat().st_size > 0


def test_linear_accuracy_is_perfect_on_separate_clusters_and_random_on_noise():
    features = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(400) % 2
    bank, queries = (features[:200], labels[:200]), (features[200:], labels[200:])
    assert 0.4 < linear_accuracy(bank, queries) < 0.6
    features[:, 0] += 8.0 * labels
    assert linear_accuracy(bank, queries) == 1.0


def test_linear_head_is_at_the_minimum_of_its_objective():
    x, y = draw_labelled(60, 4, 3, seed=0)
    predict = fit_linear(x, y, 3, l2=0.1)
    standard = ((x - x.mean(dim=0)) / x.std(dim=0)).double().numpy()
    design = np.hstack([standard, np.ones((60, 1))])
    # The logits are linear in the design, so least squares finds the weights (4 + 1, 3).
    weights = np.linalg.lstsq(design, predict(x).double().numpy(), rcond=None)[0]

    def objective(w: np.ndarray) -> float:
        logits = design @ w
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -log_p[range(60), y.numpy()].mean() + 0.05 * (w[:4] ** 2).sum()

    lowest, rng = objective(weights), np.random.default_rng(0)
    for _ in range(50):
        assert objective(weights + 1e-2 * rng.standard_normal(weights.shape)) > lowest


def test_accuracies_do_not_depend_on_the_size_of_the_chunks(monkeypatch):
    bank, queries = draw_labelled(60, 4, 3, seed=0), draw_labelled(50, 4, 3, seed=1)
    knn, logits = knn_accuracy(bank, queries, 5), fit_linear(*bank, 3, l2=0.1)(queries[0])
    monkeypatch.setattr(probes, "SIMILARITIES", 7 * 60)
    monkeypatch.setattr(probes, "ROWS", 13)
    assert knn_accuracy(bank, queries, 5) == knn
    torch.testing.assert_close(fit_linear(*bank, 3, l2=0.1)(queries[0]), logits, atol=1e-3, rtol=0)


def probe_on_a_rank(rank: int, bank: str, queries: str, out: str) -> None:
    calls, linear_accuracy = [], probes.linear_accuracy
    probes.linear_accuracy = lambda *args: calls.append(args) or linear_accuracy(*args)
    result = measure_probe(new_encoder(), 0, Path(out), bank=[bank], queries=[queries])
    Path(out, str(rank)).write_text(json.dumps([result, len(calls)]))


def test_two_ranks_fit_a_linear_head_once_and_return_the_accuracy_of_one_rank(
    demo, tmp_path, on_ranks
):
    paths = str(demo / "train_images"), str(demo / "test_images")
    on_ranks(2, probe_on_a_rank, *paths, str(tmp_path))
    (first, calls), (second, none) = (
        json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)
    )
    assert (calls, none) == (1, 0) and first == second
    expected = measure_probe(new_encoder(), 0, tmp_path, bank=[paths[0]], queries=[paths[1]])
    assert first == pytest.approx(expected, abs=0.04)  # features differ by rounding


def test_labels_are_chosen_at_random_up_to_the_limit_of_their_class_and_in_random_order():
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 200, 4]))
    limits = torch.tensor([7, 20, 9])
    chosen = choose(labels, limits, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [7, 20, 4]
    assert len(set(chosen.tolist())) == 31
    assert chosen.tolist() == choose(labels, limits, seed=0).tolist()
    assert labels[chosen].tolist() != labels[chosen].sort().values.tolist()
    frequency = torch.zeros(254)
    for seed in range(400):
        frequency[choose(labels, limits, seed)] += 1 / 400
    expected = torch.tensor([7 / 50, 20 / 200, 1.0])[labels]
    deviation = (0.14 * 0.86 / 400) ** 0.5
    assert (frequency - expected).abs().max() < 5 * deviation


@pytest.mark.parametrize("fraction", ["0.01", "0.07", "0.1", "0.29", "1.0"])
def test_limits_are_numbers_of_labels_or_fractions_of_each_class_rounded_up(fraction):
    counts = [100, 30, 10, 1]
    labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
    limits = label_limits(labels, [7, None], [float(fraction)])
    percent = f"{Fraction(fraction) * 100}%"
    assert list(limits) == ["7", "all", percent]
    assert limits["7"].tolist() == [7] * 4
    assert (limits["all"] >= torch.tensor(counts)).all()
    assert limits[percent].tolist() == [math.ceil(Fraction(fraction) * count) for count in counts]


def test_probe_reports_a_linear_head_for_each_number_of_labels_and_knn_for_each_fraction(
    demo, tmp_path, monkeypatch
):
    used = []

    def record(bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> float:
        used.append(torch.bincount(bank[1], minlength=10).tolist())
        return len(used) / 10

    monkeypatch.setattr(probes, "linear_accuracy", record)
    paths = {"bank": [str(demo / "train_images")], "queries": [str(demo / "test_images")]}
    settings = {"labels_per_class": [2, None], "fractions": [0.5]}
    result = measure_probe(new_encoder(), 0, tmp_path, **paths, **settings)
    assert used == [[2] * 10, [6] * 10, [3] * 10]
    linear = {key: value for key, value in result.items() if key.startswith("linear")}
    assert linear == {"linear_2": 0.1, "linear_all": 0.2, "linear_50%": 0.3}
    assert result.keys() - linear.keys() == {"knn", "knn_50%"}


def test_bank_and_queries_with_the_same_samples_are_refused(demo, tmp_path):
    path = str(demo / "test_images")
    copy = str(corrupted_copy(demo / "test_images", tmp_path))
    match = f"queries={copy}: 1 of its shards are in the bank too"
    with pytest.raises(ValueError, match=match):
        measure_probe(new_encoder(), 0, tmp_path, bank=[path], queries=[copy])


def test_labels_of_bank_and_queries_are_matched_by_name(demo, tmp_path):
    bank, queries = str(demo / "train_images"), corrupted_copy(demo / "test_images", tmp_path)
    names = json.loads((queries / "classes.json").read_text())
    (queries / "classes.json").write_text(json.dumps([*names[:1:-1], names[0], names[1]]))
    _, (straight,), (turned,) = match_labels("probe", [bank], [str(queries)])
    assert straight == list(range(10)) and turned == [9, 8, 7, 6, 5, 4, 3, 2, 0, 1]
    data, stored = EvalViews([str(queries)], 16, labels=[turned]), Clips(str(queries))
    assert all(int(data[n]["target"]) == turned[stored[n]["label"]] for n in range(60))


def test_bank_and_queries_with_other_classes_are_refused(demo, tmp_path):
    for name in ("train_images", "test_images"):
        corrupted_copy(demo / name, tmp_path)
    bank, queries = str(tmp_path / "train_images"), str(tmp_path / "test_images")
    (tmp_path / "test_images" / "classes.json").write_text(json.dumps(list("abcdefghij")))
    with pytest.raises(
        ValueError,
        match=r"test_images: has classes .* lacks: 'a', 'b', 'c' and 7",
    ):
        measure_probe(new_encoder(), 0, tmp_path, bank=[bank], queries=[queries])
    (tmp_path / "train_images" / "classes.json").write_text("[]")
    with pytest.raises(ValueError, match="train_images has no labels"):
        measure_probe(new_encoder(), 0, tmp_path, bank=[bank], queries=[queries])


def test_knn_callback_measures_before_the_first_step_and_after_the_last(demo, tmp_path):
    """The number before training is that of the encoder with the run's initial weights."""
    run_stage(pretrain, [*small(demo), "data.num_workers=0", "trainer.max_duration=1ba"], tmp_path)
    result = read_result(tmp_path, "demo")
    config = pretrain.PretrainConfig(**load_config(small(demo), pretrain.PretrainConfig))
    torch.manual_seed(config.seed)
    encoder = config.new_model().encoder
    bank = embed(encoder, EvalViews([f"{demo}/train_images"], 32, crop_pct=1.0))
    queries = embed(encoder, EvalViews([f"{demo}/test_images"], 32, crop_pct=1.0))
    assert result["knn/random"] == knn_by_ranking(bank, queries, 20, 0.07)
    assert 0 <= result["knn/trained"] <= 1
    assert not Path(tmp_path, "runs", "demo", "unreadable_eval.jsonl").exists()
