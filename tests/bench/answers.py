"""Dollars per million executions, by route and length, from the shipped rates: python -m tests.bench.answers

Seconds that a provider bills begin when it is asked for a sandbox and end when its end is confirmed. The times of making and ending one
are arguments of the arithmetic, measured elsewhere: E2B's on its double as documented, the local runtime's by `make bench`.
"""

from __future__ import annotations

import os

MILLION = 1_000_000
LENGTHS = (0.1, 1.0, 10.0)
MAKE_SECONDS = {"e2b": 0.491, "local": 0.022}  # p50
END_SECONDS = {"e2b": 0.1, "local": 0.01}
SIZES = {"e2b": (2, 512), "local": (1, 1024)}  # vCPU and MiB of the default template there
POOL_WAIT_SECONDS = 10.0  # which a warm sandbox waits for its caller, at a steady rate
SESSION_RUNS, SESSION_GAP_SECONDS = 20, 5.0  # of an agent that looks at each result before it goes on


def dollars(alias: str, seconds: float) -> float:
    """A million times so many seconds of a sandbox of the default size there."""
    from executions.models import Rate
    from executions.operations.setup import RATES

    cpu_count, memory_mib = SIZES[alias]
    nano_usd = cpu_count * RATES[alias][Rate.VCPU] + memory_mib / 1024 * RATES[alias][Rate.GIB]
    return MILLION * seconds * nano_usd / 1e9


def billed_seconds(alias: str, run_seconds: float) -> dict[str, float]:
    """Seconds of sandbox for one execution, by how it gets its sandbox."""
    once = MAKE_SECONDS[alias] + END_SECONDS[alias]
    return {
        "a fresh sandbox for each": once + run_seconds,
        "a warm pool": once + POOL_WAIT_SECONDS + run_seconds,
        f"a session of {SESSION_RUNS} runs": run_seconds + SESSION_GAP_SECONDS + once / SESSION_RUNS,
    }


def table() -> list[str]:
    lengths = " | ".join(f"runs of {length:g} s" for length in LENGTHS)
    lines = [f"| route | sandboxes | {lengths} |", "|---|---|" + "---|" * len(LENGTHS)]
    for alias in SIZES:
        for how in billed_seconds(alias, 0):
            prices = [dollars(alias, billed_seconds(alias, length)[how]) for length in LENGTHS]
            lines.append(f"| {alias} | {how} | " + " | ".join(f"${price:,.2f}" for price in prices) + " |")
    return lines


def main() -> None:
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
