"""The methods that ViC-MAE is compared with: their terms, masks, poolings, clips and second encoder."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import comparison
import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import LATEST, Checkpoints, read_checkpoint
from conftest import ROOT, run_stage, small, start_ranks
from contrast import Projected, info_nce, simsiam, triplet, vicreg
from test_model import TINY
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from vit import patchify, pool, positions_for, random_masking, unpatchify

import eval as evaluation
import finetune
import pretrain
from model import Classifier, ViCMAE

CLIPS = {"num_frames": 4, "tubelet_size": 2}


def unit(x: Tensor) -> np.ndarray:
    x = x.double().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def views(seed: int, size: int = 5, out: int = 6) -> Tensor:
    return torch.randn(size, 2, out, generator=torch.Generator().manual_seed(seed))


def semi_hard(reached: float, others: list[float]) -> float:
    """The nearest of the distances beyond `reached`, or else the largest."""
    beyond = [other for other in others if other > reached]
    return min(beyond) if beyond else max(others)


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 1], [0, -1, 0, -1, 1]])
def test_triplet_equals_a_loop_over_anchors_positives_and_negatives(labels):
    z = views(0)
    points = [(sample, unit(z)[sample, view]) for view in (0, 1) for sample in range(5)]
    same = [-1 - n if label < 0 else label for n, label in enumerate(labels or [-1] * 5)]
    losses, right = [], []
    for i, (a, anchor) in enumerate(points):
        for j, (p, positive) in enumerate(points):
            if i == j or same[a] != same[p]:
                continue
            reached = ((anchor - positive) ** 2).sum()
            others = [
                ((anchor - negative) ** 2).sum() for n, negative in points if same[n] != same[a]
            ]
            negative = semi_hard(reached, others)
            losses.append(max(0.0, reached - negative + 0.2))
            right.append(reached < negative)
    loss, accuracy = triplet(Projected(z, z, None if labels is None else torch.tensor(labels)), 0.2)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5) and float(loss) > 0
    assert float(accuracy) == pytest.approx(np.mean(right))


def test_triplet_of_four_known_points():
    """On the unit circle: a pair at 0 and 90 degrees, another at 180 twice.

    Anchors of the first pair are 2 apart; their negatives are at 4 and, from 90 degrees, at 2, which is not further: the
    furthest of all, also 2. Those of the second pair are 0 apart, and the nearest negative is at 2.
    """
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    loss, accuracy = triplet(Projected(z, z), 0.2)
    assert float(loss) == pytest.approx((0.0 + 0.2 + 0.0 + 0.0) / 4) and float(accuracy) == 0.75


def test_triplet_without_a_negative_or_without_a_positive_is_zero_and_has_no_gradient():
    for shape, labels in (((4, 2, 6), torch.zeros(4, dtype=torch.long)), ((4, 1, 6), None)):
        z = torch.randn(shape).requires_grad_()
        loss, accuracy = triplet(Projected(z, z, labels), 0.2)
        loss.backward()
        assert float(loss) == float(accuracy) == 0.0 and not z.grad.any()


def found(p: Tensor, t: Tensor) -> float:
    """The fraction of views whose partner's target is nearer than all other samples' targets, both of their views."""
    p, t = unit(p), unit(t)
    right = []
    for i in range(len(p)):
        for v in (0, 1):
            others = [p[i, v] @ t[j, w] for j in range(len(t)) for w in (0, 1) if j != i]
            right.append(p[i, v] @ t[i, 1 - v] > max(others))
    return float(np.mean(right))


def test_simsiam_equals_a_loop():
    p = views(1)
    t = p.flip(1) + 0.8 * views(2)
    cosines = [unit(p)[i, v] @ unit(t)[i, 1 - v] for i in range(5) for v in (0, 1)]
    loss, accuracy = simsiam(Projected(p, t))
    assert float(loss) == pytest.approx(-np.mean(cosines), rel=1e-5)
    assert float(accuracy) == pytest.approx(found(p, t)) and 0 < float(accuracy) < 1


@pytest.mark.parametrize("contrast", ["simsiam", "info_nce"])
def test_what_a_predictor_predicts_has_no_gradient(contrast):
    net = ViCMAE(**TINY, contrast=contrast, predictor_hidden_dim=8).train()
    batch = {"views": torch.randn(6, 2, 3, 32, 32), "noise": torch.rand(6, 2, 16)}
    projected = net(batch)["projected"]
    assert projected.predictions.requires_grad and not projected.targets.requires_grad


def test_vicreg_equals_numpy():
    z = views(3, size=7)
    one, two = z.double().numpy().transpose(1, 0, 2)
    expected = 25 * ((one - two) ** 2).mean()
    for view in (one, two):
        centred = view - view.mean(axis=0)
        covariance = centred.T @ centred / 6
        expected += 25 * np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean() / 2
        expected += (covariance**2).sum() / 6 - (np.diag(covariance) ** 2).sum() / 6
    loss, accuracy = vicreg(Projected(z, z))
    assert float(loss) == pytest.approx(expected, rel=1e-5) and float(accuracy) == pytest.approx(
        found(z, z)
    )


@pytest.mark.parametrize("queue", [None, 9])
def test_info_nce_of_predictions_equals_a_loop_over_targets_or_over_a_queue(queue):
    p, t = views(4), views(5)
    held = torch.nn.functional.normalize(torch.randn(9, 6), dim=1) if queue else None
    losses, right = [], []
    for v in (0, 1):
        for i in range(5):
            partner = unit(p)[i, v] @ unit(t)[i, 1 - v] / 0.2
            if queue:
                others = [unit(p)[i, v] @ row / 0.2 for row in held.double().numpy()]
            else:
                others = [
                    unit(p)[i, v] @ unit(t)[j, w] / 0.2 for j in range(5) for w in (0, 1) if j != i
                ]
            losses.append(np.log(np.exp([partner, *others]).sum()) - partner)
            right.append(partner > max(others))
    loss, accuracy = info_nce(Projected(p, t, queue=held), 0.2)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(right)) and 0 < float(accuracy) < 1
    same = torch.ones(5, 2, 6)
    held = torch.nn.functional.normalize(torch.ones(9, 6), dim=1) if queue else None
    loss, accuracy = info_nce(
        Projected(same, same, queue=held), 0.2
    )  # collapsed: as good as chance
    assert (
        float(loss) == pytest.approx(np.log(10 if queue else 9), rel=1e-5) and float(accuracy) < 0.2
    )


def test_poolings_equal_numpy():
    tokens = torch.randn(3, 5, 4)
    patches = tokens[:, 1:].double().numpy()
    expected = {
        "cls": tokens[:, 0].double().numpy(),
        "mean": patches.mean(axis=1),
        "max": patches.max(axis=1),
        "gem": (np.maximum(patches, 1e-6) ** 3).mean(axis=1) ** (1 / 3),
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(pool(tokens, kind).numpy(), values, rtol=1e-5, atol=1e-6)


def test_tube_hides_the_same_places_in_every_tubelet_and_random_does_not():
    noise = torch.rand(6, 4 * 16)
    for kind, alike in (("tube", True), ("random", False)):
        ids_keep, ids_restore, mask = random_masking(noise, 0.75, kind, steps=4)
        assert ids_keep.shape == (6, 16) and (mask.sum(dim=1) == 48).all()
        steps = mask.view(6, 4, 16)
        assert all(torch.equal(steps[:, 0], one) for one in steps.unbind(1)) is alike
        assert torch.equal(torch.gather(mask, 1, ids_keep), torch.zeros(6, 16))
        assert all(sorted(row) == list(range(64)) for row in ids_restore.tolist())
    *_, mask = random_masking(noise, 0.75, "none", steps=4)
    assert not mask.any()


def test_tubelet_is_frame_row_column_channel_and_unpatchify_inverts():
    clips = torch.randn(2, 4, 3, 16, 16)
    patches = patchify(clips, 8, 2)  # 2 times of 2 x 2 places
    assert patches.shape == (2, 8, 2 * 64 * 3)
    place = clips[1, 2:4, :, 8:, :8]  # second time, below on the left
    assert torch.equal(patches[1, 4 + 2], place.permute(0, 2, 3, 1).flatten())
    assert torch.equal(unpatchify(patches, 8, 4, 2), clips)


def test_positions_of_a_clip_are_those_in_space_plus_those_in_time():
    net = ViCMAE(**TINY, **CLIPS)
    for part, dim in ((net.encoder, 48), (net.decoder, 24)):
        table = positions_for(part.pos_embed, 4, part.temporal_embed)[0]
        assert table.shape == (1 + 2 * 16, dim) and not table[0].any()
        for number in range(2 * 16):
            time, place = divmod(number, 16)
            wave = [
                f(time / 10000 ** (i / (dim / 2)))
                for f in (math.sin, math.cos)
                for i in range(dim // 2)
            ]
            expected = part.pos_embed[0, 1 + place] + torch.tensor(wave)
            torch.testing.assert_close(table[1 + number], expected, atol=1e-5, rtol=1e-5)
        assert not part.temporal_embed.requires_grad


def test_clips_are_reconstructed_at_the_removed_tubelets_alone():
    net = ViCMAE(**TINY, **CLIPS, mask="tube", mask_ratio=0.75, contrast="none").train()
    batch = {"views": torch.randn(2, 1, 4, 3, 32, 32), "noise": torch.rand(2, 1, 32)}
    outputs = net(batch)
    assert outputs["pred"].shape == (2, 1, 32, 2 * 64 * 3)
    losses = net.loss(outputs, batch)
    error = []
    for b in range(2):
        for n in outputs["mask"][b, 0].nonzero()[:, 0].tolist():
            time, (row, column) = n // 16, divmod(n % 16, 4)
            frames = batch["views"][
                b, 0, 2 * time : 2 * time + 2, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8
            ]
            target = frames.permute(0, 2, 3, 1).flatten()
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            error.append(float((outputs["pred"][b, 0, n] - target).square().mean()))
    assert len(error) == 2 * 24 and float(losses["reconstruction"]) == pytest.approx(
        np.mean(error), rel=1e-5
    )
    hidden = unpatchify(
        outputs["mask"].flatten(0, 1)[:, :, None].expand(-1, -1, 384), 8, 4, 2
    ).view(batch["views"].shape)
    changed = batch | {"views": batch["views"] + hidden}
    assert torch.equal(net(changed)["features"], outputs["features"])


def test_what_a_method_does_not_use_is_not_there():
    simclr = ViCMAE(**TINY, mask="none")
    mae = ViCMAE(**TINY, contrast="none")
    assert (
        simclr.decoder is None
        and mae.projector is None
        and mae.predictor is None
        and mae.momentum is None
    )
    batch = {"views": torch.randn(3, 1, 3, 32, 32), "noise": torch.rand(3, 1, 16)}
    losses = mae.loss(mae(batch), batch)
    assert losses.keys() == {"total", "reconstruction", "feature_std"}
    for sizes, culprit in (
        ({"mask": "none", "contrast": "none"}, "nothing to learn"),
        ({"mask": "none", "weight_contrast": 0.0}, "nothing to learn"),
        ({"contrast": "simsiam"}, "needs predictor_hidden_dim"),
        (
            {"contrast": "triplet", "predictor_hidden_dim": 8},
            "predictor_hidden_dim is not for contrast triplet",
        ),
        ({"positives": "label"}, "positives label is for contrast triplet"),
        ({**CLIPS, "mask": "tube", "mask_ratio": 0.95}, "must keep and remove"),
    ):
        with pytest.raises(ValueError, match=culprit):
            ViCMAE(**TINY | sizes)


def test_unmasked_views_give_the_features_of_the_whole_image():
    net = ViCMAE(**TINY, mask="none", pool="cls").eval()
    batch = {"views": torch.randn(2, 2, 3, 32, 32), "noise": torch.rand(2, 2, 16)}
    torch.testing.assert_close(
        net(batch)["features"].flatten(0, 1), net.encoder(batch["views"].flatten(0, 1))[:, 0]
    )


MOCO = {"contrast": "moco", "momentum": 0.9, "queue_size": 24}


@pytest.mark.parametrize(("mask", "kind"), [("none", "mean"), ("random", "max")])
def test_queue_and_second_encoder_after_five_steps_are_those_of_a_plain_computation(mask, kind):
    torch.manual_seed(0)
    net = ViCMAE(**TINY, **MOCO, mask=mask, pool=kind).train()
    queue = net.momentum.queue.clone()
    average = copy.deepcopy({"encoder": net.encoder, "projector": net.projector})
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(5):
        batch = {"views": torch.randn(4, 2, 3, 32, 32), "noise": torch.rand(4, 2, 16)}
        with torch.no_grad():
            for name, part in average.items():
                for mine, theirs in zip(
                    part.parameters(), getattr(net, name).parameters(), strict=True
                ):
                    mine.mul_(0.9).add_(0.1 * theirs)
            keys = []
            for view, noise in zip(batch["views"].unbind(1), batch["noise"].unbind(1), strict=True):
                tokens = average["encoder"](
                    view, noise.argsort(dim=1)[:, : 8 if mask == "random" else 16]
                )[:, 1:]
                keys.append(
                    average["projector"](
                        tokens.mean(dim=1) if kind == "mean" else tokens.amax(dim=1)
                    )
                )
            queue = torch.cat([torch.nn.functional.normalize(torch.cat(keys), dim=1), queue])[:24]
        net.momentum.follow(net.encoder, net.projector)
        net.loss(net(batch), batch)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(net.momentum.queue) == 24, step
    torch.testing.assert_close(net.momentum.queue, queue, atol=1e-5, rtol=1e-5)
    for name, part in average.items():
        for mine, theirs in zip(
            part.parameters(), getattr(net.momentum, name).parameters(), strict=True
        ):
            torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=1e-5)
    assert not torch.equal(net.momentum.encoder.norm.weight, net.encoder.norm.weight)


def test_second_encoder_follows_once_a_step_of_several_passes(demo, tmp_path, monkeypatch):
    seen = []

    def look(self, state, logger):
        weights = copy.deepcopy(
            (state.model.encoder.state_dict(), state.model.momentum.encoder.state_dict())
        )
        seen.append([model["norm.bias"].double() for model in weights])

    monkeypatch.setattr(Checkpoints, "batch_end", look)
    base, *settings = small(demo)
    arguments = [
        base,
        str(ROOT / "yamls" / "methods" / "moco_v2.yaml"),
        *settings,
        "data.global_micro_batch_size=5",
    ]
    run_stage(
        pretrain,
        [*arguments, "callbacks=null", "trainer.max_duration=4ba", "model.momentum=0.5"],
        tmp_path,
    )
    average = torch.zeros_like(seen[0][0])  # where a norm's bias begins
    for (before, _), (_, average_now) in pairwise(seen):
        average = 0.5 * average + 0.5 * before
        torch.testing.assert_close(average_now, average, atol=1e-9, rtol=1e-6)
    assert average.abs().max() > 1e-5


def test_measuring_leaves_the_queue_and_the_second_encoder_as_they_are():
    net = ViCMAE(**TINY, **MOCO).eval()
    before = copy.deepcopy(net.state_dict())
    torch.nn.init.ones_(net.encoder.norm.bias)
    before["encoder.norm.bias"] = torch.ones(48)
    net({"views": torch.randn(4, 2, 3, 32, 32), "noise": torch.rand(4, 2, 16)})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


METHODS = {
    "vicmae": {},
    "predictor": {"predictor_hidden_dim": 24},
    "triplet": {"contrast": "triplet"},
    "triplet_by_label": {"contrast": "triplet", "positives": "label"},
    "simsiam": {"contrast": "simsiam", "predictor_hidden_dim": 24},
    "vicreg": {"contrast": "vicreg"},
    "moco": MOCO,
    "simclr": {"mask": "none"},
    "tubes": {**CLIPS, "mask": "tube", "mask_ratio": 0.75},
}


def steps(changes: dict, count: int = 3) -> dict[str, Tensor]:
    """Losses of some steps, and gradients and state after them, of this rank's share of the batches, in float64."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(0)
    net = ViCMAE(**TINY | changes).train().double()
    trained = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    shape = (
        (8, 2, net.encoder.num_frames, 3, 32, 32)
        if net.encoder.num_frames > 1
        else (8, 2, 3, 32, 32)
    )
    found = {}
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        batch = {
            "views": torch.randn(shape, generator=generator, dtype=torch.float64),
            "noise": torch.rand(
                8, 2, net.encoder.num_patches, generator=generator, dtype=torch.float64
            ),
            "target": torch.arange(8) % 3,
        }
        batch = {key: value.chunk(ranks)[rank] for key, value in batch.items()}
        optimizer.zero_grad()
        if net.momentum is not None:
            net.momentum.follow(net.encoder, net.projector)
        losses = net.loss(trained(batch), batch)
        losses["total"].backward()
        optimizer.step()
        found |= {
            f"{step} {name}": value.detach()
            for name, value in losses.items()
            if name != "feature_std"
        }
    found |= {
        f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.requires_grad
    }
    return found | net.state_dict()


