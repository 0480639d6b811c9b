"""The start gate: the first loss of a run must be that of the model it starts from.

The source's loss comes from ``verify``'s forward on the source's own tensors, in float32, each document alone: neither
the conversion, nor the training model, nor packing takes part in it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smolconv.errors import TrainingStopped
from smolconv.verification.forward import ForwardPass, Side, return_freed_memory

if TYPE_CHECKING:
    import torch

    from smolconv.continual_pretraining.tokens.files import Batch

#: Of nats, by the dtype that the run computes in. Two correct float32 forwards of the 135M differ by 1e-6, bfloat16
#: from float32 by up to 0.01.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
_VOCABULARY_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class SourceLoss:
    """The source model's mean loss over the targets of the first micro-batch."""

    loss: float
    targets: int
    forward: str  #: for people: whose code ran on which tensors


def source_loss(side: Side, batch: Batch) -> SourceLoss:
    """Lead the source through every document of the batch, one block of weights in memory at a time.

    What it took of a GPU's memory is given back, to the training that follows in this process and to NCCL.
    """
    import torch

    found = _source_loss(side, batch)
    torch.cuda.empty_cache()
    return found


def _source_loss(side: Side, batch: Batch) -> SourceLoss:
    import torch

    runs, labels = [], []
    for tokens, positions, wanted in zip(batch.input_ids, batch.positions, batch.labels):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
        for start, stop in itertools.pairwise(starts):
            runs.append(
                ForwardPass(
                    tokens=torch.from_numpy(tokens[None, start:stop].copy()),
                    positions=torch.arange(stop - start)[None],
                    attention="sdpa",
                )
            )
            labels.append(torch.from_numpy(wanted[start:stop].copy()))
    with torch.inference_mode():
        side.begin(runs)
        for layer in range(side.num_layers):
            side.advance(layer, runs)
            return_freed_memory()
        side.finish(runs)
        hidden = torch.cat([run.hidden[0] for run in runs])
        targets = torch.cat(labels).to(hidden.device)
        chosen = targets >= 0
        loss = _cross_entropy(side, hidden[chosen].float(), targets[chosen]) if chosen.any() else 0.0
    return SourceLoss(loss=loss, targets=int(chosen.sum()), forward=side.title)


def _cross_entropy(side: Side, hidden: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean over the rows of ``hidden`` [N, E]; the vocabulary is walked in chunks."""
    import torch

    total = torch.full((len(hidden),), float("-inf"), dtype=torch.float64, device=hidden.device)
    found = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    for start in range(0, side.vocab_size, _VOCABULARY_ROWS):
        stop = min(start + _VOCABULARY_ROWS, side.vocab_size)
        logits = (hidden @ side.head_rows(start, stop).float().T).double()
        total = torch.logaddexp(total, logits.logsumexp(-1))
        inside = (targets >= start) & (targets < stop)
        found[inside] = logits[inside, targets[inside] - start]
    return float((total - found).mean())


def check_first_loss(
    loss: float, targets: int, source: SourceLoss, *, dtype: str, tolerance: float | None
) -> None:  # fmt: skip
    """Raise ``TrainingStopped`` when the run's first loss, a mean over so many targets, is not the source model's."""
    if targets != source.targets:
        raise TrainingStopped(
            f"the first micro-batch has {source.targets} targets, but its loss was taken over {targets} of them.\n"
            "Ranks that share a micro-batch have lost some or counted some twice, so nothing was trained.\n"
            "Set parallelism.sequence_ranks to 1, and please report this."
        )
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    if not abs(loss - source.loss) <= limit:
        raise TrainingStopped(
            f"the first micro-batch has loss {loss:.6f}, but the source model's is {source.loss:.6f} "
            f"({source.forward}; {source.targets} targets): they may differ by {limit:g}.\n"
            "What would be trained is not the model that was given, so nothing was trained. Compare the two with "
            "smolconv verify; start.gate_tolerance widens the gate, start.gate: false removes it."
        )
