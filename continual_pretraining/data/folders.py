"""Opens the token folders of a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from smolconv.continual_pretraining.tokens.files import TokenFolder
from smolconv.errors import UsageError

if TYPE_CHECKING:
    from smolconv.continual_pretraining.data.position import Position
    from smolconv.continual_pretraining.recipe.schema import Data, Source


def open_folders(data: Data, position: Position | None, vocab_size: int | None) -> dict[str, TokenFolder]:
    """The folders of stages that are not finished at the position, by path. One rank can open them for all.

    Raises as ``TrainingData`` does.
    """
    check_sources(data)
    return {path: open_folder(path, name, data, vocab_size) for path, name in folders_ahead(data, position)}


def folders_ahead(data: Data, position: Position | None) -> list[tuple[str, str]]:
    """(path, name) of the folders of stages that are not finished at the position, each once."""
    names = [stage.name for stage in data.stages]
    left = position["stages"][-1]["name"] if position and position["stages"] else None
    found: dict[str, str] = {}
    for stage in data.stages[names.index(left) if left in names else 0 :]:
        for source, name in zip(stage.sources, stage.names):
            found.setdefault(plain_path(source.path), name)
    return list(found.items())


def open_held_out(source: Source, data: Data, vocab_size: int | None) -> TokenFolder:
    """A held-out folder, named like its losses. Raises what ``TokenFolder.open`` does."""
    return open_folder(source.path, source.name or plain_path(source.path).rpartition("/")[2], data, vocab_size)


def check_sources(data: Data) -> None:
    """Refuse what cannot be counted separately: a folder twice in a stage, or one name for two folders."""
    paths: dict[str, str] = {}
    for stage in data.stages:
        folders = [plain_path(source.path) for source in stage.sources]
        first: dict[str, str] = {}
        for path in folders:
            place = os.path.abspath(path)  # a link with another name is taken as meant: a trial with one small folder
            if place in first:
                other = "" if first[place] == path else f", also as {first[place]}"
                raise UsageError(
                    f"data: stage {stage.name} names the folder {path} twice{other}.\n"
                    "Both would read the same samples.\nName it once, with the sum of the weights."
                )
            first[place] = path
        for name, path in zip(stage.names, folders):
            if paths.setdefault(name, path) != path:
                raise UsageError(
                    f"data: two sources are named {name}: {paths[name]} and {path} (stage {stage.name}).\n"
                    "Tokens are counted by name.\nGive one of them another name: in the recipe."
                )


def open_folder(path: str, name: str, data: Data, vocab_size: int | None) -> TokenFolder:
    """Open one folder with the settings of ``data``. Raises what ``TokenFolder.open`` does."""
    return TokenFolder.open(
        path, data.sequence_length, name=name, file_seed=data.file_seed, vocab_size=vocab_size,
        eos_token_id=data.eos_token_id if data.boundaries == "eos" else None,
    )  # fmt: skip


def plain_path(path: str) -> str:
    """The key that identifies a folder, without the slashes and dots that make no difference."""
    return path.rstrip("/") if "://" in path else str(Path(path))


def recorded_as(source: Source) -> str:
    """The folder's name in the record of the source checkpoint."""
    return plain_path(source.recorded_as or source.path)
