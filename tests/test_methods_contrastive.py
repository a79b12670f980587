"""methods/contrastive.py: losses against loops and numpy, MoCo against a plain computation."""

import copy
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer import Event
from conftest import ROOT, run_stage, small
from test_model import unit
from tiny_models import TINY, random_batch, state_at
from torch import Tensor, nn

import pretrain
from methods.contrastive import (
    MoCoV2,
    SimCLR,
    SimSiam,
    Triplet,
    VICReg,
    moco_info_nce,
    simsiam_loss,
    triplet_loss,
    vicreg_loss,
)
from model import ViCMAE
from training.checkpoints import Checkpoints


def random_views(seed: int, size: int = 5, out: int = 6) -> Tensor:
    return torch.randn(size, 2, out, generator=torch.Generator().manual_seed(seed))


# SimCLR: views without masks


def test_unmasked_method_has_no_decoder_and_the_features_of_all_patches():
    net, batch = SimCLR(**TINY, pool="cls").eval(), random_batch(2)
    assert net.decoder is None
    cls = net.encoder(batch["views"].flatten(0, 1))[:, 0]
    torch.testing.assert_close(net(batch)["features"].flatten(0, 1), cls)


def test_total_of_an_unmasked_method_is_its_weighted_contrastive_term():
    net, batch = SimCLR(**TINY, weight_contrast=0.4), random_batch()
    net.ramp = 0.5
    found = net.loss(net(batch), batch)
    assert found.keys() == {"total", "contrastive", "accuracy", "feature_std"}
    torch.testing.assert_close(found["total"], 0.5 * 0.4 * found["contrastive"])


@pytest.mark.parametrize("method", [SimCLR, MoCoV2])
def test_published_projector_has_two_layers_and_the_default_three(method):
    for layers, widths in ((2, [64, 16]), (3, [64, 64, 16])):
        net = method(**TINY, projector_layers=layers, temperature=0.2)
        linear = [layer for layer in net.projector if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in linear] == widths
        outputs = net(random_batch(4))
        if method is MoCoV2:
            average = net.momentum.projector.state_dict()
            assert average.keys() == net.projector.state_dict().keys()
        features = outputs["features"][:, 1]
        for layer in linear[:-1]:
            x = layer(features)
            features = F.relu((x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt())
        torch.testing.assert_close(outputs["predictions"][:, 1], linear[-1](features))


def test_masked_simclr_is_vicmae():
    torch.manual_seed(0)
    vicmae, batch = ViCMAE(**TINY), random_batch()
    torch.manual_seed(0)
    simclr = SimCLR(**TINY, masked=True)
    expected, found = vicmae.loss(vicmae(batch), batch), simclr.loss(simclr(batch), batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", [MoCoV2, Triplet, SimSiam, VICReg])
def test_masked_method_replaces_the_contrastive_term_of_vicmae_and_nothing_else(method):
    torch.manual_seed(0)
    vicmae, batch = ViCMAE(**TINY), random_batch()
    torch.manual_seed(0)
    changes = {"queue_size": 8} if method is MoCoV2 else {}
    net = method(**TINY, masked=True, **changes)
    expected, found = vicmae.loss(vicmae(batch), batch), net.loss(net(batch), batch)
    assert found.keys() == expected.keys()
    assert torch.equal(found["reconstruction"], expected["reconstruction"])
    assert not torch.equal(found["contrastive"], expected["contrastive"])


def test_unmasked_method_without_a_contrastive_weight_has_nothing_to_learn():
    with pytest.raises(ValueError, match="weight_contrast=0: must be positive"):
        SimCLR(**TINY, weight_contrast=0.0)


# Triplets


def semi_hard(to_positive: float, to_negatives: list[float]) -> float:
    """Return the nearest distance beyond the positive, or else the largest distance."""
    beyond = [distance for distance in to_negatives if distance > to_positive]
    return min(beyond) if beyond else max(to_negatives)


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 1], [0, -1, 0, -1, 1]])
def test_triplet_loss_equals_a_loop_over_anchors_positives_and_negatives(labels):
    z = random_views(0)
    points = [(sample, unit(z)[sample, view]) for view in (0, 1) for sample in range(5)]
    identities = labels or [-1] * 5
    same = [-1 - sample if identities[sample] < 0 else identities[sample] for sample in range(5)]
    terms, ordered = [], []
    for i, j in product(range(10), range(10)):
        (a, anchor), (p, positive) = points[i], points[j]
        if i == j or same[a] != same[p]:
            continue
        to_positive = ((anchor - positive) ** 2).sum()
        negatives = [point for sample, point in points if same[sample] != same[a]]
        to_negatives = [((anchor - negative) ** 2).sum() for negative in negatives]
        to_negative = semi_hard(to_positive, to_negatives)
        terms.append(max(0.0, to_positive - to_negative + 0.2))
        ordered.append(to_positive < to_negative)
    tensor = None if labels is None else torch.tensor(labels)
    loss, accuracy = triplet_loss(z, tensor, 0.2)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5) and float(loss) > 0
    assert float(accuracy) == pytest.approx(np.mean(ordered))


