"""A backend that is out is left alone, said so everywhere, tried by one process at a time, and used again."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.db import connection, connections
from django.utils import timezone

from executions import breaker, operations
from executions.backends.scripted import ScriptedBackend
from executions.errors import BackendError, BackendUnavailable, NoBackend, SandboxRefused
from executions.hop import rows
from executions.models import BackendState, Execution, Sandbox, Usage
from executions.operations import boot, probe
from executions.serializers import SessionRequest
from executions.states import BreakerState, SandboxState
from tests import servers
from tests.plane.conftest import asks
from tests.product import HOME

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN

pytestmark = pytest.mark.django_db


async def run(caller, code="#= 1", **fields):
    return await operations.execute(caller=caller, request=asks(code, **fields))


async def settled() -> None:
    """What was begun beside the runs has ended."""
    while tasks := [task for task in asyncio.all_tasks() if task.get_name().startswith("probe ")]:
        await asyncio.wait(tasks)


def known(alias: str = "first") -> BackendState:
    return BackendState.objects.get(alias=alias)


def opened(alias: str = "first", **fields) -> BackendState:
    """An outage that somebody has found: its next try is an hour away, unless `fields` say otherwise."""
    now = timezone.now()
    fields = {"opened_at": now, "changed_at": now, "retry_at": now + timedelta(hours=1), "reason": "refused"} | fields
    row, _ = BackendState.objects.update_or_create(alias=alias, defaults={"state": OPEN, **fields})
    breaker.look(again=True)
    return row


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The aliases that were asked for a sandbox, in order."""
    made: list[str] = []
    create = ScriptedBackend.create

    async def counted(self, spec):
        made.append(self.alias)
        return await create(self, spec)

    monkeypatch.setattr(ScriptedBackend, "create", counted)
    return made


@pytest.fixture
def failing(monkeypatch):
    """Has the backend "first" raise this on every create, until it is told None."""
    told: list[Exception | None] = [None]
    create = ScriptedBackend.create

    async def perhaps(self, spec):
        if self.alias == "first" and told[0] is not None:
            raise told[0]
        return await create(self, spec)

    def tell(error: Exception | None) -> None:
        told[0] = error

    monkeypatch.setattr(ScriptedBackend, "create", perhaps)
    return tell


@pytest.fixture
def held(monkeypatch):
    """Has the backend "first" answer no create until it is told to: `asked` counts them, `answer` lets them all go."""
    state = SimpleNamespace(asked=0, answer=asyncio.Event())
    create = ScriptedBackend.create

    async def later(self, spec):
        if self.alias == "first":
            state.asked += 1
            await state.answer.wait()
        return await create(self, spec)

    monkeypatch.setattr(ScriptedBackend, "create", later)
    return state


# Closed to open


async def test_failures_in_a_row_open_it_and_then_nobody_is_sent_there(caller, behave, asked):
    behave("first", BEHAVES="never_boots")

    for _ in range(breaker.FAILURES):
        await run(caller)
    shape = await run(caller)

    assert asked.count("first") == breaker.FAILURES
    assert [(a.backend, a.outcome) for a in shape.attempts] == [("first", "skipped"), ("second", "ran")]
    since = (await rows(known)).opened_at
    assert shape.attempts[0].reason == f"out since {since:%H:%M} UTC (This machine never boots.); next try in 1 s"
    assert shape.fell_back == f"first: {shape.attempts[0].reason}"


async def test_a_sandbox_made_in_between_begins_the_count_anew(caller, failing):
    for error in [*[BackendUnavailable("no")] * 4, None, *[BackendUnavailable("no")] * 4]:
        failing(error)
        await run(caller)

    row = await rows(known)
    assert (row.state, row.streak) == (CLOSED, 4)


async def test_who_asks_for_time_is_given_it_at_once(caller, failing):
    failing(BackendUnavailable("429 Too many requests", retry_after=30))

    await run(caller)

    row = await rows(known)
    assert row.state == OPEN
    assert timedelta(seconds=28) < row.retry_at - timezone.now() <= timedelta(seconds=30)


async def test_a_longer_wait_that_is_asked_for_later_is_kept(caller):
    await rows(opened, retry_at=timezone.now() + timedelta(seconds=1))

    await rows(breaker.failed, "first", "429", began=timezone.now(), retry_after=60)

    assert (await rows(known)).retry_at > timezone.now() + timedelta(seconds=55)


