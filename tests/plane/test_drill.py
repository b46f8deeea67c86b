"""A drill shows what an outage would do, and leaves nothing behind."""

import asyncio
import json

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from executions import breaker, operations
from executions.errors import Invalid
from executions.hop import rows
from executions.management.commands import outage_drill as command
from executions.models import BackendState
from executions.operations import drill
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db


async def steadily(caller, until: asyncio.Event, **fields) -> list:
    """One run after the other, until it is enough."""
    shapes = []
    while not until.is_set():
        shapes.append(await operations.execute(caller=caller, request=asks(**fields)))
        await asyncio.sleep(0.01)
    return shapes


async def drilled(caller, **fields) -> tuple[drill.Report, list, list[str]]:
    enough, said = asyncio.Event(), []
    load = asyncio.create_task(steadily(caller, enough, **fields))
    report = await operations.outage_drill(alias="first", seconds=1, by="ada", hear=said.append)
    enough.set()
    return report, await load, said


async def test_the_report_says_what_moved_where_and_how_long_it_took(caller):
    report, shapes, said = await drilled(caller)

    assert report.passed
    assert report.opened_after_seconds < 1
    assert report.recovered_after_seconds < 6
    assert report.served_again_after_seconds < 8
    assert report.executions == sum(report.states.values()) == report.moved["second"] + report.stayed
    assert (report.not_served, report.ran_twice, report.refused) == ([], [], {})
    assert {shape.state for shape in shapes} == {"succeeded"}
    assert shapes[-1].backend == "first"
    assert said[0] == "first is out from now on, as a drill; what runs there goes on."
    assert "moved                 " + f"{report.moved['second']} to second" in command.text(report)
    assert json.loads(command.as_json(report))["passed"] is True


async def test_what_has_nowhere_to_go_is_refused_and_counted_with_its_reason(caller):
    from executions.errors import NoBackend

    async def refused(until: asyncio.Event) -> int:
        count = 0
        while not until.is_set():
            try:
                await operations.execute(caller=caller, request=asks(route=["first"]))
            except NoBackend:
                count += 1
            await asyncio.sleep(0.01)
        return count

    enough = asyncio.Event()
    load = asyncio.create_task(refused(enough))
    report = await operations.outage_drill(alias="first", seconds=4, by="ada")
    enough.set()
    count = await load

    ((why, times),) = report.refused.items()
    assert (times, report.moved) == (count, {})
    assert "first: out since" in why
    assert len(report.not_served) == breaker.FAILURES  # those that found it out


async def test_without_runs_it_says_that_nothing_could_be_seen(caller):
    report = await operations.outage_drill(alias="first", seconds=1, by="ada")

    assert report.passed
    assert report.opened_after_seconds is None
    assert "never: too little ran" in command.text(report)


async def test_a_drill_that_is_stopped_is_lifted(caller):
    drilling = asyncio.create_task(operations.outage_drill(alias="first", seconds=600, by="ada"))
    async with asyncio.timeout(5):
        while not await BackendState.objects.filter(drill_until__gt=timezone.now()).aexists():
            await asyncio.sleep(0.01)
    drilling.cancel()
    await asyncio.wait({drilling})

    assert (await BackendState.objects.aget()).drill_until is None


@pytest.mark.parametrize(("alias", "seconds"), [("mars", 5), ("first", 0), ("first", 601)])
async def test_what_cannot_be_played_is_refused(caller, alias, seconds):
    with pytest.raises(Invalid):
        await operations.outage_drill(alias=alias, seconds=seconds, by="ada")


async def test_a_backend_that_is_out_needs_no_drill(caller):
    await rows(breaker.failed, "first", "503", began=timezone.now(), retry_after=60)

    with pytest.raises(Invalid, match="nothing to play"):
        await operations.outage_drill(alias="first", seconds=5, by="ada")


@pytest.mark.django_db(transaction=True)
def test_the_command_refuses_with_a_sentence(caller):
    with pytest.raises(CommandError, match="There is no backend 'mars'"):
        call_command("outage_drill", "--alias", "mars")
