"""Warm pools: claimed in the admission, by one caller each, paid for by the pool until then."""

import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from executions import demand, operations, pool
from executions.backends import scripted
from executions.costs import NANO
from executions.errors import BudgetExhausted, QuotaExceeded
from executions.hop import rows
from executions.models import (
    Agent,
    Claim,
    Execution,
    LedgerEntry,
    PackageLock,
    Pool,
    Quota,
    Rate,
    Sandbox,
    Template,
    Usage,
)
from executions.operations import replenish
from executions.operations import run as running
from executions.operations.boot import boot
from executions.serializers import SessionRequest
from executions.states import EndReason, ExecutionState, PoolTarget, SandboxState, Unit, Window
from tests.plane.conftest import asks

S = SandboxState
pytestmark = pytest.mark.django_db


async def a_pool(template: Template, target: int = 2, backend: str = "first", **fields) -> Pool:
    return await Pool.objects.acreate(backend=backend, template=template, target=target, **fields)


async def filled() -> None:
    """Rounds until nothing is left to do."""
    for _ in range(3):
        await replenish.replenish()
        await replenish.settled()


async def runs(caller, request=None) -> Execution:
    """The row of an execution that was waited for."""
    told = await operations.execute(caller=caller, request=request or asks())
    return await Execution.objects.select_related("sandbox__template").aget(pk=told.id)


async def states() -> list[str]:
    return sorted([s.state async for s in Sandbox.objects.all()])


async def moved(**fields) -> None:
    """Time has passed, as far as the rows of waiting sandboxes show."""
    await Sandbox.objects.filter(state__in=[S.IDLE, S.BOOTING]).aupdate(**fields)


def machines(alias: str = "first"):
    return scripted._machines.setdefault(alias, {})


# Filling


async def test_a_pool_is_filled_and_what_boots_counts(caller, seeded):
    found = await a_pool(seeded, 3)

    booting, _ = await rows(replenish.plan, found)
    more, _ = await rows(replenish.plan, found)
    for sandbox in booting:
        await replenish._boot(sandbox)
    await replenish.settled()

    assert (len(booting), len(more)) == (3, 0)
    ready = [s async for s in Sandbox.objects.all()]
    assert [s.state for s in ready] == [S.IDLE] * 3
    assert all(machines()[s.provider_name].alive for s in ready)


async def test_what_is_not_wanted_any_more_is_let_go_of(caller, seeded):
    await a_pool(seeded, 3)
    await filled()

    await Pool.objects.aupdate(target=1)
    await filled()
    fewer = await states()
    await Pool.objects.aupdate(is_enabled=False)
    await filled()

    assert fewer == [S.GONE, S.GONE, S.IDLE]
    assert await states() == [S.GONE] * 3
    assert {s.end_reason async for s in Sandbox.objects.all()} == {EndReason.IDLE}
    assert not any([machines()[s.provider_name].alive async for s in Sandbox.objects.all()])


async def test_a_sandbox_is_replaced_before_its_provider_ends_it(caller, seeded):
    await a_pool(seeded, 1)
    await filled()
    (old,) = [s async for s in Sandbox.objects.all()]

    await moved(leased_until=timezone.now() + timedelta(seconds=replenish.REPLACE_SECONDS - 1))
    await filled()
    both = await states()
    await Sandbox.objects.filter(pk=old.pk).aupdate(
        leased_until=timezone.now() + timedelta(seconds=replenish.RETIRE_SECONDS - 1)
    )
    await filled()

    assert both == [S.IDLE, S.IDLE]
    await old.arefresh_from_db()
    assert (old.state, old.end_reason) == (S.GONE, EndReason.IDLE)
    assert await states() == [S.GONE, S.IDLE]


async def test_what_was_made_of_an_older_template_is_replaced_and_never_handed_out(caller, seeded):
    await a_pool(seeded, 1)
    await filled()
    (old,) = [s async for s in Sandbox.objects.all()]
    await Template.objects.aupdate(build=1)

    execution = await runs(caller)
    await filled()

    assert execution.sandbox_id != old.pk
    await old.arefresh_from_db()
    assert (old.state, old.end_reason) == (S.GONE, EndReason.EVICTED)
    (new,) = [s async for s in Sandbox.objects.filter(state=S.IDLE)]
    assert new.made_of != old.made_of


