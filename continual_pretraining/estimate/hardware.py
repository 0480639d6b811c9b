"""What GPUs can do and hold."""

from __future__ import annotations

import re

H100_TFLOPS = 989.0  #: SXM; what a run is planned for where nothing else is said
#: What a card sold as 80 GB is asked to hold. It has some 4 GB more, which fragmentation takes.
GPU_MEMORY_BYTES = 80_000_000_000
#: CUDA context, cuBLAS workspaces and NCCL's buffers. Assumed, not measured here.
GPU_RUNTIME_BYTES = 1_500_000_000

#: Dense bf16 TFLOPS with fp32 accumulation, by what torch calls the device. NVIDIA's datasheets print the double, "with
#: sparsity", for Hopper and later: H100 (SXM 1,979, PCIe 1,513, NVL 1,671), H200 (SXM 1,979, NVL 1,671), HGX B200 (36
#: PFLOPS of 8). A100 312; L40S 362; Ada GPU architecture whitepaper: RTX 4090 165.2. A slice of a GPU (MIG) has none.
_PEAKS = (
    (r"NVIDIA H100 80GB HBM3", H100_TFLOPS),
    (r"NVIDIA H100 PCIe", 756.0),
    (r"NVIDIA H100 NVL", 835.0),
    (r"NVIDIA (H200|GH200.*)", H100_TFLOPS),
    (r"NVIDIA H200 NVL", 835.0),
    (r"(NVIDIA )?A100[ -].*", 312.0),
    (r"NVIDIA B200", 2250.0),
    (r"NVIDIA L40S", 362.0),
    (r"NVIDIA GeForce RTX 4090", 165.0),
)


def peak_flops(device_name: str | None, peak_tflops: float | None = None) -> float | None:
    """FLOP/s that one device could do in dense bf16: the recipe's ``peak_tflops``, or by its name; None: unknown."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device_name is None or "MIG" in device_name:
        return None
    return next((tflops * 1e12 for name, tflops in _PEAKS if re.fullmatch(name, device_name)), None)
