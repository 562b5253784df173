"""Object stores on this machine that speak S3 over HTTP: a whole one, and one that breaks off in mid-answer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pyarrow import fs

from data_pipeline import storage

BUCKET = "texts"


class Store:
    """A running server; `put` and `put_folder` fill it, `kill` ends it as a crash would."""

    def __init__(self, process: subprocess.Popen[bytes], endpoint: str) -> None:
        self.process, self.endpoint = process, endpoint

    @property
    def files(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(endpoint_override=self.endpoint, region="us-east-1", allow_bucket_creation=True)

    def put(self, key: str, contents: bytes) -> None:
        with self.files.open_output_stream(f"{BUCKET}/{key}", compression=None) as out:
            out.write(contents)

    def put_folder(self, prefix: str, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running_store(**environment: str) -> Iterator[Store]:
    """Starts a server of moto with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, **environment}, **quiet)
    try:
        _wait_for(process, port)
        yield Store(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process and its children find the store, and no other, by the usual variables."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._connect.cache_clear()


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(1200):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


@contextlib.contextmanager
def breaking_store(objects: Mapping[str, bytes], breaks: int) -> Iterator[str]:
    """Serves objects, and cuts the first `breaks` answers to GET in the middle of what they announced."""
    left = [breaks]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

        def _answer(self, send: bool) -> None:
            data = objects.get(self.path.removeprefix(f"/{BUCKET}/"))
            if data is None:
                self.send_error(404)
                return
            etag, start, stop = hashlib.md5(data, usedforsecurity=False).hexdigest(), 0, len(data)
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last) + 1, len(data))
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if send and left[0]:
                left[0] -= 1
                self.wfile.write(data[start : (start + stop) // 2])
                self.close_connection = True
            elif send:
                self.wfile.write(data[start:stop])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
