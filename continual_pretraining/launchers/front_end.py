"""torchrun's and DeepSpeed's launchers as processes of ours, which start ``beside`` once for each rank."""

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

#: In the environment of ``beside``: the process that it must not outlive, and where it says which attempt it is of.
LAUNCHER_PID = "SMOLCONV_LAUNCHER_PID"
ATTEMPT_FILE = "SMOLCONV_ATTEMPT_FILE"
#: How long a launcher may take to end after a rank has failed, while the processes beside ranks end theirs. torchrun
#: waits for a node that is gone for a quarter of an hour.
_FRONT_END_GRACE_SECONDS = 2 * GRACE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a start ended."""

    exit_code: int
    lost: bool  #: for want of a rank that showed no sign of life


def run_front_end(
    start: Start,
    words: Sequence[str],
    *,
    variables: Mapping[str, str],
    one_of_several: bool = False,
    as_group: bool = False,
    restart: int = 0,
) -> Outcome:
    """Run another launcher on this machine, and tell from the ranks' own files how it went.

    ``one_of_several``: other machines have one of their own, so that the ranks say which attempt they belong to.
    ``as_group``: its whole process group is told to stop, and waited for. ``restart``: how often it went on
    after a rank was lost, whose lock on the run may stay for a while. Raises ``OutputLocked`` where another start
    trains in the run's folder.
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
                    (os.killpg if as_group else os.kill)(process.pid, signal.SIGTERM)  # both know no other
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
