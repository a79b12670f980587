"""Pictures of a model: reconstructions, attention, nearest neighbours, confusion, losses."""

import functools
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from composer.utils import dist
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import make_grid, save_image

from model import Encoder, ViCMAE, patchify
from shards.augment import MEAN, STD, normalise
from shards.format import UNREADABLE
from shards.storage import write_picture
from shards.views import EvalViews

SMALLEST = 96  # pixels of a sample in a picture: smaller samples are enlarged
LONGEST = 40  # characters of a class name in a picture


def draws_safely(draw: Callable[..., None]) -> Callable[..., None]:
    """Make a function that draws a picture `to` print a line where it would raise an error."""

    @functools.wraps(draw)
    def draw_or_warn(*args, **keywords) -> None:
        try:
            draw(*args, **keywords)
        except Exception as error:  # a picture must never cost a result
            to = inspect.signature(draw).bind(*args, **keywords).arguments["to"]
            reason = " ".join(str(error).split())
            print(f"{to} could not be drawn: {type(error).__name__}: {reason}")

    return draw_or_warn


def shortened(name: str) -> str:
    """Return a name on one line, cut to LONGEST characters."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


@draws_safely
def draw_losses(lines: list[dict], to: Path) -> None:
    """Draw every training loss in the lines of a metrics.jsonl against the step."""
    names = sorted({key for line in lines for key in line if key.startswith("loss/train/")})
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        logged = [line for line in lines if name in line]
        steps, values = [line["step"] for line in logged], [line[name] for line in logged]
        axis.plot(steps, values, linewidth=0.8)
        axis.set_title(name.removeprefix("loss/train/"), parse_math=False)
        axis.set_xlabel("step")
    write_picture(to, partial(figure.savefig, dpi=120))


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Invert model.patchify for square images: (B, N, P) -> (B, 3, H, W)."""
    B, N, _ = patches.shape
    h, p = round(N**0.5), patch_size
    x = patches.reshape(B, h, h, p, p, 3).permute(0, 5, 1, 3, 2, 4)  # (B, 3, h, p, w, p)
    return x.reshape(B, 3, h * p, h * p)


def pick_samples(paths: list[str], encoder: Encoder, run: Path, count: int) -> Tensor:
    """Return `count` views uint8 (T, 3, H, W), evenly spaced over some data sets in turn."""
    size, frames = encoder.img_size, encoder.num_frames
    report = run / UNREADABLE
    sets = [EvalViews([path], size, frames, crop_pct=1.0, unreadable=report) for path in paths]
    picked = []
    for number in range(count):
        data = sets[number % len(sets)]
        picked.append(data[int(number / count * len(data))]["inputs"][0])
    return torch.stack(picked)  # (count, T, 3, H, W)


