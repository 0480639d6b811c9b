"""DeepSpeed checkpoints that are incomplete, mixed, damaged or malicious: one of our errors, and nothing is written."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from deepspeed_folders import Case, case, edit, load, model_file, optimizer_file, save
from nanotron_folders import differences
from test_bad_input import (
    EVERY_LINE_FITS,
    STRANGE,
    Touch,
    assert_short_error,
    damaged,
    edit_json,
    only_our_errors,
    places,
    save_legacy,
    save_pickle,
    save_zip,
    truncate,
    with_value,
)

from smolconv.checkpoint import Slot
from smolconv.errors import (
    BadCheckpoint,
    CorruptFile,
    MissingFile,
    MissingShard,
    MixedCheckpoint,
    NameMismatch,
    UnsupportedModel,
)
from smolconv.layouts.registry import read_checkpoint

ZERO1, ZERO3, TWO_TAGS, AUTOTP = "zero1-bf16-ws3-uneven", "zero3-bf16-ws3", "zero1-twotags-ws2", "autotp2-zero1-bf16"
#: From ZeRO-2, whose files are {"param": tensor}, and from ZeRO-3, whose files are bare vectors.
UNIVERSAL, UNIVERSAL3 = "universal-from-zero2-ws3", "universal-from-zero3-ws3-uneven"
NORM, PROJECTION = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Case]:
    """A copy of one of our fixtures, to be broken."""
    return lambda name: case(name).copied(tmp_path / "copies")


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Converts, and asserts the error, its exit code 3, a short message with these words, and that nothing was left."""

    def check(source: Case | Path, error: type[BadCheckpoint], *words: str, **options: Any) -> None:
        folder = source.checkpoint if isinstance(source, Case) else source
        with pytest.raises(error) as raised:
            convert(folder, tmp_path / "out", "hf", **options)
        message = str(raised.value)
        assert raised.value.exit_code == 3
        assert len(message.splitlines()) < EVERY_LINE_FITS
        assert [word for word in words if word not in message] == [], message
        assert list(tmp_path.glob("out*")) == []

    return check


