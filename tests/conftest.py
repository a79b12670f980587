"""Fixtures and helpers of all tests: small data sets and a checkpoint, made once; conversions and
files of a test; stages on the command line; processes that join into ranks; a bucket.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from streaming import LocalDataset
from streaming.base.shared import SharedMemory, prefix

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data_prep  # noqa: E402
import pretrain  # noqa: E402
import training.run  # noqa: E402
from shards.decode import Recipe  # noqa: E402
from shards.layouts import LAYOUTS  # noqa: E402
from shards.storage import s3_client  # noqa: E402
from shards.workers import STOP_SIGNALS  # noqa: E402
from training.weights import LATEST  # noqa: E402

torch.set_num_threads(1)  # the models are small: more threads would only compete
# A StreamingDataset attaches to the shared memory of all others, and keeps each file open until the
# process ends. With hundreds of them in one process, the limit of open files would be reached.
prefix.SharedMemory = lambda name, create, size=0: SharedMemory(
    name, create, size, auto_cleanup=create
)
# Seconds that a discarded loader waits for each of its workers.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
# Drawing loss.png takes a second, far more than most trainings of the tests. Runs that are launched
# as a user launches them draw it.
training.run.draw_curves = lambda lines, to: None
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
# Every full collection of garbage would search the libraries' objects, for half a second.
gc.freeze()


def pytest_addoption(parser) -> None:
    text = "run the tests marked gpu and gpus on CPUs, where they can be"
    parser.addoption("--gpu-tests-on-cpu", action="store_true", help=text)


def pytest_collection_finish() -> None:
    gc.freeze()  # the objects of the tests' modules, too


def pytest_collection_modifyitems(config, items) -> None:
    """Skip the tests marked gpu and gpus where there are too few GPUs."""
    count = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("gpus") else 1
        if item.get_closest_marker("gpu") is None and needed == 1:
            continue
        if count < needed and not config.getoption("--gpu-tests-on-cpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU"))


@pytest.fixture(scope="session")
def device(request) -> str:
    """Composer's name of the device of the tests marked gpu and gpus."""
    return "cpu" if request.config.getoption("--gpu-tests-on-cpu") else "gpu"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global generators: no test depends on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def usual_priority() -> Iterator[None]:
    """Undo what SVT-AV1 does, with which some tests write films: it makes its caller real-time.

    All later tests and their ranks would starve every other process.
    """
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The demonstration with 12 garments of every class: 60 clips and 60 stills in each split."""
    out = tmp_path_factory.mktemp("data") / "demo"
    data_prep.make_demo(str(out), workers=2, garments=12)
    return out


@pytest.fixture(scope="session")
def odd_images(demo, tmp_path_factory) -> Path:
    """A data set of 31 stills of all classes: two ranks cannot share them equally."""
    folder = tmp_path_factory.mktemp("odd")
    for number, source in enumerate(sorted((demo / "raw" / "test" / "images").iterdir())):
        (folder / "raw" / source.name).mkdir(parents=True)
        count = 4 if number == 0 else 3
        for file in sorted(source.iterdir())[:count]:
            shutil.copy(file, folder / "raw" / source.name)
    data_prep.convert(str(folder / "raw"), str(folder / "odd_images"), Recipe("images"), 1)
    return folder / "odd_images"


class Made(NamedTuple):
    """The report and the samples of a conversion."""

    report: dict
    classes: list[str]
    found: dict[str, str | None]  # name: class
    frames: dict[str, bytes]


@pytest.fixture
def make(tmp_path):
    """Return make(preset, source, split), which converts and checks the counts of the report."""
    outs = iter(range(1000))

    def run(
        preset: str, source: Path | str, split: str = "train", max_skipped: float = 0.0, **recipe
    ) -> Made:
        kind, list_inputs = LAYOUTS.get(preset, (preset, None))
        out = str(tmp_path / f"out{next(outs)}")
        recipe = Recipe(kind, **({"frames": 2} if kind == "videos" else {}) | recipe)
        arguments = (str(source), out, recipe, 1, max_skipped, list_inputs, split)
        report = data_prep.convert(*arguments)
        classes = json.loads(Path(out, "classes.json").read_text())
        samples = list(LocalDataset(out))
        found = {
            sample["name"]: classes[sample["label"]] if sample["label"] >= 0 else None
            for sample in samples
        }
        assert (
            len(found)
            == len(samples)
            == report["samples"]
            == report["inputs"] - len(report["skipped"])
        )
        assert report == json.loads(Path(out, "report.json").read_text())
        if ".tar/" not in samples[0]["name"]:  # Of tars, files are listed, but samples are counted.
            assert report["listed"] == report["inputs"]
        return Made(
            report, classes, found, {sample["name"]: sample["frames"] for sample in samples}
        )

    return run


def write_run(folder: Path, config: str, state: dict | None = None) -> str:
    """Make a run directory, with a checkpoint of a state; return the path of the newest."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    if state is not None:
        torch.save({"state": {"model": state}}, folder / "checkpoints" / "ep1-ba3.pt")
        (folder / "checkpoints" / LATEST).symlink_to("ep1-ba3.pt")
    return str(folder / "checkpoints" / LATEST)


