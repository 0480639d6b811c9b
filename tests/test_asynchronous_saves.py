"""Saves behind the training: the same bytes and losses as saves that it waits for, whatever dies or fails meanwhile.

The writers are held back by hooks in the ranks, so that training is always ahead of what is being written.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from forked_worker import Ended, work
from training import losses, metrics, recipe_document, token_folder

from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoint_files import examine, problem_in
from smolconv.continual_pretraining.run.checkpoints import latest, saved_steps, step_folder
from smolconv.layouts.deepspeed.checkpoint_engine import HostMemory, deepspeed_classes, load_torch_archive
from smolconv.models.huggingface import spec_from_hf

pytest.importorskip("deepspeed")
#: One process of pytest, and so one server of forked workers.
pytestmark = pytest.mark.xdist_group("forked worker")

SOURCE = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
STEPS = 6
#: A save's files are written when the step after it is over, unless it is the last; the second one a while later.
LATE = f"""
import time
from smolconv.continual_pretraining.run import saving
begin, steps = saving.save_run, []
def save_run(*given):
    steps.append(given[5].step)
    return begin(*given)
from smolconv.continual_pretraining.run import trainer
trainer.save_run = save_run
write, run = saving._SavingEngine.write_copies, __import__("pathlib").Path(__import__("sys").argv[1])
def late(self):
    step, lines = steps[-1], run / "metrics.jsonl"
    while step < {STEPS} and lines.read_text().count(chr(10)) <= step:
        time.sleep(0.002)
    if len(steps) == 2:
        time.sleep(0.3)
    return write(self)
saving._SavingEngine.write_copies = late
"""
#: The training's own tensors are written.
WITHOUT_COPIES = f"""{LATE}
from smolconv.layouts.deepspeed.checkpoint_engine import HostMemory
HostMemory.snapshot = lambda self, content: content
"""
#: The disk is full for rank 1 while it writes step 2.
FULL = f"""{LATE}
import errno, os
from smolconv.layouts.deepspeed import checkpoint_engine
put = checkpoint_engine._HashedFile.write
def refused(self, data):
    if os.environ["RANK"] == "1" and steps[-1] == 2 and "optim" in self.file.name:
        self.error = OSError(errno.ENOSPC, "No space left on device")
    return put(self, data)
checkpoint_engine._HashedFile.write = refused
"""
NOT_FINITE = f"""{LATE}
from smolconv.errors import TrainingStopped
agree = trainer.Trainer._agree
def not_finite(self, data, losses, count):
    found = agree(self, data, losses, count)
    if data.step == 4:
        raise TrainingStopped("the loss of step 4 is not finite")
    return found
