"""Slurm: the batch script as text, and real jobs on a real cluster of two nodes (``make test-slurm``)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import training
import yaml
from conftest import FIXTURES, command, environment
from slurm_cluster import NODES, SlurmCluster, missing, slurm_cluster
from test_launch import LAUNCHER, TESTS, recipe, starts_slowly, wait_until
from training import recipe_document, token_folder

from smolconv.continual_pretraining.launchers.launch import batch_script, launch_command
from smolconv.continual_pretraining.recipe.files import dump_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError

RUN = Path("/runs/a run")


def slurm_recipe(*, slurm: dict[str, Any] | None = None, ranks_per_node: int | None = 2, **fake: Any) -> Recipe:
    """For CPUs, as the cluster of the tests has no GPUs."""
    launch = {"launcher": "slurm", "nodes": 2, "ranks_per_node": ranks_per_node}
    launch["slurm"] = {"gpus_per_node": 0, **(slurm or {})}
    environment = {"FAKE": json.dumps({"gloo": True, **fake}), "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    return recipe(launch={**launch, "environment": environment})


def script(given: Recipe, *, resume: str = "auto") -> str:
    text = batch_script(given, RUN, resume=resume)
    assert text is not None
    return text


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_recipes_fields_are_in_the_script_and_bash_can_read_it():
    slurm = {
        "partition": "gpu", "account": "physics", "qos": "long", "time": "3-00:00:00", "gpus_per_node": 2,
        "cpus_per_task": 32, "signal_seconds": 600, "setup": ["module load cuda", "source /venvs/it's/bin/activate"],
        "options": ["--exclusive", "--mail-type=END"],
    }  # fmt: skip
    text = script(slurm_recipe(slurm=slurm))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True).stderr == ""
    options = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert options == [
        "--job-name=test-run", "--nodes=2", "--ntasks-per-node=1", "--time=3-00:00:00", "--partition=gpu",
        "--account=physics", "--qos=long", "--cpus-per-task=32", "--gpus-per-node=2",
        '--output="/runs/a run/logs/slurm-%j.log"', "--open-mode=append", "--requeue", "--signal=USR1@600",
        "--exclusive", "--mail-type=END",
    ]  # fmt: skip
    assert "\nmodule load cuda\nsource /venvs/it's/bin/activate\n" in text
    assert 'srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK"' in text, (
        "since 22.05 srun does not take it from the job"
    )


def test_what_the_recipe_leaves_out_is_left_to_the_cluster():
    text = script(slurm_recipe())
    assert not re.search("partition|account|qos|cpus-per-task|gpus", text)


@pytest.mark.parametrize(
    ("slurm", "asked"),
    [
        ({"gpus_per_node": None}, ["--gpus-per-node=2"]),
        ({"gpus_per_node": 0}, []),
        ({"gpus_per_node": 4}, ["--gpus-per-node=4"]),
        ({"gpus_per_node": None, "options": ["--gres=gpu:h100:2"]}, ["--gres=gpu:h100:2"]),
        ({"gpus_per_node": None, "options": ["-G 4"]}, ["-G 4"]),
        ({"gpus_per_node": None, "options": ["--gres=tmpdisk:1"]}, ["--gpus-per-node=2", "--gres=tmpdisk:1"]),
    ],
)
def test_a_job_asks_for_a_gpu_for_each_rank_unless_told_otherwise(slurm, asked):
    text = script(slurm_recipe(slurm=slurm))
    assert re.findall(r"^#SBATCH (.*(?:gpu|gres|-G).*)$", text, re.MULTILINE) == asked


def test_more_ranks_than_gpus_on_a_node_are_refused():
    with pytest.raises(UsageError, match=r"4 ranks per node.*gpus_per_node is 2"):
        script(slurm_recipe(slurm={"gpus_per_node": 2}, ranks_per_node=4))


def test_tasks_get_the_jobs_environment_whatever_sbatch_was_told():
    """SBATCH_EXPORT=NONE is inherited by srun, and would take MASTER_ADDR and what setup did from the tasks."""
    assert "\nsrun --export=ALL " in script(slurm_recipe())


def test_without_requeue_the_job_is_never_queued_again():
    text = script(slurm_recipe(slurm={"requeue": False}))
    assert "#SBATCH --no-requeue" in text and "scontrol requeue" not in text


def test_ranks_per_node_follow_the_gpus_that_are_asked_for():
    given = slurm_recipe(slurm={"gpus_per_node": 2}, ranks_per_node=None)
    assert launch_command(given, RUN)[launch_command(given, RUN).index("--nproc-per-node") + 1] == "2"


def test_an_option_with_a_line_break_is_refused():
    with pytest.raises(UsageError, match="line break"):
        script(slurm_recipe(slurm={"options": ["--exclusive\nrm -rf /"]}))


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_job_that_is_queued_again_goes_on_from_its_own_checkpoint(tmp_path, restarts):
    """The script is run by bash with programs that say what they were given, in place of Slurm's."""
    for name in ("srun", "scontrol"):
        program = tmp_path / name
        program.write_text('#!/bin/bash\n[ "$0" = "${0%srun}" ] && echo host1 && exit\nSLURM_NODEID=1 exec "${@:3}"\n')
        program.chmod(0o755)
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "<%s>" "$@"; echo\n')
    python.chmod(0o755)
    text = script(slurm_recipe(), resume="/other run/step-9").replace(sys.executable, str(python))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "50007", "SLURM_NNODES": "2",
                   "SLURM_JOB_NODELIST": "host[1-2]", "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    done = subprocess.run(["bash"], input=text, env=environment, text=True, capture_output=True, check=False)
    first = done.stdout.splitlines()[0]
    assert "<--node-rank><1><--master-addr><host1><--master-port><20007>" in first, done
    assert f"</runs/a run><--resume><{'auto' if restarts else '/other run/step-9'}>" in first


