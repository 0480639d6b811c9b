"""Writes a first recipe that can start, from a few answers: checkpoint, data and GPUs.

Sizes follow from the model and the machine; choices such as the learning rate come with their source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smolconv.continual_pretraining.estimate.flops import parameter_count
from smolconv.continual_pretraining.estimate.hardware import Gpu
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.estimate.plan import divisions_that_fit
from smolconv.continual_pretraining.recipe.files import parse_recipe
from smolconv.continual_pretraining.recipe.json_schema import with_modeline
from smolconv.continual_pretraining.recipe.nanotron import unique_names
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError, counted
from smolconv.models.spec import ModelSpec

#: Tokens per step on GPUs, and rows per step on a CPU, where a step should take seconds.
_STEP_TOKENS, _CPU_ROWS, _CPU_LENGTH = 1 << 18, 8, 256
#: (parameters up to, rate): a tenth of the peak in the pretraining of SmolLM2 135M and 360M, of 1.7B, and of SmolLM3.
_PEAK_RATES = ((1e9, 3e-4), (2.5e9, 5e-5), (float("inf"), 2e-5))
_CPU_STEPS, _STEPS = 20, 1000
#: Fewer steps of one epoch only if a step has one row for each rank. The first of them trains at rate 0.
_LEAST_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Data:
    """A folder of token files in a recipe."""

    path: str
    tokens: int | None  #: None: it does not exist yet


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers for a first recipe."""

    name: str
    source: str
    data: Sequence[Data]
    held_out: str | None
    eos_token_id: int
    gpus: int  #: 0: CPUs
    gpu: Gpu
    processes: int  #: on CPUs
    memory_bytes: int | None  #: of the machine, on CPUs
    steps: int | None  #: None: one epoch, 2 to 1,000 steps


