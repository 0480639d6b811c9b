"""Measure ``smolconv convert`` against ``cp -r`` and transformers, its memory at every size, and ``smolconv inspect``.

    python benchmarks/convert.py                   all sizes, 7 pairs; half an hour or more on a slow disk
    python benchmarks/convert.py --quick           135M, 3 pairs, printed only
    python benchmarks/convert.py --work /mnt/fast --work /dev/shm/bench --allow-tmpfs

Checkpoints are made here, of random weights. A is a whole ``smolconv convert`` process and then ``sync``, B is
``cp -r --reflink=never`` of its source and then ``sync``; they take turns on the same file system, with inputs read
once before, the disk synced before, and outputs deleted in between.
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
    Pairs,
    Run,
    alternate,
    file_system,
    folder_bytes,
    is_diskless,
    machine_lines,
    markdown_table,
    memory_bytes,
    peak_rss_bytes,
    remove,
    run,
    say,
    spread,
    sync,
    warm,
)

RESULTS = REPOSITORY / "benchmarks" / "results" / "convert.md"
SMOLCONV = str(Path(sys.executable).with_name("smolconv"))
#: Claims, as README and docs state them.
RATIO_LIMIT = 1.1
RSS_LIMIT_BYTES = {"weights": 150e6, "with Adam": 450e6}
INSPECT_LIMIT_SECONDS = 0.5
_TRANSFORMERS = (
    "import sys; from transformers import AutoModelForCausalLM as Model;"
    "Model.from_pretrained(sys.argv[1], dtype='bfloat16').save_pretrained(sys.argv[2], max_shard_size='1GB')"
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model's shapes, and how its nanotron checkpoints are split."""

    name: str
    weight_bytes: int
    tp: int
    other_tp: int  #: what the optimizer's archives are rewritten to

    @property
    def adam_bytes(self) -> int:
        return self.weight_bytes * 7  # bf16 weights, and fp32 master, exp_avg and exp_avg_sq


