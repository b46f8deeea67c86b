"""Many executions at once: batches, reruns, and what belongs to one workflow."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from executions.models import Execution
from executions.serializers.requests import Accepted, Hosts, RunLimits, Short, Submission
from executions.serializers.shapes import ExecutionShape, dollars

BATCH_MOST = 100


class BatchRequest(Accepted):
    """Executions of one agent that are admitted all, or none of them."""

    executions: list[Submission] = Field(min_length=1, max_length=BATCH_MOST)


class BatchShape(BaseModel):
    """In the order in which they were sent."""

    results: list[ExecutionShape]


class RerunRequest(Accepted):
    """The same code once more, in a fresh sandbox; what is left out stays as it was."""

    route: list[Short] | None = Field(
        None, description="Backend aliases in order; left out: the agent's own route.", max_length=8
    )
    timeout_seconds: int | None = Field(None, ge=1)
    limits: RunLimits | None = None
    network: Hosts = None
    template: Short | None = None
    session_id: str | None = Field(None, description="Run it in this session instead.", max_length=40)


class WorkflowRun(BaseModel):
    """One execution on the timeline."""

    id: str
    step: str
    parent: str | None
    agent: str
    user: str
    state: str
    backend: str
    session_id: str | None
    error_code: str
    created_at: datetime
    started_at: datetime | None
    running_at: datetime | None
    ended_at: datetime | None
    cost_usd: str = Field(description="Empty while it runs.")


class WorkflowStep(BaseModel):
    """All executions with the same `step`."""

    step: str
    executions: int
    open: int
    failed: int = Field(description="Ended, but not as succeeded.")
    first_at: datetime
    last_at: datetime | None = Field(description="When the last of them ended; null while one is open.")
    run_seconds: float
    cost_usd: str


class WorkflowShape(BaseModel):
    """What has run under one label."""

    id: str
    executions: int
    open: int
    states: dict[str, int]
    first_at: datetime
    last_at: datetime | None = Field(description="When the last of them ended; null while one is open.")
    run_seconds: float
    cpu_seconds: float
    cost_usd: str
    cost_nano_usd: int
    steps: list[WorkflowStep]
    timeline: list[WorkflowRun] = Field(description="In the order in which they were asked for, at most 1,000.")
    truncated: bool = Field(description="There are more than the timeline shows; the sums are of all.")


class WorkflowCancelled(BaseModel):
    id: str
    cancelled: int = Field(description="Executions that were open and have been asked to end.")


def workflow_run(execution: Execution) -> WorkflowRun:
    sandbox = execution.sandbox
    return WorkflowRun(
        id=execution.id,
        step=execution.step,
        parent=execution.parent_id,
        agent=execution.agent.name,
        user=execution.user,
        state=execution.state,
        backend=execution.backend,
        session_id=execution.sandbox_id if sandbox and sandbox.kept else None,
        error_code=execution.error_code,
        created_at=execution.created_at,
        started_at=execution.started_at,
        running_at=execution.running_at,
        ended_at=execution.ended_at,
        cost_usd=dollars(execution.cost_nano_usd),
    )
