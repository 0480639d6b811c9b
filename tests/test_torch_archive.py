"""Claims about torch.save archives that are read and written without torch. torch and zipfile are the judges."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolconv.errors import BadCheckpoint, CorruptFile, MissingFile, SmolconvError, UnsafePickle
from smolconv.storage.torch_archive import records
from smolconv.storage.torch_archive.archive import ArchivePlan, plan_torch_archive, read_torch_archive
from smolconv.storage.torch_archive.crc32 import crc32_combine
from smolconv.storage.torch_archive.values import ArchiveTensor, DtypeRef, PickledObject, Storage, TensorRef, TorchSize

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
]
FOUR_GIB = 1 << 32


# --- Helpers: from our descriptions to torch's values and back ---


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Bytes drawn from 0 and 1, which in every dtype are finite numbers or truth values."""
    torch_dtype = getattr(torch, dtype)
    values = torch.randint(0, 2, (*shape, torch_dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return values.to(torch.uint8).view(torch_dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def located(tensor: ArchiveTensor) -> torch.Tensor:
    """The tensor that the file holds at the place that ``tensor`` describes."""
    dtype = getattr(torch, tensor.dtype)
    tail = bytearray(tensor.path.read_bytes()[tensor.offset :])
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=dtype)
    whole = torch.frombuffer(tail, dtype=dtype, count=len(tail) // dtype.itemsize)
    return whole.as_strided(tensor.shape, tensor.stride)


def assert_same(ours: object, torchs: object) -> None:
    """Ours, as the reader returned it, describes what torch has, element for element and type for type."""
    if isinstance(ours, ArchiveTensor):
        assert isinstance(torchs, torch.Tensor)
        assert (f"torch.{ours.dtype}", ours.shape) == (str(torchs.dtype), tuple(torchs.shape))
        assert ours.stride == torchs.stride()
        assert ours.is_contiguous == torchs.is_contiguous()
        assert ours.nbytes == torchs.numel() * torchs.element_size()
        assert bytes_of(located(ours)) == bytes_of(torchs)
    elif isinstance(ours, TorchSize):
        assert isinstance(torchs, torch.Size) and tuple(ours) == tuple(torchs)
    elif isinstance(ours, DtypeRef):
        assert torchs is getattr(torch, ours)
    else:
        assert_same_value(ours, torchs, assert_same)


def assert_same_value(left: object, right: object, assert_same_parts: Callable[[object, object], None]) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert isinstance(right, dict) and list(left) == list(right)
        for key in left:
            assert_same_parts(left[key], right[key])
        assert getattr(left, "__dict__", {}) == getattr(right, "__dict__", {})
    elif isinstance(left, (list, tuple)):
        assert isinstance(right, (list, tuple)) and len(left) == len(right)
        for mine, other in zip(left, right, strict=True):
            assert_same_parts(mine, other)
    else:
        assert left == right


def assert_same_in_torch(left: object, right: object) -> None:
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor)
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride())
        assert bytes_of(left) == bytes_of(right)
    else:
        assert_same_value(left, right, assert_same_in_torch)


def write(path: Path, plan: ArchivePlan, data: Mapping[Storage, bytes]) -> None:
    """Write an archive as its users do: pieces and tensor data in any order, checksums last."""
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    try:
        os.ftruncate(fd, plan.size)
        pieces = [*plan.pieces, *((plan.records[storage][0], content) for storage, content in data.items())]
        random.Random(0).shuffle(pieces)
        crcs = {storage: zlib.crc32(content) for storage, content in data.items()}
        for offset, content in [*pieces, *plan.finish(crcs)]:
            assert os.pwrite(fd, content, offset) == len(content)
    finally:
        os.close(fd)


class Refs:
    """Turns an object with torch tensors into one with ``TensorRef``, one ``Storage`` for each of torch's."""

    def __init__(self) -> None:
        self.storages: dict[int, Storage] = {}
        self.data: dict[Storage, bytes] = {}

    def of(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return self.of_tensor(value)
        if isinstance(value, torch.Size):
            return TorchSize(value)
        if isinstance(value, torch.dtype):
            return DtypeRef(str(value).removeprefix("torch."))
        if isinstance(value, dict):
            return type(value)((key, self.of(item)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(item) for item in value)
        return value

    def of_tensor(self, tensor: torch.Tensor) -> TensorRef:
        content = bytes(tensor.untyped_storage().tolist())
        key = tensor.untyped_storage()._cdata
        if key not in self.storages:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.storages[key] = Storage(dtype=dtype, numel=len(content) // tensor.element_size())
            self.data[self.storages[key]] = content
        return TensorRef(storage=self.storages[key], shape=tuple(tensor.shape), offset=tensor.storage_offset())


def save(path: Path, obj: object) -> ArchivePlan:
    """What ``torch.save(obj, path)`` does, by our writer."""
    refs = Refs()
    plan = plan_torch_archive(path.stem, refs.of(obj))
    write(path, plan, refs.data)
    return plan


def archive_of(path: Path, pickled: bytes, records: Mapping[str, bytes] | None = None, **zip_options: Any) -> Path:
    """An archive around any pickle, by Python's zipfile."""
    with zipfile.ZipFile(path, "w", **zip_options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def save_with_torch(path: Path, obj: object) -> Path:
    torch.save(obj, path)
    return path


def training_state() -> dict[str, object]:
    """Something of everything that a checkpoint holds."""
    flat = torch.arange(24, dtype=torch.float32)
    weights: OrderedDict[str, object] = OrderedDict(
        [("embed.weight", flat[:6].view(2, 3)), ("norm.weight", flat[6:8]), ("head.weight", flat[:6].view(2, 3))]
    )
    return {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, dtype=torch.bfloat16)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1], "fused": None, "foreach": False}],
        "module": weights,
        "shapes": [torch.Size([2, 3]), torch.Size([])],
        "dtype": torch.bfloat16,
        "steps": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**31) - 1, 2**64],
        "text": "ü" * 300,
    }


