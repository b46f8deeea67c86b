"""Quotas, sessions and pools under any sequence of what may happen to them: every step leaves rows that add up."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from asgiref.sync import async_to_sync
from django.db import transaction
from django.utils import timezone
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from executions import invariants, operations, quotas
from executions.backends.scripted import _machines
from executions.errors import SandgateError
from executions.models import Agent, Execution, Pool, Quota, Sandbox, Template
from executions.operations import replenish
from executions.reports import totals
from executions.serializers import SessionRequest
from executions.states import ExecutionState, SandboxState, Unit, WhenExhausted, Window
from tests.plane.conftest import asks

CHECKED = {name: look for name, _, look in invariants.OF_ROWS if name not in ("audit", "owned")}
LIMITS = {
    Unit.EXECUTIONS: st.integers(0, 6),
    Unit.CREATIONS: st.integers(0, 6),
    Unit.CONCURRENT_EXECUTIONS: st.integers(1, 2),
    Unit.CONCURRENT_SANDBOXES: st.integers(1, 3),
    Unit.NANO_USD: st.integers(0, 60 * 10**6),  # a run reserves nine million
    Unit.COMPUTE_US: st.integers(0, 600 * 10**6),
}
SCOPES = ("everybody", "team", "agent", "key")


class Plane(RuleBasedStateMachine):
    """One agent's plane; its backends are simulated, its clock is ours."""

    caller = None  # of the test

    def __init__(self) -> None:
        super().__init__()
        self.savepoint = transaction.savepoint()
        _machines.clear()
        self.clock = time_machine.travel(datetime.now(UTC) + timedelta(hours=1), tick=True)
        self.now = self.clock.start()
        self.ceilings: dict[int, int] = {}

    def teardown(self) -> None:
        self.clock.stop()
        transaction.savepoint_rollback(self.savepoint)

    @rule(
        code=st.sampled_from(["#= 1", "#! ValueError: no", "#> much"]),
        where=st.sampled_from([["first"], ["second", "first"]]),
    )
    def run(self, code, where) -> None:
        with suppress(SandgateError):
            async_to_sync(operations.execute)(caller=self.caller, request=asks(code, route=where), wait_seconds=0.01)

    @rule()
    def admit_and_die(self) -> None:
        with suppress(SandgateError):
            operations.submit(caller=self.caller, request=asks())

    @rule(seconds=st.integers(30, 900))
    def open_session(self, seconds) -> None:
        with suppress(SandgateError):
            asked = SessionRequest(timeout_seconds=seconds, idle_timeout_seconds=600)
            async_to_sync(operations.open_session)(caller=self.caller, request=asked)

    @rule(act=st.sampled_from(["run", "extend", "end", "pause"]))
    def use_session(self, act) -> None:
        session = Sandbox.objects.filter(kept=True, ended_at=None).order_by("pk").first()
        if session is None:
            return
        mine = {"caller": self.caller, "session_id": session.pk}
        with suppress(SandgateError):
            match act:
                case "run":
                    async_to_sync(operations.execute)(caller=self.caller, request=asks(session_id=session.pk))
                case "extend":
                    async_to_sync(operations.extend_session)(**mine, seconds=1200)
                case "end":
                    async_to_sync(operations.end_session)(**mine)
                case "pause":
                    async_to_sync(operations.pause_session)(**mine)

    @rule(count=st.integers(0, 2))
    def keep_ready(self, count) -> None:
        Pool.objects.update_or_create(
            backend="first",
            template=Template.objects.get(name="default"),
            defaults={"target": count, "retry_at": None},
        )

        async def round() -> None:
            await replenish.replenish()
            await replenish.settled()

        async_to_sync(round)()

    @rule(
        unit=st.sampled_from(sorted(LIMITS)),
        scope=st.sampled_from(SCOPES),
        window=st.sampled_from(["day", "total"]),
        data=st.data(),
    )
    def set_ceiling(self, unit, scope, window, data) -> None:
        owner = {} if scope == "everybody" else {scope: getattr(self.caller, scope)}
        if unit in quotas.CONCURRENT:
            window = Window.TOTAL
        elif window == "total" and not owner:
            window = Window.DAY
        limit, how = data.draw(LIMITS[unit]), data.draw(st.sampled_from(WhenExhausted.values))
        began = timezone.now() - timedelta(seconds=10)
        quota = Quota.objects.create(
            unit=unit, window=window, limit=limit, when_exhausted=how, window_started_at=began, **owner
        )
        self.ceilings[quota.pk] = limit

    @rule(seconds=st.sampled_from([1, 20, 400, 90_000]))
    def time_passes(self, seconds) -> None:
        self.now.shift(seconds)
        for machine in [m for of in _machines.values() for m in of.values()]:
            machine.ends -= seconds  # its clock is the system's, which we do not set

    @rule()
    def look_after_it(self) -> None:
        async_to_sync(operations.reap)()
        replenish.settle_claims()
        totals.roll_up()

    @invariant()
    def rows_add_up(self) -> None:
        assert {name: [str(wrong) for wrong in look()] for name, look in CHECKED.items()} == {
            name: [] for name in CHECKED
        }

    @invariant()
    def ceilings_hold(self) -> None:
        for quota in Quota.objects.filter(pk__in=self.ceilings, unit__in=quotas.CONCURRENT):
            counted = max(0, quotas.in_use(quota))
            before = self.__dict__.setdefault("most", {}).setdefault(quota.pk, counted)
            assert counted <= max(quota.limit, before), quota

    @invariant()
    def who_is_used_by_one(self) -> None:
        held = Execution.objects.open().exclude(state=ExecutionState.QUEUED).values_list("sandbox", flat=True)
        used = Sandbox.objects.filter(pk__in=held, kept=False)
        assert not used.filter(state=SandboxState.IDLE).exists()


def played(caller, examples: int, steps: int, *, random: bool) -> None:
    machine = type("Plane", (Plane,), {"caller": caller})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, derandomize=not random, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), print_blob=False,
        ),
    )  # fmt: skip


@pytest.mark.django_db
def test_whatever_happens_in_whatever_order_the_rows_add_up(caller):
    Agent.objects.filter(pk=caller.agent.pk).update(route=["first", "second"])
    played(caller, 6, 14, random=False)


@pytest.mark.long
@pytest.mark.django_db
def test_whatever_happens_in_whatever_order_for_long(caller):
    played(caller, 150, 40, random=True)
