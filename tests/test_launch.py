"""Launchers, with real processes and real torchrun; tests/fake_worker.py stands in for training.

The last part is about the real worker, where launchers rely on it.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import forked_worker
import pytest
from conftest import FIXTURES, files_below
from training import recipe_document, token_folder

from smolconv.continual_pretraining.launchers import supervisor
from smolconv.continual_pretraining.launchers.deepspeed import read_hostfile
from smolconv.continual_pretraining.launchers.ends import end_of, ends_folder, failure_file, report_left
from smolconv.continual_pretraining.launchers.launch import launch, launch_command, placement
from smolconv.continual_pretraining.launchers.launcher import SUPERVISOR, Launcher
from smolconv.continual_pretraining.launchers.output import drawing_environment, plain
from smolconv.continual_pretraining.launchers.registry import NAMES, find_launcher
from smolconv.continual_pretraining.recipe.files import dump_recipe
from smolconv.continual_pretraining.recipe.schema import Launch, Recipe
from smolconv.continual_pretraining.run import worker
from smolconv.continual_pretraining.run.folder import refuse_trained, remove_start
from smolconv.errors import OutputLocked, UsageError
from smolconv.processes import BOOTSTRAP

TESTS = Path(__file__).parent
#: Runs a recipe with the fake worker, as continue-train does with the real one.
LAUNCHER = """
import sys
from pathlib import Path
import smolconv.continual_pretraining.launchers.watching
from smolconv.continual_pretraining.launchers.launch import launch
from smolconv.continual_pretraining.recipe.files import load_recipe
smolconv.continual_pretraining.launchers.watching.GRACE_SECONDS = 2.0
run = Path(sys.argv[1])
sys.exit(launch(load_recipe(run / "recipe.resolved.yaml"), run, resume=sys.argv[2], worker="fake_worker"))
"""


def recipe(*, launch: dict[str, Any] | None = None, threads: int | None = 1, batch: int = 4, **fake: Any) -> Recipe:
    """Four micro-batches a step; ``fake`` is what the fake worker does."""
    where = {"environment": {"FAKE": json.dumps(fake)}, "ranks_per_node": 2, **(launch or {})}
    return Recipe.model_validate(
        {
            "name": "test run",
            "model": {"source": "none"},
            "data": {"sequence_length": 8, "eos_token_id": 0, "stages": [{"name": "a", "sources": [{"path": "none"}]}]},
            "schedule": {"train_steps": 3, "peak_lr": 1e-3},
            "parallelism": {"global_batch_sequences": batch, "threads": threads},
            "launch": where,
        }
    )


_started: list[Launched] = []


@pytest.fixture(autouse=True)
def _nothing_stays():
    """A test that fails leaves no process behind."""
    yield
    while _started:
        launched = _started.pop()
        left = [int(path.read_text()) for path in launched.run.glob("begun-*") if path.read_text()]
        for pid in [launched.process.pid, *filter(alive, left)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launched.process.wait()
        for pipe in (launched.process.stdout, launched.process.stderr):
            if pipe is not None:
                pipe.close()


class Launched:
    """A launcher's process, from its start until it is waited for."""

    def __init__(self, given: Recipe, run: Path, *, resume: str = "auto", stderr: int = subprocess.PIPE) -> None:
        self.run = run
        _started.append(self)
        (run / "logs").mkdir(parents=True, exist_ok=True)
        for begun in run.glob("begun-*"):
            begun.unlink()
        (run / "recipe.resolved.yaml").write_text(dump_recipe(given))
        self.world_size = placement(given).world_size
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(run), resume], stdout=subprocess.PIPE, stderr=stderr,
            env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}, start_new_session=True, cwd=run,
        )  # fmt: skip

    def begun(self) -> list[int]:
        """Wait until all ranks train; their process ids."""
        files = [self.run / f"begun-{rank}" for rank in range(self.world_size)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files) or self.process.poll() is not None)
        assert self.process.poll() is None, self.end()
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str]:
        """Its exit code and stderr."""
        _, stderr = self.process.communicate(timeout=180)
        return self.process.returncode, (stderr or b"").decode()

    def log(self, rank: int) -> str:
        return (self.run / "logs" / f"rank-{rank:05d}.log").read_text()


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """A zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- this machine -----------------------------------------------------------------------------------------------------


def test_ranks_run_to_their_end_and_rank_0_is_shown(tmp_path):
    launched = Launched(recipe(), tmp_path / "a run")
    code, stderr = launched.end()
    assert code == 0
    assert "rank 0 step 3" in stderr and "rank 1 step" not in stderr
    assert stderr == launched.log(0)
    for rank in (0, 1):
        assert f"rank {rank} of 2 begins" in launched.log(rank)
        assert f"'LOCAL_RANK': '{rank}', 'LOCAL_WORLD_SIZE': '2'" in launched.log(rank)
        assert "'OMP_NUM_THREADS': '1'" in launched.log(rank)


def test_cores_are_divided_among_ranks_unless_the_recipe_says_otherwise(tmp_path):
    launched = Launched(recipe(threads=None), tmp_path / "run")
    assert launched.end()[0] == 0
    assert f"'OMP_NUM_THREADS': '{max(1, len(os.sched_getaffinity(0)) // 2)}'" in launched.log(1)


def test_ranks_meet_by_gloo(tmp_path):
    assert Launched(recipe(gloo=True), tmp_path / "run").end()[0] == 0


@pytest.mark.parametrize(
    ("do", "code", "says"),
    [
        ("raise", 70, "ended with exit code 1"),
        ("kill", 4, "killed by SIGKILL"),
        ("fail", 6, "TrainingStopped: the loss is nan"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_its_code_and_last_lines(tmp_path, do, code, says):
    launched = Launched(recipe(rank=1, do=do, steps=10_000), tmp_path / "run")
    found, stderr = launched.end()
    assert found == code
    assert f"rank 1 of 2 failed first: {says}" in stderr or f"rank 1 of 2 failed first: MachineError: {says}" in stderr
    assert f"  rank 1 is about to {do}" in stderr
    assert stderr.count(says) == 1 and launched.log(1).count(says) == 1
    assert not (launched.run / "start").exists()
    assert ("RuntimeError: of my own accord" in stderr) == (do == "raise")


def test_a_refusal_by_all_ranks_is_printed_once_and_is_in_each_log(tmp_path):
    launched = Launched(recipe(files=True, rank="all", do="fail", step=1), tmp_path / "run")
    code, stderr = launched.end()
    assert code == 6 and stderr.count("the loss is nan") == 1, stderr
    assert [launched.log(rank).count("TrainingStopped: the loss is nan") for rank in (0, 1)] == [1, 1]
    assert not (launched.run / "start").exists()


@pytest.mark.parametrize("launcher", ["local", "torchrun", "deepspeed"])
def test_a_second_start_is_refused_before_it_touches_what_the_first_writes(tmp_path, launcher):
    run = tmp_path / "run"
    for path in (run / "logs" / "rank-00000.log", failure_file(run, 0), run / "start" / "shard"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the first start\n")
    held = worker.lock_run(run)
    before = files_below(run)
    with pytest.raises(OutputLocked, match="another process trains"):
        launch(recipe(launch={"launcher": launcher}), run, worker="fake_worker")
    assert files_below(run) == before
    os.close(held)


def test_a_second_job_that_slurm_starts_says_once_that_it_is_refused(tmp_path, monkeypatch, capfd):
    """Its ranks are started on nodes, by nobody who could look before; a job that is queued again waits instead."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe()))
    (run / "logs" / "rank-00001.log").write_text("of the first start\n")
    held = worker.lock_run(run)
    monkeypatch.setattr(supervisor, "die_with", lambda parent: None)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, mask: set())  # this process goes on
    monkeypatch.setattr(sys, "argv", ["supervisor", str(run), "--attempt", "second"])
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert supervisor.main() == 4
    assert (run / "logs" / "rank-00001.log").read_text() == "of the first start\n"
    assert report_left(run, "second", 2, 1) == 4
    said = capfd.readouterr().err
    assert said.count("another process trains") == 1 and "Its log" not in said
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_trained(run)
    os.close(held)


