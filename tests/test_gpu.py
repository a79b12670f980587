"""Training and evaluation on GPUs. Skipped without a GPU; the last tests need two.

    uv run pytest tests/test_gpu.py                       # on a machine with GPUs
    uv run pytest tests/test_gpu.py --gpu-tests-on-cpu    # the same tests on CPUs

On a CPU, gloo stands for nccl. What a CPU does not have is skipped there: half precision with
scaled losses, and a count of memory.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from composer import Callback, Logger, State
from composer.utils import dist
from conftest import ROOT, launch, losses, read_result, run_stage, small, start_ranks
from tiny_models import TINY, random_batch
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import finetune
import pretrain
from benchmarks.bench_gpu import computed
from benchmarks.gpu_step import Case, Meter, measure_ours
from model import ViCMAE
from training.checkpoints import STOPPED
from training.weights import LATEST, read_checkpoint

Losses = list[float]
FP32 = "trainer.precision=fp32"
BF16 = "trainer.precision=amp_bf16"
ROUNDING = 1e-4  # relative, of a loss after a few steps in fp32
TF32 = 5e-3  # the same, where Composer lets matrix products have 10 bits
HALF = 2e-2  # and in bfloat16, which has 8
TWO_OF_60 = 2.5 / 60  # samples of a test set that may change sides by rounding
BACKENDS = {"cpu": "gloo", "gpu": "nccl"}


def fsdp(**settings: object) -> str:
    block = ", ".join(f"{key}: {str(value).lower()}" for key, value in settings.items())
    block = block.replace("full", "FULL").replace("default", "DEFAULT")
    return f"trainer.parallelism_config={{fsdp: {{{block}}}}}"


FULL = fsdp(mixed_precision="full", state_dict_type="sharded")


def run_rank(rank: int, folder: Path, arguments: list[str], code: int) -> None:
    try:
        run_stage(pretrain, arguments, folder)
    except SystemExit as end:
        assert end.code == code
    else:
        assert code == 0


@pytest.fixture
def pretrain_on(demo, tmp_path, device) -> Callable:
    """pretrain_on(name, *settings, ...) trains the demonstration, and returns all its losses.

    The run has processes of its own, since a process cannot change the kind of its group. A second
    run of the same name resumes.
    """

    def run(
        name: str, *settings: str, ranks: int = 1, on: str = device, code: int = 0
    ) -> Losses | None:
        defaults = ["callbacks=null", "data.num_workers=0", "schedule.t_max=6ba"]
        defaults += ["trainer.max_duration=4ba", "checkpoints.interval=1ba"]
        arguments = [*small(demo), *defaults, f"trainer.device={on}", f"run_name={name}"]
        values = (tmp_path, [*arguments, *settings], code)
        start_ranks(tmp_path, ranks, run_rank, *values, backend=BACKENDS[on])
        return losses(tmp_path, name) if code == 0 else None

    return run


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(str(folder / "runs" / name / "checkpoints" / LATEST))


def unfinish(folder: Path, name: str) -> None:
    """Make a finished run look interrupted, so that the next launch resumes it."""
    (folder / "runs" / name / "result.json").unlink()


def backend_of_compile(device: str) -> str:
    return "inductor" if device == "gpu" else "aot_eager"


# One GPU: a step


def gradients_on(kind: str, samples: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Return loss and gradients of a step of model.py in fp32."""
    torch.manual_seed(0)
    net = ViCMAE(**TINY).to(kind)
    batch = {name: tensor.to(kind) for name, tensor in samples.items()}
    total = net.loss(net(batch), batch)["total"]
    total.backward()
    gradients = [weight.grad.cpu() for weight in net.parameters() if weight.requires_grad]
    return float(total), gradients


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], rel: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= rel * theirs.norm() + 1e-6


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Compute products in full fp32. Composer allows TF32, for this process too."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
def test_loss_and_gradients_of_a_step_are_those_of_a_cpu(device, without_tf32):
    samples = random_batch(8)
    expected, expected_gradients = gradients_on("cpu", samples)
    loss, gradients = gradients_on("cuda" if device == "gpu" else "cpu", samples)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(gradients, expected_gradients, 1e-3)


