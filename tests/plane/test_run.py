"""An execution from admission to the bill, on simulated machines with and without manners."""

import asyncio
from dataclasses import replace

import pytest

from executions import journal, operations
from executions.backends import scripted
from executions.backends.base import Event as Said
from executions.errors import Conflict, ContextRestarted, Forbidden, Invalid, KeyReused, NoBackend, SessionGone
from executions.hop import rows
from executions.models import Event, Execution, IdempotencyRecord, Sandbox, Usage
from executions.operations.reap import begin_retiring
from executions.serializers import SessionRequest, Submission
from executions.states import ExecutionState, SandboxState
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db


async def run(caller, code="#= 1", **fields):
    return await operations.execute(caller=caller, request=asks(code, **fields))


async def test_output_results_and_count_arrive_in_order_and_are_kept(caller):
    shape = await run(caller, "#> one\n#!> two\n#> three\n#= 42")

    assert shape.state == "succeeded"
    assert shape.logs.stdout == "one\nthree\n"
    assert shape.logs.stderr == "two\n"
    assert shape.results == [{"text/plain": "42"}]
    assert shape.execution_count == 1
    events = [(e.seq, e.kind) async for e in Event.objects.filter(execution=shape.id)]
    assert events == [(1, "stdout"), (2, "stderr"), (3, "stdout"), (4, "result")]


async def test_an_exception_of_the_code_is_theirs(caller):
    shape = await run(caller, "#! ValueError: no such thing")

    assert (shape.state, shape.error_code) == ("failed", "")
    assert (shape.error.name, shape.error.value) == ("ValueError", "no such thing")


async def test_a_run_beyond_its_time_has_timed_out_and_says_so(caller):
    shape = await run(caller, "#> before\n#~ 30\n#> after", timeout_seconds=1)

    assert (shape.state, shape.error_code) == ("timed_out", "timed_out")
    assert shape.logs.stdout == "before\n"
    assert shape.usage.run_seconds == pytest.approx(1, abs=0.5)


async def test_a_fresh_sandbox_is_gone_and_paid_when_its_run_has_ended(caller):
    shape = await run(caller)

    sandbox = await Sandbox.objects.aget(pk=shape.sandbox_id)
    assert (sandbox.state, sandbox.end_reason) == (SandboxState.GONE, "finished")
    assert not scripted._machines["first"][sandbox.provider_name].alive
    kinds = {u.kind async for u in Usage.objects.filter(sandbox=sandbox)}
    assert kinds == {"boot", "run"}


async def test_two_runs_never_share_a_fresh_sandbox(caller):
    one, two = await run(caller), await run(caller)

    assert one.sandbox_id != two.sandbox_id


async def test_falls_back_while_nothing_ran_and_says_why(caller, behave):
    behave("first", BEHAVES="never_boots")

    shape = await run(caller, "#= 2")

    assert (shape.state, shape.backend) == ("succeeded", "second")
    first, second = shape.attempts
    assert (first.backend, first.outcome, first.code) == ("first", "unavailable", "backend_unavailable")
    assert first.reason == "This machine never boots."
    assert (second.backend, second.outcome) == ("second", "ran")
    never = await Sandbox.objects.aget(backend="first")
    assert (never.state, never.end_reason, never.spent_nano_usd) == (SandboxState.GONE, "outage", 0)


async def test_never_falls_back_once_code_may_have_run(caller, behave):
    behave("first", BEHAVES="dies_mid_run")

    shape = await run(caller, "#> hello")

    assert (shape.state, shape.error_code) == ("errored", "sandbox_lost")
    assert [a.outcome for a in shape.attempts] == ["lost"]
    assert shape.logs.stdout == "hello\n"


async def test_with_no_backend_left_the_run_has_errored_by_name(caller, behave):
    behave("first", BEHAVES="never_boots")
    behave("second", BEHAVES="never_boots")

    shape = await run(caller)

    assert (shape.state, shape.error_code) == ("errored", "no_backend")
    assert [a.outcome for a in shape.attempts] == ["unavailable", "unavailable"]
    assert not await Sandbox.objects.open().aexists()


