"""Let a plane die between any two steps, and another take over: nothing is lost, leaked, charged for nothing, or run twice.

python -m tests.bench.chaos [ROUNDS] [SEED]     500, or CHAOS_ROUNDS; on the database of DATABASE_URL, else a SQLite file

Each round is two processes: one works on E2B's double until it passes the chosen fault point and is killed there (or the
point raises), the other does what a plane does at its start. Its clocks are short, so that a round takes no half minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests import servers
from tests.double import QUICK, Double, running_double

POINTS = (
    "admitting", "admitted", "beginning", "intended", "booted", "unavailable", "said", "ended",
    "killed", "settling", "settled", "retiring", "dead", "going", "closing", "session_booted", "reserved", "extended",
    "pool_booted", "claims_billed",
)  # fmt: skip
LATER = ("beginning", "retiring", "dead", "going", "closing", "claims_billed")  # where whoever takes over may die, too
UNRELIABLE = {
    "refuse": [{"on": "create", "status": 503, "share": 0.2}],
    "loses": 0.1,
    "cuts": 0.1,
    "kill_hangs": 0.05,
    "vanish": 0.1,
    "vanish_seconds": 0.2,
    "forgets": 0.05,
}
HEALTHY = dict.fromkeys(UNRELIABLE, 0) | {"vanish_seconds": 2, "refuse": []} | QUICK
WITHIN_SECONDS = 30
HUNG = 1000  # beside exit codes


@dataclass
class Told:
    """What the rounds have shown."""

    died: Counter[str] = field(default_factory=Counter)  # by fault point
    survived: int = 0  # rounds in which the point was not passed so often
    executions: int = 0
    ran: int = 0
    seconds: list[float] = field(default_factory=list)  # until all was true again
    wrong: list[str] = field(default_factory=list)


# The plane that dies


async def live(seed: int) -> None:
    """Runs, repeats, cancels, a session and a pool, all at once, more than the agent may have running; and the background work."""
    from django.conf import settings

    from executions import operations
    from executions.errors import SandgateError
    from executions.hop import rows
    from executions.models import Pool, Template
    from executions.operations import replenish
    from executions.serializers import SessionRequest, Submission, parse

    chance = random.Random(seed)
    caller = await rows(the_caller)

    async def run(n: int, *, key: str | None = None, **fields: Any) -> None:
        code = f"#run {seed}-{key or n}\n#> on\n#~ {chance.uniform(0, 0.2):.2f}\n#= 1"
        with suppress(SandgateError):
            await operations.execute(
                caller=caller,
                request=parse(Submission, {"code": code, **fields}),
                idempotency_key=key and f"{seed}-{key}",
            )

    async def cancelled() -> None:
        with suppress(SandgateError):
            execution = await rows(operations.submit, caller=caller, request=parse(Submission, {"code": "#~ 5"}))
            operations.start(execution)
            await asyncio.sleep(chance.uniform(0, 0.1))
            await operations.cancel(execution=execution, reason="enough")
            await operations.wait(execution, 5)

    async def session() -> None:
        with suppress(SandgateError):
            made = await operations.open_session(caller=caller, request=SessionRequest())
            await run(100, session_id=made.pk)
            await operations.extend_session(caller=caller, session_id=made.pk, seconds=900)
            if chance.random() < 0.5:
                await operations.end_session(caller=caller, session_id=made.pk)

    async def pooled() -> None:
        def enabled() -> None:
            template = Template.objects.get(name="default")
            Pool.objects.update_or_create(backend="e2b", template=template, memory_mib=0, defaults={"target": 2})

        await rows(enabled)
        await replenish.replenish()
        await replenish.settled()
        await asyncio.gather(run(200), run(201))
        await replenish.replenish()

    work = [run(n) for n in range(chance.randint(1, 3))]
    work += [run(0, key="same"), run(0, key="same")]  # delivered twice
    more = ((cancelled, 0.5), (session, 0.5), (pooled, 0.4), (lambda: database_away(chance), 0.15))
    work += [one() for one, share in more if chance.random() < share]
    settings.BACKGROUND_SECONDS = 0.1
    beside = asyncio.create_task(operations.background())
    await asyncio.gather(*work, return_exceptions=True)
    beside.cancel()
    await asyncio.wait({beside})


async def database_away(chance: random.Random) -> None:
    """Nobody can write for some seconds; on PostgreSQL everybody's connections end."""
    from django.db import connection

    from executions.hop import rows

    await asyncio.sleep(chance.uniform(0, 0.3))
    if connection.vendor == "postgresql":
        sent = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        await rows(lambda: connection.cursor().execute(sent))
        return
    with closing(sqlite3.connect(connection.settings_dict["NAME"], timeout=20)) as other:
        other.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(chance.choice((0.5, 2, 10)))
        other.rollback()


