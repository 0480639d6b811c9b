"""Runs from outside: what state each is in, and that a request to stop or to save reaches the start it is meant for."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, command, environment
from forked_worker import work
from test_training_resume import wait_for_step
from training import losses, metrics, recipe, recipe_document, token_folder, train

from smolconv.commands import runs as commands_runs
from smolconv.continual_pretraining.control import asking, status
from smolconv.continual_pretraining.control.asking import save_run, stop_run
from smolconv.continual_pretraining.control.queue import cancel_job, job_states
from smolconv.continual_pretraining.control.status import RunStatus, list_runs, read_status
from smolconv.continual_pretraining.recipe.files import dump_recipe
from smolconv.continual_pretraining.run import control
from smolconv.continual_pretraining.run.checkpoints import latest, saved_steps
from smolconv.continual_pretraining.run.control import RECORD, SAVE, STOP, Control, StartRecord, record_end
from smolconv.continual_pretraining.tokens.tokenizer import find_tokenizer
from smolconv.continual_pretraining.watch.lines import seconds_of, timestamp
from smolconv.errors import BadCheckpoint, MachineError, NotInstalled, SmolconvError, UsageError

SOURCE = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
STEPS = 20
HERE = os.uname().nodename


def quiet(text: str) -> None: ...


def ago(seconds: float) -> str:
    then = datetime.fromtimestamp(time.time() - seconds, timezone.utc)
    return then.strftime("%Y-%m-%dT%H:%M:%S.") + f"{then.microsecond // 1000:03d}Z"


def start(**changes: Any) -> StartRecord:
    values: dict[str, Any] = {
        "attempt": "a1b2", "host": HERE, "pid": 1, "launcher": "local", "job": None, "ranks": 2, "nodes": 1,
        "began": ago(3000), "phase": "training",
    }  # fmt: skip
    return StartRecord(**{**values, **changes})


def ended(code: int, message: str = "", **changes: Any) -> StartRecord:
    return start(phase="ended", ended=ago(10), exit_code=code, message=message, **changes)


def fake_run(
    run: Path, record: StartRecord | None = None, *, step: int | None = 7, saved: int | None = 5, age: float = 20.0
) -> Path:
    """A run's folder as one that has made so many steps leaves it."""
    run.mkdir(parents=True)
    given = recipe(SOURCE, run / "tokens", schedule={"train_steps": 10})
    (run / "recipe.resolved.yaml").write_text(dump_recipe(given))
    (run / "run.lock").touch()
    (run / "logs").mkdir()
    if record is not None:
        record.write(run)
        record.asked(run).mkdir(parents=True)
    if step is not None:
        lines = [
            {"step": n, "time": ago(age + step - n), "loss": 3.0 - n / 100, "tokens_per_second": 1000.0 + n, "seconds": 1.0}
            for n in range(1, step + 1)
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved is not None:
        (run / "checkpoints" / f"step-{saved}").mkdir(parents=True)
        (run / "checkpoints" / "latest").write_text(f"step-{saved}")
    return run


def hold(run: Path) -> int:
    lock = os.open(run / "run.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.fixture
def held():
    """Runs whose lock a process holds, until the test is over."""
    locks: list[int] = []
    yield lambda run: locks.append(hold(run))
    for lock in locks:
        os.close(lock)


# --- a real run -------------------------------------------------------------------------------------------------------


def document(tokens: Path) -> dict[str, Any]:
    return recipe_document(
        SOURCE, tokens, schedule={"train_steps": STEPS}, parallelism={"zero_stage": 2}, checkpoints={"keep": 2}
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def stopped(tokens, tmp_path_factory):
    """A run that was asked to save twice and then to stop while it trained; what was seen of it meanwhile, by name."""
    run, seen = tmp_path_factory.mktemp("stopped") / "run", dict[str, Any]()
    slowly = (
        "import time\n"
        "from smolconv.continual_pretraining.run import control, trainer\n"
        "control._EVERY_SECONDS, real = 0.01, trainer.Trainer._update\n"
        "trainer.Trainer._update = lambda self, data: (time.sleep(0.1), real(self, data))[1]\n"
    )

    def meanwhile(pids: list[int]) -> None:
        wait_for_step(run, 3)
        seen["running"] = read_status(run)
        seen["first"] = save_run(run, wait=True, timeout=60, say=quiet)
        seen["second"] = save_run(run, wait=True, timeout=60, say=quiet)
        seen["saved"] = saved_steps(run)
        seen["stop"] = stop_run(run, wait=True, timeout=60, say=quiet)
        seen["stopped"] = read_status(run)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asking, "_EVERY_SECONDS", 0.01)
        seen["code"] = work(document(tokens), run, 2, before=slowly, meanwhile=meanwhile).code
    seen["steps"] = metrics(run)
    seen["events"] = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return run, seen


def test_a_run_saves_when_it_is_asked_and_trains_on(stopped):
    _, seen = stopped
    first, second = (int(seen[name].checkpoint.name.removeprefix("step-")) for name in ("first", "second"))
    assert 3 < first < second and seen["saved"] == [first, second]
    assert seen["first"].result == seen["second"].result == "saved"
    assert seen["running"].state == "running" and seen["running"].certain


def test_a_run_that_is_asked_to_stop_saves_and_ends_with_75(stopped):
    run, seen = stopped
    last = seen["steps"][-1]["step"]
    assert seen["code"] == 75 and seen["stop"].exit_code == 75 and seen["stop"].result == "stopped"
    assert latest(run) == seen["stop"].checkpoint and latest(run).name == f"step-{last}"
    assert "by smolconv stop" in seen["stop"].message and last < STEPS
    assert seen["stopped"].state == "stopped" and seen["stopped"].step == last
    assert len(saved_steps(run)) == 2, "checkpoints.keep counts what was asked for as all others"


def test_starts_saves_and_ends_are_events_with_their_durations_and_bytes(stopped):
    run, seen = stopped
    events, by_kind = seen["events"], dict[str, list[dict[str, Any]]]()
    for event in events:
        by_kind.setdefault(event["kind"], []).append(event)
    (begun,), (end,) = by_kind["started"], by_kind["stopped"]
    assert (begun["launcher"], begun["host"], begun["ranks"]) == ("local", HERE, 2)
    assert end["reason"] == "request" and end["steps"] == end["step"] == seen["steps"][-1]["step"]
    assert end["seconds"] == pytest.approx(seconds_of(end["time"]) - seconds_of(begun["time"]), abs=2.0)
    assert len(by_kind["saved"]) == 3
    size = sum(path.stat().st_size for path in latest(run).rglob("*") if path.is_file())
    assert by_kind["saved"][-1]["bytes"] == size
    assert all(event["write_seconds"] >= event["stall_seconds"] > 0 for event in by_kind["saved"])
    # A save that ends behind later steps is in the line that follows its end.
    following = [[line["step"] for line in seen["steps"] if line["time"] > event["time"]] for event in by_kind["saved"]]
    assert {line["step"] for line in seen["steps"] if "save_seconds" in line} == {each[0] for each in following if each}
    times = [line["time"] for line in seen["steps"]]
    assert times == sorted(times)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(stopped, tokens, tmp_path):
    run, _ = stopped
    train(document(tokens), tmp_path / "whole", 2)
    train(document(tokens), run, 2)
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == STEPS
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert [kind for kind in kinds if kind not in ("note", "saved")] == ["started", "stopped", "resumed", "finished"]
    assert read_status(run).state == "finished"
    with pytest.raises(UsageError, match=r"nothing trains in .*: the run is finished"):
        stop_run(run, wait=True, timeout=1, say=quiet)


SLOW = """
import time
import smolconv.continual_pretraining.run.{module} as module
real = module.{name}
def slow(*words, **options):
    open({mark!r}, 'w').close()
    time.sleep(20)
    return real(*words, **options)
module.{name} = slow
"""


@pytest.mark.parametrize(
    ("module", "name", "code", "state", "says"),
    [
        ("start", "prepare_start", -signal.SIGTERM, "starting", "Nothing was trained"),
        ("export", "export_run", 75, "exporting", "all steps are saved"),
    ],
)
def test_a_start_and_an_export_are_stopped_at_once(tokens, tmp_path, module, name, code, state, says):
    run, mark, seen = tmp_path / "run", tmp_path / "mark", list[Any]()
    made = recipe_document(SOURCE, tokens, schedule={"train_steps": 2}, export={"formats": ["hf"]})

    def meanwhile(pids: list[int]) -> None:
        until(mark.exists)
        seen.append(read_status(run).state)
        seen.append(stop_run(run, wait=True, timeout=15, say=quiet))

    ended = work(made, run, before=SLOW.format(module=module, name=name, mark=str(mark)), meanwhile=meanwhile)
    assert ended.code == code and seen[0] == state and seen[1].result == "stopped" and says in seen[1].message
    assert read_status(run).state == "stopped"


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_run_is_told_with_what_its_small_files_say(tmp_path, held):
    run = fake_run(tmp_path / "run", start(job=None))
    held(run)
    found = read_status(run)
    assert (found.state, found.certain, found.note) == ("running", True, "")
    assert (found.step, found.train_steps, found.loss, found.tokens_per_second) == (7, 10, 2.93, 1007.0)
    assert 19 < found.step_age < 60 and found.checkpoint.name == "step-5" and found.checkpoint_age < 60


@pytest.mark.parametrize(
    ("record", "is_held", "state", "certain"),
    [
        (start(), True, "running", True),
        (start(phase="starting"), True, "starting", True),
        (start(phase="exporting"), True, "exporting", True),
        (start(), False, "dead", True),  # on this machine: its lock would be seen
        (start(host="node-b"), True, "running", True),
        (start(host="node-b"), False, "running", False),
        (ended(0), False, "finished", True),
        (ended(75), False, "stopped", True),
        (ended(130), False, "stopped", True),
        (ended(6, "TrainingStopped: the loss is nan"), False, "failed", True),
        (ended(0), True, "starting", True),  # another start, which has written nothing down yet
        (None, True, "starting", True),
        (None, False, "stopped", False),
    ],
)
def test_the_state_of_a_run(tmp_path, held, record, is_held, state, certain):
    run = fake_run(tmp_path / "run", record)
    if is_held:
        held(run)
    found = read_status(run)
    assert (found.state, found.certain) == (state, certain)
    assert found.note == ("TrainingStopped: the loss is nan" if state == "failed" else "")


def test_a_run_on_another_machine_that_is_silent_for_long_is_taken_for_dead(tmp_path):
    run = fake_run(tmp_path / "run", start(host="node-b", began=ago(9000)), age=4000.0)
    os.utime(run / "checkpoints" / "latest", (1, 1))
    assert (read_status(run).state, read_status(run).certain) == ("dead", False)


def test_a_run_that_holds_its_lock_but_makes_no_step_is_told_of(tmp_path, held):
    run = fake_run(tmp_path / "run", start(began=ago(9000)), age=1500.0)
    held(run)
    found = read_status(run)
    assert found.state == "running" and re.fullmatch(r"no step for 1,50\d s", found.note)


def test_a_run_that_saves_says_so(tmp_path, held):
    run = fake_run(tmp_path / "run", start())
    (run / "checkpoints" / "step-7.partial").mkdir()
    assert read_status(run).state == "dead", "what a kill left is no save"
    held(run)
    assert read_status(run).state == "saving"


def test_a_new_run_has_neither_steps_nor_a_state_to_guess(tmp_path):
    found = read_status(fake_run(tmp_path / "run", step=None, saved=None))
    assert (found.state, found.certain, found.step, found.checkpoint) == ("new", True, None, None)


def test_who_looks_does_not_keep_a_start_from_its_lock(tmp_path):
    """A start takes the lock for itself; a look holds a shared one for a moment."""
    run = fake_run(tmp_path / "run", start())
    code = (
        "import fcntl, os, sys, time\n"
        f"lock = os.open({str(run / 'run.lock')!r}, os.O_RDONLY)\n"
        "fcntl.flock(lock, fcntl.LOCK_SH); print('held', flush=True); time.sleep(0.05)"
    )
    from smolconv.continual_pretraining.run.folder import held_elsewhere

    looker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert looker.stdout is not None and looker.stdout.readline() == b"held\n"
    lock = os.open(run / "run.lock", os.O_RDWR)
    assert not held_elsewhere(lock)
    os.close(lock)
    looker.wait()


# --- Slurm's queue ----------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs by name in the place of Slurm's: bash."""

    def install(**programs: str) -> Path:
        folder = tmp_path / "slurm-programs"
        folder.mkdir(exist_ok=True)
        for name, text in programs.items():
            (folder / name).write_text(f'#!/bin/bash\necho "$0 $*" >> {folder}/asked\n{text}\n')
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return folder / "asked"

    return install


def submitted(run: Path, *numbers: int) -> Path:
    (run / "slurm").mkdir()
    for number in numbers:
        (run / "slurm" / f"job-{number}.sh").touch()
    return run


@pytest.mark.parametrize(
    ("record", "queue", "state", "certain"),
    [
        (None, "42 PENDING", "pending", True),
        (None, "42 RUNNING", "starting", True),
        (start(launcher="slurm", job=42, host="node-b"), "42 RUNNING", "running", True),
        (start(launcher="slurm", job=42, host="node-b"), "", "dead", True),
        (start(launcher="slurm", job=42, host="node-b"), "42 PENDING", "pending", True),  # its node failed
        (ended(75, launcher="slurm", job=42), "42 PENDING", "pending", True),  # queued again
        (ended(75, launcher="slurm", job=42), "", "stopped", True),
        (ended(75, launcher="slurm", job=41), "42 PENDING", "pending", True),  # a job after it
        (ended(0, launcher="slurm", job=42), "nonsense\n\n1", "finished", True),
    ],
)
def test_the_state_of_a_run_in_slurm(tmp_path, slurm, record, queue, state, certain):
    slurm(squeue=f"echo '{queue}'")
    run = submitted(fake_run(tmp_path / "run", record), 41, 42)
    found = read_status(run)
    assert (found.state, found.certain, found.job) == (state, certain, 42)


def test_jobs_that_have_left_the_queue_are_in_no_state_and_a_queue_that_is_not_there_says_nothing(slurm, monkeypatch):
    slurm(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_states([7]) == {}
    slurm(squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    assert job_states([7]) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert job_states([7]) is None and job_states([]) == {}
    with pytest.raises(NotInstalled, match="cancel job 7 from a login node"):
        cancel_job(7)


def test_a_job_that_nobody_can_ask_for_is_submitted_for_all_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    run = submitted(fake_run(tmp_path / "run", ended(75, launcher="slurm", job=41)), 41, 42)
    assert (read_status(run).state, read_status(run).certain) == ("submitted", False)


def test_a_job_that_waits_is_cancelled_by_stop(tmp_path, slurm):
    asked = slurm(squeue="echo 42 PENDING", scancel="exit 0")
    run = submitted(fake_run(tmp_path / "run"), 42)
    assert stop_run(run, wait=True, timeout=1, say=quiet).result == "cancelled"
    assert asked.read_text().splitlines()[-1].endswith("scancel 42")
    slurm(scancel="echo 'Access/permission denied' >&2; exit 1")
    with pytest.raises(MachineError, match="Access/permission denied"):
        stop_run(run, wait=True, timeout=1, say=quiet)


# --- strangers' folders -----------------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _text(path: Path, text: str) -> None:
    path.write_text(text)


BROKEN: dict[str, Callable[[Path], object]] = {
    "recipe is no YAML": lambda run: _text(run / "recipe.resolved.yaml", "a: [\x1b[2J"),
    "recipe is no recipe": lambda run: _text(run / "recipe.resolved.yaml", "[]"),
    "recipe is a pipe": lambda run: _fifo(run / "recipe.resolved.yaml"),
    "record is no JSON": lambda run: _text(run / RECORD, "{"),
    "record is a list": lambda run: _text(run / RECORD, "[1]"),
    "record is a folder": lambda run: _folder(run / RECORD),
    "record is a pipe": lambda run: _fifo(run / RECORD),
    "record leads elsewhere": lambda run: _text(
        run / RECORD, json.dumps(asdict(start()) | {"attempt": "../../../elsewhere"})
    ),
    "record has another field": lambda run: _text(run / RECORD, json.dumps(asdict(start()) | {"more": 1})),
    "record has no time": lambda run: _text(run / RECORD, json.dumps(asdict(start()) | {"began": "yesterday"})),
    "record is too long ago": lambda run: _text(
        run / RECORD, json.dumps(asdict(start()) | {"began": "0000-01-01T00:00:00.000Z"})
    ),
    "record ended, but how": lambda run: _text(run / RECORD, json.dumps(asdict(start()) | {"phase": "ended"})),
    "record's code is no code": lambda run: _text(run / RECORD, json.dumps(asdict(ended(0)) | {"exit_code": 1e9})),
    "metrics are a pipe": lambda run: _fifo(run / "metrics.jsonl"),
    "lock is a pipe": lambda run: _fifo(run / "run.lock"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_run_is_a_row_that_says_so_and_takes_no_requests(tmp_path, what):
    good, bad = fake_run(tmp_path / "good", ended(0)), fake_run(tmp_path / "bad", start())
    BROKEN[what](bad)
    rows = list_runs(tmp_path).runs
    assert [row.state for row in rows] == ["unreadable", "finished"] and rows[1].run == good
    assert rows[0].note and "\n" not in rows[0].note
    for ask in (stop_run, save_run):
        with pytest.raises(SmolconvError):
            ask(bad, wait=False, timeout=1, say=quiet)
    assert not [path for path in tmp_path.rglob("*") if path.name == STOP or path.name.startswith(SAVE)]


@pytest.mark.parametrize("tail", [b"", b'{"step": 8', b"\xff\xfe\n", b"[" * 5000 + b"\n", b'{"step": "x"}\n'])
def test_the_last_step_is_found_before_a_torn_end(tmp_path, tail):
    run = fake_run(tmp_path / "run", ended(75))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert read_status(run).step == 7


def test_files_without_an_end_are_not_read_whole(tmp_path):
    run = fake_run(tmp_path / "run", ended(75))
    os.truncate(run / "metrics.jsonl", 1 << 36)
    began = time.process_time()
    assert read_status(run).step == 5, "its checkpoint's"
    assert time.process_time() - began < 30, "64 GiB of nulls take minutes"


def test_a_checkpoint_that_is_not_there_is_a_note(tmp_path):
    run = fake_run(tmp_path / "run", ended(75))
    (run / "checkpoints" / "latest").write_text("step-9")
    found = read_status(run)
    assert found.state == "stopped" and "names step-9, which is missing" in found.note


def test_runs_are_found_a_few_levels_down_and_links_are_not_followed(tmp_path, monkeypatch):
    for place in ("a", "b/c/d/e", "b/c/d/e2/too-deep", ".hidden/run", "a/checkpoints/inside"):
        fake_run(tmp_path / place, ended(0))
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "recipe.resolved.yaml").mkdir()  # a folder of that name makes no run
    found = [str(row.run.relative_to(tmp_path)) for row in list_runs(tmp_path).runs]
    assert found == ["a", "b/c/d/e"]
    assert [row.run for row in list_runs(tmp_path / "a").runs] == [tmp_path / "a"]
    monkeypatch.setattr(status, "MOST_FOLDERS", 3)
    assert "only the first 3 folders" in list_runs(tmp_path).warnings[0]


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def signals(monkeypatch):
    """What ``Control`` sends to its own process, which is this one."""
    sent: list[int] = []
    real = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number) if number else real(pid, number))
    monkeypatch.setattr(control, "_EVERY_SECONDS", 0.01)
    return sent


def begin(run: Path, **changes: Any) -> Control:
    return Control(run, start(**{"began": timestamp(), "phase": "starting", "pid": os.getpid(), **changes}))


def test_a_request_reaches_the_start_that_it_was_made_to_and_no_later_one(tmp_path, held, signals):
    run = fake_run(tmp_path / "run")
    held(run)
    first = begin(run, attempt="first")
    first.enter("training")
    assert stop_run(run, wait=False, timeout=1, say=quiet).result == "asked"
    until(lambda: signals == [signal.SIGTERM])
    assert first.stop_asked and first.record.ended is None
    first.close()
    record_end(run, 75, "StoppedByRequest: stopped")
    for attempt in ("second", "first"):  # several nodes' torchruns use a name again
        later = begin(run, attempt=attempt)
        later.enter("training")
        time.sleep(0.1)
        assert not later.stop_asked and signals == [signal.SIGTERM]
        later.close()
        record_end(run, 0, "")


def test_a_save_is_answered_with_its_step_and_its_event(tmp_path, held, signals, monkeypatch):
    monkeypatch.setattr(asking, "_EVERY_SECONDS", 0.01)
    run = fake_run(tmp_path / "run")
    held(run)
    running = begin(run)
    running.enter("training")
    events = iter([(8, "saved", "saved it"), (9, "save_failed", "no space left")])

    def answering(self: Any, ready: Any, timeout: float) -> Any:
        step, kind, text = next(events)
        until(lambda: running.take_saves() != [])
        running.answer(running.take_saves(), step)
        assert running.take_saves() == [] and ready() is None, "taken, but not saved yet"
        with open(run / "events.jsonl", "a") as file:
            for line in ({"step": step, "kind": kind, "text": text}, {"step": step + 1, "kind": "note"}):
                file.write(json.dumps(line) + "\n")
        return ready()

    monkeypatch.setattr(asking._Request, "wait", answering)
    assert save_run(run, wait=True, timeout=5, say=quiet).checkpoint == run / "checkpoints" / "step-8"
    with pytest.raises(MachineError, match="could not save step 9: no space left"):
        save_run(run, wait=True, timeout=5, say=quiet)
    assert os.listdir(running.record.asked(run)) == [], "who asked takes the request back"
    running.close()
    record_end(run, 0, "")


def test_who_waits_is_told_of_a_run_that_dies_hangs_or_is_started_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "_EVERY_SECONDS", 0.01)
    run = fake_run(tmp_path / "run", start())
    lock = hold(run)
    with pytest.raises(MachineError, match=r"within 0\.1 s"):
        stop_run(run, wait=True, timeout=0.1, say=quiet)
    request = asking._Request(run, read_status(run), STOP)
    ended(6, "TrainingStopped: the loss is nan").write(run)
    with pytest.raises(MachineError, match="exit code 6: TrainingStopped: the loss is nan"):
        os.close(lock)
        request.told(request.wait(request.ended, 5), "stop")
    start(attempt="other").write(run)
    request._end = None
    with pytest.raises(MachineError, match="was started again"):
        request.wait(request.ended, 5)
    start().write(run)
    with pytest.raises(MachineError, match="died before it could respond"):
        request.wait(request.ended, 5)


def test_nothing_is_asked_of_a_run_that_does_not_train(tmp_path, held):
    run = fake_run(tmp_path / "run", ended(75))
    for ask in (stop_run, save_run):
        with pytest.raises(UsageError, match=r"nothing trains in .*: the run is stopped"):
            ask(run, wait=True, timeout=1, say=quiet)
    held(run)
    with pytest.raises(UsageError, match="only just started"):
        stop_run(run, wait=True, timeout=1, say=quiet)
    with pytest.raises(BadCheckpoint, match="is not a run's folder"):
        stop_run(tmp_path, wait=True, timeout=1, say=quiet)


def test_a_request_is_no_way_to_write_through_a_link(tmp_path, held):
    run, target = fake_run(tmp_path / "run", start()), tmp_path / "target"
    held(run)
    (start().asked(run) / STOP).symlink_to(target)
    stop_run(run, wait=False, timeout=1, say=quiet)
    assert not target.exists()


def test_a_record_survives_a_round_trip_and_a_disk_without_room_ends_no_run(tmp_path, signals, monkeypatch):
    run = fake_run(tmp_path / "run")
    running = begin(run, job=7)
    assert StartRecord.read(run) == running.record

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StartRecord, "write", full)
    running.enter("training")
    running.close()
    record_end(run, 0, "")
    assert replace(running.record, phase="starting") == StartRecord.read(run)
    monkeypatch.undo()
    begin(run, pid=os.getpid() + 1).close()
    record_end(run, 0, "")
    assert StartRecord.read(run).ended is None, "another process's start"


# --- the commands -----------------------------------------------------------------------------------------------------


def without_torch(*words: object, cwd: Path) -> str:
    """The stdout of ``smolconv`` in a process of its own, which has not imported torch when it ends."""
    last = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = subprocess.run(
        command(*words, before=last), capture_output=True, text=True, check=False, env=environment(), cwd=cwd
    )
    assert (done.returncode, done.stderr) == (0, "False\n")
    return done.stdout


def test_the_commands_answer_people_and_scripts_without_torch(tmp_path, held, cli):
    run = fake_run(tmp_path / "my \x1b[2J[red]run", start())
    fake_run(tmp_path / "other", ended(6, "TrainingStopped: the loss is nan\nmore"))
    held(run)
    told = without_torch("runs", cwd=tmp_path)
    rows = told.splitlines()
    assert rows[1].split()[-2:] == ["local,", HERE] and "\x1b" not in told
    assert "running  7/10  2.9300     1,007" in rows[1] and "step-5, " in rows[1] and "[red]run" in rows[1]
    assert re.search(r"^other .*failed .*TrainingStopped: the loss is nan$", rows[2])
    document = json.loads(cli("runs", tmp_path, "--json").stdout)
    assert document["schema"] == 1 and [each["state"] for each in document["runs"]] == ["running", "failed"]
    found = document["runs"][1]
    assert (found["exit_code"], found["launcher"], found["train_steps"], found["job"]) == (6, "local", 10, None)
    assert json.loads(without_torch("stop", run, "--no-wait", "--json", cwd=tmp_path))["result"] == "asked"
    refused = cli("save", tmp_path / "other", "--json")
    assert refused.code == 2 and json.loads(refused.stdout)["error"]["class"] == "UsageError"
    assert cli("runs", tmp_path / "nowhere").code == 3 and cli("stop", run, "--timeout", "nan").code == 2


def test_ages_are_told_in_units_of_people():
    told = [commands_runs._age(seconds) for seconds in (0.4, 59, 61, 3599, 5400, 86400 * 2.5, None)]
    assert told == ["0 s", "59 s", "1 min", "60 min", "1.5 h", "2.5 d", "?"]
    assert commands_runs._cells(RunStatus(run=Path("r"), state="dead", certain=False, job=7))[0] == "dead?"


# --- a run's folder as a source ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brought(stopped, tmp_path_factory) -> Path:
    """The run with a tokenizer in its steps, as one whose source had one."""
    run = Path(shutil.copytree(stopped[0], tmp_path_factory.mktemp("brought") / "run"))
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, 256)}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "model": model,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    }  # fmt: skip
    (latest(run) / "tokenizer.json").write_text(json.dumps(document))
    (latest(run) / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return run


def test_a_runs_folder_is_a_source_wherever_a_checkpoint_is(brought, tokens, tmp_path, cli):
    step = latest(brought)
    described = json.loads(cli("inspect", brought, "--json").stdout)
    assert described["progress"]["step"] == int(step.name.removeprefix("step-")) and described["has_optimizer"]
    assert cli("convert", brought, tmp_path / "hf", "--to", "hf").code == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (step / "tokenizer.json").read_bytes()
    assert cli("diff", brought, tmp_path / "hf").code == 0
    assert json.loads(cli("verify", brought, step, "--tensors-only", "--json").stdout)["passed"]
    bare = cli("convert", SOURCE, tmp_path / "bare", "--to", "hf", "--no-optimizer", "--tokenizer", brought)
    assert bare.code == 0 and (tmp_path / "bare" / "tokenizer.json").is_file()
    assert find_tokenizer(str(brought)) == step / "tokenizer.json"
    begun = recipe_document(
        brought, tokens, schedule={"train_steps": described["progress"]["step"] + 2}, start=dict.fromkeys(("optimizer", "learning_rate", "data"), True)
    )  # fmt: skip
    train(begun, tmp_path / "branch")
    assert metrics(tmp_path / "branch")[0]["step"] == described["progress"]["step"] + 1


def test_a_run_whose_latest_leads_elsewhere_gives_no_tokenizer(brought, tmp_path):
    run = Path(shutil.copytree(brought, tmp_path / "run"))
    (run / "checkpoints" / "latest").write_text("../../brought")
    with pytest.raises(BadCheckpoint, match="expected the name of a folder next to it"):
        find_tokenizer(str(run))
