"""Makes a failure small: fewer operations, and smaller values in them, that end in the same signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fuzzing.judge import Outcome
from fuzzing.strategies import Case


def minimised(case: Case, wanted: Outcome, judge: Callable[[Case], Outcome], most_runs: int = 60) -> Case:
    """The smallest case found that has the outcome's kind and signature."""
    runs = 0

    def same(candidate: Case) -> bool:
        nonlocal runs
        runs += 1
        found = judge(candidate)
        # What follows the colon of a wrong output are the damages, which get fewer.
        place = [
            outcome.signature.partition(": ")[0] if outcome.kind == "wrong output" else outcome.signature
            for outcome in (found, wanted)
        ]
        return found.kind == wanted.kind and place[0] == place[1]

    changed = True
    while changed and runs < most_runs:
        changed = False
        for candidate in _smaller(case):
            if runs >= most_runs:
                break
            if same(candidate):
                case, changed = candidate, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for index in range(len(case.ops)) if len(case.ops) > 1 else ():
        yield replace(case, ops=case.ops[:index] + case.ops[index + 1 :])
    for index, op in enumerate(case.ops):
        for name, value in op.items():
            for smaller in _smaller_values(name, value):
                yield replace(case, ops=(*case.ops[:index], {**op, name: smaller}, *case.ops[index + 1 :]))


def _smaller_values(name: str, value: Any) -> Iterator[Any]:
    if name == "value" and isinstance(value, dict) and "n" in value:
        if value["n"] > 1:
            yield {**value, "n": value["n"] // 2}
            yield {**value, "n": value["n"] * 9 // 10}
    elif name == "count" and value > 1:
        yield value // 2
    elif name == "hex" and len(value) > 40:
        yield value[: len(value) // 4 * 2]


def name_of(outcome: Outcome, case: Case) -> str:
    """A short name for a file."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{outcome.kind} {outcome.signature} {case.seed}".lower()).strip("-")
    return words[:90].strip("-")
