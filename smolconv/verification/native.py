"""nanotron's forward pass on its own tensors, with fused q, k, v and gate, up, its rotary convention and its mask.

Written from nanotron's source (branch ``smollm3``, models/llama.py and models/qwen.py), for inference. It reads
``model_config.json`` and the native parameters, without the mapping, so an error of the mapping shows as a
difference. Shapes: B rows, T positions, E hidden size, H query heads, K key/value heads, D head size, F MLP size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolconv.layouts.nanotron.reader import NativeModel
from smolconv.tensors.lazy import LazyTensor, row_slice
from smolconv.verification.forward import ForwardPass, embedding_rows, to_torch

if TYPE_CHECKING:
    import torch

_BLOCK = "model.decoder.{}.pp_block."
_EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
_NORM = "model.final_layer_norm.pp_block.weight"
_HEAD = "model.lm_head.pp_block.weight"
#: Rows of scores that eager attention holds at a time: [H, rows, T] instead of [H, T, T].
_EAGER_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class _Context:
    rotary: tuple[torch.Tensor, torch.Tensor]  #: cosine and sine, fp32 [T, D/2]
    documents: torch.Tensor | None  #: [B, T]: the document of each position; None for causal attention over the row


class NanotronSide:
    """A ``Side``: smolconv's own forward pass on a nanotron checkpoint's stored tensors."""

    def __init__(self, native: NativeModel, dtype: torch.dtype, device: str = "cpu") -> None:
        config: Mapping[str, Any] = native.config
        self.parameters: Mapping[str, LazyTensor] = native.parameters
        self.dtype, self.device = dtype, device
        self.title = "smolconv's own forward on nanotron's tensors"
        self.num_layers = config["num_hidden_layers"]
        self.vocab_size = config["vocab_size"]
        self.max_positions = config["max_position_embeddings"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_size = config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        self.theta = config["rope_theta"]
        self.interleaved = bool(config["rope_interleaved"])
        self.activation = config["hidden_act"]
        qwen2 = bool(config.get("is_qwen2_config"))
        # Llama's forward pass has neither: it rotates in every layer and attends to the whole row.
        self.no_rope_layer = config.get("no_rope_layer") if qwen2 else None
        self.separates_documents = qwen2 and bool(config.get("_use_doc_masking"))
        self.head = _EMBEDDING if config["tie_word_embeddings"] else _HEAD

    def begin(self, runs: Sequence[ForwardPass]) -> None:
        for run in runs:
            run.hidden = embedding_rows(self.parameters[_EMBEDDING], run.tokens, self.dtype).to(self.device)
            run.context = _Context(
                rotary=self._rotary(run.tokens.shape[1]),
                documents=(run.positions == 0).cumsum(1).to(self.device)
                if self.separates_documents and run.packed else None,
            )  # fmt: skip
            run.observe("model.embed_tokens", run.hidden)

    def advance(self, layer: int, runs: Sequence[ForwardPass]) -> None:
        prefix = _BLOCK.format(layer)
        weights = {
            name.removeprefix(prefix): to_torch(tensor, self.dtype).to(self.device)
            for name, tensor in self.parameters.items()
            if name.startswith(prefix)
        }
        for run in runs:
            self._block(layer, weights, run)

    def finish(self, runs: Sequence[ForwardPass]) -> None:
        weight = to_torch(self.parameters[_NORM], self.dtype).to(self.device)
        for run in runs:
            run.hidden = self._rms_norm(run.hidden, weight)
            run.observe("model.norm", run.hidden)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        return to_torch(row_slice(self.parameters[self.head], start, stop), self.dtype).to(self.device)

    # --- one block ---

    def _block(self, layer: int, weights: Mapping[str, torch.Tensor], run: ForwardPass) -> None:
        import torch

        linear, name = torch.nn.functional.linear, f"model.layers.{layer}"
        normed = self._rms_norm(run.hidden, weights["input_layernorm.weight"])
        run.observe(f"{name}.input_layernorm", normed)
        fused = linear(normed, weights["attn.qkv_proj.weight"], weights.get("attn.qkv_proj.bias"))
        rows = (self.heads * self.head_size, self.kv_heads * self.head_size, self.kv_heads * self.head_size)
        q, k, v = fused.split(rows, dim=-1)
        # Reported in Hugging Face's row order, so that the sides can be compared.
        run.observe(f"{name}.self_attn.q_proj", self._half_split(q))
        run.observe(f"{name}.self_attn.k_proj", self._half_split(k))
        run.observe(f"{name}.self_attn.v_proj", v)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in (q, k, v))
        # Every no_rope_layer-th layer, counted from 1, does not rotate.
        if not (self.no_rope_layer and (layer + 1) % self.no_rope_layer == 0):
            q, k = self._rotate(q, run.context.rotary), self._rotate(k, run.context.rotary)
        mixed = self._attend(q, k, v, run).transpose(1, 2).flatten(2)
        run.observe(f"{name}.self_attn.attention", mixed)
        output = linear(mixed, weights["attn.o_proj.weight"])
        run.observe(f"{name}.self_attn", output)
        run.hidden = run.hidden + output
        normed = self._rms_norm(run.hidden, weights["post_attention_layernorm.weight"])
        run.observe(f"{name}.post_attention_layernorm", normed)
        gate, up = linear(normed, weights["mlp.gate_up_proj.weight"]).chunk(2, dim=-1)
        run.observe(f"{name}.mlp.gate_proj", gate)
        run.observe(f"{name}.mlp.up_proj", up)
        output = linear(self._activated(gate) * up, weights["mlp.down_proj.weight"])
        run.observe(f"{name}.mlp", output)
        run.hidden = run.hidden + output

    def _rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        import torch

        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * scaled.to(hidden.dtype)

    def _activated(self, gate: torch.Tensor) -> torch.Tensor:
        from transformers.activations import ACT2FN

        activated: torch.Tensor = ACT2FN[self.activation](gate)
        return activated

    def _rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """nanotron rotates by the index in the row, regardless of documents."""
        import torch

        powers = torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size
        angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / self.theta**powers)
        return angles.cos().to(self.device), angles.sin().to(self.device)

    def _rotate(self, heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, heads, T, D], by pairs (x0, y0, x1, y1, ..) when interleaved, else (x0, x1, .., y0, y1, ..)."""
        import torch

        cosine, sine = (table.to(heads.dtype) for table in rotary)
        if self.interleaved:
            x, y = heads[..., 0::2], heads[..., 1::2]
            return torch.stack((x * cosine - y * sine, y * cosine + x * sine), dim=-1).flatten(-2)
        x, y = heads.chunk(2, dim=-1)
        return torch.cat((x * cosine - y * sine, y * cosine + x * sine), dim=-1)

    def _half_split(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.interleaved:
            return rows
        pairs = rows.unflatten(-1, (-1, self.head_size // 2, 2))
        return pairs.transpose(-1, -2).flatten(-3)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        """[B, H, T, D]. Causal attention over the row, or within documents if they are separated."""
        import torch

        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        documents = run.context.documents
        if run.attention == "sdpa":
            attention = torch.nn.functional.scaled_dot_product_attention
            if documents is None:
                return attention(q, k, v, is_causal=True)
            same = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
            return attention(q, k, v, attn_mask=same)
        length, parts = q.shape[2], []
        for start in range(0, length, _EAGER_ROWS):
            stop = min(start + _EAGER_ROWS, length)
            scores = (q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2)) * self.head_size**-0.5
            index = torch.arange(stop, device=q.device)
            seen = index[None, :] <= index[start:stop, None]
            if documents is not None:
                seen = seen & (documents[:, None, start:stop, None] == documents[:, None, None, :stop])
            scores = scores.masked_fill(~seen, float("-inf"))
            parts.append(scores.float().softmax(-1).to(q.dtype) @ v[:, :, :stop])
        return torch.cat(parts, dim=2)
