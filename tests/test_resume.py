"""What a run does when it is ended, damaged, moved or changed, and comes back; its checkpoints; FSDP."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch
import torch.distributed.checkpoint
from checkpoints import LATEST, STOPPED, Checkpoints, read_checkpoint, step_of
from composer.utils import dist
from config import load_config
from conftest import ROOT, run_stage, small
from places import Storage, s3_client
from probes import KNN, embed, knn_accuracy
from views import EvalViews

import pretrain
from model import ViCMAE, load_pretrained


def run(folder: Path, *arguments: str) -> None:
    run_stage(pretrain, list(arguments), folder)


def run_rank(rank: int, folder: str, arguments: list[str]) -> None:
    run_stage(pretrain, arguments, Path(folder))


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(str(folder / "runs" / name / "checkpoints" / LATEST))


def losses(folder: Path, name: str) -> list[float]:
    lines = [
        json.loads(line)
        for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]
    totals = {
        line["step"]: line["loss/train/total"] for line in lines if "loss/train/total" in line
    }
    assert list(totals) == list(range(1, len(totals) + 1))
    return list(totals.values())


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


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
def whole(arguments, tmp_path_factory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *arguments, "run_name=whole")
    return folder


@pytest.fixture(scope="module")
def half(arguments, tmp_path_factory) -> Path:
    """The folder of a run that was stopped after four of the six steps."""
    folder = tmp_path_factory.mktemp("half")
    run(folder, *arguments, "run_name=half", "trainer.max_duration=4ba")
    (folder / "runs" / "half" / "result.json").unlink()
    return folder


@pytest.fixture
def stopped(half, tmp_path) -> Path:
    """A copy of that run's checkpoints' folder."""
    shutil.copytree(half / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "half" / "checkpoints"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_or_missing_newest_checkpoint_gives_way_to_the_one_before(
    arguments, whole, stopped, tmp_path, capfd, damage
):
    damage(stopped / "ep1-ba4.pt")
    run(tmp_path, *arguments, "run_name=half")
    said = capfd.readouterr().out
    assert f"going on from {Path('runs/half/checkpoints/ep0-ba3.pt')}" in said
    if damage is not Path.unlink:
        assert (
            "ep1-ba4.pt is damaged" in said and len(list(stopped.glob("ep1-ba4.pt.damaged.*"))) == 1
        )
    assert same(weights(tmp_path, "half"), weights(whole, "whole"))
    assert losses(tmp_path, "half") == losses(whole, "whole")


@pytest.mark.parametrize("target", [None, "nowhere.pt"])
def test_missing_or_dangling_link_is_mended(arguments, whole, stopped, tmp_path, target):
    (stopped / LATEST).unlink()
    if target:
        (stopped / LATEST).symlink_to(target)
    (stopped / "aside").mkdir()
    (stopped / "aside" / "ep1-ba5.pt").write_bytes(
        b"half-written"
    )  # as a kill within a write leaves it
    run(tmp_path, *arguments, "run_name=half")
    assert os.readlink(stopped / LATEST) == "ep1-ba6.pt"
    assert same(weights(tmp_path, "half"), weights(whole, "whole"))


def test_run_whose_checkpoints_are_all_damaged_or_lost_never_begins_anew_by_itself(
    arguments, stopped, tmp_path
):
    for path in stopped.glob("ep*.pt"):
        cut(path)
    with pytest.raises(
        SystemExit,
        match=r"ba4.pt is damaged .*; .*ba3.pt is damaged .*no checkpoint is left. Delete",
    ):
        run(tmp_path, *arguments, "run_name=half")
    with pytest.raises(
        SystemExit,
        match=r"latest-rank0.pt points to ep1-ba4.pt, which is not there; no checkpoint is left",
    ):
        run(tmp_path, *arguments, "run_name=half")


def test_newest_two_checkpoints_and_the_milestones_are_kept_over_all_lives(arguments, tmp_path):
    arguments = [
        *arguments,
        "run_name=run",
        "checkpoints.milestone=2",
        "trainer.max_duration=5ep",
        "schedule.t_max=5ep",
    ]
    run(tmp_path, *arguments, "trainer.max_duration=8ba")
    (tmp_path / "runs" / "run" / "result.json").unlink()
    run(tmp_path, *arguments)
    left = sorted(path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir())
    assert left == ["ep2-ba7.pt", "ep4-ba13.pt", "ep4-ba14.pt", "ep4-ba15.pt", LATEST]


def test_changed_configuration_is_refused_by_its_keys_unless_asked_for(
    arguments, stopped, tmp_path
):
    changed = [*arguments, "run_name=half", "optimizer.base_lr=1e-4", "model.temperature=0.3"]
    with pytest.raises(
        SystemExit, match=r"another model.temperature, optimizer.base_lr; .* allow_changes=true"
    ):
        run(tmp_path, *changed)
    for depth in (2, 4):
        with pytest.raises(SystemExit, match=r"is of a model with another encoder.blocks"):
            run(tmp_path, *arguments, "run_name=half", f"model.depth={depth}", "allow_changes=true")
    run(tmp_path, *changed, "allow_changes=true")
    assert len(losses(tmp_path, "half")) == 6


def signal_at(step: int):
    def batch_start(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return batch_start


def begin_on_a_machine(rank: int, folder: Path, arguments: list[str]) -> None:
    os.chdir(folder / f"machine{rank}")
    try:
        pretrain.start_run(load_config(arguments, pretrain.pretrain))
    except (ValueError, SystemExit) as end:
        Path("end").write_text(str(end))


def test_machines_without_the_runs_folder_follow_the_first_in_refusing_and_in_being_finished(
    arguments, stopped, tmp_path, on_ranks
):
    for rank in range(2):
        (tmp_path / f"machine{rank}").mkdir()
    (tmp_path / "runs").rename(tmp_path / "machine0" / "runs")
    arguments = [*arguments, "run_name=half", "allow_changes=false"]
    on_ranks(2, begin_on_a_machine, tmp_path, [*arguments, "model.pool=max"])
    ends = [(tmp_path / f"machine{rank}" / "end").read_text() for rank in range(2)]
    assert ends[0] == ends[1] and "was begun with another model.pool" in ends[0]
    (tmp_path / "machine0" / "runs" / "half" / "result.json").write_text("{}")
    on_ranks(2, begin_on_a_machine, tmp_path, arguments)
    assert [(tmp_path / f"machine{rank}" / "end").read_text() for rank in range(2)] == ["0", "0"]


def test_sigterm_ends_a_rank_that_waits_for_one_that_never_comes(arguments, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = free.getsockname()
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    alone |= {"MASTER_ADDR": place[0], "MASTER_PORT": str(place[1])}
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | alone) as process:
        while process.poll() is None:  # until it listens for the other
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(place):
                break
        process.terminate()
        try:
            assert process.wait(60) == -signal.SIGTERM
        finally:
            process.kill()


def test_sigterm_has_a_checkpoint_written_at_once_and_its_own_exit_code(
    arguments, whole, tmp_path, monkeypatch
):
    arguments = [*arguments, "run_name=run", "checkpoints.interval=2ep"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "batch_start", signal_at(5))
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *arguments)
    assert end.value.code == STOPPED
    assert os.readlink(tmp_path / "runs" / "run" / "checkpoints" / LATEST) == "ep1-ba5.pt"
    run(tmp_path, *arguments)
    assert same(weights(tmp_path, "run"), weights(whole, "whole"))
    assert losses(tmp_path, "run") == losses(whole, "whole")


@pytest.fixture(scope="module")
def measured(demo, tmp_path_factory) -> tuple[list[str], Path]:
    """The arguments, and the folder, of a run with EMA whose k-NN is measured after each of its two epochs."""
    ema = "algorithms={EMA: {half_life: 2ba, update_interval: 1ba}}"
    arguments = [
        *small(demo),
        "schedule.t_max=2ep",
        "data.num_workers=0",
        "callbacks.KNN.every=1",
        ema,
    ]
    folder = tmp_path_factory.mktemp("measured")
    run(folder, *arguments, "run_name=whole", "checkpoints={interval: 1ba, keep: 9}")
    return arguments, folder


@pytest.mark.parametrize("name", ["ep1-ba3.pt", "ep2-ba6.pt"])
def test_sigterm_in_a_knn_measurement_is_heeded_at_once_and_the_last_is_made_up_for(
    measured, tmp_path, monkeypatch, name
):
    """While it is made, EMA's averages stand in the place of the weights."""
    arguments, whole = measured
    whole, measure = whole / "runs" / "whole", KNN.measure

    def signalled(self: KNN, what: str, state, logger) -> None:
        if state.timestamp.batch.value == step_of(name):
            os.kill(os.getpid(), signal.SIGTERM)
        measure(self, what, state, logger)

    arguments = [*arguments, "run_name=run", "checkpoints.interval=9ep"]
    with monkeypatch.context() as patch:
        patch.setattr(KNN, "measure", signalled)
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *arguments)
    assert end.value.code == STOPPED
    ours = tmp_path / "runs" / "run"
    assert os.readlink(ours / "checkpoints" / LATEST) == name
    theirs = next((whole / "checkpoints").glob(f"*-ba{step_of(name)}.pt"))
    assert same(read_checkpoint(str(ours / "checkpoints" / name)), read_checkpoint(str(theirs)))
    run(tmp_path, *arguments)
    assert same(weights(tmp_path, "run"), weights(whole.parents[1], "whole"))
    assert losses(tmp_path, "run") == losses(whole.parents[1], "whole")
    results = [
        json.loads((one / "result.json").read_text())["knn/trained"] for one in (ours, whole)
    ]
    assert results[0] == results[1]


