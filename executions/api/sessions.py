"""/api/v1/sessions: open, look, extend, end; files and packages of a session."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from django.conf import settings
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from drf_spectacular.utils import OpenApiResponse, extend_schema
from pydantic import Field
from rest_framework.generics import ListAPIView

from executions import operations
from executions.api.auth import caller_of
from executions.api.executions import answer, body_of
from executions.api.limits import tells_limits
from executions.api.pages import shaped
from executions.api.problems import answers
from executions.errors import Invalid, TooLarge
from executions.hop import rows
from executions.keys import Caller
from executions.models import Sandbox
from executions.serializers import (
    Accepted,
    FileShape,
    SessionRequest,
    SessionShape,
    parse,
    session_shape,
)
from executions.states import Scope

PIECE_BYTES = 256 * 1024


async def collection(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        return await create(request)
    return await rows(SessionList.as_view(), request)


collection.csrf_exempt = True  # type: ignore[attr-defined]


@answers
@tells_limits
async def create(request: HttpRequest) -> HttpResponse:
    caller, asked = await rows(lambda: (caller_of(request), parse(SessionRequest, body_of(request))))
    token = request.headers.get("Idempotency-Key")
    sandbox = await operations.open_session(caller=caller, request=asked, idempotency_key=token)
    response = answer(session_shape(sandbox), 201)
    response["Location"] = f"/api/v1/sessions/{sandbox.pk}"
    return response


@answers
async def detail(request: HttpRequest, session_id: str) -> HttpResponse:
    caller = await rows(caller_of, request)
    match request.method:
        case "GET" | "HEAD":
            return answer(session_shape(await rows(_look, caller, session_id)))
        case "DELETE":
            await operations.end_session(caller=caller, session_id=session_id)
            return HttpResponse(status=204)
    raise Invalid("GET or DELETE.", field="method")


def _look(caller: Caller, session_id: str) -> Sandbox:
    caller.needs(Scope.READ)
    return operations.find_session(caller, session_id)


class TimeoutRequest(Accepted):
    timeout_seconds: int = Field(ge=1, le=86_400)


@answers
async def timeout(request: HttpRequest, session_id: str) -> HttpResponse:
    """POST: the session ends `timeout_seconds` from now."""
    caller, asked = await rows(lambda: (caller_of(request), parse(TimeoutRequest, body_of(request))))
    sandbox = await operations.extend_session(caller=caller, session_id=session_id, seconds=asked.timeout_seconds)
    return answer(session_shape(sandbox))


@answers
async def pause(request: HttpRequest, session_id: str) -> HttpResponse:
    """POST: variables and files are kept, no CPU is used; any later use resumes it."""
    return await _turned(request, session_id, operations.pause_session)


@answers
async def resume(request: HttpRequest, session_id: str) -> HttpResponse:
    """POST: it runs again when this answers; what it may cost from now on is reserved first."""
    return await _turned(request, session_id, operations.resume_session)


async def _turned(request: HttpRequest, session_id: str, verb: Callable[..., Awaitable[Sandbox]]) -> HttpResponse:
    if request.method != "POST":
        raise Invalid("POST only.", field="method")
    caller = await rows(caller_of, request)
    return answer(session_shape(await verb(caller=caller, session_id=session_id)))


@answers
async def files(request: HttpRequest, session_id: str) -> HttpResponseBase:
    """GET a file, or with `list=1` a folder; PUT streams the body into a file; DELETE removes one."""
    caller = await rows(caller_of, request)
    path = request.GET.get("path", "")
    where: dict[str, Any] = {"caller": caller, "session_id": session_id}
    match request.method:
        case "PUT":
            size = request.headers.get("Content-Length", "0")
            if size.isdigit() and int(size) > settings.FILE_MAX_BYTES:
                raise TooLarge(
                    f"The file has more than {settings.FILE_MAX_BYTES:,} bytes.",
                    field="body",
                    remedy="Send it in parts, or have the operator raise SANDGATE_FILE_MAX_BYTES.",
                )
            await operations.put_file(**where, path=path, data=_pieces(request))
            return HttpResponse(json.dumps({"path": path}), status=201, content_type="application/json")
        case "GET" if request.GET.get("list"):
            found = await operations.list_files(**where, path=path or "/home/user")
            listed = [
                FileShape(name=f.name, path=f.path, type=f.type, size_bytes=f.size_bytes, modified_at=f.modified_at)
                for f in found
            ]
            body = json.dumps({"results": [shape.model_dump(mode="json") for shape in listed]})
            return HttpResponse(body, content_type="application/json")
        case "GET":
            response = StreamingHttpResponse(
                await operations.get_file(**where, path=path), content_type="application/octet-stream"
            )
            name = quote(path.rsplit("/", 1)[-1])
            response["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"
            response["X-Content-Type-Options"] = "nosniff"
            return response
        case "DELETE":
            await operations.remove_file(**where, path=path)
            return HttpResponse(status=204)
    raise Invalid("GET, PUT or DELETE.", field="method")


async def _pieces(request: HttpRequest):
    while piece := request.read(PIECE_BYTES):
        yield piece


@extend_schema(responses={200: OpenApiResponse(SessionShape)}, summary="List sessions, newest first")
class SessionList(ListAPIView):
    serializer_class = shaped(session_shape)
    queryset = Sandbox.objects.none()

    def get_queryset(self):
        caller: Caller = self.request.auth  # type: ignore[assignment]
        found = Sandbox.objects.sessions().filter(team=caller.team).select_related("agent", "template")
        if caller.key is not None and caller.key.agent_id:
            found = found.filter(agent=caller.key.agent_id)
        if self.request.GET.get("open"):
            found = found.open()
        return found
