"""What a card of proof says against itself, and what a verification of the same two checkpoints finds otherwise.

A card's day, versions, machine, and the names and revisions of its checkpoints are what its writer says: nothing here
could contradict them. Everything else is compared.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from smolconv.checkpoint import Checkpoint
from smolconv.errors import counted, some_of
from smolconv.verification.logits import GATES
from smolconv.verification.proof import (
    READING_OPTIONS,
    Proof,
    ProvenLogits,
    ProvenSide,
    ProvenTensor,
    ProvenTensors,
    read_side,
)

#: How much wider a limit may be than the one found here: it follows the noise floor, which depends on the machine.
_WIDER = 2.0
#: How far a share of equal choices may be from the one found here.
_SHARE = 0.02
#: NLL of two machines for the same model and text, in nats.
_NLL = {"float32": 1e-3, "bfloat16": 2e-2}
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?|\b(nan|inf)\b")
#: Where a gate's value stands a second time on the card.
_FIGURE = {"max_abs": "max_abs", "kl": "kl_mean"}


# --- the card alone --------------------------------------------------------------------------------------------------


def doubts(proof: Proof) -> list[str]:
    """A line for each verdict, count or figure that the rest of the card contradicts."""
    found = [*_tensor_doubts(proof), *_logits_doubts(proof)]
    if proof.passed != proof.verdict():
        found.append(f"the card says passed: {_json(proof.passed)}, but its numbers show the opposite")
    if not _follows(proof):
        found.append(f"its command is {proof.command!r:.200}, which does not follow from its names and options")
    return found


def weaknesses(proof: Proof) -> list[str]:
    """What a reader should know of a card that holds: limits that were asked for, a tier that was left out."""
    found = [
        f"the limit of {name} is {limit:g} because it was asked for" for name, limit in proof.options.gates.items()
    ]
    return [*found, "logits were not compared"] if proof.logits is None else found


def _follows(proof: Proof) -> bool:
    """Whether the command is what follows from the card; how A and B were read may come after it."""
    try:
        words, expected = shlex.split(proof.command), proof.command_words()
    except ValueError:
        return False
    others = words[len(expected) :]
    return words[: len(expected)] == expected and len(others) % 2 == 0 and set(others[::2]) <= set(READING_OPTIONS)


def _tensor_doubts(proof: Proof) -> Iterator[str]:
    if not proof.a.tensors or not proof.b.tensors:
        yield "it lists no tensors"
    yield from _tier_doubts("", proof.tensors, proof.a.tensors, proof.b.tensors)
    slots = proof.a.optimizer.keys() | proof.b.optimizer.keys()
    if slots != proof.optimizer.keys() or (slots and not proof.options.optimizer):
        yield "it lists tensors of Adam that it does not compare, or compares some that it does not list"
    for slot in sorted(slots & proof.optimizer.keys()):
        one, other = (side.optimizer.get(slot, {}) for side in (proof.a, proof.b))
        yield from _tier_doubts(f"{slot}: ", proof.optimizer[slot], one, other)


def _tier_doubts(
    slot: str, said: ProvenTensors, a: Mapping[str, ProvenTensor], b: Mapping[str, ProvenTensor]
) -> Iterator[str]:
    in_both = a.keys() & b.keys()
    if said.compared != len(in_both):
        yield f"{slot}{said.compared} tensors are called compared, and {len(in_both)} are listed on both sides"
    if set(said.missing) != a.keys() - b.keys() or set(said.unexpected) != b.keys() - a.keys():
        yield f"{slot}the tensors that it calls missing or unexpected are not those that only one side lists"
    same = {name for name in in_both if a[name] == b[name]}
    # Of two dtypes the digests differ even where one is the other, widened.
    apart = sorted(name for name in in_both - same if a[name].dtype == b[name].dtype or a[name].shape != b[name].shape)
    if not len(same) <= said.equal <= len(in_both) - len(apart):
        first = f", first {apart[0]}" if apart else ""
        yield f"{slot}{said.equal} tensors are called equal, and {len(apart)} have other digests{first}"


def _logits_doubts(proof: Proof) -> Iterator[str]:
    logits, asked = proof.logits, proof.options
    if logits is None:
        if asked.logits and proof.passed and "left out" not in proof.reason:
            yield "logits were to be compared, and the card has none"
        return
    if not asked.logits:
        yield "logits were not to be compared, and the card has some"
    for name, gate in logits.gates.items():
        if gate.passed != gate.holds(name):
            said = "passed" if gate.passed else "failed"
            yield f"gate {name} is called {said}, with {gate.value} and a limit of {gate.limit:g}"
    expected = [*GATES[asked.compute], *asked.gates]
    expected += [f"documents{'_kl' if asked.compute == 'bfloat16' else ''}"] if asked.documents > 1 else []
    if lacking := [name for name in dict.fromkeys(expected) if name not in logits.gates]:
        yield f"it has no gate {some_of(lacking)}"
    for name in asked.gates.keys() & logits.gates.keys():
        if asked.gates[name] != logits.gates[name].limit:
            yield f"the limit of {name} is {logits.gates[name].limit:g}, and {asked.gates[name]:g} was asked for"
    for name, figure in _FIGURE.items():
        if name in logits.gates and logits.gates[name].value != getattr(logits, figure):
            yield f"gate {name} has {logits.gates[name].value}, and {figure} is {getattr(logits, figure)}"
    if logits.max_abs is not None and logits.mean_abs is not None and logits.mean_abs > logits.max_abs:
        yield f"mean_abs is {logits.mean_abs:g}, more than max_abs, {logits.max_abs:g}"


# --- the card and the checkpoints ------------------------------------------------------------------------------------


def differences(proof: Proof, here: Proof) -> list[str]:
    """What a verification of the same two checkpoints, by the card's options, found otherwise than the card."""
    found = [*_side_differences("A", proof.a, here.a), *_side_differences("B", proof.b, here.b)]
    for name in ("tensors", "optimizer", "spec_differences", "optimizer_differences"):
        if getattr(proof, name) != getattr(here, name):
            found.append(f"{name} on the card are not what was found here")
    if proof.passed != here.passed:
        found.append(f"the card says passed: {_json(proof.passed)}; here: {here.reason}")
    elif _NUMBER.sub("", proof.reason) != _NUMBER.sub("", here.reason):
        found.append(f"the card's reason is {proof.reason!r:.200}; here: {here.reason}")
    if (proof.logits is None) != (here.logits is None):
        found.append("logits are on the card, and not here" if here.logits is None else "logits are not on the card")
    elif proof.logits is not None and here.logits is not None:
        found += _logits_differences(proof, proof.logits, here.logits)
    return found


