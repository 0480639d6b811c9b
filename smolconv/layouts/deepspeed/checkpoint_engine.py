"""Loads and saves DeepSpeed's files in smolconv's processes, by an allow-list for pickles and with digests.

DeepSpeed's own checkpoint engine calls ``torch.load(weights_only=False)``, which runs any code in a file. smolconv
replaces the ``checkpoint_engine`` of an engine before it loads. ``read_torch_archive`` then reads the files; it also
checked them before, so both see the same bytes. torch's own unpickler is not used.
"""

from __future__ import annotations

import copy
import mmap
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolconv.errors import CorruptFile
from smolconv.files import open_file, reading
from smolconv.layouts.deepspeed.documents import STAND_INS
from smolconv.storage.integrity import digest_text, new_hasher
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.storage.torch_archive.values import ArchiveTensor, DtypeRef, TorchSize
from smolconv.tensors.dtypes import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """The digest and size of a complete file when it was written."""

    nbytes: int
    digest: str  #: "xxh3-128:..."


class CheckpointEngine:
    """Replaces a DeepSpeed engine's ``checkpoint_engine``, and passes everything else on to the original."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def load(self, path: str, map_location: object = None) -> Any:
        """The file's content, on the CPU: DeepSpeed asks for no other device. Raises as ``read_torch_archive`` does."""
        return load_torch_archive(Path(path), deepspeed_classes())

    def save(self, state_dict: Any, path: str) -> FileDigest:
        return save_torch_archive(state_dict, Path(path))


def deepspeed_classes() -> Mapping[tuple[str, str], Callable[..., object]]:
    """The allow-list of classes in DeepSpeed's files besides tensors, and their replacements."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    scaler = "deepspeed.runtime.fp16.loss_scaler"
    # A ZeRO stage is compared as a number. An enum's members are the process's own, whose state no file may set.
    made: dict[tuple[str, str], Callable[..., object]] = {
        (scaler, "LossScaler"): _maker(LossScaler),
        (scaler, "DynamicLossScaler"): _maker(DynamicLossScaler),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
    }
    return {**STAND_INS, **made}


def _maker(cls: type) -> Callable[..., object]:
    def make(*args: object) -> object:
        return cls(*args) if args else object.__new__(cls)  # pickle's way: the state follows

    return make


def load_torch_archive(path: Path, allow: Mapping[tuple[str, str], Callable[..., object]] | None = None) -> Any:
    """The object that ``torch.save`` wrote, its tensors on the CPU. Tensors that shared a storage share it again.

    It imports and calls only what ``allow`` names. Raises as ``read_torch_archive`` does.
    """
    document = read_torch_archive(path, allow=allow or {})
    return _with_tensors(document, _read_tensors(path, list(_tensors(document, set()))), {})


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    if hasattr(value, "__dict__"):
        yield from vars(value).values()


def _tensors(value: object, seen: set[int]) -> Iterator[ArchiveTensor]:
    if isinstance(value, ArchiveTensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for part in _parts(value):
            yield from _tensors(part, seen)


def _read_tensors(path: Path, found: list[ArchiveTensor]) -> dict[int, torch.Tensor]:
    """Tensors by the ``id`` of their placeholder; each storage is read once, as far as its tensors reach."""
    import torch

    spans: dict[str, tuple[int, int]] = {}
    for tensor in found:
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride)) if tensor.nbytes else -1
        start, stop = tensor.offset, tensor.offset + (last + 1) * DTYPE_BYTES[tensor.dtype]
        known = spans.get(tensor.storage)
        if tensor.nbytes:
            spans[tensor.storage] = (start, stop) if known is None else (min(start, known[0]), max(stop, known[1]))
    storages: dict[str, torch.Tensor] = {}
    with reading(path), open(open_file(path), "rb") as file:
        for key, (start, stop) in spans.items():
            data = torch.empty(stop - start, dtype=torch.uint8)
            file.seek(start)
            if file.readinto(memoryview(data.numpy())) != stop - start:
                raise CorruptFile(f"{path}: ends within a tensor. It was replaced while it was read: start again.")
            storages[key] = data
    made: dict[int, torch.Tensor] = {}
    for tensor in found:
        dtype = getattr(torch, tensor.dtype)
        if not tensor.nbytes:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=dtype)
            continue
        first, odd = divmod(tensor.offset - spans[tensor.storage][0], DTYPE_BYTES[tensor.dtype])
        if odd:
            raise CorruptFile(f"{path}: tensors of storage {tensor.storage} are not aligned to their elements.")
        whole = torch.empty(0, dtype=dtype)
        made[id(tensor)] = whole.set_(storages[tensor.storage].untyped_storage(), first, tensor.shape, tensor.stride)
    return made


def _with_tensors(value: Any, tensors: Mapping[int, torch.Tensor], done: dict[int, Any]) -> Any:
    """``value`` with torch's own objects; containers are filled in place, so shared objects stay shared."""
    import torch

    if isinstance(value, ArchiveTensor):
        return tensors[id(value)]
    if isinstance(value, DtypeRef):
        return getattr(torch, value)
    if isinstance(value, TorchSize):
        return torch.Size(value)
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, tuple):
        done[id(value)] = made = tuple(_with_tensors(part, tensors, done) for part in value)
        return made
    done[id(value)] = value
    if isinstance(value, dict):
        value.update({key: _with_tensors(part, tensors, done) for key, part in value.items()})
    elif isinstance(value, list):
        value[:] = [_with_tensors(part, tensors, done) for part in value]
    if hasattr(value, "__dict__"):
        vars(value).update({name: _with_tensors(part, tensors, done) for name, part in vars(value).items()})
    return value


