"""A client of Sandgate's REST door in one file: copy it. Needs httpx alone; Python 3.11 or newer.

    client = Client()                                   # SANDGATE_URL and SANDGATE_API_KEY
    print(client.run("1 + 1")["results"])
    with client.session() as session:
        session.run("x = 20")
        print(session.run("x + 1")["results"][0]["text/plain"])
    for event in client.stream("for n in range(3): print(n)"):
        print(event["event"], event["data"])

AsyncClient is the same with await. Every write carries an Idempotency-Key, so that a connection that breaks, or a 409, 429, 502
or 503 that says when to come back, is tried again without anything running twice.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx

AGAIN = {429, 502, 503, 504}  # where the answer, or our patience, says when
PATIENCE_SECONDS = 60.0  # for all tries of one request together


class SandgateError(Exception):
    """A problem as the server tells it: `code` is stable, `remedy` says what to do, `facts` has the rest."""

    def __init__(self, status: int, facts: dict[str, Any]) -> None:
        self.status, self.facts = status, facts
        self.code, self.remedy = facts.get("code", "http_error"), facts.get("remedy", "")
        self.retry_after = facts.get("retry_after")
        super().__init__(f"{self.code}: {facts.get('detail', status)} {self.remedy}".strip())


class Gone(Exception):
    """The connection broke more often than patience lasts; nothing is known of the answer."""


def _error(response: httpx.Response) -> SandgateError:
    try:
        facts = response.json()
    except ValueError:
        facts = {"detail": response.text[:300]}
    return SandgateError(response.status_code, facts if isinstance(facts, dict) else {})


def _wait(response: httpx.Response | None, tried: int) -> float | None:
    """Seconds until the next try; None: this answer is final."""
    pause = min(8.0, 0.1 * 2**tried) * random.uniform(0.5, 1)
    if response is None:
        return pause
    said = response.headers.get("Retry-After", "")
    if response.status_code in AGAIN or (response.status_code == 409 and said):
        return float(said) if said.isdigit() else pause
    return None


Step = Generator[
    Any, Any, Any
]  # yields ("send", request) or ("sleep", seconds); is told the response, None where it broke


def _told(method: str, path: str, *, patience: float, headers: dict[str, str], **content: Any) -> Step:
    """One request, tried until there is an answer. Both clients drive this; only how they wait differs."""
    if method != "GET":
        headers = {"Idempotency-Key": uuid.uuid4().hex} | headers
    ends, tried = time.monotonic() + patience, 0
    while True:
        response = yield "send", {"method": method, "url": path, "headers": headers, **content}
        pause = _wait(response, tried)
        if pause is None or time.monotonic() + pause > ends:
            break
        yield "sleep", pause
        tried += 1
    if response is None:
        raise Gone(f"{method} {path}: the connection broke {tried + 1} times")
    if response.is_error:
        raise _error(response)
    return response


def _options(url: str | None, key: str | None, timeout: float) -> dict[str, Any]:
    return {
        "base_url": (url or os.environ["SANDGATE_URL"]).rstrip("/") + "/api/v1/",
        "headers": {"Authorization": f"Bearer {key or os.environ['SANDGATE_API_KEY']}"},
        "timeout": httpx.Timeout(timeout, connect=10),
    }


def _event(lines: list[str]) -> dict[str, Any] | None:
    """One server-sent event; None for a comment that keeps the connection open."""
    fields = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith(":"))
    if "event" not in fields:
        return None
    return {"id": int(fields.get("id", 0)), "event": fields["event"], "data": json.loads(fields["data"])}


def _asked(code: str, files: dict[str, bytes] | None, fields: dict[str, Any]) -> dict[str, Any]:
    sent = {path: base64.b64encode(content).decode() for path, content in (files or {}).items()}
    return {"code": code, **({"files": sent} if sent else {}), **fields}


class Client:
    """Blocking. `timeout` is for one answer, in seconds; `patience` for all tries of a request."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 120,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.patience = patience
        self.http = httpx.Client(**_options(url, key, timeout))

    def request(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **content: Any
    ) -> httpx.Response:
        """Any address of /api/v1. Raises SandgateError, Gone."""
        steps = _told(method, path, patience=self.patience, headers=headers or {}, **content)
        told = None
        while True:
            try:
                what, value = steps.send(told)
            except StopIteration as done:
                return done.value
            told = None
            if what == "sleep":
                time.sleep(value)
                continue
            try:
                told = self.http.request(**value)
            except httpx.TransportError:
                pass

    def run(
        self, code: str, *, files: dict[str, bytes] | None = None, idempotency_key: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Run code and wait for its end; `fields` as POST /executions has them."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self.request("POST", "executions", json=_asked(code, files, fields), headers=headers).json()

    def start(self, code: str, *, files: dict[str, bytes] | None = None, **fields: Any) -> dict[str, Any]:
        """Run code; returns at once."""
        return self.request(
            "POST", "executions", json=_asked(code, files, fields), headers={"Prefer": "respond-async"}
        ).json()

    def stream(self, code: str, *, files: dict[str, bytes] | None = None, **fields: Any) -> Iterator[dict[str, Any]]:
        """Run code; what it says as it comes, and at last the event `end`."""
        yield from self.events(self.start(code, files=files, **fields)["id"])

    def events(self, execution_id: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """What an execution says, from `after` on; a broken connection goes on where it broke. Raises SandgateError, Gone."""
        tried, seen = 0, after
        while True:
            try:
                where = f"executions/{execution_id}/events"
                with self.http.stream("GET", where, headers={"Last-Event-ID": str(seen)}) as response:
                    if response.is_error:
                        response.read()
                        raise _error(response)
                    lines: list[str] = []
                    for line in response.iter_lines():
                        if line:
                            lines.append(line)
                            continue
                        event, lines = _event(lines), []
                        if event is not None:
                            seen, tried = event["id"] or seen, 0
                            yield event
                            if event["event"] == "end":
                                return
            except httpx.TransportError:
                pass
            if (tried := tried + 1) > 10:
                raise Gone(f"the events of {execution_id} broke off {tried} times")
            time.sleep(_wait(None, tried) or 0)

    @contextmanager
    def session(self, **fields: Any) -> Iterator[Session]:
        """A session that is ended with the block; `fields` as POST /sessions has them."""
        opened = Session(self, self.request("POST", "sessions", json=fields).json()["id"])
        try:
            yield opened
        finally:
            self.request("DELETE", f"sessions/{opened.id}")

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """A sandbox that is kept: variables and files stay from run to run."""

    def __init__(self, client: Client, session_id: str) -> None:
        self.client, self.id = client, session_id

    def run(self, code: str, **fields: Any) -> dict[str, Any]:
        return self.client.run(code, session_id=self.id, **fields)

    def write(self, path: str, content: bytes) -> None:
        self.client.request("PUT", f"sessions/{self.id}/files", params={"path": path}, content=content)

    def read(self, path: str) -> bytes:
        return self.client.request("GET", f"sessions/{self.id}/files", params={"path": path}).content


class AsyncClient:
    """As Client, with await."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 120,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.patience = patience
        self.http = httpx.AsyncClient(**_options(url, key, timeout))

    async def request(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **content: Any
    ) -> httpx.Response:
        """Any address of /api/v1. Raises SandgateError, Gone."""
        steps = _told(method, path, patience=self.patience, headers=headers or {}, **content)
        told = None
        while True:
            try:
                what, value = steps.send(told)
            except StopIteration as done:
                return done.value
            told = None
            if what == "sleep":
                await asyncio.sleep(value)
                continue
            try:
                told = await self.http.request(**value)
            except httpx.TransportError:
                pass

    async def run(
        self, code: str, *, files: dict[str, bytes] | None = None, idempotency_key: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return (await self.request("POST", "executions", json=_asked(code, files, fields), headers=headers)).json()

    async def start(self, code: str, *, files: dict[str, bytes] | None = None, **fields: Any) -> dict[str, Any]:
        asked = _asked(code, files, fields)
        return (await self.request("POST", "executions", json=asked, headers={"Prefer": "respond-async"})).json()

    async def stream(
        self, code: str, *, files: dict[str, bytes] | None = None, **fields: Any
    ) -> AsyncIterator[dict[str, Any]]:
        async for event in self.events((await self.start(code, files=files, **fields))["id"]):
            yield event

    async def events(self, execution_id: str, *, after: int = 0) -> AsyncIterator[dict[str, Any]]:
        tried, seen = 0, after
        while True:
            try:
                where = f"executions/{execution_id}/events"
                async with self.http.stream("GET", where, headers={"Last-Event-ID": str(seen)}) as response:
                    if response.is_error:
                        await response.aread()
                        raise _error(response)
                    lines: list[str] = []
                    async for line in response.aiter_lines():
                        if line:
                            lines.append(line)
                            continue
                        event, lines = _event(lines), []
                        if event is not None:
                            seen, tried = event["id"] or seen, 0
                            yield event
                            if event["event"] == "end":
                                return
            except httpx.TransportError:
                pass
            if (tried := tried + 1) > 10:
                raise Gone(f"the events of {execution_id} broke off {tried} times")
            await asyncio.sleep(_wait(None, tried) or 0)

    @asynccontextmanager
    async def session(self, **fields: Any) -> AsyncIterator[AsyncSession]:
        opened = AsyncSession(self, (await self.request("POST", "sessions", json=fields)).json()["id"])
        try:
            yield opened
        finally:
            await self.request("DELETE", f"sessions/{opened.id}")

    async def close(self) -> None:
        await self.http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncSession:
    """As Session, with await."""

    def __init__(self, client: AsyncClient, session_id: str) -> None:
        self.client, self.id = client, session_id

    async def run(self, code: str, **fields: Any) -> dict[str, Any]:
        return await self.client.run(code, session_id=self.id, **fields)

    async def write(self, path: str, content: bytes) -> None:
        await self.client.request("PUT", f"sessions/{self.id}/files", params={"path": path}, content=content)

    async def read(self, path: str) -> bytes:
        return (await self.client.request("GET", f"sessions/{self.id}/files", params={"path": path})).content