@draws_safely
@torch.no_grad()
def draw_reconstructions(model: ViCMAE, paths: list[str], to: Path, count: int = 8) -> None:
    """Draw `count` samples in four rows: original, masked, predicted, predicted where masked.

    Of a clip, the first frame is drawn. With FSDP, all ranks must call this.
    """
    encoder = model.encoder
    device = next(model.parameters()).device
    views = normalise(pick_samples(paths, encoder, to.parent, count).to(device))
    noise = torch.rand(count, encoder.num_patches, generator=torch.Generator().manual_seed(0))
    ids_keep, ids_restore, mask = model.masking(noise.to(device))
    tokens = encoder(views if encoder.num_frames > 1 else views[:, 0], ids_keep)
    pred = model.decoder(tokens, ids_restore).float()  # (count, N, P)
    target = patchify(views, encoder.patch_size, model.tubelet_size)
    if model.norm_pix_loss:
        # The prediction is relative to the mean and the deviation of its patch.
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    removed = mask[:, :, None].bool()
    masked, inpainted = target.masked_fill(removed, 0.0), torch.where(removed, pred, target)
    rows = torch.cat([target, masked, pred, inpainted])
    frame = target.shape[2] // model.tubelet_size  # numbers of one frame of a tubelet
    images = unpatchify(rows[:, : encoder.grid**2, :frame], encoder.patch_size)
    images = denormalise(images).clamp(0, 1)
    if dist.get_global_rank() == 0:
        enlarged = F.interpolate(images, scale_factor=max(1, SMALLEST // encoder.img_size))
        grid = make_grid(enlarged, nrow=count, pad_value=1.0)
        write_picture(to, partial(save_image, grid))


def denormalise(images: Tensor) -> Tensor:
    """Invert shards.augment.normalise, to values in [0, 1]."""
    offset = [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
    return normalize(images, offset, [1 / std for std in STD])


def first_frames(views: Dataset, numbers: Tensor) -> Tensor:
    """Return the first frame of some samples of EvalViews: (n, 3, H, W) in [0, 1]."""
    frames = [views[number]["inputs"][0, 0] for number in numbers.tolist()]
    return torch.stack(frames).float() / 255


@draws_safely
@torch.autocast("cpu", enabled=False)
def draw_neighbours(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    views: list[Dataset],
    to: Path,
    count: int = 8,
    k: int = 5,
) -> None:
    """Draw `count` queries, evenly spaced, each beside its k nearest samples of the bank by cosine.

    A neighbour of the query's class has a green frame, any other neighbour a red frame.

    Args:
        bank, queries: features (n, D) and labels (n,).
        views: the samples of the bank and of the queries.
    """
    picked = torch.linspace(0, len(queries[1]) - 1, count).long()
    cosine = F.normalize(queries[0][picked], dim=1) @ F.normalize(bank[0], dim=1).T
    nearest = cosine.topk(min(k, len(bank[1])), dim=1).indices.cpu()  # (count, k)
    right = (bank[1][nearest] == queries[1][picked, None]).cpu()
    colours = torch.stack([~right, right, torch.zeros_like(right)], dim=2).float()  # (count, k, 3)
    colours = F.pad(colours, (0, 0, 1, 0), value=1.0)  # (count, 1 + k, 3), white for the query
    found = first_frames(views[0], nearest.flatten()).unflatten(0, nearest.shape)
    asked = first_frames(views[1], picked)[:, None]
    images = torch.cat([asked, found], dim=1).flatten(0, 1)  # (count * (1 + k), 3, H, W)
    images = F.interpolate(images, scale_factor=max(1, SMALLEST // images.shape[-1]))
    framed = F.pad(images, (4, 4, 4, 4), value=-1.0)
    framed = torch.where(framed < 0, colours.flatten(0, 1)[:, :, None, None], framed)
    grid = make_grid(framed, nrow=1 + nearest.shape[1], pad_value=1.0)
    write_picture(to, partial(save_image, grid))


@draws_safely
def draw_confusion(counts: Tensor, classes: list[str], to: Path) -> None:
    """Draw a confusion matrix (C, C), true classes as rows, each row as fractions of its class."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    fractions = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    picture = axis.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, label="fraction of the true class")
    axis.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 40:  # more names could not be read
        names = [shortened(name) for name in classes]
        fonts = ["DejaVu Sans", *(font for font in get_font_names() if "CJK" in font)]
        style = {"parse_math": False, "fontfamily": fonts}  # "$" is part of a name
        axis.set_xticks(range(len(names)), names, rotation=90, **style)
        axis.set_yticks(range(len(names)), names, **style)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as boxes
        write_picture(to, partial(figure.savefig, dpi=120))


@torch.no_grad()
def last_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the attention of the last block on normalised images: (B, heads, 1 + N, 1 + N).

    Row i is the distribution of token i over all tokens, CLS first.
    """
    attn, inputs = encoder.blocks[-1].attn, []
    with attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        encoder(images)
    q, k, _ = attn.qkv(inputs[0]).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)
    return scores.softmax(dim=-1)


@draws_safely
def draw_attention(encoder: Encoder, paths: list[str], to: Path, count: int = 8) -> None:
    """Draw `count` samples, evenly spaced, above maps of the attention that their patches receive.

    A map is the mean over the heads of the last block and over the attending patches, from black,
    the least of the image, to white, the most. The attention of CLS is not drawn: ViC-MAE's losses
    do not train CLS.
    """
    views = EvalViews(paths, encoder.img_size, crop_pct=1.0, unreadable=to.parent / UNREADABLE)
    images = first_frames(views, torch.linspace(0, len(views) - 1, count).long())
    normalised = normalize(images.to(encoder.cls_token.device), MEAN, STD)
    attention = last_attention(encoder, normalised).cpu()
    received = attention[:, :, 1:, 1:].mean(dim=(1, 2))  # (B, N)
    received = received.unflatten(1, (1, encoder.grid, encoder.grid))  # (B, 1, h, w)
    scale = max(1, SMALLEST // encoder.img_size)
    maps = F.interpolate(received, scale_factor=scale * encoder.patch_size, mode="bilinear")
    above = make_grid(F.interpolate(images, scale_factor=scale), nrow=count, pad_value=1.0)
    below = make_grid(maps, nrow=count, pad_value=1.0, normalize=True, scale_each=True)
    write_picture(to, partial(save_image, torch.cat([above, below], dim=1)))
