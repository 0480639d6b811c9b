"""Exports the model after the last step, and compares each export with the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from smolconv.checkpoint import Checkpoint
from smolconv.continual_pretraining.recipe.schema import Export
from smolconv.conversion import ConvertOptions, plan_conversion, plan_from_checkpoint, run_conversion
from smolconv.errors import BadCheckpoint, ParityFailed, UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

if TYPE_CHECKING:
    import torch

FOLDER = "export"


def check_exports(export: Export, trained: Checkpoint, run: Path) -> None:
    """Plan every export from the checkpoint that will be trained. Raises ``UsageError`` if one is impossible."""
    for layout in export.formats:
        try:
            plan_from_checkpoint(trained, str(trained.root), run / FOLDER / layout, _options(export, layout))
        except BadCheckpoint as error:
            raise UsageError(
                f"export.formats: {layout} cannot hold the model of {trained.root}.\n{error}\n"
                f"Nothing was trained. Remove {layout} from export.formats, or train another source."
            ) from None


def _options(export: Export, layout: str) -> ConvertOptions:
    return ConvertOptions(to=layout, optimizer=None if export.optimizer else False)


def export_run(export: Export, run: Path, checkpoint: Path, weights: Mapping[str, torch.Tensor] | None) -> list[str]:
    """Convert ``checkpoint`` to every format below ``run/export``; returns messages for the user.

    With ``export.verify``, and before a push, each export must equal ``weights``, the engine's own, bit for bit, and
    compute the same logits as the checkpoint. Otherwise it is kept as ``.failed`` and ``ParityFailed`` is raised.
    """
    said = []
    for layout in export.formats:
        target = run / FOLDER / layout
        target.parent.mkdir(parents=True, exist_ok=True)
        plan = plan_conversion(checkpoint, target, _options(export, layout))
        reason = ""
        push = export.push if layout == "hf" else None
        if export.verify or push is not None:
            from smolconv.verification.compare import verify_conversion

            result = run_conversion(
                plan, overwrite=True, verifier=lambda plan, folder: verify_conversion(plan.prepared, folder).to_json()
            )
            reason = f": {(result.verification or {})['reason']}"
            if weights is not None:
                reason += f"; equal to the engine's {_compared(target, weights)} tensors"
        else:
            run_conversion(plan, overwrite=True)
        said.append(f"exported {target}{reason}")
        if push is not None:
            from smolconv.continual_pretraining.run.card import facts_of_run
            from smolconv.hub.push import push_folder

            verified = f"smolconv compared the weights with the run's last checkpoint{reason}."
            facts = facts_of_run(run, push.partition("/")[2], verified)
            pushed = push_folder(target, push, facts, message="Trained with smolconv continue-train")
            said += [f"pushed {pushed.url}", *pushed.notes]
    return said


def _compared(target: Path, weights: Mapping[str, torch.Tensor]) -> int:
    """The number of tensors, all equal to the engine's. Raises ``ParityFailed`` for the first that is not."""
    import torch

    from smolconv.verification.forward import to_torch

    written = read_checkpoint(target, ReadOptions(optimizer=False)).parameters
    if sorted(written) != sorted(weights):
        wrong = sorted(set(written) ^ set(weights))[0]
    else:
        unequal = (name for name, tensor in weights.items() if not torch.equal(to_torch(written[name]), tensor))
        wrong = next(unequal, "")
    if wrong:
        names = (target.with_name(f"{target.name}.failed{number}") for number in ("", *range(2, 1000)))
        failed = next(name for name in names if not name.exists() and not name.is_symlink())
        target.rename(failed)
        raise ParityFailed(f"{target}: {wrong} differs from the engine's. The export is kept as {failed}.")
    return len(written)