def step_of_a_rank(rank: int, ranks: int, kind: str, folder: Path) -> None:
    """Save loss and gradients of a rank's share of a batch, under DDP."""
    torch.manual_seed(0)
    net = ViCMAE(**TINY).to(kind)
    wrapped = DistributedDataParallel(net)
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    batch = {name: tensor[share].to(kind) for name, tensor in random_batch(8).items()}
    losses = net.loss(wrapped(batch), batch)
    losses["total"].backward()
    gradients = [weight.grad.cpu() for weight in net.parameters() if weight.requires_grad]
    torch.save((losses["contrastive"].cpu(), gradients), folder / f"rank{rank}.pt")


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "backend"), [(1, "nccl"), (2, "gloo")])
def test_ddp_of_one_rank_on_nccl_or_two_on_gloo_has_the_gradients_of_the_whole_batch(
    tmp_path, device, ranks, backend
):
    """Both gloo ranks use the same GPU. Each computes the contrastive loss of the whole batch."""
    kind = "cuda:0" if device == "gpu" else "cpu"
    backend = backend if device == "gpu" else "gloo"
    start_ranks(tmp_path, ranks, step_of_a_rank, ranks, kind, tmp_path, backend=backend)
    samples = random_batch(8)
    _, expected = gradients_on("cpu", samples)
    torch.manual_seed(0)
    net = ViCMAE(**TINY)
    contrastive = net.loss(net(samples), samples)["contrastive"]
    for rank in range(ranks):
        found, gradients = torch.load(tmp_path / f"rank{rank}.pt")
        assert float(found) == pytest.approx(float(contrastive), rel=TF32)
        assert_close(gradients, expected, TF32)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_memory_of_a_step_is_within_a_tenth_of_the_plan(device, checkpointing):
    """ViT-S, whose activations are most of the memory."""
    size, pairs = ("S", 64) if device == "gpu" else ("tiny", 8)
    case = Case(size, pairs, checkpointing=checkpointing)
    meter = Meter(warm_up=2, timed=1, traced=1)
    measure_ours(case, meter)
    _, state, step = computed(case)
    assert state > 0 and step > 0
    if device == "cpu":
        pytest.skip("torch does not count the memory of a CPU")
    assert meter.peak == pytest.approx(state + step, rel=0.1)


# One GPU: the Trainer


@pytest.mark.gpu
def test_losses_of_a_run_are_those_of_a_cpu(pretrain_on):
    expected = pretrain_on("on_cpu", FP32, on="cpu")
    assert pretrain_on("here", FP32) == pytest.approx(expected, rel=TF32)


@pytest.mark.gpu
def test_losses_of_fsdp_and_of_half_precision_are_those_of_a_plain_run(pretrain_on):
    fp32 = pretrain_on("fp32", FP32)
    assert pretrain_on("fsdp", FP32, FULL) == pytest.approx(fp32, rel=ROUNDING)
    bf16 = pretrain_on("bf16", BF16)
    assert bf16 == pytest.approx(fp32, rel=HALF) and bf16 != fp32
    assert pretrain_on("fsdp_bf16", BF16, FULL) == pytest.approx(bf16, rel=HALF)
    default = fsdp(mixed_precision="default")  # weights and residual stream in bfloat16
    assert pretrain_on("fsdp_default", BF16, default) == pytest.approx(bf16, rel=2 * HALF)


class InfiniteGradient(Callback):
    """Makes a gradient of the fourth step infinite, and saves a weight before each step."""

    def batch_start(self, state: State, logger: Logger) -> None:
        weight = state.model.encoder.cls_token.detach().cpu().clone()
        torch.save(weight, f"before{state.timestamp.batch.value}.pt")

    def after_backward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 3:
            state.model.encoder.cls_token.grad.fill_(float("inf"))


