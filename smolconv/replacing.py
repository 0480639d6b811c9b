"""Decides what --overwrite may replace: only a checkpoint or smolconv's output, without other files."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from smolconv.errors import SmolconvError
from smolconv.layouts.layout import OwnFiles
from smolconv.layouts.registry import detect_layout
from smolconv.storage.manifest import MANIFEST, PROOF, read_manifest

_SHOWN_FILES = 3


def lost_with(target: Path) -> str | None:
    """What else than one checkpoint or smolconv's output would be lost if ``target`` were replaced.

    The result completes a sentence that starts "it"; None if nothing would be lost. A link counts as its target.
    """
    if not target.is_dir():
        return "is not a folder" if target.exists() else "is a dangling link"
    if not any(os.scandir(target)):
        return None
    known, own = set[str](), OwnFiles()
    with contextlib.suppress(SmolconvError):
        manifest = read_manifest(target)
        known.update(path.relative_to(target).as_posix() for path in (manifest.files if manifest is not None else ()))
    with contextlib.suppress(SmolconvError, OSError):
        own = detect_layout(target).own_files(target)
        known.update(own.names)
    if not known and not own.pattern:
        return "holds no checkpoint that smolconv can read"
    others: list[str] = []
    for folder, _, names in os.walk(target):
        for name in sorted(names):
            path = Path(folder) / name
            inside = path.relative_to(target).as_posix()
            # In a run with several steps, only one is the checkpoint to replace.
            of_step = own.step is None or target in (path.parent, own.step) or own.step in path.parents
            fits = of_step and bool(own.pattern) and re.fullmatch(own.pattern, inside) is not None
            fits = fits or (bool(own.beside) and re.fullmatch(own.beside, inside) is not None)
            if inside not in known and not fits and inside not in (MANIFEST, PROOF, "README.md"):
                others.append(inside)
        if len(others) >= _SHOWN_FILES:
            break
    return f"also holds {', '.join(others[:_SHOWN_FILES])}" if others else None
