"""Uploads a finished checkpoint as one commit to the Hub."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from smolconv.errors import CorruptFile, UsageError
from smolconv.files import MOST_DOCUMENT_BYTES, read_bytes
from smolconv.hub.address import SCHEME, HubSource, check_repo, is_hub_uri
from smolconv.hub.card import CARD, CardFacts, compose, named
from smolconv.hub.errors import client_errors
from smolconv.parsing import parse_json_object
from smolconv.storage.manifest import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NEVER_PUSHED = ("*.lock", "*.journal", "*journal.json", "*journal.jsonl", "*.tmp", ".env", "*.pyc")
_CODE = "*.py"


@dataclass(frozen=True, kw_only=True)
class Published:
    url: str  #: of the commit
    licence: str | None
    notes: tuple[str, ...]  #: notes for the owner


def push_folder(
    folder: Path, repo: str, facts: CardFacts, *, message: str, private: bool = False, revision: str | None = None,
    with_code: bool = False,
) -> Published:  # fmt: skip
    """Upload a folder as one commit with its model card, and create the repository and branch if needed.

    Locks, journals and, without ``with_code``, Python files are not uploaded. Files that only the repository has are
    kept, and so is text that people wrote in its card. ``private`` False means the owner's default. With ``private``,
    an existing public repository is refused.
    """
    check_repo(repo)
    source = HubSource(repo=repo, subfolder="", revision=revision)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.\nExpected the folder of a finished checkpoint.\nCheck the path.")
    files, left = _files(folder, with_code=with_code)
    ours = read_bytes(folder / CARD, MOST_DOCUMENT_BYTES) if (folder / CARD).is_file() else None
    compose(facts, ours, None)  # raises for an invalid card before anything is created
    with client_errors(str(source)):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        _prepare(api, repo, private=private, revision=revision)
        composed = compose(facts, ours, _card_there(api, repo, revision))
        contents: dict[str, Path | bytes] = {**files}
        if MANIFEST in files:
            contents[MANIFEST] = _manifest(read_bytes(files[MANIFEST], MOST_DOCUMENT_BYTES))
        uploaded = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=each) for name, each in contents.items()]
        uploaded.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=composed.card))
        commit = api.create_commit(repo, uploaded, commit_message=message, revision=revision)
    notes = []
    if composed.licence is None:
        notes.append("neither the card nor the source's card names a licence, so others may not know what they may do "
                     "with the weights. Set it with --licence.")  # fmt: skip
    if composed.kept:
        notes.append(f"{SCHEME}{repo} has a {CARD} with its own text, which was kept instead of the folder's.")
    if left:
        notes.append(f"not uploaded without --with-code: {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}")
    return Published(url=str(commit.commit_url), licence=composed.licence, notes=tuple(notes))


def _files(folder: Path, *, with_code: bool) -> tuple[dict[str, Path], list[str]]:
    """Files to upload besides the card, by path in the repository, and code that is not uploaded."""
    files, left = dict[str, Path](), list[str]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = {".git", ".cache", "__pycache__"} & set(name.split("/"))
        if hidden or name == CARD or not path.is_file():
            continue
        if any(fnmatchcase(path.name, pattern) for pattern in NEVER_PUSHED):
            continue
        if fnmatchcase(path.name, _CODE) and not with_code:
            left.append(name)
            continue
        files[name] = path
    return files, left


def _manifest(data: bytes) -> bytes:
    """The manifest without the card, which differs on the Hub, and with the source's name instead of its path."""
    with suppress(CorruptFile, KeyError, TypeError, AttributeError):
        document = parse_json_object(data, MANIFEST)
        document["files"] = [each for each in document["files"] if each["path"] != CARD]
        uri = document["source"]["uri"]
        document["source"]["uri"] = named(uri)
        text = json.dumps(document, indent=1) + "\n"
        if not is_hub_uri(uri):  # warnings and files without a digest contain paths
            text = text.replace(json.dumps(str(Path(uri).resolve()))[1:-1], named(uri))
        return text.encode()
    return data  # an invalid manifest is reported when it is compared


def _prepare(api: HfApi, repo: str, *, private: bool, revision: str | None) -> None:
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise UsageError(
            f"{SCHEME}{repo} already exists and is public, so nothing was uploaded.\n"
            "Expected a private repository, or none.\n"
            "Make it private in its settings, or push under another name."
        )
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _card_there(api: HfApi, repo: str, revision: str | None) -> bytes | None:
    if not api.file_exists(repo, CARD, revision=revision):
        return None
    return read_bytes(Path(api.hf_hub_download(repo, CARD, revision=revision)), MOST_DOCUMENT_BYTES)
