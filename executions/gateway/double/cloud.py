"""The double's sandboxes: who has them, what a plan allows, when they end, what they cost."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from executions.backends.base import Handle, Limits, SandboxSpec
from executions.backends.scripted import Machine, ScriptedBackend
from executions.errors import SandboxLost
from executions.gateway.double.faults import Faults, seconds

TEMPLATES = {"base": (2, 512), "code-interpreter-v1": (2, 512)}  # vCPU, MiB: E2B's default size
EVERYTHING = "0.0.0.0/0"
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
CONCURRENT = (
    "you have reached the maximum number of concurrent E2B sandboxes ({}). If you need more, "
    "please visit 'https://e2b.dev/docs/billing'"
)


class Refusal(Exception):
    """An answer that is none: E2B's status and message, and what the SDK is told about trying again."""

    def __init__(self, status: int, message: str, *, retry_after: float | None = None, retry: bool | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after, self.retry = status, message, retry_after, retry


@dataclass(eq=False)
class Box:
    """One sandbox as its owner sees it."""

    sandbox_id: str
    owner: str  # the key that made it
    template: str
    token: str
    metadata: dict[str, str]
    began: datetime
    internet: bool
    network: dict[str, Any]
    machine: Machine
    processes: dict[int, asyncio.Event] = field(default_factory=dict)  # what stops each command, by its pid

    @property
    def handle(self) -> Handle:
        return {"sandbox_id": self.sandbox_id}

    @property
    def state(self) -> str:
        return "running" if self.machine.running else "paused" if self.machine.alive else "ended"

    @property
    def why(self) -> str:
        return "" if self.machine.alive else self.machine.why or "timeout"

    def moment(self, monotonic: float) -> str:
        """ISO 8601 of a moment of the machine's clock."""
        wall = time.time() - time.monotonic() + monotonic
        return datetime.fromtimestamp(min(wall, 4e9), UTC).isoformat()


class Cloud:
    """All sandboxes since the start. Metered until each ends; what has ended stays on the bill."""

    def __init__(self, faults: Faults, *, keys: list[str], templates: dict[str, tuple[int, int]], seed: int | None):
        self.faults, self.keys, self.templates = faults, keys, TEMPLATES | templates
        self.chance = random.Random(seed)
        self.backend = ScriptedBackend(f"double {secrets.token_hex(4)}", {})
        self.boxes: dict[str, Box] = {}
        self.booting: dict[str, int] = {}  # of each owner
        self.made: dict[tuple[str, str], tuple[bytes, asyncio.Future[Box]]] = {}  # by owner and Idempotency-Key
        self.created: dict[str, list[float]] = {}  # when, of each owner: the last second's
        self.counts: dict[str, int] = {}  # requests and refusals by name

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def find(self, sandbox_id: str) -> Box | None:
        box = self.boxes.get(sandbox_id)
        return box if box is not None and box.machine.alive else None

    def of(self, owner: str, sandbox_id: str) -> Box:
        """The owner's live sandbox. Refusal 404 for another's too."""
        box = self.find(sandbox_id)
        if box is None or box.owner != owner:
            raise Refusal(404, f"Sandbox {sandbox_id} not found")
        return box

    def live(self, owner: str) -> list[Box]:
        return [box for box in self.boxes.values() if box.owner == owner and box.machine.alive]

    async def create(self, owner: str, body: dict[str, Any], key: str, raw: bytes) -> Box:
        """A new sandbox, or the one that the same Idempotency-Key has made. Raises Refusal."""
        if not key:
            return await self._create(owner, body)
        earlier = self.made.get((owner, key))
        if earlier is not None:
            if earlier[0] != raw:
                raise Refusal(422, "Idempotency key was used with another request")
            return await asyncio.shield(earlier[1])
        making = asyncio.ensure_future(self._create(owner, body))
        self.made[owner, key] = (raw, making)
        try:
            return await asyncio.shield(making)
        finally:
            if making.done() and (making.cancelled() or making.exception() is not None):
                self.made.pop((owner, key), None)

    async def _create(self, owner: str, body: dict[str, Any]) -> Box:
        template = body.get("templateID")
        size = self.templates.get(str(template))
        if size is None:
            raise Refusal(404, f"template '{template}' not found")
        for name in ("autoPause", "volumeMounts", "mcp", "iam"):
            if body.get(name):
                raise Refusal(400, f"{name} is not in this double of E2B")
        lives = body.get("timeout", 300)
        if not isinstance(lives, int) or lives < 1:
            raise Refusal(400, "Timeout must be greater than 0")
        self._long_enough(lives)
        self._admit(owner)
        self.booting[owner] = self.booting.get(owner, 0) + 1
        try:
            await asyncio.sleep(seconds(self.faults.create_ms, self.chance))
            sandbox_id = "i" + "".join(secrets.choice(ALPHABET) for _ in range(20))
            network = body.get("network") or {}
            rules = _rules(body.get("allow_internet_access", True), network)
            spec = SandboxSpec(
                sandbox_id, str(template), lives, Limits(cpu_count=size[0], memory_mib=size[1]), body.get("envVars") or {},
                network_allow=rules,
            )  # fmt: skip
            await self.backend.create(spec)
            box = self.boxes[sandbox_id] = Box(
                sandbox_id=sandbox_id, owner=owner, template=str(template), token=secrets.token_hex(16),
                metadata=body.get("metadata") or {}, began=datetime.now(UTC), internet=bool(rules), network=network,
                machine=self.backend.machines[sandbox_id],
            )  # fmt: skip
        finally:
            self.booting[owner] -= 1
        if self.chance.random() < self.faults.vanish:
            self.later(self.chance.random() * self.faults.vanish_seconds, box, "vanished")
        if self.chance.random() < self.faults.forgets:
            box.machine.end("forgotten")
        return box

    def _long_enough(self, lives: int) -> None:
        if lives > self.faults.timeout_max_seconds:
            raise Refusal(400, f"Timeout cannot be greater than {self.faults.timeout_max_seconds // 3600} hours")

    def _admit(self, owner: str) -> None:
        """Within the plan, or Refusal 429. What is paused does not count; what boots does."""
        if limit := self.faults.concurrent:
            running = sum(box.machine.running for box in self.live(owner)) + self.booting.get(owner, 0)
            if running >= limit:
                raise Refusal(429, CONCURRENT.format(limit))
        if rate := self.faults.creations_per_second:
            now = time.monotonic()
            window = max(1.0, 1 / rate)
            recent = [at for at in self.created.get(owner, []) if now - at < window]
            self.created[owner] = recent
            if len(recent) >= rate * window:
                raise Refusal(
                    429, "Rate limit exceeded, please try again later", retry_after=window - (now - recent[0])
                )
            recent.append(now)

    def later(self, wait: float, box: Box, why: str) -> None:
        asyncio.get_running_loop().call_later(wait, box.machine.end, why)

    async def kill(self, box: Box) -> None:
        await self.backend.kill(box.handle)

    async def extend(self, box: Box, lives: Any, *, shorten: bool) -> None:
        """It ends so many seconds from now; without `shorten` never earlier than it would."""
        if not isinstance(lives, int) or isinstance(lives, bool) or lives < 1:
            raise Refusal(400, "Timeout must be greater than 0")
        self._long_enough(lives)
        if shorten or time.monotonic() + lives > box.machine.ends:
            await self.backend.set_timeout(box.handle, lives)

    async def pause(self, box: Box) -> None:
        if not box.machine.running:
            raise Refusal(409, f"Sandbox {box.sandbox_id} is already paused")
        await self.backend.pause(box.handle)

    async def resume(self, box: Box, lives: Any) -> bool:
        """True when it was paused; a running one lives at least so long."""
        if box.machine.running:
            await self.extend(box, lives, shorten=False)
            return False
        self._long_enough(lives)
        self._admit(box.owner)
        try:
            await self.backend.resume(box.handle, timeout_seconds=lives)
        except SandboxLost:
            raise Refusal(404, f"Sandbox {box.sandbox_id} not found") from None
        return True

    def meter(self) -> dict[str, Any]:
        """The bill so far, sandbox by sandbox, in nano-dollars at E2B's published prices."""
        told: list[dict[str, Any]] = [
            {
                "sandboxID": box.sandbox_id,
                "metadata": box.metadata,
                "templateID": box.template,
                "state": box.state,
                "why": box.why,
                "began": box.began.isoformat(),
                "ended": "" if box.machine.alive else box.moment(_end(box.machine)),
                "endAt": box.moment(box.machine.ends),
                "seconds": round(box.machine.seconds, 6),
                "cpuCount": box.machine.spec.limits.cpu_count,
                "memoryMB": box.machine.spec.limits.memory_mib,
                "nano_usd": box.machine.nano_usd,
            }
            for box in self.boxes.values()
        ]
        return {
            "nano_usd": sum(one["nano_usd"] for one in told),
            "seconds": round(sum(one["seconds"] for one in told), 6),
            "live": sum(one["state"] != "ended" for one in told),
            "counts": self.counts,
            "sandboxes": told,
        }


def _rules(internet: Any, network: dict[str, Any]) -> tuple[str, ...]:
    """E2B's network as rules: all, none, or the names that are allowed where everything else is denied."""
    allowed, denied = network.get("allowOut") or [], network.get("denyOut") or []
    if EVERYTHING in denied:
        return tuple("*" if host == EVERYTHING else host for host in allowed)
    return ("*",) if internet else ()


def _end(machine: Machine) -> float:
    return min(machine.ends, machine.died if machine.died is not None else machine.ends)
