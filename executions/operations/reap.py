"""Making the records true again: after a process died, a lease ended, or a kill was not confirmed."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, OuterRef, Q
from django.utils import timezone

from executions import backends, egress, faults, ledger, metrics
from executions.backends.base import Backend, Listed
from executions.errors import BackendError, SandboxLost
from executions.hop import rows
from executions.models import Attempt, Execution, IllegalTransition, Sandbox, Usage
from executions.operations import artifacts, pausing, run, waiting
from executions.states import AttemptOutcome, EndReason, ExecutionState, SandboxState

E, S = ExecutionState, SandboxState
log = logging.getLogger(__name__)
STALE_BEATS = 3
AHEAD = timedelta(minutes=1)  # of other machines' clocks, at most
SET_SECONDS = 3  # a smaller step makes nobody look dead
RETIRED_AT_ONCE = 20
FAR_PATIENCE = timedelta(minutes=2)  # after its end, by which another machine's node has ended a sandbox by itself
SETTLED = timedelta(seconds=10)  # after which a provider's list is sure to name what it has made
_retiring: set[asyncio.Task] = set()
_ending: dict[str, asyncio.Task[bool]] = {}  # what `reap` is ending in this process, by sandbox
_clock: float | None = None  # the wall clock's lead over the monotonic one, at the last look


def retire_when_killed(sandbox: Sandbox, killing: asyncio.Task) -> None:
    """Close the row once a kill that is under way is confirmed; if it is not, `reap` asks again."""

    async def finish() -> None:
        if await killing:
            await rows(gone, sandbox)

    task = asyncio.create_task(finish())
    _retiring.add(task)
    task.add_done_callback(_retiring.discard)


async def retire(sandbox: Sandbox, reason: str) -> bool:
    """End a sandbox: RETIRING, kill, GONE. False while the kill is not confirmed; the row stays RETIRING for `reap`."""
    if not await rows(begin_retiring, sandbox, reason):
        return sandbox.state == S.GONE
    if not sandbox.is_here and sandbox.leased_until > timezone.now() - FAR_PATIENCE:
        return False  # to a process on its machine the row says what to do
    if not await artifacts.keep_at_end(sandbox, reason):
        return False
    await note_egress(sandbox, final=True)
    faults.point("retiring")
    if not await run.kill(sandbox):
        return False
    faults.point("dead")
    return await rows(gone, sandbox)


async def note_egress(sandbox: Sandbox, *, final: bool = False) -> None:
    """Keep what went out of the sandbox since somebody asked; with `final` nothing goes out any more."""
    if sandbox.network_allow:
        known = await rows(egress.last_known, sandbox)
        if records := await egress.ask(sandbox, after=known, final=final):
            await rows(egress.store_found, sandbox, records)


def find_networked() -> list[Sandbox]:
    live = Sandbox.objects.open().here().filter(state=S.LEASED, handle__isnull=False)
    return list(live.exclude(network_allow=[])[:500])


def begin_retiring(sandbox: Sandbox, reason: str) -> bool:
    """Move to RETIRING, from where nobody leases it again. False when it has gone meanwhile."""
    sandbox.refresh_from_db()
    if sandbox.state == S.RETIRING:
        return True
    try:
        with transaction.atomic(durable=True):
            sandbox.advance(S.RETIRING, reason=reason, end_reason=reason)
    except IllegalTransition:
        sandbox.refresh_from_db()
        return sandbox.state == S.RETIRING
    return True


@transaction.atomic(durable=True)
def gone(sandbox: Sandbox) -> bool:
    """The kill is confirmed: bill the rest, give the reservation back. Idempotent."""
    sandbox = Sandbox.objects.select_for_update().get(pk=sandbox.pk)
    if sandbox.state == S.GONE:
        return True
    now = timezone.now()
    _, fields = ledger.bill(sandbox, *ledger.own_time(sandbox, now), final=True)
    sandbox.advance(S.GONE, reason=sandbox.end_reason, **fields)
    faults.point("going")
    return True


# Executions whose runner died


def clock_was_set() -> bool:
    """Whether this machine's clock has jumped since the last look: the living get the time for one more sign of life."""
    global _clock
    before, _clock = _clock, time.time() - time.monotonic()
    return before is not None and abs(_clock - before) > SET_SECONDS


def _patience() -> timedelta:
    """Who has shown no sign of life for so long is dead."""
    return timedelta(seconds=settings.HEARTBEAT_SECONDS * STALE_BEATS)


def find_stale() -> list[Execution]:
    if clock_was_set():
        return []
    now = timezone.now()
    silent = Q(heartbeat_at__lt=now - _patience())
    silent |= Q(heartbeat_at__gt=now + AHEAD)  # of before the clock was set back: who lives has written another since
    stale = Execution.objects.open().filter(silent)
    return [e for e in stale.select_related("sandbox", "agent")[:100] if run.running(e.pk) is None]


