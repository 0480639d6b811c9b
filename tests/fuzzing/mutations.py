"""A damage is data: an operation is a JSON object with a file, a name and what that needs. This module carries them out.

Files of a case are hard links, so that what changes is replaced and never written to.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzzing import archives
from fuzzing.values import MARK, line_of, text_of

Op = Mapping[str, Any]
#: A sparse file of terabytes is not read to be damaged once more.
_MOST_BYTES = 1 << 26


def apply(ops: Sequence[Op], folder: Path) -> None:
    """Damage the copy in ``folder``. An operation that does not fit any more, as after a shrunk one, does nothing."""
    for op in ops:
        path = folder / op["file"]
        with suppress(NotFitting, FileNotFoundError, NotADirectoryError, FileExistsError, IsADirectoryError, OSError):
            if (change := _CONTENT.get(op["op"])) is not None:
                content = _content_of(path)
                try:
                    changed = change(content, op, folder)
                except Exception:  # of whatever library: an earlier operation left no document
                    raise NotFitting from None
                replace(path, changed)
            else:
                _PLACES[op["op"]](path, op, folder)


class NotFitting(Exception):
    """The operation means something that is not there."""


def _content_of(path: Path) -> bytes:
    """Of a regular file: an earlier operation may have left a pipe, a device or terabytes there."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise NotFitting
    return path.read_bytes()


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# --- bytes -----------------------------------------------------------------------------------------------------------


def _flip(content: bytes, op: Op, _: Path) -> bytes:
    changed = bytearray(content)
    changed[op["at"]] ^= 1 << op["bit"]
    return bytes(changed)


def _fill(content: bytes, op: Op, _: Path) -> bytes:
    count = min(op["count"], len(content) - op["at"])
    return content[: op["at"]] + bytes([op["value"]]) * count + content[op["at"] + count :]


def _put(content: bytes, op: Op, _: Path) -> bytes:
    data = bytes.fromhex(op["hex"])
    if op["at"] + len(data) > len(content):
        raise NotFitting
    return content[: op["at"]] + data + content[op["at"] + len(data) :]


def _insert(content: bytes, op: Op, _: Path) -> bytes:
    return content[: op["at"]] + bytes.fromhex(op["hex"]) + content[op["at"] :]


def _cut(content: bytes, op: Op, _: Path) -> bytes:
    return content[: op["at"]] + content[op["at"] + op["count"] :]


def _splice(content: bytes, op: Op, folder: Path) -> bytes:
    other = _content_of(folder / op["from"])[op["from_at"] :][: op["count"]]
    return content[: op["at"]] + other + content[op["at"] + len(other) :]


# --- JSON and YAML ---------------------------------------------------------------------------------------------------