def test_what_a_start_converted_stays_while_another_start_trains(tmp_path):
    (tmp_path / "start" / "deepspeed").mkdir(parents=True)
    held = worker.lock_run(tmp_path)
    remove_start(tmp_path)
    assert (tmp_path / "start" / "deepspeed").is_dir()
    os.close(held)
    remove_start(tmp_path)
    assert files_below(tmp_path).keys() == {"run.lock"} and not (tmp_path / "start").exists()


def test_the_first_failure_is_named_when_its_peers_fail_by_it(tmp_path):
    launched = Launched(recipe(rank=1, do="kill", steps=10_000, gloo=True, nap=0.01), tmp_path / "run")
    code, stderr = launched.end()
    assert code == 4 and "rank 1 of 2 failed first: MachineError: killed by SIGKILL" in stderr


def test_a_rank_that_cannot_end_is_killed_after_the_others_failure(tmp_path):
    launched = Launched(recipe(rank=1, do="hang", steps=10_000), tmp_path / "run")
    pids = launched.begun()
    wait_until(lambda: "about to hang" in launched.log(1))
    os.kill(pids[0], signal.SIGKILL)
    code, stderr = launched.end()
    assert code == 4 and "rank 0 of 2 failed first" in stderr
    assert not any(alive(pid) for pid in pids)


def test_a_failure_file_of_another_start_at_the_same_time_is_not_believed(tmp_path):
    launched = Launched(recipe(rank=1, do="hang", steps=10_000), tmp_path / "run")
    pids = launched.begun()
    of_other = '{"rank": 1, "exit_code": 6, "error": "Other", "message": "another start", "attempt": "another"}'
    (launched.run / "logs" / "failure-rank-00001.json").write_text(of_other)
    os.kill(pids[1], signal.SIGKILL)
    code, stderr = launched.end()
    assert code == 4 and "rank 1 of 2 failed first: MachineError: killed by SIGKILL" in stderr


