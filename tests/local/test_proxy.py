"""The egress proxy by itself, against servers on this machine's loopback; names are resolved by the tests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any

import pytest

from executions.backends.local.node.ledger import Ledger, Limits
from executions.backends.local.node.proxy import Gate
from executions.network import Rules

LOOPBACK = "127.0.0.1"


class Way:
    """A gate with its port, and a client's view of it."""

    def __init__(self, gate: Gate, port: int) -> None:
        self.gate, self.port = gate, port

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(LOOPBACK, self.port)

    async def ask(self, request: str | bytes) -> bytes:
        """The whole answer to one request."""
        reader, writer = await self.open()
        writer.write(request if isinstance(request, bytes) else request.encode())
        try:
            async with asyncio.timeout(10):
                return await reader.read()
        finally:
            writer.close()

    async def get(self, url: str) -> bytes:
        return await self.ask(f"GET {url} HTTP/1.1\r\nHost: whatever.the.client.says\r\n\r\n")

    async def tunnel(self, authority: str) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.open()
        writer.write(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
        async with asyncio.timeout(10):
            return await reader.readuntil(b"\r\n\r\n"), reader, writer

    def told(self) -> list[tuple[str, int, str]]:
        return [(r.host, r.port, r.verdict) for r in self.gate.ledger.ended]


@asynccontextmanager
async def way_out(*rules: str, names: Any = None, agent: str = "etl", **limits: Any) -> AsyncIterator[Way]:
    """A gate whose names are `names`: host to addresses, or a function of the host."""

    async def resolver(name: str) -> list[Any]:
        found = names(name) if callable(names) else (names or {}).get(name)
        if asyncio.iscoroutine(found):
            found = await found
        if found is None:
            raise socket.gaierror("not known")
        return [ip_address(address) for address in found]

    gate = Gate(Rules(rules), agent, Limits(**limits), resolver)
    listener = socket.create_server((LOOPBACK, 0), backlog=128)
    port = listener.getsockname()[1]
    await gate.listen(listener)
    try:
        yield Way(gate, port)
    finally:
        await gate.close()


@asynccontextmanager
async def server(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, LOOPBACK, 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.write_eof()


async def show_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the head that it got, and the body where its length is said."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = b""
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            body = await reader.readexactly(int(line.split(b":")[1]))
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + head + body)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


def reason(answer: bytes) -> str:
    return answer.split(b"\r\n")[0].decode()


# what is carried


async def test_an_allowed_host_answers_a_plain_request():
    async with server(show_request) as port:
        async with way_out(f"web.example:{port}", f"{LOOPBACK}:{port}", names={"web.example": [LOOPBACK]}) as way:
            answer = await way.get(f"http://web.example:{port}/a?b=c")

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"GET /a?b=c HTTP/1.1\r\n" in answer
    assert f"Host: web.example:{port}\r\n".encode() in answer
    assert b"whatever.the.client.says" not in answer
    (record,) = way.gate.ledger.ended
    assert (record.host, record.port, record.address, record.verdict) == ("web.example", port, LOOPBACK, "allowed")


async def test_an_allowed_host_is_reached_through_a_tunnel_and_bytes_are_counted():
    async with server(echo) as port:
        async with way_out(f"web.example:{port}", f"{LOOPBACK}:{port}", names={"web.example": [LOOPBACK]}) as way:
            head, reader, writer = await way.tunnel(f"web.example:{port}")
            sent = bytes(range(256)) * 4096
            writer.write(sent)
            writer.write_eof()
            back = await reader.read()
            writer.close()

    assert reason(head) == "HTTP/1.1 200 Connection established"
    assert back == sent
    (record,) = way.gate.ledger.ended
    assert (record.bytes_out, record.bytes_in, record.times) == (len(sent), len(sent), 1)


async def test_bytes_of_a_plain_request_are_those_on_the_wire():
    heard = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += len(await reader.readuntil(b"\r\n\r\n")) + len(await reader.readexactly(5))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with server(count) as port, way_out(f"{LOOPBACK}:{port}") as way:
        await way.ask(f"POST http://{LOOPBACK}:{port}/ HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello")

    (record,) = way.gate.ledger.ended
    assert (record.bytes_out, record.bytes_in) == (heard, len(b"HTTP/1.1 204 No Content\r\n\r\n"))


async def test_nothing_goes_out_behind_the_one_request():
    got = []

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readuntil(b"\r\n\r\n"))
        got.append(await reader.readexactly(2))
        more = asyncio.ensure_future(reader.read(100))
        await asyncio.wait({more}, timeout=0.2)
        got.append(more.result() if more.done() else b"")
        more.cancel()
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    smuggled = "GET http://other.example/ HTTP/1.1\r\nHost: other.example\r\n\r\n"
    async with server(keep) as port, way_out(f"{LOOPBACK}:{port}") as way:
        await way.ask(f"POST http://{LOOPBACK}:{port}/ HTTP/1.1\r\nContent-Length: 2\r\n\r\nok{smuggled}")

    assert got[1:] == [b"ok", b""]


