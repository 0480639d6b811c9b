"""The rows of each training step: stages, blended sources, positions in them, and each rank's share.

The rows of step k depend only on how many samples came before, never on the ranks. Each stage has a new blend; a folder
continues where earlier stages stopped. A *sample* is one window of a source, counted from the folder's first; after the
last one the folder starts over.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smolconv.continual_pretraining.data.blending import Blend
from smolconv.continual_pretraining.data.folders import open_folders, plain_path
from smolconv.continual_pretraining.data.position import BEGINNING, Position, restarted_at, samples_of, tokens_of
from smolconv.continual_pretraining.data.prefetch import Prefetched
from smolconv.continual_pretraining.tokens.files import (
    IGNORED_LABEL,
    Batch,
    RowReader,
    TokenFolder,
    Wanted,
)
from smolconv.errors import SmolconvError, UsageError

if TYPE_CHECKING:
    from smolconv.continual_pretraining.recipe.schema import Data, Stage

#: Steps that are prepared in advance.
_PREPARED_STEPS = 2
#: Small steps are read together up to this many tokens, because each read has a fixed cost.
_TOKENS_TOGETHER = 1 << 16


@dataclass(frozen=True, kw_only=True)
class StepData:
    """One rank's data for one step."""

    step: int
    stage: str
    micro_batches: list[Batch]  #: of this rank
    tokens: dict[str, int]  #: source name -> input tokens consumed by the run up to this step, on all ranks
    position: dict[str, Any]  #: after this step; the same on all ranks


