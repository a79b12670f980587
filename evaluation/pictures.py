"""Pictures of a model: reconstructions, attention, nearest neighbours, confusion, curves."""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from composer.utils import dist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.transforms import Bbox, IdentityTransform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import make_grid

from model import Encoder, ViCMAE
from shards.augment import MEAN, STD, constants, normalise
from shards.storage import write_picture
from shards.views import EvalViews

SMALLEST = 128  # pixels of a sample in a picture: smaller samples are enlarged
LONGEST = 40  # characters of a class name in a picture
DPI = 128  # pixels of an inch: a power of two, so that a size in inches is exact
BORDER, GAP = 4, 4  # pixels: the frame around a tile, and its distance from the next tile
POINTS = 2000  # of a curve at most
ACCURACIES = {  # what metrics.jsonl calls each: the accuracies in the curves
    "k-NN": ("knn/random", "knn/trained"),
    "online linear probe": ("online_probe",),
    "top-1": ("metrics/eval/top1",),
    "top-5": ("metrics/eval/top5",),
}
LOSSES = {  # what is logged of each step or epoch: (name, title), in the order of the curves
    "loss/train/total": "total loss",
    "loss/train/reconstruction": "reconstruction loss",
    "loss/train/contrastive": "contrastive loss",
    "loss/train/accuracy": "fraction of views that find their partner",
    "loss/train/feature_std": "standard deviation of the features",
    "effective_rank": "effective rank of the features",
}
RIGHT, WRONG = "#1a7f37", "#cf222e"  # green and red, dark enough for text


def draws_safely(draw: Callable[..., None]) -> Callable[..., None]:
    """Wrap a function that draws a picture `to`: print its errors in a line, do not raise them."""

    @functools.wraps(draw)
    def draw_or_warn(*args, **keywords) -> None:
        try:
            draw(*args, **keywords)
        except Exception as error:  # a picture must never cost a result
            to = inspect.signature(draw).bind(*args, **keywords).arguments["to"]
            reason = " ".join(str(error).split())
            print(f"{to} could not be drawn: {type(error).__name__}: {reason}")

    return draw_or_warn