async def test_a_sandbox_that_cannot_be_had_there_says_nothing_about_the_backend(caller, failing):
    failing(SandboxRefused("There is no template ml."))

    shapes = [await run(caller) for _ in range(breaker.FAILURES + 1)]

    assert not await BackendState.objects.filter(state=OPEN).aexists()
    assert {shape.backend for shape in shapes} == {"second"}
    only = await run(caller, route=["first"])
    assert (only.state, only.error_code) == ("errored", "sandbox_refused")
    assert only.detail == "first: There is no template ml."


async def test_silence_opens_it_before_requests_time_out_and_an_answer_closes_it_again(caller, behave, held):
    held.answer.set()
    await run(caller)
    held.answer.clear()
    behave("first", SLOW_SECONDS=0.1)

    slow = [asyncio.create_task(run(caller)) for _ in range(breaker.FAILURES)]
    async with asyncio.timeout(20):
        while not await BackendState.objects.filter(state=OPEN).aexists():
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in slow)
        skipped = await run(caller)
        held.answer.set()
        shapes = [await task for task in slow]

    assert skipped.backend == "second"
    assert "no answer within 0.1 s" in skipped.attempts[0].reason
    assert {shape.backend for shape in shapes} == {"first"}
    assert (await rows(known)).state == CLOSED


async def test_a_backend_that_is_asked_for_the_first_time_may_take_its_time(caller, behave, held, monkeypatch):
    monkeypatch.setattr(boot, "_heard", set())
    behave("first", SLOW_SECONDS=0.05)

    runs = [asyncio.create_task(run(caller)) for _ in range(breaker.FAILURES)]
    async with asyncio.timeout(20):
        while held.asked < breaker.FAILURES:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # several times what would count as silence
        held.answer.set()
        shapes = [await task for task in runs]

    assert {shape.backend for shape in shapes} == {"first"}
    assert not await BackendState.objects.aexists()


async def test_a_failure_of_before_the_recovery_does_not_open_it_again(caller):
    now = timezone.now()
    await rows(BackendState.objects.create, alias="first", closed_at=now, changed_at=now)

    for _ in range(breaker.FAILURES):
        await rows(breaker.failed, "first", "late", began=now - timedelta(seconds=10))

    row = await rows(known)
    assert (row.state, row.streak) == (CLOSED, 0)


def test_the_state_costs_no_query_per_run(django_assert_num_queries):
    with django_assert_num_queries(1):
        for _ in range(100):
            breaker.outage("first")
            breaker.worked("first")
            breaker.due("first")


# What is said meanwhile


async def test_a_route_without_another_backend_is_refused_with_when_to_try_again(caller):
    await rows(opened, retry_at=timezone.now() + timedelta(seconds=4))

    with pytest.raises(NoBackend) as refused:
        await run(caller, route=["first"])

    assert refused.value.status == 503
    assert refused.value.facts["retry_after"] in (3, 4)
    assert "first: out since" in refused.value.detail
    assert not await Execution.objects.aexists()


async def test_a_backend_that_is_out_is_left_out_of_a_fallback_too(caller, behave):
    behave("first", BEHAVES="never_boots")
    await rows(opened, "second")
    execution = await rows(operations.submit, caller=caller, request=asks(route=["first", "third"]))
    execution.route = ["first", "second", "third"]  # the second went out after the admission

    await operations.start(execution).task

    assert [(a.backend, a.outcome) for a in execution.tried] == [
        ("first", "unavailable"), ("second", "skipped"), ("third", "ran"),
    ]  # fmt: skip
    assert "out since" in execution.tried[1].reason


