"""Nodes that die, networks that are cut, and processes that are stopped: found within a stated time, and gone on from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES
from forked_worker import work
from training import losses, recipe, recipe_document, token_folder

from smolconv.continual_pretraining.launchers.ends import RankEnd, ends_folder, leave_end, report_left, was_lost
from smolconv.continual_pretraining.launchers.front_end import Outcome
from smolconv.continual_pretraining.launchers.launch import batch_script, launch
from smolconv.continual_pretraining.launchers.launcher import Start
from smolconv.continual_pretraining.run.heartbeat import Heartbeat, LostRank, announce, lost_connection

TESTS = Path(__file__).parent
SOURCE = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


# --- heartbeats, by themselves ----------------------------------------------------------------------------------------


class Shared:
    """A store that several heartbeats share."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}


class Connection:
    """A rank's; once cut off, it waits for ever, as for a TCP store without a network."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.cut_off = shared, threading.Event()

    def set(self, key: str, value: str, /) -> None:
        if self.cut_off.is_set():
            threading.Event().wait(60)
        self.shared.values[key] = value

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        if self.cut_off.is_set():
            raise RuntimeError("connection reset")
        return [self.shared.values[key].encode() for key in keys]


class Group:
    """Heartbeats of three ranks on three hosts, with what each of them said in the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, silence: float) -> None:
        shared = Shared()
        self.connections = [Connection(shared) for _ in range(3)]
        self.ended: dict[int, str] = {}
        self.beats = []
        for rank, connection in enumerate(self.connections):
            monkeypatch.setattr("socket.gethostname", lambda rank=rank: f"node-{rank}")
            announce(connection, rank)
        monkeypatch.setattr("socket.gethostname", lambda: "node-0")
        for rank, connection in enumerate(self.connections):

            def end(error: LostRank, rank: int = rank) -> None:
                self.ended[rank] = str(error)

            self.beats.append(Heartbeat(connection, rank, 3, silence_seconds=silence, end=end))
        for beat in self.beats:
            beat.doing = "step 7"
            beat.start()

    def stop(self) -> None:
        for beat in self.beats:
            beat.stop()


@pytest.fixture
def group(monkeypatch):
    made = Group(monkeypatch, silence=1.2)
    yield made
    made.stop()


def test_a_rank_that_falls_silent_is_named_by_all_others_with_the_same_words(group):
    group.beats[2].stop()
    wait_until(lambda: len(group.ended) == 2, seconds=20)
    assert group.ended[0] == group.ended[1] and 2 not in group.ended
    assert "rank 2 on node-" in group.ended[0].splitlines()[0] and "step 7" in group.ended[0].splitlines()[0]
    assert "rank 1" not in group.ended[0]


def test_a_rank_that_cannot_reach_the_store_ends_too_though_its_calls_hang(group):
    group.connections[1].cut_off.set()
    wait_until(lambda: len(group.ended) == 3, seconds=20)
    assert "from rank 0 on" in group.ended[1]
    assert group.ended[0] == group.ended[2] and "from rank 1 on" in group.ended[0]


def test_when_rank_0_is_stopped_the_others_say_so(group):
    group.beats[0].stop()
    wait_until(lambda: len(group.ended) == 2, seconds=20)
    assert all("from rank 0 on" in said for said in group.ended.values())


def test_ranks_that_live_are_left_alone(group):
    """However long their main threads are at something: twice the silence that would end them."""
    time.sleep(3.0)
    assert group.ended == {}


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4242"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo/transport"), False),
    ],
)
def test_a_broken_connection_is_told_from_other_errors(error, lost):
    assert (lost_connection(error) is not None) == lost


# --- processes that are stopped ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


def document(tokens: Path, **changes: Any) -> dict[str, Any]:
    return recipe_document(
        SOURCE, tokens, launch={"silence_seconds": 10}, schedule={"train_steps": 6}, checkpoints={"every_steps": 2},
        **changes,
    )  # fmt: skip


