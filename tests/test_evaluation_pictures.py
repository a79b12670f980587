"""Pictures show what their names say: attention, nearest neighbours, reconstructions, curves."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from tiny_models import CLIPS, TINY
from torchvision.io import ImageReadMode, decode_image

from evaluation import pictures
from evaluation.pictures import (
    draw_attention,
    draw_confusion,
    draw_curves,
    draw_neighbours,
    draw_reconstructions,
    draw_tiles,
    last_attention,
    unpatchify,
)
from methods.masked import STMAE, VideoMAE
from model import Encoder, ViCMAE
from shards.augment import MEAN, STD, normalise
from shards.views import EvalViews

SIZES = (32, 8, 48, 2, 3)  # img_size, patch_size, embed_dim, depth, num_heads


def enlarged(frame: torch.Tensor) -> torch.Tensor:
    """Enlarge a frame (3, 32, 32) to 128 pixels by repeating its pixels, as in the pictures."""
    return frame.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2).int()


def cut_tile(picture: torch.Tensor, row: int, column: int, left: int, lines: int) -> torch.Tensor:
    """Return a tile of 128 pixels with its frame of 4, from a picture with 48 pixels of title.

    Args:
        left: pixels beside the tiles.
        lines: of text above each tile, of 16 pixels.
    """
    top, left = 48 + row * (140 + 16 * lines) + 16 * lines, left + 140 * column
    return picture[:, top : top + 136, left : left + 136].int()


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """Collect every text of a picture of tiles."""
    drawn, text = [], Figure.text

    def collect(figure, x, y, s, **settings):
        drawn.append(s)
        return text(figure, x, y, s, **settings)

    monkeypatch.setattr(Figure, "text", collect)
    return drawn


def test_attention_is_the_softmax_that_the_last_block_computes():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder, seen, width = Encoder(*SIZES).eval(), {}, 16
    attn = encoder.blocks[-1].attn
    attn.qkv.weight.data *= 4  # far from uniform
    attn.qkv.bias.data.normal_(generator=generator)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    found = last_attention(encoder, images)
    assert found.shape == (2, 3, 17, 17) and not attn._forward_pre_hooks
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3, 17))
    assert found.max() > 0.5

    def watch(module, inputs, output) -> None:
        seen.update(x=inputs[0], out=output)

    with torch.no_grad(), attn.register_forward_hook(watch):
        encoder(images)
    with torch.no_grad():
        q, k, v = (part.split(width, dim=-1) for part in attn.qkv(seen["x"]).split(48, dim=-1))
        expected, mixed = [], []
        for head in range(3):
            weights = (q[head] @ k[head].transpose(1, 2) / math.sqrt(width)).exp()
            weights = weights / weights.sum(dim=-1, keepdim=True)
            expected.append(weights)
            mixed.append(found[:, head] @ v[head])
        torch.testing.assert_close(found, torch.stack(expected, dim=1), atol=1e-5, rtol=1e-5)
        out = attn.proj(torch.cat(mixed, dim=-1))
    torch.testing.assert_close(out, seen["out"], atol=1e-5, rtol=1e-5)


def test_attention_is_laid_over_its_image_and_brightest_at_the_patch_that_patches_attend_to(
    demo, tmp_path, monkeypatch, texts
):
    def staged(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
        attention = torch.full((len(images), 3, 17, 17), 1e-3)
        attention[:, :, 1:, 0] = 0.9  # all patches attend to CLS, which is not drawn
        attention[:, :, 0, 16] = 0.9  # CLS attends to the last patch, which is not drawn either
        for number in range(len(images)):
            attention[number, :, 1:, 1 + 2 * number] = 0.01
        return attention

    monkeypatch.setattr(pictures, "last_attention", staged)
    path = str(demo / "test_images")
    draw_attention(Encoder(*SIZES), [path], tmp_path / "a.png", count=4)
    picture = decode_image(str(tmp_path / "a.png"), ImageReadMode.RGB)
    views = EvalViews([path], 32, crop_pct=1.0)
    assert texts[1:] == ["original", "attention"] and "attention" in texts[0]
    least, most = (255 * torch.tensor(colormaps["inferno"](share)[:3]) for share in (0.0, 1.0))
    for number, sample in enumerate((0, 19, 39, 59)):
        above, below = (cut_tile(picture, row, number, 32, 0)[:, 4:-4, 4:-4] for row in (0, 1))
        shown = enlarged(views[sample]["inputs"][0, 0])
        assert (above - shown).abs().max() <= 1
        heat = (below - 0.4 * shown) / 0.6
        assert (heat.amin(dim=(1, 2)) - least).abs().max() < 4
        brightest = (heat - most[:, None, None]).abs().amax(dim=0) < 4
        place = brightest.nonzero().float().mean(dim=0) // 32
        assert place.tolist() == list(divmod(2 * number, 4))


def test_neighbours_are_the_nearest_samples_and_their_frames_show_whether_the_class_is_right(
    demo, tmp_path, texts
):
    generator = torch.Generator().manual_seed(0)
    views, labels, features = [], [], []
    for name in ("train_images", "test_images"):
        data = EvalViews([str(demo / name)], 32)
        classes = torch.tensor([int(data[number]["target"]) for number in range(60)])
        views.append(data)
        labels.append(classes)
        noise = torch.randn(60, 4, generator=generator)
        features.append(noise + 2 * torch.eye(10)[classes][:, :4])
    bank, queries = (features[0], labels[0]), (features[1], labels[1])
    names = [f"$class_{number}$" for number in range(10)]
    draw_neighbours(bank, queries, views, names, tmp_path / "n.png", count=4, k=5)
    picture = decode_image(str(tmp_path / "n.png"), ImageReadMode.RGB)
    captions, frames = iter(texts[1:]), Counter()
    for row, query in enumerate((0, 19, 39, 59)):
        cosine = torch.cosine_similarity(features[1][query], features[0], dim=1).tolist()
        nearest = sorted(range(60), key=lambda number: -cosine[number])[:5]
        cells = [(1, query), *((0, number) for number in nearest)]
        for column, (which, number) in enumerate(cells):
            cell = cut_tile(picture, row, column, 4, 1)
            shown = enlarged(views[which][number]["inputs"][0, 0])
            assert (cell[:, 4:-4, 4:-4] - shown).abs().max() <= 1
            colour, caption = [255, 255, 255], names[labels[which][number]]
            if column:
                right = labels[which][number] == labels[1][query]
                colour = [26, 127, 55] if right else [207, 34, 46]
            assert next(captions) == (caption if column else f"query: {caption}")
            for y, x in ((0, 0), (3, 50), (-1, -4), (50, 3), (60, -1)):
                assert cell[:, y, x].tolist() == colour
            frames[tuple(colour)] += 1
    white, red, green = (255, 255, 255), (207, 34, 46), (26, 127, 55)
    assert frames[white] == 4 and frames[red] > 2 and frames[green] > 2


def test_unpatchify_puts_every_patch_at_its_row_and_column():
    """Patches are counted by rows; the numbers of a patch are its pixels by rows, each as RGB."""
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    patches = torch.empty(2, 4, 48)
    for row in range(2):
        for column in range(2):
            cut = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            patches[:, 2 * row + column] = cut.permute(0, 2, 3, 1).reshape(2, 48)
    assert torch.equal(unpatchify(patches, 4), images)


def mean_of_patches(frame: torch.Tensor) -> torch.Tensor:
    """Return a frame (3, 32, 32) with each patch's mean, in normalised numbers of all colours."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    patches = ((frame / 255 - mean) / std).unflatten(1, (4, 8)).unflatten(3, (4, 8))
    means = patches.mean(dim=(0, 2, 4), keepdim=True).expand(3, 4, 8, 4, 8).reshape(3, 32, 32)
    return (255 * (means * std + mean)).clamp(0, 255)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstructions_show_originals_masked_patches_and_the_predictions_in_their_place(
    demo, tmp_path, texts, norm_pix_loss
):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    decoder = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}
    projector = {"projector_hidden_dim": 32, "projector_out_dim": 16}
    net = ViCMAE(**sizes, **decoder, **projector, norm_pix_loss=norm_pix_loss).eval()
    # A prediction of zeros is the mean colour of all data, or the mean of the patch.
    net.decoder.pred.weight.data.zero_()
    net.decoder.pred.bias.data.zero_()
    path = str(demo / "test_images")
    draw_reconstructions(net, [path], tmp_path / "r.png", count=4)
    picture = decode_image(str(tmp_path / "r.png"), ImageReadMode.RGB).int()
    assert texts[1:] == ["original", "masked", "reconstruction", "pasted"]
    assert texts[0] == "reconstructions, 50% of the patches masked"
    views, grey = EvalViews([path], 32, crop_pct=1.0), 255 * torch.tensor(MEAN)[:, None, None]
    for number, sample in enumerate((0, 15, 30, 45)):
        rows = []
        for row in range(4):
            rows.append(cut_tile(picture, row, number, 32, 0)[:, 4:-4, 4:-4])
        original, masked, predicted, inpainted = rows
        frame = views[sample]["inputs"][0, 0].float()
        assert (original - enlarged(frame)).abs().max() <= 1
        expected = grey.expand(3, 32, 32)
        if norm_pix_loss:
            expected = mean_of_patches(frame)
        assert (predicted - enlarged(expected)).abs().max() <= 1
        hidden = (masked - grey).abs().amax(dim=0) <= 1  # (128, 128)
        per_patch = hidden.unflatten(0, (4, 32)).unflatten(2, (4, 32)).float().mean(dim=(1, 3))
        assert (per_patch == 1).sum() >= 8  # half of the patches are masked
        is_masked = (per_patch == 1).repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(inpainted[:, ~is_masked], original[:, ~is_masked])
        assert (inpainted - predicted)[:, is_masked].abs().max() <= 1