def the_caller() -> Any:
    from executions import keys
    from executions.models import Agent
    from executions.states import Scope

    agent = Agent.objects.select_related("team").get(name="chaos")
    return keys.Caller(team=agent.team, agent=agent, scopes=frozenset(Scope.values), door="rest")


# The plane that takes over


async def take_over(double: Double) -> dict[str, Any]:
    """What a plane does at its start and in the background, until nothing is open; then what `verify` says."""
    from django.conf import settings

    from executions import operations
    from executions.hop import rows
    from executions.operations import replenish, waiting
    from executions.reports import totals

    settings.HEARTBEAT_SECONDS = 0.05
    for name in ("reap", "verify"):
        sys.modules[f"executions.operations.{name}"].SETTLED = timedelta(0)
    sys.modules["executions.operations.pausing"].TURN = timedelta(seconds=0.5)
    await rows(let_go)
    began = time.monotonic()
    while time.monotonic() - began < WITHIN_SECONDS:
        await operations.reap()
        await waiting.look()
        await replenish.replenish()
        await replenish.settled()
        await rows(totals.roll_up)
        if not await rows(left) and not double.live():
            break
        await asyncio.sleep(0.05)
    at = time.monotonic() - began
    checks = await operations.verify()
    wrong = [f"{check.name}: {wrong}" for check in checks for wrong in check.wrong]
    wrong += [f"open: {one}" for one in await rows(left)] + [f"alive: {name}" for name in double.live()]
    return {"seconds": at, "wrong": wrong, **await rows(told)}


def let_go() -> None:
    """Sessions end now and pools are emptied: what is open after that, nobody owns. Nothing is out any more."""
    from django.utils import timezone

    from executions.models import BackendState, Pool, Sandbox

    Pool.objects.update(target=0, retry_at=None, failures=0)
    Sandbox.objects.filter(kept=True, ended_at=None).update(leased_until=timezone.now())
    Sandbox.objects.filter(ended_at=None, turning_until__isnull=False).update(turning_until=timezone.now())
    BackendState.objects.all().delete()


def left() -> list[str]:
    from executions.models import Claim, Execution, Quota, Sandbox

    open_ones = [f"{e.pk} {e.state}" for e in Execution.objects.open()] + [
        f"{s.pk} {s.state}" for s in Sandbox.objects.open()
    ]
    open_ones += [f"claim {claim.pk}" for claim in Claim.objects.filter(spent_nano_usd=None)]
    return open_ones + [f"quota {quota.pk} reserves {quota.reserved}" for quota in Quota.objects.exclude(reserved=0)]


def told() -> dict[str, Any]:
    from django.db.models import Sum

    from executions.models import Execution, Sandbox

    found = Execution.objects.values_list("code", "state", "error_value")
    runs = [(code.partition("\n")[0], state, said) for code, state, said in found if code.startswith("#run ")]
    spent = Sandbox.objects.filter(backend="e2b").aggregate(
        total=Sum("spent_nano_usd") + Sum("claim__spent_nano_usd", default=0)
    )
    return {"runs": runs, "executions": len(found), "spent": spent["total"] or 0}


# Rounds


def rounds(
    count: int, seed: int, double: Double, *, patience_seconds: float = 60, points: tuple[str, ...] = POINTS
) -> Told:
    """So many deaths. Everything that was wrong after one of them is told."""
    chance, result = random.Random(seed), Told()
    for n in range(count):
        point = points[n % len(points)] if n < 2 * len(points) else chance.choice(points)
        how = ":raise" if chance.random() < 0.25 else ""
        fault, one = f"{point}:{chance.choice((1, 1, 2, 3))}{how}", chance.randrange(1 << 30)
        double.tell(**(UNRELIABLE if chance.random() < 0.5 else HEALTHY))
        status, _ = child(lambda: begin(fault, one, double), patience_seconds)  # noqa: B023
        result.died[point] += status == -signal.SIGKILL
        result.survived += status != -signal.SIGKILL
        double.tell(**HEALTHY)
        if status not in (0, -signal.SIGKILL):
            result.wrong.append(f"round {n}, {fault}, seed {one}: the plane ended with {status}")
        if point in LATER and status != -signal.SIGKILL:
            status, _ = child(lambda: begin(fault, None, double), patience_seconds)  # noqa: B023
            result.died[point] += status == -signal.SIGKILL
        status, found = child(lambda: asyncio.run(ended(take_over(double))), patience_seconds)
        found = found or {"wrong": [f"the plane that took over ended with {status}"], "seconds": 0, "runs": []}
        result.seconds.append(found["seconds"])
        wrong = [*found["wrong"], *twice(found["runs"], double), *cheaper(found, double)]
        result.wrong += [f"round {n}, {fault}, seed {one}: {what}" for what in wrong]
        if result.wrong:
            break
        result.executions, result.ran = found["executions"], len(found["runs"])
    return result


