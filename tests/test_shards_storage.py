"""Data sets in buckets: the S3 server is moto on this machine, reached over HTTP through boto3."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image
from test_data_prep import files_of, write_image, write_images, write_video

import data_prep
from data_prep import convert
from shards.decode import Recipe
from shards.format import Clips, read_classes
from shards.inspect import show, verify
from shards.layouts import list_in1k
from shards.storage import Storage, bucket_errors, s3_client
from shards.stream import open_stream
from shards.views import EvalViews


def upload(client, folder: Path, prefix: str) -> None:
    """Copy all files of a folder into the bucket."""
    for name, data in files_of(folder).items():
        client.put_object(Bucket="bkt", Key=f"{prefix}/{name}", Body=data)


def objects(client, prefix: str) -> dict[str, bytes]:
    """Return {name: content} of everything under a prefix of the bucket."""
    found = client.list_objects_v2(Bucket="bkt", Prefix=prefix + "/").get("Contents", ())
    keys = [entry["Key"] for entry in found]
    return {
        key.removeprefix(prefix + "/"): client.get_object(Bucket="bkt", Key=key)["Body"].read()
        for key in keys
    }


def without_source(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a data set without the address of its source."""
    plain = {}
    for name, data in files.items():
        value = json.loads(data) if name in ("request.json", "report.json") else data
        plain[name] = (
            {key: part for key, part in value.items() if key != "source"}
            if isinstance(value, dict)
            else value
        )
    return plain


def test_source_in_a_bucket_converts_to_the_same_bytes_as_on_disk(bucket, tmp_path):
    write_images(tmp_path / "in", 12)
    write_image(tmp_path / "in" / "class 0 and more" / "a.png")
    write_video(tmp_path / "clips" / "c" / "a.mp4", frames=12)
    (tmp_path / "clips" / "c" / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "clips" / "list.csv").write_text("path,label\nc/a.mp4,first\nc/lost.mp4,second\n")
    with tarfile.open(tmp_path / "clips" / "x-0.tar", "w") as tar:
        for number in range(3):
            for ending, data in (
                ("mp4", (tmp_path / "clips" / "c" / "a.mp4").read_bytes()),
                ("cls", b"%d" % number),
            ):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for name in ("in", "clips"):
        upload(bucket, tmp_path / name, f"some/{name}")
    for kind, source, samples in (
        ("images", "in", 13),
        ("videos", "clips", 1),
        ("videos", "clips/list.csv", 1),
        ("videos", "clips/x-{0..0}.tar", 3),
    ):
        made = {}
        for root in (str(tmp_path), "s3://bkt/some"):
            out = tmp_path / f"out {len(made)}"
            report = convert(
                f"{root}/{source}", str(out), Recipe(kind, frames=4), 2, max_skipped=0.5
            )
            assert report["samples"] == samples and report["absent"] == (source == "clips/list.csv")
            made[root] = without_source(files_of(out))
            shutil.rmtree(out)
        local, remote = made.values()
        assert local == remote


