"""The local launcher: the ranks are child processes on this machine."""

from __future__ import annotations

import secrets

from smolconv.continual_pretraining.launchers.ends import report
from smolconv.continual_pretraining.launchers.launcher import Launcher, Start, free_port, rank_environment
from smolconv.continual_pretraining.launchers.watching import run_ranks
from smolconv.continual_pretraining.recipe.schema import Launch
from smolconv.continual_pretraining.run.ranks import ATTEMPT
from smolconv.errors import UsageError
from smolconv.processes import module_words


class Local(Launcher):
    starts_each_rank = True

    def place(self, given: Launch) -> tuple[int, int | None]:
        if given.nodes > 1:
            raise UsageError(
                f"the local launcher cannot start {given.nodes} nodes by itself: use torchrun, deepspeed with a "
                "hostfile, or slurm."
            )
        return super().place(given)

    def words(self, start: Start) -> list[str]:
        return module_words(start.worker, str(start.run), "--resume", start.resume)

    def launch(self, start: Start) -> int:
        ranks = start.placed.ranks_per_node
        base = {
            **rank_environment(start.recipe, ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), ATTEMPT: secrets.token_hex(4),
        }  # fmt: skip
        environments = {rank: {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)}
        return report(run_ranks(self.words(start), environments, start.run), start.run, ranks)


LAUNCHER = Local()