async def test_a_kill_that_is_not_confirmed_stays_visible_with_its_reservation(caller, behave):
    behave("first", BEHAVES="loses_kills")

    shape = await run(caller)

    sandbox = await Sandbox.objects.aget(pk=shape.sandbox_id)
    assert shape.state == "succeeded"
    assert sandbox.state == SandboxState.RETIRING
    assert sandbox.reserved_nano_usd > 0


async def test_cancel_stops_a_run_in_this_process_at_once(caller):
    waiting = asyncio.create_task(run(caller, "#> started\n#~ 30"))
    execution = await until_running()

    assert await operations.cancel(execution=execution, reason="enough")
    shape = await asyncio.wait_for(waiting, 5)

    assert (shape.state, shape.error_code, shape.detail) == ("cancelled", "cancelled", "enough")
    assert shape.logs.stdout == "started\n"
    assert not await operations.cancel(execution=execution)


async def test_a_cancel_written_by_another_process_is_seen(caller):
    waiting = asyncio.create_task(run(caller, "#~ 30"))
    execution = await until_running()

    await rows(operations.request_cancel, execution=execution, reason="from afar")
    shape = await asyncio.wait_for(waiting, 5)

    assert (shape.state, shape.detail) == ("cancelled", "from afar")


async def until_running() -> Execution:
    async with asyncio.timeout(5):
        while True:
            found = await Execution.objects.filter(state=ExecutionState.RUNNING).afirst()
            if found:
                return found
            await asyncio.sleep(0)


async def test_a_caller_who_goes_away_does_not_stop_the_run(caller):
    waiting = asyncio.create_task(run(caller, "#~ 0.2\n#> done"))
    execution = await until_running()
    waiting.cancel()

    shape = await operations.wait(execution, 5)

    assert (shape.state, shape.logs.stdout) == ("succeeded", "done\n")


async def test_a_caller_who_asked_for_it_takes_the_run_along(caller):
    waiting = asyncio.create_task(run(caller, "#~ 30", cancel_on_disconnect=True))
    execution = await until_running()
    waiting.cancel()

    shape = await operations.wait(execution, 5)

    assert (shape.state, shape.detail) == ("cancelled", "the caller went away")


async def test_wait_seconds_answers_with_what_there_is(caller):
    shape = await operations.execute(caller=caller, request=asks("#~ 30"), wait_seconds=0.05)

    assert shape.state in ("starting", "running")
    assert await operations.cancel(execution=await Execution.objects.aget(pk=shape.id))
    assert (await operations.wait(await Execution.objects.aget(pk=shape.id), 5)).state == "cancelled"


async def test_output_beyond_the_limit_is_cut_and_said(caller):
    shape = await run(caller, "\n".join(f"#> {'x' * 99}" for _ in range(50)), limits={"output_bytes": 1000})

    assert shape.state == "succeeded"
    assert shape.truncated
    assert shape.limits_reached == ["output_truncated"]
    assert len(shape.logs.stdout) == 1000


async def test_results_beyond_the_limit_are_cut_and_said(caller):
    shape = await run(caller, "#= 1\n#= 2\n#= 3\n#= 4", limits={"results": 2})

    assert shape.results == [{"text/plain": "1"}, {"text/plain": "2"}]
    assert shape.limits_reached == ["results_truncated"]


def test_a_large_result_loses_its_largest_representations():
    heard = journal.Journal("exe_x")
    heard.hear(Said("result", {"main": True, "mime": {"text/html": "x" * 11_000_000, "text/plain": "small"}}))
    heard.hear(Said("result", {"main": False, "mime": {"e2b/data": {"a": ["y" * 1000] * 11_000}}}))
    html, kept, data = heard.take()

    assert [event.kind for event in (html, kept, data)] == ["truncated", "result", "truncated"]
    assert kept.data["mime"] == {"text/plain": "small"}
    assert html.data["left_out"] == {"text/html": 11_000_000}
    assert list(data.data["left_out"]) == ["e2b/data"]


