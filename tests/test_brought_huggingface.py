"""What people really bring in Hugging Face folders: names, dtypes, rotary embeddings and files beside the weights.

Right is what transformers computes from the same folder, where it loads it as its author meant.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES, convert, hf_weights
from hf_models import LLAMA3_SCALING, edited, llama, logits, rope, saved, smollm3
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smolconv.errors import BadCheckpoint, NameMismatch, UnsupportedModel
from smolconv.layouts.registry import layout_of, read_checkpoint
from smolconv.models.huggingface import ROPE_TYPES
from smolconv.models.names import StoredNames, stored_names
from smolconv.replacing import lost_with
from smolconv.verification.compare import VerifyOptions, verify_checkpoints

Tensors = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Mapping[str, Path]:
    """One folder of each kind, as transformers saves them."""
    home = tmp_path_factory.mktemp("folders")
    return {
        "tied": saved(llama(num_hidden_layers=2), home / "tied"),
        "untied": saved(llama(num_hidden_layers=2, tie_word_embeddings=False), home / "untied"),
        "smollm3": saved(smollm3(), home / "smollm3"),
    }


@pytest.fixture(scope="module")
def expected(folders) -> Mapping[str, torch.Tensor]:
    return {kind: logits(folder) for kind, folder in folders.items()}


def renamed(source: Path, target: Path, rename: Callable[[str], str | None], **more: torch.Tensor) -> Path:
    """A copy whose tensors have other names; None leaves one out."""

    def edit(tensors: Tensors) -> None:
        found = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update({name: tensor for name, tensor in found.items() if name is not None}, **more)

    return edited(source, target, edit)


def configured(source: Path, target: Path, **fields: Any) -> Path:
    """A copy with other fields in its config; None takes one out."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    left = {name: value for name, value in {**config, **fields}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(left))
    return target


def forward_difference(folder: Path, known: torch.Tensor) -> float:
    """How far ``verify``'s own forward on the folder is from these logits, and that of what ``convert`` writes."""
    from smolconv.verification.forward import ForwardPass
    from smolconv.verification.hf import FolderWeights, TransformersSide

    side = TransformersSide(FolderWeights(folder), torch.float32)
    tokens = torch.arange(known.shape[1])[None] * 7 % side.vocab_size
    run = ForwardPass(tokens=tokens, positions=torch.arange(known.shape[1])[None], attention="sdpa")
    side.begin([run])
    for layer in range(side.num_layers):
        side.advance(layer, [run])
    side.finish([run])
    found = run.hidden @ side.head_rows(0, side.vocab_size).T
    return (found - known).abs().max().item()


# --- Names -----------------------------------------------------------------------------------------------------------


NAMES: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "only the head's name": ("tied", lambda name: HEAD if name == EMBEDDING else name),
    "saved by LlamaModel": ("tied", lambda name: name.removeprefix("model.")),
    "saved by SmolLM3Model": ("smollm3", lambda name: name.removeprefix("model.")),
    "no prefix but of the head": ("untied", lambda name: name.removeprefix("model.")),
}


#: transformers v4 fills the embedding of the first with random numbers, and refuses the second.
V5_ONLY = ("only the head's name", "no prefix but of the head")


def test_a_null_head_size_becomes_a_number_that_transformers_can_use(folders, expected, tmp_path):
    source = Path(shutil.copytree(folders["smollm3"], tmp_path / "brought"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "head_dim": None}))
    convert(source, tmp_path / "out", "hf")
    assert torch.equal(logits(tmp_path / "out"), expected["smollm3"])


@pytest.mark.parametrize("case", NAMES)
def test_names_that_transformers_understands_give_its_logits(case, folders, expected, tmp_path):
    kind, rename = NAMES[case]
    source = renamed(folders[kind], tmp_path / "brought", rename)
    if case not in V5_ONLY or int(transformers.__version__.partition(".")[0]) >= 5:
        assert torch.equal(logits(source), expected[kind])  # transformers loads what was brought
    result = convert(source, tmp_path / "out", "hf")
    assert torch.equal(logits(tmp_path / "out"), expected[kind])
    assert forward_difference(source, expected[kind]) < 1e-5
    assert not any("prefix" in warning for warning in result.warnings)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("bare", [False, True], ids=["with model.", "without"])