SIZES: Mapping[str, Size] = {
    "135m": Size(name="135M", weight_bytes=269_030_016, tp=2, other_tp=1),
    "360m": Size(name="360M", weight_bytes=723_642_240, tp=2, other_tp=1),
    "1.7b": Size(name="1.7B", weight_bytes=3_422_752_768, tp=2, other_tp=4),
    "3b": Size(name="3B", weight_bytes=6_150_197_248, tp=2, other_tp=4),
}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One measured conversion beside its copy."""

    fs: str
    model: str
    content: str  #: "weights" or "with Adam"
    title: str
    output_bytes: int
    pairs: Pairs


@dataclass
class Findings:
    """Everything measured so far; rendered again after each step, so that a stopped run leaves what it has."""

    machine: list[str]
    arguments: str
    conversions: list[Conversion] = field(default_factory=list)
    transformers: list[tuple[str, str, list[Run]]] = field(default_factory=list)
    inspections: list[tuple[str, str, str, list[Run]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One folder to work in, and what is measured there."""

    work: Path
    fs: str
    pairs: int
    pairs_beside: int
    transformers_runs: int
    findings: Findings
    write: Callable[[], None]

    def environment(self) -> dict[str, str]:
        """As for an installed smolconv: its bytecode is compiled before, and kept out of the working tree."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "PYTHONPYCACHEPREFIX": str(self.work / "bytecode"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}

    def weights(self, key: str) -> None:
        """HF -> HF in smaller shards, HF -> nanotron and back; transformers and inspect beside them."""
        size, home = SIZES[key], self.work / key
        if not self._has_room(size, size.weight_bytes):
            return
        pairs = self.pairs_beside if key == "3b" else self.pairs
        hf, nanotron = home / "hf", home / "nanotron"
        try:
            self._make(hf, key)
            self._inspect(size, "HF", hf)
            reshard = ("--to", "hf", "--max-shard-size", "1GB" if size.weight_bytes > 1e9 else "100MB")
            self._measure(size, "weights", f"HF -> HF, {reshard[-1]} shards", source=hf, options=reshard, pairs=pairs)
            self._transformers(size, hf)
            to_nanotron = ("--to", "nanotron", "--tp", str(size.tp))
            self._measure(size, "weights", f"HF -> nanotron tp{size.tp}", source=hf, options=to_nanotron, pairs=pairs)
            run([SMOLCONV, "convert", str(hf), str(nanotron), *to_nanotron], self.environment())
            remove(hf)
            self._inspect(size, f"nanotron tp{size.tp}", nanotron)
            title = f"nanotron tp{size.tp} -> HF"
            self._measure(size, "weights", title, source=nanotron, options=("--to", "hf"), pairs=pairs)
        finally:
            remove(home)

    def adam(self, key: str) -> None:
        """nanotron with masters and moments -> HF with its sidecar, and -> nanotron of another topology."""
        size, home = SIZES[key], self.work / f"{key}-adam"
        if not self._has_room(size, size.adam_bytes):
            return
        source = home / "nanotron"
        try:
            self._make(source, key, "--layout", "nanotron", "--tp", str(size.tp), "--adam")
            self._inspect(size, f"nanotron tp{size.tp} with Adam", source)
            title = f"nanotron tp{size.tp} -> HF + sidecar"
            self._measure(size, "with Adam", title, source=source, options=("--to", "hf"), pairs=self.pairs_beside)
            title = f"nanotron tp{size.tp} -> tp{size.other_tp}"
            options = ("--to", "nanotron", "--tp", str(size.other_tp))
            self._measure(size, "with Adam", title, source=source, options=options, pairs=self.pairs_beside)
        finally:
            remove(home)

    def _has_room(self, size: Size, checkpoint_bytes: int) -> bool:
        free, needed = shutil.disk_usage(self.work).free, 2.1 * checkpoint_bytes
        if free < needed:
            note = f"{size.name} left out on {self.fs}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed"
            self.findings.notes.append(note)
            say(note)
        return free >= needed

    def _make(self, target: Path, key: str, *options: str) -> None:
        say(f"{SIZES[key].name}: making {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("random_checkpoint.py")
        made = run([sys.executable, str(script), key, str(target), *options], self.environment())
        say(f"  {folder_bytes(target) / 1e9:.2f} GB in {made.seconds:.1f} s")

    def _measure(
        self, size: Size, content: str, title: str, *, source: Path, options: Sequence[str], pairs: int
    ) -> None:
        say(f"{size.name} {content} on {self.fs}: {title}, {pairs} pairs")
        out = source.with_name("out")
        sizes: list[int] = []

        def timed(command: list[str]) -> Run:
            warm(source)
            sync()
            found = run(command, self.environment(), then_sync=True)
            sizes.append(folder_bytes(out))
            remove(out)
            return found

        def done(a: Run, b: Run) -> None:
            ours = (
                f"smolconv {a.seconds:.2f} s ({a.processor_seconds:.2f} s processor, {a.peak_rss_bytes / 1e6:.0f} MB)"
            )
            copy = f"cp -r {b.seconds:.2f} s ({b.processor_seconds:.2f} s processor)"
            say(f"  {ours}, {copy}, ratio {a.seconds / b.seconds:.2f}")

        found = alternate(
            lambda: timed([SMOLCONV, "convert", str(source), str(out), *options]),
            lambda: timed(["cp", "-r", "--reflink=never", str(source), str(out)]),
            pairs,
            done,
        )
        # The same bytes: a conversion that wrote less than the copy would make the comparison void.
        if max(sizes) > 1.02 * min(sizes):
            raise RuntimeError(f"{title}: outputs of {min(sizes)} and {max(sizes)} bytes are not the same work")
        if sizes[0] + folder_bytes(source) > memory_bytes():
            self.findings.notes.append(
                f"{size.name} {content}, {title}: input and output exceed memory, so not all of the input was warm"
            )
        self.findings.conversions.append(
            Conversion(fs=self.fs, model=size.name, content=content, title=title, output_bytes=sizes[0], pairs=found)
        )
        self.write()

    def _transformers(self, size: Size, source: Path) -> None:
        out, runs = source.with_name("out"), []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        for _ in range(self.transformers_runs):
            warm(source)
            sync()
            command = [sys.executable, "-c", _TRANSFORMERS, str(source), str(out)]
            runs.append(run(command, environment, then_sync=True))
            remove(out)
            say(f"  transformers {runs[-1].seconds:.2f} s, {runs[-1].peak_rss_bytes / 1e6:.0f} MB")
        if runs:
            self.findings.transformers.append((self.fs, size.name, runs))
            self.write()

    def _inspect(self, size: Size, what: str, folder: Path) -> None:
        command = [SMOLCONV, "inspect", str(folder)]
        run(command, self.environment())
        runs = [run(command, self.environment()) for _ in range(max(3, self.pairs))]
        self.findings.inspections.append((self.fs, size.name, what, runs))
        say(f"  inspect {what}: {spread([each.seconds for each in runs])} s")
        self.write()


def render(findings: Findings) -> str:
    """The whole document."""
    conversions = [
        [
            c.fs, c.model, c.content, c.title, f"{c.output_bytes / 1e9:.2f}",
            spread([r.seconds for r in c.pairs.a]), spread([r.seconds for r in c.pairs.b]),
            f"{c.pairs.ratio:.2f} ({min(c.pairs.ratios):.2f}..{max(c.pairs.ratios):.2f})", str(len(c.pairs.a)),
            f"{statistics.median(r.processor_seconds for r in c.pairs.a):.2f}",
            f"{statistics.median(r.processor_seconds for r in c.pairs.b):.2f}",
            f"{peak_rss_bytes(c.pairs.a) / 1e6:.0f}",
        ]
        for c in findings.conversions
    ]  # fmt: skip
    lines = [
        "# smolconv convert beside cp -r and transformers",
        "",
        f"Written by `python benchmarks/convert.py{findings.arguments}`, {time.strftime('%Y-%m-%d %H:%M %Z')}. "
        "Do not edit.",
        "",
        *[f"- {line}" for line in findings.machine],
        "- Whole fresh processes with imports (bytecode compiled before, as pip does); inputs in the page cache; "
        "`sync` before each run and inside both times; "
        "cells are median (min..max) in seconds; the ratio is that of the medians, with the pairs' own in brackets",
        "- Processor: user and system seconds of the process, without the kernel's writeback. Peak RSS: the largest "
        "`ru_maxrss` of all runs, in MB of 10^6 bytes. Digests (xxh3) are included",
        "- Random weights at each model's shapes, bf16; `with Adam` adds fp32 masters and both moments (7 times the "
        "bytes)",
        *[f"- {note}" for note in findings.notes],
        "",
        "## Claims",
        "",
        *_claims(findings),
        "",
        "## Conversions",
        "",
        *markdown_table(
            ["file system", "model", "content", "conversion", "GB", "smolconv, sync", "cp -r, sync", "ratio", "pairs",
             "processor, smolconv", "processor, cp", "peak RSS, MB"],
            conversions,
        ),
    ]  # fmt: skip
    if findings.transformers:
        lines += ["", "## transformers: from_pretrained, save_pretrained, HF -> HF", "", *_transformers_table(findings)]
    if findings.inspections:
        rows = [
            [fs, model, what, spread([r.seconds for r in runs]), f"{peak_rss_bytes(runs) / 1e6:.0f}"]
            for fs, model, what, runs in findings.inspections
        ]
        lines += ["", "## smolconv inspect", ""]
        lines += markdown_table(["file system", "model", "checkpoint", "seconds", "peak RSS, MB"], rows)
    return "\n".join(lines) + "\n"


def _transformers_table(findings: Findings) -> list[str]:
    rows = []
    for fs, model, runs in findings.transformers:
        seconds = [each.seconds for each in runs]
        ours = next((c for c in findings.conversions if (c.fs, c.model) == (fs, model) and "HF -> HF" in c.title), None)
        mine = [each.seconds for each in ours.pairs.a] if ours else []
        rows.append([
            fs, model, spread(seconds), f"{peak_rss_bytes(runs) / 1e6:.0f}", spread(mine) if mine else "-",
            f"{statistics.median(seconds) / statistics.median(mine):.1f}" if mine else "-",
        ])  # fmt: skip
    titles = ["file system", "model", "transformers, sync", "peak RSS, MB", "smolconv, sync", "times as long"]
    return markdown_table(titles, rows)


def _claims(findings: Findings) -> list[str]:
    """Each claim with the worst figure for it; one that was not measured says so."""
    lines = []

    def claim(text: str, values: Sequence[float], limit: float, unit: str, digits: int) -> None:
        if values:
            verdict = "met" if max(values) <= limit else "NOT met"
            lines.append(f"- {text}: worst {max(values):.{digits}f}{unit}, **{verdict}**")
        else:
            lines.append(f"- {text}: not measured")

    big = [c.pairs.ratio for c in findings.conversions if c.model == "1.7B" and c.content == "weights"]
    claim(f"1.7B takes at most {RATIO_LIMIT} times as long as `cp -r` and sync", big, RATIO_LIMIT, "", 2)
    for content, limit in RSS_LIMIT_BYTES.items():
        peaks = [peak_rss_bytes(c.pairs.a) / 1e6 for c in findings.conversions if c.content == content]
        claim(f"Peak RSS, {content}, at most {limit / 1e6:.0f} MB at every size", peaks, limit / 1e6, " MB", 0)
    seconds = [
        statistics.median(each.seconds for each in runs)
        for _, model, what, runs in findings.inspections
        if model == "3B" and "Adam" not in what
    ]
    claim(f"`smolconv inspect` of the 3B in under {INSPECT_LIMIT_SECONDS} s", seconds, INSPECT_LIMIT_SECONDS, " s", 2)
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, action="append", metavar="DIR",
        help="where to make a folder to work in; again for another disk (default: beside the repository)",
    )  # fmt: skip
    parser.add_argument("--allow-tmpfs", action="store_true", help="let --work lie in memory")
    parser.add_argument("--sizes", default="135m,360m,1.7b,3b", help="comma-separated, of 135m, 360m, 1.7b, 3b")
    parser.add_argument("--adam-sizes", default="135m,360m", help="the same with optimizer archives; may be empty")
    parser.add_argument("--full", action="store_true", help="1.7b with optimizer archives too: needs 51 GB")
    parser.add_argument("--pairs", type=int, default=7, help="pairs for the weights of 135m, 360m and 1.7b")
    parser.add_argument("--pairs-beside", type=int, default=3, help="pairs for 3b and with optimizer archives")
    parser.add_argument("--transformers-runs", type=int, default=1, help="0 leaves transformers out")
    parser.add_argument("--quick", action="store_true", help="135m, 3 pairs, printed only unless --output is given")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(REPOSITORY)}")
    given = parser.parse_args()
    if given.quick:
        given.sizes = given.adam_sizes = "135m"
        given.pairs, given.pairs_beside = 3, 1
    given.sizes = [size for size in given.sizes.split(",") if size]
    given.adam_sizes = [size for size in given.adam_sizes.split(",") if size]
    if given.full and "1.7b" not in given.adam_sizes:
        given.adam_sizes.append("1.7b")
    unknown = sorted({*given.sizes, *given.adam_sizes} - set(SIZES))
    if unknown:
        parser.error(f"unknown size {unknown[0]}: choose of {', '.join(SIZES)}")
    if min(given.pairs, given.pairs_beside) < 1:
        parser.error("at least one pair is needed")
    return given


def main() -> None:
    """Measure everything in every folder, and write the table."""
    given = parse_arguments()
    output = given.output or (None if given.quick else RESULTS)
    packages = ("smolconv", "numpy", "xxhash", "typer", "torch", "transformers", "safetensors")
    arguments = "".join(f" {shlex.quote(argument)}" for argument in sys.argv[1:])
    findings = Findings(machine=machine_lines(packages), arguments=arguments)

    def write() -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(render(findings))

    for parent in given.work or [REPOSITORY.parent]:
        parent.mkdir(parents=True, exist_ok=True)
        if is_diskless(parent) and not given.allow_tmpfs:
            sys.exit(f"{parent} lies in memory ({file_system(parent)}), not on a disk. Pass --allow-tmpfs to continue.")
        # A folder of our own: what is deleted at the end is only what was made here.
        work = Path(tempfile.mkdtemp(prefix="smolconv-bench-", dir=parent))
        bench = Bench(
            work=work, fs=file_system(work), pairs=given.pairs, pairs_beside=given.pairs_beside,
            transformers_runs=given.transformers_runs, findings=findings, write=write,
        )  # fmt: skip
        try:
            for size in given.sizes:
                bench.weights(size)
            for size in given.adam_sizes:
                bench.adam(size)
        finally:
            remove(work)
    print(render(findings))
    if output is not None:
        say(f"written to {output}")


if __name__ == "__main__":
    main()
