"""The Connect protocol in JSON, as far as E2B's clients use it: envelopes and errors."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from typing import Any

from .http import BODY_LIMIT, Refused, Request

STATUS = {
    "invalid_argument": 400, "unauthenticated": 401, "permission_denied": 403, "not_found": 404, "already_exists": 409,
    "resource_exhausted": 429, "failed_precondition": 400, "unimplemented": 501, "internal": 500, "unavailable": 503,
}  # fmt: skip


class ConnectError(Exception):
    """An answer other than success."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def described(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


def envelope(message: dict[str, Any], last: bool = False) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">BI", 2 if last else 0, len(data)) + data


async def messages(request: Request) -> AsyncIterator[dict[str, Any]]:
    """The messages of a request as they arrive. Refused (400) for what is none."""
    held = bytearray()
    async for piece in request.body():
        held += piece
        while len(held) >= 5:
            size = struct.unpack(">I", held[1:5])[0]
            if size > BODY_LIMIT:
                raise Refused(400, {"code": "invalid_argument", "message": "the message is too large"})
            if len(held) < 5 + size:
                break
            try:
                message = json.loads(held[5 : 5 + size])
            except ValueError:
                message = None
            if not isinstance(message, dict):
                raise Refused(400, {"code": "invalid_argument", "message": "the message is not a JSON object"})
            del held[: 5 + size]
            yield message
    if held:
        raise Refused(400, {"code": "invalid_argument", "message": "the message is incomplete"})


async def only_message(request: Request) -> dict[str, Any]:
    """The one message of a call that streams its answer only."""
    found = [message async for message in messages(request)]
    if len(found) != 1:
        raise Refused(400, {"code": "invalid_argument", "message": "one message is expected"})
    return found[0]
