"""Tools that keep a sandbox: sessions, packages, and what the agent can count on."""

from __future__ import annotations

import asyncio
import hashlib
import time
from decimal import Decimal
from typing import Annotated, Any

from django.utils import timezone
from pydantic import BaseModel, Field

from executions import operations, routes
from executions.errors import BackendUnavailable, BudgetExhausted
from executions.hop import rows
from executions.keys import Caller
from executions.mcp import answers, resources
from executions.mcp.answers import Answer
from executions.mcp.call import Call, SessionId
from executions.models import Package, Sandbox
from executions.packages.progress import Progress
from executions.pool import MARGIN_SECONDS
from executions.serializers import (
    Accepted,
    InstallRequest,
    PackageShape,
    SessionRequest,
    SessionShape,
    package_shape,
    session_shape,
)

SESSION_SECONDS = 1800  # a session of an agent ends so long after its last run began …
IDLE_SECONDS = 300  # … or when nothing has run in it for so long
KEPT_TOLD = 20  # artifacts that end_session names
OPENED_HERE = {"opened_by": "execute_code"}


async def open_for(call: Call, language: str, token: str | None, max_cost_usd: Decimal | None = None) -> str:
    """A session that has the language; the same one for a repeated token. Raises Refused, BackendUnavailable."""
    route = await rows(routes.plan, call.caller, asked=None, language=language)
    request = SessionRequest(
        route=route.aliases,
        timeout_seconds=SESSION_SECONDS,
        idle_timeout_seconds=IDLE_SECONDS,
        metadata=OPENED_HERE,
        max_cost_usd=max_cost_usd,
    )
    own = f"session-{hashlib.sha256(token.encode()).hexdigest()}" if token else None
    opening = asyncio.ensure_future(operations.open_session(caller=call.caller, request=request, idempotency_key=own))
    await asyncio.wait({opening}, timeout=call.left())
    if not opening.done():
        leave(opening)
        raise _still_booting()
    try:
        sandbox = opening.result()
    except BudgetExhausted as e:
        e.remedy = f"{what_fits(e)} {BudgetExhausted.remedy}"
        raise
    while sandbox.handle is None and not sandbox.ended_at:  # its twin is still booting it
        if not call.left():
            raise _still_booting()
        await asyncio.sleep(0.1)
        await rows(sandbox.refresh_from_db)
    return sandbox.pk


def _still_booting() -> BackendUnavailable:
    return BackendUnavailable(
        "The sandbox is still booting; the code has not run.",
        remedy="get_environment lists it as a live session when it is ready: run the code there.",
    )


_left: set[asyncio.Future[Any]] = set()


def leave(work: asyncio.Future[Any]) -> None:
    """Let work go on that the call cannot wait for; how it ends is seen by whoever asks next."""

    def ended(_: asyncio.Future[Any]) -> None:
        _left.discard(work)
        if not work.cancelled():
            work.exception()

    _left.add(work)
    work.add_done_callback(ended)


def what_fits(refused: BudgetExhausted) -> str:
    """The run that the rest of the budget pays for, when it does not pay for a session."""
    rate = refused.facts["needed"] / SESSION_SECONDS
    seconds = int(refused.facts["remaining"] / rate) - MARGIN_SECONDS
    return f"keep_session=false and timeout_seconds ≤ {seconds} fit." if seconds > 0 else "No run fits any more."


LOOK_AGAIN_SECONDS = 60
_far_from_its_end: dict[str, float] = {}  # session to the moment until which nobody need look: spares a call its hop


async def keep_open(caller: Caller, session_id: str, timeout_seconds: int | None) -> None:
    """A session that execute_code opened lasts as long as it is used. Raises what the verb does when no time is left to run."""

    def seconds_left() -> float | None:
        sandbox = operations.find_session(caller, session_id)
        if sandbox.ended_at or sandbox.metadata != OPENED_HERE:
            return None  # whoever opened it said when it ends
        return (sandbox.leased_until - timezone.now()).total_seconds()

    assert caller.agent is not None
    needed = timeout_seconds or caller.agent.timeout_seconds
    enough = SESSION_SECONDS / 2
    if needed <= enough and time.monotonic() < _far_from_its_end.get(session_id, 0):
        return
    left = await rows(seconds_left)
    if left is None or left > max(needed, enough):
        if len(_far_from_its_end) > 10_000:
            _far_from_its_end.clear()
        spare = LOOK_AGAIN_SECONDS if left is None else min(LOOK_AGAIN_SECONDS, left - enough)
        _far_from_its_end[session_id] = time.monotonic() + spare
        return
    try:
        await operations.extend_session(caller=caller, session_id=session_id, seconds=SESSION_SECONDS)
    except BudgetExhausted:
        if left < needed:
            raise


class EndSession(Accepted):
    session_id: SessionId


