"""Data sheets of GPUs, against their processors, clocks and chips of memory."""

import pytest

from training.gpus import GPUS

PARTS = {  # multiprocessors; operations of each in a clock, and Hz, in 16 bits and in fp32; memory
    "a100": (108, (2048, 1.41e9), (128, 1.41e9), 5 * 16e9),
    "a100-40": (108, (2048, 1.41e9), (128, 1.41e9), 5 * 8e9),
    "h100": (132, (4096, 1.83e9), (256, 1.98e9), 5 * 16e9),
    "h200": (132, (4096, 1.83e9), (256, 1.98e9), 6 * 24e9),
    "l40s": (142, (1024, 2.52e9), (256, 2.52e9), 24 * 2e9),
}


@pytest.mark.parametrize("key", GPUS)
def test_data_sheet_of_a_gpu_follows_from_its_parts(key):
    count, half, full, memory = PARTS[key]
    assert GPUS[key].half == pytest.approx(count * half[0] * half[1], rel=0.02)
    assert GPUS[key].full == pytest.approx(count * full[0] * full[1], rel=0.02)
    assert GPUS[key].memory == pytest.approx(memory, rel=0.03)  # of 144 GB, an H200 offers 141


def test_gpu_is_chosen_by_its_name_in_small_letters():
    for key, gpu in GPUS.items():
        assert gpu.name.lower().removesuffix(" gb").replace(" ", "-") == key
