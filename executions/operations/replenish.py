"""Keeping warm pools full: what they lack is booted, what they should not hold any more is let go of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from datetime import timedelta

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from executions import backends, breaker, capacity, demand, faults, ledger, pool, routes
from executions.backends.base import Backend, Handle
from executions.errors import BackendError, BackendUnavailable, Refused, SandboxLost
from executions.hop import rows
from executions.models import Claim, IllegalTransition, Pool, Sandbox
from executions.operations.boot import boot_alone, never_was
from executions.operations.reap import retire
from executions.states import EndReason, SandboxState

S = SandboxState
BOOT_SECONDS = 15  # longer than this a boot is given up
BOOT_PATIENCE = timedelta(seconds=20)  # then whoever booted it has died
TOGETHER_SECONDS = 0.2  # claims that come so close are made good in one round
SETTLED_AT_ONCE = 500
BOOTS_AT_ONCE = 10  # of one pool and round
REPLACE_SECONDS = 90  # its successor is booted when its provider would end it in so long,
RETIRE_SECONDS = 45  # and it is let go of now
FIT_AFTER_SECONDS = 2  # a run that is over by then is not worth a request
RETRY_MOST_SECONDS = 60
log = logging.getLogger(__name__)

_tasks: set[asyncio.Task] = set()
_round: asyncio.Task | None = None
_again = False


def soon() -> None:
    """Something was taken from a pool, or missing in it: have this process see to it now."""
    global _round, _again
    if _round is not None and not _round.done() and _round.get_loop() is asyncio.get_running_loop():
        _again = True
        return
    _round = asyncio.create_task(_rounds(), name="replenish")


async def _rounds() -> None:
    global _again
    while True:
        await asyncio.sleep(TOGETHER_SECONDS)
        _again = False
        try:
            await _fill()
        except Exception:
            log.exception("replenish_failed")
        if not _again:
            return


async def replenish() -> None:
    """One round over all pools. Boots and kills go on after it has returned; `settled` waits for them."""
    await _fill()
    await rows(settle_claims)


async def _fill() -> None:
    for found in await rows(find_pools):
        intents, surplus = await rows(plan, found)
        for sandbox in intents:
            _spawn(_boot(sandbox))
        for sandbox, reason in surplus:
            _spawn(retire(sandbox, reason))


async def settled() -> None:
    """Wait for the boots and kills that this process has begun."""
    while tasks := [task for task in (*_tasks, _round) if task is not None and not task.done()]:
        await asyncio.wait(tasks)


def _spawn(work: Coroutine) -> None:
    task = asyncio.create_task(work)
    _tasks.add(task)
    task.add_done_callback(_ended)


def _ended(task: asyncio.Task) -> None:
    _tasks.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("pool_work_failed", exc_info=task.exception())


def find_pools() -> list[Pool]:
    return list(Pool.objects.select_related("template", "packages_of"))


def plan(found: Pool) -> tuple[list[Sandbox], list[tuple[Sandbox, str]]]:
    """The intents of what the pool lacks, inserted, and what is to be let go of, with why.

    Intents are inserted under a lock on the pool's row, so that of many processes one inserts them; whoever did boots
    them. Most rounds find nothing to do, and lock nothing.
    """
    missing, _, surplus = _look(found)
    if missing <= 0:
        if found.trouble:
            Pool.objects.filter(pk=found.pk).update(trouble="")
        return [], surplus
    with transaction.atomic(durable=True):
        locked = Pool.objects.select_for_update(of=("self",)).select_related("template", "packages_of", "agent__team")
        found = locked.get(pk=found.pk)
        missing, is_booting, _ = _look(found)
        intents, trouble = _intents(found, missing, is_booting) if missing > 0 else ([], "")
        if trouble != found.trouble:
            Pool.objects.filter(pk=found.pk).update(trouble=trouble[:500])
    return intents, surplus


def _look(found: Pool) -> tuple[int, bool, list[tuple[Sandbox, str]]]:
    """(how many are missing, whether any is being booted, what is to be let go of)."""
    now = timezone.now()
    held = found.sandboxes.here().filter(ended_at=None, state__in=[S.BOOTING, S.IDLE]).exclude(made_of="")
    facts = held.order_by("leased_until").values_list(
        "pk", "state", "created_at", "leased_until", "made_of", "isolation"
    )
    isolation = backends.get(found.backend).isolation if found.backend in backends.aliases() else ""
    as_today = (pool.made_of(found, found.template, pool.lock_of(found)), isolation)
    ready: list[str] = []
    booting, over = 0, dict[str, str]()
    for pk, state, created_at, leased_until, *made in facts:  # no whole rows: there may be hundreds, and most stay
        left = (leased_until - now).total_seconds()
        if state == S.BOOTING and created_at < now - BOOT_PATIENCE:
            over[pk] = EndReason.LOST
        elif state == S.IDLE and tuple(made) != as_today:
            over[pk] = EndReason.EVICTED
        elif left < RETIRE_SECONDS:
            over[pk] = EndReason.IDLE
        elif left >= REPLACE_SECONDS and state == S.BOOTING:
            booting += 1
        elif left >= REPLACE_SECONDS:
            ready.append(pk)
    missing = demand.wanted(found, now) - len(ready) - booting
    over |= dict.fromkeys(ready[: max(0, -missing)], EndReason.IDLE)
    whole = Sandbox.objects.select_related("template", "agent").in_bulk(list(over)) if over else {}
    return missing, booting > 0, [(whole[pk], reason) for pk, reason in over.items() if pk in whole]


def _intents(found: Pool, missing: int, is_booting: bool) -> tuple[list[Sandbox], str]:
    """As many intents as may be inserted now, and why not all of them; after a failure one at a time is tried."""
    if why := _unfit(found):
        return [], why
    if found.failures:
        if is_booting or (found.retry_at and found.retry_at > timezone.now()):
            return [], found.trouble
        missing = 1
    account, lock_id = pool.account(found), pool.lock_of(found)
    made_of = pool.made_of(found, found.template, lock_id)
    intents: list[Sandbox] = []
    for _ in range(min(missing, BOOTS_AT_ONCE)):
        try:
            with transaction.atomic():
                intents.append(
                    pool.intend(
                        account, alias=found.backend, template=found.template, seconds=found.lifetime_seconds,
                        memory_mib=found.memory_mib or found.template.memory_mib, network_allow=found.network_allow,
                        env=found.template.env, pool=found, made_of=made_of, lock_id=lock_id,
                    )
                )  # fmt: skip
        except Refused as e:
            return intents, e.detail
        except capacity.Full as full:
            return intents, f"{found.backend} {full}."
    return intents, found.trouble if found.failures else ""


def _unfit(found: Pool) -> str:
    """Why this backend can have no such pool now; empty where it can."""
    if found.backend not in backends.aliases():
        return f"{found.backend} is not configured."
    backend = backends.get(found.backend)
    why = backend.refusal or routes.lacking(found.template, backend) or backend.network_refusal(found.network_allow)
    why = why or breaker.outage(found.backend)
    return f"{found.backend}: {why}." if why else ""


# One boot


async def _boot(sandbox: Sandbox) -> None:
    """From the intent to a sandbox that answers: IDLE. What fails is given up, and the pool waits longer each time."""
    backend, handle = backends.get(sandbox.backend), None
    try:
        async with asyncio.timeout(BOOT_SECONDS):
            handle = await boot_alone(sandbox)
            await _answers(backend, handle)
        faults.point("pool_booted")
        await rows(_ready, sandbox, handle)
    except IllegalTransition:  # given up meanwhile, by whoever thought that this process had died
        if handle is not None:
            await backend.kill(handle)
    except (BackendError, OSError, TimeoutError) as e:
        if isinstance(e, BackendUnavailable) and handle is None:
            why = e
        else:
            said = e.detail if isinstance(e, BackendError) else f"It did not answer within {BOOT_SECONDS} s."
            why = BackendUnavailable(said, perhaps=True)
        facts = {"sandbox_id": sandbox.pk, "backend": sandbox.backend, "detail": str(why)}
        log.warning("pool_boot_failed", extra=facts)
        await rows(_failed, sandbox, why)
        await retire(sandbox, EndReason.OUTAGE)


async def _answers(backend: Backend, handle: Handle) -> None:
    """Raises BackendError unless code could run in it now: its interpreter answers, not only its machine."""
    if backend.capabilities.contexts:
        await backend.list_contexts(handle)
    else:
        await backend.connect(handle)


@transaction.atomic(durable=True)
def _ready(sandbox: Sandbox, handle: Handle) -> None:
    isolation = backends.get(sandbox.backend).isolation
    sandbox.advance(S.IDLE, handle=handle, ready_at=timezone.now(), isolation=isolation)
    failing = Pool.objects.filter(Q(failures__gt=0) | ~Q(trouble=""), pk=sandbox.pool_id)
    failing.update(failures=0, retry_at=None, trouble="")


@transaction.atomic(durable=True)
def _failed(sandbox: Sandbox, why: BackendUnavailable) -> None:
    now = timezone.now()
    found = Pool.objects.select_for_update().get(pk=sandbox.pool_id)
    if found.retry_at is None or found.retry_at <= now:  # of boots that fail together, one counts
        wait = min(RETRY_MOST_SECONDS, 2**found.failures)
        found.failures, found.retry_at = min(found.failures + 1, 10), now + timedelta(seconds=wait)
    found.trouble = why.detail[:500]
    found.save(update_fields=["failures", "retry_at", "trouble"])
    never_was(sandbox, why)


# After a claim


def taken(sandbox: Sandbox, using: asyncio.Task) -> None:
    """A run has a sandbox of a pool, or found none ready there: see to its successor, and to the provider's timeout."""
    soon()
    if sandbox.made_of:
        fitting = asyncio.create_task(fit(sandbox))
        using.add_done_callback(lambda _: fitting.cancel())