async def end_session(call: Call, asked: EndSession) -> Answer:
    sandbox = await operations.end_session(caller=call.caller, session_id=asked.session_id)
    shape = await rows(lambda: session_shape(Sandbox.objects.select_related("agent", "template").get(pk=sandbox.pk)))
    kept = await rows(lambda: list(sandbox.artifacts.order_by("name")[:KEPT_TOLD]))
    lines = [f"The session {shape.id} has ended ({shape.end_reason}); its cost is {_cost(shape)}.", shape.kept]
    lines += [f"{artifact.pk}  {artifact.name!r}  {artifact.size_bytes:,} bytes" for artifact in kept]
    if kept:
        lines.append(
            f'execute_code(files={{"data": {{"artifact": "{kept[0].pk}"}}}}) takes one of them into a later run.'
        )
    found = answers.of(shape, "\n".join(line for line in lines if line))
    found.links = [resources.of_artifact(artifact) for artifact in kept]
    return found


def _cost(shape: SessionShape) -> str:
    return f"${shape.cost_usd}" if shape.cost_usd[:1].isdigit() else shape.cost_usd


class InstallPackage(InstallRequest):
    packages: list[Annotated[str, Field(max_length=200)]] = Field(
        min_length=1,
        max_length=50,
        description="Names with plain versions, e.g. emoji or polars>=1.0; no URLs or options.",
    )
    session_id: SessionId | None = Field(None, description="Left out: into all the agent's future sandboxes.")


class Installed(BaseModel):
    """What can be imported now; `state` is "running", and `progress` says how far it is, while packages are still being fetched."""

    state: str
    progress: str = ""
    session_id: str = Field("", description="Empty: into the agent's lock, for all its future sandboxes.")
    packages: list[PackageShape] = []
    lock_hash: str = ""
    added: dict[str, str] = Field({}, description="Name to version.")
    removed: dict[str, str] = {}
    changed: dict[str, list[str]] = Field({}, description="Name to the versions before and after.")


async def install_package(call: Call, asked: InstallPackage) -> Answer:
    session = {"session_id": asked.session_id} if asked.session_id else {}
    verb = operations.install if session else operations.install_for_agent
    progress = Progress()
    installing = asyncio.ensure_future(
        verb(caller=call.caller, requirements=asked.packages, progress=progress, **session)
    )
    while not installing.done() and call.left():
        await asyncio.wait({installing}, timeout=call.next_look())
        if not installing.done() and call.report:
            await call.report(time.monotonic() - call.began, str(progress))
    if not installing.done():
        leave(installing)
        text = (
            f"Not ready yet: {progress}. It goes on; call install_package with the same arguments to wait for the rest."
        )
        return answers.of(Installed(state="running", progress=str(progress), **session), text)
    done = installing.result()
    names = ", ".join(f"{p.name} {p.version}".strip() for p in done.packages)
    shape = Installed(
        state="installed",
        packages=[package_shape(package) for package in done.packages],
        lock_hash=done.lock_hash,
        added=done.added,
        removed=done.removed,
        changed=done.changed,
        **session,
    )
    if session:
        return answers.of(shape, f"Importable now: {names}. session_id: {asked.session_id}")
    more = f" In all {len(done.added)} were added." if len(done.added) > 1 else ""
    text = (
        f"Importable in every sandbox that is made from now on: {names}.{more} Sessions that are open do not have them."
    )
    return answers.of(shape, f"{text} lock_hash: {done.lock_hash}")


class GetEnvironment(Accepted):
    session_id: SessionId | None = None


class Environment(BaseModel):
    """What the agent can count on."""

    agent: str
    languages: list[str]
    route: list[str]
    isolation: dict[str, str]
    template: str
    packages: dict[str, Any]
    network: str
    network_allow: list[str] = []
    timeout_seconds: dict[str, int]
    outages: list[str] = Field([], description="Backends that take no sandboxes now, since when and why.")
    limits: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    session: SessionShape | None = None
    installed: list[PackageShape] = Field([], description="What was installed into the session that was named.")


async def get_environment(call: Call, asked: GetEnvironment) -> Answer:
    def look() -> Environment:
        found = Environment(**operations.environment(caller=call.caller))
        if asked.session_id:
            sandbox = operations.find_session(call.caller, asked.session_id)
            found.session = session_shape(sandbox)
            found.installed = [package_shape(p) for p in Package.objects.filter(sandbox=sandbox).order_by("name")[:200]]
        return found

    found = await rows(look)
    times = found.timeout_seconds
    lines = [
        f"agent {found.agent}: {', '.join(found.languages) or 'no language'} on {', '.join(found.route) or 'no backend'}",
        f"network: {found.network}; packages that may be installed: {', '.join(found.packages['may_install']) or 'none'}",
        f"a run may take {times['max']} s, {times['default']} s when it does not say",
    ]
    if locked := found.packages["in_every_sandbox"]:
        lines.append("in every new sandbox: " + ", ".join(f"{name} {version}" for name, version in locked.items()))
    lines += [f"outage: {outage}" for outage in found.outages]
    for limit in found.limits:
        left = f"${limit['remaining_usd']}" if limit["remaining_usd"] else limit["remaining"]
        resets = f", resets {limit['resets_at']}" if limit["resets_at"] else ""
        lines.append(f"limit of {limit['scope']}: {left} {limit['unit']} per {limit['window']} left{resets}")
    lines += [f"live session {s['id']} on {s['backend']}, ends {s['end_at']}" for s in found.sessions]
    if found.installed:
        lines.append("installed: " + ", ".join(f"{p.name} {p.version}" for p in found.installed))
    return answers.of(found, "\n".join(lines))
