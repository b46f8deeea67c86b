"""/api/v1/webhooks: addresses that are told of the team's executions, and what became of each message."""

from __future__ import annotations

from dataclasses import asdict

from django.http import HttpRequest, HttpResponse

from executions.api.auth import caller_of
from executions.api.executions import answer, body_of
from executions.api.once import done_once, written
from executions.api.operation import Many, operation
from executions.api.pages import ROWS_MOST, known_query, listed
from executions.errors import Invalid
from executions.hop import rows
from executions.keys import Caller
from executions.operations import webhooks
from executions.operations.answers import Kept
from executions.serializers import parse
from executions.serializers.webhooks import (
    DeliveryShape,
    MadeWebhookShape,
    WebhookChange,
    WebhookRequest,
    WebhookRotateRequest,
    WebhookShape,
    WebhookTestShape,
    delivery_shape,
    webhook_shape,
)
from executions.states import DeliveryState

DELIVERIES_MOST = 200


@operation("List webhooks", gives={200: Many(WebhookShape)})
async def every(request: HttpRequest) -> HttpResponse:
    def look() -> list[WebhookShape]:
        caller = caller_of(request)
        known_query(request)
        return [_shape(one) for one in webhooks.webhooks_of(caller).order_by("created_at", "id")[:ROWS_MOST]]

    return listed(await rows(look))


@operation("Make a webhook", body=WebhookRequest, gives={201: MadeWebhookShape}, fails=(409, 422))
async def create(request: HttpRequest) -> HttpResponse:
    def make(caller: Caller) -> tuple[Kept, Kept]:
        made, secret = webhooks.make_webhook(caller=caller, asked=parse(WebhookRequest, body_of(request)))
        return _told(webhook_shape(made), secret, 201)

    return await written(request, make)


@operation("Look at a webhook", gives={200: WebhookShape})
async def look(request: HttpRequest, webhook_id: str) -> HttpResponse:
    return answer(await rows(lambda: _shape(webhooks.find_webhook(caller_of(request), webhook_id))))


@operation("Change a webhook", body=WebhookChange, gives={200: WebhookShape}, fails=(409, 422))
async def change(request: HttpRequest, webhook_id: str) -> HttpResponse:
    def do(caller: Caller) -> tuple[Kept, Kept]:
        webhooks.change_webhook(caller=caller, webhook_id=webhook_id, asked=parse(WebhookChange, body_of(request)))
        said = Kept(200, _shape(webhooks.find_webhook(caller, webhook_id)).model_dump_json())
        return said, said

    return await written(request, do)


@operation("Send a test message", gives={200: WebhookTestShape}, fails=(409, 422))
@done_once
async def send_test(request: HttpRequest, webhook_id: str) -> HttpResponse:
    caller = await rows(caller_of, request)
    return answer(WebhookTestShape(**asdict(await webhooks.send_test(caller=caller, webhook_id=webhook_id))))


@operation("Give a webhook a new secret", body=WebhookRotateRequest, gives={201: MadeWebhookShape}, fails=(409, 422))
async def rotate(request: HttpRequest, webhook_id: str) -> HttpResponse:
    def do(caller: Caller) -> tuple[Kept, Kept]:
        overlap = parse(WebhookRotateRequest, body_of(request)).overlap_seconds
        _, secret = webhooks.rotate_secret(caller=caller, webhook_id=webhook_id, overlap_seconds=overlap)
        return _told(_shape(webhooks.find_webhook(caller, webhook_id)), secret, 201)

    return await written(request, do)


@operation("Remove a webhook", gives={204: None})
async def remove(request: HttpRequest, webhook_id: str) -> HttpResponse:
    await rows(lambda: webhooks.remove_webhook(caller=caller_of(request), webhook_id=webhook_id))
    return HttpResponse(status=204)


@operation(
    "List a webhook's latest deliveries, newest first",
    gives={200: Many(DeliveryShape)},
    query={"state": {"type": "string", "enum": DeliveryState.values}},
)
async def deliveries(request: HttpRequest, webhook_id: str) -> HttpResponse:
    def look() -> list[DeliveryShape]:
        caller = caller_of(request)
        known_query(request, {"state"})
        found = webhooks.deliveries_of(caller, webhook_id)
        if (state := request.GET.get("state")) is not None:
            if state not in DeliveryState.values:
                raise Invalid(f"state: one of {', '.join(DeliveryState.values)}.", field="state")
            found = found.filter(state=state)
        return [delivery_shape(one) for one in found[:DELIVERIES_MOST]]

    return listed(await rows(look))


@operation("Send a message again", gives={202: DeliveryShape}, fails=(409, 422))
async def resend(request: HttpRequest, webhook_id: str, delivery_id: str) -> HttpResponse:
    def do(caller: Caller) -> tuple[Kept, Kept]:
        sent = webhooks.resend(caller=caller, webhook_id=webhook_id, delivery_id=delivery_id)
        said = Kept(202, delivery_shape(sent).model_dump_json())
        return said, said

    return await written(request, do)


def _shape(found) -> WebhookShape:
    return webhook_shape(found, found.pending, found.dead)


def _told(shape: WebhookShape, secret: str, status: int) -> tuple[Kept, Kept]:
    """With the secret for whoever asked, without it for the record."""
    with_it, without = (MadeWebhookShape(**shape.model_dump(), secret=said) for said in (secret, None))
    return Kept(status, with_it.model_dump_json()), Kept(status, without.model_dump_json())
