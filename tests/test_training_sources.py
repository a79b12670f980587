"""Files and arguments: how they are read and merged, and errors that name them in one line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_training_config import Training, error_of

from training.config import load_config
from training.sources import one_line_errors, read_sources


def test_files_merge_left_to_right_then_overrides(write):
    write("b.yaml", "seed: 7\nmodel: {depth: 5}\n")
    config = load_config(["a.yaml", "b.yaml", "model.depth=6"], Training)
    assert config["seed"] == 7
    assert config["model"] == {"depth": 6, "mask_ratio": 0.75}


def test_mistake_in_a_file_is_named_with_file_key_and_value(write):
    write("b.yaml", "model: {mask_ratio: 1.2}\n")
    write("c.yaml", "model: {mask_ration: 0.5}\n")
    write("d.yaml", "model: {depth: [1, 2]}\n")
    write("e.yaml", "method: quue\n")
    assert error_of("a.yaml", "b.yaml") == "b.yaml: model.mask_ratio=1.2: must be less than 1"
    assert error_of("a.yaml", "c.yaml") == (
        "c.yaml: model.mask_ration is not a key of this block; did you mean mask_ratio?"
    )
    assert error_of("a.yaml", "e.yaml").startswith("e.yaml: method=quue: must be one of net,")
    assert error_of("a.yaml", "d.yaml", "seed=1").startswith("d.yaml: model.depth=[1, 2]: must be")


def test_last_file_that_sets_a_key_is_the_one_named(write):
    write("b.yaml", "model: {depth: 0}\n")
    write("c.yaml", "seed: 1\n")
    assert error_of("b.yaml", "a.yaml", "b.yaml", "c.yaml").startswith("b.yaml: model.depth=0")
    assert load_config(["b.yaml", "a.yaml", "c.yaml"], Training)["model"]["depth"] == 2


def test_key_of_another_stage_is_answered_with_the_name_of_that_stage(write):
    expected = "predict=x: is a key of eval.py; run that with this file"
    assert error_of("a.yaml", "predict=x") == expected
    assert "did you mean" in error_of("a.yaml", "model.predict=x")  # not at the top level


@pytest.mark.parametrize(
    "text", ["model: [unclosed", "- a list", "3", "seed: ${nowhere}", "\x00", "? {a: 1}\n: 2"]
)
def test_file_that_is_no_configuration_is_named(write, text):
    write("b.yaml", text)
    assert "b.yaml" in error_of("b.yaml")
    assert "b.yaml" in error_of("a.yaml", "b.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("data:\n\tworkers: 1\n", "found character that cannot start any token"),
        ("seed: ${oc.env:NO_SUCH_VARIABLE}\n", "'NO_SUCH_VARIABLE' not found"),
        ("seed: *nowhere\n", "found undefined alias"),
        ("seed: 1\n---\nseed: 2\n", "expected a single document"),
    ],
)
def test_fault_of_a_file_is_explained_in_one_line(write, text, reason):
    write("b.yaml", text)
    error = error_of("a.yaml", "b.yaml")
    assert "b.yaml" in error and reason in error and "\n" not in error


def test_numbers_of_a_file_are_read_as_written_and_anchors_and_empty_files_work(write):
    write("empty.yaml", "")
    write("b.yaml", "model: &sizes {mask_ratio: 5e-1}\nschedule: {t_warmup: 1ba, alpha_f: 1e-3}\n")
    config = load_config(["a.yaml", "empty.yaml", "b.yaml"], Training)
    assert (config["model"]["mask_ratio"], config["schedule"]["alpha_f"]) == (0.5, 0.001)
    assert error_of("empty.yaml").startswith("empty.yaml: ")


@pytest.mark.parametrize(("value", "number"), [("010", 8), ("007", 7), ("1:30", 90)])
def test_number_that_yaml_reads_in_base_8_or_60_is_refused_as_number_and_as_text(
    write, value, number
):
    for key in ("run_name", "data.batch_size"):
        expected = f"{key}={value}: YAML reads {value} as {number}; give {number}, or for text, put"
        assert error_of("a.yaml", f"{key}={value}").startswith(expected)
    error = error_of("a.yaml", f"data.streams=[{{path: {value}}}]")
    assert f"YAML reads {value} as {number}" in error
    write("b.yaml", f"run_name: {value}\n")
    assert error_of("a.yaml", "b.yaml").startswith(f"b.yaml: YAML reads {value} as {number}; give")
    write("b.yaml", f"checkpoint: '{value}'\nseed: {number}  # {value}\n")
    config = load_config(["a.yaml", "b.yaml"], Training)
    assert (config["checkpoint"], config["seed"]) == (value, number)


@pytest.mark.parametrize(
    "path",
    [
        "runs/a=b",
        "a b",
        "a, b",
        "a[0]",
        "C:\\x\\y",
        "a/~b",
        "a#b",
        '"a #b"',
        '"[x].pt"',
        "2024-01-15",
    ],
)
def test_path_in_an_argument_is_taken_as_it_is_written(write, path):
    config = load_config(["a.yaml", f"checkpoint={path}"], Training)
    assert config["checkpoint"] == path.strip('"')
    config = load_config(["a.yaml", f"data.streams=[{{path: '{path}'}}]"], Training)
    assert config["data"]["streams"][0]["path"] == path


@pytest.mark.parametrize(
    "value", ["a #b", "[x].pt", "{x}.pt", "*x", "&x y", "!x y", "@x", "%x", "'x"]
)
def test_argument_that_yaml_reads_otherwise_is_answered_with_how_to_quote_it(write, value):
    error = error_of("a.yaml", f"checkpoint={value}")
    assert error.startswith(f"checkpoint={value}: ") and "double quotes" in error


def test_argument_without_a_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"seed=: has no value; for none, give seed=null"):
        read_sources(["seed="])


def test_empty_command_line_is_refused():
    assert error_of().startswith("give at least one file")


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_error_that_a_user_can_mend_ends_the_program_in_one_line(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["folder/pretrain.py"])
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error("a\n  b")
    assert end.value.code == "pretrain.py: a b"


def test_sigterm_of_the_launcher_does_not_change_the_exit_code_of_an_error():
    code = [
        "import atexit, os, signal",
        "from training.sources import one_line_errors",
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)",
        "with one_line_errors():",
        "    raise ValueError('wrong')",
    ]
    command = [sys.executable, "-c", "\n".join(code)]
    environment = os.environ | {"WORLD_SIZE": "2"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "-c: wrong\n"
