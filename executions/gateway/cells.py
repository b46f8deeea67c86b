"""POST /execute of a sandbox's interpreter: E2B's lines outside, an execution inside, with its quota, record and price."""

from __future__ import annotations

import asyncio
import hmac
import json
from contextlib import suppress
from typing import Any

from django.conf import settings
from django.utils import timezone

from executions import backends, operations
from executions.backends import wire
from executions.backends.base import Event
from executions.errors import ContextUnknown, Invalid, SandboxLost, SandgateError, SessionGone
from executions.gateway.asgi import answer, gone, not_found, whole_body
from executions.gateway.control import find
from executions.hop import rows
from executions.keys import Caller
from executions.models import Execution, Sandbox
from executions.serializers import Submission, parse
from executions.states import LANGUAGES, ExecutionState

KEEPALIVE_SECONDS = 5
LANGUAGE = {"py": "python", "python3": "python", "js": "javascript", "ts": "typescript", "sh": "bash"}
NAMES = {  # what a run that did not end by itself is called in the error line that ends it
    ExecutionState.TIMED_OUT: "ExecutionTimedOut",
    ExecutionState.CANCELLED: "ExecutionCancelled",
    ExecutionState.ERRORED: "ExecutionErrored",
    ExecutionState.FAILED: "ExecutionRefused",
}


async def execute(caller: Caller, sandbox: Sandbox, headers: dict[bytes, bytes], receive: Any, send: Any) -> None:
    assert sandbox.handle is not None
    if not hmac.compare_digest(headers.get(b"x-access-token", b""), str(sandbox.handle["token"]).encode()):
        return await answer(send, 401, "The sandbox's access token is missing or wrong.")
    try:
        body = await whole_body(receive, settings.DATA_UPLOAD_MAX_MEMORY_SIZE)
        if body is None:
            return
        asked = await _submission(caller, sandbox, json.loads(body))
        if asked is None:
            return await _Lines(send).end()
        execution = await rows(_admit, caller, asked)
    except (SessionGone, SandboxLost):
        return await not_found(send, sandbox.pk.removeprefix("sbx_"))
    except SandgateError as e:
        return await answer(send, e.status, e.sentence())
    except ValueError as e:
        return await answer(send, 422, f"The body is not a request to execute: {e}")
    await _stream(execution, receive, send)


def _admit(caller: Caller, asked: Submission) -> Execution:
    """Admitted with its full time: a cell is ended by the end of its sandbox, which the client may still put off."""
    execution = operations.submit(caller=caller, request=asked)
    if asked.timeout_seconds and execution.timeout_seconds < asked.timeout_seconds:
        execution.timeout_seconds = asked.timeout_seconds
        execution.save(update_fields=["timeout_seconds"])
    return execution


async def _submission(caller: Caller, sandbox: Sandbox, body: Any) -> Submission | None:
    """The execution that the body asks for; None where its code is empty. ValueError, Invalid, ContextUnknown."""
    if not isinstance(body, dict) or not isinstance(body.get("code"), str):
        raise ValueError("code is not a string")
    context_id, language = body.get("context_id"), body.get("language")
    if context_id and language:
        raise Invalid("Only one of context_id or language can be provided.", field="language")
    if not body["code"].strip():
        return None
    if context_id:
        language = await _language_of(sandbox, str(context_id))
    language = str(language or "python").lower()
    assert caller.agent is not None
    submission = {
        "code": body["code"],
        "session_id": sandbox.pk,
        "language": LANGUAGE.get(language, language),
        "context_id": context_id or None,
        "env": {name: value for name, value in (body.get("env_vars") or {}).items() if value is not None},
        "max_wait_seconds": 0,  # the SDK expects the first line of an answer, not a place in a queue
        "timeout_seconds": min(caller.agent.timeout_max_seconds, settings.EXECUTION_TIMEOUT_MAX_SECONDS),
    }
    return parse(Submission, submission)


async def _language_of(sandbox: Sandbox, context_id: str) -> str:
    """Raises ContextUnknown."""
    assert sandbox.handle is not None
    for context in await backends.get(sandbox.backend).list_contexts(sandbox.handle):
        if context["id"] == context_id:
            return context["language"] if context["language"] in LANGUAGES else "python"
    raise ContextUnknown(f"Context {context_id} not found")


class _Lines:
    """An NDJSON answer that begins with its first line, so that what fails before still gets a status."""

    def __init__(self, send: Any) -> None:
        self.send, self.begun = send, False

    async def write(self, *lines: dict[str, Any] | None) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines if line)
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self.write({"type": "end_of_execution"})
        await self.send({"type": "http.response.body", "body": b""})


async def _stream(execution: Execution, receive: Any, send: Any) -> None:
    """Run it and say what it says, as it comes. The client's leaving interrupts it, as E2B promises."""
    run = operations.start(execution)
    said: asyncio.Queue[Event] = asyncio.Queue(64)  # a slow client slows the run down
    run.on_said = said.put
    assert run.task is not None
    leaving, lines = asyncio.create_task(gone(receive)), _Lines(send)
    hearing = asyncio.ensure_future(said.get())
    try:
        while not leaving.done():
            await asyncio.wait(
                {hearing, leaving, run.task}, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if hearing.done():
                events = [hearing.result()]
                while not said.empty():
                    events.append(said.get_nowait())
                now = timezone.now().isoformat()
                await lines.write(*(wire.line_of(event.kind, event.data, now) for event in events))
                hearing = asyncio.ensure_future(said.get())
            elif run.task.done():
                return await _finish(execution, lines, send)
            else:
                await lines.write({"type": "keepalive"})
    finally:
        leaving.cancel()
        hearing.cancel()
        if not run.task.done():
            run.on_said = None
            await operations.cancel(execution=execution, reason="the client went away")
        with suppress(asyncio.QueueEmpty):
            while True:
                said.get_nowait()  # whoever waits to say something may go on


async def _finish(execution: Execution, lines: _Lines, send: Any) -> None:
    """Its end: the last line, or for a run that never spoke the status that says why."""
    code, said = execution.error_code, execution.error_value
    if not code:
        return await lines.end()
    sandbox_id = (execution.sandbox_id or "").removeprefix("sbx_")
    if code == SandboxLost.code or await rows(find, sandbox_id) is None:
        if not lines.begun:
            await not_found(send, sandbox_id)
        return  # left without an end, which breaks the connection off: so the SDKs learn that a sandbox died
    if not lines.begun and execution.state == ExecutionState.ERRORED:
        return await answer(send, 503, f"{code}: {said}")
    name = NAMES[ExecutionState(execution.state)]
    await lines.write({"type": "error", "name": name, "value": said, "traceback": f"{name}: {said}"})
    await lines.end()
