"""What only a GPU can show, unattended, in eight minutes on one: ``make gpu-check``.

Kernels and steps beside the CPU's, Liger and an export after it, speed and memory beside Hugging Face's Trainer and our
own estimate, and the wait for a save, each with its tolerance and verdict. Weights and tokens are random; no network is
needed. Everything that computes runs in a process of its own (``gpu_jobs.py``, and the worker), and every part has a
limit of time: what fails leaves the rest. The results, gpu.md and gpu.json, are rewritten with every line.

``--dry-run`` goes through all parts on a CPU with toy models. It shows that the check works, and nothing of a GPU.

Exit codes: 0 everything that ran was met, 1 something was not, 5 there is no GPU (nothing is written then).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from common import REPOSITORY, kill_group, machine_lines
from gpu_report import (
    Line,
    Part,
    Report,
    Speed,
    at_least,
    memory_as_estimated,
    same_losses,
    speed_as_estimated,
    within,
)
from random_checkpoint import CONFIGS

from smolconv.continual_pretraining.estimate.estimate import estimate
from smolconv.continual_pretraining.estimate.flops import flops_per_token
from smolconv.continual_pretraining.estimate.hardware import peak_flops
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.recipe.schema import Checkpoints, Model, Recipe
from smolconv.models.huggingface import spec_from_hf
from smolconv.models.spec import ModelSpec

NO_GPU = 5
JOBS = Path(__file__).with_name("gpu_jobs.py")
#: The part of the estimate that torch's allocator does not see.
OUTSIDE_ALLOCATOR = "CUDA and NCCL"
EOS = 0

# Tolerances. None was measured on a GPU; how each was set:
#: A document's root mean square error by that of its values. Flash attention's roundings (probabilities, their
#: gradients and the output in bfloat16), imitated on a CPU, gave 0.0064 at most; a leak gives about 1.
ATTENTION = {"bfloat16": 2e-2, "float32": 1e-4}
#: Of the mean, in nats; bfloat16 beside float32 on a CPU: 1e-4.
MODEL_LOSS = {"bfloat16": 1e-2, "float32": 1e-5}
#: As ``ATTENTION``, of the worst parameter; bfloat16 beside float32 on a CPU: 0.013.
MODEL_GRADIENTS = {"bfloat16": 5e-2, "float32": 1e-3}
#: Of a step's loss, in nats. bfloat16 is that of the start gate.
STEP_LOSS = {"bfloat16": 2e-2, "float32": 1e-4}
#: Of the bytes that a long document's scores in float32 would take. Queries, keys, values, the output and their
#: gradients are 0.2 of them, counted; a kernel that writes scores takes 1 at least.
SCORES = 0.5
ASSUMED_MFU = 0.3
#: Of the peak memory of long rows, the MLP by tiles beside the whole. The estimate says 0.88 at 32k, 0.78 at 64k.
TILES = 0.95
#: Of the wait for an asynchronous save, by that for a synchronous one.
STALL = 0.2

FORMULAS: tuple[Literal["6N", "nanotron"], ...] = ("6N", "nanotron")
#: Every way to compute attention, and in which dtype.
KERNELS = (("flash", "bfloat16"), ("varlen", "bfloat16"), ("documents", "bfloat16"), ("documents", "float32"))

#: What the worker runs: dtype and ZeRO stage.
WORKER_RUNS = (("bfloat16", 1), ("float32", 0))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model whose speed and memory are measured, and how."""

    name: str
    config: Mapping[str, Any]
    sequence_length: int
    options: Mapping[str, Any] = field(default_factory=dict)  #: of the recipe's model, in every run
    micro_batches: tuple[int, ...] = (8, 4, 2, 1)  #: the first that fits is taken
    accumulation: int = 2
    steps: int = 16
    warmup_steps: int = 6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. The tests and the dry run have smaller ones."""

    heads: tuple[tuple[int, int], ...] = ((9, 3), (16, 4))  #: the 135M's and SmolLM3's: groups of 3 and of 4
    head_sizes: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (64, 1, 2048, 3, 511, 2, 1024, 17, 129)
    long_length: int = 8192
    tiny: tuple[Mapping[str, Any], ...] = ()
    tiny_lengths: tuple[int, ...] = (64, 1, 500, 3, 211, 2, 17)
    tiny_steps: int = 20
    tiny_sequence: int = 128
    cpu_threads: int = 4  #: of a run on the CPU
    models: tuple[Measured, ...] = ()
    long: tuple[Measured, ...] = ()  #: what a rank of a long-context run holds
    save_every_steps: int = 5


def _tiny(architecture: str, **fields: Any) -> Mapping[str, Any]:
    return {
        "model_type": architecture, "vocab_size": 512, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": True, "bos_token_id": EOS, "eos_token_id": EOS,
        "num_hidden_layers": 4, **fields,
    }  # fmt: skip


_SMOLLM3 = {**CONFIGS["3b"], "num_hidden_layers": 8}
GPU_SIZES = Sizes(
    tiny=(
        _tiny("llama", hidden_size=576, intermediate_size=768, num_attention_heads=9, num_key_value_heads=3),
        _tiny("smollm3", hidden_size=1024, intermediate_size=1024, num_attention_heads=16, num_key_value_heads=4,
              no_rope_layer_interval=4),
    ),
    models=(
        Measured(name="SmolLM2-135M", config=CONFIGS["135m"], sequence_length=2048),
        Measured(name="SmolLM3 of 8 layers", config=_SMOLLM3, sequence_length=4096),
    ),
    long=tuple(
        Measured(
            name=f"SmolLM3 of 8 layers at {length // 1024}k", config={**_SMOLLM3, "max_position_embeddings": length},
            sequence_length=length, options={"activation_checkpointing": True}, micro_batches=(1,), accumulation=1,
            steps=6, warmup_steps=2,
        )
        for length in (32768, 65536)
    ),
)  # fmt: skip

_TOY = _tiny(
    "llama", num_hidden_layers=2, hidden_size=48, intermediate_size=32, num_attention_heads=6, num_key_value_heads=2
)  # fmt: skip
#: How much longer everything may take in a dry run, whose machine may have two cores.
DRY_PATIENCE = 5
DRY_SIZES = Sizes(
    heads=((3, 1), (4, 2)), head_sizes=(8,), lengths=(5, 1, 33, 2), long_length=64,
    tiny=(
        _TOY,
        _tiny("smollm3", hidden_size=64, intermediate_size=32, num_attention_heads=8, num_key_value_heads=2,
              no_rope_layer_interval=4),
    ),
    tiny_lengths=(20, 1, 30, 13), tiny_sequence=32, cpu_threads=1,
    models=(
        Measured(name="toy", config=_TOY, sequence_length=64, micro_batches=(2, 1), steps=4, warmup_steps=2),
    ),
    long=(
        Measured(
            name="toy at 256", config=_TOY, sequence_length=256, options={"activation_checkpointing": True},
            micro_batches=(1,), accumulation=1, steps=4, warmup_steps=2,
        ),
    ),
    save_every_steps=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Time that is left of what was allowed."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    began: float = field(default=-1.0)

    def __post_init__(self) -> None:
        if self.began < 0:
            object.__setattr__(self, "began", self.clock())

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.began)

    def part(self, seconds: float) -> Budget:
        """``seconds`` of what is left, from now."""
        return Budget(seconds=min(seconds, self.left), clock=self.clock)


class Failed(Exception):
    """A process that gave no result, with the reason for people."""


class OutOfTime(Failed):
    """There was not, or no longer, enough time for it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where everything runs, and what is known of it."""

    device: Literal["cuda", "cpu"]
    budget: Budget
    work: Path
    sizes: Sizes
    gpu: str | None = None
    gpu_bytes: int = 80_000_000_000
    unable: Mapping[str, str] = field(default_factory=dict)  #: kernels that cannot run here, and why
    dry_run: bool = False  #: on a CPU, where speed and memory are shown and not judged
    waiting: list[tuple[subprocess.Popen[bytes], Path]] = field(default_factory=list)  #: for their jobs

    @property
    def peak(self) -> float | None:
        """FLOP/s of the GPU in dense bf16."""
        return peak_flops(self.gpu)

    def job(self, name: str, seconds: float, **given: Any) -> dict[str, Any]:
        """What a job of ``gpu_jobs.py`` finds, which is expected to take ``seconds``. Raises ``Failed``.

        The next job's process is started with it, since imports take as long as many a job.
        """
        self._ask_for(seconds)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.work))
        paper, result = folder / "job.json", folder / "result.json"
        paper.write_text(json.dumps({"job": name, "result": str(result), **given}))
        command = [sys.executable, str(JOBS)]
        process, log = self.waiting.pop() if self.waiting else self._start(command, True)
        if name != "machine":  # after which there may be nothing to do
            self.waiting.append(self._start([*command, "--ahead"], True))
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has died; its log says of what
            process.stdin.write(f"{paper}\n".encode())
            process.stdin.close()
        code, said = self._ends([(process, log)], seconds)[0]
        if not result.is_file():
            raise Failed(f"{name} ended with {code}: {said}")
        document = json.loads(result.read_text())
        if "error" in document:
            raise Failed(f"{document['error']}: {document['message']}".partition("\n")[0])
        found: dict[str, Any] = document["found"]
        return found

    def processes(self, commands: Sequence[tuple[Sequence[str], bool]], seconds: float) -> list[tuple[int, str]]:
        """Run them beside each other, each on the device or on the CPU: exit codes, and their last lines.

        Raises ``OutOfTime``.
        """
        self._ask_for(seconds)
        running: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for command, on_device in commands:
                running.append(self._start(command, on_device))
        except OSError:
            _end(running)
            raise
        return self._ends(running, seconds)

    def close(self) -> None:
        """End what waits for a job that does not come."""
        _end(self.waiting)
        self.waiting.clear()

    def _ask_for(self, seconds: float) -> None:
        if self.budget.left < seconds:
            raise OutOfTime(f"{max(self.budget.left, 0):.0f} s are left, and it takes about {seconds:.0f} s")

    def _start(self, command: Sequence[str], on_device: bool) -> tuple[subprocess.Popen[bytes], Path]:
        descriptor, name = tempfile.mkstemp(suffix=".log", dir=self.work)
        with os.fdopen(descriptor, "wb") as log:
            process = subprocess.Popen(
                command, env=_environment(self.device if on_device else "cpu"), stdin=subprocess.PIPE, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        return process, Path(name)

    def _ends(self, running: Sequence[tuple[subprocess.Popen[bytes], Path]], seconds: float) -> list[tuple[int, str]]:
        # A first import from a cold disk takes its time.
        patience, left = (2 * seconds + 60) * (DRY_PATIENCE if self.dry_run else 1), self.budget.left
        deadline = time.monotonic() + min(patience, left)
        try:
            for process, _ in running:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            if left < patience:
                late = "it had not ended when the time of this part was over"
                raise OutOfTime(f"{late}; it last said: {_last_line(running[0][1])}") from None
            raise Failed(f"it had not ended after {patience:.0f} s") from None
        finally:
            _end(running)
        return [(process.returncode, _last_line(log)) for process, log in running]


def _end(running: Sequence[tuple[subprocess.Popen[bytes], Path]]) -> None:
    for process, _ in running:
        if process.poll() is None:
            kill_group(process)
            process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()


def _environment(device: str) -> dict[str, str]:
    """Of a run of one rank, which sees one GPU or none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] if device == "cuda" else ""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ, "CUDA_VISIBLE_DEVICES": visible, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip


