"""Sandboxes on E2B: its cloud, a self-hosted E2B, or the gateway of another Sandgate. The only module that knows E2B's SDK.

The SDK is loaded at the first use. Every call carries its own key and addresses, so that several aliases live side by
side and nothing is read from the environment. The SDK's connections belong to no event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

from executions.backends import wire
from executions.backends.base import Backend, Capabilities, Check, Event, FileInfo, Handle, Listed, SandboxSpec
from executions.errors import (
    BackendError,
    BackendUnavailable,
    ContextUnknown,
    FileRefused,
    RunTimedOut,
    SandboxLost,
    SandboxMissing,
    SandgateError,
    Unsupported,
)
from executions.network import PORTS, Rules
from executions.states import LANGUAGES

CLOUD = "e2b.app"
TEMPLATE = "code-interpreter-v1"  # where ours is "default" and names no other
OURS = {"managed_by": "sandgate"}  # metadata of every sandbox that is made here
OUR_ID = "sandgate_sandbox"
EVERYTHING = "0.0.0.0/0"
INTERPRETER = 49999
CREATE_SECONDS = 15
ASK_SECONDS = 10  # for the rest of the API; who asks, asks again
CHECK_SECONDS = 5
GRACE_SECONDS = 5  # beyond a deadline that the other side enforces
LINE_LIMIT_BYTES = 96 << 20
SANDBOXES_HELD = 256
TYPES = {"dir": "directory", "file": "file", "symlink": "symlink"}


@cache
def _sdk() -> Any:
    os.environ.setdefault(
        "E2B_MAX_CONNECTIONS", "2000"
    )  # to one address; the SDK's own 200 would queue runs behind runs
    os.environ.setdefault("E2B_CONNECTION_RETRIES", "1")  # its 3 take two seconds before the next backend is tried
    import e2b_code_interpreter

    return e2b_code_interpreter


async def _loaded() -> Any:
    """E2B's SDK. Loading takes about a second, for which the event loop is not held."""
    return _sdk() if "e2b_code_interpreter" in sys.modules else await asyncio.to_thread(_sdk)


def _network(allow: Sequence[str]) -> dict[str, Any]:
    """The arguments of create: nothing, all of the internet, or these names alone."""
    if not allow or "*" in allow:
        return {"allow_internet_access": bool(allow)}
    return {"network": {"allow_out": list(allow), "deny_out": [EVERYTHING]}}


