"""What operators configure is validated, typed in their words, and written down with before and after."""

from __future__ import annotations

import re

import pytest
from django.contrib.admin.models import LogEntry
from django.urls import reverse

from executions import keys
from executions.models import Agent, ApiKey, AuditEvent, Quota, Rate, Team, Template
from executions.states import Unit, Window

NO_ROWS = {f"{prefix}-{name}": "0" for prefix in ("quotas", "keys") for name in ("TOTAL_FORMS", "INITIAL_FORMS")}
AGENT = {
    "name": "etl",
    "description": "",
    "route": "scripted",
    "isolation_floor": "none",
    "languages": ["python"],
    "tools": "execute_code, list_files",
    "packages": "emoji, Requests",
    "timeout_seconds": "60",
    "timeout_max_seconds": "600",
}


def save(office, row, fields: dict):
    address = reverse(f"admin:executions_{row._meta.model_name}_change", args=[row.pk])
    return office.post(address, fields)


def errors(answer) -> dict:
    assert answer.status_code == 200, "the form was accepted"
    return answer.context["adminform"].form.errors


def test_an_agents_lists_are_typed_with_commas_and_stored_as_lists(office, agent):
    answer = save(office, agent, {**AGENT, **NO_ROWS})

    assert answer.status_code == 302
    agent.refresh_from_db()
    assert agent.route == ["scripted"]
    assert agent.tools == ["execute_code", "list_files"]
    assert agent.packages == ["emoji", "Requests"]
    assert agent.languages == ["python"]


def test_network_rules_are_stored_in_their_one_form(office, agent):
    typed = "Data.Example., *.Example.org:8443 bücher.example"

    answer = save(office, agent, {**AGENT, **NO_ROWS, "network_allow": typed})

    assert answer.status_code == 302
    agent.refresh_from_db()
    assert agent.network_allow == ["data.example", "*.example.org:8443", "xn--bcher-kva.example"]
    assert "data.example, *.example.org:8443" in office.get(answer["Location"] + f"{agent.pk}/change/").content.decode()


@pytest.mark.parametrize(
    ("field", "typed"),
    [
        ("route", "scripted, e2c"),
        ("languages", ["cobol"]),
        ("packages", "git+https://example.org/x"),
        ("packages", "emoji>=2"),
        ("network_allow", "https://example.org"),
        ("network_allow", "user@example.org"),
        ("network_allow", "example.org:0"),
        ("network_allow", "10.1.2.3/24"),
        ("network_allow", "0.0.0.0/0"),
        ("network_allow", "0x7f.1"),
        ("tools", "Run-Code"),
        ("timeout_max_seconds", "5"),
    ],
)
def test_what_an_agent_cannot_use_is_an_error_of_that_field(office, agent, field, typed):
    answer = save(office, agent, {**AGENT, **NO_ROWS, field: typed})

    assert list(errors(answer)) == [field]


def test_a_change_is_written_down_with_before_and_after_once(office, operator, agent):
    Agent.objects.filter(pk=agent.pk).update(route=["scripted"], languages=["python"], tools=[], packages=[])

    save(office, agent, {**AGENT, **NO_ROWS, "tools": "", "packages": "", "timeout_seconds": "30"})

    event = AuditEvent.objects.get()
    assert (event.action, event.subject, event.actor, event.team) == ("agent_changed", agent.pk, operator, agent.team)
    assert (event.before, event.after) == ({"timeout_seconds": 60}, {"timeout_seconds": 30})
    assert not LogEntry.objects.exists()


def test_saving_without_a_change_writes_nothing_down(office, agent):
    Agent.objects.filter(pk=agent.pk).update(route=["scripted"], languages=["python"], tools=[], packages=[])

    save(office, agent, {**AGENT, **NO_ROWS, "tools": "", "packages": ""})

    assert not AuditEvent.objects.exists()


