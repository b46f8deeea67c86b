"""Django's development server, with the local node and the background work beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from daphne.management.commands.runserver import Command as Daphne

from executions import operations
from executions.management import boot, node, screen


class Command(Daphne):
    def handle(self, *args: Any, **options: Any) -> None:
        """The node belongs to the outer process, so that it outlives the reloads of the inner one."""
        inner = os.environ.get("RUN_MAIN") == "true"
        python = None if inner else boot.template_python()
        with node.beside(node.argv(python, die_with_parent=True)) if python else contextlib.nullcontext():
            super().handle(*args, **options)

    def inner_run(self, *args: Any, **options: Any) -> None:
        from twisted.internet import reactor

        boot.database()
        with boot.alone():
            first = operations.first_start()
        self.stdout.write(screen.first(first, "") if first else screen.again(""))
        reactor.callWhenRunning(lambda: keep(asyncio.get_event_loop().create_task(operations.background())))
        super().inner_run(*args, **options)


kept: list[asyncio.Task[None]] = []
keep = kept.append  # the loop alone would let go of the task
