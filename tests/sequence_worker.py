"""One rank of a group that shares a micro-batch, without DeepSpeed: the loss and gradients of each case of a job.

``WORKER FOLDER``: of ``job.pt``, a list of cases as ``test_sequence_parallel.Case`` has them; it leaves ``rank-N.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from training_model_worker import Packed

from smolconv.continual_pretraining.engine.model import build_model
from smolconv.continual_pretraining.engine.sequence import join_sequence_ranks
from smolconv.continual_pretraining.engine.tiling import tile_mlp
from smolconv.continual_pretraining.recipe import schema as recipe


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """The sums over the group, and how many targets and tokens of the row were this rank's."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sequence = join_sequence_ranks(rank, world_size, case["sequence_ranks"])
    built: Any = build_model(case["config"], recipe.Model(source="-", **case["model"]), "cpu", sequence)
    built.load_state_dict(case["weights"])
    tile_mlp(built, case["tile_tokens"])
    loss, targets = built(**Packed(*case["batch"])._asdict())
    loss.backward()
    found = {"loss": loss.detach().clone(), **{name: each.grad for name, each in built.named_parameters()}}
    for tensor in found.values():
        torch.distributed.all_reduce(tensor, group=sequence.group)
    return {"targets": int(targets), "loss": found.pop("loss"), "gradients": found}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    cases = torch.load(folder / "job.pt", weights_only=True)
    torch.save([measure(case) for case in cases], folder / f"rank-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    import os

    os._exit(0)  # gloo's threads may outlive an orderly end
