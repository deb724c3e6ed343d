"""GPUs as their makers state them, and what a run is assumed to get out of one."""

from dataclasses import dataclass

GIB = 2**30
RESERVED = 1.5 * GIB  # bytes of a GPU kept for CUDA and for what the allocator cannot use

# Assumed share of the peak FLOPs that the work counted in `flops.py` takes. On an H200, in one pass without gradient
# checkpointing, 0.41 to 0.48 were measured at 7B, and 0.20 to 0.22 at 0.5B, for which 0.35 is too much. The source is
# docs/benchmarks.md, "On a GPU" (`benchmarks/real_sizes.py`).
MFU = 0.35


@dataclass(frozen=True)
class Hardware:
    """Describe a GPU.

    Attributes:
        name: the GPU's name.
        flops: dense bfloat16 FLOPs per second with float32 accumulation; float16 is as fast.
        memory: bytes.
        source: where its maker states them.
    """

    name: str
    flops: float
    memory: float
    source: str


HARDWARE = (
    Hardware("A100 40 GB", 312e12, 40e9, "NVIDIA A100 datasheet"),
    Hardware("A100 80 GB", 312e12, 80e9, "NVIDIA A100 datasheet"),
    Hardware("H100 SXM", 989e12, 80e9, "NVIDIA H100 datasheet, without sparsity"),
    Hardware("H200 SXM", 989e12, 141e9, "NVIDIA H200 datasheet, without sparsity"),
    Hardware("RTX 4090", 165.2e12, 24e9, "NVIDIA Ada architecture whitepaper"),
    Hardware("RTX 3090", 71e12, 24e9, "NVIDIA GA102 architecture whitepaper"),
)
