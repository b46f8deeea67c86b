"""The entry for servers: what programs call passes without a thread of its own."""

from __future__ import annotations

import asyncio
import threading

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.urls import URLPattern, get_resolver

from config.asgi import application


async def asked(path: str) -> int:
    """The status of a GET."""
    said: list[dict] = []
    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http",
        "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    gone = asyncio.Event()
    bodies = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict:
        if (body := next(bodies, None)) is not None:
            return body
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        said.append(message)

    await application(scope, receive, send)
    gone.set()
    return said[0]["status"]


def test_a_program_s_request_starts_no_thread(monkeypatch):
    started: list[str] = []
    begin = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    assert asyncio.run(asked("/healthz")) == 200
    assert started == []


def views(patterns, before=""):
    for pattern in patterns:
        path = before + str(pattern.pattern)
        if isinstance(pattern, URLPattern):
            yield path, pattern.callback
        else:
            yield from views(pattern.url_patterns, path)


def test_every_view_that_programs_call_is_asynchronous():
    """A synchronous one would hold up everything else: they run on the loop's own thread."""
    found = [
        (path, view)
        for path, view in views(get_resolver().url_patterns)
        if f"/{path}".startswith(settings.PROGRAM_PATHS)
    ]
    assert len(found) > 50
    assert [path for path, view in found if not iscoroutinefunction(view)] == []
