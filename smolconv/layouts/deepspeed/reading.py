"""State shared while reading a DeepSpeed checkpoint: the files, the model's shapes, the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolconv.checkpoint import MOMENTS, Checkpoint, ParameterGroup, Slot
from smolconv.errors import MissingFile, MixedCheckpoint
from smolconv.files import is_there
from smolconv.layouts.deepspeed.documents import AnotherOptimizer, ModelDocument, plain, read_model_document
from smolconv.layouts.deepspeed.files import TagFiles, tag_files
from smolconv.layouts.deepspeed.listing import run_folder
from smolconv.layouts.documents import check_config
from smolconv.layouts.layout import ReadOptions
from smolconv.models.huggingface import parameter_shapes, spec_from_hf, weight_table
from smolconv.models.names import HEAD, StoredNames
from smolconv.models.nanotron import spec_from_nanotron
from smolconv.models.registry import is_nanotron_config
from smolconv.models.spec import ModelSpec
from smolconv.parsing import read_json
from smolconv.tensors.lazy import LazyTensor


@dataclass(kw_only=True)
class StoredState:
    """The contents of one tensor-parallel rank's files, by DeepSpeed's names. Filled while reading."""

    weights: dict[str, LazyTensor]  #: as in the model file, without empty ones
    dtypes: dict[str, str]  #: the module's, also of empty tensors
    slots: dict[Slot, dict[str, LazyTensor]] = field(
        default_factory=lambda: {slot: {} for slot in (Slot.MASTER, *MOMENTS)}
    )
    steps: dict[str, float] = field(default_factory=dict)
    flat_steps: Mapping[int, float] = field(default_factory=dict)  #: by flat tensor, even if no state was requested
    groups: tuple[ParameterGroup, ...] = ()


class DeepSpeedReading:
    """Data that all parts of one read share; lives for one call."""

    def __init__(self, folder: Path, tag: Path, options: ReadOptions, base: Checkpoint | None) -> None:
        self.folder, self.tag, self.options, self.base = folder, tag, options, base
        self.run = run_folder(folder, tag)
        self.files: TagFiles = tag_files(tag)
        self.warnings: list[str] = []
        self.read_files: list[Path] = []
        self.first = self.read_model(self.files.first_model)
        self.config, self.where = _find_config(folder, tag, options.config, self.first)
        check_config(self.config, self.where)
        self.spec: ModelSpec = (
            spec_from_nanotron(self.config, self.where, architecture=options.architecture)
            if is_nanotron_config(self.config) else spec_from_hf(self.config, self.where)
        )  # fmt: skip
        heads = [alias for alias in self.first.shared if alias == HEAD or alias.endswith(f".{HEAD}")]
        if not self.spec.tied and heads:
            raise MixedCheckpoint(
                f"{self.first.path} ties {heads[0]} to {self.first.shared[heads[0]]}, but {self.where} "
                "has them as two tensors. Check that the config belongs to this checkpoint."
            )
        self.shapes = parameter_shapes(self.spec)
        self.table = weight_table(self.spec)
        self.stage, self.ranks = 0, self.first.dp or 1
        self.tp: int = max(self.first.tp, self.files.tp)
        self.names = StoredNames()
        self.loss_scaler: Mapping[str, Any] | None = None

    def read_model(self, path: Path) -> ModelDocument:
        self.read_files.append(path)
        return read_model_document(path)

    def require_same_step(self, model: ModelDocument) -> None:
        if model.step != self.first.step:
            raise MixedCheckpoint(
                f"{model.path} is of step {model.step}, but {self.first.path.name} of step {self.first.step}.\n"
                "Files of two checkpoints lie in one folder: copy all of one."
            )

    def leave_out(self, error: AnotherOptimizer) -> None:
        self.warnings.append(f"{error}: the optimizer's state was left out.")


def _find_config(folder: Path, tag: Path, override: Path | None, model: ModelDocument) -> tuple[dict[str, Any], str]:
    """Search --config, then the tag folder, the folder of ``latest``, the run folder's parent, and the client_state."""
    if override is not None:
        return read_json(override), str(override)
    run = run_folder(folder, tag)
    looked = list(dict.fromkeys([tag, run, run.parent]))
    for place in looked:
        path = place / "config.json"
        if is_there(path):
            config = read_json(path)
            if "hidden_size" in config:
                return config, str(path)
    for key, value in model.client_state.items():
        for name, config in ((key, value), *(value.items() if isinstance(value, dict) else ())):
            if isinstance(config, dict) and "hidden_size" in config and "num_hidden_layers" in config:
                try:
                    return plain(config), f"{model.path} (client_state: {name})"
                except ValueError:
                    continue
    raise MissingFile(
        f"{folder} holds no model config: DeepSpeed saves none. Looked for config.json in "
        f"{', '.join(map(str, looked))} and in the client_state.\n"
        "Put the model's config.json next to latest, or pass it (or nanotron's model_config.json) with --config."
    )
