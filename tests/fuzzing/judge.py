"""Runs one case in a limited process and says what smolconv made of it.

A clean error and the right output are well; everything else is a failure, with a signature by which failures that have
one cause are counted together.
"""

from __future__ import annotations

import json
import os
import re
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked_cli
from conftest import Finished

import smolconv.errors
from fuzzing.inputs import CHECKED_CONVERSION, INPUT, ORIGINAL, OUTPUT, SEEDS, VERIFY, Command, Workshop
from fuzzing.mutations import apply
from fuzzing.outputs import Tensors, safetensors_of, tensors_below
from fuzzing.strategies import Case

SECONDS = 20
MEMORY_BYTES = 3 << 29
MOST_LINES, MOST_LETTERS = 9, 2000
#: Outcomes that are well.
CLEAN_ERROR, RIGHT_OUTPUT, EXPLAINED = "clean error", "right output", "changed as damaged"
#: Neither: nothing that was recorded could tell, or we cannot say. The campaign lists them.
UNDECIDED = "undecided"
_CLASSES = "|".join(
    name
    for name, value in vars(smolconv.errors).items()
    if isinstance(value, type) and issubclass(value, smolconv.errors.SmolconvError)
)
_ERROR = re.compile(rf"^(?:{_CLASSES}): \S", re.MULTILINE)
_USAGE = re.compile(r"^Usage: ", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")
#: Files of a manifest that people edit: a change of these is a warning (docs/cli.md).
_EDITABLE = re.compile(r"README\.md|token|vocab|merges|chat_template|special_tokens|generation_config")
_MANIFEST = "smolconv_manifest.json"
#: Fields of a model's config that say how the same bytes are cut into tensors, or which of them are used.
_SHAPING = re.compile(r"heads|head_dim|tie_word|dtype|interleaved|vocab|layers|step|model_type|architectures|no_rope")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case."""

    kind: str
    signature: str = ""
    detail: str = ""
    code: int = 0
    nameless: bool = False  #: a clean error of one damage that does not name the damaged file

    @property
    def is_failure(self) -> bool:
        return self.kind not in (CLEAN_ERROR, RIGHT_OUTPUT, EXPLAINED, UNDECIDED)


class Judge:
    """Judges cases in one workshop. Remembers what whole inputs become."""

    def __init__(self, workshop: Workshop, seconds: int = SECONDS) -> None:
        self.workshop, self.seconds = workshop, seconds
        self.whole: dict[tuple[str, Command], tuple[Finished, Tensors]] = {}

    def baseline(self, seed: str, command: Command) -> tuple[Finished, Tensors]:
        """What the command makes of the whole input."""
        if (seed, command) not in self.whole:
            case = self.workshop.case(seed)
            done = self._run(command, case)
            self.whole[seed, command] = done, tensors_below(case / OUTPUT) if done.code == 0 else {}
        return self.whole[seed, command]

    def outcome(self, case: Case) -> Outcome:
        """Judge a case. A mistake of the fuzzer is a failure, too: the campaign continues, and shows it."""
        try:
            return self._outcome(case)
        except Exception as error:
            return Outcome(kind="the fuzzer failed", signature=repr(error)[:200], detail=traceback.format_exc())

    def _outcome(self, case: Case) -> Outcome:
        folder = self.workshop.case(case.seed)
        apply(case.ops, folder / INPUT)
        before = _states(folder / INPUT)
        done = self._run(case.command, folder)
        if (found := self._failure(done, case, folder)) is not None:
            return found
        if _states(folder / INPUT) != before:
            return Outcome(kind="source changed", signature=" ".join(case.command[:1]), code=done.code)
        left = sorted({path.name for path in folder.iterdir()} - {INPUT, ORIGINAL})
        if done.code or "--dry-run" in case.command:
            if left and not _found_while_copying(done, left):
                return Outcome(
                    kind="leftover",
                    signature=f"{left} after {_first_line(done.stderr)}",
                    detail=done.stderr,
                    code=done.code,
                )
        elif [name for name in left if not name.startswith(OUTPUT) or name.endswith(".partial")]:
            return Outcome(kind="leftover", signature=f"{left} after success", code=done.code)
        if done.code:
            return Outcome(kind=CLEAN_ERROR, detail=done.stderr, code=done.code, nameless=_nameless(case, done.stderr))
        return _judged_output(case, done, folder, self)

    def _run(self, command: Sequence[str], folder: Path) -> Finished:
        torch = command in (VERIFY, CHECKED_CONVERSION)
        return Finished(*forked_cli.run(command, folder, torch=torch, seconds=self.seconds, memory_bytes=MEMORY_BYTES))

    def _failure(self, done: Finished, case: Case, folder: Path) -> Outcome | None:
        """What is wrong whatever the output is."""
        said, first = done.stderr, _first_line(done.stderr)

        def failure(kind: str, signature: str = first) -> Outcome:
            return Outcome(kind=kind, signature=signature, detail=said[-3000:], code=done.code)

        if done.code in (-9, -24):
            return failure("hang", f"{case.command[0]} {_causes(case)}")
        if done.code < 0:
            return failure("killed", f"signal {-done.code}")
        if "Traceback" in said or "bug of smolconv" in said or done.code == 70:
            return failure("traceback", self._frame(case, folder))
        if "out of memory" in said or "MemoryError" in said:
            return failure("memory", f"{case.command[0]} {_causes(case)}")
        if re.search(r"\[Errno \d+\]", said):
            return failure("bare OSError")
        may_differ = case.command[0] in ("verify", "diff") or "--verify" in case.command
        if done.code not in (0, 2, 3) and not (done.code == 1 and may_differ):
            return failure(f"exit code {done.code}")
        if _CONTROL.search(said):
            return failure("control characters")
        if len(said) > (MOST_LETTERS if done.code else 4 * MOST_LETTERS):
            return failure("long message")
        if done.code == 3 and case.command[:2] == ("data", "inspect") and "--eos" in case.command and done.stdout:
            return None  # the report is the message
        if done.code == 1 and may_differ:
            return None
        if done.code and len(said.splitlines()) > MOST_LINES:
            return failure("long message")
        if done.code and not (_ERROR.search(said) or _USAGE.search(said)):
            return failure("no message")
        if done.code and done.stdout and "--dry-run" in case.command and case.command[0] == "continue-train":
            return None  # the plan, as far as one could be made, and what is wrong
        if done.code and not _is_error_document(done, "--json" in case.command):
            return failure("output beside an error")
        return None

    def _frame(self, case: Case, folder: Path) -> str:
        """The error and the innermost line of smolconv, from a second run."""
        done = self._run(("--debug", *case.command), folder)
        frames = re.findall(
            r'File "[^"]*/((?:smolconv|commands|continual_pretraining)/[^"]+)", line (\d+), in (\S+)', done.stderr
        )
        errors = re.findall(
            r"^(\w+(?:\.\w+)*(?:Error|Exception|Warning|Interrupt|Exit)\w*)\b", done.stderr, re.MULTILINE
        )
        where = f"{frames[-1][0]}:{frames[-1][2]}" if frames else "?"
        return f"{errors[-1] if errors else '?'} in {where}"


def _found_while_copying(done: Finished, left: Sequence[str]) -> bool:
    """A digest is compared as its bytes are copied; docs/cli.md says that DST.partial is kept on an error."""
    return list(left) == [f"{OUTPUT}.partial"] and "\nDigestMismatch: " in f"\n{done.stderr}"


def _is_error_document(done: Finished, as_json: bool) -> bool:
    """Nothing on stdout; with --json a document of the error (docs/cli.md)."""
    if not as_json:
        return not done.stdout.strip()
    try:
        document = json.loads(done.stdout)
        error = document["error"]
        return (document["schema"], error["exit_code"]) == (
            1,
            done.code,
        ) and f"{error['class']}: {error['message']}" in done.stderr
    except (ValueError, LookupError, TypeError):
        return False


def _causes(case: Case) -> str:
    """Where no message tells: files that are none, else what was damaged."""
    places = {str(op.get("to", op["op"]))[:20] for op in case.ops if op["op"] in ("fifo", "link", "sparse", "socket")}
    return ", ".join(
        sorted(places or {f"{op['op']} of {re.sub(r'[0-9]+', 'N', Path(op['file']).name)}" for op in case.ops})
    )


def _states(folder: Path) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            stat = os.lstat(path)
            found[path] = stat.st_mode, stat.st_size if not os.path.isdir(path) else 0, stat.st_mtime_ns, stat.st_ino
    return found


def _first_line(said: str) -> str:
    """The first line of the error, without what differs between inputs."""
    match = _ERROR.search(said)
    line = said[match.start() if match else 0 :].strip().partition("\n")[0][:400]
    line = re.sub(r"\S*/\S*", "PATH", line)
    line = re.sub(r"(['\"]).*?\1", "TEXT", line)
    return re.sub(r"\d+", "N", re.sub(r"(.)\1{9,}", r"\1…", line))[:160]


def _nameless(case: Case, said: str) -> bool:
    if len(case.ops) != 1 or not _ERROR.search(said):
        return False
    path = Path(case.ops[0]["file"])
    fields = (
        [str(key) for key in case.ops[0].get("at", ()) if isinstance(key, str)]
        if isinstance(case.ops[0].get("at"), list)
        else []
    )
    return not any(word and word in said for word in (path.name, path.stem, *map(str, path.parts[-2:]), *fields))


#: Of the finished run, whose newest step is the third.
_SIDECAR = "smolconv_state"
_OF_AN_EARLIER_STEP = re.compile(r"checkpoints/step-[12]/")


# --- outputs ---------------------------------------------------------------------------------------------------------


def _judged_output(case: Case, done: Finished, folder: Path, judge: Judge) -> Outcome:
    whole = judge.workshop.seed(case.seed)
    if "--json" in case.command:
        try:
            document = json.loads(done.stdout, parse_constant=lambda text: (_ for _ in ()).throw(ValueError(text)))
        except (ValueError, RecursionError) as error:
            return Outcome(
                kind="no JSON", signature=f"{case.command[0]}: {_first_line(str(error))}", detail=done.stdout[:2000]
            )
        # diff compares names, shapes and dtypes; it says so, and reads no values.
        says_same = case.command[0] == "verify" and document.get("passed")
        if says_same and (differing := _differing_weights(case, folder, whole)):
            told = f"{case.command[0]} calls different weights the same"
            return Outcome(kind="wrong output", signature=told, detail=differing)
    if broken := _broken_digest(case, folder, whole):
        checked = "--check" in case.command
        if checked:
            return Outcome(kind="not noticed", signature=f"inspect --check: {broken}", detail=broken)
    if case.command[0] not in ("convert", "import-gguf") or "--dry-run" in case.command:
        return Outcome(kind=RIGHT_OUTPUT)
    try:
        found = tensors_below(folder / OUTPUT)
    except Exception as error:  # whatever another library says of it
        return Outcome(
            kind="unreadable output", signature=f"{case.command[4]}: {type(error).__name__} {_first_line(str(error))}"
        )
    if problem := _documents(folder / OUTPUT, folder / INPUT):
        return Outcome(
            kind="wrong output", signature=f"a document that is none: {re.sub(r'[0-9]+', 'N', problem)}", detail=problem
        )
    baseline, expected = judge.baseline(case.seed, case.command)
    if {"op": "missing", "file": _SIDECAR} in case.ops and "are gone" in done.stdout:
        # The whole sidecar may be left behind, which a warning says: what lay in it is not asked for.
        expected = {name: value for name, value in expected.items() if not name.startswith(f"{_SIDECAR}/")}
    return _compared(case, found, baseline, expected)


def _compared(case: Case, found: Tensors, done: Finished, expected: Tensors) -> Outcome:
    if done.code:
        return Outcome(kind=UNDECIDED, signature=f"accepted, while the whole is refused: {_first_line(done.stderr)}")
    if found == expected:
        return Outcome(kind=RIGHT_OUTPUT)
    gone, new = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shaped = [name for name in sorted(set(found) & set(expected)) if found[name][:2] != expected[name][:2]]
    valued = [
        name for name in sorted(set(found) & set(expected)) if found[name] != expected[name] and name not in shaped
    ]
    detail = f"gone {gone[:3]}, new {new[:3]}, shaped {shaped[:3]}, other values {valued[:3]} ({len(valued)})"
    what = " ".join(
        word for word, names in (("gone", gone), ("new", new), ("shapes", shaped), ("values", valued)) if names
    )
    ops = ", ".join(sorted({f"{op['op']} of {re.sub(r'[0-9]+', 'N', Path(op['file']).name)}" for op in case.ops}))
    seed = SEEDS[case.seed]
    if seed.sealed and not any(op["file"].endswith(_MANIFEST) for op in case.ops):
        return Outcome(kind="wrong output", signature=f"{seed.kind} {what}: {ops}", detail=detail)
    if len(case.ops) == 1 and _breaks_a_checksum(case.ops[0]):
        return Outcome(kind="wrong output", signature=f"{seed.kind} {what}: {ops}", detail=detail)
    if not (gone or new or shaped) and all(_may_change_values(op, case) for op in case.ops):
        return Outcome(kind=EXPLAINED, detail=detail)
    if all(_may_shape(op) for op in case.ops):
        return Outcome(kind=EXPLAINED, detail=detail)
    return Outcome(kind=UNDECIDED, signature=f"{seed.kind} {what}: {ops}", detail=detail)


def _breaks_a_checksum(op: dict[str, Any]) -> bool:
    """Bytes of a torch archive whose CRC-32 was not made anew, or what its directory says of them."""
    changed = ("flip", "fill", "put", "cut", "insert", "truncate", "extend", "zip")
    return op["file"].endswith((".pt", ".bin")) and op["op"] in changed


def _may_change_values(op: dict[str, Any], case: Case) -> bool:
    """Bytes of a tensor for which nobody recorded a digest; an archive's own checksum was made anew."""
    name = op["file"]
    data = ("flip", "fill", "put", "splice", "insert", "cut", "safetensors", "exchange", "name", "sparse")
    if name.endswith((".safetensors", ".gguf")):
        return op["op"] in data
    if name.endswith((".pt", ".bin")):
        return op["op"] in ("pickle", "exchange", "name", "splice")
    return _may_shape(op)


def _may_shape(op: dict[str, Any]) -> bool:
    return op["op"] in ("json", "yaml") and any(_SHAPING.search(str(key)) for key in op["at"])


def _changed_files(folder: Path, whole: Path) -> Iterator[tuple[Path, Path]]:
    """(damaged, whole) of the regular files whose content is another one."""
    for path in sorted(whole.rglob("*")):
        damaged = folder / path.relative_to(whole)
        with suppress(OSError):
            regular = path.is_file() and damaged.is_file() and not damaged.is_symlink()
            if regular and damaged.stat().st_size < 1 << 26 and damaged.read_bytes() != path.read_bytes():
                yield damaged, path


def _broken_digest(case: Case, folder: Path, whole: Path) -> str:
    """A recorded digest that no longer holds: of our manifest, or the CRC-32 of an archive's record, as zipfile reads it."""
    manifest = whole / _MANIFEST
    listed = {entry["path"] for entry in json.loads(manifest.read_text())["files"]} if manifest.exists() else set()
    if (folder / INPUT / _MANIFEST).is_symlink() or any(
        _MANIFEST in (Path(op["file"]).name, Path(str(op.get("with"))).name) for op in case.ops
    ):
        listed = set()
    for damaged, original in _changed_files(folder / INPUT, whole):
        name = str(original.relative_to(whole))
        if name in listed and not _EDITABLE.search(original.name):
            return f"a file of the manifest: {re.sub(r'[0-9]+', 'N', original.name)}"
        if original.suffix in (".pt", ".bin") and not _OF_AN_EARLIER_STEP.search(name):
            with suppress(Exception), zipfile.ZipFile(damaged) as archive:
                try:
                    if archive.testzip() is not None:
                        return "a record's CRC-32"
                except zipfile.BadZipFile:
                    return "a record's CRC-32"
    return ""


def _differing_weights(case: Case, folder: Path, whole: Path) -> str:
    """A weight that the safetensors library reads from both, with other bytes."""
    for damaged, original in _changed_files(folder / INPUT, whole):
        if original.suffix == ".safetensors" and "smolconv_state" not in original.parts:
            with suppress(Exception):
                a, b = safetensors_of(damaged), safetensors_of(original)
                if names := [name for name in a if name in b and a[name] != b[name]]:
                    return f"{original.name}: {names[0]}"
    return ""


def _documents(folder: Path, source: Path) -> str:
    """JSON that is none for whoever reads it strictly, but for what is carried as it is (generation_config.json)."""

    def refuse(text: str) -> None:
        raise ValueError(text)

    for path in sorted(folder.rglob("*.json")):
        carried = source / path.name
        if carried.is_file() and carried.read_bytes() == path.read_bytes() and _EDITABLE.search(path.name):
            continue
        try:
            json.loads(path.read_bytes(), parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            return f"{path.relative_to(folder)}: {error}"
    return ""
