"""The augmentation of pre-training, for a whole batch at once on the device.

The data workers draw the numbers, see ViewRecipe in views.py; this module draws none.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The columns of `augment` (B, V, A): the numbers that a view is augmented by, in this order.
PARAMETERS = (
    "flip",  # 1 to mirror the view, else 0
    "brightness",  # factor, 1 for no change
    "contrast",  # factor, 1 for no change
    "saturation",  # factor, 1 for no change
    "hue",  # turns of the colour wheel, 0 for no change
    "grey",  # 1 to remove the colour, else 0
    "blur_sigma",  # pixels, 0 for no blur
    "solarise",  # 1 to invert bright values, else 0
)

MEAN = [0.485, 0.456, 0.406]  # of ImageNet's pixels in [0, 1] (source: official code)
STD = [0.229, 0.224, 0.225]
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue (source: torchvision)
I_AXIS = (0.5959, -0.2746, -0.3213)  # of the colour space YIQ, whose first axis is LUMA
Q_AXIS = (0.2115, -0.5227, 0.3112)
BLUR_KERNEL = (9, 5)  # height and width in pixels (source: official code)
# The official code inverts bytes from 128 on. Half a byte less, so that rounding cannot matter.
SOLARISE_FROM = 127.5 / 255


# exp(-0.5 / sigma ** 2) is 0 in fp32 below 0.069: a blur by this sigma in pixels changes nothing.
NO_BLUR = 0.05


class Constants(NamedTuple):
    """Numbers that do not change, on one device."""

    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)
    luma: Tensor  # (3,)
    to_yiq: Tensor  # (3, 3)
    from_yiq: Tensor  # (3, 3)


@functools.cache
def constants(device: torch.device) -> Constants:
    """Return the constants on a device; a copy in each step would make the host wait for a GPU."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    luma = torch.tensor(LUMA)
    to_yiq = torch.stack([luma, torch.tensor(I_AXIS), torch.tensor(Q_AXIS)])
    on_host = (mean, std, luma, to_yiq, torch.linalg.inv(to_yiq))
    return Constants(*(tensor.to(device) for tensor in on_host))


def normalise(pixels: Tensor) -> Tensor:
    """Return uint8 pixels (..., 3, H, W) as float32, less MEAN and divided by STD."""
    mean, std, *_ = constants(pixels.device)
    return (pixels.float() / 255 - mean) / std


def augment_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Augment and normalise the views of a batch by its `augment` float32 (B, V, A), and remove it.

    `views` changes from uint8 (B, V, [T,] H, W, 3) to float32 (B, V, [T,] 3, H, W). On CUDA, the
    operations are fused by torch.compile, which TORCHDYNAMO_DISABLE=1 turns off.
    """
    views = batch["views"]
    leading = views.shape[:-3]  # (B, V) or (B, V, T)
    frames_per_view = math.prod(leading[2:])
    frames = views.flatten(0, -4)  # (B * V * T, H, W, 3)
    parameters = batch["augment"].flatten(0, 1)  # (B * V, A)
    parameters = parameters.repeat_interleave(frames_per_view, dim=0)  # (B * V * T, A)
    augment = compiled_augment() if views.is_cuda else augment_frames
    augmented = augment(frames, parameters, constants(views.device))
    rest = {key: value for key, value in batch.items() if key != "augment"}
    return rest | {"views": augmented.unflatten(0, leading)}


@functools.cache
def compiled_augment() -> Callable[[Tensor, Tensor, Constants], Tensor]:
    """Return augment_frames, compiled at its first call."""
    return torch.compile(augment_frames)


def augment_frames(frames: Tensor, parameters: Tensor, fixed: Constants) -> Tensor:
    """Augment and normalise frames uint8 (B, H, W, 3) by parameters (B, A): (B, 3, H, W)."""
    augmented = augment_views(frames.permute(0, 3, 1, 2), parameters, fixed)
    return augmented.sub_(fixed.mean).div_(fixed.std)


def augment_views(views: Tensor, parameters: Tensor, fixed: Constants) -> Tensor:
    """Flip, jitter, grey, blur and solarise each view by its own row of parameters (B, A).

    Views change from uint8 to float32 (B, 3, H, W) in [0, 1]. No operation depends on a value that
    the host would have to read: views without blur are blurred by NO_BLUR.

    Deviation: brightness, contrast, saturation, hue and grey are one affine map of the colours,
    clamped once at the end. Torchvision rounds and clamps after each step. Torchvision also draws
    the order of the steps, which makes no difference without clamping.
    """
    columns = parameters.float().unbind(1)
    flip, brightness, contrast, saturation, hue, grey, sigma, solarise = columns  # each (B,)
    x = views.float() / 255
    x = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)

    # Contrast scales about the mean grey of the view, which brightness has scaled before.
    colours = colour_matrix(saturation, hue, grey, fixed)
    colours = colours * (brightness * contrast)[:, None, None]
    mean_grey = x.mean(dim=(2, 3)) @ fixed.luma  # (B,)
    offset = (1 - contrast) * brightness * mean_grey
    offset = offset[:, None, None].expand(-1, 3, 1)
    x = torch.baddbmm(offset, colours, x.flatten(2)).view_as(x).clamp_(0, 1)

    x = blur(x, sigma.clamp(min=NO_BLUR))
    inverted_from = torch.where(solarise.bool(), SOLARISE_FROM, math.inf)[:, None, None, None]
    return torch.where(x >= inverted_from, 1 - x, x)


def colour_matrix(saturation: Tensor, hue: Tensor, grey: Tensor, fixed: Constants) -> Tensor:
    """Return the matrices (B, 3, 3) that change saturation and hue of RGB colours.

    Deviation: hue is turned in YIQ, where a turn is a matrix; torchvision turns it in HSV.
    """
    kept_colour = (saturation * (1 - grey))[:, None, None]
    identity = torch.eye(3, device=hue.device)
    saturate = kept_colour * identity + (1 - kept_colour) * fixed.luma.expand(3, 3)  # (B, 3, 3)

    zero, one = torch.zeros_like(hue), torch.ones_like(hue)
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    rows = [one, zero, zero, zero, cos, sin, zero, -sin, cos]
    turn = torch.stack(rows, dim=1).view(-1, 3, 3)  # (B, 3, 3)
    return saturate @ fixed.from_yiq @ turn @ fixed.to_yiq


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Return views (B, 3, H, W), each blurred by its own sigma (B,) in pixels.

    The kernel has BLUR_KERNEL pixels; pixels beyond an edge are reflected.
    """
    vertical, horizontal = (size // 2 for size in BLUR_KERNEL)
    x = F.pad(x, (horizontal, horizontal, vertical, vertical), mode="reflect")
    for axis, size in ((2, BLUR_KERNEL[0]), (3, BLUR_KERNEL[1])):
        distance = torch.arange(-(size // 2), size // 2 + 1, device=x.device)
        weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (B, size)
        weights = weights / weights.sum(dim=1, keepdim=True)
        weights = weights[:, :, None, None, None]  # (B, size, 1, 1, 1)
        length = x.shape[axis] - size + 1
        blurred = x.narrow(axis, 0, length) * weights[:, 0]
        for shift in range(1, size):
            blurred += x.narrow(axis, shift, length) * weights[:, shift]
        x = blurred
    return x
