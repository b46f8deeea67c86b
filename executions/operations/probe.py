"""Whether a backend that was out makes sandboxes again: one process at a time makes one and ends it, on the system's account."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from django.db import transaction

from executions import backends, breaker, capacity, pool
from executions.backends.base import Handle
from executions.errors import BackendUnavailable, Refused
from executions.hop import rows
from executions.keys import Caller
from executions.models import Agent, Sandbox, Team, Template
from executions.operations.boot import make, never_was
from executions.operations.reap import retire
from executions.states import EndReason, SandboxState

CHECK_SECONDS, BOOT_SECONDS = 2, 6  # together within the lease of a probe
LIFETIME_SECONDS = 30
_probing: dict[str, asyncio.Task] = {}
log = logging.getLogger(__name__)


def soon() -> None:
    """Probe, in this process, every backend whose time has come; asked before each run and by the background, no query."""
    for alias in backends.aliases():
        if breaker.due(alias) and alias not in _probing:
            task = _probing[alias] = asyncio.create_task(probe(alias), name=f"probe {alias}")
            task.add_done_callback(partial(_forget, alias))


def _forget(alias: str, task: asyncio.Task) -> None:
    _probing.pop(alias, None)


async def look() -> None:
    """The background's round: read the rows, then probe what is due."""
    await rows(breaker.look)
    soon()


async def probe(alias: str) -> None:
    """One probe, if this process gets it. What the provider's list does not refuse is tried with a real sandbox."""
    token = await rows(breaker.claim, alias)
    if not token:
        return
    why, wait = "the probe broke", 0.0
    made: list[tuple[Sandbox, Handle | None]] = []
    try:
        why, wait = await _tried(alias, made)
    except Exception:
        log.exception("probe_broke", extra={"backend": alias})
    finally:
        await rows(breaker.answered, alias, token, why, retry_after=wait)
    for sandbox, handle in made:
        await _end(sandbox, handle)


async def _tried(alias: str, made: list[tuple[Sandbox, Handle | None]]) -> tuple[str, float]:
    """Why there are no sandboxes yet, empty where there are, and the seconds for which the provider asks.

    `made` gets what has to be ended, once the others have been told.
    """
    if drilled := breaker.drilled(alias):
        return drilled, 0
    try:
        async with asyncio.timeout(CHECK_SECONDS):  # costs nothing, and no row for each try of a long outage
            checked = await backends.get(alias).check()
        if not checked.ok:
            return checked.detail, 0
        sandbox = await rows(_intend, alias)
    except TimeoutError:
        return f"no answer within {CHECK_SECONDS} s", 0
    except Refused as refusal:
        return f"the probe was refused: {refusal.detail}", 0
    except capacity.Full:  # it answers, and what is full is kept out by that
        return "", 0
    try:
        async with asyncio.timeout(BOOT_SECONDS):
            made.append((sandbox, await make(sandbox)))
    except TimeoutError:
        made.append((sandbox, None))
        return f"no sandbox within {BOOT_SECONDS} s", 0
    except BackendUnavailable as e:
        await rows(_never_was, sandbox, e)
        return e.detail, float(e.facts.get("retry_after") or 0)
    return "", 0


async def _end(sandbox: Sandbox, handle: Handle | None) -> None:
    """Kill it; what is not confirmed stays RETIRING for `reap`."""
    if handle is not None:
        await rows(_ready, sandbox, handle)
    await retire(sandbox, EndReason.FINISHED)


@transaction.atomic(durable=True)
def _intend(alias: str) -> Sandbox:
    template = Template.objects.filter(is_active=True).order_by("name").first()
    template = Template.objects.filter(is_active=True, name="default").first() or template
    if template is None:
        raise Refused("there is no template.")
    return pool.intend(system(), alias=alias, template=template, seconds=LIFETIME_SECONDS, env=template.env)


@transaction.atomic(durable=True)
def _never_was(sandbox: Sandbox, why: BackendUnavailable) -> None:
    never_was(sandbox, why)


@transaction.atomic(durable=True)
def _ready(sandbox: Sandbox, handle: Handle) -> None:
    sandbox.advance(SandboxState.LEASED, handle=handle)


def system() -> Caller:
    """Who pays for probes: an agent of the team that also pays for warm pools. Made when first needed."""
    team, _ = Team.objects.get_or_create(name=pool.ACCOUNT)
    agent, _ = Agent.objects.get_or_create(
        team=team,
        name="probes",
        defaults={"description": "Pays for the sandboxes that tell whether a backend is well."},
    )
    return Caller(team=team, agent=agent, door="system")
