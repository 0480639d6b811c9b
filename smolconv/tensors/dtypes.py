"""The dtypes that checkpoints hold, by torch's names."""

from __future__ import annotations

from collections.abc import Mapping

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
#: What people call some of them on a command line.
DTYPE_WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
