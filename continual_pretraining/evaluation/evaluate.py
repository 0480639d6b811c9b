"""Evaluates checkpoints of any layout on tasks and on held-out token files, and compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from smolconv.continual_pretraining.evaluation.bootstrap import Comparison, compare
from smolconv.continual_pretraining.evaluation.held_out import (
    HeldOut,
    HeldOutScore,
    open_held_out,
    score_held_out,
    token_bytes,
    work_of,
)
from smolconv.continual_pretraining.evaluation.models import (
    Evaluated,
    forward_of,
    huggingface_folder,
    load_model,
    load_tokenizer,
    open_evaluated,
    require_tokenizer,
    work_folder,
)
from smolconv.continual_pretraining.evaluation.tasks import TaskScore, check_include
from smolconv.errors import NotInstalled, UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.parsing import finite_json
from smolconv.progress import Bar


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Settings of an evaluation."""

    tasks: Sequence[str] = ()
    include: Path | None = None  #: folder of further tasks
    held_out: Sequence[Path] = ()
    engine: str = "lm-eval"  #: or "lighteval"
    engine_python: str | None = None  #: Python of lighteval's own environment
    limit: int | None = None  #: documents of each task and held-out folder
    seed: int = 0
    length: int = 2048  #: context length for held-out documents
    eos: int | None = None  #: token that ends held-out documents without an index
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 8
    tokenizer: Path | None = None
    work: Path | None = None
    read: ReadOptions = field(default_factory=lambda: ReadOptions(optimizer=False))
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The results of one checkpoint."""

    name: str
    source: str
    layout: str
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    held_out: dict[str, HeldOutScore] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source,
            "layout": self.layout,
            "tasks": {name: score.to_json() for name, score in self.tasks.items()},
            "held_out": {name: score.to_json() for name, score in self.held_out.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All checkpoints, each compared with the first."""

    scores: Sequence[Scores]
    comparisons: Sequence[Comparison]
    notes: Sequence[str]
    options: EvaluateOptions

    def to_json(self) -> dict[str, Any]:
        given = self.options
        document: dict[str, Any] = {
            "schema": 1,
            "engine": given.engine if given.tasks else None,
            "dtype": given.dtype, "device": given.device, "limit": given.limit, "seed": given.seed,
            "length": given.length,
            "checkpoints": [each.to_json() for each in self.scores],
            "comparisons": [each.to_json() for each in self.comparisons],
            "notes": list(self.notes),
        }  # fmt: skip
        plain: dict[str, Any] = finite_json(document)
        return plain


class TaskEngine(Protocol):
    """The interface of a program that runs tasks."""

    def __call__(self, evaluated: Evaluated, work: Path) -> dict[str, TaskScore]: ...


def evaluate(names: Sequence[str], options: EvaluateOptions, bar: Bar) -> Evaluation:
    """Evaluate every checkpoint, and compare each with the first one.

    Errors in arguments, folders, packages and headers are found before any model is loaded.
    """
    if not options.tasks and not options.held_out:
        raise UsageError("nothing to evaluate: give --tasks NAME, --held-out TOKENS, or both.")
    _require_packages()
    check_include(options.include)
    held_out = [
        open_held_out(path, eos=options.eos, limit=options.limit, seed=options.seed) for path in options.held_out
    ]
    labels = _labels(held_out)
    checkpoints = [open_evaluated(name, options.read, options.tokenizer) for name in names]
    run_tasks = _engine(options, checkpoints) if options.tasks else None
    notes = [f"{each.name}: {warning}" for each in checkpoints for warning in each.checkpoint.warnings]
    scores = []
    for evaluated in checkpoints:
        found = Scores(name=evaluated.name, source=str(evaluated.checkpoint.root), layout=evaluated.checkpoint.layout)
        if held_out:
            found.held_out.update(zip(labels, _held_out(evaluated, held_out, options, bar, notes)))
        if run_tasks is not None:
            with work_folder(options.work) as work:
                found.tasks.update(run_tasks(evaluated, work))
        scores.append(found)
    comparisons = [each for other in scores[1:] for each in _compared(scores[0], other, options.seed)]
    return Evaluation(scores=scores, comparisons=comparisons, notes=list(dict.fromkeys(notes)), options=options)


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "tokenizers") if find_spec(name) is None]
    if missing:
        raise NotInstalled(
            f"evaluating needs {', '.join(missing)}.\nExpected torch and transformers in smolconv's environment.\n"
            f"Install them: pip install {' '.join(missing)}"
        )


