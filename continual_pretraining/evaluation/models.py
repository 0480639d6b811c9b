"""Opens a checkpoint of any layout for evaluation: as a forward pass, transformers' model or Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, without_padding
from smolconv.conversion import ConvertOptions, plan_from_checkpoint, run_conversion
from smolconv.errors import MachineError, MissingFile, first_line
from smolconv.hub.download import open_source
from smolconv.layouts.assets import given_tokenizer
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.models.huggingface import spec_to_hf
from smolconv.verification.compare import AsStored, VerifyOptions, side_of
from smolconv.verification.forward import Side

_HUGGINGFACE = "huggingface"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A checkpoint opened for evaluation."""

    name: str  #: as given
    checkpoint: Checkpoint
    stored: AsStored
    tokenizer: Mapping[str, Path]  #: files by name; empty without one

    @property
    def vocab_size(self) -> int:
        """The vocabulary without padding rows of the embedding."""
        return self.checkpoint.unpadded_vocab_size or self.checkpoint.spec.vocab_size

    @property
    def tokenizer_file(self) -> Path | None:
        return self.tokenizer.get("tokenizer.json")


def open_evaluated(name: str, options: ReadOptions, tokenizer: Path | None) -> Evaluated:
    """Read a checkpoint's headers. Raises as ``read_checkpoint`` and ``given_tokenizer``."""
    stored = AsStored(folder=open_source(name, layout=options.layout, config=options.config), options=options)
    checkpoint = read_checkpoint(stored.folder, options)
    stored = AsStored(folder=checkpoint.root, options=options) if checkpoint.layout == _HUGGINGFACE else stored
    files = checkpoint.assets if tokenizer is None else given_tokenizer(tokenizer)
    return Evaluated(name=name, checkpoint=checkpoint, stored=stored, tokenizer=files)


def forward_of(evaluated: Evaluated, dtype: str, device: str) -> Side:
    """The forward pass of verification, with one block in memory at a time."""
    return side_of(evaluated.checkpoint, evaluated.stored, VerifyOptions(compute=dtype, device=device))


def require_tokenizer(evaluated: Evaluated) -> None:
    """Raise ``MissingFile`` without a tokenizer: tasks are text."""
    if "tokenizer.json" not in evaluated.tokenizer and "tokenizer.model" not in evaluated.tokenizer:
        raise MissingFile(
            f"{evaluated.name} has no tokenizer, which tasks need (--held-out does not).\n"
            "Expected tokenizer.json next to its weights.\nGive the model's own with --tokenizer FOLDER."
        )


def load_model(evaluated: Evaluated, dtype: str, device: str) -> Any:
    """transformers' model, complete: from the folder if it is in Hugging Face's layout, else from canonical tensors."""
    import torch

    from smolconv.verification.hf import CanonicalWeights, FolderWeights, Weights, whole_model

    checkpoint = evaluated.checkpoint
    weights: Weights
    if checkpoint.layout == _HUGGINGFACE and evaluated.stored.options.config is None:
        weights = FolderWeights(evaluated.stored.folder)
    else:
        if checkpoint.unpadded_vocab_size is not None:
            checkpoint = without_padding(checkpoint, checkpoint.unpadded_vocab_size)
        weights = CanonicalWeights(checkpoint)
    return whole_model(weights, getattr(torch, dtype), device)


def load_tokenizer(evaluated: Evaluated, work: Path) -> Any:
    """transformers' tokenizer, from copies of its files in ``work``. Raises ``MissingFile`` if loading fails."""
    import transformers

    require_tokenizer(evaluated)
    folder = work / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, path in evaluated.tokenizer.items():
        if "/" not in name:
            shutil.copyfile(path, folder / name)
    config = spec_to_hf(evaluated.checkpoint.spec, evaluated.checkpoint.source.model_config, "float32")
    config.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library does not document its errors
        raise MissingFile(
            f"{evaluated.name}: transformers cannot load a tokenizer from {', '.join(sorted(evaluated.tokenizer))} "
            f"({type(error).__name__}: {first_line(error):.200}).\n"
            "Expected a tokenizer that transformers loads.\nGive the model's own with --tokenizer FOLDER."
        ) from error


@contextmanager
def work_folder(place: Path | None) -> Iterator[Path]:
    """A temporary folder in ``place`` or in the system's temporary folder, deleted at the end."""
    try:
        folder = tempfile.mkdtemp(prefix="smolconv-evaluate-", dir=place)
    except OSError as error:
        raise MachineError(
            f"--work-dir {place or tempfile.gettempdir()}: cannot create a folder there ({error.strerror}).\n"
            "Expected a local folder that can be written.\nChoose another with --work-dir."
        ) from None
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def huggingface_folder(evaluated: Evaluated, work: Path) -> Path:
    """A Hugging Face folder for other programs: the checkpoint's own, or a conversion of its weights in ``work``.

    Raises ``MachineError`` if the disk of ``work`` has too little space.
    """
    own = evaluated.checkpoint.layout == _HUGGINGFACE and evaluated.stored.options.config is None
    if own and evaluated.tokenizer is evaluated.checkpoint.assets:
        return evaluated.stored.folder
    target = work / "model"
    shutil.rmtree(target, ignore_errors=True)
    given = evaluated.tokenizer if evaluated.tokenizer is not evaluated.checkpoint.assets else {}
    tokenizer = next((path for name, path in given.items() if name.startswith("tokenizer")), None)
    options = ConvertOptions(
        to="hf", optimizer=False, digest="none", tokenizer=None if tokenizer is None else tokenizer.parent
    )
    plan = plan_from_checkpoint(evaluated.checkpoint, evaluated.name, target, options)
    free = shutil.disk_usage(work).free
    if plan.bytes_written > free:
        raise MachineError(
            f"{work}: {free / 1e9:.1f} GB are free, but the Hugging Face folder of {evaluated.name} takes "
            f"{plan.bytes_written / 1e9:.1f} GB.\nExpected space for one copy of the weights.\n"
            "Choose another place with --work-dir, or convert the checkpoint yourself and evaluate the result."
        )
    run_conversion(plan)
    return target