async def fit(sandbox: Sandbox, *, after_seconds: float = FIT_AFTER_SECONDS) -> None:
    """Have the provider end a claimed sandbox when its lease does: until then the pool still reserves the difference."""
    await asyncio.sleep(after_seconds)
    try:
        await _fit(sandbox)
    except (BackendError, OSError, TimeoutError) as e:
        log.warning("lease_not_fitted", extra={"sandbox_id": sandbox.pk, "error": str(e)})


async def fit_session(sandbox: Sandbox) -> None:
    """The same for a session, before it is handed out. BackendUnavailable where there is none any more: nothing has run."""
    soon()
    try:
        await _fit(sandbox)
    except (BackendError, OSError, TimeoutError) as e:
        gone = isinstance(e, SandboxLost)
        raise BackendUnavailable(f"A sandbox of the pool could not be had: {e}", perhaps=not gone) from None


async def _fit(sandbox: Sandbox) -> None:
    left = max(1, int((sandbox.leased_until - timezone.now()).total_seconds())) + sandbox.grace_seconds
    await backends.get(sandbox.backend).set_timeout(sandbox.machine, left)
    await rows(settle_claims, Claim.objects.filter(pk=sandbox.pk))


def settle_claims(which: QuerySet[Claim] | None = None) -> None:
    """Bill to the pools what claimed sandboxes cost until they were claimed; by default, of those that have ended."""
    if which is None:
        which = Claim.objects.filter(sandbox__ended_at__isnull=False)
    ending = which.filter(spent_nano_usd=None).select_related("sandbox", "pool__agent")
    if not ending.exists():
        return
    with transaction.atomic(durable=True):
        ledger.bill_claims(list(ending.select_for_update(of=("self",), skip_locked=True)[:SETTLED_AT_ONCE]))
        faults.point("claims_billed")


__all__ = ["fit", "fit_session", "replenish", "settle_claims", "settled", "soon", "taken"]
