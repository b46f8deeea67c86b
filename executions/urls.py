"""Every door's routes."""

from django.conf import settings
from django.contrib import admin
from django.urls import include, path

from executions.console.urls import websocket_urlpatterns

oauth = [path("", include("executions.mcp.authorization"))] if settings.OAUTH else []

urlpatterns = [
    *oauth,
    path("admin/", admin.site.urls),
    path("e2b/", include("executions.gateway.urls")),
    path("", include("executions.api.urls")),
    path("", include("executions.console.urls")),
]

__all__ = ["urlpatterns", "websocket_urlpatterns"]
