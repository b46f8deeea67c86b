"""The audit is a chain that shows every break, in both databases, under any number of writers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import import_module
from threading import Barrier

import pytest
from django.db import DatabaseError, connection, transaction
from django.utils import timezone

from executions import audit, keys
from executions.errors import Conflict
from executions.models import Agent, AuditEvent, AuditHead, Quota
from executions.operations import reverts

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def guarded(db):
    """The triggers, which tests are otherwise rid of; gone again with the test's transaction."""
    run(GUARD.GUARD)


GUARD = import_module("executions.migrations._audit_guard")


def run(statements) -> None:
    with connection.cursor() as cursor:
        for statement in statements[connection.vendor]:
            cursor.execute(statement)


def some(count: int, **fields) -> list[AuditEvent]:
    return [audit.record("sign_in", subject=f"person {n}", **fields) for n in range(count)]


def test_each_event_holds_the_hash_of_the_one_before_it():
    first, second, third = some(
        3, after={"ü": 1.0, "at": timezone.now(), "list": ["a", None, True]}, ip="::ffff:10.0.0.1"
    )

    assert (first.previous, second.previous, third.previous) == ("", first.digest, second.digest)
    assert audit.verify() == audit.Chain(3, third.digest)
    assert AuditHead.objects.get().digest == third.digest


def test_the_database_refuses_to_change_and_to_delete():
    (event,) = some(1)

    for attempt in (
        lambda: AuditEvent.objects.filter(pk=event.pk).update(reason="nothing happened"),
        lambda: AuditEvent.objects.filter(pk=event.pk).delete(),
    ):
        with pytest.raises(DatabaseError, match="audit events are never"), transaction.atomic():
            attempt()
    assert audit.verify().problem == ""


@pytest.mark.parametrize(
    ("forge", "broken_at", "said"),
    [
        (lambda rows: rows.filter(seq=2).update(reason="other"), 2, "was changed"),
        (lambda rows: rows.filter(seq=2).update(before={"a": 1}), 2, "was changed"),
        (lambda rows: rows.filter(seq=2).update(at=timezone.now() + timedelta(days=1)), 2, "was changed"),
        (lambda rows: rows.filter(seq=2)._raw_delete("default"), 2, "Event 2 is missing"),
        (lambda rows: rows.filter(seq=3).update(previous="0" * 64), 3, "does not follow"),
        (lambda rows: rows.filter(seq=1)._raw_delete("default"), 1, "Event 1 is missing"),
        (lambda rows: rows.filter(seq__gte=4)._raw_delete("default"), 4, "there were 5"),
    ],
)
def test_whoever_gets_past_the_triggers_breaks_the_chain_at_that_row(forge, broken_at, said):
    some(5)
    run(GUARD.UNGUARD)

    forge(AuditEvent.objects.all())
    run(GUARD.GUARD)

    found = audit.verify()
    assert found.broken_at == broken_at
    assert said in found.problem
    assert found.length == broken_at - 1


def test_a_row_that_is_forged_with_its_own_hash_breaks_the_next_one():
    some(3)
    run(GUARD.UNGUARD)
    event = AuditEvent.objects.filter(seq=2).values(*audit.HASHED).get() | {"reason": "forged"}
    AuditEvent.objects.filter(seq=2).update(reason="forged", digest=audit.digest(event))
    run(GUARD.GUARD)

    assert audit.verify().broken_at == 3


def test_triggers_that_are_gone_are_noticed():
    some(1)
    run(GUARD.UNGUARD)

    assert "does not refuse changes" in audit.verify().problem


def test_secrets_and_code_are_never_told():
    code = "print('my secret plan')"
    event = audit.record(
        "template_changed",
        before={"password": "hunter2", "webhook_secret": "s", "files": {"a.py": code}, "code": code, "name": "a"},
        after={"new_password": None, "nested": {"api_token": "t", "code": code}, "start_command": code, "name": "b"},
    )

    stored = AuditEvent.objects.filter(pk=event.pk).values("before", "after").get()
    assert not any(word in json.dumps(stored) for word in ("hunter2", "plan", '"t"', '"s"'))
    assert (stored["before"]["password"], stored["before"]["name"]) == ("(secret)", "a")
    assert stored["before"]["code"].startswith("(kept as sha256 ")
    assert stored["after"]["start_command"] == stored["before"]["code"]


def test_what_no_database_keeps_is_made_fit_before_it_is_hashed():
    audit.record(
        "x", subject="a\x00\ud800", after={"nul\x00": "\x00\ud800", "big": 1e16, "small": 1e-9, "nan": float("nan")}
    )
    audit.record("y", ip="2001:DB8:0::1", reason="ß" * 300)

    assert audit.verify().problem == ""


