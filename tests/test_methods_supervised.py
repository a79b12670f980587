"""methods/supervised.py: one encoder with a head for each of several labelled data sets, of clips,
images and images with depth.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, read_result, run_stage, signal_at
from timm.data.mixup import Mixup
from tiny_models import CLIPS, ENCODER
from torch import Tensor, nn

import eval as evaluation
import finetune
from evaluation.accuracy import label_numbers
from methods.linear_probe import LinearProbe
from methods.supervised import DepthEmbedding, Omnivore
from model import Classifier
from shards.format import Clips, read_classes
from training.checkpoints import Checkpoints
from training.weights import LATEST, load_pretrained


def test_heads_are_no_containers_that_fsdp_refuses():
    for net in (Omnivore([4, 3], **ENCODER), LinearProbe(4, 2, **ENCODER)):
        assert not isinstance(net.head, nn.ModuleList | nn.ModuleDict)
        assert "head.1.weight" in net.state_dict()


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
    net = Omnivore([4, 3, 5], **ENCODER)
    assert [net.classes_of(number) for number in range(4)] == [
        (0, range(4)),
        (1, range(4, 7)),
        (2, range(7, 12)),
        (3, range(0)),
    ]
    chosen = Omnivore([4, 3, 5], **ENCODER, data_set=1)
    assert chosen.classes_of(0) == (1, range(4, 7))


def test_labels_of_a_data_set_are_classes_of_its_head_by_name_or_else_by_number(demo):
    paths = [str(demo / "test_videos"), str(demo / "test_images")]
    names = read_classes(paths[0])
    net = Omnivore([10, 10], **ENCODER)
    assert label_numbers(net, paths, "x") == [[*range(10)], [*range(10, 20)]]
    net.class_names = [names, names[::-1]]
    assert label_numbers(net, paths, "x") == [[*range(10)], [*range(19, 9, -1)]]
    with pytest.raises(ValueError, match="x: has heads for 2 data sets, not for "):
        label_numbers(net, [*paths, paths[0]], "x")
    chosen = Omnivore([10, 10], **ENCODER, data_set=1)
    assert label_numbers(chosen, paths, "x") == [[*range(10, 20)]] * 2


def test_data_set_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="data_set=2: must be below 2, the number of heads"):
        Omnivore([4, 3], **ENCODER, data_set=2)


def test_numbers_of_classes_are_read_from_the_weights():
    assert Omnivore.classes_in(Omnivore([4, 3, 5], **ENCODER).state_dict()) == [4, 3, 5]
    assert Omnivore.classes_in(Classifier(4, **ENCODER).state_dict()) == []


def test_label_smoothing_stays_within_the_data_set_of_a_sample():
    net = Omnivore([4, 3], **ENCODER)
    for first, count in ((0, 4), (4, 3)):
        labels = torch.randint(count, (6,))
        x = torch.zeros(6, 3, 8, 8)
        mixed = []
        for classes, target in ((7, first + labels), (count, labels)):
            np.random.seed(1)
            mix = Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=classes)
            mixed.append(mix(x.clone(), target)[1])
        found = net.within_data_set(mixed[0])
        torch.testing.assert_close(found[:, first : first + count], mixed[1])
        torch.testing.assert_close(found.sum(dim=1), torch.ones(6))
    # A sample that is mixed of two data sets smooths in both; without smoothing, nothing changes.
    two = torch.tensor([[0.6, 0, 0, 0, 0.4, 0, 0]])
    assert torch.equal(net.within_data_set(two), two)
    smoothed = net.within_data_set(0.9 * two + 0.1 / 7)
    expected = 0.9 * two + 0.1 * torch.tensor([[*[0.6 / 4] * 4, *[0.4 / 3] * 3]])
    torch.testing.assert_close(smoothed, expected)


def rgbd_net(**settings) -> Omnivore:
    return Omnivore([4, 3, 5], **ENCODER | CLIPS, depth_maps=True, head_init_std=1.0, **settings)


def test_embedding_of_an_image_is_of_its_frame_then_zeros_and_of_depth_beside_it():
    net = rgbd_net()
    embed = net.encoder.patch_embed["proj"]
    assert isinstance(embed, DepthEmbedding)
    torch.nn.init.normal_(embed.norm.weight)
    torch.nn.init.normal_(embed.norm.bias)
    x = torch.randn(2, 4, 1, 32, 32)
    found = embed(x)  # (2, D, steps, 4, 4)
    assert found.shape == (2, 48, 2, 4, 4) and not found[:, :, 1].any()
    for row, column in ((0, 0), (1, 3)):
        patch = x[:, :, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]  # (2, 4, 8, 8)
        # The second frame of the tubelet is 0, so that only the first frame's weights count.
        colours = torch.einsum("bchw,dchw->bd", patch[:, :3], embed.weight[:, :, 0]) + embed.bias
        depth = torch.einsum("bhw,dhw->bd", patch[:, 3], embed.depth.weight[:, 0, 0])
        depth = embed.norm(depth + embed.depth.bias)
        torch.testing.assert_close(found[:, :, 0, row, column], colours + depth)
        without = embed(x[:, :3])[:, :, 0, row, column]
        torch.testing.assert_close(without, colours)


def test_image_has_the_tokens_and_positions_of_the_first_step_alone():
    net = rgbd_net()
    torch.nn.init.normal_(net.encoder.temporal_embed)
    images = torch.randn(3, 2, 1, 3, 32, 32)
    encoder = net.encoder
    patches = encoder.patch_embed["proj"](images.flatten(0, 1).transpose(1, 2))[:, :, 0]
    positions = encoder.pos_embed[:, 1:] + encoder.temporal_embed[:, :1]
    tokens = patches.flatten(2).transpose(1, 2) + positions
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(6, 1, -1)
    x = torch.cat([cls, tokens], dim=1)
    for block in encoder.blocks:
        x = block(x)
    expected = net.head(encoder.norm(x)[:, 1:].mean(dim=1)).view(3, 2, 12)
    torch.testing.assert_close(net({"inputs": images}), expected)


def mixed_batch() -> dict[str, Tensor]:
    """Return clips, images and images with depth, as EvalViews gives them."""
    kind = torch.tensor([1, 0, 2, 2, 0, 1])
    depth = torch.rand(6, 2, 1, 32, 32) * (kind == 2).view(6, 1, 1, 1, 1)
    return {"inputs": torch.randn(6, 2, 4, 3, 32, 32), "depth": depth, "kind": kind}


@pytest.mark.parametrize("modality", ["rgbd", "rgb", "depth"])
def test_samples_of_a_mixed_batch_are_encoded_by_their_kind(modality):
    net = rgbd_net(modality=modality).eval()
    sees_all = rgbd_net().eval()
    sees_all.load_state_dict(net.state_dict())
    batch = mixed_batch()
    found = net(batch)
    for number in range(6):
        sample = batch["inputs"][number : number + 1]
        kind = int(batch["kind"][number])
        if kind:
            sample = sample[:, :, :1]
        if kind == 2:
            colours = sample * (modality != "depth")
            depth = batch["depth"][number : number + 1, :, None]
            sample = colours if modality == "rgb" else torch.cat([colours, depth], dim=3)
        torch.testing.assert_close(found[number : number + 1], sees_all({"inputs": sample}))
    stills = {name: value[[0, 5]] for name, value in batch.items()}
    torch.testing.assert_close(net(stills), found[[0, 5]])


def test_encoder_with_depth_is_loaded_by_its_colours_into_a_classifier(tmp_path, capsys):
    source, net = rgbd_net().eval(), Classifier(4, **ENCODER | CLIPS).eval()
    torch.save(source.state_dict(), tmp_path / "omnivore.pt")
    load_pretrained(net, str(tmp_path / "omnivore.pt"))
    assert "omnivore.pt: its embedding of depth is left out" in capsys.readouterr().out
    clips = torch.randn(2, 4, 3, 32, 32)
    assert torch.equal(net.encoder(clips), source.encoder(clips))


def test_every_parameter_gets_a_gradient_in_a_step_of_each_kind():
    net = rgbd_net()
    for shape, label in (((2, 1, 4, 3), 0), ((2, 1, 1, 3), 5), ((2, 1, 1, 4), 8)):
        net.zero_grad()
        batch = {"inputs": torch.randn(*shape, 32, 32), "target": torch.tensor([label] * 2)}
        net.loss(net(batch), batch).backward()
        missing = [name for name, value in net.named_parameters() if value.grad is None]
        assert not missing, missing
        moved = net.encoder.patch_embed["proj"].depth.weight.grad.abs().sum() > 0
        assert moved == (shape[-1] == 4)


def test_dropout_is_for_clips_alone():
    net = rgbd_net(dropout=0.9)
    for shape, is_random in (((2, 1, 4, 3), True), ((2, 1, 1, 3), False), ((2, 1, 1, 4), False)):
        batch = {"inputs": torch.randn(*shape, 32, 32)}
        assert torch.equal(net(batch), net(batch)) != is_random


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    """The arguments of two epochs of the recipe, on clips, images and images with depth."""
    paths = ", ".join(f"{{path: {demo}/train_{kind}}}" for kind in ("videos", "images", "depth"))
    return [
        str(ROOT / "yamls" / "methods" / "omnivore.yaml"),
        f"data.streams=[{paths}]",
        "data.global_train_batch_size=40",
        "data.num_workers=0",
        f"eval_data.paths=[{demo}/test_videos, {demo}/test_images, {demo}/test_depth]",
        "model.num_frames=4",
        "model.depth=1",
        "model.head_init_std=1.0",  # so that predictions vary
        "trainer.max_duration=2ep",
        "trainer.eval_interval=2ep",
    ]


def read_eval(folder: Path, run_name: str) -> dict[str, float]:
    return json.loads((folder / "runs" / run_name / "eval.json").read_text())


def weights_of(folder: Path) -> dict[str, Tensor]:
    path = folder / "runs" / "omnivore" / "checkpoints" / LATEST
    return torch.load(path, weights_only=False)["state"]["model"]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory) -> tuple[Path, set]:
    """A finished run, and (frames, channels, data set) of each of its steps."""
    folder, steps = tmp_path_factory.mktemp("trained"), set()
    loss = Omnivore.loss

    def record(net: Omnivore, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        data_sets = set((batch["target"].argmax(dim=1) // 10).tolist())
        steps.add((*batch["inputs"].shape[2:4], *data_sets))
        return loss(net, outputs, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Omnivore, "loss", record)
        run_stage(finetune, arguments, folder)
    return folder, steps


def test_step_has_one_data_set_of_clips_of_images_or_of_images_with_depth(trained):
    assert trained[1] == {(4, 3, 0), (1, 3, 1), (1, 4, 2)}


def test_each_head_is_evaluated_on_its_data_set_also_by_depth_alone(trained, demo, tmp_path):
    folder, _ = trained
    checkpoint = f"checkpoint={folder}/runs/omnivore/checkpoints/{LATEST}"
    paths = [f"{demo}/test_{kind}" for kind in ("videos", "images", "depth")]
    right, by_modality = [], []
    for head, modality in ((0, "rgbd"), (1, "rgbd"), (2, "rgbd"), (2, "rgb"), (2, "depth")):
        data = f"accuracy={{paths: [{paths[head]}], crop_pct: 1.0}}"
        model = [f"model.data_set={head}", f"model.modality={modality}"]
        run_stage(evaluation, [f"run_name=head{head}", checkpoint, *model, data], tmp_path)
        found = round(read_eval(tmp_path, f"head{head}")["top1"] * len(Clips(paths[head])))
        if modality == "rgbd":
            right.append(found)
        if head == 2:
            by_modality.append(found)
    total = read_result(folder, "omnivore")["metrics/eval/top1"]
    assert total == pytest.approx(sum(right) / 240)
    assert len(set(by_modality)) > 1

    every = f"accuracy={{paths: [{', '.join(paths)}], crop_pct: 1.0}}"
    run_stage(evaluation, ["run_name=all", checkpoint, every], tmp_path)
    assert read_eval(tmp_path, "all")["top1"] == pytest.approx(total)
    absent = ["run_name=absent", checkpoint, "model.data_set=3", every]
    assert "data_set=3: must be below 3" in error_of(evaluation, absent, tmp_path)


def test_interrupted_run_ends_with_the_weights_of_an_uninterrupted_run(
    trained, arguments, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "batch_start", signal_at(4), raising=False)
        with pytest.raises(SystemExit):
            run_stage(finetune, arguments, tmp_path)
    run_stage(finetune, arguments, tmp_path)
    ours, theirs = weights_of(tmp_path), weights_of(trained[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def finetune_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(finetune, arguments, Path(folder))


def test_two_ranks_train_and_evaluate_as_one(trained, arguments, tmp_path, on_ranks):
    on_ranks(2, finetune_rank, str(tmp_path), arguments)
    ours, theirs = weights_of(tmp_path), weights_of(trained[0])
    for name in theirs:
        one, two = theirs[name], ours[name]
        if name.endswith("qkv.bias"):  # Softmax cancels keys' biases; Adam follows their rounding.
            one, two = (bias.view(3, -1)[[0, 2]] for bias in (one, two))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    result = read_result(tmp_path, "omnivore")["metrics/eval/top1"]
    assert result == pytest.approx(read_result(trained[0], "omnivore")["metrics/eval/top1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.one_stream_per_batch=false", "must be true with model.depth_maps"),
        ("eval_data.paths=[{demo}/test_videos]", "give one of eval_data.paths for each"),
        ("model.num_frames=1", "model.depth_maps=true: needs clips; give model.num_frames=16, say"),
    ],
)
def test_settings_that_do_not_suit_several_heads_are_named(
    arguments, demo, tmp_path, change, message
):
    command = [*arguments, change.format(demo=demo)]
    assert message in error_of(finetune, command, tmp_path)
