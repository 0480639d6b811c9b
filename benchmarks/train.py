"""Measure training on a CPU: ``smolconv continue-train`` beside plain PyTorch, Hugging Face's Trainer and DeepSpeed.

    python benchmarks/train.py                    5 rounds, writes benchmarks/results/training.md
    python benchmarks/train.py --quick            1 round of few steps, printed only
    python benchmarks/train.py --rows 1,packed    one micro-batch a step, and attention over packed rows
    python benchmarks/train.py --no-emulated      without sides whose bf16 this processor emulates: minutes a step
    python benchmarks/train.py --model DIR        a checkpoint of your own, in Hugging Face's layout

Random weights at the shapes of SmolLM2-135M, and random tokens in datatrove's files, are made in a temporary folder.
Every side (see train_peers.py) is a process of its own; they take turns, so that none always follows the same one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    REPOSITORY,
    Run,
    is_installed,
    machine_lines,
    markdown_table,
    memory_bytes,
    peak_rss_bytes,
    remove,
    run,
    say,
    spread,
    take_turns,
)

from smolconv.processes import usable_cores

RESULTS = REPOSITORY / "benchmarks" / "results" / "training.md"
LENGTH, PACKED_LENGTH, DOCUMENT_TOKENS = 512, 2048, 128
#: Claims, as the README and docs state them.
OF_MASTERS_LIMIT = 0.95
OF_DEEPSPEED_LIMIT = 1.1
OF_DENSE_MASK_LIMIT = 1.5
#: First losses of all sides are those of the same rows; one token of 512 is a target for some sides only.
_LOSS_TOLERANCE = 0.05
_ROWS_OF_TOKENS = 512
_VOCABULARY = 49_152


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to train: a side of train_peers.py, and how it is called there."""

    title: str
    name: str
    dtype: str = "bfloat16"
    stage: int = 1

    def slow_without_bf16(self) -> bool:
        """Whether torch emulates its products on a processor without instructions for bfloat16. Ours avoids it."""
        return self.dtype == "bfloat16" and not self.name.endswith("smolconv")


