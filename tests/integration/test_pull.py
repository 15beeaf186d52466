"""Pulling over HTTP: whole, cut short, interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mesh.errors import InputError, ModelFileError
from node_agent.adapters.model_pull import pull_model
from node_agent.adapters.model_store import ModelStore
from tests.builders import write_gguf


class Server(ThreadingHTTPServer):
    """Serves one file: all of it, half of it, or slowly."""

    content = b""
    released: threading.Event

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.content
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if self.path == "/half":
            return
        if self.path == "/slow":
            self.server.released.wait(30)
        self.wfile.write(content[len(content) // 2 :])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.released = threading.Event()
        made.content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.released.set()
        made.shutdown()
        thread.join()


def test_a_url_is_pulled(server: Server, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "home")
    seen: list[tuple[int, int]] = []
    pull_model(
        store, "tiny", f"{server.url}/model", progress=lambda _, done, total: seen.append((done, total))
    )
    assert store.card("tiny").source == f"{server.url}/model"
    assert (len(server.content), len(server.content)) in seen


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [("half", ModelFileError, "ended after"), ("gone", InputError, "404")],
)
def test_what_does_not_come_whole_leaves_nothing(
    server: Server, tmp_path: Path, path: str, kind: type[Exception], words: str
) -> None:
    store = ModelStore(tmp_path / "home")
    with pytest.raises(kind, match=words):
        pull_model(store, "tiny", f"{server.url}/{path}")
    assert list(store.root.iterdir()) == []


def test_ctrl_c_in_the_middle_leaves_nothing(server: Server, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-m", "mesh", "model", "--home", str(home), "pull", "tiny"]
    process = subprocess.Popen(
        [*command, "--from", f"{server.url}/slow"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 20
    while not list(home.glob("models/.tmp-*/.tmp-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output.decode()
    assert b"Traceback" not in output
    assert list((home / "models").iterdir()) == []
