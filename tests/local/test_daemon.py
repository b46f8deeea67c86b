"""E2B's wire protocol inside a sandbox, as clients of port 49983 and 49999 speak it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import struct
import time
from urllib.parse import quote

import pytest

from executions.backends.local import http
from tests.local.attack import sandbox


@pytest.fixture
def backend(node):
    return node.backend


async def send(
    handle, method: str, path: str, body: bytes = b"", *, port: int = 49983, token: bool = True, **headers: str
):
    """One request; its status and body."""
    fields = {name.replace("_", "-"): text for name, text in headers.items()}
    if token:
        fields["x-access-token"] = handle["token"]
    async with http.request(handle["dir"], port, method, path, headers=fields, body=body) as answer:
        return answer.status, await answer.whole()


async def call(handle, method: str, message: dict, **headers: str):
    """One unary call of a Connect service."""
    status, body = await send(handle, "POST", f"/{method}", json.dumps(message).encode(), **headers)
    return status, json.loads(body)


def envelopes(body: bytes) -> list[tuple[int, dict]]:
    found = []
    while body:
        flag, size = struct.unpack(">BI", body[:5])
        found.append((flag, json.loads(body[5 : 5 + size])))
        body = body[5 + size :]
    return found


async def start(handle, command: str, **headers: str) -> list[tuple[int, dict]]:
    message = json.dumps({"process": {"cmd": "/bin/bash", "args": ["-l", "-c", command]}, "stdin": False}).encode()
    body = struct.pack(">BI", 0, len(message)) + message
    return envelopes((await send(handle, "POST", "/process.Process/Start", body, **headers))[1])


async def test_only_health_is_open_to_everybody(backend):
    async with sandbox(backend) as handle:
        assert await send(handle, "GET", "/health", token=False) == (204, b"")
        for method, path in (
            ("GET", "/envs"),
            ("GET", "/files?path=/etc/passwd"),
            ("POST", "/files?path=/tmp/x"),
            ("POST", "/process.Process/List"),
            ("POST", "/filesystem.Filesystem/Stat"),
        ):
            assert (await send(handle, method, path, token=False))[0] == 401
            assert (await send(handle, method, path, token=False, x_access_token="wrong"))[0] == 401


def signature(path: str, operation: str, token: str, expiration: int | None = None, user: str = "") -> str:
    text = f"{path}:{operation}:{user}:{token}" + (f":{expiration}" if expiration is not None else "")
    return "v1_" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


async def test_files_are_open_to_a_signature_until_it_expires(backend):
    async with sandbox(backend) as handle:
        await send(handle, "POST", "/files?path=/tmp/x", b"content", content_type="application/octet-stream")
        good = quote(signature("/tmp/x", "read", handle["token"]))
        soon, past = int(time.time()) + 60, int(time.time()) - 60
        timed = quote(signature("/tmp/x", "read", handle["token"], soon))
        late = quote(signature("/tmp/x", "read", handle["token"], past))

        url = "/files?path=/tmp/x"
        assert await send(handle, "GET", f"{url}&signature={good}", token=False) == (200, b"content")
        assert (await send(handle, "GET", f"{url}&signature={timed}&signature_expiration={soon}", token=False))[
            0
        ] == 200
        for refused, text in (
            (url, b"missing signature"),
            (f"{url}&signature={good}x", b"invalid signature"),
            (f"/files?path=/etc/passwd&signature={good}", b"invalid signature"),
            (f"{url}&signature={late}&signature_expiration={past}", b"already expired"),
        ):
            status, body = await send(handle, "GET", refused, token=False)
            assert (status, text in body) == (401, True)


def multipart(*parts: tuple[str, bytes]) -> tuple[bytes, str]:
    body = b"preamble\r\n"
    for name, content in parts:
        body += (
            f'--edge\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
            + content
            + b"\r\n"
        )
    return body + b"--edge--\r\nepilogue", "multipart/form-data; boundary=edge"


@pytest.mark.parametrize("piece", [1, 7, 1000, 10**6])
async def test_multipart_files_arrive_however_they_are_cut(backend, piece):
    contents = [b"", b"\r\n", b"one\r\n--edg\r\n--edgy", bytes(range(256)) * 10]
    body, content_type = multipart(*((f"/tmp/m/{n}", content) for n, content in enumerate(contents)))

    async def pieces():
        for at in range(0, len(body), piece):
            yield body[at : at + piece]

    async with sandbox(backend) as handle:
        async with http.request(
            handle["dir"], 49983, "POST", "/files", body=pieces(),
            headers={"x-access-token": handle["token"], "content-type": content_type},
        ) as answer:  # fmt: skip
            written = await answer.json()
        back = [(await send(handle, "GET", f"/files?path=/tmp/m/{n}"))[1] for n in range(len(contents))]

    assert [entry["path"] for entry in written] == ["/tmp/m/0", "/tmp/m/1", "/tmp/m/2", "/tmp/m/3"]
    assert back == contents


async def test_a_full_disk_is_507_and_a_folder_400(backend):
    async with sandbox(backend, disk_mib=4) as handle:
        status, _ = await send(
            handle, "POST", "/files?path=/tmp/big", b"x" * (40 << 20), content_type="application/octet-stream"
        )
        folder, _ = await send(handle, "GET", "/files?path=/home/user")
        missing, body = await send(handle, "GET", "/files?path=/home/user/none")

    assert (status, folder, missing) == (507, 400, 404)
    assert json.loads(body) == {"code": 404, "message": "path '/home/user/none' does not exist"}


async def test_the_file_system_service(backend):
    service = "filesystem.Filesystem/"
    async with sandbox(backend) as handle:
        made = await call(handle, service + "MakeDir", {"path": "d/e"})
        again = await call(handle, service + "MakeDir", {"path": "/home/user/d/e"})
        await send(handle, "POST", "/files?path=d/f", b"12", content_type="application/octet-stream")
        moved = await call(handle, service + "Move", {"source": "~/d/f", "destination": "~/x/y/g"})
        seen = await call(handle, service + "Stat", {"path": "x/y/g"})
        listed = await call(handle, service + "ListDir", {"path": "/home/user", "depth": 2})
        removed = [await call(handle, service + "Remove", {"path": "x"}) for _ in range(2)]
        gone = await call(handle, service + "Stat", {"path": "x"})
        unknown = await call(handle, service + "Frobnicate", {})

    assert made[1]["entry"]["path"] == "/home/user/d/e"
    assert (again[0], again[1]["code"]) == (409, "already_exists")
    assert moved[0] == 200
    assert (seen[1]["entry"]["size"], seen[1]["entry"]["type"], seen[1]["entry"]["owner"]) == (
        "2",
        "FILE_TYPE_FILE",
        "user",
    )
    assert {"/home/user/d", "/home/user/d/e", "/home/user/x/y"} <= {entry["path"] for entry in listed[1]["entries"]}
    assert removed == [(200, {}), (200, {})]
    assert (gone[0], gone[1]["code"]) == (404, "not_found")
    assert (unknown[0], unknown[1]["code"]) == (501, "unimplemented")


async def test_a_process_streams_and_ends(backend):
    async with sandbox(backend) as handle:
        said = await start(handle, "echo out; echo err >&2; exit 4")

    assert "pid" in said[0][1]["event"]["start"]
    data = [message["event"]["data"] for _, message in said if "data" in message.get("event", {})]
    assert {name: base64.b64decode(text) for part in data for name, text in part.items()} == {
        "stdout": b"out\n",
        "stderr": b"err\n",
    }
    assert said[-2][1]["event"]["end"] == {
        "exitCode": 4,
        "exited": True,
        "status": "exit status 4",
        "error": "exit status 4",
    }
    assert said[-1] == (2, {})


async def test_a_deadline_ends_the_stream_and_the_process(backend):
    async with sandbox(backend) as handle:
        said = await start(handle, "trap '' TERM; sleep 600", connect_timeout_ms="300")
        async with asyncio.timeout(5):
            while (await call(handle, "process.Process/List", {}))[1]["processes"]:
                pass

    assert said[-1][0] == 2
    assert said[-1][1]["error"]["code"] == "deadline_exceeded"


async def test_a_client_that_leaves_kills_nothing_and_a_signal_does(backend):
    message = json.dumps({"process": {"cmd": "/bin/sleep", "args": ["600"]}, "tag": "mine"}).encode()
    body = struct.pack(">BI", 0, len(message)) + message
    async with sandbox(backend) as handle:
        async with http.request(
            handle["dir"],
            49983,
            "POST",
            "/process.Process/Start",
            body=body,
            headers={"x-access-token": handle["token"]},
        ) as answer:
            first = envelopes(await anext(answer.pieces()))
        _, listed = await call(handle, "process.Process/List", {})
        killed = await call(
            handle, "process.Process/SendSignal", {"process": {"tag": "mine"}, "signal": "SIGNAL_SIGKILL"}
        )
        async with asyncio.timeout(5):
            while (await call(handle, "process.Process/List", {}))[1]["processes"]:
                pass
        unknown = await call(
            handle, "process.Process/SendSignal", {"process": {"pid": 999}, "signal": "SIGNAL_SIGKILL"}
        )

    assert [process["pid"] for process in listed["processes"]] == [first[0][1]["event"]["start"]["pid"]]
    assert killed == (200, {})
    assert unknown[0] == 404


class Stream:
    """An open call of the process service, read message by message."""

    def __init__(self, answer: http.Answer) -> None:
        self._pieces, self._held = answer.pieces(), bytearray()

    async def event(self) -> dict:
        while len(self._held) < 5 or len(self._held) < 5 + struct.unpack(">I", self._held[1:5])[0]:
            self._held += await anext(self._pieces)
        size = struct.unpack(">I", self._held[1:5])[0]
        message = json.loads(self._held[5 : 5 + size])
        del self._held[: 5 + size]
        return message.get("event", message)

    async def said(self, name: str, until: bytes) -> bytes:
        """What came on one stream until this was said."""
        got = b""
        async with asyncio.timeout(10):
            while until not in got:
                got += base64.b64decode((await self.event()).get("data", {}).get(name, ""))
        return got


@contextlib.asynccontextmanager
async def opened(handle, method: str, message: dict):
    data = json.dumps(message).encode()
    body, headers = struct.pack(">BI", 0, len(data)) + data, {"x-access-token": handle["token"]}
    async with http.request(
        handle["dir"], 49983, "POST", f"/process.Process/{method}", body=body, headers=headers
    ) as answer:
        yield Stream(answer)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_a_process_takes_input_until_it_is_closed(backend):
    async with sandbox(backend) as handle, opened(handle, "Start", {"process": {"cmd": "/bin/cat"}}) as stream:
        selector = {"process": {"pid": (await stream.event())["start"]["pid"]}}
        await call(handle, "process.Process/SendInput", selector | {"input": {"stdin": encoded(b"one\n")}})
        said = await stream.said("stdout", b"one\n")
        wrong, _ = await call(handle, "process.Process/SendInput", selector | {"input": {"pty": encoded(b"x")}})
        frames = [{"start": selector}, {"data": {"input": {"stdin": encoded(b"two\n")}}}, {"keepalive": {}}]
        body = b"".join(struct.pack(">BI", 0, len(d)) + d for d in (json.dumps(f).encode() for f in frames))
        _, answer = await send(handle, "POST", "/process.Process/StreamInput", body)
        said += await stream.said("stdout", b"two\n")
        await call(handle, "process.Process/CloseStdin", selector)
        end = await stream.event()

    assert said == b"one\ntwo\n"
    assert wrong == 500
    assert envelopes(answer) == [(0, {}), (2, {})]
    assert end["end"]["exitCode"] == 0


async def test_a_process_is_connected_to_while_it_runs_and_shortly_after(backend):
    async with sandbox(backend) as handle:
        start_it = {"process": {"cmd": "/bin/bash", "args": ["-c", "read line; echo got $line; exit 7"]}, "tag": "mine"}
        async with opened(handle, "Start", start_it) as stream:
            await stream.event()
        async with opened(handle, "Connect", {"process": {"tag": "mine"}}) as one:
            async with opened(handle, "Connect", {"process": {"tag": "mine"}}) as other:
                await one.event()
                await other.event()
                line = {"process": {"tag": "mine"}, "input": {"stdin": encoded(b"it\n")}}
                await call(handle, "process.Process/SendInput", line)
                both = [await stream.said("stdout", b"\n") for stream in (one, other)]
                ends = [await stream.event() for stream in (one, other)]
        async with opened(handle, "Connect", {"process": {"tag": "mine"}}) as late:
            started, ended = await late.event(), await late.event()
        async with opened(handle, "Connect", {"process": {"pid": 4000}}) as unknown:
            refused = await unknown.event()

    assert both == [b"got it\n"] * 2
    assert [end["end"]["exitCode"] for end in (*ends, ended)] == [7, 7, 7]
    assert "start" in started
    assert refused["error"]["code"] == "not_found"


async def test_a_terminal_is_one(backend):
    process = {"cmd": "/bin/bash", "args": ["-i", "-l"], "envs": {"TERM": "xterm"}}
    async with (
        sandbox(backend) as handle,
        opened(handle, "Start", {"process": process, "pty": {"size": {"cols": 91, "rows": 33}}}) as stream,
    ):
        selector = {"process": {"pid": (await stream.event())["start"]["pid"]}}

        async def typed(line: bytes, until: bytes) -> bytes:
            await call(handle, "process.Process/SendInput", selector | {"input": {"pty": encoded(line)}})
            return await stream.said("pty", until)

        await typed(b"stty size; test -t 0 && echo is_a_$((1+1))_tty\n", b"33 91\r\nis_a_2_tty")
        await call(handle, "process.Process/Update", selector | {"pty": {"size": {"cols": 50, "rows": 20}}})
        await typed(b"stty size\n", b"20 50")
        await typed(b"bash -c 'echo be''gun; exec sleep 600'\n", b"begun")  # not before it is in the foreground
        await typed(b"\x03", b"^C")  # the terminal interrupts it
        await typed(b"echo $((6*7))\n", b"42")
        await typed(b"exit 5\n", b"exit")
        while "end" not in (event := await stream.event()):
            pass

    assert event["end"]["exitCode"] == 5


async def test_what_is_not_a_process_is_refused_in_the_stream(backend):
    async with sandbox(backend) as handle:
        message = json.dumps({"process": {"cmd": "/bin/true", "cwd": "/nowhere"}}).encode()
        body = struct.pack(">BI", 0, len(message)) + message
        status, answer = await send(handle, "POST", "/process.Process/Start", body)

    assert status == 200
    assert envelopes(answer) == [
        (2, {"error": {"code": "invalid_argument", "message": "cwd '/nowhere' does not exist"}})
    ]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", 422),
        (b'{"code": 5}', 422),
        (b"[]", 422),
        (b"nonsense", 422),
        (b'{"code": "1", "context_id": "none"}', 404),
        (b'{"code": "1", "context_id": "x", "language": "python"}', 400),
        (b'{"code": "1", "language": "cobol"}', 400),
    ],
)
async def test_a_request_to_execute_that_is_none_is_refused(backend, body, status):
    async with sandbox(backend) as handle:
        assert (await send(handle, "POST", "/execute", body, port=49999))[0] == status


async def test_health_and_the_default_context_of_the_interpreter(backend):
    async with sandbox(backend) as handle:
        assert (await send(handle, "GET", "/health", port=49999, token=False))[0] == 200
        _, contexts = await send(handle, "GET", "/contexts", port=49999, token=False)
        nothing, _ = await send(handle, "GET", "/nothing", port=49999)

    seen = [(context["language"], context["cwd"]) for context in json.loads(contexts)]
    assert seen == [("python", "/home/user"), ("javascript", "/home/user")]
    assert nothing == 404


async def test_garbage_on_the_sockets_hurts_nobody(backend, node):
    async with sandbox(backend) as handle:
        for garbage in (
            b"\0" * 100,
            b"GET\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 50_000,
            b"POST /execute HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        ):
            reader, writer = await backend.open_port(handle, 49999)
            with contextlib.suppress(ConnectionError):
                writer.write(garbage)
                writer.write_eof()
                async with asyncio.timeout(5):
                    while await reader.read(65536):
                        pass
            writer.close()
        assert (await send(handle, "GET", "/health", port=49999))[0] == 200
