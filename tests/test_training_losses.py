"""Equal recipes give equal losses: the engine at every ZeRO stage and world size beside a plain PyTorch loop.

The loop is written here, from the published facts, on transformers' own model: AdamW on fp32, nanotron's decay groups,
its schedule by completed steps, its mean of micro-batch means, each document alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, convert
from torch.nn.functional import cross_entropy
from training import EOS, losses, metrics, recipe_document, token_folder, train
from transformers import AutoModelForCausalLM

from smolconv.checkpoint import Slot
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.forward import to_torch

NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
LLAMA = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp2-dp1-zero0"
STEPS = 20
SCHEDULE = {
    "train_steps": STEPS, "peak_lr": 2e-3, "warmup_steps": 4, "decay": "linear", "decay_start_step": 12,
    "decay_steps": 8,
}  # fmt: skip
#: Stage, ranks: each with 4 micro-batches a step. The first four in CI meet every stage and every division.
SAMPLED = [(1, 2), (3, 1)]
MATRIX = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2, 4) if (stage, ranks) not in SAMPLED]


def windows(folder: Path, length: int) -> Iterator[np.ndarray]:
    """[length + 1] tokens at a time, in the file's order, again from its beginning at its end."""
    tokens = np.fromfile(folder / "00000_unshuffled.ds", "<u2").astype(np.int64)
    count = len(tokens) // (length + 1)
    index = 0
    while True:
        yield tokens[(index % count) * (length + 1) :][: length + 1]
        index += 1


def document_losses(model: Any, window: np.ndarray) -> tuple[torch.Tensor, int]:
    """Summed cross entropy of a window, each document by itself: its first token is given, never predicted."""
    total, targets = torch.zeros(()), 0
    inputs, labels = torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])
    starts = [0, *[i + 1 for i, token in enumerate(inputs[:-1].tolist()) if token == EOS], len(inputs)]
    for start, stop in pairwise(starts):
        kept = stop - start - int(inputs[stop - 1] == EOS)  # after an EOS another document begins
        if kept:
            logits = model(input_ids=inputs[None, start:stop], use_cache=False).logits[0, :kept].float()
            total = total + cross_entropy(logits, labels[start : start + kept], reduction="sum")
            targets += kept
    return total, targets


def reference_lr(step: int, schedule: Mapping[str, Any] = SCHEDULE) -> float:
    """nanotron's, by completed steps."""
    done, warm = step - 1, schedule["warmup_steps"]
    if done <= warm:
        return schedule["peak_lr"] * done / max(warm, 1)
    if schedule.get("decay", "none") == "none" or done < schedule["decay_start_step"]:
        return schedule["peak_lr"]
    return schedule["peak_lr"] * max(0.0, 1 - (done - schedule["decay_start_step"]) / schedule["decay_steps"])


def reference_losses(
    model: Any, data: Iterator[np.ndarray], steps: range, *, lr: Any = reference_lr, optimizer: Any = None
) -> list[float]:
    """4 micro-batches of one row a step."""
    named = dict(model.named_parameters())
    optimizer = optimizer or torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "embed_tokens" not in n], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if "embed_tokens" in n], "weight_decay": 0.0},
        ],
        lr=0.0, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    found = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        means = []
        for _ in range(4):
            total, targets = document_losses(model, next(data))
            mean = total / max(targets, 1)
            (mean / 4).backward()
            means.append(mean.item())
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(np.mean(means)))
    return found


def fp32_model(source: Path, folder: Path) -> Any:
    convert(source, folder, "hf", dtype="float32", optimizer=False)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().train()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def reference(tokens, tmp_path_factory):
    model = fp32_model(NANOTRON, tmp_path_factory.mktemp("reference") / "hf")
    return reference_losses(model, windows(tokens, 32), range(1, STEPS + 1))


def run_equals_reference(stage: int, ranks: int, tokens: Path, reference: list[float], run: Path) -> None:
    document = recipe_document(NANOTRON, tokens, schedule=SCHEDULE, parallelism={"zero_stage": stage})
    lines = train(document, run, world_size=ranks)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in lines] == pytest.approx([reference_lr(step) for step in range(1, STEPS + 1)])
    assert np.abs(np.array(losses(run)) - reference).max() < 1e-5
    assert reference[-1] < reference[0]


