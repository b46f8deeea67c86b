"""Levers: each says what will happen before it happens, asks for a reason, pulls a verb and is written down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asgiref.sync import async_to_sync
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.utils import timezone
from unfold.decorators import action

from executions import keys, operations
from executions.admin import show
from executions.admin.base import Page, caller_of, write_down
from executions.errors import Conflict, SandgateError
from executions.models import Agent, ApiKey, AuditEvent, Execution, Sandbox, Template, User
from executions.states import EndReason, SandboxState

log = logging.getLogger(__name__)
AT_ONCE = 500  # rows of one pull: more is a filter that was forgotten
KILLS_IN_FLIGHT = 10


@dataclass(frozen=True, slots=True)
class Lever:
    """A verb that operators pull on rows."""

    name: str
    label: str
    icon: str
    applies: Callable[[QuerySet], QuerySet]  # the rows on which it does something
    consequence: Callable[[list[Any]], str]  # what will happen, before it happens
    act: Callable[[HttpRequest, list[Any], str], str | HttpResponse]  # does it; says what was done
    permission: str = "pull"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}es" if word.endswith("x") else f"{count} {word}s"


def pulls(lever: Lever) -> Any:
    """The admin action of a lever: on selected rows of a list, and on one row's own page."""

    def method(self: Page, request: HttpRequest, queryset: QuerySet | None = None, object_id: str = "") -> Any:
        chosen = self.get_queryset(request).filter(pk=object_id) if queryset is None else queryset
        return pull(lever, self, request, chosen, object_id)

    method.__name__ = lever.name
    pulled = action(description=lever.label, permissions=[lever.permission], icon=lever.icon, url_path=lever.name)(
        method
    )
    pulled.lever = lever
    return pulled


def pull(lever: Lever, page: Page, request: HttpRequest, chosen: QuerySet, object_id: str) -> HttpResponse:
    """The confirmation page, or with a reason the deed."""
    back = show.rows_of(str(page.opts.model_name))
    if object_id:
        back = f"{back}{object_id}/change/"
    elif request.method == "POST":
        back = request.get_full_path()
    rows = list(lever.applies(chosen).defer(None)[: AT_ONCE + 1])  # verbs on the loop cannot fetch a column late
    if not rows or len(rows) > AT_ONCE:
        why = (
            f"More than {AT_ONCE} rows: narrow the list first."
            if rows
            else "Nothing to do: none of these is in such a state."
        )
        messages.warning(request, why)
        return redirect(back)
    reason = request.POST.get("reason", "").strip()
    if request.method == "POST" and reason and len(reason) <= 200:
        done = lever.act(request, rows, reason)
        if isinstance(done, HttpResponse):
            return done
        messages.info(request, done)
        return redirect(back)
    return TemplateResponse(
        request,
        "admin/lever.html",
        {
            **page.admin_site.each_context(request),
            "title": f"{lever.label}: {str(rows[0]) if object_id else plural(len(rows), str(page.opts.verbose_name))}",
            "lever": lever,
            "consequence": lever.consequence(rows),
            "rows": [(show.page_of(row), str(row)) for row in rows[:50]],
            "more": max(0, len(rows) - 50),
            "left_out": max(0, chosen.count() - len(rows)),
            "selected": [row.pk for row in rows] if not object_id else [],
            "checkbox": ACTION_CHECKBOX_NAME,
            "asked": "reason" in request.POST,
            "back": back,
        },
    )


def _cancel(request: HttpRequest, executions: list[Execution], reason: str) -> str:
    asked = 0
    for execution in executions:
        write_down(request, "execution_cancelled", execution, before={"state": execution.state}, reason=reason)
        asked += async_to_sync(operations.cancel)(execution=execution, reason=reason)
    return f"{plural(asked, 'execution')} asked to end; whoever runs them stops them within a second."


