"""Network rules from the agent to the record: who may reach what, on which backend, and what went out."""

from __future__ import annotations

import pytest
from django.core.exceptions import ValidationError

from executions import backends, egress, operations
from executions.backends.e2b.backend import E2BBackend, _network
from executions.errors import Forbidden, Invalid, NoBackend
from executions.hop import rows
from executions.models import Agent, Egress, Sandbox
from executions.serializers import SessionRequest, execution_shape, parse
from executions.states import ExecutionState
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db


@pytest.fixture
def networked(caller):
    caller.agent.network_allow = ["data.example", "*.example.org", "10.1.2.0/24:5432"]
    caller.agent.save()
    return caller


def told(shape) -> list[tuple[str, int, str, int, int]]:
    return [(e.host, e.port, e.verdict, e.bytes_out, e.bytes_in) for e in shape.egress]


# the rules of the row


def test_an_agent_has_no_network_unless_somebody_says_so(agent):
    assert Agent.objects.get(pk=agent.pk).network_allow == []
    assert egress.allowed(agent, None) == []


def test_rules_are_stored_in_their_one_form(agent):
    agent.network_allow = ["Data.Example.", "data.example", "bücher.example:443"]

    agent.full_clean()

    assert agent.network_allow == ["data.example", "xn--bcher-kva.example:443"]


@pytest.mark.parametrize(
    "rules",
    [["https://data.example"], ["data.example\x00.evil.org"], ["0.0.0.0/0"], [7], "data.example", ["a.example"] * 101],
)
def test_what_is_no_rule_is_an_error_of_the_field(agent, rules):
    agent.network_allow = rules

    with pytest.raises(ValidationError) as refused:
        agent.full_clean()

    assert set(refused.value.message_dict) == {"network_allow"}


async def test_a_row_that_was_spoilt_by_hand_opens_nothing(caller):
    caller.agent.network_allow = ["not a host"]
    await rows(caller.agent.save)

    with pytest.raises(Invalid) as refused:
        await operations.execute(caller=caller, request=asks())

    assert "not a host" in refused.value.detail


# narrowing


@pytest.mark.parametrize(
    "asked", [["data.example"], ["data.example:443"], ["a.example.org", "*.b.example.org"], ["10.1.2.3:5432"], []]
)
async def test_a_request_may_ask_for_less(networked, asked):
    shape = await operations.execute(caller=networked, request=asks(network=asked))

    assert (await rows(Sandbox.objects.get, pk=shape.sandbox_id)).network_allow == asked


@pytest.mark.parametrize("asked", ["*", "example.org", "data.example:8080", "10.1.0.0/16:5432", "10.1.2.3"])
async def test_a_request_for_more_is_refused_with_the_rules(networked, asked):
    with pytest.raises(Forbidden) as refused:
        await operations.execute(caller=networked, request=asks(network=["data.example", asked]))

    assert refused.value.detail == (
        f"network: agent etl may not reach {asked}; allowed are: data.example, *.example.org, 10.1.2.0/24:5432."
    )
    assert not await rows(Sandbox.objects.exists)


async def test_a_request_of_an_agent_without_network_is_told_that(caller):
    with pytest.raises(Forbidden) as refused:
        await operations.execute(caller=caller, request=asks(network=["data.example"]))

    assert "its network is off" in refused.value.detail


async def test_a_rule_that_cannot_be_read_is_the_requests_fault(networked):
    with pytest.raises(Invalid) as refused:
        await operations.execute(caller=networked, request=asks(network=["https://data.example/"]))

    assert refused.value.facts["field"] == "network"


async def test_a_session_says_its_network_when_it_is_opened(networked):
    sandbox = await operations.open_session(
        caller=networked, request=parse(SessionRequest, {"network": ["data.example"]})
    )
    with pytest.raises(Invalid):
        await operations.execute(caller=networked, request=asks(session_id=sandbox.pk, network=[]))
    shape = await operations.execute(caller=networked, request=asks("#@ a.example.org:443", session_id=sandbox.pk))

    assert told(shape) == [("a.example.org", 443, "denied", 0, 0)]


# which backend


async def test_a_backend_without_rules_is_left_out_by_name(networked, monkeypatch):
    without = backends.get("first").capabilities.__class__(languages=frozenset({"python"}))
    monkeypatch.setattr(backends.get("first"), "capabilities", without, raising=False)

    shape = await operations.execute(caller=networked, request=asks())

    assert shape.backend == "second"
    assert (shape.attempts[0].backend, shape.attempts[0].outcome) == ("first", "skipped")
    assert shape.attempts[0].reason == "gives sandboxes no network"


async def test_where_no_backend_can_hold_the_rules_nothing_runs(networked, monkeypatch):
    for alias in ("first", "second"):
        monkeypatch.setattr(backends.get(alias), "network_refusal", lambda allow: "has no network rules")

    with pytest.raises(NoBackend) as refused:
        await operations.execute(caller=networked, request=asks())

    assert "has no network rules" in refused.value.detail


