"""What can be looked at: templates, backends, environment, limits, refusals; and health."""

from __future__ import annotations

import json
from dataclasses import replace

from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse

from executions import operations
from executions.api.auth import caller_of
from executions.api.problems import answers
from executions.errors import Invalid
from executions.hop import rows
from executions.models import Refusal
from executions.states import Scope


def _get(request: HttpRequest) -> None:
    if request.method not in ("GET", "HEAD"):
        raise Invalid("GET only.", field="method")


def _json(results: object) -> HttpResponse:
    return HttpResponse(json.dumps(results, default=str), content_type="application/json")


@answers
async def templates(request: HttpRequest) -> HttpResponse:
    _get(request)
    await rows(lambda: caller_of(request).needs(Scope.READ))
    return _json({"results": await operations.template_states()})


@answers
async def backends(request: HttpRequest) -> HttpResponse:
    _get(request)
    await rows(lambda: caller_of(request).needs(Scope.READ))
    return _json({"results": await operations.backend_states()})


@answers
async def environment(request: HttpRequest) -> HttpResponse:
    _get(request)
    return _json(await rows(lambda: operations.environment(caller=caller_of(request))))


@answers
async def limits(request: HttpRequest) -> HttpResponse:
    _get(request)
    found = await rows(lambda: operations.limits(caller=replace(caller_of(request), user=request.GET.get("user", ""))))
    return _json({"results": [shape.model_dump(mode="json") for shape in found]})


@answers
async def refusals(request: HttpRequest) -> HttpResponse:
    def look():
        caller = caller_of(request)
        caller.needs(Scope.READ)
        found = Refusal.objects.filter(team=caller.team).select_related("agent").order_by("-last_at")
        if caller.key is not None and caller.key.agent_id:
            found = found.filter(agent=caller.key.agent_id)
        return [
            {
                "code": r.code,
                "detail": r.detail,
                "facts": r.facts,
                "times": r.times,
                "agent": r.agent.name if r.agent else None,
                "key_id": r.key_id,
                "first_at": r.first_at,
                "last_at": r.last_at,
            }
            for r in found[:200]
        ]

    _get(request)
    return _json({"results": await rows(look)})


async def healthz(request: HttpRequest) -> HttpResponse:
    """This process answers."""
    return JsonResponse({"ok": True})


async def readyz(request: HttpRequest) -> HttpResponse:
    """The database answers, and each backend says whether it has sandboxes; 503 while none has."""

    def database() -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        return True

    states = {s["alias"]: {"ok": s["ok"], "detail": s["detail"]} for s in await operations.backend_states()}
    ready = await rows(database) and any(s["ok"] for s in states.values())
    return JsonResponse({"ok": ready, "backends": states}, status=200 if ready else 503)
