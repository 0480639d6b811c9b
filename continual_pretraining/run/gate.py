"""The start gate: a run's first loss must equal the loss of the model that it starts from.

The source's loss comes from ``verify``'s forward pass on the source's own tensors, in float32, one document at a time:
it does not use the conversion, the training model or packing.
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

#: In nats, by the dtype in which the run computes. Two correct float32 forward passes of the 135M differ by 1e-6,
#: bfloat16 from float32 by up to 0.01.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
_VOCABULARY_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class SourceLoss:
    """The source model's mean loss over the targets of the first micro-batch."""

    loss: float
    targets: int
    forward: str  #: for messages: whose code ran on which tensors


def source_loss(side: Side, batch: Batch) -> SourceLoss:
    """Compute the source's loss over every document of the batch, with one block of weights in memory at a time.

    Afterwards it releases GPU memory for training in this process and for NCCL.
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
    """Mean loss over the rows of ``hidden`` [N, E], computed in chunks."""
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
    """Raise ``TrainingStopped`` if the run's first loss, a mean over ``targets``, is not the source model's."""
    if targets != source.targets:
        raise TrainingStopped(
            f"the first micro-batch has {source.targets} targets, but its loss covers {targets} of them.\n"
            "Ranks that share a micro-batch have lost some or counted some twice, so nothing was trained.\n"
            "Set parallelism.sequence_ranks to 1, and please report this."
        )
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    if not abs(loss - source.loss) <= limit:
        raise TrainingStopped(
            f"the first micro-batch has loss {loss:.6f}, but the source model's is {source.loss:.6f} "
            f"({source.forward}; {source.targets} targets): they may differ by {limit:g}.\n"
            "The model to be trained differs from the source, so nothing was trained. Compare the two with "
            "smolconv verify; start.gate_tolerance widens the gate, start.gate: false removes it."
        )
