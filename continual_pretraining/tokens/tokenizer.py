"""Finds and loads tokenizers of the tokenizers library."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from smolconv.errors import MachineError, MissingFile, NotInstalled, UsageError, pip_install
from smolconv.hub.download import open_source
from smolconv.layouts.assets import tokenizer_warnings
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.listing import newest_step
from smolconv.layouts.registry import read_checkpoint
from smolconv.parsing import read_tokenizer


def find_tokenizer(name: str) -> Path:
    """The path of a tokenizer.json: given, in a folder or run, or of ``owner/name``, downloaded to the Hub's cache."""
    path = newest_step(Path(name))
    if os.path.isdir(path):
        path /= "tokenizer.json"
        if not os.path.lexists(path):
            raise MissingFile(
                f"{path} is not there. Expected a folder with the tokenizer.json of the tokenizers library."
            )
    if os.path.lexists(path):
        return path.absolute()
    if not re.fullmatch(r"(hf://)?[\w.-]+/[\w.-]+", name):
        raise UsageError(f"--tokenizer {name:.200}: no such file or folder, and not an owner/name on the Hub.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        needed = "huggingface_hub"
        raise NotInstalled(f"fetching {name} needs {needed}. Install it: {pip_install([needed])}") from None
    repo = name.removeprefix("hf://")
    try:
        path = Path(hf_hub_download(repo, "tokenizer.json"))
        hf_hub_download(repo, "tokenizer_config.json")  # names the EOS
    except Exception as error:  # the client's errors have no common base class
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise MachineError(
            f"--tokenizer {name} is not a local file or folder, and could not be fetched from the Hub: {said[0]}\n"
            "Check the name and the network, or give a local folder."
        ) from None
    return path


def tokenizer_of_model(source: str) -> tuple[Path, int]:
    """The tokenizer.json of a checkpoint of any layout, local or on the Hub, and the rows of the model's embedding.

    Raises ``MissingFile`` if there is none, with the name that a nanotron run gives, and what reading a checkpoint
    raises.
    """
    checkpoint = read_checkpoint(open_source(source, headers_only=True, optimizer=False), ReadOptions(optimizer=False))
    path = checkpoint.assets.get("tokenizer.json")
    if path is None:
        _, said = tokenizer_warnings(checkpoint, needed=True)
        raise MissingFile(
            f"--model {source} holds no tokenizer.json of the tokenizers library.\n"
            f"{''.join(f'{each[0].upper()}{each[1:]}' for each in said[:1]) or 'Give one with --tokenizer.'}"
        )
    return path.absolute(), checkpoint.spec.vocab_size


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer.json. Raises ``CorruptFile``, and ``NotInstalled`` without the tokenizers library."""
    try:
        return read_tokenizer(path)
    except ImportError:
        raise tokenizing_needs(["tokenizers"]) from None


def tokenizing_needs(missing: list[str]) -> NotInstalled:
    return NotInstalled(f"tokenising this needs {', '.join(missing)}. Install it: {pip_install(missing)}")
