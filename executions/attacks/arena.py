"""Where attacks are tried: a sandbox to attack from, a neighbour that must notice nothing, and the verdict."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from executions.attacks.kit import KIT, NEIGHBOUR, NEIGHBOUR_ASKED
from executions.backends.base import Backend, Handle, Limits, SandboxSpec
from executions.errors import BackendError, BackendUnavailable, RunTimedOut, SandboxLost, Unsupported

PATIENCE_SECONDS = 12  # beyond an attack's own limit, for the backend to stop it
KILL_SECONDS = 10
ANSWER_SECONDS = 10
KEPT_CHARS = 2_000_000  # of what an attack says; the rest is counted only


class Through(Exception):
    """The attack got through; the message says how."""


class Skipped(Exception):
    """The attack means nothing here; the message says why."""


@dataclass(slots=True)
class Ran:
    """What came back. `end` is value, cut, timeout, lost, endless or an error's name; `through` and `refused` are the ways of the kit."""

    end: str = "value"
    value: Any = None
    stdout: str = ""
    said_bytes: int = 0
    errors: list[dict[str, str]] = field(default_factory=list)
    results: int = 0
    exit_code: int | None = None
    usage: dict[str, int] = field(default_factory=dict)
    seconds: float = 0

    @property
    def through(self) -> dict[str, str]:
        return self.value[0] if isinstance(self.value, tuple) else {}

    @property
    def refused(self) -> dict[str, str]:
        return self.value[1] if isinstance(self.value, tuple) else {}