@transaction.atomic(durable=True)
def close_stale(execution: Execution) -> None:
    """An execution without a runner: never run twice. Before RUNNING nothing ran, and the caller is told so.

    One that was left to whichever process is first goes back to them then.
    """
    now, sandbox = timezone.now(), execution.sandbox
    left = execution.wish and execution.state == E.STARTING and not execution.cancel_requested_at
    if left and sandbox is not None and not sandbox.kept:
        said = "The process that was to run it died before any code had run."
        return waiting.give_back(execution, EndReason.LOST, "runner_lost", said)
    if sandbox is not None:  # first, as whoever settles the run does: so two never wait for each other
        sandbox = Sandbox.objects.select_for_update().get(pk=sandbox.pk)
    if execution.cancel_requested_at:
        state, code, said = E.CANCELLED, "cancelled", execution.cancel_reason
    elif execution.state == E.RUNNING:
        state, code, said = E.ERRORED, "runner_lost", "The process that ran it died; the code may have run in part."
    else:
        state, code, said = E.ERRORED, "runner_lost", "The process that was to run it died before any code had run."
    execution.advance(state, reason=code, error_code=code, error_value=said)
    Attempt.objects.filter(execution=execution, outcome=AttemptOutcome.OPEN).update(
        outcome=AttemptOutcome.LOST, code=code, ended_at=now
    )
    if sandbox is not None and not sandbox.ended_at:
        first = Usage.IDLE if sandbox.kept else Usage.BOOT
        price, fields = ledger.bill(
            sandbox, (first, execution.running_at or now), (Usage.RUN, now), execution=execution
        )
        Sandbox.objects.filter(pk=sandbox.pk).update(**fields)
        Execution.objects.filter(pk=execution.pk).update(cost_nano_usd=price)
    faults.point("closing")


# Sandboxes whose time is over


def find_over() -> list[tuple[Sandbox, str]]:
    """Open sandboxes that nobody may be using any more, with the reason why. Pending rows are left alone."""
    now = timezone.now()
    ours = Q(node__in=["", settings.NODE]) | Q(leased_until__lt=now - FAR_PATIENCE)
    rows_open = Sandbox.objects.open().filter(ours).select_related("template")
    retiring = rows_open.filter(state=S.RETIRING).exclude(turning_until__gt=now)  # there, files are being kept
    found: list[tuple[Sandbox, str]] = [(s, s.end_reason) for s in retiring[:100]]
    untaken = Execution.objects.open().filter(heartbeat_at__isnull=True, sandbox__isnull=False).values("sandbox")
    unasked = Q(state=S.BOOTING, pk__in=untaken)  # no provider knows of it: its time begins when somebody takes the run
    expired = rows_open.exclude(state=S.RETIRING).filter(leased_until__lt=now).exclude(unasked)
    found += [(s, EndReason.EXPIRED) for s in expired[:100]]
    used = Execution.objects.open().filter(sandbox__isnull=False).values("sandbox")  # a null would match nothing at all
    live = rows_open.filter(leased_until__gte=now).exclude(state=S.RETIRING).exclude(pk__in=used)
    found += [
        (s, EndReason.IDLE)
        for s in live.filter(kept=True, state__in=[S.LEASED, S.PAUSED])[:500]
        if not s.stays_paused and s.last_used_at + timedelta(seconds=s.idle_timeout_seconds) < now
    ]
    unborn = Q(Exists(Attempt.objects.filter(sandbox=OuterRef("pk"), execution__ended_at__isnull=False)))
    unborn |= Q(last_used_at__lt=now - _patience())
    abandoned = Q(kept=False, state=S.LEASED) | Q(unborn, state=S.BOOTING)
    found += [(s, EndReason.LOST) for s in live.filter(abandoned)[:100]]
    return found


async def reap(*, orphans: bool = True, patience_seconds: float | None = None) -> int:
    """One round; returns how many rows were made true. `orphans`: also ask each backend what it still has.

    `patience_seconds`: what takes longer to end goes on, and is left alone by the next rounds until it has.
    """
    mended, left = 0, []
    for execution in await rows(find_stale):
        try:
            await rows(close_stale, execution)
            if not execution.is_open:
                metrics.ended(execution)
            mended += 1
            if (session := execution.sandbox) and session.kept and session.state == S.LEASED and session.is_here:
                left.append(session)
        except IllegalTransition:
            continue
        except Exception:  # one row that cannot be closed does not hold up the others
            log.exception("not_closed", extra={"execution_id": execution.pk})
    at_once = asyncio.Semaphore(RETIRED_AT_ONCE)
    ending = [_end(sandbox, reason, at_once) for sandbox, reason in await rows(find_over) if sandbox.pk not in _ending]
    ending += [_end(sandbox, EndReason.LOST, at_once, if_lost=True) for sandbox in left if sandbox.pk not in _ending]
    mended += await _within(patience_seconds, ending)
    mended += await pausing.pause_idle()
    await asyncio.gather(*(note_egress(sandbox) for sandbox in await rows(find_networked)))
    if orphans:
        mended += await kill_orphans()
    return mended


