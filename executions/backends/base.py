"""What a backend promises. A backend is given a handle, code and limits; never a row, never the ORM.

Handles are plain JSON, so that any process can pick a sandbox up again. Events are E2B's, with results as
MIME bundles. All verbs are asynchronous and may be called from many tasks at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar

from executions.errors import Unsupported

Handle = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do; everything defaults to no."""

    languages: frozenset[str] = frozenset({"python"})
    limits: bool = False  # create() makes a sandbox of the size that its spec says, not of its template's
    executes: bool = False  # code really runs; a simulated backend says what comments in the code tell it
    commands: bool = False
    files: bool = False
    contexts: bool = False
    packages: bool = False
    layers: bool = False  # create() shows a folder of packages of this machine, and every Python looks into ~/.packages
    internet: bool = False
    network_rules: bool = False
    egress: bool = False  # egress() tells what a sandbox connected to, as seen from outside
    templates: bool = False  # made here from their rows: packages, files, start command
    pause: bool = False
    pause_is_free: bool = False  # what is paused costs nothing; otherwise it holds its memory, and is billed on
    run_limits: bool = False  # memory of a fresh sandbox and CPU time of a run are limited as asked
    metrics: bool = False  # runs end with a `usage` event, measured from outside the sandbox
    samples: bool = False  # samples() tells what a sandbox uses, every few seconds, as the provider sees it
    ports: bool = False  # open_port() reaches the data plane of the sandbox


@dataclass(frozen=True, slots=True)
class Limits:
    """The ceilings of one sandbox; the backend enforces them or says in `Capabilities` that it cannot."""

    memory_mib: int = 512
    cpu_count: int = 1
    disk_mib: int = 512
    processes: int = 64
    output_bytes: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What create() makes. `sandbox_id` is ours (lowercase letters and digits) and is found again by list()."""

    sandbox_id: str
    template: str  # this backend's own name for the template
    timeout_seconds: int  # the backend ends the sandbox by itself after this long
    limits: Limits = Limits()
    env: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    network_allow: tuple[str, ...] = ()  # rules as executions.network reads them; none: no network at all
    agent: str = ""  # whose it is, for the sentences that its code is refused with
    layer: str = ""  # of backends with `layers`: the folder of packages below their own that it sees, read-only


@dataclass(frozen=True, slots=True)
class EgressRecord:
    """One connection out of a sandbox, or one refusal and how often it was repeated; bytes out are the sandbox's."""

    number: int  # of the sandbox, in the order in which they ended
    host: str
    port: int
    verdict: str  # a states.EgressVerdict
    reason: str
    address: str
    bytes_out: int
    bytes_in: int
    times: int
    at: str  # ISO 8601


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that the code said.

    kind     data
    stdout   {"text": str}
    stderr   {"text": str}
    result   {"main": bool, "mime": {"text/plain": …, "text/html": …, "image/png": base64, "application/json": …,
             "e2b/data": {column: list}, "e2b/chart": {…}}}   main: the cell's value, otherwise a display call
    error    {"name": str, "value": str, "traceback": str}    and "reason": a states.NamedLimit, where one was reached
    count    {"execution_count": int}
    usage    {"cpu_us": int, "peak_memory_bytes": int}        measured by the backend, not claimed by the guest
    exit     {"exit_code": int}                               commands only, last
    """

    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """An entry of a folder in the sandbox."""

    name: str
    path: str
    type: str  # file, directory or symlink
    size_bytes: int = 0
    mode: int = 0
    modified_at: str = ""


@dataclass(frozen=True, slots=True)
class Listed:
    """A sandbox that the backend says it has, for reconciliation."""

    sandbox_id: str  # ours, from the metadata; "" where it is not ours
    handle: Handle
    started_at: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a sandbox used at one moment, as its provider has seen it."""

    at: str  # ISO 8601
    cpu_count: int
    cpu_percent: float  # of all of them
    memory_bytes: int
    memory_limit_bytes: int
    disk_bytes: int
    disk_limit_bytes: int


