"""/api/v1/executions: run, look, follow, cancel."""

from __future__ import annotations

import asyncio
import json
import re

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse

from executions import journal, operations
from executions.api.auth import caller_of
from executions.api.limits import tells_limits
from executions.api.operation import operation
from executions.errors import Invalid
from executions.hop import rows, surely
from executions.keys import Caller
from executions.models import Execution
from executions.serializers import (
    CancelRequest,
    ExecutionShape,
    QuoteShape,
    Submission,
    event_shape,
    execution_head,
    execution_shape,
    parse,
)
from executions.states import EXECUTION_ENDED, Scope

KEEPALIVE_SECONDS = 15


def body_of(request: HttpRequest) -> object:
    """The JSON body; an empty one is {}. Raises Invalid."""
    raw = request.body
    if not raw:
        return {}
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise Invalid("The body is not valid JSON.", field="body") from None


def answer(shape, status: int = 200) -> HttpResponse:
    return HttpResponse(shape.model_dump_json(), status=status, content_type="application/json")


def preferred_wait(request: HttpRequest) -> float | None:
    """Seconds to wait inline: None is until the end. `Prefer: respond-async`, `Prefer: wait=N`."""
    prefer = request.headers.get("Prefer", "")
    if "respond-async" in prefer:
        return 0
    found = re.search(r"\bwait=(\d{1,5})\b", prefer)
    return float(found[1]) if found else None


WAITS = {"Prefer": "respond-async: answer at once; wait=N: after at most N seconds. Left out: at its end."}


@operation(
    "Run code",
    body=Submission,
    gives={200: QuoteShape, 201: ExecutionShape, 202: ExecutionShape},
    headers=WAITS,
    fails=(402, 409, 410, 413, 422, 502, 503),
)
@tells_limits
async def create(request: HttpRequest) -> HttpResponse:
    body = body_of(request)
    if isinstance(body, dict) and body.get("dry_run"):
        return answer(await rows(lambda: operations.quote(caller=caller_of(request), request=parse(Submission, body))))

    def who_and_what() -> tuple[Caller, Submission]:
        return caller_of(request), parse(Submission, body)

    shape = await operations.execute(
        caller=who_and_what,
        idempotency_key=request.headers.get("Idempotency-Key"),
        wait_seconds=preferred_wait(request),
    )
    response = answer(shape, 201 if shape.state in EXECUTION_ENDED else 202)
    response["Location"] = f"/api/v1/executions/{shape.id}"
    return response


@operation("Look at an execution", gives={200: ExecutionShape})
async def detail(request: HttpRequest, execution_id: str) -> HttpResponse:
    return answer(await surely(lambda: execution_shape(operations.find_execution(caller_of(request), execution_id))))


@operation("Cancel an execution", body=CancelRequest, gives={202: ExecutionShape})
async def cancel(request: HttpRequest, execution_id: str) -> HttpResponse:
    def find() -> tuple[Caller, Execution, CancelRequest]:
        caller = caller_of(request)
        caller.needs(Scope.RUN)
        return caller, operations.find_execution(caller, execution_id), parse(CancelRequest, body_of(request))

    caller, execution, asked = await rows(find)
    await operations.cancel(execution=execution, caller=caller, reason=asked.reason)
    return answer(await rows(lambda: execution_shape(operations.find_execution(caller, execution_id))), 202)


@operation(
    "Follow an execution",
    gives={200: "text/event-stream"},
    query={"after_seq": {"type": "integer", "minimum": 0, "maximum": 999_999_999}},
    headers={"Last-Event-ID": "As after_seq."},
)
async def events(request: HttpRequest, execution_id: str) -> StreamingHttpResponse:
    """Server-sent events: the journal from `after_seq` (or Last-Event-ID) on, live until the end."""
    after = request.headers.get("Last-Event-ID") or request.GET.get("after_seq") or "0"
    if not (after.isascii() and after.isdigit()) or len(after) > 9:
        raise Invalid("after_seq: a whole number.", field="after_seq")
    execution = await surely(lambda: operations.find_execution(caller_of(request), execution_id))
    response = StreamingHttpResponse(_stream(execution, int(after)), content_type="text/event-stream")
    response["Cache-Control"] = "no-store"
    response["X-Accel-Buffering"] = "no"
    return response


HELD_EVENTS = 32  # for one watcher: two MiB of output at most, however slowly it reads


async def _stream(execution: Execution, seen: int):
    quiet = 0.0
    async with journal.Doorbell(execution.pk) as bell:
        while True:
            batch, open_before = await journal.look(execution.pk, seen, HELD_EVENTS)
            for event in batch:
                seen, quiet = event.seq, 0.0
                yield f"id: {event.seq}\nevent: {event.kind}\ndata: {event_shape(event).model_dump_json()}\n\n"
            if batch:
                continue
            if not open_before:
                yield f"event: end\ndata: {await _last_look(execution.pk)}\n\n"
                return
            pause = journal.until_the_next_look()
            if not await bell.wait(pause):
                quiet += pause
                if quiet >= KEEPALIVE_SECONDS:
                    quiet = 0.0
                    yield ": still running\n\n"
            await asyncio.sleep(0)


_last_looks: dict[tuple[int, str], asyncio.Task[str]] = {}


async def _last_look(execution_id: str) -> str:
    """An ended run's head as JSON; those who see it end at the same moment share one look, as they did before."""
    key = (id(asyncio.get_running_loop()), execution_id)
    if key not in _last_looks:
        _last_looks[key] = asyncio.create_task(rows(_head, execution_id))
        _last_looks[key].add_done_callback(lambda _: _last_looks.pop(key))
    return await asyncio.shield(_last_looks[key])


def _head(execution_id: str) -> str:
    found = Execution.objects.select_related("agent", "sandbox", "actor").get(pk=execution_id)
    return execution_head(found).model_dump_json()
