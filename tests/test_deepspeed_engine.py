"""What is written is loaded by the real ``deepspeed.initialize(...).load_checkpoint()``, which continues training from it.

Each world size is one start of DeepSpeed's processes, whose jobs all tests below look at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from real_deepspeed import (
    Group,
    Job,
    Moments,
    Result,
    Trained,
    assert_fp32_noise,
    assert_same_state,
    continue_with_deepspeed,
    plain_adamw,
    random_batches,
)
from safetensors.torch import load_file

from smolconv.checkpoint import MOMENTS, Checkpoint, Slot
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.forward import to_torch

pytest.importorskip("deepspeed")

NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
NANOTRON_BF16 = FIXTURES / "nanotron" / "smollm3-tiny-bf16" / "tp2-pp1-dp1-zero0"
WEIGHTS = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf"
#: Written by DeepSpeed with a frozen embedding (so the tied head is frozen too), norms and a projection.
FROZEN = FIXTURES / "deepspeed" / "zero1-frozen-ws2"
STEPS, ROWS = 3, 6
#: With zero moments Adam divides a gradient by its own size, so at eps 1e-8 the rounding of tiny gradients would decide.
EPS_OF_WEIGHTS_ALONE = 1e-4
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A source and the form that it is written in; ``engine`` is the stage that loads it."""

    source: str  #: a key of ``SOURCES``
    engine: int
    universal: bool = False
    bf16_optimizer: bool = False
    rounded: bool = False  #: the source's weights are fp32, and the engine computes in bf16

    @property
    def name(self) -> str:
        form = ("rounded-" if self.rounded else "") + ("universal" if self.universal else f"zero{self.engine}")
        return f"{self.source}-{form}-into-{'bf16optimizer' if self.bf16_optimizer else self.engine}"


CASES = (
    *(Case(source="nanotron", engine=stage) for stage in (0, 1, 2, 3)),
    *(Case(source="nanotron", engine=stage, universal=True) for stage in (1, 2, 3)),
    *(Case(source="hf", engine=stage) for stage in (1, 2, 3)),
    *(Case(source="hf", engine=stage, universal=True) for stage in (1, 3)),
    Case(source="hf", engine=2, rounded=True),
    Case(source="hf", engine=1, universal=True, rounded=True),
    *(Case(source="nanotron-bf16", engine=stage) for stage in (0, 1, 2, 3)),
    *(Case(source="nanotron-bf16", engine=stage, universal=True) for stage in (1, 2, 3)),
    Case(source="nanotron-bf16", engine=1, bf16_optimizer=True),
    *(Case(source="frozen", engine=stage) for stage in (0, 1, 2, 3)),
)
SOURCES: Mapping[str, Path] = {
    "nanotron": NANOTRON,
    "nanotron-bf16": NANOTRON_BF16,
    "hf": WEIGHTS,
    "frozen": FROZEN / "checkpoint",
}


#: One of each kind; `make test-matrix` has all of them.
MAIN = (
    "nanotron-zero1-into-1", "nanotron-zero2-into-2", "nanotron-zero3-into-3", "nanotron-universal-into-3",
    "hf-zero1-into-1", "hf-zero3-into-3", "hf-universal-into-1", "hf-rounded-zero2-into-2",
    "nanotron-bf16-zero0-into-0", "nanotron-bf16-zero3-into-3", "nanotron-bf16-universal-into-2",
    "nanotron-bf16-universal-into-3", "nanotron-bf16-zero1-into-bf16optimizer", "frozen-zero1-into-1", "frozen-zero3-into-3",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Start:
    """The state that training continues from, in torch, and the groups of a training script that knows the recipe."""

    config: Path
    masters: Mapping[str, torch.Tensor]
    moments: Moments
    step: float
    groups: tuple[Group, ...]
    progress: int
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)


