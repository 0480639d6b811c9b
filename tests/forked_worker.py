"""Worker processes that are forked from one which has imported torch and DeepSpeed: a second a run instead of seven.

Every child runs ``smolconv.continual_pretraining.run.worker.main()`` as the process of a launcher does, and ends with its exit code.
A test may have some Python run in it before, which breaks a part on purpose.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 240


@dataclass(frozen=True)
class Ended:
    """A run that is over: the exit code of the rank that failed first, or 0."""

    code: int
    log: str
    failure: dict[str, Any]  #: logs/failure-rank-N.json of the lowest rank that has one; {} without

    @property
    def message(self) -> str:
        return f"{self.failure.get('error')}: {self.failure.get('message')}"


def work(
    document: Mapping[str, Any],
    run: Path,
    ranks: int = 1,
    resume: str = "auto",
    before: str = "",
    meanwhile: Callable[[list[int]], None] | None = None,
) -> Ended:
    """Train ``document`` in ``run`` with so many ranks; ``before`` is Python that each child executes first.

    ``meanwhile`` is called with the ranks' process ids as soon as they are there.
    """
    import yaml

    (run / "logs").mkdir(parents=True, exist_ok=True)
    for old in (run / "logs").glob("*"):
        old.unlink()
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(dict(document)))
    asked = {"run": str(run), "ranks": ranks, "resume": resume, "before": before, "port": _free_port()}
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    pids = json.loads(server.stdout.readline())
    try:
        if meanwhile:
            meanwhile(pids)
    except BaseException:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        codes = json.loads(server.stdout.readline())
    failures = sorted((run / "logs").glob("failure-rank-*.json"))
    return Ended(
        code=next((code for code in codes if code), 0),
        log="\n".join(path.read_text(errors="replace") for path in sorted((run / "logs").glob("rank-*.log"))),
        failure=json.loads(failures[0].read_text()) if failures else {},
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    import transformers

    # Most of an engine's start is DeepSpeed looking for compilers, and importing torch.compile for a Muon.
    _ = deepspeed.ops.__compatible_ops__
    with suppress(ImportError):
        import deepspeed.runtime.zero.muon.muon_optimizer
        import deepspeed.runtime.zero.muon.original_muon
    with suppress(ImportError):
        import torch.nn.attention.varlen

    import smolconv.continual_pretraining.run.export
    import smolconv.continual_pretraining.run.trainer
    import smolconv.continual_pretraining.run.worker
    import smolconv.verify.compare
    import smolconv.verify.hf
    import smolconv.verify.native  # noqa: F401

    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.SmolLM3ForCausalLM
    gc.freeze()  # so that a child's collection does not copy all of it
    for line in sys.stdin:
        asked = json.loads(line)
        children = [_fork(asked, rank) for rank in range(asked["ranks"])]
        print(json.dumps(children), file=answers, flush=True)
        print(json.dumps(_ended(children)), file=answers, flush=True)


def _fork(asked: Mapping[str, Any], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(f"{asked['run']}/logs/rank-{rank:05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(asked["ranks"]), LOCAL_WORLD_SIZE=str(asked["ranks"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(asked["port"]),
        )  # fmt: skip
        faulthandler.dump_traceback_later(SECONDS - 20)  # a hang shows in the log where it is
        sys.argv = ["worker", asked["run"], "--resume", asked["resume"]]
        exec(asked["before"], {})
        from smolconv.continual_pretraining.run import worker

        worker.main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def _ended(children: list[int]) -> list[int]:
    """Their exit codes, a signal's negative, those that failed first in front."""
    codes: list[int] = []
    left, deadline = set(children), time.monotonic() + SECONDS
    while left:
        for child in list(left):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                left.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
                if codes[-1]:  # the others end by themselves when they agreed on it; a lone failure leaves them waiting
                    deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
            deadline += SECONDS
        time.sleep(0.005)
    return codes


if __name__ == "__main__":
    _serve()
