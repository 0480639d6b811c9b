"""Writes a Hugging Face folder: safetensors, config, tokenizer, card, and a sidecar for everything else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolconv.checkpoint import Checkpoint, Slot
from smolconv.layouts.assets import tokenizer_warnings
from smolconv.layouts.huggingface.shards import json_bytes, plan_sharded
from smolconv.layouts.huggingface.sidecar import SIDECAR, sidecar_files, sidecar_state
from smolconv.layouts.layout import PlannedOutput, copied_assets, hf_config, model_card
from smolconv.models.huggingface import config_dtype, weight_table
from smolconv.storage.planned import plain_file

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions:
    """How to write an HF folder."""

    max_shard_bytes: int = 5 * 10**9


def plan_huggingface(checkpoint: Checkpoint, options: HuggingFaceOptions) -> PlannedOutput:
    """Plan every file: shards, index, config with both forms of the rope fields, assets, card, a sidecar for state."""
    spec = checkpoint.spec
    layout = weight_table(spec).to_layout(checkpoint.parameters, "the source", lambda _: True)
    files = list(plan_sharded(layout, "model", "model", options.max_shard_bytes, Slot.PARAMETER))
    dtypes = {tensor.dtype for tensor in checkpoint.parameters.values()}
    known = config_dtype(checkpoint.source.hf_config or {})
    # With several dtypes: the dtype in which transformers loads the source.
    dtype = known if known in dtypes else layout["model.embed_tokens.weight"].dtype
    config = hf_config(checkpoint, dtype)
    files.append(plain_file("config.json", json_bytes(config)))
    assets = dict(checkpoint.assets)
    assets.pop("config.json", None)
    documents = {name: data for name, data in checkpoint.documents.items() if name not in assets}
    given = {*assets, *documents}
    has_tokenizer, warnings = tokenizer_warnings(checkpoint, needed=True)
    if "generation_config.json" not in given:
        files.append(plain_file("generation_config.json", json_bytes(_generation_config(config))))
    if "README.md" not in given:
        card = model_card(checkpoint, "A Hugging Face checkpoint", has_tokenizer)
        files.append(plain_file("README.md", card))
    files += copied_assets(assets)
    files += [plain_file(name, data) for name, data in documents.items()]
    late = {}
    if checkpoint.has_optimizer or checkpoint.progress is not None:
        files += sidecar_files(checkpoint, options.max_shard_bytes)
        late[f"{SIDECAR}/state.json"] = lambda written: json_bytes(sidecar_state(checkpoint, files, written))
    return PlannedOutput(files=tuple(files), late=late, warnings=tuple(warnings))


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None
    }
    return {"_from_model_config": True, **ids}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" (powers of 1000), "2GiB" (of 1024) or a plain number. Raises ``ValueError``."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    number, unit, binary = match.groups()
    value = float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " ")
    if not math.isfinite(value) or value < 1:
        raise ValueError(text)
    return int(value)
