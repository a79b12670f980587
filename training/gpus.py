"""Data sheets of the GPUs that --plan and benchmarks/bench_gpu.py know."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU's data sheet: bytes of memory, and dense operations per second."""

    name: str
    memory: float
    half: float  # in 16-bit floating point
    full: float  # in fp32, without TF32


GPUS = {  # NVIDIA's data sheets
    "a100": Gpu("A100", 80e9, 312e12, 19.5e12),
    "a100-40": Gpu("A100 40 GB", 40e9, 312e12, 19.5e12),
    "h100": Gpu("H100", 80e9, 989e12, 67e12),
    "h200": Gpu("H200", 141e9, 989e12, 67e12),
    "l40s": Gpu("L40S", 48e9, 362e12, 91.6e12),
}
