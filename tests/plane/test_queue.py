"""What was left for whichever process is first, and what can run on one machine only."""

import asyncio
from datetime import timedelta

import pytest
import time_machine
from django.utils import timezone

from executions import backends, operations
from executions.backends import scripted
from executions.errors import Elsewhere
from executions.hop import rows
from executions.models import Agent, Event, Execution, Quota, Sandbox, Transition, Usage
from executions.operations import run, sessions, waiting
from executions.operations.reap import FAR_PATIENCE, close_stale, find_over
from executions.serializers import SessionRequest
from executions.states import ExecutionState, SandboxState, Unit
from tests.plane.conftest import asks
from tests.plane.test_quotas import race

E, S = ExecutionState, SandboxState


class Noded(scripted.ScriptedBackend):
    """A backend whose sandboxes live on one machine, as the local runtime's do."""

    has_node = True
    isolation = "namespaces"


def left(caller, code: str = "#= 1", **fields) -> Execution:
    return operations.submit(caller=caller, request=asks(code, **fields), later=True)


def found(execution: Execution) -> Execution:
    return Execution.objects.select_related("sandbox").get(pk=execution.pk)


async def ended(execution: Execution) -> Execution:
    """It, once whoever runs it here has come to its end."""
    if (here := run.running(execution.pk)) is not None and here.task is not None:  # else it has ended already
        await asyncio.wait_for(here.task, 20)
    return await rows(found, execution)


@pytest.mark.django_db
def test_it_is_admitted_with_all_that_it_needs_but_nobody_runs_it_yet(caller):
    Quota.objects.create(team=caller.team, unit=Unit.CONCURRENT_EXECUTIONS, limit=1, when_exhausted="wait")
    first, second = left(caller), left(caller)

    assert (first.state, first.is_unclaimed, first.sandbox.state) == (E.STARTING, True, S.BOOTING)
    assert first.sandbox.reserved_nano_usd > 0
    assert (second.state, second.sandbox) == (E.QUEUED, None)  # the first one counts as under way


@pytest.mark.django_db(transaction=True)
async def test_whichever_process_serves_the_queue_runs_it(caller):
    shape = await operations.execute(caller=caller, request=asks("#> hi\n#= 42"), wait_seconds=0)
    assert shape.state == "starting"
    serving = asyncio.create_task(waiting.serve())
    try:
        execution = await rows(Execution.objects.get, pk=shape.id)
        shape = await asyncio.wait_for(operations.wait(execution, None), 20)
    finally:
        serving.cancel()

    assert (shape.state, shape.results[0]["text/plain"]) == ("succeeded", "42")
    assert len(shape.attempts) == 1


@pytest.mark.django_db(transaction=True)
def test_of_many_processes_one_claims_it(caller):
    execution = left(caller)

    claims = race(8, lambda: waiting.claim(execution.pk))

    assert [claim.pk for claim in claims if claim] == [execution.pk]


@pytest.mark.django_db
def test_the_time_in_the_queue_is_not_billed_and_takes_nothing_of_its_lease(caller):
    execution = left(caller, timeout_seconds=20)
    with time_machine.travel(timezone.now() + timedelta(minutes=10)):
        claimed = waiting.claim(execution.pk)
        assert claimed
        lease = claimed.sandbox.leased_until - timezone.now()

    assert lease > timedelta(seconds=49)  # and thirty for boot and settling
    assert claimed.sandbox.metered_until == claimed.started_at
    assert not Usage.objects.exists()


@pytest.mark.django_db
def test_however_long_the_queue_is_nobody_takes_its_sandbox_away_before_it_was_asked_for(caller):
    left(caller, timeout_seconds=20)
    with time_machine.travel(timezone.now() + timedelta(minutes=10)):
        assert find_over() == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("late_seconds", [45, 600])
