"""A stand-in for the Hugging Face hub: repositories of models in memory, behind what is used of its HTTP interface.

What asks it is the real huggingface_hub, with its cache, its tokens and its errors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
TOKEN = "hf_of_somebody"
USER = "someone"


@dataclass
class Repository:
    """Commits by their hash, and branches, each the hash of a commit."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Add files to those of a branch; the hash."""
        whole = self.commits.get(self.branches.get(branch, ""), {}) | files
        content = repr((len(self.commits), branch, sorted(whole.items()))).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name] = whole
        self.branches[branch] = name
        return name


@dataclass
class Hub:
    """The stand-in; ``writers`` are the tokens that may write and see what is private."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    writers: tuple[str, ...] = (TOKEN,)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, name: str, directory: Path, branch: str = "main", *, private: bool = False) -> str:
        """Make a directory's files a commit; the hash."""
        repository = self.repositories.setdefault(name, Repository(private))
        return repository.commit(branch, {path.name: path.read_bytes() for path in directory.iterdir()})

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for a request."""
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return _json(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path):
            name, what, revision = found[1], found[2], unquote(found[3] or "main")
            return self._api(name, what or "revision", revision, method, token, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], unquote(found[2]), unquote(found[3]), token)
        return _error(404, "EntryNotFound", path)

    def _create(self, asked: dict[str, Any], token: str) -> tuple[int, dict[str, str], bytes]:
        if token not in self.writers:
            return _error(401, "", "Invalid username or password.")
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if name in self.repositories else 200
        if status == 200:
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.repositories[name] = Repository(private)
            self.repositories[name].commit("main", {".gitattributes": b""})
        return _json(status, {"url": f"{self.url}/{name}", "name": name})

    def _api(
        self, name: str, what: str, revision: str, method: str, token: str, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        repository = self._seen(name, token)
        if repository is None:
            return _error(401 if not token else 404, "RepoNotFound", "Repository not found")
        if method == "POST" and token not in self.writers:
            return _error(403, "", "Forbidden: you have no write access to this repository")
        if what == "branch":
            known = revision in repository.branches
            repository.branches.setdefault(revision, repository.branches["main"])
            return _json(409 if known else 200, {})
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return _json(200, {"files": files})
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            files = {one["path"]: base64.b64decode(one["content"]) for one in added}
            made = repository.commit(revision, files)
            return _json(200, {"success": True, "commitOid": made, "commitUrl": f"{self.url}/{name}/commit/{made}"})
        files = repository.commits[commit]
        if what == "tree":
            return _json(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ],
            )
        siblings = [{"rfilename": path} for path in files]
        return _json(200, {"id": name, "sha": commit, "siblings": siblings, "private": repository.private, "tags": []})

    def _file(self, name: str, revision: str, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        repository = self._seen(name, token)
        if repository is None:
            return _error(401 if not token else 404, "RepoNotFound", "Repository not found")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[commit].get(path)
        if content is None:
            status, headers, text = _error(404, "EntryNotFound", "Entry not found")
            return status, {**headers, "X-Repo-Commit": commit}, text
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content

    def _seen(self, name: str, token: str) -> Repository | None:
        """A repository, if it is there and the token may see it: the hub says the same of both."""
        repository = self.repositories.get(name)
        return None if repository is None or (repository.private and token not in self.writers) else repository


def _json(status: int, content: Any) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return status, {"Content-Type": "application/json", **headers}, json.dumps({"error": message}).encode()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub under ``Hub.url`` while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve()

        do_HEAD = do_POST = do_GET

        def _serve(self) -> None:
            body = self._body()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path, token))
            status, headers, content = hub.answer(self.command, path, token, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
