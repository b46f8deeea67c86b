"""What monitoring is told: counted once, whoever counted; read by those who may; named as documented."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from django.db import DatabaseError
from django.test import RequestFactory
from django.urls import resolve
from django.utils import timezone

from executions import keys, metrics, operations
from executions.hop import rows
from executions.metrics import page
from executions.metrics.families import FAMILIES, REASONS
from executions.models import Agent, BackendState, Execution, MetricTotal, Quota, Sandbox, Transition
from executions.states import Scope, Unit
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(autouse=True)
def nothing_counted(monkeypatch):
    metrics._added.clear()
    metrics._latest.clear()
    monkeypatch.setattr(page, "FRESH_SECONDS", 0)


def scraped() -> dict[str, float]:
    """Each sample of the page by its name and labels, read as Prometheus reads it."""
    sample = re.compile(r'([a-z_]+(?:\{(?:[a-z]+="(?:[^"\\]|\\.)*",?)*\})?) (\S+)')
    found = {}
    for line in page.page().splitlines():
        if not line.startswith("#"):
            name, number = sample.fullmatch(line).groups()
            assert name not in found
            found[name] = float(number)
    return found


async def run(caller, code: str = "#= 1", **fields):
    return await operations.execute(caller=caller, request=asks(code, **fields))


async def test_a_run_is_counted_where_it_ran_with_what_it_took_and_cost(caller):
    shape = await run(caller)
    await run(caller, "#! ValueError: no")

    told = await rows(scraped)
    assert told['sandgate_executions_total{backend="first",state="succeeded",reason=""}'] == 1
    assert told['sandgate_executions_total{backend="first",state="failed",reason=""}'] == 1
    charged = told['sandgate_unpriced_charged_nano_usd_total{backend="first"}']  # it has no rates
    assert charged >= shape.unpriced_charged_nano_usd > 0
    assert told['sandgate_sandbox_creates_total{backend="first",outcome="ok"}'] == 2
    assert told['sandgate_sandbox_kills_total{backend="first",outcome="ok"}'] == 2
    for stretch in ("queue", "start", "run", "total"):
        assert told[f'sandgate_execution_{stretch}_seconds_count{{backend="first"}}'] == 2
        assert told[f'sandgate_execution_{stretch}_seconds_bucket{{backend="first",le="+Inf"}}'] == 2


async def test_a_backend_without_sandboxes_is_named_with_the_reason(caller, behave):
    behave("first", BEHAVES="never_boots")

    await run(caller)

    told = await rows(scraped)
    assert told['sandgate_backend_failures_total{backend="first",reason="backend_unavailable"}'] == 1
    assert told['sandgate_sandbox_creates_total{backend="first",outcome="backend_unavailable"}'] == 1
    assert told['sandgate_executions_total{backend="second",state="succeeded",reason=""}'] == 1


async def test_a_lost_sandbox_and_a_kill_that_is_not_confirmed_are_told(caller, behave):
    behave("first", BEHAVES="dies_mid_run")
    await run(caller)
    behave("first", BEHAVES="loses_kills")
    await run(caller)
    await Transition.objects.filter(after="retiring").aupdate(at=timezone.now() - timedelta(minutes=2))

    told = await rows(scraped)
    assert told['sandgate_backend_failures_total{backend="first",reason="sandbox_lost"}'] == 1
    assert told['sandgate_executions_total{backend="first",state="errored",reason="sandbox_lost"}'] == 1
    assert told['sandgate_sandbox_kills_total{backend="first",outcome="backend_error"}'] == 1
    assert told['sandgate_sandboxes_stuck{backend="first"}'] == 1
    assert told['sandgate_sandboxes_stuck{backend="second"}'] == 0
    assert told['sandgate_reserved_nano_usd{backend="first"}'] > 0


async def test_an_orphan_that_cannot_be_ended_is_a_leak_until_it_is(caller, behave):
    await run(caller)
    sandbox = await Sandbox.objects.aget()
    machine = behave("first", BEHAVES="loses_kills").machines[sandbox.provider_name]
    machine.died = None

    await operations.reap()
    leaked = (await rows(scraped))['sandgate_sandboxes_leaked{backend="first"}']
    behave("first")
    await operations.reap()

    told = await rows(scraped)
    assert leaked == 1
    assert told['sandgate_sandboxes_leaked{backend="first"}'] == 0
    assert told['sandgate_orphans_killed_total{backend="first"}'] == 1


async def test_a_refusal_is_counted_by_its_code(caller):
    await Quota.objects.acreate(team=caller.team, unit=Unit.CONCURRENT_EXECUTIONS, limit=0)

    with pytest.raises(Exception, match="at 0 of 0"):
        await run(caller)

    assert (await rows(scraped))['sandgate_refusals_total{code="quota_exceeded"}'] == 1


async def test_breakers_and_pools_are_read_from_their_rows(caller, seeded):
    await BackendState.objects.acreate(alias="second", state="open")
    await BackendState.objects.acreate(alias="of the past", state="open")
    execution = await rows(operations.submit, caller=caller, request=asks())
    await Sandbox.objects.filter(pk=execution.sandbox_id).aupdate(state="idle", made_of="x")

    told = await rows(scraped)
    assert told['sandgate_breaker_state{backend="first",state="closed"}'] == 1
    assert told['sandgate_breaker_state{backend="second",state="closed"}'] == 0
    assert told['sandgate_breaker_state{backend="second",state="open"}'] == 1
    assert told['sandgate_pool_sandboxes{backend="first",template="default",state="idle"}'] == 1
    assert not any("of the past" in name for name in told)


async def test_what_is_open_is_read_from_the_rows(caller):
    execution = await rows(operations.submit, caller=caller, request=asks())
    waits = await rows(operations.submit, caller=caller, request=asks())
    await Execution.objects.filter(pk=waits.pk).aupdate(
        state="queued", heartbeat_at=None, created_at=timezone.now() - timedelta(seconds=90)
    )

    told = await rows(scraped)
    assert told['sandgate_executions_in_flight{backend="first",state="starting"}'] == 1
    assert told['sandgate_executions_in_flight{backend="second",state="running"}'] == 0
    assert told['sandgate_sandboxes_open{backend="first",state="booting"}'] == 2
    assert told["sandgate_queue_length"] == 1
    assert 89 < told["sandgate_queue_oldest_seconds"] < 120
    assert told['sandgate_reserved_nano_usd{backend="first"}'] == 2 * execution.sandbox.reserved_nano_usd


def test_buckets_add_up():
    for seconds in (0.001, 0.005, 0.3, 7200):
        metrics.observe("sandgate_event_loop_lag_seconds", seconds=seconds)

    told = scraped()
    bounds = {"0.005": 2, "0.25": 2, "0.5": 3, "3600": 3, "+Inf": 4}
    assert {b: told[f'sandgate_event_loop_lag_seconds_bucket{{le="{b}"}}'] for b in bounds} == bounds
    assert told["sandgate_event_loop_lag_seconds_sum"] == pytest.approx(7200.306)


def test_processes_add_to_one_total_and_the_last_word_of_a_gauge_holds():
    for _ in range(3):  # a flush knows nothing of earlier ones, as another process would not
        metrics.refused("invalid")
        metrics.note("sandgate_sandboxes_leaked", "first", value=2)
        metrics.flush()
    metrics.note("sandgate_sandboxes_leaked", "first", value=1)

    told = scraped()
    assert told['sandgate_refusals_total{code="invalid"}'] == 3
    assert told['sandgate_sandboxes_leaked{backend="first"}'] == 1
    assert scraped()['sandgate_refusals_total{code="invalid"}'] == 3


def test_what_cannot_be_written_is_kept_and_the_page_says_that_the_database_is_away(monkeypatch):
    metrics.refused("invalid")

    def away(*_):
        raise DatabaseError

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_write", away)
        while_away = scraped()
    metrics.refused("invalid")

    assert while_away == {"sandgate_database_up": 0}
    assert scraped()['sandgate_refusals_total{code="invalid"}'] == 2


def test_labels_are_bounded(settings):
    for number in range(200):
        metrics.refused(f"made up {number}")
        with metrics.asking("create", f"gone-{number}"):
            pass

    told = scraped()
    assert told['sandgate_refusals_total{code="other"}'] == 200
    assert told['sandgate_sandbox_creates_total{backend="other",outcome="ok"}'] == 200
    assert MetricTotal.objects.count() < 10


def test_a_page_is_read_once_a_second(monkeypatch, django_assert_num_queries):
    monkeypatch.setattr(page, "FRESH_SECONDS", 60)
    monkeypatch.setattr(page, "_last", (0.0, ""))
    page.page()

    with django_assert_num_queries(0):
        page.page()


# Names


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| `(sandgate_\w+)` \| (\w+) \| ([^|]*) \| [^|]+ \|$", DOCUMENT.read_text(), re.M)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_every_metric_is_documented_with_its_type_and_labels():
    assert documented() == {name: (family.type, family.labels) for name, family in FAMILIES.items()}


def test_the_rules_of_the_document_name_metrics_that_exist():
    rules = DOCUMENT.read_text().split("```yaml")[2].split("```")[0]
    named = set(re.findall(r"\bsandgate_\w+", rules))

    exported = {n for n, f in FAMILIES.items() if f.type != "histogram"}
    exported |= {
        f"{n}_{part}" for n, f in FAMILIES.items() if f.type == "histogram" for part in ("bucket", "sum", "count")
    }
    assert named
    assert named <= exported
    assert rules.count("alert:") == 6


def test_what_the_code_counts_stands_in_the_table_and_the_other_way_round():
    source = "".join(
        path.read_text() for path in (DOCUMENT.parents[1] / "executions").rglob("*.py") if path.name != "families.py"
    )
    used = set(re.findall(r'"(sandgate_[a-z_]+)"', source))
    asked = {f"sandgate_sandbox_{verb}{end}" for verb in ("create", "kill") for end in ("_seconds", "s_total")}

    assert {name for name in used if name.endswith(("_total", "_seconds"))} <= set(FAMILIES)
    assert set(FAMILIES) - asked - used == set()


def test_each_family_is_told_with_its_help_and_type():
    heads = re.findall(r"^# HELP (\w+) .+\n# TYPE \1 (counter|gauge|histogram)$", page.page(), re.M)

    assert dict(heads) == {name: family.type for name, family in FAMILIES.items()}


def test_every_code_that_can_be_stored_has_a_label():
    assert {"quota_exceeded", "sandbox_lost", "runner_lost", "cancelled", "out_of_memory", "internal"} <= REASONS


# Who may read


async def ask(token: str | None = None, *, host: str = "127.0.0.1:8000", peer: str = "127.0.0.1", **headers: str):
    """The answer to a request as the server would hand it on, from this peer."""
    named = {"Authorization": f"Bearer {token}"} if token else {}
    request = RequestFactory().get("/metrics", headers={**named, **headers}, HTTP_HOST=host, REMOTE_ADDR=peer)
    return await resolve("/metrics").func(request)


def key_with(agent: Agent, *scopes: str) -> str:
    return keys.make_key(team=agent.team, agent=agent, name="reads", scopes=list(scopes))[1]


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000", "[::1]"])
async def test_this_machine_reads_it_without_a_key(host):
    answer = await ask(host=host)

    assert (answer.status_code, answer["Content-Type"]) == (200, page.CONTENT_TYPE)
    assert b"sandgate_database_up 1\n" in answer.content


@pytest.mark.parametrize(
    "asked",
    [
        {"peer": "192.0.2.7"},
        {"peer": ""},
        {"host": "sandgate.example.org"},
        {"host": "127.0.0.1.example.org"},
        {"host": ""},
        {"X-Forwarded-For": "192.0.2.7"},
        {"Forwarded": "for=192.0.2.7"},
    ],
    ids=["another_machine", "unknown", "a_public_name", "a_name_like_loopback", "no_name", "a_proxy", "a_newer_proxy"],
)
async def test_whoever_is_not_surely_of_this_machine_needs_a_key(asked):
    answer = await ask(**asked)

    assert (answer.status_code, json.loads(answer.content)["code"]) == (401, "unauthenticated")


async def test_a_key_needs_the_scope_of_operators(agent):
    reads = await ask(await rows(key_with, agent, Scope.READ), peer="192.0.2.7")
    manages = await ask(await rows(key_with, agent, Scope.MANAGE), peer="192.0.2.7")
    wrong = await ask("sg_wrong")

    assert (reads.status_code, manages.status_code, wrong.status_code) == (403, 200, 401)


async def test_a_token_of_its_own_is_asked_for_everywhere_once_it_is_set(settings):
    settings.METRICS_TOKEN = "a token for tests"

    without = await ask()
    wrong = await ask("a token for test")
    right = await ask("a token for tests", peer="192.0.2.7")

    assert (without.status_code, wrong.status_code, right.status_code) == (401, 401, 200)