def test_a_failure_file_of_an_earlier_start_is_not_believed(tmp_path):
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "failure-rank-00001.json").write_text('{"rank": 1, "exit_code": 6, "error": "Old", "message": "old"}')
    (logs / "rank-00001.log").write_text("a line of an earlier start\n")
    launched = Launched(recipe(rank=1, do="kill"), tmp_path / "run")
    code, stderr = launched.end()
    assert code == 4
    assert "old" not in stderr and "a line of an earlier start" not in stderr
    assert launched.log(1).startswith("a line of an earlier start\n"), "logs are kept"


@pytest.fixture
def hangups_end() -> Iterator[None]:
    """Also where the tests themselves were started by nohup, which a run would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_end")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, signum):
    run = tmp_path / "run"
    launched = Launched(recipe(steps=10_000), run)
    launched.begun()
    launched.process.send_signal(signum)
    code, stderr = launched.end()
    assert code == 75, stderr
    assert "stopped after a save" in stderr and stderr.count("stop") == 2  # that it is told to, and that it has
    assert not (run / "start").exists()
    seen = "SIGUSR1" if signum == signal.SIGUSR1 else "SIGTERM"
    for rank in (0, 1):
        assert f"after ['{seen}']" in launched.log(rank), "told once"
    saved = int((run / "checkpoints" / "saved").read_text())
    again = Launched(recipe(steps=saved + 2), run)
    assert again.end()[0] == 0
    assert f"begins after step {saved}" in again.log(1)


def test_nohup_keeps_a_run_going_when_its_terminal_is_closed(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launched = Launched(recipe(steps=20), tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    launched.begun()
    launched.process.send_signal(signal.SIGHUP)
    assert launched.end()[0] == 0


def test_a_second_ctrl_c_kills_ranks_that_do_not_stop(tmp_path):
    launched = Launched(recipe(rank=1, do="hang", steps=10_000), tmp_path / "run")
    pids = launched.begun()
    wait_until(lambda: "about to hang" in launched.log(1))
    launched.process.send_signal(signal.SIGINT)
    wait_until(lambda: not alive(pids[0]))
    launched.process.send_signal(signal.SIGINT)
    code, stderr = launched.end()
    assert (
        code == 1 and "Interrupted: the ranks were killed by a second Ctrl-C" in stderr
    )  # the console script makes it 130
    assert not any(alive(pid) for pid in pids)


def test_a_signal_before_a_rank_listens_is_an_interruption_and_not_a_failed_machine(tmp_path):
    given = recipe(launch={"environment": {"FAKE": "{}", "PYTHONSTARTUP": ""}})
    run = tmp_path / "run"
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'fake_worker' in ' '.join(sys.orig_argv) and 'RANK' in os.environ:\n"
        "    open(sys.orig_argv[3] + '/slow-' + os.environ['RANK'], 'w').close(); time.sleep(60)\n"
    )
    launched = Launched(given.model_copy(update={"launch": given.launch.model_copy(update={
        "environment": {"FAKE": "{}", "PYTHONPATH": f"{slow}:{TESTS}:{TESTS.parent}"}})}), run)  # fmt: skip
    wait_until(lambda: len(list(run.glob("slow-*"))) == 2)
    launched.process.send_signal(signal.SIGTERM)
    code, stderr = launched.end()
    assert code == 130 and stderr.splitlines() == [
        "SIGTERM: the ranks stop, after a save if training has begun.",
        "Interrupted: stopped by a signal during its start. Nothing was trained; checkpoints are unchanged.",
    ]


def starts_slowly(tmp_path: Path, then: str) -> dict[str, str]:
    """An environment in which ranks run ``then`` instead of what they are; ``slow-N`` in the run says that they are."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "if 'fake_worker' in ' '.join(sys.orig_argv[:3]) and 'RANK' in os.environ:\n"
        "    rank = int(os.environ['RANK'])\n"
        f"{textwrap.indent(then, '    ')}\n"
        "    open(sys.orig_argv[3] + f'/slow-{rank}', 'w').close(); time.sleep(60)\n"
    )
    return {"FAKE": "{}", "PYTHONPATH": f"{slow}:{TESTS}:{TESTS.parent}"}


def test_an_interrupted_start_is_not_taken_for_the_failure_that_it_causes(tmp_path):
    """A rank whose peer has been ended by the signal fails in a collective, a moment before the signal ends it too."""
    run = tmp_path / "run"
    then = "if rank == 1: signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), os._exit(70)))"
    launched = Launched(recipe(launch={"environment": starts_slowly(tmp_path, then)}), run)
    wait_until(lambda: len(list(run.glob("slow-*"))) == 2)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end()[0] == 130


