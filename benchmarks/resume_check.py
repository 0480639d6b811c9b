"""Measure what a resume reads before it trains: the digests of a ZeRO-2 checkpoint at the shapes of SmolLM2-135M.

    python benchmarks/resume_check.py                prints a table
    python benchmarks/resume_check.py --ranks 4 --rounds 5

Random weights are written as the trainer saves them: bf16 weights, fp32 masters and moments, 14 bytes a parameter. The
check is timed from the page cache, and once with these files dropped from it. Saving with digests is timed beside
``torch.save``, and our reader beside ``torch.load``. Seconds are those of the fastest round.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import machine_lines, markdown_table, run

from smolconv.continual_pretraining.run.checkpoint_files import (
    compare_states,
    examine,
    problem_in,
    random_file,
    share_of,
    write_manifest,
)
from smolconv.continual_pretraining.run.checkpoints import RunState
from smolconv.conversion import ConvertOptions, plan_conversion, run_conversion
from smolconv.layouts.deepspeed.checkpoint_engine import digest_file, load_torch_archive, save_torch_archive
from smolconv.layouts.deepspeed.documents import STAND_INS

SCRIPT = Path(__file__).with_name("random_checkpoint.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = written(Path(scratch), given.ranks)
        files = [path for path in folder.rglob("*") if path.is_file()]
        nbytes = sum(path.stat().st_size for path in files)
        rows = [
            ("resume check, from the page cache", best(given.rounds, lambda: check(folder, given.ranks)), nbytes),
            ("resume check, from the disk", cold(folder, files, given.ranks), nbytes),
        ]
        largest = max(files, key=lambda path: path.stat().st_size)
        state = load_torch_archive(largest, STAND_INS)["optimizer_state_dict"]
        content = {name: state[name] for name in ("single_partition_of_fp32_groups", "base_optimizer_state")}
        target, size = Path(scratch) / "saved.pt", largest.stat().st_size
        rows += [
            ("one rank's file: torch.save and fsync", best(given.rounds, lambda: plain(content, target)), size),
            ("the same with its digest", best(given.rounds, lambda: save_torch_archive(content, target)), size),
            ("torch.load", best(given.rounds, lambda: torch.load(target, weights_only=True)), size),
            ("read by the allow-list", best(given.rounds, lambda: load_torch_archive(target)), size),
        ]
    lines = [f"- {line}" for line in machine_lines(["torch", "xxhash"])]
    table = [
        (name, f"{size / 1e9:.2f}", f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}") for name, seconds, size in rows
    ]
    print("\n".join([*lines, "", *markdown_table((f"{given.ranks} ranks", "GB", "seconds", "GB/s"), table)]))


def written(scratch: Path, ranks: int) -> Path:
    """``step-1`` of a run, as the trainer would have saved it."""
    run([sys.executable, str(SCRIPT), "135m", str(scratch / "model")], {})
    plan = plan_conversion(
        scratch / "model", scratch / "deepspeed", ConvertOptions(to="deepspeed", zero_stage=2, world_size=ranks)
    )
    run_conversion(plan)
    folder = scratch / "checkpoints" / "step-0"
    folder.parent.mkdir()
    (scratch / "deepspeed" / (scratch / "deepspeed" / "latest").read_text()).rename(folder)
    (scratch / "deepspeed" / "config.json").rename(folder / "config.json")
    state = RunState(
        step=0, position={}, zero_stage=2, world_size=ranks, dtype="bfloat16", micro_batch_sequences=1,
        global_batch_sequences=ranks, spikes={},
    )  # fmt: skip
    state.write(folder)
    (folder / "random").mkdir()
    for rank in range(ranks):
        save_torch_archive({"cpu": torch.get_rng_state()}, folder / random_file(rank))
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, 0, "random", {name: digest_file(folder / name) for name in names})
    return folder


def check(folder: Path, ranks: int) -> None:
    """What all ranks do before they train; threads in the place of processes, which wait for nothing but each other."""
    contents = examine(folder)
    with ThreadPoolExecutor(ranks) as pool:
        shares = [share_of(contents, rank, ranks) for rank in range(ranks)]
        assert list(pool.map(lambda names: problem_in(contents, names), shares)) == [None] * ranks
    compare_states(contents)


def cold(folder: Path, files: list[Path], ranks: int) -> float:
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return best(1, lambda: check(folder, ranks))


def plain(content: object, path: Path) -> None:
    torch.save(content, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def best(rounds: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest round."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    main()
