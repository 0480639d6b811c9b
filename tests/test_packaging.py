"""The wheel and the sdist, built offline from a copy of the tracked files: what is in them, and that it runs anywhere."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import FIXTURES, environment, files_below
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from smolconv.version import __version__

ROOT = Path(__file__).parent.parent
TINY = FIXTURES / "nanotron/smollm2-tiny/tp2-pp1-dp2-zero1"
#: Where our packages lie in the repository and, in a wheel, within smolconv.
LINKED = ("commands", "continual_pretraining")
#: Modules that are torch itself: pyproject.toml lets these alone import it at their top.
NEED_TORCH = {"engine.attention", "engine.model", "engine.sequence", "engine.tiling", "run.trainer"}


class Built(NamedTuple):
    """What setuptools made, unpacked, and every word that it said meanwhile."""

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path
    said: str


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone: git does not say which files are tracked")
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def build(source: Path, what: str) -> tuple[Path, str]:
    """The file that setuptools' ``build_sdist`` or ``build_wheel`` makes of ``source``, and what it said."""
    out = source / "dist"
    code = f"import setuptools.build_meta as backend; backend.{what}({str(out)!r})"
    # Where nothing may write bytecode, setuptools warns that it will not compile what it was not to compile anyway.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], cwd=source, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = [path for path in out.iterdir() if path.suffix == (".whl" if what == "build_wheel" else ".gz")]
    return made, done.stdout + done.stderr


def copy_of_the_clone(folder: Path) -> Path:
    for name in tracked_files():
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to, follow_symlinks=False)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Each from a copy of its own: setuptools reads back the lists of files that it has left there before."""
    folder = tmp_path_factory.mktemp("packaging")
    for copy in ("for-wheel", "for-sdist"):
        copy_of_the_clone(folder / copy)
    wheel, said = build(folder / "for-wheel", "build_wheel")
    sdist, more = build(folder / "for-sdist", "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist")
    (unpacked,) = (folder / "sdist").iterdir()
    shutil.copytree(unpacked, folder / "sdist-for-wheel")
    again, last = build(folder / "sdist-for-wheel", "build_wheel")
    for path, name in ((wheel, "wheel"), (again, "wheel-of-sdist")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / name)
    return Built(folder / "wheel", unpacked, folder / "wheel-of-sdist", said + more + last)


def product() -> dict[str, bytes]:
    """Every tracked file of the product, by the path that it has when it is installed."""
    inside = {f"smolconv/{name}" if name.split("/")[0] in LINKED else name: ROOT / name for name in tracked_files()}
    return {
        name: path.read_bytes()
        for name, path in inside.items()
        if name.startswith("smolconv/") and not path.is_symlink()
    }


def test_the_wheel_holds_exactly_the_tracked_files_of_the_product(built: Built) -> None:
    files = files_below(built.wheel)
    assert {path.name for path in built.wheel.iterdir()} == {"smolconv", _metadata(built.wheel).name}
    assert {name: data for name, data in files.items() if name.startswith("smolconv/")} == product()
    assert {
        "smolconv/py.typed", "smolconv/verification/prompts.txt", "smolconv/bootstrap/run_module.py",
        "smolconv/commands/main.py", "smolconv/continual_pretraining/recipes/try-out.yaml",
    } <= set(files)  # fmt: skip


def test_the_sdist_makes_the_same_wheel(built: Built) -> None:
    assert files_below(built.wheel_of_sdist) == files_below(built.wheel)


def test_the_sdist_holds_the_product_and_what_is_read_about_it(built: Built) -> None:
    read = {
        name for name in tracked_files() if name.startswith("docs/") or re.fullmatch(r"[A-Z]+\.md|CITATION\.cff", name)
    }
    made = {"PKG-INFO", "setup.cfg", "LICENSE", "MANIFEST.in", "pyproject.toml"}
    held = {name for name in files_below(built.sdist) if not name.startswith("smolconv.egg-info/")}
    assert held == product().keys() | read | made


def test_setuptools_has_nothing_to_warn_of(built: Built) -> None:
    assert "smolconv/commands/main.py" in built.said
    assert [line for line in built.said.splitlines() if re.search("warn|deprecat", line, re.IGNORECASE)] == []


# --- where it is installed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with other people's packages of the names that ours have in the repository."""
    folder = tmp_path_factory.mktemp("foreign")
    for name in LINKED:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('a foreign {name} was imported')\n")
    return folder