def test_usr1_that_reaches_a_starting_rank_before_its_launcher_is_an_interruption(tmp_path):
    """Slurm sends it to every process of a task, in any order."""
    run = tmp_path / "run"
    then = "(open(sys.orig_argv[3] + f'/pid-{rank}', 'w').write(str(os.getpid())))"
    launched = Launched(recipe(launch={"environment": starts_slowly(tmp_path, then)}), run)
    wait_until(lambda: len(list(run.glob("slow-*"))) == 2)
    os.kill(int((run / "pid-1").read_text()), signal.SIGUSR1)
    code, stderr = launched.end()
    assert code == 130, stderr


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path):
    launched = Launched(recipe(steps=10_000), tmp_path / "run")
    pids = launched.begun()
    assert all(map(alive, pids))
    launched.process.kill()
    wait_until(lambda: not any(map(alive, pids)), seconds=5)


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_shows_rank_0_in_colours_which_no_log_has(tmp_path, variables, coloured):
    (tmp_path / "draws.py").write_text(
        "import os\n"
        "from rich.console import Console\n"
        "from rich.progress import Progress\n"
        "console = Console(stderr=True, highlight=False)\n"
        "console.print(f'[red]rank {os.environ[\"RANK\"]}[/] of {console.width}')\n"
        "if os.environ.get('TTY_INTERACTIVE') == '1':\n"
        "    with Progress(console=Console(stderr=True, force_terminal=True)) as progress:\n"
        "        for step in progress.track(range(3)):\n"
        "            progress.console.print(f'step {step}')\n"
        "            progress.refresh()\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 97, 0, 0))
    given = recipe(launch={"environment": {"PYTHONPATH": str(tmp_path)}})
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(dump_recipe(given))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER.replace("fake_worker", "draws"), str(run), "auto"], stderr=theirs, check=False,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "TERM": "xterm-256color", **variables},
    )  # fmt: skip
    assert done.returncode == 0
    shown = os.read(ours, 1 << 16)
    assert (b"\x1b[31mrank 0\x1b[0m of 97" in shown) == coloured and b"rank 1" not in shown
    assert b"\x1b[2K" in shown and "━".encode() in shown, "a live line"
    lines = (run / "logs" / "rank-00000.log").read_text().splitlines()
    assert lines[:4] == ["rank 0 of 97", "step 0", "step 1", "step 2"]
    assert len(lines) == 5 and "100%" in lines[4], "as it stood at the end, once"
    assert (run / "logs" / "rank-00001.log").read_text() == "rank 1 of 80\n"
    os.close(ours)
    os.close(theirs)


def test_a_log_has_no_colours_whatever_the_environment_asks_for(tmp_path):
    asks = "import os, sys\nprint('\\x1b[1mbold\\x1b[0m' if 'FORCE_COLOR' in os.environ else 'plain', 1 / 0)\n"
    (tmp_path / "asks.py").write_text(asks)
    variables = {"PYTHONPATH": f"{tmp_path}:{TESTS.parent}", "FORCE_COLOR": "1"}
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe(launch={"environment": variables})))
    subprocess.run(
        [sys.executable, "-c", LAUNCHER.replace("fake_worker", "asks"), str(run), "auto"], check=False,
        env={**os.environ, **variables}, capture_output=True,
    )  # fmt: skip
    said = b""
    for rank in (0, 1):
        log = (run / "logs" / f"rank-{rank:05d}.log").read_bytes()
        assert b"\x1b" not in log
        said += log
    assert b"ZeroDivisionError" in said  # of the rank that failed first; the other may have been ended before
    for shown in (False, True):  # stderr is no terminal here
        asked = {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "A": "b"}
        assert drawing_environment(asked, shown=shown) == {"A": "b"}


@pytest.mark.parametrize(
    ("line", "left"),
    [
        (b"a\x1b[1;31mb\x1b[0mc", b"abc"),
        (b"\x1b]8;;https://a.b\x1b\\link\x1b]8;;\x07 \x1b[?25l\x1b(", b"link "),
        (b"cut \x1b[3", b"cut [3"),
        (b" 10%\r 20%\r\x1b[2Kdone\r", b"done"),
        (b"dos\r", b"dos"),
        ("naïve —".encode(), "naïve —".encode()),
    ],
)
def test_a_line_of_a_log_is_what_stays_on_a_terminal(line, left):
    assert plain(line) == left


def test_a_run_goes_on_when_nobody_reads_its_terminal_any_more(tmp_path):
    reading, writing = os.pipe()
    launched = Launched(recipe(steps=6), tmp_path / "run", stderr=writing)
    os.close(writing)
    os.close(reading)
    assert launched.end()[0] == 0
    assert "rank 0 step 6" in launched.log(0)


# --- torchrun and DeepSpeed -------------------------------------------------------------------------------------------


def test_torchrun_on_one_node_shows_rank_0_and_keeps_logs(tmp_path):
    launched = Launched(recipe(launch={"launcher": "torchrun"}, gloo=True), tmp_path / "run")
    code, stderr = launched.end()
    assert code == 0 and "rank 0 step 3" in stderr and "rank 1 step" not in stderr
    assert "'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '2'" in launched.log(1)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_torchrun_and_deepspeed_end_with_the_failing_ranks_own_code(tmp_path, launcher):
    given = recipe(launch={"launcher": launcher}, rank=1, do="fail", steps=10_000, files=True, nap=0.01)
    launched = Launched(given, tmp_path / "run")
    code, stderr = launched.end()
    assert code == 6, stderr
    assert "rank 1 of 2 failed first: TrainingStopped: the loss is nan" in stderr
    assert stderr.count("the loss is nan") == 1 and "ChildFailedError" not in stderr
    assert "  rank 1 is about to fail" in stderr


