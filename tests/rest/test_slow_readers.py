"""A watcher that reads slowly costs a bounded buffer of its own."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from executions.api.executions import _stream
from executions.hop import rows
from executions.models import Event, Execution
from executions.states import EventKind

pytestmark = pytest.mark.django_db(transaction=True)


async def test_a_slow_reader_of_a_long_journal_holds_a_small_part_of_it(call):
    ran = json.loads((await call("POST", "/api/v1/executions", {"code": "#= 1"})).content)
    execution = await Execution.objects.aget(pk=ran["id"])
    text = "x" * 64 * 1024
    lines = [Event(execution=execution, seq=n, kind=EventKind.STDOUT, data={"text": text}) for n in range(1001, 1257)]
    await rows(Event.objects.bulk_create, lines)
    del lines

    tracemalloc.start()
    watched = _stream(execution, 1000)
    first = await anext(watched)  # and no more of its 16 MiB
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await watched.aclose()

    assert first.startswith("id: 1001\n")
    assert held < 6 << 20
