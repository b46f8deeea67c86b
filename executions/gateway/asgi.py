"""What a raw ASGI app says and hears as a whole."""

from __future__ import annotations

import json
from typing import Any


async def answer(send: Any, status: int, body: Any) -> None:
    """Text, or a value as JSON. Nothing that this app answers by itself is worth a retry."""
    text = isinstance(body, str)
    kind = b"text/plain; charset=utf-8" if text else b"application/json; charset=utf-8"
    content = body.encode() if text else json.dumps(body).encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(content)).encode()), (b"should-retry", b"false")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def not_found(send: Any, sandbox_id: str) -> None:
    """The answer for a sandbox that is not there: the SDKs know it by its words."""
    await answer(send, 502, {"sandboxId": sandbox_id, "message": "The sandbox was not found", "code": 502})


async def whole_body(receive: Any, limit_bytes: int) -> bytes | None:
    """The body; None where the client left before its end. ValueError beyond the limit."""
    collected = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        collected += message.get("body", b"")
        if len(collected) > limit_bytes:
            raise ValueError(f"The body is larger than {limit_bytes} bytes")
        if not message.get("more_body", False):
            return bytes(collected)


async def gone(receive: Any) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
