"""Which layouts there are: detect one, read a checkpoint of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from smolconv.checkpoint import Checkpoint
from smolconv.errors import BadCheckpoint, MissingFile, UnknownLayout, UnsupportedModel, UsageError
from smolconv.files import noting_files
from smolconv.layouts.deepspeed import is_deepspeed, read_deepspeed
from smolconv.layouts.dtypes import check_dtypes
from smolconv.layouts.huggingface.huggingface import is_huggingface, read_huggingface
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.nanotron import is_nanotron, read_nanotron
from smolconv.models.registry import family_named
from smolconv.storage.atomic import INCOMPLETE
from smolconv.tensors.lazy import close_thread_files


def detect_layout(folder: Path) -> str:
    """Raise ``UnknownLayout`` with what was looked for, ``MissingFile`` when nothing is there.

    The result is "nanotron", "huggingface" or "deepspeed".
    """
    if not folder.exists():
        raise MissingFile(f"{folder} is not there. Check the path; Hub repositories are written hf://owner/name.")
    if not folder.is_dir():
        raise UnknownLayout(f"{folder} is a file; a checkpoint is a folder.\n{_hint(folder)}")
    if (folder / INCOMPLETE).exists():
        raise BadCheckpoint(f"{folder} was being published when smolconv was interrupted. Convert it again.")
    if is_huggingface(folder):
        return "huggingface"
    if is_nanotron(folder):
        return "nanotron"
    if is_deepspeed(folder):
        return "deepspeed"
    raise UnknownLayout(
        f"{folder} is not a checkpoint that smolconv knows: neither config.json beside weights (Hugging Face), nor "
        "latest.txt or model_config.json (nanotron), nor latest or *_model_states.pt (DeepSpeed) is there."
    )


def _hint(path: Path) -> str:
    if path.suffix == ".gguf":
        return "For a GGUF file use: smolconv import-gguf FILE OUT"
    return f"Name the folder that holds it: {path.parent}"


def read_checkpoint(folder: Path, options: ReadOptions = ReadOptions()) -> Checkpoint:  # noqa: B008
    """Read a checkpoint of any layout, headers only. Raises ``BadCheckpoint`` and its kind."""
    with noting_files() as opened:
        checkpoint = _read(folder, options)
    return replace(checkpoint, opened=dict(opened))


def _read(folder: Path, options: ReadOptions) -> Checkpoint:
    asked = None if options.architecture is None else family_named(options.architecture).name
    checkpoint = check_dtypes(_read_layout(folder, options))
    if asked not in (None, checkpoint.spec.architecture):
        raise UnsupportedModel(
            f"{folder}: the config's model_type is {checkpoint.spec.architecture}; --architecture says {asked}.\n"
            "Leave it out: only a nanotron config can be of several architectures."
        )
    return checkpoint


def _read_layout(folder: Path, options: ReadOptions) -> Checkpoint:
    layout = detect_layout(folder)
    if options.base is not None and layout != "deepspeed":
        raise UsageError(f"--base supplies weights that a DeepSpeed checkpoint left out; {folder} is {layout}.")
    if layout == "huggingface":
        return read_huggingface(folder, options)
    if layout == "nanotron":
        return read_nanotron(folder, options)
    base = (
        None
        if options.base is None
        else read_checkpoint(options.base, ReadOptions(optimizer=False, architecture=options.architecture))
    )
    try:
        return read_deepspeed(folder, options, base)
    finally:
        close_thread_files()  # reading steps opened them; a file that is replaced later must be opened anew
