"""Addresses on the Hugging Face Hub: ``hf://owner/name[/subfolder][@revision]``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from smolconv.errors import UsageError

SCHEME = "hf://"
#: Such as s3://bucket/folder; one slash is left of the two where the text went through a ``Path``.
_ADDRESS = re.compile(r"(?!hf://)([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """The location of a checkpoint on the Hub."""

    repo: str  #: ``owner/name``
    subfolder: str  #: ``""`` for the root
    revision: str | None  #: branch, tag or commit; None for the default branch

    def __post_init__(self) -> None:
        check_repo(self.repo)
        if self.subfolder and any(part in ("", ".", "..") for part in self.subfolder.split("/")):
            raise UsageError(
                f"The folder {self.subfolder!r} is not a path inside {self.repo}.\n"
                "Expected names with single slashes between them, without '.' and '..'.\n"
                f"Write it like {SCHEME}{self.repo}/folder/in/it."
            )
        # The rules of `git check-ref-format` that keep a name inside the cache's refs/ folder.
        if self.revision is not None and not re.fullmatch(
            r"(?!.*(\.\.|//))[^\s\\~^:?*\[/.-][^\s\\~^:?*\[]*(?<![/.])", self.revision
        ):
            raise UsageError(
                f"{self.revision!r} cannot be a revision of {self.repo}.\n"
                "Expected a branch, a tag or a commit after the '@', such as @main.\n"
                "Omit '@...' for the default branch."
            )

    def __str__(self) -> str:
        folder = f"/{self.subfolder}" if self.subfolder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{folder}{revision}"

    def inside(self, path: str) -> str:
        """The address of a file or folder of the repository."""
        return str(replace(self, subfolder=path))


def is_hub_uri(text: str) -> bool:
    return text.startswith(SCHEME)


def require_known(text: str) -> None:
    """Raise ``UsageError`` for an address that smolconv cannot open."""
    found = _ADDRESS.match(text)
    if found is None:
        return
    scheme, rest = found[1].lower(), found[2].lstrip("/")
    if SCHEME.startswith(f"{scheme}:"):
        advice = f"Two slashes were expected: {SCHEME}{rest}."
    elif "huggingface.co/" in rest:
        folder = rest.partition("huggingface.co/")[2].split("/tree/")[0]
        advice = f"For a repository on the Hub write {SCHEME}{folder}."
    elif scheme == "file":
        advice = f"Write the path alone: /{rest}."
    else:
        advice = "Copy it to a local disk first, or mount it (docs/faq.md has the commands)."
    raise UsageError(
        f"{scheme}://{rest} is not an address that smolconv can open.\n"
        f"A local path or {SCHEME}owner/name was expected.\n{advice}"
    )


def parse_hub_uri(uri: str) -> HubSource:
    """Read ``hf://owner/name[/subfolder][@revision]``. The revision comes last and may hold slashes.

    Raises ``UsageError`` when the address is malformed.
    """
    path, at, revision = uri.removeprefix(SCHEME).partition("@")
    parts = path.removesuffix("/").split("/")
    if not is_hub_uri(uri) or len(parts) < 2 or (at and not revision) or "@" in revision:
        raise UsageError(
            f"{uri!r} is not an address on the Hub.\n"
            f"Expected {SCHEME}owner/name[/subfolder][@revision].\n"
            f"Write it like {SCHEME}HuggingFaceTB/SmolLM2-135M or {SCHEME}HuggingFaceTB/SmolLM3-3B@main."
        )
    if parts[0] in ("datasets", "spaces", "kernels", "buckets", "models"):
        raise UsageError(
            f"{uri}: {parts[0]!r} is a kind of repository, not an owner.\n"
            f"Expected a model repository, {SCHEME}owner/name[/subfolder][@revision].\n"
            "smolconv reads model repositories only; omit 'models/'."
        )
    return HubSource(repo="/".join(parts[:2]), subfolder="/".join(parts[2:]), revision=revision or None)


def check_repo(repo: str) -> None:
    # The Hub's rules (huggingface_hub.utils.validate_repo_id), but the owner is required.
    name = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?<![.-])"
    if not re.fullmatch(f"{name}/{name}", repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise UsageError(
            f"{repo!r} is not the name of a repository.\n"
            "Expected owner/name, of letters, digits, '-', '_' and '.'.\n"
            "Copy it from the top of the model's page."
        )
