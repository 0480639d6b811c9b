"""Measure ``smolconv convert`` on DeepSpeed checkpoints against DeepSpeed's own tools and ``cp -r``, and over ranks.

    python benchmarks/zero.py                                   everything, 7 rounds
    python benchmarks/zero.py --quick                           135M, 2 rounds, 8 ranks, printed only
    python benchmarks/zero.py --sizes 360m --rows zero2-hf,zero3-hf --ranks ''
    python benchmarks/zero.py --sizes '' --ranks 8,64,384       the cost of a rank and a file alone

Checkpoints are made here, of random weights. Every side is a whole process and then ``sync``; the sides take turns on
the same file system, with inputs read once before, the disk synced before, and outputs deleted in between.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    REPOSITORY,
    Guard,
    Run,
    Stopped,
    file_system,
    folder_bytes,
    is_diskless,
    is_installed,
    machine_lines,
    markdown_table,
    median_seconds,
    memory_bytes,
    peak_rss_bytes,
    remove,
    run,
    say,
    spread,
    stored_bytes,
    sync,
    take_turns,
    warm,
)

RESULTS = REPOSITORY / "benchmarks" / "results" / "deepspeed.md"
SMOLCONV = str(Path(sys.executable).with_name("smolconv"))
#: Claims, as README and docs state them; for the sizes in CLAIMED_SIZES, memory for all.
FP32_OF_PEER_LIMIT = 1 / 4
FP32_OF_COPY_LIMIT = 1.0
UNIVERSAL_OF_PEER_LIMIT = 1 / 6
WRITE_LIMIT = 1.5
RSS_LIMIT_BYTES = 500e6
CLAIMED_SIZES = ("360M", "1.7B")
#: What stays free on the disk besides inputs and outputs.
SPARE_BYTES = 4e9

OURS, COPY_SOURCE, COPY_OUTPUT = "smolconv", "cp of the source", "cp of the output's bytes"
ZERO_TO_FP32, TO_UNIVERSAL, TO_UNIVERSAL_ALONE = "zero_to_fp32", "ds_to_universal", "ds_to_universal, 1 worker"
_MODULES = {
    ZERO_TO_FP32: "deepspeed.utils.zero_to_fp32",
    TO_UNIVERSAL: "deepspeed.checkpoint.ds_to_universal",
    TO_UNIVERSAL_ALONE: "deepspeed.checkpoint.ds_to_universal",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model's shapes."""

    name: str
    parameters: int  #: how many numbers they hold, the tied head counted once


