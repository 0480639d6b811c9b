"""Parses untrusted JSON, YAML and tokenizers, within limits that are checked before values are built.

A document of a few hundred bytes can expand to gigabytes (aliases of aliases), for ever (an alias of itself), or
overflow the stack (brackets). Parsed values have finite numbers, text that can be encoded again, and a limited depth.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolconv.errors import CorruptFile
from smolconv.files import MOST_DOCUMENT_BYTES, read_bytes

#: Most levels. The deepest of our documents has 8; Python's recursion limit allows some hundreds.
_DEEPEST = 64
#: Most values of a YAML document, counting those of an alias at each use.
_MOST_YAML_NODES = 200_000
#: Most digits of a whole number: Adam's steps, sizes and ids have up to 20, seeds 39.
_MOST_DIGITS = 40
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, most_bytes: int = MOST_DOCUMENT_BYTES, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object; ``unique`` refuses names that are there twice.

    Raises ``MissingFile`` and ``MachineError``, and ``CorruptFile`` for anything else.
    """
    return parse_json_object(read_bytes(path, most_bytes), path, unique=unique)


def finite_json(value: Any) -> Any:
    """The value as JSON can hold it: null for non-finite numbers, lists for tuples."""
    if isinstance(value, Mapping):
        return {name: finite_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json_object(data: bytes, where: object, *, unique: bool = False) -> dict[str, Any]:
    """Parse a JSON object read from ``where``; ``unique`` as for ``parse_json``. Raises ``CorruptFile``."""
    try:
        value = parse_json(data, unique=unique)
    except ValueError as error:
        raise CorruptFile(f"{where} is not valid JSON ({error}).\nCopy the file again.") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{where} holds {_kind(value)}; expected a JSON object.\nCopy the file again.")
    return value


def parse_json(data: bytes, *, unique: bool = False) -> Any:
    """Parse any JSON value; ``unique`` refuses duplicate names.

    Raises ``ValueError``, also for NaN and infinity, numbers of more than 40 digits, text that is not Unicode, and more
    than 64 levels.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite, parse_int=_whole,
            object_pairs_hook=_once if unique else None,
        )  # fmt: skip
        if _LONE_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("it has a lone surrogate, which is not valid text") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    require_shallow(value)
    return value


def require_shallow(value: object) -> None:
    """Raise ``ValueError`` for lists and mappings in more than 64 levels. Nothing may hold itself."""
    level: list[Any] = [[value]]
    for _ in range(_DEEPEST + 1):
        parts = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level = [part for part in parts if isinstance(part, (dict, list, tuple))]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is not a finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _kind(value: object) -> str:
    known = {"list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}
    return known.get(type(value).__name__, "a number")


# --- tokenizers ------------------------------------------------------------------------------------------------------

#: Size limit of a tokenizer.json; with a vocabulary of 256,000 entries it has 34 MB.
MOST_TOKENIZER_BYTES = 1 << 27


def read_tokenizer(path: Path) -> Any:
    """Load a ``tokenizers.Tokenizer``. Raises ``ImportError`` without the library, and as ``read_json`` does."""
    from tokenizers import Tokenizer

    data = read_bytes(path, MOST_TOKENIZER_BYTES)
    with tokenizing(path):
        return Tokenizer.from_buffer(data)


@contextmanager
def tokenizing(path: Path) -> Iterator[None]:
    """Convert whatever the tokenizers library raises for the file ``path`` to ``CorruptFile``."""
    try:
        yield
    except BaseException as error:
        # It raises plain Exception and, if Rust panics, a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CorruptFile(
            f"{path} is not a tokenizer.json of the tokenizers library ({error!s:.300}).\nCopy the file again."
        ) from None


# --- YAML ------------------------------------------------------------------------------------------------------------


def parse_yaml_mapping(data: bytes | str, where: object) -> dict[str, Any]:
    """Parse a YAML mapping of JSON-like values, read from ``where``. Raises ``CorruptFile``."""
    import yaml

    try:
        require_small_yaml(data)
        value = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _require_plain(value)
    # For a value that does not match its tag PyYAML may raise anything, such as KeyError for !!bool x.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{where} is not valid YAML: {(str(error) or repr(error)).splitlines()[0]:.200}.") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{where} does not hold a mapping.")
    return value


def require_small_yaml(data: bytes | str) -> None:
    """Raise ``ValueError`` for more than 64 levels, more than 200,000 values, or an alias within what it stands for.

    The values and levels of an alias count wherever it is used. Nothing is made of the document, and its syntax is not
    judged.
    """
    import yaml

    open_sizes, heights = [0], [0]  # of the values that are open, from the outermost
    anchors: list[str | None] = [None]
    known: dict[str, tuple[int, int] | None] = {}  # size and height of anchored values; None while one is open
    try:
        for event in yaml.parse(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            size, height = 1, 0
            if isinstance(event, yaml.CollectionStartEvent):
                open_sizes.append(1)
                heights.append(0)
                anchors.append(event.anchor)
                if event.anchor is not None:
                    known[event.anchor] = None
            elif isinstance(event, yaml.CollectionEndEvent):
                size, height, anchor = open_sizes.pop(), heights.pop() + 1, anchors.pop()
                if anchor is not None:
                    known[anchor] = size, height
            elif isinstance(event, yaml.AliasEvent):
                found = known.get(event.anchor or "", (1, 0))
                if found is None:
                    raise ValueError(f"the alias *{event.anchor:.40} is inside its own anchor")
                size, height = found
            elif isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
                known[event.anchor] = 1, 0
            if len(open_sizes) - 1 + height > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
            if isinstance(event, yaml.CollectionStartEvent):
                continue
            open_sizes[-1] += size
            heights[-1] = max(heights[-1], height)
            if open_sizes[-1] > _MOST_YAML_NODES:
                raise ValueError(f"it holds more than {_MOST_YAML_NODES:,} values, including those of aliases")
    except yaml.YAMLError:
        return  # the parser will report the error with its line


def _require_plain(value: object) -> None:
    """Raise ``ValueError`` for values that JSON does not have: dates, bytes, sets, NaN, lone surrogates."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise ValueError(f"a key is {type(key).__name__}, expected text")
            _require_plain(key)
            _require_plain(part)
    elif isinstance(value, list):
        for part in value:
            _require_plain(part)
    elif isinstance(value, str):
        value.encode()
    elif isinstance(value, float):
        _finite(repr(value))
    elif isinstance(value, int):
        if abs(value) >= 10**_MOST_DIGITS:
            raise ValueError("it has a number of more than 40 digits")
    elif value is not None:
        raise ValueError(f"a value is {type(value).__name__}; expected text, a number, true or false")
