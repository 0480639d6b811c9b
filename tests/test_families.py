"""The families beside SmolLM's: transformers, and our own forward of nanotron's tensors, are the judges."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from conftest import FIXTURES, convert, files_below, hf_weights, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import nanotron_specs
from test_sources import parsed, sources
from test_spec import CONFIGS, SPELLINGS, rope_of
from test_training_model import MAX_NOISE, batch, gradients_of, noise, plain_loss, run, training
from test_verify import tiers, turned_rows, verified
from training import recipe, recipe_document, token_folder, train
from training_model_worker import Packed

from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.errors import NameMismatch, UnsupportedModel, UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.models import nanotron as nanotron_models
from smolconv.models.huggingface import parameter_shapes, spec_from_hf, spec_to_hf
from smolconv.models.nanotron import spec_to_nanotron
from smolconv.models.registry import FAMILIES
from smolconv.models.spec import ModelSpec
from smolconv.verification.compare import AsStored, VerifyOptions, VerifyReport, verify_checkpoints

MODELS: dict[str, Callable[..., torch.nn.Module]] = {"qwen2": hf_models.qwen2, "qwen3": hf_models.qwen3}
#: What a layer has that Llama's has not: changed, attention is another.
OWN = {"qwen2": "model.layers.2.self_attn.k_proj.bias", "qwen3": "model.layers.2.self_attn.k_norm.weight"}
SMOLLM2, SMOLLM3 = (FIXTURES / "nanotron" / name / "tp1-pp2-dp1-zero0" for name in ("smollm2-tiny", "smollm3-tiny"))
#: config.json of published models, as Qwen wrote them, and how many parameters they have by the Hub.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
            "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
            "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
            "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        596_049_920,
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def plain(request: pytest.FixtureRequest) -> Any:
    """transformers' own model, random, fp32, grouped-query."""
    return MODELS[request.param]()


@pytest.fixture
def source(plain: Any, tmp_path: Path) -> Path:
    return hf_models.saved(plain, tmp_path / "hf")


def verify(a: Path, b: Path, architecture: str | None = None, **options: Any) -> VerifyReport:
    """As the command does: each side's own forward runs on the folder."""
    read = ReadOptions(architecture=architecture, optimizer=False)
    left, right = (read_checkpoint(folder, read) for folder in (a, b))
    stored = (AsStored(folder=a, options=read), AsStored(folder=b, options=read))
    return verify_checkpoints(left, right, VerifyOptions(**{"length": 64, **options}), stored=stored)


def same_weights(a: Path, b: Path) -> bool:
    left, right = hf_weights(a), hf_weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_no_product_file_but_a_familys_own_and_ggufs_knows_it_by_name():
    elsewhere = [path for path in sources() if not {"models", "gguf", "benchmarks"} & set(path.parts)]
    named = [
        f"{path}:{node.lineno}"
        for path in elsewhere
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FAMILIES
    ]
    assert len(elsewhere) > 50 and not named


# --- configs ---------------------------------------------------------------------------------------------------------


@st.composite
def specs(draw, architecture: str) -> ModelSpec:
    """Any that transformers can hold."""
    spec = draw(nanotron_specs("smollm3", max_layers=4))
    biased = {"qwen2": st.just(True)}.get(architecture, st.booleans())
    head_size = spec.head_size if architecture == "qwen2" else draw(st.sampled_from([2, 4, 16]))
    return replace(
        spec, architecture=architecture, use_rope=(True,) * spec.num_layers, attention_bias=draw(biased),
        head_size=head_size,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", MODELS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_transformers_builds_a_written_config_with_these_values_and_parameters(architecture, data):
    from transformers import AutoModelForCausalLM

    spec = data.draw(specs(architecture))
    for left_out in SPELLINGS.values():
        written = {name: value for name, value in spec_to_hf(spec, {}, "float32").items() if name not in left_out}
        config = CONFIGS[architecture].from_dict({**written, "pad_token_id": None})
        assert rope_of(config) == (spec.rope_theta, spec.rope_scaling)
        assert spec_from_hf(json.loads(config.to_json_string(use_diff=True))) == spec
        assert spec_from_hf(json.loads(json.dumps(written))) == spec
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(spec).items()) == list(expected.items())


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_the_parameters_that_the_hub_counts(config, parameters):
    shapes = parameter_shapes(spec_from_hf(config))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