SIZES: Mapping[str, Size] = {
    "135m": Size(name="135M", parameters=134_515_008),
    "360m": Size(name="360M", parameters=361_821_120),
    "1.7b": Size(name="1.7B", parameters=1_711_376_384),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion, and what it is measured against. Bytes are per parameter."""

    title: str
    source: tuple[str, ...]  #: options of random_checkpoint.py
    options: tuple[str, ...]  #: of smolconv convert
    source_bytes: int
    output_bytes: int
    #: Of which files the copy has the bytes that the output has: "output", "source", or a pattern inside the source.
    copied: str
    copy_source: bool = False
    peer: str | None = None

    @property
    def disk_bytes(self) -> int:
        """At most on disk at once, by our own sides: the source, the output that is copied, and the largest copy."""
        kept = self.output_bytes if self.copied == "output" else 0
        return self.source_bytes + kept + max(self.output_bytes, self.source_bytes if self.copy_source else 0)


def _zero(stage: int, ranks: int = 2) -> tuple[str, ...]:
    return ("--layout", "deepspeed", "--zero-stage", str(stage), "--world-size", str(ranks), "--adam")


_FP32 = ("--to", "hf", "--dtype", "float32", "--no-optimizer")
_UNIVERSAL = ("--to", "deepspeed")
_ZERO1 = ("--to", "deepspeed", "--zero-stage", "1", "--world-size", "2")
_ZERO3 = ("--to", "deepspeed", "--zero-stage", "3", "--world-size", "2")
#: Optimizer files hold masters and moments in fp32, 12 bytes a parameter, as universal does.
_OPTIMIZER_FILES = "*/*_optim_states.pt"
#: In the order of the table; rows of one source stand together, so that it is made once.
ROWS: Mapping[str, Row] = {
    "zero2-hf": Row(
        title="ZeRO-2 ws 2 -> HF fp32", source=_zero(2), options=_FP32, source_bytes=14, output_bytes=4,
        copied="output", copy_source=True, peer=ZERO_TO_FP32,
    ),
    "zero2-universal": Row(
        title="ZeRO-2 ws 2 -> universal", source=_zero(2), options=_UNIVERSAL, source_bytes=14, output_bytes=12,
        copied=_OPTIMIZER_FILES, peer=TO_UNIVERSAL,
    ),
    "zero3-hf": Row(
        title="ZeRO-3 ws 2 -> HF fp32", source=_zero(3), options=_FP32, source_bytes=12, output_bytes=4,
        copied="output", copy_source=True, peer=ZERO_TO_FP32,
    ),
    "zero3-universal": Row(
        title="ZeRO-3 ws 2 -> universal", source=_zero(3), options=_UNIVERSAL, source_bytes=12, output_bytes=12,
        copied=_OPTIMIZER_FILES, peer=TO_UNIVERSAL,
    ),
    "hf-zero3": Row(
        # Moments of a source without Adam are holes in the files: 4 bytes a parameter on disk.
        title="HF -> ZeRO-3 ws 2", source=(), options=_ZERO3, source_bytes=2, output_bytes=4, copied="output",
    ),
    "hf-adam-zero3": Row(
        title="HF with Adam -> ZeRO-3 ws 2", source=("--adam",), options=_ZERO3, source_bytes=14, output_bytes=12,
        copied="output",
    ),
    "nanotron-zero1": Row(
        title="nanotron tp2 with Adam -> ZeRO-1 ws 2", source=("--layout", "nanotron", "--tp", "2", "--adam"),
        options=_ZERO1, source_bytes=14, output_bytes=14, copied="source",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row at one size, with the runs of every side."""

    model: str
    row: Row
    source_bytes: int
    written_bytes: Mapping[str, int]  #: of each side, as they lie on the disk
    runs: Mapping[str, Sequence[Run]]
    troubles: Mapping[str, str]  #: of a side that did not end well

    def ratio(self, side: str) -> float | None:
        """Median seconds of ours by those of another side."""
        others = self.runs.get(side)
        return median_seconds(self.runs[OURS]) / median_seconds(others) if others else None

    def ratios(self, side: str) -> list[float]:
        """Of each round that both sides took part in."""
        return [ours.seconds / other.seconds for ours, other in zip(self.runs[OURS], self.runs.get(side, ()))]


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One command on 135M that was split over many ranks."""

    title: str
    command: str
    ranks: int
    files: int
    runs: Sequence[Run]


@dataclass
class Findings:
    """Everything measured so far; rendered again after each step, so that a stopped run leaves what it has."""

    machine: list[str]
    arguments: str
    measured: list[Measured] = field(default_factory=list)
    ranked: list[Ranked] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            say(text)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A folder to work in, and what is measured there."""

    work: Path
    rounds: Mapping[str, int]  #: by the key of a size
    peer_rounds: Mapping[str, int]
    rank_runs: int
    findings: Findings
    write: Callable[[], None]

    def environment(self) -> dict[str, str]:
        """As for an installed program: bytecode is compiled before, and torch takes the threads that it chooses."""
        left_out = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        return {
            **kept, "PYTHONPYCACHEPREFIX": str(self.work / "bytecode"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120",
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip

    def run(self, command: Sequence[str], *, then_sync: bool = False, guarded: bool = False) -> Run:
        """Run it in the folder to work in: in the folder of this file, ``-m deepspeed`` would find this file."""
        guard = Guard(folder=self.work) if guarded else None
        return run(command, self.environment(), then_sync=then_sync, folder=self.work, guard=guard)

    def compile_peers(self) -> None:
        """Let Python write the bytecode of DeepSpeed and torch, which its first run here would pay for."""
        for module in sorted(set(_MODULES.values())):
            self.run([sys.executable, "-m", module, "--help"])

    # --- rows of one size ---

    def size(self, key: str, rows: Sequence[str]) -> None:
        """All rows of one size; a source is deleted as soon as no further row reads it."""
        home = self.work / key
        made: tuple[str, ...] | None = None
        try:
            for index, name in enumerate(rows):
                row = ROWS[name]
                if made != row.source:
                    remove(home)
                    made = None
                if not self._has_room(key, row, there=row.source_bytes if made is not None else 0):
                    continue
                if made is None:
                    self._make(key, home / "source", row.source)
                    made = row.source
                self._measure(key, row, home)
                if all(ROWS[later].source != made for later in rows[index + 1 :]):
                    remove(home)
                    made = None
        finally:
            remove(home)

    def _has_room(self, key: str, row: Row, *, there: int) -> bool:
        free = shutil.disk_usage(self.work).free
        needed = (row.disk_bytes - there) * SIZES[key].parameters + SPARE_BYTES
        if free < needed:
            self.findings.note(
                f"{SIZES[key].name}, {row.title}: left out, {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed"
            )
        return free >= needed

    def _make(self, key: str, target: Path, options: Sequence[str]) -> None:
        say(f"{SIZES[key].name}: making {target} {' '.join(options)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("random_checkpoint.py")
        made = self.run([sys.executable, str(script), key, str(target), *options])
        say(f"  {folder_bytes(target) / 1e9:.2f} GB in {made.seconds:.1f} s")

    def _measure(self, key: str, row: Row, home: Path) -> None:
        size, source, out, kept = SIZES[key], home / "source", home / "out", home / "kept"
        rounds, peer_rounds = self.rounds[key], self.peer_rounds[key]
        say(f"{size.name}: {row.title}, {rounds} rounds")
        written: dict[str, int] = {}
        logical: dict[str, int] = {}
        troubles: dict[str, str] = {}
        ours = [SMOLCONV, "convert", str(source), str(out), *row.options]

        def timed(side: str, command: Sequence[str], reads: Path, *, make_out: bool = False) -> Run | None:
            warm(reads)
            if make_out:
                out.mkdir()
            sync()
            try:
                found = self.run(command, then_sync=True, guarded=side in _MODULES)
                logical[side], written[side] = folder_bytes(out), stored_bytes(out)
                return found
            except Stopped as error:
                troubles[side] = str(error)
            except RuntimeError as error:
                if side not in _MODULES:
                    raise
                killed = "terminated abruptly" in str(error) or "ended with -9" in str(error)
                troubles[side] = "out of memory (killed by the system)" if killed else "failed"
                if not killed:
                    say(str(error))
            finally:
                remove(out)
                self._sweep(home)
            say(f"  {side}: {troubles[side]}")
            return None

        if row.copied == "output":
            self.run([SMOLCONV, "convert", str(source), str(kept), *row.options])
        sides: dict[str, Callable[[], Run | None]] = {OURS: lambda: timed(OURS, ours, source)}
        if row.copy_source:
            sides[COPY_SOURCE] = lambda: timed(COPY_SOURCE, _copy([source], out), source)
        if row.copied in ("output", "source"):
            whole = kept if row.copied == "output" else source
            sides[COPY_OUTPUT] = lambda: timed(COPY_OUTPUT, _copy([whole], out), whole)
        else:
            files = sorted(source.glob(row.copied))
            sides[COPY_OUTPUT] = lambda: timed(COPY_OUTPUT, _copy(files, out), source, make_out=True)
        counts = dict.fromkeys(sides, rounds)
        peer = row.peer if peer_rounds and is_installed("deepspeed") else None
        if peer:
            sides[peer] = lambda: timed(peer, _peer(peer, source, out), source)
            counts[peer] = peer_rounds
        runs = take_turns(
            sides, counts,
            lambda side, one: say(f"  {side}: {one.seconds:.2f} s ({one.processor_seconds:.2f} s processor, "
                                  f"{one.peak_rss_bytes / 1e6:.0f} MB)"),
        )  # fmt: skip
        if peer == TO_UNIVERSAL and "memory" in troubles.get(peer, ""):
            alone = timed(TO_UNIVERSAL_ALONE, _peer(TO_UNIVERSAL_ALONE, source, out), source)
            runs[TO_UNIVERSAL_ALONE] = [alone] if alone else []
        remove(kept)
        # The same bytes: a copy of more than the conversion wrote would make the comparison void.
        if not 0.98 < logical[COPY_OUTPUT] / logical[OURS] < 1.02:
            raise RuntimeError(f"{row.title}: copied {logical[COPY_OUTPUT]} bytes, wrote {logical[OURS]}")
        if folder_bytes(source) + max(written.values()) > memory_bytes():
            self.findings.note(
                f"{size.name}, {row.title}: input and output exceed memory, so not all of the input was warm, and "
                "what a side reads came from the disk in part"
            )
        self.findings.measured.append(
            Measured(
                model=size.name, row=row, source_bytes=folder_bytes(source), written_bytes=written, runs=runs,
                troubles=troubles,
            )
        )  # fmt: skip
        self.write()

    def _sweep(self, home: Path) -> None:
        """What a stopped tool left beside its output."""
        for path in home.iterdir():
            if path.name not in ("source", "kept"):
                if path.is_dir():
                    remove(path)
                else:
                    path.unlink()

    # --- many ranks ---

    def ranks(self, numbers: Sequence[int]) -> None:
        """135M as ZeRO-3 and ZeRO-1 of many ranks: inspect, convert to HF; and HF to ZeRO-3 of as many."""
        home = self.work / "ranks"
        if shutil.disk_usage(self.work).free < 14 * SIZES["135m"].parameters * 2 + SPARE_BYTES:
            self.findings.note("ranks left out: too little free disk")
            return
        try:
            for ranks in numbers:
                for stage in (3, 1):
                    source = home / f"zero{stage}-{ranks}"
                    self._make("135m", source, _zero(stage, ranks))
                    self._rank_runs(f"ZeRO-{stage}", "inspect", ranks, source, ["inspect", str(source)], None)
                    command = ["convert", str(source), str(home / "out"), *_FP32]
                    self._rank_runs(f"ZeRO-{stage}", "convert to HF fp32", ranks, source, command, home / "out")
                    remove(source)
            hf = home / "hf"
            self._make("135m", hf, ())
            for ranks in numbers:
                options = ("--to", "deepspeed", "--zero-stage", "3", "--world-size", str(ranks))
                command = ["convert", str(hf), str(home / "out"), *options]
                self._rank_runs("HF", "convert to ZeRO-3", ranks, hf, command, home / "out")
        finally:
            remove(home)

    def _rank_runs(
        self, title: str, name: str, ranks: int, source: Path, command: Sequence[str], out: Path | None
    ) -> None:
        runs, files = [], _files(source)
        for _ in range(self.rank_runs):
            warm(source)
            sync()
            runs.append(self.run([SMOLCONV, *command], then_sync=out is not None))
            if out:
                files = max(files, _files(out))
                remove(out)
        say(f"  {name}: {spread([each.seconds for each in runs])} s, {peak_rss_bytes(runs) / 1e6:.0f} MB")
        self.findings.ranked.append(Ranked(title=title, command=name, ranks=ranks, files=files, runs=runs))
        self.write()


def _copy(sources: Sequence[Path], out: Path) -> list[str]:
    return ["cp", "-r", "--reflink=never", *map(str, sources), str(out)]


def _peer(side: str, source: Path, out: Path) -> list[str]:
    """DeepSpeed's tool as its users call it."""
    start = [sys.executable, "-m", _MODULES[side]]
    if side == ZERO_TO_FP32:
        return [*start, str(source), str(out)]
    tag = (source / "latest").read_text().strip()
    alone = ["--num_extract_workers", "1", "--num_merge_workers", "1"] if side == TO_UNIVERSAL_ALONE else []
    folders = ["--input_folder", str(source / tag), "--output_folder", str(out / tag)]
    return [*start, *folders, "--inject_missing_state", *alone]


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*.pt"))


# --- the document ----------------------------------------------------------------------------------------------------


def render(findings: Findings) -> str:
    """The whole document."""
    lines = [
        "# smolconv convert on DeepSpeed checkpoints, beside DeepSpeed's own tools and cp -r",
        "",
        f"Written by `python benchmarks/zero.py{findings.arguments}`, {time.strftime('%Y-%m-%d %H:%M %Z')}. "
        "Do not edit.",
        "",
        *[f"- {line}" for line in findings.machine],
        "- Whole fresh processes with imports (bytecode compiled before, for DeepSpeed's tools too); inputs in the "
        "page cache; `sync` before each run and inside every time; the sides take turns; cells are median (min..max) "
        "in seconds; a ratio is that of the medians, with those of the rounds in brackets",
        "- smolconv is one process of threads, its peak RSS the largest `ru_maxrss` of all runs in MB of 10^6 bytes. "
        "DeepSpeed's is that of its largest process alone, and includes the file pages that it maps",
        "- Random weights at each model's shapes, bf16, tied head, fp32 masters and both moments; "
        "digests (xxh3) are included; world size 2",
        "- `zero_to_fp32` writes pytorch_model.bin, its default: with `--safe_serialization` it fails on a tied model. "
        "Both tools of DeepSpeed run as `python -m`, with the workers that they choose (`ds_to_universal`: 4, then 2)",
        "- `cp of the output's bytes`: the output itself; for universal the optimizer files of the source, which hold "
        "the same bytes; for ZeRO-1 the source, which does. GB are those on the disk: moments that are zero are holes, "
        "and `cp` keeps them",
        *[f"- {note}" for note in findings.notes],
        "",
        "## Claims",
        "",
        *_claims(findings),
    ]
    if findings.measured:
        lines += ["", "## Beside DeepSpeed's tools", "", *_peers_table(findings)]
        lines += ["", "## Beside cp -r", "", *_copies_table(findings)]
    if findings.ranked:
        lines += ["", "## 135M over many ranks", "", *_ranks_table(findings)]
    return "\n".join(lines) + "\n"


def _peers_table(findings: Findings) -> list[str]:
    rows = []
    for each in findings.measured:
        for side in _MODULES:
            runs, trouble = each.runs.get(side, ()), each.troubles.get(side)
            if not runs and not trouble:
                continue
            ratio = each.ratio(side)
            rows.append([
                each.model, each.row.title, f"`{side}`", _seconds(runs) if runs else str(trouble), str(len(runs)),
                _gb(each.written_bytes, side), _mb(runs), _seconds(each.runs[OURS]), _gb(each.written_bytes, OURS),
                _mb(each.runs[OURS]), f"1/{1 / ratio:.1f}" if ratio else "-",
            ])  # fmt: skip
    titles = ["model", "conversion", "DeepSpeed's tool", "its time, sync", "runs", "GB written", "peak RSS, MB",
              "smolconv, sync", "GB written", "peak RSS, MB", "smolconv takes"]  # fmt: skip
    return markdown_table(titles, rows)


def _copies_table(findings: Findings) -> list[str]:
    rows = []
    for each in findings.measured:
        rows.append([
            each.model, each.row.title, f"{each.source_bytes / 1e9:.2f}", _gb(each.written_bytes, OURS),
            _seconds(each.runs[OURS]),
            _seconds(each.runs.get(COPY_SOURCE, ())), _ratio(each, COPY_SOURCE),
            _seconds(each.runs[COPY_OUTPUT]), _ratio(each, COPY_OUTPUT), str(len(each.runs[OURS])),
            f"{statistics.median(one.processor_seconds for one in each.runs[OURS]):.2f}", _mb(each.runs[OURS]),
        ])  # fmt: skip
    titles = ["model", "conversion", "GB in the source", "GB written", "smolconv, sync", COPY_SOURCE, "ratio",
              COPY_OUTPUT, "ratio", "rounds", "processor, smolconv", "peak RSS, MB"]  # fmt: skip
    return markdown_table(titles, rows)


def _ranks_table(findings: Findings) -> list[str]:
    """Per rank: all seconds by all ranks, and what each further rank cost over the row with fewer."""
    rows = []
    before: dict[tuple[str, str], Ranked] = {}
    for each in sorted(findings.ranked, key=lambda one: (one.title, one.command, one.ranks)):
        seconds, less = median_seconds(each.runs), before.get((each.title, each.command))
        further = (seconds - median_seconds(less.runs)) / (each.ranks - less.ranks) if less else None
        before[each.title, each.command] = each
        rows.append([
            each.title, each.command, str(each.ranks), str(each.files), _seconds(each.runs),
            f"{seconds / each.ranks * 1e3:.1f}", f"{further * 1e3:.1f}" if further is not None else "-",
            f"{seconds / each.files * 1e3:.1f}", _mb(each.runs),
        ])  # fmt: skip
    titles = ["source", "command", "ranks", ".pt files", "seconds", "ms per rank", "ms per further rank", "ms per file",
              "peak RSS, MB"]  # fmt: skip
    return markdown_table(titles, rows)


def _seconds(runs: Sequence[Run]) -> str:
    return spread([each.seconds for each in runs]) if runs else "-"


def _mb(runs: Sequence[Run]) -> str:
    return f"{peak_rss_bytes(runs) / 1e6:.0f}" if runs else "-"


def _gb(sizes: Mapping[str, int], side: str) -> str:
    return f"{sizes[side] / 1e9:.2f}" if side in sizes else "-"


def _ratio(each: Measured, side: str) -> str:
    ratio, ratios = each.ratio(side), each.ratios(side)
    return f"{ratio:.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratio else "-"


def _claims(findings: Findings) -> list[str]:
    """Each claim with the worst figure for it at every size; one that was not measured says so."""
    lines = []

    def claim(text: str, rows: Sequence[str], side: str, limit: float, limit_text: str) -> None:
        for model in CLAIMED_SIZES:
            found = [each for each in findings.measured if each.model == model and each.row in [ROWS[n] for n in rows]]
            ratios = [ratio for each in found if (ratio := each.ratio(side)) is not None]
            troubles = sorted({each.troubles[side] for each in found if side in each.troubles})
            if ratios:
                verdict = "met" if max(ratios) <= limit else "NOT met"
                say_worst = f"worst {max(ratios):.2f} of {len(ratios)}, **{verdict}**"
            else:
                say_worst = "not measured"
            lines.append("; ".join([f"- {model}: {text} {limit_text}: {say_worst}", *troubles]))

    to_hf, to_universal = ("zero2-hf", "zero3-hf"), ("zero2-universal", "zero3-universal")
    claim("DeepSpeed -> HF in at most", to_hf, ZERO_TO_FP32, FP32_OF_PEER_LIMIT, "1/4 (0.25) of zero_to_fp32's time")
    claim("DeepSpeed -> HF in at most", to_hf, COPY_SOURCE, FP32_OF_COPY_LIMIT, "1 x cp of the folder that is read")
    claim(
        "DeepSpeed -> universal in at most", to_universal, TO_UNIVERSAL, UNIVERSAL_OF_PEER_LIMIT,
        "1/6 (0.17) of ds_to_universal's time",
    )  # fmt: skip
    claim("HF -> ZeRO-3 in at most", ("hf-zero3",), COPY_OUTPUT, WRITE_LIMIT, "1.5 x cp of the bytes written")
    claim(
        "HF with Adam -> ZeRO-3 in at most", ("hf-adam-zero3",), COPY_OUTPUT, WRITE_LIMIT,
        "1.5 x cp of the bytes written",
    )  # fmt: skip
    claim(
        "nanotron with Adam -> ZeRO-1 in at most", ("nanotron-zero1",), COPY_OUTPUT, WRITE_LIMIT,
        "1.5 x cp of the bytes written",
    )  # fmt: skip
    peaks = [peak_rss_bytes(each.runs[OURS]) for each in findings.measured]
    peaks += [peak_rss_bytes(each.runs) for each in findings.ranked]
    text = f"- Peak RSS under {RSS_LIMIT_BYTES / 1e6:.0f} MB at every size and rank count"
    verdict = "met" if peaks and max(peaks) < RSS_LIMIT_BYTES else "NOT met"
    lines.append(f"{text}: worst {max(peaks) / 1e6:.0f} MB, **{verdict}**" if peaks else f"{text}: not measured")
    return lines


# --- the command -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to make a folder to work in")
    parser.add_argument("--allow-tmpfs", action="store_true", help="let --work lie in memory")
    parser.add_argument("--sizes", default="360m,1.7b", help="comma-separated, of 135m, 360m, 1.7b; may be empty")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=7, help="rounds of all sides")
    parser.add_argument("--big-pairs", type=int, help="rounds at 1.7b instead of --pairs, without DeepSpeed's tools")
    parser.add_argument("--peer-pairs", type=int, default=1, help="rounds at 1.7b with DeepSpeed's tools; 0 for none")
    parser.add_argument("--ranks", help="rank counts of the second part; may be empty; default: 8,64,384")
    parser.add_argument("--rank-runs", type=int, default=3, help="runs of each command in the second part")
    parser.add_argument("--quick", action="store_true", help="135m, 2 rounds, 8 ranks; printed only without --output")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(REPOSITORY)}")
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.pairs = "135m", 2
    if given.ranks is None:
        given.ranks = "8" if given.quick else "8,64,384"
    given.sizes = [size for size in given.sizes.split(",") if size]
    asked = {row for row in given.rows.split(",") if row}
    given.rows = [name for name in ROWS if name in asked]
    given.ranks = sorted(int(ranks) for ranks in given.ranks.split(",") if ranks)
    given.big_pairs = given.big_pairs or given.pairs
    for unknown in sorted({*given.sizes} - set(SIZES)):
        parser.error(f"unknown size {unknown}: choose of {', '.join(SIZES)}")
    for unknown in sorted(asked - set(ROWS)):
        parser.error(f"unknown row {unknown}: choose of {', '.join(ROWS)}")
    if min(given.pairs, given.big_pairs, given.rank_runs) < 1 or given.peer_pairs < 0:
        parser.error("at least one pair is needed")
    return given


def main() -> None:
    """Measure everything that was asked for, and write the table."""
    given = parse_arguments()
    output = given.output or (None if given.quick else RESULTS)
    packages = ("smolconv", "deepspeed", "torch", "numpy", "xxhash", "typer")
    arguments = "".join(f" {shlex.quote(argument)}" for argument in sys.argv[1:])
    findings = Findings(machine=machine_lines(packages), arguments=arguments)

    def write() -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(render(findings))

    parent = (given.work or REPOSITORY.parent).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    if is_diskless(parent) and not given.allow_tmpfs:
        sys.exit(f"{parent} lies in memory ({file_system(parent)}), not on a disk. Pass --allow-tmpfs to continue.")
    if not is_installed("deepspeed"):
        findings.note("deepspeed is not installed (pip install deepspeed==0.19.8): its tools are left out")
    # A folder of our own: what is deleted at the end is only what was made here.
    work = Path(tempfile.mkdtemp(prefix="smolconv-bench-", dir=parent))
    findings.machine.append(f"File system: {file_system(work)}")
    bench = Bench(
        work=work,
        rounds={key: given.big_pairs if key == "1.7b" else given.pairs for key in SIZES},
        peer_rounds={
            key: min(given.peer_pairs, given.big_pairs) if key == "1.7b" else given.pairs for key in SIZES
        },
        rank_runs=given.rank_runs, findings=findings, write=write,
    )  # fmt: skip
    try:
        if given.sizes and is_installed("deepspeed"):
            bench.compile_peers()
        for size in given.sizes:
            bench.size(size, given.rows)
        if given.ranks:
            bench.ranks(given.ranks)
    finally:
        remove(work)
    print(render(findings))
    if output is not None:
        say(f"written to {output}")


if __name__ == "__main__":
    main()