async def test_a_limit_that_no_backend_can_keep_is_refused_by_name(caller):
    with pytest.raises(NoBackend, match="memory or the CPU time"):
        await run(caller, "#= 1", limits={"cpu_seconds": 1})


async def test_memory_above_the_templates_is_refused(caller, monkeypatch):
    monkeypatch.setattr(
        scripted.ScriptedBackend, "capabilities", replace(scripted.ScriptedBackend.capabilities, run_limits=True)
    )

    with pytest.raises(Invalid, match="at most"):
        await run(caller, "#= 1", limits={"memory_mib": 1_000_000})
    shape = await run(caller, "#= 1", limits={"memory_mib": 128})

    assert shape.limits == {"memory_mib": 128}
    assert (await Sandbox.objects.aget(pk=shape.sandbox_id)).memory_mib == 128


async def test_a_cancel_that_cost_the_variables_says_so(caller, monkeypatch):
    running = asyncio.Event()

    async def stubborn(self, handle, code, **options):
        running.set()
        try:
            await asyncio.sleep(60)
            yield
        finally:
            raise ContextRestarted

    monkeypatch.setattr(scripted.ScriptedBackend, "run_code", stubborn)
    execution = await rows(operations.submit, caller=caller, request=asks("#= 1"))
    run = operations.start(execution)
    await running.wait()
    run.cancel("enough")
    await run.task

    assert (execution.state, execution.error_code) == (ExecutionState.CANCELLED, "cancelled")
    assert [(e.kind, e.data["name"]) for e in run.events] == [("error", "ContextRestarting")]


async def test_a_repeated_request_is_answered_not_run_again(caller):
    first = await operations.execute(caller=caller, request=asks("#= 5"), idempotency_key="k")
    again = await operations.execute(caller=caller, request=asks("#= 5"), idempotency_key="k")

    assert first.id == again.id
    assert again.results == [{"text/plain": "5"}]
    assert await Execution.objects.acount() == await IdempotencyRecord.objects.acount() == 1


async def test_another_request_under_the_same_key_is_refused(caller):
    await operations.execute(caller=caller, request=asks("#= 5"), idempotency_key="k")

    with pytest.raises(KeyReused):
        await operations.execute(caller=caller, request=asks("#= 6"), idempotency_key="k")


async def test_a_session_keeps_its_sandbox_between_runs_and_pays_for_the_time_between(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    one = await run(caller, "#= 1", session_id=session.pk)
    two = await run(caller, "#= 2", session_id=session.pk)

    assert one.sandbox_id == two.sandbox_id == session.pk
    assert (one.execution_count, two.execution_count) == (1, 2)
    ended = await operations.end_session(caller=caller, session_id=session.pk)
    assert (ended.state, ended.end_reason, ended.reserved_nano_usd) == (SandboxState.GONE, "finished", 0)
    usage = [u async for u in Usage.objects.filter(sandbox=session)]
    assert sum(u.cost_nano_usd for u in usage) == ended.spent_nano_usd
    assert sum(u.duration_us for u in usage) == pytest.approx(
        (ended.ended_at - ended.created_at).total_seconds() * 1e6, abs=5e4
    )
    with pytest.raises(SessionGone):
        await run(caller, session_id=session.pk)


async def test_ending_a_session_cancels_what_runs_in_it(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    waiting = asyncio.create_task(run(caller, "#~ 30", session_id=session.pk))
    await until_running()

    await operations.end_session(caller=caller, session_id=session.pk)
    shape = await asyncio.wait_for(waiting, 5)

    assert shape.state == "cancelled"


async def test_a_session_that_dies_under_a_run_is_lost_and_closed(caller, behave):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    scripted._machines["first"][session.provider_name].died = 0.0

    shape = await run(caller, session_id=session.pk)

    assert (shape.state, shape.error_code) == ("errored", "sandbox_lost")
    await session.arefresh_from_db()
    assert (session.state, session.end_reason) == (SandboxState.GONE, "lost")


async def test_no_session_outlives_what_is_reserved_for_it(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest(timeout_seconds=60))
    machine = scripted._machines["first"][session.provider_name]

    assert machine.spec.timeout_seconds * session.rate_nano_usd_per_second <= session.reserved_nano_usd

    longer = await operations.extend_session(caller=caller, session_id=session.pk, seconds=600)
    await session.arefresh_from_db()
    assert session.reserved_nano_usd >= 600 * session.rate_nano_usd_per_second
    assert longer.leased_until == session.leased_until


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"language": "cobol"}, "language"),
        ({"template": "nowhere"}, "template"),
        ({"route": ["mars"]}, "route"),
        ({"timeout_seconds": 10**6}, "timeout_seconds"),
        ({"parent": "exe_none"}, "parent"),
    ],
)
async def test_a_request_that_cannot_be_is_refused_with_the_fields_name(caller, fields, field):
    with pytest.raises(Invalid) as refused:
        await run(caller, **fields)

    assert refused.value.facts["field"] == field
    assert not await Execution.objects.aexists()
    assert not await Sandbox.objects.aexists()