def test_a_rank_that_failed_says_so_although_it_is_told_to_stop_in_that_moment(tmp_path):
    """By torchrun, as soon as the rank of another node or the one that leads this node sees that it has failed."""
    (tmp_path / "recipe.resolved.yaml").write_text(dump_recipe(recipe(rank=1, do="fail", step=1)))
    told_to_stop = """
import os, signal
from smolconv.continual_pretraining.launchers import supervisor
leave_end = supervisor.leave_end
def left(folder, end):
    first = leave_end(folder, end)
    os.kill(os.getpid(), signal.SIGTERM)
    return first
supervisor.leave_end = left
supervisor._run_and_exit()
"""
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", told_to_stop, str(tmp_path), "--worker", "fake_worker", "--attempt", "first"],
        env={**os.environ, **ranks, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 6 and "  rank 1 is about to fail" in ended.stderr, ended.stderr


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_torchrun_and_deepspeed_pass_a_signal_on_and_the_run_ends_with_75(tmp_path, launcher):
    launched = Launched(recipe(launch={"launcher": launcher}, steps=10_000, files=True), tmp_path / "run")
    launched.begun()
    launched.process.send_signal(signal.SIGUSR1)
    code, stderr = launched.end()
    assert code == 75, stderr
    assert "Traceback" not in stderr and stderr.count("stopped after a save") == 1
    assert all("saved step" in launched.log(rank) for rank in (0, 1))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_ranks_of_torchrun_and_deepspeed_do_not_outlive_a_launcher_that_is_killed(tmp_path, launcher):
    launched = Launched(recipe(launch={"launcher": launcher}, steps=10_000), tmp_path / "run")
    pids = launched.begun()
    launched.process.kill()
    wait_until(lambda: not any(map(alive, pids)), seconds=20)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_second_start_that_fails_does_not_end_the_first_ones_save(tmp_path, launcher):
    run = tmp_path / "run"
    first = Launched(recipe(launch={"launcher": launcher}, steps=10_000, nap=3.0), run)
    pids = first.begun()
    second = Launched(recipe(launch={"launcher": launcher}, rank=0, do="fail", step=1), run)
    assert second.end()[0] == 6
    for pid in pids:
        os.kill(parent(pid), signal.SIGUSR1)  # as Slurm does: to each rank's supervisor
    code, stderr = first.end()
    assert code == 75, stderr
    for rank in (0, 1):
        assert "after ['SIGUSR1']" in first.log(rank), "a SIGTERM would come before the end by SIGKILL"


def test_two_starts_over_two_nodes_are_told_apart(tmp_path):
    """Each node has a launcher of its own, which learns from its ranks which start they belong to."""
    first = two_nodes(tmp_path, steps=10_000, nap=3.0, files=True)
    for node in first:
        node.begun()
    second = two_nodes(tmp_path, rank=0, do="fail", step=1, files=True)
    assert all(node.end()[0] not in (0, 75) for node in second)
    for node in first:
        node.process.send_signal(signal.SIGTERM)
    ends = [node.end() for node in first]
    assert [code for code, _ in ends] == [75, 75], ends
    assert all("after ['SIGTERM']" in first[0].log(rank) for rank in range(4))


def test_deepspeed_starts_the_ranks_of_this_machine(tmp_path):
    launched = Launched(recipe(launch={"launcher": "deepspeed"}, gloo=True), tmp_path / "run")
    code, stderr = launched.end()
    assert code == 0 and "rank 0 step 3" in stderr and "rank 1 step" not in stderr
    assert "'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '2'" in launched.log(1)


def two_nodes(tmp_path: Path, **fake: Any) -> list[Launched]:
    """Two torchrun nodes of two ranks on loopback, with the run's folder between them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = {"launcher": "torchrun", "nodes": 2, "rendezvous": f"127.0.0.1:{port}"}
    return [Launched(recipe(launch=launch, **fake), tmp_path / "run") for _ in range(2)]


def test_two_torchrun_nodes_on_loopback_train_together(tmp_path):
    nodes = two_nodes(tmp_path, gloo=True)
    ends = [node.end() for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum("rank 0 step 3" in stderr for _, stderr in ends) == 1
    logs = [nodes[0].log(rank) for rank in range(4)]
    assert all(f"rank {rank} of 4 begins" in log for rank, log in enumerate(logs))
    assert sorted(log.count("'LOCAL_RANK': '0'") for log in logs) == [0, 0, 1, 1]


def test_a_rank_that_dies_on_one_torchrun_node_ends_both(tmp_path):
    nodes = two_nodes(tmp_path, rank=3, do="fail", steps=10_000, nap=0.01, files=True)
    ends = [node.end() for node in nodes]
    assert 6 in [code for code, _ in ends] and 0 not in [code for code, _ in ends], ends
    assert any("rank 3 of 4 failed first: TrainingStopped: the loss is nan" in stderr for _, stderr in ends)


def test_a_rank_that_fails_on_one_node_ends_another_that_hangs(tmp_path, capfd):
    """Nothing but the run's folder tells it: NCCL would wait for ten minutes, and torchrun sees its own node only."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe(steps=10_000)))

    def node(number: int, fake: dict[str, Any]) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "RANK": str(number), "LOCAL_RANK": "0",
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
        }  # fmt: skip
        (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe(**fake)))
        words = [
            SUPERVISOR,
            str(run),
            "--worker",
            "fake_worker",
            "--attempt",
            "one",
        ]
        process = subprocess.Popen([sys.executable, "-m", *words], env=environment, stderr=subprocess.PIPE)
        wait_until((run / f"begun-{number}").exists)
        return process

    hanging = node(0, {"steps": 10_000, "nap": 0.1})
    failing = node(1, {"rank": 1, "do": "fail"})
    assert failing.wait(60) == 6
    assert hanging.wait(60) == 0
    log = (run / "logs" / "rank-00000.log").read_text()
    assert "after ['SIGTERM']" in log, "told to stop, it saved; one in a collective would be killed"
    said = failing.communicate()[1]
    assert b"rank 1 is about to fail" in said and b"TrainingStopped" not in said
    hanging.communicate()
    assert report_left(run, "one", 2, 1) == 6, "which says why, once"
    assert capfd.readouterr().err.count("TrainingStopped") == 1


