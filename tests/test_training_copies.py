"""training/copies.py: copies of checkpoints in a bucket, over ranks and machines, and at a stop."""

import threading
from pathlib import Path

import pytest
import torch
from conftest import run_stage, signal_at, small
from test_training_checkpoints import become_a_machine
from test_training_safe_load import train_sharded

import pretrain
import training.checkpoints
import training.run
from shards.storage import Storage
from training.checkpoints import STOPPED, Checkpoints, check_checkpoint
from training.copies import METADATA

BUCKET = "s3://bkt/runs"


@pytest.fixture(scope="module")
def arguments(demo) -> list[str]:
    return [*small(demo), "callbacks=null", "data.num_workers=0", "run_name=run"]


def names_in(folder: str) -> set[str]:
    return set(Storage(folder).names(hidden=True))


# One rank


def exit_by_exception(code: int) -> None:
    raise SystemExit(code)


def test_stopped_run_waits_for_its_copies_no_longer_than_the_limit_and_says_what_is_missing(
    arguments, bucket, tmp_path, monkeypatch, capfd
):
    unblocked = threading.Event()
    monkeypatch.setattr(Storage, "upload", lambda *_: unblocked.wait(60))
    monkeypatch.setattr(Checkpoints, "batch_start", signal_at(2))
    monkeypatch.setattr(training.run.os, "_exit", exit_by_exception)
    settings = [f"checkpoints.bucket={BUCKET}", "checkpoints.upload_limit=0.01"]
    with pytest.raises(SystemExit) as end:
        run_stage(pretrain, [*arguments, *settings], tmp_path)
    unblocked.set()
    assert end.value.code == STOPPED
    stopped, missing = capfd.readouterr().out.splitlines()[-2:]
    assert "saved in runs/run/checkpoints/ep0-ba2.pt" in stopped
    lacks = f"{BUCKET}/run lacks ep0-ba2.pt after checkpoints.upload_limit=0.01 seconds"
    assert missing == f"{lacks}; runs/run/checkpoints has them"
    check_checkpoint(tmp_path / "runs/run/checkpoints/ep0-ba2.pt")


