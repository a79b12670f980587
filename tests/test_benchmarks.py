"""Every benchmark in a tiny form: it runs to its end, and prints the lines that it promises.

benchmarks/compare.py has tests of its own, in test_benchmarks_compare.py.
"""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer.utils import dist
from conftest import ROOT, fork_server, run_stage, small
from omegaconf import OmegaConf
from torch.autograd import DeviceType

import data_prep
import eval as evaluation
import finetune
import pretrain
from benchmarks import (
    bench_algorithms,
    bench_data,
    bench_demo,
    bench_gpu,
    bench_knn,
    bench_train,
    bench_watching,
    stress_resume,
)
from benchmarks.gpu_step import WINDOW, Case, Meter, idle_share, measure_ours, read_trace
from pretrain import PretrainConfig
from training.config import load_config

STAGES = {"pretrain.py": pretrain, "finetune.py": finetune, "eval.py": evaluation}


def lines_of(capfd) -> list[dict]:
    """Return the lines of JSON that were printed."""
    printed = capfd.readouterr().out.splitlines()
    return [json.loads(line) for line in printed if line.startswith("{")]


def run_main(benchmark, monkeypatch, *arguments: str) -> int:
    """Call a benchmark's main in this process, and return its exit code."""
    monkeypatch.setattr("sys.argv", [benchmark.__name__, *arguments])
    try:
        benchmark.main()
    except SystemExit as end:
        return int(end.code)
    return 0


def run_here(command: list[str], cwd: Path | None = None, **settings) -> SimpleNamespace:
    """Do what subprocess.run does with a stage, without starting an interpreter."""
    stage = STAGES[Path(command[1]).name]
    run_stage(stage, command[2:], Path(cwd or os.getcwd()))
    return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def small_demo(demo, tmp_path, monkeypatch) -> Path:
    """A file like yamls/demo.yaml, for 12 garments of a class; whoever makes them, copies them."""
    config = OmegaConf.create(load_config(small(demo), PretrainConfig))
    config.make_demo = None
    config.data.num_workers = 0
    file = tmp_path / "small.yaml"
    file.write_text(OmegaConf.to_yaml(config))

    def copy_demo(out: str, **settings) -> None:
        shutil.copytree(demo, out, dirs_exist_ok=True)

    monkeypatch.setattr(data_prep, "make_demo", copy_demo)
    return file


