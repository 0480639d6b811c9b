"""Checks what this machine has for each command, and what would fail: ``smolconv doctor``.

Each package is imported in its own process, as a command would: the installed version does not show whether a package
was built for another torch. Requirements are read from smolconv's metadata, so nothing is listed twice.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.evaluation.lighteval_engine import LIGHTEVAL_PYTHON, lacking_lighteval
from smolconv.continual_pretraining.launchers.registry import NAMES, find_launcher
from smolconv.continual_pretraining.run.ranks import NVIDIA
from smolconv.errors import pip_install
from smolconv.processes import EMPTY_FOLDER, safe_environment, usable_cores
from smolconv.progress import Bar, no_bar
from smolconv.version import __version__

#: The extra that each command needs besides the base installation; None: nothing.
EXTRAS: Mapping[str, str | None] = {
    "convert": None,
    "hub": "hub",  # hf:// sources and --push
    "verify": "verify",
    "continue-train": "train",
    "tokenize": "data",
    "import-gguf": "gguf",
    "evaluate": "evaluate",  # tasks by lm-eval; lighteval has its own environment
}
#: Optional packages that training uses on a GPU.
_FASTER = ("flash-attn", "liger-kernel")
_IMPORT_SECONDS = 300
#: Docker's default of 64 MB is too small for NCCL, which fails only in the middle of a start.
_SHARED_MEMORY_BYTES = 1 << 30
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?\s*\(?([^;)]*)\)?(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?")
#: What torch reports about this machine, in its own process, because importing torch takes seconds and memory.
_TORCH = """
import json, torch
from smolconv.continual_pretraining.engine.attention import choose_attention
count = torch.cuda.device_count()
gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
print(json.dumps({
    "cuda": torch.version.cuda,
    "gpus": [{"name": gpu.name, "bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus],
    "attention": choose_attention("auto", "cuda:0" if gpus else "cpu", torch.bfloat16),
    "cpu_bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
}))
"""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution that a command imports."""

    name: str
    wanted: str  #: such as ">=2.4"; empty: any version
    version: str | None  #: None: not installed
    problem: str | None  #: why it cannot be used


@dataclass(frozen=True, kw_only=True)
class CommandState:
    """Whether a command can run here."""

    ready: bool
    install: str | None  #: the command to install what is missing, if it cannot
    packages: Sequence[Package]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts from the operating system; None if it does not report them."""

    system: str
    python: str
    cores: int  #: that this process may run on
    memory_bytes: int | None  #: of the machine, or of the container if that is less
    shared_memory_bytes: int | None  #: free in /dev/shm
    open_files: int  #: that a process may have
    disk_free_bytes: int  #: on the disk of the working folder


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All results."""

    smolconv: str
    machine: Machine
    commands: Mapping[str, CommandState]
    faster: Sequence[Package]  #: optional packages for training on a GPU
    torch: Mapping[str, Any] | None  #: ``cuda``, ``gpus``, ``attention``, ``cpu_bf16``; None without torch
    launchers: Mapping[str, Sequence[str]]  #: name -> its missing programs
    problems: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


def diagnose(bar: Bar = no_bar) -> Diagnosis:
    """Check everything. Takes as long as importing torch, transformers, DeepSpeed and datatrove: seconds."""
    wanted = {command: _wanted(extra) for command, extra in EXTRAS.items()}
    versions = {name: version for needs in wanted.values() for name, version in needs.items()}
    looked_at = {**versions, **dict.fromkeys(_FASTER, "")}
    with bar("importing packages", len(looked_at)) as advance, ThreadPoolExecutor(max(2, usable_cores())) as pool:

        def look(name: str, wanted: str) -> Package:
            found = _package(name, wanted)
            advance(1)
            return found

        found_all = dict(zip(looked_at, pool.map(look, looked_at, looked_at.values())))
    packages, faster = {name: found_all[name] for name in versions}, [found_all[name] for name in _FASTER]
    commands = {}
    for command, needs in wanted.items():
        found = [packages[name] for name in needs]
        ready = all(package.version is not None and package.problem is None for package in found)
        unusable = (package.name for package in found if package.version is None or package.problem is not None)
        install = None if ready else pip_install(unusable)
        commands[command] = CommandState(ready=ready, install=install, packages=found)
    machine, torch = _machine(), None
    if packages["torch"].version is not None and packages["torch"].problem is None and commands["verify"].ready:
        torch = _ask_torch()
    everything = [*packages.values(), *faster]
    return Diagnosis(
        smolconv=__version__, machine=machine, commands=commands, faster=faster, torch=torch,
        launchers={
            name: [program for program in find_launcher(name).programs if shutil.which(program) is None]
            for name in NAMES
        },
        problems=_problems(everything, machine, torch),
    )  # fmt: skip


# --- packages --------------------------------------------------------------------------------------------------------


def _wanted(extra: str | None) -> dict[str, str]:
    """Distribution -> versions that smolconv requires, for the base installation or an extra."""
    found: dict[str, str] = {}
    for line in importlib.metadata.requires("smolconv") or ():
        match = _REQUIREMENT.match(line)
        if match is None or match[4] != extra:
            continue
        if match[1] == "smolconv":  # an extra that includes others
            for other in match[2].split(","):
                found |= _wanted(other)
        else:
            found[match[1]] = match[3].strip()
    return found


def _package(name: str, wanted: str) -> Package:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name=name, wanted=wanted, version=None, problem=None)
    problem = None if _fits(version, wanted) else f"smolconv needs {name}{wanted}"
    return Package(name=name, wanted=wanted, version=version, problem=problem or _import_problem(name))


def _fits(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # installed with every package whose version matters
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _import_problem(name: str) -> str | None:
    module = {"pyyaml": "yaml"}.get(name, name.replace("-", "_"))
    ended = _python(f"import {module}")
    if ended is None:
        return f"importing it did not end within {_IMPORT_SECONDS} s"
    if ended.returncode == 0:
        return None
    said = ended.stderr.strip().splitlines()
    return said[-1][:300] if said else f"importing it ended with {ended.returncode}"


def _python(code: str) -> subprocess.CompletedProcess[str] | None:
    """Run it as a command would, in a folder from which nothing is imported; None if it does not end."""
    environment = safe_environment({**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    try:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", env=environment,
            timeout=_IMPORT_SECONDS, check=False, cwd=EMPTY_FOLDER,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None


def _ask_torch() -> Mapping[str, Any] | None:
    ended = _python(_TORCH)
    if ended is None or ended.returncode:
        return None
    with contextlib.suppress(ValueError, IndexError):  # something else was printed last, when Python ended
        answer: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
        return answer
    return None


# --- the machine -----------------------------------------------------------------------------------------------------


def _machine() -> Machine:
    shared = Path("/dev/shm")
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        cores=usable_cores(),
        memory_bytes=machine_memory_bytes(),
        shared_memory_bytes=shutil.disk_usage(shared).free if shared.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disk_free_bytes=shutil.disk_usage(".").free,
    )


def machine_memory_bytes() -> int | None:
    """Memory of the machine, or of the container if that is less; None if not known."""
    found = []
    with contextlib.suppress(ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # "max", or no such kind of limit
            continue
    return min(found, default=None)


def _problems(packages: Sequence[Package], machine: Machine, torch: Mapping[str, Any] | None) -> list[str]:
    """Problems, with what to do about each."""
    found = [
        f"{package.name} {package.version} cannot be used: {package.problem}."
        for package in packages
        if package.version is not None and package.problem is not None
    ]
    if torch is not None and torch["cuda"] is None and has_nvidia():
        found.append("this machine has an NVIDIA GPU, but torch was built without CUDA. Install torch for CUDA.")
    if torch is not None and torch["cuda"] is not None and has_nvidia() and not torch["gpus"]:
        found.append(
            "this machine has an NVIDIA GPU, but torch sees none. Check nvidia-smi and CUDA_VISIBLE_DEVICES; the "
            "driver may be too old for this torch."
        )
    if (python := os.environ.get(LIGHTEVAL_PYTHON)) and (reason := lacking_lighteval(python)) is not None:
        found.append(f"{LIGHTEVAL_PYTHON}: {reason}. smolconv evaluate --engine lighteval explains how to create one.")
    for lock in _stale_locks():
        found.append(
            f"{lock}: an extension of DeepSpeed is being compiled, or was when its process was killed. Every start "
            "that needs it silently waits for this file. Delete it if nothing is compiling."
        )
    if machine.shared_memory_bytes is not None and machine.shared_memory_bytes < _SHARED_MEMORY_BYTES:
        found.append(
            f"/dev/shm has {machine.shared_memory_bytes / 1e6:.0f} MB free. NCCL fails in the middle of a start with "
            "so little: start the container with --shm-size 8g, or with --ipc host."
        )
    return found


def has_nvidia() -> bool:
    """Whether NVIDIA's driver is loaded, regardless of torch."""
    return NVIDIA.exists()


def _stale_locks() -> list[Path]:
    # As torch finds it. expanduser does not fail for a user without a home, as in a container.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")
    return sorted([*place.glob("*/lock"), *place.glob("*/*/lock")])
