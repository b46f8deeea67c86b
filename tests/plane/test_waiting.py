"""What there is no room for waits its turn, where its quota or its backend's plan says so."""

import asyncio
import itertools
from dataclasses import replace
from datetime import timedelta

import pytest
import time_machine
from django.db import transaction
from django.utils import timezone

from executions import ledger, operations, quotas
from executions.errors import NoBackend, QueueFull, QuotaExceeded
from executions.models import Agent, Execution, Quota, Sandbox, Transition
from executions.operations import batch, waiting
from executions.operations.submit import begin
from executions.states import ExecutionState, Unit, WhenExhausted
from tests.plane.conftest import asks
from tests.plane.test_quotas import race

E = ExecutionState


def one_at_a_time(caller, limit=1, **fields) -> Quota:
    fields.setdefault("when_exhausted", WhenExhausted.WAIT)
    return Quota.objects.create(team=caller.team, unit=Unit.CONCURRENT_EXECUTIONS, limit=limit, **fields)


def end(execution: Execution) -> None:
    execution.advance(E.CANCELLED)


@pytest.mark.django_db
def test_what_waits_holds_no_sandbox_and_no_money_and_does_not_count(caller):
    quota = one_at_a_time(caller)
    first = operations.submit(caller=caller, request=asks())
    second = operations.submit(caller=caller, request=asks())

    assert (first.state, second.state) == (E.STARTING, E.QUEUED)
    assert second.sandbox is None
    assert not second.attempts.exists()
    assert quotas.in_use(quota) == 1
    assert second.waits_for.startswith("team")
    assert "is at 1 of 1 concurrent executions" in second.waits_for


@pytest.mark.django_db(transaction=True)
def test_it_is_started_when_there_is_room_with_all_that_it_asked_for(caller):
    one_at_a_time(caller)
    first = operations.submit(caller=caller, request=asks())
    asked = asks("print(1)", route=["second"], timeout_seconds=7, user="ann")
    second = operations.submit(caller=caller, request=asked)

    assert waiting._next_ones() == ([], [], 1)
    end(first)
    started, ended, left = waiting._next_ones()

    assert [e.pk for e in started] == [second.pk]
    assert not ended
    assert not left
    second = Execution.objects.get(pk=second.pk)
    assert (second.state, second.backend, second.timeout_seconds, second.user) == (E.STARTING, "second", 7, "ann")
    assert second.sandbox
    assert second.sandbox.reserved_nano_usd >= 0
    assert second.attempts.get().backend == "second"
    path = Transition.objects.filter(execution=second).order_by("pk").values_list("after", flat=True)
    assert list(path) == ["queued", "starting"]


@pytest.mark.django_db(transaction=True)
async def test_a_caller_that_waits_hears_the_result_as_if_nothing_had_been(caller):
    from executions.hop import rows

    await rows(one_at_a_time, caller)
    first = await rows(operations.submit, caller=caller, request=asks())
    serving = asyncio.create_task(waiting.serve())
    try:
        answer = asyncio.create_task(operations.execute(caller=caller, request=asks("#= 42")))
        while not await rows(Execution.objects.filter(state=E.QUEUED).exists):
            await asyncio.sleep(0.01)
        await rows(end, first)
        waiting.nudge()
        shape = await asyncio.wait_for(answer, 10)
    finally:
        serving.cancel()
    assert shape.state == "succeeded"
    assert shape.results[0]["text/plain"] == "42"
    assert shape.usage.queue_seconds > 0


@pytest.mark.django_db
@pytest.mark.parametrize("when", [WhenExhausted.REFUSE, WhenExhausted.WAIT])
def test_a_quota_that_refuses_refuses_and_a_caller_may_decline_to_wait(caller, when):
    one_at_a_time(caller, when_exhausted=when)
    operations.submit(caller=caller, request=asks())

    with pytest.raises(QuotaExceeded):
        operations.submit(caller=caller, request=asks(max_wait_seconds=0))
    assert Execution.objects.count() == 1


