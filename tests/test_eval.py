"""Evaluation: accuracy, probes, pictures, exports, tables."""

import json
import math
import os
import shutil
from collections import Counter
from fractions import ProperFraction
from itertools import count
from pathlib import Path

import numpy as np
import probes
import pytest
import timm
import torch
from composer.utils import dist
from config import load_config
from conftest import ROOT, launch, run_stage, spoilt
from probes import (
    choose,
    draw_neighbours,
    fit_linear,
    infer,
    knn_accuracy,
    linear_accuracy,
    measure_probe,
)
from torchvision.io import ImageReadMode, decode_image
from views import MEAN, STD, EvalViews
from vit import Encoder

import data_prep
import eval as evaluation
import pretrain
from model import Classifier, ViCMAE, load_pretrained

YAML = str(ROOT / "yamls" / "eval_demo.yaml")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}
TINY = SIZES | DECODER | {"projector_hidden_dim": 32, "projector_out_dim": 16}


def test_linear_probe_tells_clusters_apart_and_guesses_where_nothing_is_to_be_learnt():
    features, labels = (
        torch.randn(400, 5, generator=torch.Generator().manual_seed(0)),
        torch.arange(400) % 2,
    )
    halves = (features[:200], labels[:200]), (features[200:], labels[200:])
    assert 0.4 < linear_accuracy(*halves) < 0.6
    features[:, 0] += 8.0 * labels
    assert linear_accuracy(*halves) == 1.0


def test_fit_linear_is_at_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    predict = fit_linear(x, y, 3, l2=0.1)
    standard = ((x - x.mean(dim=0)) / x.std(dim=0)).double().numpy()
    design = np.hstack([standard, np.ones((60, 1))])
    weights = np.linalg.lstsq(design, predict(x).double().numpy(), rcond=None)[
        0
    ]  # (4 + 1, 3), as the logits are linear

    def objective(w: np.ndarray) -> float:
        logits = design @ w
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -log_p[range(60), y.numpy()].mean() + 0.05 * (w[:4] ** 2).sum()

    lowest, rng = objective(weights), np.random.default_rng(0)
    for _ in range(50):
        assert objective(weights + 1e-2 * rng.standard_normal(weights.shape)) > lowest


