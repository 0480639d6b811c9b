"""torchrun: on this machine, or the same command on each of several machines."""

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

#: torchrun without its messages on how ranks ended.
ELASTIC = "smolconv.continual_pretraining.launchers.elastic"
#: Seconds that torchrun gives ranks to stop; its default is 30, but saving may take long. A rank that cannot end
#: because another is dead is killed by its supervisor.
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}


class Torchrun(Launcher):
    def place(self, given: Launch) -> tuple[int, int | None]:
        if given.nodes > 1 and not given.rendezvous:
            raise UsageError(
                f"torchrun over {given.nodes} nodes needs a rendezvous: --set launch.rendezvous=HOST:PORT, the same "
                "on every node, where HOST is one of them."
            )
        return super().place(given)

    def words(self, start: Start) -> list[str]:
        meeting = ["--standalone"]
        if start.placed.nodes > 1:
            meeting = _meeting(start, 0)
        return [*node_words(start.placed), *meeting, *script_words(*start.supervisor_words)]

    def launch(self, start: Start) -> int:
        """Train; after losing a rank, continue with the remaining nodes if there was a save since the last loss."""
        several = start.placed.nodes > 1
        least = start.recipe.launch.least_nodes if several else None
        words, saved = self.words(start), latest(start.run) if least else None
        for restart in itertools.count():
            # Each node has its own launcher, which learns the attempt's name from the ranks.
            outcome = run_front_end(start, words, variables=PATIENCE, one_of_several=several, restart=restart)
            if not (outcome.lost and least):
                break
            before, saved = saved, latest(start.run)
            if restart and saved == before:
                tell("Nothing was saved since a rank was lost before: not restarted.")
                break
            start = replace(start, resume="auto")
            nodes = f"{least}:{start.placed.nodes}"
            tell(f"continues from the last checkpoint with the nodes that rejoin, {nodes.replace(':', ' to ')}")
            words = [
                *node_words(start.placed, nodes),
                *_meeting(start, restart + 1),
                *script_words(*start.supervisor_words),
            ]
        return outcome.exit_code


def _meeting(start: Start, restart: int) -> list[str]:
    """The rendezvous options. Each restart has another port, so that no node joins the store of the start before."""
    host, _, port = str(start.recipe.launch.rendezvous).rpartition(":")
    point = f"{host}:{int(port) + restart}" if host and port.isdecimal() else str(start.recipe.launch.rendezvous)
    # The ranks must be the ones to report a lost node. By default torchrun would do so after a minute.
    patience = start.recipe.launch.silence_seconds + 60
    words = ["--rdzv-backend", "c10d", "--rdzv-endpoint", point, "--rdzv-id", start.recipe.name]
    return [*words, "--rdzv-conf", f"read_timeout={patience}"]


def node_words(placed: Placement, nodes: str = "") -> list[str]:
    """The torchrun command for one node's ranks, without the rendezvous and the ranks' own command.

    ``nodes``: how many nodes may join, as LEAST:MOST, if not all must.
    """
    words = module_words(ELASTIC, "--nnodes", nodes or str(placed.nodes))
    return [*words, "--nproc-per-node", str(placed.ranks_per_node), "--max-restarts", "0"]


LAUNCHER = Torchrun()
