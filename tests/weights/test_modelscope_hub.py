# SPDX-License-Identifier: Apache-2.0
"""Models of ModelScope: its own library against a local server, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from dsjax.errors import ConfigError
from dsjax.weights import modelscope_hub
from dsjax.weights.hf_directory import SafetensorsWriter
from dsjax.weights.model_folder import open_model_folder

ROOT = Path(__file__).parents[2]
A = np.arange(12, dtype=np.float32).reshape(4, 3)

READ = """
import sys
from dsjax.errors import ConfigError
from dsjax.weights.hf_directory import open_source

for path in sys.argv[1:]:
    try:
        source = open_source(path)
        print(source.read("a").sum(), *sorted(file.name for file in source.aux_files()))
    except ConfigError as error:
        print(error)
"""


class Server(BaseHTTPRequestHandler):
    """As much of ModelScope as a download needs: one repository, which files it gave."""

    files: dict[str, bytes] = {}
    given: list[str] = []

    def do_GET(self) -> None:
        """Answer with the list of files, or with one."""
        parts, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        if not parts.path.startswith("/api/v1/models/deepseek-ai/tiny"):
            self._send(404, json.dumps({"Code": 404, "Message": "no such model"}).encode())
        elif parts.path.endswith("/repo/files"):
            listed = [
                {
                    "Path": name,
                    "Name": name,
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for name, data in self.files.items()
            ]
            self._json({"Files": listed})
        elif parts.path.endswith("/repo"):
            name = query["FilePath"][0]
            self.given.append(name)
            self._send(200, self.files[name])
        else:
            self._json({"Name": "tiny", "Path": "deepseek-ai"})

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _json(self, data: object) -> None:
        self._send(200, json.dumps({"Code": 200, "Success": True, "Data": data}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[type[Server], str]]:
    """A server with the smallest model, and its address."""
    weights = tmp_path / "model.safetensors"
    with SafetensorsWriter(weights, [("a", A.dtype, A.shape)]) as writer:
        writer.append("a", A)
    files = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": weights.read_bytes(),
        "pytorch_model.bin": b"not wanted",
        "tokenizer.json": b"{}",
    }
    handler = type("Handler", (Server,), {"files": files, "given": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler, f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def read(url: str, folder: Path, *paths: str) -> list[str]:
    """Open checkpoints in a process of its own: the library reads its environment when imported."""
    home = {"HOME": str(folder), "MODELSCOPE_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        env=os.environ | home | {"MODELSCOPE_ENDPOINT": url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.modelscope
def test_a_model_is_downloaded_and_then_read_from_the_cache(
    server: tuple[type[Server], str], tmp_path: Path
) -> None:
    handler, url = server
    tiny, other = "modelscope://deepseek-ai/tiny", "modelscope://deepseek-ai/other"
    found, refused = read(url, tmp_path, tiny, other)
    assert found == "66.0 config.json tokenizer.json"
    assert sorted(set(handler.given)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert refused.startswith(f"model.path: got '{other}', expected a repository of ModelScope")
    (offline,) = read("http://127.0.0.1:9", tmp_path, tiny)
    assert offline == found


def test_without_its_library_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelscope_hub, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        open_model_folder("modelscope://deepseek-ai/tiny", None)
    assert str(caught.value) == (
        "model.path: got 'modelscope://deepseek-ai/tiny', expected the library that reads "
        "modelscope://, which is not installed; pip install modelscope"
    )


@pytest.mark.parametrize("path", ["modelscope://tiny", "modelscope://a/b/c", "modelscope:///a/b"])
def test_a_name_that_is_no_repository_s(path: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{path}', expected modelscope://organization/name"):
        open_model_folder(path, None)
