"""Recipes: what ships, what is said about mistakes, overrides, and the translation of nanotron's configs."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import yaml
from conftest import FIXTURES, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from training import EOS, token_folder

from smolconv.continual_pretraining.recipe import schema
from smolconv.continual_pretraining.recipe.files import dump_recipe, load_recipe, notes, parse_recipe, shipped_recipes
from smolconv.continual_pretraining.recipe.json_schema import SCHEMA_FILE
from smolconv.continual_pretraining.recipe.nanotron import recipe_from_nanotron
from smolconv.continual_pretraining.recipe.schedules import DECAYS, Schedule, learning_rate
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError
from smolconv.layouts.nanotron.schedule import scheduled_lr

PAGE = Path(__file__).parent.parent / "docs/recipes.md"
PUBLISHED = FIXTURES / "recipes"
SMALL = """\
name: small
model:
  source: a
data:
  sequence_length: 512
  eos_token_id: 0
  stages:
  - name: only
    sources:
    - {path: tokens/a, weight: 0.25}
    - {path: tokens/b, weight: 0.75}
schedule:
  train_steps: 1_000
  peak_lr: 2e-4
parallelism:
  global_batch_sequences: 4
launch:
  slurm:
    time: 24:00:00
"""


def small(*overrides: str, **replaced: str) -> Recipe:
    text = SMALL
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return parse_recipe(text, "small.yaml", overrides)


def mistakes(text: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        parse_recipe(text, "small.yaml", overrides)
    return str(error.value)


# --- what ships ---------------------------------------------------------------------------------------------------

#: LR by number of completed steps, sequences and tokens a step: github.com/huggingface/smollm, text/pretraining.
PUBLISHED_FIGURES = {
    "smollm1-135m": ({0: 0, 2500: 1.5e-3, 5000: 3e-3, 500_000: 3e-3, 525_000: 1.5e-3, 600_000: 0}, 512, 1_048_576),
    "smollm1-360m": ({0: 0, 2500: 1.5e-3, 5000: 3e-3, 500_000: 3e-3, 525_000: 1.5e-3, 600_000: 0}, 512, 1_048_576),
    "smollm1-1.7b": ({0: 0, 1000: 2.5e-4, 2000: 5e-4, 400_000: 5e-4, 425_000: 2.5e-4, 500_000: 0}, 1024, 2_097_152),
    "smollm2-135m-stable": ({0: 0, 1000: 1.5e-3, 2000: 3e-3, 1_599_999: 3e-3}, 64 * 8, 1_048_576),
    "smollm2-135m-decay": ({1_599_999: 3e-3, 1_600_000: 3e-3, 1_800_000: 1.5e-3, 2_000_000: 0}, 64 * 8, 1_048_576),
    "smollm2-360m-stable": ({2000: 3e-3, 2_079_999: 3e-3}, 128 * 6, 1_572_864),
    "smollm2-360m-decay": ({2_080_000: 3e-3, 2_340_000: 1.5e-3, 2_600_000: 0}, 128 * 6, 1_572_864),
    "smollm2-1.7b-stable": ({2000: 5e-4, 4_715_999: 5e-4}, 256 * 4, 2_097_152),
    "smollm2-1.7b-decay": ({4_716_000: 5e-4, 4_978_000: 2.5e-4, 5_240_000: 0}, 256 * 4, 2_097_152),
    "smollm3-3b-stable": ({1000: 1e-4, 2000: 2e-4, 3_450_000: 2e-4, 4_197_999: 2e-4}, 3 * 192, 2_359_296),
    "smollm3-3b-decay": ({4_198_001: 2e-4, 4_459_001: 1e-4, 4_720_001: 0}, 3 * 192, 2_359_296),
    "smollm3-3b-long-context-32k": ({0: 0, 1000: 2e-5, 10_500: 1e-5, 20_000: 0}, 6 * 12, 2_359_296),
    "smollm3-3b-long-context-64k": ({0: 0, 1000: 2e-5, 11_500: 1e-5, 22_000: 0}, 3 * 12, 2_359_296),
    "finemath-cpt": ({0: 0, 3000: 5e-5, 130_000: 5e-5, 145_000: 2.5e-5, 160_000: 0}, 32 * 4 * 2, 1_048_576),
    "try-out": ({0: 0, 5: 2e-4, 10: 2e-4, 20: 1e-5}, 4, 1024),
}  # fmt: skip


def test_the_first_lines_of_every_shipped_recipe_say_what_must_be_put_where():
    for name, path in shipped_recipes().items():
        head = path.read_text().split("\nname:")[0]
        made = parse_recipe(path.read_text(), path.name)
        folders = [source.path for stage in made.data.stages for source in stage.sources]
        folders += [source.path for source in made.evaluation.sources] if made.evaluation else []
        assert str(made.model.source) in head and "smolconv tokenize TEXT" in head, name
        named = all(str(folder) in head for folder in folders)
        assert named or f"{len(set(folders))} folders data/NAME" in head, name


def test_every_shipped_recipe_has_its_published_figures_below():
    assert set(shipped_recipes()) == set(PUBLISHED_FIGURES)


@pytest.mark.parametrize("name", PUBLISHED_FIGURES)
def test_a_shipped_recipe_trains_at_the_published_rates_and_batch(name):
    recipe = load_recipe(name)
    rates, sequences, tokens = PUBLISHED_FIGURES[name]
    assert recipe.name == name and recipe.description
    assert (recipe.global_batch_sequences, recipe.tokens_per_step) == (sequences, tokens)
    assert {s: learning_rate(recipe.schedule, s) for s in rates} == pytest.approx(rates, abs=1e-12)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.optimizer.weight_decay == (0.1 if name.startswith("smollm3") else 0.01)


def test_only_smollm3_leaves_its_embedding_undecayed_and_masks_documents():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if name == "try-out":
            continue
        embedding = [p for p in recipe.optimizer.no_decay if re.match(p, "model.embed_tokens.weight")]
        norms = [p for p in recipe.optimizer.no_decay if re.match(p, "model.layers.0.input_layernorm.weight")]
        assert (bool(embedding), norms) == (name.startswith("smollm3"), [])
        assert recipe.data.mask_documents == (not name.startswith(("smollm1", "smollm2")))


def test_long_context_changes_theta_and_context_together():
    for name, theta, length in (("32k", 2e6, 32768), ("64k", 5e6, 65536)):
        recipe = load_recipe(f"smollm3-3b-long-context-{name}")
        assert (recipe.model.rope_theta, recipe.model.max_positions, recipe.data.sequence_length) == (
            theta,
            length,
            length,
        )


def test_the_published_weights_of_smollm3_are_all_there():
    stable, decay = load_recipe("smollm3-3b-stable"), load_recipe("smollm3-3b-decay")
    assert [len(stage.sources) for stage in (*stable.data.stages, *decay.data.stages)] == [41, 46, 56]
    assert [stage.start_step for stage in stable.data.stages] == [1, 3_450_001]
    sums = [sum(source.weight for source in stage.sources) for stage in (*stable.data.stages, *decay.data.stages)]
    assert sums == pytest.approx([1.0, 1.00005, 1.00565])
    assert any("1.00565 and were normalised" in note for note in notes(decay))
    assert all(sum(stage.weights) == pytest.approx(1) for stage in (*stable.data.stages, *decay.data.stages))


def test_the_try_out_runs_on_two_cpu_processes():
    recipe = load_recipe("try-out")
    assert (recipe.model.source, recipe.model.dtype) == ("smollm2-135m-nanotron", "float32")
    assert (recipe.parallelism.zero_stage, recipe.launch.ranks_per_node, recipe.schedule.train_steps) == (1, 2, 20)
    assert recipe.data.stages[0].names == ("jargon", "python-docs")
    assert recipe.export is not None and recipe.export.formats == ("hf",)


# --- reading -------------------------------------------------------------------------------------------------------


def test_numbers_and_words_are_read_as_people_write_them():
    recipe = small()
    assert (recipe.schedule.peak_lr, recipe.schedule.train_steps) == (2e-4, 1000)
    assert recipe.launch.slurm.time == "24:00:00"
    assert small("model.liger=on").model.liger == "on"
    assert small("start.gate=off").start.gate is False
    assert small("model.source=007").model.source == "007"
    # Negative control: this is what plain YAML 1.1 makes of them.
    assert yaml.safe_load("[2e-4, on, 24:00:00]") == ["2e-4", True, 86400]


def test_a_recipe_that_exports_nothing_says_so():
    assert [note for note in notes(small()) if "nothing is exported" in note and "`export: {}` writes hf" in note]
    assert small("export={}").export == schema.Export(formats=("hf",), verify=True)
    assert notes(small("export={}")) == []  # control


def test_weights_that_do_not_sum_to_one_are_normalised_and_said():
    assert notes(small("export={}")) == []
    recipe = small("export={}", "data.stages.0.sources.1.weight=2")
    assert recipe.data.stages[0].weights == pytest.approx((1 / 9, 8 / 9))
    assert notes(recipe) == ["data: stage 'only': the weights sum to 2.25 and were normalised: 0.1111, 0.8889."]


def test_relative_paths_stay_as_they_are_written(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    recipe = load_recipe(tmp_path / "small.yaml")
    assert (recipe.model.source, recipe.data.stages[0].sources[0].path) == ("a", "tokens/a")


@pytest.mark.parametrize("name", PUBLISHED_FIGURES)
def test_a_dumped_recipe_loads_equal(name):
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe), "dumped") == recipe


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("e-.:0123456789"), min_size=1))
def test_any_text_survives_the_dump(text):
    recipe = small().model_copy(update={"description": text})
    assert parse_recipe(dump_recipe(recipe), "dumped").description == text


@pytest.mark.parametrize(
    "text", ["1e-5", "on", "null", "~", "24:00:00", "007", "1_000", "true", "=", "- a", "a: b", ""]
)
def test_text_that_looks_like_something_else_survives_the_dump(text):
    recipe = small().model_copy(update={"description": text})
    assert parse_recipe(dump_recipe(recipe), "dumped").description == text


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("weight: 0.75}", "weight: 1e308}\n    - {path: c, weight: 1e308}", "small.yaml:9: sources: the weights are so large or so different"),
        # pydantic reads true as 1
        ("1_000", "true", "small.yaml:13: schedule.train_steps is True; expected a number."),
        ("weight: 0.75", "weight: true", "small.yaml:11: data.stages.0.sources.1.weight is True; expected a number."),
        ("peak_lr:", "peek_lr:", "small.yaml:14: schedule.peek_lr: no such key. Did you mean peak_lr?"),
        ("peak_lr: 2e-4", "peak_lr: fast", "small.yaml:14: schedule.peak_lr is 'fast'; expected a valid number"),
        ("1_000", "-5", "small.yaml:13: schedule.train_steps is -5; expected greater than 0."),
        ("512", "51.5", "small.yaml:5: data.sequence_length is 51.5; expected a valid integer"),
        ("weight: 0.75", "wieght: 0.75", "small.yaml:11: data.stages.0.sources.1.wieght: no such key. Did you mean weight?"),
        ("weight: 0.75", "weight: 0", "small.yaml:11: data.stages.0.sources.1.weight is 0; expected greater than 0."),
        ("  source: a\n", "  step: 3\n", "small.yaml:2: model.source is missing; model needs it."),
        ("- name: only", "- name: only\n    start_step: 2", "small.yaml:7: stages start at steps [2]: the first must be 1"),
        ("_sequences: 4", "_tokens: 700", "small.yaml:16: parallelism.global_batch_tokens 700 is not a multiple of"),
        ("_sequences: 4", "_sequences: 4\n  global_batch_tokens: 512", "small.yaml:15: parallelism: give one of"),
        ("  peak_lr", "  weight_decay: 0.1\n  peak_lr", "small.yaml:14: schedule.weight_decay: no such key. It belongs to optimizer."),
        ("    time: 24", "    signal: 1\n    time: 24", "small.yaml:19: launch.slurm.signal: no such key."),
        ("name: small", "name: small\nname: again", "small.yaml:2: name occurs twice, first in line 1."),
        ("  source: a", "  source: a\n  source: b", "small.yaml:4: model.source occurs twice, first in line 3."),
        ("  source: a", "\tsource: a", "small.yaml:3: not YAML: a tab"),
        ("name: small", "name: small: er", "small.yaml:1: not YAML: a second colon in the line"),
        ("name: small", "name: [small", "small.yaml:2: not YAML"),
        ("name: small", "name: !!python/name:os.system x", "small.yaml:1: a recipe cannot have the tag tag:yaml.org,2002:python/name:os.system"),
        ("name: small", "name: &loop [*loop]", "small.yaml: not YAML: the alias *loop is inside its own anchor."),
        ("2e-4", ".inf", "small.yaml:14: schedule.peak_lr is inf; expected a finite number"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_field(old, new, said):
    assert old in SMALL
    parse_recipe(SMALL, "small.yaml")  # negative control
    assert said in mistakes(SMALL.replace(old, new, 1))


def test_all_mistakes_are_named_at_once_in_the_order_of_the_file():
    found = mistakes(SMALL.replace("peak_lr:", "peek_lr:").replace("source: a", "sorce: a").replace("512", "0"))
    assert found.startswith("the recipe small.yaml has 3 mistakes.")
    assert [line.split(":")[1] for line in found.splitlines() if line.startswith("small.yaml:")] == ["3", "5", "14"]


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "3"])
def test_what_is_no_recipe_is_refused(text):
    assert "expected a recipe" in mistakes(text)


def test_a_name_that_is_no_file_and_no_recipe_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"tryout: no such file.*Did you mean try-out\?"):
        load_recipe("tryout")
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_recipe(tmp_path / "x.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi")
)
LADDER = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: small", BOMB, "holds more than 200,000 values"),
        ("name: small", LADDER, "nested more than 64 deep"),
        ("name: small", f"name: {'[' * 3000}", "nested more than 64 deep"),
        ("1_000", "9" * 5000, "small.yaml:13: '99999"),
        ("1_000", "9" * 20, "small.yaml:13: schedule.train_steps is 99999999999999999999; expected less than"),
        ("  source: a", '  source: "a\\0b"', "small.yaml:3: 'a\\x00b' has a character that is not valid in text"),
        ("  source: a", '  source: "a\\uD800b"', "small.yaml:3:"),
        ("  source: a", "  source: a\x07", "small.yaml: not YAML: unacceptable character #x0007"),
        ("  peak_lr: 2e-4", "  peak_lr: 2e-4\n  decay: cosine-restarts\n  cycles: 100000000", "schedule.cycles is 100000000"),
        ("name: small", "\n".join(f"key{i}: {i}" for i in range(9000)), "has 9001 mistakes; these are some."),
    ],
    ids=["alias bomb", "ladder of aliases", "brackets", "digits", "more than a number of 64 bits", "a NUL",
         "half a character", "a control character", "cycles", "thousands of mistakes"],
)  # fmt: skip
def test_what_would_fill_the_memory_or_no_text_holds_is_a_mistake_of_the_file(old, new, said):
    found = mistakes(SMALL.replace(old, new, 1))
    assert said in found and len(found) < 10_000


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"name={'[' * 3000}", "nested more than 64 deep"),
        (f"data.stages.{'9' * 5000}.name=x", "data.stages has 1 items"),
        ("name=\udcff", "not UTF-8"),
        ("launch.environment={A=B: c}", "launch.environment.A=B"),
        ('name="a\\0"', "has a character that is not valid in text"),
        (f"{'a' * 100_000}=1", "no such key"),
    ],
)
def test_an_override_of_such_is_refused_too(override, said):
    assert said in mistakes(SMALL, override)


def test_what_is_no_regular_file_is_no_recipe_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 21))
    for path, said in (
        (tmp_path / "pipe", "is a named pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / "loop", "is a link that leads back to itself"),
        (tmp_path / "large.yaml", "has 2097152 bytes"),
        (Path("x" * 5000), "no such file"),
    ):
        with pytest.raises(UsageError, match=said):
            load_recipe(path)
        with pytest.raises(UsageError):
            recipe_from_nanotron(path)
    assert run_cli("recipe", "show", tmp_path / "pipe").code == 2
    assert run_cli("recipe", "show", "x" * 5000).code == 2


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_change_values_sections_and_list_items():
    recipe = small(
        "schedule.peak_lr=3e-5", "data.stages.0.sources.1.weight=0.3", "checkpoints.keep=2", "launch.slurm.account=lab",
        "launch.environment.NCCL_DEBUG=INFO", "optimizer.no_decay=[a, b]", "export={formats: [nanotron]}", "model.config=",
        "launch.slurm.time=01:00:00",
    )  # fmt: skip
    assert (recipe.schedule.peak_lr, recipe.data.stages[0].sources[1].weight, recipe.checkpoints.keep) == (3e-5, 0.3, 2)
    assert (recipe.launch.slurm.account, recipe.launch.environment) == ("lab", {"NCCL_DEBUG": "INFO"})
    assert recipe.optimizer.no_decay == ("a", "b")
    assert recipe.export is not None and recipe.export.formats == ("nanotron",)
    assert (recipe.model.config, recipe.launch.slurm.time) == (None, "01:00:00")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.peaklr=1", "--set schedule.peaklr=1: schedule.peaklr: no such key. Did you mean peak_lr?"),
        ("nothing.here=1", "--set nothing.here=1: nothing: no such key."),
        ("schedule.peak_lr=fast", "--set schedule.peak_lr=fast: schedule.peak_lr is 'fast'"),
        ("data.stages.1.name=x", "--set data.stages.1.name=x: data.stages has 1 items; expected 0 to 0, not '1'"),
        ("data.stages.first.name=x", "not 'first'"),
        ("data.stages.0.sources.0.wieght=1", "Did you mean weight?"),
        ("model.source.deeper=1", "model.source is 'a', not a section"),
        ("export={format: [hf]}", "--set export={format: [hf]}: export.format: no such key. Did you mean formats?"),
        ("schedule.train_steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("schedule..x=3", "expected section.key=value"),
        ("schedule=3", "--set schedule=3: schedule is 3; expected a section"),
        ("schedule.peak_lr=[", "--set schedule.peak_lr=[: not YAML"),
    ],
)
def test_an_override_that_cannot_be_is_refused_by_its_own_words(override, said):
    assert said in mistakes(SMALL, override)


# --- from nanotron -------------------------------------------------------------------------------------------------


def config_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((PUBLISHED / f"{name}.yaml").read_text())


def translated(tmp_path: Path, config: dict[str, Any], **options: Any):
    (tmp_path / "config.yaml").write_text(yaml.dump(config))
    return recipe_from_nanotron(tmp_path / "config.yaml", **options)


def leaves(value: Any, at: str = "") -> set[str]:
    if isinstance(value, dict) and value:
        return set().union(*(leaves(item, f"{at}.{key}".strip(".")) for key, item in value.items()))
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return set().union(*(leaves(item, f"{at}.{i}") for i, item in enumerate(value)))
    return {at}


CONFIGS = sorted([*PUBLISHED.rglob("*.yaml"), *FIXTURES.glob("nanotron/*/*/3/config.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "-".join(path.relative_to(FIXTURES).parts[1:3]))
def test_every_field_of_the_config_is_accounted_for_once(path):
    made = recipe_from_nanotron(path, eos=1)
    assert {*made.carried, *made.dropped} == leaves(yaml.safe_load(path.read_text()))
    assert not set(made.carried) & set(made.dropped)
    assert made.unknown == ()
    assert parse_recipe(dump_recipe(made.recipe), "dumped") == made.recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "-".join(path.relative_to(FIXTURES).parts[1:3]))
def test_the_translated_schedule_is_the_configs_at_every_step(path):
    config = yaml.safe_load(path.read_text())
    recipe = recipe_from_nanotron(path, eos=1).recipe
    for s in {
        *range(0, 101),
        2999,
        3000,
        *range(0, recipe.schedule.train_steps + 1, max(recipe.schedule.train_steps // 997, 1)),
    }:
        assert learning_rate(recipe.schedule, s) == pytest.approx(
            scheduled_lr(config, s, "here")[1], rel=1e-12, abs=1e-20
        )


@pytest.mark.parametrize(
    "scheduler",
    [
        {"lr_decay_steps": None},
        {"lr_decay_steps": None, "lr_decay_starting_step": None},
        {"lr_warmup_steps": 0},
        {"min_decay_lr": None},
        {"min_decay_lr": None, "lr_warmup_steps": 0, "lr_warmup_style": "linear"},
        {"min_decay_lr": None, "lr_warmup_steps": 0, "lr_decay_steps": 0},
        {"min_decay_lr": 1e-5, "lr_warmup_steps": 0, "lr_decay_steps": 0},
        {"min_decay_lr": 5e-5, "lr_warmup_style": "constant"},
        {"min_decay_lr": 1e-5, "lr_decay_style": "1-sqrt"},
        {"lr_decay_style": "cosine", "lr_decay_starting_step": 3000},
    ],
)
def test_what_a_scheduler_leaves_out_is_filled_in_as_nanotron_does(tmp_path, scheduler):
    config = config_of("smollm2-continued")
    config["optimizer"]["learning_rate_scheduler"] |= scheduler
    recipe = translated(tmp_path, config).recipe
    for s in (0, 1, 1500, 3000, 3001, 129_999, 130_000, 130_001, 145_000, 157_001, 160_000):
        assert learning_rate(recipe.schedule, s) == pytest.approx(
            scheduled_lr(config, s, "here")[1], rel=1e-9, abs=1e-20
        )


@pytest.mark.parametrize(
    ("theta", "positions", "written", "said"),
    [
        (5000.0, 1024, (10_000, 2048), ("raised, as", "raised, as")),
        (10_000.0, 2048, (None, None), ()),
        (100_000.0, 8192, (None, None), ("left out", "left out")),  # as SmolLM2-135M and its Instruct model
        (100_000.0, 1024, (None, 2048), ("left out", "raised, as")),
    ],
)
def test_the_yamls_theta_and_context_do_not_lower_the_sources(theta, positions, written, said, tmp_path):
    config = config_of("smollm2-continued")
    config["model"]["model_config"] |= {"rope_theta": 10_000.0, "max_position_embeddings": 2048}
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf", source)
    its = json.loads((source / "config.json").read_text())
    its.pop("rope_parameters", None)
    (source / "config.json").write_text(json.dumps(its | {"rope_theta": theta, "max_position_embeddings": positions}))
    made = translated(tmp_path, config, source=str(source))
    assert (made.recipe.model.rope_theta, made.recipe.model.max_positions) == written
    notes = [note for note in made.notes if note.startswith(("model.rope_theta", "model.max_positions"))]
    assert len(notes) == len(said) and all(word in note for word, note in zip(said, notes)), notes
    elsewhere = translated(tmp_path, config, source=str(tmp_path / "not here")).recipe.model
    assert (elsewhere.rope_theta, elsewhere.max_positions) == (10_000, 2048)  # the control


def test_three_stages_of_smollm3_become_a_recipe():
    made = recipe_from_nanotron(PUBLISHED / "smollm3-three-stages.yaml")
    recipe = made.recipe
    assert (recipe.global_batch_sequences, recipe.tokens_per_step) == (576, 2_359_296)
    assert [(stage.name, stage.start_step) for stage in recipe.data.stages] == [
        ("stable", 1), ("stable stage 2", 3_450_001), ("decay stage", 4_198_001),
    ]  # fmt: skip
    assert recipe.data.stages[0].sources[2].path == "/scratch/tokens/stack-v2-Python"
    assert [source.weight for source in recipe.data.stages[2].sources] == [0.3, 0.3, 0.2, 0.2]
    assert (recipe.data.eos_token_id, recipe.data.mask_documents) == (128001, True)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.no_decay) == (0.1, (r"model\.embed_tokens\.weight$",))
    assert (recipe.model.source, recipe.model.rope_theta) == ("s3://bucket/run-part1", 50000)
    assert recipe.start.optimizer and recipe.start.learning_rate and recipe.start.data
    assert any(note.startswith("tp 2 is lost") for note in made.notes)
    assert any("s3" in note for note in made.notes)
    # Checkpoints of that run count what was read by these names.
    config = yaml.safe_load((PUBLISHED / "smollm3-three-stages.yaml").read_text())
    recorded = config["data_stages"][0]["data"]["dataset"]["dataset_folder"]
    assert [source.recorded_as for source in recipe.data.stages[0].sources] == recorded
    assert recipe.parallelism.zero_stage == 1
    assert any("zero_stage is 1" in note for note in made.notes)
    assert "tensor" in made.dropped["parallelism.tp"]


def test_a_continued_run_starts_from_weights_alone():
    recipe = recipe_from_nanotron(PUBLISHED / "smollm2-continued.yaml").recipe
    assert (recipe.start.optimizer, recipe.start.learning_rate, recipe.start.data) == (False, False, False)
    assert (recipe.global_batch_sequences, recipe.parallelism.micro_batch_sequences) == (256, 4)
    assert (recipe.model.source, recipe.data.mask_documents, recipe.optimizer.no_decay) == (
        "checkpoints/math",
        False,
        (),
    )
    assert recipe.data.eos_token_id == 0
    assert recipe_from_nanotron(PUBLISHED / "smollm2-continued.yaml", source="hf").recipe.model.source == "hf"


def test_a_field_that_nobody_knows_is_reported(tmp_path):
    config = config_of("smollm2-continued")
    config["optimizer"]["lookahead"] = 3
    config["tokens"]["curriculum"] = {"kind": "length"}
    made = translated(tmp_path, config)
    assert made.unknown == ("optimizer.lookahead", "tokens.curriculum.kind")
    assert any("not carried: optimizer.lookahead" in note for note in made.notes)


@pytest.mark.parametrize(
    ("patterns", "undecayed"),
    [
        ([".*token_embedding.*"], {"model.embed_tokens.weight"}),
        ([".*lm_head.*"], {"model.embed_tokens.weight"}),  # tied: excluded by either name
        ([r".*layernorm.*", r".*final_layer_norm.*"], {"norm"}),
        ([r"model\.decoder\.[02]\.pp_block\.attn\.qkv_proj.*"], {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 2) for p in "qkv"}),
        ([r"token_embedding"], set()),  # re.match: from the start of the name
    ],
)  # fmt: skip
def test_undecayed_parameters_are_the_same_by_either_name(tmp_path, patterns, undecayed):
    config = config_of("smollm3-three-stages")
    config["optimizer"]["weight_decay_exclude_named_params"] = patterns
    made = translated(tmp_path, config)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(36) for p in "qkvo"]
    names += [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(36) for p in ("gate", "up", "down")]
    names += [f"model.layers.{i}.{p}_layernorm.weight" for i in range(36) for p in ("input", "post_attention")]
    expected = {name for name in names if "norm" in name} if undecayed == {"norm"} else undecayed
    assert {name for name in names if any(re.match(p, name) for p in made.recipe.optimizer.no_decay)} == expected
    assert bool(expected) != any("matches no parameter" in note for note in made.notes)


def test_the_end_of_documents_is_never_guessed(tmp_path):
    config = config_of("smollm2-continued")
    config["tokenizer"]["tokenizer_name_or_path"] = str(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match=r"end-of-document token is not known.*--eos ID"):
        translated(tmp_path, config)
    assert translated(tmp_path, config, eos=7).recipe.data.eos_token_id == 7
    assert any("compare with the data" in note for note in translated(tmp_path, config, eos=7).notes)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    (tmp_path / "tokenizer/tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 5, "content": "<end>"}], "model": {"vocab": {"a": 0}}})
    )
    assert translated(tmp_path, config).recipe.data.eos_token_id == 5


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    config = config_of("smollm2-continued")
    config["data_stages"][0]["data"]["dataset"] = {
        "dataset_folder": ["data/a/tokenized/", "data/b/tokenized/", "data/c/standard"], "dataset_weights": [0.5, 0.5, 0],
    }  # fmt: skip
    made = translated(tmp_path, config)
    assert made.recipe.data.stages[0].names == ("a/tokenized", "b/tokenized")
    assert any("data/c/standard has weight 0" in note for note in made.notes)


def test_folders_with_their_weights_in_one_mapping_are_a_blend(tmp_path):
    """The third form of nanotron's docs/nanoset.md, which its config reads until #228 of 5 September 2024."""
    config = config_of("smollm2-continued")
    folders: dict[str, Any] = {"data/v1.5/x": 0.8, "data/y": 0.2}
    config["data_stages"][0]["data"]["dataset"] = {"dataset_folder": folders}
    made = translated(tmp_path, config)
    assert [(source.path, source.weight) for source in made.recipe.data.stages[0].sources] == [
        ("data/v1.5/x", 0.8), ("data/y", 0.2),
    ]  # fmt: skip
    assert not made.unknown and not any("no weights" in note or "no token files" in note for note in made.notes)
    folders["data/y"] = "0.2"
    with pytest.raises(UsageError, match=r"dataset_folder\.data/y is '0\.2'; expected the folder's weight"):
        translated(tmp_path, config)


