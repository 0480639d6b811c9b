"""smolconv doctor: what it says is there is what commands can import, and what it calls wrong is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, run_cli

from smolconv import doctor
from smolconv.errors import pip_install


def shadowed(folder: Path, name: str, code: str) -> dict[str, str]:
    """An environment in which ``import name`` runs ``code``."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One whole run, where datatrove does not import and a compilation of DeepSpeed's was killed."""
    folder = tmp_path_factory.mktemp("doctor")
    lock = folder / "extensions/py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    broken = shadowed(folder / "modules", "datatrove", "raise ImportError('built for another torch')")
    return run_cli("doctor", "--json", env={**broken, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")})


@pytest.fixture(scope="module")
def report(found: Finished) -> dict[str, Any]:
    assert found.code == 0, found.stderr
    document: dict[str, Any] = json.loads(found.stdout)
    return document


def test_versions_are_those_that_are_installed(report):
    packages = {each["name"]: each["version"] for state in report["commands"].values() for each in state["packages"]}
    assert {"numpy", "torch", "transformers", "deepspeed", "datatrove", "huggingface-hub", "gguf"} <= set(packages)
    assert packages.pop("lm-eval") in (None, "0.4.13")  # of an extra that dev does not have
    assert packages == {name: importlib.metadata.version(name) for name in packages}


def test_commands_whose_packages_import_are_ready_and_the_others_say_which_does_not(report):
    assert {name for name, state in report["commands"].items() if state["ready"]} == set(doctor.EXTRAS) - {
        "tokenize",
        "evaluate",
    }
    broken = [each for each in report["commands"]["tokenize"]["packages"] if each["problem"]]
    assert [(each["name"], each["problem"]) for each in broken] == [
        ("datatrove", "ImportError: built for another torch")
    ]
    assert any(each.startswith("datatrove ") and "built for another torch" in each for each in report["problems"])


def test_a_lock_that_every_start_would_wait_for_is_named(report):
    assert [each for each in report["problems"] if "cpu_adam/lock" in each]


def test_the_lock_is_looked_for_where_torch_compiles(monkeypatch, tmp_path):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    lock.touch()
    assert doctor._stale_locks() == [lock]


def test_a_user_without_a_home_is_no_bug(monkeypatch):
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert doctor._stale_locks() == []


def test_the_machine_is_the_one_that_it_runs_on(report):
    machine, torch = report["machine"], report["torch"]
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["disk_free_bytes"] == pytest.approx(shutil.disk_usage(".").free, rel=0.2)
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < machine["memory_bytes"] <= memory
    if not doctor.has_nvidia():
        assert (torch["gpus"], torch["attention"]) == ([], "documents")


def test_launchers_say_which_programs_they_lack(importable, tmp_path):
    importable.setenv("PATH", str(tmp_path))
    lacking = {"local": [], "torchrun": [], "deepspeed": ["pdsh"], "slurm": ["sbatch", "srun"]}
    assert doctor.diagnose().launchers == lacking
    for name in ("sbatch", "pdsh"):
        (tmp_path / name).touch(mode=0o755)
    assert doctor.diagnose().launchers == {**lacking, "deepspeed": [], "slurm": ["srun"]}


@pytest.fixture
def importable(monkeypatch):
    """Nothing is imported: for what is decided from versions alone."""
    monkeypatch.setattr(doctor, "_import_problem", lambda name: None)
    monkeypatch.setattr(doctor, "_ask_torch", lambda: None)
    return monkeypatch


def test_what_is_missing_is_named_with_the_command_that_brings_it(importable):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    importable.setattr(importlib.metadata, "version", version)
    state = doctor.diagnose().commands["continue-train"]
    assert not state.ready
    assert (
        state.install is not None and state.install.startswith("pip install 'deepspeed") and "0.19.9" in state.install
    )
    assert [package.name for package in state.packages if package.version is None] == ["deepspeed"]


def test_no_advice_asks_an_index_for_smolconv_itself(monkeypatch):
    assert (
        pip_install(["torch", "huggingface_hub", "sbatch"]) == "pip install 'torch>=2.4' 'huggingface-hub>=0.30' sbatch"
    )
    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert pip_install(["torch"]) == "pip install torch"
    root = Path(__file__).parent.parent
    sources = [path for top in ("smolconv", "commands", "continual_pretraining") for path in (root / top).rglob("*.py")]
    assert len(sources) > 100
    assert [path for path in sources if "smolconv[" in path.read_text()] == []


def not_installed(name: str) -> list[str]:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_version_that_smolconv_cannot_work_with_is_a_problem(importable):
    real = importlib.metadata.version
    importable.setattr(importlib.metadata, "version", lambda name: "4.40.0" if name == "transformers" else real(name))
    diagnosis = doctor.diagnose()
    assert not diagnosis.commands["verify"].ready
    assert not diagnosis.commands["continue-train"].ready  # its extra includes verify's
    assert diagnosis.commands["convert"].ready
    assert any("transformers 4.40.0" in each and ">=4.53" in each for each in diagnosis.problems)


def test_a_deepspeed_that_was_not_tried_is_a_problem(importable):
    real = importlib.metadata.version
    importable.setattr(importlib.metadata, "version", lambda name: "0.16.9" if name == "deepspeed" else real(name))
    diagnosis = doctor.diagnose()
    assert not diagnosis.commands["continue-train"].ready and diagnosis.commands["verify"].ready
    assert any(
        each.startswith("deepspeed 0.16.9 cannot be used: smolconv needs deepspeed") for each in diagnosis.problems
    )


@pytest.mark.parametrize(("free", "told"), [(64 << 20, True), (8 << 30, False)])
def test_shared_memory_that_is_too_small_for_nccl_is_a_problem(importable, free, told):
    machine = doctor.Machine(
        system="", python="", cores=1, memory_bytes=None, shared_memory_bytes=free, open_files=1024, disk_free_bytes=1
    )
    importable.setattr(doctor, "_machine", lambda: machine)
    assert any("/dev/shm" in each for each in doctor.diagnose().problems) == told


@pytest.mark.parametrize(("cuda", "gpus", "told"), [(None, [], "without CUDA"), ("13.0", [], "torch sees none")])
def test_a_gpu_that_torch_cannot_use_is_a_problem(importable, cuda, gpus, told):
    importable.setattr(doctor, "has_nvidia", lambda: True)
    importable.setattr(doctor, "_ask_torch", lambda: {"cuda": cuda, "gpus": gpus})
    assert any(told in each for each in doctor.diagnose().problems)


def test_every_extra_of_a_command_is_one_that_the_package_has():
    extras = set(importlib.metadata.metadata("smolconv").get_all("Provides-Extra"))
    assert {extra for extra in doctor.EXTRAS.values() if extra} == extras - {
        "all",
        "dev",
        "gpu",
        "plot",
    }  # plot makes pages without any


def test_for_a_command_that_cannot_run_the_exit_code_is_5(tmp_path):
    for heavy in ("torch", "transformers", "accelerate", "deepspeed", "datasets", "datatrove"):
        shadowed(tmp_path, heavy, "")  # seconds of imports that the exit code does not ask for
    done = run_cli(
        "doctor", "--for", "tokenize", "--json", env=shadowed(tmp_path, "orjson", "raise ImportError('no such symbol')")
    )
    assert done.code == 5
    assert (
        done.stderr.splitlines()[-1] == "NotInstalled: tokenize cannot run here: orjson: ImportError: no such symbol."
    )
    commands = json.loads(done.stdout)["commands"]  # one document
    assert not commands["tokenize"]["ready"] and commands["convert"]["ready"]


def test_a_command_that_is_not_there_is_a_usage_error():
    done = run_cli("doctor", "--for", "fly")
    assert (done.code, done.stdout) == (2, "")
    assert set(re.findall(r"'([a-z-]+)'", done.stderr.partition("is not one of")[2])) == set(doctor.EXTRAS)
