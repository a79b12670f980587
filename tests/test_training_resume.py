"""What a launch is compared with if its run exists."""

import json

import pytest

from training.resume import changed_settings, check_data_sets, is_finished, read_config


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_corrupt_record_of_a_run_is_named(tmp_path, content):
    for name in ("data_sets.json", "result.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"/data_sets\.json: corrupt .* delete it"):
        check_data_sets(tmp_path, [])
    with pytest.raises(ValueError, match=r"/result\.json: corrupt .* delete it"):
        is_finished(tmp_path, "2ep", "20ba")


def test_settings_that_do_not_decide_the_result_may_change(tmp_path):
    before = {"seed": 0, "trainer": {"device": "cpu"}, "data": {"streams": [], "num_workers": 1}}
    (tmp_path / "config.yaml").write_text(json.dumps(before | {"algorithms": None}))
    free = {"trainer": {"device": "gpu"}, "callbacks": {"KNN": {}}, "make_demo": "data"}
    now = before | free | {"data": {"streams": (), "num_workers": 8}}
    now["data"] |= {"download": {"retry": 4}, "prefetch_factor": 4, "shuffle_block_size": None}
    now["model"] = {"chunk_size": 2}
    assert changed_settings(read_config(tmp_path), now) == []
    now |= {"seed": 1, "algorithms": {"EMA": {}}, "augment": {"video": {"hue": 0.1}}}
    changed = changed_settings(read_config(tmp_path), now)
    assert changed == [
        "algorithms.EMA (not given -> {})",
        "augment.video.hue (not given -> 0.1)",
        "seed (0 -> 1)",
    ]
    (tmp_path / "config.yaml").write_text("seed: [")
    with pytest.raises(ValueError, match=r"config\.yaml: corrupt"):
        read_config(tmp_path)
    assert changed_settings(read_config(tmp_path / "new"), now) == []


def test_duration_in_another_unit_is_compared_with_what_a_finished_run_has_done(tmp_path):
    (tmp_path / "result.json").write_text('{"step": 30, "epoch": 10}')
    for before, now, finished in [
        ("10ep", "30ba", True),
        ("10ep", "31ba", False),
        ("30ba", "10ep", True),
        ("30ba", "11ep", False),
        ("10ep", "9ep", True),
        ("10ep", "5sp", False),  # unknown, so that the Trainer decides
    ]:
        assert is_finished(tmp_path, before, now) == finished, (before, now)
    (tmp_path / "result.json").write_text("{}")  # of a run whose log was lost
    assert not is_finished(tmp_path, "10ep", "30ba")
