"""What people and programs look at costs the same with ten times the history behind it: the databases' own work is counted."""

import base64
import json
import re
from copy import copy
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.core.cache import cache
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from executions import newest, operations
from executions.admin import base, first_page, runs
from executions.models import Attempt, Event, Execution, LedgerEntry, Sandbox, Transition, Usage, new_id
from executions.reports import totals
from tests.plane.conftest import asks

HISTORY = "execution|sandbox|transition|event|usage|ledgerentry|attempt"
FEW, MANY, WINDOW = 150, 1500, 100
LISTS = {
    "executions": [
        "", "state=failed", "state=running", "open=true", "agent=etl", "agent=none", "q=nothing", "workflow=none", "user=nobody", "language=bash",
        "session=sbx_none", "parent=exe_none", "metadata.a=none", "trace_id=none", "created_before=2100-01-01T00:00:00Z&state=failed",
    ],
    "sessions": ["", "open=true", "state=paused", "name=none"],
    "sandboxes": ["", "open=true", "end_reason=lost"],
    "workflows/none": [""],
}  # fmt: skip
CONSOLE = ["/", "/runs", "/runs?state=failed", "/runs?state=running", "/runs?agent=etl", "/runs?q=nothing", "/usage"]
ADMIN = {
    "execution": ["", "state__exact=failed", "q=nothing", "open=yes", "open=stuck", "since=month", "since=before-day", "agent__id__exact={agent}"],
    "sandbox": ["", "state__exact=paused", "q=nothing", "open=yes"],
    "agent": [""], "team": [""],
    "usage": ["", "kind__exact=pool"], "ledgerentry": ["", "q=nothing"],
    "transition": ["", "since=month"], "attempt": ["", "outcome__exact=lost"], "event": ["", "kind__exact=error"],
}  # fmt: skip


@pytest.mark.django_db
def test_what_is_looked_at_costs_the_same_with_ten_times_the_history(caller, key, ada, monkeypatch):
    monkeypatch.setattr(newest, "LOOKED_AT", WINDOW)
    monkeypatch.setattr(newest, "COUNTED", WINDOW)
    monkeypatch.setattr(base, "LISTED", WINDOW)
    monkeypatch.setattr(runs, "LISTED", WINDOW)
    ada.is_superuser = ada.is_staff = True
    ada.save()
    async_to_sync(operations.execute)(caller=caller, request=asks("#= 1"))
    totals.roll_up()
    looks = pages(caller.agent, key, ada)

    history(0, FEW)
    for look in looks.values():  # what is looked up once in a process
        look()
    was = {name: work(look) for name, look in looks.items()}
    history(FEW, MANY)
    now = {name: work(look) for name, look in looks.items()}

    grown = {name: (was[name], now[name]) for name in looks if now[name] > 1.5 * was[name] + 50}
    assert grown == {}


@pytest.mark.django_db
def test_the_work_that_is_counted_grows_where_history_is_read(caller):
    async_to_sync(operations.execute)(caller=caller, request=asks("#= 1"))
    history(0, FEW)
    was = work(lambda: list(Execution.objects.filter(user="nobody")))
    history(FEW, MANY)

    assert work(lambda: list(Execution.objects.filter(user="nobody"))) > 5 * was


@pytest.mark.django_db
def test_every_row_is_found_though_a_page_goes_through_few(caller, key, monkeypatch):
    monkeypatch.setattr(newest, "LOOKED_AT", 7)
    async_to_sync(operations.execute)(caller=caller, request=asks("#= 1"))
    history(0, 50)
    at = Execution.objects.order_by("created_at")[5].created_at
    wanted = Execution.objects.filter(pk__in=Execution.objects.order_by("created_at").values("pk")[:20:3])
    wanted = [row.pk for row in wanted]
    Execution.objects.filter(pk__in=wanted).update(user="u")
    Execution.objects.filter(created_at__lte=at).update(created_at=at)  # a tie across pages
    client, seen, pages_read = Client(), [], 0

    address = "/api/v1/executions?user=u&limit=2"
    while address:
        body = client.get(address, headers={"Authorization": f"Bearer {key}"}).json()
        seen += [one["id"] for one in body["results"]]
        address, pages_read = body["next"], pages_read + 1

    assert sorted(seen) == sorted(wanted)
    assert pages_read > len(wanted) / 2