async def test_what_a_slow_reader_has_not_taken_yet_still_arrives():
    body = b"x" * 3_000_000

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        await writer.drain()

    async with server(send) as port, way_out(f"{LOOPBACK}:{port}") as way:
        reader, writer = await way.open()
        writer.write(f"GET http://{LOOPBACK}:{port}/ HTTP/1.1\r\n\r\n".encode())
        answer = b""
        while piece := await reader.read(200_000):
            answer += piece
            await asyncio.sleep(0)
        writer.close()

    assert answer.endswith(b"\r\n\r\n" + body)


async def test_a_redirect_is_not_followed():
    asked = []

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n")

    async with server(redirect) as port, way_out(f"{LOOPBACK}:{port}") as way:
        answer = await way.get(f"http://{LOOPBACK}:{port}/")

    assert reason(answer) == "HTTP/1.1 302 Found"
    assert len(asked) == 1
    assert way.told() == [(LOOPBACK, port, "allowed")]


# what is refused


async def test_no_rules_permit_nothing():
    async with way_out() as way:
        answer = await way.get("http://example.org/")

    assert reason(answer).startswith("HTTP/1.1 403 Sandgate: agent etl may not reach example.org:80")


@pytest.mark.parametrize("asked", ["example.com:443", "example.org:22", "www.example.org:443", "10.0.0.1:443"])
async def test_a_host_or_port_that_no_rule_names_is_denied_and_not_even_resolved(asked):
    resolved = []
    async with way_out("example.org", "*.pypi.example", names=lambda name: resolved.append(name)) as way:
        head, reader, writer = await way.tunnel(asked)
        body = await reader.read()
        writer.close()

    sentence = f"Sandgate: agent etl may not reach {asked}; allowed are: example.org, *.pypi.example"
    assert reason(head) == f"HTTP/1.1 403 {sentence}"
    assert body.decode() == sentence + "\n"
    assert resolved == []
    host, port = asked.split(":")
    assert way.told() == [(host, int(port), "denied")]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "::", "fe80::1", "fd00::1",
     "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["*", "inside.example", "*.example"])
async def test_a_name_that_leads_inside_is_denied(address, rule):
    async with way_out(rule, names={"inside.example": [address]}) as way:
        answer = await way.get("http://inside.example/")

    assert reason(answer).startswith("HTTP/1.1 403 Sandgate: agent etl may not reach inside.example:80")
    assert str(ip_address(address)) in reason(answer)
    assert way.told() == [("inside.example", 80, "denied")]


async def test_of_several_addresses_only_those_that_may_be_reached_are():
    async with server(show_request) as port:
        rules = (f"web.example:{port}", f"{LOOPBACK}:{port}")
        async with way_out(*rules, names={"web.example": ["127.0.0.2", LOOPBACK]}) as way:
            answer = await way.get(f"http://web.example:{port}/")

    assert answer.startswith(b"HTTP/1.1 200")
    assert way.gate.ledger.ended[0].address == LOOPBACK


async def test_a_name_is_resolved_once_and_the_address_that_was_looked_at_is_connected_to():
    answers = iter([[LOOPBACK], ["169.254.169.254"]])
    async with server(show_request) as port:
        rules = (f"web.example:{port}", f"{LOOPBACK}:{port}")
        async with way_out(*rules, names=lambda name: next(answers)) as way:
            first = await way.get(f"http://web.example:{port}/")
            second = await way.get(f"http://web.example:{port}/")

    assert first.startswith(b"HTTP/1.1 200")
    assert "169.254.169.254" in reason(second)
    assert [record.address for record in way.gate.ledger.ended] == [LOOPBACK, ""]


async def test_this_machine_is_not_the_public_internet(monkeypatch):
    from executions import network

    monkeypatch.setattr(network, "is_public", lambda address: True)  # as a machine's own public address is
    async with server(show_request) as port, way_out(f"*:{port}", names={"me.example": [LOOPBACK]}) as way:
        answer = await way.get(f"http://me.example:{port}/")

    assert reason(answer).startswith("HTTP/1.1 403")


