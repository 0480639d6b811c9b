"""smolconv publish"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolconv.commands import console
from smolconv.commands.app import app

_EPILOG = """
**Examples**

    smolconv publish smollm2-hf team/smollm2 --source checkpoints/nanotron

    smolconv publish run/export/hf team/law --source run --licence mit
"""


@app.command(epilog=_EPILOG)
def publish(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder in Hugging Face layout.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub: owner/name.")],
    source: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Verify FOLDER now against this checkpoint, in any layout."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence, such as apache-2.0. Default: the card's.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository; refuse a public one.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch to publish to; created if it does not exist.")
    ] = None,
    with_code: Annotated[bool, typer.Option("--with-code", help="Upload .py files as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Verify a checkpoint, write its model card, and upload it to the Hub."""
    from smolconv.continual_pretraining.run.card import facts_of_run, run_of_export
    from smolconv.errors import UsageError
    from smolconv.hub.address import check_repo
    from smolconv.hub.card import facts_of_source
    from smolconv.hub.push import push_folder

    check_repo(repo)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} has no config.json.\nExpected the folder of a checkpoint in Hugging Face layout.\n"
            f"Make one: smolconv convert {folder} OUT --to hf --push {repo}"
        )
    run, title = run_of_export(folder), repo.partition("/")[2]
    verified = _verified(folder, source, run)
    if run is not None:
        facts = facts_of_run(run, title, verified, licence)
    else:
        facts = facts_of_source(source, title, verified, licence)
    done = push_folder(
        folder, repo, facts, message="Publish with smolconv", private=private, revision=revision, with_code=with_code
    )  # fmt: skip
    console.warn(done.notes)
    if as_json:
        console.print_json(
            {"schema": 1, "repo": repo, "revision": revision or "main", "url": done.url, "licence": done.licence,
             "verified": verified, "warnings": list(done.notes)}
        )  # fmt: skip
    else:
        console.say(f"verified: {verified}")
        console.line(done.url)


def _verified(folder: Path, source: str | None, run: Path | None) -> str:
    """A sentence on how the weights were verified. Raises ``UsageError`` if they were not."""
    from smolconv import api
    from smolconv.errors import ParityFailed, UsageError
    from smolconv.hub.card import HOW_TO_REPEAT, named
    from smolconv.storage.manifest import PROOF

    card = folder / PROOF
    if source is None and card.is_file():
        return _by_card(folder, card)
    if source is None:
        against = "SRC" if run is None else str(run / "checkpoints")
        raise UsageError(
            f"{folder} has not been verified, so nothing was uploaded.\n"
            "Expected --source, the checkpoint that the weights come from, or a card of verify --proof in the folder.\n"
            f"Verify and publish: smolconv publish {folder} owner/name --source {against}"
        )
    report = api.verify(source, folder, proof=card, bar=console.progress_bar)
    if not report.passed:
        raise ParityFailed(
            f"{folder} is not the model of {source}: {report.reason}.\n"
            "Expected the same tensors and the same logits. Nothing was uploaded.\n"
            f"See where they differ: smolconv verify {source} {folder} --per-layer"
        )
    return f"smolconv compared the weights with {named(source)}: {report.reason}. {HOW_TO_REPEAT}"


def _by_card(folder: Path, path: Path) -> str:
    from smolconv.errors import ParityFailed
    from smolconv.hub.card import HOW_TO_REPEAT
    from smolconv.layouts.registry import read_checkpoint
    from smolconv.verification.proof import read_proof
    from smolconv.verification.proof_check import doubts, other_weights, weaknesses

    card = read_proof(path)
    wrong = [*doubts(card), *other_weights(card, read_checkpoint(folder))]
    wrong += [] if card.passed else [f"the two were not the same model: {card.reason}"]
    if wrong:
        raise ParityFailed(
            f"{path} does not hold for the weights in its folder: {wrong[0]}.\n"
            "Expected a card of these weights that passed. Nothing was uploaded.\n"
            "Make another: smolconv publish with --source and the checkpoint that the weights come from."
        )
    weak = "".join(f" Note that {each}." for each in weaknesses(card))
    return f"smolconv compared the weights with {card.a.name} on {card.made}: {card.reason}.{weak} {HOW_TO_REPEAT}"
