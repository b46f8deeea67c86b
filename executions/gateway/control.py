"""E2B's control plane, as E2B's SDKs ask for it. A sandbox made here is an ordinary session of the key's agent."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, unquote

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.db.models import Q
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from executions import audit, backends, keys, operations
from executions.errors import Conflict, Invalid, NoBackend, NotFound, SandgateError, SessionGone, TooLarge, ours
from executions.hop import rows
from executions.keys import Caller
from executions.models import Sandbox, Template
from executions.serializers import SessionRequest, parse
from executions.states import EndReason, SandboxState, Scope

log = logging.getLogger(__name__)

ENVD_VERSION = "0.5.7"  # what the agent implements; the SDKs switch off what came later
STANDARD = ("code-interpreter-v1", "base")  # the templates that the SDKs name when their user names none
NEVER_IDLE_SECONDS = 86_400  # E2B knows an absolute end only
BOOT_SECONDS = 60
EVERYTHING = "0.0.0.0/0"
LISTED_LIMIT = 100
STATES = {SandboxState.LEASED: "running", SandboxState.PAUSED: "paused"}
NOT_HERE = {  # fields of a create that would change what the sandbox may do, with what is there instead
    "autoPause": "Sandboxes cannot be paused here: leave the lifecycle out.",
    "mcp": "There is no MCP gateway in the sandboxes: Sandgate itself speaks MCP, at /mcp.",
    "iam": "Workload identities are not supported.",
    "volumeMounts": "Volumes are not supported.",
}  # not allow_internet_access: older SDKs send True unless told otherwise. The details say whether there is any


def answers(**views):
    """One view for a path: `answers(GET=…, POST=…)`. Errors become E2B's JSON; nothing that was refused is worth a retry."""

    async def answering(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            if request.method not in views:
                raise NotFound("E2B's API has nothing at this address here. See docs/e2b.md for what there is.")
            return await views[request.method](request, *args, **kwargs)
        except SandgateError as e:
            error = e
            if audit.tells(e):
                await rows(audit.denied, e)
        except RequestDataTooBig:
            error = TooLarge("The body is larger than a request may be.")
        except Exception as e:
            log.error("request_failed", exc_info=e)
            error = ours(e)
        if isinstance(error, SessionGone):  # E2B knows only sandboxes that are there
            error = NotFound(error.detail)
        response = _json({"code": error.status, "message": error.sentence()}, error.status)
        response["Should-Retry"] = "false"
        if retry := error.facts.get("retry_after"):
            response["Retry-After"] = str(int(retry))
        return response

    answering.csrf_exempt = True  # type: ignore[attr-defined]
    return answering


def _json(body: Any, status: int = 200) -> HttpResponse:
    return HttpResponse(json.dumps(body), status=status, content_type="application/json")


def _body(request: HttpRequest) -> dict[str, Any]:
    try:
        body = json.loads(request.body or b"{}")
    except (ValueError, RecursionError):
        raise Invalid("The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise Invalid("The body must be a JSON object.")
    return body


def _caller(request: HttpRequest, scope: str = Scope.READ) -> Caller:
    """The caller behind the key; a team's key names its agent in the header Sandgate-Agent."""
    caller = keys.authenticate(
        keys.bearer(request.headers),
        door="gateway",
        ip=request.META.get("REMOTE_ADDR") or None,
        request_id=getattr(request, "id", ""),
    )
    caller.needs(scope)
    return caller


def _seconds(body: dict[str, Any], otherwise: int | None) -> int:
    seconds = body.get("timeout", otherwise)
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 1:
        raise Invalid("timeout: a whole number of seconds, at least 1.")
    if seconds > 86_400:
        raise Invalid("Timeout cannot be greater than 24 hours")
    return seconds


# Which backends, which templates


def reachable() -> list[str]:
    """The aliases whose sandboxes this gateway can reach. E2B's are not among them, so it never ends at itself."""
    return [alias for alias in backends.aliases() if backends.get(alias).capabilities.ports]


def _route(caller: Caller) -> list[str]:
    """The caller's route without what the gateway cannot reach. Raises NoBackend."""
    assert caller.agent is not None
    bound = caller.key.backend if caller.key is not None else ""
    wanted = [bound] if bound else caller.agent.route or backends.aliases()
    route = [alias for alias in wanted if alias in reachable()]
    if not route:
        raise NoBackend(
            f"The E2B gateway serves sandboxes of the local runtime; the route {', '.join(wanted)} has none.",
            remedy="Put a local backend into the agent's route.",
        )
    return route


def _template(name: Any) -> str | None:
    """Our name for a template of the client's; None is the agent's own. Raises NotFound."""
    if not isinstance(name, str) or not name:
        raise Invalid("templateID: a string.")
    if name in STANDARD:
        return None
    found = Template.objects.filter(Q(name=name) | Q(e2b_template=name), is_active=True).order_by("id").first()
    if found is None:
        raise NotFound(f"template '{name}' not found", remedy="GET /api/v1/templates lists what there is.")
    return found.name


# Shapes


def e2b_id(sandbox: Sandbox) -> str:
    """E2B's form of our id: lowercase letters and digits."""
    return sandbox.pk.removeprefix("sbx_")


def _head(sandbox: Sandbox) -> dict[str, Any]:
    name = sandbox.template.name
    return {
        "templateID": sandbox.template.e2b_template or (STANDARD[0] if name == "default" else name),
        "alias": name,
        "sandboxID": e2b_id(sandbox),
        "clientID": "sandgate",
        "envdVersion": ENVD_VERSION,
    }


def made(sandbox: Sandbox) -> dict[str, Any]:
    """E2B's Sandbox: the answer to create and connect."""
    assert sandbox.handle is not None
    return _head(sandbox) | {"envdAccessToken": sandbox.handle["token"], "domain": settings.GATEWAY_DOMAIN or None}


def listed(sandbox: Sandbox) -> dict[str, Any]:
    """E2B's ListedSandbox."""
    return _head(sandbox) | {
        "startedAt": (sandbox.ready_at or sandbox.created_at).isoformat(),
        "endAt": sandbox.leased_until.isoformat(),
        "cpuCount": sandbox.cpu_count,
        "memoryMB": sandbox.memory_mib,
        "diskSizeMB": sandbox.template.disk_mib,
        "state": STATES[SandboxState(sandbox.state)],
        "metadata": sandbox.metadata,
    }


def detail(sandbox: Sandbox) -> dict[str, Any]:
    """E2B's SandboxDetail."""
    assert sandbox.handle is not None
    return listed(sandbox) | {
        "envdAccessToken": sandbox.handle["token"],
        "domain": settings.GATEWAY_DOMAIN or None,
        "allowInternetAccess": bool(sandbox.network_allow),
        "lifecycle": {"autoResume": False, "onTimeout": "kill"},
    }


def _alive():
    """Sandboxes as E2B sees them: those that run or are paused, where the gateway reaches them."""
    return (
        Sandbox.objects.sessions()
        .open()
        .filter(state__in=STATES, leased_until__gt=timezone.now(), backend__in=reachable(), handle__isnull=False)
        .select_related("agent", "template")
    )


def find(sandbox_id: str) -> Sandbox | None:
    """The running sandbox of this id, whosever, with all that a run in it needs."""
    related = ("team", "agent__template", "agent__team", "key__team", "actor", "template")
    return _alive().filter(pk=f"sbx_{sandbox_id}", state=SandboxState.LEASED).select_related(*related).first()


def _of(caller: Caller):
    own = _alive().filter(team=caller.team)
    return own.filter(agent=caller.key.agent_id) if caller.key is not None and caller.key.agent_id else own


def _find(request: HttpRequest, sandbox_id: str, scope: str = Scope.READ) -> tuple[Caller, Sandbox]:
    caller = _caller(request, scope)
    sandbox = _of(caller).filter(pk=f"sbx_{sandbox_id}").first()
    if sandbox is None:
        raise NotFound(f"Sandbox {sandbox_id} not found", remedy="It has ended, or is another's.")
    return caller, sandbox


# Verbs


async def create(request: HttpRequest, default_seconds: int) -> HttpResponse:
    caller, asked, seconds = await rows(_asked, request, default_seconds)
    token = request.headers.get("Idempotency-Key")
    sandbox = await operations.open_session(caller=caller, request=asked, idempotency_key=token)
    if getattr(sandbox, "replayed", False):
        sandbox = await _booted(sandbox)
    else:  # exactly what was asked for, without the margin of the boot
        sandbox = await operations.extend_session(caller=caller, session_id=sandbox.pk, seconds=seconds)
    return _json(made(sandbox), 201)


def _asked(request: HttpRequest, default_seconds: int) -> tuple[Caller, SessionRequest, int]:
    caller, body = _caller(request, Scope.RUN), _body(request)
    agent = request.headers.get("Sandgate-Agent")
    for field, sentence in NOT_HERE.items():
        if body.get(field):
            raise Invalid(sentence, field=field)
    seconds = _seconds(body, default_seconds)
    request_ = {
        "template": _template(body.get("templateID")),
        "agent": agent,
        "route": _route(caller.acting_as(agent)),
        "timeout_seconds": max(seconds, 10),
        "idle_timeout_seconds": NEVER_IDLE_SECONDS,
        "pause_after_seconds": 0,  # its clients are not told, and keep files themselves
        "keep_files": [],
        "env": body.get("envVars") or {},
        "metadata": body.get("metadata") or {},
        "network": _network(body),
    }
    return caller, parse(SessionRequest, request_), seconds


def _network(body: dict[str, Any]) -> list[str] | None:
    """The hosts that are asked for, in our words; None is the agent's own. Raises Invalid for what we cannot hold to."""
    asked = body.get("network") or {}
    if not isinstance(asked, dict):
        raise Invalid("network: an object.", field="network")
    allow, deny = asked.get("allowOut") or [], asked.get("denyOut") or []
    beyond = sorted(name for name, value in asked.items() if value and name not in ("allowOut", "denyOut"))
    if beyond or not set(deny) <= {EVERYTHING}:
        said = ", ".join(beyond) or "denyOut"
        raise Invalid(f"network: {said} cannot be had; there are allowOut, and denyOut {EVERYTHING}.", field="network")
    if allow:
        return ["*" if host == EVERYTHING else host for host in allow]
    return [] if deny or body.get("allow_internet_access") is False else None


async def _booted(sandbox: Sandbox) -> Sandbox:
    """The sandbox of an earlier, equal request, once it runs. Raises Conflict when it does not any more."""
    for _ in range(BOOT_SECONDS * 10):
        found = await rows(_alive().filter(pk=sandbox.pk).first)
        if found is not None:
            return found
        await rows(sandbox.refresh_from_db)
        if sandbox.state != SandboxState.BOOTING:
            break
        await asyncio.sleep(0.1)
    raise Conflict(
        "The sandbox of this Idempotency-Key has ended.", remedy="Use a new Idempotency-Key for a new sandbox."
    )


async def create_v1(request: HttpRequest) -> HttpResponse:
    return await create(request, 15)


async def create_v2(request: HttpRequest) -> HttpResponse:
    return await create(request, 300)


async def connect(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    """The deadline only ever grows; a paused one is resumed."""
    caller, sandbox = await rows(_find, request, sandbox_id, Scope.RUN)
    seconds = _seconds(_body(request), 300)
    if sandbox.state == SandboxState.PAUSED:
        sandbox = await operations.resume_session(caller=caller, session_id=sandbox.pk)
    if timezone.now() + timedelta(seconds=seconds) > sandbox.leased_until:
        sandbox = await operations.extend_session(caller=caller, session_id=sandbox.pk, seconds=seconds)
    return _json(made(sandbox))


async def timeout(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    """Sets the end; may shorten."""
    caller, sandbox = await rows(_find, request, sandbox_id, Scope.RUN)
    seconds = _seconds(_body(request), None)
    await operations.extend_session(caller=caller, session_id=sandbox.pk, seconds=seconds)
    return HttpResponse(status=204)


async def pause(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    """Its memory is kept, until it is connected to. 409 where it is paused already."""
    caller, sandbox = await rows(_find, request, sandbox_id, Scope.RUN)
    if sandbox.state == SandboxState.PAUSED:
        raise Conflict(f"Sandbox {sandbox_id} is paused already.")
    await operations.pause_session(caller=caller, session_id=sandbox.pk)
    return HttpResponse(status=204)


async def look(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    _, sandbox = await rows(_find, request, sandbox_id)
    return _json(detail(sandbox))


async def kill(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    caller, sandbox = await rows(_find, request, sandbox_id, Scope.RUN)
    await operations.end_session(caller=caller, session_id=sandbox.pk, reason=EndReason.KILLED)
    return HttpResponse(status=204)


async def unsupported(request: HttpRequest, **_: Any) -> HttpResponse:
    error = SandgateError(
        "Forks, snapshots, metrics and another network for a living sandbox are not there.",
        remedy="See docs/e2b.md.",
    )
    error.code, error.status = "unsupported", 501
    raise error


async def list_v1(request: HttpRequest) -> HttpResponse:
    found = await rows(lambda: [listed(s) for s in _wanted(request) if s.state == SandboxState.LEASED])
    return _json(found[:LISTED_LIMIT])


async def list_v2(request: HttpRequest) -> HttpResponse:
    page, more = await rows(_page, request)
    response = _json([listed(s) for s in page])
    if more:
        response["x-next-token"] = e2b_id(page[-1])
    return response


def _page(request: HttpRequest) -> tuple[list[Sandbox], bool]:
    limit = request.GET.get("limit", "")
    size = min(int(limit), LISTED_LIMIT) if limit.isdigit() and int(limit) else LISTED_LIMIT
    wanted = _wanted(request)
    return wanted[:size], len(wanted) > size


def _wanted(request: HttpRequest) -> list[Sandbox]:
    """The caller's live sandboxes that the query asks for, in order; ids sort by time of birth."""
    query = request.GET
    found = _of(_caller(request))
    if states := {state for part in query.getlist("state") for state in part.split(",") if state}:
        found = found.filter(state__in=[ours for ours, theirs in STATES.items() if theirs in states])
    if after := query.get("startedAfter"):
        try:
            since = parse_datetime(after)
        except ValueError:
            since = None
        if since is None or timezone.is_naive(since):
            raise Invalid("startedAfter: a date and time with a zone.")
        found = found.filter(created_at__gte=since)
    ascending = query.get("order") == "asc"
    if token := query.get("nextToken"):
        found = found.filter(**{"pk__gt" if ascending else "pk__lt": f"sbx_{token}"})
    # percent-encoded twice over; compared here, as a key of the client's must never become part of a query
    metadata = {unquote(k): unquote(v) for k, v in parse_qsl(query.get("metadata", ""), keep_blank_values=True)}
    template = query.get("template")
    return [
        sandbox
        for sandbox in found.order_by("pk" if ascending else "-pk")
        if metadata.items() <= sandbox.metadata.items()
        and (not template or template in (_head(sandbox)["templateID"], sandbox.template.name))
    ]


nothing = answers()
sandboxes_v1 = answers(GET=list_v1, POST=create_v1)
sandboxes_v2 = answers(GET=list_v2, POST=create_v2)
sandbox = answers(GET=look, DELETE=kill)
connections = answers(POST=connect)
timeouts = answers(POST=timeout)
pauses = answers(POST=pause)
not_yet = answers(GET=unsupported, POST=unsupported, PUT=unsupported, DELETE=unsupported)