def shortened(name: str, longest: int = LONGEST) -> str:
    """Return a name on one line, cut to `longest` characters."""
    line = " ".join(name.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= longest else line[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def text_style() -> dict:
    """Return arguments of matplotlib's texts with which any name is drawn as it is."""
    fonts = ["DejaVu Sans", *(font for font in get_font_names() if "CJK" in font)]
    return {"parse_math": False, "fontfamily": fonts}  # "$" is part of a name


def write_figure(figure: Figure, to: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as boxes
        write_picture(to, partial(figure.savefig, dpi=DPI))


def enlarge(images: Tensor) -> Tensor:
    """Repeat the pixels of images (n, 3, H, H) until they have at least SMALLEST a side."""
    return F.interpolate(images, scale_factor=-(-SMALLEST // images.shape[-1]))


def draw_tiles(
    images: Tensor,
    to: Path,
    title: str,
    columns: int,
    rows: Sequence[str] = (),
    captions: Sequence[str] = (),
    colours: Sequence[str] = (),
) -> None:
    """Draw images (n, 3, H, H) in [0, 1] in rows, enlarged.

    Args:
        rows: a label for each row.
        captions: a text of some lines for each image, drawn above it.
        colours: of the frame of each image, and of its caption unless it is white.
    """
    tiles, count = enlarge(images.float()), len(images)
    side = tiles.shape[-1]
    line = max(16, side // 10)  # pixels from line to line
    above = line * max((text.count("\n") + 1 for text in captions), default=0)
    height, width = above + side + 2 * BORDER + GAP, side + 2 * BORDER + GAP
    cells = torch.ones(count, 3, height, width)
    colours = colours or ["white"] * count
    frames = torch.tensor([to_rgb(colour) for colour in colours])
    cells[:, :, above:-GAP, :-GAP] = frames[:, :, None, None]
    inner = slice(above + BORDER, above + BORDER + side), slice(BORDER, BORDER + side)
    cells[:, :, *inner] = tiles.cpu()
    sheet = make_grid(cells, columns, padding=0, pad_value=1.0).permute(1, 2, 0)
    left, top = 2 * line if rows else BORDER, len(sheet)
    size = max(left + sheet.shape[1], line * len(title)), top + 3 * line
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
    figure.figimage(sheet.numpy(), xo=left)
    # Texts are placed by pixels from the lower left corner.
    style = {"transform": IdentityTransform(), "va": "center"} | text_style()
    figure.text(left + BORDER, top + 1.5 * line, title, fontsize=0.6 * line, **style)
    for row, label in enumerate(rows):
        middle = top - row * height - above - BORDER - side / 2
        figure.text(line, middle, label, fontsize=line / 2, rotation=90, ha="center", **style)
    for number, text in enumerate(captions):
        x, y = left + number % columns * width, top - number // columns * height
        box = Bbox.from_bounds(x, y - above, width, above)  # without it, texts could overlap
        colour = "black" if colours[number] == "white" else colours[number]
        given = {"color": colour, "fontsize": 0.44 * line, "clip_on": True, "clip_box": box}
        given = style | given | {"va": "center_baseline"}  # names with and without descenders
        for place, name in enumerate(text.split("\n")):
            name = shortened(name, 16 * side // (7 * line))
            figure.text(x + BORDER, y - (place + 0.5) * line, name, **given)
    write_figure(figure, to)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the values (n,) around each."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def series(lines: list[dict], *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of everything that was logged by these names."""
    pairs = [(line["step"], line[name]) for line in lines for name in names if name in line]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def plot_loss(axis: Axes, lines: list[dict], name: str) -> None:
    """Plot a loss of each step, and its mean over a fiftieth of all steps, or over 5 steps."""
    steps, values = series(lines, name)
    window = max(1, len(values) // 50, min(5, len(values) // 10))
    thin = slice(None, None, -(-len(values) // POINTS))
    axis.plot(steps[thin], values[thin], linewidth=0.6, alpha=0.35)
    label = f"mean of {window} steps" if window > 1 else None
    axis.plot(steps[thin], smoothed(values, window)[thin], color="C0", label=label)
    axis.set_title(LOSSES.get(name, name.removeprefix("loss/train/")), parse_math=False)


def plot_accuracies(axis: Axes, lines: list[dict]) -> None:
    """Plot every accuracy that was measured during the training, with its last value."""
    for label, names in ACCURACIES.items():
        steps, values = series(lines, *names)
        if len(steps):
            axis.plot(steps, values, marker="o", markersize=3, label=f"{label}: {values[-1]:.3f}")
    axis.set_title("accuracy on labelled data")


@draws_safely
def draw_curves(lines: list[dict], to: Path) -> None:
    """Draw every training loss and accuracy in the lines of a metrics.jsonl against the step."""
    logged = {key for line in lines for key in line}
    losses = [name for name in LOSSES if name in logged]
    losses += sorted(key for key in logged - {*LOSSES} if key.startswith("loss/train/"))
    if not losses:
        return
    plots = [partial(plot_loss, lines=lines, name=name) for name in losses]
    if logged & {name for names in ACCURACIES.values() for name in names}:
        plots.insert(1, partial(plot_accuracies, lines=lines))
    columns = min(3, len(plots))
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, plot in zip(axes, plots, strict=False):
        plot(axis)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in axes[len(plots) :]:
        axis.set_axis_off()
    figure.suptitle("the training, step by step\n", fontsize=13)
    write_figure(figure, to)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Invert model.patchify for square images: (B, N, P) -> (B, 3, H, W)."""
    B, N, _ = patches.shape
    h, p = round(N**0.5), patch_size
    x = patches.reshape(B, h, h, p, p, 3).permute(0, 5, 1, 3, 2, 4)  # (B, 3, h, p, w, p)
    return x.reshape(B, 3, h * p, h * p)


def pick_samples(paths: list[str], encoder: Encoder, run: Path, count: int) -> Tensor:
    """Return `count` views uint8 (T, 3, H, W), evenly spaced over some data sets in turn."""
    size, frames = encoder.img_size, encoder.num_frames
    sets = [EvalViews([path], size, frames, crop_pct=1.0, run=run) for path in paths]
    picked = []
    for number in range(count):
        data = sets[number % len(sets)]
        picked.append(data[int(number / count * len(data))]["inputs"][0])
    return torch.stack(picked)  # (count, T, 3, H, W)


@draws_safely
@torch.no_grad()
def draw_reconstructions(model: ViCMAE, paths: list[str], to: Path, count: int = 8) -> None:
    """Draw `count` samples in four rows: original, masked, reconstruction, pasted where masked.

    Of a clip, the first frame is drawn. With FSDP, all ranks must call this.
    """
    encoder = model.encoder
    device = next(model.parameters()).device
    views = normalise(pick_samples(paths, encoder, to.parent, count).to(device))
    noise = torch.rand(count, encoder.num_patches, generator=torch.Generator().manual_seed(0))
    ids_keep, ids_restore, mask = model.masking(noise.to(device))
    tokens = encoder(views if encoder.num_frames > 1 else views[:, 0], ids_keep)
    pred = model.decoder(tokens, ids_restore, encoder.num_patches).float()  # (count, N, P)
    target = model.target_patches(views)
    if model.norm_pix_loss:
        mean, std = model.patch_statistics(target)
        pred = pred * std + mean
    removed = mask[:, :, None].bool()
    masked, inpainted = target.masked_fill(removed, 0.0), torch.where(removed, pred, target)
    rows = torch.cat([target, masked, pred, inpainted])
    frame = encoder.patch_size**2 * 3  # numbers of the first frame of a tubelet
    images = unpatchify(rows[:, : encoder.grid**2, :frame], encoder.patch_size)
    mean, std, *_ = constants(images.device)
    images = (images * std + mean).clamp(0, 1)
    if dist.get_global_rank() == 0:
        title = f"reconstructions, {mask.mean():.0%} of the patches masked"
        labels = ["original", "masked", "reconstruction", "pasted"]
        draw_tiles(images, to, title, count, labels)


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
    classes: list[str],
    to: Path,
    count: int = 8,
    k: int = 5,
) -> None:
    """Draw `count` queries, evenly spaced, each beside its k nearest samples of the bank by cosine.

    A neighbour of the query's class has a green frame, any other neighbour a red frame.

    Args:
        bank, queries: features (n, D) and labels (n,).
        views: the samples of the bank and of the queries.
        classes: names of the labels.
    """
    picked = torch.linspace(0, len(queries[1]) - 1, count).long()
    cosine = F.normalize(queries[0][picked], dim=1) @ F.normalize(bank[0], dim=1).T
    nearest = cosine.topk(min(k, len(bank[1])), dim=1).indices.cpu()  # (count, k)
    neighbour_images = first_frames(views[0], nearest.flatten()).unflatten(0, nearest.shape)
    query_images = first_frames(views[1], picked)[:, None]
    # (count * (1 + k), 3, H, W)
    images = torch.cat([query_images, neighbour_images], dim=1).flatten(0, 1)
    captions, colours = [], []
    for truth, row in zip(queries[1][picked].tolist(), nearest, strict=True):
        labels = bank[1].cpu()[row].tolist()
        captions += [f"query: {classes[truth]}", *(classes[label] for label in labels)]
        colours += ["white", *(RIGHT if label == truth else WRONG for label in labels)]
    title = "queries (left) and their nearest neighbours"
    draw_tiles(images, to, title, 1 + nearest.shape[1], captions=captions, colours=colours)


@draws_safely
def draw_confusion(counts: Tensor, classes: list[str], to: Path) -> None:
    """Draw a confusion matrix (C, C), true classes as rows, coloured by fractions of each class."""
    totals, size = counts.sum(dim=1), len(classes)
    fractions = counts / totals[:, None].clamp(min=1)
    inches = max(5.0, 0.42 * size) if size <= 40 else 8.0
    figure = Figure(figsize=(inches + 2, inches + 2), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
    top1 = counts.diag().sum() / totals.sum().clamp(min=1)
    axis.set_title(f"confusion: top-1 {top1:.1%} of {int(totals.sum())} samples")
    axis.set(xlabel="predicted", ylabel="true class, and its accuracy")
    if size > 40:  # more names could not be read
        figure.colorbar(picture, label="fraction of the true class", shrink=0.8)
        return write_figure(figure, to)
    names = [shortened(name) for name in classes]
    labels = []
    for name, share, total in zip(names, fractions.diag(), totals, strict=True):
        labels.append(f"{name}  {share:.0%}" if total else name)
    axis.set_xticks(range(size), names, rotation=90, **text_style())
    axis.set_yticks(range(size), labels, **text_style())
    for row, column in counts.nonzero().tolist():
        colour = "white" if fractions[row, column] > 0.5 else "black"
        place = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
        axis.text(column, row, f"{int(counts[row, column])}", **place)
    write_figure(figure, to)


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
    """Draw `count` samples, evenly spaced, without and with the attention that patches receive.

    It is the mean over the heads of the last block and over the attending patches, laid over the
    sample from black, the least of the image, to yellow, the most. The attention of CLS is not
    drawn: ViC-MAE's losses do not train CLS.
    """
    if encoder.num_frames > 1:
        raise ValueError(f"needs an encoder of images, not of clips of {encoder.num_frames} frames")
    views = EvalViews(paths, encoder.img_size, crop_pct=1.0, run=to.parent)
    images = first_frames(views, torch.linspace(0, len(views) - 1, count).long())
    normalised = normalize(images.to(encoder.cls_token.device), MEAN, STD)
    attention = last_attention(encoder, normalised).cpu()
    received = attention[:, :, 1:, 1:].mean(dim=(1, 2))  # (B, N)
    received = received.unflatten(1, (1, encoder.grid, encoder.grid))  # (B, 1, h, w)
    images = enlarge(images)
    maps = F.interpolate(received, size=images.shape[-2:], mode="bilinear")
    least, most = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    shares = ((maps - least) / (most - least).clamp(min=1e-12))[:, 0]  # (B, H, W)
    heat = torch.from_numpy(matplotlib.colormaps["inferno"](shares.numpy())[..., :3])
    overlays = 0.4 * images + 0.6 * heat.permute(0, 3, 1, 2)
    title = "attention of the last block, from least (black) to most (yellow)"
    draw_tiles(torch.cat([images, overlays]), to, title, count, ["original", "attention"])
