"""What every page has around it, and who may see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.contrib.auth.views import redirect_to_login
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render

from executions import audit, backends, breaker, keys, newest
from executions.egress import words
from executions.errors import Invalid, SandgateError, Unauthenticated
from executions.hop import rows
from executions.keys import Caller
from executions.models import Agent, ApiKey, Membership, Quota, Sandbox
from executions.reports import spend
from executions.states import Scope, Unit, Window

View = Callable[..., Any]
EXAMPLE = """import numpy as np, pandas as pd, matplotlib.pyplot as plt

df = pd.DataFrame({"day": pd.date_range("2026-01-01", periods=8), "runs": np.arange(8) ** 2})
df.plot(x="day", y="runs", kind="bar", legend=False)
plt.show()
df.head()"""


class MemberRequest(HttpRequest):
    """A request of a signed-in person."""

    caller: Caller


def member(view: View) -> View:
    """A view for signed-in people: `request.caller` is who they are; refusals become a page, or JSON for a script."""

    def who(request: HttpRequest) -> Caller:
        if not request.user.is_authenticated:
            raise Unauthenticated("You are signed out.", remedy="Sign in again.")
        return keys.caller_for(request.user, ip=request.META.get("REMOTE_ADDR"), request_id=getattr(request, "id", ""))

    def refused(request: HttpRequest, error: SandgateError) -> HttpResponse:
        if "text/html" not in request.headers.get("Accept", ""):
            return JsonResponse(error.problem(), status=error.status)
        if isinstance(error, Unauthenticated):
            return redirect_to_login(request.get_full_path() if request.method == "GET" else "/")
        return render(request, "console/problem.html", {"problem": error.problem()}, status=error.status)

    if iscoroutinefunction(view):

        @wraps(view)
        async def asynchronous(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            try:
                request.user = await request.auser()
                request.caller = await rows(who, request)  # type: ignore[attr-defined]
                return await view(request, *args, **kwargs)
            except SandgateError as error:
                if audit.tells(error):
                    await rows(audit.denied, error)
                return refused(request, error)

        return asynchronous

    @wraps(view)
    def synchronous(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            request.caller = who(request)  # type: ignore[attr-defined]
            return view(request, *args, **kwargs)
        except SandgateError as error:
            audit.denied(error)
            return refused(request, error)

    return synchronous


def body(request: HttpRequest) -> Any:
    """The JSON that a script of the page sent. Raises Invalid."""
    try:
        return json.loads(request.body)
    except ValueError:
        raise Invalid("The body is not JSON.", field="body") from None


def page(request: MemberRequest, template: str, here: str, **context: Any) -> HttpResponse:
    """A page of the console with its header and navigation."""
    caller = request.caller
    sessions, _ = newest.few(Sandbox.objects.open().sessions().filter(team=caller.team), 6)
    role = Membership.objects.filter(team=caller.team, user=caller.person).values_list("role", flat=True).first()
    theme = request.COOKIES.get("theme")
    around = {
        "caller": caller,
        "role": role,
        "here": here,
        "theme": theme if theme in ("light", "dark") else "",
        "open_sessions": sessions,
        "spend": spend_today(caller),
        "backends": backends_now(),
        "network_here": words(caller.agent.network_allow if caller.agent else []),
        "can_run": Scope.RUN in caller.scopes,
        "can_manage": Scope.MANAGE in caller.scopes,
        "public_url": settings.PUBLIC_URL,
    }
    return render(request, template, around | context)


def spend_today(caller: Caller) -> dict[str, int | None]:
    """What the team has spent today, and its tightest budget per day."""
    own = Q(team=None) | Q(team=caller.team)
    budgets = Quota.objects.filter(own, agent=None, key=None, unit=Unit.NANO_USD, window=Window.DAY)
    return {
        "nano_usd": spend.today(team=caller.team),
        "limit_nano_usd": min(budgets.values_list("limit", flat=True), default=None),
    }


def backends_now() -> list[dict[str, Any]]:
    """Every backend in the order of the default route: whether it takes sandboxes, or since when and why it does not."""
    states = []
    for alias in backends.aliases():
        out = breaker.outage(alias)
        name = "E2B" if alias == "e2b" else alias
        states.append({"alias": alias, "name": name, "out": out, "live": not out, "words": out or "takes sandboxes"})
    return states


def agents_of(caller: Caller) -> QuerySet[Agent]:
    """The agents as which this person may run: the team's, and their own personal one, which comes first."""
    mine = Q(person=None) | Q(person=caller.person)
    return (
        Agent.objects.filter(mine, team=caller.team, is_active=True)
        .select_related("person")
        .order_by("-person", "name")
    )


def key_of(caller: Caller) -> ApiKey | None:
    """A live key that this person made, to show examples with."""
    mine = ApiKey.objects.filter(team=caller.team, created_by=caller.person, revoked_at=None).order_by("-created_at")
    return next((key for key in mine[:5] if key.is_live), None)
