"""The augmentation of pre-training, for a whole batch at once on the device.

The data workers draw the numbers, see ViewRecipe in views.py; this module draws none.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

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
BLUR_KERNEL = (9, 5)  # height and width in pixels (source: official code)
# The official code inverts bytes from 128 on. Half a byte less, so that rounding cannot matter.
SOLARISE_FROM = 127.5 / 255


def normalise(pixels: Tensor) -> Tensor:
    """Return uint8 pixels (..., 3, H, W) as float32, less MEAN and divided by STD."""
    return normalize(pixels.float() / 255, MEAN, STD)


def augment_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Augment and normalise the views of a batch by its `augment` float32 (B, V, A), and remove it.

    `views` changes from uint8 (B, V, [T,] H, W, 3) to float32 (B, V, [T,] 3, H, W).
    """
    views = batch["views"]
    leading = views.shape[:-3]  # (B, V) or (B, V, T)
    frames_per_view = math.prod(leading[2:])
    frames = views.flatten(0, -4).permute(0, 3, 1, 2)  # (B * V * T, 3, H, W)
    parameters = batch["augment"].flatten(0, 1)  # (B * V, A)
    parameters = parameters.repeat_interleave(frames_per_view, dim=0)  # (B * V * T, A)
    augmented = normalize(augment_views(frames, parameters), MEAN, STD)
    rest = {key: value for key, value in batch.items() if key != "augment"}
    return rest | {"views": augmented.unflatten(0, leading)}


def augment_views(views: Tensor, parameters: Tensor) -> Tensor:
    """Flip, jitter, grey, blur and solarise each view by its own row of parameters (B, A).

    Views change from uint8 to float32 (B, 3, H, W) in [0, 1].

    Deviation: brightness, contrast, saturation, hue and grey are one affine map of the colours,
    clamped once at the end. Torchvision rounds and clamps after each step. Torchvision also draws
    the order of the steps, which makes no difference without clamping.
    """
    columns = parameters.float().unbind(1)
    flip, brightness, contrast, saturation, hue, grey, sigma, solarise = columns  # each (B,)
    x = views.float() / 255
    x = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)

    # Contrast scales about the mean grey of the view, which brightness has scaled before.
    colours = colour_matrix(saturation, hue, grey) * (brightness * contrast)[:, None, None]
    mean_grey = x.mean(dim=(2, 3)) @ x.new_tensor(LUMA)  # (B,)
    offset = (1 - contrast) * brightness * mean_grey
    offset = offset[:, None, None].expand(-1, 3, 1)
    x = torch.baddbmm(offset, colours, x.flatten(2)).view_as(x)
    x = x.clamp(0, 1)

    is_blurred = sigma > 0
    if is_blurred.any():
        blurred = blur_axis(x[is_blurred], sigma[is_blurred], 2, BLUR_KERNEL[0])
        x[is_blurred] = blur_axis(blurred, sigma[is_blurred], 3, BLUR_KERNEL[1])
    is_inverted = solarise.bool()[:, None, None, None] & (x >= SOLARISE_FROM)
    return torch.where(is_inverted, 1 - x, x)


def colour_matrix(saturation: Tensor, hue: Tensor, grey: Tensor) -> Tensor:
    """Return the matrices (B, 3, 3) that change saturation and hue of RGB colours.

    Deviation: hue is turned in YIQ, where a turn is a matrix; torchvision turns it in HSV.
    """
    luma = saturation.new_tensor(LUMA)
    kept_colour = (saturation * (1 - grey))[:, None, None]
    identity = torch.eye(3, device=luma.device)
    saturate = kept_colour * identity + (1 - kept_colour) * luma.expand(3, 3)  # (B, 3, 3)

    i_axis = luma.new_tensor([0.5959, -0.2746, -0.3213])
    q_axis = luma.new_tensor([0.2115, -0.5227, 0.3112])
    to_yiq = torch.stack([luma, i_axis, q_axis])  # (3, 3)
    zero, one = torch.zeros_like(hue), torch.ones_like(hue)
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    rows = [one, zero, zero, zero, cos, sin, zero, -sin, cos]
    turn = torch.stack(rows, dim=1).view(-1, 3, 3)  # (B, 3, 3)
    return saturate @ torch.linalg.inv(to_yiq) @ turn @ to_yiq


def blur_axis(x: Tensor, sigma: Tensor, axis: int, size: int) -> Tensor:
    """Return views (B, 3, H, W), each blurred along one axis by its own sigma (B,) in pixels.

    The kernel has `size` pixels; pixels beyond an edge are reflected.
    """
    distance = torch.arange(-(size // 2), size // 2 + 1, device=x.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (B, size)
    weights = weights / weights.sum(dim=1, keepdim=True)
    weights = weights[:, :, None, None, None]  # (B, size, 1, 1, 1)
    half = size // 2
    padding = (half, half, 0, 0) if axis == 3 else (0, 0, half, half)
    padded = F.pad(x, padding, mode="reflect")
    length = x.shape[axis]
    return sum(padded.narrow(axis, shift, length) * weights[:, shift] for shift in range(size))
