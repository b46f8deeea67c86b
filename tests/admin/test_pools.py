"""Warm pools in the admin: made, changed, switched off, paid for from a quota of their own."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.urls import reverse
from django.utils import timezone

from executions import pool
from executions.models import AuditEvent, Claim, Pool, Quota
from tests.admin.conftest import a_sandbox

LIST = "/admin/executions/pool/"


def typed(template, **fields) -> dict:
    whole = {
        "backend": "scripted", "template": template.pk, "memory_mib": "0", "network_allow": "", "is_enabled": "on",
        "follows": "fixed", "target": "3", "at_most": "20", "hours": "", "zero_after_seconds": "0",
        "lifetime_seconds": "900", "dollars_a_day": "",
    }  # fmt: skip
    return whole | fields


def test_a_pool_is_made_with_a_budget_of_its_own_and_written_down(office, template):
    answer = office.post(f"{LIST}add/", typed(template, dollars_a_day="1.50", network_allow="Data.Example"))

    assert answer.status_code == 302, answer.context["adminform"].form.errors
    made = Pool.objects.get()
    assert (made.target, made.network_allow) == (3, ["data.example"])
    quota = Quota.objects.get()
    assert (quota.agent, quota.limit) == (made.agent, 1_500_000_000)
    assert made.agent.team.name == pool.ACCOUNT
    assert AuditEvent.objects.filter(action="pool_made").count() == 1


def test_a_budget_that_is_cleared_is_a_ceiling_no_more(office, template):
    office.post(f"{LIST}add/", typed(template, dollars_a_day="1.50"))
    made = Pool.objects.get()

    shown = office.get(f"{LIST}{made.pk}/change/")
    answer = office.post(f"{LIST}{made.pk}/change/", typed(template))

    assert shown.context["adminform"].form.initial["dollars_a_day"] == 1.5
    assert answer.status_code == 302
    assert not Quota.objects.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("hours", "1, 2, 3"), ("hours", "many"), ("lifetime_seconds", "20"), ("network_allow", "https://example.org")],
)
def test_what_cannot_be_is_refused_at_its_field(office, template, field, value):
    answer = office.post(f"{LIST}add/", typed(template, **{field: value}))

    assert field in answer.context["adminform"].form.errors
    assert not Pool.objects.exists()


def test_a_second_pool_of_the_same_kind_is_refused(office, template):
    office.post(f"{LIST}add/", typed(template))

    answer = office.post(f"{LIST}add/", typed(template))

    assert "There is a pool of this kind already." in str(answer.context["adminform"].form.errors)


def test_the_hours_keep_numbers_that_repeat(office, template):
    office.post(f"{LIST}add/", typed(template, follows="hours", hours=", ".join(["0"] * 8 + ["5"] * 16)))

    assert Pool.objects.get().hours == [0] * 8 + [5] * 16


def test_the_page_shows_what_is_ready_how_often_it_was_and_what_waiting_costs(office, agent, template):
    made = Pool.objects.create(backend="scripted", template=template, target=2)
    own = {"pool": made, "made_of": "0" * 16, "rate_nano_usd_per_second": 1000}
    a_sandbox(agent, template, "booting", "idle", **own)
    for took_us in (1000, 3000, 9000):
        claimed = a_sandbox(agent, template, "booting", "idle", "leased", **own)
        Claim.objects.create(sandbox=claimed, pool=made, took_us=took_us, reserved_nano_usd=0)
    a_sandbox(agent, template, pool=made)
    Claim.objects.filter(took_us=9000).update(at=timezone.now() - timedelta(hours=2))

    shown = office.get(f"{LIST}{made.pk}/change/").content.decode()
    listed = office.get(LIST).content.decode()

    for page in (shown, listed):
        assert "66.7%" in page
        assert "2 of 3" in page
        assert "$0.09" in page
    assert "1.0 ms and 1.0 ms" in shown


def test_a_pool_is_switched_off_not_deleted(office, template):
    made = Pool.objects.create(backend="scripted", template=template, target=2)

    assert office.post(reverse("admin:executions_pool_delete", args=[made.pk]), {"post": "yes"}).status_code == 403
