"""The templates of a node: each has a zygote of its own, kept ready or warmed up on demand, renewed before it grows old."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.cgroups import Tree
from node.ground import Ground
from node.uids import Block
from node.zygotes import Zygote

RETRY_SECONDS = 5
LOOK_SECONDS = 1
GROWTH_LIMIT_BYTES = 128 << 20  # of a zygote's own memory since it was warm
IDLE_SECONDS = 300  # a zygote on demand that nobody has used for so long is let go


@dataclass(frozen=True, slots=True)
class Content:
    """What makes one template's sandboxes differ from another's; one that cannot be made is `absent`: building or broken."""

    python: str = ""
    files: dict[str, str] = field(default_factory=dict)
    start_command: str = ""
    warm: bool = True
    absent: str = ""
    detail: str = ""  # why it is absent
    build: int = 0  # raised to have the zygote renewed
    digest: str = field(default="", compare=False)  # the sender's own name for all of this

    @classmethod
    def of(cls, request: dict[str, Any]) -> Content:
        """From a request. TypeError or ValueError for what is not of the right kind."""
        given = {name: request[name] for name in cls.__slots__ if name in request}
        content = cls(**given)
        for name, default in (
            ("python", ""),
            ("start_command", ""),
            ("absent", ""),
            ("detail", ""),
            ("digest", ""),
            ("build", 0),
            ("warm", True),
        ):
            if type(getattr(content, name)) is not type(default):
                raise TypeError(f"{name} is not a {type(default).__name__}")
        if not all(isinstance(text, str) for item in content.files.items() for text in item):
            raise TypeError("files maps paths to texts")
        if not content.python and content.absent not in ("building", "broken"):
            raise ValueError("python is missing")
        return content


class Template:
    """`state` is warming, ready, asleep or broken; `detail` says why."""

    def __init__(
        self,
        name: str,
        content: Content,
        run_dir: Path,
        block: Block | None,
        tree: Tree | None,
        forks_limit: int,
        below: Ground | None,
    ) -> None:
        self.name, self.content, self.run_dir, self.below = name, content, run_dir, below
        self.block, self.tree = block, tree
        self.forks_limit = forks_limit  # sandboxes of one zygote; then a new one takes over
        self._languages = run_dir / "languages" / name  # what it has, for whoever asks without waiting
        self.state, self.detail = "warming", ""
        self.zygote: Zygote | None = None
        self.settled = asyncio.Event()  # ready or broken
        self._wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._retired: set[Zygote] = set()
        self._used_at = 0.0

    def described(self) -> dict[str, Any]:
        facts = self.zygote.facts if self.zygote is not None else {}
        return {"state": self.state, "detail": self.detail, "digest": self.content.digest, **facts}

    def renew(self, content: Content) -> None:
        """From now on sandboxes are made of this; the present zygote serves until the new one is warm."""
        if content != self.content:
            self._changed.set()
        self.content = content

    async def ready(self) -> Zygote:
        """The zygote to fork from, warmed up now if it was asleep. OSError with the reason where there is none."""
        self._used_at = asyncio.get_running_loop().time()
        self._wanted.set()
        await self.settled.wait()
        if self.zygote is None:
            raise OSError(self.detail)
        return self.zygote

    async def run(self) -> None:
        """Keep it as its content says until cancelled; then end it with all its sandboxes."""
        try:
            while True:
                self._changed.clear()
                content = self.content
                if content.absent:
                    await self._without(content.absent, content.detail, None)
                    continue
                if not content.warm and self.zygote is None and not await self._wanted_later():
                    continue
                zygote = Zygote(content.python, self.run_dir, self.block, self.tree, self.below)
                try:
                    await zygote.start()
                except (OSError, ValueError) as problem:
                    await zygote.stop()
                    await self._without("broken", str(problem), RETRY_SECONDS)
                    continue
                except BaseException:
                    await zygote.stop()
                    raise
                await self._replace(zygote)
                self._languages.write_text(json.dumps(zygote.facts["languages"]))
                self._settle("ready")
                await self._serve(zygote)
        finally:
            self._languages.unlink(missing_ok=True)
            await asyncio.gather(*(one.stop() for one in {self.zygote, *self._retired} if one is not None))

    def _settle(self, state: str, detail: str = "") -> None:
        self.state, self.detail = state, detail
        self.settled.set()

    def _unsettle(self, detail: str, state: str = "warming") -> None:
        self.state, self.detail = state, detail
        self.settled.clear()

    async def _without(self, state: str, detail: str, seconds: float | None) -> None:
        """Have no zygote until the content changes, or for so long."""
        await self._replace(None)
        self._settle(state, detail)
        await self._change(seconds)
        if self._changed.is_set():
            self._unsettle("it is being made anew")

    async def _wanted_later(self) -> bool:
        """Sleep until somebody wants a sandbox; False when the content has changed before."""
        self._wanted.clear()
        self._unsettle("it warms up when a sandbox is asked for", "asleep")
        await self._change(None, self._wanted)
        self._unsettle("")
        return not self._changed.is_set()

    async def _change(self, seconds: float | None, *others: asyncio.Event) -> None:
        """Return at a change of content or one of these events, or after so long."""
        waits = [asyncio.create_task(event.wait()) for event in (self._changed, *others)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _replace(self, zygote: Zygote | None) -> None:
        old, self.zygote = self.zygote, zygote
        if old is not None:
            await old.give_up_spares()
            self._retired.add(old)
        await self._bury()

    async def _bury(self) -> None:
        """End the zygotes that have been replaced and whose last sandbox is gone."""
        for old in [old for old in self._retired if not old.alive()]:
            self._retired.discard(old)
            await old.stop()

    async def _serve(self, zygote: Zygote) -> None:
        """Return when this zygote is to be replaced: changed, dead, grown, or unused and not to be kept."""
        while not self._changed.is_set() and not self._grown(zygote):
            await self._change(LOOK_SECONDS, zygote.ended)
            await self._bury()
            if zygote.ended.is_set():
                self._unsettle("the zygote died; it is started again")
                self.zygote = None
                await zygote.stop()
                return
            if not self.content.warm and self._unused(zygote):
                await self._replace(None)
                return

    def _grown(self, zygote: Zygote) -> bool:
        return zygote.forks >= self.forks_limit or zygote.rss_bytes() - zygote.first_rss_bytes > GROWTH_LIMIT_BYTES

    def _unused(self, zygote: Zygote) -> bool:
        return not zygote.alive() and asyncio.get_running_loop().time() - self._used_at > IDLE_SECONDS