# --- files that are missing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks"), [(ZERO1, 3), (ZERO3, 3), ("zero1-bf16optimizer-ws3", 3), ("zero2-fp32-ws3", 3)]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_optimizer_rank_is_named(broken, refused, name, ranks, rank):
    source = broken(name)
    path = optimizer_file(source.tag, rank)
    path.unlink()
    refused(source, MissingShard, path.name, f"1 of {ranks} ranks", "Copy it")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_model_file_of_zero_3_is_named(broken, refused, rank):
    source = broken(ZERO3)
    model_file(source.tag, rank).unlink()
    refused(source, MissingShard, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", "Copy it")


@pytest.mark.parametrize("name", [ZERO1, ZERO3])
def test_optimizer_files_alone_are_no_checkpoint(broken, refused, name):
    source = broken(name)
    for path in source.tag.glob("*model_states.pt"):
        path.unlink()
    refused(source, MissingShard, "model_states.pt", "names the parameters", "Copy it")


def test_without_any_optimizer_file_a_stage_says_what_is_missing(broken, refused, tmp_path):
    source = broken(ZERO1)
    for path in source.tag.glob("*optim_states.pt"):
        path.unlink()
    refused(source, MissingShard, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "ZeRO-1 on 3 ranks", "--no-optimizer")
    result = convert(source.checkpoint, tmp_path / "out", "hf", optimizer=False)
    expected = {name: tensor.bfloat16() for name, tensor in source.engine("fp32").items()}
    assert list(differences(hf_weights(tmp_path / "out"), expected)) == []
    assert any("masters are not there" in warning for warning in result.warnings)


def test_zero_3_has_no_weights_without_its_optimizer_files(broken, refused):
    source = broken(ZERO3)
    for path in source.tag.glob("*optim_states.pt"):
        path.unlink()
    refused(source, MissingShard, "They hold the weights", optimizer=False)


def test_no_optimizer_does_without_a_rank_where_the_model_file_holds_the_weights(broken, tmp_path):
    source = broken(ZERO1)
    optimizer_file(source.tag, 1).unlink()
    convert(source.checkpoint, tmp_path / "out", "hf", optimizer=False)
    expected = {name: tensor.bfloat16() for name, tensor in source.engine("fp32").items()}
    assert list(differences(hf_weights(tmp_path / "out"), expected)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_model_file_of_autotp_is_named(broken, refused, rank):
    source = broken(AUTOTP)
    model_file(source.tag, tp=rank).unlink()
    refused(source, MissingShard, f"mp_rank_{rank:02d}_model_states.pt" if rank == 0 else "rank 1 of 2")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_optimizer_file_of_autotp_is_named(broken, refused, rank):
    source = broken(AUTOTP)
    path = optimizer_file(source.tag, 0, tp=rank)
    path.unlink()
    refused(source, MissingShard, path.name)


@pytest.mark.parametrize("name", [UNIVERSAL, UNIVERSAL3])
@pytest.mark.parametrize("parameter", [NORM, PROJECTION])
def test_a_parameter_missing_from_a_universal_folder_is_named(broken, refused, name, parameter):
    source = broken(name)
    shutil.rmtree(source.tag / "zero" / parameter)
    refused(source, MissingShard, "1 of 20 parameter", parameter, "Copy its folder")
    refused(source, MissingShard, parameter, optimizer=False)


@pytest.mark.parametrize("file", ["fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"])
@pytest.mark.parametrize("name", [UNIVERSAL, UNIVERSAL3])
def test_a_tensor_missing_from_a_universal_folder_is_named(broken, refused, name, file):
    source = broken(name)
    (source.tag / "zero" / NORM / file).unlink()
    refused(source, MissingShard, f"{NORM}/{file}", "Copy it", *(["--no-optimizer"] if file != "fp32.pt" else []))


def test_moments_missing_from_a_universal_folder_matter_only_with_the_optimizer(broken, tmp_path):
    source = broken(UNIVERSAL)
    (source.tag / "zero" / NORM / "exp_avg.pt").unlink()
    convert(source.checkpoint, tmp_path / "out", "hf", optimizer=False)
    assert list(differences(hf_weights(tmp_path / "out"), source.engine("fp32"))) == []


def test_a_universal_folder_without_steps_or_groups_says_so(broken, refused):
    source = broken(UNIVERSAL)
    (source.tag / "zero" / NORM / "step.pt").unlink()
    refused(source, CorruptFile, "step", NORM, "--no-optimizer")
    (source.tag / "zero/optimizer_state.pt").unlink()
    refused(source, MissingFile, "optimizer_state.pt", "parameter groups")


def test_a_folder_of_no_parameter_in_a_universal_folder_is_not_skipped(broken, refused):
    source = broken(UNIVERSAL)
    shutil.copytree(source.tag / "zero" / NORM, source.tag / "zero/model.ghost.weight")
    refused(source, NameMismatch, "model.ghost.weight")


# --- latest ----------------------------------------------------------------------------------------------------------


def test_a_latest_that_names_no_folder_lists_the_tags(broken, refused):
    source = broken(TWO_TAGS)
    (source.checkpoint / "latest").write_text("global_step9")
    refused(source.checkpoint, MissingFile, "'global_step9'", "tags found: global_step2, global_step3")


def test_a_latest_that_names_a_folder_without_files_says_so(broken, refused):
    source = broken(ZERO1)
    (source.checkpoint / "empty").mkdir()
    (source.checkpoint / "latest").write_text("empty")
    refused(source.checkpoint, MissingFile, "'empty'", "holds no *_model_states.pt", "tags found: global_step3")


@pytest.mark.parametrize("text", ["", "../global_step3", "/etc", ".", "..", "a//b", "a\0b"])
def test_a_latest_that_is_no_folders_name_is_not_followed(broken, refused, text):
    source = broken(ZERO1)
    (source.checkpoint / "latest").write_text(text)
    refused(source.checkpoint, CorruptFile, "latest", "the name of a folder next to it")


def test_a_latest_that_is_not_text_is_shown(broken, refused):
    source = broken(ZERO1)
    (source.checkpoint / "latest").write_bytes(b"\xff\xfe\x00")
    refused(source.checkpoint, BadCheckpoint, "latest")


def test_a_step_that_is_not_there_lists_the_tags(broken, refused):
    refused(broken(TWO_TAGS), MissingFile, "no tag of step 9", "global_step2, global_step3", step=9)


def test_a_latest_alone_is_no_checkpoint(tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latest").write_text("global_step3")
    refused(tmp_path / "run", MissingFile, "global_step3", "tags found: none")


# --- files of two checkpoints ----------------------------------------------------------------------------------------


def mixed(source: Case, *names: str) -> Case:
    """These files of step 2 among those of step 3."""
    for name in names:
        shutil.copy(source.checkpoint / "global_step2" / name, source.tag)
    return source


RANKS = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]


@pytest.mark.parametrize("options", [{}, {"optimizer": False}], ids=["with Adam", "weights only"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_optimizer_file_of_another_step_is_noticed(broken, refused, rank, options):
    refused(mixed(broken(TWO_TAGS), RANKS[rank]), MixedCheckpoint, *RANKS, "2", "3", "copy all of one", **options)


@pytest.mark.parametrize("options", [{}, {"optimizer": False}], ids=["with Adam", "weights only"])
def test_a_model_file_of_another_step_is_noticed(broken, refused, options):
    source = mixed(broken(TWO_TAGS), "mp_rank_00_model_states.pt")
    refused(source, MixedCheckpoint, "mp_rank_00_model_states.pt is of step 2", "3 steps", "copy all of one", **options)


def test_all_optimizer_files_of_another_step_are_noticed(broken, refused):
    source = mixed(broken(TWO_TAGS), *RANKS)
    refused(source, MixedCheckpoint, "mp_rank_00_model_states.pt is of step 3", "2 steps")


@pytest.mark.parametrize("name", [ZERO3, AUTOTP])
def test_model_files_of_two_steps_are_noticed(broken, refused, name):
    source = broken(name)
    other = model_file(source.tag, 1) if name == ZERO3 else model_file(source.tag, tp=1)
    edit(other, lambda document: document.update(global_steps=2))
    refused(source, MixedCheckpoint, other.name, "step 2", "step 3", "copy all of one")


@pytest.mark.parametrize(("field", "what"), [("step", "Adam's steps"), ("lr", "parameter groups or hyperparameters")])
@pytest.mark.parametrize("options", [{}, {"optimizer": False}], ids=["with Adam", "weights only"])
@pytest.mark.parametrize("name", [AUTOTP, "autotp2-zero3-ws4"])
def test_tensor_parallel_ranks_of_two_steps_or_rates_are_noticed(broken, refused, name, options, field, what):
    source = broken(name)

    def change(file: dict[str, Any]) -> None:
        state = file["optimizer_state_dict"]
        adam = state.get("base_optimizer_state") or state["optimizer_state_dict"]
        if field == "step":
            for state in adam["state"].values():
                state["step"] += 1
        else:
            adam["param_groups"][0]["lr"] *= 2

    for path in source.tag.glob("*mp_rank_01_optim_states.pt"):
        edit(path, change)
    refused(source, MixedCheckpoint, "tensor-parallel rank 1", what, "copy all of one", **options)


def test_a_universal_parameter_of_another_step_than_its_group_is_noticed(broken, refused):
    source = broken(UNIVERSAL)
    path = source.tag / "zero" / PROJECTION / "step.pt"
    save(load(path) + 1, path)
    refused(source, MixedCheckpoint, PROJECTION, "4 steps", "copy all of one", "--no-optimizer")


def test_model_files_beside_a_universal_folder_of_another_run_are_noticed(broken, refused):
    source = broken(UNIVERSAL)
    swapped = [source.tag / "zero" / f"model.layers.{layer}.input_layernorm.weight/fp32.pt" for layer in (0, 1)]
    shutil.copy(*swapped)
    refused(source, MixedCheckpoint, "model.layers.1.input_layernorm.weight", "mp_rank_00_model_states.pt")


def without_name(path: Path) -> None:
    """Save a file again so that torch's archive does not tell the name that it was saved by."""
    content, stream = load(path), io.BytesIO()
    save(content, path, lambda content, _: torch.save(content, stream))
    path.write_bytes(stream.getvalue())


def swap(first: Path, second: Path) -> None:
    aside = first.rename(first.parent.parent / "aside")
    second.rename(first)
    aside.rename(second)


@pytest.mark.parametrize("name", ["zero1-twotags-ws2", "zero1-untied-ws2", "smollm2-tiny-bf16-zero1-ws2"])
def test_two_ranks_that_were_swapped_are_noticed(broken, refused, name):
    source = broken(name)
    files = [optimizer_file(source.tag, rank) for rank in range(2)]
    for path in files:
        without_name(path)
    swap(*files)
    refused(source, MixedCheckpoint, "master")


@pytest.mark.parametrize("how", [swap, shutil.copy])
@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        (ZERO3, "bf16_zero_pp_rank_0_mp_rank_00_optim_states", "bf16_zero_pp_rank_2_mp_rank_00_optim_states"),
        ("zero3-bf16-frozen-uneven-ws3", "zero_pp_rank_1_mp_rank_00_model_states", "zero_pp_rank_2_mp_rank_00_model_states"),
        (AUTOTP, "mp_rank_00_model_states", "mp_rank_01_model_states"),
        (AUTOTP, "bf16_zero_pp_rank_0_mp_rank_00_optim_states", "bf16_zero_pp_rank_0_mp_rank_01_optim_states"),
    ],
)  # fmt: skip
def test_a_file_under_the_name_of_another_ranks_is_noticed(broken, refused, name, a, b, how):
    """No value in these files says which rank's they are: weights would be put together in the wrong order."""
    source = broken(name)
    how(source.tag / f"{a}.pt", source.tag / f"{b}.pt")
    refused(source, MixedCheckpoint, "was saved as", f"{a}.pt")


def test_files_that_do_not_tell_the_name_they_were_saved_by_are_read(broken):
    def values() -> dict[str, bytes]:
        return {name: bytes(t.numpy()) for name, t in read_checkpoint(source.checkpoint).tensors[Slot.MASTER].items()}

    source = broken(ZERO3)
    expected = values()
    for path in source.tag.glob("*.pt"):
        without_name(path)
    assert values() == expected


def test_files_of_two_precisions_are_noticed(broken, refused):
    source = broken(ZERO1)
    path = optimizer_file(source.tag, 2)
    path.rename(path.with_name(path.name.removeprefix("bf16_")))
    refused(source, MixedCheckpoint, path.name.removeprefix("bf16_"), "two checkpoints")


def test_model_files_of_two_stages_are_noticed(broken, refused):
    source = broken(ZERO3)
    shutil.copy(model_file(source.tag, 0), model_file(source.tag))
    refused(source, MixedCheckpoint, "ZeRO-3", "another stage")


# --- names and numbers that contradict each other --------------------------------------------------------------------


def test_a_rank_beyond_the_world_size_is_not_skipped(broken, refused):
    source = broken(ZERO1)
    extra = optimizer_file(source.tag, 2).with_name("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt")
    shutil.copy(optimizer_file(source.tag, 2), extra)
    refused(source, MixedCheckpoint, extra.name, "counts 3 ranks")


def test_a_rank_under_another_number_leaves_a_gap_that_is_named(broken, refused):
    source = broken(ZERO1)
    path = optimizer_file(source.tag, 1)
    path.rename(path.with_name("bf16_zero_pp_rank_7_mp_rank_00_optim_states.pt"))
    refused(source, MissingShard, path.name)


@pytest.mark.parametrize("name", [ZERO1, ZERO3])
def test_a_model_file_of_another_world_size_is_noticed(broken, refused, name):
    source = broken(name)
    edit(model_file(source.tag, 0 if name == ZERO3 else None), lambda document: document.update(dp_world_size=4))
    refused(source, MixedCheckpoint, "4 data-parallel ranks", "of 3")


def test_optimizer_files_of_another_world_size_are_noticed(broken, refused):
    source = broken(ZERO1)
    for rank in range(3):
        edit(
            optimizer_file(source.tag, rank), lambda file: file["optimizer_state_dict"].update(partition_count=[2] * 4)
        )
    refused(source, MixedCheckpoint, "counts 2 ranks")


@pytest.mark.parametrize("stage", [ZERO1, ZERO3])
def test_a_group_that_names_more_than_the_flat_tensors_hold_is_noticed(broken, refused, stage):
    source = broken(stage)

    def change(document: dict[str, Any]) -> None:
        document["param_shapes"][0]["model.ghost.weight"] = torch.Size([640])

    for path in source.tag.glob("*_model_states.pt"):
        edit(path, change)
    refused(source, BadCheckpoint, "group 0")


@pytest.mark.parametrize("name", [ZERO1, ZERO3, "zero0-bf16", AUTOTP, UNIVERSAL, UNIVERSAL3])
@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 64), ("vocab_size", 41), ("num_hidden_layers", 3), ("num_hidden_layers", 1),
     ("intermediate_size", 25), ("num_key_value_heads", 4)],
)  # fmt: skip
def test_another_models_config_is_refused(broken, refused, name, field, value):
    source = broken(name)
    edit_json(source.config, **{field: value})
    refused(source, BadCheckpoint, "config")