def test_what_is_no_cursor_is_refused(client, key):
    too_early, too_late = (
        base64.urlsafe_b64encode(at).decode() for at in (b"0001-01-01T00:00:00+14:00 ", b"9999-12-31T23:59:59-14:00 ")
    )
    for text in ("x", "é", "MjAyNg", "a" * 5000, "%00", too_early, too_late):
        answer = client.get(f"/api/v1/executions?cursor={text}", headers={"Authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid"), text


@pytest.mark.parametrize(
    "asked", ["created_after=0001-01-01T00:00:00%2B14:00", "created_before=9999-12-31T23:59:59-14:00"]
)
def test_a_moment_that_utc_has_not_is_refused(client, key, asked):
    answer = client.get(f"/api/v1/executions?{asked}", headers={"Authorization": f"Bearer {key}"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


def pages(agent, key: str, person) -> dict:
    """What is looked at, by name."""
    client, key_client = Client(), Client(headers={"Authorization": f"Bearer {key}"})
    client.force_login(person)
    found = {
        f"REST {name}?{q}": (key_client, f"/api/v1/{name}?{q}") for name, queries in LISTS.items() for q in queries
    }
    found |= {f"console {address}": (client, address) for address in CONSOLE}
    for model, queries in ADMIN.items():
        address = reverse(f"admin:executions_{model}_changelist")
        found |= {f"admin {model}?{q}": (client, f"{address}?{q.format(agent=agent.pk)}") for q in queries}
    found["admin, first page"] = (client, "/admin/")

    def looked(by: Client, address: str):
        def look() -> None:
            answer = by.get(address)
            assert answer.status_code in (200, 404 if "workflows" in address else 200), (address, answer.status_code)

        return look

    return {name: looked(*one) for name, one in found.items()}


def history(since: int, until: int) -> None:
    """What an old installation has of ended rows, an hour apart and each older than the one before."""
    execution = Execution.objects.order_by("-created_at").first()
    kinds = (Sandbox, Execution, *(Transition, Usage, LedgerEntry, Attempt, Event))
    originals = {kind: list(kind.objects.filter(**of(kind, execution))[:2]) for kind in kinds}
    made = [(new_id("sbx"), new_id("exe"), timedelta(hours=26 + n)) for n in range(since, until)]
    for kind in kinds:
        kind.objects.bulk_create(
            aged(original, sandbox, run, age) for sandbox, run, age in made for original in originals[kind]
        )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE") if connection.vendor == "postgresql" else None
    cache.clear()


def of(kind, execution) -> dict:
    match kind.__name__:
        case "Sandbox":
            return {"pk": execution.sandbox_id}
        case "Execution":
            return {"pk": execution.pk}
    return {"execution": execution}


def aged(original, sandbox: str, run: str, age: timedelta):
    row = copy(original)
    row._state = copy(original._state)
    row.pk = {"Sandbox": sandbox, "Execution": run}.get(type(row).__name__)
    for field in row._meta.concrete_fields:
        value = getattr(row, field.attname)
        if field.name in ("sandbox", "execution") and value:
            setattr(row, field.attname, sandbox if field.name == "sandbox" else run)
        elif field.get_internal_type() == "DateTimeField" and value:
            setattr(row, field.attname, value - age)
    return row


def work(look) -> int:
    """Of SQLite: hundreds of steps of its machine. Of PostgreSQL: rows of history that were read, kept or not."""
    if connection.vendor == "sqlite":
        steps = [0]

        def step() -> int:
            steps[0] += 1
            return 0

        connection.ensure_connection()
        connection.connection.set_progress_handler(step, 100)
        try:
            look()
        finally:
            connection.connection.set_progress_handler(None, 0)
        return steps[0]
    asked: list[tuple[str, tuple]] = []

    def note(execute, sql, params, many, context):
        asked.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        look()
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")  # a few thousand rows are few
        cursor.execute("SET LOCAL enable_bitmapscan = off")
        read = 0
        for sql, params in asked:
            if isinstance(sql, str) and sql.startswith("SELECT") and "FOR UPDATE" not in sql:
                cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql}", params)
                told = cursor.fetchone()[0]
                read += rows_read((json.loads(told) if isinstance(told, str) else told)[0]["Plan"])
        return read


def rows_read(plan: dict) -> int:
    own = 0
    if re.fullmatch(rf"executions_({HISTORY})", plan.get("Relation Name", "")):
        own = (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)) * plan["Actual Loops"]
    return own + sum(rows_read(part) for part in plan.get("Plans", []))


@pytest.mark.django_db
def test_the_admin_finds_what_its_list_no_longer_shows(caller, ada, monkeypatch):
    monkeypatch.setattr(base, "LISTED", 20)
    monkeypatch.setattr(runs, "LISTED", 20)
    ada.is_superuser = ada.is_staff = True
    ada.save()
    async_to_sync(operations.execute)(caller=caller, request=asks("#= 1"))
    history(0, 60)
    old = Execution.objects.order_by("created_at").first()
    client = Client()
    client.force_login(ada)

    def shown(model: str, query: str) -> list:
        answer = client.get(f"{reverse(f'admin:executions_{model}_changelist')}?{query}")
        return [getattr(row, "execution_id", row.pk) for row in answer.context["cl"].result_list]

    assert old.pk not in shown("execution", "")
    assert shown("execution", f"q={old.pk}") == [old.pk]
    assert set(shown("transition", f"q={old.pk}")) == set(shown("usage", f"q={old.pk}")) == {old.pk}
    Execution.objects.filter(created_at__gt=old.created_at + timedelta(hours=10)).update(created_at=timezone.now())
    assert old.pk in shown("execution", "since=before-day")


@pytest.mark.django_db
def test_the_console_looks_further_back_where_nothing_matched_yet(caller, ada, monkeypatch):
    monkeypatch.setattr(newest, "LOOKED_AT", 20)
    async_to_sync(operations.execute)(caller=caller, request=asks("#= 1"))
    history(0, 50)
    old = Execution.objects.order_by("created_at").first()
    Execution.objects.filter(pk=old.pk).update(backend="third")
    client, address, empty = Client(), "/runs?backend=third", 0
    client.force_login(ada)

    while not (answer := client.get(address)).context["runs"]:
        assert b"No match so far" in answer.content
        address, empty = f"/runs?{answer.context['older']}", empty + 1

    assert [run.pk for run in answer.context["runs"]] == [old.pk]
    assert empty == 2
    assert [run.pk for run in client.get(f"/runs?q={old.pk}").context["runs"]] == [old.pk]


@pytest.mark.django_db
def test_an_hour_of_the_first_page_is_kept_only_when_all_of_it_has_ended(caller):
    cache.clear()
    execution = operations.submit(caller=caller, request=asks())
    long_ago = timezone.now() - timedelta(hours=3)
    Execution.objects.filter(pk=execution.pk).update(created_at=long_ago)

    def seen() -> list:
        return [(state, n) for _, _, state, n in first_page.runs_of_day(timezone.now())]

    assert seen() == [("starting", 1)]
    Execution.objects.filter(pk=execution.pk).update(state="cancelled", ended_at=timezone.now())
    assert seen() == [("cancelled", 1)]
    Execution.objects.filter(pk=execution.pk).update(state="failed")  # as nothing does: what is kept is not read again
    assert seen() == [("cancelled", 1)]
    cache.clear()
