"""All methods of methods/: on two ranks, resumed, collapsed; none changes ViC-MAE."""

import ast
import re

import pytest
import torch
import torch.distributed as dist
from composer import Event
from conftest import ROOT, losses, run_stage, small, start_ranks
from tiny_models import CLIPS, ENCODER, TINY, random_batch, state_at
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pretrain
from methods import CLASSIFIERS, PRETRAINING, method_of
from methods.contrastive import MoCoV2
from methods.linear_probe import LinearProbe
from methods.supervised import Omnivore
from model import Classifier, ViCMAE
from training.config import keywords_of
from training.weights import LATEST, read_checkpoint

METHODS = {
    "vicmae": ("vicmae", {}),
    "predictor": ("vicmae", {"predictor": True}),
    "simclr": ("simclr", {}),
    "moco_v2": ("moco_v2", {"momentum": 0.9, "queue_size": 24}),
    "masked_moco_v2": ("moco_v2", {"momentum": 0.9, "queue_size": 24, "masked": True}),
    "triplet": ("triplet", {}),
    "triplet_by_label": ("triplet", {"positives": "label", "masked": True}),
    "simsiam": ("simsiam", {"predictor_hidden_dim": 24}),
    "vicreg": ("vicreg", {"masked": True}),
    "mae": ("mae", {}),
    "st_mae": ("st_mae", {**CLIPS, "mask_ratio": 0.9}),
    "videomae": ("videomae", {**CLIPS, "mask_ratio": 0.75}),
}


def new_model(name: str) -> ViCMAE:
    method, changes = METHODS[name]
    torch.manual_seed(0)
    return PRETRAINING[method](**TINY | changes).train()


