"""The training model: transformers' model with packed attention and a loss that never holds all logits.

It subclasses the transformers class instead of wrapping it, so parameters keep their canonical names.
Shapes use: B rows, S tokens of a row, T = B·S, E hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import checkpoint

from smolconv.continual_pretraining.engine.attention import (
    ATTENTION,
    KERNELS,
    choose_attention,
    move,
    multiplied_dtype,
    pack,
)
from smolconv.continual_pretraining.engine.config import MAX_LOGITS
from smolconv.continual_pretraining.engine.sequence import ALONE, SequenceRanks
from smolconv.continual_pretraining.recipe import schema as recipe
from smolconv.continual_pretraining.tokens.files import IGNORED_LABEL
from smolconv.errors import NotInstalled, TrainingStopped, UnsupportedModel, UsageError
from smolconv.models.huggingface import spec_from_hf, spec_to_hf
from smolconv.models.registry import family_of

#: Recompilations of one function by torch.compile. Its default of 8 would be used up before the first step: layers with
#: and without rotation, the leak test, the start gate, and each held-out source's last batch.
MAX_GRAPHS = 64


def build_model(
    config: Mapping[str, Any], model: recipe.Model, device: str, sequence: SequenceRanks = ALONE
) -> torch.nn.Module:  # fmt: skip
    """Build the training model of a Hugging Face ``config``, on ``device`` and in training mode.

    Its weights are uninitialised: load a checkpoint. ``model``'s rope_theta and max_positions replace the config's.
    Weights are in ``model.dtype``, rotary frequencies in float32. The ranks of ``sequence`` share every micro-batch.

    Raises ``UnsupportedModel`` for a config that smolconv cannot represent or that has attention dropout,
    ``UsageError`` and ``NotInstalled`` if the attention or Liger's kernels are not available.
    """
    if config.get("attention_dropout"):
        raise UnsupportedModel(
            f"config.json: attention_dropout is {config['attention_dropout']}; smolconv trains without dropout.\n"
            "Set attention_dropout to 0 in config.json."
        )
    dtype = getattr(torch, model.dtype)
    spec = spec_from_hf(config)
    family = family_of(spec)
    spec = replace(
        spec,
        rope_theta=model.rope_theta or spec.rope_theta,
        max_positions=model.max_positions or spec.max_positions,
    )
    # transformers' embedding gives a padding token no gradient, and raises if its id is beyond the vocabulary.
    raw = spec_to_hf(spec, {**config, "pad_token_id": None, "use_cache": False}, model.dtype)
    hf_config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    hf_config._attn_implementation = ATTENTION
    with torch.device("meta"):
        built = _training_class(family.hf_class)(hf_config)
    built.to(dtype).to_empty(device=device)
    if spec.tied:  # to_empty has separated them
        built.lm_head.weight = built.model.embed_tokens.weight
    # No checkpoint stores the frequencies, and on the meta device they were never computed.
    built.model.rotary_emb = type(built.model.rotary_emb)(config=hf_config).to(device)
    built.attention = choose_attention(model.attention, device, dtype)
    built.sequence, built.attend = sequence, sequence.attention(KERNELS[built.attention])
    if multiplied_dtype(built.lm_head.weight) != dtype:
        for module in built.model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = _Float32Linear
    liger = _wanted_liger(model.liger, device, family.name)
    if liger is not None:
        _use_liger(built, family.name, liger)
    checkpointing = _checkpointing(model)
    if model.compile:
        _compile(built, checkpointing)
    elif checkpointing is not None:
        # the names in v4 and v5
        enable = getattr(built, "activation_checkpointing_enable", None) or built.gradient_checkpointing_enable
        enable(_CHECKPOINTING)
        for layer in built.model.layers:
            layer._gradient_checkpointing_func = checkpointing
    return built.train()


class TrainingForward:
    """Mixin for a transformers model: its forward pass returns the loss of packed documents."""

    attention: str  #: the kernel's name
    attend: Callable[..., torch.Tensor]
    sequence: SequenceRanks

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.lm_head = SummedCrossEntropy(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy summed over all labels except ``IGNORED_LABEL``, fp32, and the number of those labels, int64.

        All inputs are int64 [B, S]. ``positions`` are 0 where a document begins; ``labels`` are the next tokens,
        already shifted. Without any label the sum is 0, with a graph. Leave ``positions`` on the CPU: see ``pack``.
        Ranks that share a micro-batch all get the whole, and each returns the sum over its own tokens.
        """
        shape = input_ids.shape
        for name, given in (("input_ids", input_ids), ("positions", positions), ("labels", labels)):
            if given.dtype != torch.int64 or given.shape != shape or given.ndim != 2 or not given.numel():
                raise ValueError(
                    f"{name} is {given.dtype} {list(given.shape)}; expected int64 [rows, tokens], and all three alike "
                    f"(input_ids is {list(shape)})"
                )
        device = input_ids.device
        padding = -labels.numel() % self.sequence.size
        packing = pack(positions, device, self.attend, by_length=self.attention == "documents", padding=padding)
        row = [move(x, device).reshape(1, -1) for x in (input_ids, positions, labels)]
        if padding:
            beyond = torch.arange(padding, device=device)[None]
            row = [
                torch.cat(pair, 1) for pair in zip(row, (beyond * 0, beyond, torch.full_like(beyond, IGNORED_LABEL)))
            ]
        if packing.order is not None:
            row = [x[:, packing.order] for x in row]
        tokens, places, targets = (self.sequence.own(x) for x in row)
        hidden = self.model(  # type: ignore[attr-defined]
            input_ids=tokens, position_ids=places, attention_mask=None, use_cache=False, packing=packing
        ).last_hidden_state
        return self.lm_head(hidden[0], targets[0]), (targets != IGNORED_LABEL).sum()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Some DeepSpeed releases cast the whole module to bfloat16, in which rotary frequencies lose precision.
        before = dict(self.model.rotary_emb.named_buffers())  # type: ignore[attr-defined]
        applied = super()._apply(fn, recurse)  # type: ignore[misc]
        for name, buffer in self.model.rotary_emb.named_buffers():  # type: ignore[attr-defined]
            if buffer.dtype != before[name].dtype:
                setattr(self.model.rotary_emb, name, before[name].to(buffer.device))  # type: ignore[attr-defined]
        return applied


