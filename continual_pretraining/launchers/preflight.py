"""Checks what a start needs before anything is written, for the command and its dry run.

It finds everything that is missing at once, each with the command that provides it, so that a user edits a recipe once.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from smolconv.checkpoint import Checkpoint
from smolconv.continual_pretraining.data.folders import check_sources, folders_ahead, open_folder, open_held_out
from smolconv.continual_pretraining.data.position import Position
from smolconv.continual_pretraining.engine.config import engine_config
from smolconv.continual_pretraining.engine.optimizer import idle_patterns
from smolconv.continual_pretraining.estimate.disk import disk_use
from smolconv.continual_pretraining.evaluation.lm_eval_engine import require_lm_eval
from smolconv.continual_pretraining.evaluation.tasks import check_include
from smolconv.continual_pretraining.launchers.launch import placement
from smolconv.continual_pretraining.launchers.launcher import count_gpus
from smolconv.continual_pretraining.launchers.registry import find_launcher
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoints import FOLDER, RunState, earlier_steps, find_resume
from smolconv.continual_pretraining.run.place import own_place, source_place
from smolconv.continual_pretraining.run.start import (
    changed_text,
    check_model,
    checked_own,
    completed_steps,
    plan_resumed,
    plan_start,
    read_source,
)
from smolconv.continual_pretraining.watch.metrics import missing_tracker
from smolconv.conversion import ConversionPlan
from smolconv.errors import (
    BadCheckpoint,
    MachineError,
    MissingFile,
    NotInstalled,
    SmolconvError,
    UsageError,
    counted,
    pip_install,
    some_of,
)
from smolconv.hub.address import is_hub_uri, require_known
from smolconv.hub.download import open_source
from smolconv.hub.published import with_published_progress
from smolconv.layouts.deepspeed.version import check_deepspeed
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.spec import ModelSpec

T = TypeVar("T")
#: Limit of problems listed.
_MOST_LINES = 7
#: Up to this many missing folders get their own command; of more, this many are named.
_MOST_COMMANDS, _MOST_FOLDERS = 3, 20


@dataclass
class Preflight:
    """The result of the checks. ``spec`` is None if the source cannot be read or does not fit the recipe."""

    recipe: Recipe
    run: Path
    spec: ModelSpec | None = None  #: of the trained model
    engine: Mapping[str, Any] | None = None  #: DeepSpeed's configuration; None: the step cannot be divided that way
    world_size: int = 0
    on_gpus: bool = False  #: else on CPUs
    first_step: int = 1
    tokens: dict[str, int] = field(default_factory=dict)  #: of the existing folders, by source
    told: list[str] = field(default_factory=list)  #: warnings that the ranks will print, too
    notes: list[str] = field(default_factory=list)  #: others
    problems: list[SmolconvError] = field(default_factory=list)

    def attempt(self, look: Callable[[], T]) -> T | None:
        """The result of ``look``; None if it raises, and the error becomes one of the problems."""
        try:
            return look()
        except SmolconvError as error:
            self.problems.append(error)
        return None

    @property
    def error(self) -> SmolconvError | None:
        """All problems as one error, with the class and exit code of the first."""
        if len(self.problems) < 2:
            return next(iter(self.problems), None)
        found = list(dict.fromkeys(str(problem).replace("\n", " ") for problem in self.problems))
        if len(found) > _MOST_LINES:
            found[_MOST_LINES - 1 :] = [f"and {len(found) - _MOST_LINES + 1} more"]
        first = f"{counted(len(self.problems), 'thing')} must be fixed before {self.recipe.name} can start."
        lines = [first, *(f"- {text}" for text in found)]
        return type(self.problems[0])("\n".join(lines))

    def refuse(self) -> None:
        """Raise ``error``, if there is one."""
        if (error := self.error) is not None:
            raise error


def preflight(recipe: Recipe, run: Path, resume: str) -> Preflight:
    """Check packages, launcher, source or checkpoint, data, exports and disk. Reads headers only; writes nothing.

    Raises ``UsageError`` if the ranks cannot be placed or cannot divide a step; everything else is in ``problems``.
    """
    found = Preflight(recipe, run)
    try:
        found.world_size = placement(recipe).world_size
    except UsageError:
        source = found.attempt(lambda: _source(recipe))
        if source is not None:
            placement(recipe, source[1].spec.num_heads)  # again, with the group sizes that divide the model's heads
        raise
    found.on_gpus = _takes_gpus(recipe)
    found.problems += [*_require_packages(recipe, on_gpus=found.on_gpus), *_require_launcher(recipe)]
    found.attempt(lambda: _require_output(recipe, run))
    backend = "nccl" if found.on_gpus else "gloo"
    found.engine = found.attempt(lambda: engine_config(recipe, found.world_size, backend))
    own = found.attempt(lambda: _own(recipe, run, resume))
    source = found.attempt(lambda: _source(recipe))
    if source is None:
        _open_data(found, None, None)
        return found
    as_it_is, trained = source
    if changed := changed_text(as_it_is.spec, trained.spec):
        found.told.append(changed)
    found.attempt(lambda: check_model(recipe, trained.spec, recipe.model.source))
    found.spec = trained.spec
    if idle := idle_patterns(parameter_shapes(trained.spec), recipe.optimizer, tied=trained.spec.tied):
        found.notes.append(
            f"optimizer.no_decay: {', '.join(idle)} matches no parameter, so it changes nothing. A regex is matched "
            "from the start of a name such as model.layers.0.input_layernorm.weight."
        )
    if own is not None:
        folder, state = own
        found.first_step = state.step + 1
        _open_data(found, state.position, trained.spec)
        plan = _look_at_own(found, folder, state, trained.spec)
    else:
        as_it_is = with_published_progress(as_it_is, recipe.model.source)
        _open_data(found, None, trained.spec)
        plan = _look_at_source(found, as_it_is, trained)
    if found.first_step <= recipe.schedule.train_steps:
        found.attempt(lambda: _require_space(found, plan))
    return found


# --- installed packages --------------------------------------------------------------------------------------------


def _require_packages(recipe: Recipe, *, on_gpus: bool) -> Iterator[SmolconvError]:
    """Python packages that every run imports, and those that a field of this recipe needs."""
    missing = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        yield NotInstalled(f"continue-train needs {', '.join(missing)}: {pip_install(missing)}.")
    try:
        check_deepspeed("continue-train")
    except NotInstalled as error:
        yield error
    for name in ("tensorboard", "trackio", "wandb"):
        if getattr(recipe.logging, name) and importlib.util.find_spec(name) is None:
            yield missing_tracker(name, "is not installed.")
    for name, module, asked in (
        ("model.liger is on", "liger_kernel", recipe.model.liger == "on"),
        ("model.attention is flash", "flash_attn", recipe.model.attention == "flash"),
    ):
        if asked and not on_gpus:
            yield UsageError(f"{name}, whose kernels need GPUs, but this run is on CPUs.\nSet it to auto.")
        elif asked and importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            yield NotInstalled(f"{name}, but {package} is not installed.\npip install {package}, or set it to auto.")
    if recipe.evaluation is not None and recipe.evaluation.tasks:
        try:
            require_lm_eval()
        except NotInstalled as error:
            yield error
        if recipe.evaluation.tasks_as == "slurm" and shutil.which("sbatch") is None:
            yield NotInstalled(
                "evaluation.tasks_as is slurm, but sbatch is not on this machine.\n"
                "Start the run on the cluster, or set evaluation.tasks_as: process."
            )
    pushes = recipe.export is not None and recipe.export.push is not None
    if pushes and importlib.util.find_spec("huggingface_hub") is None:
        yield NotInstalled("export.push needs huggingface-hub: pip install huggingface-hub.")


def _takes_gpus(recipe: Recipe) -> bool:
    asked = find_launcher(recipe.launch.launcher).asks_for_gpus(recipe.launch)
    return bool(count_gpus()) if asked is None else asked


def _require_launcher(recipe: Recipe) -> Iterator[SmolconvError]:
    for program in find_launcher(recipe.launch.launcher).started_by(recipe.launch):
        if shutil.which(program) is None:
            yield NotInstalled(
                f"launch.launcher {recipe.launch.launcher} starts ranks with {program}, which is not on this machine."
                "\nStart the run where it is installed (docs/clusters.md), or choose another launcher with --launcher."
            )


# --- what the run starts from ----------------------------------------------------------------------------------------


#: Options of convert that the advice of a reader names, and the fields that a recipe has for them.
_FIELDS = {
    "--config": "model.config", "--step": "model.step", "--architecture": "model.architecture",
    "--no-optimizer": "start.optimizer: false",
}  # fmt: skip


def _source(recipe: Recipe) -> tuple[Checkpoint, Checkpoint]:
    uri = recipe.model.source
    try:
        return read_source(recipe, open_source(uri, headers_only=True))
    except SmolconvError as error:
        if not isinstance(error, MissingFile) or is_hub_uri(uri) or os.path.exists(uri):
            told = re.sub(r"(?<![\w/-])--[a-z-]+", lambda found: _FIELDS.get(found[0], found[0]), str(error))
            error.args = (told,)
            raise
        raise MissingFile(
            f"model.source: {uri} is not there.\n"
            f"Expected a checkpoint of any layout. Fetch one: hf download OWNER/NAME --local-dir {shlex.quote(uri)}"
            "\nor use one on the Hub: --set model.source=hf://OWNER/NAME"
        ) from error


def _own(recipe: Recipe, run: Path, resume: str) -> tuple[Path, RunState] | None:
    """The checkpoint that the run resumes from, by its small state file; None for a new run."""
    own = find_resume(run, resume)
    if own is None:
        return None
    candidates = [own, *(earlier_steps(own) if recipe.checkpoints.on_damage == "previous" else [])]
    for number, folder in enumerate(candidates, 1):
        try:
            return folder, RunState.read(folder)
        except BadCheckpoint:
            if number == len(candidates):
                raise
    return None


def _look_at_own(found: Preflight, own: Path, state: RunState, spec: ModelSpec) -> ConversionPlan | None:
    recipe = found.recipe
    found.attempt(lambda: _compare_data(found, lambda: own_place(recipe, own, state, spec.vocab_size).events))

    def plan() -> ConversionPlan | None:
        try:
            checkpoint = checked_own(recipe, own, state)
        except BadCheckpoint:
            if recipe.checkpoints.on_damage == "previous":
                return None  # the ranks will read all of it, and fall back to an earlier one
            raise
        return plan_resumed(recipe, found.run, own, found.world_size, state, checkpoint)

    return found.attempt(plan)


def _look_at_source(found: Preflight, source: Checkpoint, trained: Checkpoint) -> ConversionPlan | None:
    recipe = found.recipe
    begins = recipe.start.optimizer

    def plan() -> ConversionPlan:
        return plan_start(recipe, trained, found.run, found.world_size, optimizer=begins, uri=recipe.model.source)

    planned = found.attempt(plan)
    step = found.attempt(lambda: completed_steps(recipe, source.progress))
    if step is not None:
        found.first_step = step + 1
        place = source_place
        found.attempt(lambda: _compare_data(found, lambda: place(recipe, source, step, trained.spec.vocab_size).events))
    return planned


# --- data and disk -------------------------------------------------------------------------------------


def _open_data(found: Preflight, position: Position | None, spec: ModelSpec | None) -> None:
    """Every folder that the run still reads: training data and held-out data."""
    recipe, data = found.recipe, found.recipe.data
    vocab_size = None if spec is None else spec.vocab_size
    found.attempt(lambda: check_sources(data))
    missing: list[str] = []
    for path, name in folders_ahead(data, position):
        if not os.path.exists(path):
            missing.append(path)
        elif (opened := found.attempt(partial(open_folder, path, name, data, vocab_size))) is not None:
            found.tokens[name] = opened.tokens
    evaluation = recipe.evaluation
    if evaluation is not None and evaluation.include_path is not None:
        found.attempt(partial(check_include, Path(evaluation.include_path), "evaluation.include_path"))
    for source in () if evaluation is None else evaluation.sources:
        if not os.path.exists(source.path):
            missing.append(source.path)
        else:
            found.attempt(partial(open_held_out, source, data, vocab_size))
    found.problems += _missing_folders(list(dict.fromkeys(missing)), recipe.model.source)


def _missing_folders(paths: Sequence[str], source: str) -> Iterator[MissingFile]:
    """Missing folders, each with the command that writes it; many of them in one problem."""
    words = f"--tokenizer {shlex.quote(source)}"
    if len(paths) > _MOST_COMMANDS:
        yield MissingFile(
            f"data: {len(paths)} folders of token files are missing: {some_of(paths, _MOST_FOLDERS, more=True)}.\n"
            f"Write each from text: smolconv tokenize TEXT FOLDER {words}"
        )
        return
    for path in paths:
        try:
            require_known(path)
        except UsageError as error:
            yield MissingFile(f"data: {error}")
            continue
        yield MissingFile(
            f"data: {path} is not there.\nExpected a folder of token files. Write it from text: "
            f"smolconv tokenize TEXT {shlex.quote(path)} {words}"
        )


def _compare_data(found: Preflight, events: Callable[[], Sequence[str]]) -> None:
    """Files that changed since they were read. Checked only if none is missing, which is reported before."""
    if not found.problems:
        found.told.extend(events())


def _require_output(recipe: Recipe, run: Path) -> None:
    """The run's folder, or where it will be made, is a folder that may be written to, and not one of the inputs."""
    nearest = next(path for path in (run, *run.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UsageError(f"output: {nearest} is not a folder.\nThe run needs a folder. Choose another with --output.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise MachineError(f"output: no permission to write in {nearest}.\nChange it, or choose another --output.")
    read = [recipe.model.source, *(source.path for stage in recipe.data.stages for source in stage.sources)]
    for path in [] if os.path.lexists(run / FOLDER) else read:
        if os.path.exists(path) and os.path.exists(run) and os.path.samefile(run, path):
            raise UsageError(
                f"output: {run} is what the run reads.\nIts checkpoints would lie among the files of {path}.\n"
                "Choose another folder with --output."
            )


def _require_space(found: Preflight, plan: ConversionPlan | None) -> None:
    """Disk space for what the ranks load and for one checkpoint, unless the run continues on a full disk."""
    assert found.spec is not None
    disk = disk_use(found.recipe, found.spec, found.first_step)
    start = 0 if plan is None else plan.bytes_written
    saved = disk.checkpoint_bytes if found.recipe.checkpoints.on_full_disk == "stop" else 0
    folder = next(path for path in (found.run, *found.run.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < max(start, saved):
        raise MachineError(
            f"output: {folder} has {free / 1e9:.2f} GB free, and the run needs {max(start, saved) / 1e9:.2f} GB.\n"
            f"Expected space for what the ranks load ({start / 1e9:.2f} GB) and then for a checkpoint "
            f"({saved / 1e9:.2f} GB).\nFree some space, or choose another disk with --output."
        )