def steps_on_a_rank(rank: int, out: str) -> None:
    torch.save({name: steps(changes) for name, changes in METHODS.items()}, f"{out}/{rank}")


@pytest.fixture(scope="module")
def ranks_of_two(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    out = tmp_path_factory.mktemp("ranks")
    start_ranks(out, 2, steps_on_a_rank, str(out))
    return [torch.load(out / str(rank), weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_two_ranks_has_the_losses_gradients_and_state_of_one(ranks_of_two, method):
    one, two = steps(METHODS[method]), [rank[method] for rank in ranks_of_two]
    assert not two[0].keys() ^ one.keys()
    for name, expected in one.items():
        found = torch.stack([rank[name] for rank in two]).double()
        found = found.mean(dim=0) if name[0].isdigit() else found[0]
        scale = max(float(expected.double().abs().max()), 1e-3)
        assert float((found - expected).abs().max()) < 1e-8 * scale, name


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return read_checkpoint(str(folder / "runs" / name / "checkpoints" / LATEST))


@pytest.mark.parametrize(
    "method", ["methods/moco_v2", "methods/triplet_supervised", "methods/videomae", "paper"]
)
def test_method_trains_by_its_yaml_and_resumes_to_the_bit(demo, tmp_path, method):
    base, *settings = small(demo)
    arguments = [
        base,
        str(ROOT / "yamls" / f"{method}.yaml"),
        *settings,
        "schedule.t_max=2ep",
        "checkpoints.interval=1ba",
    ]
    arguments += ["callbacks=null", "data.num_workers=0"]
    run_stage(pretrain, [*arguments, "run_name=whole"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=stopped", "trainer.max_duration=4ba"], tmp_path)
    (tmp_path / "runs" / "stopped" / "result.json").unlink()
    run_stage(pretrain, [*arguments, "run_name=stopped"], tmp_path)
    whole, resumed = weights(tmp_path, "whole"), weights(tmp_path, "stopped")
    assert whole.keys() == resumed.keys() and all(
        torch.equal(whole[name], resumed[name]) for name in whole
    )
    assert ("momentum.queue" in whole) is (method == "methods/moco_v2")
    drawn = (tmp_path / "runs" / "whole" / "reconstructions.png").exists()
    assert drawn is (method in ("methods/videomae", "paper"))


def test_weight_of_the_contrastive_term_rises_over_its_duration(demo, tmp_path):
    arguments = [
        *small(demo),
        "algorithms={ContrastRamp: {duration: 4ba}}",
        "callbacks=null",
        "run_name=ramp",
    ]
    run_stage(pretrain, arguments, tmp_path)
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "ramp" / "metrics.jsonl").read_text().splitlines()
    ]
    lines = [line for line in lines if "loss/train/total" in line]
    assert [line["contrast_ramp"] for line in lines] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    for line in lines:
        total = (
            0.7 * line["loss/train/reconstruction"]
            + 0.3 * line["contrast_ramp"] * line["loss/train/contrastive"]
        )
        assert line["loss/train/total"] == pytest.approx(total, rel=1e-5)


def test_one_view_is_too_few_for_a_contrastive_term(demo, tmp_path):
    with pytest.raises(
        SystemExit, match=r"augment.views is 1, but model.contrast info_nce compares two views"
    ):
        run_stage(pretrain, [*small(demo), "augment.views=1"], tmp_path)


def test_positives_by_label_need_data_sets_of_the_same_classes(demo, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(demo / "train_images", other)
    (other / "classes.json").write_text(json.dumps([f"class {number}" for number in range(10)]))
    yaml = str(ROOT / "yamls" / "methods" / "triplet_supervised.yaml")
    base, *settings = small(demo)
    streams = f"data.streams=[{{path: {demo}/train_videos}}, {{path: {other}}}]"
    with pytest.raises(SystemExit, match="other has other classes than"):
        run_stage(pretrain, [base, yaml, *settings, streams], tmp_path)


def in_this_process(
    command: list[str], capture_output: bool, text: bool, pass_fds: list[int]
) -> SimpleNamespace:
    """What subprocess.run would do with a stage, without the interpreter's start."""
    run_stage(pretrain, command[2:], Path.cwd())
    return SimpleNamespace(returncode=0)


def test_comparison_trains_what_is_missing_and_writes_means_and_spreads(
    demo, tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison, "subprocess", SimpleNamespace(run=in_this_process))
    base, *settings = small(demo)
    command = ", ".join(
        [str(ROOT / "pretrain.py"), base, *(f"'{setting}'" for setting in settings[:3])]
    )
    mae = f"{command}, {ROOT / 'yamls' / 'methods' / 'mae.yaml'}"
    probe = f"{{bank: [{demo}/train_images], queries: [{demo}/test_images], labels_per_class: [3]}}"
    arguments = [
        *(
            "run_name=compare",
            "checkpoint=null",
            "comparison.to=compare.md",
            "comparison.seconds=0.3",
            "comparison.seeds=2",
        ),
        f"comparison.methods={{vicmae: [{command}], mae: [{mae}]}}",
        *(f"comparison.stills={probe}", f"comparison.clips={probe}"),
    ]
    run_stage(evaluation, arguments, tmp_path)
    budget, _, *lines = (tmp_path / "compare.md").read_text().splitlines()
    assert f"0.3 s of training steps each, 2 seeds, {os.cpu_count()} cores" in budget
    assert lines[0] == "| | steps | stills, knn | stills, linear_3 | clips, knn | clips, linear_3 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| random weights", "| vicmae", "| mae"]
    runs = sorted((tmp_path / "runs").glob("compare_mae_[0-9]*_[01]"))
    kept = [next(run.glob("compare-*.json")) for run in runs]
    found = [json.loads(path.read_text()) for path in kept]
    knn = [100 * one["knn"] for one in found]
    assert lines[4].split(" | ")[2] == f"{np.mean(knn):.1f} ± {np.std(knn, ddof=1):.1f}"
    steps = json.loads((runs[1] / "result.json").read_text())["step"]
    assert lines[4].split(" | ")[1] == str(steps) and (tmp_path / "compare.png").stat().st_size > 0
    kept[1].write_text(json.dumps(found[1] | {"knn": 1.0}))
    monkeypatch.setattr(comparison, "subprocess", None)
    run_stage(evaluation, arguments, tmp_path)  # nothing is trained or measured again
    assert f"{(knn[0] + 100) / 2:.1f}" in (tmp_path / "compare.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(
            comparison,
            "measure_probe",
            lambda *given, **block: given[-1].mkdir() or {"knn": block["k"] / 100},
        )
        run_stage(
            evaluation, [*arguments, "comparison.clips.k=5", "comparison.stills.k=7"], tmp_path
        )
    assert (
        "| 7.0 ± 0.0 | 5.0 ± 0.0 |" in (tmp_path / "compare.md").read_text()
    )  # of other probes, nothing is kept
    with pytest.raises(
        SystemExit, match=r"compare_vicmae_speed was made with another model.pool; delete it"
    ):
        run_stage(
            evaluation,
            [*arguments, f"comparison.methods.vicmae=[{command}, model.pool=max]"],
            tmp_path,
        )
    with pytest.raises(
        SystemExit, match="compare_vicmae_speed was made with another trainer; delete it"
    ):
        run_stage(
            evaluation,
            [*arguments, f"comparison.methods.vicmae=[{command}, trainer.precision=fp32]"],
            tmp_path,
        )
    with pytest.raises(SystemExit, match=r"comparison.to no/x.md: its folder does not exist"):
        run_stage(evaluation, [*arguments, "comparison.to=no/x.md"], tmp_path)
    with pytest.raises(SystemExit, match="num_frames 3 is not a multiple of tubelet_size 2"):
        run_stage(
            evaluation,
            [*arguments, f"comparison.methods.last=[{command}, model.num_frames=3]"],
            tmp_path,
        )
    with pytest.raises(SystemExit, match=r"model.pol.* is not a key of this block; did you mean pool"):
        run_stage(
            evaluation,
            [*arguments, f"comparison.methods.last=[{command}, model.pol=max]"],
            tmp_path,
        )
    with pytest.raises(SystemExit, match=r"begins with neither pretrain.py nor finetune.py"):
        run_stage(
            evaluation,
            [*arguments, "comparison.methods.last=[train.py, yamls/demo.yaml]"],
            tmp_path,
        )
    orphan = [sys.executable, "-c", "print('at work', flush=True); input()"]
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        with comparison.alone() as lock:
            left = subprocess.Popen(
                orphan, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[lock.fileno()]
            )
    assert left.stdout.readline() == b"at work\n"
    with pytest.raises(
        SystemExit, match="another comparison, or a run that it left behind, is at work"
    ):
        run_stage(evaluation, arguments, tmp_path)
    left.communicate(b"\n")
    run_stage(evaluation, arguments, tmp_path)


def test_one_trunk_learns_two_data_sets_with_a_head_each_and_each_head_is_evaluated(demo, tmp_path):
    yaml = str(ROOT / "yamls" / "methods" / "omnivore.yaml")
    sets = [f"data.streams=[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]"]
    sets += [
        f"eval_data.paths=[{demo}/test_videos, {demo}/test_images]",
        "data.global_train_batch_size=40",
    ]
    short = [
        "model.num_frames=2",
        "model.depth=1",
        "trainer.max_duration=2ep",
        "trainer.eval_interval=2ep",
    ]
    targets, loss = {}, Classifier.loss
    with pytest.MonkeyPatch.context() as patch:

        def watch(net: Classifier, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            moves = batch["inputs"][:, 0].diff(dim=1).abs().amax(dim=(1, 2, 3, 4)) > 0
            for moving, target in zip(
                moves.tolist(), batch["target"].argmax(dim=1).tolist(), strict=True
            ):
                targets.setdefault(moving, set()).add(target)
            return loss(net, outputs, batch)

        patch.setattr(Classifier, "loss", watch)
        run_stage(finetune, [yaml, *sets, *short], tmp_path)
    assert targets[True] == set(range(10)) and targets[False] - targets[True] == set(range(10, 20))
    run = tmp_path / "runs" / "omnivore"
    sizes = "{num_frames: 2, img_size: 32, patch_size: 8, embed_dim: 64, depth: 1, num_heads: 4}"
    asked = [f"checkpoint={run}/checkpoints/latest-rank0.pt", f"classifier={sizes}"]
    found = []
    for head, kind in enumerate(("videos", "images")):
        data = f"accuracy={{data: [{demo}/test_{kind}], crop_pct: 1.0}}"
        run_stage(evaluation, [f"run_name={kind}", f"head={head}", *asked, data], tmp_path)
        found.append(json.loads((tmp_path / "runs" / kind / "eval.json").read_text())["top1"])
    result = json.loads((run / "result.json").read_text())
    assert result["metrics/eval/top1"] == pytest.approx(np.mean(found)) and max(found) > 0.1
    for head, culprit in (([], "say which, such as head=0"), (["head=2"], "has no head.2")):
        with pytest.raises(SystemExit, match=culprit):
            run_stage(evaluation, ["run_name=x", *head, *asked, data], tmp_path)
    for change, culprit in (
        ("augment.label_smoothing=0.1", "must be 0 with own_heads"),
        (f"data.streams=[{{path: {demo}/train_videos}}]", "one of eval_data"),
    ):
        with pytest.raises(SystemExit, match=culprit):
            run_stage(finetune, [yaml, *sets, *short, "run_name=y", change], tmp_path)


@pytest.mark.parametrize("method", ["vicmae", "predictor", "vicreg", "moco", "triplet"])
def test_collapse_shows_in_the_spread_of_the_features(method):
    net = ViCMAE(**TINY | METHODS[method]).train()
    batch = {"views": torch.randn(16, 2, 3, 32, 32), "noise": torch.rand(16, 2, 16)}
    alive = float(net.loss(net(batch), batch)["feature_std"])
    torch.nn.init.zeros_(net.encoder.norm.weight)
    torch.nn.init.ones_(net.encoder.norm.bias)
    assert float(net.loss(net(batch), batch)["feature_std"]) < 1e-3 < 10e-3 < alive
