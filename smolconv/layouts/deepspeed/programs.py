"""Programs around a DeepSpeed engine: the tag that each expects, and its files next to the tag.

Sources: ``_load_optimizer_and_scheduler``, ``_load_rng_state`` and ``TrainerState`` of transformers 5.23's Trainer;
``load_state`` and ``load_accelerator_state`` of accelerate 1.15.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, EngineRecord
from smolconv.errors import BadCheckpoint, CorruptFile, UsageError, counted
from smolconv.files import is_path_below
from smolconv.layouts.documents import is_count
from smolconv.layouts.layout import copied_file
from smolconv.parsing import read_json
from smolconv.storage.planned import PlannedFile, plain_file
from smolconv.storage.torch_archive.archive import plan_torch_archive, read_torch_archive


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a program needs to resume from a folder."""

    title: str
    tag: str | None  #: the only one that it loads; None: any that begins with global_step
    random: re.Pattern[str]  #: names of the ranks' random states
    others: re.Pattern[str]  #: names of files that all ranks share
    #: Files without which a run cannot resume: written if the source has no valid one, with a warning.
    made: Mapping[str, Callable[[Checkpoint], tuple[bytes, str]]]
    check: Callable[[Path, Checkpoint], None]  #: raises ``BadCheckpoint`` for a file of another step


def _trainer_state(checkpoint: Checkpoint) -> tuple[bytes, str]:
    # A Trainer uses these instead of its own arguments, and fails without them.
    intervals = {"logging_steps": 500, "eval_steps": 500, "save_steps": 500, "train_batch_size": 1}
    state: dict[str, Any] = {"global_step": _step(checkpoint), **intervals}
    if checkpoint.progress is not None and checkpoint.progress.consumed_tokens is not None:
        state["num_input_tokens_seen"] = checkpoint.progress.consumed_tokens
    said = (
        "only the step is known, not history and best metric. Edit its logging_steps, eval_steps, save_steps and "
        "train_batch_size: the Trainer takes them from there"
    )
    return (json.dumps(state, indent=2) + "\n").encode(), said


def _schedule(checkpoint: Checkpoint) -> tuple[bytes, str]:
    """The position of torch's LambdaLR; the run's own factors and first LRs stay."""
    groups = checkpoint.optimizer.groups if checkpoint.optimizer is not None else ()
    step = _step(checkpoint) - _skipped(checkpoint)
    state = {
        "last_epoch": step, "_step_count": step + 1, "lr_lambdas": [None] * len(groups),
        "_last_lr": [float(group.hyperparameters.get("lr", 0.0)) for group in groups],
    }  # fmt: skip
    data = plan_torch_archive("scheduler", state).without_data()
    return data, f"it has step {step} of the run's own schedule, for one of transformers' (a LambdaLR)"


def _check_trainer(path: Path, checkpoint: Checkpoint) -> None:
    step, wanted = _step(checkpoint), {_step(checkpoint)}
    if path.suffix == ".json":
        found = read_json(path).get("global_step")
    else:
        state = read_torch_archive(path)
        if not isinstance(state, dict) or "lr_lambdas" not in state:
            return  # of another schedule (ReduceLROnPlateau), which counts something else
        found, wanted = state.get("last_epoch"), {step, step - _skipped(checkpoint)}
    if not is_count(found) or found not in wanted:
        raise CorruptFile(f"{path.name} is of step {found!r:.30}, the checkpoint of step {step}")


def _check_accelerate(path: Path, checkpoint: Checkpoint) -> None:
    read_torch_archive(path)  # only the run knows how many of its steps make one training step


PROGRAMS: Mapping[str, Program] = {
    "trainer": Program(
        title="transformers.Trainer",
        tag=None,
        random=re.compile(r"rng_state(?:_(?P<rank>\d+))?\.pth"),
        others=re.compile(r"trainer_state\.json|scheduler\.pt"),
        made={"trainer_state.json": _trainer_state, "scheduler.pt": _schedule},
        check=_check_trainer,
    ),
    "accelerate": Program(
        title="accelerate",
        tag="pytorch_model",
        random=re.compile(r"random_states_(?P<rank>\d+)\.pkl"),
        others=re.compile(r"scheduler(_\d+)?\.bin"),
        made={},
        check=_check_accelerate,
    ),
}
#: Names of all these files, to distinguish a checkpoint's files from others.
PROGRAM_PATTERN = "|".join(
    pattern.pattern.replace("?P<rank>", "")
    for program in PROGRAMS.values()
    for pattern in (program.random, program.others)
)


