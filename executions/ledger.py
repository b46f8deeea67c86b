"""Money in motion: reserved for a sandbox, spent by it, given back at its end. Every movement is a row with two sides.

    reserve  budget → held by the sandbox
    release  held by the sandbox → budget
    spend    held by the sandbox → spent at its backend

What a row takes from one account it gives to another, so that all accounts together are always zero. Nothing is spent
that is not held: a provider is never told a time that is not reserved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from django.db.models import BigIntegerField, Case, F, Q, Sum, When
from django.utils import timezone

from executions import costs, quotas
from executions.models import Claim, Execution, LedgerEntry, Quota, Sandbox, Usage, hot
from executions.states import Unit

BUDGET, HELD, SPENT = "budget", "held", "spent"
SIDES = {  # of a movement: the account that gives, and the one that receives
    LedgerEntry.RESERVE: (BUDGET, HELD),
    LedgerEntry.RELEASE: (HELD, BUDGET),
    LedgerEntry.SPEND: (HELD, SPENT),
}


def record_reservation(sandbox: Sandbox, amount_nano_usd: int) -> None:
    hot.insert(_entries(sandbox, LedgerEntry.RESERVE, amount_nano_usd))


def bill(
    sandbox: Sandbox,
    *stretches: tuple[str, datetime],
    execution: Execution | None = None,
    final: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Bill the sandbox's time up to each (kind, until), the rate copied in; `final` gives the rest of the reservation back.

    Idle time is the sandbox's own, boot and run the execution's. Returns the execution's part in nano-dollars, and the
    sandbox's changed fields, for the caller to store with its next step; call it in
    the transaction of that step, on a row that nobody else can be billing (a session's row is locked first).
    """
    since = sandbox.metered_until or sandbox.created_at
    total, own, usage = 0, 0, []
    for kind, until in stretches:
        left = sandbox.reserved_nano_usd - total
        duration_us = _paid_us(since, until, sandbox.rate_nano_usd_per_second, left)
        price = costs.cost(duration_us, sandbox.rate_nano_usd_per_second)
        total += price
        own += 0 if kind == Usage.IDLE else price
        since += timedelta(microseconds=duration_us)
        if duration_us:
            usage.append(
                Usage(
                    team_id=sandbox.team_id,
                    agent_id=sandbox.agent_id,
                    sandbox_id=sandbox.pk,
                    execution=None if kind == Usage.IDLE else execution,
                    backend=sandbox.backend,
                    kind=kind,
                    duration_us=duration_us,
                    rate_nano_usd_per_second=sandbox.rate_nano_usd_per_second,
                    cost_nano_usd=price,
                    at=since,
                )
            )
    hot.insert(usage)
    given_back = sandbox.reserved_nano_usd - total if final else 0
    used_us = sum(stretch.duration_us for stretch in usage)
    quotas.book(sandbox, release=total + given_back, spend=total, used_us=used_us)
    entries = _entries(sandbox, LedgerEntry.SPEND, total, execution) if total else []
    entries += _entries(sandbox, LedgerEntry.RELEASE, given_back) if given_back else []
    hot.insert(entries)
    return own, {
        "reserved_nano_usd": sandbox.reserved_nano_usd - total - given_back,
        "spent_nano_usd": sandbox.spent_nano_usd + total,
        "metered_until": since,
    }


