"""A backend on which nothing runs: it says and does what the code's comments and its options tell it.

In the code, one directive a line:  `#> text` prints, `#!> text` prints to stderr, `#= text` is the value,
`#! Name: value` raises, `#~ 0.5` takes that many seconds, `#@ example.org:443` connects, if the rules allow it. Bad machines have names, in OPTIONS["BEHAVES"]:
never_boots, dies_mid_run, slow_to_die, loses_kills.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from executions.backends.base import (
    Backend,
    Capabilities,
    Check,
    EgressRecord,
    Event,
    FileInfo,
    Handle,
    Listed,
    SandboxSpec,
)
from executions.errors import (
    BackendError,
    BackendUnavailable,
    ContextUnknown,
    FileRefused,
    RunTimedOut,
    SandboxLost,
    SandboxMissing,
)
from executions.network import Rules, target
from executions.states import LANGUAGES

DIRECTIVE = re.compile(r"#(>|!>|=|!|~|@) ?(.*)$")
HOME = "/home/user"
FILES_LIMIT_BYTES = 64 << 20  # of one machine
VCPU_NANO_USD, GIB_NANO_USD = 14_000, 4_500  # for an allocated second: E2B's published prices (e2b.dev/pricing)


@dataclass(eq=False)
class Machine:
    """One simulated sandbox and its part of the meter, which knows nothing of the ledger."""

    spec: SandboxSpec
    born: float
    ends: float
    died: float | None = None
    paused: float | None = None  # since then
    rested: float = 0.0  # seconds that it was paused before, which cost nothing
    why: str = ""  # how it ended, where somebody ended it
    runs: dict[str | None, int] = field(default_factory=dict)  # of each context
    contexts: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    egress: list[EgressRecord] = field(default_factory=list)
    waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        return self.died is None and (self.paused is not None or time.monotonic() < self.ends)

    @property
    def running(self) -> bool:
        return self.alive and self.paused is None

    @property
    def seconds(self) -> float:
        """Allocated so far: from birth to death, the time of pauses left out."""
        now = time.monotonic()
        until = self.paused if self.paused is not None else min(self.died if self.died is not None else now, self.ends)
        return max(0.0, until - self.born - self.rested)

    @property
    def nano_usd(self) -> int:
        """What a provider would bill for it so far."""
        size = self.spec.limits
        return round(self.seconds * (size.cpu_count * VCPU_NANO_USD + size.memory_mib * GIB_NANO_USD / 1024))

    def end(self, why: str) -> None:
        if self.alive:
            if self.paused is not None:
                self.rested += time.monotonic() - self.paused
                self.paused, self.ends = None, float("inf")
            self.died, self.why = time.monotonic(), why
        self.wake()

    def wake(self) -> None:
        """Whoever waits in it looks again: it has ended, was paused, or ends at another time."""
        for loop, waiter in self.waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, waiter)

    def connect(self, authority: str) -> None:
        """Connect as far as the rules permit; ten bytes go out and twenty come in."""
        host, _, port = authority.partition(":")
        rules = Rules(self.spec.network_allow)
        permitted = rules.permit(target(host), int(port))
        reason = "" if permitted else f"agent {self.spec.agent} may not reach {authority}; allowed are: {rules}"
        self.egress.append(
            EgressRecord(
                number=len(self.egress) + 1, host=host, port=int(port), reason=reason, address="", times=1,
                verdict="allowed" if permitted else "denied", bytes_out=10 * permitted, bytes_in=20 * permitted,
                at=datetime.now(UTC).isoformat(),
            )
        )  # fmt: skip


_machines: dict[str, dict[str, Machine]] = {}


class ScriptedBackend(Backend):
    """OPTIONS: BEHAVES (a name from above), CREATE_SECONDS, KILL_SECONDS."""

    capabilities = Capabilities(
        languages=frozenset(LANGUAGES),
        commands=True,
        files=True,
        contexts=True,
        internet=True,
        network_rules=True,
        egress=True,
        pause=True,
        pause_is_free=True,
    )
    isolation = "simulated"
    remote = False

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        self.behaves = options.get("BEHAVES", "")
        self.machines = _machines.setdefault(alias, {})

    def metered_seconds(self) -> float:
        """What a provider would bill: allocated seconds of every machine so far, independent of any ledger."""
        return sum(machine.seconds for machine in self.machines.values())

    def metered_nano_usd(self) -> int:
        """The same in money, at E2B's prices for each machine's size."""
        return sum(machine.nano_usd for machine in self.machines.values())

    async def create(self, spec: SandboxSpec) -> Handle:
        if seconds := self.options.get("CREATE_SECONDS", 0):
            await asyncio.sleep(seconds)
        if self.behaves == "never_boots":
            raise BackendUnavailable("This machine never boots.")
        now = time.monotonic()
        self.machines[spec.sandbox_id] = Machine(spec, born=now, ends=now + spec.timeout_seconds)
        return {"sandbox_id": spec.sandbox_id}

    def _machine(self, handle: Handle) -> Machine:
        machine = self.machines.get(handle["sandbox_id"])
        if machine is None or not machine.running:
            raise SandboxLost("The sandbox is gone." if machine is None or not machine.alive else "It is paused.")
        return machine

    def _there(self, handle: Handle) -> Machine:
        """The machine, before anything has run in it."""
        try:
            return self._machine(handle)
        except SandboxLost as e:
            raise SandboxMissing(e.detail) from None

    async def connect(self, handle: Handle) -> None:
        self._machine(handle)

    # code

    async def run_code(
        self, handle, code, *, language="python", context_id=None, env=None, timeout_seconds=60, cpu_seconds=0
    ):
        machine = self._there(handle)
        if context_id is not None and context_id not in machine.contexts:
            raise ContextUnknown
        machine.runs[context_id] = machine.runs.get(context_id, 0) + 1
        yield Event("count", {"execution_count": machine.runs[context_id]})
        async for event in self._say(handle, code, timeout_seconds):
            yield event

    async def run_command(self, handle, command, *, cwd=None, env=None, timeout_seconds=60, cpu_seconds=0):
        code, _ = 0, self._there(handle)
        async for event in self._say(handle, command, timeout_seconds):
            if event.kind == "error":
                code = 1
            elif event.kind != "result":
                yield event
        yield Event("exit", {"exit_code": code})

    async def _say(self, handle: Handle, code: str, timeout_seconds: float) -> AsyncIterator[Event]:
        started = time.monotonic()
        for line in code.splitlines():
            found = DIRECTIVE.search(line)
            if not found:
                continue
            self._machine(handle)
            mark, text = found.groups()
            match mark:
                case ">":
                    yield Event("stdout", {"text": text + "\n"})
                case "!>":
                    yield Event("stderr", {"text": text + "\n"})
                case "=":
                    yield Event("result", {"main": True, "mime": {"text/plain": text}})
                case "!":
                    name, _, value = text.partition(": ")
                    yield Event("error", {"name": name, "value": value, "traceback": f"{name}: {value}"})
                    return
                case "@":
                    self._machine(handle).connect(text)
                case "~":
                    await self._take(handle, min(float(text), max(0, started + timeout_seconds - time.monotonic())))
                    if time.monotonic() >= started + timeout_seconds:
                        raise RunTimedOut
        if self.behaves == "dies_mid_run":
            self._machine(handle).end("died")
            raise SandboxLost("The machine died.")

    async def _take(self, handle: Handle, seconds: float) -> None:
        """Let time pass. Raises SandboxLost as soon as the machine has ended or is paused."""
        until, loop = time.monotonic() + seconds, asyncio.get_running_loop()
        while (left := until - time.monotonic()) > 0:
            machine = self._machine(handle)
            waiting = (loop, loop.create_future())
            machine.waiting.add(waiting)
            try:
                await asyncio.wait({waiting[1]}, timeout=min(left, max(0, machine.ends - time.monotonic())))
            finally:
                machine.waiting.discard(waiting)
        self._machine(handle)

    async def list_contexts(self, handle: Handle) -> list[dict[str, Any]]:
        return list(self._machine(handle).contexts.values())

    async def create_context(self, handle: Handle, *, language: str, cwd: str | None = None) -> dict[str, Any]:
        made = {"id": secrets.token_hex(8), "language": language, "cwd": cwd or HOME}
        self._machine(handle).contexts[made["id"]] = made
        return made

    async def restart_context(self, handle: Handle, context_id: str) -> None:
        machine = self._machine(handle)
        if context_id not in machine.contexts:
            raise ContextUnknown
        machine.runs.pop(context_id, None)

    async def remove_context(self, handle: Handle, context_id: str) -> None:
        await self.restart_context(handle, context_id)
        del self._machine(handle).contexts[context_id]

    # files

    async def write_file(self, handle: Handle, path: str, data: bytes | AsyncIterator[bytes]) -> None:
        machine, name = self._machine(handle), _path(path)
        content = data if isinstance(data, bytes) else b"".join([piece async for piece in data])
        if sum(map(len, machine.files.values())) + len(content) > FILES_LIMIT_BYTES:
            raise FileRefused("The disk is full.")
        machine.files[name] = content

    async def read_file(self, handle: Handle, path: str) -> AsyncIterator[bytes]:
        machine, name = self._machine(handle), _path(path)
        if name not in machine.files:
            raise FileRefused(f"path '{name}' does not exist", missing=True)
        yield machine.files[name]

    async def list_files(self, handle: Handle, path: str, *, depth: int = 1) -> list[FileInfo]:
        files, root = self._machine(handle).files, _path(path).rstrip("/")
        found: dict[str, FileInfo] = {}
        for name, content in files.items():
            if not name.startswith(root + "/"):
                continue
            parts = name[len(root) + 1 :].split("/")
            for level in range(1, min(len(parts), depth) + 1):
                whole, kind = f"{root}/{'/'.join(parts[:level])}", "file" if level == len(parts) else "directory"
                size = len(content) if kind == "file" else 0
                found[whole] = FileInfo(
                    parts[level - 1], whole, kind, size, 0o644 if kind == "file" else 0o755, "1970-01-01T00:00:00+00:00"
                )
        if not found and root not in ("", HOME, "/tmp"):
            raise FileRefused(f"path '{root}' does not exist", missing=True)
        return [found[whole] for whole in sorted(found)]

    async def remove_file(self, handle: Handle, path: str) -> None:
        files, root = self._machine(handle).files, _path(path)
        for name in [name for name in files if name == root or name.startswith(root + "/")]:
            del files[name]

    async def move_file(self, handle: Handle, path: str, to: str) -> None:
        files, root, target = self._machine(handle).files, _path(path), _path(to)
        moved = [name for name in files if name == root or name.startswith(root + "/")]
        if not moved:
            raise FileRefused(f"path '{root}' does not exist", missing=True)
        for name in moved:
            files[target + name[len(root) :]] = files.pop(name)

    async def egress(self, handle: Handle, *, after: int = 0, final: bool = False) -> list[EgressRecord]:
        machine = self.machines.get(handle["sandbox_id"])
        return [record for record in machine.egress if record.number > after] if machine else []

    # life

    async def set_timeout(self, handle: Handle, seconds: int) -> None:
        machine = self._machine(handle)
        machine.ends = time.monotonic() + seconds
        machine.wake()

    async def pause(self, handle: Handle) -> None:
        """Its memory is kept and costs nothing; what runs in it is broken off."""
        machine = self.machines.get(handle["sandbox_id"])
        if machine is None or not machine.alive:
            raise SandboxLost("The sandbox is gone.")
        machine.paused = machine.paused or time.monotonic()
        machine.wake()

    async def resume(self, handle: Handle, *, timeout_seconds: int) -> None:
        machine = self.machines.get(handle["sandbox_id"])
        if machine is None or not machine.alive:
            raise SandboxLost("The sandbox is gone.")
        if machine.paused is not None:
            machine.rested += time.monotonic() - machine.paused
            machine.paused, machine.ends = None, time.monotonic() + timeout_seconds

    async def kill(self, handle: Handle) -> bool:
        if seconds := self.options.get("KILL_SECONDS", 5 if self.behaves == "slow_to_die" else 0):
            await asyncio.sleep(seconds)
        if self.behaves == "loses_kills":
            raise BackendError("The kill was not confirmed.")
        if (machine := self.machines.get(handle["sandbox_id"])) is not None:
            machine.end("killed")
        return True

    async def list(self) -> list[Listed]:
        return [Listed(name, {"sandbox_id": name}) for name, machine in self.machines.items() if machine.alive]

    async def check(self) -> Check:
        return Check(ok=self.behaves != "never_boots", detail="Nothing runs here.", isolation=self.isolation)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _path(path: str) -> str:
    """The absolute name of a file. Raises FileRefused for what no file is called."""
    if not path or len(path) > 4096 or ".." in path.split("/") or any(ord(c) < 32 for c in path):
        raise FileRefused(f"path {path[:100]!r} cannot be used")
    return path if path.startswith("/") else f"{HOME}/{path}"