OURS = {
    1: Side(title="smolconv, ZeRO-1", name="smolconv"),
    2: Side(title="smolconv, ZeRO-2", name="smolconv", stage=2),
}
#: Where bf16 is emulated, users take fp32: the same engine beside peers of the same dtype.
OURS_FLOAT32 = {
    stage: Side(title=f"smolconv, ZeRO-{stage}, fp32", name="smolconv", stage=stage, dtype="float32")
    for stage in (1, 2)
}
PLAIN = Side(title="plain loop, no masters", name="plain")
MASTERS = Side(title="plain loop, fp32 masters", name="plain_masters")
FLOAT32 = Side(title="plain loop, all in fp32", name="plain", dtype="float32")
TRAINER = Side(title="HF Trainer, bf16 autocast", name="trainer")
DEEPSPEED = {
    stage: Side(title=f"HF Trainer + DeepSpeed ZeRO-{stage}", name="trainer_deepspeed", stage=stage) for stage in (1, 2)
}
DEEPSPEED_FLOAT32 = {
    stage: Side(
        title=f"HF Trainer + DeepSpeed ZeRO-{stage}, fp32", name="trainer_deepspeed", stage=stage, dtype="float32"
    )
    for stage in (1, 2)
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One process: what it timed, and its peak memory from its start to its end."""

    process: Run
    seconds: tuple[float, ...]  #: of each timed step
    processor_seconds: tuple[float, ...]
    first_loss: float

    def tokens_per_second(self, tokens: int, *, processor: bool) -> float:
        return tokens * len(self.seconds) / sum(self.processor_seconds if processor else self.seconds)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Sides that trained on the same tokens, and the results of each."""

    title: str
    tokens_per_step: int
    results: Mapping[Side, Sequence[Result]]
    processor: bool

    def rates(self, side: Side) -> list[float]:
        """Tokens a second of each round."""
        return [
            each.tokens_per_second(self.tokens_per_step, processor=self.processor)
            for each in self.results.get(side, ())
        ]

    def ratio(self, side: Side, other: Side) -> float | None:
        """Median tokens/s of a side by those of another."""
        rates, others = self.rates(side), self.rates(other)
        return statistics.median(rates) / statistics.median(others) if rates and others else None

    def ratios(self, side: Side, other: Side) -> list[float]:
        """Of each round that both sides took part in."""
        return [one / two for one, two in zip(self.rates(side), self.rates(other))]

    def lines(self, base: Side) -> list[str]:
        clock = "tokens/s of processor time" if self.processor else "tokens/s"
        titles = ["side", clock, f"by {base.title}", "steps timed", "runs", "peak RSS, MB"]
        rows = []
        for side, results in self.results.items():
            ratio = self.ratio(side, base)
            timed = sum(len(each.seconds) for each in results)
            peak = peak_rss_bytes([each.process for each in results]) / 1e6
            rows.append([
                side.title, spread(self.rates(side), 1), "-" if ratio is None else f"{ratio:.2f}", str(timed),
                str(len(results)), f"{peak:.0f}",
            ])  # fmt: skip
        return ["", f"## {self.title}", "", *markdown_table(titles, rows)]


@dataclass
class Findings:
    """Everything measured so far; rendered again after each table, so that a stopped run leaves what it has."""

    machine: list[str]
    arguments: str
    threads: int
    bf16: bool  #: whether the processor multiplies bfloat16
    one: Table | None = None
    four: Table | None = None
    packed: Table | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A folder to work in, and how every side is called."""

    work: Path
    model: Path
    threads: int
    warmup: int
    steps: int
    limit: float
    rounds: int
    length: int
    bf16: bool
    processor: bool
    emulated: bool  #: whether sides take part whose bf16 the processor has no instructions for

    def environment(self) -> dict[str, str]:
        """All sides have the same threads; nothing is looked up on the network."""
        return {
            **os.environ, "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads),
            "PYTHONPYCACHEPREFIX": str(self.work / "bytecode"), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(
                [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }  # fmt: skip

    def table(self, title: str, sides: Sequence[Side], *, accumulate: int, length: int, rounds: int) -> Table:
        """Measure every side in turns. A side that a processor must emulate takes part in one round."""
        say(title)
        sides = [side for side in sides if self.bf16 or self.emulated or not side.slow_without_bf16()]
        results: dict[Side, list[Result]] = {side: [] for side in sides}
        tokens = accumulate * length

        def measured(side: Side) -> Callable[[], Run]:
            def one() -> Run:
                result = self._run(side, accumulate=accumulate, length=length)
                results[side].append(result)
                rate = result.tokens_per_second(tokens, processor=self.processor)
                say(
                    f"  {side.title}: {rate:.1f} tokens/s, {result.process.peak_rss_bytes / 1e6:.0f} MB, "
                    f"{result.process.seconds:.0f} s in all"
                )
                return result.process

            return one

        counts = {
            side.title: 1 if side.slow_without_bf16() and not self.bf16 else rounds for side in sides
        }  # fmt: skip
        take_turns({side.title: measured(side) for side in sides}, counts, lambda *_: None)
        losses = {side.title: found[0].first_loss for side, found in results.items()}
        if max(losses.values()) - min(losses.values()) > _LOSS_TOLERANCE:
            raise RuntimeError(f"{title}: the sides did not train on the same: first losses {losses}")
        return Table(title=title, tokens_per_step=tokens, results=results, processor=self.processor)

    def _run(self, side: Side, *, accumulate: int, length: int) -> Result:
        home, result = self.work / "run", self.work / "result.json"
        home.mkdir()
        result.unlink(missing_ok=True)
        try:
            process = run(
                [
                    sys.executable, str(Path(__file__).with_name("train_peers.py")), side.name,
                    "--model", str(self.model), "--tokens", str(self.work / "tokens"), "--work", str(home),
                    "--result", str(result), "--dtype", side.dtype, "--stage", str(side.stage),
                    "--accumulate", str(accumulate), "--length", str(length), "--threads", str(self.threads),
                    "--warmup", str(self.warmup), "--steps", str(self.steps), "--limit", str(self.limit),
                ],
                self.environment(), folder=self.work,
            )  # fmt: skip
        finally:
            shutil.rmtree(home)
        found = json.loads(result.read_text())
        return Result(
            process=process, seconds=tuple(found["seconds"]), processor_seconds=tuple(found["processor_seconds"]),
            first_loss=found["losses"][0],
        )  # fmt: skip


# --- what is measured ------------------------------------------------------------------------------------------------


def _unless(bf16: bool, sides: Mapping[int, Side]) -> list[Side]:
    return [] if bf16 else list(sides.values())


def one_micro_batch(bench: Bench) -> Table:
    """A step is a micro-batch of one row."""
    sides = [OURS[1], OURS[2], *_unless(bench.bf16, OURS_FLOAT32), PLAIN, MASTERS, FLOAT32]
    if is_installed("accelerate"):
        sides += [TRAINER, DEEPSPEED[1], DEEPSPEED[2], *_unless(bench.bf16, DEEPSPEED_FLOAT32)]
    return bench.table(
        f"One micro-batch of 1 x {bench.length} tokens a step",
        sides,
        accumulate=1,
        length=bench.length,
        rounds=bench.rounds,
    )


def four_micro_batches(bench: Bench) -> Table:
    """A step is four of them: gradients are summed, in fp32 where a side can."""
    sides = [OURS[1], OURS[2]]
    sides += [PLAIN, MASTERS] if bench.bf16 else [OURS_FLOAT32[1], FLOAT32]
    if is_installed("accelerate"):
        sides.append(DEEPSPEED[1] if bench.bf16 else DEEPSPEED_FLOAT32[1])
    return bench.table(
        f"Four micro-batches of 1 x {bench.length} tokens a step", sides, accumulate=4, length=bench.length,
        rounds=min(bench.rounds, 3),
    )  # fmt: skip


def packed_sides(bench: Bench) -> tuple[Side, Side]:
    """Ours and transformers', in bf16 where the processor has it, else both in fp32."""
    dtype = "bfloat16" if bench.bf16 else "float32"
    return (
        Side(title="smolconv, by document", name="packed_smolconv", dtype=dtype),
        Side(title="transformers, dense packed mask", name="packed_transformers", dtype=dtype),
    )


def packed_rows(bench: Bench) -> Table:
    """Forward and backward alone, on a row of documents."""
    return bench.table(
        f"Packed rows: forward and backward of 1 x {PACKED_LENGTH} tokens, documents of {DOCUMENT_TOKENS}, "
        f"{'bf16' if bench.bf16 else 'fp32'}",
        packed_sides(bench), accumulate=1, length=PACKED_LENGTH, rounds=min(bench.rounds, 3),
    )  # fmt: skip


# --- the document ----------------------------------------------------------------------------------------------------


def render(findings: Findings, bench: Bench) -> str:
    """The whole document."""
    clock = "processor time of the process" if bench.processor else "wall time"
    lines = [
        "# smolconv continue-train on a CPU, beside plain PyTorch, HF Trainer and DeepSpeed",
        "",
        f"Written by `python benchmarks/train.py{findings.arguments}`, {time.strftime('%Y-%m-%d %H:%M %Z')}. "
        "Do not edit.",
        "",
        *[f"- {line}" for line in findings.machine],
        f"- {findings.threads} threads in one process, for every side. "
        + (
            "The processor multiplies bfloat16"
            if findings.bf16
            else "The processor has no instructions for bfloat16: torch emulates its products, smolconv computes them "
            "in fp32 and keeps bf16 weights. "
            + (
                "Sides in emulated bf16 run once; the same sides in fp32 stand beside them"
                if bench.emulated
                else "Sides that would emulate it, for minutes a step, are left out; the same in fp32 stand for them"
            )
        ),
        f"- Every run is a fresh process that trains on the same rows in the same order; the first {bench.warmup} "
        f"steps are not timed (fewer where a step takes seconds), then up to {bench.steps} are, until "
        f"{bench.limit:.0f} s are full. Cells are median (min..max) of runs, in {clock}; sides take turns",
        "- Peak RSS is the largest `ru_maxrss` of a side's runs, with start-up, in MB of 10^6 bytes",
        "- smolconv: the worker as `continue-train` starts it, with its data, metrics, agreement of ranks and "
        "checks, clipping to 1.0; bf16 weights, fp32 masters and accumulation unless fp32 is said. Its start gate is "
        "off, and nothing is saved. Claims compare it with peers of the same dtype",
        "- Plain loops: transformers' model with its own loss, `torch.optim.AdamW(fused=True)`, clipping to 1.0. "
        "Without masters, weights, gradients and moments are bf16. With them, the model is bf16, and gradients are "
        "copied to fp32, summed, clipped and applied there, then copied back",
        "- HF Trainer: fp32 weights, bf16 autocast, its default AdamW, clipping to 1.0, a log line a step. With "
        "DeepSpeed: `bf16` on, the stage alone in `zero_optimization`, everything else `auto`; `torch_adam`, and "
        "shared-memory communication off, since both are compiled at a first start otherwise, for minutes",
        *[f"- {note}" for note in findings.notes],
        "",
        "## Claims",
        "",
        *_claims(findings, bench),
    ]
    for table in (findings.one, findings.four):
        if table is not None:
            lines += table.lines(MASTERS if MASTERS in table.results else FLOAT32)
    if findings.packed is not None:
        lines += findings.packed.lines(packed_sides(bench)[1])
    return "\n".join(lines) + "\n"


def _claims(findings: Findings, bench: Bench) -> list[str]:
    """Against every form of a peer that ran, in the same dtype; one that was not measured says so."""
    lines = []

    def claim(text: str, table: Table | None, pairs: Sequence[tuple[Side, Side]], limit: float) -> None:
        found = [] if table is None else [
            (ratio, ours, other) for ours, other in pairs if (ratio := table.ratio(ours, other)) is not None
        ]  # fmt: skip
        if not found or table is None:
            lines.append(f"- {text}: not measured")
            return
        verdict = "met" if min(found)[0] >= limit else "NOT met"
        shown = "; ".join(
            f"{ratio:.2f} ({_range(table.ratios(ours, other))}) x {other.title}" for ratio, ours, other in found
        )
        lines.append(f"- {text}: {shown}, **{verdict}**")

    for table, name in ((findings.one, "one micro-batch a step"), (findings.four, "four micro-batches a step")):
        claim(
            f"At least {OF_MASTERS_LIMIT} of a plain loop with fp32 masters, {name}", table,
            [(OURS[1], MASTERS), (OURS_FLOAT32[1], FLOAT32)], OF_MASTERS_LIMIT,
        )  # fmt: skip
    for stage in (1, 2):
        claim(
            f"At least {OF_DEEPSPEED_LIMIT} x HF Trainer + DeepSpeed at ZeRO-{stage}", findings.one,
            [(OURS[stage], DEEPSPEED[stage]), (OURS_FLOAT32[stage], DEEPSPEED_FLOAT32[stage])], OF_DEEPSPEED_LIMIT,
        )  # fmt: skip
    claim(
        f"Rows of {DOCUMENT_TOKENS}-token documents at {PACKED_LENGTH}: at least {OF_DENSE_MASK_LIMIT} x a dense mask",
        findings.packed, [packed_sides(bench)], OF_DENSE_MASK_LIMIT,
    )  # fmt: skip
    if findings.one is not None and (ratio := findings.one.ratio(OURS[1], PLAIN)):
        lines.append(f"- Beside the plain loop without masters (no claim): {ratio:.2f}")
    if not findings.bf16 and findings.one is not None and (ratio := findings.one.ratio(OURS[1], FLOAT32)):
        lines.append(f"- smolconv in bf16 beside the plain loop all in fp32 (no claim): {ratio:.2f}")
    return lines


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}..{max(values):.2f}"


