"""Webhooks: signed, at least once, in order, and never to where they may not go. The receiver is a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, connections
from django.utils import timezone

from executions import faults, keys, metrics, operations
from executions.errors import Forbidden, Invalid, NotFound
from executions.hop import rows
from executions.metrics import page
from executions.models import Agent, AuditEvent, Delivery, Team, Webhook
from executions.operations import deliver, posting, webhooks
from executions.serializers import parse
from executions.serializers.webhooks import WebhookChange, WebhookRequest
from executions.states import Scope
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent; answers with `statuses` in turn, then with 204. `gate` holds every answer back."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.location = ""
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/told?of=it"

    @property
    def told(self) -> list[tuple[str, str]]:
        """(id of the message, state that it tells) in the order of arrival."""
        return [(head["webhook-id"], json.loads(body)["type"]) for head, body in self.got]


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            status = self.server.statuses.pop(0) if self.server.statuses else 204
        self.send_response(status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        said = b"" if status == 204 else b"no\x00\n" + b"!" * 100_000
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def receiver(settings):
    settings.WEBHOOK_NETWORKS = ["127.0.0.0/8"]
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def forgets():
    deliver._seen = (0, frozenset())
    yield
    faults.arm("")


@pytest.fixture
def manager(caller, team) -> keys.Caller:
    key, _ = keys.make_key(team=team, name="of the team", scopes=list(Scope.values))
    return keys.Caller(team=team, agent=None, key=key, scopes=frozenset(Scope.values), door="rest")


async def hook(manager: keys.Caller, url: str, **fields) -> tuple[Webhook, str]:
    asked = parse(WebhookRequest, {"url": url, **fields})
    return await rows(lambda: webhooks.make_webhook(caller=manager, asked=asked))


async def tell() -> None:
    """Look twice, as PostgreSQL's steps count when they were seen before, and wait until all that is due was tried."""
    for _ in range(2):
        for problem in await asyncio.gather(*await deliver.look(), return_exceptions=True):
            if problem is not None:
                raise problem


async def run(caller: keys.Caller, code: str = "#= 1"):
    return await operations.execute(caller=caller, request=asks(code))


async def due_again() -> None:
    await Delivery.objects.filter(state="pending").aupdate(next_at=timezone.now())


async def test_a_message_is_signed_as_the_standard_says_and_tells_the_execution_without_code_or_output(
    caller, manager, receiver
):
    _, secret = await hook(manager, receiver.url, states=["succeeded"])
    done = await run(caller, "#> hello\n#= 421733109421")

    await tell()

    [(head, body)] = receiver.got
    signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + body
    expected = hmac.new(base64.b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256).digest()
    assert head["webhook-signature"] == "v1," + base64.b64encode(expected).decode()
    said = json.loads(body)
    shown = done.model_dump(mode="json")
    assert said["type"] == "execution.succeeded"
    assert {"code", "results", "logs", "error", "detail"} & said["data"].keys() == set()
    assert {name: shown[name] for name in said["data"]} == said["data"]
    assert said["data"]["cost_usd"] != ""
    assert b"hello" not in body
    assert b"421733109421" not in body
    kept = await Webhook.objects.aget()
    assert secret not in kept.secret
    assert secret.removeprefix("whsec_") not in kept.secret
    assert (await Delivery.objects.aget()).state == "delivered"


async def test_an_executions_steps_come_in_order_each_as_it_was_then(caller, manager, receiver):
    await hook(manager, receiver.url)
    done = await run(caller)

    await tell()

    states = [kind.removeprefix("execution.") for _, kind in receiver.told]
    assert states[0] == "queued"
    assert states[-2:] == ["running", "succeeded"]
    steps = [int(name.removeprefix("trn_")) for name, _ in receiver.told]
    assert steps == sorted(steps)
    assert len(set(steps)) == len(steps)
    running = json.loads(receiver.got[-2][1])["data"]
    assert (running["id"], running["state"], running["ended_at"], running["cost_usd"]) == (done.id, "running", None, "")