def start_of(source: str, tmp: Path) -> Start:
    """nanotron's own state, DeepSpeed's live engine's, and for weights alone zero moments."""
    if source == "frozen":
        masters, *moments = (
            load_file(FROZEN / "expected" / f"{n}.safetensors") for n in ("fp32", *(slot.value for slot in MOMENTS))
        )
        meta = json.loads((FROZEN / "expected" / "meta.json").read_text())
        groups = tuple(
            Group(names=tuple(names), weight_decay=group["weight_decay"], lr=group["lr"])
            for names, group in zip(meta["param_group_names"], meta["param_groups"])
        )
        return Start(
            config=FROZEN / "config.json",
            masters={name: tensor for name, tensor in masters.items() if name in moments[0]},
            moments=Moments(*moments), step=meta["step"], groups=groups, progress=meta["step"],
            frozen={name: masters[name] for name in meta["frozen"]},
        )  # fmt: skip
    if source == "hf":
        masters = {name: tensor.float() for name, tensor in hf_weights(WEIGHTS).items()}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in masters.items()}
        rest = tuple(name for name in masters_in_order(masters, WEIGHTS / "config.json") if name != EMBEDDING)
        groups = (
            Group(names=rest, weight_decay=0.1, eps=EPS_OF_WEIGHTS_ALONE),
            Group(names=(EMBEDDING,), eps=EPS_OF_WEIGHTS_ALONE),
        )
        return Start(
            config=WEIGHTS / "config.json", masters=masters, moments=Moments(zeros, zeros), step=0, groups=groups,
            progress=0,
        )  # fmt: skip
    checkpoint = read_checkpoint(SOURCES[source])
    config = tmp / f"{source}.json"
    if not config.exists():
        convert(SOURCES[source], tmp / f"{source}-hf", "hf", optimizer=False)
        config.write_text((tmp / f"{source}-hf" / "config.json").read_text())
    assert checkpoint.optimizer is not None
    # nanotron's first parameter is the undecayed embedding, so its group comes first.
    rest = tuple(name for name in checkpoint.parameters if name != EMBEDDING)
    groups = tuple(
        Group(
            names=names, **{key: checkpoint.optimizer.hyperparameters(names[0])[key] for key in ("weight_decay", "lr")}
        )
        for names in ((EMBEDDING,), rest)
    )
    assert checkpoint.progress is not None
    return Start(
        config=config,
        masters={name: tensor.float() for name, tensor in torch_tensors(checkpoint, Slot.MASTER).items()},
        moments=Moments(*(torch_tensors(checkpoint, slot) for slot in MOMENTS)),
        step=checkpoint.optimizer.steps[EMBEDDING],
        groups=groups,
        progress=checkpoint.progress.step,
    )


