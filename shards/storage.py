"""Where files lie: a folder, or an s3:// address, read and written alike.

Writes are whole or not there at all. Whatever goes wrong is an OSError that names the address.
"""

import base64
import errno
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@functools.cache
def s3_client(process: int):
    """boto3's client; one for each process, since a forked one must not share its parent's connections."""
    import boto3

    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))


@contextmanager
def bucket_errors(address: str) -> Iterator[None]:
    """What boto3 raises, as an OSError that names the address."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error) as error:
        missing = isinstance(error, ClientError) and error.response["Error"]["Code"] in (
            "404",
            "NoSuchKey",
        )
        raise OSError(errno.ENOENT if missing else errno.EIO, str(error), address) from error


@dataclass(frozen=True)
class Storage:
    """A folder, or what lies under an s3:// address (at S3_ENDPOINT_URL, if that is set). Names in it have slashes.

    Its methods raise FileNotFoundError where there is no such file, and OSError for whatever else is in the way.
    """

    root: str

    def __post_init__(self):
        if "://" in self.root and not self.root.startswith("s3://"):
            raise ValueError(f"{self.root} is neither a folder nor an s3:// address")

    @property
    def remote(self) -> bool:
        return self.root.startswith("s3://")

    def at(self, name: str) -> str:
        return os.path.join(self.root, name)

    def key(self, name: str) -> dict[str, str]:
        bucket, _, key = self.at(name).removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": key}

    def names(self, under: str = "") -> Iterator[str]:
        """Every file in the folder `under` and its folders, in order; hidden ones are left out."""
        if not self.remote:
            try:
                entries = [
                    entry for entry in os.scandir(self.at(under)) if not entry.name.startswith(".")
                ]
            except (
                FileNotFoundError
            ):  # renamed since its own folder was read: by a worker that a killed run left behind
                if not under:
                    raise
                return
            for entry in sorted(
                entries, key=lambda entry: entry.name + "/" * entry.is_dir()
            ):  # the order of a bucket
                name = os.path.join(under, entry.name)
                yield from self.names(name) if entry.is_dir() else [name]
            return
        base, prefix = self.key("")["Key"], self.key(os.path.join(under, ""))
        with bucket_errors(self.at(under)):
            pages = s3_client(os.getpid()).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=prefix["Bucket"], Prefix=prefix["Key"]):
                for found in page.get("Contents", ()):
                    name = found["Key"][len(base) :].lstrip("/")
                    if not any(
                        part.startswith(".") for part in name.split("/")
                    ) and not name.endswith("/"):
                        yield name

    def has(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        if not self.remote:
            return os.path.exists(self.at(name))
        with bucket_errors(self.at(name)):
            where, client = self.key(name), s3_client(os.getpid())
            prefixes = (where["Key"], where["Key"].rstrip("/") + "/")
            found = [
                client.list_objects_v2(Bucket=where["Bucket"], Prefix=one, MaxKeys=1)
                for one in prefixes
            ]
        return bool(found[1]["KeyCount"]) or any(
            one["Key"] == where["Key"] for one in found[0].get("Contents", ())
        )

    def stream(self, name: str, begin: int = 0, size: int | None = None) -> BinaryIO:
        """The file from byte `begin` on, to be read in order."""
        if not self.remote:
            file = self.open(name)
            file.seek(begin)
            return file
        last = "" if size is None else begin + size - 1
        ranged = {} if size is None and not begin else {"Range": f"bytes={begin}-{last}"}
        with bucket_errors(self.at(name)):
            return s3_client(os.getpid()).get_object(**self.key(name), **ranged)["Body"]

    def read(self, name: str, begin: int = 0, size: int | None = None) -> bytes:
        with self.stream(name, begin, size) as file, bucket_errors(self.at(name)):
            return file.read(size)

    def open(self, name: str) -> BinaryIO:
        """The file, to be read in any order."""
        return io.BytesIO(self.read(name)) if self.remote else open(self.at(name), "rb")

    def write(self, name: str, data: bytes) -> None:
        """Put a file there so that it is either as it was or complete; what a bucket received is checked."""
        if not self.remote:
            aside = Path(f"{self.at(name)}.{os.getpid()}.tmp")
            aside.write_bytes(data)
            aside.replace(self.at(name))
            return
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        with bucket_errors(self.at(name)):
            client = s3_client(os.getpid())
            client.put_object(**self.key(name), Body=data, ChecksumAlgorithm="SHA256")
            there = client.head_object(**self.key(name), ChecksumMode="ENABLED")
        if there["ContentLength"] != len(data) or there.get("ChecksumSHA256", digest) != digest:
            raise OSError(
                errno.EIO,
                f"what arrived is not the {len(data)} bytes that were sent",
                self.at(name),
            )

    def upload(self, path: Path, name: str) -> None:
        """Copy a file into the bucket, in pieces and checked: it is there as a whole or not at all."""
        where = self.key(name)
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).upload_file(
                str(path), *where.values(), ExtraArgs={"ChecksumAlgorithm": "SHA256"}
            )

    def download(self, name: str, path: Path) -> None:
        """Copy a file out of the bucket."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).download_file(*self.key(name).values(), str(path))

    def delete(self, name: str) -> None:
        """Delete a file of the bucket."""
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).delete_object(**self.key(name))

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False).encode())


def write_file(path: str, data: bytes) -> None:
    """Storage.write for a file by its path."""
    Storage(os.path.dirname(path) or ".").write(os.path.basename(path), data)


def write_picture(to: Path, draw: Callable[..., None]) -> None:
    """Write a file of what draw(file, format="png") draws."""
    buffer = io.BytesIO()
    draw(buffer, format="png")
    write_file(str(to), buffer.getvalue())
