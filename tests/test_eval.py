"""Evaluation as a stage: probes, pictures, exports, classes, and where sizes come from."""

import json
import os
import shutil
from pathlib import Path

import cpuinfo
import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from conftest import (
    ROOT,
    corrupted_copy,
    error_of,
    read_result,
    run_stage,
    small,
)

import eval as evaluation
import finetune
import pretrain
from eval import EvalConfig, evaluate
from finetune import LinearProbe
from model import Classifier, Encoder, ViCMAE
from shards.views import EvalViews
from training import weights
from training.export import export
from training.safe_load import load_plain
from training.weights import load_pretrained

YAML = str(ROOT / "yamls" / "eval_demo.yaml")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}
TINY = SIZES | DECODER | {"projector_hidden_dim": 32, "projector_out_dim": 16}


def save_classifier(
    path: Path, names: list[str] = (), classes: int = 10, num_frames: int = 1
) -> Classifier:
    """Return a classifier with random weights, which are saved in a file without its sizes."""
    torch.manual_seed(0)
    net = Classifier(classes, **SIZES, num_frames=num_frames, head_init_std=1.0).eval()
    net.class_names = list(names)
    torch.save(net.state_dict(), path)
    return net


def evaluate_file(folder: Path, **settings) -> dict[str, float]:
    """Return the result of an evaluation of classifier.pt on the CPU."""
    config = {"run_name": "run", "checkpoint": "classifier.pt", "device": "cpu", "model": SIZES}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return evaluate(EvalConfig(**config | settings))


def probabilities_of(
    net: Classifier, path: str, temporal: int = 1, spatial: int = 1, average: str = "softmax"
) -> tuple[torch.Tensor, list[int]]:
    """Return probabilities (n, C), averaged over the views of a sample, one view at a time."""
    data, found, labels = EvalViews([path], 32, 1, temporal, spatial, crop_pct=1.0), [], []
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    for number in range(len(data)):
        sample = data[number]
        inputs = (sample["inputs"] / 255 - mean) / std  # (V, T, 3, H, W)
        with torch.no_grad():
            logits = [net({"inputs": view[None, None]})[0, 0] for view in inputs]
        if average == "logits":
            found.append(sum(logits) / len(logits))
        else:
            found.append(torch.stack([one.softmax(dim=0) for one in logits]).mean(dim=0))
        labels.append(int(sample["target"]))
    return torch.stack(found), labels


def fraction_in_top(probabilities: torch.Tensor, labels: list[int], k: int) -> float:
    ranked = probabilities.argsort(dim=1, descending=True).tolist()
    return sum(label in row[:k] for row, label in zip(ranked, labels, strict=True)) / len(labels)


# A run of fine-tuning


def test_fine_tuned_run_is_evaluated_by_its_checkpoint_alone_as_its_validation_was(
    demo, tmp_path, pretrained, monkeypatch
):
    arguments = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        f"pretrained={pretrained}",
        f"data.streams=[{{path: {demo}/train_videos}}]",
        "data.global_train_batch_size=20",
        f"eval_data.paths=[{demo}/test_videos]",
        "trainer.max_duration=1ep",
    ]
    run_stage(finetune, arguments, tmp_path)
    arguments = [
        "run_name=evaluated",
        "checkpoint=runs/finetune_demo/checkpoints/latest-rank0.pt",
        "device=cpu",
        f"accuracy={{paths: [{demo}/test_videos], crop_pct: 1.0}}",
    ]
    run_stage(evaluation, arguments, tmp_path)
    found = json.loads((tmp_path / "runs" / "evaluated" / "eval.json").read_text())
    expected = read_result(tmp_path, "finetune_demo")
    for name in ("top1", "top5"):
        assert found[name] == pytest.approx(expected[f"metrics/eval/{name}"])

    types, forward = set(), Encoder.forward

    def record(encoder, *inputs) -> torch.Tensor:
        layer = encoder.blocks[0].mlp.fc1
        types.add(layer(torch.zeros(1, layer.in_features)).dtype)
        return forward(encoder, *inputs)

    monkeypatch.setattr(Encoder, "forward", record)
    run_stage(evaluation, [*arguments, "run_name=half", "precision=amp_bf16"], tmp_path)
    assert types == {torch.bfloat16}


