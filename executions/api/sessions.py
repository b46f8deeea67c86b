"""/api/v1/sessions: open, look, extend, end; files and packages of a session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from django.http import HttpRequest, HttpResponse
from pydantic import Field

from executions import operations
from executions.api.auth import caller_of
from executions.api.executions import answer, body_of
from executions.api.limits import tells_limits
from executions.api.operation import operation
from executions.hop import rows
from executions.models import Sandbox
from executions.serializers import (
    Accepted,
    SessionRequest,
    SessionShape,
    parse,
    session_shape,
)
from executions.states import Scope

MACHINE = (402, 409, 410, 502, 503)


@operation("Open a session", body=SessionRequest, gives={201: SessionShape}, fails=(402, 409, 413, 422, 502, 503))
@tells_limits
async def create(request: HttpRequest) -> HttpResponse:
    caller, asked = await rows(lambda: (caller_of(request), parse(SessionRequest, body_of(request))))
    token = request.headers.get("Idempotency-Key")
    sandbox = await operations.open_session(caller=caller, request=asked, idempotency_key=token)
    response = answer(session_shape(sandbox), 201)
    response["Location"] = f"/api/v1/sessions/{sandbox.pk}"
    return response


@operation("Look at a session", gives={200: SessionShape})
async def look(request: HttpRequest, session_id: str) -> HttpResponse:
    def find() -> SessionShape:
        caller = caller_of(request)
        caller.needs(Scope.READ)
        return session_shape(operations.find_session(caller, session_id))

    return answer(await rows(find))


@operation("End a session", gives={204: None}, fails=(502, 503))
async def end(request: HttpRequest, session_id: str) -> HttpResponse:
    """Its files that are kept are kept first. Idempotent."""
    await operations.end_session(caller=await rows(caller_of, request), session_id=session_id)
    return HttpResponse(status=204)


class TimeoutRequest(Accepted):
    timeout_seconds: int = Field(ge=1, le=86_400)


@operation("Move the end of a session", body=TimeoutRequest, gives={200: SessionShape}, fails=MACHINE)
async def timeout(request: HttpRequest, session_id: str) -> HttpResponse:
    """POST: the session ends `timeout_seconds` from now."""
    caller, asked = await rows(lambda: (caller_of(request), parse(TimeoutRequest, body_of(request))))
    sandbox = await operations.extend_session(caller=caller, session_id=session_id, seconds=asked.timeout_seconds)
    return answer(session_shape(sandbox))


@operation("Pause a session", gives={200: SessionShape}, fails=MACHINE)
async def pause(request: HttpRequest, session_id: str) -> HttpResponse:
    """POST: variables and files are kept, no CPU is used; any later use resumes it."""
    return await _turned(request, session_id, operations.pause_session)


@operation("Resume a session", gives={200: SessionShape}, fails=MACHINE)
async def resume(request: HttpRequest, session_id: str) -> HttpResponse:
    """POST: it runs again when this answers; what it may cost from now on is reserved first."""
    return await _turned(request, session_id, operations.resume_session)


async def _turned(request: HttpRequest, session_id: str, verb: Callable[..., Awaitable[Sandbox]]) -> HttpResponse:
    caller = await rows(caller_of, request)
    return answer(session_shape(await verb(caller=caller, session_id=session_id)))
