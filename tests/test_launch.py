"""Launchers, with real processes and real torchrun; tests/fake_worker.py stands in for training."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from continual_pretraining.launch import launch_command, placement, read_hostfile
from continual_pretraining.recipe import Recipe
from continual_pretraining.recipe_file import dump_recipe
from smolconv.errors import UsageError

TESTS = Path(__file__).parent
#: Runs a recipe with the fake worker, as continue-train does with the real one.
LAUNCHER = """
import sys
from pathlib import Path
import continual_pretraining.launch
from continual_pretraining.launch import launch
from continual_pretraining.recipe_file import load_recipe
continual_pretraining.launch.GRACE_SECONDS = 2.0
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
    assert ("RuntimeError: of my own accord" in stderr) == (do == "raise")


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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, signum):
    run = tmp_path / "run"
    launched = Launched(recipe(steps=10_000), run)
    launched.begun()
    launched.process.send_signal(signum)
    code, stderr = launched.end()
    assert code == 75, stderr
    assert "stopped after a save" in stderr
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
    assert code == 130 and "while it was starting" in stderr


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path):
    launched = Launched(recipe(steps=10_000), tmp_path / "run")
    pids = launched.begun()
    assert all(map(alive, pids))
    launched.process.kill()
    wait_until(lambda: not any(map(alive, pids)), seconds=5)


def test_rank_0_has_a_terminal_when_the_user_has_one(tmp_path):
    (tmp_path / "asks.py").write_text(
        "import os\nif os.environ['RANK'] == '0': print([os.isatty(1), os.isatty(2), os.get_terminal_size(2).columns])\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 97, 0, 0))
    given = recipe(launch={"environment": {"PYTHONPATH": str(tmp_path)}})
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(dump_recipe(given))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER.replace("fake_worker", "asks"), str(run), "auto"], stderr=theirs, check=False,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )  # fmt: skip
    assert done.returncode == 0
    assert os.read(ours, 1000).decode().strip() == "[True, True, 97]"
    assert (run / "logs" / "rank-00000.log").read_bytes() == b"[True, True, 97]\n"
    os.close(ours)
    os.close(theirs)


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
    given = recipe(launch={"launcher": launcher}, rank=1, do="fail", steps=10_000, gloo=True, nap=0.01)
    launched = Launched(given, tmp_path / "run")
    code, stderr = launched.end()
    assert code == 6, stderr
    assert "rank 1 of 2 failed first: TrainingStopped: the loss is nan" in stderr
    assert "  rank 1 is about to fail" in stderr


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_torchrun_and_deepspeed_pass_a_signal_on_and_the_run_ends_with_75(tmp_path, launcher):
    launched = Launched(recipe(launch={"launcher": launcher}, steps=10_000, gloo=True), tmp_path / "run")
    launched.begun()
    launched.process.send_signal(signal.SIGUSR1)
    code, stderr = launched.end()
    assert code == 75, stderr
    assert all("saved step" in launched.log(rank) for rank in (0, 1))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_ranks_of_torchrun_and_deepspeed_do_not_outlive_a_launcher_that_is_killed(tmp_path, launcher):
    launched = Launched(recipe(launch={"launcher": launcher}, steps=10_000), tmp_path / "run")
    pids = launched.begun()
    launched.process.kill()
    wait_until(lambda: not any(map(alive, pids)), seconds=20)


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
    return [Launched(recipe(launch=launch, gloo=True, **fake), tmp_path / "run") for _ in range(2)]


def test_two_torchrun_nodes_on_loopback_train_together(tmp_path):
    nodes = two_nodes(tmp_path)
    ends = [node.end() for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum("rank 0 step 3" in stderr for _, stderr in ends) == 1
    logs = [nodes[0].log(rank) for rank in range(4)]
    assert all(f"rank {rank} of 4 begins" in log for rank, log in enumerate(logs))
    assert sorted(log.count("'LOCAL_RANK': '0'") for log in logs) == [0, 0, 1, 1]


def test_a_rank_that_dies_on_one_torchrun_node_ends_both(tmp_path):
    nodes = two_nodes(tmp_path, rank=3, do="fail", steps=10_000, nap=0.01)
    ends = [node.end() for node in nodes]
    assert 6 in [code for code, _ in ends] and 0 not in [code for code, _ in ends], ends
    assert any("rank 3 of 4 failed first: TrainingStopped: the loss is nan" in stderr for _, stderr in ends)


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


@pytest.mark.parametrize("text", ["alpha 2", "alpha slots=0", "alpha slots=2\nalpha slots=2", "", "alpha slots=two"])
def test_a_hostfile_that_is_not_understood_is_refused(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UsageError, match="slots=N"):
        read_hostfile(tmp_path / "hosts")


def test_deepspeeds_own_parser_understands_our_words(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args  # noqa: PLC0415

    hosts = tmp_path / "hosts"
    hosts.write_text("alpha slots=2\nbeta slots=2\n")
    words = launch_command(recipe(launch={"launcher": "deepspeed", "hostfile": str(hosts)}), Path("/run"))
    given = parse_args(words[words.index("deepspeed.launcher.runner") + 1 :])
    assert (given.num_nodes, given.num_gpus, given.hostfile, given.module) == (2, 2, str(hosts), True)
    assert (given.user_script, given.user_args) == ("continual_pretraining.launch", ["/run", "--resume", "auto"])
    assert fetch_hostfile(given.hostfile) == read_hostfile(hosts)