# a.yaml of the tests of configurations, for the keys of test_training_config.Training
A_YAML = "run_name: x\nseed: 0\ndata: {streams: [{path: a}]}\nmodel: {depth: 2, mask_ratio: 0.75}\n"


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[[str, str], str]:
    """Write a file beside a.yaml in a new working directory, where Python also finds modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, text: str) -> str:
        Path(name).write_text(text)
        return name

    write("a.yaml", A_YAML)
    yield write
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def fork_server() -> BaseContext:
    """Return a context whose processes are forked from a server that has loaded all stages.

    The server has no process group, which this process may have.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "finetune", "eval"])
    # The server ignores sys.path.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}/tests", prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def join(
    rank: int,
    ranks: int,
    store: str,
    backend: str,
    environment: dict[str, str],
    function,
    arguments: tuple,
) -> None:
    os.environ |= environment  # the fork server has the environment of its own start
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
    }
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    function(rank, *arguments)
    torch.distributed.barrier()  # no rank leaves while another still communicates
    # The destructor of a gloo group can deadlock with its worker thread over the GIL.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start_ranks(folder: Path, ranks: int, function, *arguments, backend: str = "gloo") -> None:
    """Call function(rank, *arguments) in the processes of one group.

    Args:
        folder: for the file through which the processes find each other.
    """
    fork_server()
    store = folder / f"store-{uuid.uuid4()}"  # the file of an earlier group would mislead
    mp.start_processes(
        join,
        (ranks, str(store), backend, dict(os.environ), function, arguments),
        nprocs=ranks,
        start_method="forkserver",
    )


@pytest.fixture
def on_ranks(tmp_path) -> Callable:
    """on_ranks(n, function, *arguments), see start_ranks."""
    return partial(start_ranks, tmp_path)


def run_rank_of_stage(
    rank: int, ranks: int, port: int, environment: dict[str, str], stage: str, *arguments
) -> None:
    os.environ |= environment  # see join
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    for name, value in {"RANK": rank, "WORLD_SIZE": ranks}.items():
        os.environ |= {name: str(value), f"LOCAL_{name}": str(value)}
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of data workers, as in a program that was launched
    run_stage(importlib.import_module(stage), *arguments)
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # see join


def run_stage_on_ranks(stage, arguments: list[str], folder: Path, ranks: int) -> None:
    """Do what Composer's launcher does, in processes that have loaded the stages already."""
    fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = (ranks, port, dict(os.environ), stage.__name__, arguments, folder)
    mp.start_processes(run_rank_of_stage, settings, nprocs=ranks, start_method="forkserver")


def small(demo: Path) -> list[str]:
    """Return the arguments of a pre-training run of six steps that takes seconds."""
    return [
        str(ROOT / "yamls" / "demo.yaml"),
        "make_demo=null",
        f"data.streams=[{{path: {demo}/train_videos}}, {{path: {demo}/train_images}}]",
        "data.global_train_batch_size=40",
        "trainer.max_duration=2ep",
        f"callbacks.KNN={{bank: [{demo}/train_images], queries: [{demo}/test_images]}}",
    ]


def read_metrics(folder: Path, run_name: str) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl."""
    text = (folder / "runs" / run_name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def read_result(folder: Path, run_name: str) -> dict[str, Any]:
    """Return a run's result.json."""
    return json.loads((folder / "runs" / run_name / "result.json").read_text())


def losses(folder: Path, run_name: str) -> list[float]:
    """Return the total loss of every step of a run; each step must be logged once, in order."""
    lines = [line for line in read_metrics(folder, run_name) if "loss/train/total" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss/train/total"] for line in lines]


def signal_at(step: int) -> Callable:
    """Return a batch_start for Checkpoints that sends SIGTERM to this process before a step."""

    def batch_start(self, state, logger) -> None:
        if state.timestamp.batch.value == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return batch_start


def corrupted_copy(source: Path, folder: Path, *numbers: int) -> Path:
    """Copy a data set of stills of one shard; samples of these numbers cannot be decoded."""
    copy = shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
    (shard,) = copy.rglob("*.mds")
    data = bytearray(shard.read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", data)]
    for number in numbers:
        data[starts[number]] = 0
    shard.write_bytes(data)
    return copy


def launch(
    folder: Path, script: str, *arguments: str, ranks: int = 1
) -> subprocess.CompletedProcess:
    """Run a stage on the real command line, through Composer's launcher, in a folder."""
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)]
    command = [*launcher, str(ROOT / script), *arguments]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, error = process.communicate(timeout=300)
        finally:
            # Ranks that outlive the launcher would keep the pipes open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def run_stage(stage, arguments: list[str], folder: Path) -> None:
    """Call a stage's main in this process, which saves the start of an interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", [f"{stage.__name__}.py", *arguments])
        handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
        try:
            stage.main()
        finally:
            for number, handler in zip(STOP_SIGNALS, handlers, strict=True):
                signal.signal(number, handler)


def error_of(stage, arguments: list[str], folder: Path) -> str:
    """Return the line with which a stage ends because of a mistake in its arguments."""
    with pytest.raises(SystemExit) as end:
        run_stage(stage, arguments, folder)
    message = str(end.value)
    assert message.startswith(f"{stage.__name__}.py: ") and "\n" not in message
    return message


@pytest.fixture(scope="session")
def pretrained(demo, tmp_path_factory) -> Path:
    """The checkpoint of three steps of pre-training."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_stage(pretrain, [*small(demo), "trainer.max_duration=1ep"], folder)
    return folder / "runs" / "demo" / "checkpoints" / "latest-rank0.pt"


SIMULATED_S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The address of a simulated S3 in a process of its own, which ends with its standard input."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SIMULATED_S3], **pipes) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


@pytest.fixture
def bucket(endpoint, tmp_path, monkeypatch):
    """boto3's client with an empty bucket "bkt"; the working directory is tmp_path."""
    for name, value in {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_prep, "PART_SIZE", 5)
    s3_client.cache_clear()
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bkt")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bkt"):
        for found in page.get("Contents", ()):
            client.delete_object(Bucket="bkt", Key=found["Key"])
    s3_client.cache_clear()
