"""The cost report sums what Usage says, to the nano-dollar."""

from __future__ import annotations

import csv
import io
import json
from datetime import date, timedelta
from decimal import Decimal

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db.models import Sum
from django.urls import reverse
from django.utils import timezone

from executions.admin import charts
from executions.models import Agent, AuditEvent, ProviderCharge, Usage
from executions.reports.exports import harmless
from tests.admin.conftest import a_cost, a_sandbox

ADDRESS = "admin:executions_usage_costs"


@pytest.fixture
def spent(agent, template):
    """Three days of two agents on two backends."""
    other = Agent.objects.create(team=agent.team, name="night", isolation_floor="none")
    now = timezone.now()
    for n, (who, backend) in enumerate([(agent, "e2b"), (agent, "local"), (other, "e2b")]):
        sandbox = a_sandbox(who, template)
        for day in range(3):
            a_cost(who, sandbox, 1_000_003 * (n + 1) + day, backend=backend, at=now - timedelta(days=day))
    return agent


def lines(answer) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(answer.content.decode())))


def test_each_view_of_the_report_sums_to_the_usage_rows(office, spent):
    whole = Usage.objects.aggregate(total=Sum("cost_nano_usd"))["total"]

    page = office.get(reverse(ADDRESS))
    told = page.context
    listed = lines(office.get(reverse(ADDRESS), {"format": "csv"}))

    assert told["total"] == whole
    assert told["table"].total == whole
    for _, _, rows in told["tables"]:
        assert sum(row["nano_usd"] for row in rows) == whole
    assert sum(int(row["cost_nano_usd"]) for row in listed) == whole
    assert len(told["table"].lines) == 3
    assert told["table"].columns == ["e2b", "local"]


def test_a_period_holds_both_of_its_days_and_no_other(office, spent):
    yesterday = timezone.localdate() - timedelta(days=1)

    told = office.get(reverse(ADDRESS), {"first": yesterday, "last": yesterday}).context

    assert told["total"] == Usage.objects.filter(at__date=yesterday).aggregate(total=Sum("cost_nano_usd"))["total"]
    assert [day for day, *_ in told["table"].lines] == [yesterday]


def test_the_report_can_be_of_one_agent(office, spent):
    told = office.get(reverse(ADDRESS), {"agent": spent.pk}).context

    assert [row["name"] for row in told["tables"][0][2]] == [spent.name]


def test_a_period_that_ends_before_it_begins_is_said(office, spent):
    shown = office.get(reverse(ADDRESS), {"first": "2026-05-02", "last": "2026-05-01"}).content.decode()

    assert "ends before it begins" in shown


def test_the_chart_has_its_table_beside_it(office, spent):
    shown = office.get(reverse(ADDRESS)).content.decode()

    assert 'class="chart"' in shown
    assert "The same as a table" in shown


def test_an_empty_report_says_so(office):
    assert "Nothing was spent" in office.get(reverse(ADDRESS)).content.decode()


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_name_in_the_csv_is_a_formula(name):
    assert harmless(name) == f"'{name}"


def test_names_in_the_csv_pass_through_that(office, agent, template):
    agent.team.name = "=HYPERLINK(1)"
    agent.team.save()
    a_cost(agent, a_sandbox(agent, template), 5)

    (line,) = lines(office.get(reverse(ADDRESS), {"format": "csv"}))

    assert line["team"] == "'=HYPERLINK(1)"
    assert (line["cost_usd"], line["cost_nano_usd"], line["seconds"]) == ("0.000000005", "5", "1")


def test_the_files_of_the_report_say_the_same_to_the_nano_dollar(office, spent):
    whole = Usage.objects.aggregate(total=Sum("cost_nano_usd"))["total"]

    listed = json.loads(office.get(reverse(ADDRESS), {"format": "json"}).content)
    focus = lines(office.get(reverse(ADDRESS), {"format": "focus"}))

    assert sum(row["cost_nano_usd"] for row in listed) == whole
    assert sum(int(row["x_NanoUsd"]) for row in focus) == whole
    assert sum(Decimal(row["BilledCost"]) for row in focus) == Decimal(whole) / 10**9


@pytest.mark.parametrize("by", ["backend", "agent", "kind", "language", "user", "workflow"])
def test_the_chart_can_tell_apart_by_anything(office, spent, by):
    told = office.get(reverse(ADDRESS), {"by": by}).context

    assert told["table"].total == told["total"] > 0


def test_a_backend_without_rates_is_named_and_its_costs_are_unpriced(office, agent, template):
    a_cost(agent, a_sandbox(agent, template, is_priced=False), 1_000_000)

    shown = office.get(reverse(ADDRESS)).content.decode()

    assert "Unpriced: scripted has no rate" in shown
    assert "budgets were charged $0.001" in shown
    (row,) = office.get(reverse(ADDRESS)).context["tables"][1][2]
    assert row["split"] == [None, 0, 0, 0]