def test_what_a_wrapper_puts_before_names_is_taken_off_and_said(prefix, bare, folders, expected, tmp_path):
    source = renamed(
        folders["tied"], tmp_path / "brought", lambda name: prefix + (name.removeprefix("model.") if bare else name)
    )
    result = convert(source, tmp_path / "out", "hf")
    assert hf_weights(tmp_path / "out").keys() == load_file(folders["tied"] / "model.safetensors").keys()
    assert torch.equal(logits(tmp_path / "out"), expected["tied"])
    assert forward_difference(source, expected["tied"]) < 1e-5
    assert any(prefix in warning and "prefix" in warning for warning in result.warnings)


def test_the_wrapper_of_a_torch_archive_is_taken_off_too(folders, expected, tmp_path):
    source = Path(shutil.copytree(folders["untied"], tmp_path / "brought"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, source / "pytorch_model.bin")
    convert(source, tmp_path / "out", "hf")
    assert torch.equal(logits(tmp_path / "out"), expected["untied"])
    assert forward_difference(source, expected["untied"]) < 1e-5


def test_a_tensor_outside_the_wrapper_is_still_unexpected(folders, tmp_path):
    source = renamed(folders["tied"], tmp_path / "brought", "module.{}".format, extra=torch.ones(2))
    with pytest.raises(NameMismatch, match=r"1 unexpected \(extra\)"):
        read_checkpoint(source)


def test_two_names_that_would_become_one_are_refused(folders, tmp_path):
    def edit(tensors: Tensors) -> None:
        tensors.update({f"module.{name}": tensor + 1 for name, tensor in list(tensors.items())})

    with pytest.raises(NameMismatch, match="unexpected"):
        read_checkpoint(edited(folders["tied"], tmp_path / "brought", edit))


def test_plain_names_have_no_wrapper(folders):
    for folder in folders.values():
        assert stored_names(load_file(folder / "model.safetensors")) == StoredNames()


@pytest.mark.parametrize(
    "buffer",
    [
        "model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq", "model.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.sin_cached",
    ],
)  # fmt: skip
def test_rotary_buffers_are_no_parameters(buffer, folders, expected, tmp_path):
    source = renamed(folders["tied"], tmp_path / "brought", lambda name: name, **{buffer: torch.ones(2)})
    assert torch.equal(logits(source), expected["tied"])  # transformers ignores what they hold
    convert(source, tmp_path / "out", "hf")
    assert buffer not in hf_weights(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), expected["tied"])


@pytest.mark.parametrize("name", ["model.rotary_emb.weight", "model.layers.1.mlp.inv_freq", "rotary_emb.inv_freq.bias"])
def test_any_other_tensor_is_not_taken_for_a_buffer(name, folders, tmp_path):
    source = renamed(folders["tied"], tmp_path / "brought", lambda own: own, **{name: torch.ones(2)})
    with pytest.raises(NameMismatch, match="1 unexpected"):
        read_checkpoint(source)


def indexed(source: Path, target: Path, **more: str) -> Path:
    """A copy in one shard, whose index also promises ``more``."""
    shutil.copytree(source, target)
    shard = "model-00001-of-00001.safetensors"
    names = load_file(target / "model.safetensors")
    (target / "model.safetensors").rename(target / shard)
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(names, shard), **dict.fromkeys(more.values(), shard)}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def test_an_index_may_promise_a_head_that_is_tied(folders, expected, tmp_path):
    source = indexed(folders["tied"], tmp_path / "brought", ghost=HEAD)
    assert torch.equal(logits(source), expected["tied"])
    convert(source, tmp_path / "out", "hf")
    assert torch.equal(logits(tmp_path / "out"), expected["tied"])
    assert forward_difference(source, expected["tied"]) < 1e-5


@pytest.mark.parametrize(("kind", "name"), [("tied", "model.norm.bias"), ("untied", "module.lm_head.weight")])
def test_an_index_may_promise_nothing_else_that_is_not_there(kind, name, folders, tmp_path):
    with pytest.raises(NameMismatch, match=name):
        read_checkpoint(indexed(folders[kind], tmp_path / "brought", ghost=name))


