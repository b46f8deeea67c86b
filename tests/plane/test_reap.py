"""After a process died on any line, the records are made true, and nothing is run twice."""

import asyncio
from datetime import timedelta

import pytest
from django.utils import timezone

from executions import operations
from executions.backends import scripted
from executions.backends.base import SandboxSpec
from executions.hop import rows
from executions.models import Attempt, Execution, Quota, Sandbox, Usage
from executions.operations import run as running
from executions.operations import sessions
from executions.operations.reap import STALE_BEATS, _ending
from executions.operations.run import spec_of
from executions.serializers import SessionRequest
from executions.states import ExecutionState, SandboxState, Unit, Window
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db


def machines(alias: str = "first"):
    return scripted._machines.setdefault(alias, {})


async def admitted(caller) -> Execution:
    return await rows(operations.submit, caller=caller, request=asks())


async def its_runner_dies(execution: Execution) -> None:
    """As far as the records show: the sign of life is a minute old."""
    old = timezone.now() - timedelta(minutes=1)
    await Execution.objects.filter(pk=execution.pk).aupdate(heartbeat_at=old)


async def test_a_runner_that_died_before_the_backend_was_asked_leaves_nothing(caller):
    budget = await Quota.objects.acreate(team=caller.team, unit=Unit.NANO_USD, window=Window.DAY, limit=10**12)
    execution = await admitted(caller)
    await its_runner_dies(execution)
    await Sandbox.objects.aupdate(created_at=timezone.now() - timedelta(minutes=2))

    await operations.reap()

    await execution.arefresh_from_db()
    sandbox = await Sandbox.objects.aget()
    assert (execution.state, execution.error_code) == (ExecutionState.ERRORED, "runner_lost")
    assert "before any code had run" in execution.error_value
    assert (sandbox.state, sandbox.end_reason, sandbox.reserved_nano_usd) == (SandboxState.GONE, "lost", 0)
    await budget.arefresh_from_db()
    assert budget.reserved == 0


async def test_a_runner_that_died_between_create_and_record_leaves_no_machine(caller):
    execution = await admitted(caller)
    await running.backends.get("first").create(spec_of(execution.sandbox))
    await its_runner_dies(execution)
    await Sandbox.objects.aupdate(created_at=timezone.now() - timedelta(minutes=2))

    await operations.reap()

    assert not machines()[execution.sandbox.provider_name].alive
    assert (await Sandbox.objects.aget()).state == SandboxState.GONE


async def test_a_runner_that_died_while_code_ran_has_errored_and_is_not_run_again(caller):
    execution = await admitted(caller)
    name = execution.sandbox.provider_name
    handle = await running.backends.get("first").create(spec_of(execution.sandbox))
    await rows(running.Run(execution)._mark_running, execution.sandbox, handle)
    await its_runner_dies(execution)

    await operations.reap()
    await operations.reap()

    await execution.arefresh_from_db()
    assert (execution.state, execution.error_code) == (ExecutionState.ERRORED, "runner_lost")
    assert "may have run in part" in execution.error_value
    assert (await Attempt.objects.aget()).outcome == "lost"
    assert not machines()[name].alive
    sandbox = await Sandbox.objects.aget()
    assert sandbox.state == SandboxState.GONE
    spent = [u.cost_nano_usd async for u in Usage.objects.all()]
    assert sum(spent) == sandbox.spent_nano_usd > 0


async def test_what_was_cancelled_before_its_runner_died_is_cancelled(caller):
    execution = await admitted(caller)
    await rows(operations.request_cancel, execution=execution, reason="enough")
    await its_runner_dies(execution)

    await operations.reap()

    await execution.arefresh_from_db()
    assert execution.state == ExecutionState.CANCELLED


async def test_what_runs_and_shows_signs_of_life_is_left_alone(caller):
    execution = await admitted(caller)

    assert await operations.reap() == 0

    await execution.arefresh_from_db()
    assert execution.state == ExecutionState.STARTING


