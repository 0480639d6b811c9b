"""Parts of a run, each through the real engine or worker: groups, configuration, gate, leak test, spikes, evaluation,
sources, export. What is broken on purpose is broken in the worker's own process.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from conftest import FIXTURES, convert, run_cli
from forked_worker import Ended, work
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from training import EOS, losses, metrics, recipe, recipe_document, token_folder
from transformers import AutoModelForCausalLM, Trainer

from smolconv.continual_pretraining.engine.config import engine_config
from smolconv.continual_pretraining.engine.optimizer import group_parameters
from smolconv.continual_pretraining.recipe.schema import Export, Optimizer, Recipe
from smolconv.continual_pretraining.run.checkpoints import RunState, find_resume, latest, saved_steps, step_folder
from smolconv.continual_pretraining.run.export import export_run
from smolconv.continual_pretraining.run.gate import SourceLoss, check_first_loss, source_loss
from smolconv.continual_pretraining.run.start import prepare_start
from smolconv.continual_pretraining.tokens.files import Batch
from smolconv.conversion import ConversionPlan
from smolconv.errors import CorruptFile, MachineError, MissingFile, ParityFailed, TrainingStopped, UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.registry import FAMILIES
from smolconv.verification.compare import AsStored, VerifyOptions, side_of
from smolconv.verification.forward import to_torch

pytest.importorskip("deepspeed")

NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
LLAMA = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp2-dp1-zero0"
LENGTH = 32
#: Two micro-batches of a row: the least that is accumulated.
TWO = {"micro_batch_sequences": 1, "global_batch_sequences": 2}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


def window(folder: Path, number: int) -> np.ndarray:
    ids = np.fromfile(folder / "00000_unshuffled.ds", "<u2").astype(np.int64)
    return ids[number * (LENGTH + 1) :][: LENGTH + 1]


def document_losses(model: Any, tokens: np.ndarray, *, masked: bool = True) -> tuple[float, int]:
    """transformers' cross entropy summed over a window's documents, each by itself, and how many targets there are."""
    inputs, labels = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
    ends = [at + 1 for at in range(LENGTH - 1) if masked and inputs[at] == EOS]
    total, targets = 0.0, 0
    for start, stop in itertools.pairwise([0, *ends, LENGTH]):
        kept = stop - start - int(masked and inputs[stop - 1] == EOS)  # what follows an EOS is another document
        if kept:
            with torch.inference_mode():
                logits = model(input_ids=inputs[None, start:stop], use_cache=False).logits[0, :kept].float()
            total += float(cross_entropy(logits, labels[start : start + kept], reduction="sum"))
            targets += kept
    return total, targets


def mean_loss(model: Any, windows: Sequence[np.ndarray], *, masked: bool = True) -> float:
    found = [document_losses(model, each, masked=masked) for each in windows]
    return sum(total for total, _ in found) / sum(targets for _, targets in found)


def transformers_model(source: Path, folder: Path, config: Path | None = None) -> Any:
    convert(source, folder, "hf", dtype="float32", optimizer=False, config=config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def succeeded(ended: Ended) -> None:
    assert ended.code == 0, ended.log


# --- parameter groups -------------------------------------------------------------------------------------------------


def names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


EMBEDDING = (".*embed_tokens.*",)
TIED: dict[str, Any] = {"tied": True, "family": FAMILIES["llama"]}


def test_norms_decay_and_the_tied_embedding_does_not():
    decayed, rest = group_parameters(names(hf_models.llama()), Optimizer(no_decay=EMBEDDING), **TIED)
    assert rest.names == ("model.embed_tokens.weight",) and rest.weight_decay == 0
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight"} <= set(decayed.names)
    assert sorted([*decayed.names, *rest.names]) == sorted(names(hf_models.llama()))


def test_hf_trainer_groups_them_the_other_way_around():
    """The control: a run by HF Trainer would be another one."""
    model = hf_models.llama()
    theirs = set(Trainer.get_decay_parameter_names(None, model))
    decayed, _ = group_parameters(names(model), Optimizer(no_decay=EMBEDDING), **TIED)
    assert "model.embed_tokens.weight" in theirs - set(decayed.names)
    assert "model.norm.weight" in set(decayed.names) - theirs


@pytest.mark.parametrize(
    ("pattern", "tied", "undecayed"),
    [
        ("lm_head", True, ["model.embed_tokens.weight"]),  # by its tied name
        ("lm_head", False, ["lm_head.weight"]),
        ("embed_tokens", True, []),  # from the start of the name
        (r".*embed_tokens", False, ["model.embed_tokens.weight"]),
        (r"model\.norm", True, ["model.norm.weight"]),
    ],
)
def test_regexes_match_from_the_start_of_a_name_or_of_its_tied_name(pattern, tied, undecayed):
    model = hf_models.llama(tie_word_embeddings=tied)
    groups = group_parameters(names(model), Optimizer(no_decay=(pattern,)), tied=tied, family=FAMILIES["llama"])
    assert [name for group in groups if group.weight_decay == 0 for name in group.names] == undecayed
    assert len(groups) == 1 + bool(undecayed)


@pytest.mark.parametrize(
    ("family", "decay", "undecayed"),
    [
        ("llama", 0.01, []),  # SmolLM1, SmolLM2 and FineMath: their sixteen YAMLs
        ("smollm3", 0.1, ["model.embed_tokens.weight"]),  # its five
        ("qwen2", 0.1, ["model.embed_tokens.weight"]),
        ("qwen3", 0.1, ["model.embed_tokens.weight"]),
    ],
)
def test_what_a_recipe_leaves_out_of_the_decay_is_as_its_family_was_pretrained(family, decay, undecayed):
    model = names(hf_models.llama(tie_word_embeddings=False))
    groups = group_parameters(model, Optimizer(), tied=False, family=FAMILIES[family])
    assert [name for group in groups if group.weight_decay == 0 for name in group.names] == undecayed
    assert groups[0].weight_decay == decay
    chosen = group_parameters(model, Optimizer(weight_decay=0.3, no_decay=()), tied=False, family=FAMILIES[family])
    assert [group.weight_decay for group in chosen] == [0.3]  # control: what the recipe says holds for every family


def test_a_group_without_members_is_left_out():
    everything = group_parameters(names(hf_models.llama()), Optimizer(no_decay=(".*",)), **TIED)
    assert [group.weight_decay for group in everything] == [0]
    assert len(group_parameters(names(hf_models.llama()), Optimizer(no_decay=()), **TIED)) == 1


# --- DeepSpeed's configuration ----------------------------------------------------------------------------------------


def configured(world_size: int = 1, dtype: str = "bfloat16", **parallelism: Any) -> dict[str, Any]:
    return engine_config(recipe(Path("-"), Path("-"), model={"dtype": dtype}, parallelism=parallelism), world_size)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_summed_and_sent_in_fp32_in_buckets_and_clipped(stage):
    made = configured(2, zero_stage=stage)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["communication_data_type"] == "fp32"
    assert made["bf16"]["enabled"] and made["bf16"]["check_grad_overflow"]
    assert made["gradient_clipping"] == 1.0
    assert made["zero_optimization"]["stage"] == stage
    # SmolLM3's largest parameters besides the embedding have 22.5 M elements.
    assert 25e6 < made["zero_optimization"]["reduce_bucket_size"] <= 1e8
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (4, 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_runs_have_no_bf16_and_clip(stage):
    made = configured(1, "float32", zero_stage=stage)
    assert "bf16" not in made and made["communication_data_type"] == "fp32"
    assert made["gradient_clipping"] == (0 if stage == 0 else 1.0)  # the trainer clips where DeepSpeed tells no norm


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_offload_moves_the_optimizer_and_at_stage_3_the_parameters(stage, offload):
    zero = configured(4, zero_stage=stage, offload=offload)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert ("offload_param" in zero) == (offload == "all")


@pytest.mark.parametrize(("world_size", "fits"), [(3, "4, 2 or 1"), (8, "4, 2 or 1"), (0, "1, 2 or 4")])
def test_ranks_that_cannot_share_a_step_are_refused_with_those_that_can(world_size, fits):
    with pytest.raises(UsageError, match=f"  {fits} ranks"):
        configured(world_size)


@pytest.mark.parametrize(
    "parallelism",
    [{"zero_stage": 0}, {"zero_stage": 1, "offload": "optimizer"}, {"zero_stage": 2, "offload": "optimizer"}],
)
def test_what_would_sum_gradients_in_bf16_is_refused(parallelism):
    with pytest.raises(UsageError, match=r"bfloat16.*\nChoose zero_stage"):
        configured(2, **parallelism)
    configured(4, **parallelism)  # nothing is accumulated
    configured(2, "float32", **parallelism)


# --- the start gate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("source", ["nanotron llama", "nanotron smollm3", "hf", "deepspeed"])
def test_the_sources_loss_is_that_of_transformers(source, mask_documents, tokens, tmp_path):
    config = None
    if source == "hf":
        folder, known = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf", {}
    elif source == "deepspeed":
        case = FIXTURES / "deepspeed" / "zero1-untied-ws2"
        folder, config = case / "checkpoint", case / "config.json"
        vocabulary = json.loads(config.read_text())["vocab_size"]
        tokens = token_folder(tmp_path / "small", vocabulary=vocabulary)
        known = {"config": str(config)}
    else:
        folder, known = (LLAMA if source.endswith("llama") else NANOTRON), {}
    changes = {"model": known, "data": {"mask_documents": mask_documents}, "parallelism": {"micro_batch_sequences": 4}}
    gate = prepare_start(recipe(folder, tokens, **changes), tmp_path / "run", 1, "auto").gate
    model = transformers_model(folder, tmp_path / "hf", config)
    windows = [window(tokens, number) for number in range(4)]
    assert gate.loss == pytest.approx(mean_loss(model, windows, masked=mask_documents), abs=1e-5)
    assert gate.targets == sum(document_losses(model, each, masked=mask_documents)[1] for each in windows)
    assert abs(gate.loss - mean_loss(model, windows, masked=not mask_documents)) > 1e-4  # the control


@pytest.mark.parametrize("left", [0, 5])
def test_the_gate_compares_tokens_though_a_mask_excludes_the_whole_micro_batch(left, tokens, tmp_path):
    masked = tmp_path / "masked"
    shutil.copytree(tokens, masked)
    counted = np.ones(len(np.fromfile(tokens / "00000_unshuffled.ds", "<u2")), np.uint8)
    counted[1 : LENGTH + 1 - left] = 0
    counted.tofile(masked / "00000_unshuffled.ds.loss")
    gate = prepare_start(recipe(LLAMA, masked), tmp_path / "run", 1, "auto").gate
    model = transformers_model(LLAMA, tmp_path / "hf")
    if left:
        assert 0 < gate.targets <= left  # the mask is heeded
    else:
        assert gate.loss == pytest.approx(mean_loss(model, [window(tokens, 0)]), abs=1e-5) and gate.targets > 20


@pytest.mark.parametrize(
    ("source", "packed"),
    [(LLAMA, False), (NANOTRON, False), (NANOTRON, True)],  # nanotron's Llama does not pack
    ids=["llama", "smollm3", "smollm3 packed"],
)
def test_the_sources_loss_is_that_of_nanotron(source, packed, tmp_path):
    """nanotron's own forward and loss, stored beside the fixtures."""
    known = load_file(source.parent / "reference.safetensors")
    prefix = "packed_" if packed else ""
    labels = torch.where(known["label_mask"], known["label_ids"], -100)
    batch = Batch(
        input_ids=known[f"{prefix}input_ids"].numpy(), positions=known[f"{prefix}position_ids"].numpy(),
        labels=labels.numpy(), rows=(),
    )  # fmt: skip
    side = side_of(read_checkpoint(source), AsStored(folder=source, options=ReadOptions()), VerifyOptions())
    assert source_loss(side, batch).loss == pytest.approx(float(known[f"{prefix}loss"]), abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "within", "beyond"),
    [("float32", None, 0.9e-4, 1.1e-4), ("bfloat16", None, 0.019, 0.021), ("float32", 0.5, 0.4, 0.6)],
)
def test_the_gate_lets_through_what_is_within_its_tolerance(dtype, tolerance, within, beyond):
    source = SourceLoss(loss=2.0, targets=3, forward="-")
    check_first_loss(2.0 + within, 3, source, dtype=dtype, tolerance=tolerance)
    for loss in (2.0 + beyond, 2.0 - beyond, float("nan"), float("inf")):
        with pytest.raises(TrainingStopped, match="gate_tolerance"):
            check_first_loss(loss, 3, source, dtype=dtype, tolerance=tolerance)


