"""The logits tier: both checkpoints through transformers in fp32, on the same tokens, one model in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolconv.checkpoint import Checkpoint, LazyTensor, cast
from smolconv.errors import BadCheckpoint, NotInstalled, UsageError
from smolconv.spec import spec_to_hf
from smolconv.verify.tensors import forward_order

_SEED = 20240711


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A limit that can fail."""

    limit: float
    value: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class LogitsReport:
    """How far two models' logits lie apart, beside the noise floor of A: sdpa against eager attention."""

    positions: int
    tokens_from: str
    max_abs: float
    mean_abs: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    nll_a: float
    nll_b: float
    noise_floor: Mapping[str, float]
    gates: Mapping[str, Gate]
    layers: tuple[Mapping[str, Any], ...]  #: module, max_abs and floor, in forward order
    first_divergence: str | None

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates.values())


def require_torch() -> None:
    """Raise ``NotInstalled`` when the logits tier cannot run."""
    from importlib.util import find_spec  # noqa: PLC0415

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise NotInstalled(
            f"comparing logits needs {' and '.join(missing)}: pip install 'smolconv[verify]'.\n"
            "Without them, smolconv verify --tensors-only compares specs and tensors."
        )


def choose_tokens(
    a: Checkpoint, b: Checkpoint, *, text: Path | None, tokens: Path | None, length: int
) -> tuple[NDArray[np.int64], str]:
    """Token ids ``[1, length]``, and where they come from. Raises ``UsageError`` for ids beyond the vocabulary."""
    vocab = min(a.spec.vocab_size, b.spec.vocab_size)
    length = min(length, a.spec.max_positions, b.spec.max_positions)
    if tokens is not None:
        ids = np.load(tokens, allow_pickle=False).reshape(-1).astype(np.int64)
        where = str(tokens)
    else:
        tokenizer = a.assets.get("tokenizer.json") or b.assets.get("tokenizer.json")
        if tokenizer is None:
            if text is not None:
                raise UsageError("--text needs a tokenizer.json in A or B; give ids with --tokens FILE.npy instead.")
            ids = np.random.default_rng(_SEED).integers(0, vocab, length)
            where = "random tokens, since neither side has a tokenizer"
        else:
            require_torch()
            from tokenizers import Tokenizer  # noqa: PLC0415

            content = text.read_text() if text is not None else _shipped_text()
            ids = np.array(Tokenizer.from_file(str(tokenizer)).encode(content).ids, np.int64)
            where = str(text) if text is not None else "the text that ships with smolconv"
    if not len(ids):
        raise UsageError(f"{where} gives no tokens.")
    if ids.max() >= vocab or ids.min() < 0:
        raise UsageError(f"{where} gives token {int(ids.max())}, but the smaller vocabulary has {vocab} entries.")
    return np.resize(ids, max(2, length))[None, :], where


def _shipped_text() -> str:
    return (files("smolconv.verify") / "prompts.txt").read_text(encoding="utf-8")


def compare_logits(
    a: Checkpoint,
    b: Checkpoint,
    ids: NDArray[np.int64],
    tokens_from: str,
    *,
    folders: tuple[Path | None, Path | None] = (None, None),
    gates: Mapping[str, float | None] | None = None,
) -> LogitsReport:
    """Run A twice (sdpa, eager) and B once, in fp32. ``folders`` are loaded by transformers itself where given.

    Gates that the user sets replace the calibrated ones. Raises ``NotInstalled``.
    """
    require_torch()
    import torch  # noqa: PLC0415

    given = gates or {}
    tokens = torch.from_numpy(ids)
    logits_a, hidden_a = _forward(a, folders[0], tokens, "sdpa")
    logits_e, hidden_e = _forward(a, folders[0], tokens, "eager")
    floor = _distances(logits_a, logits_e)
    layer_floor = {name: _largest(hidden_a[name], hidden_e[name]) for name in hidden_a}
    del logits_e, hidden_e
    logits_b, hidden_b = _forward(b, folders[1], tokens, "sdpa")
    if logits_a.shape != logits_b.shape:
        raise BadCheckpoint(f"A gives logits {list(logits_a.shape)}, B {list(logits_b.shape)}: vocabularies differ.")
    found = _distances(logits_a, logits_b)
    spread = float(logits_a.std())
    # Calibrated on SmolLM2-135M (decisions): another correct implementation stays below 1e-3 at a spread of 6.4.
    limit = given.get("max_abs")
    limit = max(1e-3 * spread / 6.4, 8 * floor["max_abs"]) if limit is None else limit
    kl = given.get("kl")
    kl = max(1e-9, 8 * floor["kl_mean"]) if kl is None else kl
    top1 = given.get("top1")
    top1 = 1.0 if top1 is None else top1
    decided = _top1_agreement(logits_a, logits_b, 4 * floor["max_abs"])
    checks = {
        "max_abs": Gate(limit=limit, value=found["max_abs"], passed=found["max_abs"] <= limit),
        "kl": Gate(limit=kl, value=found["kl_mean"], passed=found["kl_mean"] <= kl),
        "top1": Gate(limit=top1, value=decided, passed=decided >= top1),
    }
    layers, first = [], None
    for name in sorted(hidden_a, key=lambda module: forward_order(f"{module}.weight")):
        distance = _largest(hidden_a[name], hidden_b[name]) if name in hidden_b else float("inf")
        scale = float(hidden_a[name].std())
        diverged = not distance <= max(8 * layer_floor[name], 2e-5 * scale)
        layers.append({"module": name, "max_abs": distance, "floor": layer_floor[name], "diverged": diverged})
        first = first or (name if diverged else None)
    passed = all(gate.passed for gate in checks.values())
    return LogitsReport(
        positions=int(tokens.numel()),
        tokens_from=tokens_from,
        max_abs=found["max_abs"],
        mean_abs=found["mean_abs"],
        kl_mean=found["kl_mean"],
        kl_p99=found["kl_p99"],
        top1_agreement=found["top1_agreement"],
        nll_a=_nll(logits_a, tokens),
        nll_b=_nll(logits_b, tokens),
        noise_floor=floor,
        gates=checks,
        layers=tuple(layers),
        first_divergence=None if passed else first or "lm_head",
    )