trainer.Trainer._agree = not_finite
"""


def document(tokens: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"dtype": "bfloat16"}, "start": {"gate_tolerance": 1.0}, "schedule": {"train_steps": STEPS},
        "parallelism": {"zero_stage": 1}, "checkpoints": {"every_steps": 2},
    }  # fmt: skip
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return recipe_document(SOURCE, tokens, **base)


def succeeded(ended: Ended) -> None:
    assert ended.code == 0, ended.log


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def digests(run: Path, step: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((step_folder(run, step) / "smolconv_manifest.json").read_text())["files"]
    return found


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def synchronous(tokens, tmp_path_factory):
    run = tmp_path_factory.mktemp("synchronous") / "run"
    succeeded(work(document(tokens, checkpoints={"asynchronous": False}), run, 2))
    return run


@pytest.fixture(scope="module")
def asynchronous(tokens, tmp_path_factory):
    run = tmp_path_factory.mktemp("asynchronous") / "run"
    succeeded(work(document(tokens, checkpoints={"asynchronous": True}), run, 2, before=LATE))
    return run


# --- the same as a save that training waits for -----------------------------------------------------------------------


def test_losses_and_every_byte_of_a_checkpoint_are_those_of_a_save_that_training_waits_for(synchronous, asynchronous):
    assert losses(asynchronous) == losses(synchronous)
    assert saved_steps(asynchronous) == [2, 4, 6]
    for step in (2, 4, 6):
        assert digests(asynchronous, step) == digests(synchronous, step)
        contents = examine(step_folder(asynchronous, step))
        assert problem_in(contents, list(contents.bytes_by_name)) is None


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"),
    [
        pytest.param(0, 1, "float32", marks=pytest.mark.matrix),
        pytest.param(1, 2, "float32", marks=pytest.mark.matrix),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.matrix),
        pytest.param(3, 2, "bfloat16", marks=pytest.mark.matrix),
    ],
)
def test_so_it_is_at_every_stage(stage, ranks, dtype, tokens, tmp_path):
    found = []
    for behind in (False, True):
        run = tmp_path / f"run-{behind}"
        made = document(
            tokens, checkpoints={"asynchronous": behind}, parallelism={"zero_stage": stage}, model={"dtype": dtype}
        )
        succeeded(work(made, run, ranks, before=LATE if behind else ""))
        found.append((losses(run), [digests(run, step) for step in (2, 4, 6)]))
    assert found[0] == found[1]


def test_without_copies_what_is_written_is_of_a_later_step(synchronous, tokens, tmp_path):
    run = tmp_path / "run"
    succeeded(work(document(tokens), run, 2, before=WITHOUT_COPIES))
    assert losses(run) == losses(synchronous)
    changed = [
        there["path"]
        for there, here in zip(digests(synchronous, 2), digests(run, 2))
        if there["digest"] != here["digest"]
    ]
    assert any("optim_states" in path for path in changed) and any("model_states" in path for path in changed)


def test_a_save_is_told_of_with_what_it_took(asynchronous):
    found = events(asynchronous, "saved")
    assert [event["step"] for event in found] == [2, 4, 6]
    for event in found:
        size = sum(
            path.stat().st_size for path in step_folder(asynchronous, event["step"]).rglob("*") if path.is_file()
        )
        assert event["bytes"] == size and event["write_seconds"] >= event["stall_seconds"] > 0


def test_the_estimate_counts_the_copy(asynchronous, tokens):
    spec = spec_from_hf(json.loads((step_folder(asynchronous, 2) / "config.json").read_text()))
    copied = 0
    for path in step_folder(asynchronous, 2).glob("*.pt"):
        if "zero_pp_rank_1" not in path.name:
            with zipfile.ZipFile(path) as archive:
                copied += sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    parts = {part.name: part.bytes for part in memory_parts(Recipe.model_validate(document(tokens)), spec, 2)}
    assert parts["copy for the save under way"] == pytest.approx(copied, rel=0.01)
    waits = Recipe.model_validate(document(tokens, checkpoints={"asynchronous": False}))
    assert "copy for the save under way" not in {part.name for part in memory_parts(waits, spec, 2)}


# --- the copy ---------------------------------------------------------------------------------------------------------


def archive_of(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def state() -> dict[str, Any]:
    flat = torch.arange(64, dtype=torch.float32)
    tagged = torch.ones(3)
    tagged.beside = flat[:2]
    return {
        "views": [flat[8:16], flat[::2], flat.view(8, 8).t()], "parameter": torch.nn.Parameter(flat[1:5]),
        "tagged": tagged, "empty": torch.empty(0, 4), "step": 3, "groups": [{"lr": 0.5, "betas": (0.9, 0.95)}],
        "half": torch.randn(5, dtype=torch.bfloat16), "shape": torch.Size([2, 3]), "dtype": torch.bfloat16,
    }  # fmt: skip


def test_a_copy_is_saved_as_the_original_and_does_not_follow_it():
    content, memory = state(), HostMemory()
    before = archive_of(content)
    copied = memory.snapshot(content)
    content["views"][0].fill_(-1.0)
    content["tagged"].zero_()
    content["half"].zero_()
    content["groups"][0]["lr"] = 0.0
    assert archive_of(copied) == before != archive_of(content)
    assert copied["views"][0].data_ptr() - copied["views"][1].data_ptr() == 8 * 4  # of one storage
    assert copied["tagged"].beside.data_ptr() == copied["views"][1].data_ptr()


def test_the_next_copy_takes_the_same_memory():
    content, memory = state(), HostMemory()
    first = memory.snapshot(content)["views"][0].data_ptr()
    memory.reuse()
    assert memory.snapshot(content)["views"][0].data_ptr() == first
    assert memory.snapshot(content)["views"][0].data_ptr() != first  # control: this one is in use


# --- what goes wrong behind the training ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_disk_that_is_full_behind_the_training_of_one_rank_is_known_to_all_at_a_steps_end(policy, tokens, tmp_path):
    run = tmp_path / "run"
    made = document(tokens, checkpoints={"every_steps": 1, "on_full_disk": policy})
    ended = work(made, run, 2, before=FULL)
    if policy == "stop":
        assert ended.code == 4 and "step 2 could not be saved" in ended.message and "No space left" in ended.message
        assert len(list((run / "logs").glob("failure-rank-*.json"))) == 2
        assert saved_steps(run) == [1] and len(metrics(run)) == 3  # one step was made meanwhile
    else:
        succeeded(ended)
        assert [event["step"] for event in events(run, "save_failed")] == [2]
        assert saved_steps(run) == [1, 3, 4, 5, 6]
        assert "step 2 was still being written" in ended.log  # step 3's save had to wait
    assert not list((run / "checkpoints").glob("*.partial"))


def test_training_that_stops_itself_leaves_the_checkpoint_that_was_being_written(tokens, tmp_path):
    run = tmp_path / "run"
    ended = work(
        document(tokens, checkpoints={"every_steps": 3}), run, 2, before=NOT_FINITE.replace("<= step", "< step")
    )
    assert ended.code == 6, ended.log
    assert latest(run).name == "step-3" and not list((run / "checkpoints").glob("*.partial"))


def test_no_memory_for_a_copy_costs_a_wait_and_no_checkpoint(synchronous, tokens, tmp_path):
    run = tmp_path / "run"
    poor = (
        "from smolconv.layouts.deepspeed.checkpoint_engine import HostMemory\n"
        "def none(*_, **__):\n    raise OSError(12, 'Cannot allocate memory')\n"
        "HostMemory._new = none\n"
    )
    succeeded(work(document(tokens), run, 2, before=poor))
    assert digests(run, 2) == digests(synchronous, 2)
    assert any("no memory for a copy" in event["text"] for event in events(run, "note"))


#: At its n-th call of a name a writer stops for good, and says so; training continues.
STOPS = """
import os, pathlib, shutil, sys, threading, time
from smolconv.layouts.deepspeed import checkpoint_engine
calls, said = [0], pathlib.Path(sys.argv[1]).with_name("stopped")
def stopping(owner, name):
    call = getattr(owner, name)
    def counted(*given, **more):
        if threading.current_thread().name.startswith("save") and os.environ["RANK"] == "{rank}":
            calls[0] += 1
            if calls[0] == {at}:
                if name == "write":
                    call(given[0], memoryview(given[1]).cast("B")[:100])
                said.touch()
                time.sleep(600)
        return call(*given, **more)
    setattr(owner, name, counted)
