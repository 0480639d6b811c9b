"""The results of ``gpu_check.py``: claims with their verdicts, rows of speed, and the two files that hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from common import markdown_table, say

#: Of the estimate's memory, either way.
MEMORY = 0.15
#: The estimate's tokens/s, at its assumed utilisation, may be off by this factor.
SPEED = 1.5

Verdict = Literal["met", "not met", "skipped", "needs a GPU"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A claim and what was found."""

    claim: str
    found: str
    limit: str = ""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One row of the table of speed and memory."""

    model: str
    what: str
    batch: str
    tokens_per_second: float
    mfu: Mapping[str, float | None]  #: by formula; None: the GPU's peak is not known
    allocated: int  #: bytes, at the fullest of the steps
    reserved: int
    notes: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some lines of the report, with a limit of time of their own."""

    name: str  #: of ``--part``
    title: str
    seconds: float
    lines: Callable[..., Iterator[Line]]  #: of the place and the measured speeds
    notes: str = ""


SPEED_NOTES = (
    "tokens/s: the median step after the first ones. Batch: accumulation x micro-batch x sequence. "
    "smolconv: ZeRO-1 on one GPU, bf16 weights, fp32 masters and gradient sums, documents masked. HF Trainer: fp32 "
    "weights under bf16 autocast, sdpa, fused AdamW, the same tokens as rows in which documents see each other. "
    "GB: the allocator's peak over the steps, and what it had reserved."
)
DRY_RUN = (
    "**This is a dry run on a CPU with toy models. It shows that the check works, and nothing of a GPU: what needs one "
    "says so, and GB are the process's memory.**"
)


def within(claim: str, found: float, limit: float, *, unit: str = "") -> Line:
    """Met when ``found`` is a number that is not above ``limit``."""
    met: Verdict = "met" if found <= limit else "not met"  # NaN is not
    return Line(claim=claim, found=f"{found:.2g}{unit}", limit=f"at most {limit:g}{unit}", verdict=met)


def same_losses(claim: str, found: Sequence[float], expected: Sequence[float], limit: float) -> Line:
    """Of two runs, step by step."""
    if len(found) != len(expected) or not found:
        return Line(claim=claim, found=f"{len(found)} steps beside {len(expected)}", limit="as many", verdict="not met")
    differences = [abs(mine - theirs) for mine, theirs in zip(found, expected)]
    worst = max(differences) if all(map(math.isfinite, differences)) else math.nan
    line = within(claim, worst, limit)
    return replace(line, found=f"{line.found} in {len(found)} steps ({found[0]:.3f} to {found[-1]:.3f})")


def memory_as_estimated(claim: str, allocated: int, estimated: int) -> Line:
    ratio = allocated / estimated
    return Line(
        claim=claim,
        found=f"{allocated / 1e9:.2f} GB, estimated {estimated / 1e9:.2f} GB: {ratio:.2f}",
        limit=f"{1 - MEMORY:.2f} to {1 + MEMORY:.2f}",
        verdict="met" if abs(ratio - 1) <= MEMORY else "not met",
    )


def speed_as_estimated(claim: str, tokens_per_second: float, estimated: float) -> Line:
    ratio = tokens_per_second / estimated
    return Line(
        claim=claim,
        found=f"{tokens_per_second:,.0f}, estimated {estimated:,.0f}: {ratio:.2f}",
        limit=f"{1 / SPEED:.2f} to {SPEED:.2f}",
        verdict="met" if 1 / SPEED <= ratio <= SPEED else "not met",
    )


def at_least(claim: str, found: float, expected: float, *, of: str) -> Line:
    return Line(
        claim=claim, found=f"{found / expected:.2f} of {of}", limit="at least 1",
        verdict="met" if found >= expected else "not met",
    )  # fmt: skip


class Report:
    """The results, ``gpu.md`` and ``gpu.json`` of a folder; they are rewritten completely with every line."""

    def __init__(
        self, folder: Path, machine: Sequence[str], parts: Sequence[Part], *, dry_run: bool = False
    ) -> None:  # fmt: skip
        self.machine, self.parts, self.dry_run = machine, parts, dry_run
        self.path = folder / ("gpu-dry-run.md" if dry_run else "gpu.md")
        self.sections: dict[str, list[Line]] = {}
        self.seconds: dict[str, float] = {}  #: of parts that have ended
        self.speeds: list[Speed] = []
        self.ended = False

    def add(self, part: Part, line: Line) -> None:
        self.sections.setdefault(part.name, []).append(line)
        say(f"{line.verdict}: {line.claim}: {line.found}")
        self.write()

    @property
    def lines(self) -> list[Line]:
        return [line for lines in self.sections.values() for line in lines]

    def count(self, verdict: Verdict) -> int:
        return sum(line.verdict == verdict for line in self.lines)

    @property
    def counts(self) -> dict[Verdict, int]:
        return {verdict: self.count(verdict) for verdict in get_args(Verdict)}

    def rendered(self) -> str:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n or verdict != "needs a GPU")
        text = ["# GPU check", "", *(f"- {line}" for line in self.machine), "", f"{counts}."]
        text += ["", DRY_RUN] if self.dry_run else []
        if not self.ended:
            text += ["", "**This check was not ended: what is missing below did not run.**"]
        rows = [
            [part.title, line.claim, line.found, line.limit, line.verdict]
            for part in self.parts
            for line in self.sections.get(part.name, [])
        ]
        if rows:
            titles = ["part", "claim", "found", "limit", "verdict"]
            text += ["", *markdown_table(titles, [[*map(_cell, row)] for row in rows])]
        if self.speeds:
            titles = ["model", "run", "batch", "tokens/s", "MFU (6N)", "MFU (nanotron)", "GB", "GB reserved", "notes"]
            text += ["", *markdown_table(titles, [_speed_cells(row) for row in self.speeds]), "", SPEED_NOTES]
        notes = [f"- {part.title}: {part.notes}" for part in self.parts if part.notes and part.name in self.sections]
        text += ["", *notes] if notes else []
        spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        text += ["", f"Seconds of each part: {spent}."] if spent else []
        return "\n".join(text) + "\n"

    def document(self) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run, "ended": self.ended, "machine": list(self.machine), "counts": self.counts,
            "parts": [
                {
                    "name": part.name, "title": part.title, "seconds": self.seconds.get(part.name),
                    "lines": [asdict(line) for line in self.sections[part.name]],
                }
                for part in self.parts
                if part.name in self.sections
            ],
            "speeds": [asdict(row) for row in self.speeds],
        }  # fmt: skip

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = json.dumps(self.document(), indent=1) + "\n"
        for path, text in ((self.path, self.rendered()), (self.path.with_suffix(".json"), document)):
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text)
            partial.replace(path)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _speed_cells(row: Speed) -> list[str]:
    shares = ["" if share is None else f"{share:.1%}" for share in (row.mfu["6N"], row.mfu["nanotron"])]
    return [
        row.model, row.what, row.batch, f"{row.tokens_per_second:,.0f}", *shares, f"{row.allocated / 1e9:.2f}",
        f"{row.reserved / 1e9:.2f}", row.notes,
    ]  # fmt: skip
