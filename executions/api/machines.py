"""/api/v1/sandboxes, and the contexts and commands of a session."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse

from executions import operations
from executions.api.auth import caller_of
from executions.api.executions import WAITS, answer, body_of, preferred_wait
from executions.api.limits import tells_limits
from executions.api.once import done_once
from executions.api.operation import Many, operation
from executions.api.pages import listed
from executions.hop import rows
from executions.keys import Caller
from executions.operations import machines
from executions.serializers import ExecutionShape, Submission, parse
from executions.serializers.machines import (
    CommandRequest,
    ContextRequest,
    ContextShape,
    SandboxShape,
    sandbox_shape,
)
from executions.states import EXECUTION_ENDED, Scope

MACHINE = (402, 409, 410, 502, 503)  # what a machine that is asked may say


@operation("Look at a sandbox", gives={200: SandboxShape})
async def look(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    return answer(await rows(lambda: sandbox_shape(machines.find_sandbox(caller_of(request), sandbox_id))))


@operation("End a sandbox", gives={202: SandboxShape}, fails=MACHINE)
async def kill(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    caller = await rows(caller_of, request)
    return answer(sandbox_shape(await machines.kill_sandbox(caller=caller, sandbox_id=sandbox_id)), 202)


@operation("List the contexts of a session", gives={200: Many(ContextShape)}, fails=MACHINE)
async def contexts(request: HttpRequest, session_id: str) -> HttpResponse:
    caller = await rows(caller_of, request)
    found = await machines.list_contexts(caller=caller, session_id=session_id)
    return listed(ContextShape(**one) for one in found)


@operation("Make a context", body=ContextRequest, gives={201: ContextShape}, fails=(*MACHINE, 422))
@done_once
async def create_context(request: HttpRequest, session_id: str) -> HttpResponse:
    caller, asked = await rows(lambda: (caller_of(request), parse(ContextRequest, body_of(request))))
    made = await machines.create_context(caller=caller, session_id=session_id, language=asked.language, cwd=asked.cwd)
    return answer(ContextShape(**made), 201)


@operation("Start a context anew", gives={204: None}, fails=MACHINE)
async def restart_context(request: HttpRequest, session_id: str, context_id: str) -> HttpResponse:
    caller = await rows(_runner, request)
    await machines.restart_context(caller=caller, session_id=session_id, context_id=context_id)
    return HttpResponse(status=204)


@operation("Remove a context", gives={204: None}, fails=MACHINE)
async def remove_context(request: HttpRequest, session_id: str, context_id: str) -> HttpResponse:
    caller = await rows(_runner, request)
    await machines.remove_context(caller=caller, session_id=session_id, context_id=context_id)
    return HttpResponse(status=204)


@operation(
    "Run a command in a session",
    body=CommandRequest,
    gives={201: ExecutionShape, 202: ExecutionShape},
    headers=WAITS,
    fails=(*MACHINE, 422),
)
@tells_limits
async def command(request: HttpRequest, session_id: str) -> HttpResponse:
    """It is an execution, with its output, exit code, metering and cost."""

    def who_and_what() -> tuple[Caller, Submission]:
        caller, asked = caller_of(request), parse(CommandRequest, body_of(request))
        caller.needs(Scope.RUN)
        agent = operations.find_session(caller, session_id).agent.name
        wanted = asked.model_dump(exclude_none=True) | {"session_id": session_id, "language": "bash", "agent": agent}
        return caller, parse(Submission, wanted)

    shape = await operations.execute(
        caller=who_and_what,
        idempotency_key=request.headers.get("Idempotency-Key"),
        wait_seconds=preferred_wait(request),
    )
    response = answer(shape, 201 if shape.state in EXECUTION_ENDED else 202)
    response["Location"] = f"/api/v1/executions/{shape.id}"
    return response


def _runner(request: HttpRequest) -> Caller:
    caller = caller_of(request)
    caller.needs(Scope.RUN)
    return caller
