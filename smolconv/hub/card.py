"""The model card of a published checkpoint: metadata for the Hub, and a section on the origin of the weights.

The section is between two comments. Text that people write around it, and metadata that they set, are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.errors import CorruptFile, SmolconvError, UsageError
from smolconv.files import read_bytes
from smolconv.hub.address import is_hub_uri, parse_hub_uri
from smolconv.layouts.layout import SECTION_BEGIN, SECTION_END, one_line, plain_text, repository_of
from smolconv.parsing import parse_yaml_mapping
from smolconv.storage.manifest import PROOF
from smolconv.version import __version__

CARD = "README.md"
HOW_TO_REPEAT = f"{PROOF} has every digest and limit: smolconv verify --check-proof repeats the comparison."
#: The source of our results in the metadata: they are told apart by it when the card is written again.
_RESULTS_BY = "smolconv evaluate"
_RESULTS_URL = "https://github.com/smolconv/smolconv/blob/main/docs/evaluate.md"
_LICENCE = ("license", "license_name", "license_link")
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n|(?<=\n))---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SECTION = re.compile(rf"{re.escape(SECTION_BEGIN)}.*?{re.escape(SECTION_END)}\n?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """A card's facts about a run, without paths of its machine."""

    recipe: str
    source: str  #: the recipe's ``model.source``: an address, or a path, which the card does not show
    stages: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]  #: name, then names of sources and their shares
    steps: int
    tokens: int
    sequence_length: int
    schedule: str
    losses: tuple[tuple[int, float], ...] = ()  #: steps and the mean loss around them
    evaluations: tuple[tuple[str, float, float], ...] = ()  #: held-out data: name, first and last loss
    tasks: tuple[TaskResult, ...] = ()  #: of the last step's checkpoint
    task_engine: str = ""  #: what ran them, such as lm-eval


def on_hub(source: str) -> str | None:
    """``owner/name`` of an address, or of a folder in the Hub's cache; None for any other folder."""
    return parse_hub_uri(source).repo if is_hub_uri(source) else repository_of(Path(source))


def named(source: str) -> str:
    """A checkpoint's address, or the name of its folder without its local path."""
    if is_hub_uri(source):
        return source
    path = Path(source).resolve()
    run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
    return on_hub(source) or (f"{path.name} of the run {run}" if run else path.name)


def card_beside(source: str) -> bytes | None:
    """The card of a local checkpoint; None if there is none."""
    card = Path(source) / CARD
    return read_bytes(card) if not is_hub_uri(source) and card.is_file() else None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts about the weights."""

    title: str
    verified: str  #: how, in a sentence
    base_model: str | None = None  #: ``owner/name``, if the weights, or those before training, are from the Hub
    licence: str | None = None  #: given by the user; None: taken from the cards
    source_card: bytes | None = None  #: of the checkpoint that the weights come from, used only for its licence
    training: Training | None = None


def facts_of_source(source: str | None, title: str, verified: str, licence: str | None = None) -> CardFacts:
    """Facts about weights that were converted from ``source`` without further training."""
    return CardFacts(
        title=title, verified=verified, licence=licence, base_model=None if source is None else on_hub(source),
        source_card=None if source is None else card_beside(source),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Composed:
    card: bytes
    licence: str | None
    kept: bool  #: whether the repository's text was kept instead of the folder's, which differs


def compose(facts: CardFacts, ours: bytes | None, theirs: bytes | None) -> Composed:
    """Merge the cards of the folder (``ours``) and of the repository (``theirs``) into the card to publish.

    The repository's text takes precedence over the folder's. Raises ``CorruptFile`` for metadata that cannot be
    read, ``UsageError`` for an invalid licence.
    """
    if facts.licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,62}", facts.licence):
        raise UsageError(
            f"--licence {facts.licence!r:.80} is not the name of a licence.\n"
            "Expected an identifier of the Hub, such as apache-2.0, mit, llama3.1 or other.\n"
            "The list: https://huggingface.co/docs/hub/repositories-licenses"
        )
    here, there = _parts(ours, f"the folder's {CARD}"), _parts(theirs, f"the repository's {CARD}")
    source = _parts(facts.source_card, f"the source's {CARD}")[0]
    metadata = {**here[0], **there[0]}
    if not any(each.get("license") for each in (here[0], there[0])):
        metadata |= {key: source[key] for key in _LICENCE if key in source}
    if facts.licence is not None and facts.licence != metadata.get("license"):
        metadata = {key: value for key, value in metadata.items() if key not in _LICENCE} | {"license": facts.licence}
    tags = metadata.get("tags")
    kept = [tag for tag in (tags if isinstance(tags, list) else [tags]) if isinstance(tag, str)]
    metadata["tags"] = list(dict.fromkeys([*kept, "smolconv"]))
    metadata.setdefault("library_name", "transformers")
    if facts.base_model is not None and (facts.training is not None or "base_model" not in metadata):
        metadata["base_model"] = facts.base_model
    licence = metadata.get("license")
    own = there[1] if _own(there[1]) else here[1]
    section = _section(facts, licence if isinstance(licence, str) else None, alone=not _own(own))
    text = _put(own, section)
    differ = bool(_own(there[1]) and _own(here[1]) and _own(there[1]) != _own(here[1]))
    card = _rendered(metadata, text, facts)
    return Composed(card=card, licence=licence if isinstance(licence, str) else None, kept=differ)


def _parts(card: bytes | None, where: str) -> tuple[dict[str, Any], str]:
    """Split a card into metadata and text."""
    text = (card or b"").decode(errors="replace")
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        metadata = parse_yaml_mapping(found[1], where) if found[1].strip() else {}
        if not all(isinstance(key, str) for key in metadata):
            raise CorruptFile("a key is not text")
    except SmolconvError as error:
        raise _unreadable(where, error) from None
    return metadata, text[found.end() :]


def _unreadable(where: str, error: Exception) -> CorruptFile:
    return CorruptFile(
        f"{where}: its metadata cannot be read ({str(error).splitlines()[0]:.160}).\n"
        "Expected YAML between two lines of '---', as in the Hub's model cards.\n"
        "Correct it, and publish again. Nothing was uploaded."
    )


def _own(text: str) -> str:
    """The text without smolconv's section."""
    return _SECTION.sub("", text).strip()