def test_folders_without_weights_get_equal_shares_and_it_is_said(tmp_path):
    config = config_of("smollm2-continued")
    config["data_stages"][0]["data"]["dataset"] = {"dataset_folder": ["data/x", "data/y"]}
    made = translated(tmp_path, config)
    assert [source.weight for source in made.recipe.data.stages[0].sources] == [1.0, 1.0]
    assert any("2 folders get equal shares" in note and "Nanoset" in note for note in made.notes)
    config["data_stages"][0]["data"]["dataset"] = {"dataset_folder": "data/x"}
    assert not any("equal shares" in note for note in translated(tmp_path, config).notes)


def test_a_stage_without_token_files_gets_a_place_for_them_and_says_so(tmp_path):
    config = config_of("smollm2-continued")
    config["data_stages"][0]["data"]["dataset"] = {
        "hf_dataset_or_datasets": "stas/openwebtext-10k",
        "text_column_name": "text",
    }
    made = translated(tmp_path, config)
    assert made.recipe.data.stages[0].sources[0].path == "data/stable-phase"
    assert any("no token files (stas/openwebtext-10k)" in note for note in made.notes)
    assert "tokenize" in made.dropped["data_stages.0.data.dataset.hf_dataset_or_datasets"]


def test_files_are_permuted_by_the_stages_seed(tmp_path):
    config = config_of("smollm2-continued")
    config["data_stages"][0]["data"]["dataset"]["shuffle_files"] = True
    assert translated(tmp_path, config).recipe.data.file_seed == 6
    config["data_stages"][0]["data"]["dataset"]["shuffle_files"] = False
    assert translated(tmp_path, config).recipe.data.file_seed is None


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("optimizer.optimizer_factory", {"name": "sgd"}, "recipes train with AdamW only"),
        (
            "optimizer.learning_rate_scheduler",
            {"lr_warmup_style": "constant"},
            "lr_warmup_style is constant before a decay",
        ),
        ("optimizer.learning_rate_scheduler", {"learning_rate": None}, "learning_rate is missing"),
        ("optimizer.learning_rate_scheduler", {"lr_decay_style": "square"}, "schedule.decay is 'square'"),
        ("model", {"dtype": "float16"}, "expected bfloat16 or float32"),
        # nanotron refuses these types, too
        ("tokens", {"train_steps": "many"}, "tokens.train_steps is 'many'; expected a whole number"),
        ("tokens", {"train_steps": 1.5}, "tokens.train_steps is 1.5; expected a whole number"),
        ("parallelism", {"dp": True}, "parallelism.dp is True; expected a whole number"),
        ("checkpoints", {"load_optimizer": "false"}, "load_optimizer is 'false'; expected true or false"),
        (
            "optimizer.learning_rate_scheduler",
            {"lr_warmup_style": "cosine"},
            "is 'cosine'; expected linear or constant",
        ),
        ("optimizer", {"clip_grad": 0}, "makes every gradient zero"),
        ("tokens", {"sequence_length": None}, "tokens.sequence_length is missing"),
        ("data_stages.0", {"sequence_length": 4096}, "a recipe has one"),
        ("data_stages.0.data.dataset", {"dataset_weights": [1.0]}, "has 3 folders and 1 weights"),
        ("optimizer", {"weight_decay_exclude_named_params": ["("]}, "not a regex"),
    ],
)
def test_a_config_that_no_recipe_trains_the_same_is_refused(tmp_path, section, change, said):
    config = config_of("smollm2-continued")
    translated(tmp_path, config)  # negative control
    part: Any = config
    for key in section.split("."):
        part = part[int(key) if isinstance(part, list) else key]
    part |= change
    with pytest.raises(UsageError) as error:
        translated(tmp_path, config)
    assert said in str(error.value)


