"""Lists what a conversion carries and what it leaves out, so that every loss is reported."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from smolconv.checkpoint import Checkpoint, Slot, TrainingProgress
from smolconv.errors import BadCheckpoint, counted, some_of
from smolconv.layouts.assets import is_tokenizer
from smolconv.layouts.registry import BY_WORD
from smolconv.storage.manifest import MANIFEST, PROOF
from smolconv.tensors.dtypes import DTYPE_BYTES

#: Files next to a checkpoint that are not part of it: they are rewritten, or describe the folder.
_ABOUT_THE_FOLDER = frozenset(
    (MANIFEST, PROOF, "README.md", "latest", "latest.txt", "latest_universal", "zero_to_fp32.py", "zero_to_torch.py")
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Account:
    """Each entry is a phrase for messages and ``--json``."""

    carried: tuple[str, ...]
    left_out: tuple[str, ...]


def account(
    source: Checkpoint, prepared: Checkpoint, used: Collection[Path], *, step: int | None, optimizer: bool | None
) -> Account:
    """Compare a source with what the target will hold.

    ``used``: files that were read or will be copied; ``step`` and ``optimizer``: the options of reading. Lists folders
    and opens no file.
    """
    carried = [f"weights ({_dtypes(prepared)})"]
    left: list[str] = []
    narrower = [n for n, t in source.parameters.items() if n in prepared.parameters
                and DTYPE_BYTES[prepared.parameters[n].dtype] < DTYPE_BYTES[t.dtype]]  # fmt: skip
    if narrower and not prepared.tensors.get(Slot.MASTER):
        left.append(f"precision of {counted(len(narrower), 'weight')}: {_dtypes(source)} to {_dtypes(prepared)}")
    if rows := source.spec.vocab_size - prepared.spec.vocab_size:
        left.append(f"the last {counted(rows, 'row')} of the vocabulary")
    if (source.source.nanotron_config or {}).get("rope_scaling") and not prepared.spec.rope_scaling:
        left.append("rope_scaling, which nanotron's forward ignores")
    if source.tensors.get(Slot.MASTER):
        kept = prepared.tensors.get(Slot.MASTER) or _dtypes(prepared) == "float32"
        (carried if kept else left).append("fp32 masters")
    if source.has_optimizer:
        (carried if prepared.has_optimizer else left).append(_adam(source))
    elif optimizer is False:
        left.append("Adam's state, if there is any: --no-optimizer")
    if source.progress is not None and prepared.progress is not None:
        carried.append(_progress(prepared.progress))
    elif source.progress is not None and (source.progress.step or source.progress.consumed_samples):
        left.append(_progress(source.progress))
    if source.source.engine is not None:
        left += source.source.engine.left_out
    beside_it = {**prepared.assets, **prepared.program_files}
    if beside := [name for name, path in beside_it.items() if path in used] + list(prepared.documents):
        carried.append(f"{counted(len(beside), 'file')} beside the weights ({some_of(sorted(beside), 4, more=True)})")
    if not is_tokenizer({*prepared.assets, *prepared.documents}):
        left.append("a tokenizer: the source has none")
    if unread := sorted(_unread(source, used, step=step, optimizer=optimizer)):
        left.append(f"{counted(len(unread), 'file')} that nothing was read from ({some_of(unread, 3, more=True)})")
    return Account(carried=tuple(carried), left_out=tuple(left))


def _unread(source: Checkpoint, used: Collection[Path], *, step: int | None, optimizer: bool | None) -> Iterator[str]:
    """Files of the checkpoint and next to it from which nothing was read."""
    layout = BY_WORD.get(source.layout)
    if layout is None or not source.root.is_dir():
        return
    try:
        needed = layout.listing.needed_files(source.root, step=step, optimizer=optimizer is not False)
    except BadCheckpoint:  # a folder without a config, read with --config
        needed = list(source.files)
    config = source.assets.get("config.json")
    for folder in dict.fromkeys(path.parent for path in needed):
        for entry in os.scandir(folder):
            path = folder / entry.name
            # Planning the output uses a config.json among the files next to the weights.
            other = entry.name.startswith(".") or entry.name in _ABOUT_THE_FOLDER or path == config
            if not other and path not in used and not os.path.isdir(path):  # a dangling link is left out, too
                yield path.relative_to(source.root).as_posix() if source.root in path.parents else str(path)


def _dtypes(checkpoint: Checkpoint) -> str:
    return " and ".join(dict.fromkeys(tensor.dtype for tensor in checkpoint.parameters.values()))


def _adam(source: Checkpoint) -> str:
    assert source.optimizer is not None
    steps = sorted(set(source.optimizer.steps.values()))
    return f"Adam's state after {' or '.join(f'{step:g}' for step in steps)} steps"


def _progress(progress: TrainingProgress) -> str:
    parts = [f"step {progress.step}", counted(progress.consumed_samples, "sample")]
    parts += [counted(progress.consumed_tokens, "token")] if progress.consumed_tokens is not None else []
    parts += [counted(len(progress.stages), "stage")] if progress.stages else []
    return f"progress ({', '.join(parts)})"
