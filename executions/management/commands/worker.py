"""The background work as a unit of its own, for web processes that uvicorn or daphne has started."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any

from django.core.management.base import BaseCommand

from executions import backends, hop, operations
from executions.management import boot

DRAIN_SECONDS = 3


class Command(BaseCommand):
    help = "Do what goes on beside the requests: run what was left, start what waits, fill pools, reap, add up. Any number."

    def handle(self, **options: Any) -> None:
        boot.data_folder()
        boot.database()
        boot.many_files()
        asyncio.run(work(lambda: self.stdout.write("Working. Ctrl-C ends it.")))
        hop.close()


async def work(say: Any) -> None:
    """Work until a signal; what has been started here is given some seconds to end."""
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    working, told = asyncio.create_task(operations.background()), asyncio.create_task(ended.wait())
    say()
    await asyncio.wait([working, told], return_when=asyncio.FIRST_COMPLETED)
    operations.stop_taking()  # first of all
    for task in (working, told):
        task.cancel()
    await operations.drain(DRAIN_SECONDS)
    for task in (working, told):
        with contextlib.suppress(asyncio.CancelledError):
            await task  # it must not end by itself: if it has, this raises what it died of
    await backends.close_all()