@pytest.mark.parametrize("method", [STMAE, VideoMAE])
def test_perfect_predictions_of_clips_are_drawn_as_the_originals(
    demo, tmp_path, monkeypatch, method
):
    net = method(**TINY, **CLIPS).eval()
    drawn, clips = [], []
    monkeypatch.setattr(pictures, "draw_tiles", lambda images, *_: drawn.append(images))

    def recorded(views):
        clips.append(normalise(views))
        return clips[0]

    monkeypatch.setattr(pictures, "normalise", recorded)

    def predict(tokens, ids_restore, num_decoded):
        """Normalise by patch (ST-MAE, the first frame) or by channel (VideoMAE, both frames)."""
        first = clips[0][:, ::2] if method is STMAE else clips[0]  # (B, T, 3, H, W)
        tubelets = first.unflatten(1, (2, -1)).unflatten(4, (4, 8)).unflatten(6, (4, 8))
        patches = tubelets.permute(0, 1, 4, 6, 2, 5, 7, 3).flatten(1, 3)  # (B, N, t, 8, 8, 3)
        axes = (2, 3, 4, 5) if method is STMAE else (2, 3, 4)
        var, mean = torch.var_mean(patches, dim=axes, keepdim=True)
        return ((patches - mean) / (var + 1e-6).sqrt()).flatten(2)

    monkeypatch.setattr(net.decoder, "forward", predict)
    draw_reconstructions(net, [str(demo / "test_videos")], tmp_path / "r.png", count=3)
    original, _, predicted, _ = drawn[0].split(3)
    assert original.std() > 0.1
    torch.testing.assert_close(predicted, original, atol=1e-5, rtol=0)


