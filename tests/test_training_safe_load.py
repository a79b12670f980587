"""Safe loading: malicious pickles are refused and not run; FSDP's shards are joined."""

import os
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from composer import Callback, Trainer
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from composer.utils.parallelism import FSDP2Config
from conftest import start_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from model import ViCMAE
from training.checkpoints import check_checkpoint
from training.safe_load import load_plain
from training.weights import load_pretrained, read_checkpoint

TINY = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    **{"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3},
    **{"projector_hidden_dim": 64, "projector_out_dim": 16},
}


class Malicious:
    """Creates the file was_run when it is unpickled unsafely."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run each test in an empty folder, so that was_run is there only if its pickle ran."""
    monkeypatch.chdir(tmp_path)


# FSDP's shards


def train_sharded(run: Path, callbacks: list[Callback], steps: int = 1) -> Trainer:
    """Train a tiny ViCMAE with FSDP2 on all ranks; checkpoints are sharded."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(16):
        views = torch.randn(2, 3, 32, 32, generator=generator)
        samples.append({"views": views, "noise": torch.rand(2, 16, generator=generator)})
    loader = DataLoader(samples, batch_size=2, sampler=dist.get_sampler(samples))
    net = ViCMAE(**TINY)
    trainer = Trainer(
        model=net,
        optimizers=torch.optim.AdamW(net.parameters()),
        train_dataloader=loader,
        max_duration=f"{steps}ba",
        parallelism_config={"fsdp": FSDP2Config(state_dict_type="sharded")},
        callbacks=callbacks,
        device="cpu",
        run_name=run.name,
        progress_bar=False,
    )
    trainer.fit()
    return trainer


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The model's weights, gathered from all ranks by torch itself."""
    weights = {}
    for name, value in trainer.state.model.state_dict().items():
        weights[name] = value.full_tensor() if isinstance(value, DTensor) else value
    return weights


def write_shards(rank: int, folder: Path) -> None:
    trainer = train_sharded(folder / "run", [])
    save_checkpoint(trainer.state, str(folder / "shards.pt"))  # Composer names the folder ep0-ba1
    weights = whole_weights(trainer)
    if rank == 0:
        torch.save(weights, folder / "whole.pt")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with ep0-ba1/, written by FSDP2 on two ranks, and the same weights in whole.pt."""
    folder = tmp_path_factory.mktemp("fsdp")
    start_ranks(folder, 2, write_shards, folder)
    return folder


@pytest.fixture
def shards(written, tmp_path) -> Path:
    return shutil.copytree(written / "ep0-ba1", tmp_path / "shards")


def test_shards_of_two_ranks_are_joined_to_the_weights_that_torch_gathers(written, shards):
    assert len(list(shards.glob("*.distcp"))) == 2
    expected = torch.load(written / "whole.pt", weights_only=True)
    found = read_checkpoint(str(shards))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    report = load_pretrained(ViCMAE(**TINY), str(shards))
    assert not report["missing"] and not report["unused"]


def test_intact_shards_pass_the_check(shards):
    check_checkpoint(shards)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_cut_or_missing_shard_is_found(shards, name):
    data = (shards / name).read_bytes()
    (shards / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"shards is corrupt \({name} is cut off\)"):
        check_checkpoint(shards)
    (shards / name).unlink()
    with pytest.raises(ValueError, match=r"shards is corrupt .*No such file"):
        check_checkpoint(shards)


# Malicious files


def test_malicious_pickle_is_refused_and_not_run():
    torch.save({"model": {"blocks.0.x": torch.zeros(1)}, "args": Malicious()}, "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth is no checkpoint that can be read safely"):
        read_checkpoint("evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match=r"plain.pth is no checkpoint"):
        read_checkpoint("plain.pth")
    assert not Path("was_run").exists()
    torch.load("evil.pth", weights_only=False)  # what it would have done
    assert Path("was_run").exists()


def call_of(module: str, name: str) -> bytes:
    """A pickle that looks a name up in a module and calls it with a shell command."""
    texts = (module, name, "touch was_run")
    module, name, command = [b"\x8c" + bytes([len(text)]) + text.encode() for text in texts]
    return b"\x80\x04" + module + name + b"\x93" + command + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "getattr"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "os.system"),
    ],
)
def test_malicious_metadata_of_shards_is_refused_and_not_run(shards, module, name):
    (shards / ".metadata").write_bytes(call_of(module, name))
    refused = rf"shards is no checkpoint that can be read safely: {module}.{name} is not allowed"
    with pytest.raises(ValueError, match=refused):
        read_checkpoint("shards")
    with pytest.raises(ValueError, match=rf"shards is corrupt \({module}.{name} is not allowed"):
        check_checkpoint(shards)
    assert not Path("was_run").exists()
    if module == "os":  # what it would have done
        pickle.loads(call_of(module, name))
        assert Path("was_run").exists()


def test_malicious_object_among_the_shards_is_refused_and_not_run():
    weights = {"state.model.x": torch.ones(2)}
    torch.distributed.checkpoint.save(weights | {"state.more": {"step": 3}}, checkpoint_id="plain")
    check_checkpoint(Path("plain"))
    torch.distributed.checkpoint.save(weights | {"state.more": Malicious()}, checkpoint_id="evil")
    with pytest.raises(ValueError, match="evil is corrupt"):
        check_checkpoint(Path("evil"))
    assert not Path("was_run").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_file_that_is_no_checkpoint_is_named(content):
    Path("weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pt is (no checkpoint|empty|truncated)"):
        read_checkpoint("weights.pt")
    with pytest.raises(ValueError, match=r"nowhere.pt does not exist"):
        read_checkpoint("nowhere.pt")


def test_plain_values_are_loaded():
    content = {"weights": torch.arange(3), "step": 7, "names": ["a"], "nothing": None}
    torch.save(content, "plain.pt")
    found = load_plain("plain.pt")
    assert torch.equal(found.pop("weights"), content.pop("weights"))
    assert found == content


def test_harmless_values_beside_the_weights_are_loaded(tmp_path):
    content = {"loss": np.float64(0.5), "step": np.int64(3), "path": Path("a/b")}
    torch.save(content | {"w": torch.ones(2)}, tmp_path / "file.pt")
    found = load_plain(str(tmp_path / "file.pt"))
    assert (found["loss"], found["step"], found["path"]) == (0.5, 3, Path("a/b"))


def test_type_that_could_execute_code_is_named_with_the_remedy(tmp_path):
    torch.save({"w": torch.ones(2), "f": Fraction(1, 2)}, tmp_path / "file.pt")
    match = r"it holds a fractions\.Fraction, which is no plain value; save the weights alone"
    with pytest.raises(pickle.UnpicklingError, match=match):
        load_plain(str(tmp_path / "file.pt"))
