"""Checkpoints: runs that are killed, corrupted, moved or changed, and resume; buckets; FSDP."""

import json
import os
import shutil
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from composer.utils import dist
from conftest import ROOT, fork_server, run_stage, small
from test_training_safe_load import Malicious, train_sharded, whole_weights

import pretrain
import training.checkpoints
from evaluation.probes import KNN, embed, knn_accuracy
from model import ViCMAE
from pretrain import PretrainConfig
from shards.storage import Storage, s3_client
from shards.views import EvalViews
from training.checkpoints import LATEST, STOPPED, Checkpoints, check_checkpoint, checkpoint_step
from training.config import load_config
from training.run import start_run
from training.weights import load_pretrained, read_checkpoint

FSDP = (
    "trainer.parallelism_config={{fsdp: {{state_dict_type: {}, activation_checkpointing: true}}}}"
)
CLIPPING = "algorithms={GradientClipping: {clipping_type: norm, clipping_threshold: 0.01}}"
EMA = "algorithms={EMA: {half_life: 2ba, update_interval: 1ba}}"


def run(folder: Path, *arguments: str) -> None:
    run_stage(pretrain, list(arguments), folder)


def run_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(pretrain, arguments, Path(folder))


def run_rank_with_speed(rank: int, folder: str, arguments: list[str]) -> None:
    """run_rank with SpeedMonitor, for which a stage counts operations before the ranks join.

    Here they have joined already, and fake tensors cannot be gathered.
    """
    pretrain.flops_per_sample = lambda *_: 0.0
    run_rank(rank, folder, [*arguments, "callbacks={SpeedMonitor: {}}"])


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(str(folder / "runs" / name / "checkpoints" / LATEST))


def read_log(folder: Path, name: str) -> list[dict]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path, name: str) -> list[float]:
    """The losses of all steps, each of which must be logged, in order."""
    key = "loss/train/total"
    totals = {line["step"]: line[key] for line in read_log(folder, name) if key in line}
    assert list(totals) == list(range(1, len(totals) + 1))
    return list(totals.values())


def same(ours: dict, theirs: dict) -> bool:
    if ours.keys() != theirs.keys():
        return False
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def unfinish(folder: Path, name: str) -> None:
    """Make a finished run look interrupted, so that the next launch resumes it."""
    (folder / "runs" / name / "result.json").unlink()


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    """Six steps, a checkpoint after each."""
    return [
        *small(demo),
        "schedule.t_max=2ep",
        "checkpoints.interval=1ba",
        "callbacks=null",
        "data.num_workers=0",
    ]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, *arguments, "run_name=uninterrupted")
    return folder


@pytest.fixture(scope="module")
def four_steps(arguments, tmp_path_factory) -> Path:
    """The folder of a run that was interrupted after four of its six steps."""
    folder = tmp_path_factory.mktemp("four_steps")
    run(folder, *arguments, "run_name=half", "trainer.max_duration=4ba")
    unfinish(folder, "half")
    return folder


