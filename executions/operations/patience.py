"""Writing what becomes of a run, also when the database is away for a while: what has run is worth the wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import InterfaceError, OperationalError

from executions import hop, journal
from executions.models import Event

if TYPE_CHECKING:
    from executions.operations.run import Run

R = TypeVar("R")


async def surely(run: Run, fn: Callable[..., R], *args: Any) -> R:
    """As `hop.surely`. What a failed try had changed in memory goes with its transaction.

    One that was committed, though nobody heard of it, is found out by the row's state: IllegalTransition.
    """

    def once() -> R:
        execution, sandbox, heard, told = run.execution, run.execution.sandbox, run.journal.waiting, len(run.events)
        before = [(row, dict(vars(row))) for row in (execution, sandbox, *execution.tried) if row is not None]
        try:
            return fn(*args)
        except (OperationalError, InterfaceError):
            for row, columns in before:
                vars(row).update(columns)
            execution.sandbox, run.journal.again = sandbox, True
            del run.events[told:]
            if run.journal.waiting is not heard:  # it was taken
                run.journal.waiting = heard + run.journal.waiting
            raise

    return await hop.surely(once)


def write(run: Run, batch: list[Event]) -> None:
    """Into the journal, but what is there already after a try of which nobody heard."""
    if run.journal.again and batch:
        here = Event.objects.filter(execution_id=run.execution.pk, seq__gte=batch[0].seq)
        known = set(here.values_list("seq", flat=True))
        batch = [event for event in batch if event.seq not in known]
    journal.write(batch)