# Probes and pictures


def test_probe_pictures_and_export_are_made_at_once_and_the_last_line_is_the_result(
    demo, tmp_path, pretrained, capfd
):
    arguments = [
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
    ]
    run_stage(evaluation, arguments, tmp_path)
    printed = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    for key in ("knn", "linear_3", "linear_all", "linear_25%", "knn_25%"):
        assert 0 <= printed[key] <= 1
    run = tmp_path / "runs" / "eval_demo"
    assert json.loads((run / "eval.json").read_text()) == printed
    files = [
        "attention.png",
        "data_sets.json",
        "eval.json",
        "eval.yaml",
        "neighbours.png",
        "reconstructions.png",
        "report.html",
    ]
    assert sorted(os.listdir(run)) == files
    assert sorted(os.listdir(tmp_path)) == ["encoder.safetensors", "features.npz", "runs"]


def test_random_weights_have_the_sizes_of_the_checkpoint_and_the_accuracy_before_training(
    demo, tmp_path
):
    run_stage(pretrain, [*small(demo), "data.num_workers=0", "trainer.max_duration=1ba"], tmp_path)
    sets = f"bank: [{demo}/train_images], queries: [{demo}/test_images], crop_pct: 1.0"
    given = [
        "device=cpu",
        "checkpoint=runs/demo/checkpoints/latest-rank0.pt",
        f"probe={{{sets}}}",
    ]
    for run_name, choice in (("trained", "false"), ("random", "true")):
        arguments = [f"run_name={run_name}", *given, f"random_weights={choice}"]
        run_stage(evaluation, arguments, tmp_path)
        found = json.loads((tmp_path / "runs" / run_name / "eval.json").read_text())
        assert found["knn"] == read_result(tmp_path, "demo")[f"knn/{run_name}"]


def test_half_precision_gives_the_features_of_full_precision_up_to_eight_bits(
    demo, pretrained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    probe = {"bank": [str(demo / "train_images")], "queries": [str(demo / "test_images")]}
    features = {}
    for precision in ("fp32", "amp_bf16"):
        file = f"{precision}.npz"
        settings = {"precision": precision, "device": "cpu", "probe": probe | {"features": file}}
        evaluate(EvalConfig(run_name=precision, checkpoint=str(pretrained), **settings))
        features[precision] = np.load(file, allow_pickle=False)["bank_features"]
    error = np.abs(features["amp_bf16"] - features["fp32"]).max()
    assert 1e-5 < error / np.abs(features["fp32"]).max() < 2e-2


# Exports


def timm_vit(**settings) -> torch.nn.Module:
    return timm.models.VisionTransformer(
        32, 8, embed_dim=48, depth=2, num_heads=3, **settings
    ).eval()


def test_exported_encoder_has_the_same_features_in_timm_and_back_here(tmp_path):
    torch.manual_seed(0)
    net, file = ViCMAE(**TINY).eval(), str(tmp_path / "encoder.safetensors")
    export(net, file)
    theirs = timm_vit(num_classes=0)
    timm.models.load_checkpoint(theirs, file)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = net.encoder(images)
    torch.testing.assert_close(theirs.forward_features(images), features, atol=1e-5, rtol=1e-5)
    back = ViCMAE(**TINY).eval()
    load_pretrained(back, file)
    assert torch.equal(back.encoder(images), features)


@pytest.mark.parametrize("kind", [Classifier, LinearProbe])
@pytest.mark.parametrize(
    ("pool", "settings"), [("cls", {"global_pool": "token"}), ("mean", {"fc_norm": False})]
)
def test_exported_classifier_has_the_same_logits_in_timm_and_back_here(
    tmp_path, pool, settings, kind
):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = kind(7, **SIZES, pool=pool, head_init_std=0.2).eval()
    net.head.bias.data.normal_(generator=generator)
    if kind is LinearProbe:
        net.neck.running_mean.normal_(generator=generator)
        net.neck.running_var.uniform_(0.1, 3.0, generator=generator)
    torch.save(net.state_dict(), tmp_path / "classifier.pt")
    evaluate_file(tmp_path, model=SIZES | {"pool": pool}, export="seven.safetensors")
    file = str(tmp_path / "seven.safetensors")
    images = torch.randn(5, 3, 32, 32, generator=generator)
    logits = net({"inputs": images[:, None, None]})[:, 0]
    theirs = timm_vit(**{"global_pool": "avg", "num_classes": 7} | settings)
    timm.models.load_checkpoint(theirs, file)
    torch.testing.assert_close(theirs(images), logits, atol=1e-5, rtol=1e-5)
    back = Classifier(7, **SIZES, pool=pool).eval()
    assert load_pretrained(back, file)["missing"] == []
    again = back({"inputs": images[:, None, None]})[:, 0]
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)


