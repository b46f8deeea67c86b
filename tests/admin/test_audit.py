"""The audit in the admin: what is written down by whom, found, exported, verified, and taken back."""

from __future__ import annotations

import csv
import io
import json

import pytest
from django.core.cache import cache
from django.test import Client
from django.urls import reverse

from executions import audit, keys
from executions.models import AuditEvent, Event
from tests.admin.conftest import a_run

LIST = "admin:executions_auditevent_changelist"
pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def forgotten():
    """What was written down once in this hour."""
    cache.clear()
    yield
    cache.clear()


def changed(agent) -> AuditEvent:
    agent.timeout_seconds = 5
    agent.save()
    facts = {"before": {"timeout_seconds": 60}, "after": {"timeout_seconds": 5}}
    return audit.record("agent_changed", subject=agent.pk, **facts)


def lever(event: AuditEvent) -> str:
    return reverse("admin:executions_auditevent_revert", args=[event.pk])


def actions() -> list[str]:
    return list(AuditEvent.objects.order_by("seq").values_list("action", flat=True))


def test_a_change_is_taken_back_with_a_reason_from_its_own_page(office, agent):
    event = changed(agent)
    page = office.get(reverse("admin:executions_auditevent_change", args=[event.pk])).content.decode()

    asked = office.get(lever(event)).content.decode()
    office.post(lever(event), {"reason": "too short"})

    agent.refresh_from_db()
    assert "Can be taken back" in page
    assert "former values again" in asked
    assert agent.timeout_seconds == 60
    last = AuditEvent.objects.latest("seq")
    assert (last.action, last.reason) == ("agent_changed", f"takes back event {event.seq}: too short")


def test_what_has_changed_since_is_left_alone_and_said(office, agent):
    event = changed(agent)
    type(agent).objects.filter(pk=agent.pk).update(timeout_seconds=7)

    said = office.post(lever(event), {"reason": "x"}, follow=True).content.decode()

    agent.refresh_from_db()
    assert agent.timeout_seconds == 7
    assert "has changed again since" in said


def test_taking_back_needs_the_permission_to_change_such_rows(client, agent, ada):
    from django.contrib.auth.models import Permission

    ada.is_staff = True
    ada.save()
    ada.user_permissions.set(Permission.objects.filter(codename__in=["view_auditevent", "change_auditevent"]))
    client.force_login(ada)
    event = changed(agent)

    said = client.post(lever(event), {"reason": "x"}, follow=True).content.decode()

    agent.refresh_from_db()
    assert "needs the permission" in said
    assert agent.timeout_seconds == 5


def test_the_chain_is_verified_and_exported_from_the_list(office, agent):
    changed(agent)

    whole = office.get(reverse("admin:executions_auditevent_export")).content.decode().splitlines()
    AuditEvent.objects.filter(seq=1).update(reason="forged")
    said = office.get(reverse("admin:executions_auditevent_verify"), follow=True).content.decode()

    assert [json.loads(line)["action"] for line in whole] == ["agent_changed", "audit_exported"]
    assert "The chain is broken. Event 1 was changed" in said


def test_the_export_as_csv_is_whole_and_no_cell_is_a_formula(office, agent):
    changed(agent)
    audit.record("agent_changed", subject="=1+1", reason="@evil", before={"a": "=2"}, after="-3")

    sheet = office.get(reverse("admin:executions_auditevent_export_csv")).content.decode()
    lines = list(csv.DictReader(io.StringIO(sheet)))

    assert [line["action"] for line in lines] == ["agent_changed", "agent_changed", "audit_exported"]
    assert [line["digest"] for line in lines] == list(
        AuditEvent.objects.order_by("seq").values_list("digest", flat=True)
    )
    assert [lines[1][name] for name in ("subject", "reason", "before", "after")] == [
        "'=1+1",
        "'@evil",
        '{"a":"=2"}',
        '"-3"',
    ]
    assert not [cell for line in lines for cell in line.values() if cell.startswith(("=", "+", "-", "@"))]


@pytest.mark.parametrize("what", ["configuration", "sign_ins", "denials", "reads", "levers"])
def test_the_list_is_narrowed_by_what_was_done(office, agent, what):
    events = {
        "configuration": changed(agent),
        "sign_ins": audit.record("sign_in"),
        "denials": audit.record("access_denied"),
        "reads": audit.record("code_read"),
        "levers": audit.record("sandbox_killed"),
    }

    shown = office.get(reverse(LIST), {"what": what}).context["cl"].result_list

    assert [row.pk for row in shown] == [events[what].pk]


