"""Sessions: sandboxes that are kept, their contexts and files."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from executions import backends, breaker, capacity, egress, faults, pool, quotas, routes
from executions.backends.base import FileInfo
from executions.errors import (
    BackendError,
    BackendUnavailable,
    FileRefused,
    Invalid,
    NoBackend,
    RateUnknown,
    Refused,
    SandboxLost,
    SandboxRefused,
    SessionGone,
)
from executions.hop import rows
from executions.keys import Caller
from executions.models import Execution, Sandbox
from executions.operations import artifacts, pausing, reap, replenish, run
from executions.operations.boot import boot_alone, never_was
from executions.operations.submit import (
    TwinAdmitted,
    claim_session,
    find_session,
    find_template,
    record_refusal,
    remember,
    replay,
)
from executions.serializers import SessionRequest, nano
from executions.states import EndReason, SandboxState, Scope

S = SandboxState
SESSION_ENDED = "the session was ended"
TOUCH_SECONDS = 5
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
    caller = replace(caller.acting_as(request.agent), max_nano_usd=nano(request.max_cost_usd))
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
    agent = caller.agent
    assert agent is not None
    has = backends.get(alias).capabilities
    kept = agent.keep_files if request.keep_files is None else request.keep_files
    pause_after = agent.pause_after_seconds if request.pause_after_seconds is None else request.pause_after_seconds
    pause_after = settings.SESSION_PAUSE_AFTER_SECONDS if pause_after is None else pause_after
    sandbox = pool.claim(
        caller,
        alias=alias,
        template=find_template(agent, request.template),
        seconds=request.timeout_seconds,
        kept=True,
        name=request.name,
        idle_timeout_seconds=request.idle_timeout_seconds,
        env=request.env,
        metadata=request.metadata,
        network_allow=egress.allowed(agent, request.network),
        pause_after_seconds=pause_after if has.pause else 0,
        keep_files=(artifacts.SESSION_DEFAULT if kept is None else kept) if has.files else [],
    )
    pausing.reserve_until(sandbox, sandbox.leased_until)  # and the time in which its files are kept
    if caller.max_nano_usd is not None and sandbox.reserved_nano_usd > caller.max_nano_usd:
        raise quotas.too_dear(caller.max_nano_usd, sandbox.reserved_nano_usd)
    return sandbox


async def _boot(caller: Caller, request: SessionRequest, sandbox: Sandbox, waiting: list[str]) -> Sandbox:
    while True:
        try:
            if sandbox.made_of:
                await replenish.fit_session(sandbox)
            else:
                handle = await boot_alone(sandbox)
                faults.point("session_booted")
                await rows(_ready, sandbox, handle)
            return sandbox
        except BackendUnavailable as e:
            log.info("backend_unavailable", extra={"sandbox_id": sandbox.pk, "backend": sandbox.backend})
            if sandbox.made_of:  # its pool had lost it without knowing: the backend is asked for a fresh one
                waiting.insert(0, sandbox.backend)
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
        except (capacity.Full, RateUnknown) as left_out:
            said.append(f"{alias}: {left_out}")
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
    caller.needs(Scope.RUN)
    if paused := await rows(_extend_paused, caller, session_id, seconds):
        if paused.is_here and not pausing.is_free(paused):  # what is frozen has its time at the backend, which runs on
            await backends.get(paused.backend).set_timeout(paused.machine, seconds + paused.grace_seconds)
        return paused
    sandbox = await rows(claim_session, caller, session_id)
    if sandbox.is_here:
        await pausing.awake(sandbox)
    end = await rows(_reserve, sandbox, seconds)
    faults.point("reserved")
    with gone_is_recorded(sandbox):
        if sandbox.is_here:  # elsewhere `tell_ends` reads it out of the row
            await backends.get(sandbox.backend).set_timeout(sandbox.machine, seconds + sandbox.grace_seconds)
    faults.point("extended")
    await rows(Sandbox.objects.filter(pk=sandbox.pk).update, leased_until=end)
    sandbox.leased_until = end
    return sandbox


_told: dict[str, datetime] = {}  # the ends of this machine's sessions, as this process has told them to the node


async def tell_ends() -> None:
    """Have this machine's node end its sessions when their rows say so: another machine may have moved their ends."""
    ours = await rows(_on_this_node)
    for gone in _told.keys() - {sandbox.pk for sandbox in ours}:
        del _told[gone]
    for sandbox in ours:
        if _told.get(sandbox.pk) != sandbox.leased_until:
            left = max(1, math.ceil((sandbox.leased_until - timezone.now()).total_seconds())) + sandbox.grace_seconds
            with contextlib.suppress(BackendError):  # it is tried again, or `reap` finds it dead
                await backends.get(sandbox.backend).set_timeout(sandbox.machine, left)
                _told[sandbox.pk] = sandbox.leased_until


