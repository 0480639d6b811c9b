"""Ranks that are forked from a process which has imported torch and DeepSpeed: a second a run instead of seven.

``work`` has each run ``smolconv.continual_pretraining.run.worker.main()`` as the process of a launcher does, and end with
its exit code; a test may have some Python run in it before, which breaks a part on purpose. ``run_ranks`` runs any Python.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECONDS = 240
#: What each rank of a run executes after the test's own Python.
_WORK = "from smolconv.continual_pretraining.run import worker\nworker.main()\n"


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
    for old in (run / "logs").glob("*.*"):
        old.unlink()
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(dict(document)))
    port = str(_free_port())
    forks = [
        Fork(
            code=f"{before}\n{_WORK}", words=("worker", str(run), "--resume", resume), log=run / "logs" / f"rank-{rank:05d}.log",
            environment={
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(ranks)
    ]  # fmt: skip
    codes = run_ranks(forks, meanwhile=meanwhile)
    failures = sorted((run / "logs").glob("failure-rank-*.json"))
    return Ended(
        code=next((code for code in codes.values() if code), 0),
        log="\n".join(path.read_text(errors="replace") for path in sorted((run / "logs").glob("rank-*.log"))),
        failure=json.loads(failures[0].read_text()) if failures else {},
    )


@dataclass(frozen=True, kw_only=True)
class Fork:
    """One process that is forked."""

    code: str  #: Python
    words: Sequence[str]  #: sys.argv
    environment: Mapping[str, str]  #: beside what is there
    log: Path  #: stdout and stderr; the folder is the process's own


def run_ranks(
    forks: Sequence[Fork],
    *,
    seconds: float = SECONDS,
    on_cpu: bool = False,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> dict[int, int]:
    """Exit codes by rank, a signal's negative, in the order in which they ended; none of them is left.

    After a failure the others have 3 seconds to end by themselves. ``on_cpu``: DeepSpeed sees no GPU.
    """
    server = _server(on_cpu and Path("/dev/nvidiactl").exists())  # without a driver it finds out by itself
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({"forks": [asdict(fork) for fork in forks], "seconds": seconds}, default=str) + "\n")
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
    return dict(codes)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@functools.cache
def _server(on_cpu: bool) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"DS_ACCELERATOR": "cpu"} if on_cpu else {})}
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
    import smolconv.verification.compare
    import smolconv.verification.hf
    import smolconv.verification.native  # noqa: F401

    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.SmolLM3ForCausalLM
    gc.freeze()  # so that a child's collection does not copy all of it
    for line in sys.stdin:
        asked = json.loads(line)
        children = [_fork(fork, asked["seconds"]) for fork in asked["forks"]]
        print(json.dumps(children), file=answers, flush=True)
        print(json.dumps(_ended(children, asked["seconds"])), file=answers, flush=True)


def _fork(asked: Mapping[str, Any], seconds: float) -> int:
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(opened, number)
        os.environ.update(asked["environment"])
        faulthandler.dump_traceback_later(max(1, seconds - 20))  # a hang shows in the log where it is
        sys.argv = list(asked["words"])
        exec(asked["code"], {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def _ended(children: list[int], seconds: float) -> list[tuple[int, int]]:
    """Their numbers and exit codes, a signal's negative, in the order in which they end."""
    codes: list[tuple[int, int]] = []
    left, deadline, parent = dict(enumerate(children)), time.monotonic() + seconds, os.getppid()
    while left:
        for rank, child in list(left.items()):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                del left[rank]
                codes.append((rank, os.waitstatus_to_exitcode(status)))
                if codes[-1][
                    1
                ]:  # the others end by themselves when they agreed on it; a lone failure leaves them waiting
                    deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline or os.getppid() != parent:
            for child in left.values():
                os.kill(child, signal.SIGKILL)
            deadline += seconds
        time.sleep(0.005)
    return codes


if __name__ == "__main__":
    _serve()
