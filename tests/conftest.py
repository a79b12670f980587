"""Small data sets, made once, and processes that join into ranks."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data_prep  # noqa: E402

torch.set_num_threads(1)  # what is tested is small; threads only get in each other's way


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The demonstration with 12 garments of every class: 60 clips and 60 stills in each split."""
    out = tmp_path_factory.mktemp("data") / "demo"
    data_prep.demo(str(out), workers=2, garments=12)
    return out


def join(rank: int, ranks: int, store: str, function, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


@pytest.fixture
def on_ranks(tmp_path):
    """on_ranks(n, function, *arguments): function(rank, *arguments) in n forked processes of one gloo group."""

    def start(ranks: int, function, *arguments) -> None:
        mp.start_processes(
            join, (ranks, str(tmp_path / "store"), function, arguments), nprocs=ranks, start_method="fork"
        )

    return start
