"""W3C trace context: the trace that a request belongs to, and what its answer says of it (w3.org/TR/trace-context)."""

from __future__ import annotations

import re
import secrets

PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def trace_of(traceparent: str | None) -> str:
    """The trace id; empty where the header is missing or malformed."""
    found = _read(traceparent)
    return found[2] if found else ""


def continued(traceparent: str | None) -> str:
    """The header for an answer: the same trace and flags, and a span of our own; empty where there is no trace."""
    found = _read(traceparent)
    return f"00-{found[2]}-{secrets.token_hex(8)}-{found[4]}" if found else ""


def _read(traceparent: str | None) -> re.Match[str] | None:
    found = PARENT.fullmatch((traceparent or "").strip())
    if found is None or found[1] == "ff" or not found[2].strip("0") or not found[3].strip("0"):
        return None
    return None if found[1] == "00" and found[5] else found