@pytest.mark.parametrize("architecture", MODELS)
def test_a_window_that_slides_is_refused(architecture):
    config = {"model_type": architecture, "num_hidden_layers": 2}
    assert all(spec_from_hf({**config, "use_sliding_window": False, "sliding_window": 8}).use_rope)
    slides = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for fields in (slides, {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(UnsupportedModel, match="sliding"):
            spec_from_hf({**config, **fields})


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "fields", [{}, {"max_window_layers": 3}, {"max_window_layers": 4}, {"layer_types": ["full_attention"] * 4}], ids=str
)
def test_a_window_that_no_layer_uses_is_not_refused(architecture, fields):
    config = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, **fields}
    if not fields:
        del config["max_window_layers"]  # the class's own
    if "sliding_attention" in CONFIGS[architecture](**config).layer_types:
        with pytest.raises(UnsupportedModel, match="sliding"):
            spec_from_hf({"model_type": architecture, **config})
    else:
        written = spec_to_hf(spec_from_hf({"model_type": architecture, **config}), {}, "float32")
        assert written["layer_types"] == ["full_attention"] * 4 and not written["use_sliding_window"]


def test_another_model_type_is_refused_with_those_that_are_read():
    with pytest.raises(UnsupportedModel, match=", ".join(rf"{name} \(.*\)" for name in FAMILIES)):
        spec_from_hf({"model_type": "mistral"})


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"zero_stage": 1, "world_size": 2}, {"zero_stage": 3, "world_size": 2}],
    ids=["universal", "zero1", "zero3"],
)  # fmt: skip
def test_to_deepspeed_and_back_no_bit_is_lost(source, tmp_path, options):
    result = convert(source, tmp_path / "ds", "deepspeed", **options)
    assert any("none is published" in warning for warning in result.warnings)
    convert(tmp_path / "ds", tmp_path / "back", "hf", optimizer=False)
    assert same_weights(source, tmp_path / "back")
    assert spec_from_hf(config_of(tmp_path / "back")) == spec_from_hf(config_of(source))
    assert torch.equal(hf_models.logits(source), hf_models.logits(tmp_path / "back"))


def test_deepspeeds_tensors_compute_the_same_logits(source, tmp_path):
    result = convert(source, tmp_path / "ds", "deepspeed", zero_stage=1, world_size=2, verifier=verified)
    assert result.verification is not None and result.verification["passed"]
    report = verify(source, tmp_path / "ds")
    assert report.passed and tiers(report) == {"spec": True, "tensors": True, "logits": True}


def test_a_change_of_what_only_this_family_has_is_noticed(plain, source, tmp_path):
    name = OWN[plain.config.model_type]
    planted = hf_models.edited(source, tmp_path / "planted", lambda weights: weights[name].zero_())
    report = verify(source, planted)
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert report.first_divergence == "model.layers.2.self_attn"
    lost = hf_models.edited(source, tmp_path / "lost", lambda weights: weights.pop(name))
    with pytest.raises(NameMismatch, match=name):
        read_checkpoint(lost)


# --- nanotron --------------------------------------------------------------------------------------------------------


@pytest.fixture
def qwen2(tmp_path: Path) -> Path:
    return hf_models.saved(hf_models.qwen2(), tmp_path / "qwen2")


@pytest.mark.parametrize("options", [{}, {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1}], ids=["whole", "cut"])
def test_qwen2_through_nanotron_is_itself_again_where_architecture_says_so(qwen2, tmp_path, options):
    convert(qwen2, tmp_path / "run", "nanotron", verifier=verified, **options)
    written = json.loads(next((tmp_path / "run").glob("*/model_config.json")).read_text())
    assert (written["is_qwen2_config"], written["attention_bias"], written["no_rope_layer"]) == (True, True, None)
    convert(tmp_path / "run", tmp_path / "back", "hf", architecture="qwen2", verifier=verified)
    assert same_weights(qwen2, tmp_path / "back")
    config = config_of(tmp_path / "back")
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "attention_bias" not in config
    assert spec_from_hf(config) == spec_from_hf(config_of(qwen2))
    # And from that run to nanotron again, whose document still speaks of it.
    convert(tmp_path / "run", tmp_path / "again", "nanotron", architecture="qwen2", **options)
    models = [
        {name: data for name, data in files_below(tmp_path / run).items() if "/model" in name}
        for run in ("run", "again")
    ]
    assert models[0] == models[1]


