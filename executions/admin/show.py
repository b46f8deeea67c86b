"""How one cell looks: a state, an amount, a moment, an id. Text first, so that nothing hangs on colour alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django.db.models import Model
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from executions import costs
from executions.models import Sandbox

NONE = "–"
ICONS = {
    "queued": "schedule",
    "starting": "hourglass_top",
    "running": "play_arrow",
    "succeeded": "check",
    "failed": "close",
    "timed_out": "timer_off",
    "cancelled": "block",
    "errored": "error",
}
# The words of sandboxes, attempts, keys and verdicts borrow the colour of the execution's state that they resemble.
LOOKS = {
    "booting": "starting",
    "idle": "queued",
    "leased": "running",
    "paused": "cancelled",
    "retiring": "failed",
    "gone": "cancelled",
    "open": "running",
    "ran": "succeeded",
    "skipped": "cancelled",
    "unavailable": "errored",
    "lost": "errored",
    "on": "succeeded",
    "off": "cancelled",
    "live": "succeeded",
    "expired": "timed_out",
    "revoked": "cancelled",
    "used": "cancelled",
    "settled": "succeeded",
    "up": "succeeded",
    "down": "errored",
    "out": "errored",
    "not answering": "errored",
    "not configured": "cancelled",
    "allowed": "succeeded",
    "denied": "failed",
    "pending": "queued",
    "blocked": "succeeded",
    "whole": "succeeded",
    "delivered": "succeeded",
    "dead": "errored",
    "holes": "failed",
    "hole": "failed",
}


def badge(word: str, title: str = "") -> SafeString:
    """A state as icon and text."""
    look = word if word in ICONS else LOOKS.get(word, "queued")
    return format_html(
        '<span class="sg-badge sg-{}" title="{}"><span class="material-symbols-outlined" aria-hidden="true">{}</span>{}</span>',
        look,
        title,
        ICONS[look],
        word.replace("_", " "),
    )


def money(nano_usd: int | None) -> SafeString:
    """Dollars, with the exact nano-dollars on hover."""
    if nano_usd is None:
        return format_html('<span class="sg-num sg-soft" title="No cost is known yet">{}</span>', NONE)
    return format_html('<span class="sg-num" title="{} nano-dollars">{}</span>', f"{nano_usd:,}", costs.usd(nano_usd))


def cost(nano_usd: int | None, sandbox: Sandbox | None) -> SafeString:
    """The same of what ran in a sandbox: unpriced where no rate was known."""
    if nano_usd is None or sandbox is None or sandbox.is_priced:
        return money(nano_usd)
    return number("unpriced", f"No rate is known: {nano_usd:,} nano-dollars were charged at the ceiling")


def number(value: Any, title: str = "") -> SafeString:
    said = NONE if value is None else f"{value:,}" if isinstance(value, int) else value
    return format_html('<span class="sg-num" title="{}">{}</span>', title, said)


def ago(at: datetime) -> str:
    """`12 s ago`, `in 3 min`, and the date beyond a month."""
    seconds = (timezone.now() - at).total_seconds()
    size = abs(seconds)
    if size < 60:
        text = f"{size:.0f} s"
    elif size < 3600:
        text = f"{size // 60:.0f} min"
    elif size < 48 * 3600:
        text = f"{size // 3600:.0f} h"
    elif size < 31 * 86400:
        text = f"{size // 86400:.0f} days"
    else:
        return f"{at:%Y-%m-%d}"
    return f"in {text}" if seconds < 0 else f"{text} ago"


def when(at: datetime | None) -> SafeString | str:
    """A relative age, with the exact time on hover."""
    if at is None:
        return NONE
    exact = f"{at:%Y-%m-%d %H:%M:%S} UTC"
    return format_html('<time class="sg-when" datetime="{}" title="{}">{}</time>', at.isoformat(), exact, ago(at))


def seconds(length: timedelta | float | None) -> str:
    """`4 ms`, `0.21 s`, `3.2 s`, `2:05`."""
    if length is None:
        return NONE
    value = length.total_seconds() if isinstance(length, timedelta) else float(length)
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int | None) -> str:
    """`12 MB`, in powers of 1,000."""
    if count is None:
        return NONE
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{value:.0f} {unit}"


def short(name: str) -> SafeString | str:
    """`exe_…k3v9qz`: the end tells ids of the same minute apart; the whole on hover."""
    if not name:
        return NONE
    prefix, _, rest = name.partition("_")
    text = f"{prefix}_…{rest[-6:]}" if rest else f"{name[:8]}…" if len(name) > 12 else name
    return format_html('<span class="sg-id" title="{}">{}</span>', name, text)


def mono(text: Any) -> SafeString | str:
    return format_html('<span class="sg-mono">{}</span>', text) if text not in (None, "") else NONE


def page_of(row: Model) -> str:
    return reverse(f"admin:{row._meta.app_label}_{row._meta.model_name}_change", args=[row.pk])


def link(row: Model | None, text: Any = None) -> SafeString | str:
    """A link to a row's page; ids are cut short."""
    if row is None:
        return NONE
    said = text if text is not None else short(row.pk) if str(row) == row.pk else str(row)
    return format_html('<a class="sg-link" href="{}">{}</a>', page_of(row), said)


