"""A budget that the provider's own bill obeys, a quota of three that is never seen at four, a fair queue; on both databases.

python -m tests.bench.money [ROUNDS [RACES [QUEUES]]]      20, 100 and 5, or MONEY_ROUNDS, MONEY_RACES and MONEY_QUEUES
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests import servers
from tests.bench.load import one, request
from tests.double import Double, running_double
from tests.product import HOME, Product, environment, start

CALLERS, BUDGET_NANO_USD = 1000, 1_000_000_000
DEAR = "dear=32x65536"  # $0.000736 a second: a run of one second and its margin reserve $0.0228, so 43 of them fit
CODE = "#~ 0.3\n#= 1"
KILLED_SECONDS = 4  # after the first sandbox is alive, at the latest
SEEN_SECONDS = 0.25
OVER_SECONDS = 90  # from the last answer until the provider has ended all by itself, and all is settled
RACERS, PROCESSES, LIMIT = 100, 4, 3
APART_MOST = 0.2  # of the agents' waiting times, the longest over the shortest


@dataclass
class Round:
    """What one race has shown."""

    charged_nano_usd: int  # by the double's own meter
    booked_nano_usd: int  # by the ledger
    killed_after: float  # seconds of the race
    answers: Counter[str] = field(default_factory=Counter)
    most_alive: int = 0


# One engine: this module runs again in a process whose database it is


def settle_in(database: str, data: Path) -> dict[str, str]:
    more = {"DATABASE_URL": database, "SANDGATE_DATA": str(data), "DJANGO_SETTINGS_MODULE": "config.settings"}
    return {**environment(data, 1, None), **more, "SANDGATE_SCRIPTED": "1", "SANDGATE_HOP_THREADS": "32"}


def races_for_a_dollar(rounds: int, double: Double, data: Path, database: str, seed: int | None = None) -> list[Round]:
    """So many races of a thousand callers for one dollar. AssertionError where the double's meter charged more."""
    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    more = double.settings() | {"DATABASE_URL": database, "SANDGATE_LOG_LEVEL": "ERROR"}
    chance, told, port = random.Random(seed), [], servers.free_port()
    again = partial(start, data, port, Path(named) if named else None, **more)
    product = again()
    key = product.key  # shown once
    try:
        budget = _one_budget()
        for _ in range(rounds):
            began = time.monotonic()
            double.forget()
            double.tell(create_ms=[100, 300], kill_hangs=1.0)  # no kill is ever answered, and kills nothing
            before, used = double.meter()["nano_usd"], _refilled(budget)
            product, killed_after, answers, most_alive = _race(product, double, chance, again)
            product.key = key
            _wait(lambda: not double.meter()["live"], "the provider's timeouts", product)
            charged = double.meter()["nano_usd"] - before  # all that it ever will: nothing lives there any more
            assert charged <= BUDGET_NANO_USD, f"the double charged ${charged / 1e9:.6f}"
            double.tell(kill_hangs=0.0)
            _wait(lambda: _aside(budget) == 0, "the reservations", product)
            booked = _used(budget) - used
            told.append(Round(charged, booked, killed_after, answers, most_alive))
            assert charged <= booked <= BUDGET_NANO_USD, f"charged ${charged / 1e9:.6f}, booked ${booked / 1e9:.6f}"
            assert (wrong := _first_wrong()) is None, wrong
            said = f"${charged / 1e9:.4f} charged, ${booked / 1e9:.4f} booked, {time.monotonic() - began:.0f} s"
            print(f"{_engine(database)}: {said}", flush=True)
    except AssertionError:
        print("".join(product.screen[-40:]), *_what_is_open(), sep="\n", file=sys.stderr)
        raise
    finally:
        servers.end(product.process)
    return told


def _race(
    product: Product, double: Double, chance: random.Random, again: Callable[[], Product]
) -> tuple[Product, float, Counter[str], int]:
    """All at once; the plane is killed in the midst of it and started again, and who was cut off asks again."""
    with ThreadPoolExecutor(1) as aside:
        calling = aside.submit(asyncio.run, _callers(product, double))
        began = time.monotonic()
        while not double.meter()["live"]:  # something that will have to be paid
            assert not calling.done(), calling.result()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, KILLED_SECONDS))
        product.process.kill()
        product.process.wait()
        killed_after = time.monotonic() - began
        product = again()  # from this thread: a child ends with the thread that has started it
        return product, killed_after, *calling.result()


