"""What all tests share: real checkpoints, conversion in this process, and the console script in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import forked_cli
import pytest

from smolconv.conversion import ConversionResult, ConvertOptions, plan_conversion, run_conversion

#: Real checkpoints; fixtures/README.md says which program wrote which.
FIXTURES = Path(__file__).parent.parent / "fixtures"
#: Keywords of ``convert`` that say how to write, not what.
_RUN_OPTIONS = ("resume", "overwrite", "workers", "max_memory_bytes", "progress", "verifier")
#: Files that take longest, which begin first, so that no process is left with one at the end. The rest is as it is found.
_LONG = (
    "launch", "interruption", "training_parts", "deepspeed_engine", "verify", "false_alarms", "verify_forward", "gguf",
    "torch_archive", "training_resume", "processes", "sequence_parallel", "training_model", "training_losses",
    "bad_input", "deepspeed_bad_input", "programs", "tokenize", "nothing_executes", "directions", "communication",
    "training_export", "doctor", "resume_damage", "engines", "gpu_check", "estimate", "fuzz", "token_record",
    "continue_train", "run_checkpoints", "node_failure", "runs", "deepspeed_names", "training_frozen",
    "training_bad_input", "verify_report", "packaging", "docs", "publish", "proof", "api",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(_LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


class Finished(NamedTuple):
    """A process that has ended."""

    code: int
    stdout: str
    stderr: str


def nanotron_topologies() -> list[Path]:
    """Every run folder that nanotron wrote: our fixtures, and those below $SMOLCONV_ORACLES/nanotron."""
    roots = [FIXTURES / "nanotron"]
    if os.environ.get("SMOLCONV_ORACLES"):
        roots.append(Path(os.environ["SMOLCONV_ORACLES"]) / "nanotron")
    return sorted(path.parent for root in roots for path in root.glob("*/*/latest.txt"))


def deepspeed_cases() -> list[Path]:
    """Every folder with a checkpoint that DeepSpeed wrote: our fixtures, and those below $SMOLCONV_ORACLES/deepspeed."""
    found = list((FIXTURES / "deepspeed").glob("*/checkpoint"))
    if os.environ.get("SMOLCONV_ORACLES"):
        found += (Path(os.environ["SMOLCONV_ORACLES"]) / "deepspeed").glob("*/*/checkpoint")
    return sorted(path.parent for path in found)


def topology_id(folder: Path) -> str:
    """A run folder's name in test ids: smollm2-tiny/tp2-pp1-dp2-zero1."""
    return f"{folder.parent.name}/{folder.name}"


def convert(source: str | Path, target: Path, to: str, **options: Any) -> ConversionResult:
    """Convert in this process; ``options`` are fields of ``ConvertOptions`` and keywords of ``run_conversion``."""
    run = {name: options.pop(name) for name in _RUN_OPTIONS if name in options}
    return run_conversion(plan_conversion(source, target, ConvertOptions(to=to, **options)), **run)


def hf_weights(folder: Path) -> dict[str, Any]:
    """A Hugging Face folder's tensors by name, as the safetensors library loads them into torch."""
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's content, by its path relative to ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*words: object, before: str = "") -> list[str]:
    """The argv of ``smolconv`` with these words, in a Python that runs ``before`` first."""
    start = (
        ["-m", "smolconv.commands.main"]
        if not before
        else ["-c", f"{before}\nfrom smolconv.commands.main import main\nmain()"]
    )
    return [sys.executable, *start, *map(str, words)]


def environment(**changes: str) -> dict[str, str]:
    """Ours, without the network, for a terminal of 200 columns."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **changes}


class Touch:
    """Unpickling this makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.canary)!r}, 'w')",)


#: Commands whose start tests do not look at.
_FORKED = frozenset(
    {"convert", "inspect", "diff", "verify", "import-gguf", "recipe", "runs", "stop", "save", "publish"}
)


def run_cli(
    *words: object, before: str = "", env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Finished:
    """Run ``smolconv`` with these words in a process of its own: a Python's where it matters how that starts."""
    given = [str(word) for word in words]
    if not before and not env and given[:1] and given[0] in _FORKED:
        return Finished(*forked_cli.run(given, cwd, torch=bool({"verify", "--verify", "publish"} & set(given))))
    done = subprocess.run(
        command(*words, before=before), capture_output=True, text=True, timeout=300, check=False, cwd=cwd,
        env=environment(**(env or {})),
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli() -> Callable[..., Finished]:
    """The console script: ``code, stdout, stderr = cli("inspect", folder)``."""
    return run_cli


@pytest.fixture(params=nanotron_topologies(), ids=topology_id)
def nanotron_folder(request: pytest.FixtureRequest) -> Path:
    """Each run folder that nanotron wrote, in turn."""
    return Path(request.param)
