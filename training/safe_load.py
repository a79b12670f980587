"""Load checkpoint files that may come from anyone, without executing anything that is in them.

A file may hold tensors and plain values. Anything else is refused before it is unpickled.
"""

import argparse
import datetime
import os
import pathlib
import pickle
import re
import zipfile
from typing import IO, Any

import numpy as np
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata

SAFE_CLASSES = [  # plain values that files may hold beside tensors
    argparse.Namespace,  # in the official files; Composer's checkpoints have the others
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # NumPy 1
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.ndarray,
    np.dtype,
    *(np.dtypes.BoolDType, np.dtypes.Float16DType, np.dtypes.Float32DType, np.dtypes.Float64DType),
    *(np.dtypes.Int8DType, np.dtypes.Int16DType, np.dtypes.Int32DType, np.dtypes.Int64DType),
    *(np.dtypes.UInt8DType, np.dtypes.UInt16DType, np.dtypes.UInt32DType, np.dtypes.UInt64DType),
    pathlib.PosixPath,
]

# All that the .metadata file of a sharded checkpoint may name, by module. Whole names are compared,
# since pickle would resolve a dotted name such as "os.system" to an attribute of an attribute.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "torch": {
        "Size",
        "bool",
        "uint8",
        "int32",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
    },
}


class PlainUnpickler(pickle.Unpickler):
    """An unpickler for the metadata of sharded checkpoints that refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """A reader of sharded checkpoints that executes nothing from their metadata."""

    def read_metadata(self) -> Metadata:
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            return PlainUnpickler(file).load()


def load_plain(file: str | IO[bytes], mmap: bool = False) -> Any:
    """Load a file of torch.save, if it consists of tensors and plain values.

    Args:
        mmap: read a tensor from disk only when it is used.

    Raises:
        UnpicklingError: the file is corrupt, or holds something else.
    """
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # whose message advises to load unsafely
        reason = "it is corrupt, or holds more than tensors and plain values"
        if name := re.search(r"(?:GLOBAL|got <class ')\s*([\w.]+)", str(error)):
            remedy = "save the weights alone, torch.save(model.state_dict(), ...)"
            reason = f"it holds a {name[1]}, which is no plain value; {remedy}"
        raise pickle.UnpicklingError(reason) from error


def check_zip(path: str | pathlib.Path) -> None:
    """Raise ValueError or BadZipFile if a part of a file of torch.save is corrupt."""
    with zipfile.ZipFile(path) as file:
        if corrupt := file.testzip():
            raise ValueError(f"{corrupt} in it has another checksum")


def read_shards(path: str) -> dict[str, Tensor]:
    """Return the model's weights in a sharded checkpoint, each joined from all ranks' files."""
    reader = PlainReader(path)
    weights = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        if key.startswith("state.model.") and isinstance(entry, TensorStorageMetadata):
            weights[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    distributed_checkpoint.load(weights, storage_reader=reader)
    return {key.removeprefix("state.model."): value for key, value in weights.items()}