@pytest.mark.django_db
def test_the_queue_is_bounded(caller, settings):
    settings.QUEUE_LENGTH = 1
    one_at_a_time(caller)
    for _ in range(2):
        operations.submit(caller=caller, request=asks())

    with pytest.raises(QueueFull):
        operations.submit(caller=caller, request=asks())


@pytest.mark.django_db
def test_turns_are_fair_among_agents_and_by_age_within_one(caller, settings):
    quota = one_at_a_time(caller, limit=3)
    other = Agent.objects.create(team=caller.team, name="other", route=["first"])
    for _ in range(3):
        operations.submit(caller=caller, request=asks())
    quota.limit = 0
    quota.save()
    mine = [operations.submit(caller=caller, request=asks()).pk for _ in range(4)]
    theirs = [operations.submit(caller=replace(caller, agent=other, key=None), request=asks()).pk for _ in range(4)]

    turns = [e.pk for e in waiting.in_turn(list(waiting._waiting()))]
    # mine has three under way already, so the other's first three come first
    assert turns[:3] == theirs[:3]
    assert turns[3:] in ([mine[0], theirs[3], *mine[1:]], [theirs[3], *mine])
    assert waiting.position(Execution.objects.get(pk=theirs[0])) == 1


@pytest.mark.django_db(transaction=True)
def test_a_crowd_that_came_first_gets_every_other_turn_not_all_of_them(caller, monkeypatch):
    monkeypatch.setattr(waiting, "SEEN_AT_ONCE", 4)  # fewer than the crowd has waiting
    one_at_a_time(caller)
    other = replace(caller, agent=Agent.objects.create(team=caller.team, name="other", route=["first"]), key=None)
    running = operations.submit(caller=caller, request=asks())
    crowd = [operations.submit(caller=caller, request=asks()).pk for _ in range(6)]
    late = [operations.submit(caller=other, request=asks()).pk for _ in range(3)]

    started = []
    for _ in crowd:
        end(running)
        ((running,), _, _) = waiting._next_ones()
        started.append(running.pk)

    assert started == [late[0], crowd[0], late[1], crowd[1], late[2], crowd[2]]


@pytest.mark.django_db(transaction=True)
def test_a_place_that_comes_free_in_the_midst_of_a_round_is_for_the_one_whose_turn_it_was(caller, monkeypatch):
    one_at_a_time(caller)
    other = replace(caller, agent=Agent.objects.create(team=caller.team, name="other", route=["first"]), key=None)
    running = [operations.submit(caller=caller, request=asks())]
    waits = [operations.submit(caller=who, request=asks()).pk for who in (other, caller)]

    def begun(execution_id, turned_away):
        try:
            return begin(execution_id, turned_away)
        finally:
            for execution in [running.pop()] if running else []:
                end(execution)

    monkeypatch.setattr(waiting, "begin", begun)
    assert waiting._next_ones() == ([], [], 2)
    assert [e.pk for e in waiting._next_ones()[0]] == waits[:1]


@pytest.mark.django_db(transaction=True)
def test_whoever_comes_when_a_place_is_free_leaves_it_to_those_who_wait(caller):
    quota = one_at_a_time(caller, limit=2)
    running = [operations.submit(caller=caller, request=asks()) for _ in range(2)]
    first = operations.submit(caller=caller, request=asks())
    end(running[0])

    second = operations.submit(caller=caller, request=asks())
    ((begun,), _, left) = waiting._next_ones()

    assert second.state == E.QUEUED
    assert second.waits_for == "1 waits already for team Engines, concurrent executions."
    assert (begun.pk, left) == (first.pk, 1)
    quota.limit = 4  # enough for all
    quota.save()
    assert operations.submit(caller=caller, request=asks()).state == E.STARTING


@pytest.mark.django_db
def test_one_that_has_waited_too_long_ends_with_the_reason(caller):
    one_at_a_time(caller, max_wait_seconds=30)
    operations.submit(caller=caller, request=asks())
    late = operations.submit(caller=caller, request=asks())

    with time_machine.travel(timezone.now() + timedelta(seconds=31)):
        _, ended, left = waiting._next_ones()

    late = Execution.objects.get(pk=late.pk)
    assert [e.pk for e in ended] == [late.pk]
    assert not left
    assert (late.state, late.error_code) == (E.ERRORED, "queue_timed_out")
    assert "is at 1 of 1" in late.error_value


