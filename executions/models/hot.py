"""Statements that run several times in every execution, as SQL: the ORM takes about ten times as long to write them.

Each has its ORM twin in tests/test_hot.py, which is held to give the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.db import connection


def _moment(at: datetime) -> Any:
    return connection.ops.adapt_datetimefield_value(at)


def insert_transitions(subject: str, pk: str, steps: Iterable[tuple[str, str]], reason: str, at: datetime) -> None:
    """One Transition row for each (before, after); `subject` is "execution" or "sandbox"."""
    columns = {"execution": "execution_id", "sandbox": "sandbox_id"}
    statement = f'INSERT INTO executions_transition ({columns[subject]}, "before", "after", reason, at) VALUES (%s, %s, %s, %s, %s)'
    with connection.cursor() as cursor:
        for before, after in steps:
            cursor.execute(statement, [pk, str(before), str(after), reason[:200], _moment(at)])


def count_open(table: str, scope: str | None, scope_id: Any) -> int:
    """Rows without an end in `table` ("execution" or "sandbox") of one team, agent or key; of all for scope None."""
    tables = {"execution": "executions_execution", "sandbox": "executions_sandbox"}
    columns = {"team": "team_id", "agent": "agent_id", "key": "key_id"}
    statement = f"SELECT COUNT(*) FROM {tables[table]} WHERE ended_at IS NULL"
    with connection.cursor() as cursor:
        if scope is None:
            cursor.execute(statement)
        else:
            cursor.execute(f"{statement} AND {columns[scope]} = %s", [scope_id])
        return cursor.fetchone()[0]


def prices(backend: str, at: datetime) -> dict[str, int]:
    """Meter to nano-dollars, as valid at that moment; the youngest of several valid ones."""
    moment = _moment(at)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT meter, nano_usd FROM executions_rate WHERE backend = %s AND valid_from <= %s"
            " AND (valid_to IS NULL OR valid_to > %s) ORDER BY valid_from",
            [backend, moment, moment],
        )
        return dict(cursor.fetchall())