def test_an_agents_quotas_are_made_changed_and_removed_on_its_page(office, agent):
    def quotas(**fields) -> dict:
        shape = {**NO_ROWS, "quotas-TOTAL_FORMS": "1", "quotas-0-agent": agent.pk}
        return {**AGENT, **shape, **{f"quotas-0-{name}": value for name, value in fields.items()}}

    save(office, agent, quotas(id="", unit="nano_usd", window="day", limit="1.5"))
    quota = Quota.objects.get()
    assert (quota.agent, quota.limit) == (agent, 1_500_000_000)

    save(office, agent, {**quotas(id=quota.pk, limit="2"), "quotas-INITIAL_FORMS": "1"})
    quota.refresh_from_db()
    assert quota.limit == 2_000_000_000

    save(office, agent, {**quotas(id=quota.pk, limit="2", DELETE="on"), "quotas-INITIAL_FORMS": "1"})
    assert not Quota.objects.exists()

    told = AuditEvent.objects.filter(subject=f"quota {quota.pk}").order_by("pk")
    assert [event.action for event in told] == ["quota_made", "quota_changed", "quota_deleted"]
    assert (told[1].before, told[1].after) == ({"limit": 1_500_000_000}, {"limit": 2_000_000_000})


def test_a_budget_is_typed_in_dollars(office, team):
    answer = office.post(
        reverse("admin:executions_quota_add"),
        {"team": team.pk, "unit": "nano_usd", "window": "day", "limit": "0.000000007"},
    )

    assert answer.status_code == 302
    assert Quota.objects.get().limit == 7


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        ({"unit": "executions", "window": "day", "limit": "1.5"}, "limit"),
        ({"unit": "concurrent_executions", "window": "day", "limit": "4"}, "window"),
        ({"unit": "nano_usd", "window": "day", "limit": "-1"}, "limit"),
        ({"unit": "bytes_stored", "window": "total", "limit": "1", "each": "user"}, "user"),
        ({"unit": "executions", "window": "day", "limit": "1", "each": "user", "user": "ann"}, "user"),
    ],
)
def test_a_quota_that_means_nothing_is_an_error_of_that_field(office, team, typed, field):
    answer = office.post(reverse("admin:executions_quota_add"), {"team": team.pk, **typed})

    assert list(errors(answer)) == [field]


def test_a_quota_of_each_agent_is_made_and_says_so(office, team):
    typed = {"team": team.pk, "unit": "executions", "window": "day", "limit": "5", "each": "agent"}
    assert office.post(reverse("admin:executions_quota_add"), typed).status_code == 302

    assert "each agent" in Quota.objects.get().scope_name
    assert "each agent" in office.get(reverse("admin:executions_quota_changelist")).content.decode()


def test_a_raise_says_why(office, team):
    quota = Quota.objects.create(team=team, unit="executions", window="day", limit=5)
    typed = {"limit": "5", "raised_by": "2", "raised_until_0": "2030-01-01", "raised_until_1": "12:00:00"}
    page = reverse("admin:executions_quota_change", args=[quota.pk])

    assert list(errors(office.post(page, typed))) == ["raised_why"]
    assert office.post(page, {**typed, "raised_why": "the demo"}).status_code == 302
    quota.refresh_from_db()
    assert (quota.raised_by, quota.raised_why) == (2, "the demo")


def test_a_quota_has_one_owner(office, agent):
    typed = {"team": agent.team.pk, "agent": agent.pk, "unit": "executions", "window": "day", "limit": "5"}

    answer = office.post(reverse("admin:executions_quota_add"), typed)

    assert "belongs to one" in str(errors(answer)["__all__"])


def test_raising_a_budget_keeps_what_is_used_and_reserved(office, team):
    quota = Quota.objects.create(team=team, unit=Unit.NANO_USD, window=Window.DAY, limit=10**9, used=5, reserved=7)

    save(office, quota, {"limit": "3", "unit": "executions", "window": "total", "used": "0", "reserved": "0"})

    quota.refresh_from_db()
    assert (quota.limit, quota.used, quota.reserved) == (3 * 10**9, 5, 7)
    assert (quota.unit, quota.window, quota.team) == (Unit.NANO_USD, Window.DAY, team)


