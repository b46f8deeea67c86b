"""The queue: executions that were admitted, but have to wait for room. It is in the rows; any process starts the next.

Fair among agents: next is the oldest of the agent that has the fewest under way. What waits is not counted as under
way, holds no money and no sandbox, and is refused for good when its patience ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator

from django.db import transaction
from django.db.models import Count, QuerySet
from django.utils import timezone

from executions import journal
from executions.errors import QueueTimedOut, Refused
from executions.hop import rows
from executions.models import Execution, IllegalTransition
from executions.operations import run
from executions.operations.submit import begin
from executions.states import ExecutionState

E = ExecutionState
LOOK_SECONDS = 0.2  # while something waits: room may appear in another process
IDLE_SECONDS = 1.0  # another process may have let something wait
SEEN_AT_ONCE = 500
TRIES_AT_ONCE = 50  # agents whose next one has no room; the others are looked at when somebody has
log = logging.getLogger(__name__)

_nudged: asyncio.Event | None = None


def nudge() -> None:
    """There may be room now, or somebody new who waits."""
    if _nudged is not None:
        _nudged.set()


async def serve() -> None:
    """Start what waits when there is room, for ever. Ends by being cancelled."""
    global _nudged
    _nudged = asyncio.Event()
    if nudge not in run.when_over:
        run.when_over.append(nudge)
    patience = IDLE_SECONDS
    while True:
        try:
            async with asyncio.timeout(patience):
                await _nudged.wait()
        except TimeoutError:
            pass
        _nudged.clear()
        try:
            patience = LOOK_SECONDS if await look() else IDLE_SECONDS
        except Exception:
            log.exception("waiting_round_failed")


async def look() -> int:
    """One round; returns how many still wait."""
    started, ended, left = await rows(_next_ones)
    for execution in started:
        run.start(execution)
    for execution in ended:
        await journal.ring(execution.pk)
    return left


def _next_ones() -> tuple[list[Execution], list[Execution], int]:
    """(claimed by this process, ended while they waited, how many are left)."""
    waiting = list(_waiting()[:SEEN_AT_ONCE])
    started: list[Execution] = []
    ended: list[Execution] = []
    if not waiting:
        return started, ended, 0
    now, full = timezone.now(), set[str]()  # agents: what stands behind their next one waits with it
    for execution in in_turn(waiting):
        if execution.cancel_requested_at or (execution.waits_until and execution.waits_until <= now):
            ended += [execution] if _give_up(execution) else []
            continue
        if execution.agent_id in full or len(full) >= TRIES_AT_ONCE:
            continue
        try:
            begun = begin(execution.pk)
            started += [begun] if begun else []
        except Refused as refusal:
            if refusal.waits_seconds:
                full.add(execution.agent_id)
                _still_waits(execution, refusal)
            else:
                ended += [execution] if _give_up(execution, refusal) else []
    return started, ended, len(waiting) - len(started) - len(ended)


def _waiting() -> QuerySet[Execution]:
    """Oldest first, without what they carry."""
    own = ("state", "agent", "created_at", "cancel_requested_at", "cancel_reason", "waits_for", "waits_until")
    return Execution.objects.filter(state=E.QUEUED).only(*own).order_by("created_at")


def in_turn(waiting: Iterable[Execution]) -> Iterator[Execution]:
    """Those who wait, oldest first, in the order in which they would be started."""
    of: dict[str, deque[Execution]] = defaultdict(deque)
    for execution in waiting:
        of[execution.agent_id].append(execution)
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
        agent = min(of, key=lambda a: (under_way[a], of[a][0].created_at))
        yield of[agent].popleft()
        under_way[agent] += 1
        if not of[agent]:
            del of[agent]


def position(execution: Execution) -> int:
    """Its place in the queue, from 1; 0 when it does not wait."""
    turn = (other.pk for other in in_turn(list(_waiting()[:SEEN_AT_ONCE])))
    return next((n for n, pk in enumerate(turn, start=1) if pk == execution.pk), 0)


def _still_waits(execution: Execution, refusal: Refused) -> None:
    if execution.waits_for != refusal.detail[:300]:
        Execution.objects.filter(pk=execution.pk, state=E.QUEUED).update(waits_for=refusal.detail[:300])


@transaction.atomic(durable=True)
def _give_up(execution: Execution, refusal: Refused | None = None) -> bool:
    """End it without having started it; False when somebody else started or ended it first."""
    try:
        if execution.cancel_requested_at:
            said = execution.cancel_reason
            execution.advance(E.CANCELLED, reason="cancelled", error_code="cancelled", error_value=said)
        else:
            why = refusal or QueueTimedOut(f"It waited for {_waited(execution)} s: {execution.waits_for}")
            execution.advance(E.ERRORED, reason=why.code, error_code=why.code, error_value=why.detail)
    except IllegalTransition:
        return False
    return True


def _waited(execution: Execution) -> int:
    return round((timezone.now() - execution.created_at).total_seconds())
