"""What the forms of the pages do: one verb each, then a redirect."""

from __future__ import annotations

from datetime import timedelta

from django.contrib import messages
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import redirect
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from executions import audit, keys, operations
from executions.console.copies import curl
from executions.console.frame import MemberRequest, agents_of, key_of, member, page
from executions.console.pages import find_run
from executions.errors import Forbidden, Invalid, NotFound
from executions.hop import rows
from executions.keys import Caller
from executions.models import ApiKey
from executions.operations.batch import again
from executions.serializers import SessionRequest, Submission, parse
from executions.serializers.workflows import RerunRequest
from executions.states import Scope


@member
@require_POST
async def start_session(request: MemberRequest) -> HttpResponse:
    asked = {name: request.POST[name] for name in ("name", "template", "agent") if request.POST.get(name)}
    session = await operations.open_session(caller=request.caller, request=parse(SessionRequest, asked))
    return redirect(f"/sessions/{session.id}")


@member
@require_POST
async def end_session(request: MemberRequest, session_id: str) -> HttpResponse:
    await operations.end_session(caller=request.caller, session_id=session_id)
    return redirect("/")


@member
@require_POST
async def pause_session(request: MemberRequest, session_id: str) -> HttpResponse:
    await operations.pause_session(caller=request.caller, session_id=session_id)
    return redirect(f"/sessions/{session_id}")


@member
@require_POST
async def resume_session(request: MemberRequest, session_id: str) -> HttpResponse:
    await operations.resume_session(caller=request.caller, session_id=session_id)
    return redirect(f"/sessions/{session_id}")


@member
@require_POST
async def cancel_run(request: MemberRequest, execution_id: str) -> HttpResponse:
    request.caller.needs(Scope.RUN)
    execution = await rows(find_run, request.caller, execution_id)
    await operations.cancel(execution=execution, caller=request.caller)
    return redirect(f"/runs/{execution_id}")


@member
@require_POST
async def rerun(request: MemberRequest, execution_id: str) -> HttpResponse:
    """The same once more, in a fresh sandbox, on the backend that was chosen; a form that is sent twice is one run."""

    def who_and_what() -> tuple[Caller, Submission]:
        request.caller.needs(Scope.RUN)
        asked = {"route": [chosen]} if (chosen := request.POST.get("route")) else {}
        run = find_run(request.caller, execution_id)
        return request.caller, again(run, parse(RerunRequest, asked))

    once = request.POST.get("once", "")[:64]
    chosen = request.POST.get("route", "")[:30]
    token = f"{once} {chosen}" if once else None  # going back to choose another is another run
    shape = await operations.execute(caller=who_and_what, idempotency_key=token, wait_seconds=0)
    return redirect(f"/runs/{shape.id}")


@never_cache  # the page that shows a new key once
@member
@require_http_methods(["GET", "POST"])
def api_keys(request: MemberRequest) -> HttpResponse:
    caller = request.caller
    made, token = _make(request, caller) if request.method == "POST" else (None, "")
    found = list(ApiKey.objects.filter(team=caller.team).select_related("agent__person").order_by("-created_at")[:200])
    for key in found:
        key.may_revoke = _may_revoke(caller, key)  # type: ignore[attr-defined]
    return page(
        request,
        "console/keys.html",
        "keys",
        keys=found,
        made=made,
        token=token,
        agents=agents_of(caller),
        key=key_of(caller),
        curl=curl(),
    )


@transaction.atomic
def _make(request: MemberRequest, caller: Caller) -> tuple[ApiKey, str]:
    """A key with this person's own scopes, at most. Raises Forbidden, Invalid, NotFound."""
    caller.needs(Scope.RUN)
    name = request.POST.get("name", "").strip()
    if not 1 <= len(name) <= 100:
        raise Invalid("A key needs a name of at most 100 characters.", field="name")
    if agent_name := request.POST.get("agent", ""):
        agent = caller.acting_as(agent_name).agent
    else:
        caller.needs(Scope.MANAGE)
        agent = None
    days = request.POST.get("days", "")
    key, token = keys.make_key(
        team=caller.team,
        name=name,
        agent=agent,
        created_by=caller.person,
        scopes=sorted(caller.scopes & {Scope.RUN, Scope.READ}),
        expires_at=timezone.now() + timedelta(days=min(int(days), 3650)) if days.isdigit() else None,
    )
    audit.record("key_made", caller=caller, subject=key.id, after={"name": name, "agent": agent and agent.name})
    return key, token


@member
@require_POST
@transaction.atomic
def revoke_key(request: MemberRequest, key_id: str) -> HttpResponse:
    caller = request.caller
    key = ApiKey.objects.filter(team=caller.team, id=key_id).first()
    if key is None:
        raise NotFound(f"There is no key {key_id}.")
    if not _may_revoke(caller, key):
        raise Forbidden("Only whoever made a key, or an operator, revokes it.")
    if ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now()):
        audit.record("key_revoked", caller=caller, subject=key.id, before={"name": key.name})
    messages.success(request, f"{key.name} is revoked: programs that send it are refused.")
    return redirect("/keys")


def _may_revoke(caller: Caller, key: ApiKey) -> bool:
    return Scope.MANAGE in caller.scopes or key.created_by_id == caller.person.pk  # type: ignore[union-attr]
