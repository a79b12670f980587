"""Plans: their arithmetic, against published numbers, and what is refused."""

import pytest
import timm
import torch
from conftest import ROOT, error_of
from torch import Tensor, nn

import pretrain
from training.gpus import GPUS, Gpu
from training.plan import (
    Machine,
    forward_plan,
    layout_of,
    size_of,
    split_plan_flags,
    training_plans,
    training_report,
    training_samples,
)


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


A100 = Machine(8, GPUS["a100"])


def test_plan_of_a_known_run_has_its_published_numbers():
    """ViT-B of 86.6 M weights and 17.6 GMACs; 100 epochs of 1251 steps of 1024 images; 8 GPUs."""
    plan = training_plans(*on_meta(), {"data": DATA, "trainer": TRAINER}, A100)[0]
    flops = 3 * 2 * 17.6e9  # the backward pass takes twice the forward pass
    assert plan.weights == plan.trained == 86_567_656
    assert plan.cost.flops == pytest.approx(flops, rel=0.01)
    assert plan.samples == 100 * 1251 * 1024
    assert plan.at_once == 128
    assert plan.lasting == (16 + 4) * 86_567_656  # the last 4: DDP's buckets
    printed = str(plan)
    for line in (
        "weights     86.57 M, of them trained 86.57 M",
        "samples     128,102,400",
        "on each of 8 GPUs with DDP: 1.73 of weights, gradients and optimizer",
        "of a step of 128 samples",
        "cost        30 GPU-hours, 0.16 days, at 40% of 312 TFLOPS (A100, half precision)",
    ):
        assert line in printed
    hours = plan.samples * flops / (0.4 * 312e12) / 3600
    assert hours == pytest.approx(30, rel=0.02)


def fsdp(**settings) -> dict:
    return TRAINER | {"parallelism_config": {"fsdp": settings}}


def test_fsdp_shares_the_state_and_adds_gathered_weights_and_accumulated_gradients():
    net, _ = on_meta(depth=4)  # 29,864,680 weights; a block has 12 * 768**2 + 13 * 768 = 7,087,872
    # Weights, gradients and Adam's two moments, in fp32: 477,834,880 bytes, of which a GPU has 1/8.
    # Two blocks, this and the next, are gathered as weights and as gradients: 2 * (4 + 4) bytes.
    assert layout_of(fsdp()).bytes_of(net, 8, 1) == 59_729_360 + 113_405_952
    # Gradients that accumulate are those of all weights: 119,458,720 bytes.
    assert layout_of(fsdp()).bytes_of(net, 8, 4) == 59_729_360 + 56_702_976 + 119_458_720
    # All weights stay gathered, too.
    kept = layout_of(fsdp(reshard_after_forward=False))
    assert kept.bytes_of(net, 8, 4) == 59_729_360 + 2 * 119_458_720
    assert layout_of(TRAINER).bytes_of(net, 1, 4) == 477_834_880


def test_activation_checkpointing_saves_memory_and_computes_the_blocks_again():
    net, sample = on_meta(depth=4)
    config = {"data": DATA, "trainer": fsdp(activation_checkpointing=True)}
    saving, plain, *_ = training_plans(net, sample, config, A100)
    assert saving.cost.peak < plain.cost.peak / 2
    assert saving.cost.flops == plain.cost.flops
    assert plain.cost.recomputed == 0
    tokens, width = 197, 768
    # qkv 3, projection 1, first layer of the MLP 4; the output of the last layer is not needed.
    block = 8 * tokens * width**2 + 2 * tokens**2 * width
    assert saving.cost.recomputed == pytest.approx(4 * 2 * block, rel=0.001)
    assert saving.speed == pytest.approx(
        plain.speed * saving.cost.flops / (saving.cost.flops + 8 * block)
    )


