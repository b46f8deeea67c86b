"""Whatever dies, and whatever comes at one instant: everything ends once, everything is paid, nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from asgiref.sync import async_to_sync
from django.db import connection
from django.utils import timezone

from executions import backends, faults, invariants, operations
from executions.errors import BackendUnavailable
from executions.hop import rows
from executions.models import Execution, IllegalTransition, Sandbox, Transition
from executions.operations import run
from executions.operations.reap import close_stale
from executions.operations.submit import next_attempt
from executions.states import EXECUTION_ENDED, ExecutionState
from tests.plane.conftest import asks
from tests.product import HOME, environment

E = ExecutionState
CHECKED = [(name, look) for name, _, look in invariants.OF_ROWS if name != "audit"]


def adds_up(*, but: str = "") -> None:
    found = {name: [str(wrong) for wrong in look()] for name, look in CHECKED if name != but}
    assert found == {name: [] for name in found}


@contextmanager
def another_database(data):
    """DATABASE_URL of one that is empty, on the engine of this test run."""
    if connection.vendor == "sqlite":
        yield f"sqlite:///{data}/chaos.sqlite3"
        return
    import psycopg

    url, name, where = os.environ["DATABASE_URL"], f"chaos_{os.getpid()}", connection.settings_dict
    with psycopg.connect(host=where["HOST"], user=where["USER"], dbname="postgres", autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield url.rpartition("/")[0] + f"/{name}"
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def chaos(data, *words: str) -> None:
    with another_database(data) as url:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.chaos", *words], cwd=HOME, env=environment(data, 1, None, DATABASE_URL=url),
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert " 0 planes killed" not in done.stdout


def test_a_plane_that_is_killed_between_two_steps_leaves_nothing_that_another_does_not_put_right(db, tmp_path):
    chaos(tmp_path, "3", "11")


@pytest.mark.long
def test_after_forty_deaths_nothing_is_wrong(db, tmp_path):
    chaos(tmp_path, "60", "12")


@pytest.mark.django_db(transaction=True)
def test_of_completion_timeout_cancel_and_a_reaper_at_one_instant_one_is_the_end(caller):
    for _ in range(3):
        execution = operations.submit(caller=caller, request=asks())
        sandbox = execution.sandbox
        handle = async_to_sync(backends.get("first").create)(run.spec_of(sandbox))
        run.Run(execution)._mark_running(sandbox, handle)

        def settle(state, execution=execution):
            mine = Execution.objects.select_related("sandbox", "agent").get(pk=execution.pk)
            mine.tried = list(mine.attempts.all())
            run.Run(mine)._settle(state, {}, "ran", timezone.now(), "finished", True)

        ends = together(
            lambda: settle(E.SUCCEEDED),
            lambda: settle(E.TIMED_OUT),
            lambda execution=execution: operations.request_cancel(execution=execution, reason="enough"),
            lambda execution=execution: close_stale(Execution.objects.select_related("sandbox").get(pk=execution.pk)),
        )

        late = [e for e in ends if e is not None and not isinstance(e, IllegalTransition | bool)]
        assert late == []
        assert Transition.objects.filter(execution=execution, after__in=EXECUTION_ENDED).count() == 1
    async_to_sync(operations.reap)()
    assert not Sandbox.objects.open().exists()
    adds_up()


def together(*acts) -> list:
    barrier, results = threading.Barrier(len(acts)), []

    def one(act):
        barrier.wait()
        try:
            results.append(act())
        except Exception as e:
            results.append(e)
        finally:
            connection.close()

    threads = [threading.Thread(target=one, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.django_db(transaction=True)
def test_a_request_that_is_delivered_five_times_at_once_is_one_execution(caller):
    send = lambda: operations.submit(caller=caller, request=asks(), idempotency_key="the same").pk  # noqa: E731

    results = together(*[send] * 5)

    assert len(set(results)) == 1 == Execution.objects.count(), results
    assert Sandbox.objects.count() == 1
    adds_up()


@pytest.mark.django_db
async def test_a_clock_that_jumps_ahead_does_not_make_the_living_look_dead(caller):
    execution = await admitted(caller)
    await operations.reap()

    with time_machine.travel(datetime.now(UTC) + timedelta(minutes=1)):
        await operations.reap()
        await execution.arefresh_from_db()
        assert execution.state == E.STARTING  # its runner has not been heard of since, and may yet be
        await operations.reap()

    await execution.arefresh_from_db()
    assert execution.error_code == "runner_lost"


@pytest.mark.django_db
async def test_a_clock_that_was_set_back_does_not_keep_the_dead_alive(caller):
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=3)):
        execution = await admitted(caller)
    await operations.reap()
    await operations.reap()

    await execution.arefresh_from_db()
    assert execution.error_code == "runner_lost"


async def admitted(caller) -> Execution:
    return await rows(operations.submit, caller=caller, request=asks())


@pytest.mark.django_db
async def test_a_runner_that_was_only_slow_gets_no_second_sandbox_once_it_was_thought_dead(caller):
    execution = await admitted(caller)
    slow, why = run.Run(execution), BackendUnavailable("no answer")
    await rows(slow._mark_unavailable, execution.tried[-1], why)
    await rows(lambda: close_stale(Execution.objects.select_related("sandbox").get(pk=execution.pk)))

    with pytest.raises(IllegalTransition):
        await rows(next_attempt, caller=caller, execution=execution, alias="second")

    assert await Sandbox.objects.acount() == 1
    await rows(adds_up)


@pytest.mark.django_db(transaction=True)
def test_one_row_that_cannot_be_closed_does_not_hold_up_the_others(caller):
    for _ in range(3):
        operations.submit(caller=caller, request=asks())
    Execution.objects.update(heartbeat_at=timezone.now() - timedelta(minutes=1))
    faults.arm("closing:1:raise")
    try:
        async_to_sync(operations.reap)()
    finally:
        faults.arm("")

    assert Execution.objects.open().count() == 1
    adds_up(but="owned")
    async_to_sync(operations.reap)()
    assert not Execution.objects.open().exists()