def test_more_layers_than_any_model_has_are_refused_before_they_are_counted(tmp_path):
    config = config_of("smollm2-continued")
    config["optimizer"]["weight_decay_exclude_named_params"] = [".*token_embedding.*"]
    config["model"]["model_config"]["num_hidden_layers"] = 20_000
    with pytest.raises(UsageError, match="num_hidden_layers is 20000; expected a whole number from 1 to 10000"):
        translated(tmp_path, config)


@pytest.mark.parametrize("text", ["", "just words", "- a", "data_stages: 3", "{", BOMB, LADDER, "a: [" * 3000])
def test_what_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError):
        recipe_from_nanotron(tmp_path / "config.yaml")


# --- the command ---------------------------------------------------------------------------------------------------


def test_list_names_every_recipe():
    done = run_cli("recipe", "list", "--json")
    document = json.loads(done.stdout)
    assert done.code == 0 and document["schema"] == 1
    assert {one["name"] for one in document["recipes"]} == set(shipped_recipes())
    assert all(Path(one["path"]).is_file() and one["description"] for one in document["recipes"])


def test_init_copies_what_show_prints_and_overwrites_nothing(tmp_path):
    out = tmp_path / "new/my.yaml"
    shown = run_cli("recipe", "show", "try-out")
    done = run_cli("recipe", "init", "try-out", out)
    assert (shown.code, done.code) == (0, 0)
    modeline, _, rest = out.read_text().partition("\n")
    assert rest == shown.stdout == shipped_recipes()["try-out"].read_text()
    assert modeline == f"# yaml-language-server: $schema={SCHEMA_FILE}" and SCHEMA_FILE.is_file()
    again = tmp_path / "again.yaml"
    assert run_cli("recipe", "init", out, again).code == 0
    assert again.read_text() == out.read_text()  # one such line
    out.write_text("mine")
    refused = run_cli("recipe", "init", "try-out", out)
    assert (refused.code, out.read_text()) == (2, "mine") and "--overwrite" in refused.stderr
    assert run_cli("recipe", "show", "no-such-recipe").code == 2


