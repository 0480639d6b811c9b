"""Slurm: writes a run's batch script, with one task per node, and submits it. For Slurm 22.05 and later."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from smolconv.continual_pretraining.launchers.ends import LOST, SAVED
from smolconv.continual_pretraining.launchers.launcher import SUPERVISOR, Launcher, Start
from smolconv.continual_pretraining.launchers.torchrun import PATIENCE, node_words
from smolconv.continual_pretraining.recipe.schema import Launch
from smolconv.continual_pretraining.run.batch import sbatch
from smolconv.continual_pretraining.run.control import STOP, asked_folder
from smolconv.errors import Interrupted, MachineError, NotInstalled, UsageError
from smolconv.processes import BOOTSTRAP, module_words, script_words
from smolconv.version import __version__

FOLDER = "slurm"
_OPTION_FOR_GPUS = re.compile(r"--gpus|-G|--gres[= ]\S*gpu")


class Slurm(Launcher):
    programs = ("sbatch", "srun")

    def place(self, given: Launch) -> tuple[int, int | None]:
        asked = given.slurm.gpus_per_node
        ranks = given.ranks_per_node or (1 if asked == 0 else asked)
        if asked and ranks and ranks > asked:
            raise UsageError(
                f"{ranks} ranks per node need a GPU each, but launch.slurm.gpus_per_node is {asked}: leave it out, or "
                "give --nproc-per-node at most that."
            )
        seconds, early = walltime(given.slurm.time), given.slurm.signal_seconds
        if seconds is not None and seconds <= early:
            raise UsageError(
                f"launch.slurm.time {given.slurm.time} is not longer than launch.slurm.signal_seconds {early}: the job "
                "would be told to save and stop when it starts.\nGive it more time, or lower signal_seconds."
            )
        return given.nodes, ranks

    def asks_for_gpus(self, given: Launch) -> bool | None:
        return given.slurm.gpus_per_node != 0

    def started_by(self, given: Launch) -> Sequence[str]:
        return ("sbatch",)

    def words(self, start: Start) -> list[str]:
        """The torchrun command for one node's ranks; the script adds the options that differ between nodes."""
        return [*node_words(start.placed), *script_words(*start.supervisor_words)]

    def batch_script(self, start: Start) -> str:
        """The script that trains the run on the recipe's nodes, and requeues itself when the walltime ends it."""
        given, run, placed = start.recipe.launch, start.run, start.placed
        name, size = start.recipe.name, f"{placed.nodes} nodes of {placed.ranks_per_node} ranks"
        outcome = [*module_words(SUPERVISOR, str(run)), "--world-size", str(placed.world_size), "--outcome"]
        parts = [
            "#!/bin/bash",
            f"# {name}: {size}. Written by smolconv {__version__} continue-train.",
            f"# The run, its logs and its checkpoints: {run}",
            *(f"#SBATCH {option}" for option in _options(start)),
            "",
            *_titled("launch.slurm.setup", given.slurm.setup),
            *_titled("launch.environment", [f"export {k}={shlex.quote(v)}" for k, v in given.environment.items()]),
            "# Python imports nothing from the folder that the job was submitted from.",
            "export PYTHONSAFEPATH=1",
            "",
            *_meeting(given),
            *_resuming(start),
            "# Separates how these ranks end from the ranks of another job or an earlier start.",
            'export ATTEMPT="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
            "",
            f'before="$({_last_saved(run)})"',
            *_starting(start, self.words(start)),
            "# torchrun reports success or failure only. Exit code of the ranks: 0 done, "
            f"{SAVED} saved and stopped, else failed.",
            f'{_join(outcome)} "$status" --attempt "$ATTEMPT"',
            "status=$?",
            *(_queueing_again(run) if given.slurm.requeue else []),
        ]
        return "\n".join([*parts, 'exit "$status"', ""])

    def launch(self, start: Start) -> int:
        print(f"Slurm job {submit(self.batch_script(start), start.run)}", flush=True)
        return 0


def walltime(text: str) -> int | None:
    """Seconds of Slurm's [days-]hours:minutes:seconds, minutes[:seconds] or days-hours[:minutes]; None for others."""
    days, dash, rest = text.rpartition("-")
    fields = rest.split(":")
    if len(fields) > 3 or not all(field.isdecimal() for field in (*fields, days or "0")):
        return None
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(int(field) * unit for field, unit in zip(fields, units))


def _options(start: Start) -> list[str]:
    """The options of sbatch."""
    given = start.recipe.launch.slurm
    gpus = given.gpus_per_node
    if gpus is None and not any(_OPTION_FOR_GPUS.match(option) for option in given.options):
        gpus = start.placed.ranks_per_node
    options = [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.-]+', '-', start.recipe.name)}",
        *_nodes(start),
        f"--time={given.time}",
        *(f"--{name}={value}" for name, value in [
            ("partition", given.partition), ("account", given.account), ("qos", given.qos),
            ("cpus-per-task", given.cpus_per_task), ("gpus-per-node", gpus or None),
        ] if value is not None),
        f'--output="{start.run / "logs" / "slurm-%j.log"}"',
        "--open-mode=append",
        "--requeue" if given.requeue else "--no-requeue",
        # Without B: the signal goes to the tasks instead of the script, so it reaches every rank.
        f"--signal=USR1@{given.signal_seconds}",
        *given.options,
    ]  # fmt: skip
    for option in options:
        if "\n" in option:
            raise UsageError(f"launch.slurm: the option {option!r} has a line break; expected one option a line.")
    return options


