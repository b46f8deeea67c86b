"""GET /audit: what people and programs did in the team, newest first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse

from executions import audit
from executions.api.auth import caller_of
from executions.api.operation import Many, operation
from executions.errors import Invalid
from executions.hop import rows
from executions.models import AuditEvent
from executions.reports import exports
from executions.states import Scope

MOST = 200
MOST_OF_A_FILE = 50_000
KNOWN = {"action", "actor", "before_seq", "format", "subject"}
COLUMNS = ("seq", "at", "action", "subject", "actor", "key_id", "before", "after", "reason", "ip", "digest")


@operation(
    "What people and programs did",
    gives={200: (Many(), "text/csv")},
    query={name: {"type": "string"} for name in sorted(KNOWN - {"before_seq", "format"})}
    | {"before_seq": {"type": "integer", "minimum": 0}, "format": {"enum": ["json", "csv"], "default": "json"}},
)
async def events(request: HttpRequest) -> HttpResponse:
    """Up to 200 events of the key's team, as CSV up to 50,000, the newest first; `before_seq` reads on. Needs the scope manage."""
    return await rows(_events, request)


def _events(request: HttpRequest) -> HttpResponse:
    caller = caller_of(request)
    caller.needs(Scope.MANAGE)
    if unknown := sorted(request.GET.keys() - KNOWN):
        raise Invalid(f"{unknown[0]}: not known here; known are {', '.join(sorted(KNOWN))}.", field=unknown[0])
    found = AuditEvent.objects.filter(team=caller.team).select_related("actor").order_by("-seq")
    asked = {"action": "action", "subject": "subject", "actor": "actor__username"}
    for name, column in asked.items():
        if value := request.GET.get(name):
            found = found.filter(**{column: value.replace("\x00", "")})
    if before := request.GET.get("before_seq"):
        if not before.isdigit() or len(before) > 18:
            raise Invalid("before_seq: a whole number.", field="before_seq")
        found = found.filter(seq__lt=int(before))
    match request.GET.get("format", "json"):
        case "csv":
            audit.record("audit_exported", caller=caller, after={"format": "csv"})
            response = HttpResponse(exports.as_csv(_cells(found), COLUMNS), content_type="text/csv; charset=utf-8")
            response["Content-Disposition"] = 'attachment; filename="audit.csv"'
            return response
        case "json":
            results = [_shape(event) for event in found[:MOST]]
        case _:
            raise Invalid("format: json or csv.", field="format")
    return HttpResponse(json.dumps({"results": results}, default=str), content_type="application/json")


def _cells(found: QuerySet[AuditEvent]) -> Iterator[dict[str, Any]]:
    for event in found[:MOST_OF_A_FILE].iterator(chunk_size=2000):
        shape = _shape(event)
        yield {**shape, "before": audit.cell(shape["before"]), "after": audit.cell(shape["after"])}


def _shape(event: AuditEvent) -> dict[str, Any]:
    return {
        "seq": event.seq,
        "at": event.at,
        "action": event.action,
        "subject": event.subject,
        "actor": event.actor.get_username() if event.actor else None,
        "key_id": event.key_id,
        "before": event.before,
        "after": event.after,
        "reason": event.reason,
        "ip": event.ip,
        "digest": event.digest,
    }