def run(code: str, *words: object, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as a script, with ``path`` before all that is installed."""
    script = cwd / "script.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        cwd=cwd, env=environment(PYTHONPATH=os.pathsep.join(map(str, path))), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("first", ["foreign", "ours"])
def test_the_wheel_runs_beside_foreign_packages_called_as_ours_are_in_the_repository(
    built: Built, foreign: Path, tmp_path: Path, first: str
) -> None:
    path = [foreign, built.wheel] if first == "foreign" else [built.wheel, foreign]
    entry = re.search(r"^smolconv = ([\w.]+):(\w+)$", (_metadata(built.wheel) / "entry_points.txt").read_text(), re.M)
    assert entry is not None
    module, function = entry.groups()
    # What pip writes for a console script, and whose code it is.
    code = f"import sys\nfrom {module} import {function}\nprint(sys.modules[{module!r}].__file__)\n{function}()\n"
    main = str(built.wheel / "smolconv/commands/main.py")
    helped = run(code, "--help", path=path, cwd=tmp_path)
    assert (helped.returncode, helped.stdout.splitlines()[0]) == (0, main), helped.stderr
    assert "continue-train" in helped.stdout
    listed = run(code, "recipe", "list", path=path, cwd=tmp_path)
    assert listed.returncode == 0 and "smollm3-3b-decay" in listed.stdout, listed.stderr
    converted = run(code, "convert", TINY, tmp_path / "hf", "--to", "hf", path=path, cwd=tmp_path)
    assert converted.returncode == 0, converted.stderr
    assert (tmp_path / "hf/model.safetensors").is_file()


_IMPORT_ALL = """
import importlib, json, os, pkgutil, sys
sys.modules["torch"] = None  # as where it is not installed
import smolconv
lacking = []
for found in pkgutil.walk_packages(smolconv.__path__, "smolconv."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] == "torch", error
        lacking.append(found.name)
root = os.path.dirname(os.path.dirname(os.path.realpath(smolconv.__file__)))
files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
files = {name: os.path.realpath(file) for name, file in files.items() if file and name != "__main__"}
print(json.dumps([lacking, {name: file for name, file in files.items() if file.startswith(root) and "site-packages" not in file}]))
"""


@pytest.mark.parametrize("place", ["wheel", "repository"])
def test_every_module_is_imported_under_one_name_and_needs_no_torch(
    built: Built, foreign: Path, tmp_path: Path, place: str
) -> None:
    """In the repository both names of a module can be imported, and a class would then be two."""
    done = run(_IMPORT_ALL, path=[foreign, built.wheel] if place == "wheel" else [ROOT], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lacking, files = json.loads(done.stdout)
    assert set(lacking) == {f"smolconv.continual_pretraining.{name}" for name in NEED_TORCH}
    assert {name.partition(".")[0] for name in files} == {"smolconv"}
    assert len(set(files.values())) == len(files) > 80
    assert all(file.startswith(str(built.wheel if place == "wheel" else ROOT)) for file in files.values())


def test_no_source_names_a_module_of_ours_without_smolconv_before_it() -> None:
    bare = re.compile(rf"({'|'.join(LINKED)})(\.[A-Za-z_]\w*)*")
    found = []
    for name in tracked_files():
        source = (ROOT / name).read_text(encoding="utf-8") if name.endswith(".py") else ""
        if not re.search(rf"(?<![\w./])({'|'.join(LINKED)})\b", source):
            continue
        for node in ast.walk(ast.parse(source)):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named = [str(node.module)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                named = [node.value]  # what is monkeypatched, or run as a module
            found += [f"{name}:{getattr(node, 'lineno', 0)} {each}" for each in named if bare.fullmatch(each)]
    assert found == []


def _metadata(site: Path) -> Path:
    (folder,) = site.glob("*.dist-info")
    return folder


def test_every_pinned_version_that_python_3_10_cannot_install_is_pinned_for_later_pythons_only():
    """pip would end with ResolutionImpossible in `make demo` where python3 is 3.10, as on Ubuntu 22.04."""
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    seen = 0
    for pin in pins:
        try:
            installed = importlib.metadata.metadata(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not pin.specifier.contains(installed["Version"]):
            continue  # another version's metadata says nothing about this one
        seen += 1
        for_3_10 = pin.marker is None or pin.marker.evaluate({"python_version": "3.10"})
        assert not for_3_10 or SpecifierSet(installed["Requires-Python"] or "").contains("3.10.99"), str(pin)
    assert seen > 50


def test_the_citation_names_this_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0" and cited["cff-version"] == "1.2.0"


def test_the_workflow_runs_what_everybody_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == ["bash .ci/run"]


@pytest.mark.slow
def test_make_dist_builds_an_sdist_and_a_wheel_that_twine_accepts(tmp_path: Path) -> None:
    clone = copy_of_the_clone(tmp_path / "clone")
    done = subprocess.run(
        ["make", "dist", f"PYTHON={sys.executable}"], cwd=clone, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if "No matching distribution found" in done.stderr:
        pytest.skip("pip has no index with build and twine here")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (clone / "dist").iterdir()} == {
        f"smolconv-{__version__}.tar.gz", f"smolconv-{__version__}-py3-none-any.whl"
    }  # fmt: skip
    assert done.stdout.count("PASSED") == 2, done.stdout


def test_the_image_gets_the_wheel_and_its_versions_and_nothing_else_of_the_clone():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    steps = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if re.match("[A-Z]+ ", line)]
    copied = [word for step in steps if step[0] in ("COPY", "ADD") for word in step[1:-1]]
    assert ignored[0] == "*" and {f"!{path}" for path in copied} == set(ignored[1:])
    assert [step[1] for step in steps if step[0] == "USER"] == ["10001"]
    assert not [step for step in steps if step[0] in ("ENV", "ARG") and re.search("TOKEN|SECRET|KEY", " ".join(step))]