def test_knn_accuracy_is_that_of_emas_averages(measured):
    """Against that of an encoder that is loaded from the checkpoint."""
    arguments, folder = measured
    config = load_config(arguments, pretrain.pretrain)
    net = ViCMAE(**config["model"])
    load_pretrained(net, str(folder / "runs" / "whole" / "checkpoints" / LATEST))
    views = [
        EvalViews(config["callbacks"]["KNN"][key], 32, crop_pct=1.0) for key in ("bank", "queries")
    ]
    expected = knn_accuracy(*(embed(net.encoder, one) for one in views))
    assert (
        json.loads((folder / "runs" / "whole" / "result.json").read_text())["knn/trained"]
        == expected
    )


def told_one_rank(rank: int, folder: str, arguments: list[str]) -> None:
    if rank == 1:
        Checkpoints.batch_start = signal_at(2)
    with pytest.raises(SystemExit) as end:
        run_rank(rank, folder, arguments)
    assert end.value.code == STOPPED


def test_sigterm_to_one_rank_stops_all_and_other_numbers_of_ranks_go_on_from_there(
    arguments, whole, tmp_path, on_ranks
):
    arguments = [*arguments, "run_name=run"]
    on_ranks(2, told_one_rank, str(tmp_path), arguments)
    assert os.readlink(tmp_path / "runs" / "run" / "checkpoints" / LATEST) == "ep0-ba2.pt"
    run(tmp_path, *arguments, "trainer.max_duration=4ba")
    (tmp_path / "runs" / "run" / "result.json").unlink()
    on_ranks(4, run_rank, str(tmp_path), arguments)
    assert losses(tmp_path, "run") == pytest.approx(losses(whole, "whole"), rel=1e-6)