# --- Reading what torch wrote ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (3, 1, 4)], ids=str)
def test_a_tensor_of_any_dtype_is_found_where_torch_put_it(tmp_path, dtype, shape):
    tensor = random_tensor(dtype, shape)
    path = save_with_torch(tmp_path / "a.pt", {"before": torch.ones(3), "t": tensor})
    assert_same(read_torch_archive(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_training_state_is_read_as_torch_reads_it(tmp_path, protocol):
    torch.save(training_state(), tmp_path / "a.pt", pickle_protocol=protocol)
    assert_same(read_torch_archive(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=False))


def test_a_state_dict_keeps_its_order_and_its_metadata(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    again: Any = read_torch_archive(save_with_torch(tmp_path / "a.pt", state))
    assert list(again) == list(state)
    assert again._metadata == state._metadata


def test_parameters_are_read_as_their_tensors(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    marked = torch.nn.Parameter(torch.arange(4.0))
    marked.sharded_over = 2
    path = save_with_torch(tmp_path / "a.pt", [parameter, marked])
    again: Any = read_torch_archive(path)
    first, second = again
    assert_same(first, parameter)
    assert_same(second, marked)


def test_a_tensor_with_python_attributes_is_read_without_them(tmp_path):
    tensor = torch.arange(4.0)
    tensor.ds_id = 7
    path = save_with_torch(tmp_path / "a.pt", tensor)
    assert b"_rebuild_from_type_v2" in path.read_bytes()
    assert_same(read_torch_archive(path), tensor)


@pytest.mark.parametrize(
    "value", [set(), {"a", 3, None, (1, "b")}, frozenset({"a"})], ids=["empty", "filled", "frozen"]
)
def test_a_set_is_read_as_a_set_which_an_engine_may_save_again(tmp_path, value):
    found = read_torch_archive(save_with_torch(tmp_path / "a.pt", {"names": value}))
    assert found == {"names": value}
    assert type(found["names"]) is type(value)


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.t(),
        lambda base: base[:, 1],
        lambda base: base[1:, ::2],
        lambda base: base[0].expand(5, 4),
        lambda base: base[3:, 1:],
        lambda base: base[2, 3],
        lambda base: base[:, :1].view(3, 1, 1).transpose(1, 2),
    ],
)
def test_a_view_is_reported_with_its_strides_and_offset(tmp_path, view):
    base = torch.arange(12, dtype=torch.int32).view(3, 4)
    path = save_with_torch(tmp_path / "a.pt", [view(base), base])
    again: Any = read_torch_archive(path)
    part, whole = again
    assert_same(part, view(base))
    assert_same(whole, base)
    assert part.storage == whole.storage


def test_views_of_one_storage_share_its_key_and_others_do_not(tmp_path):
    flat = torch.arange(10.0)
    again: Any = read_torch_archive(save_with_torch(tmp_path / "a.pt", [flat[:4], flat[4:], flat.clone()]))
    a, b, c = again
    assert a.storage == b.storage != c.storage
    assert b.offset - a.offset == 4 * 4


def test_the_folder_in_the_archive_may_have_any_name(tmp_path):
    path = save_with_torch(tmp_path / "optimizer_pp-0-of-1 ü.pt", torch.ones(2))
    renamed = path.rename(tmp_path / "other.pt")
    assert_same(read_torch_archive(renamed), torch.ones(2))


def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(training_state(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_torch_archive(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=False))


def test_allowed_classes_are_called_and_filled_in_place_of_those_named(tmp_path):
    class Stub:
        def __init__(self, *args: object) -> None:
            self.args = args

    state = {"scaler": OrderedDict, "when": subprocess.CompletedProcess(args=["x"], returncode=3)}
    path = save_with_torch(tmp_path / "a.pt", state)
    again: Any = read_torch_archive(path, allow={("subprocess", "CompletedProcess"): Stub})
    assert vars(again["when"]) == {"args": ["x"], "returncode": 3, "stdout": None, "stderr": None}
    assert (again["scaler"].module, again["scaler"].name) == ("collections", "OrderedDict")
    with pytest.raises(UnsafePickle, match=r"subprocess\.CompletedProcess"):
        read_torch_archive(path)


def test_an_allowed_class_that_rejects_its_arguments_means_a_corrupt_file(tmp_path):
    path = archive_of(tmp_path / "a.pt", b"\x80\x02cmodule\nname\n)R.")
    with pytest.raises(CorruptFile, match=r"module\.name"):
        read_torch_archive(path, allow={("module", "name"): int("7").__add__})


# --- Writing what torch reads ---


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_tensors_of_any_dtype_that_we_wrote(tmp_path, dtype, mmap):
    tensors = [random_tensor(dtype, shape, seed) for seed, shape in enumerate([(), (7,), (0,), (2, 0), (3, 1, 4)])]
    save(tmp_path / "a.pt", tensors)
    assert_same_in_torch(torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap), tensors)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_a_training_state_that_we_wrote(tmp_path, mmap):
    state = training_state()
    save(tmp_path / "a.pt", state)
    again = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert_same_in_torch(again, state)
    embed, head = again["module"]["embed.weight"], again["module"]["head.weight"]
    assert embed.untyped_storage()._cdata == head.untyped_storage()._cdata


def test_zip_tools_accept_what_we_wrote(tmp_path):
    save(tmp_path / "a.pt", training_state())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None


def test_the_records_are_those_of_torch_in_its_order(tmp_path):
    tensors = [torch.ones(n) for n in range(12)]
    torch.save(tensors, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        expected = archive.namelist()
        plain = {name: archive.read(f"a/{name}") for name in (".format_version", "byteorder", "version")}
        storage_alignment = archive.read("a/.storage_alignment")
    save(tmp_path / "a.pt", tensors)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.namelist() == expected
        assert {name: archive.read(f"a/{name}") for name in plain} == plain
        assert archive.read("a/.storage_alignment") == storage_alignment
        serialization_id = archive.read("a/.data/serialization_id")
    assert len(serialization_id) == 40 and serialization_id.isdigit()


def test_storages_lie_where_torch_computes_that_they_must(tmp_path):
    # With map_location="meta" torch computes offsets from sizes alone, as its own writer would have placed them.
    tensors = [torch.ones(n, dtype=torch.uint8) for n in (1, 0, 63, 64, 0, 65, 4096)]
    plan = save(tmp_path / "a.pt", tensors)
    on_meta = torch.load(tmp_path / "a.pt", weights_only=True, map_location="meta")
    offsets = [tensor.untyped_storage()._checkpoint_offset for tensor in on_meta]
    assert [offset for offset, _ in plan.records.values()] == offsets
    assert [nbytes for _, nbytes in plan.records.values()] == [1, 0, 63, 64, 0, 65, 4096]
    assert all(offset % 64 == 0 for offset in offsets)


def test_pieces_records_and_finish_cover_every_byte():
    storages = [Storage(dtype="int16", numel=n) for n in (5, 0, 200)]
    plan = plan_torch_archive("a", [TensorRef(storage=s, shape=(s.numel,)) for s in storages])
    covered = [(offset, len(content)) for offset, content in plan.pieces] + list(plan.records.values())
    *patches, (directory_offset, directory) = plan.finish(dict.fromkeys(storages, 1))
    end = 0
    for offset, length in sorted([*covered, (directory_offset, len(directory))]):
        assert offset == end
        end += length
    assert end == plan.size
    assert all(len(crc) == 4 for _, crc in patches) and len(patches) == 2


def test_the_same_object_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "a.pt", training_state())
    assert (tmp_path / "one" / "a.pt").read_bytes() == (tmp_path / "two" / "a.pt").read_bytes()


def test_several_tensors_may_refer_to_parts_of_one_storage(tmp_path):
    values = torch.arange(12, dtype=torch.int64)
    storage = Storage(dtype="int64", numel=12)
    refs = [TensorRef(storage=storage, shape=(2, 3), offset=6), TensorRef(storage=storage, shape=(), offset=1)]
    plan = plan_torch_archive("a", refs)
    write(tmp_path / "a.pt", plan, {storage: bytes_of(values)})
    matrix, scalar = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(matrix, values[6:].view(2, 3))
    assert scalar == values[1]
    assert matrix.untyped_storage()._cdata == scalar.untyped_storage()._cdata


def test_foreign_objects_are_called_by_name_and_given_their_state(tmp_path):
    obj = PickledObject(module="torch.nn", name="Identity", args=(1,), state={"training": False, "extra": (1, "a")})
    plan = plan_torch_archive("a", {"layer": obj, "bare": PickledObject(module="torch.nn", name="Identity")})
    write(tmp_path / "a.pt", plan, {})
    again = torch.load(tmp_path / "a.pt", weights_only=False)
    assert type(again["layer"]) is type(again["bare"]) is torch.nn.Identity
    assert (again["layer"].training, again["layer"].extra) == (False, (1, "a"))
    assert again["bare"].training is True
    with torch.serialization.safe_globals([(torch.nn.Identity, "torch.nn.Identity")]):
        assert torch.load(tmp_path / "a.pt", weights_only=True)["layer"].extra == (1, "a")


def test_a_state_dict_with_metadata_survives_both_directions(tmp_path):
    layer = torch.nn.BatchNorm1d(3)
    torch.save(OrderedDict(layer.state_dict()), tmp_path / "a.pt")
    metadata = OrderedDict(layer.state_dict()._metadata)
    state: Any = OrderedDict(one=1)
    state._metadata = metadata
    write(tmp_path / "b.pt", plan_torch_archive("b", state), {})
    assert torch.load(tmp_path / "b.pt", weights_only=True)._metadata == metadata
    again: Any = read_torch_archive(tmp_path / "b.pt")
    assert again._metadata == metadata


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", 1j, object(), float, torch.ones(1), Path("a")])
def test_types_that_torch_would_not_load_are_refused_when_planning(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        plan_torch_archive("a", [value])


def test_integers_beyond_what_torch_reads_are_refused_when_planning(tmp_path):
    save(tmp_path / "a.pt", [2**2039 - 1, -(2**2039)])
    assert torch.load(tmp_path / "a.pt", weights_only=True) == [2**2039 - 1, -(2**2039)]
    with pytest.raises(ValueError, match="255 bytes"):
        plan_torch_archive("a", 2**2039)


@pytest.mark.parametrize("stem", ["", "a/b", "a\0b"])
def test_a_stem_that_cannot_name_a_folder_is_refused(stem):
    with pytest.raises(ValueError, match="folder"):
        plan_torch_archive(stem, None)


def test_references_outside_their_storage_cannot_be_made():
    storage = Storage(dtype="float32", numel=6)
    for shape, offset in [((7,), 0), ((2, 3), 1), ((1,), -1), ((-1,), 2)]:
        with pytest.raises(ValueError, match="within"):
            TensorRef(storage=storage, shape=shape, offset=offset)
    with pytest.raises(ValueError, match="float31"):
        Storage(dtype="float31", numel=1)


# --- Both directions, for any nesting ---

tensors = st.builds(
    random_tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3).map(tuple), st.integers(0, 99)
)
keys = st.text(max_size=8) | st.integers(-(2**70), 2**70) | st.tuples(st.integers(), st.text(max_size=2))
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**2000), 2**2000)
    | st.floats(allow_nan=False)
    | st.text()
    | tensors
    | st.lists(st.integers(0, 2**40), max_size=4).map(torch.Size)
    | st.sampled_from(DTYPES).map(lambda name: getattr(torch, name))
)
objects = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(keys, inner, max_size=5)
        | st.dictionaries(keys, inner, max_size=5).map(OrderedDict)
    ),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """One folder for all examples of a property; each example overwrites its file."""
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=80, deadline=None)
@given(obj=objects)
def test_any_nesting_that_we_write_is_the_same_to_torch_and_to_us(scratch, obj):
    path = scratch / "written.pt"
    save(path, obj)
    assert_same_in_torch(torch.load(path, weights_only=True), obj)
    assert_same(read_torch_archive(path), obj)


