"""One execution told on one page: what it was, what it said, how long each part took, what it cost."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from django.utils import timezone

from executions import egress, journal
from executions.models import Event, Execution
from executions.states import EventKind

EVENTS = 1000
CHARS = 200_000
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]")
BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp")


def tell(execution: Execution) -> dict[str, Any]:
    """The context of the page's template."""
    events = journal.read(execution.pk, limit=EVENTS + 1)
    return {
        "execution": execution,
        "output": output(events[:EVENTS]),
        "results": [_result(event.data) for event in events[:EVENTS] if event.kind == EventKind.RESULT],
        "failure": next((_failure(event.data) for event in events if event.kind == EventKind.ERROR), None),
        "truncated": any(event.kind == EventKind.TRUNCATED for event in events),
        "more_events": len(events) > EVENTS,
        "phases": phases(execution),
        "attempts": list(execution.attempts.select_related("sandbox").order_by("number")),
        "transitions": list(execution.transitions.order_by("pk")),
        "usage": list(execution.usage.order_by("pk")),
        "ledger": list(execution.ledger.select_related("quota__team", "quota__agent", "quota__key").order_by("pk")),
        "network": egress.words(execution.sandbox.network_allow) if execution.sandbox else "",
        "egress": list(execution.egress.order_by("pk")[:EVENTS]),
        "artifacts": list(execution.artifacts.order_by("name")),
        "env_names": sorted(execution.env),
        "file_names": sorted(execution.files),
    }


def output(events: list[Event]) -> list[dict[str, str]]:
    """stdout and stderr as they came, joined where the kind stays the same; cut at 200,000 characters."""
    parts: list[dict[str, str]] = []
    left = CHARS
    for event in events:
        if event.kind not in (EventKind.STDOUT, EventKind.STDERR):
            continue
        text = ANSI.sub("", str(event.data.get("text", "")))
        cut = len(text) > left
        text = text[:left] + "\n… cut here: the whole is under Events\n" if cut else text
        if parts and parts[-1]["kind"] == event.kind:
            parts[-1]["text"] += text
        else:
            parts.append({"kind": event.kind, "text": text})
        left -= len(text)
        if cut:
            break
    return parts


def _result(data: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"main": bool(data.get("main")), "pictures": [], "texts": []}
    for mime, value in data.get("mime", {}).items():
        if mime in PICTURES and isinstance(value, str) and BASE64.fullmatch(value):
            shown["pictures"].append(f"data:{mime};base64,{''.join(value.split())}")
        else:
            text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
            shown["texts"].append((mime, text[:CHARS]))
    return shown


def _failure(data: dict[str, Any]) -> dict[str, str]:
    return {name: ANSI.sub("", str(data.get(name, ""))) for name in ("name", "value", "traceback")}


def phases(execution: Execution) -> list[dict[str, Any]]:
    """Waiting, booting and running, each with its seconds and its percent of the whole."""
    now = execution.ended_at or timezone.now()
    steps: list[tuple[str, datetime | None, datetime | None]] = [
        ("queue", execution.created_at, execution.started_at or now),
        ("boot", execution.started_at, execution.running_at or now),
        ("run", execution.running_at, now),
    ]
    lengths = [(name, max(0.0, (end - start).total_seconds())) for name, start, end in steps if start and end]
    whole = sum(length for _, length in lengths) or 1
    return [{"name": name, "seconds": length, "percent": round(100 * length / whole, 2)} for name, length in lengths]
