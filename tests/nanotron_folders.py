"""nanotron run folders as torch, safetensors, JSON and YAML see them: smolconv is not asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

#: What another topology's config.yaml cannot know: they were chosen anew for each fixture.
CHOSEN_ANEW = (
    ("tokens", "batch_accumulation_per_replica"),
    ("parallelism", "tp_mode"),
    ("parallelism", "tp_linear_async_communication"),
    ("general", "ignore_sanity_checks"),
)


def step_folder(run: Path) -> Path:
    """The folder that latest.txt names."""
    return run / (run / "latest.txt").read_text()


def topology_of(run: Path) -> dict[str, int] | None:
    """Options of ``convert`` for a fixture's name such as tp2-pp1-dp2-zero1; None for other names."""
    match = re.fullmatch(r"tp(\d+)-pp(\d+)-dp(\d+)-zero(\d)", run.name)
    return None if match is None else dict(zip(("tp", "pp", "dp", "zero_stage"), map(int, match.groups())))


def file_names(step: Path) -> set[str]:
    """Files below a step folder; random states belong to ranks, not to the model."""
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith("random/")}


def parameter_of(path: Path, step: Path) -> str:
    """model/model/decoder/0/.../model_weight_pp-rank-...: the dotted name."""
    return ".".join([*path.parent.relative_to(step / "model").parts, re.match(r"model_(\w+?)[_.]", path.name)[1]])


def shards(step: Path) -> dict[str, tuple[torch.Tensor, dict[str, str]]]:
    """Weight files by relative path: the tensor, and the metadata without numpy 2's spelling of integers."""
    found = {}
    for path in sorted((step / "model").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = {
                key: re.sub(r"np\.int64\((\d+)\)", r"\1", text) for key, text in (file.metadata() or {}).items()
            }
            found[str(path.relative_to(step))] = (file.get_tensor("data"), metadata)
    return found


def states(step: Path, kind: str, *, mmap: bool = False) -> dict[str, dict[str, Any]]:
    """``optimizer`` or ``lr_scheduler`` archives by file name, loaded by torch without running any code."""
    paths = sorted((step / kind).glob("*.pt"))
    return {path.name: torch.load(path, map_location="cpu", weights_only=True, mmap=mmap) for path in paths}


def documents(step: Path) -> dict[str, Any]:
    """The JSON files and the training config, parsed, without what every topology chooses anew."""
    names = ("model_config.json", "checkpoint_metadata.json", "optimizer/optimizer_config.json")
    found = {name: json.loads((step / name).read_text()) for name in names if (step / name).exists()}
    if (step / "config.yaml").exists():
        config = found["config.yaml"] = yaml.safe_load((step / "config.yaml").read_text())
        for section, name in CHOSEN_ANEW:
            config[section].pop(name, None)
    return found


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Places where two nested values part: tensors by shape, dtype and every bit, the rest by type and value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.shape, a.dtype) != (b.shape, b.dtype) or not torch.equal(_bits(a), _bits(b)):
            yield where
    elif isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{where}.{key}: on one side only" for key in sorted(map(str, set(a) ^ set(b))))
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{where}[{i}]")
    elif type(a) is not type(b) or a != b:
        yield f"{where}: {a!r:.60} and {b!r:.60}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor).reshape(-1).view(torch.uint8)


def run_differences(a: Path, b: Path) -> list[str]:
    """Everything that parts two run folders, but for random states and what every topology chooses anew."""
    left, right = step_folder(a), step_folder(b)
    found = [f"{name}: on one side only" for name in sorted(file_names(left) ^ file_names(right))]
    found += differences(shards(left), shards(right), "model")
    for kind in ("optimizer", "lr_scheduler"):
        found += differences(states(left, kind), states(right, kind), kind)
    found += differences(documents(left), documents(right), "documents")
    return found