def program_files(folder: Path) -> dict[str, Path]:
    """Files of programs next to a tag, by name; opens none."""
    with suppress(OSError):
        return {
            entry.name: folder / entry.name
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if re.fullmatch(PROGRAM_PATTERN, entry.name) and os.path.isfile(entry)
        }
    return {}


def check_tag(tag: str | None, program: str | None) -> None:
    """Raise ``UsageError`` for a tag that is not a folder's name, or that the program would not load."""
    if program is not None and program not in PROGRAMS:
        raise UsageError(f"--for {program}: expected one of {', '.join(PROGRAMS)}.")
    if tag is None:
        return
    if not is_path_below(tag) or tag != tag.strip() or not tag.isprintable():
        raise UsageError(f"--tag {tag!r:.80}: expected the name of a folder, such as global_step100.")
    if program is not None:
        wanted = PROGRAMS[program].tag
        if tag != wanted and (wanted is not None or not tag.startswith("global_step")):
            raise UsageError(
                f"--tag {tag}: {PROGRAMS[program].title} loads {wanted or 'tags that begin with global_step'} only. "
                "Leave --tag out."
            )


def program_tag(program: str | None) -> str | None:
    """The tag that a program asks for, if it is always the same."""
    return None if program is None else PROGRAMS[program].tag


def program_documents(
    checkpoint: Checkpoint, name: str | None, ranks: int | None, warnings: list[str]
) -> list[PlannedFile]:
    """The program's files: the source's if they are still valid, otherwise new ones.

    ``ranks`` is None if any number of ranks may load the checkpoint. ``warnings`` lists files made or left out.
    """
    known = checkpoint.program_files
    if name is None:
        of = next((key for key, program in PROGRAMS.items() if any(map(program.random.fullmatch, known))), None)
        if of is not None:
            warnings.append(f"the source is a run of {PROGRAMS[of].title}: --for {of} carries what it resumes with.")
        return []
    program, files = PROGRAMS[name], []
    for file, path in known.items():
        if not program.others.fullmatch(file):
            continue
        try:
            program.check(path, checkpoint)
        except BadCheckpoint as error:
            warnings.append(f"{str(error).splitlines()[0].rstrip('.')}: it was left out.")
            continue
        files.append(copied_file(file, path))
    there = {str(file.path) for file in files}
    for file, make in program.made.items():
        if file not in there and not (file == "scheduler.pt" and _engine(checkpoint).lr_scheduler is not None):
            data, said = make(checkpoint)
            files.append(plain_file(file, data))
            warnings.append(f"{file} was made: {said}.")
    if name == "accelerate" and not files and _engine(checkpoint).lr_scheduler is None:
        warnings.append(
            "no scheduler.bin is known, which load_state asks for if the scheduler is not DeepSpeed's: save the "
            "state of a scheduler that was advanced to this step."
        )
    return [*files, *_random_states(checkpoint, program, ranks, warnings)]


def _random_states(
    checkpoint: Checkpoint, program: Program, ranks: int | None, warnings: list[str]
) -> list[PlannedFile]:
    found = {file: path for file, path in checkpoint.program_files.items() if program.random.fullmatch(file)}
    if found and (ranks is None or len(found) == ranks):
        if ranks is None:
            warnings.append(
                f"the random states are of {counted(len(found), 'rank')}: another world begins with new ones."
            )
        return [copied_file(file, path) for file, path in found.items()]
    what = (
        f"random states of {counted(len(found), 'rank')} do not fit {ranks}" if found else "no random states are known"
    )
    warnings.append(f"{what}: dropout and shuffling without a seed differ from those of an uninterrupted run.")
    return []


def _engine(checkpoint: Checkpoint) -> EngineRecord:
    return checkpoint.source.engine or EngineRecord()


def _step(checkpoint: Checkpoint) -> int:
    return 0 if checkpoint.progress is None else checkpoint.progress.step


def _skipped(checkpoint: Checkpoint) -> int:
    return _engine(checkpoint).skipped_steps