@functools.cache
def _training_class(hf_class: str) -> Any:
    return type(f"Training{hf_class}", (TrainingForward, getattr(transformers, hf_class)), {})


#: torch.utils.checkpoint's options. Nothing in a layer is random.
_CHECKPOINTING: Mapping[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def _checkpointing(model: recipe.Model) -> Callable[..., Any] | None:
    """torch's activation checkpointing with the recipe's settings; None if it is off."""
    if not model.activation_checkpointing:
        return None
    return functools.partial(_checkpoint_to_host if model.activation_offload else checkpoint, **_CHECKPOINTING)


def _checkpoint_to_host(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Keep a checkpointed layer's input in host memory until the backward pass."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, **options)


# --- loss -------------------------------------------------------------------------------------------------------------


class SummedCrossEntropy(torch.nn.Linear):  # type: ignore[misc]
    """Head and loss in one module, because ZeRO-3 gathers a weight only while its module is called."""

    fused: Callable[..., torch.Tensor] | None = None  #: Liger's function of (weight, hidden, labels)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed cross entropy, fp32, of ``hidden`` [T, E] and ``labels`` [T]."""
        if self.fused is not None:
            return self.fused(self.weight, hidden, labels).float()
        if torch.is_grad_enabled():
            return _ChunkedCrossEntropy.apply(hidden, self.weight, labels)
        return _chunked_cross_entropy(hidden, self.weight, labels, None)


class _ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Computes gradients in the forward pass, chunk by chunk while the logits exist, so nothing is computed twice.

    The weight's gradient [V, E] is summed in fp32 over the chunks and kept until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        gradients = _Gradients(torch.empty_like(hidden))
        loss = _chunked_cross_entropy(hidden, weight, labels, gradients)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight = ctx.saved_tensors
        # In place: autograd refuses a second backward pass through the same graph.
        return (hidden * scale).to(hidden.dtype), weight.mul_(scale).to(ctx.dtype), None


class _Gradients:
    """The gradients of the summed loss by its inputs."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden
        self.weight: torch.Tensor | None = None


def _chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, gradients: _Gradients | None
) -> torch.Tensor:
    hidden, given = hidden.detach(), weight.detach()
    weight = given.to(multiplied_dtype(given))
    rows = max(1, MAX_LOGITS.get(hidden.device.type, MAX_LOGITS["cuda"]) // weight.shape[0])
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), rows):
        inputs = hidden[start : start + rows].to(weight.dtype)
        wanted = labels[start : start + rows, None]
        kept = wanted != IGNORED_LABEL
        wanted = wanted.clamp_min(0)
        logits = (inputs @ weight.t()).log_softmax(-1, dtype=torch.float32)
        loss -= (logits.gather(1, wanted) * kept).sum()
        if gradients is None:
            continue
        # Gradient of the logits: probabilities, minus one at the label. Rows without a label are cleared in the
        # products, which are smaller.
        probabilities = logits.exp_()
        probabilities.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
        of_logits = probabilities.to(weight.dtype)
        gradients.hidden[start : start + rows] = (of_logits @ weight) * kept
        masked = inputs * kept
        if gradients.weight is None:
            whole = len(hidden) <= rows
            gradients.weight = of_logits.t() @ masked if whole else (of_logits.t() @ masked).float()
        elif weight.dtype == torch.float32:
            gradients.weight.addmm_(of_logits.t(), masked)
        else:
            gradients.weight += of_logits.t() @ masked
        del logits, probabilities, of_logits  # free them before the next chunk
    return loss


# --- optional speed-ups -----------------------------------------------------------------------------------------------


def _wanted_liger(asked: str, device: str, architecture: str) -> Any | None:
    """liger_kernel.transformers for a recipe's ``model.liger``; None if it is not used.

    "auto" continues without it, with a warning if it is installed. "on" raises ``NotInstalled`` and ``UsageError``.
    """
    on_gpu = device.startswith("cuda")
    if asked == "off" or (asked == "auto" and not on_gpu):
        return None
    try:
        import liger_kernel.transformers as liger

        getattr(liger, _patch_name(architecture))  # this imports it, which fails with unsupported transformers
    except (ImportError, AttributeError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "liger_kernel"
        why = str(error).partition("\n")[0].rstrip(".")
        found = "is not installed" if missing else f"cannot be used for {architecture} here: {why}"
        advice = (
            "Install it (pip install liger-kernel)" if missing else "Install what it needs, or another release of it"
        )
        if asked == "on":
            raise NotInstalled(
                f"model.liger is on, but liger-kernel {found}.\n{advice}, or set model.liger to auto."
            ) from error
        if not missing:
            warnings.warn(
                f"training continues without Liger: liger-kernel {found}. {advice}, or set model.liger to off.",
                stacklevel=2,
            )
        return None
    if not on_gpu:
        raise UsageError(f"model.liger is on, but Liger's kernels need GPUs, and this run is on {device}.")
    return liger


def _patch_name(architecture: str) -> str:
    return f"apply_liger_kernel_to_{architecture}"


def _use_liger(built: Any, architecture: str, liger: Any) -> None:
    """Liger's RMSNorm, rotary embedding, SwiGLU and its loss from hidden states.

    Liger replaces the first three in transformers' module for the whole process, in addition to ``built``'s. The module
    gets its originals back, because this process verifies exports on the CPU, which Triton does not support. The rotary
    function exists only in the module, so it dispatches on the device of its tensors.
    """
    modeling = sys.modules[type(built.model).__module__]
    before = dict(vars(modeling))
    try:
        getattr(liger, _patch_name(architecture))(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=built
        )
        fused = modeling.apply_rotary_pos_emb
    finally:
        vars(modeling).update(before)
    modeling.apply_rotary_pos_emb = _on_gpus(fused, modeling.apply_rotary_pos_emb)  # type: ignore[attr-defined]
    built.lm_head.fused = liger.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED_LABEL, reduction="sum", accum_dtype=torch.float32
    ).forward  # not the module, which would become a submodule of the head


def _on_gpus(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def chosen(query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return (fused if query.is_cuda else plain)(query, *rest, **options)

    return chosen


def _compile(built: Any, checkpointing: Callable[..., Any] | None) -> None:
    """Compile each layer in place, which keeps names. Attention is excluded: every packing would be compiled again."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MAX_GRAPHS)
    built.attend = torch.compiler.disable(built.attend)
    for layer in built.model.layers:
        # One graph per number of tokens; a run has few. Otherwise the leak test would make the steps' graph dynamic.
        layer.compile(dynamic=False)
        if checkpointing is not None:
            # Checkpointing stays outside the compiled code. transformers v5 has its own inside: attention breaks the
            # graph there, and torch silently leaves the whole layer uncompiled.
            layer._compiled_call_impl = functools.partial(checkpointing, layer._compiled_call_impl)


class _Float32Linear(torch.nn.Linear):  # type: ignore[misc]
    """A bfloat16 layer on a CPU without bfloat16 instructions: see ``multiplied_dtype``."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Float32Product.apply(inputs, self.weight, self.bias)


class _Float32Product(torch.autograd.Function):  # type: ignore[misc]
    """``F.linear`` in float32. Inputs, results, gradients and saved tensors keep their dtype."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.biased = bias is not None
        product = inputs.float() @ weight.float().t()
        return (product if bias is None else product + bias).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        whole = gradient.float()
        rows = whole.flatten(0, -2)
        of_weight = rows.t() @ inputs.flatten(0, -2).float()
        return (
            (whole @ weight.float()).to(inputs.dtype),
            of_weight.to(weight.dtype),
            rows.sum(0).to(weight.dtype) if ctx.biased else None,
        )


# --- leaks ------------------------------------------------------------------------------------------------------------


def check_no_leak(
    model: torch.nn.Module, vocab_size: int, sequence_length: int, device: str, sequence: SequenceRanks = ALONE
) -> None:  # fmt: skip
    """Refuse to train if a document's loss depends on the document before it, or not on its own earlier tokens.

    ``model`` is a training model or an engine that holds one. Every rank calls this and runs the same three forward
    passes of one row. The last two thirds of the row are a document: its loss must not change with the text of the
    first third, and must change with its own first token.

    Raises ``TrainingStopped``.
    """
    if sequence_length < 4 or vocab_size < 2:
        return  # too short for two documents
    # Not one half, where ranks that share the row may cut it.
    first = sequence_length // 3
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (1, sequence_length), generator=generator)
    positions = torch.cat([torch.arange(first), torch.arange(sequence_length - first)])[None]
    # The changed token's own loss is excluded: it can reach the others only through attention.
    labels = tokens.roll(-1, 1)
    labels[:, : first + 1] = IGNORED_LABEL

    def loss(changed: slice) -> float:
        ids = tokens.clone()
        ids[:, changed] = (ids[:, changed] + 1) % vocab_size
        with torch.no_grad():
            found = model(input_ids=ids.to(device), positions=positions, labels=labels.to(device))[0]
        return sequence.totals(found)[0]  # all ranks must decide the same

    training = model.training
    model.eval()
    try:
        alone, other_document, own_token = loss(slice(0, 0)), loss(slice(0, first)), loss(slice(first, first + 1))
    finally:
        model.train(training)
    name = getattr(getattr(model, "module", model), "attention", "the model's")
    # The same numbers are computed in the same order, so only a leak can change them.
    if other_document != alone:
        raise TrainingStopped(
            f"documents of a packed row see each other in {name} attention: the loss of one is {alone!r}, and "
            f"{other_document!r} after another document.\nSet model.attention to another one."
        )
    if own_token == alone:
        raise TrainingStopped(
            f"tokens of a document do not see the ones before them in {name} attention: the loss stays {alone!r} when "
            "its first token changes.\nCheck the checkpoint's weights; set model.attention to another one."
        )
