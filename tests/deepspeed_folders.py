"""What DeepSpeed saved and what its live engine held then; its files as torch reads and edits them. smolconv is not asked."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest.mock import patch

import torch
from conftest import FIXTURES, deepspeed_cases
from safetensors.torch import load_file

DEEPSPEED = FIXTURES / "deepspeed"


@dataclass(frozen=True)
class Case:
    """One checkpoint that DeepSpeed wrote, and what it must turn out to be (fixtures/deepspeed/README.md)."""

    folder: Path
    original: Path | None = None  #: where the expected values of a copy are

    def __str__(self) -> str:
        return self.folder.name if self.folder.parent == DEEPSPEED else f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def tag(self) -> Path:
        """The folder that ``latest`` names."""
        return self.checkpoint / next(self.checkpoint.glob("latest*")).read_text()

    @property
    def is_universal(self) -> bool:
        return (self.checkpoint / "latest_universal").exists()

    @property
    def config(self) -> Path:
        places = (self.folder / "config.json", self.folder.parent / "config.json")
        return next(place for place in places if place.exists())

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The live engine's step, groups and names; a universal folder's may be in the case that it was made from."""
        return {**_meta(self._tensors), **_meta(self._expected)}

    @property
    def _expected(self) -> Path:
        return (self.original or self.folder) / "expected"

    @cached_property
    def _tensors(self) -> Path:
        return self._expected / _meta(self._expected).get("tensors_same_as", ".")

    def engine(self, state: str) -> dict[str, torch.Tensor]:
        """``fp32``, ``exp_avg`` or ``exp_avg_sq`` of the live engine, whole, by Hugging Face's names."""
        path = self._tensors / f"{state}.safetensors"
        return load_file(path) if path.exists() else {}

    def copied(self, folder: Path) -> Case:
        """A copy to be broken."""
        return Case(Path(shutil.copytree(self.folder, folder / self.folder.name)), self.folder)


def _meta(expected: Path) -> dict[str, Any]:
    return json.loads((expected / "meta.json").read_text())


CASES = [Case(folder) for folder in deepspeed_cases()]


def case(name: str) -> Case:
    """One of our fixtures."""
    return Case(DEEPSPEED / name)


# --- files -----------------------------------------------------------------------------------------------------------


def model_file(tag: Path, dp: int | None = None, tp: int = 0) -> Path:
    return tag / (("" if dp is None else f"zero_pp_rank_{dp}_") + f"mp_rank_{tp:02d}_model_states.pt")


def optimizer_file(tag: Path, dp: int, tp: int = 0) -> Path:
    (path,) = tag.glob(f"*zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt")
    return path


def load(path: Path) -> Any:
    """A file's content; DeepSpeed's own classes are stand-ins."""
    with _stand_ins():
        return torch.load(path, map_location="cpu", weights_only=False)


def save(content: object, path: Path, save_as: Callable[[object, Path], object] = torch.save) -> None:
    with _stand_ins():
        save_as(content, path)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Let ``change`` alter the content of a file in place."""
    content = load(path)
    change(content)
    save(content, path)


def rename_parameters(case: Case, rename: Callable[[str], str]) -> None:
    """Other names in every model file, as a wrapper around the model gives them, and in the folders of ``zero/``."""

    def change(document: dict[str, Any]) -> None:
        document["module"] = {rename(name): tensor for name, tensor in document["module"].items()}
        document["param_shapes"] = [{rename(n): shape for n, shape in g.items()} for g in document["param_shapes"]]
        document["shared_params"] = {rename(a): rename(b) for a, b in document["shared_params"].items()}

    for path in case.tag.glob("*_model_states.pt"):
        edit(path, change)
    for path in [path for path in case.tag.glob("zero/*") if path.is_dir()]:
        path.rename(path.with_name(rename(path.name)))


#: The classes of DeepSpeed that its optimizer files name; fixtures/deepspeed/README.md.
_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.utils.tensor_fragment": "fragment_address",
}
_STAGES = ("disabled", "optimizer_states", "gradients", "weights")


@cache
def _modules() -> dict[str, ModuleType]:
    parents = {name.rpartition(".")[0] for name in _CLASSES} | {"deepspeed", "deepspeed.runtime"}
    modules = {name: ModuleType(name) for name in (*parents, *_CLASSES)}
    for module, name in _CLASSES.items():
        stand_in: type = type(name, (), {"__module__": module, "__init__": lambda self, *args: None})
        if name == "ZeroStageEnum":
            stand_in = cast(type, IntEnum(name, _STAGES, module=module, start=0))
        setattr(modules[module], name, stand_in)
    return modules


@contextmanager
def _stand_ins() -> Iterator[None]:
    # Only while torch pickles: transformers would take them for an installed deepspeed.
    with patch.dict(sys.modules, _modules()):
        yield