async def test_sessions_go_on_where_they_were_born_and_new_ones_are_born_elsewhere(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    await rows(opened)

    shape = await run(caller, session_id=session.pk)
    other = await operations.open_session(caller=caller, request=SessionRequest())

    assert (shape.state, shape.backend) == ("succeeded", "first")
    assert other.backend == "second"


async def test_every_door_is_told(caller):
    await rows(opened)

    found = await rows(operations.environment, caller=caller)
    states = {state["alias"]: state["breaker"] for state in await operations.backend_states()}

    assert [sentence.split(" since")[0] for sentence in found["outages"]] == ["first: out"]
    assert found["languages"]  # what there is stays what there is
    assert (states["first"]["state"], states["first"]["reason"], states["second"]["state"]) == (
        "open", "refused", "closed",
    )  # fmt: skip


# Fallback before anything ran


async def test_a_create_that_broke_is_tried_elsewhere_and_its_sandbox_is_ended_for_sure(caller, failing):
    failing(BackendError("The answer was cut off."))

    shape = await run(caller)

    assert (shape.state, shape.backend) == ("succeeded", "second")
    lost = await Sandbox.objects.aget(backend="first")
    assert (lost.state, lost.end_reason) == (SandboxState.RETIRING, "outage")
    assert lost.reserved_nano_usd > 0
    await operations.reap(orphans=False)
    await lost.arefresh_from_db()
    assert (lost.state, lost.reserved_nano_usd) == (SandboxState.GONE, 0)


@pytest.fixture
def unreachable(monkeypatch):
    """Has the sandboxes of "first" not answer; told so, it says that nothing was sent."""

    def tell(**facts) -> None:
        run_code = ScriptedBackend.run_code

        async def perhaps(self, handle, code, **options):
            if self.alias == "first":
                raise BackendUnavailable("Connection refused.", **facts)
            async for event in run_code(self, handle, code, **options):
                yield event

        monkeypatch.setattr(ScriptedBackend, "run_code", perhaps)

    return tell


async def test_a_sandbox_that_cannot_be_reached_is_no_reason_to_run_it_elsewhere(caller, unreachable):
    unreachable()

    shape = await run(caller)

    assert (shape.state, shape.error_code) == ("errored", "backend_error")
    assert [a.outcome for a in shape.attempts] == ["lost"]


async def test_code_that_surely_was_not_sent_runs_elsewhere_and_the_sandbox_is_ended(caller, unreachable):
    unreachable(nothing_sent=True)

    shape = await run(caller)

    assert (shape.state, shape.backend, shape.results) == ("succeeded", "second", [{"text/plain": "1"}])
    assert [a.outcome for a in shape.attempts] == ["unavailable", "ran"]
    await operations.reap(orphans=False)
    left = await Sandbox.objects.aget(backend="first")
    assert (left.state, left.reserved_nano_usd) == (SandboxState.GONE, 0)


async def test_a_session_stays_where_it_was_born_even_if_nothing_was_sent(caller, unreachable):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    unreachable(nothing_sent=True)

    shape = await run(caller, session_id=session.pk)

    await session.arefresh_from_db()
    assert (shape.state, shape.error_code) == ("errored", "backend_error")
    assert (session.backend, session.state) == ("first", SandboxState.LEASED)


async def test_what_a_fallback_is_refused_stands_among_the_attempts(caller, behave):
    from executions.models import Quota

    behave("first", BEHAVES="never_boots")
    await rows(
        Quota.objects.create, team=caller.team, unit="concurrent_sandboxes", window="total", limit=1
    )  # the row of the first is still open while the second is asked for
    shape = await run(caller, route=["first", "second"])

    assert [(a.backend, a.outcome) for a in shape.attempts] == [("first", "unavailable"), ("second", "ran")]


# The probe


async def test_a_probe_makes_and_ends_a_sandbox_on_the_systems_account_and_closes_it(caller, asked):
    await rows(opened, retry_at=timezone.now())

    await probe.probe("first")

    assert (await rows(known)).state == CLOSED
    assert asked == ["first"]
    made = await Sandbox.objects.select_related("agent__team").aget()
    assert (made.agent.team.name, made.agent.name, made.state) == ("System", "probes", SandboxState.GONE)
    assert [u.agent_id async for u in Usage.objects.all()] == [made.agent_id]
    assert (await run(caller)).backend == "first"


async def test_while_the_list_alone_is_refused_no_sandbox_is_tried(caller, behave, asked):
    behave("first", BEHAVES="never_boots")
    await rows(opened, retry_at=timezone.now())

    await probe.probe("first")

    row = await rows(known)
    assert (row.state, row.tries) == (OPEN, 1)
    assert asked == []
    assert not await Sandbox.objects.aexists()


async def test_probes_that_fail_come_less_often_but_within_three_seconds(caller, failing):
    failing(BackendUnavailable("still out"))
    await rows(opened)
    waits = []
    for _ in range(6):
        await rows(opened, retry_at=timezone.now())
        await probe.probe("first")
        row = await rows(known)
        waits.append(round((row.retry_at - row.changed_at).total_seconds()))

    assert waits == [2, 3, 3, 3, 3, 3]
    assert not await Sandbox.objects.open().aexists()


async def test_a_run_elsewhere_brings_the_probe_with_it(caller):
    await rows(opened, retry_at=timezone.now())

    await run(caller)
    await settled()

    assert (await rows(known)).state == CLOSED


async def test_where_no_process_probes_one_request_is_let_through_and_closes_it(caller, monkeypatch):
    monkeypatch.setattr(probe, "soon", lambda: None)
    await rows(opened, retry_at=timezone.now() - timedelta(seconds=6))

    shape = await run(caller, route=["first"])

    assert shape.backend == "first"
    assert (await rows(known)).state == CLOSED


async def test_a_request_that_was_let_through_in_vain_keeps_the_others_out(caller, failing, monkeypatch):
    monkeypatch.setattr(probe, "soon", lambda: None)
    failing(BackendUnavailable("still out"))
    await rows(opened, retry_at=timezone.now() - timedelta(seconds=6))

    first = await run(caller)
    second = await run(caller)

    assert [a.outcome for a in first.attempts] == ["unavailable", "ran"]
    assert [a.outcome for a in second.attempts] == ["skipped", "ran"]


def test_whose_lease_is_over_has_no_say_any_more():
    opened(retry_at=timezone.now())
    dead = breaker.claim("first")
    BackendState.objects.update(probe_until=timezone.now())
    token = breaker.claim("first")

    breaker.answered("first", dead, "")

    row = known()
    assert (row.state, row.probe_by) == (HALF_OPEN, token)


def test_a_clock_that_was_set_back_delays_nothing():
    ahead = timezone.now() + timedelta(hours=3)
    opened(changed_at=ahead, retry_at=ahead + timedelta(seconds=5))

    assert breaker.due("first")
    token = breaker.claim("first")
    BackendState.objects.update(changed_at=ahead, probe_until=ahead)  # and so the probe's holder died

    assert token
    assert breaker.claim("first") not in ("", token)


def test_a_clock_that_jumps_ahead_brings_the_next_try_forward_and_no_second_probe_counts():
    opened(retry_at=timezone.now() - timedelta(hours=3))
    one = breaker.claim("first")
    BackendState.objects.update(probe_until=timezone.now() - timedelta(hours=3))
    other = breaker.claim("first")

    breaker.answered("first", other, "")
    breaker.answered("first", one, "too late")

    assert known().state == CLOSED


# Several processes


@pytest.mark.django_db(transaction=True)
def test_of_many_that_want_the_probe_one_gets_it():
    opened(retry_at=timezone.now())
    together, tokens = threading.Barrier(8), []

    def race() -> None:
        together.wait()
        tokens.append(breaker.claim("first"))
        connections.close_all()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(map(bool, tokens)) == [False] * 7 + [True]


ELSEWHERE = """
import sys, django
from django.conf import settings
django.setup()
settings.DATABASES["default"]["NAME"] = sys.argv[1]
from datetime import timedelta
from django.utils import timezone
from executions import breaker
{code}
print("done", flush=True)
sys.stdin.read()
"""


def elsewhere(code: str) -> subprocess.Popen:
    """Another process on the same database that has run this code, and waits."""
    database = str(connection.settings_dict["NAME"])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE.format(code=code), database],
        cwd=HOME, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=servers.die_with_parent,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
    )  # fmt: skip