def _end(sandbox: Sandbox, reason: str, at_once: asyncio.Semaphore, *, if_lost: bool = False) -> asyncio.Task[bool]:
    """Begin to retire it; `if_lost`: where it does not answer any more. A kill that is not answered holds up no others, in this round or the next."""

    async def end() -> bool:
        async with at_once:
            try:
                return (not if_lost or await _is_lost(sandbox)) and await retire(sandbox, reason)
            except Exception:
                log.exception("not_retired", extra={"sandbox_id": sandbox.pk})
                return False

    task = _ending[sandbox.pk] = asyncio.create_task(end())
    task.add_done_callback(lambda _: _ending.pop(sandbox.pk, None))
    return task


async def _within(patience_seconds: float | None, tasks: list[asyncio.Task[bool]]) -> int:
    """How many of them have come to True by then; the others go on."""
    done = (await asyncio.wait(tasks, timeout=patience_seconds))[0] if tasks else set()
    return sum(task.result() for task in done)


async def kill_orphans() -> int:
    """End what a backend still has though our row says it is gone. What is not provably ours is never touched."""
    killed = 0
    for alias in backends.aliases():
        backend, asked_at = backends.get(alias), timezone.now()
        try:
            listed = [item for item in await backend.list() if item.sandbox_id.startswith("sbx")]
        except (BackendError, OSError, TimeoutError):
            continue
        ended = await rows(_ended_among, [item.sandbox_id for item in listed])
        at_once = asyncio.Semaphore(RETIRED_AT_ONCE)
        orphans = [item for item in listed if item.sandbox_id in ended]
        dead = await asyncio.gather(*(_kill_orphan(backend, item, at_once) for item in orphans))
        killed += sum(dead)
        metrics.note("sandgate_sandboxes_leaked", alias, value=len(dead) - sum(dead))
        vanished = await rows(_vanished, alias, {item.sandbox_id for item in listed}, asked_at)
        over = [sandbox for sandbox in vanished if sandbox.pk not in _ending]
        await _within(None, [_end(sandbox, EndReason.LOST, at_once, if_lost=True) for sandbox in over])
    return killed


async def _kill_orphan(backend: Backend, item: Listed, at_once: asyncio.Semaphore) -> bool:
    async with at_once:
        try:
            with metrics.asking("kill", backend.alias):
                dead = await backend.kill(item.handle)
        except (BackendError, OSError, TimeoutError):
            log.warning("orphan_not_killed", extra={"sandbox_id": item.sandbox_id, "backend": backend.alias})
            return False
    metrics.add("sandgate_orphans_killed_total", backend.alias)
    return dead


def _vanished(alias: str, listed: set[str], asked_at: datetime) -> list[Sandbox]:
    """Sandboxes that wait, in a pool or for their session's next run, and that their backend did not name when it was asked."""
    alive = Sandbox.objects.open().here().filter(backend=alias, handle__isnull=False)
    pooled = Q(pool__isnull=False, state=S.IDLE, ready_at__lt=asked_at)
    kept = Q(kept=True, state=S.LEASED, ready_at__lt=asked_at)  # which are asked themselves, too
    kept |= Q(kept=True, state=S.PAUSED, ready_at__lt=asked_at - SETTLED)
    used = Execution.objects.open().filter(sandbox__isnull=False).values("sandbox")
    waiting = alive.filter(pooled | kept).exclude(pk__in=used)
    return [sandbox for sandbox in waiting if sandbox.provider_name not in listed]


async def _is_lost(sandbox: Sandbox) -> bool:
    """Whether what its backend does not name is gone: what can be asked itself is."""
    if sandbox.state != S.LEASED:
        return True
    try:
        await backends.get(sandbox.backend).connect(sandbox.machine)
    except SandboxLost:
        return await rows(Sandbox.objects.filter(pk=sandbox.pk, state=S.LEASED).exists)  # else paused in between
    except (BackendError, OSError, TimeoutError):
        return False
    return False


def _ended_among(names: list[str]) -> set[str]:
    ids = [name.replace("sbx", "sbx_", 1) for name in names]
    ended = Sandbox.objects.filter(pk__in=ids, ended_at__isnull=False).values_list("pk", flat=True)
    return {pk.replace("_", "") for pk in ended}
