"""The inbox of packages that wait for a person, and what a package's page answers."""

from __future__ import annotations

from django.urls import reverse

from executions.models import Approval, AuditEvent, Package, PackageLock, PackagePolicy
from tests.admin.conftest import PIN, a_run
from tests.admin.test_levers import select


def waiting(agent, execution=None, **fields) -> Approval:
    pins = [
        {**PIN, "name": "acme", "version": "2.0", "size_bytes": 5_000_000, "advisories": ["OSV-1"], "licence": "MIT"},
        PIN,
    ]
    why = "The policy of team Engines has a person approve acme 2.0."
    return Approval.objects.create(
        team=agent.team, agent=agent, execution=execution, asked=["acme"], pins=pins, why=why, roll=agent.pk, **fields
    )


def test_the_inbox_shows_the_tree_with_what_is_unknown_and_the_run_that_asked(office, agent, template):
    run = a_run(agent, template)

    shown = office.get(reverse("admin:executions_approval_change", args=[waiting(agent, run).pk])).content.decode()

    for said in ("acme 2.0", "5.0 MB", "OSV-1", "MIT", "unknown", "emoji 2", "&lt;b&gt;asked", run.pk):
        assert said in shown


def test_what_is_approved_or_denied_is_settled_once_with_a_reason_and_audited(office, operator, agent):
    one = waiting(agent)

    asked = select(office, "approval", "approve", one)
    said = select(office, "approval", "approve", one, reason="we use it elsewhere")
    late = select(office, "approval", "deny", one, reason="too late")

    assert "acme 2.0, emoji 2" in asked.content.decode()
    assert "1 request approved." in said.content.decode()
    assert "Nothing to do" in late.content.decode()
    one.refresh_from_db()
    assert (one.state, one.decided_by, one.reason) == ("approved", operator, "we use it elsewhere")
    event = AuditEvent.objects.get(action="packages_approved")
    assert (event.subject, event.actor, event.after["packages"]) == (one.pk, operator, ["acme 2.0", "emoji 2"])


def test_a_packages_page_names_the_runs_that_had_this_version(office, agent, template):
    lock = PackageLock.objects.create(agent=agent, digest="d", python="3.11", pins=[PIN])
    facts = {"team": agent.team, "agent": agent, "name": "acme", "verdict": "allowed"}
    had, other = a_run(agent, template), a_run(agent, template)
    locked = a_run(agent, template)
    locked.sandbox.lock = lock
    locked.sandbox.save()
    row = Package.objects.create(**facts, version="2.0", sandbox=had.sandbox)
    Package.objects.create(**facts, version="1.0", sandbox=other.sandbox)
    Package.objects.create(**facts, version="2.0", lock=lock)

    shown = office.get(reverse("admin:executions_package_change", args=[row.pk])).content.decode()

    assert (had.pk in shown, locked.pk in shown, other.pk in shown) == (True, True, False)


def test_a_policy_that_cannot_be_read_is_refused_with_the_entry(office, team):
    form = {
        "team": team.pk,
        "allow": '["*"]',
        "ask": "[]",
        "deny": '["x; touch /p"]',
        "private": "[]",
        "licences": "[]",
    }
    form |= {"least_age_days": 0, "vulnerable": "deny", "lookalike": "ask", "unknown": "ask"}

    refused = office.post(reverse("admin:executions_packagepolicy_add"), form)
    kept = office.post(reverse("admin:executions_packagepolicy_add"), form | {"deny": '["Left_Pad<2"]'})

    assert "is not a package name with plain version specifiers" in refused.content.decode()
    assert kept.status_code == 302
    assert PackagePolicy.objects.get().deny == ["left-pad<2"]
