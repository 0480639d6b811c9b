"""A finished checkpoint as a commit on the Hub."""

from __future__ import annotations

from pathlib import Path

from smolconv.errors import UsageError
from smolconv.hub.address import SCHEME, check_repo
from smolconv.hub.errors import client_errors

NEVER_PUSHED = ("*.lock", "*.journal", "*journal.json", "*journal.jsonl", "*.tmp")


def push_folder(folder: Path, repo: str, *, message: str, private: bool = False) -> str:
    """Upload a folder as one commit, creating the repository if needed, and return the commit's address.

    Locks and journals stay behind, and files that only the repository has are kept. ``private`` False leaves the
    choice to the owner's default. A push that asks for a private repository is refused when it exists as a public one.
    """
    check_repo(repo)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.\nExpected the folder of a finished checkpoint.\nCheck the path.")
    with client_errors(SCHEME + repo):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UsageError(
                f"{SCHEME}{repo} exists already and is public, so nothing was uploaded.\n"
                "Expected a private repository, or none.\n"
                "Make it private in its settings, or push under another name."
            )
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=list(NEVER_PUSHED)
        )
    return str(commit.commit_url)
