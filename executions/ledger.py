"""Money in motion: reserved for a sandbox, spent by it, given back at its end. Every movement is a row."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.utils import timezone

from executions import costs, quotas
from executions.models import Execution, LedgerEntry, Sandbox, Usage, hot


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
        duration_us = max(0, int((until - since).total_seconds() * 1_000_000))
        price = costs.cost(duration_us, sandbox.rate_nano_usd_per_second)
        total += price
        own += 0 if kind == Usage.IDLE else price
        since = max(since, until)
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
                    at=until,
                )
            )
    hot.insert(usage)
    covered = min(total, sandbox.reserved_nano_usd)
    given_back = sandbox.reserved_nano_usd - covered if final else 0
    quotas.settle(sandbox.reserved_on, release=covered + given_back, spend=total)
    entries = _entries(sandbox, LedgerEntry.SPEND, total, execution) if total else []
    entries += _entries(sandbox, LedgerEntry.RELEASE, given_back) if given_back else []
    hot.insert(entries)
    return own, {
        "reserved_nano_usd": sandbox.reserved_nano_usd - covered - given_back,
        "spent_nano_usd": sandbox.spent_nano_usd + total,
        "metered_until": since,
    }


def _entries(sandbox: Sandbox, kind: str, amount: int, execution: Execution | None = None) -> list[LedgerEntry]:
    now = timezone.now()
    return [
        LedgerEntry(
            team_id=sandbox.team_id,
            quota_id=quota_id,
            sandbox_id=sandbox.pk,
            execution=execution,
            kind=kind,
            amount_nano_usd=amount,
            at=now,
        )
        for quota_id in (sandbox.reserved_on or [None])
    ]