@pytest.mark.django_db
def test_one_that_is_cancelled_while_it_waits_never_starts(caller):
    one_at_a_time(caller)
    first = operations.submit(caller=caller, request=asks())
    second = operations.submit(caller=caller, request=asks())
    operations.request_cancel(execution=second, reason="not needed")
    end(first)

    waiting._next_ones()

    second = Execution.objects.get(pk=second.pk)
    assert (second.state, second.error_value, second.sandbox) == (E.CANCELLED, "not needed", None)


@pytest.mark.django_db
def test_one_whose_budget_has_gone_meanwhile_ends_with_that_refusal(caller):
    one_at_a_time(caller)
    first = operations.submit(caller=caller, request=asks())
    operations.submit(caller=caller, request=asks())
    Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=0)
    end(first)

    _, ended, _ = waiting._next_ones()

    assert [e.error_code for e in ended] == ["quota_exceeded"]


@pytest.mark.django_db
def test_two_processes_never_start_one_twice(caller):
    one_at_a_time(caller)
    first = operations.submit(caller=caller, request=asks())
    second = operations.submit(caller=caller, request=asks())
    end(first)

    assert begin(second.pk) == second
    assert begin(second.pk) is None


@pytest.mark.django_db
def test_a_full_plan_lets_wait_where_no_other_backend_has_room(caller, behave):
    behave("first", CONCURRENCY=1)
    operations.submit(caller=caller, request=asks(route=["first"]))

    second = operations.submit(caller=caller, request=asks(route=["first"]))

    assert second.waits
    assert "1 of the 1 sandboxes that its plan allows" in second.waits_for
    with pytest.raises(NoBackend):
        operations.submit(caller=caller, request=asks(route=["first"], max_wait_seconds=0))


@pytest.mark.django_db
def test_where_a_quota_says_so_it_runs_on_this_machine_instead(caller, behave, settings):
    Quota.objects.create(
        team=caller.team, unit=Unit.EXECUTIONS, limit=0, backend="first", when_exhausted=WhenExhausted.LOCAL
    )
    settings.SANDBOXES = {
        **settings.SANDBOXES,
        "here": {"BACKEND": "executions.backends.local.LocalBackend", "OPTIONS": {"RUN_DIR": "/nonexistent"}},
    }
    # creations are counted where a sandbox is made: there the narrowed quota is found
    execution = operations.submit(caller=caller, request=asks())

    assert execution.backend == "here"


@pytest.mark.django_db
def test_a_raise_holds_until_it_ends(caller):
    later = timezone.now() + timedelta(hours=1)
    Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=1, raised_by=1, raised_until=later)
    for _ in range(2):
        operations.submit(caller=caller, request=asks())
    with pytest.raises(QuotaExceeded) as refused:
        operations.submit(caller=caller, request=asks())
    assert refused.value.facts["limit"] == 2


@pytest.mark.django_db
@pytest.mark.parametrize("narrow", [{"user": "ann"}, {"workflow": "w"}])
def test_a_quota_may_govern_one_end_user_or_workflow_only(caller, narrow):
    Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=1, **narrow)
    Quota.objects.create(team=caller.team, unit=Unit.CONCURRENT_EXECUTIONS, limit=1, **narrow)
    operations.submit(caller=caller, request=asks(**narrow))
    operations.submit(caller=caller, request=asks())
    with pytest.raises(QuotaExceeded):
        operations.submit(caller=caller, request=asks(**narrow))


@pytest.mark.django_db
def test_compute_time_counts_what_the_living_may_still_use(caller):
    quota = Quota.objects.create(team=caller.team, unit=Unit.COMPUTE_US, limit=100 * 1_000_000)
    operations.submit(caller=caller, request=asks(timeout_seconds=50))  # and 30 s for boot and settling

    with pytest.raises(QuotaExceeded) as refused:
        operations.submit(caller=caller, request=asks(timeout_seconds=10))
    assert refused.value.facts["needed"] == 40_000_000
    assert 79_000_000 <= refused.value.facts["reserved"] <= 80_000_000
    assert 79_000_000 <= quotas.reserved(quota) <= 80_000_000


