"""smolconv plan: what fits a number of GPUs, the fastest first, beside what was published."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import pytest
import yaml
from conftest import Finished, run_cli
from test_cli import modules_after
from training import recipe_document, token_folder

from smolconv.continual_pretraining.engine.config import accumulation_steps, engine_config
from smolconv.continual_pretraining.estimate import speed
from smolconv.continual_pretraining.estimate.hardware import GPUS, H100, find_gpu, peak_flops
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.estimate.plan import Option, Plan, divisions_that_fit
from smolconv.continual_pretraining.recipe.files import load_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import plan as published  # noqa: E402

NETWORK = 50e9


def found(gpus: int, *changes: str, recipe: str = "smollm3-3b-stable", **options: Any) -> Plan:
    given = load_recipe(recipe, changes)
    return divisions_that_fit(given, published.SMOLLM3, gpus, H100, **{"network": NETWORK, **options})


def as_planned(option: Option, recipe: str = "smollm3-3b-stable", *changes: str) -> Recipe:
    """The recipe that the option's words make, checked as continue-train checks it."""
    words = list(option.words)
    sets = [value for word, value in itertools.pairwise(words) if word == "--set"]
    return load_recipe(recipe, [*changes, *sets])


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", published.PUBLISHED, ids=lambda run: run.name)
def test_published_runs_are_predicted(run):
    """Within a quarter; SmolLM3's figure has all downtime in it, and only bounds from below."""
    ratio = run.predicted() / run.tokens_per_second
    assert ratio > 0.75
    assert ratio < (1.5 if run.use == "lower bound" else 1.25)


def test_a_wrong_constant_would_be_noticed(monkeypatch):
    long = next(run for run in published.PUBLISHED if run.sequence_length == 32768)
    monkeypatch.setattr(speed, "ATTENTION_SHARE", 2 * speed.ATTENTION_SHARE)
    assert long.predicted() / long.tokens_per_second > 1.25


def seconds(gpus: int = 8, gpu: Any = H100, network: float = NETWORK, **changes: Any) -> dict[str, float]:
    given = load_recipe("smollm3-3b-stable", [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])
    return dict(speed.step_time(given, published.SMOLLM3, gpus, gpu, network).seconds_by_part)


def test_what_is_sent_takes_its_bytes_by_the_bandwidth():
    """SmolLM3-3B in ZeRO-1 on 8: 4 and 2 bytes of 7/8 of its parameters over NVLink; on 16, 15/16 over the network."""
    parameters, alone = 3_075_098_624, {"parallelism__sequence_ranks": 1}
    within, between = seconds(8, **alone), seconds(16, **alone)
    assert within["gradients and weights"] == pytest.approx(6 * parameters * 7 / 8 / (450e9 * speed.LINK_SHARE))
    assert between["gradients and weights"] == pytest.approx(6 * parameters * 15 / 16 / (NETWORK * speed.LINK_SHARE))
    slow = seconds(16, network=NETWORK / 2, **alone)
    assert slow["gradients and weights"] == pytest.approx(2 * between["gradients and weights"])
    assert seconds(8, network=NETWORK / 2, **alone) == within


def test_a_faster_gpu_computes_faster_and_checkpointing_computes_more():
    plain, again = seconds(), seconds(model__activation_checkpointing="true")
    faster = seconds(gpu=replace(H100, tflops=2 * H100.tflops))
    assert faster["attention"] == pytest.approx(plain["attention"] / 2)
    assert again["attention"] == pytest.approx(plain["attention"] * 9 / 7)
    assert plain["matrix products"] < again["matrix products"] < 4 / 3 * plain["matrix products"]


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [(), ("loss.normalisation=tokens",)])
def test_every_option_keeps_the_step_fits_and_is_what_its_words_make(changes):
    plan = found(96, *changes)
    assert len(plan.options) > 20
    for option in plan.options:
        made = as_planned(option, "smollm3-3b-stable", *changes)
        engine_config(made, 96, "nccl")  # which refuses what DeepSpeed cannot do
        groups = 96 // option.sequence_ranks
        assert option.micro_batch_sequences * option.accumulation_steps * groups == 576 == made.global_batch_sequences
        assert 16 % option.sequence_ranks == 0
        memory = memory_parts(made, published.SMOLLM3, 96)
        assert option.gpu_bytes == sum(part.bytes for part in memory if part.where == "gpu") <= H100.memory_bytes
        assert option.tokens_per_second * 96 * option.seconds_per_step == pytest.approx(576 * 4096)
    speeds = [option.tokens_per_second for option in plan.options]
    assert all(later < 1.01 * earlier for earlier, later in itertools.pairwise(speeds))
    sizes = {option.micro_batch_sequences for option in plan.options}
    assert (sizes == {3}) == (not changes)  # a mean of means of micro-batches changes with their size


def test_less_memory_leaves_less_and_nothing_says_what_it_lacks():
    all_, half = found(8), found(8, memory_bytes=40 * 10**9)
    assert {option.words for option in half.options} < {option.words for option in all_.options}
    none = found(8, memory_bytes=5 * 10**9)
    assert none.options == () and none.nearest is not None
    assert 5e9 < none.nearest.gpu_bytes <= min(option.gpu_bytes for option in all_.options)


