"""The console's sockets: they tell what the journal says, and pass what people ask for to one verb each.

A ring of the channel layer only means "look again": the journal is read from the database, at least once a second
while something runs. contract.md, "Console socket", has the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from channels.generic.websocket import AsyncJsonWebsocketConsumer
from django.conf import settings
from django.http.request import split_domain_port, validate_host
from django.utils import timezone

from executions import audit, costs, journal, keys, operations
from executions.errors import Invalid, NotFound, SandgateError, Unauthenticated
from executions.hop import rows, surely
from executions.models import Event, Execution, Sandbox
from executions.operations import find_session
from executions.serializers import Submission, parse
from executions.states import ExecutionState, Scope

REMEMBERED = 200  # executions of a session that are told again to whoever opens it
BATCH = 100
OUTSTANDING_BYTES = 4 * 1024 * 1024  # sent and not yet acknowledged, on one connection
EXTEND_SECONDS = 1800
CLOSE_CODES: dict[type[SandgateError], int] = {Unauthenticated: 4401, NotFound: 4404}


def same_origin(scope: dict[str, Any]) -> bool:
    """Browsers always say where a page comes from. Ports count: another local server's pages share our cookies."""
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    origin = urlsplit(headers.get(b"origin", b"").decode("latin-1"))
    if not validate_host(split_domain_port(host)[0], settings.ALLOWED_HOSTS):
        return False
    return origin.netloc == host or f"{origin.scheme}://{origin.netloc}" == settings.PUBLIC_URL