@pytest.mark.parametrize("bare", [False, True])
def test_an_untied_model_without_its_head_names_the_field(bare, folders, tmp_path):
    source = renamed(
        folders["untied"],
        tmp_path / "brought",
        lambda name: None if name == HEAD else name.removeprefix("model.") if bare else name,
    )
    with pytest.raises(NameMismatch, match=r"lm_head\.weight is missing.*tie_word_embeddings"):
        read_checkpoint(source)


def test_a_config_that_leaves_out_the_field_unties_a_llama(folders, tmp_path):
    source = configured(folders["tied"], tmp_path / "brought", tie_word_embeddings=None)
    with pytest.raises(NameMismatch, match=r"leaves out.*tie_word_embeddings: false"):
        read_checkpoint(source)


# --- Rotary embedding ------------------------------------------------------------------------------------------------


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = {"short_factor": [1.0, 1.0], "long_factor": [1.5, 2.0]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nested by layer type": ({"full_attention": PLAIN}, "an object for full_attention"),
    "without rope_theta": ({"rope_type": "default"}, "no rope_theta"),
    "a part of the head": ({**PLAIN, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "an unknown type": ({**PLAIN, "rope_type": "ntk-by-parts", "factor": 2.0}, "'ntk-by-parts'.*\n.*llama3"),
    "no type": ({"rope_theta": 10000.0, "factor": 2.0}, "factor has no rope_type"),
    "linear without factor": ({**PLAIN, "rope_type": "linear"}, "linear, but factor is missing"),
    "dynamic with text": ({**PLAIN, "rope_type": "dynamic", "factor": "2"}, "dynamic, but factor is '2'"),
    "yarn without factor": ({**PLAIN, "rope_type": "yarn"}, "yarn, but factor is missing"),
    "yarn with a wrong option": ({**PLAIN, "rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}, "beta_fast is 'x'"),
    "longrope without lists": ({**PLAIN, "rope_type": "longrope", "factor": 2.0}, "short_factor is missing"),
    "longrope without factor": ({**PLAIN, "rope_type": "longrope", **LONGROPE}, "original_max_position_embeddings"),
    "longrope of another head": (
        {**PLAIN, "rope_type": "longrope", "factor": 2.0, **LONGROPE, "long_factor": [1.0] * 3},
        "a list of 2 positive numbers",
    ),
    **{
        f"llama3 without {name}": (
            {**PLAIN, **{key: value for key, value in LLAMA3_SCALING.items() if key != name}},
            f"llama3, but {name} is missing",
        )
        for name in LLAMA3_SCALING
        if name != "rope_type"
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_rotary_embedding_that_is_not_all_there_is_refused(case, folders, tmp_path):
    parameters, message = REFUSED[case]
    source = configured(
        folders["tied"], tmp_path / "brought", rope_parameters=parameters, rope_theta=None, rope_scaling=None
    )
    with pytest.raises(UnsupportedModel, match=message):
        read_checkpoint(source)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "linear", "factor": 2.0}])
def test_a_base_within_rope_scaling_is_read_as_transformers_5_reads_it(scaling, folders, expected, tmp_path):
    """transformers 5 takes rope_scaling for another name of rope_parameters; a wrong base hardly shows in text."""
    fields = {"rope_parameters": None, "rope_theta": None, "rope_scaling": {**scaling, "rope_theta": 500.0}}
    source = configured(folders["tied"], tmp_path / "brought", **fields)
    convert(source, tmp_path / "out", "hf")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 500.0
    if hasattr(transformers.LlamaConfig(), "rope_parameters"):
        assert torch.equal(logits(tmp_path / "out"), logits(source))
    assert not torch.allclose(logits(tmp_path / "out"), expected["tied"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 10000.0, "rope_scaling": {**PLAIN, "rope_theta": 500.0}}, "10000, but rope_scaling.* is 500"),
        ({"rope_theta": None, "rope_scaling": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": None, "rope_scaling": {"full_attention": PLAIN}}, "rope_scaling holds an object for full_att"),
    ],
)
def test_rope_scaling_is_refused_for_what_rope_parameters_is(fields, message, folders, tmp_path):
    source = configured(folders["tied"], tmp_path / "brought", rope_parameters=None, **fields)
    with pytest.raises(UnsupportedModel, match=message):
        read_checkpoint(source)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 16, **LONGROPE},
    "llama3": LLAMA3_SCALING,
    "proportional": {},
}


def test_the_kinds_of_rotary_embedding_are_those_of_transformers():
    """Older releases know fewer."""
    assert SCALINGS.keys() == ROPE_TYPES.keys() >= ROPE_INIT_FUNCTIONS.keys() - {"default"}


@pytest.mark.parametrize("kind", sorted(ROPE_INIT_FUNCTIONS.keys() - {"default"}))
def test_a_rotary_embedding_with_all_its_fields_gives_transformers_logits(kind, folders, expected, tmp_path):
    fields = rope(10000.0, {"rope_type": kind, **SCALINGS[kind]})
    source = configured(folders["tied"], tmp_path / "brought", **{"rope_parameters": None, **fields})
    known = logits(source)
    if kind not in ("dynamic", "proportional"):  # the same as the plain one up to the trained length, or with factor 1
        assert not torch.equal(known, expected["tied"])
    convert(source, tmp_path / "out", "hf")
    assert torch.equal(logits(tmp_path / "out"), known)


def test_a_trained_length_beside_the_rotary_embedding_is_its_own(folders, tmp_path):
    scaling = {name: value for name, value in LLAMA3_SCALING.items() if name != "original_max_position_embeddings"}
    fields = {"rope_parameters": {"rope_theta": 10000.0, **scaling}, "original_max_position_embeddings": 16}
    source = configured(folders["tied"], tmp_path / "brought", **fields)
    assert read_checkpoint(source).spec.rope_scaling == LLAMA3_SCALING
    fields["rope_parameters"] = {"rope_theta": 10000.0, **LLAMA3_SCALING}
    fields["original_max_position_embeddings"] = 32
    with pytest.raises(UnsupportedModel, match=r"is 32, but .* is 16"):
        read_checkpoint(configured(folders["tied"], tmp_path / "both", **fields))


# --- Dtypes ----------------------------------------------------------------------------------------------------------


def half(source: Path, target: Path, kept: str, dtype: str) -> Path:
    """A copy in bfloat16 but for parameters with ``kept`` in their names, whose config says ``dtype``."""

    def edit(tensors: Tensors) -> None:
        tensors.update({n: t if kept in n else t.bfloat16() for n, t in list(tensors.items())})

    edited(source, target, edit)
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kept", ["norm", "embed_tokens"])
def test_mixed_dtypes_stay_as_they_are_stored_and_are_loaded_in_the_configs(kept, folders, tmp_path):
    source = half(folders["tied"], tmp_path / "brought", kept, "bfloat16")
    result = convert(source, tmp_path / "out", "hf")
    assert any("bfloat16 and" in warning and "transformers loads all in" in warning for warning in result.warnings)
    before, after = hf_weights(source), hf_weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_one_dtype_is_no_mixture(folders, tmp_path):
    for dtype, label in (("bfloat16", "no word"), ("float32", "said")):
        source = half(folders["tied"], tmp_path / label, "nothing", dtype)
        said = [warning for warning in read_checkpoint(source).warnings if "dtype" in warning]
        assert bool(said) == (label == "said")


def test_dtypes_that_would_be_fused_are_not_rounded(folders, tmp_path):
    source = half(folders["tied"], tmp_path / "brought", "q_proj", "bfloat16")
    with pytest.raises(UnsupportedModel, match=r"q_proj.* is float32.*\n.*\n.*--dtype"):
        convert(source, tmp_path / "out", "nanotron")
    convert(source, tmp_path / "out", "nanotron", dtype="float32")
    convert(tmp_path / "out", tmp_path / "back", "hf")
    assert all(torch.equal(hf_weights(tmp_path / "back")[n], t.float()) for n, t in hf_weights(source).items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
@pytest.mark.parametrize("archive", [False, True], ids=["safetensors", "bin"])
def test_quantised_weights_are_refused_though_no_config_says_so(dtype, archive, folders, tmp_path):
    source = edited(
        folders["tied"],
        tmp_path / "brought",
        lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if "proj" in n}),
    )
    if archive:
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=str(dtype).removeprefix("torch.")) as error:
        read_checkpoint(source)
    assert "quantised" in str(error.value)