async def test_a_backend_that_is_away_is_asked_less_and_less(caller, seeded, behave):
    behave("first", BEHAVES="never_boots")
    found = await a_pool(seeded, 3)

    await filled()
    asked = await Sandbox.objects.acount()
    await found.arefresh_from_db()
    waits = [(found.retry_at - timezone.now()).total_seconds()]
    for _ in range(2):
        await Pool.objects.aupdate(retry_at=timezone.now())
        await filled()
        await found.arefresh_from_db()
        waits.append((found.retry_at - timezone.now()).total_seconds())
    await Pool.objects.aupdate(retry_at=timezone.now())
    await filled()

    assert asked == 3
    assert waits[0] < waits[1] < waits[2]
    assert await states() == [S.GONE] * 5  # the breaker is open now: no further one is tried
    await found.arefresh_from_db()
    assert "This machine never boots." in found.trouble


async def test_a_backend_that_is_back_fills_the_pool_again(caller, seeded, behave):
    behave("first", BEHAVES="never_boots")
    found = await a_pool(seeded, 3)
    await filled()
    behave("first")
    await Pool.objects.aupdate(retry_at=timezone.now())

    await filled()

    await found.arefresh_from_db()
    assert (found.failures, found.trouble) == (0, "")
    assert await Sandbox.objects.filter(state=S.IDLE).acount() == 3


async def test_what_a_dead_process_was_booting_is_ended_and_booted_anew(caller, seeded):
    found = await a_pool(seeded, 1)
    (orphan,), _ = await rows(replenish.plan, found)  # the intent is there,
    await boot(orphan)  # the machine, too, and then the process is killed

    await filled()
    early = await states()
    await moved(created_at=timezone.now() - 2 * replenish.BOOT_PATIENCE)
    await filled()

    assert early == [S.BOOTING]
    await orphan.arefresh_from_db()
    assert (orphan.state, orphan.end_reason) == (S.GONE, EndReason.LOST)
    assert not machines()[orphan.provider_name].alive
    assert await states() == [S.GONE, S.IDLE]


async def test_a_boot_that_was_given_up_meanwhile_leaves_no_machine(caller, seeded):
    found = await a_pool(seeded, 1)
    (slow,), _ = await rows(replenish.plan, found)
    given_up = await Sandbox.objects.aget()
    await operations.retire(given_up, EndReason.LOST)

    await replenish._boot(slow)
    await replenish.settled()

    assert not machines()[slow.provider_name].alive


# Claiming


async def test_an_execution_takes_a_warm_sandbox_and_a_successor_is_booted(caller, seeded):
    await a_pool(seeded, 1)
    await filled()
    (warm,) = [s async for s in Sandbox.objects.all()]

    execution = await runs(caller)
    await filled()

    assert (execution.state, execution.sandbox_id) == (ExecutionState.SUCCEEDED, warm.pk)
    await warm.arefresh_from_db()
    assert (warm.state, warm.agent_id, warm.team_id) == (S.GONE, caller.agent.pk, caller.team.pk)
    assert [t.after async for t in warm.transitions.order_by("pk")] == ["booting", "idle", "leased", "retiring", "gone"]
    assert [t.after async for t in execution.transitions.order_by("pk")][:3] == ["queued", "starting", "running"]
    assert await states() == [S.GONE, S.IDLE]
    assert not machines()[warm.provider_name].alive


@pytest.mark.parametrize(
    ("asked", "agents"),
    [
        ({"limits": {"memory_mib": 128}}, {}),
        ({"template": "other"}, {}),
        ({"route": ["second"]}, {}),
        ({}, {"network_allow": ["example.org"]}),
    ],
    ids=["size", "template", "backend", "network"],
)
async def test_what_is_of_another_kind_is_not_claimed(caller, seeded, behave, asked, agents):
    await Template.objects.acreate(name="other")
    await a_pool(seeded, 1)
    await filled()
    for name, value in agents.items():
        setattr(caller.agent, name, value)
    caller.agent.route = ["first"]
    ScriptedBackend = type(running.backends.get("first"))
    sized = replace(ScriptedBackend.capabilities, run_limits=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedBackend, "capabilities", sized)
        execution = await runs(caller, asks(**asked))

    assert execution.state == ExecutionState.SUCCEEDED
    assert execution.sandbox.made_of == ""
    assert await Sandbox.objects.filter(state=S.IDLE).acount() == 1