def lead_session(command: list[str], cwd: str, environment: dict, output: str, ready) -> None:
    """Be Composer's launcher: start a stage in one process for each rank, and wait for all."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a program that was launched
    ready.send(True)
    ready.close()
    ranks, script = int(command[4]), Path(command[5]).name
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    sys.path.append(environment["PYTHONPATH"])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
                os.environ["NODE_RANK"] = "0"
                run_stage(STAGES[script], command[6:], Path(cwd))
                code = 0
            except SystemExit as end:
                code = end.code
                if isinstance(code, str):
                    print(code)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code if isinstance(code, int) else 1)
        children.append(child)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(child, signal.SIGTERM) for child in children])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(max(codes, key=abs) % 256)


class WarmPopen:
    """subprocess.Popen for Composer's launcher and a stage, forked where the libraries are loaded.

    Starting interpreters would take most of the time of this file.
    """

    def __init__(self, command: list[str], cwd, env, stdout, **settings):
        context = fork_server()
        ours, theirs = context.Pipe()
        changed = {key: value for key, value in env.items() if os.environ.get(key) != value}
        arguments = (command, str(cwd), changed, stdout.name, theirs)
        self.process = context.Process(target=lead_session, args=arguments)
        self.process.start()
        ours.recv()  # From now on, its number is the number of its session.
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@pytest.fixture
def warm(monkeypatch) -> None:
    """Replace subprocess.Popen in the benchmarks that launch runs."""
    names = ("STDOUT", "TimeoutExpired")
    warm = SimpleNamespace(Popen=WarmPopen, **{name: getattr(subprocess, name) for name in names})
    monkeypatch.setattr(bench_train, "subprocess", warm)
    monkeypatch.setattr(stress_resume, "subprocess", warm)


# bench_gpu.py


def test_bench_gpu_has_every_way_to_run_a_step_and_begins_with_the_simplest():
    ways = [(case.compiled, case.checkpointing, case.fsdp) for case in bench_gpu.cases_of("L", 128)]
    assert len(ways) == len(set(ways)) == 8
    assert ways[0] == (False, False, False)


def test_bench_gpu_measures_the_cases_with_the_trainer(capfd, monkeypatch):
    cases_of = bench_gpu.cases_of
    monkeypatch.setattr(bench_gpu, "cases_of", lambda *sizes: cases_of(*sizes)[::7])
    assert run_main(bench_gpu, monkeypatch, "--tiny") == 0
    machine, *lines = lines_of(capfd)
    assert machine["loop"] == "Trainer"
    assert not any("error" in line for line in lines)
    steps = [line for line in lines if line["what"] == "step"]
    ways = {(line["compiled"], line["checkpointing"], line["parallel"]) for line in steps}
    assert len(steps) == 2 and ways == {(False, False, "DDP"), (True, True, "FSDP2")}
    for line in steps:
        assert line["pairs_per_second"] > 0 and line["save_seconds"] > 0
        assert line["target"]["peak_over_plan"] == 0.1
    plans = {line["checkpointing"]: line["plan_gb"] for line in steps}
    assert 0 < plans[True] < plans[False]
    others = {line["what"]: line for line in lines if line["what"] != "step"}
    assert others.keys() == {"plain", "augmentation", "resume", "loader", "wait"}
    assert others["plain"]["ours_over_plain"] > 0
    assert others["augmentation"]["milliseconds"] > 0
    assert others["resume"]["checkpoint_gb"] > 0
    assert others["loader"]["cores_for_fastest_step"] > 0
    assert 0 < others["wait"]["share"] < 1


def test_bench_gpu_needs_none_of_the_libraries_of_a_trainer():
    absent = ["composer", "pydantic", "torchmetrics", "omegaconf", "streaming", "simplejpeg"]
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))  # None makes an import fail
sys.argv[1:] = ["--tiny", "--only", "augmentation"]
runpy.run_path("{ROOT}/benchmarks/bench_gpu.py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    machine, line = map(json.loads, result.stdout.splitlines())
    assert machine["loop"] == "torch alone"
    assert line["milliseconds"] > 0


@pytest.mark.parametrize("fsdp", [False, True])
def test_loop_of_torch_alone_runs_compiled_and_checkpointed_with_and_without_fsdp(fsdp):
    dist.initialize_dist("cpu")
    meter = Meter(warm_up=1, timed=1, traced=1)
    measure_ours(Case("tiny", 8, compiled=True, checkpointing=True, fsdp=fsdp), meter)
    assert meter.done == 3 and meter.seconds > 0
    assert meter.trace["items"] >= 0


def test_case_that_fails_has_a_line_and_does_not_end_the_others(monkeypatch):
    cases_of = bench_gpu.cases_of
    monkeypatch.setattr(bench_gpu, "cases_of", lambda *sizes: cases_of(*sizes)[::2])  # eager

    def fail(case, *arguments) -> dict:
        problem = torch.OutOfMemoryError if case.fsdp else ValueError
        raise problem("a reason\nand more")

    monkeypatch.setattr(bench_gpu.gpu_trainer, "measure_trainer", fail)
    monkeypatch.setattr("sys.argv", ["", "--tiny", "--only", "step"])
    monkeypatch.setattr(bench_gpu.gpu_trainer, "measure_resume", lambda *_: {})
    output = io.StringIO()
    assert not bench_gpu.measure(bench_gpu.parse(), output)
    _, *lines = map(json.loads, output.getvalue().splitlines())
    errors = {line["error"] for line in lines if line["what"] == "step"}
    assert errors == {"OutOfMemoryError: a reason", "ValueError: a reason"}
    assert lines[-1]["what"] == "resume"


def test_idle_share_is_the_time_without_a_kernel():
    assert idle_share([]) is None
    assert idle_share([(0, 2), (1, 3), (6, 8), (6.5, 7), (9, 10)]) == pytest.approx(4 / 10)


def test_trace_counts_waits_within_its_window_and_no_copies_or_annotations():
    def event(name: str, start: float, end: float, kind=DeviceType.CPU, annotates=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, time_range=span, device_type=kind, is_user_annotation=annotates
        )

    events = [
        event(WINDOW, 10, 90, annotates=True),
        event(WINDOW, 10, 90, DeviceType.CUDA, annotates=True),
        event("cudaStreamSynchronize", 20, 21),
        event("cudaStreamSynchronize", 30, 31),
        event("aten::_local_scalar_dense", 30, 31),
        event("cudaDeviceSynchronize", 95, 96),  # of the profiler
        event("gemm", 20, 30, DeviceType.CUDA),
        event("Memcpy HtoD", 30, 40, DeviceType.CUDA),
        event("FSDP::all_gather", 30, 40, DeviceType.CUDA, annotates=True),
        event("gemm", 40, 60, DeviceType.CUDA),
    ]
    expected = {"synchronisations": 1.0, "items": 0.5, "idle": pytest.approx(0.25)}
    assert read_trace(events, steps=2) == expected


# The other benchmarks


def test_bench_algorithms_compares_an_algorithm_with_none(small_demo, capfd, monkeypatch):
    monkeypatch.setattr(bench_algorithms, "DEMO", str(small_demo))
    monkeypatch.setattr(bench_algorithms, "subprocess", SimpleNamespace(run=run_here))
    assert (
        run_main(bench_algorithms, monkeypatch, *["--epochs", "1", "--seeds", "1", "--only", "EMA"])
        == 0
    )
    summary = {line["algorithm"]: line for line in lines_of(capfd) if "time" in line}
    assert summary.keys() == {"none", "EMA"}
    assert summary["none"]["time"] == 1
    assert all(0 <= line["knn"] <= 1 for line in summary.values())


def test_bench_demo_prints_the_table(small_demo, tmp_path, capfd, monkeypatch):
    (tmp_path / "yamls").symlink_to(ROOT / "yamls")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_demo, "SEEDS", 1)
    monkeypatch.setattr(bench_demo, "METHODS", {"ViC-MAE": []})
    short = ["data.global_train_batch_size=20", "data.num_workers=0", "trainer.max_duration=1ep"]
    overrides = {"pretrain.py": ["callbacks=null", "schedule.t_warmup=1ba", *short]}
    overrides |= {"finetune.py": ["trainer.eval_interval=1ep", "schedule.t_warmup=1ba", *short]}
    monkeypatch.setattr(
        bench_demo,
        "run",
        lambda script, *words: run_here(["", script, *words, *overrides.get(script, [])]),
    )
    assert run_main(bench_demo, monkeypatch) == 0
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert table[0].count("|") == table[-1].count("|") == 7
    assert table[-1].startswith("| ViC-MAE | ")


def test_bench_data_compares_reading_decoding_and_converting(capfd, monkeypatch):
    tiny = {"SIZE": 32, "PATCHES": 4, "BATCH": 4, "IMAGES": 16, "TURNS": 1, "FEW_TURNS": 1}
    tiny |= {"KINETICS_SECONDS": 1, "MIT_SECONDS": 1, "FILMS": 12}
    for name, value in tiny.items():
        monkeypatch.setattr(bench_data, name, value)
    monkeypatch.setattr(data_prep, "PART_SIZE", 4)
    assert run_main(bench_data, monkeypatch) == 0
    lines = {line["what"]: line for line in lines_of(capfd)}
    expected = ["pairs of 224 crops of a 341x256 JPEG, 1 workers", "convert, 2 workers"]
    expected += ["ImageNet, 500x375", "prefetch_factor 8"]
    expected += ["fine-tuning clips of 16 frames, 2 workers, to the cpu"]
    assert lines.keys() >= set(expected)
    assert all(line.get("ratio", 1) > 0 for line in lines.values())


def test_bench_train_measures_steps_waits_kills_ranks_and_memory(
    small_demo, warm, capfd, monkeypatch
):
    tiny = {"TURNS": 1, "BACKEND": "eager", "MODEL": None, "STEPS": 4, "INTERVAL": 2}
    for name, value in (tiny | {"KILLED_AFTER": 3}).items():
        monkeypatch.setattr(bench_train, name, value)
    waiting, steps = bench_train.measure_waiting, bench_train.compare_steps
    configure = partial(bench_train.configure, batch=4, model={"depth": 1, "decoder_depth": 1})
    model = {"embed_dim": 96, "depth": 2, "num_heads": 3}
    model |= {"decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 3}
    replacements = {
        "compare_steps": lambda what, _: steps(what, configure()) if "4 pairs" in what else None,
        "measure_trainer": partial(bench_train.measure_trainer, steps=4),
        "measure_waiting": lambda demo, model, what, count: waiting(
            demo, None, what, count // 20 * 2
        ),
        "measure_kill": partial(bench_train.measure_kill, turns=1),
        "compare_ranks": partial(bench_train.compare_ranks, turns=1, steps=4, batch=4),
        "models_of_memory": lambda: {"small": model},
        "measure_memory": partial(bench_train.measure_memory, few=2, many=4),
    }
    for name, value in replacements.items():
        monkeypatch.setattr(bench_train, name, value)
    assert run_main(bench_train, monkeypatch) == 0
    machine, *lines = lines_of(capfd)
    assert machine["threads"] == 1
    text = " ".join(line["what"] for line in lines)
    for what in ("plain implementation", "overhead", "waiting", "lost by a kill", "2 ranks"):
        assert what in text
    (kill,) = [line for line in lines if "kill" in line["what"]]
    assert kill["repeated_steps"] == 1
    memory = [line for line in lines if "memory" in line["what"]]
    assert len(memory) == 4


def test_bench_watching_alternates_steps_with_and_without_the_probe(small_demo, capfd, monkeypatch):
    for name, value in {"STEPS": 6, "WARM_UP": 2, "BATCH": 8}.items():
        monkeypatch.setattr(bench_watching, name, value)
    assert run_main(bench_watching, monkeypatch) == 0
    (line,) = lines_of(capfd)
    assert line["steps"] == 2
    assert line["seconds_of_step"] > 0
    assert 0 < line["rank_of_epoch"] < line["rank_of_step"] < 1


def test_bench_knn_classifies_all_queries_and_measures_memory(capfd, monkeypatch):
    for name, value in {"BANK": 2000, "QUERIES": 50, "WIDTH": 64, "CLASSES": 10}.items():
        monkeypatch.setattr(bench_knn, name, value)
    assert run_main(bench_knn, monkeypatch) == 0
    (line,) = lines_of(capfd)
    assert line["accuracy"] == 1.0
    assert line["peak_gb"] >= line["before_gb"] > 0
    assert line["ms_per_query"] > 0


def test_stress_resume_interrupts_runs_that_end_as_they_must(small_demo, warm, capfd, monkeypatch):
    code = run_main(stress_resume, monkeypatch, *["--kills", "2", "--epochs", "3", "--seed", "0"])
    lines = lines_of(capfd)
    assert code == 0, "\n".join(map(str, lines))
    assert {"whole1", "whole2", "run0"} <= {line["run"] for line in lines if "run" in line}
    verdict = next(line for line in lines if "weights" in line)
    assert verdict["samples"] and verdict["weights"] and verdict["losses"]
    assert lines[-1]["right"] is True
