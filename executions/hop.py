"""The one way from async code to the ORM."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import InterfaceError, OperationalError, close_old_connections, connections

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_SECONDS = 30.0
AGAIN_SECONDS = 0.25
SAID_SECONDS = 5
log = logging.getLogger(__name__)
_said_at = -math.inf
_pool: ThreadPoolExecutor | None = None


def pool() -> ThreadPoolExecutor:
    """About four threads, each with a database connection of its own."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=settings.HOP_THREADS, thread_name_prefix="rows")
    return _pool


async def rows(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run one synchronous unit of database work on the hop's own threads.

    Django's default hop runs everything on one thread outside a request, so that one slow query delays
    every other; inside requests it opens a thread and a connection for each.
    """
    if settings.HOP_INLINE:  # tests inside one transaction: the caller's own thread and connection
        return await sync_to_async(fn, thread_sensitive=True)(*args, **kwargs)

    def unit() -> R:
        close_old_connections()  # those on which something failed
        try:
            return fn(*args, **kwargs)
        finally:
            for connection in connections.all(initialized_only=True):
                connection.close_at = None  # these few threads keep theirs, also out of a pool

    return await asyncio.get_running_loop().run_in_executor(pool(), copy_context().run, unit)


async def surely(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """As `rows`, and again while the database is away or has no room, for at most PATIENCE_SECONDS.

    For what is read only, and for what may be tried again although it may have been done: a lost answer is no answer.
    """
    ends = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await rows(fn, *args, **kwargs)
        except (OperationalError, InterfaceError) as e:
            if time.monotonic() > ends:
                raise
            _say_away(e)
        await asyncio.sleep(AGAIN_SECONDS)


def _say_away(error: Exception) -> None:
    """Once in a while: hundreds may be waiting."""
    global _said_at
    if time.monotonic() - _said_at > SAID_SECONDS:
        _said_at = time.monotonic()
        log.warning("database_away", extra={"error": str(error).partition("\n")[0][:200]})


def close() -> None:
    """End the hop's threads and their connections (shutdown, end of a test run)."""
    global _pool
    if _pool is None:
        return
    ending, _pool = _pool, None
    threads = len(ending._threads)
    together = threading.Barrier(threads) if threads else None  # so that each thread closes its own

    def let_go(_: int) -> None:
        assert together is not None
        together.wait(timeout=10)
        connections.close_all()

    list(ending.map(let_go, range(threads)))
    ending.shutdown(wait=True)