@pytest.fixture
def interrupted(four_steps, tmp_path) -> Path:
    """The checkpoints' folder in a copy of that run, in tmp_path."""
    shutil.copytree(four_steps / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "half" / "checkpoints"


# Corrupt and lost checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, Path.unlink])
def test_run_resumes_from_the_checkpoint_before_a_corrupt_or_missing_one(
    arguments, uninterrupted, interrupted, tmp_path, capfd, damage
):
    damage(interrupted / "ep1-ba4.pt")
    run(tmp_path, *arguments, "run_name=half")
    printed = capfd.readouterr().out
    assert f"resuming from {Path('runs/half/checkpoints/ep0-ba3.pt')}" in printed
    if damage is not Path.unlink:
        assert "ep1-ba4.pt is corrupt" in printed
        assert len(list(interrupted.glob("ep1-ba4.pt.corrupt.*"))) == 1
    assert same(weights(tmp_path, "half"), weights(uninterrupted, "uninterrupted"))
    assert losses(tmp_path, "half") == losses(uninterrupted, "uninterrupted")


@pytest.mark.parametrize("target", [None, "nowhere.pt"])
def test_missing_or_dangling_link_is_made_anew(
    arguments, uninterrupted, interrupted, tmp_path, target
):
    (interrupted / LATEST).unlink()
    if target:
        (interrupted / LATEST).symlink_to(target)
    (interrupted / "aside").mkdir()  # as a kill while saving leaves it
    (interrupted / "aside" / "ep1-ba5.pt").write_bytes(b"half-written")
    run(tmp_path, *arguments, "run_name=half")
    assert os.readlink(interrupted / LATEST) == "ep1-ba6.pt"
    assert same(weights(tmp_path, "half"), weights(uninterrupted, "uninterrupted"))


def test_run_whose_checkpoints_are_all_corrupt_or_lost_never_starts_anew_by_itself(
    arguments, interrupted, tmp_path
):
    for path in interrupted.glob("ep*.pt"):
        cut(path)
    corrupt = r"ba4.pt is corrupt .*; .*ba3.pt is corrupt .*no checkpoint is left. Delete"
    with pytest.raises(SystemExit, match=corrupt):
        run(tmp_path, *arguments, "run_name=half")
    lost = r"latest-rank0.pt points to ep1-ba4.pt, which is not there; no checkpoint is left"
    with pytest.raises(SystemExit, match=lost):
        run(tmp_path, *arguments, "run_name=half")


def test_checkpoint_that_would_run_code_is_set_aside_and_not_run(
    arguments, interrupted, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    newest = interrupted / "ep1-ba4.pt"
    torch.save(torch.load(newest, weights_only=False) | {"more": Malicious()}, newest)
    run(tmp_path, *arguments, "run_name=half")
    reason = f"{newest.name} is corrupt (it holds a posix.system, which is no plain value"
    assert reason in capfd.readouterr().out
    assert not Path("was_run").exists()


# Which checkpoints are kept


@pytest.mark.parametrize(
    ("keep", "milestone", "kept"),
    [
        (1, None, ["ep4-ba9.pt"]),
        (3, None, ["ep3-ba7.pt", "ep4-ba8.pt", "ep4-ba9.pt"]),
        (1, 2, ["ep2-ba4.pt", "ep4-ba8.pt", "ep4-ba9.pt"]),
        (1, 1, ["ep1-ba2.pt", "ep2-ba4.pt", "ep3-ba7.pt", "ep4-ba8.pt", "ep4-ba9.pt"]),
    ],
)
def test_newest_checkpoints_and_the_first_of_each_milestone_are_kept(
    tmp_path, keep, milestone, kept
):
    names = ["ep0-ba1.pt", "ep1-ba2.pt", "ep1-ba3.pt", "ep2-ba4.pt", "ep2-ba5.pt", "ep2-ba6.pt"]
    names += ["ep3-ba7.pt", "ep4-ba8.pt", "ep4-ba9.pt"]
    others = ["aside", LATEST, "ep1-ba2.pt.corrupt.5", "ep1-ba2.pt.fetched"]
    checkpoints = Checkpoints(tmp_path / "run", keep=keep, milestone=milestone)
    superseded = checkpoints.superseded([*reversed(names), *others])
    assert sorted(superseded) == [name for name in names if name not in kept]


def test_newest_two_checkpoints_and_the_milestones_are_kept_over_several_launches(
    arguments, tmp_path
):
    arguments = [
        *arguments,
        "run_name=run",
        "checkpoints.milestone=2",
        "trainer.max_duration=5ep",
        "schedule.t_max=5ep",
    ]
    run(tmp_path, *arguments, "trainer.max_duration=8ba")
    unfinish(tmp_path, "run")
    run(tmp_path, *arguments)
    left = sorted(path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir())
    assert left == ["ep2-ba7.pt", "ep4-ba13.pt", "ep4-ba14.pt", "ep4-ba15.pt", LATEST]


# Changed configurations, finished runs, several machines


def test_changed_configuration_is_refused_by_its_keys(arguments, interrupted, tmp_path):
    changed = ["optimizer.base_lr=1e-4", "model.temperature=0.3"]
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *arguments, "run_name=half", *changed)
    listed = "model.temperature (0.2 -> 0.3), optimizer.base_lr (0.003 -> 0.0001)"
    assert f"other values of {listed}; choose another run_name" in str(end.value)
    allowed = ["trainer.max_duration=5ba", "callbacks={LRMonitor: {}}", "checkpoints.keep=3"]
    run(tmp_path, *arguments, "run_name=half", *allowed)
    assert len(losses(tmp_path, "half")) == 5


def start_on_a_machine(rank: int, folder: Path, arguments: list[str]) -> None:
    """Start a run on a rank with a folder of its own, and write down how that ends."""
    os.chdir(folder / f"machine{rank}")
    try:
        start_run(PretrainConfig(**load_config(arguments, PretrainConfig)))
    except (ValueError, SystemExit) as error:
        Path("end").write_text(str(error))


def test_machines_without_the_run_directory_follow_rank_0_in_refusing_and_in_being_finished(
    arguments, interrupted, tmp_path, on_ranks
):
    for rank in range(2):
        (tmp_path / f"machine{rank}").mkdir()
    (tmp_path / "runs").rename(tmp_path / "machine0" / "runs")
    arguments = [*arguments, "run_name=half"]
    on_ranks(2, start_on_a_machine, tmp_path, [*arguments, "model.pool=max"])
    ends = [(tmp_path / f"machine{rank}" / "end").read_text() for rank in range(2)]
    assert ends[0] == ends[1]
    assert 'other values of model.pool (not given -> "max")' in ends[0]
    (tmp_path / "machine0" / "runs" / "half" / "result.json").write_text("{}")
    config = tmp_path / "machine0" / "runs" / "half" / "config.yaml"
    config.write_text(config.read_text().replace("max_duration: 4ba", "max_duration: 2ep"))
    on_ranks(2, start_on_a_machine, tmp_path, arguments)
    assert [(tmp_path / f"machine{rank}" / "end").read_text() for rank in range(2)] == ["0", "0"]


def test_finished_training_whose_log_is_lost_is_completed(arguments, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "runs", tmp_path / "runs", symlinks=True)
    for name in ("result.json", "metrics.jsonl"):
        (tmp_path / "runs" / "uninterrupted" / name).unlink()
    run(tmp_path, *arguments, "run_name=uninterrupted")
    assert (tmp_path / "runs" / "uninterrupted" / "result.json").exists()


# SIGTERM


def terminate_before(step: int):
    """A batch_start that sends SIGTERM to its own process before a step."""

    def batch_start(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return batch_start


def run_with_errors(errors: Connection, environment: dict, arguments: list, folder: Path) -> None:
    os.dup2(errors.fileno(), 2)
    os.environ |= environment
    run_stage(pretrain, arguments, folder)


def test_sigterm_ends_a_rank_that_waits_for_another_that_never_comes(arguments, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": address[0],
        "MASTER_PORT": str(address[1]),
    }
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=run_with_errors, args=(theirs, environment, arguments, tmp_path)
    )
    process.start()
    theirs.close()
    with open(ours.fileno(), closefd=False) as printed:
        waits = any("waiting for all ranks to start" in line for line in printed)
    process.terminate()
    try:
        process.join(60)
        assert waits and process.exitcode == -signal.SIGTERM
    finally:
        process.kill()


def test_sigterm_writes_a_checkpoint_at_the_end_of_the_step_and_has_its_own_exit_code(
    arguments, uninterrupted, tmp_path, monkeypatch
):
    arguments = [*arguments, "run_name=run", "checkpoints.interval=2ep"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "batch_start", terminate_before(5))
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *arguments)
    assert end.value.code == STOPPED
    assert os.readlink(tmp_path / "runs" / "run" / "checkpoints" / LATEST) == "ep1-ba5.pt"
    run(tmp_path, *arguments)
    assert same(weights(tmp_path, "run"), weights(uninterrupted, "uninterrupted"))
    assert losses(tmp_path, "run") == losses(uninterrupted, "uninterrupted")


