"""There and back between nanotron and Hugging Face: every bit, every count, every document that has a place."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FIXTURES, convert, files_below, hf_weights, topology_id
from hf_models import LLAMA3_SCALING, edited, largest_logits_difference, llama, logits, rope, saved, smollm3
from nanotron_folders import differences, run_differences, shards, states, step_folder, topology_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_mappings import interleave
from transformers import AutoModelForCausalLM

from smolconv.errors import DigestMismatch, MissingFile, NameMismatch, UnsupportedModel, UsageError
from smolconv.layouts.huggingface.reader import read_huggingface
from smolconv.models.huggingface import spec_from_hf
from smolconv.storage import output

NANOTRON = FIXTURES / "nanotron"
SMOLLM2, SMOLLM3, BF16 = (NANOTRON / name for name in ("smollm2-tiny", "smollm3-tiny", "smollm3-tiny-bf16"))
TP2_BF16 = BF16 / "tp2-pp1-dp1-zero0"
#: fp32 on CPU, another order of summation (see test_nanotron).
MAX_LOGITS_DIFFERENCE = 5e-6


def to_hf_and_back(source: Path, folder: Path, **options: Any) -> Path:
    """Through an HF folder ``hf`` to a nanotron run ``back``."""
    convert(source, folder / "hf", "hf")
    convert(folder / "hf", folder / "back", "nanotron", **options)
    return folder / "back"


def to_nanotron_and_back(source: Path, folder: Path, back: dict[str, Any] | None = None, **options: Any) -> Path:
    """Through a nanotron run ``run`` to an HF folder ``back``."""
    convert(source, folder / "run", "nanotron", **options)
    convert(folder / "run", folder / "back", "hf", **(back or {}))
    return folder / "back"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same_weights(a: Path, b: Path) -> bool:
    return not list(differences(hf_weights(a), hf_weights(b)))


# --- nanotron to HF to nanotron --------------------------------------------------------------------------------------


def other_topologies() -> list[tuple[Path, Path]]:
    models = [sorted(model.glob("tp*")) for model in (SMOLLM2, SMOLLM3)]
    return [*[(a, b) for runs in models for a, b in itertools.permutations(runs, 2)][::2], (TP2_BF16, TP2_BF16)]


@pytest.mark.parametrize("pair", other_topologies(), ids=lambda pair: f"{topology_id(pair[0])} to {pair[1].name}")
def test_through_hugging_face_to_another_topology_no_bit_is_lost(pair, tmp_path):
    source, expected = pair
    again = to_hf_and_back(source, tmp_path, **topology_of(expected))
    assert run_differences(again, expected) == []


def test_the_sidecar_is_refused_when_the_weights_are_others(tmp_path):
    convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "hf", "hf")
    other = edited(tmp_path / "hf", tmp_path / "trained", lambda t: t["model.norm.weight"][3].mul_(1.5))
    with pytest.raises(DigestMismatch, match=r"model\.norm\.weight"):
        convert(other, tmp_path / "back", "nanotron")
    with pytest.raises(DigestMismatch, match=r"delete smolconv_manifest\.json"):
        convert(other, tmp_path / "back", "nanotron", optimizer=False)
    (other / "smolconv_manifest.json").unlink()
    convert(other, tmp_path / "back", "nanotron", optimizer=False)
    assert not (tmp_path / "back/3/optimizer").exists()


def test_sidecar_tensors_are_fp32_under_canonical_names_with_an_index(tmp_path):
    convert(TP2_BF16, tmp_path / "hf", "hf", max_shard_bytes=100_000)
    sidecar, weights = tmp_path / "hf/smolconv_state", hf_weights(tmp_path / "hf")
    for slot in ("master", "exp_avg", "exp_avg_sq"):
        index = json.loads((sidecar / f"{slot}.safetensors.index.json").read_text())["weight_map"]
        found = {name: load_file(sidecar / file)[name] for name, file in index.items()}
        assert len(set(index.values())) > 1
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in weights.items()}
        assert {t.dtype for t in found.values()} == {torch.float32}


def test_hugging_face_alone_ignores_the_sidecar(tmp_path):
    convert(SMOLLM3 / "tp1-pp2-dp1-zero0", tmp_path / "hf", "hf")
    assert largest_logits_difference(tmp_path / "hf", SMOLLM3 / "reference.safetensors") <= MAX_LOGITS_DIFFERENCE


# --- HF to nanotron to HF --------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": llama,
    "untied llama": lambda: llama(tie_word_embeddings=False),
    "llama without groups": lambda: llama(num_key_value_heads=8),
    "llama3 rope": lambda: llama(**rope(5e5, LLAMA3_SCALING)),
    "smollm3": smollm3,
    "untied smollm3": lambda: smollm3(tie_word_embeddings=False),
    "smollm3 with biases": lambda: smollm3(attention_bias=True),
    "smollm3 without NoPE": lambda: smollm3(no_rope_layers=[1, 1, 1, 1]),
    "smollm3 with NoPE everywhere": lambda: smollm3(no_rope_layers=[0, 0, 0, 0]),
}


@pytest.mark.parametrize("options", [{}, {"tp": 2, "pp": 2}, {"tp": 4, "pp": 3}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_give_the_same_logits_after_nanotron(name, options, tmp_path):
    model = MODELS[name]()
    source = saved(model, tmp_path / "hf")
    again = to_nanotron_and_back(source, tmp_path, {"rope_scaling": "as-configured"}, **options)
    assert same_weights(again, source)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_give_the_same_logits_after_resharding(name, tmp_path):
    model = MODELS[name]()
    convert(saved(model, tmp_path / "hf"), tmp_path / "out", "hf", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(tmp_path / "out"), logits(model))


def test_what_the_config_says_comes_back(tmp_path):
    source = saved(smollm3(attention_dropout=0.25, initializer_range=0.5, eos_token_id=[1, 2]), tmp_path / "hf")
    again = config_of(to_nanotron_and_back(source, tmp_path, tp=2))
    before = {name: value for name, value in config_of(source).items() if name != "transformers_version"}
    after = {name: again[name] for name in before if name in again}
    after["attention_dropout"] = 0.25  # ours says 0.0: dropout is training's, not the model's
    assert after == before


def test_tokenizer_and_other_assets_come_back_byte_for_byte(tmp_path):
    source = saved(llama(), tmp_path / "hf")
    assets = {
        "tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{} ",
        "chat_template.jinja": "{{ 'Grüße' }}".encode(), "merges.txt": b"a b\r\n", "vocab.json": b'{"a": 0}',
        "generation_config.json": b'{"eos_token_id": [1, 2]}\n', "LICENSE": b"Apache-2.0",
    }  # fmt: skip
    for name, data in assets.items():
        (source / name).write_bytes(data)
    again = files_below(to_nanotron_and_back(source, tmp_path))
    assert {name: again[name] for name in assets} == assets


def test_assets_and_config_survive_a_second_topology_and_a_step_folder_as_source(tmp_path):
    source = saved(llama(), tmp_path / "hf")
    (source / "tokenizer.json").write_bytes(b"{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "a_field_of_theirs": {"kept": [1]}}))
    convert(source, tmp_path / "first", "nanotron")
    convert(tmp_path / "first", tmp_path / "second", "nanotron", tp=2)
    convert(tmp_path / "second/0", tmp_path / "back", "hf")
    assert (tmp_path / "back/tokenizer.json").read_bytes() == b"{}"
    assert config_of(tmp_path / "back")["a_field_of_theirs"] == {"kept": [1]}


def test_without_history_the_run_begins_at_step_zero_with_one_imported_stage(tmp_path):
    convert(saved(llama(), tmp_path / "hf"), tmp_path / "run", "nanotron")
    assert {path.name for path in (tmp_path / "run/0").iterdir()} == {
        "model",
        "model_config.json",
        "checkpoint_metadata.json",
    }
    metas = json.loads((tmp_path / "run/0/checkpoint_metadata.json").read_text())["metas"]
    (stage,) = metas.pop("data_stages")
    assert (stage["name"], stage["start_training_step"], stage["consumed_train_samples"]) == ("imported", 1, 0)
    assert set(metas.values()) == {0}


def test_a_training_config_can_be_given(tmp_path):
    given = SMOLLM2 / "tp1-pp1-dp1-zero0/3/config.yaml"
    source = saved(llama(), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", tp=2, pp=2, nanotron_config=given)
    config, original = (yaml.safe_load(path.read_text()) for path in (tmp_path / "run/0/config.yaml", given))
    assert (config["parallelism"]["tp"], config["parallelism"]["pp"], config["general"]["step"]) == (2, 2, 0)
    assert config["model"]["model_config"] == json.loads((tmp_path / "run/0/model_config.json").read_text())
    assert config["optimizer"]["learning_rate_scheduler"] == original["optimizer"]["learning_rate_scheduler"]
    assert [len(file["base_lrs"]) for file in states(tmp_path / "run/0", "lr_scheduler").values()] == [19, 19, 8, 8]


# --- sources ---------------------------------------------------------------------------------------------------------


def as_one_safetensors(weights: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def as_one_pickle(weights: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def as_pickles_with_an_index(weights: dict[str, torch.Tensor], folder: Path) -> None:
    names = sorted(weights)
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_safetensors_with_an_index(weights: dict[str, torch.Tensor], folder: Path) -> None:
    names = sorted(weights)
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_an_old_pickle_with_buffers(weights: dict[str, torch.Tensor], folder: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(4)}
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}  # the same storage, as torch saves a tied model
    torch.save({**weights, **buffers, **tied}, folder / "pytorch_model.bin")


FORMS = [
    as_one_safetensors, as_safetensors_with_an_index, as_one_pickle, as_pickles_with_an_index, as_an_old_pickle_with_buffers,
]  # fmt: skip


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_every_form_of_a_hugging_face_checkpoint_is_read(write, tmp_path):
    source = saved(llama(), tmp_path / "hf")
    weights = hf_weights(source)
    (tmp_path / "form").mkdir()
    shutil.copy(source / "config.json", tmp_path / "form")
    write(weights, tmp_path / "form")
    convert(tmp_path / "form", tmp_path / "out", "hf")
    assert list(differences(hf_weights(tmp_path / "out"), weights)) == []


@pytest.mark.parametrize(
    "form", [(as_one_safetensors, as_safetensors_with_an_index), (as_one_pickle, as_pickles_with_an_index)]
)
def test_a_single_file_goes_before_an_index_as_in_transformers(form, tmp_path):
    source, (as_one, with_an_index) = saved(llama(), tmp_path / "hf"), form
    weights = hf_weights(source)
    (tmp_path / "both").mkdir()
    shutil.copy(source / "config.json", tmp_path / "both")
    as_one(weights, tmp_path / "both")
    with_an_index({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, tmp_path / "both")
    result = convert(tmp_path / "both", tmp_path / "out", "hf")
    assert list(differences(hf_weights(tmp_path / "out"), weights)) == []
    assert any("index.json was ignored" in warning for warning in result.warnings)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "both").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights.items())


def test_shards_are_packed_in_order_up_to_the_size_asked_for(tmp_path):
    source = saved(llama(), tmp_path / "hf")
    convert(source, tmp_path / "out", "hf", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in (tmp_path / "out").glob("model-*")}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in hf_weights(source).values())
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= 10_000
    assert set(held) == {f"model-{i + 1:05d}-of-{len(held):05d}.safetensors" for i in range(len(held))}


@pytest.mark.parametrize("limit", [2_000, 5_000, 10_000, 50_000])
def test_shards_are_as_few_as_packing_in_order_allows_and_the_largest_is_as_small_as_it_can_be(limit, tmp_path):
    source = saved(llama(), tmp_path / "hf")
    convert(source, tmp_path / "out", "hf", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    sizes = {name: tensor.nbytes for name, tensor in hf_weights(source).items()}
    held = [[sizes[name] for name in index if index[name] == file] for file in sorted(set(index.values()))]

    def files(bound: int) -> int:
        """Packed one after the other: no order-keeping split into fewer files has none above ``bound``."""
        count, room = 0, 0
        for size in (sizes[name] for name in index):
            if size > room:
                count, room = count + 1, bound
            room -= size
        return count

    assert len(held) == files(limit)
    largest = max(map(sum, held))
    assert largest <= max(limit, *sizes.values())
    assert largest == max(sizes.values()) or files(largest - 1) > len(held)


@pytest.mark.parametrize("room", ["all of it", "none"])
def test_output_larger_than_the_memory_to_cache_it_is_dropped_from_the_cache_and_is_the_same(
    room, tmp_path, monkeypatch
):
    source = saved(llama(), tmp_path / "hf")
    advised: list[tuple[int, ...]] = []
    real = os.posix_fadvise

    def fadvise(*given: int) -> None:
        advised.append(given[1:])
        real(*given)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    monkeypatch.setattr(output, "_bytes_to_cache", lambda: 0 if room == "none" else 10**9)
    monkeypatch.setattr(output, "_WRITEBACK_BYTES", 1_000)
    convert(source, tmp_path / "out", "hf")
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert ((0, size, os.POSIX_FADV_DONTNEED) in advised) == (room == "none")
    assert list(differences(hf_weights(tmp_path / "out"), hf_weights(source))) == []


def test_resharded_and_joined_again_the_weights_file_holds_the_same_tensors(tmp_path):
    source = saved(smollm3(), tmp_path / "hf")
    convert(source, tmp_path / "many", "hf", max_shard_bytes=5_000)
    convert(tmp_path / "many", tmp_path / "one", "hf")
    assert (
        list(differences(load_file(tmp_path / "one/model.safetensors"), load_file(source / "model.safetensors"))) == []
    )


@pytest.mark.parametrize("named", ["run", "step folder", "--step"])
def test_a_run_its_step_folder_and_a_chosen_step_are_the_same_source(named, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(SMOLLM2 / "tp2-pp2-dp1-zero0", run)
    source = run / "3" if named == "step folder" else run
    convert(source, tmp_path / "hf", "hf", step=3 if named == "--step" else None)
    assert list(differences(hf_weights(tmp_path / "hf"), expected_weights(SMOLLM2))) == []
    assert json.loads((tmp_path / "hf/smolconv_state/state.json").read_text())["step"] == 3


def test_of_several_steps_the_latest_or_the_chosen_one_is_read(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(SMOLLM2 / "tp1-pp1-dp1-zero0", run)
    shutil.copytree(run / "3", run / "2")
    norm = run / "2/model/model/final_layer_norm/pp_block/model_weight.safetensors"
    save_file({"data": torch.full((48,), 2.0)}, norm)
    convert(run, tmp_path / "latest", "hf", optimizer=False)
    convert(run, tmp_path / "second", "hf", optimizer=False, step=2)
    expected = expected_weights(SMOLLM2)["model.norm.weight"]
    assert torch.equal(hf_weights(tmp_path / "latest")["model.norm.weight"], expected)
    assert torch.equal(hf_weights(tmp_path / "second")["model.norm.weight"], torch.full((48,), 2.0))
    with pytest.raises(MissingFile, match="2, 3"):
        convert(run, tmp_path / "fourth", "hf", step=4)


def expected_weights(model: Path) -> dict[str, torch.Tensor]:
    """What nanotron's own converter made, without a tied head's second name."""
    tensors = load_file(model / "expected_hf/model.safetensors")
    tensors.pop("lm_head.weight", None)
    return tensors


# --- older formats: renamed fixtures, since no checkpoint of those was available ---------------------------------------


def as_format(version: str, source: Path, target: Path) -> Path:
    """The fixture as nanotron of that format would have named it and described it."""
    shutil.copytree(source, target)
    step = step_folder(target)
    for path in sorted((step / "model").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = {**(file.metadata() or {}), **({"version": version} if file.metadata() else {})}
            tensors = {"data": file.get_tensor("data")}
        path.unlink()
        old_name = path.name.replace("model_weight_pp", "model_model_weight.safetensors_pp")
        save_file(tensors, path.with_name(old_name if version in ("1.2", "1.3") else path.name), metadata)
    for path in sorted(step.glob("*/*_exp-0-of-1.pt")) if version == "1.2" else ():
        path.rename(path.with_name(path.name.replace("_exp-0-of-1", "")))
    path = step / "checkpoint_metadata.json"
    metadata = json.loads(path.read_text())
    metas = metadata["metas"]
    metadata["version"] = version
    del metadata["cp"], metas["consumed_tokens_total"]
    for stage in metas["data_stages"]:
        del stage["sequence_length"], stage["consumed_tokens_per_dataset_folder"]
    if version in ("1.2", "1.3"):
        del metas["data_stages"], metas["last_stage_idx"]
    path.write_text(json.dumps(metadata))
    return target


@pytest.mark.parametrize("version", ["1.2", "1.3", "1.4"])
@pytest.mark.parametrize("run", [SMOLLM2 / "tp2-pp2-dp1-zero0", SMOLLM3 / "tp2-pp1-dp2-zero1"], ids=topology_id)
def test_older_formats_hold_the_same_checkpoint(run, version, tmp_path):
    old = as_format(version, run, tmp_path / "old")
    convert(old, tmp_path / "new", "nanotron", **topology_of(run))
    found, expected = step_folder(tmp_path / "new"), step_folder(run)
    assert list(differences(shards(found), shards(expected))) == []
    for kind in ("optimizer", "lr_scheduler"):
        assert list(differences(states(found, kind), states(expected, kind))) == []


@pytest.mark.parametrize("version", ["1.2", "1.3", "1.4"])
def test_counts_that_older_formats_lack_are_written_so_that_their_sums_hold(version, tmp_path):
    old = as_format(version, SMOLLM3 / "tp1-pp2-dp1-zero0", tmp_path / "old")
    convert(old, tmp_path / "new", "nanotron")
    metadata = json.loads((tmp_path / "new/3/checkpoint_metadata.json").read_text())
    metas, stages = metadata["metas"], metadata["metas"]["data_stages"]
    assert (metadata["version"], metas["last_train_step"], metas["consumed_train_samples"]) == ("1.5", 3, 12)
    assert metas["consumed_train_samples"] == sum(stage["consumed_train_samples"] for stage in stages)
    folders = [n for stage in stages for n in stage["consumed_tokens_per_dataset_folder"].values()]
    assert metas["consumed_tokens_total"] == sum(folders)


def test_the_single_scheduler_file_of_2024_serves_every_rank(tmp_path):
    run = SMOLLM2 / "tp2-pp2-dp1-zero0"
    old = as_format("1.4", run, tmp_path / "old")
    first, *others = sorted((old / "3/lr_scheduler").iterdir())
    first.rename(first.with_name("lr_scheduler.pt"))
    for path in others:
        path.unlink()
    convert(old, tmp_path / "new", "nanotron", **topology_of(run))
    found, expected = (states(step_folder(folder), "lr_scheduler") for folder in (tmp_path / "new", run))
    assert list(differences(found, expected)) == []


# --- rotary embedding ------------------------------------------------------------------------------------------------


def as_interleaved(source: Path, target: Path) -> Path:
    """The same model with q and k rows in interleaved pairs, in every rank's shard, and its config saying so."""
    shutil.copytree(source, target)
    path = step_folder(target) / "model_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_interleaved": True}))
    document = path.with_name("config.yaml")
    training = yaml.safe_load(document.read_text())
    training["model"]["model_config"]["rope_interleaved"] = True
    document.write_text(yaml.safe_dump(training))
    head_size = config["hidden_size"] // config["num_attention_heads"]
    queries = config["num_attention_heads"] // config["num_key_value_heads"]
    for shard in (step_folder(target) / "model").rglob("attn/qkv_proj/*.safetensors"):
        with safe_open(shard, "pt") as file:
            metadata, fused = file.metadata(), file.get_tensor("data")
        kv_rows = len(fused) // (queries + 2)
        q, k, v = fused.split([queries * kv_rows, kv_rows, kv_rows])
        fused = torch.cat([interleave(q, head_size), interleave(k, head_size), v])
        save_file({"data": fused}, shard, metadata)
    return target


