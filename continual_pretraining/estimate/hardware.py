"""Data sheets of GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from smolconv.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One type of GPU, by its data sheet."""

    name: str  #: for ``smolconv plan --gpu``
    device: str  #: a regex for torch's name
    memory_bytes: int  #: nominal. The real size may be slightly larger, which covers fragmentation
    tflops: float  #: dense bf16 with fp32 accumulation
    memory_bandwidth: float  #: bytes/s
    link_bandwidth: float  #: bytes/s sent to the other GPUs of its node, by NVLink or PCIe


#: NVIDIA's datasheets print the double TFLOPS, "with sparsity", for Hopper and later: H100 (SXM 1,979, PCIe 1,513, NVL
#: 1,671), H200 (SXM 1,979, NVL 1,671), HGX B200 (36 PFLOPS of 8). A100 312; L40S 362; Ada GPU architecture whitepaper:
#: RTX 4090 165.2. Data sheets give NVLink's bandwidth for both directions together. Bridges of NVL cards connect only
#: some GPUs of a node, so NVL rows have PCIe's bandwidth (64 GB/s for version 5, 32 for 4). MIG slices have no row.
GPUS = tuple(
    Gpu(
        name=name, device=device, memory_bytes=memory * 10**9, tflops=tflops, memory_bandwidth=bandwidth * 1e12,
        link_bandwidth=link * 1e9,
    )
    for name, device, memory, tflops, bandwidth, link in (
        ("h100", r"NVIDIA H100 80GB HBM3", 80, 989.0, 3.35, 450),
        ("h100-pcie", r"NVIDIA H100 PCIe", 80, 756.0, 2.0, 64),
        ("h100-nvl", r"NVIDIA H100 NVL", 94, 835.0, 3.9, 64),
        ("h200", r"NVIDIA H200", 141, 989.0, 4.8, 450),
        ("h200-nvl", r"NVIDIA H200 NVL", 141, 835.0, 4.8, 64),
        ("gh200", r"NVIDIA GH200.*", 96, 989.0, 4.0, 450),
        ("a100-40gb", r"(NVIDIA )?A100[ -].*40GB.*", 40, 312.0, 1.555, 300),
        ("a100-80gb", r"(NVIDIA )?A100[ -].*", 80, 312.0, 2.04, 300),
        ("b200", r"NVIDIA B200", 180, 2250.0, 7.7, 900),
        ("l40s", r"NVIDIA L40S", 48, 362.0, 0.864, 32),
        ("rtx4090", r"NVIDIA GeForce RTX 4090", 24, 165.0, 1.008, 32),
    )
)  # fmt: skip
H100 = GPUS[0]
#: The default, by the 6N formula.
ASSUMED_MFU = 0.3
H100_TFLOPS = H100.tflops  #: default for estimates
GPU_MEMORY_BYTES = H100.memory_bytes
#: CUDA context, cuBLAS workspaces and NCCL's buffers. An assumption, not a measurement.
GPU_RUNTIME_BYTES = 1_500_000_000
#: GPUs per node.
GPUS_OF_A_NODE = 8


def find_gpu(name: str) -> Gpu:
    """The GPU by its name in ``GPUS``. Raises ``UsageError``."""
    found = next((gpu for gpu in GPUS if gpu.name == name.lower()), None)
    if found is None:
        raise UsageError(
            f"--gpu {name:.60}: unknown GPU.\nExpected one of {', '.join(gpu.name for gpu in GPUS)}. For "
            "another one, give the most similar of them, --memory, and --set logging.peak_tflops=..."
        )
    return found


def peak_flops(device_name: str | None, peak_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of one device in dense bf16: the recipe's ``peak_tflops``, or by the device's name; None: unknown."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device_name is None or "MIG" in device_name:
        return None
    return next((gpu.tflops * 1e12 for gpu in GPUS if re.fullmatch(gpu.device, device_name)), None)