def other_weights(proof: Proof, checkpoint: Checkpoint) -> list[str]:
    """Where the card's B is another model than this checkpoint."""
    return list(_side_differences("", proof.b, read_side(checkpoint, proof.b.name)))


def _side_differences(label: str, card: ProvenSide, here: ProvenSide) -> Iterator[str]:
    label = f"{label}: " if label else ""
    if card.layout != here.layout:
        yield f"{label}{here.layout} here, and {card.layout} on the card"
    apart = sorted(name for name in card.spec.keys() | here.spec.keys() if card.spec.get(name) != here.spec.get(name))
    if apart:
        one, other = here.spec.get(apart[0]), card.spec.get(apart[0])
        yield f"{label}{apart[0]} is {one!r:.80} here, and {other!r:.80} on the card"
    slots = sorted(here.optimizer.keys() | (card.optimizer.keys() if here.optimizer else set()))
    sets = [("", card.tensors, here.tensors)]
    sets += [(f"{slot} ", card.optimizer.get(slot, {}), here.optimizer.get(slot, {})) for slot in slots]
    for slot, on_card, found in sets:
        apart = sorted(name for name in on_card.keys() | found.keys() if on_card.get(name) != found.get(name))
        if apart:
            yield f"{label}{slot}{counted(len(apart), 'tensor')} other than on the card, first {apart[0]}"


def _logits_differences(proof: Proof, card: ProvenLogits, here: ProvenLogits) -> Iterator[str]:
    if (card.positions, card.tokens_from) != (here.positions, here.tokens_from):
        told = f"{card.positions} positions of {card.tokens_from}"
        yield f"the card's logits are of {told}; here {here.positions} of {here.tokens_from}"
    if card.forwards != here.forwards:
        yield f"the forward passes were {'; '.join(card.forwards)}; here {'; '.join(here.forwards)}"
    for name in card.gates.keys() | here.gates.keys():
        if name not in card.gates or name not in here.gates:
            yield f"gate {name} is only {'on the card' if name in card.gates else 'here'}"
            continue
        said, found = card.gates[name].limit, here.gates[name].limit
        if said < found - _SHARE if name == "top1" else said > _WIDER * found:
            yield f"the limit of {name} is {said:g} on the card, and {found:g} here"
    for name, tolerance in _tolerances(proof, here).items():
        pairs = [(name, getattr(card, name), getattr(here, name))] if hasattr(here, name) else []
        if name in here.noise_floor:
            pairs.append((f"noise_floor.{name}", card.noise_floor.get(name), here.noise_floor[name]))
        for told, one, other in pairs:
            if (one is None) != (other is None) or abs((one or 0) - (other or 0)) > tolerance:
                yield f"{told} is {one} on the card, and {other} here"


def _tolerances(proof: Proof, here: ProvenLogits) -> dict[str, float]:
    """By figure, how far another machine may be: it adds in another order."""

    def of(figure: str, gate: str) -> float:
        limit = here.gates[gate].limit if gate in here.gates else 0.0
        return _WIDER * max(limit, here.noise_floor[figure] or 0.0, 1e-12)

    apart, divergence, nll = of("max_abs", "max_abs"), of("kl_mean", "kl"), _NLL[proof.options.compute]
    # The 99th percentile is far above the mean.
    return {
        "max_abs": apart, "mean_abs": apart, "kl_mean": divergence, "kl_p99": 100 * divergence,
        "top1_agreement": _SHARE, "nll_a": nll, "nll_b": nll,
    }  # fmt: skip


def _json(value: Any) -> str:
    return str(value).lower()
