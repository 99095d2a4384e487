"""A stand-in for the Hugging Face hub on this machine: the endpoints that huggingface_hub asks when it downloads.

    GET  /api/models/OWNER/MODEL[/revision/REV]         the files and their sizes
    GET  /api/models/OWNER/MODEL/refs                   branches
    GET  /api/models/OWNER/MODEL/tree/REV               the files once more, as newer versions ask
    HEAD, GET  /OWNER/MODEL/resolve/REV/FILE            with ETag, X-Repo-Commit, ranges

A model has revisions, each a folder. `requests` keeps what was asked, `break_after` cuts a transfer short once.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class StandInHub:
    """models: "OWNER/MODEL" -> revision -> folder. gated: those that need a token. break_after: bytes after which the
    next transfer of a large file ends. ignores_ranges: every answer is all of a file. sent: bytes of files."""

    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    break_after: int | None = None
    ignores_ranges: bool = False
    sent: int = 0
    requests: list[str] = field(default_factory=list)  # "GET /path [range]"
    url: str = ""

    def asked_for(self, file: str) -> list[str]:
        """The requests for the content of a file."""
        return [request for request in self.requests if request.startswith("GET") and file in request]


def commit_of(folder: Path) -> str:
    """Forty digits, as a commit has."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def etag_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        self._json({}, 404)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        span = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {path} {span}".strip())
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*|/(refs))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None:
            return self._json({"error": "not here"}, 404)
        repo = found[1]
        if repo not in self.hub.models:
            return self._error("RepoNotFound", 401 if self.headers.get("Authorization") is None else 404)
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._error("GatedRepo", 403)
        revisions = self.hub.models[repo]
        if api and api[4]:
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": "0" * 40} for name in revisions]
            return self._json({"branches": refs, "tags": [], "converts": []})
        wanted = (api[3] if api else file[2]) or "main"
        by_commit = {commit_of(folder): folder for folder in revisions.values()}
        folder = revisions.get(wanted) or by_commit.get(wanted)
        if folder is None:
            return self._error("RevisionNotFound", 404)
        if api:
            return self._listing(repo, folder, tree=api[2] == "tree")
        return self._file(folder, file[3])

    def _listing(self, repo: str, folder: Path, tree: bool) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if tree:
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag_of(path)[:40]}
                for name, path in zip(names, files, strict=True)
            ]
            return self._json(entries)
        siblings = [
            {"rfilename": name, "size": path.stat().st_size, "blobId": etag_of(path)[:40]}
            for name, path in zip(names, files, strict=True)
        ]
        self._json({"id": repo, "modelId": repo, "sha": commit_of(folder), "siblings": siblings, "tags": []})

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._error("EntryNotFound", 404)
        data = path.read_bytes()
        asked = "" if self.hub.ignores_ranges else self.headers.get("Range", "")
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        start, end = (0, len(data)) if span is None else (int(span[1]), int(span[2] or len(data) - 1) + 1)
        body = data[start:end] if self.command == "GET" else b""
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{etag_of(path)}"')
        self.send_header("X-Repo-Commit", commit_of(folder))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data[start:end])))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}")
        self.end_headers()
        if self.hub.break_after is not None and len(body) > self.hub.break_after:
            self.wfile.write(body[: self.hub.break_after])
            self.hub.break_after = None
            self.close_connection = True
            self.connection.close()
            return
        for first in range(0, len(body), 1 << 20):
            try:
                self.wfile.write(body[first : first + (1 << 20)])
            except ConnectionError:  # whoever asked has read enough
                self.close_connection = True
                return
            self.hub.sent += len(body[first : first + (1 << 20)])

    def _error(self, code: str, status: int) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[StandInHub]:
    """A hub that answers until the block ends."""
    hub = StandInHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
