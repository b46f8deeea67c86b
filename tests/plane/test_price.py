"""What a request may cost at most is known before, is its own ceiling, and no sandbox is told a longer life than it pays for."""

from __future__ import annotations

from datetime import timedelta

import pytest
import time_machine
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from executions import checks, ledger, operations, pool
from executions.costs import NANO
from executions.errors import BudgetExhausted, Invalid, NoBackend, RateUnknown
from executions.hop import rows
from executions.models import Claim, Execution, LedgerEntry, Pool, Quota, Rate, Refusal, Sandbox, Usage
from executions.operations.boot import spec_of
from executions.operations.reap import begin_retiring, gone
from executions.operations.replenish import settle_claims
from executions.operations.submit import begin, next_attempt
from executions.serializers import SessionRequest, parse
from executions.states import Unit, WhenExhausted, Window
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db
RATE = 14_000 + 4_500  # of a sandbox with one processor and a GiB


@pytest.fixture
def rated(seeded):
    """The first backend has E2B's prices; the second has none, and costs the ceiling."""
    for meter, nano_usd in ((Rate.VCPU, 14_000), (Rate.GIB, 4_500)):
        Rate.objects.create(
            backend="first", meter=meter, nano_usd=nano_usd, valid_from=timezone.now() - timedelta(days=9)
        )
    return "first"


def quote(caller, **fields):
    return operations.quote(caller=caller, request=asks(**fields))


def test_a_price_names_its_parts_and_route_and_what_each_limit_has_left(caller, rated):
    Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, window=Window.DAY, limit=NANO)
    Quota.objects.create(agent=caller.agent, unit=Unit.CONCURRENT_EXECUTIONS, limit=3)

    told = quote(caller, timeout_seconds=60)

    assert (told.verdict, told.backend, told.route, told.is_priced) == ("admitted", "first", ["first", "second"], True)
    assert [(part.what, part.seconds) for part in told.parts] == [("run", 60), ("boot and settling", 30)]
    assert told.reserved_nano_usd == 90 * RATE == sum(round(float(part.usd) * NANO) for part in told.parts)
    assert told.worst_case_usd == told.reserved_usd == "0.001665"
    assert [(limit.unit, limit.needed, limit.suffices) for limit in told.limits] == [
        ("nano_usd", 90 * RATE, True),
        ("concurrent_executions", 1, True),
    ]


def test_pricing_reserves_and_stores_nothing(caller, rated, behave):
    behave("first", CREATIONS_PER_SECOND=1)
    budget = Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, limit=NANO, each=Quota.USER)
    before = [model.objects.count() for model in (Execution, Sandbox, LedgerEntry, Refusal, Quota)]

    for _ in range(3):
        assert quote(caller, user="ann").backend == "first"

    assert [model.objects.count() for model in (Execution, Sandbox, LedgerEntry, Refusal, Quota)] == before
    budget.refresh_from_db()
    assert budget.reserved == 0
    assert operations.submit(caller=caller, request=asks()).backend == "first"  # the second's creation is still there


def test_what_would_be_refused_says_by_which_limit_and_what_would_fit(caller, rated):
    Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, window=Window.DAY, limit=50 * RATE)

    told = quote(caller, timeout_seconds=60)
    assert (told.verdict, told.code, told.fits_timeout_seconds) == ("refused", "budget_exhausted", 20)

    fits = operations.submit(caller=caller, request=asks(timeout_seconds=told.fits_timeout_seconds))
    assert fits.sandbox.reserved_nano_usd == 50 * RATE


@pytest.mark.parametrize(("then", "verdict"), [(WhenExhausted.WAIT, "queued"), (WhenExhausted.LOCAL, "local")])
def test_a_price_foretells_what_becomes_of_one_without_room(caller, rated, then, verdict):
    Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=0, when_exhausted=then)

    told = quote(caller)

    assert (told.verdict, told.code, told.fits_timeout_seconds) == (verdict, "quota_exceeded", None)


def test_a_backend_without_a_rate_is_priced_at_the_ceiling_and_says_that_it_is_unpriced(caller, settings):
    told = quote(caller, timeout_seconds=10)

    assert (told.is_priced, told.worst_case_usd, told.rate_usd_per_second) == (False, "unpriced", "unpriced")
    assert {part.usd for part in told.parts} == {"unpriced"}
    assert told.reserved_nano_usd == 40 * settings.RATE_CEILING_NANO_USD_PER_SECOND


def test_a_run_in_a_session_is_paid_out_of_what_the_session_has_reserved(caller, rated):
    from asgiref.sync import async_to_sync

    session = async_to_sync(operations.open_session)(caller=caller, request=SessionRequest(timeout_seconds=600))
    Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, limit=0)

    told = quote(caller, session_id=session.pk, timeout_seconds=30)

    assert (told.verdict, told.reserved_nano_usd, told.worst_case_usd) == ("admitted", 0, "0.000555")
    with pytest.raises(BudgetExhausted):
        operations.submit(caller=caller, request=asks(session_id=session.pk, timeout_seconds=30, max_cost_usd="0.0005"))