@pytest.mark.parametrize(
    "broken", ["the loss is nan at step 5", "a weight is not finite after step 5"]
)
def test_number_that_is_not_finite_ends_the_run_by_its_step_and_spoils_no_checkpoint(
    arguments, tmp_path, monkeypatch, broken
):
    def batch_end(self: Checkpoints, state, logger) -> None:
        if state.timestamp.batch.value == 5:
            if "loss" in broken:
                state.total_loss_dict["loss/train/total"] = float("nan")
            else:
                state.model.projector[0].weight.data[0, 0] = float("inf")
        ended(self, state, logger)

    ended = Checkpoints.batch_end
    monkeypatch.setattr(Checkpoints, "batch_end", batch_end)
    with pytest.raises(SystemExit, match=broken):
        run(tmp_path, *arguments, "run_name=run")
    assert os.readlink(tmp_path / "runs" / "run" / "checkpoints" / LATEST) == "ep1-ba4.pt"


def test_run_goes_on_from_the_bucket_when_the_disk_is_gone(arguments, whole, bucket, tmp_path):
    arguments = [*arguments, "run_name=run", "checkpoints.bucket=s3://bkt/runs"]
    run(tmp_path, *arguments, "trainer.max_duration=4ba")
    names = {found["Key"] for found in bucket.list_objects_v2(Bucket="bkt")["Contents"]}
    assert names == {"runs/run/ep0-ba3.pt", "runs/run/ep1-ba4.pt"}
    shutil.rmtree(tmp_path / "runs")
    bucket.put_object(Bucket="bkt", Key="runs/run/ep1-ba5.pt", Body=b"damaged")
    run(tmp_path, *arguments)
    assert same(weights(tmp_path, "run"), weights(whole, "whole"))
    assert losses_from(tmp_path, "run") == losses(whole, "whole")[4:]


