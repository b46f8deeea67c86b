"""Every list and page answers, records cannot be changed, and a list asks the same number of queries however long it is."""

from __future__ import annotations

import base64
from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from executions import breaker
from executions.models import Event
from tests.admin.conftest import CONFIGURATION, MODELS, a_cost, a_run, a_sandbox, one_of_everything

RECORDS = sorted(set(MODELS) - set(CONFIGURATION))


def list_of(model: str) -> str:
    return reverse(f"admin:executions_{model}_changelist")


def page_of(model: str, row) -> str:
    return reverse(f"admin:executions_{model}_change", args=[row.pk])


def queries(office, address: str) -> int:
    with CaptureQueriesContext(connection) as asked:
        answer = office.get(address)
    assert answer.status_code == 200
    return len(asked)


def test_every_kind_of_row_has_a_page_in_the_admin():
    from django.apps import apps
    from django.contrib import admin

    assert {m for m in apps.get_app_config("executions").get_models() if not admin.site.is_registered(m)} == set()
    assert {m._meta.model_name for m in apps.get_app_config("executions").get_models()} == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_a_list_asks_as_much_for_25_rows_as_for_5(office, template, model):
    for _ in range(5):
        one_of_everything(template)
    office.get(list_of(model))  # content types and the like are cached now
    few = queries(office, list_of(model))
    for _ in range(20):
        one_of_everything(template)

    many = queries(office, list_of(model))

    assert many == few


def test_the_first_page_asks_as_much_for_25_rows_as_for_5(office, template):
    for _ in range(5):
        one_of_everything(template)
    office.get("/admin/")
    few = queries(office, "/admin/")
    for _ in range(20):
        one_of_everything(template)

    assert queries(office, "/admin/") == few


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"signinlink"}))
def test_every_row_has_a_page(office, template, model):
    row = one_of_everything(template)[model]

    answer = office.get(page_of(model, row))

    assert answer.status_code == 200


@pytest.mark.parametrize("model", RECORDS)
def test_records_cannot_be_added_changed_or_deleted(office, template, model):
    row = one_of_everything(template)[model]
    before = dict(type(row).objects.filter(pk=row.pk).values()[0])

    added = office.post(f"{list_of(model)}add/", {})
    changed = office.post(page_of(model, row), {"state": "gone", "code": "x", "cost_nano_usd": 1})
    deleted = office.post(f"{list_of(model)}{row.pk}/delete/", {"post": "yes"})

    assert (added.status_code, changed.status_code, deleted.status_code) == (403, 403, 403)
    if model == "audithead":
        return  # being refused is an event: the head moves on
    assert dict(type(row).objects.filter(pk=row.pk).values()[0]) == before


def test_the_hash_of_a_sign_in_link_is_in_no_address(office, template):
    link = one_of_everything(template)["signinlink"]

    listed = office.get(list_of("signinlink")).content.decode()

    assert f"signinlink/{link.pk}" not in listed
    assert office.get(page_of("signinlink", link)).status_code == 403


def test_an_empty_installation_says_what_to_do(office):
    shown = office.get("/admin/").content.decode()

    assert "Nothing has run yet" in shown
    assert "/api/v1/executions" in shown
    assert "Nothing is stuck" in shown


def test_the_numbers_of_the_first_page_link_to_their_rows(office, agent, template):
    a_run(agent, template)
    failed = a_run(agent, template, "queued", "starting", "running", "failed")
    a_cost(agent, failed.sandbox, 420_000_000)

    page = office.get("/admin/")

    numbers = {number["label"]: number for number in page.context["numbers"]}
    assert numbers["Running"]["value"] == "1"
    assert numbers["Live sandboxes"]["value"] == "2"
    assert numbers["Spend today"]["value"] == "$0.42"
    for number in numbers.values():
        assert office.get(number["href"]).status_code == 200
    running = office.get(numbers["Running"]["href"]).context["cl"].result_list
    assert [row.state for row in running] == ["running"]
    row = next(b for b in page.context["backends"] if b["alias"] == "scripted")
    assert [(name, count) for name, count, _ in row["failures"]] == [("failed", 1)]
    listed = office.get(row["failures"][0][2]).context["cl"].result_list
    assert [found.pk for found in listed] == [failed.pk]


