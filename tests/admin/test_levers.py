"""Levers say what will happen, ask for a reason, do it, and are written down."""

from __future__ import annotations

import html
import re
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.urls import reverse
from django.utils import timezone

from executions import backends, keys
from executions.backends.base import SandboxSpec
from executions.errors import Forbidden, Unauthenticated
from executions.models import AuditEvent, Delivery, Sandbox, Transition, Webhook
from executions.sealing import opened, sealed
from executions.states import SandboxState
from tests.admin.conftest import a_run, a_sandbox, caller_of


def select(office, model: str, lever: str, *rows, **fields):
    address = reverse(f"admin:executions_{model}_changelist")
    return office.post(address, {"action": lever, "_selected_action": [row.pk for row in rows], **fields}, follow=True)


def audited(action: str) -> AuditEvent:
    return AuditEvent.objects.get(action=action)


def test_a_lever_says_what_will_happen_and_does_nothing_without_a_reason(office, agent, template):
    run = a_run(agent, template)

    asked = select(office, "execution", "cancel", run)
    blank = select(office, "execution", "cancel", run, reason="  ")

    assert "1 execution will be stopped within a second" in asked.content.decode()
    assert "Say why" in blank.content.decode()
    run.refresh_from_db()
    assert run.cancel_requested_at is None
    assert not AuditEvent.objects.exists()


def test_cancelling_asks_each_open_execution_to_end(office, operator, agent, template):
    runs = [a_run(agent, template), a_run(agent, template)]
    ended = a_run(agent, template, "queued", "starting", "running", "succeeded")

    said = select(office, "execution", "cancel", *runs, ended, reason="runaway loop")

    assert "2 executions asked to end" in said.content.decode()
    for run in runs:
        run.refresh_from_db()
        assert run.cancel_reason == "runaway loop"
    written = AuditEvent.objects.filter(action="execution_cancelled")
    assert {(event.subject, event.actor, event.reason, event.team) for event in written} == {
        (run.pk, operator, "runaway loop", agent.team) for run in runs
    }


def test_one_execution_is_cancelled_from_its_own_page(office, agent, template):
    run = a_run(agent, template)
    page = reverse("admin:executions_execution_change", args=[run.pk])

    offered = office.get(page).content.decode()
    office.post(f"{page.removesuffix('change/')}cancel/", {"reason": "wrong data"})

    assert f"{run.pk}/cancel/" in offered
    run.refresh_from_db()
    assert run.cancel_reason == "wrong data"


def test_an_ended_execution_offers_no_lever(office, agent, template):
    run = a_run(agent, template, "queued", "starting", "running", "succeeded")

    shown = office.get(reverse("admin:executions_execution_change", args=[run.pk])).content.decode()

    assert "/cancel/" not in shown


def test_killing_ends_sandboxes_and_says_so(office, operator, agent, template):
    one, two = a_sandbox(agent, template), a_sandbox(agent, template, kept=True)

    said = select(office, "sandbox", "kill", one, two, reason="left over")

    assert "2 sandboxes gone" in said.content.decode()
    assert list(Sandbox.objects.values_list("state", "end_reason")) == [(SandboxState.GONE, "killed")] * 2
    assert AuditEvent.objects.filter(action="sandbox_killed", actor=operator, reason="left over").count() == 2


def test_sessions_are_paused_and_resumed_by_the_pull_of_a_lever(office, agent, template):
    machine = async_to_sync(backends.get("scripted").create)(SandboxSpec("sbxlever", "default", 600))
    until = timezone.now() + timedelta(minutes=5)
    live = a_sandbox(agent, template, kept=True, handle=machine, leased_until=until)
    dead = a_sandbox(agent, template, kept=True, handle={"sandbox_id": "none"}, leased_until=until)

    paused = select(office, "sandbox", "pause", live, dead, reason="over the weekend").content.decode()
    live.refresh_from_db()
    state = live.state
    resumed = select(office, "sandbox", "resume", live, dead, reason="monday").content.decode()

    assert ("1 session paused" in paused, "its sandbox died" in paused, state) == (True, True, SandboxState.PAUSED)
    assert "1 session resumed" in resumed
    live.refresh_from_db()
    assert live.state == SandboxState.LEASED
    assert (audited("session_paused").subject, audited("session_resumed").reason) == (live.pk, "monday")


def test_a_kill_that_is_not_confirmed_is_said_and_stays_pending(office, agent, template, scripted):
    scripted["BEHAVES"] = "loses_kills"
    sandbox = a_sandbox(agent, template, handle={"sandbox_id": "x"})

    said = select(office, "sandbox", "kill", sandbox, reason="left over")

    assert "1 kill not confirmed yet" in said.content.decode()
    sandbox.refresh_from_db()
    assert sandbox.state == SandboxState.RETIRING


def test_an_agent_that_is_switched_off_is_refused_until_it_is_switched_on(office, agent):
    select(office, "agent", "switch_off", agent, reason="cost spike")
    agent.refresh_from_db()

    with pytest.raises(Forbidden):
        caller_of(agent).acting_as(None)
    event = audited("agent_switched_off")
    assert (event.before, event.after, event.reason) == ({"is_active": True}, {"is_active": False}, "cost spike")

    select(office, "agent", "switch_on", agent, reason="fixed")
    agent.refresh_from_db()

    assert caller_of(agent).acting_as(None).agent == agent
    assert audited("agent_switched_on").reason == "fixed"


def test_a_revoked_key_is_refused(office, agent):
    key, token = keys.make_key(team=agent.team, agent=agent, name="leaked")

    select(office, "apikey", "revoke", key, reason="in a public repository")

    with pytest.raises(Unauthenticated):
        keys.authenticate(token)
    assert audited("key_revoked").subject == key.pk