#: Naps after three steps until a file is there, in rank 1's main thread only.
HANGS = (
    "import os, sys, time\nfrom pathlib import Path\n"
    "import smolconv.continual_pretraining.run.trainer as trainer\n"
    "step = trainer.Trainer._step\n"
    "def slow(self, data):\n"
    "    if data.step == 4 and os.environ['RANK'] == '1':\n"
    "        (Path(sys.argv[1]) / 'hangs').touch()\n"
    "        time.sleep(SECONDS)\n"
    "    step(self, data)\n"
    "trainer.Trainer._step = slow\n"
)


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_the_run_and_the_rest_gives_the_same_losses(tmp_path, tokens):
    """Then the run continues at one rank, from its last whole checkpoint. Control: a run that nobody stopped."""
    run, given = tmp_path / "run", document(tokens)

    def stop(pids: list[int]) -> None:
        wait_until((run / "hangs").exists)
        os.kill(pids[1], signal.SIGSTOP)

    ended = work(given, run, ranks=2, before=HANGS.replace("SECONDS", "60"), meanwhile=stop)
    assert (ended.code, ended.failure["rank"], ended.failure["error"]) == (4, 0, "LostRank"), ended.log
    assert ended.message.startswith("LostRank: no sign of life for 10 s from rank 1 on ")
    assert "in step 4" in ended.message.splitlines()[0]
    assert work(given, run).code == 0
    # A living rank whose main thread is busy for longer than the others would wait for one that is silent.
    whole = tmp_path / "whole"
    assert work(given, whole, ranks=2, before=HANGS.replace("SECONDS", "13")).code == 0
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


# --- what launchers do then -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "saves", "starts"),
    [
        (None, [True], 1),  # not asked for
        (2, [True, True, False], 3),  # lost a third time, with nothing saved since the second
        (2, [False, False], 2),
        (2, [False, True, None], 3),  # ended well
    ],
)
def test_torchrun_goes_on_while_checkpoints_are_saved_between_losses(tmp_path, monkeypatch, least, saves, starts):
    """``saves``: whether each start saves before a rank is lost; None: it ends well."""
    given: list[tuple[list[str], int, str]] = []

    def front_end(start: Start, words: list[str], *, restart: int, **more: object) -> Outcome:
        given.append((words, restart, start.resume))
        saved = saves[restart] if restart < len(saves) else False
        if saved:
            step = tmp_path / "checkpoints" / f"step-{len(given)}"
            step.mkdir(parents=True)
            (step.parent / "latest").write_text(step.name)
        return Outcome(exit_code=0 if saved is None else 4, lost=saved is not None)

    monkeypatch.setattr("smolconv.continual_pretraining.launchers.torchrun.run_front_end", front_end)
    launched = {"launcher": "torchrun", "nodes": 4, "ranks_per_node": 1, "rendezvous": "a:100", "least_nodes": least}
    made = recipe(SOURCE, tmp_path / "tokens", launch=launched)
    code = launch(made, tmp_path, resume="/other/step-3")
    assert (len(given), code) == (starts, 0 if None in saves else 4)
    assert [restart for _, restart, _ in given] == list(range(starts))
    for words, restart, resume in given:
        assert words[words.index("--nnodes") + 1] == ("2:4" if restart else "4")
        assert words[words.index("--rdzv-endpoint") + 1] == f"a:{100 + restart}"
        assert words[words.index("--resume") + 1] == resume == ("auto" if restart else "/other/step-3")


def test_a_lost_rank_is_what_is_said_and_not_the_rank_that_says_it(tmp_path, capfd):
    folder = ends_folder(tmp_path, "a")
    said = "LostRank: no sign of life for 60 s from rank 2 on node-b."
    leave_end(folder, RankEnd(rank=1, exit_code=4, seconds=1.0, message=said, last_lines=("a line",)))
    leave_end(folder, RankEnd(rank=0, exit_code=70, seconds=2.0, message="RuntimeError: in a collective"))
    assert was_lost(folder)
    assert report_left(tmp_path, "a", 3, 1) == 4 and capfd.readouterr().err == f"{said}\n"
    other = ends_folder(tmp_path, "b")
    leave_end(other, RankEnd(rank=0, exit_code=6, seconds=1.0, message="TrainingStopped: the loss is nan"))
    leave_end(other, RankEnd(rank=1, exit_code=4, seconds=2.0, message=said))
    assert not was_lost(other), "its peer failed of its own, first"