def test_plan_names_the_fastest_layout_that_fits():
    net, sample = on_meta(depth=4)  # 29,864,680 weights: DDP's state has 0.6 GB, FSDP's 0.2 GB
    config = {"data": DATA, "trainer": TRAINER}
    tiny = Gpu("tiny", 2.5e9, 1e12, 1e12)  # 2 GB of them are CUDA's
    plans = training_plans(net, sample, config, Machine(8, tiny))
    assert not any(plan.fits for plan in plans)
    assert "fastest     no layout fits; lower the micro-batch" in training_report(plans, 1e9)
    # Enough for the step of a batch without recomputation, and for FSDP's state.
    peak = plans[0].cost.peak
    small = Gpu("small", (2e9 + peak + 0.4e9) / 0.95, 1e12, 1e12)
    plans = training_plans(net, sample, config, Machine(8, small))
    assert str(plans[-1].layout) == "FSDP without resharding"
    report = training_report(plans, 1e9)
    assert "does not fit" in report
    assert "fastest     FSDP without resharding, " in report
    assert "1 GB of /dev/shm" in report
    assert "checkpoint  0.358 GB: 1 s to write and 1 s to upload" in report  # 12 bytes a weight


def test_plan_of_an_evaluation_has_no_gradients():
    net, sample = on_meta(frozen=True)
    plan = forward_plan(net, sample, 50_000, 64, "fp32", Machine(1, GPUS["a100"]))
    assert plan.trained == 0
    assert plan.lasting == 4 * 86_567_656
    assert plan.cost.flops == pytest.approx(2 * 17.6e9, rel=0.003)
    assert "of 19.5 TFLOPS (A100, fp32)" in str(plan)


def test_samples_of_a_training_are_whole_batches():
    assert training_samples(DATA, "2ep") == 2 * 1251 * 1024
    assert training_samples(DATA, "7ba") == 7 * 1024
    assert training_samples(DATA | {"repeats": 4}, "1ep") == 4 * 1_281_167 // 1024 * 1024
    assert training_samples(DATA | {"epoch_size": 5000}, "3ep") == 3 * 4 * 1024
    repeated = {"streams": [{"path": "sunrgbd/train", "repeat": 50}]}
    assert training_samples(DATA | repeated, "1ep") == 50 * 4845 // 1024 * 1024
    repeated["streams"][0]["repeat"] = None
    assert training_samples(DATA | repeated, "1ep") == 4845 // 1024 * 1024


@pytest.mark.parametrize(
    ("change", "duration", "message"),
    [
        ({"epoch_size": 1000}, "1ep", "data.global_train_batch_size=1024: must be at most"),
        ({"streams": [{"path": "x/y"}]}, "1ep", "x/y"),
    ],
)
def test_training_without_a_number_of_samples_is_refused(change, duration, message):
    with pytest.raises(ValueError, match=message):
        training_samples(DATA | change, duration)


def test_published_size_is_known_by_the_end_of_the_path():
    assert size_of("elsewhere/k400/val") == (20_000, 400)


def test_plan_flags_are_split_from_the_other_arguments():
    assert split_plan_flags(["a.yaml", "seed=1"]) == (["a.yaml", "seed=1"], None)
    assert split_plan_flags(["a.yaml", "--plan", "seed=1"]) == (["a.yaml", "seed=1"], A100)
    others, machine = split_plan_flags(["--plan=64", "a.yaml", "--gpu=h200"])
    assert (others, machine.gpus, machine.gpu.memory) == (["a.yaml"], 64, 141e9)
    flags = ["--plan", "64", "a.yaml", "--gpu", "h200", "seed=1"]
    assert split_plan_flags(flags) == (["a.yaml", "seed=1"], machine)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--plan=0"], "--plan=0: must be a number of GPUs"),
        (["--plan="], "--plan=: must be a number of GPUs"),
        (["--plan=x"], "--plan=x: must be a number of GPUs"),
        (["--plan", "x"], "--plan=x: must be a number of GPUs"),
        (["--plan", "--gpu=k80"], "--gpu=k80: must be one of a100, a100-40, h100, h200, l40s"),
        (["--gpu=h100"], "--gpu: give --plan too"),
    ],
)
def test_plan_flags_with_other_values_are_refused(flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        split_plan_flags(["a.yaml", *flags])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.streams=[{path: x/y}]", "x/y"),
        ("trainer.max_duration=null", "trainer.max_duration: give a positive duration such as"),
        ("trainer.max_duration=1dur", "trainer.max_duration=1dur: must be in epochs (ep) or steps"),
        ("trainer.max_duration=0ep", "trainer.max_duration: give a positive duration such as"),
    ],
)
def test_plan_of_a_run_without_data_or_duration_is_refused(override, complaint):
    assert complaint in error_of(pretrain, ["yamls/vits.yaml", override, "--plan"], ROOT)
