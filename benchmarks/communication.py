"""Count what the ranks of a training step send each other, beside the least possible: results/communication.md.

    python benchmarks/communication.py     2 to 384 ranks, 2 to 8 that share rows; 4 minutes on 2 cores

One process is rank 0 of a process group that sends nothing (torch's "fake"), with the engine and the DeepSpeed
configuration that a run on GPUs would have. What is counted depends on shapes alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from common import REPOSITORY, markdown_table, say

from smolconv.continual_pretraining.engine.config import engine_config
from smolconv.continual_pretraining.estimate.communication import zero_traffic
from smolconv.continual_pretraining.estimate.hardware import GPUS_OF_A_NODE, H100
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.layouts.deepspeed import patches

RESULTS = REPOSITORY / "benchmarks" / "results" / "communication.md"
WORLDS = (2, 4, 8, 96, 384)
SHARED = (2, 4, 8)
#: Layers of SmolLM2-135M's shapes, few of them: payload is proportional to the parameters.
LAYERS = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
TINY = {**LAYERS, "vocab_size": 512, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
#: SmolLM3-3B's attention in four layers, one of them NoPE; what else a layer has is not sent between ranks of a row.
ATTENTION = {
    **LAYERS, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 64, "hidden_size": 2048,
    "intermediate_size": 64, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
#: Of the recipe smollm3-3b-long-context-64k: layers, tokens of a row, rows of a step.
SMOLLM3_LAYERS, LONG_ROW, LONG_ROWS = 36, 65_536, 36
PARAMETERS = {"SmolLM2-135M": 134_515_008, "SmolLM2-1.7B": 1_711_376_384, "SmolLM3-3B": 3_075_098_624}
#: Bytes a second that a GPU sends: assumptions, taken from data sheets and not reached by any collective.
NVLINK, INFINIBAND = H100.link_bandwidth, 50e9
RANKS_OF_A_NODE = GPUS_OF_A_NODE

#: What a rank sends on average, of the bytes of one tensor, in rings of n ranks: which argument the tensor is, and how
#: often its bytes are sent. A reduction or broadcast goes along a chain, whose last rank sends nothing.
SENT: Mapping[str, tuple[int, str, Callable[[int], float]]] = {
    "all_reduce": (0, "tensor", lambda n: 2 * (n - 1) / n),
    "reduce": (0, "tensor", lambda n: (n - 1) / n),
    "broadcast": (0, "tensor", lambda n: (n - 1) / n),
    "all_gather_into_tensor": (1, "input_tensor", lambda n: n - 1),
    "all_gather": (1, "tensor", lambda n: n - 1),
    "reduce_scatter_tensor": (0, "output", lambda n: n - 1),
    "reduce_scatter": (0, "output", lambda n: n - 1),
    "all_to_all_single": (1, "input", lambda n: (n - 1) / n),
}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of call."""

    name: str
    dtype: str
    ranks: int


