"""Translates failures of the Hub's client, and unexpected answers, to errors for users."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten

from smolconv.errors import (
    BadCheckpoint,
    CorruptFile,
    MachineError,
    MissingFile,
    NotInstalled,
    SmolconvError,
    UsageError,
    some_of,
)
from smolconv.hub.address import SCHEME


@contextmanager
def client_errors(address: str) -> Iterator[None]:
    """Convert the client's exceptions to smolconv's; smolconv's own and unknown ones pass.

    Raises ``NotInstalled`` at once if the client is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise NotInstalled(
            f"An {SCHEME} address needs the package huggingface_hub, which cannot be imported ({error}).\n"
            "Expected it in this Python environment.\n"
            "Install it: pip install huggingface_hub"
        ) from error
    try:
        yield
    except SmolconvError:
        raise
    except Exception as error:
        ours = _as_ours(error, address)
        if ours is None:
            raise
        raise ours from error


@contextmanager
def sound(what: str) -> Iterator[None]:
    """Within the block, convert Python's errors about an unexpected answer of the Hub to ``CorruptFile``."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HFValidationError, json.JSONDecodeError, SmolconvError, OSError):  # the client's errors are OSErrors
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        if type(error).__name__ == "JSONDecodeError":  # requests' own class: the answer was not JSON, perhaps a proxy's
            raise
        raise CorruptFile(
            f"{what} cannot be read ({type(error).__name__}: {shorten(str(error), 120, placeholder=' ...')}).\n"
            "Expected the answer of a Hugging Face Hub: files with paths, sizes and digests.\n"
            "Check HF_ENDPOINT. Nothing was downloaded from it."
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Trouble:
    """A failure of the client, with the fields that distinguish failures."""

    error: BaseException
    address: str
    repo: str
    status: int | None  #: HTTP status of the Hub's answer, if there was one
    code: str | None  #: the Hub's error code
    said: str


def _as_ours(error: BaseException, address: str) -> SmolconvError | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    # "Not in the cache and the Hub could not be asked" or "an upload failed": its cause has the reason.
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)  # compare with None: requests' failed responses are falsy
    trouble = _Trouble(
        error=error,
        address=address,
        repo="/".join(address.removeprefix(SCHEME).partition("@")[0].split("/")[:2]),
        status=None if response is None else response.status_code,
        code=None if response is None else response.headers.get("X-Error-Code"),
        said=shorten(str(error) or "no message", 160, placeholder=" ..."),
    )
    return _refused(trouble) or _not_found(trouble) or _failed(trouble)


def _refused(trouble: _Trouble) -> SmolconvError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    if isinstance(trouble.error, GatedRepoError):
        return MachineError(
            f"{trouble.address}: access to {trouble.repo} is restricted and not granted (HTTP {trouble.status}).\n"
            "Expected the token of a user with access.\n"
            f"Request access on {constants.ENDPOINT}/{trouble.repo}, then run `hf auth login` or set HF_TOKEN."
        )
    # Without a token, the Hub answers 401 both for a private repository and for one that does not exist.
    if trouble.status in (401, 403) and trouble.code != "RepoNotFound":
        return MachineError(
            f"{trouble.address}: the Hub refused access (HTTP {trouble.status}). The repository is private, the token\n"
            "lacks permission or, without a token, the repository may not exist.\n"
            "Check the name, then run `hf auth login` or set HF_TOKEN."
        )
    return None


def _not_found(trouble: _Trouble) -> SmolconvError | None:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(trouble.error, RevisionNotFoundError):
        known = branches(trouble.repo)
        return BadCheckpoint(
            f"{trouble.address}: {trouble.repo} has no such revision.\n"
            f"Expected a branch, a tag or a commit{f' (branches: {some_of(known, 8, more=True)})' if known else ''}.\n"
            "Correct the part after the '@'."
        )
    if isinstance(trouble.error, RepositoryNotFoundError):
        return BadCheckpoint(
            f"{trouble.address}: the Hub has no model repository {trouble.repo} for this user "
            f"(HTTP {trouble.status}).\n"
            "Expected a public repository, or one that your token may read.\n"
            "Check the name; if it is private, run `hf auth login` or set HF_TOKEN."
        )
    not_remote = isinstance(trouble.error, LocalEntryNotFoundError)
    if trouble.status == 404 or (isinstance(trouble.error, EntryNotFoundError) and not not_remote):
        return MissingFile(
            f"{trouble.address}: the requested file does not exist ({trouble.said}).\n"
            "Expected every file that the repository lists.\n"
            "Try again, in case it was being changed; otherwise choose another revision."
        )
    return None


def _failed(trouble: _Trouble) -> SmolconvError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    error, kind = trouble.error, type(trouble.error)
    if isinstance(error, OfflineModeIsEnabled):
        return MachineError(
            f"{trouble.address}: not requested from the Hub, because HF_HUB_OFFLINE is set.\n"
            "Expected a network for this step.\nUnset HF_HUB_OFFLINE and run again."
        )
    if isinstance(error, HFValidationError):
        return UsageError(
            f"{trouble.address}: {trouble.said}\n"
            f"Expected {SCHEME}owner/name[/subfolder][@revision].\nCheck the address."
        )
    if trouble.status is not None:
        return MachineError(
            f"{trouble.address}: the Hub at {constants.ENDPOINT} answered HTTP {trouble.status} ({trouble.said}).\n"
            "Expected the answer to a request for this repository.\nWait a little and run again."
        )
    # hf_xet, the transfer of large files, reports a failed network as a bare RuntimeError.
    network = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "hf_xet"}
    if kind.__module__.partition(".")[0] in network or isinstance(error, (json.JSONDecodeError, RuntimeError)):
        return MachineError(
            f"{trouble.address}: the connection to {constants.ENDPOINT} failed ({kind.__name__}: {trouble.said}).\n"
            "Expected to reach the Hub.\n"
            "Check the network, the proxy and HF_ENDPOINT. HF_HUB_OFFLINE=1 uses the cache only."
        )
    if isinstance(error, OSError):
        return MachineError(
            f"{trouble.address}: reading or writing a local file failed ({kind.__name__}: {error}).\n"
            f"Expected space and permission in {constants.HF_HOME}.\nFree some space, or set HF_HOME to another folder."
        )
    return None


def branches(repo: str) -> list[str]:
    """The repository's branches for an error message; empty if they cannot be listed."""
    from huggingface_hub import HfApi

    try:
        return sorted(branch.name for branch in HfApi().list_repo_refs(repo).branches)
    except Exception:  # a failing hint must not replace the error
        return []
