"""evaluation/pictures.py."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from composer.utils import dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import make_grid, save_image

from model import Encoder, ViCMAE, patchify, random_masking, unpatchify
from shards.augment import MEAN, STD, normalise
from shards.format import UNREADABLE
from shards.storage import write_picture
from shards.views import EvalViews


def first_frames(views: Dataset, numbers: Tensor) -> Tensor:
    """The first frame of the first view of some of EvalViews' samples, by their numbers (n,) -> (n, 3, H, W) in 0..1."""
    return torch.stack([views[number]["inputs"][0, 0] for number in numbers.tolist()]).float() / 255


@torch.autocast("cpu", enabled=False)
def draw_neighbours(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    views: list[Dataset],
    to: Path,
    count: int = 8,
    k: int = 5,
) -> None:
    """Draw a row for each of `count` queries, evenly picked: itself, then its k nearest of the bank by cosine.

    A neighbour of the query's class has a green frame, any other a red one.

    Args:
        bank, queries: features (n, D) and labels (n,).
        views: EvalViews of the bank, of the queries.
    """
    picked = torch.linspace(0, len(queries[1]) - 1, count).long()
    cosine = F.normalize(queries[0][picked], dim=1) @ F.normalize(bank[0], dim=1).T
    nearest = cosine.topk(min(k, len(bank[1])), dim=1).indices  # (count, k)
    right = bank[1][nearest] == queries[1][picked, None]
    colours = torch.stack([~right, right, torch.zeros_like(right)], dim=2).float()  # (count, k, 3)
    colours = F.pad(colours, (0, 0, 1, 0), value=1.0).flatten(
        0, 1
    )  # (count * (1 + k), 3), white around the query
    found = first_frames(views[0], nearest.flatten()).unflatten(
        0, nearest.shape
    )  # (count, k, 3, H, W)
    images = torch.cat([first_frames(views[1], picked)[:, None], found], dim=1).flatten(0, 1)
    images = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]))
    framed = F.pad(images, (4, 4, 4, 4), value=-1.0)
    framed = torch.where(framed < 0, colours[:, :, None, None], framed)
    write_picture(
        to, partial(save_image, make_grid(framed, nrow=1 + nearest.shape[1], pad_value=1.0))
    )


def draw_confusion(counts: Tensor, classes: list[str], to: Path) -> None:
    """Draw a confusion matrix, each row as fractions of its class; with names, where they can be read."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(
        counts / counts.sum(dim=1, keepdim=True).clamp(min=1), vmin=0, vmax=1, cmap="Blues"
    )
    figure.colorbar(picture, label="fraction of the true class")
    axis.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 40:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
    write_picture(to, partial(figure.savefig, dpi=120))


@torch.no_grad()
def last_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of the last block on images (B, 3, H, W), normalised -> (B, heads, 1 + N, 1 + N), CLS first.

    Row i says how token i, which looks, shares itself out among all: it sums to 1.
    """
    attn, seen = encoder.blocks[-1].attn, []
    with attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        encoder(images)
    q, k, _ = (
        attn.qkv(seen[0]).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    )  # (B, heads, 1 + N, d)
    return (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(dim=-1)


def draw_attention(encoder: Encoder, paths: list[str], to: Path, count: int = 8) -> None:
    """Draw `count` samples, evenly picked, and below each how much its patches are looked at in the last block.

    That is the mean over heads and over the patches that look, from the least of the image, black, to the most, white. What
    CLS looks at, as is usually drawn, would say less: ViC-MAE's losses have no target for it.
    """
    views = EvalViews(paths, encoder.img_size, crop_pct=1.0, unreadable=to.parent / UNREADABLE)
    images = first_frames(views, torch.linspace(0, len(views) - 1, count).long())
    attention = last_attention(
        encoder, normalize(images.to(encoder.cls_token.device), MEAN, STD)
    ).cpu()
    looked = (
        attention[:, :, 1:, 1:].mean(dim=(1, 2)) * encoder.num_patches
    )  # (B, N), 1 if all are looked at alike
    looked = looked.unflatten(1, (1, encoder.grid, encoder.grid))  # (B, 1, h, w)
    scale = max(1, 96 // encoder.img_size)
    looked = F.interpolate(
        looked, scale_factor=scale * encoder.patch_size, mode="bilinear"
    )  # (B, 1, H, W)
    above = make_grid(F.interpolate(images, scale_factor=scale), nrow=count, pad_value=1.0)
    below = make_grid(looked, nrow=count, pad_value=1.0, normalize=True, scale_each=True)
    write_picture(to, partial(save_image, torch.cat([above, below], dim=1)))


def draw_losses(lines: list[dict], to: Path) -> None:
    """Draw every training loss of the lines of a metrics.jsonl against the step."""
    names = sorted({key for line in lines for key in line if key.startswith("loss/train/")})
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(
            *zip(*[(line["step"], line[name]) for line in lines if name in line], strict=True),
            linewidth=0.8,
        )
        axis.set(title=name.removeprefix("loss/train/"), xlabel="step")
    write_picture(to, partial(figure.savefig, dpi=120))


@torch.no_grad()
def draw_reconstructions(model: ViCMAE, paths: list[str], to: Path, count: int = 8) -> None:
    """Draw four rows for `count` samples of some data sets: original, masked, reconstructed, reconstructed where masked.

    Of clips, the first frame.
    """
    device, size, frames = (
        next(model.parameters()).device,
        model.encoder.img_size,
        model.encoder.num_frames,
    )
    sets = [
        EvalViews([path], size, frames, crop_pct=1.0, unreadable=to.parent / UNREADABLE)
        for path in paths
    ]
    turns = [(sets[number % len(sets)], number / count) for number in range(count)]
    picked = [data[int(place * len(data))]["inputs"][0] for data, place in turns]
    views = normalise(torch.stack(picked).to(device))  # (B, T, 3, H, W)
    noise = torch.rand(
        count, model.encoder.num_patches, generator=torch.Generator().manual_seed(0)
    ).to(device)
    ids_keep, ids_restore, mask = random_masking(
        noise, model.mask_ratio, model.mask, model.encoder.steps
    )
    tokens = model.encoder(views if frames > 1 else views[:, 0], ids_keep)
    pred = model.decoder(tokens, ids_restore).float()  # (B, N, P)
    patch = (model.encoder.patch_size, model.tubelet_size)
    target, removed = patchify(views, *patch), mask[:, :, None].bool()
    if (
        model.norm_pix_loss
    ):  # the prediction is relative to its patch: give it the patch's mean and deviation back
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    rows = torch.cat(
        [target, target.masked_fill(removed, 0.0), pred, torch.where(removed, pred, target)]
    )
    rows = rows[
        :, : model.encoder.grid**2, : target.shape[2] // model.tubelet_size
    ]  # the first frame of a clip
    grey = [-m / s for m, s in zip(MEAN, STD, strict=True)]
    pictures = normalize(
        unpatchify(rows, model.encoder.patch_size), grey, [1 / s for s in STD]
    ).clamp(0, 1)
    if dist.get_global_rank() == 0:
        grid = make_grid(
            F.interpolate(pictures, scale_factor=max(1, 96 // size)), nrow=count, pad_value=1.0
        )
        write_picture(to, partial(save_image, grid))
