"""The views of fine-tuning: crops, policies, held-out samples, mixing and erasing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import LocalDataset

from methods.linear_probe import LinearProbe
from shards import finetuning_views
from shards.finetuning_views import FinetuningViews
from shards.stream import TrainingData

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
PLAIN = {"erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


# Crops and policies, in the data workers


def clip_of_one_frame(demo: Path) -> dict:
    """Return a stored clip whose 16 frames are all the same picture."""
    sample = LocalDataset(str(demo / "train_videos"))[0]
    size = int(sample["ends"][0])
    ends = np.arange(1, 17, dtype=np.uint32) * size
    return sample | {"frames": sample["frames"][:size] * 16, "ends": ends}


def test_clip_is_cropped_and_flipped_alike_in_all_frames(demo):
    views = FinetuningViews(32, 8, 10, **PLAIN)
    still = clip_of_one_frame(demo)
    drawn = [views.draw(still, np.random.default_rng(seed))["inputs"] for seed in range(6)]
    for clip in drawn:
        assert clip.shape == (1, 8, 3, 32, 32)
        assert all(torch.equal(clip[0, 0], frame) for frame in clip[0])
    assert len({clip.numpy().tobytes() for clip in drawn}) == 6


def test_training_frames_are_drawn_from_each_section_by_itself(demo, monkeypatch):
    sample = LocalDataset(str(demo / "train_videos"))[0]
    seen, decode = set(), finetuning_views.decode_frame

    def record(stored: dict, index: int) -> np.ndarray:
        seen.add(index)
        return decode(stored, index)

    monkeypatch.setattr(finetuning_views, "decode_frame", record)
    offsets = set()
    for seed in range(20):
        seen.clear()
        FinetuningViews(32, 4, 10, **PLAIN).draw(sample, np.random.default_rng(seed))
        assert sorted(index // 4 for index in seen) == [0, 1, 2, 3]
        offsets.add(tuple(index % 4 for index in sorted(seen)))
    assert len(offsets) > 15  # of 4 ** 4
    assert all(set(section) == {0, 1, 2, 3} for section in zip(*offsets, strict=True))


def test_policy_treats_all_frames_of_a_clip_alike_and_depends_on_the_sample(demo):
    still = clip_of_one_frame(demo)
    plain = FinetuningViews(32, 16, 4, **PLAIN, flip=0.0)
    views = FinetuningViews(32, 16, 4, **PLAIN, flip=0.0, rand_augment="rand-m9-mstd0.5-inc1")
    changed = 0
    for seed in range(8):
        clip = views.draw(still, np.random.default_rng(seed))["inputs"][0]
        assert clip.dtype == torch.uint8 and all(torch.equal(clip[0], frame) for frame in clip)
        again = views.draw(still, np.random.default_rng(seed))["inputs"][0]
        assert torch.equal(clip, again)
        without = plain.draw(still, np.random.default_rng(seed))["inputs"][0]
        changed += not torch.equal(clip, without)
    assert changed >= 6


@pytest.mark.parametrize(("num_frames", "size"), [(1, 24), (4, 40)])
def test_policy_sees_the_crop_of_an_image_and_the_entire_frames_of_a_clip(demo, num_frames, size):
    """As timm and SlowFast do."""
    views = FinetuningViews(24, num_frames, 10, **PLAIN, rand_augment="rand-m9-mstd0.5-inc1")
    seen = []
    views.policy = lambda image: seen.append(image.size) or image
    sample = LocalDataset(str(demo / "train_videos"))[0]
    views.draw(sample, np.random.default_rng(0))
    assert seen == [(size, size)] * num_frames


def test_policy_that_timm_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"augment\.rand_augment=rand-x9: timm has no such policy"):
        FinetuningViews(32, 1, 4, rand_augment="rand-x9")


def held_out_labels(views: FinetuningViews, sample: dict, seed: int) -> list[int]:
    drawn = []
    for number in range(1000):
        rng = np.random.default_rng(seed + number % 2)
        drawn.append(views.draw(sample | {"name": f"{number}.png"}, rng)["held_out"])
    return drawn


def test_held_out_samples_are_a_fraction_by_their_names(demo):
    sample = LocalDataset(str(demo / "train_images"))[0]
    views = FinetuningViews(32, 1, 10, **PLAIN, held_out=0.3)
    drawn = held_out_labels(views, sample, seed=0)
    assert drawn == held_out_labels(views, sample, seed=7)
    assert set(drawn) == {-1, int(sample["label"])}
    assert 0.25 < np.mean(np.array(drawn) != -1) < 0.35


def test_labels_of_held_out_samples_do_not_change_the_gradient():
    held_out = torch.tensor([-1, 1, -1, 3, -1, -1])  # the second and the fourth sample
    net, gradients = LinearProbe(4, **SIZES), []
    for labels in ([0, 1, 2, 3, 0, 1], [0, 3, 2, 0, 0, 1]):
        batch = batch_of() | {"target": torch.tensor(labels), "held_out": held_out}
        batch = FinetuningViews(32, 1, 4, **PLAIN).apply(batch)
        net.zero_grad()
        net.loss(net(batch), batch).backward()
        gradients.append(net.head.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_sample_without_a_label_is_listed_and_replaced_by_the_next(demo, tmp_path):
    path = str(demo / "train_images")
    views = FinetuningViews(32, 1, 10, **PLAIN)
    unlabelled = LocalDataset(path)[7]["name"]

    def draw(sample: dict, rng: np.random.Generator) -> dict:
        if sample["name"] == unlabelled:
            sample = sample | {"label": -1}
        return views.draw(sample, rng)

    data = TrainingData(
        streams=[{"path": path}], global_train_batch_size=60, num_workers=0, max_unreadable=0.1
    )
    spec, _ = data.load(draw, views.apply, 0, 8, tmp_path)
    (batch,) = list(spec.dataloader)
    assert len(batch["target"]) == 60 and (batch["target"] >= 0).all()
    listed = (tmp_path / "unreadable.jsonl").read_text()
    assert json.loads(listed) == [unlabelled, "has no label"]


# Mixing and erasing, on the device


def batch_of(frames: int = 1, key: int = 3) -> dict[str, torch.Tensor]:
    shape, generator = (6, 1, frames, 3, 32, 32), torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        "target": torch.tensor([0, 1, 2, 3, 0, 1]),
        "held_out": torch.full((6,), -1),
        "key": [str(key)] * 6,
    }


def apply(frames: int, **settings: float) -> dict[str, torch.Tensor]:
    return FinetuningViews(32, frames, 4, **PLAIN | settings).apply(batch_of(frames))


def test_label_smoothing_gives_every_class_its_share():
    expected = torch.full((6, 4), 0.025)
    expected[range(6), [0, 1, 2, 3, 0, 1]] = 0.925
    torch.testing.assert_close(apply(1, label_smoothing=0.1)["target"], expected)


def test_mixup_blends_inputs_and_targets_of_a_batch_with_its_reverse():
    plain, mixed = apply(2), apply(2, mixup=0.8)
    share = float(mixed["target"][0, 0])  # the first sample has label 0, the last has label 1
    assert 0.01 < share < 0.99
    for name in ("inputs", "target"):
        expected = share * plain[name] + (1 - share) * plain[name].flip(0)
        torch.testing.assert_close(mixed[name], expected, atol=1e-5, rtol=1e-5)


def test_cutmix_cuts_one_box_from_all_frames_and_shares_the_target_by_its_area():
    plain, mixed = apply(2), apply(2, cutmix=1.0)
    foreign = (mixed["inputs"] != plain["inputs"]).any(dim=3)[:, 0]  # (B, T, H, W)
    assert torch.equal(foreign[:, 0], foreign[:, 1])
    area = float(foreign[0, 0].float().mean())
    assert 0.01 < area < 0.99
    assert float(mixed["target"][0, 1]) == pytest.approx(area, abs=0.02)


def test_erasing_erases_the_same_box_of_all_frames():
    plain, erased = apply(3), apply(3, erasing=1.0)
    changed = (erased["inputs"] != plain["inputs"]).any(dim=3)[:, 0]
    assert changed.flatten(1).any(dim=1).all()
    assert torch.equal(changed[:, 0], changed[:, 2])


def test_mixing_depends_on_the_batch_and_not_on_the_global_generators():
    views = FinetuningViews(32, 1, 4, erasing=1.0)
    once = views.apply(batch_of())
    torch.rand(7), np.random.rand(7)
    again, other = views.apply(batch_of()), views.apply(batch_of(key=4))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["inputs"], other["inputs"])