# --- which there are ---------------------------------------------------------------------------------------------------


def test_a_launcher_is_the_module_of_its_name_and_a_line_of_the_registry():
    folder = TESTS.parent / "continual_pretraining" / "launchers"
    modules = {path.stem for path in folder.glob("*.py") if "\nLAUNCHER = " in path.read_text()}
    assert modules == set(NAMES)
    assert all(isinstance(find_launcher(name), Launcher) for name in NAMES)
    assert get_args(Launch.model_fields["launcher"].annotation) == NAMES


def test_nobody_but_a_launchers_own_module_knows_its_name():
    product = [
        path
        for folder in ("commands", "continual_pretraining", "smolconv")
        for path in (TESTS.parent / folder).rglob("*.py")
    ]
    compared = re.compile(r"launcher (?:[!=]=|in|not in) ")
    found = [(path.name, match[0]) for path in product for match in compared.finditer(path.read_text())]
    assert found == []


# --- what cannot be placed --------------------------------------------------------------------------------------------


def test_a_world_size_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(UsageError, match="4 micro-batches"):
        placement(recipe(launch={"ranks_per_node": 3}))
    assert placement(recipe(launch={"ranks_per_node": 4})).world_size == 4


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        ({"nodes": 2}, "torchrun, deepspeed with a hostfile, or slurm"),
        ({"nodes": 2, "launcher": "deepspeed"}, "needs? a --hostfile|use a --hostfile"),
        ({"nodes": 2, "launcher": "torchrun"}, "launch.rendezvous=HOST:PORT"),
        ({"launcher": "deepspeed", "hostfile": "/nowhere/hosts"}, "cannot be read"),
    ],
)
def test_nodes_that_a_launcher_cannot_reach_are_refused(launch, says):
    with pytest.raises(UsageError, match=says):
        placement(recipe(launch=launch))


@pytest.mark.parametrize(
    ("time", "seconds"),  # as man sbatch has them
    [("90", 5400), ("90:30", 5430), ("1:02:03", 3723), ("2-3", 183_600), ("2-3:04", 183_840), ("2-3:04:05", 183_845)],
)
def test_a_slurm_job_that_would_be_signalled_at_its_start_is_refused(time, seconds):
    def placed(time: str, early: int, launcher: str = "slurm") -> int:
        section = {"time": time, "signal_seconds": early, "gpus_per_node": 0}
        return placement(recipe(launch={"launcher": launcher, "slurm": section})).world_size

    assert placed(time, seconds - 1) == placed("UNLIMITED", 10**9) == placed(time, seconds, "local") == 2
    with pytest.raises(UsageError, match=r"launch.slurm.time .* is not longer than launch.slurm.signal_seconds"):
        placed(time, seconds)


