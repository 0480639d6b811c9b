"""Asks Slurm's queue about jobs, on machines that have squeue."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

from smolconv.errors import MachineError, NotInstalled

#: States of waiting and of running jobs: JOB STATE CODES in squeue's manual. In any other state the job has ended.
WAITING = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
RUNNING = frozenset({"RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"})
_SECONDS = 20


def job_states(numbers: Iterable[int]) -> dict[int, str] | None:
    """States of the jobs in the queue, by number; None if Slurm cannot be asked."""
    wanted = sorted(set(numbers))
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        return None
    words = ["squeue", "--noheader", "--format=%i %T", f"--jobs={','.join(map(str, wanted))}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:  # its answer when all jobs have left the queue
        return None
    found = (re.fullmatch(r"(\d{1,18})\s+(\w+)", line.strip()) for line in done.stdout.splitlines())
    return {int(match[1]): match[2] for match in found if match}


def cancel_job(number: int) -> None:
    """Cancel a job. Raises ``NotInstalled`` and ``MachineError``."""
    if shutil.which("scancel") is None:
        raise NotInstalled(f"scancel is not on this machine: cancel job {number} from a login node of its cluster.")
    try:
        done = subprocess.run(
            ["scancel", str(number)], capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"scancel {number} did not answer: {error}\nTry again, or ask your cluster.") from None
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise MachineError(
            f"scancel {number} failed: {said}\nThe job stays in the queue. Try again, or ask the cluster's support."
        )