@settings(max_examples=60, deadline=None)
@given(obj=objects)
def test_any_nesting_that_torch_writes_is_the_same_to_us(scratch, obj):
    path = save_with_torch(scratch / "saved.pt", obj)
    assert_same(read_torch_archive(path), torch.load(path, weights_only=False))


# --- Checksums ---


@settings(deadline=None)
@given(a=st.binary(max_size=300), b=st.binary(max_size=300))
def test_combined_checksums_equal_zlibs(a, b):
    assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_checksums_of_large_splits_equal_zlibs():
    content = random.Random(1).randbytes(5_000_003)
    for cut in (0, 1, 4096, 1 << 20, 4_999_999, len(content)):
        a, b = content[:cut], content[cut:]
        assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(content)


# --- Archives beyond 4 GiB ---


def crc_of_zeros(length: int) -> int:
    """By doubling; each step is what the tests above compare with zlib."""
    crc, block, block_bytes = 0, zlib.crc32(b"\0"), 1
    while length:
        if length & 1:
            crc = crc32_combine(crc, block, block_bytes)
        block, block_bytes, length = crc32_combine(block, block, block_bytes), 2 * block_bytes, length >> 1
    return crc


@pytest.fixture(scope="module")
def huge_archive(tmp_path_factory) -> tuple[Path, ArchivePlan, list[Storage]]:
    """A sparse archive with one storage of more than 4 GiB of zeros, and small ones before and behind it."""
    path = tmp_path_factory.mktemp("huge") / "huge.pt"
    storages = [Storage(dtype="uint8", numel=n) for n in (40, FOUR_GIB + 100, 3, 0, 70)]
    plan = plan_torch_archive("huge", [TensorRef(storage=s, shape=(s.numel,)) for s in storages])
    small = {s: bytes([7] * s.nbytes) for s in storages if s.nbytes < FOUR_GIB}
    crcs = {s: zlib.crc32(content) for s, content in small.items()} | {storages[1]: crc_of_zeros(FOUR_GIB + 100)}
    with path.open("wb") as file:
        file.truncate(plan.size)
        contents = [(plan.records[s][0], content) for s, content in small.items()]
        for offset, content in [*plan.pieces, *contents, *plan.finish(crcs)]:
            file.seek(offset)
            file.write(content)
    assert path.stat().st_size == plan.size
    return path, plan, storages