def test_without_architecture_it_is_a_smollm3_that_computes_the_same(qwen2, tmp_path):
    convert(qwen2, tmp_path / "run", "nanotron")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    config = config_of(tmp_path / "back")
    assert config["architectures"] == ["SmolLM3ForCausalLM"] and config["attention_bias"]
    assert config["no_rope_layers"] == [1] * 4 and "max_window_layers" not in config
    assert not hf_weights(tmp_path / "back")["model.layers.0.self_attn.o_proj.bias"].any()
    assert torch.equal(hf_models.logits(qwen2), hf_models.logits(tmp_path / "back"))
    report = verify(tmp_path / "run", qwen2)
    assert report.spec_differences == ("architecture: 'smollm3' in A, 'qwen2' in B",) and not report.passed


def test_our_forward_of_nanotrons_tensors_agrees_with_transformers_and_notices_a_wrong_bias(
    qwen2, tmp_path, monkeypatch
):
    convert(qwen2, tmp_path / "run", "nanotron")
    report = verify(tmp_path / "run", qwen2, architecture="qwen2")
    assert report.passed and tiers(report) == {"spec": True, "tensors": True, "logits": True}

    def wrong(spec: ModelSpec, kind: str, **options: Any) -> Any:
        return (turned_rows("q")(rule) if kind == "bias" else rule)(spec, kind, **options)

    rule = nanotron_models.attention_rule
    monkeypatch.setattr(nanotron_models, "attention_rule", wrong)
    convert(qwen2, tmp_path / "planted", "nanotron")
    report = verify(tmp_path / "planted", qwen2, architecture="qwen2")
    assert tiers(report) == {"spec": True, "tensors": True, "logits": False}
    assert report.first_divergence == "model.layers.0.self_attn"


def edited_config(source: Path, target: Path, **fields: Any) -> Path:
    path = target / "model_config.json"
    target.mkdir()
    path.write_text(json.dumps({**json.loads(next(source.glob("*/model_config.json")).read_text()), **fields}))
    return path


REFUSED: dict[str, tuple[Path, dict[str, Any], str, str]] = {
    "llama": (SMOLLM2, {}, "qwen2", "sets is_llama_config, which holds llama; --architecture is qwen2"),
    "no rope": (SMOLLM3, {"attention_bias": True}, "qwen2", "layer 3 does not rotate"),
    "no bias": (SMOLLM3, {"no_rope_layer": None}, "qwen2", "attention_bias is not set"),
    "smollm3": (SMOLLM3, {}, "llama", "sets is_qwen2_config, which holds smollm3 or qwen2"),
    "not in nanotron": (SMOLLM3, {}, "qwen3", "holds smollm3 or qwen2; --architecture is qwen3"),
}


@pytest.mark.parametrize(("run_folder", "fields", "asked", "why"), REFUSED.values(), ids=REFUSED)
def test_an_architecture_that_the_checkpoint_contradicts_is_refused(run_folder, fields, asked, why, tmp_path):
    config = edited_config(run_folder, tmp_path / "config", **fields)
    with pytest.raises(UnsupportedModel, match=why):
        read_checkpoint(run_folder, ReadOptions(config=config, architecture=asked))


def test_hugging_faces_model_type_stands_and_unknown_names_are_no_architecture():
    with pytest.raises(UnsupportedModel, match="model_type is llama; --architecture is qwen2"):
        read_checkpoint(SMOLLM2.parent / "expected_hf", ReadOptions(architecture="qwen2"))
    assert read_checkpoint(SMOLLM3, ReadOptions(architecture="smollm3")) == read_checkpoint(SMOLLM3)
    with pytest.raises(UsageError, match="--architecture gpt2: expected one of llama, smollm3, qwen2"):
        read_checkpoint(SMOLLM3, ReadOptions(architecture="gpt2"))


