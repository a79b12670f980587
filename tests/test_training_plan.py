"""Plans: their arithmetic, against published numbers, and what is refused."""

import pytest
import timm
import torch
from conftest import ROOT
from torch import Tensor, nn

import pretrain
from training.plan import make_plan, size_of, split_plan_flag, training_plan, training_samples


class ViT(nn.Module):
    """timm's ViT-B with the interface of a ComposerModel."""

    def __init__(self, depth: int):
        super().__init__()
        self.net = timm.create_model("vit_base_patch16_224", depth=depth)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["inputs"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.float(), batch["target"])


def on_meta(depth: int = 12, frozen: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.device("meta"):
        net = ViT(depth).requires_grad_(not frozen)
        inputs, target = torch.empty(1, 3, 224, 224), torch.empty(1, dtype=torch.int64)
        return net, {"inputs": inputs, "target": target}


DATA = {"streams": [{"path": "data/in1k/train"}], "global_train_batch_size": 1024}
TRAINER = {"max_duration": "100ep"}


def test_plan_of_a_known_run_has_its_published_numbers():
    """ViT-B of 86.6 M weights and 17.6 GMACs; 100 epochs of 1251 steps of 1024 images; 8 GPUs."""
    plan = training_plan(*on_meta(), {"data": DATA, "trainer": TRAINER}, gpus=8)
    flops = 3 * 2 * 17.6e9  # the backward pass takes twice the forward pass
    assert plan.weights == plan.trained == 86_567_656
    assert plan.flops == pytest.approx(flops, rel=0.01)
    assert plan.samples == 100 * 1251 * 1024
    assert plan.at_once == 128
    assert plan.state == 16 * 86_567_656
    printed = str(plan)
    for line in (
        "weights     86.57 M, of them trained 86.57 M",
        "samples     128,102,400",
        "1.39 GB of weights and optimizer state on each of 8 GPUs",
        "GB for 128 samples at a time",
        "cost        30 GPU-hours at 40% of 312 TFLOPS (A100, half precision)",
    ):
        assert line in printed
    hours = plan.samples * flops / (0.4 * 312e12) / 3600
    assert hours == pytest.approx(30, rel=0.02)


def test_plan_shares_the_state_with_fsdp_and_saves_activations_by_checkpointing():
    net, sample = on_meta(depth=4)
    plain = make_plan(net, sample, 1000, 16, "amp_bf16", 8)
    sharded = make_plan(net, sample, 1000, 16, "amp_bf16", 8, {"activation_checkpointing": True})
    assert sharded.state == plain.state // 8
    assert sharded.activations < plain.activations / 2
    assert sharded.flops == plain.flops


def test_plan_of_an_evaluation_has_no_gradients():
    net, sample = on_meta(frozen=True)
    plan = make_plan(net, sample, 50_000, 64, "fp32", 1)
    assert plan.trained == 0
    assert plan.state == 4 * 86_567_656
    assert plan.flops == pytest.approx(2 * 17.6e9, rel=0.003)
    assert "of 19.5 TFLOPS (A100, fp32)" in str(plan)


def test_samples_of_a_training_are_whole_batches():
    assert training_samples(DATA, "2ep") == 2 * 1251 * 1024
    assert training_samples(DATA, "7ba") == 7 * 1024
    assert training_samples(DATA | {"repeats": 4}, "1ep") == 4 * 1_281_167 // 1024 * 1024
    assert training_samples(DATA | {"epoch_size": 5000}, "3ep") == 3 * 4 * 1024


@pytest.mark.parametrize(
    ("change", "duration", "message"),
    [
        ({"epoch_size": 1000}, "1ep", "data.global_train_batch_size=1024: must be at most"),
        ({}, "1dur", "trainer.max_duration=1dur: must be in epochs"),
        ({"streams": [{"path": "x/y"}]}, "1ep", "x/y"),
    ],
)
def test_training_without_a_number_of_samples_is_refused(change, duration, message):
    with pytest.raises(ValueError, match=message):
        training_samples(DATA | change, duration)


def test_published_size_is_known_by_the_end_of_the_path():
    assert size_of("elsewhere/k400/val") == (20_000, 400)


def test_plan_flag_is_split_from_the_other_arguments():
    assert split_plan_flag(["a.yaml", "seed=1"]) == (["a.yaml", "seed=1"], None)
    assert split_plan_flag(["a.yaml", "--plan", "seed=1"]) == (["a.yaml", "seed=1"], 8)
    assert split_plan_flag(["--plan=64", "a.yaml"]) == (["a.yaml"], 64)


@pytest.mark.parametrize("flag", ["--plan=0", "--plan=", "--plan=x", "--plans"])
def test_plan_flag_without_a_number_of_gpus_is_refused(flag):
    with pytest.raises(ValueError, match=f"{flag}: give a number of GPUs"):
        split_plan_flag(["a.yaml", flag])


def test_plan_of_unknown_data_is_refused_in_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["pretrain.py", "yamls/vits.yaml", "data.streams=[{path: x/y}]", "--plan"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="x/y"):
        pretrain.main()
