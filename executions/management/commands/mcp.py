"""The tools of /mcp for a client that starts a process: one client on standard input and output."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from django.core.management.base import BaseCommand

from executions import backends, hop, keys, operations
from executions.errors import SandgateError
from executions.hop import rows
from executions.keys import Caller
from executions.management import boot


class Command(BaseCommand):
    help = "Serve MCP on standard input and output, with the key in SANDGATE_API_KEY. `manage.py serve` runs beside it."

    def handle(self, **options: Any) -> None:
        boot.data_folder()
        boot.database()
        try:
            asyncio.run(serve())
        except SandgateError as e:
            boot.unable(e.sentence(), "export SANDGATE_API_KEY=sg_…   (keys are made in the console)")
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            hop.close()


def caller() -> Caller:
    """Whoever the key is for; looked up for each call, so that a revoked key ends here too. Raises Refused."""
    found = keys.authenticate(os.environ.get("SANDGATE_API_KEY"), door="mcp")
    return found.acting_as(os.environ.get("SANDGATE_AGENT"))


async def serve() -> None:
    route = (await rows(operations.offer, await rows(caller)))["route"]
    if route == ["local"] and not (await backends.get("local").check()).ok:
        boot.unable(
            "The local runtime's node does not run, and this key's agent has no other backend.",
            "python manage.py serve   (or the node alone: python manage.py sandbox_node)",
        )
    from executions.mcp import server

    await server.over_stdio(caller_of=lambda context: rows(caller))
    await operations.drain(0)  # the client is gone: what runs here has nobody to end it later
    await backends.close_all()