async def test_a_pool_with_network_rules_serves_exactly_those_who_have_them(caller, seeded):
    await a_pool(seeded, 1, network_allow=["example.org"])
    await filled()
    closed = await runs(caller, asks(network=[]))
    caller.agent.network_allow = ["example.org"]

    opened = await runs(caller, asks("#@ example.org:443"))

    assert closed.sandbox.made_of == ""
    assert opened.sandbox.made_of
    assert [e.verdict async for e in opened.egress.all()] == ["allowed"]


async def test_a_sandbox_behind_weaker_walls_than_today_is_not_handed_out(caller, seeded):
    await a_pool(seeded, 1)
    await filled()
    await moved(isolation="reduced")

    execution = await runs(caller)
    await filled()

    assert execution.sandbox.made_of == ""
    assert await Sandbox.objects.filter(end_reason=EndReason.EVICTED).acount() == 1


async def test_the_environment_of_a_run_goes_with_the_run(caller, seeded):
    await a_pool(seeded, 1)
    await filled()

    execution = await runs(caller, asks(env={"TOKEN": "hunter2"}))

    assert execution.sandbox.made_of
    assert execution.sandbox.env == {}
    assert machines()[execution.sandbox.provider_name].spec.env == {}


@pytest.mark.parametrize(
    ("unit", "limit", "error"),
    [(Unit.NANO_USD, 1000, BudgetExhausted), (Unit.CONCURRENT_EXECUTIONS, 0, QuotaExceeded)],
)
async def test_who_is_refused_leaves_the_sandbox_where_it_was(caller, seeded, unit, limit, error):
    caller.agent.route = ["first"]
    await a_pool(seeded, 1)
    await filled()
    await Quota.objects.acreate(team=caller.team, unit=unit, window=Window.TOTAL, limit=limit)

    with pytest.raises(error):
        await runs(caller)

    warm = await Sandbox.objects.select_related("team").aget()
    assert (warm.state, warm.team.name) == (S.IDLE, pool.ACCOUNT)
    assert await Claim.objects.acount() == 0


async def test_a_sandbox_of_a_pool_counts_once_against_everybodys_ceiling(caller, seeded):
    await a_pool(seeded, 2)
    await filled()
    await Quota.objects.acreate(unit=Unit.CONCURRENT_SANDBOXES, limit=2)

    execution = await runs(caller)

    assert execution.state == ExecutionState.SUCCEEDED


# Money


@pytest.fixture
def priced(db):
    """A dollar a second."""
    for alias in ("first", "second"):
        Rate.objects.create(backend=alias, meter=Rate.VCPU, nano_usd=NANO)
        Rate.objects.create(backend=alias, meter=Rate.GIB, nano_usd=0)