def train_method(name: str, steps: int = 3) -> dict[str, Tensor]:
    """Return losses, last gradients and state of some steps on this rank's part of the batches."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    net = new_model(name).double()
    trained = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    found = {}
    for step in range(steps):
        batch = random_batch(8, seed=step, frames=net.num_frames)
        batch = {key: value.double() for key, value in batch.items()}
        batch["target"] = torch.arange(8) % 3
        part = {key: value.chunk(ranks)[rank] for key, value in batch.items()}
        optimizer.zero_grad()
        if isinstance(net, MoCoV2):
            (momentum_step,) = net.algorithms()
            momentum_step.apply(Event.BATCH_START, state_at(step), None)
        losses = net.loss(trained(part), part)
        losses["total"].backward()
        optimizer.step()
        logged = {key: value.detach() for key, value in losses.items() if key != "feature_std"}
        found |= {f"{step} {key}": value for key, value in logged.items()}
    gradients = {key: p.grad for key, p in net.named_parameters() if p.requires_grad}
    found |= {f"gradient of {key}": gradient for key, gradient in gradients.items()}
    return found | net.state_dict()


def train_methods(rank: int, out: str) -> None:
    torch.save({name: train_method(name) for name in METHODS}, f"{out}/{rank}")


@pytest.fixture(scope="module")
def methods_on_two_ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    out = tmp_path_factory.mktemp("ranks")
    start_ranks(out, 2, train_methods, str(out))
    return [torch.load(out / str(rank), weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_on_two_ranks_the_losses_gradients_and_state_of_one(
    methods_on_two_ranks, name
):
    first, second = (rank[name] for rank in methods_on_two_ranks)
    of_one = train_method(name)
    assert first.keys() == second.keys() == of_one.keys()
    for key, expected in of_one.items():
        found = first[key].double()
        if key[0].isdigit():  # a loss
            found = (found + second[key].double()) / 2
        scale = max(float(expected.double().abs().max()), 1e-3)
        assert float((found - expected).abs().max()) < 1e-8 * scale, key


@pytest.mark.parametrize("name", METHODS)
def test_collapse_shows_in_the_spread_of_the_features(name):
    net = new_model(name)
    batch = random_batch(16, frames=net.num_frames) | {"target": torch.arange(16) % 3}
    spread = float(net.loss(net(batch), batch)["feature_std"])
    nn.init.zeros_(net.encoder.norm.weight)
    nn.init.ones_(net.encoder.norm.bias)
    assert float(net.loss(net(batch), batch)["feature_std"]) < 1e-3 < 10e-3 < spread


def test_table_is_tested_in_full():
    assert {method for method, _ in METHODS.values()} | {"omnimae"} == set(PRETRAINING)


def test_other_methods_do_not_change_vicmae():
    net, batch = new_model("vicmae"), random_batch()
    expected = net.loss(net(batch), batch)
    for name in METHODS:
        other = new_model(name)
        views = random_batch(frames=other.num_frames) | {"target": torch.arange(4)}
        other.loss(other(views), views)["total"].backward()
    again = new_model("vicmae")
    found = again.loss(again(batch), batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "yaml", ["methods/moco_v2", "methods/triplet_supervised", "methods/videomae", "paper"]
)
def test_method_trains_by_its_yaml_and_a_resumed_run_is_bit_identical(demo, tmp_path, yaml):
    base, *settings = small(demo)
    arguments = [base, str(ROOT / "yamls" / f"{yaml}.yaml"), *settings, "checkpoints.interval=1ba"]
    arguments += ["callbacks=null", "data.num_workers=0", "schedule.t_max=2ep"]
    run_stage(pretrain, [*arguments, "run_name=uninterrupted"], tmp_path)
    run_stage(pretrain, [*arguments, "run_name=resumed", "trainer.max_duration=4ba"], tmp_path)
    (tmp_path / "runs" / "resumed" / "result.json").unlink()
    run_stage(pretrain, [*arguments, "run_name=resumed"], tmp_path)
    names = ("uninterrupted", "resumed")
    folders = [tmp_path / "runs" / name / "checkpoints" for name in names]
    expected, found = (read_checkpoint(str(folder / LATEST)) for folder in folders)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path, "resumed") == losses(tmp_path, "uninterrupted")
    assert ("momentum.queue" in expected) is (yaml == "methods/moco_v2")
    has_picture = (tmp_path / "runs" / "resumed" / "reconstructions.png").exists()
    assert has_picture is (yaml in ("methods/videomae", "paper"))


@pytest.mark.parametrize(
    ("sizes", "method"),
    [
        ({"embed_dim": 64}, "vicmae"),
        ({"num_frames": 1, "mask": "random"}, "vicmae"),
        ({"num_frames": 16, "mask": "tube"}, "videomae"),
        ({"num_frames": 16, "tubelet_size": 2}, "st_mae"),
    ],
)
def test_checkpoint_of_clips_without_a_method_is_not_taken_for_an_encoder_of_images(sizes, method):
    assert method_of("pretrain", sizes, {}) == method


def test_classifier_without_a_method_is_known_by_its_weights():
    for net, method in (
        (Classifier(4, **ENCODER), "classifier"),
        (LinearProbe(4, **ENCODER), "linear_probe"),
        (Omnivore([2, 3], **ENCODER), "omnivore"),
    ):
        assert method_of("finetune", {}, net.state_dict()) == method


def words_of(code: ast.Module) -> set[str]:
    """Return the names, and the words of all strings but docstrings, in a piece of code."""
    words = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None  # a docstring
        for field in ("id", "attr", "arg", "name", "asname", "module", "value"):
            text = getattr(node, field, None)
            words |= set(re.findall(r"\w+", text)) if isinstance(text, str) else set()
    return words


@pytest.mark.parametrize("stage", ["model", "pretrain", "finetune", "eval"])
def test_stage_names_no_method_beyond_the_paper_nor_an_argument_of_such_a_method(stage):
    of_the_paper = (ViCMAE, Classifier, LinearProbe)
    known = {key for kind in of_the_paper for key in keywords_of(kind)} | {"momentum"}  # of LARS
    forbidden = set()
    for name, kind in (PRETRAINING | CLASSIFIERS).items():
        if kind not in of_the_paper:
            forbidden |= {name, kind.__name__, *keywords_of(kind)}
    used = words_of(ast.parse((ROOT / f"{stage}.py").read_text()))
    assert not used & (forbidden - known)
