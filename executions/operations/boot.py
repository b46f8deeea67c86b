"""Having a sandbox made: the one place that asks a backend for it, and tells the breaker what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from django.conf import settings
from django.utils import timezone

from executions import backends, breaker, faults, ledger, metrics
from executions.backends.base import Handle, Limits, SandboxSpec
from executions.errors import BackendError, BackendUnavailable, SandboxRefused
from executions.hop import rows
from executions.models import Sandbox
from executions.operations import locks
from executions.states import EndReason, SandboxState

LATE_SECONDS = 0.2  # by which a timer of ours was late: it is this process that is slow
_telling: set[asyncio.Task] = set()
_heard: set[str] = set()  # backends that have made a sandbox for this process: from then on silence means something


async def boot(sandbox: Sandbox) -> Handle:
    """The machine of a BOOTING row. Raises BackendUnavailable: nothing has run, another backend may be tried.

    Among its facts is `perhaps` where the machine may have been made all the same, so that it has to be killed.
    """
    alias, began = sandbox.backend, timezone.now()
    faults.point("intended")
    try:
        with _silence_told(alias):
            handle = await make(sandbox)
    except SandboxRefused:
        raise
    except BackendUnavailable as e:
        await rows(breaker.failed, alias, e.detail, began=began, retry_after=float(e.facts.get("retry_after") or 0))
        raise
    _heard.add(alias)
    if breaker.worked(alias):
        await rows(breaker.clear, alias)
    return handle


async def boot_alone(sandbox: Sandbox) -> Handle:
    """The same where no execution shows that this process lives: a row that has been silent for too long is nobody's any more."""
    booting = asyncio.ensure_future(boot(sandbox))
    mine = Sandbox.objects.filter(pk=sandbox.pk, state=SandboxState.BOOTING)
    try:
        while not (await asyncio.wait({booting}, timeout=settings.HEARTBEAT_SECONDS))[0]:
            await rows(mine.update, last_used_at=timezone.now())
        return booting.result()
    finally:
        booting.cancel()


async def make(sandbox: Sandbox) -> Handle:
    """The same for the breaker's own probe, which tells by itself what came of it."""
    if said := breaker.drilled(sandbox.backend):
        raise BackendUnavailable(said)
    try:
        with metrics.asking("create", sandbox.backend):
            return await locks.create(backends.get(sandbox.backend), sandbox, spec_of(sandbox))
    except BackendUnavailable:
        raise
    except (BackendError, OSError, TimeoutError) as e:
        said = e.detail if isinstance(e, BackendError) else f"{type(e).__name__}: {e}"
        raise BackendUnavailable(said, perhaps=True) from None


def never_was(sandbox: Sandbox, why: BackendUnavailable) -> None:
    """Close the row of a machine that was not made; nothing is owed. Where it may have been made, its end is asked for first."""
    if why.facts.get("perhaps"):
        sandbox.advance(SandboxState.RETIRING, reason=why.code, end_reason=EndReason.OUTAGE)
        return
    list(Sandbox.objects.select_for_update().filter(pk=sandbox.pk).values_list("pk"))  # first, as `reap` does
    _, fields = ledger.bill(sandbox, final=True)
    ended = EndReason.OUTAGE if sandbox.handle is None else EndReason.LOST  # it had waited in a pool
    sandbox.advance(SandboxState.GONE, reason=why.code, end_reason=ended, **fields)


@contextmanager
def _silence_told(alias: str) -> Iterator[None]:
    """A backend that swallows requests is found out before they have timed out, one after the other."""
    loop, began, seconds = asyncio.get_running_loop(), timezone.now(), backends.get(alias).slow_seconds
    timer: asyncio.TimerHandle | None = None

    def wait() -> None:
        nonlocal timer
        timer = loop.call_at(loop.time() + seconds, tell, loop.time() + seconds)

    def tell(due: float) -> None:
        if loop.time() - due > LATE_SECONDS:
            return wait()
        why = f"no answer within {seconds:g} s"
        task = asyncio.ensure_future(rows(breaker.failed, alias, why, began=began, silent=True))
        _telling.add(task)
        task.add_done_callback(_telling.discard)

    if seconds and alias in _heard:
        wait()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def spec_of(sandbox: Sandbox) -> SandboxSpec:
    """What the backend is asked to make for this row."""
    template = sandbox.template
    backend = backends.get(sandbox.backend)
    return SandboxSpec(
        sandbox_id=sandbox.provider_name,
        template=backend.template_name(template.name, template.e2b_template),
        timeout_seconds=max(1, int((sandbox.leased_until - timezone.now()).total_seconds())) + sandbox.grace_seconds,
        limits=Limits(memory_mib=sandbox.memory_mib, cpu_count=sandbox.cpu_count, disk_mib=template.disk_mib),
        env={**template.env, **sandbox.env},
        metadata={"sandgate_sandbox": sandbox.pk, "sandgate_agent": sandbox.agent_id},
        network_allow=tuple(sandbox.network_allow),
        agent=sandbox.agent.name,
    )