async def test_the_pool_pays_for_boot_and_waiting_and_the_caller_for_the_run(caller, seeded, priced):
    found = await a_pool(seeded, 1)
    account = await rows(pool.account, found)
    whole = await Quota.objects.acreate(unit=Unit.NANO_USD, limit=10**15)
    mine = await Quota.objects.acreate(agent=caller.agent, unit=Unit.NANO_USD, limit=10**15)
    its = await Quota.objects.acreate(agent=account.agent, unit=Unit.NANO_USD, limit=10**15)
    await filled()
    born = timezone.now() - timedelta(seconds=100)
    await moved(created_at=born, ready_at=born + timedelta(seconds=1))
    await its.arefresh_from_db()
    reserved = its.reserved

    execution = await runs(caller, asks("#~ 0.01"))
    await Pool.objects.aupdate(is_enabled=False)
    await filled()

    sandbox = execution.sandbox
    assert reserved == (found.lifetime_seconds + pool.MARGIN_SECONDS) * NANO
    assert 0 < execution.cost_nano_usd == sandbox.spent_nano_usd < 5 * NANO
    spent = {u.kind: u async for u in Usage.objects.filter(sandbox=sandbox)}
    assert spent.keys() == {Usage.BOOT, Usage.POOL, Usage.RUN}
    assert {kind: u.agent_id for kind, u in spent.items()} == {
        Usage.BOOT: account.agent.pk, Usage.POOL: account.agent.pk, Usage.RUN: caller.agent.pk
    }  # fmt: skip
    assert spent[Usage.BOOT].duration_us == 1_000_000
    claim = await Claim.objects.aget()
    assert 99 * NANO < spent[Usage.POOL].cost_nano_usd + NANO == claim.spent_nano_usd < 110 * NANO
    for quota in (whole, mine, its):
        await quota.arefresh_from_db()
        assert quota.reserved == 0
    assert mine.used == execution.cost_nano_usd
    assert whole.used == mine.used + its.used
    for quota in (whole, mine, its):
        sums = dict.fromkeys(("reserve", "release", "spend"), 0)
        async for line in LedgerEntry.objects.filter(quota=quota):
            sums[line.kind] += line.amount_nano_usd
        assert sums["reserve"] == sums["release"] + sums["spend"]
        assert sums["spend"] == quota.used


async def test_no_provider_is_told_more_time_than_is_reserved(caller, seeded, priced):
    await a_pool(seeded, 1)
    await filled()

    sandbox = await Sandbox.objects.aget()

    told = machines()[sandbox.provider_name].spec.timeout_seconds
    assert told * sandbox.rate_nano_usd_per_second <= sandbox.reserved_nano_usd


async def test_a_pool_without_money_is_not_filled_and_says_so(caller, seeded, priced):
    found = await a_pool(seeded, 3)
    account = await rows(pool.account, found)
    lasts = found.lifetime_seconds + pool.MARGIN_SECONDS
    budget = await Quota.objects.acreate(agent=account.agent, unit=Unit.NANO_USD, limit=lasts * NANO)

    await filled()
    execution = await runs(caller)

    await found.arefresh_from_db()
    await budget.arefresh_from_db()
    assert execution.state == ExecutionState.SUCCEEDED
    assert await Sandbox.objects.exclude(made_of="").acount() == 1
    assert "agent pool-" in found.trouble
    assert "left" in found.trouble
    assert budget.used + budget.reserved <= budget.limit


async def test_a_long_run_has_its_provider_told_and_the_rest_given_back(caller, seeded, priced):
    found = await a_pool(seeded, 1)
    account = await rows(pool.account, found)
    budget = await Quota.objects.acreate(agent=account.agent, unit=Unit.NANO_USD, limit=10**15)
    await filled()
    execution = await rows(operations.submit, caller=caller, request=asks())
    await Pool.objects.aupdate(is_enabled=False)

    await replenish.fit(execution.sandbox, after_seconds=0)

    machine = machines()[execution.sandbox.provider_name]
    left = (execution.sandbox.leased_until - timezone.now()).total_seconds()
    assert machine.ends - time.monotonic() == pytest.approx(left, abs=2)
    await budget.arefresh_from_db()
    assert budget.reserved == 0 < budget.used
    assert (await Sandbox.objects.aget()).reserved_nano_usd == 90 * NANO


# Lost sandboxes


async def test_one_that_had_vanished_is_replaced_by_a_fresh_one_and_nothing_is_lost(caller, seeded):
    await a_pool(seeded, 1)
    await filled()
    gone = await Sandbox.objects.aget()
    machines()[gone.provider_name].end("the provider lost it")

    execution = await runs(caller, asks("#= 42"))
    await filled()

    assert execution.state == ExecutionState.SUCCEEDED
    tried = [(a.backend, a.outcome, a.reason) async for a in execution.attempts.all()]
    assert [t[:2] for t in tried] == [("first", "unavailable"), ("first", "ran")]
    assert "of the pool was gone" in tried[0][2]
    await gone.arefresh_from_db()
    assert (gone.state, gone.end_reason) == (S.GONE, EndReason.LOST)
    assert execution.sandbox_id != gone.pk
    assert (await Claim.objects.aget(pk=gone.pk)).spent_nano_usd is not None


