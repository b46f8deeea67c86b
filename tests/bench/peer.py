"""One peer of the product, measured by itself in the bench's own environment (peers.txt); prints {name: [seconds, …]}.

python peer.py gateway SMALL CELL | gateway-nodelay … | ipykernel … | sandlock …

python peer.py serve PORT [nodelay]       Jupyter Kernel Gateway, as it comes, or without Nagle's algorithm
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NEW, WARM = 8, 100  # how often


def clock(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def serve(port: int, *more: str) -> None:
    from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
    from kernel_gateway.gatewayapp import KernelGatewayApp

    if more:
        opened = KernelWebsocketHandler.open

        async def without_delay(self, *args, **kwargs):
            self.set_nodelay(True)
            await opened(self, *args, **kwargs)

        KernelWebsocketHandler.open = without_delay
    KernelGatewayApp.launch_instance(["--ip=127.0.0.1", f"--port={port}", "--log-level=ERROR"])


class Kernel:
    """One kernel behind the gateway, and its websocket."""

    def __init__(self, port: int) -> None:
        import websocket

        self.url = f"127.0.0.1:{port}/api/kernels"
        started = urllib.request.urlopen(urllib.request.Request(f"http://{self.url}", b"{}"))
        self.id = json.loads(started.read())["id"]
        self.socket = websocket.create_connection(f"ws://{self.url}/{self.id}/channels", timeout=60)

    def run(self, code: str) -> None:
        """Returns when the kernel has answered and is idle again, as a client must wait for."""
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": "execute_request",
            "username": "",
            "session": "b",
            "version": "5.3",
        }
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        self.socket.send(json.dumps(message))
        wanted, results = {"execute_reply", "idle"}, 0
        while wanted:
            said = json.loads(self.socket.recv())
            if said["parent_header"].get("msg_id") == header["msg_id"]:
                results += said["msg_type"] == "execute_result"
                wanted -= {said["msg_type"], said["content"].get("execution_state")}
        assert results == 1

    def end(self) -> None:
        self.socket.close()
        urllib.request.urlopen(urllib.request.Request(f"http://{self.url}/{self.id}", method="DELETE"))


@contextmanager
def gateway(*more: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "serve", str(port), *more], stdout=-3, stderr=-3)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api")
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def measure_gateway(small: str, cell: str, *more: str) -> dict[str, list[float]]:
    with gateway(*more) as port:

        def new(code: str) -> float:
            kernels: list[Kernel] = []

            def first() -> None:
                kernels.append(Kernel(port))
                kernels[0].run(code)

            took = clock(first)
            kernels[0].end()
            return took

        new(cell)
        found = {"new": [new(cell) for _ in range(NEW)], "new, nothing imported": [new(small) for _ in range(NEW)]}
        kernel = Kernel(port)
        found["warm"] = [clock(lambda: kernel.run(small)) for _ in range(WARM + 10)][10:]
        kernel.end()
        return found


def measure_ipykernel(small: str, cell: str) -> dict[str, list[float]]:
    from jupyter_client.manager import start_new_kernel

    def new() -> float:
        ended = []

        def first() -> None:
            manager, client = start_new_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            client.execute_interactive(cell, output_hook=lambda message: None, timeout=60)
            ended.append(lambda: (client.stop_channels(), manager.shutdown_kernel(now=True)))

        took = clock(first)
        ended[0]()
        return took

    new()
    found = {"new": [new() for _ in range(NEW)]}
    manager, client = start_new_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = lambda: client.execute_interactive(small, output_hook=lambda message: None, timeout=60)  # noqa: E731
    found["warm"] = [clock(run) for _ in range(WARM + 10)][10:]
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    return found


def measure_sandlock(small: str, cell: str) -> dict[str, list[float]]:
    from sandlock import Sandbox

    shown = {
        "/usr",
        "/lib",
        "/lib64",
        "/etc",
        "/proc",
        "/dev",
        sys.prefix,
        sys.base_prefix,
        os.path.realpath(sys.base_prefix),
    }
    sandbox = Sandbox(fs_readable=sorted(filter(os.path.exists, shown)))

    def run(code: str) -> None:
        result = sandbox.run([sys.executable, "-c", code], timeout=60)
        assert result.success, result

    run(cell)
    return {
        "new": [clock(lambda: run(cell)) for _ in range(NEW)],
        "nothing imported": [clock(lambda: run(small)) for _ in range(NEW)],
    }


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        serve(int(arguments[0]), *arguments[1:])
    elif what == "gateway-nodelay":
        print(json.dumps(measure_gateway(*arguments, "nodelay")))
    else:
        measured = {"gateway": measure_gateway, "ipykernel": measure_ipykernel, "sandlock": measure_sandlock}[what]
        print(json.dumps(measured(*arguments)))
