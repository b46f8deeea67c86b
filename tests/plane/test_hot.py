"""The statements written as SQL give what the ORM gives, and the planner finds the small index."""

from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.db.models import Q

from executions import operations
from executions.models import Execution, Rate, Sandbox, Transition, hot
from executions.states import ExecutionState
from tests.plane.conftest import asks

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.django_db
def test_transitions_are_what_the_orm_would_have_stored(caller):
    execution = operations.submit(caller=caller, request=asks())
    Transition.objects.all().delete()
    Transition.objects.create(execution=execution, before="queued", after="starting", reason="x", at=NOW)
    hot.insert_transitions("execution", execution.pk, [("queued", "starting")], "x", NOW)

    twin, ours = Transition.objects.order_by("id").values("execution", "sandbox", "before", "after", "reason", "at")
    assert twin == ours


@pytest.mark.django_db
@pytest.mark.parametrize("scope", ["team", "agent", "key", None])
def test_open_rows_are_counted_as_the_orm_counts_them(caller, eve, scope):
    for _ in range(3):
        operations.submit(caller=caller, request=asks())
    Execution.objects.first().advance(ExecutionState.CANCELLED)

    for table, model, expected in (("execution", Execution, 2), ("sandbox", Sandbox, 3)):
        owner = getattr(caller, scope).pk if scope else None
        twin = model.objects.open().filter(**({f"{scope}_id": owner} if scope else {})).count()
        assert hot.count_open(table, scope, owner) == twin == expected
        assert hot.count_open(table, scope or "team", "nobody") == 0


@pytest.mark.django_db
def test_the_price_is_the_youngest_of_those_that_are_valid():
    def price(nano_usd, start, end=None):
        Rate.objects.create(
            backend="b", meter=Rate.VCPU, nano_usd=nano_usd, valid_from=NOW + start, valid_to=end and NOW + end
        )

    day = timedelta(days=1)
    price(1, -9 * day), price(2, -5 * day), price(3, -2 * day, -day), price(4, day)

    valid = Rate.objects.filter(backend="b", valid_from__lte=NOW).filter(Q(valid_to=None) | Q(valid_to__gt=NOW))
    assert (
        hot.prices("b", NOW)
        == dict(valid.order_by("valid_from").values_list("meter", "nano_usd"))
        == {"vcpu_second": 2}
    )


@pytest.mark.django_db
@pytest.mark.parametrize("table", ["executions_execution", "executions_sandbox"])
@pytest.mark.parametrize("column", ["team_id", "agent_id", "key_id"])
def test_counting_open_rows_reads_the_open_ones_only(table, column):
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":  # an empty table would be scanned whatever its indexes
            cursor.execute("SET LOCAL enable_seqscan = off")
        explain = "EXPLAIN QUERY PLAN" if connection.vendor == "sqlite" else "EXPLAIN"
        cursor.execute(f"{explain} SELECT COUNT(*) FROM {table} WHERE ended_at IS NULL AND {column} = 'x'")
        plan = " ".join(str(row) for row in cursor.fetchall())

    assert f"{table.removeprefix('executions_')}_open" in plan, plan
