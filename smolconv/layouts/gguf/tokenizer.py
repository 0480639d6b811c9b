"""The tokenizer that a GGUF file's metadata hold, as tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolconv.errors import CorruptFile, UnsupportedModel

#: ggml's token types that a byte-level vocabulary may hold.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def tokenizer_json(metadata: Mapping[str, Any], path: Path) -> bytes:
    """tokenizer.json of the pre-tokenizer that llama.cpp calls smollm: single digits, then GPT-2's splitting."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = listed(metadata, "tokenizer.ggml.tokens", str, path)
    kinds = listed(metadata, "tokenizer.ggml.token_type", int, path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens):
        raise CorruptFile(f"{path}: {len(tokens)} tokens with {len(kinds)} types, {len(vocabulary)} of them different.")
    unknown = sorted(set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED})
    if unknown:
        raise UnsupportedModel(f"{path}: tokens of type {unknown[0]} do not belong to a byte-level tokenizer.")
    merges = [tuple(merge.split(" ")) for merge in listed(metadata, "tokenizer.ggml.merges", str, path)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises the base class itself
        raise CorruptFile(f"{path}: the tokenizer's merges do not fit its tokens ({error}).") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    added = {kind: [token for token, own in zip(tokens, kinds) if own == kind] for kind in (_CONTROL, _USER_DEFINED)}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added[_CONTROL]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added[_USER_DEFINED]])
    return str(tokenizer.to_str(pretty=True)).encode()


def token_id(metadata: Mapping[str, Any], name: str, path: Path) -> int | None:
    """The id of "bos", "eos", "pad" or "unk"; None if the file names no such token. Raises ``CorruptFile``."""
    long_name = {"pad": "padding", "unk": "unknown"}.get(name, name)
    index = metadata.get(f"tokenizer.ggml.{long_name}_token_id")
    tokens = listed(metadata, "tokenizer.ggml.tokens", str, path)
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CorruptFile(f"{path}: {long_name}_token_id is {index!r}, but there are {len(tokens)} tokens.")
    return index


def listed(metadata: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    """The list of ``kind`` under a key. Raises ``UnsupportedModel`` if there is none."""
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UnsupportedModel(f"{path} has no list {key}, so its tokenizer cannot be rebuilt.")
    return value