THETA = """
from smolconv.continual_pretraining.run import trainer
build = trainer.build_model
def other(config, *rest):
    scaled = {**config["rope_parameters"], "rope_theta": 50.0}
    return build({**config, "rope_theta": 50.0, "rope_parameters": scaled}, *rest)
trainer.build_model = other
"""
BLIND = """
from smolconv.continual_pretraining.engine import model
import torch
pack = model.pack
model.pack = lambda positions, *a, **k: pack(torch.arange(positions.shape[1]).expand_as(positions), *a, **k)
"""


def test_a_model_with_another_theta_does_not_start(tokens, tmp_path):
    made = recipe_document(NANOTRON, tokens, parallelism=TWO, schedule={"train_steps": 1})
    ended = work(made, tmp_path / "run", before=THETA)
    assert ended.code == 6
    for said in ("first micro-batch has loss", "source model's is", "smolconv verify", "start.gate"):
        assert said in ended.message
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and saved_steps(tmp_path / "run") == []
    made["start"] = {"gate": False}
    succeeded(work(made, tmp_path / "run", before=THETA))


def test_a_disk_that_fills_while_the_source_is_converted_is_named_with_what_was_needed(tokens, tmp_path, monkeypatch):
    def full(plan: ConversionPlan, **_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(plan.target / "shard"))

    monkeypatch.setattr("smolconv.continual_pretraining.run.start.run_conversion", full)
    with pytest.raises(
        MachineError, match=r"start/deepspeed/shard: No space left[^$]*GB were to be written[^$]*Free"
    ) as told:
        prepare_start(recipe(NANOTRON, tokens), tmp_path / "run", 1, "auto")
    assert str(NANOTRON) in str(told.value)


