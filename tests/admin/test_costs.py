"""The cost report sums what Usage says, to the nano-dollar."""

from __future__ import annotations

import csv
import io
from datetime import timedelta

import pytest
from django.db.models import Sum
from django.urls import reverse
from django.utils import timezone

from executions.admin.costs import harmless
from executions.models import Agent, Usage
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
    assert sum(row["nano_usd"] for row in told["by_agent"]) == whole
    assert sum(row["nano_usd"] for row in told["by_backend"]) == whole
    assert sum(int(row["nano_usd"]) for row in listed) == whole
    assert len(told["table"].lines) == 3
    assert told["table"].columns == ["e2b", "local"]


def test_a_period_holds_both_of_its_days_and_no_other(office, spent):
    yesterday = timezone.localdate() - timedelta(days=1)

    told = office.get(reverse(ADDRESS), {"first": yesterday, "last": yesterday}).context

    assert told["total"] == Usage.objects.filter(at__date=yesterday).aggregate(total=Sum("cost_nano_usd"))["total"]
    assert [day for day, *_ in told["table"].lines] == [yesterday]


def test_the_report_can_be_of_one_agent(office, spent):
    told = office.get(reverse(ADDRESS), {"agent": spent.pk}).context

    assert [row["agent__name"] for row in told["by_agent"]] == [spent.name]


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
    assert (line["usd"], line["nano_usd"], line["seconds"]) == ("0.000000005", "5", "1")
