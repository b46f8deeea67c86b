"""Sandboxes for admissions: a warm one out of a pool, or the intent to boot one, inserted before any backend is asked."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from executions import backends, capacity, costs, ledger, metrics, quotas
from executions.backends.base import Backend
from executions.costs import Price
from executions.errors import RateUnknown
from executions.keys import Caller
from executions.models import Agent, Claim, Pool, Quota, Sandbox, Team, Template, hot
from executions.states import SandboxState, Unit, Window

MARGIN_SECONDS = 30  # boot and settle, on top of what was asked for: the provider's timeout includes it
LEFT_SECONDS = 20  # a warm one whose provider ends it sooner is nobody's any more
ACCOUNT = "System"  # the team whose agents pay for what nobody asked for: each pool's boots and waiting, probes

_of = hot.Compiled(lambda alias: Pool.objects.filter(backend=alias, is_enabled=True))
_idle = hot.Compiled(
    lambda pool, made_of, isolation, node: (
        Sandbox.objects.select_for_update(skip_locked=True)  # SQLite's transaction is alone already
        .filter(pool=pool, state="idle", ended_at=None, made_of=made_of, isolation=isolation, node=node)
        .order_by("leased_until")[:1]
    )
)


def claim(caller: Caller, *, alias: str, template: Template, seconds: int, executions: int = 0, **fields) -> Sandbox:
    """A warm sandbox of exactly this kind, LEASED to the caller; where none is ready, the intent to boot one.

    The worst case is reserved either way. Raises BudgetExhausted, QuotaExceeded; a warm one then stays where it is,
    as the verb's transaction, in which this is called, is undone.
    """
    began = time.perf_counter()
    found, warm = _ready(caller, alias, template, fields)
    if found is None:
        return intend(caller, alias=alias, template=template, seconds=seconds, executions=executions, **fields)
    if warm is None:
        metrics.add("sandgate_pool_claims_total", alias, "miss")
        return intend(
            caller, alias=alias, template=template, seconds=seconds, executions=executions, pool=found, **fields
        )
    held = Claim(sandbox=warm, pool_id=found.pk, reserved_nano_usd=warm.reserved_nano_usd, reserved_on=warm.reserved_on)
    _lease(caller, warm, template, seconds, executions, fields)
    took = time.perf_counter() - began
    held.at, held.took_us = warm.last_used_at, int(took * 1_000_000)
    hot.insert([held])
    metrics.add("sandgate_pool_claims_total", alias, "hit")
    metrics.observe("sandgate_pool_claim_seconds", alias, seconds=took)
    return warm


def has_warm(caller: Caller, alias: str, template: Template, **fields) -> bool:
    """Whether a claim would find one ready now. Call it in a transaction."""
    return _ready(caller, alias, template, fields)[1] is not None


def _ready(
    caller: Caller, alias: str, template: Template, fields: dict[str, Any]
) -> tuple[Pool | None, Sandbox | None]:
    """The pool whose sandboxes are such ones, and one that is ready."""
    memory_mib, rules = fields.get("memory_mib", template.memory_mib), fields.get("network_allow", [])
    found = find(alias, template, memory_mib, rules, caller.agent)
    if found is None or fields.get("env", template.env) not in ({}, template.env):
        return None, None
    backend, lock_id = backends.get(alias), caller.agent.lock_id if caller.agent else None
    warm = next(iter(_idle(found.pk, made_of(found, template, lock_id), backend.isolation, node_of(backend))), None)
    if warm is None or warm.leased_until < timezone.now() + timedelta(seconds=LEFT_SECONDS):
        return found, None
    return found, warm


def _lease(
    caller: Caller, warm: Sandbox, template: Template, seconds: int, executions: int, fields: dict[str, Any]
) -> None:
    """Hand it over: from now on the caller reserves and pays, as for a fresh one."""
    assert caller.agent is not None
    now = timezone.now()
    seconds, fits = _worst(seconds, warm.rate_nano_usd_per_second, fields)
    worst = warm.rate_nano_usd_per_second * seconds
    budgets = quotas.take(
        caller, executions=executions, sandboxes=1, seconds=seconds, nano_usd=worst, backend=warm.backend, fits=fits,
        is_open=True,
    )  # fmt: skip
    kept = {name: fields[name] for name in fields.keys() - {"memory_mib", "network_allow", "env"}}
    warm.advance(
        SandboxState.LEASED,
        reason="claimed",
        team_id=caller.team.pk,
        agent_id=caller.agent.pk,
        key_id=caller.key.pk if caller.key else None,
        actor_id=caller.person.pk if caller.person else None,
        reserved_nano_usd=worst,
        reserved_on=budgets,
        metered_until=now,
        last_used_at=now,
        leased_until=now + timedelta(seconds=seconds),
        **kept,
    )
    warm.team, warm.agent, warm.template = caller.team, caller.agent, template
    ledger.record_reservation(warm, worst)


def intend(caller: Caller, *, alias: str, template: Template, seconds: int, executions: int = 0, **fields) -> Sandbox:
    """Reserve the worst case and insert a BOOTING row for it, counting `executions` against the same quotas.

    Raises BudgetExhausted, QuotaExceeded; capacity.Full and RateUnknown before anything was taken. Call it in the verb's
    transaction.
    """
    now = timezone.now()
    lock_id = fields.pop("lock_id", caller.agent.lock_id if caller.agent else None)
    memory_mib = fields.pop("memory_mib", template.memory_mib)
    backend, price = backends.get(alias), price_of(alias, template, memory_mib)
    if why := capacity.room(alias):  # which takes a creation of the plan
        raise capacity.Full(why)
    rate = price.nano_usd_per_second
    seconds, fits = _worst(seconds, rate, fields)
    budgets = quotas.take(
        caller, executions=executions, sandboxes=1, seconds=seconds, nano_usd=rate * seconds, backend=alias, fits=fits
    )
    sandbox = Sandbox.born(
        SandboxState.BOOTING,
        team=caller.team,
        agent=caller.agent,
        key=caller.key,
        actor=caller.person,
        template=template,
        lock_id=lock_id,
        backend=alias,
        node=node_of(backend),
        isolation=backend.isolation,
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


def node_of(backend: Backend) -> str:
    """The machine on which this process has sandboxes of this backend made; empty where any process reaches them."""
    return settings.NODE if backend.has_node else ""


def price_of(alias: str, template: Template, memory_mib: int) -> Price:
    """What a second of such a sandbox costs there. Raises RateUnknown where no rate is known and no ceiling stands in."""
    backend = backends.get(alias)
    its_name = backend.template_name(template.name, template.e2b_template)
    cpu_count, billed_mib = backend.billed_size(its_name, template.cpu_count, memory_mib)
    price = costs.price(alias, cpu_count=cpu_count, memory_mib=billed_mib, at=timezone.now())
    if not price.is_known and not settings.RATE_CEILING_NANO_USD_PER_SECOND:
        raise RateUnknown(f"No rate is known for {alias}, and no ceiling is set.", backend=alias)
    return price


def _worst(seconds: int, rate: int, fields: dict[str, Any]) -> tuple[int, Callable[[int], str]]:
    """The seconds to reserve, and what a refusal says that so many nano-dollars would pay for."""
    margin = 0 if fields.get("kept") else MARGIN_SECONDS  # a session ends when it was said to end

    def fits(nano_usd: int) -> str:
        said = f"One second costs {costs.usd(rate)}{f'; {margin} s are added for boot and settling' if margin else ''}"
        left = nano_usd // rate - margin if rate else seconds
        return f"{said}: timeout_seconds ≤ {left} fits." if left > 0 else f"{said}: nothing fits any more."

    return seconds + margin, fits


# Which pool, and which of its sandboxes


def find(
    alias: str, template: Template, memory_mib: int, network_allow: Sequence[str], agent: Agent | None
) -> Pool | None:
    """The pool whose sandboxes are exactly such ones: the agent's own, or without a lock the one for all."""
    shared = None
    for pool in _of(alias):
        same_size = memory_mib == (pool.memory_mib or template.memory_mib)
        if pool.template_id != template.pk or not same_size or pool.network_allow != list(network_allow):
            continue
        if pool.packages_of_id is None:
            shared = pool
        elif agent is not None and pool.packages_of_id == agent.pk:
            return pool
    return shared if agent is None or agent.lock_id is None else None


