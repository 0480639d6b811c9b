"""Recipes and runs for tests: tiny models, token files of random documents, the worker in forked processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forked_worker import work

from smolconv.continual_pretraining.recipe.schema import Recipe

EOS = 0
#: Of the tiny oracles' vocabularies.
VOCABULARY = 256


def token_folder(
    folder: Path,
    *,
    documents: int = 200,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
    lengths: tuple[int, int] = (3, 40),
) -> Path:
    """Random documents in datatrove's files; each ends in the EOS, which is nowhere else."""
    draw = np.random.default_rng(seed)
    parts = [np.append(draw.integers(1, vocabulary, draw.integers(*lengths)), EOS) for _ in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    tokens, ends = np.concatenate(parts), np.cumsum([len(part) for part in parts])
    tokens.astype("<u2").tofile(folder / "00000_unshuffled.ds")
    ends.astype("<u8").tofile(folder / "00000_unshuffled.ds.index")
    (folder / "00000_unshuffled.ds.metadata").write_text(f"tests/random|2\n{len(tokens)}\n{len(tokens)} T")
    return folder


def recipe_document(source: Path, tokens: Path | Sequence[Path], **changes: Any) -> dict[str, Any]:
    """A recipe for a few steps on CPU; ``changes`` are sections, merged into it at any depth."""
    folders = [tokens] if isinstance(tokens, Path) else list(tokens)
    document: dict[str, Any] = {
        "name": "test",
        "model": {"source": str(source), "dtype": "float32"},
        "data": {
            "sequence_length": 32, "eos_token_id": EOS,
            "stages": [{"name": "only", "sources": [{"path": str(folder)} for folder in folders]}],
        },
        "schedule": {"train_steps": 4, "peak_lr": 1e-3, "warmup_steps": 2},
        "optimizer": {"weight_decay": 0.1, "no_decay": [".*embed_tokens.*"]},  # two groups, as SmolLM3's
        "parallelism": {"zero_stage": 1, "micro_batch_sequences": 1, "global_batch_sequences": 4, "threads": 1},
        "checkpoints": {"every_steps": 1000},
    }  # fmt: skip
    return _merged(document, changes)


def recipe(source: Path, tokens: Path | Sequence[Path], **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe_document(source, tokens, **changes))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        below = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if below else value
    return result


def train(
    document: Mapping[str, Any], run: Path, world_size: int = 1, resume: str = "auto", before: str = ""
) -> list[dict[str, Any]]:
    """Run to the end; the lines of metrics.jsonl. ``before`` is Python that each rank executes first."""
    ended = work(document, run, world_size, resume, before)
    assert ended.code == 0, ended.log[-6000:]
    return metrics(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]