def _kill(request: HttpRequest, sandboxes: list[Sandbox], reason: str) -> str:
    for sandbox in sandboxes:
        write_down(request, "sandbox_killed", sandbox, before={"state": sandbox.state}, reason=reason)

    async def all_of_them() -> int:
        gate = asyncio.Semaphore(KILLS_IN_FLIGHT)

        async def one(sandbox: Sandbox) -> bool:
            async with gate:
                try:
                    return await operations.retire(sandbox, EndReason.KILLED)
                except Exception:  # one that fails must not leave the others alive
                    log.exception("kill_failed", extra={"sandbox_id": sandbox.pk})
                    return False

        return sum(await asyncio.gather(*map(one, sandboxes)))

    confirmed = async_to_sync(all_of_them)()
    waiting = len(sandboxes) - confirmed
    later = (
        f" {plural(waiting, 'kill')} not confirmed yet: the background loop asks again until it is." if waiting else ""
    )
    return f"{plural(confirmed, 'sandbox')} gone.{later}"


def _turn(verb: Callable[..., Any], name: str, done: str) -> Callable[[HttpRequest, list[Sandbox], str], str]:
    """Pause or resume each; those that cannot be now say why."""

    def act(request: HttpRequest, sandboxes: list[Sandbox], reason: str) -> str:
        count, said = 0, []
        for sandbox in sandboxes:
            try:
                async_to_sync(verb)(sandbox)
            except SandgateError as e:
                said.append(f"{sandbox}: {e.detail}")
                continue
            write_down(request, name, sandbox, reason=reason)
            count += 1
        return " ".join([f"{plural(count, 'session')} {done}.", *said[:5]])

    return act


async def _pause(sandbox: Sandbox) -> None:
    await operations.pause(sandbox, on_request=True)


def _killed(sandboxes: list[Sandbox]) -> str:
    inside = Execution.objects.open().filter(sandbox__in=[sandbox.pk for sandbox in sandboxes]).count()
    runs = (
        f" {plural(inside, 'execution')} running there will end as errored." if inside else " Nothing is running there."
    )
    return (
        f"{plural(len(sandboxes), 'sandbox')} will be destroyed with all variables and files."
        f"{runs} What was used is billed, the rest of the reservation goes back to the budget."
    )


def _switch(on: bool) -> Callable[[HttpRequest, list[Agent], str], str]:
    def act(request: HttpRequest, agents: list[Agent], reason: str) -> str:
        switched = 0
        for agent in agents:
            with transaction.atomic():
                if Agent.objects.filter(pk=agent.pk, is_active=not on).update(is_active=on):
                    name = "agent_switched_on" if on else "agent_switched_off"
                    facts = {"before": {"is_active": not on}, "after": {"is_active": on}}
                    write_down(request, name, agent, reason=reason, **facts)
                    switched += 1
        return f"{plural(switched, 'agent')} switched {'on' if on else 'off'}."

    return act


def _switched_off(agents: list[Agent]) -> str:
    running = Execution.objects.open().filter(agent__in=[agent.pk for agent in agents]).count()
    goes_on = (
        f" {plural(running, 'execution')} in flight will go on to the end: cancel what must not." if running else ""
    )
    return f"Requests of {plural(len(agents), 'agent')} will be refused from now on, through every key and session.{goes_on}"


def _revoke(request: HttpRequest, revoked: list[ApiKey], reason: str) -> str:
    count = 0
    for key in revoked:
        with transaction.atomic():
            now = timezone.now()
            if ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=now):
                write_down(request, "key_revoked", key, before={"name": key.name}, reason=reason)
                count += 1
    return f"{plural(count, 'key')} revoked: programs that send them are refused."


def _revert(request: HttpRequest, events: list[AuditEvent], reason: str) -> str:
    taken, refused = 0, []
    for event in events:
        model = operations.model_of(event)
        if model is not None and not request.user.has_perm(f"executions.change_{model._meta.model_name}"):
            refused.append(f"{event.seq}: that needs the permission to change such rows.")
            continue
        try:
            operations.revert(event, caller=caller_of(request, event.team), reason=reason)
            taken += 1
        except Conflict as no:
            refused.append(f"{event.seq}: {no.detail}")
    return " ".join([f"{plural(taken, 'change')} taken back.", *refused])


def _sign_in(request: HttpRequest, people: list[User], reason: str) -> str | HttpResponse:
    person = people[0]
    path = keys.make_sign_in_link(person)
    write_down(request, "sign_in_link_made", person, reason=reason)
    return shown_once(
        request,
        title=f"Sign-in link for {person}",
        secret=request.build_absolute_uri(path),
        says=f"It signs {person} in once, within the hour. It is not shown again.",
        back=show.page_of(person),
    )


