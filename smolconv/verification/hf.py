"""transformers' forward pass with its own modules, one block in memory at a time.

A Hugging Face folder is read by transformers (config) and safetensors (weights), not by smolconv's reader. Any other
checkpoint is given by its canonical tensors: a DeepSpeed one consolidated, a nanotron one through the mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from smolconv.checkpoint import Checkpoint
from smolconv.errors import BadCheckpoint, CorruptFile, SmolconvError, first_line
from smolconv.models.huggingface import spec_to_hf
from smolconv.models.names import stored_names, with_tied_embedding
from smolconv.parsing import read_json
from smolconv.storage.torch_archive.records import is_torch_archive
from smolconv.tensors.lazy import row_slice
from smolconv.verification.forward import ForwardPass, embedding_rows, to_torch

if TYPE_CHECKING:
    import torch

#: The name of transformers' sdpa attention on a GPU: see ``_sdpa_on_gpus``.
_ON_GPUS = "smolconv_sdpa_on_gpus"
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
#: Observed modules of a block, by the end of their path.
_WATCHED = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "post_attention_layernorm",
    "mlp.gate_proj", "mlp.up_proj", "mlp", "self_attn",
)  # fmt: skip


class Weights(Protocol):
    """A source of tensors."""

    title: str

    def config(self) -> Any: ...

    def whole(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def looked_up(self, name: str, tokens: torch.Tensor) -> torch.Tensor: ...


@contextmanager
def _accepted(path: Path) -> Iterator[None]:
    """Convert another library's error for a file that smolconv could read to ``CorruptFile``."""
    try:
        yield
    except (SmolconvError, MemoryError):
        raise
    except Exception as error:  # the libraries do not document their errors
        raise CorruptFile(
            f"{path}: smolconv can read it, but transformers, torch or safetensors cannot "
            f"({type(error).__name__}: {first_line(error):.200}).\n"
            "Expected a file that all of them can read.\n"
            "Write it again with the library that wrote it; smolconv can still convert it."
        ) from error


