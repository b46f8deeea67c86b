"""What an execution said, in order. The database is the truth; the channel layer only rings."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

from channels.layers import get_channel_layer
from django.utils import timezone

from executions.backends.base import Event as Said
from executions.models import Event, hot
from executions.states import EventKind

log = logging.getLogger(__name__)
CHUNK_CHARS = 64 * 1024  # text of one kind within a batch is joined up to this much


def group_name(execution_id: str) -> str:
    """Where watchers of an execution listen."""
    return f"execution.{execution_id}"


async def ring(execution_id: str) -> None:
    """Tell watchers to look again. Carries nothing, so losing one loses nothing."""
    layer = get_channel_layer()
    if layer is None:
        return
    try:
        await layer.group_send(group_name(execution_id), {"type": "look.again"})
    except Exception as e:  # a doorbell that is out of order must not stop the run
        log.warning("doorbell_failed", extra={"execution_id": execution_id, "error": type(e).__name__})


def storable(value: Any) -> Any:
    """What hostile output may not break: NUL (PostgreSQL stores none) and lone surrogates become U+FFFD, anywhere."""
    match value:
        case str():
            value = value.replace("\x00", "\ufffd")
            return value if value.isascii() else value.encode("utf-8", "replace").decode()
        case dict():
            return {storable(str(k)): storable(v) for k, v in value.items()}
        case list() | tuple():
            return [storable(v) for v in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None  # JSON has no such numbers
    return value


class Doorbell:
    """Listens for rings while it is open: listen first, read second, and a ring in between costs a second look."""

    def __init__(self, execution_id: str) -> None:
        self.group = group_name(execution_id)

    async def __aenter__(self) -> Doorbell:
        self.layer = get_channel_layer()
        self.channel = await self.layer.new_channel()
        await self.layer.group_add(self.group, self.channel)
        return self

    async def wait(self, seconds: float) -> bool:
        """True on a ring, False when none came within `seconds`: look again either way."""
        try:
            async with asyncio.timeout(seconds):
                await self.layer.receive(self.channel)
            return True
        except TimeoutError:
            return False

    async def __aexit__(self, *_) -> None:
        await self.layer.group_discard(self.group, self.channel)


@dataclass
class Journal:
    """Collects what a run says between two batches; numbers it; cuts it at the output limit."""

    execution_id: str
    output_limit_bytes: int
    seq: int = 0
    output_bytes: int = 0
    error: dict | None = None
    execution_count: int | None = None
    cpu_us: int | None = None
    peak_memory_bytes: int | None = None
    exit_code: int | None = None
    truncated: bool = False
    waiting: list[Event] = field(default_factory=list)

    def hear(self, said: Said) -> None:
        match said.kind:
            case "count":
                self.execution_count = said.data["execution_count"]
            case "usage":
                self.cpu_us = said.data.get("cpu_us")
                self.peak_memory_bytes = said.data.get("peak_memory_bytes")
            case "exit":
                self.exit_code = said.data["exit_code"]
            case EventKind.STDOUT | EventKind.STDERR:
                self._hear_text(said.kind, said.data["text"])
            case EventKind.RESULT:
                size = sum(len(v) if isinstance(v, str) else 256 for v in said.data["mime"].values())
                if self._room_for(size):
                    self._add(EventKind.RESULT, storable(said.data))
            case EventKind.ERROR:
                self.error = {k: storable(str(v)[:100_000]) for k, v in said.data.items()}
                self._add(EventKind.ERROR, self.error)

    def _hear_text(self, kind: str, text: str) -> None:
        text = storable(text)
        if not self._room_for(len(text.encode())):
            return
        last = self.waiting[-1] if self.waiting else None
        if last is not None and last.kind == kind and len(last.data["text"]) + len(text) <= CHUNK_CHARS:
            last.data["text"] += text
        else:
            self._add(kind, {"text": text})

    def _room_for(self, size: int) -> bool:
        if self.truncated:
            return False
        if self.output_bytes + size > self.output_limit_bytes:
            self.truncated = True
            self._add(EventKind.TRUNCATED, {"limit_bytes": self.output_limit_bytes})
            return False
        self.output_bytes += size
        return True

    def _add(self, kind: str, data: dict) -> None:
        self.seq += 1
        self.waiting.append(
            Event(execution_id=self.execution_id, seq=self.seq, kind=kind, data=data, at=timezone.now())
        )

    def take(self) -> list[Event]:
        """What is to be written now; the caller writes it, in its own transaction."""
        batch, self.waiting = self.waiting, []
        return batch


def write(batch: list[Event]) -> None:
    hot.insert(batch)


def read(execution_id: str, after_seq: int = 0, limit: int = 1000) -> list[Event]:
    """At most `limit` events behind `after_seq`, in order."""
    return list(Event.objects.filter(execution_id=execution_id, seq__gt=after_seq).order_by("seq")[:limit])