def test_choice_is_of_each_class_as_many_as_its_limit_at_random_and_in_random_order():
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 200, 4]))
    chosen = choose(labels, torch.tensor([7, 20, 9]), seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [7, 20, 4] and len(set(chosen.tolist())) == 31
    assert chosen.tolist() == choose(labels, torch.tensor([7, 20, 9]), seed=0).tolist()
    assert labels[chosen].tolist() != labels[chosen].sort().values.tolist()
    often = torch.zeros(254)
    for seed in range(400):
        often[choose(labels, torch.tensor([7, 20, 9]), seed)] += 1 / 400
    expected = torch.tensor([7 / 50, 20 / 200, 1.0])[labels]
    assert (often - expected).abs().max() < 5 * (
        0.14 * 0.86 / 400
    ) ** 0.5  # five standard deviations


@pytest.mark.parametrize("fraction", [0.01, 0.07, 0.1, 0.29, 1.0])
def test_fractions_are_those_of_each_class_rounded_up_and_labels_per_class_as_many(
    fraction, monkeypatch, tmp_path
):
    counts = [100, 30, 10, 1]
    labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
    features, used = torch.randn(141, 2, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(data_prep, "common_classes", lambda paths: list("abcd"))
    monkeypatch.setattr(probes, "EvalViews", lambda *sizes, crop_pct, unreadable: None)
    monkeypatch.setattr(probes, "embed", lambda *arguments: (features, labels))
    monkeypatch.setattr(probes, "linear_accuracy", lambda bank, queries: used.append(bank) or 0.5)
    encoder = ViCMAE(**TINY).encoder
    options = {
        "bank": ["x"],
        "queries": ["x"],
        "labels_per_class": [7, None],
        "fractions": [fraction],
        "k": 3,
    }
    result = measure_probe(encoder, 0, tmp_path, tmp_path, **options, temperature=0.5)
    share = f"{ProperFraction(str(fraction)) * 100}%"
    assert result.keys() == {"knn", "linear_7", "linear_all", f"linear_{share}", f"knn_{share}"}
    rounded_up = [math.ceil(ProperFraction(str(fraction)) * count) for count in counts]
    found = [torch.bincount(y, minlength=4).tolist() for _, y in used]
    assert found == [[7, 7, 7, 1], counts, rounded_up]
    assert result[f"knn_{share}"] == knn_accuracy(used[2], (features, labels), 3, 0.5)
    assert result["knn"] == knn_accuracy((features, labels), (features, labels), 3, 0.5)
    assert all(
        torch.equal(features[(features == row).all(dim=1)], row[None])
        for x, _ in used
        for row in x[:5]
    )


def test_accuracy_over_views_equals_a_loop_over_samples(demo, tmp_path, monkeypatch):
    dist.initialize_dist("cpu")
    monkeypatch.setattr(
        "torchmetrics.metric.gather_all_tensors", None
    )  # on GPUs it would fail: all is on every rank's CPU
    torch.manual_seed(0)
    net = Classifier(
        10, img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, head_init_std=1.0
    ).eval()
    paths = [str(demo / "test_videos")]
    views = {"temporal_views": 2, "spatial_views": 3}
    result, confusion = evaluation.measure_accuracy(
        net, tmp_path, data=paths, **views, batch_size=7, part_size=25
    )
    views, hits = EvalViews(paths, 32, 1, 2, 3), {1: 0, 5: 0}
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    for number in range(len(views)):
        sample = views[number]
        inputs = (sample["inputs"] / 255 - mean) / std
        with torch.no_grad():
            probabilities = torch.stack(
                [net({"inputs": view[None, None]})[0, 0].softmax(dim=0) for view in inputs]
            ).mean(dim=0)
        order = probabilities.argsort(descending=True).tolist()
        for k in hits:
            hits[k] += int(sample["target"]) in order[:k]
    assert result.pop("samples_per_second") > 0
    assert result == {"top1": pytest.approx(hits[1] / 60), "top5": pytest.approx(hits[5] / 60)}
    assert (
        confusion.sum() == 60
        and confusion.diag().sum() == hits[1]
        and (confusion.sum(dim=1) == 6).all()
    )


def test_samples_that_cannot_be_decoded_do_not_count_and_too_many_are_an_error(demo, tmp_path):
    dist.initialize_dist("cpu")
    torch.manual_seed(0)
    net = Classifier(
        10, img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, head_init_std=1.0
    ).eval()
    clean, others = str(demo / "test_images"), torch.arange(60) != 7
    path = str(spoilt(demo / "test_images", tmp_path, 7))
    result, confusion = evaluation.measure_accuracy(
        net, tmp_path / "parts", data=[path], crop_pct=1.0
    )
    outputs, labels = infer(
        net, lambda x: net.eval_forward({"inputs": x}), EvalViews([clean], 32, crop_pct=1.0)
    )
    assert result["top1"] == pytest.approx(
        float((outputs.argmax(dim=1) == labels)[others].float().mean())
    )
    assert confusion.sum() == 59
    bank, how = (
        str(demo / "train_images"),
        {"crop_pct": 1.0, "labels_per_class": [], "neighbours": True},
    )
    found = measure_probe(
        net.encoder, 0, tmp_path, tmp_path / "probe", bank=[bank], queries=[path], **how
    )
    learn, test = (
        probes.embed(net.encoder, EvalViews([one], 32, crop_pct=1.0)) for one in (bank, clean)
    )
    assert found["knn"] == knn_accuracy(learn, (test[0][others], test[1][others]))
    lines = (tmp_path / "unreadable_eval.jsonl").read_text().splitlines()
    assert {json.loads(line)[0] for line in lines} == {f"{path}, sample 7"} and (
        tmp_path / "neighbours.png"
    ).exists()
    spoilt(demo / "test_images", tmp_path, 1, 7)
    with pytest.raises(
        ValueError,
        match=r"2 samples cannot be decoded, see .*unreadable_eval.jsonl; run data_prep.py verify",
    ):
        evaluation.measure_accuracy(net, tmp_path / "again", data=[path])


class Stopped(Exception):
    pass


def colours(path: str, parts, calls: int, batch_size: int) -> tuple:
    """Mean colours and labels of a data set by infer, in eight parts of 7 samples and one of 4; how many calls it made.

    It is stopped after `calls` of them, if that is not negative.
    """
    made = count()

    def forward(inputs):
        if next(made) == calls:
            raise Stopped
        return inputs.mean(dim=(1, 2, 4, 5))

    views = EvalViews([path], 8)
    found = infer(torch.nn.Linear(1, 1), forward, views, batch_size, parts=parts, part_size=7)
    return *found, next(made)


def expected_colours(path: str) -> torch.Tensor:
    views = EvalViews([path], 8)
    pixels = torch.stack([views[number]["inputs"][0, 0] for number in range(60)]) / 255
    return (pixels.mean(dim=(2, 3)) - torch.tensor(MEAN)) / torch.tensor(STD)


def test_interrupted_inference_goes_on_to_the_same_bits_and_computes_no_finished_part_again(
    demo, tmp_path
):
    path = str(demo / "test_images")
    outputs, labels, calls = colours(path, tmp_path / "whole", -1, 4)
    assert calls == 17  # two for each part, one for the last
    torch.testing.assert_close(outputs, expected_colours(path), atol=1e-5, rtol=1e-5)
    with pytest.raises(Stopped):
        colours(path, tmp_path / "stopped", 9, 4)
    assert len(os.listdir(tmp_path / "stopped")) == 4
    again = colours(path, tmp_path / "stopped", -1, 4)
    assert torch.equal(again[0], outputs) and torch.equal(again[1], labels) and again[2] == 17 - 8
    again = colours(path, tmp_path / "stopped", -1, 4)
    assert torch.equal(again[0], outputs) and torch.equal(again[1], labels) and again[2] == 0


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-5], lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:], lambda b: b""]
)
def test_a_damaged_part_is_computed_again_and_no_other(demo, tmp_path, damage):
    path = str(demo / "test_images")
    outputs, labels, _ = colours(path, tmp_path, -1, 4)
    damaged = next(tmp_path.glob("7-14-*"))
    damaged.write_bytes(damage(damaged.read_bytes()))
    again = colours(path, tmp_path, -1, 4)
    assert torch.equal(again[0], outputs) and torch.equal(again[1], labels) and again[2] == 2


