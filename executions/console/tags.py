"""What templates need to write a state, a moment, an amount: `{% load console %}`."""

from __future__ import annotations

from datetime import datetime

from django import template
from django.utils.html import format_html
from django.utils.safestring import SafeString

from executions import costs
from executions.models import Agent, Execution, Sandbox

register = template.Library()
register.filter("usd", costs.usd)


@register.filter
def usd_in(nano_usd: int | None, sandbox: Sandbox | None) -> str:
    """What it cost in that sandbox; "unpriced" where no rate was known."""
    return costs.usd(nano_usd if sandbox is None or sandbox.is_priced else None)


ICONS = {
    "queued": "dots",
    "starting": "dots",
    "running": "dots",
    "succeeded": "check",
    "failed": "cross",
    "timed_out": "clock",
    "cancelled": "slash",
    "errored": "alert",
}
SANDBOX_LOOKS = {
    "booting": ("running", "dots", "starting"),
    "leased": ("live", "live", "live"),
    "paused": ("", "slash", "paused"),
    "retiring": ("", "clock", "ending"),
}


@register.simple_tag
def icon(name: str) -> SafeString:
    return format_html('<svg class="icon" aria-hidden="true"><use href="#i-{}"/></svg>', name)


@register.simple_tag
def state(name: str) -> SafeString:
    """An execution's state: always an icon and a word."""
    words = name.replace("_", " ")
    return format_html('<span class="state {}">{}{}</span>', name, icon(ICONS.get(name, "dots")), words)


@register.simple_tag
def sandbox_state(sandbox: Sandbox) -> SafeString:
    look, symbol, words = SANDBOX_LOOKS.get(sandbox.state, ("", "slash", f"ended: {sandbox.end_reason or 'finished'}"))
    return format_html('<span class="state {}">{}{}</span>', look, icon(symbol), words)


@register.simple_tag
def ago(at: datetime | None) -> SafeString | str:
    """A moment: the script makes it relative, without it the exact UTC time stands there."""
    if at is None:
        return "—"
    return format_html('<time datetime="{}" data-ago>{}</time>', at.isoformat(), f"{at:%Y-%m-%d %H:%M} UTC")


@register.filter
def session_name(sandbox: Sandbox) -> str:
    return sandbox.name or f"session {sandbox.id[-6:]}"


@register.filter
def agent_name(agent: Agent) -> str:
    """People's agents are called by the person's name."""
    return agent.person.calls_themselves if agent.person else agent.name


@register.filter
def first_line(code: str) -> str:
    """The first line that says something, at most 120 characters."""
    return next((line.strip()[:120] for line in code.splitlines() if line.strip()), "(empty)")


@register.filter
def ms(milliseconds: float) -> str:
    """`4 ms`, `0.21 s`, `3.2 s`, `2:05`."""
    seconds = milliseconds / 1000
    if seconds < 0.1:
        return f"{milliseconds:.0f} ms"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@register.filter
def us(microseconds: int) -> str:
    return ms(microseconds / 1000)


@register.filter
def took(execution: Execution) -> str:
    if execution.ended_at is None:
        return "—"
    return ms((execution.ended_at - (execution.running_at or execution.created_at)).total_seconds() * 1000)


@register.filter
def size(count: int) -> str:
    """`12 MB`, in powers of 1,000."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{value:.0f} {unit}"
