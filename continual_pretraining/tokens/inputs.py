"""Text files: which there are, and their documents for datatrove."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.errors import CorruptFile, UsageError

#: What each kind of input needs besides datatrove and tokenizers, which datatrove does not declare itself.
KINDS = {"jsonl": ("orjson",), "parquet": ("pyarrow",), "txt": ()}
_SUFFIX = re.compile(r"\.(jsonl|parquet|txt)(\.gz|\.zst)?$")


def kind_of(path: Path) -> str | None:
    found = _SUFFIX.search(path.name)
    return None if found is None or (found[1] == "parquet" and found[2]) else found[1]


def find_inputs(inputs: list[Path]) -> list[Path]:
    """Files in the order of the inputs, a folder's sorted by path. Hidden files and other suffixes are passed over."""
    expected = "Expected .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt or a folder of them."
    files: list[Path] = []
    for given in inputs:
        if not os.path.lexists(given):
            raise UsageError(f"{given!s:.200} is not there. {expected}")
        if given.is_dir():
            found = [path for path in sorted(given.rglob("*")) if not path.is_dir() and not path.name.startswith(".")]
            found = [path for path in found if kind_of(path) is not None]
            if not found:
                raise UsageError(f"{given} holds no text that can be read. {expected}")
            files += found
        elif kind_of(given) is None:
            raise UsageError(f"{given}: its suffix says nothing about its format. {expected}")
        else:
            files.append(given)
    files = [path.absolute() for path in files]
    twice = [path for path, count in Counter(files).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice: its documents would be there twice. Name it once.")
    for path in files:
        if "\n" in str(path) or str(path) != str(path).encode(errors="ignore").decode():
            raise UsageError(f"{str(path)!r} cannot be listed for datatrove. Give it a name in UTF-8 and in one line.")
    return files


def as_document(reader: Any, data: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
    """A row as the fields of a document, without the metadata that token files cannot hold."""
    if not isinstance(data, dict) or reader.text_key not in data:
        keys = ", ".join(map(str, list(data)[:8])) if isinstance(data, dict) else type(data).__name__
        raise CorruptFile(
            f"/{path.lstrip('/')}: row {number} has no {reader.text_key!r} (it has: {keys}).\n"
            "Pass --text-key with the name of the text, or mend the row."
        )
    text = data[reader.text_key]
    if text is not None and not isinstance(text, str):
        raise CorruptFile(
            f"/{path.lstrip('/')}: row {number} has a {type(text).__name__} under {reader.text_key!r}, not text.\n"
            "Pass --text-key with the name of the text, or mend the row."
        )
    return {"text": text, "id": f"{path}/{number}"}


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """datatrove has no reader of plain text: a file is a document, or several divided by ``separator``.

    ``paths_file`` lists the files; blank documents are left out.
    """

    paths_file: str
    separator: str | None

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.data import Document
        from datatrove.io import get_shard_from_paths_file, open_file

        yield from data or ()
        for path in get_shard_from_paths_file(self.paths_file, rank, world_size):
            with open_file(path, "rt", encoding="utf-8", compression="infer", newline="") as file:
                try:
                    text = file.read()
                except UnicodeDecodeError as error:
                    raise CorruptFile(f"{path} is not UTF-8: {error}. Convert it, or leave it out.") from None
            for number, part in enumerate([text] if self.separator is None else text.split(self.separator)):
                if part.strip():
                    yield Document(text=part, id=f"{path}/{number}")