@pytest.fixture(scope="module")
def stretched(tokens, tmp_path_factory) -> tuple[Path, Path]:
    """A source of theta 10 and 64 positions, and a run of it that has made a step with 1,000 and 128."""
    place = tmp_path_factory.mktemp("stretched")
    model = hf_models.llama(vocab_size=256, **hf_models.rope(10.0, {"rope_type": "default"}))
    source = hf_models.saved(model, place / "source")
    succeeded(work(stretching(source, tokens, rope_theta=1000.0, max_positions=128), place / "run"))
    return source, place / "run"


def stretching(source: Path, tokens: Path, **model: Any) -> dict[str, Any]:
    return recipe_document(source, tokens, model=model, parallelism=TWO, schedule={"train_steps": 1})


def with_config(source: Path, folder: Path, **fields: Any) -> Path:
    """The source with other fields in its config: theta in either spelling."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    if "rope_theta" in fields and "rope_parameters" in config:
        config["rope_parameters"] |= {"rope_theta": fields["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_that_raises_theta_says_both_thetas_and_both_losses(stretched, tokens, tmp_path):
    source, run = stretched
    texts = [json.loads(line)["text"] for line in (run / "events.jsonl").read_text().splitlines()]
    said = next(text for text in texts if text.startswith("rope_theta"))
    changes, _, losses_of = said.partition("; ")
    assert changes == "rope_theta 1,000 (the source's: 10), max_positions 128 (the source's: 64)"
    changed, own = (float(number) for number in re.findall(r"\d+\.\d+", losses_of))
    folders = {1000.0: with_config(source, tmp_path / "changed", rope_theta=1000.0), 10.0: source}
    expected = {
        theta: mean_loss(AutoModelForCausalLM.from_pretrained(folder).eval(), [window(tokens, 0)])
        for theta, folder in folders.items()
    }
    assert changed == pytest.approx(expected[1000.0], abs=1e-4) and own == pytest.approx(expected[10.0], abs=1e-4)
    assert abs(expected[1000.0] - expected[10.0]) > 1e-3  # the control
    assert prepare_start(recipe(source, tokens), tmp_path / "as it is", 1, "auto").events == ()
    same = recipe(source, tokens, model={"rope_theta": 10.0, "max_positions": 64})
    assert prepare_start(same, tmp_path / "the same", 1, "auto").events == ()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"rope_theta": 9.5}, r"model.rope_theta is 9.5, but .*source was trained with 10\."),
        ({"max_positions": 63}, r"model.max_positions is 63, but .*source was trained with 64\."),
        ({"rope_theta": 9.5, "max_positions": 128}, "model.rope_theta is 9.5"),
    ],
)
def test_what_would_lower_theta_or_the_context_is_refused_unless_it_is_allowed(
    model, said, stretched, tokens, tmp_path
):
    source, _ = stretched
    with pytest.raises(UsageError, match=said):
        prepare_start(recipe(source, tokens, model=model), tmp_path / "run", 1, "auto")
    assert not (tmp_path / "run").exists()
    allowed = recipe(source, tokens, model={**model, "allow_lowering": True}, start={"gate": False})
    assert "(the source's: " in prepare_start(allowed, tmp_path / "run", 1, "auto").events[0]


def test_a_config_in_the_place_of_the_sources_own_does_not_lower_either(stretched, tokens, tmp_path):
    source, _ = stretched
    other = with_config(source, tmp_path / "other", rope_theta=9.5) / "config.json"
    with pytest.raises(UsageError, match=r"rope_theta in model.config is 9.5, but .*source was trained with 10\."):
        prepare_start(recipe(source, tokens, model={"config": str(other)}), tmp_path / "run", 1, "auto")
    (tmp_path / "bare").mkdir()
    shutil.copy(source / "model.safetensors", tmp_path / "bare")  # a source that has none of its own
    alone = recipe(tmp_path / "bare", tokens, model={"config": str(other)})
    assert prepare_start(alone, tmp_path / "run", 1, "auto").events == ()


def test_a_run_does_not_go_on_with_a_lower_theta_than_it_has_trained_with(stretched, tokens):
    source, run = stretched
    lower = stretching(source, tokens, rope_theta=100.0, max_positions=128) | {
        "schedule": {"train_steps": 2, "peak_lr": 1e-3}
    }
    with pytest.raises(UsageError, match=r"model.rope_theta is 100, but .* was trained with 1,000\."):
        prepare_start(Recipe.model_validate(lower), run, 1, "auto")
    lower["model"]["rope_theta"] = 1000.0
    assert prepare_start(Recipe.model_validate(lower), run, 1, "auto").step == 1


def test_attention_that_sees_other_documents_does_not_start(tokens, tmp_path):
    made = recipe_document(NANOTRON, tokens, parallelism=TWO, schedule={"train_steps": 1}, start={"gate": False})
    ended = work(made, tmp_path / "run", before=BLIND)
    assert ended.code == 6 and "documents of a packed row see each other" in ended.message
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and saved_steps(tmp_path / "run") == []
    made["data"]["mask_documents"] = False
    succeeded(work(made, tmp_path / "run", before=BLIND))


# --- steps that are left out, and steps that cannot be made -----------------------------------------------------------

#: The third step's loss is called a spike, whatever it is. When a loss is one is test_metrics.py's.
THIRD = """
from smolconv.continual_pretraining.watch.spikes import SpikeDetector
SpikeDetector.is_spike = lambda self, loss: len(self._window) == 2 and not self._above
"""
#: One of each way in which DeepSpeed steps, with and without other ranks; stages 1 and 2 have the same optimizer.
SKIPPING = [
    (0, "float32", 2), (2, "bfloat16", 1), (3, "bfloat16", 2),
    *(pytest.param(stage, "float32", 1, marks=pytest.mark.matrix) for stage in (0, 1, 2, 3)),
    *(pytest.param(stage, "bfloat16", 1, marks=pytest.mark.matrix) for stage in (0, 1, 3)),
]  # fmt: skip


def state_of(folder: Path) -> dict[tuple[str, str], bytes]:
    """Weights and Adam's state of a checkpoint, bit for bit."""
    found = read_checkpoint(folder)
    tensors = {
        (slot.value, name): tensor.numpy().tobytes()
        for slot, of in found.tensors.items()
        for name, tensor in of.items()
    }
    return tensors | {("step", name): bytes(int(step)) for name, step in found.optimizer.steps.items()}


