"""Every door's routes."""

from django.contrib import admin
from django.urls import include, path

from executions.console.urls import websocket_urlpatterns

urlpatterns = [
    path("admin/", admin.site.urls),
    path("e2b/", include("executions.gateway.urls")),
    path("", include("executions.api.urls")),
    path("", include("executions.console.urls")),
]

__all__ = ["urlpatterns", "websocket_urlpatterns"]
