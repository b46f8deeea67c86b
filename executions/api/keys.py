"""/api/v1/keys: secrets of programs. Each is shown once, when it is made."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse

from executions.api.auth import caller_of
from executions.api.executions import answer, body_of
from executions.api.once import written
from executions.api.operation import Many, operation
from executions.api.pages import ROWS_MOST, known_query, listed
from executions.hop import rows
from executions.keys import Caller
from executions.models import ApiKey
from executions.operations import access
from executions.operations.answers import Kept
from executions.serializers import parse
from executions.serializers.access import (
    KeyRequest,
    KeyShape,
    MadeKeyShape,
    RotateRequest,
    key_shape,
    made_key_shape,
)


@operation("List keys, newest first", gives={200: Many(KeyShape)})
async def every(request: HttpRequest) -> HttpResponse:
    def look() -> list[KeyShape]:
        caller = caller_of(request)
        known_query(request)
        return [key_shape(key) for key in access.keys_of(caller).order_by("-created_at", "-id")[:ROWS_MOST]]

    return listed(await rows(look))


@operation("Make a key", body=KeyRequest, gives={201: MadeKeyShape}, fails=(409, 422))
async def create(request: HttpRequest) -> HttpResponse:
    def make(caller: Caller) -> tuple[Kept, Kept]:
        return _told(*access.issue_key(caller=caller, asked=parse(KeyRequest, body_of(request))))

    return await written(request, make)


@operation("Look at a key", gives={200: KeyShape})
async def look(request: HttpRequest, key_id: str) -> HttpResponse:
    return answer(await rows(lambda: key_shape(access.find_key(caller_of(request), key_id))))


@operation("Make a new secret, with an overlap", body=RotateRequest, gives={201: MadeKeyShape}, fails=(409, 422))
async def rotate(request: HttpRequest, key_id: str) -> HttpResponse:
    def make(caller: Caller) -> tuple[Kept, Kept]:
        asked = parse(RotateRequest, body_of(request))
        new, secret, old = access.rotate_key(caller=caller, key_id=key_id, overlap_seconds=asked.overlap_seconds)
        return _told(new, secret, old.pk)

    return await written(request, make)


@operation("Revoke a key", gives={204: None})
async def revoke(request: HttpRequest, key_id: str) -> HttpResponse:
    await rows(lambda: access.revoke_key(caller=caller_of(request), key_id=key_id))
    return HttpResponse(status=204)


def _told(key: ApiKey, secret: str, replaces: str | None = None) -> tuple[Kept, Kept]:
    """With the secret for whoever asked, without it for the record."""
    return (
        Kept(201, made_key_shape(key, secret, replaces).model_dump_json()),
        Kept(201, made_key_shape(key, None, replaces).model_dump_json()),
    )