async def test_files_that_cannot_be_written_any_more_are_written_to_the_fresh_one(caller, seeded):
    await a_pool(seeded, 1)
    await filled()
    machines()[(await Sandbox.objects.aget()).provider_name].end("the provider lost it")

    execution = await runs(caller, asks(files={"a.txt": "aGk="}))

    assert execution.state == ExecutionState.SUCCEEDED
    assert list(machines()[execution.sandbox.provider_name].files.values()) == [b"hi"]


async def test_one_that_dies_while_code_runs_is_not_replaced(caller, seeded, behave):
    await a_pool(seeded, 1)
    await filled()
    behave("first", BEHAVES="dies_mid_run")

    execution = await runs(caller)

    assert (execution.state, execution.error_code) == (ExecutionState.ERRORED, "sandbox_lost")
    assert await execution.attempts.acount() == 1


async def test_when_no_fresh_one_can_be_had_there_the_route_goes_on(caller, seeded, behave):
    await a_pool(seeded, 1)
    await filled()
    machines()[(await Sandbox.objects.aget()).provider_name].end("the provider lost it")
    behave("first", BEHAVES="never_boots")

    execution = await runs(caller)

    assert (execution.state, execution.backend) == (ExecutionState.SUCCEEDED, "second")
    assert await execution.attempts.acount() == 3


async def test_what_a_provider_does_not_list_any_more_is_let_go_of(caller, seeded):
    await a_pool(seeded, 2)
    await filled()
    first = await Sandbox.objects.afirst()
    await moved(ready_at=timezone.now() - timedelta(minutes=1))
    machines()[first.provider_name].end("the provider lost it")

    await operations.reap()
    await filled()

    await first.arefresh_from_db()
    assert (first.state, first.end_reason) == (S.GONE, EndReason.LOST)
    assert await Sandbox.objects.filter(state=S.IDLE).acount() == 2


# Sessions


async def test_a_session_takes_a_warm_sandbox_which_then_lives_as_long_as_it(caller, seeded, priced):
    found = await a_pool(seeded, 1)
    account = await rows(pool.account, found)
    budget = await Quota.objects.acreate(agent=account.agent, unit=Unit.NANO_USD, limit=10**15)
    await filled()
    (warm,) = [s async for s in Sandbox.objects.all()]

    session = await operations.open_session(caller=caller, request=SessionRequest(timeout_seconds=3000))

    assert (session.pk, session.state, session.kept) == (warm.pk, S.LEASED, True)
    machine = machines()[session.provider_name]
    left = (session.leased_until - timezone.now()).total_seconds() + session.grace_seconds
    assert machine.ends - time.monotonic() == pytest.approx(left, abs=2)
    assert session.reserved_nano_usd >= 3000 * NANO
    await Pool.objects.aupdate(is_enabled=False)
    await filled()
    await budget.arefresh_from_db()
    assert budget.reserved == 0 < budget.used


async def test_a_session_whose_warm_sandbox_had_vanished_gets_a_fresh_one(caller, seeded):
    await a_pool(seeded, 1)
    await filled()
    gone = await Sandbox.objects.aget()
    machines()[gone.provider_name].end("the provider lost it")

    session = await operations.open_session(caller=caller, request=SessionRequest())
    await filled()

    assert (session.backend, session.state) == ("first", S.LEASED)
    assert machines()[session.provider_name].alive
    await gone.arefresh_from_db()
    assert (gone.state, gone.end_reason) == (S.GONE, EndReason.LOST)


# How many


def test_a_forecast_covers_what_arrives_while_a_successor_boots():
    steady = [n / 10 for n in range(3000)]  # ten a second for five minutes

    assert demand.forecast([], boot=0.5) == 0
    assert 15 <= demand.forecast(steady, boot=0.5) <= 20
    assert demand.forecast(steady, boot=5) > 55
    assert demand.forecast([10.0] * 7, boot=0.5) == 7  # a burst


@pytest.mark.parametrize(("hour", "many"), [(3, 0), (9, 5)])
def test_a_pool_follows_the_hours(seeded, hour, many):
    found = Pool(backend="first", template=seeded, follows=PoolTarget.HOURS, hours=[0] * 8 + [5] * 16)

    assert demand.wanted(found, timezone.now().replace(hour=hour)) == many