def _paid_us(since: datetime, until: datetime, rate_nano_usd_per_second: int, held_nano_usd: int) -> int:
    """Microseconds from one to the other, as far as what is held pays for them: no longer was its provider told to keep it."""
    duration_us = max(0, (until - since) // timedelta(microseconds=1))
    return (
        min(duration_us, held_nano_usd * 1_000_000 // rate_nano_usd_per_second)
        if rate_nano_usd_per_second
        else duration_us
    )


def own_time(sandbox: Sandbox, until: datetime) -> list[tuple[str, datetime]]:
    """The stretches of a sandbox's time that belong to no execution: idle, or in a pool that nobody took it from."""
    if sandbox.made_of and sandbox.metered_until is None:
        return [(Usage.BOOT, sandbox.ready_at or until), (Usage.POOL, until)]
    return [(Usage.IDLE, until)]


def bill_claims(claims: list[Claim]) -> None:
    """Bill to their pools what claimed sandboxes cost until they were claimed; give the rest of the reservations back.

    Call it in a transaction that holds the rows, with their sandboxes and their pools' agents.
    """
    usage, entries, sums = [], [], defaultdict[int, list[int]](lambda: [0, 0])
    times: Counter[tuple[str, str, str]] = Counter()
    for claim in claims:
        sandbox, account = claim.sandbox, claim.pool.agent
        assert account is not None
        ready_at = sandbox.ready_at or sandbox.created_at
        claim.spent_nano_usd = 0
        spans = [(Usage.BOOT, sandbox.created_at, ready_at), (Usage.POOL, ready_at, claim.at)]
        if sandbox.ended_at and sandbox.ended_at > sandbox.leased_until:  # its provider knew the pool's end alone
            spans.append((Usage.POOL, max(claim.at, sandbox.metered_until or claim.at), sandbox.ended_at))
        for kind, since, until in spans:
            left = claim.reserved_nano_usd - claim.spent_nano_usd
            duration_us = _paid_us(since, until, sandbox.rate_nano_usd_per_second, left)
            price = costs.cost(duration_us, sandbox.rate_nano_usd_per_second)
            claim.spent_nano_usd += price
            times[account.team_id, account.pk, sandbox.backend] += duration_us
            usage.append(
                Usage(
                    team_id=account.team_id,
                    agent_id=account.pk,
                    sandbox_id=sandbox.pk,
                    backend=sandbox.backend,
                    kind=kind,
                    duration_us=duration_us,
                    rate_nano_usd_per_second=sandbox.rate_nano_usd_per_second,
                    cost_nano_usd=price,
                    at=until,
                )
            )
        rest = claim.reserved_nano_usd - claim.spent_nano_usd
        for quota_id in claim.reserved_on:
            sums[quota_id][0] += claim.reserved_nano_usd
            sums[quota_id][1] += claim.spent_nano_usd
        paid_by = (account.team_id, claim.reserved_on, sandbox.pk)
        entries += _lines(*paid_by, LedgerEntry.SPEND, claim.spent_nano_usd) if claim.spent_nano_usd else []
        entries += _lines(*paid_by, LedgerEntry.RELEASE, rest) if rest else []
    hot.insert(usage)
    wanted = Quota.objects.select_for_update().filter(Q(pk__in=sums) | Q(unit=Unit.COMPUTE_US, each="")).order_by("pk")
    list(wanted.values_list("pk"))  # held in the order in which others take them
    for quota_id, (release, spend) in sums.items():
        hot.settle(quota_id, release, spend)
    for (team, agent, backend), used_us in times.items():
        hot.book((), 0, 0, team=team, agent=agent, key="", backend=backend, used_us=used_us)
    hot.insert(entries)
    Claim.objects.bulk_update(claims, ["spent_nano_usd"])


# The books


def unbalanced() -> Iterator[tuple[str, int, int]]:
    """(sandbox, nano-dollars that it should hold, those that it holds by the ledger), where the two differ; the oldest first.

    Of each budget by itself: the same dollar is held against all that govern it. Read it in one snapshot.
    """
    should: Counter[tuple[str, int | None]] = Counter()
    holding = Sandbox.objects.exclude(reserved_nano_usd=0).values_list("pk", "reserved_on", "reserved_nano_usd")
    claims = Claim.objects.filter(spent_nano_usd=None).values_list("sandbox", "reserved_on", "reserved_nano_usd")
    for sandbox_id, budgets, amount in [*holding, *claims]:
        for quota_id in budgets or (None,):
            should[sandbox_id, quota_id] += amount
    gives = [kind for kind, (giver, _) in SIDES.items() if giver == HELD]
    signed = Case(
        When(kind__in=gives, then=-F("amount_nano_usd")),
        default=F("amount_nano_usd"),
        output_field=BigIntegerField(),
    )
    held = LedgerEntry.objects.order_by().values_list("sandbox", "quota").annotate(nano=Sum(signed)).exclude(nano=0)
    holds = {(sandbox_id, quota_id): nano for sandbox_id, quota_id, nano in held}
    for account in sorted(should.keys() | holds.keys(), key=str):
        if should[account] != holds.get(account, 0):
            yield account[0], should[account], holds.get(account, 0)


def _entries(sandbox: Sandbox, kind: str, amount: int, execution: Execution | None = None) -> list[LedgerEntry]:
    return _lines(sandbox.team_id, sandbox.reserved_on, sandbox.pk, kind, amount, execution)


def _lines(
    team_id: str, budgets: list[int], sandbox_id: str, kind: str, amount: int, execution: Execution | None = None
) -> list[LedgerEntry]:
    now = timezone.now()
    return [
        LedgerEntry(
            team_id=team_id,
            quota_id=quota_id,
            sandbox_id=sandbox_id,
            execution=execution,
            kind=kind,
            amount_nano_usd=amount,
            at=now,
        )
        for quota_id in budgets or (None,)
    ]
