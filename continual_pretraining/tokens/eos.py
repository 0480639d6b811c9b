"""Which token ends a document."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from smolconv.errors import SmolconvError, UsageError, some_of
from smolconv.layouts.documents import is_count
from smolconv.parsing import MOST_TOKENIZER_BYTES, read_json

#: Tokens that end documents in the pretraining data of SmolLM2 and SmolLM3 (Llama 3's tokenizer). The instruct
#: tokenizers name another token as eos: the end of a chat turn.
PRETRAINING_ENDS = ("<|endoftext|>", "<|end_of_text|>")
#: Their ids, by the tokenizer names in nanotron's published YAMLs (github.com/huggingface/smollm). All but cosmo2's
#: are Llama 3's.
KNOWN_EOS = {
    "HuggingFaceTB/cosmo2-tokenizer": 0,
    "meta-llama/Llama-3.2-1B": 128001,
    "HuggingFaceTB/smollm3-11T-4k-remote-code": 128001,
    "HuggingFaceTB/SmolLM3-11T-32k-v1-remote-code": 128001,
    "checkpoints/nanotron_pretrained_checkpoints/Nanotron-Llama-3.2-3B": 128001,  # FineMath's
}


def ends_documents(ending: int, seen: int) -> bool:
    """Whether a token counts as the end of documents: more than half of the documents ``seen`` end in it."""
    return 2 * ending > seen


def choose_eos(tokenizer: Any, path: Path, asked: str | None) -> tuple[str, str]:
    """The token that ends documents, and the option or file that names it."""
    if asked is not None:
        if _id(tokenizer, asked) is None:
            raise UsageError(f"--eos {asked} is not a token of {path}. It has: {_special(tokenizer)}.")
        return asked, "--eos"
    own, said_by = _own_eos(tokenizer, path)
    if own is None:
        raise UsageError(
            f"no file next to {path} says which token ends a document.\n"
            f"Pass --eos TOKEN, one of: {_special(tokenizer)}; or --no-eos."
        )
    others = [token for token in PRETRAINING_ENDS if tokenizer.token_to_id(token) is not None]
    if others and own not in others:
        raise UsageError(
            f"{said_by} names {own} (id {tokenizer.token_to_id(own)}) as eos, as chat tokenizers do, but pretraining "
            f"data usually ends in {others[0]} (id {tokenizer.token_to_id(others[0])}).\n"
            "If the EOS in the data differs from the recipe's, positions and attention never restart at a document.\n"
            f"Choose: --eos '{others[0]}' or --eos '{own}'."
        )
    return own, str(said_by)


def _own_eos(tokenizer: Any, path: Path) -> tuple[str | None, Path]:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        beside = path.with_name(name)
        if not os.path.lexists(beside):
            continue
        document = read_json(beside)
        token, number = _named(document), document.get("eos_token_id")
        if token is None and isinstance(number, int) and is_count(number) and number < 1 << 32:
            token = tokenizer.id_to_token(number)
        if isinstance(token, str) and _id(tokenizer, token) is not None:
            return token, beside
    return None, path


def _id(tokenizer: Any, token: str) -> int | None:
    try:
        found: int | None = tokenizer.token_to_id(token)
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
        return None
    return found


def _special(tokenizer: Any) -> str:
    names = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    return some_of(names, 8) or "no special tokens"


def eos_of_folder(folder: Path) -> int | None:
    """The EOS id of the tokenizer in a local folder; None if its files do not give one."""
    try:
        token = _named(read_json(folder / "tokenizer_config.json"))
        tokenizer = read_json(folder / "tokenizer.json", MOST_TOKENIZER_BYTES)
        added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}
        found = added.get(token, tokenizer["model"]["vocab"].get(token))
        return found if is_count(found) else None
    except (SmolconvError, KeyError, TypeError, AttributeError):
        return None


def _named(document: dict[str, Any]) -> Any:
    """The EOS that a tokenizer's settings name, either as a string or as an object with ``content``."""
    token = document.get("eos_token")
    return token.get("content") if isinstance(token, dict) else token