@pytest.mark.gpu
def test_step_whose_scaled_gradients_overflow_is_skipped_and_the_run_continues(
    pretrain_on, tmp_path, device
):
    if device == "cpu":
        pytest.skip("Composer has amp_fp16 on GPUs alone")
    callback = "callbacks={test_gpu.InfiniteGradient: {}}"
    settings = ["trainer.precision=amp_fp16", "trainer.max_duration=6ba"]
    found = pretrain_on("fp16", *settings, callback)
    before = [torch.load(tmp_path / f"before{step}.pt") for step in range(6)]
    assert not torch.equal(before[0], before[3])
    assert torch.equal(before[3], before[4])
    assert not torch.equal(before[4], before[5])
    assert found[0] == pytest.approx(pretrain_on("fp32", FP32)[0], rel=HALF)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_of_a_compiled_run_are_those_of_an_eager_run(pretrain_on, device, checkpointing):
    sharded = fsdp(mixed_precision="full", activation_checkpointing=checkpointing)
    eager = pretrain_on("eager", FP32, sharded)
    compiled = f"trainer.compile_config={{backend: {backend_of_compile(device)}}}"
    assert pretrain_on("compiled", FP32, sharded, compiled) == pytest.approx(eager, rel=TF32)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [FP32, BF16])
def test_resumed_run_is_that_of_an_uninterrupted_run_to_the_bit_in_deterministic_mode(
    pretrain_on, tmp_path, precision
):
    settings = [precision, "trainer.deterministic_mode=true"]
    expected = pretrain_on("uninterrupted", *settings, "trainer.max_duration=6ba")
    pretrain_on("resumed", *settings)
    unfinish(tmp_path, "resumed")
    found = pretrain_on("resumed", *settings, "trainer.max_duration=6ba")
    assert found == expected
    weights, expected_weights = (weights_of(tmp_path, run) for run in ("resumed", "uninterrupted"))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


class SignalAll(Callback):
    """Sends SIGTERM to the data workers and to this process before the third step."""

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 2:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for process in (*[worker.pid for worker in workers], os.getpid()):
                os.kill(process, signal.SIGTERM)


@pytest.mark.gpu
def test_signal_to_a_run_with_data_workers_and_pinned_memory_is_answered_with_a_checkpoint(
    pretrain_on, tmp_path
):
    expected = pretrain_on("uninterrupted", FP32)
    settings = [FP32, "data.num_workers=2", "checkpoints.interval=9ep"]
    callback = "callbacks={test_gpu.SignalAll: {}}"
    pretrain_on("stopped", *settings, callback, code=STOPPED)
    latest = tmp_path / "runs" / "stopped" / "checkpoints" / LATEST
    assert os.readlink(latest) == "ep0-ba3.pt"
    assert pretrain_on("stopped", *settings) == pytest.approx(expected, rel=ROUNDING)


def call_stage(rank: int, stage: str, folder: Path, arguments: list[str]) -> None:
    run_stage({"eval": evaluation, "finetune": finetune}[stage], arguments, folder)


def run_alone(stage: str, device: str, folder: Path, *arguments: str) -> None:
    """Run a stage in a process of its own, on a device."""
    values = (stage, folder, [*arguments])
    start_ranks(folder, 1, call_stage, *values, backend=BACKENDS[device])


def evaluate(folder: Path, name: str, device: str, *arguments: str) -> dict[str, float]:
    """Return the results of eval.py on a device."""
    run_name = f"{name}_on_{device}"
    settings = [f"run_name={run_name}", f"device={device}", *arguments]
    run_alone("eval", device, folder, *settings)
    return json.loads((folder / "runs" / run_name / "eval.json").read_text())


