"""Finds task files on this machine, and defines an engine's result for a task."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.errors import CorruptFile, MissingFile, UsageError, some_of
from smolconv.files import read_bytes
from smolconv.parsing import parse_yaml_mapping

#: The folder with the task that ships with smolconv.
SHIPPED = Path(__file__).absolute().parent / "shipped"
#: Fields of lm-eval's task files that a convertible task may have: any other could change what is measured.
_PLAIN = frozenset(
    {"task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text", "doc_to_choice",
     "doc_to_target", "metric_list", "metadata", "tag"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The result of one checkpoint on one task."""

    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    samples: int
    by_sample: Mapping[str, Mapping[str, float]]  #: metric -> sample's index -> value; numeric metrics only
    higher_is_better: Mapping[str, bool]

    def to_json(self) -> dict[str, Any]:
        return {**self.metrics, "stderr": dict(self.stderr), "samples": self.samples}


def names_of(given: Sequence[str]) -> list[str]:
    """Task names of ``--tasks``, which may be given several times and hold several with commas."""
    names = [name.strip() for words in given for name in words.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def plain_task(name: str, include: Path | None) -> dict[str, Any] | None:
    """The YAML of a task in ``include`` or shipped with smolconv; None if there is none.

    Makes the paths of ``data_files`` absolute. They are relative to the YAML's folder; lm-eval would resolve them
    against the working folder.
    """
    for folder in filter(None, (include, SHIPPED)):
        path = folder / f"{name}.yaml"
        if "/" in name or not path.is_file():
            continue
        try:
            task = parse_yaml_mapping(read_bytes(path), path)
        except CorruptFile:  # only lm-eval can read !function and !include
            return None
        files = (task.get("dataset_kwargs") or {}).get("data_files")
        if task.get("task") != name or not set(task) <= _PLAIN or not isinstance(files, dict):
            return None
        found = {split: str(folder / file) for split, file in files.items() if isinstance(file, str)}
        if all(Path(file).is_file() for file in found.values()):
            return {**task, "dataset_kwargs": {**task["dataset_kwargs"], "data_files": found}}
        return None
    return None


def check_include(include: Path | None, asked_by: str = "--include-path") -> None:
    """Raise ``MissingFile`` if the folder given by the option ``asked_by`` does not exist."""
    if include is not None and not include.is_dir():
        raise MissingFile(
            f"{asked_by} {include}: no such folder.\nExpected a folder of lm-eval's task files (*.yaml).\n"
            "Check the path."
        )


def unknown_task(name: str, known: Iterable[str], where: str) -> UsageError:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return UsageError(
        f"--tasks {name:.200}: {where} has no task of that name.\n"
        + (f"Similar names: {some_of(near)}.\n" if near else "Expected the name of a task, a group or a tag.\n")
        + "Add your own tasks with --include-path; smolconv_cloze ships with smolconv."
    )