@pytest.mark.parametrize(
    "request_",
    [
        "GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
        "GET https://example.org/ HTTP/1.1\r\n\r\n",
        "GET http://user:pw@example.org/ HTTP/1.1\r\n\r\n",
        "GET http://example.org:99999/ HTTP/1.1\r\n\r\n",
        "GET http://example.org%2eevil.org/ HTTP/1.1\r\n\r\n",
        "GET http://exam\\ple.org/ HTTP/1.1\r\n\r\n",
        "GET http://example.org/#x HTTP/1.1\r\n\r\n",
        "GET http:///x HTTP/1.1\r\n\r\n",
        "CONNECT example.org HTTP/1.1\r\n\r\n",
        "CONNECT example.org:0 HTTP/1.1\r\n\r\n",
        "CONNECT user@example.org:443 HTTP/1.1\r\n\r\n",
        "CONNECT http://example.org:443 HTTP/1.1\r\n\r\n",
        "CONNECT [fe80::1%eth0]:443 HTTP/1.1\r\n\r\n",
        "CONNECT example.org\x00.evil.org:443 HTTP/1.1\r\n\r\n",
        "CONNECT ex\xe4mple.org:443 HTTP/1.1\r\n\r\n",
        "GET  http://example.org/ HTTP/1.1\r\n\r\n",
        "GET http://example.org/ HTTP/2\r\n\r\n",
        "GET http://example.org/ HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
        "GET http://example.org/ HTTP/1.1\r\nA: b\nEvil: c\r\n\r\n",
        "GET http://example.org/ HTTP/1.1\r\nA : b\r\n\r\n",
        "POST http://example.org/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "POST http://example.org/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST http://example.org/ HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
        "\x16\x03\x01\x02\x00\r\n\r\n",
    ],
)
async def test_an_odd_request_is_refused(request_):
    async with way_out("*", names={"example.org": ["93.184.215.14"]}) as way:
        answer = await way.ask(request_.encode("latin-1"))

    assert reason(answer).startswith("HTTP/1.1 400 Sandgate: ")


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f.0.0.1", "0177.0.0.1", "a..b", "-a.org", "a_.org"])
async def test_an_odd_host_is_refused(host):
    async with way_out("*", names=lambda name: [LOOPBACK]) as way:
        answer = await way.get(f"http://{host}/")

    assert reason(answer).startswith("HTTP/1.1 403 Sandgate: ")
    assert way.told() == [(host, 80, "denied")]


async def test_a_host_that_does_not_answer_failed_and_was_not_denied():
    with socket.create_server((LOOPBACK, 0)) as unused:
        port = unused.getsockname()[1]
    async with way_out(f"{LOOPBACK}:{port}", "nowhere.example") as way:
        refused = await way.get(f"http://{LOOPBACK}:{port}/")
        unknown = await way.get("http://nowhere.example/")

    assert reason(refused) == f"HTTP/1.1 502 Sandgate: {LOOPBACK}:{port} could not be reached: connection refused."
    assert reason(unknown) == "HTTP/1.1 502 Sandgate: the name nowhere.example is not known."
    assert [record.verdict for record in way.gate.ledger.ended] == ["failed", "failed"]


# limits


async def test_a_hundred_connections_at_once_meet_the_limit_with_a_sentence():
    async with server(silent) as port, way_out(f"{LOOPBACK}:{port}") as way:
        opened = await asyncio.gather(*(way.tunnel(f"{LOOPBACK}:{port}") for _ in range(100)))
        said = [reason(head) for head, _, _ in opened]
        for _, _, writer in opened:
            writer.close()

    assert said.count("HTTP/1.1 200 Connection established") == 64
    assert (
        said.count(
            "HTTP/1.1 429 Sandgate: agent etl has 64 connections open in this sandbox, which is the limit; close some."
        )
        == 36
    )
    denied = [record for record in way.gate.ledger.ended if record.verdict == "denied"]
    assert [record.times for record in denied] == [36]


async def test_a_closed_connection_makes_room_for_another():
    async with server(silent) as port, way_out(f"{LOOPBACK}:{port}", connections=1) as way:
        _, reader, writer = await way.tunnel(f"{LOOPBACK}:{port}")
        refused, _, other = await way.tunnel(f"{LOOPBACK}:{port}")
        writer.write_eof()
        await reader.read()
        while way.gate.connected:
            await asyncio.sleep(0.001)
        again, _, third = await way.tunnel(f"{LOOPBACK}:{port}")
        for each in (writer, other, third):
            each.close()

    assert (reason(refused)[:12], reason(again)[:12]) == ("HTTP/1.1 429", "HTTP/1.1 200")


