"""methods/tubevit.py: tubes, their positions, images, and runs as a whole."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_of, losses, read_result, run_stage
from omegaconf import OmegaConf
from tiny_models import ENCODER
from torch import Tensor

import eval as evaluation
import finetune
from methods.tubevit import TUBES, Tube, TubeViT
from model import Encoder
from shards.finetuning_views import FinetuningViews
from training.optimizer import build_optimizer
from training.weights import LATEST, load_pretrained

RECIPE = ROOT / "yamls" / "methods" / "tubevit.yaml"
SMALL_TUBES = OmegaConf.to_container(OmegaConf.load(RECIPE).model.tubes)
CLIP = (16, 32, 32)


def new_model() -> TubeViT:
    return TubeViT([4, 3], **ENCODER, num_frames=16, tubes=SMALL_TUBES, head_init_std=1.0)


def boxes(tube: dict, clip: tuple[int, int, int]) -> list[tuple[tuple[int, int, int], list]]:
    """Return the corner of each tube and the corners of its kernels, by trying all places."""
    offset = tube.get("offset", (0, 0, 0))
    parts = tube.get("space_to_depth", (1, 1, 1))
    extent = [kernel * part for kernel, part in zip(tube["kernel"], parts, strict=True)]
    found = []
    for corner in itertools.product(*map(range, clip)):
        along = zip(corner, offset, tube["stride"], strict=True)
        on_grid = all(at >= first and (at - first) % step == 0 for at, first, step in along)
        fits = all(at + size <= end for at, size, end in zip(corner, extent, clip, strict=True))
        if on_grid and fits:
            kernels = []
            for place in itertools.product(*map(range, parts)):
                along = zip(corner, place, tube["kernel"], strict=True)
                kernels.append([at + number * size for at, number, size in along])
            found.append((corner, kernels))
    return found


def test_published_tubes_are_539_tokens_of_a_clip_and_294_of_an_image():
    shapes = [Tube(12, (32, 224, 224), **tube) for tube in TUBES]
    # The last tube along a side of 224 pixels begins at 6 * 32 = 192: 8, 16 and 12 pixels fit.
    assert [len(shape.corners) for shape in shapes] == [2 * 49, 3 * 49, 2 * 49, 196]
    images = [int((shape.corners[:, 0] == 0).sum()) for shape in shapes]
    assert images == [49, 0, 49, 196]  # The second begins at frame 4.


@pytest.mark.parametrize("tube", SMALL_TUBES)
def test_token_is_the_projection_of_each_kernel_of_its_tube(tube):
    shape = Tube(24, CLIP, **tube)
    clip = torch.randn(3, *CLIP)
    t, h, w = tube["kernel"]
    expected = []
    for _, kernels in boxes(tube, CLIP):
        parts = [clip[:, a : a + t, b : b + h, c : c + w] for a, b, c in kernels]
        token = [shape.weight.flatten(1) @ part.flatten() + shape.bias for part in parts]
        expected.append(torch.cat(token))
    torch.testing.assert_close(shape(clip[None])[0], torch.stack(expected))


def position(frame: float, row: float, column: float, width: int) -> list[float]:
    numbers = []
    for k in range(width // 6):
        for coordinate in (frame, column, row):
            angle = coordinate / 10000 ** (k / (width // 6))
            numbers += [math.sin(angle), math.cos(angle)]
    return numbers + [0.0] * (width % 6)


@pytest.mark.parametrize("width", [48, 64])
def test_positions_are_sines_of_the_centres_of_the_tubes_patches_first(width):
    sizes = ENCODER | {"embed_dim": width, "num_heads": 4, "depth": 1}
    encoder = TubeViT([2], **sizes, num_frames=16, tubes=SMALL_TUBES).encoder
    expected = []
    for tube in (SMALL_TUBES[3], *SMALL_TUBES[:3]):
        parts = tube.get("space_to_depth", (1, 1, 1))
        half = [kernel * part / 2 for kernel, part in zip(tube["kernel"], parts, strict=True)]
        for corner, _ in boxes(tube, CLIP):
            centre = [at + size for at, size in zip(corner, half, strict=True)]
            expected.append(position(*centre, width))
    assert encoder.num_patches == len(expected) == 44
    torch.testing.assert_close(encoder.positions[0], torch.tensor(expected))


def test_image_has_the_tokens_of_the_tubes_that_begin_at_its_frame_and_no_others():
    encoder = new_model().encoder.eval()
    image = torch.randn(2, 3, 32, 32)
    padded = torch.zeros(2, 3, *CLIP)
    padded[:, :, 0] = image
    shapes = [encoder.patch_embed["proj"], *encoder.patch_embed["tubes"]]
    starts = [corner[0] for shape in shapes for corner in shape.corners]
    tokens = torch.cat([shape(padded) for shape in shapes], dim=1) + encoder.positions
    kept = [token for token, start in zip(tokens.unbind(1), starts, strict=True) if start == 0]
    assert len(kept) == 16 + 4 + 4
    x = torch.stack([encoder.cls_token[0].expand(2, -1), *kept], dim=1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(encoder(image), encoder.norm(x))


def test_clip_of_equal_frames_is_an_image_also_beside_clips():
    net = new_model().eval()
    clips = torch.randn(3, 1, 16, 3, 32, 32)
    clips[1] = clips[1, :, :1]
    target = torch.tensor([0, 4, 5])
    of_clips = net({"inputs": clips, "target": target})
    of_image = net({"inputs": clips[1:2, :, :1], "target": target[1:2]})
    torch.testing.assert_close(of_clips[1:2], of_image)
    alone = net({"inputs": clips[2:], "target": target[2:]})
    torch.testing.assert_close(of_clips[2:], alone)
    tokens = net.encoder(clips[:, 0])
    assert (tokens.abs().sum(dim=2) > 0).sum(dim=1).tolist() == [45, 1 + 24, 45]

    last = clips.clone()
    last[0, :, -2:] += 1.0  # two frames that only a tube of several frames sees
    assert not torch.allclose(net({"inputs": last, "target": target})[0], of_clips[0])


def test_logits_are_those_of_a_learnt_query_that_attends_to_the_tokens_of_a_sample():
    net = new_model().eval()
    neck, heads = net.neck, ENCODER["num_heads"]
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    clips = torch.randn(2, 16, 3, 32, 32)
    clips[1] = clips[1, :1]  # an image
    expected = []
    for tokens, count in zip(net.encoder(clips), (45, 25), strict=True):
        tokens = tokens[tokens.abs().sum(dim=1) > 0]
        assert len(tokens) == count
        query = neck.q(neck.latent[0, 0]).view(heads, -1)
        keys, values = neck.kv(tokens).view(count, 2, heads, -1).unbind(1)
        joined = []
        for head in range(heads):
            weights = (keys[:, head] @ query[head] / 4).softmax(dim=0)  # 4 = sqrt(48 / 3)
            joined.append(weights @ values[:, head])
        feature = neck.proj(torch.cat(joined))
        feature = feature + neck.mlp(neck.norm(feature))
        expected.append(torch.cat([head(feature).log_softmax(dim=0) for head in net.head]))
    batch = {"inputs": clips[:, None], "target": torch.tensor([0, 4])}
    torch.testing.assert_close(net(batch)[:, 0], torch.stack(expected))


def test_image_encoder_gives_blocks_and_interpolated_kernels():
    source = Encoder(**ENCODER)
    torch.nn.init.normal_(source.patch_embed["proj"].bias)
    net = new_model()
    state = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    report = load_pretrained(net, state)
    assert not [name for name in report["missing"] if name.startswith("encoder.")]
    assert torch.equal(net.encoder.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)

    kernel = source.patch_embed["proj"].weight  # (D, 3, 8, 8)
    first, second, third = net.encoder.patch_embed["tubes"]
    assert torch.equal(net.encoder.patch_embed["proj"].weight[:, :, 0], kernel)
    # A half or a quarter of the side: the mean of the two middle pixels along each side.
    for tube, middle, frames in ((first, [0, 2, 4, 6], 4), (second, [1, 5], 8)):
        step = 8 // len(middle)
        count = len(tube.weight)
        pixels = kernel[:count]
        rows = [pixels[:, :, at] + pixels[:, :, at + 1] for at in middle]
        pixels = torch.stack(rows, dim=2) / 2
        columns = [pixels[..., at] + pixels[..., at + 1] for at in middle]
        pixels = torch.stack(columns, dim=3) / 2
        expected = (pixels * step**2 / frames)[:, :, None].expand(-1, -1, frames, -1, -1)
        torch.testing.assert_close(tube.weight, expected)
        assert torch.equal(tube.bias, source.patch_embed["proj"].bias[:count])
    assert third.weight.shape == (48, 3, 2, 6, 6)


def test_kernel_that_is_linear_in_the_place_stays_so_on_six_pixels():
    base, down, right = torch.randn(3, 48, 3, 1, 1)
    at = torch.arange(8.0)
    source = Encoder(**ENCODER)
    with torch.no_grad():
        source.patch_embed["proj"].weight.copy_(base + down * at[:, None] + right * at)
    net = new_model()
    load_pretrained(net, {f"encoder.{key}": value for key, value in source.state_dict().items()})
    at = (torch.arange(6) + 0.5) * 8 / 6 - 0.5  # the centres of six pixels, in the eight
    expected = (base + down * at[:, None] + right * at) * (8 / 6) ** 2 / 2  # of two frames
    third = net.encoder.patch_embed["tubes"][2].weight
    torch.testing.assert_close(third, expected[:, :, None].expand(-1, -1, 2, -1, -1))


def test_kernels_of_a_trained_model_are_loaded_as_they_are():
    source, net = new_model(), new_model()
    report = load_pretrained(net, source.state_dict())
    assert not report["missing"] and not report["resized"]
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_layer_decay_counts_all_tubes_to_the_embedding():
    net = new_model()
    groups = build_optimizer(net, 256, base_lr=1.0, layer_decay=0.5).param_groups
    rates = {id(one): group["lr"] for group in groups for one in group["params"]}
    embedding = {rates[id(one)] for one in net.encoder.patch_embed.parameters()}
    assert embedding == {0.5**3} and rates[id(net.neck.latent)] == 1.0


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    """The arguments of six steps of the recipe, on clips and on images."""
    return [
        str(RECIPE),
        f"data.streams=[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]",
        "data.global_train_batch_size=40",
        "data.num_workers=0",
        f"eval_data.paths=[{demo}/test_videos, {demo}/test_images]",
        "model.depth=1",
        "schedule={t_warmup: 1ba, t_max: 2ep}",
        "trainer.max_duration=2ep",
        "trainer.eval_interval=2ep",
        "checkpoints={interval: 1ba, keep: 9}",
    ]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tubevit")
    run_stage(finetune, [*arguments, "run_name=one"], folder)
    return folder


def weights_of(folder: Path, run_name: str) -> dict[str, Tensor]:
    path = folder / "runs" / run_name / "checkpoints" / LATEST
    return torch.load(path, weights_only=False)["state"]["model"]


def test_resumed_run_is_bit_identical(arguments, uninterrupted, tmp_path):
    arguments = [*arguments, "run_name=other"]
    run_stage(finetune, [*arguments, "trainer.max_duration=4ba"], tmp_path)
    (tmp_path / "runs" / "other" / "result.json").unlink()
    run_stage(finetune, arguments, tmp_path)
    assert losses(tmp_path, "other") == losses(uninterrupted, "one")
    expected, found = weights_of(uninterrupted, "one"), weights_of(tmp_path, "other")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoint_is_evaluated_as_in_training(demo, uninterrupted):
    checkpoint = f"checkpoint={uninterrupted}/runs/one/checkpoints/{LATEST}"
    data = f"accuracy={{paths: [{demo}/test_videos, {demo}/test_images], crop_pct: 1.0}}"
    run_stage(evaluation, ["run_name=both", checkpoint, data], uninterrupted)
    found = json.loads((uninterrupted / "runs/both/eval.json").read_text())
    assert found["top1"] == read_result(uninterrupted, "one")["metrics/eval/top1"]


def finetune_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(finetune, arguments, Path(folder))


def test_two_ranks_train_as_one(arguments, uninterrupted, tmp_path, on_ranks):
    on_ranks(2, finetune_rank, str(tmp_path), [*arguments, "run_name=two"])
    assert losses(tmp_path, "two") == pytest.approx(losses(uninterrupted, "one"), rel=1e-5)
    top1 = [read_result(tmp_path, "two"), read_result(uninterrupted, "one")]
    assert len({result["metrics/eval/top1"] for result in top1}) == 1
    ours, theirs = weights_of(tmp_path, "two"), weights_of(uninterrupted, "one")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.pool=cls", "model.pool=cls: "),
        ("model.num_frames=8", "a tube of [8, 4, 4] at [2, 4, 4] must fit into a clip of [8, 32"),
        ("model.patch_size=16", "exactly one must be a patch of an image, with kernel=[1, 16, 16]"),
        (
            "model.tubes=[{kernel: [1, 8, 8], stride: [1, 8, 8], space_to_depth: [1, 3, 1]}]",
            "space_to_depth=[1, 3, 1]: must divide embed_dim=64",
        ),
        ("model.tubes=[{kernel: [1, 8, 8], strides: [1, 8, 8]}]", "did you mean stride?"),
        ("model.tubes=[{kernel: [1, 8], stride: [1, 8, 8]}]", "model.tubes"),
        ("model.tubes=[{kernel: [1, 8, 8], stride: [1, 0, 8]}]", "model.tubes"),
        ("model.tubes=[]", "exactly one must be a patch"),
        ("model.depth_maps=true", "model.depth_maps=true: is not a key of this block"),
        ("model.modality=depth", "model.modality=depth: is not a key of this block"),
        (
            "augment.erasing=0.25",
            "augment.erasing=0.25: must be 0 with method=tubevit",
        ),
    ],
)
def test_mistake_in_the_tubes_is_named(arguments, tmp_path, change, message):
    assert message in error_of(finetune, [*arguments, change], tmp_path)
    assert not (tmp_path / "runs").exists()


def test_erasing_must_be_given_since_its_default_is_not_zero():
    assert FinetuningViews.erasing > 0
    net = new_model()
    with pytest.raises(ValueError, match=r"augment\.erasing: must be 0 with method=tubevit"):
        net.check_augment({})
    net.check_augment({"erasing": 0.0})