async def test_what_is_not_taken_is_sent_again_under_the_same_id_and_nothing_overtakes_it(caller, manager, receiver):
    await hook(manager, receiver.url, states=["running", "succeeded"])
    await run(caller)
    receiver.statuses = [500]

    await tell()
    assert [kind for _, kind in receiver.told] == ["execution.running"]
    failed = await Delivery.objects.order_by("transition").afirst()
    assert (failed.state, failed.tries, failed.status) == ("pending", 1, 500)
    assert failed.error.startswith("Answered 500 no !!!")
    assert len(failed.error) <= 300
    assert failed.next_at > timezone.now()
    await due_again()
    await tell()

    first, again, later = receiver.told
    assert first == again == (first[0], "execution.running")
    assert later[1] == "execution.succeeded"
    assert receiver.got[0][1] == receiver.got[1][1]
    assert [d.state async for d in Delivery.objects.all()] == ["delivered", "delivered"]


async def test_one_execution_that_is_not_taken_does_not_hold_up_another(caller, manager, receiver):
    await hook(manager, receiver.url, states=["succeeded"])
    receiver.statuses = [500]
    first = await run(caller)
    await tell()
    second = await run(caller)
    await tell()

    assert [json.loads(body)["data"]["id"] for _, body in receiver.got] == [first.id, second.id]


async def test_what_was_tried_often_enough_is_dead_and_is_sent_again_when_somebody_asks(caller, manager, receiver):
    webhook, _ = await hook(manager, receiver.url, states=["succeeded"])
    await run(caller)
    receiver.statuses = [503] * deliver.TRIES_MOST
    pauses = []
    for _ in range(deliver.TRIES_MOST):
        began = timezone.now()
        await tell()
        letter = await Delivery.objects.aget()
        pauses.append((letter.next_at - began).total_seconds())
        await due_again()
    assert (letter.state, letter.tries) == ("dead", deliver.TRIES_MOST)
    assert all(pause >= least for pause, least in zip(pauses, (5, 20, 80, 320, 1280, 5120, 20480, 43200), strict=False))
    await tell()
    assert len(receiver.got) == deliver.TRIES_MOST

    await rows(lambda: webhooks.resend(caller=manager, webhook_id=webhook.pk, delivery_id=letter.pk))
    await tell()

    assert len(set(receiver.told)) == 1
    assert len(receiver.got) == deliver.TRIES_MOST + 1
    assert (await Delivery.objects.aget()).state == "delivered"
    assert await AuditEvent.objects.filter(action="webhook_resent", subject=webhook.pk).aexists()


async def test_a_process_that_dies_before_it_writes_down_what_it_sent_makes_a_repetition(caller, manager, receiver):
    await hook(manager, receiver.url, states=["succeeded"])
    await run(caller)
    faults.arm("webhook_sent:1:raise")

    with pytest.raises(faults.Fault):
        await tell()
    await tell()
    assert len(receiver.got) == 1  # leased: another process does not send it beside the first
    await Delivery.objects.aupdate(leased_until=timezone.now() - timedelta(seconds=1))
    await tell()

    assert len(receiver.got) == 2
    assert len(set(receiver.told)) == 1
    assert (await Delivery.objects.aget()).state == "delivered"


async def test_what_is_leased_is_leased_to_nobody_else_nor_is_what_comes_after_it(caller, manager, receiver):
    webhook, _ = await hook(manager, receiver.url)
    await run(caller)
    await run(caller)
    for _ in range(2):
        await rows(deliver._due)

    first, second = await rows(deliver._lease, webhook.pk), await rows(deliver._lease, webhook.pk)

    assert len({d.execution_id for d in first}) == len(first) == 2
    assert second == []


async def test_a_late_answer_does_not_undo_what_a_later_try_has_written(caller, manager, receiver):
    webhook, _ = await hook(manager, receiver.url, states=["succeeded"])
    await run(caller)
    for _ in range(2):
        await rows(deliver._due)
    [late] = await rows(deliver._lease, webhook.pk)
    await Delivery.objects.aupdate(leased_until=timezone.now() - timedelta(seconds=1))
    await tell()

    await rows(deliver._failed, late, "Too late.", None)

    now = await Delivery.objects.aget()
    assert (now.state, now.tries, now.error) == ("delivered", 2, "")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "https://127.0.0.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://10.0.0.1/",
        "https://169.254.169.254/latest", "https://[fe80::1]/", "https://0.0.0.0/", "https://2130706433/", "https://0x7f.1/",
        "http://8.8.8.8/", "ftp://example.org/", "https://a@example.org/", "https://example.org/#x", "https://exa mple.org/",
        "https:///x", "example.org", "https://example.org:0/", "https://example.org:70000/", "https://example.org\\@x/",
    ],
)  # fmt: skip
async def test_an_address_that_may_not_be_told_is_refused_when_it_is_named(manager, url):
    with pytest.raises(Invalid) as refused:
        await hook(manager, url)

    assert refused.value.facts["field"] == "url"


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
async def test_a_name_that_leads_to_a_private_address_is_not_connected_to(caller, manager, receiver, settings, name):
    url = receiver.url.replace("127.0.0.1", name)
    await hook(manager, url, states=["succeeded"])
    await run(caller)
    settings.WEBHOOK_NETWORKS = ["192.0.2.0/24"]

    await tell()

    letter = await Delivery.objects.aget()
    assert (receiver.got, letter.state, letter.status) == ([], "pending", None)
    assert "is not public" in letter.error