def _forward(checkpoint: Checkpoint, folder: Path | None, tokens: Any, attention: str) -> tuple[Any, dict[str, Any]]:
    """Logits [B, T, V] in fp32, and each block's output [B, T, E] by HF module path."""
    import torch  # noqa: PLC0415

    model = load_model(checkpoint, folder, attention)
    hidden: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            hidden[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    wanted = ("embed_tokens", "norm", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in wanted:
            module.register_forward_hook(keep(name))
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits, hidden


def load_model(checkpoint: Checkpoint, folder: Path | None, attention: str = "sdpa") -> Any:
    """A transformers model in fp32 and eval mode: ``folder`` by from_pretrained, else the checkpoint's own tensors."""
    require_torch()
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()
    if folder is not None:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
        return loaded.float().eval()
    raw = spec_to_hf(checkpoint.spec, _carried(checkpoint), "float32")
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu")
    # Rotary frequencies are a buffer that no checkpoint stores; on the meta device they were never computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    if checkpoint.spec.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        found = dict(model.named_parameters())
        for name, tensor in checkpoint.parameters.items():
            found.pop(name).copy_(to_torch(tensor))
    if found:
        raise BadCheckpoint(f"transformers expects {sorted(found)[:3]}, which the checkpoint does not hold.")
    return model.float().eval()


def to_torch(tensor: LazyTensor) -> Any:
    """The whole tensor as fp32 in torch."""
    import torch  # noqa: PLC0415

    values: Any = cast(tensor, "float32").numpy()
    return torch.from_numpy(values.view(np.float32))


def _carried(checkpoint: Checkpoint) -> Mapping[str, Any]:
    # Ids beyond the vocabulary stop transformers from building the embedding; they play no part in a forward pass.
    document = checkpoint.origin.get("config.json") or checkpoint.origin.get("model_config.json") or b"{}"
    carried = json.loads(document)
    return {**carried, "pad_token_id": None}


def _distances(a: Any, b: Any) -> dict[str, float]:
    difference = (a - b).abs()
    kl = _kl(a, b)
    return {
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1_agreement": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    }


def _kl(a: Any, b: Any) -> Any:
    """KL(A || B) per position, in float64, one row at a time: [B * T]."""
    import torch  # noqa: PLC0415

    rows = []
    for x, y in zip(a.flatten(0, 1), b.flatten(0, 1)):
        p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        rows.append((p.exp() * (p - q)).sum().clamp(min=0))
    return torch.stack(rows)


def _top1_agreement(a: Any, b: Any, gap: float) -> float:
    """Share of positions with the same first choice, among those where A's first two lie further apart than ``gap``."""
    two = a.topk(2, dim=-1).values
    decided = (two[..., 0] - two[..., 1]) > gap
    if not decided.any():
        return 1.0
    return float((a.argmax(-1) == b.argmax(-1))[decided].double().mean())


def _largest(a: Any, b: Any) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


def _nll(logits: Any, tokens: Any) -> float:
    import torch  # noqa: PLC0415

    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
