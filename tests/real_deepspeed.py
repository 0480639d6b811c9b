"""Checkpoints as the real DeepSpeed reads and writes them, and the same steps in plain PyTorch.

Give ``continue_with_deepspeed`` as many jobs at once as a world size has: a meeting of its ranks costs a second.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed_worker import language_model_loss, random_model
from forked_worker import Fork, run_ranks
from safetensors.torch import load_file, save_file

Tensors = Mapping[str, torch.Tensor]

WORKER = Path(__file__).parent / "deepspeed_worker.py"
#: "fp32 noise" after some optimizer steps, of a tensor's largest element and of the loss. Masters and losses must keep to
#: 1e-6. Moments follow the gradients, whose sums are taken in another order: up to 1.2e-6 and (a square) 1.4e-6 were
#: measured with tiny models after 3 steps, ZeRO-0/1/2/3 of 1 to 3 ranks. From zero moments Adam's first step divides the
#: noise of tiny gradients by eps: ZeRO-3 then differs by 3e-5 of a weight at 1e-8, by 8e-7 at 1e-4.
MAX_NOISE = {"losses": 1e-6, "masters": 1e-6, "exp_avg": 4e-6, "exp_avg_sq": 8e-6}


class DeepSpeedFailed(AssertionError):
    """A rank raised, died or hung (and was killed); the message has its traceback."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One parameter group; the names are in flat order."""

    names: tuple[str, ...]
    weight_decay: float = 0.0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One engine: what it is, what it loads, the steps it takes, and where it saves."""

    config: Path  #: a transformers config.json
    stage: int
    groups: Sequence[Group]  #: every trained parameter exactly once; the tied head is model.embed_tokens.weight
    frozen: Sequence[str] = ()
    wrapper: str = ""  #: what the engine's module puts before the model's names, such as ``policy.``
    dtype: str = "fp32"  #: or bf16
    bf16_optimizer: bool = False  #: BF16_Optimizer: stage 1 and bf16 alone
    weights: Tensors | None = None  #: what the model holds before ``initialize``; None: random
    checkpoint: Path | None = None
    tag: str | None = None  #: None: the one that ``latest`` or ``latest_universal`` names
    universal: bool = False
    set_groups: bool = False  #: repair what a universal load into ZeRO-3 does (see ``deepspeed_worker.set_groups``)
    batches: np.ndarray | None = None  #: token ids [steps, rows, length]; the rows are dealt to the ranks in order
    micro_batch_rows: int | None = None  #: None: a rank's rows at once
    clip: float = 1.0  #: ZeRO-1/2 take the checkpoint's clip_grad instead, if it has one
    scheduler: Mapping[str, Any] | None = None  #: DeepSpeed's own, as in its configuration
    lambda_lr: Sequence[float] | None = None  #: factors of the groups' lr by step, the last one for good
    save: Path | None = None
    save_tag: str | None = None  #: None: global_stepN
    client_state: Mapping[str, Any] = field(default_factory=dict)  #: saved; plain JSON types
    ds_config: Mapping[str, Any] = field(default_factory=dict)  #: merged into the configuration, at any depth

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype is fp32 or bf16, not {self.dtype}")
        if self.scheduler and self.lambda_lr:
            raise ValueError("a job has one learning rate schedule")


@dataclass(frozen=True)
class Snapshot:
    """What a live engine held; tensors are whole and loaded when first asked for."""

    folder: Path

    @cached_property
    def masters(self) -> dict[str, torch.Tensor]:
        """fp32, by parameter, without the tied head."""
        return load_file(self.folder / "fp32.safetensors")

    @cached_property
    def exp_avg(self) -> dict[str, torch.Tensor]:
        """Empty before Adam's first step of a run that loaded nothing."""
        return load_file(self.folder / "exp_avg.safetensors")

    @cached_property
    def exp_avg_sq(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "exp_avg_sq.safetensors")

    @cached_property
    def module(self) -> dict[str, torch.Tensor]:
        """The weights of the forward pass, in their dtype."""
        return load_file(self.folder / "module.safetensors")

    @cached_property
    def state(self) -> dict[str, Any]:
        """adam_steps (per group; null before the first), param_groups, lr_scheduler, global_steps, global_samples, skipped_steps."""
        return json.loads((self.folder / "state.json").read_text())

    @property
    def adam_steps(self) -> list[float | None]:
        return self.state["adam_steps"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Without the parameters; ``lr`` is the one of the next step."""
        return self.state["param_groups"]


@dataclass(frozen=True)
class Result:
    """What one job came to."""

    job: Job
    folder: Path

    @cached_property
    def _document(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def before(self) -> Snapshot:
        """Right after ``load_checkpoint``, or after ``initialize`` if there was nothing to load."""
        return Snapshot(self.folder / "before")

    @cached_property
    def after(self) -> Snapshot:
        """After the steps; ``before`` if there were none."""
        return Snapshot(self.folder / "after") if (self.folder / "after").exists() else self.before

    @property
    def losses(self) -> list[float]:
        """Per step, the mean over all micro-batches of all ranks."""
        return self._document["losses"]

    @property
    def grad_norms(self) -> list[float | None]:
        """Before clipping; None in ZeRO-0 without bf16."""
        return self._document["grad_norms"]

    @property
    def client_state(self) -> dict[str, Any]:
        """As ``load_checkpoint`` returned it, through JSON; of a tensor its dtype and shape."""
        return self._document["client_state"]

    @property
    def load_path(self) -> str:
        return self._document["load_path"]

    @property
    def optimizer(self) -> str:
        """Class of DeepSpeed's optimizer."""
        return self._document["optimizer"]

    @property
    def seconds(self) -> dict[str, float]:
        return self._document["seconds"]

    @cached_property
    def trained(self) -> Trained:
        after = self.after
        return Trained(self.losses, after.masters, Moments(after.exp_avg, after.exp_avg_sq))


class Moments(NamedTuple):
    exp_avg: Tensors
    exp_avg_sq: Tensors


class Trained(NamedTuple):
    """What some steps came to."""

    losses: Sequence[float]
    masters: Tensors
    moments: Moments


class Noise(NamedTuple):
    """The largest differences between two trainings, those of tensors relative to a parameter's largest element."""

    losses: float
    masters: float
    exp_avg: float
    exp_avg_sq: float
    worst: str  #: the parameter whose master differs most


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def continue_with_deepspeed(
    jobs: Sequence[Job], world_size: int, tmp_path: Path, timeout_seconds: float = 600
) -> list[Result]:
    """Take the jobs one after another in ``world_size`` gloo processes, which end before this returns or raises.

    Raises ``DeepSpeedFailed`` with the traceback of every rank that failed; then no job has a result.
    """
    run = _new_folder(tmp_path, f"deepspeed-ws{world_size}")
    folders = [run / f"job-{number}" for number in range(len(jobs))]
    for job, folder in zip(jobs, folders):
        folder.mkdir()
        if job.batches is not None:
            np.save(folder / "batches.npy", job.batches.astype(np.int64))
        if job.weights is not None:
            save_file(
                {name: tensor.contiguous() for name, tensor in job.weights.items()}, folder / "weights.safetensors"
            )
    described = [_described(job, folder, world_size) for job, folder in zip(jobs, folders)]
    (run / "jobs.json").write_text(json.dumps(described, indent=1))
    _raise_failures(
        run_ranks([_fork(run, rank, world_size) for rank in range(world_size)], seconds=timeout_seconds, on_cpu=True),
        run,
    )
    return [Result(job, folder) for job, folder in zip(jobs, folders)]


def written_by_deepspeed(jobs: Sequence[Job], world_size: int, tmp_path: Path) -> list[Result]:
    """Train from random weights and save: real checkpoints at ``job.save``, and what their engines held as ``after``."""
    for job in jobs:
        if job.checkpoint is not None or job.save is None or job.batches is None:
            raise ValueError("a job that makes a checkpoint loads none, takes steps and saves")
    return continue_with_deepspeed(jobs, world_size, tmp_path)


def random_batches(config: Path, *, steps: int, rows: int, length: int = 32, seed: int = 0) -> np.ndarray:
    """Token ids [steps, rows, length] within the model's vocabulary."""
    vocabulary = json.loads(config.read_text())["vocab_size"]
    return np.random.default_rng(seed).integers(0, vocabulary, (steps, rows, length))


def _described(job: Job, folder: Path, world_size: int) -> dict[str, Any]:
    rows = 0 if job.batches is None else job.batches.shape[1]
    per_rank = max(1, rows // world_size)
    micro_batch = job.micro_batch_rows or per_rank
    if rows and (rows % world_size or per_rank % micro_batch):
        raise ValueError(f"{rows} rows cannot be dealt to {world_size} ranks in micro-batches of {micro_batch}")
    return {
        "config": str(job.config.resolve()), "stage": job.stage, "groups": [asdict(group) for group in job.groups],
        "frozen": list(job.frozen), "wrapper": job.wrapper,
        "weights": None if job.weights is None else str(folder / "weights.safetensors"), "dtype": job.dtype, "bf16_optimizer": job.bf16_optimizer,
        "checkpoint": job.checkpoint and str(job.checkpoint.resolve()), "tag": job.tag, "universal": job.universal,
        "set_groups": job.set_groups, "batches": str(folder / "batches.npy") if rows else None,
        "global_batch_rows": per_rank * world_size, "micro_batch_rows": micro_batch, "clip": job.clip,
        "scheduler": job.scheduler, "lambda_lr": job.lambda_lr and list(job.lambda_lr),
        "save": job.save and str(job.save.resolve()), "save_tag": job.save_tag, "client_state": job.client_state,
        "ds_config": job.ds_config, "folder": str(folder),
    }  # fmt: skip


def _new_folder(parent: Path, name: str) -> Path:
    for number in itertools.count():
        with suppress(FileExistsError):
            folder = parent / f"{name}-{number}"
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("unreachable")


def _fork(run: Path, rank: int, world_size: int) -> Fork:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size),
        # Ranks meet in a file, where no two runs can take one port; DeepSpeed asks that these are set all the same.
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo",
        # A lock that a killed build has left in the user's folder would stop us for ever.
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(run / "extensions")),
    }  # fmt: skip
    code = f"import runpy\nrunpy.run_path({str(WORKER)!r}, run_name='__main__')\n"
    return Fork(code=code, words=(str(WORKER), str(run)), environment=environment, log=run / f"rank-{rank}.log")


