"""Computes logits with the real DeepSpeed or nanotron, in child processes.

``--engine deepspeed`` starts one gloo process per rank of the checkpoint, and each loads it with ``load_checkpoint``.
smolconv supplies the names of parameter groups and reads the files, because DeepSpeed's reader executes pickles. Its
code for a universal folder's parameters cannot be replaced, so such a folder is first written as ZeRO-1 of one rank.
``--engine nanotron`` needs nanotron and a GPU: it was written from nanotron's source and has not run yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolconv.checkpoint import Checkpoint, for_another_engine
from smolconv.errors import BadCheckpoint, MixedCheckpoint, NotInstalled, UsageError
from smolconv.layouts.deepspeed.documents import STAND_INS
from smolconv.layouts.deepspeed.files import tag_files
from smolconv.layouts.deepspeed.groups import with_adam
from smolconv.layouts.deepspeed.listing import find_tag_folder
from smolconv.layouts.deepspeed.version import check_deepspeed
from smolconv.layouts.deepspeed.writer import DeepSpeedOptions, plan_deepspeed
from smolconv.layouts.layout import ReadOptions, hf_config
from smolconv.layouts.nanotron.listing import find_step_folder
from smolconv.processes import module_words, safe_environment
from smolconv.storage.atomic import OutputFolder, require_space
from smolconv.storage.output import write_files
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.verification.inputs import Rows

ENGINES = ("deepspeed", "nanotron")
_TIMEOUT_SECONDS = 3600.0
#: What the others get to end by themselves after a rank has failed: inside a collective they would wait for it.
_GRACE_SECONDS = 5.0
#: How the names of files end that DeepSpeed looks for in a tag folder, by patterns and by older names.
_LOADED = ("_model_states.pt", "optim_states.pt")


@contextmanager
def engine_logits(
    engine: str, checkpoint: Checkpoint, folder: Path, options: ReadOptions, rows: Rows
) -> Iterator[NDArray[np.float32]]:
    """The engine's own logits [T, V] for one row, mapped from a file that is there while the context is open.

    Raises ``NotInstalled``, ``UsageError`` for a checkpoint that the engine cannot load here, and ``BadCheckpoint``
    with the end of the engine's output if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="smolconv-engine-") as scratch:
        work = Path(scratch)
        np.save(work / "tokens.npy", rows.tokens)
        np.save(work / "positions.npy", rows.positions)
        if engine == "deepspeed":
            _run_deepspeed(checkpoint, folder, options, rows, work)
        else:
            _run_nanotron(folder, options, work)
        yield np.load(work / "logits.npy", mmap_mode="r", allow_pickle=False)


def _run_deepspeed(checkpoint: Checkpoint, folder: Path, options: ReadOptions, rows: Rows, work: Path) -> None:
    check_deepspeed("--engine deepspeed")
    topology, optimizer = checkpoint.topology, checkpoint.optimizer
    if topology.tp is not None:
        raise UsageError("--engine deepspeed: AutoTP checkpoints load only into a model sharded by AutoTP.")
    if optimizer is None:
        raise UsageError(
            f"--engine deepspeed: {folder} has no optimizer, and DeepSpeed loads nothing without its groups."
        )
    tag = find_tag_folder(folder, options.step)
    _check_files(tag)
    zero_stage, ranks = topology.zero_stage or 0, (topology.world_size or 1) if topology.zero_stage else 1
    if topology.universal:
        zero_stage, ranks = 1, 1
        tag = _as_zero1(checkpoint, work / "zero1")
    dtype = checkpoint.parameters["model.embed_tokens.weight"].dtype
    job = {
        "load_dir": str(tag.parent),
        "tag": tag.name,
        "zero_stage": zero_stage,
        "bf16": dtype == "bfloat16",
        "config": hf_config(checkpoint, dtype),
        "groups": [list(group.names) for group in optimizer.groups],
        "frozen": list(checkpoint.frozen),
    }
    (work / "job.json").write_text(json.dumps(job))
    commands = [
        (
            module_words("smolconv.verification.engines.deepspeed", str(work)),
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"},
        )
        for rank in range(ranks)
    ]
    _run_all(commands, work)


def _check_files(tag: Path) -> None:
    """Check every file that a rank will load, before any rank starts.

    Raises ``MixedCheckpoint`` if a rank has two files: DeepSpeed might load another one than ``read_deepspeed`` read.
    """
    files = tag_files(tag)
    ours = {*files.models.values(), *files.optimizers.values()}
    twice = sorted(path for path in tag.iterdir() if path.name.endswith(_LOADED) and path not in ours)
    if twice:
        raise MixedCheckpoint(
            f"{tag.name} holds {twice[0].name}, a second file of a rank that has one.\n"
            f"DeepSpeed would load it ({twice[0]}); expected one file per rank and kind.\n"
            "Keep the one that belongs to this checkpoint, and move the other away."
        )
    for path in sorted(ours):
        read_torch_archive(path, allow=STAND_INS)


def _as_zero1(checkpoint: Checkpoint, target: Path) -> Path:
    """Write the checkpoint for ZeRO-1 with one rank, 16 bytes per parameter; returns the tag folder."""
    written = plan_deepspeed(
        with_adam(for_another_engine(checkpoint), groups=None, zero_stage=1),
        DeepSpeedOptions(zero_stage=1, world_size=1),
    )
    require_space(target, sum(file.size for file in written.files))
    with OutputFolder(target, "", resume=False, overwrite=False, loses=lambda _: None) as folder:
        found = write_files(written.files, folder.partial, folder, workers=1, digest="none")
        for path, make in written.late.items():
            folder.write(path, make(found))
        folder.publish()
    return find_tag_folder(target)


def _run_nanotron(folder: Path, options: ReadOptions, work: Path) -> None:
    if find_spec("nanotron") is None:
        raise NotInstalled("--engine nanotron needs nanotron: pip install nanotron.")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--engine nanotron needs a GPU: nanotron's attention is a CUDA kernel.")
    (work / "job.json").write_text(json.dumps({"step_folder": str(find_step_folder(folder, options.step))}))
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29531",
    }
    _run_all([(module_words("smolconv.verification.engines.nanotron", str(work)), environment)], work)


def _run_all(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], work: Path) -> None:
    """Start every rank and wait until all have ended.

    Raises ``BadCheckpoint`` with the last lines of the rank that failed first, or of one that did not end in time.
    """
    logs = [work / f"rank-{rank}.log" for rank in range(len(commands))]
    processes: list[subprocess.Popen[Any]] = []
    try:
        for (command, environment), path in zip(commands, logs):
            with path.open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        env=safe_environment({**os.environ, **environment}),
                    )
                )
        failed, running = _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if failed is not None:
        raise BadCheckpoint(f"rank {failed} of {len(commands)} of the engine failed:\n{_last_lines(logs[failed])}")
    if running:
        raise BadCheckpoint(
            f"rank {running[0]} of {len(commands)} of the engine has not ended after {_TIMEOUT_SECONDS:,.0f} s, and "
            f"was killed.\nOmit --engine to compare without it. Its last lines:\n{_last_lines(logs[running[0]])}"
        )


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> tuple[int | None, list[int]]:
    """The rank that failed first, if one did, and those that have not ended in time."""
    deadline, failed = time.monotonic() + _TIMEOUT_SECONDS, None
    while True:
        codes = [process.poll() for process in processes]
        running = [rank for rank, code in enumerate(codes) if code is None]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if not running or time.monotonic() >= deadline:
            return failed, running
        time.sleep(0.1)


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-6:])
