"""What only a GPU can show, unattended, in eight minutes on one: ``make gpu-check``.

Kernels and steps beside the CPU's, Liger and an export after it, and speed and memory beside Hugging Face's Trainer and
our own estimate, each with its tolerance and verdict. Weights and tokens are random; no network is needed, and nothing
is installed: what is not there is skipped and said. Everything that computes runs in a process of its own
(``gpu_jobs.py``, and the worker).

Exit codes: 0 everything that ran was met, 1 something was not, 5 there is no GPU (nothing is written then).
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from common import REPOSITORY, kill_group, machine_lines, markdown_table, say
from random_checkpoint import CONFIGS

from smolconv.continual_pretraining.estimate.estimate import estimate
from smolconv.continual_pretraining.estimate.flops import flops_per_token
from smolconv.continual_pretraining.estimate.hardware import peak_flops
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.recipe.schema import Recipe
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
#: Of the estimate's memory, either way.
MEMORY = 0.15
#: The estimate's tokens/s, at its assumed utilisation, may be off by this factor.
SPEED = 1.5
ASSUMED_MFU = 0.3

FORMULAS: tuple[Literal["6N", "nanotron"], ...] = ("6N", "nanotron")
#: Every way to compute attention, and in which dtype.
KERNELS = (("flash", "bfloat16"), ("varlen", "bfloat16"), ("documents", "bfloat16"), ("documents", "float32"))

#: What the worker runs: dtype and ZeRO stage.
WORKER_RUNS = (("bfloat16", 1), ("float32", 0))

Verdict = Literal["met", "not met", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A claim and what was found."""

    claim: str
    found: str
    limit: str = ""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One row of the table of speed and memory."""

    model: str
    what: str
    batch: str
    tokens_per_second: float
    mfu: Mapping[str, float | None]  #: by formula; None: the GPU's peak is not known
    allocated: int  #: bytes, at the fullest of the steps
    reserved: int
    notes: str = ""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. The tests have smaller ones."""

    heads: tuple[tuple[int, int], ...] = ((9, 3), (16, 4))  #: the 135M's and SmolLM3's: groups of 3 and of 4
    head_sizes: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (64, 1, 2048, 3, 511, 2, 1024, 17, 129)
    long_length: int = 8192
    tiny: tuple[Mapping[str, Any], ...] = ()
    tiny_lengths: tuple[int, ...] = (64, 1, 500, 3, 211, 2, 17)
    tiny_steps: int = 10
    tiny_sequence: int = 128
    cpu_threads: int = 4  #: of a run on the CPU
    models: tuple[tuple[str, Mapping[str, Any], int], ...] = ()  #: name, config, sequence length
    micro_batches: tuple[int, ...] = (8, 4, 2, 1)
    steps: int = 16
    warmup_steps: int = 6


def _tiny(architecture: str, **fields: Any) -> Mapping[str, Any]:
    return {
        "model_type": architecture, "vocab_size": 512, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": True, "bos_token_id": EOS, "eos_token_id": EOS,
        "num_hidden_layers": 4, **fields,
    }  # fmt: skip


