"""Sessions in which nothing runs are paused, and resumed by whoever needs them first.

PAUSED without `turning_until` has been confirmed by the backend: where a pause is free, nothing is billed or reserved.
PAUSED with it means that some process pauses or resumes it until then, and later that this process has died: the machine
may be running, so its time is billed and its reservation stays, until somebody has asked the backend again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from executions import backends, ledger, quotas
from executions.errors import BackendError, BackendUnavailable, Conflict, SandboxLost, SessionGone, Unsupported
from executions.hop import rows
from executions.keys import Caller
from executions.models import Execution, IllegalTransition, Sandbox, Usage
from executions.operations import artifacts
from executions.states import EndReason, SandboxState

S = SandboxState
log = logging.getLogger(__name__)
TURN = timedelta(seconds=90)  # for one call to the backend: E2B takes about 4 s to pause each GiB of memory
LOOK_SECONDS = 0.05
AT_ONCE = 200


def reserve_until(sandbox: Sandbox, end: datetime) -> None:
    """Reserve what the session may still cost up to `end`, as far as it is not reserved. Raises BudgetExhausted.

    Call it in the verb's transaction, on a row that is locked.
    """
    seconds = (end - (sandbox.metered_until or sandbox.created_at)).total_seconds() + sandbox.grace_seconds
    missing = sandbox.rate_nano_usd_per_second * (int(seconds) + 1) - sandbox.reserved_nano_usd
    longer = math.ceil((end - sandbox.leased_until).total_seconds())
    if missing <= 0 and longer <= 0:
        return
    missing = max(0, missing)
    owner = Caller(team=sandbox.team, agent=sandbox.agent, key=sandbox.key, person=sandbox.actor)
    budgets = quotas.take(owner, seconds=max(0, longer), nano_usd=missing, backend=sandbox.backend)
    if not missing:
        return
    if not sandbox.reserved_nano_usd:
        sandbox.reserved_on = budgets
    elif sorted(budgets) != sorted(sandbox.reserved_on):  # budgets were added or removed since it was opened
        quotas.settle(budgets, release=missing)
        quotas.settle(sandbox.reserved_on, release=-missing)
    ledger.record_reservation(sandbox, missing)
    sandbox.reserved_nano_usd += missing
    Sandbox.objects.filter(pk=sandbox.pk).update(
        reserved_nano_usd=sandbox.reserved_nano_usd, reserved_on=sandbox.reserved_on
    )


def locked(sandbox_id: str) -> Sandbox:
    """The row, for this transaction alone, with those who pay for it."""
    related = ("team", "agent__team", "key", "actor", "template")
    return Sandbox.objects.select_for_update(of=("self",)).select_related(*related).get(pk=sandbox_id)


def is_free(sandbox: Sandbox) -> bool:
    """Whether it costs nothing while it is paused."""
    return backends.get(sandbox.backend).capabilities.pause_is_free


# Resume


@transaction.atomic
def rouse(sandbox: Sandbox) -> None:
    """Claim a session that is not simply LEASED: what it may cost is reserved, and nobody pauses it any more.

    It comes back LEASED, or PAUSED for `awake` to resume. Raises BudgetExhausted, SessionGone; then nothing has changed.
    """
    row, now = locked(sandbox.pk), timezone.now()
    if row.state not in (S.LEASED, S.PAUSED):
        raise artifacts.gone(row)
    row.last_used_at = now
    if row.state == S.PAUSED and row.turning_until is None:
        row.turning_until = now
        if is_free(row):
            row.metered_until = now
            reserve_until(row, row.leased_until)
    row.stays_paused = False
    changed = ("last_used_at", "turning_until", "metered_until", "stays_paused")
    row.save(update_fields=changed)
    for name in (*changed, "state", "reserved_nano_usd", "reserved_on", "leased_until"):
        setattr(sandbox, name, getattr(row, name))


async def wake(sandbox: Sandbox) -> None:
    """Claim it, and return when it runs. Raises BudgetExhausted, SessionGone, BackendUnavailable."""
    await rows(rouse, sandbox)
    await awake(sandbox)


async def awake(sandbox: Sandbox) -> None:
    """Return when the roused session runs; of many callers one resumes it. Raises SessionGone, BackendUnavailable.

    BackendUnavailable: not now; nothing has run, and the next use tries again.
    """
    sandbox.must_be_here()
    while sandbox.state == S.PAUSED:
        if await rows(_take_turn, sandbox):
            await asyncio.shield(asyncio.ensure_future(_resume(sandbox)))  # whoever is second counts on it
        elif sandbox.state == S.PAUSED:
            await asyncio.sleep(LOOK_SECONDS)
    if sandbox.state != S.LEASED:
        raise await rows(artifacts.gone, sandbox)


def _take_turn(sandbox: Sandbox) -> bool:
    """True where it is this process that asks the backend now; otherwise the row has been read again."""
    now = timezone.now()
    free = Sandbox.objects.filter(pk=sandbox.pk, state=S.PAUSED, turning_until__lte=now)
    if free.update(turning_until=now + TURN):
        return True
    sandbox.refresh_from_db(fields=["state", "turning_until", "end_reason", "ended_at"])
    if sandbox.state == S.PAUSED and sandbox.turning_until is None:  # paused in between, for good
        rouse(sandbox)
    return False


async def _resume(sandbox: Sandbox) -> None:
    left = max(1, int((sandbox.leased_until - timezone.now()).total_seconds())) + sandbox.grace_seconds
    try:
        await backends.get(sandbox.backend).resume(sandbox.machine, timeout_seconds=left)
    except SandboxLost as e:
        from executions.operations.reap import retire

        await retire(sandbox, EndReason.LOST)
        raise await rows(artifacts.gone, sandbox) from e
    except (BackendError, OSError, TimeoutError) as e:
        await rows(_give_turn_back, sandbox)
        raise BackendUnavailable(
            f"The session is paused and cannot be resumed at the moment; nothing has run. {e}".strip(),
            remedy="Send the request again in a while: the session is kept.",
            retry_after=5,
        ) from e
    await rows(_resumed, sandbox)


def _give_turn_back(sandbox: Sandbox) -> None:
    Sandbox.objects.filter(pk=sandbox.pk, state=S.PAUSED).update(turning_until=timezone.now())


@transaction.atomic(durable=True)
def _resumed(sandbox: Sandbox) -> None:
    now = timezone.now()
    try:
        sandbox.advance(S.LEASED, reason="resumed", turning_until=None, last_used_at=now)
    except IllegalTransition:  # somebody ended it meanwhile
        Sandbox.objects.filter(pk=sandbox.pk).update(turning_until=now)
        sandbox.refresh_from_db()


# Pause


async def pause(sandbox: Sandbox, *, on_request: bool = False) -> None:
    """Pause a session in which nothing runs. Raises Conflict, SessionGone, Unsupported, BackendError; idempotent."""
    sandbox.must_be_here()
    backend = backends.get(sandbox.backend)
    if not backend.capabilities.pause:
        raise Unsupported(f"Sandboxes of {sandbox.backend} cannot be paused.")
    if await rows(_begin, sandbox, on_request):
        await asyncio.shield(asyncio.ensure_future(_pause(sandbox)))


@transaction.atomic(durable=True)
def _begin(sandbox: Sandbox, on_request: bool) -> bool:
    """Take the turn to pause it; False where there is nothing to do. On request, it stays paused then."""
    row, now = locked(sandbox.pk), timezone.now()
    if row.state not in (S.LEASED, S.PAUSED) or row.handle is None:
        raise (
            artifacts.gone(row) if row.state != S.BOOTING else Conflict("The session is still starting.", retry_after=1)
        )
    if row.turning_until is not None and row.turning_until > now:
        raise Conflict("The session is being paused or resumed.", retry_after=1)
    if Execution.objects.open().filter(sandbox=row).exists():
        raise Conflict("Code runs in the session.", remedy="Wait for its end, or cancel it; then pause.")
    if not on_request and not due(row, now):
        raise Conflict("The session is in use again.")
    if on_request and not row.stays_paused:
        Sandbox.objects.filter(pk=row.pk).update(stays_paused=True)
    if row.state == S.LEASED:
        row.advance(S.PAUSED, reason="paused" if on_request else "idle", turning_until=now + TURN)
    elif row.turning_until is not None:
        Sandbox.objects.filter(pk=row.pk).update(turning_until=now + TURN)
    else:
        return False
    sandbox.refresh_from_db(fields=["state", "turning_until", "last_used_at", "stays_paused"])
    return True


async def _pause(sandbox: Sandbox) -> None:
    try:
        await backends.get(sandbox.backend).pause(sandbox.machine)
    except SandboxLost as e:
        from executions.operations.reap import retire

        await retire(sandbox, EndReason.LOST)
        raise await rows(artifacts.gone, sandbox) from e
    except (BackendError, OSError, TimeoutError):
        await rows(_not_paused, sandbox)
        raise
    await rows(_paused, sandbox)


def _not_paused(sandbox: Sandbox) -> None:
    """It may run or not: whoever needs it asks first. The next try by itself comes after twice the time."""
    Sandbox.objects.filter(pk=sandbox.pk, state=S.PAUSED).update(
        turning_until=timezone.now(), pause_after_seconds=F("pause_after_seconds") * 2
    )


@transaction.atomic(durable=True)
def _paused(sandbox: Sandbox) -> None:
    """The backend has confirmed it: bill until now, and give the rest of the reservation back, unless it is wanted again."""
    row, now = locked(sandbox.pk), timezone.now()
    changed: dict[str, Any] = {"turning_until": now}
    if row.state == S.PAUSED and row.last_used_at == sandbox.last_used_at:
        changed = {"turning_until": None}
        if is_free(row):
            _, billed = ledger.bill(row, (Usage.IDLE, now), final=True)
            changed |= billed
    Sandbox.objects.filter(pk=row.pk).update(**changed)
    for name, value in changed.items():
        setattr(sandbox, name, value)


def due(sandbox: Sandbox, now: datetime) -> bool:
    """Whether it has been idle for as long as it is to be before it is paused."""
    if not sandbox.pause_after_seconds:
        return False
    return sandbox.last_used_at + timedelta(seconds=sandbox.pause_after_seconds) < now


def find_idle() -> list[Sandbox]:
    """Sessions that are due for a pause, those too whose pause or resume was broken off."""
    now = timezone.now()
    used = Execution.objects.open().filter(sandbox__isnull=False).values("sandbox")
    live = Sandbox.objects.open().here().sessions().filter(state__in=[S.LEASED, S.PAUSED], handle__isnull=False)
    live = live.filter(pause_after_seconds__gt=0, leased_until__gt=now).exclude(pk__in=used)
    live = live.exclude(state=S.PAUSED, turning_until__isnull=True).exclude(turning_until__gt=now)
    return [sandbox for sandbox in live.select_related("template")[:AT_ONCE] if due(sandbox, now)]


async def pause_idle() -> int:
    """Pause what is due; returns how many were."""

    async def one(sandbox: Sandbox) -> bool:
        try:
            await pause(sandbox)
        except (Conflict, SessionGone):  # it is used again, or has ended
            return False
        except (BackendError, OSError, TimeoutError) as e:
            log.warning("pause_failed", extra={"sandbox_id": sandbox.pk, "backend": sandbox.backend, "error": str(e)})
            return False
        return True

    return sum(await asyncio.gather(*(one(sandbox) for sandbox in await rows(find_idle))))