@pytest.mark.gpu
def test_knn_probes_and_pictures_are_those_of_a_cpu(demo, pretrain_on, tmp_path, device):
    sets = f"bank: [{demo}/train_images], queries: [{demo}/test_images], crop_pct: 1.0"
    pretrain_on("measured", FP32, f"callbacks={{KNN: {{{sets}}}}}")
    run = tmp_path / "runs" / "measured"
    assert (run / "reconstructions.png").stat().st_size > 0
    request = [
        f"checkpoint={run}/checkpoints/{LATEST}",
        f"probe={{{sets}, labels_per_class: [3], neighbours: true}}",
        f"reconstructions=[{demo}/test_images]",
        f"attention=[{demo}/test_images]",
    ]
    expected = evaluate(tmp_path, "cpu", "cpu", *request)
    found = evaluate(tmp_path, "here", device, *request)
    for key in ("knn", "linear_3"):
        assert found[key] == pytest.approx(expected[key], abs=TWO_OF_60)
    trained = read_result(tmp_path, "measured")["knn/trained"]
    assert trained == pytest.approx(expected["knn"], abs=TWO_OF_60)
    pictures = {path.stem for path in (tmp_path / "runs" / f"here_on_{device}").glob("*.png")}
    assert pictures == {"attention", "neighbours", "reconstructions"}


@pytest.mark.gpu
def test_accuracy_of_a_classifier_that_was_trained_here_is_that_of_a_cpu(
    demo, pretrained, tmp_path, device
):
    arguments = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        f"pretrained={pretrained}",
        f"data.streams=[{{path: {demo}/train_videos}}]",
        "data.global_train_batch_size=20",
        "data.num_workers=2",
        f"eval_data.paths=[{demo}/test_videos]",
        "trainer.max_duration=2ep",
        f"trainer.device={device}",
    ]
    run_alone("finetune", device, tmp_path, *arguments)
    found = read_result(tmp_path, "finetune_demo")["metrics/eval/top1"]
    checkpoint = f"checkpoint={tmp_path}/runs/finetune_demo/checkpoints/{LATEST}"
    accuracy = f"accuracy={{paths: [{demo}/test_videos], crop_pct: 1.0}}"
    expected = evaluate(tmp_path, "accuracy", "cpu", checkpoint, accuracy)
    assert found == pytest.approx(expected["top1"], abs=TWO_OF_60)


# Two GPUs


@pytest.mark.gpus
@pytest.mark.parametrize("sharded", [False, True])
def test_losses_of_two_ranks_are_those_of_one_rank(pretrain_on, sharded):
    settings = [FP32, FULL] if sharded else [FP32]
    one = pretrain_on("one", *settings)
    assert pretrain_on("two", *settings, ranks=2) == pytest.approx(one, rel=TF32)


@pytest.mark.gpus
def test_sharded_checkpoint_of_two_ranks_resumes_on_one_rank_and_again_on_two(
    pretrain_on, tmp_path
):
    expected = pretrain_on("one", FP32, FULL, "trainer.max_duration=6ba")
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        duration = f"trainer.max_duration={steps}ba"
        found = pretrain_on("moved", FP32, FULL, duration, ranks=ranks)
        assert len(found) == steps
        latest = (tmp_path / "runs" / "moved" / "checkpoints" / LATEST).resolve()
        assert len(list(latest.glob("*.distcp"))) == ranks
    assert found == pytest.approx(expected, rel=TF32)


class Death(Callback):
    """Kills rank 1 before the second step, and leaves the time in a file."""

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 1 and dist.get_global_rank() == 1:
            Path("death").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.gpus
def test_killed_rank_ends_the_others_within_a_minute(demo, tmp_path, monkeypatch, device):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for the callback
    settings = ["callbacks=null", "callbacks={test_gpu.Death: {}}", f"trainer.device={device}"]
    result = launch(tmp_path, "pretrain.py", *small(demo), *settings, "seed=1", ranks=2)
    now = time.time()
    assert result.returncode != 0
    assert not (tmp_path / "runs" / "demo" / "result.json").exists()
    assert now - float((tmp_path / "death").read_text()) < 60