def _on_this_node() -> list[Sandbox]:
    ours = (
        Sandbox.objects.open()
        .sessions()
        .filter(node=settings.NODE, state__in=[S.LEASED, S.PAUSED], handle__isnull=False)
    )
    return [sandbox for sandbox in ours if sandbox.backend in backends.aliases()]


@transaction.atomic(durable=True)
def _extend_paused(caller: Caller, session_id: str, seconds: int) -> Sandbox | None:
    """What is paused stays so. Where that costs nothing its end is a matter of the row alone: to resume it reserves."""
    if find_session(caller, session_id).state != S.PAUSED:
        return None
    row = pausing.locked(session_id)
    if row.state != S.PAUSED or row.turning_until is not None or row.leased_until <= timezone.now():
        return None
    end = timezone.now() + timedelta(seconds=seconds)
    if not pausing.is_free(row):
        pausing.reserve_until(row, end)
    row.leased_until = end
    row.save(update_fields=["leased_until"])
    return row


@transaction.atomic(durable=True)
def _reserve(sandbox: Sandbox, seconds: int) -> datetime:
    """A refusal leaves the end as it was; so does a backend that fails, and what was reserved then covers the next try."""
    row = pausing.locked(sandbox.pk)
    end = timezone.now() + timedelta(seconds=seconds)
    pausing.reserve_until(row, end)
    sandbox.reserved_nano_usd, sandbox.reserved_on = row.reserved_nano_usd, row.reserved_on
    return end


async def pause_session(*, caller: Caller, session_id: str) -> Sandbox:
    """Pause it until it is resumed, used, or its time is over: it does not end idle. Raises Conflict, SessionGone, Unsupported."""

    def find() -> Sandbox:
        caller.needs(Scope.RUN)
        return find_session(caller, session_id)

    sandbox = await rows(find)
    await pausing.pause(sandbox, on_request=True)
    return await rows(find)


async def resume_session(*, caller: Caller, session_id: str) -> Sandbox:
    """Resume it now, though any use of it does so. Raises BudgetExhausted, SessionGone, BackendUnavailable."""
    await _alive(caller, session_id)
    return await rows(find_session, caller, session_id)


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
        if (found := find_session(caller, session_id)).ended_at is None:
            found.must_be_here()  # before anything of it is changed
        return claim_session(caller, session_id)

    sandbox = await rows(claim)
    await pausing.awake(sandbox)
    return sandbox


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
        whole = data if isinstance(data, bytes) else _in_use(sandbox, data)
        await backends.get(sandbox.backend).write_file(sandbox.machine, path, whole)


async def get_file(*, caller: Caller, session_id: str, path: str) -> AsyncIterator[bytes]:
    """The file in pieces; the first piece has been read when this returns, so that errors come first."""
    path = _checked(path)
    sandbox = await _alive(caller, session_id, Scope.READ)
    pieces = backends.get(sandbox.backend).read_file(sandbox.machine, path)
    with gone_is_recorded(sandbox):
        first = await anext(pieces, b"")

    async def all_of_it() -> AsyncIterator[bytes]:
        yield first
        async for piece in _in_use(sandbox, pieces):
            yield piece

    return all_of_it()


async def _in_use(sandbox: Sandbox, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces; while they go through, the session is neither paused nor idle."""
    touched = time.monotonic()
    async for piece in pieces:
        if time.monotonic() - touched > TOUCH_SECONDS:
            touched = time.monotonic()
            await rows(Sandbox.objects.filter(pk=sandbox.pk).update, last_used_at=timezone.now())
        yield piece


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
    "pause_session",
    "put_file",
    "remove_file",
    "restart_session",
    "resume_session",
]
