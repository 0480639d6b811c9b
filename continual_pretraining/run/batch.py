"""Submits batch scripts to Slurm, for a run and for its task evaluations."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from smolconv.errors import MachineError


def sbatch(script: Path, *, environment: Mapping[str, str] | None = None, seconds: float | None = None) -> int:
    """Submit the script and return the job's number.

    Raises ``MachineError`` with Slurm's message if it rejects the job, or does not answer within ``seconds``.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False, timeout=seconds,
            env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise MachineError(f"no answer within {seconds:g} s") from None
    number = done.stdout.strip().partition(";")[0]  # with several clusters: number;cluster
    if done.returncode or not number.isdigit():
        raise MachineError((done.stderr or done.stdout).strip())
    return int(number)