async def test_a_session_ends_when_it_is_idle_or_its_time_is_over(caller):
    idle = await operations.open_session(caller=caller, request=SessionRequest())
    over = await operations.open_session(caller=caller, request=SessionRequest())
    live = await operations.open_session(caller=caller, request=SessionRequest())
    past = timezone.now() - timedelta(hours=1)
    await Sandbox.objects.filter(pk=idle.pk).aupdate(last_used_at=past)
    await Sandbox.objects.filter(pk=over.pk).aupdate(leased_until=past)

    await operations.reap()

    ends = {s.pk: (s.state, s.end_reason) async for s in Sandbox.objects.all()}
    assert ends == {
        idle.pk: (SandboxState.GONE, "idle"),
        over.pk: (SandboxState.GONE, "expired"),
        live.pk: (SandboxState.LEASED, ""),
    }


async def test_a_kill_is_asked_for_again_until_it_is_confirmed(caller, behave):
    behave("first", BEHAVES="loses_kills")
    await operations.execute(caller=caller, request=asks())
    assert await operations.reap() == 0
    behave("first")

    assert await operations.reap() == 1

    sandbox = await Sandbox.objects.aget()
    assert (sandbox.state, sandbox.end_reason, sandbox.reserved_nano_usd) == (SandboxState.GONE, "finished", 0)


async def test_a_kill_that_is_not_answered_holds_up_no_other_and_is_asked_for_once(caller, behave, monkeypatch):
    behave("first", BEHAVES="loses_kills")
    for _ in range(2):
        await operations.execute(caller=caller, request=asks())
    hangs, other = [sandbox async for sandbox in Sandbox.objects.order_by("pk")]
    behave("first")
    asked, answer, kill = [], asyncio.Event(), scripted.ScriptedBackend.kill

    async def slowly(self, handle):
        asked.append(handle["sandbox_id"])
        if handle["sandbox_id"] == hangs.provider_name:
            await answer.wait()
        return await kill(self, handle)

    monkeypatch.setattr(scripted.ScriptedBackend, "kill", slowly)
    async with asyncio.timeout(60):
        while await Sandbox.objects.filter(pk=other.pk, ended_at=None).aexists():
            await operations.reap(orphans=False, patience_seconds=0)
    assert await operations.reap(orphans=False, patience_seconds=0) == 0

    assert sorted(asked) == sorted([hangs.provider_name, other.provider_name])
    answer.set()
    await asyncio.wait(list(_ending.values()))
    assert (await Sandbox.objects.aget(pk=hangs.pk)).state == SandboxState.GONE


async def test_a_session_whose_process_died_while_it_was_made_does_not_wait_for_the_longest_boot(caller, settings):
    session, _, _ = await rows(sessions._intend, caller, SessionRequest(), None)
    await running.backends.get("first").create(spec_of(session))
    silent = timezone.now() - timedelta(seconds=settings.HEARTBEAT_SECONDS * STALE_BEATS + 1)
    await Sandbox.objects.aupdate(last_used_at=silent)

    await operations.reap(orphans=False)

    assert not machines()[session.provider_name].alive
    assert (await Sandbox.objects.aget()).end_reason == "lost"


async def test_a_session_that_is_slowly_made_shows_signs_of_life_meanwhile(caller, monkeypatch, settings):
    settings.HEARTBEAT_SECONDS = 0.05
    made, create = asyncio.Event(), scripted.ScriptedBackend.create

    async def slowly(self, spec):
        await made.wait()
        return await create(self, spec)

    monkeypatch.setattr(scripted.ScriptedBackend, "create", slowly)
    opening = asyncio.create_task(operations.open_session(caller=caller, request=SessionRequest()))
    async with asyncio.timeout(60):
        while not await Sandbox.objects.aexists():
            await asyncio.sleep(0.01)
        began = timezone.now()
        while not await Sandbox.objects.filter(last_used_at__gt=began).aexists():
            await asyncio.sleep(0.01)
        made.set()

        assert (await opening).state == SandboxState.LEASED


