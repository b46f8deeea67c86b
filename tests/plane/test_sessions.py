"""Sessions that pause while nobody needs them, wake up for whoever does, and say how they ended."""

import asyncio
from datetime import timedelta

import pytest
from django.utils import timezone

from executions import backends, operations
from executions.backends import scripted
from executions.errors import BackendError, BudgetExhausted, Conflict, NotFound, SandboxLost, SessionGone, Unsupported
from executions.hop import rows
from executions.models import Execution, Quota, Sandbox, Transition
from executions.operations import pausing
from executions.serializers import SessionRequest
from executions.states import ExecutionState, SandboxState, Unit, Window
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db
S = SandboxState


@pytest.fixture
def budget(caller) -> Quota:
    return Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, window=Window.DAY, limit=10**12)


def machine(sandbox: Sandbox) -> scripted.Machine:
    return scripted._machines[sandbox.backend][sandbox.provider_name]


async def opened(caller, **fields) -> Sandbox:
    return await operations.open_session(caller=caller, request=SessionRequest(**fields))


async def idle(sandbox: Sandbox, seconds: int = 300) -> None:
    await Sandbox.objects.filter(pk=sandbox.pk).aupdate(last_used_at=timezone.now() - timedelta(seconds=seconds))


async def paused(caller, **fields) -> Sandbox:
    sandbox = await opened(caller, **fields)
    await idle(sandbox)
    await operations.reap()
    await sandbox.arefresh_from_db()
    assert (sandbox.state, sandbox.turning_until) == (S.PAUSED, None)
    return sandbox


async def test_an_idle_session_is_paused_and_what_it_had_reserved_is_given_back(caller, budget):
    sandbox = await paused(caller)

    assert (machine(sandbox).running, machine(sandbox).alive) == (False, True)
    await budget.arefresh_from_db()
    assert sandbox.reserved_nano_usd == budget.reserved == 0
    assert budget.used == sandbox.spent_nano_usd > 0


async def test_what_is_in_use_or_never_pauses_or_was_used_a_moment_ago_is_left_alone(caller):
    fresh, never, busy = [await opened(caller, pause_after_seconds=n) for n in (120, 0, 120)]
    await idle(never)
    await rows(operations.submit, caller=caller, request=asks("#~ 5", session_id=busy.pk))
    await idle(busy)

    await operations.reap()

    assert {s.pk: s.state async for s in Sandbox.objects.all()} == dict.fromkeys(
        (fresh.pk, never.pk, busy.pk), S.LEASED
    )


async def test_a_paused_session_costs_nothing_and_resumes_for_the_next_call(caller, budget):
    sandbox = await paused(caller, timeout_seconds=600)
    await Sandbox.objects.filter(pk=sandbox.pk).aupdate(metered_until=timezone.now() - timedelta(seconds=200))
    spent = sandbox.spent_nano_usd

    shape = await operations.execute(caller=caller, request=asks("#> hello", session_id=sandbox.pk))

    assert (shape.state, shape.logs.stdout) == (ExecutionState.SUCCEEDED, "hello\n")
    await sandbox.arefresh_from_db()
    await budget.arefresh_from_db()
    assert (sandbox.state, sandbox.turning_until, machine(sandbox).running) == (S.LEASED, None, True)
    assert sandbox.spent_nano_usd - spent < 100 * sandbox.rate_nano_usd_per_second
    assert budget.reserved == sandbox.reserved_nano_usd > 500 * sandbox.rate_nano_usd_per_second
    assert await Transition.objects.filter(sandbox=sandbox, before=S.PAUSED, after=S.LEASED).acount() == 1


