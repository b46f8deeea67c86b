"""Statements that run several times in every execution, as SQL: the ORM takes about ten times as long to write them.

Each has its ORM twin in tests/test_hot.py, which is held to give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

from django.db import connection, models
from django.db.models.query import get_related_populators

AT_ONCE = 200  # rows of one INSERT


_held: ContextVar[list[tuple[str, list[Any]]] | None] = ContextVar("held", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Hold back what is only written, and send it with the next statement that has an answer, or at the end.

    PostgreSQL takes them all in one round trip; SQLite has none to save. A statement that must see them runs outside.
    """
    if connection.vendor != "postgresql" or _held.get() is not None:
        yield
        return
    held: list[tuple[str, list[Any]]] = []
    mine = _held.set(held)
    try:
        yield
        if held:
            _send(held)
    finally:
        _held.reset(mine)


def _write(statement: str, values: Sequence[Any]) -> None:
    held = _held.get()
    if held is None:
        with connection.cursor() as cursor:
            cursor.execute(statement, values)
    else:
        held.append((statement, list(values)))


def _count(statement: str, values: Sequence[Any]) -> int:
    """How many rows it has changed."""
    held = _held.get()
    if held is None:
        held = []
    held.append((statement, list(values)))
    return _send(held)


def _send(held: list[tuple[str, list[Any]]]) -> int:
    """Send them all; how many rows the last one has changed."""
    several = len(held) > 1
    with connection.cursor() as cursor:
        if several:
            cursor.execute(_joined(held))
        else:
            cursor.execute(*held[0])
        held.clear()
        while several and cursor.nextset():
            pass
        return cursor.rowcount


def _joined(held: list[tuple[str, list[Any]]]) -> Any:
    """One text for PostgreSQL, as its driver would make it; the driver takes statements of this length apart each time."""
    from psycopg.adapt import Transformer

    literal = Transformer(connection.connection).as_literal
    texts = []
    for statement, values in held:
        first, *rest = _pieces(statement)
        texts.append(first + b"".join(literal(value) + piece for value, piece in zip(values, rest, strict=True)))
    return b"; ".join(texts)


@lru_cache(500)
def _pieces(statement: str) -> list[bytes]:
    return [piece.encode() for piece in statement.split("%s")]


@cache
def _insertion(model: type[models.Model], vendor: str) -> tuple[str, str, list[models.Field]]:
    quote = connection.ops.quote_name
    fields = [f for f in model._meta.concrete_fields if not isinstance(f, models.AutoField)]
    columns = ", ".join(quote(str(f.column)) for f in fields)
    return (
        f"INSERT INTO {quote(model._meta.db_table)} ({columns}) VALUES ",
        f"({', '.join(['%s'] * len(fields))})",
        fields,
    )


def insert(rows: Sequence[models.Model]) -> None:
    """Insert rows of one model. A row whose key the database would number does not learn its number."""
    for start in range(0, len(rows), AT_ONCE):
        batch = rows[start : start + AT_ONCE]
        statement, places, fields = _insertion(type(batch[0]), connection.vendor)
        values = [_adapted(f.get_db_prep_save(f.pre_save(row, True), connection)) for row in batch for f in fields]
        _write(statement + ", ".join([places] * len(batch)), values)
        for row in batch:
            row._state.adding = False
            row._state.db = connection.alias


class Compiled:
    """A queryset that Django compiles once; each call fills in the parameters and gives whole model instances.

    Writing the SQL is four fifths of what a small SELECT costs. `build` is called with one text per parameter and must
    put each into the query as it is (keys and the like are texts here).
    """

    def __init__(self, build: Callable[..., models.QuerySet]) -> None:
        self.build = build
        self.prepared: dict[str, tuple] = {}  # by vendor

    def __call__(self, *values: str) -> list[Any]:
        statement, order, read = self.prepared.get(connection.vendor) or self._prepare(len(values))
        with connection.cursor() as cursor:
            cursor.execute(statement, [values[n] if isinstance(n, int) else n[0] for n in order])
            return [read(list(row)) for row in cursor.fetchall()]

    def _prepare(self, count: int) -> tuple:
        marks = [f"parameter {n}" for n in range(count)]
        compiler = self.build(*marks).query.get_compiler(connection=connection)
        statement, parameters = compiler.as_sql()
        order = [marks.index(p) if p in marks else (p,) for p in parameters]
        info, converters = compiler.klass_info, compiler.get_converters([column[0] for column in compiler.select])
        first, last = info["select_fields"][0], info["select_fields"][-1] + 1
        names = [column[0].target.attname for column in compiler.select[first:last]]
        related = get_related_populators(info, compiler.select, connection.alias)  # type: ignore[call-arg]

        def read(row: list[Any]) -> Any:
            for position, (steps, expression) in converters.items():
                for step in steps:
                    row[position] = step(row[position], expression, connection)
            found = info["model"].from_db(connection.alias, names, row[first:last])
            for populator in related:
                populator.populate(row, found)
            return found

        self.prepared[connection.vendor] = (statement, order, read)
        return self.prepared[connection.vendor]


