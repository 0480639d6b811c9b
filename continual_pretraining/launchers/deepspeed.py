"""DeepSpeed's launcher: on this machine, or on the hosts of a hostfile by ssh."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from smolconv.continual_pretraining.launchers.front_end import run_front_end
from smolconv.continual_pretraining.launchers.launcher import Launcher, Start, count_gpus, free_port
from smolconv.continual_pretraining.recipe.schema import Launch
from smolconv.errors import BadCheckpoint, UsageError
from smolconv.files import read_bytes
from smolconv.processes import EMPTY_FOLDER, module_words, script_words

#: File with variables for other nodes, which DeepSpeed reads: DEEPSPEED_ENVIRONMENT_NAME in launcher/runner.py.
_VARIABLES = Path(".deepspeed_env")


class DeepSpeed(Launcher):
    programs = ("pdsh",)

    def place(self, given: Launch) -> tuple[int, int | None]:
        nodes, ranks = given.nodes, given.ranks_per_node
        if not given.hostfile:
            if nodes > 1:
                raise UsageError(f"the deepspeed launcher cannot start {nodes} nodes by itself: use a --hostfile.")
            return nodes, ranks
        slots = list(read_hostfile(Path(given.hostfile)).values())
        if nodes > len(slots):
            raise UsageError(f"{given.hostfile} lists {len(slots)} hosts, but {nodes} nodes were asked for.")
        # nodes is 1 by default; with a hostfile that means all its hosts.
        slots = slots[:nodes] if nodes > 1 else slots
        ranks = ranks or slots[0]
        if min(slots) < ranks:
            raise UsageError(
                f"{given.hostfile} has a host with {min(slots)} slots, but {ranks} ranks per node are needed: give "
                "--nproc-per-node at most that."
            )
        return len(slots), ranks

    def started_by(self, given: Launch) -> Sequence[str]:
        return self.programs if self.place(given)[0] > 1 else ()

    def words(self, start: Start) -> list[str]:
        # DeepSpeed starts `python -m` itself, and for several nodes it puts its working folder on PYTHONPATH. So it
        # runs in an empty folder, and the ranks change back from there.
        hostfile = start.recipe.launch.hostfile
        words = [*module_words("deepspeed.launcher.runner", folder=EMPTY_FOLDER), *_slots(start)]
        words += ["--master_port", str(free_port()), "--no_local_rank"]
        words += ["--hostfile", str(Path(hostfile).absolute())] if hostfile else []
        return [*words, "--log_level", "error", *script_words(*start.supervisor_words, folder=Path.cwd())]

    def launch(self, start: Start) -> int:
        variables = {}
        if _VARIABLES.is_file() and "DS_ENV_FILE" not in {**os.environ, **start.recipe.launch.environment}:
            variables["DS_ENV_FILE"] = str(_VARIABLES.absolute())  # it would search its working folder
        # It does not pass SIGTERM on to its child, and may end before its ranks.
        return run_front_end(start, self.words(start), variables=variables, as_group=True).exit_code


def _slots(start: Start) -> list[str]:
    """Options for the ranks or their GPUs: with a number of ranks, DeepSpeed ignores CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if start.recipe.launch.hostfile or not visible or not count_gpus():
        return ["--num_nodes", str(start.placed.nodes), "--num_gpus", str(start.placed.ranks_per_node)]
    devices = visible.replace(" ", "").split(",")[: start.placed.ranks_per_node]
    if not all(device.isdecimal() for device in devices):
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES is {visible}, but DeepSpeed's launcher accepts only numbers. Set numbers, or "
            "use --launcher local or torchrun."
        )
    return ["--include", f"localhost:{','.join(devices)}"]


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host, in the file's order. Lines are ``host slots=N``, as for DeepSpeed and MPI."""
    try:
        lines = read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"the hostfile {path} is not text: byte {error.start} is not UTF-8.") from None
    except BadCheckpoint as error:
        raise UsageError(f"the hostfile cannot be read: {error}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]{0,5})", words)
        if not match or match[1] in slots:
            what = f"{match[1]} a second time" if match else f"{words!r:.200}"
            raise UsageError(f"{path}:{number}: found {what}; expected `host slots=N`, one line per host.")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UsageError(f"{path} lists no host. Expected `host slots=N`, one line per host.")
    return slots


LAUNCHER = DeepSpeed()
