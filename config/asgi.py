"""The one entry for servers: `uvicorn config.asgi:application`, `daphne config.asgi:application`."""

from __future__ import annotations

import os
from concurrent.futures import Executor, Future

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

from django.core.asgi import get_asgi_application

django = get_asgi_application()

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.conf import settings
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler

from executions.api import uploads
from executions.gateway import data as e2b
from executions.mcp import door as mcp  # the SDK itself is imported at the first request
from executions.urls import websocket_urlpatterns

pages = ASGIStaticFilesHandler(django)


class InPlace(Executor):
    """Does at once, on the loop's own thread, what it is given."""

    def submit(self, fn, /, *args, **kwargs):
        done: Future = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as e:
            done.set_exception(e)
        return done


# What programs call has no synchronous part but Django's signals at the start and the end of a request, which do next to
# nothing there; for those, Django would start two threads for each request. Rows are `hop.rows`'s, on threads of their own.
_in_place = ThreadSensitiveContext()
SyncToAsync.context_to_thread_executor[_in_place] = InPlace()


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
    if not path.startswith(settings.PROGRAM_PATHS):
        return await django(scope, receive, send)
    token = SyncToAsync.thread_sensitive_context.set(_in_place)
    try:
        return await django(scope, receive, send)
    finally:
        SyncToAsync.thread_sensitive_context.reset(token)


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