class E2BBackend(Backend):
    """OPTIONS: API_KEY; DOMAIN, API_URL, SANDBOX_URL (empty: E2B's cloud); LANGUAGES and ISOLATION where they differ from
    E2B's own. The sizes of a sandbox are those of its template; `limits` cannot change them."""

    capabilities = Capabilities(
        executes=True,
        languages=frozenset(LANGUAGES),
        commands=True,
        files=True,
        contexts=True,
        packages=True,
        internet=True,
        network_rules=True,
    )
    isolation = "microvm"
    slow_seconds = 1.5  # of 100 creates 99 have answered after half of it

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        domain = options.get("DOMAIN") or CLOUD
        self.isolation = options.get("ISOLATION") or self.isolation
        if languages := options.get("LANGUAGES"):
            self.capabilities = replace(self.capabilities, languages=frozenset(languages))  # type: ignore[misc]
        self._key = options.get("API_KEY") or ""
        self._account: dict[str, Any] = {  # the SDK asks the environment for whatever is empty: nothing is
            "api_key": self._key,
            "domain": domain,
            "api_url": options.get("API_URL") or f"https://api.{domain}",
            "debug": False,
        }
        self._once = {**self._account, "retries": 0, "request_timeout": ASK_SECONDS}
        self._sandboxes: dict[str, Any] = {}  # the SDK's objects, 2 ms each to make

    def template_name(self, name: str, mapped: str) -> str:
        return mapped or (TEMPLATE if name == "default" else name)

    def network_refusal(self, allow: Sequence[str]) -> str:
        """E2B looks at the names in HTTP (port 80) and TLS (port 443); it cannot hold an address to a port."""
        beyond = [str(rule) for rule in Rules(allow).rules if rule.network is not None or rule.ports != PORTS]
        return f"has network rules for names on ports 80 and 443 only, not for {beyond[0]}" if beyond else ""

    async def _sandbox(self, handle: Handle) -> Any:
        """The SDK's object for a handle, made without asking the API."""
        from packaging.version import Version

        sdk = await _loaded()
        if held := self._sandboxes.get(handle["e2b_id"]):
            return held
        headers = {"E2b-Sandbox-Id": handle["e2b_id"], "E2b-Sandbox-Port": "49983"}
        if handle["token"]:
            headers["X-Access-Token"] = handle["token"]
        config = sdk.ConnectionConfig(**self._account, extra_sandbox_headers=headers)
        config._sandbox_url = self.options.get("SANDBOX_URL") or None  # its argument would fall back to the environment
        if len(self._sandboxes) >= SANDBOXES_HELD:
            del self._sandboxes[next(iter(self._sandboxes))]
        made = self._sandboxes[handle["e2b_id"]] = sdk.AsyncSandbox(
            sandbox_id=handle["e2b_id"],
            sandbox_domain=handle["domain"],
            envd_version=Version(handle["envd_version"]),
            envd_access_token=handle["token"],
            traffic_access_token=handle["traffic_token"],
            connection_config=config,
        )
        return made

    # errors

    @contextmanager
    def _translated(self, otherwise: type[BackendError] = BackendError) -> Iterator[None]:
        """Turn what the SDK raises, which has several roots, into this product's words."""
        try:
            yield
        except SandgateError:
            raise
        except Exception as e:
            raise self._ours(e, otherwise) from None  # the original may quote what was sent

    def _ours(self, e: Exception, otherwise: type[BackendError]) -> BackendError:
        sdk, said = _sdk(), self._said(e)
        if otherwise is BackendUnavailable:
            return BackendUnavailable(said)
        match e:
            case sdk.SandboxNotRunningException() | sdk.SandboxNotFoundException():
                return SandboxLost(said)
            case sdk.FileNotFoundException():
                return FileRefused(said, missing=True)
            case sdk.InvalidArgumentException() | sdk.NotEnoughSpaceException():
                return FileRefused(said)
            case sdk.NotFoundException():
                return ContextUnknown(said)
            case sdk.TimeoutException() if "was not found" in said or "was killed" in said:
                return SandboxLost(said)
            case sdk.SandboxException() if str(e).startswith("400 "):
                return Unsupported(said)
        return otherwise(said)

    def _said(self, e: Exception) -> str:
        text = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        return text.replace(self._key, "…") if self._key else text

    # life

    async def create(self, spec: SandboxSpec) -> Handle:
        """Our id is the idempotency key. What an answer that was lost left behind is found by its metadata (`reap`)."""
        if not self._key:
            raise BackendUnavailable(f"{self.alias} has no API_KEY.", remedy="Set E2B_API_KEY.")
        with self._translated(BackendUnavailable):
            sandbox = await (await _loaded()).AsyncSandbox.create(
                template=spec.template,
                timeout=spec.timeout_seconds,
                metadata={**spec.metadata, **OURS, OUR_ID: spec.sandbox_id},
                envs=spec.env,
                **_network(spec.network_allow),
                idempotency_key=spec.sandbox_id,
                **{**self._once, "request_timeout": CREATE_SECONDS},  # the next backend of the route is the retry
            )
            return {
                "sandbox_id": spec.sandbox_id,
                "e2b_id": sandbox.sandbox_id,
                "domain": sandbox.sandbox_domain,
                "envd_version": str(sandbox._envd_version),
                "token": sandbox._envd_access_token or "",
                "traffic_token": sandbox.traffic_access_token or None,
            }

    async def connect(self, handle: Handle) -> None:
        sandbox = await self._sandbox(handle)
        with self._translated():
            if not await sandbox.is_running():
                raise SandboxLost

    async def set_timeout(self, handle: Handle, seconds: int) -> None:
        with self._translated():
            await (await _loaded()).AsyncSandbox.set_timeout(handle["e2b_id"], seconds, **self._once)

    async def kill(self, handle: Handle) -> bool:
        with self._translated():
            await (await _loaded()).AsyncSandbox.kill(handle["e2b_id"], **self._once)  # False: it was gone before
        return True

    async def kill_by_id(self, sandbox_id: str) -> bool:
        for listed in await self._listed({OUR_ID: sandbox_id}):
            await self.kill(listed.handle)
        return True

    async def _listed(self, metadata: dict[str, str]) -> list[Listed]:
        sdk = await _loaded()
        found: list[Listed] = []
        with self._translated():
            pages = sdk.AsyncSandbox.list(query=sdk.SandboxQuery(metadata=metadata), limit=100, **self._once)
            while pages.has_next:
                for info in await pages.next_items():
                    ours = info.metadata.get(OUR_ID, "")
                    handle = {"sandbox_id": ours, "e2b_id": info.sandbox_id}
                    found.append(Listed(ours, handle, info.started_at.isoformat()))
        return found

    async def check(self) -> Check:
        sdk = await _loaded()
        try:
            with self._translated(BackendUnavailable):
                pages = sdk.AsyncSandbox.list(limit=1, **{**self._once, "request_timeout": CHECK_SECONDS})
                await pages.next_items()
        except BackendUnavailable as e:
            return Check(ok=False, detail=e.detail, isolation=self.isolation)
        return Check(ok=True, detail=str(self._account["api_url"]), isolation=self.isolation)

    # code

    async def run_code(
        self,
        handle: Handle,
        code: str,
        *,
        language: str = "python",
        context_id: str | None = None,
        env: dict[str, str] | None = None,
        timeout_seconds: float = 60,
        cpu_seconds: float = 0,  # E2B keeps no such limit: routes leave it out where one is asked for
    ) -> AsyncIterator[Event]:
        """Reads E2B's own stream, through the SDK's connection: in order, nothing held back. Closing it interrupts the code."""
        import httpx

        sandbox, ends = await self._sandbox(handle), time.monotonic() + timeout_seconds
        headers = {"E2b-Sandbox-Id": handle["e2b_id"], "E2b-Sandbox-Port": str(INTERPRETER)}
        if handle["token"]:
            headers["X-Access-Token"] = handle["token"]
        if handle["traffic_token"]:
            headers["E2B-Traffic-Access-Token"] = handle["traffic_token"]
        client = sandbox._client
        request = client.build_request(
            "POST",
            f"{sandbox._jupyter_url}/execute",
            headers=headers,
            json={
                "code": code,
                "context_id": context_id,
                "language": None if context_id else language,
                "env_vars": env,
            },
            timeout=httpx.Timeout(timeout_seconds + GRACE_SECONDS),  # the SDK's transport takes it for the whole
        )
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                response = await client.send(request, stream=True)
                if not response.is_success:
                    raise _refusal(response.status_code, (await response.aread()).decode(errors="replace"))
            try:
                async with aclosing(_lines(response, ends)) as lines:
                    async for line in lines:
                        if event := wire.said(line):
                            yield Event(*event)
            finally:
                await response.aclose()
        except (TimeoutError, httpx.TimeoutException):
            raise RunTimedOut(f"The code ran longer than {timeout_seconds:g} s and was stopped.") from None
        except httpx.ConnectError as e:
            raise BackendUnavailable(self._said(e)) from None
        except httpx.HTTPError as e:
            await self._broke(sandbox, e)

    async def _broke(self, sandbox: Any, e: Exception) -> None:
        """The connection broke in mid-run: SandboxLost where the sandbox is gone, otherwise BackendError."""
        with self._translated():
            alive = await sandbox.is_running(request_timeout=CHECK_SECONDS)
        if not alive:
            raise SandboxLost
        raise BackendError(f"The connection to the sandbox broke: {self._said(e)}")

    async def run_command(
        self,
        handle: Handle,
        command: str,
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_seconds: float = 60,
        cpu_seconds: float = 0,  # E2B keeps no such limit: routes leave it out where one is asked for
    ) -> AsyncIterator[Event]:
        sdk, sandbox, ends = (
            await _loaded(),
            await self._sandbox(handle),
            time.monotonic() + timeout_seconds + GRACE_SECONDS,
        )
        said: asyncio.Queue[Event | None] = asyncio.Queue(64)

        async def hear(kind: str, text: str) -> None:
            await said.put(Event(kind, {"text": text}))

        async def wait() -> int:
            try:
                return (await running.wait()).exit_code
            except sdk.CommandExitException as e:
                return e.exit_code
            finally:
                await said.put(None)

        with self._translated():
            running = await sandbox.commands.run(
                command,
                background=True,
                cwd=cwd,
                envs=env,
                timeout=timeout_seconds,
                on_stdout=partial(hear, "stdout"),
                on_stderr=partial(hear, "stderr"),
                retain_output=False,
            )
        waiting = asyncio.create_task(wait())
        try:
            while True:
                async with asyncio.timeout(ends - time.monotonic()):
                    event = await said.get()
                if event is None:
                    break
                yield event
            with self._translated():
                exit_code = await waiting
        except TimeoutError:
            raise RunTimedOut(f"The command ran longer than {timeout_seconds:g} s and was stopped.") from None
        except BackendError as e:
            if type(e) is BackendError and time.monotonic() >= ends - GRACE_SECONDS - 0.5:  # it enforced the deadline
                raise RunTimedOut(f"The command ran longer than {timeout_seconds:g} s and was stopped.") from None
            raise
        finally:
            if not waiting.done():
                await self._abandon(running, waiting)
        yield Event("exit", {"exit_code": exit_code})

    async def _abandon(self, running: Any, waiting: asyncio.Task) -> None:
        """Kill a command whose end nobody waits for any more."""
        with suppress(Exception):
            async with asyncio.timeout(GRACE_SECONDS):
                await running.kill()
        waiting.cancel()
        await running.disconnect()

    # contexts

    async def list_contexts(self, handle: Handle) -> list[dict[str, Any]]:
        sandbox = await self._sandbox(handle)
        with self._translated():
            return [_context(c) for c in await sandbox.list_code_contexts()]

    async def create_context(self, handle: Handle, *, language: str, cwd: str | None = None) -> dict[str, Any]:
        sandbox = await self._sandbox(handle)
        with self._translated():
            return _context(await sandbox.create_code_context(cwd=cwd, language=language))

    async def restart_context(self, handle: Handle, context_id: str) -> None:
        sandbox = await self._sandbox(handle)
        with self._translated():
            await sandbox.restart_code_context(context_id)

    async def remove_context(self, handle: Handle, context_id: str) -> None:
        sandbox = await self._sandbox(handle)
        with self._translated():
            await sandbox.remove_code_context(context_id)

    # files

    async def write_file(self, handle: Handle, path: str, data: bytes | AsyncIterator[bytes]) -> None:
        sandbox = await self._sandbox(handle)
        with self._translated():
            await sandbox.files.write(path, data)

    async def read_file(self, handle: Handle, path: str) -> AsyncIterator[bytes]:
        sandbox = await self._sandbox(handle)
        with self._translated():
            reader = await sandbox.files.read(path, format="stream")
            async with reader:
                async for piece in reader:
                    yield piece

    async def list_files(self, handle: Handle, path: str, *, depth: int = 1) -> list[FileInfo]:
        sandbox = await self._sandbox(handle)
        with self._translated():
            entries = await sandbox.files.list(path, depth=depth)
        return [
            FileInfo(
                name=entry.name,
                path=entry.path,
                type="symlink" if entry.symlink_target else TYPES[entry.type.value],
                size_bytes=entry.size,
                mode=entry.mode,
                modified_at=entry.modified_time.isoformat(),
            )
            for entry in entries
        ]

    async def remove_file(self, handle: Handle, path: str) -> None:
        sandbox = await self._sandbox(handle)
        with self._translated():
            await sandbox.files.remove(path)

    async def list(self) -> list[Listed]:  # the last one: below it, the name is no longer the type
        return await self._listed(OURS)