async def test_it_connects_to_the_address_that_was_checked_and_asks_for_its_name_once(
    caller, manager, receiver, monkeypatch
):
    asked = []

    async def rebinds(self, host, port, **_):
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1" if len(asked) == 1 else "127.0.0.9", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rebinds)
    where = f"told.example:{receiver.server_address[1]}"

    assert await posting.post(f"http://{where}/x", {}, b"{}") == 204

    assert asked == ["told.example"]
    assert receiver.got[0][0]["host"] == where


async def test_a_redirect_is_not_followed(caller, manager, receiver):
    await hook(manager, receiver.url, states=["succeeded"])
    receiver.statuses, receiver.location = [307], receiver.url + "&again=1"
    await run(caller)

    await tell()

    letter = await Delivery.objects.aget()
    assert (len(receiver.got), letter.state, letter.status) == (1, "pending", 307)


async def test_nobody_there_is_a_try_that_failed(caller, manager, receiver):
    await hook(manager, receiver.url.replace("127.0.0.1", "127.0.0.2"), states=["succeeded"])
    await run(caller)

    await tell()

    letter = await Delivery.objects.aget()
    assert (letter.tries, letter.status, letter.error.split(":")[0]) == (1, None, "ConnectError")


async def test_another_teams_webhook_is_told_nothing_and_is_seen_by_nobody_else(caller, manager, receiver):
    other = await Team.objects.acreate(name="theirs")
    eve = keys.Caller(team=other, agent=None, scopes=frozenset(Scope.values), door="rest")
    theirs, _ = await hook(eve, receiver.url)
    await run(caller)

    await tell()

    assert receiver.got == []
    assert not await Delivery.objects.aexists()
    assert (await Webhook.objects.aget()).cursor > 0
    with pytest.raises(NotFound):
        await rows(lambda: webhooks.find_webhook(manager, theirs.pk))
    of_agent = keys.Caller(
        team=manager.team,
        agent=await Agent.objects.afirst(),
        key=caller.key,
        scopes=frozenset(Scope.values),
        door="rest",
    )
    with pytest.raises(Forbidden):
        await rows(lambda: list(webhooks.webhooks_of(of_agent)))


async def test_one_that_is_off_is_told_nothing_also_not_later_of_what_happened_meanwhile(caller, manager, receiver):
    webhook, _ = await hook(manager, receiver.url, states=["succeeded"])

    def switch(on: bool) -> None:
        asked = parse(WebhookChange, {"is_active": on})
        webhooks.change_webhook(caller=manager, webhook_id=webhook.pk, asked=asked)

    await rows(switch, False)
    await run(caller)
    await tell()
    await rows(switch, True)
    after = await run(caller)
    await tell()

    assert [json.loads(body)["data"]["id"] for _, body in receiver.got] == [after.id]
    told = [e async for e in AuditEvent.objects.filter(subject=webhook.pk).order_by("seq")]
    assert [e.action for e in told] == ["webhook_made", "webhook_changed", "webhook_changed"]
    assert told[0].after["secret"] == "(secret)"
    assert told[1].after == {"is_active": False}


async def test_what_was_delivered_is_forgotten_after_days(caller, manager, receiver):
    await hook(manager, receiver.url, states=["succeeded"])
    await run(caller)
    await tell()
    await Webhook.objects.aupdate(former_secret="sealed", former_until=timezone.now() - timedelta(seconds=1))
    assert await rows(deliver.prune) == 0
    assert (await Webhook.objects.aget()).former_secret == ""
    await Delivery.objects.aupdate(ended_at=timezone.now() - timedelta(days=4))

    assert await rows(deliver.prune) == 1


