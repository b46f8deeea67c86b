"""What an execution said, in order. The database is the truth; the channel layer only rings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from channels.layers import get_channel_layer
from django.utils import timezone

from executions.backends.base import Event as Said
from executions.hop import surely
from executions.models import Event, Execution, hot
from executions.states import EventKind, NamedLimit

log = logging.getLogger(__name__)
OUTPUT_BYTES = 16 << 20
RESULTS = 1000
RESULT_BYTES = 10_000_000  # of one result, all its representations together
RESULTS_BYTES = 64 << 20  # of all results of a run
RING_SECONDS = 0.5  # for the channel layer to take one, and to begin listening
SILENT_SECONDS = 2  # after one that failed
CHUNK_CHARS = 64 * 1024  # text of one kind within a batch is joined up to this much


def group_name(execution_id: str) -> str:
    """Where watchers of an execution listen."""
    return f"execution.{execution_id}"


_silent_until = 0.0  # of time.monotonic(): where a ring has failed, the next ones are spared for a while


async def ring(execution_id: str) -> None:
    """Tell watchers to look again. Carries nothing, so losing one loses nothing."""
    global _silent_until
    layer = get_channel_layer()
    if layer is None or time.monotonic() < _silent_until:
        return
    try:
        async with asyncio.timeout(RING_SECONDS):
            await layer.group_send(group_name(execution_id), {"type": "look.again"})
    except Exception as e:  # a doorbell that is out of order, or hangs, must not stop the run
        _silent_until = time.monotonic() + SILENT_SECONDS
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


def _size(value: Any) -> int:
    """Bytes of one representation, as JSON where it is no text."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


class Doorbell:
    """Listens for rings while it is open: listen first, read second, and a ring in between costs a second look.

    Where the channel layer is out of order it hears nothing and goes on trying; whoever waits here looks by the clock, too.
    """

    def __init__(self, execution_id: str, rung: asyncio.Event | None = None) -> None:
        self.group = group_name(execution_id)
        self.rung = rung or asyncio.Event()

    async def __aenter__(self) -> Doorbell:
        await self.open()
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    async def open(self) -> None:
        """Returns once it hears, or cannot yet."""
        tried = asyncio.Event()
        self.hearing = asyncio.create_task(self._hear(tried))
        try:
            await asyncio.wait_for(tried.wait(), RING_SECONDS)
        except TimeoutError:
            pass
        except BaseException:
            self.hearing.cancel()
            raise

    async def close(self) -> None:
        self.hearing.cancel()
        await asyncio.wait({self.hearing}, timeout=RING_SECONDS)

    async def _hear(self, tried: asyncio.Event) -> None:
        layer, said = get_channel_layer(), False
        while True:
            channel = None
            try:
                channel = await layer.new_channel()
                await layer.group_add(self.group, channel)
                tried.set()
                said = False
                while True:
                    await layer.receive(channel)
                    self.rung.set()
            except Exception as e:
                if not said:
                    log.warning("doorbell_unheard", extra={"error": type(e).__name__})
                said = True
            finally:
                if channel is not None:
                    with contextlib.suppress(Exception):
                        await layer.group_discard(self.group, channel)
            tried.set()
            await asyncio.sleep(SILENT_SECONDS)
            self.rung.set()  # for what was not heard meanwhile

    async def wait(self, seconds: float) -> bool:
        """True on a ring, False when none came within `seconds`: look again either way."""
        try:
            async with asyncio.timeout(seconds):
                await self.rung.wait()
        except TimeoutError:
            return False
        self.rung.clear()
        return True


@dataclass
class Journal:
    """Collects what a run says between two batches; numbers it; cuts it at the limits and says what was cut."""

    execution_id: str
    output_limit_bytes: int = OUTPUT_BYTES  # of stdout and stderr
    results_limit: int = RESULTS
    seq: int = 0
    output_bytes: int = 0
    error: dict | None = None
    execution_count: int | None = None
    cpu_us: int | None = None
    peak_memory_bytes: int | None = None
    exit_code: int | None = None
    text_bytes: int = 0
    results: int = 0
    cut: set[str] = field(default_factory=set)  # the limits that were said to be reached
    again: bool = False  # something had to be written twice, and may be there
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
                self._hear_result(said.data)
            case EventKind.ERROR:
                self.error = {k: storable(str(v)[:100_000]) for k, v in said.data.items()}
                self._add(EventKind.ERROR, self.error)

    def _hear_text(self, kind: str, text: str) -> None:
        text = storable(text)
        size = len(text) if text.isascii() else len(text.encode())
        if self.text_bytes + size > self.output_limit_bytes:
            self._cut(NamedLimit.OUTPUT_TRUNCATED, limit_bytes=self.output_limit_bytes)
            return
        if NamedLimit.OUTPUT_TRUNCATED in self.cut:
            return
        self.text_bytes += size
        self.output_bytes += size
        last = self.waiting[-1] if self.waiting else None
        if last is not None and last.kind == kind and len(last.data["text"]) + len(text) <= CHUNK_CHARS:
            last.data["text"] += text
        else:
            self._add(kind, {"text": text})

    def _hear_result(self, data: dict[str, Any]) -> None:
        """Keep it, or of one that is too large the smaller of its representations; beyond the limits nothing."""
        self.results += 1
        if self.results > self.results_limit:
            self._cut(NamedLimit.RESULTS_TRUNCATED, limit=self.results_limit)
            return
        left = min(RESULT_BYTES, RESULTS_BYTES - (self.output_bytes - self.text_bytes))
        sizes = {mime: _size(value) for mime, value in data["mime"].items()}
        kept = {}
        for mime in sorted(sizes, key=sizes.__getitem__):
            if sizes[mime] <= left:
                left -= sizes[mime]
                kept[mime] = data["mime"][mime]
        if left_out := [mime for mime in sizes if mime not in kept]:
            said = {mime: sizes[mime] for mime in left_out}
            self._cut(NamedLimit.RESULTS_TRUNCATED, result=self.results, left_out=said, limit_bytes=RESULT_BYTES)
        if kept:
            self.output_bytes += sum(sizes[mime] for mime in kept)
            self._add(
                EventKind.RESULT, storable({**data, "mime": {m: v for m, v in data["mime"].items() if m in kept}})
            )

    def _cut(self, reached: NamedLimit, **facts: Any) -> None:
        """Say once what was cut, and of each result that was."""
        if reached not in self.cut or "left_out" in facts:
            self.cut.add(reached)
            self._add(EventKind.TRUNCATED, {"reason": reached.value, **storable(facts)})

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


_looks: dict[tuple[int, str, int], asyncio.Task[tuple[list[Event], bool]]] = {}


async def look(execution_id: str, after_seq: int, limit: int) -> tuple[list[Event], bool]:
    """What lies behind `after_seq`, and whether the run was open before that was read.

    Watchers of one run look at the same moments (a ring, a whole second), and those that know as much share one look.
    """
    key = (id(asyncio.get_running_loop()), execution_id, after_seq)
    if key not in _looks:
        _looks[key] = asyncio.create_task(surely(_look, execution_id, after_seq, limit))
        _looks[key].add_done_callback(lambda _: _looks.pop(key))
    return await asyncio.shield(_looks[key])


def _look(execution_id: str, after_seq: int, limit: int) -> tuple[list[Event], bool]:
    is_open = Execution.objects.open().filter(pk=execution_id).exists()
    return read(execution_id, after_seq, limit), is_open


def until_the_next_look() -> float:
    """Seconds to the next whole one."""
    return 1.0 - time.monotonic() % 1.0