def _last_line(log: Path) -> str:
    """The last that it said; of an error with advice after it, what happened."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if re.match(r"[A-Z]\w+: ", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def failed(claim: str, error: Failed) -> Line:
    """What ran out of time was not tried; everything else that gave no result did not do what was claimed."""
    return Line(claim=claim, found=str(error), verdict="skipped" if isinstance(error, OutOfTime) else "not met")


def skipped(claim: str, why: str) -> Line:
    return Line(claim=claim, found=why, verdict="skipped")


def absent(place: Place, claim: str, kernel: str) -> Line:
    """What is not installed, or what a CPU cannot run."""
    why = place.unable[kernel]
    return replace(skipped(claim, why), verdict="needs a GPU") if place.dry_run else skipped(claim, why)


def of_gpu(place: Place, line: Line) -> Line:
    """Speed and memory: those of a CPU say nothing."""
    return replace(line, found="it ran here, on a CPU", limit="", verdict="needs a GPU") if place.dry_run else line


# --- 1. attention -----------------------------------------------------------------------------------------------------


def attention(place: Place) -> Iterator[Line]:
    """Every kernel beside each document alone in float64, then whole models, and the leak test."""
    sizes = place.sizes
    shapes = [(heads, kv_heads, size) for heads, kv_heads in sizes.heads for size in sizes.head_sizes]
    for kernel, dtype in KERNELS:
        claim = f"{kernel}, {dtype}"
        if kernel in place.unable:
            yield absent(place, claim, kernel)
            continue
        stand_in = place.dry_run and kernel == "varlen"
        if stand_in:
            claim += ", a stand-in for the kernel"
        try:
            found = place.job(
                "kernel_errors", 20, kernel=kernel, dtype=dtype, shapes=shapes, lengths=sizes.lengths,
                configs=sizes.tiny, config_lengths=sizes.tiny_lengths, device=place.device, stand_in=stand_in,
            )  # fmt: skip
        except Failed as error:
            yield failed(claim, error)
            continue
        for (heads, kv_heads, size), errors in zip(shapes, found["attention"]):
            of_shape = f"{claim}: {heads} heads in groups of {heads // kv_heads}, head size {size}"
            yield _attention_line(of_shape, errors, ATTENTION[dtype])
        for config, errors in zip(sizes.tiny, found["models"]):
            yield from _model_lines(f"{config['model_type']}, {claim}", errors, dtype)
    yield from _long_document(place)


def _long_document(place: Place) -> Iterator[Line]:
    """What writes no scores in 16 bits may write them in float32."""
    length, (heads, kv_heads), head_size = place.sizes.long_length, place.sizes.heads[-1], place.sizes.head_sizes[-1]
    claims = [f"{what}, float32: memory of a document of {length}" for what in ("documents", "the start gate's source")]
    try:
        source, _ = tiny_source(place)
        found = place.job(
            "long_document", 15, heads=heads, kv_heads=kv_heads, head_size=head_size, length=length,
            folder=str(source), device=place.device,
        )  # fmt: skip
    except Failed as error:
        yield from (failed(claim, error) for claim in claims)
        return
    taken = {"attention": heads, "source": place.sizes.tiny[0]["num_attention_heads"]}
    for claim, (name, of) in zip(claims, taken.items()):
        yield of_gpu(place, within(claim, found[name] / (4 * of * length**2), SCORES, unit=" of its scores"))


def _attention_line(claim: str, errors: Mapping[str, Any], limit: float) -> Line:
    if "error" in errors:
        return failed(claim, Failed(errors["error"]))
    worst = max(errors, key=lambda name: errors[name])
    line = within(claim, errors[worst], limit)
    return replace(line, found=f"{line.found} ({worst})")


def _model_lines(claim: str, found: Mapping[str, Any], dtype: str) -> Iterator[Line]:
    if "error" in found:
        yield failed(claim, Failed(found["error"]))
        return
    yield within(f"{claim}: packed loss", found["loss"], MODEL_LOSS[dtype])
    yield within(f"{claim}: gradients", found["gradients"], MODEL_GRADIENTS[dtype])
    leak = found["leak"]
    yield Line(claim=f"{claim}: leak test", found=leak or "passed", verdict="not met" if leak else "met")


# --- 2. steps ---------------------------------------------------------------------------------------------------------


def steps(place: Place) -> Iterator[Line]:
    """The worker's own runs from one checkpoint, on the device and on the CPU."""
    claims = [f"ZeRO-{stage}, {dtype}: losses of the worker's steps" for dtype, stage in WORKER_RUNS]
    try:
        source, tokens = tiny_source(place)
        runs = {
            (dtype, device): worker_run(
                tiny_document(place, source, tokens, dtype=dtype, zero_stage=stage), place.work / f"{dtype} on {device}"
            )
            for dtype, stage in WORKER_RUNS
            for device in (place.device, "the CPU")
        }
        ends: dict[tuple[str, str], tuple[int, str]] = {}
        # All on the CPU at once, but one after the other on the GPU, which may be one that takes a single process.
        first = WORKER_RUNS[0][0]
        for some in (
            [run for run in runs if run[1] == "the CPU" or run[0] == first],
            *([run] for run in runs if run[1] != "the CPU" and run[0] != first),
        ):
            commands = [(worker_command(runs[run]), run[1] == place.device) for run in some]
            ends |= zip(some, place.processes(commands, 30))
    except Failed as error:
        yield from (failed(claim, error) for claim in claims)
        return
    for (dtype, _), claim in zip(WORKER_RUNS, claims):
        both = {device: ends[dtype, device] for device in (place.device, "the CPU")}
        broken = [f"on {device}: {said}" for device, (code, said) in both.items() if code]
        if broken:
            yield failed(claim, Failed("; ".join(broken)))
        else:
            found, expected = (losses(runs[dtype, device]) for device in both)
            yield same_losses(claim, found, expected, STEP_LOSS[dtype])


