"""Files on their way in, as they come: a raw ASGI app, as Django would first write a whole body to this machine's disk."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

from django.core.handlers.asgi import ASGIRequest

from executions.api import files

ADDRESS = re.compile(r"/api/v1/sessions/([^/]+)/files")


def is_for(scope: Any) -> bool:
    return scope["method"] == "PUT" and bool(ADDRESS.fullmatch(scope["path"]))


async def upload(scope: Any, receive: Any, send: Any) -> None:
    """Answer as the view does; what is left of a refused body is not read, and the server closes the connection."""
    request = ASGIRequest(scope, BytesIO())
    request.id = "req_" + secrets.token_hex(10)  # type: ignore[attr-defined]
    request.pieces = _arriving(receive)  # type: ignore[attr-defined]
    found = ADDRESS.fullmatch(scope["path"])
    assert found is not None
    response = await files.write(request, session_id=found[1])
    response["Request-Id"] = request.id  # type: ignore[attr-defined]
    response["Content-Length"] = str(len(response.content))  # type: ignore[attr-defined]
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.items()]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.content})  # type: ignore[attr-defined]


async def _arriving(receive: Any) -> AsyncIterator[bytes]:
    """Raises ConnectionError where the client leaves before the end."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("The client left before the end of the body.")
        if piece := message.get("body", b""):
            yield piece
        more = message.get("more_body", False)
