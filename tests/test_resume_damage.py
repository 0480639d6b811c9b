"""A run's own checkpoint that was damaged: noticed before anything is trained, said, and gone back from where allowed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from conftest import FIXTURES
from forked_worker import Ended, work
from training import losses, recipe, recipe_document, token_folder

from smolconv.continual_pretraining.run.checkpoint_files import examine, share_of
from smolconv.continual_pretraining.run.checkpoints import RESUME_FROM, latest, saved_steps, step_folder
from smolconv.continual_pretraining.run.resuming import find_origin
from smolconv.errors import BadCheckpoint, DigestMismatch, MixedCheckpoint
from smolconv.storage.torch_archive.archive import read_torch_archive

pytest.importorskip("deepspeed")

NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
MODEL, MANIFEST = "mp_rank_00_model_states.pt", "smolconv_manifest.json"
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def document(tokens: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "parallelism": {"zero_stage": 2, "micro_batch_sequences": 1, "global_batch_sequences": 2},
        "checkpoints": {"every_steps": 2}, "schedule": {"train_steps": 6},
    }  # fmt: skip
    made = recipe_document(NANOTRON, tokens, **base)
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request, tokens, tmp_path_factory):
    """Steps 2, 4 and 6, and by how many ranks."""
    run = tmp_path_factory.mktemp("trained") / "run"
    succeeded(work(document(tokens), run, request.param))
    return run, request.param


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def succeeded(ended: Ended) -> None:
    assert ended.code == 0, ended.log


def said(run: Path) -> str:
    return "\n".join(json.loads(line)["text"] for line in (run / "events.jsonl").read_text().splitlines())


def found(run: Path, tokens: Path, resume: str = "auto", **checkpoints: str) -> Any:
    return find_origin(recipe(NANOTRON, tokens, **document(tokens, checkpoints=checkpoints)), run, resume)


def adam_offset(path: Path) -> int:
    """Of the first byte of Adam's second moment in an optimizer file."""
    read: Any = read_torch_archive(path, allow=_anything())
    state = read["optimizer_state_dict"]["base_optimizer_state"]
    moments = state[0] if isinstance(state, list) else state["state"][0]
    return moments["exp_avg_sq"].offset


def _anything() -> Any:
    from smolconv.layouts.deepspeed.documents import STAND_INS

    return STAND_INS


def flip(path: Path, offsets: list[int], bit: int = 0) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ (1 << bit)]))


def bits_in_adam(folder: Path) -> str:
    path = folder / OPTIMIZER.format(0)
    start = adam_offset(path)
    flip(path, [start + 4 * index for index in range(100)])
    return path.name


def an_exponent(folder: Path) -> str:
    path = folder / OPTIMIZER.format(0)
    flip(path, [adam_offset(path) + 3], bit=6)
    return path.name


