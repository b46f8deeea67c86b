"""A package index of a test's own: wheels made on the spot, served by the simple API on loopback."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Index:
    """`served` counts the requests for each path; `hold` makes files wait until it is set."""

    url: str = ""
    files: dict[str, tuple[bytes, dict[str, Any]]] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    logins: list[str] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)

    def add(
        self,
        name: str,
        version: str,
        files: dict[str, str | bytes] | None = None,
        *,
        requires: tuple[str, ...] = (),
        licence: str = "",
        days_old: int | None = 100,
        wheel: bytes | None = None,
        sha256: str = "",
    ) -> str:
        """One wheel; its file name. What is inside may be given whole, or claimed to have another hash."""
        module = name.replace("-", "_")
        content = wheel or made(name, version, files or {f"{module}.py": f"version = {version!r}\n"}, requires, licence)
        about = metadata(name, version, requires, licence)
        facts: dict[str, Any] = {
            "hashes": {"sha256": sha256 or hashlib.sha256(content).hexdigest()},
            "size": len(content),
        }
        facts["core-metadata"] = {"sha256": hashlib.sha256(about).hexdigest()}
        if days_old is not None:
            facts["upload-time"] = (datetime.now(UTC) - timedelta(days=days_old)).strftime("%Y-%m-%dT%H:%M:%SZ")
        file = f"{module}-{version}-py3-none-any.whl"
        self.files[file] = (content, facts)
        self.files[f"{file}.metadata"] = (about, {})
        return file

    def add_source(self, name: str, version: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        self.files[f"{name}-{version}.tar.gz"] = (content, {"hashes": {"sha256": digest}, "size": len(content)})

    def fetches(self, file: str) -> int:
        return self.served[f"/files/{file}"]

    def page(self, name: str) -> bytes | None:
        files = [
            {"filename": file, "url": f"{self.url}/files/{file}", **facts}
            for file, (_, facts) in self.files.items()
            if facts and file.partition("-")[0].replace("_", "-") == name
        ]
        body = {"meta": {"api-version": "1.1"}, "name": name, "files": files, "versions": []}
        return json.dumps(body).encode() if files else None


def metadata(name: str, version: str, requires: tuple[str, ...], licence: str) -> bytes:
    lines = [f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    return "\n".join([*lines, *([f"License-Expression: {licence}"] if licence else [])]).encode() + b"\n"


def made(
    name: str, version: str, files: dict[str, str | bytes], requires: tuple[str, ...] = (), licence: str = ""
) -> bytes:
    """A wheel, as an honest tool makes it."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    inside = {
        **files,
        f"{info}/METADATA": metadata(name, version, requires, licence),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in inside.items():
            archive.writestr(path, content)
    return whole.getvalue()


@contextmanager
def running_index() -> Iterator[Index]:
    index = Index()
    index.hold.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            index.served[self.path] += 1
            if login := self.headers.get("Authorization"):
                index.logins.append(login)
            kind, _, name = self.path.strip("/").partition("/")
            if kind == "simple":
                self._answer(index.page(name.strip("/")), "application/vnd.pypi.simple.v1+json")
                return
            if name.endswith(".whl"):
                index.hold.wait(30)
            found = index.files.get(name)
            self._answer(found[0] if found else None, "application/octet-stream")

        def _answer(self, content: bytes | None, kind: str) -> None:
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    index.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        index.hold.set()
        server.shutdown()
        server.server_close()
