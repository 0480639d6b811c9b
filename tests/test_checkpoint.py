"""The algebra of lazy tensors, against the same operations on torch tensors."""

from __future__ import annotations

import itertools
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy import literal, random_bits, raw_bytes, same_bits, stored, to_torch

from smolconv.errors import CorruptFile, MissingFile, ShapeMismatch, UnsupportedModel
from smolconv.storage.integrity import digest_tensor
from smolconv.tensors.dtypes import DTYPE_BYTES, FLOAT_DTYPES
from smolconv.tensors.elements import raw_dtype
from smolconv.tensors.finite import has_nonfinite
from smolconv.tensors.lazy import (
    LazyTensor,
    Stored,
    Zeros,
    cast,
    column_slice,
    equal,
    flat_slice,
    join,
    join_columns,
    reshape,
    rotary_rows,
    row_slice,
)
from smolconv.tensors.reading import close_thread_files

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stored") / "tensors.bin"


# --- expressions -----------------------------------------------------------------------------------------------------


def to_half_split(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """The published permutation (transformers' convert_llama_weights_to_hf.py): interleaved pairs to half-split."""
    rows = weight.shape[0]
    return weight.reshape(rows // head_size, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """Its inverse: row 2i comes from i, row 2i + 1 from i + D/2."""
    order = [half * head_size // 2 + pair for pair in range(head_size // 2) for half in (0, 1)]
    heads = weight.shape[0] // head_size
    return torch.cat([weight[head * head_size :][order] for head in range(heads)])


@st.composite
def leaves(draw, rows: int | None = None, columns: int | None = None, dtype: torch.dtype | None = None):
    """A matrix as a lazy tensor and as torch's: finite values, so that casts have one right answer."""
    shape = (rows or draw(st.integers(1, 9)), columns or draw(st.integers(1, 7)))
    dtype = dtype or draw(st.sampled_from(FLOATS))
    seed = draw(st.integers(0, 1 << 20))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if draw(st.integers(0, 5)) == 0:
        return Zeros(shape=shape, dtype=str(dtype).removeprefix("torch.")), torch.zeros_like(values)
    return literal(values), values


@st.composite
def expressions(draw, depth: int = 5):
    """Operations in random nesting, beside the torch tensor that they should give."""
    lazy, value = draw(leaves())
    for _ in range(draw(st.integers(0, depth))):
        lazy, value = draw(applied(lazy, value))
    return lazy, value


@st.composite
def applied(draw, lazy: LazyTensor, value: torch.Tensor):
    rows, columns = value.shape
    first, last = sorted((draw(st.integers(0, rows)), draw(st.integers(0, rows))))
    left, right = sorted((draw(st.integers(0, columns - 1)), draw(st.integers(1, columns))))
    if first == last:
        first, last = 0, rows
    if left == right:
        left, right = 0, columns
    match draw(st.integers(0, 7)):
        case 0:
            return row_slice(lazy, first, last), value[first:last]
        case 1:
            return column_slice(lazy, left, right), value[:, left:right]
        case 2:
            other, more = draw(leaves(columns=columns, dtype=value.dtype))
            return join([lazy, other, row_slice(lazy, first, last)]), torch.cat([value, more, value[first:last]])
        case 3:
            other, more = draw(leaves(rows=rows, dtype=value.dtype))
            return join_columns([other, lazy, column_slice(lazy, left, right)]), torch.cat(
                [more, value, value[:, left:right]], dim=1
            )
        case 4:
            size = draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
            if size % 2:
                return reshape(lazy, (1, value.numel())), value.reshape(1, -1)
            ahead = draw(st.booleans())
            expected = to_interleaved(value, size) if ahead else to_half_split(value, size)
            return rotary_rows(lazy, size, to_interleaved=ahead), expected
        case 5:
            dtype = draw(st.sampled_from(FLOATS))
            return cast(lazy, str(dtype).removeprefix("torch.")), value.to(dtype)
        case 6:
            start, stop = first * columns + left, (last - 1) * columns + right
            return flat_slice(lazy, start, stop, (1, stop - start)), value.reshape(1, -1)[:, start:stop]
        case _:
            return reshape(lazy, (columns, rows)), value.reshape(columns, rows)


def read_range(tensor: LazyTensor, start: int, stop: int) -> bytes:
    out = np.empty(stop - start, raw_dtype(tensor.dtype))
    tensor.read(start, stop, out)
    return out.tobytes()


@settings(max_examples=400, deadline=None)
@given(expressions(), st.data())
def test_any_nesting_of_operations_reads_as_torch_computes_it(expression, data):
    lazy, value = expression
    assert same_bits(to_torch(lazy), value)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, value.numel()), st.integers(0, value.numel()))))
    assert read_range(lazy, start, stop) == raw_bytes(value.reshape(-1)[start:stop])