def twice(runs: list[list[str]], double: Double) -> list[str]:
    """What ran more often than once, or not at all although it has succeeded, or although nobody had said so."""
    counts, wrong = double.meter()["counts"], []
    for (code, state, said), times in ((run, counts.get(run[0], 0)) for run in runs):
        if times > 1:
            wrong.append(f"{code} ran {times} times")
        if times == 0 and state == "succeeded":
            wrong.append(f"{code} has succeeded, and never ran")
        if times and "before any code had run" in said:
            wrong.append(f"{code} ran, though it was said that nothing had")
    names = Counter(code for code, *_ in runs)
    return wrong + [f"{code} was admitted {n} times" for code, n in names.items() if n > 1]


def cheaper(found: dict[str, Any], double: Double) -> list[str]:
    """Whatever has ended is billed here with no less than it cost there."""
    there = sum(one["nano_usd"] for one in double.meter()["sandboxes"] if one["state"] == "ended")
    return [f"billed {found['spent']} here, {there} there"] if (found.get("spent") or 0) < there else []


def begin(fault: str, seed: int | None, double: Double) -> None:
    """What dies: a plane that works, or without a seed one that takes over."""
    from executions import faults

    faults.arm(fault)
    asyncio.run(ended(take_over(double) if seed is None else live(seed)))


async def ended(work: Any) -> Any:
    from executions import backends

    try:
        return await work
    finally:
        await backends.close_all()


def child(work: Callable[[], Any], seconds: float) -> tuple[int, Any]:
    """Do it in a process of its own: how it ended, as `waitpid` has it with signals negative, and what it gave back."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    said, ends = b"", time.monotonic() + seconds
    with os.fdopen(reader, "rb", buffering=0) as answer:
        while select.select([answer], [], [], max(0, ends - time.monotonic()))[0]:
            if not (piece := answer.read(65536)):
                break
            said += piece
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG, None
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(said) if said and status == 0 else None


def prepared(double: Double, data: Path) -> None:
    """This process becomes a plane with a database of its own, in which nothing runs yet."""
    mine = {"SANDGATE_DATA": str(data), "SANDGATE_ARTIFACTS": str(data / "artifacts"), "SANDGATE_LOG_LEVEL": "CRITICAL"}
    os.environ |= mine | double.settings() | {"DJANGO_SETTINGS_MODULE": "config.settings", "SECRET_KEY": "x" * 50}
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connections
    from django.utils import timezone

    from executions import operations
    from executions.backends.e2b import account
    from executions.models import Agent, Quota, Team
    from executions.states import Unit, Window

    call_command("migrate", verbosity=0)
    operations.seed()
    team = Team.objects.create(name="Chaos")
    Agent.objects.create(team=team, name="chaos", route=["e2b"], isolation_floor="none", keep_files=[])
    for unit in (Unit.NANO_USD, Unit.EXECUTIONS, Unit.CREATIONS, Unit.COMPUTE_US):
        for owner in ({}, {"team": team}):
            began = timezone.now() - timedelta(minutes=1)  # a window's first two seconds are not judged
            Quota.objects.create(unit=unit, window=Window.TOTAL, limit=10**15, window_started_at=began, **owner)
    waits = {"when_exhausted": "wait", "max_wait_seconds": 30}
    Quota.objects.create(unit=Unit.CONCURRENT_EXECUTIONS, window=Window.TOTAL, limit=4, team=team, **waits)
    account.sdk()  # a second, which every child would take
    for connection in connections.all():
        connection.close()
        if hasattr(connection, "close_pool"):
            connection.close_pool()


def main() -> None:
    count = int(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("CHAOS_ROUNDS", "500"))
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    with running_double() as double, servers.folder() as data:
        prepared(double, data)
        found = rounds(count, seed, double)
    died = sum(found.died.values())
    at = ", ".join(f"{point} {times}" for point, times in found.died.most_common() if times)
    taken = sorted(found.seconds)
    print(
        f"{len(taken)} rounds (seed {seed}), {died} planes killed ({at}), {found.executions} executions: all was true again "
        f"after {taken[len(taken) // 2]:.1f} s at the median and {taken[-1]:.1f} s at most."
    )
    if found.wrong:
        print("\n".join(["What was wrong:", *found.wrong]))
        sys.exit(1)


if __name__ == "__main__":
    main()
