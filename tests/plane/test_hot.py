"""The statements written as SQL give what the ORM gives, and the planner finds the small index."""

import re
from copy import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from asgiref.sync import async_to_sync
from django.db import connection
from django.db.models import Q
from django.utils import timezone

from executions import keys, operations, quotas
from executions.models import (
    ApiKey,
    Attempt,
    Event,
    Execution,
    LedgerEntry,
    Quota,
    Rate,
    Sandbox,
    Transition,
    Usage,
    hot,
    new_id,
)
from executions.states import ExecutionState
from tests.plane.conftest import asks

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.django_db
@pytest.mark.parametrize("model", [Execution, Sandbox, Transition, Attempt, Event, Usage, LedgerEntry])
def test_a_row_is_inserted_as_the_orm_inserts_it(caller, model):
    async_to_sync(operations.execute)(caller=caller, request=asks("#> é\n#= 1", metadata={"a": "b"}, env={"A": "1"}))
    twin = model.objects.order_by("pk").last()
    expected = model.objects.filter(pk=twin.pk).values().get()
    model._base_manager.filter(pk=twin.pk)._raw_delete("default") if model not in (Execution, Sandbox) else None
    if model in (Execution, Sandbox):
        twin.pk = expected["id"] = new_id("twin")
    hot.insert([twin])

    found = model.objects.order_by("pk").last() if model not in (Execution, Sandbox) else model.objects.get(pk=twin.pk)
    stored = model.objects.filter(pk=found.pk).values().get()
    if model not in (Execution, Sandbox):  # the database numbered it anew
        stored.pop("id"), expected.pop("id")
    assert stored == expected


@pytest.mark.django_db
def test_a_row_is_moved_from_the_state_it_is_in_and_from_no_other(caller):
    execution = operations.submit(caller=caller, request=asks())
    fields = {"state": ExecutionState.RUNNING, "running_at": NOW, "metadata": {"x": [1]}, "error_value": ""}

    assert not hot.move(execution, ExecutionState.QUEUED, fields)
    assert hot.move(execution, ExecutionState.STARTING, fields)

    stored = Execution.objects.filter(pk=execution.pk).values("state", "running_at", "metadata", "error_value").get()
    assert stored == {"state": "running", "running_at": NOW, "metadata": {"x": [1]}, "error_value": ""}


@pytest.mark.django_db
def test_a_compiled_query_gives_what_the_orm_gives(caller, team):
    Quota.objects.create(unit="executions", window="total", limit=1)
    Quota.objects.create(team=team, unit="executions", window="day", limit=2)
    Quota.objects.create(agent=caller.agent, unit="nano_usd", window="month", limit=3)
    token = keys.make_key(team=team, agent=caller.agent, name="n", scopes=["run"], expires_at=NOW + timedelta(999))[1]
    stored = ApiKey.objects.select_related("team", "agent__template").get(name="n")

    read = keys.authenticate(token).key
    for field in ("pk", "scopes", "expires_at", "created_at", "digest", "revoked_at"):
        assert getattr(read, field) == getattr(stored, field)
    assert read.agent.template == stored.agent.template
    assert (read.agent.route, read.agent.created_at) == (stored.agent.route, stored.agent.created_at)
    assert vars(read.team).keys() == vars(stored.team).keys()
    found = [(q.limit, q.window_started_at, q.team, q.agent, q.key) for q in quotas.of(caller)]
    assert found == [(q.limit, q.window_started_at, q.team, q.agent, q.key) for q in Quota.objects.order_by("id")]
    assert quotas.of(replace(caller, agent=None, key=None))[-1].limit == 2


@pytest.mark.django_db
def test_a_quota_is_taken_to_its_limit_and_not_beyond(caller):
    quota = Quota.objects.create(team=caller.team, unit="executions", window="total", limit=10, used=3, reserved=2)

    assert not hot.take(quota.pk, "used", 6, timezone.now())
    assert hot.take(quota.pk, "reserved", 5, timezone.now())
    assert not hot.take(quota.pk, "used", 1, timezone.now())
    hot.settle(quota.pk, release=7, spend=4)

    quota.refresh_from_db()
    assert (quota.used, quota.reserved) == (7, 0)


