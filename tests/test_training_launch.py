"""training/launch.py: Composer's launcher waits for the time of --grace."""

from datetime import timedelta

import pytest
from composer.cli import launcher

import training.launch


def test_grace_period_is_set_and_all_other_arguments_are_those_of_composer(monkeypatch):
    command = ["-n", "8", "pretrain.py", "yamls/vitl.yaml", "seed=1"]
    seen = []

    def main() -> int:
        parsed = launcher._parse_args()
        seen.append((parsed.nproc, parsed.training_script, parsed.training_script_args))
        seen.append(launcher.CLEANUP_TIMEOUT)
        return 75

    monkeypatch.setattr(launcher, "main", main)
    monkeypatch.setattr(launcher, "CLEANUP_TIMEOUT", timedelta(seconds=30))
    monkeypatch.setattr("sys.argv", ["launch.py", "--grace", "110", *command])
    with pytest.raises(SystemExit) as end:
        training.launch.main()
    assert end.value.code == 75
    assert seen == [(8, "pretrain.py", ["yamls/vitl.yaml", "seed=1"]), timedelta(seconds=110)]
