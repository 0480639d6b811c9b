"""Tiny models that transformers builds, saves, loads and runs itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)  # fmt: skip

LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip


def rope(theta: float, scaling: dict[str, Any]) -> dict[str, Any]:
    """Config fields in the spelling of the installed transformers: v5's, or v4's."""
    if hasattr(LlamaConfig(), "rope_parameters"):
        return {"rope_parameters": {"rope_theta": theta, **scaling}}
    return {"rope_theta": theta, "rope_scaling": dict(scaling)}


def llama(**fields: Any) -> torch.nn.Module:
    """A random Llama with grouped-query attention."""
    return _random(LlamaForCausalLM(LlamaConfig(**{**_SIZES, "tie_word_embeddings": True, **fields})))


def smollm3(**fields: Any) -> torch.nn.Module:
    """A random SmolLM3, NoPE in its last layer; biases are random but o_proj's, which nanotron lacks."""
    return _random(SmolLM3ForCausalLM(SmolLM3Config(**{**_SIZES, **fields})))


def qwen2(**fields: Any) -> torch.nn.Module:
    """A random Qwen2, with biases on q, k and v."""
    return _random(Qwen2ForCausalLM(Qwen2Config(**{**_SIZES, "tie_word_embeddings": True, **fields})))


def qwen3(**fields: Any) -> torch.nn.Module:
    """A random Qwen3, with heads that are larger than their share of the hidden size."""
    return _random(Qwen3ForCausalLM(Qwen3Config(**{**_SIZES, "tie_word_embeddings": True, "head_dim": 8, **fields})))


def _random(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    return model.eval()


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(source: torch.nn.Module | Path, length: int = 32) -> torch.Tensor:
    """In fp32, of a model or of a folder that transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(source).float() if isinstance(source, Path) else source
    tokens = torch.arange(length)[None] * 7 % model.config.vocab_size
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, use_cache=False).logits


def largest_logits_difference(folder: Path, reference: Path) -> float:
    """Against nanotron's own forward in ``reference.safetensors``; packed documents too where there are any."""
    known = load_file(reference)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.inference_mode():
        runs = [(model(input_ids=known["input_ids"], use_cache=False).logits, known["logits"])]
        if "packed_logits" in known:
            packed = {"input_ids": known["packed_input_ids"], "position_ids": known["packed_position_ids"]}
            runs.append((model(**packed, use_cache=False).logits, known["packed_logits"]))
    return max((found - expected).abs().max().item() for found, expected in runs)


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an HF folder whose weights ``edit`` has changed in place."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file({name: t.clone() for name, t in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    return target
