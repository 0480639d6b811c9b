"""Hold the estimate's memory against an oracle: results/memory.md.

    python benchmarks/memory.py --layers 6     the first ones of each shape: 3 minutes on a core
    python benchmarks/memory.py                all layers: 15 minutes

The oracle is torch's ``MemTracker``: it follows every storage of the training model's own forward and backward pass
over fake tensors, which have shapes and take no memory. It shares no formula with the estimate. The path is a GPU's:
bfloat16 products, 2^27 logits at once, and an attention that keeps and makes what flash kernels do.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import REPOSITORY, markdown_table, say
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker

from smolconv.continual_pretraining.engine import attention, model
from smolconv.continual_pretraining.engine.attention import Packing
from smolconv.continual_pretraining.engine.config import MAX_LOGITS, TILE_TOKENS, tiles_mlp
from smolconv.continual_pretraining.engine.tiling import tile_mlp
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.models.huggingface import spec_from_hf

RESULTS = REPOSITORY / "benchmarks" / "results" / "memory.md"
LIMIT = 0.10  #: relative, of every cell


def _shape(kind: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    names = {"llama": "LlamaForCausalLM", "smollm3": "SmolLM3ForCausalLM"}
    return {
        "model_type": kind, "architectures": [names[kind]], "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": hidden // heads, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 1e5, "max_position_embeddings": 65536, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False,
        **({"no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 > 0) for i in range(layers)]}
           if kind == "smollm3" else {}),
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _shape("llama", 49152, 576, 1536, 30, 9, 3),
    "SmolLM2-1.7B": _shape("llama", 49152, 2048, 8192, 24, 32, 32),
    "SmolLM3-3B": _shape("smollm3", 128256, 2048, 11008, 36, 16, 4),
}


def shortened(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Its first layers."""
    cut = {"no_rope_layers": config["no_rope_layers"][:layers]} if "no_rope_layers" in config else {}
    return {**config, "num_hidden_layers": layers, **cut}


#: Sequences of a micro-batch, and lengths of the documents that each of them holds.
ROWS: Mapping[str, tuple[int, Sequence[int]]] = {
    "3 x 4k, packed": (3, (1000, 96, 2500, 500)),
    "1 x 32k": (1, (32768,)),
    "1 x 64k": (1, (65536,)),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model, its rows, and what is kept of it between its passes."""

    shape: str
    rows: str
    checkpointing: bool
    tiled: bool = False  #: the MLP

    @property
    def kept(self) -> str:
        """In a table."""
        return ("on, tiled MLP" if self.tiled else "on") if self.checkpointing else "off"

    def recipe(self) -> Recipe:
        sequences, documents = ROWS[self.rows]
        return Recipe.model_validate(
            {
                "name": "memory",
                "model": {"source": "-", "liger": "off", "tiled_mlp": "on" if self.tiled else "off",
                          "activation_checkpointing": self.checkpointing},
                "data": {
                    "sequence_length": sum(documents), "eos_token_id": 0,
                    "stages": [{"name": "only", "sources": [{"path": "-"}]}],
                },
                "schedule": {"train_steps": 1, "peak_lr": 1e-4, "warmup_steps": 0},
                "parallelism": {"micro_batch_sequences": sequences, "global_batch_sequences": sequences},
            }
        )  # fmt: skip


CELLS = (
    *(Cell(shape=s, rows=r, checkpointing=c) for s, r, c in itertools.product(CONFIGS, ROWS, (False, True))),
    *(Cell(shape=s, rows="1 x 64k", checkpointing=True, tiled=True) for s in CONFIGS),
)


# --- the oracle -------------------------------------------------------------------------------------------------------


class _Flash(torch.autograd.Function):
    """Allocates what torch's variable-length flash kernels do, and computes nothing.

    By ``mha_varlen_fwd`` and ``mha_varlen_bwd`` of torch's flash_api.cpp: the forward pass keeps queries, keys, values,
    the output and the log of each row's sum in fp32; the backward pass makes the three gradients, an fp32 one of the
    queries, a sum of each row, and keys' and values' gradients for every query head where those are fewer.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(each) for each in (query, key, value))
        beside = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums)]
        if key.shape[1] < query.shape[1]:
            beside += [torch.empty_like(query), torch.empty_like(query)]
        del beside
        return of_query, of_key, of_value


