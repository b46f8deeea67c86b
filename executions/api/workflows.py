"""Many executions at once: batches, reruns, and what belongs to one workflow."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse

from executions import operations
from executions.api.auth import caller_of
from executions.api.executions import answer, body_of, preferred_wait
from executions.api.limits import tells_limits
from executions.api.operation import operation
from executions.hop import rows
from executions.keys import Caller
from executions.operations import batch, workflows
from executions.serializers import CancelRequest, ExecutionShape, Submission, execution_head, parse
from executions.serializers.workflows import (
    BatchRequest,
    BatchShape,
    RerunRequest,
    WorkflowCancelled,
    WorkflowShape,
)
from executions.states import EXECUTION_ENDED, Scope

ADMISSION = (402, 409, 410, 413, 422, 503)


@operation("Run up to 100 at once, all or none", body=BatchRequest, gives={202: BatchShape}, fails=ADMISSION)
@tells_limits
async def run_batch(request: HttpRequest) -> HttpResponse:
    caller, asked = await rows(lambda: (caller_of(request), parse(BatchRequest, body_of(request))))
    token = request.headers.get("Idempotency-Key")
    admitted = await batch.execute_all(caller=caller, requests=asked.executions, idempotency_key=token)
    shapes = await rows(lambda: [execution_head(execution) for execution in admitted])
    return answer(BatchShape(results=shapes), 202)


@operation(
    "Run an execution again",
    body=RerunRequest,
    gives={201: ExecutionShape, 202: ExecutionShape},
    headers={"Prefer": "wait=N: wait for its end, at most N seconds. Left out: answer at once."},
    fails=ADMISSION,
)
@tells_limits
async def rerun(request: HttpRequest, execution_id: str) -> HttpResponse:
    """At once with 202, unless `Prefer: wait=N` asks for its end."""

    def who_and_what() -> tuple[Caller, Submission]:
        caller = caller_of(request)
        caller.needs(Scope.RUN)
        asked = parse(RerunRequest, body_of(request))
        return caller, batch.again(operations.find_execution(caller, execution_id), asked)

    shape = await operations.execute(
        caller=who_and_what,
        idempotency_key=request.headers.get("Idempotency-Key"),
        wait_seconds=preferred_wait(request) or 0,
    )
    response = answer(shape, 201 if shape.state in EXECUTION_ENDED else 202)
    response["Location"] = f"/api/v1/executions/{shape.id}"
    return response


@operation("Timeline, sums and cost of a workflow", gives={200: WorkflowShape})
async def look(request: HttpRequest, workflow: str) -> HttpResponse:
    return answer(await rows(lambda: workflows.workflow_shape(caller_of(request), workflow)))


@operation("Cancel all that is open of a workflow", body=CancelRequest, gives={202: WorkflowCancelled})
async def cancel(request: HttpRequest, workflow: str) -> HttpResponse:
    caller, asked = await rows(lambda: (caller_of(request), parse(CancelRequest, body_of(request))))
    cancelled = await workflows.cancel_workflow(caller=caller, workflow=workflow, reason=asked.reason)
    return answer(WorkflowCancelled(id=workflow, cancelled=cancelled), 202)


@operation("Cancel all that is open of a workflow", gives={202: WorkflowCancelled})
async def end(request: HttpRequest, workflow: str) -> HttpResponse:
    caller = await rows(caller_of, request)
    return answer(
        WorkflowCancelled(id=workflow, cancelled=await workflows.cancel_workflow(caller=caller, workflow=workflow)),
        202,
    )
