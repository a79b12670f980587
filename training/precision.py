"""The precision of products of fp32 numbers on a GPU, and bfloat16 on the CPU."""

import torch
from composer import Callback, Logger, State


def forbid_tf32() -> None:
    """Let a GPU multiply fp32 numbers in fp32.

    Composer allows TF32, whose factors have 11 significant bits, each time it opens a GPU. It does
    so once more while it wraps a model for FSDP: call this function when the Trainer is built.
    Only products outside autocast are affected, such as InfoNCE's logits and their gradients, the
    colours of the augmentation, k-NN, and all products with `precision: fp32`.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class BFloat16OnCPU(Callback):
    """Runs the forward pass in bfloat16 on the CPU, where Composer refuses amp_bf16."""

    def __init__(self):
        self.autocast = torch.autocast("cpu", torch.bfloat16)

    def before_forward(self, state: State, logger: Logger) -> None:
        self.autocast.__enter__()

    def after_forward(self, state: State, logger: Logger) -> None:
        self.autocast.__exit__(None, None, None)

    eval_before_forward = before_forward
    eval_after_forward = after_forward