def test_imagenets_tar_of_tars_is_read_from_a_bucket_without_unpacking(bucket, tmp_path):
    write_image(tmp_path / "a.JPEG")
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in ("n02", "n01"):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number in range(3):
                    inner.add(tmp_path / "a.JPEG", f"{wnid}_{number}.JPEG")
            member = tarfile.TarInfo(f"{wnid}.tar")
            member.size = buffer.tell()
            buffer.seek(0)
            outer.addfile(member, buffer)
    bucket.upload_file(
        str(tmp_path / "ILSVRC2012_img_train.tar"), "bkt", "imagenet/ILSVRC2012_img_train.tar"
    )
    convert("s3://bkt/imagenet", str(tmp_path / "out"), Recipe("images"), 2, list_inputs=list_in1k)
    clips = Clips(str(tmp_path / "out"))
    assert read_classes(str(tmp_path / "out")) == ["n01", "n02"]
    assert [
        (clips[number]["label"], clips[number]["name"][-10:]) for number in range(len(clips))
    ] == [
        (label, f"{wnid}_{number}.JPEG")
        for label, wnid in ((1, "n02"), (0, "n01"))
        for number in range(3)
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_output_in_a_bucket_equals_a_local_one_with_and_without_local_copies(
    bucket, tmp_path, keep
):
    write_images(tmp_path / "in", 12)
    convert(str(tmp_path / "in"), str(tmp_path / "folder"), Recipe("images"), 2)
    report = convert(str(tmp_path / "in"), "s3://bkt/my/set", Recipe("images"), 2, keep_local=keep)
    folder = files_of(tmp_path / "folder")
    assert report["samples"] == 12 and objects(bucket, "my/set") == folder
    local = files_of(tmp_path / "my" / "set")
    kept = {name: data for name, data in folder.items() if name != "request.json"}
    assert local == (kept if keep else {})

    def times_of_finished_parts() -> dict:
        found = bucket.list_objects_v2(Bucket="bkt")["Contents"]
        times = {entry["Key"]: entry["LastModified"] for entry in found}
        return {key: time for key, time in times.items() if "part-" in key and "000001" not in key}

    before = times_of_finished_parts()
    # A killed machine leaves a part without its part.json.
    bucket.delete_object(Bucket="bkt", Key="my/set/part-000001/part.json")
    convert(str(tmp_path / "in"), "s3://bkt/my/set", Recipe("images"), 2, keep_local=keep)
    assert objects(bucket, "my/set") == folder
    assert times_of_finished_parts() == before


def test_machines_without_a_common_disk_share_a_conversion_through_the_bucket(
    bucket, tmp_path, monkeypatch
):
    write_images(tmp_path / "in", 24)
    convert(str(tmp_path / "in"), str(tmp_path / "folder"), Recipe("images"), 2)
    for number in (1, 2):
        (tmp_path / f"machine {number}").mkdir()
        monkeypatch.chdir(tmp_path / f"machine {number}")
        convert(
            str(tmp_path / "in"),
            "s3://bkt/set",
            Recipe("images"),
            1,
            share=(number, 2),
            keep_local=number == 1,
        )
    data_prep.merge("s3://bkt/set")
    assert objects(bucket, "set") == files_of(tmp_path / "folder")


def test_data_set_in_a_bucket_is_read_shown_and_verified_without_a_copy(bucket, tmp_path, capsys):
    write_images(tmp_path / "in", 12)
    convert(str(tmp_path / "in"), str(tmp_path / "folder"), Recipe("images"), 2)
    upload(bucket, tmp_path / "folder", "set")
    local, remote = Clips(str(tmp_path / "folder")), Clips("s3://bkt/set")
    assert len(remote) == 12
    for number in (0, 5, 11):
        expected, sample = local[number], remote[number]
        assert sample.keys() == expected.keys()
        assert all(np.array_equal(sample[key], expected[key]) for key in expected)
    show("s3://bkt/set", str(tmp_path / "remote.png"))
    show(str(tmp_path / "folder"), str(tmp_path / "local.png"))
    assert np.array_equal(Image.open(tmp_path / "remote.png"), Image.open(tmp_path / "local.png"))
    assert EvalViews(["s3://bkt/set"], 24)[3]["inputs"].shape == (1, 1, 3, 24, 24)

    assert verify("s3://bkt/set", 2) == []
    shard = bytearray(objects(bucket, "set")["part-000001/shard.00000.mds"])
    shard[len(shard) // 2] ^= 1
    bucket.put_object(Bucket="bkt", Key="set/part-000001/shard.00000.mds", Body=bytes(shard))
    bucket.delete_object(Bucket="bkt", Key="set/part-000002/shard.00000.mds")
    corrupt, *_, missing = verify("s3://bkt/set", 2)
    assert corrupt.startswith("part-000001/shard.00000.mds is corrupt")
    assert missing == "part-000002/shard.00000.mds is missing"


def test_unreachable_bucket_is_named_and_the_same_command_continues(bucket, tmp_path, monkeypatch):
    write_images(tmp_path / "in", 12)
    arguments = (str(tmp_path / "in"), "s3://bkt/set", Recipe("images"), 1)
    write = Storage.write

    def fail(storage, name, data):
        if name == "part-000001/shard.00000.mds":
            unreachable = boto3.client("s3", endpoint_url="http://127.0.0.1:9")
            with bucket_errors(storage.at(name)):
                unreachable.put_object(**storage.key(name), Body=data)
        write(storage, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", fail)
        with pytest.raises(
            OSError, match=r"Could not connect.*s3://bkt/set/part-000001/shard.00000.mds"
        ):
            convert(*arguments)
    assert "set/part-000000/part.json" in {
        one["Key"] for one in bucket.list_objects_v2(Bucket="bkt")["Contents"]
    }
    assert convert(*arguments)["samples"] == 12
    convert(str(tmp_path / "in"), str(tmp_path / "folder"), Recipe("images"), 1)
    assert objects(bucket, "set") == files_of(tmp_path / "folder")


@pytest.mark.parametrize("root", ["folder", "s3://bkt/folder"])
def test_storage_reads_lists_and_replaces_files_alike_in_folders_and_buckets(
    bucket, tmp_path, root
):
    (tmp_path / "folder" / "b").mkdir(parents=True)
    storage = Storage(root)
    for name in ("b.txt", "b/c", "b/.hidden", "a"):
        storage.write(name, b"0123456789")
    storage.write_json("a", {"é": 1})
    assert list(storage.names()) == ["a", "b.txt", "b/c"]
    assert list(storage.names("b")) == ["b/c"]
    assert storage.has("a") and storage.has("b") and storage.has("b/c")
    assert not storage.has("b/missing") and not storage.has("b.t")
    assert storage.read("b/c") == b"0123456789" and storage.read("b/c", 2, 3) == b"234"
    assert json.loads(storage.read("a")) == {"é": 1}
    with storage.open("b/c") as file:
        assert file.seek(8) == 8 and file.read() == b"89"
    for access in (storage.read, storage.open, storage.stream):
        with pytest.raises(FileNotFoundError, match=r"folder/missing"):
            access("missing")


def test_files_copied_to_a_bucket_and_back_are_equal_and_can_be_deleted(bucket, tmp_path):
    storage = Storage("s3://bkt/folder")
    (tmp_path / "file").write_bytes(b"data")
    storage.upload(tmp_path / "file", "copy")
    storage.download("copy", tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == b"data"
    storage.delete("copy")
    storage.delete("copy")
    assert not storage.has("copy")


@pytest.mark.parametrize("arrived", [b"dat", b"dat?"])
def test_write_to_a_bucket_raises_if_it_stored_other_bytes(bucket, monkeypatch, arrived):
    client = s3_client(os.getpid())
    put = client.put_object
    monkeypatch.setattr(client, "put_object", lambda **given: put(**given | {"Body": arrived}))
    with pytest.raises(OSError, match=r"did not store the 4 bytes that were sent.*s3://bkt/x/name"):
        Storage("s3://bkt/x").write("name", b"data")


def test_error_names_a_wrong_address_bucket_or_object(bucket, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="gs://b/x is neither a folder nor an s3:// address"):
        convert("gs://b/x", str(tmp_path / "out"), Recipe("images"))
    with pytest.raises(OSError, match=r"NoSuchBucket.*s3://nowhere"):
        convert("s3://nowhere/x", str(tmp_path / "out"), Recipe("images"))
    with pytest.raises(ValueError, match="s3://bkt/empty does not exist"):
        convert("s3://bkt/empty", str(tmp_path / "out"), Recipe("images"))
    with pytest.raises(
        ValueError, match=r"s3://bkt/empty is not a complete data set: index.json is missing"
    ):
        open_stream(path="s3://bkt/empty")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    s3_client.cache_clear()
    with pytest.raises(OSError, match=r"Could not connect.*s3://bkt/x"):
        convert("s3://bkt/x", str(tmp_path / "out"), Recipe("images"))