async def test_a_machine_whose_row_is_gone_is_killed_and_a_strangers_is_not(caller):
    await operations.execute(caller=caller, request=asks())
    sandbox = await Sandbox.objects.aget()
    backend = running.backends.get("first")
    await backend.create(SandboxSpec(sandbox.provider_name, "default", 600))
    await backend.create(SandboxSpec("sbx01somebodyelses", "default", 600))

    assert await operations.reap() == 1

    assert not machines()[sandbox.provider_name].alive
    assert machines()["sbx01somebodyelses"].alive


async def test_a_boot_whose_runner_died_does_not_wait_for_the_longest_boot(caller):
    execution = await admitted(caller)
    await running.backends.get("first").create(spec_of(execution.sandbox))
    await its_runner_dies(execution)

    await operations.reap()

    assert not machines()[execution.sandbox.provider_name].alive
    assert (await Sandbox.objects.aget()).state == SandboxState.GONE


async def test_a_session_that_its_backend_has_lost_is_closed(caller, monkeypatch):
    lost = await operations.open_session(caller=caller, request=SessionRequest())
    paused = await operations.open_session(caller=caller, request=SessionRequest())
    live = await operations.open_session(caller=caller, request=SessionRequest())
    await operations.pause_session(caller=caller, session_id=paused.pk)
    await Sandbox.objects.aupdate(ready_at=timezone.now() - timedelta(minutes=1))
    for session in (lost, paused):
        machines()[session.provider_name].end("vanished")

    await operations.reap()

    ends = {s.pk: (s.state, s.end_reason) async for s in Sandbox.objects.all()}
    assert ends == {
        lost.pk: (SandboxState.GONE, "lost"),
        paused.pk: (SandboxState.GONE, "lost"),
        live.pk: (SandboxState.LEASED, ""),
    }


async def test_a_session_that_was_lost_as_soon_as_it_was_made_is_closed_in_the_first_round(caller):
    lost = await operations.open_session(caller=caller, request=SessionRequest())
    machines()[lost.provider_name].end("vanished")

    await operations.reap()

    assert (await Sandbox.objects.aget()).end_reason == "lost"


async def test_a_session_whose_run_lost_its_runner_is_asked_whether_it_is_there(caller):
    lost = await operations.open_session(caller=caller, request=SessionRequest())
    live = await operations.open_session(caller=caller, request=SessionRequest())
    for session in (lost, live):
        run = await rows(operations.submit, caller=caller, request=asks(session_id=session.pk))
        await its_runner_dies(run)
    machines()[lost.provider_name].end("vanished")

    await operations.reap(orphans=False)

    ends = {s.pk: s.state async for s in Sandbox.objects.all()}
    assert ends == {lost.pk: SandboxState.GONE, live.pk: SandboxState.LEASED}


async def test_a_session_that_is_not_listed_but_answers_is_left_alone(caller, monkeypatch):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    await Sandbox.objects.aupdate(ready_at=timezone.now() - timedelta(minutes=1))

    async def nothing(self):
        return []

    monkeypatch.setattr(scripted.ScriptedBackend, "list", nothing)
    await operations.reap()

    assert (await Sandbox.objects.aget(pk=session.pk)).state == SandboxState.LEASED


async def test_an_execution_that_still_waits_for_a_sandbox_does_not_hide_those_that_are_over(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    waits = await admitted(caller)
    await Execution.objects.filter(pk=waits.pk).aupdate(sandbox=None)
    await Sandbox.objects.filter(pk=session.pk).aupdate(last_used_at=timezone.now() - timedelta(hours=1))

    await operations.reap()

    assert (await Sandbox.objects.aget(pk=session.pk)).end_reason == "idle"
