"""The order of samples and their generators, on any number of workers and ranks."""

import json
import os
import re
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.utils import dist
from conftest import corrupted_copy, fork_server, losses, run_stage, small
from PIL import Image

import data_prep
import pretrain
import shards.loader
from shards.augment import augment_batch
from shards.decode import Recipe
from shards.format import Clips, TooManyUnreadable
from shards.loader import StepLoader, prefetch
from shards.stream import DeterministicStream, TrainingData, check_batch, count_earlier
from shards.views import PretrainingViews

Batch = dict[str, torch.Tensor]


def make_loader(demo: Path, num_workers: int = 0, transform=None, **settings):
    """Return a loader of batches of 20 from the demo's 60 clips and 60 images."""
    dist.initialize_dist("cpu")
    names = ("train_videos", "train_images")
    settings.setdefault("streams", [{"path": str(demo / name)} for name in names])
    batch_size = settings.pop("batch_size", 20)
    seed, run = settings.pop("seed", 0), settings.pop("run", demo)
    data = TrainingData(global_train_batch_size=batch_size, num_workers=num_workers, **settings)
    spec, _ = data.load(transform or PretrainingViews(32, 16), augment_batch, seed, 8, run)
    return spec.dataloader


def draw_number(sample: dict, rng: np.random.Generator) -> dict:
    """A transform that shows a test the sample and its generator."""
    return {"name": sample["name"], "stream": sample["stream"], "draw": rng.random()}


def names_in(path: Path) -> list[str]:
    clips = Clips(str(path))
    return [clips[number]["name"] for number in range(len(clips))]


def names_and_draws(batch: dict) -> list[tuple[str, float]]:
    return list(zip(batch["name"], batch["draw"].tolist(), strict=True))


def all_noise(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch["noise"] for batch in batches]).flatten(1)  # (samples, V * N)


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("views", "augment", "noise"))


def test_occurrences_of_a_value_are_counted_in_order():
    assert count_earlier(np.array([3, 1, 3, 2, 1, 3])).tolist() == [0, 0, 1, 0, 1, 2]
    assert count_earlier(np.array([], int)).tolist() == []
    values = np.random.default_rng(0).integers(0, 20, 200)
    expected = [(values[:place] == values[place]).sum() for place in range(200)]
    assert count_earlier(values).tolist() == expected


def test_generator_of_a_sample_is_seeded_by_seed_epoch_sample_and_repeat(demo):
    names = names_in(demo / "train_videos") + names_in(demo / "train_images")
    loader = make_loader(demo, 2, draw_number, seed=5, repeats=2)
    for epoch in range(2):
        drawn = set()
        for batch in loader:
            drawn.update(names_and_draws(batch))
        expected = set()
        for number, name in enumerate(names):
            first = np.random.default_rng((5, epoch, number, 0)).random()
            second = np.random.default_rng((5, epoch, number, 1)).random()
            expected |= {(name, first), (name, second)}
        assert drawn == expected


def test_repeated_sample_is_seeded_by_its_occurrence_too(demo):
    streams = [
        {"path": str(demo / "train_images"), "proportion": 0.75},
        {"path": str(demo / "train_videos"), "proportion": 0.25},
    ]
    loader = make_loader(demo, 0, draw_number, streams=streams, epoch_size=240)
    drawn = {}
    for batch in loader:
        for name, draw in names_and_draws(batch):
            drawn.setdefault(name, set()).add(draw)
    assert sum(len(draws) for draws in drawn.values()) == 240
    for number, name in enumerate(names_in(demo / "train_images")):  # 180 of 60 images
        identities = [number + occurrence * 120 for occurrence in range(3)]
        generators = [np.random.default_rng((0, 0, identity, 0)) for identity in identities]
        assert drawn[name] == {generator.random() for generator in generators}


def test_each_data_set_is_repeated_as_often_as_it_asks(demo):
    streams = [
        {"path": str(demo / "train_images"), "repeat": 2.5},
        {"path": str(demo / "train_videos")},
    ]
    settings = {"streams": streams, "one_stream_per_batch": True, "batch_size": 30}
    drawn = []
    for batch in make_loader(demo, 0, draw_number, **settings):
        assert len(set(batch["stream"].tolist())) == 1
        drawn += names_and_draws(batch)
    assert len(drawn) == len(set(drawn)) == 150 + 60
    times = Counter(name for name, _ in drawn)
    images = {times[name] for name in names_in(demo / "train_images")}
    videos = {times[name] for name in names_in(demo / "train_videos")}
    assert images == {2, 3} and videos == {1}


