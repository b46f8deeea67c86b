"""Every road between states, and no other."""

from itertools import product

import pytest

from executions import operations
from executions.models import Execution, IllegalTransition, Sandbox, Transition
from executions.states import (
    EXECUTION_ENDED,
    EXECUTION_NEXT,
    SANDBOX_ENDED,
    SANDBOX_NEXT,
    ExecutionState,
    SandboxState,
)
from tests.plane.conftest import asks

EXECUTION_ROADS = set(
    """queued>starting queued>running queued>cancelled queued>errored
    starting>running starting>queued starting>cancelled starting>errored
    running>succeeded running>failed running>timed_out running>cancelled running>errored""".split()
)
SANDBOX_ROADS = set(
    """booting>idle booting>leased booting>retiring booting>gone
    idle>leased idle>retiring idle>gone
    leased>paused leased>retiring leased>gone
    paused>leased paused>retiring paused>gone
    retiring>gone""".split()
)


@pytest.mark.parametrize(("before", "after"), list(product(ExecutionState, ExecutionState)))
def test_the_table_of_executions_is_the_one_that_is_written_here(before, after):
    assert Execution.legal(before, after) == (f"{before}>{after}" in EXECUTION_ROADS)


@pytest.mark.parametrize(("before", "after"), list(product(SandboxState, SandboxState)))
def test_the_table_of_sandboxes_is_the_one_that_is_written_here(before, after):
    assert Sandbox.legal(before, after) == (f"{before}>{after}" in SANDBOX_ROADS)


def test_every_state_has_its_line_in_the_table():
    assert set(EXECUTION_NEXT) == set(ExecutionState)
    assert set(SANDBOX_NEXT) == set(SandboxState)
    assert {"succeeded", "failed", "timed_out", "cancelled", "errored"} == EXECUTION_ENDED
    assert {"gone"} == SANDBOX_ENDED


@pytest.mark.django_db
@pytest.mark.parametrize(("before", "after"), list(product(ExecutionState, ExecutionState)))
def test_advance_takes_each_legal_road_and_leaves_the_row_alone_on_any_other(caller, before, after):
    execution = operations.submit(caller=caller, request=asks())
    ended = "2026-01-01T00:00:00Z" if before in EXECUTION_ENDED else None
    Execution.objects.filter(pk=execution.pk).update(state=before, ended_at=ended)
    execution.refresh_from_db()
    Transition.objects.all().delete()

    if Execution.legal(before, after):
        execution.advance(after, reason="because")
        execution.refresh_from_db()
        assert execution.state == after
        assert (execution.ended_at is not None) == (after in EXECUTION_ENDED)
        step = Transition.objects.get()
        assert (step.execution_id, step.before, step.after, step.reason) == (execution.pk, before, after, "because")
    else:
        with pytest.raises(IllegalTransition):
            execution.advance(after)
        execution.refresh_from_db()
        assert execution.state == before
        assert not Transition.objects.exists()


@pytest.mark.django_db
def test_of_two_who_move_a_row_at_once_one_is_told_that_it_was_too_late(caller):
    mine = operations.submit(caller=caller, request=asks())
    theirs = Execution.objects.get(pk=mine.pk)
    theirs.advance(ExecutionState.CANCELLED)

    with pytest.raises(IllegalTransition):
        mine.advance(ExecutionState.RUNNING)

    mine.refresh_from_db()
    assert mine.state == ExecutionState.CANCELLED


@pytest.mark.django_db
def test_an_execution_is_born_with_every_step_it_took_on_record(caller):
    execution = operations.submit(caller=caller, request=asks())

    steps = list(execution.transitions.order_by("id").values_list("before", "after"))
    assert steps == [("", "queued"), ("queued", "starting")]
    assert list(execution.sandbox.transitions.values_list("before", "after")) == [("", "booting")]
