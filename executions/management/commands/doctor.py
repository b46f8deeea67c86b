"""What this machine has, what it lacks, and what to type."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor

from executions import backends
from executions.backends import local
from executions.backends.local import environment
from executions.management import boot, walls
from executions.management.screen import sentence
from executions.states import ISOLATION


class Finding(NamedTuple):
    name: str
    state: str  # "ok", "missing" (something is worse without it) or "broken" (Sandgate cannot work)
    words: str
    remedy: str = ""


class Command(BaseCommand):
    help = "Try every part that Sandgate needs on this machine; for what is missing, say what to type."
    requires_system_checks = ()  # a doctor examines the ill too

    def handle(self, **options: Any) -> None:
        findings = [*python(), *data(), *database(), *redis(), *template(), *sandboxes()]
        for finding in findings:
            mark = {"ok": "ok", "missing": "--", "broken": "!!"}[finding.state]
            self.stdout.write(f"{mark}  {finding.name:<22} {finding.words}")
            if finding.remedy:
                for number, line in enumerate(finding.remedy.splitlines()):
                    self.stdout.write(f"{'':26} {'→' if not number else ' '} {line}")
        if any(finding.state == "broken" for finding in findings):
            sys.exit(1)


def python() -> Iterator[Finding]:
    yield Finding("Python", "ok", sys.version.split()[0])
    new = sqlite3.sqlite_version_info >= (3, 35)
    yield Finding(
        "SQLite", "ok" if new else "broken", sqlite3.sqlite_version, "" if new else "use Python with SQLite ≥ 3.35"
    )


def data() -> Iterator[Finding]:
    folder = settings.DATA
    free = shutil.disk_usage(folder if folder.exists() else settings.BASE_DIR).free
    if not os.access(folder, os.W_OK):
        yield Finding("data folder", "broken", f"{folder} cannot be written", f"sudo chown -R $(id -un) {folder}")
    elif free < boot.NEEDED_BYTES:
        yield Finding("data folder", "broken", f"{folder}: {free >> 20} MB free", f"df -h {folder}")
    else:
        yield Finding("data folder", "ok", f"{folder}, {free / 2**30:.1f} GB free")


def database() -> Iterator[Finding]:
    try:
        executor = MigrationExecutor(connection)
        waiting = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except DatabaseError as e:
        yield Finding("database", "broken", f"{connection.vendor}: {e}".strip(), "see DATABASE_URL and that it runs")
        return
    finally:
        connection.close()
    if waiting:
        words = f"{connection.vendor}, {len(waiting)} migrations wait"
        yield Finding("database", "missing", words, "python manage.py migrate   (serve does it by itself)")
    else:
        yield Finding("database", "ok", connection.vendor)


def redis() -> Iterator[Finding]:
    if not settings.REDIS_URL:
        yield Finding("Redis", "ok", "not configured; one process needs none")
        return
    from redis import Redis, RedisError

    try:
        Redis.from_url(settings.REDIS_URL, socket_timeout=3).ping()
        yield Finding("Redis", "ok", "answers")
    except RedisError as e:
        yield Finding("Redis", "broken", str(e), "see REDIS_URL and that it runs")


def template() -> Iterator[Finding]:
    if settings.TEMPLATE_PYTHON:
        yield Finding("sandboxes' packages", "ok", f"named: {settings.TEMPLATE_PYTHON}")
    elif environment.is_made(boot.TEMPLATES):
        yield Finding("sandboxes' packages", "ok", str(environment.python_of(boot.TEMPLATES).parent.parent))
    else:
        yield Finding("sandboxes' packages", "missing", "not installed", "python manage.py sandbox_node --prepare")


def sandboxes() -> Iterator[Finding]:
    """Every configured backend, asked; the local one with its walls, each tried here and now where no node says."""
    for alias, check in asyncio.run(all_checks()).items():
        here = alias == "local"
        isolation, found = check.isolation, check.walls
        if here and not found:
            try:
                looked = local.look()
                isolation, found = looked["isolation"], looked["walls"]
            except OSError as e:
                yield Finding("local runtime", "missing", str(e))
        remedy = (
            "" if check.ok else "make run   (it starts the node)" if here and not check.walls else "see its settings"
        )
        if here and ISOLATION.index(isolation or "none") < ISOLATION.index(settings.ISOLATION_FLOOR):
            remedy = f"what is missing below; or weaker walls: SANDGATE_ISOLATION_FLOOR={isolation} make run"
        words = " ".join(filter(None, [isolation, check.detail])) or ("answers" if check.ok else "no answer")
        yield Finding(f"backend {alias}", "ok" if check.ok else "missing", words, remedy)
        for wall, state in found.items():
            if state is True:
                yield Finding(f"  {wall}", "ok", "stands")
            else:
                yield Finding(f"  {wall}", "missing", sentence(state), walls.remedy(wall))
    if not settings.E2B_API_KEY:
        yield Finding("backend e2b", "missing", "no key", "export E2B_API_KEY=e2b_…   (from e2b.dev, or your own E2B)")


async def all_checks() -> dict[str, Any]:
    try:
        return {alias: await backends.get(alias).check() for alias in backends.aliases()}
    finally:
        await backends.close_all()