async def test_a_warm_sandbox_whose_time_has_run_meanwhile_is_followed_by_a_fresh_one(caller, late_seconds):
    execution = await rows(left, caller, timeout_seconds=20)
    warm = execution.sandbox
    await rows(warm.advance, S.LEASED, handle={"sandbox_id": warm.provider_name}, ready_at=timezone.now())  # of a pool

    with time_machine.travel(timezone.now() + timedelta(seconds=late_seconds)):
        await operations.reap()
        await waiting.look()
        after = await ended(execution)

    assert (after.state, after.sandbox_id != warm.pk) == (E.SUCCEEDED, True)
    tried = await rows(lambda: list(after.attempts.values_list("number", "outcome", "code")))
    assert tried == [(1, "unavailable", "backend_unavailable"), (2, "ran", "")]


@pytest.mark.django_db
def test_one_that_is_cancelled_before_anybody_took_it_gives_all_back(caller):
    budget = Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, limit=10**12)
    execution = left(caller)
    operations.request_cancel(execution=execution, reason="not needed")

    claimed, over = waiting._claim_left()

    execution = found(execution)
    budget.refresh_from_db()
    assert (claimed, [e.pk for e in over]) == ([], [execution.pk])
    assert (execution.state, execution.error_value, execution.sandbox.state) == (E.CANCELLED, "not needed", S.GONE)
    assert (budget.reserved, budget.used) == (0, 0)


@pytest.mark.django_db(transaction=True)
async def test_a_process_that_is_ending_takes_nothing_more(caller, monkeypatch):
    monkeypatch.setattr(waiting, "_ending", False)
    execution = await rows(left, caller)

    waiting.stop_taking()
    await waiting.look()

    assert (await rows(found, execution)).is_unclaimed


@pytest.mark.django_db(transaction=True)
async def test_weaker_walls_than_the_agents_take_nothing_though_it_was_admitted_elsewhere(caller, behave):
    execution = await rows(left, caller)
    await Agent.objects.aupdate(isolation_floor="microvm")
    backends.get(execution.sandbox.backend).isolation = "namespaces"

    await waiting.look()

    assert (await rows(found, execution)).is_unclaimed


@pytest.mark.django_db(transaction=True)
async def test_a_runner_that_dies_before_anything_ran_is_followed_by_another(caller):
    execution = await rows(left, caller)
    await rows(waiting.claim, execution.pk)  # and dies here
    await rows(Execution.objects.filter(pk=execution.pk).update, heartbeat_at=timezone.now() - timedelta(minutes=1))

    await operations.reap()
    assert (await rows(found, execution)).state == E.QUEUED
    await waiting.look()

    after = await ended(execution)
    path = await rows(
        lambda: list(Transition.objects.filter(execution=execution).order_by("pk").values_list("after", flat=True))
    )
    assert path == ["queued", "starting", "queued", "starting", "running", "succeeded"]
    assert after.state == E.SUCCEEDED
    tried = await rows(lambda: list(after.attempts.values_list("number", "outcome")))
    assert tried == [(1, "unavailable"), (2, "ran")]


@pytest.mark.django_db(transaction=True)
async def test_a_runner_that_was_only_slow_finds_that_another_has_it_and_runs_nothing(caller, behave):
    slow = behave("first", CREATE_SECONDS=1)
    slow.machines.clear()  # those of other tests
    execution = await rows(left, caller, "#> once\n#= 1")
    claimed = await rows(waiting.claim, execution.pk)
    assert claimed
    first = run.start(claimed)
    while not (await rows(found, execution)).heartbeat_at:
        await asyncio.sleep(0)
    await rows(close_stale, await rows(found, execution))  # it was thought to be dead
    run._runs.pop(execution.pk)
    await waiting.look()
    second = run.running(execution.pk)
    assert second
    assert second is not first
    await asyncio.wait_for(asyncio.gather(first.task, second.task), 20)

    after = await rows(found, execution)
    said = await rows(lambda: list(Event.objects.filter(execution=execution, kind="stdout")))
    assert after.state == E.SUCCEEDED
    assert len(said) == 1
    assert [sum(m.runs.values()) for m in slow.machines.values() if m.runs] == [1]
    await operations.reap()
    assert not [m for m in slow.machines.values() if m.alive]


# One machine only