def _context(context: Any) -> dict[str, Any]:
    return {"id": context.id, "language": context.language, "cwd": context.cwd}


def _refusal(status: int, text: str) -> BackendError:
    """What an answer other than 200 to /execute means."""
    match status:
        case 400 | 422:
            return Unsupported(text[:300])
        case 404:
            return ContextUnknown(text[:300])
        case 502 if "was not found" in text:
            return SandboxMissing()
    return BackendError(f"E2B answered {status}: {text[:300]}")


async def _lines(response: Any, ends: float) -> AsyncGenerator[Any, None]:
    """The JSON lines of a stream. TimeoutError at `ends`, SandboxLost for what is not a line of JSON."""
    held = bytearray()
    pieces = response.aiter_bytes()
    while True:
        async with asyncio.timeout(ends - time.monotonic()):
            piece = await anext(pieces, b"")
        if not piece:
            return
        held += piece
        if len(held) > LINE_LIMIT_BYTES:
            raise SandboxLost("The sandbox sent an endless line.")
        if b"\n" not in piece:
            continue
        *whole, rest = held.split(b"\n")
        held = bytearray(rest)
        for line in whole:
            try:
                yield json.loads(line)
            except ValueError:
                raise SandboxLost("The sandbox sent what is not JSON.") from None
