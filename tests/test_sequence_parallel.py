"""Sequence parallelism: ranks that share rows compute what one rank computes, and what a plain loop does on each document.

Nothing here is expected by the code under test: losses and gradients of a micro-batch are those of transformers' own model
on each document alone, and those of runs are of ``test_training_losses``' loop.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked_worker
import hf_models
import numpy as np
import pytest
import torch
from forked_worker import Fork, run_ranks, work
from specs import tiny
from test_training_losses import SCHEDULE, reference_losses, windows
from test_training_model import batch, gradients_of, noise, plain_loss
from test_training_resume import wait_for_step, weights
from training import EOS, VOCABULARY, losses, metrics, recipe_document, token_folder, train
from training_model_worker import Packed
from transformers import AutoModelForCausalLM

from smolconv.continual_pretraining.engine.config import accumulation_steps, engine_config
from smolconv.continual_pretraining.engine.sequence import join_sequence_ranks
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.recipe.files import load_recipe
from smolconv.continual_pretraining.run.checkpoints import step_folder
from smolconv.continual_pretraining.run.start import check_model
from smolconv.errors import UsageError
from smolconv.layouts.deepspeed.checkpoint_engine import load_torch_archive

#: fp32, of a loss; and of gradients, relative to a tensor's largest element. Sums are taken in another order.
LOSS_NOISE, GRADIENT_NOISE = 1e-6, 1e-5
#: Documents end before, at and behind cuts; 45 tokens do not divide by 2 or 4.
ROWS: tuple[tuple[int, ...], ...] = ((20, 1, 3, 21),)
#: A micro-batch of two rows is cut as one: by 3, inside of a row.
TWO_ROWS = ((12, 8, 4), (24,))
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 64}
NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
SIX = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a micro-batch that ranks share."""

    family: str
    sequence_ranks: int
    sizes: Mapping[str, int] = field(default_factory=lambda: HEADS)
    rows: Sequence[Sequence[int]] = ROWS
    model: Mapping[str, Any] = field(default_factory=dict)
    tile_tokens: int = 100  #: of the MLP

    @property
    def plain(self) -> torch.nn.Module:
        made: torch.nn.Module = getattr(hf_models, self.family)(**self.sizes)
        return made

    @property
    def batch(self) -> Packed:
        return batch(self.rows)

    def document(self) -> dict[str, Any]:
        plain = self.plain
        return {
            "config": plain.config.to_dict(), "weights": plain.state_dict(), "batch": tuple(self.batch),
            "model": {"dtype": "float32", **self.model}, "sequence_ranks": self.sequence_ranks, "tile_tokens": self.tile_tokens,
        }  # fmt: skip


#: By the ranks that run them. Key/value heads: as many as ranks, more, fewer, and such that do not divide.
CASES = {
    3: [
        Case(family="llama", sequence_ranks=3, sizes=NINE, rows=TWO_ROWS),
        Case(family="smollm3", sequence_ranks=3, sizes=SIX),
        Case(family="qwen3", sequence_ranks=3, sizes=SIX, rows=TWO_ROWS),
    ],
    4: [
        Case(family="smollm3", sequence_ranks=2),
        Case(family="smollm3", sequence_ranks=4),
        Case(family="smollm3", sequence_ranks=4, model={"activation_checkpointing": True}, tile_tokens=5),
        Case(family="llama", sequence_ranks=4, sizes=EIGHT, rows=((2,), (2,), (1, 1))),
        Case(family="qwen2", sequence_ranks=2, rows=TWO_ROWS),
    ],
}
MATRIX = {
    8: [Case(family=family, sequence_ranks=ranks) for family in ("llama", "smollm3", "qwen2", "qwen3") for ranks in (2, 4, 8)],
}  # fmt: skip