def test_the_export_can_be_checked_without_the_product():
    some(4)

    previous = ""
    for line in audit.export():
        event = json.loads(line)
        stored = event.pop("digest")
        text = json.dumps(event, sort_keys=True, separators=(",", ":"))
        assert event["previous"] == previous
        assert import_module("hashlib").sha256(text.encode()).hexdigest() == stored
        previous = stored
    assert previous == audit.verify().digest


def test_an_event_is_undone_with_the_transaction_that_it_belongs_to():
    some(1)

    with transaction.atomic():
        audit.record("agent_changed")
        transaction.set_rollback(True)
    some(1)

    assert audit.verify() == audit.Chain(2, AuditEvent.objects.get(seq=2).digest)


# Taking back


@pytest.fixture
def operator(ada, team):
    return keys.caller_for(ada)


def changed(row, **fields) -> AuditEvent:
    before = audit.facts(row)
    for name, value in fields.items():
        setattr(row, name, value)
    row.save()
    was, is_now = audit.difference(before, audit.facts(row))
    subject = row.pk if isinstance(row.pk, str) else f"{row._meta.model_name} {row.pk}"
    return audit.record(f"{row._meta.model_name}_changed", subject=subject, before=was, after=is_now)


def test_a_change_of_plain_fields_is_taken_back_and_that_is_written_down(agent, operator):
    event = changed(agent, route=["e2b"], timeout_seconds=5, description="x")

    reverts.revert(event, caller=operator, reason="too short")

    agent.refresh_from_db()
    assert (agent.route, agent.timeout_seconds, agent.description) == ([], 60, "")
    last = AuditEvent.objects.latest("seq")
    assert (last.before, last.after) == (event.after, event.before)
    assert (last.actor, last.reason) == (operator.person, f"takes back event {event.seq}: too short")
    assert reverts.why_not(last) == ""
    reverts.revert(last, caller=operator, reason="after all")
    agent.refresh_from_db()
    assert agent.timeout_seconds == 5


def test_a_moment_and_a_row_that_is_pointed_to_come_back_too(team, agent, operator):
    quota = Quota.objects.create(agent=agent, unit="nano_usd", window="day", limit=5)
    until = timezone.now() + timedelta(days=1)
    event = changed(quota, raised_by=5, raised_until=until, agent=None, team=team)

    reverts.revert(event, caller=operator, reason="no")
    quota.refresh_from_db()
    assert (quota.raised_by, quota.raised_until, quota.agent, quota.team) == (0, None, agent, None)

    reverts.revert(AuditEvent.objects.latest("seq"), caller=operator, reason="yes")
    quota.refresh_from_db()
    assert (quota.raised_until, quota.team) == (until, team)


def test_what_cannot_be_taken_back_says_why(agent, operator, seeded):
    first = changed(agent, description="one")
    changed(agent, description="two")
    changed(seeded, start_command="true")
    refused = {
        "changed again since": first,
        "Only a change": audit.record("sign_in", subject="ada"),
        "not in the audit": changed(seeded, start_command="rm -rf /"),
        "no such row": audit.record("agent_changed", subject="agt_gone", before={"name": "a"}, after={"name": "b"}),
        "no plain field": audit.record("user_changed", subject="user 1", before={"groups": []}, after={"groups": [1]}),
    }

    for said, event in refused.items():
        with pytest.raises(Conflict, match=said):
            reverts.revert(event, caller=operator, reason="no")
        assert said in reverts.why_not(event)
    agent.refresh_from_db()
    assert agent.description == "two"


def test_former_values_that_are_not_valid_any_more_stay_former(agent, operator):
    event = changed(agent, name="renamed")
    Agent.objects.create(team=agent.team, name="etl")

    with pytest.raises(Conflict, match="not valid any more"):
        reverts.revert(event, caller=operator, reason="no")


@pytest.mark.django_db(transaction=True)
def test_many_writers_at_once_make_one_chain():
    run(GUARD.UNGUARD)  # the tables are emptied after this test
    start = Barrier(8)

    def write(n: int) -> None:
        start.wait()
        try:
            for k in range(10):
                with transaction.atomic():
                    audit.record("key_made", subject=f"{n}.{k}")
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as threads:
        for job in [threads.submit(write, n) for n in range(8)]:
            job.result()

    assert sorted(AuditEvent.objects.values_list("seq", flat=True)) == list(range(1, 81))
    found = audit.verify()
    assert (found.length, found.broken_at) == (80, None)