@pytest.mark.parametrize(("stage", "dtype", "ranks"), SKIPPING)
def test_a_skipped_spike_leaves_weights_and_adam_alone(stage, dtype, ranks, tokens, tmp_path):
    batch = {
        "micro_batch_sequences": 1,
        "global_batch_sequences": 1 if (stage, dtype) == (0, "bfloat16") else 2 * ranks,
    }
    made = recipe_document(
        NANOTRON, tokens, model={"dtype": dtype}, parallelism={"zero_stage": stage, **batch},
        checkpoints={"every_steps": 1}, spikes={"action": "skip"},
    )  # fmt: skip
    run = tmp_path / "run"
    succeeded(work(made, run, ranks, before=THIRD))
    states = [state_of(step_folder(run, step)) for step in (1, 2, 3, 4)]
    assert states[1] == states[2]
    assert states[0] != states[1] and states[2] != states[3]
    assert [line.get("skipped", False) for line in metrics(run)] == [False, False, True, False]
    spikes = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(line["step"], "skipped" in line["text"]) for line in spikes if line["kind"] == "spike"] == [(3, True)]
    assert RunState.read(latest(run)).skipped_steps == 1
    assert [line["tokens"] for line in metrics(run)] == [
        LENGTH * batch["global_batch_sequences"] * step for step in (1, 2, 3, 4)
    ]


