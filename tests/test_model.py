"""The method and its parts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from contrast import Projected, info_nce
from vit import Encoder, patchify, random_masking, sincos_positions, take, unpatchify

import model
from model import Classifier, ViCMAE
from training.weights import load_pretrained, our_name

GOLDEN = Path(__file__).parent / "golden" / "vicmae_tiny.npz"
TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "projector_hidden_dim": 64,
    "projector_out_dim": 16,
}
ENCODER = {
    name: TINY[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as data:
        return {k: torch.from_numpy(data[k]) for k in data.files if k != "config"} | {
            "config": json.loads(str(data["config"]))
        }


def state_of(golden: dict) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix("state/"): value
        for key, value in golden.items()
        if key.startswith("state/")
    }


def random_batch(size: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": torch.randn(size, 2, 3, 32, 32, generator=generator),
        "noise": torch.rand(size, 2, 16, generator=generator),
    }


def test_loss_predictions_and_every_gradient_equal_the_official_objective(golden):
    net = ViCMAE(**golden["config"]).train()
    report = load_pretrained(net, state_of(golden))
    assert not report["missing"] and not report["unused"]
    batch = {"views": golden["views"], "noise": golden["noise"]}
    outputs = net(batch)
    losses = net.loss(outputs, batch)
    losses["total"].backward()

    torch.testing.assert_close(outputs["mask"], golden["mask"], rtol=0, atol=0)
    for ours, theirs in (
        ("total", "loss"),
        ("reconstruction", "loss_recon"),
        ("contrastive", "loss_contrast"),
    ):
        torch.testing.assert_close(losses[ours].detach(), golden[theirs], rtol=1e-5, atol=0)
    removed = golden["mask"].bool()
    torch.testing.assert_close(
        outputs["pred"].detach()[removed], golden["pred"][removed], rtol=1e-4, atol=1e-5
    )

    expected = {
        our_name(k.removeprefix("grad/")): v for k, v in golden.items() if k.startswith("grad/")
    }
    gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if name in (
            "projector.0.bias",
            "projector.3.bias",
        ):  # zero but for rounding: a BatchNorm follows
            assert gradient.abs().max() < 1e-6 and expected[name].abs().max() < 1e-6
        else:
            assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_positions_equal_a_loop_over_places_and_frequencies():
    dim, grid = 16, 3
    table = sincos_positions(dim, grid)[0]
    assert not table[0].any()
    for row in range(grid):
        for column in range(grid):
            for i in range(dim // 4):
                frequency = 1 / 10000 ** (i / (dim // 4))
                quarters = [f(x * frequency) for x in (column, row) for f in (math.sin, math.cos)]
                for quarter, value in enumerate(quarters):
                    assert table[1 + row * grid + column, quarter * dim // 4 + i] == pytest.approx(
                        value, abs=1e-6
                    )


def test_unpatchify_inverts_patchify_and_a_patch_is_row_column_channel():
    images = torch.randn(2, 3, 24, 24)
    patches = patchify(images, 8)
    assert patches.shape == (2, 9, 192)
    assert torch.equal(patches[1, 5].view(8, 8, 3), images[1, :, 8:16, 16:24].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 8), images)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75, 0.9])
def test_masking_keeps_the_patches_of_smallest_noise_and_restores_their_order(mask_ratio):
    noise = torch.rand(5, 16)
    ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
    kept = int(16 * (1 - mask_ratio))
    assert ids_keep.shape == (5, kept) and mask.sum(dim=1).tolist() == [16 - kept] * 5
    for row in range(5):
        smallest = sorted(range(16), key=lambda patch: noise[row, patch].item())[:kept]
        assert ids_keep[row].tolist() == smallest
        assert {patch for patch in range(16) if mask[row, patch] == 0} == set(smallest)
    tokens = torch.arange(16.0).expand(5, 16)[:, :, None]
    order = noise.argsort(dim=1)
    shuffled = take(tokens, order)
    assert torch.equal(take(shuffled, ids_restore), tokens)


def test_nothing_in_a_step_is_random_but_the_noise():
    net, batch = ViCMAE(**TINY), random_batch()
    torch.manual_seed(1)
    first = net(batch)
    torch.manual_seed(2)
    second = net(batch)
    other = net(batch | {"noise": random_batch(seed=1)["noise"]})
    assert torch.equal(first["pred"], second["pred"]) and torch.equal(first["mask"], second["mask"])
    assert not torch.equal(first["mask"], other["mask"])


def test_encoder_does_not_see_removed_patches():
    net, batch = ViCMAE(**TINY).eval(), random_batch(2)
    mask = net(batch)["mask"]
    pixels = unpatchify(mask.flatten(0, 1)[:, :, None].expand(-1, -1, 192), 8).view(2, 2, 3, 32, 32)
    changed = batch["views"] + 10 * pixels * torch.randn_like(batch["views"])
    assert torch.equal(net(batch)["features"], net(batch | {"views": changed})["features"])


def test_info_nce_equals_a_loop_over_views():
    z = torch.randn(5, 2, 7, dtype=torch.float64).float()
    views = [
        z[b, v].double().numpy() / np.linalg.norm(z[b, v].double().numpy())
        for v in (0, 1)
        for b in range(5)
    ]
    terms = []
    for i in range(10):
        partner = (i + 5) % 10
        weights = [math.exp(views[i] @ views[j] / 0.1) for j in range(10) if j != i]
        terms.append(-math.log(math.exp(views[i] @ views[partner] / 0.1) / sum(weights)))
    loss, accuracy = info_nce(Projected(z, z), 0.1)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    nearest = [
        max((j for j in range(10) if j != i), key=lambda j: views[i] @ views[j]) for i in range(10)
    ]
    assert accuracy.item() == pytest.approx(
        np.mean([nearest[i] == (i + 5) % 10 for i in range(10)])
    )


def test_info_nce_of_two_orthogonal_pairs_is_known():
    z = torch.eye(2)[:, None].expand(
        2, 2, 2
    )  # both views of a sample alike, the samples at right angles
    assert info_nce(Projected(z, z), 0.5)[0].item() == pytest.approx(
        math.log(math.exp(2) + 2) - 2, rel=1e-6
    )


def test_contrastive_terms_in_half_precision_are_computed_in_full():
    z = torch.randn(64, 2, 32)
    net = ViCMAE(**TINY)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = net.term(Projected(z, z))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, info_nce(Projected(z, z), 0.1)[0])


def test_reconstruction_loss_of_a_known_error():
    images = torch.zeros(1, 3, 4, 4)
    images[..., 2:] = 1.0  # patches 1 and 3 of 2 x 2
    pred = torch.zeros(1, 4, 12)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    assert model.reconstruction_loss(
        pred, images, mask, 2, norm_pix_loss=False
    ).item() == pytest.approx(0.5)


def test_reconstruction_loss_equals_numpy():
    images, pred, mask = (
        torch.randn(3, 3, 16, 16),
        torch.randn(3, 16, 48),
        (torch.rand(3, 16) > 0.5).float(),
    )
    patches = (
        images.double()
        .numpy()
        .reshape(3, 3, 4, 4, 4, 4)
        .transpose(0, 2, 4, 3, 5, 1)
        .reshape(3, 16, 48)
    )
    spread = np.sqrt(patches.var(axis=2, ddof=1, keepdims=True) + 1e-6)
    target = (patches - patches.mean(axis=2, keepdims=True)) / spread
    error = ((pred.double().numpy() - target) ** 2).mean(axis=2)
    expected = error[mask.numpy() == 1].mean()
    assert model.reconstruction_loss(
        pred, images, mask, 4, norm_pix_loss=True
    ).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch", "name"),
    [
        (384, 12, 6, 16, "vit_small_patch16_224"),
        (768, 12, 12, 16, "vit_base_patch16_224"),
        (1024, 24, 16, 16, "vit_large_patch16_224"),
        (1280, 32, 16, 14, "vit_huge_patch14_224"),
    ],
)
def test_encoder_has_the_names_and_shapes_of_timms_vit(width, depth, heads, patch, name):
    with torch.device("meta"):
        ours, theirs = (
            Encoder(224, patch, width, depth, heads),
            timm.create_model(name, num_classes=0),
        )
    shapes = [
        {key: value.shape for key, value in net.state_dict().items()} for net in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_classifier_of_images_equals_timms_vit():
    theirs = timm.models.VisionTransformer(
        32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=7
    ).eval()
    torch.nn.init.normal_(theirs.head.weight)
    ours = Classifier(7, **ENCODER, pool="cls").eval()
    load_pretrained(
        ours,
        theirs.state_dict() | {"head.weight": theirs.head.weight, "head.bias": theirs.head.bias},
    )
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        ours({"inputs": images[:, None, None]})[:, 0], theirs(images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", ["small", "base", "large"])
@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_classifier_with_timms_weights_has_timms_logits_at_every_size(size, kind):
    name = f"vit_{size}_patch16_224"
    pooling = (
        {"global_pool": "token"} if kind == "cls" else {"global_pool": "avg", "fc_norm": False}
    )
    theirs = timm.create_model(name, num_classes=10, **pooling).eval()
    torch.nn.init.normal_(theirs.head.weight, std=0.1)
    widths = {
        "embed_dim": theirs.embed_dim,
        "depth": len(theirs.blocks),
        "num_heads": theirs.blocks[0].attn.num_heads,
    }
    ours = Classifier(10, **widths, pool=kind).eval()
    load_pretrained(ours, theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits, expected = ours({"inputs": images[:, None, None]})[:, 0], theirs(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [7, 20])
def test_positions_of_another_resolution_are_those_timm_interpolates(grid):
    theirs = timm.models.VisionTransformer(
        64, 8, embed_dim=48, depth=1, num_heads=3, num_classes=0
    ).eval()
    resized = timm.models.VisionTransformer(
        8 * grid, 8, embed_dim=48, depth=1, num_heads=3, num_classes=0
    ).eval()
    resized.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(theirs.state_dict(), resized)
    )
    ours = Encoder(8 * grid, 8, 48, 1, 3).eval()
    load_pretrained(torch.nn.ModuleDict({"encoder": ours}), theirs.state_dict())
    images = torch.randn(2, 3, 8 * grid, 8 * grid)
    torch.testing.assert_close(ours(images), resized.forward_features(images), rtol=1e-5, atol=1e-5)


def test_still_clip_of_one_tubelet_has_the_features_of_the_image():
    image, clip = (
        Encoder(**ENCODER).eval(),
        Encoder(**ENCODER, num_frames=2, tubelet_size=2, learn_positions=True).eval(),
    )
    holder = torch.nn.ModuleDict({"encoder": clip})
    report = load_pretrained(holder, image.state_dict())
    assert report["missing"] == ["encoder.temporal_embed"]
    frames = torch.randn(3, 3, 32, 32)
    still = frames[:, None].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(clip(still), image(frames), rtol=1e-5, atol=1e-5)


def test_probabilities_are_averaged_over_views():
    net = Classifier(4, **ENCODER, head_init_std=1.0).eval()
    inputs = torch.randn(2, 3, 1, 3, 32, 32)
    alone = torch.stack(
        [net({"inputs": inputs[:, v : v + 1]})[:, 0].softmax(dim=-1) for v in range(3)]
    ).mean(dim=0)
    torch.testing.assert_close(net.eval_forward({"inputs": inputs}), alone)


def test_frozen_classifier_trains_its_head_alone():
    net = Classifier(4, **ENCODER, freeze=True).train()
    net.loss(
        net({"inputs": torch.randn(4, 1, 1, 3, 32, 32)}), {"target": torch.arange(4)}
    ).backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {
        "head.weight",
        "head.bias",
    }
    assert not net.encoder.training and net.neck.training


def test_heads_count_what_they_have_right_of_the_held_out_and_the_best_predicts():
    net = Classifier(4, 3, **ENCODER, freeze=True, head_init_std=1.0)
    labels, held_out = torch.tensor([0, 1, 2, 3]), torch.tensor([-1, 1, -1, 3])
    logits = torch.zeros(4, 1, 3, 4)
    for head, guesses in enumerate(
        [(0, 0, 2, 0), (1, 1, 1, 3), (0, 1, 2, 0)]
    ):  # right of the held-out: 0, 2 and 1
        logits[range(4), 0, head, list(guesses)] = 5.0
    for _ in range(2):
        net.loss(logits, {"target": labels, "held_out": held_out})
    torch.testing.assert_close(net.head.right, torch.tensor([0.0, 2 + 2 * 0.98, 1 + 0.98]))
    net.eval()
    batch = {"inputs": torch.randn(2, 1, 1, 3, 32, 32)}
    features = (
        net.encoder(batch["inputs"][:, 0, 0])[:, 1:].mean(dim=1) - net.neck.running_mean
    ) / (net.neck.running_var + 1e-6).sqrt()
    torch.testing.assert_close(net(batch)[:, 0], features @ net.head[1].weight.T + net.head[1].bias)


def test_loss_and_gradients_of_several_heads_are_those_of_each_alone():
    net = Classifier(4, 2, **ENCODER, freeze=True, head_init_std=0.1).train()
    batch = {"inputs": torch.randn(6, 1, 1, 3, 32, 32), "target": torch.rand(6, 4).softmax(dim=1)}
    loss = net.loss(net(batch), batch | {"held_out": torch.full((6,), -1)})
    loss.backward()
    total = 0.0
    for head in net.head:
        alone = Classifier(4, **ENCODER, freeze=True).train()
        load_pretrained(alone, {f"encoder.{k}": v for k, v in net.encoder.state_dict().items()})
        alone.head.load_state_dict(head.state_dict())
        one = alone.loss(alone(batch), batch)
        one.backward()
        total += float(one)
        torch.testing.assert_close(head.weight.grad, alone.head.weight.grad)
    assert float(loss) == pytest.approx(total, rel=1e-6)


def test_heads_of_two_data_sets_are_each_trained_and_asked_on_their_own_samples_alone():
    torch.manual_seed(0)
    net = Classifier([4, 3], **ENCODER, head_init_std=1.0)
    batch = {
        "inputs": torch.randn(5, 2, 1, 3, 32, 32),
        "target": torch.tensor([3, 4, 0, 6, 5]),
    }  # 4, 6, 5: of the second
    net.loss(net(batch), batch).backward()
    found = [head.weight.grad.clone() for head in net.head]
    features = net.encoder(batch["inputs"].flatten(0, 2))[:, 1:].mean(dim=1)  # (10, D)
    net.zero_grad()
    loss, expected = 0.0, torch.zeros(5, 7)
    for sample, (head, label) in enumerate([(0, 3), (1, 0), (0, 0), (1, 2), (1, 1)]):
        logits = net.head[head](features[2 * sample : 2 * sample + 2])  # (V, C of the data set)
        loss = loss - logits.log_softmax(dim=1)[:, label].sum() / 10
        expected[sample, 4 * head : 4 + 3 * head] = logits.softmax(dim=1).mean(dim=0)
    loss.backward()
    assert net.loss(net(batch), batch).item() == pytest.approx(loss.item(), rel=1e-5)
    for head, gradient in zip(net.head, found, strict=True):
        torch.testing.assert_close(gradient, head.weight.grad)
    torch.testing.assert_close(net.eval_forward(batch), expected)


def probe_on_a_rank(rank: int, out: str) -> None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    torch.manual_seed(0)
    net = Classifier(4, 2, **ENCODER, freeze=True, head_init_std=0.1).train()
    generator = torch.Generator().manual_seed(1)
    inputs, target = torch.randn(8, 1, 1, 3, 32, 32, generator=generator), torch.arange(8) % 4
    held_out = torch.where(torch.arange(8) < 5, target, -1)
    batch = {"inputs": inputs, "target": target, "held_out": held_out}
    batch = {key: value.chunk(ranks)[rank] for key, value in batch.items()}
    logits = net(batch)
    net.loss(logits, batch)
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


@pytest.mark.parametrize(
    ("sizes", "culprit"),
    [
        ({"patch_size": 7}, "img_size 32"),
        ({"num_heads": 5}, "embed_dim 48"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"mask_ratio": -0.1}, "mask_ratio -0.1"),
    ],
)
def test_impossible_size_is_named(sizes, culprit):
    with pytest.raises(ValueError, match=culprit):
        ViCMAE(**TINY | sizes)


def losses_and_gradients_of_a_rank(rank: int, out: str) -> None:
    net = torch.nn.parallel.DistributedDataParallel(build_double())
    batch = {key: value.double()[rank * 2 : rank * 2 + 2] for key, value in random_batch().items()}
    losses = net.module.loss(net(batch), batch)
    losses["total"].backward()
    torch.save(
        {
            "contrastive": losses["contrastive"],
            **{n: p.grad for n, p in net.module.named_parameters()},
        },
        f"{out}/{rank}",
    )


def build_double() -> ViCMAE:
    torch.manual_seed(0)
    return ViCMAE(**TINY).double()


def test_contrastive_loss_and_gradients_on_two_ranks_equal_one_rank(tmp_path, on_ranks):
    on_ranks(2, losses_and_gradients_of_a_rank, str(tmp_path))
    net, batch = build_double(), {key: value.double() for key, value in random_batch().items()}
    losses = net.loss(net(batch), batch)
    losses["total"].backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        torch.testing.assert_close(found["contrastive"], losses["contrastive"], rtol=1e-6, atol=0)
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and parameter.grad.norm() > 1e-12:
                assert (found[name] - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name
