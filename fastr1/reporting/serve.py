"""Serves the page of a run while the run goes on, to this machine alone and for reading alone.

`/` is the page, built anew when a file it is made of has changed; `/version` says which state it shows; every other
path is a file inside the run folder. A request under another host name is refused: a site in the user's browser could
otherwise make its own name lead here and read the run.
"""

from __future__ import annotations

import hashlib
import mimetypes
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastr1.reporting.page import build_page
from fastr1.reporting.read_run import read_run
from fastr1.reporting.run_log import RunLogError

HOST = "127.0.0.1"
DEFAULT_PORT = 8765
REST = 4  # at least this many times as long as a page took to build lies between two builds
_TEXT = {".jsonl", ".json", ".txt", ".log", ".md"}


class ServeError(RunLogError):
    """The page cannot be served. The message names the port and the remedy."""


class LivePage:
    """The page of a run as it is now. Any number of threads may ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._lock = threading.Lock()
        self._page, self._version = b"", ""
        self._not_before = 0.0

    def get(self) -> tuple[str, bytes]:
        """Its version and content. Raises: RunLogError when the folder is no run's."""
        with self._lock:
            version = self._look()
            start = time.monotonic()
            if version != self._version and start >= self._not_before:
                page = build_page(read_run(self.folder), version=version).encode("utf-8")
                self._page, self._version = page, version
                end = time.monotonic()
                self._not_before = end + REST * (end - start)
            return self._version, self._page

    def _look(self) -> str:
        """The same as long as no file of the page has changed."""
        files = [
            path for pattern in ("*.json*", "evaluation/*.json", "frames/index*") for path in self.folder.glob(pattern)
        ]
        states = []
        for path in sorted(files):
            try:
                status = path.stat()
            except FileNotFoundError:  # it is being replaced
                continue
            states.append((path.name, status.st_size, status.st_mtime_ns))
        states.append(("final", int((self.folder / "final").is_dir()), 0))
        return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


class RunServer(ThreadingHTTPServer):
    """Listens on the loopback address. Raises: ServeError where the port is taken."""

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = DEFAULT_PORT) -> None:
        self.page = LivePage(Path(folder))
        self.page.get()  # a folder that is no run's is an error now
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            remedy = f"give another with --port (0: any that is free); {error.strerror}"
            raise ServeError(f"cannot listen on port {port} of {HOST}: {remedy}") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is none."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/"


def serve(folder: str | Path, port: int = DEFAULT_PORT) -> None:
    """Serves until it is interrupted. Raises: RunLogError when the folder is no run's, ServeError."""
    with RunServer(folder, port) as server:
        print(f"{server.url} shows {folder} while it goes on; Ctrl-C ends it", flush=True)
        server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: RunServer
    server_version, sys_version = "fastr1", ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the page asks every five seconds."""

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.port
        if self.headers.get_all("Host") not in ([f"{HOST}:{port}"], [f"localhost:{port}"]):
            self._refuse(HTTPStatus.FORBIDDEN, f"open http://{HOST}:{port}/", with_body)
            return
        try:
            path = unquote(urlsplit(self.path).path)
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "that is no address", with_body)
            return
        if path in ("/", "/version"):
            try:
                version, page = self.server.page.get()
            except RunLogError as error:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error), with_body)
                return
            content = page if path == "/" else version.encode()
            self._begin("text/html; charset=utf-8" if path == "/" else "text/plain; charset=utf-8", len(content))
            if with_body:
                self.wfile.write(content)
            return
        self._answer_file(path, with_body)

    def _answer_file(self, path: str, with_body: bool) -> None:
        """A regular file that lies, links followed, inside the run folder."""
        root = self.server.page.folder
        try:
            file = (root / path.lstrip("/")).resolve()
            if path.startswith("//") or "\\" in path or not file.is_relative_to(root) or not file.is_file():
                raise FileNotFoundError
            content = open(file, "rb")  # noqa: SIM115 (closed by the `with` below)
        except (OSError, ValueError, RuntimeError):  # names that are none, circles of links
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such file in the run folder", with_body)
            return
        with content:
            kind = "text/plain; charset=utf-8" if file.suffix in _TEXT else mimetypes.guess_type(file.name)[0]
            size = file.stat().st_size
            self._begin(kind or "application/octet-stream", size)
            while with_body and size > 0 and (part := content.read(min(size, 2**20))):
                self.wfile.write(part)
                size -= len(part)  # a file that is still growing is sent as it was

    def _refuse(self, status: HTTPStatus, reason: str, with_body: bool) -> None:
        content = f"{reason}\n".encode()
        self._begin("text/plain; charset=utf-8", len(content), status)
        if with_body:
            self.wfile.write(content)

    def _begin(self, kind: str, length: int, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