def test_triplet_loss_of_four_known_points():
    """On the unit circle: a pair at 0 and 90 degrees, and another pair twice at 180 degrees.

    Squared distances: the anchors of the first pair are 2 from each other. From 0 degrees the
    negatives are at 4. From 90 degrees they are at 2, which is not further than the positive, so
    that the furthest is taken, also at 2. The anchors of the second pair are 0 from each other, and
    their nearest negative is at 2.
    """
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    loss, accuracy = triplet_loss(z, None, 0.2)
    assert float(loss) == pytest.approx((0.0 + 0.2 + 0.0 + 0.0) / 4) and float(accuracy) == 0.75


def test_negative_as_far_as_the_positive_is_passed_over_for_a_further_one():
    """On the unit circle: a pair at 0 and 90 degrees, and pairs of equal views at 180 and 270.

    From 0 and from 90 degrees, the positive and one negative are at 2, the other negative at 4.
    """
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    z = torch.stack([torch.stack([east, north]), (-east).expand(2, 2), (-north).expand(2, 2)])
    loss, accuracy = triplet_loss(z, None, 0.2)
    assert float(loss) == 0.0 and float(accuracy) == 1.0


@pytest.mark.parametrize(
    ("shape", "labels"), [((4, 2, 6), torch.zeros(4, dtype=torch.long)), ((4, 1, 6), None)]
)
def test_triplet_loss_without_a_negative_or_without_a_positive_is_zero(shape, labels):
    z = torch.randn(shape).requires_grad_()
    loss, accuracy = triplet_loss(z, labels, 0.2)
    loss.backward()
    assert float(loss) == float(accuracy) == 0.0 and not z.grad.any()


def test_labels_make_positives_only_if_positives_are_by_label():
    alike = random_batch(6) | {"target": torch.zeros(6, dtype=torch.long)}
    by_view, by_label = Triplet(**TINY), Triplet(**TINY, positives="label")
    assert by_view.loss(by_view(alike), alike)["contrastive"] > 0
    assert by_label.loss(by_label(alike), alike)["contrastive"] == 0  # no view has a negative
    unknown = alike | {"target": -torch.ones(6, dtype=torch.long)}
    assert by_label.loss(by_label(unknown), unknown)["contrastive"] > 0


# SimSiam and VICReg


def fraction_of_matched_views(p: Tensor, t: Tensor) -> float:
    """Return how many views are nearest to their partner's target, among all others' targets."""
    predictions, targets = unit(p), unit(t)
    matched = []
    for i, v in product(range(len(p)), (0, 1)):
        others = [(j, w) for j, w in product(range(len(t)), (0, 1)) if j != i]
        nearest = max(predictions[i, v] @ targets[other] for other in others)
        matched.append(predictions[i, v] @ targets[i, 1 - v] > nearest)
    return float(np.mean(matched))


def test_simsiam_loss_equals_a_loop():
    predictions = random_views(1)
    targets = predictions.flip(1) + 0.8 * random_views(2)
    p, t = unit(predictions), unit(targets)
    cosines = [p[i, v] @ t[i, 1 - v] for i in range(5) for v in (0, 1)]
    loss = simsiam_loss(predictions, targets)
    assert float(loss) == pytest.approx(-np.mean(cosines), rel=1e-5)


@pytest.mark.parametrize("method", [SimSiam, VICReg])
def test_accuracy_of_simsiam_and_vicreg_equals_a_loop(method):
    predictions = random_views(1)
    targets = predictions.flip(1) + 0.8 * random_views(2)
    outputs = {"predictions": predictions, "targets": targets}
    _, accuracy = method(**TINY).contrastive_term(outputs)
    assert float(accuracy) == pytest.approx(fraction_of_matched_views(predictions, targets))
    assert 0 < accuracy < 1


def test_targets_of_simsiam_have_no_gradient():
    outputs = SimSiam(**TINY, predictor_hidden_dim=8).train()(random_batch(6))
    assert outputs["predictions"].requires_grad and not outputs["targets"].requires_grad


def numpy_vicreg(z: Tensor, invariance: float, variance: float, covariance: float) -> float:
    first, second = z.double().numpy().transpose(1, 0, 2)
    loss = invariance * ((first - second) ** 2).mean()
    for view in (first, second):
        centred = view - view.mean(axis=0)
        matrix = centred.T @ centred / (len(view) - 1)
        deviation = np.sqrt(np.diag(matrix) + 1e-4)
        off_diagonal = (matrix**2).sum() - (np.diag(matrix) ** 2).sum()
        loss += variance * np.maximum(0, 1 - deviation).mean() / 2
        loss += covariance * off_diagonal / len(matrix)
    return float(loss)


@pytest.mark.parametrize("weights", [(20.0, 0.0, 0.0), (0.0, 25.0, 0.0), (0.0, 0.0, 2.0)])
def test_each_term_of_vicreg_equals_numpy(weights):
    z = random_views(3, size=7)
    assert float(vicreg_loss(z, *weights)) == pytest.approx(numpy_vicreg(z, *weights), rel=1e-5)