@pytest.mark.django_db
def test_an_agent_without_room_does_not_hold_up_another(caller):
    busy = Agent.objects.create(team=caller.team, name="busy", route=["first"])
    theirs = replace(caller, agent=busy, key=None)
    for _ in range(5):
        operations.submit(caller=theirs, request=asks())
    Quota.objects.create(
        agent=caller.agent, unit=Unit.CONCURRENT_EXECUTIONS, limit=0, when_exhausted=WhenExhausted.WAIT
    )
    full = Quota.objects.create(agent=busy, unit=Unit.CONCURRENT_EXECUTIONS, limit=5, when_exhausted=WhenExhausted.WAIT)
    for _ in range(60):  # they have fewer under way: their turn is always before the other's
        operations.submit(caller=caller, request=asks())
    waits = operations.submit(caller=theirs, request=asks())
    full.limit = 6
    full.save()

    started, _, left = waiting._next_ones()

    assert [e.pk for e in started] == [waits.pk]
    assert left == 60


@pytest.mark.django_db
@pytest.mark.parametrize("gone", ["key", "agent"])
def test_one_whose_key_or_agent_was_switched_off_meanwhile_never_starts(caller, gone):
    one_at_a_time(caller)
    first = operations.submit(caller=caller, request=asks())
    operations.submit(caller=caller, request=asks())
    if gone == "key":
        type(caller.key).objects.update(revoked_at=timezone.now())
    else:
        Agent.objects.update(is_active=False)
    end(first)

    started, ended, _ = waiting._next_ones()

    assert not started
    assert [(e.state, e.error_code) for e in ended] == [(E.ERRORED, "forbidden")]


@pytest.mark.django_db(transaction=True)
def test_twins_that_both_have_to_wait_are_one(caller):
    one_at_a_time(caller)
    operations.submit(caller=caller, request=asks())

    twins = race(6, lambda: operations.submit(caller=caller, request=asks(), idempotency_key="once"))

    assert {getattr(twin, "pk", twin) for twin in twins} == {Execution.objects.get(state=E.QUEUED).pk}
    assert sum(not twin.replayed for twin in twins) == 1


@pytest.mark.django_db(transaction=True)
def test_bills_and_admissions_never_wait_for_each_other_in_a_circle(caller):
    """The budget has the lower id here: whoever booked time first and money then would meet an admission head on."""
    budget = Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, limit=10**15)
    quota = Quota.objects.create(team=caller.team, unit=Unit.COMPUTE_US, limit=10**15)

    def one() -> bool:
        execution = operations.submit(caller=caller, request=asks())
        with transaction.atomic():
            sandbox = Sandbox.objects.select_for_update().get(pk=execution.sandbox_id)
            ledger.bill(sandbox, ("run", sandbox.created_at + timedelta(seconds=2)), final=True)
        return True

    results = race(8, lambda: [one() for _ in range(5)])

    assert results == [[True] * 5] * 8
    for row in (quota, budget):
        row.refresh_from_db()
    assert quota.used == 40 * 2_000_000
    assert budget.reserved == 0
    assert budget.used == 40 * 2 * 100_000


@pytest.mark.django_db(transaction=True)
def test_batches_that_name_the_same_users_in_another_order_never_wait_for_each_other_in_a_circle(caller):
    Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, window="day", limit=10**6, each="user")
    users, turn = [f"u{n}" for n in range(6)], itertools.count()

    def one() -> bool:
        named = users if next(turn) % 2 else users[::-1]
        batch._submit_all(caller, [asks(user=user) for user in named], None)
        return True

    assert race(8, lambda: [one() for _ in range(3)]) == [[True] * 3] * 8
    assert set(Quota.objects.exclude(parent=None).values_list("used", flat=True)) == {24}
