"""Several machines that share one PostgreSQL and one Redis: web processes, workers and nodes, as an operator starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests import servers
from tests.product import HOME, environment

PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from executions import operations
from executions.models import Agent, Quota
first = operations.first_start()
Agent.objects.update(isolation_floor="none")
Quota.objects.update(limit=10**15)
print(first.token)
"""


@dataclass
class Fleet:
    """One database and one doorbell; machines are data folders."""

    folder: Path
    more: dict[str, str]
    stack: ExitStack
    token: str = ""
    urls: dict[str, str] = field(default_factory=dict)  # of web processes that live on

    def env(self, machine: str, port: int = 1, python: Path | None = None, **more: str) -> dict[str, str]:
        data = self.folder / machine
        return environment(data, port, python, **self.more, SANDGATE_NODE=machine, **more)

    def ask(self, program: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", program]
        return subprocess.run(
            command, cwd=HOME, env=self.env("a"), capture_output=True, text=True, check=True
        ).stdout.strip()

    def web(self, machine: str) -> tuple[str, subprocess.Popen[str]]:
        """uvicorn alone: it does no background work and claims nothing."""
        port = servers.free_port()
        command = [sys.executable, "-m", "uvicorn", "config.asgi:application", "--port", str(port)]
        running = servers.running(command, ready="running on", cwd=HOME, env=self.env(machine, port))
        return f"http://127.0.0.1:{port}", self.stack.enter_context(running)

    def worker(self, machine: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "manage.py", "worker"]
        return self.stack.enter_context(servers.running(command, ready="Working", cwd=HOME, env=self.env(machine)))

    def whole(self, machine: str, python: Path) -> str:
        """`serve` with a node: web, worker and local sandboxes of one machine."""
        port = servers.free_port()
        command = [sys.executable, "-u", "manage.py", "serve"]
        running = servers.running(command, ready="Ctrl-C ends it", cwd=HOME, env=self.env(machine, port, python))
        self.stack.enter_context(running)
        return f"http://127.0.0.1:{port}"

    def http(self, url: str) -> httpx.Client:
        return httpx.Client(**self._as(url))

    def many(self, url: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._as(url))

    def _as(self, url: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"}
        return {"base_url": url, "headers": headers, "timeout": 60, "trust_env": False}


@contextmanager
def running_fleet() -> Iterator[Fleet]:
    with ExitStack() as stack:
        more = {
            "DATABASE_URL": stack.enter_context(servers.postgresql()),
            "REDIS_URL": stack.enter_context(servers.redis()),
            "SECRET_KEY": "of-all-machines-" + "x" * 50,
            "SANDGATE_SCRIPTED": "1",
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "SANDGATE_LOG_LEVEL": "WARNING",
        }
        found = Fleet(stack.enter_context(servers.folder()), more, stack)
        found.token = found.ask(PREPARE)
        yield found
