"""What ``gpu_check.py`` computes on a device, each job in a process of its own: ``python gpu_jobs.py``.

Its standard input names a file, JOB.json. A process that is started ahead of its job has then imported everything.
JOB.json is ``{"job": a name of JOBS, "result": a path, ...the function's keywords}``; the result is JSON, too. A kernel
that faults takes its process with it and no other one, and each job's peak memory is its own.
Shapes use: T tokens of all documents, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smolconv.continual_pretraining.engine import attention as attentions
from smolconv.continual_pretraining.engine.attention import KERNELS, choose_attention, pack
from smolconv.continual_pretraining.engine.model import build_model, check_no_leak
from smolconv.continual_pretraining.recipe import schema as recipe
from smolconv.continual_pretraining.run.gate import source_loss
from smolconv.continual_pretraining.tokens.files import Batch
from smolconv.errors import SmolconvError, TrainingStopped
from smolconv.models.huggingface import spec_from_hf, spec_to_hf
from smolconv.verification.hf import FolderWeights, TransformersSide

#: A document whose own values are this much smaller than all are is compared with this share of theirs: the gradients
#: of a document of one token are exactly zero.
_FLOOR = 0.1


def machine() -> dict[str, Any]:
    """The GPU, or ``"gpu": None``; versions; which kernels cannot run here, and why."""
    here = torch.cuda.is_available()
    missing = {"flash": attentions._no_flash(), "varlen": attentions._no_varlen(), "liger": _no_liger()}
    unable = {name: why for name, why in missing.items() if why}
    if not here:
        return {"gpu": None, "torch": torch.__version__, "unable": unable}
    properties = torch.cuda.get_device_properties(0)
    for name in ("flash", "varlen"):
        if why := attentions._unable("cuda:0", torch.bfloat16):
            unable.setdefault(name, f"this kernel {why}")
    return {
        "gpu": torch.cuda.get_device_name(0),
        "bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "unable": unable,
    }


def _no_liger() -> str | None:
    try:
        import liger_kernel.transformers as liger

        for architecture in ("llama", "smollm3"):
            getattr(liger, f"apply_liger_kernel_to_{architecture}")
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"liger-kernel cannot be used here: {error}".partition("\n")[0]
    return None


def kernel_errors(
    *, kernel: str, dtype: str, shapes: Sequence[Sequence[int]], lengths: Sequence[int],
    configs: Sequence[Mapping[str, Any]], config_lengths: Sequence[int], device: str, stand_in: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """``attention_errors`` of every (heads, key/value heads, head size), and ``model_errors`` of every config; what one
    of them raised is ``{"error": what}`` in its place. With ``stand_in``, torch's varlen_attn is a plain computation.
    """
    if stand_in:
        _stand_in_for_varlen()
    same = {"kernel": kernel, "dtype": dtype, "device": device}
    attention = [
        _or_error(attention_errors, heads=heads, kv_heads=kv_heads, head_size=size, lengths=lengths, **same)
        for heads, kv_heads, size in shapes
    ]
    models = [_or_error(model_errors, config=config, lengths=config_lengths, **same) for config in configs]
    return {"attention": attention, "models": models}


def _stand_in_for_varlen() -> None:
    """A plain computation in the place of torch's kernel, called by the installed release's own arguments, on a CPU."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    @functools.wraps(varlen.varlen_attn)
    def plain(*args: Any, **options: Any) -> torch.Tensor:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments
        q, k, v = (given[name] for name in ("query", "key", "value"))
        if q.shape[1] != k.shape[1] and not given.get("enable_gqa"):
            raise ValueError(f"{k.shape[1]} key/value heads for {q.shape[1]} query heads")
        causal = given.get("is_causal") or given.get("window_size") == (-1, 0)
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1).float() for x in (q, k, v)), is_causal=causal, scale=given.get("scale"),
                enable_gqa=q.shape[1] != k.shape[1],
            ).transpose(0, 1)
            for a, b in itertools.pairwise(given["cu_seq_q"].tolist())
        ]  # fmt: skip
        return torch.cat(parts).to(q.dtype)

    varlen.varlen_attn = plain
    attentions._unable = lambda *_: None


def _or_error(job: Callable[..., dict[str, Any]], **given: Any) -> dict[str, Any]:
    try:
        return job(**given)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}


# --- attention --------------------------------------------------------------------------------------------------------