def test_sample_knows_the_stream_that_it_comes_from(demo):
    for batch in make_loader(demo, 0, draw_number):
        for name, stream in zip(batch["name"], batch["stream"].tolist(), strict=True):
            assert name.endswith("mp4") == (stream == 0)


def test_batch_of_one_stream_has_each_sample_of_the_stream_at_most_once(demo):
    settings = {"batch_size": 25, "one_stream_per_batch": True}  # two streams of 60 samples
    alone = make_loader(demo, 0, draw_number, **settings)
    two = make_loader(demo, 2, draw_number, **settings)
    orders = set()
    for _ in range(4):
        batches = list(alone)
        assert len(batches) == len(alone) == 4
        assert all(len(set(batch["stream"].tolist())) == 1 for batch in batches)
        assert len({name for batch in batches for name in batch["name"]}) == 100
        assert list(map(names_and_draws, batches)) == list(map(names_and_draws, two))
        orders.add(tuple(int(batch["stream"][0]) for batch in batches))
    assert len(orders) > 1


def test_batches_do_not_depend_on_the_number_of_workers(demo):
    alone, two = make_loader(demo, 0), make_loader(demo, 2)
    for _ in range(2):
        ours = list(alone)
        assert len(ours) == 6
        assert ours[0]["views"].shape == (20, 2, 32, 32, 3)
        assert_same_batches(ours, list(two))


def test_no_draw_comes_twice_in_two_epochs_and_two_seeds(demo):
    first = make_loader(demo, seed=0)
    batches = [*first, *first, *make_loader(demo, seed=1)]
    assert len(all_noise(batches).unique(dim=0)) == 3 * 120


def test_resumed_epoch_has_the_batches_that_were_not_read_before(demo):
    loader = make_loader(demo)
    first = list(loader)
    second = list(loader)
    state = loader.dataset.state_dict(60, True)
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 60)
    resumed = make_loader(demo, 2)
    resumed.dataset.load_state_dict(state)
    assert_same_batches(list(resumed), second[3:])
    other = make_loader(demo)
    other.dataset.load_state_dict(state | {"epoch": 0})
    assert_same_batches(list(other), first[3:])


def test_run_that_is_resumed_between_two_epochs_starts_the_next(demo):
    loader = make_loader(demo)
    assert loader.dataset.state_dict(0, True)["epoch"] == 0
    list(loader)
    state = loader.dataset.state_dict(0, True)  # Composer counts from 0 again
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 0)
    resumed = make_loader(demo)
    resumed.dataset.load_state_dict(state)
    assert resumed.dataset.state_dict(0, True)["epoch"] == 1
    assert_same_batches(list(resumed), list(loader))


def test_repeats_draw_different_pairs_from_a_sample_that_is_read_once(demo):
    loader = make_loader(demo, repeats=4)
    batches = list(loader)
    assert len(loader) == len(batches) == 24
    noise = all_noise(batches)
    assert len(noise) == len(noise.unique(dim=0)) == 480
    once = all_noise(list(make_loader(demo)))
    assert torch.equal(once, noise[::4])  # the first pair of a sample is as without repeats
    assert loader.dataset.state_dict(40, True)["sample_in_epoch"] == 10


def write_batches(rank: int, demo: str, folder: str) -> None:
    loader = make_loader(Path(demo), transform=draw_number, epoch_size=79)
    batches = [names_and_draws(batch) for batch in [*loader, *loader]]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(batches))