@pytest.fixture(scope="module")
def measured(demo, tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments and folder of a run with EMA whose k-NN is measured after each of two epochs."""
    arguments = [
        *small(demo),
        "schedule.t_max=2ep",
        "data.num_workers=0",
        "callbacks.KNN.every=1",
        EMA,
    ]
    folder = tmp_path_factory.mktemp("measured")
    run(folder, *arguments, "run_name=uninterrupted", "checkpoints={interval: 1ba, keep: 9}")
    return arguments, folder


@pytest.mark.parametrize("name", ["ep1-ba3.pt", "ep2-ba6.pt"])
def test_sigterm_during_a_knn_measurement_stops_it_and_the_next_launch_repeats_it(
    measured, tmp_path, monkeypatch, name
):
    """Meanwhile, EMA's averages stand in the place of the weights."""
    arguments, folder = measured
    theirs = folder / "runs" / "uninterrupted"
    ours = tmp_path / "runs" / "run"
    measure = KNN.measure

    def terminated(self: KNN, label: str, state, logger) -> None:
        if state.timestamp.batch.value == checkpoint_step(name):
            os.kill(os.getpid(), signal.SIGTERM)
        measure(self, label, state, logger)

    arguments = [*arguments, "run_name=run", "checkpoints.interval=9ep"]
    with monkeypatch.context() as patch:
        patch.setattr(KNN, "measure", terminated)
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *arguments)
    assert end.value.code == STOPPED
    assert os.readlink(ours / "checkpoints" / LATEST) == name
    at_that_step = next((theirs / "checkpoints").glob(f"*-ba{checkpoint_step(name)}.pt"))
    found = read_checkpoint(str(ours / "checkpoints" / name))
    assert same(found, read_checkpoint(str(at_that_step)))
    run(tmp_path, *arguments)
    assert same(weights(tmp_path, "run"), weights(folder, "uninterrupted"))
    assert losses(tmp_path, "run") == losses(folder, "uninterrupted")
    results = [json.loads((path / "result.json").read_text()) for path in (ours, theirs)]
    assert results[0]["knn/trained"] == results[1]["knn/trained"]


