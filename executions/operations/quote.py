"""What a request would cost and what would become of it, without doing any of it."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.utils import timezone

from executions import backends, capacity, pool, quotas, routes
from executions.costs import usd
from executions.errors import BudgetExhausted, NoBackend, QuotaExceeded, Refused
from executions.keys import Caller
from executions.operations.submit import Wish, asking, find_session, find_template, wanted
from executions.serializers import LeftOutShape, QuoteShape, Submission, dollars, need_shape, part_shape, priced
from executions.states import Scope, Unit, WhenExhausted

BECOMES = {WhenExhausted.REFUSE: "refused", WhenExhausted.WAIT: "queued", WhenExhausted.LOCAL: "local"}


@transaction.atomic(durable=True)
def quote(*, caller: Caller, request: Submission) -> QuoteShape:
    """The worst case, its parts, its route, and what each limit has left. Raises Refused for what could not run at all."""
    caller.needs(Scope.RUN)
    caller = asking(caller, request)
    timeout, wish = wanted(caller, request)
    shape = _in_session(caller, wish, timeout) if wish.session_id else _in_fresh_one(caller, request, wish, timeout)
    transaction.set_rollback(True)  # one creation of the plan was taken on the way
    return shape


def _in_session(caller: Caller, wish: Wish, timeout: int) -> QuoteShape:
    """The session has reserved its whole life: the run is paid out of that."""
    sandbox = find_session(caller, wish.session_id)
    timeout = max(1, min(timeout, int((sandbox.leased_until - timezone.now()).total_seconds())))
    price = pool.Price(sandbox.rate_nano_usd_per_second, sandbox.is_priced)
    where = {"backend": sandbox.backend, "isolation": sandbox.isolation, "route": [sandbox.backend]}
    return _told(caller, quotas.Ask(executions=1), price, timeout, 0, where)


def _in_fresh_one(caller: Caller, request: Submission, wish: Wish, timeout: int) -> QuoteShape:
    assert caller.agent is not None
    template, network = find_template(caller.agent, wish.template), list(wish.network)
    limits = request.limits.model_dump(exclude_none=True)
    route = routes.plan(
        caller, asked=wish.asked, template=template, network=network, language=request.language,
        commands=request.code is None, run_limits=bool(limits.keys() & {"memory_mib", "cpu_seconds"}),
    )  # fmt: skip

    def look(alias: str) -> tuple[str, bool]:
        kind = {"memory_mib": wish.memory_mib, "network_allow": network, "env": template.env}
        is_warm = pool.has_warm(caller, alias, template, **kind)
        if not is_warm and (why := capacity.room(alias)):
            raise capacity.Full(why)
        pool.price_of(alias, template, wish.memory_mib)
        return alias, is_warm

    alias, is_warm, full = route.aliases[0], False, None
    try:
        alias, is_warm = routes.first(route, look)
    except NoBackend as e:
        if not e.waits_seconds:
            raise
        full = e
    price, margin = pool.price_of(alias, template, wish.memory_mib), pool.MARGIN_SECONDS
    nano_usd = price.nano_usd_per_second * (timeout + margin)
    ask = quotas.Ask(executions=1, sandboxes=1, seconds=timeout + margin, nano_usd=nano_usd, is_open=is_warm)
    where = {
        "backend": alias,
        "isolation": backends.get(alias).isolation,
        "from_pool": is_warm,
        "route": route.aliases,
        "left_out": [LeftOutShape(backend=left.alias, code=left.code, reason=left.why) for left in route.skipped],
    }
    return _told(caller, ask, price, timeout, margin, where, full)


def _told(
    caller: Caller,
    ask: quotas.Ask,
    price: pool.Price,
    timeout: int,
    margin: int,
    where: dict[str, Any],
    full: Refused | None = None,
) -> QuoteShape:
    rate, known = price.nano_usd_per_second, price.is_known
    found = [quotas.standing(quota, caller.team.time_zone, ask) for quota in quotas.of(caller, where["backend"])]
    short = next((standing for standing in found if not standing.suffices), None)
    worst, most = rate * (timeout + margin), caller.max_nano_usd
    verdict, refusal = "admitted", full
    if most is not None and worst > most:
        verdict, refusal = "refused", quotas.too_dear(most, worst)
    elif short is not None:
        verdict, refusal = BECOMES[WhenExhausted(short.quota.when_exhausted)], _refusal(short)
    elif full is not None:
        verdict = "queued"
    said = {"code": refusal.code, "detail": refusal.detail, "remedy": refusal.remedy or ""} if refusal else {}
    parts = [("run", timeout)] + ([("boot and settling", margin)] if margin else [])
    return QuoteShape(
        verdict=verdict,
        **said,
        **where,
        is_priced=known,
        rate_usd_per_second=priced(rate, known),
        worst_case_usd=priced(worst, known),
        reserved_usd=dollars(ask.nano_usd),
        reserved_nano_usd=ask.nano_usd,
        parts=[part_shape(what, seconds, rate, known) for what, seconds in parts],
        max_cost_usd=dollars(most),
        fits_timeout_seconds=_longest(found, rate, margin, timeout, most),
        limits=[need_shape(standing) for standing in found],
    )


def _refusal(short: quotas.Standing) -> Refused:
    unit = short.quota.unit
    left = usd(short.remaining) if unit == Unit.NANO_USD else f"{short.remaining:,}"
    said = f"{short.quota.scope_name} has {left} of {short.quota.get_unit_display().lower()} left."
    return BudgetExhausted(said) if unit == Unit.NANO_USD else QuotaExceeded(said)


def _longest(found: list[quotas.Standing], rate: int, margin: int, timeout: int, most: int | None) -> int | None:
    """Seconds of run that the tightest of money and compute time leaves room for, up to what was asked for."""
    seconds = [timeout + margin]
    seconds += [most // rate] if most is not None and rate else []
    for standing in found:
        if not standing.needed:
            continue
        match standing.quota.unit:
            case Unit.NANO_USD if rate:
                seconds.append(standing.remaining // rate)
            case Unit.COMPUTE_US:
                seconds.append(standing.remaining // 1_000_000)
            case _ if not standing.suffices:
                return None
    longest = min(seconds) - margin
    return longest if longest > 0 else None
