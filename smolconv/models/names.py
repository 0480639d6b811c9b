"""Canonical names from those that a module was saved under: inside a wrapper, or without the model around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from smolconv.models.spec import VOCABULARY

T = TypeVar("T")

_EMBEDDING, HEAD = VOCABULARY
#: How the names of two parameters end that every model has, and no other parameter. One may be left out (frozen).
_ENDS = ("norm.weight", "embed_tokens.weight")
_MODEL = "model."


@dataclass(frozen=True, kw_only=True)
class StoredNames:
    """What stands before all names of a file, and whether they are those of the model without its head."""

    wrapper: str = ""  #: of a module around the model: ``module.``, ``_orig_mod.``, ``base_model.model.``
    bare: bool = False  #: saved by ``LlamaModel`` and its like, whose parameters are named without ``model.``

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is said of the wrapper. That a bare model has no ``model.`` changes nothing, and is not said."""
        if not self.wrapper:
            return ()
        return (f"parameters are named {self.wrapper}{'' if self.bare else 'model'}...: the prefix was taken away.",)

    def canonical(self, name: str) -> str:
        """The canonical name; one without the wrapper's prefix is left as it is, for whoever accounts for names."""
        if not name.startswith(self.wrapper):
            return name
        name = name.removeprefix(self.wrapper)
        return _MODEL + name if self.bare and name != HEAD else name

    def stored(self, name: str) -> str:
        """The name in the file of a canonical one."""
        return self.wrapper + (name.removeprefix(_MODEL) if self.bare else name)

    def by_canonical(self, found: Mapping[str, T]) -> dict[str, T]:
        """The same values by canonical names, or by their own where two names would become one."""
        renamed = {self.canonical(name): value for name, value in found.items()}
        return renamed if len(renamed) == len(found) else dict(found)


def stored_names(names: Iterable[str]) -> StoredNames:
    """Tell from all names of a checkpoint how its parameters were named."""
    stems = [name.removesuffix(end) for name in names for end in _ENDS if name == end or name.endswith(f".{end}")]
    if not stems:
        return StoredNames()
    stem = min(stems, key=len)
    bare = stem != _MODEL and not stem.endswith(f".{_MODEL}")
    return StoredNames(wrapper=stem if bare else stem.removesuffix(_MODEL), bare=bare)


def with_tied_embedding(found: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a tied model that may have been saved under the head's name alone, as transformers loads it."""
    if HEAD not in found or _EMBEDDING in found:
        return dict(found)
    return {_EMBEDDING if name == HEAD else name: value for name, value in found.items()}
