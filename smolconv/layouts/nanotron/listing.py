"""Names of nanotron's folders: how a run or a step is recognised, which step is meant, and which files are needed.

A run folder holds a folder per step, named by its number, and ``latest.txt`` with the newest step's number.
"""

from __future__ import annotations

import re

from smolconv.errors import CorruptFile, MissingFile
from smolconv.layouts.listing import AnyPath, P, companions, files_below, pointer_text, there

MODEL_CONFIG = "model_config.json"
LATEST = "latest.txt"
METADATA = "checkpoint_metadata.json"
#: Documents of a step.
DOCUMENTS = (MODEL_CONFIG, "config.yaml", METADATA)
#: Folders of a step: weights, Adam's state, and what else training continues from.
WEIGHTS, STATE = "model", ("optimizer", "lr_scheduler", "random")
#: Folder next to the step folder in which smolconv's writer puts the tokenizer and other documents.
ASSETS = "smolconv_assets"
#: Names by which a checkpoint is recognised.
MARKS: tuple[str, ...] = (MODEL_CONFIG, LATEST)


def detect(folder: AnyPath) -> bool:
    """Whether ``folder`` is a nanotron run folder or one of its step folders."""
    return _is_step_folder(folder) or (folder / LATEST).is_file() or any(map(_is_step_of_run, _children(folder)))


def holds_training(folder: AnyPath) -> bool:
    """``Listing.holds_training``."""
    homes = (folder, *(child for child in _children(folder) if is_number(child.name)))
    return any((home / WEIGHTS).is_dir() and (home / METADATA).is_file() for home in homes)


def _is_step_folder(folder: AnyPath) -> bool:
    return there(folder / MODEL_CONFIG) or (folder / WEIGHTS / "model").is_dir()


def _is_step_of_run(folder: AnyPath) -> bool:
    return is_number(folder.name) and _is_step_folder(folder)


def _children(folder: P) -> list[P]:
    return list(folder.iterdir()) if folder.is_dir() else []


def is_number(name: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", name) is not None


def find_step_folder(folder: P, step: int | None = None) -> P:
    """The step folder that ``folder`` is or holds: ``step``, or else the one that ``latest.txt`` names.

    Raises ``MissingFile`` if it does not exist, with the existing steps.
    """
    if _is_step_folder(folder):
        if step is not None and folder.name != str(step):
            raise MissingFile(
                f"{folder} is one step's folder, but --step asks for {step}. Name the run folder instead."
            )
        return folder
    latest = folder / LATEST
    if step is None and there(latest):
        text = pointer_text(latest)
        if not is_number(text):
            raise CorruptFile(
                f"{latest} holds {text!r:.60}; expected a step number.\n"
                "It names the folder of the newest step.\nChoose a step with --step."
            )
        step = int(text)
    if step is not None and _is_step_of_run(folder / str(step)):  # without listing the other steps
        return folder / str(step)
    steps = {int(path.name): path for path in _children(folder) if _is_step_of_run(path)}
    if step is None and len(steps) == 1:
        return next(iter(steps.values()))
    if step not in steps:
        found = ", ".join(map(str, sorted(steps))) or "none"
        asked = f"no {LATEST}" if step is None else f"step {step} is not there"
        raise MissingFile(f"{folder}: {asked}; steps found: {found}. Choose one with --step.")
    return steps[step]


def needed_files(folder: P, *, step: int | None, optimizer: bool) -> list[P]:
    """``Listing.needed_files``."""
    home = find_step_folder(folder, step)
    wanted = (WEIGHTS, *STATE) if optimizer else (WEIGHTS,)
    documents = [path for path in (folder / LATEST, *(home / name for name in DOCUMENTS)) if there(path)]
    tensors = [path for name in wanted for path in files_below(home / name)]
    return [*companions(folder), *companions(home), *documents, *tensors, *files_below(home.parent / ASSETS)]