def test_a_request_above_its_own_ceiling_is_refused_with_what_would_fit(caller, rated):
    with pytest.raises(BudgetExhausted) as refused:
        operations.submit(caller=caller, request=asks(timeout_seconds=60, max_cost_usd=0.001))

    facts = refused.value.facts
    assert (facts["needed"], facts["limit"]) == (90 * RATE, 1_000_000)
    assert "timeout_seconds ≤ 24 fits" in refused.value.remedy
    assert Execution.objects.count() == 0
    fitting = operations.submit(caller=caller, request=asks(timeout_seconds=24, max_cost_usd="0.001"))
    assert fitting.sandbox.reserved_nano_usd <= 1_000_000


def test_no_provider_is_told_a_life_that_could_cost_more_than_the_ceiling(caller, rated):
    execution = operations.submit(caller=caller, request=asks(timeout_seconds=24, max_cost_usd="0.001"))

    assert spec_of(execution.sandbox).timeout_seconds * execution.sandbox.rate_nano_usd_per_second <= 1_000_000


def test_the_ceiling_holds_on_the_next_backend_too(caller, rated):
    execution = operations.submit(caller=caller, request=asks(timeout_seconds=24, max_cost_usd="0.001"))
    from executions.operations.submit import caller_of

    again = next_attempt(
        caller=caller_of(execution), execution=execution, alias="second"
    )  # at the ceiling rate: $0.0054

    assert again is None
    assert execution.tried[-1].code == "budget_exhausted"


def test_the_ceiling_holds_for_one_that_has_waited(caller, rated):
    quota = Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=0, when_exhausted=WhenExhausted.WAIT)
    waiting = operations.submit(caller=caller, request=asks(timeout_seconds=24, max_cost_usd="0.001"))
    Rate.objects.filter(backend="first").update(nano_usd=140_000)
    quota.delete()

    with pytest.raises(BudgetExhausted):
        begin(waiting.pk)


def test_a_session_may_have_a_ceiling_which_holds_for_the_time_in_which_its_files_are_kept_too(caller, rated):
    from asgiref.sync import async_to_sync

    def opened(nano_usd: int):
        asked = parse(SessionRequest, {"timeout_seconds": 100, "max_cost_usd": f"{nano_usd / NANO:.9f}"})
        return async_to_sync(operations.open_session)(caller=caller, request=asked)

    with pytest.raises(BudgetExhausted):
        opened(100 * RATE)
    assert opened(122 * RATE).reserved_nano_usd <= 122 * RATE


@pytest.mark.parametrize("wrong", [-1, "x", "NaN", 1e-10, 10**9, "0.0000000001"])
def test_a_ceiling_is_dollars_to_the_nano_dollar(wrong):
    with pytest.raises(Invalid) as refused:
        asks(max_cost_usd=wrong)

    assert refused.value.facts["field"] == "max_cost_usd"


def test_only_one_door_prices(caller):
    with pytest.raises(Invalid):
        operations.submit(caller=caller, request=asks(dry_run=True))


# No rate, and no ceiling that stands in for it


def test_without_a_ceiling_a_backend_without_a_rate_is_refused_by_name(caller, settings):
    settings.RATE_CEILING_NANO_USD_PER_SECOND = 0

    with pytest.raises(RateUnknown) as refused:
        operations.submit(caller=caller, request=asks(route=["second"]))

    assert (refused.value.code, refused.value.status, refused.value.facts["backend"]) == ("rate_unknown", 503, "second")
    assert Refusal.objects.get().code == "rate_unknown"


def test_without_a_ceiling_the_route_goes_on_to_a_backend_whose_rate_is_known(caller, rated, settings):
    settings.RATE_CEILING_NANO_USD_PER_SECOND = 0

    execution = operations.submit(caller=caller, request=asks(route=["second", "first"]))

    assert execution.backend == "first"
    assert [(a.backend, a.code) for a in execution.tried] == [("second", "rate_unknown"), ("first", "")]


def test_a_full_plan_is_told_before_an_unknown_rate(caller, rated, settings, behave):
    settings.RATE_CEILING_NANO_USD_PER_SECOND = 0
    behave("first", CONCURRENCY=1)
    operations.submit(caller=caller, request=asks(route=["first"]))

    with pytest.raises(NoBackend) as refused:
        operations.submit(caller=caller, request=asks(route=["second", "first"], max_wait_seconds=0))
    assert refused.value.code == "no_backend"


# The ledger


def test_a_kill_that_is_confirmed_late_costs_what_was_reserved_and_no_more(caller, rated):
    budget = Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, limit=90 * RATE)
    sandbox = operations.submit(caller=caller, request=asks(timeout_seconds=60)).sandbox
    long_ago = timezone.now() - timedelta(hours=3)
    Sandbox.objects.filter(pk=sandbox.pk).update(created_at=long_ago, leased_until=long_ago + timedelta(seconds=90))

    begin_retiring(sandbox, "killed")
    gone(sandbox)

    sandbox.refresh_from_db()
    budget.refresh_from_db()
    assert (sandbox.spent_nano_usd, sandbox.reserved_nano_usd) == (90 * RATE, 0)
    assert (budget.used, budget.reserved) == (90 * RATE, 0)
    assert Usage.objects.get().duration_us == 90_000_000


