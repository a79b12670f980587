import json

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, launch, run_stage

import eval as evaluation
from model import Classifier, ViCMAE, load_pretrained
from pretrain import EvalViews, load_config

YAML = str(ROOT / "yamls" / "eval_demo.yaml")


def test_linear_probe_tells_clusters_apart_and_guesses_where_nothing_is_to_be_learnt():
    features, labels = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 2
    halves = (features[:200], labels[:200]), (features[200:], labels[200:])
    assert 0.4 < evaluation.linear_accuracy(*halves, None, 0) < 0.6
    features[:, 0] += 8.0 * labels
    assert evaluation.linear_accuracy(*halves, None, 0) == 1.0


def test_fit_linear_is_at_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    predict = evaluation.fit_linear(x, y, 3, l2=0.1)
    standard = ((x - x.mean(dim=0)) / x.std(dim=0)).double().numpy()
    design = np.hstack([standard, np.ones((60, 1))])
    weights = np.linalg.lstsq(design, predict(x).double().numpy(), rcond=None)[0]  # (4 + 1, 3), as the logits are linear

    def objective(w: np.ndarray) -> float:
        logits = design @ w
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -log_p[range(60), y.numpy()].mean() + 0.05 * (w[:4] ** 2).sum()

    lowest, rng = objective(weights), np.random.default_rng(0)
    for _ in range(50):
        assert objective(weights + 1e-2 * rng.standard_normal(weights.shape)) > lowest


def test_labels_per_class_uses_that_many_of_each(monkeypatch):
    used = []

    def spy(features, labels, num_classes, l2):
        used.append(torch.bincount(labels, minlength=num_classes).tolist())
        return lambda x: torch.zeros(len(x), num_classes)

    monkeypatch.setattr(evaluation, "fit_linear", spy)
    bank = torch.randn(90, 2), torch.arange(90) % 3
    evaluation.linear_accuracy(bank, bank, 7, seed=0)
    assert used[-1] == [7, 7, 7]
    evaluation.linear_accuracy(bank, bank, None, seed=0)
    assert used[-1] == [30, 30, 30]


def test_accuracy_over_views_equals_a_loop_over_samples(demo):
    torch.manual_seed(0)
    net = Classifier(10, img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, head_init_std=1.0).eval()
    paths = [str(demo / "test_videos")]
    result, confusion = evaluation.measure_accuracy(net, data=paths, temporal_views=2, spatial_views=3, batch_size=7)
    views, hits = EvalViews(paths, 32, 1, 2, 3), {1: 0, 5: 0}
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for number in range(len(views)):
        sample = views[number]
        inputs = (sample["inputs"] / 255 - mean) / std
        with torch.no_grad():
            probabilities = torch.stack([net({"inputs": view[None, None]})[0, 0].softmax(dim=0) for view in inputs]).mean(
                dim=0
            )
        order = probabilities.argsort(descending=True).tolist()
        for k in hits:
            hits[k] += int(sample["target"]) in order[:k]
    assert result.pop("samples_per_second") > 0
    assert result == {"top1": pytest.approx(hits[1] / 60), "top5": pytest.approx(hits[5] / 60)}
    assert confusion.sum() == 60 and confusion.diag().sum() == hits[1] and (confusion.sum(dim=1) == 6).all()


def test_export_loads_into_timm_with_equal_features(tmp_path):
    torch.manual_seed(0)
    net = ViCMAE(32, 8, 48, 2, 3, 24, 1, 3, 32, 16).eval()
    evaluation.export_timm(net.encoder, str(tmp_path / "encoder.safetensors"))
    theirs = timm.models.VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=0).eval()
    timm.models.load_checkpoint(theirs, str(tmp_path / "encoder.safetensors"))
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(theirs.forward_features(images), net.encoder(images), atol=1e-5, rtol=1e-5)
    back = ViCMAE(32, 8, 48, 2, 3, 24, 1, 3, 32, 16).eval()
    load_pretrained(back, str(tmp_path / "encoder.safetensors"))
    assert torch.equal(back.encoder(images), net.encoder(images))


def test_command_line_probes_draws_and_exports(demo, tmp_path, pretrained):
    result = launch(
        tmp_path,
        "eval.py",
        YAML,
        f"checkpoint={pretrained}",
        f"probe.bank=[{demo}/train_images]",
        f"probe.queries=[{demo}/test_images, {demo}/test_videos]",
        "probe.labels_per_class=[3, null]",
        f"reconstructions=[{demo}/test_images]",
        "export=encoder.safetensors",
    )
    assert result.returncode == 0, result.stderr
    line = json.loads(next(text for text in result.stdout.splitlines() if text.startswith("{")))
    assert all(0 <= line[key] <= 1 for key in ("knn", "linear_3", "linear_all"))
    assert json.loads((tmp_path / "runs" / "eval_demo" / "eval.json").read_text()) == line
    assert (tmp_path / "runs" / "eval_demo" / "reconstructions.png").stat().st_size > 0
    assert (tmp_path / "encoder.safetensors").stat().st_size > 0


def test_mistakes_are_named_in_one_line(demo, tmp_path, pretrained):
    sizes = "{img_size: 32, patch_size: 8, embed_dim: 64, depth: 3, num_heads: 4}"
    probe = f"probe={{bank: [{demo}/train_images], queries: [{demo}/test_images]}}"
    for arguments, culprit in (
        (["run_name=x", "checkpoint=null", probe], "the block model is missing"),
        (["run_name=x", "checkpoint=nowhere.pt", f"model={sizes}", probe], "nowhere.pt does not exist"),
        (
            [
                "run_name=x",
                f"checkpoint={pretrained}",
                f"classifier={sizes}",
                f"accuracy={{data: [{demo}/test_images]}}",
            ],
            "head.",
        ),
        (["run_name=x"], "checkpoint is missing"),
        (["run_name=x", "checkpoint=null"], "nothing is asked for"),
        (["run_name=x", "checkpoint=null", f"model={sizes}", "export=no/such/file"], "its folder does not exist"),
        (["run_name=x", "checkpoint=null", f"model={sizes}", "probe={bank: [], queries: []}"], "is empty"),
        ([YAML, "probe.lables_per_class=[1]"], "nearest is labels_per_class"),
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
    for name, file, values in (("a", "eval.json", {"top1": 0.8512}), ("b", "result.json", {"metrics/eval/top1": 0.5})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).write_text(json.dumps(values | {"knn": 0.25}))
    rows = [
        {"name": "first", "runs": {"IN1K": "a", "K400": "nowhere"}, "paper": {"IN1K": 86.0, "K400": 80.0}},
        {"name": "second", "runs": {"K400": "b", "k-NN": "a:knn"}},
    ]
    evaluation.evaluate(run_name="table", checkpoint=None, table={"to": "results.md", "rows": rows})
    assert (tmp_path / "results.md").read_text().splitlines() == [
        "|  | IN1K: paper / ours | K400: paper / ours | k-NN: paper / ours |",
        "| --- | --- | --- | --- |",
        "| first | 86.0 / 85.1 (-0.9) | 80.0 / not run |  |",
        "| second |  | - / 50.0 | - / 25.0 |",
    ]