def _rebuild(request: HttpRequest, templates: list[Template], reason: str) -> str:
    for template in templates:
        with transaction.atomic():
            operations.rebuild(template)
            write_down(request, "template_rebuilt", template, before={"build": template.build}, reason=reason)
    return f"{plural(len(templates), 'template')} will be built anew within seconds; this page says how it goes."


def shown_once(request: HttpRequest, **context: Any) -> HttpResponse:
    """A page with a secret: rendered from memory, kept by no cookie and no session; the admin's pages are never cached."""
    return TemplateResponse(request, "admin/shown_once.html", {**admin.site.each_context(request), **context})


CANCEL = Lever(
    "cancel",
    "Cancel",
    "block",
    applies=lambda rows: rows.filter(ended_at__isnull=True),
    consequence=lambda rows: (
        f"{plural(len(rows), 'execution')} will be stopped within a second and end as cancelled. "
        "The time used until then is billed. Whoever waits for them is told the reason."
    ),
    act=_cancel,
)
KILL = Lever(
    "kill",
    "Kill",
    "delete_forever",
    applies=lambda rows: rows.filter(ended_at__isnull=True),
    consequence=_killed,
    act=_kill,
)
PAUSE = Lever(
    "pause",
    "Pause",
    "pause",
    applies=lambda rows: rows.filter(kept=True, state=SandboxState.LEASED),
    consequence=lambda rows: (
        f"{plural(len(rows), 'session')} will stand still, with variables and files, until they are used again or their time "
        "is over; they do not end idle. Sessions in which code runs are left alone. On E2B their charges stop."
    ),
    act=_turn(_pause, "session_paused", "paused"),
)
RESUME = Lever(
    "resume",
    "Resume",
    "play_arrow",
    applies=lambda rows: rows.filter(state=SandboxState.PAUSED),
    consequence=lambda rows: (
        f"{plural(len(rows), 'session')} will run again. What they may cost until their end is reserved first, and where a "
        "budget does not cover it they stay paused."
    ),
    act=_turn(operations.wake, "session_resumed", "resumed"),
)
SWITCH_OFF = Lever(
    "switch_off",
    "Switch off",
    "power_settings_new",
    applies=lambda rows: rows.filter(is_active=True),
    consequence=_switched_off,
    act=_switch(False),
)
SWITCH_ON = Lever(
    "switch_on",
    "Switch on",
    "power_settings_new",
    applies=lambda rows: rows.filter(is_active=False),
    consequence=lambda rows: f"Requests of {plural(len(rows), 'agent')} will be admitted again, within their quotas.",
    act=_switch(True),
)
REVOKE = Lever(
    "revoke",
    "Revoke",
    "key_off",
    applies=lambda rows: rows.filter(revoked_at__isnull=True),
    consequence=lambda rows: (
        f"Programs that send {plural(len(rows), 'key')} will be refused at once. A key cannot be un-revoked."
    ),
    act=_revoke,
)
REBUILD = Lever(
    "rebuild",
    "Rebuild",
    "construction",
    applies=lambda rows: rows.filter(is_active=True),
    consequence=lambda rows: (
        f"{plural(len(rows), 'template')} will be built anew on every machine: the newest packages that fit, and a fresh "
        "zygote. Until that is ready the present one serves; sandboxes that live are left alone."
    ),
    act=_rebuild,
)
REVERT = Lever(
    "revert",
    "Take back",
    "undo",
    applies=lambda rows: rows.filter(before__isnull=False, after__isnull=False),
    consequence=lambda rows: (
        f"The fields of {plural(len(rows), 'change')} get their former values again, unless they have changed since. "
        "That is one more event; nothing is taken out of the audit."
    ),
    act=_revert,
)
SIGN_IN = Lever(
    "sign_in_link",
    "Make a sign-in link",
    "login",
    applies=lambda rows: rows.filter(is_active=True),
    consequence=lambda rows: (
        f"A link is shown once that signs {rows[0]} in, once, within the hour. Whoever has it is {rows[0]}."
    ),
    act=_sign_in,
    permission="sign_in",
)
