"""A small Hugging Face Hub on 127.0.0.1, for tests and ``make day``, which run the real client without a
network.

It keeps repositories in memory, answers the requests that ``huggingface_hub`` 0.36, 1.33 and 2.4 were seen to make, and
records each of them with the bytes that went over the wire. As on the real Hub, files above a size (and all weights)
are stored as LFS objects: ``resolve`` redirects to another host for them, which must not be sent the user's token (the
client tells hosts apart by name, so that host is ``localhost``). Xet is not played: set HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".onnx")
LFS_FROM_BYTES = 1_000_000
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request and what was sent back."""

    method: str
    path: str
    file: str | None  #: the path in the repository, for ``resolve`` and for the LFS object it redirects to
    status: int
    sent_bytes: int  #: of the body
    byte_range: str | None


@dataclass(kw_only=True)
class Failure:
    """What to do instead of answering requests whose "METHOD path" matches ``pattern``."""

    pattern: str
    status: int | None  #: None drops the connection
    code: str | None = None  #: for the header X-Error-Code
    after_bytes: int = 0  #: of the true answer's body, sent before a drop
    times: int | None = None  #: None means always
    retry_after: str | None = None


@dataclass(kw_only=True)
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)  #: name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  #: commit -> path -> content
    messages: dict[str, str] = field(default_factory=dict)  #: commit -> message


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_FROM_BYTES


