"""What a second costs, and how money is written."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings

from executions.models import Rate, hot

NANO = 1_000_000_000


def rate(alias: str, *, cpu_count: int, memory_mib: int, at: datetime) -> int:
    """Nano-dollars for one allocated second of such a sandbox. A price that is not known is the ceiling, never free."""
    prices = hot.prices(alias, at)
    if Rate.VCPU not in prices or Rate.GIB not in prices:
        return settings.RATE_CEILING_NANO_USD_PER_SECOND
    return prices[Rate.VCPU] * cpu_count + -(-prices[Rate.GIB] * memory_mib // 1024)


def cost(duration_us: int, rate_nano_usd_per_second: int) -> int:
    """Nano-dollars, rounded up."""
    return -(-duration_us * rate_nano_usd_per_second // 1_000_000)


def usd(nano_usd: int | None) -> str:
    """`$0.42`, and below a cent four significant digits: `$0.0001234`."""
    if nano_usd is None:
        return "unpriced"
    dollars = abs(nano_usd) / NANO
    sign = "−" if nano_usd < 0 else ""
    if dollars >= 0.01 or dollars == 0:
        return f"{sign}${dollars:,.2f}"
    text = f"{dollars:.12f}"
    leading = len(text) - len(text[2:].lstrip("0")) - 2
    return f"{sign}${dollars:.{min(leading + 4, 9)}f}".rstrip("0")