def test_stopped_run_whose_copies_are_made_in_time_says_nothing_of_them(
    arguments, bucket, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(Checkpoints, "batch_start", signal_at(2))
    with pytest.raises(SystemExit) as end:
        run_stage(pretrain, [*arguments, f"checkpoints.bucket={BUCKET}"], tmp_path)
    assert end.value.code == STOPPED
    assert names_in(f"{BUCKET}/run") == {"ep0-ba2.pt"}
    assert "lacks" not in capfd.readouterr().out


def test_disk_is_pruned_although_the_bucket_cannot_be_reached(
    arguments, bucket, tmp_path, monkeypatch
):
    def upload(storage: Storage, path: Path, name: str) -> None:
        raise OSError(5, "Could not connect", storage.at(name))

    monkeypatch.setattr(Storage, "upload", upload)
    settings = ["checkpoints.interval=1ba", f"checkpoints.bucket={BUCKET}"]
    run_stage(pretrain, [*arguments, *settings, "trainer.max_duration=5ba"], tmp_path)
    left = {path.name for path in (tmp_path / "runs/run/checkpoints").glob("ep*")}
    assert left == {"ep1-ba4.pt", "ep1-ba5.pt"}


# Two machines


def become_a_machine_in(folder: Path, rank: int) -> None:
    folder.mkdir(exist_ok=True)
    become_a_machine(rank, folder)


def copy_with_rank_1_behind(rank: int, folder: str) -> None:
    """Save a sharded checkpoint; rank 1 copies only once rank 0 has copied its own shard."""
    become_a_machine_in(Path(folder, str(rank)), rank)
    upload = Storage.upload

    def ordered(storage: Storage, path: Path, name: str) -> None:
        if name.endswith(METADATA):
            shards = {f"ep0-ba1/__{other}_0.distcp" for other in (0, 1)}
            assert shards <= set(storage.names())
        while rank == 1 and not storage.has("ep0-ba1/__0_0.distcp"):
            pass
        upload(storage, path, name)

    Storage.upload = ordered
    checkpoints = Checkpoints(Path("runs/run"), interval="1ba", bucket=BUCKET)
    train_sharded(Path("runs/run"), [checkpoints], steps=1)
    assert checkpoints.copies.submitted["ep0-ba1"].result()


def test_metadata_are_copied_after_the_shards_of_all_ranks(bucket, tmp_path, on_ranks):
    on_ranks(2, copy_with_rank_1_behind, str(tmp_path))
    assert f"ep0-ba1/{METADATA}" in names_in(f"{BUCKET}/run")


def fail_on_rank_1_at_step_3(rank: int, folder: str) -> None:
    become_a_machine_in(Path(folder, str(rank)), rank)
    upload = Storage.upload

    def failing(storage: Storage, path: Path, name: str) -> None:
        if rank == 1 and "ba3" in name:
            raise OSError(5, "Could not connect", storage.at(name))
        upload(storage, path, name)

    Storage.upload = failing
    checkpoints = Checkpoints(Path("runs/run"), interval="1ba", bucket=BUCKET)
    train_sharded(Path("runs/run"), [checkpoints], steps=3)
    assert checkpoints.copies.finish() == ["ep0-ba3"]
    Storage.upload = upload
    newest = Checkpoints(Path("runs/run"), bucket=BUCKET).newest()
    assert newest.name == "ep0-ba2"


def test_checkpoint_of_which_a_rank_could_not_copy_its_part_does_not_count_in_the_bucket(
    bucket, tmp_path, on_ranks
):
    on_ranks(2, fail_on_rank_1_at_step_3, str(tmp_path))
    names = names_in(f"{BUCKET}/run")
    complete = {name.split("/")[0] for name in names if name.endswith(METADATA)}
    assert complete == {"ep0-ba1", "ep0-ba2"}  # nothing was pruned either


def find_on_another_machine(rank: int, folder: str) -> None:
    become_a_machine_in(Path(folder, str(rank)), rank)
    checkpoints = Checkpoints(Path("runs/run"), bucket=BUCKET)
    if rank == 0:
        checkpoints.folder.mkdir(parents=True)
        torch.save({"step": torch.tensor(7)}, checkpoints.folder / "ep1-ba7.pt")
    assert torch.load(checkpoints.newest())["step"] == 7


def test_checkpoint_that_a_kill_kept_from_the_bucket_reaches_the_other_machines(
    bucket, tmp_path, on_ranks
):
    on_ranks(2, find_on_another_machine, str(tmp_path))
    assert names_in(f"{BUCKET}/run") == {"ep1-ba7.pt"}


def look_for_a_shared_folder(rank: int, folder: str, own: bool, sharded: bool) -> None:
    training.checkpoints.appears = Path.exists  # without the time that NFS may take
    become_a_machine_in(Path(folder, str(rank) if own else "shared"), rank)
    checkpoints = Checkpoints(Path("runs/run"))
    with open(Path(folder, f"out{rank}"), "w") as out:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.stdout", out)
                checkpoints.check_shared_folder(sharded)
        except ValueError as error:
            out.write(f"ValueError: {error}")
    assert list(checkpoints.folder.glob(".shared*")) == []


@pytest.mark.parametrize(("own", "sharded"), [(False, True), (True, True), (True, False)])
def test_machines_without_a_shared_folder_or_bucket_are_found_before_the_training(
    tmp_path, on_ranks, own, sharded
):
    on_ranks(2, look_for_a_shared_folder, str(tmp_path), own, sharded)
    printed = [(tmp_path / f"out{rank}").read_text() for rank in (0, 1)]
    problem = "runs/run/checkpoints: the machine of rank 1 has another folder"
    remedy = "give the machines a shared folder, or checkpoints.bucket"
    refused = f"ValueError: {problem} than rank 0, for sharded checkpoints; {remedy}"
    warned = f"{problem}; checkpoints are on the machine of rank 0 alone. To resume, {remedy}\n"
    expected = ["", ""]
    if own:
        expected = [refused, refused] if sharded else [warned, ""]
    assert printed == expected
