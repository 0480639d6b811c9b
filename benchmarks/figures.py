"""Runs the tests about kills, damage and hostile input, counts their attempts, and writes docs/robustness.md.

    .venv/bin/python benchmarks/figures.py

A number counts tests that passed, or what they counted themselves (the junit property ``tried``: kills, faults). The
first table comes from the last ``make fuzz`` (benchmarks/results/fuzz.json).
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from common import REPOSITORY

from smolconv.version import __version__

OUTPUT = REPOSITORY / "docs" / "robustness.md"
FUZZ = REPOSITORY / "benchmarks" / "results" / "fuzz.json"


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A row: what is done to smolconv, the required result, and the tests that do it."""

    what: str
    then: str
    tests: Mapping[str, str]  #: file -> pattern of test names; "" for all


TOPICS = (
    Topic(
        what="SIGKILL of a conversion, at a random moment or at a system call",
        then="nothing unfinished has the final name; `--resume` completes it to the same bytes",
        tests={"test_interruption.py": "_kill_"},
    ),
    Topic(
        what="no space, or another error, at a system call",
        then="exit 4; `--resume` completes it; the target of `--overwrite` is restored",
        tests={"test_interruption.py": "_error_at_any_call|last_step_fails"},
    ),
    Topic(
        what="kills, signals and full disks while a run trains and saves",
        then="the newest complete checkpoint is found, and the run continues bit for bit",
        tests={
            "test_training_resume.py": "killed|full_disk|signal",
            "test_run_checkpoints.py": "kill|dies|full|interrupted",
            "test_asynchronous_saves.py": "kill|full|stops_itself|no_memory",
        },
    ),
    Topic(
        what="a source that is written to, truncated, replaced or removed while it is converted",
        then="exit 3, and no output",
        tests={"test_integrity.py": "changes|had_read"},
    ),
    Topic(
        what="changed bytes of a checkpoint",
        then="refused by CRC-32 or digest, naming the file and tensor",
        tests={
            "test_integrity.py": "changed_record|certified|compare|covered|check_names|believed|not_list",
            "test_resume_damage.py": "",
        },
    ),
    Topic(
        what="documents, names, shapes and ranks that contradict each other",
        then="exit 3, with both values",
        tests={
            "test_contradictions.py": "",
            "test_replicas.py": "",
            "test_bad_input.py": "",
            "test_deepspeed_bad_input.py": "",
        },
    ),
    Topic(
        what="pickles and archives that run code, or that readers understand differently",
        then="nothing is executed; exit 3",
        tests={
            "test_nothing_executes.py": "",
            "test_torch_archive.py": "pickle|refused|errors|unsafe|never",
            "test_integrity.py": "differently|contradicts_itself|torchscript",
        },
    ),
    Topic(
        what="pipes, devices, links to themselves, terabytes, brackets, giant numbers in place of each file",
        then="one short error with the path; no waiting, little memory",
        tests={"test_bounds.py": ""},
    ),
    Topic(
        what="a Hub that lies, fails, is busy, drops connections, or gives a wrong listing",
        then="other bytes are refused; an outage is exit 4; an interrupted download continues",
        tests={"test_hub.py": "refus|outage|dropped|busy|hour|cache|list|none_is|circles|no_server|cannot|ranges"},
    ),
)


def run_tests(folder: Path) -> Iterator[tuple[str, str, str, int]]:
    """(file, name, outcome, tried) of each test."""
    report = folder / "report.xml"
    files = sorted({f"tests/{name}" for topic in TOPICS for name in topic.tests})
    words = [sys.executable, "-m", "pytest", "-q", "-n", os.environ.get("TEST_PROCESSES", "2"), "--dist", "loadfile",
             "-m", "not slow and not matrix and not slurm", f"--junitxml={report}", *files]  # fmt: skip
    subprocess.run(words, cwd=REPOSITORY, check=False)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        tried = sum(int(found.get("value", "0")) for found in case.iter("property") if found.get("name") == "tried")
        yield case.get("classname", "").rpartition(".")[2] + ".py", case.get("name", ""), outcome, tried or 1


def table(results: list[tuple[str, str, str, int]]) -> list[str]:
    lines = ["| test | required result | tests | tried | failed |", "|---|---|---|---|---|"]
    for topic in TOPICS:
        mine = [
            (outcome, tried) for file, name, outcome, tried in results
            if file in topic.tests and re.search(topic.tests[file], name) and outcome != "skipped"
        ]  # fmt: skip
        bad = sum(outcome != "passed" for outcome, _ in mine)
        tried = sum(count for outcome, count in mine if outcome == "passed")
        lines.append(f"| {topic.what} | {topic.then} | {len(mine):,} | {tried:,} | {bad} |")
    return lines


def fuzz_text(counts: Mapping[str, Any]) -> list[str]:
    """The last campaign of ``make fuzz``."""
    lines = ["| input | tried |", "|---|---|"]
    lines += [f"| {kind} | {number:,} |" for kind, number in counts["by_input"].items()]
    lines += [f"| **all** | {counts['inputs']:,} |", "", "| outcome | inputs |", "|---|---|"]
    lines += [f"| {outcome} | {number:,} |" for outcome, number in counts["outcomes"].items()]
    failed = len(counts["failures"])
    told = f"Seed {counts['seed']}, {counts['seconds'] / 60:.0f} minutes; {failed} different failures."
    return [*lines, "", told, ""]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = list(run_tests(Path(folder)))
    text = [
        "# What was tried against smolconv",
        "",
        "`make figures` writes this page: every number comes from a run. SECURITY.md has the promises, and",
        "names a test for each.",
        "",
        f"smolconv {__version__}, {date.today().isoformat()}, Python {platform.python_version()}.",
        "",
        "## Mutated inputs",
        "`make fuzz` changes real checkpoints, documents, recipes and token files (bits, ends, structure, pickle",
        "instructions, headers of zip and safetensors files, other things in place of a file), and gives them to the",
        "command line, in processes with limits on memory and time. The result must be a short error or",
        "the right output; anything else counts as a failure.",
        "",
    ]
    text += fuzz_text(json.loads(FUZZ.read_text())) if FUZZ.is_file() else ["It has not run on this machine.", ""]
    text += ["## Kills, damage and hostile input", *table(results), ""]
    OUTPUT.write_text("\n".join(text))
    print(f"{OUTPUT.relative_to(REPOSITORY)} is written.")
    sys.exit(any(outcome in ("failure", "error") for _, _, outcome, _ in results))


if __name__ == "__main__":
    main()
