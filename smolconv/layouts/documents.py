"""Values in documents that people and other programs wrote: each is checked before anything is computed from it.

A config may be edited by hand; a file may be cut or come from another tool. Errors name the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from smolconv.checkpoint import TrainingProgress
from smolconv.errors import CorruptFile, UnsupportedModel

#: More layers than any model has: a damaged count would fill the memory before the tensors contradict it.
_MOST_LAYERS = 10_000


#: Names of PEFT's LoRA and DoRA: ...q_proj.lora_A.default.weight and ...q_proj.base_layer.weight.
_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")

#: More ranks than any run has. If a file states more, smolconv would look for each of them.
MOST_RANKS = 1 << 17


def is_count(value: object) -> bool:
    """Whether it is a whole number, 0 or more; ``True`` is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_world(value: object) -> bool:
    """Whether it can be a number of ranks: a whole number from 1 to 131,072."""
    return type(value) is int and 1 <= value <= MOST_RANKS


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def adam_step(value: object, where: object) -> float:
    """How many steps Adam has made: a whole number, which torch keeps as a float. Raises ``CorruptFile``."""
    if isinstance(value, (int, float)) and is_number(value) and 0 <= value <= 1 << 40 and value == int(value):
        return float(value)
    raise CorruptFile(
        f"{where}: Adam's step is {_shown(value)}.\n"
        "Expected a whole number, 0 or more, that training reaches.\n"
        "Copy the file again, or pass --no-optimizer to convert the weights only."
    )


def _is_size(value: object) -> bool:
    return is_count(value) and value != 0


def _is_token_id(value: object) -> bool:
    ids = value if isinstance(value, list) and value else [value]
    return all(isinstance(token, int) and not isinstance(token, bool) for token in ids)


def _is_rope(value: object) -> bool:
    return isinstance(value, dict) and (value.get("rope_theta") is None or is_number(value["rope_theta"]))


_SIZE = ("a positive whole number", _is_size)
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_TEXT = ("text", lambda value: isinstance(value, str))
_ID = ("a token id", _is_token_id)
#: Fields of either config: what they hold, and whether they do.
_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
         "max_position_embeddings", "no_rope_layer", "no_rope_layer_interval", "pretraining_tp"),
        _SIZE,
    ),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "rope_interleaved", "use_sliding_window", "use_cache"),
        _FLAG,
    ),
    **dict.fromkeys(("model_type", "hidden_act"), _TEXT),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _ID),
    "num_hidden_layers": (f"a whole number from 1 to {_MOST_LAYERS}", lambda n: _is_size(n) and n <= _MOST_LAYERS),
    "max_window_layers": ("a whole number, 0 or more", is_count),
    "rms_norm_eps": ("a number that is 0 or more", lambda value: is_number(value) and value >= 0),
    "rope_theta": ("a positive number", lambda value: is_number(value) and value > 0),
    "initializer_range": ("a number", is_number),
    "rope_scaling": ("an object", _is_rope),
    "rope_parameters": ("an object", _is_rope),
    "no_rope_layers": ("a list of 0 and 1", lambda value: isinstance(value, list) and all(v in (0, 1) for v in value)),
    "layer_types": ("a list of text", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)),
}  # fmt: skip
#: Null means something only where the class has no other default.
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
           "max_position_embeddings", "rms_norm_eps", "hidden_act", "no_rope_layer_interval")  # fmt: skip


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Raise ``UnsupportedModel`` when a field of a Hugging Face or nanotron config has a value of another kind."""
    for name, (expected, holds) in _FIELDS.items():
        if name in config and (config[name] is not None or name in _NEEDED) and not holds(config[name]):
            text = isinstance(config[name], str) and re.fullmatch(r"(?i)[+-]?[0-9.]+e[+-]?[0-9]+", config[name])
            hint = "\nYAML reads 1e-5 and 1.0e6 as text: write 1.0e-5, 1.0e+6." if text else ""
            raise UnsupportedModel(f"{where}: {name} is {_shown(config[name])}; expected {expected}.{hint}")


def check_progress(progress: TrainingProgress, where: object) -> TrainingProgress:
    """The progress itself. Raises ``CorruptFile`` for an invalid count."""
    counts: dict[str, Any] = {"the step": progress.step, "consumed samples": progress.consumed_samples}
    known = {"consumed tokens": progress.consumed_tokens, "the last stage's index": progress.last_stage_index}
    for stage in progress.stages:
        counts |= {"a stage's first step": stage.start_training_step, "a stage's samples": stage.consumed_train_samples}
        known["a stage's sequence length"] = stage.sequence_length
        folders = stage.consumed_tokens_per_dataset_folder
        if not isinstance(stage.name, str) or not isinstance(folders, (dict, type(None))):
            raise CorruptFile(f"{where}: the data stage {_shown(stage.name)} cannot be read.")
        _check_counts({f"the tokens of {folder}": count for folder, count in (folders or {}).items()}, where)
        _check_counts(counts | {name: count for name, count in known.items() if count is not None}, where)
    _check_counts(counts | {name: count for name, count in known.items() if count is not None}, where)
    if progress.stages and (progress.last_stage_index or 0) >= len(progress.stages):
        raise CorruptFile(
            f"{where}: the last stage's index is {progress.last_stage_index}; there are {len(progress.stages)} stages, "
            "counted from 0."
        )
    return progress


def _check_counts(counts: Mapping[str, Any], where: object) -> None:
    for name, count in counts.items():
        if not is_count(count):
            raise CorruptFile(f"{where}: {name} is {_shown(count)}; expected a whole number, 0 or more.")


def refuse_adapter(names: Iterable[str], where: object) -> None:
    """Raise ``UnsupportedModel`` for weights that were trained with a PEFT adapter."""
    name = next((name for name in names if _ADAPTER.search(name)), None)
    if name is not None:
        raise UnsupportedModel(
            f"{where} comes from training with LoRA (PEFT): it holds {name}.\n"
            "Expected the weights of a complete model; these are an adapter's, with or without its base weights.\n"
            "Merge it first, from the folder with adapter_config.json that PEFT saved:\n"
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OUT)\n"
            "or in the training script: model.merge_and_unload().save_pretrained(OUT)"
        )


def check_plain(values: object, where: object) -> None:
    """Raise ``CorruptFile`` for values that JSON cannot hold: tensors, objects, NaN."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if not isinstance(key, str):
                raise CorruptFile(f"{where}: {_shown(key)} is not a valid name.")
            check_plain(value, f"{where}: {key}")
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_plain(value, where)
    elif not (
        values is None or isinstance(values, (bool, int, str)) or (isinstance(values, float) and math.isfinite(values))
    ):
        raise CorruptFile(f"{where} is {_shown(values)}; expected a plain finite value.")


def with_tuples(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's hyperparameters with betas as a tuple, like torch's: JSON and old archives hold a list."""
    return {key: tuple(value) if key == "betas" else value for key, value in hyperparameters.items()}


@contextmanager
def corrupt_if_malformed(where: object) -> Iterator[None]:
    """Convert Python's errors about missing and mistyped values within the block to ``CorruptFile`` of ``where``."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise CorruptFile(
            f"{where} cannot be read: a value is missing or has the wrong type.\n{type(error).__name__}: {error}"
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
