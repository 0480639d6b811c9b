"""Runs torchrun's or DeepSpeed's launcher as a child process; it starts a ``supervisor`` for each rank."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from smolconv.continual_pretraining.launchers.ends import ends_folder, has_failed, report_left, was_lost
from smolconv.continual_pretraining.launchers.launcher import Start, rank_environment
from smolconv.continual_pretraining.launchers.output import tell_stopping
from smolconv.continual_pretraining.launchers.signals import Signals, die_with_us
from smolconv.continual_pretraining.launchers.watching import GRACE_SECONDS, KILLED
from smolconv.continual_pretraining.run.folder import RESTARTS, refuse_trained
from smolconv.errors import Interrupted

#: Environment of a ``supervisor``: the process that it must not outlive, and the file for its attempt's name.
LAUNCHER_PID = "SMOLCONV_LAUNCHER_PID"
ATTEMPT_FILE = "SMOLCONV_ATTEMPT_FILE"
#: Time for a launcher to end after a rank has failed, in which supervisors end their ranks. torchrun alone would wait
#: 15 minutes for a lost node.
_FRONT_END_GRACE_SECONDS = 2 * GRACE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a start ended."""

    exit_code: int
    lost: bool  #: because a rank showed no sign of life


def run_front_end(
    start: Start,
    words: Sequence[str],
    *,
    variables: Mapping[str, str],
    one_of_several: bool = False,
    as_group: bool = False,
    restart: int = 0,
) -> Outcome:
    """Run another launcher on this machine, and report how it ended from the ranks' files.

    ``one_of_several``: each machine has its own launcher, so the ranks write down which attempt they belong to.
    ``as_group``: signal the launcher's whole process group, and wait for it. ``restart``: how often the run was
    continued after losing a rank, whose lock on the run may remain for a while. Raises ``OutputLocked`` if another
    start trains in the run's folder.
    """
    if not restart:
        refuse_trained(start.run)
    attempt = secrets.token_hex(4)
    environment = {**rank_environment(start.recipe, start.placed.ranks_per_node), **variables}
    environment[LAUNCHER_PID] = str(os.getpid())
    if restart:
        environment[RESTARTS] = str(restart)
    with tempfile.TemporaryDirectory() as private, Signals().listening() as signals:
        told = Path(private) / "attempt"
        if one_of_several:
            environment[ATTEMPT_FILE] = str(told)
        else:
            words = [*words, "--attempt", attempt]
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=die_with_us(signal.SIGTERM),  # noqa: PLW1509
        )  # fmt: skip
        stopping, deadline = False, float("inf")
        while process.poll() is None:
            if one_of_several and told.exists():
                attempt = told.read_text()
            if deadline == float("inf") and has_failed(ends_folder(start.run, attempt)):
                deadline = time.monotonic() + _FRONT_END_GRACE_SECONDS
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
            if not select.select([signals.wakeup], [], [], 1.0)[0]:
                continue
            for signum in signals.take():
                if not stopping:
                    stopping = True
                    tell_stopping(signum)
                    (os.killpg if as_group else os.kill)(process.pid, signal.SIGTERM)  # both handle only this one
                elif signum == signal.SIGINT:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    raise Interrupted(KILLED)
        if told.exists():
            attempt = told.read_text()
    if as_group:
        _wait_for_group(process.pid)
    code = report_left(start.run, attempt, start.placed.world_size, process.returncode, stopped=stopping)
    return Outcome(exit_code=code, lost=not stopping and was_lost(ends_folder(start.run, attempt)))


def _wait_for_group(group: int) -> None:
    patience = time.monotonic() + 40  # DeepSpeed's launcher gives ranks 30 seconds
    while _group_lives(group) and time.monotonic() < patience:
        time.sleep(0.1)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
