"""A campaign: worker processes that judge drawn cases until their time or their number is over, and what they found."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import FIXTURES
from hypothesis import HealthCheck, Phase, configuration, given, seed, settings

from fuzzing.inputs import SEEDS, Workshop, memory_folder
from fuzzing.judge import UNDECIDED, Judge, Outcome
from fuzzing.minimise import minimised, name_of
from fuzzing.strategies import Case, cases

REGRESSIONS = FIXTURES / "fuzz"
_BATCH = 100


@dataclass
class Found:
    """What a worker, or all of them, found."""

    by_kind: Counter[str] = field(default_factory=Counter)
    by_command: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    signatures: Counter[tuple[str, str]] = field(default_factory=Counter)
    nameless: Counter[str] = field(default_factory=Counter)
    #: By kind and signature, the first case of each, made small, and the text that it printed.
    examples: dict[tuple[str, str], tuple[Case, Outcome]] = field(default_factory=dict)

    def add(self, case: Case, outcome: Outcome) -> None:
        self.by_kind[SEEDS[case.seed].kind] += 1
        self.by_command[command_name(case.command)] += 1
        self.outcomes[outcome.kind] += 1
        if outcome.is_failure or outcome.kind == UNDECIDED:
            self.signatures[outcome.kind, outcome.signature] += 1
        if outcome.nameless:
            self.nameless[
                f"{case.ops[0]['op']} of {case.ops[0]['file']} in {case.seed}: {outcome.detail.strip().partition(chr(10))[0][:200]}"
            ] += 1

    def merge(self, other: Found) -> None:
        for name in ("by_kind", "by_command", "outcomes", "signatures", "nameless"):
            getattr(self, name).update(getattr(other, name))
        for key, example in other.examples.items():
            self.examples.setdefault(key, example)

    @property
    def tried(self) -> int:
        return sum(self.outcomes.values())

    @property
    def failures(self) -> list[tuple[str, str]]:
        return sorted(key for key in self.signatures if key[0] != UNDECIDED)


def command_name(command: Sequence[str]) -> str:
    """As people say it: "convert --to hf --dry-run"."""
    words = [word for word in command if word.startswith("-") and word not in ("--json", "-o", "--to")]
    first = command[:2] if command[0] in ("data", "recipe") else command[:1]
    target = [f"--to {command[command.index('--to') + 1]}"] if "--to" in command else []
    return " ".join(
        [
            *first,
            *target,
            *(word for word in words if word in ("--dry-run", "--verify", "--check", "--eos", "--tensors-only")),
        ]
    )


def search(
    number: int, judge: Judge, kinds: Sequence[str] = (), *, count: int = 0, until: float = 0.0, smaller: bool = True,
    told: Callable[[Case, Outcome], None] = lambda *_: None,
) -> Found:  # fmt: skip
    """Judge ``count`` cases of the seed ``number``, or as many as there is time for ``until``."""
    found, batch = Found(), 0
    while found.tried < count if count else time.monotonic() < until:
        _search_batch(number * 1_000_003 + batch, judge, kinds, found, count or 1 << 60, until, told)
        batch += 1
    for key, (case, outcome) in found.examples.items():
        if smaller and outcome.kind != UNDECIDED:
            found.examples[key] = (
                minimised(case, outcome, judge.outcome, most_runs=6 if outcome.kind == "hang" else 40),
                outcome,
            )
    return found


def _search_batch(
    number: int, judge: Judge, kinds: Sequence[str], found: Found, count: int, until: float, told: Callable[[Case, Outcome], None]
) -> None:  # fmt: skip
    @seed(number)
    @settings(
        max_examples=min(_BATCH, count - found.tried), deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(judge.workshop, tuple(kinds)))
    def one(case: Case) -> None:
        if found.tried >= count or (until and time.monotonic() > until):
            return
        outcome = judge.outcome(case)
        found.add(case, outcome)
        if outcome.is_failure or outcome.kind == UNDECIDED:
            if (outcome.kind, outcome.signature) not in found.examples:
                told(case, outcome)
            found.examples.setdefault((outcome.kind, outcome.signature), (case, outcome))

    one()


def _worker(number: int, minutes: float, seconds: int) -> Found:
    with tempfile.TemporaryDirectory(prefix="smolconv-fuzz-", dir=memory_folder()) as folder:
        configuration.set_hypothesis_home_dir(f"{folder}/hypothesis")

        def told(case: Case, outcome: Outcome) -> None:
            print(f"{outcome.kind}: {outcome.signature}\n  {json.dumps(case.to_json())[:600]}", flush=True)

        judge = Judge(Workshop(Path(folder) / "work"), seconds)
        return search(number, judge, until=time.monotonic() + 60 * minutes, told=told)


def run(minutes: float, first_seed: int, processes: int, seconds: int) -> Found:
    """Workers side by side, each with a seed of its own."""
    found = Found()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for one in [pool.submit(_worker, first_seed + i, minutes, seconds) for i in range(processes)]:
            found.merge(one.result())
    return found


def store(found: Found, folder: Path = REGRESSIONS) -> list[Path]:
    """A file for each new failure, to be replayed by tests/test_fuzz.py for ever."""
    folder.mkdir(exist_ok=True)
    written = []
    for key in found.failures:
        case, outcome = found.examples[key]
        path = folder / f"{name_of(outcome, case)}.json"
        if not path.exists():
            path.write_text(
                json.dumps({"was": f"{outcome.kind}: {outcome.signature}", **case.to_json()}, indent=1) + "\n"
            )
            written.append(path)
    return written


def report(found: Found, seconds: float) -> str:
    """The table that ``make fuzz`` prints."""
    lines = [f"{found.tried} inputs in {seconds:.0f} s, {found.tried / seconds:.1f} a second"]
    for title, counts in (("input", found.by_kind), ("command", found.by_command), ("outcome", found.outcomes)):
        lines += ["", title, *(f"  {count:7d}  {name}" for name, count in counts.most_common())]
    for title, wanted in (("failures", False), ("undecided", True)):
        chosen = [(key, count) for key, count in found.signatures.most_common() if (key[0] == UNDECIDED) == wanted]
        if chosen:
            lines += ["", title, *(f"  {count:7d}  {kind}: {signature}" for (kind, signature), count in chosen)]
    return "\n".join(lines)


def to_json(found: Found, first_seed: int, seconds: float) -> dict[str, Any]:
    return {
        "seed": first_seed, "seconds": round(seconds), "inputs": found.tried, "by_input": dict(found.by_kind.most_common()),
        "by_command": dict(found.by_command.most_common()), "outcomes": dict(found.outcomes.most_common()),
        "failures": [f"{kind}: {signature}" for kind, signature in found.failures], "cores": os.cpu_count(),
    }  # fmt: skip
