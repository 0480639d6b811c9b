"""What a conversion wrote, as the safetensors library and torch read it: smolconv is not asked."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

#: By file and name: dtype, shape, digest of the bytes.
Tensors = dict[str, tuple[str, tuple[int, ...], str]]
#: Folders of documents that are carried as they are, whatever their names.
_DOCUMENTS = frozenset({"smolconv_source", "smolconv_assets", "source"})


class _StandIn:
    """Any object of a class that holds no tensors."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _Careful:
    """A pickle module for ``torch.load`` that imports nothing but torch's own parts."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            known = module in ("torch", "torch._utils", "torch.storage") or (module, name) == (
                "collections",
                "OrderedDict",
            )
            return super().find_class(module, name) if known and name not in ("load", "eval", "exec") else _StandIn

    load = staticmethod(pickle.load)


def tensors_below(folder: Path) -> Tensors:
    """Every tensor of a folder's safetensors files and torch archives."""
    found: Tensors = {}
    for path in sorted(folder.rglob("*")):
        where = str(path.relative_to(folder))
        if _DOCUMENTS.intersection(path.relative_to(folder).parts):
            continue
        if path.suffix == ".safetensors":
            found |= safetensors_of(path, where)
        elif path.suffix in (".pt", ".bin"):
            import torch

            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Careful)
            _collect(content, where, found)
    return found


def safetensors_of(path: Path, where: str = "") -> Tensors:
    """Raises ``safetensors.SafetensorError``."""
    from safetensors import deserialize

    return {
        f"{where}:{name}": (one["dtype"], tuple(one["shape"]), _digest(one["data"]))
        for name, one in deserialize(path.read_bytes())
    }


def _collect(value: Any, where: str, found: Tensors) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        plain = value.detach().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        found[where] = (str(plain.dtype), tuple(plain.shape), _digest(data))
    elif isinstance(value, dict):
        for key, below in value.items():
            _collect(below, f"{where}:{key}", found)
    elif isinstance(value, (list, tuple)):
        for index, below in enumerate(value):
            _collect(below, f"{where}:{index}", found)


def _digest(data: bytes | bytearray) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()
