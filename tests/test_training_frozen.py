"""Parameters that a layout has no place for: nanotron's o_proj has no bias. A run that comes from there, or is exported
there, holds them at zero; what an export could not hold is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import yaml
from conftest import convert, run_cli
from forked_worker import work
from training import losses, recipe_document, token_folder

from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoints import step_folder
from smolconv.continual_pretraining.run.start import prepare_start
from smolconv.errors import UsageError
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.forward import to_torch

pytest.importorskip("deepspeed")

BIASES = tuple(f"model.layers.{i}.self_attn.o_proj.bias" for i in range(4))
BOTH = {"formats": ["nanotron", "hf"], "optimizer": True}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> Path:
    """A SmolLM3 with biases on q, k and v, which are random, and on o, where they are zero."""
    model = hf_models.smollm3(vocab_size=256, attention_bias=True)
    return hf_models.saved(model, tmp_path_factory.mktemp("biased") / "hf")


@pytest.fixture(scope="module")
def native(biased, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "nanotron"
    convert(biased, folder, "nanotron")
    return folder


def document(source: Path, tokens: Path, stage: int = 1, steps: int = 3, **changes: Any) -> dict[str, Any]:
    batch = {"zero_stage": stage, "micro_batch_sequences": 1, "global_batch_sequences": 2}
    changes = {"checkpoints": {"every_steps": 1, "keep": 9}, **changes}
    return recipe_document(source, tokens, parallelism=batch, schedule={"train_steps": steps}, **changes)


@pytest.fixture(scope="module")
def trained(native, tokens, tmp_path_factory) -> Path:
    """Three steps at ZeRO-1, exported with Adam's state."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ended = work(document(native, tokens, export=BOTH), run)
    assert ended.code == 0, ended.log[-4000:]
    assert "4 parameters stay zero, because nanotron cannot hold them" in ended.log
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: to_torch(tensor) for name, tensor in read_checkpoint(folder).parameters.items()}


def test_biases_that_nanotron_lacks_stay_zero_and_both_exports_are_the_trained_model(trained, native):
    before, after = weights(native), weights(trained / "checkpoints")
    assert not any(after[name].any() for name in BIASES)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == set(after) - set(BIASES)  # the biases of q, k and v among them
    for layout in ("nanotron", "hf"):
        exported = read_checkpoint(trained / "export" / layout)
        assert exported.has_optimizer and exported.progress is not None and exported.progress.step == 3
        found = weights(trained / "export" / layout)
        assert found.keys() == after.keys() and all(torch.equal(found[name], after[name]) for name in after)


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.matrix), 1, pytest.param(2, marks=pytest.mark.matrix), 3]
)
def test_they_stay_zero_at_every_stage_and_losses_are_those_of_one_run(stage, trained, native, tokens, tmp_path):
    run = tmp_path / "run"
    ended = work(document(native, tokens, stage, export=BOTH), run, resume=str(step_folder(trained, 1)))
    assert ended.code == 0, ended.log[-4000:]
    assert losses(run) == pytest.approx(losses(trained)[1:], abs=1e-6)
    assert losses(run) != losses(trained)[:2]  # the control
    assert read_checkpoint(run / "checkpoints").frozen == BIASES
    assert not any(tensor.any() for name, tensor in weights(run / "checkpoints").items() if name in BIASES)
    more = Recipe.model_validate(document(native, tokens, stage, steps=4, export=BOTH))
    start = prepare_start(more, run, 1, "auto")
    assert (start.frozen, start.step, Path(start.folder)) == (BIASES, 3, run / "checkpoints")  # loaded as it was saved
    if stage == 3:
        again = work(document(native, tokens, stage, steps=4, export=BOTH), run)
        assert again.code == 0 and len(losses(run)) == 3, again.log[-4000:]


def test_a_run_that_has_nothing_to_do_with_nanotron_trains_them(biased, trained, tokens, tmp_path):
    def frozen(source: Path, **changes: Any) -> tuple[str, ...]:
        return prepare_start(
            Recipe.model_validate(document(source, tokens, **changes)), tmp_path / "run", 1, "auto"
        ).frozen

    assert frozen(biased, export={"formats": ["hf"]}) == ()
    assert frozen(biased, export={"formats": ["nanotron"]}) == BIASES
    assert frozen(step_folder(trained, 3)) == BIASES  # which froze them


@pytest.fixture(scope="module")
def shifted(tmp_path_factory) -> Path:
    """The same with a bias of o that is not zero."""
    model = hf_models.smollm3(vocab_size=256, attention_bias=True)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.bias[3] = 0.5
    return hf_models.saved(model, tmp_path_factory.mktemp("shifted") / "hf")


UNTOLD = [
    pytest.param({}, r"layers\.2\.self_attn\.o_proj\.bias is not zero", id="a bias that nanotron lacks"),
    pytest.param({"source": "qwen3"}, "nanotron cannot hold this model", id="a family that nanotron lacks"),
    pytest.param(
        {"source": "llama", "optimizer": {"no_decay": [r".*\.q_proj\..*"]}}, "hyperparameters",
        id="a decay of q alone, in nanotron's one tensor of q, k and v",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "said"), UNTOLD)
def test_what_an_export_cannot_hold_is_refused_before_anything_is_trained(what, said, shifted, tokens, tmp_path):
    source, changes = shifted, dict(what)
    if name := changes.pop("source", None):
        source = hf_models.saved(getattr(hf_models, name)(vocab_size=256), tmp_path / name)
    made = document(source, tokens, export=BOTH, **changes)
    with pytest.raises(UsageError, match=said) as refused:
        prepare_start(Recipe.model_validate(made), tmp_path / "run", 1, "auto")
    assert "export.formats: nanotron" in str(refused.value) and not (tmp_path / "run").exists()
    alone = Recipe.model_validate({**made, "export": {"formats": ["hf"], "optimizer": True}})
    assert prepare_start(alone, tmp_path / "run", 1, "auto").frozen == ()  # the control


def test_a_dry_run_refuses_it_alike(shifted, tokens, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document(shifted, tokens, export=BOTH, output=str(tmp_path / "run"))))
    done = run_cli("continue-train", path, "--dry-run")
    assert done.code == 2 and "layers.2.self_attn.o_proj.bias is not zero" in done.stderr, done.stderr
