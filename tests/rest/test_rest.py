"""The REST door: what it accepts, what it refuses, and with which words."""

import pytest

from executions import keys, operations
from executions.backends.base import Backend
from executions.backends.scripted import ScriptedBackend
from executions.hop import rows
from executions.models import Artifact, Execution, Quota, Sandbox
from executions.operations import machines
from executions.serializers import SessionRequest
from executions.states import Scope, Unit, Window
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db
RUN = "/api/v1/executions"


async def test_a_run_answers_with_its_whole_record(call, agent):
    answer = await call("POST", RUN, {"code": "#> hi\n#= 42", "user": "u1", "workflow": "w", "metadata": {"a": "b"}})

    body = answer.json()
    assert answer.status_code == 201
    assert answer["Location"] == f"{RUN}/{body['id']}"
    assert answer["Request-Id"] == body["request_id"]
    assert (body["state"], body["logs"]["stdout"], body["results"]) == ("succeeded", "hi\n", [{"text/plain": "42"}])
    assert (body["agent"], body["user"], body["workflow"], body["metadata"]) == ("etl", "u1", "w", {"a": "b"})
    assert (body["cost_usd"], body["cost_nano_usd"]) == ("unpriced", None)  # this backend has no rates
    assert body["unpriced_charged_nano_usd"] > 0
    assert body["usage"]["run_seconds"] >= 0
    assert (await call("GET", body_path(body))).json()["id"] == body["id"]
    assert [e["id"] for e in (await call("GET", RUN)).json()["results"]] == [body["id"]]


async def test_what_went_out_is_part_of_the_record(call, agent):
    agent.network_allow = ["data.example"]
    await rows(agent.save)

    body = (await call("POST", RUN, {"code": "#@ data.example:443\n#@ evil.example:443"})).json()
    more = await call("POST", RUN, {"code": "#= 1", "network": ["evil.example"]})
    environment = (await call("GET", "/api/v1/environment")).json()

    assert [(e["host"], e["port"], e["verdict"], e["bytes_out"]) for e in body["egress"]] == [
        ("data.example", 443, "allowed", 10),
        ("evil.example", 443, "denied", 0),
    ]
    assert (await call("GET", body_path(body))).json()["egress"] == body["egress"]
    assert (more.status_code, more.json()["field"]) == (403, "network")
    assert "may not reach evil.example; allowed are: data.example" in more.json()["detail"]
    assert (environment["network"], environment["network_allow"]) == ("data.example", ["data.example"])


def body_path(body) -> str:
    return f"{RUN}/{body['id']}"


@pytest.mark.parametrize("token", [None, "", "sg_nonsense", "sg_" + "0" * 88, "e2b_" + "f" * 88])
async def test_a_missing_or_wrong_key_is_401(call, token):
    for method, path in (("POST", RUN), ("GET", RUN), ("GET", f"{RUN}/exe_x"), ("GET", "/api/v1/limits")):
        answer = await call(method, path, {"code": "#= 1"} if method == "POST" else None, token=token)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert answer["WWW-Authenticate"] == "Bearer"
        assert answer["Content-Type"] == "application/problem+json"


async def test_the_same_key_works_behind_e2bs_prefix_and_header(call, key):
    answer = await call("GET", RUN, token=None, **{"X-API-KEY": key.replace("sg_", "e2b_")})

    assert answer.status_code == 200


async def test_a_revoked_key_is_refused_at_once(call, agent):
    from django.utils import timezone

    agent_key = await agent.keys.afirst()
    await type(agent_key).objects.filter(pk=agent_key.pk).aupdate(revoked_at=timezone.now())

    assert (await call("GET", RUN)).status_code == 401


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "code"),
        ({"code": ""}, "code"),
        ({"code": "  \n"}, "code"),
        ({"code": 5}, "code"),
        ({"code": "x", "surprise": 1}, "surprise"),
        ({"code": "x", "timeout_seconds": -1}, "timeout_seconds"),
        ({"code": "x", "timeout_seconds": 10**9}, "timeout_seconds"),
        ({"code": "x", "language": "cobol"}, "language"),
        ({"code": "x", "template": "nowhere"}, "template"),
        ({"code": "x", "route": ["mars"]}, "route"),
        ({"code": "x", "env": {"a b": "c"}}, "env"),
        ({"code": "x", "files": {"a": "not base64!"}}, "files"),
        ({"script_path": "a.py"}, "session_id"),
        ({"code": "x", "session_id": "sbx_none"}, "session_id"),
        ([], "body"),
        ("x", "body"),
    ],
)
async def test_bad_input_is_refused_with_the_fields_name_and_nothing_is_stored(call, body, field):
    answer = await call("POST", RUN, body)

    problem = answer.json()
    assert answer.status_code == (404 if body == {"code": "x", "session_id": "sbx_none"} else 400)
    assert problem["field"].startswith(field), problem
    assert problem["detail"]
    assert problem["remedy"]
    assert problem["request_id"]
    assert not await Execution.objects.aexists()
    assert not await Sandbox.objects.aexists()


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"code": NaN'])
async def test_malformed_json_is_400(call, raw):
    answer = await call("POST", RUN, raw=raw)

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


