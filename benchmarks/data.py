"""Measure how fast training data is read: tokens, positions and labels of whole steps, and the blend of sources.

    python benchmarks/data.py            7 rounds, writes benchmarks/results/data.md
    python benchmarks/data.py --quick    2 rounds, printed only

50 million random tokens with an EOS about every 600 are written as datatrove writes them, in a temporary folder, read
once before, and then read again and again in one thread of this process. Rows of a table take turns in each round.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from common import REPOSITORY, file_system, machine_lines, markdown_table, say, spread, warm

from smolconv.continual_pretraining.data.blending import Blend
from smolconv.continual_pretraining.data.stream import TrainingData
from smolconv.continual_pretraining.recipe.schema import Data
from smolconv.processes import usable_cores

RESULTS = REPOSITORY / "benchmarks" / "results" / "data.md"
SEQUENCE_LENGTH = 2048
STEP_SEQUENCES = 64
TOKENS = 50_000_000
DOCUMENT_TOKENS = 600
VOCABULARY = {2: 49_152, 4: 128_256}
#: Claims, as the README and docs state them.
TOKENS_LIMIT = 50e6
PICKS_LIMIT = 1e6

#: What SmolLM3's first stage looks like: a few large sources and many small ones.
TWELVE = (0.333, 0.37, 0.02, 0.01, 0.005, 0.01, 0.1, 0.08, 0.03, 0.02, 0.017, 0.005)
MIXTURES: Mapping[str, tuple[float, ...]] = {
    "2 sources, 0.7 and 0.3": (0.7, 0.3),
    "3 sources, one of 1 in 10,000": (0.9989, 0.001, 0.0001),
    "5 sources": (0.4, 0.3, 0.15, 0.1, 0.05),
    "12 equal sources": (1.0,) * 12,
    "12 sources, 0.37 to 0.005": TWELVE,
}
PICKS = 4_000_000
CLOCKS = {"wall": time.perf_counter, "processor": time.thread_time}


def write_folder(folder: Path, token_size: int, seed: int, tokens: int = TOKENS) -> Path:
    """Random tokens, an EOS (0) about every 600, with index and metadata, in two files."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    for file in range(2):
        count = tokens // 2
        ids = random.integers(1, VOCABULARY[token_size], count).astype(f"<u{token_size}")
        ends = np.cumsum(random.geometric(1 / DOCUMENT_TOKENS, 2 * count // DOCUMENT_TOKENS))
        ends = np.append(ends[ends < count], count)
        ids[ends - 1] = 0
        path = folder / f"{file:05d}_00000_unshuffled.ds"
        ids.tofile(path)
        ends.astype("<u8").tofile(f"{path}.index")
        Path(f"{path}.metadata").write_text(f"random|{token_size}\n{count}\n{count / 1e6:.1f} MT")
        if seed % 2:
            (random.random(count) > 0.1).tofile(f"{path}.loss")
    return folder


def data_of(folders: list[Path], boundaries: str = "eos") -> Data:
    sources = [{"path": str(folder)} for folder in folders]
    return Data.model_validate(
        {
            "sequence_length": SEQUENCE_LENGTH,
            "eos_token_id": 0,
            "boundaries": boundaries,
            "stages": [{"name": "stage", "sources": sources}],
        }
    )


def read_steps(
    data: Data, step_sequences: int, micro_batch: int, vocab_size: int, tokens: int, clock: str
) -> Callable[[], float]:
    """A run that reads about so many tokens in whole steps, and returns tokens a second."""
    training = TrainingData(
        data,
        global_batch_sequences=step_sequences,
        micro_batch_sequences=micro_batch,
        vocab_size=vocab_size,
        rank=0,
        world_size=1,
    )
    steps = max(1, tokens // (step_sequences * SEQUENCE_LENGTH))

    def run() -> float:
        reading: Iterator[object] = training.read_steps(1, steps + 1)
        next(reading)  # chooses the first samples of the blend, some 65,000 in one go
        started = CLOCKS[clock]()
        for _ in reading:
            pass
        return steps * step_sequences * SEQUENCE_LENGTH / (CLOCKS[clock]() - started)

    return run


def blend(weights: tuple[float, ...], clock: str) -> Callable[[], float]:
    def run() -> float:
        started = CLOCKS[clock]()
        Blend(weights).skip(PICKS)
        return PICKS / (CLOCKS[clock]() - started)

    return run


def measure(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        order = list(sides)
        first = number % len(order)
        for side in order[first:] + order[:first]:
            rate = sides[side]()
            if number:  # the first round only warms up
                found[side].append(rate / 1e6)
        say(f"round {number} of {rounds}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds, and write no results")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a machine that is not quiet")
    options = parser.parse_args()
    clock = options.clock
    rounds, tokens = (2, 5_000_000) if options.quick else (7, 20_000_000)
    cores = usable_cores()
    machine = machine_lines(["smolconv", "numpy"])
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        two, other, four = (
            write_folder(root / name, size, seed)
            for name, size, seed in (("two", 2, 0), ("other", 2, 1), ("four", 4, 2))
        )
        disk = file_system(root)
        warm(root)
        plain = data_of([two])
        sides = {
            f"micro-batches of {size}": read_steps(plain, STEP_SEQUENCES, size, VOCABULARY[2], tokens, clock)
            for size in (1, 4, 16)
        }
        sides |= {
            f"steps of one micro-batch of {size}": read_steps(plain, size, size, VOCABULARY[2], tokens, clock)
            for size in (1, 4, 16)
        }
        sides["boundaries by the index, micro-batches of 4"] = read_steps(
            data_of([two], "index"), STEP_SEQUENCES, 4, VOCABULARY[2], tokens, clock
        )
        sides["4-byte tokens, micro-batches of 4"] = read_steps(
            data_of([four]), STEP_SEQUENCES, 4, VOCABULARY[4], tokens, clock
        )
        sides["two sources, one with a loss mask, micro-batches of 4"] = read_steps(
            data_of([two, other]), STEP_SEQUENCES, 4, VOCABULARY[2], tokens, clock
        )
        rates = measure(sides, rounds)
        picks = measure({name: blend(weights, clock) for name, weights in MIXTURES.items()}, rounds)

    verdicts = []
    for what, values, limit in (
        (
            "At least 50 M tokens/s, every row below",
            list(rates.values()),
            TOKENS_LIMIT,
        ),
        ("At least 1 M choices/s of the blend", list(picks.values()), PICKS_LIMIT),
    ):
        worst = min(statistics.median(each) for each in values)
        verdicts.append(f"- {what}: slowest median {worst:.1f} M, **{'met' if worst >= limit / 1e6 else 'NOT met'}**")
    lines = [
        "# Training data: how fast rows are read", "",
        f"Written by `benchmarks/data.py` on {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}.", "",
        *(f"- {line}" for line in machine),
        f"- One thread, allowed on {cores} of the cores; file system: {disk}; files in the page cache",
        *["- In processor time of the thread, since other programs ran beside it"][: clock == "processor"],
        f"- {TOKENS / 1e6:.0f} M random tokens of 2 bytes in 2 files, an EOS about every {DOCUMENT_TOKENS}; sequence "
        f"{SEQUENCE_LENGTH}; every id is compared with the vocabulary",
        f"- Million tokens a second, delivered as int64 tokens, positions and labels: median (min..max) of {rounds} "
        f"rounds of {tokens / 1e6:.0f} M tokens; rows take turns", "",
        "## Claims", "", *verdicts, "",
        f"## Rows, in steps of {STEP_SEQUENCES} sequences where nothing else is said", "",
        *markdown_table(["", "M tokens/s"], [[name, spread(values, 0)] for name, values in rates.items()]), "",
        "Training takes all micro-batches of a step from one read, and small steps together. Steps of one row show",
        "what a step costs beside its tokens.", "",
        "## Choosing sources", "",
        f"`Blend.skip` over {PICKS / 1e6:.0f} M samples from the beginning, as resuming without a stored position "
        "does.", "",
        *markdown_table(["", "M samples/s"], [[name, spread(values, 1)] for name, values in picks.items()]), "",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        RESULTS.write_text(text)
    return 0 if all("NOT met" not in verdict for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
