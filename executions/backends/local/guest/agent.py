"""Pid 1 of a sandbox: serves E2B's data plane on the two sockets that the node bound for it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from . import beginning, envd, http, interpreter, javascript_context, landlock, languages, places, python_context
from .contexts import Context
from .nursery import Nursling
from .processes import Reaper


class Agent:
    """What the two servers share: the plan, the contexts, the commands."""

    def __init__(self, plan: dict[str, Any], nursling: Nursling | None) -> None:
        self.plan = plan
        self.nursling = nursling  # the first Python context
        self.rules = None if plan.get("reduced") else landlock.ruleset()
        self.contexts: dict[str, Context] = {}
        self.defaults: dict[str, str] = {}  # language: id of its default context
        self.running: set[str] = set()  # contexts with somebody listening
        self.reaper = Reaper()

    def environment(self, cwd: str = "") -> dict[str, str]:
        """What guests find in their environment: nothing of the launcher's, then what the sandbox was created with."""
        ours = os.path.dirname(sys.executable), javascript_context.folder()
        return {
            "PATH": ":".join(filter(None, (*ours, "/usr/local/bin:/usr/bin:/bin"))),
            "HOME": places.home, "USER": "user", "LOGNAME": "user", "SHELL": "/bin/bash", "LANG": "C.UTF-8", "PWD": cwd or places.home,
            "PYTHONPATH": f"{places.ours}/guest/site", "MPLBACKEND": "agg", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
            "E2B_SANDBOX": "true", "E2B_SANDBOX_ID": self.plan["sandbox_id"], "E2B_TEMPLATE_ID": self.plan["template"],
            **({"TMPDIR": places.tmp} if places.reduced else {}), **_way_out(self.plan["proxy_port"]), **self.plan["env"],
        }  # fmt: skip


def _way_out(port: int) -> dict[str, str]:
    """The variables by which programs find the egress proxy; what is on loopback is the sandbox's own."""
    if not port:
        return {}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), f"http://127.0.0.1:{port}")
    lower = proxies | {"no_proxy": "localhost,127.0.0.1,::1"}
    return lower | {name.upper(): value for name, value in lower.items()} | {"NODE_USE_ENV_PROXY": "1"}


def rehearse() -> None:
    """Serve one request of our own: copies now the pages that being born, and a first request, would copy later."""
    asyncio.run(_rehearse())


async def _rehearse() -> None:
    plan = {"reduced": True, "sandbox_id": "", "template": "", "proxy_port": 0, "env": {}}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0rehearsal")  # in this network namespace, where nobody else is yet
        listener.listen()
        agent = Agent(plan, None)
        agent.environment()
        server = await http.serve(listener, interpreter.handler(agent))
        reader, writer = await asyncio.open_unix_connection("\0rehearsal")
        writer.write(b"POST /execute HTTP/1.1\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await reader.read()
        writer.close()
        server.close()


def main(plan: dict[str, Any], node: socket.socket, nursling: Nursling | None, *listeners: int) -> None:
    """Serve until killed. The walls stand already."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(_serve(plan, node, nursling, *listeners))


async def _serve(plan: dict[str, Any], node: socket.socket, nursling: Nursling | None, *listeners: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # pid 1 has no default for them, but Python had one for SIGINT
    agent = Agent(plan, nursling)
    os.mkdir(places.packages())  # before a Python looks: it would remember that there is none
    interpreter.default_context(agent, "python").start()
    if "javascript" not in languages.absent:
        interpreter.default_context(agent, "javascript")  # is listed from the beginning, and starts with its first cell
    if fonts := python_context.font_list:
        cache = Path(places.home, ".cache/matplotlib")
        cache.mkdir(parents=True)
        (cache / fonts[0]).write_bytes(fonts[1])
    ports = [socket.socket(fileno=listener) for listener in listeners]
    handlers = (envd.handler(agent), interpreter.handler(agent))
    servers = [await http.serve(port, handler) for port, handler in zip(ports, handlers, strict=True)]
    try:
        await beginning.begin(agent)
    except OSError as problem:
        node.send(str(problem).encode()[:3000])
        return
    node.send(b"ready")
    node.close()
    await asyncio.gather(*(server.serve_forever() for server in servers))