@pytest.mark.parametrize(
    ("lost", "restarts", "saves", "queued"),
    [(True, 0, False, True), (True, 1, False, False), (True, 1, True, True), (False, 0, True, False)],
)
def test_a_job_whose_rank_was_lost_is_queued_again(tmp_path, lost, restarts, saves, queued):
    """The script is run by bash; srun and python in it leave what ranks leave."""
    run = tmp_path / "a run"
    ends = run / "logs" / "ends" / f"7-{restarts}"
    for folder in (ends, run / "checkpoints"):
        folder.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-1")
    latest = f"echo step-2 > '{run}/checkpoints/latest'" if saves else "true"
    programs = {
        "srun": f"{latest}; {'touch' if lost else 'true'} '{ends}/lost'; exit 1",
        "scontrol": f"echo \"$@\" >> '{tmp_path}/asked'",
        "python": "exit 4",
    }
    for name, does in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    launched = {"launcher": "slurm", "nodes": 4, "ranks_per_node": 1, "least_nodes": 2}
    text = batch_script(recipe(SOURCE, tmp_path / "tokens", launch=launched), run)
    assert text is not None and "#SBATCH --nodes=2-4\n" in text
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "4",
             "SLURM_JOB_NODELIST": "host[1-4]", "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    text = text.replace(sys.executable, str(tmp_path / "python"))
    done = subprocess.run(["bash"], input=text, env=given, text=True, capture_output=True, check=False)
    assert done.returncode == 4, done.stderr
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == queued, done.stderr


# --- two nodes --------------------------------------------------------------------------------------------------------

#: A launcher with a worker of this test's own.
LAUNCHER = """
import sys
from pathlib import Path
from smolconv.continual_pretraining.launchers.launch import launch
from smolconv.continual_pretraining.recipe.files import load_recipe
run = Path(sys.argv[1])
sys.exit(launch(load_recipe(run / "recipe.resolved.yaml"), run, worker="worker_that_is_cut_off"))
"""
#: The real worker; in the forward pass of step 4 all ranks wait until the network is cut.
WORKER = """
import sys, time
from pathlib import Path
import smolconv.continual_pretraining.run.trainer as trainer
from smolconv.continual_pretraining.run import worker
run, forward = Path(sys.argv[1]), trainer.Trainer._forward
def waiting(self, batch):
    if self.watch is not None and self.saved_step == 2 and len((run / "metrics.jsonl").read_text().splitlines()) == 3:
        (run / "in-step").touch()
    while (run / "in-step").exists() and not (run / "cut").exists():
        time.sleep(0.05)
    return forward(self, batch)
trainer.Trainer._forward = waiting
if __name__ == "__main__":
    worker.main()
"""
NODES = {"smolconv-a": "10.77.0.1", "smolconv-b": "10.77.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Two nodes with a cable between them, by the names in NODES."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, iproute2 and util-linux")
    try:
        for name in NODES:
            ip("netns", "add", name)
        first, second = NODES
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in NODES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
    except subprocess.CalledProcessError as error:
        for name in NODES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    yield
    for name in NODES:
        ip("netns", "delete", name)


def start_node(name: str, run: Path, modules: Path) -> subprocess.Popen[str]:
    """The launcher on one node; the node's host name is its address."""
    node = f'hostname {NODES[name]} && exec "$@"'
    words = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", node, "sh", sys.executable, "-c", LAUNCHER]
    return subprocess.Popen(
        [*words, str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=run,
        env={**os.environ, "PYTHONPATH": f"{modules}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_node_that_is_cut_off_in_mid_step_is_named_and_the_other_goes_on_alone(tmp_path, tokens):
    """Both are real torchrun launchers; the one where they met is left, and continues at one rank."""
    run, modules = tmp_path / "run", tmp_path / "modules"
    modules.mkdir()
    (modules / "worker_that_is_cut_off.py").write_text(WORKER)
    given = document(tokens)
    given["launch"] |= {
        "launcher": "torchrun", "nodes": 2, "ranks_per_node": 1, "rendezvous": "10.77.0.1:29517", "least_nodes": 1,
    }  # fmt: skip
    given["checkpoints"]["asynchronous"] = False  # else step 2 may not be saved yet when step 4 begins
    (run / "logs").mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(given))
    nodes = [start_node(name, run, modules) for name in NODES]
    try:
        wait_until(lambda: (run / "in-step").exists() or any(node.poll() is not None for node in nodes))
        ip("-n", "smolconv-b", "link", "set", "cable", "down")
        (run / "cut").touch()
        said = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                node.kill()
    codes = [node.returncode for node in nodes]
    assert codes[0] == 0 and codes[1] != 0, said
    for text in said:
        assert text.count("LostRank: no sign of life for 10 s from rank") == 1 and "Traceback" not in text, said
    assert "in step 4" in said[0] and "continues from the last checkpoint" in said[0]
    whole = tmp_path / "whole"
    assert work(document(tokens), whole, ranks=2).code == 0
    assert len(losses(run)) == 6 and losses(run) == pytest.approx(losses(whole), abs=1e-5)
