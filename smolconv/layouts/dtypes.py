"""The allowed dtypes of a checkpoint's slots, the same for every layout.

A header or a pickle can name any dtype of the same width, and an integer would be copied as readily as a float: the
result loads but is not a model. Dtypes that no trainer writes are therefore refused before anything is planned.
"""

from __future__ import annotations

from collections.abc import Mapping

from smolconv.checkpoint import MOMENTS, Checkpoint, Slot
from smolconv.errors import MixedCheckpoint, UnsupportedModel
from smolconv.tensors.lazy import LazyTensor

#: nanotron, DeepSpeed and Transformers train and save in these three. float64 and float8 are not allowed: none of them
#: trains these models in such a dtype, and no target offers it. Masters are float32, or have the module's dtype
#: (DeepSpeed's ``bf16_master_weights_and_grads``). Moments have the masters' dtype, or 16 bits if nanotron
#: accumulates no gradients in float32, or DeepSpeed keeps ``bf16_optimizer_states`` or no ``fp32_optimizer_states``.
ALLOWED = ("float32", "bfloat16", "float16")
_WHAT = {Slot.PARAMETER: "a parameter", Slot.MASTER: "a master", **dict.fromkeys(MOMENTS, "a moment")}


def check_dtype(slot: Slot, dtype: str, where: object) -> None:
    """Raise ``UnsupportedModel`` if no trainer writes ``slot`` in ``dtype``. ``where`` names the tensor."""
    if dtype not in ALLOWED:
        raise UnsupportedModel(
            f"{where} is {dtype}, as {_WHAT[slot]} ({slot.value}) never is.\n"
            f"Expected {', '.join(ALLOWED[:-1])} or {ALLOWED[-1]}.\n"
            "If the model is quantised, use the original model, or dequantise it with the tool that made "
            "it; otherwise the file is damaged: copy it again."
        )


def check_named_dtypes(slot: Slot, tensors: Mapping[str, LazyTensor]) -> None:
    """``check_dtype`` for tensors by name."""
    for name, tensor in tensors.items():
        check_dtype(slot, tensor.dtype, f"{_file(tensor)}: {name}")


def check_dtypes(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint unchanged, if a trainer writes the dtype of each of its tensors.

    Raises ``UnsupportedModel`` for a dtype that no slot has, ``MixedCheckpoint`` for dtypes that never occur together.
    """
    for slot, tensors in checkpoint.tensors.items():
        check_named_dtypes(slot, tensors)
    parameters = checkpoint.parameters
    halves = {t.dtype: (name, t) for name, t in parameters.items() if t.dtype in ("bfloat16", "float16")}
    if len(halves) > 1:
        (a, left), (b, right) = halves["bfloat16"], halves["float16"]
        raise MixedCheckpoint(
            f"{_file(right)}: {b} is float16, but {a} is bfloat16 ({_file(left)}).\n"
            "Expected one 16-bit dtype in a model: the same bits are different values in each.\n"
            "The file is damaged, or files of two checkpoints are mixed: copy all of one."
        )
    for name, master in checkpoint.tensors.get(Slot.MASTER, {}).items():
        if master.dtype not in ("float32", parameters[name].dtype):
            raise MixedCheckpoint(
                f"{_file(master)}: the master of {name} is {master.dtype}; the parameter is {parameters[name].dtype}.\n"
                f"Expected float32, or {parameters[name].dtype} as the parameter.\n"
                "The file is damaged, or files of two checkpoints are mixed: copy all of one."
            )
    first, second = (checkpoint.tensors.get(slot, {}) for slot in MOMENTS)
    for name in first.keys() & second.keys():
        if first[name].dtype != second[name].dtype:
            raise MixedCheckpoint(
                f"{_file(second[name])}: exp_avg_sq of {name} is {second[name].dtype}, exp_avg {first[name].dtype}.\n"
                "Expected one dtype for both: Adam creates them with the same dtype.\n"
                "The file is damaged, or files of two checkpoints are mixed: copy all of one."
            )
    return checkpoint


def _file(tensor: LazyTensor) -> str:
    return next((str(leaf.path) for leaf in tensor.leaves()), "a tensor of zeros")
