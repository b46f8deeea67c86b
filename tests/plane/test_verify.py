"""`verify` names the first wrong row, whichever kind is wrong, and finds nothing on a system that runs."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from importlib import import_module
from threading import Thread

import pytest
from django.core.management import call_command
from django.db import connection, transaction
from django.utils import timezone

from executions import audit, backends, invariants, operations, store
from executions.admin import first_page
from executions.backends.base import SandboxSpec
from executions.hop import rows
from executions.models import (
    Artifact,
    Attempt,
    AuditEvent,
    Claim,
    CostTotal,
    Execution,
    LedgerEntry,
    MetricTotal,
    Pool,
    Quota,
    Sandbox,
    Transition,
    Usage,
)
from executions.operations import replenish
from executions.operations.verify import leaks
from executions.reports import totals
from executions.serializers import SessionRequest
from executions.states import ExecutionState, SandboxState, Unit, Window
from tests.plane.conftest import asks
from tests.product import HOME, environment

pytestmark = pytest.mark.django_db
GUARD = import_module("executions.migrations._audit_guard")


def run(statements) -> None:
    with connection.cursor() as cursor:
        for statement in statements[connection.vendor]:
            cursor.execute(statement)


@pytest.fixture
def lived(caller, settings, tmp_path):
    """A day of a plane: runs of every end, a session, a pool and its claim, quotas of every unit, all in one transaction."""
    settings.ARTIFACTS_DIR = str(tmp_path)
    run(GUARD.GUARD)
    began = timezone.now() - timedelta(hours=1)
    for owner in ({}, {"team": caller.team}, {"agent": caller.agent}, {"key": caller.key}):
        for unit in (Unit.NANO_USD, Unit.EXECUTIONS, Unit.CREATIONS, Unit.COMPUTE_US):
            Quota.objects.create(unit=unit, limit=10**15, window=Window.TOTAL, window_started_at=began, **owner)
    Quota.objects.create(unit=Unit.NANO_USD, limit=10**15, window=Window.DAY, team=caller.team)
    audit.record("sign_in", subject="ada")
    yield caller
    run(GUARD.UNGUARD)


async def live(caller) -> None:
    for code in ("#= 1", "#! ValueError: no"):
        await operations.execute(caller=caller, request=asks(code))
    await operations.execute(caller=caller, request=asks("#~ 30", timeout_seconds=1))
    session = await operations.open_session(caller=caller, request=SessionRequest())
    await operations.execute(caller=caller, request=asks(session_id=session.pk))
    template = await rows(lambda: caller.agent.template or session.template)
    warm = await Pool.objects.acreate(backend="first", template=template, target=1)
    await replenish.replenish()
    await replenish.settled()
    await operations.execute(caller=caller, request=asks())
    await replenish.settled()
    assert await Claim.objects.filter(pool=warm).acount() == 1
    await rows(totals.roll_up)


def found() -> dict[str, invariants.Wrong]:
    """The first wrong row of each check that has one."""
    return {check.name: check.wrong[0] for check in invariants.verify() if check.wrong}


async def test_a_plane_that_has_lived_a_day_has_no_wrong_row(lived):
    await live(lived)
    assert await rows(found) == {}

    await replenish.replenish()  # the claim is settled
    await replenish.settled()
    await Sandbox.objects.filter(kept=True).aupdate(leased_until=timezone.now() - timedelta(seconds=1))
    await operations.reap()

    assert await rows(found) == {}
    assert await Sandbox.objects.filter(ended_at=None, made_of="").acount() == 0


def of(model):
    return model.objects.order_by("pk").first()


def ended() -> Sandbox:
    return Sandbox.objects.filter(state=SandboxState.GONE, kept=False, made_of="").order_by("pk").first()


def change(row, **columns):
    type(row)._base_manager.filter(pk=row.pk).update(**columns)
    return str(row.pk)


def quota_of(unit, window=Window.TOTAL) -> Quota:
    return Quota.objects.filter(unit=unit, window=window).order_by("-pk").first()


def a_reservation_too_much():
    quota = quota_of(Unit.NANO_USD)
    return change(quota, reserved=quota.reserved + 1)


def a_claim_that_was_forgotten():
    held = Claim.objects.get(spent_nano_usd=None)
    change(held, spent_nano_usd=0)
    return str(Quota.objects.filter(pk__in=held.reserved_on).order_by("pk").first().pk)


def a_movement_that_is_gone():
    entry = of(LedgerEntry)
    LedgerEntry.objects.filter(pk=entry.pk).delete()
    return entry.sandbox_id


def money_that_was_not_booked():
    quota = quota_of(Unit.NANO_USD)
    return change(quota, used=quota.used - 1)


def money_that_nobody_spent_today():
    quota = quota_of(Unit.NANO_USD, Window.DAY)
    return change(quota, used=quota.used + 1)


def one_more_run():
    quota = quota_of(Unit.EXECUTIONS)
    return change(quota, used=quota.used + 1)


def a_creation_that_was_not_counted():
    quota = Quota.objects.get(unit=Unit.CREATIONS, team=None, agent=None, key=None)
    return change(quota, used=quota.used - 1)


def time_that_was_not_booked():
    quota = quota_of(Unit.COMPUTE_US)
    return change(quota, used=quota.used - 1)


def usage_that_is_gone():
    usage = Usage.objects.filter(sandbox=ended()).order_by("pk").first()
    usage.delete()
    return str(usage.sandbox_id)


def an_execution_that_cost_more():
    execution = Execution.objects.filter(cost_nano_usd__gt=0).order_by("pk").first()
    return change(execution, cost_nano_usd=execution.cost_nano_usd + 1)


def a_total_too_much():
    total = CostTotal.objects.filter(grain="day", by="").order_by("pk").first()
    change(total, cost_nano_usd=total.cost_nano_usd + 1)
    return total.team_id


def a_state_without_a_step():
    execution = Execution.objects.filter(state=ExecutionState.SUCCEEDED).order_by("pk").first()
    return change(execution, state=ExecutionState.FAILED)


def a_step_that_is_not_legal():
    step = Transition.objects.filter(execution__isnull=False, after=ExecutionState.RUNNING).order_by("pk").first()
    return change(step, before=ExecutionState.FAILED)


def a_step_that_is_gone():
    lost = Transition.objects.filter(sandbox=ended(), after=SandboxState.RETIRING).get()
    follower = Transition.objects.filter(sandbox_id=lost.sandbox_id, pk__gt=lost.pk).order_by("pk").first()
    lost.delete()
    return str(follower.pk)


def a_second_attempt_that_ran():
    first = of(Attempt)
    Attempt.objects.create(execution_id=first.execution_id, number=9, backend="second", outcome="ran")
    return first.execution_id


def a_sandbox_that_served_two():
    one, other = Execution.objects.filter(sandbox__kept=False).order_by("pk")[:2]
    change(other, sandbox=one.sandbox)
    return one.sandbox_id


def an_attempt_that_stayed_open():
    return change(of(Attempt), outcome="open")


def a_run_without_a_sign_of_life():
    execution = Execution.objects.filter(sandbox__kept=True).get()
    history = Transition.objects.filter(execution=execution, after=ExecutionState.SUCCEEDED)
    history.delete()
    old = timezone.now() - timedelta(minutes=1)
    Attempt.objects.filter(execution=execution).update(outcome="open")
    return change(execution, state=ExecutionState.RUNNING, ended_at=None, heartbeat_at=old)


def a_session_past_its_end():
    return change(Sandbox.objects.get(kept=True), leased_until=timezone.now() - timedelta(minutes=2))


def an_event_that_was_changed():
    run(GUARD.UNGUARD)
    event = of(AuditEvent)
    change(event, reason="nothing happened")
    run(GUARD.GUARD)
    return str(event.seq)


def a_guard_that_was_removed():
    run(GUARD.UNGUARD)
    return "triggers"


def a_file_that_was_removed():
    return _artifact(b"").pk


def a_file_that_was_cut():
    return _artifact(b"ab").pk


def _artifact(content: bytes) -> Artifact:
    sandbox = ended()
    kept = Artifact.objects.create(
        team_id=sandbox.team_id, sandbox=sandbox, name="a", mime="text/plain", size_bytes=3, sha256="ab" * 32,
        expires_at=timezone.now() + timedelta(days=1),
    )  # fmt: skip
    if content:
        store.place(kept.sha256).parent.mkdir()
        store.place(kept.sha256).write_bytes(content)
    return kept


WRONG = [
    ("reservations", a_reservation_too_much),
    ("reservations", a_claim_that_was_forgotten),
    ("books", a_movement_that_is_gone),
    ("used", money_that_was_not_booked),
    ("used", money_that_nobody_spent_today),
    ("used", one_more_run),
    ("used", a_creation_that_was_not_counted),
    ("used", time_that_was_not_booked),
    ("spent", usage_that_is_gone),
    ("spent", an_execution_that_cost_more),
    ("totals", a_total_too_much),
    ("transitions", a_state_without_a_step),
    ("transitions", a_step_that_is_not_legal),
    ("transitions", a_step_that_is_gone),
    ("once", a_second_attempt_that_ran),
    ("once", a_sandbox_that_served_two),
    ("attempts", an_attempt_that_stayed_open),
    ("owned", a_run_without_a_sign_of_life),
    ("owned", a_session_past_its_end),
    ("audit", an_event_that_was_changed),
    ("audit", a_guard_that_was_removed),
    ("artifacts", a_file_that_was_removed),
    ("artifacts", a_file_that_was_cut),
]


async def test_what_lives_on_another_machine_is_missed_later(lived, settings):
    """Its node ends it by itself, and only then may others say that it has gone."""
    await live(lived)

    def elsewhere(ends: timedelta) -> dict[str, list[str]]:
        with transaction.atomic():
            named = a_session_past_its_end()
            Sandbox.objects.filter(pk=named).update(node="another", leased_until=timezone.now() - ends)
            wrong = found()
            transaction.set_rollback(True)
        return wrong

    grace = timedelta(seconds=settings.KEEP_GRACE_SECONDS + invariants.OVERDUE_SECONDS)
    soon = await rows(elsewhere, grace + timedelta(seconds=60))
    late = await rows(elsewhere, grace + timedelta(seconds=180))

    assert ("owned" in soon, "owned" in late) == (False, True)


async def test_each_kind_of_wrong_row_is_named(lived):
    await live(lived)

    def all_of_them():
        for name, forge in WRONG:
            with transaction.atomic():
                named = forge()
                wrong = [str(one.id) for check in invariants.verify() if check.name == name for one in check.wrong]
                transaction.set_rollback(True)
            assert named in wrong, (name, forge.__name__, wrong)
        assert found() == {}

    await rows(all_of_them)


@pytest.fixture
def cloud(settings):
    """A backend whose machines outlive our process, as far as anybody can tell."""
    settings.SANDBOXES = {"first": {"BACKEND": "tests.plane.weak.WeakBackend", "OPTIONS": {}}}
    backends.get("first").machines.clear()
    return backends.get("first")


async def test_what_a_provider_still_has_although_its_row_has_ended_is_a_leak(caller, cloud):
    await operations.execute(caller=caller, request=asks())
    sandbox = await Sandbox.objects.aget()
    await cloud.create(SandboxSpec(sandbox.provider_name, "default", 600))
    await cloud.create(SandboxSpec("sbx0strangers", "default", 600))

    assert (await leaks()).wrong == []  # a list may lag behind the kill

    await Sandbox.objects.aupdate(ended_at=timezone.now() - timedelta(seconds=30))
    found = await leaks()
    assert [(wrong.id, wrong.found) for wrong in found.wrong] == [(sandbox.pk, "alive there, gone here")]
    assert "first has 1 that no row knows" in found.note
    await operations.reap()
    assert (await leaks()).wrong == []


async def test_kills_that_are_not_confirmed_are_told_with_what_they_may_cost(caller, behave):
    behave("first", BEHAVES="loses_kills")
    await operations.execute(caller=caller, request=asks())

    found = await leaks()

    assert found.wrong == []
    assert "Not confirmed yet: 1 of the kills, which may still cost $" in found.note


@pytest.mark.django_db(transaction=True)
def test_the_command_says_a_line_for_each_check_and_fails_with_the_first_wrong_row(lived, capsys):
    call_command("verify")
    told = capsys.readouterr().out
    assert told.count("ok  ") == len(invariants.OF_ROWS) + 2
    wrong = a_reservation_too_much()

    with pytest.raises(SystemExit) as ended:
        call_command("verify")

    assert ended.value.code == 1
    said = f"→ quota {wrong}: expected 0 nano-dollars reserved, found 1 nano-dollars."
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call_command("verify", "--json")
    told = json.loads(capsys.readouterr().out)
    (check,) = [check for check in told["checks"] if not check["ok"]]
    assert (told["ok"], check["name"], check["wrong"][0]["id"]) == (False, "reservations", wrong)
    assert MetricTotal.objects.get(name="sandgate_verify_failed_checks").value == 1
    assert first_page.verified()["failed"] == 1


@pytest.mark.django_db(transaction=True)
def test_writers_neither_wait_for_the_snapshot_nor_are_seen_in_it(team):
    def write():
        try:
            Quota.objects.create(unit=Unit.NANO_USD, limit=1, reserved=1)
        finally:
            connection.close()

    with invariants.snapshot():
        assert Quota.objects.count() == 0
        writer = Thread(target=write)
        writer.start()
        writer.join(15)
        assert not writer.is_alive()
        assert list(invariants.reservations()) == []

    assert [wrong.found for wrong in invariants.reservations()] == ["1 nano-dollars"]
    with transaction.atomic():  # the connection writes as before
        Quota.objects.update(reserved=0)


@pytest.mark.parametrize("where", ["", "elsewhere"])
def test_a_database_that_nobody_has_served_is_one_sentence_and_makes_no_file_where_one_stands(tmp_path, where):
    """An empty SANDGATE_DATA is none at all."""
    database = f"sqlite:///{tmp_path}/none.sqlite3"
    env = environment(tmp_path, 1, None, DATABASE_URL=database) | {"SANDGATE_DATA": where and str(tmp_path / where)}
    command = [sys.executable, "-W", "ignore", str(HOME / "manage.py"), "verify"]
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    assert told.returncode == 2
    assert told.stderr.startswith(f"The database {tmp_path}/none.sqlite3 cannot be checked")
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "secret_key").exists()
