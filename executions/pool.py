"""Sandboxes for admissions: a warm one out of a pool, or the intent to boot one, inserted before any backend is asked."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count
from django.utils import timezone

from executions import backends, capacity, costs, ledger, metrics, quotas
from executions.keys import Caller
from executions.models import Agent, Claim, Pool, Sandbox, Team, Template, hot
from executions.states import PoolTarget, SandboxState

MARGIN_SECONDS = 30  # boot and settle, on top of what was asked for: the provider's timeout includes it
LEFT_SECONDS = 20  # a warm one whose provider ends it sooner is nobody's any more
ACCOUNT = "System"  # the team whose agents pay for what nobody asked for: each pool's boots and waiting, probes
SECONDS_REMEMBERED = 300
REACTION_SECONDS = 0.5  # from a claim to its successor's boot, at worst
WISH_LASTS = timedelta(seconds=30)

_of = hot.Compiled(lambda alias: Pool.objects.filter(backend=alias, is_enabled=True))
_idle = hot.Compiled(
    lambda pool, made_of, isolation: (
        Sandbox.objects.select_for_update(skip_locked=True)  # SQLite's transaction is alone already
        .filter(pool=pool, state="idle", ended_at=None, made_of=made_of, isolation=isolation)
        .order_by("leased_until")[:1]
    )
)


def claim(caller: Caller, *, alias: str, template: Template, seconds: int, executions: int = 0, **fields) -> Sandbox:
    """A warm sandbox of exactly this kind, LEASED to the caller; where none is ready, the intent to boot one.

    The worst case is reserved either way. Raises BudgetExhausted, QuotaExceeded; a warm one then stays where it is,
    as the verb's transaction, in which this is called, is undone.
    """
    began = time.perf_counter()
    found = find(alias, template, fields.get("memory_mib", template.memory_mib), fields.get("network_allow", []))
    if found is None or fields.get("env", template.env) not in ({}, template.env):
        return intend(caller, alias=alias, template=template, seconds=seconds, executions=executions, **fields)
    warm = next(iter(_idle(found.pk, made_of(found, template), backends.get(alias).isolation)), None)
    if warm is None or warm.leased_until < timezone.now() + timedelta(seconds=LEFT_SECONDS):
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


def _lease(
    caller: Caller, warm: Sandbox, template: Template, seconds: int, executions: int, fields: dict[str, Any]
) -> None:
    """Hand it over: from now on the caller reserves and pays, as for a fresh one."""
    assert caller.agent is not None
    now = timezone.now()
    seconds, fits = _worst(seconds, warm.rate_nano_usd_per_second, fields)
    worst = warm.rate_nano_usd_per_second * seconds
    budgets = quotas.take(caller, executions=executions, sandboxes=1, nano_usd=worst, fits=fits, is_open=True)
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

    Raises BudgetExhausted, QuotaExceeded; capacity.Full before anything was taken. Call it in the verb's transaction.
    """
    if why := capacity.room(alias):
        raise capacity.Full(why)
    now = timezone.now()
    memory_mib = fields.pop("memory_mib", template.memory_mib)
    price = costs.price(alias, cpu_count=template.cpu_count, memory_mib=memory_mib, at=now)
    rate = price.nano_usd_per_second
    seconds, fits = _worst(seconds, rate, fields)
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


def _worst(seconds: int, rate: int, fields: dict[str, Any]) -> tuple[int, str]:
    """The seconds to reserve, and what a refusal says about them."""
    margin = 0 if fields.get("kept") else MARGIN_SECONDS  # a session ends when it was said to end
    said = f"; {margin} s are added for boot and settling." if margin else "."
    return seconds + margin, f"One second costs {costs.usd(rate)}{said}"


# Which pool, and which of its sandboxes


def find(alias: str, template: Template, memory_mib: int, network_allow: Sequence[str]) -> Pool | None:
    """The pool whose sandboxes are exactly such ones."""
    for pool in _of(alias):
        same_size = memory_mib == (pool.memory_mib or template.memory_mib)
        if pool.template_id == template.pk and same_size and pool.network_allow == list(network_allow):
            return pool
    return None


