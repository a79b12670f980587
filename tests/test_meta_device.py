"""A step on the meta device: a value that the host reads, or a tensor left on the CPU, raises."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from composer import Event
from tiny_models import CLIPS, ENCODER, TINY
from torch import Tensor, nn

from finetune import FinetuningViews
from methods import CLASSIFIERS, PRETRAINING
from methods.linear_probe import LinearProbe
from methods.supervised import Omnivore
from shards.augment import PARAMETERS, augment_batch
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


@pytest.mark.parametrize("mixup", [0.0, 0.8])
@pytest.mark.parametrize("kind", CLASSIFIERS.values())
def test_step_of_fine_tuning_reads_no_value_and_leaves_no_tensor_on_the_host(kind, mixup):
    if kind is Omnivore:
        net = kind([3, 4], **ENCODER)
    else:
        net = kind(7, **({"heads": 2} if kind is LinearProbe else {}), **ENCODER)
    if mixup and kind is LinearProbe:
        return  # has no mixup, see FinetuningViews
    held_out = 0.0 if mixup else 0.1
    views = FinetuningViews(32, 1, 7, mixup=mixup, cutmix=mixup, erasing=1.0, held_out=held_out)
    with torch.device("meta"):
        batch = {
            "inputs": torch.empty(4, 1, 1, 3, 32, 32, dtype=torch.uint8),
            "target": torch.empty(4, dtype=torch.long),
            "held_out": torch.empty(4, dtype=torch.long),
        }
    take_step(net.to("meta"), views.apply(batch | {"key": ["1", "2", "3", "4"]}))
