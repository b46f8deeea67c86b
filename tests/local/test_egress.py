"""The way out of real sandboxes, to servers on this machine's loopback that rules name as addresses. Nothing leaves it."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from executions.backends.base import Handle, SandboxSpec
from tests.local.attack import ended, run, value
from tests.node import RunningNode, running_node

OUTSIDE = "127.0.0.2"  # this machine's loopback, and no address that programs are told to reach directly


@pytest.fixture
def backend(node: RunningNode):
    return node.backend


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a server that answers every request with what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{self.command} {self.path} of {self.headers['Host']}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((OUTSIDE, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@asynccontextmanager
async def sandbox(backend, *allow: str, agent: str = "etl") -> AsyncIterator[Handle]:
    name = "e" + secrets.token_hex(8)
    handle = await backend.create(
        SandboxSpec(name, "default", timeout_seconds=120, network_allow=tuple(allow), agent=agent)
    )
    try:
        yield handle
    finally:
        await backend.kill(handle)


def told(records) -> list[tuple[str, int, str, int]]:
    return [(record.host, record.port, record.verdict, record.times) for record in records]


CONNECT = """
import socket
def connect(authority, port=3128):
    s = socket.create_connection(('127.0.0.1', port), 5)
    s.sendall(f'CONNECT {authority} HTTP/1.1\\r\\n\\r\\n'.encode())
    head = b''
    while not head.endswith(b'\\r\\n\\r\\n'):
        piece = s.recv(1)
        if not piece:
            break
        head += piece
    return s, head.split(b'\\r\\n')[0].decode()
"""


async def test_without_rules_there_is_no_way_out_and_no_proxy(backend):
    code = """
import os, socket
found = {name for name in os.environ if 'proxy' in name.lower()}
for address in ('127.0.0.1', '127.0.0.2', '192.0.2.1'):
    try:
        socket.create_connection((address, 3128 if address == '127.0.0.1' else 80), 2)
        found.add(address)
    except OSError:
        pass
try:
    socket.getaddrinfo('example.org', 80)
    found.add('dns')
except OSError:
    pass
found
"""
    async with sandbox(backend) as handle:
        outcome = await run(backend, handle, code)
        records = await backend.egress(handle)

    assert outcome["value"] == "set()"
    assert records == []


async def test_programs_find_the_way_out_by_their_environment(backend, web):
    code = f"""
import json, subprocess, urllib.request, requests
url = 'http://{OUTSIDE}:{web}/data?x=1'
answers = [urllib.request.urlopen(url, timeout=5).read().decode(), requests.get(url, timeout=5).text]
answers.append(subprocess.run(['bash', '-lc', 'echo $HTTPS_PROXY $no_proxy'], capture_output=True, text=True).stdout.strip())
answers
"""
    async with sandbox(backend, f"{OUTSIDE}:{web}") as handle:
        answers = await value(backend, handle, code)
        records = await backend.egress(handle)

    said = f"GET /data?x=1 of {OUTSIDE}:{web}"
    assert answers == [said, said, "http://127.0.0.1:3128 localhost,127.0.0.1,::1"]
    assert told(records) == [(OUTSIDE, web, "allowed", 1)] * 2
    assert all(record.bytes_in > len(said) and record.bytes_out > 40 for record in records)
    assert [record.address for record in records] == [OUTSIDE] * 2


async def test_a_tunnel_carries_bytes_both_ways(backend):
    with socket.create_server((OUTSIDE, 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while piece := connection.recv(65536):
                    connection.sendall(piece.upper())

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        code = CONNECT + f"s, said = connect('{OUTSIDE}:{port}')\ns.sendall(b'hello')\n(said, s.recv(5), s.close())[:2]"
        async with sandbox(backend, f"{OUTSIDE}:{port}") as handle:
            said = await value(backend, handle, code)
            thread.join(5)
            records = await backend.egress(handle, final=True)

    assert said == ("HTTP/1.1 200 Connection established", b"HELLO")
    assert [(record.bytes_out, record.bytes_in) for record in records] == [(5, 5)]


async def test_a_denied_host_says_so_to_the_code(backend):
    code = """
import urllib.request, requests
said = []
try:
    urllib.request.urlopen('https://example.com/', timeout=5)
except OSError as e:
    said.append(str(e))
try:
    requests.get('https://example.com/', timeout=5)
except requests.exceptions.ConnectionError as e:
    said.append(str(e))
