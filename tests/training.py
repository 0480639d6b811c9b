"""Recipes and runs for tests: tiny models, token files of random documents, the worker as launchers start it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smolconv.continual_pretraining.recipe.schema import Recipe

EOS = 0
#: Of the tiny oracles' vocabularies.
VOCABULARY = 256


def token_folder(
    folder: Path,
    *,
    documents: int = 200,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
    lengths: tuple[int, int] = (3, 40),
) -> Path:
    """Random documents in datatrove's files; each ends in the EOS, which is nowhere else."""
    draw = np.random.default_rng(seed)
    parts = [np.append(draw.integers(1, vocabulary, draw.integers(*lengths)), EOS) for _ in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    tokens, ends = np.concatenate(parts), np.cumsum([len(part) for part in parts])
    tokens.astype("<u2").tofile(folder / "00000_unshuffled.ds")
    ends.astype("<u8").tofile(folder / "00000_unshuffled.ds.index")
    (folder / "00000_unshuffled.ds.metadata").write_text(f"tests/random|2\n{len(tokens)}\n{len(tokens)} T")
    return folder


def recipe_document(source: Path, tokens: Path | Sequence[Path], **changes: Any) -> dict[str, Any]:
    """A recipe for a few steps on CPU; ``changes`` are sections, merged into it at any depth."""
    folders = [tokens] if isinstance(tokens, Path) else list(tokens)
    document: dict[str, Any] = {
        "name": "test",
        "model": {"source": str(source), "dtype": "float32"},
        "data": {
            "sequence_length": 32, "eos_token_id": EOS,
            "stages": [{"name": "only", "sources": [{"path": str(folder)} for folder in folders]}],
        },
        "schedule": {"train_steps": 4, "peak_lr": 1e-3, "warmup_steps": 2},
        "parallelism": {"zero_stage": 1, "micro_batch_sequences": 1, "global_batch_sequences": 4, "threads": 1},
        "checkpoints": {"every_steps": 1000},
    }  # fmt: skip
    return _merged(document, changes)


def recipe(source: Path, tokens: Path | Sequence[Path], **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe_document(source, tokens, **changes))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        below = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if below else value
    return result


class Ranks:
    """The worker processes of one run, started as a launcher would; for tests that look at the worker alone."""

    def __init__(self, document: Mapping[str, Any], run: Path, world_size: int, resume: str = "auto") -> None:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(dict(document)))
        (run / "logs").mkdir(exist_ok=True)
        for old in (run / "logs").glob("failure-*.json"):
            old.unlink()
        self.run, port = run, _free_port()
        self.processes = []
        for rank in range(world_size):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            }  # fmt: skip
            with (run / "logs" / f"rank-{rank:05d}.log").open("wb") as log:
                command = [
                    sys.executable,
                    "-m",
                    "smolconv.continual_pretraining.run.worker",
                    str(run),
                    "--resume",
                    resume,
                ]
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def wait(self, seconds: float = 240) -> int:
        """0, or the exit code of the first rank that failed; the others are ended then, as a launcher does."""
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                codes = [process.poll() for process in self.processes]
                failed = [code for code in codes if code]
                if all(code is not None for code in codes):
                    return failed[0] if failed else 0
                if failed:
                    # The others end by themselves when they agreed on it; a lone failure leaves them waiting.
                    time.sleep(2)
                    return failed[0]
                time.sleep(0.02)
            raise TimeoutError(self.log())
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                process.wait()

    def log(self) -> str:
        return "\n".join(
            path.read_text(errors="replace")[-3000:] for path in sorted((self.run / "logs").glob("rank-*"))
        )

    def failure(self) -> dict[str, Any]:
        path = min((self.run / "logs").glob("failure-rank-*.json"))
        return json.loads(path.read_text())


def train(document: Mapping[str, Any], run: Path, world_size: int = 1, resume: str = "auto") -> list[dict[str, Any]]:
    """Run to the end; the lines of metrics.jsonl."""
    ranks = Ranks(document, run, world_size, resume)
    code = ranks.wait()
    assert code == 0, ranks.log()
    return metrics(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
