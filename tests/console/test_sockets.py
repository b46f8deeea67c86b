"""The console's sockets, spoken to as the page speaks to them."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import AnonymousUser

from executions import backends, keys, operations
from executions.console.urls import websocket_urlpatterns
from executions.hop import rows
from executions.models import Template
from executions.serializers import SessionRequest, Submission

pytestmark = pytest.mark.django_db(transaction=True)
HOST, ORIGIN = (b"host", b"127.0.0.1:8000"), (b"origin", b"http://127.0.0.1:8000")


@pytest.fixture(autouse=True)
def scripted(settings):
    """Code is played by the scripted backend."""
    settings.SANDBOXES = {"scripted": {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}}
    Template.objects.create(name="default")
    yield
    backends._live.clear()


@asynccontextmanager
async def connected(path: str, user, headers=(HOST, ORIGIN)):
    socket = WebsocketCommunicator(URLRouter(websocket_urlpatterns), path, headers=list(headers))
    socket.scope |= {"user": user, "client": ["127.0.0.1", 1]}
    accepted, _ = await socket.connect(timeout=5)
    try:
        yield socket if accepted else None
    finally:
        await socket.disconnect()


async def heard(socket, until: str, **subscribe) -> list[dict]:
    """Subscribe, and hear everything up to the first message of that type (or state)."""
    if subscribe:
        await socket.send_json_to({"type": "subscribe", **subscribe})
    said = []
    while not said or until not in (said[-1]["type"], said[-1].get("state")):
        said.append(await socket.receive_json_from(timeout=10))
    return said


async def close_code(socket) -> int:
    message = await socket.receive_output(timeout=5)
    assert message["type"] == "websocket.close"
    return message["code"]


async def session_of(user):
    caller = await rows(keys.caller_for, user)
    await rows(type(caller.agent).objects.filter(pk=caller.agent.pk).update, isolation_floor="none", route=["scripted"])
    caller = await rows(keys.caller_for, user)
    return await operations.open_session(caller=caller, request=SessionRequest())


async def executed(user, code: str):
    caller = await rows(keys.caller_for, user)
    return await operations.execute(caller=caller, request=Submission(code=code, route=["scripted"]))


async def test_a_cell_is_told_from_sending_to_its_end(ada):
    session = await session_of(ada)
    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        await heard(socket, "caught_up", after_seq=0)
        await socket.send_json_to(
            {"type": "execute_request", "client_id": "c1", "code": "#> hello\n#= 42", "language": "python"}
        )

        said = await heard(socket, "succeeded")

    kinds = [message["type"] for message in said]
    assert "stdout" in kinds
    assert kinds.index("stdout") < kinds.index("result")
    assert {m["client_id"] for m in said if m["type"] == "state"} == {"c1"}
    assert [m["seq"] for m in said if m["type"] in ("stdout", "result")] == [1, 2]
    assert "cost_usd" not in said[-1]  # no rate is known for this backend: a zero would be a lie


async def test_the_same_request_sent_twice_runs_once(ada):
    session = await session_of(ada)
    request = {"type": "execute_request", "client_id": "c1", "code": "#> once", "language": "python"}
    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        await heard(socket, "caught_up", after_seq=0)
        await socket.send_json_to(request)
        await heard(socket, "succeeded")
    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        await heard(socket, "caught_up", after_seq=0)
        await socket.send_json_to(request)
        await heard(socket, "succeeded")

    assert await rows(session.executions.count) == 1


async def test_whoever_reconnects_hears_only_what_they_missed(ada):
    session = await session_of(ada)
    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        await heard(socket, "caught_up", after_seq=0)
        code = "#> one\n#~ 0.3\n#!> two\n#~ 0.3\n#> three"
        await socket.send_json_to({"type": "execute_request", "client_id": "c1", "code": code})
        first = (await heard(socket, "stdout"))[-1]

    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        said = await heard(socket, "succeeded", after_seq={first["execution_id"]: first["seq"]})

    assert [m["text"] for m in said if m["type"] in ("stdout", "stderr")] == ["two\n", "three\n"]


async def test_an_interrupt_stops_what_runs(ada):
    session = await session_of(ada)
    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        await heard(socket, "caught_up", after_seq=0)
        await socket.send_json_to({"type": "execute_request", "client_id": "c1", "code": "#> on\n#~ 30"})
        await heard(socket, "stdout")

        await socket.send_json_to({"type": "interrupt_request"})

        assert (await heard(socket, "cancelled"))[-1]["client_id"] == "c1"


async def test_a_session_that_ends_says_so_and_refuses_the_next_cell(ada):
    session = await session_of(ada)
    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        await heard(socket, "caught_up", after_seq=0)
        await operations.end_session(caller=await rows(keys.caller_for, ada), session_id=session.pk)
        await socket.send_json_to({"type": "execute_request", "client_id": "c1", "code": "1"})

        notice = (await heard(socket, "notice"))[-1]

    assert (notice["code"], notice["client_id"]) == ("session_gone", "c1")
    assert notice["remedy"]


async def test_extend_moves_the_end(ada):
    session = await session_of(ada)
    async with connected(f"/ws/sessions/{session.pk}", ada) as socket:
        before = (await heard(socket, "caught_up", after_seq=0))[0]
        await socket.send_json_to({"type": "extend"})
        after = (await heard(socket, "session"))[-1]

    assert before["type"] == "session"
    assert after["end_at"] > before["end_at"]


async def test_another_teams_session_and_run_do_not_exist(ada, eve):
    session = await session_of(ada)
    run = await executed(ada, "#> private")

    for path in (f"/ws/sessions/{session.pk}", f"/ws/executions/{run.id}", "/ws/executions/exe_none"):
        async with connected(path, eve) as socket:
            assert await close_code(socket) == 4404


async def test_nobody_signed_in_is_told_to_sign_in(ada):
    session = await session_of(ada)

    async with connected(f"/ws/sessions/{session.pk}", AnonymousUser()) as socket:
        assert await close_code(socket) == 4401


@pytest.mark.parametrize(
    "headers",
    [
        (HOST, (b"origin", b"http://evil.example")),
        (HOST, (b"origin", b"http://127.0.0.1:9999")),
        (HOST, (b"origin", b"null")),
        (HOST,),
        ((b"host", b"evil.example"), (b"origin", b"http://evil.example")),
    ],
    ids=["another host", "another port of this host", "a sandboxed frame", "none", "a rebound name"],
)
async def test_a_page_of_another_origin_gets_no_socket(ada, headers):
    session = await session_of(ada)

    async with connected(f"/ws/sessions/{session.pk}", ada, headers) as socket:
        assert socket is None


async def test_a_viewer_watches_and_does_not_run(ada, bob):
    session = await session_of(ada)
    async with connected(f"/ws/sessions/{session.pk}", bob) as socket:
        await heard(socket, "caught_up", after_seq=0)
        for message in ({"type": "execute_request", "code": "1"}, {"type": "interrupt_request"}, {"type": "extend"}):
            await socket.send_json_to({**message, "client_id": "c1"})
            assert (await heard(socket, "notice"))[-1]["code"] in ("forbidden", "not_found")

    assert await rows(session.executions.count) == 0


@pytest.mark.parametrize(
    "message", [{}, [], "text", {"type": "json"}, {"type": "subscribe", "after_seq": "x"}, {"type": "ack"}]
)
async def test_nonsense_is_answered_or_ignored_and_the_socket_lives(ada, message):
    run = await executed(ada, "#> still here")
    async with connected(f"/ws/executions/{run.id}", ada) as socket:
        await socket.send_json_to(message)

        said = await heard(socket, "caught_up", after_seq=0)

    assert "still here\n" in [m.get("text") for m in said]


async def test_unacknowledged_output_is_bounded(ada, monkeypatch):
    from executions.console import consumers

    monkeypatch.setattr(consumers, "OUTSTANDING_BYTES", 10)
    run = await executed(ada, "#> one\n#!> two\n#> three")
    async with connected(f"/ws/executions/{run.id}", ada) as socket:
        first = (await heard(socket, "stdout", after_seq=0))[-1]
        await heard(socket, "caught_up")

        await socket.send_json_to({"type": "ack", "execution_id": run.id, "seq": first["seq"]})

        assert (await heard(socket, "stderr"))[-1]["text"] == "two\n"