def test_a_sign_in_link_is_shown_once_and_signs_that_person_in(office, client, ada):
    page = reverse("admin:executions_user_change", args=[ada.pk]).removesuffix("change/")

    shown = office.post(f"{page}sign_in_link/", {"reason": "lost hers"})

    path = re.search(r"(/sign-in/[\w-]+)", shown.content.decode())[1]
    assert "no-store" in shown.headers["Cache-Control"]
    assert keys.redeem_sign_in(path.removeprefix("/sign-in/")) == ada
    assert path not in str(list(AuditEvent.objects.values()))


def test_only_a_superuser_makes_sign_in_links(client, ada, bob):
    from django.contrib.auth.models import Permission

    ada.is_staff = True
    ada.save()
    ada.user_permissions.set(Permission.objects.filter(codename__in=["view_user", "change_user"]))
    client.force_login(ada)
    page = reverse("admin:executions_user_change", args=[bob.pk])

    assert client.get(page).status_code == 200
    assert client.post(f"{page.removesuffix('change/')}sign_in_link/", {"reason": "me"}).status_code == 403


def test_rebuilding_a_template_makes_it_another_build_and_is_written_down(office, operator, template):
    said = select(office, "template", "rebuild", template, reason="a newer numpy").content.decode()

    assert "1 template will be built anew" in said
    template.refresh_from_db()
    assert template.build == 1
    event = audited("template_rebuilt")
    assert (event.actor, event.reason, event.before) == (operator, "a newer numpy", {"build": 0})


def test_the_page_of_a_template_says_how_it_is_at_each_backend(office, template):
    page = reverse("admin:executions_template_change", args=[template.pk])

    assert "scripted: ready" in office.get(page).content.decode()


@pytest.fixture
def told(agent, template):
    """A webhook with one message that nobody took, and one that waits."""
    run = a_run(agent, template)
    webhook = Webhook.objects.create(
        team=agent.team, url="https://told.example/", secret=sealed("whsec_AAAA", "webhook")
    )
    one, two, *_ = Transition.objects.filter(execution=run)
    now = timezone.now()
    dead = {"state": "dead", "tries": 10, "ended_at": now, "error": "Answered 500", "status": 500}
    Delivery.objects.create(webhook=webhook, execution=run, transition=one, **dead)
    Delivery.objects.create(webhook=webhook, execution=run, transition=two)
    return webhook


def test_dead_messages_are_sent_again_one_by_one_or_all_of_a_webhook(office, told):
    dead = Delivery.objects.get(state="dead")
    one = select(office, "delivery", "resend", *Delivery.objects.all(), reason="it is up again").content.decode()
    Delivery.objects.filter(pk=dead.pk).update(state="dead", ended_at=timezone.now())
    page = reverse("admin:executions_webhook_change", args=[told.pk]).removesuffix("change/")
    asked = office.get(f"{page}resend_dead/").content.decode()
    office.post(f"{page}resend_dead/", {"reason": "it is up again"})

    assert "1 message will be sent again." in one, "what waits anyway is left alone"
    assert "1 dead message will be sent again" in asked
    dead.refresh_from_db()
    assert (dead.state, dead.tries, dead.ended_at) == ("pending", 0, None)
    events = AuditEvent.objects.filter(action="webhook_resent", subject=told.pk, reason="it is up again")
    assert [event.after for event in events] == [{"deliveries": 1}] * 2


def test_a_webhook_is_switched_off_and_on_and_passes_over_what_happened_meanwhile(office, told, agent, template):
    select(office, "webhook", "switch_off", told, reason="moving house")
    a_run(agent, template)
    asked = select(office, "webhook", "switch_on", told).content.decode()
    select(office, "webhook", "switch_on", told, reason="moved")

    told.refresh_from_db()
    assert (told.is_active, told.cursor) == (True, Transition.objects.latest("pk").pk)
    assert "told of what happens from now on. 1 message that waits will be sent." in asked
    assert [e.reason for e in AuditEvent.objects.filter(action="webhook_changed").order_by("seq")] == [
        "moving house",
        "moved",
    ]


def test_a_webhooks_new_secret_is_shown_once_and_the_former_one_signs_on(office, told):
    page = reverse("admin:executions_webhook_change", args=[told.pk]).removesuffix("change/")
    former = told.secret

    shown = office.post(f"{page}rotate/", {"reason": "somebody left"}).content.decode()

    told.refresh_from_db()
    secret = re.search(r"whsec_[\w+/=]+", html.unescape(shown))[0]
    assert (opened(told.secret, "webhook"), told.former_secret) == (secret, former)
    assert told.former_until > timezone.now()
    assert secret not in str(list(AuditEvent.objects.values()))
    assert secret not in office.get(f"{page}change/").content.decode()


def test_a_test_message_of_a_webhook_says_what_came_back(office, told):
    Webhook.objects.update(url="https://10.0.0.1/")

    said = select(office, "webhook", "test", told, reason="does it listen").content.decode()

    assert "not taken: 10.0.0.1 is not public" in said
    assert audited("webhook_tested").after["status"] is None


def test_a_webhooks_page_says_what_waits_and_what_is_dead(office, told):
    page = office.get(reverse("admin:executions_webhook_change", args=[told.pk])).content.decode()
    dead = re.search(r'href="([^"]+state__exact=dead)"', page)[1]

    assert "Answered 500" in page
    assert Delivery.objects.get(state="dead").pk in office.get(html.unescape(dead)).content.decode()
    assert Delivery.objects.get(state="pending").pk not in office.get(html.unescape(dead)).content.decode()
