"""Sandboxes for admissions: the intent to boot one, inserted before any backend is asked."""

from __future__ import annotations

from datetime import timedelta

from django.utils import timezone

from executions import backends, capacity, costs, ledger, quotas
from executions.keys import Caller
from executions.models import Sandbox, Template
from executions.states import SandboxState

ACCOUNT = "System"  # the team whose agents pay for what nobody asked for
MARGIN_SECONDS = 30  # boot and settle, on top of what was asked for: the provider's timeout includes it


def intend(caller: Caller, *, alias: str, template: Template, seconds: int, executions: int = 0, **fields) -> Sandbox:
    """Reserve the worst case and insert a BOOTING row for it, counting `executions` against the same quotas.

    Raises BudgetExhausted, QuotaExceeded; capacity.Full before anything was taken. Call it in the verb's transaction.
    """
    if why := capacity.room(alias):
        raise capacity.Full(why)
    now = timezone.now()
    margin = 0 if fields.get("kept") else MARGIN_SECONDS  # a session ends when it was said to end
    seconds += margin
    memory_mib = fields.pop("memory_mib", template.memory_mib)
    price = costs.price(alias, cpu_count=template.cpu_count, memory_mib=memory_mib, at=now)
    rate = price.nano_usd_per_second
    fits = f"One second costs {costs.usd(rate)}" + (f"; {margin} s are added for boot and settling." if margin else ".")
    budgets = quotas.take(caller, executions=executions, sandboxes=1, nano_usd=rate * seconds, fits=fits)
    sandbox = Sandbox.born(
        SandboxState.BOOTING,
        team=caller.team,
        agent=caller.agent,
        key=caller.key,
        actor=caller.person,
        template=template,
        backend=alias,
        isolation=backends.get(alias).isolation,
        cpu_count=template.cpu_count,
        memory_mib=memory_mib,
        rate_nano_usd_per_second=rate,
        is_priced=price.is_known,
        reserved_nano_usd=rate * seconds,
        reserved_on=budgets,
        leased_until=now + timedelta(seconds=seconds),
        created_at=now,
        **fields,
    )
    ledger.record_reservation(sandbox, rate * seconds)
    return sandbox
