"""What a provider's plan allows is never exceeded; what is beyond it goes on along the route, or is told when to come back."""

import threading
from datetime import timedelta

import pytest
from django.db import connections, transaction
from django.utils import timezone

from executions import capacity, operations, pool
from executions.errors import NoBackend
from executions.hop import rows
from executions.models import BackendState, Sandbox
from executions.serializers import SessionRequest
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db


async def run(caller, code="#= 1", **fields):
    return await operations.execute(caller=caller, request=asks(code, **fields))


async def test_beyond_the_plans_concurrency_the_next_backend_takes_it_and_says_why(caller, behave):
    behave("first", CONCURRENCY=1)
    session = await operations.open_session(caller=caller, request=SessionRequest())

    shape = await run(caller)
    await operations.end_session(caller=caller, session_id=session.pk)
    after = await run(caller)

    assert (session.backend, shape.backend, after.backend) == ("first", "second", "first")
    assert shape.attempts[0].reason == "has 1 of the 1 sandboxes that its plan allows at once"


async def test_beyond_the_plans_pace_the_next_backend_takes_it_and_says_why(caller, behave):
    behave("first", CREATIONS_PER_SECOND=2)

    shapes = [await run(caller) for _ in range(3)]

    assert [shape.backend for shape in shapes] == ["first", "first", "second"]
    assert shapes[2].attempts[0].reason == "makes 2 sandboxes a second by its plan, and has just made as many"


async def test_a_second_later_the_pace_has_room_again(caller, behave):
    behave("first", CREATIONS_PER_SECOND=1)
    await run(caller)
    await rows(BackendState.objects.update, creations=[timezone.now().timestamp() - 1.01])

    assert (await run(caller)).backend == "first"


async def test_creations_that_a_clock_set_back_left_in_the_future_count_for_nothing(caller, behave):
    behave("first", CREATIONS_PER_SECOND=1)
    await run(caller)
    await rows(BackendState.objects.update, creations=[timezone.now().timestamp() + 3600])

    assert (await run(caller)).backend == "first"


async def test_with_no_other_backend_it_is_told_when_to_come_back(caller, behave):
    behave("first", CREATIONS_PER_SECOND=1)
    await run(caller, route=["first"])

    with pytest.raises(NoBackend, match="by its plan") as refused:
        await run(caller, route=["first"], max_wait_seconds=0)

    assert refused.value.facts["retry_after"] == 1


async def test_a_request_that_is_refused_otherwise_gives_its_creation_back(caller, behave):
    from executions.errors import BudgetExhausted
    from executions.models import Quota

    behave("first", CREATIONS_PER_SECOND=1)
    poor = await rows(Quota.objects.create, team=caller.team, unit="nano_usd", window="day", limit=1)
    with pytest.raises(BudgetExhausted):
        await run(caller)
    await rows(poor.delete)

    assert (await run(caller)).backend == "first"


async def test_a_fallback_that_is_full_is_left_out_too(caller, behave):
    behave("first", BEHAVES="never_boots")
    behave("second", CREATIONS_PER_SECOND=1)
    await run(caller, route=["second"])

    shape = await run(caller, route=["first", "second", "third"])

    assert [(a.backend, a.outcome) for a in shape.attempts] == [
        ("first", "unavailable"), ("second", "skipped"), ("third", "ran"),
    ]  # fmt: skip


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("options", [{"CONCURRENCY": 3}, {"CREATIONS_PER_SECOND": 3}], ids=["alive", "pace"])
def test_many_at_once_do_not_pass_it(caller, behave, seeded, options):
    behave("first", **options)
    together, outcomes = threading.Barrier(10), []

    def race() -> None:
        together.wait()
        try:
            with transaction.atomic():
                pool.intend(caller, alias="first", template=seeded, seconds=60)
            outcomes.append("made")
        except capacity.Full:
            outcomes.append("full")
        finally:
            connections.close_all()

    threads = [threading.Thread(target=race) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["full"] * 7 + ["made"] * 3
    assert Sandbox.objects.filter(backend="first", created_at__gte=timezone.now() - timedelta(minutes=1)).count() == 3
