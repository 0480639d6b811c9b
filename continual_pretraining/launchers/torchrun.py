"""torchrun: on this machine, or the same command on every machine of several."""

from __future__ import annotations

from smolconv.continual_pretraining.launchers.front_end import run_front_end
from smolconv.continual_pretraining.launchers.launcher import Launcher, Placement, Start
from smolconv.continual_pretraining.recipe.schema import Launch
from smolconv.errors import UsageError
from smolconv.processes import module_words, script_words

#: torchrun itself, without what it would say of its ranks' ends.
ELASTIC = "smolconv.continual_pretraining.launchers.elastic"
#: torchrun's patience with ranks that were told to stop, which is 30 seconds otherwise. Saving may take long; a rank
#: that cannot end because another is dead is killed by the process beside it.
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}


class Torchrun(Launcher):
    def place(self, given: Launch) -> tuple[int, int | None]:
        if given.nodes > 1 and not given.rendezvous:
            raise UsageError(
                f"torchrun over {given.nodes} nodes needs a meeting point: --set launch.rendezvous=HOST:PORT, the same "
                "on every node, with HOST one of them."
            )
        return super().place(given)

    def words(self, start: Start) -> list[str]:
        meeting = ["--standalone"]
        if start.placed.nodes > 1:
            point = str(start.recipe.launch.rendezvous)
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", point, "--rdzv-id", start.recipe.name]
        return [*node_words(start.placed), *meeting, *script_words(*start.beside_words)]

    def launch(self, start: Start) -> int:
        # Each node has a launcher of its own: the ranks tell it what they have in common.
        return run_front_end(start, self.words(start), variables=PATIENCE, one_of_several=start.placed.nodes > 1)


def node_words(placed: Placement) -> list[str]:
    """What starts torchrun for one node's ranks, but for where they meet and what each of them is."""
    words = module_words(ELASTIC, "--nnodes", str(placed.nodes))
    return [*words, "--nproc-per-node", str(placed.ranks_per_node), "--max-restarts", "0"]


LAUNCHER = Torchrun()
