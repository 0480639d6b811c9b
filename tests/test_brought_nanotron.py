"""What people bring to and from nanotron: published configs, checkpoints of other trainers, padded and scaled models."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import yaml
from conftest import FIXTURES, convert, hf_weights

from smolconv import api
from smolconv.continual_pretraining.recipe.files import load_recipe
from smolconv.continual_pretraining.recipe.nanotron import recipe_from_nanotron
from smolconv.continual_pretraining.recipe.schedules import learning_rate
from smolconv.continual_pretraining.run.start import completed_steps
from smolconv.errors import CorruptFile, UsageError
from smolconv.hub.published import published_progress

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


# --- weights of other trainers for nanotron ---------------------------------------------------------------------------

ZERO2 = FIXTURES / "deepspeed/zero2-clientstate-ws2"
#: As its training.yaml would say: three stages, of which the second has one folder.
STAGES = [("warm", 1, 16, ["a", "b"]), ("middle", 2, 16, ["c"]), ("late", 9, 16, ["d"])]


def training_yaml(folder: Path, stages: list[tuple[str, int, int, list[str]]], **config: Any) -> Path:
    """nanotron's training config of a run with these data stages: (name, start step, sequence length, folders)."""
    made = yaml.safe_load((FIXTURES / "nanotron/smollm2-tiny/tp1-pp1-dp1-zero0/3/config.yaml").read_text())
    made["data_stages"] = [
        {
            "name": name, "start_training_step": start, "sequence_length": length,
            "data": {"dataset": {"dataset_folder": folders}, "num_loading_workers": 0, "seed": 8},
        }
        for name, start, length, folders in stages
    ]  # fmt: skip
    path = folder / "training.yaml"
    path.write_text(yaml.safe_dump(made | config))
    return path


def metas(run: Path) -> dict[str, Any]:
    step = run / (run / "latest.txt").read_text()
    found: dict[str, Any] = json.loads((step / "checkpoint_metadata.json").read_text())["metas"]
    # What nanotron refuses to load.
    stages = found["data_stages"]
    assert found["consumed_train_samples"] == sum(stage["consumed_train_samples"] for stage in stages)
    folders = [stage["consumed_tokens_per_dataset_folder"] for stage in stages]
    assert found["consumed_tokens_total"] == sum(sum(tokens.values()) for tokens in folders)
    return found


def test_stages_of_an_imported_model_are_those_of_its_training_config(tmp_path):
    """nanotron counts them, finds them by start step and asserts the length in its first step."""
    source = hf_models.saved(hf_models.llama(), tmp_path / "hf")
    path = training_yaml(tmp_path, [("late", 7, 64, []), ("early", 1, 32, [])])
    convert(source, tmp_path / "run", "nanotron", nanotron_config=path)
    found = metas(tmp_path / "run")
    assert [(s["name"], s["start_training_step"], s["sequence_length"]) for s in found["data_stages"]] == [
        ("early", 1, 32), ("late", 7, 64),
    ]  # fmt: skip
    assert (found["last_stage_idx"], found["last_train_step"], found["consumed_train_samples"]) == (0, 0, 0)


def test_a_stage_without_a_length_of_its_own_has_the_runs(tmp_path):
    source = hf_models.saved(hf_models.llama(), tmp_path / "hf")
    path = training_yaml(tmp_path, STAGES[:1])
    config = yaml.safe_load(path.read_text())
    del config["data_stages"][0]["sequence_length"]
    path.write_text(yaml.safe_dump(config))
    assert config["tokens"]["sequence_length"] == 32
    convert(source, tmp_path / "run", "nanotron", nanotron_config=path)
    assert metas(tmp_path / "run")["data_stages"][0]["sequence_length"] == 32