def test_validate_says_what_is_trained_or_every_mistake(tmp_path):
    done = run_cli("recipe", "validate", "try-out", "--set", "schedule.train_steps=40")
    assert (done.code, done.stdout) == (0, "try-out is valid: 40 steps of 1,024 tokens from smollm2-135m-nanotron\n")
    assert json.loads(run_cli("recipe", "validate", "try-out", "--json").stdout)["recipe"]["name"] == "try-out"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(shipped_recipes()["try-out"].read_text().replace("peak_lr", "peak_rl"))
    refused = run_cli("recipe", "validate", wrong)
    assert refused.code == 2 and f"{wrong}:27" in refused.stderr and "peak_lr" in refused.stderr


def test_the_schema_that_is_installed_is_the_recipes(tmp_path):
    """Editors read the file; `smolconv recipe schema > continual_pretraining/recipes/recipe.schema.json` renews it."""
    printed = run_cli("recipe", "schema")
    assert printed.code == 0 and printed.stdout == SCHEMA_FILE.read_text(), "renew the file"
    document = json.loads(printed.stdout)
    assert "peak_lr" in document["$defs"]["Schedule"]["properties"]
    assert document["$defs"]["Schedule"]["additionalProperties"] is False  # what finds a misspelt key
    assert document["$defs"]["Data"]["properties"]["eos_token_id"]["description"].startswith("ends a document")
    assert document["$defs"]["Model"]["properties"]["dtype"]["enum"] == ["bfloat16", "float32"]


