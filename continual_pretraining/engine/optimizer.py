"""AdamW's parameter groups, and the update of a step.

As in nanotron, RMSNorm weights decay (in Hugging Face's Trainer they do not), and so does the embedding unless it is
excluded. Unset fields take the values of the model family's pretraining.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolconv.continual_pretraining.recipe.schema import Optimizer
from smolconv.models.family import Family

if TYPE_CHECKING:
    import torch

#: A tied head is the embedding; a regex that matches either name applies to it.
_ALIASES: Mapping[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("lm_head.weight",)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share their weight decay, in the order of ``named_parameters``."""

    names: tuple[str, ...]
    weight_decay: float

    def to_json(self, optimizer: Optimizer) -> dict[str, Any]:
        """The group in the format of ``smolconv convert --groups``."""
        return {
            "names": list(self.names), "weight_decay": self.weight_decay, "lr": 0.0,
            "betas": list(optimizer.betas), "eps": optimizer.eps,
        }  # fmt: skip


def group_parameters(names: Iterable[str], optimizer: Optimizer, *, tied: bool, family: Family) -> tuple[Group, ...]:
    """Decayed parameters first, then undecayed ones; empty groups are omitted.

    ``optimizer.no_decay`` are regexes matched from the start of a name, or of its tied name.
    """
    weight_decay, no_decay = optimizer.weight_decay, optimizer.no_decay
    if weight_decay is None:
        weight_decay = family.weight_decay
    if no_decay is None:
        no_decay = tuple(f"{re.escape(name)}$" for name in family.undecayed)
    patterns = [re.compile(pattern) for pattern in no_decay]
    members: dict[bool, list[str]] = {True: [], False: []}
    for name in names:
        members[not any(p.match(spelling) for p in patterns for spelling in _spellings(name, tied))].append(name)
    return tuple(
        Group(names=tuple(found), weight_decay=weight_decay if decayed else 0.0)
        for decayed, found in members.items()
        if found
    )


def idle_patterns(names: Iterable[str], optimizer: Optimizer, *, tied: bool) -> list[str]:
    """The regexes of ``optimizer.no_decay`` that match no parameter."""
    spelt = [spelling for name in names for spelling in _spellings(name, tied)]
    return [pattern for pattern in optimizer.no_decay or () if not any(re.match(pattern, name) for name in spelt)]


def _spellings(name: str, tied: bool) -> tuple[str, ...]:
    return (name, *(_ALIASES.get(name, ()) if tied else ()))


def torch_groups(groups: Sequence[Group], parameters: Mapping[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Groups for torch's optimizers. By name: under ZeRO-3 a parameter's own shape is (0,)."""
    return [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups
    ]


def set_hyperparameters(param_groups: Sequence[dict[str, Any]], groups: Sequence[Group], optimizer: Optimizer) -> None:
    """Set the recipe's hyperparameters again, after loading a checkpoint has replaced them."""
    for running, group in zip(param_groups, groups, strict=True):
        running.update(weight_decay=group.weight_decay, betas=tuple(optimizer.betas), eps=optimizer.eps)


def set_learning_rate(param_groups: Sequence[dict[str, Any]], lr: float) -> None:
    for group in param_groups:
        group["lr"] = lr