def test_evaluation_reads_a_file_without_a_run_once_and_a_new_one_at_its_place_anew(
    tmp_path, monkeypatch
):
    read = []

    def load_and_count(path: str):
        read.append(path)
        return load_plain(path)

    monkeypatch.setattr(weights, "load_plain", load_and_count)
    for classes in (5, 7):
        save_classifier(tmp_path / "classifier.pt", classes=classes)
        evaluate_file(tmp_path, model={"num_heads": 3}, export=f"{classes}.safetensors")
        exported = safetensors.numpy.load_file(tmp_path / f"{classes}.safetensors")
        assert len(exported["head.bias"]) == classes
    assert len(read) == 2
    assert weights.read_file.cache_info().currsize == 0  # memory is freed


def test_encoder_of_clips_is_not_exported(tmp_path):
    save_classifier(tmp_path / "classifier.pt", num_frames=4)
    with pytest.raises(ValueError, match="timm has no ViT for clips"):
        evaluate_file(tmp_path, model=SIZES | {"num_frames": 4}, export="clips.safetensors")


# Mistakes

PROBE = "probe={{bank: [{demo}/train_images], queries: [{demo}/test_images]}}"
MODEL = "model={img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"
ACCURACY = "accuracy.paths=[{demo}/test_images]"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["checkpoint=null", PROBE], "model: missing; without a checkpoint, give the sizes"),
        (["checkpoint=nowhere.pt", PROBE], "nowhere.pt does not exist"),
        (["checkpoint={pretrained}", ACCURACY], "accuracy: needs a classifier, and method=vicmae"),
        (["checkpoint={pretrained}", ACCURACY, "method=classifier"], "has no classifier's head"),
        (["checkpoint=seven.pt", MODEL, ACCURACY], "its head has 7 classes, but"),
        (["checkpoint=seven.pt", MODEL, ACCURACY, "method=nil"], "method=nil: must be one of"),
        (
            ["checkpoint=seven.pt", "model.dpeth=3", ACCURACY],
            "model.dpeth: is not a key of this block; did you mean depth?",
        ),
        (
            ["checkpoint=null", MODEL, "method=simclr", "reconstructions=[{demo}/test_images]"],
            "reconstructions: SimCLR has no decoder",
        ),
        (
            ["checkpoint=seven.pt", MODEL, "reconstructions=[{demo}/test_images]"],
            "reconstructions: Classifier has no decoder",
        ),
        (["checkpoint=null"], "no measurement: give a block"),
        ([PROBE], "checkpoint is missing"),
        (["checkpoint=null", PROBE, "random_weights=true"], "random_weights: needs a checkpoint"),
        (
            ["checkpoint=null", MODEL, "export=no/such/file.onnx"],
            "export=no/such/file.onnx: its folder",
        ),
        (["checkpoint=null", MODEL, "probe={{bank: [], queries: []}}"], "probe.bank=[]: "),
        ([YAML, "probe.features=no/x.npz"], "probe.features=no/x.npz: its folder does not exist"),
        ([YAML, "probe.fractions=[0.0]"], "greater than 0"),
        ([YAML, "probe.fractions=[1.5]"], "less than or equal to 1"),
        ([YAML, "probe.temperature=0"], "greater than 0"),
        ([YAML, "run_name=../up"], "run_name=../up: "),
        ([YAML, "probe.lables_per_class=[1]"], "did you mean labels_per_class?"),
        (["checkpoint=null", MODEL, "attention=[nowhere]"], "nowhere is not a complete data set"),
    ],
)
def test_mistake_is_named_in_one_line(demo, tmp_path, pretrained, arguments, complaint):
    save_classifier(tmp_path / "seven.pt", classes=7)
    filled = []
    for argument in arguments:
        if argument not in (YAML, MODEL):
            argument = argument.format(demo=demo, pretrained=pretrained)
        filled.append(argument)
    if YAML not in arguments:
        filled.append("run_name=run")
    assert complaint in error_of(evaluation, filled, tmp_path)


