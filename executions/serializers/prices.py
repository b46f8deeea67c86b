"""What a request would cost, and what each limit has left for it."""

from __future__ import annotations

from pydantic import BaseModel, Field

from executions.costs import cost
from executions.quotas import Standing
from executions.serializers.shapes import LimitShape, dollars, priced
from executions.states import Unit


class NeedShape(LimitShape):
    """A ceiling, and what is asked of it."""

    needed: int
    suffices: bool


class PartShape(BaseModel):
    """A part of the worst case."""

    what: str = Field(description="run, or boot and settling.")
    seconds: int
    usd: str = Field(description='"unpriced" where no rate is known.')


class LeftOutShape(BaseModel):
    backend: str
    code: str = Field(description="Empty where a rule or a capability says so.")
    reason: str


class QuoteShape(BaseModel):
    """What a request would cost at most, where it would run, and what would become of it. Nothing was reserved or stored."""

    verdict: str = Field(description="admitted, queued (it would wait its turn), local (on this machine) or refused.")
    code: str = Field("", description="Of the refusal that says so, likewise the next two.")
    detail: str = ""
    remedy: str = ""
    backend: str
    isolation: str
    from_pool: bool = Field(False, description="One that is booted already is ready for it.")
    route: list[str] = Field(description="The backends that may take it, in order.")
    left_out: list[LeftOutShape] = []
    is_priced: bool = Field(description="false: no rate is known, and budgets are charged the ceiling rate.")
    rate_usd_per_second: str = Field(description='"unpriced" where no rate is known.')
    worst_case_usd: str = Field(
        description='What it costs when it takes all its time; "unpriced" where no rate is known.'
    )
    reserved_usd: str = Field(description="What would be set aside; 0 in a session, which has its own.")
    reserved_nano_usd: int
    parts: list[PartShape]
    max_cost_usd: str = ""
    fits_timeout_seconds: int | None = Field(
        None, description="The longest run that every limit has room for; null: none."
    )
    limits: list[NeedShape]


def limit_shape(standing: Standing) -> LimitShape:
    quota, money = standing.quota, standing.quota.unit == Unit.NANO_USD
    return LimitShape(
        scope=quota.scope_name,
        unit=quota.unit,
        window=quota.window,
        each=quota.each,
        user=quota.user,
        workflow=quota.workflow,
        backend=quota.backend,
        limit=standing.limit,
        used=standing.used,
        reserved=standing.reserved,
        remaining=standing.remaining,
        remaining_usd=dollars(standing.remaining) if money else "",
        is_nearly_exhausted=(standing.used + standing.reserved) * 100 >= standing.limit * quota.soft_percent,
        when_exhausted=quota.when_exhausted,
        raised_until=quota.raised_until if standing.limit != quota.limit else None,
        resets_at=standing.resets_at,
    )


def need_shape(standing: Standing) -> NeedShape:
    told = limit_shape(standing).model_dump()
    return NeedShape(**told, needed=standing.needed, suffices=standing.suffices)


def part_shape(what: str, seconds: int, rate_nano_usd_per_second: int, is_priced: bool) -> PartShape:
    nano_usd = cost(seconds * 1_000_000, rate_nano_usd_per_second)
    return PartShape(what=what, seconds=seconds, usd=priced(nano_usd, is_priced))
