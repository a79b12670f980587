"""Access to files in a local folder or under an s3:// address, through one interface.

A file is written completely or not at all. Every failure is an OSError that names the address.
boto3 reaches S3 with its usual credentials, at S3_ENDPOINT_URL if that is set.
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
def s3_client(process_id: int):
    """Return boto3's client for a process, which must not share its parent's connections."""
    import boto3

    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))


@contextmanager
def bucket_errors(address: str) -> Iterator[None]:
    """Raise boto3's exceptions as OSErrors with the address; FileNotFoundError if it is missing."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error) as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else None
        number = errno.ENOENT if code in ("404", "NoSuchKey") else errno.EIO
        raise OSError(number, str(error), address) from error


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@dataclass(frozen=True)
class Storage:
    """A folder, which need not exist yet, or all files under an address s3://bucket/prefix.

    Writes are atomic: readers see the old file or the new, also if the writing process is killed
    midway. Methods raise FileNotFoundError if a file to read is missing, and OSError for whatever
    else prevents them. `upload`, `download` and `delete` are for buckets only.
    """

    root: str

    def __post_init__(self):
        if "://" in self.root and not self.root.startswith("s3://"):
            raise ValueError(f"{self.root} is neither a folder nor an s3:// address")

    @property
    def remote(self) -> bool:
        return self.root.startswith("s3://")

    def at(self, name: str) -> str:
        """Return the full path or address of a file."""
        return os.path.join(self.root, name)

    def key(self, name: str) -> dict[str, str]:
        """Return the bucket and key of a file, as boto3's arguments."""
        bucket, _, key = self.at(name).removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": key}

    def names(self, under: str = "", hidden: bool = False) -> Iterator[str]:
        """Yield all files in the folder `under` and its subfolders, sorted, except hidden files.

        Args:
            hidden: yield hidden files, and hidden folders without what is in them, as well.
        """
        if self.remote:
            yield from self._names_in_bucket(under, hidden)
            return
        try:
            entries = list(os.scandir(self.at(under)))
        except FileNotFoundError:
            if not under:
                raise
            return  # A worker of an interrupted run may have renamed it since its parent was read.
        # With the slash, folders sort as they do in a bucket.
        entries.sort(key=lambda entry: entry.name + "/" if entry.is_dir() else entry.name)
        for entry in entries:
            name = os.path.join(under, entry.name)
            if is_hidden(entry.name):
                if hidden:
                    yield name
            elif not entry.is_dir():
                yield name
            elif not (entry.is_symlink() and Path(entry).resolve() in Path(self.at(name)).parents):
                yield from self.names(name, hidden)  # unless the link leads back upwards

    def _names_in_bucket(self, under: str, hidden: bool) -> Iterator[str]:
        bucket, root = self.key("").values()
        prefix = self.key(os.path.join(under, ""))["Key"]
        with bucket_errors(self.at(under)):
            paginator = s3_client(os.getpid()).get_paginator("list_objects_v2")
            for page in paginator.paginate(Bucket=bucket, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    name = entry["Key"][len(root) :].lstrip("/")
                    if not name.endswith("/") and (hidden or not is_hidden(name)):
                        yield name

    def has(self, name: str) -> bool:
        """Return whether there is such a file or folder."""
        if not self.remote:
            return os.path.exists(self.at(name))
        bucket, key = self.key(name).values()
        with bucket_errors(self.at(name)):
            # The first key that begins with the name of a file is the file itself, if it exists.
            request = {"Bucket": bucket, "MaxKeys": 1}
            files = s3_client(os.getpid()).list_objects_v2(Prefix=key, **request)
            if any(entry["Key"] == key for entry in files.get("Contents", ())):
                return True
            folder = key.rstrip("/") + "/"
            return s3_client(os.getpid()).list_objects_v2(Prefix=folder, **request)["KeyCount"] > 0

    def stream(self, name: str, begin: int = 0, size: int | None = None) -> BinaryIO:
        """Return a file to be read in order from `begin` on.

        A bucket sends only `size` bytes of it. A local file goes on to its end.
        """
        if not self.remote:
            file = self.open(name)
            file.seek(begin)
            return file
        request = self.key(name)
        if begin or size is not None:
            end = "" if size is None else begin + size - 1
            request["Range"] = f"bytes={begin}-{end}"
        with bucket_errors(self.at(name)):
            return s3_client(os.getpid()).get_object(**request)["Body"]

    def read(self, name: str, begin: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes of a file from byte `begin` on; by default, all of them."""
        with self.stream(name, begin, size) as file, bucket_errors(self.at(name)):
            return file.read(size)

    def open(self, name: str) -> BinaryIO:
        """Return a file that can be read in any order; out of a bucket, it is held in memory."""
        return io.BytesIO(self.read(name)) if self.remote else open(self.at(name), "rb")

    def write(self, name: str, data: bytes) -> None:
        """Write a file, and check the SHA-256 of what a bucket received."""
        if not self.remote:
            temporary = Path(f"{self.at(name)}.{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(self.at(name))
            return
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        with bucket_errors(self.at(name)):
            client = s3_client(os.getpid())
            client.put_object(**self.key(name), Body=data, ChecksumAlgorithm="SHA256")
            stored = client.head_object(**self.key(name), ChecksumMode="ENABLED")
        arrived = (stored["ContentLength"], stored.get("ChecksumSHA256", digest))
        if arrived != (len(data), digest):
            message = f"the bucket did not store the {len(data)} bytes that were sent"
            raise OSError(errno.EIO, message, self.at(name))

    def write_json(self, name: str, value: object) -> None:
        """Write a value as a JSON file."""
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file into the bucket, in checked pieces."""
        bucket, key = self.key(name).values()
        options = {"ChecksumAlgorithm": "SHA256"}
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).upload_file(str(path), bucket, key, ExtraArgs=options)

    def download(self, name: str, path: Path) -> None:
        """Copy a file out of the bucket; the local file is replaced once the copy is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).download_file(*self.key(name).values(), str(path))

    def delete(self, name: str) -> None:
        """Delete a file of the bucket, if it is there."""
        with bucket_errors(self.at(name)):
            s3_client(os.getpid()).delete_object(**self.key(name))


def write_file(path: str, data: bytes) -> None:
    """Write a local file atomically, see Storage.write."""
    Storage(os.path.dirname(path) or ".").write(os.path.basename(path), data)


def write_picture(to: Path, draw: Callable[..., None]) -> None:
    """Write the PNG file that draw(file, format="png") draws, atomically."""
    buffer = io.BytesIO()
    draw(buffer, format="png")
    write_file(str(to), buffer.getvalue())