def test_two_ranks_read_the_batches_of_one_and_no_incomplete_batch(demo, tmp_path, on_ranks):
    """79 samples are three batches of 20; Streaming alone would fill them up to four."""
    loader = make_loader(demo, transform=draw_number, epoch_size=79)
    alone = [names_and_draws(batch) for batch in [*loader, *loader]]
    assert len(alone) == 6
    on_ranks(2, write_batches, str(demo), str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for expected, ours, theirs in zip(alone, first, second, strict=True):
        assert len(ours) == len(theirs) == 10
        assert sorted(map(tuple, ours + theirs)) == sorted(expected)


def drawn_in(step: dict | list[dict]) -> list[tuple[str, float]]:
    """Return the names and draws of a batch, or of the micro-batches of a step."""
    parts = step if isinstance(step, list) else [step]
    return [drawn for part in parts for drawn in names_and_draws(part)]


@pytest.mark.parametrize("settings", [{}, {"repeats": 2}, {"one_stream_per_batch": True}])
def test_loading_micro_batches_leaves_samples_and_their_order(demo, settings):
    """With 3 workers for steps of 4 micro-batches, from the first step and from the second."""
    whole = make_loader(demo, 0, draw_number, **settings)
    parts = make_loader(demo, 3, draw_number, global_micro_batch_size=4, **settings)
    expected = [names_and_draws(batch) for batch in whole]
    steps = list(parts)
    assert len(parts) == len(whole) == len(steps) == len(expected)
    assert [drawn_in(step) for step in steps] == expected
    if not settings:
        assert [len(part["name"]) for step in steps for part in step] == 30 * [4]
    resumed = make_loader(demo, 3, draw_number, global_micro_batch_size=10, **settings)
    resumed.dataset.load_state_dict(parts.dataset.state_dict(20, True) | {"epoch": 0})
    assert [drawn_in(step) for step in resumed] == expected[1:]


def write_micro_batches(rank: int, demo: str, folder: str) -> None:
    loader = make_loader(Path(demo), transform=draw_number, global_micro_batch_size=10)
    steps = [list(map(names_and_draws, step)) for step in loader]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(steps))


def test_two_ranks_share_each_micro_batch_of_one(demo, tmp_path, on_ranks):
    loader = make_loader(demo, transform=draw_number, global_micro_batch_size=10)
    alone = [list(map(names_and_draws, step)) for step in loader]
    on_ranks(2, write_micro_batches, str(demo), str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for expected, ours, theirs in zip(alone, first, second, strict=True):
        for part, half, other in zip(expected, ours, theirs, strict=True):
            assert len(half) == len(other) == 5
            assert sorted(map(tuple, half + other)) == sorted(part)


def test_workers_hold_a_step_and_a_micro_batch_each():
    found = {
        (parts, workers): prefetch(parts, workers) for parts in (1, 4) for workers in (1, 3, 4)
    }
    assert found == {(1, 1): 2, (1, 3): 2, (1, 4): 2, (4, 1): 5, (4, 3): 3, (4, 4): 2}
    assert prefetch(4, 1, prefetch_factor=1) == 1


def join_step(step: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in step]) for name in step[0]}


def test_loaded_micro_batches_have_the_losses_of_a_split_batch(demo, tmp_path, monkeypatch):
    arguments = [
        *small(demo),
        "callbacks=null",
        "callbacks.SpeedMonitor={}",
        "algorithms={ProgressiveResizing: {size_increment: 8}}",
        "data.global_micro_batch_size=20",
        "trainer.max_duration=2ba",
    ]
    run_stage(pretrain, [*arguments, "run_name=loaded"], tmp_path)
    load = StepLoader.__iter__
    monkeypatch.setattr(StepLoader, "__iter__", lambda self: map(join_step, load(self)))
    run_stage(pretrain, [*arguments, "run_name=split"], tmp_path)
    assert losses(tmp_path, "loaded") == losses(tmp_path, "split")