@pytest.fixture
def two_machines(caller, settings):
    """Sandboxes of `first` live where they were made; the test says on which machine this process is."""
    settings.SANDBOXES = {"first": {"BACKEND": "tests.plane.test_queue.Noded", "OPTIONS": {}}}
    settings.NODE = "a"

    def be(name: str) -> None:
        settings.NODE = name

    return be


async def session_of_a(caller) -> Sandbox:
    return await operations.open_session(caller=caller, request=SessionRequest(timeout_seconds=600))


@pytest.mark.django_db(transaction=True)
async def test_code_for_a_session_is_run_by_a_process_on_its_machine(caller, two_machines):
    session = await session_of_a(caller)
    two_machines("b")

    execution = await rows(operations.submit, caller=caller, request=asks("#= 5", session_id=session.pk))
    assert execution.is_unclaimed
    assert await rows(waiting._claim_left) == ([], [])
    two_machines("a")
    await waiting.look()

    assert (await ended(execution)).state == E.SUCCEEDED


@pytest.mark.django_db(transaction=True)
async def test_when_no_process_there_takes_it_it_ends_and_says_so(caller, two_machines):
    session = await session_of_a(caller)
    two_machines("b")
    execution = await rows(operations.submit, caller=caller, request=asks(session_id=session.pk))

    with time_machine.travel(timezone.now() + timedelta(seconds=31)):
        await waiting.look()

    execution = await rows(found, execution)
    assert (execution.state, execution.error_code) == (E.ERRORED, "queue_timed_out")
    assert "machine a" in execution.error_value
    assert (await rows(Sandbox.objects.get, pk=session.pk)).state == S.LEASED


@pytest.mark.django_db(transaction=True)
async def test_what_must_reach_the_machine_itself_says_where_it_is(caller, two_machines):
    session = await session_of_a(caller)
    two_machines("b")
    asked = {"caller": caller, "session_id": session.pk}

    for verb in (
        operations.put_file(**asked, path="a.txt", data=b"1"),
        operations.list_files(**asked),
        operations.pause_session(**asked),
        operations.restart_session(**asked),
    ):
        with pytest.raises(Elsewhere, match="lives on machine a, and this is b"):
            await verb
    assert (await rows(Sandbox.objects.get, pk=session.pk)).state == S.LEASED


@pytest.mark.django_db(transaction=True)
async def test_its_end_and_a_later_end_are_written_down_and_done_on_its_machine(caller, two_machines):
    session = await session_of_a(caller)
    backend = backends.get("first")
    machine = backend.machines[session.provider_name]
    two_machines("b")
    before = machine.ends
    await operations.extend_session(caller=caller, session_id=session.pk, seconds=3600)
    await sessions.tell_ends()
    assert machine.ends == before
    two_machines("a")
    await sessions.tell_ends()
    assert machine.ends > before + 2000

    two_machines("b")
    await operations.end_session(caller=caller, session_id=session.pk)
    await operations.reap()
    assert (await rows(Sandbox.objects.get, pk=session.pk)).state == S.RETIRING
    assert machine.alive
    two_machines("a")
    await operations.reap()
    assert (await rows(Sandbox.objects.get, pk=session.pk)).state == S.GONE
    assert not machine.alive


@pytest.mark.django_db(transaction=True)
async def test_another_machines_sandboxes_are_left_alone_until_they_have_surely_ended(caller, two_machines):
    session = await session_of_a(caller)
    backends.get("first").machines.clear()  # this machine's node knows none of them
    two_machines("b")
    idle = timezone.now() - timedelta(hours=1)
    await rows(Sandbox.objects.filter(pk=session.pk).update, last_used_at=idle, ready_at=idle)

    await operations.reap()
    assert (await rows(Sandbox.objects.get, pk=session.pk)).state == S.LEASED
    with time_machine.travel(timezone.now() + timedelta(seconds=600) + FAR_PATIENCE + timedelta(seconds=1)):
        await operations.reap()

    session = await rows(Sandbox.objects.get, pk=session.pk)
    assert (session.state, session.end_reason, session.reserved_nano_usd) == (S.GONE, "expired", 0)