class FolderWeights:
    """A Hugging Face folder, read only by transformers and safetensors."""

    title = "transformers on the folder"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._archives: dict[Path, Any] = {}
        #: Canonical name -> its file, and its name there.
        found = {name: (path, name) for name, path in self._stored()}
        self._files = with_tied_embedding(stored_names(found).by_canonical(found))

    def _stored(self) -> Iterator[tuple[str, Path]]:
        """Every stored name with its file."""
        for stem in ("model.safetensors", "pytorch_model.bin"):
            index, single = self.folder / f"{stem}.index.json", self.folder / stem
            if single.is_file():  # transformers uses it even if there is an index
                yield from ((name, single) for name in self._names(single))
                return
            if index.is_file():
                files = sorted({self.folder / file for file in read_json(index)["weight_map"].values()})
                yield from ((name, path) for path in files for name in self._names(path))
                return

    def _names(self, path: Path) -> list[str]:
        from safetensors import safe_open

        if path.suffix == ".bin":
            return list(self._archive(path))
        with _accepted(path), safe_open(path, framework="pt") as file:
            return list(file.keys())

    def config(self) -> Any:
        import transformers

        # As below: a padding id beyond the vocabulary does not matter in a forward pass.
        with _accepted(self.folder / "config.json"):
            return transformers.AutoConfig.from_pretrained(self.folder, pad_token_id=None, trust_remote_code=False)

    def _read(self, name: str, take: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        path, stored_name = self._files[name]
        if path.suffix == ".bin":
            return take(self._archive(path)[stored_name])
        from safetensors import safe_open

        # Opened each time: the pages that a mapping has touched count as this process's memory until it is closed.
        with _accepted(path), safe_open(path, framework="pt") as file:
            return take(file.get_slice(stored_name)).clone()

    def _archive(self, path: Path) -> Any:
        import torch

        if path not in self._archives:
            mapped = is_torch_archive(path)  # files of torch before 1.6 cannot be mapped
            with _accepted(path):
                self._archives[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        return self._archives[path]

    def whole(self, name: str) -> torch.Tensor:
        return self._read(name, lambda stored: stored[:])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._read(name, lambda stored: stored[start:stop])

    def looked_up(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        import torch

        wanted, inverse = torch.unique(tokens, return_inverse=True)
        return self._read(name, lambda stored: torch.cat([stored[int(i) : int(i) + 1] for i in wanted]))[inverse]


class CanonicalWeights:
    """A checkpoint of any layout, by its canonical tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.title = f"transformers on the {checkpoint.layout} checkpoint's canonical tensors"

    def config(self) -> Any:
        import transformers

        carried = self.checkpoint.source.model_config
        # transformers cannot build an embedding with ids beyond the vocabulary; they do not matter in a forward pass.
        raw = spec_to_hf(self.checkpoint.spec, {**carried, "pad_token_id": None}, "float32")
        return transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)

    def whole(self, name: str) -> torch.Tensor:
        return to_torch(self.checkpoint.parameters[name])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return to_torch(row_slice(self.checkpoint.parameters[name], start, stop))

    def looked_up(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        import torch

        tensor = self.checkpoint.parameters[name]
        return embedding_rows(tensor, tokens, getattr(torch, tensor.dtype))


def _attention(run: ForwardPass, device: str) -> str:
    """The attention implementation for ``run``."""
    # With a mask, which only packed documents need, transformers repeats keys and values itself.
    if run.attention != "sdpa" or run.packed or not device.startswith("cuda"):
        return run.attention
    from transformers import AttentionInterface

    # No mask is registered under this name, so transformers builds none: v4 would build one of T x T for any positions.
    AttentionInterface.register(_ON_GPUS, _sdpa_on_gpus)
    return _ON_GPUS


def _sdpa_on_gpus(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' function with as many key/value heads as query heads.

    With fewer, it passes them to torch, whose only float32 GPU kernel for them stores all scores: 69 GB for 16 heads
    and a document of 32,768 tokens.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    whole = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # the module without num_key_value_groups
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(whole, query, key, value, attention_mask, **options)
    return output


class _Reached(Exception):
    """Raised at the model's first block, with the arguments that it passes to blocks."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments


def _empty_model(weights: Weights, attention: str, device: str) -> Any:
    import torch
    import transformers

    config = weights.config()
    config._attn_implementation = attention
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Rotary frequencies are a buffer that no checkpoint stores; on the meta device they were never computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model


def whole_model(weights: Weights, dtype: torch.dtype, device: str = "cpu") -> Any:
    """transformers' model with all weights in memory, for programs that need a ``PreTrainedModel``.

    Raises ``BadCheckpoint`` for a tensor of another shape.
    """
    model = _empty_model(weights, "sdpa", device)
    tied = model.config.tie_word_embeddings
    state = {}
    for name, empty in model.state_dict().items():
        if not (tied and name == _HEAD):
            state[name] = _of_shape(weights.whole(name), name, empty).to(dtype).to(device)
    if tied:
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.requires_grad_(False)


def _of_shape(tensor: torch.Tensor, name: str, empty: torch.Tensor) -> torch.Tensor:
    if tensor.shape != empty.shape:
        raise BadCheckpoint(f"{name} is {list(tensor.shape)}; transformers expects {list(empty.shape)}.")
    return tensor


class TransformersSide:
    """A ``Side``: transformers' modules, created on the meta device and filled one at a time."""

    def __init__(self, weights: Weights, dtype: torch.dtype, device: str = "cpu") -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.weights, self.dtype, self.device = weights, dtype, device
        self.title = weights.title
        self._models: dict[str, Any] = {}
        config = self._model("sdpa").config
        self.num_layers = config.num_hidden_layers
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.head = _EMBEDDING if config.tie_word_embeddings else _HEAD

    def _model(self, attention: str) -> Any:
        if attention not in self._models:
            self._models[attention] = _empty_model(self.weights, attention, self.device)
        return self._models[attention]

    def begin(self, runs: Sequence[ForwardPass]) -> None:
        import torch

        def stop(module: Any, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            raise _Reached(arguments)

        for run in runs:
            run.hidden = self.weights.looked_up(_EMBEDDING, run.tokens).to(self.dtype).to(self.device)
            run.observe("model.embed_tokens", run.hidden)
            model = self._model(_attention(run, self.device))
            hook = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
            try:
                # With positions that restart, no mask and no cache, transformers separates documents itself.
                model.model(
                    inputs_embeds=run.hidden, attention_mask=None, position_ids=run.positions.to(self.device),
                    use_cache=False,
                )  # fmt: skip
            except _Reached as reached:
                run.context = dict(reached.arguments)
            finally:
                hook.remove()
            assert torch.is_tensor(run.hidden)

    def advance(self, layer: int, runs: Sequence[ForwardPass]) -> None:
        import torch

        prefix = f"model.layers.{layer}."
        wanted = self._model("sdpa").model.layers[layer].state_dict()
        tensors = {name: self._loaded(prefix + name, empty) for name, empty in wanted.items()}
        for run in runs:
            block = self._model(_attention(run, self.device)).model.layers[layer]
            block.load_state_dict(tensors, strict=True, assign=True)
            hooks = list(self._watch(block, prefix, run))
            with torch.inference_mode():
                output = block(run.hidden, **run.context)
            run.hidden = output[0] if isinstance(output, tuple) else output
            for hook in hooks:
                hook.remove()
            block.to("meta")

    def _loaded(self, name: str, empty: torch.Tensor) -> torch.Tensor:
        return _of_shape(self.weights.whole(name), name, empty).to(self.dtype).to(self.device)

    def _watch(self, block: Any, prefix: str, run: ForwardPass) -> Any:
        def report(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                run.observe(prefix + name, output[0] if isinstance(output, tuple) else output)

            return hook

        for name in _WATCHED:
            yield block.get_submodule(name).register_forward_hook(report(name))
        yield block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs: run.observe(f"{prefix}self_attn.attention", inputs[0])
        )

    def finish(self, runs: Sequence[ForwardPass]) -> None:
        import torch

        weight = self._loaded(_NORM, self._model("sdpa").model.norm.weight)
        for run in runs:
            norm = self._model(_attention(run, self.device)).model.norm
            norm.load_state_dict({"weight": weight}, assign=True)
            with torch.inference_mode():
                run.hidden = norm(run.hidden)
            norm.to("meta")
            run.observe("model.norm", run.hidden)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        return self.weights.rows(self.head, start, stop).to(self.dtype).to(self.device)