def _put(text: str, section: str) -> str:
    """The text with smolconv's section replaced, or appended."""
    if (found := _SECTION.search(text)) is not None:
        rest = _SECTION.sub("", text[found.end() :])
        return text[: found.start()] + section + rest
    return f"{text.rstrip()}\n\n{section}" if text.strip() else section


def _rendered(metadata: Mapping[str, Any], text: str, facts: CardFacts) -> bytes:
    from huggingface_hub import ModelCard, ModelCardData

    try:
        card = ModelCard("---\n{}\n---\n")
        card.data = ModelCardData(**metadata)
        _put_results(card.data, facts)
        card.text = text
        return str(card).encode()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise _unreadable(CARD, error) from None


def _put_results(data: Any, facts: CardFacts) -> None:
    """The results of tasks as ``model-index``, which the Hub shows beside the card.

    Those of an earlier publication go, since the weights may be others; those of other sources stay.
    """
    from huggingface_hub import EvalResult

    others = [each for each in data.eval_results or () if each.source_name != _RESULTS_BY]
    ours = [
        EvalResult(
            task_type="text-generation", dataset_type=one_line(each.task), dataset_name=one_line(each.task),
            metric_type=one_line(each.metric), metric_value=each.value, source_name=_RESULTS_BY,
            source_url=_RESULTS_URL,
        )
        for each in ([] if facts.training is None else facts.training.tasks)
    ]  # fmt: skip
    data.eval_results = [*others, *ours] or None
    data.model_name = (data.model_name or one_line(facts.title)) if data.eval_results else None


def _section(facts: CardFacts, licence: str | None, *, alone: bool) -> str:
    """The section as Markdown. ``alone``: the card has no other text, so the section has the title."""
    lines = [SECTION_BEGIN, f"# {plain_text(facts.title)}" if alone else "## How these weights were made", ""]
    training = facts.training
    if training is not None:
        lines += _training(training)
    elif facts.base_model is not None:
        lines += [f"The weights are those of {_link(facts.base_model)} in transformers' layout.", ""]
    lines += ["**Verification.** " + plain_text(facts.verified, most=400), ""]
    lines += [
        "Digests of every tensor are in `smolconv_manifest.json`. Download the folder and run "
        "`smolconv inspect --check FOLDER` to compare them.", "",
    ]  # fmt: skip
    if licence is None:
        lines += ["**Licence.** None was given, and the source's card names none. Ask the authors before use.", ""]
    return "\n".join([*lines, f"Published with smolconv {__version__}.", SECTION_END, ""])


def _training(training: Training) -> list[str]:
    repository = on_hub(training.source)
    base = _link(repository) if repository else plain_text(named(training.source))
    lines = [
        f"Continued pretraining of {base} by the recipe {plain_text(training.recipe)}: {training.steps:,} steps, "
        f"{training.tokens:,} tokens in rows of {training.sequence_length:,}.", "",
        f"**Learning rate.** {training.schedule}", "", "**Data.**", "", "| stage | source | share |", "|---|---|---:|",
    ]  # fmt: skip
    lines += [
        f"| {plain_text(stage)} | {plain_text(name)} | {share:.1%} |"
        for stage, sources in training.stages
        for name, share in sources
    ]
    if training.losses:
        lines += ["", "**Training loss**, averaged around each step.", "", "| step | loss |", "|---:|---:|"]
        lines += [f"| {step:,} | {loss:.4f} |" for step, loss in training.losses]
    if training.evaluations:
        lines += ["", "**Evaluation** on held-out data.", "", "| data | loss before | loss after |", "|---|---:|---:|"]
        lines += [f"| {plain_text(name)} | {first:.4f} | {last:.4f} |" for name, first, last in training.evaluations]
    else:
        lines += ["", "**Evaluation.** The run has no evaluation on held-out data."]
    return [*lines, *_tasks(training), ""]


def _tasks(training: Training) -> list[str]:
    if not training.tasks:
        return []
    by = f" by {plain_text(training.task_engine)}" if training.task_engine else ""
    lines = ["", f"**Tasks**{by}, on these weights.", "", "| task | metric | value | standard error | samples |",
             "|---|---|---:|---:|---:|"]  # fmt: skip
    for each in training.tasks:
        error = "" if each.stderr is None else f"{each.stderr:.4f}"
        samples = "" if each.samples is None else f"{each.samples:,}"
        names = f"{plain_text(each.task)} | {plain_text(each.metric)}"
        lines.append(f"| {names} | {each.value:.4f} | {error} | {samples} |")
    return lines


def _link(repo: str) -> str:
    return f"[{plain_text(repo)}](https://huggingface.co/{repo})"