def _adapted(value: Any) -> Any:
    return str(value) if isinstance(value, models.Choices) else value


def change(row: models.Model, fields: dict[str, Any], *, by: Sequence[str] = ("id",)) -> None:
    """Set columns of the row that is found by these columns, whatever its state."""
    _write(*_update(row, fields, {name: getattr(row, name) for name in by}))


def move(row: models.Model, before: str, fields: dict[str, Any]) -> bool:
    """Set columns of a row that is still in the state `before`; False when it is not, and nothing has changed."""
    return _count(*_update(row, fields, {"id": row.pk, "state": str(before)})) == 1


def _update(row: models.Model, fields: dict[str, Any], where: dict[str, Any]) -> tuple[str, list[Any]]:
    meta: Any = row._meta
    quote = connection.ops.quote_name
    columns, values = [], []
    for name, value in fields.items():
        field = meta.get_field(name)
        columns.append(f"{quote(field.column)} = %s")
        values.append(_adapted(field.get_db_prep_save(value, connection)))
    found = " AND ".join(f"{quote(column)} = %s" for column in where)
    return f"UPDATE {quote(meta.db_table)} SET {', '.join(columns)} WHERE {found}", [*values, *where.values()]


def _moment(at: datetime) -> Any:
    return connection.ops.adapt_datetimefield_value(at)


def count_open(table: str, scope: dict[str, str], *, locked: int | None = None) -> int:
    """Rows without an end in `table` ("execution" or "sandbox") that have these values in these columns.

    With the id of a quota, others who count against it wait from here to the end of the transaction.
    """
    tables = {"execution": "executions_execution", "sandbox": "executions_sandbox"}
    statement, values = f"SELECT COUNT(*) FROM {tables[table]} WHERE ended_at IS NULL", list[Any](scope.values())
    if table == "execution":
        statement += " AND state <> 'queued'"  # what waits uses nothing yet
    for column in scope:
        statement += f" AND {connection.ops.quote_name(column)} = %s"
    locks = locked is not None and connection.features.has_select_for_update  # SQLite's transaction is alone already
    if locks:
        statement = f"SELECT 1 FROM executions_quota WHERE id = %s FOR UPDATE; {statement}"
        values.insert(0, locked)
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        if locks:
            cursor.nextset()
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


def take(quota_id: int, column: str, amount: int, at: datetime) -> bool:
    """Add to `used` or `reserved` of a quota that has room for it; False, and nothing changed, where it has not."""
    statements = {
        "used": "UPDATE executions_quota SET used = used + %s WHERE id = %s AND used + reserved + %s <= {limit}",
        "reserved": "UPDATE executions_quota SET reserved = reserved + %s WHERE id = %s AND used + reserved + %s <= {limit}",
    }
    limit = f"{connection.ops.quote_name('limit')} + CASE WHEN raised_until > %s THEN raised_by ELSE 0 END"
    return _count(statements[column].format(limit=limit), [amount, quota_id, amount, _moment(at)]) == 1


OF_TIME = (
    "unit = 'compute_us' AND each = '' AND backend IN ('', %s) AND COALESCE(key_id, %s) = %s"
    " AND COALESCE(agent_id, %s) = %s AND COALESCE(team_id, %s) = %s"
)


def book(
    budgets: Sequence[int], release: int, spend: int, *, team: str, agent: str, key: str, backend: str, used_us: int
) -> None:
    """Settle these budgets, and add to `used` of every quota of compute time that governs such a sandbox.

    In one statement and in the order of their ids, in which others take them: so two never wait for each other.
    """
    which = f"id IN ({', '.join(['%s'] * len(budgets)) or 'NULL'}) OR ({OF_TIME})"
    chosen = [*budgets, backend, key, key, agent, agent, team, team]
    change = (
        "UPDATE executions_quota SET reserved = reserved - CASE WHEN unit = 'compute_us' THEN 0 ELSE %s END,"
        " used = used + CASE WHEN unit = 'compute_us' THEN %s ELSE %s END WHERE "
    )
    if connection.features.has_select_for_update:
        which = f"id IN (SELECT id FROM executions_quota WHERE {which} ORDER BY id FOR UPDATE)"
    _write(change + which, [release, used_us, spend, *chosen])


def settle(quota_id: int, release: int, spend: int) -> None:
    """Give back what a quota had set aside, and book what was spent."""
    _write(
        "UPDATE executions_quota SET reserved = reserved - %s, used = used + %s WHERE id = %s",
        [release, spend, quota_id],
    )
