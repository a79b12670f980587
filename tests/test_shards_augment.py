"""The augmentation on the device, against torchvision's operations."""

import colorsys

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from conftest import ROOT

from shards.augment import (
    BLUR_KERNEL,
    LUMA,
    NO_BLUR,
    PARAMETERS,
    augment_batch,
    augment_frames,
    augment_views,
    blur,
    constants,
    normalise,
)

NEUTRAL = {name: float(name in ("brightness", "contrast", "saturation")) for name in PARAMETERS}
HOST = constants(torch.device("cpu"))
KERNEL = list(BLUR_KERNEL[::-1])  # torchvision has width and height


def augmented(images: torch.Tensor, **changes: float) -> torch.Tensor:
    row = torch.tensor([list((NEUTRAL | changes).values())])
    return augment_views(images, row.expand(len(images), -1), HOST)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth coloured images, (4, 3, 48, 48) uint8."""
    coarse = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).byte()


def test_neutral_parameters_change_nothing(images):
    torch.testing.assert_close(augmented(images), images / 255, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"flip": 1.0}, TF.horizontal_flip),
        ({"brightness": 1.4}, lambda x: TF.adjust_brightness(x, 1.4)),
        ({"brightness": 0.6}, lambda x: TF.adjust_brightness(x, 0.6)),
        ({"contrast": 1.4}, lambda x: TF.adjust_contrast(x, 1.4)),
        ({"contrast": 0.6}, lambda x: TF.adjust_contrast(x, 0.6)),
        ({"saturation": 1.2}, lambda x: TF.adjust_saturation(x, 1.2)),
        ({"saturation": 0.5}, lambda x: TF.adjust_saturation(x, 0.5)),
        ({"grey": 1.0}, lambda x: TF.rgb_to_grayscale(x, 3)),
        ({"solarise": 1.0}, lambda x: TF.solarize(x, 128 / 255)),
        ({"blur_sigma": 0.3}, lambda x: TF.gaussian_blur(x, KERNEL, [0.3])),
        ({"blur_sigma": 1.7}, lambda x: TF.gaussian_blur(x, KERNEL, [1.7])),
    ],
)
def test_each_operation_equals_torchvisions(images, changes, reference):
    ours = augmented(images, **changes)
    torch.testing.assert_close(ours, reference(images / 255), atol=2e-3, rtol=0)


def hues(images: torch.Tensor) -> np.ndarray:
    pixels = images.movedim(1, -1).reshape(-1, 3).tolist()
    return np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels])


@pytest.mark.parametrize("hue", [-0.1, 0.05, 0.1])
def test_hue_turns_about_as_far_as_in_hsv_and_keeps_the_luma(images, hue):
    muted = (images / 255 - 0.5) * 0.4 + 0.5  # so that nothing is clamped
    ours = augmented((muted * 255).byte(), hue=hue)
    turned = (hues(ours) - hues(muted) + 0.5) % 1 - 0.5
    assert np.median(turned) == pytest.approx(hue, rel=0.25)
    luma = torch.tensor(LUMA)[:, None, None]
    before, after = (muted * luma).sum(dim=1), (ours * luma).sum(dim=1)
    torch.testing.assert_close(after, before, atol=5e-3, rtol=0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_whole_jitter_is_near_torchvisions_in_any_order(images, order):
    pale = images // 4 + 96  # so that nothing is clamped
    operations = (
        lambda x: TF.adjust_brightness(x, 1.1),
        lambda x: TF.adjust_contrast(x, 0.8),
        lambda x: TF.adjust_saturation(x, 1.2),
    )
    expected = pale / 255
    for step in order:
        expected = operations[step](expected)
    ours = augmented(pale, brightness=1.1, contrast=0.8, saturation=1.2)
    torch.testing.assert_close(ours, expected, atol=5e-3, rtol=0)


def test_each_view_of_a_batch_is_augmented_by_its_own_parameters(images):
    changes = [
        {"flip": 1.0, "blur_sigma": 1.7},
        {"contrast": 0.6},
        {"blur_sigma": 0.3, "solarise": 1.0},
        {"grey": 1.0},
    ]
    rows = torch.tensor([list((NEUTRAL | change).values()) for change in changes])
    together = augment_views(images, rows, HOST)
    x = images / 255
    expected = [
        TF.gaussian_blur(TF.horizontal_flip(x[0]), KERNEL, [1.7]),
        TF.adjust_contrast(x[1], 0.6),
        TF.solarize(TF.gaussian_blur(x[2], KERNEL, [0.3]), 128 / 255),
        TF.rgb_to_grayscale(x[3], 3),
    ]
    near = (together - torch.stack(expected)).abs() < 2e-3
    assert near[[0, 1, 3]].all()
    assert near[2].float().mean() > 0.99  # a pixel at the threshold may be solarised or not


def test_batch_is_normalised_by_the_mean_and_deviation_of_imagenet(images):
    row = torch.tensor(list(NEUTRAL.values())).expand(2, 2, -1)
    noise = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(0))
    views = images.permute(0, 2, 3, 1).view(2, 2, 48, 48, 3)
    result = augment_batch({"views": views, "augment": row, "noise": noise})
    imagenet = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = imagenet(images / 255)
    torch.testing.assert_close(normalise(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result["views"].flatten(0, 1), expected, atol=1e-2, rtol=0)
    assert result["noise"] is noise and set(result) == {"views", "noise"}


def test_frames_of_a_clip_are_augmented_alike():
    rng = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (2, 2, 1, 24, 24, 3), dtype=torch.uint8, generator=rng)
    jittered = NEUTRAL | {"contrast": 0.7, "hue": 0.1, "blur_sigma": 1.0}
    row = torch.tensor(list(jittered.values())).expand(2, 2, -1).clone()
    row[:, 0, PARAMETERS.index("flip")] = 1.0
    batch = {"views": frame.expand(-1, -1, 4, -1, -1, -1), "augment": row}
    views = augment_batch(batch)["views"]
    assert views.shape == (2, 2, 4, 3, 24, 24)
    assert torch.equal(views, views[:, :, :1].expand_as(views))


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """Views of 16 x 12 pixels, their parameters, and the output of an earlier implementation."""
    with np.load(ROOT / "tests" / "golden" / "augment.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def now(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    return augment_batch({name: golden[name] for name in ("views", "augment")})["views"]


def test_output_equals_the_implementation_that_blurred_the_views_with_a_sigma_alone(golden):
    sigma = golden["augment"][..., PARAMETERS.index("blur_sigma")]
    assert 0 < (sigma == 0).sum() < sigma.numel()
    torch.testing.assert_close(now(golden), golden["augmented"], rtol=0, atol=4e-6)


def test_view_without_blur_is_kept_to_the_bit(golden):
    pixels = golden["views"].flatten(0, 1).permute(0, 3, 1, 2)
    x = pixels.float() / 255
    assert torch.equal(blur(x, torch.full((len(x),), NO_BLUR)), x)


def test_augmentation_is_one_graph_that_compiles_without_a_look_at_values(golden):
    compiled = torch.compile(augment_frames, fullgraph=True, backend="eager")
    arguments = golden["views"].flatten(0, 1), golden["augment"].flatten(0, 1), HOST
    assert torch.equal(compiled(*arguments).view_as(golden["augmented"]), now(golden))