def losses_from(folder: Path, name: str) -> list[float]:
    """Of the lines there are: the others went with the disk."""
    lines = [
        json.loads(line)
        for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]
    return [line["loss/train/total"] for line in lines if "loss/train/total" in line]


def test_bucket_that_is_away_does_not_end_a_run_but_keeps_one_from_beginning_anew(
    arguments, whole, bucket, tmp_path, monkeypatch, capfd
):
    arguments = [*arguments, "run_name=run", "checkpoints.bucket=s3://bkt/runs"]
    with monkeypatch.context() as patch:

        def upload(place, path, name):
            raise OSError(5, "Could not connect", place.at(name))

        patch.setattr(Storage, "upload", upload)
        run(tmp_path, *arguments)
    assert (
        "checkpoints.bucket: [Errno 5] Could not connect: 's3://bkt/runs/run/ep1-ba6.pt'; "
        in capfd.readouterr().out
    )
    assert same(weights(tmp_path, "run"), weights(whole, "whole"))
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    s3_client.cache_clear()
    with pytest.raises(SystemExit, match="s3://bkt/other"):
        run(tmp_path, *arguments, "run_name=other", "checkpoints.bucket=s3://bkt")


def save_shards(state, path: str) -> str:
    """What Composer's does for FSDP: each rank writes its own, the first the table of contents."""
    rank, folder = dist.get_global_rank(), path.removesuffix(".pt")
    torch.distributed.checkpoint.save({f"of{rank}": torch.full((4,), rank)}, checkpoint_id=folder)
    return f"{folder}/__{rank}_0.distcp"


def save_and_come_back(rank: int, folder: str, shared: bool) -> None:
    """Each rank is a machine. They save three checkpoints and look for the newest; their disks go, and they look again."""
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(folder if shared else Path(folder, f"machine{rank}"))
    checkpoints.save_checkpoint = save_shards
    saving = Checkpoints(Path("runs", "run"), bucket="s3://bkt/all")
    for step in (1, 2, 3):
        now = SimpleNamespace(epoch=SimpleNamespace(value=1), batch=SimpleNamespace(value=step))
        saving.save(SimpleNamespace(timestamp=now, fsdp_sharded_state_dict_enabled=True))
    saving.copying.shutdown()
    dist.barrier()
    for _ in range(2):
        newest = Checkpoints(Path("runs", "run"), bucket="s3://bkt/all").newest()
        state = {f"of{other}": torch.zeros(4, dtype=torch.int64) for other in (0, 1)}
        torch.distributed.checkpoint.load(state, checkpoint_id=newest, no_dist=True)
        assert newest.name == "ep1-ba3" and [value.tolist() for value in state.values()] == [
            [0] * 4,
            [1] * 4,
        ]
        left = {path.name for path in newest.parent.iterdir()}
        assert (
            left - {"ep1-ba2"} == {"ep1-ba3", LATEST}
            and os.readlink(newest.parent / LATEST) == "ep1-ba3"
        )
        dist.barrier()
        shutil.rmtree("runs", ignore_errors=True)
        dist.barrier()


@pytest.mark.parametrize("shared", [True, False])
def test_shards_of_machines_that_share_a_folder_or_do_not_come_back_from_disks_and_bucket(
    bucket, tmp_path, on_ranks, shared
):
    for rank in (0, 1):
        (tmp_path / f"machine{rank}").mkdir()
    on_ranks(2, save_and_come_back, str(tmp_path), shared)
    names = {found["Key"] for found in bucket.list_objects_v2(Bucket="bkt")["Contents"]}
    parts = (".metadata", "__0_0.distcp", "__1_0.distcp")
    assert names == {f"all/run/ep1-ba{step}/{part}" for step in (2, 3) for part in parts}


