"""How nanotron splits a model: tensor-parallel slices, pipeline ranks, ZeRO-1 slices, and the file names of each.

Pure functions of the spec and the sizes; both the reader and the writer use them. The facts come from nanotron's branch
``smollm3`` (bc1f5a61) and were checked against folders that it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from smolconv.errors import CorruptFile, ShapeMismatch, UsageError
from smolconv.models.registry import nanotron_class
from smolconv.models.spec import ModelSpec
from smolconv.tensors.lazy import LazyTensor, column_slice, join, join_columns, row_slice

EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
FINAL_NORM = "model.final_layer_norm.pp_block.weight"
HEAD = "model.lm_head.pp_block.weight"

# --- tensor parallelism ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorParallel:
    """How one parameter is split over tensor-parallel ranks: along ``dim``, within each of its ``chunks``."""

    dim: int
    chunks: tuple[int, ...] = ()  #: sizes along ``dim``; () for one chunk, which nanotron writes differently


def tensor_parallel(name: str, spec: ModelSpec) -> TensorParallel | None:
    """How a nanotron parameter is split; None for norms, which every rank holds whole."""
    if "layernorm" in name or name == FINAL_NORM:
        return None
    if ".qkv_proj." in name:
        return TensorParallel(0, (spec.query_rows, spec.kv_rows, spec.kv_rows))
    if ".gate_up_proj." in name:
        return TensorParallel(0, (spec.intermediate_size, spec.intermediate_size))
    if ".o_proj." in name or ".down_proj." in name:
        return TensorParallel(1)
    return TensorParallel(0)  # embedding and head


@dataclass(frozen=True)
class SlicePair:
    """``full[global] = shard[local]`` along one dimension; the other dimensions are whole."""

    dim: int
    local: tuple[int, int]
    full: tuple[int, int]


def slice_pairs(cut: TensorParallel, size: int, tp: int, rank: int) -> tuple[SlicePair, ...]:
    """The slices of ``rank``'s shard, for a parameter with ``size`` entries along the split dimension."""
    pairs, local, full = [], 0, 0
    for chunk in cut.chunks or (size,):
        length = chunk // tp
        pairs.append(SlicePair(cut.dim, (local, local + length), (full + rank * length, full + (rank + 1) * length)))
        local, full = local + length, full + chunk
    return tuple(pairs)


def cut_shard(tensor: LazyTensor, pairs: Sequence[SlicePair]) -> LazyTensor:
    """One rank's shard of a whole parameter."""
    if pairs[0].dim == 0:
        return join([row_slice(tensor, *pair.full) for pair in pairs])
    return join_columns([column_slice(tensor, *pair.full) for pair in pairs])


def join_shards(
    shards: Sequence[tuple[LazyTensor, Sequence[SlicePair]]], shape: tuple[int, ...], where: str
) -> LazyTensor:
    """The whole parameter from all ranks' shards. Raises ``ShapeMismatch`` if their slices leave gaps or overlap."""
    placed = sorted(((pair, shard) for shard, pairs in shards for pair in pairs), key=lambda item: item[0].full)
    dim, at, pieces = placed[0][0].dim, 0, []
    for pair, shard in placed:
        lengths = {pair.local[1] - pair.local[0], pair.full[1] - pair.full[0]}
        if pair.dim != dim or pair.full[0] != at or len(lengths) != 1:
            raise ShapeMismatch(
                f"{where}: the shards' slices do not cover the parameter {list(shape)} once: one begins at "
                f"{pair.full[0]} of dimension {pair.dim}, expected {at} of dimension {dim}.\n"
                "Files of different runs or topologies may be mixed in this folder."
            )
        pieces.append(row_slice(shard, *pair.local) if dim == 0 else column_slice(shard, *pair.local))
        at = pair.full[1]
    whole = join(pieces) if dim == 0 else join_columns(pieces)
    if whole.shape != shape:
        raise ShapeMismatch(f"{where}: the shards form {list(whole.shape)}, but {list(shape)} by their metadata.")
    return whole


