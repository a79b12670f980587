"""Operations and memory of a step, against published numbers, a count by hand and real tensors."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from model import ViCMAE
from training.cost import flops_per_sample, peak_bytes

TINY = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "projector_hidden_dim": 56,
    "projector_out_dim": 24,
}
PATCHES = 64
SAMPLE = {"views": torch.empty(1, 2, 3, 64, 64), "noise": torch.empty(1, 2, PATCHES)}


class Imitating(nn.Module):
    """A model with the interface of a ComposerModel: the loss is the mean of its output."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.float().mean()


@pytest.mark.parametrize(
    ("name", "giga_macs"), [("vit_base_patch16_224", 17.6), ("vit_large_patch16_224", 61.6)]
)
def test_forward_pass_of_a_vit_has_the_published_number_of_operations(name, giga_macs):
    """GMACs of the cards of timm's models on Hugging Face (`timm/vit_base_patch16_224.mae`)."""
    with torch.device("meta"):
        net = Imitating(timm.create_model(name, num_classes=0)).requires_grad_(False)
        flops = flops_per_sample(net, {"x": torch.empty(1, 3, 224, 224)})
    assert flops == pytest.approx(2e9 * giga_macs, rel=0.003)


def operations_by_hand(net: nn.Module, batch: dict[str, Tensor]) -> int:
    """Sum the products of a training step of ViCMAE on real tensors, layer by layer."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, Block):  # queries times keys, and attention times values
            B, N, D = inputs[0].shape
            total += 3 * 2 * (2 * B * N * N * D)
        elif isinstance(layer, nn.Linear):  # and twice as many for both gradients
            rows = output.numel() // layer.out_features
            total += 3 * (2 * rows * layer.weight.numel())
        elif isinstance(layer, nn.Conv2d):  # the pixels need no gradient
            places = output.numel() // layer.out_channels
            total += 2 * (2 * places * layer.weight.numel())

    for module in net.modules():
        module.register_forward_hook(count)
    projected = 2 * len(batch["views"])
    total += 3 * 2 * projected**2 * TINY["projector_out_dim"]  # similarities of InfoNCE
    net(batch)
    return total


@pytest.mark.parametrize("decode_ratio", [1.0, 0.5])
def test_operations_of_a_pretraining_step_are_those_of_its_layers(decode_ratio):
    generator = torch.Generator().manual_seed(0)
    net = ViCMAE(**TINY)
    net.decode_ratio = decode_ratio
    flops = flops_per_sample(net, SAMPLE)
    batch = {
        "views": torch.randn(2, 2, 3, 64, 64, generator=generator),
        "noise": torch.rand(2, 2, PATCHES, generator=generator),
    }
    assert flops == pytest.approx(operations_by_hand(net, batch) / 2, rel=1e-6)


def test_chunks_count_once_or_on_request_with_their_second_forward_pass():
    net = ViCMAE(**TINY, chunk_size=1)
    flops = flops_per_sample(ViCMAE(**TINY), SAMPLE)
    assert flops_per_sample(net, SAMPLE) == flops
    again = flops_per_sample(net, SAMPLE, chunked=True) - flops
    assert again == pytest.approx(flops / 3, rel=0.05)  # a backward pass is two forward passes


def test_counting_leaves_the_model_as_it_was():
    net = ViCMAE(**TINY)
    before = copy.deepcopy(net.state_dict())
    flops_per_sample(net, SAMPLE)
    peak_bytes(net, SAMPLE, samples=2, half=True, checkpointing=True)
    assert net.state_dict().keys() == before.keys()
    for name, parameter in net.named_parameters():
        assert parameter.grad is None and not parameter._post_accumulate_grad_hooks
        assert torch.equal(parameter, before[name])


def test_forward_pass_without_training_holds_a_batch_and_two_activations():
    net = Imitating(nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)])).requires_grad_(False)
    activation = 4 * 7 * 32  # bytes of 7 samples
    assert peak_bytes(net, {"x": torch.empty(1, 32)}, 7, half=False) == 3 * activation


def blocks(depth: int, width: int = 48) -> Imitating:
    return Imitating(nn.Sequential(*[Block(width, 4, qkv_bias=True) for _ in range(depth)]))


TOKENS = {"x": torch.empty(1, 50, 48)}


def test_checkpointed_block_keeps_its_input_alone():
    shallow, deep = (peak_bytes(blocks(n), TOKENS, 3, False, checkpointing=True) for n in (4, 9))
    assert deep - shallow == 5 * 4 * 3 * 50 * 48


def test_forward_pass_without_training_needs_no_more_memory_for_more_blocks():
    shallow, deep = (peak_bytes(blocks(n).requires_grad_(False), TOKENS, 3, False) for n in (4, 9))
    assert deep == shallow


def saved_bytes(net: nn.Module, batch: dict[str, Tensor], half: bool) -> int:
    """Return the bytes that a real forward pass on the CPU saves for the backward pass."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        net.loss(net(batch), batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


@pytest.mark.parametrize("half", [False, True])
def test_growth_of_memory_with_depth_is_what_real_blocks_save(half):
    """At the peak, all blocks have saved their tensors and one block runs, whatever the depth."""
    x = torch.randn(3, 50, 48, generator=torch.Generator().manual_seed(0))
    saved = [saved_bytes(blocks(depth), {"x": x}, half) for depth in (4, 9)]
    peak = [peak_bytes(blocks(depth), TOKENS, 3, half) for depth in (4, 9)]
    assert peak[1] - peak[0] == pytest.approx(saved[1] - saved[0], rel=0.01)
    assert saved[0] < peak[0] < 1.5 * saved[0]


def test_loss_that_selects_pairs_by_value_is_left_out_of_the_count():
    class Selecting(Imitating):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return F.relu(outputs)[outputs > 0].mean()

    plain, selecting = (kind(nn.Linear(8, 4)) for kind in (Imitating, Selecting))
    sample = {"x": torch.empty(1, 8)}
    assert flops_per_sample(selecting, sample) == flops_per_sample(plain, sample) == 2 * 2 * 8 * 4
