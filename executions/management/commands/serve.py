"""Sandgate in one terminal: web, background work and the local node."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from typing import Any

import structlog
import uvicorn
from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import connections

from executions import backends, hop, operations
from executions.management import boot, node, screen

log = structlog.get_logger(__name__)


class Command(BaseCommand):
    help = "Run Sandgate in this terminal: web, background work and the local node. Ctrl-C ends all of it."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--no-node", action="store_true", help="the node is a unit of its own (sandbox_node)")

    def handle(self, **options: Any) -> None:
        boot.data_folder()
        listening = boot.listening()
        boot.database()
        boot.many_files()
        python = None if options["no_node"] else boot.template_python()
        command = node.argv(python, die_with_parent=True) if python else None
        with boot.alone():
            first = operations.first_start()  # last, as its key is shown once

        connections.close_all()  # the loop's thread has none: rows are read elsewhere
        config = uvicorn.Config(
            "config.asgi:application",
            loop="uvloop",
            http="httptools",
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=300,  # as long as E2B's SDKs hold an idle connection; shorter, and they meet a closed one
            timeout_graceful_shutdown=3,  # an open stream must not keep the process
        )
        server = Serving(config)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)  # uvicorn raises what it caught again: exit code 0, not 143
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            ended_well = runner.run(serve(server, listening, command, first))
        hop.close()
        if not ended_well:
            sys.exit(1)


class Serving(uvicorn.Server):
    """uvicorn, ending the runs with it."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for name in ("uvicorn.error", "asyncio"):  # streams that are cut off now are cut off on purpose
            logging.getLogger(name).setLevel(logging.CRITICAL)
        operations.stop_taking()
        draining = asyncio.create_task(operations.drain(1))  # whoever waits for a run still gets its answer
        await super().shutdown(sockets)
        await draining


async def serve(
    server: Serving, listening: socket.socket, command: list[str] | None, first: operations.FirstStart | None
) -> bool:
    """Serve until a signal; False when a part that must not end has ended by itself."""
    server.config.load()
    gc.collect()
    gc.freeze()  # what was loaded lives on: to walk through it takes 80 ms, in which nothing else goes on
    gc.set_threshold(10_000, 10, 10)
    web = asyncio.create_task(server.serve(sockets=[listening]))
    beside = [asyncio.create_task(operations.background())]
    if command:
        beside.append(asyncio.create_task(node.kept_running(command)))
    beside.append(asyncio.create_task(tell(first, bool(command))))
    ended, _ = await asyncio.wait([web, beside[0]], return_when=asyncio.FIRST_COMPLETED)
    if web not in ended:
        log.error("The background work ended by itself; so does the server", exc_info=beside[0].exception())
        server.should_exit = True
        await web
    for task in beside:
        task.cancel()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*beside, return_exceptions=True), 3)
    await backends.close_all()
    return web in ended and web.exception() is None


async def tell(first: operations.FirstStart | None, node_starts: bool) -> None:
    """Show the screen once what it says can be typed: when the node answers, or after some seconds without."""
    local = ""
    if "local" in settings.SANDBOXES:
        local_backend = backends.get("local")
        check = await local_backend.check()
        deadline = time.monotonic() + (20 if node_starts else 0)
        while not (check.ok or local_backend.refusal) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            check = await local_backend.check()
        local = screen.walls(check, local_backend.refusal)
    print(screen.first(first, local) if first else screen.again(local), flush=True)