def test_samples_of_a_deepspeed_run_are_shared_by_the_steps_of_each_stage(tmp_path):
    recorded = json.loads((ZERO2 / "expected/meta.json").read_text())
    step, samples = recorded["step"], recorded["global_samples"]
    assert (step, samples) == (3, 12)
    config = training_yaml(tmp_path, STAGES)
    result = convert(
        ZERO2 / "checkpoint", tmp_path / "run", "nanotron", nanotron_config=config, config=ZERO2 / "config.json"
    )
    found = metas(tmp_path / "run")
    assert [stage["consumed_train_samples"] for stage in found["data_stages"]] == [4, 8, 0]
    assert (found["last_train_step"], found["last_stage_idx"]) == (3, 1)
    assert any("has consumed 12 samples, without a record of the tokens" in warning for warning in result.warnings)
    # Without a config they are one stage's.
    plain = convert(ZERO2 / "checkpoint", tmp_path / "plain", "nanotron", config=ZERO2 / "config.json")
    assert [(s["name"], s["consumed_train_samples"]) for s in metas(tmp_path / "plain")["data_stages"]] == [
        ("imported", 12)
    ]
    assert any("run_generate.py" in warning for warning in plain.warnings)
    assert not any("run_generate.py" in warning for warning in result.warnings)


def test_tokens_that_are_known_are_carried_and_their_folder_where_there_is_one(tmp_path):
    source = ZERO2 / "checkpoint"
    from smolconv.checkpoint import TrainingProgress
    from smolconv.layouts.nanotron.stages import data_stages

    assert source.is_dir()
    progress = TrainingProgress(step=3, consumed_samples=12, consumed_tokens=192)
    config = yaml.safe_load(training_yaml(tmp_path, STAGES).read_text())
    warnings: list[str] = []
    stages, current = data_stages(progress, config, chosen="training.yaml", warnings=warnings)
    assert [stage["consumed_tokens_per_dataset_folder"] for stage in stages] == [{"imported": 64}, {"c": 128}, {}]
    assert current == 1 and len(warnings) == 1 and warnings[0].startswith("64 tokens")
    warnings.clear()
    uneven = TrainingProgress(step=3, consumed_samples=13, consumed_tokens=200)
    stages, _ = data_stages(uneven, config, chosen="training.yaml", warnings=warnings)
    assert [stage["consumed_train_samples"] for stage in stages] == [0, 13, 0]
    assert [stage["consumed_tokens_per_dataset_folder"] for stage in stages] == [{}, {"c": 200}, {}]
    assert len(warnings) == 1 and "do not divide by" in warnings[0]


def test_a_run_that_goes_on_by_another_config_keeps_its_counts_where_stages_start_together(tmp_path):
    source = FIXTURES / "nanotron/smollm3-tiny/tp1-pp2-dp1-zero0"
    before = metas(source)["data_stages"]
    starts = [stage["start_training_step"] for stage in before]
    length = before[0]["sequence_length"]
    longer = training_yaml(
        tmp_path, [*((f"s{i}", start, length, []) for i, start in enumerate(starts)), ("new", 50, 128, [])]
    )
    convert(source, tmp_path / "run", "nanotron", nanotron_config=longer)
    found = metas(tmp_path / "run")
    counts = ("consumed_train_samples", "consumed_tokens_per_dataset_folder", "start_training_step", "sequence_length")
    assert [[stage[c] for c in counts] for stage in found["data_stages"][:-1]] == [
        [s[c] for c in counts] for s in before
    ]
    assert found["data_stages"][-1]["name"] == "new" and found["last_stage_idx"] == metas(source)["last_stage_idx"]
    other = training_yaml(tmp_path, [("only", 1, length, [])])
    result = convert(source, tmp_path / "other", "nanotron", nanotron_config=other)
    assert any(f"no data stage that starts at step {starts[1]}" in warning for warning in result.warnings)
    assert metas(tmp_path / "other")["data_stages"] == before


@pytest.mark.parametrize("given", [False, True])
def test_the_switches_that_must_be_off_are_named(tmp_path, given):
    source = hf_models.saved(hf_models.llama(), tmp_path / "hf")
    config = {"nanotron_config": training_yaml(tmp_path, STAGES)} if given else {}
    result = convert(source, tmp_path / "run", "nanotron", **config)
    (said,) = [warning for warning in result.warnings if warning.startswith("resume in nanotron")]
    present = {name: (tmp_path / "run/0" / name).exists() for name in ("optimizer", "lr_scheduler")}
    assert present == {"optimizer": False, "lr_scheduler": given}
    for name, there in present.items():
        assert (f"checkpoints.load_{name}" in said) is not there
    assert ("begins at step 1" in said) is not given


