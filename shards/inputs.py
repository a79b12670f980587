"""Inputs of a conversion: the manifest of a source, and the reading of files and samples of tars.

The manifest is a file of one line per input, so that memory does not grow with the data set.
"""

import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import BinaryIO

import av

from shards.layouts import EXTENSIONS, Listing, are_splits
from shards.report import LATE_LABEL, Ignored, printable
from shards.storage import bucket_errors

# Errors of a disk, a bucket or the system, which are no fault of the input.
SYSTEM_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
}


def is_system_error(error: Exception) -> bool:
    """Return whether an exception is the fault of the system, not of an input."""
    if isinstance(error, av.FFmpegError):  # is an OSError too
        return False
    return isinstance(error, OSError) and error.errno in SYSTEM_ERRORS


def describe_error(error: Exception) -> str:
    """Return type and message of an exception, the same on every machine and in every process."""
    message = str(getattr(error, "strerror", None) or error)
    message = re.sub(r" ?<.* at 0x\w+>", "", message)
    return " ".join(f"{type(error).__name__}: {message}".split())


def part_name(number: int) -> str:
    return f"part-{number:06d}"


@dataclass
class Manifest:
    """A file of the inputs of a conversion, one JSON line each, in parts."""

    path: str
    starts: list[int]  # byte of the file at which each part begins
    part_size: int  # inputs of a part

    def parts(self, share: tuple[int, int]) -> list[str]:
        """Return the names of the parts in the k-th of n shares, for share = (k, n)."""
        number, count = share
        return [part_name(part) for part in range(number - 1, len(self.starts), count)]

    def read_entries(self, part: str) -> list:
        """Return the inputs of a part, each a list with the values of a Listing's tuple."""
        number = int(part.removeprefix("part-"))
        with open(self.path, "rb") as file:
            file.seek(self.starts[number])
            return [json.loads(line) for line in islice(file, self.part_size)]


def write_manifest(
    listing: Listing, file: BinaryIO, per_class: int | None, part_size: int
) -> tuple[Manifest, dict]:
    """Write the inputs of a source, or the first `per_class` of each class, to a named file.

    The manifest is returned with the counts, classes and hash of the list, as in request.json.
    """
    taken, absent, listed, starts = Counter(), 0, 0, []
    digest = hashlib.sha256()
    known = set(listing.classes or ())
    unlisted = set(listing.candidates)
    for entry in listing.inputs:
        if entry is None:
            absent += 1
            continue
        name, class_name, *span = entry
        if class_name is not None:
            class_name = printable(class_name)
        unlisted.discard(name)
        if known and class_name is not None and class_name not in known:
            fault = "which is not in the data set's list of classes"
            raise ValueError(f"{name} is of class {class_name!r}, {fault}")
        if taken and (class_name is None) != (None in taken):
            has, before = ("no class", "one") if class_name is None else ("a class", "none")
            fault = f"has {has}, but inputs before it have {before}"
            at = printable(listing.storage.at(name))
            raise ValueError(f"{at} {fault}; move it out of SOURCE")
        taken[class_name] += 1
        if per_class and taken[class_name] > per_class:
            listing.ignored.add("beyond --per-class", [name])
            continue
        if listed % part_size == 0:
            starts.append(file.tell())
        entry = [name, class_name, *span]
        file.write(json.dumps(entry).encode() + b"\n")  # ASCII keeps names that are not UTF-8.
        text = json.dumps(entry, ensure_ascii=False) + "\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
        listed += 1
    file.flush()
    if unlisted:
        listing.ignored.add("not in the list", sorted(unlisted), len(unlisted))
    named = set(listing.truth.values()) or taken.keys() - {None}
    named |= set(map(printable, listing.empty_classes if named else ()))
    if are_splits(named) and not known:
        folders = sorted(named)
        fault = f"holds the folders {', '.join(folders[:5])}, which are no classes"
        remedy = f"give each as SOURCE, {listing.storage.at(folders[0])} first"
        raise ValueError(f"SOURCE {listing.storage.root} {fault}; {remedy}")
    counts = {
        "listed": listed,
        "absent": absent,
        "classes": listing.classes or sorted(named),
        "listing": digest.hexdigest(),
        "ignored": listing.ignored,
    }
    return Manifest(file.name, starts, part_size), counts