def test_files_of_a_pipeline_are_named(broken, refused):
    source = broken(ZERO1)
    (source.tag / "layer_00-model_00-model_states.pt").touch()
    refused(source, UnsupportedModel, "layer_00-model_00-model_states.pt", "pipeline")


def test_a_base_that_lacks_what_is_missing_is_a_bad_checkpoint(broken, refused):
    source = broken(ZERO3)
    edit_json(source.config, tie_word_embeddings=False)  # so that a head is needed, which no tied base has
    refused(source, BadCheckpoint, "lm_head.weight", base=case(ZERO3).checkpoint)


def test_a_base_of_another_size_is_named(broken, refused):
    source, base = broken("zero3-exclfrozen-ws2"), case(ZERO1).checkpoint
    refused(source, BadCheckpoint, str(base), base=base)


# --- damaged files ---------------------------------------------------------------------------------------------------

#: Every kind of file: the case that has it, and its place in the tag folder.
KINDS = {
    "model file": (ZERO1, "mp_rank_00_model_states.pt"),
    "model file of ZeRO-0": ("zero0-bf16", "mp_rank_00_model_states.pt"),
    "a later rank's model file": (ZERO3, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    "optimizer file": (ZERO1, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "a later rank's optimizer file": (ZERO3, "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"),
    "master": (UNIVERSAL, f"zero/{PROJECTION}/fp32.pt"),
    "moments": (UNIVERSAL3, f"zero/{PROJECTION}/exp_avg.pt"),
    "step": (UNIVERSAL, f"zero/{PROJECTION}/step.pt"),
    "groups": (UNIVERSAL3, "zero/optimizer_state.pt"),
}


@pytest.mark.parametrize("missing_bytes", [1, 100, 700, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_of_any_kind_is_named(broken, refused, kind, missing_bytes):
    name, place = KINDS[kind]
    source = broken(name)
    path = source.tag / place
    truncate(path, path.stat().st_size if missing_bytes is None else missing_bytes)
    refused(source, CorruptFile, place, "opy the file again")


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04", b"<html>not found</html>"])
def test_a_file_that_is_no_archive_is_named(broken, refused, content):
    source = broken(ZERO1)
    model_file(source.tag).write_bytes(content)
    refused(source, CorruptFile, "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("content", [None, 3, [1, 2], {}, {"module": {}}, torch.zeros(2)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_of_something_else_is_named(broken, refused, kind, content):
    name, place = KINDS[kind]
    source = broken(name)
    if kind == "step" and isinstance(content, int):
        content = "three"
    save(content, source.tag / place)
    refused(source, BadCheckpoint, *([] if kind in ("groups", "master", "moments") else [place]))


# --- pickles that want to run something ------------------------------------------------------------------------------


def with_code(content: Any, code: Touch) -> Any:
    # A user's own key of a model file may name any class, which is never built: tests/test_client_state.py.
    key = "lr_scheduler" if isinstance(content, dict) and "module" in content else "code"
    return {**content, key: code} if isinstance(content, dict) else [content, code]


@pytest.mark.parametrize("save_as", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_file_of_any_kind_is_not_run(broken, refused, tmp_path, kind, save_as):
    name, place = KINDS[kind]
    source = broken(name)
    save(with_code(load(source.tag / place), Touch(tmp_path / "was-run")), source.tag / place, save_as)
    refused(source, BadCheckpoint, place)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_refuses_code_and_says_its_name(broken, cli, tmp_path, kind):
    name, place = KINDS[kind]
    source = broken(name)
    save(Touch(tmp_path / "was-run"), source.tag / place)
    done = cli("convert", source.checkpoint, tmp_path / "out", "--to", "hf")
    assert_short_error(done, 3, "UnsafePickle", "exec", place)
    assert sorted(os.listdir(tmp_path)) == ["copies"]


def test_a_class_of_deepspeeds_is_a_name_and_its_module_is_not_imported(cli, tmp_path):
    marker = tmp_path / "was-run"
    module = tmp_path / "deepspeed/runtime/fp16/loss_scaler.py"
    for folder in (module.parent, module.parent.parent, tmp_path / "deepspeed"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    module.write_text(f"open({str(marker)!r}, 'w')")
    done = cli("inspect", case(ZERO1).checkpoint, env={"PYTHONPATH": str(tmp_path)})
    assert (done.code, marker.exists()) == (0, False)


# --- anything else ---------------------------------------------------------------------------------------------------

FUZZED = [
    ZERO1,
    ZERO3,
    "zero0-bf16",
    "zero2-clientstate-ws2",
    "zero1-elastic-ws3-uneven",
    AUTOTP,
    UNIVERSAL,
    UNIVERSAL3,
]


def damaged_pickle(content: bytes, chance: random.Random) -> bytes:
    """The archive with its pickle damaged and the checksums right, as no accident would leave it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in records if name.endswith("data.pkl"))
    records[name] = damaged(records[name], chance) or b"."
    with zipfile.ZipFile(stream := io.BytesIO(), "w", zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return stream.getvalue()


@pytest.mark.parametrize("damage", [damaged, damaged_pickle], ids=["file", "pickle"])
@pytest.mark.parametrize("name", FUZZED)
def test_damage_anywhere_ends_in_one_of_our_errors(broken, name, damage):
    source, chance = broken(name), random.Random(name)
    files = [path for path in sorted(source.tag.rglob("*.pt")) if not path.match("model.layers.*/*.pt")]
    refusals = 0
    for _ in range(60):
        path = chance.choice(files)
        content = path.read_bytes()
        changed = damage(content, chance)
        path.unlink() if changed is None else path.write_bytes(changed)
        refusals += only_our_errors(source.checkpoint)
        path.write_bytes(content)
    assert refusals >= 20, "the damage was to be noticed, most of the time"


@pytest.mark.parametrize("name", FUZZED)
def test_a_strange_value_in_any_field_ends_in_one_of_our_errors(broken, name):
    source, chance = broken(name), random.Random(name)
    strange = [
        *STRANGE,
        torch.zeros(2),
        torch.ones(2, 2).t(),
        torch.tensor(float("inf")),
        torch.zeros(1, dtype=torch.int8),
    ]
    files = [model_file(source.tag, 0 if name in (ZERO3, UNIVERSAL3) else None), *source.tag.glob("zero/*.pt"),
             *source.tag.glob(f"zero/{NORM}/*.pt"), *source.tag.glob("*_rank_0_mp_rank_00_optim_states.pt")]  # fmt: skip
    for path in files:
        original = load(path)
        for place in places(original):
            for value in chance.sample(strange, 1):  # `make fuzz` tries more
                save(with_value(original, place, value), path)
                try:
                    only_our_errors(source.checkpoint)
                except Exception as error:
                    raise AssertionError(f"{path.name}: {place} = {value!r}") from error
        save(original, path)


@pytest.mark.parametrize("ranks", [torch.ones(2), "two", -1, 1.5])
@pytest.mark.parametrize("name", ["zero0-bf16", ZERO1])
def test_a_world_size_that_is_no_number_is_a_corrupt_file(broken, refused, name, ranks):
    source = broken(name)
    edit(model_file(source.tag), lambda document: document.update(dp_world_size=ranks))
    refused(source, CorruptFile, "mp_rank_00_model_states.pt", "dp_world_size")


@pytest.mark.parametrize("options", [{}, {"optimizer": False}], ids=["with Adam", "weights only"])
def test_a_list_in_the_client_state_that_holds_itself_is_a_corrupt_file(broken, refused, options):
    source = broken(ZERO1)
    endless: list[Any] = []
    endless.append(endless)
    edit(model_file(source.tag), lambda document: document.update(history=endless))
    refused(source, CorruptFile, "holds itself", **options)


@pytest.mark.parametrize("paddings", [[], [[0]]])
def test_alignment_paddings_of_fewer_groups_are_a_corrupt_file(broken, refused, paddings):
    source = broken("zero2-fp32-ws3")
    for rank in range(3):
        edit(
            optimizer_file(source.tag, rank),
            lambda file: file["optimizer_state_dict"].update(param_alignment_paddings=paddings),
        )
    refused(source, CorruptFile, "param_alignment_paddings", f"{len(paddings)} groups, but there are 4")


def test_names_of_zero_0_that_are_fewer_than_its_numbers_end_in_one_of_our_errors(broken):
    source = broken("zero0-bf16")
    wrong: list[list[dict[str, Any]]] = [[], [{}], [{}, {}], [{NORM: torch.Size([16])}]]
    for shapes in wrong:
        edit(model_file(source.tag), lambda document: document.update(param_shapes=shapes))  # noqa: B023
        only_our_errors(source.checkpoint)


# --- not a number ----------------------------------------------------------------------------------------------------


def test_a_run_that_diverged_is_carried_with_a_warning(broken, tmp_path):
    source = broken(ZERO1)
    nan = torch.tensor([torch.inf] * 8) - torch.inf  # as a processor makes it: with the sign bit
    edit(model_file(source.tag), lambda document: document["module"][NORM].data.copy_(nan))
    for rank in range(2):  # the group of the last norm, four elements on each
        edit(optimizer_file(source.tag, rank),
             lambda file: file["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data.copy_(nan[:4]))  # fmt: skip
    result = convert(source.checkpoint, tmp_path / "out", "hf")
    assert any("NaN" in warning and NORM in warning for warning in result.warnings)
    assert hf_weights(tmp_path / "out")[NORM].isnan().all()


# --- what smolconv wrote itself, and what changes while it runs ------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Case:
    """What smolconv wrote of nanotron's run: progress is in the client_state, documents are beside ``latest``."""
    nanotron = FIXTURES / "nanotron/smollm2-tiny/tp1-pp1-dp1-zero0"
    convert(nanotron, tmp_path / "ours/checkpoint", "deepspeed", zero_stage=1, world_size=2)
    return Case(tmp_path / "ours")


def test_a_strange_value_in_our_own_progress_ends_in_one_of_our_errors(ours):
    path, chance = model_file(ours.tag), random.Random(0)
    original = load(path)
    for place in places(original["smolconv"]):
        for value in chance.sample(STRANGE, 4):
            save({**original, "smolconv": with_value(original["smolconv"], place, value)}, path)
            try:
                only_our_errors(ours.checkpoint)
            except Exception as error:
                raise AssertionError(f"{place} = {value!r}") from error


def test_a_message_about_our_own_progress_is_short(ours):
    edit(model_file(ours.tag), lambda document: document["smolconv"]["progress"].update(consumed_samples=-1))
    with pytest.raises(CorruptFile) as raised:
        read_checkpoint(ours.checkpoint)
    assert len(str(raised.value)) < 500


def test_a_folder_among_the_source_documents_is_no_document(ours):
    (ours.checkpoint / "smolconv_source/.ipynb_checkpoints").mkdir()
    assert read_checkpoint(ours.checkpoint).progress.step == 3


def test_a_file_that_was_replaced_is_read_anew(broken):
    source = broken(ZERO1)
    for tensor in read_checkpoint(source.checkpoint).tensors[Slot.EXP_AVG].values():
        tensor.numpy()  # its file may stay open

    def seven_steps(file: dict[str, Any]) -> None:
        for state in file["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["step"].fill_(7)

    for rank in range(3):
        path = optimizer_file(source.tag, rank)
        copied = Path(shutil.copy(path, source.folder / "arriving"))  # as rsync does
        edit(copied, seven_steps)
        copied.replace(path)
    assert set(read_checkpoint(source.checkpoint).optimizer.steps.values()) == {7}