def masters_in_order(masters: Mapping[str, Any], config: Path) -> list[str]:
    """By ``named_parameters`` of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    return [name for name, _ in model.named_parameters() if name in masters]


def torch_tensors(checkpoint: Checkpoint, slot: Slot) -> dict[str, torch.Tensor]:
    found = checkpoint.tensors.get(slot) or checkpoint.parameters
    return {name: to_torch(tensor) for name, tensor in found.items()}


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Start, Result]]:
    """Every case, converted for this world size, loaded, trained for three steps and saved again."""
    (ranks, cases), tmp = request.param, tmp_path_factory.mktemp("engine")
    starts = {source: start_of(source, tmp) for source in SOURCES}
    jobs = []
    groups_file = tmp / "groups.json"
    groups_file.write_text(
        json.dumps([{"regex": "^(?!model.embed)", "weight_decay": 0.1, "lr": 1e-3, "eps": EPS_OF_WEIGHTS_ALONE},
                    {"names": [EMBEDDING], "weight_decay": 0.0, "lr": 1e-3, "eps": EPS_OF_WEIGHTS_ALONE}])
    )  # fmt: skip
    for case in cases:
        start = starts[case.source]
        written = tmp / case.name
        form: dict[str, Any] = (
            {} if case.universal
            else {"zero_stage": case.engine, "world_size": ranks if case.engine else None}
        )  # fmt: skip
        if case.source == "hf":
            form["groups"] = groups_file
        if case.source == "frozen":
            form["config"] = start.config
        if case.rounded:
            form["dtype"] = "bfloat16"
        convert(SOURCES[case.source], written, "deepspeed", **form)
        bf16 = case.rounded or case.source == "nanotron-bf16"
        jobs.append(
            Job(
                config=start.config, stage=case.engine, groups=start.groups, frozen=tuple(start.frozen), dtype="bf16" if bf16 else "fp32",
                bf16_optimizer=case.bf16_optimizer, checkpoint=written, universal=case.universal,
                # After a universal load ZeRO-3's sub-groups share one step; docs/deepspeed.md says what to do.
                set_groups=case.universal and case.engine == 3,
                batches=random_batches(start.config, steps=STEPS, rows=ROWS), save=tmp / f"saved-{case.name}",
                scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2}}
                if case.source == "nanotron-bf16" else None,
            )
        )  # fmt: skip
    results = continue_with_deepspeed(jobs, ranks, tmp)
    return {case.name: (starts[case.source], result) for case, result in zip(cases, results)}


@pytest.fixture(scope="module")
def plain(world: dict[str, tuple[Start, Result]]) -> dict[str, Trained]:
    """The three steps of ``world`` in plain PyTorch, by source: they are the same for every stage and form."""
    found = {}
    for source in ("nanotron", "hf"):
        start, result = world[f"{source}-zero1-into-1"]
        ranks = 2 if "ws2" in str(result.folder) else 3
        batches = random_batches(start.config, steps=STEPS, rows=ROWS)
        found[source] = plain_adamw(
            start.config, start.masters, *start.moments, start.step, start.groups, batches, micro_batches=ranks
        )
    return found


def named(cases: Sequence[Case]) -> Any:
    """These cases in each world that has them."""
    worlds = [
        pytest.param(world, case.name, id=f"{name}-{case.name}", marks=marks)
        for name, world, marks in WORLDS for case in cases if case in world[1]
    ]  # fmt: skip
    return pytest.mark.parametrize(("world", "name"), worlds, indirect=["world"], scope="module")


WORLDS: Sequence[tuple[str, tuple[int, tuple[Case, ...]], Any]] = (
    ("ws3", (3, tuple(case for case in CASES if case.name in MAIN)), ()),
    ("ws2", (2, CASES), pytest.mark.matrix),
    ("ws3-all", (3, CASES), pytest.mark.matrix),
)


@named(CASES)
def test_the_engine_holds_the_sources_masters_moments_and_steps(
    world: dict[str, tuple[Start, Result]], name: str
) -> None:
    start, result = world[name]
    assert_same_state(result.before, Trained([], start.masters, start.moments))
    assert result.before.adam_steps == [start.step] * len(start.groups)
    assert result.before.state["global_steps"] == start.progress


@named(CASES)
def test_the_weights_of_the_forward_pass_are_the_rounded_masters(
    world: dict[str, tuple[Start, Result]], name: str
) -> None:
    start, result = world[name]
    module = {key: value for key, value in result.before.module.items() if key in start.masters}
    assert module.keys() == start.masters.keys()
    assert all(torch.equal(tensor, start.masters[key].to(tensor.dtype)) for key, tensor in module.items())


@named(CASES)
def test_the_groups_are_those_of_the_recipe(world: dict[str, tuple[Start, Result]], name: str) -> None:
    start, result = world[name]
    for group, found in zip(start.groups, result.before.param_groups, strict=True):
        assert found["weight_decay"] == group.weight_decay
        assert tuple(found["betas"]) == group.betas and found["eps"] == group.eps


@named([case for case in CASES if case.source == "frozen"])
def test_frozen_weights_are_loaded_and_stay(world: dict[str, tuple[Start, Result]], name: str) -> None:
    start, result = world[name]
    for weights in (result.before.module, result.after.module):
        assert all(torch.equal(weights[key], tensor) for key, tensor in start.frozen.items())


@named([case for case in CASES if case.source not in ("nanotron-bf16", "frozen") and not case.rounded])
def test_three_more_steps_are_those_of_plain_adamw(
    world: dict[str, tuple[Start, Result]], plain: dict[str, Trained], name: str
) -> None:
    start, result = world[name]
    assert_fp32_noise(result, plain[name.split("-", maxsplit=1)[0]])
    moved = [key for key in start.masters if not torch.equal(result.after.masters[key], start.masters[key])]
    assert len(moved) == len(start.masters)


@named([case for case in CASES if case.source == "nanotron-bf16"])
def test_the_schedule_goes_on_from_the_sources_step(world: dict[str, tuple[Start, Result]], name: str) -> None:
    start, result = world[name]
    assert result.before.state["lr_scheduler"] == {"last_batch_iteration": start.progress - 1}
    assert result.after.state["lr_scheduler"] == {"last_batch_iteration": start.progress - 1 + STEPS}
    assert result.after.state["global_steps"] == start.progress + STEPS


#: ZeRO-0 saves no names, and which parameters are frozen cannot be told from fp32 shapes.
@named([case for case in CASES if (case.source, case.engine) != ("frozen", 0)])
def test_what_the_engine_saves_after_loading_is_read_back_as_it_holds_it(
    world: dict[str, tuple[Start, Result]], name: str
) -> None:
    start, result = world[name]
    assert result.job.save is not None
    (result.job.save / "config.json").write_text(start.config.read_text())
    saved = read_checkpoint(result.job.save)
    assert saved.progress is not None and saved.progress.step == start.progress + STEPS
    for slot, tensors in zip(
        (Slot.MASTER, *MOMENTS), (result.after.masters, result.after.exp_avg, result.after.exp_avg_sq)
    ):
        found = {key: tensor for key, tensor in torch_tensors(saved, slot).items() if key not in start.frozen}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key].float(), tensors[key]) for key in tensors)


@named([case for case in CASES if case.name == "nanotron-zero1-into-1"])
def test_a_swapped_pair_of_masters_would_be_seen(world: dict[str, tuple[Start, Result]], name: str) -> None:
    start, result = world[name]
    a, b = (f"model.layers.{i}.mlp.gate_proj.weight" for i in (0, 1))
    swapped = {**start.masters, a: start.masters[b], b: start.masters[a]}
    with pytest.raises(AssertionError, match="masters differ"):
        assert_same_state(result.before, Trained([], swapped, start.moments))


def test_batches_are_not_all_one_token() -> None:
    assert len(np.unique(random_batches(WEIGHTS / "config.json", steps=1, rows=2))) > 10