def link_to(model: str, pk: Any, text: Any = None) -> SafeString | str:
    """A link to a row that is not fetched for it: its id is enough."""
    if pk is None:
        return NONE
    href = reverse(f"admin:executions_{model}_change", args=[pk])
    return format_html('<a class="sg-link" href="{}">{}</a>', href, text if text is not None else short(str(pk)))


def rows_of(model: str, **filters: Any) -> str:
    """The address of a filtered list."""
    query = urlencode({name: value for name, value in filters.items() if value not in (None, "")})
    return reverse(f"admin:executions_{model}_changelist") + (f"?{query}" if query else "")


def chips(words: Iterable[Any], empty: str) -> SafeString:
    words = list(words)
    if not words:
        return format_html('<span class="sg-soft">{}</span>', empty)
    return format_html_join(" ", '<span class="sg-chip">{}</span>', ((word,) for word in words))


def bar(used: int, reserved: int, limit: int, text: Any) -> SafeString:
    """How full a ceiling is: used, then reserved, of the limit."""
    whole = max(limit, used + reserved, 1)
    full = used + reserved >= limit
    return format_html(
        '<span class="sg-bar-cell"><span class="sg-bar{}" aria-hidden="true">'
        '<i style="width:{}%"></i><i style="width:{}%"></i></span><span class="sg-num">{}</span></span>',
        " sg-full" if full else "",
        f"{100 * used / whole:.1f}",
        f"{100 * reserved / whole:.1f}",
        text,
    )


def first_line(code: str) -> SafeString:
    """The first line that says something, at most 80 characters."""
    said = next((line.strip() for line in code.splitlines() if line.strip()), "(empty)")
    return format_html('<span class="sg-mono sg-code-line" title="{}">{}</span>', said, said[:80])


def step(before: str, after: str) -> SafeString:
    if not before:
        return badge(after)
    return format_html('<span class="sg-step">{} <span aria-label="to">→</span> {}</span>', badge(before), badge(after))


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def whole_hash(digest: str) -> SafeString | str:
    return format_html('<span class="sg-mono sg-hash">{}</span>', digest) if digest else NONE


def short_json(value: Any) -> str:
    """One line, at most 300 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:300]}…"


def block(text: str) -> SafeString:
    """Text as it is, escaped; at most 200,000 characters."""
    return format_html('<pre class="sg-pre" tabindex="0">{}</pre>', text[:200_000])


def table(heads: Iterable[str], lines: Iterable[Iterable[Any]]) -> SafeString:
    """A small table on a row's own page; its cells are escaped."""
    head = format_html_join("", '<th scope="col">{}</th>', ((word,) for word in heads))
    cells = (format_html_join("", "<td>{}</td>", ((cell,) for cell in line)) for line in lines)
    body = format_html_join("", "<tr>{}</tr>", ((line,) for line in cells))
    return format_html('<table class="sg-table"><thead><tr>{}</tr></thead><tbody>{}</tbody></table>', head, body)
