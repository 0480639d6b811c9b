"""smolconv: convert, verify and continue checkpoints of SmolLM2 and SmolLM3.

    import smolconv

    checkpoint = smolconv.open_checkpoint("checkpoints/nanotron")
    checkpoint["model.norm.weight"].torch()
    smolconv.convert("checkpoints/nanotron", "model", to="hf", verify=True)

``__all__`` is the API; docs/api.md has examples. Importing this module imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smolconv.version import __version__

if TYPE_CHECKING:
    from smolconv.api import (
        OpenCheckpoint,
        ProofCheck,
        Tensor,
        check_proof,
        convert,
        diff,
        evaluate,
        inspect,
        on_progress,
        open_checkpoint,
        plan_conversion,
        run_conversion,
        verify,
    )
    from smolconv.errors import (
        BadCheckpoint,
        CorruptFile,
        DigestMismatch,
        Interrupted,
        LfsPointer,
        MachineError,
        MissingFile,
        MissingShard,
        MixedCheckpoint,
        NameMismatch,
        NotInstalled,
        OutputLocked,
        ParityFailed,
        ShapeMismatch,
        SmolconvError,
        SourceChanged,
        UnknownLayout,
        UnsafePickle,
        UnsupportedModel,
        UsageError,
    )

__all__ = [
    "BadCheckpoint",
    "CorruptFile",
    "DigestMismatch",
    "Interrupted",
    "LfsPointer",
    "MachineError",
    "MissingFile",
    "MissingShard",
    "MixedCheckpoint",
    "NameMismatch",
    "NotInstalled",
    "OpenCheckpoint",
    "OutputLocked",
    "ParityFailed",
    "ProofCheck",
    "ShapeMismatch",
    "SmolconvError",
    "SourceChanged",
    "Tensor",
    "UnknownLayout",
    "UnsafePickle",
    "UnsupportedModel",
    "UsageError",
    "__version__",
    "check_proof",
    "convert",
    "diff",
    "evaluate",
    "inspect",
    "on_progress",
    "open_checkpoint",
    "plan_conversion",
    "run_conversion",
    "verify",
]

#: Where each name is, for ``__getattr__``.
_MODULES = {
    "smolconv.api": (
        "OpenCheckpoint",
        "ProofCheck",
        "Tensor",
        "check_proof",
        "convert",
        "diff",
        "evaluate",
        "inspect",
        "on_progress",
        "open_checkpoint",
        "plan_conversion",
        "run_conversion",
        "verify",
    ),
    "smolconv.errors": (
        "BadCheckpoint",
        "CorruptFile",
        "DigestMismatch",
        "Interrupted",
        "LfsPointer",
        "MachineError",
        "MissingFile",
        "MissingShard",
        "MixedCheckpoint",
        "NameMismatch",
        "NotInstalled",
        "OutputLocked",
        "ParityFailed",
        "ShapeMismatch",
        "SmolconvError",
        "SourceChanged",
        "UnknownLayout",
        "UnsafePickle",
        "UnsupportedModel",
        "UsageError",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
