"""Reads the pickle of an archive by a closed list: an ``ArchiveTensor`` for every tensor, and plain containers."""

from __future__ import annotations

import itertools
import math
import pickle
import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # what pickle.Unpickler itself uses
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, Protocol, TypeGuard

from smolconv.errors import CorruptFile, SmolconvError, UnsafePickle
from smolconv.storage.torch_archive.records import Archive, shown
from smolconv.storage.torch_archive.values import (
    STORAGE_DTYPES,
    ArchiveStorage,
    ArchiveTensor,
    DtypeRef,
    GlobalRef,
    Opaque,
    TorchSize,
)
from smolconv.tensors.dtypes import DTYPE_BYTES

#: The dtypes that may be saved as values, of which tensors may have those in DTYPE_BYTES.
_DTYPE_NAMES = {
    *DTYPE_BYTES,
    *("complex32", "complex64", "complex128"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
}

_UNTYPED_STORAGES = {("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")}
_TENSOR_CLASSES = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter")}
_NAMED_ONLY = _UNTYPED_STORAGES | _TENSOR_CLASSES | {("torch", name) for name in STORAGE_DTYPES}

_MAX_DIMENSIONS = 64
MAX_COUNT = 1 << 63
_MAX_INTEGER_BYTES = 255  # as torch.load
#: Levels of containers, and values once each is written out as often as it is contained: what is walked has an end.
_MAX_LEVELS, _MAX_VALUES = 64, 1 << 22


class Container(Protocol):
    """The file that holds a pickle, with the storages of its tensors."""

    @property
    def path(self) -> Path: ...
    @property
    def pickle_name(self) -> str: ...
    @property
    def after_count(self) -> tuple[None, ...]:
        """What ends the name of a storage, after the number of its elements."""
        ...

    def locate(self, record: str) -> tuple[int, int] | None: ...
    def damaged(self, found: str, expected: str, advice: str = ...) -> CorruptFile: ...


def unpickle(
    archive: Archive, allow: Mapping[tuple[str, str], Callable[..., object]], plain_keys: Collection[str] | None
) -> object:
    """The object that an archive's data.pkl describes. Parameters and errors are those of ``read_torch_archive``."""
    return unpickle_at(archive, archive.read_pickle(), 0, allow, plain_keys)[0]


def unpickle_at(
    container: Container,
    pickled: bytes,
    start: int,
    allow: Mapping[tuple[str, str], Callable[..., object]] = MappingProxyType({}),
    plain_keys: Collection[str] | None = None,
) -> tuple[object, int, Mapping[str, set[int]]]:
    """The object of the pickle that begins at ``start``, where it ends, and the storages' bytes per element, by key."""
    unpickler = _Unpickler(container, pickled, start, allow, plain_keys)
    return unpickler.load(), unpickler.position, unpickler.item_bytes


class _Unpickler:
    """Runs the instructions of one data.pkl, for the length of one ``load``.

    It is not a ``pickle.Unpickler``: that one has instructions which call, build and set attributes as they please,
    reserves memory for any memo index, and raises many kinds of exceptions. This one has only the instructions that
    torch.save writes, imports nothing, and never recurses. It calls only functions in ``_BUILDERS`` or ``allow``.
    """

    def __init__(
        self,
        archive: Container,
        pickled: bytes,
        start: int,
        allow: Mapping[tuple[str, str], Callable[..., object]],
        plain_keys: Collection[str] | None,
    ) -> None:
        self.archive = archive
        self.pickled = pickled
        self.allow = allow
        self.plain_keys = plain_keys
        self.has_opaque = False
        self.looked_at = 0  # values, in the search for opaque ones
        self.item_bytes: dict[str, set[int]] = {}
        self.protocol = 0
        self.position = start
        self.stack: list[object] = []
        self.marked: list[list[object]] = []  # the stacks beneath each MARK
        self.memo: dict[int, object] = {}
        self.foreign: dict[int, object] = {}  # by id: what ``allow`` returned, which alone may be given any state

    def load(self) -> object:
        try:
            while (opcode := self.take(1)) != pickle.STOP:
                instruction = _INSTRUCTIONS.get(opcode)
                if instruction is None:
                    self.refuse_instruction(opcode)
                instruction(self)
            result = self.stack.pop()
        except (LookupError, UnicodeDecodeError) as error:  # an empty stack, an unknown memo index, a bad string
            raise self.damaged("is not a valid pickle") from error
        if self.stack or self.marked:
            raise self.damaged("ends before its object is complete")
        self.written_out(result, {})
        if self.has_opaque:
            self.refuse_misplaced(result)
        return result

    def written_out(self, value: object, sizes: dict[int, int | None], level: int = 0) -> int:
        """How many values it is, each counted as often as it is contained. ``sizes`` are those of containers, by id.

        Raises ``CorruptFile`` for containers that hold themselves, are too deep, or contain each other too often.
        """
        if level > _MAX_LEVELS or sizes.get(id(value), 1) is None:
            raise self.damaged("has a container that holds itself, or is more than 64 deep")
        parts = _parts(value)
        if parts is None:
            return 1
        known = sizes.get(id(value))
        if known is None:
            sizes[id(value)] = None  # while it is open
            known = 1 + sum(self.written_out(part, sizes, level + 1) for part in parts)
            if known > _MAX_VALUES:
                raise self.damaged(f"repeats its values so often that they are {known:,}")
            sizes[id(value)] = known
        return known

    # Failures

    def damaged(self, found: str) -> CorruptFile:
        where = f"{self.archive.pickle_name} {found} (near its byte {self.position})"
        return self.archive.damaged(where, "Expected a pickle written by torch.save.")

    def refuse(self, asked: str) -> NoReturn:
        raise UnsafePickle(
            f"{self.archive.path}: {self.archive.pickle_name} asks for {shown(asked)}, which is not on the list of "
            "what a checkpoint may contain. Nothing was executed.\n"
            "Expected tensors, parameters, dtypes, sizes and plain Python containers.\n"
            "If you know where the file comes from, load it with torch in a safe place and save only the tensors again."
        )

    def unlisted(self, asked: str) -> Opaque:
        """A placeholder for an object that is not on the list; its final position decides whether it is allowed.

        Calls of it or with it, and its state and items, become such placeholders as well.
        """
        if self.plain_keys is None:
            self.refuse(asked)
        self.has_opaque = True
        return Opaque(asked=asked)

    def beyond(self, found: str) -> Opaque:
        """A placeholder for a plain value that torch.save writes, but no checkpoint needs."""
        if self.plain_keys is None:
            raise self.damaged(f"has {found}")
        return self.unlisted(found)

    def refuse_misplaced(self, result: object) -> None:
        """Raise ``UnsafePickle`` for a placeholder that is not below a key that may hold one."""
        places = [result]
        if isinstance(result, dict):
            own = [value for key, value in result.items() if key in (self.plain_keys or ())]
            places = [*own, *result, *(vars(result).values() if hasattr(result, "__dict__") else ())]
        if (found := self.opaque_within(places)) is not None:
            self.refuse(found.asked)

    def opaque_within(self, values: Iterable[object]) -> Opaque | None:
        """Any in these values, however deep; they may hold themselves."""
        waiting, seen = list(values), set[int]()
        while waiting:
            value = waiting.pop()
            if isinstance(value, Opaque):
                return value
            parts = None if id(value) in seen else _parts(value)
            if parts is not None:
                seen.add(id(value))
                waiting.extend(parts)
            self.looked_at += 1
            if self.looked_at > _MAX_VALUES:
                raise self.damaged(f"repeats its values so often that they are more than {_MAX_VALUES:,}")
        return None

    def refuse_instruction(self, opcode: bytes) -> NoReturn:
        names = {known.code: known.name for known in pickletools.opcodes}
        name = names.get(opcode.decode("latin-1"))
        if name is None:
            raise self.damaged(f"has the byte {opcode.hex()} where an instruction should be")
        self.refuse(f"the pickle instruction {name}")

    # Parts of instructions

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.pickled):
            raise self.damaged("is cut short")
        taken = self.pickled[self.position : end]
        self.position = end
        return taken

    def take_int(self, nbytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def take_line(self) -> str:
        end = self.pickled.find(b"\n", self.position)
        if end < 0:
            raise self.damaged("is cut short")
        line = self.take(end - self.position)
        self.position += 1
        return line.decode("utf-8")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[object]:
        above = self.stack
        self.stack = self.marked.pop()
        return above

    # Instructions

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def text(self, length_bytes: int) -> None:
        taken = self.take(self.take_int(length_bytes))
        try:
            self.push(taken.decode())
        except UnicodeDecodeError:
            taken.decode("utf-8", "surrogatepass")  # as pickle writes the name of a file that is not Unicode
            self.push(self.beyond("text that is not Unicode"))

    def long(self, length_bytes: int) -> None:
        nbytes = self.take_int(length_bytes)
        if nbytes > _MAX_INTEGER_BYTES:
            self.take(nbytes)
            self.push(self.beyond(f"an integer of {nbytes} bytes"))
        else:
            self.push(self.take_int(nbytes, signed=True))

    def set_protocol(self) -> None:
        self.protocol = self.take_int(1)
        if self.protocol > 5:
            raise self.damaged(f"has protocol {self.protocol}")

    def pack_last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            return
        if not isinstance(target, list):
            raise self.damaged(f"appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise self.damaged(f"sets {len(items)} keys and values of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if _is_plain_key(key) else self.beyond(f"a {type(key).__name__} as a key")] = value

    def set_last_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.damaged("names a global by something other than text")
        if self.protocol < 3:  # written with Python 2's names
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        # Compared whole, never split at dots and never looked up: "OrderedDict.__init__" is just an unknown name.
        asked = (module, name)
        if module == "torch" and name in _DTYPE_NAMES:
            self.push(DtypeRef(name))
        elif asked in _BUILDERS or asked in _NAMED_ONLY or asked in self.allow:
            self.push(GlobalRef(module=module, name=name))
        else:
            self.push(self.unlisted(f"{module}.{name}"))

    def find_global_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.find_global(module, name)

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, (GlobalRef, Opaque)) or not isinstance(args, tuple):
            raise self.damaged(f"calls a {type(function).__name__} with a {type(args).__name__}")
        self.push(self.called(function, args, _BUILDERS))

    def new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, (GlobalRef, Opaque)) or not isinstance(args, tuple):
            raise self.damaged(f"creates a {type(cls).__name__} from a {type(args).__name__}")
        self.push(self.called(cls, args, {}))

    def called(
        self, function: GlobalRef | Opaque, args: tuple[object, ...], builders: Mapping[tuple[str, str], _Builder]
    ) -> object:
        if isinstance(function, Opaque):
            return function
        if self.has_opaque and (unlisted := self.opaque_within(args)) is not None:
            return unlisted
        builder = builders.get((function.module, function.name))
        return builder(self, args) if builder else self.call_allowed(function, args)

    def call_allowed(self, function: GlobalRef, args: tuple[object, ...]) -> object:
        substitute = self.allow.get((function.module, function.name))
        if substitute is None:
            return self.unlisted(f"a call of {function.module}.{function.name}")
        made = self.substituted(lambda: substitute(*args), f"{function.module}.{function.name}")
        if isinstance(made, Opaque):
            return self.unlisted(made.asked)
        self.foreign[id(made)] = made
        return made

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Opaque):
            return
        if type(target) is OrderedDict:
            # A state_dict keeps the versions of its modules in an attribute, _metadata. None may hide a method.
            if not _is_state(state) or any(hasattr(OrderedDict, name) for name in state):
                self.refuse("attributes of an OrderedDict that hide its own")
            vars(target).update(state)
        elif id(target) not in self.foreign:
            self.refuse(f"setting the state of a {type(target).__name__}")
        elif (set_state := getattr(type(target), "__setstate__", None)) is not None:
            self.substituted(lambda: set_state(target, state), f"{type(target).__name__}.__setstate__")
        elif _is_state(state) and hasattr(target, "__dict__"):
            vars(target).update(state)
        else:
            raise self.damaged(f"sets the state of a {type(target).__name__} to a {type(state).__name__}")

    def substituted(self, call: Callable[[], object], name: str) -> object:
        try:
            return call()
        except SmolconvError:
            raise
        except Exception as error:  # our callers' classes cannot foresee what a damaged pickle gives them
            raise self.damaged(f"gives {shown(name)} what it cannot take ({shown(str(error))})") from error

    def find_storage(self) -> None:
        match self.stack.pop():
            case ("storage", Opaque() as unlisted, str(), str(), int(), *_):
                self.push(unlisted)
                return
            case ("storage", GlobalRef(module=module, name=name), str(key), str(), int(numel), *rest) if (
                _is_count(numel) and tuple(rest) == self.archive.after_count
            ):
                pass  # the fourth is the device it was on
            case _:
                raise self.damaged("names a storage by something other than (class, key, device, count)")
        dtype = STORAGE_DTYPES.get(name) if module == "torch" else None
        if dtype is None and (module, name) not in _UNTYPED_STORAGES:
            self.push(self.unlisted(f"a storage of class {module}.{name}"))
            return
        self.item_bytes.setdefault(key, set()).add(DTYPE_BYTES[dtype] if dtype else 1)
        place = self.archive.locate(f"data/{key}")
        if place is None:
            raise self.damaged(f"refers to the record data/{shown(key)}, which is missing")
        offset, record_bytes = place
        nbytes = numel * (DTYPE_BYTES[dtype] if dtype else 1)
        if nbytes > record_bytes:
            raise self.damaged(f"gives storage {shown(key)} {nbytes} bytes, but its record has {record_bytes}")
        self.push(ArchiveStorage(key=key, dtype=dtype, offset=offset, nbytes=nbytes))

    # What may be called

    def ordered_dict(self, args: tuple[object, ...]) -> object:
        if args:
            raise self.damaged("fills an OrderedDict in its constructor")
        return OrderedDict()

    def size(self, args: tuple[object, ...]) -> object:
        match args:
            case (tuple(sizes),):
                return TorchSize(self.counts(sizes))
        raise self.damaged("has a torch.Size of something other than a tuple")

    def a_set(self, args: tuple[object, ...], made: type[set[object] | frozenset[object]] = set) -> object:
        match args:
            case (list(items),) if all(map(_is_plain_key, items)):
                return made(items)
        return self.beyond("a set of something other than plain values")

    def a_frozenset(self, args: tuple[object, ...]) -> object:
        return self.a_set(args, frozenset)

    def tensor(self, args: tuple[object, ...]) -> object:
        # _rebuild_tensor: (storage, offset, shape, stride); _v2 has also (requires_grad, hooks[, metadata])
        match args:
            case (ArchiveStorage(dtype=str(dtype)) as storage, offset, shape, stride):
                return self.place_tensor(storage, dtype, (offset, shape, stride), [])
            case (ArchiveStorage(dtype=str(dtype)) as storage, offset, shape, stride, _, _, *metadata):
                return self.place_tensor(storage, dtype, (offset, shape, stride), metadata)
        raise self.damaged("describes a tensor by other things than storage, offset, shape and stride")

    def tensor_with_dtype(self, args: tuple[object, ...]) -> object:
        # _rebuild_tensor_v3: (storage, offset, shape, stride, requires_grad, hooks, dtype[, metadata])
        match args:
            case (ArchiveStorage() as storage, offset, shape, stride, _, _, DtypeRef() as dtype, *metadata):
                return self.place_tensor(storage, str(dtype), (offset, shape, stride), metadata)
        raise self.damaged("describes a tensor by other things than storage, offset, shape, stride and dtype")

    def parameter(self, args: tuple[object, ...]) -> object:
        # _rebuild_parameter: (tensor, requires_grad, hooks); _with_state has also the Python attributes
        match args:
            case (ArchiveTensor() as tensor, _, _) | (ArchiveTensor() as tensor, _, _, _):
                return tensor
        raise self.damaged("has a parameter made of something other than a tensor")

    def tensor_with_attributes(self, args: tuple[object, ...]) -> object:
        # _rebuild_from_type_v2: (function, class, its arguments, the Python attributes), which are dropped. Called for
        # plain tensors that somebody set attributes on; DeepSpeed does. Subclasses may reinterpret the data: refused.
        match args:
            case (GlobalRef() as function, GlobalRef() as cls, tuple(arguments), _):
                builder = _TENSOR_BUILDERS.get((function.module, function.name))
                if builder is not None and (cls.module, cls.name) in _TENSOR_CLASSES:
                    return builder(self, arguments)
                return self.unlisted(f"a {cls.module}.{cls.name} made by {function.module}.{function.name}")
        raise self.damaged("describes a tensor with attributes by something else")

    def place_tensor(
        self, storage: ArchiveStorage, dtype: str, view: tuple[object, object, object], metadata: list[object]
    ) -> ArchiveTensor:
        offset, sizes, steps = view[0], self.counts(view[1]), self.counts(view[2])
        if not _is_count(offset) or len(sizes) != len(steps) or math.prod(sizes) >= MAX_COUNT:
            raise self.damaged(f"gives a tensor of storage {shown(storage.key)} an impossible shape, stride or offset")
        if any(metadata) or dtype not in DTYPE_BYTES:
            # The metadata marks the elements for negation or conjugation.
            raise self.archive.damaged(
                f"a tensor of storage {shown(storage.key)} is {dtype}"
                + (" and marked for negation or conjugation" if any(metadata) else ""),
                f"Plain tensors of {', '.join(DTYPE_BYTES)} can be read.",
                "Convert it with torch and save the file again.",
            )
        item_bytes = DTYPE_BYTES[dtype]
        if 0 in sizes:
            first = 0  # of no elements, which torch lets point anywhere
        else:
            first = offset * item_bytes
            last = first + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) * item_bytes
            if last + item_bytes > storage.nbytes:
                raise self.damaged(
                    f"places a tensor at bytes {first} to {last + item_bytes} of storage {shown(storage.key)}, "
                    f"which has {storage.nbytes}"
                )
        return ArchiveTensor(
            path=self.archive.path,
            dtype=dtype,
            shape=sizes,
            stride=steps,
            offset=storage.offset + first,
            storage=storage.key,
        )

    def counts(self, values: object) -> tuple[int, ...]:
        if isinstance(values, tuple) and len(values) <= _MAX_DIMENSIONS:
            counts = tuple(value for value in values if _is_count(value))
            if len(counts) == len(values):
                return counts
        raise self.damaged("has a shape or stride that is not a short tuple of counts")


