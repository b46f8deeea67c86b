"""The pages, asked for directly: who may see what, and what the headers forbid."""

from __future__ import annotations

import hashlib
import re
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as live
from django.test import Client
from django.utils import timezone

from executions import backends, breaker, keys, store
from executions.backends.base import SandboxSpec
from executions.models import (
    Agent,
    ApiKey,
    Artifact,
    AuditEvent,
    BackendState,
    Egress,
    Event,
    Execution,
    Sandbox,
    Template,
)
from executions.states import ExecutionState, SandboxState

pytestmark = pytest.mark.django_db
E, S = ExecutionState, SandboxState


@pytest.fixture
def template(db) -> Template:
    return Template.objects.create(name="default")


@pytest.fixture
def session(ada, team, template) -> Sandbox:
    caller = keys.caller_for(ada)
    return Sandbox.born(
        S.BOOTING,
        S.LEASED,
        team=team,
        agent=caller.agent,
        template=template,
        backend="local",
        kept=True,
        leased_until=timezone.now(),
    )


@pytest.fixture
def run(ada, team, session) -> Execution:
    code = "print('needle')"
    run = Execution.born(
        E.RUNNING,
        team=team,
        agent=session.agent,
        actor=ada,
        sandbox=session,
        code=code,
        code_sha256=hashlib.sha256(code.encode()).hexdigest(),
    )
    Event.objects.create(execution=run, seq=1, kind="stdout", data={"text": "out\n"})
    Event.objects.create(execution=run, seq=2, kind="stderr", data={"text": "err\n"})
    Event.objects.create(execution=run, seq=3, kind="result", data={"mime": {"text/html": "<script>1</script>"}})
    run.advance(E.SUCCEEDED)
    return run


def as_(person) -> Client:
    client = Client(headers={"Accept": "text/html"})
    client.force_login(person)
    return client


def addresses(session: Sandbox, run: Execution) -> list[str]:
    one_session = [f"/sessions/{session.pk}{rest}" for rest in ("", "/files", "/files/download?path=x")]
    return [*one_session, *(f"/runs/{run.pk}{rest}" for rest in ("", "/output.txt", "/frames/3"))]


def test_nobody_sees_anything_before_signing_in(session, run):
    for address in ["/", "/runs", "/usage", "/keys", *addresses(session, run)]:
        answer = Client(headers={"Accept": "text/html"}).get(address)
        assert (answer.status_code, answer["Location"].split("?")[0]) == (302, "/sign-in"), address


def test_the_team_sees_its_own(ada, bob, session, run):
    for person in (ada, bob):
        for address in ["/", "/runs", "/usage", "/keys", f"/sessions/{session.pk}", f"/runs/{run.pk}"]:
            assert as_(person).get(address).status_code == 200, address


def test_a_runs_page_tells_what_went_out_and_what_was_refused(ada, run):
    Sandbox.objects.filter(pk=run.sandbox_id).update(network_allow=["data.example"])
    Egress.objects.create(
        sandbox_id=run.sandbox_id, execution=run, number=1, host="data.example", port=443, address="192.0.2.1", verdict="allowed",
        bytes_out=10, bytes_in=2048,
    )  # fmt: skip
    Egress.objects.create(
        sandbox_id=run.sandbox_id, execution=run, number=2, host="<b>evil", port=443, verdict="denied", times=3, reason="no rule"
    )  # fmt: skip

    page = as_(ada).get(f"/runs/{run.pk}").content.decode()

    assert 'Network <span class="muted">data.example</span>' in page
    assert "data.example:443</code> 10 B out, 2.0 kB in" in page
    assert "&lt;b&gt;evil:443</code> 3 times: no rule" in page


def test_pages_say_that_the_network_is_off(ada, session, run):
    for address in ("/", f"/sessions/{session.pk}"):
        assert "network off" in " ".join(as_(ada).get(address).content.decode().split())


def test_another_teams_pages_do_not_exist(eve, session, run):
    for address in addresses(session, run):
        assert as_(eve).get(address).status_code == 404, address
    for address in (f"/sessions/{session.pk}/end", f"/sessions/{session.pk}/packages", f"/runs/{run.pk}/cancel"):
        answer = as_(eve).post(address, {"packages": ["x"]}, content_type="application/json")
        assert answer.status_code == 404, address
    assert b"needle" not in as_(eve).get("/runs?q=needle").content.replace(b'value="needle"', b"")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", 1),
        ("q=needle", 1),
        ("q=straw", 0),
        ("state=failed", 0),
        ("state=succeeded&language=python", 1),
        ("agent=x", 0),
    ],
)
def test_runs_are_filtered(ada, run, query, found):
    assert as_(ada).get(f"/runs?{query}").content.count(f"/runs/{run.pk}".encode()) == found