def test_a_null_bos_is_said_and_comes_back(tmp_path):
    source = hf_models.saved(hf_models.llama(bos_token_id=None), tmp_path / "hf")
    assert json.loads((source / "config.json").read_text())["bos_token_id"] is None
    result = convert(source, tmp_path / "run", "nanotron")
    assert any(warning.startswith("bos_token_id is null") for warning in result.warnings)
    assert isinstance(json.loads((tmp_path / "run/0/model_config.json").read_text())["bos_token_id"], int)
    convert(tmp_path / "run", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["bos_token_id"] is None


# --- what an import must not lose -------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def trained_by_nanotron(run: Path, target: Path) -> Path:
    """The run one step later: nanotron saves its own metadata anew, without ``custom_metas``."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("smolconv_manifest.json"))
    (target / "0").rename(target / "1")
    (target / "latest.txt").write_text("1")
    path = target / "1/checkpoint_metadata.json"
    document = json.loads(path.read_text())
    document["metas"]["last_train_step"] = 1
    path.write_text(json.dumps({**document, "custom_metas": None}))
    return target


def scaling_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["rope_scaling"]


@pytest.mark.parametrize("scaling", [hf_models.LLAMA3_SCALING, YARN], ids=lambda scaling: scaling["rope_type"])
def test_a_scaling_comes_back_from_nanotron_unless_nanotron_has_trained_without_it(tmp_path, scaling):
    source = hf_models.saved(hf_models.llama(**hf_models.rope(1e4, scaling)), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", tp=2)
    back = convert(tmp_path / "run", tmp_path / "back", "hf")
    assert scaling_of(tmp_path / "back") == scaling
    assert any("imported with it, and nanotron" in warning for warning in back.warnings)
    assert (hf_models.logits(source) - hf_models.logits(tmp_path / "back")).abs().max() == 0
    # Also by way of another topology of nanotron, and of DeepSpeed.
    convert(tmp_path / "run", tmp_path / "tp1", "nanotron")
    convert(tmp_path / "tp1", tmp_path / "by tp1", "hf")
    convert(tmp_path / "run", tmp_path / "ds", "deepspeed")
    convert(tmp_path / "ds", tmp_path / "by ds", "hf")
    assert scaling_of(tmp_path / "by tp1") == scaling_of(tmp_path / "by ds") == scaling
    proved = api.convert(tmp_path / "run", tmp_path / "proved", to="hf", verify=True)
    assert proved.verification is not None and proved.verification["passed"]
    convert(tmp_path / "run", tmp_path / "asked", "hf", rope_scaling="as-trained")
    assert scaling_of(tmp_path / "asked") is None
    trained = trained_by_nanotron(tmp_path / "run", tmp_path / "trained")
    result = convert(trained, tmp_path / "later", "hf")
    assert scaling_of(tmp_path / "later") is None
    assert any("so the model was trained without it" in warning for warning in result.warnings)
    convert(trained, tmp_path / "believed", "hf", rope_scaling="as-configured")
    assert scaling_of(tmp_path / "believed") == scaling


def test_padding_that_we_added_is_taken_away_again(tmp_path):
    source = hf_models.saved(hf_models.llama(vocab_size=63), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", tp=2)
    assert json.loads((tmp_path / "run/0/model_config.json").read_text())["vocab_size"] == 64
    result = convert(tmp_path / "run", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["vocab_size"] == 63
    ours, theirs = hf_weights(tmp_path / "back"), hf_weights(source)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in theirs)
    assert any("from 64 to 63 rows. smolconv had padded it" in warning for warning in result.warnings)
    convert(tmp_path / "run", tmp_path / "kept", "hf", vocab_size=64)
    assert hf_weights(tmp_path / "kept")["model.embed_tokens.weight"].shape[0] == 64
    convert(trained_by_nanotron(tmp_path / "run", tmp_path / "trained"), tmp_path / "later", "hf")
    assert hf_weights(tmp_path / "later")["model.embed_tokens.weight"].shape[0] == 64


def test_adams_state_of_the_padding_goes_with_it(tmp_path):
    convert(FIXTURES / "nanotron/smollm2-tiny/tp1-pp1-dp1-zero0", tmp_path / "first", "hf", vocab_size=255)
    convert(tmp_path / "first", tmp_path / "run", "nanotron", tp=2, dp=2, zero_stage=1)
    convert(tmp_path / "run", tmp_path / "back", "hf")
    for path in sorted((tmp_path / "first/smolconv_state").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "back/smolconv_state" / path.name).read_bytes()


def test_a_note_of_an_import_that_cannot_be_is_refused(tmp_path):
    source = hf_models.saved(hf_models.llama(vocab_size=63), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", tp=2)
    path = tmp_path / "run/0/checkpoint_metadata.json"
    document = json.loads(path.read_text())
    for rows, error in (("many", CorruptFile), (0, CorruptFile), (65, UsageError)):
        document["custom_metas"]["smolconv"]["vocab_size"] = rows
        path.write_text(json.dumps(document))
        with pytest.raises(error, match="vocab"):
            convert(tmp_path / "run", tmp_path / "back", "hf")


# --- branches of published checkpoints --------------------------------------------------------------------------------

BRANCHES = "hf://HuggingFaceTB/SmolLM3-3B-checkpoints"


@pytest.mark.parametrize(
    ("branch", "step", "tokens"),
    [
        ("stage1-step-40000", 40_000, 94_371_840_000),
        ("stage2-step-4200000", 4_200_000, 9_909_043_200_000),
        ("stage3-step-4720000", 4_720_000, 11_135_877_120_000),
        ("lc-4k-to-32k-step-4000", 4000, 9_437_184_000),
        ("lc-32k-to-64k-step-20000", 20_000, 47_185_920_000),
    ],
)
def test_a_published_branch_says_its_step_and_tokens(branch, step, tokens):
    progress = published_progress(f"{BRANCHES}@{branch}")
    assert progress is not None
    assert (progress.step, progress.consumed_tokens) == (step, tokens)


@pytest.mark.parametrize(
    "uri",
    [
        BRANCHES, f"{BRANCHES}@main", f"{BRANCHES}@it-mid-training", f"{BRANCHES}@stage4-step-40000",
        f"{BRANCHES}@stage1-step-40000-v2", "hf://someone/SmolLM3-3B-checkpoints@stage1-step-40000",
        "hf://HuggingFaceTB/SmolLM3-3B@stage1-step-40000", "checkpoints/stage1-step-40000",
    ],
)  # fmt: skip
def test_no_other_name_is_guessed_from(uri):
    assert published_progress(uri) is None


def test_the_progress_of_a_branch_is_converted_and_decides_the_learning_rate(tmp_path, monkeypatch):
    source = hf_models.saved(hf_models.smollm3(), tmp_path / "hf")
    for place in ("smolconv.conversion", "smolconv.continual_pretraining.run.start"):
        monkeypatch.setattr(f"{place}.open_source", lambda *_, **__: source)
    uri = f"{BRANCHES}@stage1-step-40000"
    result = convert(uri, tmp_path / "run", "nanotron")
    found = metas(tmp_path / "run")
    assert (found["last_train_step"], found["consumed_train_samples"], found["consumed_tokens_total"]) == (
        40_000, 23_040_000, 94_371_840_000,
    )  # fmt: skip
    assert any("taken from the branch's name" in warning for warning in result.warnings)
    convert(uri, tmp_path / "copy", "hf")
    state = json.loads((tmp_path / "copy/smolconv_state/state.json").read_text())
    assert (state["step"], state["progress"]["consumed_tokens"]) == (40_000, 94_371_840_000)
    # A folder of its own, which says nothing of the kind.
    convert(source, tmp_path / "plain", "hf")
    assert not (tmp_path / "plain/smolconv_state").exists()

    recipe = load_recipe("smollm3-3b-stable")
    recipe = recipe.model_copy(update={"start": recipe.start.model_copy(update={"optimizer": False, "data": False})})
    step = completed_steps(recipe, published_progress(uri))
    assert (step, learning_rate(recipe.schedule, step)) == (40_000, 2e-4)
    with pytest.raises(UsageError, match=r"start\.learning_rate"):
        completed_steps(recipe, published_progress(f"{BRANCHES}@main"))
