"""Names of DeepSpeed's files, and those of one tag folder, sorted.

It holds one model file per tensor-parallel rank (ZeRO-3: per rank) and, for ZeRO 1 to 3, one optimizer file per rank.
Names: ``_get_ckpt_name`` and ``_get_rank_zero_ckpt_name`` in deepspeed/runtime/engine.py, 0.19.8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolconv.errors import MissingShard, MixedCheckpoint, UnsupportedModel
from smolconv.files import is_folder_there

MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<tp>\d+)_model_states\.pt")
#: Until 2022 the last underscore was missing.
OPTIMIZER = re.compile(r"(?P<prefix>(?:bf16_|fp16_)?)zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<tp>\d+)_?optim_states\.pt")


#: Where a run whose optimizer is offloaded to NVMe keeps ``rankNN/*.tensor.swp``.
_OFFLOADED = "offloaded_tensors"


def model_file(dp: int | None, tp: int = 0) -> str:
    """``dp`` is None for ZeRO 0 to 2, where one file serves all data-parallel ranks."""
    return ("" if dp is None else f"zero_pp_rank_{dp}_") + f"mp_rank_{tp:02d}_model_states.pt"


def optimizer_file(dp: int, *, bf16: bool, tp: int = 0) -> str:
    """DeepSpeed looks for the prefix that goes with the engine's ``bf16.enabled``."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt"


@dataclass(frozen=True, kw_only=True)
class TagFiles:
    """The files of one tag folder."""

    folder: Path
    models: Mapping[tuple[int | None, int], Path]  #: (dp, tp); dp None for ZeRO 0 to 2
    optimizers: Mapping[tuple[int, int], Path]  #: (dp, tp); empty for ZeRO-0 and universal
    universal: bool  #: has the folder ``zero/``

    @property
    def tp(self) -> int:
        return 1 + max(tp for _, tp in self.models)

    @property
    def first_model(self) -> Path:
        """The model file of global rank 0, the only one with ``shared_params``. Raises ``MissingShard``."""
        path = self.models.get((None, 0), self.models.get((0, 0)))
        if path is None:
            name = model_file(None if any(dp is None for dp, _ in self.models) else 0)
            raise MissingShard(f"{self.folder}: {name} is missing. Copy it from the training node.")
        return path


def tag_files(folder: Path) -> TagFiles:
    """Sort the files of a tag folder. Raises if they are of two checkpoints, or of a format that is not supported."""
    models: dict[tuple[int | None, int], Path] = {}
    optimizers: dict[tuple[int, int], Path] = {}
    prefixes: dict[str, Path] = {}
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if match := MODEL.fullmatch(name):
            models[None if match["dp"] is None else int(match["dp"]), int(match["tp"])] = path
        elif match := OPTIMIZER.fullmatch(name):
            optimizers[int(match["dp"]), int(match["tp"])] = path
            prefixes[match["prefix"]] = path
        elif re.match(r"layer_\d+", name) or "expert" in name or "expp_rank" in name:
            raise UnsupportedModel(
                f"{path} is a file of a pipeline or of experts; smolconv reads data-parallel (ZeRO) and AutoTP "
                "checkpoints."
            )
    if len(prefixes) > 1:
        a, b = prefixes.values()
        raise MixedCheckpoint(f"{folder}: {a.name} and {b.name} are of two checkpoints. Keep the files of one.")
    if is_folder_there(folder / _OFFLOADED):
        raise UnsupportedModel(
            f"{folder}: the run kept its fp32 weights and Adam's state on NVMe, so they are in {_OFFLOADED}/.\n"
            "Expected them in the optimizer files: only the running engine knows the content of a *.tensor.swp, and "
            "zero_to_fp32 cannot tell either.\n"
            "Load it into DeepSpeed with its own settings and stage3_gather_16bit_weights_on_model_save, and save the "
            "weights with engine.save_16bit_model(OUT)."
        )
    universal = is_folder_there(folder / "zero")
    if len({dp is None for dp, _ in models}) > 1 and not universal:
        raise MixedCheckpoint(f"{folder} has model files of ZeRO-3 and of another stage. Keep those of one.")
    if not models:
        raise MissingShard(
            f"{folder}: {model_file(None)} (ZeRO-3: {model_file(0)}) is missing: it names the parameters that the "
            "optimizer files hold.\nCopy it from the training node."
        )
    return TagFiles(folder=folder, models=models, optimizers=optimizers, universal=universal)
