"""Sequence parallelism: ranks that share rows compute what one rank computes, and what a plain loop does on each document.

Nothing here is expected by the code under test: losses and gradients of a micro-batch are those of transformers' own model
on each document alone, and those of runs are of ``test_training_losses``' loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked_worker
import hf_models
import pytest
import torch
from forked_worker import Fork, run_ranks
from test_training_model import batch, gradients_of, noise, plain_loss
from training_model_worker import Packed

#: fp32, of a loss; and of gradients, relative to a tensor's largest element. Sums are taken in another order.
LOSS_NOISE, GRADIENT_NOISE = 1e-6, 1e-5
#: Documents end before, at and behind cuts; 45 tokens do not divide by 2 or 4.
ROWS: tuple[tuple[int, ...], ...] = ((20, 1, 3, 21),)
#: A micro-batch of two rows is cut as one: by 3, inside of a row.
TWO_ROWS = ((12, 8, 4), (24,))
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 64}
NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
SIX = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a micro-batch that ranks share."""

    family: str
    sequence_ranks: int
    sizes: Mapping[str, int] = field(default_factory=lambda: HEADS)
    rows: Sequence[Sequence[int]] = ROWS
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> torch.nn.Module:
        made: torch.nn.Module = getattr(hf_models, self.family)(**self.sizes)
        return made

    @property
    def batch(self) -> Packed:
        return batch(self.rows)

    def document(self) -> dict[str, Any]:
        plain = self.plain
        return {
            "config": plain.config.to_dict(), "weights": plain.state_dict(), "batch": tuple(self.batch),
            "model": {"dtype": "float32", **self.model}, "sequence_ranks": self.sequence_ranks,
        }  # fmt: skip


#: By the ranks that run them. Key/value heads: as many as ranks, more, fewer, and such that do not divide.
CASES = {
    3: [
        Case(family="llama", sequence_ranks=3, sizes=NINE, rows=TWO_ROWS),
        Case(family="smollm3", sequence_ranks=3, sizes=SIX),
        Case(family="qwen3", sequence_ranks=3, sizes=SIX, rows=TWO_ROWS),
    ],
    4: [
        Case(family="smollm3", sequence_ranks=2),
        Case(family="smollm3", sequence_ranks=4),
        Case(family="smollm3", sequence_ranks=4, model={"activation_checkpointing": True}),
        Case(family="llama", sequence_ranks=4, sizes=EIGHT, rows=((2,), (2,), (1, 1))),
        Case(family="qwen2", sequence_ranks=2, rows=TWO_ROWS),
    ],
}
MATRIX = {
    8: [Case(family=family, sequence_ranks=ranks) for family in ("llama", "smollm3", "qwen2", "qwen3") for ranks in (2, 4, 8)],
}  # fmt: skip


def measured(cases: Sequence[Case], world_size: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank found of each case."""
    torch.save([case.document() for case in cases], folder / "job.pt")
    source = Path(__file__).with_name("sequence_worker.py")
    port = str(forked_worker._free_port())
    forks = [
        Fork(
            code=source.read_text(), words=(str(source), str(folder)), log=folder / f"rank-{rank}.log",
            environment={"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(world_size)
    ]  # fmt: skip
    codes = run_ranks(forks, on_cpu=True)
    assert not any(codes.values()), "\n".join(fork.log.read_text()[-3000:] for fork in forks)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]


def ranks_equal_documents_alone(cases: Sequence[Case], world_size: int, folder: Path) -> None:
    for case, ranks in zip(cases, zip(*measured(cases, world_size, folder))):
        plain = case.plain
        loss = plain_loss(plain, case.batch)
        loss.backward()
        targets = int((case.batch.labels != -100).sum())
        for first in range(0, world_size, case.sequence_ranks):
            group = ranks[first : first + case.sequence_ranks]
            assert sum(rank["targets"] for rank in group) == targets, case
            for rank in group:
                assert abs(rank["loss"] - loss) / targets < LOSS_NOISE, case
                assert noise(rank["gradients"], gradients_of(plain)) < GRADIENT_NOISE, case


@pytest.mark.parametrize("world_size", CASES)
def test_ranks_that_share_rows_find_the_loss_and_gradients_of_each_document_alone(world_size, tmp_path):
    ranks_equal_documents_alone(CASES[world_size], world_size, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("world_size", MATRIX)
def test_every_family_is_shared_by_2_4_and_8_ranks(world_size, tmp_path):
    ranks_equal_documents_alone(MATRIX[world_size], world_size, tmp_path)
