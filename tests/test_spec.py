"""Configs, read and written: transformers' own classes and nanotron's own documents are the judges."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import transformers
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import hf_specs, nanotron_specs, tiny
from transformers import LlamaConfig

from smolconv.errors import UnsupportedModel
from smolconv.models.huggingface import parameter_shapes, spec_from_hf, spec_to_hf
from smolconv.models.nanotron import spec_from_nanotron, spec_to_nanotron
from smolconv.models.registry import FAMILIES
from smolconv.models.spec import spec_differences

CONFIGS = {name: getattr(transformers, family.hf_class).config_class for name, family in FAMILIES.items()}
MODEL_CONFIGS = sorted((FIXTURES / "nanotron").glob("*/*/3/model_config.json"))
EXPECTED_HF = sorted((FIXTURES / "nanotron").glob("*/expected_hf/config.json"))
#: Fields that the classes derive from others when they are not given.
DERIVED = {
    "num_key_value_heads": lambda c: c.num_attention_heads,
    "head_dim": lambda c: c.hidden_size // c.num_attention_heads,
    "no_rope_layers": lambda c: [int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers)],
}


def fixture_id(path) -> str:
    return str(path.relative_to(FIXTURES / "nanotron"))


def rope_of(config: Any) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling as transformers holds them: in ``rope_parameters`` from v5 on, in two fields before."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        parameters = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "type")}
    return parameters["rope_theta"], None if scaling.get("rope_type", "default") == "default" else scaling


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "name"), [(a, name) for a in FAMILIES for name in FAMILIES[a].hf_defaults])
def test_what_a_config_leaves_out_has_the_default_of_the_installed_transformers(architecture, name):
    # What a class may set aside for another of its fields.
    given = {"use_sliding_window": True} if name == "sliding_window" else {}
    config, ours = CONFIGS[architecture](**given), FAMILIES[architecture].hf_defaults[name]
    if name == "mlp_bias" and not hasattr(config, name):
        pytest.skip("transformers 4.53 has no such field in SmolLM3")
    theirs = rope_of(config)[0] if name == "rope_theta" else getattr(config, name)
    assert theirs == (DERIVED[name](config) if ours is None and name in DERIVED else ours)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_an_empty_config_means_what_its_class_means(architecture):
    assert spec_from_hf({"model_type": architecture}) == spec_from_hf(CONFIGS[architecture]().to_dict())


@settings(max_examples=200, deadline=None)
@given(hf_specs())
def test_a_written_hf_config_reads_back_as_the_same_spec(spec):
    assert spec_from_hf(json.loads(json.dumps(spec_to_hf(spec, {}, "bfloat16")))) == spec


SPELLINGS = {"both": (), "v4 only": ("rope_parameters",)}
if hasattr(LlamaConfig(), "rope_parameters"):  # transformers v4 cannot read the v5 spelling
    SPELLINGS["v5 only"] = ("rope_theta", "rope_scaling")


@pytest.mark.parametrize("left_out", SPELLINGS.values(), ids=SPELLINGS)
@settings(max_examples=60, deadline=None)
@given(spec=hf_specs())
def test_transformers_loads_a_written_config_to_the_same_values(left_out, spec):
    written = {name: value for name, value in spec_to_hf(spec, {}, "float32").items() if name not in left_out}
    config = CONFIGS[spec.architecture].from_dict(written)
    assert rope_of(config) == (spec.rope_theta, spec.rope_scaling)
    found = (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.vocab_size, config.max_position_embeddings, config.rms_norm_eps,
        config.tie_word_embeddings, config.attention_bias, config.mlp_bias, config.hidden_act,
    )  # fmt: skip
    assert found == (
        spec.hidden_size, spec.intermediate_size, spec.num_layers, spec.num_heads,
        spec.num_kv_heads, spec.vocab_size, spec.max_positions, spec.rms_norm_eps,
        spec.tied, spec.attention_bias, spec.mlp_bias, spec.activation,
    )  # fmt: skip
    if spec.architecture == "smollm3":
        assert config.no_rope_layers == [int(rotates) for rotates in spec.use_rope]
        assert set(config.layer_types) == {"full_attention"}
    else:
        assert config.head_dim == spec.head_size


@pytest.mark.parametrize("left_out", SPELLINGS.values(), ids=SPELLINGS)
@settings(max_examples=60, deadline=None)
@given(spec=hf_specs())
def test_a_config_that_transformers_saves_again_is_the_same_spec(left_out, spec):
    written = {name: value for name, value in spec_to_hf(spec, {}, "float32").items() if name not in left_out}
    saved = CONFIGS[spec.architecture].from_dict(written).to_json_string(use_diff=True)
    assert spec_from_hf(json.loads(saved)) == spec


@pytest.mark.parametrize("path", EXPECTED_HF, ids=fixture_id)
def test_configs_that_nanotrons_converter_wrote_mean_the_model_config_they_came_from(path):
    native = json.loads(next(path.parent.parent.glob("tp*/3/model_config.json")).read_text())
    assert spec_from_hf(json.loads(path.read_text())) == spec_from_nanotron(native)


@given(ids=st.fixed_dictionaries({"bos_token_id": st.integers(0, 9), "eos_token_id": st.lists(st.integers(0, 9))}))
def test_token_ids_are_carried_and_a_missing_pad_id_stays_missing(ids):
    config = spec_to_hf(tiny("smollm3"), {**ids, "pad_token_id": None}, "float32")
    assert {name: config[name] for name in ids} == ids
    assert config["pad_token_id"] is None


def base_hf(architecture: str = "llama", **fields: Any) -> dict[str, Any]:
    return {**spec_to_hf(tiny(architecture), {}, "float32"), **fields}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (base_hf(model_type="mistral"), "mistral"),
        (base_hf(rope_theta=1.0), "rope_theta"),
        (base_hf(rope_scaling={"type": "linear", "factor": 4.0}), "rope_scaling"),
        (base_hf(quantization_config={"quant_method": "gptq"}), "quantised"),
        (base_hf(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (base_hf(no_rope_layers=[1, 1, 1, 0]), "no_rope_layers"),
        (base_hf("smollm3", use_sliding_window=True, sliding_window=8, layer_types=None), "sliding"),
        (base_hf("smollm3", layer_types=["sliding_attention"] * 4), "sliding"),
        (base_hf("smollm3", no_rope_layers=[1, 0]), "2 layers"),
        (base_hf(num_key_value_heads=4), "multiple"),
        (base_hf(head_dim=3), "even"),
        (base_hf(hidden_size=0), "hidden_size"),
        (base_hf(vocab_size="many"), "vocab_size"),
    ],
)
def test_hf_configs_that_cannot_be_represented_are_refused(config, named):
    with pytest.raises(UnsupportedModel, match=named):
        spec_from_hf(config)


def test_the_old_name_of_the_scaling_type_means_the_same():
    config = {name: value for name, value in base_hf().items() if name != "rope_parameters"}
    old = spec_from_hf({**config, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old.rope_scaling == {"rope_type": "linear", "factor": 2.0}


# --- nanotron --------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(nanotron_specs())
def test_a_written_nanotron_config_reads_back_as_the_same_spec(spec):
    document = json.loads(json.dumps(spec_to_nanotron(spec, {})))
    assert spec_from_nanotron(document, rope_as_configured=True) == spec


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=fixture_id)
def test_fields_are_written_in_nanotrons_order(path):
    original = json.loads(path.read_text())
    assert list(spec_to_nanotron(spec_from_nanotron(original), original)) == list(original)


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=fixture_id)
def test_written_values_are_nanotrons_but_for_switches_that_no_spec_knows(path):
    original = json.loads(path.read_text())
    written = spec_to_nanotron(spec_from_nanotron(original), original)
    assert {name for name in original if written[name] != original[name]} <= {"z_loss_coefficient"}


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=fixture_id)
def test_nanotrons_rope_scaling_is_ignored_as_its_forward_ignores_it(path):
    original = {**json.loads(path.read_text()), "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert spec_from_nanotron(original).rope_scaling is None
    assert spec_from_nanotron(original, rope_as_configured=True).rope_scaling == original["rope_scaling"]


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (tiny("smollm3", use_rope=(True, False, False, True)), "no_rope_layer"),
        (tiny("smollm3", num_layers=6), "no_rope_layer"),  # only layer 3, but 4 does not divide 6
        (tiny(head_size=8), "head_dim"),
        (tiny(mlp_bias=True), "mlp_bias"),
        (tiny("smollm3", mlp_bias=True), "mlp_bias"),
        (tiny(attention_bias=True), "attention_bias"),
    ],
)
def test_models_that_nanotron_cannot_hold_are_refused(spec, named):
    with pytest.raises(UnsupportedModel, match=named):
        spec_to_nanotron(spec, {})


def base_nanotron(architecture: str = "smollm3", **fields: Any) -> dict[str, Any]:
    return {**spec_to_nanotron(tiny(architecture), {}), **fields}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (base_nanotron(moe_config={"num_experts": 2}), "moe_config"),
        (base_nanotron(sliding_window_size=16), "sliding_window_size"),
        (base_nanotron(rope_seq_len_interpolation_factor=2.0), "rope_seq_len_interpolation_factor"),
        (base_nanotron(no_rope_layer=0), "no_rope_layer"),
        (base_nanotron(rope_theta=None), "rope_theta"),
        (base_nanotron(is_qwen2_config=False), "is_qwen2_config"),
        (base_nanotron(hidden_size=25), "hidden_size"),
    ],
)
def test_nanotron_configs_that_cannot_be_represented_are_refused(config, named):
    with pytest.raises(UnsupportedModel, match=named):
        spec_from_nanotron(config)


def test_nanotrons_llama_never_has_the_attention_bias_that_its_config_offers():
    assert not spec_from_nanotron(base_nanotron("llama", attention_bias=True)).attention_bias


# --- specs -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(hf_specs())
def test_parameters_are_those_of_the_transformers_model_in_its_order(spec):
    import torch
    from transformers import AutoModelForCausalLM

    if not hasattr(CONFIGS[spec.architecture](), "mlp_bias"):
        spec = replace(spec, mlp_bias=False)
    config = CONFIGS[spec.architecture].from_dict({**spec_to_hf(spec, {}, "float32"), "pad_token_id": None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(spec).items()) == list(expected.items())


def test_differences_name_the_field_and_both_values():
    assert spec_differences(tiny(), tiny()) == []
    (theta,) = spec_differences(tiny(rope_theta=1e4), tiny(rope_theta=5e4))
    assert "rope_theta" in theta and "10000.0" in theta and "50000.0" in theta
    (nope,) = spec_differences(tiny("smollm3"), tiny("smollm3", use_rope=(True,) * 4))
    assert "layer 3 is NoPE in A, RoPE in B" in nope
