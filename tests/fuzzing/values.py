"""Values that a document should not hold, as data: JSON itself, or {"$": name, ...} for what JSON has no short form of."""

from __future__ import annotations

import json
from typing import Any

MARK = "@@fuzzed-{}@@"

#: A bomb of aliases: each list holds the one before nine times.
_BOMB = "[&a0 [x], " + ", ".join(f"&a{i} [{', '.join(f'*a{i - 1}' for _ in range(9))}]" for i in range(1, 12)) + "]"

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63 - 1, 2**64, 10**18, 0.5, 1e308, "", "x", "é", "nan", "1", "float64", "\0", "a\nb",
    "../..", "/etc/passwd", "/dev/zero", [], {}, [1], [[]], {"a": 1}, [None], {"": None},
    {"$": "digits", "n": 5000}, {"$": "digits", "n": 400}, {"$": "letters", "n": 100_000}, {"$": "raw", "text": "1e999"},
    {"$": "raw", "text": "NaN"}, {"$": "raw", "text": "-Infinity"}, {"$": "raw", "text": '"\\ud800"'},
    {"$": "nest", "open": "[", "close": "]", "n": 3000}, {"$": "nest", "open": '{"a":', "close": "}", "n": 3000},
    {"$": "nest", "open": "[", "close": "", "n": 3000}, {"$": "many", "n": 20_000},
)  # fmt: skip
#: The same for YAML, whose flow style is nearly JSON.
NASTY_YAML: tuple[Any, ...] = (
    *NASTY,
    *({"$": "raw", "text": text} for text in (
        "&a [*a]", "&a {a: *a}", "*unknown", _BOMB, ".inf", ".nan", "-.inf", "2024-13-45", "2024-01-01", "!!timestamp 2024-99-99",
        '!!binary "=="', "!!binary x", "!!set {a}", "!!omap [a]", "!!pairs [a]", "!!python/object/apply:os.system [\"true\"]", "!!python/name:os.system",
        "!!int x", "!!float x", "!!null x", "!!bool x", "1:61:61", "0x" + "f" * 5000, "0b", "1_000", "<<", "? a", "=", "~", "!local x",
        "{[a]: b}", "{{a: b}: c}", "{a: 1, a: 2}", "{<<: {a: 1}}", "{<<: [1]}", "{<<: 1}", "'unfinished", "\"\\ud800\"", "\"\\x", "@", "`", "%", "a: b: c", "[" * 500,
    )),
)  # fmt: skip
#: Of counts in binary headers.
NASTY_INTEGERS = (0, 1, 2, 7, 255, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
#: Content of ``latest``, ``latest.txt`` and lines of ``.ds.metadata``: text, surrogates for bytes that are no UTF-8.
NASTY_LINES: tuple[Any, ...] = (
    "", " ", "\0", "..", "../..", ".", "/", "/etc", "/dev", "global_step3\nglobal_step3", "global_step3\0", "\udcff\udcfe", "3", "-3", "03", "\uff13", "3.0", "1e3",
    "99999999999999999999", "x|2", "x|0", "x|-1", "x|x", "|", "x|3", "x|2|2", "|2", "nan", "0", "-1", "1", "�" * 300, "a/b", "global_step3/",
    {"$": "letters", "n": 100_000}, {"$": "digits", "n": 5000}, {"$": "letters", "n": 255}, {"$": "letters", "n": 256},
)  # fmt: skip


def text_of(value: Any) -> str:
    """As it stands in a document of JSON."""
    if isinstance(value, dict) and "$" in value:
        match value["$"]:
            case "digits":
                return "9" * value["n"]
            case "letters":
                return '"' + "a" * value["n"] + '"'
            case "raw":
                return str(value["text"])
            case "nest":
                return value["open"] * value["n"] + "1" + value["close"] * value["n"]
            case "many":
                return "[" + "1," * value["n"] + "1]"
    return json.dumps(value)


def line_of(value: Any) -> bytes:
    """As a line of text."""
    if isinstance(value, dict):
        return text_of(value).strip('"').encode()
    return str(value).encode("utf-8", "surrogateescape")
