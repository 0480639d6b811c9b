"""Make a checkpoint with the shapes of a SmolLM model and random weights, through smolconv's own streaming writer.

Runs as a process of its own: a benchmark that held numpy in memory would hand its size down to the processes that it
measures (a child's peak starts at what its parent holds when it starts it).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smolconv.carried import Account
from smolconv.checkpoint import Checkpoint, OptimizerState, ParameterGroup, Slot, TrainingProgress
from smolconv.conversion import ConversionPlan, ConvertOptions, run_conversion
from smolconv.layouts.deepspeed.groups import with_adam
from smolconv.layouts.deepspeed.writer import DeepSpeedOptions, plan_deepspeed
from smolconv.layouts.huggingface.writer import HuggingFaceOptions, plan_huggingface
from smolconv.layouts.nanotron.writer import NanotronOptions, plan_nanotron
from smolconv.models.huggingface import parameter_shapes, spec_from_hf
from smolconv.tensors.dtypes import DTYPE_BYTES
from smolconv.tensors.elements import Raw
from smolconv.tensors.lazy import LazyTensor, Stored, cast

_SMOLLM2: Mapping[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
#: The config.json of each model on the Hub, as far as it decides shapes and mathematics.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "135m": {
        **_SMOLLM2, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "360m": {
        **_SMOLLM2, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5,
    },
    "1.7b": {
        **_SMOLLM2, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 130000.0,
    },
    "3b": {
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 65536, "rope_theta": 5000000.0, "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

_BLOCK_BYTES = 1 << 20
#: Sign and mantissa are random, the exponent is not: values of 0.016 to 0.031, as weights have, so that a forward pass
#: stays finite.
_RANDOM_BITS = {"bfloat16": 0x807F807F807F807F, "float32": 0x807FFFFF807FFFFF}
_EXPONENT = {"bfloat16": 0x3C803C803C803C80, "float32": 0x3C8000003C800000}
_SIGN = {"bfloat16": 0x8000800080008000, "float32": 0x8000000080000000}


@dataclass(frozen=True, kw_only=True)
class RandomTensor(LazyTensor):
    """Random values that any range can be read of: each block of 1 MiB has a generator of its own."""

    seed: int
    shape: tuple[int, ...]
    dtype: str
    positive: bool = False  #: as Adam's exp_avg_sq is

    def read(self, start: int, stop: int, out: Raw) -> None:
        block = _BLOCK_BYTES // DTYPE_BYTES[self.dtype]
        mask = np.uint64(_RANDOM_BITS[self.dtype] & ~(_SIGN[self.dtype] if self.positive else 0))
        exponent = np.uint64(_EXPONENT[self.dtype])
        at = start
        while at < stop:
            index, inside = divmod(at, block)
            end = min(stop, (index + 1) * block)
            # The generator's raw output: twice as fast as its methods for bytes or integers.
            words = np.random.SFC64([self.seed, index]).random_raw(_BLOCK_BYTES // 8)
            words &= mask
            words |= exponent
            out[at - start : end - start] = words.view(out.dtype)[inside : inside + end - at]
            at = end

    def leaves(self) -> Iterator[Stored]:
        return iter(())


def random_checkpoint(size: str, *, adam: bool) -> Checkpoint:
    """A checkpoint of ``CONFIGS[size]`` in bfloat16; with ``adam`` also fp32 masters, moments and progress."""
    spec = spec_from_hf(CONFIGS[size], size)
    shapes = parameter_shapes(spec)
    tensors: dict[Slot, Mapping[str, LazyTensor]] = {}
    for order, slot in enumerate(Slot if adam else (Slot.PARAMETER,)):
        tensors[slot] = {
            name: RandomTensor(
                seed=order * 100_000 + index,
                shape=shape,
                dtype="bfloat16" if slot is Slot.PARAMETER else "float32",
                positive=slot is Slot.EXP_AVG_SQ,
            )
            for index, (name, shape) in enumerate(shapes.items())
        }
    if adam:  # as training leaves them: the weights are the rounded masters
        tensors[Slot.PARAMETER] = {name: cast(master, "bfloat16") for name, master in tensors[Slot.MASTER].items()}
    group = ParameterGroup(
        names=tuple(shapes),
        hyperparameters={
            "lr": 3e-4, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "maximize": False,
            "foreach": None, "capturable": False, "differentiable": False, "fused": True, "initial_lr": 5e-4,
        },
    )  # fmt: skip
    return Checkpoint(
        layout="huggingface",
        root=Path(f"random-{size}"),
        spec=spec,
        tensors=tensors,
        optimizer=OptimizerState(steps=dict.fromkeys(shapes, 1000.0), groups=(group,)) if adam else None,
        progress=TrainingProgress(step=1000, consumed_samples=256_000) if adam else None,
    )


def write_checkpoint(
    checkpoint: Checkpoint, target: Path, layout: str, *, tp: int, zero_stage: int | None = None, world_size: int = 1
) -> None:
    """Write it as one Hugging Face file, as nanotron with ``tp`` ranks, or as DeepSpeed (universal without a stage)."""
    if layout == "deepspeed":
        checkpoint = with_adam(checkpoint, groups=None, zero_stage=zero_stage)
        output = plan_deepspeed(
            checkpoint, DeepSpeedOptions(zero_stage=zero_stage, world_size=world_size if zero_stage else None)
        )
    elif layout == "nanotron":
        output = plan_nanotron(checkpoint, NanotronOptions(tp=tp))
    else:
        output = plan_huggingface(checkpoint, HuggingFaceOptions(max_shard_bytes=10**12))
    plan = ConversionPlan(
        uri=str(checkpoint.root),
        source=checkpoint,
        prepared=checkpoint,
        target=target,
        layout=layout,
        options=ConvertOptions(to=layout, digest="none"),
        output=output,
        files={},
        account=Account(carried=(), left_out=()),
        digest="random",
    )
    run_conversion(plan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=CONFIGS)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layout", choices=("huggingface", "nanotron", "deepspeed"), default="huggingface")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, help="of deepspeed; universal without")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--adam", action="store_true", help="with fp32 masters and moments")
    given = parser.parse_args()
    write_checkpoint(
        random_checkpoint(given.size, adam=given.adam), given.target, given.layout, tp=given.tp,
        zero_stage=given.zero_stage, world_size=given.world_size,
    )  # fmt: skip
