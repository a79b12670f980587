"""Shards of data sets in buckets: where a machine keeps them, and what it downloads again."""

import shutil
from pathlib import Path

from test_shards_stream import assert_same_batches, make_loader

from shards.download import Download


def upload(client, folder: Path) -> str:
    """Put a data set into the bucket, and return its address."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        key = f"{folder.name}/{file.relative_to(folder)}"
        client.put_object(Bucket="bkt", Key=key, Body=file.read_bytes())
    return f"s3://bkt/{folder.name}"


def test_batches_from_a_bucket_are_those_from_disk(bucket, demo, tmp_path):
    folder = demo / "train_videos"
    path = upload(bucket, folder)
    near = list(make_loader(demo, 2, streams=[{"path": str(folder)}]))
    assert len(near) == 3
    caches = [{"cache": str(tmp_path / "mine")}, {}, {}]  # two runs with default folders
    for number, cache in enumerate(caches):
        run = tmp_path / f"run{number}"
        stream = {"path": path, **cache}
        download = {"cache_limit": "1gb", "predownload": 8, "retry": 1, "timeout": 30.0}
        loader = make_loader(demo, 2, streams=[stream], run=run, download=download)
        assert_same_batches(near, list(loader))
    assert list((tmp_path / "mine").rglob("*.mds"))
    folders = sorted((tmp_path / "cache" / "vicmae").iterdir())  # conftest sets XDG_CACHE_HOME
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["run1", "run2"]


def test_shards_survive_a_kill_and_halves_of_shards_do_not(bucket, demo, tmp_path):
    path = upload(bucket, demo / "train_videos")
    settings = {"streams": [{"path": path}], "download": {"cache": str(tmp_path / "disk")}}
    expected = list(make_loader(demo, run=tmp_path, **settings))
    (shard,) = (tmp_path / "disk").rglob("*.mds")
    data, time = shard.read_bytes(), shard.stat().st_mtime_ns
    (half := shard.with_name(f"{shard.name}.Ab12Cd34")).write_bytes(data[:100])  # as boto3 does
    assert_same_batches(list(make_loader(demo, run=tmp_path, **settings)), expected)
    assert shard.stat().st_mtime_ns == time and not half.exists()
    shard.write_bytes(data[:-1])
    assert_same_batches(list(make_loader(demo, run=tmp_path, **settings)), expected)
    assert shard.read_bytes() == data


def test_other_samples_at_the_same_address_are_kept_in_another_folder(bucket, demo, tmp_path):
    path = upload(bucket, demo / "train_videos")
    before = Download().folder(Path("runs/a"), path)
    assert Download().folder(Path("runs/a"), path) == before
    shutil.copytree(demo / "train_images", tmp_path / "train_videos")
    upload(bucket, tmp_path / "train_videos")
    assert Download().folder(Path("runs/a"), path) != before
