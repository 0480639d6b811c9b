"""Measure what saves cost a run on a CPU: how long training stops, and how fast it continues while one is written.

    python benchmarks/saves.py             3 rounds, writes benchmarks/results/saves.md
    python benchmarks/saves.py --quick     1 round, printed only

The worker that ``continue-train`` starts trains SmolLM2-135M's shapes in fp32 on one rank: weights, masters and moments
are saved. A round has a synchronous save, an asynchronous one, and one that another process writes: the same content by
the same functions, while training continues as it does in the second. So the last two differ by what a thread of the
training's own process costs, and both from steps alone by what writing takes from the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import REPOSITORY, file_system, folder_bytes, machine_lines, markdown_table, run, say, spread, sync
from train import make_tokens

RESULTS = REPOSITORY / "benchmarks" / "results" / "saves.md"
LENGTH, ALONE_STEPS, ROUNDS = 32, 3, 3
THREADS = 1  #: of the training, as most clusters have cores left beside it
STALL_LIMIT = 0.2
_EVERY = 1 << 30


# --- the process that trains ------------------------------------------------------------------------------------------


def train(work: Path, rounds: int) -> None:
    """Train as ``continue-train`` does; ``found.json`` in ``work`` has what was measured."""
    from train_peers import _alone

    from smolconv.continual_pretraining.recipe.files import RECIPE, dump_recipe
    from smolconv.continual_pretraining.recipe.schema import Recipe
    from smolconv.continual_pretraining.run import trainer, worker

    document = {
        "name": "saves", "output": str(work / "run"), "model": {"source": str(work / "model"), "dtype": "float32"},
        "start": {"gate": False},
        "data": {
            "sequence_length": LENGTH, "eos_token_id": 0,
            "stages": [{"name": "only", "sources": [{"path": str(work / "tokens")}]}],
        },
        "schedule": {"train_steps": 100_000, "peak_lr": 1e-4},
        "parallelism": {
            "zero_stage": 1, "micro_batch_sequences": 1, "global_batch_sequences": 1, "threads": THREADS
        },
        "checkpoints": {"every_steps": _EVERY, "keep": 1},
    }  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    (work / "run").mkdir()
    (work / "run" / RECIPE).write_text(dump_recipe(Recipe.model_validate(document)))
    _alone()

    class Measured(trainer.Trainer):
        """Rounds of: steps alone, a synchronous save, an asynchronous save, a save by another process."""

        found: dict[str, Any] = {"alone": [], "thread": [], "process": [], "saves": []}
        phase, left, round = "alone", ALONE_STEPS, 0
        peer: Peer | None = None

        def _step(self, data: Any) -> None:
            began = time.perf_counter()
            super()._step(data)
            seconds = time.perf_counter() - began
            # What began before a write and ended behind it counts for neither.
            if self._still():
                self.found[self.phase].append(seconds)
            else:
                self._next_phase(data)

        def _still(self) -> bool:
            if self.phase == "alone":
                self.left -= 1
                return self.left >= 0
            if self.phase == "between":
                return False
            if self.phase == "thread":
                return self.under_way is not None and not self.under_way.part_ended()
            return self.peer is not None and self.peer.writes()

        def _next_phase(self, data: Any) -> None:
            if self.phase == "alone":
                self._measured_save(data, behind=False)
                self.phase = "between"  # a step, so that the next save is of another one
            elif self.phase == "between":
                self._measured_save(data, behind=True)
                self.phase = "thread"
            elif self.phase == "thread":
                if self.under_way is not None:  # the next steps publish it, as in any run
                    return
                self.peer = Peer(work, trainer.newest_checkpoint(self.run))
                self.phase = "process"
                self.peer.go()
            else:
                assert self.peer is not None
                self.found["saves"].append({"kind": "process", "seconds": self.peer.seconds()})
                self.round += 1
                if self.round == rounds:
                    lines = (self.run / "events.jsonl").read_text().splitlines()
                    kinds = ("synchronous", "asynchronous")
                    saved = [event for event in map(json.loads, lines) if event["kind"] == "saved"]
                    self.found["saves"] += [{**event, "kind": kinds[i % 2]} for i, event in enumerate(saved)]
                    (work / "found.json").write_text(json.dumps(self.found))
                    os._exit(0)
                self.phase, self.left = "alone", ALONE_STEPS

        def _measured_save(self, data: Any, *, behind: bool) -> None:
            sync()
            background = self.background
            self.background = background if behind else None
            self._save(data, must=False)
            self.background = background

    trainer.Trainer = Measured  # type: ignore[misc]
    worker.run_rank(work / "run", "never")


class Peer:
    """A process that has read a checkpoint and writes it again, when it is told to."""

    def __init__(self, work: Path, checkpoint: Path) -> None:
        words = [sys.executable, __file__, "--control", str(checkpoint), str(work)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def writes(self) -> bool:
        return self._process.poll() is None

    def seconds(self) -> float:
        assert self._process.stdout is not None
        return float(self._process.stdout.read())


def write_again(checkpoint: Path, work: Path) -> None:
    """What the saving thread does with DeepSpeed's files, in a process of its own."""
    from smolconv.layouts.deepspeed.checkpoint_engine import deepspeed_classes, load_torch_archive, save_torch_archive

    content = {path.name: load_torch_archive(path, deepspeed_classes()) for path in sorted(checkpoint.glob("*.pt"))}
    sync()
    print("ready", flush=True)
    sys.stdin.read()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for name, each in content.items():
            save_torch_archive(each, Path(folder) / name)
        print(time.perf_counter() - began, flush=True)
    os._exit(0)