async def test_a_pool_that_follows_demand_grows_with_it_up_to_its_most(caller, seeded):
    found = await a_pool(seeded, 1, follows=PoolTarget.FORECAST, at_most=4)
    await filled()
    quiet = await rows(demand.wanted, found, timezone.now())

    for _ in range(8):
        await runs(caller)

    assert quiet == 1
    assert await rows(demand.wanted, found, timezone.now()) == 4


async def test_a_pool_sleeps_when_nobody_asks_and_wakes_when_somebody_may(caller, seeded):
    found = await a_pool(seeded, 1, zero_after_seconds=600, created_at=timezone.now() - timedelta(hours=1))
    await filled()
    asleep = await states()

    await rows(demand.wish, caller.agent)
    await filled()

    assert asleep == []
    assert await states() == [S.IDLE]
    await Pool.objects.filter(pk=found.pk).aupdate(wished_at=timezone.now() - timedelta(hours=1))
    await filled()
    assert await states() == [S.GONE]


async def test_the_first_request_wakes_a_pool_that_sleeps(caller, seeded):
    await a_pool(seeded, 1, zero_after_seconds=600, created_at=timezone.now() - timedelta(hours=1))

    execution = await runs(caller)
    await filled()

    assert execution.sandbox.made_of == ""
    assert await Sandbox.objects.filter(state=S.IDLE).acount() == 1


async def test_a_pool_tells_its_hits_and_misses_and_what_it_costs(caller, seeded, priced):
    found = await a_pool(seeded, 2)
    await filled()
    for _ in range(3):
        await rows(operations.submit, caller=caller, request=asks())

    told = (await rows(demand.standings, [found]))[found.pk]

    assert (told.hits, told.misses, told.ready) == (2, 1, 0)
    assert told.hit_rate == pytest.approx(2 / 3)
    assert 0 < told.claim_p50_ms <= told.claim_p95_ms
    await filled()
    assert (await rows(demand.standings, [found]))[found.pk].idle_nano_usd_per_day == 2 * 86_400 * NANO


# Doors


async def test_an_execution_says_that_its_sandbox_was_ready(caller, seeded):
    await a_pool(seeded, 1)
    await filled()

    first = await operations.execute(caller=caller, request=asks())
    second = await operations.execute(caller=caller, request=asks(limits={"output_bytes": 10}, route=["second"]))

    assert (first.from_pool, second.from_pool) == (True, False)


async def test_a_backend_tells_its_pools(caller, seeded):
    await a_pool(seeded, 2)
    await filled()
    await operations.execute(caller=caller, request=asks())

    told = {state["alias"]: state["pools"] for state in await operations.backend_states()}

    (found,) = told["first"]
    assert (found["template"], found["network"], found["hit_rate"], found["trouble"]) == ("default", [], 1.0, "")
    assert told["second"] == []


def test_a_pool_is_made_changed_and_switched_off_by_a_command(caller, seeded, capsys):
    call_command("pool", "first", "--target", "3", "--budget", "1.5", "--network", "Example.org")
    made = Pool.objects.get()
    call_command("pool", "first", "--network", "example.org", "--follows", "forecast", "--at-most", "7", "--off")

    assert (made.target, made.network_allow, pool.budget(made).limit) == (3, ["example.org"], 1_500_000_000)
    made.refresh_from_db()
    assert (made.target, made.follows, made.at_most, made.is_enabled) == (3, PoolTarget.FORECAST, 7, False)
    assert "default on first: 0 ready" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "no backend"), (["first", "--template", "x"], "no template"), (["first", "--hours", "1,2"], "24")],
)
def test_a_command_that_cannot_be_followed_says_why(caller, seeded, words, said):
    with pytest.raises(CommandError, match=said):
        call_command("pool", *words)

    assert not Pool.objects.exists()


# Races