def test_qwen3_has_no_place_in_nanotron(tmp_path):
    source = hf_models.saved(hf_models.qwen3(), tmp_path / "hf")
    refused = run_cli("convert", source, tmp_path / "run", "--to", "nanotron")
    assert refused.code == 3 and "q_norm, k_norm" in refused.stderr
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnsupportedModel, match="no class of nanotron has these"):
        spec_to_nanotron(spec_from_hf(config_of(source)), {})


def test_the_command_line_reads_a_qwen2_run(qwen2, tmp_path):
    run_folder, asked = tmp_path / "run", ("--architecture", "qwen2")
    convert(qwen2, run_folder, "nanotron")
    done = run_cli("convert", run_folder, tmp_path / "back", "--to", "hf", *asked, "--json")
    assert done.code == 0 and same_weights(qwen2, tmp_path / "back")
    found = [json.loads(run_cli("inspect", run_folder, *more, "--json").stdout) for more in ((), asked)]
    assert [document["architecture"] for document in found] == ["smollm3", "qwen2"]
    assert run_cli("diff", run_folder, qwen2, *asked).code == 0
    assert run_cli("verify", run_folder, qwen2, *asked, "--tensors-only").code == 0
    refused = run_cli("convert", SMOLLM3, tmp_path / "out", "--to", "hf", *asked)
    assert refused.code == 3 and "does not rotate" in refused.stderr
    assert run_cli("convert", SMOLLM3, tmp_path / "out", "--to", "hf", "--architecture", "gpt2").code == 2


# --- training --------------------------------------------------------------------------------------------------------


def test_packed_documents_give_transformers_loss_and_gradients_of_each_alone(plain):
    given_batch = batch([[7, 20, 5], [5, 5, 22]])
    built = training(plain)
    assert isinstance(built, type(plain))
    loss, gradients = run(built, given_batch)
    expected = plain_loss(plain, given_batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert noise(gradients, gradients_of(plain)) < MAX_NOISE


def test_the_comparison_notices_a_parameter_of_its_own_that_is_lost(plain):
    given_batch, built = batch([[7, 20, 5]]), training(plain)
    with torch.no_grad():
        built.get_parameter(OWN[plain.config.model_type]).zero_()
    assert abs(run(built, given_batch)[0].item() / plain_loss(plain, given_batch).item() - 1) > 1e-4


def kept_bytes(plain: Any, dtype: str, given_batch: Packed) -> int:
    """Of storages that autograd keeps of a forward pass, parameters aside."""
    built = training(plain, dtype=dtype)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built(**given_batch._asdict())
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_counts_what_autograd_keeps_of_qwen3s_norms_of_heads(dtype, tmp_path):
    given_batch = batch([[32]])
    models = hf_models.qwen3(head_dim=4), hf_models.llama()
    found = [kept_bytes(plain, dtype, given_batch) for plain in models]
    asked = recipe(tmp_path, tmp_path, model={"dtype": dtype})
    parts = [memory_parts(asked, spec_from_hf(plain.config.to_dict()), 1) for plain in models]
    estimated = [next(part.bytes for part in found if part.name == "activations") for found in parts]
    assert found[0] - found[1] == estimated[0] - estimated[1]


def test_a_recipe_trains_a_nanotron_run_as_the_architecture_that_it_names(tmp_path):
    qwen2 = hf_models.saved(hf_models.qwen2(vocab_size=256), tmp_path / "qwen2")
    convert(qwen2, tmp_path / "run", "nanotron")
    model = {"architecture": "qwen2", "source": str(tmp_path / "run")}
    document = recipe_document(tmp_path / "run", token_folder(tmp_path / "tokens"), model=model)
    assert len(train(document, tmp_path / "out")) == 4  # past the start gate, which has the source's first loss
    trained = read_checkpoint(tmp_path / "out" / "checkpoints")
    assert trained.spec == spec_from_hf(config_of(qwen2)) and trained.has_optimizer
