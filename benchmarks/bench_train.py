"""The training step, the Trainer around it, waiting for data, a kill, a second rank and memory, as ratios.

    uv run python benchmarks/bench_train.py                                      # 2 idle CPU cores, 15 min

Prints a line of JSON for the machine, then one for each ratio: lower is better, but for the step of a plain implementation
and for 2 ranks. Every process has one thread. Contenders take turns, and a ratio is the median over the turns, or over the
steps; what is first, and slower, is not counted. The data are the demonstration's, made here.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from composer import Logger, State, Trainer
from composer.core import DataSpec
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import streams
from checkpoints import Checkpoints
from config import load_config
from views import ViewRecipe, augment_batch

import data_prep
import pretrain
from model import ViCMAE

ROOT = Path(__file__).parents[1]
BATCH, TURNS = 16, 7
RANKS_BATCH = (
    64  # enough that a rank's share of the step, 0.7 s, outweighs what is the same for any share
)
MODEL = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
MODEL |= {
    "decoder_embed_dim": 96,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "projector_hidden_dim": 512,
}
STEPS, INTERVAL = (
    32,
    8,
)  # of the run that is killed: half-way, which is half-way between two checkpoints
KILLED_AFTER = STEPS // 2 + INTERVAL // 2


def take_turns(
    contenders: dict[str, Callable[[], int]], turns: int = TURNS
) -> dict[str, list[float]]:
    """Seconds for each thing done, by contender and turn. A contender does something and says how many times."""
    seconds = {name: [] for name in contenders}
    for _ in range(turns + 1):
        for name, work in contenders.items():
            begin = time.perf_counter()
            count = work()
            seconds[name].append((time.perf_counter() - begin) / count)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def report(what: str, value: float, relative_to: str, counted: str, **more: object) -> None:
    print(
        json.dumps(
            {"what": what, "ratio": value, "relative_to": relative_to, "counted": counted} | more
        ),
        flush=True,
    )


def configure(*changes: str, model: dict | None = MODEL, batch: int = BATCH) -> dict:
    """The demonstration's configuration with another model and batch, and no k-NN, which is not of a step."""
    changes += tuple(f"model.{key}={value}" for key, value in (model or {}).items())
    always = [
        "data.make_demo=null",
        f"data.global_train_batch_size={batch}",
        "schedule.t_warmup=2ba",
    ]
    config = load_config([str(ROOT / "yamls" / "demo.yaml"), *always, *changes], pretrain.pretrain)
    config["callbacks"].pop("KNN")
    return {"algorithms": None, "loggers": None} | config


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.at_least_fp32 = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(B, L, 3, self.heads, D // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        if self.fused:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(B, L, D))
        return x + self.narrow(F.gelu(self.at_least_fp32(self.norm2(x))))


class Plain(nn.Module):
    """ViC-MAE as one would write it down with torch alone: each view has a pass of its own.

    `fused`: whether attention is torch's function, or written out, as in the timm of the official code (0.3.2).
    """

    def __init__(self, ours: ViCMAE, fused: bool):
        super().__init__()
        encoder, decoder, hidden = ours.encoder, ours.decoder, ours.projector[0].out_features
        D, d, p = encoder.pos_embed.shape[2], decoder.pos_embed.shape[2], encoder.patch_size
        out = ours.projector[-1].out_features
        self.patch_size, self.mask_ratio, self.temperature = p, ours.mask_ratio, ours.temperature
        self.weights = (ours.weight_recon, ours.weight_contrast)
        self.register_buffer(
            "positions", encoder.pos_embed.detach().clone()
        )  # fixed: not what is measured
        self.register_buffer("decoder_positions", decoder.pos_embed.detach().clone())
        self.cls = nn.Parameter(torch.zeros(1, 1, D))
        self.patches = nn.Conv2d(3, D, p, p)
        self.encoder = nn.Sequential(
            *(PlainBlock(D, block.attn.num_heads, fused) for block in encoder.blocks)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.to_decoder = nn.Linear(D, d)
        self.decoder = nn.Sequential(
            *(PlainBlock(d, block.attn.num_heads, fused) for block in decoder.blocks)
        )
        self.decoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.to_pixels = nn.Linear(d, 3 * p * p)
        first = (nn.Linear(D, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        second = (nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.projector = nn.Sequential(*first, *second, nn.Linear(hidden, out))

    def one_view(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), noise (B, N) -> the reconstruction loss, and projections (B, out)."""
        (B, N), p = noise.shape, self.patch_size
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        keep = order[:, : int(N * (1 - self.mask_ratio))]
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        x = torch.gather(x, 1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.cls + self.positions[:, :1]).expand(B, -1, -1), x], dim=1)
        tokens = self.norm(self.encoder(x))

        x = self.to_decoder(tokens)
        hidden = self.mask_token.expand(B, N - keep.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = torch.gather(patches, 1, back.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_positions
        pred = self.to_pixels(self.decoder_norm(self.decoder(x)))[:, 1:]

        side = images.shape[-1] // p
        target = images.view(B, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(B, N, -1)
        target = (target - target.mean(dim=-1, keepdim=True)) / (
            target.var(dim=-1, keepdim=True) + 1e-6
        ).sqrt()
        removed = (back >= keep.shape[1]).float()
        error = ((pred - target) ** 2).mean(dim=-1)
        return (error * removed).sum() / removed.sum(), self.projector(tokens[:, 1:].mean(dim=1))

    def forward(self, views: Tensor, noise: Tensor) -> Tensor:
        """Views (B, 2, 3, H, W), noise (B, 2, N) -> the loss."""
        first, one = self.one_view(views[:, 0].contiguous(), noise[:, 0])
        second, two = self.one_view(views[:, 1].contiguous(), noise[:, 1])
        z = F.normalize(torch.cat([one, two]), dim=-1)
        similar = z @ z.T / self.temperature
        similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        partner = torch.arange(len(z)).roll(len(one))
        reconstruct, contrast = self.weights
        return reconstruct * (first + second) / 2 + contrast * F.cross_entropy(similar, partner)


def our_loss(net: ViCMAE, batch: dict[str, Tensor]) -> Tensor:
    return net.loss(net(batch), batch)["total"]


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, times: int = 1) -> int:
    for _ in range(times):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return times


def compare_steps(what: str, config: dict) -> None:
    """Ours without a Trainer beside the plain one; both begin with the same weights, and must find the same loss.

    Ours comes in both precisions that a CPU has, fp32 and amp_bf16, as it is and compiled (trainer.compile_config), the
    plain one in fp32, as one would write it down, and under autocast.
    """
    torch.manual_seed(0)
    size = config["data"]["global_train_batch_size"]
    net = ViCMAE(**config["model"])
    others = [
        one
        for name, one in net.named_parameters()
        if one.requires_grad and not name.endswith("_token")
    ]
    trained = [net.encoder.cls_token, net.decoder.mask_token, *others]
    side = net.encoder.img_size
    batch = {
        "views": torch.randn(size, 2, 3, side, side),
        "noise": torch.rand(size, 2, net.encoder.num_patches),
    }
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    plain = {
        "fp32": Plain(net, fused=True),
        "fp32, attention written out": Plain(net, fused=False),
        "autocast to bfloat16": Plain(net, fused=True),
    }
    mine = {
        precision: copy.deepcopy(net)
        for precision in ("fp32", "amp_bf16", "fp32, compiled", "amp_bf16, compiled")
    }
    contenders = {}
    for precision, one in mine.items():
        if "compiled" in precision:
            one.forward = torch.compile(one.forward)
        if "bf16" in precision:
            one.forward = bfloat16(one.forward)  # as build_trainer has it
        ours = pretrain.build_optimizer(one, size, **config["optimizer"])
        contenders[precision] = partial(step, partial(our_loss, one, batch), ours, 2)
    for name, other in plain.items():
        with torch.no_grad():
            for theirs, value in zip(other.parameters(), trained, strict=True):
                theirs.copy_(value)
        torch.testing.assert_close(other(**batch), our_loss(net, batch))
        other.forward = bfloat16(other.forward) if "bfloat16" in name else other.forward
        optimizer = torch.optim.AdamW(
            other.parameters(), lr=ours.param_groups[0]["lr"], weight_decay=0.05
        )
        contenders[f"plain, {name}"] = partial(step, partial(other, **batch), optimizer, 2)
    seconds = take_turns(contenders)
    for name, precision in product(plain, mine):
        more = {"batch": size, "seconds": round(statistics.median(seconds[precision]), 3)}
        value = ratio(seconds[f"plain, {name}"], seconds[precision])
        what_is = f"step time of a plain implementation, {name}, {what}"
        report(what_is, value, f"ours in {precision}", "wall time of a step", **more)


class Batches:
    """Hands out the same batches over and over, and times what is done with each, and before each what `between` does."""

    def __init__(
        self, batches: list[dict], length: int, between: Callable[[dict], object] | None = None
    ):
        self.batches, self.length, self.between = batches, length, between
        self.seconds, self.seconds_between = [], []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict]:
        for number in range(self.length):
            batch = self.batches[number % len(self.batches)]
            begin = time.perf_counter()
            if self.between:
                self.between(batch)
            handed = time.perf_counter()
            yield batch
            self.seconds_between.append(
                handed - begin
            )  # the last is not asked for again, and so not counted
            self.seconds.append(time.perf_counter() - handed)


def draw_batches(config: dict, size: int, count: int = 4) -> list[dict[str, Tensor]]:
    """What the loader gives, without pictures in it."""
    rng, side = np.random.default_rng(0), config["model"]["img_size"]
    recipe, patches = (
        ViewRecipe(**config["augment"]["video"]),
        (side // config["model"]["patch_size"]) ** 2,
    )
    return [
        {
            "views": torch.from_numpy(rng.integers(0, 256, (size, 2, side, side, 3), np.uint8)),
            "augment": torch.from_numpy(
                np.array([[recipe.draw(rng, view) for view in (0, 1)] for _ in range(size)])
            ),
            "noise": torch.from_numpy(rng.random((size, 2, patches), np.float32)),
        }
        for _ in range(count)
    ]


def build_on(batches: Batches, config: dict, run: Path, size: int) -> Trainer:
    """The Trainer of a pre-training run on these batches, of `size` pairs for each rank."""
    torch.manual_seed(0)
    net = ViCMAE(**config["model"])
    adamw = pretrain.build_optimizer(
        net, config["data"]["global_train_batch_size"], **config["optimizer"]
    )
    spec = DataSpec(batches, microbatch_transforms=augment_batch)
    return pretrain.build_trainer(run, config, net, adamw, spec, size)


def measure_trainer(work: Path, steps: int = 40) -> None:
    """Steps of the Trainer and bare ones take turns, between the Trainer's asking for a batch and its getting it."""
    config = configure(f"trainer.max_duration={steps}ba", "checkpoints.interval=1000ba")
    torch.manual_seed(0)
    net = ViCMAE(**config["model"])
    adamw = pretrain.build_optimizer(net, BATCH, **config["optimizer"])
    batches = Batches(
        draw_batches(config, BATCH),
        steps,
        lambda batch: step(lambda: our_loss(net, augment_batch(batch)), adamw),
    )
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):  # its progress bar, which is part of the step
        trainer = build_on(batches, config, work / "overhead", BATCH)
        trainer.fit()
        trainer.close()
    within, bare = batches.seconds[2:], batches.seconds_between[2:]
    more = {"steps": len(bare), "seconds": round(statistics.median(bare), 3)}
    report(
        "overhead of the Trainer",
        round(ratio(within, bare) - 1, 4),
        "bare step",
        "wall time, (Trainer - bare) / bare",
        **more,
    )


class TimedLoader(DataLoader):
    waits: list[tuple[float, float]] = []  # noqa: RUF012  # of the one run that is measured

    def __iter__(self) -> Iterator[dict]:
        begin = time.perf_counter()
        for batch in super().__iter__():
            self.waits.append((begin, time.perf_counter()))
            yield batch
            begin = time.perf_counter()


def run_settings(demo: Path, steps: int, workers: int) -> list[str]:
    """Two epochs of real data; with 12 garments of each class, samples come again."""
    streams = f"data.streams=[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]"
    sizes = [
        f"data.epoch_size={BATCH * steps // 2}",
        "trainer.max_duration=2ep",
        f"data.num_workers={workers}",
    ]
    return [streams, *sizes, "trainer.progress_bar=false"]


def measure_waiting(demo: Path, model: dict | None, what: str, steps: int) -> None:
    config = configure(*run_settings(demo, steps, 2), f"run_name=waiting{steps}", model=model)
    TimedLoader.waits.clear()
    with mock.patch.object(streams, "DataLoader", TimedLoader):
        trainer = pretrain.pretrain(**config)
        trainer.fit()
    trainer.close()
    waits = TimedLoader.waits
    loop = waits[-1][1] - waits[0][1]  # from the first batch's coming to the last one's
    waited = sum(end - begin for begin, end in waits[1:])
    more = {
        "steps": len(waits) - 1,
        "seconds": round(loop, 2),
        "cores": os.cpu_count(),
        "processes": 3,
    }
    report(
        f"waiting for data, 2 workers, {what}",
        round(waited / loop, 4),
        "the loop",
        "wall time after the first batch",
        **more,
    )


def note_time(self: Checkpoints, state: State, logger: Logger) -> None:
    """At the start of a step, add a line to times.jsonl: steps done, seconds."""
    with (self.folder.parent / "times.jsonl").open("a") as file:
        file.write(json.dumps([state.timestamp.batch.value, time.time()]) + "\n")


def times_of(run: Path) -> list[list[float]]:
    path = run / "times.jsonl"
    return (
        [
            json.loads(line)
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        if path.exists()
        else []
    )


def live(arguments: list[str], run: Path, kill_after: int | None = None) -> tuple[float, float]:
    """Launch a run as users do, and wait for its end, or kill it when so many steps are done -> begin, end in seconds."""
    command = [
        sys.executable,
        "-m",
        "composer.cli.launcher",
        "-n",
        "1",
        __file__,
        "--child",
        *arguments,
    ]
    begin = time.time()
    with (run.parent.parent / "out.txt").open("a") as out:
        process = subprocess.Popen(
            command,
            cwd=run.parent.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            if kill_after and any(done >= kill_after for done, _ in times_of(run)):
                break
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    end = time.time()
    if process.wait() != (-signal.SIGKILL if kill_after else 0):
        sys.exit((run.parent.parent / "out.txt").read_text()[-3000:])
    return begin, end


def measure_kill(demo: Path, work: Path, turns: int = 2) -> None:
    """What one SIGKILL and the launch after it cost; it comes at the start of a step, half an interval from a checkpoint."""
    changes = [f"model.{key}={value}" for key, value in MODEL.items()]
    changes += [
        "data.make_demo=null",
        f"data.global_train_batch_size={BATCH}",
        "callbacks=null",
        "schedule.t_warmup=2ba",
    ]
    arguments = [str(ROOT / "yamls" / "demo.yaml"), *changes, *run_settings(demo, STEPS, 1)]
    arguments += [f"checkpoints.interval={INTERVAL}ba"]
    found = []
    for turn in range(turns):
        whole, killed = work / "runs" / f"whole{turn}", work / "runs" / f"killed{turn}"
        begin, end = live([*arguments, f"run_name={whole.name}"], whole)
        first, died = live([*arguments, f"run_name={killed.name}"], killed, KILLED_AFTER)
        before = times_of(killed)
        _, last = live([*arguments, f"run_name={killed.name}"], killed)
        after = times_of(killed)[len(before) :]
        seconds = statistics.median(np.diff([moment for _, moment in times_of(whole)]))
        found.append(
            {
                "lost": ((last - first) - (end - begin)) / seconds,
                "start": (after[0][1] - died) / seconds,
                "again": before[-1][0] - after[0][0],
                "seconds": seconds,
            }
        )
    lost, start, again, seconds = (statistics.median(one[key] for one in found) for key in found[0])
    more = {
        "start_up": round(start, 1),
        "done_again": again,
        "interval": INTERVAL,
        "seconds": round(seconds, 3),
    }
    more |= {"seconds_of_start_up": round(start * seconds, 1)}
    report(
        "lost by a kill and a launch",
        round(lost, 1),
        "a step",
        "wall time beyond that of a run never stopped",
        **more,
    )


def in_processes(function: Callable, *arguments: list, at_once: int) -> list:
    """function of each row of arguments in a process of its own, forked from a server that has the libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["composer", "streaming", "timm"])
    with ProcessPoolExecutor(at_once, context, max_tasks_per_child=1) as pool:
        return list(pool.map(function, *arguments))


def run_rank(rank: int, ranks: int, folder: str, steps: int) -> float:
    """Median seconds of a rank's steps of one global batch."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    always = ["checkpoints.interval=1000ba", "trainer.progress_bar=false"]
    config = configure(f"trainer.max_duration={steps}ba", *always, batch=RANKS_BATCH)
    batches = Batches(draw_batches(config, RANKS_BATCH // ranks), steps)
    build_on(batches, config, Path(folder, "run"), RANKS_BATCH // ranks).fit()
    torch.distributed.destroy_process_group()
    return statistics.median(batches.seconds[2:])


def compare_ranks(work: Path, turns: int = 3, steps: int = 8) -> None:
    seconds = {1: [], 2: []}
    for _, ranks in product(range(turns), seconds):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            rows = (range(ranks), [ranks] * ranks, [folder] * ranks, [steps] * ranks)
            seconds[ranks].append(max(in_processes(run_rank, *rows, at_once=ranks)))
    more = {
        "batch": RANKS_BATCH,
        "seconds": round(statistics.median(seconds[1]), 3),
        "cores": os.cpu_count(),
    }
    report(
        "2 ranks, the same global batch",
        ratio(seconds[1], seconds[2]),
        "1 rank",
        "samples a second",
        **more,
    )


def peak(model: dict, chunk_size: int | None, decode_ratio: float, pairs: int) -> int:
    """Peak resident kilobytes of a process that does one forward and backward pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = ViCMAE(**model, chunk_size=chunk_size)
    net.decode_ratio = decode_ratio
    side = net.encoder.img_size
    batch = {
        "views": torch.randn(pairs, 2, 3, side, side),
        "noise": torch.rand(pairs, 2, net.encoder.num_patches),
    }
    our_loss(net, batch).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_memory(few: int = 4, many: int = 8) -> None:
    """What a pair adds: weights, gradients and libraries are in both of two batches, and so not in their difference.

    With chunks, what a pair has outside of them remains: its views and predictions, and the loss's targets and errors.
    """
    small = {
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "decoder_embed_dim": 128,
        "decoder_depth": 4,
    }
    sizes = {
        "D 192, depth 6, decoder 128 x 4": small | {"decoder_num_heads": 4},
        "ViT-S (yamls/vits.yaml)": load_config(
            [str(ROOT / "yamls" / "vits.yaml")], pretrain.pretrain
        )["model"],
    }
    options = {
        "plain": (None, 1.0),
        "chunk_size=2": (2, 1.0),
        "PartialDecoding 0.5": (None, 0.5),
        "both": (2, 0.5),
    }
    for size, model in sizes.items():
        rows = [(model, *option, pairs) for option in options.values() for pairs in (few, many)]
        peaks = in_processes(peak, *zip(*rows, strict=True), at_once=2)
        each = [
            (most - least) / (many - few) * 1024 / 1e6
            for least, most in zip(peaks[::2], peaks[1::2], strict=True)
        ]
        for name, megabytes, whole in zip(options, each, peaks[1::2], strict=True):
            more = {
                "megabytes": round(megabytes, 1),
                f"megabytes_of_process_at_{many}": round(whole * 1024 / 1e6),
            }
            report(
                f"memory of a pair of 224 pixels, {size}, {name}",
                round(megabytes / each[0], 3),
                "plain",
                "peak RSS",
                **more,
            )


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--child"]:
        del sys.argv[1]
        Checkpoints.batch_start = note_time
        pretrain.main()
        return
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps(machine | {"threads": torch.get_num_threads()}), flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        work, demo = Path(folder), Path(folder, "demo")
        (work / "runs").mkdir()
        data_prep.demo(str(demo), workers=2, garments=12)
        for batch in (4, BATCH, 32):
            compare_steps(f"D 192, {batch} pairs", configure(batch=batch))
        for batch in (32, 256):
            compare_steps(f"the demonstration's, {batch} pairs", configure(model=None, batch=batch))
        measure_trainer(work)
        measure_waiting(demo, MODEL, "D 192", 40)
        measure_waiting(demo, None, "the demonstration's model", 160)
        measure_kill(demo, work)
        compare_ranks(work)
        measure_memory()


if __name__ == "__main__":
    main()
