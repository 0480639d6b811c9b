"""torchrun's and DeepSpeed's launchers as processes of ours, which start ``beside`` once for each rank."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from smolconv.continual_pretraining.launchers.ends import report_left
from smolconv.continual_pretraining.launchers.launcher import Start, rank_environment
from smolconv.continual_pretraining.launchers.output import tell_stopping
from smolconv.continual_pretraining.launchers.signals import Signals, die_with_us
from smolconv.continual_pretraining.launchers.watching import KILLED
from smolconv.continual_pretraining.run.folder import refuse_trained
from smolconv.errors import Interrupted

#: In the environment of ``beside``: the process that it must not outlive, and where it says which attempt it is of.
LAUNCHER_PID = "SMOLCONV_LAUNCHER_PID"
ATTEMPT_FILE = "SMOLCONV_ATTEMPT_FILE"


def run_front_end(
    start: Start,
    words: Sequence[str],
    *,
    variables: Mapping[str, str],
    one_of_several: bool = False,
    as_group: bool = False,
) -> int:
    """Run another launcher on this machine, and tell from the ranks' own files how it went: the run's exit code.

    ``one_of_several``: other machines have one of their own, so that the ranks say which attempt they belong to.
    ``as_group``: its whole process group is told to stop, and waited for. Raises ``OutputLocked`` where another start
    trains in the run's folder.
    """
    refuse_trained(start.run)
    attempt = secrets.token_hex(4)
    environment = {**rank_environment(start.recipe, start.placed.ranks_per_node), **variables}
    environment[LAUNCHER_PID] = str(os.getpid())
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
        stopping = False
        while process.poll() is None:
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
    patience = time.monotonic() + 40  # DeepSpeed's launcher gives ranks 30 seconds
    while as_group and _group_lives(process.pid) and time.monotonic() < patience:
        time.sleep(0.1)
    return report_left(start.run, attempt, start.placed.world_size, process.returncode, stopped=stopping)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