def test_the_checksum_of_zeros_is_zlibs():
    for length in (0, 1, 1000, 3_000_001):
        assert crc_of_zeros(length) == zlib.crc32(bytes(length))


def test_zipfile_finds_the_records_of_a_huge_archive(huge_archive):
    path, plan, storages = huge_archive
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for key, storage in enumerate(storages):
            entry = archive.getinfo(f"huge/data/{key}")
            file.seek(entry.header_offset + 26)
            data_offset = entry.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            assert (data_offset, entry.file_size) == plan.records[storage]
        assert archive.read("huge/data/0") == bytes([7] * 40)
        assert archive.read("huge/data/4") == bytes([7] * 70)  # past 4 GiB; read() compares the checksum
        assert archive.read("huge/version") == b"3\n"
        with archive.open("huge/data/1") as record:
            assert record.read(1000) == bytes(1000)


def test_our_reader_finds_the_tensors_of_a_huge_archive(huge_archive):
    path, plan, storages = huge_archive
    again: Any = read_torch_archive(path)
    assert [(t.offset, t.nbytes) for t in again] == [plan.records[s] for s in storages]


def test_torch_finds_the_tensors_of_a_huge_archive(huge_archive):
    path, plan, storages = huge_archive
    on_meta = torch.load(path, weights_only=True, map_location="meta")
    assert [t.untyped_storage()._checkpoint_offset for t in on_meta] == [plan.records[s][0] for s in storages]
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert mapped[1].numel() == FOUR_GIB + 100 and mapped[1][-1] == 0
    assert torch.equal(mapped[4], torch.full((70,), 7, dtype=torch.uint8))


