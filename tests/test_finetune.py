"""Fine-tuning and linear probes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from checkpoints import STOPPED, Checkpoints, read_checkpoint
from config import load_config
from conftest import ROOT, launch, run_stage, spoilt
from streaming import LocalDataset
from streams import load_stream

import data_prep
import eval as evaluation
import finetune
from finetune import FinetuningViews, build_lars
from model import Classifier
from pretrain import build_optimizer

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
PLAIN = {"erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


@pytest.mark.parametrize("num_frames", [1, 4])
def test_learning_rate_of_every_parameter_equals_the_layer_decay_formula(num_frames):
    net = Classifier(5, **SIZES, num_frames=num_frames)
    adamw = build_optimizer(net, 512, base_lr=1e-3, layer_decay=0.65, weight_decay=0.05)
    settings = {
        id(p): (group["lr"], group["weight_decay"])
        for group in adamw.param_groups
        for p in group["params"]
    }
    assert len(settings) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("encoder.norm", "head")):
            layer = 4
        else:
            layer = 0
        lr, decay = settings[id(parameter)]
        assert lr == pytest.approx(2e-3 * 0.65 ** (4 - layer)), name
        matrix = parameter.ndim > 1 and name.split(".")[1] not in (
            "pos_embed",
            "cls_token",
            "temporal_embed",
        )
        assert decay == (0.05 if matrix else 0.0), name


def test_clip_is_cropped_and_flipped_alike_in_all_frames(demo):
    sample = LocalDataset(str(demo / "train_videos"))[0]
    first = int(sample["ends"][0])
    still = sample | {
        "frames": sample["frames"][:first] * 16,
        "ends": np.arange(1, 17, dtype=np.uint32) * first,
    }
    clips = FinetuningViews(32, 8, 10, **PLAIN)
    drawn = [clips.draw(still, np.random.default_rng(seed))["inputs"] for seed in range(6)]
    for clip in drawn:
        assert clip.shape == (1, 8, 3, 32, 32) and all(
            torch.equal(clip[0, 0], frame) for frame in clip[0]
        )
    assert len({clip.numpy().tobytes() for clip in drawn}) == 6


def test_training_frames_are_one_from_each_section(demo):
    sample = LocalDataset(str(demo / "train_videos"))[0]
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        decode = data_prep.decode_frame
        patch.setattr(data_prep, "decode_frame", lambda s, i: seen.add(i) or decode(s, i))
        for seed in range(20):
            seen.clear()
            FinetuningViews(32, 4, 10, **PLAIN).draw(sample, np.random.default_rng(seed))
            assert sorted(i // 4 for i in seen) == [0, 1, 2, 3] and len({i % 4 for i in seen}) == 1


def test_lars_steps_equal_its_formula_for_heads_with_learning_rates_of_their_own():
    net = Classifier(5, 2, **SIZES, freeze=True, head_init_std=0.01)
    lars = build_lars(
        net, 512, base_lrs=[0.1, 3.0], momentum=0.9, weight_decay=0.01, trust_coeff=0.02
    )
    expected = [
        {name: p.detach().double().numpy() for name, p in head.named_parameters()}
        for head in net.head
    ]
    speeds = [{name: 0.0 for name in head} for head in expected]
    rng = np.random.default_rng(0)
    for _ in range(3):
        for head, values, speed, lr in zip(net.head, expected, speeds, (0.2, 6.0), strict=True):
            for name, p in head.named_parameters():
                gradient = rng.standard_normal(p.shape)
                p.grad = torch.from_numpy(gradient).float()
                if name == "weight":
                    w = values[name]
                    length, slope = np.linalg.norm(w), np.linalg.norm(gradient)
                    gradient = (gradient + 0.01 * w) * 0.02 * length / (slope + 0.01 * length)
                speed[name] = 0.9 * speed[name] + gradient
                values[name] = values[name] - lr * speed[name]
        lars.step()
    for head, values in zip(net.head, expected, strict=True):
        for name, p in head.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), values[name], rtol=1e-4, atol=1e-6)


def test_held_out_samples_are_a_fraction_by_name_whose_labels_are_not_trained_on(demo):
    sample = LocalDataset(str(demo / "train_images"))[0]
    clips = FinetuningViews(32, 1, 10, **PLAIN, held_out=0.3)
    drawn = [
        clips.draw(sample | {"name": f"{n}.png"}, np.random.default_rng(n % 2))["held_out"]
        for n in range(1000)
    ]
    again = [
        clips.draw(sample | {"name": f"{n}.png"}, np.random.default_rng(7))["held_out"]
        for n in range(1000)
    ]
    assert (
        drawn == again
        and set(drawn) == {-1, int(sample["label"])}
        and 0.25 < np.mean(np.array(drawn) != -1) < 0.35
    )
    batch = batch_of() | {"held_out": torch.tensor([-1, 1, -1, 3, -1, -1])}
    net = Classifier(4, **SIZES, freeze=True)
    gradients = []
    for labels in (
        [0, 1, 2, 3, 0, 1],
        [0, 3, 2, 0, 0, 1],
    ):  # of the second and the fourth, which are held out, others
        seen = FinetuningViews(32, 1, 4, **PLAIN).apply(batch | {"target": torch.tensor(labels)})
        net.zero_grad()
        net.loss(net(seen), seen).backward()
        gradients.append(net.head.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_sample_without_a_label_is_named_and_gives_way_to_the_next(demo, tmp_path):
    clips = FinetuningViews(32, 1, 10, **PLAIN)
    data = load_stream(
        clips.draw,
        clips.apply,
        0,
        8,
        tmp_path,
        streams=[{"path": str(demo / "train_images")}],
        global_train_batch_size=60,
        num_workers=0,
        max_unreadable=0.1,
    )[0].dataloader
    spoilt = LocalDataset(str(demo / "train_images"))[7]["name"]
    draw = data.dataset.transform
    data.dataset.transform = lambda s, rng: draw(
        s | {"label": -1} if s["name"] == spoilt else s, rng
    )
    (batch,) = list(data)
    assert len(batch["target"]) == 60 and (batch["target"] >= 0).all()
    assert (tmp_path / "unreadable.jsonl").read_text() == json.dumps(
        [spoilt, "has no label"]
    ) + "\n"


def batch_of(frames: int = 1, key: int = 3) -> dict[str, torch.Tensor]:
    inputs = torch.randint(
        256,
        (6, 1, frames, 3, 32, 32),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    target, held_out = torch.tensor([0, 1, 2, 3, 0, 1]), torch.full((6,), -1)
    return {"inputs": inputs, "target": target, "held_out": held_out, "key": torch.full((6,), key)}


def test_label_smoothing_without_mixing_is_the_known_target():
    target = FinetuningViews(32, 1, 4, **PLAIN | {"label_smoothing": 0.1}).apply(batch_of())[
        "target"
    ]
    expected = torch.full((6, 4), 0.025)
    expected[range(6), [0, 1, 2, 3, 0, 1]] = 0.925
    torch.testing.assert_close(target, expected)


def test_mixup_blends_a_batch_with_itself_reversed_inputs_and_targets_alike():
    plain = FinetuningViews(32, 2, 4, **PLAIN).apply(batch_of(2))
    mixed = FinetuningViews(32, 2, 4, **PLAIN | {"mixup": 0.8}).apply(batch_of(2))
    share = float(mixed["target"][0, 0])  # sample 0 has label 0, its partner, sample 5, label 1
    assert 0.01 < share < 0.99
    for name in ("inputs", "target"):
        expected = share * plain[name] + (1 - share) * plain[name].flip(0)
        torch.testing.assert_close(mixed[name], expected, atol=1e-5, rtol=1e-5)


def test_cutmix_shares_the_target_by_area_and_cuts_one_box_from_all_frames():
    plain = FinetuningViews(32, 2, 4, **PLAIN).apply(batch_of(2))["inputs"]
    mixed = FinetuningViews(32, 2, 4, **PLAIN | {"cutmix": 1.0}).apply(batch_of(2))
    foreign = (mixed["inputs"] != plain).any(dim=3)[:, 0]  # (B, T, H, W)
    assert torch.equal(foreign[:, 0], foreign[:, 1])
    area = foreign[0, 0].float().mean()
    assert 0.01 < area < 0.99 and float(mixed["target"][0, 1]) == pytest.approx(
        float(area), abs=0.02
    )


def test_erasing_takes_the_same_box_of_all_frames():
    plain = FinetuningViews(32, 3, 4, **PLAIN).apply(batch_of(3))["inputs"]
    erased = FinetuningViews(32, 3, 4, **PLAIN | {"erasing": 1.0}).apply(batch_of(3))["inputs"]
    changed = (erased != plain).any(dim=3)[:, 0]
    assert changed.flatten(1).any(dim=1).all() and torch.equal(changed[:, 0], changed[:, 2])


def test_what_is_drawn_on_the_device_depends_on_the_batch_alone():
    clips = FinetuningViews(32, 1, 4, erasing=1.0)
    first = clips.apply(batch_of())
    torch.rand(7), np.random.rand(7)
    again, other = clips.apply(batch_of()), clips.apply(batch_of(key=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["inputs"], other["inputs"])


@pytest.mark.parametrize("num_frames", [1, 16])
@pytest.mark.parametrize("freeze", [False, True])
def test_command_line_fine_tunes_images_and_clips_end_to_end_and_linearly(
    demo, tmp_path, pretrained, num_frames, freeze
):
    kind = "videos" if num_frames > 1 else "images"
    validation = (
        spoilt(demo / "test_images", tmp_path, 3) if num_frames == 1 else demo / "test_videos"
    )
    options = (
        f"pretrained={pretrained}",
        f"data.streams=[{{path: {demo}/train_{kind}}}]",
        "data.global_train_batch_size=20",
        f"eval_data.paths=[{validation}]",
        f"model.num_frames={num_frames}",
        f"model.freeze={freeze}",
        "trainer.max_duration=1ep",
    )
    run_stage(finetune, [str(ROOT / "yamls" / "finetune_demo.yaml"), *options], tmp_path)
    run = tmp_path / "runs" / "finetune_demo"
    result = json.loads((run / "result.json").read_text())
    assert (
        0 <= result["metrics/eval/top1"] <= result["metrics/eval/top5"] <= 1 and result["step"] == 3
    )
    right = result["metrics/eval/top1"] * (
        60 if num_frames > 1 else 59
    )  # what cannot be decoded does not count
    assert right == pytest.approx(round(right), abs=1e-4)
    before, after = (
        read_checkpoint(str(path)) for path in (pretrained, run / "checkpoints" / "latest-rank0.pt")
    )
    moved = not torch.equal(before["encoder.norm.weight"], after["encoder.norm.weight"])
    assert moved is not freeze


def test_command_line_fine_tunes_through_the_launcher(demo, tmp_path, pretrained):
    result = launch(
        tmp_path,
        "finetune.py",
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        f"pretrained={pretrained}",
        f"data.streams=[{{path: {demo}/train_videos}}]",
        "data.global_train_batch_size=20",
        f"eval_data.paths=[{demo}/test_videos]",
        "trainer.max_duration=2ba",
        "trainer.eval_interval=2ba",
    )
    assert result.returncode == 0, result.stderr
    assert "encoder.blocks                     36" in result.stdout and "top-1" in result.stdout


def test_mistakes_are_named_before_training(demo, tmp_path, pretrained, capsys):
    base = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        f"data.streams=[{{path: {demo}/train_images}}]",
        f"eval_data.paths=[{demo}/test_images]",
    ]
    for override, culprit in (
        ("pretrained=nowhere.pt", "nowhere.pt does not exist"),
        ("model.pool=max", "model.pool is 'max'"),
        ("data.global_train_batch_size=21", "must be even"),
        ("model.depth=4", "lacks 12 weights of the encoder"),
        ("augment.mixup=many", "augment.mixup is 'many'"),
        ("lars={base_lrs: [1.0]}", "give one of the blocks optimizer (AdamW) and lars"),
        ("augment.held_out=0.1", "augment.held_out needs augment.mixup"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_stage(
                finetune,
                [*base, f"pretrained={pretrained}", "model.num_frames=1", override],
                tmp_path,
            )
        assert culprit in str(exit.value) and "\n" not in str(exit.value)


def test_mistakes_of_a_linear_probe_are_named_before_training(demo, tmp_path):
    base = [
        str(ROOT / "yamls" / "linprobe_demo.yaml"),
        f"data.streams=[{{path: {demo}/train_images}}]",
        f"eval_data.paths=[{demo}/test_images]",
        "pretrained=null",
    ]
    for override, culprit in (
        ("model.freeze=false", "set model.freeze to true"),
        ("augment.held_out=0", "augment.held_out is 0"),
        ("lars.base_lrs=[]", "lars.base_lrs is []"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_stage(finetune, [*base, override], tmp_path)
        assert culprit in str(exit.value) and "\n" not in str(exit.value)


RUNS = {  # what differs from yamls/finetune_demo.yaml and yamls/linprobe_demo.yaml
    "finetune_demo": [
        "model.drop_path=0.2",
        "model.dropout=0.1",
        "augment.erasing=0.5",
        "augment.cutmix=1.0",
    ],
    "linprobe_demo": [],
}


@pytest.fixture(scope="module", params=RUNS)
def probe_or_whole(request, demo, pretrained, tmp_path_factory):
    """The name of a YAML, arguments for six steps with a checkpoint after each, and the folder of such a run."""
    kind = "videos" if request.param == "finetune_demo" else "images"
    arguments = [
        str(ROOT / "yamls" / f"{request.param}.yaml"),
        f"pretrained={pretrained}",
        f"data.streams=[{{path: {demo}/train_{kind}}}]",
        "data.global_train_batch_size=20",
        "data.num_workers=0",
        f"eval_data.paths=[{demo}/test_{kind}]",
        "schedule={t_warmup: 1ba, t_max: 2ep}",
        "trainer.max_duration=2ep",
        "trainer.eval_interval=1ep",
        "checkpoints={interval: 1ba, keep: 9}",
    ]
    folder = tmp_path_factory.mktemp("whole")
    run_stage(finetune, [*arguments, *RUNS[request.param], "run_name=whole"], folder)
    return request.param, arguments, folder


def weights(folder, name: str, step: str = "ep1-ba6") -> dict[str, torch.Tensor]:
    path = folder / "runs" / name / "checkpoints" / f"{step}.pt"
    return torch.load(path, weights_only=False)["state"]["model"]


def result_of(folder, name: str) -> dict[str, float]:
    return json.loads((folder / "runs" / name / "result.json").read_text())


def test_resumed_run_ends_with_the_weights_and_accuracy_of_one_never_stopped(
    probe_or_whole, tmp_path
):
    name, arguments, whole = probe_or_whole
    arguments = [*arguments, *RUNS[name], "run_name=stopped"]
    run_stage(finetune, [*arguments, "trainer.max_duration=4ba"], tmp_path)
    (tmp_path / "runs" / "stopped" / "result.json").unlink()
    run_stage(finetune, arguments, tmp_path)
    ours, theirs = weights(tmp_path, "stopped"), weights(whole, "whole")
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) for key in theirs
    )
    before = weights(whole, "whole", "ep0-ba1")
    assert any(
        not torch.equal(before[key], theirs[key]) for key in theirs if key.startswith("head")
    )
    assert (
        result_of(tmp_path, "stopped")["metrics/eval/top1"]
        == result_of(whole, "whole")["metrics/eval/top1"]
    )
    if name == "linprobe_demo":
        assert theirs["head.right"].sum() > 0 and result_of(tmp_path, "stopped")["base_lr"] in (
            3.0,
            10.0,
            30.0,
            100.0,
        )


@pytest.mark.parametrize("step", [3, 6])
def test_sigterm_in_an_evaluation_is_heeded_at_once_and_the_last_is_made_up_for(
    probe_or_whole, tmp_path, monkeypatch, step
):
    name, arguments, whole = probe_or_whole
    arguments = [*arguments, *RUNS[name], "run_name=stopped"]

    def eval_batch_start(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "eval_batch_start", eval_batch_start)
        with pytest.raises(SystemExit) as end:
            run_stage(finetune, arguments, tmp_path)
    assert end.value.code == STOPPED
    run_stage(finetune, arguments, tmp_path)
    ours, theirs = weights(tmp_path, "stopped"), weights(whole, "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (
        result_of(tmp_path, "stopped")["metrics/eval/top1"]
        == result_of(whole, "whole")["metrics/eval/top1"]
    )
    lines = (tmp_path / "runs" / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line)["step"] == 6 and "metrics/eval/top1" in line for line in lines)


def finetune_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(finetune, arguments, Path(folder))


def test_two_ranks_fine_tune_as_one(probe_or_whole, tmp_path, on_ranks):
    """Without what is drawn for each rank: mixing, erasing and dropout."""
    _, arguments, _ = probe_or_whole
    plain = [f"augment.{key}={value}" for key, value in PLAIN.items()]
    run_stage(finetune, [*arguments, *plain, "run_name=one"], tmp_path)
    on_ranks(2, finetune_rank, str(tmp_path), [*arguments, *plain, "run_name=two"])
    one, two = (
        [
            json.loads(line)
            for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    )
    totals = [
        [line["loss/train/total"] for line in lines if "loss/train/total" in line]
        for lines in (one, two)
    ]
    assert len(totals[0]) == 6 and totals[1] == pytest.approx(totals[0], rel=1e-5)
    for key in ("metrics/eval/top1", "metrics/eval/top5"):
        assert result_of(tmp_path, "two")[key] == pytest.approx(
            result_of(tmp_path, "one")[key], abs=1e-6
        )
    ours, theirs = weights(tmp_path, "two", "ep0-ba3"), weights(tmp_path, "one", "ep0-ba3")
    for key in theirs:
        if key.startswith(("head", "neck")):
            torch.testing.assert_close(
                ours[key.replace("module.", "")].float(), theirs[key].float(), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("overlay", [[], ["finetune_stills.yaml"]])
def test_finetuning_yaml_constructs(overlay):
    files = [str(ROOT / "yamls" / file) for file in ("finetune_demo.yaml", *overlay)]
    config = load_config(files, finetune.finetune)
    with torch.device("meta"):
        net = Classifier(10, **config["model"])
    build_optimizer(net, config["data"]["global_train_batch_size"], **config["optimizer"])
    FinetuningViews(net.encoder.img_size, net.encoder.num_frames, 10, **config["augment"])


def test_policy_treats_all_frames_of_a_clip_alike_and_clips_differently(demo):
    sample = LocalDataset(str(demo / "train_videos"))[0]
    first = int(sample["ends"][0])
    still = sample | {
        "frames": sample["frames"][:first] * 16,
        "ends": np.arange(1, 17, dtype=np.uint32) * first,
    }
    plain = FinetuningViews(32, 16, 4, **PLAIN, flip=0.0)
    clips = FinetuningViews(32, 16, 4, **PLAIN, flip=0.0, rand_augment="rand-m9-mstd0.5-inc1")
    seen = []
    for seed in range(8):
        views = clips.draw(still, np.random.default_rng(seed))["inputs"][0]
        assert views.dtype == torch.uint8 and all(torch.equal(views[0], frame) for frame in views)
        assert torch.equal(views, clips.draw(still, np.random.default_rng(seed))["inputs"][0])
        seen.append(
            not torch.equal(views, plain.draw(still, np.random.default_rng(seed))["inputs"][0])
        )
    assert sum(seen) >= 6


def test_policy_that_timm_does_not_know_is_named():
    with pytest.raises(ValueError, match=r"augment\.rand_augment rand-x9 is no policy of timm's"):
        FinetuningViews(32, 1, 4, rand_augment="rand-x9")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "yamls").glob("linprobe_*_vit*.yaml")), ids=lambda path: path.stem
)
def test_linear_probe_constructs_with_a_head_for_each_learning_rate(path):
    config = load_config([str(path)], finetune.finetune)
    with torch.device("meta"):
        net = Classifier(1000, len(config["lars"]["base_lrs"]), **config["model"])
    FinetuningViews(224, 1, 1000, **config["augment"])
    lars = build_lars(net, config["data"]["global_train_batch_size"], **config["lars"])
    assert 6.4 in [group["lr"] for group in lars.param_groups]  # MAE's: 0.1 for 256, at 16384


@pytest.mark.parametrize(
    "path", sorted((ROOT / "yamls").glob("finetune_*_vit*.yaml")), ids=lambda path: path.stem
)
def test_recipe_constructs_with_the_size_and_learning_rates_it_names(path):
    config = load_config([str(path)], finetune.finetune)
    with torch.device("meta"):
        net = Classifier(400, **config["model"])
    FinetuningViews(net.encoder.img_size, net.encoder.num_frames, 400, **config["augment"])
    optimizer, batch = config["optimizer"], config["data"]["global_train_batch_size"]
    adamw = build_optimizer(net, batch, **optimizer)
    assert max(group["lr"] for group in adamw.param_groups) == pytest.approx(
        optimizer["base_lr"] * batch / 256
    )
    name = {768: "vit_base_patch16_224", 1024: "vit_large_patch16_224"}[
        config["model"]["embed_dim"]
    ]
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=400)
    if net.encoder.num_frames == 1:
        assert sum(p.numel() for p in net.parameters()) == sum(
            p.numel() for p in theirs.parameters()
        )
    evaluated = load_config(
        [str(path.with_name(path.name.replace("finetune", "eval")))], evaluation.evaluate
    )
    shared = {
        key: value
        for key, value in config["model"].items()
        if key not in ("drop_path", "head_init_std")
    }
    assert evaluated["classifier"] == shared
    assert evaluated["accuracy"].get("frame_interval") == config["augment"].get("frame_interval")
    assert evaluated["checkpoint"] == f"runs/{config['run_name']}/checkpoints/latest-rank0.pt"
