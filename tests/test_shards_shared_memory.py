"""Shared memory of killed processes is removed at the next start; a living job keeps its own."""

import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
from types import SimpleNamespace

import pytest
from conftest import fork_server
from streaming import MDSWriter, Stream, StreamingDataset

import shards.shared_memory
from shards.shared_memory import claim, one_job_at_a_time, remove_leftovers


@pytest.fixture
def remote(bucket, tmp_path, monkeypatch):
    """A data set in a bucket, and the only one whose shared memory is looked at."""
    monkeypatch.setattr(shards.shared_memory, "gettempdir", lambda: str(tmp_path))
    with MDSWriter(out="s3://bkt/set", columns={"x": "int"}) as writer:
        writer.write({"x": 1})
    return "s3://bkt/set"


def open_dataset(remote: str, cache: str) -> StreamingDataset:
    with one_job_at_a_time():
        dataset = StreamingDataset(streams=[Stream(remote=remote, local=cache)], batch_size=1)
        dataset.owner = claim(dataset)
    return dataset


def open_and_die(remote: str, cache: str, folder: str, environment: dict, channel) -> None:
    os.environ.update(environment)  # the server from which processes fork may be older
    shards.shared_memory.gettempdir = lambda: folder
    # The tracker of shared memory would remove the files. It dies as well if a machine is lost.
    multiprocessing.resource_tracker._resource_tracker._fd = os.open(os.devnull, os.O_WRONLY)
    dataset = open_dataset(remote, cache)
    channel.send(dataset._shm_prefix_int)
    os.kill(os.getpid(), signal.SIGKILL)


def files_of(number: int) -> list[str]:
    return [path.name for path in shards.shared_memory.SHARED_MEMORY.glob(f"{number:06}_*")]


def test_a_launch_after_a_kill_can_use_the_same_cache_and_leaves_nothing_behind(remote, tmp_path):
    cache = str(tmp_path / "cache")
    ours, theirs = multiprocessing.Pipe()
    # Not forked from this process, whose threads may hold locks.
    server = fork_server()
    arguments = (remote, cache, str(tmp_path), dict(os.environ), theirs)
    process = server.Process(target=open_and_die, args=arguments)
    process.start()
    number = ours.recv()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # Without the removal, Streaming would refuse the cache ("Reused local directory").
    dataset = open_dataset(remote, cache)
    assert dataset[0]["x"] == 1
    if dataset._shm_prefix_int != number:  # a process beside this one has taken the number
        assert f"{number:06}_locals" not in files_of(number)


def test_two_nodes_of_a_run_with_the_same_shared_memory_are_refused_with_the_remedy():
    expected = "/dev/shm/000252_locals: used by another node of this run; give each node .* its own"
    with pytest.raises(OSError, match=expected), one_job_at_a_time():
        raise FileExistsError(17, "File exists", "/000252_locals")  # as Streaming does


def test_the_shared_memory_of_a_living_process_is_not_removed(remote, tmp_path):
    dataset = open_dataset(remote, str(tmp_path / "cache"))
    before = files_of(dataset._shm_prefix_int)
    assert f"{dataset._shm_prefix_int:06}_owner" in before
    remove_leftovers()
    assert files_of(dataset._shm_prefix_int) == before


def test_a_number_is_claimed_although_an_earlier_owner_still_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shared_memory, "SHARED_MEMORY", tmp_path)
    dataset = SimpleNamespace(_shm_prefix_int=7)
    first = claim(dataset)
    second = claim(dataset)  # would wait for ever for the lock of the first
    assert not first.closed and not second.closed
    remove_leftovers()
    assert (tmp_path / "000007_owner").exists()
    second.close()
    remove_leftovers()
    assert not (tmp_path / "000007_owner").exists()