_Builder = Callable[[_Unpickler, tuple[object, ...]], object]

_TENSOR_BUILDERS: Mapping[tuple[str, str], _Builder] = {
    ("torch._utils", "_rebuild_tensor"): _Unpickler.tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Unpickler.tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _Unpickler.tensor_with_dtype,
}

#: Everything that a pickle may call, with the function that is called instead.
_BUILDERS: Mapping[tuple[str, str], _Builder] = {
    **_TENSOR_BUILDERS,
    ("torch._utils", "_rebuild_parameter"): _Unpickler.parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Unpickler.parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _Unpickler.tensor_with_attributes,
    ("torch", "Size"): _Unpickler.size,
    ("collections", "OrderedDict"): _Unpickler.ordered_dict,
    ("builtins", "set"): _Unpickler.a_set,
    ("builtins", "frozenset"): _Unpickler.a_frozenset,
}

#: The instructions that torch.save writes by default (protocol 2), and their equivalents in protocols 3 to 5.
_INSTRUCTIONS: Mapping[bytes, Callable[[_Unpickler], object]] = {
    pickle.PROTO: _Unpickler.set_protocol,
    pickle.FRAME: lambda u: u.take(8),
    pickle.MARK: _Unpickler.mark,
    pickle.NONE: lambda u: u.push(None),
    pickle.NEWTRUE: lambda u: u.push(True),
    pickle.NEWFALSE: lambda u: u.push(False),
    pickle.BININT: lambda u: u.push(u.take_int(4, signed=True)),
    pickle.BININT1: lambda u: u.push(u.take_int(1)),
    pickle.BININT2: lambda u: u.push(u.take_int(2)),
    pickle.LONG1: lambda u: u.long(1),
    pickle.LONG4: lambda u: u.long(4),
    pickle.BINFLOAT: lambda u: u.push(struct.unpack(">d", u.take(8))[0]),
    pickle.BINUNICODE: lambda u: u.text(4),
    pickle.SHORT_BINUNICODE: lambda u: u.text(1),
    pickle.BINUNICODE8: lambda u: u.text(8),
    pickle.BINBYTES: lambda u: u.push(u.take(u.take_int(4))),
    pickle.SHORT_BINBYTES: lambda u: u.push(u.take(u.take_int(1))),
    pickle.BINBYTES8: lambda u: u.push(u.take(u.take_int(8))),
    pickle.EMPTY_TUPLE: lambda u: u.push(()),
    pickle.TUPLE1: lambda u: u.pack_last(1),
    pickle.TUPLE2: lambda u: u.pack_last(2),
    pickle.TUPLE3: lambda u: u.pack_last(3),
    pickle.TUPLE: lambda u: u.push(tuple(u.pop_to_mark())),
    pickle.EMPTY_LIST: lambda u: u.push([]),
    pickle.APPEND: lambda u: u.append([u.stack.pop()]),
    pickle.APPENDS: lambda u: u.append(u.pop_to_mark()),
    pickle.EMPTY_DICT: lambda u: u.push({}),
    pickle.SETITEM: _Unpickler.set_last_item,
    pickle.SETITEMS: lambda u: u.set_items(u.pop_to_mark()),
    pickle.BINPUT: lambda u: u.remember(u.take_int(1)),
    pickle.LONG_BINPUT: lambda u: u.remember(u.take_int(4)),
    pickle.MEMOIZE: lambda u: u.remember(len(u.memo)),
    pickle.BINGET: lambda u: u.push(u.memo[u.take_int(1)]),
    pickle.LONG_BINGET: lambda u: u.push(u.memo[u.take_int(4)]),
    pickle.GLOBAL: lambda u: u.find_global(u.take_line(), u.take_line()),
    pickle.STACK_GLOBAL: _Unpickler.find_global_on_stack,
    pickle.REDUCE: _Unpickler.reduce,
    pickle.NEWOBJ: _Unpickler.new_object,
    pickle.BUILD: _Unpickler.build,
    pickle.BINPERSID: _Unpickler.find_storage,
}


def _parts(value: object) -> Iterator[object] | None:
    """What a container holds; None for anything else."""
    if isinstance(value, dict):
        return itertools.chain(value, value.values(), vars(value).values() if hasattr(value, "__dict__") else ())
    if isinstance(value, (list, tuple, set, frozenset)):
        return iter(value)
    is_ours = isinstance(value, (ArchiveTensor, ArchiveStorage, GlobalRef))  # no such thing holds another
    return iter(vars(value).values()) if hasattr(value, "__dict__") and not is_ours else None


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MAX_COUNT


def _is_state(value: object) -> TypeGuard[dict[str, object]]:
    return type(value) is dict and all(type(name) is str for name in value)


def _is_plain_key(value: object) -> bool:
    # Tuples within tuples are refused because Python hashes them recursively, each as often as it is contained.
    plain = (str, int, float, bytes, type(None), Opaque)
    return isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value))