def format_slices(pairs: Sequence[SlicePair], cut: TensorParallel, dims: int) -> str:
    """``local_global_slices_pairs`` as nanotron writes it; a single chunk's local side is all ``None``."""

    def side(dim: int, limits: tuple[int, int] | None) -> str:
        whole = "None,None,None"
        return "|".join(f"{limits[0]},{limits[1]},None" if d == dim and limits else whole for d in range(dims))

    return ";".join(f"{side(p.dim, p.local if cut.chunks else None)}#{side(p.dim, p.full)}" for p in pairs)


def parse_slices(text: str, shard_shape: tuple[int, ...], shape: tuple[int, ...], where: str) -> tuple[SlicePair, ...]:
    """Read ``local_global_slices_pairs``. Raises ``CorruptFile`` if it is not a split along one dimension."""
    pairs = []
    for pair in text.split(";"):
        try:
            local, full = ([_parse_slice(part) for part in side.split("|")] for side in pair.split("#"))
            if not len(local) == len(full) == len(shape) == len(shard_shape):
                raise ValueError(pair)
        except ValueError:
            raise CorruptFile(f"{where}: local_global_slices_pairs cannot be read: {pair!r:.120}") from None
        bounded = [
            (dim, _limits(a, shard_shape[dim]), _limits(b, shape[dim])) for dim, (a, b) in enumerate(zip(local, full))
        ]
        cuts = [item for item in bounded if item[1] != (0, shape[item[0]]) or item[2] != (0, shape[item[0]])]
        if len(cuts) > 1:
            raise CorruptFile(f"{where}: split along several dimensions, which nanotron's models never are: {pair!r}")
        pairs.append(SlicePair(*(cuts or bounded[:1])[0]))
    return tuple(pairs)


def check_pairs(
    pairs: Sequence[SlicePair], shard_shape: tuple[int, ...], shape: tuple[int, ...], cut: TensorParallel,
    tp: int, rank: int, where: str,
) -> None:  # fmt: skip
    """Compare a shard's ``local_global_slices_pairs`` with those that nanotron writes for this model and rank.

    Slices that agree with each other can still swap keys and values, or use a row twice: only the config says
    which rows belong where. Raises ``ShapeMismatch``.
    """
    expected = slice_pairs(cut, shape[cut.dim], tp, rank)
    found = tuple(sorted(pairs, key=lambda pair: pair.local))
    whole = (0, shape[found[0].dim])
    if tp == len(found) == 1 and shard_shape == shape and found[0].local == found[0].full == whole:
        return  # the complete parameter, in any dimension
    # A writer may merge neighbouring slices if their rows stay neighbours.
    same = found == expected if len(found) == len(expected) else _merged(found) == _merged(expected)
    if not same or {pair.dim for pair in found} != {cut.dim} or expected[-1].local[1] != shard_shape[cut.dim]:
        raise ShapeMismatch(
            f"{where}: rank {rank} of {tp} has {[pair.full for pair in found]} in {[pair.local for pair in found]}.\n"
            f"Expected {[pair.full for pair in expected]} in {[pair.local for pair in expected]} by the config.\n"
            "Check that the config (heads, sizes) belongs to this checkpoint; if it does, copy the file again."
        )


def _merged(pairs: Sequence[SlicePair]) -> list[tuple[int, int, int]]:
    """(start in the shard, start in the whole, length) of each range that is contiguous in both."""
    found: list[tuple[int, int, int]] = []
    for pair in pairs:
        length = pair.local[1] - pair.local[0]
        if found and (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]) == (pair.local[0], pair.full[0]):
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + length)
        else:
            found.append((pair.local[0], pair.full[0], length))
    return found


def _parse_slice(text: str) -> tuple[int | None, int | None]:
    start, stop, step = (None if part == "None" else int(part) for part in text.split(","))
    if step not in (None, 1):
        raise ValueError(text)
    return start, stop


def _limits(slice_: tuple[int | None, int | None], size: int) -> tuple[int, int]:
    return (slice_[0] or 0, size if slice_[1] is None else slice_[1])