def test_from_nanotron_writes_a_recipe_and_its_account(tmp_path):
    out = tmp_path / "my.yaml"
    done = run_cli("recipe", "from-nanotron", PUBLISHED / "smollm3-three-stages.yaml", out, "--source", "checkpoints")
    assert (done.code, done.stdout) == (0, f"{out}\n")
    assert (
        "warning: tp 2 is lost" in done.stderr and "tokens.{limit_test_batches, limit_val_batches, val" in done.stderr
    )
    assert out.read_text().startswith("# From nanotron's smollm3-three-stages.yaml")
    assert load_recipe(out).model.source == "checkpoints"
    assert run_cli("recipe", "from-nanotron", PUBLISHED / "smollm3-three-stages.yaml", out).code == 2
    again = run_cli("recipe", "from-nanotron", PUBLISHED / "smollm3-three-stages.yaml", out, "--overwrite", "--json")
    document = json.loads(again.stdout)
    assert {*document["carried"], *document["dropped"]} == leaves(config_of("smollm3-three-stages"))


# --- the page ------------------------------------------------------------------------------------------------------


def models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in models(argument)]


def within(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The sections below one, each after its own."""
    below = [section for info in model.model_fields.values() for section in models(info.annotation)]
    return [found for section in below for found in (*within(section), section)]


def kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if models(annotation):
        return "a list of sections" if "tuple" in str(annotation) else "a section"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return kind(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return "words by name"
    if hasattr(annotation, "__metadata__"):
        return kind(arguments[0])
    return {str: "text", int: "integer", float: "number", bool: "true, false"}[annotation]


HEADINGS = {
    "Recipe": "The whole recipe", "Stage": "data.stages, a list of", "Slurm": "launch.slurm",
    "Source": "data.stages.N.sources and evaluation.sources, lists of",
}  # fmt: skip


def field_tables() -> str:
    """The page's tables, from the schema and the comments beside its fields."""
    lines = []
    found: list[type[BaseModel]] = [schema.Recipe, *within(schema.Recipe)]
    for model in dict.fromkeys(found):
        name = model.__name__
        comments = dict(re.findall(r"^    (\w+): .*?#: (.*)$", inspect.getsource(model), re.M))
        lines += [f"### {HEADINGS.get(name, name.lower())}", ""]
        if model.__doc__:
            lines += [plain(model.__doc__.splitlines()[0]), ""]
        lines += ["| field | value | default | |", "|---|---|---|---|"]
        for field, info in model.model_fields.items():
            default = info.get_default(call_default_factory=True)
            shown = "needed" if default is PydanticUndefined else ""
            if not shown and not isinstance(default, BaseModel):
                shown = "" if default in (None, "", {}, ()) else f"`{json.dumps(default)}`"
            lines.append(f"| `{field}` | {kind(info.annotation)} | {shown} | {plain(comments.get(field, ''))} |")
        lines.append("")
    return "\n".join(lines[:-1])


def plain(text: str) -> str:
    return text.replace("``", "`").replace("None:", "not given:").replace("|", "\\|")


def decay_table() -> str:
    rows = [f"| `{name}` | {decay.formula} |" for name, decay in DECAYS.items()]
    return "\n".join(["| `decay` | share |", "|---|---|", *rows])


def with_tables(page: str) -> str:
    for part, table in (("decays", decay_table()), ("fields", field_tables())):

        def filled(m: re.Match[str], table: str = table) -> str:
            return f"{m[1]}\n{table}\n\n{m[2]}"

        page = re.sub(rf"(<!-- {part}:begin.*?-->\n).*(<!-- {part}:end -->)", filled, page, flags=re.S)
    return page


def test_the_page_lists_every_field_with_its_default():
    page = PAGE.read_text()
    assert page == with_tables(page), "run `python tests/test_recipe.py`"
    for model in (schema.Recipe, Schedule, schema.Slurm):
        assert all(f"| `{field}` |" in page for field in model.model_fields)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
    sys.exit(0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('optimizer.no_decay=["("]', "'(' is not a regular expression"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas.1"),
        (
            "evaluation={every_steps: 1, sources: [{path: x/val}, {path: y/val}]}",
            "two sources are named 'val': give one of them another name",
        ),
    ],
)
def test_what_would_fail_only_in_training_is_told_with_the_recipe(override, said):
    assert said in mistakes(SMALL, override)


# --- a first recipe ---------------------------------------------------------------------------------------------------

TINY_SOURCE = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"


def test_init_writes_a_recipe_that_a_dry_run_lets_start(tmp_path):
    tokens, held_out = token_folder(tmp_path / "tokens"), token_folder(tmp_path / "held-out", seed=1)
    out = tmp_path / "mine.yaml"
    words = ("--source", TINY_SOURCE, "--data", tokens, "--held-out", held_out, "--gpus", 0)
    done = run_cli("recipe", "init", out, *words, cwd=tmp_path)
    assert done.code == 0, done.stderr
    made = load_recipe(out)
    assert (made.name, made.data.eos_token_id, made.evaluation is not None) == ("mine", EOS, True)
    assert made.export is not None and made.model.dtype == "float32"
    checked = run_cli("continue-train", out, "--dry-run", cwd=tmp_path)
    assert checked.code == 0, checked.stderr
    again = run_cli("recipe", "init", out, *words, cwd=tmp_path)
    assert again.code == 2 and "--overwrite" in again.stderr  # nothing is written over


def test_init_for_a_short_text_makes_steps_that_train(tmp_path):
    one, other = (token_folder(tmp_path / name / "tokens", documents=400, seed=seed) for seed, name in enumerate("ab"))
    out = tmp_path / "mine.yaml"
    done = run_cli("recipe", "init", out, "--source", TINY_SOURCE, "--data", one, "--data", other, "--gpus", 4)
    assert done.code == 0, done.stderr
    made = load_recipe(out)
    tokens = sum((folder / "00000_unshuffled.ds").stat().st_size // 2 for folder in (one, other))
    assert made.schedule.train_steps >= 20 and made.schedule.train_steps * made.tokens_per_step <= tokens
    assert max(learning_rate(made.schedule, step) for step in range(made.schedule.train_steps)) == made.schedule.peak_lr
    assert made.data.stages[0].names == ("a/tokens", "b/tokens")  # their own names are equal


def test_init_for_gpus_takes_what_the_plan_takes_first(tmp_path):
    tokens, out = token_folder(tmp_path / "tokens"), tmp_path / "mine.yaml"
    words = ("--source", TINY_SOURCE, "--data", tokens, "--gpus", 16, "--gpu", "a100-40gb", "--steps", 500)
    assert run_cli("recipe", "init", out, *words).code == 0
    made = load_recipe(out)
    assert (made.model.dtype, made.launch.nodes, made.launch.launcher) == ("bfloat16", 2, "slurm")
    assert made.schedule.train_steps == 500 and made.schedule.decay == "linear"
    planned = json.loads(run_cli("plan", out, "--gpus", 16, "--gpu", "a100-40gb", "--json").stdout)
    best = planned["plans"][0]["options"][0]
    assert best["micro_batch_sequences"] == made.parallelism.micro_batch_sequences
    assert best["zero_stage"] == made.parallelism.zero_stage


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "--source"),
        (("try-out",), 2, "smolconv recipe init try-out try-out.yaml"),
        (("a.yaml", "--source", "no/where"), 3, "no/where"),
        (("a.yaml", "--source", TINY_SOURCE, "--data", "no/where", "--gpus", "0"), 3, "no/where"),
        (("a.yaml", "--source", TINY_SOURCE), 2, "--data"),
        (("try-out", "a.yaml", "--gpus", "2"), 2, "--gpus is for a new recipe"),
        (("a", "b", "c"), 2, "3 names"),
    ],
)
def test_init_says_what_it_lacks_where_nobody_can_be_asked(tmp_path, words, code, says):
    done = run_cli("recipe", "init", *words, cwd=tmp_path)
    assert done.code == code and says in done.stderr, done.stderr
    assert not list(tmp_path.glob("*.yaml"))


def test_init_does_not_guess_which_token_ends_a_document(tmp_path):
    tokens, other = token_folder(tmp_path / "tokens"), token_folder(tmp_path / "other", seed=1)
    ids = np.fromfile(other / "00000_unshuffled.ds", "<u2")
    np.where(ids == EOS, 7, ids).astype("<u2").tofile(other / "00000_unshuffled.ds")
    words = ("--source", TINY_SOURCE, "--data", tokens, "--data", other, "--gpus", 0)
    refused = run_cli("recipe", "init", tmp_path / "a.yaml", *words)
    assert refused.code == 2 and "end in 0, 7" in refused.stderr
    assert run_cli("recipe", "init", tmp_path / "a.yaml", *words, "--eos", 7).code == 0
    assert load_recipe(tmp_path / "a.yaml").data.eos_token_id == 7
