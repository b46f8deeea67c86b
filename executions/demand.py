"""How many warm sandboxes a pool should hold, and what became of those it held."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Count, Sum
from django.utils import timezone

from executions.models import Agent, Claim, Pool, Sandbox
from executions.states import PoolTarget, SandboxState

SECONDS_REMEMBERED = 300
REACTION_SECONDS = 0.5  # from a claim to its successor's boot, at worst
WISH_LASTS = timedelta(seconds=30)
TOLD = timedelta(hours=1)  # hits, misses and claims of so long are told
CLAIMS_TOLD = 20_000


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
    if ids := list(sleeping.values_list("pk", flat=True)):  # most often none sleeps, and nothing is written
        Pool.objects.filter(pk__in=ids).update(wished_at=now)


# What became of them


@dataclass(frozen=True, slots=True)
class Standing:
    """A pool at this moment, and what was asked of it in the last hour."""

    ready: int
    booting: int
    hits: int
    misses: int
    claim_p50_ms: float | None
    claim_p95_ms: float | None
    idle_nano_usd_per_day: int  # of what waits there now

    @property
    def hit_rate(self) -> float | None:
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


def standings(pools: Iterable[Pool]) -> dict[str, Standing]:
    """By the pool's id, in three queries however many they are."""
    ids, since = [pool.pk for pool in pools], timezone.now() - TOLD
    waiting = Sandbox.objects.open().filter(pool__in=ids, state__in=[SandboxState.IDLE, SandboxState.BOOTING])
    held = {
        (pool, state): (many, rate)
        for pool, state, many, rate in waiting.exclude(made_of="")
        .order_by()
        .values_list("pool", "state")
        .annotate(Count("pk"), Sum("rate_nano_usd_per_second"))
    }
    asked = Sandbox.objects.filter(pool__in=ids, made_of="", created_at__gte=since).order_by()
    misses = dict(asked.values_list("pool").annotate(Count("pk")))
    took: dict[str, list[int]] = defaultdict(list)
    claims = Claim.objects.filter(pool__in=ids, at__gte=since).order_by("-at")
    for pool, us in claims.values_list("pool", "took_us")[:CLAIMS_TOLD]:
        took[pool].append(us)
    told = {}
    for pool in ids:
        sorted_us = sorted(took[pool])
        ready, rate = held.get((pool, SandboxState.IDLE), (0, 0))
        booting, more = held.get((pool, SandboxState.BOOTING), (0, 0))
        told[pool] = Standing(
            ready=ready,
            booting=booting,
            hits=len(sorted_us),
            misses=misses.get(pool, 0),
            claim_p50_ms=_ms(sorted_us, 0.5),
            claim_p95_ms=_ms(sorted_us, 0.95),
            idle_nano_usd_per_day=86_400 * (rate + more),
        )
    return told


def _ms(sorted_us: list[int], share: float) -> float | None:
    return sorted_us[int((len(sorted_us) - 1) * share)] / 1000 if sorted_us else None