@pytest.mark.parametrize(("stage", "ranks"), SAMPLED)
def test_losses_equal_a_plain_loop(stage, ranks, tokens, reference, tmp_path):
    run_equals_reference(stage, ranks, tokens, reference, tmp_path / "run")


@pytest.mark.matrix
@pytest.mark.parametrize(("stage", "ranks"), MATRIX)
def test_losses_equal_a_plain_loop_in_every_division(stage, ranks, tokens, reference, tmp_path):
    run_equals_reference(stage, ranks, tokens, reference, tmp_path / "run")


def test_a_wrong_decay_group_or_schedule_would_be_seen(tokens, reference, tmp_path):
    """The control: what HF Trainer does (norms undecayed, LR of k) moves the losses beyond the tolerance."""
    model = fp32_model(NANOTRON, tmp_path / "hf")
    shifted = reference_losses(model, windows(tokens, 32), range(1, 7), lr=lambda step: reference_lr(step + 1))
    assert np.abs(np.array(shifted) - reference[:6]).max() > 1e-4


def adam_from(source: Path, model: Any) -> torch.optim.AdamW:
    """AdamW with the state that nanotron saved, its masters in the model's place."""
    checkpoint = read_checkpoint(source, ReadOptions())
    named = dict(model.named_parameters())
    masters = checkpoint.tensors.get(Slot.MASTER) or checkpoint.parameters
    decay = {n: checkpoint.optimizer.hyperparameters(n)["weight_decay"] for n in named}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay[n]} for n, p in named.items()], lr=0.0, betas=(0.9, 0.95), eps=1e-8
    )
    for name, parameter in named.items():
        parameter.data.copy_(to_torch(masters[name], torch.float32))
        optimizer.state[parameter] = {
            "step": torch.tensor(checkpoint.optimizer.steps[name]),
            "exp_avg": to_torch(checkpoint.tensors[Slot.EXP_AVG][name], torch.float32),
            "exp_avg_sq": to_torch(checkpoint.tensors[Slot.EXP_AVG_SQ][name], torch.float32),
        }
    return optimizer


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.matrix), 3])
def test_a_run_goes_on_from_nanotrons_optimizer_as_nanotron_would(stage, tokens, tmp_path):
    """The oracle stopped after 3 steps of its schedule: peak 0.01, 2 steps of warm-up, decay from step 80."""
    schedule = {"train_steps": 9, "peak_lr": 0.01, "warmup_steps": 2, "decay": "linear", "decay_start_step": 80,
                "decay_steps": 20}  # fmt: skip
    model = fp32_model(NANOTRON, tmp_path / "hf")
    optimizer = adam_from(NANOTRON, model)
    expected = reference_losses(
        model, windows(tokens, 32), range(4, 10), lr=lambda step: reference_lr(step, schedule), optimizer=optimizer
    )
    document = recipe_document(
        NANOTRON, tokens, schedule=schedule, start={"optimizer": True, "learning_rate": True},
        parallelism={"zero_stage": stage},
        # The model continues in its own step count; its data is not this test's, so it begins anew.
    )  # fmt: skip
    lines = train(document, tmp_path / "run", world_size=2)
    assert [line["step"] for line in lines] == list(range(4, 10))
    assert np.abs(np.array(losses(tmp_path / "run")) - expected).max() < 1e-5
    assert all(line["lr"] == 0.01 for line in lines)
    fresh = {**document, "start": {"learning_rate": True}, "parallelism": {**document["parallelism"], "zero_stage": 1}}
    without = train(fresh, tmp_path / "without")
    assert abs(without[-1]["loss"] - expected[-1]) > 1e-3


def test_losses_of_smollm2_equal_a_plain_loop_too(tokens, tmp_path):
    expected = reference_losses(fp32_model(LLAMA, tmp_path / "hf"), windows(tokens, 32), range(1, 7))
    train(
        recipe_document(LLAMA, tokens, schedule={**SCHEDULE, "train_steps": 6, "decay_start_step": 6}),
        tmp_path / "run",
        world_size=2,
    )
    assert np.abs(np.array(losses(tmp_path / "run")) - expected).max() < 1e-5


def test_metrics_say_what_every_step_did(tokens, tmp_path):
    train(recipe_document(NANOTRON, tokens), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert [line["tokens"] for line in lines] == [128 * step for step in (1, 2, 3, 4)]
    assert all(line["sources"] == {"tokens": line["tokens"]} and line["stage"] == "only" for line in lines)
    assert all(line["grad_norm"] > 0 and line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in lines)
