"""What has run under one label: its timeline and sums, and its end."""

from __future__ import annotations

from typing import Any

from django.db.models import Count, Max, Min, Q, QuerySet, Sum

from executions import newest
from executions.errors import NotFound
from executions.hop import rows
from executions.keys import Caller
from executions.models import Execution
from executions.operations.wait import cancel
from executions.serializers import dollars
from executions.serializers.workflows import WorkflowShape, WorkflowStep, workflow_run
from executions.states import ExecutionState, Scope

TIMELINE_MOST = 1000


def find_workflow(caller: Caller, workflow: str) -> QuerySet[Execution]:
    """Its executions, as far as the caller sees them. Raises NotFound where there is none."""
    found: QuerySet = Execution.objects.filter(newest.Labelled("workflow"), team=caller.team, workflow=workflow)
    if caller.key is not None and caller.key.agent_id:
        found = newest.also(found, agent_id=caller.key.agent_id)
    if not found.exists():
        raise NotFound(f"There is no execution with the workflow {workflow[:100]!r}.", field="workflow")
    return found


def workflow_shape(caller: Caller, workflow: str) -> WorkflowShape:
    """Timeline, sums and cost of all that carry the label."""
    caller.needs(Scope.READ)
    found = find_workflow(caller, workflow)
    sums: dict[str, Any] = {
        "executions": Count("pk"),
        "open": Count("pk", filter=Q(ended_at=None)),
        "first_at": Min("created_at"),
        "ended": Max("ended_at"),
        "cost": Sum("cost_nano_usd"),
        "cpu": Sum("cpu_us"),
    }
    whole = found.aggregate(**sums)
    failed = Count("pk", filter=~Q(ended_at=None) & ~Q(state=ExecutionState.SUCCEEDED))
    by_step: Any = found.values("step").annotate(**sums, failed=failed).order_by()
    states = dict(found.values_list("state").annotate(Count("pk")).order_by())
    seconds = _run_seconds(found)
    heavy = ("code", "env", "files", "metadata", "limits", "wish", "error_value")
    timeline = found.select_related("agent", "sandbox").defer(*heavy).order_by("created_at", "id")[:TIMELINE_MOST]
    return WorkflowShape(
        id=workflow,
        executions=whole["executions"],
        open=whole["open"],
        states=states,
        first_at=whole["first_at"],
        last_at=None if whole["open"] else whole["ended"],
        run_seconds=round(sum(seconds.values()), 6),
        cpu_seconds=(whole["cpu"] or 0) / 1_000_000,
        cost_usd=dollars(whole["cost"] or 0),
        cost_nano_usd=whole["cost"] or 0,
        steps=sorted((_step(one, seconds.get(one["step"], 0)) for one in by_step), key=lambda step: step.first_at),
        timeline=[workflow_run(execution) for execution in timeline],
        truncated=whole["executions"] > TIMELINE_MOST,
    )


def _step(sums: dict[str, Any], seconds: float) -> WorkflowStep:
    return WorkflowStep(
        step=sums["step"],
        executions=sums["executions"],
        open=sums["open"],
        failed=sums["failed"],
        first_at=sums["first_at"],
        last_at=None if sums["open"] else sums["ended"],
        run_seconds=round(seconds, 6),
        cost_usd=dollars(sums["cost"] or 0),
    )


def _run_seconds(found: QuerySet[Execution]) -> dict[str, float]:
    """Of each step; added up here, as the databases subtract moments in different ways."""
    seconds: dict[str, float] = {}
    ran = found.filter(running_at__isnull=False, ended_at__isnull=False)
    moments: Any = ran.values_list("step", "running_at", "ended_at")
    for step, began, ended in moments.iterator():
        seconds[step] = seconds.get(step, 0) + (ended - began).total_seconds()
    return seconds


async def cancel_workflow(*, caller: Caller, workflow: str, reason: str = "") -> int:
    """Ask for the end of all of it that is open; how many that were. Raises NotFound."""

    def open_ones() -> list[Execution]:
        caller.needs(Scope.RUN)
        return list(find_workflow(caller, workflow).open())  # type: ignore[attr-defined]

    said = reason or f"workflow {workflow[:100]} was cancelled"
    return sum([await cancel(execution=one, caller=caller, reason=said) for one in await rows(open_ones)])
