"""Handing a script to Slurm: a run's own, and those of what runs beside it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from smolconv.errors import MachineError


def sbatch(script: Path, *, environment: Mapping[str, str] | None = None, seconds: float | None = None) -> int:
    """The number of the job that Slurm makes of the script.

    Raises ``MachineError`` with what Slurm said where it makes none, or does not answer within ``seconds``.
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
