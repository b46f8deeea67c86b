"""The queue: executions that nobody runs yet. It is in the rows, and any process takes the next one; none belongs to its maker.

Some wait for room: nothing is taken for them yet. They are started fair among agents: next is the oldest of the agent that
has the fewest under way, and among those of the one that was served longest ago. What waits is not counted as under way,
and is refused for good when its patience ends.

Others were admitted with all that they need and left for whichever process is first (`Prefer: respond-async`), or for one
on the machine where their session lives. Whoever writes the first sign of life into the row has it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count, Model, OuterRef, Q, QuerySet, Subquery, Window
from django.db.models.functions import RowNumber
from django.utils import timezone

from executions import backends, journal, ledger, pool, routes
from executions.errors import BackendUnavailable, NoBackend, QueueTimedOut, Refused, SessionGone
from executions.hop import rows
from executions.models import Agent, Execution, Sandbox, hot
from executions.operations import run
from executions.operations.submit import begin
from executions.states import AttemptOutcome, EndReason, ExecutionState, SandboxState

E, S = ExecutionState, SandboxState
LOOK_SECONDS = 0.2  # while something waits: room may appear in another process
IDLE_SECONDS = 0.5  # another process may have let something wait, and without Redis nobody rings
SEEN_AT_ONCE = 500
TRIES_AT_ONCE = 50  # agents whose next one has no room; the others are looked at when somebody has
CLAIMS_AT_ONCE = 20  # so that many processes share a burst
MOST_RUNNING = 1000  # in one process; what is more is left to the others
SERVED = timedelta(hours=1)  # for which it is remembered whose turn it was
NODELESS = timedelta(seconds=5)  # after which one that needs a node is taken where there is none, and told so
QUEUE = "queue"  # the doorbell's name
log = logging.getLogger(__name__)

_nudged: asyncio.Event | None = None
_ending = False
_some_wait = False  # as far as this process knows
_unclaimed_ones = hot.Compiled(lambda: Execution.objects.filter(ended_at=None, heartbeat_at=None).only("pk")[:1])


def nudge() -> None:
    """There is something new to take, for this process to see."""
    global _some_wait
    _some_wait = True
    if _nudged is not None:
        _nudged.set()


def _room() -> None:
    """A run here is over: there may be room for what waits."""
    if _some_wait:
        nudge()


async def ring() -> None:
    """Something was left to whoever is first: every process that serves the queue looks now."""
    nudge()
    await journal.ring(QUEUE)


async def serve() -> None:
    """Take what nobody runs yet, for ever. Ends by being cancelled."""
    global _nudged, _ending, _some_wait
    _nudged, _ending = asyncio.Event(), False
    if _room not in run.when_over:
        run.when_over.append(_room)
    hearing = asyncio.create_task(_hear())
    patience = IDLE_SECONDS
    try:
        while True:
            try:
                async with asyncio.timeout(patience):
                    await _nudged.wait()
            except TimeoutError:
                pass
            _nudged.clear()
            _some_wait = True  # until the look says otherwise: who ends meanwhile is heard
            try:
                left = await look()
                _some_wait = left > 0 or _nudged.is_set()
                patience = LOOK_SECONDS if left else IDLE_SECONDS
            except Exception:
                log.exception("waiting_round_failed")
    finally:
        hearing.cancel()


async def _hear() -> None:
    """Look whenever another process rings; without a doorbell that works the rounds go on all the same."""
    async with journal.Doorbell(QUEUE) as bell:
        while True:
            if await bell.wait(60):
                nudge()


def stop_taking() -> None:
    """This process is ending: what is claimed from now on would die with it."""
    global _ending
    _ending = True


async def look() -> int:
    """One round; returns how many still wait. It is not cut off in the midst: what was claimed is started."""
    if _ending:
        return 0
    looking = asyncio.ensure_future(_look())
    try:
        return await asyncio.shield(looking)
    except asyncio.CancelledError:
        await asyncio.wait({looking})
        raise


async def _look() -> int:
    if not await rows(_unclaimed_ones):
        return 0  # as after most runs, of which each has this looked at
    claimed, ended = await rows(_claim_left) if len(run._runs) < MOST_RUNNING else ([], [])
    for execution in claimed:  # before anything else can fail: nobody else would start them
        run.start(execution)
    started, given_up, left = await rows(_next_ones)
    for execution in started:
        run.start(execution)
    for execution in ended + given_up:
        await journal.ring(execution.pk)
    if len(claimed) >= CLAIMS_AT_ONCE:
        nudge()
    return left


# What was left for whoever is first


def _claim_left() -> tuple[list[Execution], list[Execution]]:
    """(claimed by this process, ended instead)."""
    claimed: list[Execution] = []
    ended: list[Execution] = []
    now = timezone.now()
    for execution in _left(now).only("pk", "cancel_requested_at", "waits_until").order_by("created_at")[:SEEN_AT_ONCE]:
        if execution.cancel_requested_at or (execution.waits_until and execution.waits_until <= now):
            ended += _give_up(execution)
        elif (taken := claim(execution.pk)) is not None:
            (claimed if taken.is_open else ended).append(taken)
        if len(claimed) >= CLAIMS_AT_ONCE:
            break
    return claimed, ended


def _left(now: datetime) -> QuerySet[Execution]:
    """What this process may take, or end."""
    over = Q(cancel_requested_at__isnull=False) | Q(waits_until__lt=now) | Q(sandbox__leased_until__lt=now)
    here = Q(sandbox__handle__isnull=True) | Q(sandbox__node__in=["", settings.NODE])
    known = _unclaimed().exclude(state=E.QUEUED).filter(backend__in=backends.aliases())
    return known.filter(over | here)


def claim(execution_id: str) -> Execution | None:
    """Take one that was left; None where another process was first, or is to be, as the node that it needs is there.

    It comes back claimed by this process, or ended, as its sandbox has.
    """
    with transaction.atomic(durable=True):
        still = _unclaimed().exclude(state=E.QUEUED).select_for_update(skip_locked=True, of=("self",))
        related = ("team", "agent__template", "key", "actor", "sandbox__template", "sandbox__agent")
        execution = still.filter(pk=execution_id).select_related(*related).first()
        if execution is None:
            return None
        sandbox, now = execution.sandbox, timezone.now()
        assert sandbox is not None
        began: dict[str, Any] = {"started_at": now, "heartbeat_at": now}
        rest, may_begin_anew = sandbox.leased_until - now, bool(execution.wish) and not sandbox.kept
        if sandbox.state == S.BOOTING:
            backend = backends.get(sandbox.backend)
            if not backend.is_reached and execution.created_at > now - NODELESS:
                return None
            if execution.agent is not None and routes.below_floor(execution.agent, backend):
                if rest > timedelta():
                    return None  # to a machine with stronger walls, or to nobody
                _close(execution, NoBackend("No process took it whose machine has the walls that its agent asks for."))
                return execution
            waited = now - sandbox.created_at  # of which the provider knows nothing
            moved = {"metered_until": now, "leased_until": sandbox.leased_until + waited, "node": pool.node_of(backend)}
            hot.change(sandbox, moved)
            hot.change(execution, began)
            _set(sandbox, moved)
        elif may_begin_anew and (sandbox.state != S.LEASED or rest < timedelta(seconds=execution.timeout_seconds)):
            give_back(
                execution, EndReason.EXPIRED, BackendUnavailable.code, "Its sandbox's time ran, and nobody took it."
            )
            return None
        elif sandbox.state not in (S.LEASED, S.PAUSED) or rest <= timedelta():
            _close(execution, SessionGone("Its sandbox had ended before a process took it; nothing has run."))
            return execution
        elif not sandbox.is_here:
            return None
        elif sandbox.state == S.LEASED:
            execution.advance(E.RUNNING, running_at=now, **began)
        else:
            hot.change(execution, began)
        _set(execution, began)
        execution.tried = list(execution.attempts.order_by("number"))
    return execution


def give_back(execution: Execution, end_reason: EndReason, code: str, said: str) -> None:
    """Let it begin anew: nothing has run. Its sandbox is retired, so that a runner that was only slow cannot use it any more.

    Call it in a transaction.
    """
    sandbox = Sandbox.objects.select_for_update().get(pk=execution.sandbox_id)
    if sandbox.state in (S.BOOTING, S.LEASED):
        sandbox.advance(S.RETIRING, reason=code, end_reason=end_reason)
    now = timezone.now()
    execution.advance(
        E.QUEUED, reason=code, sandbox=None, backend="", started_at=None, heartbeat_at=None, waits_for=said,
        waits_until=now + timedelta(seconds=max(60, settings.QUEUE_SECONDS)),
    )  # fmt: skip
    attempts = execution.attempts.filter(outcome=AttemptOutcome.OPEN)
    attempts.update(outcome=AttemptOutcome.UNAVAILABLE, code=code, ended_at=now)


def _set(row: Model, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(row, name, value)


# What waits for room


def _next_ones() -> tuple[list[Execution], list[Execution], int]:
    """(claimed by this process, ended while they waited, how many are left)."""
    waiting = list(_waiting()[:SEEN_AT_ONCE])
    started: list[Execution] = []
    ended: list[Execution] = []
    if not waiting:
        return [], [], 0
    now, full = timezone.now(), set[str]()  # agents: what stands behind their next one waits with it
    turned_away: dict[int, Refused] = {}
    for execution in in_turn(waiting):
        if execution.cancel_requested_at or (execution.waits_until and execution.waits_until <= now):
            ended += _give_up(execution)
            continue
        if execution.agent_id in full or len(full) >= TRIES_AT_ONCE:
            continue
        try:
            begun = begin(execution.pk, turned_away)
            started += [begun] if begun and not begun.is_unclaimed else []
        except Refused as refusal:
            if refusal.waits_seconds:
                full.add(execution.agent_id)
                if refusal.quota_id is not None:
                    turned_away.setdefault(refusal.quota_id, refusal)
                _still_waits(execution, refusal)
            else:
                ended += _give_up(execution, refusal)
    return started, ended, len(waiting) - len(started) - len(ended)


def _unclaimed() -> QuerySet[Execution]:
    """By an index of open rows alone: its conditions have no parameters."""
    return Execution.objects.open().filter(heartbeat_at__isnull=True)


def _waiting() -> QuerySet[Execution]:
    """Without what they carry; first the oldest of each agent, then the second of each: a crowd of one's hides nobody else's."""
    own = ("state", "agent", "created_at", "cancel_requested_at", "cancel_reason", "waits_for", "waits_until")
    nth = Window(RowNumber(), partition_by="agent", order_by="created_at")
    found = _unclaimed().filter(state=E.QUEUED).only(*own, "heartbeat_at", "ended_at")
    return found.annotate(nth=nth).order_by("nth", "created_at")


def in_turn(waiting: Iterable[Execution]) -> Iterator[Execution]:
    """Those who wait, of each agent the oldest first, in the order in which they would be started."""
    of: dict[str, deque[Execution]] = defaultdict(deque)
    for execution in waiting:
        of[execution.agent_id].append(execution)
    served, turn = _served(of), itertools.count(1)
    under_way = Counter(
        dict(
            Execution.objects.open()
            .exclude(state=E.QUEUED)
            .filter(agent__in=of)
            .values_list("agent")
            .annotate(Count("pk"))
            .order_by()
        )
    )
    while of:
        agent = min(of, key=lambda a: (under_way[a], served[a], of[a][0].created_at))
        yield of[agent].popleft()
        under_way[agent] += 1
        served[agent] = (next(turn), 0.0)
        if not of[agent]:
            del of[agent]


def _served(agents: Iterable[str]) -> dict[str, tuple[int, float]]:
    """(0, when the youngest of each agent's runs was started); who was not served for an hour comes first all the same."""
    recent = Execution.objects.filter(agent=OuterRef("pk"), created_at__gt=timezone.now() - SERVED)
    last = recent.filter(started_at__isnull=False).order_by("-created_at").values("started_at")[:1]
    found = Agent.objects.filter(pk__in=list(agents)).annotate(last=Subquery(last)).values_list("pk", "last")
    return {pk: (0, at.timestamp() if at else 0.0) for pk, at in found}


def position(execution: Execution) -> int:
    """Its place in the queue, from 1; 0 when it does not wait."""
    turn = (other.pk for other in in_turn(list(_waiting()[:SEEN_AT_ONCE])))
    return next((n for n, pk in enumerate(turn, start=1) if pk == execution.pk), 0)


def _still_waits(execution: Execution, refusal: Refused) -> None:
    if execution.waits_for != refusal.detail[:300]:
        Execution.objects.filter(pk=execution.pk, state=E.QUEUED).update(waits_for=refusal.detail[:300])


@transaction.atomic(durable=True)
def _give_up(execution: Execution, refusal: Refused | None = None) -> list[Execution]:
    """End it without having run it: [the row]; [] when somebody else has taken or ended it first."""
    still = _unclaimed().select_for_update(skip_locked=True, of=("self",)).filter(pk=execution.pk)
    for found in still.select_related("sandbox"):
        _close(found, refusal or QueueTimedOut(f"It waited for {_waited(found)} s: {found.waits_for}"))
        return [found]
    return []


def _close(execution: Execution, why: Refused) -> None:
    """Nothing has run: give back what it had taken. Call it in a transaction that holds the row."""
    state, code, said = E.ERRORED, why.code, why.detail
    if execution.cancel_requested_at:
        state, code, said = E.CANCELLED, "cancelled", execution.cancel_reason
    execution.advance(state, reason=code, error_code=code, error_value=said)
    ended = {"outcome": AttemptOutcome.LOST, "code": code, "ended_at": execution.ended_at}
    execution.attempts.filter(outcome=AttemptOutcome.OPEN).update(**ended)
    sandbox = execution.sandbox
    if sandbox is not None and sandbox.state == S.BOOTING:  # nobody has asked for it
        list(Sandbox.objects.select_for_update().filter(pk=sandbox.pk).values_list("pk"))  # first, as `reap` does
        _, billed = ledger.bill(sandbox, final=True)
        sandbox.advance(S.GONE, reason=code, end_reason=EndReason.KILLED, **billed)


def _waited(execution: Execution) -> int:
    return round((timezone.now() - execution.created_at).total_seconds())