@pytest.mark.django_db(transaction=True)
def test_what_one_process_finds_out_the_others_know_within_a_quarter_of_a_second():
    assert breaker.outage("first") == ""
    other = elsewhere('[breaker.failed("first", "refused", began=timezone.now()) for _ in range(5)]')
    with other:
        assert other.stdout.readline() == "done\n"
        found = timezone.now()
        while not breaker.outage("first"):
            assert timezone.now() - found < timedelta(seconds=1)
        other.kill()

    assert timezone.now() - found < timedelta(seconds=0.5)


@pytest.mark.django_db(transaction=True)
def test_the_probe_of_a_process_that_was_killed_goes_to_another_when_its_lease_ends():
    opened(retry_at=timezone.now())
    holder = elsewhere('breaker.LEASE = timedelta(seconds=1); assert breaker.claim("first")')
    with holder:
        assert holder.stdout.readline() == "done\n"
        assert breaker.claim("first") == ""
        holder.send_signal(signal.SIGKILL)

    until = known().probe_until
    while not (token := breaker.claim("first")):
        assert timezone.now() < until + timedelta(seconds=2)
    breaker.answered("first", token, "")

    assert timezone.now() >= until
    assert known().state == CLOSED


# The data rule and sizes


async def test_code_that_stays_here_leaves_distant_backends_out_by_name(caller, behave):
    behave("first", REMOTE=True)
    caller.agent.stays_here = True

    shape = await run(caller)

    assert (shape.backend, shape.attempts[0].outcome) == ("second", "skipped")
    assert shape.attempts[0].reason == "is not on this machine, which the code of agent etl never leaves"
    assert shape.fell_back == ""  # a rule, not an outage
    with pytest.raises(NoBackend, match="never leaves") as refused:
        await run(caller, route=["first"])
    assert refused.value.facts["retry_after"] is None