def parse_shape(text: str, where: str) -> tuple[int, ...]:
    """``unsharded_shape``: "(80, 48)", or "(np.int64(80), 48)" as written under numpy 2."""
    plain = re.sub(r"np\.int\d+\((\d+)\)", r"\1", text).strip()
    if not re.fullmatch(r"\((\d+\s*,\s*)*\d*\s*\)", plain):
        raise CorruptFile(f"{where}: unsharded_shape cannot be read: {text!r}")
    return tuple(int(number) for number in re.findall(r"\d+", plain))


def require_tp(spec: ModelSpec, tp: int) -> None:
    """Raise ``UsageError`` if a parameter's rows cannot be split into ``tp`` equal shards."""
    for what, size in (
        ("rows of queries", spec.query_rows), ("rows of keys", spec.kv_rows),
        ("rows of intermediate_size", spec.intermediate_size),
    ):  # fmt: skip
        if size % tp:
            raise UsageError(f"--tp {tp} does not divide the model's {size} {what}; choose a divisor of it.")


def splits_heads(spec: ModelSpec, tp: int) -> bool:
    """Whether the split goes through heads (SmolLM2-135M at TP 2). nanotron merges such files, but cannot run them."""
    return bool(spec.num_heads % tp or spec.num_kv_heads % tp)


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """nanotron pads the vocabulary until it divides among the tensor-parallel ranks."""
    return -(-vocab_size // tp) * tp


# --- pipeline parallelism --------------------------------------------------------------------------------------------


def pipeline_ranks(spec: ModelSpec, pp: int) -> dict[str, int]:
    """The pipeline rank of each block: "embedding", "0" .. "L-1" for layers, "norm" and "head".

    Blocks are placed in module order by their compute cost (as in nanotron, without ``head_dim`` and key/value heads).
    A block that crosses the threshold stays; the next one goes to the next rank. Raises ``UsageError`` if a rank is
    left empty, since nanotron refuses to build such a model.
    """
    hidden, head = spec.hidden_size, spec.hidden_size // spec.num_heads
    layer = 4 * spec.num_heads * head * hidden + 3 * spec.intermediate_size * hidden
    blocks = [("embedding", 0), *((str(i), layer) for i in range(spec.num_layers)), ("norm", 0)]
    blocks += [("head", spec.vocab_size * hidden)]
    blocks += [("cast_to_fp32", 0)] if nanotron_class(spec).casts_logits else []
    blocks += [("loss", 0)]
    cumulative = list(accumulate(cost for _, cost in blocks))
    thresholds = [float(cumulative[-1]) * ((rank + 1) / pp) for rank in range(pp)]
    ranks, rank = {}, 0
    for (name, _), reached in zip(blocks, cumulative):
        ranks[name] = rank
        if rank < pp - 1 and reached > thresholds[rank]:
            rank += 1
    ranks = {name: rank for name, rank in ranks.items() if name not in ("cast_to_fp32", "loss")}
    # A rank with only those two has no parameters, so it counts as empty.
    empty = sorted(set(range(pp)) - set(ranks.values()))
    if empty:
        raise UsageError(
            f"--pp {pp} leaves pipeline rank {empty[0]} of this model without any parameter, and nanotron refuses to "
            "build it. Choose a smaller --pp."
        )
    return ranks


def block_of(name: str) -> str:
    """The pipeline block that a nanotron parameter belongs to."""
    if name == EMBEDDING:
        return "embedding"
    if name == FINAL_NORM:
        return "norm"
    if name == HEAD:
        return "head"
    return name.split(".")[2]


def parameters_of_rank(names: Sequence[str], ranks: Mapping[str, int], rank: int, *, tied: bool) -> list[str]:
    """A pipeline rank's parameters in its optimizer's order.

    If a tied head is on another rank than the embedding, that rank has its own copy of the embedding, in last place.
    """
    mine = [name for name in names if ranks[block_of(name)] == rank]
    if tied and ranks["head"] == rank and ranks["embedding"] != rank:
        mine.append(EMBEDDING)
    return mine


# --- ZeRO-1 ----------------------------------------------------------------------------------------------------------


def zero1_slices(numel: int, dp: int) -> list[tuple[int, int]]:
    """Each data-parallel rank's elements of a flattened shard: ceil(n / dp), the last ranks one less; may be empty."""
    size = (numel - 1) // dp + 1
    short = size * dp - numel
    ends = list(accumulate(size - (rank >= dp - short) for rank in range(dp)))
    return list(zip([0, *ends[:-1]], ends))


# --- file names ------------------------------------------------------------------------------------------------------

#: Format 1.4 and 1.5, those of 1.2 and 1.3 with a doubled "model_" and ".safetensors", and rankless files.
_WEIGHT_FILE = re.compile(
    r"model_(?:model_)?(?P<kind>weight|bias)(?:\.safetensors)?"
    r"(?:_pp-rank-(?P<pp>\d+)-of-(?P<pps>\d+)_tp-rank-(?P<tp>\d+)-of-(?P<tps>\d+)"
    r"(?:_exp-rank-(?P<exp>\d+)-of-(?P<exps>\d+))?)?\.safetensors"
)
_STATE_FILE = re.compile(
    r"(?:optimizer|lr_scheduler)_pp-(?P<pp>\d+)-of-(?P<pps>\d+)(?:_dp-(?P<dp>\d+)-of-(?P<dps>\d+))?"
    r"_tp-(?P<tp>\d+)-of-(?P<tps>\d+)(?:_exp-(?P<exp>\d+)-of-(?P<exps>\d+))?\.pt"
)


@dataclass(frozen=True)
class RankedFile:
    """The ranks in a file name; None for each that it does not have."""

    kind: str
    pp: int | None
    pp_size: int | None
    tp: int | None
    tp_size: int | None
    dp: int | None = None
    dp_size: int | None = None
    expert_size: int | None = None


def parse_weight_file(file_name: str) -> RankedFile | None:
    """The ranks of a weight file; None for any other name."""
    match = _WEIGHT_FILE.fullmatch(file_name)
    return _within(None if match is None else _ranked(match, match["kind"]))


def parse_state_file(file_name: str) -> RankedFile | None:
    """The ranks of an optimizer or LR scheduler file; None for any other name."""
    match = _STATE_FILE.fullmatch(file_name)
    return _within(None if match is None else _ranked(match, "state"))


def _within(file: RankedFile | None) -> RankedFile | None:
    """None for a rank beyond its group's size: no run has written that file."""
    if file is None:
        return None
    ranks = ((file.pp, file.pp_size), (file.tp, file.tp_size), (file.dp, file.dp_size))
    return None if any(rank is not None and size is not None and rank >= size for rank, size in ranks) else file


def _ranked(match: re.Match[str], kind: str) -> RankedFile:
    found = {key: None if text is None else int(text) for key, text in match.groupdict().items() if key != "kind"}
    return RankedFile(
        kind, found["pp"], found["pps"], found["tp"], found["tps"], found.get("dp"), found.get("dps"), found["exps"]
    )


def weight_path(name: str, ranks: tuple[int, int, int, int] | None) -> str:
    """Path below the step folder; ``ranks`` are (pp, pp size, tp, tp size), None for a parameter that is not split."""
    *folders, kind = name.split(".")
    ending = "" if ranks is None else "_pp-rank-{}-of-{}_tp-rank-{}-of-{}".format(*ranks)
    return "/".join(["model", *folders, f"model_{kind}{ending}.safetensors"])


def state_file(kind: str, pp: tuple[int, int], tp: tuple[int, int], dp: tuple[int, int] | None = None) -> str:
    """Name of an ``optimizer`` or ``lr_scheduler`` file; ``dp`` only with ZeRO-1. Each pair is (rank, size)."""
    middle = "" if dp is None else f"_dp-{dp[0]}-of-{dp[1]}"
    return f"{kind}/{kind}_pp-{pp[0]}-of-{pp[1]}{middle}_tp-{tp[0]}-of-{tp[1]}_exp-0-of-1.pt"
