"""Slurm: a run's batch script, one task a node, and its submission. Slurm's options are as of 22.05, and newer."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from smolconv import __version__
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import MachineError, NotInstalled, UsageError
from smolconv.processes import BOOTSTRAP, module_words

FOLDER = "slurm"
_OPTION_FOR_GPUS = re.compile(r"--gpus|-G|--gres[= ]\S*gpu")


def batch_script(recipe: Recipe, run: Path, *, world_size: int, ranks_per_node: int, torchrun: Sequence[str]) -> str:
    """The script that trains ``run`` on the recipe's nodes, and is queued again when the walltime ends it.

    ``torchrun`` starts one node's ranks, without the words that differ between nodes; they are written into it.
    """
    given, nodes = recipe.launch.slurm, recipe.launch.nodes
    gpus = given.gpus_per_node
    if gpus is None and not any(_OPTION_FOR_GPUS.match(option) for option in given.options):
        gpus = ranks_per_node
    logs = run / "logs" / "slurm-%j.log"
    options = [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.-]+', '-', recipe.name)}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--time={given.time}",
        *(f"--{name}={value}" for name, value in [
            ("partition", given.partition), ("account", given.account), ("qos", given.qos),
            ("cpus-per-task", given.cpus_per_task), ("gpus-per-node", gpus or None),
        ] if value is not None),
        f'--output="{logs}"',
        "--open-mode=append",
        "--requeue" if given.requeue else "--no-requeue",
        # To the tasks, not to this script (no B:), so that it reaches every rank.
        f"--signal=USR1@{given.signal_seconds}",
        *given.options,
    ]  # fmt: skip
    for option in options:
        if "\n" in option:
            raise UsageError(f"launch.slurm: the option {option!r} has a line break; expected one option a line.")
    module = module_words("smolconv.continual_pretraining.launchers.launch", str(run))
    at = list(torchrun).index("--nnodes")
    words = [shlex.quote(word) for word in torchrun]
    words[at + 1] = '"$SLURM_NNODES"'
    resume = words.index("--resume") + 1
    once = words[resume] if words[resume] != "auto" else None
    if once:
        words[resume] = '"$RESUME"'
    where = ["--node-rank", '"$SLURM_NODEID"', "--master-addr", '"$MASTER_ADDR"', "--master-port", '"$MASTER_PORT"']
    task = f"""
    trap "" USR1
    {_lines([*words[: at + 2], *where, *words[at + 2 :], "--attempt", '"$ATTEMPT"'])}
"""
    outcome = _join([*module, "--world-size", str(world_size), "--outcome"])
    cpus = ' --cpus-per-task="$SLURM_CPUS_PER_TASK"' if given.cpus_per_task else ""
    parts = [
        "#!/bin/bash",
        f"# {recipe.name}: {nodes} nodes of {ranks_per_node} ranks. Written by smolconv {__version__} continue-train.",
        f"# The run, its logs and its checkpoints: {run}",
        *(f"#SBATCH {option}" for option in options),
        "",
        *_titled("launch.slurm.setup", given.setup),
        *_titled("launch.environment", [f"export {k}={shlex.quote(v)}" for k, v in recipe.launch.environment.items()]),
        "# Python imports nothing from the folder that the job was submitted from.",
        "export PYTHONSAFEPATH=1",
        "",
        "# Where the ranks meet: the first node, at a port of this job's own, below the ports that Linux gives away.",
        *[
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        ][: "MASTER_ADDR" not in recipe.launch.environment],
        "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))",
        "export MASTER_ADDR MASTER_PORT",
        "",
        *_titled(
            "Queued again, the run goes on from its own last checkpoint.",
            [
                f"export RESUME={once}",
                '[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || RESUME=auto',
            ]
            if once
            else [],
        ),
        "# How the ranks of another job or an earlier start ended must not be taken for how these did.",
        'export ATTEMPT="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        "",
        "# One task a node. Its script is in single quotes: the number of a node is known only to the task on it.",
        "# USR1 is for the ranks. torchrun would end by it, and inherits from the task that it is ignored.",
        "# torchrun's own patience with ranks that save before they stop is 30 seconds.",
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600",
        "# SBATCH_EXPORT=NONE would otherwise be for the tasks too, which need what is exported above.",
        f"srun --export=ALL{cpus} --kill-on-bad-exit=1 bash -c {shlex.quote(task)}",
        "status=$?",
        "",
        "# torchrun tells success from failure only. The ranks' own code: 0 done, 75 saved and stopped, else failed.",
        f'{outcome} "$status" --attempt "$ATTEMPT"',
        "status=$?",
    ]
    if given.requeue:
        parts += [
            "",
            "# Saved before the walltime: back into the queue, to go on. A signal in the start (130) loses nothing and",
            "# does the same, but not twice in a row: a start that takes too long would be repeated for ever.",
            "# Nothing else is queued again.",
            f'started={_join([str(run / "logs" / "interrupted-start-")])}"$SLURM_JOB_ID"',
            'if [ "$status" -eq 130 ] && [ -e "$started" ]; then',
            '    echo "Stopped in its start a second time in a row: not queued again. Give the job more time." >&2',
            'elif [ "$status" -eq 130 ] && touch "$started"; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            'elif [ "$status" -eq 75 ]; then',
            '    rm -f "$started"',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*parts, 'exit "$status"', ""])


def submit(script: str, run: Path) -> int:
    """Hand the script to sbatch, and keep it as ``RUN/slurm/job-N.sh``. Returns the job's number.

    Raises ``NotInstalled`` without sbatch, ``MachineError`` when Slurm refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise NotInstalled("sbatch is not on this machine: submit from a login node of the cluster (docs/clusters.md).")
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "submitted.sh"
    path.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    number = done.stdout.strip().partition(";")[0]  # with several clusters: number;cluster
    if done.returncode or not number.isdigit():
        said = (done.stderr or done.stdout).strip()
        # "Requested node configuration is not available", "Invalid generic resource (gres) specification"
        no_gpus = "--gpus-per-node" in script and re.search("configuration|gres", said)
        hint = "\nTo train on nodes without GPUs: --set launch.slurm.gpus_per_node=0." if no_gpus else ""
        raise MachineError(f"sbatch did not take the job: {said}{hint}\nThe script is kept: {path}")
    path.replace(folder / f"job-{number}.sh")
    return int(number)


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [f"# {title}", *lines, ""] if lines else []


def _join(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))


def _lines(words: Sequence[str]) -> str:
    """The words of a command, an option a line."""
    text = "exec"
    for index, word in enumerate(words):
        begins = word.startswith("--") or (word == shlex.quote(str(BOOTSTRAP)) and index > 1)
        text += f" \\\n        {word}" if begins else f" {word}"
    return text