def test_what_needs_somebody_is_named_and_linked(office, agent, template):
    stuck = a_run(agent, template, heartbeat_at=None)
    type(stuck).objects.filter(pk=stuck.pk).update(heartbeat_at=stuck.created_at - timedelta(hours=1))
    dying = a_sandbox(agent, template, "booting", "leased", "retiring")
    late = a_sandbox(agent, template)
    type(late).objects.filter(pk=late.pk).update(leased_until=late.created_at - timedelta(seconds=1))

    needs = office.get("/admin/").context["needs"]

    assert [need["words"] for need in needs] == [
        "execution without a sign of life",
        "sandbox beyond the end of the lease",
        "sandbox waiting for a confirmed kill",
    ]
    found = [[row.pk for row in office.get(need["href"]).context["cl"].result_list] for need in needs]
    assert found == [[stuck.pk], [late.pk], [dying.pk]]


def test_a_backend_that_hangs_or_breaks_does_not_take_the_first_page_down(office, settings, monkeypatch):
    from executions.admin import first_page
    from executions.backends.scripted import ScriptedBackend

    async def hangs(self):
        import asyncio

        await asyncio.Event().wait()

    monkeypatch.setattr(ScriptedBackend, "check", hangs)
    monkeypatch.setattr(first_page, "PATIENCE_SECONDS", 0.01)
    settings.SANDBOXES = {**settings.SANDBOXES, "broken": {"BACKEND": "no.such.Backend", "OPTIONS": {}}}

    rows = {row["alias"]: row["state"] for row in office.get("/admin/").context["backends"]}

    assert rows == {"e2b": "not configured", "scripted": "not answering", "broken": "down"}


def test_the_first_page_begins_with_an_outage(office):
    breaker.failed("scripted", "503 from it", began=timezone.now(), retry_after=1)

    page = office.get("/admin/")

    said = f"scripted: out since {timezone.now():%H:%M} UTC (503 from it); next try in 1 s"
    assert page.context["outages"] == [said]
    assert said in page.content.decode()
    assert {row["alias"]: row["state"] for row in page.context["backends"]}["scripted"] == "out"


def test_output_and_html_of_an_execution_are_shown_as_text(office, agent, template):
    run = a_run(agent, template, code="print('<b>')")
    pixel = base64.b64encode(b"\x89PNG").decode()
    said = [
        ("stdout", {"text": "<script>alert(1)</script>\x1b[31mred\x1b[0m"}),
        ("result", {"main": True, "mime": {"text/html": "<img src=x onerror=alert(2)>", "image/png": pixel}}),
        ("result", {"main": False, "mime": {"image/png": '"><script>alert(3)</script>'}}),
    ]
    for seq, (kind, data) in enumerate(said, start=1):
        Event.objects.create(execution=run, seq=seq, kind=kind, data=data)

    shown = office.get(page_of("execution", run)).content.decode()

    assert "<script>alert(" not in shown
    assert "<img src=x" not in shown
    assert "&lt;script&gt;alert(1)" in shown
    assert "\x1b" not in shown
    assert f'src="data:image/png;base64,{pixel}"' in shown


def test_secrets_of_an_execution_are_named_but_not_shown(office, agent, template):
    run = a_run(agent, template, env={"TOKEN": "hunter2"}, files={"data.csv": "aHVudGVyMg=="})

    shown = office.get(page_of("execution", run)).content.decode()

    assert "TOKEN" in shown
    assert "hunter2" not in shown
    assert "aHVudGVyMg" not in shown


def test_whoever_is_not_staff_is_sent_to_sign_in(client, ada):
    client.force_login(ada)

    assert client.get("/admin/").status_code == 302


def test_staff_see_what_they_may_see_and_no_more(client, ada, agent, template):
    from django.contrib.auth.models import Permission

    run = a_run(agent, template)
    ada.is_staff = True
    ada.save()
    ada.user_permissions.add(Permission.objects.get(codename="view_execution"))
    client.force_login(ada)

    assert client.get(page_of("execution", run)).status_code == 200
    assert client.get(list_of("apikey")).status_code == 403
    assert client.get(reverse("admin:executions_usage_costs")).status_code == 403
    assert client.post(f"{list_of('execution')}{run.pk}/cancel/", {"reason": "no"}).status_code == 403
    run.refresh_from_db()
    assert run.cancel_requested_at is None


def test_a_pasted_id_leads_to_its_row(office, agent, template):
    run = a_run(agent, template)

    found = [
        office.get("/admin/search/", {"s": name, "extended": "1"}).content.decode() for name in (run.pk, run.sandbox.pk)
    ]

    assert page_of("execution", run) in found[0]
    assert page_of("sandbox", run.sandbox) in found[1]


def test_the_menu_holds_every_list_in_four_groups(office):
    shown = office.get("/admin/").content.decode()

    assert [group["title"] for group in office.get("/admin/").context["sidebar_navigation"]] == [
        "Monitor",
        "Configuration",
        "Money",
        "Records",
    ]
    assert [model for model in MODELS if f'href="{list_of(model)}"' not in shown] == []
