"""The egress proxy: carries what sandboxes may send out, over HTTP/1.1 in absolute form and CONNECT.

Every sandbox with rules hands in a socket that listens in its own network namespace. Whose a connection is, is known by the
socket that it came in on, and by nothing that the client says. A name is resolved once, each of its addresses is looked at,
and the one that was looked at is connected to. Redirects are the client's matter: they come back here as a new request.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from ipaddress import ip_address
from typing import Any

from executions import network
from executions.network import Address, Rules

from . import http1
from .http1 import Answered
from .ledger import Ledger, Limits, Record

PIECE = 64 * 1024
ADDRESSES_TRIED = 4
RESOLVING = 4  # names at a time of one sandbox …
LOOKUPS = 64  # … and of all
PAGE = 50  # records in one answer

Resolver = Callable[[str], Awaitable[list[Address]]]


class Gate:
    """The way out of one sandbox: its rules, its listener, its connections, its ledger."""

    def __init__(self, rules: Rules, agent: str, limits: Limits, resolver: Resolver) -> None:
        self.rules, self.agent, self.limits, self.resolver = rules, agent, limits, resolver
        self.ledger = Ledger(limits)
        self.carried = 0
        self.connected = 0
        self.closing = False
        self._resolving = asyncio.Semaphore(RESOLVING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._server = await asyncio.start_server(self._accepted, sock=listener, limit=self.limits.header_bytes)

    async def close(self) -> None:
        """Nothing goes out any more; when this returns, all connections have ended and are in the ledger."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self.limits.waiting:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                await self._exchange(reader, writer)
            except Answered as answer:
                writer.write(http1.answer(answer.status, answer.sentence))
                await asyncio.wait_for(writer.drain(), self.limits.header_seconds)
                writer.write_eof()
                async with asyncio.timeout(1):  # to be read, an answer needs a client that may still send
                    while await reader.read(PIECE):
                        pass
        except (OSError, EOFError, TimeoutError):
            pass  # the client went away
        finally:
            await self._let_go(writer)

    async def _let_go(self, writer: asyncio.StreamWriter) -> None:
        """Close, once the other side has taken what was sent to it; it is given the time of an idle connection."""
        writer.close()
        try:
            if not self.closing:
                await asyncio.wait_for(writer.wait_closed(), self.limits.idle_seconds)
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, asked, fields = await self._head(reader)
        host, port, path = http1.destination(method, asked) or self._odd(asked)
        try:
            addresses = await self._admit(host, port)
            self.connected += 1  # no await since it was compared
            try:
                await self._converse(reader, writer, (method, host, port, path, fields), addresses)
            finally:
                self.connected -= 1
        except Answered as answer:
            self.ledger.note(host, port, answer.verdict, answer.sentence.removeprefix("Sandgate: "))
            raise

    async def _head(self, reader: asyncio.StreamReader) -> tuple[str, str, http1.Fields]:
        """The request line and the fields. Answered(400, 408, 431) for what is none."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self.limits.header_seconds)
        except TimeoutError:
            raise Answered(408, "the request took too long.") from None
        except asyncio.LimitOverrunError:
            raise Answered(431, f"the request's head has more than {self.limits.header_bytes} bytes.") from None
        return http1.read(head)

    def _odd(self, asked: str) -> Any:
        shown = asked[:80]
        self.ledger.note(shown, 0, "denied", "not an address that can be asked for")
        raise Answered(400, f"{shown} cannot be asked for: CONNECT host:port, or a whole http:// address.")

    async def _admit(self, host: str, port: int) -> list[Address]:
        """The addresses that may be connected to. Answered where there is none, or no room for one more."""
        try:
            target = network.target(host)
        except ValueError as problem:
            raise Answered(403, f"{host[:80]}: {problem}") from None
        if not self.rules.permit(target, port):
            raise Answered(403, self._may_not(host, port))
        addresses = await self._resolve(target) if isinstance(target, str) else [target]
        permitted = [a for a in addresses if self._leads_out(a, port)]
        if addresses and not permitted:
            shown = ", ".join(map(str, addresses[:3]))
            raise Answered(
                403, f"{self._may_not(host, port)}. It leads to {shown}, which no rule names and is not public"
            )
        if self.connected >= self.limits.connections:
            raise Answered(
                429,
                f"agent {self.agent} has {self.connected} connections open in this sandbox, which is the limit; close some.",
            )
        if self.carried >= self.limits.bytes:
            raise Answered(403, f"this sandbox has sent and received {self.limits.bytes} bytes, which is the limit.")
        if self.ledger.full:
            raise Answered(
                429, "this sandbox has made too many connections; they are allowed again after the next run."
            )
        return permitted[:ADDRESSES_TRIED]

    def _may_not(self, host: str, port: int) -> str:
        shown = f"[{host}]" if ":" in host else host
        return f"agent {self.agent} may not reach {shown}:{port}; allowed are: {self.rules}"

    def _leads_out(self, address: Address, port: int) -> bool:
        return self.rules.name_address(address, port) or (network.is_public(address) and not _is_this_machine(address))

    async def _resolve(self, name: str) -> list[Address]:
        """Its addresses, asked for once. A lookup that takes too long keeps its place among the few until it is over."""
        try:
            async with asyncio.timeout(self.limits.connect_seconds):
                await self._resolving.acquire()
                lookup = asyncio.ensure_future(self.resolver(name))
                lookup.add_done_callback(self._resolved)
                return await asyncio.shield(lookup)
        except TimeoutError:
            raise Answered(504, f"the name {name} was not resolved in time.", "failed") from None
        except OSError:
            raise Answered(502, f"the name {name} is not known.", "failed") from None

    def _resolved(self, lookup: asyncio.Future[list[Address]]) -> None:
        self._resolving.release()
        if not lookup.cancelled():
            lookup.exception()

    async def _converse(
        self, reader: Any, writer: asyncio.StreamWriter, request: Any, addresses: list[Address]
    ) -> None:
        method, host, port, path, fields = request
        head, rest = http1.rewritten(method, host, port, path, fields) if path else (b"", None)
        their_reader, their_writer, address = await self._connect(host, port, addresses)
        record = self.ledger.begin(host, port, str(address))
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self._count(record, "bytes_out", len(head))
            their_writer.write(head)
            async with asyncio.timeout(self.limits.idle_seconds) as clock:
                await self._both_ways(
                    (reader, their_writer, "bytes_out", rest), (their_reader, writer, "bytes_in", None), record, clock
                )
        except TimeoutError:
            record.reason = f"ended after {self.limits.idle_seconds:g} s without a byte"
        except OSError:
            pass  # one of the two hung up
        finally:
            await self._let_go(their_writer)
            self.ledger.end(record)

    async def _connect(
        self, host: str, port: int, addresses: list[Address]
    ) -> tuple[Any, asyncio.StreamWriter, Address]:
        loop, why = asyncio.get_running_loop(), "it has no address"
        for address in addresses:
            sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await asyncio.wait_for(loop.sock_connect(sock, (str(address), port)), self.limits.connect_seconds)
                return *await asyncio.open_connection(sock=sock), address
            except TimeoutError:
                why = f"no answer within {self.limits.connect_seconds:g} s"
            except OSError as problem:
                why = os.strerror(problem.errno or 0).lower()
            except BaseException:
                sock.close()
                raise
            sock.close()
        raise Answered(502, f"{host}:{port} could not be reached: {why}.", "failed")

    async def _both_ways(self, out: Any, back: Any, record: Record, clock: asyncio.Timeout) -> None:
        """Carry until both directions have ended, or one has broken."""
        ways = [asyncio.ensure_future(self._carry(*way, record, clock)) for way in (out, back)]  # type: ignore[call-arg]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if ways[1] not in done or out[3] is None:  # a plain answer that is complete ends the exchange
                await asyncio.gather(*ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(
        self, reader: Any, writer: Any, counter: str, left: int | None, record: Record, clock: asyncio.Timeout
    ) -> None:
        """Pass bytes on, at most `left` of them where that is said; the sender's end is passed on too."""
        loop = asyncio.get_running_loop()
        while piece := await reader.read(PIECE):
            if left is not None:
                piece, left = piece[:left], left - len(piece[:left])
            if not piece:
                continue  # beyond the request: it is not theirs to have
            if self.carried + len(piece) > self.limits.bytes:
                self.carried = self.limits.bytes
                record.reason = f"ended at the sandbox's limit of {self.limits.bytes} bytes"
                raise ConnectionAbortedError
            self._count(record, counter, len(piece))
            writer.write(piece)
            await writer.drain()
            clock.reschedule(loop.time() + self.limits.idle_seconds)
        if left is None and writer.can_write_eof():
            writer.write_eof()

    def _count(self, record: Record, counter: str, size: int) -> None:
        self.carried += size
        setattr(record, counter, getattr(record, counter) + size)