# --- real jobs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Job:
    """A job that the launcher has submitted."""

    def __init__(self, cluster: SlurmCluster, run: Path, given: Recipe) -> None:
        self.cluster, self.run = cluster, run
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.resolved.yaml").write_text(dump_recipe(given))
        done = subprocess.run(
            [sys.executable, "-c", LAUNCHER, str(run), "auto"], capture_output=True, text=True, check=False,
            env={**cluster.environment, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}, cwd=run,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        match = re.fullmatch(r"Slurm job (\d+)\n", done.stdout)
        assert match, done.stdout
        self.number = int(match[1])
        assert (run / "slurm" / f"job-{self.number}.sh").is_file()

    def begun(self) -> None:
        wait_until(lambda: len(list(self.run.glob("begun-*"))) == 4 or self.ended(), seconds=120)
        assert not self.ended(), self.log() + self.cluster.logs()

    def ended(self) -> bool:
        return self.cluster.state(self.number) not in ("PENDING", "RUNNING", "CONFIGURING")

    def end(self) -> tuple[str, str]:
        """Its state and exit code."""
        state = self.cluster.wait(self.number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return state, self.cluster.job(self.number)["ExitCode"]

    def log(self) -> str:
        path = self.run / "logs" / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def rank_log(self, rank: int) -> str:
        return (self.run / "logs" / f"rank-{rank:05d}.log").read_text()

    def saved(self) -> int:
        return int((self.run / "checkpoints" / "saved").read_text())


@pytest.mark.slurm
def test_a_job_over_two_nodes_trains_to_its_end(cluster, tmp_path):
    job = Job(cluster, tmp_path / "a run", slurm_recipe())
    assert job.end() == ("COMPLETED", "0:0"), job.log()
    assert "rank 0 step 3" in job.log() and "rank 1 step" not in job.log()
    for rank in range(4):
        assert f"rank {rank} of 4 begins" in job.rank_log(rank)
        assert f"'LOCAL_RANK': '{rank % 2}'" in job.rank_log(rank), "ranks are numbered by node"
        assert f"'MASTER_PORT': '{10000 + job.number}'" in job.rank_log(rank)
    assert cluster.job(job.number)["Restarts"] == "0"


@pytest.mark.slurm
def test_a_job_saves_before_its_walltime_is_queued_again_and_ends(cluster, tmp_path):
    # The walltime is a minute, the least that Slurm knows; the signal comes up to a minute early, which Slurm documents.
    job = Job(
        cluster, tmp_path / "run", slurm_recipe(slurm={"time": "00:01:30", "signal_seconds": 30}, steps=2000, nap=0.05)
    )
    wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", seconds=150)
    saved = job.saved()
    assert saved > 3
    assert "saved step" in job.rank_log(3) and "SIGUSR1" in job.rank_log(3)
    assert "stopped after a save" in job.log()
    cluster.wait(job.number, "PENDING", "RUNNING")
    # The second start has little left to do. Slurm would wait two minutes with it.
    given = slurm_recipe(steps=saved + 3)
    (job.run / "recipe.resolved.yaml").write_text(dump_recipe(given))
    cluster.run("scontrol", "update", f"JobId={job.number}", "StartTime=now+5")
    assert job.end() == ("COMPLETED", "0:0"), job.log()
    assert f"begins after step {saved}" in job.rank_log(3)
    assert cluster.job(job.number)["Restarts"] == "1", "an end that is not a save is not queued again"
    assert job.log().count("rank 0 of 4 begins") == 2, "one log, appended to"


@pytest.mark.slurm
def test_a_job_that_is_told_to_save_is_queued_again(cluster, tmp_path):
    job = Job(cluster, tmp_path / "run", slurm_recipe(steps=100_000))
    job.begun()
    cluster.run("scancel", "--signal=USR1", str(job.number))
    wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", seconds=60)
    assert job.saved() > 0
    cluster.run("scancel", str(job.number))
    assert job.end()[0] == "CANCELLED"


@pytest.mark.slurm
def test_a_cancelled_job_saves_and_is_not_queued_again(cluster, tmp_path):
    job = Job(cluster, tmp_path / "run", slurm_recipe(steps=100_000))
    job.begun()
    cluster.run("scancel", str(job.number))
    assert job.end()[0] == "CANCELLED"
    wait_until(lambda: all("saved step" in job.rank_log(rank) for rank in range(4)), seconds=30)
    assert cluster.job(job.number)["Restarts"] == "0"


def starting_slowly(tmp_path: Path) -> Recipe:
    """Ranks sleep before they listen to signals; ``slow-N`` in the run says that they do."""
    given = slurm_recipe()
    environment = {"FAKE": '{"gloo": true}', **starts_slowly(tmp_path, "pass")}
    return given.model_copy(update={"launch": given.launch.model_copy(update={"environment": environment})})


@pytest.mark.slurm
def test_a_job_that_is_signalled_in_its_start_is_queued_again_once(cluster, tmp_path):
    job = Job(cluster, tmp_path / "run", starting_slowly(tmp_path))
    for restarts in ("0", "1"):
        wait_until(lambda: len(list(job.run.glob("slow-*"))) == 4, seconds=120)
        for slow in job.run.glob("slow-*"):
            slow.unlink()
        assert cluster.job(job.number)["Restarts"] == restarts
        cluster.run("scancel", "--signal=USR1", str(job.number))
        if restarts == "0":
            wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", seconds=60)
            cluster.wait(job.number, "PENDING")
            cluster.run("scontrol", "update", f"JobId={job.number}", "StartTime=now+5")
    assert job.end() == ("FAILED", "130:0"), job.log()
    assert "twice in a row" in job.log()


@pytest.mark.slurm
def test_a_job_that_is_cancelled_in_its_start_is_not_queued_again(cluster, tmp_path):
    job = Job(cluster, tmp_path / "run", starting_slowly(tmp_path))
    wait_until(lambda: len(list(job.run.glob("slow-*"))) == 4, seconds=120)
    cluster.run("scancel", str(job.number))
    assert job.end()[0] == "CANCELLED"
    wait_until(lambda: "Interrupted" in job.log(), seconds=30)
    assert cluster.job(job.number)["Restarts"] == "0"
    assert job.end()[0] == "CANCELLED"


@pytest.mark.slurm
def test_a_second_job_of_the_same_run_does_not_end_the_first_ones_save(cluster, tmp_path):
    """Both nodes are the first job's; the second's ranks run beside it, as on a cluster with room."""
    shared = {"options": ["--oversubscribe", "--ntasks=2", "--mem=0"], "cpus_per_task": 1}
    first = Job(cluster, tmp_path / "run", slurm_recipe(slurm=shared, steps=10_000, nap=3.0))
    first.begun()
    for begun in first.run.glob("begun-*"):
        begun.unlink()
    second = Job(cluster, tmp_path / "run", slurm_recipe(slurm=shared, rank=0, do="fail", step=1))
    assert second.end() == ("FAILED", "6:0"), second.log()
    cluster.run("scancel", "--signal=USR1", str(first.number))
    wait_until(lambda: cluster.job(first.number)["Restarts"] == "1", seconds=60)
    told = [re.search(r"saved step \d+ after (.*)", first.rank_log(rank)) for rank in range(4)]
    assert all(found and "SIGUSR1" in found[1] and "SIGTERM" not in found[1] for found in told), told
    cluster.run("scancel", str(first.number))
    assert first.end()[0] == "CANCELLED"


@pytest.mark.slurm
def test_a_cluster_without_gpus_says_what_to_change(cluster, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.resolved.yaml").write_text(dump_recipe(slurm_recipe(slurm={"gpus_per_node": None})))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(run), "auto"], capture_output=True, text=True, check=False,
        env={**cluster.environment, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )  # fmt: skip
    assert done.returncode != 0 and "launch.slurm.gpus_per_node=0" in done.stderr


@pytest.mark.slurm
def test_a_failing_rank_on_the_second_node_ends_the_job_and_its_message_is_in_the_log(cluster, tmp_path):
    job = Job(cluster, tmp_path / "run", slurm_recipe(steps=100_000, rank=3, do="fail", nap=0.01))
    assert job.end() == ("FAILED", "6:0"), job.log()
    assert "rank 3 of 4 failed first: TrainingStopped: the loss is nan" in job.log()
    assert "  rank 3 is about to fail" in job.log()
    assert cluster.job(job.number)["Restarts"] == "0", "a failure is not queued again"


@pytest.mark.slurm
def test_a_rank_that_is_killed_ends_the_job(cluster, tmp_path):
    job = Job(cluster, tmp_path / "run", slurm_recipe(steps=100_000, rank=2, do="kill", nap=0.01))
    assert job.end() == ("FAILED", "4:0"), job.log()
    assert "rank 2 of 4 failed first: MachineError: killed by SIGKILL" in job.log()


def processes_of(run: Path) -> dict[int, int]:
    """The ranks' process ids by rank, of a real worker."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"run.worker\0{run}\0".encode() in (folder / "cmdline").read_bytes():
                variables = dict(word.partition("=")[::2] for word in (folder / "environ").read_text().split("\0"))
                found[int(variables["RANK"])] = int(folder.name)
    return found


@pytest.mark.slurm
def test_a_job_whose_node_is_lost_goes_on_with_the_one_that_is_left(cluster, tmp_path):
    """All processes of one node's rank are stopped, as if it were gone; then that node takes no more jobs."""
    run = tmp_path / "run"
    given = training.recipe(
        FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0", token_folder(tmp_path / "tokens"),
        schedule={"train_steps": 100}, checkpoints={"every_steps": 10},
        launch={
            "launcher": "slurm", "nodes": 2, "least_nodes": 1, "ranks_per_node": 1, "silence_seconds": 10,
            "slurm": {"gpus_per_node": 0}, "environment": {"PYTHONPATH": str(TESTS.parent)},
        },
    )  # fmt: skip
    run.mkdir()
    (run / "recipe.resolved.yaml").write_text(dump_recipe(given))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER.replace(', worker="fake_worker"', ""), str(run), "auto"], check=False,
        env={**cluster.environment, "PYTHONPATH": str(TESTS.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[-1])
    wait_until((run / "checkpoints" / "step-10").is_dir, seconds=400)
    os.kill(processes_of(run)[1], signal.SIGSTOP)
    wait_until(lambda: cluster.job(number)["Restarts"] == "1")
    log = (run / "logs" / f"slurm-{number}.log").read_text()
    assert log.count("LostRank: no sign of life for 10 s from rank 1 on ") == 1, log
    cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DRAIN", "Reason=lost")
    try:
        cluster.wait(number, "PENDING", "RUNNING")
        cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now+5")
        assert cluster.wait(number, "COMPLETED", "FAILED", seconds=400) == "COMPLETED", (run / "logs").glob("*")
    finally:
        cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    assert cluster.job(number)["NumNodes"] == "1" and "\n" in (run / "logs" / "rank-00001.log").read_text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 101))


@pytest.mark.slurm
def test_a_job_that_slurm_refuses_is_a_failed_machine_with_slurms_words(cluster, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.resolved.yaml").write_text(dump_recipe(slurm_recipe(slurm={"partition": "nowhere"})))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(run), "auto"], capture_output=True, text=True, check=False,
        env={**cluster.environment, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "MachineError: sbatch rejected the job" in done.stderr and "invalid partition" in done.stderr
    assert (run / "slurm" / "submitted.sh").is_file()


@pytest.mark.slurm
def test_training_over_two_nodes_gives_the_losses_of_training_on_one(cluster, tmp_path):
    source = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
    document = recipe_document(
        source, token_folder(tmp_path / "tokens"), schedule={"train_steps": 6},
        launch={"environment": {"PYTHONPATH": str(TESTS.parent)}},
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))

    def continue_train(run: str, *words: object) -> str:
        argv = command(
            "continue-train", tmp_path / "recipe.yaml", "--output", tmp_path / run, *words,
            before="import smolconv.commands.continue_train",
        )  # fmt: skip
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, env=environment(**cluster.environment), cwd=TESTS.parent
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    slurm = ("--launcher", "slurm", "--set", "launch.slurm.gpus_per_node=0")
    number = int(continue_train("nodes", *slurm, "--nnodes", 2, "--nproc-per-node", 1).split()[-1])
    assert cluster.wait(number, "COMPLETED", "FAILED") == "COMPLETED"
    continue_train("here", "--nproc-per-node", 2)
    assert len(losses("nodes")) == 6
    assert losses("nodes") == pytest.approx(losses("here"), abs=1e-5)
