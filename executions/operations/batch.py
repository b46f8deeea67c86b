"""Many executions that are admitted in one transaction, all or none of them; and one of old, run again."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

from django.db import transaction
from django.db.models import Q

from executions import quotas
from executions.errors import Invalid, KeyReused, Refused
from executions.hop import rows
from executions.keys import Caller
from executions.models import BackendState, Execution, IdempotencyRecord, Quota, Sandbox
from executions.operations import waiting
from executions.operations.run import start
from executions.operations.submit import TwinAdmitted, _admitted, asking, record_refusal
from executions.serializers import KeptFile, RunLimits, Submission
from executions.serializers.workflows import RerunRequest
from executions.states import Scope


async def execute_all(
    *, caller: Caller, requests: list[Submission], idempotency_key: str | None = None
) -> list[Execution]:
    """Admit them all; whichever processes are first run them. Raises Refused, which says at which `index`; then none is."""

    async def begin() -> list[Execution]:
        admitted = await rows(_submit_all, caller, requests, idempotency_key)
        for execution in admitted:
            if not execution.replayed and not execution.is_unclaimed:  # its machine is in this process
                start(execution)
        await waiting.ring()
        return admitted

    return await asyncio.shield(
        asyncio.ensure_future(begin())
    )  # what was admitted is started, though the caller has gone


def _submit_all(caller: Caller, requests: list[Submission], idempotency_key: str | None) -> list[Execution]:
    caller.needs(Scope.RUN)
    named = {request.agent for request in requests}
    if len(named) > 1:
        raise Invalid("executions: all of a batch are of one agent.", field="executions.agent")
    caller = caller.acting_as(named.pop())
    try:
        try:
            return _admit_all(caller, requests, idempotency_key)
        except TwinAdmitted:
            return _admit_all(caller, requests, idempotency_key)
    except Refused as refusal:
        record_refusal(caller, refusal)
        raise


@transaction.atomic(durable=True)
def _admit_all(caller: Caller, requests: list[Submission], token: str | None) -> list[Execution]:
    _lock(caller, requests)
    admitted = []
    for index, request in enumerate(requests):
        try:
            if request.dry_run:
                raise Invalid("dry_run: only POST /executions prices a request, one at a time.", field="dry_run")
            of_one = f"{token}#{index}" if token else None
            admitted.append(_admitted(asking(caller, request), request, of_one, later=True))
        except Refused as refusal:
            refusal.facts["index"] = index
            raise
    longer = IdempotencyRecord.objects.filter(agent=caller.agent, token=f"{token}#{len(requests)}")
    if len({execution.replayed for execution in admitted}) > 1 or (admitted[0].replayed and longer.exists()):
        raise KeyReused
    return admitted


def _lock(caller: Caller, requests: list[Submission]) -> None:
    """All that the requests may change, in the order in which one request takes it: else two batches wait for each other."""
    sessions = {request.session_id for request in requests if request.session_id}
    if sessions:
        kept = Sandbox.objects.select_for_update().filter(pk__in=sessions, team=caller.team)
        list(kept.order_by("pk").values_list("pk"))
    list(BackendState.objects.select_for_update().order_by("alias").values_list("alias"))
    mine = (
        Q(team=None, agent=None, key=None) | Q(team=caller.team) | Q(agent__team=caller.team) | Q(key__team=caller.team)
    )
    quotas.held(Quota.objects.filter(mine).values("pk"))


def again(execution: Execution, asked: RerunRequest) -> Submission:
    """The request for the same once more, as a child of the first. A session's variables are not there, but where it says so."""
    sandbox = execution.sandbox
    changed: dict[str, Any] = asked.model_dump(exclude_none=True, exclude={"limits"})
    as_it_was: dict[str, Any] = {"timeout_seconds": execution.timeout_seconds}
    as_it_was |= {"command": execution.code} if execution.command else {"code": execution.code}
    if sandbox is not None and not asked.session_id:
        as_it_was |= {"template": sandbox.template.name, "network": sandbox.network_allow}
    elif not asked.session_id and execution.wish and execution.wish.get("template"):  # it never had one
        as_it_was |= {"template": execution.wish["template"], "network": list(execution.wish["network"])}
    if execution.max_cost_nano_usd is not None:
        as_it_was["max_cost_usd"] = Decimal(execution.max_cost_nano_usd) / 1_000_000_000
    files = {p: KeptFile(artifact=c["artifact"]) if isinstance(c, dict) else c for p, c in execution.files.items()}
    return Submission(
        **as_it_was | changed,
        agent=execution.agent.name,
        language=execution.language,
        files=files,
        env=execution.env,
        limits=asked.limits or RunLimits(**execution.limits),
        keep_files=execution.keep_files,
        user=execution.user,
        workflow=execution.workflow,
        step=execution.step,
        metadata=execution.metadata,
        parent=execution.id,
    )