def test_knn_accuracy_of_a_run_with_ema_is_that_of_the_averages(measured):
    arguments, folder = measured
    config = load_config(arguments, PretrainConfig)
    net = ViCMAE(**config["model"])
    load_pretrained(net, str(folder / "runs" / "uninterrupted"))
    block = config["callbacks"]["KNN"]
    embedded = []
    for key in ("bank", "queries"):
        views = EvalViews(block[key], 32, crop_pct=1.0)
        embedded.append(embed(net.encoder, views))
    result = json.loads((folder / "runs" / "uninterrupted" / "result.json").read_text())
    assert result["knn/trained"] == knn_accuracy(*embedded)


@pytest.mark.parametrize(
    ("first", "second", "exits"),
    [
        (signal.SIGINT, signal.SIGINT, [130]),
        (signal.SIGTERM, signal.SIGINT, [130]),
        (signal.SIGINT, signal.SIGTERM, []),  # which Composer's launcher adds to a Ctrl-C
    ],
)
def test_ctrl_c_after_another_signal_ends_the_run_at_once(
    tmp_path, monkeypatch, first, second, exits
):
    codes = []
    monkeypatch.setattr(training.checkpoints.os, "_exit", codes.append)
    # The bucket of the tests is a child of this process.
    monkeypatch.setattr(training.checkpoints, "kill_workers", lambda: None)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.handle_signal(first, None)
    assert (checkpoints.stop_reason, codes) == (first.name, [])
    checkpoints.handle_signal(second, None)
    assert codes == exits


def terminate_rank_1(rank: int, folder: str, arguments: list[str]) -> None:
    if rank == 1:
        Checkpoints.batch_start = terminate_before(2)
    with pytest.raises(SystemExit) as end:
        run_rank(rank, folder, arguments)
    assert end.value.code == STOPPED