# --- Tokenizers ------------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2104556\n"


def tokenizer_json(size: int) -> bytes:
    """A tokenizer of words, whose ids go up to ``size - 1``, as the tokenizers library writes it."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel(vocab={f"w{i}": i for i in range(size - 1)}, unk_token="w0")
    made = Tokenizer(words)
    made.add_special_tokens([f"<{size - 1}>"])
    return made.to_str().encode()


def link_to_nothing(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to(folder.parent / "blobs/0123")


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to nothing": (link_to_nothing, "tokenizer.json is a dangling link"),
    "cut": (lambda f: (f / "tokenizer.json").write_bytes(tokenizer_json(64)[:300]), "tokenizer.json is not valid JSON"),
    "a pointer": (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "tokenizer.json is a pointer left by Git LFS"),
    "a pointer to a model": (lambda f: (f / "tokenizer.model").write_bytes(POINTER), "tokenizer.model is a pointer left by Git LFS"),
    "empty": (lambda f: (f / "tokenizer.model").write_bytes(b""), "tokenizer.model is empty"),
    "something else": (lambda f: (f / "tokenizer.json").write_bytes(b"{}"), "holds no tokenizer model"),
    "its config alone": (lambda f: None, "tokenizer_config.json alone"),
    "half of it": (lambda f: (f / "vocab.json").write_bytes(b'{"a": 0}'), "vocab.json, tokenizer_config.json alone"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_usable_tokenizer_is_said_and_does_not_stop_a_conversion(case, folders, tmp_path):
    make, message = UNUSABLE[case]
    source = Path(shutil.copytree(folders["tied"], tmp_path / "brought"))
    (source / "tokenizer_config.json").write_text("{}")
    make(source)
    result = convert(source, tmp_path / "out", "hf")
    said = [warning for warning in result.warnings if "tokenizer" in warning]
    assert len(said) == 1 and message in said[0] and "--tokenizer" in said[0]
    assert "no tokenizer came with the source" in (tmp_path / "out/README.md").read_text()
    checkpoint = read_checkpoint(source)
    report = verify_checkpoints(checkpoint, read_checkpoint(tmp_path / "out"), VerifyOptions(length=8))
    assert report.passed and report.logits is not None and "random tokens" in report.logits.tokens_from


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_usable_tokenizer_cannot_be_given(case, folders, tmp_path):
    make, message = UNUSABLE[case]
    (tmp_path / "given").mkdir()
    (tmp_path / "given/tokenizer_config.json").write_text("{}")
    make(tmp_path / "given")
    with pytest.raises(BadCheckpoint, match=f"(?s)--tokenizer.*{message.split(', ')[-1]}"):
        convert(folders["tied"], tmp_path / "out", "hf", tokenizer=tmp_path / "given")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "my-tokenizer.json"])
def test_a_file_that_is_given_as_a_tokenizer_has_to_be_one(name, folders, tmp_path):
    path = tmp_path / name
    path.write_bytes(tokenizer_json(64))
    if name == "tokenizer.json":
        result = convert(folders["tied"], tmp_path / "out", "hf", tokenizer=path)
        assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
        assert not any("tokenizer" in warning for warning in result.warnings)
        return
    with pytest.raises(BadCheckpoint, match=f"--tokenizer {path}"):
        convert(folders["tied"], tmp_path / "out", "hf", tokenizer=path)


@pytest.mark.parametrize("to", ["hf", "nanotron", "deepspeed"])
@pytest.mark.parametrize("size", [64, 65])
def test_a_tokenizer_larger_than_the_embedding_is_said(size, to, folders, tmp_path):
    source = Path(shutil.copytree(folders["tied"], tmp_path / "brought"))
    (source / "tokenizer.json").write_bytes(tokenizer_json(size))
    said = [warning for warning in convert(source, tmp_path / "out", to).warnings if "tokenizer" in warning]
    assert said == ([] if size == 64 else [
        "the tokenizer gives ids up to 64, but the embedding has 64 rows: the model fails on larger ids. "
        "Check whose tokenizer it is."
    ])  # fmt: skip


def test_a_good_tokenizer_in_place_of_a_damaged_one_leaves_nothing_to_say(folders, tmp_path):
    source = Path(shutil.copytree(folders["tied"], tmp_path / "brought"))
    link_to_nothing(source)
    (tmp_path / "given").mkdir()
    (tmp_path / "given/tokenizer.json").write_bytes(tokenizer_json(64))
    result = convert(source, tmp_path / "out", "hf", tokenizer=tmp_path / "given")
    assert not any("tokenizer" in warning for warning in result.warnings)


def test_the_tokenizer_that_a_nanotron_run_names_is_offered(tmp_path):
    result = convert(FIXTURES / "nanotron/smollm2-tiny/tp1-pp1-dp1-zero0", tmp_path / "out", "hf")
    said = [warning for warning in result.warnings if "tokenizer" in warning]
    assert len(said) == 1 and "HuggingFaceTB/cosmo2-tokenizer" in said[0] and "--tokenizer" in said[0]


# --- Other files beside the weights ----------------------------------------------------------------------------------

TRAVELLING = (
    "additional_chat_templates/tools.jinja", "LICENSE", "LICENSE.txt", "LICENCE-MODEL.md", "license.md", "NOTICE",
    "Notice.txt", "USE_POLICY.md", "THIRD_PARTY_NOTICES.txt", "COPYING", "chat_template.jinja",
)  # fmt: skip
STAYING = ("notes.md", "license.py", "additional_chat_templates/run.py", "NOTICES/inside.md", "licenses.json")


@pytest.fixture
def with_files(folders, tmp_path) -> Path:
    source = Path(shutil.copytree(folders["tied"], tmp_path / "brought"))
    for name in (*TRAVELLING, *STAYING):
        path = source / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"content of {name}")
    return source


@pytest.mark.parametrize("to", ["hf", "nanotron", "deepspeed"])
def test_terms_and_templates_travel_with_the_weights(to, with_files, tmp_path):
    convert(with_files, tmp_path / "there", to)
    convert(tmp_path / "there", tmp_path / "back", "hf")
    written = {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert set(TRAVELLING) <= written and not written & set(STAYING)
    assert all((tmp_path / "back" / name).read_text() == f"content of {name}" for name in TRAVELLING)


@pytest.mark.parametrize("to", ["hf", "nanotron", "deepspeed"])
def test_what_travels_is_downloaded_and_may_be_replaced(to, with_files, tmp_path):
    convert(with_files, tmp_path / "there", to)
    (tmp_path / "there/smolconv_manifest.json").unlink()
    assert lost_with(tmp_path / "there") is None
    needed = layout_of(with_files).listing.needed_files(with_files, step=None, optimizer=True)
    names = {path.relative_to(with_files).as_posix() for path in needed}
    assert set(TRAVELLING) <= names and not names & set(STAYING)
    (tmp_path / "there/notes.md").write_text("mine")
    assert lost_with(tmp_path / "there") == "also holds notes.md"


OWN_CODE = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
ELSEWHERE = {"AutoModel": "owner/name--modeling_mine.MyModel"}


@pytest.mark.parametrize("to", ["hf", "nanotron", "deepspeed"])
def test_code_that_does_not_travel_is_not_named(to, folders, expected, tmp_path):
    source = configured(folders["tied"], tmp_path / "brought", auto_map={**OWN_CODE, **ELSEWHERE})
    (source / "modeling_mine.py").write_text("raise SystemExit")
    (source / "tokenizer.json").write_bytes(tokenizer_json(64))
    own = {"auto_map": {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}, "model_max_length": 64}
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    result = convert(source, tmp_path / "there", to)
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["auto_map"] == ELSEWHERE
    assert json.loads((tmp_path / "back/tokenizer_config.json").read_text()) == {"model_max_length": 64}
    assert not list((tmp_path / "back").rglob("*.py"))
    for names in ("configuration_mine.MyConfig, modeling_mine.MyModel", "tokenization_mine.MyTokenizer"):
        assert any(names in warning and "auto_map" in warning for warning in result.warnings)
    assert torch.equal(logits(tmp_path / "back"), expected["tied"])
    assert forward_difference(source, expected["tied"]) < 1e-5  # and none of that code has run


def test_a_tokenizers_config_without_code_is_copied_byte_for_byte(folders, tmp_path):
    source = Path(shutil.copytree(folders["tied"], tmp_path / "brought"))
    (source / "tokenizer_config.json").write_bytes(b'{"model_max_length":64 ,\n"auto_map": {}}')
    result = convert(source, tmp_path / "out", "hf")
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert not any("auto_map" in warning for warning in result.warnings)
