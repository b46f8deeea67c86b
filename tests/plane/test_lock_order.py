"""Whoever needs several rows takes them in one order: else two wait for each other, and PostgreSQL ends one of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from django.db import connection, transaction

from executions import operations, quotas
from executions.models import BackendState, Execution, Quota, Sandbox
from executions.operations import batch
from executions.states import Unit
from tests.plane.conftest import asks
from tests.plane.test_quotas import race

pytestmark = pytest.mark.django_db(transaction=True)


def beside(act: Callable[[], object]) -> tuple[threading.Thread, list]:
    """Have it done on another connection, where it now waits for a row that this transaction holds."""
    results: list = []
    thread = threading.Thread(target=lambda: results.extend(race(1, act)))
    thread.start()
    if connection.vendor != "postgresql":  # SQLite's transactions wait for each other whole
        return thread, results
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    until = time.monotonic() + 30
    with connection.cursor() as cursor:
        while not cursor.execute(waiting).fetchone()[0]:
            assert thread.is_alive(), results
            assert time.monotonic() < until
    return thread, results


def test_a_change_of_a_quota_of_each_reaches_a_row_when_it_is_that_rows_turn(caller):
    first = Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=100)
    each = Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=100, each=Quota.USER)
    operations.submit(caller=caller, request=asks(user="ann"))
    own = Quota.objects.get(parent=each)
    Quota.objects.filter(pk=each.pk).update(limit=50)

    with transaction.atomic():  # as one that was admitted a moment before the change
        list(Quota.objects.select_for_update().filter(pk=first.pk))
        thread, results = beside(lambda: operations.submit(caller=caller, request=asks(user="ann")))
        list(Quota.objects.select_for_update().filter(pk=own.pk))
    thread.join()

    assert [type(result) for result in results] == [Execution], results
    own.refresh_from_db()
    assert (own.limit, own.used) == (50, 2)


def test_the_first_request_of_an_end_user_and_a_batch_that_names_them_too_do_not_meet_head_on(caller):
    Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=100)
    each = Quota.objects.create(team=caller.team, unit=Unit.EXECUTIONS, limit=100, each=Quota.USER)
    ann = replace(caller, user="ann")

    with transaction.atomic():
        batch._lock(ann, [])
        thread, results = beside(lambda: operations.submit(caller=caller, request=asks(user="ann")))
        quotas.take(ann, executions=1)
    thread.join()

    assert [type(result) for result in results] == [Execution], results
    assert Quota.objects.get(parent=each).used == 2


def test_a_backend_that_is_full_is_let_go_of_before_the_next_is_asked(caller, behave):
    for alias in ("first", "second"):
        behave(alias, CONCURRENCY=1)
        operations.submit(caller=caller, request=asks(route=[alias]))

    with transaction.atomic():  # as one whose route has them the other way round
        list(BackendState.objects.select_for_update().filter(alias="second"))
        thread, results = beside(lambda: operations.submit(caller=caller, request=asks(route=["first", "second"])))
        list(BackendState.objects.select_for_update().filter(alias="first"))
    thread.join()

    assert [type(result) for result in results] == [Execution], results
    assert results[0].waits
    assert Sandbox.objects.count() == 2
