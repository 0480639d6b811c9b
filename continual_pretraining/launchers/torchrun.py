"""torchrun: on this machine, or the same command on every machine of several."""

from __future__ import annotations

import itertools
from dataclasses import replace

from smolconv.continual_pretraining.launchers.front_end import run_front_end
from smolconv.continual_pretraining.launchers.launcher import Launcher, Placement, Start
from smolconv.continual_pretraining.launchers.output import tell
from smolconv.continual_pretraining.recipe.schema import Launch
from smolconv.continual_pretraining.run.checkpoints import latest
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
            meeting = _meeting(start, 0)
        return [*node_words(start.placed), *meeting, *script_words(*start.beside_words)]

    def launch(self, start: Start) -> int:
        """Go on with the nodes that are left, as long as each loss of a rank comes after a save that was made since."""
        several = start.placed.nodes > 1
        least = start.recipe.launch.least_nodes if several else None
        words, saved = self.words(start), latest(start.run) if least else None
        for restart in itertools.count():
            # Each node has a launcher of its own: the ranks tell it what they have in common.
            outcome = run_front_end(start, words, variables=PATIENCE, one_of_several=several, restart=restart)
            if not (outcome.lost and least):
                break
            before, saved = saved, latest(start.run)
            if restart and saved == before:
                tell("Nothing was saved since a rank was lost before: not started again.")
                break
            start = replace(start, resume="auto")
            nodes = f"{least}:{start.placed.nodes}"
            tell(f"continues from the last checkpoint with the nodes that meet again, {nodes.replace(':', ' to ')}")
            words = [
                *node_words(start.placed, nodes),
                *_meeting(start, restart + 1),
                *script_words(*start.beside_words),
            ]
        return outcome.exit_code


def _meeting(start: Start, restart: int) -> list[str]:
    """Where nodes meet. Each restart has a port of its own: nobody meets a store of the start before."""
    host, _, port = str(start.recipe.launch.rendezvous).rpartition(":")
    point = f"{host}:{int(port) + restart}" if host and port.isdecimal() else str(start.recipe.launch.rendezvous)
    # The ranks shall say that a node is gone, not torchrun, which notices after a minute.
    patience = start.recipe.launch.silence_seconds + 60
    words = ["--rdzv-backend", "c10d", "--rdzv-endpoint", point, "--rdzv-id", start.recipe.name]
    return [*words, "--rdzv-conf", f"read_timeout={patience}"]


def node_words(placed: Placement, nodes: str = "") -> list[str]:
    """What starts torchrun for one node's ranks, but for where they meet and what each of them is.

    ``nodes``: how many may meet, as LEAST:MOST, when not all have to.
    """
    words = module_words(ELASTIC, "--nnodes", nodes or str(placed.nodes))
    return [*words, "--nproc-per-node", str(placed.ranks_per_node), "--max-restarts", "0"]


LAUNCHER = Torchrun()
