"""The rows of each training step: stages, blended sources, the place in them, and their share of a rank.

Which rows step k trains on is a function of how many samples came before it, never of the ranks. A stage's blend begins
anew with the stage; a folder is read on from where earlier stages left it. A *sample* is one window of a source,
counted from the folder's first; after the last one the folder begins again.

A position is plain JSON: ``{"step", "stages": [{"name", "start_step", "sequence_length", "sources": [{"path", "name",
"weight", "samples"}]}]}``, with every stage that began, and the samples that it really read of each source.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smolconv.checkpoint import DataStage
from smolconv.continual_pretraining.data.blending import Blend
from smolconv.continual_pretraining.tokens.files import (
    IGNORED_LABEL,
    Batch,
    Row,
    RowReader,
    TokenFile,
    TokenFolder,
    Wanted,
)
from smolconv.errors import SmolconvError, UsageError

if TYPE_CHECKING:
    from smolconv.continual_pretraining.recipe.schema import Data, Source, Stage

__all__ = [
    "BEGINNING", "Batch", "Row", "StepData", "TokenFile", "TokenFolder", "TrainingData", "evaluation_batches",
    "open_folders", "open_held_out", "position_from_stages", "stages_of",
]  # fmt: skip

Position = Mapping[str, Any]
#: Nothing was read: the data begins at the first step that is asked for, whatever its number.
BEGINNING: Position = {"step": 0, "stages": []}
#: Steps that are prepared ahead of the one that trains.
_PREPARED_STEPS = 2
#: Small steps of so many tokens are read at once: a read has costs of its own, whatever its size.
_TOKENS_TOGETHER = 1 << 16


@dataclass(frozen=True, kw_only=True)
class StepData:
    """What one rank trains on in one step."""

    step: int
    stage: str
    micro_batches: list[Batch]  #: of this rank
    tokens: dict[str, int]  #: source name -> input tokens that the run has consumed with this step, on all ranks
    position: dict[str, Any]  #: after this step; the same on all ranks


class TrainingData:
    """A recipe's data, open for reading.

    Micro-batch m of a step holds its samples ``m * B`` to ``m * B + B - 1``, and rank r takes the micro-batches r,
    r + W, r + 2W and so on, so that rows and micro-batches are the same for every world size W.

    ``position`` is that of the last step done, or ``BEGINNING``. Without one, reading a step replays the blend from
    step 1 on, at some 6 to 11 million samples a second (``benchmarks/results/data.md``): minutes for 2 billion.

    ``folders`` are what ``open_folders`` gave, which is called without them: many ranks that all open thousands of
    files would keep a shared file system from its work.

    Raises ``UsageError`` where the recipe contradicts itself, the folders or the position, and what
    ``TokenFolder.open`` raises.
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
                f"cannot be shared out among {world_size} ranks.\n"
                "Every rank gets the same number of whole micro-batches.\n"
                "Change the number of ranks, parallelism.micro_batch_sequences or the global batch."
            )
        self.data, self.rank, self.world_size = data, rank, world_size
        self.global_batch_sequences, self.micro_batch_sequences = global_batch_sequences, micro_batch_sequences
        self._position = position
        self._reader = _reader(data, vocab_size)
        self._folders = open_folders(data, position, vocab_size) if folders is None else folders
        self._prefetching: weakref.WeakSet[_Prefetched] = weakref.WeakSet()

    @property
    def folders(self) -> Mapping[str, TokenFolder]:
        """By path, those of the stages that are still to be read."""
        return self._folders

    def steps(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """The steps in order. A thread prepares the next ones meanwhile; its errors are raised here."""
        steps = _Prefetched(self.read_steps(first_step, last_step))
        self._prefetching.add(steps)
        return steps

    def read_steps(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """The same in the caller's own thread."""
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
            # Those before the step with the bad row are whole.
            for each in steps:
                yield from self._read(stage, [each])
            return
        own = len(batches) // len(steps)
        for number, each in enumerate(steps):
            yield StepData(
                step=each.step, stage=stage.name, micro_batches=batches[number * own : (number + 1) * own],
                tokens=_tokens(each.position), position=each.position,
            )  # fmt: skip

    def epochs(self, last_step: int) -> dict[str, float]:
        """How often each source's folder will have been read when ``last_step`` is done, by the shares of the stages.

        Within one sample of what is read, for each stage and source; stages that were left behind count as they were
        recorded.
        """
        place = _Place(self.data, self.global_batch_sequences, 1, self._position or BEGINNING)
        done = self._position["step"] if self._position else 0
        samples: dict[str, float] = {path: place.read_before(path) for path in self._folders}
        starts = [stage.start_step for stage in self.data.stages]
        for stage, next_start in zip(self.data.stages, [*starts[1:], last_step + 1]):
            steps = min(last_step + 1, next_start) - max(done + 1, stage.start_step)
            for source, weight in zip(stage.sources, stage.weights):
                if steps > 0:
                    samples[_plain(source.path)] += steps * self.global_batch_sequences * weight
        return {folder.name: samples[path] / folder.windows for path, folder in self._folders.items()}

    def describe(self, batch: Batch) -> list[str]:
        """Where each row of a batch was read: source, file, tokens and documents, counted from 0 in the file."""
        by_name = {folder.name: folder for folder in self._folders.values()}
        return [by_name[row.source].describe(row) for row in batch.rows]

    def close(self) -> None:
        """End the threads. Whoever still iterates over ``steps`` finds their end."""
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
                wanted.append(Wanted(self._folders[_plain(source.path)], rows, samples))
        return list(_cut(self._reader.read(wanted, len(chosen) // self.world_size), size))


class _Chosen(NamedTuple):
    """A step's samples, before they are read."""

    step: int
    sources: np.ndarray[Any, Any]  #: of all ranks, by number in the stage
    starts: list[int]  #: each source's first sample
    position: dict[str, Any]  #: after the step


class _Place:
    """Where in its stages a run is: what earlier stages read, and the blend of the one that it is in."""

    def __init__(self, data: Data, samples_per_step: int, first_step: int, position: Position | None) -> None:
        self.data = data
        self.history: list[dict[str, Any]] = [dict(stage) for stage in (position or BEGINNING)["stages"]]
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
        """Make the stage of ``step`` the current one: begin it, or go on with it."""
        stage = next(stage for stage in reversed(self.data.stages) if stage.start_step <= step)
        if getattr(self, "stage", None) is stage:
            return
        self.stage = stage
        counts = None
        if self.history and self.history[-1]["name"] == stage.name:
            counts = [source["samples"] for source in self._checked(self.history.pop())["sources"]]
        self.offsets = [self.read_before(source.path) for source in stage.sources]
        self.blend = Blend([source.weight for source in stage.sources], counts)
        self.history.append({})
        self._record()

    def next_stage_start(self, otherwise: int) -> int:
        """The first step that the current stage does not make."""
        return min(
            (each.start_step for each in self.data.stages if each.start_step > self.stage.start_step), default=otherwise
        )

    def read_before(self, path: str) -> int:
        """Samples of a folder that the stages before read, in windows of the recipe's length."""
        length, total = self.data.sequence_length, 0
        for stage in self.history:
            samples = sum(source["samples"] for source in stage["sources"] if _plain(source["path"]) == _plain(path))
            # Another length has other windows. nanotron goes on at so many tokens, and so do we.
            total += samples * stage["sequence_length"] // length
        return total

    def position(self, step: int) -> dict[str, Any]:
        self._record()
        return {"step": step, "stages": list(self.history)}

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
        """The current stage's record, which must speak of the recipe's stage: a changed blend has no place to go on."""
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
                    f"data: stage {stage.name} began with {what} {was}, but the recipe says {now}.\n"
                    "Within a stage the blend goes on as it began.\n"
                    "Put them back, or add a stage of another name that starts at the next step."
                )
        return record


def open_folders(data: Data, position: Position | None, vocab_size: int | None) -> dict[str, TokenFolder]:
    """By path, the folders of the stages that the position has not left behind. One rank's serve all.

    Raises as ``TrainingData`` does.
    """
    check_sources(data)
    names = [stage.name for stage in data.stages]
    left = position["stages"][-1]["name"] if position and position["stages"] else None
    folders: dict[str, TokenFolder] = {}
    for stage in data.stages[names.index(left) if left in names else 0 :]:
        for source, name in zip(stage.sources, stage.names):
            if _plain(source.path) not in folders:
                folders[_plain(source.path)] = _open(source.path, name, data, vocab_size)
    return folders


def open_held_out(source: Source, data: Data, vocab_size: int | None) -> TokenFolder:
    """A source of the evaluation, named as its losses are. Raises what ``TokenFolder.open`` does."""
    return _open(source.path, source.name or _plain(source.path).rpartition("/")[2], data, vocab_size)


def check_sources(data: Data) -> None:
    """Refuse what cannot be counted apart: a folder twice in a stage, or one name for two folders."""
    paths: dict[str, str] = {}
    for stage in data.stages:
        folders = [_plain(source.path) for source in stage.sources]
        twice = next((path for path in folders if folders.count(path) > 1), None)
        if twice is not None:
            raise UsageError(
                f"data: stage {stage.name} names the folder {twice} twice.\n"
                "Both would read the same samples.\nName it once, with the sum of the weights."
            )
        for name, path in zip(stage.names, folders):
            if paths.setdefault(name, path) != path:
                raise UsageError(
                    f"data: two sources are named {name}: {paths[name]} and {path} (stage {stage.name}).\n"
                    "Tokens are counted by name.\nGive one of them another name: in the recipe."
                )


def stages_of(position: Position) -> tuple[DataStage, ...]:
    """A position as nanotron counts it, for exports: consumed tokens are input tokens, by folder path."""
    return tuple(
        DataStage(
            name=stage["name"],
            start_training_step=stage["start_step"],
            consumed_train_samples=sum(source["samples"] for source in stage["sources"]),
            sequence_length=stage["sequence_length"],
            consumed_tokens_per_dataset_folder={
                source["path"]: source["samples"] * stage["sequence_length"] for source in stage["sources"]
            },
        )
        for stage in position["stages"]
    )


def position_from_stages(stages: Sequence[DataStage], data: Data, step: int) -> dict[str, Any]:
    """Where a run that nanotron trained up to ``step`` stands in the recipe's data.

    Folders are matched by path. The source's last stage goes on when the recipe has a stage of its name; otherwise the
    recipe's stage begins, and its folders are read on from where the source's stages left them.

    In its later stages nanotron counts tokens per folder at the wrong place of the blend, some samples off. What it
    reads is the blend itself, so the counts of the last stage are those of the blend, replayed (6 to 11 million samples
    a second); its record must come within a sample a source. Offsets of earlier stages are as recorded: nanotron used
    them.

    Raises ``UsageError`` that names what does not match.
    """
    check_sources(data)
    if not stages:
        raise UsageError(
            "start.data: the source has no record of its data.\nOnly a nanotron checkpoint, or one that was converted "
            "from it with its progress, knows its place.\nSet start.data: false to begin with the data's first samples."
        )
    names = {
        _recorded_as(source): (source.path, name)
        for stage in data.stages
        for source, name in zip(stage.sources, stage.names)
    }
    goes_on = next((stage for stage in data.stages if stage.name == stages[-1].name), None)
    history = [_recorded(stage, names) for stage in (stages[:-1] if goes_on else stages)]
    known = {path for path, _ in names.values()}
    if goes_on:
        history.append(_continued(stages[-1], goes_on, data.sequence_length))
        first = max((stage for stage in data.stages if stage.start_step <= step + 1), key=lambda each: each.start_step)
        if first.start_step < goes_on.start_step:
            raise UsageError(
                f"start.data: the source is in stage {goes_on.name!r}, which the recipe begins at step "
                f"{goes_on.start_step}; training would begin at step {step + 1}, in stage {first.name!r}.\n"
                "Set start.learning_rate: true to go on at the source's step, or start.data: false."
            )
    elif not any(source["path"] in known for stage in history for source in stage["sources"]):
        consumed = sorted({source["path"] for stage in history for source in stage["sources"]})
        raise UsageError(
            f"start.data: the source's last stage is {stages[-1].name!r} and it read {consumed}, but the recipe has "
            f"the stages {[stage.name for stage in data.stages]} and reads {sorted(names)}.\n"
            "Going on needs the name of the stage, or at least one folder, by the same path.\n"
            "Give the recipe's stage the source's name, give its sources recorded_as, or set start.data: false."
        )
    return {"step": step, "stages": history}


def _recorded_as(source: Source) -> str:
    """The folder's name in the record of a checkpoint that another program trained."""
    return _plain(source.recorded_as or source.path)


def _recorded(stage: DataStage, names: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    length = stage.sequence_length or 4096  # as nanotron reads a missing one
    tokens = stage.consumed_tokens_per_dataset_folder or {}
    if stage.consumed_train_samples * length != sum(tokens.values()):
        raise UsageError(
            f"start.data: the source's stage {stage.name!r} consumed {stage.consumed_train_samples} samples of "
            f"{length} tokens, but its folders sum up to {sum(tokens.values())} tokens.\n"
            "What is not counted by folder would be read twice.\nSet start.data: false to begin with the first samples."
        )
    sources = []
    for recorded, count in tokens.items():
        path, name = names.get(_plain(recorded), (recorded, recorded))
        sources.append({"path": path, "name": name, "weight": None, "samples": count // length})
    return {
        "name": stage.name, "start_step": stage.start_training_step, "sequence_length": length, "sources": sources,
    }  # fmt: skip


def _continued(stage: DataStage, now: Stage, sequence_length: int) -> dict[str, Any]:
    length = stage.sequence_length or 4096
    if length != sequence_length:
        raise UsageError(
            f"start.data: stage {stage.name!r} was read in sequences of {length}, but data.sequence_length is "
            f"{sequence_length}.\nOther windows have no place in common.\n"
            f"Set data.sequence_length={length}, or give the recipe's stage another name."
        )
    consumed = stage.consumed_tokens_per_dataset_folder or {}
    recorded = {_plain(path): tokens // length for path, tokens in consumed.items()}
    paths = [_recorded_as(source) for source in now.sources]
    missing = [path for path in paths if recorded and path not in recorded]
    unknown = [path for path, samples in recorded.items() if samples and path not in paths]
    if missing or unknown:
        raise UsageError(
            f"start.data: the source's stage {stage.name!r} did not read {missing or 'other folders'}"
            f" and read {unknown or 'no others'}.\nA stage goes on with the folders that it began with, by path.\n"
            "Give each source of the recipe the source's name for it (recorded_as), or its stage another name."
        )
    blend = Blend([source.weight for source in now.sources])
    blend.skip(stage.consumed_train_samples)
    for path, read in zip(paths, blend.counts):
        if recorded and abs(recorded[path] - read) > len(paths):
            raise UsageError(
                f"start.data: by the recipe's weights, stage {stage.name!r} read {read} samples of {path}; the source "
                f"recorded {recorded[path]}.\nThe weights differ from those it was trained with.\n"
                "Set the source's weights, or give the recipe's stage another name."
            )
    return {
        "name": now.name, "start_step": now.start_step, "sequence_length": length,
        "sources": [
            {"path": source.path, "name": name, "weight": source.weight, "samples": count}
            for source, name, count in zip(now.sources, now.names, blend.counts)
        ],
    }  # fmt: skip


def evaluation_batches(
    folder: TokenFolder,
    data: Data,
    sequences: int,
    micro_batch_sequences: int,
    rank: int,
    world_size: int,
    vocab_size: int | None,
) -> Iterator[Batch]:
    """The first ``sequences`` windows of a folder (all, where there are fewer), as this rank's micro-batches.

    Every rank gets equally many batches, since a forward pass under ZeRO-3 takes all ranks: where none is left, the
    last one comes again with all labels -100 and no ``rows``.
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


# --- helpers ---------------------------------------------------------------------------------------------------------


def _open(path: str, name: str, data: Data, vocab_size: int | None) -> TokenFolder:
    return TokenFolder.open(
        path,
        data.sequence_length,
        name=name,
        file_seed=data.file_seed,
        vocab_size=vocab_size,
        eos_token_id=data.eos_token_id if data.boundaries == "eos" else None,
    )


def _reader(data: Data, vocab_size: int | None) -> RowReader:
    return RowReader(
        sequence_length=data.sequence_length,
        boundaries=data.boundaries,
        eos_token_id=data.eos_token_id,
        mask_documents=data.mask_documents,
        loss_masks=data.loss_masks,
        vocab_size=vocab_size,
    )


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Into micro-batches; views of the same arrays."""
    for first in range(0, len(batch.rows), size):
        part = slice(first, first + size)
        yield Batch(
            input_ids=batch.input_ids[part], positions=batch.positions[part], labels=batch.labels[part],
            rows=batch.rows[part],
        )  # fmt: skip


def _tokens(position: Position) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for stage in position["stages"]:
        for source in stage["sources"]:
            tokens[source["name"]] = tokens.get(source["name"], 0) + source["samples"] * stage["sequence_length"]
    return tokens


def _plain(path: str) -> str:
    """What folders are told apart by."""
    return path.rstrip("/")


class _Prefetched(Iterator[StepData]):
    """Steps that a thread reads ahead of whoever asks for them."""

    def __init__(self, steps: Iterator[StepData]) -> None:
        self._ahead: queue.Queue[StepData | BaseException | None] = queue.Queue(maxsize=_PREPARED_STEPS)
        self._stopped = threading.Event()
        # The thread holds no reference to us, so that it ends when we are forgotten.
        self._thread = threading.Thread(
            target=_read_ahead, args=(steps, self._ahead, self._stopped), name="data", daemon=True
        )
        self._thread.start()

    def __next__(self) -> StepData:
        item = None if self._stopped.is_set() else self._ahead.get()
        if isinstance(item, StepData):
            return item
        self.close()
        if item is not None:
            raise item
        raise StopIteration

    def close(self) -> None:
        """End the thread, and the iteration of whoever waits for it."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(queue.Full):
            self._ahead.put_nowait(None)

    def __del__(self) -> None:
        self._stopped.set()


def _read_ahead(
    steps: Iterator[StepData], ahead: queue.Queue[StepData | BaseException | None], stopped: threading.Event
) -> None:
    def hand_over(item: StepData | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put(item, timeout=0.1)
                return

    try:
        for item in steps:
            hand_over(item)
            if stopped.is_set():
                return
        hand_over(None)
    except BaseException as error:
        hand_over(error)
