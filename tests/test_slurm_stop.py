"""`smolconv runs`, `save` and `stop` with runs in Slurm: on a real cluster of two nodes, and the script as text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES, command, environment
from slurm_cluster import SlurmCluster, missing, slurm_cluster
from test_launch import TESTS, wait_until
from test_slurm import slurm_recipe
from training import metrics, recipe_document, token_folder

from smolconv.continual_pretraining.launchers.launch import batch_script


@pytest.mark.parametrize("status", [75, 130])
@pytest.mark.parametrize("asked", [True, False])
def test_a_job_that_was_stopped_by_request_is_not_queued_again(tmp_path, status, asked):
    """The script is run by bash with programs in place of Slurm's; a request to another start counts for nothing."""
    run = tmp_path / "a run"
    folder = run / "logs" / "asked" / ("7-1" if asked else "7-0")
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    for name, text in {
        "srun": f"exit {status}", "python": f"exit {status}", "scontrol": f"echo $* >> {tmp_path}/scontrol-asked",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    text = batch_script(slurm_recipe(), run)
    assert text is not None
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1",
                 "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host[1-2]"}  # fmt: skip
    done = subprocess.run(
        ["bash"], input=text.replace(sys.executable, str(tmp_path / "python")), env=variables, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    queued = "requeue 7\n" in (tmp_path / "scontrol-asked").read_text()
    assert done.returncode == status and queued is not asked, done.stderr
    assert ("not requeued" in done.stderr) is asked


# --- a real cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Shell:
    """The command line on the cluster's login node, beside a recipe for two nodes."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        source = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
        document = recipe_document(
            source, token_folder(folder / "tokens"), schedule={"train_steps": 100_000},
            launch={
                "launcher": "slurm", "nodes": 2, "ranks_per_node": 1, "slurm": {"gpus_per_node": 0},
                "environment": {"PYTHONPATH": str(TESTS.parent)},
            },
        )  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(document))

    def __call__(self, *words: object) -> str:
        done = subprocess.run(
            command(*words), capture_output=True, text=True, check=False, cwd=self.folder,
            env=environment(**{**self.cluster.environment, "PYTHONPATH": str(TESTS.parent)}),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: object) -> int:
        return int(self("continue-train", "recipe.yaml", "--output", "run", *words).split()[-1])

    def state(self) -> dict[str, Any]:
        (found,) = json.loads(self("runs", "--json"))["runs"]
        return found


@pytest.mark.slurm
def test_a_run_on_two_nodes_saves_stops_and_goes_on_by_commands(cluster, tmp_path):
    shell, run = Shell(cluster, tmp_path), tmp_path / "run"
    number = shell.submit()
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2, seconds=180)
    found = shell.state()
    assert (found["state"], found["certain"], found["launcher"]) == ("running", True, "slurm")
    assert (found["job"], found["ranks"], found["nodes"]) == (number, 2, 2)
    saved = json.loads(shell("save", "run", "--json"))
    assert saved["result"] == "saved" and (tmp_path / saved["checkpoint"] / "trainer.json").is_file()
    assert cluster.state(number) == "RUNNING"
    stopped = json.loads(shell("stop", "run", "--json"))
    assert (stopped["result"], stopped["exit_code"]) == ("stopped", 75)
    last = metrics(run)[-1]["step"]
    assert stopped["checkpoint"] == f"run/checkpoints/step-{last}"
    assert cluster.wait(number, "COMPLETED", "FAILED", "PENDING") == "FAILED"
    job = cluster.job(number)
    assert (job["ExitCode"], job["Restarts"]) == ("75:0", "0")
    assert "not requeued" in (run / "logs" / f"slurm-{number}.log").read_text()
    assert (shell.state()["state"], shell.state()["step"]) == ("stopped", last)

    again = shell.submit("--set", f"schedule.train_steps={last + 3}")
    assert cluster.wait(again, "COMPLETED", "FAILED") == "COMPLETED"
    assert [line["step"] for line in metrics(run)] == list(range(1, last + 4))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    jobs = {event["kind"]: event.get("job") for event in events if event["kind"] in ("started", "resumed")}
    assert jobs == {"started": number, "resumed": again}
    assert shell.state()["state"] == "finished"


@pytest.mark.slurm
def test_a_job_that_waits_is_pending_and_is_cancelled_by_stop(cluster, tmp_path):
    shell = Shell(cluster, tmp_path)
    number = shell.submit("--set", "launch.slurm.options=['--hold']")
    assert (shell.state()["state"], shell.state()["job"]) == ("pending", number)
    assert json.loads(shell("stop", "run", "--json"))["result"] == "cancelled"
    assert cluster.wait(number, "CANCELLED", seconds=30) == "CANCELLED"
    assert shell.state()["state"] == "new"
