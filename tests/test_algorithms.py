"""Composer's algorithms do with these models what they say; what a run logs, and to whom."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from algorithms import ALGORITHMS
from checkpoints import LATEST, Checkpoints, read_checkpoint, step_of
from composer.algorithms.low_precision_layernorm import LowPrecisionLayerNorm
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import LPLayerNorm
from composer.core import Event, Precision
from conftest import ROOT, run_stage, small
from probes import infer
from test_resume import losses, signal_at
from torch import nn
from views import EvalViews

import finetune
import pretrain
from model import Classifier, ViCMAE

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TINY |= {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
TINY |= {"projector_hidden_dim": 32, "projector_out_dim": 16}


class StateOf:
    """What these algorithms use of Composer's State."""

    def __init__(self, model: nn.Module, precision: Precision):
        self.model, self.precision, self._precision = model, precision, precision
        self.optimizers, self.fsdp_config_version = [], 0


class NoLogger:
    def log_metrics(self, metrics: dict) -> None:
        pass


def test_low_precision_layernorm_replaces_every_norm():
    torch.manual_seed(0)
    net = ViCMAE(**TINY).eval()
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.LayerNorm)]
    batch = {"views": torch.randn(2, 2, 3, 32, 32), "noise": torch.rand(2, 2, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        before = net(batch)
    state = StateOf(net, Precision.AMP_BF16)
    LowPrecisionLayerNorm(apply_at=Event.INIT).apply(Event.INIT, state, NoLogger())
    assert [
        name for name, module in net.named_modules() if isinstance(module, LPLayerNorm)
    ] == norms and len(norms) == 8
    with torch.autocast("cpu", torch.bfloat16):
        after = net(
            batch
        )  # it lowers the precision under CUDA's autocast alone: here the numbers stay
    torch.testing.assert_close(after["pred"], before["pred"])


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    return [*small(demo), "schedule.t_max=2ep", "callbacks=null", "data.num_workers=0"]


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain")
    run_stage(pretrain, [*arguments, "run_name=run"], folder)
    return losses(folder, "run")


def test_channels_last_changes_the_layout_of_the_patch_embedding_and_no_loss(
    arguments, plain, tmp_path, monkeypatch
):
    layouts = []

    def batch_start(self, state, logger) -> None:
        layouts.append(
            state.model.encoder.patch_embed["proj"].weight.is_contiguous(
                memory_format=torch.channels_last
            )
        )

    monkeypatch.setattr(Checkpoints, "batch_start", batch_start)
    run_stage(pretrain, [*arguments, "run_name=run", "algorithms={ChannelsLast: {}}"], tmp_path)
    assert all(layouts)
    assert losses(tmp_path, "run") == pytest.approx(plain, rel=1e-5)


def test_half_precision_on_a_cpu_multiplies_matrices_in_bfloat16_and_resumes_to_the_bit(
    arguments, plain, tmp_path, monkeypatch
):
    arguments, kinds = [*arguments, "trainer.precision=amp_bf16"], set()
    with monkeypatch.context() as patch:
        forward = nn.Linear.forward

        def watched(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            y = forward(self, x)
            kinds.add(y.dtype)
            return y

        patch.setattr(nn.Linear, "forward", watched)
        patch.setattr(
            pretrain, "draw_reconstructions", lambda *_: None
        )  # in fp32, after the training
        run_stage(pretrain, [*arguments, "run_name=whole"], tmp_path)
    assert kinds == {torch.bfloat16}
    weights = read_checkpoint(str(tmp_path / "runs" / "whole" / "checkpoints" / "latest-rank0.pt"))
    assert all(
        weight.dtype == torch.float32 for weight in weights.values() if weight.is_floating_point()
    )
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "batch_start", signal_at(5))
        with pytest.raises(SystemExit):
            run_stage(pretrain, [*arguments, "run_name=run"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=run"], tmp_path)
    half = losses(tmp_path, "whole")
    assert losses(tmp_path, "run") == half != plain
    assert half == pytest.approx(plain, rel=2e-2)  # of bfloat16's 8 bits


def test_gradient_clipping_bounds_the_norm():
    net = ViCMAE(**TINY)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    state = StateOf(net, Precision.FP32)
    settings = {"GradientClipping": {"clipping_type": "norm", "clipping_threshold": 0.1}}
    pretrain.build_named(ALGORITHMS, settings)[0].apply(Event.AFTER_TRAIN_BATCH, state, NoLogger())
    norm = torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).norm()
    assert norm.item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "block",
    [
        "{PartialDecoding: {ratio: 0.5}}",
        "{ProgressiveResizing: {size_increment: 8}}",
        "{LayerFreezing: {freeze_start: 0.2}}",
    ],
)
def test_own_algorithms_train_by_a_line_of_yaml_and_resume_to_the_bit(
    arguments, plain, tmp_path, monkeypatch, block
):
    arguments = [*arguments, f"algorithms={block}", "trainer.max_duration=6ba"]
    run_stage(pretrain, [*arguments, "run_name=whole"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "batch_start", signal_at(5))
        with pytest.raises(SystemExit):
            run_stage(pretrain, [*arguments, "run_name=run"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=run"], tmp_path)
    assert plain != losses(tmp_path, "whole") == losses(tmp_path, "run")
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    widths = [
        line["progressive_resizing/width"] for line in lines if "progressive_resizing/width" in line
    ]
    assert widths == ([16, 16, 16, 16, 24, 32] if "Resizing" in block else [])


def test_layer_freezing_leaves_the_first_layers_as_they_are(demo, pretrained, tmp_path):
    arguments = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        *(
            f"pretrained={pretrained}",
            "data.global_train_batch_size=20",
            "data.num_workers=0",
            "model.num_frames=1",
        ),
        *(f"data.streams=[{{path: {demo}/train_images}}]", f"eval_data.paths=[{demo}/test_images]"),
        *(
            "trainer.max_duration=4ep",
            "schedule.t_warmup=0ba",
            "checkpoints={interval: 1ep, keep: 9}",
        ),
        "algorithms={LayerFreezing: {freeze_start: 0.0, freeze_level: 0.6}}",
    ]
    run_stage(finetune, arguments, tmp_path)
    folder = tmp_path / "runs" / "finetune_demo" / "checkpoints"
    paths = sorted(folder.glob("ep*.pt"), key=lambda path: step_of(path.name))
    weights = [read_checkpoint(str(path)) for path in (pretrained, *paths)]
    names = [
        f"encoder.{name}.weight"
        for name in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "norm")
    ]
    changes = [
        "".join("-x"[not torch.equal(a[name], b[name])] for name in names)
        for a, b in pairwise(weights)
    ]
    assert changes == [
        "xxxx",
        "--xx",
        "--xx",
        "---x",
    ]  # after an epoch, 3, 6 and 9 of the 20 layers before the head


def test_ema_averages_are_what_fine_tuning_evaluates(demo, pretrained, tmp_path):
    """The averages, half of the steps old, are nearer to the start than the weights, in the result as in the checkpoint."""
    arguments = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        *(
            f"pretrained={pretrained}",
            "data.global_train_batch_size=20",
            "data.num_workers=0",
            "model.num_frames=1",
        ),
        *(f"data.streams=[{{path: {demo}/train_images}}]", f"eval_data.paths=[{demo}/test_images]"),
        *("trainer.max_duration=2ep", "algorithms={EMA: {half_life: 3ba, update_interval: 1ba}}"),
    ]
    run_stage(finetune, arguments, tmp_path)
    run = tmp_path / "runs" / "finetune_demo"
    path = str(run / "checkpoints" / LATEST)
    averages, trained = (
        read_checkpoint(path),
        torch.load(path, weights_only=False)["state"]["model"],
    )
    start = read_checkpoint(str(pretrained))
    name = "encoder.blocks.0.mlp.fc1.weight"
    assert (averages[name] - start[name]).norm() < (trained[name] - start[name]).norm()
    net = Classifier(10, img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4)
    net.load_state_dict(averages)
    views = EvalViews([f"{demo}/test_images"], 32, crop_pct=1.0)
    probabilities, labels = infer(net, lambda inputs: net.eval_forward({"inputs": inputs}), views)
    right = float((probabilities.argmax(dim=1) == labels).float().mean())
    assert json.loads((run / "result.json").read_text())["metrics/eval/top1"] == pytest.approx(
        right, abs=1e-6
    )


def test_run_logs_what_shows_its_health_and_its_speed(arguments, demo, tmp_path):
    callbacks = "SpeedMonitor: {window_size: 2, gpu_flops_available: 1e12}, RuntimeEstimator: {skip_batches: 1}, LRMonitor: {}"
    knn = f"KNN: {{bank: [{demo}/train_images], queries: [{demo}/test_images], every: 1}}"
    run_stage(pretrain, [*arguments, "run_name=run", f"callbacks={{{callbacks}, {knn}}}"], tmp_path)
    result = json.loads((tmp_path / "runs" / "run" / "result.json").read_text())
    names = (
        "loss/train/reconstruction",
        "loss/train/contrastive",
        "loss/train/accuracy",
        "loss/train/feature_std",
    )
    names += (
        "gradient_norm",
        "lr-AdamW/group0",
        "throughput/device/mfu",
        "throughput/samples_per_sec",
    )
    assert not [name for name in names if name not in result]
    assert any("remaining" in name for name in result)
    mfu = result["throughput/device/flops_per_sec"] / 1e12
    assert result["throughput/device/mfu"] == pytest.approx(mfu)
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "knn/trained" in line] == [3, 6]


def test_tensorboard_and_wandb_by_a_line_of_yaml_each(arguments, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = (
        "{TensorboardLogger: {log_dir: tb, flush_interval: 1}, WandBLogger: {project: vic-mae}}"
    )
    run_stage(
        pretrain,
        [*arguments, "run_name=run", "trainer.max_duration=2ba", f"loggers={loggers}"],
        tmp_path,
    )
    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events.out.*")).parent))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss/train/total")]
    assert logged == pytest.approx(losses(tmp_path, "run"), rel=1e-6)
    assert list(Path(tmp_path, "wandb").glob("offline-run-*/run-*.wandb"))