async def test_over_rest_a_secret_is_shown_once_and_dead_messages_are_listed_and_sent_again(
    async_client, caller, team, receiver
):
    _, token = await rows(lambda: keys.make_key(team=team, name="rest", scopes=list(Scope.values)))

    async def call(method: str, path: str, body: dict | None = None, **headers):
        return await async_client.generic(
            method,
            f"/api/v1/webhooks{path}",
            json.dumps(body or {}),
            headers={"Authorization": f"Bearer {token}", **headers},
        )

    once = {"Idempotency-Key": "one"}
    made = await call("POST", "", {"url": receiver.url, "states": ["succeeded"]}, **once)
    again = await call("POST", "", {"url": receiver.url, "states": ["succeeded"]}, **once)
    here = f"/{made.json()['id']}"
    assert (made.status_code, made.json()["secret"][:6], again.json()["secret"]) == (201, "whsec_", None)
    assert again.json()["id"] == made.json()["id"]
    assert "secret" not in (await call("GET", here)).json()
    rotated = (await call("POST", f"{here}/rotate")).json()
    assert rotated["secret"] not in ("", made.json()["secret"])
    assert rotated["former_secret_until"] is not None
    assert (await call("POST", f"{here}/rotate", {"overlap_seconds": 0})).json()["former_secret_until"] is None
    tried = await call("POST", f"{here}/test", **{"Idempotency-Key": "two"})
    assert (await call("POST", f"{here}/test", **{"Idempotency-Key": "two"})).json() == tried.json()
    assert (tried.json()["status"], tried.json()["error"]) == (204, "")
    assert (await call("POST", "/whk_none/test")).status_code == 404
    assert [receiver.got.pop()[0]["webhook-id"]] == [tried.json()["message_id"]]

    await run(caller)
    await tell()
    await Delivery.objects.aupdate(state="dead", ended_at=timezone.now())
    assert (await call("GET", here)).json()["dead"] == 1
    [letter] = (await call("GET", f"{here}/deliveries?state=dead")).json()["results"]
    assert (letter["execution_state"], letter["message_id"]) == ("succeeded", receiver.told[0][0])
    assert (await call("POST", f"{here}/deliveries/{letter['id']}/resend")).status_code == 202
    await tell()
    assert len(receiver.got) == 2
    assert (await call("GET", f"{here}/deliveries?state=lost")).status_code == 400
    assert (await call("PATCH", here, {"url": "https://10.0.0.1/"})).status_code == 400
    assert (await call("DELETE", here)).status_code == 204
    assert (await call("GET", here)).status_code == 404


def signed_with(secret: str, head: dict[str, str], body: bytes) -> bool:
    """As the libraries of the Standard Webhooks look at it: one of the signatures is enough."""
    expected = posting.signature(secret, head["webhook-id"], head["webhook-timestamp"], body)
    return expected in head["webhook-signature"].split(" ")


async def test_a_former_secret_signs_beside_the_new_one_until_its_time_is_over(caller, manager, receiver):
    webhook, old = await hook(manager, receiver.url, states=["succeeded"])
    _, new = await rows(lambda: webhooks.rotate_secret(caller=manager, webhook_id=webhook.pk, overlap_seconds=60))
    await run(caller)
    await tell()
    await Webhook.objects.aupdate(former_until=timezone.now() - timedelta(seconds=1))
    await run(caller)
    await tell()

    (first, said), (second, later) = receiver.got
    assert (signed_with(old, first, said), signed_with(new, first, said)) == (True, True)
    assert (signed_with(old, second, later), signed_with(new, second, later)) == (False, True)
    event = await AuditEvent.objects.filter(action="webhook_changed").alast()
    assert not {old, new} & set(map(str, event.after.values()))


async def test_a_secret_that_is_rotated_without_an_overlap_signs_nothing_more(caller, manager, receiver):
    webhook, old = await hook(manager, receiver.url, states=["succeeded"])
    await rows(lambda: webhooks.rotate_secret(caller=manager, webhook_id=webhook.pk))
    _, new = await rows(lambda: webhooks.rotate_secret(caller=manager, webhook_id=webhook.pk, overlap_seconds=0))
    await run(caller)
    await tell()

    [(head, body)] = receiver.got
    assert (signed_with(old, head, body), signed_with(new, head, body)) == (False, True)
    assert (await Webhook.objects.aget()).former_secret == ""


