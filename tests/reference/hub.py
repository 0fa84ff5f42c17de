"""A stand-in for the Hugging Face hub on loopback: what `huggingface_hub` asks when it downloads.

Models are given as commits, newest first, each with files by path. `main` is the newest.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, to put on the hub."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


class Hub:
    """A server with models; also a context manager that stops it."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Files]] = {}
        """Files by commit, the oldest first, by model."""
        self.refs: dict[str, dict[str, str]] = {}
        """Commits by branch or tag, by model."""
        self.token = ""
        """Opens what is `private` or `gated`."""
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.asked: list[str] = []
        """Method and path of every request."""
        self.tokens: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def push(self, model: str, files: Files, refs: Sequence[str] = ("main",)) -> str:
        """Add a commit, point branches and tags at it, and return its hash."""
        content = repr(
            sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        )
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.models.setdefault(model, {})[commit] = files
        self.refs.setdefault(model, {}).update(dict.fromkeys(refs, commit))
        return commit

    def downloaded(self) -> list[str]:
        """The names of the files that were downloaded so far."""
        return [
            path.rpartition("/")[2]
            for path in self.asked
            if path.startswith("GET") and "/resolve/" in path
        ]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        in_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if in_api else parts
        model, rest = "/".join(parts[:2]), parts[2:]
        kind, revision, name = (
            (*rest[:2], "/".join(rest[2:]))[:3] if len(rest) > 1 else ("", "", "")
        )
        may = bool(self.token) and token == self.token
        if model not in self.models or (model in self.private and not may):
            # The hub does not tell whether a private model exists.
            code = {"X-Error-Code": "RepoNotFound"} if token else {}
            return (404 if token else 401), code, b"{}"
        commit = self.refs[model].get(revision or "main", revision)
        files = self.models[model].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if in_api and kind in ("", "revision"):
            siblings = [{"rfilename": each} for each in files]
            return 200, {}, _json({"id": model, "sha": commit, "siblings": siblings})
        if in_api and kind == "tree":
            return 200, {}, _json([_entry(each, data) for each, data in files.items()])
        if model in self.gated and not may:
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b"{}"
        if kind != "resolve" or name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[name])}"'}
        return 200, headers, files[name]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path, token)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = _answer

        def log_message(self, *args: Any) -> None:
            """No lines on stderr, which tests read."""

    return Handler