# --- what it means ----------------------------------------------------------------------------------------------------


def report(found: dict[str, Any], machine: Sequence[str], disk: str) -> tuple[list[str], bool]:
    """The page, and whether training stops for less than the limit."""
    saves = {
        kind: [save for save in found["saves"] if save["kind"] == kind]
        for kind in ("synchronous", "asynchronous", "process")
    }
    stalls = {kind: [save["stall_seconds"] for save in saves[kind]] for kind in ("synchronous", "asynchronous")}
    writes = {kind: [save["write_seconds"] for save in saves[kind]] for kind in ("synchronous", "asynchronous")}
    ratios = [behind / waited for behind, waited in zip(stalls["asynchronous"], stalls["synchronous"])]
    size = saves["asynchronous"][0]["bytes"]
    lines = [
        "# Saves",
        "",
        "`python benchmarks/saves.py` writes this page. One rank trains SmolLM2-135M's shapes in fp32 (random weights,",
        f"{LENGTH} tokens a step: they are short); a checkpoint has {size / 1e9:.2f} GB of weights, masters and Adam's",
        f"moments. Training has {THREADS} thread. Each round has all kinds of saves in turn, on {disk}.",
        "",
        *[f"- {line}" for line in machine],
        "",
        "Medians, then least..most. Seconds of one save:",
        "",
        *markdown_table(
            ["save", "training stops", "published after", "saves"],
            [
                [kind, spread(stalls[kind]), spread(writes[kind]), str(len(stalls[kind]))]
                for kind in ("synchronous", "asynchronous")
            ],
        ),
        "",
        f"An asynchronous save stops training for {spread([100 * ratio for ratio in ratios], 0)} % of the time of the",
        "synchronous one before it. The first asynchronous save also gets its memory from the kernel: "
        f"{stalls['asynchronous'][0]:.2f} s.",
        "",
        "Seconds of one step:",
        "",
        *markdown_table(
            ["steps", "seconds", "steps timed"],
            [
                [title, spread(found[name]) if found[name] else "-", str(len(found[name]))]
                for title, name in (
                    ("alone", "alone"), ("while a thread writes the save", "thread"),
                    ("while another process writes the same bytes", "process"),
                )
            ],
        ),
        "",
        f"The other process took {spread([save['seconds'] for save in saves['process']])} s for its writes.",
        "",
    ]  # fmt: skip
    return lines, sorted(ratios)[len(ratios) // 2] < STALL_LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, help="where to make the temporary folder: the disk that is measured")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--control", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.control:
        write_again(*given.control)
    if given.train:
        train(given.train, given.rounds)
        return
    rounds = 1 if given.quick else given.rounds
    machine = machine_lines(("torch", "deepspeed"))
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        make_tokens(work / "tokens", LENGTH)
        run([sys.executable, str(Path(__file__).with_name("random_checkpoint.py")), "135m", str(work / "model")])
        say(f"{folder_bytes(work / 'model') / 1e6:.0f} MB of weights; training")
        took = run([sys.executable, __file__, "--train", str(work), "--rounds", str(rounds)])
        say(f"{took.seconds:.0f} s")
        lines, short = report(json.loads((work / "found.json").read_text()), machine, file_system(work))
    print("\n".join(lines))
    if not given.quick:
        RESULTS.write_text("\n".join(lines))
    sys.exit(0 if short else "training stops for longer than promised")


if __name__ == "__main__":
    main()
