"""/api/v1/sessions/{id}/packages and /api/v1/agents/{id}/packages: what code may import."""

from __future__ import annotations

import json

from django.http import HttpRequest, HttpResponse

from executions import operations
from executions.api.auth import caller_of
from executions.api.executions import answer, body_of
from executions.api.problems import answers
from executions.errors import Invalid
from executions.hop import rows
from executions.operations import Installed
from executions.serializers import InstalledShape, InstallRequest, package_shape, parse


def shape(done: Installed) -> InstalledShape:
    return InstalledShape(
        packages=[package_shape(package) for package in done.packages],
        lock_hash=done.lock_hash,
        added=done.added,
        removed=done.removed,
        changed=done.changed,
    )


@answers
async def of_session(request: HttpRequest, session_id: str) -> HttpResponse:
    """POST: make packages importable in the session."""
    if request.method != "POST":
        raise Invalid("POST only.", field="method")
    caller, asked = await rows(lambda: (caller_of(request), parse(InstallRequest, body_of(request))))
    done = await operations.install(caller=caller, session_id=session_id, requirements=asked.packages)
    return answer(shape(done))


@answers
async def of_agent(request: HttpRequest, agent_id: str) -> HttpResponse:
    """POST: make packages importable in all the agent's future sandboxes; GET: what is in its lock now."""
    if request.method in ("GET", "HEAD"):
        lock = await rows(lambda: operations.lock_of(caller_of(request), agent_id))
        pins = (
            [{name: pin[name] for name in ("name", "version", "sha256", "size_bytes")} for pin in lock.pins]
            if lock
            else []
        )
        body = {"lock_hash": lock.digest if lock else "", "asked": lock.asked if lock else [], "packages": pins}
        return HttpResponse(json.dumps(body), content_type="application/json")
    if request.method != "POST":
        raise Invalid("GET or POST.", field="method")
    caller, asked = await rows(lambda: (caller_of(request), parse(InstallRequest, body_of(request))))
    done = await operations.install_for_agent(caller=caller, agent=agent_id, requirements=asked.packages)
    return answer(shape(done))