def test_smaller_shuffle_blocks_begin_with_fewer_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "PART_SIZE", 4)  # 12 shards of 4 samples
    path = folder_of_stills(tmp_path, 48 * [32])
    shards = {}
    for block in (None, 8):
        settings = {"streams": [{"path": path}], "batch_size": 8, "shuffle_block_size": block}
        batches = [batch["name"] for batch in make_loader(tmp_path, 0, draw_number, **settings)]
        assert sorted(chain(*batches)) == sorted(names_in(Path(path)))
        shards[block] = {int(name[:2]) // 4 for name in batches[0]}
    assert len(shards[8]) <= 4 < len(shards[None])  # half a block on each side of a sample


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (4096, 1024, 1, 7),
            "data.global_micro_batch_size=1024: must be a multiple of the 7 ranks; launch 4 or 8 "
            "ranks, or start a new run with data.global_micro_batch_size=1022 "
            "data.global_train_batch_size=4088",
        ),
        (
            (4096, 1024, 4, 24),
            "data.global_micro_batch_size=1024: must be a multiple of the 24 ranks times "
            "data.repeats=4; launch 16 or 32 ranks, or start a new run with "
            "data.global_micro_batch_size=1056 data.global_train_batch_size=4224",
        ),
        (
            (256, None, 1, 300),
            "data.global_train_batch_size=256: must be a multiple of the 300 ranks; launch 256 "
            "ranks, or start a new run with data.global_train_batch_size=300",
        ),
        (
            (1000, 300, 1, 2),
            "data.global_train_batch_size=1000: must be a multiple of "
            "data.global_micro_batch_size=300, such as 900",
        ),
    ],
)
def test_sizes_that_the_ranks_do_not_divide_are_refused_with_the_nearest_that_work(sizes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_batch(*sizes)
    batch, micro, repeats, ranks = sizes
    for count in re.findall(r"\d+", message.partition("launch")[2].partition("ranks")[0]):
        check_batch(batch, micro, repeats, int(count))
    new = dict(re.findall(r"data\.(\w+)=(\d+)", message.partition("new run")[2]))
    if new:
        batch, micro = new["global_train_batch_size"], new.get("global_micro_batch_size")
        check_batch(int(batch), micro and int(micro), repeats, ranks)


def open_often(barrier, demo: Path) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ["MASTER_PORT"] = "0"
    barrier.wait()
    opened = [make_loader(demo) for _ in range(20)]
    assert len(opened) == 20


def test_jobs_that_start_together_do_not_take_each_others_shared_memory(demo):
    context = fork_server()
    barrier = context.Barrier(2)
    jobs = [context.Process(target=open_often, args=(barrier, demo)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]


def test_shard_on_disk_is_prepared_without_a_lock(demo, monkeypatch):
    dataset = make_loader(demo).dataset
    prepared = []
    monkeypatch.setattr(
        "streaming.StreamingDataset.prepare_shard", lambda self, shard, _: prepared.append(shard)
    )
    dataset.prepare_shard(0, blocking=False)
    assert prepared == []
    dataset.prepare_shard(0, blocking=True)
    assert prepared == [0]


def test_unreadable_sample_gives_way_to_the_next_and_is_listed(demo, tmp_path):
    shutil.copytree(demo / "train_videos", tmp_path / "train_videos")
    corrupted_copy(demo / "train_images", tmp_path, 7)
    images = Clips(str(tmp_path / "train_images"))
    loader = make_loader(tmp_path, 2, run=tmp_path)
    assert sum(len(batch["views"]) for batch in loader) == 120
    lines = (tmp_path / "unreadable.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == [images[7]["name"]]

    def refuse(sample: dict, rng: np.random.Generator) -> dict:
        if sample["name"] == images[7]["name"]:
            raise ValueError("has no label")
        return draw_number(sample, rng)

    drawn = {}
    for batch in make_loader(tmp_path, 0, refuse, run=tmp_path):
        drawn |= {draw: name for name, draw in names_and_draws(batch)}
    replaced = np.random.default_rng((0, 0, 60 + 7, 0)).random()  # the videos come first
    assert len(drawn) == 120 and drawn[replaced] == images[8]["name"]


def folder_of_stills(folder: Path, sides: list[int]) -> str:
    """Convert square pictures of these sides, in the order of their names."""
    (folder / "raw").mkdir()
    for number, side in enumerate(sides):
        pixels = np.full((side, side, 3), 5 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "raw" / f"{number:02}.png")
    data_prep.convert(str(folder / "raw"), str(folder / "set"), Recipe("images"), 1)
    return str(folder / "set")


@pytest.mark.parametrize("place", [0, 3, 11])
def test_sample_smaller_than_a_patch_is_skipped_wherever_it_stands(tmp_path, place):
    sides = [32] * 12
    sides[place] = 7
    path = folder_of_stills(tmp_path, sides)
    loader = make_loader(tmp_path, 0, draw_number, streams=[{"path": path}], batch_size=4)
    drawn = [name for batch in loader for name in batch["name"]]
    small = f"{place:02}.png"
    assert len(drawn) == 12 and set(drawn) == set(names_in(Path(path))) - {small}
    ((name, reason),) = map(json.loads, (tmp_path / "unreadable.jsonl").read_text().splitlines())
    assert (name, reason) == (small, "frames of 7x7 are smaller than model.patch_size=8")


def test_data_whose_samples_cannot_be_used_at_all_end_the_run(demo, tmp_path):
    def refuse(sample: dict, rng: np.random.Generator) -> dict:
        raise ValueError("has no label")

    streams = [{"path": str(demo / "train_images")}]
    loader = make_loader(tmp_path, 0, refuse, streams=streams, run=tmp_path, max_unreadable=1)
    with pytest.raises(ValueError, match=r"no sample can be used, see .*unreadable\.jsonl"):
        next(iter(loader))


def test_too_many_unreadable_samples_end_the_run(demo, tmp_path):
    shutil.copytree(demo / "train_videos", tmp_path / "train_videos")
    corrupted_copy(demo / "train_images", tmp_path, 0, 1, 2, 3, 7)
    complaint = r"^\d samples cannot be used, see .*unreadable\.jsonl; .* run data_prep\.py verify$"
    for workers in (0, 1):  # without the traceback of a worker
        with pytest.raises(TooManyUnreadable, match=complaint):
            list(make_loader(tmp_path, workers, run=tmp_path))


def test_shard_that_is_cut_off_costs_only_its_last_samples(demo, tmp_path):
    shutil.copytree(demo / "train_videos", tmp_path / "train_videos")
    (shard,) = corrupted_copy(demo / "train_images", tmp_path).rglob("*.mds")
    shard.write_bytes(shard.read_bytes()[:-3000])
    loader = make_loader(tmp_path, run=tmp_path, max_unreadable=0.2)
    assert sum(len(batch["views"]) for batch in loader) == 120
    names = [json.loads(line)[0] for line in (tmp_path / "unreadable.jsonl").open()]
    assert 0 < len(names) < 12
    assert "sample 119 of all streams" in names


@pytest.mark.parametrize(
    ("streams", "settings", "complaint"),
    [
        (["nowhere"], {}, "nowhere is not a complete data set"),
        (["train_videos"], {"patch_size": 64}, "40x40 are smaller than model.patch_size=64"),
        ([], {}, "data.streams is empty"),
        (["train_images", "train_images"], {}, "names .*train_images 2 times: name it once"),
        (
            ["train_videos"],
            {"global_micro_batch_size": 15},
            "data.global_train_batch_size=20: must be a multiple of .*micro_batch_size=15",
        ),
        (
            ["train_videos"],
            {"global_train_batch_size": 4000},
            "data.global_train_batch_size=4000: must be at most the 60 samples of an epoch",
        ),
        (
            ["train_videos"],
            {"repeats": 3},
            "data.repeats=3: must divide data.global_train_batch_size=20",
        ),
        (
            ["train_videos"],
            {"download": {"cache_limit": "1gb"}},
            "data.download.cache_limit=1gb: .*train_videos is not in a bucket",
        ),
    ],
)
def test_data_that_cannot_be_used_is_named(demo, streams, settings, complaint):
    dist.initialize_dist("cpu")
    settings = {"global_train_batch_size": 20, **settings}
    patch_size = settings.pop("patch_size", 8)
    paths = [{"path": str(demo / name)} for name in streams]
    data = TrainingData(streams=paths, **settings)
    with pytest.raises(ValueError, match=complaint):
        data.load(draw_number, augment_batch, 0, patch_size, demo)


def test_proportion_of_some_streams_alone_is_refused(demo):
    streams = [{"path": "a"}, {"path": "b", "proportion": 1.0}]
    with pytest.raises(ValueError, match="give a proportion to all streams or to none"):
        make_loader(demo, streams=streams)


@pytest.mark.parametrize("settings", [{"epoch_size": 20}, {}])
def test_repeat_beside_another_weight_is_refused(demo, settings):
    streams = [{"path": "a", "repeat": 2.0} | ({} if settings else {"proportion": 1.0})]
    with pytest.raises(ValueError, match="repeat excludes proportion"):
        make_loader(demo, streams=streams, **settings)


def test_data_set_without_a_readable_frame_is_refused(demo, tmp_path):
    corrupted_copy(demo / "train_images", tmp_path, *range(60))
    with pytest.raises(ValueError, match="train_images: none of 16 samples can be trained on"):
        make_loader(tmp_path, streams=[{"path": str(tmp_path / "train_images")}])


def test_stream_is_a_streaming_dataset_of_whole_batches(demo):
    dataset = make_loader(demo, epoch_size=79).dataset
    assert isinstance(dataset, DeterministicStream)
    assert (dataset.epoch_size, len(dataset)) == (60, 60)


def test_batches_that_do_not_fit_into_shared_memory_are_refused_before_training(demo, monkeypatch):
    usage = shutil.disk_usage("/dev/shm")._replace(free=1_000_000)
    monkeypatch.setattr(shards.loader.shutil, "disk_usage", lambda folder: usage)
    # A sample has 2 views of 32 x 32 x 3 bytes, 2 x 8 and 2 x 16 floats, and its label.
    needed = 2 * 4 * 20 * (2 * 32 * 32 * 3 + 4 * 2 * (8 + 16) + 8)
    match = f"/dev/shm: 8 batches need {needed / 1e6:.0f} MB, but it has 1 MB free; enlarge it"
    with pytest.raises(OSError, match=match):
        make_loader(demo, 4)
    make_loader(demo, 0)
