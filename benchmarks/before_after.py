"""Measure ``smolconv convert`` as it is beside what it was at an earlier commit: what a change costs.

    python benchmarks/before_after.py --before 6ab38f1 --size 1.7b --pairs 7

Both run from their own checkout in this environment, and take turns: whole processes and then ``sync``, sources of
random weights in the page cache, outputs deleted in between.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from common import (
    REPOSITORY,
    Pairs,
    Run,
    alternate,
    file_system,
    folder_bytes,
    machine_lines,
    markdown_table,
    peak_rss_bytes,
    remove,
    run,
    say,
    spread,
    sync,
    warm,
)

RESULTS = REPOSITORY / "benchmarks" / "results" / "before-after.md"
#: Source (as random_checkpoint.py makes it), and options of convert.
ROWS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "ZeRO-3 ws 2 -> HF fp32": (
        ("--layout", "deepspeed", "--zero-stage", "3", "--world-size", "2", "--adam"),
        ("--to", "hf", "--dtype", "float32", "--no-optimizer"),
    ),
    "ZeRO-2 ws 2 -> universal": (
        ("--layout", "deepspeed", "--zero-stage", "2", "--world-size", "2", "--adam"), ("--to", "deepspeed"),
    ),
    "nanotron tp2 -> HF": (("--layout", "nanotron"), ("--to", "hf")),
    "nanotron tp2 with Adam -> ZeRO-1 ws 2": (
        ("--layout", "nanotron", "--adam"), ("--to", "deepspeed", "--zero-stage", "1", "--world-size", "2"),
    ),
    "HF -> nanotron tp2": ((), ("--to", "nanotron", "--tp", "2")),
}  # fmt: skip


def measure(before: Path, sources: Path, out: Path, size: str, pairs: int) -> list[list[str]]:
    """A row of the table for each conversion; sources are made, and deleted again."""
    rows = []
    for title, (source, options) in ROWS.items():
        place = sources / "source"
        run([sys.executable, str(REPOSITORY / "benchmarks" / "random_checkpoint.py"), size, str(place), *source])
        manifest = place / "smolconv_manifest.json"
        manifest.unlink(missing_ok=True)  # as others' checkpoints come

        def once(code: Path, options: Sequence[str] = options, place: Path = place) -> Run:
            remove(out)
            sync()
            package = "smolconv.commands" if (code / "smolconv" / "commands").exists() else "commands"
            words = ["-c", f"from {package}.main import main; main()", "convert", str(place), str(out), *options]
            environment = {**os.environ, "PYTHONPATH": str(code)}
            return run([sys.executable, *words], environment, then_sync=True, folder=sources)

        def told(a: Run, b: Run, title: str = title) -> None:
            say(f"{title}: after {a.seconds:.2f} s, before {b.seconds:.2f} s")

        warm(place)
        once(before), once(REPOSITORY)  # bytecode, and what the disk does the first time
        found = alternate(partial(once, REPOSITORY), partial(once, before), pairs, told)
        rows.append(_row(title, size, folder_bytes(place), found))
        remove(out)
        remove(place)
    return rows


def _row(title: str, size: str, source_bytes: int, found: Pairs) -> list[str]:
    return [
        size, title, f"{source_bytes / 1e9:.2f}",
        *(spread([one.seconds for one in runs]) for runs in (found.a, found.b)),
        f"{found.ratio:.2f} ({min(found.ratios):.2f}..{max(found.ratios):.2f})",
        *(spread([one.processor_seconds for one in runs]) for runs in (found.a, found.b)),
        f"{peak_rss_bytes(found.a) / 1e6:.0f}", f"{peak_rss_bytes(found.b) / 1e6:.0f}",
    ]  # fmt: skip


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, metavar="COMMIT")
    parser.add_argument("--size", action="append", choices=("135m", "360m", "1.7b", "3b"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="folder on the disk to measure")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work, prefix="before-after-") as folder:
        place = Path(folder)
        subprocess.run(
            ["git", "-C", str(REPOSITORY), "worktree", "add", "--detach", "-q", str(place / "before"), given.before],
            check=True,
        )
        try:
            rows = [
                row
                for size in given.size or ["135m", "1.7b"]
                for row in measure(place / "before", place, place / "out", size, given.pairs)
            ]
            system = file_system(place)
        finally:
            subprocess.run(
                ["git", "-C", str(REPOSITORY), "worktree", "remove", "--force", str(place / "before")], check=True
            )
    titles = ["model", "conversion", "GB", "after, s", "before, s", "times as long", "processor after, s",
              "processor before, s", "peak RSS after, MB", "peak RSS before, MB"]  # fmt: skip
    lines = [
        "# smolconv convert beside an earlier commit", "",
        f"Written by `python benchmarks/before_after.py --before {given.before}`. Do not edit.", "",
        *(f"- {line}" for line in machine_lines(["numpy", "xxhash", "zlib-ng"])),
        f"- {system}; whole fresh processes and `sync`, in turns, {given.pairs} pairs; sources of random weights in "
        "the page cache; cells are median (min..max)", "",
        *markdown_table(titles, rows),
    ]  # fmt: skip
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
