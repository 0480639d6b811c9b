"""A folder as a listing of names, as far as it can be seen from here: on the Hub, or what a cache has of it.

Paths are strings with ``/``; ``""`` is the root.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Protocol

from smolconv.errors import BadCheckpoint, MissingFile, SmolconvError, some_of

#: Small files that belong to a checkpoint in any layout.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "smolconv_manifest.json",
)  # fmt: skip
#: Suffixes of weights for any program: taken only when a layout names the file.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".onnx", ".onnx_data", ".gguf", ".msgpack", ".h5", ".ckpt", ".tflite")
_NOT_NEEDED = ("README.md", ".gitattributes", ".gitignore", "LICENSE*")


@dataclass(frozen=True, kw_only=True)
class Children:
    """The names directly in one folder."""

    files: frozenset[str]
    folders: frozenset[str]


class Listing(Protocol):
    """What layouts ask of it. Contents are had only of small files, one by one."""

    def children(self, folder: str) -> Children:
        """The names in a folder; none when there is no such folder."""

    def tree(self, folder: str) -> list[str]:
        """The paths of all files under a folder, at any depth."""

    def text(self, path: str) -> str: ...

    def branches(self) -> list[str]: ...

    def lacking(self, kind: type[BadCheckpoint], folder: str, found: str, expected: str, remedy: str) -> SmolconvError:
        """The error for something that should be in ``folder`` and is not."""


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What reading a checkpoint of one layout takes."""

    paths: frozenset[str] = frozenset()
    lacking: SmolconvError | None = None  #: why it cannot be read, where there are no paths


def companions(listing: Listing, folder: str) -> set[str]:
    """Configs and tokenizer in a folder."""
    return {within(folder, name) for name in listing.children(folder).files if _matches(name, COMPANIONS)}


def documents(listing: Listing, folder: str) -> set[str]:
    """The files of a folder but for weights and their indexes; torch archives, too."""
    return {
        within(folder, name)
        for name in listing.children(folder).files
        if not _matches(name, _NOT_NEEDED)
        and (name.endswith(".pt") or not name.endswith(WEIGHT_SUFFIXES))
        and not name.endswith(".index.json")
    }


def pointed_folder(listing: Listing, folder: str, pointer: str, step: int | None = None) -> str:
    """The folder that a file such as ``latest`` names, or that of ``step``. Raises ``MissingFile``."""
    name = listing.text(within(folder, pointer)).strip() if step is None else str(step)
    folders = listing.children(folder).folders
    if name not in folders:
        raise listing.lacking(
            MissingFile,
            folder,
            f"has a {pointer} that names {name!r}, but no such folder "
            f"(found: {some_of(sorted(folders), 8, more=True) or 'none'})",
            "Expected the folder of the newest step beside it.",
            "Name the folder of a step in the address, or choose another revision.",
        )
    return within(folder, name)


def no_checkpoint(listing: Listing, folder: str, marks: tuple[str, ...], expected: str) -> SmolconvError:
    """The error where nothing in ``folder`` is a mark of a layout; it names the folders or branches that have one."""
    paths = [PurePosixPath(path) for path in listing.tree("")]
    marked = [path for path in paths if _matches(path.name, marks) and "smolconv_state" not in path.parts]
    candidates = sorted({str(path.parent) for path in marked} - {"."})
    branches = listing.branches() if not candidates else []
    if candidates:
        remedy = f"Name one of its folders in the address: {some_of(candidates, 8, more=True)}."
    elif len(branches) > 1:
        remedy = f"Name one of its branches in the address, after an '@': {some_of(branches, 8, more=True)}."
    else:
        remedy = "Check the address: no folder of the repository has them."
    here = listing.children(folder)
    found = "holds no checkpoint" if here.files or here.folders else "is not a folder with files"
    return listing.lacking(MissingFile, folder, found, expected, remedy)


def within(folder: str, name: str) -> str:
    """The path of a name in a folder."""
    return f"{folder}/{name}" if folder else name


def folders_above(folder: str) -> list[str]:
    """The folders above, nearest first, down to the root."""
    return ["" if str(parent) == "." else str(parent) for parent in PurePosixPath(folder).parents] if folder else []


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