async def test_a_test_message_is_signed_sent_at_once_and_kept_nowhere(manager, receiver):
    webhook, secret = await hook(manager, receiver.url, is_active=False)
    taken = await webhooks.send_test(caller=manager, webhook_id=webhook.pk)
    receiver.statuses = [500]
    refused = await webhooks.send_test(caller=manager, webhook_id=webhook.pk)

    (head, body), _ = receiver.got
    assert (taken.status, taken.error, refused.status) == (204, "", 500)
    assert refused.error.startswith("Answered 500 no")
    assert signed_with(secret, head, body)
    assert (json.loads(body)["type"], head["webhook-id"]) == ("webhook.test", taken.message_id)
    assert not await Delivery.objects.aexists()
    assert [e.after["status"] async for e in AuditEvent.objects.filter(action="webhook_tested").order_by("seq")] == [
        204,
        500,
    ]


async def test_a_test_message_goes_nowhere_where_others_may_not(manager, receiver, settings):
    webhook, _ = await hook(manager, receiver.url)
    settings.WEBHOOK_NETWORKS = []

    refused = await webhooks.send_test(caller=manager, webhook_id=webhook.pk)

    assert (refused.status, receiver.got) == (None, [])
    assert "is not public" in refused.error


async def test_tries_are_counted_by_what_became_of_them_and_what_waits_by_its_age(caller, manager, receiver):
    await hook(manager, receiver.url, states=["succeeded"])
    await hook(manager, receiver.url, states=["failed"], is_active=False)
    metrics._added.clear()
    receiver.statuses = [500]
    await run(caller)
    await tell()
    await Delivery.objects.aupdate(created_at=timezone.now() - timedelta(seconds=90))
    waiting = await rows(page._live)
    await Delivery.objects.aupdate(next_at=timezone.now())
    await tell()
    done = await rows(page._live)
    counted = {
        labels: n for (name, labels, _), n in metrics._added.items() if name == "sandgate_webhook_deliveries_total"
    }

    assert waiting["sandgate_webhook_backlog"] == {(): 1}
    assert 90 <= waiting["sandgate_webhook_oldest_seconds"][()] < 150
    assert (done["sandgate_webhook_backlog"], done["sandgate_webhook_oldest_seconds"]) == ({(): 0}, {(): 0})
    assert counted == {("failed",): 1, ("delivered",): 1}


@pytest.mark.parametrize("where", [None, "whk_one"])
def test_what_is_due_is_looked_for_among_open_messages_alone(where):
    if connection.vendor != "sqlite":
        pytest.skip("PostgreSQL's planner reads small tables whole")
    assert "delivery_open" in deliver._free(where).explain()


@pytest.fixture
def beside():
    """Another connection to the same database, in a transaction."""
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one writer at a time: numbers come in the order of commits")
    other = connections.create_connection("default")
    other.set_autocommit(False)
    yield other
    other.rollback()
    other.close()


def step(of, execution_id: str) -> int:
    """The number of a step that is written through this connection."""
    with of.cursor() as cursor:
        cursor.execute(
            "INSERT INTO executions_transition (before, after, reason, at, execution_id)"
            " VALUES ('running', 'succeeded', '', now(), %s) RETURNING id",
            [execution_id],
        )
        return cursor.fetchone()[0]


@pytest.mark.django_db(transaction=True)
def test_a_step_that_is_committed_late_is_waited_for_by_those_with_later_numbers(caller, beside):
    execution = async_to_sync(run)(caller)
    late = step(beside, execution.id)
    later = step(connection, execution.id)

    assert later > late
    assert max(deliver._settled() for _ in range(3)) < late
    beside.commit()
    assert deliver._settled() == later


@pytest.mark.django_db(transaction=True)
def test_those_who_keep_coming_hold_up_nothing_that_was_there_before_them(caller, beside):
    execution = async_to_sync(run)(caller)
    step(beside, execution.id)
    seen = step(connection, execution.id)
    deliver._settled()
    beside.commit()
    step(beside, execution.id)  # another transaction, which goes on

    assert deliver._settled() == seen


@pytest.mark.django_db(transaction=True)
def test_a_long_transaction_that_writes_no_step_holds_nothing_up(caller, beside):
    execution = async_to_sync(run)(caller)
    with beside.cursor() as cursor:
        cursor.execute("UPDATE executions_team SET name = name")
    newest = step(connection, execution.id)

    assert deliver._settled() == newest