@dataclass(frozen=True, slots=True)
class TemplateState:
    """A template at one backend. `digest` is what have_template() called the content that it was given."""

    state: str  # ready, warming, asleep (made on demand), building, broken, missing
    detail: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """What `check()` found. `walls` maps each wall's name to True, or to the sentence that says what is missing."""

    ok: bool
    detail: str = ""
    isolation: str = ""
    walls: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, TemplateState] = field(default_factory=dict)


class Backend:
    """One place where sandboxes live. Subclasses implement the verbs they declare in `capabilities`.

    create      boot a sandbox. BackendUnavailable: nothing exists there, another backend may be tried; `retry_after` among
                its facts where the provider asks for time. SandboxRefused where only such a sandbox cannot be had.
    run_code    an async generator of events, ended by its own exhaustion. Closing it early (aclose) interrupts the
                code and leaves the context usable where it can; ContextRestarted where that cost the variables.
                RunTimedOut after `timeout_seconds`, CpuExceeded after `cpu_seconds` (0: no limit; needs `run_limits`),
                when the remote work has been stopped; a "ContextRestarting" error before it says that the variables are
                lost. SandboxLost when the sandbox died. SandboxMissing when it was gone before the code was handed over, and
                BackendUnavailable with `nothing_sent` among its facts when it could not be reached: it is run elsewhere
                then, as surely nothing ran. The caller's own exceptions are "error" events, never raised here.
    kill        True once the sandbox is confirmed gone, also when it was gone before. Raises BackendError where
                that is not known.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    remote: bool = True  # code and data leave this machine; OPTIONS["REMOTE"] says otherwise of one alias
    has_node: bool = False  # its sandboxes live on one machine, and only processes there reach them
    slow_seconds: float = 0  # a create that has not answered by then looks like an outage; 0: none does
    isolation: str = "none"  # none, reduced, namespaces, microvm, simulated: the floor of agents compares in this order

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        self.alias = alias
        self.options = options
        self.remote = bool(options.get("REMOTE", self.remote))
        self.slow_seconds = float(options.get("SLOW_SECONDS", self.slow_seconds))

    @property
    def is_reached(self) -> bool:
        """Whether a sandbox can be asked for from this machine, as far as is known without asking."""
        return True

    def size_refusal(self, cpu_count: int, memory_mib: int, disk_mib: int) -> str:
        """Why there is no sandbox of this size here; OPTIONS["MOST"], such as {"memory_mib": 8192}, say the largest."""
        asked = {"cpu_count": cpu_count, "memory_mib": memory_mib, "disk_mib": disk_mib}
        for name, most in self.options.get("MOST", {}).items():
            if asked[name] > most:
                return f"gives at most {most} {name}, not the {asked[name]}"
        return ""

    def billed_size(self, template: str, cpu_count: int, memory_mib: int) -> tuple[int, int]:
        """vCPUs and MiB that the provider charges for, where a sandbox of this size was asked for; `template` is its name there."""
        return cpu_count, memory_mib

    def template_name(self, name: str, mapped: str) -> str:
        """This backend's name for a template: `name` is ours, `mapped` the provider's id ("" where not set)."""
        return name

    @property
    def refusal(self) -> str:
        """Why this installation makes no sandboxes here at all; empty where it does. Asked at every admission: no waiting."""
        return ""

    async def have_template(self, name: str, content: dict[str, Any] | None) -> None:
        """From now on `name` is made of this; None: let go of it. Living sandboxes stay as they are."""
        raise Unsupported

    def network_refusal(self, allow: Sequence[str]) -> str:
        """Why this backend cannot hold a sandbox to these rules; empty where it can."""
        if allow and not self.capabilities.internet:
            return "gives sandboxes no network"
        if allow and list(allow) != ["*"] and not self.capabilities.network_rules:
            return "has no network rules, only all of the internet or nothing"
        return ""

    async def egress(self, handle: Handle, *, after: int = 0, final: bool = False) -> list[EgressRecord]:
        """What has ended since record `after`. `final` ends its connections first; works for a while after its end, too."""
        raise Unsupported

    async def create(self, spec: SandboxSpec) -> Handle:
        raise NotImplementedError

    async def connect(self, handle: Handle) -> None:
        """Raise SandboxLost unless the sandbox is alive."""
        raise NotImplementedError

    def run_code(
        self,
        handle: Handle,
        code: str,
        *,
        language: str = "python",
        context_id: str | None = None,
        env: dict[str, str] | None = None,
        timeout_seconds: float = 60,
        cpu_seconds: float = 0,
    ) -> AsyncIterator[Event]:
        raise NotImplementedError

    def run_command(
        self,
        handle: Handle,
        command: str,
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_seconds: float = 60,
        cpu_seconds: float = 0,
    ) -> AsyncIterator[Event]:
        """Run `/bin/bash -l -c command`; stdout and stderr events, then `usage` where known and `exit`."""
        raise Unsupported

    async def list_contexts(self, handle: Handle) -> list[dict[str, Any]]:
        raise Unsupported

    async def create_context(self, handle: Handle, *, language: str, cwd: str | None = None) -> dict[str, Any]:
        """Returns {"id", "language", "cwd"}."""
        raise Unsupported

    async def restart_context(self, handle: Handle, context_id: str) -> None:
        raise Unsupported

    async def remove_context(self, handle: Handle, context_id: str) -> None:
        raise Unsupported

    async def write_file(self, handle: Handle, path: str, data: bytes | AsyncIterator[bytes]) -> None:
        """Create or replace one file, its folders too. FileRefused for what cannot be written."""
        raise Unsupported

    def read_file(self, handle: Handle, path: str) -> AsyncIterator[bytes]:
        """The file in pieces. FileRefused(missing=True) where there is none."""
        raise Unsupported

    async def list_files(self, handle: Handle, path: str, *, depth: int = 1) -> list[FileInfo]:
        raise Unsupported

    async def remove_file(self, handle: Handle, path: str) -> None:
        raise Unsupported

    async def move_file(self, handle: Handle, path: str, to: str) -> None:
        """A file or a folder; FileRefused(missing=True) where there is none."""
        raise Unsupported

    async def open_port(self, handle: Handle, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A byte stream to a port of the sandbox's data plane (49983, 49999). SandboxLost, or ConnectionRefusedError."""
        raise Unsupported

    async def samples(self, handle: Handle, *, since: datetime | None = None) -> list[Sample]:
        """What the sandbox used, oldest first; from its birth or from `since` on. SandboxLost where it is not known."""
        raise Unsupported

    async def set_timeout(self, handle: Handle, seconds: int) -> None:
        """The sandbox ends `seconds` from now."""
        raise Unsupported

    async def pause(self, handle: Handle) -> None:
        """Keep memory and files, and use no CPU, until it is resumed or killed. Idempotent: what is paused stays so."""
        raise Unsupported

    async def resume(self, handle: Handle, *, timeout_seconds: int) -> None:
        """Go on where it was paused; it ends after so long. Idempotent: what runs goes on. SandboxLost where there is none."""
        raise Unsupported

    async def kill(self, handle: Handle) -> bool:
        raise NotImplementedError

    async def kill_by_id(self, sandbox_id: str) -> bool:
        """End the sandbox that carries our id, when its handle was never learned. True once none is left."""
        for listed in await self.list():
            if listed.sandbox_id == sandbox_id:
                await self.kill(listed.handle)
        return True

    async def list(self) -> list[Listed]:
        raise NotImplementedError

    async def check(self) -> Check:
        """Whether sandboxes can be had now, and behind which walls; never raises."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of connections. The sandboxes live on."""
