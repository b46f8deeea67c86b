"""Tools that run code, and that look after what runs."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import replace

from django.conf import settings
from pydantic import Field

from executions import journal, operations
from executions.errors import FileRefused, Refused, SandgateError
from executions.hop import rows
from executions.keys import Caller
from executions.mcp import answers, sessions
from executions.mcp.answers import Answer
from executions.mcp.call import Call, Parent, SessionId, Step, Token, Workflow
from executions.models import Execution
from executions.serializers import Accepted, ExecutionShape, KeptFile, Submission, execution_shape, parse
from executions.states import EXECUTION_ENDED, Scope

SCRIPTS = {"sh": "bash", "bash": "bash", "js": "javascript", "mjs": "javascript", "r": "r", "R": "r"}


class InBase64(Accepted):
    base64: str


class ExecuteCode(Accepted):
    code: str = Field(description="One cell. The value of its last expression comes back as in a notebook. Up to 1 MB.")
    language: str = "python"
    session_id: SessionId | None = Field(
        None, description="Run where the variables of earlier calls are. Left out: fresh."
    )
    keep_session: bool = Field(True, description="false: the sandbox is gone afterwards, which is the cheapest.")
    files: dict[str, str | InBase64 | KeptFile] = Field(
        {},
        description='Written first: path to text, to {"base64": "…"}, or to {"artifact": "art_…"} for a kept file.',
        max_length=64,
    )
    timeout_seconds: int | None = Field(None, ge=1, description="Wall time of the run.")
    max_cost_usd: float | None = Field(
        None, ge=0, description="Refused where the run, and keeping a fresh session, could cost more dollars than this."
    )
    idempotency_key: Token = None
    workflow: Workflow = ""
    step: Step = ""
    parent: Parent = None


class RunScript(Accepted):
    path: str = Field(max_length=4096, description="A file in the session's sandbox; never a path on another machine.")
    session_id: SessionId
    args: list[str] = Field([], max_length=256)
    timeout_seconds: int | None = Field(None, ge=1, description="Wall time of the run.")
    idempotency_key: Token = None
    workflow: Workflow = ""
    step: Step = ""
    parent: Parent = None


class GetExecution(Accepted):
    execution_id: str = Field(max_length=40)
    wait_seconds: float = Field(30, ge=0, description="How long to wait for the end.")
    after_seq: int = Field(
        0, ge=0, description="Leave out output that you have seen: the last_seq of the earlier answer."
    )


class CancelExecution(Accepted):
    execution_id: str = Field(max_length=40)


async def execute_code(call: Call, asked: ExecuteCode) -> Answer:
    wanted = {
        "code": asked.code,
        "language": asked.language,
        "session_id": asked.session_id,
        "files": {path: _base64(content) for path, content in asked.files.items()},
        "timeout_seconds": asked.timeout_seconds,
        "max_cost_usd": asked.max_cost_usd,
        "cancel_on_disconnect": call.cancels,
        "workflow": asked.workflow,
        "step": asked.step,
        "parent": asked.parent,
    }
    request = parse(Submission, wanted)
    call.caller = replace(call.caller, workflow=asked.workflow)  # its budget pays for the session, too
    if asked.session_id:
        await sessions.keep_open(call.caller, asked.session_id, asked.timeout_seconds)
    if asked.session_id or not asked.keep_session:
        return await _run(call, request, asked.idempotency_key)
    session_id = await sessions.open_for(call, request.language, asked.idempotency_key, request.max_cost_usd)
    try:
        return await _run(call, request.model_copy(update={"session_id": session_id}), asked.idempotency_key)
    except Refused:
        if not asked.idempotency_key:  # a repeat with the key comes back to this session
            await operations.end_session(caller=call.caller, session_id=session_id)
        raise


async def run_script(call: Call, asked: RunScript) -> Answer:
    wanted = asked.model_dump(exclude={"path", "idempotency_key"}) | {
        "script_path": asked.path,
        "language": SCRIPTS.get(asked.path.rpartition(".")[2], "python"),
        "cancel_on_disconnect": call.cancels,
    }
    request = parse(Submission, wanted)
    await sessions.keep_open(call.caller, asked.session_id, asked.timeout_seconds)
    await _is_there(call, asked)
    return await _run(call, request, asked.idempotency_key)


async def _is_there(call: Call, asked: RunScript) -> None:
    """Raises FileRefused for a script that the sandbox does not have: no interpreter says it as well."""
    try:
        await operations.get_file(caller=call.caller, session_id=asked.session_id, path=asked.path)
    except FileRefused:
        raise
    except SandgateError:  # whatever else is the matter, running it says so
        return


async def get_execution(call: Call, asked: GetExecution) -> Answer:
    execution = await rows(operations.find_execution, call.caller, asked.execution_id)
    shape = await _follow(call, execution, asked.wait_seconds)
    if asked.after_seq:
        shape = await rows(_further, call.caller, shape.id, asked.after_seq)
    return await answers.execution(shape, call.caller)


async def cancel_execution(call: Call, asked: CancelExecution) -> Answer:
    def find() -> Execution:
        call.caller.needs(Scope.RUN)
        return operations.find_execution(call.caller, asked.execution_id)

    execution = await rows(find)
    await operations.cancel(execution=execution, caller=call.caller)
    shape = await operations.wait(execution, min(5.0, call.left()))
    found = await answers.execution(shape, call.caller)
    found.is_error = False  # what was asked for has been done
    return found


async def _run(call: Call, request: Submission, token: str | None) -> Answer:
    shape = await operations.execute(
        caller=call.caller, request=request, idempotency_key=token, wait_seconds=call.next_look()
    )
    if shape.state not in EXECUTION_ENDED:
        execution = await rows(Execution.objects.get, pk=shape.id)
        try:
            shape = await _follow(call, execution, None, shape)
        except asyncio.CancelledError:
            if call.cancels:
                await operations.cancel(execution=execution, caller=call.caller, reason="the call was cancelled")
            raise
    return await answers.execution(shape, call.caller, waited=f" after {settings.MCP_ANSWER_SECONDS:.0f} s")


async def _follow(
    call: Call, execution: Execution, most: float | None, shape: ExecutionShape | None = None
) -> ExecutionShape:
    """Its shape at the end, or when the call has to be answered; tells the caller in between what it prints."""
    while True:
        if shape is not None:
            if shape.state in EXECUTION_ENDED or call.left(most) <= 0:
                return shape
            if call.report:
                await call.report(time.monotonic() - call.began, _tail(shape))
        shape = await operations.wait(execution, call.next_look(most))


def _tail(shape: ExecutionShape) -> str:
    said = (shape.logs.stdout + shape.logs.stderr).rstrip()
    last = said.rpartition("\n")[2][-200:]
    return f"{shape.state} {shape.id}: {last}" if last else f"{shape.state} {shape.id}"


def _further(caller: Caller, execution_id: str, after_seq: int) -> ExecutionShape:
    execution = operations.find_execution(caller, execution_id)
    shape = execution_shape(execution, events=journal.read(execution_id, after_seq))
    shape.last_seq = max(shape.last_seq, after_seq)
    return shape


def _base64(content: str | InBase64 | KeptFile) -> str | dict[str, str]:
    match content:
        case InBase64():
            return content.base64
        case KeptFile():
            return {"artifact": content.artifact}
    return base64.b64encode(content.encode(errors="surrogatepass")).decode()