def attention_errors(
    *, kernel: str, dtype: str, heads: int, kv_heads: int, head_size: int, lengths: Sequence[int], device: str
) -> dict[str, float]:
    """Of a kernel's output and gradients: the worst document's root mean square error, by that of its values.

    Expected values are softmax(QK^T)V of each document alone, spelt out in float64 on the CPU, from the same numbers.

    Raises ``NotInstalled`` and ``UsageError`` where the kernel cannot run.
    """
    computed = getattr(torch, dtype)
    choose_attention(kernel, device, computed)
    generator = torch.Generator().manual_seed(head_size + heads)
    total = sum(lengths)
    query, key, value, of_output = (
        torch.randn(total, each, head_size, generator=generator).to(computed)
        for each in (heads, kv_heads, kv_heads, heads)
    )
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packing = pack(positions, torch.device(device), KERNELS[kernel], by_length=kernel == "documents")
    order = torch.arange(total) if packing.order is None else packing.order.cpu()
    # As the layers hand them over: rotated queries and keys are new tensors, values are a view of a projection.
    given = [tensor[order].to(device).transpose(0, 1)[None] for tensor in (query, key, value)]
    q, k, v = (tensor.detach().requires_grad_() for tensor in (given[0].contiguous(), given[1].contiguous(), given[2]))
    output = packing.kernel(q, k, v, packing, head_size**-0.5)
    output.backward(of_output[order].to(device)[None])
    found = [output.detach()[0], *(tensor.grad[0].transpose(0, 1) for tensor in (q, k, v))]
    expected = _documents_alone(query, key, value, of_output, lengths)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    back = order.argsort()
    return {
        name: _worst_document(mine.double().cpu()[back], theirs, lengths)
        for name, mine, theirs in zip(names, found, expected)
    }


def _documents_alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of_output: torch.Tensor, lengths: Sequence[int]
) -> list[torch.Tensor]:
    parts: list[list[torch.Tensor]] = []
    shared = query.shape[1] // key.shape[1]
    for q, k, v, gradient in zip(*(tensor.double().split(list(lengths)) for tensor in (query, key, value, of_output))):
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        keys, values = (tensor.repeat_interleave(shared, 1) for tensor in leaves[1:])
        scores = torch.einsum("qhd,khd->hqk", leaves[0], keys) / math.sqrt(q.shape[-1])
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        output = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), values)
        parts.append([output.detach(), *torch.autograd.grad(output, leaves, gradient)])
    return [torch.cat(part) for part in zip(*parts)]


def _worst_document(found: torch.Tensor, expected: torch.Tensor, lengths: Sequence[int]) -> float:
    floor = _FLOOR * _rms(expected)
    pairs = zip(found.split(list(lengths)), expected.split(list(lengths)))
    return _worst([_rms(mine - theirs) / max(_rms(theirs), floor) for mine, theirs in pairs])


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _worst(errors: Sequence[float]) -> float:
    """Something that is not a number is worse than every number, which ``max`` would not say."""
    return max(errors) if all(math.isfinite(error) for error in errors) else math.inf


def long_document(
    *, heads: int, kv_heads: int, head_size: int, length: int, folder: str, device: str
) -> dict[str, int]:
    """Bytes at the fullest of one document in float32: "attention" with its backward pass, and the start gate's
    "source", the Hugging Face ``folder``.
    """
    place = torch.device(device)
    packing = pack(torch.arange(length)[None], place, KERNELS["documents"], by_length=True)
    query, key, value = (
        torch.randn(1, each, length, head_size, device=place, requires_grad=True)
        for each in (heads, kv_heads, kv_heads)
    )
    packing.kernel(query, key, value, packing, head_size**-0.5).sum().backward()
    found = {"attention": _peak_bytes(place)["allocated"]}
    del query, key, value
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    side = TransformersSide(FolderWeights(Path(folder)), torch.float32, device)
    row = np.arange(length)[None]
    tokens = row % side.vocab_size
    source_loss(side, Batch(input_ids=tokens, positions=row, labels=np.roll(tokens, -1), rows=()))
    return {**found, "source": _peak_bytes(place)["allocated"]}


# --- the whole model --------------------------------------------------------------------------------------------------


def model_errors(
    *, config: Mapping[str, Any], kernel: str, dtype: str, lengths: Sequence[int], device: str
) -> dict[str, Any]:
    """Packed loss and gradients on the device beside those of float32 on the CPU, from the same weights and tokens.

    ``loss`` is the difference in nats of the mean, ``gradients`` the worst parameter's root mean square error by that
    of its gradient, ``leak`` what the leak test says, None when it passes.
    """
    torch.manual_seed(0)
    asked = {"source": "-", "liger": "off", "dtype": dtype, "attention": kernel}
    found = build_model(config, recipe.Model.model_validate(asked), device)
    on_cpu = recipe.Model.model_validate({**asked, "dtype": "float32", "attention": "documents"})
    expected = build_model(config, on_cpu, "cpu")
    with torch.no_grad():
        _randomise(expected, std=0.05)  # attention that tells tokens apart
        for mine, theirs in zip(found.parameters(), expected.parameters()):
            theirs.copy_(theirs.to(mine.dtype))  # the same numbers on both sides
            mine.copy_(theirs)
    vocabulary = config["vocab_size"]
    tokens = torch.randint(0, vocabulary, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = tokens.roll(-1, 1)
    labels[positions.roll(-1, 1) == 0] = -100
    losses = []
    for model, place in ((found, device), (expected, "cpu")):
        total, targets = model(input_ids=tokens.to(place), positions=positions, labels=labels.to(place))
        loss = total / targets
        loss.backward()
        losses.append(float(loss.detach()))
    errors = [
        _rms(mine.grad.float().cpu() - theirs.grad) / _rms(theirs.grad)
        for mine, theirs in zip(found.parameters(), expected.parameters())
    ]
    leak = None
    try:
        check_no_leak(found, vocabulary, min(64, sum(lengths)), device)
    except TrainingStopped as error:
        leak = str(error).partition("\n")[0]
    return {"loss": abs(losses[0] - losses[1]), "gradients": _worst(errors), "leak": leak}


def _randomise(model: torch.nn.Module, std: float) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=std)
        else:
            parameter.fill_(1.0)


