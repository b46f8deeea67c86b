"""What an agent can count on: read before planning long work."""

from __future__ import annotations

import asyncio
from typing import Any

from django.db.models import Count

from executions import backends, breaker, demand, egress, quotas
from executions.backends.base import Check
from executions.errors import Invalid, NoBackend
from executions.hop import rows
from executions.keys import Caller
from executions.models import BackendState, Pool, Sandbox, Template
from executions.operations.attest import last_attestations
from executions.routes import plan
from executions.serializers import LimitShape, limit_shape, session_shape
from executions.states import LANGUAGES, BreakerState, Scope

CHECK_SECONDS = 2


def limits(*, caller: Caller) -> list[LimitShape]:
    """Every ceiling of the caller with what is used, reserved and left."""
    caller.needs(Scope.READ)
    return [limit_shape(quotas.standing(quota, caller.team.time_zone)) for quota in quotas.visible_to(caller)]


def offer(caller: Caller) -> dict[str, Any]:
    """What the caller's agent may use: languages, route, packages, network, times. Needs no scope: it is its own configuration."""
    agent = caller.agent
    assert agent is not None
    languages: list[str] = []
    route: list[str] = []
    for language in LANGUAGES:
        try:
            planned = plan(caller, asked=None, language=language, fresh=False)
        except (Invalid, NoBackend):  # not allowed for this agent, or nowhere to be had
            continue
        languages.append(language)
        route = route or planned.aliases
    return {
        "agent": agent.name,
        "languages": languages,
        "route": route,
        "isolation": {alias: backends.get(alias).isolation for alias in route},
        "template": agent.template.name if agent.template else "default",
        "templates": list(Template.objects.filter(is_active=True).order_by("name").values_list("name", flat=True)),
        "packages": {"may_install": agent.packages, "how": "install_package, or POST /sessions/{id}/packages"},
        "network": egress.words(agent.network_allow),
        "network_allow": agent.network_allow,
        "timeout_seconds": {"default": agent.timeout_seconds, "max": agent.timeout_max_seconds},
    }


def environment(*, caller: Caller) -> dict[str, Any]:
    """Languages, packages, network, limits, remaining budget, live sessions of the caller's agent."""
    caller.needs(Scope.READ)
    caller = caller.acting_as(None)
    live = Sandbox.objects.open().sessions().filter(agent=caller.agent).select_related("agent", "template")
    assert caller.agent is not None
    offered, lock = offer(caller), caller.agent.lock
    offered["packages"] |= {"in_every_sandbox": lock.versions if lock else {}}
    return {
        **offered,
        "outages": outages(),
        "limits": [shape.model_dump(mode="json") for shape in limits(caller=caller)],
        "sessions": [session_shape(sandbox).model_dump(mode="json") for sandbox in live[:20]],
    }


def outages() -> list[str]:
    """One sentence for each backend that takes no sandboxes now: the banner of every door."""
    breaker.look(again=True)
    return [f"{alias}: {out}" for alias in backends.aliases() if (out := breaker.outage(alias))]


async def backend_states() -> list[dict[str, Any]]:
    """Each backend of the installation: whether it is up, its isolation, its walls, what it can do. All are asked at once."""
    live, attested, known, pools = await rows(
        lambda: (_live_by_backend(), last_attestations(), breaker.look(), _pools_by_backend())
    )
    found = await asyncio.gather(*(check(alias) for alias in backends.aliases()))
    return [
        {
            "alias": alias,
            "ok": told.ok,
            "detail": told.detail,
            "isolation": told.isolation or backends.get(alias).isolation,
            "breaker": _breaker(alias, known.get(alias)),
            "remote": backends.get(alias).remote,
            "walls": told.walls,
            "languages": sorted(backends.get(alias).capabilities.languages),
            "live_sandboxes": live.get(alias, 0),
            "pools": pools.get(alias, []),
            "attested": attested.get(alias),
        }
        for alias, told in zip(backends.aliases(), found, strict=True)
    ]


def _breaker(alias: str, row: BackendState | None) -> dict[str, Any]:
    if row is None or row.state == BreakerState.CLOSED:
        return {"state": BreakerState.CLOSED.value}
    facts = {"state": row.state, "says": breaker.sentence(row), "reason": row.reason}
    return facts | {"since": row.opened_at, "next_try_at": row.retry_at, "drill": bool(breaker.drilled(alias))}


def _live_by_backend() -> dict[str, int]:
    return dict(Sandbox.objects.open().order_by().values_list("backend").annotate(Count("pk")))


def _pools_by_backend() -> dict[str, list[dict[str, Any]]]:
    """Warm pools: what they hold, and how often one was ready in the last hour."""
    found: dict[str, list[dict[str, Any]]] = {}
    pools = list(Pool.objects.filter(is_enabled=True).select_related("template").order_by("template__name", "pk"))
    standings = demand.standings(pools) if pools else {}
    for pool in pools:
        now = standings[pool.pk]
        found.setdefault(pool.backend, []).append(
            {
                "template": pool.template.name,
                "memory_mib": pool.memory_mib or pool.template.memory_mib,
                "network": pool.network_allow,
                "packages_of": pool.packages_of_id,
                "ready": now.ready,
                "booting": now.booting,
                "hit_rate": now.hit_rate,
                "claim_p50_ms": now.claim_p50_ms,
                "claim_p95_ms": now.claim_p95_ms,
                "trouble": pool.trouble,
            }
        )
    return found


async def check(alias: str) -> Check:
    """What this backend says of itself now; one that does not answer in time is not well."""
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await backends.get(alias).check()
    except TimeoutError:
        return Check(ok=False, detail=f"It did not answer within {CHECK_SECONDS} s.")