def colours_on_a_rank(rank: int, path: str, out: str) -> None:
    parts = Path(out, f"parts-of-{rank}")
    with pytest.raises(Stopped):
        colours(path, parts, 9, 2)
    torch.save(colours(path, parts, -1, 2), f"{out}/{rank}")
    # gloo's thread needs the GIL to free the tensors of the last gathering: to destroy the group meanwhile would never end.
    torch.distributed.barrier()


def test_two_ranks_share_parts_that_one_of_them_sees_and_every_sample_is_there_once(
    demo, tmp_path, on_ranks
):
    path = str(demo / "test_videos")
    on_ranks(2, colours_on_a_rank, path, str(tmp_path))
    assert not (tmp_path / "parts-of-1").exists() and len(os.listdir(tmp_path / "parts-of-0")) == 9
    views = EvalViews([path], 8)
    for found in (
        torch.load(tmp_path / "0"),
        torch.load(tmp_path / "1"),
        colours(path, tmp_path / "parts-of-0", -1, 4),
    ):
        torch.testing.assert_close(found[0], expected_colours(path), atol=1e-5, rtol=1e-5)
        assert found[1].tolist() == [int(views[number]["target"]) for number in range(60)]
        assert found[2] in (17 - 8, 0)  # on one rank, what two have left is all there


