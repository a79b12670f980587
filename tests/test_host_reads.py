"""Values that the host reads from the device in a step: on the meta device, each read raises."""

import os
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer import Event
from conftest import ROOT, run_stage, small
from tiny_models import CLIPS, ENCODER, TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain
from methods import CLASSIFIERS, PRETRAINING
from methods.linear_probe import LinearProbe
from methods.supervised import Omnivore
from methods.tubevit import TubeViT
from shards.augment import PARAMETERS, augment_batch
from shards.finetuning_views import FinetuningViews
from training.logs import GradientNorm


def stored_batch(frames: int) -> dict[str, Tensor]:
    """Return a batch of 4 samples as the data workers make it, on the meta device."""
    clip = (frames,) if frames > 1 else ()
    with torch.device("meta"):
        return {
            "views": torch.empty(4, 2, *clip, 32, 32, 3, dtype=torch.uint8),
            "augment": torch.empty(4, 2, len(PARAMETERS)),
            "noise": torch.empty(4, 2, 32 if frames > 1 else 16),
            "target": torch.empty(4, dtype=torch.long),
        }


def take_step(net: nn.Module, batch: dict[str, Tensor]) -> None:
    outputs = net(batch)
    loss = net.loss(outputs, batch)
    losses = loss if isinstance(loss, dict) else {"total": loss}
    losses["total"].backward()
    assert all(value.is_meta and value.ndim == 0 for value in losses.values())
    state = SimpleNamespace(model=net)
    GradientNorm().apply(Event.AFTER_TRAIN_BATCH, state, None)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    assert all(weight.grad.is_meta for weight in trained)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """The meta device has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())


@pytest.mark.parametrize("method", PRETRAINING)
def test_step_of_pretraining_reads_no_value_and_leaves_no_tensor_on_the_host(method):
    sizes, frames = dict(TINY), 1
    if method in ("st_mae", "videomae", "omnimae"):
        sizes, frames = TINY | CLIPS, 4
    if method == "triplet":
        sizes["positives"] = "label"
    if method == "vicmae":
        sizes |= {"predictor": True, "chunk_size": 2}
    net = PRETRAINING[method](**sizes).to("meta")
    take_step(net, augment_batch(stored_batch(frames)))


# A linear probe has no mixup, see FinetuningViews.
KINDS = [(kind, 0.0) for kind in CLASSIFIERS.values()]
KINDS += [(kind, 0.8) for kind in CLASSIFIERS.values() if kind is not LinearProbe]


@pytest.mark.parametrize(("kind", "mixup"), KINDS)
def test_step_of_fine_tuning_reads_no_value_and_leaves_no_tensor_on_the_host(kind, mixup):
    frames, depth = 32 if kind is TubeViT else 1, {}
    if kind is Omnivore:
        net = kind([3, 4], **ENCODER | CLIPS, depth_maps=True)
        depth = {"depth": torch.empty(4, 1, 1, 1, 32, 32), "colours": torch.empty(4)}
    elif kind is TubeViT:
        net = kind([3, 4], **ENCODER | {"patch_size": 16})
    else:
        net = kind(7, **({"heads": 2} if kind is LinearProbe else {}), **ENCODER)
    held_out = 0.0 if mixup else 0.1
    views = FinetuningViews(
        32, frames, 7, mixup=mixup, cutmix=mixup, erasing=1.0, held_out=held_out
    )
    with torch.device("meta"):
        batch = {
            "inputs": torch.empty(4, 1, frames, 3, 32, 32, dtype=torch.uint8),
            "target": torch.empty(4, dtype=torch.long),
            "held_out": torch.empty(4, dtype=torch.long),
        }
        batch |= {name: value.to("meta") for name, value in depth.items()}
    take_step(net.to("meta"), views.apply(batch | {"key": ["1", "2", "3", "4"]}))


class Reads(TorchDispatchMode):
    """Counts the values that the host reads from tensors, by the file that reads them."""

    def __init__(self):
        super().__init__()
        self.files = Counter()

    def __torch_dispatch__(self, operation, types, args=(), keywords=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            names = [frame.filename for frame in traceback.extract_stack()]
            outside = [name for name in names if f"{os.sep}torch{os.sep}" not in name]
            self.files[outside[-2]] += 1  # the last is this file
        return operation(*args, **(keywords or {}))


def reads_of_a_run(demo: Path, folder: Path, steps: int) -> Counter:
    arguments = [*small(demo), "callbacks=null", f"trainer.max_duration={steps}ba"]
    with Reads() as reads:
        run_stage(pretrain, [*arguments, "data.num_workers=0"], folder)
    return reads.files


def test_a_step_of_a_run_reads_one_value_beside_those_that_composer_reads(demo, tmp_path):
    counts = []
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        folder.mkdir()
        counts.append(reads_of_a_run(demo, folder, steps))
    readers = counts[1] - counts[0]  # of the second step
    ours = {
        Path(name).name: count
        for name, count in readers.items()
        if name.startswith(str(ROOT)) and "site-packages" not in name  # of .venv in the root
    }
    assert ours == {"logs.py": 1}  # the norm of the gradient
    assert readers.total() <= 12  # Composer's losses, times and sizes