def test_finished_training_whose_log_is_lost_is_brought_to_its_end(arguments, whole, tmp_path):
    shutil.copytree(whole / "runs", tmp_path / "runs", symlinks=True)
    for name in ("result.json", "metrics.jsonl"):
        (tmp_path / "runs" / "whole" / name).unlink()
    run(tmp_path, *arguments, "run_name=whole")
    assert (tmp_path / "runs" / "whole" / "result.json").exists()


def test_changed_settings_of_the_optimiser_that_are_asked_for_take_effect(
    arguments, stopped, tmp_path
):
    run(
        *(tmp_path, *arguments, "run_name=half", "allow_changes=true", "callbacks={LRMonitor: {}}"),
        *("optimizer.base_lr=1e-6", "optimizer.weight_decay=0.5", "trainer.max_duration=5ba"),
    )
    after = torch.load(stopped / "ep1-ba5.pt", weights_only=False)["state"]["optimizers"]["AdamW"][
        "param_groups"
    ]
    assert sorted(group["weight_decay"] for group in after) == [0.0, 0.5]
    new = 1e-6 * 40 / 256
    assert all(group["initial_lr"] == pytest.approx(new) for group in after)
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "half" / "metrics.jsonl").read_text().splitlines()
    ]
    used = [
        line["lr-AdamW/group0"] for line in lines if line["step"] == 5 and "lr-AdamW/group0" in line
    ]
    assert used == [pytest.approx(new * 4 / 6)]  # of six steps of warm-up, as without the change
    changed = (weights(tmp_path, "half"), read_checkpoint(str(stopped / "ep1-ba4.pt")))
    assert all(
        torch.allclose(*(one[name] for one in changed), rtol=1e-6, atol=1e-6)
        for name in changed[0]
        if "encoder" in name
    )


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("algorithms={EMA: {}}", "EMA cannot be resumed"),
        ("model.contrast=moco", "contrast moco does not work"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_before_training(arguments, tmp_path, block, complaint):
    with pytest.raises(SystemExit, match=complaint):
        run(tmp_path, *arguments, FSDP.format("sharded"), block, "run_name=run")


FSDP = (
    "trainer.parallelism_config={{fsdp: {{state_dict_type: {}, activation_checkpointing: true}}}}"
)


@pytest.fixture(scope="module")
def sharded(arguments, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_fsdp_on_two_ranks_trains_as_one_rank_and_resumes_to_the_bit(
    arguments, whole, sharded, on_ranks, kind
):
    """With clipping, whose effect would show gradients that are multiplied by the number of ranks."""
    clip = "algorithms={GradientClipping: {clipping_type: norm, clipping_threshold: 0.01}}"
    arguments = [*arguments, clip]
    fsdp = [*arguments, FSDP.format(kind), "callbacks=null"]
    if not (sharded / "runs" / "one").exists():
        run(sharded, *arguments, "run_name=one")
    on_ranks(2, run_rank, str(sharded), [*fsdp, f"run_name={kind}"])
    on_ranks(
        2, run_rank, str(sharded), [*fsdp, f"run_name={kind}_stopped", "trainer.max_duration=4ba"]
    )
    (sharded / "runs" / f"{kind}_stopped" / "result.json").unlink()
    monitored = [
        *fsdp,
        f"run_name={kind}_stopped",
        "callbacks={SpeedMonitor: {}}",
    ]  # one that the checkpoint has not
    on_ranks(2, run_rank, str(sharded), monitored)
    assert losses(sharded, kind) == pytest.approx(losses(sharded, "one"), rel=1e-6)
    ours, theirs = (
        json.loads((sharded / "runs" / name / "result.json").read_text()) for name in (kind, "one")
    )
    assert (
        ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        and theirs["gradient_norm"] > 0.02
    )
    assert losses(sharded, kind) != pytest.approx(losses(whole, "whole"), rel=1e-6)
    ours, theirs = weights(sharded, kind), weights(sharded, f"{kind}_stopped")
    assert same(ours, theirs)
    one = weights(sharded, "one")
    assert all(torch.allclose(ours[name], one[name], rtol=1e-3, atol=2e-5) for name in one)
    path = (sharded / "runs" / kind / "checkpoints" / LATEST).resolve()
    assert path.is_dir() == (kind == "sharded")


def global_of(module: str, name: str) -> bytes:
    """A pickle that looks a name up in a module and calls it to make a file."""
    strings = [
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, "touch was_run")
    ]
    return b"\x80\x04" + strings[0] + strings[1] + b"\x93" + strings[2] + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "getattr"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "os.system"),
    ],
)
def test_malicious_table_of_contents_of_shards_is_refused_and_not_run(
    tmp_path, monkeypatch, module, name
):
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    Path("shards", ".metadata").write_bytes(global_of(module, name))
    with pytest.raises(
        ValueError,
        match=rf"shards is no checkpoint that can be read safely: {module}.{name} is not allowed",
    ):
        read_checkpoint("shards")
    assert not Path("was_run").exists()
    if module == "os":  # the pickle itself would run
        pickle.loads(global_of(module, name))
        assert Path("was_run").exists()


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_checkpoint_that_would_run_code_is_set_aside_and_not_run(
    arguments, stopped, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "half" / "checkpoints"
    newest = max(folder.glob("ep*.pt"), key=lambda path: step_of(path.name))
    torch.save(torch.load(newest, weights_only=False) | {"more": Malicious()}, newest)
    run(tmp_path, *arguments, "run_name=half")
    assert f"{newest.name} is damaged (it is damaged, or holds more than" in capfd.readouterr().out
    torch.distributed.checkpoint.save(
        {"state.model.x": torch.ones(2), "state.more": Malicious()}, checkpoint_id="shards"
    )
    torch.distributed.checkpoint.save(
        {"state.model.x": torch.ones(2), "state.more": {"step": 3}}, checkpoint_id="plain"
    )
    checkpoints.check_checkpoint(Path("plain"))
    with pytest.raises(ValueError, match="shards is damaged"):
        checkpoints.check_checkpoint(Path("shards"))
    assert not Path("was_run").exists()


def test_averages_of_ema_are_what_is_read(arguments, tmp_path):
    """Against the average computed from all checkpoints of the run."""
    half_life = 2
    run(
        *(tmp_path, *arguments, "run_name=run", "checkpoints.keep=9"),
        f"algorithms={{EMA: {{half_life: {half_life}ba, update_interval: 1ba}}}}",
    )
    folder, smoothing = tmp_path / "runs" / "run" / "checkpoints", 2 ** (-1 / half_life)
    steps = sorted(folder.glob("ep*.pt"), key=lambda path: step_of(path.name))
    name = "encoder.blocks.0.attn.qkv.weight"
    trained = [torch.load(path, weights_only=False)["state"]["model"][name] for path in steps]
    average = read_checkpoint(str(steps[0]))[name]
    for value in trained[1:]:
        average = smoothing * average + (1 - smoothing) * value
    torch.testing.assert_close(read_checkpoint(str(steps[-1]))[name], average)
    assert not torch.allclose(trained[-1], average)


def test_averages_go_on_with_another_number_of_ranks(arguments, tmp_path, on_ranks):
    arguments = [*arguments, "algorithms={EMA: {half_life: 2ba, update_interval: 1ba}}"]
    run(tmp_path, *arguments, "run_name=one")
    run(tmp_path, *arguments, "run_name=both", "trainer.max_duration=3ba")
    (tmp_path / "runs" / "both" / "result.json").unlink()
    on_ranks(2, run_rank, str(tmp_path), [*arguments, "run_name=both", "trainer.max_duration=5ba"])
    (tmp_path / "runs" / "both" / "result.json").unlink()
    run(tmp_path, *arguments, "run_name=both")
    one, both = weights(tmp_path, "one"), weights(tmp_path, "both")
    assert one.keys() == both.keys()
    trained = [
        name for name in one if name.endswith("proj.weight")
    ]  # biases without a gradient follow rounding
    assert (
        all(torch.allclose(one[name], both[name], rtol=1e-5, atol=1e-6) for name in trained)
        and len(trained) > 3
    )


def test_three_kills_leave_no_trace(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tests" / "stress_resume.py"),
        "--kills",
        "3",
        "--seed",
        "0",
        "--epochs",
        "4",
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=400, start_new_session=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["right"]