def test_sigterm_to_one_rank_stops_all_and_another_number_of_ranks_resumes(
    arguments, uninterrupted, tmp_path, on_ranks
):
    arguments = [*arguments, "run_name=run"]
    on_ranks(2, terminate_rank_1, str(tmp_path), arguments)
    assert os.readlink(tmp_path / "runs" / "run" / "checkpoints" / LATEST) == "ep0-ba2.pt"
    run(tmp_path, *arguments, "trainer.max_duration=4ba")
    unfinish(tmp_path, "run")
    on_ranks(4, run_rank, str(tmp_path), arguments)
    expected = losses(uninterrupted, "uninterrupted")
    assert losses(tmp_path, "run") == pytest.approx(expected, rel=1e-6)


# Losses and weights that are not finite


@pytest.mark.parametrize(
    "message", ["the loss is nan at step 5", "a weight is not finite after step 5"]
)
def test_run_ends_without_a_checkpoint_at_a_loss_or_weight_that_is_not_finite(
    arguments, tmp_path, monkeypatch, message
):
    batch_end = Checkpoints.batch_end

    def broken(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == 5:
            if "loss" in message:
                state.total_loss_dict["loss/train/total"] = float("nan")
            else:
                state.model.projector[0].weight.data[0, 0] = float("inf")
        batch_end(self, state, logger)

    monkeypatch.setattr(Checkpoints, "batch_end", broken)
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, *arguments, "run_name=run")
    assert os.readlink(tmp_path / "runs" / "run" / "checkpoints" / LATEST) == "ep1-ba4.pt"


# Buckets


def names_in(bucket) -> set[str]:
    return {entry["Key"] for entry in bucket.list_objects_v2(Bucket="bkt")["Contents"]}


def test_run_resumes_from_the_bucket_if_the_disk_is_lost(
    arguments, uninterrupted, bucket, tmp_path
):
    arguments = [*arguments, "run_name=run", "checkpoints.bucket=s3://bkt/runs"]
    run(tmp_path, *arguments, "trainer.max_duration=4ba")
    assert names_in(bucket) == {"runs/run/ep0-ba3.pt", "runs/run/ep1-ba4.pt"}
    shutil.rmtree(tmp_path / "runs")
    bucket.put_object(Bucket="bkt", Key="runs/run/ep1-ba5.pt", Body=b"corrupt")
    run(tmp_path, *arguments)
    assert same(weights(tmp_path, "run"), weights(uninterrupted, "uninterrupted"))
    key = "loss/train/total"  # of the last two steps: the others' log was on the disk
    found = [line[key] for line in read_log(tmp_path, "run") if key in line]
    assert found == losses(uninterrupted, "uninterrupted")[4:]


def test_bucket_that_cannot_be_reached_does_not_end_a_run_but_keeps_it_from_starting(
    arguments, uninterrupted, bucket, tmp_path, monkeypatch, capfd
):
    def upload(storage: Storage, path: Path, name: str) -> None:
        raise OSError(5, "Could not connect", storage.at(name))

    arguments = [*arguments, "run_name=run"]
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "upload", upload)
        run(tmp_path, *arguments, "checkpoints.bucket=s3://bkt/runs")
    message = "checkpoints.bucket: [Errno 5] Could not connect: 's3://bkt/runs/run/ep1-ba6.pt'; "
    assert message in capfd.readouterr().out
    assert same(weights(tmp_path, "run"), weights(uninterrupted, "uninterrupted"))
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    s3_client.cache_clear()
    with pytest.raises(SystemExit, match="s3://bkt/other"):
        run(tmp_path, *arguments, "run_name=other", "checkpoints.bucket=s3://bkt")


def test_bucket_that_is_no_s3_address_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints.bucket=gs://b: must be an s3:// address"):
        Checkpoints(tmp_path / "run", bucket="gs://b")


# FSDP


def become_a_machine(rank: int, folder: Path) -> None:
    """Make a rank the only one of its machine, with this working folder."""
    os.chdir(folder)
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": str(rank)}