class _HashedFile:
    """A file that is written sequentially, and computes the digest of its content."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.hasher, self.nbytes = new_hasher("xxh3"), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Torch's writer, in C++, crashes on an exception: the error is kept, and the rest of the data is discarded."""
        view = memoryview(data).cast("B")
        self.hasher.update(view)
        self.nbytes += len(view)
        rest = view
        while len(rest) and self.error is None:
            try:
                rest = rest[self.file.write(rest) :]
            except OSError as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        pass  # nothing is buffered

    def finish(self) -> FileDigest:
        if self.error is not None:
            raise self.error
        os.fsync(self.file.fileno())
        return FileDigest(nbytes=self.nbytes, digest=str(digest_text(self.hasher)))


def save_torch_archive(content: Any, path: Path) -> FileDigest:
    """``torch.save`` onto the disk, with the digest of the bytes that were passed to the file."""
    import torch

    file = _HashedFile(path)
    try:
        torch.save(content, file)
        return file.finish()
    finally:
        file.file.close()


class HostMemory:
    """Memory for copies of a save's tensors, so that training may change them while the copies are written.

    It is kept between saves: getting gigabytes from the kernel takes as long as copying them.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._used: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []

    def reuse(self) -> None:
        """Release all copies, once the last ones are on the disk."""
        self._free, self._used = self._free + self._used, []

    def snapshot(self, content: Any) -> Any:
        """A copy that ``torch.save`` writes like ``content``; other threads may then change ``content``.

        Every storage is copied once and whole, the way it is saved, so tensors that share one still share it.
        """
        import torch

        tensors = list(_torch_tensors(content, set()))
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = self._copied(storage)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        copies: dict[int, Any] = {}  # by the id of the original, as deepcopy looks them up
        for tensor in tensors:
            view = torch.empty(0, dtype=tensor.dtype)
            view.set_(storages[tensor.untyped_storage()._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
            parameter = isinstance(tensor, torch.nn.Parameter)
            copies[id(tensor)] = (
                torch.nn.Parameter(view, tensor.requires_grad)
                if parameter
                else view.requires_grad_(tensor.requires_grad)
            )
        made = dict(copies)
        for tensor in tensors:
            vars(made[id(tensor)]).update(copy.deepcopy(vars(tensor), copies))
        return copy.deepcopy(content, copies)

    def _copied(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        import torch

        size = storage.nbytes()
        if not size:
            return torch.UntypedStorage(0)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        place = self._taken(size, pinned=whole.is_cuda)
        place.copy_(whole, non_blocking=True)
        return place.untyped_storage()

    def _taken(self, size: int, *, pinned: bool) -> torch.Tensor:
        for index, place in enumerate(self._free):
            if place.numel() == size:
                del self._free[index]
                break
        else:
            place = self._new(size, pinned=pinned)
        self._used.append(place)
        return place

    def _new(self, size: int, *, pinned: bool) -> torch.Tensor:
        import torch

        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        place = torch.frombuffer(pages, dtype=torch.uint8)
        # torch's own pinned memory is rounded up to a power of two. Where it cannot be pinned, copying takes longer.
        if pinned and int(torch.cuda.cudart().cudaHostRegister(place.data_ptr(), size, 0)) == 0:
            self._pinned.append(place)
        return place

    def close(self) -> None:
        """Give the memory back."""
        import torch

        for place in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(place.data_ptr())
        self._free, self._used, self._pinned = [], [], []


def _torch_tensors(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that is saved with ``value``, once."""
    import torch

    atomic = isinstance(value, (str, int, float, type, types.FunctionType, types.ModuleType, Enum))
    if atomic or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    for part in _parts(value):
        yield from _torch_tensors(part, seen)


def digest_file(path: Path) -> FileDigest:
    """The same for a file on disk."""
    hasher, nbytes, chunk = new_hasher("xxh3"), 0, memoryview(bytearray(_CHUNK_BYTES))
    with reading(path), open(open_file(path), "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            hasher.update(chunk[:count])
            nbytes += count
    return FileDigest(nbytes=nbytes, digest=str(digest_text(hasher)))