Judge = Callable[["Arena", Handle, Ran], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Attack:
    """One case. `walls`: who should stop it, first the strongest; the first that stands here is named.

    `code` is a cell that tries its ways with the kit's attempt(); `command` is a shell command instead.
    `judge` looks further and returns what was seen, or raises Through. `ends`: how the run may end.
    """

    name: str
    walls: tuple[str, ...]
    code: str = ""
    command: str = ""
    judge: Judge | None = None
    ends: tuple[str, ...] = ("value",)
    seconds: float = 20
    limits: dict[str, int] = field(default_factory=dict)
    fresh: bool = False  # a sandbox of its own, because the next attack would notice
    suicide: bool = False  # the sandbox itself may be gone afterwards
    own_kernel: bool = True  # also means something where each sandbox has a kernel of its own


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one attack: blocked, open or skipped."""

    group: str
    case: str
    wall: str
    verdict: str
    seen: str
    seconds: float


class Arena:
    """A neighbour with things to lose, and sandboxes to attack it from. Use it as an asynchronous context."""

    def __init__(self, backend: Backend, *, template: str = "default", secrets_: tuple[str, ...] = ()) -> None:
        self.backend, self.template = backend, template
        self.secrets = tuple(secret for secret in secrets_ if len(secret) >= 8)  # what no sandbox may ever say
        self.marker = f"sandgate-canary-{secrets.token_hex(6)}"
        self.walls: dict[str, Any] = {}
        self.isolation = backend.isolation
        self.neighbour: Handle = {}
        self._folders: dict[
            str, tuple[str, str]
        ] = {}  # by sandbox, in the reduced mode: where home and temporary files lie
        self._shared: Handle | None = None
        self._live: list[Handle] = []

    async def __aenter__(self) -> Arena:
        """BackendError where no sandbox can be had."""
        check = await self.backend.check()
        self.walls, self.isolation = check.walls, check.isolation or self.backend.isolation
        if self.backend.capabilities.executes:
            self.neighbour = await self.create()
            try:
                await self._must(self.neighbour, NEIGHBOUR)
            except Through as problem:
                await self.__aexit__()
                raise BackendUnavailable(f"The neighbour could not settle in: {problem}") from None
        return self

    async def __aexit__(self, *_: Any) -> None:
        for handle in list(self._live):
            with contextlib.suppress(BackendError):
                await self.kill(handle)

    # sandboxes

    async def create(self, **limits: int) -> Handle:
        spec = SandboxSpec(
            "a" + secrets.token_hex(8),
            self.template,
            timeout_seconds=600,
            limits=Limits(**limits),
            metadata={"attest": "1"},
        )
        handle = await self.backend.create(spec)
        self._live.append(handle)
        if self.isolation == "reduced":
            said = await self.value(handle, "import os\n(os.environ['HOME'], os.environ['TMPDIR'])")
            self._folders[str(handle)] = said
        return handle

    def adapted(self, handle: Handle, text: str) -> str:
        """An attack with the names of this sandbox; in the reduced mode folders have others than everywhere else."""
        text = text.replace("@MARKER@", self.marker).replace("@REDUCED@", str(self.isolation == "reduced"))
        if folders := self._folders.get(str(handle)):
            text = re.sub(r"/home/user|(?<![\w.])/tmp(?=[/'\"])", lambda found: folders[found[0] == "/tmp"], text)
        return text

    async def kill(self, handle: Handle) -> None:
        """Confirmed, and in time. Through where it is not."""
        if handle is self._shared:
            self._shared = None
        if handle in self._live:
            self._live.remove(handle)
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await self.backend.kill(handle)
        except TimeoutError:
            raise Through(f"the sandbox was not confirmed dead within {KILL_SECONDS} s") from None

    @asynccontextmanager
    async def sandbox(self, **limits: int) -> AsyncIterator[Handle]:
        """One of its own."""
        handle = await self.create(**limits)
        try:
            yield handle
        finally:
            await self.kill(handle)

    @asynccontextmanager
    async def _place(self, attack: Attack) -> AsyncIterator[Handle]:
        if attack.fresh or attack.suicide or attack.limits:
            async with self.sandbox(**attack.limits) as handle:
                yield handle
            return
        if self._shared is None:
            self._shared = await self.create()
        yield self._shared

    # code

    async def run(self, handle: Handle, attack: Attack) -> Ran:
        """Run an attack's code or command; every end is an answer."""
        ran, began = Ran(), time.monotonic()
        try:
            async with asyncio.timeout(attack.seconds + PATIENCE_SECONDS):
                await self._listen(handle, attack, ran)
        except RunTimedOut:
            ran.end = "timeout"
        except SandboxLost:
            ran.end = "lost"
        except TimeoutError:
            ran.end = "endless"
        ran.seconds = time.monotonic() - began
        if ran.end == "value" and ran.errors:
            ran.end = ran.errors[-1]["name"]
        elif ran.end == "value" and attack.code and not isinstance(ran.value, tuple):
            ran.end = "cut"  # it never came to its last line
        return ran

    async def _listen(self, handle: Handle, attack: Attack, ran: Ran) -> None:
        if attack.command:
            said = self.backend.run_command(
                handle, self.adapted(handle, attack.command), timeout_seconds=attack.seconds
            )
        else:
            code = f"{KIT}\n{self.adapted(handle, attack.code)}\n(through, refused)"
            said = self.backend.run_code(handle, code, timeout_seconds=attack.seconds)
        async with aclosing(said) as events:  # type: ignore[type-var]
            async for event in events:
                match event.kind:
                    case "stdout" | "stderr":
                        ran.said_bytes += len(event.data["text"])
                        if event.kind == "stdout" and len(ran.stdout) < KEPT_CHARS:
                            ran.stdout += event.data["text"]
                    case "result":
                        ran.results += 1
                        if event.data["main"]:
                            ran.value = _literal(event.data["mime"].get("text/plain"))
                    case "error":
                        ran.errors.append({name: str(text)[:KEPT_CHARS] for name, text in event.data.items()})
                    case "usage":
                        ran.usage = event.data
                    case "exit":
                        ran.exit_code = event.data["exit_code"]

    async def value(self, handle: Handle, code: str, seconds: float = ANSWER_SECONDS) -> Any:
        """The value of a cell without the kit. Through where there is none in time."""
        ran = Ran()
        try:
            async with asyncio.timeout(seconds):
                async for event in self.backend.run_code(handle, self.adapted(handle, code), timeout_seconds=seconds):
                    if event.kind == "error":
                        raise Through(f"it answers with {event.data['name']}: {event.data['value'][:200]}")
                    if event.kind == "result" and event.data["main"]:
                        ran.value = _literal(event.data["mime"].get("text/plain"))
        except (BackendError, TimeoutError) as problem:
            raise Through(f"it does not answer any more ({type(problem).__name__})") from None
        return ran.value

    async def _must(self, handle: Handle, code: str) -> None:
        if (said := await self.value(handle, code)) is not True:
            raise Through(f"not whole: {said!r}")

    # verdicts

    async def try_(self, attack: Attack, group: str = "") -> Finding:
        """Try one attack and look at everybody afterwards."""
        began = time.monotonic()
        try:
            seen, verdict = await self._tried(attack), "blocked"
        except Through as through:
            seen, verdict = str(through), "open"
        except (Skipped, Unsupported) as skipped:
            seen, verdict = str(skipped), "skipped"
        except BackendError as problem:
            seen, verdict = f"the probe could not be made: {type(problem).__name__}: {problem}", "open"
        seen = "".join(c if c.isprintable() else "·" for c in seen)[:500]
        return Finding(group, attack.name, self._wall(attack), verdict, seen, round(time.monotonic() - began, 2))

    async def _tried(self, attack: Attack) -> str:
        self._needs(attack)
        async with self._place(attack) as handle:
            try:
                ran = await self.run(handle, attack) if attack.code or attack.command else Ran()
                seen = self._ended(attack, ran)
                if attack.judge is not None:
                    seen = await attack.judge(self, handle, ran) or seen
                if not attack.suicide:
                    await self._answers(handle)
            except Through:
                if handle is self._shared:
                    await self.kill(handle)
                raise
        await self.whole()
        return seen

    def _needs(self, attack: Attack) -> None:
        if not self.backend.capabilities.executes:
            raise Skipped("This backend runs no code.")
        if attack.limits and not self.backend.capabilities.limits:
            raise Skipped("A sandbox has the size of its template here.")
        if self.isolation == "microvm" and not attack.own_kernel:
            raise Skipped("Each sandbox has a kernel of its own.")

    def _ended(self, attack: Attack, ran: Ran) -> str:
        if ran.through:
            raise Through("; ".join(f"{way}: {got}" for way, got in ran.through.items()))
        if ran.end not in attack.ends:
            if self.isolation == "reduced" and ran.end in ("PermissionError", "OSError"):
                raise Skipped(f"What this attack is made of is refused here: {ran.errors[-1]['value'][:200]}")
            why = f"{ran.errors[-1]['value'][:200]}" if ran.errors else f"after {ran.seconds:.1f} s"
            raise Through(f"the run ended as {ran.end}, {why}")
        kinds = sorted(set(ran.refused.values()))
        ways = ", ".join(f"{kind} × {list(ran.refused.values()).count(kind)}" for kind in kinds)
        return ways or f"ended as {ran.end} after {ran.seconds:.1f} s"

    async def _answers(self, handle: Handle) -> None:
        try:
            if await self.value(handle, "20 + 22") != 42:
                raise Through("it answers wrongly")
        except Through as through:
            raise Through(f"afterwards the sandbox is not itself: {through}") from None

    async def whole(self) -> None:
        """The neighbour has what it had, and the backend still provides. Through where not."""
        try:
            await self._must(self.neighbour, NEIGHBOUR_ASKED)
        except Through as through:
            raise Through(f"its neighbour suffered: {through}") from None
        check = await self.backend.check()
        if not check.ok:
            raise Through(f"the backend suffered: {check.detail}")

    def _wall(self, attack: Attack) -> str:
        if self.isolation == "microvm":
            return "microvm"
        return next((wall for wall in attack.walls if self.walls.get(wall, True) is True), attack.walls[-1])


def _literal(text: Any) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