def _is_this_machine(address: Address) -> bool:
    """Whether this machine has the address: its own services are not the public internet."""
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
        return True


async def ask_the_system(name: str) -> list[Address]:
    """The addresses of a name, as this machine resolves it."""
    found = await asyncio.get_running_loop().run_in_executor(
        None, lambda: socket.getaddrinfo(name.encode(), None, type=socket.SOCK_STREAM)
    )
    return list(dict.fromkeys(ip_address(entry[4][0]) for entry in found if "%" not in str(entry[4][0])))


class Proxy:
    """All gates of a node. It is asked over a socket: lines of JSON, a listener along with the one that opens a gate."""

    def __init__(self, limits: Limits, resolver: Resolver = ask_the_system) -> None:
        self.limits, self.resolver = limits, resolver
        self.gates: dict[str, Gate] = {}

    async def open(self, request: dict[str, Any], listener: socket.socket) -> dict[str, Any]:
        gate = Gate(Rules(request["allow"]), request["agent"], self.limits, self.resolver)
        await gate.listen(listener)
        self.gates[request["id"]] = gate
        return {}

    async def take(self, request: dict[str, Any]) -> dict[str, Any]:
        """A page of the ledger; with `final` the gate is closed first."""
        gate = self.gates.get(request["id"])
        if gate is None:
            return {"records": [], "more": False}
        if request["final"]:
            await gate.close()
        records, more = gate.ledger.take(request["after"], PAGE)
        return {"records": [asdict(record) for record in records], "more": more}

    async def close(self, request: dict[str, Any]) -> dict[str, Any]:
        """Close the gate; its ledger stays until it is forgotten."""
        if gate := self.gates.get(request["id"]):
            await gate.close()
        return {}

    async def forget(self, request: dict[str, Any]) -> dict[str, Any]:
        self.gates.pop(request["id"], None)
        return {}

    async def serve(self, control: socket.socket) -> None:
        """Answer one request after the other until the node hangs up."""
        control.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            readable = loop.create_future()
            loop.add_reader(control, lambda: readable.done() or readable.set_result(None))  # noqa: B023
            try:
                await readable
            finally:
                loop.remove_reader(control)
            message, descriptors, _, _ = socket.recv_fds(control, 1 << 18, 1)
            if not message:
                return
            control.send(json.dumps(await self._answer(message, descriptors)).encode())

    async def _answer(self, message: bytes, descriptors: list[int]) -> dict[str, Any]:
        request = json.loads(message)
        try:
            if request["op"] == "open":
                return await self.open(request, socket.socket(fileno=descriptors[0]))
            return await {"take": self.take, "close": self.close, "forget": self.forget}[request["op"]](request)
        except (OSError, ValueError, IndexError) as problem:
            return {"error": str(problem)}


def main(control: socket.socket) -> None:
    """The proxy's process; its rights have been taken from it already."""

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LOOKUPS, "lookup"))
        await Proxy(Limits()).serve(control)

    asyncio.run(run())
