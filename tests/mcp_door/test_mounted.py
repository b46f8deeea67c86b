"""The SDK's app is built by the first request, once, and its lifespan is left by the task that entered it."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest

from executions.mcp.door import Mounted


def mounted(log: list[str], failures: int = 0) -> Mounted:
    left = [failures]

    @contextlib.asynccontextmanager
    async def build():
        log.append("entered")
        entered_by = asyncio.current_task()

        async def app(scope, receive, send):
            log.append("served")

        yield app
        assert asyncio.current_task() is entered_by
        log.append("left")

    def attempt():
        log.append("built")
        if left[0]:
            left[0] -= 1
            raise RuntimeError("not today")
        return build()

    return Mounted(attempt)


async def test_requests_that_come_together_share_one_app_and_one_lifespan():
    log: list[str] = []
    app = mounted(log)

    await asyncio.gather(*(app({}, None, None) for _ in range(5)))
    await app.close()

    assert log == ["built", "entered", *["served"] * 5, "left"]


async def test_a_failure_is_told_to_its_callers_and_the_next_request_tries_again():
    log: list[str] = []
    app = mounted(log, failures=1)

    with pytest.raises(RuntimeError, match="not today"):
        await app({}, None, None)
    await app({}, None, None)
    await app.close()

    assert log == ["built", "built", "entered", "served", "left"]


async def test_a_first_caller_that_goes_away_leaves_the_app_to_the_others():
    log: list[str] = []
    app = mounted(log)

    first = asyncio.create_task(app({}, None, None))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    await app({}, None, None)
    await app.close()

    assert log == ["built", "entered", "served", "left"]


def test_building_the_server_leaves_the_logging_as_it_was():
    from executions.mcp import server

    before = list(logging.getLogger().handlers)

    server.build(lambda context: None, cancels=False)

    assert logging.getLogger().handlers == before
