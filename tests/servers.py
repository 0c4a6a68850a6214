"""Servers on loopback: moto's S3, and a web server that fails on command."""

import contextlib
import hashlib
import logging
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest

Fault = int | Literal["reset", "short", "lie", "drip"]
"""A status; the connection broken off; half of the promised body; half of the body, which the header owns up to; or half of
the promised body, and then nothing for as long as the client waits."""


class FaultServer(ThreadingHTTPServer):
    """Serves `files` by path. The first of `faults[method, path]` befalls the next such request; `always` befalls all."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[tuple[str, str], list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.redirects: dict[str, str] = {}
        self.headers: defaultdict[str, dict[str, str]] = defaultdict(dict)
        """What is added to each answer for a path."""
        self.ranges = self.sizes = True
        self.secret: str | None = None
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that is stopped resets its connections, and `socketserver` would print a traceback."""

    def count(self, path: str) -> int:
        """How often a file was asked for."""
        return sum(asked == path and method == "GET" for method, asked, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def _answer(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((method, path, self.headers.get("Range")))
        script = self.server.faults[method, path]
        fault = script.pop(0) if script else self.server.always.get(path)
        if fault == "reset":
            # Closing with unsent data thrown away sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, int):
            self._send(fault, b"", self.server.headers[path])
        elif self.server.secret and self.headers.get("Authorization") != self.server.secret:
            self._send(401, b"", {})
        elif path in self.server.redirects:
            self._send(302, b"", {"Location": self.server.redirects[path]})
        elif path not in self.server.files:
            self._send(404, b"", {})
        else:
            self._send_file(method, self.server.files[path], fault)

    def _send_file(self, method: str, body: bytes, fault: Any) -> None:
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        if not self.server.ranges:
            del headers["Accept-Ranges"]
        if self.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return self._send(412, b"", {})
        status, wanted = 200, self.headers.get("Range")
        if wanted and self.server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            status, whole = 206, len(body)
            body = body[int(first) : int(last) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{whole}"
        if fault == "lie":
            body = body[: len(body) // 2]
        sent = len(body) // 2 if fault in ("short", "drip") else len(body)
        self._send(status, body, headers, sent=sent, has_body=method == "GET")
        if fault == "drip":
            self.wfile.flush()
            self.connection.recv(1)  # until the client hangs up
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str], sent: int = 0, has_body: bool = True) -> None:
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if self.server.sizes else {"Transfer-Encoding": "chunked"}
        for name, value in {**headers, **length}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body and not self.server.sizes:
            self.wfile.write(b"%x\r\n%s\r\n" % (sent, body[:sent]) if sent else b"")
            self.wfile.write(b"0\r\n\r\n" if sent == len(body) else b"")
        elif has_body:
            self.wfile.write(body[:sent])
        if has_body:
            self.close_connection = sent < len(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def fault_server() -> Iterator[FaultServer]:
    """A running server, stopped at the end."""
    with FaultServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@contextlib.contextmanager
def s3_endpoint(url: str) -> Iterator[None]:
    """Let s3fs and boto take `url` for AWS, try once, and forget it afterwards."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def s3_server() -> Iterator[Any]:
    """moto's S3 as AWS; yields a boto3 client with an empty bucket named `bucket`."""
    import boto3
    from moto.backends import get_backend
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    # What earlier servers of this process held would still be there.
    get_backend("s3").reset()
    host, port = server.get_host_and_port()
    try:
        with s3_endpoint(f"http://{host}:{port}"):
            client = boto3.client("s3")
            client.create_bucket(Bucket="bucket")
            yield client
    finally:
        server.stop()