def tiny_checkpoint(*, config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A Hugging Face folder with random weights."""
    torch.manual_seed(0)
    _hf_model(config, torch.float32).save_pretrained(folder)
    return {}


def _hf_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(dtype).removeprefix("torch.")
    fields = spec_to_hf(spec_from_hf(config), {**config, "pad_token_id": None, "use_cache": False}, name)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=dtype)


# --- speed and memory -------------------------------------------------------------------------------------------------


def train(*, document: Mapping[str, Any], config: Mapping[str, Any], run: str, warmup_steps: int) -> dict[str, Any]:
    """The real trainer on random weights; nothing is loaded, and nothing saved. Rank and device as the worker's."""
    from smolconv.continual_pretraining.run.ranks import join_ranks
    from smolconv.continual_pretraining.run.start import StartPoint
    from smolconv.continual_pretraining.run.trainer import Trainer

    class Unsaved(Trainer):
        def _engine(self) -> Any:
            with torch.no_grad():
                _randomise(self.model, std=0.02)
            return super()._engine()

        def _load(self) -> None:
            pass

        def _save(self, *_: Any, **__: Any) -> None:
            pass

    given = recipe.Recipe.model_validate(document)
    ranks = join_ranks(given.parallelism.threads)
    start = StartPoint(folder="", tag="", step=0, position=None, config=dict(config), resumed=None, adam=False)
    trainer = Unsaved(given, Path(run), start, ranks)
    at_start = _peak_bytes(ranks.device)["allocated"]
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines[warmup_steps:]),
        "losses": [line["loss"] for line in lines],
        "attention": trainer.model.attention,
        "graphs": _graphs(),
        "allocated_at_start": at_start,
        **_peak_bytes(ranks.device),
    }


def saves(*, run: str) -> dict[str, Any]:
    """The worker's own run of a recipe, with every save timed: the training's wait for it, and the steps' seconds."""
    from smolconv.continual_pretraining.run import trainer, worker

    stalls: dict[int, float] = {}

    class Timed(trainer.Trainer):
        def _save(self, data: Any, **given: Any) -> None:
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            super()._save(data, **given)
            stalls[data.step] = time.perf_counter() - began

    trainer.Trainer = Timed  # type: ignore[misc]
    worker.run_rank(Path(run), "auto")
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {"stalls": stalls, "seconds": {line["step"]: line["seconds"] for line in lines if "seconds" in line}}


def _graphs() -> int:
    """How many torch.compile made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def hf_trainer(
    *, config: Mapping[str, Any], tokens: str, token_bytes: int, sequence_length: int, micro_batch: int,
    accumulation: int, steps: int, warmup_steps: int, folder: str, device: str,
) -> dict[str, Any]:  # fmt: skip
    """Hugging Face's Trainer: float32 weights under bf16 autocast, sdpa, fused AdamW; rows of whole windows, in which
    documents see each other.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # with them, it would wrap the model for several ranks
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ids = np.fromfile(tokens, dtype=f"<u{token_bytes}").astype(np.int64)
    rows = ids[: len(ids) // (sequence_length + 1) * (sequence_length + 1)].reshape(-1, sequence_length + 1)
    examples = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]  # the model shifts the labels
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation, bf16=True, optim="adamw_torch_fused", learning_rate=1e-4,
        lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=1.0, save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=device == "cpu", remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model=_hf_model(config, torch.float32), args=arguments, train_dataset=examples, callbacks=[Clock()]).train()
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)][max(0, warmup_steps - 1) :]
    step_tokens = micro_batch * accumulation * sequence_length
    return {"tokens_per_second": step_tokens / statistics.median(seconds), **_peak_bytes(torch.device(device))}


def _peak_bytes(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"allocated": resident, "reserved": resident}


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (machine, kernel_errors, long_document, tiny_checkpoint, train, saves, hf_trainer)
}


def main() -> None:
    """Write ``{"found": ...}``, or ``{"error": class, "message": ...}`` for what the job raised."""
    if "--ahead" in sys.argv:
        import deepspeed  # noqa: F401  # it takes seconds, and most jobs need it
    paper = sys.stdin.readline().strip()
    if not paper:
        return  # nothing is left to do
    given = json.loads(Path(paper).read_text())
    job, result = JOBS[given.pop("job")], Path(given.pop("result"))
    try:
        document: dict[str, Any] = {"found": job(**given)}
    except Exception as error:
        document = {"error": type(error).__name__, "message": str(error)}
        if not isinstance(error, SmolconvError):
            traceback.print_exc()
    result.write_text(json.dumps(document))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's and NCCL's threads may outlive an orderly end


if __name__ == "__main__":
    main()
