"""The lines that say what a start is doing."""

import threading

import pytest

from training import announce


def test_slow_task_is_announced_while_it_runs_and_a_quick_one_is_not(monkeypatch):
    announced, said = threading.Event(), []

    def record(task: str) -> None:
        said.append(task)
        announced.set()

    monkeypatch.setattr(announce, "announce", record)
    with announce.say_if_slow("quick"):
        (timer,) = [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
    assert timer.finished.is_set()
    monkeypatch.setattr(announce, "SLOW", 0.0)
    with announce.say_if_slow("slow"):
        assert announced.wait(60)
    assert said == ["slow"]


@pytest.mark.parametrize(("rank", "printed"), [("0", "loading ...\n"), ("1", "")])
def test_rank_0_alone_announces(rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    announce.announce("loading")
    assert capsys.readouterr() == ("", printed)
