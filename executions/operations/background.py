"""What goes on beside the requests, in every serving process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from django.conf import settings

from executions import metrics
from executions.hop import rows
from executions.operations import artifacts, deliver, locks, probe, replenish, sessions, templates, waiting
from executions.operations.reap import kill_orphans, reap
from executions.reports import totals

ORPHANS_EVERY = 15  # rounds: listing what a provider has is a request to it
METRICS_EVERY = 2
COSTS_EVERY = 5
WEBHOOKS_EVERY = 0.5
PROBES_EVERY = 0.25
PRUNE_EVERY = 150
LAG_SECONDS = 0.25
END_SECONDS = 1  # of a round of `reap`; a sandbox that takes longer to end holds up no others
log = logging.getLogger(__name__)


async def background() -> None:
    """Reap, and keep the nodes' templates as their rows say, for ever; a round that fails is logged. Ends by being cancelled."""
    try:
        await asyncio.gather(
            waiting.serve(),
            _rounds("reap", _reap),
            _rounds("orphans", _kill_orphans, every=ORPHANS_EVERY),
            _rounds("probes", probe.look, every=PROBES_EVERY),
            _rounds("pools", replenish.replenish),
            _rounds("ends", sessions.tell_ends),
            _rounds("templates", templates.sync),
            _rounds("artifacts", _prune, every=PRUNE_EVERY),
            _rounds("metrics", _flush, every=METRICS_EVERY),
            _rounds("costs", _roll_up, every=COSTS_EVERY),
            _rounds("webhooks", _tell, every=WEBHOOKS_EVERY),
            _measure_lag(),
        )
    finally:
        await deliver.stop()
        await templates.stop_building()
        await _flush()


async def _rounds(name: str, work: Callable[[], Awaitable[None]], *, every: float = 1) -> None:
    """The first round comes soon after the start: the process before this one may have died at any line."""
    await asyncio.sleep(settings.BACKGROUND_SECONDS)
    while True:
        try:
            await work()
            metrics.note("sandgate_background_last_success_timestamp_seconds", name, value=time.time())
        except Exception:
            log.exception("background_round_failed", extra={"loop": name})
        await asyncio.sleep(settings.BACKGROUND_SECONDS * every)


async def _reap() -> None:
    if mended := await reap(orphans=False, patience_seconds=END_SECONDS):
        log.info("reaped", extra={"rows": mended})


async def _kill_orphans() -> None:
    if killed := await kill_orphans():
        log.warning("orphans_killed", extra={"sandboxes": killed})


async def _prune() -> None:
    if removed := await artifacts.prune():
        log.info("artifacts_let_go", extra={"contents": removed})
    await locks.sweep()
    await rows(deliver.prune)


async def _roll_up() -> None:
    while await rows(totals.roll_up, 1) == totals.BATCH:
        pass


async def _tell() -> None:
    await deliver.look()


async def _flush() -> None:
    await rows(metrics.flush)


async def _measure_lag() -> None:
    """How late this process' event loop is: what blocks it delays every run and every answer."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(LAG_SECONDS)
        metrics.observe("sandgate_event_loop_lag_seconds", seconds=time.monotonic() - began - LAG_SECONDS)
