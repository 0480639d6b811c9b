"""nanotron: a folder per step, a safetensors file per parameter and tensor-parallel rank, torch archives for Adam."""

from smolconv.layouts.nanotron.reader import (
    NativeModel,
    read_nanotron,
    read_native_model,
)
from smolconv.layouts.nanotron.writer import NanotronOptions, plan_nanotron

__all__ = [
    "NanotronOptions",
    "NativeModel",
    "plan_nanotron",
    "read_nanotron",
    "read_native_model",
]
