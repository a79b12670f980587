"""The comparison of methods, and the table of finished runs beside the paper's numbers."""

import atexit
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, read_result, run_stage, small

import finetune
from benchmarks import compare
from training.weights import read_checkpoint

TUNED = f"comparison.finetune={{x: [{ROOT}"
METHODS = ROOT / "yamls" / "methods"
SPEED = "throughput/batches_per_sec"


def run_compare(arguments: list[str], folder: Path) -> None:
    run_stage(SimpleNamespace(__name__="compare", main=compare.main), arguments, folder)


def error_of_compare(arguments: list[str], folder: Path) -> str:
    return error_of(SimpleNamespace(__name__="compare", main=compare.main), arguments, folder)


class ThisProcess(Executor):
    """An executor that runs each task at once, which saves the start of an interpreter."""

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future


def main_replaced(main) -> dict[str, tuple]:
    """Return compare.STAGES with another main function."""
    return {name: (main, config) for name, (_, config) in compare.STAGES.items()}


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "TIMED", 2)
        yield


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    monkeypatch.setattr(compare, "training_processes", lambda jobs: ThisProcess())


@pytest.fixture
def trains_nothing(monkeypatch, in_this_process) -> None:
    monkeypatch.setattr(compare, "STAGES", main_replaced(None))
    monkeypatch.setattr(compare, "measure_probe", None)


def command_of(demo: Path, *words: object) -> str:
    """Return a row of comparison.methods in YAML: a command and its overrides."""
    base, *settings = small(demo)
    quoted = [f"'{setting}'" for setting in settings[:3]]
    return ", ".join([str(ROOT / "pretrain.py"), base, *quoted, *map(str, words)])


def arguments_of(demo: Path) -> list[str]:
    """Return a comparison of two methods with two seeds that takes seconds."""
    sets = f"bank: [{demo}/train_images], queries: [{demo}/test_images], labels_per_class: [3]"
    vicmae, mae = command_of(demo), command_of(demo, METHODS / "mae.yaml")
    tuning = [ROOT / "finetune.py", ROOT / "yamls" / "finetune_demo.yaml"]
    tuning += [ROOT / "yamls" / "finetune_stills.yaml", "trainer.max_duration=1ba"]
    tuning += [f"'data.streams=[{{path: {demo}/train_images}}]'", "schedule.t_warmup=0ba"]
    tuning += [f"'eval_data.paths=[{demo}/test_images]'", "trainer.eval_interval=1ba"]
    tuning += ["optimizer.base_lr=1e-12"]  # the weights stay as they are
    return [
        "comparison.to=compare.md",
        "comparison.seconds=0.3",
        "comparison.seeds=2",
        f"comparison.methods={{vicmae: [{vicmae}], mae: [{mae}]}}",
        f"comparison.stills={{{sets}}}",
        f"comparison.clips={{{sets}}}",
        f"comparison.finetune={{'stills, tuned': [{', '.join(map(str, tuning))}]}}",
        "comparison.planes=[['stills, knn', 'stills, tuned']]",
    ]