class Socket(AsyncJsonWebsocketConsumer):
    """Follows executions for one signed-in person: connect, catch up, say what is new, disconnect."""

    channel_layer_alias = ""  # doorbells listen, which may be out of order
    watching: asyncio.Task | None = None

    async def connect(self) -> None:
        if not same_origin(self.scope):
            return await self.close()  # before accept: the browser sees 403
        await self.accept()
        self.ring = asyncio.Event()
        self.seen: dict[str, int] = {}
        self.bells: dict[str, journal.Doorbell] = {}  # of the executions that are open
        self.told: dict[str, str] = {}  # execution: the last state that was sent
        self.clients: dict[str, str] = {}  # execution: the client_id that asked for it here
        self.asking = asyncio.Lock()  # nothing is told of an execution before it is known who asked for it
        self.outstanding: deque[tuple[str, int, int]] = deque()
        self.caught_up = False
        try:
            await rows(self.admit)
        except SandgateError as error:
            await self.close(CLOSE_CODES.get(type(error), 4403))

    def admit(self) -> None:
        """Who this is, and whether they may see it. Raises Unauthenticated, Forbidden, NotFound."""
        user = self.scope.get("user")
        if user is None or not user.is_authenticated:
            raise Unauthenticated
        client = self.scope.get("client")
        self.caller = keys.caller_for(user, ip=client[0] if client else None)
        self.find()

    def find(self) -> None:
        raise NotImplementedError

    def followed(self) -> list[Execution]:
        """The executions of interest that have not been told to their end."""
        raise NotImplementedError

    async def disconnect(self, code: int) -> None:
        if self.watching is not None:
            self.watching.cancel()
            await asyncio.wait({self.watching})
        for bell in getattr(self, "bells", {}).values():
            await bell.close()

    # What the client says

    async def receive_json(self, content: Any, **_: Any) -> None:
        kind = content.get("type") if isinstance(content, dict) else None
        verb = getattr(self, f"on_{kind}", None) if isinstance(kind, str) and kind.isidentifier() else None
        try:
            if verb is None or not hasattr(self, "caller"):
                raise Invalid(f"There is no message {kind!r}.", field="type")
            await verb(content)
        except SandgateError as error:
            client_id = str(content.get("client_id", ""))[:64] if isinstance(content, dict) else ""
            await self.send_json({**error.problem(), "type": "notice", "seq": 0, "client_id": client_id})
        self.ring.set()

    async def on_subscribe(self, content: dict[str, Any]) -> None:
        after = content.get("after_seq", 0)
        self.start_after(after if isinstance(after, dict) else {"": after})
        if self.watching is None:
            self.watching = asyncio.create_task(self.watch())

    def start_after(self, after: dict[str, Any]) -> None:
        self.seen = {str(key): int(seq) for key, seq in after.items() if str(seq).isdigit()}

    async def on_ack(self, content: dict[str, Any]) -> None:
        upto = (content.get("execution_id"), content.get("seq"))
        if any(sent[:2] == upto for sent in self.outstanding):
            while self.outstanding.popleft()[:2] != upto:
                pass

    async def on_interrupt_request(self, content: dict[str, Any]) -> None:
        self.caller.needs(Scope.RUN)
        asked = content.get("execution_id")
        for execution in await rows(self.followed):
            if execution.is_open and asked in (None, "", execution.pk):
                await operations.cancel(execution=execution, caller=self.caller)

    # What the server says

    async def watch(self) -> None:
        """Listen first, read second; a ring in between costs a second look, not a gap."""
        while True:
            self.ring.clear()
            busy = await self.look()
            if not self.caught_up:
                self.caught_up = True
                await self.send_json({"type": "caught_up", "seq": 0})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ring.wait(), timeout=1 if busy else 3)

    async def look(self) -> bool:
        """Say what is new; True while something runs."""
        busy = False
        async with self.asking:
            followed = await surely(self.followed)
        for execution in followed:
            if execution.pk not in self.told:
                if execution.is_open and execution.pk not in self.bells:
                    bell = self.bells[execution.pk] = journal.Doorbell(execution.pk, self.ring)
                    await bell.open()
                    execution = await surely(self.fresh, execution.pk)
                self.told[execution.pk] = ""
                await self.introduce(execution)
            if execution.is_open:
                await self.say_state(execution)
            if await self.say_events(execution.pk) and not execution.is_open:
                await self.say_state(execution)
                self.told[execution.pk] = "ended"
                if execution.pk in self.bells:
                    await self.bells.pop(execution.pk).close()
            else:
                busy = True
                await self.say_usage(execution)
        return busy

    def fresh(self, execution_id: str) -> Execution:
        """Read again behind the first listening: it may have moved before the bell hung."""
        return Execution.objects.select_related("sandbox").get(pk=execution_id)

    async def introduce(self, execution: Execution) -> None:
        """What it is, before anything that it says; its last state comes behind all of that."""
        message = {"type": "execution", "seq": 0, "execution_id": execution.pk}
        client_id = self.clients.get(execution.pk, "")
        await self.send_json(
            {**message, "client_id": client_id, "code": execution.code, "language": execution.language}
        )

    async def say_events(self, execution_id: str) -> bool:
        """True once everything that stands in the journal has been sent."""
        while True:
            events = await surely(journal.read, execution_id, self.seen.get(execution_id, 0), BATCH)
            for event in events:
                if sum(size for *_, size in self.outstanding) > OUTSTANDING_BYTES:
                    return False  # the next ack rings
                await self.say_event(event)
            if len(events) < BATCH:
                return True

    async def say_event(self, event: Event) -> None:
        message = {"type": event.kind, "seq": event.seq, "execution_id": event.execution_id, **event.data}
        text = await self.encode_json(message)
        self.outstanding.append((event.execution_id, event.seq, len(text)))
        await self.send(text_data=text)
        self.seen[event.execution_id] = event.seq

    async def say_state(self, execution: Execution) -> None:
        if self.told.get(execution.pk) == execution.state:
            return
        self.told[execution.pk] = execution.state
        ended = execution.ended_at
        began = execution.running_at or execution.created_at
        message = {
            "type": "state",
            "seq": self.seen.get(execution.pk, 0),
            "execution_id": execution.pk,
            "client_id": self.clients.get(execution.pk, ""),
            "state": execution.state,
            "execution_count": execution.execution_count,
            "backend": execution.backend,
            "detail": execution.error_value if execution.error_code else "",
        }
        if ended:
            message["elapsed_ms"] = int((ended - began).total_seconds() * 1000)
            message |= _cost(execution.cost_nano_usd or 0, execution.sandbox)
        await self.send_json(message)
        if execution.state == ExecutionState.QUEUED:
            place = await surely(operations.position, execution)
            message = {"type": "queued", "seq": 0, "execution_id": execution.pk, "position": place}
            await self.send_json({**message, "reason": execution.waits_for})

    async def say_usage(self, execution: Execution) -> None:
        if execution.running_at is None or execution.ended_at is not None:
            return
        elapsed_us = int((timezone.now() - execution.running_at).total_seconds() * 1_000_000)
        rate = execution.sandbox.rate_nano_usd_per_second if execution.sandbox else 0
        message = {"type": "usage", "seq": 0, "execution_id": execution.pk, "elapsed_ms": elapsed_us // 1000}
        await self.send_json(message | _cost(costs.cost(elapsed_us, rate), execution.sandbox))


def _cost(nano_usd: int, sandbox: Sandbox | None) -> dict[str, float]:
    """Nothing where no rate is known: the page has said already that it is unpriced."""
    return {"cost_usd": nano_usd / costs.NANO} if sandbox is None or sandbox.is_priced else {}


class ExecutionSocket(Socket):
    """One execution, to its end."""

    def find(self) -> None:
        self.id = self.scope["url_route"]["kwargs"]["execution_id"]
        found = Execution.objects.select_related("agent").filter(pk=self.id, team=self.caller.team).first()
        if found is None:
            raise NotFound
        audit.seen("output", caller=self.caller, of=found)

    def start_after(self, after: dict[str, Any]) -> None:
        super().start_after({self.id: after.get(self.id, after.get("", 0))})

    def followed(self) -> list[Execution]:
        if self.told.get(self.id) == "ended":
            return []
        return list(Execution.objects.select_related("sandbox").filter(pk=self.id))


class SessionSocket(Socket):
    """A session: every execution in it, whoever asked for it, and its own end."""

    said: dict[str, Any] = {}
    newest = None

    def find(self) -> None:
        self.id = self.scope["url_route"]["kwargs"]["session_id"]
        found = find_session(self.caller, self.id)
        audit.seen("output", caller=self.caller, of=found)
        self.agent = found.agent.name

    def followed(self) -> list[Execution]:
        """The last ones at first; then the open ones, and what was born since."""
        found = Execution.objects.select_related("sandbox").filter(sandbox=self.id)
        if self.newest is not None:
            found = found.filter(created_at__gt=self.newest - timedelta(minutes=1))
            untold = [e.pk for e in found if self.told.get(e.pk) != "ended"]
            still_open = [pk for pk, state in self.told.items() if state != "ended"]
            found = Execution.objects.select_related("sandbox").filter(pk__in={*untold, *still_open})
        latest = sorted(found.order_by("-created_at", "-id")[:REMEMBERED], key=lambda e: (e.created_at, e.pk))
        if latest:
            self.newest = max(self.newest or latest[-1].created_at, latest[-1].created_at)
        elif self.newest is None:
            self.newest = timezone.now()
        return latest

    async def look(self) -> bool:
        busy = await super().look()
        sandbox = await surely(Sandbox.objects.get, pk=self.id)
        now = {
            "open": sandbox.ended_at is None,
            "end_at": sandbox.leased_until.isoformat(),
            "reason": sandbox.end_reason,
        } | _cost(sandbox.spent_nano_usd, sandbox)
        if now != self.said:
            self.said = now
            await self.send_json({"type": "session", "seq": 0, **now})
        return busy

    async def on_execute_request(self, content: dict[str, Any]) -> None:
        client_id = str(content.get("client_id", ""))[:64]
        asked = {name: content[name] for name in ("code", "language", "timeout_seconds") if name in content}
        request = parse(Submission, {**asked, "session_id": self.id, "agent": self.agent})
        once = f"console {client_id}" if client_id else None
        async with self.asking:
            execution = await rows(operations.submit, caller=self.caller, request=request, idempotency_key=once)
            self.clients[execution.pk] = client_id
        if execution.is_unclaimed:
            await operations.ring()
        elif not execution.replayed:
            operations.start(execution)
        elif self.told.pop(execution.pk, None):
            self.seen.pop(execution.pk, None)

    async def on_extend(self, content: dict[str, Any]) -> None:
        sandbox = await rows(Sandbox.objects.get, pk=self.id)
        left = max(0, int((sandbox.leased_until - timezone.now()).total_seconds()))
        seconds = min(86_400, left + EXTEND_SECONDS)
        await operations.extend_session(caller=self.caller, session_id=self.id, seconds=seconds)

    async def on_restart(self, content: dict[str, Any]) -> None:
        await operations.restart_session(caller=self.caller, session_id=self.id)