def read_inputs(listing: Listing, kind: str, entries: list, ignored: Ignored) -> Iterator[tuple]:
    """Yield (name, class name or label or None, a function that opens it) for every input.

    Of tars, the samples are yielded instead, and all other members counted as `ignored`.
    """
    if listing.tars:
        for name, class_name, *span in entries:
            yield from read_tar(listing, kind, name, class_name, span, ignored)
        return
    for name, class_name in entries:
        yield name, class_name, functools.partial(listing.storage.open, name)


def read_tar(
    listing: Listing,
    kind: str,
    name: str,
    class_name: str | None,
    span: list[int],
    ignored: Ignored,
) -> Iterator[tuple]:
    """Yield the samples of a tar; `span` is its first byte and size if it lies in another tar.

    The members of a sample differ in their extensions and stand side by side; a label may also
    stand earlier. Unlike in webdataset, an extension begins at the last dot. A corrupt tar yields
    its intact samples, and then an input of its own name that raises ValueError when opened.
    """
    from webdataset.tariterators import tar_file_expander

    size = span[1] if span else math.inf
    labels = {}  # of members without a picture or video beside them
    unlabelled = set()
    try:
        with listing.storage.stream(name, *span) as file, bucket_errors(listing.storage.at(name)):
            tar = CheckedTar(file, size)
            files = tar_file_expander([{"url": name, "stream": tar}])
            files = (file for file in files if "fname" in file)  # without its marks of the end
            for key, group in groupby(files, lambda file: os.path.splitext(file["fname"])[0]):
                members = {os.path.splitext(file["fname"])[1]: file["data"] for file in group}
                media = [ending for ending in members if ending.lower() in EXTENSIONS[kind]]
                label = read_label(members)
                others = set(members) - set(media[:1])
                if label is not None:
                    others -= {".cls", ".json"}
                for ending in sorted(others):
                    ignored.add(f"extension {ending.lower()}", [f"{name}/{key}{ending}"])
                if not media:
                    if label is not None and key in unlabelled:
                        ignored.add(LATE_LABEL, [f"{name}/{key}"])
                    labels[key] = label
                    continue
                label = labels.pop(key, None) if label is None else label
                truth = class_name or listing.truth.get(os.path.basename(key))
                if truth is None and label is None:
                    unlabelled.add(key)
                open_input = functools.partial(io.BytesIO, members[media[0]])
                yield f"{name}/{key}{media[0]}", label if truth is None else truth, open_input
            tar.check_end()
    except (tarfile.TarError, EOFError, ValueError, FileNotFoundError) as error:
        reason = f"{error}; the samples after it are lost"

        def raise_error() -> BinaryIO:
            raise ValueError(reason)

        yield name, None, raise_error


def find_label(class_name: str | int | None, classes: list[str], labels: dict) -> int:
    """Return the label of a class name, or the label that a sample of a tar has instead.

    An unknown class, or a label without a class, raises ValueError.
    """
    label = labels.get(class_name, class_name)
    if isinstance(label, str):
        raise ValueError(f"class {label!r}: unknown; list the classes with --classes")
    if label < -1 or (classes and label >= len(classes)):
        raise ValueError(f"label {label}: must be below {len(classes)}, or -1")
    return label


def read_label(members: dict[str, bytes]) -> int | str | None:
    """Return the number or the class name in the .cls or .json member of a sample, if any."""
    text = ""
    if ".cls" in members:
        text = members[".cls"].decode().strip()
    elif ".json" in members:
        with suppress(ValueError, TypeError):  # some other JSON file
            content = json.loads(members[".json"])
            labels = [content[key] for key in ("label", "class", "cls") if key in content]
            text = str(labels[0]) if labels else ""
    try:
        return int(text)
    except ValueError:
        return text or None


class CheckedTar:
    """A tar of `size` bytes at most, which is read in order and then checked for its end.

    tarfile itself takes a truncated tar, or a tar with a corrupt header, for complete.
    """

    def __init__(self, file: BinaryIO, size: float):
        self.file = file
        self.left = size
        self.tail = b""  # up to two blocks, read last

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes, and none at the end."""
        data = self.file.read(min(count, self.left))
        self.left -= len(data)
        self.tail = (self.tail + data)[-2 * tarfile.BLOCKSIZE :]
        return data

    def check_end(self) -> None:
        """Raise tarfile.ReadError unless only zeros are left, and at least a block of them."""
        while data := self.read(1 << 20):
            if data.strip(b"\0"):
                raise tarfile.ReadError("a header in it is corrupt")
        if len(self.tail) < tarfile.BLOCKSIZE or self.tail.strip(b"\0"):
            raise tarfile.ReadError("it is truncated")