@pytest.fixture(scope="module")
def compared(demo, tmp_path_factory) -> Path:
    """The folder of a finished comparison."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "training_processes", lambda jobs: ThisProcess())
        run_compare(arguments_of(demo), folder)
    return folder


def table_of(folder: Path) -> tuple[str, list[list[str]]]:
    """Return the first line of compare.md, and the cells of its rows under the ruler."""
    first, _, *lines = (folder / "compare.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]
    return first, [lines[0].strip("| ").split(" | "), *rows]


def test_table_has_mean_and_deviation_of_every_method_and_of_random_weights(compared):
    budget, (columns, *rows) = table_of(compared)
    assert f"0.3 s of training steps each, 2 seeds, {os.cpu_count()} cores" in budget
    stills = ["stills, knn", "stills, linear_3", "stills, tuned"]
    assert columns == ["steps", *stills, "clips, knn", "clips, linear_3"]
    assert [row[0] for row in rows] == ["random weights", "vicmae", "mae"]
    assert (compared / "compare.png").stat().st_size > 0
    assert (compared / "compare_plane.png").stat().st_size > 0
    for name, row in (("vicmae", rows[1]), ("mae", rows[2])):
        runs = sorted((compared / "runs").glob(f"compare_{name}_[0-9]*_[01]"))
        assert len(runs) == 2
        knn = []
        for run in runs:
            assert read_result(compared, run.name)["step"] == int(row[1])
            (cached,) = run.glob("compare-*.json")  # stills and clips are the same data here
            knn.append(100 * json.loads(cached.read_text())["knn"])
        assert row[2] == row[5] == f"{np.mean(knn):.1f} ± {np.std(knn, ddof=1):.1f}"


def test_fine_tunings_start_from_the_encoders_of_the_methods(compared):
    _, (_, *rows) = table_of(compared)
    for name, row in zip(("random", "vicmae", "mae"), rows, strict=True):
        suffix = "" if name == "random" else f"_{row[1]}"
        accuracies = []
        for seed in (0, 1):
            run = compared / "runs" / f"compare_{name}{suffix}_{seed}"
            tuned = f"{run}_stills_tuned"
            accuracies.append(100 * read_result(compared, Path(tuned).name)["metrics/eval/top1"])
            source = compared / "runs" / f"compare_vicmae_{rows[1][1]}_{seed}"
            before, after = (
                read_checkpoint(str(source if name == "random" else run)),
                read_checkpoint(tuned),
            )
            weight = "encoder.blocks.0.attn.qkv.weight"
            assert torch.allclose(before[weight], after[weight], atol=1e-5) is (name != "random")
        assert row[4] == f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}"


def test_fine_tuning_of_tubevit_keeps_its_tubes_and_pooling_and_learns_a_new_head(demo, tmp_path):
    command = ["finetune.py", str(METHODS / "tubevit.yaml"), "model.head_init_std=0.5"]
    net = compare.config_of(command).new_model([10, 10])
    net.class_names = [list("abcdefghij")] * 2
    torch.save(net.state_dict(), tmp_path / "trained.pt")
    tuning = [str(ROOT / "yamls" / name) for name in ("finetune_demo.yaml", "finetune_stills.yaml")]
    tuning += [f"data.streams=[{{path: {demo}/train_images}}]", "schedule.t_warmup=0ba"]
    tuning += [f"eval_data.paths=[{demo}/test_images]", "data.num_workers=0"]
    tuning += ["trainer.max_duration=1ba", "trainer.eval_interval=1ba", "optimizer.base_lr=1e-12"]
    source = compare.encoder_arguments(command, str(tmp_path / "trained.pt"))
    run_stage(finetune, [*tuning, *source, "run_name=tuned"], tmp_path)
    before, after = net.state_dict(), read_checkpoint(str(tmp_path / "runs" / "tuned"))
    kept = [name for name in before if name.startswith(("encoder.", "neck."))]
    assert {"encoder.patch_embed.tubes.2.weight", "neck.latent"} < set(kept)
    for name in kept:
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=0)
    assert "head.1.weight" not in after
    assert not torch.allclose(after["head.0.weight"], before["head.0.weight"], atol=0.1)


def test_finished_comparison_trains_and_measures_nothing_again(compared, demo, trains_nothing):
    before = (compared / "compare.md").read_text()
    run_compare(arguments_of(demo), compared)
    assert (compared / "compare.md").read_text() == before


def test_other_probes_are_measured_anew(compared, demo, trains_nothing, monkeypatch):
    monkeypatch.setattr(compare, "measure_probe", lambda *_, **block: {"knn": block["k"] / 100})
    other = ["comparison.clips.k=5", "comparison.stills.k=7", "comparison.to=other.md"]
    run_compare([*arguments_of(demo), *other], compared)
    table = (compared / "other.md").read_text()
    assert table.count("| 7.0 ± 0.0 |") == table.count("| 5.0 ± 0.0 |") == 3


@pytest.mark.parametrize(
    ("method", "words", "complaint"),
    [
        ("vicmae", ["model.pool=max"], "compare_vicmae_speed was made with other values of model."),
        ("vicmae", ["trainer.precision=fp32"], "was made with other values of trainer; delete it"),
        (
            "last",
            ["model.pol=max"],
            "model.pol=max: is not a key of this block; did you mean pool?",
        ),
        ("last", ["model.patch_size=5"], "img_size"),
    ],
)
def test_method_with_other_settings_or_a_mistake_is_refused_before_any_training(
    compared, demo, trains_nothing, method, words, complaint
):
    change = f"comparison.methods.{method}=[{command_of(demo, *words)}]"
    assert complaint in error_of_compare([*arguments_of(demo), change], compared)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("comparison.to=no/x.md", "comparison.to=no/x.md: its folder does not exist"),
        ("comparison.methods.last=[train.py, x.yaml]", "must begin with pretrain.py or finetune"),
        ("comparison.methods.last=[]", "must begin with pretrain.py or finetune.py"),
        ("comparison.seconds=0", "comparison.seconds=0: "),
        (f"{TUNED}/pretrain.py, {ROOT}/yamls/demo.yaml]}}", "pretrain.py must be finetune.py"),
        (f"{TUNED}/finetune.py, {ROOT}/yamls/finetune_demo.yaml, sed=1]}}", "did you mean seed?"),
        ("comparison.sceonds=1", "did you mean seconds?"),
        ("comparison.planes=[[steps, 'clips, knn']]", "must be two of the columns stills, knn; "),
    ],
)
def test_mistake_in_a_comparison_is_named(compared, demo, trains_nothing, change, complaint):
    assert complaint in error_of_compare([*arguments_of(demo), change], compared)


def test_comparison_waits_for_the_run_that_another_comparison_left_behind(compared, demo):
    with open(compared / "runs" / "comparison.lock", "w") as left_behind:
        fcntl.flock(left_behind, fcntl.LOCK_SH)
        assert "runs/comparison.lock: held by" in error_of_compare(arguments_of(demo), compared)


def test_each_task_has_a_process_with_its_share_of_the_cores_and_of_the_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # whence the server imports the stages
    with compare.only_comparison(), compare.training_processes(os.cpu_count()) as executor:
        pids = {executor.submit(os.getpid).result() for _ in range(2)}
        assert len(pids | {os.getpid()}) == 3
        assert executor.submit(torch.get_num_threads).result() == 1
        locks = executor.submit(Path.read_text, Path("/proc/locks")).result()
        executor.submit(atexit.register, os.mkdir, "ended").result()
    assert (tmp_path / "ended").is_dir()  # as the removal of shared memory, it is called
    number = str((tmp_path / "runs" / "comparison.lock").stat().st_ino)
    held = [line for line in locks.splitlines() if f":{number} " in line]
    assert len(held) >= 2 and all("FLOCK" in line and "READ" in line for line in held)


def test_process_without_a_task_ends_when_the_comparison_is_killed():
    fork = get_context("fork")
    reader, writer = fork.Pipe(duplex=False)

    def without_a_task():
        Thread(target=compare.end_with_parent, daemon=True).start()
        writer.send("started")
        signal.pause()

    def comparison():
        fork.Process(target=without_a_task).start()
        signal.pause()

    process = fork.Process(target=comparison)
    process.start()
    writer.close()  # now the forked processes alone hold this end of the pipe
    assert reader.recv() == "started"
    process.kill()
    assert reader.poll(60)
    with pytest.raises(EOFError):
        reader.recv()


def test_last_line_of_a_run_that_fails_is_the_error(demo, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr(compare, "STAGES", main_replaced(lambda: sys.exit("out of memory")))
    with pytest.raises(SystemExit, match="failed: out of memory"):
        run_compare(arguments_of(demo), tmp_path)


def test_comparison_of_another_prefix_has_runs_of_its_own(
    demo, tmp_path, monkeypatch, in_this_process
):
    names = []
    monkeypatch.setattr(compare, "train", lambda run, _: names.append(run) or {SPEED: 10.0})
    monkeypatch.setattr(
        compare, "measure", lambda *arguments: names.append(arguments[2]) or {"stills, knn": 0.5}
    )
    run_compare([*arguments_of(demo), "comparison.prefix=other", "comparison.planes=[]"], tmp_path)
    expected = ["vicmae_speed", "mae_speed"]
    expected += [f"{name}_{seed}" for name in ("random", "vicmae_3", "mae_3") for seed in (0, 1)]
    assert names == [f"other_{name}" for name in expected]


def test_table_has_the_papers_numbers_and_ours_and_says_which_are_not_run(tmp_path):
    for name, file, values in (
        ("a", "eval.json", {"top1": 0.8512, "knn": 0.25}),
        ("b", "result.json", {"metrics/eval/top1": 0.5}),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).write_text(json.dumps(values))
    (tmp_path / "table.yaml").write_text("""
table:
  to: results.md
  rows:
    - name: first
      runs: {IN1K: a, K400: nowhere}
      paper: {IN1K: 86.0, K400: 80.0}
    - name: second
      runs: {K400: b, k-NN: "a:knn"}
""")
    run_compare(["table.yaml"], tmp_path)
    assert (tmp_path / "results.md").read_text().splitlines() == [
        "|  | IN1K: paper / ours | K400: paper / ours | k-NN: paper / ours |",
        "| --- | --- | --- | --- |",
        "| first | 86.0 / 85.1 (-0.9) | 80.0 / not run |  |",
        "| second |  | - / 50.0 | - / 25.0 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["table={to: x.md, rows: []}"], "table.rows=[]: "),
        (["table={to: x.md}"], "table.rows is missing"),
        (["comparison={to: x.md, methods: {}}"], "comparison.methods={}: "),
        (["table=null"], "give a block comparison or table"),
    ],
)
def test_empty_table_or_comparison_is_refused(tmp_path, arguments, complaint):
    assert complaint in error_of_compare(arguments, tmp_path)
