"""The hop from async code to the ORM, and the test database under it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from django.db import connection

from executions.hop import rows
from executions.models import Team


@pytest.mark.django_db
async def test_rows_sees_what_the_test_has_written(team):
    assert await rows(Team.objects.count) == 1


@pytest.mark.django_db(transaction=True)
async def test_rows_of_many_tasks_run_beside_each_other():
    together = threading.Barrier(3, timeout=10)

    await asyncio.gather(*(rows(together.wait) for _ in range(3)))


@pytest.mark.django_db(transaction=True)
async def test_what_one_unit_commits_the_next_one_sees():
    await rows(Team.objects.create, name="Engines")

    assert await rows(Team.objects.count) == 1


@pytest.mark.django_db
def test_the_test_database_is_real_enough_for_races():
    name = str(connection.settings_dict["NAME"])

    assert connection.vendor == "postgresql" or name.endswith(".sqlite3") or "test.sqlite3" in name
