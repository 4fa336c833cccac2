"""A stand-in for the Hugging Face hub's endpoints on loopback, as far as push and hf-hub: use them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """repos: files by repository; stored: large files by sha256. refuse: paths' parts that fail, with their status;
    busy: how often they answer 503 before they do not."""

    token: str = "hf_thetokenthatmayneverbeshown"
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    url: str = ""


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _any(self) -> None:
        hub, path, body = self.hub, self.path.split("?")[0], self._body()
        hub.requests.append(f"{self.command} {path}")
        if waiting := next((part for part, times in hub.busy.items() if part in self.path and times), None):
            hub.busy[waiting] -= 1
            self._answer({"error": "busy"}, 503)
        elif status := next((status for part, status in hub.refuse.items() if part in self.path), None):
            echo = f"refused {self.headers.get('Authorization')}"
            self._answer({"error": echo}, status, {"X-Error-Message": echo})
        elif path.startswith("/large/") and self.command == "PUT":
            hub.stored[path.removeprefix("/large/")] = body
            self._answer(b"", headers={"ETag": "x"})
        elif self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer({"error": "Invalid username or password."}, 401)
        else:
            self._answer_known(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _answer_known(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            known = repo in hub.repos
            hub.repos.setdefault(repo, {})
            hub.private.setdefault(repo, bool(asked.get("private")) or asked.get("visibility") == "private")
            self._answer({"url": f"{hub.url}/{repo}", **({"error": "exists"} if known else {})}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = hub.repos["/".join(path.split("/")[3:5])]
            self._answer({"files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".npz", ".png")) else "regular",
                    "shouldIgnore": False,
                    **({"oid": _oid(files[file["path"]], file["path"])} if file["path"] in files else {}),
                }
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{hub.url}/large/{wanted['oid']}"}}
                there = wanted["oid"] in hub.stored
                objects.append({**wanted, **({} if there else {"actions": actions})})
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[repo][value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    del hub.repos[repo][value["path"]]
            self._answer({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        elif path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            files = [{"rfilename": name} for name in hub.repos[repo]]
            self._answer({"id": repo, "private": hub.private[repo], "sha": COMMIT, "siblings": files, "tags": []})
        elif "/resolve/" in path:
            repo, _, name = path.strip("/").partition("/resolve/")
            content = hub.repos[repo].get(name.partition("/")[2])
            if content is None:
                self._answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                self._answer(content, headers={"ETag": f'"{_oid(content, path)}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer({"error": f"no such endpoint {path}"}, 404)


def _oid(content: bytes, path: str) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith((".safetensors", ".npz", ".png")) else _git_oid(content)


@contextmanager
def running() -> Iterator[Hub]:
    """The stand-in on a free port, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