def test_a_hostfile_says_how_many_nodes_and_ranks_there_are(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nalpha slots=2\n\nbeta slots=2  # the new one\n")
    assert read_hostfile(hosts) == {"alpha": 2, "beta": 2}
    launch = {"launcher": "deepspeed", "hostfile": str(hosts), "ranks_per_node": None}
    assert placement(recipe(launch=launch)).world_size == 4
    with pytest.raises(UsageError, match="2 slots, but 4 ranks"):
        placement(recipe(launch=launch | {"ranks_per_node": 4}, batch=8))
    with pytest.raises(UsageError, match="lists 2 hosts, but 3 nodes"):
        placement(recipe(launch=launch | {"nodes": 3}))


@pytest.mark.parametrize(
    "text",
    ["alpha 2", "alpha slots=0", "alpha slots=2\nalpha slots=2", "", "alpha slots=two", f"alpha slots={'9' * 5000}"],
    ids=range(6),
)
def test_a_hostfile_that_is_not_understood_is_refused(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UsageError, match="slots=N"):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_that_is_no_text_or_no_file_is_refused(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe slots=2")
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "bytes", "not UTF-8"), (tmp_path / "pipe", "is a named pipe"), (tmp_path, "folder")):
        with pytest.raises(UsageError, match=said):
            read_hostfile(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"rank": -1}, {"rank": "0"}, {"exit_code": None}, {"exit_code": True}, {"exit_code": 10**30}, {"seconds": "now"},
        {"message": 3}, {"last_lines": [1]}, {"last_lines": 3}, {"more": 1}, None,
    ],
)  # fmt: skip
def test_what_no_rank_leaves_of_itself_is_not_believed(damage, tmp_path, capfd):
    """As a launcher that finds nothing: its status is what it has to say."""
    end = {"rank": 0, "exit_code": 3, "seconds": 1.5, "message": "CorruptFile: a file", "last_lines": ["a line"]}
    path = ends_folder(tmp_path, "a") / "rank-00000.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(end))
    assert report_left(tmp_path, "a", 1, 1) == 3 and "rank 0 of 1 failed first: CorruptFile" in capfd.readouterr().err
    path.write_text("[" * 3000 if damage is None else json.dumps({**end, **damage}))
    assert report_left(tmp_path, "a", 1, 1) == 4 and "no rank said why" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ('{"exit_code": 6, "error": "E", "message": "m", "attempt": "a"}', 6, "E: m"),  # control
        ('{"exit_code": "6", "error": "E", "message": "m", "attempt": "a"}', 3, "ended with exit code 3."),
        ('{"exit_code": 6, "error": "E", "message": "m", "attempt": "b"}', 3, "ended with exit code 3."),
        ("[" * 3000, 3, "ended with exit code 3."),
        ("[]", 3, "ended with exit code 3."),
        ("\udcff", 3, "ended with exit code 3."),
    ],
)
def test_a_damaged_failure_file_says_nothing(content, code, said, tmp_path):
    path = failure_file(tmp_path, 1)
    path.parent.mkdir(parents=True)
    path.write_text(content, errors="surrogateescape")
    found = end_of(1, 3, tmp_path, attempt="a", log_start=0)
    assert (found.exit_code, found.message) == (code, said)


