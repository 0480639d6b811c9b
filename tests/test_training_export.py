"""What a run exports after its last step, from the command line: whole, and pushed by the real client of the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import FIXTURES, files_below
from fake_hub import FakeHub
from training import metrics, recipe_document, token_folder

from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

SOURCE = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"


def train(recipe: Path, hub: FakeHub, home: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_fake", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", "from smolconv.commands.main import main; main()", "continue-train", str(recipe)]
    return subprocess.run(command, env={**clean, **settings}, capture_output=True, text=True, timeout=240, check=False)


def test_a_run_pushes_its_export_and_a_failed_push_is_made_up_for_by_the_same_command(tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    document = recipe_document(
        SOURCE, token_folder(tmp_path / "tokens"), output=str(run), schedule={"train_steps": 2},
        export={"formats": ["nanotron", "hf"], "push": "lab/smol"},
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump(document))
    with FakeHub() as hub:
        hub.fail("POST /api/repos/create", status=401)
        failed = train(recipe, hub, tmp_path / "home")
        assert failed.returncode == 4 and "hf auth login" in failed.stderr, failed.stderr
        assert (run / "checkpoints" / "latest").read_text().strip() == "step-2"
        assert read_checkpoint(run / "export" / "nanotron", ReadOptions()).parameters

        hub.failures.clear()
        again = train(recipe, hub, tmp_path / "home")
        assert again.returncode == 0, again.stderr
        assert "pushed " in again.stderr and [line["step"] for line in metrics(run)] == [1, 2]
        pushed = hub.repositories["lab/smol"]
        there = pushed.commits[pushed.branches["main"]]
    card = there["README.md"].decode()
    assert "2 steps" in card and "bit for bit" in card and str(tmp_path) not in card
    adapted = ("README.md", "smolconv_manifest.json")
    here = {path: data for path, data in files_below(run / "export" / "hf").items() if path not in adapted}
    assert {"config.json", "model.safetensors"} <= set(here)
    assert {path: there[path] for path in here} == here


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ({"push": "no-owner"}, "export.push"),
        ({"push": "lab/smol", "formats": ["nanotron"]}, "export.push uploads the hf format"),
    ],
)
def test_a_push_that_could_only_fail_after_the_last_step_is_refused_at_the_start(tmp_path, export, says) -> None:
    recipe = tmp_path / "recipe.yaml"
    document = recipe_document(SOURCE, tmp_path / "tokens", output=str(tmp_path / "run"), export=export)
    recipe.write_text(yaml.safe_dump(document))
    with FakeHub() as hub:
        done = train(recipe, hub, tmp_path / "home")
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
