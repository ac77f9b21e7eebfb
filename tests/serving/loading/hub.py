"""A small Hugging Face hub: what `huggingface_hub` asks of one, over HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Serves one folder as `name`.

    Attributes:
        endpoint: Of it, for HF_ENDPOINT.
        fetched: Files that were downloaded, in order.
    """

    name: str
    folder: Path
    endpoint: str = ""
    fetched: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


@contextmanager
def serve_hub(name: str, folder: Path) -> Iterator[Hub]:
    hub = Hub(name, folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802
            self._answer(body=False)

        def do_GET(self) -> None:  # noqa: N802
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            api, files = f"/api/models/{name}", f"/{name}/resolve/"
            known = ("main", "v1", COMMIT)
            if path == api or path.startswith(f"{api}/revision/"):
                if path.rpartition("/revision/")[2] in (*known, path):
                    siblings = [{"rfilename": file} for file in hub.files()]
                    self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), body)
                else:
                    self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(f"{api}/tree/"):
                listed = [self._entry(file) for file in hub.files()]
                self._send(200, json.dumps(listed).encode(), body)
            elif path.startswith(files) and path.removeprefix(files).partition("/")[0] in known:
                file = path.removeprefix(files).partition("/")[2]
                content = (folder / file).read_bytes()
                etag = hashlib.sha1(content).hexdigest()
                if body:
                    hub.fetched.append(file)
                self._send(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

        def _entry(self, file: str) -> dict[str, Any]:
            content = (folder / file).read_bytes()
            return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

        def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