class Payload:
    """What this rank has sent since it was made or last taken."""

    def __init__(self) -> None:
        self.calls: Counter[Collective] = Counter()
        self.sent: Counter[Collective] = Counter()

    def count(self) -> None:
        """From now on. To be called before ``torch.distributed`` is initialised: DeepSpeed keeps its functions."""
        for name, (place, keyword, times) in SENT.items():
            wrapped = self._wrapped(getattr(torch.distributed, name), name, place, keyword, times)
            for module in (torch.distributed, torch.distributed.distributed_c10d):
                setattr(module, name, wrapped)

    def _wrapped(
        self, collective: Callable[..., Any], name: str, place: int, keyword: str, times: Callable[[int], float]
    ) -> Callable[..., Any]:
        @functools.wraps(collective)
        def counted(*given: Any, **named: Any) -> Any:
            tensor = named[keyword] if keyword in named else given[place]
            ranks = torch.distributed.get_world_size(named.get("group"))
            key = Collective(name=name, dtype=str(tensor.dtype).removeprefix("torch."), ranks=ranks)
            self.calls[key] += 1
            self.sent[key] += round(tensor.numel() * tensor.element_size() * times(ranks))
            return collective(*given, **named)

        return counted

    def taken(self) -> list[dict[str, Any]]:
        """Calls and bytes by collective, the largest first; counting restarts."""
        found = [{**vars(key), "calls": self.calls[key], "bytes": self.sent[key]} for key in self.sent]
        self.calls.clear()
        self.sent.clear()
        return sorted(found, key=lambda line: (-int(line["bytes"]), str(line["name"])))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step whose traffic is counted."""

    world_size: int
    zero_stage: int
    dtype: str = "bfloat16"
    accumulation: int = 1
    reduce_dtype: str = "float32"
    backend: str = "nccl"  #: whose configuration; "gloo" is also what smolconv used to give NCCL
    #: More parameters than DeepSpeed keeps gathered in ZeRO-3, 1e9: made so by its limits, whatever the model has.
    large: bool = False

    def recipe(self) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "communication", "model": {"source": "-", "dtype": self.dtype},
                "data": {
                    "sequence_length": 16, "eos_token_id": 0,
                    "stages": [{"name": "only", "sources": [{"path": "-"}]}],
                },
                "schedule": {"train_steps": 1, "peak_lr": 1e-4, "warmup_steps": 0},
                "parallelism": {
                    "zero_stage": self.zero_stage, "reduce_dtype": self.reduce_dtype,
                    "global_batch_sequences": self.world_size * self.accumulation,
                },
            }
        )  # fmt: skip

    def least(self, parameters: int) -> float:
        """Bytes a rank must send in a step at this stage."""
        weight, gradient = (2 if dtype == "bfloat16" else 4 for dtype in (self.dtype, self.reduce_dtype))
        return zero_traffic(
            self.zero_stage, parameters, self.world_size, self.accumulation, weight_bytes=weight,
            gradient_bytes=gradient, gathers_for_each_pass=self.large,
        ).bytes  # fmt: skip


def measure(case: Case, config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters and the payload of the second step. In a process of its own, before which nothing was counted."""
    payload = Payload()
    payload.count()
    _pretend(case.world_size)
    import deepspeed

    from smolconv.continual_pretraining.engine.model import build_model
    from smolconv.continual_pretraining.engine.optimizer import group_parameters, torch_groups
    from smolconv.models.huggingface import spec_from_hf
    from smolconv.models.registry import family_of

    given = case.recipe()
    torch.manual_seed(0)
    model = build_model(config, given.model, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    parameters = dict(model.named_parameters())
    groups = torch_groups(
        group_parameters(parameters, given.optimizer, tied=True, family=family_of(spec_from_hf(config))), parameters
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    made = engine_config(given, case.world_size, case.backend)
    if case.large:
        limits = ("max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
        made["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=made)
    patches.scatter_gradients(engine)
    tokens = torch.arange(16)[None]
    for _ in range(2):
        payload.taken()
        for _ in range(case.accumulation):
            engine.backward(engine(input_ids=tokens, positions=tokens, labels=tokens)[0])
            engine.step()
    count = sum(int(getattr(each, "ds_numel", each.numel())) for each in parameters.values())
    return {"parameters": count, "least": case.least(count), "collectives": payload.taken()}


def _pretend(world_size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    patches.without_shared_memory_operations()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def measured(cases: Sequence[Case], config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each case in a fork of this process."""
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.muon.original_muon

    # What each fork would spend most of its time on: importing torch.compile for a Muon, and looking for compilers.
    _ = deepspeed.ops.__compatible_ops__
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(functools.partial(measure, config=config), cases)


def measure_shared(size: int) -> dict[str, Any]:
    """What a rank sends of one micro-batch that ``size`` of them share, by whether activations are checkpointed.

    In a process of its own. The ranks' tokens are noise; how many they are is all that matters.
    """
    payload = Payload()
    payload.count()
    _pretend(size)
    from smolconv.continual_pretraining.engine.model import build_model
    from smolconv.continual_pretraining.engine.sequence import SequenceRanks
    from smolconv.continual_pretraining.recipe.schema import Model

    ranks, tokens = SequenceRanks(rank=0, size=size, group=torch.distributed.group.WORLD), torch.arange(16)[None]
    found: dict[str, Any] = {"tokens": tokens.numel() // size, "layers": ATTENTION["num_hidden_layers"]}
    for name, checkpointing in (("kept", False), ("checkpointed", True)):
        given = Model(source="-", activation_checkpointing=checkpointing)
        model = build_model(ATTENTION, given, "cpu", ranks)
        payload.taken()
        model(input_ids=tokens, positions=tokens, labels=tokens)[0].backward()
        found[name] = payload.taken()
    return found


def sent_at_64k(found: Mapping[str, Any], size: int, how: str) -> float:
    """Bytes that a rank of SmolLM3-3B sends of one micro-batch of 64k tokens."""
    counted = sum(int(line["bytes"]) for line in found[how]) / found["layers"] / found["tokens"]
    return counted * SMOLLM3_LAYERS * LONG_ROW / size


def total(found: Mapping[str, Any]) -> int:
    return sum(int(line["bytes"]) for line in found["collectives"])


# --- the page ---------------------------------------------------------------------------------------------------------

#: Title, and the case but for its number of ranks.
ROWS: Mapping[str, Mapping[str, Any]] = {
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-1, 4 micro-batches": {"zero_stage": 1, "accumulation": 4},
    "ZeRO-1, reduce_dtype bfloat16": {"zero_stage": 1, "reduce_dtype": "bfloat16"},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-2, 4 micro-batches": {"zero_stage": 2, "accumulation": 4},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-3, over 1e9 parameters": {"zero_stage": 3, "large": True},
    "as before: ZeRO-1": {"zero_stage": 1, "backend": "gloo"},
    "as before: ZeRO-2": {"zero_stage": 2, "backend": "gloo"},
    "as before: ZeRO-2, 4 micro-batches": {"zero_stage": 2, "accumulation": 4, "backend": "gloo"},
}
#: Of the last table: a row of the first one for each column.
COLUMNS = ("as before: ZeRO-1", "ZeRO-1", "ZeRO-1, reduce_dtype bfloat16", "ZeRO-3")


def page(found: Mapping[str, Mapping[int, dict[str, Any]]], shared: Mapping[int, dict[str, Any]]) -> str:
    """The tables of ``found``, by row and number of ranks, and of ``shared``, by how many share a row."""
    worlds, layers = sorted(next(iter(found.values()))), LAYERS["num_hidden_layers"]
    factors = [
        [title, *(f"{total(by_world[n]) / by_world[n]['least']:.2f}" for n in worlds)]
        for title, by_world in found.items()
    ]
    calls = [
        [title, line["name"], line["dtype"], str(line["calls"]), f"{line['bytes'] / 1e6:.1f}"]
        for title, by_world in found.items()
        for line in by_world[8]["collectives"]
        if line["bytes"] >= 1e4
    ]
    seconds = [
        [name, str(n), *(_moved(found, row, n, parameters) for row in COLUMNS)]
        for name, parameters in PARAMETERS.items()
        for n in (8, 96, 384)
        if n in worlds
    ]
    text = (
        f"""# What ranks send each other

Written by `benchmarks/communication.py`: {layers} layers of SmolLM2-135M's shapes, bfloat16, NCCL's configuration,
one step of one micro-batch unless said. Nothing was sent, and nothing here was measured on a GPU: calls, dtypes and
sizes were counted on rank 0.

Payload is what a rank sends on average in rings of n ranks, where the whole tensor has B bytes: all-reduce 2(n-1)/n·B;
reduce-scatter, all-gather, reduce, broadcast and all-to-all (n-1)/n·B.

## Payload of a step, as a multiple of the least

The least, for N parameters in bfloat16 and float32 gradients, each times (n-1)/n:

| | bytes |
|---|---|
| ZeRO-0 | 8N: gradients summed on all ranks |
| ZeRO-1 | 4N + 2N: gradients scattered once, weights gathered once |
| ZeRO-2 | 4N for every micro-batch + 2N |
| ZeRO-3 | 4N for every micro-batch + 2N; over 1e9 parameters 4N + 4N for every micro-batch: weights for each pass |

With `reduce_dtype: bfloat16` a gradient has 2 bytes instead of 4. In ZeRO-3 over 1e9 parameters DeepSpeed gathers a
tied embedding for its use as the head once more. It is a quarter of this model, but 6 % of SmolLM2-1.7B and 9 % of
SmolLM3-3B, so that the last table shows up to 10 % too much for their ZeRO-3.
""",
        *markdown_table(["ranks", *map(str, worlds)], factors),
        """
## Collectives of a step at 8 ranks

Those of less than 0.01 MB are left out: norms, overflow flags, losses.
""",
        *markdown_table(["", "collective", "dtype", "calls", "MB a rank"], calls),
        f"""
## What NCCL would move

By the same counts, per rank and step, with the time it takes at {NVLINK / 1e9:.0f} GB/s a GPU within a node of
{RANKS_OF_A_NODE} (NVLink) and at {INFINIBAND / 1e9:.0f} GB/s beyond (400 Gb/s InfiniBand). Both are assumptions,
from data sheets. Collectives reach less, and latencies are left out.
""",
        *markdown_table(["model", "ranks", *COLUMNS], seconds),
        f"""
## Ranks that share rows

Sequence parallelism sends queries, keys and values before attention, and what attention gives after it: two all-to-alls
a layer in the forward pass, and two in the backward pass. Activation checkpointing, which the long-context recipes
have, repeats those of the forward pass. Where the ranks do not divide the 4 key/value heads, these are sent so often
that each rank has one.

SmolLM3-3B at 64k tokens, bfloat16: what a rank sends of a micro-batch of one row, with the time at
{NVLINK / 1e9:.0f} GB/s, an assumption as above. Ranks that share rows are neighbours, so that up to {RANKS_OF_A_NODE}
of them are in one node. The published step has {LONG_ROWS} rows: groups of 8 on 96 ranks take {LONG_ROWS * 8 // 96}
each, {LONG_ROWS * 8 // 96 * sent_at_64k(shared[8], 8, "checkpointed") / 1e9:.1f} GB, beside ZeRO-1's
{_moved(found, "ZeRO-1", 96, PARAMETERS["SmolLM3-3B"])} over InfiniBand.
""",
        *markdown_table(
            ["ranks of a row", "activations", "all-to-alls a layer", "MB a layer", "a micro-batch"],
            [_shared_row(counts, size, how) for size, counts in shared.items() for how in ("kept", "checkpointed")],
        ),
    )
    return "\n".join(text) + "\n"


def _shared_row(counts: Mapping[str, Any], size: int, how: str) -> list[str]:
    calls, sent = sum(line["calls"] for line in counts[how]), sent_at_64k(counts, size, how)
    return [
        str(size), how, f"{calls / counts['layers']:g}", f"{sent / SMOLLM3_LAYERS / 1e6:.0f}",
        f"{sent / 1e9:.2f} GB, {sent / NVLINK:.3f} s",
    ]  # fmt: skip


def _moved(found: Mapping[str, Mapping[int, dict[str, Any]]], row: str, ranks: int, parameters: int) -> str:
    if row == "ZeRO-3" and parameters > 1e9:
        row = "ZeRO-3, over 1e9 parameters"
    moved = total(found[row][ranks]) / found[row][ranks]["parameters"] * parameters
    return f"{moved / 1e9:.2f} GB, {moved / (NVLINK if ranks <= RANKS_OF_A_NODE else INFINIBAND):.3f} s"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    cases = [(title, n, Case(world_size=n, **row)) for title, row in ROWS.items() for n in WORLDS]
    found: dict[str, dict[int, dict[str, Any]]] = {title: {} for title in ROWS}
    counts = measured([case for *_, case in cases], LAYERS)
    for (title, n, _), counted in zip(cases, counts):
        found[title][n] = counted
        say(
            f"{title} on {n} ranks: {total(counted) / 1e6:.1f} MB, {total(counted) / counted['least']:.3f} of the least"
        )
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        shared = dict(zip(SHARED, pool.map(measure_shared, SHARED, chunksize=1)))
    for size, counted in shared.items():
        say(f"{size} ranks of a row: {sent_at_64k(counted, size, 'checkpointed') / 1e9:.2f} GB of 64k tokens")
    RESULTS.write_text(page(found, shared))
    RESULTS.with_suffix(".json").write_text(json.dumps({**found, "shared rows": shared}, indent=1) + "\n")


if __name__ == "__main__":
    main()