@pytest.mark.parametrize("size", [FOUR_GIB - 2, FOUR_GIB - 1, FOUR_GIB])
def test_headers_switch_to_zip64_where_torch_does(tmp_path, size):
    torch.save(None, tmp_path / "any.pt")
    reader = torch._C.PyTorchFileReader(str(tmp_path / "any.pt"))
    storages = [Storage(dtype="uint8", numel=n) for n in (size, 5, size, 5)]
    plan = plan_torch_archive("archive", [TensorRef(storage=s, shape=(s.numel,)) for s in storages])
    # _get_offset in torch/serialization.py: behind the data comes a data descriptor of 16 or 24 bytes
    header = None
    for key, storage in enumerate(storages):
        offset, nbytes = plan.records[storage]
        if header is not None:
            assert reader.get_record_offset_no_read(header, f"data/{key}", nbytes, 64) - header == offset - header
        wide = nbytes >= 0xFFFFFFFF or (header is not None and header >= 0xFFFFFFFF)
        header = offset + nbytes + (24 if wide else 16)


@pytest.mark.slow
def test_more_records_than_a_plain_zip_can_count_are_found(tmp_path):
    storages = [Storage(dtype="uint8", numel=0) for _ in range(66_000)]
    plan = plan_torch_archive("a", [TensorRef(storage=s, shape=(0,)) for s in storages])
    write(tmp_path / "a.pt", plan, {})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert len(archive.infolist()) == 66_000 + 6
    again: Any = read_torch_archive(tmp_path / "a.pt")
    assert [t.storage for t in again] == [str(n) for n in range(66_000)]