# Classes


def test_classes_of_a_data_set_are_matched_by_name(demo, tmp_path):
    names = json.loads((demo / "test_images" / "classes.json").read_text())
    net = save_classifier(tmp_path / "classifier.pt", names)
    probabilities, labels = probabilities_of(net, str(demo / "test_images"))
    path = corrupted_copy(demo / "test_images", tmp_path)
    (path / "classes.json").write_text(json.dumps(names[::-1]))
    result = evaluate_file(tmp_path, accuracy={"paths": [str(path)], "crop_pct": 1.0})
    turned = [9 - label for label in labels]
    assert result["top1"] == pytest.approx(fraction_in_top(probabilities, turned, 1))
    assert result["top1"] != pytest.approx(fraction_in_top(probabilities, labels, 1))
    (path / "classes.json").write_text(json.dumps([*names[:9], "zebra"]))
    with pytest.raises(ValueError, match=r"test_images: has classes .* lacks: 'zebra'"):
        evaluate_file(tmp_path, run_name="again", accuracy={"paths": [str(path)]})


def test_classes_are_compared_by_number_if_the_checkpoint_has_no_names(demo, tmp_path, capfd):
    save_classifier(tmp_path / "classifier.pt")
    path = corrupted_copy(demo / "test_images", tmp_path)
    (path / "classes.json").write_text(json.dumps(list("abcdefghij")))
    evaluate_file(tmp_path, accuracy={"paths": [str(path)]})
    assert "has no class names; classes are compared by number" in capfd.readouterr().out
    (path / "classes.json").write_text(json.dumps(list("abcdefghijk")))
    with pytest.raises(ValueError, match=r"its head has 10 classes, but .*test_images has 11"):
        evaluate_file(tmp_path, run_name="again", accuracy={"paths": [str(path)]})


def test_class_names_are_in_the_export(demo, tmp_path):
    save_classifier(tmp_path / "classifier.pt", list("abcdefghij"))
    evaluate_file(tmp_path, export=str(tmp_path / "x.safetensors"))
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == list("abcdefghij")


def test_data_sets_of_an_evaluation_are_recorded_and_compared(demo, tmp_path):
    data = shutil.copytree(demo / "test_images", tmp_path / "queries")
    save_classifier(tmp_path / "classifier.pt")
    probe = {"bank": [f"{demo}/train_images"], "queries": [str(data)]}
    evaluate_file(tmp_path, probe=probe)
    record = json.loads((tmp_path / "runs/run/data_sets.json").read_text())
    assert record.keys() == {f"{demo}/train_images", str(data)}
    (data / "classes.json").write_text((demo / "test_images/classes.json").read_text()[:-3] + 'x"]')
    with pytest.raises(ValueError, match=r"queries has other classes \(\w+x instead of \w+\)"):
        evaluate_file(tmp_path, probe=probe)


def test_no_process_is_started_to_name_the_processor(demo, tmp_path, monkeypatch):
    """Composer's own way to find the name takes a second in each Trainer and checkpoint."""
    monkeypatch.setattr(cpuinfo, "get_cpu_info", None)
    save_classifier(tmp_path / "classifier.pt")
    assert evaluate_file(tmp_path, accuracy={"paths": [str(demo / "test_images")]})