def _raise_failures(codes: Mapping[int, int], run: Path) -> None:
    failed = {rank: code for rank, code in sorted(codes.items()) if code}
    if failed:
        errors = sorted({path.read_text() for path in sorted(run.glob("rank-*.error"))}, key=_is_aftermath)
        died = [rank for rank in failed if not (run / f"rank-{rank}.error").exists()]
        raise DeepSpeedFailed(
            "\n\n".join(
                [f"ranks of {len(codes)} that failed, with their exit codes: {failed}", *errors, _logs(run, died)]
            )
        )


def _is_aftermath(error: str) -> bool:
    """A rank's complaint that another one is gone comes after that one's own."""
    return "Connection closed by peer" in error or "Connection reset by peer" in error


def _logs(run: Path, ranks: Iterable[int], max_characters: int = 6000) -> str:
    return "\n\n".join(
        f"--- end of {path}\n{path.read_text(errors='replace')[-max_characters:]}"
        for path in (run / f"rank-{rank}.log" for rank in ranks)
    )


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def plain_adamw(
    config: Path,
    masters: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    steps: float,
    groups: Sequence[Group],
    batches: np.ndarray,
    clip: float = 1.0,
    *,
    micro_batches: int = 1,
    dtype: torch.dtype = torch.float32,
    lr_factors: Sequence[float] | None = None,
) -> Trained:
    """The same steps in one process with ``torch.optim.AdamW``, from the given state at Adam step ``steps``.

    ``micro_batches`` is world size times accumulation: where DeepSpeed averages the gradients of that many means, so does
    this, in the order of the ranks. With ``dtype`` bfloat16 the model computes in it, and gradients are summed in it, as
    in ZeRO-1/2/3. The k-th step here has each group's lr times ``lr_factors[k]``.
    """
    model = random_model(config)
    weights = dict(model.named_parameters())
    for weight in weights.values():
        weight.data = weight.data.to(dtype)  # DeepSpeed too leaves the buffers in fp32
    current = {name: torch.nn.Parameter(masters[name].clone()) for name in weights}
    optimizer = torch.optim.AdamW(
        {"params": [current[n] for n in group.names], **{k: v for k, v in asdict(group).items() if k != "names"}}
        for group in groups
    )
    for name, parameter in current.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps)), "exp_avg": exp_avg[name].clone(), "exp_avg_sq": exp_avg_sq[name].clone()
        }  # fmt: skip
    losses = []
    for number, batch in enumerate(torch.from_numpy(batches.astype(np.int64))):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(current[name])
        parts = [language_model_loss(model, rows) for rows in batch.chunk(micro_batches)]
        gradients = [torch.autograd.grad(loss, list(weights.values())) for loss in parts]
        for name, tensors in zip(weights, zip(*gradients)):
            shares = [tensor / micro_batches for tensor in tensors]  # divided first, as in ZeRO-1/2
            current[name].grad = sum(shares[1:], shares[0]).float()
        if clip:
            norm = torch.stack([p.grad.double().norm() for p in current.values()]).norm().float()
            # min(1, clip / (norm + 1e-6)), rounded where DeepSpeed rounds it.
            coefficient = 1 / torch.clamp((norm + 1e-6) / clip, min=1.0)
            for parameter in current.values():
                parameter.grad *= coefficient
        for group, wanted in zip(optimizer.param_groups, groups):
            group["lr"] = wanted.lr * (lr_factors[number] if lr_factors else 1.0)
        optimizer.step()
        losses.append(torch.stack(parts).double().mean().item())
    states = {name: optimizer.state[parameter] for name, parameter in current.items()}
    return Trained(
        losses,
        {name: parameter.detach() for name, parameter in current.items()},
        Moments(*({name: state[slot] for name, state in states.items()} for slot in ("exp_avg", "exp_avg_sq"))),
    )