# --- Pickles that want more ---


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def legacy_torch_file(payload: object) -> bytes:
    stream = io.BytesIO()
    torch.save(payload, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def shell_by_reduce(protocol: int, path: str) -> bytes:
    return pickle.dumps({"a": Call(os.system, f"touch {path}")}, protocol)


#: name -> a pickle that creates the file whose path it is given, if it is loaded by Python's own unpickler
ATTACKS: dict[str, Callable[[str], bytes]] = {
    **{
        f"os.system by REDUCE, protocol {protocol}": functools.partial(shell_by_reduce, protocol)
        for protocol in range(6)
    },
    "builtins.eval": lambda path: pickle.dumps(Call(eval, f"open({path!r}, 'w')"), 2),
    "builtins.exec": lambda path: pickle.dumps(Call(exec, f"open({path!r}, 'w')"), 4),
    "builtins.open": lambda path: pickle.dumps(Call(open, path, "w"), 2),
    "INST": lambda path: b"(" + b"S'touch " + path.encode() + b"'\nios\nsystem\n.",
    "OBJ": lambda path: b"(cos\nsystem\n" + text(f"touch {path}") + b"o.",
    "STACK_GLOBAL": lambda path: b"\x80\x04" + stack_global("os", "system") + text(f"touch {path}") + b"\x85R.",
    "a dotted name in torch": lambda path: (
        b"\x80\x04" + stack_global("torch", "os.system") + text(f"touch {path}") + b"\x85R."
    ),
    "EXT1": lambda path: b"\x80\x02\x82\xf0" + text(f"touch {path}") + b"\x85R.",
    "EXT2": lambda path: b"\x80\x02\x83\xf0\x00" + text(f"touch {path}") + b"\x85R.",
    "EXT4": lambda path: b"\x80\x02\x84\xf0\x00\x00\x00" + text(f"touch {path}") + b"\x85R.",
    "torch._utils._import_dotted_name": lambda path: (
        b"\x80\x02ctorch._utils\n_import_dotted_name\n"
        + text("os.system")
        + b"\x85R"
        + text(f"touch {path}")
        + b"\x85R."
    ),
    "torch.storage._load_from_bytes": lambda path: pickle.dumps(
        Call(torch.storage._load_from_bytes, legacy_torch_file(Call(os.system, f"touch {path}"))), 4
    ),
    "a reference from the memo": lambda path: b"\x80\x02cos\nsystem\nq\x00]h\x00" + text(f"touch {path}") + b"\x85Ra.",
    "functools.partial": lambda path: pickle.dumps(Call(functools.partial(os.system, f"touch {path}")), 2),
}


@pytest.fixture
def extension():
    """os.system under extension code 240, as a malicious or careless package might register it."""
    copyreg.add_extension("os", "system", 240)
    yield
    copyreg.remove_extension("os", "system", 240)
    copyreg.clear_extension_cache()


@pytest.mark.parametrize("name", ATTACKS)
def test_pickles_that_run_code_never_run(tmp_path, extension, name):
    sentinel = tmp_path / "sentinel"
    pickled = ATTACKS[name](str(sentinel))
    path = archive_of(tmp_path / "a.pt", pickled)
    with pytest.raises((UnsafePickle, CorruptFile)) as caught:
        read_torch_archive(path)
    assert not sentinel.exists()
    assert str(path) in str(caught.value)

    pickle.loads(pickled)  # the weapon was loaded: Python's own unpickler does run it
    assert sentinel.exists()


REFUSED: dict[str, bytes] = {
    "_codecs.encode": pickle.dumps(b"bytes", 2),
    "torch.storage.UntypedStorage called": b"\x80\x02ctorch.storage\nUntypedStorage\n)R.",
    "torch.FloatStorage called": b"\x80\x02ctorch\nFloatStorage\nK\x05\x85R.",
    "torch.Tensor created": b"\x80\x02ctorch\nTensor\n)\x81.",
    "collections.OrderedDict created": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "collections.OrderedDict.__init__.__globals__": (
        b"\x80\x04" + stack_global("collections", "OrderedDict.__init__.__globals__") + b"."
    ),
    "collections.OrderedDict.fromkeys": b"\x80\x02ccollections\nOrderedDict.fromkeys\n.",
    "dotted dtype": b"\x80\x04" + stack_global("torch", "float32.__class__") + b".",
    "torch._utils._rebuild_sparse_tensor": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.",
    "torch._utils._rebuild_wrapper_subclass": b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n.",
    "torch.hub.load": b"\x80\x02ctorch.hub\nload\n.",
    "builtins.getattr": b"\x80\x02c__builtin__\ngetattr\n.",
    "attributes that hide methods": (b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items") + b"ctorch\nSize\nsb."),
    "attributes of a dict": b"\x80\x02}}" + text("a") + b"Nsb.",
    "attributes of a class": b"\x80\x02ccollections\nOrderedDict\n}" + text("fromkeys") + b"Nsb.",
    "a tensor subclass": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nSize\n)}tR."
    ),
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "PERSID": b"Pstorage\n.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_whatever_is_not_on_the_list_is_refused_as_unsafe(tmp_path, name):
    with pytest.raises(UnsafePickle, match=r"data\.pkl asks for"):
        read_torch_archive(archive_of(tmp_path / "a.pt", REFUSED[name]))


def test_the_message_names_the_file_and_what_was_asked_for(tmp_path):
    path = archive_of(tmp_path / "a.pt", pickle.dumps(Call(os.system, "true"), 2))
    with pytest.raises(UnsafePickle) as caught:
        read_torch_archive(path)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{path}: data.pkl asks for {os.system.__module__}.system")
    assert len(rest) == 2


INVALID: dict[str, bytes] = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "two objects": b"\x80\x02}}.",
    "an open mark": b"\x80\x02(}.",
    "a mark that was never set": b"\x80\x02t.",
    "an unknown instruction": b"\x80\x02\xff.",
    "an unknown protocol": b"\x80\x09}.",
    "an unknown memo index": b"\x80\x02h\x07.",
    "a string longer than the file": b"\x80\x02X\xff\xff\xff\xffabc.",
    "bytes longer than memory": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a string that is not UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "a global without an end": b"\x80\x02ctorch",
    "a global named by a number": b"\x80\x04K\x01K\x02\x93.",
    "an unhashable key": b"\x80\x02}]Ns.",
    "a key of nested tuples": b"\x80\x02}" + b"K\x01\x85" + b"q\x00h\x00\x86" * 200 + b"Ns.",
    "a key without a value": b"\x80\x02}(K\x01u.",
    "items of a list": b"\x80\x02]K\x01K\x02s.",
    "an append to a tuple": b"\x80\x02)K\x01a.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "arguments that are no tuple": b"\x80\x02ctorch\nSize\n]R.",
    "a size of text": b"\x80\x02ctorch\nSize\n" + text("a") + b"\x85\x85R.",
    "a negative size": b"\x80\x02ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R.",
    "a set of text": b"\x80\x02c__builtin__\nset\n" + text("abc") + b"\x85R.",
    "a set of a list that holds itself": b"\x80\x02c__builtin__\nset\n]q\x00h\x00a\x85R.",
    "a set of sets": b"\x80\x02c__builtin__\nset\nq\x00]h\x00]\x85Ra\x85R.",
    "a set of nested tuples": (b"\x80\x02c__builtin__\nset\n]" + b"K\x01\x85" + b"q\x00h\x00\x86" * 200 + b"a\x85R."),
    "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a persistent id that is not a storage": b"\x80\x02K\x01Q.",
    "more memo indices than memory": b"\x80\x02}r\xff\xff\xff\xffh\x00.",
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_pickle_means_a_corrupt_file(tmp_path, name):
    with pytest.raises(CorruptFile, match=r"a\.pt"):
        read_torch_archive(archive_of(tmp_path / "a.pt", INVALID[name]))


