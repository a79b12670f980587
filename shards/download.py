"""Shards of data sets in buckets, and the folder in which a machine keeps them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from streaming import Stream
from streaming.base.format.base.reader import Reader

from shards.format import fingerprint

Size = Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)?[kmgt]b$")]  # such as 200gb


@dataclass(kw_only=True)
class Download:
    """The download of shards from buckets, and their cache; the order of samples stays.

    Args:
        cache: folder for the shards of all runs, on a fast local disk that outlives a restart;
            default vicmae in $XDG_CACHE_HOME, or in ~/.cache.
        cache_limit: size such as 200gb that the shards of a run may have on a machine; the least
            recently read shard is then deleted. It must be four times the largest shard or more.
        predownload: samples that each worker downloads ahead; default 8 micro-batches of a rank.
        retry: times that a failed download is tried again.
        timeout: seconds to wait for an answer of the bucket.
    """

    cache: str | None = None
    cache_limit: Size | None = None
    predownload: PositiveInt | None = None
    retry: NonNegativeInt = 2
    timeout: PositiveFloat = 60.0

    def folder(self, run: Path, path: str) -> str:
        """Return where a run keeps the shards of an s3:// address.

        A resumed run has the same folder. Two runs, or other samples at the same address, do not.
        """
        content = f"{path} {fingerprint(path)['samples']}"
        name = f"{run.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return str(Path(self.cache or Path(user_cache, "vicmae"), name))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of StreamingDataset."""
        return {
            "cache_limit": self.cache_limit,
            "predownload": self.predownload,
            "download_retry": self.retry,
            "download_timeout": self.timeout,
        }


class CachedStream(Stream):
    """A data set in a bucket, with its shards in a local folder."""

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        """Delete the files of interrupted downloads, then register the shards that are there.

        boto3 downloads x.mds as x.mds.Ab12Cd34 and renames it, so a killed process leaves such a
        file. After a power cut, x.mds itself may be shorter than the index says.
        """
        for info, _ in (pair for shard in shards for pair in shard.file_pairs):
            path = Path(self.local, self.split, info.basename)
            for file in path.parent.glob(f"{path.name}*"):
                if file != path or file.stat().st_size != info.bytes:
                    file.unlink()
        super().set_up_local(shards, cache_usage_per_shard)