class TrainingData:
    """A recipe's data, opened for reading.

    Micro-batch m of a step holds its samples ``m * B`` to ``m * B + B - 1``, and rank r takes the micro-batches r,
    r + W, r + 2W and so on, so rows and micro-batches are the same for every world size W.

    ``position`` is that after the last completed step, or ``BEGINNING``. Without it, reading a step replays the blend
    from step 1, at 6 to 11 million samples per second (``benchmarks/results/data.md``): minutes for 2 billion.
    ``folders``: the result of ``open_folders``, by default opened here. Many ranks that each open thousands of files
    would overload a shared file system.
    Raises ``UsageError`` if the recipe contradicts itself, the folders or the position, and what ``TokenFolder.open``
    raises.
    """

    def __init__(
        self,
        data: Data,
        *,
        global_batch_sequences: int,
        micro_batch_sequences: int,
        vocab_size: int | None,
        rank: int,
        world_size: int,
        position: Position | None = None,
        folders: Mapping[str, TokenFolder] | None = None,
    ) -> None:
        micro_batches, rest = divmod(global_batch_sequences, micro_batch_sequences)
        if rest or micro_batches % world_size:
            raise UsageError(
                f"A global batch of {global_batch_sequences} sequences, in micro-batches of {micro_batch_sequences}, "
                f"cannot be divided among {world_size} ranks.\n"
                "Every rank needs the same number of whole micro-batches.\n"
                "Change the number of ranks, parallelism.micro_batch_sequences or the global batch."
            )
        self.data, self.rank, self.world_size = data, rank, world_size
        self.global_batch_sequences, self.micro_batch_sequences = global_batch_sequences, micro_batch_sequences
        self._position = position
        self._reader = _reader(data, vocab_size)
        self._folders = open_folders(data, position, vocab_size) if folders is None else folders
        self._prefetching: weakref.WeakSet[Prefetched[StepData]] = weakref.WeakSet()

    @property
    def folders(self) -> Mapping[str, TokenFolder]:
        """The folders of stages that are still read, by path."""
        return self._folders

    def steps(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """Yield the steps in order. A thread prepares the next ones; its errors are raised here."""
        steps = Prefetched(self.read_steps(first_step, last_step), _PREPARED_STEPS)
        self._prefetching.add(steps)
        return steps

    def read_steps(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """The same in the calling thread."""
        place = _Place(self.data, self.global_batch_sequences, first_step, self._position)
        together = max(1, _TOKENS_TOGETHER // (self.global_batch_sequences * self.data.sequence_length))
        step = first_step
        while step <= last_step:
            place.enter(step)
            end = min(step + together, place.next_stage_start(otherwise=last_step + 1), last_step + 1)
            yield from self._read(place.stage, [self._chosen(place, each) for each in range(step, end)])
            step = end

    def _chosen(self, place: _Place, step: int) -> _Chosen:
        starts = [offset + count for offset, count in zip(place.offsets, place.blend.counts)]
        return _Chosen(step, place.blend.take(self.global_batch_sequences), starts, place.position(step))

    def _read(self, stage: Stage, steps: Sequence[_Chosen]) -> Iterator[StepData]:
        try:
            batches = self._micro_batches(stage, np.concatenate([each.sources for each in steps]), steps[0].starts)
        except SmolconvError:
            if len(steps) == 1:
                raise
            # Steps before the one with the bad row are complete.
            for each in steps:
                yield from self._read(stage, [each])
            return
        own = len(batches) // len(steps)
        for number, each in enumerate(steps):
            yield StepData(
                step=each.step, stage=stage.name, micro_batches=batches[number * own : (number + 1) * own],
                tokens=tokens_of(each.position), position=each.position,
            )  # fmt: skip

    def epochs(self, last_step: int) -> dict[str, float]:
        """How many times each source's folder will have been read after ``last_step``, by the shares of the stages.

        Exact within one sample per stage and source; finished stages count as recorded.
        """
        place = _Place(self.data, self.global_batch_sequences, 1, self._position or BEGINNING)
        done = self._position["step"] if self._position else 0
        samples: dict[str, float] = {path: place.read_before(path) for path in self._folders}
        starts = [stage.start_step for stage in self.data.stages]
        for stage, next_start in zip(self.data.stages, [*starts[1:], last_step + 1]):
            steps = min(last_step + 1, next_start) - max(done + 1, stage.start_step)
            for source, weight in zip(stage.sources, stage.weights):
                if steps > 0:
                    samples[plain_path(source.path)] += steps * self.global_batch_sequences * weight
        return {folder.name: samples[path] / folder.windows for path, folder in self._folders.items()}

    def describe(self, batch: Batch) -> list[str]:
        """Where each row of a batch was read: source, file, tokens and documents, counted from 0 in the file."""
        by_name = {folder.name: folder for folder in self._folders.values()}
        return [by_name[row.source].describe(row) for row in batch.rows]

    def close(self) -> None:
        """End the threads and any iteration over ``steps``."""
        for steps in self._prefetching:
            steps.close()
        self._prefetching.clear()

    def _micro_batches(self, stage: Stage, chosen: np.ndarray[Any, Any], starts: Sequence[int]) -> list[Batch]:
        size = self.micro_batch_sequences
        wanted = []
        for number, source in enumerate(stage.sources):
            places = np.flatnonzero(chosen == number) if len(starts) > 1 else np.arange(len(chosen))
            batch = places // size
            mine = batch % self.world_size == self.rank
            rows = batch[mine] // self.world_size * size + places[mine] % size
            samples = starts[number] + np.flatnonzero(mine)
            if len(rows):
                wanted.append(Wanted(self._folders[plain_path(source.path)], rows, samples))
        return list(_cut(self._reader.read(wanted, len(chosen) // self.world_size), size))


class _Chosen(NamedTuple):
    """The samples of a step, before they are read."""

    step: int
    sources: np.ndarray[Any, Any]  #: for all ranks, by number in the stage
    starts: list[int]  #: each source's first sample
    position: dict[str, Any]  #: after the step


class _Place:
    """A run's position in its stages: what earlier stages read, and the blend of the current stage."""

    def __init__(self, data: Data, samples_per_step: int, first_step: int, position: Position | None) -> None:
        self.data = data
        self.begun = position or BEGINNING
        self.history: list[dict[str, Any]] = [dict(stage) for stage in self.begun["stages"]]
        if position is None:
            self._replay(first_step, samples_per_step)

    def _replay(self, first_step: int, samples_per_step: int) -> None:
        step = 1
        while step < first_step:
            self.enter(step)
            later = [stage.start_step for stage in self.data.stages if stage.start_step > step]
            next_step = min([first_step, *later])
            self.blend.skip((next_step - step) * samples_per_step)
            self._record()
            step = next_step

    def enter(self, step: int) -> None:
        """Make the stage of ``step`` the current one, by beginning or continuing it."""
        stage = next(stage for stage in reversed(self.data.stages) if stage.start_step <= step)
        if getattr(self, "stage", None) is stage:
            return
        self.stage = stage
        counts = None
        if self.history and self.history[-1]["name"] == stage.name:
            counts = [source["samples"] for source in self._checked(self.history.pop())["sources"]]
        self.blend = Blend([source.weight for source in stage.sources], counts)
        # With another sequence length, the tokens before a restart and the total may round differently.
        self.offsets = [
            max(self.read_before(source.path), -count) for source, count in zip(stage.sources, self.blend.counts)
        ]
        self.history.append({})
        self._record()

    def next_stage_start(self, otherwise: int) -> int:
        """The first step after the current stage."""
        return min(
            (each.start_step for each in self.data.stages if each.start_step > self.stage.start_step), default=otherwise
        )

    def read_before(self, path: str) -> int:
        """Samples of a folder read by earlier stages; negative if it has restarted since."""
        path, length = plain_path(path), self.data.sequence_length
        return samples_of(self.history, path, length) - restarted_at(self.begun, path, length)

    def position(self, step: int) -> dict[str, Any]:
        self._record()
        return {**self.begun, "step": step, "stages": list(self.history)}

    def _record(self) -> None:
        sources = [
            {"path": source.path, "name": name, "weight": source.weight, "samples": count}
            for source, name, count in zip(self.stage.sources, self.stage.names, self.blend.counts)
        ]
        self.history[-1] = {
            "name": self.stage.name, "start_step": self.stage.start_step,
            "sequence_length": self.data.sequence_length, "sources": sources,
        }  # fmt: skip

    def _checked(self, record: dict[str, Any]) -> dict[str, Any]:
        """The current stage's record, which must match the recipe's stage: a changed blend cannot continue."""
        stage = self.stage
        for what, was, now in (
            ("data.sequence_length", record["sequence_length"], self.data.sequence_length),
            ("its sources", [source["path"] for source in record["sources"]], [each.path for each in stage.sources]),
            (
                "their weights",
                [source["weight"] for source in record["sources"]],
                [each.weight for each in stage.sources],
            ),
        ):
            if was != now:
                raise UsageError(
                    f"data: stage {stage.name} began with {what} {was}, but the recipe has {now}.\n"
                    "The blend cannot change within a stage.\n"
                    "Restore the recipe, or add a stage with another name that starts at the next step."
                )
        return record


def evaluation_batches(
    folder: TokenFolder, data: Data, sequences: int, micro_batch_sequences: int, rank: int, world_size: int,
    vocab_size: int | None,
) -> Iterator[Batch]:  # fmt: skip
    """The first ``sequences`` windows of a folder (or all, if there are fewer), as this rank's micro-batches.

    Every rank gets the same number of batches, because a forward pass under ZeRO-3 needs all ranks: a rank that has
    none left repeats the last one with all labels -100 and no ``rows``.
    """
    reader = _reader(data, vocab_size)
    starts = range(0, min(sequences, folder.windows), micro_batch_sequences)
    for turn in range(-(-len(starts) // world_size)):
        number = turn * world_size + rank
        start = starts[min(number, len(starts) - 1)]
        samples = np.arange(start, min(start + micro_batch_sequences, sequences, folder.windows))
        batch = reader.read([Wanted(folder, np.arange(len(samples)), samples)], len(samples))
        if number >= len(starts):
            batch = replace(batch, labels=np.full_like(batch.labels, IGNORED_LABEL), rows=())
        yield batch


def _reader(data: Data, vocab_size: int | None) -> RowReader:
    return RowReader(
        sequence_length=data.sequence_length, boundaries=data.boundaries, eos_token_id=data.eos_token_id,
        mask_documents=data.mask_documents, loss_masks=data.loss_masks, vocab_size=vocab_size,
    )  # fmt: skip


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Split into micro-batches, which are views of the same arrays."""
    for first in range(0, len(batch.rows), size):
        part = slice(first, first + size)
        yield Batch(
            input_ids=batch.input_ids[part], positions=batch.positions[part], labels=batch.labels[part],
            rows=batch.rows[part],
        )  # fmt: skip