# --- the command -----------------------------------------------------------------------------------------------------


def make_tokens(folder: Path, length: int) -> None:
    """Random tokens in datatrove's files, without an EOS but at the end: every row is one document."""
    code = (
        "import sys, numpy as np; from pathlib import Path; folder, count, vocabulary = Path(sys.argv[1]), "
        "int(sys.argv[2]), int(sys.argv[3]); name = '00000_unshuffled.ds'; "
        "tokens = np.random.default_rng(0).integers(1, vocabulary, count).astype('<u2'); tokens[-1] = 0; "
        "tokens.tofile(folder / name); np.array([count], dtype='<u8').tofile(folder / f'{name}.index'); "
        "(folder / f'{name}.metadata').write_text(f'random|2\\n{count}\\n{count} T')"
    )
    folder.mkdir()
    count = str(_ROWS_OF_TOKENS * (length + 1))
    # Its own process: a benchmark that held numpy would hand its size down to those that it measures.
    subprocess.run([sys.executable, "-c", code, str(folder), count, str(_VOCABULARY)], check=True)


def multiplies_bfloat16() -> bool:
    """Whether torch has fast bf16 products here, as it says itself."""
    code = "import torch; print(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return said.strip() == "True"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: random weights of 135M")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to make a folder to work in (2 GB)")
    parser.add_argument("--rows", default="1,4,packed", help="which tables: 1 or 4 micro-batches a step, packed rows")
    parser.add_argument("--rounds", type=int, default=5, help="of one micro-batch a step; 3 at most of the others")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a run that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run that are timed")
    parser.add_argument("--limit", type=float, default=8, help="seconds of timed steps that are enough")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every side")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: on a busy machine")
    parser.add_argument("--length", type=int, default=LENGTH, help="of the rows that are not packed")
    parser.add_argument("--no-emulated", action="store_true", help="leave out sides whose bf16 this processor emulates")
    parser.add_argument("--quick", action="store_true", help="1 round of 1 + 1 steps; printed only without --output")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(REPOSITORY)}")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.warmup, given.steps = 1, 1, 1
    given.rows = [row for row in given.rows.split(",") if row]
    for unknown in sorted({*given.rows} - {"1", "4", "packed"}):
        parser.error(f"unknown row {unknown}: choose of 1, 4, packed")
    if min(given.rounds, given.steps, given.threads) < 1 or given.warmup < 0:
        parser.error("at least one round, step and thread are needed")
    return given