def save_and_lose_disks(rank: int, folder: str, shared: bool) -> None:
    """Save three sharded checkpoints, each rank on a machine of its own; lose the disks; look."""
    become_a_machine(rank, Path(folder) if shared else Path(folder, f"machine{rank}"))
    directory = Path("runs", "run")
    checkpoints = Checkpoints(directory, interval="1ba", bucket="s3://bkt/all")
    trainer = train_sharded(directory, [checkpoints], steps=3)
    expected = whole_weights(trainer)
    for _ in range(2):
        newest = Checkpoints(directory, bucket="s3://bkt/all").newest()
        assert newest == directory / "checkpoints" / "ep0-ba3"
        assert same(read_checkpoint(str(newest)), expected)
        assert os.readlink(newest.parent / LATEST) == "ep0-ba3"
        left = {path.name for path in newest.parent.iterdir()}
        assert left - {"ep0-ba2"} == {"ep0-ba3", LATEST}
        dist.barrier()
        shutil.rmtree("runs", ignore_errors=True)
        dist.barrier()


@pytest.mark.parametrize("shared", [True, False])
def test_shards_of_machines_with_a_shared_folder_or_their_own_are_found_on_disks_and_in_the_bucket(
    bucket, tmp_path, on_ranks, shared
):
    for rank in (0, 1):
        (tmp_path / f"machine{rank}").mkdir()
    on_ranks(2, save_and_lose_disks, str(tmp_path), shared)
    shards = ("__0_0.distcp", "__1_0.distcp")
    files = (".metadata", *shards)
    parts = (*files, *(f"{file}.sha256" for file in files))
    expected = {f"all/run/ep0-ba{step}/{part}" for step in (2, 3) for part in parts}
    assert names_in(bucket) == expected


def look_without_a_bucket(rank: int, folder: str) -> None:
    """On two machines with their own folders and no bucket, each holds only its own shards."""
    become_a_machine(rank, Path(folder, f"machine{rank}"))
    directory = Path("runs", "run")
    train_sharded(directory, [Checkpoints(directory, interval="1ba")], steps=1)
    with pytest.raises(ValueError, match=r"ep0-ba1 is corrupt .*no checkpoint is left"):
        Checkpoints(directory).newest()


def test_shards_on_machines_without_a_shared_folder_or_bucket_are_an_error_on_every_rank(
    tmp_path, on_ranks
):
    for rank in (0, 1):
        (tmp_path / f"machine{rank}").mkdir()
    on_ranks(2, look_without_a_bucket, str(tmp_path))


def look_for_a_file_of_rank_0(rank: int, folder: str) -> None:
    become_a_machine(rank, Path(folder, f"machine{rank}"))
    checkpoints = Checkpoints(Path("runs", "run"))
    path = checkpoints.folder / "ep0-ba1.pt"
    if rank == 0:
        path.parent.mkdir(parents=True)
        torch.save({"state": {}}, path)
        assert checkpoints.newest() == path
        return
    with pytest.raises(ValueError, match=r"on another machine, .*/ep0-ba1\.pt is missing; copy it"):
        checkpoints.newest()
    dist.barrier(checkpoints.group)  # for which rank 0 waits


