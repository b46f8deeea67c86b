"""What a second costs, and how money is written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.conf import settings

from executions.models import Rate, hot

NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """What one allocated second costs; not known means that the configured ceiling stands in for rates that are missing.

    Where there is no ceiling (0) nobody is admitted at that price: `pool.price_of` refuses.
    """

    nano_usd_per_second: int
    is_known: bool


def price(alias: str, *, cpu_count: int, memory_mib: int, at: datetime) -> Price:
    """The price of one allocated second of such a sandbox, by the rates of that moment. Never free for want of a rate."""
    rates = hot.prices(alias, at)
    if Rate.VCPU not in rates or Rate.GIB not in rates:
        return Price(settings.RATE_CEILING_NANO_USD_PER_SECOND, is_known=False)
    return Price(rates[Rate.VCPU] * cpu_count + -(-rates[Rate.GIB] * memory_mib // 1024), is_known=True)


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