async def test_two_first_uses_resume_once_and_reserve_once(caller, budget, monkeypatch):
    sandbox = await paused(caller, timeout_seconds=600)
    resumed, whole = [], scripted.ScriptedBackend.resume

    async def slowly(self, handle, *, timeout_seconds):
        resumed.append(handle)
        await asyncio.sleep(0.2)
        await whole(self, handle, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(scripted.ScriptedBackend, "resume", slowly)

    runs = (operations.execute(caller=caller, request=asks("#= 1", session_id=sandbox.pk)) for _ in range(8))
    files = operations.put_file(caller=caller, session_id=sandbox.pk, path="/home/user/a", data=b"x")
    *shapes, _ = await asyncio.gather(*runs, files)

    assert {shape.state for shape in shapes} == {ExecutionState.SUCCEEDED}
    assert len(resumed) == 1
    await budget.arefresh_from_db()
    await sandbox.arefresh_from_db()
    assert budget.reserved == sandbox.reserved_nano_usd < 640 * sandbox.rate_nano_usd_per_second


async def test_a_budget_that_does_not_cover_it_refuses_and_the_session_stays_paused(caller, budget):
    sandbox = await paused(caller)
    await Quota.objects.aupdate(limit=budget.used + sandbox.spent_nano_usd + 10)

    with pytest.raises(BudgetExhausted):
        await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))

    await sandbox.arefresh_from_db()
    assert (sandbox.state, sandbox.turning_until, sandbox.reserved_nano_usd) == (S.PAUSED, None, 0)
    assert not machine(sandbox).running
    assert not await Execution.objects.aexists()


async def test_a_session_that_cannot_be_resumed_now_is_kept_for_the_next_try(caller, monkeypatch):
    sandbox = await paused(caller)

    async def fails(*_, **__):
        raise BackendError("No answer.")

    with monkeypatch.context() as patch:
        patch.setattr(scripted.ScriptedBackend, "resume", fails)
        shape = await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))
    again = await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))

    assert (shape.state, shape.error_code) == (ExecutionState.ERRORED, "backend_unavailable")
    assert "nothing has run" in shape.detail
    assert again.state == ExecutionState.SUCCEEDED


async def test_a_session_that_is_gone_when_it_is_to_be_resumed_says_so(caller, budget):
    sandbox = await paused(caller)
    machine(sandbox).end("expired")

    shape = await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))

    assert (shape.state, shape.error_code) == (ExecutionState.ERRORED, "session_gone")
    with pytest.raises(SessionGone, match=r"its sandbox died.*Nothing was kept|its sandbox died.*nothing was kept"):
        await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))
    await sandbox.arefresh_from_db()
    await budget.arefresh_from_db()
    assert (sandbox.state, sandbox.end_reason, budget.reserved) == (S.GONE, "lost", 0)


async def test_a_process_that_dies_in_mid_pause_leaves_what_is_billed_on_and_paused_by_the_next_round(caller):
    sandbox = await opened(caller)
    await idle(sandbox)
    assert await rows(pausing._begin, sandbox, False)
    await Sandbox.objects.aupdate(turning_until=timezone.now() - timedelta(seconds=1))
    assert (await Sandbox.objects.aget()).reserved_nano_usd > 0

    await operations.reap()

    await sandbox.arefresh_from_db()
    assert (sandbox.state, sandbox.turning_until, sandbox.reserved_nano_usd) == (S.PAUSED, None, 0)
    assert not machine(sandbox).running


async def test_a_process_that_dies_in_mid_resume_holds_nobody_up(caller):
    sandbox = await paused(caller)
    await rows(pausing.rouse, sandbox)
    assert await rows(pausing._take_turn, sandbox)
    await Sandbox.objects.aupdate(turning_until=timezone.now() - timedelta(seconds=1))

    shape = await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))

    assert shape.state == ExecutionState.SUCCEEDED
    assert (await Sandbox.objects.aget()).state == S.LEASED