def tiny_source(place: Place) -> tuple[Path, Path]:
    """The first of the tiny models as a Hugging Face folder, and tokens for it; made when first asked for."""
    source, tokens, config = place.work / "tiny", place.work / "tiny-tokens", place.sizes.tiny[0]
    if not tokens.is_dir():
        token_folder(tokens, config["vocab_size"], 40_000, longest=place.sizes.tiny_sequence // 2)
    if not source.is_dir():
        place.job("tiny_checkpoint", 8, config=config, folder=str(source))
    return source, tokens


def tiny_document(place: Place, source: Path, tokens: Path, **fields: Any) -> dict[str, Any]:
    return recipe_document(
        str(source), tokens, place.sizes.tiny_sequence, place.sizes.tiny_steps, micro_batch=1, accumulation=4,
        peak_lr=3e-3, threads=place.sizes.cpu_threads, **fields,
    )  # fmt: skip


def worker_command(run: Path) -> list[str]:
    return [sys.executable, "-m", "smolconv.continual_pretraining.run.worker", str(run)]


def worker_run(document: Mapping[str, Any], folder: Path) -> Path:
    """A run's folder, as the worker expects it."""
    (folder / "logs").mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(dict(document)))
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def token_folder(folder: Path, vocabulary: int, tokens: int, *, longest: int) -> Path:
    """Random documents of 1 to ``longest`` tokens in datatrove's files; a few tokens are frequent.

    Returns the file of tokens.
    """
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, longest + 1, 2 * tokens // longest + 1)
    ends = np.cumsum(lengths)
    ids = np.exp(draw.random(int(ends[-1])) * math.log(vocabulary - 1)).astype(np.int64).clip(1, vocabulary - 1)
    ids[ends - 1] = EOS
    size = 4 if vocabulary > 65536 else 2
    folder.mkdir(parents=True)
    path = folder / "00000_unshuffled.ds"
    ids.astype(f"<u{size}").tofile(path)
    ends.astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"random|{size}\n{len(ids)}\n{len(ids)} T")
    return path