def test_vicreg_has_the_published_weights():
    net, batch = VICReg(**TINY), random_batch(8)
    outputs = net(batch)
    expected = numpy_vicreg(outputs["predictions"].detach(), 25.0, 25.0, 1.0)
    found = net.loss(outputs, batch)["contrastive"]
    assert float(found) == pytest.approx(expected, rel=1e-5)


# MoCo v2


def test_info_nce_with_a_queue_equals_a_loop_over_the_queue():
    predictions = random_views(4)
    targets = predictions.flip(1) + random_views(5)
    queue = F.normalize(torch.randn(9, 6), dim=1)
    p, t = unit(predictions), unit(targets)
    terms, matched = [], []
    for i, v in product(range(5), (0, 1)):
        positive = p[i, v] @ t[i, 1 - v] / 0.2
        negatives = [p[i, v] @ row / 0.2 for row in queue.double().numpy()]
        terms.append(np.log(np.exp([positive, *negatives]).sum()) - positive)
        matched.append(positive > max(negatives))
    loss, accuracy = moco_info_nce(predictions, targets, queue, 0.2)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(matched)) and 0 < float(accuracy) < 1


def test_info_nce_of_collapsed_features_with_a_queue_is_that_of_a_random_guess():
    same, queue = torch.ones(5, 2, 6), F.normalize(torch.ones(9, 6), dim=1)
    loss, accuracy = moco_info_nce(same, same, queue, 0.2)
    assert float(loss) == pytest.approx(np.log(10), rel=1e-5) and float(accuracy) == 0.0


def plain_keys(average: dict[str, nn.Module], batch: dict, kept: int, kind: str) -> list[Tensor]:
    """Return the projections of each view by the averaged encoder and projector."""
    keys = []
    for view in (0, 1):
        ids = batch["noise"][:, view].argsort(dim=1)[:, :kept]
        patches = average["encoder"](batch["views"][:, view], ids)[:, 1:]
        pooled = patches.mean(dim=1) if kind == "mean" else patches.amax(dim=1)
        keys.append(average["projector"](pooled[:, None])[:, 0])
    return keys


@pytest.mark.parametrize(("masked", "kind"), [(False, "mean"), (True, "max")])
def test_queue_and_averages_after_five_steps_equal_a_plain_computation(masked, kind):
    net = MoCoV2(**TINY, momentum=0.9, queue_size=24, masked=masked, pool=kind).train()
    queue = net.momentum.queue.clone()
    average = copy.deepcopy({"encoder": net.encoder, "projector": net.projector})
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    (algorithm,) = net.algorithms()
    for step in range(5):
        batch = random_batch(seed=step)
        with torch.no_grad():
            for name, module in average.items():
                current = dict(getattr(net, name).named_parameters())
                for key, parameter in module.named_parameters():
                    parameter.mul_(0.9).add_(0.1 * current[key])
            keys = torch.cat(plain_keys(average, batch, 8 if masked else 16, kind))
            queue = torch.cat([keys / keys.norm(dim=1, keepdim=True), queue])[:24]
        algorithm.apply(Event.BATCH_START, state_at(step), None)
        net.loss(net(batch), batch)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(net.momentum.queue, queue, atol=1e-5, rtol=1e-5)
    for name, module in average.items():
        found = dict(getattr(net.momentum, name).named_parameters())
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(found[key], parameter, atol=1e-6, rtol=1e-5)
    assert not torch.equal(net.momentum.encoder.norm.weight, net.encoder.norm.weight)


def test_predictions_see_the_queue_of_the_steps_before_and_not_their_own_targets():
    net, batch = MoCoV2(**TINY, queue_size=24).train(), random_batch()
    queue = net.momentum.queue.clone()
    assert torch.equal(net(batch)["queue"], queue)
    assert not torch.equal(net.momentum.queue, queue)


def test_averages_move_once_a_step_of_several_micro_batches(demo, tmp_path, monkeypatch):
    seen = []

    def record(self, state, logger):
        model = state.model
        biases = (model.encoder.norm.bias, model.momentum.encoder.norm.bias)
        seen.append([bias.detach().double().clone() for bias in biases])

    monkeypatch.setattr(Checkpoints, "batch_end", record)
    base, *settings = small(demo)
    yaml = str(ROOT / "yamls" / "methods" / "moco_v2.yaml")
    settings += ["data.global_micro_batch_size=5", "callbacks=null", "trainer.max_duration=4ba"]
    run_stage(pretrain, [base, yaml, *settings, "model.momentum=0.5"], tmp_path)
    average = torch.zeros_like(seen[0][0])  # the initial bias of a norm
    for (before, _), (_, average_now) in pairwise(seen):
        average = 0.5 * average + 0.5 * before
        torch.testing.assert_close(average_now, average, atol=1e-9, rtol=1e-6)
    assert average.abs().max() > 1e-5


def test_evaluation_leaves_the_queue_and_the_averages_as_they_are():
    net = MoCoV2(**TINY, queue_size=24).eval()
    nn.init.ones_(net.encoder.norm.bias)
    before = copy.deepcopy(net.state_dict())
    net(random_batch())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
