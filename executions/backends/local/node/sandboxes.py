"""One sandbox as the node sees it: born, metered, ended. What the guest says about itself is not asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from node import egress, runs
from node.cgroups import Group
from node.freezer import Freezer
from node.ground import Ground
from node.runs import Counters, Run
from node.uids import Block
from node.unborn import Unborn, dead
from node.watchdog import Watchdog

PORTS = (49983, 49999)
START_SECONDS = 35  # for a template's start command; the agent stops it after 30
RESERVED_PROCESSES = 32  # of the control group, beyond the guest's own: the agent must still be able to act


class Refusal(Exception):
    """A request that cannot be served: code and sentence, and the named limit behind it where there is one."""

    def __init__(self, code: str, detail: str, reason: str = "") -> None:
        super().__init__(detail)
        self.code, self.detail, self.reason = code, detail, reason


class Sandbox:
    def __init__(self, request: dict[str, Any], folder: Path, cores: list[int]) -> None:
        self.id: str = request["sandbox_id"]
        self.template: str = request["template"]
        self.metadata: dict[str, str] = request.get("metadata", {})
        self.limits: dict[str, int] = request["limits"]
        self.env: dict[str, str] = request.get("env", {})
        self.files: dict[str, str] = {}
        self.start_command = ""
        self.network_allow: list[str] = request.get("network_allow", [])
        self.agent: str = request.get("agent", "")
        self.layer: str = request.get("layer", "")
        self.folder, self.cores = folder, cores
        self.token = secrets.token_hex(16)
        self.started_at = datetime.now(UTC).isoformat()
        self.boot_ms = 0.0
        self.alive = False
        self.ending = asyncio.Lock()  # two may ask for its end; both hear when it is over
        self.turning = asyncio.Lock()  # of its freezer, while it is frozen
        self.freezer: Freezer | None = None
        self.group: Group | None = None
        self.below: Ground | None = None  # of the reduced mode
        self.runs: list[Run] = []
        self.watchdog: Watchdog | None = None  # where there are no control groups
        self._process: Unborn | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def described(self) -> dict[str, Any]:
        return {
            "sandbox_id": self.id, "template": self.template, "metadata": self.metadata, "started_at": self.started_at,
            "dir": str(self.folder), "token": self.token,
        }  # fmt: skip

    async def be_born(self, unborn: Unborn, proxy: egress.Egress, below: Ground | None) -> None:
        """Make this unborn sandbox ours. Refusal where a wall does not stand; end() cleans up in any case."""
        began = time.monotonic()
        self._process = unborn
        self.below, self.group = below, unborn.group
        listeners: list[socket.socket] = []
        try:
            self._bind(listeners)
            limits = self.limits
            if self.group is not None:
                limits = limits | {"disk_mib": runs.disk_mib(limits["disk_mib"], limits["memory_mib"])}
                self.group.limit(
                    memory_bytes=self.limits["memory_mib"] << 20,
                    processes=self.limits["processes"] + RESERVED_PROCESSES,
                    cpu_count=self.limits["cpu_count"],
                )
            plan = {
                "sandbox_id": self.id, "template": self.template, "limits": limits, "env": self.env,
                "token": self.token, "cores": self.cores, "files": self.files, "start_command": self.start_command,
                "proxy_port": egress.PORT if self.network_allow else 0, "layer": self.layer,
            }  # fmt: skip
            if below is not None:
                plan |= below.make_home(self.id, unborn.uid)
            await unborn.be_born(
                plan,
                listeners,
                START_SECONDS if self.start_command else 0,
                lambda listener: proxy.open(self.id, self.network_allow, self.agent, listener),
            )
            if self.group is None:
                self.watchdog = Watchdog(unborn, self.limits, self._note)
            self.alive = True
        except (OSError, TimeoutError) as problem:
            raise Refusal("unavailable", f"The sandbox could not be made: {problem or 'no answer in time'}") from None
        finally:
            for listener in listeners:
                listener.close()
        self.boot_ms = round((time.monotonic() - began) * 1000, 1)

    def _bind(self, listeners: list[socket.socket]) -> None:
        self.folder.mkdir(mode=0o700)
        folder = os.open(self.folder, os.O_PATH | os.O_DIRECTORY)
        try:
            for port in PORTS:
                listener = socket.socket(socket.AF_UNIX)
                listeners.append(listener)
                listener.bind(f"/proc/self/fd/{folder}/{port}.sock")  # a socket's path has 108 bytes, a folder's more
                os.chmod(f"{port}.sock", 0o600, dir_fd=folder)
                listener.listen(128)
        finally:
            os.close(folder)

    async def death(self) -> None:
        """Return when it has ended, for whatever reason."""
        assert self._process is not None
        descriptor = os.dup(self._process.pidfd)
        try:
            await dead(descriptor)
        finally:
            self.alive = False
            os.close(descriptor)

    def expire_in(self, seconds: float, end: Callable[[], None]) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(seconds, end)

    async def freeze(self) -> None:
        """Returns when none of it runs; idempotent. Refusal where that cannot be had."""
        async with self.turning:
            if self.freezer is None and self._process is not None:
                freezer = Freezer(self._process.pid, self.group)
                try:
                    await asyncio.to_thread(freezer.freeze)
                except OSError as problem:
                    raise Refusal("internal", f"The sandbox could not be frozen: {problem}") from None
                self.freezer = freezer

    async def thaw(self) -> None:
        async with self.turning:
            if self.freezer is not None:
                self.freezer.thaw()
                self.freezer = None

    def begin_run(self) -> Run:
        """A meter of what is used from now on; it is given back to end_run()."""
        run = Run(self)
        self.note_peak()
        if self.group is not None:
            self.group.reset_peak()
        self.runs.append(run)
        return run

    def end_run(self, run: Run) -> None:
        self.runs.remove(run)

    def counters(self) -> Counters:
        if self.group is not None:
            return Counters(self.group.cpu_us(), self.group.memory_kills())
        assert self.watchdog is not None
        return Counters(self.watchdog.measure().cpu_us, self.watchdog.kills)

    def note_peak(self) -> None:
        """Let every run that goes on know of the memory that was used since somebody looked."""
        if self.group is not None:
            self._note(self.group.peak_memory_bytes())
        elif self.runs and self.watchdog is not None:
            self.watchdog.account_for(self.watchdog.measure())

    def _note(self, memory_bytes: int, data_bytes: int = 0) -> None:
        for run in self.runs:
            run.peak_memory_bytes = max(run.peak_memory_bytes, memory_bytes)
            run.peak_data_bytes = max(run.peak_data_bytes, data_bytes)

    def most_processes(self) -> int:
        """The most there ever were at one time, as far as was looked."""
        counted = self.group or self.watchdog
        assert counted is not None
        return counted.most_processes()

    def disk_is_full(self, path: str) -> bool:
        assert self._process is not None
        return any(runs.is_full(pid, path) for pid in self._process.pids())

    def died_for_memory(self) -> bool:
        """Whether the agent itself was killed for the memory that its guests had used; asked after its death."""
        return self.group is not None and self.group.memory_kills() > 0

    async def end(self, block: Block | None) -> None:
        """Kill it, wait until the kernel says that all of it is gone, and remove its traces. May be repeated."""
        self.alive = False  # from here on there is nothing to watch
        if self._expiry is not None:
            self._expiry.cancel()
        if self._process is not None:
            process, self._process = self._process, None
            await process.discard(block)
        for port in PORTS:
            (self.folder / f"{port}.sock").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()
        if self.below is not None:
            self.below.remove_home(self.id)  # at least its name; what is in it may take long