def flash_stand_in(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """A ``Kernel``: [1, T, H, D] of [1, heads, T, D]."""
    attended: torch.Tensor = _Flash.apply(*(each[0].transpose(0, 1) for each in (query, key, value)))
    return attended[None]


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """Bytes that torch's tracker saw in a forward and backward pass."""

    peak: int
    parameters: int
    gradients: int

    @property
    def activations(self) -> int:
        """All that is neither a weight nor its gradient, at the fullest."""
        return self.peak - self.parameters - self.gradients


def track(cell: Cell) -> Tracked:
    """A micro-batch like any but the first: gradients are there, and are added to."""
    given, documents = cell.recipe(), ROWS[cell.rows][1]
    sequences = given.parallelism.micro_batch_sequences
    positions = torch.cat([torch.arange(length) for length in documents]).expand(sequences, -1)

    def packed(_: torch.Tensor, device: torch.device, kernel: attention.Kernel, **options: Any) -> Packing:
        with unset_fake_temporarily():
            return attention.pack(positions, device, kernel, **options)

    as_on_a_gpu = (
        mock.patch.object(model, "pack", packed),
        mock.patch.object(attention, "_cpu_multiplies_bfloat16", lambda: True),
        mock.patch.dict(MAX_LOGITS, {"cpu": MAX_LOGITS["cuda"]}),
    )
    built: Any = model.build_model(CONFIGS[cell.shape], given.model, "meta")
    built.attention, built.attend = "varlen", flash_stand_in
    if tiles_mlp(given):
        tile_mlp(built, TILE_TOKENS)
    with as_on_a_gpu[0], as_on_a_gpu[1], as_on_a_gpu[2], FakeTensorMode():
        _to_fake(built)
        for parameter in built.parameters():
            parameter.grad = torch.empty_like(parameter)
        tokens = torch.zeros(sequences, sum(documents), dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(built)
        with tracker:
            built(input_ids=tokens, positions=tokens, labels=tokens)[0].backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        sizes = [each.numel() * each.element_size() for each in built.parameters()]
        return Tracked(peak=peak, parameters=sum(sizes), gradients=sum(sizes))


def _to_fake(built: torch.nn.Module) -> None:
    """Fake tensors on the CPU for its own on the meta device; a tied one stays one."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in built.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


#: The estimate's names for the rest, of one rank.
STATE = ("weights", "gradients", "fp32 gradients", "fp32 masters", "Adam's moments", "CUDA and NCCL")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Bytes by the tracker and by the estimate."""

    cell: Cell
    tracked: Tracked
    estimated: int  #: of activations, at the fullest
    largest: str  #: part of the estimate

    @property
    def peak(self) -> int:
        """The estimate's, with the weights and gradients that a pass finds."""
        return self.estimated + self.tracked.parameters + self.tracked.gradients

    @property
    def ratios(self) -> tuple[float, float]:
        return self.estimated / self.tracked.activations, self.peak / self.tracked.peak


def compare(cell: Cell) -> Compared:
    parts = memory_parts(cell.recipe(), spec_from_hf(CONFIGS[cell.shape]), 1)
    own = [part for part in parts if part.where == "gpu" and part.name not in STATE]
    return Compared(
        cell=cell, tracked=track(cell), estimated=sum(part.bytes for part in own),
        largest=max(own, key=lambda part: part.bytes).name,
    )  # fmt: skip


# --- real runs --------------------------------------------------------------------------------------------------------

#: Few layers of the 135M's shapes on a CPU, in float32: sequence length, checkpointing.
RUNS = ((1024, False), (2048, False), (2048, True))
RUN_CONFIG = {**CONFIGS["SmolLM2-135M"], "num_hidden_layers": 4, "vocab_size": 8192}
RUN_LIMIT = 0.15


def real_run(length: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a process takes more than before it made the model, in two steps, and the estimate's."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        grown = pool.apply(_grown, (length, checkpointing))
    parts = memory_parts(_run_recipe(length, checkpointing), spec_from_hf(RUN_CONFIG), 1, device="cpu")
    return grown, sum(part.bytes for part in parts)


def _run_recipe(length: int, checkpointing: bool) -> Recipe:
    given = Cell(shape="SmolLM2-135M", rows="1 x 32k", checkpointing=checkpointing).recipe().model_dump()
    given["model"]["dtype"] = "float32"
    given["data"]["sequence_length"] = length
    given["parallelism"]["zero_stage"] = 0
    return Recipe.model_validate(given)


def _grown(length: int, checkpointing: bool) -> int:
    """Resident memory at its highest, less what was resident when all had run once."""
    given = _run_recipe(length, checkpointing)
    small = {**RUN_CONFIG, "num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 48, "intermediate_size": 64,
             "num_attention_heads": 3, "head_dim": 16}  # fmt: skip
    _steps(small, given, 64)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest is forgotten
    _steps(RUN_CONFIG, given, length)
    return _resident("VmHWM") - before


def _steps(config: Mapping[str, Any], given: Recipe, length: int) -> None:
    built = model.build_model(config, given.model, "cpu")
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(0.01)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-4, fused=True)
    tokens = torch.arange(length)[None] % 100
    positions = torch.arange(length)[None]
    for _ in range(2):
        built(input_ids=tokens, positions=positions, labels=tokens)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


# --- the page ---------------------------------------------------------------------------------------------------------


def page(cells: Sequence[Compared], runs: Sequence[tuple[int, bool, int, int]], layers: int | None) -> str:
    which = "all layers" if layers is None else f"{layers} layers of each shape, which are alike"
    rows = [
        [
            each.cell.shape, each.cell.rows, each.cell.kept,
            f"{each.tracked.activations / 1e9:.2f}", f"{each.estimated / 1e9:.2f}", f"{each.ratios[0]:.3f}",
            f"{each.tracked.peak / 1e9:.2f}", f"{each.ratios[1]:.3f}", each.largest,
        ]
        for each in cells
    ]  # fmt: skip
    real = [
        [str(length), "on" if on else "off", f"{grown / 1e9:.3f}", f"{found / 1e9:.3f}", f"{found / grown:.3f}"]
        for length, on, grown, found in runs
    ]
    lines = [
        f"""# The estimate's memory beside what torch counts

Written by `python benchmarks/memory.py{"" if layers is None else f" --layers {layers}"}`, with torch
{torch.__version__}. No GPU took part.

## Fake tensors

torch's `MemTracker` over the training model's own forward and backward pass, on fake tensors of the CPU in bfloat16:
{which}. Products, the number of logits and what attention keeps and makes are those of a GPU: see the
script's first lines. Activations are all that is neither a weight nor its gradient, at the fullest moment; the peak is
with both. GB are 1e9 bytes; a ratio is the estimate by the tracker, and has to be within {LIMIT:.0%}. The last column
is the largest part of the estimate.
""",
        *markdown_table(
            ["model", "rows", "checkpointing", "activations", "estimate", "ratio", "peak", "ratio", "largest"], rows
        ),
        f"""
## Real runs

{RUN_CONFIG["num_hidden_layers"]} layers of SmolLM2-135M's shapes with 8,192 tokens, float32, two steps of AdamW in
a process on the CPU: by how much its resident memory grew at most, beside all parts of the estimate for the CPU, in GB.
Within {RUN_LIMIT:.0%}.
""",
        *markdown_table(["tokens", "checkpointing", "grew", "estimate", "ratio"], real),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of each shape (default: all)")
    layers = parser.parse_args().layers
    torch.set_num_threads(1)
    if layers is not None:
        CONFIGS.update({name: shortened(config, layers) for name, config in CONFIGS.items()})
    runs = []
    for length, on in RUNS:
        runs.append((length, on, *real_run(length, on)))
        say(f"{runs[-1]}")
    cells = []
    for cell in CELLS:
        cells.append(compare(cell))
        say(f"{cell.shape}, {cell.rows}, checkpointing {cell.checkpointing}: {cells[-1].ratios}")
    RESULTS.write_text(page(cells, runs, layers))


if __name__ == "__main__":
    main()