async def test_code_over_a_megabyte_is_413(call):
    answer = await call("POST", RUN, {"code": "x" * 1_000_001})

    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


async def test_a_lone_surrogate_and_a_nul_in_the_code_break_nothing(call):
    answer = await call("POST", RUN, raw=b'{"code": "#> \\ud800\\u0000"}')

    assert answer.status_code in (201, 400)


async def test_over_quota_is_429_with_retry_after_and_over_budget_402(call, team):
    quota = await Quota.objects.acreate(team=team, unit=Unit.EXECUTIONS, window=Window.HOUR, limit=0)
    answer = await call("POST", RUN, {"code": "#= 1"})
    assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    assert 0 < int(answer["Retry-After"]) <= 3600

    await quota.adelete()
    await Quota.objects.acreate(team=team, unit=Unit.NANO_USD, window=Window.DAY, limit=1)
    answer = await call("POST", RUN, {"code": "#= 1"})
    assert (answer.status_code, answer.json()["code"]) == (402, "budget_exhausted")
    assert answer.json()["remaining"] == 1
    refusals = (await call("GET", "/api/v1/refusals")).json()["results"]
    assert {r["code"] for r in refusals} == {"quota_exceeded", "budget_exhausted"}


async def test_no_backend_is_503(call, agent):
    agent.route = ["gone"]
    await agent.asave()

    answer = await call("POST", RUN, {"code": "#= 1"})

    assert (answer.status_code, answer.json()["code"]) == (503, "no_backend")


async def test_respond_async_answers_202_and_events_stream_to_the_end(call):
    answer = await call("POST", RUN, {"code": "#> one\n#~ 0.3\n#> two\n#= 3"}, Prefer="respond-async")
    body = answer.json()
    assert (answer.status_code, body["state"]) == (202, "starting")

    streamed = await call("GET", f"{body_path(body)}/events")
    text = "".join([piece.decode() async for piece in streamed.streaming_content])

    assert streamed["Content-Type"] == "text/event-stream"
    kinds = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert kinds == ["stdout", "stdout", "result", "end"]
    assert '"state":"succeeded"' in text
    again = await call("GET", f"{body_path(body)}/events", **{"Last-Event-ID": "2"})
    text = "".join([piece.decode() async for piece in again.streaming_content])
    assert "id: 3" in text
    assert "id: 2" not in text


async def test_cancel_answers_202_and_the_run_has_been_cancelled(call):
    body = (await call("POST", RUN, {"code": "#~ 30"}, Prefer="respond-async")).json()

    answer = await call("POST", f"{body_path(body)}/cancel", {"reason": "enough"})
    assert answer.status_code == 202
    execution = await Execution.objects.aget(pk=body["id"])
    shape = await operations.wait(execution, 5)

    assert (shape.state, shape.detail) == ("cancelled", "enough")


async def test_an_idempotency_key_answers_again_and_refuses_another_body(call):
    one = await call("POST", RUN, {"code": "#= 1"}, **{"Idempotency-Key": "k1"})
    two = await call("POST", RUN, {"code": "#= 1"}, **{"Idempotency-Key": "k1"})
    other = await call("POST", RUN, {"code": "#= 2"}, **{"Idempotency-Key": "k1"})

    assert one.json()["id"] == two.json()["id"]
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_a_session_from_open_to_gone(call):
    opened = await call("POST", "/api/v1/sessions", {"name": "etl"})
    session = opened.json()
    where = f"/api/v1/sessions/{session['id']}"
    assert (opened.status_code, session["state"], session["backend"]) == (201, "leased", "first")
    run = await call("POST", RUN, {"code": "#= 1", "session_id": session["id"]})
    assert run.json()["session_id"] == session["id"]
    longer = await call("POST", f"{where}/timeout", {"timeout_seconds": 7200})
    assert longer.json()["end_at"] > session["end_at"]

    assert (await call("DELETE", where)).status_code == 204
    assert (await call("DELETE", where)).status_code == 204
    assert (await call("GET", where)).json()["end_reason"] == "finished"
    gone = await call("POST", RUN, {"code": "#= 1", "session_id": session["id"]})
    assert (gone.status_code, gone.json()["code"]) == (410, "session_gone")