@pytest.mark.django_db
@pytest.mark.parametrize("scope", ["team", "agent", "key", None])
def test_open_rows_are_counted_as_the_orm_counts_them(caller, eve, scope):
    for _ in range(3):
        operations.submit(caller=caller, request=asks())
    Execution.objects.first().advance(ExecutionState.CANCELLED)

    for table, model, expected in (("execution", Execution, 2), ("sandbox", Sandbox, 3)):
        owner = {f"{scope}_id": getattr(caller, scope).pk} if scope else {}
        twin = model.objects.open().filter(**owner).count()
        assert hot.count_open(table, owner) == twin == expected
        assert hot.count_open(table, {f"{scope or 'team'}_id": "nobody"}) == 0


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
@pytest.mark.parametrize("model", [Execution, Sandbox])
def test_counting_open_rows_reads_the_open_ones_only(caller, model):
    async_to_sync(operations.execute)(caller=caller, request=asks())
    ended = model.objects.get()
    rows = []
    for _ in range(500):  # history, as an old installation has it
        rows.append(copy(ended))
        rows[-1].pk = new_id("old")
    model.objects.bulk_create(rows)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("ANALYZE")
            cursor.execute("SET LOCAL enable_seqscan = off")  # 500 rows are few
        for scope in ("team", "agent", "key"):
            explain = "EXPLAIN QUERY PLAN" if connection.vendor == "sqlite" else "EXPLAIN"
            owner = getattr(caller, scope).pk
            table = model._meta.db_table
            cursor.execute(
                f"{explain} SELECT COUNT(*) FROM {table} WHERE ended_at IS NULL AND {scope}_id = %s", [owner]
            )
            plan = " ".join(str(row) for row in cursor.fetchall())

            assert f"{table.removeprefix('executions_')}_open" in plan, plan


HISTORY = "execution|sandbox|transition|event|usage|ledgerentry|attempt"
OPEN = r"\w*_open\w*|\w*_waiting|usage_not_counted|sqlite_autoindex_\w+_1|\w+_pkey|INTEGER PRIMARY KEY|\w+_once|\w+_id_[0-9a-f]{8}\w*"


def plans(act) -> list[str]:
    """How the database reads each SELECT that `act` sends, parameters bound as they are bound there."""
    asked: list[tuple[str, tuple]] = []

    def note(execute, sql, params, many, context):
        asked.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        act()
    explain = "EXPLAIN QUERY PLAN" if connection.vendor == "sqlite" else "EXPLAIN"
    found = []
    with connection.cursor() as cursor:
        for sql, params in asked:
            if sql.startswith("SELECT"):
                cursor.execute(f"{explain} {sql}", params)
                found += [f"{row[-1]}" for row in cursor.fetchall()]
    return found


def reads_history(line: str) -> bool:
    """Whether a step of a plan goes through rows that have ended long ago."""
    if connection.vendor == "sqlite":
        read = re.search(
            rf"(SCAN|SEARCH) (?:executions_(?:{HISTORY})|U\d+)\b(?: USING (?:COVERING )?(?:INDEX )?(.*))?", line
        )
        return bool(read) and not re.match(OPEN, read[2] or "")
    read = re.search(rf"Scan.* on executions_(?:{HISTORY})\b", line)
    return bool(read) and not re.search(rf"using ({OPEN}) on|Bitmap", line)


@pytest.mark.django_db
def test_the_rounds_of_the_background_read_nothing_that_has_ended(caller):
    from tests.bench.million import rounds

    async_to_sync(operations.execute)(caller=caller, request=asks())
    history(500)

    found = {name: [line for line in plans(round_) if reads_history(line)] for name, round_ in rounds().items()}

    assert {name: lines for name, lines in found.items() if lines} == {}


def history(count: int) -> None:
    """What an old installation has of ended rows."""
    for model in (Sandbox, Execution):
        ended = model.objects.get()
        rows = []
        for _ in range(count):
            rows.append(copy(ended))
            rows[-1].pk = new_id("old")
        model.objects.bulk_create(rows)
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
            cursor.execute("SET LOCAL enable_seqscan = off")  # 500 rows are few