async def test_every_movement_has_two_sides_and_what_is_held_is_what_the_sandbox_says(caller, rated):
    await Quota.objects.acreate(team=caller.team, unit=Unit.NANO_USD, limit=NANO)
    await Quota.objects.acreate(agent=caller.agent, unit=Unit.NANO_USD, limit=NANO)
    await operations.execute(caller=caller, request=asks())
    await operations.open_session(caller=caller, request=SessionRequest())

    def look():
        accounts = dict.fromkeys((ledger.BUDGET, ledger.HELD, ledger.SPENT), 0)
        for entry in LedgerEntry.objects.all():
            gives, receives = ledger.SIDES[entry.kind]
            accounts[gives] -= entry.amount_nano_usd
            accounts[receives] += entry.amount_nano_usd
        return accounts, list(ledger.unbalanced()), list(Sandbox.objects.open())

    accounts, wrong, (session,) = await rows(look)
    assert sum(accounts.values()) == 0
    assert accounts[ledger.HELD] == 2 * session.reserved_nano_usd  # once for each budget
    assert wrong == []


@pytest.mark.parametrize("row", ["entry", "sandbox"])
async def test_the_books_name_the_sandbox_whose_row_contradicts_them(caller, rated, row):
    await Quota.objects.acreate(team=caller.team, unit=Unit.NANO_USD, limit=NANO)
    session = await operations.open_session(caller=caller, request=SessionRequest())
    held = session.reserved_nano_usd
    if row == "entry":
        await LedgerEntry.objects.filter(sandbox=session).alast()
        await LedgerEntry.objects.filter(sandbox=session, amount_nano_usd=1800 * RATE).aupdate(amount_nano_usd=1)
        expected = (session.pk, held, held - 1800 * RATE + 1)
    else:
        await Sandbox.objects.filter(pk=session.pk).aupdate(reserved_nano_usd=7)
        expected = (session.pk, 7, held)

    assert await rows(lambda: list(ledger.unbalanced())) == [expected]


async def test_books_hold_when_a_budget_is_deleted_under_a_living_sandbox(caller, rated):
    budget = await Quota.objects.acreate(team=caller.team, unit=Unit.NANO_USD, limit=NANO)
    session = await operations.open_session(caller=caller, request=SessionRequest())
    await budget.adelete()
    assert await rows(lambda: list(ledger.unbalanced())) == []

    await operations.end_session(caller=caller, session_id=session.pk)

    assert await rows(lambda: list(ledger.unbalanced())) == []


def test_pricing_asks_the_database_a_constant_number_of_questions(caller, rated):
    for n in range(12):
        Quota.objects.create(team=caller.team, unit=Unit.NANO_USD, limit=NANO + n)
    with CaptureQueriesContext(connection) as asked:
        quote(caller)

    assert len(asked) < 20


def test_what_a_warm_sandbox_costs_beyond_its_lease_is_paid_by_its_pool(caller, rated, seeded):
    began = timezone.now()
    warm = Pool.objects.create(backend="first", template=seeded, lifetime_seconds=600)
    digest, at = pool.made_of(warm, seeded, None), {"tick": False}
    with time_machine.travel(began, **at):
        born = {"seconds": 600, "pool": warm, "made_of": digest}
        sandbox = pool.intend(pool.account(warm), alias="first", template=seeded, **born)
        sandbox.advance("idle", handle={"sandbox_id": sandbox.provider_name}, ready_at=began, isolation="simulated")
    with time_machine.travel(began + timedelta(seconds=10), **at), transaction.atomic():
        leased = pool.claim(caller, alias="first", template=seeded, seconds=60)
        assert leased.pk == sandbox.pk

    with time_machine.travel(began + timedelta(seconds=300), **at):  # its kill was not confirmed for so long
        begin_retiring(leased, "finished")
        gone(leased)
        settle_claims()

    mine, its = Sandbox.objects.get(), Claim.objects.get()
    assert mine.spent_nano_usd == 90 * RATE
    assert its.spent_nano_usd == (10 + 300 - 100) * RATE
    assert list(ledger.unbalanced()) == []


def test_a_ceiling_below_zero_is_a_mistake_and_backends_without_rates_are_named(rated, settings):
    assert checks.ceiling(None) == []
    assert checks.rates(None) == []
    assert [w.msg.split("'")[1] for w in checks.rates(None, databases=["default"])] == ["second", "third"]

    settings.RATE_CEILING_NANO_USD_PER_SECOND = -1
    assert [e.id for e in checks.ceiling(None)] == ["executions.E008"]
    settings.RATE_CEILING_NANO_USD_PER_SECOND = 0
    assert "rate_unknown" in checks.rates(None, databases=["default"])[0].msg