@pytest.mark.parametrize("path", ["../x", "/home/user/../../etc/passwd", "a\x00b", "a\nb", "", "x" * 5000])
async def test_a_path_that_is_none_is_refused_before_any_sandbox_is_asked(call, path):
    from urllib.parse import quote

    session = (await call("POST", "/api/v1/sessions", {})).json()
    answer = await call("PUT", f"/api/v1/sessions/{session['id']}/files?path={quote(path)}", raw=b"x")

    assert (answer.status_code, answer.json()["code"]) == (400, "file_refused")


async def test_a_capability_that_a_backend_lacks_is_said_by_name(call, monkeypatch):
    monkeypatch.setattr(ScriptedBackend, "list_files", Backend.list_files)
    session = (await call("POST", "/api/v1/sessions", {})).json()
    answer = await call("GET", f"/api/v1/sessions/{session['id']}/files?path=/home/user&list=1")

    assert (answer.status_code, answer.json()["code"]) == (400, "unsupported")


async def test_lists_page_by_cursor_and_filter(call):
    for n in range(5):
        await call("POST", RUN, {"code": f"#= {n}", "workflow": f"w{n % 2}"})

    first = (await call("GET", f"{RUN}?limit=2")).json()
    assert len(first["results"]) == 2
    second = (await call("GET", first["next"])).json()
    assert not {e["id"] for e in first["results"]} & {e["id"] for e in second["results"]}
    filtered = (await call("GET", f"{RUN}?workflow=w1")).json()["results"]
    assert {e["workflow"] for e in filtered} == {"w1"}
    assert len(filtered) == 2
    assert len((await call("GET", f"{RUN}?q=%23%3D+3")).json()["results"]) == 1


async def test_environment_limits_and_templates_say_what_one_can_count_on(call, team):
    await Quota.objects.acreate(team=team, unit=Unit.NANO_USD, window=Window.DAY, limit=5 * 10**9)

    environment = (await call("GET", "/api/v1/environment")).json()
    limits = (await call("GET", "/api/v1/limits")).json()["results"]

    assert environment["route"] == ["first", "second"]
    assert "python" in environment["languages"]
    assert limits[0]["remaining_usd"] == "5"
    assert (await call("GET", "/api/v1/templates")).json()["results"][0]["name"] == "default"
    assert {b["alias"] for b in (await call("GET", "/api/v1/backends")).json()["results"]} == {
        "first",
        "second",
        "third",
    }


# Route × role × tenant: a route without a row here fails the test.


def rest_routes() -> set[str]:
    from executions.api.urls import urlpatterns

    return {str(p.pattern) for p in urlpatterns if str(p.pattern).startswith("api/v1/")}


