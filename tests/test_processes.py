"""Processes of ours import nothing from the folder that the user is in, whatever lies beside the recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES
from test_launch import recipe
from training import recipe_document, token_folder

from smolconv.continual_pretraining.launchers.launch import batch_script, launch_command
from smolconv.continual_pretraining.launchers.registry import NAMES as LAUNCHERS
from smolconv.continual_pretraining.recipe.files import dump_recipe
from smolconv.processes import BOOTSTRAP, EMPTY_FOLDER, module_words, safe_children, safe_environment, script_words

TESTS = Path(__file__).parent
#: Names that a start imports early or late, of the standard library and of packages.
NAMES = ("queue", "runpy", "json", "os", "socket", "selectors", "importlib", "logging", "torch", "numpy", "deepspeed",
         "xxhash", "yaml", "sitecustomize", "usercustomize", "smolconv", "fake_worker")  # fmt: skip
LAUNCH = """
import sys
from pathlib import Path
from smolconv.continual_pretraining.launchers.launch import launch
from smolconv.continual_pretraining.recipe.files import load_recipe
run = Path(sys.argv[1])
sys.exit(launch(load_recipe(run / "recipe.resolved.yaml"), run, resume=sys.argv[2], worker="fake_worker"))
"""


@pytest.fixture
def trap(tmp_path) -> Path:
    """A folder beside whose recipe lies a module of every name, which says that it was imported, and by whom."""
    folder = tmp_path / "user"
    for package in ("continual_pretraining", "commands"):  # foreign packages of these names
        (folder / package).mkdir(parents=True)
    code = f"import sys\nopen({str(tmp_path / 'imported')!r}, 'a').write(__name__ + ' ' + ' '.join(sys.orig_argv) + '\\n')\n"
    code = code.replace("sys.orig_argv", "getattr(sys, 'orig_argv', [])")
    for name in NAMES:
        (folder / f"{name}.py").write_text(code)
    for package in ("continual_pretraining", "commands"):
        (folder / package / "__init__.py").write_text(code)
    return folder


def imported(trap: Path) -> str:
    record = trap.parent / "imported"
    return record.read_text() if record.exists() else ""


def unprotected(**changes: str) -> dict[str, str]:
    """An environment of a user who knows nothing of PYTHONSAFEPATH."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return {**kept, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1", **changes}


def run_in(folder: Path, words: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=unprotected(**changes), capture_output=True, text=True, timeout=240, check=False
    )


def test_the_trap_is_sprung_by_python_m(trap):
    run_in(trap, [sys.executable, "-m", "json.tool", "--help"])
    assert "json" in imported(trap)


def python_3_10() -> str | None:
    """An interpreter without ``-P``, which is where PYTHONSAFEPATH means nothing."""
    for place in (Path.home() / ".pyenv/versions", Path("/usr/bin"), Path("/usr/local/bin")):
        for found in sorted([*place.glob("3.10*/bin/python3.10"), *place.glob("python3.10")]):
            return str(found)
    return None


@pytest.mark.parametrize("safe", ["", "1"], ids=["without PYTHONSAFEPATH", "with it"])
@pytest.mark.parametrize("python", [sys.executable, python_3_10() or sys.executable], ids=["this", "3.10"])
def test_the_bootstrap_takes_nothing_but_its_own_folder_from_the_path(python, safe, trap, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "shown.py").write_text(
        "import json, os, queue, sys\nprint(json.dumps([sys.path, sys.argv, os.getcwd(), __name__]))\n"
    )
    words = [python, *script_words("shown", "one", "--two", folder=tmp_path)]
    for given, folder in ((words, tmp_path), ([python, *script_words("shown", "one", "--two")], trap)):
        done = run_in(trap, given, PYTHONPATH=str(tmp_path / "modules"), PYTHONSAFEPATH=safe)
        path, argv, where, name = json.loads(done.stdout)
        assert imported(trap) == "" and name == "__main__"
        assert str(trap) not in path and str(EMPTY_FOLDER) not in path and "" not in path
        assert path[0] == str(tmp_path / "modules")
        assert argv[1:] == ["one", "--two"] and Path(where).resolve() == folder.resolve()