def test_deepspeeds_own_parser_understands_our_words(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    hosts = tmp_path / "hosts"
    hosts.write_text("alpha slots=2\nbeta slots=2\n")
    words = launch_command(recipe(launch={"launcher": "deepspeed", "hostfile": str(hosts)}), Path("/run"))
    given = parse_args(words[words.index("deepspeed.launcher.runner") + 1 :])
    assert (given.num_nodes, given.num_gpus, given.hostfile, given.module) == (2, 2, str(hosts), False)
    rank = ["--in", str(Path.cwd()), SUPERVISOR, "/run", "--resume", "auto"]
    assert (given.user_script, given.user_args) == (str(BOOTSTRAP), rank)
    assert fetch_hostfile(given.hostfile) == read_hostfile(hosts)


def test_deepspeeds_launcher_is_given_the_gpus_that_are_visible(monkeypatch):
    from deepspeed.launcher.runner import parse_args, parse_inclusion_exclusion

    given = recipe(launch={"launcher": "deepspeed", "ranks_per_node": 2})
    monkeypatch.setattr("smolconv.continual_pretraining.launchers.deepspeed.count_gpus", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,7")
    words = launch_command(given, Path("/run"))
    parsed = parse_args(words[words.index("deepspeed.launcher.runner") + 1 :])
    assert (parsed.num_nodes, parsed.num_gpus) == (-1, -1)  # either excludes --include
    assert parse_inclusion_exclusion({"localhost": 8}, parsed.include, parsed.exclude) == {"localhost": [4, 5]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3c,GPU-12ab")
    with pytest.raises(UsageError, match="accepts only numbers"):
        launch_command(given, Path("/run"))


# --- the real worker, where launchers rely on it ----------------------------------------------------------------------

#: Python that runs before a forked worker: this file's own facts about it.
RANK = "import os, signal, sys\nfrom pathlib import Path\nrank, run = int(os.environ['RANK']), Path(sys.argv[1])\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Any]:
    """Two steps of a tiny model, and its export."""
    source = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
    return recipe_document(
        source, token_folder(tmp_path_factory.mktemp("data") / "tokens"), schedule={"train_steps": 2},
        export={"formats": ["hf"], "verify": True},
    )  # fmt: skip


@pytest.mark.parametrize("steps_done", [False, True], ids=["after its last step", "in a start of its own"])
def test_a_signal_in_the_export_ends_all_ranks_with_75_and_the_next_start_exports(tmp_path, small, steps_done):
    run = tmp_path / "run"
    if steps_done:
        assert forked_worker.work({**small, "export": None}, run, ranks=2).code == 0
    signals = RANK + (
        "(run / f'pid-{rank}').write_text(str(os.getpid()))\n"
        "import smolconv.continual_pretraining.run.export as export\n"
        "def compared(target, weights):\n"
        "    assert target.is_dir()\n"
        "    for number in (signal.SIGTERM, signal.SIGUSR1):\n"
        "        for other in (1, 0):\n"
        "            os.kill(int((run / f'pid-{other}').read_text()), number)\n"
        "    raise AssertionError('not ended')\n"
        "export._compared = compared\n"
    )
    ended = forked_worker.work(small, run, ranks=2, before=signals)
    assert ended.code == 75, ended.log
    assert "StoppedBySignal" in ended.message and "export" in ended.message
    again = forked_worker.work(small, run, ranks=2)
    assert again.code == 0, again.log
    assert (run / "export" / "hf" / "model.safetensors").is_file()


def test_a_signal_while_the_last_step_is_saved_is_not_forgotten(tmp_path, small):
    signals = RANK + (
        "import smolconv.continual_pretraining.run.trainer as trainer\n"
        "save = trainer.save_run\n"
        "def save_run(*given):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return save(*given)\n"
        "trainer.save_run = save_run\n"
    )
    ended = forked_worker.work(small, tmp_path / "run", ranks=2, before=signals)
    assert ended.code == 75, ended.log
    assert not (tmp_path / "run" / "export" / "hf").exists()


def test_a_node_whose_gpus_cannot_be_used_is_named_and_does_not_train_on_its_cpus(tmp_path, small):
    with_driver = (
        "import smolconv.continual_pretraining.run.ranks as r\nfrom pathlib import Path\nr.NVIDIA = Path('/dev/null')"
    )
    ended = forked_worker.work(small, tmp_path / "run", before=with_driver)
    assert ended.code == 4 and ended.failure["error"] == "MachineError"
    assert socket.gethostname() in ended.message and "/dev/null exists" in ended.message
    on_purpose = "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\n" + with_driver
    assert forked_worker.work(small, tmp_path / "run", before=on_purpose).code == 0


@pytest.mark.parametrize(("gpus", "code"), [(None, 4), (2, 4), (0, 0)])
def test_a_slurm_job_that_asked_for_gpus_does_not_train_without_them(tmp_path, small, gpus, code):
    launch = {"launcher": "slurm", "slurm": {"gpus_per_node": gpus}}
    ended = forked_worker.work({**small, "launch": launch}, tmp_path / "run")
    assert ended.code == code, ended.log
    assert code == 0 or "the job asks for GPUs" in ended.message


def test_ranks_that_see_different_devices_end_instead_of_waiting_for_each_other(tmp_path, small):
    rank_1_sees_some = RANK + (
        "import torch\ntorch.cuda.is_available = lambda: rank == 1\ntorch.cuda.device_count = lambda: 2 * rank\n"
    )
    ended = forked_worker.work(small, tmp_path / "run", ranks=2, before=rank_1_sees_some)
    host = socket.gethostname()
    assert ended.code == 4 and ended.failure["error"] == "MachineError"
    assert f"1 with a GPU on {host}" in ended.message and f"1 without on {host}" in ended.message


def test_a_rank_without_a_gpu_of_its_own_is_told_so(tmp_path, small):
    one_gpu = "import torch\ntorch.cuda.is_available = lambda: True\ntorch.cuda.device_count = lambda: 1\n"
    ended = forked_worker.work(small, tmp_path / "run", ranks=2, before=one_gpu)
    assert ended.code == 4 and ended.failure["rank"] == 1
    assert "2 ranks run on it, but it has 1 GPU" in ended.message


def test_ranks_that_do_not_meet_are_a_failed_machine(tmp_path, small):
    alone = (
        "import datetime, os\nimport smolconv.continual_pretraining.run.ranks as r\nos.environ['WORLD_SIZE'] = '2'\n"
    )
    patience = "r._TRAINING_PATIENCE = datetime.timedelta(seconds=2)\n"
    ended = forked_worker.work(small, tmp_path / "run", before=alone + patience)
    assert ended.code == 4 and "127.0.0.1" in ended.message, ended.log


def test_training_waits_for_half_an_hour_and_the_export_for_twelve(tmp_path, small):
    """By torch's own record of what its groups were made with."""
    says = RANK + (
        "import smolconv.continual_pretraining.run.worker as worker, torch.distributed as dist, torch\n"
        "join = worker.join_ranks\n"
        "def joined(*given, **more):\n"
        "    ranks = join(*given, **more)\n"
        "    made = [group._get_backend(torch.device('cpu')).options._timeout for group in (dist.group.WORLD,\n"
        "            ranks.patient)]\n"
        "    (run / 'timeouts').write_text(' '.join(str(timeout) for timeout in made))\n"
        "    return ranks\n"
        "worker.join_ranks = joined\n"
    )
    assert forked_worker.work(small, tmp_path / "run", before=says).code == 0
    assert (tmp_path / "run" / "timeouts").read_text() == "0:30:00 12:00:00"


def test_a_job_that_slurm_has_queued_again_waits_for_the_lock_of_the_node_that_it_ran_on(tmp_path, monkeypatch):
    held = worker.lock_run(tmp_path)
    with pytest.raises(OutputLocked):
        worker.lock_run(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(OutputLocked):
        worker.lock_run(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(1.0, os.close, [held]).start()
    os.close(worker.lock_run(tmp_path))