MATRIX = {  # route: (method, what Ada's full key gets, a read-only key, Eve's key)
    "api/v1/executions": ("POST", 201, 403, 201),
    "api/v1/executions/<str:execution_id>": ("GET", 200, 200, 404),
    "api/v1/executions/<str:execution_id>/events": ("GET", 200, 200, 404),
    "api/v1/executions/<str:execution_id>/cancel": ("POST", 202, 403, 404),
    "api/v1/executions/<str:execution_id>/artifacts": ("GET", 200, 200, 404),
    "api/v1/executions/batch": ("POST", 202, 403, 202),
    "api/v1/executions/<str:execution_id>/rerun": ("POST", 202, 403, 404),
    "api/v1/artifacts/<str:artifact_id>": ("GET", 200, 200, 404),
    "api/v1/sessions": ("POST", 201, 403, 201),
    "api/v1/sessions/<str:session_id>": ("GET", 200, 200, 404),
    "api/v1/sessions/<str:session_id>/timeout": ("POST", 200, 403, 404),
    "api/v1/sessions/<str:session_id>/pause": ("POST", 200, 403, 404),
    "api/v1/sessions/<str:session_id>/resume": ("POST", 200, 403, 404),
    "api/v1/sessions/<str:session_id>/artifacts": ("GET", 200, 200, 404),
    "api/v1/sessions/<str:session_id>/commands": ("POST", 201, 403, 404),
    "api/v1/sessions/<str:session_id>/contexts": ("POST", 201, 403, 404),
    "api/v1/sessions/<str:session_id>/contexts/<str:context_id>": ("DELETE", 204, 403, 404),
    "api/v1/sessions/<str:session_id>/contexts/<str:context_id>/restart": ("POST", 204, 403, 404),
    "api/v1/sessions/<str:session_id>/files": ("PUT", 201, 403, 404),
    "api/v1/sessions/<str:session_id>/packages": ("POST", 403, 403, 404),  # 403: the agent's list is empty
    "api/v1/sandboxes": ("GET", 200, 200, 200),
    "api/v1/sandboxes/<str:sandbox_id>": ("DELETE", 202, 403, 404),
    "api/v1/workflows/<path:workflow>": ("GET", 200, 200, 404),
    "api/v1/workflows/<path:workflow>/cancel": ("POST", 202, 403, 404),
    "api/v1/agents": ("POST", 403, 403, 403),  # these need a key of the team: test_access.py
    "api/v1/agents/<str:agent_id>": ("GET", 200, 200, 404),
    "api/v1/agents/<str:agent_id>/packages": ("GET", 200, 200, 404),
    "api/v1/keys": ("POST", 201, 403, 201),
    "api/v1/keys/<str:key_id>": ("GET", 200, 403, 404),
    "api/v1/keys/<str:key_id>/rotate": ("POST", 201, 403, 404),
    "api/v1/templates": ("GET", 200, 200, 200),
    "api/v1/backends": ("GET", 200, 200, 200),
    "api/v1/environment": ("GET", 200, 200, 200),
    "api/v1/limits": ("GET", 200, 200, 200),
    "api/v1/usage": ("GET", 200, 200, 200),
    "api/v1/costs": ("GET", 200, 200, 200),
    "api/v1/costs/forecast": ("GET", 200, 200, 200),
    "api/v1/costs/what-if": ("GET", 200, 200, 200),
    "api/v1/costs/bills": ("GET", 403, 403, 403),  # these need a key of the team, too
    "api/v1/webhooks": ("GET", 403, 403, 403),
    "api/v1/webhooks/<str:webhook_id>": ("GET", 403, 403, 403),
    "api/v1/webhooks/<str:webhook_id>/test": ("POST", 403, 403, 403),
    "api/v1/webhooks/<str:webhook_id>/rotate": ("POST", 403, 403, 403),
    "api/v1/webhooks/<str:webhook_id>/deliveries": ("GET", 403, 403, 403),
    "api/v1/webhooks/<str:webhook_id>/deliveries/<str:delivery_id>/resend": ("POST", 403, 403, 403),
    "api/v1/audit": ("GET", 200, 403, 200),
    "api/v1/refusals": ("GET", 200, 200, 200),
}
BODIES = {
    "api/v1/executions": {"code": "#= 1", "route": ["first"]},
    "api/v1/executions/batch": {"executions": [{"code": "#= 1", "route": ["first"]}]},
    "api/v1/sessions": {"route": ["first"]},
    "api/v1/sessions/<str:session_id>/commands": {"command": "#> hi"},
    "api/v1/agents": {"name": "new"},
    "api/v1/keys": {"name": "new"},
    "api/v1/sessions/<str:session_id>/timeout": {"timeout_seconds": 60},
    "api/v1/sessions/<str:session_id>/packages": {"packages": ["emoji"]},
}


def test_every_route_stands_in_the_matrix():
    assert rest_routes() == set(MATRIX)


@pytest.mark.parametrize("route", sorted(MATRIX))
async def test_who_gets_what(call, caller, agent, key, eve_key, route):
    method, full, read_only, foreign = MATRIX[route]
    asked = asks(keep_files=["*"], files={"a.txt": "YQ=="}, workflow="w")
    execution = await operations.execute(caller=caller, request=asked)
    session = await operations.open_session(caller=caller, request=SessionRequest())
    artifact = await Artifact.objects.aget(execution=execution.id)
    where = {
        "str:execution_id": execution.id,
        "str:session_id": session.pk,
        "str:sandbox_id": session.pk,
        "str:artifact_id": artifact.pk,
        "path:workflow": "w",
        "str:agent_id": agent.pk,
        "str:key_id": caller.key.pk,
        "str:webhook_id": "whk_none",
        "str:delivery_id": "1",
    }
    if "context_id" in route:
        made = await machines.create_context(caller=caller, session_id=session.pk, language="python", cwd=None)
        where["str:context_id"] = made["id"]
    path = "/" + route
    for name, value in where.items():
        path = path.replace(f"<{name}>", value)
    path += "?path=/tmp/x" if path.endswith("/files") else "?backend=first" if path.endswith("/bills") else ""

    def make():
        return keys.make_key(team=agent.team, agent=agent, name="reads", scopes=[Scope.READ.value])[1]

    reading = await rows(make)
    for token, expected in ((None, 401), (reading, read_only), (eve_key, foreign), (key, full)):
        answer = await call(method, path, BODIES.get(route), token=token)
        assert answer.status_code == expected, (route, answer.content)


@pytest.mark.parametrize("address", ["/api/v1/nothing", "/api/v1/", "/api/v1/workflows/a%0Ab/cancel"])
async def test_an_address_at_which_there_is_nothing_is_a_problem_too(call, address):
    answer = await call("POST", address)

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer["Content-Type"] == "application/problem+json"