def test_runs_are_paged_without_a_gap(ada, run, team, monkeypatch):
    from executions.console import pages

    monkeypatch.setattr(pages, "PAGE", 2)
    for _ in range(4):
        Execution.born(E.QUEUED, team=team, agent=run.agent, code="1", code_sha256="", created_at=run.created_at)
    client, address, seen = as_(ada), "/runs", []

    while address:
        answer = client.get(address)
        seen += [r.pk for r in answer.context["runs"]]
        address = f"/runs?{answer.context['older']}" if answer.context["older"] else ""

    assert sorted(seen) == sorted(Execution.objects.values_list("pk", flat=True))
    assert len(seen) == 5


def test_only_our_own_scripts_and_styles_run(ada, run):
    policy = as_(ada).get(f"/runs/{run.pk}")["Content-Security-Policy"]

    assert "unsafe" not in policy
    assert "script-src 'self'" in policy
    assert "style-src 'self'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy


def test_html_as_its_author_meant_it_has_an_origin_of_its_own_and_no_network(ada, run):
    answer = as_(ada).get(f"/runs/{run.pk}/frames/3")

    assert answer.content == b"<script>1</script>"
    assert "sandbox allow-scripts;" in answer["Content-Security-Policy"]
    assert "default-src 'none'" in answer["Content-Security-Policy"]
    assert "allow-same-origin" not in answer["Content-Security-Policy"]


def test_the_whole_output_is_a_file(ada, run):
    answer = as_(ada).get(f"/runs/{run.pk}/output.txt")

    assert answer.content == b"out\nerr\n"
    assert answer["Content-Disposition"] == f'attachment; filename="{run.pk}.txt"'


async def whole(answer) -> bytes:
    return b"".join([piece async for piece in answer.streaming_content])


def test_kept_files_are_listed_and_saved_by_the_team_alone(ada, bob, eve, run, session, settings, tmp_path):
    settings.ARTIFACTS_DIR = str(tmp_path)
    incoming = store.Incoming()
    incoming.write(b"<script>1</script>")
    incoming.settle()
    incoming.close()
    name = "outputs/<b>.html"
    kept = {"team": run.team, "sandbox": session, "name": name, "mime": "text/html", "size_bytes": 18,
            "sha256": incoming.sha256, "expires_at": timezone.now() + timedelta(days=1)}  # fmt: skip
    file = Artifact.objects.create(execution=run, **kept)
    Sandbox.objects.update(kept_said="1 file kept (18 bytes).")

    pages = [as_(bob).get(path).content.decode() for path in (f"/runs/{run.id}", f"/sessions/{session.id}")]
    saved = as_(ada).get(f"/artifacts/{file.id}", headers={"Range": "bytes=0-7"})

    assert all(f'href="/artifacts/{file.id}"' in page and "outputs/&lt;b&gt;.html" in page for page in pages)
    assert "1 file kept (18 bytes)." in pages[1]
    assert (saved.status_code, async_to_sync(whole)(saved)) == (206, b"<script>")
    assert saved["Content-Type"] == "application/octet-stream"
    assert saved["Content-Disposition"].startswith("attachment")
    assert as_(eve).get(f"/artifacts/{file.id}").status_code == 404
    assert Client().get(f"/artifacts/{file.id}").status_code == 401


def test_a_session_is_paused_from_its_page_and_offers_to_resume(ada, bob, session, settings):
    settings.SANDBOXES = {"local": {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}}
    backends._live.clear()
    handle = async_to_sync(backends.get("local").create)(SandboxSpec("sbxpaged", "default", 600))
    Sandbox.objects.update(handle=handle, leased_until=timezone.now() + timedelta(minutes=5))
    page = f"/sessions/{session.id}"

    offered = as_(ada).get(page).content.decode()
    refused = as_(bob).post(f"{page}/pause")
    as_(ada).post(f"{page}/pause")
    paused = as_(ada).get(page).content.decode()
    as_(ada).post(f"{page}/resume")
    session.refresh_from_db()

    assert f'action="{page}/pause"' in offered
    assert refused.status_code == 403
    assert f'action="{page}/resume"' in paused
    assert f'action="{page}/pause"' not in paused
    assert session.state == S.LEASED
    backends._live.clear()


def test_a_link_signs_in_once(ada):
    link, client = keys.make_sign_in_link(ada), Client()

    assert client.head(link).status_code == 405  # a preview does not use it up
    assert client.get(link, headers={"Sec-Purpose": "prefetch"}).status_code == 410
    assert client.get(link).status_code == 302
    assert client.get("/").status_code == 200
    assert Client().get(link).status_code == 410
    assert AuditEvent.objects.filter(action="sign_in", actor=ada).count() == 1


def test_the_session_cookie_is_out_of_reach_of_scripts_and_other_sites(ada):
    cookie = Client().get(keys.make_sign_in_link(ada)).cookies["sessionid"]

    assert cookie["httponly"]
    assert cookie["samesite"] == "Lax"


def test_a_sign_in_never_leads_to_another_site(ada):
    client = Client()
    client.get("/sign-in?next=https://evil.example/")

    assert client.get(keys.make_sign_in_link(ada))["Location"] == "/"


