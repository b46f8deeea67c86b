"""Running an admitted execution: boot, fall back while nothing ran, stream, settle. No transaction is open while code runs."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

from django.db import transaction
from django.utils import timezone

from executions import backends, egress, errors, faults, journal, ledger, metrics
from executions.backends.base import EgressRecord, Handle
from executions.backends.base import Event as Said
from executions.errors import (
    BackendError,
    BackendUnavailable,
    ContextRestarted,
    NoBackend,
    RunTimedOut,
    SandboxLost,
    SandboxMissing,
    SandboxRefused,
    SandgateError,
)
from executions.hop import rows
from executions.models import Attempt, Egress, Event, Execution, IllegalTransition, Sandbox, Usage, hot
from executions.operations import artifacts, patience, pausing
from executions.operations.boot import boot, never_was, spec_of
from executions.operations.submit import caller_of, next_attempt
from executions.states import AttemptOutcome, EndReason, ExecutionState, SandboxState

E, S = ExecutionState, SandboxState
log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.1
KILL_PATIENCE_SECONDS = 0.02  # a kill confirmed by then is settled in the same transaction as the run

_runs: dict[str, Run] = {}
when_over: list[Callable[[], None]] = []  # told that a run here has ended: there may be room for another
_locked = hot.Compiled(lambda sandbox: Sandbox.objects.select_for_update().filter(id=sandbox))


def start(execution: Execution) -> Run:
    """Begin to run an execution that this process has claimed. It goes on when the caller goes away."""
    from executions.operations import probe  # which ends sandboxes by way of this module

    probe.soon()
    run = _runs[execution.pk] = Run(execution)
    run.task = asyncio.create_task(run.whole(), name=f"run {execution.pk}")
    run.task.add_done_callback(lambda _: _over(execution.pk))
    if execution.sandbox is not None and execution.sandbox.pool_id:
        from executions.operations.replenish import taken

        taken(execution.sandbox, run.task)
    return run


def _over(execution_id: str) -> None:
    _runs.pop(execution_id, None)
    for listener in when_over:
        listener()


def running(execution_id: str) -> Run | None:
    """The run of this execution, where it is this process that runs it."""
    return _runs.get(execution_id)


async def drain(patience_seconds: float) -> None:
    """Wait for what runs here; what has not ended by then is ended as ERRORED (shutdown)."""
    if tasks := [run.task for run in _runs.values() if run.task]:
        await asyncio.wait(tasks, timeout=patience_seconds)
    for run in list(_runs.values()):
        run.stop(SandboxLost("The server was stopped."))
    if tasks := [run.task for run in _runs.values() if run.task]:
        await asyncio.wait(tasks, timeout=2)


class Run:
    """One execution in flight in this process."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.journal = journal.Journal(
            execution.pk,
            output_limit_bytes=execution.limits.get("output_bytes", journal.OUTPUT_BYTES),
            results_limit=execution.limits.get("results", journal.RESULTS),
        )
        self.sandbox_lost = False
        self.kept_said = ""
        self.handed_over = False  # the code, to the sandbox: it may have run
        self.events: list[Event] = []  # all that was written, for a caller that waited here
        self.went_out: list[EgressRecord] = []
        self.egress: list[Egress] = []
        self.task: asyncio.Task | None = None
        self.work: asyncio.Future | None = None  # what a stop interrupts; never a transaction
        self.stopped_by: BaseException | None = None
        self.on_said: Any = None  # a coroutine function given every event as it comes (the gateway streams from it)

    def cancel(self, reason: str) -> None:
        """Somebody asked for it: stop the code as soon as possible."""
        self.execution.cancel_reason = reason
        self.stop(asyncio.CancelledError("cancel requested"))

    def stop(self, why: BaseException) -> None:
        self.stopped_by = self.stopped_by or why
        if self.work is not None:
            self.work.cancel()

    async def whole(self) -> Execution:
        """From the claimed row to the settled one; never raises but for a process that is being torn down."""
        execution = self.execution
        faults.point("admitted")
        try:
            try:
                handle = await self._boot()
                while not await self._conversed(handle):
                    handle = await self._boot()
                verdict = self._verdict()
            except asyncio.CancelledError:
                if self.stopped_by is None:
                    raise
                verdict = self._stopped()
            except IllegalTransition:
                await self._let_go()
                raise
            except Exception as e:
                verdict = self._broken(e)
            await self._end(*verdict)
        except IllegalTransition:  # somebody else ended it (reap, another process): theirs is the record
            log.info("run_overtaken", extra={"execution_id": execution.pk})
            await rows(execution.refresh_from_db)
        except Exception:
            log.exception("run_broke", extra={"execution_id": execution.pk})
        return execution

    async def _let_go(self) -> None:
        """Another process has it now, or has ended it: end what was made here, and leave the rows alone."""
        sandbox = self.execution.sandbox
        if sandbox is not None and not sandbox.kept and not sandbox.ended_at:
            await kill(sandbox)

    # Boot

    async def _boot(self) -> Handle:
        """The sandbox, booted where none was live; the next backend of the route where one has none."""
        execution = self.execution
        sandbox = execution.sandbox
        assert sandbox is not None
        if sandbox.handle is not None:  # a session's: already leased, the execution was admitted as running, or paused
            if sandbox.state == S.PAUSED:
                await self._stoppable(pausing.awake(sandbox))
                await patience.surely(self, self._mark_awake)
            return sandbox.handle
        waiting = self._untried()
        while True:
            try:
                handle = await self._beating(boot(sandbox))
                faults.point("booted")
                await patience.surely(self, self._mark_running, sandbox, handle)
                return handle
            except BackendUnavailable as e:
                log.info(
                    "backend_unavailable",
                    extra={"execution_id": execution.pk, "sandbox_id": sandbox.pk, "backend": sandbox.backend},
                )
                sandbox = await self._fall_back(e, waiting)

    async def _conversed(self, handle: Handle) -> bool:
        """False where the sandbox was gone before the code was handed over: the next one is intended then. Raises otherwise."""
        try:
            await self._converse(handle)
            return True
        except (SandboxLost, BackendUnavailable) as e:
            sandbox = self.execution.sandbox
            assert sandbox is not None
            surely_not_run = not self.handed_over or isinstance(e, SandboxMissing) or e.facts.get("nothing_sent")
            if sandbox.kept or not surely_not_run or self.stopped_by is not None:
                raise
            here = [sandbox.backend] if sandbox.made_of else []  # a pool may have lost it without knowing
            which = "A sandbox of the pool" if sandbox.made_of else "The sandbox"
            perhaps = not isinstance(e, SandboxMissing)  # it still lives
            why = BackendUnavailable(f"{which} was gone when it was to be used: {e.detail}", perhaps=perhaps)
        self.handed_over = False
        await self._fall_back(why, here + self._untried())
        return False

    def _untried(self) -> list[str]:
        tried = {attempt.backend for attempt in self.execution.tried}
        return [alias for alias in self.execution.route if alias not in tried]

    async def _fall_back(self, why: BackendUnavailable, waiting: list[str]) -> Sandbox:
        """The intent to boot on the next backend that is left; each that is left out says why. Raises NoBackend."""
        await patience.surely(self, self._mark_unavailable, self.execution.tried[-1], why)
        while waiting:
            alias = waiting.pop(0)
            sandbox = await rows(next_attempt, caller=caller_of(self.execution), execution=self.execution, alias=alias)
            if sandbox is not None:
                return sandbox
        said = "; ".join(f"{attempt.backend}: {attempt.reason}" for attempt in self.execution.tried)
        raise SandboxRefused(said) if isinstance(why, SandboxRefused) else NoBackend(f"No backend is left: {said}")

    @transaction.atomic(durable=True)
    def _mark_unavailable(self, attempt: Attempt, why: BackendUnavailable) -> None:
        now = timezone.now()
        now_known = {
            "outcome": AttemptOutcome.UNAVAILABLE,
            "code": why.code,
            "reason": why.detail[:500],
            "ended_at": now,
        }
        hot.change(attempt, now_known, by=("execution_id", "number"))
        attempt.outcome, attempt.code, attempt.reason = AttemptOutcome.UNAVAILABLE, why.code, why.detail[:500]
        sandbox = attempt.sandbox
        assert sandbox is not None
        never_was(sandbox, why)

    @transaction.atomic(durable=True)
    @hot.together()
    def _mark_running(self, sandbox: Sandbox, handle: Handle) -> None:
        """From here on the code may have run: no fallback any more."""
        now = timezone.now()
        isolation = backends.get(sandbox.backend).isolation
        sandbox.advance(S.LEASED, handle=handle, ready_at=now, isolation=isolation)
        if self._ran:  # in the place of one from a pool, where nothing ran
            hot.change(self.execution, {"running_at": now, "heartbeat_at": now})
            self.execution.running_at = now
        else:
            self.execution.advance(E.RUNNING, running_at=now, heartbeat_at=now)

    @transaction.atomic(durable=True)
    def _mark_awake(self) -> None:
        now = timezone.now()
        self.execution.advance(E.RUNNING, running_at=now, heartbeat_at=now)

    # Converse

    async def _converse(self, handle: Handle) -> None:
        await self._beating(self._talk(handle))

    async def _beating(self, work: Coroutine) -> Any:
        """Wait for work that a stop interrupts, and show signs of life meanwhile."""
        ended = asyncio.Event()
        pulse = asyncio.create_task(self._pulse(ended))
        try:
            done = await self._stoppable(work)
        finally:
            ended.set()
            await asyncio.wait({pulse})
        pulse.result()  # what could not be written ends the run as ERRORED
        return done

    async def _stoppable(self, work: Coroutine) -> Any:
        """Wait for work that a stop interrupts; the work is waited for all the same, so that the remote side was told."""
        if self.stopped_by is not None:
            work.close()
            raise asyncio.CancelledError
        self.work = asyncio.ensure_future(work)
        try:
            await asyncio.wait({self.work})
            return self.work.result()
        finally:
            self.work = None

    async def _talk(self, handle: Handle) -> None:
        execution = self.execution
        backend = backends.get(execution.backend)
        for path, content in execution.files.items():
            whole = base64.b64decode(content) if isinstance(content, str) else artifacts.pieces(content["sha256"])
            await backend.write_file(handle, path, whole)
        options: dict[str, Any] = {"env": execution.env or None, "timeout_seconds": execution.timeout_seconds}
        if cpu_seconds := execution.limits.get("cpu_seconds"):
            options["cpu_seconds"] = cpu_seconds
        if execution.command:
            said = backend.run_command(handle, execution.code, **options)
        else:
            options |= {"language": execution.language, "context_id": execution.context or None}
            code = execution.code
            if "pip" in code:
                from executions.operations import pip_lines  # which installs by way of sessions

                code = await pip_lines.heeded(execution)
            said = backend.run_code(handle, code, **options)
        self.handed_over = True
        try:
            async with aclosing(said) as events:  # type: ignore[type-var]
                async for event in events:
                    self.journal.hear(event)
                    faults.point("said")
                    if self.on_said is not None:
                        await self.on_said(event)
        except ContextRestarted as e:  # what stopping it has cost
            self.journal.hear(Said("error", {"name": "ContextRestarting", "value": e.detail, "traceback": ""}))
            if self.stopped_by is None:
                raise
            raise asyncio.CancelledError from e

    async def _pulse(self, ended: asyncio.Event) -> None:
        """While it boots and runs: write what the code said every 100 ms, show a sign of life, look for a cancel."""
        beat = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(FLUSH_SECONDS):
                    await ended.wait()
                return
            except TimeoutError:
                pass
            batch, due = self.journal.take(), time.monotonic() - beat >= 1
            if not batch and not due:
                continue
            beat = time.monotonic() if due else beat
            try:
                cancelled = await patience.surely(self, self._write, batch, due)
            except Exception as e:
                self.stop(e)
                raise
            self.events += batch
            if batch:
                await journal.ring(self.execution.pk)
            if cancelled is not None:
                self.cancel(cancelled)

    def _write(self, batch: list[Event], look: bool) -> str | None:
        """Store a batch; with `look`, show a sign of life and return the reason of a cancel that was asked for."""
        with transaction.atomic(durable=True):
            patience.write(self, batch)
            if not look:
                return None
            mine = Execution.objects.filter(pk=self.execution.pk)
            mine.filter(heartbeat_at__isnull=False).update(heartbeat_at=timezone.now())  # empty: it was given back
        return mine.filter(cancel_requested_at__isnull=False).values_list("cancel_reason", flat=True).first()

    # End

    def _verdict(self) -> tuple[str, dict[str, Any], str]:
        """(state, columns, outcome of the attempt) of a run that ended by itself."""
        error, exit_code = self.journal.error, self.journal.exit_code
        if exit_code:
            return E.FAILED, {"error_name": "ExitCode", "error_value": str(exit_code)}, AttemptOutcome.RAN
        if error:
            facts = {
                "error_code": error.get("reason", ""),
                "error_name": str(error["name"])[:200],
                "error_value": str(error["value"])[:10_000],
            }
            return E.FAILED, facts, AttemptOutcome.RAN
        return E.SUCCEEDED, {}, AttemptOutcome.RAN

    def _stopped(self) -> tuple[str, dict[str, Any], str]:
        if isinstance(self.stopped_by, Exception):
            return self._broken(self.stopped_by)
        return E.CANCELLED, {"error_code": "cancelled", "error_value": self.execution.cancel_reason}, AttemptOutcome.RAN

    def _broken(self, e: BaseException) -> tuple[str, dict[str, Any], str]:
        self.sandbox_lost = isinstance(e, SandboxLost)
        match e:
            case RunTimedOut():
                said = f"Stopped after {self.execution.timeout_seconds} s."
                return E.TIMED_OUT, {"error_code": e.code, "error_value": said}, AttemptOutcome.RAN
            case BackendError(theirs=True):  # e.g. a path that cannot be written, a context that is not there
                return (
                    E.FAILED if self._ran else E.ERRORED,
                    {"error_code": e.code, "error_value": e.detail},
                    AttemptOutcome.RAN,
                )
            case BackendUnavailable() if self._ran:  # it cannot be reached; the code may have run: no fallback
                return E.ERRORED, {"error_code": BackendError.code, "error_value": e.detail}, AttemptOutcome.LOST
            case SandgateError():
                outcome = AttemptOutcome.LOST if self._ran else AttemptOutcome.UNAVAILABLE
                return E.ERRORED, {"error_code": e.code, "error_value": e.detail}, outcome
        log.error("run_failed", exc_info=e, extra={"execution_id": self.execution.pk})
        ours = errors.ours(e, type(e).__name__)
        return E.ERRORED, {"error_code": ours.code, "error_value": ours.detail}, AttemptOutcome.LOST

    @property
    def _ran(self) -> bool:
        return self.execution.state == E.RUNNING

    async def _end(self, state: str, columns: dict[str, Any], outcome: str) -> None:
        sandbox = self.execution.sandbox
        assert sandbox is not None
        faults.point("ended")
        lost = self.sandbox_lost
        ends = not sandbox.kept or lost
        if self.execution.keep_files and not sandbox.ended_at:
            await self._keep_files(lost)
        ended_at = timezone.now()
        known = await rows(egress.last_known, sandbox) if sandbox.kept and sandbox.network_allow else 0
        self.went_out = await egress.ask(sandbox, after=known, final=ends)
        killing = asyncio.create_task(kill(sandbox)) if ends and not sandbox.ended_at else None
        if killing:
            await asyncio.wait({killing}, timeout=KILL_PATIENCE_SECONDS)
        gone = killing is not None and killing.done() and killing.result()
        faults.point("killed")
        reason = EndReason.LOST if lost else EndReason.FINISHED
        await patience.surely(self, self._settle, state, columns, outcome, ended_at, reason if killing else "", gone)
        faults.point("settled")
        metrics.ended(self.execution)
        await journal.ring(self.execution.pk)
        if killing and not gone:
            from executions.operations.reap import retire_when_killed

            retire_when_killed(sandbox, killing)

    async def _keep_files(self, lost: bool) -> None:
        """Keep what the run asked for; it is in use until then, and shows that it is."""
        if lost or self.stopped_by is not None:
            self.kept_said = artifacts.DIED if lost else "Nothing was kept: the run was stopped."
            return
        ended = asyncio.Event()
        pulse = asyncio.create_task(self._pulse(ended))
        try:
            self.kept_said = await artifacts.keep_of_run(self.execution)
        except Exception:
            log.exception("keeping_failed", extra={"execution_id": self.execution.pk})
            self.kept_said = "Nothing was kept: it failed."
        finally:
            ended.set()
            await asyncio.wait({pulse})

    @transaction.atomic(durable=True)
    @hot.together()
    def _settle(self, state: str, columns: dict, outcome: str, ended_at: Any, end_reason: str, gone: bool) -> None:
        """The last batch, the usage, the money, the terminal state and the sandbox's next one: all of it or nothing."""
        execution, sandbox = self.execution, self.execution.sandbox
        assert sandbox is not None
        batch = self.journal.take()
        patience.write(self, batch)
        self.events += batch
        if sandbox.network_allow:
            egress.store(sandbox, self.went_out, execution)
            self.egress = list(execution.egress.order_by("pk"))
        price = 0
        if outcome == AttemptOutcome.LOST and (why := self._asked_to_cancel()) is not None:
            state, columns = E.CANCELLED, {"error_code": "cancelled", "error_value": why}
        if sandbox.kept:  # others may be billing it, or ending it
            (sandbox,) = _locked(sandbox.pk)
        if not sandbox.ended_at:
            began = execution.running_at or ended_at
            first = Usage.IDLE if sandbox.kept else Usage.BOOT
            price, fields = ledger.bill(
                sandbox, (first, began), (Usage.RUN, ended_at), execution=execution, final=bool(end_reason and gone)
            )
            fields["last_used_at"] = ended_at
            if end_reason:
                path = [S.RETIRING] if sandbox.state != S.RETIRING else []  # somebody may be ending it already
                path += [S.GONE] if gone else []
                fields["end_reason"] = sandbox.end_reason or end_reason
            else:
                path = []
            if path:
                sandbox.advance(*path, reason=end_reason, **fields)
            else:
                hot.change(sandbox, fields)
            execution.sandbox = sandbox
        j = self.journal
        execution.advance(
            state,
            ended_at=ended_at,
            cost_nano_usd=price,
            execution_count=j.execution_count,
            cpu_us=j.cpu_us,
            peak_memory_bytes=j.peak_memory_bytes,
            output_bytes=j.output_bytes,
            kept_said=self.kept_said,
            reason=columns.get("error_code", ""),
            **columns,
        )
        tried = execution.tried[-1]
        if tried.outcome == AttemptOutcome.OPEN:
            tried.outcome, tried.code, tried.ended_at = outcome, columns.get("error_code", ""), ended_at
            now_known = {"outcome": outcome, "code": tried.code, "ended_at": ended_at}
            hot.change(tried, now_known, by=("execution_id", "number"))
        faults.point("settling")

    def _asked_to_cancel(self) -> str | None:
        """The reason of a cancel that was written down by another process, e.g. one that ended the session."""
        asked = Execution.objects.filter(pk=self.execution.pk, cancel_requested_at__isnull=False)
        return asked.values_list("cancel_reason", flat=True).first()


async def kill(sandbox: Sandbox) -> bool:
    """Ask the backend to end the sandbox; False when it did not confirm."""
    backend = backends.get(sandbox.backend)
    try:
        with metrics.asking("kill", sandbox.backend):
            if sandbox.handle is None:
                return await backend.kill_by_id(sandbox.provider_name)
            return await backend.kill(sandbox.handle)
    except (BackendError, OSError, TimeoutError) as e:
        log.warning("kill_unconfirmed", extra={"sandbox_id": sandbox.pk, "error": str(e)})
        return False


__all__ = ["Run", "drain", "kill", "running", "spec_of", "start"]