def tensor_pickle(
    *, numel: int = 6, offset: bytes = b"K\x00", shape: bytes = b"K\x06\x85", stride: bytes = b"K\x01\x85"
):
    """A float32 tensor over the record data/0, in torch's words."""
    count = pickle.dumps(numel, 2)[2:-1]
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cuda:0") + count + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + hooks + b"tR."


def test_the_device_that_a_tensor_was_on_does_not_matter(tmp_path):
    path = archive_of(tmp_path / "a.pt", tensor_pickle(), {"data/0": bytes(24), "version": b"3\n"})
    assert_same(read_torch_archive(path), torch.load(path, weights_only=True, map_location="cpu"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"numel": 7},
        {"numel": 2**80},
        {"numel": -1},
        {"shape": b"K\x07\x85"},
        {"offset": b"K\x01"},
        {"offset": b"J\xff\xff\xff\xff"},
        {"offset": b"N"},
        {"offset": b"\x8a\xff" + b"\x11" * 255},
        {"stride": b"K\x02\x85"},
        {"stride": b"J\xff\xff\xff\xff\x85"},
        {"stride": b")"},
        {"shape": b"\x88\x85"},
        {"shape": (b"\x8a\x08" + b"\xff" * 7 + b"\x7f") * 2 + b"\x86", "stride": b"K\x00K\x00\x86"},
        {"shape": b"(" + b"K\x01" * 65 + b"t", "stride": b"(" + b"K\x01" * 65 + b"t"},
    ],
    ids=str,
)
def test_a_tensor_that_leaves_its_record_means_a_corrupt_file(tmp_path, wrong):
    path = archive_of(tmp_path / "a.pt", tensor_pickle(**wrong), {"data/0": bytes(24)})
    with pytest.raises(CorruptFile):
        read_torch_archive(path)


def test_a_tensor_without_its_record_means_a_corrupt_file(tmp_path):
    path = archive_of(tmp_path / "a.pt", tensor_pickle(), {"data/1": bytes(24)})
    with pytest.raises(CorruptFile, match="data/0, which is missing"):
        read_torch_archive(path)


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()])
def test_tensors_of_kinds_that_checkpoints_do_not_have_are_refused(tmp_path, tensor):
    with pytest.raises(BadCheckpoint):
        read_torch_archive(save_with_torch(tmp_path / "a.pt", tensor))


def test_a_tensor_that_is_yet_to_be_negated_is_refused(tmp_path):
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    with pytest.raises(CorruptFile, match="negation"):
        read_torch_archive(save_with_torch(tmp_path / "a.pt", negated))


# --- Files that are not what they should be ---


def three_parts(error: BaseException, path: Path) -> bool:
    lines = str(error).splitlines()
    return len(lines) >= 3 and lines[0].startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFile) as caught:
        read_torch_archive(tmp_path / "a.pt")
    assert three_parts(caught.value, tmp_path / "a.pt")


def tar_file() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


def npz_file() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("weight.npy", b"")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: b"", "is empty"),
        (lambda: bytes(1000), "begins with the bytes 00 00"),
        (lambda: b"<!DOCTYPE html>", "begins with the bytes"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (tar_file, "is a tar file"),
        (npz_file, "not one of torch.save's"),
        (lambda: b"PK\x03\x04" + bytes(1000), "cut short"),
    ],
)
def test_a_file_of_another_kind_is_recognised(tmp_path, content, said):
    path = tmp_path / "a.pt"
    path.write_bytes(content())
    with pytest.raises(CorruptFile, match=said) as caught:
        read_torch_archive(path)
    assert three_parts(caught.value, path)


def test_a_folder_in_place_of_the_file_is_recognised(tmp_path):
    with pytest.raises(CorruptFile, match="is a folder"):
        read_torch_archive(tmp_path)


def test_a_compressed_archive_is_refused(tmp_path):
    path = archive_of(tmp_path / "a.pt", pickle.dumps({}, 2), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptFile, match="compressed"):
        read_torch_archive(path)


@pytest.mark.parametrize("order", [b"big", b"middle", b"little" * 1000])
def test_an_archive_that_is_not_little_endian_is_refused(tmp_path, order):
    path = archive_of(tmp_path / "a.pt", pickle.dumps({}, 2), {"byteorder": order})
    with pytest.raises(CorruptFile, match="byte order"):
        read_torch_archive(path)