@pytest.fixture
def counted(monkeypatch):
    """counted(calls) stops the encoder at so many forward passes; it gives a list of the samples of each that was made."""

    def start(calls: int) -> list[int]:
        made, forward = [], Encoder.forward

        def counting(self, x, ids_keep=None):
            if len(made) == calls:
                raise Stopped
            made.append(len(x))
            return original(self, x, ids_keep)

        original = getattr(forward, "original", forward)
        counting.original = original
        monkeypatch.setattr(Encoder, "forward", counting)
        return made

    return start


@pytest.fixture
def classified(demo, tmp_path, monkeypatch) -> dict:
    """The arguments of an evaluation of a classifier, in an empty folder: 60 samples, parts of 16, batches of 8."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Classifier(10, **SIZES, head_init_std=1.0).state_dict(), "a.pt")
    shutil.copytree(demo / "test_images", "data")
    accuracy = {"data": ["data"], "part_size": 16, "batch_size": 8}
    return {
        "run_name": "x",
        "checkpoint": "a.pt",
        "device": "cpu",
        "classifier": SIZES,
        "accuracy": accuracy,
    }


def test_interrupted_accuracy_goes_on_to_the_same_result_and_leaves_no_parts(
    classified, counted, tmp_path
):
    whole = evaluation.evaluate(**classified | {"run_name": "whole"})
    made = counted(5)
    with pytest.raises(Stopped):
        evaluation.evaluate(**classified)
    made = counted(-1)
    again = evaluation.evaluate(**classified)
    assert made == [8, 8, 8, 4]
    names = ("top1", "top5", "checkpoint", "seed")
    assert [again[name] for name in names] == [whole[name] for name in names] and again[
        "samples_per_second"
    ] > 0
    assert (tmp_path / "runs/x/per_class.json").read_bytes() == (
        tmp_path / "runs/whole/per_class.json"
    ).read_bytes()
    assert sorted(os.listdir("runs/x")) == ["confusion.png", "eval.json", "per_class.json"]


def other_checkpoint(config: dict) -> None:
    torch.manual_seed(1)
    torch.save(Classifier(10, **SIZES, head_init_std=1.0).state_dict(), "b.pt")
    config["checkpoint"] = "b.pt"


def remade_data(config: dict) -> None:
    index = json.loads(Path("data/index.json").read_text())
    Path("data/index.json").write_text(json.dumps(index | {"remade": True}))


def rewritten_checkpoint(config: dict) -> None:
    status = os.stat("a.pt")
    os.utime("a.pt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        (other_checkpoint, False),
        (rewritten_checkpoint, False),
        (lambda config: config["accuracy"].update(crop_pct=0.5), False),
        (remade_data, False),
        (lambda config: config["classifier"].update(pool="cls"), False),
        (lambda config: config["accuracy"].update(batch_size=5, num_workers=1), True),
    ],
    ids=[
        "other checkpoint",
        "rewritten checkpoint",
        "crop",
        "remade data",
        "pool",
        "batch size and workers",
    ],
)
def test_parts_are_taken_by_the_same_evaluation_alone(classified, counted, change, reused):
    classified["classifier"] = dict(SIZES)
    counted(5)
    with pytest.raises(Stopped):
        evaluation.evaluate(**classified)
    change(classified)
    made = counted(-1)
    evaluation.evaluate(**classified)
    assert sum(made) == (28 if reused else 60)


def test_an_interrupted_probe_goes_on_and_its_bank_and_queries_are_not_mistaken(
    demo, counted, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    probe = {
        "bank": [str(demo / "train_images")],
        "queries": [str(demo / "test_images")],
        "labels_per_class": [3],
    }
    config = {"checkpoint": None, "device": "cpu", "model": TINY, "probe": probe}
    whole = evaluation.evaluate(run_name="whole", **config)
    counted(1)
    with pytest.raises(Stopped):
        evaluation.evaluate(run_name="x", **config)
    made = counted(-1)
    again = evaluation.evaluate(run_name="x", **config)
    assert made == [60] and again == whole | {"run_name": "x"}
    with pytest.raises(Stopped):
        counted(1)
        evaluation.evaluate(run_name="x", **config)
    made = counted(-1)
    evaluation.evaluate(run_name="x", seed=1, **config)  # other random weights
    assert made == [60, 60]


def test_features_are_written_with_labels_and_class_names_and_are_the_mean_of_the_patch_tokens(
    demo, tmp_path
):
    torch.manual_seed(0)
    encoder, file = ViCMAE(**TINY).encoder.eval(), tmp_path / "features.npz"
    probe = {
        "bank": [str(demo / "train_images")],
        "queries": [str(demo / "test_videos"), str(demo / "test_images")],
    }
    measure_probe(encoder, 0, tmp_path, tmp_path / "parts", **probe, features=str(file))
    assert sorted(os.listdir(tmp_path)) == ["features.npz", "parts"]
    with np.load(file, allow_pickle=False) as saved:
        arrays = dict(saved)
    assert arrays.pop("classes").tolist() == json.loads(
        (demo / "train_images" / "classes.json").read_text()
    )
    assert {name: value.shape for name, value in arrays.items()} == {
        **{"bank_features": (60, 48), "bank_labels": (60,)},
        **{"queries_features": (120, 48), "queries_labels": (120,)},
    }
    for name, paths in probe.items():
        views = EvalViews(paths, 32)
        for number in (0, 17, len(views) - 1):
            pixels = views[number]["inputs"][0] / 255
            image = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
            with torch.no_grad():
                expected = encoder(image)[0, 1:].mean(dim=0).numpy()
            np.testing.assert_allclose(arrays[f"{name}_features"][number], expected, atol=1e-5)
            assert arrays[f"{name}_labels"][number] == int(views[number]["target"])


def test_half_precision_has_the_features_of_full_precision_to_its_eight_bits(
    demo, pretrained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    probe, found = (
        {"bank": [str(demo / "train_images")], "queries": [str(demo / "test_images")]},
        {},
    )
    sizes = load_config([str(ROOT / "yamls" / "demo.yaml")], pretrain.pretrain)["model"]
    for precision in ("fp32", "amp_bf16"):
        asked = {"model": sizes, "probe": probe | {"features": f"{precision}.npz"}}
        evaluation.evaluate(
            run_name=precision, checkpoint=str(pretrained), precision=precision, **asked
        )
        found[precision] = np.load(f"{precision}.npz", allow_pickle=False)["bank_features"]
    error = np.abs(found["amp_bf16"] - found["fp32"]).max() / np.abs(found["fp32"]).max()
    assert 1e-5 < error < 2e-2


def test_neighbours_are_the_nearest_and_their_frames_tell_right_from_wrong(demo, tmp_path):
    generator = torch.Generator().manual_seed(0)
    views = [EvalViews([str(demo / name)], 32) for name in ("train_images", "test_images")]
    labels = [torch.tensor([int(data[number]["target"]) for number in range(60)]) for data in views]
    features = [
        torch.randn(60, 4, generator=generator) + 2 * torch.eye(10)[y][:, :4] for y in labels
    ]
    draw_neighbours(*zip(features, labels, strict=True), views, tmp_path / "n.png", count=4, k=5)
    picture = decode_image(str(tmp_path / "n.png"), ImageReadMode.RGB)
    side, frames = 3 * 32 + 2 * 4, Counter()
    for row, query in enumerate((0, 19, 39, 59)):
        cosine = [
            float(torch.cosine_similarity(features[1][query], one, dim=0)) for one in features[0]
        ]
        cells = [
            (1, query),
            *((0, near) for near in sorted(range(60), key=lambda one: -cosine[one])[:5]),
        ]
        for column, (which, number) in enumerate(cells):
            top, left = 2 + row * (side + 2), 2 + column * (side + 2)
            cell = picture[:, top : top + side, left : left + side]
            shown = (
                views[which][number]["inputs"][0, 0]
                .repeat_interleave(3, dim=1)
                .repeat_interleave(3, dim=2)
            )
            assert (cell[:, 4:-4, 4:-4].int() - shown.int()).abs().max() <= 1
            right = int(labels[which][number] == labels[1][query])
            frame = [255, 255, 255] if column == 0 else [255 * (1 - right), 255 * right, 0]
            assert all(
                cell[:, y, x].tolist() == frame
                for y, x in ((0, 0), (3, 50), (-1, -4), (50, 3), (60, -1))
            )
            frames[tuple(frame)] += 1
    assert frames[255, 255, 255] == 4 and frames[255, 0, 0] > 2 and frames[0, 255, 0] > 2


def test_last_attention_is_what_the_last_block_computes():
    torch.manual_seed(0)
    encoder, seen, d = Encoder(32, 8, 48, 2, 3).eval(), {}, 16
    attn = encoder.blocks[-1].attn
    attn.qkv.weight.data *= 4  # far from uniform
    attn.qkv.bias.data.normal_()
    images = torch.randn(2, 3, 32, 32)
    found = evaluation.last_attention(encoder, images)
    assert found.shape == (2, 3, 17, 17) and not attn._forward_pre_hooks
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3, 17))
    assert found.max() > 0.5
    with (
        torch.no_grad(),
        attn.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], out=output)),
    ):
        encoder(images)
        q, k, v = (F_linear.split(d, dim=-1) for F_linear in attn.qkv(seen["x"]).split(48, dim=-1))
        by_hand = [(q[head] @ k[head].transpose(1, 2) / math.sqrt(d)).exp() for head in range(3)]
        by_hand = torch.stack(
            [scores / scores.sum(dim=-1, keepdim=True) for scores in by_hand], dim=1
        )
        torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-5)
        mixed = torch.cat([found[:, head] @ v[head] for head in range(3)], dim=-1)
        torch.testing.assert_close(attn.proj(mixed), seen["out"], atol=1e-5, rtol=1e-5)


def test_attention_is_drawn_below_its_image_at_the_patches_that_patches_look_at(
    demo, tmp_path, monkeypatch
):
    def staged(encoder, images):
        attention = torch.full((len(images), 3, 17, 17), 1e-3)
        attention[:, :, 1:, 0] = 0.9  # CLS is looked at by all, but no patch
        attention[:, :, 0, 16] = 0.9  # and looks at the last itself
        for number in range(len(images)):
            attention[number, :, 1:, 1 + 2 * number] = 0.01
        return attention

    monkeypatch.setattr(evaluation, "last_attention", staged)
    path = str(demo / "test_images")
    evaluation.draw_attention(Encoder(32, 8, 48, 2, 3), [path], tmp_path / "a.png", count=4)
    picture, views = (
        decode_image(str(tmp_path / "a.png"), ImageReadMode.RGB),
        EvalViews([path], 32, crop_pct=1.0),
    )
    assert picture.shape == (3, 200, 4 * 98 + 2)
    for number, sample in enumerate((0, 19, 39, 59)):
        left = 2 + 98 * number
        shown = (
            views[sample]["inputs"][0, 0].repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
        )
        assert (picture[:, 2:98, left : left + 96].int() - shown.int()).abs().max() <= 1
        below = picture[0, 102:198, left : left + 96]
        assert below.min() == 0 and below.max() == 255
        brightest = (below == 255).nonzero().float().mean(dim=0) // 24
        assert brightest.tolist() == list(divmod(2 * number, 4))


def test_export_loads_into_timm_with_equal_features(tmp_path):
    torch.manual_seed(0)
    net = ViCMAE(**TINY).eval()
    evaluation.export_timm(net.encoder, str(tmp_path / "encoder.safetensors"))
    theirs = timm.models.VisionTransformer(
        32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=0
    ).eval()
    timm.models.load_checkpoint(theirs, str(tmp_path / "encoder.safetensors"))
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        theirs.forward_features(images), net.encoder(images), atol=1e-5, rtol=1e-5
    )
    back = ViCMAE(**TINY).eval()
    load_pretrained(back, str(tmp_path / "encoder.safetensors"))
    assert torch.equal(back.encoder(images), net.encoder(images))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("pool", "theirs"), [("cls", {"global_pool": "token"}), ("mean", {"fc_norm": False})]
)
def test_exported_classifier_has_the_same_logits_in_timm_and_back_here(
    classified, pool, theirs, freeze
):
    torch.manual_seed(0)
    net = Classifier(7, **SIZES, pool=pool, freeze=freeze, head_init_std=0.2).eval()
    net.head.bias.data.normal_()
    if freeze:
        net.neck.running_mean.normal_()
        net.neck.running_var.uniform_(0.1, 3.0)
    torch.save(net.state_dict(), "seven.pt")
    sizes = SIZES | {"pool": pool, "freeze": freeze}
    evaluation.evaluate(
        run_name="x",
        checkpoint="seven.pt",
        device="cpu",
        classifier=sizes,
        export="seven.safetensors",
    )
    images = torch.randn(5, 3, 32, 32)
    logits = net({"inputs": images[:, None, None]})[:, 0]
    arguments = {"global_pool": "avg", "num_classes": 7} | theirs
    other = timm.models.VisionTransformer(
        32, 8, embed_dim=48, depth=2, num_heads=3, **arguments
    ).eval()
    timm.models.load_checkpoint(other, "seven.safetensors")
    torch.testing.assert_close(other(images), logits, atol=1e-5, rtol=1e-5)
    back = Classifier(7, **SIZES, pool=pool).eval()
    assert load_pretrained(back, "seven.safetensors")["missing"] == []
    again = back({"inputs": images[:, None, None]})[:, 0]
    assert torch.allclose(again, logits, atol=1e-5) if freeze else torch.equal(again, logits)


def test_command_line_probes_draws_and_exports(demo, tmp_path, pretrained):
    result = launch(
        tmp_path,
        "eval.py",
        YAML,
        f"checkpoint={pretrained}",
        f"probe.bank=[{demo}/train_images]",
        f"probe.queries=[{demo}/test_images, {demo}/test_videos]",
        "probe.labels_per_class=[3, null]",
        "probe.fractions=[0.25]",
        "probe.features=features.npz",
        f"reconstructions=[{demo}/test_images]",
        f"attention=[{demo}/test_images]",
        "export=encoder.safetensors",
    )
    assert result.returncode == 0, result.stderr
    line = json.loads(next(text for text in result.stdout.splitlines() if text.startswith("{")))
    assert all(
        0 <= line[key] <= 1 for key in ("knn", "linear_3", "linear_all", "linear_25%", "knn_25%")
    )
    run = tmp_path / "runs" / "eval_demo"
    assert json.loads((run / "eval.json").read_text()) == line
    assert sorted(os.listdir(run)) == [
        "attention.png",
        "eval.json",
        "neighbours.png",
        "reconstructions.png",
    ]
    assert sorted(os.listdir(tmp_path)) == ["encoder.safetensors", "features.npz", "runs"]


def test_mistakes_are_named_in_one_line(demo, tmp_path, pretrained):
    sizes = "{img_size: 32, patch_size: 8, embed_dim: 64, depth: 3, num_heads: 4}"
    probe = f"probe={{bank: [{demo}/train_images], queries: [{demo}/test_images]}}"
    for arguments, culprit in (
        (["run_name=x", "checkpoint=null", probe], "the block model is missing"),
        (
            ["run_name=x", "checkpoint=nowhere.pt", f"model={sizes}", probe],
            "nowhere.pt does not exist",
        ),
        (
            [
                "run_name=x",
                f"checkpoint={pretrained}",
                f"classifier={sizes}",
                f"accuracy={{data: [{demo}/test_images]}}",
            ],
            "head.",
        ),
        (
            ["run_name=x", "checkpoint=null", "model={mask: none}", "reconstructions=[x]"],
            "model.mask is none",
        ),
        (["run_name=x"], "checkpoint is missing"),
        (["run_name=x", "checkpoint=null"], "nothing is asked for"),
        (
            ["run_name=x", "checkpoint=null", f"model={sizes}", "export=no/such/file"],
            "its folder does not exist",
        ),
        (
            ["run_name=x", "checkpoint=null", f"model={sizes}", "probe={bank: [], queries: []}"],
            "probe.bank is []",
        ),
        (
            [YAML, "probe.features=no/such/file.npz"],
            "probe.features no/such/file.npz: its folder does not exist",
        ),
        ([YAML, "probe.fractions=[0.0]"], "greater than 0"),
        ([YAML, "run_name=../up"], "run_name is '../up'"),
        (
            [
                YAML,
                "comparison={to: x.md, seconds: 1, methods: {}, stills: {bank: [a], queries: [a]}}",
            ],
            "methods is {}",
        ),
        ([YAML, "table={to: x.md, rows: []}"], "table.rows is []"),
        ([YAML, "probe.fractions=[1.5]"], "less than or equal to 1"),
        ([YAML, "probe.temperature=0"], "greater than 0"),
        (
            ["run_name=x", "checkpoint=null", f"model={sizes}", "attention=[nowhere]"],
            "nowhere is not a complete data set",
        ),
        (
            [
                "run_name=x",
                f"checkpoint={pretrained}",
                f"classifier={sizes}",
                "export=x.safetensors",
            ],
            "has no head",
        ),
        (
            ["run_name=x", "checkpoint=null", f"classifier={sizes}", "export=x.safetensors"],
            "has no head",
        ),
        ([YAML, "probe.lables_per_class=[1]"], "did you mean labels_per_class?"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_stage(evaluation, arguments, tmp_path)
        assert culprit in str(exit.value) and "\n" not in str(exit.value)


def test_evaluation_yaml_constructs():
    config = load_config([YAML], evaluation.evaluate)
    with torch.device("meta"):
        ViCMAE(**config["model"])


def test_table_has_papers_and_ours_and_says_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file, values in (
        ("a", "eval.json", {"top1": 0.8512}),
        ("b", "result.json", {"metrics/eval/top1": 0.5}),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).write_text(json.dumps(values | {"knn": 0.25}))
    rows = [
        {
            "name": "first",
            "runs": {"IN1K": "a", "K400": "nowhere"},
            "paper": {"IN1K": 86.0, "K400": 80.0},
        },
        {"name": "second", "runs": {"K400": "b", "k-NN": "a:knn"}},
    ]
    evaluation.evaluate(run_name="table", checkpoint=None, table={"to": "results.md", "rows": rows})
    assert (tmp_path / "results.md").read_text().splitlines() == [
        "|  | IN1K: paper / ours | K400: paper / ours | k-NN: paper / ours |",
        "| --- | --- | --- | --- |",
        "| first | 86.0 / 85.1 (-0.9) | 80.0 / not run |  |",
        "| second |  | - / 50.0 | - / 25.0 |",
    ]
