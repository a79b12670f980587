"""AdamW's groups: learning rate and weight decay of every parameter."""

import pytest

from model import Classifier, ViCMAE
from training.optimizer import build_optimizer

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}
PROJECTOR = {"projector_hidden_dim": 32, "projector_out_dim": 16}


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay():
    net = ViCMAE(**SIZES, **DECODER, **PROJECTOR)
    adamw = build_optimizer(net, 512, base_lr=1e-3, weight_decay=0.05)
    assert {group["lr"] for group in adamw.param_groups} == {2e-3}
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(decay) == len(named) == sum(len(group["params"]) for group in adamw.param_groups)
    for name, parameter in named.items():
        is_batchnorm = name.split(".")[:2] in (["projector", "1"], ["projector", "4"])
        without_decay = name.endswith(".bias") or "norm" in name or is_batchnorm
        assert decay[id(parameter)] == (0.0 if without_decay else 0.05), name
    assert not {"encoder.pos_embed", "decoder.pos_embed"} & named.keys()


@pytest.mark.parametrize("num_frames", [1, 4])
def test_learning_rate_of_every_parameter_equals_the_formula_of_layer_decay(num_frames):
    net = Classifier(5, **SIZES, num_frames=num_frames)
    adamw = build_optimizer(net, 512, base_lr=1e-3, layer_decay=0.65, weight_decay=0.05)
    settings = {}
    for group in adamw.param_groups:
        for parameter in group["params"]:
            settings[id(parameter)] = group["lr"], group["weight_decay"]
    assert len(settings) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("encoder.norm", "head")):
            layer = 4
        else:
            layer = 0
        lr, decay = settings[id(parameter)]
        assert lr == pytest.approx(2e-3 * 0.65 ** (4 - layer)), name
        is_table = name.split(".")[1] in ("pos_embed", "cls_token", "temporal_embed")
        assert decay == (0.05 if parameter.ndim > 1 and not is_table else 0.0), name