def measured(cases: Sequence[Case], world_size: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank found of each case."""
    torch.save([case.document() for case in cases], folder / "job.pt")
    source = Path(__file__).with_name("sequence_worker.py")
    port = str(forked_worker._free_port())
    forks = [
        Fork(
            code=source.read_text(), words=(str(source), str(folder)), log=folder / f"rank-{rank}.log",
            environment={"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(world_size)
    ]  # fmt: skip
    codes = run_ranks(forks, on_cpu=True)
    assert not any(codes.values()), "\n".join(fork.log.read_text()[-3000:] for fork in forks)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]


def ranks_equal_documents_alone(cases: Sequence[Case], world_size: int, folder: Path) -> None:
    for case, ranks in zip(cases, zip(*measured(cases, world_size, folder))):
        plain = case.plain
        loss = plain_loss(plain, case.batch)
        loss.backward()
        targets = int((case.batch.labels != -100).sum())
        for first in range(0, world_size, case.sequence_ranks):
            group = ranks[first : first + case.sequence_ranks]
            assert sum(rank["targets"] for rank in group) == targets, case
            for rank in group:
                assert abs(rank["loss"] - loss) / targets < LOSS_NOISE, case
                assert noise(rank["gradients"], gradients_of(plain)) < GRADIENT_NOISE, case


@pytest.mark.parametrize("world_size", CASES)
def test_ranks_that_share_rows_find_the_loss_and_gradients_of_each_document_alone(world_size, tmp_path):
    ranks_equal_documents_alone(CASES[world_size], world_size, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("world_size", MATRIX)
def test_every_family_is_shared_by_2_4_and_8_ranks(world_size, tmp_path):
    ranks_equal_documents_alone(MATRIX[world_size], world_size, tmp_path)


# --- the parts, for topologies that no test can start ------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "size"), [(96, 8), (144, 16), (384, 2), (6, 3)])
def test_neighbours_share_rows_and_cut_them_without_a_gap(monkeypatch, world_size, size):
    made: list[list[list[int]]] = []

    def make(groups: list[list[int]]) -> tuple[object, list[object]]:
        made.append(groups)
        return object(), []

    monkeypatch.setattr(torch.distributed, "new_subgroups_by_enumeration", make)
    found = [join_sequence_ranks(rank, world_size, size) for rank in range(world_size)]
    assert sorted(rank for group in made[0] for rank in group) == list(range(world_size))
    assert all(group == list(range(group[0], group[0] + size)) for group in made[0])
    assert made == [made[0]] * world_size  # torch makes them together
    row = torch.arange(16 * size)[None]
    for group in made[0]:
        assert torch.equal(torch.cat([found[rank].own(row) for rank in group], 1), row)


TOPOLOGIES = [
    ("smollm3-3b-long-context-64k", 8, 36), ("smollm3-3b-long-context-64k", 96, 3), ("smollm3-3b-long-context-64k", 144, 2),
    ("smollm3-3b-long-context-32k", 8, 72), ("smollm3-3b-long-context-32k", 96, 6), ("smollm3-3b-long-context-32k", 144, 4),
    ("smollm3-3b-stable", 384, 1), ("smollm3-3b-decay", 384, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ranks", "accumulation"), TOPOLOGIES)
def test_the_published_recipes_run_on_the_published_numbers_of_ranks(name, ranks, accumulation):
    """96 GPUs accumulated 3 and 6 micro-batches, 384 took one each: as published."""
    given = load_recipe(name)
    made = engine_config(given, ranks)
    assert made["gradient_accumulation_steps"] == accumulation
    # What DeepSpeed insists on, which counts every rank.
    assert made["train_batch_size"] == made["train_micro_batch_size_per_gpu"] * accumulation * ranks
    groups = ranks // given.parallelism.sequence_ranks
    assert groups * accumulation * given.parallelism.micro_batch_sequences == given.global_batch_sequences


@pytest.mark.parametrize(
    ("name", "ranks", "heads", "proposed"),
    [
        ("smollm3-3b-long-context-64k", 96, 16, ["sequence_ranks=8", "sequence_ranks=16", "36, 18 or 12 ranks"]),
        ("smollm3-3b-long-context-64k", 8, 16, ["sequence_ranks=2", "sequence_ranks=4", "sequence_ranks=8", "9, 6 or 12"]),
        ("smollm3-3b-stable", 384, 16, ["sequence_ranks=2", "sequence_ranks=4", "sequence_ranks=8", "192, 96 or 64 ranks"]),
        ("smollm3-3b-stable", 384, None, ["sequence_ranks=2, if it divides the model's query heads"]),
        ("finemath-cpt", 3, 9, ["sequence_ranks=3", "4, 2 or 8 ranks"]),
        ("smollm3-3b-stable", 5, 16, ["6, 4 or 8 ranks"]),
    ],
)  # fmt: skip
def test_ranks_that_cannot_share_a_step_are_refused_with_the_nearest_that_can(name, ranks, heads, proposed):
    given = load_recipe(name, ["parallelism.sequence_ranks=1"])
    with pytest.raises(UsageError, match=f"which {ranks} ranks cannot divide evenly") as error:
        accumulation_steps(given, ranks, heads)
    lines = [line.strip() for line in str(error.value).splitlines()[2:]]
    found = iter(lines)
    for wanted in proposed:
        assert any(wanted in line for line in found), (wanted, lines)
    for line in lines:  # and each of them holds
        changed = [line.partition(",")[0]] if "=" in line else []
        counts = [ranks] if changed else [int(n) for n in re.findall(r"\d+", line)]
        for count in counts:
            accumulation_steps(load_recipe(name, ["parallelism.sequence_ranks=1", *changed]), count)


def test_ranks_that_are_no_groups_are_refused():
    given = load_recipe("smollm3-3b-long-context-64k")
    with pytest.raises(UsageError, match="12 ranks, in groups of 8, cannot divide evenly"):
        accumulation_steps(given, 12)


@pytest.mark.parametrize(
    ("heads", "size", "fitting"),
    [(16, 3, "1, 2, 4, 8 or 16"), (16, 32, "1, 2, 4, 8 or 16"), (9, 2, "1, 3 or 9"), (32, 6, "1, 2, 4, 8, 16 or 32")],
)
def test_groups_that_do_not_divide_the_query_heads_are_refused_with_the_sizes_that_do(heads, size, fitting):
    given = load_recipe("smollm3-3b-stable", [f"parallelism.sequence_ranks={size}"])
    spec = tiny(num_heads=heads, num_kv_heads=1, max_positions=4096, vocab_size=200_000)
    with pytest.raises(UsageError, match=f"sequence_ranks {size} .* {heads} query heads of here") as error:
        check_model(given, spec, "here")
    assert f"Choose {fitting}." in str(error.value)


def test_neighbours_share_what_a_micro_batch_keeps_in_memory():
    """Of SmolLM3's 4 key/value heads each of 8 ranks holds one: twice as many as its share."""
    spec = tiny(
        "smollm3", hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16, num_kv_heads=4, head_size=128,
        vocab_size=128256,
    )  # fmt: skip

    def parts(size: int) -> dict[str, int]:
        given = load_recipe(
            "smollm3-3b-long-context-64k",
            [f"parallelism.sequence_ranks={size}", "model.activation_checkpointing=false"],
        )
        return {part.name: part.bytes for part in memory_parts(given, spec, 96 if size > 1 else 36)}

    one, eight = parts(1), parts(8)
    kept_twice = 36 * 65536 * 2 * (2 * 4 * 128)  # k and v of all layers
    assert eight["activations"] == (one["activations"] + kept_twice) / 8
    assert eight["fp32 masters"] * 96 == pytest.approx(one["fp32 masters"] * 36, rel=1e-6)  # over all ranks


# --- whole runs --------------------------------------------------------------------------------------------------------

STEPS = 20
#: Losses after 20 steps: sums are taken in another order.
RUN_NOISE = 1e-5
#: Python before a rank's own: tiles of 10 tokens, of which the rank's log tells. 32 tokens of a rank are then tiled as
#: 64k are.
TILES = """
from smolconv.continual_pretraining.engine import config, tiling
import smolconv.continual_pretraining.run.trainer as trainer
config.TILE_TOKENS = trainer.TILE_TOKENS = 10
compute = tiling._by_tiles
def told(*given):
    print("by tiles", flush=True)
    return compute(*given)
tiling._by_tiles = told
"""
#: Stage, ranks, and how many of them share rows.
SAMPLED = [(1, 2, 2), (3, 2, 2)]
DIVISIONS = [
    (stage, ranks, size) for stage in (0, 1, 2, 3) for ranks, size in ((2, 2), (3, 3), (4, 2), (4, 4), (8, 4), (8, 8))
    if (stage, ranks, size) not in SAMPLED
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """SmolLM3 with the published 16 query and 4 key/value heads, at a small model's usual initial scale."""
    model = hf_models.smollm3(**HEADS, vocab_size=VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.2)
    return hf_models.saved(model, tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def reference(source, tokens):
    """A plain loop's: no DeepSpeed, no packing."""
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").float().train()
    return reference_losses(model, windows(tokens, 32), range(1, STEPS + 1))


def trained(source: Path, tokens: Path, run: Path, stage: int, ranks: int, size: int, **changes: Any) -> list[float]:
    parallelism = {"zero_stage": stage, "sequence_ranks": size, **changes.pop("parallelism", {})}
    schedule = SCHEDULE | changes.pop("schedule", {})
    document = recipe_document(source, tokens, schedule=schedule, parallelism=parallelism, **changes)
    return [line["loss"] for line in train(document, run, world_size=ranks, before=TILES)]


def was_tiled(run: Path) -> bool:
    return "by tiles" in (run / "logs" / "rank-00000.log").read_text()


@pytest.mark.parametrize(("stage", "ranks", "size"), SAMPLED)
def test_losses_equal_a_plain_loop(stage, ranks, size, source, tokens, reference, tmp_path):
    tiled = {"tiled_mlp": "on"} if stage == 3 else {}
    found = trained(source, tokens, tmp_path / "run", stage, ranks, size, model=tiled)
    assert np.abs(np.array(found) - reference).max() < RUN_NOISE
    assert reference[-1] < reference[0]
    assert was_tiled(tmp_path / "run") == (stage == 3)


@pytest.mark.matrix
@pytest.mark.parametrize(("stage", "ranks", "size"), DIVISIONS)
def test_losses_equal_a_plain_loop_in_every_division(stage, ranks, size, source, tokens, reference, tmp_path):
    if size == 3:
        source = hf_models.saved(hf_models.smollm3(**NINE, vocab_size=VOCABULARY), tmp_path / "nine")
        reference = trained(source, tokens, tmp_path / "alone", stage, 1, 1)
    found = trained(source, tokens, tmp_path / "run", stage, ranks, size)
    assert np.abs(np.array(found) - reference).max() < RUN_NOISE


def published_form(source: Path, tokens: Path, **parallelism: int) -> dict[str, Any]:
    """The 64k recipe at a toy's sizes: its theta, checkpointing, schedule and ZeRO; with an evaluation and an export.

    Of checkpointed rows the MLP is computed by tiles.
    """
    document = load_recipe("smollm3-3b-long-context-64k").model_dump(mode="json")
    folder = [{"path": str(tokens)}]
    document["model"] |= {"source": str(source), "dtype": "float32", "max_positions": 64}
    document["data"] |= {
        "sequence_length": 63,
        "eos_token_id": EOS,
        "stages": [{"name": "lc stage", "sources": folder}],
    }
    document["schedule"] |= {
        "train_steps": 6,
        "peak_lr": 1e-3,
        "warmup_steps": 1,
        "decay_start_step": 1,
        "decay_steps": 5,
    }
    document["parallelism"] |= {"sequence_ranks": 2, "global_batch_sequences": 4, "threads": 1, **parallelism}
    document["checkpoints"] = {"every_steps": 2}
    document["evaluation"] = {"every_steps": 3, "sequences": 3, "sources": folder}
    document["export"] = {"formats": ["hf"]}
    return document


@pytest.fixture(scope="module")
def never_stopped(source, tokens, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(published_form(source, tokens), run, world_size=4, before=TILES)
    return run


def events(run: Path, kind: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line["losses"] for line in lines if line["kind"] == kind]


def test_a_run_that_was_killed_goes_on_bit_for_bit(source, tokens, never_stopped, tmp_path):
    """Two groups of two; 63 tokens a row are padded to 64. Export verifies what the engine held."""
    run, document = tmp_path / "run", published_form(source, tokens)

    def kill(pids: list[int]) -> None:
        wait_for_step(run, 3)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    assert work(document, run, 4, before=TILES, meanwhile=kill).code == -signal.SIGKILL
    train(document, run, world_size=4, before=TILES)
    assert losses(run) == losses(never_stopped)
    assert was_tiled(never_stopped) and was_tiled(run)
    for name, tensor in weights(never_stopped).items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_a_run_goes_on_without_groups_and_counts_its_samples_as_before(source, tokens, never_stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(never_stopped, run)
    for step in (4, 6):
        shutil.rmtree(step_folder(run, step))
    (run / "checkpoints" / "latest").write_text("step-2")
    (run / "events.jsonl").unlink()
    train(published_form(source, tokens, sequence_ranks=1), run, world_size=2, before=TILES)
    assert np.abs(np.array(losses(run)) - losses(never_stopped)).max() < RUN_NOISE
    assert losses(run)[2:] != losses(never_stopped)[2:]  # sums were taken in another order
    evaluations, before = events(run, "evaluation"), events(never_stopped, "evaluation")
    assert len(before) == 3 and [each["tokens"] for each in evaluations] == pytest.approx(
        [each["tokens"] for each in before[1:]], abs=RUN_NOISE
    )
    saved = [step_folder(each, 6) / "mp_rank_00_model_states.pt" for each in (never_stopped, run)]
    assert [load_torch_archive(path)["global_samples"] for path in saved] == [6 * 4] * 2


@pytest.mark.parametrize("normalisation", ["micro-batches", "tokens"])
def test_both_means_of_the_loss_are_those_of_one_rank(normalisation, source, tokens, tmp_path):
    """Micro-batches of two rows, whose numbers of targets differ."""
    shape: dict[str, Any] = {
        "loss": {"normalisation": normalisation}, "schedule": {"train_steps": 8},
        "parallelism": {"micro_batch_sequences": 2, "global_batch_sequences": 4},
    }  # fmt: skip
    alone, shared = (trained(source, tokens, tmp_path / str(size), 2, size, size, **shape) for size in (1, 2))
    assert np.abs(np.array(shared) - alone).max() < RUN_NOISE


#: Python before a rank's own.
SHIFTED_HEAD = """
from smolconv.continual_pretraining.engine import sequence
exchange = sequence._exchange
def shifted(parts, group):
    found = exchange(parts, group).clone()
    found[:, -1] = found[:, -1].roll(1, 1)  # the last value head's tokens, by one
    return found
sequence._exchange = shifted
"""
LOST_LABEL = """
import itertools
from smolconv.continual_pretraining.engine.sequence import SequenceRanks
own, calls = SequenceRanks.own, itertools.count()
def cut(self, row):
    found = own(self, row).clone()
    if next(calls) % 3 == 2 and self.rank == 0:  # tokens, positions, labels
        found[:, -1] = -100  # before the cut
    return found
SequenceRanks.own = cut
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [(SHIFTED_HEAD, "documents of a packed row see each other"), (LOST_LABEL, "its loss covers")],
    ids=["a head's tokens are shifted", "a label is lost at the cut"],
)
def test_what_an_exchange_or_a_cut_gets_wrong_is_not_trained(before, said, source, tokens, tmp_path):
    document = recipe_document(source, tokens, parallelism={"sequence_ranks": 2})
    ended = work(document, tmp_path / "run", 2, before=before)
    assert ended.code == 6 and said in ended.message, ended.log[-3000:]


#: What a run may have besides: of the recipe, and how far its losses may be from those of one rank.
BESIDES: dict[str, tuple[int, dict[str, Any], float]] = {
    "optimizer offloaded": (2, {"parallelism": {"offload": "optimizer"}}, RUN_NOISE),
    "all offloaded": (3, {"parallelism": {"offload": "all"}}, RUN_NOISE),
    "compiled": (1, {"model": {"compile": True}}, RUN_NOISE),
    "compiled tiles, inputs of layers offloaded": (
        0,
        {"model": {"compile": True, "activation_checkpointing": True, "activation_offload": True}},
        RUN_NOISE,
    ),
    "tiles alone": (2, {"model": {"tiled_mlp": "on"}}, RUN_NOISE),
    "bfloat16": (1, {"model": {"dtype": "bfloat16", "tiled_mlp": "on"}}, 0.02),
    "every spike is skipped": (1, {"spikes": {"action": "skip", "sigmas": 1e-3, "window_steps": 8}}, RUN_NOISE),
}


@pytest.mark.matrix
@pytest.mark.parametrize("what", BESIDES)
def test_whatever_else_a_run_has_holds_for_ranks_that_share_rows(what, source, tokens, tmp_path):
    stage, changes, tolerance = BESIDES[what]
    alone, shared = (trained(source, tokens, tmp_path / str(size), stage, size, size, **changes) for size in (1, 2))
    assert np.abs(np.array(shared) - alone).max() < tolerance
    lines = metrics(tmp_path / "2")
    assert any(line.get("skipped") for line in lines) == ("spikes" in changes)
    assert [line.get("skipped") for line in lines] == [line.get("skipped") for line in metrics(tmp_path / "1")]
