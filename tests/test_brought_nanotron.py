"""What people bring to and from nanotron: published configs, checkpoints of other trainers, padded and scaled models."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import yaml
from conftest import FIXTURES

from smolconv.continual_pretraining.recipe.files import load_recipe
from smolconv.continual_pretraining.recipe.nanotron import recipe_from_nanotron
from smolconv.continual_pretraining.recipe.schedules import learning_rate

# --- published training configs ---------------------------------------------------------------------------------------

PUBLISHED = sorted((FIXTURES / "recipes/published").glob("*.yaml"))


def rate(scheduler: dict[str, Any], s: int) -> float:
    """nanotron's learning rate after ``s`` steps, by the formulas of its ``lr_scheduler_builder``."""
    peak, low = scheduler["learning_rate"], scheduler["min_decay_lr"]
    warmup, steps = scheduler["lr_warmup_steps"], scheduler["lr_decay_steps"]
    start = scheduler.get("lr_decay_starting_step") or warmup
    if s < warmup:
        return peak * s / warmup
    f = min(max((s - start) / steps, 0), 1)
    shares = {"linear": 1 - f, "cosine": (1 + math.cos(math.pi * f)) / 2, "1-sqrt": 1 - math.sqrt(f)}
    return low + (peak - low) * shares[scheduler["lr_decay_style"]]


def test_all_published_configs_are_here():
    assert len(PUBLISHED) == 21


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_config_becomes_a_recipe_of_the_same_run(path):
    config = yaml.safe_load(path.read_text())
    made = recipe_from_nanotron(path)
    recipe, tokens = made.recipe, config["tokens"]
    assert made.unknown == ()
    scheduler = config["optimizer"]["learning_rate_scheduler"]
    steps = recipe.schedule.train_steps
    assert steps == tokens["train_steps"]
    looked_at = {0, 1, 500, 5000, *(steps * k // 7 for k in range(1, 8)), steps - 1}
    assert {s: learning_rate(recipe.schedule, s) for s in looked_at} == pytest.approx(
        {s: rate(scheduler, s) for s in looked_at}, rel=1e-9, abs=1e-15
    )
    sequences = config["parallelism"]["dp"] * tokens["micro_batch_size"] * tokens["batch_accumulation_per_replica"]
    assert recipe.tokens_per_step == sequences * tokens["sequence_length"]
    smollm3 = "smollm3" in config["general"]["project"]
    excluded = config["optimizer"].get("weight_decay_exclude_named_params") or []
    assert excluded == ([".*token_embedding.*"] if smollm3 else [])
    names = ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.3.mlp.up_proj.weight")
    undecayed = [name for name in names if any(re.match(pattern, name) for pattern in recipe.optimizer.no_decay)]
    assert (recipe.optimizer.weight_decay, undecayed) == ((0.1, [names[0]]) if smollm3 else (0.01, []))
    assert recipe.optimizer.weight_decay == config["optimizer"]["weight_decay"]
    assert recipe.data.eos_token_id == config["model"]["model_config"]["eos_token_id"]
    assert [(stage.name, stage.start_step) for stage in recipe.data.stages] == [
        (stage["name"], stage["start_training_step"]) for stage in config["data_stages"]
    ]
    for stage, own in zip(recipe.data.stages, config["data_stages"]):
        dataset = own["data"]["dataset"]
        folders = dataset.get("dataset_read_path") or dataset["dataset_folder"]
        folders = [folders] if isinstance(folders, str) else folders
        weights = dataset.get("dataset_weights") or [1] * len(folders)
        assert [(source.path, source.weight) for source in stage.sources] == [
            (folder, weight) for folder, weight in zip(folders, weights) if weight
        ]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_what_lies_on_s3_or_on_the_authors_disks_is_named_with_what_to_replace(path):
    made = recipe_from_nanotron(path)
    wanted = [("model.source", made.recipe.model.source)] + [
        (f"data.stages.{i}.sources.*.path", stage.sources[0].path) for i, stage in enumerate(made.recipe.data.stages)
    ]
    for field, place in wanted:
        noted = [note for note in made.notes if note.startswith(f"{field}: ") and place in note]
        assert bool(noted) == place.startswith(("s3://", "/scratch/", "/fsx/")), place
        assert all("is on S3" in note or "not on this machine" in note for note in noted)
    assert not recipe_from_nanotron(path, source=str(FIXTURES)).recipe.model.source.startswith("s3:")


@pytest.mark.parametrize(("name", "config"), [("135m", "135M"), ("360m", "360M"), ("1.7b", "1B")])
def test_smollm1s_recipes_are_its_published_configs(name, config):
    shipped = load_recipe(f"smollm1-{name}")
    made = recipe_from_nanotron(FIXTURES / f"recipes/published/config_smollm1_{config}.yaml").recipe
    assert (shipped.schedule, shipped.optimizer, shipped.start) == (made.schedule, made.optimizer, made.start)
    assert (shipped.parallelism, shipped.seed) == (made.parallelism, made.seed)
    kept = [
        (stage.start_step, [(s.path.replace("data/", "datasets/"), s.weight) for s in stage.sources])
        for stage in shipped.data.stages
    ]
    assert kept == [(stage.start_step, [(s.path, s.weight) for s in stage.sources]) for stage in made.data.stages]