def _nodes(start: Start) -> list[str]:
    """Nodes, one task on each. For a range srun sets the tasks: sbatch would give only as many nodes as tasks."""
    least, nodes = start.recipe.launch.least_nodes, start.placed.nodes
    return [f"--nodes={least}-{nodes}"] if least else [f"--nodes={nodes}", "--ntasks-per-node=1"]


def _meeting(given: Launch) -> list[str]:
    host = 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    return [
        "# Rendezvous of the ranks: the first node, at a port chosen by the job id, below Linux's ephemeral ports.",
        *([] if "MASTER_ADDR" in given.environment else [host]),
        "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))",
        "export MASTER_ADDR MASTER_PORT",
        "",
    ]


def _resuming(start: Start) -> list[str]:
    if start.resume == "auto":
        return []
    lines = [f"export RESUME={shlex.quote(start.resume)}", '[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || RESUME=auto']
    return _titled("After a requeue, the run continues from its last checkpoint.", lines)


def _starting(start: Start, torchrun: Sequence[str]) -> list[str]:
    """One torchrun on every node."""
    words = [shlex.quote(word) for word in torchrun]
    nodes = words.index("--nnodes") + 1
    words[nodes] = '"$SLURM_NNODES"'
    if start.resume != "auto":
        words[words.index("--resume") + 1] = '"$RESUME"'
    where = ["--node-rank", '"$SLURM_NODEID"', "--master-addr", '"$MASTER_ADDR"', "--master-port", '"$MASTER_PORT"']
    task = f"""
    trap "" USR1
    {_lines([*words[: nodes + 1], *where, *words[nodes + 1 :], "--attempt", '"$ATTEMPT"'])}
"""
    options = ' --cpus-per-task="$SLURM_CPUS_PER_TASK"' if start.recipe.launch.slurm.cpus_per_task else ""
    if start.recipe.launch.least_nodes:
        options += ' --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1'
    return [
        "# One task per node. Its script is in single quotes, because only the task knows its node's number.",
        "# USR1 is for the ranks. It would end torchrun, so the task ignores it and torchrun inherits that.",
        "# torchrun gives ranks only 30 seconds to save and stop unless told otherwise.",
        *(f"export {name}={value}" for name, value in PATIENCE.items()),
        "# The tasks need the variables exported above, even with SBATCH_EXPORT=NONE.",
        f"srun --export=ALL{options} --kill-on-bad-exit=1 bash -c {shlex.quote(task)}",
        "status=$?",
        "",
    ]


def _queueing_again(run: Path) -> list[str]:
    interrupted, saved = Interrupted.exit_code, _last_saved(run)
    lost = f'{_join([str(run / "logs" / "ends")])}/"$ATTEMPT"/{LOST}'
    return [
        "",
        "# Requeue after a save before the walltime. "
        f"Also after a signal during the start ({interrupted}), but not twice",
        "# in a row: a start that takes too long would be repeated for ever.",
        "# Also after a lost rank, whose node may have died, but not a second time without a save in between.",
        "# Nothing else is requeued.",
        f'started={_join([str(run / "logs" / "interrupted-start-")])}"$SLURM_JOB_ID"',
        f'asked={_join([str(asked_folder(run, ""))])}/"$ATTEMPT"/{STOP}',
        'if [ -e "$asked" ]; then',
        '    echo "Stopped by smolconv stop: not requeued." >&2',
        f'elif [ "$status" -eq {interrupted} ] && [ -e "$started" ]; then',
        '    echo "Stopped during its start twice in a row: not requeued. Give the job more time." >&2',
        f'elif [ "$status" -eq {interrupted} ] && touch "$started"; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        f'elif [ "$status" -eq {SAVED} ]; then',
        '    rm -f "$started"',
        '    scontrol requeue "$SLURM_JOB_ID"',
        f'elif [ -e {lost} ] && {{ [ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ] || [ "$before" != "$({saved})" ]; }}; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]


def _last_saved(run: Path) -> str:
    """A shell command that prints the name of the last checkpoint, or nothing."""
    return f"cat {shlex.quote(str(run / 'checkpoints' / 'latest'))} 2>/dev/null"


def submit(script: str, run: Path) -> int:
    """Submit the script with sbatch, and keep it as ``RUN/slurm/job-N.sh``. Returns the job's number.

    Raises ``NotInstalled`` without sbatch, ``MachineError`` if Slurm rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise NotInstalled("sbatch is not on this machine: submit from a login node of the cluster (docs/clusters.md).")
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "submitted.sh"
    path.write_text(script)
    try:
        number = sbatch(path)
    except MachineError as error:
        # "Requested node configuration is not available", "Invalid generic resource (gres) specification"
        no_gpus = "--gpus-per-node" in script and re.search("configuration|gres", str(error))
        hint = "\nTo train on nodes without GPUs: --set launch.slurm.gpus_per_node=0." if no_gpus else ""
        raise MachineError(f"sbatch rejected the job: {error}{hint}\nThe script is kept: {path}") from None
    path.replace(folder / f"job-{number}.sh")
    return number


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [f"# {title}", *lines, ""] if lines else []


def _join(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))


def _lines(words: Sequence[str]) -> str:
    """The words of a command, one option per line."""
    text = "exec"
    for index, word in enumerate(words):
        begins = word.startswith("--") or (word == shlex.quote(str(BOOTSTRAP)) and index > 1)
        text += f" \\\n        {word}" if begins else f" {word}"
    return text


LAUNCHER = Slurm()