@pytest.mark.parametrize(
    ("rules", "refused"),
    [
        ([], ""),
        (["*"], ""),
        (["data.example", "*.example.org"], ""),
        (["data.example:443"], "not for data.example:443"),
        (["10.0.0.0/8"], "not for 10.0.0.0/8"),
        (["*", "10.0.0.1"], "not for 10.0.0.1"),
    ],
)
def test_e2b_takes_what_it_can_enforce_and_no_more(rules, refused):
    said = E2BBackend("e2b", {}).network_refusal(rules)

    assert refused in said
    assert bool(said) is bool(refused)


def test_e2b_is_told_to_deny_the_rest():
    assert _network(()) == {"allow_internet_access": False}
    assert _network(("*",)) == {"allow_internet_access": True}
    assert _network(("data.example",)) == {"network": {"allow_out": ["data.example"], "deny_out": ["0.0.0.0/0"]}}


# the record


async def test_what_went_out_is_on_the_execution(networked):
    shape = await operations.execute(caller=networked, request=asks("#@ data.example:443\n#@ evil.example:443\n#= 1"))
    again = await rows(lambda: execution_shape(operations.find_execution(networked, shape.id)))

    assert told(shape) == [("data.example", 443, "allowed", 10, 20), ("evil.example", 443, "denied", 0, 0)]
    assert told(again) == told(shape)
    assert shape.egress[1].reason.startswith("agent etl may not reach evil.example:443; allowed are: data.example")


@pytest.mark.parametrize("code", ["#@ data.example:443\n#~ 9", "#@ data.example:443\n#! ValueError: x"])
async def test_what_went_out_is_kept_however_the_run_ends(networked, code):
    shape = await operations.execute(caller=networked, request=asks(code, timeout_seconds=1))

    assert shape.state in (ExecutionState.TIMED_OUT, ExecutionState.FAILED)
    assert told(shape) == [("data.example", 443, "allowed", 10, 20)]


async def test_each_run_of_a_session_has_its_own(networked):
    sandbox = await operations.open_session(caller=networked, request=SessionRequest())
    first = await operations.execute(caller=networked, request=asks("#@ data.example:443", session_id=sandbox.pk))
    second = await operations.execute(caller=networked, request=asks("#@ a.example.org:80", session_id=sandbox.pk))

    assert [e.host for e in first.egress] == ["data.example"]
    assert [e.host for e in second.egress] == ["a.example.org"]
    assert await rows(lambda: list(Egress.objects.order_by("number").values_list("number", flat=True))) == [1, 2]


async def test_what_goes_out_between_runs_is_noticed_too(networked):
    sandbox = await operations.open_session(caller=networked, request=SessionRequest())
    machine = backends.get("first").machines[sandbox.provider_name]
    machine.connect("data.example:443")
    await operations.reap()
    machine.connect("evil.example:443")
    await operations.end_session(caller=networked, session_id=sandbox.pk)

    kept = await rows(lambda: list(Egress.objects.filter(sandbox=sandbox).order_by("number")))
    assert [(e.host, e.verdict, e.execution_id) for e in kept] == [
        ("data.example", "allowed", None),
        ("evil.example", "denied", None),
    ]


async def test_a_backend_that_cannot_tell_does_not_spoil_the_run(networked, monkeypatch):
    async def broken(*_, **__):
        raise OSError("gone")

    monkeypatch.setattr(backends.get("first"), "egress", broken)

    shape = await operations.execute(caller=networked, request=asks("#@ data.example:443\n#= 1"))

    assert (shape.state, shape.egress) == (ExecutionState.SUCCEEDED, [])


async def test_without_rules_nobody_asks_what_went_out(caller, monkeypatch):
    async def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(backends.get("first"), "egress", never)

    assert (await operations.execute(caller=caller, request=asks())).egress == []


# what the code and its author are told


@pytest.mark.parametrize(
    "error", ["gaierror: [Errno -3] Temporary failure in name resolution", "URLError: x", "TypeError: fetch failed"]
)
async def test_code_that_reached_nobody_is_told_that_the_network_is_off(caller, error):
    shape = await operations.execute(caller=caller, request=asks(f"#! {error}"))

    assert shape.detail == "Network is off for agent etl; an operator can allow hosts."


async def test_other_errors_have_nothing_to_do_with_the_network(caller):
    shape = await operations.execute(caller=caller, request=asks("#! ValueError: x"))

    assert shape.detail == ""


async def test_code_that_was_refused_is_told_what_is_allowed(networked):
    code = "#@ evil.example:443\n#! ProxyError: Tunnel connection failed"
    shape = await operations.execute(caller=networked, request=asks(code))

    assert shape.detail == (
        "Network: agent etl may not reach evil.example:443; allowed are: data.example, *.example.org, 10.1.2.0/24:5432. "
        "An operator can allow more."
    )


def test_the_environment_tells_the_truth(caller, networked):
    off = operations.environment(caller=caller)["network"]
    caller.agent.network_allow = []
    caller.agent.save()

    assert off == "data.example, *.example.org, 10.1.2.0/24:5432"
    assert operations.environment(caller=caller)["network"] == "off"
