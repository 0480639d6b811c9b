"""A run's own checkpoints when something goes wrong: kills, full disks, going back to an earlier step, damaged files.

What dies or fails on purpose does so in the worker's own process, or at a call that this process makes.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert
from forked_worker import Ended, work
from training import losses, metrics, recipe, recipe_document, token_folder

from smolconv.continual_pretraining.recipe.schema import Checkpoints, Recipe
from smolconv.continual_pretraining.run.checkpoints import (
    RESUME_FROM,
    choose,
    find_resume,
    latest,
    prune,
    publish,
    remove_partial,
    saved_steps,
    set_aside,
    step_folder,
)
from smolconv.continual_pretraining.run.start import prepare_start
from smolconv.errors import MissingFile, UsageError

pytest.importorskip("deepspeed")

NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
STEPS = 4
#: The node is lost when the run would save.
DIES_BEFORE_A_SAVE = """
import os
from smolconv.continual_pretraining.run import trainer
trainer.Trainer._save = lambda *_, **__: os._exit(9)
"""
#: In step 2's save the disk is full for rank 0 alone, at a place where the other ranks do not look.
FULL = """
import errno, os
from smolconv.continual_pretraining.run import saving
save_run, saves = saving.save_run, []
def full(path):
    if os.environ["RANK"] == "0" and len(saves) == 2:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
def counted(*given):
    saves.append(1)
    return save_run(*given)
from smolconv.continual_pretraining.run import trainer
trainer.save_run = counted
"""
#: What DeepSpeed does beside saving its files: its scripts, and the folders.
FULL_FOR_SCRIPTS = f"""{FULL}
from deepspeed.runtime import engine
engine.copyfile = lambda source, target: full(target)
"""
FULL_FOR_FOLDERS = f"""{FULL}
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
makedirs = TorchCheckpointEngine.makedirs
def refused(self, path, exist_ok=False):
    full(path)
    return makedirs(self, path, exist_ok)
TorchCheckpointEngine.makedirs = refused
"""
FULL_FOR_LATEST = f"""{FULL}
from smolconv.continual_pretraining.run import checkpoints as run_checkpoints
write = run_checkpoints.write_synced
def refused(path, content):
    if path.name == "latest.partial":
        path.touch()
        full(path)
    write(path, content)
run_checkpoints.write_synced = refused
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


def document(tokens: Path, source: Path = NANOTRON, **changes: Any) -> dict[str, Any]:
    base = {
        "parallelism": {"zero_stage": 1, "micro_batch_sequences": 1, "global_batch_sequences": 2},
        "checkpoints": {"every_steps": 1},
    }
    made = recipe_document(source, tokens, **base)
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    """Steps 1 to 4, all of them saved."""
    run = tmp_path_factory.mktemp("trained") / "run"
    succeeded(work(document(tokens), run))
    return run


def succeeded(ended: Ended) -> None:
    assert ended.code == 0, ended.log


def said(run: Path) -> str:
    return "\n".join(json.loads(line)["text"] for line in (run / "events.jsonl").read_text().splitlines())


def folder_of(run: Path, step: int, text: str = "{}") -> Path:
    """A checkpoint of this step, as ``save_run`` writes and publishes it."""
    partial = run / "checkpoints" / f"step-{step}.partial"
    partial.mkdir(parents=True)
    (partial / "trainer.json").write_text(text)
    return publish(run, step)


# --- going on from a path that was named -------------------------------------------------------------------------------


def test_a_start_that_dies_before_its_first_save_goes_on_from_the_other_run_it_was_given(trained, tokens, tmp_path):
    run = tmp_path / "run"
    assert work(document(tokens), run, resume=str(step_folder(trained, 2)), before=DIES_BEFORE_A_SAVE).code == 9
    assert latest(run) is None
    ended = work(document(tokens), run)
    succeeded(ended)
    assert "continues from" in ended.log and "step-2" in ended.log
    assert [line["step"] for line in metrics(run)] == [3, 4]
    assert losses(run) == losses(trained)[2:]


