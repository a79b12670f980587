"""LinearProbe: frozen encoder, BatchNorm over all ranks, heads with their own rates."""

import pytest
import torch
from tiny_models import ENCODER

from methods.linear_probe import LinearProbe, ProbeHeads
from model import Classifier


def random_inputs(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 1, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("heads", [1, 2])
def test_linear_probe_trains_its_heads_alone(heads):
    net = LinearProbe(4, heads, **ENCODER, drop_path=0.5).train()
    batch = {"inputs": random_inputs(4), "target": torch.arange(4)}
    net.loss(net(batch), batch | {"held_out": torch.full((4,), -1)}).backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("head.") for name in trained)
    assert not net.encoder.training and net.neck.training
    again = net(batch)
    assert torch.equal(net(batch), again)  # no drop path in the frozen encoder


def test_features_are_normalised_without_affine_parameters_by_the_batch_and_then_on_average():
    net = LinearProbe(4, **ENCODER, head_init_std=1.0).train()
    inputs = random_inputs(6)
    features = net.encoder(inputs[:, 0, 0])[:, 1:].mean(dim=1).double()  # (6, D)
    mean, variance = features.mean(dim=0), features.var(dim=0, unbiased=False)
    weight, bias = net.head.weight.double(), net.head.bias.double()
    expected = (features - mean) / (variance + 1e-6).sqrt() @ weight.T + bias
    logits = net({"inputs": inputs})[:, 0].double()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not list(net.neck.parameters())

    mean, variance = 0.1 * mean, 0.9 + 0.1 * features.var(dim=0)  # running, after one batch
    expected = (features - mean) / (variance + 1e-6).sqrt() @ weight.T + bias
    logits = net.eval()({"inputs": inputs})[:, 0].double()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_of_several_heads_are_those_of_probes_with_one_head():
    net = LinearProbe(4, 2, **ENCODER, head_init_std=0.1).train()
    batch = {"inputs": random_inputs(6), "target": torch.rand(6, 4).softmax(dim=1)}
    loss = net.loss(net(batch), batch | {"held_out": torch.full((6,), -1)})
    loss.backward()
    total = 0.0
    for head in net.head:
        single = LinearProbe(4, **ENCODER).train()
        single.encoder.load_state_dict(net.encoder.state_dict())
        single.head.load_state_dict(head.state_dict())
        single_loss = Classifier.loss(single, single(batch), batch)
        single_loss.backward()
        total += float(single_loss)
        torch.testing.assert_close(head.weight.grad, single.head.weight.grad)
    assert float(loss) == pytest.approx(total, rel=1e-6)


def test_heads_count_correct_held_out_samples_and_the_best_head_predicts():
    net = LinearProbe(4, 3, **ENCODER, head_init_std=1.0)
    labels, held_out = torch.tensor([0, 1, 2, 3]), torch.tensor([-1, 1, -1, 3])
    guesses = torch.tensor([[0, 0, 2, 0], [1, 1, 1, 3], [0, 1, 2, 0]])  # of each head
    logits = 5.0 * torch.eye(4)[guesses].transpose(0, 1)[:, None]  # (B, 1, heads, C)
    for _ in range(2):
        net.loss(logits, {"target": labels, "held_out": held_out})
    # The heads have 0, 2 and 1 of the two held-out samples right, in each of two steps.
    torch.testing.assert_close(net.head.right, torch.tensor([0.0, 2 * 0.98 + 2, 0.98 + 1]))
    net.eval()
    inputs = random_inputs(2)
    features = net.encoder(inputs[:, 0, 0])[:, 1:].mean(dim=1)
    features = (features - net.neck.running_mean) / (net.neck.running_var + 1e-6).sqrt()
    expected = features @ net.head[1].weight.T + net.head[1].bias
    torch.testing.assert_close(net({"inputs": inputs})[:, 0], expected)


def test_several_heads_are_probe_heads_and_one_is_a_linear_layer():
    assert isinstance(LinearProbe(4, 2, **ENCODER).head, ProbeHeads)
    assert isinstance(LinearProbe(4, **ENCODER).head, torch.nn.Linear)


def probe_on_a_rank(rank: int, out: str) -> None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    torch.manual_seed(0)
    net = LinearProbe(4, 2, **ENCODER, head_init_std=0.1).train()
    target = torch.arange(8) % 4
    held_out = torch.where(torch.arange(8) < 5, target, -1)
    batch = {"inputs": random_inputs(8), "target": target, "held_out": held_out}
    part = {key: value.chunk(ranks)[rank] for key, value in batch.items()}
    logits = net(part)
    net.loss(logits, part)
    torch.save({"logits": logits.detach()} | net.state_dict(), f"{out}/{ranks}-{rank}")


def test_linear_probe_on_two_ranks_has_the_logits_statistics_and_counts_of_one(tmp_path, on_ranks):
    probe_on_a_rank(0, str(tmp_path))
    on_ranks(2, probe_on_a_rank, str(tmp_path))
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert one["head.right"].sum() > 0
    torch.testing.assert_close(torch.cat([rank["logits"] for rank in two]), one["logits"])
    for rank in two:
        for name in ("neck.running_mean", "neck.running_var", "head.right"):
            torch.testing.assert_close(rank[name], one[name])