class _Marks:
    """Strings that stand for text which a serialiser would not write, until it has written the rest."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def hold(self, text: str) -> str:
        self.texts.append(text)
        return MARK.format(len(self.texts) - 1)

    def release(self, document: str) -> str:
        for number, text in enumerate(self.texts):
            mark = MARK.format(number)
            for quoted in (f'"{mark}"', f"'{mark}'", mark):
                document = document.replace(quoted, text)
        return document


def edit(document: Any, op: Op, marks: _Marks) -> Any:
    """``document`` with one change of its structure, in place or anew. Raises ``LookupError`` where it does not fit."""
    at = list(op["at"])
    if not at:
        return {"wrap": lambda: [document], "delete": lambda: {}, "set": lambda: marks.hold(text_of(op.get("value")))}[
            op["do"]
        ]()
    parent = document
    for key in at[:-1]:
        parent = parent[key]
    key = at[-1]
    old = parent[key]
    match op["do"]:
        case "set":
            parent[key] = marks.hold(text_of(op["value"]))
        case "delete":
            del parent[key]
        case "wrap":
            parent[key] = [old]
        case "rename":
            renamed = {marks.hold(text_of(op["to"])) if k == key else k: v for k, v in parent.items()}
            parent.clear()
            parent.update(renamed)
        case "duplicate":
            if isinstance(parent, list):
                parent.insert(key, old)
            else:  # the second one wins for Python, the first one elsewhere
                parent[marks.hold(f"{json.dumps(key)}: {text_of(op['value'])}, {json.dumps(key)}")] = parent.pop(key)
        case "swap":
            *way, other = op["with"]
            owner = document
            for step in way:
                owner = owner[step]
            parent[key], owner[other] = owner[other], old
    return document


def _json(content: bytes, op: Op, _: Path) -> bytes:
    marks = _Marks()
    return marks.release(json.dumps(edit(json.loads(content), op, marks))).encode("utf-8", "surrogateescape")


def _yaml(content: bytes, op: Op, _: Path) -> bytes:
    import yaml

    marks = _Marks()
    document = edit(yaml.load(content, yaml.CSafeLoader), op, marks)
    return marks.release(yaml.dump(document, Dumper=yaml.CSafeDumper, width=10**6)).encode("utf-8", "surrogateescape")


def _json_line(content: bytes, op: Op, folder: Path) -> bytes:
    lines = content.splitlines()
    lines[op["line"]] = _json(lines[op["line"]], op, folder)
    return b"\n".join(lines) + b"\n"


def _line(content: bytes, op: Op, _: Path) -> bytes:
    lines = content.split(b"\n")
    lines[op["line"]] = line_of(op["value"])
    return b"\n".join(lines)


def _safetensors(content: bytes, op: Op, _: Path) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    if "length" in op:
        return struct.pack("<Q", op["length"]) + content[8:]
    header, marks = json.loads(content[8 : 8 + length]), _Marks()
    changed = marks.release(json.dumps(edit(header, op, marks), separators=(",", ":"))).encode(
        "utf-8", "surrogateescape"
    )
    changed += b" " * (-len(changed) % 8)
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


_CONTENT: dict[str, Callable[[bytes, Op, Path], bytes]] = {
    "flip": _flip, "fill": _fill, "put": _put, "insert": _insert, "cut": _cut, "splice": _splice,
    "truncate": lambda content, op, _: content[: op["to"]], "extend": lambda content, op, _: content + bytes(op["count"]),
    "empty": lambda content, op, _: b"", "text": lambda content, op, _: line_of(op["value"]),
    "json": _json, "yaml": _yaml, "json-line": _json_line, "line": _line, "safetensors": _safetensors,
    "zip": lambda content, op, _: archives.changed_zip(content, op),
    "pickle": lambda content, op, _: archives.changed_pickle(content, op),
}  # fmt: skip


# --- files -----------------------------------------------------------------------------------------------------------


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _fifo(path: Path, op: Op, folder: Path) -> None:
    _gone(path)
    os.mkfifo(path)


def _directory(path: Path, op: Op, folder: Path) -> None:
    _gone(path)
    path.mkdir()


def _link(path: Path, op: Op, folder: Path) -> None:
    _gone(path)
    path.symlink_to(path.name if op["to"] == "itself" else op["to"])


def _socket(path: Path, op: Op, folder: Path) -> None:
    _gone(path)
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def _unreadable(path: Path, op: Op, folder: Path) -> None:
    replace(path, _content_of(path))
    path.chmod(0)


def _sparse(path: Path, op: Op, folder: Path) -> None:
    content = _content_of(path)
    replace(path, content if op["keep"] else b"")
    os.truncate(path, op["size"])


def _exchange(path: Path, op: Op, folder: Path) -> None:
    other, aside = folder / op["with"], folder / "aside"
    if not other.exists() or not path.exists() or path in (other, *other.parents) or other in path.parents:
        raise NotFitting
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def _renamed(path: Path, op: Op, folder: Path) -> None:
    target = os.fsencode(path.parent) + b"/" + line_of(op["to"])
    if op.get("copy"):
        os.link(path, target)
    else:
        os.rename(path, target)


_PLACES: dict[str, Callable[[Path, Op, Path], None]] = {
    "missing": lambda path, *_: _gone(path), "fifo": _fifo, "directory": _directory, "link": _link, "socket": _socket,
    "unreadable": _unreadable, "sparse": _sparse, "exchange": _exchange, "name": _renamed,
}  # fmt: skip