def main() -> int:
    """Measure everything that was asked for, and write the table. Returns 1 when a claim is not met."""
    given = parse_arguments()
    output = given.output or (None if given.quick else RESULTS)
    packages = ("smolconv", "torch", "transformers", "accelerate", "deepspeed")
    bf16 = multiplies_bfloat16()
    findings = Findings(
        machine=machine_lines(packages), arguments="".join(f" {shlex.quote(each)}" for each in sys.argv[1:]),
        threads=given.threads, bf16=bf16,
    )  # fmt: skip
    if not is_installed("accelerate"):
        findings.notes.append("accelerate is not installed (pip install accelerate): Trainer's sides are left out")
    if memory_bytes() < 8e9:
        sys.exit("sides take up to 6 GB of memory, and this machine has less than 8 GB")
    parent = (given.work or Path(tempfile.gettempdir())).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="smolconv-bench-", dir=parent))
    bench = Bench(
        work=work, model=(given.model or work / "model").resolve(), threads=given.threads, warmup=given.warmup,
        steps=given.steps, limit=given.limit, rounds=given.rounds, length=given.length, bf16=bf16,
        processor=given.clock == "processor",
        emulated=not given.no_emulated,
    )  # fmt: skip

    def write() -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(render(findings, bench))

    began = time.monotonic()
    try:
        make_tokens(work / "tokens", given.length)
        if given.model is None:
            script = Path(__file__).with_name("random_checkpoint.py")
            run([sys.executable, str(script), "135m", str(work / "model")], bench.environment())
        if "1" in given.rows:
            findings.one = one_micro_batch(bench)
            write()
        if "4" in given.rows:
            findings.four = four_micro_batches(bench)
            write()
        if "packed" in given.rows:
            findings.packed = packed_rows(bench)
    finally:
        remove(work)
    findings.notes.append(f"The whole benchmark took {(time.monotonic() - began) / 60:.0f} minutes")
    write()
    text = render(findings, bench)
    print(text)
    if output is not None:
        say(f"written to {output}")
    return 1 if "**NOT met**" in text else 0


if __name__ == "__main__":
    sys.exit(main())