def test_options_in_a_table_are_ever_smaller():
    options = list(found(8).smaller_and_smaller())
    sizes = [option.gpu_bytes for option in options]
    assert options[0] == found(8).options[0] and len(sizes) > 2
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize(
    ("recipe", "gpus", "near"),
    [("smollm3-3b-long-context-64k", 384, {288, 576}), ("smollm3-3b-stable", 7, {6, 8})],
)
def test_where_nothing_divides_the_nearest_numbers_are_named(recipe, gpus, near):
    plan = found(gpus, recipe=recipe)
    assert plan.options == () and plan.nearest is None and plan.reason is not None
    named = {int(number) for number in re.findall(r"(\d+) or (\d+) GPUs", plan.reason)[0]}
    assert named == near
    for number in near:
        assert found(number, recipe=recipe).options


def test_an_unusual_batch_ends_soon():
    plan = found(65_521, "parallelism.global_batch_sequences=1000003", "parallelism.micro_batch_sequences=1")
    assert plan.options == () and plan.reason is not None


def test_every_gpu_is_found_by_its_name_and_by_torchs():
    assert find_gpu("H200").tflops == 989
    names = {"a100-40gb": "NVIDIA A100-SXM4-40GB", "a100-80gb": "NVIDIA A100 80GB PCIe", "gh200": "NVIDIA GH200 480GB"}
    for gpu in GPUS:
        assert peak_flops(names.get(gpu.name, gpu.device)) == gpu.tflops * 1e12
        assert 20e9 < gpu.memory_bytes < 300e9 and 0.5e12 < gpu.memory_bandwidth < 1e13


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    source = hf_models.saved(hf_models.llama(), folder / "source")
    document = recipe_document(source, token_folder(folder / "tokens", vocabulary=64), model={"dtype": "bfloat16"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return folder / "recipe.yaml"


def plan(*words: object) -> Finished:
    return run_cli("plan", *words)


def test_the_table_has_a_command_that_can_be_pasted(recipe_file):
    done = plan(recipe_file, "--gpus", "2,4", "--gpu", "h100")
    assert done.code == 0, done.stderr
    assert "# 2 GPUs" in done.stdout and "# 4 GPUs" in done.stdout and "tokens/s a GPU" in done.stdout
    pasted = [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("smolconv continue-train")]
    assert len(pasted) == 2
    dry = run_cli(*pasted[1], "--dry-run", "--json")
    assert dry.code == 0, dry.stderr
    assert json.loads(dry.stdout)["world_size"] == 4


def test_json_has_all_options(recipe_file):
    done = plan(recipe_file, "--gpus", "1,3", "--json", "--memory", "70GB", "--network", "200")
    document = json.loads(done.stdout)
    assert (document["schema"], document["gpu"], document["memory_bytes"]) == (1, "h100", 70 * 10**9)
    one, three = document["plans"]
    assert one["gpus"] == 1 and len(one["options"]) > 5 and one["reason"] is None
    assert three["options"] == [] and "3 GPUs" in three["reason"]  # 4 sequences
    best = one["options"][0]
    assert sum(best["seconds_by_part"].values()) == pytest.approx(best["seconds_per_step"])


def test_nothing_that_fits_names_what_is_lacking(recipe_file):
    done = plan(recipe_file, "--gpus", "1", "--memory", "1GB")
    assert done.code == 0 and "Nothing fits" in done.stdout and "lacks" in done.stdout
    assert "smolconv continue-train" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "0"], "1 to 65,536"),
        (["--gpus", "-8"], "8,96,384"),
        (["--gpus", "1000000000"], "1 to 65,536"),
        (["--gpus", "9" * 40], "8,96,384"),
        (["--gpus", "8,8"], "twice"),
        (["--gpus", ""], "8,96,384"),
        (["--gpus", "eight"], "8,96,384"),
        ([], "--gpus"),
        (["--gpus", "8", "--gpu", "tpu"], "h100-nvl"),
        (["--gpus", "8", "--network", "0"], "--network"),
        (["--gpus", "8", "--network", "nan"], "--network"),
        (["--gpus", "8", "--memory", "much"], "--memory"),
        (["--gpus", "8", "--set", "parallelism.zero_stages=1"], "zero_stages"),
        (["--gpus", "2", "--set", "model.dtype=float32"], "bfloat16"),
    ],
)
def test_what_cannot_be_planned_ends_with_2(recipe_file, words, says):
    done = plan(recipe_file, *words)
    assert done.code == 2 and says in done.stderr, (done.code, done.stderr)


def test_an_unknown_recipe_ends_with_2():
    done = plan("smolm3-3b-stable", "--gpus", "8")
    assert done.code == 2 and "smollm3-3b-stable" in done.stderr


def test_a_plan_imports_no_torch(recipe_file):
    assert not modules_after("plan", recipe_file, "--gpus", "1", "--json") & {"torch", "transformers"}


def test_accumulation_is_the_engines(recipe_file):
    given = load_recipe(recipe_file)
    option = next(iter(divisions_that_fit(given, published.SMOLLM3, 2, H100, network=NETWORK).options))
    assert accumulation_steps(as_planned(option, str(recipe_file)), 2) == option.accumulation_steps
