"""Whatever dies, and whatever comes at one instant: everything ends once, everything is paid, nothing is left."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from asgiref.sync import async_to_sync
from django.db import InterfaceError, OperationalError, connection
from django.utils import timezone

from executions import backends, errors, faults, hop, invariants, journal, operations
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


# A database that is away for a moment


def fails(monkeypatch, owner, name: str, times: int = 2, when=lambda *_: True) -> list[str]:
    """What it does is done, and nobody hears of it: the connection is lost, so many times."""
    real, failed = getattr(owner, name), list[str]()

    def lost(*args, **kwargs):
        done = real(*args, **kwargs)
        if len(failed) < times and when(*args):
            failed.append(name)
            raise OperationalError("server closed the connection unexpectedly")
        return done

    monkeypatch.setattr(owner, name, lost)
    return failed


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        pytest.param(Execution, "advance", lambda *_: True, id="before it is known to run"),
        pytest.param(journal, "write", lambda *_: True, id="while it runs"),
        pytest.param(faults, "point", lambda name: name == "settling", id="as it ends"),
        pytest.param(run.Run, "_write", lambda *_: True, id="once its output was written"),
        pytest.param(run.Run, "_settle", lambda *_: True, id="once its end was written"),
    ],
)
@pytest.mark.django_db(transaction=True)
async def test_a_run_survives_a_database_that_is_away_for_a_moment(caller, monkeypatch, owner, name, when):
    monkeypatch.setattr(hop, "AGAIN_SECONDS", 0.01)
    failed = fails(monkeypatch, owner, name, when=when)
    code = "#> first\n#~ 0.3\n#> last\n#= 7"

    told = await operations.execute(caller=caller, request=asks(code))

    assert failed
    assert (told.state, told.logs.stdout, told.results) == ("succeeded", "first\nlast\n", [{"text/plain": "7"}])
    assert await rows(lambda: [e.kind for e in journal.read(told.id)]) == ["stdout", "stdout", "result"]
    assert [attempt.outcome for attempt in told.attempts] == ["ran"]
    assert not await Sandbox.objects.open().aexists()
    await rows(adds_up)


@pytest.mark.django_db(transaction=True)
async def test_a_database_that_stays_away_ends_the_run_by_its_name(caller, monkeypatch):
    monkeypatch.setattr(hop, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(hop, "PATIENCE_SECONDS", 0.05)
    fails(
        monkeypatch, journal, "write", times=1000, when=lambda batch: bool(batch) and batch[0].data["text"] == "first\n"
    )

    told = await operations.execute(caller=caller, request=asks("#> first\n#~ 5"))

    assert (told.state, told.error_code) == ("errored", "database_away")


def because(name: str) -> OperationalError:
    """As Django tells an error of SQLite's."""
    cause = sqlite3.OperationalError()
    cause.sqlite_errorname = name
    error = OperationalError()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (because("SQLITE_FULL"), 507, "storage_full"),
        (because("SQLITE_IOERR_WRITE"), 507, "storage_full"),  # as a quota of a folder says it
        (because("SQLITE_BUSY"), 503, "database_away"),
        (OSError(errno.ENOSPC, "No space left on device"), 507, "storage_full"),
        (OperationalError("connection failed"), 503, "database_away"),
        (InterfaceError("connection already closed"), 503, "database_away"),
        (ValueError("a mistake of ours"), 500, "internal"),
    ],
)
def test_what_nobody_expected_says_whether_it_is_the_disk_or_the_database(error, status, code):
    said = errors.ours(error).problem()

    assert (said["status"], said["code"]) == (status, code)
    assert ("retry_after" in said) == (status != 500)


# A doorbell that is out of order


class Deaf:
    """A channel layer that is gone, or hangs."""

    def __init__(self, hangs: bool) -> None:
        self.hangs, self.asked = hangs, 0

    def __getattr__(self, name: str):
        async def gone(*_):
            self.asked += 1
            if self.hangs:
                await asyncio.Event().wait()
            raise ConnectionError

        return gone


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.django_db(transaction=True)
async def test_a_doorbell_that_is_out_of_order_holds_up_no_run_and_is_spared_for_a_while(caller, monkeypatch, hangs):
    layer = Deaf(hangs)
    monkeypatch.setattr(journal, "get_channel_layer", lambda: layer)
    monkeypatch.setattr(journal, "RING_SECONDS", 0.05)
    monkeypatch.setattr(journal, "SILENT_SECONDS", 1000)
    monkeypatch.setattr(journal, "_silent_until", 0.0)

    told = [await operations.execute(caller=caller, request=asks("#> a\n#~ 0.2\n#> b")) for _ in range(2)]
    async with journal.Doorbell(told[0].id) as bell:
        rang = await bell.wait(0.01)

    assert [one.state for one in told] == ["succeeded", "succeeded"]
    assert rang is False
    assert layer.asked == 2  # one ring of at least four, and the bell