def first_recipe(answers: Answers, spec: ModelSpec) -> str:
    """The YAML text. Raises ``UsageError`` if the model does not fit."""
    on_gpus = answers.gpus > 0
    length = min(spec.max_positions, (4096 if parameter_count(spec) > 1e9 else 2048) if on_gpus else _CPU_LENGTH)
    ranks = answers.gpus if on_gpus else answers.processes
    rows = ranks * max(1, round(_STEP_TOKENS / length / ranks)) if on_gpus else -(-_CPU_ROWS // ranks) * ranks
    tokens = None if any(one.tokens is None for one in answers.data) else sum(one.tokens or 0 for one in answers.data)
    if tokens is not None and answers.steps is None:  # a short text in smaller steps
        rows = min(rows, ranks * max(1, tokens // (_LEAST_STEPS * length * ranks)))
    division, fits = _division(answers, spec, length, rows, ranks)
    steps = answers.steps or _steps(tokens, rows * length, _STEPS if on_gpus else _CPU_STEPS)
    text = _text(answers, spec, length=length, rows=rows, steps=steps, division=division, fits=fits, tokens=tokens)
    parse_recipe(text, answers.name)  # checks it
    return with_modeline(text)


def _steps(tokens: int | None, step_tokens: int, most: int) -> int:
    return most if tokens is None else max(2, min(most, tokens // step_tokens))


@dataclass(frozen=True, kw_only=True)
class _Division:
    zero_stage: int = 1
    offload: str = "none"
    sequence_ranks: int = 1
    micro_batch_sequences: int = 1
    activation_checkpointing: bool = False
    activation_offload: bool = False


def _division(answers: Answers, spec: ModelSpec, length: int, rows: int, ranks: int) -> tuple[_Division, str]:
    """How a step is divided, and how much memory that takes, in words."""
    recipe = _base(length, rows, "bfloat16" if answers.gpus else "float32")
    if not answers.gpus:
        needed = ranks * sum(part.bytes for part in memory_parts(recipe, spec, ranks, device="cpu"))
        if answers.memory_bytes is not None and needed > answers.memory_bytes:
            raise UsageError(
                f"{ranks} process{'es' if ranks > 1 else ''} of this model need about {needed / 1e9:.1f} GB of memory, "
                f"and this machine has {answers.memory_bytes / 1e9:.1f} GB.\n"
                "Choose a smaller model, or GPUs (--gpus N --gpu NAME)."
            )
        return _Division(), f"about {needed / 1e9:.1f} GB of this machine's memory"
    plan = divisions_that_fit(recipe, spec, answers.gpus, answers.gpu, network=50e9)
    if not plan.options:
        nearest = plan.nearest
        lacks = plan.reason or (
            f"the smallest setting needs {nearest.gpu_bytes / 1e9:.0f} of {answers.gpu.memory_bytes / 1e9:.0f} GB a GPU"
            if nearest
            else ""
        )
        raise UsageError(
            f"{answers.source} cannot be trained on {counted(answers.gpus, answers.gpu.name + ' GPU')}: {lacks}.\n"
            "Use more GPUs, or larger ones; `smolconv plan` shows what fits."
        )
    best = plan.options[0]
    division = _Division(
        zero_stage=best.zero_stage, offload=best.offload, sequence_ranks=best.sequence_ranks,
        micro_batch_sequences=best.micro_batch_sequences, activation_checkpointing=best.activation_checkpointing,
        activation_offload=best.activation_offload,
    )  # fmt: skip
    share = f"about {best.gpu_bytes / 1e9:.0f} of {answers.gpu.memory_bytes / 1e9:.0f} GB of an {answers.gpu.name}"
    return division, f"{share}, {best.tokens_per_second:,.0f} tokens/s a GPU (estimated, as `smolconv plan` does)"


def _base(length: int, rows: int, dtype: str) -> Recipe:
    """The settings that memory and time of a step depend on."""
    return Recipe.model_validate({
        "name": "first", "model": {"source": "source", "dtype": dtype},
        "data": {"sequence_length": length, "eos_token_id": 0, "stages": [{"name": "a", "sources": [{"path": "a"}]}]},
        "schedule": {"train_steps": 1, "peak_lr": 1e-4}, "loss": {"normalisation": "tokens"},
        "parallelism": {"global_batch_sequences": rows},
    })  # fmt: skip


def _text(
    answers: Answers, spec: ModelSpec, *, length: int, rows: int, steps: int, division: _Division, fits: str,
    tokens: int | None,
) -> str:  # fmt: skip
    on_gpus, parameters = answers.gpus > 0, parameter_count(spec)
    rate = next(rate for most, rate in _PEAK_RATES if parameters <= most)
    every = max(1, steps // 4)
    size = "" if tokens is None else f"; {tokens:,} tokens in all, of which {steps * rows * length:,} are read"
    lines = [
        f"# Written by smolconv recipe init: {answers.source} continues with your data. Every field: docs/recipes.md",
        f"#   smolconv continue-train {answers.name}.yaml --dry-run     # its costs, and whether it can start",
        f"#   smolconv continue-train {answers.name}.yaml               # the same command resumes",
        f"name: {answers.name}",
        f"output: runs/{answers.name}",
        "",
        "model:",
        f"  source: {_quoted(answers.source)}  # {spec.architecture}, {parameters / 1e6:,.1f} M parameters",
        f"  dtype: {'bfloat16' if on_gpus else 'float32'}" + ("" if on_gpus else "  # most CPUs compute it faster"),
        *(["  activation_checkpointing: true"] if division.activation_checkpointing else []),
        *(["  activation_offload: true"] if division.activation_offload else []),
        "",
        "data:",
        f"  sequence_length: {length}",
        f"  eos_token_id: {answers.eos_token_id}  # ends a document",
        "  stages:",
        "  - name: all",
        f"    # Shares by size{size}.",
        "    sources:",
        *(
            f"    - {{path: {_quoted(one.path)}, weight: {_weight(one, answers.data)}{name}}}"
            for one, name in zip(answers.data, _source_names(answers.data))
        ),
        "",
        "schedule:",
        f"  train_steps: {steps}  # of {rows * length:,} tokens",
        f"  peak_lr: {rate:g}  # a tenth of the peak that such a model was pretrained with",
        f"  warmup_steps: {min(100, steps // 10)}",
        "  decay: linear",
        f"  decay_steps: {max(1, steps // 5)}",
        "",
        "loss:",
        "  normalisation: tokens  # so that the micro-batch size may change during the run",
        "",
        f"parallelism:  # {fits}",
        f"  zero_stage: {division.zero_stage}",
        *([f"  offload: {division.offload}"] if division.offload != "none" else []),
        *([f"  sequence_ranks: {division.sequence_ranks}"] if division.sequence_ranks > 1 else []),
        f"  micro_batch_sequences: {division.micro_batch_sequences}",
        f"  global_batch_sequences: {rows}",
        "",
        "checkpoints:", f"  every_steps: {every}", "  keep: 2",
        "",
        *_evaluation(answers, every),
        "",
        "export: {}  # a Hugging Face folder after the last step, verified",
        "",
        *_launch(answers),
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def _launch(answers: Answers) -> list[str]:
    ranks = min(8, answers.gpus) if answers.gpus else answers.processes
    several = [f"  nodes: {answers.gpus // 8}", "  launcher: slurm"] if answers.gpus > 8 else []
    return ["launch:", f"  ranks_per_node: {ranks}", *several]


def _evaluation(answers: Answers, every: int) -> list[str]:
    if answers.held_out is None:
        return [
            "# Loss on text that is not trained on: tokenize --hold-out 0.5% sets some aside. Then uncomment this.",
            "# evaluation:", f"#   every_steps: {every}", "#   sources:", "#   - {path: tokens/held-out}",
        ]  # fmt: skip
    return [
        "evaluation:  # before the first step, and then regularly", f"  every_steps: {every}", "  sources:",
        f"  - {{path: {_quoted(answers.held_out)}}}",
    ]  # fmt: skip


def _source_names(data: Sequence[Data]) -> list[str]:
    """``, name: NAME`` for folders whose own name is not unique."""
    paths = [one.path for one in data]
    return [
        "" if name == path.rpartition("/")[2] else f", name: {_quoted(name)}"
        for path, name in zip(paths, unique_names(paths))
    ]


def _weight(one: Data, all_: Sequence[Data]) -> str:
    if any(each.tokens is None for each in all_):
        return f"{1 / len(all_):.4g}"
    return f"{(one.tokens or 0) / max(1, sum(each.tokens or 0 for each in all_)):.4g}"


def _quoted(text: str) -> str:
    """Text quoted for YAML, also within a flow mapping."""
    return (
        text if re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./:@+-]*", text) and not _is_number(text) else json.dumps(text)
    )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+.0-9eE_]+|true|false|null", text, re.IGNORECASE) is not None


def recipe_name(path: Path) -> str:
    """The run's name for this recipe file."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-.") or "run"