def test_a_spike_that_is_only_logged_is_trained_on(tokens, tmp_path):
    made = recipe_document(NANOTRON, tokens, parallelism=TWO, checkpoints={"every_steps": 1})
    succeeded(work(made, tmp_path / "run", before=THIRD))
    assert state_of(step_folder(tmp_path / "run", 2)) != state_of(step_folder(tmp_path / "run", 3))
    assert '"spike"' in (tmp_path / "run" / "events.jsonl").read_text()
    assert not any("skipped" in line for line in metrics(tmp_path / "run"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_names_its_documents_and_saves_nothing(ranks, tmp_path):
    """The source's embedding of one token is NaN, and that token stands in one known document."""
    model = hf_models.llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("nan")
    source = hf_models.saved(model, tmp_path / "source")
    folder, run = token_folder(tmp_path / "books", vocabulary=63, documents=60), tmp_path / "run"
    path = folder / "00000_unshuffled.ds"
    ids, ends = np.fromfile(path, "<u2"), np.fromfile(folder / "00000_unshuffled.ds.index", "<u8").astype(int)
    first = 10 * (LENGTH + 1)  # of the third row of step 3
    at = next(place for place in range(first + 3, first + 20) if ids[place] != EOS)
    whole = ids.copy()
    ids[at] = 63
    ids.tofile(path)
    made = recipe_document(source, folder, checkpoints={"every_steps": 1})
    ended = work(made, run, ranks)
    assert ended.code == 6
    document = int(np.searchsorted(ends, at, side="right"))
    assert "the loss of step 3 is not finite" in ended.message
    assert f"micro-batch 2: books: {path}, tokens {first} to {first + LENGTH}, documents " in ended.message
    low, high = map(int, ended.message.split(", documents ")[1].split("\n")[0].split(" to "))
    assert low <= document <= high
    assert "micro-batch 0" not in ended.message and "micro-batch 1:" not in ended.message
    assert saved_steps(run) == [1, 2] and latest(run).name == "step-2"
    assert [line["step"] for line in metrics(run)] == [1, 2]
    whole.tofile(path)
    succeeded(work(made, run, ranks))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


GRADIENTS = """
from smolconv.continual_pretraining.engine import model
import torch
cross = model._ChunkedCrossEntropy.backward
seen = []
def backward(ctx, scale):
    seen.append(1)
    hidden, weight, none = cross(ctx, scale)
    return (hidden * float("inf") if len(seen) == 5 else hidden), weight, none
model._ChunkedCrossEntropy.backward = staticmethod(backward)
"""


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float32")])
def test_gradients_that_are_not_finite_stop_the_run_before_they_are_used(stage, dtype, tokens, tmp_path):
    made = recipe_document(
        NANOTRON, tokens, model={"dtype": dtype}, parallelism={"zero_stage": stage, **TWO},
        checkpoints={"every_steps": 1},
    )  # fmt: skip
    ended = work(made, tmp_path / "run", before=GRADIENTS)
    assert ended.code == 6 and "gradients of step 3 are not finite" in ended.message
    assert saved_steps(tmp_path / "run") == [1, 2] and len(metrics(tmp_path / "run")) == 2


# --- evaluation, and the mean over tokens -----------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_held_out_targets(tokens, tmp_path):
    """3 rows over 2 ranks: one of them has none left in the second turn."""
    held_out, run = token_folder(tmp_path / "held-out", seed=7), tmp_path / "run"
    made = recipe_document(
        NANOTRON, tokens, parallelism={"zero_stage": 3}, export={"formats": ["hf"]},
        evaluation={"every_steps": 2, "sequences": 3, "sources": [{"path": str(held_out)}]},
    )  # fmt: skip
    succeeded(work(made, run, 2))
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found = {line["step"]: line["losses"]["held-out"] for line in lines if line["kind"] == "evaluation"}
    assert list(found) == [0, 2, 4]
    before = transformers_model(NANOTRON, tmp_path / "hf")
    assert found[0] == pytest.approx(mean_loss(before, [window(held_out, number) for number in range(3)]), abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "hf", attn_implementation="eager").eval()
    assert found[4] == pytest.approx(mean_loss(model, [window(held_out, number) for number in range(3)]), abs=1e-5)


def test_a_signal_during_evaluation_saves_and_ends_with_75(tokens, tmp_path):
    run = tmp_path / "run"
    made = recipe_document(
        NANOTRON, tokens, parallelism=TWO,
        evaluation={"every_steps": 2, "sources": [{"path": str(tokens)}]},
    )  # fmt: skip
    interrupt = f"""
from smolconv.continual_pretraining.run import trainer
import os
import re
batches = trainer.evaluation_batches
calls = []
def interrupted(*given):
    calls.append(1)
    for number, batch in enumerate(batches(*given)):
        if len(calls) == 2:  # after step 2; the first is before step 1
            assert number < 2, "went on"
        if len(calls) == 2 and number == 1:
            os.kill(os.getpid(), {int(signal.SIGTERM)})
        yield batch
trainer.evaluation_batches = interrupted
"""
    assert work(made, run, before=interrupt).code == 75
    assert saved_steps(run) == [2] and [line["step"] for line in metrics(run)] == [1, 2]
    succeeded(work(made, run))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


def test_the_mean_over_tokens_does_not_depend_on_the_micro_batch(tokens, tmp_path):
    model = transformers_model(NANOTRON, tmp_path / "hf")
    found = {}
    for size, ranks, stage in ((1, 1, 0), (2, 2, 1), (4, 1, 3)):
        run = tmp_path / f"run-{size}"
        made = recipe_document(
            NANOTRON, tokens, loss={"normalisation": "tokens"}, schedule={"warmup_steps": 1},
            parallelism={"micro_batch_sequences": size, "zero_stage": stage},
        )  # fmt: skip
        succeeded(work(made, run, ranks))
        found[size] = losses(run)
    assert found[1][0] == pytest.approx(mean_loss(model, [window(tokens, number) for number in range(4)]), abs=1e-5)
    assert found[2] == pytest.approx(found[1], abs=1e-5) and found[4] == pytest.approx(found[1], abs=1e-5)
    made = recipe_document(NANOTRON, tokens, schedule={"warmup_steps": 1})
    succeeded(work(made, tmp_path / "means"))
    assert np.abs(np.array(losses(tmp_path / "means")) - found[1]).max() > 1e-4  # the control: a mean of means


# --- sources ----------------------------------------------------------------------------------------------------------

GOES_ON = {"schedule": {"train_steps": 6}, "start": {"optimizer": True, "learning_rate": True}, "parallelism": TWO}


def sources(folder: Path) -> Iterator[tuple[str, Path]]:
    """The nanotron folder in the other layouts, with its optimizer and progress."""
    for name, to, options in (
        ("sidecar", "hf", {"optimizer": True}), ("universal", "deepspeed", {}),
        ("zero1", "deepspeed", {"zero_stage": 1, "world_size": 3}),
        ("zero3", "deepspeed", {"zero_stage": 3, "world_size": 2}), ("one rank", "nanotron", {}),
    ):  # fmt: skip
        convert(NANOTRON, folder / name, to, **options)
        yield name, folder / name


def test_every_layout_starts_the_same_run(tokens, tmp_path):
    succeeded(work(recipe_document(NANOTRON, tokens, **GOES_ON), tmp_path / "run"))
    expected = [(line["step"], line["loss"]) for line in metrics(tmp_path / "run")]
    assert [step for step, _ in expected] == [4, 5, 6]
    for name, source in sources(tmp_path):
        run = tmp_path / f"run-{name}"
        succeeded(work(recipe_document(source, tokens, **GOES_ON), run))
        assert [(line["step"], line["loss"]) for line in metrics(run)] == expected, name


def test_without_its_optimizer_a_source_begins_at_step_1_in_every_layout(tokens, tmp_path):
    found = {}
    for name, source in (("nanotron", NANOTRON), *sources(tmp_path)):
        if name in ("nanotron", "sidecar", "zero3"):
            run = tmp_path / f"run-{name}"
            made = recipe_document(source, tokens, parallelism=TWO, schedule={"train_steps": 3, "warmup_steps": 0})
            succeeded(work(made, run))
            found[name] = [(line["step"], line["loss"]) for line in metrics(run)]
    assert found["nanotron"] == found["sidecar"] == found["zero3"]
    assert [step for step, _ in found["nanotron"]] == [1, 2, 3]


# --- a run's checkpoint, its export, and going on from it -------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    made = recipe_document(NANOTRON, tokens, parallelism={"zero_stage": 2, **TWO}, checkpoints={"every_steps": 2})
    succeeded(work(made, run))
    return run


def test_inspect_knows_a_runs_checkpoint(trained):
    done = run_cli("inspect", trained / "checkpoints", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["layout"], found["architecture"], found["has_optimizer"]) == ("deepspeed", "smollm3", True)
    assert found["topology"]["zero_stage"] == 2
    assert (found["progress"]["step"], found["progress"]["consumed_tokens"]) == (4, 4 * 2 * LENGTH)


@pytest.mark.parametrize("layout", ["hf", "nanotron"])
def test_a_run_goes_on_from_its_checkpoint_in_another_layout_as_if_never_stopped(layout, trained, tokens, tmp_path):
    """Weights, Adam, schedule and place in the data, through ``convert``."""
    source = tmp_path / layout
    convert(step_folder(trained, 2), source, layout, **({"optimizer": True} if layout == "hf" else {}))
    before, after = read_checkpoint(step_folder(trained, 2)), read_checkpoint(source)
    assert (after.progress.step, after.progress.stages) == (2, before.progress.stages)
    assert after.optimizer.steps == before.optimizer.steps
    made = recipe_document(
        source, tokens, parallelism={"zero_stage": 2, **TWO},
        start={"optimizer": True, "learning_rate": True, "data": True},
    )  # fmt: skip
    succeeded(work(made, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(trained)[2:]
    assert [line["tokens"] for line in metrics(tmp_path / "run")] == [line["tokens"] for line in metrics(trained)[2:]]


def engine_weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: to_torch(tensor).clone() for name, tensor in read_checkpoint(latest(run)).parameters.items()}


def test_an_export_equals_the_engines_weights(trained, tmp_path):
    both = Export(formats=("hf", "nanotron"), optimizer=True)
    said = export_run(both, tmp_path, latest(trained), engine_weights(trained))
    assert all("equal to the engine's" in line for line in said) and len(said) == 2
    assert read_checkpoint(tmp_path / "export" / "nanotron").progress.step == 4
    assert read_checkpoint(tmp_path / "export" / "hf").has_optimizer
    export_run(both, tmp_path, latest(trained), engine_weights(trained))  # again, in the place of the first


def test_an_export_that_is_not_what_the_engine_holds_is_refused(trained, tmp_path):
    held = engine_weights(trained)
    flipped = held["model.layers.3.mlp.up_proj.weight"].view(-1).view(torch.int32)
    flipped[5] ^= 1  # the lowest bit of one weight
    with pytest.raises(ParityFailed, match=r"model\.layers\.3\.mlp\.up_proj\.weight differs from the engine"):
        export_run(Export(), tmp_path, latest(trained), held)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["hf.failed"]


def test_a_run_that_is_done_exports_again_without_a_step(trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    made = recipe_document(
        NANOTRON, tokens, parallelism={"zero_stage": 2, **TWO}, export={"formats": ["nanotron"]},
    )  # fmt: skip
    ended = work(made, run)
    succeeded(ended)
    assert "all 4 steps are done" in ended.log and "exported" in ended.log
    assert losses(run) == losses(trained)


# --- what a run remembers ---------------------------------------------------------------------------------------------


def test_a_runs_state_reads_back_as_written(tmp_path):
    state = RunState(
        step=7, position={"step": 7, "stages": []}, zero_stage=2, world_size=4, dtype="bfloat16",
        micro_batch_sequences=2, global_batch_sequences=16, spikes={"losses": [1.5], "spikes": []}, skipped_steps=3,
    )  # fmt: skip
    state.write(tmp_path)
    assert RunState.read(tmp_path) == state
    assert json.loads((tmp_path / "trainer.json").read_text())["schema"] == 1


@pytest.mark.parametrize("content", ['{"schema": 1, "step": 3', '{"schema": 1, "step": 3}', "[]"])
def test_a_state_that_is_not_whole_is_corrupt(content, tmp_path):
    (tmp_path / "trainer.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"trainer\.json"):
        RunState.read(tmp_path)


STATE: dict[str, Any] = {
    "schema": 1, "step": 7, "zero_stage": 2, "world_size": 4, "dtype": "bfloat16", "micro_batch_sequences": 2,
    "global_batch_sequences": 16, "spikes": {"losses": [1.5], "spikes": []}, "skipped_steps": 3, "manifest": True,
    "position": {"step": 7, "stages": [
        {"name": "a", "start_step": 1, "sequence_length": 32, "sources": [
            {"path": "p", "name": "n", "weight": 1.0, "samples": 5}, {"path": "q", "name": "m", "weight": None, "samples": 0},
        ]},
    ]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((), 1 << 200, "a number of 61 digits"),
        (("step",), True, "step is True, expected a count"),
        (("micro_batch_sequences",), -1, "micro_batch_sequences is -1"),
        (("global_batch_sequences",), "x" * 9999, "global_batch_sequences is 'xxx"),
        (("dtype",), ["bfloat16"], r"dtype \['bfloat16'\]"),
        (("manifest",), 1, "manifest 1 is not valid"),
        (("position",), [], r"position is \[\], expected an object"),
        (("position",), {}, "position has no step, expected a count"),
        (("position", "step"), 2**63, "position.step is 9223372036854775808"),
        (("position", "stages"), {}, r"position.stages is \{\}, expected a list"),
        (("position", "stages", 0), 7, r"position.stages\[0\] is 7, expected an object"),
        (("position", "stages", 0, "sequence_length"), 0, "sequence_length is 0, expected a positive count"),
        (("position", "stages", 0, "sources"), None, "sources is None, expected a list"),
        (("position", "stages", 0, "sources", 1, "samples"), -5, r"sources\[1\].samples is -5, expected a count"),
        (("position", "stages", 0, "sources", 0, "samples"), 1.5, r"sources\[0\].samples is 1.5, expected a count"),
        (("position", "stages", 0, "sources", 0, "path"), 3, r"sources\[0\].path is 3, expected text"),
        (("position", "stages", 0, "sources", 0, "weight"), 0, "weight is 0, expected a positive number or null"),
        (("position", "restarted"), {"p": -1}, r"position.restarted is \{'p': -1\}, expected tokens by path"),
        (("token_files",), [], "token_files is not an object of folders"),
        (("token_files",), {"p": 1}, "token_files is not an object of folders"),
        (("token_files",), {"p": {"a.ds": [5, "x", None]}}, r"has \[5, 'x', None\] for 'a.ds' in 'p'"),
        (("token_files",), {"p" * 999: {"a" * 999: [5, 7, None, None]}}, r"has \[5, 7, None, None\] for 'aaa"),
        (("schedule",), {"train_steps": -1}, r"schedule is \{'train_steps': -1\}, expected a recipe's"),
        (("spikes",), [], "spikes.losses is None, expected a list of finite numbers"),
        (("spikes", "spikes"), [1.0, "2"], "spikes.spikes is"),
        (("spikes", "losses"), [10**39, None], "spikes.losses is"),
    ],
)
def test_a_field_of_a_state_that_cannot_be_is_named_with_what_was_expected(place, value, said, tmp_path):
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps(STATE))
    assert RunState.read(tmp_path).position == STATE["position"]  # control
    document: Any = json.loads(json.dumps(STATE)) if place else {**STATE, "step": value}
    below = document
    for key in place[:-1]:
        below = below[key]
    if place:
        below[place[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptFile, match=said) as caught:
        RunState.read(tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_a_state_of_brackets_or_a_pipe_is_corrupt(tmp_path):
    (tmp_path / "trainer.json").write_text("[" * 3000 + "]" * 3000)
    with pytest.raises(CorruptFile, match="nested more than 64 deep"):
        RunState.read(tmp_path)
    (tmp_path / "trainer.json").unlink()
    os.mkfifo(tmp_path / "trainer.json")
    with pytest.raises(CorruptFile, match="is a named pipe"):
        RunState.read(tmp_path)


def test_resume_takes_a_step_another_run_or_the_newest(trained, tmp_path):
    newest, older = step_folder(trained, 4), step_folder(trained, 2)
    assert find_resume(trained, "never") is None
    assert find_resume(trained, "auto") == newest
    assert find_resume(tmp_path, "auto") is None
    assert find_resume(tmp_path, str(older)) == older
    assert find_resume(tmp_path, str(trained)) == newest
    with pytest.raises(MissingFile, match="step-N"):
        find_resume(tmp_path, str(tmp_path / "nowhere"))


def test_resuming_an_older_step_repeats_what_followed_it(trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    made = recipe_document(NANOTRON, tokens, parallelism={"zero_stage": 2, **TWO}, checkpoints={"every_steps": 2})
    succeeded(work(made, run, resume=str(step_folder(run, 2))))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert losses(run) == losses(trained)


def test_groups_of_the_engine_hold_every_parameter_of_the_model(trained):
    found = read_checkpoint(latest(trained))
    grouped = [name for group in found.optimizer.groups for name in group.names]
    assert sorted(grouped) == sorted(parameter_shapes(found.spec))
    assert [group.hyperparameters["weight_decay"] for group in found.optimizer.groups] == [0.1, 0.0]
