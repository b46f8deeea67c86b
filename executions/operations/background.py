"""What goes on beside the requests, in every serving process."""

from __future__ import annotations

import asyncio
import logging

from django.conf import settings

from executions.operations.reap import reap

log = logging.getLogger(__name__)


async def background() -> None:
    """Reap for ever; a round that fails is logged and the next one comes. Ends by being cancelled."""
    while True:
        await asyncio.sleep(settings.BACKGROUND_SECONDS)
        try:
            if mended := await reap():
                log.info("reaped", extra={"rows": mended})
        except Exception:
            log.exception("background_round_failed")
