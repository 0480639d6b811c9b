"""Maps stored parameter names to canonical ones, for a module saved in a wrapper or without its head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from smolconv.models.spec import VOCABULARY

T = TypeVar("T")

_EMBEDDING, HEAD = VOCABULARY
#: Name suffixes of two parameters that every model has exactly once. One may be missing (frozen).
_ENDS = ("norm.weight", "embed_tokens.weight")
_MODEL = "model."


@dataclass(frozen=True, kw_only=True)
class StoredNames:
    """The prefix of all names in a file, and whether they belong to the model without its head."""

    wrapper: str = ""  #: prefix of a module around the model: ``module.``, ``_orig_mod.``, ``base_model.model.``
    bare: bool = False  #: saved by a class like ``LlamaModel``, whose parameter names lack ``model.``

    @property
    def warnings(self) -> tuple[str, ...]:
        """A note on the wrapper's prefix. A bare model's missing ``model.`` is not worth a note."""
        if not self.wrapper:
            return ()
        return (f"parameters are named {self.wrapper}{'' if self.bare else 'model'}...: the prefix was removed.",)

    def canonical(self, name: str) -> str:
        """The canonical name. A name without the wrapper's prefix is unchanged; the accounting of names reports it."""
        if not name.startswith(self.wrapper):
            return name
        name = name.removeprefix(self.wrapper)
        return _MODEL + name if self.bare and name != HEAD else name

    def stored(self, name: str) -> str:
        """The stored name of a canonical one."""
        return self.wrapper + (name.removeprefix(_MODEL) if self.bare else name)

    def by_canonical(self, found: Mapping[str, T]) -> dict[str, T]:
        """The values by canonical names; unchanged if two names would collide."""
        renamed = {self.canonical(name): value for name, value in found.items()}
        return renamed if len(renamed) == len(found) else dict(found)


def stored_names(names: Iterable[str]) -> StoredNames:
    """Detect from all names of a checkpoint how its parameters were named."""
    stems = [name.removesuffix(end) for name in names for end in _ENDS if name == end or name.endswith(f".{end}")]
    if not stems:
        return StoredNames()
    stem = min(stems, key=len)
    bare = stem != _MODEL and not stem.endswith(f".{_MODEL}")
    return StoredNames(wrapper=stem if bare else stem.removesuffix(_MODEL), bare=bare)


def with_tied_embedding(found: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a tied model that may be stored under the head's name alone, which transformers also loads."""
    if HEAD not in found or _EMBEDDING in found:
        return dict(found)
    return {_EMBEDDING if name == HEAD else name: value for name, value in found.items()}