@settings(max_examples=200, deadline=None)
@given(expressions(), st.sampled_from([8, 16, 40, 104]), st.sampled_from([1, 12, 1 << 20]))
def test_borders_between_chunks_change_no_value(expression, chunk_bytes, direct_run_bytes):
    lazy, value = expression
    with patch.multiple("smolconv.tensors.lazy", CHUNK_BYTES=chunk_bytes, _DIRECT_RUN_BYTES=direct_run_bytes):
        pieces = [read_range(lazy, start, stop) for start, stop in lazy.chunks(chunk_bytes)]
    assert b"".join(pieces) == raw_bytes(value)


@settings(max_examples=100, deadline=None)
@given(expressions(), st.integers(8, 200))
def test_chunks_cover_every_element_once_and_stay_small(expression, chunk_bytes):
    lazy, value = expression
    borders = list(lazy.chunks(chunk_bytes))
    assert [n for start, stop in borders for n in range(start, stop)] == list(range(value.numel()))
    assert all((stop - start) * value.element_size() <= chunk_bytes for start, stop in borders)


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_shape_and_size_are_known_without_reading(expression):
    lazy, value = expression
    assert (lazy.shape, lazy.numel, lazy.nbytes) == (tuple(value.shape), value.numel(), value.nbytes)


def test_published_rotary_permutation_and_its_inverse_cancel():
    weight = torch.arange(2 * 8 * 3.0).reshape(16, 3)
    assert torch.equal(to_half_split(to_interleaved(weight, 8), 8), weight)


@pytest.mark.parametrize("shape", [(16, 3), (16,)], ids=["weight", "bias"])
def test_rotary_rows_follow_the_published_permutation(shape):
    weight = torch.randn(shape)
    half_split = rotary_rows(literal(weight), 8, to_interleaved=False)
    assert torch.equal(to_torch(half_split), to_half_split(weight, 8))
    assert torch.equal(to_torch(rotary_rows(literal(weight), 8, to_interleaved=True)), to_interleaved(weight, 8))


def test_heads_of_odd_size_cannot_be_reordered():
    with pytest.raises(ShapeMismatch):
        rotary_rows(literal(torch.zeros(9, 2)), 3, to_interleaved=True)


# --- files -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.sampled_from([*FLOATS, torch.int64, torch.uint8]))
def test_stored_tensors_of_any_bits_join_and_split_unchanged(shelf, rows, columns, gap, dtype):
    values = [random_bits((rows, columns), dtype, seed) for seed in range(3)]
    lazy = join(stored(shelf, values, gap))
    assert raw_bytes(torch.cat(values)) == lazy.numpy().tobytes()
    close_thread_files()


@given(st.lists(st.integers(0, 24), max_size=4))
def test_a_contiguous_tensor_cut_into_pieces_and_joined_is_one_stored_range_again(cuts):
    whole = Stored(path=Path("weights.safetensors"), offset=80, shape=(6, 4), dtype="float32")
    borders = [0, *sorted(cuts), 24]
    pieces = [flat_slice(whole, start, stop) for start, stop in itertools.pairwise(borders)]
    assert join(pieces, (6, 4)) == whole