def test_forms_need_the_token_of_the_page(ada):
    client = Client(enforce_csrf_checks=True)
    client.force_login(ada)

    assert client.post("/keys", {"name": "x"}).status_code == 403
    assert client.post("/sessions").status_code == 403


def test_a_key_has_its_makers_scopes_at_most_and_is_shown_once(ada):
    answer = as_(ada).post("/keys", {"name": "laptop", "agent": keys.caller_for(ada).agent.name, "days": "30"})

    token = answer.context["token"]
    assert keys.authenticate(token).scopes == {"run", "read"}
    assert token.encode() in answer.content
    assert token.encode() not in as_(ada).get("/keys").content
    assert "no-store" in answer["Cache-Control"]


def test_a_viewer_makes_and_revokes_no_keys(ada, bob, agent):
    key, _ = keys.make_key(team=agent.team, agent=agent, name="etl", created_by=ada)

    assert as_(bob).post("/keys", {"name": "mine", "agent": "etl"}).status_code == 403
    assert as_(bob).post(f"/keys/{key.pk}/revoke").status_code == 403
    assert ApiKey.objects.get().is_live
    assert as_(ada).post(f"/keys/{key.pk}/revoke").status_code == 302
    assert not ApiKey.objects.get().is_live


def test_a_name_that_is_a_script_is_only_text(ada, session):
    Sandbox.objects.filter(pk=session.pk).update(name="</script><script>alert(1)</script>")

    for address in ("/", f"/sessions/{session.pk}"):
        assert b"<script>alert" not in as_(ada).get(address).content


def test_examples_name_this_installation_and_the_persons_own_key(ada, template):
    keys.make_key(team=ada.memberships.get().team, name="adas laptop", created_by=ada)

    page = as_(ada).get("/").content.decode()

    assert f"curl -s {live.PUBLIC_URL}/api/v1/executions" in page
    assert "adas laptop" in page


def test_lists_cost_a_constant_number_of_queries(ada, run, team, django_assert_max_num_queries):
    for _ in range(10):
        Execution.born(E.QUEUED, team=team, agent=run.agent, code="1", code_sha256="")

    for address, most in (
        ("/", 16),
        ("/runs", 14),
        ("/usage", 26),
        ("/keys", 14),
    ):  # the first look at usage adds up what is new
        client = as_(ada)
        with django_assert_max_num_queries(most):
            client.get(address)


def test_a_banner_says_which_backend_is_out_since_when_and_what_happens_now(ada, settings):
    scripted = {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}
    settings.SANDBOXES = {"e2b": scripted, "local": scripted}
    client = as_(ada)
    assert b"is out since" not in client.get("/").content

    breaker.failed("e2b", "503 from E2B", began=timezone.now(), retry_after=1)
    page = client.get("/").content.decode()
    assert f"E2B is out since {timezone.now():%H:%M} UTC (503 from E2B); next try in 1 s. New runs go to" in page

    BackendState.objects.update(retry_at=timezone.now())
    breaker.answered("e2b", breaker.claim("e2b"), "")
    assert b"is out since" not in client.get("/").content


@pytest.fixture
def places(settings, run) -> None:
    """Two backends: `near`, which can take the run, and `far`, which is out."""
    one = {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}
    settings.SANDBOXES = {"far": one, "near": one}
    Agent.objects.filter(pk=run.agent_id).update(isolation_floor="none", route=["near"])
    breaker.failed("far", "503 from far", began=timezone.now(), retry_after=60)


def test_a_run_is_run_again_where_its_owner_chose_and_once_though_the_form_is_sent_twice(ada, run, places):
    page = as_(ada).get(f"/runs/{run.pk}").content.decode()
    once = re.search(r'name="once" value="(\w+)"', page)[1]
    answers = [as_(ada).post(f"/runs/{run.pk}/rerun", {"route": "near", "once": once}) for _ in range(2)]
    other = as_(ada).post(f"/runs/{run.pk}/rerun", {"route": "", "once": once})

    assert '<option value="near">on near</option>' in page
    assert re.search(r'<option value="far" disabled>on far: out since [^<]*503 from far', page)
    assert [answer.status_code for answer in answers] == [302, 302]
    assert answers[0]["Location"] == answers[1]["Location"]
    assert (other.status_code, other["Location"] != answers[0]["Location"]) == (302, True)
    again = Execution.objects.get(pk=answers[0]["Location"].removeprefix("/runs/"))
    assert again.parent == run
    assert (answers[0]["Location"], again.code, again.route) == (f"/runs/{again.pk}", run.code, ["near"])
    assert f'href="/runs/{run.pk}"' in as_(ada).get(f"/runs/{again.pk}").content.decode()


def test_a_run_is_run_again_by_nobody_who_may_not(bob, eve, run, places):
    assert "/rerun" not in as_(bob).get(f"/runs/{run.pk}").content.decode()
    assert [as_(person).post(f"/runs/{run.pk}/rerun").status_code for person in (bob, eve)] == [403, 404]
    assert not Execution.objects.filter(parent=run).exists()