def made_of(pool: Pool, template: Template) -> str:
    """Hash of all that a fresh sandbox of this pool is made from: one of an older template is never handed out."""
    content = [
        pool.backend, template.pk, template.cpu_count, pool.memory_mib or template.memory_mib, template.disk_mib,
        template.env, template.e2b_template, template.packages, template.files, template.start_command, template.build,
        pool.network_allow,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# How many


def account(pool: Pool) -> Caller:
    """Who pays for this pool: an agent of its own, so that quotas and costs name it. Made when first needed."""
    if pool.agent is None:
        team, _ = Team.objects.get_or_create(name=ACCOUNT)
        pool.agent = Agent.objects.create(team=team, name=f"pool-{pool.pk[-12:]}", description=f"Pays for {pool}.")
        Pool.objects.filter(pk=pool.pk).update(agent=pool.agent)
    return Caller(team=pool.agent.team, agent=pool.agent, door="pool")


def wanted(pool: Pool, now: datetime) -> int:
    """How many should be ready or booting now."""
    if not pool.is_enabled:
        return 0
    if pool.zero_after_seconds and _quiet(pool, now - timedelta(seconds=pool.zero_after_seconds)):
        return 0
    match pool.follows:
        case PoolTarget.HOURS:
            return pool.hours[timezone.localtime(now).hour] if len(pool.hours) == 24 else 0
        case PoolTarget.FORECAST:
            since = now - timedelta(seconds=SECONDS_REMEMBERED)
            ages = sorted((now - at).total_seconds() for at in arrivals(pool, since))
            return min(max(pool.at_most, pool.target), max(pool.target, forecast(ages, boot_seconds(pool))))
    return pool.target


def forecast(ages: Sequence[float], boot: float) -> int:
    """What arrives while a successor boots, for all but one time in a hundred; `ages` of recent arrivals, youngest first.

    A Poisson process of the faster of the last minute's and the last five minutes' rates, by its normal approximation,
    or the largest burst that was seen in as long.
    """
    lead = boot + REACTION_SECONDS
    rate = max(sum(age < 60 for age in ages) / 60, len(ages) / SECONDS_REMEMBERED)
    burst, start = 0, 0
    for end, age in enumerate(ages):
        while age - ages[start] > lead:
            start += 1
        burst = max(burst, end - start + 1)
    expected = rate * lead
    return max(burst, math.ceil(expected + 2.33 * math.sqrt(expected)))


def arrivals(pool: Pool, since: datetime) -> list[datetime]:
    """When somebody asked for one, in no order: those that were ready, and those that had to be booted."""
    hits = pool.claims.filter(at__gte=since).values_list("at", flat=True)
    misses = pool.sandboxes.filter(made_of="", created_at__gte=since).values_list("created_at", flat=True)
    return [*hits, *misses]


def boot_seconds(pool: Pool) -> float:
    """What the slowest of its last twenty boots took; 1 where none is known."""
    last = pool.sandboxes.filter(ready_at__isnull=False).exclude(made_of="").order_by("-created_at")
    took = [(s.ready_at - s.created_at).total_seconds() for s in last.only("ready_at", "created_at")[:20] if s.ready_at]
    return max(took, default=1.0)


def _quiet(pool: Pool, since: datetime) -> bool:
    """Whether nobody has asked, or was seen who may, since then."""
    if max(pool.created_at, pool.wished_at or pool.created_at) >= since:
        return False
    asked = pool.sandboxes.filter(made_of="", created_at__gte=since)
    return not pool.claims.filter(at__gte=since).exists() and not asked.exists()


def wish(agent: Agent) -> None:
    """Somebody was seen who may soon run something as this agent: wake the pools that sleep, of the backends it would use."""
    now = timezone.now()
    sleeping = Pool.objects.filter(is_enabled=True, zero_after_seconds__gt=0).exclude(wished_at__gte=now - WISH_LASTS)
    named = {"template": agent.template_id} if agent.template_id else {"template__name": "default"}
    sleeping = sleeping.filter(**named)
    if agent.route:
        sleeping = sleeping.filter(backend__in=agent.route)
    sleeping.update(wished_at=now)


# What it has come to


@dataclass(frozen=True, slots=True)
class Standing:
    """A pool at this moment, and what was asked of it in the last hour."""

    wanted: int
    ready: int
    booting: int
    hits: int
    misses: int
    claim_p50_ms: float | None
    claim_p95_ms: float | None
    idle_nano_usd_per_day: int  # while it is full

    @property
    def hit_rate(self) -> float | None:
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


def standing(pool: Pool) -> Standing:
    now = timezone.now()
    since = now - timedelta(hours=1)
    waiting = pool.sandboxes.open().exclude(made_of="")
    states = dict(waiting.order_by().values_list("state").annotate(Count("pk")))
    took = sorted(pool.claims.filter(at__gte=since).order_by("-at").values_list("took_us", flat=True)[:10_000])
    many = wanted(pool, now)
    memory_mib = pool.memory_mib or pool.template.memory_mib
    rate = costs.rate(pool.backend, cpu_count=pool.template.cpu_count, memory_mib=memory_mib, at=now)
    return Standing(
        wanted=many,
        ready=states.get(SandboxState.IDLE, 0),
        booting=states.get(SandboxState.BOOTING, 0),
        hits=pool.claims.filter(at__gte=since).count(),
        misses=pool.sandboxes.filter(made_of="", created_at__gte=since).count(),
        claim_p50_ms=took[len(took) // 2] / 1000 if took else None,
        claim_p95_ms=took[len(took) * 95 // 100] / 1000 if took else None,
        idle_nano_usd_per_day=86_400 * rate * many,
    )