def recipe_document(
    source: str, tokens: Path, sequence_length: int, train_steps: int, *, micro_batch: int, accumulation: int,
    dtype: str = "bfloat16", zero_stage: int = 1, peak_lr: float = 1e-4, threads: int | None = None, **model: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "name": "gpu-check",
        "model": {"source": source, "dtype": dtype, "liger": "off", **model},
        "data": {
            "sequence_length": sequence_length, "eos_token_id": EOS,
            "stages": [{"name": "random", "sources": [{"path": str(tokens)}]}],
        },
        "schedule": {"train_steps": train_steps, "peak_lr": peak_lr},
        "parallelism": {
            "zero_stage": zero_stage, "micro_batch_sequences": micro_batch,
            "global_batch_sequences": micro_batch * accumulation, "threads": threads,
        },
        "checkpoints": {"every_steps": 100_000},
    }  # fmt: skip


# --- 3 to 8. speed and memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A measured model with its data and the micro-batch that fits."""

    model: Measured
    tokens: Path  #: the file
    micro_batch: int

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def spec(self) -> ModelSpec:
        return spec_from_hf(self.model.config)

    @property
    def batch(self) -> str:
        return f"{self.model.accumulation} x {self.micro_batch} x {self.model.sequence_length}"

    @property
    def flops(self) -> dict[str, float]:
        """Of a token, by formula."""
        return {name: flops_per_token(self.spec, self.model.sequence_length, name) for name in FORMULAS}

    def recipe(self, **options: Any) -> dict[str, Any]:
        given = self.model
        return recipe_document(
            "-", self.tokens.parent, given.sequence_length, given.steps, micro_batch=self.micro_batch,
            accumulation=given.accumulation, threads=1, **{**given.options, **options},
        )  # fmt: skip