async def _callers(product: Product, double: Double) -> tuple[Counter[str], int]:
    """How often each status and code was answered, and how many sandboxes were seen alive at once."""
    body = {"code": CODE, "route": ["e2b"], "template": "dear", "timeout_seconds": 1}
    raw = request("POST", "/api/v1/executions", key=product.key, body=json.dumps(body).encode())
    host, port = product.url.removeprefix("http://").split(":")
    answers: Counter[str] = Counter()
    most = 0

    async def caller() -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                status, told = await one(reader, writer, raw)
                writer.close()
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.5)
                continue
            answers[f"{status} {json.loads(told)['code']}" if status >= 400 else str(status)] += 1
            return

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, (await asyncio.to_thread(double.meter))["live"])
            await asyncio.sleep(SEEN_SECONDS)

    looking = asyncio.create_task(look())
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    looking.cancel()
    return answers, most


def _wait(happened: Callable[[], bool], what: str, product: Product) -> None:
    until = time.monotonic() + OVER_SECONDS
    while not happened():
        assert product.process.poll() is None, f"{what}: the plane ended with {product.process.returncode}"
        assert time.monotonic() < until, f"{what}: not over after {OVER_SECONDS} s"
        time.sleep(0.2)


def _one_budget() -> int:
    """A dollar for the first team and no other ceiling; a template that is dear."""
    from executions.models import Quota, Team, Template
    from executions.states import Unit

    Quota.objects.all().delete()
    Template.objects.create(name="dear", cpu_count=32, memory_mib=65536, disk_mib=1024, e2b_template="dear")
    team = Team.objects.get(name="Home")
    return Quota.objects.create(team=team, unit=Unit.NANO_USD, limit=BUDGET_NANO_USD).pk


def _refilled(budget: int) -> int:
    """A dollar more than was used before, which is returned."""
    from django.db.models import F

    from executions.models import Quota

    Quota.objects.filter(pk=budget).update(limit=F("used") + BUDGET_NANO_USD)
    return _used(budget)


def _used(budget: int) -> int:
    from executions.models import Quota

    return Quota.objects.values_list("used", flat=True).get(pk=budget)


def _aside(budget: int) -> int:
    from executions.models import Quota

    return Quota.objects.values_list("reserved", flat=True).get(pk=budget)


def _what_is_open() -> list[str]:
    from executions.models import Sandbox

    return [
        f"{s.pk} {s.state} {s.end_reason} until {s.leased_until}, {s.reserved_nano_usd} held"
        for s in Sandbox.objects.open()
    ]


def _engine(database: str) -> str:
    return "PostgreSQL" if database.startswith("postgresql") else "SQLite"


def _first_wrong() -> Any:
    from executions import ledger

    return next(ledger.unbalanced(), None)


# A quota of three


