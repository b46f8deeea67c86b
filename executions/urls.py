"""Every door's routes."""

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("executions.api.urls")),
]

websocket_urlpatterns: list = []