def lock_of(pool: Pool) -> str | None:
    """The lock that its sandboxes begin with now."""
    return pool.packages_of.lock_id if pool.packages_of else None


def made_of(pool: Pool, template: Template, lock_id: str | None) -> str:
    """Hash of all that a fresh sandbox of this pool is made from: one of an older template is never handed out."""
    content = [
        pool.backend, template.pk, template.cpu_count, pool.memory_mib or template.memory_mib, template.disk_mib,
        template.env, template.e2b_template, template.packages, template.files, template.start_command, template.build,
        pool.network_allow,
    ]  # fmt: skip
    if lock_id:
        content.append(lock_id)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# Who pays


def account(pool: Pool) -> Caller:
    """Who pays for this pool: an agent of its own, so that quotas and costs name it. Made when first needed."""
    if pool.agent is None:
        team, _ = Team.objects.get_or_create(name=ACCOUNT)
        pool.agent = Agent.objects.create(team=team, name=f"pool-{pool.pk[-12:]}", description=f"Pays for {pool}.")
        Pool.objects.filter(pk=pool.pk).update(agent=pool.agent)
    return Caller(team=pool.agent.team, agent=pool.agent, door="pool")


def allow(pool: Pool, nano_usd_per_day: int | None) -> None:
    """What the pool may cost a day, boots included: a quota of its account. None: no ceiling of its own."""
    mine = Quota.objects.filter(agent=account(pool).agent, unit=Unit.NANO_USD, window=Window.DAY)
    if nano_usd_per_day is None:
        mine.delete()
    elif not mine.update(limit=nano_usd_per_day):
        Quota.objects.create(agent=pool.agent, unit=Unit.NANO_USD, window=Window.DAY, limit=nano_usd_per_day)


def budget(pool: Pool) -> Quota | None:
    """The quota that `allow` has made."""
    if pool.agent_id is None:
        return None
    return Quota.objects.filter(agent=pool.agent_id, unit=Unit.NANO_USD, window=Window.DAY).first()
