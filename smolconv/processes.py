"""Python processes of ours: how they are started so that nothing is imported from the folder they run in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

#: Runs a module; alone in its folder, which is therefore safe to be on ``sys.path`` and to be a working folder.
BOOTSTRAP = Path(__file__).absolute().parent / "bootstrap" / "run_module.py"
#: A working folder from which nothing can be imported, for a process of others that is started by ``-m`` or ``-c``.
EMPTY_FOLDER = BOOTSTRAP.parent


def usable_cores() -> int:
    """Cores that this process may run on, where the system tells; else those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def module_words(module: str, *words: str, folder: Path | None = None) -> list[str]:
    """The words that run ``module`` as ``python -m`` would, but for its path; ``folder``: where it shall work."""
    return [sys.executable, *script_words(module, *words, folder=folder)]


def script_words(module: str, *words: str, folder: Path | None = None) -> list[str]:
    """The same for a launcher that starts Python itself and is given a script."""
    return [str(BOOTSTRAP), *([] if folder is None else ["--in", str(folder)]), module, *words]


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment, ours by default, with which Python from 3.11 on never imports from its working folder.

    It is inherited by what the process starts in turn. The entries of PYTHONPATH are kept, as absolute paths: they must
    not change their meaning where a launcher changes the working folder.
    """
    found = dict(os.environ if environment is None else environment)
    if path := found.get("PYTHONPATH"):
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    return {**found, "PYTHONSAFEPATH": "1"}


@contextmanager
def safe_children(**variables: str) -> Iterator[None]:
    """``safe_environment`` and ``variables`` for what a library starts by itself; afterwards ours is as it was."""
    before = dict(os.environ)
    os.environ.update({**safe_environment(), **variables})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)