def _labels(held_out: Sequence[HeldOut]) -> list[str]:
    """Names of sources: the folder's name, or its path if two have the same name."""
    names = [each.name for each in held_out]
    return [str(each.path) if names.count(each.name) > 1 else each.name for each in held_out]


def _held_out(
    evaluated: Evaluated, held_out: Sequence[HeldOut], options: EvaluateOptions, bar: Bar, notes: list[str]
) -> list[HeldOutScore]:
    side = forward_of(evaluated, options.dtype, options.device)
    sizes = None
    if evaluated.tokenizer_file is not None:
        sizes = token_bytes(evaluated.tokenizer_file, evaluated.vocab_size)
    if sizes is None:
        why = "has no tokenizer.json" if evaluated.tokenizer_file is None else "has a tokenizer that is not byte-level"
        notes.append(f"{evaluated.name} {why}, so bits per byte are not known; losses are per token.")
    length = min(options.length, side.max_positions)
    found = []
    for each in held_out:
        with bar(f"{each.name} of {evaluated.name}", work_of(each, side.num_layers)) as progress:
            found.append(
                score_held_out(
                    side, each, length=length, vocab_size=evaluated.vocab_size, sizes=sizes, progress=progress
                )
            )
    return found


def _engine(options: EvaluateOptions, checkpoints: Sequence[Evaluated]) -> TaskEngine:
    for evaluated in checkpoints:
        require_tokenizer(evaluated)
    if options.engine == "lighteval":
        from smolconv.continual_pretraining.evaluation.lighteval_engine import Lighteval

        lighteval = Lighteval(options.tasks, options.include, python=options.engine_python)

        def by_lighteval(evaluated: Evaluated, work: Path) -> dict[str, TaskScore]:
            return lighteval.score(
                huggingface_folder(evaluated, work), work, limit=options.limit, batch_size=options.batch_size,
                dtype=options.dtype, device=options.device,
            )  # fmt: skip

        return by_lighteval
    from smolconv.continual_pretraining.evaluation.lm_eval_engine import LmEval

    lm_eval = LmEval(options.tasks, options.include, quiet=options.quiet)

    def by_lm_eval(evaluated: Evaluated, work: Path) -> dict[str, TaskScore]:
        tokenizer = load_tokenizer(evaluated, work)
        model = load_model(evaluated, options.dtype, options.device)
        return lm_eval.score(
            model, tokenizer, limit=options.limit, batch_size=options.batch_size, device=options.device
        )

    return by_lm_eval


# --- comparisons -----------------------------------------------------------------------------------------------------


def _compared(first: Scores, other: Scores, seed: int) -> list[Comparison]:
    found = [
        compare(
            checkpoint=other.name, against=first.name, on=name, metric="nll", difference=score.nll - before.nll,
            weights=score.tokens, higher_is_better=False, seed=seed,
        )
        for name, score in other.held_out.items()
        if (before := first.held_out[name])
    ]  # fmt: skip
    for name, task in other.tasks.items():
        earlier = first.tasks.get(name)
        for metric, values in task.by_sample.items():
            known = {} if earlier is None else earlier.by_sample.get(metric, {})
            shared = [sample for sample in values if sample in known]
            if shared and metric in task.metrics:
                difference = np.array([values[sample] - known[sample] for sample in shared])
                found.append(
                    compare(
                        checkpoint=other.name, against=first.name, on=name, metric=metric, difference=difference,
                        higher_is_better=task.higher_is_better.get(metric, True), seed=seed,
                    )
                )  # fmt: skip
    return found