def subject(place: Place, model: Measured) -> Subject:
    """The largest micro-batch that the estimate gives seven tenths of the memory: Trainer takes more than we do."""
    spec, path = spec_from_hf(model.config), place.work / f"tokens of {model.name}" / "00000_unshuffled.ds"
    for micro_batch in model.micro_batches:
        found = Subject(model=model, tokens=path, micro_batch=micro_batch)
        if sum(part.bytes for part in memory_parts(_checked(found.recipe()), spec, 1)) < 0.7 * place.gpu_bytes:
            break
    if not path.is_file():
        wanted = model.accumulation * found.micro_batch * (model.sequence_length + 1) * model.steps
        token_folder(path.parent, spec.vocab_size, wanted, longest=model.sequence_length)
    return found


def _checked(document: Mapping[str, Any]) -> Recipe:
    return Recipe.model_validate(document)


class Speeds:
    """Measured runs by model and settings, so that none is measured twice; the rows of their table."""

    def __init__(self, place: Place) -> None:
        self.place = place  #: with the time of the part that asks
        self.rows: list[Speed] = []
        self._found: dict[tuple[str, str], dict[str, Any] | Failed] = {}

    def ours(self, given: Subject, seconds: float = 35, **model: Any) -> dict[str, Any]:
        """Raises ``Failed``, also for what has failed before; what was out of time is tried again."""
        what = ", ".join(["smolconv", *(f"{name} {_switch(value)}" for name, value in model.items())])
        return self._once(given, what, lambda: self.place.job(
            "train", seconds, document=given.recipe(**model), config=given.model.config,
            run=tempfile.mkdtemp(prefix="run-", dir=self.place.work), warmup_steps=given.model.warmup_steps,
        ))  # fmt: skip

    def trainer(self, given: Subject, seconds: float = 35) -> dict[str, Any]:
        return self._once(given, "HF Trainer", lambda: self.place.job(
            "hf_trainer", seconds, config=given.model.config, tokens=str(given.tokens),
            token_bytes=4 if given.spec.vocab_size > 65536 else 2, sequence_length=given.model.sequence_length,
            micro_batch=given.micro_batch, accumulation=given.model.accumulation, steps=given.model.steps,
            warmup_steps=given.model.warmup_steps, device=self.place.device,
            folder=tempfile.mkdtemp(prefix="trainer-", dir=self.place.work),
        ))  # fmt: skip

    def _once(self, given: Subject, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = (given.name, what)
        if key not in self._found:
            try:
                self._found[key] = found = measure()
                self.rows.append(self._row(given, what, found))
            except OutOfTime:
                raise
            except Failed as error:
                self._found[key] = error
        result = self._found[key]
        if isinstance(result, Failed):
            raise result
        return result

    def _row(self, given: Subject, what: str, found: Mapping[str, Any]) -> Speed:
        speed, peak = found["tokens_per_second"], self.place.peak
        return Speed(
            model=given.name, what=what, batch=given.batch, tokens_per_second=speed,
            mfu={name: None if peak is None else speed * each / peak for name, each in given.flops.items()},
            allocated=found["allocated"], reserved=found["reserved"],
            notes=f"attention {found['attention']}" if "attention" in found else "sdpa, documents see each other",
        )  # fmt: skip


def _switch(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def liger(place: Place, speeds: Speeds) -> Iterator[Line]:
    """An export after training with Liger's kernels; then these on and off, on the first of the models."""
    name = place.sizes.models[0].name
    claims = [f"{name}, Liger on and off: {what}" for what in ("losses of the steps", "tokens/s", "peak memory")]
    export = "an export after training with Liger, verified on the CPU"
    if "liger" in place.unable:
        yield from (absent(place, claim, "liger") for claim in (export, *claims))
        return
    try:
        given = subject(place, place.sizes.models[0])
        off, on = speeds.ours(given), speeds.ours(given, liger="on")
    except Failed as error:
        yield from (failed(claim, error) for claim in claims)
    else:
        yield same_losses(claims[0], on["losses"], off["losses"], STEP_LOSS["bfloat16"])
        yield at_least(claims[1], on["tokens_per_second"], off["tokens_per_second"], of="the speed without")
        yield within(claims[2], on["allocated"] / off["allocated"], 1.0, unit=" of that without")
    yield exported(place, export)


def exported(place: Place, claim: str, liger: str = "on") -> Line:
    """A run of the worker, whose first rank verifies what it has written with transformers, in the same process."""
    try:
        document = tiny_document(place, *tiny_source(place), liger=liger)
        run = worker_run({**document, "export": {"formats": ["hf"]}}, place.work / f"export with Liger {liger}")
        code, said = place.processes([(worker_command(run), True)], 30)[0]
    except Failed as error:
        return failed(claim, error)
    written = code == 0 and (run / "export" / "hf").is_dir()
    return Line(claim=claim, found=said, limit="exit code 0", verdict="met" if written else "not met")


def speed(place: Place, speeds: Speeds) -> Iterator[Line]:
    """Each model beside the estimate."""
    for model in place.sizes.models:
        yield from _beside_estimate(place, speeds, subject(place, model))


def long_context(place: Place, speeds: Speeds) -> Iterator[Line]:
    """Memory of long rows beside the estimate, and what computing the MLP by tiles saves of it."""
    for model in place.sizes.long:
        given = subject(place, model)
        yield _memory_line(place, speeds, given)
        claim = f"{given.name}: peak memory with the MLP by tiles"
        if "tiled_mlp" not in Model.model_fields:
            yield skipped(claim, "this smolconv has no model.tiled_mlp")
            continue
        try:
            off, on = speeds.ours(given, tiled_mlp="off"), speeds.ours(given)
        except Failed as error:
            yield failed(claim, error)
            continue
        yield same_losses(f"{claim}: losses of the steps", on["losses"], off["losses"], STEP_LOSS["bfloat16"])
        yield of_gpu(place, within(claim, on["allocated"] / off["allocated"], TILES, unit=" of that without"))


def trainer(place: Place, speeds: Speeds) -> Iterator[Line]:
    """Each model beside Hugging Face's Trainer."""
    for model in place.sizes.models:
        given, claim = subject(place, model), f"{model.name}: tokens/s beside HF Trainer's"
        try:
            line = at_least(
                claim, speeds.ours(given)["tokens_per_second"], speeds.trainer(given)["tokens_per_second"],
                of="HF Trainer's",
            )  # fmt: skip
            yield of_gpu(place, line)
        except Failed as error:
            memory = "OutOfMemory" in str(error)
            yield skipped(claim, f"out of memory: {error}") if memory else failed(claim, error)


def compiled(place: Place, speeds: Speeds) -> Iterator[Line]:
    """torch.compile on and off."""
    first, *others = place.sizes.models
    yield from _compiled(place, speeds, subject(place, first))
    for model in others:
        yield from _compiled(place, speeds, subject(place, model))
    yield from _compiled(place, speeds, subject(place, first), activation_checkpointing=True)


def checkpointed(place: Place, speeds: Speeds) -> Iterator[Line]:
    """Activation checkpointing on and off."""
    for model in reversed(place.sizes.models):
        yield from _checkpointed(place, speeds, subject(place, model))


def _beside_estimate(place: Place, speeds: Speeds, given: Subject) -> Iterator[Line]:
    yield _memory_line(place, speeds, given)
    rate = f"{given.name}: tokens/s as estimated at {ASSUMED_MFU:.0%} MFU (6N)"
    try:
        found = speeds.ours(given)
    except Failed as error:
        yield failed(rate, error)
        return
    if place.peak is None:
        line = skipped(rate, f"{found['tokens_per_second']:,.0f}; the peak FLOP/s of {place.gpu} is not known")
        yield of_gpu(place, line)
        return
    document = given.recipe()
    document["logging"] = {"peak_tflops": place.peak / 1e12}
    expected = estimate(_checked(document), given.spec, 1, mfu=ASSUMED_MFU).tokens_per_second
    assert expected is not None  # on a GPU
    yield of_gpu(place, speed_as_estimated(rate, found["tokens_per_second"], expected))


def _memory_line(place: Place, speeds: Speeds, given: Subject) -> Line:
    claim = f"{given.name}: peak memory as estimated"
    try:
        found = speeds.ours(given)
    except Failed as error:
        return failed(claim, error)
    return of_gpu(place, memory_as_estimated(claim, found["allocated"], _estimated_bytes(given.recipe(), given.spec)))


def _estimated_bytes(document: Mapping[str, Any], spec: ModelSpec) -> int:
    """What the allocator should hold at its fullest."""
    parts = memory_parts(_checked(document), spec, 1)
    return sum(part.bytes for part in parts if part.where == "gpu" and part.name != OUTSIDE_ALLOCATOR)


def _checkpointed(place: Place, speeds: Speeds, given: Subject) -> Iterator[Line]:
    claim = f"{given.name}, activation_checkpointing on"
    try:
        off, on = speeds.ours(given), speeds.ours(given, activation_checkpointing=True)
    except Failed as error:
        yield failed(claim, error)
        return
    yield same_losses(f"{claim}: losses of the steps", on["losses"], off["losses"], STEP_LOSS["bfloat16"])
    of = " of that without"
    yield of_gpu(place, within(f"{claim}: peak memory", on["allocated"] / off["allocated"], 1.0, unit=of))
    expected = _estimated_bytes(given.recipe(activation_checkpointing=True), given.spec)
    yield of_gpu(place, memory_as_estimated(f"{claim}: peak memory as estimated", on["allocated"], expected))


def _compiled(place: Place, speeds: Speeds, given: Subject, **model: Any) -> Iterator[Line]:
    """compile on, beside the same without it; ``model`` is on in both."""
    claim = ", ".join([given.name, *(f"{name} {_switch(value)}" for name, value in model.items()), "compile on"])
    try:
        off, on = speeds.ours(given, **model), speeds.ours(given, 60, **model, compile=True)
    except Failed as error:
        yield failed(claim, error)
        return
    yield same_losses(f"{claim}: losses of the steps", on["losses"], off["losses"], STEP_LOSS["bfloat16"])
    # Layers that torch leaves as they are would pass everything else.
    graphs = on["graphs"]
    yield Line(
        claim=f"{claim}: graphs", found=str(graphs), limit="at least 1", verdict="met" if graphs else "not met"
    )  # fmt: skip
    line = at_least(f"{claim}: tokens/s", on["tokens_per_second"], off["tokens_per_second"], of="the speed without")
    yield of_gpu(place, line)


# --- 9. saves ---------------------------------------------------------------------------------------------------------


def saves(place: Place) -> Iterator[Line]:
    """How long training waits for a save of the first model with its Adam state, in a run of the worker."""
    model, every = place.sizes.models[0], place.sizes.save_every_steps
    both = "asynchronous" in Checkpoints.model_fields
    claim = f"{model.name}: wait for an asynchronous save, by that for a synchronous one"
    found: dict[bool, dict[str, Any]] = {}
    try:
        given, source = subject(place, model), place.work / f"source of {model.name}"
        if not source.is_dir():
            place.job("tiny_checkpoint", 15, config=model.config, folder=str(source))
        for asynchronous in (False, True)[: 1 + both]:
            kind = "an asynchronous" if asynchronous else "a synchronous"
            document = given.recipe()
            document["model"]["source"] = str(source)
            # Two saves, and one at the end, for which every run waits.
            document["schedule"]["train_steps"] = 3 * every
            document["checkpoints"] = {"every_steps": every, "keep": 1}
            if both:
                document["checkpoints"]["asynchronous"] = asynchronous
            run = worker_run(document, place.work / f"{kind} save")
            found[asynchronous] = place.job("saves", 35, run=str(run))
            yield _stall_line(f"{model.name}: wait for {kind} save", found[asynchronous], every)
    except Failed as error:
        yield failed(claim, error)
        return
    if not both:
        yield skipped(claim, "this smolconv has no checkpoints.asynchronous")
        return
    # The second save, since the first also allocates what it copies to.
    waits = {kind: each["stalls"][str(2 * every)] for kind, each in found.items()}
    yield of_gpu(place, within(claim, waits[True] / waits[False], STALL))


def _stall_line(claim: str, found: Mapping[str, Any], every: int) -> Line:
    waits = [found["stalls"].get(str(step), math.nan) for step in (every, 2 * every)]
    # Steps right after a save run while an asynchronous one is written.
    while_written = [found["seconds"][str(step)] for step in (every + 1, every + 2)]
    before = found["seconds"][str(every)]
    return Line(
        claim=claim,
        found=f"{waits[0]:.2f} s, then {waits[1]:.2f} s; a step takes {before:.2f} s before the save, "
        f"{max(while_written):.2f} s after it",
        limit="numbers", verdict="met" if all(map(math.isfinite, waits)) else "not met",
    )  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------------


#: What is worth most comes first: the whole is ended after eight minutes, wherever it is.
PARTS = (
    Part(
        name="attention", title="Attention and whole models beside the CPU", seconds=110,
        lines=lambda place, _: attention(place),
        notes="Expected: each document alone, in float64 (whole models: float32) on the CPU, from the same numbers. "
        "Error: the worst document's (of whole models: parameter's) root mean square error by that of the expected "
        "values. Memory: the allocator's peak, by the bytes of all scores.",
    ),
    Part(
        name="steps", title="Steps of the worker beside the CPU", seconds=100, lines=lambda place, _: steps(place),
        notes="One checkpoint, recipe and data, run by the worker on both; differences of a step's loss, in nats.",
    ),
    Part(
        name="speed", title="Speed and memory beside the estimate", seconds=90,
        lines=speed,
    ),
    Part(
        name="long", title="Long rows", seconds=130, lines=long_context,
        notes="With activation checkpointing.",
    ),
    Part(name="liger", title="Liger", seconds=100, lines=liger),
    Part(
        name="trainer", title="Beside Hugging Face's Trainer", seconds=80,
        lines=trainer,
    ),
    Part(name="compile", title="torch.compile", seconds=120, lines=compiled),
    Part(
        name="saves", title="Saves", seconds=90, lines=lambda place, _: saves(place),
        notes="The wait is from the end of a step to where training continues.",
    ),
    Part(
        name="checkpointing", title="Activation checkpointing", seconds=90,
        lines=checkpointed,
    ),
)  # fmt: skip


def check(place: Place, report: Report, parts: Sequence[Part] = PARTS) -> int:
    """Every part in its order, each line written when it is known. Returns the exit code."""
    speeds = Speeds(place)
    report.speeds = speeds.rows
    for part in parts:
        began = time.monotonic()
        seconds = part.seconds * (DRY_PATIENCE if place.dry_run else 1)
        speeds.place = given = replace(place, budget=place.budget.part(seconds))
        try:
            for line in part.lines(given, speeds):
                report.add(part, line)
        except Exception as error:  # a mistake of this check's own, which leaves the other parts
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            report.add(part, Line(claim=f"all of {part.title}", found=said, verdict="not met"))
        report.seconds[part.name] = time.monotonic() - began
    report.ended = True
    report.write()
    return 1 if report.count("not met") else 0


def _driver() -> str:
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "driver unknown (no nvidia-smi)"
    version, _, power = said.partition(", ")
    return f"driver {version}, power limit {power}"


PACKAGES = (
    "torch", "transformers", "deepspeed", "accelerate", "flash-attn", "liger-kernel", "triton", "numpy", "pydantic",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(os.environ.get("OUT") or REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--output", type=Path, default=results, help="folder of the results; default: $OUT")
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--work", type=Path, default=None, help="where to make a folder to work in")
    parser.add_argument("--dry-run", action="store_true", help="all parts on a CPU, with toy models")
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="only these")
    given = parser.parse_args()
    budget = Budget(seconds=given.seconds - 10)  # to end and clean up
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process stays behind
    work = Path(tempfile.mkdtemp(prefix="smolconv-gpu-check-", dir=given.work))
    dry_run: bool = given.dry_run
    place = Place(
        device="cpu" if dry_run else "cuda", budget=budget, work=work, sizes=DRY_SIZES if dry_run else GPU_SIZES,
        dry_run=dry_run,
    )  # fmt: skip
    try:
        try:
            found = place.job("machine", 30)
        except Failed as error:
            print(f"make gpu-check needs torch and a GPU, and could not ask for them: {error}", file=sys.stderr)
            return NO_GPU
        if dry_run:
            place = replace(place, unable={**found["unable"], "liger": "its kernels run on GPUs"})
            gpu = "a CPU: dry run"
        elif found["gpu"] is None:
            print(f"make gpu-check needs a GPU that torch can use; torch {found['torch']} sees none.", file=sys.stderr)
            return NO_GPU
        else:
            place = replace(place, gpu=found["gpu"], gpu_bytes=found["bytes"], unable=found["unable"])
            gpu = (
                f"{found['gpu']}, {found['bytes'] / 1e9:.1f} GB, compute capability {found['capability']}, "
                f"{_driver()}, CUDA {found['cuda']}, NCCL {found['nccl']}"
            )
        try:
            given.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"the results cannot be written: {error}. Name another folder with --output.")
        moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        machine = [gpu, *machine_lines(PACKAGES), moment]
        report = Report(given.output, machine, PARTS, dry_run=dry_run)
        code = check(place, report, [part for part in PARTS if not given.part or part.name in given.part])
        print(report.path.read_text())
        return code
    finally:
        place.close()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
