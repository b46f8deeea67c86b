"""A backend on which nothing runs: it says and does what the code's comments and its options tell it.

In the code, one directive a line:  `#> text` prints, `#!> text` prints to stderr, `#= text` is the value,
`#! Name: value` raises, `#~ 0.5` takes that many seconds, `#@ example.org:443` connects, if the rules allow it. Bad machines have names, in OPTIONS["BEHAVES"]:
never_boots, dies_mid_run, slow_to_die, loses_kills.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from executions.backends.base import Backend, Capabilities, Check, EgressRecord, Event, Handle, Listed, SandboxSpec
from executions.errors import BackendError, BackendUnavailable, RunTimedOut, SandboxLost
from executions.network import Rules, target
from executions.states import LANGUAGES

LOOK_SECONDS = 0.05
DIRECTIVE = re.compile(r"#(>|!>|=|!|~|@) ?(.*)$")


@dataclass
class Machine:
    """One simulated sandbox and its part of the meter."""

    spec: SandboxSpec
    born: float
    ends: float
    died: float | None = None
    runs: int = 0
    contexts: list[dict] = field(default_factory=list)
    egress: list[EgressRecord] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.died is None and time.monotonic() < self.ends

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

    @property
    def seconds(self) -> float:
        return min(self.died or time.monotonic(), self.ends) - self.born


_machines: dict[str, dict[str, Machine]] = {}


class ScriptedBackend(Backend):
    """OPTIONS: BEHAVES (a name from above), CREATE_SECONDS, KILL_SECONDS."""

    capabilities = Capabilities(
        languages=frozenset(LANGUAGES), commands=True, internet=True, network_rules=True, egress=True
    )
    isolation = "simulated"

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        self.behaves = options.get("BEHAVES", "")
        self.machines = _machines.setdefault(alias, {})

    def metered_seconds(self) -> float:
        """What a provider would bill: allocated seconds of every machine so far, independent of any ledger."""
        return sum(machine.seconds for machine in self.machines.values())

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
        if machine is None or not machine.alive:
            raise SandboxLost("The sandbox is gone.")
        return machine

    async def connect(self, handle: Handle) -> None:
        self._machine(handle)

    async def run_code(
        self, handle, code, *, language="python", context_id=None, env=None, timeout_seconds=60, cpu_seconds=0
    ):
        machine = self._machine(handle)
        machine.runs += 1
        yield Event("count", {"execution_count": machine.runs})
        async for event in self._say(handle, code, timeout_seconds):
            yield event

    async def run_command(self, handle, command, *, cwd=None, env=None, timeout_seconds=60, cpu_seconds=0):
        code = 0
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
            self.machines[handle["sandbox_id"]].died = time.monotonic()
            raise SandboxLost("The machine died.")

    async def _take(self, handle: Handle, seconds: float) -> None:
        """Let time pass. Raises SandboxLost soon after the machine has died."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, LOOK_SECONDS))
            self._machine(handle)

    async def egress(self, handle: Handle, *, after: int = 0, final: bool = False) -> list[EgressRecord]:
        machine = self.machines.get(handle["sandbox_id"])
        return [record for record in machine.egress if record.number > after] if machine else []

    async def set_timeout(self, handle: Handle, seconds: int) -> None:
        self._machine(handle).ends = time.monotonic() + seconds

    async def kill(self, handle: Handle) -> bool:
        if seconds := self.options.get("KILL_SECONDS", 5 if self.behaves == "slow_to_die" else 0):
            await asyncio.sleep(seconds)
        if self.behaves == "loses_kills":
            raise BackendError("The kill was not confirmed.")
        machine = self.machines.get(handle["sandbox_id"])
        if machine is not None and machine.alive:
            machine.died = time.monotonic()
        return True

    async def list(self) -> list[Listed]:
        return [Listed(name, {"sandbox_id": name}) for name, machine in self.machines.items() if machine.alive]

    async def check(self) -> Check:
        return Check(ok=self.behaves != "never_boots", detail="Nothing runs here.", isolation=self.isolation)
