"""What hypothesis draws a case from: an input, a command, and one to three damages that fit the input's files."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzzing import archives
from fuzzing.inputs import CHECKED_CONVERSION, SEEDS, VERIFY, WEIGHTS, Seed, Workshop
from fuzzing.values import NASTY, NASTY_INTEGERS, NASTY_LINES, NASTY_YAML

Draw = st.DrawFn
#: Commands that import torch are drawn this much more rarely than others.
_TORCH_RARITY = 12
_STRUCTURED = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of the campaign, as plain data."""

    seed: str
    command: tuple[str, ...]
    ops: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {"input": self.seed, "command": list(self.command), "ops": list(self.ops)}

    @staticmethod
    def from_json(document: dict[str, Any]) -> Case:
        return Case(seed=document["input"], command=tuple(document["command"]), ops=tuple(document["ops"]))


@st.composite
def cases(draw: Draw, workshop: Workshop, kinds: Sequence[str] = ()) -> Case:
    """Cases of inputs of these kinds, or of all."""
    kind = draw(_weighted({kind: weight for kind, weight in WEIGHTS.items() if not kinds or kind in kinds}))
    seed = draw(st.sampled_from([seed for seed in SEEDS.values() if seed.kind == kind]))
    command = draw(_commands(seed))
    count = draw(st.sampled_from([1] * 7 + [2] * 2 + [3]))
    files = _files(workshop.seed(seed.name))
    ops = [draw(_op(workshop.seed(seed.name), files)) for _ in range(count)]
    return Case(seed=seed.name, command=command, ops=tuple(ops))


def _weighted(weights: dict[str, int]) -> st.SearchStrategy[str]:
    return st.sampled_from([name for name, weight in weights.items() for _ in range(weight)])


def _commands(seed: Seed) -> st.SearchStrategy[tuple[str, ...]]:
    heavy = {VERIFY, CHECKED_CONVERSION}
    return st.sampled_from([c for c in seed.commands for _ in range(1 if c in heavy else _TORCH_RARITY)])


