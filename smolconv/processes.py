"""Starts Python processes so that nothing is imported from their working folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

#: Script that runs a module. It is alone in its folder, which is therefore safe on ``sys.path`` and as working folder.
BOOTSTRAP = Path(__file__).absolute().parent / "bootstrap" / "run_module.py"
#: A working folder without modules, for other programs' processes that start with ``-m`` or ``-c``.
EMPTY_FOLDER = BOOTSTRAP.parent


def usable_cores() -> int:
    """Cores that this process may run on, if the system reports them; else those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def module_words(module: str, *words: str, folder: Path | None = None) -> list[str]:
    """The command that runs ``module`` like ``python -m`` with a safe path; ``folder``: its working folder."""
    return [sys.executable, *script_words(module, *words, folder=folder)]


def script_words(module: str, *words: str, folder: Path | None = None) -> list[str]:
    """The same for a launcher that starts Python itself and expects a script."""
    return [str(BOOTSTRAP), *([] if folder is None else ["--in", str(folder)]), module, *words]


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment, by default this process's, with which Python 3.11 or later never imports from its working folder.

    Child processes inherit it. Entries of PYTHONPATH are kept as absolute paths, because a launcher may change the
    working folder.
    """
    found = dict(os.environ if environment is None else environment)
    if path := found.get("PYTHONPATH"):
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    return {**found, "PYTHONSAFEPATH": "1"}


@contextmanager
def safe_children(**variables: str) -> Iterator[None]:
    """Set ``safe_environment`` and ``variables`` for processes that a library starts; restored afterwards."""
    before = dict(os.environ)
    os.environ.update({**safe_environment(), **variables})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)
