"""The launchers by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from smolconv.continual_pretraining.launchers.launcher import Launcher

#: Each is the ``LAUNCHER`` of a module in this package.
LauncherName = Literal[
    "local",
    "torchrun",
    "deepspeed",
    "slurm",
]
NAMES: tuple[LauncherName, ...] = get_args(LauncherName)


def find_launcher(name: LauncherName) -> Launcher:
    found: Launcher = importlib.import_module(f"{__package__}.{name}").LAUNCHER
    return found