def test_a_working_folder_that_the_user_put_on_the_path_stays_there(tmp_path):
    (tmp_path / "mine.py").write_text("print('mine')")
    for path in (str(tmp_path), ".", f":{TESTS}"):
        done = subprocess.run(
            module_words("mine"), cwd=tmp_path, env=unprotected(PYTHONPATH=path), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.stdout == "mine\n", done.stderr


def test_relative_entries_of_pythonpath_keep_their_meaning_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = safe_environment({"PYTHONPATH": "a:/b:"})
    assert made == {"PYTHONPATH": f"{tmp_path}/a:/b:{tmp_path}", "PYTHONSAFEPATH": "1"}


def test_what_a_library_starts_is_protected_only_for_as_long(monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), safe_children(RAYON_NUM_THREADS="1", SHOWN="1"):
        assert [os.environ[name] for name in ("PYTHONSAFEPATH", "RAYON_NUM_THREADS", "SHOWN")] == ["1"] * 3
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_nothing_lies_beside_the_bootstrap():
    assert [path.name for path in EMPTY_FOLDER.iterdir() if path.name != "__pycache__"] == [BOOTSTRAP.name]


@pytest.mark.parametrize("launcher", ["local", "torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_no_launcher_imports_from_the_folder_of_the_recipe(launcher, trap, tmp_path):
    """DeepSpeed's own words, without what ``launch`` adds in its environment, are in a test further down."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe(launch={"launcher": launcher})))
    (tmp_path / "start.py").write_text(LAUNCH)
    done = run_in(trap, [sys.executable, str(tmp_path / "start.py"), str(run), "auto"])
    assert done.returncode == 0, done.stderr
    assert "rank 0 step 3" in done.stderr and (run / "begun-1").exists()
    assert imported(trap) == ""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_word_of_a_launcher_is_python_m_in_the_users_folder(launcher, monkeypatch, tmp_path):
    given = recipe(launch={"launcher": launcher, "environment": {}})
    words = launch_command(given, tmp_path / "run")
    assert words[1] == str(BOOTSTRAP) and "-m" not in words and "--module" not in words
    if launcher == "deepspeed":  # it starts `python -m` itself
        assert words[2:4] == ["--in", str(EMPTY_FOLDER)]
    script = batch_script(given, tmp_path / "run")
    assert (script is not None) == (launcher == "slurm")
    if script is not None:
        assert " -m " not in script and script.count(str(BOOTSTRAP)) == 3 and "export PYTHONSAFEPATH=1" in script


@pytest.mark.slow
def test_python_3_10_imports_nothing_either_when_deepspeed_starts_its_own_launcher(trap, tmp_path):
    """There PYTHONSAFEPATH means nothing; it is left out here, and the launcher's own words must do."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    given = recipe(launch={"launcher": "deepspeed"})
    (run / "recipe.resolved.yaml").write_text(dump_recipe(given))
    (tmp_path / "words.py").write_text(
        "import json, sys\nfrom pathlib import Path\nfrom smolconv.continual_pretraining.launchers.launch import launch_command\n"
        "from smolconv.continual_pretraining.recipe.files import load_recipe\nrun = Path(sys.argv[1])\n"
        "print(json.dumps(launch_command(load_recipe(run / 'recipe.resolved.yaml'), run, worker='fake_worker')))\n"
    )
    words = json.loads(run_in(trap, [sys.executable, str(tmp_path / "words.py"), str(run)]).stdout)
    done = run_in(trap, [*words, "--attempt", "one"], FAKE="{}")
    assert done.returncode == 0, done.stderr
    assert (run / "begun-1").exists() and imported(trap) == ""


def test_the_command_and_doctor_import_nothing_from_there(trap, tmp_path):
    smolconv = Path(sys.executable).with_name("smolconv")
    words = [str(smolconv)] if smolconv.exists() else module_words("smolconv.commands.main")
    light = tmp_path / "light"  # after the user's folder where that is on the path, so that the trap is still sprung
    light.mkdir()
    for heavy in ("transformers", "accelerate", "deepspeed", "datasets", "datatrove"):
        (light / f"{heavy}.py").touch()
    done = run_in(trap, [*words, "doctor", "--json"], PYTHONPATH=f"{TESTS.parent}:{light}")
    assert done.returncode in (0, 4, 5) and json.loads(done.stdout)["commands"], done.stderr
    assert imported(trap) == ""


def test_the_real_ranks_import_nothing_from_the_folder_of_the_recipe(trap, tmp_path):
    pytest.importorskip("deepspeed")
    source = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
    changes: dict[str, Any] = {"schedule": {"train_steps": 1}}
    (trap / "recipe.yaml").write_text(
        yaml.safe_dump(recipe_document(source, token_folder(tmp_path / "tokens"), **changes))
    )
    smolconv = Path(sys.executable).with_name("smolconv")
    words = [str(smolconv)] if smolconv.exists() else module_words("smolconv.commands.main")
    done = run_in(
        trap, [*words, "continue-train", "recipe.yaml", "--output", "run", "--nproc-per-node", "1"],
        PYTHONPATH=str(TESTS.parent),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert imported(trap) == ""
