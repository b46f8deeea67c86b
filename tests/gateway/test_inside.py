"""The data plane: code, commands and files inside a sandbox, by E2B's own SDK and in raw HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from urllib.parse import urlsplit

import httpx
import pytest
from e2b import (
    AsyncSandbox as CoreAsyncSandbox,
)
from e2b import (
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    SandboxException,
    SandboxNotRunningException,
    TimeoutException,
)
from e2b_code_interpreter import AsyncSandbox

from tests.gateway.conftest import addressed

# Code


def test_a_cell_prints_and_has_a_value(sandbox):
    cell = sandbox.run_code("import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7")

    assert (cell.text, cell.logs.stdout, cell.logs.stderr) == ("42", ["out\n"], ["err\n"])
    assert (cell.error, cell.execution_count) == (None, 1)


def test_a_data_frame_and_a_plot_come_as_the_sdk_knows_them(sandbox):
    frame = sandbox.run_code("import pandas as pd\npd.DataFrame({'a': [1, 2]})").results[0]
    plot = sandbox.run_code("import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 4])\nplt.show()").results[0]

    assert frame.data == {"a": [1, 2]}
    assert "<table" in frame.html
    assert plot.png.startswith("iVBOR")
    assert plot.chart.type.value == "line"


def test_an_exception_is_the_cells_error(sandbox):
    cell = sandbox.run_code("1 / 0")

    assert (cell.error.name, cell.error.value) == ("ZeroDivisionError", "division by zero")


def test_an_empty_cell_has_nothing_to_say(sandbox):
    cell = sandbox.run_code("  \n")

    assert (cell.results, cell.logs.stdout, cell.error) == ([], [], None)


def test_bash_and_environment_variables(sandbox):
    cell = sandbox.run_code("echo $MARK", language="bash", envs={"MARK": "it's"})

    assert cell.logs.stdout == ["it's\n"]


def test_javascript_and_typescript_as_the_sdk_asks_for_them(sandbox):
    cell = sandbox.run_code("console.log(process.env.MARK); ({ a: [1] })", language="javascript", envs={"MARK": "it's"})
    context = sandbox.create_code_context(language="ts", cwd="/tmp")
    typed = sandbox.run_code("const n: number = 2; [n, process.cwd()]", context=context)
    wrong = sandbox.run_code("n.none.none", language="js")

    assert (cell.logs.stdout, cell.results[0].json, cell.text) == (["it's\n"], {"a": [1]}, "{ a: [ 1 ] }")
    assert typed.results[0].json == [2, "/tmp"]
    assert wrong.error.name == "ReferenceError"  # the default context knows nothing of the other
    assert {"python", "javascript", "typescript"} <= {c.language for c in sandbox.list_code_contexts()}


def test_contexts_keep_apart(sandbox):
    context = sandbox.create_code_context(cwd="/tmp")
    sandbox.run_code("x = 1", context=context)
    inside, outside = sandbox.run_code("x", context=context).text, sandbox.run_code("'x' in globals()").text
    listed = [c.id for c in sandbox.list_code_contexts()]
    sandbox.remove_code_context(context)

    assert (inside, outside) == ("1", "False")
    assert context.id in listed
    with pytest.raises(NotFoundException):
        sandbox.run_code("x", context=context)


def test_a_cell_that_runs_too_long_is_interrupted_and_the_next_one_works(sandbox):
    sandbox.run_code("x = 1")
    with pytest.raises(TimeoutException, match="Execution timed out"):
        sandbox.run_code("import time\nwhile True: time.sleep(1)", timeout=1)

    assert sandbox.run_code("x", timeout=10).text == "1"


def test_an_unknown_language_is_refused(sandbox):
    with pytest.raises(SandboxException, match="400"):
        sandbox.run_code("1", language="klingon")


def test_every_cell_is_an_execution_on_record(product, sandbox):
    sandbox.run_code("print('on record')")

    with product.http() as http:
        (found,) = http.get("/api/v1/executions", params={"session": f"sbx_{sandbox.sandbox_id}"}).json()["results"]
        whole = http.get(f"/api/v1/executions/{found['id']}").json()
    assert (whole["door"], whole["state"], whole["logs"]["stdout"]) == ("gateway", "succeeded", "on record\n")
    assert whole["agent"] == "first"
    assert whole["cost_nano_usd"] > 0
    assert whole["usage"]["cpu_seconds"] > 0


async def test_a_client_that_leaves_interrupts_its_cell_and_the_record_says_so(product, mine):
    sandbox = await AsyncSandbox.create(timeout=60, **mine)
    begun = asyncio.Event()
    code = "import time\nprint('begun')\nwhile True: time.sleep(1)"
    cell = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda _: begun.set()))
    await begun.wait()
    cell.cancel()
    after = await sandbox.run_code("1 + 1", timeout=10)
    await sandbox.kill()

    with product.http() as http:
        found = http.get("/api/v1/executions", params={"session": f"sbx_{sandbox.sandbox_id}"}).json()["results"]
    assert after.text == "2"
    assert [(e["state"], e["detail"]) for e in found][1] == ("cancelled", "the client went away")


async def test_a_cell_that_somebody_cancels_says_so_and_the_sandbox_goes_on(product, mine):
    sandbox = await AsyncSandbox.create(timeout=60, **mine)
    begun = asyncio.Event()
    code = "import time\nprint('begun')\ntime.sleep(600)"
    cell = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda _: begun.set()))
    await begun.wait()
    with product.http() as http:
        (found,) = http.get("/api/v1/executions", params={"session": f"sbx_{sandbox.sandbox_id}"}).json()["results"]
        http.post(f"/api/v1/executions/{found['id']}/cancel", json={"reason": "enough"})
    error = (await cell).error
    after = await sandbox.run_code("1 + 1")
    await sandbox.kill()

    assert (error.name, error.value, after.text) == ("ExecutionCancelled", "enough", "2")


async def test_output_arrives_while_the_cell_runs(mine):
    sandbox = await AsyncSandbox.create(timeout=60, **mine)
    first = asyncio.Event()
    code = "import time\nprint('first')\ntime.sleep(0.5)\nprint('second')"
    cell = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda _: first.set()))
    await first.wait()
    early = not cell.done()
    said = (await cell).logs.stdout
    await sandbox.kill()

    assert early
    assert said == ["first\n", "second\n"]


async def test_a_sandbox_killed_in_mid_cell_is_told_apart_from_a_network_failure(mine):
    sandbox = await AsyncSandbox.create(timeout=60, **mine)
    begun = asyncio.Event()
    code = "import time\nprint('begun')\ntime.sleep(600)"
    cell = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda _: begun.set()))
    await begun.wait()
    await sandbox.kill()

    with pytest.raises(TimeoutException, match="sandbox was killed"):
        await cell


def test_silence_is_filled_with_signs_of_life(raw, sandbox):
    request = {"code": "import time\ntime.sleep(5.5)"}
    kinds = []
    with raw.stream("POST", "/execute", json=request, headers=addressed(sandbox, 49999)) as answer:
        kinds += [json.loads(line)["type"] for line in answer.iter_lines()]

    assert "keepalive" in kinds
    assert kinds[-1] == "end_of_execution"


def test_a_cell_needs_the_sandboxs_own_token(raw, sandbox):
    answer = raw.post("/execute", json={"code": "1"}, headers=addressed(sandbox, 49999, token="0" * 32))

    assert answer.status_code == 401


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"code": 1}', b"{}"])
def test_what_is_not_a_cell_is_refused(raw, sandbox, body):
    assert raw.post("/execute", content=body, headers=addressed(sandbox, 49999)).status_code == 422


def test_context_and_language_exclude_each_other(raw, sandbox):
    body = {"code": "1", "context_id": "x", "language": "python"}

    assert raw.post("/execute", json=body, headers=addressed(sandbox, 49999)).status_code == 400


# Commands


def test_a_command_has_output_and_an_exit_code(sandbox):
    done = sandbox.commands.run("echo out; echo err >&2; pwd", cwd="/tmp")
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo why >&2; exit 3")

    assert (done.stdout, done.stderr, done.exit_code) == ("out\n/tmp\n", "err\n", 0)
    assert (failed.value.exit_code, failed.value.stderr) == (3, "why\n")


def test_a_command_in_the_background_is_listed_and_killed(sandbox):
    running = sandbox.commands.run("sleep 600", background=True)
    listed = [process.pid for process in sandbox.commands.list()]

    assert running.pid in listed
    assert running.kill() is True
    with pytest.raises(CommandExitException):
        running.wait()
    assert sandbox.commands.kill(running.pid) is False


def test_a_command_that_runs_too_long_is_ended(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 600", timeout=1)

    for process in sandbox.commands.list():  # the SDK gives up in the moment in which the agent ends it
        sandbox.commands.run(f"tail --pid={process.pid} -s 0.05 -f /dev/null", timeout=5)
    assert sandbox.commands.list() == []


async def test_a_sandbox_killed_in_mid_command_is_not_running(mine):
    sandbox = await CoreAsyncSandbox.create(template="code-interpreter-v1", timeout=60, **mine)
    begun = asyncio.Event()
    running = await sandbox.commands.run("echo begun; sleep 600", background=True, on_stdout=lambda _: begun.set())
    await begun.wait()
    await sandbox.kill()

    with pytest.raises(SandboxNotRunningException):
        await running.wait()
    with pytest.raises(SandboxNotRunningException):
        await sandbox.commands.run("true")


def test_a_command_is_typed_into_and_joined_later(sandbox):
    reading = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.send_stdin(reading.pid, "typed\n")
    joined = sandbox.commands.connect(reading.pid)
    sandbox.commands.close_stdin(reading.pid)

    assert reading.wait().stdout == "typed\n"
    assert joined.wait().exit_code == 0


def test_a_terminal_is_one(sandbox):
    shown: list[bytes] = []
    terminal = sandbox.pty.create(PtySize(24, 80), timeout=20)
    sandbox.pty.send_stdin(terminal.pid, b"echo $((6 * 7)) $(tput cols); exit\n")
    terminal.wait(on_pty=lambda piece: shown.append(bytes(piece)))

    assert b"42 80" in b"".join(shown)


# Files


def test_files_are_written_read_and_listed(sandbox):
    sandbox.files.write("/home/user/deep/a.txt", "žluť")
    sandbox.files.write("deep/b.bin", bytes(range(256)))

    assert sandbox.files.read("deep/a.txt") == "žluť"
    assert bytes(sandbox.files.read("/home/user/deep/b.bin", format="bytes")) == bytes(range(256))
    assert [(e.name, e.type.value) for e in sandbox.files.list("/home/user/deep")] == [
        ("a.txt", "file"),
        ("b.bin", "file"),
    ]
    sandbox.files.remove("deep/a.txt")
    assert sandbox.files.exists("deep/a.txt") is False
    with pytest.raises(FileNotFoundException):
        sandbox.files.read("deep/a.txt")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read("deep")


def test_twenty_megabytes_go_in_and_out_in_pieces(sandbox):
    piece = bytes(range(256)) * 4096
    sandbox.files.write("/tmp/big", (piece for _ in range(20)))
    size, same = 0, True
    for got in sandbox.files.read("/tmp/big", format="stream"):
        same &= got == (piece * 2)[size % 256 :][: len(got)]
        size += len(got)

    assert (size, same) == (20 << 20, True)


def test_an_upload_is_passed_on_piece_by_piece(product, sandbox):
    url = urlsplit(product.url)
    head = [f"{name}: {value}" for name, value in addressed(sandbox).items()]
    request = ["POST /e2b/files?path=/tmp/slow HTTP/1.1", f"Host: {url.netloc}", "Transfer-Encoding: chunked", *head]
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        client.sendall("\r\n".join([*request, "Content-Type: application/octet-stream", "", ""]).encode())
        client.sendall(b"5\r\nhello\r\n")
        arrived = sandbox.commands.run("until [ -s /tmp/slow ]; do sleep 0.02; done; cat /tmp/slow", timeout=10).stdout
        client.sendall(b"6\r\n again\r\n0\r\n\r\n")
        answer = client.recv(65536)

    assert arrived == "hello"
    assert answer.startswith(b"HTTP/1.1 200")
    assert sandbox.files.read("/tmp/slow") == "hello again"


def test_an_upload_that_breaks_off_ends_at_the_sandbox_too(product, sandbox):
    url = urlsplit(product.url)
    head = [f"{name}: {value}" for name, value in addressed(sandbox).items()]
    request = ["POST /e2b/files?path=/tmp/part HTTP/1.1", f"Host: {url.netloc}", "Content-Length: 1000", *head]
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        client.sendall("\r\n".join([*request, "Content-Type: application/octet-stream", "", "part"]).encode())
        sandbox.commands.run("until [ -s /tmp/part ]; do sleep 0.02; done", timeout=10)

    assert sandbox.files.read("/tmp/part") == "part"
    assert sandbox.run_code("1").text == "1"


# The proxy


def test_many_streams_at_once_do_not_wait_for_each_other(sandbox):
    done = []

    def one(number: int) -> None:
        done.append(sandbox.commands.run(f"sleep 0.3; echo {number}").stdout)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert sorted(done, key=int) == [f"{number}\n" for number in range(12)]


@pytest.mark.parametrize("path", ["/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade"])
def test_the_agents_control_routes_are_not_there(raw, sandbox, path):
    assert raw.post(path, json={}, headers=addressed(sandbox)).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "//execute",
        "/execute/",
        "///x/execute",
        "/%65xecute/",
        "/x/../execute",
        "/execute?x",
        "/%2Fexecute",
        "/health/../execute",
    ],
)
def test_no_cell_gets_past_the_record(product, sandbox, path):
    """The agent must never read another path than the one that the gateway has judged."""
    url = urlsplit(product.url)
    body = json.dumps({"code": "open('/tmp/past', 'w').write('x')"})
    head = [f"{name}: {value}" for name, value in addressed(sandbox, 49999).items()]
    request = [
        f"POST /e2b{path} HTTP/1.1",
        f"Host: {url.netloc}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *head,
    ]
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        client.sendall("\r\n".join([*request, "", body]).encode())
        while client.recv(65536):
            pass

    with product.http() as http:
        seen = http.get("/api/v1/executions", params={"session": f"sbx_{sandbox.sandbox_id}"}).json()["results"]
    assert sandbox.files.exists("/tmp/past") is bool(seen)


def test_a_sandbox_that_is_not_there_is_said_in_the_words_that_sdks_know(raw):
    answer = raw.get("/health", headers={"E2b-Sandbox-Id": "nosuch", "E2b-Sandbox-Port": "49983"})

    assert answer.status_code == 502
    assert answer.json() == {"sandboxId": "nosuch", "message": "The sandbox was not found", "code": 502}


def test_a_port_that_nobody_listens_on_is_said_in_the_words_that_sdks_know(raw, sandbox):
    answer = raw.get("/", headers=addressed(sandbox, 8000))

    wanted = {"sandboxId": sandbox.sandbox_id, "message": "The sandbox is running but port is not open", "port": 8000}
    assert (answer.status_code, answer.json()) == (502, {**wanted, "code": 502})


@pytest.mark.parametrize("missing", ["E2b-Sandbox-Id", "E2b-Sandbox-Port"])
def test_a_request_without_an_address_is_refused(raw, sandbox, missing):
    headers = {name: value for name, value in addressed(sandbox).items() if name != missing}

    assert raw.get("/health", headers=headers).status_code == 400


def test_the_sandboxs_token_is_needed_for_files_and_commands(raw, sandbox):
    wrong = addressed(sandbox, token="0" * 32)

    assert raw.get("/files", params={"path": "/tmp"}, headers=wrong).status_code == 401
    assert raw.post("/process.Process/List", json={}, headers=wrong).status_code == 401
    assert raw.get("/health", headers=wrong).status_code == 204


def test_the_products_key_never_reaches_the_sandbox(product, sandbox):
    headers = {**addressed(sandbox), "X-API-KEY": product.key}
    with httpx.Client(trust_env=False) as client:
        answer = client.get(f"{product.url}/e2b/envs", headers=headers)

    assert answer.status_code == 200
    assert product.key not in answer.text
