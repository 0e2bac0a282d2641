"""An HTTP server on this machine that misbehaves as a script says, request by request."""

import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests


@dataclass(frozen=True)
class Reply:
    """How one request is answered; without arguments as it should be."""

    status: int = 0
    """Not 0: this, without the file."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Instead of the file."""
    stop_after: int | None = None
    """Bytes after which the connection is dropped."""
    announce: int | None = None
    """The Content-Length that is claimed, where it is not the true one; so many bytes are sent at most."""
    ranges: bool = True
    conditions: bool = True
    """False: If-Range is ignored."""
    at_most: int | None = None
    """Bytes of a range that are sent, however many are asked for."""
    tag: str = '"1"'
    hang: bool = False
    """Say nothing after the headers."""


class Loopback:
    """`files`: URL path -> bytes or a file; `script`: URL path -> replies to its first requests, then it behaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | Path] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.script: dict[str, list[Reply]] = {}
        self.always: dict[str, Reply] = {}
        self.bytes_per_s: float = 0
        self.requests: list[tuple[str, str]] = []
        """Path with query, and what range was asked for."""
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    outer.answer(self)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "Loopback":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        asked = request.headers.get("Range", "")
        self.requests.append((request.path, asked))
        replies = self.script.get(path, [])
        reply = replies.pop(0) if replies else self.always.get(path, Reply())
        if path not in self.files and reply.body is None and not reply.status:
            reply = Reply(status=404)
        if reply.status:
            content = reply.body or b""
        elif reply.body is not None:
            content = reply.body
        else:
            file = self.files[path]
            content = file if isinstance(file, bytes) else file.read_bytes()
        total, start, status = len(content), 0, reply.status or 200
        match = re.fullmatch(r"bytes=(\d+)-", asked)
        same = request.headers.get("If-Range", reply.tag) == reply.tag or not reply.conditions
        if match and same and reply.ranges and status == 200 and reply.body is None:
            start = int(match[1])
            status = 206 if start < total else 416
        content = content[start:]
        if status == 206 and reply.at_most is not None:
            content = content[: reply.at_most]
        request.send_response(status)
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{total}")
        if status == 416:
            request.send_header("Content-Range", f"bytes */{total}")
        if reply.announce is not None:
            content = content[: reply.announce]
        request.send_header("Content-Length", str(len(content) if reply.announce is None else reply.announce))
        request.send_header("Connection", "close")
        if reply.tag:
            request.send_header("ETag", reply.tag)
        for name, value in (self.headers.get(path, {}) | reply.headers).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.flush()
        if reply.hang:
            self.closing.wait(30)
            return
        content = content if reply.stop_after is None else content[: reply.stop_after]
        step = 2**16 if not self.bytes_per_s else max(1, int(self.bytes_per_s / 50))
        for i in range(0, len(content), step):
            request.wfile.write(content[i : i + step])
            if self.bytes_per_s:
                time.sleep(step / self.bytes_per_s)


PAGE = {"Content-Type": "text/html; charset=utf-8"}
FORM = Reply(  # gdown reads it line by line, as Google writes it
    body=b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
    b'<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    b'<input type="hidden" name="id" value="ID"><input type="hidden" name="confirm" value="t"></form></body></html>',
    headers=PAGE,
)
QUOTA = Reply(
    body=b"""<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>""",
    headers=PAGE,
)


def be_drive(server: Loopback, file: bytes | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `server` answer what gdown asks of Google: at /uc with the virus-scan form, at /download with the file."""

    class ToLoopback(requests.adapters.HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *args: object, **kwargs: object) -> requests.Response:
            assert request.url
            request.url = server.url + request.url.split("google.com", 1)[1]
            return super().send(request, *args, **kwargs)

    def session() -> requests.Session:
        made = requests.Session()
        made.mount("https://", ToLoopback())
        return made

    monkeypatch.setattr(requests, "session", session)
    server.files["/download"] = file
    server.headers["/download"] = {
        "Content-Disposition": 'attachment; filename="kfold.zip"',
        "Content-Type": "application/octet-stream",
    }
    server.always["/uc"] = FORM