async def test_an_agents_floor_leaves_weaker_backends_out_by_name(caller, settings):
    settings.SANDBOXES = {"weak": {"BACKEND": "tests.plane.weak.WeakBackend", "OPTIONS": {}}, **settings.SANDBOXES}
    caller.agent.isolation_floor = "microvm"
    caller.agent.route = ["weak", "second"]
    await caller.agent.asave()

    shape = await run(caller)

    assert [(a.backend, a.outcome) for a in shape.attempts] == [("weak", "skipped"), ("second", "ran")]
    assert "below the agent's floor" in shape.attempts[0].reason
    caller.agent.route = ["weak"]
    with pytest.raises(NoBackend):
        await run(caller)


async def test_a_key_without_the_scope_runs_nothing(caller):
    from dataclasses import replace

    with pytest.raises(Forbidden):
        await run(replace(caller, scopes=frozenset({"read"})))


async def test_a_session_that_is_still_starting_takes_no_run(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    await Sandbox.objects.filter(pk=session.pk).aupdate(state=SandboxState.BOOTING, handle=None)

    with pytest.raises(Conflict) as refused:
        await run(caller, session_id=session.pk)

    assert refused.value.facts["retry_after"] == 1


@pytest.mark.parametrize(("code", "state", "exit_code"), [("a.py", "succeeded", 0), ("a.py #! X: y", "failed", 1)])
async def test_a_script_tells_its_exit_code(caller, code, state, exit_code):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    request = Submission(script_path="a.py", args=code.split()[1:] and [code.split(" ", 1)[1]], session_id=session.pk)

    shape = await operations.execute(caller=caller, request=request)

    assert (shape.state, shape.exit_code) == (state, exit_code)


async def test_a_session_that_died_gives_its_reservation_back(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    scripted._machines["first"][session.provider_name].died = 0.0

    await run(caller, session_id=session.pk)

    await session.arefresh_from_db()
    assert session.reserved_nano_usd == 0


async def test_a_run_whose_session_another_process_is_ending_was_cancelled(caller):
    session = await operations.open_session(caller=caller, request=SessionRequest())
    waiting = asyncio.create_task(run(caller, "#~ 0.3\n#> never", session_id=session.pk))
    execution = await until_running()
    await rows(operations.request_cancel, execution=execution, reason="the session was ended")
    await rows(begin_retiring, session, "finished")
    scripted._machines["first"][session.provider_name].died = 0.0

    shape = await asyncio.wait_for(waiting, 5)

    assert (shape.state, shape.detail) == ("cancelled", "the session was ended")
    await session.arefresh_from_db()
    assert (session.state, session.end_reason) == (SandboxState.GONE, "finished")
