"""Whatever is sent to the REST door, it answers as its schema says."""

import pytest

pytest.importorskip("schemathesis")

from asgiref.sync import async_to_sync
from django.core.signals import request_finished, request_started
from django.db import close_old_connections

from executions import keys, operations
from executions.api import openapi
from executions.models import Agent, Artifact, Delivery, Transition, Webhook
from executions.operations import machines, posting
from executions.serializers import SessionRequest
from executions.states import Scope
from tests.plane.conftest import asks
from tests.rest import fuzz

pytestmark = [pytest.mark.django_db, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def real(caller, team, monkeypatch) -> dict[str, str]:
    """What the paths may name: objects that are there, none of which the fuzzer itself depends on."""
    asked = asks(keep_files=["*"], files={"a.txt": "YQ=="}, workflow="w")
    execution = async_to_sync(operations.execute)(caller=caller, request=asked)
    session = async_to_sync(operations.open_session)(caller=caller, request=SessionRequest())
    context = async_to_sync(machines.create_context)(caller=caller, session_id=session.pk, language="python", cwd=None)
    other = Agent.objects.create(team=team, name="other")
    webhook = Webhook.objects.create(team=team, url="https://told.example/", secret="sealed")
    step = Transition.objects.filter(execution=execution.id).latest("pk")
    told = Delivery.objects.create(webhook=webhook, execution_id=execution.id, transition=step)
    monkeypatch.setattr(posting, "post", nobody)
    return {
        "execution_id": execution.id,
        "session_id": session.pk,
        "sandbox_id": session.pk,
        "context_id": context["id"],
        "artifact_id": Artifact.objects.get(execution=execution.id).pk,
        "workflow": "w",
        "agent_id": other.pk,
        "webhook_id": webhook.pk,
        "delivery_id": told.pk,
        "key_id": keys.make_key(team=team, agent=other, name="other")[0].pk,
    }


async def nobody(*_) -> int:
    """In place of the network: whatever a webhook's address has become, nobody takes the message."""
    raise posting.NotSent("nobody is there")


@pytest.fixture(autouse=True)
def connected():
    """Requests are made within the test's transaction: its connection is not let go of around each."""
    request_started.disconnect(close_old_connections)
    request_finished.disconnect(close_old_connections)
    yield
    request_started.connect(close_old_connections)
    request_finished.connect(close_old_connections)


TEAMS = ("/agents", "/keys", "/webhooks")  # what a key of the whole team may do more


@pytest.fixture
def team_token(team) -> str:
    return keys.make_key(team=team, name="fuzzer", scopes=Scope.values)[1]


PARTS = 6  # of the long one: each a few minutes
LONG = [pytest.param(45, part, marks=pytest.mark.long, id=f"long{part}") for part in range(PARTS)]


@pytest.mark.parametrize(("examples", "part"), [pytest.param(2, None, id="short"), *LONG])
def test_whatever_is_sent_is_answered_as_the_schema_says(real, key, team_token, examples, part):
    found = [*fuzz.operations(real, key)]
    found += [(name, one) for name, one in fuzz.operations(real, team_token) if any(word in name for word in TEAMS)]
    mine = found if part is None else found[part::PARTS]

    sent = sum(fuzz.fuzz(strategy, examples) for _, strategy in mine)

    print(f"{sent} cases of {len(mine)} operations")  # noqa: T201 (pytest -rP shows it)
    assert sent >= 2000 / PARTS or examples < 45


@pytest.mark.parametrize("body", fuzz.HOSTILE, ids=lambda body: repr(body[:30]))
async def test_a_body_that_is_none_is_refused_wherever_it_is_sent(call, real, body):
    for address, methods in openapi.document()["paths"].items():
        for method in methods.keys() & {"post", "put", "patch"}:
            if "application/json" not in methods[method].get("requestBody", {}).get("content", {}):
                continue
            answer = await call(method.upper(), address.format_map(real), raw=body)
            assert str(answer.status_code) in methods[method]["responses"], (address, answer.content)
            assert answer.status_code < 500