def races_for_a_place(races: int, env: dict[str, str]) -> list[int]:
    """How many were let in, of a hundred that asked at once from four processes, in each race."""
    from executions.models import Execution, Quota

    agent, quota = _three_places()
    command = [sys.executable, "-m", "tests.bench.money", "racers", agent, str(RACERS // PROCESSES)]
    running = [
        subprocess.Popen(
            command, cwd=HOME, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            preexec_fn=servers.die_with_parent,
        )
        for _ in range(PROCESSES)
    ]  # fmt: skip
    let_in = []
    try:
        for racer in running:
            assert racer.stdout
            assert racer.stdout.readline() == "ready\n"
        for _ in range(races):
            for racer in running:
                assert racer.stdin
                racer.stdin.write("go\n")
                racer.stdin.flush()
            told: Counter[str] = Counter()
            for racer in running:
                assert racer.stdout
                told.update(json.loads(racer.stdout.readline()))
            let_in.append(told["let in"])
            assert set(told) <= {"let in", "quota_exceeded"}, told
            assert told["let in"] == LIMIT == Execution.objects.open().count(), told
            _all_out()
    finally:
        for racer in running:
            racer.kill()
            racer.wait()
        Quota.objects.filter(pk=quota).delete()
    return let_in


def _three_places() -> tuple[str, int]:
    from executions.models import Agent, Quota, Team
    from executions.states import Unit

    team = Team.objects.get(name="Home")
    agent = Agent.objects.create(team=team, name=f"racers-{secrets.token_hex(3)}", route=["scripted"])
    return agent.pk, Quota.objects.create(agent=agent, unit=Unit.CONCURRENT_EXECUTIONS, limit=LIMIT).pk


def _all_out() -> None:
    from executions.models import Execution, Sandbox

    for execution in Execution.objects.open():
        execution.advance("cancelled")
    for sandbox in Sandbox.objects.open().filter(backend="scripted"):
        sandbox.advance("gone")


def racers(agent_id: str, count: int) -> None:
    """So many threads, each with a connection of its own, that submit at once whenever they are told to."""
    from django.db import close_old_connections, connection

    from executions import operations
    from executions.errors import Refused
    from executions.keys import Caller
    from executions.models import Agent
    from executions.serializers import Submission
    from executions.states import Scope

    agent = Agent.objects.select_related("team", "template").get(pk=agent_id)
    caller = Caller(team=agent.team, agent=agent, scopes=frozenset(Scope.values), door="rest")
    line, results = threading.Barrier(count + 1), list[str]()

    def racer() -> None:
        connection.ensure_connection()
        while True:
            line.wait()  # all are here
            try:
                operations.submit(caller=caller, request=Submission(code="#= 1"))
                results.append("let in")
            except Refused as refusal:
                results.append(refusal.code)
            except Exception as e:
                results.append(f"{type(e).__name__}: {e}")
            close_old_connections()
            line.wait()  # all have their answer

    for _ in range(count):
        threading.Thread(target=racer, daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        results.clear()
        line.wait()
        line.wait()
        print(json.dumps(Counter(results)), flush=True)


# Both engines


def on_one_engine(database: str, data: Path, rounds: int, races: int, queues: int) -> None:
    """Runs with Django set up on that database; tells its figures line by line."""
    from tests.bench import turns

    name = _engine(database)
    with running_double("--template", DEAR) as double:
        told = races_for_a_dollar(rounds, double, data, database)
    if told:
        charged = sorted(r.charged_nano_usd for r in told)
        answered = sum((r.answers for r in told), Counter())
        print(
            f"{name}: {rounds} races of {CALLERS} callers for $1.00, the plane killed {min(r.killed_after for r in told):.1f} to "
            f"{max(r.killed_after for r in told):.1f} s into each, no kill ever answered: the double charged "
            f"${charged[0] / 1e9:.4f} to ${charged[-1] / 1e9:.4f} (median ${charged[len(charged) // 2] / 1e9:.4f}), "
            f"the ledger booked at most ${max(r.booked_nano_usd for r in told) / 1e9:.4f}; "
            f"up to {max(r.most_alive for r in told)} sandboxes alive; answers {dict(sorted(answered.items()))}.",
            flush=True,
        )
    if races:
        began = time.monotonic()
        let_in = races_for_a_place(races, os.environ.copy())
        print(
            f"{name}: {races} races of {RACERS} calls from {PROCESSES} processes for a quota of {LIMIT}: "
            f"{min(let_in)} to {max(let_in)} let in, never {LIMIT + 1}; {(time.monotonic() - began) / races:.2f} s each.",
            flush=True,
        )
    for waits in turns.queues(queues, data, database) if queues else []:
        apart = max(waits) / min(waits) - 1
        each = ", ".join(f"{seconds:.2f}" for seconds in waits)
        print(
            f"{name}: {turns.AGENTS} agents came one after the other, {turns.EACH} runs each, for {turns.PLACES} places: "
            f"they waited {each} s on average, {apart:.1%} apart.",
            flush=True,
        )
        assert apart <= APART_MOST, waits


def main(*counts: str) -> int:
    with ExitStack() as stack:
        sqlite, other = stack.enter_context(servers.folder()), stack.enter_context(servers.folder())
        engines = [(f"sqlite:///{sqlite}/money.sqlite3", sqlite), (stack.enter_context(servers.postgresql()), other)]
        command = [sys.executable, "-m", "tests.bench.money", "engine"]
        named = {"SANDGATE_TEMPLATE_PYTHON": os.environ.get("SANDGATE_TEMPLATE_PYTHON", "")}
        running = [
            subprocess.Popen(
                [*command, database, str(data), *counts], cwd=HOME,
                env=settle_in(database, data) | named, preexec_fn=servers.die_with_parent,
            )
            for database, data in engines
        ]  # fmt: skip
        return max(process.wait() for process in running)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["engine", database, data, *counts]:
            import django

            django.setup()
            rounds, races, queues = map(int, counts)
            on_one_engine(database, Path(data), rounds, races, queues)
        case ["racers", agent_id, count]:
            import django

            django.setup()
            racers(agent_id, int(count))
        case given:
            otherwise = [("MONEY_ROUNDS", "20"), ("MONEY_RACES", "100"), ("MONEY_QUEUES", "5")]
            sys.exit(main(*given, *(os.environ.get(*one) for one in otherwise[len(given) :])))
