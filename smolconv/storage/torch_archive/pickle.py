"""Writes the pickle of an archive: protocol 2, in the instructions that torch.load accepts with weights_only."""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from smolconv.storage.torch_archive.values import (
    STORAGE_CLASSES,
    DtypeRef,
    GlobalRef,
    PickledObject,
    Storage,
    TensorRef,
    TorchSize,
    contiguous_stride,
)


@dataclass(frozen=True, kw_only=True)
class _PersistentId:
    value: tuple[object, ...]


def pickle_object(obj: object) -> tuple[bytes, tuple[Storage, ...]]:
    """The pickle, and the storages of the tensors in it, in the order of their numbers. Raises ``TypeError``."""
    pickler = _Pickler()
    pickler.write(obj)
    return bytes(pickler.out + pickle.STOP), tuple(pickler.storages)


class _Pickler:
    """Collects the instructions for one object, and its storages, numbered in order of appearance."""

    def __init__(self) -> None:
        self.out = bytearray(pickle.PROTO + b"\x02")
        self.memo: dict[str | GlobalRef, int] = {}  # by value, so that the bytes do not depend on identities
        self.storages: dict[Storage, int] = {}

    def write(self, value: object) -> None:
        kind = type(value)
        writer = _WRITERS.get(kind)
        if writer is None:
            raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be saved in a torch archive")
        writer(self, value)

    def write_list(self, items: list[object]) -> None:
        self.out += pickle.EMPTY_LIST
        self.write_marked(items, pickle.APPENDS)

    def write_dict(self, items: dict[object, object]) -> None:
        self.out += pickle.EMPTY_DICT
        self.write_items(items)

    def write_ordered_dict(self, items: OrderedDict[object, object]) -> None:
        self.write_call("collections", "OrderedDict", ())
        self.write_items(items)
        # A state_dict's _metadata. OrderedDict[str, int]() leaves its type arguments in another attribute.
        if attributes := {name: item for name, item in vars(items).items() if name != "__orig_class__"}:
            self.write(attributes)
            self.out += pickle.BUILD

    def write_object(self, value: PickledObject) -> None:
        self.write_call(value.module, value.name, value.args)
        if value.state is not None:
            self.write(dict(value.state))
            self.out += pickle.BUILD

    def write_persistent_id(self, value: _PersistentId) -> None:
        self.write(value.value)
        self.out += pickle.BINPERSID

    def write_memoized(self, value: str | GlobalRef) -> None:
        index = self.memo.get(value)
        if index is not None:
            self.out += _indexed(pickle.BINGET, pickle.LONG_BINGET, index)
            return
        if isinstance(value, GlobalRef):
            if "\n" in value.module + value.name:
                raise ValueError(f"{value} cannot be the name of a class")
            self.out += pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
        else:
            encoded = value.encode("utf-8", "surrogatepass")
            self.out += pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
        index = self.memo[value] = len(self.memo)
        self.out += _indexed(pickle.BINPUT, pickle.LONG_BINPUT, index)

    def write_tuple(self, items: tuple[object, ...]) -> None:
        short = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
        if len(items) < len(short):
            for item in items:
                self.write(item)
            self.out += short[len(items)]
        else:
            self.write_marked(items, pickle.TUPLE)

    def write_items(self, items: Mapping[object, object]) -> None:
        self.write_marked([part for item in items.items() for part in item], pickle.SETITEMS)

    def write_marked(self, items: Iterable[object], instruction: bytes) -> None:
        self.out += pickle.MARK
        for item in items:
            self.write(item)
        self.out += instruction

    def write_call(self, module: str, name: str, args: tuple[object, ...]) -> None:
        self.write_memoized(GlobalRef(module=module, name=name))
        self.write_tuple(args)
        self.out += pickle.REDUCE

    def write_tensor(self, tensor: TensorRef) -> None:
        storage = tensor.storage
        key = str(self.storages.setdefault(storage, len(self.storages)))
        typed = STORAGE_CLASSES.get(storage.dtype)  # torch made no storage classes for its later dtypes
        cls = (
            GlobalRef(module="torch", name=typed) if typed else GlobalRef(module="torch.storage", name="UntypedStorage")
        )
        record = _PersistentId(value=("storage", cls, key, "cpu", storage.numel if typed else storage.nbytes))
        stride = contiguous_stride(tensor.shape)
        args = (record, tensor.offset, tuple(tensor.shape), stride, False, OrderedDict[str, object]())
        if typed:
            self.write_call("torch._utils", "_rebuild_tensor_v2", args)
        else:
            self.write_call("torch._utils", "_rebuild_tensor_v3", (*args, DtypeRef(storage.dtype)))


#: By exact type: a subclass may carry more than its value, which would be lost.
_WRITERS: Mapping[type, Callable[[_Pickler, Any], None]] = {
    type(None): lambda p, _: p.out.extend(pickle.NONE),
    bool: lambda p, value: p.out.extend(pickle.NEWTRUE if value else pickle.NEWFALSE),
    int: lambda p, value: p.out.extend(_int_instruction(value)),
    float: lambda p, value: p.out.extend(pickle.BINFLOAT + struct.pack(">d", value)),
    str: _Pickler.write_memoized,
    tuple: _Pickler.write_tuple,
    list: _Pickler.write_list,
    dict: _Pickler.write_dict,
    OrderedDict: _Pickler.write_ordered_dict,
    TorchSize: lambda p, value: p.write_call("torch", "Size", (tuple(value),)),
    DtypeRef: lambda p, value: p.write_memoized(GlobalRef(module="torch", name=str(value))),
    GlobalRef: _Pickler.write_memoized,
    TensorRef: _Pickler.write_tensor,
    PickledObject: _Pickler.write_object,
    _PersistentId: _Pickler.write_persistent_id,
}


def _int_instruction(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return pickle.BININT1 + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return pickle.BININT2 + struct.pack("<H", value)
    if -1 << 31 <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    bits = value.bit_length() if value >= 0 else (~value).bit_length()  # without the sign
    encoded = value.to_bytes(bits // 8 + 1, "little", signed=True)
    if len(encoded) > 255:
        raise ValueError(f"torch.load reads integers of at most 255 bytes, not {len(encoded)}")
    return pickle.LONG1 + struct.pack("<B", len(encoded)) + encoded


def _indexed(short: bytes, long: bytes, index: int) -> bytes:
    return short + struct.pack("<B", index) if index < 1 << 8 else long + struct.pack("<I", index)