async def test_who_comes_while_it_is_being_paused_runs_all_the_same_with_what_was_reserved(caller, monkeypatch):
    sandbox = await opened(caller, timeout_seconds=600)
    await idle(sandbox)
    pausing_now, go_on, whole = asyncio.Event(), asyncio.Event(), scripted.ScriptedBackend.pause

    async def slowly(self, handle):
        pausing_now.set()
        await go_on.wait()
        await whole(self, handle)

    monkeypatch.setattr(scripted.ScriptedBackend, "pause", slowly)
    reaping = asyncio.create_task(operations.reap())
    await pausing_now.wait()

    run = asyncio.create_task(operations.execute(caller=caller, request=asks(session_id=sandbox.pk)))
    while not await Execution.objects.aexists():
        await asyncio.sleep(0.01)
    go_on.set()

    assert (await run).state == ExecutionState.SUCCEEDED
    await reaping
    await sandbox.arefresh_from_db()
    assert (sandbox.state, sandbox.turning_until, machine(sandbox).running) == (S.LEASED, None, True)
    assert sandbox.reserved_nano_usd > 500 * sandbox.rate_nano_usd_per_second


async def test_a_session_paused_on_request_does_not_end_idle_and_is_resumed_on_request(caller):
    sandbox = await opened(caller)
    await operations.pause_session(caller=caller, session_id=sandbox.pk)
    again = await operations.pause_session(caller=caller, session_id=sandbox.pk)
    await idle(sandbox, 3000)

    await operations.reap()

    assert (again.state, (await Sandbox.objects.aget()).state) == (S.PAUSED, S.PAUSED)
    resumed = await operations.resume_session(caller=caller, session_id=sandbox.pk)
    assert (resumed.state, resumed.stays_paused) == (S.LEASED, False)
    await idle(sandbox, 3000)
    await operations.reap()
    assert (await Sandbox.objects.aget()).end_reason == "idle"


async def test_a_pause_is_refused_while_code_runs_and_where_there_is_none(caller, monkeypatch):
    sandbox = await opened(caller)
    await rows(operations.submit, caller=caller, request=asks("#~ 5", session_id=sandbox.pk))

    with pytest.raises(Conflict, match="Code runs"):
        await operations.pause_session(caller=caller, session_id=sandbox.pk)
    with pytest.raises(NotFound):
        await operations.pause_session(caller=caller, session_id="sbx_nobodys")
    monkeypatch.setattr(scripted.ScriptedBackend, "capabilities", backends.base.Capabilities())
    with pytest.raises(Unsupported):
        await operations.pause_session(caller=caller, session_id=sandbox.pk)


async def test_a_pause_that_fails_is_tried_again_after_twice_the_time(caller, monkeypatch):
    sandbox = await opened(caller, pause_after_seconds=100)
    await idle(sandbox, 150)

    async def fails(*_):
        raise BackendError("No answer.")

    with monkeypatch.context() as patch:
        patch.setattr(scripted.ScriptedBackend, "pause", fails)
        await operations.reap()
    await operations.reap()

    await sandbox.arefresh_from_db()
    assert sandbox.pause_after_seconds == 200
    assert sandbox.turning_until is not None
    assert sandbox.reserved_nano_usd > 0
    await idle(sandbox, 250)
    await operations.reap()
    await sandbox.arefresh_from_db()
    assert (sandbox.state, sandbox.turning_until) == (S.PAUSED, None)


async def test_a_refused_extension_leaves_the_end_as_it_was(caller, budget):
    sandbox = await opened(caller, timeout_seconds=60)
    await Quota.objects.aupdate(limit=sandbox.reserved_nano_usd + 10)

    with pytest.raises(BudgetExhausted):
        await operations.extend_session(caller=caller, session_id=sandbox.pk, seconds=3600)

    row = await Sandbox.objects.aget()
    assert (row.leased_until, row.reserved_nano_usd) == (sandbox.leased_until, sandbox.reserved_nano_usd)
    assert machine(sandbox).ends - machine(sandbox).born < 100


