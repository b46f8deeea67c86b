"""Sessions: sandboxes that are kept, their contexts and files."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone

from executions import backends, breaker, capacity, egress, ledger, pool, quotas, routes
from executions.backends.base import FileInfo
from executions.errors import (
    BackendUnavailable,
    FileRefused,
    Invalid,
    NoBackend,
    Refused,
    SandboxLost,
    SandboxRefused,
    SessionGone,
)
from executions.hop import rows
from executions.keys import Caller
from executions.models import Execution, Sandbox
from executions.operations import reap, run
from executions.operations.boot import boot, never_was
from executions.operations.submit import (
    TwinAdmitted,
    claim_session,
    find_session,
    find_template,
    record_refusal,
    remember,
    replay,
)
from executions.serializers import SessionRequest
from executions.states import EndReason, SandboxState, Scope

S = SandboxState
SESSION_ENDED = "the session was ended"
log = logging.getLogger(__name__)


async def open_session(*, caller: Caller, request: SessionRequest, idempotency_key: str | None = None) -> Sandbox:
    """A sandbox that is kept, booted on the first backend of the route that has one. Raises Refused, NoBackend."""
    sandbox, waiting, caller = await rows(_intend, caller, request, idempotency_key)
    if getattr(sandbox, "replayed", False):
        return sandbox
    # The boot goes on when the caller goes away: the row and the machine must agree.
    return await asyncio.shield(asyncio.ensure_future(_boot(caller, request, sandbox, waiting)))


def _intend(caller: Caller, request: SessionRequest, token: str | None) -> tuple[Sandbox, list[str], Caller]:
    caller.needs(Scope.RUN)
    caller = caller.acting_as(request.agent)
    try:
        try:
            sandbox, route = _admit(caller, request, token)
        except TwinAdmitted:
            sandbox, route = _admit(caller, request, token)
    except Refused as refusal:
        record_refusal(caller, refusal)
        raise
    return sandbox, route, caller


@transaction.atomic(durable=True)
def _admit(caller: Caller, request: SessionRequest, token: str | None) -> tuple[Sandbox, list[str]]:
    agent = caller.agent
    assert agent is not None
    fingerprint = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    if token and (earlier := replay(agent, token, fingerprint)):
        return earlier, []
    template = find_template(agent, request.template)
    network = egress.allowed(agent, request.network)
    route = routes.plan(caller, asked=request.route, language="python", template=template, network=network)
    sandbox = routes.first(route, lambda alias: _intent(caller, request, alias))
    if token:
        remember(agent, token, fingerprint, sandbox=sandbox)
    return sandbox, route.aliases[1:]


def _intent(caller: Caller, request: SessionRequest, alias: str) -> Sandbox:
    assert caller.agent is not None
    return pool.intend(
        caller,
        alias=alias,
        template=find_template(caller.agent, request.template),
        seconds=request.timeout_seconds,
        kept=True,
        name=request.name,
        idle_timeout_seconds=request.idle_timeout_seconds,
        env=request.env,
        metadata=request.metadata,
        network_allow=egress.allowed(caller.agent, request.network),
    )


async def _boot(caller: Caller, request: SessionRequest, sandbox: Sandbox, waiting: list[str]) -> Sandbox:
    while True:
        try:
            handle = await boot(sandbox)
            await rows(_ready, sandbox, handle)
            return sandbox
        except BackendUnavailable as e:
            log.info("backend_unavailable", extra={"sandbox_id": sandbox.pk, "backend": sandbox.backend})
            sandbox = await rows(_fall_back, caller, request, sandbox, e, waiting)


@transaction.atomic(durable=True)
def _ready(sandbox: Sandbox, handle: dict) -> None:
    now = timezone.now()
    isolation = backends.get(sandbox.backend).isolation
    sandbox.advance(S.LEASED, handle=handle, ready_at=now, last_used_at=now, isolation=isolation)


def _fall_back(
    caller: Caller, request: SessionRequest, sandbox: Sandbox, why: BackendUnavailable, waiting: list[str]
) -> Sandbox:
    """The intent to boot on the next backend that is left. Raises Refused, NoBackend."""
    with transaction.atomic(durable=True):
        never_was(sandbox, why)
    said = [f"{sandbox.backend}: {why.detail}"]
    while waiting:
        alias = waiting.pop(0)
        if out := breaker.outage(alias):
            said.append(f"{alias}: {out}")
            continue
        try:
            with transaction.atomic(durable=True):
                return _intent(caller, request, alias)
        except capacity.Full as full:
            said.append(f"{alias}: {full}")
    left = f"No backend is left: {'; '.join(said)}"
    raise SandboxRefused(left) if isinstance(why, SandboxRefused) else NoBackend(left)


async def end_session(*, caller: Caller, session_id: str, reason: str = EndReason.FINISHED) -> Sandbox:
    """End it: what runs in it is cancelled, its charges stop. Idempotent. Raises NotFound."""
    sandbox = await rows(_to_end, caller, session_id)
    for execution_id in await rows(_open_in, sandbox):
        if here := run.running(execution_id):
            here.cancel(SESSION_ENDED)
    await reap.retire(sandbox, reason)
    await rows(sandbox.refresh_from_db)
    return sandbox


def _to_end(caller: Caller, session_id: str) -> Sandbox:
    caller.needs(Scope.RUN)
    return find_session(caller, session_id)


def _open_in(sandbox: Sandbox) -> list[str]:
    open_ones = Execution.objects.open().filter(sandbox=sandbox)
    open_ones.filter(cancel_requested_at__isnull=True).update(
        cancel_requested_at=timezone.now(), cancel_reason=SESSION_ENDED
    )
    return list(open_ones.values_list("pk", flat=True))


async def extend_session(*, caller: Caller, session_id: str, seconds: int) -> Sandbox:
    """The session ends `seconds` from now. A later end is reserved first. Raises BudgetExhausted, SessionGone."""
    if not 1 <= seconds <= 86_400:
        raise Invalid("timeout_seconds: between 1 and 86400.", field="timeout_seconds")
    sandbox = await rows(_extend, caller, session_id, seconds)
    await backends.get(sandbox.backend).set_timeout(sandbox.machine, seconds)
    return sandbox


@transaction.atomic(durable=True)
def _extend(caller: Caller, session_id: str, seconds: int) -> Sandbox:
    caller.needs(Scope.RUN)
    claim_session(caller, session_id)
    sandbox = Sandbox.objects.select_for_update().select_related("agent", "template", "team").get(pk=session_id)
    end = timezone.now() + timedelta(seconds=seconds)
    more = int((end - sandbox.leased_until).total_seconds()) + 1
    if more > 0:
        worst = more * sandbox.rate_nano_usd_per_second
        owner = Caller(team=sandbox.team, agent=sandbox.agent, key=sandbox.key, person=sandbox.actor)
        budgets = quotas.take(owner, nano_usd=worst)
        if sorted(budgets) != sorted(sandbox.reserved_on):  # budgets were added or removed since it was opened
            quotas.settle(budgets, release=worst)
            quotas.settle(sandbox.reserved_on, release=-worst)
        ledger.record_reservation(sandbox, worst)
        Sandbox.objects.filter(pk=sandbox.pk).update(reserved_nano_usd=sandbox.reserved_nano_usd + worst)
        sandbox.reserved_nano_usd += worst
    Sandbox.objects.filter(pk=sandbox.pk).update(leased_until=end)
    sandbox.leased_until = end
    return sandbox


async def restart_session(*, caller: Caller, session_id: str) -> None:
    """Start every context of the session anew: variables are lost, files stay. Raises SessionGone, NotFound."""
    sandbox = await _alive(caller, session_id)
    backend = backends.get(sandbox.backend)
    with gone_is_recorded(sandbox):
        for context in await backend.list_contexts(sandbox.machine):
            await backend.restart_context(sandbox.machine, context["id"])


# Files: all access happens inside the sandbox; no path here ever names one of the host's.


async def _alive(caller: Caller, session_id: str, scope: str = Scope.RUN) -> Sandbox:
    def claim() -> Sandbox:
        caller.needs(scope)
        return claim_session(caller, session_id)

    return await rows(claim)


def _checked(path: str) -> str:
    """Refuses what no file of a sandbox is called. Raises FileRefused."""
    if not path or len(path) > 4096 or any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise FileRefused("path: empty, too long, or with a control character in it.", field="path")
    if ".." in path.split("/"):
        raise FileRefused("path: `..` is not followed.", field="path")
    return path


async def put_file(*, caller: Caller, session_id: str, path: str, data: bytes | AsyncIterator[bytes]) -> None:
    """Create or replace one file, streamed. Raises FileRefused, SessionGone, NotFound."""
    path = _checked(path)
    sandbox = await _alive(caller, session_id)
    with gone_is_recorded(sandbox):
        await backends.get(sandbox.backend).write_file(sandbox.machine, path, data)


async def get_file(*, caller: Caller, session_id: str, path: str) -> AsyncIterator[bytes]:
    """The file in pieces; the first piece has been read when this returns, so that errors come first."""
    path = _checked(path)
    sandbox = await _alive(caller, session_id, Scope.READ)
    pieces = backends.get(sandbox.backend).read_file(sandbox.machine, path)
    with gone_is_recorded(sandbox):
        first = await anext(pieces, b"")

    async def all_of_it() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return all_of_it()


async def list_files(*, caller: Caller, session_id: str, path: str = "/home/user", depth: int = 1) -> list[FileInfo]:
    path = _checked(path)
    sandbox = await _alive(caller, session_id, Scope.READ)
    with gone_is_recorded(sandbox):
        return await backends.get(sandbox.backend).list_files(sandbox.machine, path, depth=depth)


async def remove_file(*, caller: Caller, session_id: str, path: str) -> None:
    path = _checked(path)
    sandbox = await _alive(caller, session_id)
    with gone_is_recorded(sandbox):
        await backends.get(sandbox.backend).remove_file(sandbox.machine, path)


class gone_is_recorded:
    """A sandbox found dead in passing is the caller's SessionGone, and `reap` closes the row at once."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SandboxLost):
            task = asyncio.ensure_future(reap.retire(self.sandbox, EndReason.LOST))
            reap._retiring.add(task)
            task.add_done_callback(reap._retiring.discard)
            raise SessionGone("The session's sandbox has died.", session_id=self.sandbox.pk) from error


__all__ = [
    "end_session",
    "extend_session",
    "get_file",
    "list_files",
    "open_session",
    "put_file",
    "remove_file",
    "restart_session",
]