def test_resume_is_refused_on_a_machine_that_cannot_get_the_checkpoint(tmp_path, on_ranks):
    for rank in (0, 1):
        (tmp_path / f"machine{rank}").mkdir()
    on_ranks(2, look_for_a_file_of_rank_0, str(tmp_path))


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("algorithms={EMA: {}}", "algorithms.EMA: cannot resume with"),
        (str(ROOT / "yamls" / "methods" / "moco_v2.yaml"), "method MoCoV2: does not work with"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_before_training(arguments, tmp_path, argument, complaint):
    with pytest.raises(SystemExit, match=complaint):
        run(tmp_path, *arguments, argument, FSDP.format("sharded"), "run_name=run")


@pytest.fixture(scope="module")
def one_rank(arguments, tmp_path_factory) -> Path:
    """The folder of a run on one rank, with clipping.

    Clipping would show gradients that are multiplied by the number of ranks.
    """
    folder = tmp_path_factory.mktemp("fsdp")
    run(folder, *arguments, CLIPPING, "run_name=one")
    return folder


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_fsdp_on_two_ranks_trains_as_one_rank_and_resumes_to_the_bit(
    arguments, uninterrupted, one_rank, on_ranks, kind
):
    folder, resumed = one_rank, f"{kind}_resumed"
    fsdp = [*arguments, CLIPPING, FSDP.format(kind)]
    on_ranks(2, run_rank, str(folder), [*fsdp, f"run_name={kind}"])
    start = [*fsdp, f"run_name={resumed}"]
    on_ranks(2, run_rank, str(folder), [*start, "trainer.max_duration=4ba"])
    unfinish(folder, resumed)
    on_ranks(2, run_rank_with_speed, str(folder), start)  # a callback not in the checkpoint

    assert same(weights(folder, kind), weights(folder, resumed))
    assert losses(folder, kind) == pytest.approx(losses(folder, "one"), rel=1e-6)
    unclipped = losses(uninterrupted, "uninterrupted")
    assert losses(folder, kind) != pytest.approx(unclipped, rel=1e-6)
    results = {}
    for name in (kind, "one"):
        text = (folder / "runs" / name / "result.json").read_text()
        results[name] = json.loads(text)["gradient_norm"]
    assert results["one"] > 0.02
    assert results[kind] == pytest.approx(results["one"], rel=1e-4)
    ours, theirs = weights(folder, kind), weights(folder, "one")
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5) for name in theirs)
    newest = (folder / "runs" / kind / "checkpoints" / LATEST).resolve()
    assert newest.is_dir() == (kind == "sharded")
    if newest.is_dir():
        check_checkpoint(newest)
        for part in ("__1_0.distcp", ".metadata"):
            flip_a_bit(newest / part)
            with pytest.raises(ValueError, match=f"{part} in it has another checksum"):
                check_checkpoint(newest)
            flip_a_bit(newest / part)
        for sum_file in newest.glob("*.sha256"):  # earlier versions wrote none
            sum_file.unlink()
        check_checkpoint(newest)


# EMA


def test_averages_of_ema_are_those_computed_from_all_checkpoints_of_the_run(arguments, tmp_path):
    run(tmp_path, *arguments, "run_name=run", "checkpoints.keep=9", EMA)
    folder = tmp_path / "runs" / "run" / "checkpoints"
    paths = sorted(folder.glob("ep*.pt"), key=lambda path: checkpoint_step(path.name))
    name = "encoder.blocks.0.attn.qkv.weight"
    trained = [torch.load(path, weights_only=False)["state"]["model"][name] for path in paths]
    smoothing = 2 ** (-1 / 2)  # half-life: 2 steps
    average = read_checkpoint(str(paths[0]))[name]
    for value in trained[1:]:
        average = smoothing * average + (1 - smoothing) * value
    torch.testing.assert_close(read_checkpoint(str(paths[-1]))[name], average)
    assert not torch.allclose(trained[-1], average)


def test_averages_of_ema_are_continued_on_another_number_of_ranks(arguments, tmp_path, on_ranks):
    arguments = [*arguments, EMA]
    run(tmp_path, *arguments, "run_name=one")
    run(tmp_path, *arguments, "run_name=both", "trainer.max_duration=3ba")
    unfinish(tmp_path, "both")
    on_ranks(2, run_rank, str(tmp_path), [*arguments, "run_name=both", "trainer.max_duration=5ba"])
    unfinish(tmp_path, "both")
    run(tmp_path, *arguments, "run_name=both")
    one, both = weights(tmp_path, "one"), weights(tmp_path, "both")
    assert one.keys() == both.keys()
    # Biases without a gradient follow rounding errors, so weights are compared.
    compared = [name for name in one if name.endswith("proj.weight")]
    assert len(compared) > 3
    assert all(torch.allclose(one[name], both[name], rtol=1e-5, atol=1e-6) for name in compared)