said.append(requests.get('http://example.com/', timeout=5).text)
said
"""
    async with sandbox(backend, "data.example", "*.example.org") as handle:
        said = await value(backend, handle, code)
        records = await backend.egress(handle)

    for text, port in zip(said, (443, 443, 80), strict=True):
        assert f"Sandgate: agent etl may not reach example.com:{port}; allowed are: data.example, *.example.org" in text
    assert told(records) == [("example.com", 443, "denied", 2), ("example.com", 80, "denied", 1)]


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "10.0.0.1"]
)
async def test_the_machine_and_its_networks_are_not_the_internet(backend, web, name):
    code = CONNECT + f"connect('{name}:{web}')[1]"
    async with sandbox(backend, f"*:{web}", f"localhost:{web}") as handle:
        said = await value(backend, handle, code)

    assert said.startswith("HTTP/1.1 403 Sandgate: ")


async def test_the_port_is_part_of_the_rule(backend, web):
    async with sandbox(backend, OUTSIDE) as handle:
        said = await value(backend, handle, CONNECT + f"connect('{OUTSIDE}:{web}')[1]")

    assert said == f"HTTP/1.1 403 Sandgate: agent etl may not reach {OUTSIDE}:{web}; allowed are: {OUTSIDE}"


async def test_ways_out_and_their_ledgers_do_not_mix(backend, web):
    code = CONNECT + f"connect('{OUTSIDE}:{web}')[1]"
    async with (
        sandbox(backend, f"{OUTSIDE}:{web}", agent="one") as one,
        sandbox(backend, "data.example", agent="two") as two,
    ):
        async with sandbox(backend) as none:
            said = [await value(backend, handle, code) for handle in (one, two)]
            without = await run(backend, none, code)
        ledgers = [told(await backend.egress(handle, final=True)) for handle in (one, two, none)]

    assert said[0] == "HTTP/1.1 200 Connection established"
    assert said[1].startswith("HTTP/1.1 403 Sandgate: agent two may not reach")
    assert without["error"] == "ConnectionRefusedError"
    assert ledgers == [[(OUTSIDE, web, "allowed", 1)], [(OUTSIDE, web, "denied", 1)], []]


async def test_the_way_out_cannot_be_taken_over_from_inside(backend, web):
    code = """
import socket
taken = []
for family, address in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET, '0.0.0.0')):
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        s = socket.socket(family)
        s.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            s.bind((address, 3128))
            s.listen()
            taken.append(address)
        except OSError:
            pass
taken
"""
    async with sandbox(backend, f"{OUTSIDE}:{web}") as handle:
        assert await value(backend, handle, code) == []


async def test_killing_everything_inside_does_not_close_the_way_out(backend, web):
    async with sandbox(backend, f"{OUTSIDE}:{web}") as handle:
        await run(backend, handle, "import os\nos.kill(-1, 9)")
        said = await value(backend, handle, CONNECT + f"connect('{OUTSIDE}:{web}')[1]")

    assert said == "HTTP/1.1 200 Connection established"


async def test_a_hundred_connections_meet_the_limit(backend, web):
    code = (
        CONNECT
        + f"opened = [connect('{OUTSIDE}:{web}') for _ in range(100)]\nsorted({{said[:12] for _, said in opened}})"
    )
    count = "[said[:12] for _, said in opened].count('HTTP/1.1 200')"
    async with sandbox(backend, f"{OUTSIDE}:{web}") as handle:
        said = await value(backend, handle, code)
        open_ones = await value(backend, handle, count)

    assert said == ["HTTP/1.1 200", "HTTP/1.1 429"]
    assert open_ones == 64


async def test_the_end_of_a_sandbox_ends_its_connections_and_keeps_its_ledger(backend):
    with socket.create_server((OUTSIDE, 0)) as server:
        port = server.getsockname()[1]
        async with sandbox(backend, f"{OUTSIDE}:{port}") as handle:
            said = await value(
                backend, handle, CONNECT + f"s, said = connect('{OUTSIDE}:{port}')\ns.sendall(b'abc')\nsaid"
            )
            connection, _ = server.accept()
            connection.settimeout(5)
            assert connection.recv(3) == b"abc"
            assert await backend.egress(handle) == []
        rest = connection.recv(1)
        connection.close()
        records = await backend.egress(handle)

    assert said.startswith("HTTP/1.1 200")
    assert rest == b""
    assert told(records) == [(OUTSIDE, port, "allowed", 1)]
    assert records[0].bytes_out == 3


async def test_what_was_told_is_not_told_again(backend):
    async with sandbox(backend, "data.example") as handle:
        await value(backend, handle, CONNECT + "connect('one.example:443')[1]")
        first = await backend.egress(handle)
        await value(backend, handle, CONNECT + "[connect(f'host{n}.example:443')[1] for n in range(120)][0]")
        second = await backend.egress(handle, after=first[-1].number)

    assert [record.number for record in first] == [1]
    assert [record.number for record in second] == list(range(2, 122))


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no other uid to give")
async def test_the_proxy_has_no_rights(backend, node, web):
    async with sandbox(backend, f"{OUTSIDE}:{web}"):
        facts = dict(
            line.split(":", 1) for line in (Path("/proc") / str(proxy_of(node)) / "status").read_text().splitlines()
        )

    assert "0" not in facts["Uid"].split()
    assert facts["Groups"].split() == []
    assert {facts[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (facts["NoNewPrivs"].strip(), facts["Seccomp"].strip()) == ("1", "2")


async def test_the_proxy_ends_with_the_node_and_comes_back_when_it_has_died(template_python, web):
    with running_node(template_python) as node:
        async with sandbox(node.backend, f"{OUTSIDE}:{web}") as cut_off:
            first = proxy_of(node)
            pidfd = os.pidfd_open(first)
            os.kill(first, 9)
            assert ended(pidfd)
            os.close(pidfd)
            after = await run(node.backend, cut_off, CONNECT + f"connect('{OUTSIDE}:{web}')[1]")
            async with sandbox(node.backend, f"{OUTSIDE}:{web}") as fresh:
                said = await value(node.backend, fresh, CONNECT + f"connect('{OUTSIDE}:{web}')[1]")
        second = proxy_of(node)

    assert after["error"] == "ConnectionRefusedError" or after["value"] == ""
    assert said == "HTTP/1.1 200 Connection established"
    assert second != first
    assert not Path(f"/proc/{second}").exists()


def proxy_of(node: RunningNode) -> int:
    """The pid of the node's proxy."""
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"\0egress\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