def test_reconstructions_are_drawn_from_several_data_sets_in_turn_and_list_corrupt_samples(
    demo, tmp_path
):
    encoder = Encoder(*SIZES)
    paths = [str(demo / name) for name in ("test_images", "test_videos")]
    found = pictures.pick_samples(paths, encoder, tmp_path, 4)
    views = [EvalViews([path], 32, crop_pct=1.0) for path in paths]
    for number, sample in enumerate((0, 15, 30, 45)):
        assert torch.equal(found[number], views[number % 2][sample]["inputs"][0])


def test_a_picture_has_no_tile_smaller_than_128_pixels_and_a_row_may_be_incomplete(tmp_path):
    for side, shown in ((32, 128), (100, 200), (128, 128), (224, 224)):
        draw_tiles(torch.zeros(3, 3, side, side), tmp_path / "t.png", "a", columns=2)
        picture = decode_image(str(tmp_path / "t.png"), ImageReadMode.RGB)
        black = (picture == 0).all(dim=0)[3 * max(16, shown // 10) :]
        assert black[4 : 4 + shown, 8 : 8 + shown].all()
        assert black.sum() == 3 * shown**2


def plotted(lines: list[dict], to: Path, monkeypatch) -> dict[str, list]:
    """Return {title of a panel: its curves} of a picture of the training."""
    figures = []
    monkeypatch.setattr(pictures, "write_figure", lambda figure, to: figures.append(figure))
    draw_curves(lines, to)
    return {axis.get_title(): axis.lines for axis in figures[0].axes if axis.lines}


def test_curves_are_smoothed_over_raw_and_the_accuracies_are_drawn_beside_them(
    tmp_path, monkeypatch
):
    draw_curves([{"step": 1, "lr": 0.1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    values = np.random.default_rng(0).normal(size=250)
    lines = [{"step": step, "loss/train/total": value} for step, value in enumerate(values, 1)]
    lines[0] |= {"knn/random": 0.25}
    lines += [{"step": 250, "knn/trained": 0.5}, {"step": 250, "metrics/eval/top1": 0.75}]
    draw_curves(lines, tmp_path / "loss.png")
    assert decode_image(str(tmp_path / "loss.png"), ImageReadMode.RGB).shape[2] == 2 * 4 * 128
    panels = plotted(lines, tmp_path / "loss.png", monkeypatch)
    raw, mean = panels["total loss"]
    assert np.array_equal(raw.get_ydata(), values) and mean.get_label() == "mean of 5 steps"
    assert mean.get_ydata()[100] == pytest.approx(values[98:103].mean())
    knn, top1 = panels["accuracy on labelled data"]
    assert knn.get_xydata().tolist() == [[1, 0.25], [250, 0.5]] and knn.get_label() == "k-NN: 0.500"
    assert top1.get_xydata().tolist() == [[250, 0.75]]


def test_long_curves_are_thinned(tmp_path, monkeypatch):
    lines = [{"step": step, "loss/train/total": 1 / step} for step in range(1, 50_001)]
    curves = plotted(lines, tmp_path / "loss.png", monkeypatch)["total loss"]
    assert all(1900 < len(curve.get_xdata()) <= 2000 for curve in curves)


def test_confusion_matrix_shows_counts_and_the_accuracy_of_each_true_class(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "write_figure", lambda figure, to: figures.append(figure))
    counts = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]])  # no sample of the second class
    draw_confusion(counts, ["shoe", "bag", "<b>"], tmp_path / "c.png")
    (axis,) = figures[0].axes
    assert axis.get_title() == "confusion: top-1 83.3% of 6 samples"
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "shoe  75%",
        "bag",
        "<b>  100%",
    ]
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert cells == {(0, 0): "3", (1, 0): "1", (2, 2): "2"}


def test_confusion_of_many_classes_is_drawn_without_names(tmp_path):
    draw_confusion(torch.eye(1000), list(map(str, range(1000))), tmp_path / "c.png")
    assert decode_image(str(tmp_path / "c.png"), ImageReadMode.RGB).shape == (3, 1280, 1280)


@pytest.mark.parametrize(
    "name", ["$10 bill", "$1_2_3$", "猫", "🐈", "قط", "a\nb", "\udcff", "x" * 300]
)
def test_any_class_name_is_drawn_quietly(tmp_path, capsys, recwarn, name):
    draw_confusion(torch.eye(2), [name, "bag"], tmp_path / "c.png")
    assert decode_image(str(tmp_path / "c.png"), ImageReadMode.RGB).shape == (3, 896, 896)
    draw_tiles(torch.zeros(1, 3, 32, 32), tmp_path / "t.png", "title", 1, captions=[name])
    assert capsys.readouterr() == ("", "")
    assert not [warning for warning in recwarn if warning.category is not DeprecationWarning]


def test_losses_that_are_not_finite_are_left_out(tmp_path, capsys):
    values = [1.0, math.nan, math.inf, -math.inf]
    lines = [{"step": step, "loss/train/$x$": value} for step, value in enumerate(values)]
    draw_curves(lines, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists() and capsys.readouterr().out == ""


def test_picture_that_cannot_be_drawn_or_written_costs_a_line(tmp_path, capsys):
    lines = [{"step": 1, "loss/train/total": 1.0}]
    draw_curves(lines, to=tmp_path / "nowhere" / "loss.png")
    draw_confusion(torch.ones(2), ["one", "two"], tmp_path / "c.png")
    draw_attention(Encoder(*SIZES, num_frames=4), ["nowhere"], tmp_path / "a.png")
    printed = capsys.readouterr().out.splitlines()
    names = ["nowhere/loss.png", "c.png", "a.png"]
    for line, name in zip(printed, names, strict=True):
        assert line.startswith(f"{tmp_path / name} could not be drawn: ")
    assert "No such file" in printed[0]
    assert "needs an encoder of images, not of clips of 4 frames" in printed[2]