class FakeHub:
    """The server, from ``with`` to the end of its block."""

    def __init__(self, *, token: str = "hf_fake", page_entries: int = 1000) -> None:
        self.token = token  #: whoever sends it may see private and gated repositories, and write
        self.page_entries = page_entries  #: of a listing, after which the client must ask for the next page
        self.answers_ranges = True
        self.repositories: dict[str, Repository] = {}
        self.exchanges: list[Exchange] = []
        self.failures: list[Failure] = []
        self.lfs_objects: dict[str, bytes] = {}
        self.lies: dict[str, list[bytes]] = {}  #: path -> what is sent in its place, one after the other
        self.listing: Callable[[list[dict[str, object]]], object] | None = None  #: what is sent in place of a listing
        self.in_circles = False  #: every page of a listing says that it is followed by itself
        self.info: Callable[[dict[str, object]], object] | None = None  #: and of what is said of a repository
        self.lock = threading.Lock()

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def storage_url(self) -> str:
        return f"http://localhost:{self.server.server_address[1]}"

    def commit(self, repo: str, files: Mapping[str, bytes], *, branch: str = "main", message: str = "") -> str:
        """Put a commit on a branch that holds exactly these files, and return its hash."""
        repository = self.repositories.setdefault(repo, Repository())
        digest = hashlib.sha1(f"{repo} {branch} {len(repository.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + hashlib.sha1(files[path]).digest())
        sha = digest.hexdigest()
        repository.commits[sha] = dict(files)
        repository.messages[sha] = message
        repository.branches[branch] = sha
        for path, content in files.items():
            if is_lfs(path, len(content)):
                self.lfs_objects[hashlib.sha256(content).hexdigest()] = content
        return sha

    def fail(
        self,
        pattern: str,
        *,
        status: int | None = None,
        code: str | None = None,
        after_bytes: int = 0,
        times: int | None = None,
        retry_after: str | None = None,
    ) -> None:
        """Answer matching requests with an error, or drop the connection when there is no status."""
        self.failures.append(
            Failure(
                pattern=pattern, status=status, code=code, after_bytes=after_bytes, times=times, retry_after=retry_after
            )
        )

    def files_read(self, repo: str) -> dict[str, int]:
        """Of each file of a repository that was read from: the bytes sent of it."""
        read: dict[str, int] = {}
        for exchange in self.exchanges:
            if exchange.file is not None and exchange.sent_bytes and exchange.file.startswith(repo + "/"):
                path = exchange.file[len(repo) + 1 :]
                read[path] = read.get(path, 0) + exchange.sent_bytes
        return read

    def sent_bytes(self) -> int:
        return sum(exchange.sent_bytes for exchange in self.exchanges)

    def forget_exchanges(self) -> None:
        self.exchanges.clear()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away, or a connection dropped on purpose


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    # Nagle's algorithm would hold each small body back until the client's delayed acknowledgement, 40 ms later.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.file: str | None = None
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.body = self._read_body()
        path = parts.path
        failure = self._failure_for(path)
        if failure is not None and failure.status is not None:
            return self._error(failure.status, failure.code, "failed on purpose", failure.retry_after)
        self.drop_after = failure.after_bytes if failure is not None else None
        if self.drop_after == 0:
            return self._drop(0)
        for method, pattern, action in self._routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        return self._error(404, None, f"the fake Hub has no {self.command} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _failure_for(self, path: str) -> Failure | None:
        with self.hub.lock:
            for failure in self.hub.failures:
                if failure.times != 0 and re.search(failure.pattern, f"{self.command} {path}"):
                    if failure.times is not None:
                        failure.times -= 1
                    return failure
        return None

    # Answers ----------------------------------------------------------------------------------------------------------

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        if self.drop_after is not None and body:
            self.wfile.write(body[: self.drop_after])
            return self._drop(min(self.drop_after, len(body)))
        # Recorded first: the client may look at the record as soon as it has the last byte.
        self._record(status, len(body))
        self.wfile.write(body)

    def _drop(self, sent_bytes: int) -> None:
        self._record(0, sent_bytes)
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _record(self, status: int, sent_bytes: int) -> None:
        exchange = Exchange(
            method=self.command,
            path=self.path,
            file=self.file,
            status=status,
            sent_bytes=sent_bytes,
            byte_range=self.headers.get("Range"),
        )
        with self.hub.lock:
            self.hub.exchanges.append(exchange)

    def _send_json(self, document: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str | None, message: str, retry_after: str | None = None) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if retry_after is not None:
            headers["Retry-After"] = retry_after
        if code:
            headers["X-Error-Code"] = code
        self.drop_after = None
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send_content(self, content: bytes, headers: Mapping[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not self.hub.answers_ranges:
            return self._send(200, content, headers)
        start, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start > last:
            return self._error(416, None, "range not satisfiable")
        content_range = {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
        return self._send(206, content[start : last + 1], {**headers, **content_range})

    # What is asked for ------------------------------------------------------------------------------------------------

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repository(self, repo: str) -> Repository | None:
        """The repository, or None after an error was sent."""
        found = self.hub.repositories.get(repo)
        if found is not None and (not found.private or self._has_token()):
            return found
        if self._has_token():
            self._error(404, "RepoNotFound", "Repository not found")
        else:  # the Hub does not tell a visitor whether a private repository exists
            self._error(401, None, "Invalid username or password.")
        return None

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(repo)
        if repository is None:
            return None
        sha = repository.branches.get(revision or "main", revision)
        if sha not in repository.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repository.commits[sha]

    def _info(self, repo: str, revision: str = "") -> None:
        found = self._commit(repo, revision)
        if found:
            repository = self.hub.repositories[repo]
            said = self.hub.info or (lambda document: document)
            self._send_json(
                said({
                    "_id": "0",
                    "id": repo,
                    "modelId": repo,
                    "sha": found[0],
                    "private": repository.private,
                    "gated": repository.gated,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": path} for path in sorted(found[1])],
                })
            )  # fmt: skip

    def _tree(self, repo: str, revision: str, folder: str) -> None:
        found = self._commit(repo, revision)
        if not found:
            return
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries: dict[str, dict[str, object]] = {}
        for path, content in found[1].items():
            if not path.startswith(prefix):
                continue
            names = path[len(prefix) :].split("/")
            for depth in range(1, len(names) if recursive else min(len(names), 2)):
                above = prefix + "/".join(names[:depth])
                entries[above] = {"type": "directory", "oid": git_hash(above.encode()), "size": 0, "path": above}
            if recursive or len(names) == 1:
                entry: dict[str, object] = {"type": "file", "oid": git_hash(content), "size": len(content)}
                if is_lfs(path, len(content)):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
                entries[path] = {**entry, "path": path}
        if folder and not entries:
            return self._error(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        start = int(self.query.get("cursor", "0"))
        stop = start + self.hub.page_entries
        page = [entries[path] for path in sorted(entries)][start:stop]
        headers = {}
        if self.hub.in_circles:
            headers["Link"] = f'<{self.hub.url}{self.path}>; rel="next"'
        elif stop < len(entries):
            address = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&expand=False&cursor={stop}"
            headers["Link"] = f'<{address}>; rel="next"'
        self._send_json(page if self.hub.listing is None else self.hub.listing(page), headers)

    def _refs(self, repo: str) -> None:
        repository = self._repository(repo)
        if repository is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in repository.branches.items()
            ]
            self._send_json({"branches": branches, "converts": [], "tags": []})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._commit(repo, revision)
        if not found:
            return
        sha, files = found
        if self.hub.repositories[repo].gated and not self._has_token():
            return self._error(401, "GatedRepo", f"Access to model {repo} is restricted.")
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        self.file = f"{repo}/{path}"
        content = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not is_lfs(path, len(content)):
            return self._send_content(self._sent(path, content), {**headers, "ETag": f'"{git_hash(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return self._send(
            302, b"", {**headers, **linked, "Location": f"{self.hub.storage_url}/lfs/{digest}/{repo}/{path}"}
        )

    def _sent(self, path: str, content: bytes) -> bytes:
        """The file's content, or what is to be sent in its place."""
        lies = self.hub.lies.get(path)
        return lies.pop(0) if lies and self.command == "GET" else content

    def _lfs_object(self, oid: str, file: str) -> None:
        if "Authorization" in self.headers:
            return self._error(400, None, "only one way to authorise is allowed")
        self.file = file
        content = self._sent(file.split("/", 2)[2], self.hub.lfs_objects[oid])
        return self._send_content(content, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    # What is uploaded -------------------------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        if not self._has_token():
            self._error(401, None, "Invalid username or password.")
        return self._has_token()

    def _create(self) -> None:
        if self._may_write():
            wanted = json.loads(self.body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if repo in self.hub.repositories:
                body = json.dumps({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
                return self._send(409, body.encode(), {"Content-Type": "application/json"})
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[repo] = Repository(private=private)
            self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
            self._send_json({"url": f"{self.hub.url}/{repo}", "name": repo})
        return None

    def _branch(self, repo: str, revision: str) -> None:
        found = self._commit(repo, "main") if self._may_write() else None
        if found:
            branches = self.hub.repositories[repo].branches
            if revision in branches:
                return self._send(409, json.dumps({"error": "Reference already exists"}).encode())
            branches[revision] = found[0]
            self._send_json({})
        return None

    def _preupload(self, repo: str, revision: str) -> None:
        found = self._commit(repo, revision) if self._may_write() else None
        if found:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._send_json({"files": modes})

    def _lfs_batch(self, repo: str) -> None:
        if self._may_write():
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                answer = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.hub.lfs_objects:
                    answer["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}", "header": {}}}
                objects.append(answer)
            self._send_json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, None, "the content does not have the digest that was announced")
        self.hub.lfs_objects[oid] = self.body
        return self._send(200)

    def _receive_commit(self, repo: str, revision: str) -> None:
        found = self._commit(repo, revision) if self._may_write() else None
        if not found:
            return
        files = dict(found[1])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                return self._error(400, None, f"unknown operation {item['key']}")
        sha = self.hub.commit(repo, files, branch=revision, message=message)
        self._send_json({"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def _validate_yaml(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    _routes = (
        (("GET",), f"/api/models/{REPO}", _info),
        (("GET",), f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", _info),
        (("GET",), f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _tree),
        (("GET",), f"/api/models/{REPO}/refs", _refs),
        (("GET", "HEAD"), f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
        (("GET", "HEAD"), "/lfs/(?P<oid>[0-9a-f]{64})/(?P<file>.+)", _lfs_object),
        (("POST",), "/api/repos/create", _create),
        (("POST",), f"/api/models/{REPO}/branch/(?P<revision>[^/]+)", _branch),
        (("POST",), "/api/validate-yaml", _validate_yaml),
        (("POST",), f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _preupload),
        (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _lfs_batch),
        (("PUT",), "/upload/(?P<oid>[0-9a-f]{64})", _upload),
        (("POST",), f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _receive_commit),
    )
