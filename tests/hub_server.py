"""A Hugging Face Hub on loopback: as much of its interface as creating a repository and uploading a folder takes."""

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest
import yaml

TOKEN = "hf_" + "s3cret" * 5
_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


class HubServer(ThreadingHTTPServer):
    """`repositories` by id: their visibility and files. The next request to a path in `refusals` gets that status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.tokens: set[str | None] = set()
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        found = self.server.repositories.get(name)
        answer = {"id": name, "private": found["private"], "siblings": []} if found else {"error": "Repository not found"}
        self._answer(200 if found else 404, answer)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        for path, (status, message) in self.server.refusals.items():
            if self.path.startswith(path):
                self._answer(status, {"error": message})
                return
        kind = self.path.split("/")[-2] if "/models/" in self.path else self.path.removeprefix("/api/")
        self._answer(*{"repos/create": self._create, "validate-yaml": self._validate, "preupload": self._modes,
                       "commit": self._commit}[kind](body))  # fmt: skip

    def _create(self, body: bytes) -> tuple[int, dict[str, Any]]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        self.server.repositories[name] = {"private": asked.get("visibility") == "private", "files": {}}
        return 200, {"url": url, "name": name}

    def _validate(self, body: bytes) -> tuple[int, dict[str, Any]]:
        card = json.loads(body)["content"]
        front = yaml.safe_load(card.split("---\n")[1])
        problems = [f"{key} is no id" for key in ("base_model",) if key in front and not _ID.match(front[key])]
        if front.get("license") == "mine":
            problems.append("license must be one of those listed")
        return (400 if problems else 200), {"errors": [{"message": one} for one in problems], "warnings": []}

    def _modes(self, body: bytes) -> tuple[int, dict[str, Any]]:
        files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
        return 200, {"files": files}

    def _commit(self, body: bytes) -> tuple[int, dict[str, Any]]:
        name = "/".join(self.path.split("/")[3:5])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name]["files"][line["value"]["path"]] = content
            else:
                self.server.messages.append(line["value"]["summary"])
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}"}

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if status >= 400 and "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def hub_server(token: str | None = TOKEN) -> Iterator[HubServer]:
    """A running Hub that huggingface_hub takes for the one, with a token in the environment or without."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
        server.shutdown()