def test_a_new_key_is_shown_once_and_works(office, operator, agent):
    typed = {"name": "ci", "team": agent.team.pk, "agent": agent.pk, "scopes": ["run", "read"], "backend": ""}

    shown = office.post(reverse("admin:executions_apikey_add"), typed)

    token = re.search(r"sg_[0-9a-f]{88}", shown.content.decode())[0]
    assert "no-store" in shown.headers["Cache-Control"]
    caller = keys.authenticate(token)
    assert (caller.agent, caller.key.created_by, caller.scopes) == (agent, operator, {"run", "read"})
    key = ApiKey.objects.get()
    page = reverse("admin:executions_apikey_change", args=[key.pk])
    later = [office.get(address).content.decode() for address in (page, "/admin/", page)]
    assert not any(token in text for text in later)
    assert token not in str(dict(office.session)) + str(office.cookies)


def test_neither_token_nor_digest_is_in_the_audit(office, agent):
    typed = {"name": "ci", "team": agent.team.pk, "agent": agent.pk, "scopes": ["run"], "backend": ""}

    office.post(reverse("admin:executions_apikey_add"), typed)

    event = AuditEvent.objects.get()
    assert event.action == "key_made"
    assert event.after["digest"] == "(secret)"
    assert ApiKey.objects.get().digest not in str(event.after)


def test_a_key_for_another_teams_agent_is_refused(office, agent, eve):
    typed = {
        "name": "ci",
        "team": Team.objects.get(name="Elsewhere").pk,
        "agent": agent.pk,
        "scopes": ["run"],
        "backend": "",
    }

    answer = office.post(reverse("admin:executions_apikey_add"), typed)

    assert list(errors(answer)) == ["agent"]
    assert not ApiKey.objects.exists()


def test_keys_are_revoked_never_deleted(office, agent):
    key, _ = keys.make_key(team=agent.team, agent=agent, name="ci")

    answer = office.post(reverse("admin:executions_apikey_delete", args=[key.pk]), {"post": "yes"})

    assert answer.status_code == 403


def test_a_changed_password_is_written_down_without_it(office, ada):
    address = reverse("admin:auth_user_password_change", args=[ada.pk])

    office.post(address, {"password1": "battery staple 9", "password2": "battery staple 9", "usable_password": "true"})

    ada.refresh_from_db()
    assert ada.check_password("battery staple 9")
    event = AuditEvent.objects.get(action="user_changed")
    assert (event.before, event.after) == ({"password": "(secret)"}, {"password": "(secret)"})


def test_a_template_is_typed_as_lines_and_ticks(office, template):
    sizes = {"cpu_count": "2", "memory_mib": "1024", "disk_mib": "512"}
    typed = {"name": "data", "languages": ["python", "bash"], "env": "A=1\nB=x=y\n", "is_active": "on", **sizes}
    typed |= {"packages": "emoji>=2\n\n attrs\n", "files": '{"a.txt": "A"}', "start_command": "make all"}

    assert save(office, template, typed).status_code == 302

    template = Template.objects.get(pk=template.pk)
    assert (template.languages, template.env) == (["python", "bash"], {"A": "1", "B": "x=y"})
    assert (template.packages, template.files) == (["emoji>=2", "attrs"], {"a.txt": "A"})
    assert (template.start_command, template.warm) == ("make all", False)


@pytest.mark.parametrize(("field", "typed"), [("packages", "git+https://example.org/x"), ("files", '{"../x": ""}')])
def test_what_a_template_cannot_hold_is_said_at_its_field(office, template, field, typed):
    sizes = {"cpu_count": "2", "memory_mib": "1024", "disk_mib": "512"}

    answer = save(office, template, {"name": "data", "is_active": "on", **sizes, field: typed})

    assert list(answer.context["adminform"].form.errors) == [field]


def test_a_rate_is_typed_in_dollars(office):
    typed = {
        "backend": "scripted",
        "meter": "vcpu_second",
        "nano_usd": "0.000014",
        "valid_from_0": "2026-11-01",
        "valid_from_1": "00:00",
    }

    answer = office.post(reverse("admin:executions_rate_add"), typed)

    assert answer.status_code == 302
    assert Rate.objects.get().nano_usd == 14_000