async def test_an_extension_that_the_backend_fails_leaves_the_end_and_its_next_try_reserves_nothing_more(
    caller, budget, monkeypatch
):
    sandbox = await opened(caller, timeout_seconds=60)

    async def fails(*_):
        raise BackendError("No answer.")

    whole = scripted.ScriptedBackend.set_timeout
    monkeypatch.setattr(scripted.ScriptedBackend, "set_timeout", fails)
    with pytest.raises(BackendError):
        await operations.extend_session(caller=caller, session_id=sandbox.pk, seconds=600)
    monkeypatch.setattr(scripted.ScriptedBackend, "set_timeout", whole)
    failed = await Sandbox.objects.aget()
    extended = await operations.extend_session(caller=caller, session_id=sandbox.pk, seconds=600)

    assert failed.leased_until == sandbox.leased_until
    assert extended.leased_until > sandbox.leased_until + timedelta(seconds=500)
    assert extended.reserved_nano_usd - failed.reserved_nano_usd <= 2 * sandbox.rate_nano_usd_per_second
    await budget.arefresh_from_db()
    assert budget.reserved == extended.reserved_nano_usd


async def test_a_paused_session_is_extended_without_money_and_its_resume_reserves_all_of_it(caller, budget):
    sandbox = await paused(caller, timeout_seconds=600)

    later = await operations.extend_session(caller=caller, session_id=sandbox.pk, seconds=7200)

    await budget.arefresh_from_db()
    assert (later.state, budget.reserved) == (S.PAUSED, 0)
    await operations.resume_session(caller=caller, session_id=sandbox.pk)
    await budget.arefresh_from_db()
    assert budget.reserved > 7000 * sandbox.rate_nano_usd_per_second
    assert machine(sandbox).ends - machine(sandbox).born > 7000


async def test_the_provider_is_paid_for_no_longer_than_is_reserved(caller, budget):
    sandbox = await opened(caller, timeout_seconds=600)

    assert machine(sandbox).spec.timeout_seconds <= sandbox.reserved_nano_usd / sandbox.rate_nano_usd_per_second


async def test_a_session_whose_machine_died_paused_is_closed_when_it_is_paused_again(caller):
    sandbox = await opened(caller)
    machine(sandbox).end("died")

    with pytest.raises(SessionGone):
        await operations.pause_session(caller=caller, session_id=sandbox.pk)

    assert (await Sandbox.objects.aget()).end_reason == "lost"
    with pytest.raises(SandboxLost):
        await backends.get(sandbox.backend).connect(sandbox.machine)


# With real threads and transactions of their own, as several processes have them


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("turn", range(3))
def test_of_many_first_uses_and_pauses_at_once_none_runs_in_a_machine_that_is_paused(caller, turn, monkeypatch):
    budget = Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, window=Window.DAY, limit=10**12)
    whole, ran_paused, resumes = scripted.ScriptedBackend.run_code, [], []
    resume = scripted.ScriptedBackend.resume

    async def watched(self, handle, code, **options):
        if not self.machines[handle["sandbox_id"]].running:
            ran_paused.append(code)
        async for event in whole(self, handle, code, **options):
            yield event

    async def counted(self, handle, *, timeout_seconds):
        resumes.append(handle)
        await resume(self, handle, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(scripted.ScriptedBackend, "run_code", watched)
    monkeypatch.setattr(scripted.ScriptedBackend, "resume", counted)

    async def storm():
        sandbox = await opened(caller, pause_after_seconds=1)
        pauses = 0
        for _ in range(5):
            await idle(sandbox)
            runs = [operations.execute(caller=caller, request=asks("#= 1", session_id=sandbox.pk)) for _ in range(3)]
            done = await asyncio.gather(pausing.pause_idle(), *runs, pausing.pause_idle(), return_exceptions=True)
            assert {shape.state for shape in done[1:-1]} == {ExecutionState.SUCCEEDED}, done
            pauses += done[0] + done[-1]
            await idle(sandbox)
            pauses += await pausing.pause_idle()
        assert pauses >= 5
        return sandbox

    from asgiref.sync import async_to_sync

    sandbox = async_to_sync(storm)()

    assert ran_paused == []
    sandbox.refresh_from_db()
    budget.refresh_from_db()
    assert (sandbox.state, sandbox.turning_until) == (S.PAUSED, None)
    assert budget.reserved == sandbox.reserved_nano_usd == 0
    assert budget.used == sandbox.spent_nano_usd
