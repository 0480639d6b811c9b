"""Lists the existing and the needed files of a checkpoint, in a folder on disk or on the Hub.

Each layout implements it in its module ``listing``: the functions of ``Listing``, and the names that it uses
its files by. Nothing there opens a file of tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from smolconv.errors import CorruptFile
from smolconv.files import MOST_DOCUMENT_BYTES, MOST_NAME_BYTES, is_path_below, is_there, read_bytes
from smolconv.storage.manifest import MANIFEST

if TYPE_CHECKING:
    from typing_extensions import Self


#: Files that are copied with the weights, besides config.json.
ASSET_NAMES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "README.md",
    "LICENSE",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
#: Names that ``smolconv continue-train`` writes in a run's folder: the recipe and the folder of checkpoints.
RUN_RECIPE, RUN_CHECKPOINTS = "recipe.resolved.yaml", "checkpoints"
#: Names of licence files: LICENSE.txt, NOTICE, USE_POLICY.md and so on.
_TERMS = (
    r"(?i:(third[_-]party[_-]|acceptable[_-])?(licen[cs]es?|copying|notices?|use[_-]policy)([_-][\w-]+)?"
    r"(\.(txt|md|rst|html|pdf))?)"
)
#: All of these names as a pattern, with other files that smolconv or a Hub client writes.
ASSET_PATTERN = "|".join(
    (*map(re.escape, (*ASSET_NAMES, MANIFEST, "config.json", ".gitattributes")), _TERMS, rf"{TEMPLATES}/[^/]+\.jinja")
)


class AnyPath(Protocol):
    """The common interface of ``pathlib.Path`` and a path in a Hub repository. ``str`` is its name in messages."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self) -> Self: ...
    def __truediv__(self, name: str, /) -> Self: ...
    def exists(self) -> bool: ...
    def is_file(self) -> bool: ...
    def is_dir(self) -> bool: ...
    def iterdir(self) -> Iterable[Self]: ...
    def rglob(self, pattern: str, /) -> Iterable[Self]: ...
    def read_bytes(self) -> bytes: ...


P = TypeVar("P", bound=AnyPath)


def there(path: AnyPath) -> bool:
    """Whether a file exists. On disk, raises ``BadCheckpoint`` for anything else with its name."""
    return is_there(path) if isinstance(path, Path) else path.is_file()


def content(path: AnyPath, most_bytes: int = MOST_DOCUMENT_BYTES) -> bytes:
    """The content of a small file whose state is not recorded. Raises as ``read_bytes`` of ``files``."""
    return read_bytes(path, most_bytes, noted=False) if isinstance(path, Path) else path.read_bytes()


def pointer_text(pointer: AnyPath) -> str:
    """The text of a file that names a folder. Raises ``CorruptFile`` if it is long.

    It is not recorded among a checkpoint's files: a run that continues rewrites it.
    """
    return content(pointer, MOST_NAME_BYTES).decode(errors="replace").strip()


def read_name(pointer: AnyPath) -> str:
    """The same, checked to be the name of a folder next to it, or below it (``runs/step5``).

    Raises ``CorruptFile`` for anything else, as for a path whose links lead elsewhere.
    """
    name = pointer_text(pointer)
    if not is_path_below(name) or ("/" in name and _leads_out(pointer.parent, name)):
        raise CorruptFile(
            f"{pointer} holds {name!r:.60}; expected the name of a folder next to it.\n"
            "Copy it again, or name that folder itself."
        )
    return name


def newest_step(folder: Path) -> Path:
    """The folder of the newest step in a run of ``smolconv continue-train``; any other folder unchanged.

    Raises ``CorruptFile`` for a run whose ``latest`` names no folder next to it.
    """
    checkpoints = folder / RUN_CHECKPOINTS
    if os.path.lexists(folder / RUN_RECIPE) and os.path.lexists(checkpoints / "latest"):
        return checkpoints / read_name(checkpoints / "latest")
    return folder


def _leads_out(folder: AnyPath, name: str) -> bool:
    if not isinstance(folder, Path):
        return False
    top = os.path.realpath(folder)
    return os.path.commonpath((top, os.path.realpath(folder / name))) != top


class Listing(Protocol):
    """A layout's module ``listing``."""

    MARKS: tuple[str, ...]  #: patterns of names by which a checkpoint is recognised

    def detect(self, folder: AnyPath) -> bool: ...

    def holds_training(self, folder: AnyPath) -> bool:
        """Whether it has training state in addition to weights: of two layouts, the one with it is read."""
        ...

    def needed_files(self, folder: P, *, step: int | None, optimizer: bool) -> list[P]:
        """The files that reading the checkpoint in ``folder`` opens; all are there.

        ``step`` chooses one of a run's; without ``optimizer``, Adam's tensors are left out if they are in separate
        files. Raises ``BadCheckpoint`` and its kinds for missing files.
        """


def assets_in(folder: P) -> dict[str, P]:
    """The files of a folder that are copied with its weights, by their paths within it."""
    found = {name: path for name in ASSET_NAMES if (path := folder / name).is_file()}
    beside: dict[str, P] = {}
    with suppress(OSError):  # permissions may allow entering a folder but not listing it
        beside = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    found |= {name: beside[name] for name in sorted(beside) if re.fullmatch(_TERMS, name) and beside[name].is_file()}
    templates = beside.get(TEMPLATES)
    if templates is not None and templates.is_dir():
        inside = {path.name: path for path in templates.iterdir() if path.name.endswith(".jinja") and path.is_file()}
        found |= {f"{TEMPLATES}/{name}": inside[name] for name in sorted(inside)}
    return found


def companions(folder: P) -> list[P]:
    """Small files that a reader of any layout looks for. A README is about the repository."""
    documents = [path for name in ("config.json", MANIFEST) if (path := folder / name).is_file()]
    return [*documents, *(path for name, path in assets_in(folder).items() if name != "README.md")]


def files_below(folder: P) -> list[P]:
    """All files of a folder, at any depth; empty if there is no such folder."""
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
