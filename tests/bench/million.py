"""Whether the plane is as fast with a million executions in its tables as with none.

    python -m tests.bench.million [sqlite | postgresql]        MILLION_ROWS=1000000, BENCH_SECONDS=8

A real execution is run, and all that it has left in the tables is multiplied there, over a thousand agents and ninety
days. Before and after, in one run: governed executions through REST, and what people and the background look at.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import servers
from tests.bench.load import Figures, drive, request
from tests.bench.table import row
from tests.product import HOME, environment

EXECUTIONS = int(os.environ.get("MILLION_ROWS", "1000000"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "8"))
AGENTS, TEAMS, DAYS = 1000, 20, 90
AT_ONCE = 20_000  # executions of one INSERT
SLOWER = 1.5  # times, beyond which a figure is not flat; and by more than so many ms:
NOISE_MS = 30  # a page of fifty rows where there was one
QUICK = {  # of the connection that fills: what it inserts refers to what it has inserted
    "sqlite": ("PRAGMA synchronous=OFF", "PRAGMA cache_size=-600000"),
    "postgresql": ("SET session_replication_role = replica", "SET work_mem = '64MB'"),
}
HEAD = "| what | with none | with {n:,} | of it | flat |\n|---|---|---|---|---|"


def main(engines: list[str]) -> None:
    print(HEAD.format(n=EXECUTIONS))
    crooked = []
    for engine in engines:
        with servers.folder() as data:
            if engine == "sqlite":
                crooked += compare(data, f"sqlite:///{data}/million.sqlite3", "SQLite")
            else:
                with servers.postgresql() as database:
                    crooked += compare(data, database, "PostgreSQL")
    if crooked:
        sys.exit("not flat: " + "; ".join(crooked))


def compare(data: Path, database: str, engine: str) -> list[str]:
    """Print a row for each figure; the names of those that grow with the tables."""
    before = measured(data, database)
    said = in_product(data, database, "fill", str(EXECUTIONS))
    after = measured(data, database)
    crooked = []
    for name in before:
        was, now = before[name], after[name]
        faster_is_more = name.endswith("/s")
        ratio = was / now if faster_is_more else now / was
        flat = ratio <= SLOWER or (not faster_is_more and now - was <= NOISE_MS)
        crooked += [] if flat else [f"{engine}: {name}"]
        row(f"{engine}: {name}", f"{was:.1f}", f"{now:.1f}", f"{now / was:.2f}", "yes" if flat else "no")
    row(f"{engine}: bytes of an execution on disk, indexes included", figure=said["bytes"])
    row(f"{engine}: rows of an execution", figure=said["rows"])
    return crooked


def measured(data: Path, database: str) -> dict[str, float]:
    """Figures by name: rates end with "/s", the others are milliseconds."""
    from tests.bench.__main__ import posted, server

    found: dict[str, float] = {}
    with server(data, database, None, pinned=True, SANDGATE_SCRIPTED="true") as (port, key):
        if key:
            (data / "key").write_text(key)
            in_product(data, database, "allow")
        key = (data / "key").read_text()
        fresh = posted(key, code="1 #= 1", route=["scripted"])
        asyncio.run(drive(port, fresh, clients=16, seconds=2))
        many = asyncio.run(drive(port, fresh, clients=16, seconds=SECONDS))
        one = asyncio.run(drive(port, fresh, clients=1, seconds=SECONDS / 2))
        assert not many.failed + one.failed, (many, one)
        found |= {"governed executions, 16 clients, 1/s": many.rate, "one at a time, p50": one.p50_ms}
        for name, path in pages(key, port):
            found[f"GET {name}"] = p50(
                name, asyncio.run(drive(port, request("GET", path, key=key), clients=1, seconds=1))
            )
    return found | in_product(data, database, "look")


def p50(name: str, figures: Figures) -> float:
    assert not figures.failed, (name, figures)
    return figures.p50_ms


def pages(key: str, port: int) -> Iterator[tuple[str, str]]:
    """What programs read, by name."""
    yield "executions", "/api/v1/executions"
    for query in ("state=failed", "state=running", "agent=agent-7", "q=nothing", "workflow=none", "language=bash"):
        yield f"executions?{query}", f"/api/v1/executions?{query}"
    for name in (
        "sessions",
        "limits",
        "refusals",
        "environment",
        "costs?group_by=agent",
        "usage?group_by=day",
        "backends",
    ):
        yield name, f"/api/v1/{name}"


def in_product(data: Path, database: str, *command: str) -> dict:
    """A part of this module as the product's own process would run it; what it prints at last, as JSON."""
    env = environment(
        data, 1, None, DATABASE_URL=database, DJANGO_SETTINGS_MODULE="config.settings", SANDGATE_SCRIPTED="true"
    )
    words = [sys.executable, "-W", "ignore", "-m", "tests.bench.million", *command]
    done = subprocess.run(words, cwd=HOME, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# Within the product


def inside(command: str, *arguments: str) -> None:
    import django

    django.setup()
    known: dict[str, Any] = {"fill": fill, "look": look, "allow": allow}
    print(json.dumps(known[command](*arguments)))


def allow() -> dict:
    """Ceilings that a load test does not reach, which stay in force, and the other agents: they are no history."""
    from executions.models import Agent, Quota

    Quota.objects.update(limit=10**15)
    owners()
    return {"agents": Agent.objects.count()}


def look() -> dict[str, float]:
    """What people see in the admin and the console, and the background's rounds: milliseconds, best of three."""
    from django.contrib import admin
    from django.test import Client
    from django.urls import reverse

    from executions.models import User

    client = Client(SERVER_NAME="127.0.0.1")
    client.force_login(User.objects.get())
    found = {}
    for model in sorted(admin.site._registry, key=lambda m: m._meta.label):
        if model._meta.app_label == "executions":
            address = reverse(f"admin:executions_{model._meta.model_name}_changelist")
            found[f"admin, {model._meta.verbose_name_plural}"] = best(lambda at=address: answered(client, at))
    found["admin, first page"] = best(lambda: answered(client, "/admin/"))
    for name in ("/", "/runs", "/usage"):
        found[f"console {name}"] = best(lambda at=name: answered(client, at))
    return found | {f"background, {name}": best(round_) for name, round_ in rounds().items()}


def answered(client, address: str) -> None:
    answer = client.get(address, follow=True)
    assert answer.status_code == 200, (address, answer.status_code)


def rounds() -> dict:
    from django.utils import timezone

    from executions import metrics
    from executions.metrics.page import page
    from executions.operations import pausing, replenish, waiting
    from executions.operations.reap import _ended_among, _vanished, find_networked, find_over, find_stale
    from executions.operations.sessions import _on_this_node
    from executions.reports import totals

    return {
        "the queue": lambda: (waiting._claim_left(), waiting._next_ones()),
        "runners that died": find_stale,
        "sandboxes that are over": find_over,
        "sandboxes that vanished": lambda: _vanished("scripted", set(), timezone.now()),
        "orphans": lambda: _ended_among(["sbx" + "0" * 26] * 50),
        "egress": find_networked,
        "sessions to pause": pausing.find_idle,
        "ends to tell": _on_this_node,
        "pools": replenish.settle_claims,
        "cost totals": lambda: totals.roll_up(1),
        "metrics, flushed": metrics.flush,
        "metrics, page": page,
    }


def best(act) -> float:
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return min(taken) * 1000


# Multiplied


def fill(count: str) -> dict[str, str]:
    """Multiply what the newest execution has left by `count`, with bulk statements; how large one is."""
    from django.db import connection

    from executions.models import Execution
    from executions.reports import totals

    model = Execution.objects.filter(ended_at__isnull=False).order_by("-created_at").first()
    assert model is not None
    with connection.cursor() as cursor:
        for setting in QUICK[connection.vendor]:
            cursor.execute(setting)
    before, whole, per_one = size(), int(count), 0
    for kind, found in parts(model):
        per_one += len(found)
        for start in range(0, whole, AT_ONCE):
            for original in found:
                multiply(kind, original, model, range(start, min(start + AT_ONCE, whole)), whole)
        print(f"{kind.__name__}: {len(found)} each", file=sys.stderr, flush=True)
    totals.roll_up()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE" if connection.vendor == "postgresql" else "PRAGMA wal_checkpoint(TRUNCATE)")
    return {"bytes": f"{(size() - before) / int(count):,.0f}", "rows": str(per_one)}


def size() -> int:
    from django.conf import settings
    from django.db import connection

    if connection.vendor == "sqlite":
        path = Path(settings.DATABASES["default"]["NAME"])
        return sum(p.stat().st_size for p in path.parent.glob(path.name + "*"))
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_database_size(current_database())")
        return cursor.fetchone()[0]


def parts(model: Any) -> list[tuple[Any, list[Any]]]:
    """Every row that one execution has left, parents first."""
    from django.db.models import Q

    from executions.models import Attempt, Event, Execution, LedgerEntry, Sandbox, Transition, Usage

    of_it = Q(execution=model) | Q(sandbox=model.sandbox)
    return [
        (Sandbox, [model.sandbox]),
        (Execution, [model]),
        *((kind, list(kind.objects.filter(of_it).order_by("pk"))) for kind in (Transition, Usage, LedgerEntry)),
        *((kind, list(kind.objects.filter(execution=model).order_by("pk"))) for kind in (Attempt, Event)),
    ]


def owners() -> None:
    """Agents beside the one that ran."""
    from executions.models import Agent, Team

    teams = [Team.objects.create(name=f"Team {n}") for n in range(TEAMS)]
    others = [Agent(id=f"agt_{n:026}", team=teams[n % TEAMS], name=f"agent-{n}") for n in range(1, AGENTS)]
    Agent.objects.bulk_create(others)


def multiply(kind: Any, original: Any, model: Any, numbers: range, count: int) -> None:
    """Insert copies with these numbers: ids, owners and moments are each copy's own, and agents share unequally."""
    from django.db import connection, models

    quote, sqlite = connection.ops.quote_name, connection.vendor == "sqlite"
    ids = {"sandbox": "sbx", "execution": "exe"}
    seconds = f"((n - {count}) * {DAYS * 86400}.0 / {count} - 3600)"
    columns, values, parameters = [], [], []
    for field in kind._meta.concrete_fields:
        name, value = field.attname, getattr(original, field.attname)
        named = kind._meta.model_name if name == "id" else name.removesuffix("_id")
        if isinstance(field, models.AutoField):
            continue
        columns.append(quote(field.column))
        if named in ids and value is not None:
            values.append(f"'{ids[named]}_' || {padded('n')}")
        elif name in ("agent_id", "team_id"):
            values.append(named)
        elif name == "is_counted":
            values.append("(n %% 10 <> 0)")  # a tenth fills the totals: every agent on nearly every day
        elif name in ("key_id", "actor_id"):
            values.append(
                "CASE WHEN a = 0 THEN %s END" if sqlite else f"CASE WHEN a = 0 THEN %s::{field.db_type(connection)} END"
            )
            parameters.append(value)
        elif isinstance(field, models.DateTimeField) and value is not None:
            moved = f"strftime('%%Y-%%m-%%d %%H:%%M:%%f000', %s, {seconds} || ' seconds')"
            values.append(moved if sqlite else f"%s::timestamptz + {seconds} * interval '1 second'")
            parameters.append(field.get_db_prep_save(value, connection))
        else:
            values.append("%s" if sqlite else f"%s::{field.db_type(connection)}")
            parameters.append(field.get_db_prep_save(value, connection))
    share = "((CAST(n AS bigint) * 7919) %% 1000003 / 1000003.0)"  # as if by chance, and squared: a few agents do most of the work
    counted = f"SELECT {numbers.start} UNION ALL SELECT n + 1 FROM counted WHERE n + 1 < {numbers.stop}"
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {quote(kind._meta.db_table)} ({', '.join(columns)})"
            f" WITH RECURSIVE counted(n) AS ({counted}),"
            f" numbered AS (SELECT n, CAST({share} * {share} * {AGENTS} - 0.5 AS integer) AS a FROM counted),"
            f" owned AS (SELECT n, a, COALESCE(found.id, '{model.agent_id}') AS agent,"
            f" COALESCE(found.team_id, '{model.team_id}') AS team FROM numbered"
            f" LEFT JOIN executions_agent found ON found.id = 'agt_' || {padded('a')})"
            f" SELECT {', '.join(values)} FROM owned",
            parameters,
        )


def padded(number: str) -> str:
    from django.db import connection

    return f"printf('%%026d', {number})" if connection.vendor == "sqlite" else f"lpad({number}::text, 26, '0')"


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("fill", "look", "allow"):
        inside(*sys.argv[1:])
    else:
        main(sys.argv[1:] or ["sqlite", "postgresql"])
