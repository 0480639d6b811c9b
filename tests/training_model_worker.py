"""One rank of real DeepSpeed that trains our packed model: ``deepspeed_worker`` with another model and another loss.

A job's config.json may hold ``training``: fields of the recipe's ``model``, and ``tile_tokens`` of a tiled MLP.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed_worker as worker
import torch

from smolconv.continual_pretraining.engine.model import build_model, check_no_leak
from smolconv.continual_pretraining.engine.tiling import tile_mlp
from smolconv.continual_pretraining.recipe import schema as recipe
from smolconv.layouts.deepspeed.patches import gather_whole

#: Token ids below end a document.
ENDS = 6


class Packed(NamedTuple):
    """What the training forward takes."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


def packed(tokens: torch.Tensor) -> Packed:
    """Documents that end in tokens below ``ENDS``; ``tokens`` is [rows, S + 1], and the last one is only predicted."""
    inputs = tokens[:, :-1]
    positions = torch.zeros_like(inputs)
    for i in range(1, inputs.shape[1]):
        positions[:, i] = torch.where(inputs[:, i - 1] < ENDS, 0, positions[:, i - 1] + 1)
    labels = torch.where(inputs < ENDS, -100, tokens[:, 1:])
    return Packed(inputs, positions, labels)


def model_of(config: str | Path) -> torch.nn.Module:
    fields = json.loads(Path(config).read_text())
    given = {"dtype": "float32", **fields.pop("training", {})}
    tokens = given.pop("tile_tokens", None)
    model = build_model(fields, recipe.Model(source="-", **given), "cpu")
    if tokens is not None:
        gather_whole(tile_mlp(model, tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def mean_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    loss, targets = model(**packed(tokens)._asdict())
    return loss / targets


def start_engine(job: Any, world_size: int) -> Any:
    engine, names = original_start(job, world_size)
    fields = json.loads(Path(job["config"]).read_text())
    check_no_leak(engine, fields["vocab_size"], 24, "cpu")
    return engine, names


original_start = worker.start_engine

if __name__ == "__main__":
    worker.random_model, worker.language_model_loss, worker.start_engine = model_of, mean_loss, start_engine
    worker.main(Path(sys.argv[1]))