async def test_a_template_that_is_larger_than_a_backend_gives_leaves_it_out_by_name(caller, behave):
    behave("first", MOST={"memory_mib": 256})

    shape = await run(caller)

    assert shape.attempts[0].reason == "gives at most 256 memory_mib, not the 1024, which template default has"


# A drill


async def test_a_drill_refuses_sandboxes_under_its_own_name_until_it_is_lifted(caller, asked):
    await rows(breaker.drill, "first", by="ada", seconds=60)

    shapes = [await run(caller) for _ in range(breaker.FAILURES + 1)]

    assert {shape.backend for shape in shapes} == {"second"}
    assert shapes[0].attempts[0].reason == "outage drill by ada"
    assert "(outage drill by ada)" in shapes[-1].attempts[0].reason
    await rows(opened, retry_at=timezone.now())
    await probe.probe("first")
    assert (await rows(known)).state == OPEN
    await rows(breaker.lift, "first")
    await rows(opened, retry_at=timezone.now())
    await probe.probe("first")
    assert (await rows(known)).state == CLOSED
    assert asked.count("first") == 1


async def test_a_drill_whose_process_was_killed_ends_by_itself(caller):
    await rows(breaker.drill, "first", by="ada", seconds=60)
    await rows(BackendState.objects.update, drill_until=timezone.now())
    await rows(breaker.look, again=True)

    assert (await run(caller)).backend == "first"


# Backends whose sandboxes live on one machine each


async def test_an_outage_on_one_machine_is_none_on_another(caller, behave, settings, monkeypatch):
    monkeypatch.setattr(ScriptedBackend, "has_node", True)
    settings.NODE = "cellar"
    behave("first", BEHAVES="never_boots")
    for _ in range(breaker.FAILURES):
        await run(caller)
    here = await rows(breaker.outage, "first")

    settings.NODE = "attic"
    behave("first")
    await rows(breaker.look, again=True)
    there = await run(caller)

    assert here.startswith("out since")
    assert there.backend == "first"
    assert await rows(breaker.outage, "first") == ""
    assert (await rows(known, "first@cellar")).state == OPEN


async def test_a_backend_that_every_machine_reaches_is_out_for_all_of_them(caller, settings):
    settings.NODE = "cellar"
    await rows(opened)

    settings.NODE = "attic"
    await rows(breaker.look, again=True)

    assert (await run(caller)).backend == "second"


async def test_a_probe_on_one_machine_closes_the_breaker_of_that_machine_alone(caller, settings, monkeypatch):
    monkeypatch.setattr(ScriptedBackend, "has_node", True)
    for settings.NODE in ("cellar", "attic"):
        await rows(opened, f"first@{settings.NODE}", retry_at=timezone.now())

    probe.soon()
    await settled()

    assert (await rows(known, "first@attic")).state == CLOSED
    assert (await rows(known, "first@cellar")).state == OPEN
