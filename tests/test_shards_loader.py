"""Stop signals to the process group of a stage: its workers survive, and it saves and says so."""

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fork_server, run_stage, small
from torch.utils.data import Dataset, get_worker_info

import data_prep
import eval as evaluation
import finetune
import pretrain
import shards.loader
from evaluation.accuracy import load_eval
from evaluation.probes import embed
from model import Classifier
from shards.loader import Loader
from shards.stream import DeterministicStream
from shards.views import EvalViews
from shards.workers import STOPPED
from training.checkpoints import LATEST, Checkpoints, check_checkpoint
from training.writing import Writer

STAGES = {"pretrain": pretrain, "finetune": finetune, "eval": evaluation}
PLACES = {  # a function that a stage calls in some place
    "start": (Checkpoints, "newest"),
    "step": (Checkpoints, "batch_start"),
    "data": (DeterministicStream, "transform_sample"),  # in a worker, for which the stage waits
    "save": (Writer, "start"),
    "evaluation": (EvalViews, "__getitem__"),  # in a worker, for k-NN, validation or accuracy
}


def run_in_a_group(stage: str, arguments: list[str], folder: Path, place: str, numbers) -> None:
    """Run a stage as the leader of a process group that is signalled once, at a place."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the default of a main process on Linux
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    owner, name = PLACES[place]
    original: Callable = getattr(owner, name)

    def signalled(*args, **kwargs):
        in_place = place != "data" or get_worker_info()
        if in_place and not (folder / "signalled").exists():
            (folder / "signalled").touch()
            for number in numbers:
                os.killpg(0, number)
        return original(*args, **kwargs)

    setattr(owner, name, signalled)
    code = 0
    try:
        run_stage(STAGES[stage], arguments, folder)
    except SystemExit as end:
        code = end.code
    # As at the end of an interpreter. Processes of multiprocessing leave this out.
    atexit._run_exitfuncs()
    os._exit(code)


def exit_code(stage: str, arguments: list[str], folder: Path, place: str, *numbers: int) -> int:
    context = fork_server()
    arguments = (stage, arguments, folder, place, numbers)
    process = context.Process(target=run_in_a_group, args=arguments)
    process.start()
    process.join(120)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    ("place", "number", "workers", "step"),
    [
        ("step", signal.SIGTERM, 0, 1),
        ("step", signal.SIGINT, 2, 1),
        ("step", signal.SIGUSR1, 2, 1),
        ("data", signal.SIGTERM, 2, 1),
        ("save", signal.SIGINT, 2, 3),
        ("evaluation", signal.SIGTERM, 2, 6),
    ],
)
def test_signal_to_the_group_of_a_pretraining_saves_a_checkpoint(
    demo, tmp_path, place, number, workers, step
):
    arguments = [
        *small(demo),
        f"data.num_workers={workers}",
        "checkpoints={interval: 2ba, stop_signals: [SIGUSR1]}",
    ]
    if place == "evaluation":
        arguments += ["callbacks.KNN.num_workers=2", "callbacks.KNN.every=1"]
        arguments += ["trainer.max_duration=3ep"]
        # The measurement before the first step has nothing to save.
        (tmp_path / "signalled").touch()
        assert exit_code("pretrain", [*arguments, "trainer.max_duration=1ep"], tmp_path, place) == 0
        (tmp_path / "runs/demo/result.json").unlink()
        (tmp_path / "signalled").unlink()
    else:
        arguments += ["callbacks=null"]
    assert exit_code("pretrain", arguments, tmp_path, place, number) == STOPPED
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output
    folder = tmp_path / "runs/demo/checkpoints"
    check_checkpoint(folder / LATEST)
    name = os.readlink(folder / LATEST)
    assert name.endswith(f"-ba{step}.pt")
    saved = f"saved in runs/demo/checkpoints/{name}; run the same command to resume"
    assert f"step {step}; {saved}" in output


def test_signal_before_the_first_step_saves_nothing_and_says_how_to_go_on(demo, tmp_path):
    arguments = [*small(demo), "callbacks=null", "data.num_workers=0"]
    assert exit_code("pretrain", arguments, tmp_path, "start", signal.SIGTERM) == STOPPED
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output
    assert "stopped by SIGTERM; run the same command again" in output
    assert not list((tmp_path / "runs/demo/checkpoints").glob("ep*"))


def test_second_interrupt_ends_a_run_at_once(demo, tmp_path):
    arguments = [*small(demo), "callbacks=null", "data.num_workers=2"]
    code = exit_code("pretrain", arguments, tmp_path, "step", signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert "interrupted again" in (tmp_path / "output").read_text()


def test_signal_to_the_group_of_a_fine_tuning_stops_its_validation(demo, pretrained, tmp_path):
    arguments = [
        str(ROOT / "yamls" / "finetune_demo.yaml"),
        f"pretrained={pretrained}",
        f"data.streams=[{{path: {demo}/train_videos}}]",
        f"eval_data={{paths: [{demo}/test_videos], num_workers: 2}}",
        "trainer.max_duration=2ba",
        "trainer.eval_interval=1ba",
        "schedule.t_warmup=1ba",
    ]
    assert exit_code("finetune", arguments, tmp_path, "evaluation", signal.SIGTERM) == STOPPED
    assert "Traceback" not in (tmp_path / "output").read_text()
    check_checkpoint(tmp_path / "runs/finetune_demo/checkpoints/ep0-ba1.pt")


def test_signal_to_the_group_of_an_evaluation_ends_it_in_one_line(demo, pretrained, tmp_path):
    probe = f"{{bank: [{demo}/train_images], queries: [{demo}/test_images], num_workers: 2}}"
    arguments = ["run_name=e", f"checkpoint={pretrained}", f"probe={probe}"]
    assert exit_code("eval", arguments, tmp_path, "evaluation", signal.SIGINT) == STOPPED
    assert "stopped by SIGINT; run the same command again" in (tmp_path / "output").read_text()
    assert not (tmp_path / "runs/e/eval.json").exists()


class Numbers(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return torch.tensor(number)


def test_workers_of_a_loader_receive_no_stop_signals_and_their_parent_still_does():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader = Loader(Numbers(), 4, 8, num_workers=2)
    assert torch.cat(list(loader)).tolist() == list(range(8))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_evaluations_whose_batches_do_not_fit_into_shared_memory_are_refused(
    demo, tmp_path, monkeypatch
):
    usage = shutil.disk_usage("/dev/shm")._replace(free=100_000)
    monkeypatch.setattr(shards.loader.shutil, "disk_usage", lambda folder: usage)
    path = str(demo / "test_images")
    views = 2 * 2 * 60 * 2 * 32 * 32 * 3  # batches, samples, views, bytes
    match = f"4 batches need {views / 1e6:.0f} MB, but it has 0 MB free"
    settings = {"spatial_views": 2, "batch_size": 60}
    net = Classifier(10, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(OSError, match=match):
        load_eval(tmp_path, net, (), paths=[path], num_workers=2, **settings)
    load_eval(tmp_path, net, (), paths=[path], **settings)
    data = EvalViews([path], 32, spatial_views=2)
    with pytest.raises(OSError, match=match):
        embed(net.encoder, data, num_workers=2, batch_size=60)


def convert_in_a_group(source: Path, out: Path) -> None:
    os.setsid()
    sys.stderr = open(out.with_name("output"), "w")  # noqa: SIM115
    data_prep.exit_on_signals()
    original = data_prep.read_image

    def read(file, recipe):
        os.killpg(0, signal.SIGINT)  # from a worker
        return original(file, recipe)

    data_prep.read_image = read
    data_prep.main(["images", str(source), str(out), "--workers", "2"])


def test_interrupted_conversion_says_how_to_continue(demo, tmp_path):
    context = fork_server()
    arguments = (demo / "raw/test/images", tmp_path / "out")
    process = context.Process(target=convert_in_a_group, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == STOPPED
    assert "stopped by SIGINT; run the same command" in (tmp_path / "output").read_text()
    data_prep.main(["images", *map(str, arguments)])