@pytest.mark.parametrize("tp", [2, 3, 6])
def test_rows_cut_for_ranks_and_joined_again_are_the_same_stored_range(tp):
    whole = Stored(path=Path("weights.safetensors"), offset=80, shape=(6, 4), dtype="float32")
    assert join([row_slice(whole, rank * 6 // tp, (rank + 1) * 6 // tp) for rank in range(tp)]) == whole


@pytest.mark.parametrize("tp", [2, 4])
def test_columns_cut_for_ranks_and_joined_again_are_the_same_stored_range(tp):
    whole = Stored(path=Path("weights.safetensors"), offset=80, shape=(6, 4), dtype="float32")
    assert join_columns([column_slice(whole, rank * 4 // tp, (rank + 1) * 4 // tp) for rank in range(tp)]) == whole


def test_rotary_order_there_and_back_is_the_same_stored_range():
    whole = Stored(path=Path("weights.safetensors"), offset=80, shape=(8, 4), dtype="float32")
    assert rotary_rows(rotary_rows(whole, 4, to_interleaved=True), 4, to_interleaved=False) == whole


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 5))
def test_extents_are_the_bytes_of_the_tensor_in_order(shelf, order, rows):
    parts = stored(shelf, [random_bits((rows, 3), torch.float32, seed) for seed in range(4)])
    lazy = join([parts[i] for i in order])
    content = shelf.read_bytes()
    found = b"".join(content[e.offset : e.offset + e.nbytes] for e in lazy.extents())
    assert found == lazy.numpy().tobytes()
    close_thread_files()


def test_what_takes_arithmetic_has_no_extents():
    whole = Stored(path=Path("weights.safetensors"), offset=80, shape=(8, 4), dtype="float32")
    assert column_slice(whole, 0, 2).extents() is None
    assert cast(whole, "bfloat16").extents() is None
    assert rotary_rows(whole, 4, to_interleaved=True).extents() is None
    assert join([whole, Zeros(shape=(1, 4), dtype="float32")]).extents() is None


def test_a_file_that_ends_early_is_corrupt(tmp_path):
    (tensor,) = stored(tmp_path / "short", [torch.ones(8)])
    (tmp_path / "short").write_bytes(raw_bytes(torch.ones(7)))
    with pytest.raises(CorruptFile, match="truncated"):
        tensor.numpy()


def test_a_file_that_has_gone_is_missing(tmp_path):
    with pytest.raises(MissingFile):
        Stored(path=tmp_path / "gone", offset=0, shape=(1,), dtype="float32").numpy()


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: join([x, literal(torch.zeros(1, 3))]),
        lambda x: join([x, literal(torch.zeros(1, 4, dtype=torch.float16))]),
        lambda x: join([x], (5, 4)),
        lambda x: join_columns([x, literal(torch.zeros(2, 4))]),
        lambda x: row_slice(x, 1, 4),
        lambda x: column_slice(x, 3, 5),
        lambda x: flat_slice(x, 0, 13),
        lambda x: flat_slice(x, 0, 4, (5,)),
        lambda x: flat_slice(x, 4, 2),
    ],
)
def test_ranges_and_shapes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ShapeMismatch):
        wrong(literal(torch.zeros(3, 4)))


def test_integers_are_never_cast():
    with pytest.raises(UnsupportedModel):
        cast(literal(torch.zeros(3, dtype=torch.int64)), "float32")


# --- casts -----------------------------------------------------------------------------------------------------------


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, subnormals, ties, largest values, infinities and NaNs of ``dtype``, with their neighbours and signs."""
    info = torch.finfo(dtype)
    values = [0.0, info.tiny, info.smallest_normal / 2, info.smallest_normal, info.max, 1.0, 1 / 3, 65504.0, 65520.0]
    for narrow in FLOATS:
        other = torch.finfo(narrow)
        # Halfway between two neighbours of the narrower dtype, on either side of an even one.
        values += [1 + other.eps / 2, 1 + 3 * other.eps / 2, other.max, other.tiny / 2, other.tiny * other.eps / 2]
    plain = torch.tensor(values, dtype=torch.float64).to(dtype)
    up, down = (
        torch.nextafter(plain.double().to(dtype), torch.tensor(end, dtype=dtype)) for end in (torch.inf, -torch.inf)
    )
    every = torch.cat([plain, up, down, torch.tensor([torch.inf, torch.nan], dtype=dtype)])
    return torch.cat([every, -every])


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_casts_equal_torch_bit_for_bit(source, target):
    values = torch.cat([special_values(source), random_bits((20000,), source, 1)])
    found, expected = to_torch(cast(literal(values), str(target).removeprefix("torch."))), values.to(target)
    if (source, target) == (torch.float64, torch.float16):
        # torch goes through fp32 here and rounds twice; numpy rounds once, as the cast promises.
        with np.errstate(over="ignore", invalid="ignore"):
            expected = torch.from_numpy(values.numpy().astype(np.float16))
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)  # a NaN's payload may differ
    assert same_bits(found[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_survives_widening_and_narrowing(dtype):
    values = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    name = str(dtype).removeprefix("torch.")
    there_and_back = to_torch(cast(cast(literal(values), "float32"), name))
    assert torch.equal(there_and_back.isnan(), values.isnan())
    assert same_bits(there_and_back[~values.isnan()], values[~values.isnan()])


def test_rounding_to_bfloat16_keeps_every_nan_a_nan():
    nans = torch.cat([torch.arange(0x7F800001, 0x7F810000), torch.arange(0x7FFF0000, 0x7FFFFFFF + 1)]).to(torch.int32)
    assert to_torch(cast(literal(nans.view(torch.float32)), "bfloat16")).isnan().all()


# --- looking at values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nonfinite_values_are_found_as_torch_finds_them(dtype):
    for value in special_values(dtype):
        row = torch.stack([torch.ones((), dtype=dtype), value, -torch.ones((), dtype=dtype)])
        raw = literal(row).numpy()
        assert has_nonfinite(raw, str(dtype).removeprefix("torch.")) == (not value.isfinite()), value


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(max_examples=100)
@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=5))
def test_any_bits_are_finite_or_not_as_torch_says(dtype, bits):
    width = DTYPE_BYTES[str(dtype).removeprefix("torch.")]
    raw = np.array([n >> (64 - 8 * width) for n in bits], dtype=f"u{width}")
    values = torch.from_numpy(raw.view(f"i{width}").copy()).view(dtype)
    assert has_nonfinite(raw, str(dtype).removeprefix("torch.")) == (not values.isfinite().all())


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BYTES) - set(FLOAT_DTYPES) - {"float8_e4m3fn", "float8_e5m2"}))
def test_integers_are_always_finite(dtype):
    assert not has_nonfinite(np.full(4, -1, f"i{DTYPE_BYTES[dtype]}").view(raw_dtype(dtype)), dtype)


@settings(max_examples=50, deadline=None)
@given(expressions())
def test_a_tensors_digest_is_that_of_its_whole_bytes(expression):
    lazy, value = expression
    assert digest_tensor(lazy) == f"xxh3-128:{xxhash.xxh3_128_hexdigest(raw_bytes(value))}"


@settings(max_examples=50, deadline=None)
@given(expressions(), st.data())
def test_equal_sees_a_single_bit(expression, data):
    lazy, value = expression
    assert equal(lazy, literal(value))
    changed = bytearray(raw_bytes(value))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = torch.frombuffer(changed, dtype=torch.uint8).view(value.dtype).reshape(value.shape)
    assert not equal(lazy, literal(other))