def test_a_start_that_dies_before_its_first_save_does_not_return_to_the_branch_that_was_left(trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert work(document(tokens), run, resume=str(step_folder(run, 2)), before=DIES_BEFORE_A_SAVE).code == 9
    assert latest(run).name == "step-4"
    assert find_resume(run, "auto").name == "step-2"
    ended = work(document(tokens), run)
    succeeded(ended)
    assert "all 4 steps are done" not in ended.log
    assert losses(run) == losses(trained)


def test_after_its_first_save_a_run_goes_on_from_its_own_latest(tmp_path):
    for step in (20, 30):
        folder_of(tmp_path, step)
    choose(tmp_path, step_folder(tmp_path, 20))
    assert find_resume(tmp_path, "auto").name == "step-20"
    folder_of(tmp_path, 25)
    assert find_resume(tmp_path, "auto").name == "step-25"


def test_what_was_named_is_found_again_when_the_run_has_moved(tmp_path):
    for step in (20, 30):
        folder_of(tmp_path / "run", step)
    choose(tmp_path / "run", step_folder(tmp_path / "run", 20))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert find_resume(moved, "auto") == step_folder(moved, 20)


def test_a_named_checkpoint_that_is_gone_is_not_replaced_by_another(tmp_path):
    for step in (20, 30):
        folder_of(tmp_path, step)
    choose(tmp_path, step_folder(tmp_path, 20))
    shutil.rmtree(step_folder(tmp_path, 20))
    with pytest.raises(MissingFile, match=r"step-20.*\n.*--resume"):
        find_resume(tmp_path, "auto")
    assert find_resume(tmp_path, str(step_folder(tmp_path, 30))).name == "step-30"


def test_a_path_that_was_refused_is_not_gone_on_from(trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    other = recipe(NANOTRON, tokens, parallelism={"global_batch_sequences": 4})
    with pytest.raises(UsageError, match="global batch"):
        prepare_start(other, run, 1, str(step_folder(run, 2)))
    assert find_resume(run, "auto").name == "step-4"


def test_a_step_beyond_the_last_of_the_recipe_is_refused_with_the_newest_that_is_not(trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shorter = Recipe.model_validate(document(tokens, schedule={"train_steps": 3}))
    with pytest.raises(UsageError, match=r"step-4 has made 4 steps, but schedule.train_steps is 3\.") as caught:
        prepare_start(shorter, run, 1, "auto")
    assert f"go back with --resume {step_folder(run, 3)}." in str(caught.value)
    assert prepare_start(shorter, run, 1, str(step_folder(run, 3))).step == 3  # control


def test_resume_never_forgets_the_path_of_an_earlier_start(trained, tokens, tmp_path):
    run, made = tmp_path / "run", recipe(NANOTRON, tokens, **document(tokens))
    assert prepare_start(made, run, 1, str(step_folder(trained, 2))).step == 2
    assert prepare_start(made, run, 1, "auto").step == 2
    said = list[str]()
    assert prepare_start(made, run, 1, "never", say=said.append).step == 0
    assert (
        len(said) == 2
        and said[0].startswith("start gate: ")
        and said[1].startswith(f"converting {NANOTRON} for 1 rank")
    )
    assert prepare_start(made, run, 1, "auto").step == 0


# --- the branch that was left ------------------------------------------------------------------------------------------


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if ".left" in path.name)


def test_what_followed_the_step_that_was_gone_back_to_is_set_aside_and_said(trained, tokens, tmp_path):
    """Gone back to step 1 of 4; the first save is step 3's, so steps 2, 3 and 4 are another branch's."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    old = (step_folder(run, 3) / "trainer.json").stat().st_ino
    made = document(tokens, schedule={"train_steps": 3}, checkpoints={"every_steps": 3})
    succeeded(work(made, run, resume=str(step_folder(run, 1))))
    assert saved_steps(run) == [1, 3] and latest(run).name == "step-3"
    assert left(run) == ["step-2.left-1", "step-3.left-1", "step-4.left-1"]
    assert (run / "checkpoints" / "step-3.left-1" / "trainer.json").stat().st_ino == old
    assert "step-2.left-1, step-3.left-1, step-4.left-1" in said(run)
    # It is a checkpoint like any other, and can be gone back to.
    succeeded(work(document(tokens), run, resume=str(run / "checkpoints" / "step-3.left-1")))
    assert losses(run) == losses(trained)


def test_going_back_twice_keeps_both_branches(tmp_path):
    for _ in range(3):
        folder_of(tmp_path, 20)
    assert left(tmp_path) == ["step-20.left-1", "step-20.left-2"]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [({}, [10, 20, 25]), ({"keep": 2}, [20, 25]), ({"keep": 1, "keep_every_steps": 10}, [10, 20, 25])],
)
def test_retention_counts_only_the_branch_that_goes_on(policy, steps, tmp_path):
    for step in (10, 20, 30, 40):
        folder_of(tmp_path, step)
    folder_of(tmp_path, 25)  # resumed at step 20
    set_aside(tmp_path, after=20, saved=25)
    prune(tmp_path, Checkpoints(**policy))
    assert saved_steps(tmp_path) == steps
    assert left(tmp_path) == ["step-30.left-1", "step-40.left-1"]


class Killed(BaseException):
    """In the place of SIGKILL: no handler of ours catches it."""


def killed_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    """Die at the ``moment``-th call that changes the disk; it does not happen, but for half of an rmtree."""
    calls = itertools.count()
    for module, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (os, "fsync")):
        real = getattr(module, name)

        def mortal(*given: Any, real: Any = real, name: str = name, **more: Any) -> Any:
            if next(calls) == moment:
                for path in Path(given[0]).iterdir() if name == "rmtree" else ():
                    os.unlink(path)
                raise Killed
            return real(*given, **more)

        patch.setattr(module, name, mortal)


def test_a_kill_at_any_moment_of_saving_the_latest_step_again_leaves_a_whole_one_to_go_on_from(tmp_path, monkeypatch):
    for moment in itertools.count():
        run = tmp_path / f"run-{moment}"
        for step in (20, 30):
            folder_of(run, step, "old")
        choose(run, step_folder(run, 20))
        partial = run / "checkpoints" / "step-30.partial"
        partial.mkdir()
        (partial / "trainer.json").write_text("new")
        with monkeypatch.context() as patch:
            killed_at(patch, moment)
            try:
                publish(run, 30)
                set_aside(run, after=20, saved=30)
                prune(run, Checkpoints(keep=1))
                done = True
            except Killed:
                done = False
        remove_partial(run)
        found = find_resume(run, "auto")
        text = (found / "trainer.json").read_text()
        assert (found.name, text) in (("step-20", "old"), ("step-30", "new")), moment
        assert all((step_folder(run, step) / "trainer.json").is_file() for step in saved_steps(run)), moment
        if done:
            assert moment > 5 and (found.name, text) == ("step-30", "new")
            break


# --- what an interrupted or failed save leaves -------------------------------------------------------------------------


def test_a_file_that_an_interrupted_save_left_does_not_block_the_resume(trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "checkpoints" / "latest.partial").write_text("ste")
    assert prepare_start(recipe(NANOTRON, tokens, **document(tokens)), run, 1, "auto").step == STEPS
    assert not (run / "checkpoints" / "latest.partial").exists()


def test_a_conversion_that_failed_is_removed_before_anything_needs_the_space(trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "start" / "deepspeed.partial").mkdir(parents=True)
    prepare_start(recipe(NANOTRON, tokens, **document(tokens)), run, 1, "auto")
    assert not (run / "start").exists()


def busy(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOTEMPTY, "Directory not empty", ".nfs0001")


def test_what_cannot_be_deleted_blocks_neither_a_save_nor_a_start(tmp_path, monkeypatch):
    for step in (2, 4):
        folder_of(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        notes = prune(tmp_path, Checkpoints(keep=1))
        assert saved_steps(tmp_path) == [4]
        assert any("step-2" in note and "Directory not empty" in note for note in notes)
        assert any("step-2.partial" in note for note in remove_partial(tmp_path))
    assert remove_partial(tmp_path) == []
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-4"]


BUSY = """
import errno, shutil
rmtree = shutil.rmtree
def busy(path, *given, **more):
    if "step-1" in str(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
    return rmtree(path, *given, **more)
shutil.rmtree = busy
"""


def test_retention_that_fails_is_an_event_and_not_the_end(tokens, tmp_path):
    run = tmp_path / "run"
    made = document(tokens, schedule={"train_steps": 2}, checkpoints={"keep": 1})
    succeeded(work(made, run, 2, before=BUSY))
    assert saved_steps(run) == [2] and "step-1" in said(run) and "Directory not empty" in said(run)
    assert (run / "checkpoints" / "step-1.partial").is_dir()
    succeeded(work(document(tokens, checkpoints={"keep": 1}), run, 2))
    assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step-4"]


def test_a_checkpoint_holds_no_scripts_of_deepspeeds(tokens, tmp_path):
    """Rank 0 alone would copy them, outside of what the ranks agree on."""
    run = tmp_path / "run"
    succeeded(work(document(tokens, schedule={"train_steps": 2}), run, 2, before=FULL_FOR_SCRIPTS))
    assert not list((run / "checkpoints").rglob("*.py"))


@pytest.mark.parametrize("fails", [FULL_FOR_FOLDERS, FULL_FOR_LATEST], ids=["folders", "latest"])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_disk_that_is_full_for_one_rank_alone_is_known_to_all(fails, policy, tokens, tmp_path):
    run = tmp_path / "run"
    made = document(tokens, schedule={"train_steps": 3}, checkpoints={"on_full_disk": policy})
    ended = work(made, run, 2, before=fails)
    if policy == "stop":
        assert ended.code == 4 and "step 2 could not be saved" in ended.message and "No space left" in ended.message
        assert len(list((run / "logs").glob("failure-rank-*.json"))) == 2  # each by itself, none killed while it waits
    else:
        succeeded(ended)
        assert "step 2 could not be saved" in said(run)
    assert saved_steps(run) == ([1] if policy == "stop" else [1, 3])
    assert not list((run / "checkpoints").glob("*.partial"))


# --- what lies in a checkpoint -----------------------------------------------------------------------------------------


def test_the_tokenizer_outlives_the_checkpoint_that_was_resumed(tokens, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    convert(NANOTRON, source, "hf", dtype="float32", optimizer=False)
    assets = {
        "generation_config.json": b'{"eos_token_id": 0}',
        "special_tokens_map.json": b'{"eos_token": "<e>"}',
        "tokenizer.model": bytes(range(256)),
    }
    for name, content in assets.items():
        (source / name).write_bytes(content)
    made = document(tokens, source, checkpoints={"keep": 1, "asynchronous": False}, export={"formats": ["hf"]})
    dies = DIES_BEFORE_A_SAVE.replace(
        "lambda *_, **__: os._exit(9)",
        "lambda self, data, save=trainer.Trainer._save, **k: save(self, data, **k) if data.step == 1 else os._exit(9)",
    )
    assert work(made, run, before=dies).code == 9
    assert saved_steps(run) == [1]
    shutil.rmtree(source)
    succeeded(work(made, run))
    assert saved_steps(run) == [STEPS]
    for folder in (latest(run), run / "export" / "hf"):
        for name, content in assets.items():
            assert (folder / name).read_bytes() == content, folder


RECORDS_FSYNC = """
import os
fsync = os.fsync
def recorded(descriptor):
    with open(os.environ["FSYNCED"], "a") as file:
        found = os.fstat(descriptor)
        file.write(f"{found.st_dev}-{found.st_ino}-{found.st_size}-{os.environ['RANK']}\\n")
    return fsync(descriptor)
os.fsync = recorded
"""


def test_every_file_of_a_checkpoint_is_put_on_disk_by_the_rank_that_wrote_it(tokens, tmp_path):
    run, record = tmp_path / "run", tmp_path / "fsynced"
    source = tmp_path / "source"
    convert(NANOTRON, source, "hf", dtype="float32", optimizer=False)
    (source / "tokenizer.model").write_bytes(bytes(range(256)))
    made = document(tokens, source, schedule={"train_steps": 1})
    set_record = f"import os; os.environ['FSYNCED'] = {str(record)!r}\n"
    succeeded(work(made, run, 2, before=set_record + RECORDS_FSYNC))
    lines = {tuple(line.rsplit("-", 1)) for line in record.read_text().splitlines()}
    files = [path for path in latest(run).rglob("*") if path.is_file()]
    assert {"tokenizer.model", "config.json", "rank-00001.pt", "trainer.json"} <= {path.name for path in files}
    for path in files:
        found = path.stat()
        rank = "1" if "rank-00001" in path.name or "zero_pp_rank_1" in path.name else "0"
        assert (f"{found.st_dev}-{found.st_ino}-{found.st_size}", rank) in lines, path
    folders = {line[0].rsplit("-", 1)[0] for line in lines}
    for folder in (latest(run), latest(run) / "random", run / "checkpoints", run):
        found = folder.stat()
        assert f"{found.st_dev}-{found.st_ino}" in folders, folder


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: torch.save({"gpu": 1}, path),
        lambda path: torch.save({"cpu": torch.zeros(3, dtype=torch.uint8)}, path),
    ],
    ids=["empty", "cut", "another document", "of another size"],
)
def test_a_damaged_random_state_is_named(spoil, trained, tokens, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    spoil(step_folder(run, 2) / "random" / "rank-00000.pt")
    ended = work(document(tokens), run, resume=str(step_folder(run, 2)))
    assert ended.code == 3, ended.log
    assert "random/rank-00000.pt" in ended.message and "--resume" in ended.message


def test_the_record_of_a_named_path_is_on_disk_before_anything_is_trained(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    choose(tmp_path, tmp_path / "other" / "step-2")
    assert {(tmp_path / RESUME_FROM).stat().st_ino, tmp_path.stat().st_ino} <= set(synced)
