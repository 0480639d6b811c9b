"""A tokenizer of the tokenizers library: where it is, and it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smolconv.errors import CorruptFile, MachineError, MissingFile, NotInstalled, UsageError


def find_tokenizer(name: str) -> Path:
    """The tokenizer.json of a folder, itself, or that of ``owner/name``, downloaded to the Hub's cache."""
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
        if not path.is_file():
            raise MissingFile(
                f"{path} is not there. Expected a folder with the tokenizer.json of the tokenizers library."
            )
    if path.is_file():
        return path.absolute()
    if not re.fullmatch(r"(hf://)?[\w.-]+/[\w.-]+", name):
        raise UsageError(f"--tokenizer {name}: no such file or folder, and not an owner/name on the Hub.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise NotInstalled(f'fetching {name} needs huggingface_hub. Install it: pip install "smolconv[hub]"') from None
    repo = name.removeprefix("hf://")
    try:
        path = Path(hf_hub_download(repo, "tokenizer.json"))
        hf_hub_download(repo, "tokenizer_config.json")  # lies beside it, and names the eos
    except Exception as error:  # the client's errors have no common base class
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise MachineError(
            f"--tokenizer {name} is no local file or folder, and could not be fetched from the Hub: {said[0]}\n"
            "Check the name and the network, or give a local folder."
        ) from None
    return path


def load_tokenizer(path: Path) -> Any:
    """Raises ``CorruptFile``, and ``NotInstalled`` without the tokenizers library."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise tokenizing_needs(["tokenizers"]) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the base class itself
        raise CorruptFile(f"{path} is not a tokenizer.json of the tokenizers library ({error}).") from None
    return tokenizer


def tokenizing_needs(missing: list[str]) -> NotInstalled:
    return NotInstalled(f"tokenising this needs {', '.join(missing)}. Install it: pip install 'smolconv[data]'")
