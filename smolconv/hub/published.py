"""Reads a run's progress from the branch names of published checkpoint repositories.

The folders hold only weights. Only repositories listed here are trusted, and only names in the form that their model
cards document.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from smolconv.checkpoint import Checkpoint, TrainingProgress
from smolconv.hub.address import is_hub_uri, parse_hub_uri


@dataclass(frozen=True, kw_only=True)
class _Branches:
    """Branches of one run, by a pattern whose only group is the step."""

    pattern: str
    sequences_per_step: int
    sequence_length: int


#: huggingface.co/HuggingFaceTB/SmolLM3-3B-checkpoints and the run's YAMLs: 2,359,296 tokens per step in each run. The
#: steps of the two long-context runs are counted from their own start, as in their schedules.
_PUBLISHED = {
    "HuggingFaceTB/SmolLM3-3B-checkpoints": (
        _Branches(pattern=r"stage[123]-step-(\d{1,9})", sequences_per_step=576, sequence_length=4096),
        _Branches(pattern=r"lc-4k-to-32k-step-(\d{1,9})", sequences_per_step=72, sequence_length=32768),
        _Branches(pattern=r"lc-32k-to-64k-step-(\d{1,9})", sequences_per_step=36, sequence_length=65536),
    )
}


def published_progress(uri: str) -> TrainingProgress | None:
    """Steps, samples and tokens by the branch in ``uri``; None if the branch is not known."""
    if not is_hub_uri(uri):
        return None
    source = parse_hub_uri(uri)
    for branches in _PUBLISHED.get(source.repo, ()):
        if found := re.fullmatch(branches.pattern, source.revision or "", re.ASCII):
            step = int(found[1])
            samples = step * branches.sequences_per_step
            return TrainingProgress(
                step=step, consumed_samples=samples, consumed_tokens=samples * branches.sequence_length
            )
    return None


def with_published_progress(checkpoint: Checkpoint, uri: str) -> Checkpoint:
    """The checkpoint with the progress from its branch's name, if it has none itself, and a note on that."""
    progress = None if checkpoint.progress is not None else published_progress(uri)
    if progress is None:
        return checkpoint
    note = f"step {progress.step} and {progress.consumed_tokens} tokens are taken from the branch's name, as published."
    return replace(checkpoint, progress=progress, warnings=(*checkpoint.warnings, note))