GPU_SIZES = Sizes(
    tiny=(
        _tiny("llama", hidden_size=576, intermediate_size=768, num_attention_heads=9, num_key_value_heads=3),
        _tiny("smollm3", hidden_size=1024, intermediate_size=1024, num_attention_heads=16, num_key_value_heads=4,
              no_rope_layer_interval=4),
    ),
    models=(
        ("SmolLM2-135M", CONFIGS["135m"], 2048),
        ("SmolLM3 of 8 layers", {**CONFIGS["3b"], "num_hidden_layers": 8}, 4096),
    ),
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

    @property
    def peak(self) -> float | None:
        """FLOP/s of the GPU in dense bf16."""
        return peak_flops(self.gpu)

    def job(self, name: str, seconds: float, **given: Any) -> dict[str, Any]:
        """What a job of ``gpu_jobs.py`` finds, which is expected to take ``seconds``. Raises ``Failed``."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.work))
        paper, result = folder / "job.json", folder / "result.json"
        paper.write_text(json.dumps({"job": name, "result": str(result), **given}))
        code, said = self.processes([[sys.executable, str(JOBS), str(paper)]], True, seconds)[0]
        if not result.is_file():
            raise Failed(f"{name} ended with {code}: {said}")
        document = json.loads(result.read_text())
        if "error" in document:
            raise Failed(f"{document['error']}: {document['message']}".partition("\n")[0])
        found: dict[str, Any] = document["found"]
        return found

    def processes(self, commands: Sequence[Sequence[str]], device: bool, seconds: float) -> list[tuple[int, str]]:
        """Run them beside each other, on the device or on the CPU: exit codes, and their last lines.

        Raises ``OutOfTime``.
        """
        if self.budget.left < seconds:
            raise OutOfTime(f"{max(self.budget.left, 0):.0f} s are left, and it takes about {seconds:.0f} s")
        running: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for command in commands:
                descriptor, name = tempfile.mkstemp(suffix=".log", dir=self.work)
                with os.fdopen(descriptor, "wb") as log:
                    process = subprocess.Popen(
                        command,
                        env=_environment(self.device if device else "cpu"),
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                running.append((process, Path(name)))
            # A first import from a cold disk takes its time.
            patience, left = 2 * seconds + 60, self.budget.left
            deadline = time.monotonic() + min(patience, left)
            for process, _ in running:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            if left < patience:
                raise OutOfTime("it had not ended when the time was over") from None
            raise Failed(f"it had not ended after {patience:.0f} s") from None
        finally:
            for process, _ in running:
                if process.poll() is None:
                    kill_group(process)
                    process.wait()
        return [(process.returncode, _last_line(log)) for process, log in running]


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


def within(claim: str, found: float, limit: float, *, unit: str = "") -> Line:
    """Met when ``found`` is a number that is not above ``limit``."""
    met: Verdict = "met" if found <= limit else "not met"  # NaN is not
    return Line(claim=claim, found=f"{found:.2g}{unit}", limit=f"at most {limit:g}{unit}", verdict=met)


def failed(claim: str, error: Failed) -> Line:
    """What ran out of time was not tried; everything else that gave no result did not do what was claimed."""
    return Line(claim=claim, found=str(error), verdict="skipped" if isinstance(error, OutOfTime) else "not met")


def skipped(claim: str, why: str) -> Line:
    return Line(claim=claim, found=why, verdict="skipped")


def same_losses(claim: str, found: Sequence[float], expected: Sequence[float], limit: float) -> Line:
    """Of two runs, step by step."""
    if len(found) != len(expected) or not found:
        return Line(claim=claim, found=f"{len(found)} steps beside {len(expected)}", limit="as many", verdict="not met")
    differences = [abs(mine - theirs) for mine, theirs in zip(found, expected)]
    worst = max(differences) if all(map(math.isfinite, differences)) else math.nan
    line = within(claim, worst, limit)
    return replace(line, found=f"{line.found} in {len(found)} steps ({found[0]:.3f} to {found[-1]:.3f})")


def memory_as_estimated(claim: str, allocated: int, estimated: int) -> Line:
    ratio = allocated / estimated
    return Line(
        claim=claim,
        found=f"{allocated / 1e9:.2f} GB, estimated {estimated / 1e9:.2f} GB: {ratio:.2f}",
        limit=f"{1 - MEMORY:.2f} to {1 + MEMORY:.2f}",
        verdict="met" if abs(ratio - 1) <= MEMORY else "not met",
    )


def speed_as_estimated(claim: str, tokens_per_second: float, estimated: float) -> Line:
    ratio = tokens_per_second / estimated
    return Line(
        claim=claim,
        found=f"{tokens_per_second:,.0f}, estimated {estimated:,.0f}: {ratio:.2f}",
        limit=f"{1 / SPEED:.2f} to {SPEED:.2f}",
        verdict="met" if 1 / SPEED <= ratio <= SPEED else "not met",
    )


def at_least(claim: str, found: float, expected: float, *, of: str) -> Line:
    return Line(
        claim=claim, found=f"{found / expected:.2f} of {of}", limit="at least 1",
        verdict="met" if found >= expected else "not met",
    )  # fmt: skip


# --- 1. attention -----------------------------------------------------------------------------------------------------


def attention(place: Place) -> Iterator[Line]:
    """Every kernel beside each document alone on the CPU, then whole models, and the leak test."""
    sizes = place.sizes
    shapes = [(heads, kv_heads, size) for heads, kv_heads in sizes.heads for size in sizes.head_sizes]
    for kernel, dtype in KERNELS:
        claim = f"{kernel}, {dtype}"
        if kernel in place.unable:
            yield skipped(claim, place.unable[kernel])
            continue
        try:
            found = place.job(
                "kernel_errors", 20, kernel=kernel, dtype=dtype, shapes=shapes, lengths=sizes.lengths,
                configs=sizes.tiny, config_lengths=sizes.tiny_lengths, device=place.device,
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
        yield within(claim, found[name] / (4 * of * length**2), SCORES, unit=" of its scores")


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
        runs: dict[tuple[str, str], tuple[Path, int, str]] = {}
        for device in (place.device, "the CPU"):
            folders = {
                dtype: worker_run(
                    tiny_document(place, source, tokens, dtype=dtype, zero_stage=stage),
                    place.work / f"{dtype} on {device}",
                )
                for dtype, stage in WORKER_RUNS
            }
            commands = [worker_command(run) for run in folders.values()]
            # One after the other on the GPU, which may be one that takes a single process.
            together = [commands] if device == "the CPU" else [[command] for command in commands]
            ends = [end for some in together for end in place.processes(some, device == place.device, 25)]
            runs |= {(dtype, device): (run, *end) for (dtype, run), end in zip(folders.items(), ends)}
    except Failed as error:
        yield from (failed(claim, error) for claim in claims)
        return
    for (dtype, _), claim in zip(WORKER_RUNS, claims):
        both = {device: runs[dtype, device] for device in (place.device, "the CPU")}
        broken = [f"on {device}: {said}" for device, (_, code, said) in both.items() if code]
        if broken:
            yield failed(claim, Failed("; ".join(broken)))
        else:
            found, expected = (losses(run) for run, _, _ in both.values())
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


# --- 3 and 4. speed and memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model whose speed is measured: its data, and the batch that fits."""

    name: str
    config: Mapping[str, Any]
    sequence_length: int
    tokens: Path  #: the file
    micro_batch: int
    accumulation: int = 2

    @property
    def spec(self) -> ModelSpec:
        return spec_from_hf(self.config)

    @property
    def batch(self) -> str:
        return f"{self.accumulation} x {self.micro_batch} x {self.sequence_length}"

    @property
    def flops(self) -> dict[str, float]:
        """Of a token, by formula."""
        return {name: flops_per_token(self.spec, self.sequence_length, name) for name in FORMULAS}

    def recipe(self, place: Place, **model: Any) -> dict[str, Any]:
        return recipe_document(
            "-", self.tokens.parent, self.sequence_length, place.sizes.steps, micro_batch=self.micro_batch,
            accumulation=self.accumulation, threads=1, **model,
        )  # fmt: skip


def subject(place: Place, index: int) -> Subject:
    """The largest micro-batch that the estimate gives seven tenths of the memory: Trainer takes more than we do."""
    name, config, length = place.sizes.models[index]
    spec, micro_batch = spec_from_hf(config), place.sizes.micro_batches[-1]
    folder = place.work / f"tokens-{index}"
    for candidate in place.sizes.micro_batches:
        document = recipe_document("-", folder, length, 1, micro_batch=candidate, accumulation=2)
        if sum(part.bytes for part in memory_parts(Recipe.model_validate(document), spec, 1)) < 0.7 * place.gpu_bytes:
            micro_batch = candidate
            break
    path = folder / "00000_unshuffled.ds"
    if not path.is_file():
        wanted = 2 * micro_batch * (length + 1) * place.sizes.steps
        token_folder(folder, spec.vocab_size, wanted, longest=length)
    return Subject(name=name, config=config, sequence_length=length, tokens=path, micro_batch=micro_batch)


class Speeds:
    """Measured runs by model and settings, so that none is measured twice; the rows of their table."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rows: list[Speed] = []
        self._found: dict[tuple[str, str], dict[str, Any] | Failed] = {}

    def ours(self, given: Subject, seconds: float = 35, **model: Any) -> dict[str, Any]:
        """Raises ``Failed``, also for what has failed before."""
        what = ", ".join(["smolconv", *(f"{name} {_switch(value)}" for name, value in model.items())])
        return self._once(given, what, lambda: self.place.job(
            "train", seconds, document=given.recipe(self.place, **model), config=given.config,
            run=tempfile.mkdtemp(prefix="run-", dir=self.place.work), warmup_steps=self.place.sizes.warmup_steps,
        ))  # fmt: skip

    def trainer(self, given: Subject, seconds: float = 35) -> dict[str, Any]:
        return self._once(given, "HF Trainer", lambda: self.place.job(
            "hf_trainer", seconds, config=given.config, tokens=str(given.tokens),
            token_bytes=4 if given.spec.vocab_size > 65536 else 2, sequence_length=given.sequence_length,
            micro_batch=given.micro_batch, accumulation=given.accumulation, steps=self.place.sizes.steps,
            warmup_steps=self.place.sizes.warmup_steps, device=self.place.device,
            folder=tempfile.mkdtemp(prefix="trainer-", dir=self.place.work),
        ))  # fmt: skip

    def _once(self, given: Subject, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = (given.name, what)
        if key not in self._found:
            try:
                self._found[key] = found = measure()
                self.rows.append(self._row(given, what, found))
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
    given = subject(place, 0)
    claims = [f"{given.name}, Liger on and off: {what}" for what in ("losses of the steps", "tokens/s", "peak memory")]
    export = "an export after training with Liger, verified on the CPU"
    if "liger" in place.unable:
        yield from (skipped(claim, place.unable["liger"]) for claim in (export, *claims))
        return
    yield exported(place, export)
    try:
        off, on = speeds.ours(given), speeds.ours(given, liger="on")
    except Failed as error:
        yield from (failed(claim, error) for claim in claims)
        return
    yield same_losses(claims[0], on["losses"], off["losses"], STEP_LOSS["bfloat16"])
    yield at_least(claims[1], on["tokens_per_second"], off["tokens_per_second"], of="the speed without")
    yield within(claims[2], on["allocated"] / off["allocated"], 1.0, unit=" of that without")


def exported(place: Place, claim: str, liger: str = "on") -> Line:
    """A run of the worker, whose first rank verifies what it has written with transformers, in the same process."""
    try:
        document = tiny_document(place, *tiny_source(place), liger=liger)
        run = worker_run({**document, "export": {"formats": ["hf"]}}, place.work / f"export with Liger {liger}")
        code, said = place.processes([worker_command(run)], True, 30)[0]
    except Failed as error:
        return failed(claim, error)
    written = code == 0 and (run / "export" / "hf").is_dir()
    return Line(claim=claim, found=said, limit="exit code 0", verdict="met" if written else "not met")


def speed(place: Place, speeds: Speeds) -> Iterator[Line]:
    """Each model beside HF Trainer and the estimate; then what may be switched on."""
    subjects = [subject(place, index) for index in range(len(place.sizes.models))]
    for given in subjects:
        yield from _beside_estimate(place, speeds, given)
        claim = f"{given.name}: tokens/s beside HF Trainer's"
        try:
            yield at_least(
                claim, speeds.ours(given)["tokens_per_second"], speeds.trainer(given)["tokens_per_second"],
                of="HF Trainer's",
            )  # fmt: skip
        except Failed as error:
            memory = "OutOfMemory" in str(error)
            yield skipped(claim, f"out of memory: {error}") if memory else failed(claim, error)
    for given in reversed(subjects):
        yield from _checkpointed(speeds, given)
    yield from _compiled(speeds, subjects[0])
    yield from _compiled(speeds, subjects[0], activation_checkpointing=True)
    for given in subjects[1:]:
        yield from _compiled(speeds, given)


def _beside_estimate(place: Place, speeds: Speeds, given: Subject) -> Iterator[Line]:
    memory, rate = (
        f"{given.name}: peak memory as estimated",
        f"{given.name}: tokens/s as estimated at {ASSUMED_MFU:.0%} MFU (6N)",
    )
    try:
        found = speeds.ours(given)
    except Failed as error:
        yield failed(memory, error)
        yield failed(rate, error)
        return
    document = given.recipe(place)
    yield memory_as_estimated(memory, found["allocated"], _estimated_bytes(document, given.spec))
    if place.peak is None:
        yield skipped(rate, f"the peak FLOP/s of {place.gpu} is not known")
        return
    document["logging"] = {"peak_tflops": place.peak / 1e12}
    expected = estimate(Recipe.model_validate(document), given.spec, 1, mfu=ASSUMED_MFU).tokens_per_second
    assert expected is not None  # on a GPU
    yield speed_as_estimated(rate, found["tokens_per_second"], expected)


def _estimated_bytes(document: Mapping[str, Any], spec: ModelSpec) -> int:
    """What the allocator should hold at its fullest."""
    parts = memory_parts(Recipe.model_validate(document), spec, 1)
    return sum(part.bytes for part in parts if part.where == "gpu" and part.name != OUTSIDE_ALLOCATOR)


def _checkpointed(speeds: Speeds, given: Subject) -> Iterator[Line]:
    claim = f"{given.name}, activation_checkpointing on"
    try:
        off, on = speeds.ours(given), speeds.ours(given, activation_checkpointing=True)
    except Failed as error:
        yield failed(claim, error)
        return
    yield same_losses(f"{claim}: losses of the steps", on["losses"], off["losses"], STEP_LOSS["bfloat16"])
    yield within(f"{claim}: peak memory", on["allocated"] / off["allocated"], 1.0, unit=" of that without")
    expected = _estimated_bytes(given.recipe(speeds.place, activation_checkpointing=True), given.spec)
    yield memory_as_estimated(f"{claim}: peak memory as estimated", on["allocated"], expected)


def _compiled(speeds: Speeds, given: Subject, **model: Any) -> Iterator[Line]:
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
    yield at_least(f"{claim}: tokens/s", on["tokens_per_second"], off["tokens_per_second"], of="the speed without")


# --- the report -------------------------------------------------------------------------------------------------------


TITLES = (
    "Attention and whole models beside the CPU",
    "Steps of the worker beside the CPU",
    "Liger",
    "Speed and memory",
)
NOTES = {
    TITLES[0]: "Expected: each document alone, float32, on the CPU, from the same numbers. Error: the worst document's "
    "(of whole models: parameter's) root mean square error by that of the expected values. Memory: the allocator's "
    "peak, by the bytes of all scores.",
    TITLES[1]: "One checkpoint, recipe and data, run by the worker on both; differences of a step's loss, in nats.",
    TITLES[3]: "tokens/s: the median step after the first ones. Batch: accumulation x micro-batch x sequence. "
    "smolconv: ZeRO-1 on one GPU, bf16 weights, fp32 masters and gradient sums, documents masked. HF Trainer: fp32 "
    "weights under bf16 autocast, sdpa, fused AdamW, the same tokens as rows in which documents see each other. "
    "GB: the allocator's peak over the steps, and what it had reserved.",
}  # fmt: skip


class Report:
    """The results file; it is written anew, as a whole, with every line."""

    def __init__(self, path: Path, machine: Sequence[str]) -> None:
        self.path, self.machine = path, machine
        self.sections: dict[str, list[Line]] = {}
        self.speeds: list[Speed] = []
        self.ended = False

    def add(self, section: str, line: Line) -> None:
        self.sections.setdefault(section, []).append(line)
        say(f"{line.verdict}: {line.claim}: {line.found}")
        self.write()

    @property
    def lines(self) -> list[Line]:
        return [line for lines in self.sections.values() for line in lines]

    def count(self, verdict: Verdict) -> int:
        return sum(line.verdict == verdict for line in self.lines)

    def rendered(self) -> str:
        counts = ", ".join(f"{self.count(verdict)} {verdict}" for verdict in ("met", "not met", "skipped"))
        text = ["# GPU check", "", *(f"- {line}" for line in self.machine), "", f"{counts}."]
        if not self.ended:
            text += ["", "**This check was not ended: what is missing below did not run.**"]
        for number, title in enumerate(TITLES, 1):
            if title not in self.sections:
                continue
            text += ["", f"## {number}. {title}", ""]
            text += [NOTES[title], ""] if title in NOTES else []
            rows = [[line.claim, line.found, line.limit, line.verdict] for line in self.sections[title]]
            text += markdown_table(["claim", "found", "limit", "verdict"], [[*map(_cell, row)] for row in rows])
        if self.speeds:
            titles = ["model", "run", "batch", "tokens/s", "MFU (6N)", "MFU (nanotron)", "GB", "GB reserved", "notes"]
            text += ["", *markdown_table(titles, [_speed_cells(row) for row in self.speeds])]
        return "\n".join(text) + "\n"

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(self.rendered())
        partial.replace(self.path)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _speed_cells(row: Speed) -> list[str]:
    shares = ["" if share is None else f"{share:.1%}" for share in (row.mfu["6N"], row.mfu["nanotron"])]
    return [
        row.model, row.what, row.batch, f"{row.tokens_per_second:,.0f}", *shares, f"{row.allocated / 1e9:.2f}",
        f"{row.reserved / 1e9:.2f}", row.notes,
    ]  # fmt: skip


def check(place: Place, report: Report) -> int:
    """Every section in its order, each line written when it is known. Returns the exit code."""
    speeds = Speeds(place)
    report.speeds = speeds.rows
    sections = (attention(place), steps(place), liger(place, speeds), speed(place, speeds))
    for title, lines in zip(TITLES, sections):
        for line in lines:
            report.add(title, line)
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


def _no_liger() -> dict[str, str]:
    from importlib.util import find_spec

    return {} if find_spec("liger_kernel") else {"liger": "liger-kernel is not installed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "gpu.md")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--work", type=Path, default=None, help="where to make a folder to work in")
    given = parser.parse_args()
    budget = Budget(seconds=given.seconds - 10)  # to end and clean up
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process stays behind
    work = Path(tempfile.mkdtemp(prefix="smolconv-gpu-check-", dir=given.work))
    try:
        place = Place(device="cuda", budget=budget, work=work, sizes=GPU_SIZES)
        try:
            found = place.job("machine", 30)
        except Failed as error:
            print(f"make gpu-check needs torch and a GPU, and could not ask for them: {error}", file=sys.stderr)
            return NO_GPU
        if found["gpu"] is None:
            print(f"make gpu-check needs a GPU that torch can use; torch {found['torch']} sees none.", file=sys.stderr)
            return NO_GPU
        place = Place(
            device="cuda", budget=budget, work=work, sizes=GPU_SIZES, gpu=found["gpu"], gpu_bytes=found["bytes"],
            unable={**found["unable"], **_no_liger()},
        )  # fmt: skip
        gpu = (
            f"{found['gpu']}, {found['bytes'] / 1e9:.1f} GB, compute capability {found['capability']}, {_driver()}, "
            f"CUDA {found['cuda']}, NCCL {found['nccl']}"
        )
        packages = (
            "smolconv",
            "torch",
            "transformers",
            "deepspeed",
            "accelerate",
            "flash-attn",
            "liger-kernel",
            "triton",
        )
        moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        code = check(place, Report(given.output, [gpu, *machine_lines(packages), moment]))
        print(given.output.read_text())
        return code
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