@cache
def _files(folder: Path) -> dict[str, list[str]]:
    """Relative paths by what they are: names that differ in numbers alone are of one kind."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"\d+", "N", path.name if path.is_file() else "folder")
        found.setdefault(name, []).append(str(path.relative_to(folder)))
    return found


@st.composite
def _op(draw: Draw, folder: Path, files: dict[str, list[str]]) -> dict[str, Any]:
    kind = draw(st.sampled_from([name for name in files for _ in range(1 if name == "folder" else 4)]))
    file = draw(st.sampled_from(files[kind]))
    path = folder / file
    if kind == "folder":
        return {"file": file, **draw(_place(files))}
    content = _structure(path)
    choice = draw(st.integers(0, 9))
    if content is not None and choice <= _STRUCTURED:
        return {"file": file, **draw(content)}
    if choice <= 7:
        return {"file": file, **draw(_bytes(path.stat().st_size, files))}
    return {"file": file, **draw(_place(files))}


# --- files and bytes -------------------------------------------------------------------------------------------------


@st.composite
def _place(draw: Draw, files: dict[str, list[str]]) -> dict[str, Any]:
    # Who may read everything reads what is unreadable, too.
    names = ["missing", "fifo", "directory", "link", "socket", "sparse", "exchange", "name"] + ["unreadable"] * bool(
        os.geteuid()
    )
    name = draw(st.sampled_from(names))
    match name:
        case "link":
            return {
                "op": name,
                "to": draw(
                    st.sampled_from(["itself", "nowhere", "/dev/zero", "/dev/null", "/dev/tty", ".", "..", "/"])
                ),
            }
        case "sparse":
            return {
                "op": name,
                "size": draw(st.sampled_from([10 << 40, 1 << 33, 1 << 26])),
                "keep": draw(st.booleans()),
            }
        case "exchange":
            kind = draw(st.sampled_from(sorted(files)))
            return {"op": name, "with": draw(st.sampled_from(files[kind]))}
        case "name":
            odd = ["x", "\udcff\udcfe", "a\nb", "a\x1b[31mb", "n" * 255, "x.safetensors", "x.pt", "model.safetensors", "latest", "smolconv_manifest.json",
                   "mp_rank_99_model_states.pt", "zero_pp_rank_7_mp_rank_00_optim_states.pt", "٣", "4", "model.safetensors.index.json"]  # fmt: skip
            return {"op": name, "to": draw(st.sampled_from(odd)), "copy": draw(st.booleans())}
    return {"op": name}


@st.composite
def _bytes(draw: Draw, size: int, files: dict[str, list[str]]) -> dict[str, Any]:
    name = draw(st.sampled_from(["flip", "fill", "truncate", "extend", "empty", "splice", "insert", "cut"]))
    places = [
        st.integers(0, max(size - 1, 0)),
        st.integers(0, min(max(size - 1, 0), 511)),
        st.integers(max(size - 128, 0), max(size - 1, 0)),
    ]
    at = draw(st.one_of(places))
    count = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
    match name:
        case "flip":
            return {"op": name, "at": at, "bit": draw(st.integers(0, 7))}
        case "fill":
            return {"op": name, "at": at, "count": count, "value": draw(st.sampled_from([0, 255, 9, 32, 127]))}
        case "truncate":
            return {"op": name, "to": at}
        case "extend":
            return {"op": name, "count": count}
        case "splice":
            other = draw(st.sampled_from(files[draw(st.sampled_from(sorted(set(files) - {"folder"})))]))
            return {
                "op": name,
                "at": at,
                "from": other,
                "from_at": draw(st.sampled_from([0, 8, 100, 4096])),
                "count": count,
            }
        case "insert":
            return {
                "op": name,
                "at": at,
                "hex": draw(
                    st.sampled_from(["00", "ff", "0a", "09", "efbbbf", "ed a0 80", "7b", "5b" * 64, "26612061"])
                ),
            }
        case "cut":
            return {"op": name, "at": at, "count": count}
    return {"op": name}


# --- structure -------------------------------------------------------------------------------------------------------


@cache
def _structure(path: Path) -> st.SearchStrategy[dict[str, Any]] | None:
    """Damages of what a file's format says; None for one without."""
    match path.suffix:
        case ".json":
            document = json.loads(path.read_bytes())
            return _edits(document, NASTY).map(lambda edit: {"op": "json", **edit})
        case ".yaml":
            import yaml

            return _edits(yaml.safe_load(path.read_bytes()), NASTY_YAML).map(lambda edit: {"op": "yaml", **edit})
        case ".safetensors":
            return _safetensors(path)
        case ".pt" | ".bin":
            return st.one_of(_zip(path), _pickle(path), _pickle(path))
        case ".jsonl":
            lines = path.read_bytes().splitlines()
            return st.integers(0, len(lines) - 1).flatmap(
                lambda line: _edits(json.loads(lines[line]), NASTY).map(
                    lambda edit: {"op": "json-line", "line": line, **edit}
                )
            )
        case ".index":
            return st.fixed_dictionaries({
                "op": st.just("put"), "at": st.integers(0, path.stat().st_size // 8 - 1).map(lambda index: 8 * index),
                "hex": st.sampled_from(NASTY_INTEGERS).map(lambda value: struct.pack("<Q", value).hex()),
            })  # fmt: skip
        case ".metadata":
            return st.fixed_dictionaries(
                {"op": st.just("line"), "line": st.integers(0, 2), "value": st.sampled_from(NASTY_LINES)}
            )
        case ".gguf":
            return _gguf(path)
    if path.name.startswith("latest"):
        return st.sampled_from(NASTY_LINES).map(lambda value: {"op": "text", "value": value})
    return None


def _paths(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value is, for every value that is not the whole."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [way for key, value in items for way in ((*at, key), *_paths(value, (*at, key)))]


@st.composite
def _edits(draw: Draw, document: Any, values: Sequence[Any]) -> dict[str, Any]:
    paths = _paths(document)
    # Top fields say most; what is deep is often one of many that are alike.
    shallow = [path for path in paths if len(path) <= 2] or [()]
    at = draw(st.one_of(st.sampled_from(shallow), st.sampled_from(paths or [()])))
    do = draw(st.sampled_from(["set"] * 6 + ["delete", "wrap", "rename", "duplicate", "swap", "near"]))
    old = document
    for key in at:
        old = old[key]
    if do == "near":
        near = [old]
        if isinstance(old, (int, float)):
            near = [old + 1, old - 1, old * 2, old / 2, old // 2, -old, not old, str(old), float(old)]
        elif isinstance(old, str):
            near = [old + " ", old.upper(), old[:-1], old * 2, [old]]
        elif isinstance(old, list):
            near = [old[1:], old[::-1], old * 2]
        return {"do": "set", "at": list(at), "value": draw(st.sampled_from(near))}
    if do == "rename" and (not at or not isinstance(at[-1], str)):
        do = "set"
    if do == "rename":
        return {
            "do": do,
            "at": list(at),
            "to": draw(
                st.sampled_from(["", "x", "\0", "é", "a" * 300, f"{at[-1]} ", str(at[-1]).upper(), "../x", "weight"])
            ),
        }
    if do == "swap" and at and paths:
        other = draw(st.sampled_from(paths))
        if other[: len(at)] != at and at[: len(other)] != other:
            return {"do": do, "at": list(at), "with": list(other)}
        do = "set"
    if do in ("set", "duplicate", "swap"):
        return {"do": "set" if do == "swap" or not at else do, "at": list(at), "value": draw(st.sampled_from(values))}
    return {"do": do, "at": list(at)}


def _safetensors(path: Path) -> st.SearchStrategy[dict[str, Any]]:
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    near = [length - 1, length + 1, length + 8, len(content), len(content) - 8, *NASTY_INTEGERS]
    dtypes = st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "x", "", "f32"])
    shapes = st.lists(st.sampled_from([0, 1, 2, 48, 2304, 2**31, 2**63 - 1, 2**64, -1]), max_size=4)
    offsets = st.lists(
        st.sampled_from([0, 4, 192, len(content), len(content) - 8 - length, 2**63 - 1, 2**64, -4]),
        min_size=2,
        max_size=2,
    )
    fields = st.one_of(*(
        st.tuples(st.just(field), values) for field, values in (("dtype", dtypes), ("shape", shapes), ("data_offsets", offsets))
    ))  # fmt: skip
    typed = st.tuples(st.sampled_from(names), fields).map(
        lambda drawn: {"op": "safetensors", "do": "set", "at": [drawn[0], drawn[1][0]], "value": drawn[1][1]}
    )
    edits = _edits(header, NASTY).map(lambda edit: {"op": "safetensors", **edit})
    lengths = st.sampled_from(near).map(lambda value: {"op": "safetensors", "length": value % (1 << 64)})
    return st.one_of(edits, edits, typed, typed, lengths)


@st.composite
def _zip(draw: Draw, path: Path) -> dict[str, Any]:
    where = draw(st.sampled_from(["local", "central", "end"]))
    record = draw(st.integers(0, 40))
    do = "set" if where == "end" else draw(st.sampled_from(["set", "set", "set", "name", "twice", "gone"]))
    op = {"op": "zip", "where": where, "record": record, "do": do}
    if do == "set":
        size = path.stat().st_size
        values = st.one_of(st.sampled_from(NASTY_INTEGERS), st.integers(0, 64), st.integers(0, size))
        return {**op, "field": draw(st.sampled_from(sorted(archives.FIELDS[where]))), "value": draw(values)}
    if do == "name":
        names = [
            b"archive/data.pkl",
            b"ARCHIVE/DATA.PKL",
            b"archive/data/0",
            b"../../../x",
            b"/etc/passwd",
            b"a\0b",
            b"\xff\xfe",
            b"archive\\data.pkl",
            b"",
        ]
        return {**op, "hex": draw(st.sampled_from(names)).hex()}
    return op


def _text(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def _long(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data if len(data) < 256 else b"\x8b" + struct.pack("<I", len(data)) + data


_INTEGERS = [
    *(b"J" + struct.pack("<i", value) for value in (-1, 0, 1, 2, 3, 2**31 - 1, -(2**31))), b"K\x00", b"K\x01", b"K\x07",
    *(_long(value) for value in (-1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**2039 - 1, 2**5000, -(2**63))), b"\x8a\x00", b"I00\n", b"I01\n", b"I-5\n",
]  # fmt: skip
_TEXTS = [_text(text) for text in (
    b"", b"0", b"1", b"999", b"cpu", b"cuda:0", b"-1", b"\xed\xa0\x80", b"\0", b"../x", b"step", b"module", b"exp_avg", b"a" * 100_000, b"storage", b"\xff",
)] + [b"U\x01x", b"\x8c\x01x", b"C\x01x", b"B\x01\0\0\0x", b"\x96\x01\0\0\0\0\0\0\0x", b"Vx\n"]  # fmt: skip
_GLOBALS = [b"c" + name.replace(b" ", b"\n") + b"\n" for name in (
    b"os system", b"posix system", b"builtins eval", b"builtins exec", b"__builtin__ eval", b"builtins getattr", b"torch load", b"torch FloatStorage", b"torch DoubleStorage",
    b"torch BFloat16Storage", b"torch LongStorage", b"torch ByteStorage", b"torch bfloat16", b"torch float8_e4m3fn", b"torch Size", b"torch device", b"torch._utils _rebuild_tensor_v2",
    b"torch._utils _rebuild_parameter", b"collections OrderedDict", b"collections defaultdict", b"builtins dict", b"builtins list", b"builtins set", b"argparse Namespace", b"x y", b"torch x",
    b"numpy dtype", b"numpy.core.multiarray scalar", b"numpy._core.multiarray _reconstruct", b"copyreg _reconstructor", b"deepspeed.runtime.zero.config ZeroStageEnum",
)]  # fmt: skip
_OTHERS = [
    b"N", b"\x88", b"\x89", b")", b"}", b"]", b"\x8f", b"(", b"0", b"1", b"2", b".", b"R", b"b", b"Q", b"\x85", b"\x86", b"\x87", b"t", b"l", b"d", b"e", b"a", b"u", b"s",
    b"\x81", b"\x92", b"\x93", b"\x94", b"o", b"ia\nb\n", b"Px\n", b"\x90", b"\x91", b"\x97", b"\x98", b"\x80\x05", b"\x80\xff", b"\x95" + b"\xff" * 8,
    b"G" + struct.pack(">d", float("nan")), b"G" + struct.pack(">d", float("inf")), b"G" + struct.pack(">d", -1.0), b"G" + struct.pack(">d", 1e308), b"Fnan\n", b"F1e999\n",
    b"X\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"L" + b"9" * 5000 + b"L\n", b"I" + b"9" * 5000 + b"\n", b"\xff", b"\x00", b"\x82\x01",
    b"]" * 3000, b"(" * 3000, b"}" * 3000 + b"s" * 10, b"h\x00", b"h\x01", b"j\xff\xff\xff\xff", b"q\x00", b"r\xff\xff\xff\xff", b"g0\n", b"p0\n", b"2" * 3000, b"(2l2\x86" * 40,
    b"](h\x00h\x00h\x00e" * 40,
]  # fmt: skip


@st.composite
def _pickle(draw: Draw, path: Path) -> dict[str, Any]:
    codes = _instructions(path)
    at = draw(st.integers(0, len(codes) - 1))
    do = draw(st.sampled_from(["replace"] * 6 + ["insert", "remove", "copy", "swap", "repeat"]))
    op = {"op": "pickle", "do": do, "at": at}
    if do in ("copy", "swap"):
        return {**op, "from" if do == "copy" else "with": draw(st.integers(0, len(codes) - 1))}
    if do == "repeat":
        return {**op, "count": draw(st.sampled_from([2, 3, 1000, 100_000]))}
    if do == "remove":
        return op
    name, argument, _ = codes[at]
    like: list[bytes] = _OTHERS
    if do == "replace" and isinstance(argument, int) and "GET" not in name and "PUT" not in name:
        like = [*_INTEGERS, *(b"J" + struct.pack("<i", (argument + more) % 2**31) for more in (-1, 1, argument))]
    elif do == "replace" and name == "GLOBAL":
        like = _GLOBALS
    elif do == "replace" and isinstance(argument, str):
        like = [*_TEXTS, *sorted({code for other, _, code in codes if other == name})]
    elif "GET" in name:
        like = [code for other, _, code in codes if other == name] + [b"h\xff"]
    return {
        **op,
        "hex": draw(
            st.one_of(
                st.sampled_from(like),
                st.sampled_from(like),
                st.sampled_from([*_OTHERS, *_INTEGERS, *_TEXTS, *_GLOBALS]),
            )
        ).hex(),
    }


@cache
def _instructions(path: Path) -> list[tuple[str, Any, bytes]]:
    return archives.instructions(archives.pickle_record(path.read_bytes())[1])


def _gguf(path: Path) -> st.SearchStrategy[dict[str, Any]]:
    sizes = {"B": 1, "H": 2, "I": 4, "Q": 8, "f": 4}
    places = _gguf_places(path.read_bytes())

    def put(place: tuple[int, str]) -> st.SearchStrategy[dict[str, Any]]:
        at, kind = place
        values = st.one_of(st.integers(0, 40), st.sampled_from(NASTY_INTEGERS))
        return values.map(
            lambda value: {
                "op": "put",
                "at": at,
                "hex": (value % (1 << 8 * sizes[kind])).to_bytes(sizes[kind], "little").hex(),
            }
        )

    return st.sampled_from(places).flatmap(put)


def _gguf_places(content: bytes) -> list[tuple[int, str]]:
    """Where a number of the header is, and its size: magic, counts, lengths, types, values, dimensions, offsets."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    found = [(0, "I"), (4, "I"), (8, "Q"), (16, "Q")]
    at, (tensors, pairs) = 24, struct.unpack_from("<2Q", content, 8)

    def text() -> None:
        nonlocal at
        found.append((at, "Q"))
        at += 8 + struct.unpack_from("<Q", content, at)[0]

    for _ in range(pairs):
        text()
        found.append((at, "I"))
        (kind,) = struct.unpack_from("<I", content, at)
        at += 4
        count = 1
        if kind == 9:
            found += [(at, "I"), (at + 4, "Q")]
            kind, count = struct.unpack_from("<IQ", content, at)
            at += 12
        for number in range(count):
            if kind == 8:
                before = len(found)
                text()
                del found[before + (number < 2) :]
            else:
                found += [(at, {1: "B", 2: "H", 4: "I", 8: "Q"}[sizes[kind]])] * (number < 2)
                at += sizes[kind]
    for _ in range(tensors):
        text()
        (dimensions,) = struct.unpack_from("<I", content, at)
        found += [(at, "I"), *((at + 4 + 8 * i, "Q") for i in range(dimensions + 1))]
        at += 4 + 8 * dimensions
        found[-1] = (at, "I")
        found.append((at + 4, "Q"))
        at += 12
    return found