@pytest.mark.django_db(transaction=True)
def test_twenty_racers_for_three_warm_sandboxes_never_share_one(caller, seeded):
    Pool.objects.create(backend="first", template=seeded, target=3)
    async_to_sync(filled)()
    together, took = threading.Barrier(20), []

    def race() -> None:
        together.wait(timeout=20)
        try:
            took.append(operations.submit(caller=caller, request=asks()).sandbox)
        finally:
            connection.close()

    racers = [threading.Thread(target=race) for _ in range(20)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)

    assert len(took) == len({s.pk for s in took}) == 20
    assert sum(bool(s.made_of) for s in took) == Claim.objects.count() == 3
    assert Sandbox.objects.filter(state=S.IDLE).count() == 0


@pytest.mark.django_db(transaction=True)
def test_of_many_processes_one_boots_what_is_missing(caller, seeded):
    found = Pool.objects.create(backend="first", template=seeded, target=3)
    together, planned = threading.Barrier(8), []

    def plan() -> None:
        together.wait(timeout=20)
        try:
            planned.append(len(replenish.plan(found)[0]))
        finally:
            connection.close()

    planners = [threading.Thread(target=plan) for _ in range(8)]
    for planner in planners:
        planner.start()
    for planner in planners:
        planner.join(60)

    assert sorted(planned) == [0] * 7 + [3]
    assert Sandbox.objects.count() == 3


# An agent's packages


async def locked(agent, digest: str) -> PackageLock:
    """The agent has another lock from now on."""
    lock = await PackageLock.objects.acreate(agent=agent, digest=digest, python="3.11")
    await Agent.objects.filter(pk=agent.pk).aupdate(lock=lock)
    agent.lock = lock
    return lock


async def test_an_agent_with_a_lock_takes_only_from_the_pool_with_its_packages_and_nobody_else_does(caller, seeded):
    other = replace(
        caller,
        agent=await Agent.objects.acreate(team=caller.team, name="other", isolation_floor="none", route=["first"]),
    )
    lock = await locked(caller.agent, "1")
    await a_pool(seeded, 1)
    mine = await a_pool(seeded, 1, packages_of=caller.agent)
    await filled()
    assert {(s.pool_id, s.lock_id) async for s in Sandbox.objects.all()} == {
        (mine.pk, lock.pk),
        ((await Pool.objects.aget(packages_of=None)).pk, None),
    }

    with_packages, without = await runs(caller), await runs(other)
    nothing_left = await runs(caller)

    assert (with_packages.sandbox.pool_id, with_packages.sandbox.lock_id) == (mine.pk, lock.pk)
    assert (without.sandbox.lock_id, bool(without.sandbox.made_of)) == (None, True)
    assert (nothing_left.sandbox.made_of, nothing_left.sandbox.lock_id) == ("", lock.pk)


async def test_when_a_lock_changes_what_is_ready_is_nobodys_and_is_replaced(caller, seeded):
    first = await locked(caller.agent, "1")
    await a_pool(seeded, 1, packages_of=caller.agent)
    await filled()

    second = await locked(caller.agent, "2")
    fresh = await runs(caller)
    await filled()
    old = await Sandbox.objects.aget(lock=first)
    await Agent.objects.filter(pk=caller.agent.pk).aupdate(lock=first)  # taken back
    caller.agent.lock = first
    await filled()

    assert (fresh.sandbox.made_of, fresh.sandbox.lock_id) == ("", second.pk)
    assert (old.state, old.end_reason) == (S.GONE, EndReason.EVICTED)
    ready = [s async for s in Sandbox.objects.filter(state=S.IDLE)]
    assert [s.lock_id for s in ready] == [first.pk]
    assert (await runs(caller)).sandbox.pk == ready[0].pk


async def test_without_a_pool_of_its_own_an_agent_with_a_lock_boots(caller, seeded):
    await locked(caller.agent, "1")
    await a_pool(seeded, 1)
    await filled()

    assert (await runs(caller)).sandbox.pool_id is None


def test_a_pool_for_an_agents_packages_is_made_once_from_the_terminal(caller, seeded, capsys):
    for target in ("1", "2"):
        call_command("pool", "first", "--packages-of", caller.agent.pk, "--target", target)

    assert [(p.packages_of, p.target) for p in Pool.objects.all()] == [(caller.agent, 2)]
    assert f"packages of {caller.agent.name}" in capsys.readouterr().out
    with pytest.raises(CommandError, match="there is no agent 'agt_none'"):
        call_command("pool", "first", "--packages-of", "agt_none")
