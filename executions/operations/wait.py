"""What a door that waits calls: admit, run, and look at the end, wherever the run goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from executions import journal
from executions.errors import NotFound
from executions.hop import rows, surely
from executions.keys import Caller
from executions.models import Execution
from executions.operations import waiting
from executions.operations.cancel import request_cancel
from executions.operations.run import Run, running, start
from executions.operations.submit import submit
from executions.serializers import ExecutionShape, Submission, execution_shape
from executions.states import AttemptOutcome, Scope

LOOK_SECONDS = 1.0  # for what no doorbell tells

_leaving: set[asyncio.Task] = set()


async def execute(
    *,
    caller: Caller | Callable[[], tuple[Caller, Submission]],
    request: Submission | None = None,
    idempotency_key: str | None = None,
    wait_seconds: float | None = None,
) -> ExecutionShape:
    """Admit and run; returns its shape at the end, or as it stands after `wait_seconds` (None: until the end).

    `caller` may be a function that authenticates and parses, so that both happen on the same hop as the admission.
    With `wait_seconds=0` nobody waits, and whichever process is first runs it.
    The run goes on when the waiting task is cancelled, unless the request asked for `cancel_on_disconnect`.
    """

    def admit() -> Execution:
        who, what = caller() if callable(caller) else (caller, request)
        assert what is not None
        return submit(caller=who, request=what, idempotency_key=idempotency_key, later=wait_seconds == 0)

    async def begin() -> tuple[Execution, Run | None]:
        execution = await rows(admit)
        if execution.replayed:
            return execution, None
        if execution.is_unclaimed:
            await waiting.ring()
            return execution, None
        return execution, start(execution)

    beginning = asyncio.ensure_future(begin())
    try:
        execution, run = await asyncio.shield(beginning)  # what was admitted is started, though the caller has gone
    except asyncio.CancelledError:
        leaving = asyncio.ensure_future(_left(beginning))
        _leaving.add(leaving)
        leaving.add_done_callback(_leaving.discard)
        raise
    if run is None:
        try:
            return await wait(execution, wait_seconds)
        except asyncio.CancelledError:
            if execution.cancel_on_disconnect and not execution.replayed:
                await asyncio.shield(cancel(execution=execution, reason="the caller went away"))
            raise
    assert run.task is not None
    try:
        await asyncio.wait({run.task}, timeout=wait_seconds)
    except asyncio.CancelledError:
        if execution.cancel_on_disconnect:
            await rows(request_cancel, execution=execution, reason="the caller went away")
            run.cancel(execution.cancel_reason)
        raise
    settled_here = execution.tried[-1].outcome != AttemptOutcome.OPEN  # else somebody else has ended it
    if run.task.done() and not execution.is_open and settled_here:
        return execution_shape(execution, events=run.events, attempts=execution.tried, egress=run.egress)
    return await rows(_shape, execution.pk)


async def _left(beginning: asyncio.Future[tuple[Execution, Run | None]]) -> None:
    """The caller went away while it was admitted."""
    await asyncio.wait({beginning})
    if beginning.exception() is None:
        execution, _ = beginning.result()
        if execution.cancel_on_disconnect and not execution.replayed:
            await cancel(execution=execution, reason="the caller went away")


async def wait(execution: Execution, wait_seconds: float | None) -> ExecutionShape:
    """Its shape at the end, or after `wait_seconds`, also when another process runs it."""
    ends = None if wait_seconds is None else time.monotonic() + wait_seconds
    if execution.is_open and wait_seconds != 0:
        async with journal.Doorbell(execution.pk) as bell:
            await surely(execution.refresh_from_db)
            while execution.is_open and (ends is None or time.monotonic() < ends):
                left = None if ends is None else max(0.01, ends - time.monotonic())
                if here := running(execution.pk):
                    assert here.task is not None
                    await asyncio.wait({here.task}, timeout=left)
                else:
                    await bell.wait(LOOK_SECONDS if left is None else min(LOOK_SECONDS, left))
                await surely(execution.refresh_from_db)
    return await surely(_shape, execution.pk)


def _shape(execution_id: str) -> ExecutionShape:
    found = Execution.objects.select_related("sandbox", "agent", "actor").get(pk=execution_id)
    shape = execution_shape(found)
    if shape.queue is not None:
        shape.queue.position = waiting.position(found)
    return shape


def find_execution(caller: Caller, execution_id: str) -> Execution:
    """An execution of the caller's team, and of their agent where the key has one. Another's is not found."""
    caller.needs(Scope.READ)
    found = Execution.objects.select_related("agent", "sandbox", "actor").filter(pk=execution_id, team=caller.team)
    if caller.key is not None and caller.key.agent_id:
        found = found.filter(agent=caller.key.agent_id)
    execution = found.first()
    if execution is None:
        raise NotFound(f"There is no execution {execution_id}.", field="execution_id")
    return execution


async def cancel(*, execution: Execution, caller: Caller | None = None, reason: str = "") -> bool:
    """Ask for the end of a run; at once where this process runs it. False when it has already ended."""
    asked = await rows(request_cancel, execution=execution, caller=caller, reason=reason)
    if asked and (here := running(execution.pk)):
        here.cancel(execution.cancel_reason)
    elif asked and execution.is_unclaimed:
        await waiting.ring()
    return asked
