"""AdamW with layer decay: the block `optimizer` of pre-training and fine-tuning."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from shards.views import UnitInterval


def build_optimizer(
    model: nn.Module,
    global_train_batch_size: int,
    *,
    base_lr: PositiveFloat,
    betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.95),
    weight_decay: NonNegativeFloat = 0.05,
    layer_decay: PositiveFloat | None = None,
) -> torch.optim.AdamW:
    """Return AdamW, without weight decay on biases, norms and other 1-D parameters.

    Args:
        base_lr: learning rate per 256 samples; lr = base_lr * global_train_batch_size / 256.
        layer_decay: learning rate of a layer relative to the next layer's (source: BEiT, by timm);
            None for one learning rate.
    """
    lr = base_lr * global_train_batch_size / 256
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay)
    else:
        no_decay = ("*pos_embed", "*cls_token", "*temporal_embed")
        groups = param_groups_layer_decay(model, weight_decay, no_decay, layer_decay=layer_decay)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale", 1.0)
    grouped = sorted(id(parameter) for group in groups for parameter in group["params"])
    trainable = sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert grouped == trainable, "the groups must hold every trainable parameter exactly once"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
