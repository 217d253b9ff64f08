# SPDX-License-Identifier: Apache-2.0
"""A server that speaks as much of the Hugging Face hub's protocol as a download and a push need.

In: nothing, or files of repositories. Out: an address for HF_ENDPOINT, and what was committed.
Everything is a small file: uploads come inside of the commit. Not here: LFS, Xet, branches.
"""

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

import yaml

TOKEN, READ_TOKEN = "hf_writes", "hf_reads"
COMMIT = "c" * 40


@dataclass
class Repository:
    """A repository as it stands: its files, and who may see it."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        url: its address.
        repositories: by their names.
        commits: messages of what was committed.
        broken: whether it refuses to commit.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    broken: bool = False

    def add(self, name: str, folder: Path, private: bool = False) -> None:
        """Take in a repository's files."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.repositories[name] = Repository(private, files)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Apply the lines of a commit."""
        files = self.repositories[name].files
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(line)


@contextmanager
def served() -> Iterator[Hub]:
    """Run a server as long as the block does."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing: tests look at what commands say."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "whoami-v2"]:
                self._whoami()
            case ["api", "validate-yaml"]:
                self._validate(json.loads(body)["content"])
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", _, _, "preupload", _]:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._json({"files": files})
            case ["api", "models", organization, name, "commit", _]:
                self._commit(f"{organization}/{name}", body)
            case ["api", "models", organization, name, *rest]:
                self._info(f"{organization}/{name}", rest)
            case [organization, name, "resolve", _, *path]:
                self._file(f"{organization}/{name}", "/".join(path))
            case _:
                self._json({"error": f"no such page: {self.path}"}, 404)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _whoami(self) -> None:
        roles = {TOKEN: "write", READ_TOKEN: "read"}
        if self._token() not in roles:
            self._json({"error": "Invalid username or password."}, 401)
            return
        token = {"displayName": "of a test", "role": roles[self._token()]}
        self._json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": token}})

    def _validate(self, card: str) -> None:
        """Take no card whose base model is not one of the hub's, as the hub does."""
        base = (yaml.safe_load(card.split("---\n")[1]) or {}).get("base_model", "a/b")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            self._json({"errors": [], "warnings": []})
            return
        message = f'"base_model" with value "{base}" is not valid. Use a model id.'
        self._json({"errors": [{"message": message}], "warnings": []}, 400)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.hub.repositories
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories.setdefault(name, Repository(private))
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def _commit(self, name: str, body: bytes) -> None:
        if self.hub.broken:
            self._json({"error": "the disks are full"}, 507)
            return
        self.hub.commit(name, [json.loads(line) for line in body.splitlines()])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _info(self, name: str, rest: list[str]) -> None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token() != TOKEN):
            self._missing()
        elif rest and rest[0] == "tree":
            self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                    for path, data in sorted(found.files.items())
                ]
            )
        else:
            siblings = [{"rfilename": path} for path in sorted(found.files)]
            self._json({"id": name, "sha": COMMIT, "private": found.private, "siblings": siblings})

    def _missing(self) -> None:
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str, path: str) -> None:
        found = self.hub.repositories.get(name)
        if found is None or path not in found.files:
            self._missing()
            return
        etag = hashlib.sha1(found.files[path]).hexdigest()
        self._send(found.files[path], 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(json.dumps(value).encode(), status, kind | (headers or {}))

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