owners = dict(write=checkpoint_engine._HashedFile, fsync=os, rmtree=shutil)
stopping(owners.get("{name}", pathlib.Path), "{name}")
"""
#: The names, and about how often a rank that is alone calls each in a save.
CALLS = {"write": 200, "fsync": 8, "rename": 3, "replace": 2, "unlink": 3, "rmtree": 1}


def killed(said: Path) -> Callable[[list[int]], None]:
    """SIGKILL for all ranks as soon as a writer has stopped, or the run is over."""

    def kill(pids: list[int]) -> None:
        deadline = time.monotonic() + 120
        while not said.exists() and time.monotonic() < deadline and any(map(_is_alive, pids)):
            time.sleep(0.002)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    return kill


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_at(made: dict[str, Any], run: Path, ranks: int, name: str, at: int, rank: int = 0) -> bool:
    """Whether the kill came while a save was written; what it left is whole, and not older than before."""
    before, said = newest(run), run.with_name("stopped")
    said.unlink(missing_ok=True)
    ended = work(made, run, ranks, before=STOPS.format(name=name, at=at, rank=rank), meanwhile=killed(said))
    if not said.exists():
        succeeded(ended)
        return False
    assert newest(run) >= before
    if (found := latest(run)) is not None:
        contents = examine(found)
        assert problem_in(contents, list(contents.bytes_by_name)) is None
    return True


def newest(run: Path) -> int:
    found = latest(run)
    return 0 if found is None else int(found.name.removeprefix("step-"))


def goes_on_as_if_never_killed(made: dict[str, Any], run: Path, ranks: int, whole: Path) -> None:
    succeeded(work(made, run, ranks))
    assert losses(run) == losses(whole)
    assert [line["step"] for line in metrics(run)] == list(range(1, made["schedule"]["train_steps"] + 1))
    last = made["schedule"]["train_steps"]
    changed = [there["path"] for here, there in zip(digests(run, last), digests(whole, last)) if here != there]
    # A resumed engine pickles the same model in another form; its tensors are compared.
    assert changed in ([], ["mp_rank_00_model_states.pt"])
    ours, theirs = (
        load_torch_archive(step_folder(each, last) / "mp_rank_00_model_states.pt", deepspeed_classes())["module"]
        for each in (run, whole)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_kill_while_a_save_is_written_leaves_the_one_before_and_the_run_goes_on_bit_for_bit(
    synchronous, tokens, tmp_path, record_property
):
    made, run = document(tokens, checkpoints={"keep": 1}), tmp_path / "run"
    left = []
    for name, at, rank in (("write", 30, 1), ("fsync", 2, 0), ("rename", 2, 0), ("rmtree", 2, 0)):
        assert kill_at(made, run, 2, name, at, rank)
        left.append(newest(run))
    record_property("tried", len(left))
    # Not written, not on disk, not named by latest; and step 4 was published when the one before it was to be deleted.
    assert left == [0, 0, 0, 4]
    goes_on_as_if_never_killed(made, run, 2, synchronous)


@pytest.mark.slow
def test_fifty_kills_while_saves_are_written(tokens, tmp_path, record_property):
    made = document(tokens, schedule={"train_steps": 80}, checkpoints={"every_steps": 1, "keep": 2})
    whole, run, chance, came = tmp_path / "whole", tmp_path / "run", random.Random(11), 0
    succeeded(work({**made, "checkpoints": {"every_steps": 80, "asynchronous": False}}, whole))
    while came < 50:
        name = chance.choice(list(CALLS))
        assert kill_at(made, run, 1, name, chance.randrange(1, 2 * CALLS[name] + 1)), came
        came += 1
    record_property("tried", came)
    goes_on_as_if_never_killed(made, run, 1, whole)