def a_bit_of_padding(folder: Path) -> str:
    flip(folder / MODEL, [os.path.getsize(folder / MODEL) // 2])
    return MODEL


def cut(folder: Path) -> str:
    os.truncate(folder / OPTIMIZER.format(0), os.path.getsize(folder / OPTIMIZER.format(0)) - 1)
    return OPTIMIZER.format(0)


def appended(folder: Path) -> str:
    with (folder / MODEL).open("ab") as file:
        file.write(b"\0")
    return MODEL


def another_steps_state(folder: Path) -> str:
    shutil.copy(folder.with_name("step-2") / "trainer.json", folder / "trainer.json")
    return "trainer.json"


def another_steps_optimizer(folder: Path) -> str:
    shutil.copy(folder.with_name("step-2") / OPTIMIZER.format(0), folder / OPTIMIZER.format(0))
    return OPTIMIZER.format(0)


def another_steps_manifest(folder: Path) -> str:
    shutil.copy(folder.with_name("step-2") / MANIFEST, folder / MANIFEST)
    return MANIFEST


def another_learning(folder: Path) -> str:
    state = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps({**state, "position": {**state["position"], "step": 3}}, indent=1))
    return "trainer.json"


def without(name: str) -> Callable[[Path], str]:
    def delete(folder: Path) -> str:
        (folder / name).unlink()
        return name

    return delete


def emptied(name: str) -> Callable[[Path], str]:
    def empty(folder: Path) -> str:
        (folder / name).write_bytes(b"")
        return name

    return empty


def one_bit(name: str) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        flip(folder / name, [os.path.getsize(folder / name) // 3])
        return name

    return change


DAMAGE = {
    "100 bits in Adam": bits_in_adam, "an exponent": an_exponent, "a bit of the model": a_bit_of_padding, "cut": cut,
    "a byte more": appended, "another step's state": another_steps_state,
    "another step's optimizer": another_steps_optimizer, "another step's manifest": another_steps_manifest,
    "a state that was edited": another_learning,
    **{f"without {name}": without(name) for name in
       (MODEL, OPTIMIZER.format(0), "trainer.json", "config.json", "random/rank-00000.pt", MANIFEST)},
    **{f"empty {name}": emptied(name) for name in
       (MODEL, OPTIMIZER.format(0), "trainer.json", "config.json", "random/rank-00000.pt", MANIFEST)},
    **{f"a bit of {name}": one_bit(name) for name in ("trainer.json", "config.json", "random/rank-00000.pt", MANIFEST)},
}  # fmt: skip


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_named_and_gone_back_from_only_where_that_was_asked_for(spoil, run, tokens):
    newest = step_folder(run, 6)
    name = spoil(newest)
    for resume, policy in (("auto", "stop"), (str(newest), "stop"), (str(newest), "previous")):
        with pytest.raises(BadCheckpoint) as caught:
            found(run, tokens, resume, on_damage=policy)
        text = str(caught.value)
        assert name in text and len(text.splitlines()[0]) <= 120, text
        assert f"--resume {step_folder(run, 4)}" in text
        assert ("on_damage: previous" in text) == (resume == "auto")
    origin = found(run, tokens, on_damage="previous")
    assert origin.checkpoint == step_folder(run, 4)
    assert "step-6" in origin.went_back and "step-4" in origin.went_back


def test_the_newest_whole_one_may_be_further_back_or_nowhere(run, tokens):
    bits_in_adam(step_folder(run, 6)), cut(step_folder(run, 4))
    assert found(run, tokens, on_damage="previous").checkpoint == step_folder(run, 2)
    an_exponent(step_folder(run, 2))
    for policy in ("stop", "previous"):
        with pytest.raises(DigestMismatch, match="No earlier checkpoint is undamaged"):
            found(run, tokens, on_damage=policy)


def test_a_foreign_file_is_refused_and_not_gone_back_from(run, tokens):
    (step_folder(run, 6) / "notes.txt").write_text("mine")
    with pytest.raises(MixedCheckpoint, match=r"notes\.txt in step-6 was not saved by continue-train"):
        found(run, tokens, on_damage="previous")


def test_a_later_steps_damage_does_not_touch_an_earlier_one(run, tokens):
    bits_in_adam(step_folder(run, 6))
    assert found(run, tokens, str(step_folder(run, 4))).checkpoint == step_folder(run, 4)
    assert found(run, tokens, str(step_folder(run, 2))).went_back is None


def test_the_manifest_has_what_another_program_computes(trained):
    folder = latest(trained[0])
    manifest = json.loads((folder / MANIFEST).read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert {file["path"] for file in manifest["files"]} == {str(path.relative_to(folder)) for path in files}
    for file in manifest["files"]:
        content = (folder / file["path"]).read_bytes()
        assert file["bytes"] == len(content)
        assert file["digest"] == f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}"
    assert (manifest["schema"], manifest["step"], manifest["tensors"]) == (1, 6, [])


def test_the_files_are_divided_among_the_ranks_evenly_and_each_is_read_once(trained):
    contents = examine(latest(trained[0]))
    for ranks in (1, 2, 3, 7):
        shares = [share_of(contents, rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(contents.bytes_by_name)
        loads = [sum(contents.bytes_by_name[name] for name in share) for share in shares]
        assert max(loads) - min(loads) <= max(contents.bytes_by_name.values())


# --- checkpoints of an earlier version ---------------------------------------------------------------------------------


def as_an_earlier_version(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    state = json.loads((folder / "trainer.json").read_text())
    del state["manifest"]
    (folder / "trainer.json").write_text(json.dumps(state))


def test_a_checkpoint_without_a_manifest_is_taken_with_a_note(run, tokens):
    as_an_earlier_version(step_folder(run, 6))
    origin = found(run, tokens)
    assert origin.checkpoint == step_folder(run, 6) and "without digests" in origin.notes[0]


@pytest.mark.parametrize("spoil", [bits_in_adam, an_exponent, cut, another_steps_state, without("config.json")])
def test_without_a_manifest_the_archives_own_checksums_and_steps_are_compared(spoil, run, tokens):
    for step in (6, 2):
        as_an_earlier_version(step_folder(run, step))
    name = spoil(step_folder(run, 6))
    with pytest.raises(BadCheckpoint, match=re.escape(name)):
        found(run, tokens)
    assert found(run, tokens, on_damage="previous").checkpoint == step_folder(run, 4)


def test_a_state_of_another_step_is_noticed_when_every_checksum_is_right(run, tokens):
    """As in the attack: trainer.json of step 2 in step 6, where nothing else says which step it is."""
    for step in (2, 6):
        as_an_earlier_version(step_folder(run, step))
    folder = step_folder(run, 6)
    state = json.loads((folder.with_name("step-2") / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps({**state, "step": 6, "world_size": state["world_size"]}))
    os.rename(folder, folder.with_name("step-8"))
    (folder.parent / "latest").write_text("step-8")
    with pytest.raises(MixedCheckpoint, match=r"trainer\.json in step-8 is of step 6"):
        found(run, tokens)


# --- whole runs ------------------------------------------------------------------------------------------------------------


def test_a_damaged_run_stops_with_3_and_with_previous_it_trains_what_it_would_have(trained, run, tokens):
    ranks = trained[1]
    name = bits_in_adam(step_folder(run, 6))
    made = document(tokens, schedule={"train_steps": 6})
    ended = work(made, run, ranks)
    assert ended.code == 3 and name in ended.message and "step-4" in ended.message, ended.log
    ended = work(document(tokens, checkpoints={"on_damage": "previous", "every_steps": 2}), run, ranks)
    succeeded(ended)
    assert losses(run) == losses(trained[0])  # steps 5 and 6 again
    assert "went back to step-4" in said(run) and name in said(run)
    assert saved_steps(run) == [2, 4, 6] and (run / "checkpoints" / "step-6.left-1").is_dir()
    assert found(run, tokens).checkpoint == step_folder(run, 6)


DIES_BEFORE_A_SAVE = """
import os
from smolconv.continual_pretraining.run import trainer
trainer.Trainer._save = lambda *_, **__: os._exit(9)
"""


def test_a_start_that_went_back_and_died_is_not_followed_by_one_from_the_damaged_checkpoint(trained, run, tokens):
    kept = step_folder(run, 6) / OPTIMIZER.format(0)
    whole = kept.read_bytes()
    bits_in_adam(step_folder(run, 6))
    made = document(tokens, checkpoints={"on_damage": "previous"})
    assert work(made, run, trained[1], before=DIES_BEFORE_A_SAVE).code == 9
    assert (run / RESUME_FROM).is_file()
    kept.write_bytes(whole)  # a disk that reads right once in a while
    assert found(run, tokens).checkpoint == step_folder(run, 4)


def test_what_was_gone_back_to_is_exported_when_all_steps_are_done(trained, run, tokens):
    bits_in_adam(step_folder(run, 6))
    made = document(tokens, checkpoints={"on_damage": "previous"}, schedule={"train_steps": 4})
    made["export"] = {"formats": ["hf"]}
    ended = work(made, run, trained[1])
    succeeded(ended)
    assert "went back to step-4" in ended.log and (run / "export" / "hf").is_dir()


def test_the_command_line_ends_with_3(cli, run, trained, tokens, tmp_path):
    import yaml

    an_exponent(step_folder(run, 6))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(document(tokens)))
    done = cli("continue-train", file, "--output", run, "--nproc-per-node", trained[1], env={"OMP_NUM_THREADS": "1"})
    assert done.code == 3, done.stderr
    assert "DigestMismatch" in done.stderr and OPTIMIZER.format(0) in done.stderr and "step-4" in done.stderr
