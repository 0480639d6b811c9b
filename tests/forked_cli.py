"""The command line in children of a process that has imported it: most of a short command is Python starting up.

A child is as a process of its own but for what was imported before: ``main()`` ends it, and nothing of it is left. Who
tests imports, the environment at the start, or a broken installation starts a Python of its own (``conftest.command``).
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 300
#: What most commands import when they run, and what is slow of it.
_IMPORTED = (
    "smolconv.commands.main", "smolconv.conversion", "smolconv.inspection", "smolconv.hub.download",
    "smolconv.layouts.deepspeed.layout", "smolconv.layouts.nanotron.layout", "smolconv.layouts.huggingface.layout",
    "smolconv.layouts.gguf.reader", "rich.table", "rich.console", "rich.panel", "rich.markup", "yaml",
    "smolconv.continual_pretraining.recipe.files", "smolconv.continual_pretraining.recipe.nanotron",
    "smolconv.continual_pretraining.tokens.report", "smolconv.continual_pretraining.estimate.report",
    "smolconv.continual_pretraining.run.folder", "smolconv.continual_pretraining.watch.plot",
)  # fmt: skip


def run(
    words: Sequence[str], cwd: Path | None, *, torch: bool, seconds: int = SECONDS, memory_bytes: int | None = None,
    disk_free_bytes: int | None = None, programs: Path | None = None,
) -> tuple[int, str, str]:  # fmt: skip
    """Exit code, stdout and stderr of ``smolconv`` with these words; ``torch``: it may well need it.

    After ``seconds``, of the clock or of the processor, it is killed: -9 or -24. ``memory_bytes`` is what it may map
    beside what was there at its start, ``disk_free_bytes`` what it finds free on every disk; ``programs`` is a folder of programs that it finds first.
    """
    server = _server(torch)
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "words": list(words), "cwd": str(cwd or Path.cwd()), "folder": folder,
            "seconds": seconds, "memory_bytes": memory_bytes, "disk_free_bytes": disk_free_bytes,
            "programs": str(programs) if programs else None,
        }  # fmt: skip
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        stdout, stderr = ((Path(folder) / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr"))
        return code, stdout, stderr


@functools.cache
def _server(torch: bool) -> subprocess.Popen[str]:
    from conftest import environment

    server = subprocess.Popen(
        [sys.executable, __file__, "torch" if torch else "light"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=environment(),
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


def _serve(torch: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for module in _IMPORTED:
        importlib.import_module(module)
    _build_commands_once()
    if torch:
        import transformers

        _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.SmolLM3ForCausalLM
    gc.freeze()
    for line in sys.stdin:
        answers.write(f"{_ended(json.loads(line))}\n")
        answers.flush()


def _build_commands_once() -> None:
    """Typer makes click's commands anew whenever the app is called, which takes longer than ``inspect``."""
    import typer.main

    from smolconv.commands.app import app

    build = functools.cache(typer.main.get_command)
    build(app)
    typer.main.get_command = build


def _ended(asked: dict[str, Any]) -> int:
    child = os.fork()
    if not child:
        _child(asked)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(asked["seconds"])
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return os.waitstatus_to_exitcode(status)


def _limit(asked: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"] + 1))
    if asked["memory_bytes"] is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + asked["memory_bytes"],) * 2)
    if asked.get("disk_free_bytes") is not None:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=asked["disk_free_bytes"])
    if asked.get("programs") is not None:
        os.environ["PATH"] = os.pathsep.join((asked["programs"], os.environ["PATH"]))


def _child(asked: dict[str, Any]) -> None:
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.setsid()
        _limit(asked)
        os.chdir(asked["cwd"])
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            path = os.devnull if name == "stdin" else os.path.join(asked["folder"], name)
            opened = os.open(path, os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(0, closefd=False)), io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=False),
            io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", line_buffering=True),
        )  # fmt: skip
        sys.argv = ["smolconv", *asked["words"]]
        from smolconv.commands.main import main

        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1] == "torch")