def bill(text: str, name: str = "bill.csv") -> SimpleUploadedFile:
    return SimpleUploadedFile(name, text.encode())


BILLS = "admin:executions_usage_bills"


def test_a_bill_is_compared_with_the_ledger_day_by_day(office, agent, template):
    ours = a_sandbox(agent, template, backend="e2b", handle={"e2b_id": "ours1", "token": ""})
    noon = timezone.now().replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=2)
    a_cost(agent, ours, 5_000_000, backend="e2b", at=noon)
    a_cost(agent, ours, 2_000_000, backend="e2b", at=noon - timedelta(days=1))
    day = noon.date()
    text = f"Date,Sandbox ID,Cost\n{day},ours1,$0.006\n{day},other9,0.0015\n"

    office.post(reverse(BILLS), {"backend": "e2b", "file": bill(text)})
    office.post(reverse(BILLS), {"backend": "e2b", "file": bill(text)})  # the same days again replace themselves

    told = office.get(reverse(BILLS), {"backend": "e2b"}).context
    assert [(d.day, d.ours_nano_usd, d.theirs_nano_usd, d.difference_nano_usd) for d in told["compared"]] == [
        (day, 5_000_000, 7_500_000, 2_500_000),
        (day - timedelta(days=1), 2_000_000, None, None),
    ]
    assert told["difference"] == 2_500_000
    assert told["strangers"] == [{"sandbox": "other9", "nano_usd": 1_500_000}]
    assert AuditEvent.objects.filter(action="bill_imported", subject="e2b").count() == 2


def test_what_a_provider_has_now_is_asked_for_on_demand_and_compared(office, agent, template, settings, monkeypatch):
    from executions.backends.base import Listed
    from executions.backends.scripted import ScriptedBackend

    async def listed(self):
        return [Listed("", {"e2b_id": "other9"})]

    settings.SANDBOXES = {"e2b": {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}}
    monkeypatch.setattr(ScriptedBackend, "list", listed)
    asked = office.get(reverse(BILLS), {"backend": "e2b", "listed": "1"})

    assert [(one.sandbox, one.is_listed) for one in asked.context["listed"].odd] == [("other9", True)]
    assert "there, not open here" in asked.content.decode()
    assert office.get(reverse(BILLS), {"backend": "e2b"}).context["listed"] is None


def test_the_meter_of_the_double_is_a_bill_too(office, agent, template):
    midnight = timezone.now().replace(hour=0, minute=0, second=0, microsecond=0)
    one = {"sandboxID": "a", "began": (midnight - timedelta(seconds=30)).isoformat(), "nano_usd": 300}
    meter = {"sandboxes": [one | {"ended": (midnight + timedelta(seconds=60)).isoformat()}]}

    office.post(reverse(BILLS), {"backend": "e2b", "file": bill(json.dumps(meter), "meter.json")})

    told = office.get(reverse(BILLS), {"backend": "e2b"}).context["compared"]
    assert [day.theirs_nano_usd for day in told] == [200, 100]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no charge"),
        ("a,b\n1,2\n", "columns are a, b"),
        ("day,usd\n2026-13-01,1\n", "Line 2"),
        ("day,usd\n2026-11-01,one\n", "Line 2"),
        ("day,usd\n2026-11-01,NaN\n", "Line 2"),
        ('{"sandboxes": [{}]}', "not that of a meter"),
    ],
)
def test_a_file_that_is_no_bill_is_refused_with_the_reason(office, text, said):
    answer = office.post(reverse(BILLS), {"backend": "e2b", "file": bill(text or "day,usd\n")})

    assert said in answer.content.decode()
    assert not ProviderCharge.objects.exists()


def test_who_may_not_see_usage_sees_neither_report_nor_bills(client, ada):
    ada.is_staff = True
    ada.save()
    client.force_login(ada)

    assert [client.get(reverse(name)).status_code for name in (ADDRESS, BILLS)] == [403, 403]


@pytest.mark.parametrize(
    ("nano_usd", "digits"),
    [(400, {"maximumSignificantDigits": 4}), (3_000_000_000, {"minimumFractionDigits": 2, "maximumFractionDigits": 2})],
)
def test_the_charts_axis_is_in_dollars_and_never_in_powers_of_ten(nano_usd, digits):
    chart = charts.spend(charts.table([date(2026, 11, 1)], [(date(2026, 11, 1), "local", nano_usd)]))
    said = json.loads(chart["options"])["scales"]["y"]["ticks"]["format"]

    assert (said.pop("style"), said.pop("currency"), said.pop("notation")) == ("currency", "USD", "standard")
    assert {name: value for name, value in said.items() if "Digits" in name} == digits