INTERLEAVED = [SMOLLM2 / "tp2-pp2-dp1-zero0", SMOLLM3 / "tp1-pp2-dp1-zero0"]


@pytest.mark.parametrize("run", INTERLEAVED, ids=topology_id)
def test_an_interleaved_model_becomes_the_same_hugging_face_model(run, tmp_path):
    convert(as_interleaved(run, tmp_path / "run"), tmp_path / "hf", "hf")
    assert list(differences(hf_weights(tmp_path / "hf"), expected_weights(run.parent))) == []
    assert largest_logits_difference(tmp_path / "hf", run.parent / "reference.safetensors") <= MAX_LOGITS_DIFFERENCE


@pytest.mark.parametrize("run", INTERLEAVED, ids=topology_id)
def test_an_interleaved_model_comes_back_interleaved(run, tmp_path):
    source = as_interleaved(run, tmp_path / "run")
    assert run_differences(to_hf_and_back(source, tmp_path, **topology_of(run)), source) == []


def with_model_config(source: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(source, target)
    path = step_folder(target) / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


def test_rope_scaling_that_nanotron_ignored_is_left_out_with_a_warning(tmp_path):
    source = with_model_config(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "run", rope_scaling=LLAMA3_SCALING)
    result = convert(source, tmp_path / "hf", "hf")
    config = config_of(tmp_path / "hf")
    assert (config["rope_scaling"], config["rope_parameters"]["rope_type"]) == (None, "default")
    assert any("rope_scaling" in warning for warning in result.warnings)
    assert largest_logits_difference(tmp_path / "hf", SMOLLM2 / "reference.safetensors") <= MAX_LOGITS_DIFFERENCE


def test_rope_scaling_is_kept_when_asked_for_and_gives_another_model(tmp_path):
    source = with_model_config(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "run", rope_scaling=LLAMA3_SCALING)
    convert(source, tmp_path / "hf", "hf", rope_scaling="as-configured")
    assert config_of(tmp_path / "hf")["rope_scaling"] == LLAMA3_SCALING
    assert largest_logits_difference(tmp_path / "hf", SMOLLM2 / "reference.safetensors") > 0.01


def test_rope_scaling_that_was_ignored_stays_in_nanotrons_own_config(tmp_path):
    source = with_model_config(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "run", rope_scaling=LLAMA3_SCALING)
    again = to_hf_and_back(source, tmp_path)
    assert json.loads((again / "3/model_config.json").read_text())["rope_scaling"] == LLAMA3_SCALING


def test_rope_scaling_of_a_hugging_face_model_is_written_with_a_warning(tmp_path):
    source = saved(MODELS["llama3 rope"](), tmp_path / "hf")
    result = convert(source, tmp_path / "run", "nanotron")
    assert json.loads((tmp_path / "run/0/model_config.json").read_text())["rope_scaling"] == LLAMA3_SCALING
    assert any("rope_scaling" in warning for warning in result.warnings)


def test_without_no_rope_layer_every_layer_rotates(tmp_path):
    source = with_model_config(SMOLLM3 / "tp1-pp2-dp1-zero0", tmp_path / "run", no_rope_layer=None)
    convert(source, tmp_path / "hf", "hf", optimizer=False)
    config = config_of(tmp_path / "hf")
    assert (config["architectures"], config["no_rope_layers"]) == (["SmolLM3ForCausalLM"], [1] * 8)
    assert set(spec_from_hf(config).use_rope) == {True}


# --- biases and vocabulary -------------------------------------------------------------------------------------------


def test_an_output_bias_that_is_not_zero_is_refused(tmp_path):
    source = saved(smollm3(attention_bias=True), tmp_path / "hf")
    other = edited(source, tmp_path / "biased", lambda t: t["model.layers.2.self_attn.o_proj.bias"][5].fill_(1e-20))
    with pytest.raises(NameMismatch, match=r"layers\.2\.self_attn\.o_proj\.bias"):
        convert(other, tmp_path / "run", "nanotron")
    assert not (tmp_path / "run").exists()


def test_biases_are_cut_over_ranks_like_their_weights(tmp_path):
    source = saved(smollm3(attention_bias=True), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", tp=2)
    q, k, v = (hf_weights(source)[f"model.layers.1.self_attn.{part}_proj.bias"] for part in "qkv")
    folder = tmp_path / "run/0/model/model/decoder/1/pp_block/attn/qkv_proj"
    second = load_file(folder / "model_bias_pp-rank-0-of-1_tp-rank-1-of-2.safetensors")["data"]
    assert torch.equal(second, torch.cat([q[16:], k[8:], v[8:]]))


@pytest.fixture
def odd_vocabulary(tmp_path) -> Path:
    """An HF folder with 255 rows and Adam state, made by trimming the fixture's last row."""
    convert(SMOLLM3 / "tp1-pp2-dp1-zero0", tmp_path / "odd", "hf", vocab_size=255)
    return tmp_path / "odd"


def test_trimming_the_vocabulary_keeps_the_first_rows(odd_vocabulary):
    expected = {name: t[:255] if "embed" in name else t for name, t in expected_weights(SMOLLM3).items()}
    assert list(differences(hf_weights(odd_vocabulary), expected)) == []
    assert config_of(odd_vocabulary)["vocab_size"] == 255


def test_a_vocabulary_that_tp_does_not_divide_is_padded_with_zero_rows_and_zero_state(odd_vocabulary, tmp_path):
    result = convert(odd_vocabulary, tmp_path / "run", "nanotron", tp=2)
    step = tmp_path / "run/3"
    assert any("padded from 255 to 256" in warning for warning in result.warnings)
    assert json.loads((step / "model_config.json").read_text())["vocab_size"] == 256
    (last,) = (t for path, (t, _) in shards(step).items() if "token_embedding" in path and "tp-rank-1" in path)
    assert (len(last), last[-1].any(), last[-2].any()) == (128, False, True)
    state = states(step, "optimizer")["optimizer_pp-0-of-1_tp-1-of-2_exp-0-of-1.pt"]["state"][0]
    assert not state["exp_avg"][-1].any() and not state["exp_avg_sq"][-1].any()


def test_trimming_the_padding_again_gives_the_same_checkpoint(odd_vocabulary, tmp_path):
    again = to_nanotron_and_back(odd_vocabulary, tmp_path, {"vocab_size": 255}, tp=2, pp=2)
    left, right = (
        {p.name: load_file(p) for p in (f / "smolconv_state").glob("*.safetensors")} for f in (again, odd_vocabulary)
    )
    assert same_weights(again, odd_vocabulary)
    assert list(differences(left, right)) == []
    assert spec_from_hf(config_of(again)) == spec_from_hf(config_of(odd_vocabulary))


# --- dtypes ----------------------------------------------------------------------------------------------------------


def masters(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in (folder / "smolconv_state").glob("master-*.safetensors"):
        found.update(load_file(path))
    return found


def test_float32_takes_the_master_weights(tmp_path):
    # The fixture's masters are smollm3-tiny's fp32 weights (shared oracle's README).
    result = convert(TP2_BF16, tmp_path / "hf", "hf", dtype="float32")
    assert list(differences(hf_weights(tmp_path / "hf"), expected_weights(SMOLLM3))) == []
    assert config_of(tmp_path / "hf")["dtype"] == "float32"
    assert any("master" in warning for warning in result.warnings)


def test_float32_from_the_stored_weights_is_their_exact_widening_and_keeps_the_master(tmp_path):
    convert(TP2_BF16, tmp_path / "hf", "hf", dtype="float32", cast_from="weights")
    widened = {name: tensor.float() for name, tensor in expected_weights(BF16).items()}
    assert list(differences(hf_weights(tmp_path / "hf"), widened)) == []
    assert list(differences(masters(tmp_path / "hf"), expected_weights(SMOLLM3))) == []


def test_bfloat16_rounds_as_torch_does_and_keeps_an_fp32_master(tmp_path):
    convert(SMOLLM3 / "tp2-pp1-dp2-zero1", tmp_path / "hf", "hf", dtype="bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in expected_weights(SMOLLM3).items()}
    assert list(differences(hf_weights(tmp_path / "hf"), rounded)) == []
    assert list(differences(masters(tmp_path / "hf"), expected_weights(SMOLLM3))) == []


def test_float16_rounds_as_torch_does(tmp_path):
    convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "hf", "hf", dtype="float16", optimizer=False)
    rounded = {name: tensor.half() for name, tensor in expected_weights(SMOLLM2).items()}
    assert list(differences(hf_weights(tmp_path / "hf"), rounded)) == []


def test_rounding_an_fp32_run_gives_the_very_checkpoint_that_nanotron_trains_in_bf16(tmp_path):
    convert(SMOLLM3 / "tp1-pp2-dp1-zero0", tmp_path / "out", "nanotron", tp=2, dtype="bfloat16")
    (name,) = run_differences(tmp_path / "out", TP2_BF16)
    assert name.startswith("documents.config.yaml.general.run")  # the name that each run was given


def test_widening_a_bf16_run_gives_the_very_checkpoint_that_nanotron_trains_in_fp32(tmp_path):
    expected = SMOLLM3 / "tp2-pp1-dp2-zero1"
    convert(TP2_BF16, tmp_path / "out", "nanotron", **topology_of(expected), dtype="float32")
    (name,) = run_differences(tmp_path / "out", expected)
    assert name.startswith("documents.config.yaml.general.run")


def test_through_a_rounded_hugging_face_model_the_fp32_run_comes_back(tmp_path):
    expected = SMOLLM3 / "tp2-pp1-dp2-zero1"
    convert(expected, tmp_path / "hf", "hf", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "back", "nanotron", **topology_of(expected), dtype="float32")
    assert run_differences(tmp_path / "back", expected) == []


def test_casting_that_changes_no_dtype_makes_no_master(tmp_path):
    run = SMOLLM3 / "tp1-pp2-dp1-zero0"
    convert(run, tmp_path / "out", "nanotron", **topology_of(run), cast_from="weights")
    assert run_differences(tmp_path / "out", run) == []


def test_casting_from_the_master_rounds_the_master(tmp_path):
    convert(TP2_BF16, tmp_path / "hf", "hf", dtype="float16", cast_from="master")
    rounded = {name: tensor.half() for name, tensor in expected_weights(SMOLLM3).items()}
    assert list(differences(hf_weights(tmp_path / "hf"), rounded)) == []


def test_casting_from_a_master_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="master"):
        convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "hf", "hf", dtype="bfloat16", cast_from="master")


@pytest.mark.parametrize("dp", [2, 5])
def test_masters_with_zero1_are_flat_slices_and_come_back(dp, tmp_path):
    convert(TP2_BF16, tmp_path / "away", "nanotron", tp=2, pp=2, dp=dp, zero_stage=1)
    files = states(tmp_path / "away/3", "optimizer")
    assert len(files) == 2 * 2 * dp
    assert all(t.dim() == 1 for file in files.values() for t in file["gradient_accumulator"].values())
    convert(tmp_path / "away", tmp_path / "back", "nanotron", tp=2)
    assert run_differences(tmp_path / "back", TP2_BF16) == []


# --- what cannot go to nanotron --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: smollm3(no_rope_layers=[0, 1, 1, 0]), "no_rope_layer"),
        (lambda: llama(head_dim=8), "head_dim"),
        (lambda: llama(mlp_bias=True), "mlp_bias"),
        (lambda: llama(attention_bias=True), "attention_bias"),
    ],
    ids=["irregular NoPE", "head_dim", "mlp_bias", "llama attention_bias"],
)
def test_models_that_nanotron_cannot_hold_are_refused_but_can_be_resharded(model, named, tmp_path):
    source = saved(model(), tmp_path / "hf")
    with pytest.raises(UnsupportedModel, match=named):
        convert(source, tmp_path / "run", "nanotron")
    convert(source, tmp_path / "out", "hf", max_shard_bytes=20_000)
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_a_run_that_was_never_trained_reads_back_without_state(tmp_path):
    convert(saved(llama(), tmp_path / "hf"), tmp_path / "run", "nanotron", tp=2)
    convert(tmp_path / "run", tmp_path / "back", "hf")
    again = read_huggingface(tmp_path / "back")
    assert (again.has_optimizer, again.progress.step) == (False, 0)


def test_a_cut_through_heads_is_written_with_a_warning_and_comes_back_whole(tmp_path):
    """SmolLM2-135M has 9 and 3 heads: TP 2 cuts rows evenly, although nanotron could not run it so."""
    source = FIXTURES / "nanotron/smollm2-tiny/tp1-pp1-dp1-zero0"
    result = convert(source, tmp_path / "tp4", "nanotron", tp=4)
    assert any("cuts through the model's 6 query and 2 key/value heads" in warning for warning in result.warnings)
    convert(tmp_path / "tp4", tmp_path / "hf", "hf")
    again, expected = hf_weights(tmp_path / "hf"), hf_weights(source.parent / "expected_hf")
    assert all(torch.equal(again[name], expected[name]) for name in again)