def test_a_pickle_beyond_the_limit_is_refused_unread(tmp_path, monkeypatch):
    path = archive_of(tmp_path / "a.pt", pickle.dumps("x" * 1000, 2))
    assert read_torch_archive(path) == "x" * 1000
    assert records.MAX_PICKLE_BYTES == 1 << 26
    monkeypatch.setattr(records, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(CorruptFile, match="Expected at most 1000"):
        read_torch_archive(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["archive/data.pkl", "other/data.pkl"])
def test_an_archive_with_two_pickles_is_refused(tmp_path, second):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr(second, pickle.dumps({}, 2))
    with pytest.raises(CorruptFile, match="Expected exactly one"):
        read_torch_archive(tmp_path / "a.pt")


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = save_with_torch(tmp_path / "a.pt", training_state()).read_bytes()
    cut = tmp_path / "cut.pt"
    for length in [*range(0, len(whole) - 120, 37), *range(len(whole) - 120, len(whole))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CorruptFile):
            read_torch_archive(cut)


def read_or_refuse(path: Path) -> None:
    """Only our own errors may escape, and nothing may run."""
    for plain_keys in (None, ("module",)):
        with contextlib.suppress(SmolconvError):
            read_torch_archive(path, plain_keys=plain_keys)


@pytest.fixture(scope="module")
def saved_bytes() -> bytes:
    stream = io.BytesIO()
    torch.save(training_state() | {"parameter": torch.nn.Parameter(torch.ones(2)), "new": torch.ones(1).byte()}, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def saved_pickle(saved_bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved_bytes)) as archive:
        return archive.read("archive/data.pkl")


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_anywhere_raise_only_our_errors(scratch, saved_bytes, flips):
    damaged = bytearray(saved_bytes)
    for place, bits in flips:
        damaged[int(place * len(damaged))] ^= bits
    (scratch / "flipped.pt").write_bytes(damaged)
    read_or_refuse(scratch / "flipped.pt")


@settings(max_examples=150, deadline=None)
@given(back=st.integers(1, 900), bits=st.integers(1, 255))
def test_flipped_bytes_in_the_directory_raise_only_our_errors(scratch, saved_bytes, back, bits):
    damaged = bytearray(saved_bytes)
    damaged[-back] ^= bits
    (scratch / "flipped.pt").write_bytes(damaged)
    read_or_refuse(scratch / "flipped.pt")


OPCODES = sorted(opcode[0] for name in pickle.__all__ if isinstance(opcode := getattr(pickle, name), bytes))
edits = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 3),
    st.binary(max_size=4) | st.lists(st.sampled_from(OPCODES), max_size=4).map(bytes),
)


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(edits, min_size=1, max_size=4))
def test_edited_pickles_with_right_checksums_raise_only_our_errors(scratch, saved_pickle, changes):
    edited = bytearray(saved_pickle)
    for place, removed, inserted in changes:
        start = int(place * len(edited))
        edited[start : start + removed] = inserted
    records = {f"data/{key}": bytes(96) for key in range(8)}
    read_or_refuse(archive_of(scratch / "edited.pt", bytes(edited), records))


@settings(max_examples=100, deadline=None)
@given(instructions=st.lists(st.sampled_from(OPCODES) | st.integers(0, 255), max_size=40).map(bytes))
def test_random_pickles_raise_only_our_errors(scratch, instructions):
    read_or_refuse(archive_of(scratch / "random.pt", b"\x80\x04" + instructions + b"."))


def test_deeply_nested_pickles_do_not_exhaust_the_stack(tmp_path):
    for depth, read in ((60, True), (200_000, False)):
        path = archive_of(tmp_path / f"{depth}.pt", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
        if read:
            assert str(read_torch_archive(path)) == "[" * depth + "]" * depth
        else:
            with pytest.raises(CorruptFile, match="more than 64 deep"):
                read_torch_archive(path)


def test_a_list_that_holds_itself_is_refused(tmp_path):
    path = archive_of(tmp_path / "a.pt", b"\x80\x02]q\x00h\x00a.")
    with pytest.raises(CorruptFile, match="holds itself"):
        read_torch_archive(path)


@pytest.mark.parametrize("doublings", [20, 60])
def test_a_list_of_lists_of_the_same_lists_is_bounded(tmp_path, doublings):
    # Each list holds the one before it twice: a few hundred bytes say 2 ** doublings things.
    lists = b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, doublings + 1))
    path = archive_of(tmp_path / "a.pt", b"\x80\x02(]q\x00" + lists + b"t.")
    if doublings == 20:
        found: Any = read_torch_archive(path)
        assert len(found) == 21
        return
    with pytest.raises(CorruptFile, match="so often"):
        read_torch_archive(path)


# --- Imports ---


def test_importing_the_module_does_not_import_torch():
    program = "import sys, smolconv.storage.torch_archive.archive; print([m for m in sys.modules if m.split('.')[0] == 'torch'])"
    root = Path(records.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
