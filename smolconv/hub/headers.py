"""Downloads only the headers of safetensors files; the rest of each file reads as zeros."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from smolconv.errors import CorruptFile, MachineError
from smolconv.hub.commit import RETRIES, HubCommit
from smolconv.hub.digests import was_checked
from smolconv.storage.atomic import appearing_whole

# Headers computed from the names and shapes, bf16 in one file: SmolLM2-135M 30,530 bytes (272 tensors), 360M 32,670,
# 1.7B 25,181, SmolLM3-3B 37,844 (326 tensors). One request is enough for each; a longer header takes a second one.
FIRST_READ_BYTES = 48 * 1024
HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself (MAX_HEADER_SIZE)


class StandIns:
    """Creates a commit's files under ``root``: safetensors as headers only, the rest as links into the Hub's cache."""

    def __init__(self, commit: HubCommit, root: Path) -> None:
        self.commit = commit
        self.root = root
        top = root.parents[2]
        if not top.is_dir():
            top.mkdir(mode=0o700, parents=True, exist_ok=True)
            (top / "README").write_text("Model files here are placeholders for `smolconv inspect`: headers only.\n")

    def place(self, path: str) -> None:
        target = self.root / path
        if target.exists():  # a commit never changes
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        local = self._whole_file(path)
        with appearing_whole(target) as part:
            if local is not None:
                try:
                    part.hardlink_to(os.path.realpath(local))
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(local, part)
            else:
                size = self.commit.listed[path].size
                with part.open("wb") as file:
                    file.write(self._header(path, size))
                    file.truncate(size)

    def _whole_file(self, path: str) -> Path | None:
        if not path.endswith(".safetensors"):
            return self.commit.download(path)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.commit.source.repo, path, revision=self.commit.sha)
        # A file that was never verified is not hashed just for its header; a request is cheaper.
        known = isinstance(found, str) and was_checked(Path(found), self.commit.listed[path])
        return Path(found) if isinstance(found, str) and known else None

    def _header(self, path: str, size: int) -> bytes:
        start = self._read(path, 0, min(size, FIRST_READ_BYTES), size)
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size, HEADER_LIMIT_BYTES):
            raise CorruptFile(
                f"{self.commit.source.inside(path)} is {size} bytes, but its header would end at {length}.\n"
                "Expected the header inside the file.\n"
                "Choose another revision, or ask the repository's owner to upload it again."
            )
        if length > len(start):
            start += self._read(path, len(start), length, size)
        return start[:length]

    def _read(self, path: str, start: int, stop: int, size: int) -> bytes:
        """The bytes ``[start, stop)`` of a file of ``size`` bytes."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        if start == stop:
            return b""
        headers = build_hf_headers()
        headers["Range"] = f"bytes={start}-{stop - 1}"
        headers["Accept-Encoding"] = "identity"  # a range of compressed bytes would be useless
        response = http_backoff(
            "GET",
            hf_hub_url(self.commit.source.repo, path, revision=self.commit.sha),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            max_retries=RETRIES,
            base_wait_time=0.5,
        )
        hf_raise_for_status(response)
        content: bytes = response.content
        if response.status_code == 200 and len(content) == size:  # the server ignores ranges
            content = content[start:stop]
        if len(content) != stop - start:
            raise MachineError(
                f"{self.commit.source.inside(path)}: received {len(content)} bytes for {headers['Range']}.\n"
                f"Expected {stop - start}, from a server that supports range requests.\n"
                "Try again; if it persists, check HF_ENDPOINT and the proxy."
            )
        return content


def headers_root(repo: str, sha: str) -> Path:
    """The folder of a commit's placeholders."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "smolconv-headers" / repo / sha