async def test_bytes_end_at_the_limit_and_nothing_more_is_opened():
    async with server(echo) as port, way_out(f"{LOOPBACK}:{port}", bytes=100_000) as way:
        _, reader, writer = await way.tunnel(f"{LOOPBACK}:{port}")
        writer.write(b"x" * 200_000)
        back = b""
        with suppress(ConnectionResetError):
            while piece := await reader.read(65536):
                back += piece
        writer.close()
        after, _, other = await way.tunnel(f"{LOOPBACK}:{port}")
        other.close()

    record = way.gate.ledger.ended[0]
    assert record.bytes_out + record.bytes_in <= 100_000
    assert len(back) <= 100_000
    assert "limit" in record.reason
    assert reason(after).startswith("HTTP/1.1 403 Sandgate: this sandbox has sent and received 100000 bytes")


async def test_an_idle_connection_ends():
    async with server(silent) as port, way_out(f"{LOOPBACK}:{port}", idle_seconds=0.2) as way:
        _, reader, writer = await way.tunnel(f"{LOOPBACK}:{port}")
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()

    assert way.gate.ledger.ended[0].reason == "ended after 0.2 s without a byte"


async def test_a_peer_that_is_slow_but_not_idle_is_waited_for():
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(10):
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.1)

    async with server(trickle) as port, way_out(f"{LOOPBACK}:{port}", idle_seconds=0.5) as way:
        _, reader, writer = await way.tunnel(f"{LOOPBACK}:{port}")
        assert await reader.readexactly(10) == b"." * 10
        writer.close()


async def test_a_head_that_trickles_or_swells_is_cut_off():
    async with way_out("*", header_seconds=0.2, header_bytes=1024) as way:
        slow = await way.ask("GET http://exa")
        large = await way.ask("GET http://example.org/ HTTP/1.1\r\nA: " + "a" * 5000)

    assert reason(slow).startswith("HTTP/1.1 408")
    assert reason(large).startswith("HTTP/1.1 431")


async def test_a_slow_resolver_is_given_up_and_does_not_take_more_than_its_places():
    asked = 0
    never = asyncio.Event()

    async def wait() -> list[str]:
        nonlocal asked
        asked += 1
        await never.wait()
        return []

    async with way_out("*.example", names=lambda name: wait(), connect_seconds=0.3) as way:
        answers = await asyncio.gather(*(way.get(f"http://{n}.example/") for n in range(10)))
        never.set()

    assert {reason(answer)[:12] for answer in answers} == {"HTTP/1.1 504"}
    assert asked == 4


async def test_closing_the_gate_ends_what_is_open_and_keeps_the_record():
    ended = asyncio.Event()

    async def until_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            ended.set()

    async with server(until_the_end) as port, way_out(f"{LOOPBACK}:{port}") as way:
        _, _, writer = await way.tunnel(f"{LOOPBACK}:{port}")
        await way.gate.close()
        async with asyncio.timeout(5):
            await ended.wait()
        with pytest.raises(ConnectionRefusedError):
            await way.open()
        writer.close()

    assert way.told() == [(LOOPBACK, port, "allowed")]


# the ledger


async def test_two_gates_do_not_mix():
    async with server(show_request) as port:
        async with way_out(f"{LOOPBACK}:{port}", agent="one") as one, way_out("example.org", agent="two") as two:
            await one.get(f"http://{LOOPBACK}:{port}/")
            denied = await two.get(f"http://{LOOPBACK}:{port}/")

    assert one.told() == [(LOOPBACK, port, "allowed")]
    assert two.told() == [(LOOPBACK, port, "denied")]
    assert "agent two may not reach" in reason(denied)


def test_refusals_are_counted_and_cannot_flood_the_ledger():
    ledger = Ledger(Limits(refusals=3))
    for turn in range(10):
        ledger.note(f"{turn}.example", 80, "denied", "no")
        ledger.note("0.example", 80, "denied", "no")

    assert [(record.host, record.times) for record in ledger.ended] == [
        ("0.example", 11),
        ("1.example", 1),
        ("2.example", 1),
        ("", 7),
    ]


def test_what_was_told_is_told_once_and_does_not_change():
    ledger = Ledger(Limits())
    ledger.note("a.example", 80, "denied", "no")
    first, more = ledger.take(0, 10)
    ledger.note("a.example", 80, "denied", "no")
    second, _ = ledger.take(first[-1].number, 10)

    assert not more
    assert [(record.number, record.times) for record in first + second] == [(1, 1), (2, 1)]


async def test_a_full_ledger_opens_no_more_connections():
    async with server(show_request) as port, way_out(f"{LOOPBACK}:{port}", records=1) as way:
        await way.get(f"http://{LOOPBACK}:{port}/")
        refused = await way.get(f"http://{LOOPBACK}:{port}/")
        way.gate.ledger.take(2, 10)
        again = await way.get(f"http://{LOOPBACK}:{port}/")

    assert [reason(answer)[:12] for answer in (refused, again)] == ["HTTP/1.1 429", "HTTP/1.1 200"]
