"""What can be looked at: templates, backends, environment, limits, refusals; and health."""

from __future__ import annotations

import json
from dataclasses import replace

from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse

from executions import operations
from executions.api.auth import caller_of
from executions.api.operation import Many, operation
from executions.hop import rows
from executions.models import Refusal
from executions.serializers import LimitShape
from executions.states import Scope


def _json(results: object) -> HttpResponse:
    return HttpResponse(json.dumps(results, default=str), content_type="application/json")


@operation("Templates, with what they are made of", gives={200: Many()})
async def templates(request: HttpRequest) -> HttpResponse:
    await rows(lambda: caller_of(request).needs(Scope.READ))
    return _json({"results": await operations.template_states()})


@operation("Backends: state, isolation, walls, breaker, pools", gives={200: Many()})
async def backends(request: HttpRequest) -> HttpResponse:
    await rows(lambda: caller_of(request).needs(Scope.READ))
    return _json({"results": await operations.backend_states()})


@operation("What one can count on", gives={200: dict})
async def environment(request: HttpRequest) -> HttpResponse:
    return _json(await rows(lambda: operations.environment(caller=caller_of(request))))


@operation(
    "Each ceiling, with what is used, reserved and left",
    gives={200: Many(LimitShape)},
    query={"user": {"type": "string", "description": "Also what is left for this end user of yours."}},
)
async def limits(request: HttpRequest) -> HttpResponse:
    found = await rows(lambda: operations.limits(caller=replace(caller_of(request), user=request.GET.get("user", ""))))
    return _json({"results": [shape.model_dump(mode="json") for shape in found]})


@operation("What was refused, and why", gives={200: Many()})
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