# --- comparisons ------------------------------------------------------------------------------------------------------


def noise(found: Trained | Result, expected: Trained | Result) -> Noise:
    """The largest differences; raises ``AssertionError`` where names or shapes differ."""
    found, expected = (each.trained if isinstance(each, Result) else each for each in (found, expected))
    masters = _relative(found.masters, expected.masters)
    assert len(found.losses) == len(expected.losses), f"{len(found.losses)} losses against {len(expected.losses)}"
    return Noise(
        losses=_largest(abs(a - b) for a, b in zip(found.losses, expected.losses)),
        masters=_largest(masters.values()),
        exp_avg=_largest(_relative(found.moments.exp_avg, expected.moments.exp_avg).values()),
        exp_avg_sq=_largest(_relative(found.moments.exp_avg_sq, expected.moments.exp_avg_sq).values()),
        worst=max(masters, key=masters.__getitem__),
    )


def assert_fp32_noise(found: Trained | Result, expected: Trained | Result) -> Noise:
    """The two trainings agree but for the order in which fp32 sums were taken. bf16 engines are no matter for this."""
    measured = noise(found, expected)
    assert all(getattr(measured, field) <= most for field, most in MAX_NOISE.items()), f"{measured} against {MAX_NOISE}"
    return measured


def assert_same_state(found: Snapshot, expected: Snapshot | Trained, *, module: bool = True) -> None:
    """Masters and moments bit for bit; of another engine also the weights of the module, Adam's steps and the groups."""
    moments = expected.moments if isinstance(expected, Trained) else expected
    pairs = {
        "masters": (found.masters, expected.masters), "exp_avg": (found.exp_avg, moments.exp_avg),
        "exp_avg_sq": (found.exp_avg_sq, moments.exp_avg_sq),
    }  # fmt: skip
    if isinstance(expected, Snapshot):
        assert found.adam_steps == expected.adam_steps
        assert found.param_groups == expected.param_groups
        if module:
            pairs["module"] = (found.module, expected.module)
    for slot, (ours, theirs) in pairs.items():
        assert ours.keys() == theirs.keys(), f"{slot}: {sorted(ours.keys() ^ theirs.keys())}"
        different = [
            name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
        ]
        assert not different, f"{slot} differ: {different}"


def _largest(differences: Iterable[float]) -> float:
    return float(np.max([*differences, 0.0]))  # NaN if one of them is, unlike max()


def _relative(found: Tensors, expected: Tensors) -> dict[str, float]:
    assert found.keys() == expected.keys(), f"names differ: {sorted(found.keys() ^ expected.keys())}"
    result = {}
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, f"{name}: {found[name].shape} against {tensor.shape}"
        difference, largest = (x.double().abs().max().item() for x in (found[name].double() - tensor, tensor))
        result[name] = difference / largest if largest else difference
    return result
