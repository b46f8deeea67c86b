"""How templates of the admin write a state, an amount, a moment: `{% load show %}`."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

from django import template
from django.utils import timezone

from executions import costs
from executions.admin import show
from executions.models import Execution

register = template.Library()
for tag in (show.badge, show.cost, show.money, show.when, show.step):
    register.simple_tag(tag)
register.simple_tag(show.link, name="rowlink")
register.filter("usd", costs.usd)
register.filter("took", show.seconds)


@register.filter
def took_us(microseconds: int | None) -> str:
    return show.seconds(None if microseconds is None else timedelta(microseconds=microseconds))


@register.filter
def lasted(execution: Execution) -> str:
    both = execution.ended_at and execution.running_at
    return show.seconds(execution.ended_at - execution.running_at) if both else show.NONE  # type: ignore[operator]


@register.filter
def clock(at: datetime) -> str:
    """To the millisecond: steps of one execution are that close."""
    return f"{at:%H:%M:%S}.{at.microsecond // 1000:03}"


@register.filter
def moment(at: Any) -> str:
    """The hour or the day that a row of a table stands for."""
    if isinstance(at, datetime):
        return f"{timezone.localtime(at):%Y-%m-%d %H:%M}"
    return at.isoformat() if isinstance(at, date) else str(at)


@register.filter
def words(name: str) -> str:
    return name.replace("_", " ")
