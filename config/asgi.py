"""The one entry for servers: `uvicorn config.asgi:application`, `daphne config.asgi:application`."""

from __future__ import annotations

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

from django.core.asgi import get_asgi_application

django = get_asgi_application()

from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler

from executions.api import uploads
from executions.gateway import data as e2b
from executions.mcp import door as mcp  # the SDK itself is imported at the first request
from executions.urls import websocket_urlpatterns

pages = ASGIStaticFilesHandler(django)


async def http(scope, receive, send):
    """A path switch before Django: each request pays only for what its own door needs."""
    scope = e2b.addressed(scope)
    path = scope["path"]
    if path in ("/mcp", "/mcp/"):
        return await mcp.application(scope, receive, send)
    if e2b.is_for(scope):
        return await e2b.data(scope, receive, send)
    if uploads.is_for(scope):
        return await uploads.upload(scope, receive, send)
    if path.startswith("/static/"):
        return await pages(scope, receive, send)
    return await django(scope, receive, send)


async def lifespan(scope, receive, send):
    """Connections are let go when the server stops."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            from executions import backends

            await mcp.app.close()
            await backends.close_all()
            await send({"type": "lifespan.shutdown.complete"})
            return


application = ProtocolTypeRouter(
    {
        "http": http,
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter(websocket_urlpatterns))),
        "lifespan": lifespan,
    }
)
