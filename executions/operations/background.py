"""What goes on beside the requests, in every serving process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from django.conf import settings

from executions.operations import templates
from executions.operations.reap import kill_orphans, reap

ORPHANS_EVERY = 15  # rounds: listing what a provider has is a request to it
log = logging.getLogger(__name__)


async def background() -> None:
    """Reap, and keep the nodes' templates as their rows say, for ever; a round that fails is logged. Ends by being cancelled."""
    try:
        await asyncio.gather(_rounds(_reap), _rounds(_kill_orphans, every=ORPHANS_EVERY), _rounds(templates.sync))
    finally:
        await templates.stop_building()


async def _rounds(work: Callable[[], Awaitable[None]], *, every: int = 1) -> None:
    while True:
        await asyncio.sleep(settings.BACKGROUND_SECONDS * every)
        try:
            await work()
        except Exception:
            log.exception("background_round_failed")


async def _reap() -> None:
    if mended := await reap(orphans=False):
        log.info("reaped", extra={"rows": mended})


async def _kill_orphans() -> None:
    if killed := await kill_orphans():
        log.warning("orphans_killed", extra={"sandboxes": killed})
