"""The double of E2B as a server."""

from __future__ import annotations

import asyncio
import json
import socket
from argparse import ArgumentTypeError
from contextlib import suppress
from typing import Any

import uvloop
from django.core.management.base import BaseCommand, CommandError

from executions.gateway.double.app import serve
from executions.gateway.double.cloud import Cloud
from executions.gateway.double.faults import PLANS, Faults
from executions.management import boot

SCREEN = """E2B's double is at {url}: nothing runs in it, and it is as late and unreliable as it is told to be.

export E2B_API_URL={url}
export E2B_SANDBOX_URL={url}
export E2B_API_KEY={key}

Faults: curl -X POST {url}/_double/faults -d '{{"vanish": 0.02}}'
Meter:  curl {url}/_double/meter
Ctrl-C ends it."""


def size(text: str) -> tuple[str, tuple[int, int]]:
    name, _, rest = text.partition("=")
    cpus, _, memory = rest.partition("x")
    if not (name and cpus.isdigit() and memory.isdigit()):
        raise ArgumentTypeError("NAME=CPUSxMIB, for example mine=2x512")
    return name, (int(cpus), int(memory))


class Command(BaseCommand):
    help = "Serve a double of E2B for tests and drills: its API, late and unreliable as told, with a meter. Needs no database."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--port", type=int, default=3030, help="0: any that is free")
        parser.add_argument("--bind", default="127.0.0.1")
        parser.add_argument("--key", action="append", default=[], help="accepted; may be repeated. None: any key is")
        parser.add_argument(
            "--plan", choices=PLANS, default="none", help="concurrency and creation rate as E2B's plans"
        )
        parser.add_argument("--faults", type=json.loads, default={}, help="a JSON object, as for /_double/faults")
        parser.add_argument("--template", type=size, action="append", default=[], help="NAME=CPUSxMIB, may be repeated")
        parser.add_argument("--seed", type=int, help="of chance, for the same faults again")

    def handle(self, **options: Any) -> None:
        faults = Faults()
        try:
            faults.change(PLANS[options["plan"]])
            faults.change(options["faults"])
        except ValueError as e:
            raise CommandError(str(e)) from None
        boot.many_files()
        cloud = Cloud(faults, keys=options["key"], templates=dict(options["template"]), seed=options["seed"])
        key = options["key"][0] if options["key"] else "e2b_" + "0" * 40

        try:
            listening = socket.create_server((options["bind"], options["port"]), backlog=2048)
        except OSError as e:
            raise CommandError(f"{options['bind']}:{options['port']} cannot be listened on ({e.strerror}).") from None
        self.stdout.write(SCREEN.format(url=f"http://{options['bind']}:{listening.getsockname()[1]}", key=key))
        self.stdout.flush()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, suppress(KeyboardInterrupt):
            runner.run(serve(cloud, listening))