def test_signing_in_failing_to_and_signing_out_are_written_down(operator):
    person = Client(REMOTE_ADDR="10.1.2.3")
    login = reverse("admin:login")

    for _ in range(3):
        person.post(login, {"username": "operator", "password": "wrong"})
    person.post(login, {"username": "operator", "password": "correct horse"})
    person.post(reverse("admin:logout"))

    assert actions() == ["sign_in_failed", "sign_in", "sign_out"]
    failed, entered, _ = AuditEvent.objects.order_by("seq")
    assert (failed.subject, failed.ip, failed.actor) == ("operator", "10.1.2.3", None)
    assert (entered.actor, entered.after) == (operator, {"by": "password"})
    assert "correct horse" not in str(list(AuditEvent.objects.values()))
    assert "wrong" not in str(list(AuditEvent.objects.values()))


def test_a_link_signs_in_and_a_used_one_is_a_failure(operator):
    link = keys.make_sign_in_link(operator)

    Client().get(link)
    Client().get(link)

    assert actions() == ["sign_in", "sign_in_failed"]
    assert AuditEvent.objects.get(action="sign_in").after == {"by": "link"}


def test_who_is_denied_in_the_admin_is_written_down_once(client, ada):
    ada.is_staff = True
    ada.save()
    client.force_login(ada)

    for _ in range(3):
        assert client.get(reverse("admin:executions_agent_changelist")).status_code == 403

    (event,) = AuditEvent.objects.all()
    assert (event.action, event.actor, event.subject) == ("access_denied", ada, "/admin/executions/agent/")


def test_reading_the_code_or_output_of_others_is_written_down(office, operator, agent, template):
    run = a_run(agent, template, "queued", "starting", "running", "succeeded")
    own = a_run(agent, template, "queued", "starting", "running", "succeeded", actor=operator)
    event = Event.objects.create(execution=run, seq=1, kind="stdout", data={"text": "said"})

    for execution in (run, run, own):
        office.get(reverse("admin:executions_execution_change", args=[execution.pk]))
    office.get(reverse("admin:executions_event_change", args=[event.pk]))
    office.get(reverse("admin:executions_event_changelist"))

    told = list(AuditEvent.objects.order_by("seq").values_list("action", "subject", "actor__username"))
    assert told == [
        ("code_read", run.pk, "operator"),
        ("output_read", run.pk, "operator"),
        ("output_read", "the list of events", "operator"),
    ]


def test_the_console_writes_down_who_reads_what_is_not_theirs(ada, bob, agent, template):
    run = a_run(agent, template, "queued", "starting", "running", "succeeded", actor=ada)
    readers = {}
    for person in (ada, bob):
        readers[person] = Client()
        readers[person].force_login(person)

    for reader in readers.values():
        assert reader.get(f"/runs/{run.pk}").status_code == 200
        reader.get(f"/runs/{run.pk}/output.txt")

    assert list(AuditEvent.objects.order_by("seq").values_list("action", "actor__username")) == [
        ("code_read", "bob"),
        ("output_read", "bob"),
    ]


@pytest.mark.parametrize("door", ["/api/v1/executions", "/api/v1/costs", "/e2b/v2/sandboxes"])
def test_a_key_without_the_scope_and_a_revoked_one_are_written_down_once(client, agent, door):
    key, token = keys.make_key(team=agent.team, agent=agent, name="blind", scopes=["run"])
    from django.utils import timezone

    for _ in range(3):
        assert client.get(door, headers={"Authorization": f"Bearer {token}"}).status_code == 403
    type(key).objects.filter(pk=key.pk).update(revoked_at=timezone.now())
    for _ in range(3):
        assert client.get(door, headers={"Authorization": f"Bearer {token}"}).status_code == 401

    told = [(e.action, e.subject, e.key, e.reason) for e in AuditEvent.objects.order_by("seq")]
    assert told == [
        ("access_denied", key.pk, key, "This needs the scope read."),
        ("access_denied", key.pk, key, "The key is unknown, expired or revoked."),
    ]
    assert token not in str(list(AuditEvent.objects.values()))
